"""Which tensor of a model came from which tensor of its files.

Libraries rename on the way from a file to a model, and do not tell afterwards. So candidates are found by name and
confirmed by content: a tensor is matched only when its shape agrees and samples of its bytes, converted to the model's
dtype, do. What a library computed, fused or drew at random stays unmatched.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from modelcache.dataplane.files.weight_files import torch_dtype
from modelcache.dataplane.loading.weights import Location
from modelcache.headers import Header, regular_file

_NUM_SAMPLES = 4
_SAMPLE_VALUES = 256
_MAX_PREFIX = 4  # leading parts of a name that one side may have and the other not
# Names that older checkpoints use for the weight and bias of a normalization.
_OLD_ENDINGS = {"weight": "gamma", "bias": "beta"}


@dataclass(frozen=True, slots=True)
class Match:
    """Where the tensors of a model are, and which ones are in no file; names under all of their names."""

    where: Mapping[str, Location]
    missing: Mapping[str, torch.Tensor]

    @property
    def missing_bytes(self) -> int:
        """Of the tensors in no file, each counted once."""
        unique = {_identity(tensor): tensor for tensor in self.missing.values()}
        return sum(tensor.numel() * tensor.dtype.itemsize for tensor in unique.values())


def match_tensors(tensors: Mapping[str, torch.Tensor], headers: Sequence[Header]) -> Match:
    """Find the tensors of a model in the files it was loaded from.

    Args:
        tensors: Full name -> real CPU tensor, as the model has them now.
        headers: Of the files.

    Raises:
        WeightsError: A file cannot be opened.
    """
    index = _Index(headers)
    found: dict[tuple[object, ...], Location] = {}
    with ExitStack() as stack:
        descriptors = {header.path: stack.enter_context(regular_file(header.path))[0] for header in headers}
        for name, tensor in tensors.items():
            identity = _identity(tensor)
            if identity in found or tensor.device.type != "cpu":
                continue
            for location in index.candidates(name):
                if _is_content_of(tensor, location, descriptors[location.header.path]):
                    found[identity] = location
                    break
    where = {name: found[_identity(tensor)] for name, tensor in tensors.items() if _identity(tensor) in found}
    return Match(where, {name: tensor for name, tensor in tensors.items() if name not in where})


class _Index:
    """The keys of the files, also by what is left of them without their first parts."""

    def __init__(self, headers: Sequence[Header]) -> None:
        self._by_key: dict[str, list[Location]] = defaultdict(list)
        self._by_tail: dict[str, list[Location]] = defaultdict(list)
        for header in headers:
            for key in header.tensors:
                location = Location(header, key)
                self._by_key[key].append(location)
                for tail in list(_tails(key))[1:]:
                    self._by_tail[tail].append(location)

    def candidates(self, name: str) -> Iterator[Location]:
        """The same name first, then with a prefix less on the model's side, then on the file's side."""
        tails = [spelled for tail in _tails(name) for spelled in _spellings(tail)]
        for tail in tails:
            yield from self._by_key.get(tail, ())
        for tail in tails:
            yield from self._by_tail.get(tail, ())


def _tails(name: str) -> Iterator[str]:
    parts = name.split(".")
    for start in range(min(_MAX_PREFIX, len(parts) - 1) + 1):
        yield ".".join(parts[start:])


def _spellings(name: str) -> Iterator[str]:
    yield name
    start, _, ending = name.rpartition(".")
    if start and ending in _OLD_ENDINGS:
        yield f"{start}.{_OLD_ENDINGS[ending]}"


def _identity(tensor: torch.Tensor) -> tuple[object, ...]:
    """Equal for two tensors that are the same view of the same memory."""
    if tensor.is_meta or tensor.numel() == 0:
        return (id(tensor),)
    return (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()))


def _is_content_of(tensor: torch.Tensor, location: Location, descriptor: int) -> bool:
    entry, stored = location.entry, torch_dtype(location.entry)
    if stored is None or tuple(tensor.shape) != entry.shape or type(tensor.data) is not torch.Tensor:
        return False
    if stored != tensor.dtype and not (stored.is_floating_point and tensor.dtype.is_floating_point):
        return False
    if entry.begin == entry.end:
        return True
    flat = tensor.detach().reshape(-1)
    last = max(0, flat.numel() - _SAMPLE_VALUES)
    for start in sorted({last * i // (_NUM_SAMPLES - 1) for i in range(_NUM_SAMPLES)}):
        num_values = min(_SAMPLE_VALUES, flat.numel() - start)
        raw = os.pread(descriptor, num_values * stored.itemsize, entry.begin + start * stored.itemsize)
        if len(raw) != num_values * stored.itemsize:
            return False
        sample = torch.frombuffer(bytearray(raw), dtype=stored).to(tensor.dtype)
        if not torch.equal(sample.view(torch.uint8), flat[start : start + num_values].contiguous().view(torch.uint8)):
            return False
    return True


def shown(names: Collection[str], limit: int = 4) -> str:
    """A few of many names, for errors."""
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(repr(name) for name in ordered[:limit]) + more
