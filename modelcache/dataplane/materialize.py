"""Make a dispatched model whole: every meta tensor real, accelerate's hooks off, `.to()` working again.

Three phases, and only the last one writes. *Plan* finds where the data of every placeholder is. *Stage* makes every new
tensor beside the model. *Commit* swaps pointers, all of them or none. Whatever fails before, Ctrl-C included, leaves
the model as it was.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar
from weakref import WeakKeyDictionary

import torch

from modelcache.dataplane import accelerate_state as state
from modelcache.dataplane.materialize_files import FileBytes, FileProblemError
from modelcache.dataplane.materialize_journal import ABSENT, Entry, Swap, swap_all
from modelcache.dataplane.materialize_plan import Plan, Unit, make_plan, open_extra
from modelcache.dataplane.materialize_restore import ATTRIBUTE, OnModified, Snapshot, put_back, take_snapshot
from modelcache.dataplane.materialize_slots import find_places, size_bytes, unwrapped
from modelcache.dataplane.materialize_stage import Report, Staged, Stager, needed_bytes
from modelcache.dataplane.materialize_ties import TiedNames, collect_claims, unite
from modelcache.dataplane.probe_ram import RamProbe
from modelcache.errors import MaterializeError, MaterializeMemoryError
from modelcache.units import format_bytes

ModelT = TypeVar("ModelT")
CopyMode = Literal["auto", "always"]
ProgressReport = Callable[[int, int, str], None]

# Not all of what is free is to be had: allocators round, and the process itself grows a little.
_MARGIN_BYTES = 32 << 20
