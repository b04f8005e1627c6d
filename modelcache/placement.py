"""Where tensors go: inputs are moved to the device a model runs on; the model itself is moved by the cache alone.

Imports no torch: where it is not loaded, nobody passes a tensor.
"""

from __future__ import annotations

import copy
import sys
from collections import UserDict
from typing import Any

_ACCELERATORS = frozenset({"cuda", "xpu", "npu", "hpu", "mtia", "ipu"})
_CASTS = {"half": "float16", "float": "float32", "double": "float64", "bfloat16": "bfloat16"}
_TAKES_AWAY = frozenset(
    {
        "to_empty",
        "share_memory",
        "enable_model_cpu_offload",
        "enable_sequential_cpu_offload",
        "enable_group_offload",
    }
)
#: Methods that would move or cast a model in place.
PLACERS = frozenset({"to", "cpu", "type", "_apply"}) | _ACCELERATORS | _CASTS.keys() | _TAKES_AWAY

_ATOMS = frozenset({int, float, complex, bool, str, bytes, type(None)})


# --- inputs -----------------------------------------------------------------------------------------------------------


def move_inputs(args: tuple[Any, ...], kwargs: dict[str, Any], device: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments with every tensor on `device` (a `torch.device`), lists, tuples and mappings searched.

    What needs no move is passed on as it is, containers included; nothing the caller holds is changed.
    """
    tensor_type = getattr(sys.modules.get("torch"), "Tensor", None)
    if tensor_type is None:
        return args, kwargs
    if not _ATOMS.issuperset(map(type, args)):
        args = tuple([_moved(value, tensor_type, device) for value in args])
    if kwargs and not _ATOMS.issuperset(map(type, kwargs.values())):
        kwargs = {key: _moved(value, tensor_type, device) for key, value in kwargs.items()}
    return args, kwargs


def _moved(value: Any, tensor_type: type, device: Any) -> Any:
    if isinstance(value, tensor_type):
        return _moved_tensor(value, device)
    if isinstance(value, list | tuple):
        if _ATOMS.issuperset(map(type, value)):
            return value
        return _moved_sequence(value, tensor_type, device)
    if isinstance(value, dict | UserDict):
        return _moved_mapping(value, tensor_type, device)
    return value


def _moved_tensor(value: Any, device: Any) -> Any:
    here = value.device
    # A meta tensor has no data to move; the model will say so better than `to` would.
    if here == device or here.type == "meta" or (device.index is None and here.type == device.type):
        return value
    return value.to(device)


def _moved_sequence(value: Any, tensor_type: type, device: Any) -> Any:
    items = [_moved(item, tensor_type, device) for item in value]
    if all(item is old for item, old in zip(items, value, strict=True)):
        return value
    if type(value) is list:
        return items
    if type(value) is tuple:
        return tuple(items)
    if isinstance(value, list):
        clone = copy.copy(value)
        clone[:] = items
        return clone
    if hasattr(value, "to"):
        return value.to(device)  # A PackedSequence keeps one of its tensors on the CPU: it moves itself.
    return value._make(items) if hasattr(value, "_make") else value


def _moved_mapping(value: Any, tensor_type: type, device: Any) -> Any:
    changed = {}
    for key, item in value.items():
        moved = _moved(item, tensor_type, device)
        if moved is not item:
            changed[key] = moved
    if not changed:
        return value
    # A BatchEncoding's own `to` would move the caller's batch in place.
    clone = copy.copy(value)
    for key, item in changed.items():
        clone[key] = item
    return clone


# --- the model --------------------------------------------------------------------------------------------------------


def check_placement(
    name: str, model: Any, device: Any, verb: str, *, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Accept a request to place or cast a cached model when it changes nothing.

    Args:
        name: The registered name.
        model: The raw object.
        device: The `torch.device` it runs on.
        verb: The method that was called, one of `PLACERS`.
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Raises:
        RuntimeError: It would move or cast the model; the text says what to do instead.
    """
    if verb in _TAKES_AWAY:
        raise RuntimeError(
            f"{name!r} cannot do {verb}(): the cache owns its weights and decides where they are; "
            f"remove the call, or take the model out with cache.unregister({name!r})"
        )
    if verb == "_apply":
        _check_apply(name, model, device, args[0])
    elif verb in _CASTS:
        _check_dtype(name, model, getattr(sys.modules["torch"], _CASTS[verb]))
    elif verb == "cpu":
        _check_device(name, device, "cpu")
    elif verb in _ACCELERATORS:
        wanted = next((value for value in (*args, *kwargs.values()) if value is not None), verb)
        _check_device(name, device, f"{verb}:{wanted}" if isinstance(wanted, int) else wanted)
    else:
        for value in (*args, *(value for key, value in kwargs.items() if key not in {"non_blocking", "copy"})):
            _check_target(name, model, device, value)


def _check_target(name: str, model: Any, device: Any, target: Any) -> None:
    """Check one argument of `to` or `type`: a device, a dtype, a tensor like which to be, or a memory format."""
    torch = sys.modules.get("torch")
    if target is None or isinstance(target, bool):
        return
    if isinstance(target, str | int):
        _check_device(name, device, target)
    elif torch is not None and isinstance(target, torch.Tensor):
        _check_device(name, device, target.device)
        _check_dtype(name, model, target.dtype)
    elif torch is not None and isinstance(target, torch.dtype):
        _check_dtype(name, model, target)
    elif torch is not None and isinstance(target, torch.device):
        _check_device(name, device, target)
    elif torch is None or target is not torch.preserve_format:
        raise RuntimeError(
            f"{name!r} cannot be changed to {target} in place: the cache holds its bytes; "
            "do it in the loader, before the model is returned"
        )


def _check_device(name: str, device: Any, wanted: Any) -> None:
    here_type, _, here_index = str(device).partition(":")
    if isinstance(wanted, int):
        wanted = f"{here_type}:{wanted}"  # torch reads a bare number as an index of its accelerator.
    wanted_type, _, wanted_index = str(wanted).partition(":")
    if wanted_type == here_type and (not wanted_index or wanted_index == (here_index or "0")):
        return
    raise RuntimeError(
        f"{name!r} runs on {device} and cannot be moved to {wanted}: the cache decides where its weights are; to free "
        f"the device call cache.park({name!r}), the next use brings it back; for a copy of your own call the loader"
    )


def _check_dtype(name: str, model: Any, wanted: Any) -> None:
    held = _float_dtypes(model)
    if held == {wanted}:
        return
    text = str(wanted).removeprefix("torch.")
    as_what = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in held)) or "they are"
    raise RuntimeError(
        f"{name!r} cannot be cast to {text} in place: the cache holds its weights as {as_what}; register a variant "
        f"whose loader returns it so: cache.register({f'{name}-{text}'!r}, loader)"
    )


def _float_dtypes(model: Any) -> set[Any]:
    if hasattr(model, "parameters") and hasattr(model, "buffers"):
        return {tensor.dtype for part in (model.parameters(), model.buffers()) for tensor in part if _is_float(tensor)}
    dtype = getattr(model, "dtype", None)
    return set() if dtype is None else {dtype}


def _is_float(tensor: Any) -> bool:
    return bool(tensor.is_floating_point() or tensor.is_complex())


def _check_apply(name: str, model: Any, device: Any, convert: Any) -> None:
    """Try what a parent module wants done to every tensor on one empty tensor: `parent.to(...)` comes this way."""
    torch = sys.modules["torch"]
    for dtype in _float_dtypes(model) or {torch.float32}:
        probe = torch.empty(0, dtype=dtype)
        result = convert(probe)
        _check_device(name, device, result.device)
        if result.dtype != dtype:
            _check_dtype(name, model, result.dtype)
        if result.is_shared():
            check_placement(name, model, device, "share_memory", args=(), kwargs={})
