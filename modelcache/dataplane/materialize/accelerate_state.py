"""What accelerate wrote on a model: its hooks, where the hooked-away data is, and how to take the hooks off again.

The one module that reads accelerate's undocumented attributes. It reads; the writes it proposes are swaps for the
caller to make. Nothing here runs a hook or loads a tensor: accelerate's own loaders open a file per tensor, read onto
the GPU, and its own removal restores stale buffers and drops other people's hooks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, CpuOffload, ModelHook, SequentialHook
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset

from modelcache.dataplane.materialize.journal import ABSENT, ClassEntry, Entry, Swap

# The movers that `dispatch_model` wraps so that they refuse; accelerate's own list lacks the last one.
_BLOCKED_MOVERS = ("to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa", "neuron")


@dataclass(frozen=True, slots=True)
class KeptTensor:
    """Data that a mapping of a hook holds in memory under `key`."""

    tensor: torch.Tensor
    table: Mapping[str, Any]
    key: str


@dataclass(frozen=True, slots=True)
class KeptInSafetensors:
    """Data in a safetensors file, to be cast to `dtype` after reading; `None` leaves it as stored."""

    path: str
    tensor_name: str
    dtype: torch.dtype | None
    loader: OffloadedWeightsLoader
    key: str


@dataclass(frozen=True, slots=True)
class KeptInDat:
    """Data in one of accelerate's ``.dat`` files: the bare bytes in row-major order."""

    path: str
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    loader: OffloadedWeightsLoader
    key: str


@dataclass(frozen=True, slots=True)
class KeptElsewhere:
    """Data behind a mapping that is not accelerate's: only asking it brings the tensor."""

    table: Mapping[str, Any]
    key: str


Kept = KeptTensor | KeptInSafetensors | KeptInDat | KeptElsewhere


def own_hook(module: torch.nn.Module) -> ModelHook | None:
    """The hook on this very module. `getattr` would also find the hook inside a compiled module's original."""
    return module.__dict__.get("_hf_hook")


def hooks_of(module: torch.nn.Module) -> list[ModelHook]:
    """The hooks of this module in the order they run, chains opened."""
    hook = own_hook(module)
    return [] if hook is None else list(_opened(hook))


def _opened(hook: ModelHook) -> Iterator[ModelHook]:
    if isinstance(hook, SequentialHook):
        for inner in hook.hooks:
            yield from _opened(inner)
    else:
        yield hook


def places_tensors(hook: ModelHook) -> bool:
    """Whether the hook moves weights or inputs between devices: those come off; all others are someone else's."""
    return isinstance(hook, AlignDevicesHook | CpuOffload)


def is_unknown_offloader(hook: ModelHook) -> bool:
    """Whether the hook offloads weights in a way we do not know, so that taking the others off would break it."""
    return not places_tensors(hook) and "offload" in type(hook).__name__.lower()


@dataclass(frozen=True, slots=True)
class Offload:
    """One hook that keeps the weights of its module elsewhere.

    Attributes:
        weights: From names relative to the module to data.
        covers_subtree: Whether the names reach into submodules (``preload_module_classes``).
        tied_names: Names that accelerate saw tied when it took them away.
        tied_memory: accelerate's record of tied memory, shared by all hooks of one dispatch: address -> copies.
        hook: The attributes of the hook.
    """

    weights: Mapping[str, Any]
    covers_subtree: bool
    tied_names: frozenset[str]
    tied_memory: Mapping[int, Mapping[Any, torch.Tensor]] | None
    hook: dict[str, Any] = field(repr=False, compare=False, default_factory=dict)

    @property
    def has_other_weights(self) -> bool:
        """Whether somebody gave the hook another mapping since, as peft does when it merges."""
        return self.hook["weights_map"] is not self.weights

    def weights_now(self) -> Mapping[str, Any]:
        """What the hook looks weights up in now."""
        return self.hook["weights_map"] or {}

    def put_back(self) -> None:
        """Give the hook its mapping back."""
        self.hook["weights_map"] = self.weights


def offloads_of(module: torch.nn.Module) -> list[Offload]:
    """The hooks of this module that keep its weights, the one whose data a forward would use first."""
    offloads = [
        Offload(
            weights=hook.weights_map,
            covers_subtree=bool(hook.place_submodules),
            tied_names=frozenset(getattr(hook, "tied_params_names", ())),
            tied_memory=getattr(hook, "tied_params_map", None),
            hook=vars(hook),
        )
        for hook in hooks_of(module)
        if isinstance(hook, AlignDevicesHook) and hook.offload and hook.weights_map is not None
    ]
    # Every hook of a chain sets the weights before a forward, so the last one wins.
    return offloads[::-1]


def devices_to_run_on(module: torch.nn.Module) -> list[torch.device]:
    """Where the hooks of this module bring weights and inputs for a forward."""
    found = [hook.execution_device for hook in hooks_of(module) if isinstance(hook, AlignDevicesHook)]
    return [torch.device(device) for device in found if device is not None]


def without_ties(module: torch.nn.Module) -> list[Swap]:
    """The swaps after which no hook of this module takes a weight for the copy of another one by its address.

    The record is by addresses of memory that was freed since, and that other weights may get.
    """
    offloading = [hook for hook in hooks_of(module) if isinstance(hook, AlignDevicesHook) and hook.offload]
    return [
        Entry(vars(hook), key, vars(hook)[key], type(vars(hook)[key])())
        for hook in offloading
        for key in ("tied_params_map", "tied_params_names")
        if vars(hook).get(key)
    ]


def has_confused_ties(offload: Offload) -> bool:
    """Whether accelerate (1.14 and older) took the address 0 of meta tensors for a tie.

    Then every weight counts as tied to every other, and even live weights may be another module's.
    """
    return offload.tied_memory is not None and 0 in offload.tied_memory


def base_of(weights: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """The mapping below all prefixes, and the prefix that its keys carry for this hook."""
    prefix = ""
    while isinstance(weights, PrefixedDataset):
        prefix = weights.prefix + prefix
        weights = weights.dataset
    return weights, prefix


def find_kept(weights: Mapping[str, Any], key: str) -> Kept | None:
    """Where the data of `key` is, without reading it; `None` when this mapping has none."""
    base, prefix = base_of(weights)
    full = prefix + key
    if isinstance(base, OffloadedWeightsLoader):
        in_memory = _kept_in_memory(base.state_dict, full)
        return in_memory if in_memory is not None else _kept_on_disk(base, full)
    if isinstance(base, dict):
        return _kept_in_memory(base, full)
    return KeptElsewhere(base, full) if full in base else None


def keys_below(weights: Mapping[str, Any], start: str) -> list[str]:
    """The keys of this mapping that begin with `start`, without its prefix."""
    base, prefix = base_of(weights)
    full = prefix + start
    return [key[len(prefix) :] for key in base if key.startswith(full)]


def _kept_in_memory(table: Mapping[str, Any], key: str) -> KeptTensor | None:
    tensor = table.get(key)
    # A second dispatch copies the placeholders of the first one into its mapping.
    if not isinstance(tensor, torch.Tensor) or tensor.is_meta:
        return None
    return KeptTensor(tensor, table, key)


def _kept_on_disk(loader: OffloadedWeightsLoader, key: str) -> KeptInSafetensors | KeptInDat | None:
    entry = loader.index.get(key)
    if entry is None:
        return None
    dtype = _dtype_named(entry.get("dtype"))
    if entry.get("safetensors_file") is not None:
        return KeptInSafetensors(str(entry["safetensors_file"]), entry.get("weight_name", key), dtype, loader, key)
    return KeptInDat(f"{loader.save_folder}/{key}.dat", dtype, tuple(entry.get("shape", ())), loader, key)


def _dtype_named(name: str | None) -> torch.dtype | None:
    dtype = getattr(torch, name.removeprefix("torch."), None) if name else None
    return dtype if isinstance(dtype, torch.dtype) else None


class OpenedFolder(OffloadedWeightsLoader):  # type: ignore[misc]
    """A loader that we opened: no hook knows it, so nothing written into it would be found again."""


def open_folder(folder: Path) -> OpenedFolder:
    """A loader over a folder of ``.dat`` files that no hook remembers.

    Raises:
        ValueError: The folder's ``index.json`` cannot be read.
    """
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {folder / 'index.json'}: {error}") from error
    return OpenedFolder(save_folder=str(folder), index=index)


def place_for_writing(kept: Kept) -> tuple[MutableMapping[str, Any], str] | None:
    """The dictionary and key under which a changed tensor takes precedence over `kept`; `None` if there is none."""
    match kept:
        case KeptTensor(table=table, key=key) | KeptElsewhere(table=table, key=key):
            return (table, key) if isinstance(table, MutableMapping) else None
        case KeptInSafetensors(loader=loader, key=key) | KeptInDat(loader=loader, key=key):
            return None if isinstance(loader, OpenedFolder) else (loader.state_dict, key)


def unhooking(module: torch.nn.Module) -> list[Swap]:
    """The swaps that take accelerate's device hooks off this module and leave everything else as it is."""
    return [*_without_device_hooks(module), *_unblocked_movers(module), *_without_device_map(module)]


def _without_device_hooks(module: torch.nn.Module) -> list[Swap]:
    hooks = hooks_of(module)
    staying = [hook for hook in hooks if not places_tensors(hook)]
    if len(staying) == len(hooks):
        return []
    attributes = module.__dict__
    if staying:
        hook = staying[0] if len(staying) == 1 else SequentialHook(*staying)
        return [Entry(attributes, "_hf_hook", attributes["_hf_hook"], hook)]
    if "_old_forward" not in attributes:
        return [Entry(attributes, "_hf_hook", attributes["_hf_hook"], ABSENT)]
    old = attributes["_old_forward"]
    own = _is_of_class(old, module, "forward")
    swaps: list[Swap] = []
    if "GraphModuleImpl" in str(type(module)):
        # accelerate patches the class of a traced module, which belongs to this one instance.
        original = old.__func__ if isinstance(old, MethodType) else old
        swaps.append(ClassEntry(type(module), "forward", type(module).forward, original))
    elif "forward" in attributes and not is_hooked_forward(attributes["forward"]):
        # Someone patched the hooked forward. The patch still calls into the hook, so a hook that does nothing stays.
        return [Entry(attributes, "_hf_hook", attributes["_hf_hook"], ModelHook())]
    else:
        # The class's own forward must not stay on the instance: it would hide a later change of class.
        swaps.append(Entry(attributes, "forward", attributes.get("forward", ABSENT), ABSENT if own else old))
    swaps.append(Entry(attributes, "_old_forward", old, ABSENT))
    swaps.append(Entry(attributes, "_hf_hook", attributes["_hf_hook"], ABSENT))
    return swaps


def is_hooked_forward(forward: Any) -> bool:
    """Whether this is the partial that accelerate puts in place of a forward."""
    return _made_by(getattr(forward, "func", None), "hooks.py", "new_forward")


def _unblocked_movers(module: torch.nn.Module) -> list[Swap]:
    swaps: list[Swap] = []
    for name in _BLOCKED_MOVERS:
        mover = blocked = module.__dict__.get(name)
        # Dispatching twice wraps twice.
        while _made_by(mover, "big_modeling.py", "wrapper"):
            mover = getattr(mover, "__wrapped__", None)
        if mover is not blocked:
            # A deep copy's wrapper ends at the method of the original model, which would move the original.
            own = mover is None or _is_of_class(mover, module, name)
            swaps.append(Entry(module.__dict__, name, blocked, ABSENT if own else mover))
    return swaps


def _without_device_map(module: torch.nn.Module) -> list[Swap]:
    if "hf_device_map" not in module.__dict__:
        return []
    return [Entry(module.__dict__, "hf_device_map", module.__dict__["hf_device_map"], ABSENT)]


def _made_by(function: Any, file_name: str, name: str) -> bool:
    """Whether `function` is the inner function `name` of accelerate's `file_name`."""
    if not isinstance(function, FunctionType):
        return False
    code = function.__code__
    return code.co_name == name and code.co_filename.replace("\\", "/").endswith(f"/accelerate/{file_name}")


def _is_of_class(method: Any, module: torch.nn.Module, name: str) -> bool:
    """Whether `method` is what the class of `module` would answer for `name`, whatever instance it is bound to."""
    return isinstance(method, MethodType) and method.__func__ is getattr(type(module), name, None)
