"""Watches the memory under the budgets, and lowers and raises them by what `core.governor` decides.

A thread of its own reads; the driver changes the budgets, as it does for `resize`. Opt-in: `policy.pressure: watch`.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from threading import get_ident
from typing import Protocol

from modelcache.core.governor import Change, Regulator, Standing, ram_ask, vram_ask
from modelcache.core.machine import Machine
from modelcache.core.messages import WantBudget
from modelcache.runtime.driver import Driver
from modelcache.runtime.ports import Clock, Pool
from modelcache.stats import BudgetChange, MemoryReading
from modelcache.tier import Tier

_LOG = logging.getLogger("modelcache")
#: How often the memory is read.
POLL_S = 1.0
#: How long closing waits for a reading that hangs in a driver.
GRACE_S = 2.0
_STOP = object()

#: Called with each change, on the governor's own thread.
BudgetSubscriber = Callable[[BudgetChange], object]


class Gauge(Protocol):
    """Reads the memory under the tiers. Called by the governor's thread only; may take milliseconds."""

    def read(self, tier: Tier) -> MemoryReading | None:
        """The figures of now, or old ones with the reason why; `None` for a tier that nobody can measure."""


class Governor:
    """Polls a gauge and regulates the budgets of a driver's machine. Never above what was configured.

    Args:
        driver: Whose budgets.
        gauge: Who measures.
        clock: When to.
        pool: Where its thread comes from.
        release: Gives what allocators kept of given-up memory back to the system, so that others can have it.
        vram_share: The share of the device's memory, less what others hold, that the VRAM budget was meant as.
        poll_s: How often, in seconds.
        keep: How many changes are remembered.
    """

    def __init__(
        self,
        driver: Driver,
        gauge: Gauge,
        clock: Clock,
        pool: Pool,
        *,
        release: Callable[[], None] = lambda: None,
        vram_share: float = 1.0,
        poll_s: float = POLL_S,
        keep: int = 100,
    ) -> None:
        self._driver = driver
        self._gauge = gauge
        self._clock = clock
        self._release = release
        self._vram_share = vram_share
        self._poll_s = poll_s
        self._started_s = clock.now_s()
        self._changes: deque[BudgetChange] = deque(maxlen=keep)
        self._num_changes = 0
        self._subscribers: dict[int, BudgetSubscriber] = {}
        self._next_key = 0
        self._problems: dict[Tier, str] = {}
        self._lowered: set[Tier] = set()
        top = driver.look(lambda machine: machine.books.top)
        self._regulators = {tier: Regulator() for tier in (Tier.VRAM, Tier.RAM) if tier in (top, Tier.RAM)}
        self._mailbox = pool.mailbox(clock)
        self._ident = 0
        self._thread = pool.spawn("modelcache-governor", self._run)

    # --- for everybody --------------------------------------------------------------------------------------------

    def changes(self) -> tuple[BudgetChange, ...]:
        """The last changes, oldest first."""
        return tuple(self._changes.copy())

    def problems(self) -> tuple[str, ...]:
        """Which memory cannot be measured now, in words."""
        return tuple(f"{tier}: {problem}" for tier, problem in self._problems.copy().items())

    def on_change(self, tell: BudgetSubscriber) -> Callable[[], None]:
        """Call `tell` with each change; returns what ends that."""
        self._next_key += 1
        key = self._next_key
        self._subscribers[key] = tell

        def end() -> None:
            self._subscribers.pop(key, None)

        return end

    def stop(self) -> None:
        """End the thread at once; a reading that hangs in a driver is left to itself. Budgets stay as they are."""
        self._mailbox.put(_STOP)
        if self._ident == get_ident():  # A subscriber closes the cache.
            return
        self._thread.join(GRACE_S)
        if self._thread.is_alive():
            _LOG.warning("the memory under the budgets is still being read; its thread is left to itself")

    # --- its own thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        self._ident = get_ident()
        next_s = self._started_s + self._poll_s
        while self._mailbox.get(next_s) is not _STOP:
            for tier, regulator in self._regulators.items():
                try:
                    self._regulate(tier, regulator)
                except BaseException as error:  # noqa: BLE001
                    # The thread must survive whatever a probe or a subscriber raises: without it, budgets that were
                    # lowered would never come back.
                    regulator.missed()
                    self._is_told(tier, f"{type(error).__name__}: {error}")
            next_s = self._clock.now_s() + self._poll_s

    def _regulate(self, tier: Tier, regulator: Regulator) -> None:
        with self._driver.watch.over(f"the reading of the memory under budgets.{tier}", is_waited_for=False):
            reading = self._gauge.read(tier)
        if reading is None or not self._driver.is_sound:
            return
        now_s = self._clock.now_s()
        age_s = now_s - reading.at_s
        if not self._is_told(tier, reading.problem, age_s):
            regulator.missed()
            return
        standing: Standing = self._driver.look(lambda machine: _standing(machine, tier))
        if tier in self._lowered and not standing.deficit_bytes:
            self._lowered.discard(tier)
            self._release()
        ask = ram_ask(standing, reading) if tier is Tier.RAM else vram_ask(standing, reading, self._vram_share)
        change = regulator.decide(standing, ask, now_s)
        if change is not None:
            self._carry_out(tier, standing, change, age_s)

    def _is_told(self, tier: Tier, problem: str, age_s: float = 0.0) -> bool:
        """Whether there are figures to act on; says once when there are none, and once when there are again."""
        before = self._problems.get(tier, "")
        if problem:
            self._problems[tier] = problem
            if not before:
                _LOG.warning(
                    "the memory under budgets.%s cannot be read: %s; last figures age_s=%.1f; the budget stays as it "
                    "is until they are back",
                    tier,
                    problem,
                    age_s,
                )
            return False
        if before:
            del self._problems[tier]
            _LOG.info("the memory under budgets.%s can be read again after: %s", tier, before)
        return True

    def _carry_out(self, tier: Tier, standing: Standing, change: Change, age_s: float) -> None:
        want = WantBudget(tier, change.budget_bytes, f"{change.why} ({change.source})")
        # Nobody waits for it: the next reading shows what it led to.
        self._driver.post(want, self._driver.waiter(lambda: None), None)
        if change.budget_bytes < standing.budget_bytes:
            self._lowered.add(tier)
        self._num_changes += 1
        event = BudgetChange(
            self._num_changes,
            self._clock.now_s() - self._started_s,
            tier,
            standing.budget_bytes,
            change.budget_bytes,
            standing.configured_bytes,
            change.why,
            change.source,
            age_s,
        )
        self._changes.append(event)
        _LOG.info(
            "%s budget tier=%s from=%d to=%d configured=%d reason=%r source=%s age_s=%.1f",
            "lowered" if event.after_bytes < event.before_bytes else "raised",
            tier,
            event.before_bytes,
            event.after_bytes,
            event.configured_bytes,
            event.reason,
            event.source,
            event.age_s,
        )
        for tell in tuple(self._subscribers.copy().values()):
            try:
                tell(event)
            except BaseException:  # noqa: BLE001
                # A subscriber's own, an exit included: it is reported, and the next one is told all the same.
                _LOG.exception("subscriber failed event=budget")


def _standing(machine: Machine, tier: Tier) -> Standing:
    account = machine.books.account(tier)
    return Standing(
        account.target_bytes,
        account.configured_bytes,
        account.resident_bytes + account.reserved_bytes + account.draining_bytes,
        account.deficit_bytes,
    )
