"""Writes that nothing but the bytes shows: rows exchanged on the device, and writes to a model that is parked."""

from __future__ import annotations

import pytest
import torch

from modelcache import ModelCache, unwrap
from modelcache.errors import LeaseError
from modelcache.testing import SimulatedDevice
from modelcache.tier import Tier


class Rows(torch.nn.Module):
    """A matrix whose rows have the same sum, the same numbers in another order."""

    def __init__(self, width: int) -> None:
        super().__init__()
        row = torch.arange(width, dtype=torch.float32)
        self.weight = torch.nn.Parameter(torch.stack([row.roll(by) for by in range(4)]), requires_grad=False)
        assert len(set(self.weight.sum(dim=1).tolist())) == 1


def exchange(weight: torch.Tensor, one: int, other: int) -> None:
    """In a way that no version counter and no address shows."""
    weight.data[[one, other]] = weight.data[[other, one]]


@pytest.fixture
def cache(tmp_path):
    device = SimulatedDevice(16 << 20, link_bytes_per_s=None)
    options = {"vram": 4 << 20, "ram": 8 << 20, "disk": 8 << 20, "image_dir": tmp_path, "progress": False}
    with ModelCache(device=device, **options) as made:
        yield made


# 65,536 words are what the look for writes takes in one step: there a row is exactly one step.
@pytest.mark.parametrize("width", [8, 1 << 10, 1 << 16])
@pytest.mark.parametrize("tier", [Tier.RAM, Tier.DISK])
@pytest.mark.parametrize("rows", [(0, 1), (1, 3)])
def test_two_rows_of_equal_sum_that_change_places_on_the_device_are_a_write(cache, width, tier, rows):
    cache.register("m", lambda: Rows(width))
    with cache.get("m") as model:
        exchange(model.weight, *rows)
        assert model.weight.device.type == "sim"
    cache.evict("m", to=tier)
    expected = Rows(width).weight
    exchange(expected, *rows)
    with cache.get("m") as model:
        assert torch.equal(model.weight.cpu(), expected)


def test_rows_that_change_places_are_refused_where_writes_are(cache):
    cache.register("m", lambda: Rows(64), on_write="refuse")
    with cache.get("m"):
        pass
    cache.park("m")
    with cache.get("m") as model:
        exchange(model.weight, 0, 1)
    with pytest.raises(LeaseError, match="was written to"):
        cache.park("m")
    with cache.get("m") as model:
        exchange(model.weight, 0, 1)
    cache.park("m")


def test_a_write_to_a_parked_model_survives_its_spill(cache):
    cache.register("m", lambda: Rows(64))
    handle = cache.get("m")
    with handle:
        pass
    cache.park("m")
    weight = unwrap(handle).weight
    assert weight.device.type == "cpu"
    exchange(weight, 0, 1)
    weight.data += 1
    expected = weight.clone()
    cache.evict("m")
    assert weight.numel() == 0
    with cache.get("m") as model:
        assert torch.equal(model.weight.cpu(), expected)


def test_a_write_to_a_parked_model_survives_a_source_that_can_be_read_again(cache):
    cache.register("m", lambda: Rows(64), reload=True)
    handle = cache.get("m")
    with handle:
        pass
    for round_number in range(1, 4):
        cache.park("m")
        unwrap(handle).weight.data += 1
        cache.evict("m")
        with cache.get("m") as model:
            assert torch.equal(model.weight.cpu(), Rows(64).weight + round_number)
