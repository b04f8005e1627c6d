"""The offline comparison: every arm on every item, in an order that is fair to all, with the models kept in place."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import zip_longest
from os import PathLike
from pathlib import Path
from time import perf_counter
from typing import Any

from modelcache import ModelCache, Tier, format_bytes
from modelcache.ab.arms import Arm, read_arms
from modelcache.ab.bench import Bench, Stage, Work, in_words
from modelcache.ab.comparison import Comparison
from modelcache.ab.inputs import InputError, read_items
from modelcache.ab.journal import Entry, Journal, Plan, is_begun, require_same, runs_of
from modelcache.ab.metrics import LATENCY, Metric, failures, latency
from modelcache.ab.schedule import Groups, Schedule, group_models, least_promotions, make_schedule

# A look at the figures takes time in proportion to them: beyond so many items not each one is looked at.
_EACH_UP_TO = 200


def compare(
    cache: ModelCache,
    arms: Iterable[Arm | str],
    items: Iterable[Any] | str | PathLike[str],
    *,
    run: Stage | Mapping[str, Stage],
    score: Callable[[Any, Any], float] | Sequence[Metric] = (),
    repeats: int = 1,
    seed: int = 0,
    latency_margin: float | None = None,
    level: float = 0.05,
    stop_early: bool = False,
    primary: Sequence[str] = (),
    max_items: int | None = None,
    max_seconds: float | None = None,
    warm_up: int = 2,
    num_pairs: int | None = None,
    allow_disk: bool = False,
    log: str | PathLike[str] | None = None,
    show: Callable[[Any], str] = repr,
    on_progress: Callable[[str], object] = lambda _line: None,
    clock: Callable[[], float] = perf_counter,
) -> Comparison:
    """Compare two or more arms on the same items, without reloading them.

    Each model is brought up once. Arms whose models fit together take turns item by item; those that do not run in
    blocks, with the next block's models on their way up as one ends. The first arm is the baseline.

    Args:
        cache: Its models are compared. Other work on it meanwhile is served, and disturbs the times.
        arms: Names of registered models, or `Arm`. One name twice compares a model with itself.
        items: A list, or the path of a ``.jsonl`` or ``.csv`` file.
        run: ``run(model, item, **settings)`` gives an output; it gets the raw model, on its device. Or stages by name,
            in order: the first gets ``(model, item, **settings)``, each later one ``(model, what the last one gave)``.
        score: ``score(output, item)``, more is better; or a list of `Metric`. Times and failures are measured anyway.
        repeats: Calls of each arm for each item.
        seed: Of the order and the resampling: the same seed, the same run.
        latency_margin: How much slower, relatively, is still acceptable: 0.05 is 5 %. Times have no bounds: with
            `stop_early` no arm is called no slower.
        level: The chance of a wrong verdict, over all arms and metrics, where arms are the same.
        stop_early: End as soon as every primary metric is decided. Verdicts then hold at any time, at the price of
            wider intervals.
        primary: Names of the metrics that `stop_early` waits for. Default: the scores, or the time where none is given.
        max_items: Use so many of the items, drawn by lot.
        max_seconds: End after so long, once the item (or pair of blocks) at hand is done.
        warm_up: Calls after each arrival of a model that are not counted.
        num_pairs: Of blocks, where not all models fit together. Default: 6 to 10, by the number of items.
        allow_disk: Go on although RAM does not hold all models, so that switches read from disk.
        log: A file of JSON lines, written as it goes. If it holds the same run, unfinished, the run is taken up again.
        show: An output or an item in words, for the report; what it fails on is shown by its `repr`.
        on_progress: Called with a line now and then.
        clock: In seconds.

    Raises:
        InputError: Bad input: nothing was run, except where a score turns out not to be a number, or not above nought
            though it is compared by ratio.
    """
    given, things = read_arms(cache, arms), read_items(items)
    _require_counts(1, repeats=repeats, max_items=max_items, num_pairs=num_pairs)
    _require_counts(0, seed=seed, warm_up=warm_up)
    if not (_is_number(level) and 0 < level < 1):
        raise InputError(f"level is between 0 and 1, such as 0.05, got {level!r}")
    if max_seconds is not None and not (_is_number(max_seconds) and max_seconds > 0):
        raise InputError(f"max_seconds is a number of seconds above 0, got {max_seconds!r}")
    stages = dict(run) if isinstance(run, Mapping) else {"run": run}
    metrics = _metrics(stages, score, latency_margin)
    main = _primary(primary, metrics)
    path = None if log is None else Path(log)
    plan = Plan(
        arms=given,
        metrics=tuple(metrics),
        primary=main,
        num_items=len(things.values),
        items=things.digest,
        repeats=repeats,
        seed=seed,
        groups=(),
        num_pairs=num_pairs,
        max_items=max_items,
        stops_early=stop_early,
        level=level,
        least_switches=0,
    )
    before = _before(path, plan)
    waiting: list[Entry] = []
    bench = Bench(cache, given, things, Work(stages, metrics, warm_up, show, clock), waiting.append)
    bench.go_on_from(before.elapsed_s if before is not None else 0.0)
    failed = bench.bring_up_all(bench.models)
    if not allow_disk:
        _require_ram(cache, set(bench.models) - set(failed))
    groups = _groups(cache, bench.models, failed) if before is None else before.plan.groups
    if before is not None:
        _require_room(cache, groups, failed, str(path))
    schedule = make_schedule(
        len(things.values),
        [arm.model for arm in given],
        groups,
        num_used=plan.num_used,
        repeats=repeats,
        seed=seed,
        num_pairs=num_pairs,
        promotions=_promotions(cache, bench.models, bench.in_place),
    )
    least_switches = schedule.least_switches if before is None else before.plan.least_switches
    plan = replace(plan, groups=groups, least_switches=least_switches)
    on_progress(f"{schedule}\n{plan.reach}")
    with closing(Journal(plan, path)) as journal:
        for entry in waiting:
            journal.add(entry)
        bench.record = journal.add
        for _ in _stops(bench, schedule, journal, on_progress):
            is_late = max_seconds is not None and bench.now_s >= max_seconds
            if is_late or (stop_early and _may_look(journal) and Comparison(plan, journal.entries).is_settled):
                break
        return Comparison(plan, journal.entries, tuple(in_words(item, show) for item in things.values))


def _before(path: Path | None, plan: Plan) -> Comparison | None:
    """The run that is to be taken up, if there is one: of the same plan, but for what only the models can tell."""
    if path is None or not is_begun(path):
        return None
    found = Comparison.from_log(path)
    require_same(found.plan, plan, path)
    return found


def _stops(bench: Bench, schedule: Schedule, journal: Journal, on_progress: Callable[[str], object]) -> Generator[None]:
    """Run what the journal does not have yet; yields where the run may end: after items, or pairs of blocks."""
    arms = journal.plan.arms
    done = {(run.arm, run.item, run.repeat) for run in runs_of(journal.entries)}
    yield
    for block, following in zip_longest(schedule.blocks, schedule.blocks[1:]):
        calls = [call for call in block.calls if (arms[call.arm].name, call.item, call.repeat) not in done]
        if not calls:
            continue
        if block.number * 10 // len(schedule.blocks) != (block.number - 1) * 10 // len(schedule.blocks):
            on_progress(f"block {block.number + 1} of {len(schedule.blocks)}: {', '.join(block.models)}")
        is_pair_end = following is None or following.pair != block.pair
        with closing(bench.run_block(block, calls, following)) as running:
            for call, after in zip_longest(running, calls[1:]):
                if schedule.is_interleaved and (after is None or after.item != call.item):
                    yield
        if not schedule.is_interleaved and is_pair_end:
            yield


def _may_look(journal: Journal) -> bool:
    """At each of the first items, then about a hundred times more for each tenfold."""
    count = len({run.item for run in runs_of(journal.entries)})
    return count <= _EACH_UP_TO or count % (count // 100) == 0


def _metrics(
    stages: Mapping[str, Stage], score: Callable[[Any, Any], float] | Sequence[Metric], margin: float | None
) -> list[Metric]:
    if not stages or not all(callable(stage) for stage in stages.values()):
        raise InputError("run is a callable, or a mapping of names to callables with one at the least")
    unnamed = next((name for name in stages if not isinstance(name, str) or not name or name != name.strip()), None)
    if unnamed is not None:
        raise InputError(f"run: a stage has a name without spaces around it, got {unnamed!r}")
    scores = [Metric(_name_of(score), score)] if callable(score) else score
    if not isinstance(scores, Sequence):
        raise InputError(f"score is a callable, or a list of Metric(name, callable), got {score!r}")
    for metric in scores:
        if not isinstance(metric, Metric) or not callable(metric.measure):
            raise InputError(f"score is a callable, or a list of Metric(name, callable), got {metric!r}")
        if not isinstance(metric.name, str) or not metric.name.strip():
            raise InputError(f"score: a metric has a name, got {metric.name!r}")
    parts = [latency(name) for name in stages] if len(stages) > 1 else []
    metrics = [*scores, latency(margin=margin), *parts, failures()]
    names = [metric.name for metric in metrics]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise InputError(f"two metrics are called {doubled[0]!r}; give one of them another name")
    return metrics


def _name_of(score: Callable[[Any, Any], float]) -> str:
    name = getattr(score, "__name__", "score")
    return "score" if name == "<lambda>" else name


def _primary(asked: Sequence[str], metrics: Sequence[Metric]) -> tuple[str, ...]:
    if isinstance(asked, str):
        raise InputError(f"primary is a list of names, got the string {asked!r}; write [{asked!r}]")
    unknown = sorted(set(asked) - {metric.name for metric in metrics})
    if unknown:
        known = ", ".join(repr(metric.name) for metric in metrics)
        raise InputError(f"primary: no metric is called {unknown[0]!r}; there are {known}")
    return tuple(asked) or tuple(metric.name for metric in metrics if metric.measure is not None) or (LATENCY,)


def _require_counts(least: int, **counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and (not isinstance(count, int) or count < least):
            raise InputError(f"{name} is a whole number from {least}, got {count!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float))


def _require_ram(cache: ModelCache, models: set[str]) -> None:
    """Each was brought up once: one that is on disk again had to go because RAM does not hold them all."""
    gone = sorted(model for model in models if cache.info(model).tier is Tier.DISK)
    if gone:
        room = format_bytes(cache.status().tier(Tier.RAM).budget_bytes)
        raise InputError(
            f"RAM ({room}) does not hold all arms: {', '.join(gone)} had to go back to disk, so that switches would be "
            "loads; raise budgets.ram, compare fewer arms at a time, or pass allow_disk=True"
        )


def _groups(cache: ModelCache, models: Sequence[str], failed: Mapping[str, str]) -> Groups:
    """What fits together, by the cache's own plan; models that did not come up need no room."""
    alive = [model for model in models if model not in failed]
    groups = group_models(alive, lambda names: cache.plan(*names).fits) if alive else ((),)
    return ((*groups[0], *failed), *groups[1:])


def _require_room(cache: ModelCache, groups: Groups, failed: Mapping[str, str], path: str) -> None:
    """Groups of a run that is taken up still fit; else calls would fail for want of room and be counted as failures."""
    for group in groups:
        alive = [model for model in group if model not in failed]
        if len(alive) > 1 and not cache.plan(*alive).fits:
            raise InputError(
                f"in this run {', '.join(alive)} were in place together, and now they do not fit; give the cache as "
                "much room as it had, or another file to begin anew",
                path,
                1,
            )


def _promotions(
    cache: ModelCache, models: Sequence[str], in_place: frozenset[str]
) -> Callable[[Sequence[tuple[str, ...]]], int]:
    infos = [cache.info(model) for model in models]
    sizes = {info.name: (info.vram_bytes or info.size_bytes or 0) + info.workspace_bytes for info in infos}
    room = cache.status().tiers[0].budget_bytes
    return lambda visits: least_promotions(visits, sizes, room, in_place)
