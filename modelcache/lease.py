"""Leases: a caller's counted right to use a copy. Covers how one is returned, not how one is had."""

from __future__ import annotations

import contextlib
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from modelcache.errors import LeaseClosedError
from modelcache.runtime.gate import Gate

if TYPE_CHECKING:
    import asyncio

_RETURNED: Final = object()


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
        *,
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
    def is_open(self) -> bool:
        """Not yet returned."""
        return self._model is not _RETURNED

    def close(self) -> None:
        """Return the lease; again is a no-op."""
        if self._model is not _RETURNED:
            self._give_back()

    def __enter__(self) -> Any:
        return self.model

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

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
        if self._on_return is not None and (gate.closed or gate.watched):
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


class FirstUseLease(Lease):
    """What `get` holds between returning a handle and its first use, so that the model is not evicted in between.

    It ends by itself and never warns. The first use takes it over; the cache closes it when nobody has within its
    time. Of the two exactly one succeeds, so a call can never lose its lease to the timer.
    """

    __slots__ = ("_claims",)

    def __init__(
        self,
        name: str,
        gate: Gate,
        tick: int,
        on_return: Callable[[str], object] | None,
        model: Any,
        *,
        site: str | None = None,
    ) -> None:
        # Popping the one element is the atomic step that decides between the timer and the first use.
        self._claims = [tick]
        super().__init__(name, gate, tick, on_return, model, site=site)

    def close(self) -> None:
        """Return the lease, unless it was returned or taken over."""
        with contextlib.suppress(IndexError):
            self._claims.pop()
            super().close()

    def take_over(self, holder: object) -> Lease | None:
        """The same lease as an ordinary one, held by `holder`; `None` when it has ended already."""
        # The heir exists before it is entitled, so an interrupt in between returns the lease instead of losing it.
        heir = Lease(self.name, self._gate, self._tick, self._on_return, self._model, site=self._site)
        try:
            self._claims.pop()
        except IndexError:
            heir._model = _RETURNED
            return None
        self._gate.open[self._tick] = holder
        self._model = _RETURNED
        return heir

    def _warn_dropped(self) -> None:
        """Dropping it is how it is meant to end."""


class Leases:
    """Leases on several models, returned together; the ``with`` block yields the raw objects in the order asked for."""

    __slots__ = ("_leases",)

    def __init__(self, leases: Sequence[Lease]) -> None:
        self._leases = tuple(leases)

    @property
    def models(self) -> tuple[Any, ...]:
        """The raw objects, in the order asked for.

        Raises:
            LeaseClosedError: The leases were returned.
        """
        return tuple(lease.model for lease in self._leases)

    def close(self) -> None:
        """Return them all; again is a no-op."""
        for lease in reversed(self._leases):
            lease.close()

    def __enter__(self) -> tuple[Any, ...]:
        return self.models

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Leases {', '.join(repr(lease.name) for lease in self._leases)}>"


def running_loop() -> asyncio.AbstractEventLoop | None:
    """The event loop running on this thread. Does not import asyncio: where it is not imported, none runs."""
    current: Callable[[], asyncio.AbstractEventLoop | None] | None
    current = getattr(sys.modules.get("asyncio"), "_get_running_loop", None)
    return None if current is None else current()


def current_holder() -> object:
    """Who holds a lease taken here: the asyncio task that runs now, or else the thread.

    A task is named by a weak reference: a gate that kept it alive would keep alive the lease in its frame, whose
    finalizer then could never return it.
    """
    loop = running_loop()
    if loop is not None:
        task = sys.modules["asyncio"].current_task(loop)
        if task is not None:
            return weakref.ref(task)
    return threading.current_thread()
