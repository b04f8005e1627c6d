"""A model of 3,000 tensors after 1,000 random moves in four runs; many of the moves are broken off half way."""

from __future__ import annotations

import random
from contextlib import closing

import pytest
import torch
from movers import Rig, bits, same_bits

from modelcache.errors import MoveError

NUM_TENSORS, NUM_MOVES = 3_000, 250
# Moves of a few segments are what mixes the tiers; those of the whole model take longest.
WEIGHTS = {"promote": 4, "trim": 4, "shed": 4, "spill": 1, "drop": 1, "stage": 1}


class Many(torch.nn.Module):
    """Small tensors of several types and kinds, some tied, some views of one storage."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        for i in range(NUM_TENSORS):
            value = torch.randint(-(1 << 31), 1 << 31, (7 + i % 23,), generator=generator, dtype=torch.int32)
            match i % 8:
                case 0 | 1 | 2:
                    # Any bits at all, so NaNs with payloads too.
                    self.register_parameter(f"t{i}", torch.nn.Parameter(value.view(torch.float32)))
                case 3:
                    self.register_parameter(f"t{i}", torch.nn.Parameter(value.view(torch.bfloat16)[1::2]))
                case 4:
                    self.register_parameter(f"t{i}", getattr(self, f"t{i - 4}"))
                case 5:
                    self.register_parameter(f"t{i}", torch.nn.Parameter(getattr(self, f"t{i - 4}").data[2:5]))
                case 6:
                    self.register_buffer(f"t{i}", value > 0)
                case 7:
                    self.register_buffer(f"t{i}", value.long().reshape(-1, 1), persistent=False)


class BrokenOffError(Exception):
    """What somebody raises who wants a move to end."""


def broken_off_after(num_reports: int):
    left = num_reports

    def progress(name, done, total):
        nonlocal left
        left -= 1
        if left <= 0:
            raise BrokenOffError

    return progress


@pytest.mark.timeout(60)
@pytest.mark.parametrize("readable", [True, False])
@pytest.mark.parametrize("seed", [1, 2])
def test_every_tensor_is_bit_identical_after_random_moves(tmp_path, seed, readable):
    chooser = random.Random(seed)
    with closing(Rig(tmp_path, segment_bytes=96 << 10)) as rig:
        (facts,) = rig.load(Many, readable=readable).parts
        part, model = facts.part, rig.mover.object_of("m")
        n, expected = rig.n(part), bits(model)
        assert n > 10
        done = dict.fromkeys((*WEIGHTS, "broken"), 0)
        rig.stage(part)
        for number in range(NUM_MOVES):
            where = rig.mover.residency(part)
            ways = {
                "stage": where.vram < where.ram,
                "promote": where.vram < n and where.ram <= where.vram,
                "trim": 0 < where.vram,
                "shed": where.ram < where.vram and readable,
                "spill": where.vram >= where.ram,
                "drop": where.vram >= where.ram and readable,
            }
            way = chooser.choice([way for way, is_open in ways.items() if is_open for _ in range(WEIGHTS[way])])
            target, options = aim(chooser, way, where, n)
            # A look at 3,000 tensors takes as long as pointing them anew; nobody writes here, so few moves look.
            options |= {"check": chooser.random() < 0.15}
            if chooser.random() < 0.3:
                options |= trouble(rig, chooser)
            try:
                rig.move(part, *target, **options)
                done[way] += 1
            except MoveError:
                done["broken"] += 1
            if number % 60 == 0 and rig.mover.residency(part).ram <= rig.mover.residency(part).vram:
                assert same_bits(model, expected)
        if rig.mover.residency(part).ram == n and rig.mover.residency(part).vram < n:
            rig.stage(part)
        assert same_bits(model, expected)
        assert model.t4 is model.t0
        assert model.t5.untyped_storage().data_ptr() == model.t1.untyped_storage().data_ptr()
        assert all(done[way] for way in done if readable or way not in ("shed", "drop")), done


def aim(chooser, way, where, n):
    match way:
        case "stage":
            return (0, 0), {}
        case "promote":
            vram = min(n, where.vram + chooser.choice((1, 1, 2, 3, n)))
            return (vram, where.ram), {}
        case "trim":
            vram = max(0, where.vram - chooser.choice((1, 1, 2, 3, n)))
            return (vram, chooser.randint(0, min(vram, where.ram))), {}
        case "shed":
            return (where.vram, chooser.randint(where.ram + 1, where.vram)), {}
        case "spill":
            return (0, n), {"write_image": True}
    return (0, n), {}


def trouble(rig, chooser):
    """Somebody ends this move half way, or the device fails during it or one of the next."""
    if chooser.random() < 0.5:
        return {"progress": broken_off_after(chooser.randint(1, 12))}
    rig.faults.fail(chooser.choice(("copy_in", "copy_out", "allocate")), nth=chooser.randint(1, 12))
    return {}
