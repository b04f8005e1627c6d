"""What a process runs into: a full disk, no descriptors, no memory, files that change under it, a closed stdout, a fork.

Played in a child, see `test_limits.py`: limits are of a whole process.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lifecycle.room import LAYERS, MODEL_BYTES, Room, Stop, bits, net
from processes.children import forked, play
from safetensors.torch import save_file

from modelcache import ModelCache, materialize_meta_tensors
from modelcache.dataplane.device import simulated_ranges
from modelcache.dataplane.loading import skeletons
from modelcache.dataplane.materialize import entry_points
from modelcache.errors import ForkedCacheError, LoaderError, ModelCacheError, MoveError, WeightsError
from modelcache.tier import Tier


@contextlib.contextmanager
def limited(which: int, limit: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(which)
    resource.setrlimit(which, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(which, (soft, hard))


@contextlib.contextmanager
def room_in(folder: Path, **options: Any) -> Iterator[Room]:
    room = Room(folder, **options)
    try:
        yield room
    finally:
        room.cache.close()
    gc.collect()
    assert (room.device.allocated_bytes(), room.mover.live_ram_bytes) == (0, 0)
    assert not [each for each in room.images.rglob("*") if each.is_file()]


def shape() -> torch.nn.Module:
    return torch.nn.Sequential(*(torch.nn.Linear(32, 32, bias=False) for _ in range(LAYERS)))


def saved(folder: Path, name: str) -> Path:
    """The weights of the model of that name in a file."""
    path = folder / f"{name}.safetensors"
    save_file(net(name).state_dict(), path)
    return path


def add_file(room: Room, folder: Path, name: str) -> Path:
    path = saved(folder, name)
    room.cache.register(name, "safetensors", model=shape, weights=str(path))
    return path


def refused(room: Room, name: str, *kinds: type[Exception]) -> str:
    try:
        with room.cache.get(name):
            pass
    except kinds as error:
        return str(error)
    raise AssertionError(f"{name} was had")


def is_exact(room: Room) -> None:
    room.pool.settle()

    def check(machine: Any) -> None:
        machine.validate()
        assert machine.books.vram.resident_bytes == room.device.allocated_bytes()
        assert machine.books.ram.resident_bytes == room.mover.live_ram_bytes

    room.cache._driver.look(check)


def full_disk(folder: Path) -> None:
    with room_in(folder) as room:
        room.add("a", reload=False)
        room.add("other")
        room.use("a", "other")
        for limit in (0, 1000, 5000, 12000):
            with limited(resource.RLIMIT_FSIZE, limit):
                try:
                    room.cache.evict("a")
                except MoveError as error:
                    words = str(error)
                else:
                    raise AssertionError("it was written")
            assert str(room.images) in words, words
            assert "needs" in words, words
            assert "free" in words, words
            assert not [*room.images.rglob("*.tmp"), *room.images.rglob("*.image")]
            del words
            is_exact(room)
            assert room.answers_right("a")
            assert room.answers_right("other")
        room.cache.evict("a")
        assert room.answers_right("a")


def no_descriptors(folder: Path) -> None:
    with room_in(folder) as room:
        room.add("a")
        room.use("a")
        add_file(room, folder, "b")
        room.add("c", reload=False)
        room.use("c")
        nothing = len(os.listdir("/proc/self/fd"))
        taken = []
        with limited(resource.RLIMIT_NOFILE, nothing + 4):
            with contextlib.suppress(OSError):
                while True:
                    taken.append(os.open("/dev/null", os.O_RDONLY))
            words = refused(room, "b", ModelCacheError)
            assert "Too many open files" in words, words
            try:
                room.cache.evict("c")
            except MoveError as error:
                assert "Too many open files" in str(error), error
            else:
                raise AssertionError("it was written")
            assert room.answers_right("a")
            for descriptor in taken:
                os.close(descriptor)
        is_exact(room)
        assert room.answers_right("b")
        assert room.answers_right("c")


def no_memory(folder: Path) -> None:
    """Threads and their heaps are there already: what is refused is the model's memory."""
    big = 512 << 20
    with room_in(folder, ram=8 + 2 * big // MODEL_BYTES) as room:
        room.add("a", "b", "c", "d")
        room.use("a", "b", "c", "d")

        def load() -> torch.nn.Module:
            layer = torch.nn.Linear(1, 1)
            layer.weight = torch.nn.Parameter(torch.ones(big // 4), requires_grad=False)
            return layer

        room.cache.register("big", load, reload=True)
        address_space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        with limited(resource.RLIMIT_AS, address_space + (128 << 20)):
            for _ in range(2):
                words = refused(room, "big", LoaderError)
                assert "memory" in words, words
                assert room.answers_right("a")
        is_exact(room)
        assert room.cache.health().is_ready


def a_file_truncated_while_it_is_read(folder: Path) -> None:
    with room_in(folder) as room:
        path = add_file(room, folder, "a")
        room.add("other")
        preadv, size = os.preadv, path.stat().st_size

        def truncating(descriptor: int, buffers: Any, offset: int, *rest: int) -> int:
            os.truncate(path, size // 2)
            return preadv(descriptor, buffers, offset, *rest)

        os.preadv = truncating
        try:
            words = refused(room, "a", WeightsError)
        finally:
            os.preadv = preadv
        assert str(path) in words, words
        is_exact(room)
        assert room.answers_right("other")
        # A file that is another one by now is not taken for the same without a word of its owner.
        room.cache.unregister("a")
        add_file(room, folder, "a")
        assert room.answers_right("a")


def a_file_truncated_after_it_was_loaded(folder: Path) -> None:
    """No byte of it is mapped: what is held stays whole, and the next load is refused."""
    with room_in(folder) as room:
        path = add_file(room, folder, "a")
        room.use("a")
        os.truncate(path, 200)
        assert room.answers_right("a")
        room.cache.park("a")
        assert room.answers_right("a")
        with contextlib.suppress(ModelCacheError):
            room.cache.evict("a")
            words = refused(room, "a", WeightsError)
            assert str(path) in words, words
        is_exact(room)


def a_file_renamed_over_while_it_is_read(folder: Path) -> None:
    with room_in(folder) as room:
        path = add_file(room, folder, "a")
        preadv, other = os.preadv, saved(folder, "z")
        calls = []

        def renaming(descriptor: int, buffers: Any, offset: int, *rest: int) -> int:
            if not calls:
                os.replace(other, path)
            calls.append(offset)
            return preadv(descriptor, buffers, offset, *rest)

        os.preadv = renaming
        try:
            with room.cache.get("a") as model:
                seen = bits(model)
            del model
        except WeightsError as error:
            assert str(path) in str(error)
        else:
            # Never a mix of two files.
            assert seen in (bits(net("a")), bits(net("z")))
        finally:
            os.preadv = preadv
        is_exact(room)


def a_file_overwritten_in_place_while_it_is_read(folder: Path) -> None:
    with room_in(folder) as room:
        path = add_file(room, folder, "a")
        preadv, data = os.preadv, saved(folder, "z").read_bytes()

        def overwriting(descriptor: int, buffers: Any, offset: int, *rest: int) -> int:
            got = preadv(descriptor, buffers, offset, *rest)
            with path.open("r+b") as file:
                file.write(data)
            os.utime(path, ns=(1, 1))
            return got

        os.preadv = overwriting
        try:
            words = refused(room, "a", WeightsError)
        finally:
            os.preadv = preadv
        assert "changed" in words, words
        is_exact(room)


def a_file_deleted(folder: Path) -> None:
    with room_in(folder) as room:
        path = add_file(room, folder, "a")
        room.use("a")
        path.unlink()
        assert room.answers_right("a")
        room.cache.park("a")
        assert room.answers_right("a")
        with contextlib.suppress(ModelCacheError):
            room.cache.evict("a")
            words = refused(room, "a", ModelCacheError)
            assert str(folder) in words, words
            assert path.name in words, words
        is_exact(room)


def closed_stdout(folder: Path) -> None:
    """Log lines and progress go nowhere; models come and go all the same."""
    handler = logging.StreamHandler(sys.stdout)
    logger = logging.getLogger("modelcache")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    raises, logging.raiseExceptions = logging.raiseExceptions, False
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        for stdout in ("full", "closed"):
            if stdout == "full":
                os.dup2(full, 1)
            else:
                os.close(1)
            with room_in(folder / stdout) as room:
                room.add("a", "b")
                room.use("a", "b")
                room.cache.evict("a")
                assert room.answers_right("a")
                assert room.cache.health().is_ready
    finally:
        logging.raiseExceptions = raises
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
        os.dup2(full, 1)
        os.close(full)


def forked_with_the_lock_held(folder: Path) -> None:
    """The thread that holds it does not exist in the child, so nothing there may wait for it; nor for that of names."""
    with room_in(folder) as room:
        room.add("a", "b")
        room.use("a")
        handles = [room.cache.get("a")]
        cache = room.cache
        asks = [
            lambda: cache.get("a"),
            lambda: cache.get("b", timeout=1),
            lambda: handles[0](torch.ones(1, 32)),
            lambda: cache.lease_many("a", "b"),
            lambda: cache.register("c", net),
            lambda: cache.prefetch("b", Tier.RAM),
            lambda: cache.unregister("b"),
            lambda: cache.pin("a"),
            lambda: cache.unpin("a"),
            lambda: cache.park("a"),
            lambda: cache.free(vram=1),
            lambda: cache.resize(vram=1),
            cache.status,
            cache.health,
            lambda: cache.info("a"),
        ]

        def child() -> None:
            for number, ask in enumerate(asks):
                try:
                    ask()
                except ForkedCacheError as error:
                    assert "fork" in str(error)
                else:
                    raise AssertionError(number)
            assert cache.names() == ("a", "b")
            cache.close()

        with Stop() as stop:
            looking = threading.Thread(target=lambda: cache._driver.look(lambda machine: stop.stand()))
            looking.start()
            stop.wait_reached()
            with cache._naming:
                assert forked(child) == 0
        looking.join()
        assert handles.pop()(torch.ones(1, 32, device=room.device.name)).shape == (1, 32)
        assert room.answers_right("b")
        is_exact(room)


def forked_in_the_middle_of_what_a_process_has_once(_folder: Path) -> None:
    """A library builds a model, memory is mapped, a model is made whole: each by a thread that the child has not."""

    def child() -> None:
        signal.alarm(20)  # whoever waits for a lock that nobody lets go of
        assert skeletons.on_meta(lambda: torch.nn.Linear(2, 2)) is not None
        materialize_meta_tensors(torch.nn.Linear(2, 2))
        with ModelCache(device="simulated", memory="mapped", vram="8MiB", ram="64MiB", progress=False) as new:
            new.register("a", lambda: net("a"))
            assert new.get("a")(torch.ones(1, 32)).shape == (1, 32)

    def hold(lock: threading.Lock, stop: Stop) -> None:
        with lock:
            stop.stand()

    with ExitStack() as stops:
        holders = []
        for lock in (skeletons.one_builder, simulated_ranges._LOCK, entry_points._turns_lock):
            stop = stops.enter_context(Stop())
            holders.append(threading.Thread(target=hold, args=(lock, stop)))
            holders[-1].start()
            stop.wait_reached()
        code = forked(child)
    for holder in holders:
        holder.join()
    assert code == 0


class Numbers(torch.utils.data.Dataset[float]):
    """What a user might write: a data set that has its inputs from a model of the cache."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> float:
        if self.cache is None:
            return float(index)
        try:
            self.cache.get("a")
        except ForkedCacheError:
            return -1.0
        return 0.0


def a_data_loader_of_forked_workers(folder: Path) -> None:
    with room_in(folder) as room:
        room.add("a")
        room.use("a")
        for cache, expected in ((None, [0.0, 1.0, 2.0, 3.0]), (room.cache, [-1.0] * 4)):
            loader = torch.utils.data.DataLoader(Numbers(cache), num_workers=1, multiprocessing_context="fork")
            assert [float(each) for each in loader] == expected
        assert room.answers_right("a")


SCENES = [
    full_disk,
    no_descriptors,
    no_memory,
    a_file_truncated_while_it_is_read,
    a_file_truncated_after_it_was_loaded,
    a_file_renamed_over_while_it_is_read,
    a_file_overwritten_in_place_while_it_is_read,
    a_file_deleted,
    forked_with_the_lock_held,
    forked_in_the_middle_of_what_a_process_has_once,
    a_data_loader_of_forked_workers,
    closed_stdout,
]


def main(folder: str) -> None:
    torch.set_num_threads(1)
    play(SCENES, folder)
