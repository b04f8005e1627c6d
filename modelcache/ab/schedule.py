"""The order of the calls: drift is to hurt no arm, and models are to move as seldom as can be. Pure."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

Groups = tuple[tuple[str, ...], ...]
#: More models than this are grouped first come, first served: the ways to group them are too many to try.
_MOST_TRIED = 7
# More pairs of blocks than that add switches and tell little more; fewer than the second can never tell arms apart.
_MOST_PAIRS, _FEWEST_PAIRS = 10, 6
# A block should have as many items as this, so that what its first ones pay for is no large part of it.
_ITEMS_PER_BLOCK = 4


@dataclass(frozen=True, slots=True)
class Call:
    """One call of one arm: which item, and the how-manieth time."""

    arm: int
    item: int
    repeat: int


@dataclass(frozen=True, slots=True)
class Block:
    """What runs while one group of models is in place.

    Attributes:
        number: Counts from 0.
        pair: Two blocks of a group make a pair, one early and one late in it, so that a steady drift cancels.
        models: Held in place together.
        calls: In order. Calls of one item stand together.
    """

    number: int
    pair: int
    models: tuple[str, ...]
    calls: tuple[Call, ...]


@dataclass(frozen=True, slots=True)
class Schedule:
    """Everything that will be run, in order, and what that costs.

    Attributes:
        groups: Models that are in place together.
        blocks: The run.
        num_items: To be compared on.
        least_switches: How many promotions this order of blocks takes if no model is given up that need not be.
    """

    groups: Groups
    blocks: tuple[Block, ...]
    num_items: int
    least_switches: int

    @property
    def is_interleaved(self) -> bool:
        """All models are in place together, and arms take turns at each item."""
        return len(self.groups) == 1

    @property
    def num_calls(self) -> int:
        """Warm-up not counted."""
        return sum(len(block.calls) for block in self.blocks)

    @property
    def num_pairs(self) -> int:
        """Independent units for times of arms that are not in place together."""
        return 1 + max(block.pair for block in self.blocks)

    def __str__(self) -> str:
        lines = [f"{self.num_items} items, {self.num_calls} calls"]
        if self.is_interleaved:
            lines.append(f"{_listed(self.groups[0])} fit together: they take turns at each item, in the order ABBA")
        else:
            together = "; ".join(_listed(group) for group in self.groups)
            lines.append(
                f"not all fit together: {len(self.blocks)} blocks of {together}; {self.least_switches} promotions at "
                f"the least, and times are compared by {self.num_pairs} pairs of blocks"
            )
        return "\n".join(lines)


def group_models(models: Sequence[str], fits: Callable[[tuple[str, ...]], bool]) -> Groups:
    """As few groups as can be, each of models that fit together; in the order given where there is a choice."""
    if fits(tuple(models)):
        return (tuple(models),)
    if len(models) > _MOST_TRIED:
        return _first_come(models, fits)
    known: dict[tuple[str, ...], bool] = {}

    def may_be(group: tuple[str, ...]) -> bool:
        if len(group) == 1:
            return True
        if group not in known:
            known[group] = fits(group)
        return known[group]

    candidates = (groups for groups in _partitions(tuple(models)) if all(map(may_be, groups)))
    return min(candidates, key=len)


def _partitions(models: tuple[str, ...]) -> Iterator[Groups]:
    if not models:
        yield ()
        return
    first, rest = models[0], models[1:]
    # With as many companions as possible first, so that the first of the shortest puts early arms together.
    for mask in sorted(range(1 << len(rest)), key=lambda m: (-m.bit_count(), m)):
        group = (first, *(model for i, model in enumerate(rest) if mask >> i & 1))
        for others in _partitions(tuple(model for model in rest if model not in group)):
            yield (group, *others)


def _first_come(models: Sequence[str], fits: Callable[[tuple[str, ...]], bool]) -> Groups:
    groups: list[tuple[str, ...]] = []
    for model in models:
        for i, group in enumerate(groups):
            if fits((*group, model)):
                groups[i] = (*group, model)
                break
        else:
            groups.append((model,))
    return tuple(groups)


def make_schedule(
    num_items: int,
    arms: Sequence[str],
    groups: Groups,
    *,
    num_used: int,
    repeats: int,
    seed: int,
    num_pairs: int | None,
    promotions: Callable[[Sequence[tuple[str, ...]]], int],
) -> Schedule:
    """Order the calls.

    Items come in random order, so that any beginning of the run is a fair sample. Arms that are in place together take
    turns: a random order for one item, the reverse for the next. Groups that are not take turns in blocks, in the order
    G H H G G H ...: where two blocks of a group meet nothing moves, and over a pair a steady drift cancels.

    Args:
        num_items: How many there are.
        num_used: How many of them are drawn by lot.
        arms: The model of each arm.
        groups: Of all models of `arms`.
        repeats: Calls of each arm for each item.
        seed: Of every random order.
        num_pairs: Pairs of blocks; `None` chooses. Without effect where there is one group.
        promotions: How many promotions a sequence of groups takes at the least.
    """
    draw = random.Random(seed)
    items = draw.sample(range(num_items), num_used)
    if len(groups) == 1:
        block = Block(0, 0, groups[0], tuple(_turns(range(len(arms)), items, repeats, draw)))
        return Schedule(groups, (block,), num_used, promotions([groups[0]]))
    chosen = max(_FEWEST_PAIRS, min(_MOST_PAIRS, num_used // (2 * _ITEMS_PER_BLOCK)))
    pairs = max(1, min(num_used // 2, num_pairs or chosen))
    blocks: list[Block] = []
    for pair in range(pairs):
        share = items[pair * num_used // pairs : (pair + 1) * num_used // pairs]
        middle = len(share) // 2
        order = groups
        for part in (share[:middle], share[middle:]):
            for group in order:
                members = [i for i, model in enumerate(arms) if model in group]
                calls = tuple(_turns(members, part, repeats, draw))
                blocks.append(Block(len(blocks), pair, group, calls))
            order = tuple(reversed(order))
    return Schedule(groups, tuple(blocks), num_used, promotions([block.models for block in blocks]))


def _turns(arms: Sequence[int], items: Sequence[int], repeats: int, draw: random.Random) -> Iterator[Call]:
    """Two turns are a pair: an order by lot, then its reverse."""
    order: list[int] = []
    is_second = False
    for item in items:
        for repeat in range(repeats):
            order = order[::-1] if is_second else draw.sample(list(arms), len(arms))
            is_second = not is_second
            yield from (Call(arm, item, repeat) for arm in order)


def least_promotions(
    visits: Sequence[tuple[str, ...]], sizes: dict[str, int], room: int, at_start: frozenset[str]
) -> int:
    """The fewest promotions that a sequence of groups takes in `room` bytes, whatever is given up in between.

    Exact, by going through what may be kept after each visit: few models, so few sets.
    """
    cost: dict[frozenset[str], int] = {at_start: 0}
    for visit in visits:
        needed = frozenset(visit)
        after: dict[frozenset[str], int] = {}
        for held, so_far in cost.items():
            others = sorted(held - needed)
            for mask in range(1 << len(others)):
                kept = needed | {other for i, other in enumerate(others) if mask >> i & 1}
                if kept != needed and sum(sizes[model] for model in kept) > room:
                    continue
                now = so_far + len(needed - held)
                after[kept] = min(after.get(kept, now), now)
        cost = after
    return min(cost.values())


def _listed(names: Sequence[str]) -> str:
    return " and ".join(names) if len(names) < 3 else ", ".join(names[:-1]) + " and " + names[-1]
