"""What kind of object a loader made: where its modules are, what it thinks its device is, why it cannot be moved.

Known are plain modules (transformers and sentence-transformers models among them), transformers and diffusers
pipelines, dictionaries, lists and tuples of modules, and any other object that holds modules as attributes. Nothing is
imported to find out: an object's classes say where they come from. Accelerate's dispatch is not refused here;
`materialize/entry_points.py` makes such models whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from modelcache.dataplane.materialize.diffusers_state import offloads_groups

# Attributes under which objects keep the device they believe to be on. Properties of these names are derived from the
# tensors and follow by themselves; only what an object stores is set.
_DEVICE_ATTRIBUTES = ("device", "_device", "_target_device", "target_device")


def modules_of(model: object) -> dict[str, nn.Module]:
    """The modules of an object by component name; ``{"": module}`` for an object that is one module.

    A compiled module stands for the one it was compiled from. A module that appears under two names is listed once.

    Raises:
        TypeError: The object holds no modules that we could find.
    """
    if isinstance(model, nn.Module):
        return {"": _uncompiled(model)}
    found: dict[str, nn.Module] = {}
    for component, value in _components(model):
        if isinstance(value, nn.Module):
            module = _uncompiled(value)
            if not any(module is known for known in found.values()):
                found[component] = module
    if not found:
        raise TypeError(
            f"{_qualified(type(model))} is no torch module and holds none as an attribute; return a module, a "
            "pipeline, or an object with modules as attributes"
        )
    return found


def named_tensors(model: object) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by full name, under all of its names: tied tensors appear several times.

    Of a wrapper (a quantized tensor, for example) the tensors inside are listed, under ``"<name>.<attribute>"``.

    Raises:
        TypeError: As `modules_of`.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in _registered(model).items():
        tensors.update(_opened(name, tensor))
    return tensors


def _opened(name: str, tensor: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor
        return
    for attribute in tensor.__tensor_flatten__()[0]:
        yield from _opened(f"{name}.{attribute}", getattr(tensor, attribute))


def _registered(model: object) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for component, module in modules_of(model).items():
        prefix = f"{component}." if component else ""
        for path, child in module.named_modules(remove_duplicate=False):
            start = f"{prefix}{path}." if path else prefix
            for name, tensor in [*child._parameters.items(), *child._buffers.items()]:
                if tensor is not None:
                    tensors[start + name] = tensor
    return tensors


def type_name(model: object) -> str:
    """The object's type for people, without the wrapper of a compiled module."""
    return type(_uncompiled(model)).__name__ if isinstance(model, nn.Module) else type(model).__name__


def default_concurrency(model: object) -> int:
    """Leases at a time when nothing else is said: 0, unlimited, for modules; 1 for everything that drives modules.

    Pipelines keep state between the steps of a call. So do sentence-transformers models, although they are modules:
    their tokenizer's padding and truncation are settings of the object, not of the call.
    """
    if isinstance(model, nn.Module):
        return 1 if _comes_from(model, "sentence_transformers") else 0
    return 1


@dataclass(frozen=True, slots=True)
class DeviceIdea:
    """The devices that an object and its modules stored as their own, to be put back by `restore`."""

    stored: tuple[tuple[object, str, object], ...]


def remember(model: object) -> DeviceIdea:
    """Take down where the object believes it is."""
    return DeviceIdea(tuple(_stored_devices(model)))


def point_at(model: object, device: torch.device) -> None:
    """Make the object believe that it is on `device`; the tensors are not touched."""
    for owner, attribute, value in list(_stored_devices(model)):
        vars(owner)[attribute] = device if isinstance(value, torch.device) else str(device)


def restore(model: object, idea: DeviceIdea) -> None:
    """Put back what `remember` took down."""
    del model  # the idea knows its owners; the argument is for the reader of the call
    for owner, attribute, value in idea.stored:
        vars(owner)[attribute] = value


def refusal(model: object) -> str | None:
    """Why the object cannot be moved, in words with the fix; `None` when it can.

    Tensors on ``meta`` are no reason: whoever loads it knows whether a source or a dispatch has their data.

    Raises:
        TypeError: As `modules_of`.
    """
    modules = modules_of(model)
    if _comes_from(model, "diffusers") and vars(model).get("_all_hooks"):
        return (
            "the pipeline offloads itself (enable_model_cpu_offload or enable_sequential_cpu_offload); do not call "
            "that in the loader, the cache moves the pipeline as a whole"
        )
    for component, root in modules.items():
        for path, module in root.named_modules():
            where = ".".join(part for part in (component, path) if part) or "the model"
            if (reason := _refusal_of_module(module)) is not None:
                return f"{where} {reason}"
    for name, tensor in _registered(model).items():
        if (reason := _refusal_of_tensor(tensor)) is not None:
            return f"{name} {reason}"
    return _refusal_of_devices(model)


def handle_in(model: object) -> str | None:
    """The place of a handle of a registered model inside the object, ``""`` for the object itself; else `None`.

    A handle passes for its model everywhere, so caching one would move a model behind the back of its own entry.
    """
    if _is_handle(model):
        return ""
    for component, value in _components(model):
        if _is_handle(value):
            return component
    return _handle_below(model, "", set()) if isinstance(model, nn.Module) else None


def _handle_below(module: nn.Module, prefix: str, seen: set[int]) -> str | None:
    # Not `named_modules`: a handle answers that for its model, and would be called to find out.
    for name, child in module._modules.items():
        if _is_handle(child):
            return prefix + name
        if child is not None and id(child) not in seen:
            seen.add(id(child))
            if (place := _handle_below(child, f"{prefix}{name}.", seen)) is not None:
                return place
    return None


def _is_handle(value: object) -> bool:
    # `type` sees through the proxy's `__class__`. The front door is not imported from here.
    return (type(value).__module__, type(value).__name__) == ("modelcache.handle", "ModelHandle")


def _components(model: object) -> Iterable[tuple[str, object]]:
    """The named parts of an object that is no module itself, whatever they are."""
    if isinstance(model, nn.Module):
        return ()
    if _comes_from(model, "diffusers"):
        components = getattr(model, "components", None)
        if isinstance(components, Mapping):
            return [(str(key), value) for key, value in components.items()]
    if isinstance(model, Mapping):
        return [(str(key), value) for key, value in model.items()]
    if isinstance(model, (tuple, list)):
        return [(str(i), value) for i, value in enumerate(model)]
    return list(getattr(model, "__dict__", {}).items())


def _uncompiled(module: nn.Module) -> nn.Module:
    """The module inside `torch.compile`'s wrapper, which forwards attribute reads and so must be asked directly."""
    if type(module).__name__ != "OptimizedModule":
        return module
    inner = module._modules.get("_orig_mod")
    return module if inner is None else _uncompiled(inner)


def _stored_devices(model: object) -> Iterator[tuple[object, str, object]]:
    owners: list[object] = [] if isinstance(model, nn.Module) else [model]
    for root in modules_of(model).values():
        owners += root.modules()
    for owner in owners:
        attributes = getattr(owner, "__dict__", {})
        for attribute in _DEVICE_ATTRIBUTES:
            value = attributes.get(attribute)
            if isinstance(value, torch.device) or (isinstance(value, str) and _is_device(value)):
                yield owner, attribute, value


def _is_device(text: str) -> bool:
    try:
        return torch.device(text).type != "meta"
    except RuntimeError:
        return False


def _refusal_of_module(module: nn.Module) -> str | None:
    kind = type(module)
    scripted = isinstance(module, torch.jit.ScriptModule)
    if not scripted and not isinstance(module.__dict__.get("_parameters", {}), dict):
        return (
            f"({_qualified(kind)}) keeps its parameters in an offload cache of compressed-tensors; remove it in the "
            "loader (compressed_tensors.offload.remove_dispatch)"
        )
    if kind.__name__ == "HQQLinear":
        return "is quantized with HQQ, whose scales are no tensors of the module; register it unquantized"
    if any(base.__name__ in {"FullyShardedDataParallel", "FSDPModule"} for base in kind.__mro__):
        return "is sharded with FSDP; register an unsharded model"
    if kind.__name__ in {"DistributedDataParallel", "DataParallel"} and kind.__module__.startswith("torch.nn.parallel"):
        return f"is wrapped in {kind.__name__}; register the model inside it, its .module"
    if offloads_groups(module):
        return "offloads itself in groups (enable_group_offload); do not call that in the loader, the cache moves it"
    hook = module.__dict__.get("_hf_hook")
    if hook is not None and any(_comes_from(each, "diffusers") for each in (hook, *getattr(hook, "hooks", ()))):
        return "is offloaded by diffusers' ComponentsManager; load it without enable_auto_cpu_offload"
    return None


def _refusal_of_tensor(tensor: torch.Tensor) -> str | None:
    kind = type(tensor)
    if nn.parameter.is_lazy(tensor):
        return "has no shape yet (a lazy module); run it once in the loader"
    if kind.__name__ == "DTensor" or type(getattr(tensor, "data", None)).__name__ == "DTensor":
        return "is a DTensor spread over several devices; register an unsharded model"
    if hasattr(tensor, "ds_id"):
        return "is partitioned by DeepSpeed ZeRO-3; register an unpartitioned model"
    if _class_comes_from(kind, "bitsandbytes"):
        return (
            f"is quantized with bitsandbytes ({kind.__name__}), whose statistics are no tensors of the module; "
            "register it unquantized or quantized with torchao"
        )
    return None


def _refusal_of_devices(model: object) -> str | None:
    """A model spread over accelerators with nobody to say why.

    Scalars may be anywhere, a dispatch explains itself, and beside what is on the CPU there may be a storage that
    another cached model shares, which is where that model is.
    """
    first: dict[torch.device, str] = {}
    for name, tensor in named_tensors(model).items():
        if tensor.dim() and tensor.device.type not in ("meta", "cpu"):
            first.setdefault(tensor.device, name)
    if len(first) < 2 or any("_hf_hook" in each.__dict__ for m in modules_of(model).values() for each in m.modules()):
        return None
    places = ", ".join(f"{name} on {device}" for device, name in list(first.items())[:4])
    return f"its tensors are on several devices ({places}); load all of it on the CPU, the cache moves it"


def _comes_from(value: object, package: str) -> bool:
    return _class_comes_from(type(value), package)


def _class_comes_from(kind: type, package: str) -> bool:
    return any(base.__module__.partition(".")[0] == package for base in kind.__mro__)


def _qualified(kind: type[Any]) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
