"""A cache over fakes on a bench: time by hand, threads that can be waited for, and an oracle asked at the end."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

from modelcache.cache import ModelCache
from modelcache.testing import FakeClock, FakeModel, FakeMover, FakePool, cache_of
from modelcache.tier import Tier


class Call:
    """Something done on a thread of its own, and what came of it."""

    def __init__(self, do: Callable[[], Any], name: str = "caller") -> None:
        self._do = do
        self.value: Any = None
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.value = self._do()
        except BaseException as error:
            self.error = error

    def result(self) -> Any:
        self.thread.join(10.0)
        assert not self.thread.is_alive(), f"{self.thread.name} does not end"
        if self.error is not None:
            raise self.error
        return self.value

    def failure(self) -> BaseException:
        self.thread.join(10.0)
        assert not self.thread.is_alive(), f"{self.thread.name} does not end"
        assert self.error is not None, f"{self.thread.name} got {self.value!r}"
        return self.error


class Bench:
    def __init__(self, *, vram: int = 40, ram: int = 200, disk: int = 0, top: Tier = Tier.VRAM, **options: Any) -> None:
        self.clock, self.pool = FakeClock(), FakePool()
        self.mover = FakeMover(self.pool, vram_bytes=vram, ram_bytes=ram, disk_bytes=disk, top=top)
        self.cache: ModelCache = cache_of(self.mover, self.clock, self.pool, **options)

    def add(self, *names: str, size: int = 20, **options: Any) -> None:
        """Models of one segment each; their loaders may be called again unless said otherwise."""
        for name in names:
            self.cache.register(name, lambda: FakeModel(size), **{"size": size, "reload": True, **options})

    def call(self, do: Callable[[], Any], name: str = "caller") -> Call:
        return Call(do, name)

    def use(self, *names: str) -> None:
        for name in names:
            with self.cache.get(name):
                pass
        self.pool.settle()

    def pass_time(self, seconds: float, *, step: float | None = None) -> None:
        """Move the clock, in steps if one thing is to lead to another, and wait until what follows is done."""
        left = seconds
        while left > 1e-9:
            by = min(left, step or left)
            self.clock.advance(by)
            self.pool.settle()
            left -= by

    def state(self, name: str) -> str:
        return self.cache.info(name).state

    def states(self) -> dict[str, str]:
        return {name: self.state(name) for name in self.cache.names()}

    def validate(self) -> None:
        """The books balance, and are what the data plane holds."""
        self.pool.settle()

        def check(machine):
            machine.validate()
            books = machine.books
            held = self.mover.arenas.held
            top = books.account(books.top)
            workspaces = sum(m.spec.workspace_bytes for m in books.models.values() if m.workspace_charged)
            for tier in Tier:
                account = books.account(tier)
                extra = workspaces if account is top else 0
                moving = sum(r.size_bytes for r in machine.held.values() if r.tier is tier)
                assert account.resident_bytes - extra == held.of(tier), (tier, account, held)
                assert account.reserved_bytes == moving
                assert account.draining_bytes == account.claimed_bytes == 0

        self.cache._driver.look(check)

    def close(self) -> None:
        self.cache.close()
        assert self.pool.thread_names == ()
        gc.collect()
        self.mover.oracle.require_nothing()
