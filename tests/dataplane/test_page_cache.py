"""What the system has of a file in memory is asked about and given back; where it does not say, nothing is claimed."""

import mmap
import os

import pytest

from modelcache.dataplane.files import page_cache
from modelcache.dataplane.files.page_cache import cached_bytes, forget, is_absent

PAGE = mmap.PAGESIZE


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(64 * PAGE))
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    if cached_bytes(descriptor, 0, 64 * PAGE) is None:
        os.close(descriptor)
        pytest.skip("this kernel has no cachestat")
    yield descriptor
    os.close(descriptor)


def test_what_was_just_written_is_in_memory_until_it_is_forgotten(file):
    assert cached_bytes(file, 0, 64 * PAGE) == 64 * PAGE
    forget(file, 0, 64 * PAGE)
    if cached_bytes(file, 0, 64 * PAGE):
        pytest.skip("this file system keeps its files in memory")
    assert is_absent(file, 0, 64 * PAGE)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
    os.pread(file, 10, 5 * PAGE)
    assert not is_absent(file, 0, 64 * PAGE)


def test_pages_that_a_stretch_has_only_a_part_of_are_left_alone(file):
    forget(file, 0, 64 * PAGE)
    if cached_bytes(file, 0, 64 * PAGE):
        pytest.skip("this file system keeps its files in memory")
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
    os.pread(file, 10, 0)
    assert is_absent(file, 1, 10 * PAGE)
    forget(file, 1, 10 * PAGE)
    assert cached_bytes(file, 0, PAGE) == PAGE


def test_less_than_a_page_is_never_known_to_be_absent(file):
    forget(file, 0, 64 * PAGE)
    assert not is_absent(file, 1, PAGE)
    assert cached_bytes(file, 0, 0) == 0


def test_a_system_that_does_not_say_is_no_absence(file, monkeypatch):
    monkeypatch.setattr(page_cache, "_syscall", lambda *_: -1)
    assert cached_bytes(file, 0, PAGE) is None
    assert not is_absent(file, 0, 8 * PAGE)
