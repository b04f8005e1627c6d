"""Every operator of the simulated device: run on the CPU, over the device's own memory.

One boxed fallback serves all operators: it hands the CPU's kernel tensors over the same memory and gives the results
to the device. Views are made by the CPU's own kernels, which only write a new shape over the same storage. The few
operators that make memory, resize it or cross the link have functions of their own, and so have those for which torch
picks a kernel by device before it looks one up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch.utils import _pytree

from modelcache.dataplane.device.alias import alias, host_alias
from modelcache.dataplane.device.simulated_access import UNMAPPED
from modelcache.dataplane.device.simulated_memory import Allocation
from modelcache.dataplane.device.simulated_slots import NAME, SLOTS, index_of, place

aten = torch.ops.aten
_CPU = torch.device("cpu")
_CPU_KEY = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


# --- between the CPU's view of the memory and the device's ------------------------------------------------------------


def _is_sim(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == NAME


def _host(tensor: torch.Tensor) -> torch.Tensor:
    """The CPU's view of a tensor of the device whose bytes are about to be touched.

    Raises:
        torch.AcceleratorError: An illegal memory access: nothing is mapped there.
    """
    UNMAPPED.require_memory(tensor)
    return host_alias(tensor)


def adopt(raw: torch.Tensor, index: int) -> torch.Tensor:
    """The device's tensor over the memory of a CPU tensor, which is charged to the device.

    Raises:
        torch.OutOfMemoryError: There is no room.
    """
    return _adopt_all([raw], index)[0]


def new_memory(index: int, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The device's tensor over fresh CPU memory that `make` gets.

    Raises:
        torch.OutOfMemoryError: There is no room, on the device or in the RAM behind it.
    """
    try:
        raw = make()
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):
            raise
        raise torch.OutOfMemoryError(f"{place(index)} is out of memory: {error}") from error
    return adopt(raw, index)


def _adopt_all(raws: Sequence[torch.Tensor], index: int) -> list[torch.Tensor]:
    """As `adopt`; results that share a storage still do, and are charged once."""
    memory, device = SLOTS.at(index).memory, place(index)
    bases: dict[int, torch.Tensor] = {}
    adopted = []
    for raw in raws:
        storage = raw.untyped_storage()
        base = bases.get(storage._cdata)
        if base is None:
            whole = storage.nbytes() // raw.itemsize
            base = alias(storage.data_ptr(), (whole,), (1,), raw.dtype, device=device, keep=Allocation(memory, raw))
            bases[storage._cdata] = base
        elif base.dtype != raw.dtype:
            base = base.view(raw.dtype)
        adopted.append(_view(base, raw.shape, raw.stride(), int(raw.storage_offset())))
    return adopted


def _view(base: torch.Tensor, size: Sequence[int], stride: Sequence[int], offset: int) -> torch.Tensor:
    # The CPU's kernel only writes a new shape over the same storage; it never looks at the device.
    return aten.as_strided.default.redispatch(_CPU_KEY, base, size, stride, offset)  # type: ignore[no-any-return]


@cache
def _traits(op: Any) -> tuple[bool, frozenset[str]]:
    """Whether the result is a view of an argument, and the names of arguments that may be resized."""
    is_view = any(each.alias_info is not None and not each.alias_info.is_write for each in op._schema.returns)
    return is_view, frozenset(each.name for each in op._schema.arguments if each.is_out)


# Operators whose second argument, the indices, may be on the CPU, as on CUDA.
_INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}


class _Call:
    """One operator's arguments as the CPU sees them."""

    def __init__(self, op: Any) -> None:
        self.op = op
        self.index: int | None = None
        self.pairs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.device_argument: torch.device | None = None

    def to_host(self, value: object) -> object:
        """The CPU's view of an argument."""
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, torch.device) and value.type == NAME:
            self.device_argument = value
            return _CPU
        return value

    def _tensor(self, value: torch.Tensor) -> torch.Tensor:
        if value.device.type != NAME:
            return value
        index = value.device.index
        if self.index is None:
            self.index = index
        elif self.index != index and value.dim() > 0:
            raise _mixed(self.op, place(self.index), value.device)
        # One alias per tensor, so that a kernel sees that its output is its input.
        pair = self.pairs.get(id(value))
        if pair is None:
            pair = self.pairs[id(value)] = (_host(value), value)
        return pair[0]

    def require_one_device(self, args: Sequence[object], kwargs: dict[str, object]) -> None:
        """Refuse CPU tensors beside the device's, except scalars."""
        if self.index is None:
            return
        if self.op.overloadpacket in _INDEXING:
            args = (args[0], *args[2:])
        for value in _pytree.tree_leaves((args, kwargs)):
            if isinstance(value, torch.Tensor) and value.device.type != NAME and value.dim() > 0:
                raise _mixed(self.op, place(self.index), value.device)

    def to_device(self, result: object, index: int) -> object:
        """The device's view of a result."""
        flat, spec = _pytree.tree_flatten(result)
        devices = {id(host): device for host, device in self.pairs.values()}
        fresh = [value for value in flat if isinstance(value, torch.Tensor) and id(value) not in devices]
        inputs = {host.untyped_storage().data_ptr() for host, _ in self.pairs.values()}
        # A result whose schema promises fresh memory gets some even if the CPU's kernel returned an argument's.
        owned = [value.clone() if value.untyped_storage().data_ptr() in inputs - {0} else value for value in fresh]
        devices |= {id(value): new for value, new in zip(fresh, _adopt_all(owned, index), strict=True)}
        return _pytree.tree_unflatten([devices.get(id(value), value) for value in flat], spec)


def _mixed(op: Any, first: torch.device, second: torch.device) -> RuntimeError:
    return RuntimeError(
        f"Expected all tensors to be on the same device, but found at least two devices, {first} and {second}! "
        f"(when running {op})"
    )


# --- operators --------------------------------------------------------------------------------------------------------


def run_on_host(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Any operator: on the CPU, over the device's own memory."""
    is_view, outs = _traits(op)
    if is_view:
        return op.redispatch(_CPU_KEY, *args, **kwargs)
    call = _Call(op)
    flat, spec = _pytree.tree_flatten((args, kwargs))
    host = [call.to_host(value) for value in flat]
    call.require_one_device(args, kwargs)
    index = index_of(call.device_argument) if call.index is None else call.index
    host_args, host_kwargs = _pytree.tree_unflatten(host, spec)
    host_kwargs.pop("pin_memory", None)
    device = SLOTS.at(index)
    token = device.begin_compute()
    try:
        if outs & kwargs.keys():
            return _run_out(call, index, host_args, host_kwargs, {name: kwargs[name] for name in outs & kwargs.keys()})
        return call.to_device(_apply(op, host_args, host_kwargs), index)
    finally:
        device.end_compute(token)


# Operators found to refuse the plain numbers that torch itself made of a program's scalars.
_want_tensors: set[Any] = set()


def _apply(op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Run an operator on the CPU."""
    if op not in _want_tensors:
        try:
            return op(*args, **kwargs)
        except RuntimeError as error:
            # Raised while arguments are read, before anything is computed.
            if "to Tensor" not in str(error) or "Cast error" not in str(error):
                raise
            _want_tensors.add(op)
    tensors = [value for value in args if isinstance(value, torch.Tensor)]
    wide = torch.float64 if any(value.dtype is torch.float64 for value in tensors) else torch.get_default_dtype()
    args = [
        torch.tensor(value, dtype=wide if isinstance(value, float) else None, device=_CPU)
        if isinstance(value, int | float | complex) and "Tensor" in str(argument.type)
        else value
        for value, argument in zip(args, op._schema.arguments, strict=False)
    ]
    return op(*args, **kwargs)


def _run_out(call: _Call, index: int, args: Any, kwargs: dict[str, Any], outs: dict[str, Any]) -> Any:
    """An operator that writes into given tensors, and resizes them if they have another shape.

    Memory of the device cannot be resized in place, so a result of another shape is made fresh and the tensor is
    re-pointed at it. The first try writes in place: outputs mostly have the right shape already.
    """
    if all(isinstance(out, torch.Tensor) and out.numel() for out in outs.values()):
        try:
            return call.to_device(_apply(call.op, args, kwargs), index)
        except RuntimeError as error:
            if "not resizable" not in str(error):
                raise
    fresh = {
        name: _pytree.tree_map(lambda out: torch.empty(0, dtype=out.dtype, device=_CPU), out)
        for name, out in outs.items()
    }
    _apply(call.op, args, {**kwargs, **fresh})
    for name, out in outs.items():
        for target, result in zip(_pytree.tree_leaves(out), _pytree.tree_leaves(fresh[name]), strict=True):
            if target.shape == result.shape:
                _host(target).copy_(result)
            else:
                _point_at(target, adopt(result, target.device.index))
    results = tuple(out for argument in call.op._schema.arguments if argument.is_out for out in [outs[argument.name]])
    return results[0] if len(results) == 1 else results


def _point_at(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    return aten.set_.source_Storage_storage_offset.redispatch(  # type: ignore[no-any-return]
        _CPU_KEY, target, source.untyped_storage(), source.storage_offset(), source.shape, source.stride()
    )


def _empty_strided(
    size: Sequence[int],
    stride: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    device: object = None,
    **_ignored: object,
) -> torch.Tensor:
    return _new(index_of(device), lambda: torch.empty_strided(size, stride, dtype=dtype, device=_CPU))


def _empty(
    size: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    device: object = None,
    memory_format: torch.memory_format | None = None,
    **_ignored: object,
) -> torch.Tensor:
    chosen = torch.contiguous_format if memory_format is None else memory_format
    return _new(index_of(device), lambda: torch.empty(size, dtype=dtype, device=_CPU, memory_format=chosen))


def _new(index: int, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    device = SLOTS.at(index)
    token = device.begin_compute()
    try:
        return new_memory(index, make)
    finally:
        device.end_compute(token)


def _copy_from(source: torch.Tensor, target: torch.Tensor, _non_blocking: bool = False) -> torch.Tensor:
    """``target.copy_(source)`` where at least one of them is the device's; blocking, whatever was asked."""
    index: int = source.device.index if _is_sim(source) else target.device.index
    device = SLOTS.at(index)
    token = device.begin_compute()
    try:
        started_s = device.now_s()
        host_target = _host(target) if _is_sim(target) else target
        host_target.copy_(_host(source) if _is_sim(source) else source)
        if source.device.type != target.device.type:
            device.cross_link(source.numel() * source.itemsize, started_s)
    finally:
        device.end_compute(token)
    return target


def _copy_from_and_resize(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return _copy_from(source, target.resize_(source.shape))


def _resize(target: torch.Tensor, size: Sequence[int], **_ignored: object) -> torch.Tensor:
    needed = 1
    for length in size:
        needed *= length
    room = target.untyped_storage().nbytes() // target.itemsize - target.storage_offset()
    stride = torch.empty(size, device="meta").stride()
    if needed <= room:
        return _point_at(target, _view(target, size, stride, int(target.storage_offset())))
    fresh = torch.empty(size, dtype=target.dtype, device=_CPU)
    old = _host(target).flatten()
    fresh.view(-1)[: old.numel()] = old
    return _point_at(target, adopt(fresh, target.device.index))


def _set_storage(
    target: torch.Tensor, source: torch.UntypedStorage, offset: int, size: Sequence[int], stride: Sequence[int] = ()
) -> torch.Tensor:
    if source.device.type != NAME:
        stride = stride or torch.empty(size, device="meta").stride()
        raw = torch.empty(0, dtype=target.dtype, device=_CPU).set_(source, offset, tuple(size), tuple(stride))
        return _point_at(target, adopt(raw, target.device.index))
    return aten.set_.source_Storage_storage_offset.redispatch(_CPU_KEY, target, source, offset, size, stride)  # type: ignore[no-any-return]


def _set_whole_storage(target: torch.Tensor, source: torch.UntypedStorage) -> torch.Tensor:
    return _set_storage(target, source, 0, (source.nbytes() // target.itemsize,), (1,))


def _set_tensor(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    return _point_at(target, source)


def _set_nothing(target: torch.Tensor) -> torch.Tensor:
    return _point_at(target, adopt(torch.empty(0, dtype=target.dtype, device=_CPU), target.device.index))


def _item(tensor: torch.Tensor) -> Any:
    device = SLOTS.at(tensor.device.index)
    token = device.begin_compute()
    try:
        return _host(tensor).item()
    finally:
        device.end_compute(token)


def _convolution(*args: Any) -> Any:
    return run_on_host(aten.convolution.default, *args)


def _convolution_backward(*args: Any) -> Any:
    # torch's own signature has no bias sizes here, and asks for the bias gradient in the mask only.
    grad, source, weight, stride, padding, dilation, transposed, output_padding, groups, mask = args
    biases = [weight.shape[1] * groups if transposed else weight.shape[0]]
    return run_on_host(
        aten.convolution_backward.default,
        *(grad, source, weight, biases, stride, padding, dilation, transposed, output_padding, groups, mask),
    )


def _lstm_cell(
    input_gates: torch.Tensor,
    hidden_gates: torch.Tensor,
    cell: torch.Tensor,
    input_bias: torch.Tensor | None = None,
    hidden_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For this key torch chooses the fused cell before any kernel is looked up, so there must be one."""
    gates = _sum(input_gates, hidden_gates, input_bias, hidden_bias)
    enter, forget, new, leave = gates.chunk(4, 1)
    cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
    return leave.sigmoid() * cell.tanh(), cell, gates


def _gru_cell(
    input_gates: torch.Tensor,
    hidden_gates: torch.Tensor,
    hidden: torch.Tensor,
    input_bias: torch.Tensor | None = None,
    hidden_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    reset_in, enter_in, new_in = _sum(input_gates, input_bias).chunk(3, 1)
    reset_hidden, enter_hidden, new_hidden = _sum(hidden_gates, hidden_bias).chunk(3, 1)
    reset, enter = (reset_in + reset_hidden).sigmoid(), (enter_in + enter_hidden).sigmoid()
    new = (new_in + reset * new_hidden).tanh()
    result = new + enter * (hidden - new)
    return result, torch.cat([reset, enter, new, hidden, new_hidden], 1)


def _sum(first: torch.Tensor, *others: torch.Tensor | None) -> torch.Tensor:
    for other in others:
        if other is not None:
            first = first + other
    return first


def _pack(source: torch.Tensor, lengths: torch.Tensor, batch_first: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The lengths and the batch sizes stay on the CPU on every device."""
    index: int = source.device.index
    data, batch_sizes = aten._pack_padded_sequence.default(_host(source), lengths, batch_first)
    return adopt(data.clone(), index), batch_sizes


OPERATORS: dict[str, Callable[..., Any]] = {
    "empty_strided": _empty_strided,
    "empty.memory_format": _empty,
    "_copy_from": _copy_from,
    "_copy_from_and_resize": _copy_from_and_resize,
    "resize_": _resize,
    "set_": _set_nothing,
    "set_.source_Storage": _set_whole_storage,
    "set_.source_Storage_storage_offset": _set_storage,
    "set_.source_Tensor": _set_tensor,
    "_local_scalar_dense": _item,
    # What lets `p.data = view` and `Module.to` cross between the CPU and the device with the same Parameter objects.
    "_has_compatible_shallow_copy_type": lambda _first, _second: True,
    "record_stream": lambda _tensor, _stream: None,
    "convolution_overrideable": _convolution,
    "convolution_backward_overrideable": _convolution_backward,
    "_thnn_fused_lstm_cell": _lstm_cell,
    "_thnn_fused_gru_cell": _gru_cell,
    "_pack_padded_sequence": _pack,
}
