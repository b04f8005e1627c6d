"""MoveFuture: a move that was asked for and may be waited for, awaited or cancelled."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from modelcache.core.messages import Want
from modelcache.runtime.driver import Driver
from modelcache.runtime.waiters import LEFT, Waiter

_LOG = logging.getLogger("modelcache")


class MoveFuture(Future[None]):
    """A `concurrent.futures.Future` without a value; `asyncio.wrap_future` makes it awaitable.

    Cancelling it withdraws the request: what is in flight lands, what is not started never is.
    """

    def __init__(self, driver: Driver, want: Want, timeout_s: float | None) -> None:
        super().__init__()
        # The first of all callbacks: whoever waits for several futures is told before any other callback runs.
        super().add_done_callback(_tell_if_cancelled)
        self._driver = driver
        self._waiter: Waiter = driver.waiter(self._wake)
        driver.post(want, self._waiter, timeout_s)

    @property
    def ticket(self) -> int:
        """What the request is known by."""
        return self._waiter.ticket

    def cancel(self) -> bool:
        """Withdraw the request; False if it was answered already."""
        if self.done():
            return self.cancelled()
        self._driver.leave(self._waiter)
        # Asked again, it says who was first. An answer that was is about to be set, on the driver's thread.
        return self._waiter.leave() is LEFT and super().cancel()

    def add_done_callback(self, fn: Callable[[Future[None]], object]) -> None:
        """Call `fn` with this future once it is done; on a thread of the cache's own, or here if it is done already.

        It may call the cache. One that raises is logged; one that blocks delays other callbacks and nothing else. An
        exit or an interrupt is logged too on a thread of the cache's own; on the caller's it is the caller's.
        """
        super().add_done_callback(lambda _: self._driver.outside(partial(self._call, fn)))

    def _call(self, fn: Callable[[Future[None]], object]) -> None:
        try:
            fn(self)
        except Exception:
            # The user's own error: as with any future it is reported, and the next callback is run all the same.
            _LOG.exception("a callback of a prefetch failed")

    def _wake(self) -> None:
        try:
            self._waiter.result()
        except BaseException as error:  # noqa: BLE001  Whatever it is, it is the future's to raise.
            self.set_exception(error)
        else:
            self.set_result(None)


def _tell_if_cancelled(future: Future[None]) -> None:
    """Let `concurrent.futures.wait` and `as_completed` know of it; `Future.cancel` alone does not."""
    if future.cancelled():
        future.set_running_or_notify_cancel()
