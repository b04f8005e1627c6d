"""Tensors that a library left in a file: views of a mapping of it, into which nobody wrote.

Copying such a tensor brings the file's pages into this process beside the copy, and they stay until the last tensor of
the file is gone. Where the system confirms that a tensor is the file's bytes and no others, its source can write them
where they are needed, and the tensor may be let go before that.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from modelcache.dataplane.files.weight_files import torch_dtype
from modelcache.dataplane.loading.weights import Location

_REGIONS = Path("/proc/self/smaps")
# Pages of a private mapping that were written to, in memory or swapped out.
_WRITTEN = ("Anonymous:", "Swap:")


@dataclass(frozen=True, slots=True)
class Region:
    """Addresses ``[start, stop)`` that show a file from `offset` on."""

    start: int
    stop: int
    offset: int
    path: str


def unwritten_regions(paths: Collection[Path]) -> list[Region]:
    """Where these files are mapped and still hold what the file holds; empty where the system does not say."""
    wanted = {str(path.resolve()) for path in paths}
    found: list[Region] = []
    try:
        with _REGIONS.open(encoding="utf-8", errors="surrogateescape") as lines:
            for region, written in _regions(lines):
                if region.path in wanted and not written:
                    found.append(region)
    except OSError:
        return []
    return found


def _regions(lines: Iterator[str]) -> Iterator[tuple[Region, bool]]:
    region, written = None, False
    for line in lines:
        word, _, rest = line.partition(" ")
        if not word.endswith(":"):
            if region is not None:
                yield region, written
            addresses, fields = word.partition("-"), rest.split(maxsplit=4)
            path = fields[4].rstrip("\n") if len(fields) > 4 else ""
            region = Region(int(addresses[0], 16), int(addresses[2], 16), int(fields[1], 16), path)
            written = False
        elif word in _WRITTEN:
            written = written or int(rest.split()[0]) > 0
    if region is not None:
        yield region, written


def leave_to_files(tensors: Mapping[str, torch.Tensor], where: Mapping[str, Location]) -> None:
    """Put tensors on ``meta`` that are nothing but their file's bytes in a mapping of it; the others stay.

    Args:
        tensors: All tensors of a model, by full name.
        where: The place in a file of those that have one.
    """
    regions = unwritten_regions({location.header.path for location in where.values()})
    if not regions:
        return
    alone = _alone(tensors)
    for name, location in where.items():
        tensor = tensors[name]
        if id(tensor) in alone and any(_shows(region, tensor, location) for region in regions):
            _empty(tensor)


def _alone(tensors: Mapping[str, torch.Tensor]) -> set[int]:
    """Those tensor objects that share no memory with another one; on ``meta`` that could not be told any more."""
    ranges = sorted(
        (tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.dtype.itemsize, key)
        for key, tensor in {id(tensor): tensor for tensor in tensors.values()}.items()
        if tensor.device.type == "cpu" and type(tensor.data) is torch.Tensor and tensor.is_contiguous()
    )
    others = len(ranges) < len({id(tensor) for tensor in tensors.values() if tensor.device.type == "cpu"})
    if others:
        return set()  # what is not laid out row by row may reach anywhere
    found: set[int] = set()
    reach = -1
    for at, (start, stop, key) in enumerate(ranges):
        following = ranges[at + 1][0] if at + 1 < len(ranges) else stop
        if reach <= start and stop <= following and start < stop:
            found.add(key)
        reach = max(reach, stop)
    return found


def _shows(region: Region, tensor: torch.Tensor, location: Location) -> bool:
    entry, start = location.entry, tensor.data_ptr()
    size_bytes = tensor.numel() * tensor.dtype.itemsize
    return (
        region.start <= start
        and start + size_bytes <= region.stop
        and region.offset + start - region.start == entry.begin
        and size_bytes == entry.end - entry.begin
        and torch_dtype(entry) == tensor.dtype
        and tuple(tensor.shape) == entry.shape
        and str(location.header.path.resolve()) == region.path
    )


def _empty(tensor: torch.Tensor) -> None:
    """Exchange what the tensor object is for one of the same kind without data, unless somebody refers to it weakly."""
    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    if isinstance(tensor, torch.nn.Parameter):
        empty = torch.Tensor._make_subclass(type(tensor), empty, tensor.requires_grad)
    vars(empty).update(vars(tensor))
    try:
        torch.utils.swap_tensors(tensor, empty)  # type: ignore[no-untyped-call]
    except RuntimeError:
        return  # it stays where it is, which costs memory and nothing else
