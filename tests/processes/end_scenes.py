"""How a process ends: killed in the middle of a write, with a cache that is open, in the middle of a load.

Played in children, see `test_ends.py`. What must not have threads yet is played in grandchildren of one that has none.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benches import Call
from lifecycle.room import Room, Stop, bits, net, until
from processes.children import TESTS, end, forked, play

from modelcache.cache import ModelCache
from modelcache.errors import ModelCacheError

#: The writes of one image file: four segments, and the header last of all.
NUM_WRITES = 5


def files_in(folder: Path, pattern: str) -> list[Path]:
    return [each for each in folder.rglob(pattern) if each.is_file()]


# --- in the middle of a write -----------------------------------------------------------------------------------------


def spill(folder: Path, write: Callable[[Callable[..., int]], Callable[..., int]]) -> None:
    """Write an image file the way that is given."""
    room = Room(folder)
    room.add("a", reload=False)
    room.use("a")
    files = room.mover._tiers.files
    files._write = write(files._write)
    room.cache.evict("a")


def ends_in_write(nth: int, how: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Half of the nth write reaches the file."""

    def wrap(write: Callable[..., int]) -> Callable[..., int]:
        calls = iter(range(1, 100))

        def ending(descriptor: int, data: memoryview) -> int:
            if next(calls) < nth:
                return write(descriptor, data)
            os.write(descriptor, data[: len(data) // 2])
            end(how)
            raise AssertionError("it went on")

        return ending

    return wrap


def next_start(folder: Path) -> None:
    """Another process uses the same folder: it clears up, and what it has back from its files is whole."""
    room = Room(folder)
    room.add("a", "b", reload=False)
    room.use("a", "b")
    room.cache.evict("b")
    assert len(files_in(folder, "*.image")) == 1, files_in(folder, "*")
    assert not files_in(folder, "*.tmp")
    room.cache.evict("a")
    assert room.answers_right("b")
    assert room.answers_right("a")
    room.cache.close()
    # The folder was there before, so it stays; nothing in it does.
    assert [each.name for each in folder.rglob("*")] == ["images"]


def ended_in_a_spill(folder: Path, how: str, code: int) -> None:
    for nth in range(1, NUM_WRITES + 1):
        own = folder / str(nth)
        own.mkdir()
        assert forked(lambda own=own, nth=nth: spill(own, ends_in_write(nth, how))) == code
        assert len(files_in(own, "*.tmp")) == 1, "it was not in the middle of the write"
        assert not files_in(own, "*.image")
        assert forked(lambda own=own: next_start(own)) == 0


def killed_in_a_spill(folder: Path) -> None:
    ended_in_a_spill(folder, "SIGKILL", -9)


def terminated_in_a_spill(folder: Path) -> None:
    ended_in_a_spill(folder, "SIGTERM", -15)


def killed_around_the_rename(folder: Path) -> None:
    """Whole or not, with its final name or not: nobody else ever reads it."""

    def before(own: Path) -> None:
        rename = Path.rename
        Path.rename = lambda self, target: end("SIGKILL") or rename(self, target)
        spill(own, lambda write: write)

    def after(own: Path) -> None:
        rename = Path.rename
        Path.rename = lambda self, target: rename(self, target) and end("SIGKILL")
        spill(own, lambda write: write)

    for number, (scene, left) in enumerate([(before, "*.tmp"), (after, "*.image")]):
        own = folder / str(number)
        own.mkdir()
        assert forked(lambda own=own, scene=scene: scene(own)) == -9
        assert len(files_in(own, left)) == len(files_in(own, "*.tmp") + files_in(own, "*.image")) == 1
        assert forked(lambda own=own: next_start(own)) == 0


def killed_in_a_kept_image(folder: Path) -> None:
    """At each write of it, before it has its name, and after."""
    sys.path.insert(0, str(TESTS / "dataplane"))
    import test_kept_images as kept_images

    from modelcache.dataplane.images import format as image_format
    from modelcache.dataplane.images import kept as product

    source = folder / "model.bin"
    source.write_bytes(b"weights" * 100)

    def write_ending(own: Path, nth: int) -> None:
        calls, write_all = iter(range(1, 100)), image_format.write_all

        def ending(descriptor: int, data: memoryview, *rest: Any) -> None:
            if next(calls) == nth:
                write_all(descriptor, data[: len(data) // 2])
                end("SIGKILL")
            write_all(descriptor, data, *rest)

        product.write_all = ending
        rename = os.rename

        def renaming(*args: Any, **options: Any) -> None:
            if nth == 4:
                end("SIGKILL")
            rename(*args, **options)
            end("SIGKILL")

        os.rename = renaming
        kept_images.write(kept_images.kept(own), kept_images.origin_of(source))

    for nth in range(1, 6):
        own = folder / str(nth)
        own.mkdir()
        assert forked(lambda own=own, nth=nth: write_ending(own, nth)) == -9, nth
        images, origin = kept_images.kept(own), kept_images.origin_of(source)
        left = files_in(own, "*.tmp")
        if nth <= 4:
            assert len(left) == 1
            assert images.find(origin) is None
            assert kept_images.write(images, origin)
        else:
            assert not left, "it had its name, and was whole"
        assert images.find(origin)
        images.sweep()
        assert not files_in(own, "*.tmp")
        assert len(files_in(own, "*.image")) == 1


def killed_with_eight_loads_in_flight(folder: Path) -> None:
    for how, code in (("SIGTERM", -15), ("SIGKILL", -9)):
        own = folder / how
        own.mkdir()

        def rush(own: Path = own, how: str = how) -> None:
            room, stop = Room(own, vram=5, ram=12), Stop()
            room.add("spilled", reload=False)
            room.use("spilled")
            write = room.hold_writes(nth=3)
            for number in range(8):
                room.add(f"m{number}", at=stop)
                Call(lambda number=number: room.cache.get(f"m{number}"))
            Call(lambda: room.cache.evict("spilled"))
            write.wait_reached()
            stop.wait_reached()
            until(lambda: room.cache.status().num_waiting == 9, "everybody waits")
            end(how)

        assert forked(rush) == code
        assert files_in(own, "*.tmp")
        assert forked(lambda own=own: next_start(own)) == 0


def two_processes_share_a_folder(folder: Path) -> None:
    """Each writes, reads and deletes its own files, and sweeps those of no living process."""
    readers: list[int] = []

    def work() -> None:
        room = Room(folder)
        room.add("a", "b", reload=False)
        for _ in range(10):
            room.use("a", "b")
            room.cache.evict("a")
            room.cache.evict("b")
            assert room.answers_right("a")
            assert room.answers_right("b")
        room.cache.close()

    children = []
    for _ in range(2):
        child = os.fork()
        if not child:
            code = 99
            with contextlib.suppress(BaseException):
                work()
                code = 0
            os._exit(code)
        children.append(child)
    for child in children:
        readers.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    assert readers == [0, 0]
    assert not files_in(folder, "*")


SCENES = [
    killed_in_a_spill,
    terminated_in_a_spill,
    killed_around_the_rename,
    killed_in_a_kept_image,
    killed_with_eight_loads_in_flight,
    two_processes_share_a_folder,
]


def main(folder: str) -> None:
    torch.set_num_threads(1)
    play(SCENES, folder)


# --- the end of an interpreter ----------------------------------------------------------------------------------------


def opened(folder: str) -> ModelCache:
    """A cache on the system's clock and threads, as users have it."""
    cache = ModelCache(
        device="simulated", vram="1MiB", ram="64MiB", disk="64MiB", image_dir=f"{folder}/images", segment="64KiB"
    )
    for name in "abc":
        cache.register(name, lambda name=name: net(name), reload=False)
    for name in "abc":
        cache.get(name)(torch.ones(1, 32, device="sim:0"))
    cache.evict("a")
    return cache


def leave_open(folder: str) -> None:
    """Everything is left to the end of the interpreter: leases, a handle, files, futures, threads of the cache."""
    cache = opened(folder)
    globals()["kept"] = [cache.lease_many("b"), cache.get("c"), cache.prefetch("a"), cache.on("move", print), cache]
    print("left", flush=True)


def leave_in_a_load(folder: str) -> None:
    cache = opened(folder)
    begun, pause = threading.Event(), threading.Event()

    def load() -> torch.nn.Module:
        begun.set()
        while not cache._door.is_closed:
            pause.wait(0.01)
        return net("slow")

    cache.register("slow", load)
    for _ in range(8):
        threading.Thread(target=lambda: gave_up(cache), daemon=True).start()
    assert begun.wait(10)
    print("left", flush=True)


def gave_up(cache: ModelCache) -> None:
    with contextlib.suppress(ModelCacheError):
        cache.get("slow")


def struck_in_a_load(folder: str) -> None:
    """Ctrl-C on a script that waits for a model, and has no more to say to it."""
    cache = opened(folder)
    pause = threading.Event()

    def load() -> torch.nn.Module:
        print("left", flush=True)
        while not cache._door.is_closed:
            pause.wait(0.01)
        return net("slow")

    cache.register("slow", load)
    cache.get("slow")
    print("never", flush=True)


# --- workers that are started anew ------------------------------------------------------------------------------------


class Sums(torch.utils.data.Dataset[float]):
    """Each worker that is started anew has a cache of its own."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.cache: ModelCache | None = None

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> float:
        if self.cache is None:
            self.cache = ModelCache(device="host_only", ram="64MiB", image_dir=self.folder)
            self.cache.register("a", lambda: net("a"))
        with self.cache.get("a") as model:
            return float(sum(bits(model))) + index


def workers_started_anew(folder: str) -> None:
    torch.set_num_threads(1)
    cache = opened(folder)
    loader = torch.utils.data.DataLoader(Sums(folder), num_workers=1, multiprocessing_context="spawn")
    expected = float(sum(bits(net("a"))))
    assert [float(each) for each in loader] == [expected, expected + 1]
    with cache.get("a") as model:
        assert bits(model) == bits(net("a"))
    del model
    cache.close()
    print("left", flush=True)
