"""Sources of a model's bytes: safetensors files, a loader called again, tensors kept in memory."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from modelcache.dataplane.files.reading import ChangedError, Digest, UnreadableError, bytes_of, read_into
from modelcache.dataplane.files.weight_files import FileBytes, place_of, torch_dtype
from modelcache.dataplane.loading.adapters import modules_of, named_tensors
from modelcache.dataplane.loading.source import Landed, Report, Source
from modelcache.errors import LoaderError, WeightsError
from modelcache.headers import Header, TensorEntry


@dataclass(frozen=True, slots=True)
class Location:
    """One tensor in one file."""

    header: Header
    key: str

    @property
    def entry(self) -> TensorEntry:
        """Its dtype, shape and place."""
        return self.header.tensors[self.key]


class SafetensorsSource:
    """Safetensors files that hold the tensors of a model, under names that may differ from the model's.

    Every file must be accepted by safetensors' own parser too: a file on which two parsers disagree is not loaded.

    Args:
        headers: Of the files.
        names: Full tensor name -> where it is; a plain string is a key of any of the files. `None`: every tensor under
            its own key.
        model_name: For errors.

    Raises:
        WeightsError: A file is not accepted, changed since its header was read, or does not have what `names` says.
    """

    def __init__(
        self,
        headers: Sequence[Header],
        names: Mapping[str, str | Location] | None = None,
        *,
        model_name: str = "",
    ) -> None:
        self._model_name = model_name
        self._paths = tuple(header.path for header in headers)
        keys = {key: Location(header, key) for header in headers for key in header.tensors}
        self._where: dict[str, Location] = {}
        for name, wanted in (names or {key: key for key in keys}).items():
            found = keys.get(wanted) if isinstance(wanted, str) else wanted
            if found is None:
                raise self._error(self._paths[0], "the model's files do not have it.", str(wanted))
            self._where[name] = found
        for header in headers:
            _second_opinion(header.path, frozenset(header.tensors), model_name)

    def describe(self) -> str:
        """The file, or the folder of several files."""
        return str(self._paths[0] if len(self._paths) == 1 else os.path.commonpath(self._paths))

    def names(self) -> frozenset[str]:
        """The tensors this source can fill."""
        return frozenset(self._where)

    def fill(
        self, targets: Mapping[str, torch.Tensor], report: Report | None = None, landed: Landed | None = None
    ) -> None:
        """Read each named tensor into its target, with a few threads that are gone when this returns or raises.

        Floating-point tensors are converted to the target's dtype; any other difference of dtype is an error. What
        `report` raises ends it, and nothing writes to the targets any more.

        Raises:
            WeightsError: A file is missing, damaged or changed, or a tensor does not fit its target.
        """
        wanted: list[tuple[FileBytes, torch.Tensor]] = []
        for name, target in targets.items():
            location = self._where.get(name)
            if location is None:
                raise self._error(self._paths[0], "the model's files do not have it.", name)
            self._check_fit(location, target)
            wanted.append((place_of(str(location.header.path), location.header, location.key), target))
        try:
            read_into(wanted, report, landed=None if landed is None else _by_name(landed, list(targets)))
        except UnreadableError as error:
            problem = error.problem
            if isinstance(error, ChangedError):
                problem = f"{error.since('the model was first read')}. Restore it, or register the model anew"
            raise self._error(error.path, f"{problem}.") from error.__cause__

    def _check_fit(self, location: Location, target: torch.Tensor) -> None:
        entry, stored = location.entry, torch_dtype(location.entry)
        if stored is None:
            raise self._error(location.header.path, f"tensors of dtype {entry.dtype} are not supported.", location.key)
        if tuple(target.shape) != entry.shape:
            problem = f"has shape {list(entry.shape)} in the file, but the model wants {list(target.shape)}."
            raise self._error(location.header.path, problem, location.key)
        if stored != target.dtype and not (stored.is_floating_point and target.dtype.is_floating_point):
            problem = f"is {entry.dtype} in the file, but the model wants {str(target.dtype).removeprefix('torch.')}."
            raise self._error(location.header.path, problem, location.key)

    def _error(self, path: Path | str, problem: str, tensor: str | None = None) -> WeightsError:
        return WeightsError(self._model_name, str(path), problem, tensor)


def _tell(name: str, target: torch.Tensor, report: Report | None, landed: Landed | None) -> None:
    if report is not None:
        report(target.numel() * target.dtype.itemsize)
    if landed is not None:
        landed(name, None)


def _by_name(landed: Landed, names: Sequence[str]) -> Callable[[int, Digest], None]:
    return lambda position, digest: landed(names[position], digest)


def _second_opinion(path: Path, keys: frozenset[str], model_name: str) -> None:
    """Let safetensors parse the header too. It reads no tensor."""
    try:
        with _opened(path) as file:
            found = frozenset(file.keys())
    except FileNotFoundError:
        raise WeightsError(model_name, str(path), "the file was removed while it was read.") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(model_name, str(path), f"safetensors refuses it: {error}. Not loaded.") from error
    if found != keys:
        other = min(found ^ keys)
        raise WeightsError(model_name, str(path), f"parsers disagree on whether it has {other!r}. Not loaded.")


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt", backend="pread")
    except TypeError:  # before 0.8 there is no choice of backend
        return safe_open(path, framework="pt")


class RebuildSource:
    """A loader that is called again. What it builds must be what it built the first time.

    Args:
        build: Makes the object anew, on the CPU; raises `LoaderError` itself when the loader fails.
        names: Full names of the tensors of the first object.
        model_name: For errors.
        loader: What was called, for people.
        expected: Full name -> CRC-32 of the bytes of the first object, where they are known.
    """

    def __init__(
        self,
        build: Callable[[], object],
        names: frozenset[str],
        *,
        model_name: str,
        loader: str,
        expected: Mapping[str, int] | None = None,
    ) -> None:
        self._build, self._names, self._expected = build, names, dict(expected or {})
        self._model_name, self._loader = model_name, loader

    def describe(self) -> str:
        """The loader."""
        return self._loader

    def names(self) -> frozenset[str]:
        """The tensors this source can fill."""
        return self._names

    def expecting(self, checksums: Mapping[str, int]) -> RebuildSource:
        """The same source, which accepts only these bytes: full name -> CRC-32."""
        return RebuildSource(
            self._build, self._names, model_name=self._model_name, loader=self._loader, expected=checksums
        )

    def fill(
        self, targets: Mapping[str, torch.Tensor], report: Report | None = None, landed: Landed | None = None
    ) -> None:
        """Call the loader and copy its tensors.

        Raises:
            LoaderError: It raised, or built another structure.
            WeightsError: It built other bytes than expected.
        """
        model = self._build()
        try:
            built = named_tensors(_made_whole(model))
        except TypeError as error:
            raise self._changed(f"made something else when called again: {error}") from error
        with torch.inference_mode(mode=False), torch.no_grad():
            for name, target in targets.items():
                self._copy(name, built.get(name), target)
                _tell(name, target, report, landed)

    def _copy(self, name: str, made: torch.Tensor | None, target: torch.Tensor) -> None:
        if made is None:
            raise self._changed(f"built a model without {name!r} when called again")
        if made.is_meta:
            raise self._changed(f"left {name!r} on meta when called again")
        if (made.shape, made.dtype) != (target.shape, target.dtype):
            wanted = f"{list(target.shape)} {str(target.dtype).removeprefix('torch.')}"
            found = f"{list(made.shape)} {str(made.dtype).removeprefix('torch.')}"
            raise self._changed(f"built {name!r} as {found} when called again, not {wanted}")
        target.copy_(made)
        expected = self._expected.get(name)
        if expected is not None and zlib.crc32(bytes_of(target.contiguous())) != expected:
            problem = "the loader built other values than the first time; register it without reload=True."
            raise WeightsError(self._model_name, self._loader, problem, name)

    def _changed(self, problem: str) -> LoaderError:
        return LoaderError(self._model_name, self._loader, problem)


def _made_whole(model: object) -> object:
    """The object with accelerate's offloaded tensors in place, if it has any."""
    for module in modules_of(model).values():
        if any("_hf_hook" in each.__dict__ for each in module.modules()):
            from modelcache.dataplane.materialize.entry_points import is_dispatched, materialize_meta_tensors

            if is_dispatched(module):
                materialize_meta_tensors(module, "cpu", keep_dispatch=False)
    return model


class KeptSource:
    """Copies of a few small tensors that no file has, such as buffers that a model computes when it is built."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}

    def describe(self) -> str:
        """That they are in memory."""
        return "memory"

    def names(self) -> frozenset[str]:
        """The tensors this source can fill."""
        return frozenset(self._tensors)

    def fill(
        self, targets: Mapping[str, torch.Tensor], report: Report | None = None, landed: Landed | None = None
    ) -> None:
        """Copy the kept tensors."""
        with torch.inference_mode(mode=False), torch.no_grad():
            for name, target in targets.items():
                target.copy_(self._tensors[name])
                _tell(name, target, report, landed)


class JoinedSource:
    """Several sources that have different tensors of one model; the first gives the description."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = tuple(sources)

    def describe(self) -> str:
        """What the first source says."""
        return self._sources[0].describe()

    def names(self) -> frozenset[str]:
        """The tensors that any of them can fill."""
        return frozenset().union(*(source.names() for source in self._sources))

    def fill(
        self, targets: Mapping[str, torch.Tensor], report: Report | None = None, landed: Landed | None = None
    ) -> None:
        """Ask each source for what it has; the first that has a tensor fills it."""
        left = dict(targets)
        for source in self._sources:
            names = source.names()
            mine = {name: left.pop(name) for name in list(left) if name in names}
            if mine:
                source.fill(mine, report, landed)
        assert not left, "a target that no source has"
