"""What a model is and what it costs, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType

from modelcache.tier import Tier


class OnWrite(Enum):
    """What an eviction does with bytes that were written since their block was filled."""

    WRITEBACK = "writeback"
    REFUSE = "refuse"
    DISCARD = "discard"

    def __str__(self) -> str:
        return self.value


class Priority(Enum):
    """Which models are given up first: every `LOW` copy before any `NORMAL`, those before any `HIGH`."""

    LOW = "low"
    NORMAL = "normal"
    HIGH = "high"

    @property
    def rank(self) -> int:
        """0 for the first to go."""
        return _RANKS[self]

    def __str__(self) -> str:
        return self.value


_RANKS = {Priority.LOW: 0, Priority.NORMAL: 1, Priority.HIGH: 2}


@dataclass(frozen=True, slots=True)
class LoaderSpec:
    """How a model comes into being. Exactly one of the three forms is set.

    `call` is a Python callable. `entry` is ``"pkg.module:function"``, imported when first used. `kind` is a named
    loader (``transformers``, ``sentence-transformers``, ``safetensors``) with its `options` (`path`, `dtype`,
    `model`, `weights`, ...).
    """

    call: object | None = None
    entry: str | None = None
    kind: str | None = None
    options: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))

    def __str__(self) -> str:
        if self.call is not None:
            module = getattr(self.call, "__module__", "?")
            return f"{module}:{getattr(self.call, '__qualname__', type(self.call).__qualname__)}"
        return self.entry or str(self.kind)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One registered model. Sizes are bytes, durations seconds; `None` means not set.

    Attributes:
        name: The registered name.
        loader: How it is built.
        size_bytes: Weights and buffers, when known before the first load.
        workspace_bytes: What a running model needs beside its weights (activations, KV cache).
        pin: The tier this model is never given up from, or `None`.
        priority: Which copies go first.
        idle_s: Park after this long without a lease; `None` never.
        concurrency: Leases at a time; 0 is unlimited, `None` takes the adapter's default.
        reload: A callable loader may be called again to re-read the weights.
        on_write: What an eviction does with written bytes.
    """

    name: str
    loader: LoaderSpec
    size_bytes: int | None = None
    workspace_bytes: int = 0
    pin: Tier | None = None
    priority: Priority = Priority.NORMAL
    idle_s: float | None = None
    concurrency: int | None = None
    reload: bool = False
    on_write: OnWrite = OnWrite.WRITEBACK
