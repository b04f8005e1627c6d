"""RAM gets short under real models on the simulated device: what goes, in which order, where to, and what comes back."""

from __future__ import annotations

import pytest
import torch

from modelcache import BudgetExhaustedError, ModelCache, MoveKind
from modelcache.testing import SimulatedDevice
from modelcache.tier import Tier

LAYER_BYTES = 4 * 64 * 64
SEGMENT_BYTES, MODEL_BYTES = 2 * LAYER_BYTES, 8 * LAYER_BYTES


def net(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    layers = (torch.nn.Linear(64, 64, bias=False) for _ in range(8))
    return torch.nn.Sequential(*layers).requires_grad_(requires_grad=False)


def make_cache(tmp_path, *, fit: int = 2, ram: int = 6, disk: int | str = "none") -> ModelCache:
    return ModelCache(
        device=SimulatedDevice(8 << 20, link_bytes_per_s=None),
        vram=fit * MODEL_BYTES,
        ram=ram * MODEL_BYTES,
        disk=disk,
        image_dir=tmp_path,
        segment=SEGMENT_BYTES,
        progress=False,
    )


def add(cache: ModelCache, *names: str, reload: bool = True) -> None:
    for name in names:
        cache.register(name, lambda name=name: net(ord(name)), reload=reload)


def use(cache: ModelCache, *names: str) -> None:
    for name in names:
        with cache.get(name) as model:
            assert model[0].weight.device.type == "sim"


def is_intact(cache: ModelCache, name: str) -> bool:
    with cache.get(name) as model:
        pairs = zip(model.parameters(), net(ord(name)).parameters(), strict=True)
        return all(torch.equal(ours.cpu(), theirs) for ours, theirs in pairs)


def lower(cache: ModelCache, ram: int) -> list:
    """Lower the budget of RAM; the moves that this led to."""
    seen = len(cache.events())
    cache.resize(ram=ram)
    return list(cache.events()[seen:])


def where(cache: ModelCache) -> dict[str, tuple[float, float]]:
    """Models in VRAM and in RAM, in models."""
    found = {name: cache.info(name) for name in cache.names()}
    return {name: (info.vram_bytes / MODEL_BYTES, info.ram_bytes / MODEL_BYTES) for name, info in found.items()}


def test_duplicates_of_what_vram_holds_go_first_and_only_as_many_as_needed(tmp_path):
    with make_cache(tmp_path) as cache:
        add(cache, "a", "b", "c", "d")
        use(cache, "a", "b", "c", "d")
        assert where(cache) == {"a": (0, 1), "b": (0, 1), "c": (1, 1), "d": (1, 1)}
        moves = lower(cache, 4 * MODEL_BYTES - SEGMENT_BYTES)
        # a is the least recently used, and the only copy of its bytes above disk: it stays while a duplicate can go.
        assert [(move.kind, move.model) for move in moves] == [(MoveKind.SHED, "c")]
        assert [(move.size_bytes, move.copied_bytes) for move in moves] == [(SEGMENT_BYTES, 0)]
        moves = lower(cache, 2 * MODEL_BYTES)
        assert {move.kind for move in moves} == {MoveKind.SHED}
        assert where(cache) == {"a": (0, 1), "b": (0, 1), "c": (1, 0), "d": (1, 0)}
        assert all(is_intact(cache, name) for name in "abcd")


def test_then_the_least_recently_used_blocks_go_and_nothing_is_copied_for_what_can_be_read_again(tmp_path):
    with make_cache(tmp_path) as cache:
        add(cache, "a", "b", "c", "d")
        use(cache, "b", "a", "c", "d")
        moves = lower(cache, MODEL_BYTES)
        assert [(move.kind, move.model) for move in moves if move.kind is MoveKind.EVICT] == [(MoveKind.EVICT, "b")]
        assert sum(move.copied_bytes for move in moves) == 0
        assert where(cache) == {"a": (0, 1), "b": (0, 0), "c": (1, 0), "d": (1, 0)}
        assert cache.status().tier(Tier.RAM).resident_bytes == MODEL_BYTES
        assert all(is_intact(cache, name) for name in "abcd")


def test_what_cannot_be_read_again_goes_to_image_files_least_recently_used_first(tmp_path):
    with make_cache(tmp_path, disk=8 * MODEL_BYTES) as cache:
        add(cache, "a", "b", "c", "d", reload=False)
        use(cache, "b", "a", "c", "d")
        moves = lower(cache, 2 * MODEL_BYTES)
        assert [(move.kind, move.model, move.target) for move in moves] == [
            (MoveKind.EVICT, "b", Tier.DISK),
            (MoveKind.EVICT, "a", Tier.DISK),
        ]
        assert [move.copied_bytes >= MODEL_BYTES for move in moves] == [True, True]
        assert cache.info("a").disk_bytes >= MODEL_BYTES
        assert all(is_intact(cache, name) for name in "abcd")


def test_with_an_image_file_written_once_a_model_is_given_up_for_nothing_the_next_time(tmp_path):
    with make_cache(tmp_path, disk=8 * MODEL_BYTES) as cache:
        add(cache, "a", "b", "c", reload=False)
        use(cache, "a", "b", "c")
        lower(cache, 2 * MODEL_BYTES)
        cache.resize(ram=6 * MODEL_BYTES)
        use(cache, "a")
        assert where(cache)["a"] == (1, 1)
        moves = lower(cache, 3 * MODEL_BYTES - SEGMENT_BYTES)
        assert [(move.kind, move.model, move.copied_bytes) for move in moves] == [(MoveKind.SHED, "a", 0)]
        assert all(is_intact(cache, name) for name in "abc")


def test_without_a_file_to_go_to_the_only_copy_stays_and_the_budget_says_so(tmp_path):
    with make_cache(tmp_path) as cache:
        add(cache, "a", "b", reload=False)
        add(cache, "c")
        use(cache, "a", "b", "c")
        lower(cache, MODEL_BYTES)
        assert where(cache)["a"] == (0, 1)
        assert where(cache)["b"] == (1, 1)
        assert where(cache)["c"] == (1, 0)
        assert cache.status().tier(Tier.RAM).deficit_bytes == MODEL_BYTES
        assert all(is_intact(cache, name) for name in "bc")
        with pytest.raises(BudgetExhaustedError, match=r"budgets\.disk"):
            cache.free(ram=MODEL_BYTES)


def test_what_is_leased_or_pinned_keeps_both_of_its_copies_until_it_may_go(tmp_path):
    with make_cache(tmp_path) as cache:
        add(cache, "a", "b", "c")
        use(cache, "a", "b", "c")
        cache.pin("a", Tier.RAM)
        with cache.get("b"):
            assert {move.model for move in lower(cache, MODEL_BYTES // 2)} == {"c"}
            assert where(cache) == {"a": (0, 1), "b": (1, 1), "c": (1, 0)}
        cache.resize(ram=MODEL_BYTES)
        assert where(cache) == {"a": (0, 1), "b": (1, 0), "c": (1, 0)}
        assert cache.status().tier(Tier.RAM).deficit_bytes == 0


def test_a_write_made_on_the_device_is_not_lost_when_its_duplicate_would_have_gone(tmp_path):
    with make_cache(tmp_path, disk=8 * MODEL_BYTES) as cache:
        add(cache, "a", "b")
        use(cache, "a", "b")
        with cache.get("a") as model:
            model[3].weight.data.add_(1.0)
        lower(cache, SEGMENT_BYTES)
        cache.resize(ram=6 * MODEL_BYTES)
        with cache.get("a") as model:
            assert torch.equal(model[3].weight.cpu(), net(ord("a"))[3].weight + 1.0)
        assert is_intact(cache, "b")


def test_room_for_a_load_is_made_in_the_same_order(tmp_path):
    with make_cache(tmp_path, ram=4) as cache:
        add(cache, "a", "b", "c", "d", "e")
        use(cache, "a", "b", "c", "d")
        seen = len(cache.events())
        use(cache, "e")
        down = [
            (move.kind, move.model) for move in cache.events()[seen:] if move.kind in (MoveKind.SHED, MoveKind.EVICT)
        ]
        assert down
        assert {kind for kind, _ in down} == {MoveKind.SHED}
        assert where(cache)["a"] == where(cache)["b"] == (0, 1)
        assert all(is_intact(cache, name) for name in "abcde")


def test_ram_that_was_given_up_is_unmapped(tmp_path):
    with make_cache(tmp_path) as cache:
        add(cache, "a", "b", "c", "d")
        use(cache, "a", "b", "c", "d")
        before = cache._parts.measure().ram
        lower(cache, MODEL_BYTES)
        assert before - cache._parts.measure().ram >= 3 * MODEL_BYTES


def test_the_workspace_of_an_idle_model_makes_room_wherever_the_model_is():
    with ModelCache(device="host_only", ram="4MiB", progress=False) as cache:
        for name in "abc":
            cache.register(name, lambda: torch.nn.LayerNorm(125_000), workspace="1.5MiB", reload=True)
        for name in "abcab":
            with cache.get(name, timeout=10):
                pass
        cache._driver.look(lambda machine: machine.validate())
