"""What an exposure log says: whether units were shared out as planned, and whether an arm does better.

Units are compared in pairs of one of an arm and one of the control that came at about the same time (`_pairs`). Which
unit is in which arm is by lot, so the differences are symmetric where the arms are the same, also where the weights are
uneven and the figures drift. Each unit counts with the first figure that it gave, so that what one look has judged the
next look does not change: the verdicts hold at every look at a growing log.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from os import PathLike
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table
from rich.text import Text

from modelcache.ab.assignment import Why
from modelcache.ab.experiment import FORMAT, MEASURED, SECONDS, WAIT
from modelcache.ab.inputs import InputError, is_finite, json_lines
from modelcache.ab.metrics import FAILURES, Metric
from modelcache.ab.statistics import share_p
from modelcache.ab.table import new_table, verdict_table
from modelcache.ab.verdicts import Differences, Judgement, judge

#: Below this chance of coming about by itself, a share of units is taken for a fault of the set-up.
ALARM_P = 0.001
#: So many units that came one after the other are matched with each other. In fewer, chance leaves more of an even
#: split without a partner; in more, partners came further apart, and the figures drift between them.
_BLOCK = 20
#: Errors by which a caller leaves, in asyncio, in trio, or as a generator or the process ends: no fault of an arm.
_LEFT = frozenset({"CancelledError", "Cancelled", "GeneratorExit", "KeyboardInterrupt", "SystemExit"})
_TEXTS = ("experiment", "arm", "why", "unit", "tier", "error")
_KEYS = (*_TEXTS, "weights", "metrics", WAIT, SECONDS)


@dataclass(frozen=True, slots=True)
class ArmExposures:
    """One arm.

    Attributes:
        arm: Its name.
        num_units: That take part; `num_exposures` times they were served.
        num_failed: Exposures that ended in an error.
        num_left: Exposures that the caller did not wait for, as a client that goes away: neither failed nor measured.
        tiers: How often the model was found on each tier: an arm that is found cold more often is slower for that.
        means: Of each metric, over all exposures of each unit; the verdicts are by the first of each.
    """

    arm: str
    num_units: int
    num_exposures: int
    num_failed: int
    num_left: int
    tiers: Mapping[str, int]
    means: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Analysis:
    """One experiment.

    Attributes:
        experiment: Its name.
        arms: The first is the control.
        judgements: Of each other arm, by each metric.
        share_p: The chance that the units were shared out by the weights; `alarm` says if it is too small.
        num_crossing: Units that were served by more than one arm: nought, unless weights were changed. They count where
            they came first, with what they did there.
        num_overridden: Exposures of testers, which do not count.
    """

    experiment: str
    arms: tuple[ArmExposures, ...]
    judgements: tuple[Judgement, ...]
    share_p: float
    num_crossing: int
    num_overridden: int

    @property
    def alarm(self) -> str:
        """What makes the figures worthless, in words; empty if nothing does."""
        if self.share_p < ALARM_P:
            counts = ", ".join(f"{arm.arm} {arm.num_units}" for arm in self.arms)
            return (
                f"units are not shared out by the weights ({counts}; p = {self.share_p:.2g}): some arm loses units, or "
                "the log lines of some are missing. Find out before reading on"
            )
        return ""


@dataclass(slots=True)
class _Unit:
    """One unit, in the arm that it had when it first came.

    Attributes:
        arm: Its name.
        weights: The odds by which it got there; units are only matched where these were the same.
        lines: Its exposures there. Later ones by other weights are left out: who stays in an arm when the weights
            change is not by lot alone.
    """

    arm: str
    weights: tuple[tuple[str, float], ...]
    lines: list[Mapping[str, Any]] = field(default_factory=list)


@dataclass(slots=True)
class _Seen:
    """Everything of one experiment.

    Attributes:
        arms: In the order in which the weights named them.
        units: In the order in which they came.
        first: Metric -> unit -> the first figure that it gave, in the order in which they came.
        expected: How many units each arm would have by the weights.
        crossing: Units that another arm served later.
        num_overridden: Exposures that do not count.
    """

    arms: dict[str, None] = field(default_factory=dict)
    units: dict[str, _Unit] = field(default_factory=dict)
    first: dict[str, dict[str, float]] = field(default_factory=dict)
    expected: Counter[str] = field(default_factory=Counter)
    crossing: set[str] = field(default_factory=set)
    num_overridden: int = 0

    def add(self, line: Mapping[str, Any]) -> None:
        if line["why"] == Why.OVERRIDE:
            self.num_overridden += 1
            return
        name, arm, weights = line["unit"], line["arm"], tuple(sorted(line["weights"].items()))
        self.arms.update(dict.fromkeys(line["weights"]))
        if name not in self.units:
            self.units[name] = _Unit(arm, weights)
            self.expected.update(line["weights"])
        unit = self.units[name]
        if arm != unit.arm:
            self.crossing.add(name)
        if (arm, weights) == (unit.arm, unit.weights):
            unit.lines.append(line)
            for metric, value in _figures(line).items():
                self.first.setdefault(metric, {}).setdefault(name, value)

    def units_of(self, arm: str) -> list[_Unit]:
        return [unit for unit in self.units.values() if unit.arm == arm]


def analyse(
    path: str | PathLike[str], *, lower_is_better: Iterable[str] = (), level: float = 0.05
) -> tuple[Analysis, ...]:
    """Read an exposure log, of one experiment or several.

    Args:
        path: JSON lines, as `Experiment` writes them.
        lower_is_better: Metrics of which less is better; times and failures are known.
        level: The chance of a wrong verdict in one experiment, where arms are the same.

    Raises:
        InputError: No such file, no exposures in it, a line that is not one, or a metric that is in none of them.
    """
    seen: dict[str, _Seen] = {}
    for line in _lines(Path(path)):
        seen.setdefault(line["experiment"], _Seen()).add(line)
    if not seen:
        raise InputError("no exposures in this file yet; serve some units first", str(path))
    known = set(MEASURED).union(*(one.first for one in seen.values()))
    lower = {*lower_is_better, *MEASURED}
    if lower - known:
        listed = ", ".join(map(repr, sorted(known)))
        raise InputError(f"no metric is called {min(lower - known)!r}; this log has {listed}", str(path))
    return tuple(_analysis(name, one, lower, level) for name, one in seen.items())


def _lines(path: Path) -> Iterator[Mapping[str, Any]]:
    if not path.is_file():
        raise InputError("there is no such log; give the file that the experiment writes", str(path))
    for number, text in json_lines(path):
        try:
            line = json.loads(text)
            problem = _problem_of(line)
        except ValueError as error:
            if not text.endswith(b"\n"):
                return  # The last line, which is just being written or was torn by a crash.
            problem = str(error)
        if problem:
            words = f"this is not a line of an exposure log ({problem}); take it out, or give another file"
            raise InputError(words, str(path), number)
        yield line


def _problem_of(line: object) -> str:
    """Why this is no exposure; empty if it is one."""
    if not isinstance(line, dict):
        return "it is not an object"
    if line.get("format") != FORMAT:
        return f"its format is {line.get('format')!r}, not {FORMAT!r}"
    missing = [key for key in _KEYS if key not in line]
    if missing:
        return f"it has no {missing[0]!r}"
    for key in _TEXTS:
        if not isinstance(line[key], str):
            return f"its {key!r} is {line[key]!r}, not text"
    for key in ("weights", "metrics"):
        if not isinstance(line[key], dict):
            return f"its {key!r} are {line[key]!r}, not numbers by name"
    for key, number in chain(line["weights"].items(), line["metrics"].items(), ((k, line[k]) for k in (WAIT, SECONDS))):
        if not is_finite(number):
            return f"its {key!r} is {number!r}, not a finite number"
    if min(line["weights"].values(), default=0) <= 0:
        return f"its weights are {line['weights']}, not all positive"
    if line["why"] not in (Why.ASSIGNED, Why.OVERRIDE):
        return f"its why is {line['why']!r}, not {str(Why.ASSIGNED)!r} or {str(Why.OVERRIDE)!r}"
    return "" if line["arm"] in line["weights"] else f"its arm {line['arm']!r} is none of its weights"


def _analysis(name: str, seen: _Seen, lower: set[str], level: float) -> Analysis:
    metrics = [
        Metric(name, None, "lower" if name in lower else "higher", unit="s" if name in (SECONDS, WAIT) else "")
        for name in sorted(seen.first)
        if name != FAILURES or any(seen.first[FAILURES].values())
    ]
    control, *others = seen.arms
    found = [
        Differences(metric, arm, control, "unit pair", tuple(_differences(seen, metric.name, arm, control)))
        for metric in metrics
        for arm in others
    ]
    arms = tuple(_arm(arm, seen.units_of(arm)) for arm in seen.arms)
    return Analysis(
        name,
        arms,
        judge(found, level=level, peeked=True),
        share_p([arm.num_units for arm in arms], [seen.expected[arm] for arm in seen.arms]),
        len(seen.crossing),
        seen.num_overridden,
    )


def _figures(line: Mapping[str, Any]) -> dict[str, float]:
    """Of one exposure; of one that failed only that it did, and none of one that the caller did not wait for."""
    if line["error"] in _LEFT:
        return {}
    if line["error"]:
        return {FAILURES: 1.0}
    return {**line["metrics"], SECONDS: line["seconds"], WAIT: line["wait_s"], FAILURES: 0.0}


def _differences(seen: _Seen, metric: str, arm: str, control: str) -> Iterator[float]:
    values = seen.first[metric]
    arms = {name: seen.units[name].arm for name in values if seen.units[name].arm in (arm, control)}
    waiting: dict[tuple[tuple[str, float], ...], dict[str, str]] = {}
    for name, its in arms.items():
        weights = seen.units[name].weights
        block = waiting.setdefault(weights, {})
        block[name] = its
        if len(block) == _BLOCK:
            for mine, other in _pairs(waiting.pop(weights), arm):
                yield values[mine] - values[other]


def _pairs(arms: Mapping[str, str], arm: str) -> Iterator[tuple[str, str]]:
    """Match each unit of the rarer of two arms with one of the other arm, drawn by lot without looking at the arms.

    Exchange the arms of two partners: the units were as likely to be given out that way, because their odds were the
    same, and as likely to be matched that way, because each matching of so many with so many is. So each partner is as
    likely to be the one in `arm`, whatever the other pairs are: where the arms are the same, the differences have signs
    like coin flips, for any weights and any drift.

    Args:
        arms: Of each unit of one block, one of two.
        arm: The one whose units come first in the pairs.
    """
    # The lot is a hash, so that the same log always gives the same pairs.
    shuffled = sorted(arms, key=lambda unit: hashlib.sha256(f"pairs\0{unit}".encode("utf-8", "surrogatepass")).digest())
    ours = [unit for unit in shuffled if arms[unit] == arm]
    theirs = [unit for unit in shuffled if arms[unit] != arm]
    return zip(ours, theirs, strict=False)


def _arm(arm: str, units: Sequence[_Unit]) -> ArmExposures:
    lines = [line for unit in units for line in unit.lines]
    values: dict[str, list[float]] = {}
    for unit in units:
        for name, value in _means(unit).items():
            values.setdefault(name, []).append(value)
    return ArmExposures(
        arm,
        len(units),
        len(lines),
        sum(bool(line["error"]) and line["error"] not in _LEFT for line in lines),
        sum(line["error"] in _LEFT for line in lines),
        dict(Counter(line["tier"] for line in lines)),
        {name: fmean(values[name]) for name in sorted(values)},
    )


def _means(unit: _Unit) -> dict[str, float]:
    """Of each metric, over the unit's exposures."""
    values: dict[str, list[float]] = {}
    for line in unit.lines:
        for name, value in _figures(line).items():
            values.setdefault(name, []).append(value)
    return {name: fmean(each) for name, each in values.items()}


def as_tables(found: Analysis) -> Iterator[Table | Text]:
    """What was found, for a terminal."""
    yield Text(f"{found.experiment}: {sum(arm.num_units for arm in found.arms)} units", "bold")
    names = sorted({name for arm in found.arms for name in arm.means})
    arms = new_table(
        "arm", ">units", ">exposures", ">failed", ">left", ">vram/ram/disk", *(f">{name}" for name in names)
    )
    for arm in found.arms:
        tiers = "/".join(str(arm.tiers.get(tier, 0)) for tier in ("vram", "ram", "disk"))
        means = [f"{arm.means[name]:.4g}" if name in arm.means else "-" for name in names]
        counts = (arm.num_units, arm.num_exposures, arm.num_failed, arm.num_left)
        arms.add_row(Text(arm.arm), *map(str, counts), tiers, *means)
    yield arms
    yield verdict_table(found.judgements)
    for one in found.judgements:
        yield Text(one.sentence + ".")
    asides = f"{found.num_overridden} exposures of overrides do not count"
    if found.num_crossing:
        asides += (
            f"; {found.num_crossing} units were served by several arms and count in their first: were weights changed?"
        )
    yield Text(f"{asides}. Verdicts are by the first figure of each unit, and hold at every look.", "dim")


def as_json(found: Analysis) -> dict[str, object]:
    """What was found, for programs."""
    return {
        "experiment": found.experiment,
        "arms": [asdict(arm) for arm in found.arms],
        "judgements": [one.as_json() for one in found.judgements],
        "share_p": found.share_p,
        "alarm": found.alarm,
        "num_crossing": found.num_crossing,
        "num_overridden": found.num_overridden,
    }
