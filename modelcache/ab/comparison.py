"""What a run found: differences by item or by block, verdicts, and where its own time went."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from math import isfinite
from os import PathLike
from pathlib import Path
from statistics import fmean, median
from string import ascii_uppercase

from modelcache import format_seconds
from modelcache.ab.arms import Arm
from modelcache.ab.journal import Arrival, Entry, Plan, Run, read_journal, runs_of
from modelcache.ab.metrics import FAILURES, LATENCY, Metric
from modelcache.ab.verdicts import Differences, Judgement, Verdict, judge

# More errors than that say no more, and make a page large.
_MOST_ERRORS = 20


@dataclass(frozen=True, slots=True)
class ArmSummary:
    """One arm by itself.

    Attributes:
        arm: The arm.
        num_calls: Counted calls; `num_failed` of them failed.
        means: Of each metric over the items it did not fail on; for times the median.
        cold_s: The time of its first load, `None` if RAM or VRAM had it before the run.
        switch_s: Of each later arrival.
        vram_bytes: What it holds on the top tier.
    """

    arm: Arm
    num_calls: int
    num_failed: int
    means: dict[str, float]
    cold_s: float | None
    switch_s: tuple[float, ...]
    vram_bytes: int


class Comparison:
    """The result of `compare`; prints as a table.

    Args:
        plan: What was run.
        entries: What happened.
        outputs: Items in words, for the report.
    """

    def __init__(self, plan: Plan, entries: Iterable[Entry], items: tuple[str, ...] = ()) -> None:
        self.plan = plan
        self.entries = list(entries)
        self.items = items

    @classmethod
    def from_log(cls, path: str | PathLike[str]) -> Comparison:
        """The same from the file of a run, finished or not."""
        return cls(*read_journal(path))

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """The calls that count."""
        return tuple(runs_of(self.entries))

    @cached_property
    def arrivals(self) -> tuple[Arrival, ...]:
        """Models brought into place, the first time included."""
        return tuple(entry for entry in self.entries if isinstance(entry, Arrival))

    @property
    def num_items(self) -> int:
        """Items that every arm has answered or failed on."""
        return len(self._complete)

    @property
    def num_disk_loads(self) -> int:
        """Models read from disk after each had been brought up once: nought, if RAM holds them all."""
        return sum(a.found == "disk" for a in self.arrivals if a.block >= 0)

    @property
    def num_switches(self) -> int:
        """Models that had to be brought up for a block; the plan has the least that its order takes."""
        return sum(a.moved for a in self.arrivals if a.block >= 0)

    @property
    def elapsed_s(self) -> float:
        """From the first event to the last."""
        ends = [
            entry.start_s + (entry.seconds if isinstance(entry, Arrival) else sum(entry.seconds.values()))
            for entry in self.entries
        ]
        return max(ends, default=0.0)

    @property
    def is_finished(self) -> bool:
        """All items that were to be used are through."""
        return self.num_items >= self.plan.num_used

    @property
    def is_peeked(self) -> bool:
        """It ends by what it finds, or has not ended: then only figures are used that hold at any time."""
        return self.plan.stops_early or not self.is_finished

    @cached_property
    def judgements(self) -> tuple[Judgement, ...]:
        """Every arm against the baseline, by every metric."""
        return judge(list(self.differences()), level=self.plan.level, peeked=self.is_peeked, seed=self.plan.seed)

    @property
    def is_settled(self) -> bool:
        """Every primary metric of every arm is decided."""
        primary = [one for one in self.judgements if one.differences.metric.name in self.plan.primary]
        return bool(primary) and all(one.verdict is not Verdict.CANNOT_TELL for one in primary)

    @cached_property
    def _complete(self) -> dict[int, dict[str, list[Run]]]:
        """Item -> arm -> its calls, in the order of the run; only items on which all arms are through."""
        found: dict[int, dict[str, list[Run]]] = {}
        for run in self.runs:
            found.setdefault(run.item, {}).setdefault(run.arm, []).append(run)
        whole = len(self.plan.arms) * self.plan.repeats
        return {item: by_arm for item, by_arm in found.items() if sum(map(len, by_arm.values())) == whole}

    @property
    def complete_items(self) -> tuple[int, ...]:
        """Indices of the items that count, in the order of the run."""
        return tuple(self._complete)

    def disagreements(self, metric: Metric) -> list[int]:
        """The same, those first on which some arm differs most from the baseline."""
        base, *others = self.plan.arms

        def most(item: int) -> float:
            found = (self._difference(metric, arm.name, base.name, item) for arm in others)
            return max((abs(value) for value in found if value is not None), default=0.0)

        return sorted(self._complete, key=most, reverse=True)

    def output_of(self, arm: str, item: int) -> str:
        """What an arm gave for an item, in words; its error if it failed."""
        run = self._complete[item][arm][0]
        return run.error or run.output

    @property
    def error_lines(self) -> list[str]:
        """What went wrong, each error of each arm once, with how often; of many the first."""
        counts: dict[tuple[str, str], int] = {}
        for run in self.runs:
            if run.error:
                counts[run.arm, run.error] = counts.get((run.arm, run.error), 0) + 1
        lines = [f"{arm} failed {count} time(s): {error}" for (arm, error), count in counts.items()]
        left_out = len(lines) - _MOST_ERRORS
        return (
            lines
            if left_out <= 0
            else [*lines[:_MOST_ERRORS], f"... and {left_out} other errors; the JSON has them all"]
        )

    def value(self, metric: Metric, arm: str, item: int) -> float | None:
        """The figure of an arm for an item: the mean of its repeats.

        `None` if it is a time and the arm failed. A failed score counts as the worst of the bounds of the metric; where
        none are known, as the worst that any arm got on any item.
        """
        runs = self._complete[item][arm]
        if metric.name == FAILURES:
            return fmean(bool(run.error) for run in runs)
        if metric in self.plan.times:
            stage = metric.name.removesuffix(LATENCY).strip()
            times = [run.seconds[stage] if stage else sum(run.seconds.values()) for run in runs if not run.error]
            return fmean(times) if times else None
        return fmean(run.scores[metric.name] if not run.error else self._worst[metric.name] for run in runs)

    @cached_property
    def _worst(self) -> dict[str, float]:
        """What a failed call scores."""
        found: dict[str, float] = {}
        for metric in map(self._bounded, self.plan.metrics):
            worst_seen = min if metric.better == "higher" else max
            found[metric.name] = (
                worst_seen(self._seen.get(metric.name, [0.0])) if metric.worst is None else metric.worst
            )
        return found

    def _bounded(self, metric: Metric) -> Metric:
        """The same, with the bounds that scores of right and wrong have."""
        are_shares = metric.bounds is None and metric.scale == "difference"
        seen = self._seen.get(metric.name, ()) if are_shares else ()
        return replace(metric, bounds=(0.0, 1.0)) if seen and set(seen) <= {0.0, 1.0} else metric

    @cached_property
    def _seen(self) -> dict[str, list[float]]:
        seen: dict[str, list[float]] = {}
        for run in self.runs:
            for name, score in run.scores.items():
                seen.setdefault(name, []).append(score)
        return seen

    def differences(self) -> Iterator[Differences]:
        """Of every arm from the baseline, by every metric; failures only where there were any."""
        base, *others = self.plan.arms
        has_failed = any(run.error for run in self.runs)
        for metric in self.plan.metrics:
            if metric.name == FAILURES and not has_failed:
                continue
            for arm in others:
                yield self._differences(self._bounded(metric), arm, base)

    def _differences(self, metric: Metric, arm: Arm, base: Arm) -> Differences:
        by_item = {item: self._difference(metric, arm.name, base.name, item) for item in self._complete}
        known = {item: value for item, value in by_item.items() if value is not None}
        num_left_out = len(by_item) - len(known)
        together = any({arm.model, base.model} <= set(group) for group in self.plan.groups)
        if together or metric not in self.plan.times:
            num_guessed = self._num_guessed(metric, arm.name, base.name)
            return Differences(metric, arm.name, base.name, "item", tuple(known.values()), num_guessed, num_left_out)
        # Times of arms that ran in turns: items of a block share what the machine did then, so a pair of blocks is one.
        pairs: dict[int, dict[int, list[float]]] = {}
        for item, value in known.items():
            run = self._complete[item][arm.name][0]
            pairs.setdefault(run.pair, {}).setdefault(run.block, []).append(value)
        values = [fmean(map(fmean, blocks.values())) for blocks in pairs.values()]
        return Differences(metric, arm.name, base.name, "block pair", tuple(values), num_left_out=num_left_out)

    def _num_guessed(self, metric: Metric, arm: str, base: str) -> int:
        """Items whose score is a guess in the arm's favour."""
        if metric.name not in self._seen or metric.worst is not None:
            return 0
        failed = [
            [sum(bool(run.error) for run in by_arm[name]) for name in (arm, base)] for by_arm in self._complete.values()
        ]
        return sum(mine > its for mine, its in failed)

    def _difference(self, metric: Metric, arm: str, base: str, item: int) -> float | None:
        mine, its = self.value(metric, arm, item), self.value(metric, base, item)
        nothing_scored = metric in self.plan.scores and metric.name not in self._seen
        if mine is None or its is None or nothing_scored:
            return None
        return metric.on_scale(mine) - metric.on_scale(its)

    @cached_property
    def arms(self) -> tuple[ArmSummary, ...]:
        """Each arm by itself."""
        return tuple(map(self._summary, self.plan.arms))

    def _summary(self, arm: Arm) -> ArmSummary:
        runs = [run for run in self.runs if run.arm == arm.name]
        arrivals = [a for a in self.arrivals if a.model == arm.model]
        means = {}
        for metric in self.plan.metrics:
            answered = [
                item
                for item, runs in self._complete.items()
                if metric.name == FAILURES or not any(run.error for run in runs[arm.name])
            ]
            values = [v for item in answered if (v := self.value(metric, arm.name, item)) is not None]
            if values:
                means[metric.name] = median(values) if metric in self.plan.times else fmean(values)
        cold = [a.seconds for a in arrivals if a.block < 0 and a.found == "disk"]
        return ArmSummary(
            arm,
            len(runs),
            sum(bool(run.error) for run in runs),
            means,
            cold[0] if cold else None,
            tuple(a.seconds for a in arrivals if a.block >= 0 and a.moved),
            max((a.vram_bytes for a in arrivals), default=0),
        )

    @property
    def residency(self) -> str:
        """What it cost to have the models in place, in words."""
        loads = f"{self.num_disk_loads} disk loads after warm-up"
        switches = f"{self.num_switches} switches (the least for this order: {self.plan.least_switches})"
        waited = sum(a.seconds for a in self.arrivals if a.block >= 0)
        return f"{loads}; {switches}, {format_seconds(waited)} of {format_seconds(self.elapsed_s)}"

    @cached_property
    def ends(self) -> str:
        """How it ended, in words."""
        if self.is_finished:
            return f"all {self.num_items} items"
        is_decided = self.plan.stops_early and self.is_settled
        why = "when the primary metrics were decided" if is_decided else "when its time was up, or it was stopped"
        return f"{self.num_items} of {self.plan.num_items} items: it ended {why}"

    def to_json(self, path: str | PathLike[str] | None = None) -> str:
        """Everything that is needed to compute it again, and the verdicts; written to `path` if there is one."""
        text = json.dumps(
            {
                "format": "modelcache-ab-result",
                "plan": self.plan.as_json(),
                "detectable_deviations": self.plan.detectable if isfinite(self.plan.detectable) else None,
                "items": list(self.items),
                "entries": [{type(e).__name__.lower(): asdict(e)} for e in self.entries],
                "judgements": [one.as_json() for one in self.judgements],
                "num_disk_loads": self.num_disk_loads,
                "num_switches": self.num_switches,
            },
            indent=1,
        )
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    def to_html(self, path: str | PathLike[str], *, blind: bool = False) -> None:
        """One file with the plots, which needs no network.

        Args:
            path: The file.
            blind: Call the arms A, B, ... and keep their names out of the file, as `blinded` does.
        """
        from modelcache.ab.page import write_page

        write_page(Path(path), self.blinded() if blind else self)

    def blinded(self) -> Comparison:
        """The same with the arms called A, B, ..., by lot, and compared with A, whichever arm that is.

        Of an error only its kind is left, since what it says may name the model. Where an output says the name of an
        arm or a model as a word, ``[name]`` stands instead. Times and memory are left as they are, and may tell.
        """
        # The same lot for the table, the page and the JSON of a run; another one for another run.
        lot = random.Random(f"{self.plan.seed} {self.entries[:1]}")
        drawn = lot.sample(self.plan.arms, len(self.plan.arms))
        alias = {arm.name: _letter(place) for place, arm in enumerate(drawn)}
        models = {arm.model: f"model of {alias[arm.name]}" for arm in reversed(drawn)}
        plan = replace(
            self.plan,
            arms=tuple(Arm(alias[arm.name], models[arm.model]) for arm in drawn),
            groups=tuple(tuple(models[model] for model in group) for group in self.plan.groups),
        )
        longest_first = sorted({*alias, *models}, key=len, reverse=True)
        names = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, longest_first))})(?!\w)")

        def without_names(entry: Entry) -> Entry:
            if isinstance(entry, Arrival):
                return replace(entry, model=models[entry.model])
            error, output = (names.sub("[name]", text) for text in (entry.error.partition(":")[0], entry.output))
            return replace(entry, arm=alias[entry.arm], error=error, output=output)

        blind = Comparison(plan, map(without_names, self.entries), self.items)
        # Why a run ended was decided about its own baseline.
        blind.ends = self.ends
        return blind

    def __str__(self) -> str:
        from modelcache.ab.table import as_text

        return as_text(self)


def _letter(place: int) -> str:
    """A, B, ... Z, A1, B1, ..."""
    return f"{ascii_uppercase[place % 26]}{place // 26 or ''}"
