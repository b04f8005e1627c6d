"""Results that go on using the model: iterators and awaitables that keep the lease of the call that made them.

Each is a transparent proxy of the original, so its type, `send`, `throw` and `close` stay. The lease goes when the
original is exhausted, fails for good, is closed, or is collected.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Generator, Iterator
from types import AsyncGeneratorType, CoroutineType, GeneratorType
from typing import Any

import wrapt

from modelcache.lease import Lease


def settle(handle: Any, lease: Lease, result: Any) -> Any:
    """End a call: return its lease, or hand it to a result that still needs it.

    Args:
        handle: The `ModelHandle` that was called.
        lease: The call's lease; closed on return or owned by what is returned.
        result: What the model returned. The model itself becomes the handle.
    """
    kind = type(result)
    if result is handle.__wrapped__:
        result = handle
    elif hasattr(kind, "__next__"):
        return (_Generator if isinstance(result, GeneratorType) else _Iterator)(result, lease, handle)
    elif hasattr(kind, "add_done_callback"):
        # A future works on by itself, awaited or not.
        result.add_done_callback(lambda _done: lease.close())
        return result
    elif hasattr(kind, "__await__"):
        return (_Coroutine if isinstance(result, CoroutineType) else _Awaitable)(result, lease, handle)
    elif hasattr(kind, "__anext__"):
        return (_AsyncGenerator if isinstance(result, AsyncGeneratorType) else _AsyncIterator)(result, lease, handle)
    lease.close()
    return result


class _Carrier(wrapt.ObjectProxy):  # type: ignore[misc]
    """A result that owns a lease. Dropping it unfinished is ordinary Python, so it returns the lease without a word."""

    _self_lease: Lease | None = None  # Seen by the finalizer when `__init__` was interrupted.

    def __init__(self, result: Any, lease: Lease, handle: Any) -> None:
        super().__init__(result)
        self._self_handle = handle
        self._self_lease = lease

    def __del__(self) -> None:
        self._self_end()

    def _self_end(self) -> None:
        lease = self._self_lease
        if lease is not None:
            lease.close()
            self._self_lease = None

    def _self_finish(self, result: Any) -> Any:
        """Hand the lease on to what was awaited."""
        lease, self._self_lease = self._self_lease, None
        return result if lease is None else settle(self._self_handle, lease, result)


class _Iterator(_Carrier):
    """An iterator. Only its end ends the lease: one that raised something else may go on, one that ended start over."""

    def __iter__(self) -> Iterator[Any]:
        inner = iter(self.__wrapped__)
        if inner is self.__wrapped__:
            return self
        lease, self._self_lease = self._self_lease, None
        return _Iterator(inner, lease or self._self_handle._self_take_lease(), self._self_handle)

    def __next__(self) -> Any:
        if self._self_lease is None:
            self._self_lease = self._self_handle._self_take_lease()
        try:
            return next(self.__wrapped__)
        except StopIteration:
            self._self_end()
            raise

    def close(self) -> None:
        """Close the iterator where it can be closed, and return the lease."""
        try:
            getattr(self.__wrapped__, "close", _nothing)()
        finally:
            self._self_end()


class _Generator(_Carrier):
    """A generator: any exception that comes out of it is its end."""

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return self._self_step(self.__wrapped__.__next__)

    def send(self, value: Any) -> Any:
        return self._self_step(self.__wrapped__.send, value)

    def throw(self, *exc: Any) -> Any:
        return self._self_step(self.__wrapped__.throw, *exc)

    def close(self) -> Any:
        try:
            return self.__wrapped__.close()
        finally:
            self._self_end()

    def __del__(self) -> None:
        # As the generator's own finalizer would, but while the lease still holds: its `finally` may use the model.
        if self._self_lease is not None:
            self.close()

    def _self_step(self, advance: Callable[..., Any], *args: Any) -> Any:
        try:
            return advance(*args)
        except BaseException:
            self._self_end()
            raise


class _Awaitable(_Carrier):
    """An awaitable: what it results in is settled as the result of a call is."""

    def __await__(self) -> Generator[Any, Any, Any]:
        try:
            result = yield from self.__wrapped__.__await__()
        except BaseException:
            self._self_end()
            raise
        return self._self_finish(result)


class _Coroutine(_Awaitable):
    """A coroutine, which a task drives by `send` and `throw` instead of awaiting it."""

    def send(self, value: Any) -> Any:
        return self._self_step(self.__wrapped__.send, value)

    def throw(self, *exc: Any) -> Any:
        return self._self_step(self.__wrapped__.throw, *exc)

    def close(self) -> None:
        try:
            self.__wrapped__.close()
        finally:
            self._self_end()

    def _self_step(self, advance: Callable[..., Any], *args: Any) -> Any:
        try:
            return advance(*args)
        except StopIteration as end:
            raise StopIteration(self._self_finish(end.value)) from None
        except BaseException:
            self._self_end()
            raise


class _AsyncIterator(_Carrier):
    """An asynchronous iterator; as with `_Iterator`, only its end ends the lease."""

    _self_ends: type[BaseException] = StopAsyncIteration

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        return await self._self_step(self.__wrapped__.__anext__)

    async def aclose(self) -> None:
        """Close the iterator where it can be closed, and return the lease."""
        try:
            close = getattr(self.__wrapped__, "aclose", None)
            if close is not None:
                await close()
        finally:
            self._self_end()

    async def _self_step(self, advance: Callable[..., Any], *args: Any) -> Any:
        try:
            return await advance(*args)
        except self._self_ends:
            self._self_end()
            raise


class _AsyncGenerator(_AsyncIterator):
    """An asynchronous generator: any exception that comes out of it is its end.

    Dropped unfinished, its own clean-up is scheduled by the event loop and may run after the lease is returned.
    """

    _self_ends = BaseException

    async def asend(self, value: Any) -> Any:
        return await self._self_step(self.__wrapped__.asend, value)

    async def athrow(self, *exc: Any) -> Any:
        return await self._self_step(self.__wrapped__.athrow, *exc)


def _nothing() -> None:
    pass
