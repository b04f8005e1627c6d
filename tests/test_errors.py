"""Every error: its place in the tree, its words, its fields, and its way through pickle."""

from __future__ import annotations

import builtins
import copy
import inspect
import pickle
from collections.abc import Iterator

import pytest

from modelcache import errors
from modelcache.errors import ConfigError, Finding, ModelCacheError

FINDINGS = (
    Finding("cache.yaml", 3, 9, "budgets.vram", "must be greater than 0, got -4GiB"),
    Finding("cache.yaml", None, None, "", "more problems follow"),
)
GIB = 1 << 30

#: One of each, with fields that differ from every default, and the words an operator reads.
EXAMPLES: dict[str, tuple[ModelCacheError, str]] = {
    "ConfigError": (
        errors.ConfigError(FINDINGS),
        "cache.yaml:3:9: budgets.vram: must be greater than 0, got -4GiB\ncache.yaml: more problems follow",
    ),
    "UnknownModelError": (
        errors.UnknownModelError("fluxx", ("flux", "flux-fill"), 2),
        "no model is registered as 'fluxx'; did you mean 'flux' or 'flux-fill'?",
    ),
    "CapacityError": (errors.CapacityError("no room"), "no room"),
    "ModelTooLargeError": (
        errors.ModelTooLargeError("sdxl", "vram", 30 * GIB, 24 * GIB, "weights and workspace"),
        "'sdxl' needs 30.0 GiB of vram (weights and workspace), but budgets.vram is 24.0 GiB; no model was evicted; "
        "raise the budget or register a smaller variant",
    ),
    "BudgetExhaustedError": (
        errors.BudgetExhaustedError("flux", "vram", 12 * GIB, 3 * GIB, ("sdxl by worker-2",), "qwen is pinned"),
        "'flux' needs 12.0 GiB of vram, but only 3.0 GiB can be freed now; leased: sdxl by worker-2; qwen is pinned; "
        "return a lease, unpin a model, or raise budgets.vram",
    ),
    "QueueFullError": (
        errors.QueueFullError("flux", 512, 512),
        "cannot wait for 'flux': 512 callers are waiting already (max_waiters is 512); retry later or raise "
        "max_waiters",
    ),
    "LeaseError": (errors.LeaseError("no lease"), "no lease"),
    "LeaseTimeoutError": (
        errors.LeaseTimeoutError("flux", 30.0, "room", ("sdxl by worker-2",)),
        "'flux' was not usable after 30.0 s: waiting for room; held by: sdxl by worker-2; pass a longer timeout or "
        "return a lease",
    ),
    "LeaseCycleError": (
        errors.LeaseCycleError("b", ("main holds a and waits for b", "worker-2 holds b and waits for a")),
        "waiting for 'b' would never end: main holds a and waits for b; worker-2 holds b and waits for a; take the "
        "models together with cache.lease_many(...) or return a lease first",
    ),
    "LeaseClosedError": (
        errors.LeaseClosedError("flux"),
        "the lease on 'flux' was already returned; take a new one: with cache.get('flux') as model",
    ),
    "LoaderError": (
        errors.LoaderError("mine", "my_models:load", "returned None"),
        "the loader my_models:load of 'mine' returned None; fix the loader, then get 'mine' again",
    ),
    "MoveError": (
        errors.MoveError("flux", "ram", "vram", "the copy failed"),
        "could not move 'flux' from ram to vram: the copy failed",
    ),
    "WeightsError": (
        errors.WeightsError("flux", "models/flux/model.safetensors", "is cut off", "h.0.w"),
        "models/flux/model.safetensors: tensor 'h.0.w': is cut off",
    ),
    "DeviceMemoryError": (
        errors.DeviceMemoryError("flux", "cuda:0", 2 * GIB, GIB),
        "cuda:0 refused 2.0 GiB for 'flux', 1.0 GiB free, although the budget allowed it; another program may hold "
        "the memory: lower budgets.vram or free it",
    ),
    "DevicePoisonedError": (
        errors.DevicePoisonedError("cuda:0", "an illegal memory access", "sdxl"),
        "cuda:0 failed with 'an illegal memory access' while moving 'sdxl'; it cannot recover inside this process: "
        "restart it; copies in RAM are intact",
    ),
    "ModelNotResidentError": (
        errors.ModelNotResidentError("flux"),
        "'flux' is not on its device and no lease is held; call it through its handle, or use 'with "
        "cache.get('flux') as model:'",
    ),
    "MaterializeError": (
        errors.MaterializeError(tuple(f"h.{i}.w" for i in range(9)), "no data is to be had"),
        "no data is to be had: 'h.0.w', 'h.1.w', 'h.2.w', 'h.3.w', 'h.4.w', 'h.5.w', 'h.6.w', 'h.7.w' and 1 more",
    ),
    "MaterializeMemoryError": (
        errors.MaterializeMemoryError(("h.0.w", "h.1.w"), 2 * GIB, GIB, "cpu"),
        "materializing 2 tensors needs 2.0 GiB on cpu, but 1.0 GiB are available; free memory, or pass "
        "check_memory=False to try anyway",
    ),
    "CacheClosedError": (
        errors.CacheClosedError("the cache was closed while 'flux' was waited for"),
        "the cache was closed while 'flux' was waited for; create a new ModelCache",
    ),
    "ForkedCacheError": (
        errors.ForkedCacheError(),
        "this process was forked and the cache belongs to its parent; create a new ModelCache",
    ),
    "InvalidTransitionError": (
        errors.InvalidTransitionError("part 'flux'", "PARKED", "MoveDone", ("1 asked", "2 parked")),
        "bug in modelcache: part 'flux' cannot take MoveDone in PARKED; please report this\n  1 asked\n  2 parked",
    ),
}


def tree(kind: type[ModelCacheError] = ModelCacheError) -> Iterator[type[ModelCacheError]]:
    yield kind
    for below in kind.__subclasses__():
        if below.__module__ == errors.__name__:
            yield from tree(below)


def test_the_docstring_of_the_module_lists_the_whole_tree() -> None:
    listed = [line.split("── ")[1].split()[0] for line in errors.__doc__.splitlines() if "── " in line]
    assert sorted(listed) == sorted({kind.__name__ for kind in tree()} - {"ModelCacheError"})
    assert sorted(EXAMPLES) == sorted(listed)


def test_the_docstring_names_the_builtin_that_catches_each() -> None:
    for line in errors.__doc__.splitlines():
        name, _, rest = line.partition("── ")[2].partition(" ")
        builtin = rest.strip().partition("(")[2].partition(")")[0] if rest.strip().startswith("(") else ""
        if builtin:
            assert issubclass(getattr(errors, name), getattr(builtins, builtin)), line


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_words_say_what_was_found_and_what_to_do(name: str) -> None:
    error, words = EXAMPLES[name]
    assert str(error) == words


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_an_error_is_the_same_after_pickling(name: str, protocol: int) -> None:
    error, _ = EXAMPLES[name]
    again = pickle.loads(pickle.dumps(error, protocol))
    assert type(again) is type(error)
    assert vars(again) == vars(error)
    assert str(again) == str(error)
    assert again.args == error.args


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_error_is_the_same_after_copying(name: str) -> None:
    error, _ = EXAMPLES[name]
    for again in (copy.copy(error), copy.deepcopy(error)):
        assert (type(again), vars(again), str(again)) == (type(error), vars(error), str(error))


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_argument_is_a_field(name: str) -> None:
    error, _ = EXAMPLES[name]
    if "__init__" in vars(type(error)):
        for parameter in list(inspect.signature(type(error)).parameters):
            assert hasattr(error, parameter), parameter


def test_weights_that_no_lease_brings_back_are_said_to_be_gone() -> None:
    error = errors.ModelNotResidentError("flux", "the cache was closed")
    assert str(error) == (
        "'flux' has no weights any more: the cache was closed; load it again, or save or copy it before that"
    )
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_the_shortest_forms_leave_out_what_is_not_known() -> None:
    assert str(errors.UnknownModelError("a")) == (
        "no model is registered as 'a'; register it first: cache.register(name, loader)"
    )
    assert "see cache.names()" in str(errors.UnknownModelError("a", (), 3))
    assert "free" not in str(errors.DeviceMemoryError("a", "cuda:0", GIB, None)).partition(",")[0]
    assert "held by" not in str(errors.LeaseTimeoutError("a", 1.0, "room"))
    assert str(errors.WeightsError("a", "", "is cut off")) == "is cut off"
    assert str(errors.MaterializeError((), "nothing to do")) == "nothing to do"
    assert "while moving" not in str(errors.DevicePoisonedError("cuda:0", "x"))


def test_a_cause_is_kept_and_each_waiter_may_have_its_own_error() -> None:
    cause = ValueError("the shared cause")
    waiters = [errors.LoaderError("a", "m:f", "raised") for _ in range(2)]
    for error in waiters:
        with pytest.raises(errors.LoaderError) as caught:
            raise error from cause
        assert caught.value.__cause__ is cause
    assert waiters[0] is not waiters[1]


def test_a_config_error_shows_the_place_of_its_first_finding() -> None:
    error = ConfigError(FINDINGS)
    assert (error.path, error.line, error.column, error.key) == ("cache.yaml", 3, 9, "budgets.vram")
    assert isinstance(error, ValueError)


def test_a_finding_leaves_out_the_places_it_does_not_know() -> None:
    assert str(Finding("", None, None, "budgets.vram", "is empty")) == "budgets.vram: is empty"
    assert str(Finding("a.yaml", 1, None, "", "is empty")) == "a.yaml:1: is empty"
    assert str(Finding("", None, None, "", "is empty")) == "is empty"
