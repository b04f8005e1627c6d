"""What the driver asks of the world: time, threads, and a data plane that moves bytes.

Each protocol is declared here, by the side that calls it. Nothing in `runtime` reaches the world another way, so one
seed can replay one schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Protocol, TypeVar

from modelcache.move import KeptWritten, LoadedFacts, Move, Moved
from modelcache.spec import ModelSpec

T = TypeVar("T")


class Clock(Protocol):
    """Monotonic time. Recency is never ordered by it."""

    def now_s(self) -> float:
        """Seconds since some fixed instant."""


class Lock(Protocol):
    """A mutual exclusion lock. A signal handler may take it again on the thread that holds it."""

    def __enter__(self) -> object: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None, /
    ) -> object: ...


class Event(Protocol):
    """A flag that one thread sets and others wait for."""

    def set(self) -> None: ...
    def clear(self) -> None: ...
    def is_set(self) -> bool: ...
    def wait(self, timeout: float | None = None) -> bool: ...


class Worker(Protocol):
    """A thread that was started."""

    def join(self, timeout: float | None = None) -> None: ...
    def is_alive(self) -> bool: ...


class Mailbox(Protocol[T]):
    """A queue of one reader. `put` never blocks and may be called from anywhere, finalizers included."""

    def put(self, item: T) -> None: ...

    def get(self, until_s: float | None) -> T | None:
        """The next item; `None` once the clock it was made with reaches `until_s` (never, for `None`)."""


class Pool(Protocol):
    """Where threads and their primitives come from."""

    def is_interruptible(self) -> bool:
        """Signal handlers may run on this thread: it must hold no lock that they could wait for."""

    def lock(self) -> Lock: ...
    def event(self) -> Event: ...
    def mailbox(self, clock: Clock) -> Mailbox[Any]: ...
    def spawn(self, name: str, run: Callable[[], None]) -> Worker: ...


class Progress(Protocol):
    """Told how far a load or a move is. Called from worker threads, without any lock held; must not block."""

    def __call__(self, name: str, done_bytes: int, total_bytes: int) -> None: ...


class Mover(Protocol):
    """The data plane: carries out one load or one move, whole or not at all.

    The driver never has two calls in flight for the same part, and never starts to move a part that is leased. Calls
    for different parts come from several worker threads at once. A call that raises has changed nothing: the part is
    whole where it was (`MoveError`, `LoaderError` or a subclass; anything else is wrapped by the driver).
    """

    def load(self, spec: ModelSpec, progress: Progress | None = None) -> LoadedFacts:
        """Run the loader once and lay its bytes out in parts; the bytes stay the loader's until staged.

        Raises:
            LoaderError: The loader raised or returned something that cannot be cached.
            MaterializeError: A dispatched model could not be made whole.
            WeightsError: A file is missing, damaged or of an unsupported kind.
        """

    def move(
        self, move: Move, progress: Progress | None = None, arriving: Callable[[], None] | None = None
    ) -> Moved | KeptWritten:
        """Carry out one move.

        A promotion may call `arriving` once: from then on a call of the models may start, and waits for each segment
        where it needs it. Should the move fail after that, such a call ends in a `MoveError`.

        Raises:
            MoveError: The move failed; the part is as `move.before` says.
        """

    def is_unwritten(self, part: str) -> bool:
        """Whether the bytes of a part on the device are as they were last known, found out while others may use it.

        False also when it cannot be told: it moves, it was changed in structure, the device failed. Changes nothing.
        """

    def drop_image(self, part: str) -> None:
        """Delete the image file of a part whose bytes are held elsewhere; nothing to delete is fine."""

    def forget(self, name: str) -> None:
        """Let go of everything known of a model, parts included unless another model holds them."""

    def object_of(self, name: str) -> object:
        """The object the loader built; the same one for the whole life of the registration."""

    def call(self, name: str) -> AbstractContextManager[None]:
        """Around a call of a model on the caller's thread, if its lease had to be asked for.

        It makes a call that was let in while its weights arrive wait for them where it reads them.

        Raises:
            MoveError: On leaving it: the weights did not arrive.
        """

    def settle(self, name: str) -> None:
        """Block until what is arriving of a model has landed or failed; nothing is moved for it."""

    def has_bytes(self, name: str) -> bool:
        """Whether all bytes of a model are on some tier above the disk; False for one that is not loaded."""

    def release_cached(self) -> None:
        """Give the allocators' cached memory back to the driver (one `empty_cache`)."""

    def close(self, in_use: Collection[str] = ()) -> None:
        """Give up everything: memory, files, threads, device state. Idempotent.

        Models that are `in_use` stay whole where they are: their memory goes when nobody holds their objects any more.
        """
