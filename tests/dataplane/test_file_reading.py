"""Reading tensors of files into memory that is there: in place where it can be, converted where it must, and never a
file that is not the one that was looked at."""

import os
import pickle
import threading
from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model
from dispatched import ACCELERATOR, SPLIT, Tiny, assert_stuck, assert_whole, portrait, state
from safetensors.torch import save_file
from xxhash import xxh3_64_intdigest

from modelcache.dataplane.files import reading as file_reading
from modelcache.dataplane.files.reading import ChangedError, UnreadableError, read_into, reading
from modelcache.dataplane.files.weight_files import FileBytes, Headers, find_dat
from modelcache.dataplane.materialize.entry_points import materialize_meta_tensors
from modelcache.errors import MaterializeError

LARGE = (3 << 20) + 7  # elements; with 4 bytes each more than what is converted at once


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    count = int(torch.tensor(shape).prod())
    values = torch.arange(count).remainder(251)
    return (
        (values % 2 if dtype is torch.bool else values.float() if dtype.itemsize < 2 else values).to(dtype).view(shape)
    )


def stored(tmp_path: Path, tensors: dict[str, torch.Tensor], name: str = "m.safetensors") -> dict[str, FileBytes]:
    path = tmp_path / name
    save_file(tensors, path)
    headers = Headers()
    return {key: headers.find(str(path), key, None) for key in tensors}


def cast_to(place: FileBytes, dtype: torch.dtype) -> FileBytes:
    return FileBytes(place.path, place.offset, place.dtype, place.shape, dtype, place.identity)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    flat = [t.contiguous().view(-1).view(torch.uint8) for t in (one, other)]
    return one.dtype == other.dtype and torch.equal(*flat)


@pytest.fixture
def conversions(monkeypatch):
    """The sizes of the temporary memory that conversions take."""
    taken: list[int] = []
    make = file_reading.new_tensor

    def counted(shape, dtype, stride=None):
        tensor = make(shape, dtype, stride)
        taken.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(file_reading, "new_tensor", counted)
    return taken


DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int16,
    torch.uint16,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_read_in_place(tmp_path, dtype, conversions):
    source = numbers(5, 3, dtype=dtype)
    place = stored(tmp_path, {"a": source})["a"]
    target = torch.zeros(5, 3).to(dtype)
    address = target.data_ptr()
    read_into([(place, target)])
    assert same_bits(target, source)
    assert target.data_ptr() == address
    assert conversions == []


@pytest.mark.parametrize("num_workers", [1, 2, 4])
@pytest.mark.parametrize("piece_bytes", [1, 5, 64, 1 << 20])
def test_any_cut_into_pieces_gives_every_tensor(tmp_path, monkeypatch, piece_bytes, num_workers):
    monkeypatch.setattr(file_reading, "_PIECE_BYTES", piece_bytes)
    sources = {f"t{i}": numbers(i % 4, 3) for i in range(9)} | {"scalar": torch.tensor(2.5)}
    places = stored(tmp_path, sources)
    targets = {name: torch.full_like(tensor, -1) for name, tensor in sources.items()}
    read_into([(places[name], targets[name]) for name in reversed(sources)], num_workers=num_workers)
    for name, source in sources.items():
        assert torch.equal(targets[name], source), name


def test_neighbours_are_read_with_one_call(tmp_path, monkeypatch):
    sources = {f"t{i}": numbers(3) + i for i in range(500)}
    places = stored(tmp_path, sources)
    targets = {name: torch.empty(3) for name in sources}
    calls = []
    real = os.preadv

    def counted(descriptor, buffers, offset):
        calls.append(len(buffers))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    read_into([(places[name], targets[name]) for name in sources])
    assert calls == [500]
    assert all(torch.equal(targets[name], source) for name, source in sources.items())


def test_a_system_that_gives_less_than_asked_is_asked_again(tmp_path, monkeypatch):
    sources = {f"t{i}": numbers(7) + i for i in range(20)}
    places = stored(tmp_path, sources)
    targets = {name: torch.empty(7) for name in sources}
    real = os.preadv

    def some(descriptor, buffers, offset):
        # Now the middle of one buffer, now the end of the second.
        short = [buffers[0][:5]] if len(buffers[0]) > 5 else buffers[:2]
        return real(descriptor, short, offset)

    monkeypatch.setattr(os, "preadv", some)
    read_into([(places[name], targets[name]) for name in sources])
    assert all(torch.equal(targets[name], source) for name, source in sources.items())


def digests_of(wanted: list[tuple[FileBytes, torch.Tensor]]) -> dict[int, tuple[int, ...]]:
    """What `read_into` says of each tensor."""
    found: dict[int, tuple[int, ...]] = {}
    read_into(wanted, num_workers=2, landed=lambda position, digest: found.setdefault(position, digest))
    return found


def digest_of(source: torch.Tensor, piece_bytes: int) -> tuple[int, ...]:
    data = source.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return tuple(xxh3_64_intdigest(data[at : at + piece_bytes]) for at in range(0, max(len(data), 1), piece_bytes))


@pytest.mark.parametrize("at_once", [1, 7, 1 << 20])
@pytest.mark.parametrize("piece_bytes", [5, 64, 1 << 20])
def test_whoever_asks_is_told_a_digest_of_each_tensor_that_was_read(tmp_path, monkeypatch, piece_bytes, at_once):
    monkeypatch.setattr(file_reading, "_PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(file_reading, "_DIGEST_BYTES", at_once)
    sources = {f"t{i}": numbers(i % 4, 3) + i for i in range(9)} | {"scalar": torch.tensor(2.5)}
    places = stored(tmp_path, sources)
    targets = {name: torch.full_like(tensor, -1) for name, tensor in sources.items()}
    found = digests_of([(places[name], targets[name]) for name in sources])
    assert all(torch.equal(targets[name], source) for name, source in sources.items())
    assert [found[i] for i in range(len(sources))] == [digest_of(each, piece_bytes) for each in sources.values()]


def test_a_digest_is_of_the_bytes_in_the_file_however_they_are_read(tmp_path, monkeypatch):
    source = numbers(LARGE)
    place = stored(tmp_path, {"a": source})["a"]
    expected = digest_of(source, file_reading._PIECE_BYTES)
    assert digests_of([(place, torch.empty(LARGE))]) == {0: expected}  # into memory that has no pages yet
    half, strided = torch.empty(LARGE, dtype=torch.float16), torch.empty(LARGE, 2)[:, 0]
    taken = [digests_of([(place, each)])[0] for each in (half, strided, half)]
    assert taken[0] == taken[2]
    assert torch.equal(half, source.half())
    assert torch.equal(strided, source)
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, buffers, offset: real(file, [buffers[0][:70_001]], offset))
    assert digests_of([(place, torch.empty(LARGE))]) == {0: expected}


def test_one_changed_byte_changes_the_digest_of_its_tensor_only(tmp_path):
    sources = {"a": numbers(1000), "b": numbers(1000), "c": numbers(1000)}
    wanted = [(place, torch.empty(1000)) for place in stored(tmp_path, sources).values()]
    before = digests_of(wanted)
    sources["b"].view(torch.uint8)[1234] ^= 128
    after = digests_of([(place, torch.empty(1000)) for place in stored(tmp_path, sources).values()])
    assert [before[i] == after[i] for i in range(3)] == [True, False, True]


def test_tensors_of_several_files_and_with_gaps_between_are_read(tmp_path):
    one = stored(tmp_path, {f"t{i}": numbers(5) + i for i in range(6)}, "one.safetensors")
    other = stored(tmp_path, {"x": numbers(4)}, "other.safetensors")
    wanted = [(one["t4"], torch.empty(5)), (other["x"], torch.empty(4)), (one["t1"], torch.empty(5))]
    read_into(wanted)
    assert [tensor[0].item() for _, tensor in wanted] == [4, 0, 1]


def test_a_large_tensor_is_shared_between_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(file_reading, "_PIECE_BYTES", 1 << 20)
    source = numbers(LARGE)
    place = stored(tmp_path, {"a": source})["a"]
    target = torch.empty(LARGE)
    met = threading.Barrier(2, timeout=10)
    real, threads = os.preadv, set()

    def together(descriptor, buffers, offset):
        if threading.get_ident() not in threads:
            threads.add(threading.get_ident())
            met.wait()  # a single thread would wait here in vain
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", together)
    read_into([(place, target)], num_workers=2)
    assert torch.equal(target, source)


@pytest.mark.parametrize("shape", [(LARGE,), (LARGE // 1000, 1000), (1, LARGE), (2, 1, LARGE // 2)], ids=str)
def test_another_dtype_is_converted_by_way_of_little_memory(tmp_path, shape, conversions):
    source = numbers(*shape)
    place = stored(tmp_path, {"a": source})["a"]
    target = torch.empty(shape, dtype=torch.bfloat16)
    read_into([(place, target)])
    assert torch.equal(target, source.to(torch.bfloat16))
    assert 0 < max(conversions) <= file_reading._CONVERT_BYTES < source.nbytes


def test_a_cast_comes_between_the_dtype_of_the_file_and_that_of_the_tensor(tmp_path):
    source = torch.linspace(0, 1, 1000)
    place = cast_to(stored(tmp_path, {"a": source})["a"], torch.bfloat16)
    target = torch.empty(1000)
    read_into([(place, target)])
    assert torch.equal(target, source.to(torch.bfloat16).float())
    assert not torch.equal(target, source)


STRIDED = {
    "transposed": lambda: torch.empty(40, 300, 70).permute(2, 0, 1),
    "with gaps": lambda: torch.empty(70, 40, 900)[:, :, ::3],
    "channels last": lambda: torch.empty(1, 70, 40, 300).to(memory_format=torch.channels_last)[0],
    "of another dtype": lambda: torch.empty(300, 70, 40, dtype=torch.float64).permute(1, 2, 0),
    "with a negative bit": lambda: torch._neg_view(torch.empty(70, 40, 300)),
}


@pytest.mark.parametrize("make", STRIDED.values(), ids=list(STRIDED))
@pytest.mark.parametrize("limit_bytes", [4, 1000, 50_000, 8 << 20])
def test_memory_of_any_strides_is_filled_in_order(tmp_path, monkeypatch, make, limit_bytes, conversions):
    shape = (70, 40, 300) if limit_bytes > 1000 else (3, 4, 5)
    source = numbers(*shape)
    place = stored(tmp_path, {"a": source})["a"]
    monkeypatch.setattr(file_reading, "_CONVERT_BYTES", limit_bytes)
    target = make()[tuple(slice(size) for size in shape)]
    stride = target.stride()
    read_into([(place, target)])
    assert torch.equal(target.float(), source)
    assert target.stride() == stride
    assert max(conversions) <= limit_bytes


def test_what_lies_between_the_elements_is_left_alone(tmp_path):
    place = stored(tmp_path, {"a": numbers(4, 5)})["a"]
    memory = torch.full((4, 10), -1.0)
    read_into([(place, memory[:, ::2])])
    assert torch.equal(memory[:, ::2], numbers(4, 5))
    assert torch.equal(memory[:, 1::2], torch.full((4, 5), -1.0))


def test_a_parameter_that_wants_gradients_is_filled(tmp_path):
    place = stored(tmp_path, {"a": numbers(4, 5)})["a"]
    same, other = torch.nn.Parameter(torch.zeros(4, 5)), torch.nn.Parameter(torch.zeros(4, 5, dtype=torch.float64))
    read_into([(place, same), (place, other)])
    assert torch.equal(same, numbers(4, 5))
    assert torch.equal(other, numbers(4, 5).double())
    assert same.grad_fn is None
    assert other.grad_fn is None


def test_the_callers_modes_do_not_matter(tmp_path):
    place = stored(tmp_path, {"a": numbers(4, 5)})["a"]
    targets = [torch.zeros(4, 5), torch.zeros(5, 4).t(), torch.zeros(4, 5, dtype=torch.float16)]
    with torch.inference_mode(), torch.device("meta"):
        read_into([(place, target) for target in targets], num_workers=1)
    for target in targets:
        assert torch.equal(target.float(), numbers(4, 5))
        target.add_(1)  # an inference tensor would refuse


def test_tensors_made_in_inference_mode_are_filled_too(tmp_path):
    place = stored(tmp_path, {"a": numbers(4, 5)})["a"]
    with torch.inference_mode():
        targets = [torch.zeros(4, 5), torch.zeros(5, 4).t(), torch.zeros(4, 5, dtype=torch.float16)]
    read_into([(place, target) for target in targets])
    assert all(torch.equal(target.float(), numbers(4, 5)) for target in targets)


def test_reports_add_up_to_the_bytes_of_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(file_reading, "_PIECE_BYTES", 100)
    sources = {f"t{i}": numbers(i, 7) for i in range(12)}
    places = stored(tmp_path, sources)
    reports: list[int] = []
    wanted = [(places[name], torch.empty(source.shape, dtype=torch.float64)) for name, source in sources.items()]
    read_into(wanted, reports.append)
    assert sum(reports) == sum(source.nbytes for source in sources.values())
    assert len(reports) > 5


def test_an_error_of_the_report_ends_the_work_with_no_thread_left(tmp_path, monkeypatch):
    monkeypatch.setattr(file_reading, "_PIECE_BYTES", 8)
    places = stored(tmp_path, {f"t{i}": numbers(4) + 1 for i in range(40)})
    targets = [torch.zeros(4) for _ in places]

    def interrupt(size_bytes):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as held:
        read_into(list(zip(places.values(), targets, strict=True)), interrupt, num_workers=2)
    then = [target.clone() for target in targets]
    assert not any(thread.name.startswith("modelcache-read") for thread in threading.enumerate()), held
    assert all(torch.equal(*pair) for pair in zip(then, targets, strict=True))
    assert not targets[-1].any()  # far behind the interruption


@pytest.mark.parametrize("num_workers", [1, 3])
def test_memory_is_asked_for_only_a_little_ahead_of_what_was_taken(tmp_path, monkeypatch, num_workers):
    monkeypatch.setattr(file_reading, "_PIECE_BYTES", 16)
    places = list(stored(tmp_path, {f"t{i}": numbers(4) for i in range(100)}).values())
    asked: list[int] = []

    def wanted():
        for position, place in enumerate(places):
            asked.append(position)
            yield position, place, torch.empty(4)

    taken = 0
    for piece in reading(wanted(), num_workers):
        assert len(asked) - taken <= 2 * (2 * num_workers + 2)
        taken += len(piece)
    assert taken == len(asked) == 100


def test_tensors_are_complete_when_the_last_of_their_segments_is(tmp_path, monkeypatch):
    monkeypatch.setattr(file_reading, "_PIECE_BYTES", 10)
    monkeypatch.setattr(file_reading, "_CONVERT_BYTES", 12)
    sources = {"a": numbers(9), "none": numbers(0, 2), "b": numbers(3, 5), "c": numbers(7)}
    places = stored(tmp_path, sources)
    targets = [torch.full((9,), -1.0), torch.empty(0, 2), torch.full((5, 3), -1.0).t(), torch.zeros(7).double()]
    wanted = [(i, place, target) for i, (place, target) in enumerate(zip(places.values(), targets, strict=True))]
    complete = []
    for segment in (segment for piece in reading(wanted, num_workers=2) for segment in piece):
        if segment.is_last:
            complete.append(segment.position)
            assert torch.equal(targets[segment.position].float(), list(sources.values())[segment.position])
    assert complete == [0, 1, 2, 3]


def rewrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    # A clock that is too coarse to tell the two writes apart is not what this is about.
    os.utime(path, ns=(0, 0))


def replace(path: Path) -> None:
    copy = path.with_suffix(".new")
    copy.write_bytes(path.read_bytes())
    found = path.stat()
    os.utime(copy, ns=(found.st_atime_ns, found.st_mtime_ns))
    copy.replace(path)


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


CHANGES = {
    "was written to": rewrite,
    "was replaced by another file": replace,
    r"had [\d,]+ bytes and has [\d,]+": shorten,
    "no file": os.unlink,
}


@pytest.mark.parametrize("kind", ["safetensors", "dat"])
@pytest.mark.parametrize(("words", "change"), CHANGES.items(), ids=list(CHANGES))
def test_a_file_that_changed_since_it_was_looked_at_is_refused_before_reading(tmp_path, kind, words, change):
    good = stored(tmp_path, {"a": numbers(6)}, "good.safetensors")["a"]
    if kind == "dat":
        path = tmp_path / "b.dat"
        path.write_bytes(b"\x01" * 24)
        place = find_dat(str(path), torch.float32, (6,))
    else:
        path = tmp_path / "bad.safetensors"
        place = stored(tmp_path, {"b": numbers(6) + 1}, path.name)["b"]
    change(path)
    target = torch.full((6,), -1.0)
    with pytest.raises(UnreadableError, match=words) as caught:
        read_into([(good, torch.empty(6)), (place, target)])
    assert str(path.name) in str(caught.value)
    assert caught.value.path == str(tmp_path if words == "no file" else path)
    assert isinstance(caught.value, ChangedError) == (words != "no file")
    assert caught.value.position == 1
    assert torch.equal(target, torch.full((6,), -1.0))


@pytest.mark.parametrize(("words", "change"), CHANGES.items(), ids=list(CHANGES))
def test_a_file_that_changes_while_it_is_read_is_refused_after_reading(tmp_path, monkeypatch, words, change):
    place = stored(tmp_path, {"a": numbers(6)})["a"]
    real = os.preadv

    def read_then_change(descriptor, buffers, offset):
        count = real(descriptor, buffers, offset)
        change(Path(place.path))
        return count

    monkeypatch.setattr(os, "preadv", read_then_change)
    words = "the file was removed while it was read" if words == "no file" else words
    with pytest.raises(UnreadableError, match=words) as caught:
        read_into([(place, torch.empty(6))])
    assert caught.value.path == place.path
    assert caught.value.position == 0


@pytest.mark.parametrize("num_workers", [1, 3])
@pytest.mark.parametrize(("words", "change"), CHANGES.items(), ids=list(CHANGES))
def test_a_file_that_changes_between_two_pieces_is_refused(tmp_path, monkeypatch, words, change, num_workers):
    monkeypatch.setattr(file_reading, "_PIECE_BYTES", 8)
    places = stored(tmp_path, {f"t{i}": numbers(4) + 1 for i in range(40)})
    path = Path(places["t0"].path)
    reports: list[int] = []

    def once(size_bytes):
        if not reports:
            change(path)
        reports.append(size_bytes)

    # A worker may just have been reading the file that was removed.
    words = "no file|was removed while it was read" if words == "no file" else words
    with pytest.raises(UnreadableError, match=words) as caught:
        read_into([(place, torch.empty(4)) for place in places.values()], once, num_workers)
    assert 0 < sum(reports) < 40 * 16
    assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args


def test_a_file_cut_short_is_named_with_the_tensor_also_when_nobody_noted_which_file_it_was(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(bytes(50))
    places = [FileBytes(str(path), 16 * number, torch.float32, (4,)) for number in range(5)]
    with pytest.raises(UnreadableError, match=r"x\.bin: the file ends at byte 50: it was shortened while") as caught:
        read_into([(place, torch.empty(4)) for place in places])
    assert caught.value.position == 3


def test_a_path_that_became_a_pipe_or_a_folder_is_refused_without_waiting(tmp_path):
    for name, make in (("pipe", os.mkfifo), ("folder", os.mkdir)):
        make(tmp_path / name)
        with pytest.raises(UnreadableError, match=name):
            read_into([(FileBytes(str(tmp_path / name), 0, torch.uint8, (4,)), torch.empty(4, dtype=torch.uint8))])


def test_an_error_of_the_system_is_told_with_the_path(tmp_path, monkeypatch):
    place = stored(tmp_path, {"a": numbers(6)})["a"]

    def broken(descriptor, buffers, offset):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(
        UnreadableError, match=r"m\.safetensors: reading failed at byte [\d,]+: Input/output error"
    ) as caught:
        read_into([(place, torch.empty(6))])
    assert caught.value.position == 0


def test_memory_that_does_not_fit_is_a_mistake_of_the_caller(tmp_path):
    place = stored(tmp_path, {"a": numbers(6)})["a"]
    with pytest.raises(ValueError, match=r"tensor 1 is \(5,\) on cpu; the data in .* has shape \(6,\)"):
        read_into([(place, torch.empty(6)), (place, torch.empty(5))])
    with pytest.raises(ValueError, match="on meta"):
        read_into([(place, torch.empty(6, device="meta"))])


def test_nothing_to_read_reads_nothing(tmp_path):
    place = stored(tmp_path, {"none": torch.empty(0, 4), "a": numbers(3)})["none"]
    read_into([])
    read_into([(place, torch.empty(0, 4))])


def test_no_descriptor_stays_open(tmp_path):
    places = stored(tmp_path, {f"t{i}": numbers(4) for i in range(4)})
    before = os.listdir("/proc/self/fd")
    for _ in range(3):
        read_into([(place, torch.empty(4)) for place in places.values()])
        with pytest.raises(UnreadableError):
            read_into([(FileBytes(places["t0"].path, 10**6, torch.float32, (4,)), torch.empty(4))])
    assert len(os.listdir("/proc/self/fd")) == len(before)


@pytest.fixture
def on_disk(tmp_path):
    model = Tiny()
    before = state(model)
    dispatch_model(model, SPLIT | {"linear1": "disk"}, main_device=ACCELERATOR, offload_dir=tmp_path)
    return model, before


def test_a_model_whose_files_change_while_it_is_made_whole_stays_as_it_was(on_disk, tmp_path, monkeypatch):
    monkeypatch.setattr(file_reading, "_PIECE_BYTES", 1)
    model, before = on_disk
    was = portrait(model)
    keep = {path: path.read_bytes() for path in tmp_path.glob("*.dat")}

    def change(done_bytes, total_bytes, name):
        for path in keep:
            rewrite(path)

    with pytest.raises(MaterializeError, match="was written to") as caught:
        materialize_meta_tensors(model, num_workers=1, progress=change)
    assert len(caught.value.names) == 1
    assert f"{caught.value.names[0]}.dat" in str(caught.value)
    assert portrait(model) == was
    assert_stuck(model)
    for path, content in keep.items():
        path.write_bytes(content)
    materialize_meta_tensors(model)
    assert_whole(model, before)


def test_a_model_that_was_interrupted_leaves_no_reader_behind(on_disk, monkeypatch):
    monkeypatch.setattr(file_reading, "_PIECE_BYTES", 1)
    model, before = on_disk

    def interrupt(done_bytes, total_bytes, name):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as held:
        materialize_meta_tensors(model, progress=interrupt)
    assert not any(thread.name.startswith("modelcache-read") for thread in threading.enumerate()), held
    materialize_meta_tensors(model)
    assert_whole(model, before)
