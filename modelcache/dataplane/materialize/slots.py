"""The places in a model that hold tensors, and the models whose places must not be touched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from modelcache.dataplane.materialize import accelerate_state, diffusers_state
from modelcache.errors import MaterializeError


@dataclass(frozen=True, slots=True)
class ModulePath:
    """One way to reach a module: `shown` as the user's model spells it, `plain` without wrapper modules."""

    shown: str
    plain: str


@dataclass(slots=True, eq=False)
class Slot:
    """One entry of a module's parameters or buffers; a module reached twice has one slot with two names.

    Attributes:
        table: The module's own ``_parameters`` or ``_buffers``.
        tensor: What the entry holds while planning.
        names: Every full name, as the user's model spells it; the first is used in messages.
        plain_names: The same without wrapper modules.
    """

    module: torch.nn.Module
    table: dict[str, torch.Tensor | None]
    key: str
    tensor: torch.Tensor
    names: tuple[str, ...]
    plain_names: tuple[str, ...]

    @property
    def is_parameter(self) -> bool:
        """Whether it is an entry of ``_parameters``."""
        return self.table is self.module._parameters


@dataclass(slots=True)
class Places:
    """Everything a model is made of.

    Attributes:
        modules: Every module once, with all ways to reach it.
        slots: Every entry that holds a tensor.
    """

    modules: dict[torch.nn.Module, list[ModulePath]] = field(default_factory=dict)
    slots: list[Slot] = field(default_factory=list)

    def slots_by_name(self) -> dict[str, Slot]:
        """Every name of every slot, with and without wrapper modules."""
        names = {name: slot for slot in self.slots for name in slot.plain_names}
        return names | {name: slot for slot in self.slots for name in slot.names}


def join(path: str, name: str) -> str:
    """A dotted name below a path; an empty path is the root."""
    return f"{path}.{name}" if path else name


def find_places(components: Mapping[str, torch.nn.Module]) -> Places:
    """Walk all components; an empty component name is a model that is one module.

    Raises:
        MaterializeError: Part of it belongs to a library that keeps weights in a way we cannot take over.
    """
    places = Places()
    for component, module in components.items():
        for path, found in _walk(module, ModulePath(component, component), set()):
            places.modules.setdefault(found, []).append(path)
    for module, paths in places.modules.items():
        _refuse_module(module, paths[0].shown)
        for table in cast("list[dict[str, torch.Tensor | None]]", [module._parameters, module._buffers]):
            for key, tensor in table.items():
                if tensor is not None:
                    names = tuple(join(path.shown, key) for path in paths)
                    plain = tuple(join(path.plain, key) for path in paths)
                    places.slots.append(Slot(module, table, key, tensor, names, plain))
    for slot in places.slots:
        _refuse_tensor(slot)
    return places


def _walk(module: torch.nn.Module, path: ModulePath, above: set[int]) -> Iterator[tuple[ModulePath, torch.nn.Module]]:
    if id(module) in above:
        return
    yield path, module
    wrapped = wrapped_key(module)
    for key, child in module._modules.items():
        if child is not None:
            plain = path.plain if key == wrapped else join(path.plain, key)
            yield from _walk(child, ModulePath(join(path.shown, key), plain), above | {id(module)})


def wrapped_key(module: torch.nn.Module) -> str | None:
    """The name under which a transparent wrapper keeps the real module; `None` when it is no such wrapper."""
    if "_orig_mod" in module._modules:
        return "_orig_mod"
    if isinstance(module, torch.nn.DataParallel | torch.nn.parallel.DistributedDataParallel):
        return "module"
    return None


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """The module below compiled and data-parallel wrappers."""
    while (key := wrapped_key(module)) is not None:
        inner = module._modules[key]
        if inner is None:
            break
        module = inner
    return module


def _refuse_module(module: torch.nn.Module, path: str) -> None:
    where = f"module {path!r}" if path else "the model"
    if not isinstance(module._parameters, dict) or not isinstance(module._buffers, dict):
        raise MaterializeError(
            (),
            f"{where} keeps its weights in a {type(module._parameters).__name__} of another library; "
            "use that library's own way to load them first",
        )
    if type(module).__name__ == "FullyShardedDataParallel":
        raise MaterializeError((), f"{where} is sharded by FSDP; gather its weights first")
    for hook in accelerate_state.hooks_of(module):
        if accelerate_state.is_unknown_offloader(hook):
            raise MaterializeError(
                (), f"{where} is offloaded by {type(hook).__module__}.{type(hook).__name__}; remove that hook first"
            )
    if problem := diffusers_state.problem_of(module):
        raise MaterializeError((), f"{where} {problem}")
    hooks = accelerate_state.hooks_of(module)
    if diffusers_state.offloads_groups(module) and any(map(accelerate_state.places_tensors, hooks)):
        raise MaterializeError(
            (), f"{where} is offloaded by accelerate and by diffusers' groups at once; remove one of the two first"
        )


def _refuse_tensor(slot: Slot) -> None:
    if type(slot.tensor).__module__.startswith("torch.distributed"):
        raise MaterializeError(slot.names[:1], "sharded over processes; gather it first")
    if hasattr(slot.tensor, "ds_id"):
        raise MaterializeError(slot.names[:1], "partitioned by DeepSpeed; gather it first")


def is_wrapper(tensor: torch.Tensor) -> bool:
    """Whether the data is in inner tensors (quantized weights and the like)."""
    return is_traceable_wrapper_subclass(tensor)


def inner_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that hold the bytes: itself, or for a wrapper subclass what is inside, all the way down."""
    if not is_wrapper(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return [deep for name in names for deep in inner_tensors(getattr(tensor, name))]


def size_bytes(tensor: torch.Tensor) -> int:
    """The bytes of a tensor, or of what is inside it."""
    if not is_wrapper(tensor):
        return tensor.numel() * tensor.element_size()
    return sum(inner.numel() * inner.element_size() for inner in inner_tensors(tensor))
