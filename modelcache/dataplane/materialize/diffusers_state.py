"""What diffusers wrote on a model: the groups that carry its weights, where their data is, and how to take them off.

The one module that reads diffusers' undocumented attributes. It reads; the writes it proposes are swaps for the caller
to make. A group never replaces its tensors, only their memory. While a group is away in a file, its tensors lie on the
CPU in the right shape and hold whatever was there before: nothing about them tells that they are not the weights.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

import torch

from modelcache.dataplane.files.reading import read_tensor
from modelcache.dataplane.files.weight_files import FileBytes, FileProblemError, Headers
from modelcache.dataplane.materialize.journal import ABSENT, Entry, Swap

_GROUP_HOOK = "group_offloading"
# With streams two more are there: one finds the order of the groups in the first forward, the other reports to it.
_HOOKS = frozenset({_GROUP_HOOK, "layer_execution_tracker", "lazy_prefetch_group_offloading"})

_OF_REGISTRY = ("hooks", "_hook_order", "_fn_refs")
_OF_GROUP = ("modules", "parameters", "buffers", "offload_device", "cpu_param_dict", "offload_to_disk_path", "stream")
_OF_FILE = ("safetensors_file_path", "key_to_tensor", "_is_offloaded_to_disk")


@dataclass(frozen=True, slots=True)
class Carried:
    """One tensor that a group carries between devices.

    Attributes:
        group: diffusers' own object.
        tensor: The object whose memory the group replaces. It must come back with the group.
        path: The file that has the data; empty while the data is in the tensor.
        key: The name of the tensor in that file.
    """

    group: Any
    tensor: torch.Tensor
    path: str = ""
    key: str = ""


def offloads_groups(module: torch.nn.Module) -> bool:
    """Whether a hook on this very module belongs to group offloading."""
    return not _HOOKS.isdisjoint(_hooks_of(module))


def _hooks_of(module: torch.nn.Module) -> Mapping[str, Any]:
    # `getattr` on the module would also find the registry inside a compiled module's original.
    hooks = getattr(module.__dict__.get("_diffusers_hook"), "hooks", None)
    return hooks if isinstance(hooks, dict) else {}


def problem_of(module: torch.nn.Module) -> str | None:
    """Why the groups of this module cannot be taken off, in words; `None` when they can or there are none."""
    if not offloads_groups(module):
        return None
    registry = module.__dict__["_diffusers_hook"]
    group = _group_of(module)
    wanted = [(registry, _OF_REGISTRY), (group, _OF_GROUP)]
    if getattr(group, "offload_to_disk_path", None) is not None:
        wanted.append((group, _OF_FILE))
    missing = [name for owner, names in wanted if owner is not None for name in names if not hasattr(owner, name)]
    if missing:
        return f"is group offloaded by a diffusers that we do not know (no {missing[0]!r}); disable it first"
    return None


def _group_of(module: torch.nn.Module) -> Any:
    return getattr(_hooks_of(module).get(_GROUP_HOOK), "group", None)


def carried_by(module: torch.nn.Module) -> list[Carried]:
    """Every tensor that the group of this module carries."""
    group = _group_of(module)
    if group is None:
        return []
    if group.offload_to_disk_path is not None and group._is_offloaded_to_disk:
        return [Carried(group, t, group.safetensors_file_path, key) for key, t in group.key_to_tensor.items()]
    tensors = [t for child in group.modules for t in (*child.parameters(), *child.buffers())]
    return [Carried(group, t) for t in dict.fromkeys([*tensors, *group.parameters, *group.buffers])]


class Groups:
    """The groups of a whole model: which tensor is carried, and by whom."""

    def __init__(self, modules: Iterable[torch.nn.Module] = ()) -> None:
        self._of_tensor: dict[int, list[Carried]] = {}
        self._in_file: dict[tuple[str, str], set[int]] = {}
        seen: set[int] = set()
        for module in modules:
            group = _group_of(module)
            if group is None or id(group) in seen:
                continue
            seen.add(id(group))
            for carried in carried_by(module):
                self._of_tensor.setdefault(id(carried.tensor), []).append(carried)
                if carried.path:
                    self._in_file.setdefault((carried.path, carried.key), set()).add(id(carried.tensor))

    def carriers(self, tensor: torch.Tensor) -> tuple[Carried, ...]:
        """Who carries this very object: nobody, a group, or several for a tied tensor."""
        return tuple(self._of_tensor.get(id(tensor), ()))

    def locate(self, tensor: torch.Tensor, headers: Headers) -> FileBytes | None:
        """Where the data of a tensor is; `None` when no group took it out of the tensor.

        Raises:
            FileProblemError: Its file cannot give it, or is not to be trusted.
        """
        away = [carried for carried in self.carriers(tensor) if carried.path]
        places = [headers.find(carried.path, carried.key, None) for carried in away]
        if not places:
            return None
        for carried, place in zip(away, places, strict=True):
            if len(self._in_file[carried.path, carried.key]) > 1:
                raise FileProblemError(
                    f"{carried.path} stands for the weights of several modules, but has those of only one: diffusers "
                    "names files by module path, so each model needs a folder of its own"
                )
            if place.shape != tuple(tensor.shape):
                raise FileProblemError(
                    f"{carried.path} has {carried.key!r} in shape {place.shape}, the model wants "
                    f"{tuple(tensor.shape)}: it was written by another model"
                )
        if len(places) > 1 and len({_content(place) for place in places}) > 1:
            # diffusers writes the tensor for one group, empties it, and then writes it again for the next.
            raise FileProblemError(
                f"{places[0].path} and {places[1].path} have two versions of this tied tensor; offload the model to "
                "disk in groups that hold both its places, or not to disk"
            )
        return places[0]


def _content(place: FileBytes) -> bytes:
    return read_tensor(place).view(-1).view(torch.uint8).numpy().tobytes()


def unhooking(module: torch.nn.Module) -> list[Swap]:
    """The swaps that take group offloading off this module. Its other diffusers hooks stay, in their order."""
    if not offloads_groups(module):
        return []
    registry = module.__dict__["_diffusers_hook"]
    order, references = list(registry._hook_order), list(registry._fn_refs)
    stays = [name not in _HOOKS for name in order]
    swaps = _rewired(module, references, stays)
    hooks = {name: hook for name, hook in registry.hooks.items() if name not in _HOOKS}
    swaps.append(Entry(vars(registry), "hooks", registry.hooks, hooks))
    for key, values in (("_hook_order", order), ("_fn_refs", references)):
        left = [value for value, stay in zip(values, stays, strict=True) if stay]
        swaps.append(Entry(vars(registry), key, getattr(registry, key), left))
    # The registry itself stays even when it is empty, as it does when diffusers removes a hook: others refer to it.
    return swaps


def _rewired(module: torch.nn.Module, references: list[Any], stays: list[bool]) -> list[Swap]:
    """Each wrapper calls the next one inside that stays; the module gets the outermost."""
    attributes = module.__dict__
    if not _is_hooked_forward(attributes.get("forward")):
        # Someone wrapped the outermost wrapper, so the chain must stay as it is. What leaves does nothing in it.
        return [
            swap
            for reference, stay in zip(references, stays, strict=True)
            if not stay
            for swap in (
                Entry(vars(reference), "pre_forward", reference.pre_forward, _pass_inputs),
                Entry(vars(reference), "post_forward", reference.post_forward, _pass_output),
            )
        ]
    swaps: list[Swap] = []
    wrappers = [*(_inside(reference)[1] for reference in references[1:]), attributes["forward"]]
    _, current = _inside(references[0])
    for reference, wrapper, stay in zip(references, wrappers, stays, strict=True):
        if not stay:
            continue
        key, inside = _inside(reference)
        if inside is not current:
            swaps.append(Entry(vars(reference), key, inside, current))
        current = wrapper
    # The class's own forward must not stay on the instance: it would hide a later change of class.
    own = isinstance(current, MethodType) and current.__func__ is type(module).forward
    swaps.append(Entry(attributes, "forward", attributes["forward"], ABSENT if own else current))
    return swaps


def _inside(reference: Any) -> tuple[str, Any]:
    """What a wrapper calls, and where that is written: a hook with a forward of its own remembers the one below."""
    key = "forward" if reference.original_forward is None else "original_forward"
    return key, getattr(reference, key)


def _is_hooked_forward(forward: Any) -> bool:
    """Whether this is the partial that diffusers puts in place of a forward."""
    function = forward.func if isinstance(forward, functools.partial) else None
    if not isinstance(function, FunctionType):
        return False
    code = function.__code__
    return code.co_name == "new_forward" and code.co_filename.replace("\\", "/").endswith("/diffusers/hooks/hooks.py")


def _pass_inputs(_module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs


def _pass_output(_module: torch.nn.Module, output: Any) -> Any:
    return output


@dataclass(frozen=True, slots=True)
class LeftHooks:
    """The hooks that were left on a module, to see later whether they are still the same."""

    registry: Any
    names: tuple[str, ...]

    @property
    def are_unchanged(self) -> bool:
        """Whether no hook was added or removed since."""
        return tuple(self.registry.hooks) == tuple(self.registry._hook_order) == self.names


def left_hooks(module: torch.nn.Module) -> LeftHooks | None:
    """What `unhooking` leaves on this module; `None` when it has nothing to do there."""
    if not offloads_groups(module):
        return None
    registry = module.__dict__["_diffusers_hook"]
    return LeftHooks(registry, tuple(name for name in registry.hooks if name not in _HOOKS))


def home_of(group: Any) -> torch.device:
    """Where the group's tensors are between forwards."""
    return torch.device(group.offload_device)


def copy_of(group: Any, tensor: torch.Tensor) -> torch.Tensor | None:
    """The copy in RAM that a group with a stream goes back to after each forward; `None` when it has none."""
    copy = group.cpu_param_dict.get(tensor)
    return copy if isinstance(copy, torch.Tensor) else None


def knows_by_object(group: Any, tensor: torch.Tensor) -> bool:
    """Whether the group would miss a change of this very object, for it does not ask a module for its tensors."""
    return any(tensor is known for known in (*group.parameters, *group.buffers, *group.cpu_param_dict))


def has_stream(group: Any) -> bool:
    """Whether the group copies on a stream of its own, for which it keeps the data in RAM twice."""
    return group.stream is not None


def for_stream(group: Any, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as a group with a stream keeps it in RAM: page-locked, unless it was told to save memory."""
    return group._to_cpu(tensor.detach(), group.low_cpu_mem_usage)  # type: ignore[no-any-return]


def kept_in_ram(group: Any) -> list[Swap]:
    """The swaps after which a group takes what its tensors hold as the data, and never its file."""
    return [Entry(vars(group), "offload_to_disk_path", group.offload_to_disk_path, None)]


def with_copies(group: Any, copies: Mapping[torch.Tensor, torch.Tensor]) -> list[Swap]:
    """The swaps after which a group with a stream goes back to these copies."""
    known = group.cpu_param_dict
    return [Entry(vars(group), "cpu_param_dict", known, {**known, **copies})] if copies else []
