"""Writes survive, or the eviction is refused: merges that no version counter shows, parked writes, every policy."""

from contextlib import closing

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from movers import Odd, Rig, bits, bumped, same_bits

from modelcache.move import KeptWritten, Residency
from modelcache.spec import OnWrite


@pytest.fixture
def rig(tmp_path):
    with closing(Rig(tmp_path)) as rig:
        yield rig


def resident(rig, **options):
    (part,) = rig.load(Odd, **options).parts
    rig.stage(part.part)
    rig.promote(part.part)
    return part.part, rig.n(part.part), rig.mover.object_of("m")


def test_a_merge_on_the_device_survives_parking(rig):
    part, _, model = resident(rig)
    bumped(model, "large")
    expected = bits(model)
    moved = rig.park(part)
    assert moved.written
    assert moved.copied_bytes in rig.facts[part].vram_bytes
    assert same_bits(model, expected)
    rig.promote(part)
    assert not rig.park(part).written
    assert same_bits(model, expected)


def test_a_swap_of_two_rows_is_a_write(rig):
    part, _, model = resident(rig)
    with torch.no_grad():
        model.large.data[:2] = model.large.data[:2].flip(0)
    expected = bits(model)
    assert rig.park(part).written
    assert same_bits(model, expected)


def test_a_buffer_updated_in_a_forward_survives(rig):
    (part,) = rig.load(lambda: torch.nn.BatchNorm1d(8)).parts
    model = rig.mover.object_of("m")
    rig.stage(part.part)
    rig.promote(part.part)
    model.train()(torch.ones(4, 8, device="sim:0"))
    assert rig.park(part.part).written
    assert model.running_mean.tolist() == pytest.approx([0.1] * 8)
    assert model.num_batches_tracked.item() == 1


def test_a_write_survives_a_partial_trim_and_a_spill_from_two_tiers(rig):
    part, n, model = resident(rig)
    bumped(model, "large")
    bumped(model, "embed.weight")
    expected = bits(model)
    rig.move(part, 1, 0)
    assert same_bits(model, expected)
    rig.spill(part)
    rig.stage(part)
    assert same_bits(model, expected)


def test_a_write_to_a_parked_model_survives(rig):
    part, n, model = resident(rig, readable=True)
    rig.park(part)
    bumped(model, "large")
    expected = bits(model)
    rig.promote(part)
    assert same_bits(model, expected)
    rig.park(part)
    assert same_bits(model, expected)
    assert isinstance(rig.drop(part), KeptWritten)
    assert rig.spill(part).copied_bytes
    rig.stage(part)
    assert same_bits(model, expected)


def test_a_write_to_a_part_that_is_half_on_the_device_survives(rig):
    part, n, model = resident(rig)
    rig.move(part, 2, 0)
    for name in ("large", "embed.weight", "q"):
        bumped(model, name)
    expected = bits(model)
    rig.promote(part)
    assert same_bits(model, expected)
    rig.park(part)
    assert same_bits(model, expected)


def test_a_written_part_is_not_dropped_but_spilled(rig):
    part, n, model = resident(rig, readable=True)
    bumped(model, "large")
    expected = bits(model)
    assert isinstance(rig.drop(part), KeptWritten)
    assert same_bits(model, expected)
    assert rig.spill(part).written
    rig.stage(part)
    assert same_bits(model, expected)


def test_writes_that_were_kept_are_never_read_from_the_source_again(rig):
    part, n, model = resident(rig, readable=True)
    bumped(model, "large")
    expected = bits(model)
    assert rig.park(part).written
    assert isinstance(rig.drop(part), KeptWritten)
    rig.spill(part)
    rig.mover.drop_image(part)  # the last holder of the bytes: it stays
    rig.stage(part)
    assert same_bits(model, expected)
    rig.mover.drop_image(part)
    assert rig.mover.held_bytes(part).image == 0
    assert isinstance(rig.drop(part), KeptWritten)


def test_bytes_on_the_device_alone_are_checked_before_they_are_dropped(rig):
    part, n, model = resident(rig, readable=True)
    bumped(model, "large")
    expected = bits(model)
    assert not isinstance(rig.move(part, n, n), KeptWritten)
    assert isinstance(rig.drop(part), KeptWritten)
    assert rig.park(part).written
    assert same_bits(model, expected)


def test_a_stale_image_file_does_not_count(rig):
    part, n, model = resident(rig)
    rig.spill(part)
    rig.stage(part)
    rig.promote(part)
    bumped(model, "large")
    expected = bits(model)
    assert isinstance(rig.drop(part), KeptWritten)
    rig.park(part)
    assert isinstance(rig.drop(part), KeptWritten)
    rig.spill(part)
    rig.stage(part)
    assert same_bits(model, expected)


@pytest.mark.parametrize("give_up", ["park", "drop", "spill"])
def test_refuse_keeps_a_written_model_where_it_is(rig, give_up):
    part, n, model = resident(rig, readable=True, on_write=OnWrite.REFUSE)
    bumped(model, "large")
    expected = bits(model)
    assert isinstance(getattr(rig, give_up)(part), KeptWritten)
    assert rig.mover.residency(part) == Residency(n, 0)
    bumped(model, "large", 0.0)
    assert same_bits(model, expected)


def test_refuse_lets_a_clean_model_go(rig):
    part, n, model = resident(rig, readable=True, on_write=OnWrite.REFUSE)
    assert not rig.park(part).written
    assert not rig.drop(part).written


def test_discard_brings_the_bytes_of_the_block_back(rig):
    part, n, model = resident(rig, readable=True, on_write=OnWrite.DISCARD)
    bumped(model, "large")
    moved = rig.park(part)
    assert (moved.copied_bytes, moved.written) == (0, False)
    assert same_bits(model, bits(Odd()))
    bumped(model, "large")
    assert not rig.drop(part).written
    rig.stage(part)
    assert same_bits(model, bits(Odd()))


def test_discard_spills_the_bytes_of_the_block(rig):
    part, n, model = resident(rig, on_write=OnWrite.DISCARD)
    bumped(model, "large")
    rig.spill(part)
    rig.stage(part)
    assert same_bits(model, bits(Odd()))
    bumped(model, "large")
    assert not rig.drop(part).written
    rig.stage(part)
    assert same_bits(model, bits(Odd()))


def test_a_move_that_does_not_look_keeps_what_it_must_copy_anyway(rig):
    part, n, model = resident(rig)
    rig.move(part, n, n)
    bumped(model, "large")
    expected = bits(model)
    rig.park(part, check=False)
    assert same_bits(model, expected)


def test_a_merge_that_is_undone_exactly_leaves_a_clean_part(rig):
    part, n, model = resident(rig, readable=True)
    before = model.large.detach().cpu()
    bumped(model, "large")
    model.large.data.copy_(before)
    assert not rig.park(part).written
    assert not rig.drop(part).written


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_writes_between_any_moves_are_never_lost(tmp_path, data):
    with closing(Rig(tmp_path, segment_bytes=data.draw(st.sampled_from([2048, 8192])))) as rig:
        part, n, model = resident(rig, readable=data.draw(st.booleans()))
        expected = bits(model)
        for _ in range(data.draw(st.integers(1, 10))):
            k, j = rig.mover.residency(part).vram, rig.mover.residency(part).ram
            if j == n and k == 0:
                rig.stage(part)
            elif data.draw(st.booleans()):
                bumped(model, data.draw(st.sampled_from(["large", "q", "embed.weight", "conv", "scale"])))
                expected = bits(model)
            else:
                wanted = data.draw(st.sampled_from(["promote", "trim", "shed", "spill", "drop"]))
                if wanted == "promote" and k < n:
                    rig.promote(part)
                elif wanted == "trim" and k:
                    k2 = data.draw(st.integers(0, k - 1))
                    rig.move(part, k2, data.draw(st.integers(0, min(k2, j))))
                elif wanted == "shed" and j < k:
                    rig.move(part, k, data.draw(st.integers(j + 1, k)))
                elif wanted == "spill":
                    rig.spill(part)
                elif wanted == "drop" and rig.mover._parts[part].is_readable:
                    rig.drop(part)
            if rig.mover.residency(part) != Residency(0, n):
                assert same_bits(model, expected)
