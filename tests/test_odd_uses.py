"""What people do that is easily forgotten: too large after loading, refused writes, shared storage, old handles."""

from __future__ import annotations

import asyncio

import pytest
import torch

from modelcache import LeaseClosedError, LeaseError, ModelCache, ModelTooLargeError


def linear(mib: int) -> torch.nn.Module:
    return torch.nn.Linear(1024, mib * 256, bias=False).requires_grad_(requires_grad=False)


@pytest.fixture
def cache():
    with ModelCache(device="simulated", vram="8MiB", ram="16MiB", progress=False) as made:
        yield made


def test_a_model_that_proves_too_large_harms_nobody_and_fits_a_larger_budget(cache) -> None:
    cache.register("big", lambda: linear(20))
    cache.register("small", lambda: linear(2))
    for _ in range(2):
        with pytest.raises(ModelTooLargeError):
            cache.get("big", timeout=10)
    assert cache.info("big").size_bytes >= 20 << 20
    cache.get("small", timeout=10)
    cache.resize(vram="32MiB", ram="64MiB")
    cache.get("big", timeout=10)
    assert cache.info("big").state == "ready"
    cache.unregister("big")
    cache.register("big", lambda: linear(1))
    cache.get("big", timeout=10)


def test_a_refused_write_is_said_and_kept(cache) -> None:
    cache.register("a", lambda: linear(3), on_write="refuse")
    with cache.get("a") as model:
        model.weight.data.add_(1)
        written = model.weight.cpu().clone()
    with pytest.raises(LeaseError, match="was written to and is not given up"):
        cache.park("a", timeout=10)
    with cache.get("a") as model:
        assert torch.equal(model.weight.cpu(), written)


def test_a_storage_shared_by_the_user_is_shared_whoever_is_up(cache) -> None:
    body = linear(1)
    cache.register("a", lambda: torch.nn.Sequential(body, torch.nn.Linear(256, 8)))
    cache.register("b", lambda: torch.nn.Sequential(body, torch.nn.Linear(256, 4)))
    inputs = torch.ones(1, 1024)
    with torch.no_grad():
        assert cache.get("a")(inputs).shape == (1, 8)
        assert cache.get("b")(inputs).shape == (1, 4)
    total = sum(cache.info(name).size_bytes for name in "ab")
    assert cache.status().tiers[0].resident_bytes < total


def test_an_old_handle_does_not_run_a_model_that_was_replaced(cache) -> None:
    cache.register("a", lambda: linear(1))
    handle = cache.get("a")
    handle(torch.ones(1, 1024))
    cache.unregister("a")
    cache.register("a", lambda: linear(2))
    cache.get("a")(torch.ones(1, 1024))
    with pytest.raises(LeaseClosedError):
        handle(torch.ones(1, 1024))


def test_a_get_that_is_entered_twice_holds_two_leases(cache) -> None:
    cache.register("a", lambda: linear(1))

    async def twice() -> None:
        get = cache.aget("a")
        async with get:
            async with get:
                assert cache.info("a").num_leases == 2
            assert cache.info("a").num_leases == 1
        assert cache.info("a").num_leases == 0

    asyncio.run(twice())


def test_a_tier_may_be_written_as_a_word_and_not_misspelt(cache) -> None:
    cache.register("a", lambda: linear(1))
    cache.pin("a", "vram")
    cache.get("a")
    with pytest.raises(LeaseError, match="is pinned to vram"):
        cache.park("a")
    with pytest.raises(ValueError, match="gpu"):
        cache.pin("a", "gpu")
