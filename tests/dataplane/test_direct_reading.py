"""Reading past the page cache gives the same bytes as reading through it, whatever lies where, and says when it cannot."""

import errno
import itertools
import os
import random
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from modelcache.dataplane.files import direct as direct_reading
from modelcache.dataplane.files import reading as file_reading
from modelcache.dataplane.files import ways as file_ways
from modelcache.dataplane.files.direct import (
    BLOCK_BYTES,
    Bounces,
    EndsError,
    NotDirectError,
    Range,
    direct,
    read_direct,
)
from modelcache.dataplane.files.page_cache import cached_bytes
from modelcache.dataplane.files.reading import ChangedError, UnreadableError, read_into
from modelcache.dataplane.files.ways import DISK_WORKERS, Way, Ways
from modelcache.dataplane.files.weight_files import FileBytes, Headers

SIZE = 5 * BLOCK_BYTES + 123


def takes_direct_reads(folder: Path) -> bool:
    path = folder / "probe"
    path.write_bytes(bytes(SIZE))
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with direct(descriptor):
            read_direct(descriptor, [Range(0, memoryview(bytearray(10)))], Bounces().mine())
    except NotDirectError:
        return False
    finally:
        os.close(descriptor)
    return True


@pytest.fixture
def folder(tmp_path):
    if not takes_direct_reads(tmp_path):
        pytest.skip("this file system has no direct reads")
    return tmp_path


@pytest.fixture
def file(folder):
    data = random.Random(0).randbytes(SIZE)
    path = folder / "file"
    path.write_bytes(data)
    descriptor = os.open(path, os.O_RDONLY)
    yield descriptor, data
    os.close(descriptor)


@pytest.fixture
def all_direct(monkeypatch):
    """As if the system had nothing of any file in memory."""
    monkeypatch.setattr(file_ways, "_way", lambda _descriptor, _size: Way.DIRECT)


CUTS = [
    [(0, SIZE)],
    [(1, 1)],
    [(BLOCK_BYTES - 1, 2)],
    [(SIZE - 1, 1)],
    [(BLOCK_BYTES, BLOCK_BYTES)],
    [(0, 10), (10, 20), (40, 5000), (5040 + BLOCK_BYTES, 1), (SIZE - 7, 7)],
    [(100, 9000), (100, 9000), (200, 10)],  # the same bytes for several
]


@pytest.mark.parametrize("bounce_bytes", [BLOCK_BYTES, 2 * BLOCK_BYTES, 1 << 20])
@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_ranges_anywhere_are_filled(file, monkeypatch, cuts, bounce_bytes):
    monkeypatch.setattr(direct_reading, "BOUNCE_BYTES", bounce_bytes)
    descriptor, data = file
    memories = [bytearray(size) for _, size in cuts]
    with direct(descriptor):
        ranges = [Range(offset, memoryview(memory)) for (offset, _), memory in zip(cuts, memories, strict=True)]
        read_direct(descriptor, ranges, Bounces().mine())
    assert memories == [data[offset : offset + size] for offset, size in cuts]
    assert os.pread(descriptor, 3, 1) == data[1:4], "the descriptor reads as before"


@pytest.mark.parametrize(("offset", "size", "end"), [(SIZE - 5, 6, SIZE), (SIZE + 9000, 4, None), (0, SIZE + 1, SIZE)])
def test_a_file_that_ends_too_early_is_said(file, offset, size, end):
    descriptor, _ = file
    with direct(descriptor), pytest.raises(EndsError) as caught:
        read_direct(descriptor, [Range(offset, memoryview(bytearray(size)))], Bounces().mine())
    if end is not None:
        assert caught.value.offset == end


def short_reads(monkeypatch, most):
    """As a file system that gives less than was asked for."""
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda d, buffers, offset: min(most, preadv(d, buffers, offset)))


def test_a_short_read_where_no_block_ends_is_not_the_end_of_the_file(file, monkeypatch):
    descriptor, _ = file
    short_reads(monkeypatch, BLOCK_BYTES + 100)
    with direct(descriptor), pytest.raises(NotDirectError, match="before the file does"):
        read_direct(descriptor, [Range(0, memoryview(bytearray(SIZE)))], Bounces().mine())


def test_a_short_read_of_whole_blocks_goes_on(file, monkeypatch):
    descriptor, data = file
    short_reads(monkeypatch, BLOCK_BYTES)
    memory = bytearray(SIZE)
    with direct(descriptor):
        read_direct(descriptor, [Range(0, memoryview(memory))], Bounces().mine())
    assert memory == data


def test_ranges_out_of_file_order_are_filled_all_the_same(file):
    descriptor, data = file
    cuts = [(3 * BLOCK_BYTES, 50), (10, 20), (BLOCK_BYTES, BLOCK_BYTES), (5, 3), (0, SIZE), (7, 2)]
    memories = [bytearray(size) for _, size in cuts]
    with direct(descriptor):
        ranges = [Range(offset, memoryview(memory)) for (offset, _), memory in zip(cuts, memories, strict=True)]
        read_direct(descriptor, ranges, Bounces().mine())
    assert memories == [data[offset : offset + size] for offset, size in cuts]


def test_each_thread_has_a_buffer_of_its_own():
    bounces, found = Bounces(), []
    threads = [threading.Thread(target=lambda: found.append(bounces.mine())) for _ in range(2)]
    for thread in threads:
        thread.start()
        thread.join()
    assert found[0] is not found[1]
    assert bounces.mine() is bounces.mine()


# --- as the reader of weights uses it ---


def stored(folder: Path, tensors: dict[str, torch.Tensor], name: str = "m.safetensors") -> dict[str, FileBytes]:
    path = folder / name
    save_file(tensors, path)
    headers = Headers()
    return {key: headers.find(str(path), key, None) for key in tensors}


def tensors_of_all_sizes() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = [0, 1, 3, 500, 5_000, 70_000, 300_001, 2_500_000]
    return {f"t{i}": torch.randn(size, generator=generator) for i, size in enumerate(sizes)}


@pytest.mark.parametrize("num_workers", [1, 3, None])
def test_tensors_of_all_sizes_are_read(folder, all_direct, monkeypatch, num_workers):
    tensors = tensors_of_all_sizes()
    places = stored(folder, tensors)
    found = {name: torch.full_like(tensor, 7) for name, tensor in tensors.items()}
    reads = []
    read = direct_reading.read_direct
    monkeypatch.setattr(file_reading, "read_direct", lambda *given: (reads.append(given[1]), read(*given)))
    read_into([(places[name], found[name]) for name in found], num_workers=num_workers)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert sum(each.memory.nbytes for ranges in reads for each in ranges) == sum(t.nbytes for t in tensors.values())


def test_past_the_page_cache_the_digests_are_the_same(folder, all_direct, monkeypatch):
    tensors = tensors_of_all_sizes()
    wanted = [(place, torch.full_like(tensors[name], 7)) for name, place in stored(folder, tensors).items()]
    found = [{}, {}, {}]
    read_into(wanted, landed=found[0].__setitem__)
    short_reads(monkeypatch, 70_000)
    read_into(wanted, landed=found[1].__setitem__)
    monkeypatch.undo()
    read_into(wanted, landed=found[2].__setitem__)
    assert found[0] == found[1] == found[2]
    assert len(set(found[0].values())) == len(tensors)


def test_where_direct_reads_come_short_tensors_are_read_through_the_cache(folder, all_direct, monkeypatch):
    tensors = tensors_of_all_sizes()
    places = stored(folder, tensors)
    found = {name: torch.full_like(tensor, 7) for name, tensor in tensors.items()}
    short_reads(monkeypatch, 70_000)
    read_into([(places[name], found[name]) for name in found])
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_tensors_are_converted_on_the_way(folder, all_direct):
    tensors = {"a": torch.randn(3_000_000), "b": torch.randn(40, 30)}
    places = stored(folder, tensors)
    found = {"a": torch.empty(3_000_000, dtype=torch.bfloat16), "b": torch.empty(30, 40).t()}
    read_into([(places[name], found[name]) for name in found])
    assert torch.equal(found["a"], tensors["a"].bfloat16())
    assert torch.equal(found["b"], tensors["b"])


def test_all_shards_are_read_by_as_many_threads_as_disks_want(folder, all_direct, monkeypatch):
    tensors = {f"t{i}": torch.full((1 << 20,), float(i)) for i in range(8)}
    places = {}
    for i, (name, tensor) in enumerate(tensors.items()):
        places |= stored(folder, {name: tensor}, f"{i}.safetensors")
    asked = []
    reading = file_reading.reading
    monkeypatch.setattr(
        file_reading, "reading", lambda *given, **how: (asked.append(given[1]), reading(*given, **how))[1]
    )
    found = {name: torch.empty(1 << 20) for name in tensors}
    read_into([(places[name], found[name]) for name in reversed(found)])
    assert asked == [DISK_WORKERS]
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_what_is_not_in_memory_stays_out_of_it(folder):
    tensors = {"a": torch.randn(1 << 20)}
    places = stored(folder, tensors)
    descriptor = os.open(places["a"].path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        if cached_bytes(descriptor, 0, 4 << 20) != 0:
            pytest.skip("this system does not say or keeps the file in memory")
        found = torch.empty(1 << 20)
        read_into([(places["a"], found)])
        assert torch.equal(found, tensors["a"])
        assert cached_bytes(descriptor, 0, 4 << 20) == 0
    finally:
        os.close(descriptor)


def test_what_is_in_memory_is_read_from_there(folder, monkeypatch):
    tensors = {"a": torch.randn(1 << 20)}
    places = stored(folder, tensors)  # just written: the system has it
    monkeypatch.setattr(file_reading, "read_direct", lambda *_: pytest.fail("read past the page cache"))
    found = torch.empty(1 << 20)
    read_into([(places["a"], found)])
    assert torch.equal(found, tensors["a"])


def test_a_system_that_does_not_say_what_it_has_is_read_through_its_cache(folder, monkeypatch):
    tensors = {"a": torch.randn(1 << 20)}
    places = stored(folder, tensors)
    monkeypatch.setattr(file_ways, "cached_bytes", lambda *_: None)
    monkeypatch.setattr(file_reading, "read_direct", lambda *_: pytest.fail("read past the page cache"))
    found = torch.empty(1 << 20)
    read_into([(places["a"], found)])
    assert torch.equal(found, tensors["a"])


@pytest.mark.parametrize("when", ["asked", "reading"])
def test_a_file_system_without_direct_reads_is_read_through_the_cache_which_keeps_only_what_it_had(
    folder, monkeypatch, when
):
    tensors = {f"t{i}": torch.randn(1 << 20) for i in range(12)}
    places = stored(folder, tensors)
    path = places["t0"].path
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        if cached_bytes(descriptor, 0, 1 << 30) != 0:
            pytest.skip("this system does not say or keeps the file in memory")
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(descriptor, 4, 9 << 20)  # somebody else has read here
        had = cached_bytes(descriptor, 0, 1 << 30)

        def refused(*_):
            if when == "asked":
                raise OSError(errno.EINVAL, "Invalid argument")
            raise NotDirectError

        if when == "asked":
            monkeypatch.setattr(direct_reading.fcntl, "fcntl", lambda d, c, f=0: f and refused())
        else:
            monkeypatch.setattr(file_reading, "read_direct", refused)
        found = {name: torch.empty(1 << 20) for name in tensors}
        read_into([(places[name], found[name]) for name in found])
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)
        kept = cached_bytes(descriptor, 0, 1 << 30)
        # The piece that others had something of stays as a whole; so may the pages between two pieces.
        assert had <= kept <= 2 * file_reading._PIECE_BYTES < 12 << 22
    finally:
        os.close(descriptor)


def test_a_file_cut_short_is_named_with_the_tensor(folder, all_direct):
    places = stored(folder, {"a": torch.randn(1 << 20), "b": torch.randn(1 << 20)})
    os.truncate(places["b"].path, places["b"].offset + 5000)
    unknown = [FileBytes(p.path, p.offset, p.dtype, p.shape) for p in (places["a"], places["b"])]
    with pytest.raises(UnreadableError, match="shortened while it was read") as caught:
        read_into([(place, torch.empty(1 << 20)) for place in unknown])
    assert caught.value.position == 1


@pytest.mark.parametrize("change", ["written", "replaced", "shortened"])
@pytest.mark.parametrize("num_workers", [1, 4])
def test_a_file_that_changes_while_it_is_read_is_refused(folder, all_direct, monkeypatch, change, num_workers):
    places = stored(folder, {"a": torch.randn(6 << 20)})
    path, read, calls = Path(places["a"].path), direct_reading.read_direct, itertools.count()

    def then(*given):
        read(*given)
        if next(calls) == 0:
            if change == "written":
                os.utime(path, ns=(1, 1))
            elif change == "replaced":
                path.rename(path.with_suffix(".old"))
                path.write_bytes(path.with_suffix(".old").read_bytes())
            else:
                os.truncate(path, 1000)

    monkeypatch.setattr(file_reading, "read_direct", then)
    with pytest.raises((ChangedError, UnreadableError)):
        read_into([(places["a"], torch.empty(6 << 20))], num_workers=num_workers)


def test_a_disk_that_fails_is_told_with_the_path(folder, all_direct, monkeypatch):
    places = stored(folder, {"a": torch.randn(1 << 20)})

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(direct_reading.os, "preadv", fail)
    with pytest.raises(UnreadableError, match="reading failed: Input/output error"):
        read_into([(places["a"], torch.empty(1 << 20))])


def test_files_that_are_not_there_do_not_matter_for_the_number_of_threads(tmp_path):
    assert Ways().num_workers([str(tmp_path / "none")]) == file_ways.CACHED_WORKERS
