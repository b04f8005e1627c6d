"""Iterators and awaitables keep the lease of the call that made them, and stay what they are."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import inspect
import types
from collections.abc import AsyncIterator, Awaitable, Generator, Iterator
from contextlib import aclosing, closing
from typing import Any

import pytest
from doors import OneModel, handle_of


class Stream:
    """A model whose methods answer later; `door` lets it say whether its lease holds."""

    door: OneModel

    def __init__(self) -> None:
        self.cleaned_up_under_lease: list[bool] = []

    def tokens(self, n: int = 3) -> Generator[int, str | None, str]:
        try:
            for i in range(n):
                assert self.door.num_leases == 1
                got = yield i
                if got == "fail":
                    raise ValueError(got)
        finally:
            self.cleaned_up_under_lease.append(self.door.num_leases == 1)
        return "end"

    def mapped(self) -> Iterator[int]:
        return map(abs, [-1, -2])

    def restarting(self) -> Iterator[int]:
        return Restarting(self.door)

    def flaky(self) -> Iterator[int]:
        return Flaky()

    async def answer(self) -> str:
        assert self.door.num_leases == 1
        await asyncio.sleep(0)
        assert self.door.num_leases == 1
        return "42"

    async def fail(self) -> None:
        await asyncio.sleep(0)
        raise ValueError("no")

    async def atokens(self, n: int = 3) -> AsyncIterator[int]:
        try:
            for i in range(n):
                assert self.door.num_leases == 1
                yield i
        finally:
            self.cleaned_up_under_lease.append(self.door.num_leases == 1)

    async def open_stream(self) -> AsyncIterator[int]:
        await asyncio.sleep(0)
        return self.atokens()

    async def itself(self) -> Stream:
        await asyncio.sleep(0)
        return self

    def later(self) -> Awaitable[str]:
        return Later()

    def queue(self) -> AsyncIterator[int]:
        return Queue()

    def submit(self, pool: concurrent.futures.Executor, work: Any) -> concurrent.futures.Future[Any]:
        return pool.submit(work)


class Restarting:
    """As a transformers `PipelineIterator`: an iterator that starts over each time it is iterated."""

    def __init__(self, door: OneModel) -> None:
        self.door = door

    def __iter__(self) -> Restarting:
        self.left = 2
        return self

    def __next__(self) -> int:
        assert self.door.num_leases == 1
        if not self.left:
            raise StopIteration
        self.left -= 1
        return self.left

    def __len__(self) -> int:
        return 2


class Flaky:
    """As a streamer with a timeout: it may raise and go on."""

    def __init__(self) -> None:
        self.answers = iter([TimeoutError(), 1])

    def __iter__(self) -> Flaky:
        return self

    def __next__(self) -> int:
        answer = next(self.answers)
        if isinstance(answer, Exception):
            raise answer
        return answer


class Later:
    """An awaitable that is no coroutine."""

    def __await__(self) -> Generator[Any, Any, str]:
        yield from asyncio.sleep(0).__await__()
        return "later"


class Queue:
    """An asynchronous iterator that is no generator; its first answer is an error it survives."""

    def __init__(self) -> None:
        self.answers = iter([TimeoutError(), 1])

    def __aiter__(self) -> Queue:
        return self

    async def __anext__(self) -> int:
        for answer in self.answers:
            if isinstance(answer, Exception):
                raise answer
            return answer
        raise StopAsyncIteration


@pytest.fixture
def stream() -> tuple[Any, OneModel]:
    model = Stream()
    handle, door = handle_of(model)
    model.door = door
    return handle, door


# --- generators -------------------------------------------------------------------------------------------------------


def test_a_generator_that_raises_returns_the_lease(stream):
    handle, door = stream
    tokens = handle.tokens()
    next(tokens)

    with pytest.raises(ValueError, match="fail"):
        tokens.send("fail")

    assert door.num_leases == 0


def test_a_generator_thrown_into_returns_the_lease(stream):
    handle, door = stream
    tokens = handle.tokens()
    next(tokens)

    with pytest.raises(KeyError):
        tokens.throw(KeyError("stop"))

    assert door.num_leases == 0


def test_a_generator_keeps_the_lease_until_it_is_exhausted(stream):
    handle, door = stream
    tokens = handle.tokens()

    assert door.num_leases == 1
    assert list(tokens) == [0, 1, 2]
    assert door.num_leases == 0
    assert list(tokens) == []
    assert door.num_acquired == 1


def test_a_generator_is_still_a_generator(stream):
    handle, _ = stream
    tokens = handle.tokens()

    assert inspect.isgenerator(tokens)
    assert isinstance(tokens, types.GeneratorType)
    assert tokens.__name__ == "tokens"
    assert iter(tokens) is tokens
    tokens.close()


def test_a_generator_delegated_to_passes_what_is_sent_and_returned(stream):
    handle, door = stream

    def delegating() -> Generator[int, str | None, str]:
        return (yield from handle.tokens(1))

    outer = delegating()
    assert next(outer) == 0
    with pytest.raises(StopIteration) as end:
        outer.send("go on")
    assert end.value.value == "end"
    assert door.num_leases == 0


def test_closing_a_generator_returns_the_lease_after_its_clean_up(stream):
    handle, door = stream

    with closing(handle.tokens()) as tokens:
        next(tokens)

    assert door.num_leases == 0
    assert handle.cleaned_up_under_lease == [True]


def test_a_generator_closed_before_it_started_returns_the_lease(stream):
    handle, door = stream

    handle.tokens().close()

    assert door.num_leases == 0


def test_an_abandoned_generator_cleans_up_under_its_lease_and_returns_it(stream):
    handle, door = stream

    for token in handle.tokens():
        assert token == 0
        break
    gc.collect()

    assert door.num_leases == 0
    assert handle.cleaned_up_under_lease == [True]


# --- other iterators --------------------------------------------------------------------------------------------------


def test_an_iterator_keeps_the_lease_until_it_is_exhausted(stream):
    handle, door = stream
    mapped = handle.mapped()

    assert isinstance(mapped, map)
    assert next(mapped) == 1
    assert door.num_leases == 1
    assert list(mapped) == [2]
    assert door.num_leases == 0


def test_an_iterator_that_starts_over_takes_a_lease_again(stream):
    handle, door = stream
    results = handle.restarting()

    assert len(results) == 2
    assert list(results) == [1, 0]
    assert door.num_leases == 0
    assert list(results) == [1, 0]
    assert door.num_leases == 0
    assert door.num_acquired == 2


def test_an_iterator_that_survives_an_error_keeps_the_lease(stream):
    handle, door = stream
    flaky = handle.flaky()

    with pytest.raises(TimeoutError):
        next(flaky)
    assert door.num_leases == 1
    assert next(flaky) == 1
    flaky.close()
    assert door.num_leases == 0


def test_an_abandoned_iterator_returns_the_lease(stream):
    handle, door = stream
    mapped = handle.mapped()
    assert door.num_leases == 1

    del mapped

    assert door.num_leases == 0


# --- awaitables -------------------------------------------------------------------------------------------------------


def test_a_coroutine_that_raises_returns_the_lease(stream):
    handle, door = stream

    async def run() -> None:
        with pytest.raises(ValueError, match="no"):
            await handle.fail()
        with pytest.raises(ValueError, match="no"):
            await asyncio.create_task(handle.fail())

    asyncio.run(run())
    assert door.num_leases == 0


def test_a_cancelled_task_returns_the_lease(stream):
    handle, door = stream

    async def run() -> None:
        task = asyncio.create_task(handle.answer())
        await asyncio.sleep(0)
        assert door.num_leases == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert door.num_leases == 0


def test_a_coroutine_keeps_the_lease_until_it_is_awaited_to_its_end(stream):
    handle, door = stream

    async def run() -> None:
        coroutine = handle.answer()
        assert inspect.iscoroutine(coroutine)
        assert inspect.isawaitable(coroutine)
        assert door.num_leases == 1
        assert await coroutine == "42"
        assert door.num_leases == 0

    asyncio.run(run())


def test_a_coroutine_run_as_a_task_or_gathered_returns_the_lease(stream):
    handle, door = stream

    async def run() -> None:
        assert await asyncio.create_task(handle.answer()) == "42"
        assert await asyncio.wait_for(handle.answer(), 5) == "42"
        assert await asyncio.gather(handle.answer()) == ["42"]

    asyncio.run(run())
    assert door.num_leases == 0


def test_a_coroutine_run_by_the_loop_itself_returns_the_lease(stream):
    handle, door = stream

    assert asyncio.run(handle.answer()) == "42"
    assert door.num_leases == 0


def test_a_coroutine_closed_unawaited_returns_the_lease(stream):
    handle, door = stream

    handle.answer().close()

    assert door.num_leases == 0


def test_a_coroutine_thrown_into_returns_the_lease(stream):
    handle, door = stream
    coroutine = handle.answer()
    coroutine.send(None)

    with pytest.raises(KeyError):
        coroutine.throw(KeyError("stop"))

    assert door.num_leases == 0


def test_a_coroutine_that_returns_a_stream_hands_the_lease_on(stream):
    handle, door = stream

    async def run() -> None:
        tokens = await handle.open_stream()
        assert door.num_leases == 1
        assert [token async for token in tokens] == [0, 1, 2]
        assert door.num_leases == 0
        assert [token async for token in await asyncio.create_task(handle.open_stream())] == [0, 1, 2]
        assert door.num_leases == 0

    asyncio.run(run())


def test_a_coroutine_that_returns_the_model_returns_the_handle(stream):
    handle, door = stream

    async def run() -> None:
        assert (await handle.itself()) is handle

    asyncio.run(run())
    assert door.num_leases == 0


def test_an_awaitable_that_is_no_coroutine_keeps_the_lease(stream):
    handle, door = stream

    async def run() -> None:
        later = handle.later()
        assert not inspect.iscoroutine(later)
        assert door.num_leases == 1
        assert await later == "later"
        assert await asyncio.ensure_future(handle.later()) == "later"

    asyncio.run(run())
    assert door.num_leases == 0


def test_a_future_keeps_the_lease_until_it_is_done(stream):
    handle, door = stream
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        go_on = concurrent.futures.Future[str]()
        future = handle.submit(pool, go_on.result)

        assert isinstance(future, concurrent.futures.Future)
        assert door.num_leases == 1
        go_on.set_result("done")
        assert future.result(5) == "done"

    assert door.num_leases == 0


# --- asynchronous iterators -------------------------------------------------------------------------------------------


def test_an_async_generator_that_is_thrown_into_returns_the_lease(stream):
    handle, door = stream

    async def run() -> None:
        tokens = handle.atokens()
        await anext(tokens)
        with pytest.raises(KeyError):
            await tokens.athrow(KeyError("stop"))
        assert door.num_leases == 0

    asyncio.run(run())


def test_an_async_generator_keeps_the_lease_until_it_is_exhausted(stream):
    handle, door = stream

    async def run() -> None:
        tokens = handle.atokens()
        assert inspect.isasyncgen(tokens)
        assert await tokens.asend(None) == 0
        assert door.num_leases == 1
        assert [token async for token in tokens] == [1, 2]
        assert door.num_leases == 0

    asyncio.run(run())


def test_closing_an_async_generator_returns_the_lease_after_its_clean_up(stream):
    handle, door = stream

    async def run() -> None:
        async with aclosing(handle.atokens()) as tokens:
            await anext(tokens)
        assert door.num_leases == 0

    asyncio.run(run())
    assert handle.cleaned_up_under_lease == [True]


def test_an_abandoned_async_generator_returns_the_lease(stream):
    handle, door = stream

    async def run() -> None:
        async for token in handle.atokens():
            assert token == 0
            break
        gc.collect()
        assert door.num_leases == 0

    asyncio.run(run())


def test_an_async_iterator_that_survives_an_error_keeps_the_lease(stream):
    handle, door = stream

    async def run() -> None:
        queue = handle.queue()
        with pytest.raises(TimeoutError):
            await anext(queue)
        assert door.num_leases == 1
        assert [item async for item in queue] == [1]
        assert door.num_leases == 0
        again = handle.queue()
        assert door.num_leases == 1
        await again.aclose()
        assert door.num_leases == 0

    asyncio.run(run())
