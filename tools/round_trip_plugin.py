"""A pytest plugin that takes every model that accelerate dispatches on a round trip before the test goes on.

``-p round_trip_plugin --round-trips FILE``: after every call that offloads or places a model, and before every call
that takes the hooks off or reads through them, the model is materialized, compared with what it held and what
accelerate itself would load, moved, and restored; then the test's own assertions must hold as ever. `FILE` gets one
JSON line per call. What goes wrong fails the test, and is in the file too, in case the test expects an error there.
"""

from __future__ import annotations

import copy
import inspect
import json
import logging
import logging.handlers
import queue
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import accelerate.hooks
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, CpuOffload, SequentialHook
from wrapping import names_of, wrap_everywhere

from modelcache.dataplane.materialize.entry_points import is_dispatched, materialize_meta_tensors, restore_dispatch
from modelcache.errors import MaterializeMemoryError

_AFTER = {
    "accelerate.big_modeling": (
        "cpu_offload",
        "cpu_offload_with_hook",
        "disk_offload",
        "dispatch_model",
        "load_checkpoint_and_dispatch",
    ),
    "accelerate.hooks": (
        "add_hook_to_module",
        "attach_align_device_hook",
        "attach_align_device_hook_on_blocks",
        "attach_execution_device_hook",
    ),
}
_BEFORE = {
    "accelerate.hooks": ("remove_hook_from_module", "remove_hook_from_submodules"),
    "accelerate.utils.modeling": ("align_module_device", "get_state_dict_offloaded_model"),
}
# With one of these, the weights come from somewhere else than the model.
_OTHER_WEIGHTS = ("state_dict", "weights_map", "offload_index", "checkpoint")
_CAPACITY_BYTES = 1 << 30

Tensors = dict[str, torch.Tensor]


class RoundTripError(AssertionError):
    """A model was not whole, not the same, or not restored."""


@dataclass(slots=True)
class Trip:
    """One line of the report."""

    test: str
    function: str
    num_tensors: int = 0
    num_bytes: int = 0
    has_no_room: bool = False
    problem: str = ""


@dataclass(slots=True)
class Conductor:
    """Takes models on round trips, and remembers what it has done."""

    device: torch.device
    test: str = ""
    depth: int = 0
    trips: list[Trip] = field(default_factory=list)
    originals: dict[str, Any] = field(default_factory=dict)

    def after(self, function: Callable[..., Any], call: inspect.BoundArguments) -> Any:
        """Call a function that dispatches; then the trip."""
        model = next(iter(call.arguments.values()))
        is_outermost, truth, ties = self.depth == 0, {}, set()
        if is_outermost and not any(call.arguments.get(name) is not None for name in _OTHER_WEIGHTS):
            truth, ties = _clones(model), _ties(model)
        with self._inside():
            result = function(*call.args, **call.kwargs)
        if is_outermost:
            self._travel(function.__name__, model, truth, ties)
        return result

    def before(self, function: Callable[..., Any], call: inspect.BoundArguments) -> Any:
        """The trip; then call a function that looks at a dispatch or ends it."""
        if self.depth == 0:
            self._travel(function.__name__, next(iter(call.arguments.values())), {}, set())
        with self._inside():
            return function(*call.args, **call.kwargs)

    @contextmanager
    def _inside(self) -> Iterator[None]:
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1

    def _travel(self, name: str, model: torch.nn.Module, truth: Tensors, ties: set[frozenset[str]]) -> None:
        if not is_dispatched(model):
            return
        trip = Trip(self.test, name)
        self.trips.append(trip)
        with self._inside():
            try:
                round_trip(model, truth, ties, self.device, trip)
            except Exception as error:
                # Whatever it is, a test that expects an error of its own must not hide it.
                trip.problem = f"{type(error).__name__}: {error}"
                raise


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--round-trips", type=Path, help="where to write what was done")


_STACK = pytest.StashKey[ExitStack]()
_CONDUCTOR = pytest.StashKey[Conductor]()


def pytest_configure(config: pytest.Config) -> None:
    stack = config.stash[_STACK] = ExitStack()
    conductor = config.stash[_CONDUCTOR] = Conductor(_other_device(stack))
    for table, around in ((_AFTER, conductor.after), (_BEFORE, conductor.before)):
        for module, names in table.items():
            wrap_everywhere(module, names, around)


def _other_device(stack: ExitStack) -> torch.device:
    """A device with memory of its own: a GPU if there is one."""
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    from modelcache.dataplane.device.simulated import SimulatedDevice

    return stack.enter_context(closing(SimulatedDevice(_CAPACITY_BYTES, link_bytes_per_s=None))).torch_device


def pytest_collection_finish(session: pytest.Session) -> None:
    """A test module with an unwrapped function would be a test without round trips."""
    modules = {item.module for item in session.items if isinstance(item, pytest.Function)}
    for table in (_AFTER, _BEFORE):
        for name in (name for names in table.values() for name in names):
            wrapper = getattr(accelerate.hooks, name, None) or getattr(accelerate.big_modeling, name, None)
            original = getattr(wrapper, "__wrapped__", None)
            missed = [module.__name__ for module, _ in names_of(original) if original and module in modules]
            if missed:
                raise pytest.UsageError(f"{name} is not wrapped in {', '.join(missed)}")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> None:
    item.config.stash[_CONDUCTOR].test = item.nodeid


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[_STACK].close()
    if path := config.getoption("--round-trips"):
        lines = [json.dumps(asdict(trip)) + "\n" for trip in config.stash[_CONDUCTOR].trips]
        path.write_text("".join(lines), encoding="utf-8")


# --- the trip ---


def round_trip(
    model: torch.nn.Module, truth: Tensors, ties: set[frozenset[str]], device: torch.device, trip: Trip
) -> None:
    """Make a model whole three times, in three ways, and restore it each time.

    Args:
        model: The model, dispatched.
        truth: What it held before the dispatch, as far as known.
        ties: Which names were one tensor then.
        device: A device other than the CPU.
        trip: Gets the counts.

    Raises:
        RoundTripError: Something is not as it must be.
    """
    expected = _clones(model) | _as_accelerate_loads_it(model)
    placeholders = {name: tensor for name, tensor in _slots(model) if tensor.is_meta}
    for name, tensor in placeholders.items():
        _require(name in expected or name in truth, f"nobody knows what {name} should be")
        trip.num_bytes += tensor.nbytes
    trip.num_tensors = len(placeholders)
    agreed = truth | expected
    for name in truth.keys() & expected.keys():
        _require(_equal(truth[name], expected[name]), f"accelerate itself would not load {name} as it was")
    picture = _Picture.of(model)

    # At home: nothing but pointers may have changed in between.
    materialize_meta_tensors(model)
    _require_whole(model, agreed, ties, torch.device("cpu"))
    _require_copies_move(model, agreed)
    restore_dispatch(model, on_modified="error")
    picture.require_same(_Picture.of(model), allow_moved=False)

    # Moved about by torch, to another dtype and back.
    materialize_meta_tensors(model, copy="always")
    _require_whole(model, agreed, ties, torch.device("cpu"))
    _move_about(model, agreed)
    restore_dispatch(model, on_modified="error")
    picture.require_same(_Picture.of(model), allow_moved=True)

    # On another device, which a test may have filled.
    try:
        materialize_meta_tensors(model, device)
    except MaterializeMemoryError:
        trip.has_no_room = True
    else:
        _require_whole(model, agreed, ties, device)
        _require_values(copy.deepcopy(model).to("cpu"), agreed)
        restore_dispatch(model, on_modified="error")
    picture.require_same(_Picture.of(model), allow_moved=True)
    _require_values(model, _live_only(agreed, model))


def _require(is_so: bool, problem: str) -> None:
    if not is_so:
        raise RoundTripError(problem)


def _slots(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and buffer under every name it has."""
    for path, module in model.named_modules(remove_duplicate=False):
        for table in (module._parameters, module._buffers):
            for key, tensor in table.items():
                if tensor is not None:
                    yield f"{path}.{key}" if path else key, tensor


def _clones(model: torch.nn.Module) -> Tensors:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in _slots(model) if not tensor.is_meta}


def _live_only(tensors: Tensors, model: torch.nn.Module) -> Tensors:
    return {name: tensors[name] for name, tensor in _slots(model) if not tensor.is_meta}


def _ties(model: torch.nn.Module) -> set[frozenset[str]]:
    names: dict[int, set[str]] = {}
    for name, tensor in _slots(model):
        names.setdefault(id(tensor), set()).add(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}


def _as_accelerate_loads_it(model: torch.nn.Module) -> Tensors:
    """What a forward would put in the place of each placeholder, read by accelerate's own code."""
    loaded: Tensors = {}
    by_name = dict(_slots(model))
    for path, module in model.named_modules(remove_duplicate=False):
        for hook in _hooks(vars(module).get("_hf_hook")):
            if not isinstance(hook, AlignDevicesHook) or not hook.offload:
                continue
            inner = module.named_modules(remove_duplicate=False) if hook.place_submodules else [("", module)]
            for local in (_join(below, key) for below, one in inner for key in [*one._parameters, *one._buffers]):
                name = _join(path, local)
                if name in by_name and by_name[name].is_meta and local in hook.weights_map:
                    loaded[name] = hook.weights_map[local].detach().to("cpu", by_name[name].dtype, copy=True)
    return loaded


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _hooks(hook: Any) -> Iterator[Any]:
    if isinstance(hook, SequentialHook):
        for one in hook.hooks:
            yield from _hooks(one)
    elif hook is not None:
        yield hook


def _require_whole(model: torch.nn.Module, expected: Tensors, ties: set[frozenset[str]], device: torch.device) -> None:
    for name, tensor in _slots(model):
        _require(tensor.device == device, f"{name} is on {tensor.device} and not on {device}")
    for path, module in model.named_modules():
        attributes = vars(module)
        hooks = list(_hooks(attributes.get("_hf_hook")))
        _require(
            not any(isinstance(hook, AlignDevicesHook | CpuOffload) for hook in hooks), f"a hook is left on {path!r}"
        )
        _require("hf_device_map" not in attributes, f"a device map is left on {path!r}")
        _require(bool(hooks) or "_old_forward" not in attributes, f"a wrapped forward is left on {path!r}")
    _require_values(model, expected)
    _require(
        ties <= _ties(model), f"ties were {sorted(map(sorted, ties))}, and are {sorted(map(sorted, _ties(model)))}"
    )


def _require_values(model: torch.nn.Module, expected: Mapping[str, torch.Tensor]) -> None:
    found = dict(_slots(model))
    for name, tensor in expected.items():
        _require(name in found, f"{name} is gone")
        _require(_equal(found[name], tensor), f"{name} is not what it was")


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    bits = [tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return torch.equal(*bits)


def _require_copies_move(model: torch.nn.Module, expected: Tensors) -> None:
    """A deep copy moves by itself and leaves the model where it is."""
    with _silence():
        twin = copy.deepcopy(model).to(torch.float64)
    for name, tensor in _slots(twin):
        _require(not tensor.is_floating_point() or tensor.dtype == torch.float64, f"{name} of a copy did not move")
        _require(torch.equal(tensor, expected[name].to(tensor.dtype)), f"{name} of a moved copy is not what it was")
    _require_values(model, expected)


def _move_about(model: torch.nn.Module, expected: Tensors) -> None:
    """Everything that a dispatched model refuses or warns about."""
    with _silence():
        model.to("cpu")
        model.cpu()
        model.to(torch.device("cpu"))
        _require_values(model, expected)
        dtypes = {tensor.dtype for tensor in expected.values() if tensor.is_floating_point()}
        if len(dtypes) == 1:
            model.to(torch.float64)
            wide = {tensor.dtype for _, tensor in _slots(model) if tensor.is_floating_point()}
            _require(wide == {torch.float64}, f"the model did not become float64, but {wide}")
            model.to(dtypes.pop())
    _require_values(model, expected)


@contextmanager
def _silence() -> Iterator[None]:
    """What is moved must move without a warning."""
    said: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    handler = logging.handlers.QueueHandler(said)
    handler.setLevel(logging.WARNING)
    logger = logging.getLogger("accelerate")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    finally:
        logger.removeHandler(handler)
    _require(said.empty(), "moving the model was warned about")


@dataclass(frozen=True, slots=True)
class _Picture:
    """Every object that hangs on a model, kept alive so that no other can take its place unseen."""

    attributes: dict[str, dict[str, Any]]
    forwards: dict[str, Any]
    tensors: dict[str, tuple[torch.Tensor, torch.device, torch.dtype]]

    @classmethod
    def of(cls, model: torch.nn.Module) -> _Picture:
        modules = dict(model.named_modules(remove_duplicate=False))
        return cls(
            {path: dict(vars(module)) for path, module in modules.items()},
            {path: type(module).forward for path, module in modules.items()},
            {name: (tensor, tensor.device, tensor.dtype) for name, tensor in _slots(model)},
        )

    def require_same(self, other: _Picture, *, allow_moved: bool) -> None:
        for path, attributes in self.attributes.items():
            now = other.attributes[path]
            changed = {key for key in attributes.keys() | now.keys() if attributes.get(key) is not now.get(key)}
            _require(not changed, f"{sorted(changed)} of {path!r} did not come back")
            _require(self.forwards[path] is other.forwards[path], f"the class of {path!r} has another forward")
        _require(self.tensors.keys() == other.tensors.keys(), "tensors came or went")
        for name, (tensor, *kind) in self.tensors.items():
            now_tensor, *now_kind = other.tensors[name]
            _require(kind == now_kind, f"{name} did not come back as {kind}, but as {now_kind}")
            # torch makes new buffers when it moves them.
            may_be_new = allow_moved and not tensor.is_meta and not isinstance(tensor, torch.nn.Parameter)
            _require(tensor is now_tensor or may_be_new, f"{name} came back as another object")
