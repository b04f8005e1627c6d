"""Sources of a model's bytes: safetensors files, a loader called again, tensors kept in memory.

Files are read with `preadv` straight into the model's own memory, in the order of the file, and never mapped. A file is
the file it was when its header was read, before and after its bytes are: a replaced, rewritten or shortened file is an
error and never a mixture of two.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from modelcache.dataplane.adapters import modules_of, named_tensors
from modelcache.dataplane.source import Source
from modelcache.errors import LoaderError, WeightsError
from modelcache.headers import FileIdentity, Header, TensorEntry, regular_file

_DTYPE_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}
_DTYPES: dict[str, torch.dtype] = {code: getattr(torch, name) for code, name in _DTYPE_NAMES.items()}

_MAX_READ_BYTES = 64 << 20  # one read: progress is reported, and a cancelled load ends, this often
_MAX_BUFFERS = 512  # of one read; the system allows 1024
_CONVERT_BYTES = 16 << 20  # what a conversion needs beside its target

Report = Callable[[int], None]
Preadv = Callable[[int, list[memoryview], int], int]


@dataclass(frozen=True, slots=True)
class Location:
    """One tensor in one file."""

    header: Header
    key: str

    @property
    def entry(self) -> TensorEntry:
        """Its dtype, shape and place."""
        return self.header.tensors[self.key]


def torch_dtype(entry: TensorEntry) -> torch.dtype | None:
    """The dtype of a stored tensor; `None` for the packed ones, which torch has no plain tensors of."""
    return _DTYPES.get(entry.dtype)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, writable."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


class SafetensorsSource:
    """Safetensors files that hold the tensors of a model, under names that may differ from the model's.

    Every file must be accepted by safetensors' own parser too: a file on which two parsers disagree is not loaded.

    Args:
        headers: Of the files.
        names: Full tensor name -> where it is; a plain string is a key of any of the files. `None`: every tensor under
            its own key.
        model_name: For errors.
        preadv: How files are read; tests inject faults here.

    Raises:
        WeightsError: A file is not accepted, changed since its header was read, or does not have what `names` says.
    """

    def __init__(
        self,
        headers: Sequence[Header],
        names: Mapping[str, str | Location] | None = None,
        *,
        model_name: str = "",
        preadv: Preadv = os.preadv,
    ) -> None:
        self._model_name, self._preadv = model_name, preadv
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

    def fill(self, targets: Mapping[str, torch.Tensor], report: Report | None = None) -> None:
        """Read each named tensor into its target.

        Floating-point tensors are converted to the target's dtype; any other difference of dtype is an error.

        Raises:
            WeightsError: A file is missing, damaged or changed, or a tensor does not fit its target.
        """
        by_file: dict[Path, list[tuple[Location, torch.Tensor]]] = {}
        for name, target in targets.items():
            location = self._where.get(name)
            if location is None:
                raise self._error(self._paths[0], "the model's files do not have it.", name)
            self._check_fit(location, target)
            by_file.setdefault(location.header.path, []).append((location, target))
        with torch.inference_mode(mode=False), torch.no_grad():
            for wanted in by_file.values():
                self._fill_from_file(wanted, report)

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

    def _fill_from_file(self, wanted: list[tuple[Location, torch.Tensor]], report: Report | None) -> None:
        header = wanted[0][0].header
        wanted.sort(key=lambda item: item[0].entry.begin)
        with regular_file(header.path, name=self._model_name) as (descriptor, found):
            self._check_identity(header, found)
            direct: list[tuple[int, memoryview]] = []
            for location, target in wanted:
                entry = location.entry
                if entry.begin == entry.end:
                    continue
                if target.is_contiguous() and torch_dtype(entry) == target.dtype:
                    direct.append((entry.begin, bytes_of(target)))
                else:
                    self._read_converted(descriptor, location, target, report)
            for offset, buffers in _runs(direct):
                self._read(descriptor, header.path, offset, buffers, report)
            self._check_identity(header, os.fstat(descriptor))
            # The descriptor still reads the old file when the path was given to a new one.
            try:
                self._check_identity(header, header.path.stat())
            except FileNotFoundError:
                raise self._error(header.path, "the file was removed while it was read.") from None

    def _read_converted(self, descriptor: int, location: Location, target: torch.Tensor, report: Report | None) -> None:
        """Read into a temporary tensor first: another dtype, or a target with gaps or another order."""
        entry, stored, path = location.entry, torch_dtype(location.entry), location.header.path
        assert stored is not None, "checked before the file was opened"
        if not target.is_contiguous():
            whole = torch.empty(entry.shape, dtype=stored, device="cpu")
            self._read(descriptor, path, entry.begin, [bytes_of(whole)], report)
            target.copy_(whole)
            return
        flat, step = target.view(-1), max(1, _CONVERT_BYTES // stored.itemsize)
        staged = torch.empty(min(step, flat.numel()), dtype=stored, device="cpu")
        for start in range(0, flat.numel(), step):
            piece = staged[: min(step, flat.numel() - start)]
            self._read(descriptor, path, entry.begin + start * stored.itemsize, [bytes_of(piece)], report)
            flat[start : start + piece.numel()].copy_(piece)

    def _read(
        self, descriptor: int, path: Path, offset: int, buffers: Sequence[memoryview], report: Report | None
    ) -> None:
        """Fill the buffers, one after the other, from `offset` on, in as many reads as it takes."""
        first = 0  # everything before it is full
        left = [buffer[i : i + _MAX_READ_BYTES] for buffer in buffers for i in range(0, len(buffer), _MAX_READ_BYTES)]
        while first < len(left):
            batch, size_bytes = [left[first]], len(left[first])
            for buffer in left[first + 1 : first + _MAX_BUFFERS]:
                size_bytes += len(buffer)
                if size_bytes > _MAX_READ_BYTES:
                    break
                batch.append(buffer)
            try:
                count = self._preadv(descriptor, batch, offset)
            except InterruptedError:
                continue
            except OSError as error:
                raise self._error(path, f"reading failed at byte {offset:,}: {error.strerror}.") from error
            if count == 0:
                raise self._error(path, f"the file ends at byte {offset:,}: it was shortened while it was read.")
            offset += count
            if report is not None:
                report(count)
            while first < len(left) and count >= len(left[first]):
                count -= len(left[first])
                first += 1
            if count:
                left[first] = left[first][count:]

    def _check_identity(self, header: Header, found: os.stat_result) -> None:
        now, then = FileIdentity.of(found), header.identity
        if now == then:
            return
        if now.size != then.size:
            what = f"had {then.size:,} bytes and has {now.size:,}"
        elif (now.dev, now.ino) != (then.dev, then.ino):
            what = "was replaced by another file"
        else:
            what = "was written to"
        problem = f"the file changed since the model was first read: it {what}. Restore it, or register the model anew."
        raise self._error(header.path, problem)

    def _error(self, path: Path, problem: str, tensor: str | None = None) -> WeightsError:
        return WeightsError(self._model_name, str(path), problem, tensor)


def _runs(pieces: Sequence[tuple[int, memoryview]]) -> Iterator[tuple[int, list[memoryview]]]:
    """Buffers whose places in the file follow each other without a gap, to be read together."""
    run: list[memoryview] = []
    begin = end = 0
    for offset, buffer in pieces:
        if run and offset != end:
            yield begin, run
            run = []
        if not run:
            begin = offset
        run.append(buffer)
        end = offset + len(buffer)
    if run:
        yield begin, run


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

    def fill(self, targets: Mapping[str, torch.Tensor], report: Report | None = None) -> None:
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
                if report is not None:
                    report(target.numel() * target.dtype.itemsize)

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
            from modelcache.dataplane.materialize import is_dispatched, materialize_meta_tensors

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

    def fill(self, targets: Mapping[str, torch.Tensor], report: Report | None = None) -> None:
        """Copy the kept tensors."""
        with torch.inference_mode(mode=False), torch.no_grad():
            for name, target in targets.items():
                target.copy_(self._tensors[name])
                if report is not None:
                    report(target.numel() * target.dtype.itemsize)


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

    def fill(self, targets: Mapping[str, torch.Tensor], report: Report | None = None) -> None:
        """Ask each source for what it has; the first that has a tensor fills it."""
        left = dict(targets)
        for source in self._sources:
            names = source.names()
            mine = {name: left.pop(name) for name in list(left) if name in names}
            if mine:
                source.fill(mine, report)
        assert not left, "a target that no source has"
