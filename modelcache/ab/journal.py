"""The run's own record: JSON lines, from which a run is taken up again and a report is made."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import takewhile
from os import PathLike
from pathlib import Path
from typing import Any, TextIO

from modelcache import __version__
from modelcache.ab.arms import Arm
from modelcache.ab.inputs import InputError, identity, is_finite, json_lines
from modelcache.ab.metrics import FAILURES, LATENCY, Metric
from modelcache.ab.statistics import smallest_detectable

FORMAT = "modelcache-ab-run"
# What the first line begins with.
_HEAD = f'{{"format": "{FORMAT}"'.encode()


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run is: everything that must be the same for it to be taken up again.

    Attributes:
        arms: The first is the baseline.
        metrics: What is measured: first the scores, then the time of a call and of its stages, then failures.
        primary: Names of the metrics that decide when enough is known.
        num_items: There are, of which `items` is the digest.
        repeats: Calls of each arm for each item.
        seed: Of the order and the resampling.
        groups: Models that were in place together.
        num_pairs: Of blocks, if one was asked for.
        max_items: At most so many are used.
        stops_early: It is looked at all the while, and ends when the primary metrics are decided.
        level: The chance of a wrong verdict that is accepted.
        version: Of modelcache.
    """

    arms: tuple[Arm, ...]
    metrics: tuple[Metric, ...]
    primary: tuple[str, ...]
    num_items: int
    items: str
    repeats: int
    seed: int
    groups: tuple[tuple[str, ...], ...]
    num_pairs: int | None
    max_items: int | None
    stops_early: bool
    level: float
    least_switches: int
    version: str = __version__

    @property
    def num_used(self) -> int:
        """Items that the run was to have."""
        return min(self.num_items, self.max_items or self.num_items)

    @property
    def detectable(self) -> float:
        """What so many items show, known before the run: in standard deviations of the differences by item.

        At `level` four times of five, by `smallest_detectable`: at the end, and before anything is corrected.
        """
        return smallest_detectable(self.num_used, level=self.level)

    @property
    def reach(self) -> str:
        """The same in words."""
        return (
            f"Four times of five, {self.num_used} items show a difference of {self.detectable:.2g} standard deviations "
            "of the differences by item"
        )

    @property
    def scores(self) -> tuple[Metric, ...]:
        """The metrics that a callable gives: they come before the time of a call."""
        return tuple(takewhile(lambda metric: metric.name != LATENCY, self.metrics))

    @property
    def times(self) -> tuple[Metric, ...]:
        """The time of a call and, if it has several, of its stages."""
        return tuple(metric for metric in self.metrics[len(self.scores) :] if metric.name != FAILURES)

    def as_json(self) -> dict[str, Any]:
        """As the first line says it."""
        found = {name: getattr(self, name) for name in Plan.__slots__}
        found["arms"] = [
            {"name": a.name, "model": a.model, "settings": {k: _plain(v) for k, v in a.settings.items()}}
            for a in self.arms
        ]
        found["metrics"] = [metric.as_json() for metric in self.metrics]
        found["primary"] = list(self.primary)
        found["groups"] = [list(group) for group in self.groups]
        return found

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Plan:
        """What `as_json` gave."""
        return cls(
            **{
                **found,
                "arms": tuple(Arm(a["name"], a["model"], a["settings"]) for a in found["arms"]),
                "metrics": tuple(map(Metric.from_json, found["metrics"])),
                "primary": tuple(found["primary"]),
                "groups": tuple(tuple(group) for group in found["groups"]),
            }
        )


@dataclass(frozen=True, slots=True)
class Run:
    """One call.

    Attributes:
        arm: Its name.
        item: Its index among the items.
        repeat: The how-manieth time, from 0.
        block: In which block.
        pair: In which pair of blocks.
        start_s: Since the run began, interruptions not counted.
        seconds: Of each stage.
        scores: By metric.
        output: In words, cut.
        error: What went wrong; empty if nothing.
        is_warm_up: Not counted.
    """

    arm: str
    item: int
    repeat: int
    block: int
    pair: int
    start_s: float
    seconds: Mapping[str, float] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    output: str = ""
    error: str = ""
    is_warm_up: bool = False


@dataclass(frozen=True, slots=True)
class Arrival:
    """One model brought into place for a block.

    Attributes:
        model: Its name.
        block: For which block; -1 for the first time, before any.
        found: The tier it was on when it was asked for.
        start_s: Since the run began.
        seconds: Until it was usable.
        moved: It was not in place when the last block began; it may have been prefetched since.
        vram_bytes: What it holds there (of RAM, where that is the top tier).
    """

    model: str
    block: int
    found: str
    start_s: float
    seconds: float
    moved: bool
    vram_bytes: int


Entry = Run | Arrival
_KINDS: dict[str, type[Run | Arrival]] = {"run": Run, "arrival": Arrival}
# What is of the kind that a field is annotated with.
_IS: dict[str, Callable[[Any], bool]] = {
    "str": lambda value: isinstance(value, str),
    "bool": lambda value: isinstance(value, bool),
    "int": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "float": is_finite,
    "Mapping[str, float]": lambda value: isinstance(value, dict) and all(map(is_finite, value.values())),
}


class Journal:
    """Appends entries to a file, one line each, handed to the system at once; without a file only keeps them.

    The file is locked until it is closed, so that two processes do not go on with one run.

    Raises:
        InputError: The file is of another run, has a line that is not of a run, or is in use.
    """

    def __init__(self, plan: Plan, path: Path | None) -> None:
        self.plan = plan
        self.entries: list[Entry] = []
        self._file: TextIO | None = None
        if path is None:
            return
        head = json.dumps({"format": FORMAT, "plan": plan.as_json()}, allow_nan=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        try:
            _lock(self._file, path)
            self._begin(path, head)
        except BaseException:
            self.close()
            raise

    def _begin(self, path: Path, head: str) -> None:
        if not is_begun(path):
            os.truncate(path, 0)
            self._put(head)
            return
        found, _ = read_journal(path)
        require_same(found, self.plan, path)
        # Only now: nothing is cut off a file that is of something else.
        _drop_torn_line(path)
        _, self.entries = read_journal(path)

    def add(self, entry: Entry) -> None:
        """Record one."""
        self.entries.append(entry)
        if self._file is not None:
            self._put(json.dumps({type(entry).__name__.lower(): asdict(entry)}, allow_nan=False))

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _put(self, line: str) -> None:
        assert self._file is not None
        self._file.write(line + "\n")
        self._file.flush()


def is_begun(path: Path) -> bool:
    """Whether there is something to go on with, or to refuse; not if a crash has torn the first line of a run.

    Raises:
        InputError: It is a folder.
    """
    if path.is_dir():
        raise InputError("this is a folder; a run is recorded in a file", str(path))
    if not path.exists():
        return False
    with path.open("rb") as file:
        first = file.readline()
    is_torn = not first.endswith(b"\n") and first[: len(_HEAD)] == _HEAD[: len(first)]
    return not is_torn


def read_journal(path: str | PathLike[str]) -> tuple[Plan, list[Entry]]:
    """What a file of a run says.

    Raises:
        InputError: There is none, it is not one, or a line in it is foreign; a last line that a crash has torn is left
            out.
    """
    place = Path(path)
    if not place.is_file():
        what = "this is a folder" if place.is_dir() else "there is no such file"
        raise InputError(f"{what}; give the file that compare(log=...) has written", str(place))
    lines = list(json_lines(place))
    if not lines:
        raise InputError("this file is empty; it holds no run", str(place))
    plan: Plan | None = None
    entries: list[Entry] = []
    for number, line in lines:
        is_torn = number == lines[-1][0] and not line.endswith(b"\n")
        try:
            found = json.loads(line)
            if plan is None:
                _require_format(found["format"])
                plan = Plan.from_json(found["plan"])
            else:
                entries.append(_entry(found, plan))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if is_torn and plan is not None:
                break
            what = "the first line of a run" if plan is None else "a line of a run"
            raise InputError(
                f"this is not {what} ({error}); take the line out, or give another file", str(place), number
            ) from None
    assert plan is not None
    return plan, entries


def _entry(found: Mapping[str, Any], plan: Plan) -> Entry:
    """One line.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: It is foreign.
    """
    ((kind, facts),) = found.items()
    entry = _KINDS[kind](**facts)
    for each in fields(entry):
        value = getattr(entry, each.name)
        if not _IS[str(each.type)](value):
            raise ValueError(f"its {each.name!r} is {value!r}")
    if isinstance(entry, Arrival):
        known, name = {arm.model for arm in plan.arms}, entry.model
    else:
        known, name = {arm.name for arm in plan.arms}, entry.arm
        if not (0 <= entry.item < plan.num_items and 0 <= entry.repeat < plan.repeats):
            raise ValueError(f"there is no item {entry.item}, repeat {entry.repeat}")
    if name not in known:
        raise ValueError(f"{name!r} is none of the run's {', '.join(map(repr, sorted(known)))}")
    return entry


def _require_format(found: object) -> None:
    if found != FORMAT:
        raise ValueError(f"its format is {found!r}, not {FORMAT!r}")


def _lock(file: TextIO, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(
            "this run is going on, here or in another process; wait until it ends, or give another file", str(path)
        ) from None


def _drop_torn_line(path: Path) -> None:
    """Cut off what a crash left of a last line: what it was for is done again."""
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole != len(data):
        with path.open("r+b") as file:
            file.truncate(whole)


def require_same(found: Plan, plan: Plan, path: Path) -> None:
    """Refuse to go on with another run's file.

    Raises:
        InputError: The plan that was `found` in the file at `path` is of another run; names what differs.
    """
    before, now = found.as_json(), json.loads(json.dumps(plan.as_json()))
    for key in before:
        if key not in ("groups", "least_switches", "version") and before[key] != now[key]:
            raise InputError(
                f"this run was made with other {key} ({_cut(before[key])}, now {_cut(now[key])}); give the same to "
                "take it up again, or another file to begin anew",
                str(path),
                1,
            )


def _cut(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) < 80 else text[:77] + "..."


def _plain(value: object) -> object:
    """A setting as JSON has it; what it does not know, and what it would give back as something else, as a text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    return value if isinstance(value, (str, int, type(None))) else identity(value)


def runs_of(entries: list[Entry]) -> Iterator[Run]:
    """The calls that count."""
    return (entry for entry in entries if isinstance(entry, Run) and not entry.is_warm_up)
