"""Whether the modules of a model still hold the very objects that they held at an earlier look.

A walk over names takes microseconds a tensor; this look compares references, many in one call. It knows nothing of
what tensors point at, and only of plain modules: whose tables are dictionaries of their own.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import is_

import torch

_TABLES = ("_parameters", "_buffers", "_modules")


class Structure:
    """Every table of some modules, with what was in it."""

    __slots__ = ("_tables",)

    def __init__(self, tables: list[tuple[dict[str, object], str, dict[str, object], tuple[object, ...]]]) -> None:
        self._tables = tables

    @classmethod
    def of(cls, roots: Iterable[torch.nn.Module]) -> Structure | None:
        """What these modules and all below them hold now; `None` if one of them is no plain module."""
        tables = []
        for root in roots:
            for module in root.modules():
                attributes = vars(module)
                for name in _TABLES:
                    table = attributes.get(name)
                    if not isinstance(table, dict):
                        return None
                    tables.append((attributes, name, table, tuple(table.values())))
        return cls(tables)

    def is_same(self) -> bool:
        """Whether every module holds what it held."""
        return all(
            attributes.get(name) is table and len(table) == len(held) and all(map(is_, table.values(), held))
            for attributes, name, table, held in self._tables
        )
