"""Make a dispatched model whole: every meta tensor real, accelerate's hooks off, `.to()` working again.

Three phases, and only the last one writes. *Plan* finds where the data of every placeholder is. *Stage* makes every new
tensor beside the model. *Commit* swaps pointers, all of them or none. Whatever fails before, Ctrl-C included, leaves
the model as it was.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeVar
from weakref import WeakKeyDictionary

import torch

from modelcache.dataplane.materialize import accelerate_state as state
from modelcache.dataplane.materialize import diffusers_state
from modelcache.dataplane.materialize.journal import ABSENT, Entry, Swap, swap_all
from modelcache.dataplane.materialize.plan import Plan, Unit, make_plan, open_extra
from modelcache.dataplane.materialize.record import refuse_other_weights
from modelcache.dataplane.materialize.report import MaterializePlan, as_report
from modelcache.dataplane.materialize.restore import ATTRIBUTE, OnModified, put_back, take_snapshot
from modelcache.dataplane.materialize.slots import find_places, unwrapped
from modelcache.dataplane.materialize.stage import Staged, Stager, needed_bytes
from modelcache.dataplane.materialize.ties import TiedNames, collect_claims, unite
from modelcache.dataplane.probe.ram import RamProbe
from modelcache.dataplane.process_lock import process_lock
from modelcache.errors import MaterializeError, MaterializeMemoryError

ModelT = TypeVar("ModelT")
CopyMode = Literal["auto", "always"]
ProgressReport = Callable[[int, int, str], None]

# Not all of what is free is to be had: allocators round, and the process itself grows a little.
_MARGIN_FRACTION = 64


def materialize_meta_tensors(
    model: ModelT,
    target_device: torch.device | str | int = "cpu",
    *,
    keep_dispatch: bool = True,
    copy: CopyMode = "auto",
    extra_sources: Any = None,
    tied_params: TiedNames | None = None,
    check_memory: bool = True,
    num_workers: int = 4,
    progress: ProgressReport | None = None,
) -> ModelT:
    """Replace every meta tensor of a dispatched model by its data and take accelerate's hooks off.

    Afterwards the model has no meta tensor and no device hook, all of it is on `target_device`, and `.to()`, `.cpu()`,
    `.cuda()` and changes of dtype work. Ties, dtypes, strides, classes, ``requires_grad``, live buffers, hooks of
    others and your own patches are kept. It needs room for the whole model on the target; what the dispatch keeps in
    RAM is used where it is. A model that was not dispatched is only moved.

    Args:
        model: A module, or a pipeline whose modules are all made whole.
        target_device: Where everything shall be.
        keep_dispatch: Remember the dispatch, so that `restore_dispatch` can put it back. The dispatch's own data stays
            in RAM with it.
        copy: ``"auto"`` shares the memory in which the dispatch keeps weights in RAM; ``"always"`` gives the model
            memory of its own.
        extra_sources: Where else data may be, by full tensor name: folders of ``.dat`` or safetensors files, mappings,
            or a list of these. For weights that no hook knows of, or whose file is not to be had where the hook says.
        tied_params: Groups of full names that are one tensor each, for ties that nothing else recorded.
        check_memory: Refuse when the target has no room, before anything is read.
        num_workers: Threads that read files.
        progress: Called in this thread after each tensor with the bytes done, the bytes in all and the tensor's name.
            What it raises ends the work and leaves the model as it was.

    Returns:
        The same object.

    Raises:
        MaterializeError: Data is missing or damaged, or is no longer what `modelcache.dispatch_model` recorded, or the
            model is kept by a library that we do not know; ``.names`` has the tensors. The model is as it was and
            works as before.
        MaterializeMemoryError: There is no room; nothing was read.
        ValueError: An argument makes no sense.
    """
    if copy not in ("auto", "always"):
        raise ValueError(f"copy must be 'auto' or 'always', not {copy!r}")
    if num_workers < 1:
        raise ValueError(f"num_workers must be at least 1, not {num_workers}")
    target = _resolved(target_device)
    extra = open_extra(extra_sources)
    always_copy = copy == "always"
    with _turn_of(model):
        plan = planned(model, extra)
        claims = collect_claims(plan, tied_params)
        if check_memory:
            _check_memory(needed_bytes(plan, target, always_copy=always_copy), target)
        staged = Stager(plan, target, always_copy=always_copy, num_workers=num_workers).run(progress)
        refuse_other_weights(plan, staged)
        stands_for = unite(claims, staged)
        _commit(model, plan, staged, stands_for, target, keep_dispatch=keep_dispatch)
    return model


def is_dispatched(model: object) -> bool:
    """Whether a tensor of the model is on ``meta``, or a hook of accelerate or diffusers moves weights or inputs.

    Raises:
        TypeError: The object holds no modules that we know how to find.
    """
    for module in (found for root in _components(model).values() for found in root.modules()):
        if diffusers_state.offloads_groups(module) or any(map(state.places_tensors, state.hooks_of(module))):
            return True
        tensors = [*module._parameters.values(), *module._buffers.values()]
        if any(tensor is not None and tensor.is_meta for tensor in tensors):
            return True
    return False


def plan_materialize(
    model: object,
    target_device: torch.device | str | int = "cpu",
    *,
    copy: CopyMode = "auto",
    extra_sources: Any = None,
    tied_params: TiedNames | None = None,
) -> MaterializePlan:
    """A dry run of `materialize_meta_tensors`: nothing is read but headers, nothing is changed.

    Args:
        model: As there.
        target_device: As there.
        copy: As there.
        extra_sources: As there.
        tied_params: As there.

    Raises:
        MaterializeError: The model is kept by a library that we do not know.
    """
    target = _resolved(target_device)
    plan = make_plan(find_places(_components(model)), open_extra(extra_sources))
    needed = needed_bytes(plan, target, always_copy=copy == "always")
    return as_report(plan, collect_claims(plan, tied_params), needed, target)


def restore_dispatch(model: ModelT, *, on_modified: OnModified = "write") -> ModelT:
    """Put a materialized model back into the dispatch it came with.

    Args:
        model: What was given to `materialize_meta_tensors`.
        on_modified: For weights that the dispatch keeps off the device and that changed since: ``"write"`` makes the
            dispatch use the changed ones (kept in RAM, no file is written), ``"error"`` refuses, ``"discard"`` goes
            back to the stored ones. Weights in memory shared with the dispatch (``copy="auto"``) are changed there
            already, and ``"discard"`` cannot take that back; neither can it for weights that the dispatch has on the
            device, which are moved back as they are. Gradients of weights kept off the device are dropped.

    Returns:
        The same object.

    Raises:
        MaterializeError: There is no dispatch to restore, or it cannot be restored; the model is as it was.
        ValueError: `on_modified` is none of the three.
    """
    _require_known(on_modified)
    with _turn_of(model):
        attributes = _memory_of(model)
        snapshot = attributes.get(ATTRIBUTE)
        if snapshot is None:
            why = (
                "it is dispatched as it is"
                if is_dispatched(model)
                else "it was not materialized, or with keep_dispatch=False, or is a copy of a model that was"
            )
            raise MaterializeError((), f"this model has no dispatch to restore: {why}")
        put_back(snapshot, _components(model), attributes, on_modified)
    return model


@contextmanager
def materialized(
    model: ModelT,
    target_device: torch.device | str | int = "cpu",
    *,
    on_modified: OnModified = "write",
    **options: Any,
) -> Iterator[ModelT]:
    """A model made whole for the length of a block; its dispatch comes back after it, also after an exception.

    Args:
        model: A module or pipeline. One that is not dispatched stays as it is after the block.
        target_device: As for `materialize_meta_tensors`.
        on_modified: As for `restore_dispatch`.
        **options: Further arguments of `materialize_meta_tensors`, but not `keep_dispatch`.
    """
    _require_known(on_modified)
    turn = _turn_for(model)
    with turn.table:
        was_dispatched = is_dispatched(model)
        materialize_meta_tensors(model, target_device, keep_dispatch=True, **options)
        turn.num_blocks += 1
        turn.has_dispatch |= was_dispatched
    try:
        yield model
    finally:
        with turn.table:
            turn.num_blocks -= 1
            # Blocks of several threads, or one inside the other: the last one to end puts the dispatch back.
            if not turn.num_blocks and turn.has_dispatch:
                turn.has_dispatch = False
                restore_dispatch(model, on_modified=on_modified)


def _require_known(on_modified: str) -> None:
    if on_modified not in ("write", "error", "discard"):
        raise ValueError(f"on_modified must be 'write', 'error' or 'discard', not {on_modified!r}")


def _require_nobodys(model: object) -> None:
    """A model in a cache is moved by the cache, which counts its bytes.

    Raises:
        MaterializeError: It is in one; the text names it.
    """
    from modelcache.dataplane.guard import ResidencyGuard
    from modelcache.dataplane.loading.adapters import handle_in

    hooks = [hook for module in _components(model).values() for hook in module._forward_pre_hooks.values()]
    guards = [hook for hook in hooks if isinstance(hook, ResidencyGuard)]
    owner = next((guard.name for guard in guards if guard.name and not guard.gone), None)
    if owner is None and handle_in(model) is None:
        return
    name = repr(owner or "name")
    raise MaterializeError(
        (),
        f"this model is in a cache, as {name}, which moves it and counts its bytes: it is whole whenever it is parked; "
        f"call cache.park({name}) to free the device",
    )


def _components(model: object) -> dict[str, torch.nn.Module]:
    if isinstance(model, torch.nn.Module):
        return {"": model}
    from modelcache.dataplane.loading.adapters import modules_of

    return modules_of(model)


def _first_module(model: object) -> torch.nn.Module:
    """The module that stands for the object: a compiled module and its original are one model."""
    return unwrapped(next(iter(_components(model).values())))


def _memory_of(model: object) -> dict[str, Any]:
    """Where the dispatch is remembered: the attributes of the object, or of its first module if it can have none."""
    owner = model if hasattr(model, "__dict__") and not isinstance(model, torch.nn.Module) else _first_module(model)
    return vars(owner)


def _resolved(target_device: torch.device | str | int) -> torch.device:
    try:
        target = torch.device(target_device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"target_device must be a device such as 'cpu' or 'cuda:0', not {target_device!r}") from error
    if target.type == "meta":
        raise ValueError("target_device must be a device that holds data, not 'meta'")
    if target.type == "cpu":
        return torch.device("cpu")
    try:
        # "cuda" means the current card, and only a tensor tells which that is.
        return torch.empty_strided((0,), (1,), device=target).device
    except (RuntimeError, AssertionError) as error:  # a torch that was built without a backend asserts
        reason = str(error).partition("\n")[0]
        raise ValueError(f"target_device {str(target)!r} cannot be used here: {reason}") from error


def planned(model: object, extra: list[Mapping[str, Any]]) -> Plan:
    """The plan for a model of which every tensor can be had.

    Raises:
        MaterializeError: Some cannot; ``.names`` has them.
    """
    plan = make_plan(find_places(_components(model)), extra)
    if plan.problems:
        names = tuple(plan.problems)
        raise MaterializeError(names, next(iter(plan.problems.values())))
    if plan.missing:
        raise MaterializeError(
            tuple(plan.missing),
            "no data is known for these meta tensors; they were never loaded, or were added after the dispatch. Pass "
            "extra_sources= if it is in a folder or mapping",
        )
    return plan


def _check_memory(needed: Mapping[Unit, int], target: torch.device) -> None:
    total_bytes = sum(needed.values())
    free_bytes = available_bytes(target) if total_bytes else None
    if free_bytes is None:
        return
    usable_bytes = free_bytes - free_bytes // _MARGIN_FRACTION
    if total_bytes > usable_bytes:
        raise MaterializeMemoryError(tuple(unit.name for unit in needed), total_bytes, usable_bytes, str(target))


def available_bytes(device: torch.device) -> int | None:
    """What can be allocated on a device now; `None` when nobody can tell."""
    if device.type == "cpu":
        return RamProbe().read().free_bytes
    if device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(device)
        return free_bytes + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    measure = getattr(getattr(torch, device.type, None), "mem_get_info", None)
    return None if measure is None else int(measure(device)[0])


def _commit(
    model: object,
    plan: Plan,
    staged: Staged,
    stands_for: Mapping[Unit, Unit],
    target: torch.device,
    *,
    keep_dispatch: bool,
) -> None:
    swaps: list[Swap] = []
    for unit in plan.units():
        tensor = staged.tensors[stands_for.get(unit, unit)]
        swaps += [Entry(slot.table, slot.key, slot.tensor, tensor) for slot in unit.slots if slot.tensor is not tensor]
    swaps += [memory for unit, memory in staged.memory.items() if unit not in stands_for]
    swaps += staged.swaps
    hooks = [swap for module in plan.places.modules for swap in state.unhooking(module)]
    hooks += [swap for module in plan.places.modules for swap in diffusers_state.unhooking(module)]
    others = of_pipeline(model, target)
    attributes = _memory_of(model)
    known = attributes.get(ATTRIBUTE, ABSENT)
    if not keep_dispatch:
        kept: Any = ABSENT
    elif plan.loads or hooks:
        kept = take_snapshot(plan, staged, stands_for, hooks, others)
    else:
        # Only moved: what an earlier call took off is still what can be put back.
        kept = known
    memory = [] if kept is known else [Entry(attributes, ATTRIBUTE, known, kept)]
    swap_all([*swaps, *hooks, *others, *memory], check=lambda: _assert_whole(model))


def of_pipeline(model: object, target: torch.device) -> list[Swap]:
    """A pipeline's own memory of its offloading, which would bring the hooks back at the end of its next call."""
    if isinstance(model, torch.nn.Module):
        return []
    from modelcache.dataplane.loading.adapters import remember

    attributes = getattr(model, "__dict__", {})
    swaps: list[Swap] = [
        Entry(attributes, key, attributes[key], ABSENT)
        for key in ("hf_device_map", "_offload_device")
        if key in attributes
    ]
    if attributes.get("_all_hooks"):
        swaps.append(Entry(attributes, "_all_hooks", attributes["_all_hooks"], []))
    swaps += [
        Entry(attributes, key, value, target if isinstance(value, torch.device) else str(target))
        for owner, key, value in remember(model).stored
        if owner is model and key in attributes
    ]
    return swaps


def _assert_whole(model: object) -> None:
    """The last look before a commit stands; a bug of ours must not hand out a model that is half made."""
    if is_dispatched(model):
        raise MaterializeError((), "the model was not whole after all its tensors were put in; please report this")


class _Turn:
    """Whose turn it is with one model.

    Another thread waits; the same thread, from a progress report, is refused, or it would wait for itself.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.thread: int | None = None
        self.table = threading.RLock()  # for the blocks; taken before `lock`
        self.num_blocks, self.has_dispatch = 0, False


_turns: WeakKeyDictionary[torch.nn.Module, _Turn] = WeakKeyDictionary()
# Guards the table only; taken before a turn's own lock and released before it is held.
_turns_lock = process_lock()


def _turn_for(model: object) -> _Turn:
    with _turns_lock:
        return _turns.setdefault(_first_module(model), _Turn())


@contextmanager
def _turn_of(model: object) -> Iterator[None]:
    _require_nobodys(model)
    turn = _turn_for(model)
    if turn.thread == threading.get_ident():
        raise MaterializeError((), "this model is being materialized or restored by this very thread already")
    with turn.lock:
        turn.thread = threading.get_ident()
        try:
            yield
        finally:
            turn.thread = None
