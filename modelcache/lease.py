"""Leases: a caller's counted right to use a copy. Covers how one is returned, not how one is had."""

from __future__ import annotations

import asyncio
import threading
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Final

from modelcache.errors import LeaseClosedError
from modelcache.runtime.gate import Gate

_RETURNED: Final = object()
#: The event loop running on this thread, or `None`. Asked on each hit; the public question raises where none runs.
running_loop: Final = asyncio._get_running_loop
#: How long `get` keeps a model in place for its first use.
FIRST_USE_S: Final = 2.0


class Lease:
    """The right to use one copy; while it is open, the model does not move.

    Make it before entering the gate under its tick: from then on the object owns whatever the gate holds under that
    tick, and its finalizer returns it, so an interrupt at any instant loses nothing. A lease that never got in costs
    nothing to drop. Close it or leave its ``with`` block once or often, on any thread.

    Args:
        name: The model.
        gate: The model's gate.
        tick: What the lease is, or will be, known by at the gate; never used twice.
        on_return: Called with `name` after the lease left a gate that is closed or watched. It may run on any thread,
            inside a finalizer and under any lock: it must only append to a queue. It may be called once too often.
        model: The raw object; `fill` brings it later where it is yet to be loaded.
        site: Where the lease was taken, for the warning when it is dropped open.
    """

    __slots__ = ("__weakref__", "_gate", "_model", "_on_return", "_site", "_tick", "name")

    def __init__(
        self,
        name: str,
        gate: Gate,
        tick: int,
        on_return: Callable[[str], object] | None,
        model: Any,
        site: str | None = None,
    ) -> None:
        self.name = name
        self._gate = gate
        self._tick = tick
        self._on_return = on_return
        self._site = site
        self._model = model

    @property
    def model(self) -> Any:
        """The raw object.

        Raises:
            LeaseClosedError: The lease was returned.
        """
        if self._model is _RETURNED:
            raise LeaseClosedError(self.name)
        return self._model

    def fill(self, model: Any) -> None:
        """Bring the raw object of a lease that was made before the model was loaded; no-op once returned."""
        if self._model is not _RETURNED:
            self._model = model

    @property
    def site(self) -> str | None:
        """Where it was taken, if that was noted."""
        return self._site

    def note_site(self, site: str) -> None:
        """It was taken there."""
        self._site = site

    @property
    def is_open(self) -> bool:
        """Not yet returned."""
        return self._model is not _RETURNED

    def close(self) -> None:
        """Return the lease; again is a no-op."""
        if self._model is not _RETURNED:
            self._give_back()

    def __enter__(self) -> Any:
        model = self._model
        if model is _RETURNED:
            raise LeaseClosedError(self.name)
        return model

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._model is _RETURNED:
            return
        # `_give_back` written out, because two calls less are felt here.
        gate = self._gate
        gate.open.pop(self._tick, None)
        if (gate.closed or gate.watched) and self._on_return is not None:
            self._on_return(self.name)
        self._model = _RETURNED

    def __repr__(self) -> str:
        return f"<Lease {self.name!r} {'open' if self.is_open else 'returned'}>"

    def __del__(self) -> None:
        try:
            if self._model is _RETURNED:
                return
        except AttributeError:
            return  # Interrupted before `__init__` ran: nothing was entered.
        try:
            left = self._give_back()
        except BaseException:
            # The interpreter swallows what a finalizer raises, and an interrupt would take the lease with it.
            self._give_back()
            raise
        if left:
            self._warn_dropped()

    def _give_back(self) -> bool:
        # `_model` is cleared last: interrupted anywhere before, the finalizer runs all of this again. That is why the
        # return is told by the state of the gate and not by `left`, which only the interrupted call has seen.
        gate = self._gate
        left = gate.leave(self._tick)
        if (gate.closed or gate.watched) and self._on_return is not None:
            self._on_return(self.name)
        self._model = _RETURNED
        return left

    def _warn_dropped(self) -> None:
        taken = f", taken at {self._site}," if self._site is not None else ""
        warnings.warn(
            f"a lease on {self.name!r}{taken} was dropped without being returned; it has been returned now; "
            f"use 'with cache.get({self.name!r}) as model:' or close it",
            ResourceWarning,
            stacklevel=3,
            source=self,
        )


class AskedLease(Lease):
    """One that the driver granted, perhaps while the last weights arrive."""

    __slots__ = ()


class FirstUseLease(Lease):
    """What `get` holds between returning a handle and its first use, so that the model is not evicted in between.

    It ends by itself and never warns. The first use takes it over, and from then on it is a lease like any other;
    `FirstUses` ends it when nobody has within its time. Of the two exactly one succeeds, so a call can never lose its
    lease to the clock.
    """

    __slots__ = ("_claims",)

    #: Set by `FirstUses.limit`, and `None` once taken over.
    _claims: dict[int, tuple[float, Gate, str]] | None

    def take_over(self, holder: object) -> Lease | None:
        """The same lease, held by `holder` until it is returned; `None` when it has ended or was taken over."""
        claims = self._claims
        # Taking the claim out is the atomic step that decides between the clock, and any number of first uses.
        if claims is None or claims.pop(self._tick, None) is None:
            return None
        self._gate.open[self._tick] = holder
        self._claims = None
        return self

    def _give_back(self) -> bool:
        claims = getattr(self, "_claims", None)
        if claims is not None:
            claims.pop(self._tick, None)
        return super()._give_back()

    def _warn_dropped(self) -> None:
        """Dropping it is how it is meant to end, unless a use had it."""
        if getattr(self, "_claims", self) is None:
            super()._warn_dropped()


class FirstUses:
    """Ends the first-use leases that nobody took over in time.

    What is kept of each is a claim to its place at the gate, never the lease, so one that is collected ends at once.
    All share one alarm: a handle that is used right after it was got leaves nothing behind on any clock.

    Args:
        now_s: The clock.
        at_latest: Calls a function on another thread in so many seconds.
        on_return: As for `Lease`.
    """

    __slots__ = ("_alarm", "_at_latest", "_claims", "_now_s", "_on_return")

    def __init__(
        self,
        now_s: Callable[[], float],
        at_latest: Callable[[float, Callable[[], None]], None],
        on_return: Callable[[str], object] | None,
    ) -> None:
        self._now_s = now_s
        self._at_latest = at_latest
        self._on_return = on_return
        # The tick of each lease -> when it ends, its gate, its model; in the order in which they end.
        self._claims: dict[int, tuple[float, Gate, str]] = {}
        self._alarm: object = None

    def limit(self, lease: FirstUseLease) -> None:
        """Let it end after its time."""
        # The lease knows of the claims before they know of it: interrupted in between, its finalizer clears up.
        claims = lease._claims = self._claims
        claims[lease._tick] = (self._now_s() + FIRST_USE_S, lease._gate, lease.name)
        # Published first, read second; `_ring` does the reverse, so one of the two sees to the alarm.
        if self._alarm is None:
            self._set_alarm(FIRST_USE_S)

    def forget(self) -> None:
        """In a forked child: none of them can be taken over any more."""
        self._claims.clear()

    def end(self) -> None:
        """End them all now: the cache was closed."""
        for tick, (_, gate, _) in list(self._claims.items()):
            if self._claims.pop(tick, None) is not None:
                gate.leave(tick)

    def _set_alarm(self, in_s: float) -> None:
        # Whoever sets it last has it. One that an interrupt or a race left over rings and is not listened to.
        alarm = object()
        self._at_latest(in_s, partial(self._ring, alarm))
        self._alarm = alarm

    def _ring(self, alarm: object) -> None:
        if alarm is not self._alarm:
            return
        ends_s = self._end_due()
        if ends_s is None:
            self._alarm = None
            ends_s = self._end_due()
        if ends_s is not None:
            self._set_alarm(ends_s - self._now_s())

    def _end_due(self) -> float | None:
        """End those whose time is up; when the next one's is, if there is one."""
        now_s = self._now_s()
        while self._claims:
            try:
                tick, (ends_s, gate, name) = next(iter(self._claims.items()))
            except (StopIteration, RuntimeError):
                continue  # Taken over, or a new one came, between the two steps.
            if ends_s > now_s:
                return ends_s
            if self._claims.pop(tick, None) is not None:
                gate.leave(tick)
                if (gate.closed or gate.watched) and self._on_return is not None:
                    self._on_return(name)
        return None


class Leases(ABC):
    """Leases on several models, returned together; the ``with`` block yields the raw objects in the order asked for."""

    __slots__ = ()

    @property
    @abstractmethod
    def models(self) -> tuple[Any, ...]:
        """The raw objects, in the order asked for.

        Raises:
            LeaseClosedError: The leases were returned.
        """

    @abstractmethod
    def close(self) -> None:
        """Return them all; again is a no-op."""

    def __enter__(self) -> tuple[Any, ...]:
        return self.models

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class SeveralLeases(Leases):
    """`Leases` made of one `Lease` each."""

    __slots__ = ("_leases",)

    def __init__(self, leases: Sequence[Lease]) -> None:
        self._leases = tuple(leases)

    @property
    def models(self) -> tuple[Any, ...]:
        """The raw objects, in the order asked for."""
        return tuple(lease.model for lease in self._leases)

    def close(self) -> None:
        """Return them all; again is a no-op."""
        for lease in reversed(self._leases):
            lease.close()

    def __repr__(self) -> str:
        return f"<Leases {', '.join(repr(lease.name) for lease in self._leases)}>"


class SoleLease(Lease, Leases):
    """`Leases` on one model: the lease itself, without a list around it."""

    __slots__ = ()

    @property
    def models(self) -> tuple[Any, ...]:
        """The raw object, in a tuple."""
        return (self.model,)

    def __enter__(self) -> tuple[Any, ...]:
        model = self._model
        if model is _RETURNED:
            raise LeaseClosedError(self.name)
        return (model,)

    def __repr__(self) -> str:
        return f"<Leases {self.name!r}>"


def current_holder() -> object:
    """Who holds a lease taken here: the asyncio task that runs now, or else the thread.

    A task is named by a weak reference: a gate that kept it alive would keep alive the lease in its frame, whose
    finalizer then could never return it.
    """
    loop = running_loop()
    if loop is not None:
        task = asyncio.current_task(loop)
        if task is not None:
            reference = weakref.ref(task)
            # A reference keeps the hash that it was asked for while its object lived, and has none to give after that.
            hash(reference)
            return reference
    return threading.current_thread()
