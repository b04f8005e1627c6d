"""A Hypothesis state machine over the public API of a cache, with a plain model of it as the oracle."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from stateful.machine import CacheByTasks, CacheByThreads
from stateful.play import Play
from stateful.real import CacheOverTorch, RealStage
from stateful.stage import Stage

#: The same examples each time.
STABLE = settings(
    stateful_step_count=60,
    derandomize=True,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
#: What the examples over fakes must come across.
MARKS = (
    "aenter refused: CancelledError",
    "aenter refused: LeaseTimeoutError",
    "aenter served after a wait",
    "aget refused: CancelledError",
    "aget served after a wait",
    "call served",
    "copy refused: ModelTooLargeError",
    "copy served after a wait",
    "down refused: LeaseError",
    "down refused: LeaseTimeoutError",
    "down served",
    "enter served",
    "free served after a wait",
    "get refused: BudgetExhaustedError",
    "get refused: DevicePoisonedError",
    "get refused: LoaderError",
    "get served after a wait",
    "gone served",
    "lease refused: UnknownModelError",
    "lease served after a wait",
    "resize served",
    "room refused: LeaseCycleError",
    "room served after a wait",
    "victims compared",
)

#: What they come across a few times or, as threads happen to run, not at all; other tests have each for certain.
RARE = (
    "aget refused: BudgetExhaustedError",
    "copy refused: DeviceMemoryError",
    "free refused: LeaseCycleError",
    "get refused: MoveError",
    "lease refused: LeaseCycleError",
)


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Failures are part of the play, and logged each time."""
    caplog.set_level(100, logger="modelcache")


@pytest.fixture(autouse=True, scope="module")
def collecting_is_cheap() -> Iterator[None]:
    """What was there before is not looked at each time that something is dropped."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def play(machine: type[CacheByThreads], num_examples: int, **profile: object) -> int:
    """Play examples; the number of rules that were executed."""
    machine.stage = RealStage() if issubclass(machine, CacheOverTorch) else Stage()
    before = machine.num_steps
    try:
        run_state_machine_as_test(machine, settings=settings(STABLE, max_examples=num_examples, **profile))
    finally:
        if machine.stage.is_spoiled:
            machine.stage.give_up()
    machine.stage.end()
    return machine.num_steps - before


@pytest.mark.timeout(600)
def test_whatever_threads_and_tasks_do_the_cache_does_what_the_plain_model_says(figure: Callable[..., None]):
    Play.marks.clear()
    for machine in (CacheByThreads, CacheByTasks):
        figure("hypothesis steps", machine.__name__, play(machine, 300))
    figure("reach marks", "threads and tasks", sum(Play.marks[mark] > 0 for mark in (*MARKS, *RARE)))
    assert not [mark for mark in MARKS if not Play.marks[mark]]


@pytest.mark.timeout(600)
def test_so_does_one_over_the_shipped_mover(figure: Callable[..., None]):
    num_steps = play(CacheOverTorch, 50, stateful_step_count=40)
    figure("hypothesis steps", CacheOverTorch.__name__, num_steps)


@pytest.mark.proof
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("machine", "num"), [(CacheByThreads, 1500), (CacheByTasks, 1500), (CacheOverTorch, 400)])
def test_so_it_is_in_many_random_examples(machine: type[CacheByThreads], num: int, figure: Callable[..., None]):
    figure("hypothesis steps", f"{machine.__name__}, random", play(machine, num, derandomize=False))
