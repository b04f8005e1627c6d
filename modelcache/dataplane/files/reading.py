"""Reads tensors out of files with `preadv`, by several threads, straight into memory of their own.

The one reader of weights: whoever fills tensors from safetensors or ``.dat`` files comes here. Nothing is mapped: a
mapping would still depend on the file after the tensor is handed out, and a file cut short underneath it would end the
process. A file of which the system has little in memory is read past its page cache (`ways.py`).

A file is the file it was when the tensor was found in it, before and after each piece of it is read: a replaced,
rewritten or shortened file is an error and never a mixture of two.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path

import torch
from xxhash import xxh3_64

from modelcache.dataplane.files.direct import EndsError, NotDirectError, Range, direct, read_direct
from modelcache.dataplane.files.ways import CACHED_WORKERS, Passing, Way, Ways
from modelcache.dataplane.files.weight_files import FileBytes, FileProblemError
from modelcache.dataplane.memory.fresh_pages import ask_for_pages, has_pages
from modelcache.errors import WeightsError
from modelcache.headers import FileIdentity, regular_file

_PIECE_BYTES = 12 << 20  # what a worker reads before it reports
_MAX_BUFFERS = 1024  # of one read; the system allows no more
_PAGES_BYTES = 256 << 10  # what a worker reads with pages made for it before
_CONVERT_BYTES = 4 << 20  # what a worker reads before it converts
_DIGEST_BYTES = 256 << 10  # what a worker reads before it looks at it: the cache of one core still has it

Report = Callable[[int], None]
Digest = tuple[int, ...]
"""XXH3 (64 bits) of a tensor's bytes in the file, of each piece of it in order; of equal bytes it is the same."""
Landed = Callable[[int, Digest], None]


class UnreadableError(FileProblemError):
    """A file in which a tensor was found, and that did not give it.

    Attributes:
        path: Of the file, or of the folder that lacks it.
        problem: A clause or several, without the path and the last full stop.
        position: Of the tensor among those that were to be read, or of one of several.
    """

    def __init__(self, path: str, problem: str, position: int) -> None:
        super().__init__(path, problem, position)
        self.path, self.problem, self.position = path, problem, position

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}"


class ChangedError(UnreadableError):
    """A file that is not the one that it was when a tensor was found in it.

    Attributes:
        change: What happened to it, after "it".
    """

    def __init__(self, path: str, change: str, position: int) -> None:
        Exception.__init__(self, path, change, position)
        self.path, self.change, self.position = path, change, position
        self.problem = f"{self.since('the tensor was found in it')}; restore the file, or start again"

    def since(self, moment: str) -> str:
        """The problem, told by what the caller knows of when the file was looked at."""
        return f"the file changed since {moment}: it {self.change}"


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, writable."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def new_tensor(shape: Sequence[int], dtype: torch.dtype, stride: Sequence[int] | None = None) -> torch.Tensor:
    """Uninitialized memory on the CPU, whatever default device or patched constructors are in force."""
    # accelerate's `init_empty_weights` replaces torch.empty, zeros, ones and full, but not this one.
    if stride is None:
        sizes = [max(size, 1) for size in shape]
        stride = [math.prod(sizes[position + 1 :]) for position in range(len(sizes))]
    return torch.empty_strided(tuple(shape), tuple(stride), dtype=dtype, device="cpu")


def read_tensor(place: FileBytes) -> torch.Tensor:
    """Read one tensor, cast as its place says, into memory of its own.

    Raises:
        UnreadableError: As for `read_into`.
    """
    tensor = new_tensor(place.shape, place.cast or place.dtype)
    read_into([(place, tensor)])
    return tensor


def read_into(
    wanted: Sequence[tuple[FileBytes, torch.Tensor]],
    report: Report | None = None,
    num_workers: int | None = None,
    landed: Landed | None = None,
) -> None:
    """Read tensors from files into memory that is there already.

    A tensor of the file's dtype without gaps is read in place, with no other memory. Any other is converted by way of
    a few megabytes for each worker: from the file's dtype to the place's `cast`, from there to the tensor's dtype.
    Autograd takes no note of it; whether it raises a tensor's version is not said.

    Args:
        wanted: Where each tensor's bytes are, and the tensor on the CPU that gets them, of the same shape.
        report: Called in this thread with the bytes read since the last call. What it raises ends the work.
        num_workers: Threads that read; as many as suit the files when not given.
        landed: Called in this thread with the position of each tensor once it is complete, and a digest of what was
            read. Without it, none is computed.

    Raises:
        UnreadableError: A file is missing, damaged, or not the file it was when the tensor was found (`ChangedError`).
            What the tensors hold is undefined then; nothing writes to them any more.
        ValueError: A tensor is not on the CPU or has another shape than its data.
    """
    for position, (place, tensor) in enumerate(wanted):
        if tensor.device.type != "cpu" or tuple(tensor.shape) != place.shape:
            found = f"{tuple(tensor.shape)} on {tensor.device}"
            raise ValueError(f"tensor {position} is {found}; the data in {place.path} has shape {place.shape}")
    order = in_file_order([place for place, _ in wanted])
    ways = Ways()
    if num_workers is None:
        num_workers = ways.num_workers([place.path for _, place in order])
    # Closed here and not when somebody drops the error: until then workers would write into the caller's memory.
    placed = ((position, place, wanted[position][1]) for position, place in order)
    digest: list[int] = []
    with closing(reading(placed, num_workers, ways, with_digests=landed is not None)) as pieces:
        for piece in pieces:
            if report is not None:
                report(sum(segment.size_bytes for segment in piece))
            if landed is not None:
                for segment in piece:
                    assert segment.digest is not None
                    digest.append(segment.digest.intdigest())
                    if segment.is_last:
                        landed(segment.position, tuple(digest))
                        digest.clear()


def in_file_order(places: Sequence[FileBytes]) -> list[tuple[int, FileBytes]]:
    """The places with their positions, file after file and in each from its beginning to its end."""
    return sorted(enumerate(places), key=lambda item: (item[1].path, item[1].offset))


@dataclass(slots=True)
class Segment:
    """A part of one tensor, to be read at once.

    Attributes:
        position: The caller's number of the tensor.
        offset: Of the first byte in the file.
        size_bytes: How many bytes of the file it takes.
        memory: Where they go as they are.
        target: Where they go converted; exactly one of both is there.
        is_last: Whether the tensor is complete with it.
        digest: Of what was read of it so far, if anybody asked.
    """

    position: int
    place: FileBytes
    offset: int
    size_bytes: int
    memory: memoryview | None
    target: torch.Tensor | None
    is_last: bool
    digest: xxh3_64 | None = None


def reading(
    wanted: Iterable[tuple[int, FileBytes, torch.Tensor]],
    num_workers: int,
    ways: Ways | None = None,
    *,
    with_digests: bool = False,
) -> Generator[list[Segment]]:
    """Read tensors in the order given, which had better be that of the files, and yield what has been read, in order.

    Tensors are taken from `wanted` only shortly before they are read, so that it may make them then. A few pieces are
    read ahead of the caller.

    Raises:
        UnreadableError: As for `read_into`. No worker is left behind, also when the generator is closed early, which
            the caller has to do.
    """
    ways = ways or Ways()
    # What is copied from memory anyway goes on in fewer threads, which wait for each other less the more each does.
    piece_bytes = _PIECE_BYTES if num_workers > CACHED_WORKERS else 2 * _PIECE_BYTES
    pieces = _pieces(wanted, piece_bytes, with_digests=with_digests)
    first, second = next(pieces, None), next(pieces, None)
    if first is not None and (second is None or num_workers == 1):
        for piece in chain((first,), () if second is None else (second,), pieces):
            _read_piece(piece, ways)
            yield piece
    elif first is not None and second is not None:
        yield from _read_ahead(chain((first, second), pieces), num_workers, ways)


def _read_ahead(pieces: Iterable[list[Segment]], num_workers: int, ways: Ways) -> Iterator[list[Segment]]:
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="modelcache-read")
    ahead: deque[tuple[list[Segment], Future[None]]] = deque()
    try:
        for piece in pieces:
            # Only so far ahead: a target that takes its time must not fill the RAM with what waits for it.
            if len(ahead) == 2 * num_workers:
                done, future = ahead.popleft()
                future.result()
                yield done
            ahead.append((piece, pool.submit(_read_piece, piece, ways)))
        while ahead:
            done, future = ahead.popleft()
            future.result()
            yield done
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _pieces(
    wanted: Iterable[tuple[int, FileBytes, torch.Tensor]], size_bytes: int, *, with_digests: bool
) -> Iterator[list[Segment]]:
    """Portions of work for one worker."""
    piece: list[Segment] = []
    piece_bytes = 0
    for position, place, tensor in wanted:
        for segment in _segments(position, place, tensor):
            # Half as much again is no harm, and better than a piece of half the size.
            if piece and (2 * (piece_bytes + segment.size_bytes) > 3 * size_bytes or len(piece) == _MAX_BUFFERS):
                yield piece
                piece, piece_bytes = [], 0
            if with_digests:
                segment.digest = xxh3_64()
            piece.append(segment)
            piece_bytes += segment.size_bytes
    if piece:
        yield piece


def _segments(position: int, place: FileBytes, tensor: torch.Tensor) -> Iterator[Segment]:
    size_bytes = place.size_bytes
    is_plain = tensor.dtype == place.dtype and place.cast in (None, place.dtype)
    if is_plain and tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg()):
        memory = bytes_of(tensor)
        for start in range(0, max(size_bytes, 1), _PIECE_BYTES):
            end = min(start + _PIECE_BYTES, size_bytes)
            part = memory[start:end]
            yield Segment(position, place, place.offset + start, end - start, part, None, end == size_bytes)
        return
    tensor = tensor.detach()
    flat = tensor.view(-1) if tensor.is_contiguous() else tensor
    end = place.offset + size_bytes
    for target, offset in _split(flat, place.offset, place.dtype.itemsize):
        part_bytes = target.numel() * place.dtype.itemsize
        yield Segment(position, place, offset, part_bytes, None, target, offset + part_bytes == end)


def _split(target: torch.Tensor, offset: int, item_bytes: int) -> Iterator[tuple[torch.Tensor, int]]:
    """Cut into parts small enough to be converted at once, in row-major order, whatever the strides."""
    size_bytes = target.numel() * item_bytes
    if size_bytes <= _CONVERT_BYTES:
        yield target, offset
        return
    row_bytes = size_bytes // len(target)
    if row_bytes > _CONVERT_BYTES:
        for number, row in enumerate(target):
            yield from _split(row, offset + number * row_bytes, item_bytes)
        return
    step = _CONVERT_BYTES // row_bytes
    for start in range(0, len(target), step):
        yield target[start : start + step], offset + start * row_bytes


def _read_piece(piece: Sequence[Segment], ways: Ways) -> None:
    """Any thread."""
    for _, of_file in groupby(piece, key=lambda segment: (segment.place.path, segment.place.identity)):
        segments = list(of_file)
        place, position = segments[0].place, segments[0].position
        try:
            with regular_file(Path(place.path)) as (descriptor, found):
                _refuse_changed(place, found, position)
                _read_in_its_way(descriptor, found, segments, ways)
            # By path: the descriptor would still read the old file when the path was given to a new one.
            _refuse_changed(place, os.stat(place.path), position)  # noqa: PTH116, as in `find_dat`
        except WeightsError as error:
            # What the system said is the cause; the error between says the same as this one.
            raise UnreadableError(error.path, error.problem.removesuffix("."), position) from error.__cause__
        except FileNotFoundError:
            raise UnreadableError(place.path, "the file was removed while it was read", position) from None
        except OSError as error:
            raise UnreadableError(place.path, f"reading failed: {error.strerror or error}", position) from error


def _read_in_its_way(descriptor: int, found: os.stat_result, segments: list[Segment], ways: Ways) -> None:
    way = ways.of(descriptor, found)
    if way is Way.DIRECT:
        try:
            _read_directly(descriptor, segments, ways)
        except NotDirectError:
            ways.refused(found)
            way = Way.PASSING
    if way is Way.PASSING:
        begin, last = segments[0].offset, segments[-1]
        passing = Passing(descriptor, begin, last.offset + last.size_bytes - begin)
        _read_segments(descriptor, segments)
        passing.end()
    elif way is Way.CACHED:
        _read_segments(descriptor, segments)


def _read_directly(descriptor: int, segments: Iterable[Segment], ways: Ways) -> None:
    ranges: list[Range] = []
    raws: list[tuple[Segment, torch.Tensor, torch.Tensor]] = []
    with_bytes = [segment for segment in segments if segment.size_bytes]
    for segment in with_bytes:
        memory = segment.memory
        if segment.target is not None:
            raws.append((segment, segment.target, _raw_of(segment, segment.target)))
            memory = bytes_of(raws[-1][2])
        assert memory is not None
        if memory.nbytes > _PAGES_BYTES and not has_pages(memory):
            ask_for_pages(memory)
        ranges.append(Range(segment.offset, memory))
    try:
        with direct(descriptor):
            read_direct(descriptor, ranges, ways.bounces.mine())
    except EndsError as error:
        segment = next(each for each in with_bytes if each.offset + each.size_bytes > error.offset)
        raise _ended(segment, max(segment.offset, error.offset)) from None
    for segment, place in zip(with_bytes, ranges, strict=True):
        if segment.digest is not None:
            segment.digest.update(place.memory)
    for segment, target, raw in raws:
        _cast(segment, target, raw)


def _read_segments(descriptor: int, segments: Iterable[Segment]) -> None:
    run: list[Segment] = []
    for segment in segments:
        memory = segment.memory
        is_alone = memory is None or (segment.size_bytes > _PAGES_BYTES and not has_pages(memory))
        if run and (is_alone or segment.offset != run[-1].offset + run[-1].size_bytes):
            _fill(descriptor, run, [part.memory for part in run if part.memory is not None])
            run = []
        if segment.target is not None:
            _convert(descriptor, segment, segment.target)
        elif memory is not None and is_alone:
            _fill_fresh(descriptor, segment, memory)
        elif segment.size_bytes:
            run.append(segment)
    if run:
        _fill(descriptor, run, [part.memory for part in run if part.memory is not None])


def _fill_fresh(descriptor: int, segment: Segment, memory: memoryview) -> None:
    """Read into memory that has no pages yet."""
    for start in range(0, segment.size_bytes, _PAGES_BYTES):
        part = memory[start : start + _PAGES_BYTES]
        ask_for_pages(part)
        _fill(descriptor, [segment], [part], start)


def _convert(descriptor: int, segment: Segment, target: torch.Tensor) -> None:
    raw = _raw_of(segment, target)
    if segment.size_bytes:
        _fill(descriptor, [segment], [bytes_of(raw)])
    _cast(segment, target, raw)


def _raw_of(segment: Segment, target: torch.Tensor) -> torch.Tensor:
    return new_tensor((target.numel(),), segment.place.dtype)


def _cast(segment: Segment, target: torch.Tensor, raw: torch.Tensor) -> None:
    cast = segment.place.cast
    # The one mode in which tensors made inside and outside of it may both be written to.
    with torch.inference_mode():
        raw = raw.view(target.shape)
        target.copy_(raw if cast is None else raw.to(cast))


def _ended(segment: Segment, offset: int) -> UnreadableError:
    problem = f"the file ends at byte {offset:,}: it was shortened while it was read"
    return UnreadableError(segment.place.path, problem, segment.position)


def _fill(descriptor: int, run: Sequence[Segment], buffers: list[memoryview], start: int = 0) -> None:
    """Read what follows each other in the file with as few calls as the system allows.

    Args:
        descriptor: Of the file.
        run: The segments.
        buffers: For each of them where it goes.
        start: How much of the only segment is left out.
    """
    first, offset = 0, run[0].offset + start  # every buffer before the first is full
    while first < len(buffers):
        segment, batch = run[first], buffers[first : first + _MAX_BUFFERS]
        if segment.digest is not None:
            batch = _some(batch)
        try:
            count = os.preadv(descriptor, batch, offset)
        except OSError as error:
            problem = f"reading failed at byte {offset:,}: {error.strerror or error}"
            raise UnreadableError(segment.place.path, problem, segment.position) from error
        if not count:
            raise _ended(segment, offset)
        offset += count
        for part in batch:
            read = min(count, len(part))
            if not read:
                break
            if (digest := run[first].digest) is not None:
                digest.update(part[:read])
            count -= read
            if read == len(buffers[first]):
                first += 1
            else:
                buffers[first] = buffers[first][read:]


def _some(buffers: Sequence[memoryview]) -> list[memoryview]:
    """As many whole ones as one look takes at once, or a part of the first."""
    total_bytes, number = 0, 0
    while number < len(buffers) and total_bytes + len(buffers[number]) <= _DIGEST_BYTES:
        total_bytes += len(buffers[number])
        number += 1
    return list(buffers[:number]) or [buffers[0][:_DIGEST_BYTES]]


def _refuse_changed(place: FileBytes, found: os.stat_result, position: int) -> None:
    then, now = place.identity, FileIdentity.of(found)
    if then is None or now == then:
        return
    if not found.st_nlink:
        change = "was removed while it was read"
    elif now.size != then.size:
        change = f"had {then.size:,} bytes and has {now.size:,}"
    elif (now.dev, now.ino) != (then.dev, then.ino):
        change = "was replaced by another file"
    elif now.mtime_ns != then.mtime_ns:
        change = "was written to"
    else:
        change = "was written to, or its owner, permissions or times were set"
    raise ChangedError(place.path, change, position)
