"""A promotion that calls need not wait for: every operator waits for the segments of the tensors that it reads.

The segments of tensors that no operator was seen to read (`first_use`) land first, wherever they lie. From then on a
call may start. While it runs, each operator on its thread is looked at, and the compute of that thread is made to wait
for what the operator reads, whichever way the program took to it. The call ends when everything has landed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from threading import Lock
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch.utils._python_dispatch import TorchDispatchMode

from modelcache.dataplane.copies import Copy
from modelcache.dataplane.device.protocol import Device, DeviceEvent
from modelcache.dataplane.first_use import FirstUse, among, pointer_of
from modelcache.dataplane.parts import Part
from modelcache.errors import MoveError

if TYPE_CHECKING:
    from modelcache.dataplane.loaded import Root


def must_land_first(part: Part, uses: Iterable[FirstUse]) -> frozenset[int]:
    """The segments with a tensor that no operator was seen to read.

    Args:
        part: What is promoted.
        uses: Of every model that has a tensor of the part.
    """
    seen: set[int] = set()
    unseen: set[int] = set()
    for use in uses:
        seen |= use.seen
        unseen |= use.tensors - use.seen
    covered = seen - unseen
    return frozenset(
        segment
        for segment in range(part.num_segments)
        if not all(id(member.tensor) in covered for member in part.members_of(segment))
    )


class Arrival:
    """The segments of one part that are still on their way.

    Its lock guards `_problem`.

    Args:
        part: What is promoted.
        device: Where to.
        copies: Those under way, by segment, in the order in which they land.
        events: Of their landing.
        roots: The modules whose guards tell of a failure.
    """

    def __init__(
        self,
        part: Part,
        device: Device,
        copies: Mapping[int, Copy],
        events: Mapping[int, DeviceEvent],
        roots: Sequence[Root],
    ) -> None:
        self._part, self._device, self._events = part, device, dict(events)
        self._guards = [root.guard for root in roots]
        self._lock = Lock()
        self._problem = ""
        self._segments = {
            pointer_of(view): segment for segment in events for view in copies[segment].laid(part.members_of(segment))
        }

    def __enter__(self) -> Arrival:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """If the promotion failed, whoever waits is told so."""
        if error is not None:
            with self._lock:
                self._problem = f"{type(error).__name__}: {error}"
            for guard in self._guards:
                guard.problem = self._problem

    def landed(self, segment: int) -> None:
        """Nobody needs to wait for this segment any more."""
        self._events.pop(segment, None)

    def forget(self) -> None:
        """The part moves again: guards have nothing more to tell."""
        for guard in self._guards:
            guard.problem = ""

    def let_wait(self, pointer: int) -> None:
        """Make this thread's compute wait for the segment of the storage that begins there, if it is on its way.

        Raises:
            MoveError: The promotion failed.
        """
        segment = self._segments.get(pointer, -1)
        with self._lock:
            self.require_sound()
            event = self._events.get(segment)
        if event is None:
            return
        if event.is_done():
            try:
                event.wait()
            except Exception as error:
                raise self._failed(f"{type(error).__name__}: {error}") from error
        else:
            self._device.let_compute_wait(event)

    def wait(self) -> None:
        """Block until everything has landed.

        Raises:
            MoveError: The promotion failed.
        """
        for event in list(self._events.values()):
            try:
                event.wait()
            except Exception as error:
                raise self._failed(f"{type(error).__name__}: {error}") from error
        self.require_sound()

    def require_sound(self) -> None:
        """Do nothing while all is well.

        Raises:
            MoveError: The promotion failed.
        """
        if self._problem:
            raise self._failed(self._problem)

    def _failed(self, problem: str) -> MoveError:
        return MoveError(self._part.model, "ram", "vram", problem)


class _Waiting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, every operator of this thread waits for what it reads."""

    def __init__(self, arrivals: Sequence[Arrival]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._arrivals = arrivals

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        for tensor in among((args, tuple(kwargs.values()))):
            pointer = pointer_of(tensor)
            for arrival in self._arrivals:
                arrival.let_wait(pointer)
        try:
            return func(*args, **kwargs)
        except RuntimeError:
            # Tensors point at RAM again by now, and the operator found them in two places.
            for arrival in self._arrivals:
                arrival.require_sound()
            raise


@contextlib.contextmanager
def waiting(arrivals: Sequence[Arrival]) -> Iterator[None]:
    """Around a call that was let in early.

    Raises:
        MoveError: A promotion failed meanwhile, whether the call read what did not come or not.
    """
    with _Waiting(arrivals):
        yield
    # What the call did not read, whoever reads or writes next expects to be there.
    for arrival in arrivals:
        arrival.wait()
