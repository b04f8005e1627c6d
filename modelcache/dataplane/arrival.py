"""A promotion that calls need not wait for: each block of a model waits for its own segments.

The segments that `first_use` cannot answer for land first, wherever they lie. From then on a forward may run: before
each block, a hook makes the compute of its thread wait for the last of the block's segments. Copies land in order, so
one wait is enough.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from threading import Lock
from types import TracebackType
from typing import TYPE_CHECKING

import torch

from modelcache.dataplane.device.protocol import Device, DeviceEvent
from modelcache.dataplane.first_use import FirstUse
from modelcache.dataplane.parts import Part
from modelcache.errors import MoveError

if TYPE_CHECKING:
    from modelcache.dataplane.loaded import Root


def must_land_first(part: Part, uses: Iterable[FirstUse]) -> frozenset[int]:
    """The segments with a tensor that no block answers for.

    Args:
        part: What is promoted.
        uses: Of every root module that has a tensor of the part.
    """
    seen: set[int] = set()
    uncovered: set[int] = set()
    for use in uses:
        seen |= use.readers.keys()
        uncovered |= use.tensors - use.readers.keys()
    covered = seen - uncovered
    return frozenset(
        segment
        for segment in range(part.num_segments)
        if not all(id(member.tensor) in covered for member in part.members_of(segment))
    )


class Arrival:
    """The segments of one part that are still on their way, and the hooks that make blocks wait for them.

    Ended by whatever moves the part next. Its lock guards `_problem`.

    Args:
        part: What is promoted.
        device: Where to.
        events: Of the copies under way, by segment, in the order in which they land.
        uses: Of every root module that has a tensor of the part.
        roots: These modules; their `state_dict` waits for everything.
    """

    def __init__(
        self,
        part: Part,
        device: Device,
        events: Mapping[int, DeviceEvent],
        uses: Iterable[FirstUse],
        roots: Sequence[Root],
    ) -> None:
        self._part, self._device, self._events = part, device, dict(events)
        self._lock = Lock()
        self._problem = ""
        self._guards = [root.guard for root in roots]
        last: dict[torch.nn.Module, int] = {}
        for use in uses:
            for segment in self._events:
                for member in part.members_of(segment):
                    last.update(dict.fromkeys(use.readers.get(id(member.tensor), ()), segment))
        self._hooks = [
            block.register_forward_pre_hook(partial(self._let_wait, segment), prepend=True)
            for block, segment in last.items()
        ]
        self._hooks += [
            root.module.register_state_dict_pre_hook(self._wait_for_all)  # type: ignore[no-untyped-call]
            for root in roots
        ]

    def landed(self, segment: int) -> None:
        """Nobody needs to wait for this segment any more."""
        self._events.pop(segment, None)

    def __enter__(self) -> Arrival:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """If the promotion failed, every hook raises that from now on, until `end`."""
        if error is not None:
            with self._lock:
                self._problem = f"{type(error).__name__}: {error}"
            for guard in self._guards:
                guard.problem = self._problem

    def end(self) -> None:
        """Take the hooks off. Idempotent."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for guard in self._guards:
            guard.problem = ""

    def _let_wait(self, segment: int, block: torch.nn.Module, args: object) -> None:
        with self._lock:
            self._require_sound()
            event = self._events.get(segment)
        if event is None:
            return
        if event.is_done():
            try:
                event.wait()
            except Exception as error:
                raise self._moved_wrong(f"{type(error).__name__}: {error}") from error
        else:
            self._device.let_compute_wait(event)

    def _wait_for_all(self, root: torch.nn.Module, prefix: str, keep_vars: bool) -> None:
        for event in list(self._events.values()):
            # Should it have failed, the tensors are pointed at RAM again.
            with contextlib.suppress(Exception):
                event.wait()

    def _require_sound(self) -> None:
        if self._problem:
            raise self._moved_wrong(self._problem)

    def _moved_wrong(self, problem: str) -> MoveError:
        return MoveError(self._part.model, "ram", "vram", problem)
