"""The checks of the demo: what was promised, whether it held, and by which number. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from modelcache import format_bytes, format_seconds
from modelcache.demo.records import Budgets, CacheRun, Check, Outcome, Rescue, quantile

_LEAST_ACCURACY = 0.95
_TOLERANCE = 1e-6


def verdicts(rescue: Rescue, reload: Outcome, runs: Sequence[CacheRun], budgets: Budgets) -> tuple[Check, ...]:
    """All checks, in the order of the acts."""
    checks = list(rescue.checks)
    for run in runs:
        checks += [
            Check(f"{run.outcome.title}: {claim}", holds, number)
            for claim, holds, number in (
                *_answers(run, reload),
                *_budgets(run, budgets),
                *_moves(run),
                *_cheaper(run, reload),
                _nothing_left(run),
            )
        ]
    return tuple(checks)


def _answers(run: CacheRun, reload: Outcome) -> list[tuple[str, bool, str]]:
    outcome, compared = run.outcome, run.compared
    num_finite = sum(bool(torch.isfinite(answer).all()) for answer in outcome.answers)
    pairs = list(zip(outcome.answers, reload.answers, strict=False))
    difference = max((float((ours - theirs).abs().max()) for ours, theirs in pairs), default=0.0)
    accuracy = compared.num_right / compared.num_digits if compared.num_digits else 0.0
    expected = len(reload.answers)
    return [
        ("every request was answered", num_finite == expected, f"{num_finite} of {expected}"),
        (
            "answers are those of the same model outside the cache",
            len(pairs) == expected and difference <= _TOLERANCE,
            f"largest difference {difference:.1e}",
        ),
        (
            "weights are those of the same model outside the cache",
            compared.num_equal == compared.num_tensors > 0,
            f"{compared.num_equal} of {compared.num_tensors} tensors equal",
        ),
        (
            "the digits network still reads digits",
            accuracy >= _LEAST_ACCURACY,
            f"{accuracy:.1%} of {compared.num_digits} unseen images",
        ),
    ]


def _budgets(run: CacheRun, budgets: Budgets) -> list[tuple[str, bool, str]]:
    samples, moves = run.outcome.samples, run.outcome.moves
    vram = max(
        [*(max(s.vram_charged_bytes, s.allocated_bytes) for s in samples), *(move.vram_bytes for move in moves)],
        default=0,
    )
    ram = max([*(s.ram_charged_bytes for s in samples), *(move.ram_bytes for move in moves)], default=0)
    looks = f"{len(samples) + len(moves)} looks"
    return [
        (
            "VRAM never exceeded its budget",
            0 < vram <= budgets.vram_bytes,
            f"at most {format_bytes(vram)} of {format_bytes(budgets.vram_bytes)}, {looks}",
        ),
        (
            "RAM never exceeded its budget",
            0 < ram <= budgets.ram_bytes,
            f"at most {format_bytes(ram)} of {format_bytes(budgets.ram_bytes)}, {looks}",
        ),
    ]


def _moves(run: CacheRun) -> list[tuple[str, bool, str]]:
    told = run.told
    num_given_up = sum(move.kind in {"trim", "evict"} for move in run.outcome.moves)
    agree = told.num_events == told.num_heard == told.num_lines and told.num_gaps == 0
    has_reasons = bool(told.reasons) and all(told.reasons)
    return [
        ("copies were given up for others", num_given_up > 0, f"{num_given_up} trims and evictions"),
        (
            "each move has one event and one log line, with a reason",
            agree and has_reasons,
            f"{told.num_events} events, {told.num_heard} heard, {told.num_lines} lines: "
            + ", ".join(f"{reason} {count}" for reason, count in sorted(told.reasons.items())),
        ),
    ]


def _cheaper(run: CacheRun, reload: Outcome) -> list[tuple[str, bool, str]]:
    ours, theirs = run.outcome.moved_bytes, reload.moved_bytes
    median, their_median = quantile(run.outcome.switch_s, 0.5), quantile(reload.switch_s, 0.5)
    return [
        (
            "it moved fewer bytes than delete and reload",
            0 < ours < theirs,
            f"{format_bytes(ours)} instead of {format_bytes(theirs)}: {_ratio(theirs, ours)}",
        ),
        (
            "half of its switches are faster than delete and reload",
            median < their_median,
            f"p50 {format_seconds(median)} instead of {format_seconds(their_median)}",
        ),
    ]


def _nothing_left(run: CacheRun) -> tuple[str, bool, str]:
    left = run.left
    is_clean = not left.threads and not left.files and left.device_bytes <= 0
    number = f"{len(left.threads)} threads, {len(left.files)} files, {max(0, left.device_bytes)} device bytes"
    names = ", ".join((*left.threads, *left.files))
    return ("nothing is left after close", is_clean, f"{number} ({names})" if names else number)


def _ratio(theirs: float, ours: float) -> str:
    return f"{theirs / ours:.1f} times less" if ours > 0 else "nothing at all"
