"""Make every new tensor of a model, beside the model: reading, casting, moving. Nothing is written into the model."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch.nn.parameter import is_lazy

from modelcache.dataplane.files.reading import UnreadableError, in_file_order, new_tensor, read_tensor, reading
from modelcache.dataplane.files.weight_files import FileBytes, FileProblemError, Headers, find_dat
from modelcache.dataplane.materialize import accelerate_state as state
from modelcache.dataplane.materialize.journal import Entry, Memory, Swap
from modelcache.dataplane.materialize.plan import Plan, Unit
from modelcache.dataplane.materialize.rewrap import (
    as_buffer,
    as_parameter,
    as_quantized,
    device_of_scales,
    is_bitsandbytes,
    is_packed,
)
from modelcache.dataplane.materialize.slots import is_wrapper, size_bytes
from modelcache.errors import MaterializeError

Report = Callable[[int, int, str], None]
KeyT = TypeVar("KeyT")


@dataclass(slots=True)
class Staged:
    """What is ready to be put in.

    Attributes:
        tensors: For each unit the tensor that its slots will hold; a live tensor stays the same object.
        memory: For live tensors that change device, their memory there.
        swaps: Further writes that belong to the new tensors.
    """

    tensors: dict[Unit, torch.Tensor] = field(default_factory=dict)
    memory: dict[Unit, Memory] = field(default_factory=dict)
    swaps: list[Swap] = field(default_factory=list)

    def content(self, unit: Unit) -> torch.Tensor:
        """The tensor whose bytes the unit will have."""
        return self.memory[unit].after if unit in self.memory else self.tensors[unit]


def needs_move(unit: Unit, target: torch.device) -> bool:
    """Whether a live tensor is elsewhere than on the target."""
    return unit.is_live and not is_lazy(unit.tensor) and unit.tensor.device != target


def is_shared(unit: Unit, target: torch.device, *, always_copy: bool) -> bool:
    """Whether the model can use the very memory in which the dispatch holds the data."""
    kept = unit.found
    if always_copy or not isinstance(kept, state.KeptTensor):
        return False
    tensor = kept.tensor
    # A tensor made in inference mode could not be trained or written to later.
    return tensor.device == target and tensor.dtype == unit.tensor.dtype and not tensor.is_inference()


def needed_bytes(plan: Plan, target: torch.device, *, always_copy: bool) -> dict[Unit, int]:
    """The bytes that each unit will newly take on the target; units that take none are left out."""
    loading = {
        unit: size_bytes(unit.tensor) for unit in plan.loads if not is_shared(unit, target, always_copy=always_copy)
    }
    moving = {unit: size_bytes(unit.tensor) for unit in plan.live if needs_move(unit, target)}
    return {unit: size for unit, size in (loading | moving).items() if size}


class Stager:
    """Makes the tensors of one plan."""

    def __init__(self, plan: Plan, target: torch.device, *, always_copy: bool, num_workers: int) -> None:
        self._plan = plan
        self._target = target
        self._always_copy = always_copy
        self._num_workers = num_workers
        self._staged = Staged()

    def run(self, report: Report | None) -> Staged:
        """Make everything.

        Args:
            report: Told after each tensor: bytes done, bytes in all, its name. What it raises stops the work.

        Raises:
            MaterializeError: A file or mapping did not give its tensor.
            torch.OutOfMemoryError: The target has no room.
        """
        self._refuse_movers()
        total_bytes = sum(size_bytes(unit.tensor) for unit in self._plan.loads)
        total_bytes += sum(size_bytes(unit.tensor) for unit in self._plan.live if needs_move(unit, self._target))
        done_bytes = 0
        self._staged.tensors = {unit: unit.tensor for unit in self._plan.live}
        # Closed here and not when somebody drops the error: until then workers would go on reading.
        with torch.inference_mode(False), torch.no_grad(), closing(self._each()) as units:
            for unit in units:
                done_bytes += size_bytes(unit.tensor)
                if report is not None:
                    report(done_bytes, total_bytes, unit.name)
        return self._staged

    def _refuse_movers(self) -> None:
        moving = [unit for unit in self._plan.live if needs_move(unit, self._target)]
        fixed = tuple(unit.name for unit in moving if is_bitsandbytes(unit.tensor))
        if fixed:
            raise MaterializeError(
                fixed,
                f"bitsandbytes quantizes weights when they change device, so these cannot go to {self._target}; "
                f"use target_device={str(self._plan_device(fixed))!r}",
            )
        parted = {
            unit.name: device
            for unit in (*self._plan.loads, *self._plan.live)
            if unit.slots[0].key == "W_q"
            and (device := device_of_scales(unit.slots[0].module)) not in (None, self._target)
        }
        if parted:
            raise MaterializeError(
                tuple(parted),
                f"HQQ keeps the scales of these weights outside of the model's tensors, so they cannot go to "
                f"{self._target} without them; use target_device={str(next(iter(parted.values())))!r}",
            )

    def _plan_device(self, names: tuple[str, ...]) -> torch.device:
        return next(unit.tensor.device for unit in self._plan.live if unit.name == names[0])

    def _each(self) -> Generator[Unit]:
        """Stage unit after unit."""
        loads, live = self._plan.loads, self._plan.live
        # The device context shields from a default device of meta, in which the caller may well be. It costs time for
        # every call of torch, so it is left out where every device is named, which is where there are many tensors.
        with torch.device("cpu"):
            yield from self._from_memory([unit for unit in loads if isinstance(unit.found, state.KeptTensor)])
            for unit in loads:
                if isinstance(unit.found, state.KeptElsewhere):
                    self._finish(unit, _ask(unit, unit.found).to(self._target))
                    yield unit
        yield from self._from_files([unit for unit in loads if isinstance(unit.found, FileBytes)])
        with torch.device("cpu"):
            yield from self._live([unit for unit in live if needs_move(unit, self._target)])

    def _from_memory(self, units: Sequence[Unit]) -> Iterator[Unit]:
        alone: list[Unit] = []
        together: list[Unit] = []
        for unit in units:
            tensor = _kept_tensor(unit)
            if is_shared(unit, self._target, always_copy=self._always_copy):
                self._finish(unit, tensor.detach())
                yield unit
            elif tensor.dtype != unit.tensor.dtype or is_wrapper(tensor) or tensor.layout != torch.strided:
                alone.append(unit)
            else:
                together.append(unit)
        for unit in alone:
            tensor = _kept_tensor(unit).detach()
            if not is_wrapper(tensor):
                tensor = tensor.to(self._target, unit.tensor.dtype, copy=True)
            self._finish(unit, tensor.to(self._target))
            yield unit
        for unit, value in relocated([(unit, _kept_tensor(unit)) for unit in together], self._target):
            self._finish(unit, value)
            yield unit

    def _from_files(self, units: Sequence[Unit]) -> Iterator[Unit]:
        made: dict[int, torch.Tensor] = {}

        def wanted() -> Iterator[tuple[int, FileBytes, torch.Tensor]]:
            # Memory is made shortly before it is filled: what waits for a slow target must not fill the RAM.
            for position, place in in_file_order([_place(unit) for unit in units]):
                placeholder = units[position].tensor
                made[position] = new_tensor(place.shape, placeholder.dtype, stride_for(placeholder, place.shape))
                yield position, place, made[position]

        try:
            with closing(reading(wanted(), self._num_workers)) as pieces:
                for position in (segment.position for piece in pieces for segment in piece if segment.is_last):
                    self._finish(units[position], made.pop(position).to(self._target))
                    yield units[position]
        except UnreadableError as problem:
            raise MaterializeError((units[problem.position].name,), str(problem)) from problem

    def _finish(self, unit: Unit, value: torch.Tensor) -> None:
        slot = unit.slots[0]
        if unit.carriers:
            self._staged.tensors[unit] = unit.tensor
            self._staged.memory[unit] = _pointed_at(unit.tensor, value)
        elif not slot.is_parameter:
            self._staged.tensors[unit] = as_buffer(value, unit.tensor)
        elif is_bitsandbytes(unit.tensor):
            try:
                with torch.device("cpu"):
                    parameter = as_quantized(value, unit.tensor, unit.weights, unit.key, fetch)
            except FileProblemError as problem:
                raise MaterializeError((unit.name,), f"its quantization statistics: {problem}") from problem
            self._staged.tensors[unit] = parameter
            self._staged.swaps += [
                Entry(
                    vars(slot.module), "quant_state", vars(slot.module)["quant_state"], vars(parameter)["quant_state"]
                )
                for slot in unit.slots
                if "quant_state" in vars(slot.module) and "quant_state" in vars(parameter)
            ]
        else:
            self._staged.tensors[unit] = as_parameter(value, unit.tensor)

    def _live(self, units: Sequence[Unit]) -> Iterator[Unit]:
        wrapped = [unit for unit in units if is_wrapper(unit.tensor)]
        for unit in wrapped:
            # The outer tensor of a wrapper has no memory to point elsewhere: the whole object is replaced.
            moved = unit.tensor.detach().to(self._target)
            plain = not unit.slots[0].is_parameter
            self._staged.tensors[unit] = moved if plain else as_parameter(moved, unit.tensor)
            yield unit
        plain_units = [(unit, unit.tensor.detach()) for unit in units if not is_wrapper(unit.tensor)]
        for unit, data in relocated(plain_units, self._target):
            self._staged.memory[unit] = _pointed_at(unit.tensor, data)
            yield unit


def _pointed_at(tensor: torch.Tensor, data: torch.Tensor) -> Memory:
    """The same object with other memory, to which its gradient follows."""
    grad = tensor.grad
    return Memory(tensor, tensor.data, data, grad, None if grad is None else grad.to(data.device))


def _place(unit: Unit) -> FileBytes:
    assert isinstance(unit.found, FileBytes)
    return unit.found


def _kept_tensor(unit: Unit) -> torch.Tensor:
    assert isinstance(unit.found, state.KeptTensor)
    return unit.found.tensor


def _ask(unit: Unit, kept: state.KeptElsewhere) -> torch.Tensor:
    try:
        value = kept.table[kept.key]
    except Exception as error:
        # The mapping is somebody's code and may raise anything; the model must hear which tensor it was about.
        raise MaterializeError((unit.name,), f"the weights mapping of its hook failed with {error!r}") from error
    if not isinstance(value, torch.Tensor):
        raise MaterializeError((unit.name,), f"the weights mapping of its hook gave {value!r:.80}, not a tensor")
    if value.is_meta or (value.shape != unit.tensor.shape and not is_packed(unit.tensor)):
        found = f"a tensor {tuple(value.shape)} on {value.device}"
        raise MaterializeError((unit.name,), f"the weights mapping of its hook gave {found}")
    # It may be a view of anything; what the model gets is its own.
    return value if is_wrapper(value) else value.detach().to(dtype=unit.tensor.dtype, copy=True)


def fetch(kept: state.Kept, headers: Headers | None = None) -> torch.Tensor:
    """Read one stored tensor now, into memory of its own, on the CPU if it comes from a file.

    Args:
        kept: Where it is.
        headers: Headers read before; read anew when left out.

    Raises:
        FileProblemError: The file cannot give it.
    """
    match kept:
        case state.KeptTensor(tensor=tensor):
            return tensor.detach().clone()
        case state.KeptElsewhere(table=table, key=key):
            return torch.as_tensor(table[key]).detach().clone()
        case state.KeptInSafetensors(path=path, tensor_name=name, dtype=dtype):
            place = (headers or Headers()).find(path, name, dtype)
        case state.KeptInDat(path=path, dtype=dtype, shape=shape):
            place = find_dat(path, dtype, shape)
    return read_tensor(place)


def stride_for(placeholder: torch.Tensor, shape: Sequence[int]) -> tuple[int, ...]:
    """The strides to give to data of this shape: the placeholder's, when every element has a place of its own."""
    if tuple(placeholder.shape) != tuple(shape) or placeholder.layout != torch.strided:
        return _contiguous(shape)
    if placeholder.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(placeholder):
        return placeholder.stride()
    return _contiguous(shape)


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    stride, step = [], 1
    for size in reversed(shape):
        stride.append(step)
        step *= max(size, 1)
    return tuple(reversed(stride))


def relocated(
    tensors: Iterable[tuple[KeyT, torch.Tensor]], target: torch.device
) -> Iterator[tuple[KeyT, torch.Tensor]]:
    """Copies on the target under the same keys; tensors that share memory are copied together and share it again."""
    groups: dict[object, list[tuple[KeyT, torch.Tensor]]] = {}
    for key, tensor in tensors:
        shares = tensor.layout == torch.strided and tensor.numel() > 0
        memory = (tensor.untyped_storage().data_ptr(), str(tensor.device)) if shares else object()
        groups.setdefault(memory, []).append((key, tensor))
    for group in groups.values():
        tensor = group[0][1]
        place = (tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype) if len(group) > 1 else None
        if all((t.storage_offset(), t.shape, t.stride(), t.dtype) == place for _, t in group[1:]):
            copied = tensor.detach().to(target, copy=True)
            for key, _ in group:
                yield key, copied
        else:
            yield from _with_storage(group, target)


def _with_storage(
    group: Sequence[tuple[KeyT, torch.Tensor]], target: torch.device
) -> Iterator[tuple[KeyT, torch.Tensor]]:
    """Different views of one memory: the memory is copied once and viewed the same ways."""
    storage = group[0][1].untyped_storage()
    raw = torch.empty_strided((0,), (1,), dtype=torch.uint8, device=group[0][1].device).set_(storage)
    copied = raw.to(target, copy=True)
    for key, tensor in group:
        typed = copied[: len(copied) // tensor.element_size() * tensor.element_size()].view(tensor.dtype)
        yield key, typed.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
