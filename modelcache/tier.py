"""The tiers a copy can live on, fastest first."""

from __future__ import annotations

from enum import Enum


class Tier(Enum):
    """Where bytes live. `VRAM` is the top tier, except on a host-only machine where `RAM` is."""

    VRAM = "vram"
    RAM = "ram"
    DISK = "disk"

    #: Members are one of a kind: what they are told apart by in dicts and sets need not be their names.
    __hash__ = object.__hash__

    @property
    def rank(self) -> int:
        """0 for the fastest tier."""
        return _RANKS[self]

    def __str__(self) -> str:
        return self.value


_RANKS = {Tier.VRAM: 0, Tier.RAM: 1, Tier.DISK: 2}
