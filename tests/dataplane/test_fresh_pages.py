"""Pages are made before they are written to, and what memory holds is not changed by that."""

import ctypes
import mmap
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from modelcache.dataplane.files import reading as file_reading
from modelcache.dataplane.files.reading import read_into
from modelcache.dataplane.files.weight_files import Headers
from modelcache.dataplane.memory import fresh_pages
from modelcache.dataplane.memory.fresh_pages import ask_for_pages, has_pages

PAGE = mmap.PAGESIZE


def resident_pages(memory: mmap.mmap) -> list[bool]:
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    found = (ctypes.c_ubyte * (len(memory) // PAGE))()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(memory)), found) == 0
    return [bool(page & 1) for page in found]


@pytest.fixture
def fresh():
    memory = mmap.mmap(-1, 16 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    assert not any(resident_pages(memory))
    ask_for_pages(memoryview(memory)[:1])
    if not resident_pages(memory)[0]:
        pytest.skip("this system makes pages only when they are written to")
    memory.madvise(mmap.MADV_DONTNEED)
    return memory


@pytest.mark.parametrize(
    ("begin", "end", "first", "last"),
    [(0, 1, 0, 0), (PAGE - 1, PAGE + 1, 0, 1), (PAGE, 2 * PAGE, 1, 1), (3 * PAGE + 5, 7 * PAGE + 5, 3, 7)],
)
def test_exactly_the_pages_of_the_memory_are_made(fresh, begin, end, first, last):
    ask_for_pages(memoryview(fresh)[begin:end])
    assert resident_pages(fresh) == [first <= number <= last for number in range(16)]
    assert not any(fresh[:])


def test_what_the_memory_and_its_neighbours_hold_stays(fresh):
    content = bytes(range(256)) * (16 * PAGE // 256)
    fresh[:] = content
    ask_for_pages(memoryview(fresh)[100 : 3 * PAGE])
    assert fresh[:] == content


def test_no_memory_needs_no_pages():
    ask_for_pages(memoryview(bytearray()))


def test_a_system_that_refuses_is_read_into_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(fresh_pages, "_POPULATE_WRITE", 10_000)
    source = torch.arange(300_000)
    save_file({"a": source}, tmp_path / "m.safetensors")
    target = torch.empty(300_000, dtype=torch.int64)
    read_into([(Headers().find(str(tmp_path / "m.safetensors"), "a", None), target)])
    assert torch.equal(target, source)


def test_memory_has_pages_when_its_middle_has(fresh):
    assert not has_pages(memoryview(fresh))
    fresh[0] = fresh[-1] = 1  # as when the neighbours were written to
    assert not has_pages(memoryview(fresh))
    assert not has_pages(memoryview(fresh)[PAGE : 2 * PAGE])
    ask_for_pages(memoryview(fresh))
    assert has_pages(memoryview(fresh))
    assert has_pages(memoryview(fresh)[PAGE : 2 * PAGE])


@pytest.mark.parametrize("is_there", [False, True])
def test_pages_are_made_for_a_large_tensor_without_them_and_for_no_small_one(
    tmp_path: Path, monkeypatch, fresh, is_there
):
    asked: list[int] = []
    lock = threading.Lock()

    def counted(memory):
        with lock:
            asked.append(memory.nbytes)
        ask_for_pages(memory)

    monkeypatch.setattr(file_reading, "ask_for_pages", counted)
    sources = {"large": torch.arange(300_001), "one": torch.arange(5), "two": torch.arange(7)}
    path = str(tmp_path / "m.safetensors")
    save_file(sources, path)
    memory = mmap.mmap(-1, sources["large"].nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    headers, targets = Headers(), {name: torch.zeros_like(source) for name, source in sources.items()}
    targets["large"] = torch.frombuffer(memory, dtype=torch.int64)
    if is_there:
        targets["large"].zero_()
    read_into([(headers.find(path, name, None), target) for name, target in targets.items()])
    assert all(torch.equal(targets[name], source) for name, source in sources.items())
    assert sum(asked) == (0 if is_there else sources["large"].nbytes)
