"""One run as a drawing: the tiers filled by model over time, the moves between them, and the requests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from itertools import pairwise

from modelcache import format_bytes, format_seconds
from modelcache.demo.chrome_trace import tracks
from modelcache.demo.records import TIERS, Budgets, MoveFact, Outcome, Sample

WIDTH, _LEFT, _RIGHT = 1140, 120, 16
_TIER_HEIGHT, _LANE_HEIGHT, _REQUEST_HEIGHT, _GAP = 110, 18, 32, 14
#: How the drawing looks.
INK = (
    "svg text{fill:var(--dim);font:12px system-ui,sans-serif}svg text.name{fill:var(--fg);font-weight:600}"
    "svg .axis{stroke:var(--line)}svg .budget{stroke:var(--bad);stroke-dasharray:5 4}svg .pale{opacity:.35}"
)
# Narrower bars are no longer seen.
_LEAST_WIDTH = 0.8


def timeline(outcome: Outcome, names: Sequence[str], budgets: Budgets) -> str:
    """The drawing of one run, as SVG in a box that scrolls on narrow screens."""
    pieces, height = draw(outcome, names, budgets)
    label = f"Tiers, moves and requests of {outcome.title} over {format_seconds(outcome.seconds)}"
    return (
        f'<div class="scroll"><svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">'
        f"{pieces}</svg></div>"
    )


def draw(outcome: Outcome, names: Sequence[str], budgets: Budgets, *, has_tips: bool = True) -> tuple[str, float]:
    """The pieces of that drawing, `WIDTH` wide, and their height; `has_tips`: words for what is pointed at."""
    drawing = _Drawing(outcome, names, has_tips=has_tips)
    if outcome.samples:
        for tier, budget in zip(TIERS, (budgets.vram_bytes, budgets.ram_bytes, 0), strict=True):
            if budget or any(any(sample.held[tier]) for sample in outcome.samples):
                drawing.tier(tier, budget)
        drawing.moves()
    drawing.requests()
    drawing.axis()
    return "".join(drawing.pieces), drawing.y


class _Drawing:
    """Draws from top to bottom; `y` is where the next lane begins."""

    def __init__(self, outcome: Outcome, names: Sequence[str], *, has_tips: bool) -> None:
        self._outcome, self._has_tips = outcome, has_tips
        self._names = names
        self._scale = (WIDTH - _LEFT - _RIGHT) / max(outcome.seconds, 1e-9)
        self.y = 8.0
        self.pieces: list[str] = []

    def _x(self, at_s: float) -> float:
        return _LEFT + max(0.0, at_s) * self._scale

    def tier(self, tier: str, budget_bytes: int) -> None:
        """One tier as stacked areas, one colour a model; the dashed line is its budget."""
        samples = self._outcome.samples
        most = max([budget_bytes, *(sum(sample.held[tier]) for sample in samples), 1])
        height = _TIER_HEIGHT if budget_bytes else _TIER_HEIGHT / 2
        bottom, unit = self.y + height, height / (1.08 * most)
        self._label(tier.upper(), self.y + 14, format_bytes(budget_bytes) if budget_bytes else "image files")
        for index, name in enumerate(self._names):
            path = _area(samples, tier, index, self._x, bottom, unit, self._outcome.seconds)
            if path:
                tip = f"{name} in {tier.upper()}, at most {format_bytes(max(s.held[tier][index] for s in samples))}"
                self._piece(f'<path class="area" d="{path}" fill="var(--m{index})"', tip)
        self.pieces.append(_line(_LEFT, bottom, WIDTH - _RIGHT, bottom, "axis"))
        if budget_bytes:
            top = bottom - budget_bytes * unit
            self.pieces.append(_line(_LEFT, top, WIDTH - _RIGHT, top, "budget"))
        self.y = bottom + _GAP

    def moves(self) -> None:
        """One lane a link, one bar a move."""
        for name, moves in tracks(self._outcome.moves):
            self._label(name, self.y + 13)
            for move in moves:
                self._bar(move)
            self.y += _LANE_HEIGHT + 4
        self.y += _GAP / 2

    def _bar(self, move: MoveFact) -> None:
        x, width = self._x(move.start_s), max(1.5, (move.end_s - move.start_s) * self._scale)
        why = f" for {move.on_behalf_of}" if move.on_behalf_of and move.on_behalf_of != move.model else ""
        tip = (
            f"{move.kind} {move.model}: {format_bytes(move.size_bytes)} in "
            f"{format_seconds(move.end_s - move.start_s)}, {format_bytes(move.copied_bytes)} copied; {move.reason}{why}"
        )
        colour = self._names.index(move.model) if move.model in self._names else 0
        self._piece(
            f'<rect class="piece" x="{x:.1f}" y="{self.y:.1f}" width="{width:.1f}" height="{_LANE_HEIGHT}" rx="2" '
            f'fill="var(--m{colour})"',
            tip,
        )

    def requests(self) -> None:
        """A bar a request, pale while it waited for its model."""
        self._label("requests", self.y + 13, "pale: waiting")
        for number, served in enumerate(self._outcome.served, start=1):
            name = served.request.model
            x, ready = self._x(served.asked_s), self._x(served.ready_s)
            tip = f"request {number} for {name}: found in {served.tier.upper()}, waited {format_seconds(served.wait_s)}"
            colour = self._names.index(name)
            for start, end, kind in ((x, ready, "piece pale"), (ready, self._x(served.done_s), "piece")):
                if end - start >= _LEAST_WIDTH or kind == "piece":
                    width = max(_LEAST_WIDTH, end - start)
                    self._piece(
                        f'<rect class="{kind}" x="{start:.1f}" y="{self.y:.1f}" width="{width:.1f}" '
                        f'height="{_REQUEST_HEIGHT}" fill="var(--m{colour})"',
                        tip,
                    )
        self.y += _REQUEST_HEIGHT + 6

    def axis(self) -> None:
        """Seconds."""
        self.pieces.append(_line(_LEFT, self.y, WIDTH - _RIGHT, self.y, "axis"))
        for at_s in _marks(self._outcome.seconds):
            x = self._x(at_s)
            self.pieces.append(_line(x, self.y, x, self.y + 4, "axis"))
            anchor = "end" if x > WIDTH - _RIGHT - 24 else "middle"
            self.pieces.append(f'<text x="{x:.1f}" y="{self.y + 18:.1f}" text-anchor="{anchor}">{at_s:g} s</text>')
        self.y += 24

    def _label(self, text: str, y: float, below: str = "") -> None:
        self.pieces.append(f'<text class="name" x="0" y="{y:.1f}">{escape(text)}</text>')
        if below:
            self.pieces.append(f'<text x="0" y="{y + 16:.1f}">{escape(below)}</text>')

    def _piece(self, opening: str, tip: str) -> None:
        words = f' data-tip="{escape(tip, quote=True)}"' if self._has_tips else ""
        self.pieces.append(f"{opening}{words}/>")


def _area(samples: Sequence[Sample], tier: str, index: int, x: object, bottom: float, unit: float, end_s: float) -> str:
    """The outline of one model's share of a tier, in steps; empty if it never had any."""
    assert callable(x)
    steps = [
        (x(sample.at_s), sum(sample.held[tier][:index]), sample.held[tier][index])
        for sample in samples
        if sample.at_s <= end_s
    ]
    if not any(own for _, _, own in steps):
        return ""
    steps = steps[:1] + [step for before, step in pairwise(steps) if step[1:] != before[1:]]
    steps.append((x(end_s), steps[-1][1], steps[-1][2]))
    upper, lower = [], []
    for (at, below, own), (until, _, _) in pairwise(steps):
        upper += [f"{at:.1f},{bottom - (below + own) * unit:.1f}", f"{until:.1f},{bottom - (below + own) * unit:.1f}"]
        lower += [f"{at:.1f},{bottom - below * unit:.1f}", f"{until:.1f},{bottom - below * unit:.1f}"]
    return "M" + "L".join(upper + lower[::-1]) + "Z"


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _marks(seconds: float) -> Iterator[float]:
    """Round times, about ten of them."""
    step = next((s for s in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300) if seconds / s <= 12), 600.0)
    number = 0
    while number * step <= seconds:
        yield round(number * step, 3)
        number += 1
