"""ModelHandle: what `ModelCache.get` returns, a transparent proxy that holds a lease while the model is used.

Covers calls, methods, ``with`` blocks and what is refused. Results that keep the lease are in `carrying`, where tensors
go and may not go in `placement`. Imports no torch.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from functools import partial
from threading import current_thread, get_ident
from types import MethodType, TracebackType
from typing import Any, NoReturn, Protocol, TypeVar

import wrapt

from modelcache.carrying import settle
from modelcache.errors import LeaseClosedError, ModelCacheError, ModelNotResidentError
from modelcache.lease import AskedLease, FirstUseLease, Lease, current_holder, running_loop
from modelcache.placement import PLACERS, check_placement, move_inputs

T = TypeVar("T")

#: `super().__init__` without looking it up on each `get`.
_wrap = wrapt.ObjectProxy.__init__

#: Methods that read weights wherever these are: they take no lease and move nothing, unless the model is on disk, with
#: nothing to read.
READS_WEIGHTS = (  # noqa: SIM905 (as below)
    "parameters named_parameters buffers named_buffers state_dict get_parameter get_buffer num_parameters "
    "get_memory_footprint print_trainable_parameters get_nb_trainable_parameters"
).split()
#: Methods that describe a model or change its settings: they take no lease and move nothing.
LEASELESS = (  # noqa: SIM905 (one name a line would be fifty lines of no news)
    "children named_children modules named_modules eval train requires_grad_ zero_grad extra_repr get_submodule "
    "get_extra_state add_module "
    "register_module register_buffer register_parameter register_forward_hook register_forward_pre_hook "
    "register_full_backward_hook register_full_backward_pre_hook register_backward_hook register_state_dict_pre_hook "
    "register_state_dict_post_hook register_load_state_dict_pre_hook register_load_state_dict_post_hook set_submodule "
    "compile can_generate get_input_embeddings get_output_embeddings "
    "gradient_checkpointing_enable gradient_checkpointing_disable get_sentence_embedding_dimension "
    "get_embedding_dimension get_max_seq_length set_progress_bar_config"
).split()
#: Methods whose tensor arguments are weights, read from where they are.
TAKES_WEIGHTS = ("load_state_dict", "set_extra_state", "load_adapter", "load_lora_weights")


class Door(Protocol):
    """What a handle asks of the cache it came from."""

    def acquire(self, name: str, *, early: bool = False) -> Lease:
        """A lease on the usable model; blocks until it is had. A hit must be cheap: every call comes through here.

        `early`: for one call of the model, inside of `call`, which waits for weights that are still on their way.
        """

    def settle(self, name: str) -> None:
        """Wait until weights that are on their way are there; moves nothing."""

    def call(self, name: str) -> AbstractContextManager[None]:
        """Around a call under a lease that had to be asked for."""

    def object_of(self, name: str) -> object:
        """The object the loader built; the same one for the whole life of the registration."""

    def has_weights(self, name: str, model: object) -> bool:
        """Whether `model` is still the one of that name and its weights can be read where they are, without a lease."""

    def execution_device(self, name: str) -> object:
        """The `torch.device` that calls run on, whether the weights are there now or not."""

    def state_of(self, name: str) -> str:
        """Where the best copy is and what it takes there, such as ``"vram 22.1 GiB"``. Never a use."""

    def is_ready(self, name: str) -> bool:
        """A lease would be had at once."""


class _Tie:
    """What a handle knows itself. One object, because to read an attribute of a proxy costs more than to make this."""

    __slots__ = ("door", "entered", "first", "has_warned", "model", "name")

    def __init__(self, name: str, door: Door, first: FirstUseLease | None, model: Any) -> None:
        self.name = name
        self.door = door
        self.first = first
        self.model = model
        self.has_warned = False
        # Who is inside, a task or else the identity of a thread -> (lease, what the same entered before it, or None).
        self.entered: dict[object, Any] = {}

    def take_lease(self, loop: object, *, early: bool = False) -> Lease:
        """The first-use lease where it still is, or a new one; on the object that the handle stands for.

        `loop` is the one that runs here: asking for it is felt in a hit.
        """
        first, door = self.first, self.door
        if first is not None:
            self.first = None
            lease = first.take_over(current_thread() if loop is None else current_holder())
            if lease is not None:
                return lease
        if loop is not None and not self.has_warned and not door.is_ready(self.name):
            self.has_warned = True
            warnings.warn(
                f"{self.name!r} is not ready, and this call blocks the running event loop until it is; "
                f"use 'async with cache.aget({self.name!r}) as model:'",
                RuntimeWarning,
                stacklevel=4,
            )
        lease = door.acquire(self.name, early=early)
        if lease.model is self.model:
            return lease
        lease.close()
        raise LeaseClosedError(self.name)


class ModelHandle(wrapt.ObjectProxy):  # type: ignore[misc]
    """A cached model: it behaves as the object its loader built, and holds a lease whenever that is used.

    A call, or a call of a public method, holds one lease for its whole length; an iterator or awaitable that it returns
    keeps the lease until it is exhausted or closed. ``with handle as model:`` yields the raw object under one lease.
    Reading attributes takes no lease and moves nothing; to read the weights of a model on disk (`parameters`,
    `state_dict` and their like) brings it up. Any number of threads and tasks may use one handle
    at once.

    Args:
        name: The registered name.
        door: The cache.
        first: A lease that keeps the model in place until its first use, or `None`.
    """

    __slots__ = ("_self_tie",)

    def __init__(self, name: str, door: Door, first: FirstUseLease | None = None) -> None:
        model = door.object_of(name) if first is None else first.model
        _wrap(self, model)
        self._self_tie = _Tie(name, door, first, model)
        if _COMPILER in sys.modules:
            _hide_from_compiler()

    # --- use ----------------------------------------------------------------------------------------------------------

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Call the model under one lease."""
        return _use(self, None, args, kwargs, early=True)

    def __enter__(self) -> Any:
        tie, loop = _tie_of(self), running_loop()
        who: object = get_ident() if loop is None else current_holder()
        lease, entered = tie.take_lease(loop), tie.entered
        below = entered.get(who) if entered else None
        # An interrupt before this store leaves the lease to its finalizer; there is none between it and the return.
        entered[who] = (lease, below)
        return tie.model

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        entered = _tie_of(self).entered
        who: object = get_ident() if running_loop() is None else current_holder()
        try:
            lease, below = entered[who]
        except KeyError:
            # Entered by one and left by another, as an ExitStack that was handed over does: any lease will do.
            who = next(iter(tuple(entered)), who)
            lease, below = entered[who]
        if below is None:
            del entered[who]
        else:
            entered[who] = below
        lease.__exit__(exc_type, exc, traceback)

    def _self_take_lease(self) -> Lease:
        return self._self_tie.take_lease(running_loop())

    # --- attributes ---------------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        tie = self._self_tie
        if name == "device":
            return tie.door.execution_device(tie.name)
        tie.door.settle(tie.name)
        model = tie.model
        value = getattr(model, name)
        if value is model:
            return self  # `base_model` of a model that is its own base, say: used raw, it would go without a lease.
        if (name.startswith("_") and name != "_apply") or not _is_method(model, name, value):
            return value
        return _Method(value, self, _HOW.get(name, _use))

    def __repr__(self) -> str:
        tie = self._self_tie
        try:
            state = tie.door.state_of(tie.name)
        except ModelCacheError as error:
            state = str(
                error
            )  # A debugger shows handles of closed caches too; a repr that raises would hide the frame.
        return f"<modelcache: {tie.name} {type(tie.model).__name__} {state}>"

    # --- refused ------------------------------------------------------------------------------------------------------

    def __copy__(self) -> NoReturn:
        self._self_refuse("copied")

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        self._self_refuse("copied")

    def __reduce__(self) -> NoReturn:
        self._self_refuse("pickled")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        self._self_refuse("pickled")

    def _self_refuse(self, what: str) -> NoReturn:
        name = self._self_tie.name
        raise TypeError(
            f"the handle of {name!r} cannot be {what}: it belongs to one cache, which owns the weights; pass the name "
            f"{name!r} and call cache.get({name!r}) there, or take the raw object with modelcache.unwrap(handle)"
        )


def unwrap(model: T) -> T:
    """The raw object behind a handle, without a lease; anything else as it is."""
    if isinstance(model, ModelHandle):
        tie = model._self_tie
        tie.door.settle(tie.name)
        raw: T = tie.model
        return raw
    return model


#: The tie of a handle, read past the proxy: asking a proxy for an attribute takes twice as long.
_tie_of: Callable[[ModelHandle], _Tie] = vars(ModelHandle)["_self_tie"].__get__


class _Method(wrapt.ObjectProxy):  # type: ignore[misc]
    """A method of the model as its handle gives it out: same name, signature and text, called the handle's way."""

    def __init__(self, method: Any, handle: ModelHandle, how: Callable[..., Any]) -> None:
        super().__init__(method)
        self._self_handle = handle
        self._self_how = how
        if _COMPILER in sys.modules:
            _hide_from_compiler()

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        return self._self_how(self._self_handle, self.__wrapped__, args, kwargs)


def _is_method(model: Any, name: str, value: Any) -> bool:
    """Whether calling `value` runs the model: its own methods, also where an instance overrides one by a function.

    Class and static methods do not; neither does a callable that is only kept as an attribute, such as a submodule.
    """
    if isinstance(value, MethodType):
        return not isinstance(value.__self__, type)
    if not callable(value) or isinstance(value, type):
        return False
    on_class = getattr(type(model), name, None)
    return on_class is not value and callable(on_class)


def _use(
    handle: ModelHandle, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, early: bool = False
) -> Any:
    """Call `target`, or the model itself where it is `None`, under one lease."""
    tie = _tie_of(handle)
    lease = tie.take_lease(running_loop(), early=early)
    try:
        if args or kwargs:
            args, kwargs = move_inputs(args, kwargs, tie.door.execution_device(tie.name))
        called = tie.model if target is None else target
        if isinstance(lease, AskedLease):
            with tie.door.call(tie.name):
                result = called(*args, **kwargs)
        else:
            result = called(*args, **kwargs)
    except BaseException:
        lease.close()
        raise
    return settle(handle, lease, result)


def _use_weights(handle: ModelHandle, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _use(handle, partial(target, *args, **kwargs), (), {})


def _read(handle: ModelHandle, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    result = target(*args, **kwargs)
    return handle if result is handle.__wrapped__ else result


def _read_weights(handle: ModelHandle, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tie = _tie_of(handle)
    if tie.door.has_weights(tie.name, tie.model):
        # What goes to disk between the two steps refuses to list its tensors.
        with suppress(ModelNotResidentError):
            return _read(handle, target, args, kwargs)
    return _use_weights(handle, target, args, kwargs)


def _place(verb: str, handle: ModelHandle, _target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tie = handle._self_tie
    device = tie.door.execution_device(tie.name)
    check_placement(tie.name, tie.model, device, verb, args=args, kwargs=kwargs)
    return handle


_HOW: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(LEASELESS, _read),
    **dict.fromkeys(READS_WEIGHTS, _read_weights),
    **dict.fromkeys(TAKES_WEIGHTS, _use_weights),
    **{verb: partial(_place, verb) for verb in PLACERS},
}

_COMPILER = "torch._dynamo.decorators"
#: The modules a lease passes through: not models of the demo, not hooks of the data plane.
_LEASE_PATH = tuple(
    f"modelcache.{room}" for room in ("handle", "lease", "carrying", "placement", "door", "cache", "runtime", "core")
)


def _hide_from_compiler() -> None:
    """Let `torch.compile` see the model and not the lease, once there is a compiler; cheap until then and after.

    Traced, each new lease would be a reason to recompile. Called where the compiler passes before it traces: it reads
    `forward` of what it is given.
    """
    skip = getattr(sys.modules.get(_COMPILER), "skip", None)
    if skip is None or hasattr(_use, "_torchdynamo_disable"):
        return
    for module_name, module in tuple(sys.modules.items()):
        if module_name.startswith(_LEASE_PATH):
            for function in _functions_of(module, module_name):
                skip(function)


def _functions_of(owner: object, module_name: str) -> Iterator[Any]:
    """Every function written in `owner`, a module or a class of it."""
    for value in tuple(vars(owner).values()):
        function = getattr(value, "fget", None) or getattr(value, "__func__", value)
        if inspect.isfunction(function) and function.__module__ == module_name:
            yield function
        elif isinstance(value, type) and value.__module__ == module_name:
            yield from _functions_of(value, module_name)
