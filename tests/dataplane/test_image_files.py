"""Image files: whole or not there, private, verified, and only ever our own."""

import errno
import json
import os
import stat
import struct
import zlib
from pathlib import Path

import pytest
import torch
from xxhash import xxh3_64_digest, xxh3_64_intdigest

from modelcache.dataplane.fingerprint import fingerprint
from modelcache.dataplane.image import View, lay_out
from modelcache.dataplane.images import format as image_format
from modelcache.dataplane.images import reading as image_reading
from modelcache.dataplane.images.files import Contents, ImageFiles
from modelcache.errors import MoveError, WeightsError

SIZES = (700, 40, 1500)
VIEWS = tuple({f"t{i}": View(torch.uint8, (size,), (1,), 0)} for i, size in enumerate(SIZES))
CONTENTS = Contents("m#1", "m", lay_out(SIZES, 1536), VIEWS)
DATA = [
    bytes((i * 7 + s) % 256 for i in range(segment.size_bytes)) for s, segment in enumerate(CONTENTS.image.segments)
]
PRINTS = [fingerprint(torch.frombuffer(bytearray(each), dtype=torch.uint8)) for each in DATA]


_opened: list[ImageFiles] = []


def opened(*args, **options) -> ImageFiles:
    """Image files that are closed when the test ends."""
    _opened.append(ImageFiles(*args, **options))
    return _opened[-1]


@pytest.fixture(autouse=True)
def _closed(no_file_is_left_open):
    yield
    while _opened:
        _opened.pop().close()


def write(files, contents=CONTENTS):
    return files.write(contents, PRINTS, lambda s: [memoryview(DATA[s])])


def read(files, file, segments=(0, 1)):
    buffers = {s: bytearray(len(DATA[s])) for s in segments}
    told = []
    prints = files.read(file, CONTENTS, {s: memoryview(buffer) for s, buffer in buffers.items()}, told.append)
    assert prints == {s: PRINTS[s] for s in segments}
    assert sum(told) == sum(map(len, buffers.values()))
    return buffers


def everything(directory):
    return [path for path in directory.rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_what_was_written_is_read_and_takes_what_was_said(tmp_path):
    files = opened(tmp_path / "images")
    file = write(files)
    assert file.size_bytes == file.path.stat().st_size == ImageFiles.size_bytes(CONTENTS)
    assert file.prints == tuple(PRINTS)
    assert read(files, file) == {0: DATA[0], 1: DATA[1]}
    assert read(files, file, (1,)) == {1: DATA[1]}


def test_the_manifest_says_what_lies_where(tmp_path):
    file = write(opened(tmp_path))
    raw = file.path.read_bytes()
    magic, checksum, length = struct.unpack_from("<8sIQ", raw)
    manifest = raw[20 : 20 + length]
    assert (magic, checksum) == (b"MCIMAGE1", zlib.crc32(manifest))
    found = json.loads(manifest)
    assert (found["version"], found["part"]) == (2, "m#1")
    assert [storage["size"] for storage in found["storages"]] == list(SIZES)
    assert found["storages"][0]["xxh3"] == f"{xxh3_64_intdigest(DATA[0][:700]):016x}"
    assert found["storages"][1]["tensors"] == {"t1": ["torch.uint8", [40], [1], 0]}
    assert [segment["fingerprint"] for segment in found["segments"]] == [f"{each:016x}" for each in PRINTS]
    digests = [xxh3_64_intdigest(xxh3_64_digest(data)) for data in DATA]
    assert [segment["xxh3"] for segment in found["segments"]] == [f"{each:016x}" for each in digests]


@pytest.mark.parametrize("chunk_bytes", [1, 7, 64, 1 << 20])
def test_however_it_is_written_and_read_the_sums_are_the_same(tmp_path, monkeypatch, chunk_bytes):
    for module in (image_format, image_reading):
        monkeypatch.setattr(module, "CHUNK_BYTES", chunk_bytes)
    files = opened(tmp_path)
    whole = write(files)

    def in_pieces(segment):
        for start in range(0, len(DATA[segment]), 13):
            yield memoryview(DATA[segment][start : start + 13])

    pieces = files.write(CONTENTS, PRINTS, in_pieces)
    assert (pieces.digests, pieces.checksums) == (whole.digests, whole.checksums)
    assert read(files, pieces) == {0: DATA[0], 1: DATA[1]}


def test_files_are_for_their_user_only_and_their_names_say_nothing(tmp_path):
    contents = Contents("../../etc/passwd", "m", CONTENTS.image, VIEWS)
    file = write(opened(tmp_path / "images"), contents)
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(file.path.parent.parent.stat().st_mode) == 0o700
    assert file.path.resolve().is_relative_to((tmp_path / "images").resolve())
    assert "passwd" not in file.path.name


def test_a_second_write_replaces_the_first_and_delete_removes_it(tmp_path):
    files = opened(tmp_path)
    first, second = write(files), write(files)
    assert first.path == second.path
    assert everything(tmp_path) == [second.path]
    files.delete(second)
    files.delete(second)
    assert everything(tmp_path) == []
    files.close()
    assert list(tmp_path.iterdir()) == []


def test_closing_removes_only_what_was_made(tmp_path):
    other = tmp_path / "images" / "precious.image"
    other.parent.mkdir()
    other.write_text("mine")
    files = opened(tmp_path / "images")
    files.delete(write(files))
    files.close()
    files.close()
    assert everything(tmp_path) == [other]
    made = opened(tmp_path / "new" / "deep")
    made.delete(write(made))
    made.close()
    assert not (tmp_path / "new" / "deep").exists()


def test_a_file_has_its_name_once_its_bytes_are_on_the_disk_and_then_the_folder_too(tmp_path, monkeypatch):
    acts: list[str] = []
    sync, rename = os.fsync, Path.rename

    def synced(descriptor):
        acts.append("folder synced" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file synced")
        sync(descriptor)

    def renamed(path, target):
        acts.append("renamed")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    write(opened(tmp_path))
    assert acts == ["file synced", "renamed", "folder synced"]


@pytest.mark.parametrize("fail_at", range(5))
def test_a_failing_write_leaves_no_file_and_names_path_need_and_free(tmp_path, fail_at):
    calls = iter(range(100))

    def full(descriptor, data):
        if next(calls) == fail_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return os.write(descriptor, data[:1000])

    files = opened(tmp_path, write=full)
    with pytest.raises(MoveError, match=r"No space left on device: needs .*KiB, .* free; free disk space") as caught:
        write(files)
    assert str(tmp_path) in str(caught.value)
    assert everything(tmp_path) == []


@pytest.mark.parametrize("is_cached", [True, False])
def test_a_large_segment_is_read_in_chunks_whether_the_system_has_it_in_memory_or_not(tmp_path, is_cached):
    sizes = [9 << 20, 512, 5 << 20]
    contents = Contents("m#1", "m", lay_out(sizes, 10 << 20), tuple({} for _ in sizes))
    data = [torch.randint(256, (segment.size_bytes,), dtype=torch.uint8) for segment in contents.image.segments]
    files = opened(tmp_path)
    file = files.write(contents, [fingerprint(each) for each in data], lambda s: [memoryview(data[s].numpy())])
    with file.path.open("rb") as raw:
        os.fsync(raw.fileno())
        if not is_cached:
            os.posix_fadvise(raw.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    for _ in range(2):
        targets = [torch.zeros_like(each) for each in data]
        files.read(file, contents, {s: memoryview(t.numpy()) for s, t in enumerate(targets)}, lambda count: None)
        assert all(torch.equal(target, each) for target, each in zip(targets, data, strict=True))


def test_what_a_report_raises_ends_the_reading(tmp_path):
    files = opened(tmp_path)
    file = write(files)

    def stop(count):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.read(file, CONTENTS, {0: memoryview(bytearray(len(DATA[0])))}, stop)


def test_short_writes_are_continued(tmp_path):
    files = opened(tmp_path, write=lambda descriptor, data: os.write(descriptor, data[:17]))
    assert read(files, write(files)) == {0: DATA[0], 1: DATA[1]}


def test_an_error_while_the_bytes_are_fetched_removes_the_temporary_file(tmp_path):
    files = opened(tmp_path)

    def broken(segment):
        if segment == 1:
            raise KeyboardInterrupt
        return [memoryview(DATA[segment])]

    with pytest.raises(KeyboardInterrupt):
        files.write(CONTENTS, PRINTS, broken)
    assert everything(tmp_path) == []


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "images").write_text("a file")
    with pytest.raises(MoveError, match=r"images.*cannot be written: (Not a directory|File exists)"):
        write(opened(tmp_path / "images"))


@pytest.mark.parametrize("at", [0, 700, 1023, 1024, 1024 + 700])
def test_a_flipped_bit_in_a_tensor_is_found_and_named(tmp_path, at):
    files = opened(tmp_path)
    file = write(files)
    raw = bytearray(file.path.read_bytes())
    raw[file.data_offset + at] ^= 1
    file.path.write_bytes(raw)
    hit = [
        i
        for i, place in enumerate(CONTENTS.image.storages)
        if 0 <= at - CONTENTS.image.segments[place.segment].offset_bytes - place.offset_bytes < place.size_bytes
    ]
    words = f"'t{hit[0]}': is damaged" if hit else r"\.image: is damaged"  # else between two storages
    with pytest.raises(WeightsError, match=words) as caught:
        read(files, file)
    assert caught.value.path == str(file.path)


@pytest.mark.parametrize("size", [0, 100, 4096, 4097, 5000])
def test_a_truncated_file_is_an_error_and_not_a_crash(tmp_path, size):
    files = opened(tmp_path)
    file = write(files)
    os.truncate(file.path, size)
    with pytest.raises(WeightsError, match="is truncated"):
        read(files, file)


def test_a_file_that_is_gone_or_a_link_is_an_error(tmp_path):
    files = opened(tmp_path)
    file = write(files)
    moved = file.path.rename(tmp_path / "elsewhere")
    with pytest.raises(WeightsError, match="cannot be opened: No such file"):
        read(files, file)
    file.path.symlink_to(moved)
    with pytest.raises(WeightsError, match="cannot be opened"):
        read(files, file)
