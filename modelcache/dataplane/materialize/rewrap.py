"""From plain data and a placeholder to the tensor that the model had before its dispatch.

Class, ``requires_grad`` and Python attributes come from the placeholder. Quantized weights of bitsandbytes get back the
statistics that the dispatch stored beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from modelcache.dataplane.materialize import accelerate_state as state
from modelcache.dataplane.materialize.slots import is_wrapper

Fetch = Callable[[state.Kept], torch.Tensor]


def is_packed(tensor: torch.Tensor) -> bool:
    """Whether it is a 4-bit weight of bitsandbytes that has been quantized."""
    return type(tensor).__name__ == "Params4bit" and not tensor.is_floating_point()


def is_bitsandbytes(tensor: torch.Tensor) -> bool:
    """Whether its class quantizes when it is moved, so that it may not be moved like other tensors."""
    return type(tensor).__name__ in {"Int8Params", "Params4bit", "FP4Params"}


def device_of_scales(module: torch.nn.Module) -> torch.device | None:
    """Where HQQ keeps what belongs to the weight of a module beside its tensors; `None` for every other module."""
    scales = vars(module).get("meta")
    if isinstance(scales, dict) and any(base.__name__ == "HQQLinear" for base in type(module).__mro__):
        return next((value.device for value in scales.values() if isinstance(value, torch.Tensor)), None)
    return None


def bitsandbytes_problem(placeholder: torch.Tensor, weights: Mapping[str, Any], key: str) -> str | None:
    """Why a quantized weight could not be rebuilt, in words; `None` when it can or is no such weight."""
    if is_packed(placeholder) and not _statistics_of_4bit(weights, key):
        return "a 4-bit weight without its quantization statistics; load the model again without offloading this part"
    if _is_quantized_int8(placeholder) and state.find_kept(weights, _scales_key(key)) is None:
        return "an 8-bit weight without its scales; load the model again without offloading this part"
    return None


def _is_quantized_int8(tensor: torch.Tensor) -> bool:
    return type(tensor).__name__ == "Int8Params" and tensor.dtype == torch.int8


def _scales_key(key: str) -> str:
    return key.removesuffix("weight") + "SCB"


def _statistics_of_4bit(weights: Mapping[str, Any], key: str) -> dict[str, state.Kept]:
    start = key + "."
    found = {name[len(start) :]: state.find_kept(weights, name) for name in state.keys_below(weights, start)}
    return {name: kept for name, kept in found.items() if kept is not None}


def as_buffer(value: torch.Tensor, placeholder: torch.Tensor) -> torch.Tensor:
    """`value` as the buffer that `placeholder` stands for."""
    if type(placeholder) is torch.Tensor or is_wrapper(value):
        buffer = value
    else:
        buffer = value.as_subclass(torch.Tensor if _is_parameter_class(placeholder) else type(placeholder))
    _copy_attributes(placeholder, buffer)
    return buffer


def as_parameter(value: torch.Tensor, placeholder: torch.Tensor) -> torch.nn.Parameter:
    """`value` as the parameter that `placeholder` stands for, which may have lost that class in a forward."""
    wants_grad = placeholder.requires_grad
    parameter: Any
    if is_wrapper(value) or not _is_parameter_class(placeholder) or type(placeholder) is torch.nn.Parameter:
        parameter = torch.nn.Parameter(value, requires_grad=wants_grad)
    else:
        # Calling the subclass would run its constructor, of which we know nothing.
        parameter = torch.Tensor._make_subclass(type(placeholder), value, wants_grad)
    _copy_attributes(placeholder, parameter)
    return parameter  # type: ignore[no-any-return]


def _is_parameter_class(tensor: torch.Tensor) -> bool:
    return issubclass(type(tensor), torch.nn.Parameter)


def _copy_attributes(placeholder: torch.Tensor, tensor: torch.Tensor) -> None:
    if is_wrapper(tensor):
        return  # its attributes are its data
    for name, value in vars(placeholder).items():
        if not (isinstance(value, torch.Tensor) and value.is_meta):
            vars(tensor)[name] = value


def as_quantized(
    value: torch.Tensor,
    placeholder: torch.Tensor,
    weights: Mapping[str, Any],
    key: str,
    fetch: Fetch,
) -> torch.nn.Parameter:
    """`value` as the bitsandbytes weight that `placeholder` stands for, on the device of `value`.

    Args:
        value: The stored bytes.
        placeholder: What the model holds now.
        weights: Where the statistics are stored beside the data.
        key: The key of the data.
        fetch: Reads one stored tensor.
    """
    if is_packed(placeholder):
        kept = _statistics_of_4bit(weights, key)
        quantized: Any = type(placeholder).from_prequantized(  # type: ignore[attr-defined]
            data=value,
            quantized_stats={name: fetch(place) for name, place in kept.items()},
            requires_grad=placeholder.requires_grad,
            device=value.device,
        )
        quantized.module = vars(placeholder).get("module")
        return quantized  # type: ignore[no-any-return]
    parameter: Any = as_parameter(value, placeholder)
    if _is_quantized_int8(placeholder):
        scales = state.find_kept(weights, _scales_key(key))
        assert scales is not None, "checked while planning"
        # The first forward takes both from the weight and keeps them in the module's state.
        parameter.CB, parameter.SCB = parameter.data, fetch(scales).to(value.device)
    return parameter  # type: ignore[no-any-return]
