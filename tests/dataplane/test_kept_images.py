"""Images that outlive their process: whole or not there, found by what they were made from, within a budget."""

import fcntl
import logging
import os
import signal
import stat
import subprocess
import sys

import pytest
import torch

from modelcache.dataplane.fingerprint import fingerprint
from modelcache.dataplane.image import View, lay_out
from modelcache.dataplane.images import format as image_format
from modelcache.dataplane.images import kept as kept_images
from modelcache.dataplane.images.format import Contents, Sums
from modelcache.dataplane.images.kept import AbandonedError, KeptImages
from modelcache.dataplane.images.origin import Origin
from modelcache.dataplane.images.reading import read_segments

SEGMENT = 1536
SIZES = (700, 40, 1500)
VIEWS = tuple({f"t{i}": View(torch.uint8, (size,), (1,), 0)} for i, size in enumerate(SIZES))
CONTENTS = Contents("", "m", lay_out(SIZES, SEGMENT), VIEWS)
DATA = [
    bytes((i * 7 + s) % 256 for i in range(segment.size_bytes)) for s, segment in enumerate(CONTENTS.image.segments)
]
PRINTS = [fingerprint(torch.frombuffer(bytearray(each), dtype=torch.uint8)) for each in DATA]
SUMS = Sums(CONTENTS.image)
for index, each in enumerate(DATA):
    SUMS.add(index, 0, memoryview(each))


@pytest.fixture
def source(tmp_path):
    file = tmp_path / "model.bin"
    file.write_bytes(b"weights")
    return file


def kept(tmp_path, budget=1 << 20, segment=SEGMENT):
    return KeptImages(tmp_path / "images", budget, segment)


def fill(write):
    for each in DATA:
        write(memoryview(each))
    return PRINTS, SUMS


def write(images, origin, **about):
    return images.write(origin, CONTENTS, about, fill)


def origin_of(source, **facts):
    return Origin.of(facts, [source])


def names(tmp_path):
    return sorted(path.name for path in (tmp_path / "images").rglob("*") if path.is_file())


def test_what_was_written_is_found_by_another_with_all_that_was_said_of_it(tmp_path, source):
    origin = origin_of(source)
    assert kept(tmp_path).find(origin) is None
    file = write(kept(tmp_path), origin, colour="red")
    found = kept(tmp_path).find(origin_of(source))
    assert (found.image, found.views, found.about["colour"]) == (CONTENTS.image, VIEWS, "red")
    assert found.file.is_kept
    assert (found.file.path, found.file.prints, found.file.size_bytes) == (file.path, tuple(PRINTS), file.size_bytes)
    assert file.path.stat().st_size == file.size_bytes
    targets = {s: bytearray(len(each)) for s, each in enumerate(DATA)}
    with file.path.open("rb") as raw:
        views = {s: memoryview(target) for s, target in targets.items()}
        read_segments(raw.fileno(), found.file, found.image, views, lambda count: None)
    assert list(targets.values()) == DATA
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.path.parent.stat().st_mode) == 0o700


def test_other_facts_other_files_and_another_cut_are_another_image(tmp_path, source):
    write(kept(tmp_path), origin_of(source, dtype="bfloat16"))
    assert kept(tmp_path).find(origin_of(source, dtype="float16")) is None
    assert kept(tmp_path, segment=4096).find(origin_of(source, dtype="bfloat16")) is None
    assert len(names(tmp_path)) == 0  # the last one could not be used, and was taken away


@pytest.mark.parametrize("change", ["longer", "rewritten", "rewritten under the old date", "replaced", "gone"])
def test_an_image_whose_source_changed_is_not_found_and_is_swept(tmp_path, source, change):
    before = origin_of(source)
    write(kept(tmp_path), before)
    if change == "longer":
        source.write_bytes(b"weights and more")
    elif change == "rewritten":
        os.utime(source, ns=(1, 1))
    elif change == "rewritten under the old date":
        found = source.stat()
        source.write_bytes(b"WEIGHTS")
        os.utime(source, ns=(found.st_atime_ns, found.st_mtime_ns))
    elif change == "replaced":
        found = source.stat()
        (tmp_path / "new").write_bytes(b"WEIGHTS")
        os.utime(tmp_path / "new", ns=(found.st_atime_ns, found.st_mtime_ns))
        (tmp_path / "new").replace(source)
    else:
        source.unlink()
    if change != "gone":
        assert origin_of(source).key != before.key
        assert kept(tmp_path).find(origin_of(source)) is None
    kept(tmp_path).sweep()
    assert names(tmp_path) == []


def test_the_content_of_small_files_counts_whatever_their_dates_say(tmp_path, source):
    config = tmp_path / "config.json"
    config.write_text("{}")
    found = config.stat()
    before = Origin.of({}, [source], [config, tmp_path / "missing.json"])
    config.write_text("[]")
    os.utime(config, ns=(found.st_atime_ns, found.st_mtime_ns))
    after = Origin.of({}, [source], [config, tmp_path / "missing.json"])
    assert before.files[0] == after.files[0]
    assert before.key != after.key
    (tmp_path / "missing.json").write_text("")
    assert Origin.of({}, [source], [config, tmp_path / "missing.json"]).key != after.key


def test_a_current_image_is_not_swept(tmp_path, source):
    file = write(kept(tmp_path), origin_of(source))
    kept(tmp_path).sweep()
    assert names(tmp_path) == [file.path.name]


@pytest.mark.parametrize("damage", ["cut", "cut to the magic", "header", "longer"])
def test_an_image_that_cannot_be_understood_is_not_used_and_taken_away(tmp_path, source, caplog, damage):
    origin = origin_of(source)
    file = write(kept(tmp_path), origin)
    raw = bytearray(file.path.read_bytes())
    if damage == "header":
        raw[100] ^= 1
    file.path.write_bytes({"cut": raw[:-1], "cut to the magic": raw[:8], "longer": raw + b"\0"}.get(damage, raw))
    with caplog.at_level(logging.WARNING):
        assert kept(tmp_path).find(origin) is None
    assert [str(file.path) in record.getMessage() for record in caplog.records] == [True]
    assert names(tmp_path) == []


def test_an_image_of_something_else_under_this_name_is_not_used(tmp_path, source):
    file = write(kept(tmp_path), origin_of(source, n=1))
    other = origin_of(source, n=2)
    file.path.rename(file.path.with_name(f"{other.key}.image"))
    assert kept(tmp_path).find(other) is None


# ------------------------------------------------------------------------------------------------------------ room


def test_the_longest_unused_goes_first_and_a_find_is_a_use(tmp_path, source):
    origins = [origin_of(source, n=i) for i in range(4)]
    size = write(kept(tmp_path), origins[0]).size_bytes
    images = kept(tmp_path, budget=3 * size)
    for i, origin in enumerate(origins[1:3], start=1):
        write(images, origin)
    for i, origin in enumerate(origins[:3]):
        os.utime(tmp_path / "images" / "kept" / f"{origin.key}.image", ns=(i, i))
    assert images.find(origins[0])
    assert write(images, origins[3])
    assert [images.find(origin) is not None for origin in origins] == [True, False, True, True]
    assert sum(path.stat().st_size for path in (tmp_path / "images" / "kept").iterdir()) <= 3 * size


def test_one_that_exceeds_the_whole_budget_is_not_written(tmp_path, source):
    assert write(kept(tmp_path, budget=1000), origin_of(source)) is None
    assert names(tmp_path) == []


def test_files_of_the_process_alone_come_before_kept_ones(tmp_path, source):
    first, second = (origin_of(source, n=i) for i in range(2))
    images = kept(tmp_path)
    size = write(images, first).size_bytes
    images = kept(tmp_path, budget=2 * size)
    images.make_room(size)
    assert images.find(first)
    assert write(images, second)
    assert len(names(tmp_path)) == 1
    images.make_room(2 * size)
    assert names(tmp_path) == []
    assert write(images, second) is None
    images.make_room(0)
    assert write(images, second)


def test_a_file_that_is_being_read_is_not_deleted(tmp_path, source):
    origin = origin_of(source)
    file = write(kept(tmp_path), origin)
    with file.path.open("rb") as raw:
        KeptImages.hold(raw.fileno())
        kept(tmp_path).make_room(1 << 20)
        assert names(tmp_path) == [file.path.name]
    kept(tmp_path).make_room(1 << 20)
    assert names(tmp_path) == []


def test_what_is_stale_goes_before_what_is_old(tmp_path, source):
    other = tmp_path / "other.bin"
    other.write_bytes(b"other")
    old, stale, new = origin_of(source, n=1), origin_of(other), origin_of(source, n=2)
    size = write(kept(tmp_path), old).size_bytes
    write(kept(tmp_path), stale)
    os.utime(tmp_path / "images" / "kept" / f"{old.key}.image", ns=(1, 1))
    other.unlink()
    assert write(kept(tmp_path, budget=2 * size + 100), new)
    assert kept(tmp_path).find(old)
    assert kept(tmp_path).find(new)
    assert len(names(tmp_path)) == 2


# --------------------------------------------------------------------------------------------------------- writers


@pytest.mark.parametrize(
    "error", [AbandonedError("enough"), OSError(28, "No space left on device"), KeyboardInterrupt()]
)
def test_a_writer_that_fails_leaves_nothing(tmp_path, source, error):
    def failing(write):
        write(memoryview(DATA[0]))
        raise error

    with pytest.raises(type(error)):
        kept(tmp_path).write(origin_of(source), CONTENTS, {}, failing)
    assert names(tmp_path) == []


def test_of_two_writers_the_second_leaves_it_to_the_first(tmp_path, source):
    origin = origin_of(source)

    def slowly(write_bytes):
        assert kept(tmp_path).find(origin) is None
        assert write(kept(tmp_path), origin) is None
        kept(tmp_path).sweep()
        return fill(write_bytes)

    assert kept(tmp_path).write(origin, CONTENTS, {}, slowly)
    assert kept(tmp_path).find(origin)
    assert write(kept(tmp_path), origin) is None
    assert len(names(tmp_path)) == 1


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import test_kept_images as t

def fill(write):
    write(memoryview(t.DATA[0]))
    print("half", flush=True)
    if sys.argv[3] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.stdin.read()
    write(memoryview(t.DATA[1]))
    return t.PRINTS, t.SUMS

t.kept(Path(sys.argv[1])).write(t.origin_of(Path(sys.argv[1]) / "model.bin"), t.CONTENTS, {}, fill)
"""


def started(tmp_path, how):
    here = os.path.dirname(__file__)
    command = [sys.executable, "-c", KILLED, str(tmp_path), here, how]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def test_what_a_killed_writer_left_is_never_found_and_swept_by_the_next_process(tmp_path, source):
    with started(tmp_path, "killed") as process:
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert [name.endswith(".tmp") for name in names(tmp_path)] == [True]
    images = kept(tmp_path)
    assert images.find(origin_of(source)) is None
    file = write(images, origin_of(source))
    assert names(tmp_path) == [file.path.name]


def test_what_a_living_writer_has_is_not_swept(tmp_path, source):
    with started(tmp_path, "alive") as process:
        assert process.stdout.readline() == b"half\n"
        kept(tmp_path).sweep()
        kept(tmp_path).make_room(1 << 20)
        assert [name.endswith(".tmp") for name in names(tmp_path)] == [True]
        assert write(kept(tmp_path), origin_of(source)) is None
        process.communicate(b"")
    assert process.returncode == 0
    assert kept(tmp_path).find(origin_of(source))


# ------------------------------------------------------------------------------------------------- what is not ours


def test_foreign_files_are_neither_read_nor_deleted_nor_overwritten(tmp_path, source):
    origin = origin_of(source)
    folder = tmp_path / "images" / "kept"
    folder.mkdir(parents=True, mode=0o700)
    foreign = {
        f"{origin.key}.image": b"somebody's notes",
        f"{origin.key}.00000000.tmp": b"more notes",
        "notes.txt": b"MCIMAGE1",
        f"{origin.key}.image.bak": b"MCIMAGE1",
    }
    for name, content in foreign.items():
        (folder / name).write_bytes(content)
        (folder / name).chmod(0o600)
    precious = tmp_path / "precious"
    precious.write_bytes(b"MCIMAGE1" * 100)
    link = folder / f"{'0' * 64}.image"
    link.symlink_to(precious)
    images = kept(tmp_path)
    assert images.find(origin) is None
    assert write(images, origin) is None
    images.sweep()
    images.make_room(1 << 30)
    assert {name: (folder / name).read_bytes() for name in foreign} == foreign
    assert link.is_symlink()
    assert precious.exists()
    images.close()
    assert folder.exists()


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_folder_that_others_may_write_to_is_not_used_and_that_is_said_once(tmp_path, source, caplog, mode):
    origin = origin_of(source)
    file = write(kept(tmp_path), origin)
    file.path.parent.chmod(mode)
    images = kept(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert images.find(origin) is None
        assert images.find(origin) is None
        assert write(images, origin_of(source, n=2)) is None
    assert len(caplog.records) == 1
    assert "others may write to it" in caplog.text
    assert names(tmp_path) == [file.path.name]


def test_a_file_that_others_may_write_to_is_not_used(tmp_path, source):
    origin = origin_of(source)
    file = write(kept(tmp_path), origin)
    file.path.chmod(0o666)
    assert kept(tmp_path).find(origin) is None
    assert names(tmp_path) == [file.path.name]


def test_a_folder_that_is_a_link_is_not_used(tmp_path, source, caplog):
    origin = origin_of(source)
    file = write(kept(tmp_path), origin)
    file.path.parent.rename(tmp_path / "elsewhere")
    file.path.parent.symlink_to(tmp_path / "elsewhere")
    assert kept(tmp_path).find(origin) is None
    assert "cannot be used" in caplog.text


def test_an_empty_folder_is_removed(tmp_path, source):
    images = kept(tmp_path)
    file = write(images, origin_of(source))
    images.close()
    assert file.path.exists()
    images.reject(file)
    images.reject(file)
    images.close()
    assert list((tmp_path / "images").iterdir()) == []


def test_a_folder_that_another_process_holds_all_the_time_is_done_without(tmp_path, source, monkeypatch):
    monkeypatch.setattr("modelcache.dataplane.images.kept._PAUSE_S", 0.0)
    file = write(kept(tmp_path), origin_of(source))
    descriptor = os.open(file.path.parent, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(AbandonedError):
        write(kept(tmp_path), origin_of(source, n=2))
    kept(tmp_path).make_room(1 << 30)
    kept(tmp_path).sweep()
    assert kept(tmp_path).find(origin_of(source))
    os.close(descriptor)


def test_a_manifest_that_names_no_dtype_of_torch_is_refused(tmp_path, source):
    origin = origin_of(source)
    file = write(kept(tmp_path), origin)
    offset = file.data_offset
    about = origin.described()
    views = (({"t0": View(torch.uint8, (700,), (1,), 0)}), *VIEWS[1:])
    header = image_format.header(Contents("", "m", CONTENTS.image, views), PRINTS, SUMS, offset, about)
    bad = header[20:].replace(b"torch.uint8", b"torch.storg")
    import struct
    import zlib

    raw = struct.pack("<8sIQ", image_format.MAGIC, zlib.crc32(bad), len(bad)) + bad + b"".join(DATA)
    file.path.write_bytes(raw)
    assert kept(tmp_path).find(origin) is None


def test_a_source_that_changes_while_it_is_written_is_not_kept(tmp_path, source):
    def changing(take):
        source.write_bytes(b"other weights")
        return fill(take)

    with pytest.raises(AbandonedError, match="source changed"):
        kept(tmp_path).write(origin_of(source), CONTENTS, {}, changing)
    assert names(tmp_path) == []


def test_a_file_that_nobody_waits_for_any_more_is_not_synced(tmp_path, source, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    with pytest.raises(AbandonedError, match="nobody waits"):
        kept(tmp_path).write(origin_of(source), CONTENTS, {}, fill, lambda: False)
    assert names(tmp_path) == []
    assert synced == []


def test_room_is_made_without_a_lock_or_with_one_try_for_it(tmp_path, source, monkeypatch):
    tries = []
    take = kept_images._try_lock
    file = write(kept(tmp_path), origin_of(source))
    monkeypatch.setattr(kept_images, "_try_lock", lambda descriptor: tries.append(descriptor) or take(descriptor))
    kept(tmp_path).make_room(1000, 1000)
    assert tries == []
    descriptor = os.open(file.path.parent, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    kept(tmp_path).make_room(1 << 30)
    os.close(descriptor)
    assert len(tries) == 1
    assert names(tmp_path) == [file.path.name]


def test_a_time_of_use_that_cannot_be_set_is_no_damage(tmp_path, source, monkeypatch, caplog):
    def refused(*args, **options):
        raise PermissionError(1, "Operation not permitted")

    file = write(kept(tmp_path), origin_of(source))
    monkeypatch.setattr(os, "utime", refused)
    assert kept(tmp_path).find(origin_of(source)).file.path == file.path
    assert caplog.records == []


def test_a_file_that_cannot_be_read_now_is_not_deleted(tmp_path, source, monkeypatch, caplog):
    def failing(*args):
        raise OSError(5, "Input/output error")

    file = write(kept(tmp_path), origin_of(source))
    monkeypatch.setattr(image_format, "describe", failing)
    assert kept(tmp_path).find(origin_of(source)) is None
    assert "cannot be read" in caplog.text
    assert names(tmp_path) == [file.path.name]
