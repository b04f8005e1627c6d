"""Sixteen models in rotation through room for five: what moves is what the plan said, to the byte."""

from __future__ import annotations

import random

import pytest
import torch

from modelcache import ModelCache, MoveKind
from modelcache.testing import SimulatedDevice
from modelcache.tier import Tier

NUM_MODELS, NUM_FIT, ROUNDS = 16, 5, 3
LAYER_BYTES = 4 * 64 * 64
SEGMENT_BYTES, MODEL_BYTES = 2 * LAYER_BYTES, 16 * LAYER_BYTES
NAMES = [f"m{i:02}" for i in range(NUM_MODELS)]


def net(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    layers = (torch.nn.Linear(64, 64, bias=False) for _ in range(16))
    return torch.nn.Sequential(*layers).requires_grad_(requires_grad=False)


@pytest.fixture
def cache(request):
    device = SimulatedDevice(4 << 20, link_bytes_per_s=None)
    vram = NUM_FIT * MODEL_BYTES + getattr(request, "param", 0)
    with ModelCache(
        device=device, vram=vram, ram=NUM_MODELS * MODEL_BYTES, ram_spare="none", segment=SEGMENT_BYTES, progress=False
    ) as made:
        for seed, name in enumerate(NAMES):
            made.register(name, lambda seed=seed: net(seed))
        for name in NAMES:
            with made.get(name):
                pass
        yield made


def rotation() -> list[str]:
    return NAMES * ROUNDS


def at_random() -> list[str]:
    chooser = random.Random(7)
    return [chooser.choice(NAMES) for _ in range(NUM_MODELS * ROUNDS)]


@pytest.mark.parametrize("trace", [rotation, at_random])
@pytest.mark.parametrize("cache", [0, 3 * SEGMENT_BYTES, 3 * SEGMENT_BYTES + 512], indirect=True)
def test_the_bytes_moved_are_those_that_the_plan_foretold(cache, trace):
    total = foretold = 0
    for name in trace():
        seen = len(cache.events())
        plan = cache.plan(name)
        assert plan.fits
        assert plan.ram_bytes == 0
        missing = MODEL_BYTES - cache.info(name).vram_bytes
        assert plan.vram_bytes == missing
        held = {other: cache.info(other).vram_bytes for other in NAMES}
        with cache.get(name) as model:
            assert model[0].weight.device.type == "sim"
        moves = cache.events()[seen:]
        up = [move for move in moves if move.kind is MoveKind.PROMOTE]
        down = [move for move in moves if move.kind is MoveKind.TRIM]
        assert len(up) + len(down) == len(moves)
        assert sum(move.copied_bytes for move in up) == plan.vram_bytes
        assert {move.model for move in up} <= {name}
        assert sorted(move.model for move in down) == sorted(plan.gives_up)
        assert all(move.copied_bytes == 0 and move.on_behalf_of == name for move in down)
        given = {other: held[other] - cache.info(other).vram_bytes for other in NAMES if other != name}
        assert {other for other, lost in given.items() if lost} == set(plan.gives_up)
        # Only as many segments as are needed.
        vram = cache.status().tier(Tier.VRAM)
        assert not plan.gives_up or vram.budget_bytes - vram.resident_bytes < SEGMENT_BYTES
        total += sum(move.copied_bytes for move in moves)
        foretold += plan.vram_bytes
    assert total == foretold > 0


def test_a_rotation_of_whole_models_moves_each_once_a_turn(cache):
    """With room for a whole number of models and least recently used first, none is ever found where it is wanted."""
    seen = len(cache.events())
    for name in rotation():
        with cache.get(name):
            pass
    up = [move for move in cache.events()[seen:] if move.kind is MoveKind.PROMOTE]
    assert [move.model for move in up] == rotation()
    assert {move.copied_bytes for move in up} == {MODEL_BYTES}
