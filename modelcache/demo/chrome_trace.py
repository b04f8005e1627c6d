"""The runs as a trace in Chrome's JSON format, which Perfetto (ui.perfetto.dev) and chrome://tracing open."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from modelcache.demo.records import TIERS, MoveFact, Outcome

Event = dict[str, Any]

_REQUESTS = 1
_US = 1e6


def write_trace(path: Path, outcomes: Sequence[Outcome], names: Sequence[str], label: str) -> None:
    """One process a run: a track of requests, tracks of moves per link, a counter per tier."""
    events = [event for pid, outcome in enumerate(outcomes, 1) for event in _process(pid, outcome, names)]
    document = {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"models": label}}
    path.write_text(json.dumps(document, separators=(",", ":")), encoding="utf-8")


def _process(pid: int, outcome: Outcome, names: Sequence[str]) -> Iterator[Event]:
    yield _named("process_name", pid, 0, outcome.title)
    yield {"ph": "M", "name": "process_sort_index", "pid": pid, "tid": 0, "args": {"sort_index": pid}}
    yield _named("thread_name", pid, _REQUESTS, "requests")
    yield from _requests(pid, outcome)
    for tid, (track, moves) in enumerate(tracks(outcome.moves), _REQUESTS + 1):
        yield _named("thread_name", pid, tid, track)
        yield {"ph": "M", "name": "thread_sort_index", "pid": pid, "tid": tid, "args": {"sort_index": tid}}
        yield from (_move(pid, tid, move) for move in moves)
    for sample in outcome.samples:
        for tier in TIERS:
            args = dict(zip(names, sample.held[tier], strict=True))
            yield {"ph": "C", "name": f"{tier} bytes", "pid": pid, "ts": sample.at_s * _US, "args": args}


def _requests(pid: int, outcome: Outcome) -> Iterator[Event]:
    for served in outcome.served:
        args = {"number": served.request.number, "found in": served.tier}
        whole = (served.asked_s, served.done_s)
        for name, (start_s, end_s) in (
            (served.request.model, whole),
            ("wait", (served.asked_s, served.ready_s)),
            ("answer", (served.ready_s, served.done_s)),
        ):
            yield _span(pid, _REQUESTS, name, "request", start_s, end_s, args)


def _move(pid: int, tid: int, move: MoveFact) -> Event:
    args = {
        "reason": move.reason,
        "for": move.on_behalf_of,
        "size_bytes": move.size_bytes,
        "copied_bytes": move.copied_bytes,
        "seq": move.number,
    }
    return _span(pid, tid, f"{move.kind} {move.model}", "move", move.start_s, move.end_s, args)


def tracks(moves: Iterable[MoveFact]) -> list[tuple[str, list[MoveFact]]]:
    """The moves of each link, on as many tracks as keep those of one track from overlapping."""
    by_link: dict[str, list[list[MoveFact]]] = {}
    for move in sorted(moves, key=lambda move: move.start_s):
        lanes = by_link.setdefault(move.link, [])
        lane = next((lane for lane in lanes if lane[-1].end_s <= move.start_s), None)
        if lane is None:
            lanes.append(lane := [])
        lane.append(move)
    return [
        (link if len(lanes) == 1 else f"{link} ({number})", lane)
        for link, lanes in sorted(by_link.items())
        for number, lane in enumerate(lanes, 1)
    ]


def _span(pid: int, tid: int, name: str, category: str, start_s: float, end_s: float, args: Event) -> Event:
    times = {"ts": round(start_s * _US, 1), "dur": round(max(0.0, end_s - start_s) * _US, 1)}
    return {"ph": "X", "name": name, "cat": category, "pid": pid, "tid": tid, **times, "args": args}


def _named(kind: str, pid: int, tid: int, name: str) -> Event:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}
