"""The mover carries bytes between tiers: every legal move, on models with every oddity, to the last bit."""

import copy
import gc
import mmap
import pickle
import weakref
from contextlib import closing
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from movers import Odd, Rig, TensorSource, bits, same_bits

from modelcache.dataplane import staging
from modelcache.dataplane.device.host_only import HostOnlyDevice
from modelcache.dataplane.fingerprint import fingerprint
from modelcache.dataplane.loading.adapters import named_tensors
from modelcache.dataplane.loading.source import Built
from modelcache.dataplane.mover import TorchMover
from modelcache.errors import (
    CacheClosedError,
    InvalidTransitionError,
    LoaderError,
    ModelNotResidentError,
    MoveError,
    UnknownModelError,
    WeightsError,
)
from modelcache.move import KeptWritten, Move, Moved, Residency
from modelcache.spec import LoaderSpec, ModelSpec


@pytest.fixture
def rig(tmp_path):
    rig = Rig(tmp_path)
    yield rig
    rig.close()


IDS = torch.tensor([[1, 2, 3]])


def expected_output(seed=0):
    with torch.no_grad():
        return Odd(seed)(IDS)


def test_loading_measures_and_leaves_the_bytes_with_the_loader(rig):
    facts = rig.load(Odd)
    (part,) = facts.parts
    assert len(part.vram_bytes) > 3
    assert part.vram_bytes == tuple(rig.device.charge_bytes(size) for size in part.vram_bytes)
    assert all(size % 4096 == 0 for size in part.ram_bytes)
    assert not part.readable
    assert (facts.type_name, facts.concurrency) == ("Odd", 0)
    assert rig.mover.residency(part.part) == Residency(0, rig.n(part.part))
    assert rig.mover.held_bytes(part.part).ram == 0
    assert same_bits(rig.mover.object_of("m"), bits(Odd()))


def test_staging_takes_the_bytes_over_and_lets_the_loaders_memory_go(rig):
    kept = []

    def make():
        model = Odd()
        kept.extend(weakref.ref(tensor.untyped_storage()) for tensor in (model.large, model.q, model.embed.weight))
        return model

    (part,) = rig.load(make).parts
    moved = rig.stage(part.part)
    assert moved.copied_bytes == sum(part.vram_bytes)
    assert same_bits(rig.mover.object_of("m"), bits(Odd()))
    gc.collect()
    assert rig.mover.live_ram_bytes == sum(part.ram_bytes)


def test_a_promoted_model_computes_on_the_device(rig):
    (part,) = rig.load(Odd).parts
    rig.stage(part.part)
    moved = rig.promote(part.part)
    assert moved.copied_bytes == sum(part.vram_bytes) == rig.device.allocated_bytes()
    model = rig.mover.object_of("m")
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {"sim"}
    with torch.no_grad():
        assert torch.allclose(model(IDS.to("sim:0")).cpu(), expected_output(), rtol=1e-5)


def test_the_same_tensor_objects_stay_tied_strided_and_in_storages_of_their_own(rig):
    (part,) = rig.load(Odd).parts
    model = rig.mover.object_of("m")
    before = {name: id(tensor) for name, tensor in model.named_parameters(remove_duplicate=False)}
    strides = {name: (tensor.shape, tensor.stride()) for name, tensor in model.named_parameters()}
    for step in (rig.stage, rig.promote, rig.park):
        step(part.part)
        assert {name: id(tensor) for name, tensor in model.named_parameters(remove_duplicate=False)} == before
        assert {name: (tensor.shape, tensor.stride()) for name, tensor in model.named_parameters()} == strides
        assert model.head.weight is model.embed.weight
        assert model.k.storage_offset() == 16 * 16
        assert model.q.untyped_storage().nbytes() == 48 * 16 * 4
        assert model.large.untyped_storage().nbytes() == 80 * 32 * 4
        assert model.q.untyped_storage().data_ptr() == model.v.untyped_storage().data_ptr()
        assert all(isinstance(tensor, torch.nn.Parameter) for tensor in model.parameters())
        assert all(tensor.requires_grad for tensor in model.parameters())


def test_trimming_a_clean_copy_moves_no_bytes_and_gives_back_exactly_its_segments(rig):
    (part,) = rig.load(Odd).parts
    rig.stage(part.part)
    rig.promote(part.part)
    moved = rig.move(part.part, 2, 0)
    assert (moved.copied_bytes, moved.written) == (0, False)
    assert moved.freed_bytes == sum(part.vram_bytes[2:])
    back = rig.promote(part.part)
    assert back.copied_bytes == sum(part.vram_bytes[2:])
    assert same_bits(rig.mover.object_of("m"), bits(Odd()))


def test_trimming_fills_the_ram_that_lacks_the_segments(rig):
    (part,) = rig.load(Odd).parts
    n = rig.n(part.part)
    rig.stage(part.part)
    rig.promote(part.part)
    rig.move(part.part, n, n)
    assert rig.mover.held_bytes(part.part).ram == 0
    moved = rig.move(part.part, 1, 1)
    assert moved.copied_bytes == sum(part.vram_bytes[1:])
    rig.move(part.part, 0, 0)
    assert same_bits(rig.mover.object_of("m"), bits(Odd()))


def test_a_part_on_disk_has_empty_tensors_and_comes_back_from_its_image_file(rig):
    (part,) = rig.load(Odd).parts
    rig.stage(part.part)
    moved = rig.spill(part.part)
    assert moved.copied_bytes == sum(part.vram_bytes)
    model = rig.mover.object_of("m")
    assert rig.mover.live_ram_bytes == 0
    assert {tensor.numel() for tensor in model.parameters()} == {0}
    assert sum(file.stat().st_size for file in rig.directory.glob("*/*")) == part.image_bytes
    rig.stage(part.part)
    assert same_bits(model, bits(Odd()))


def test_a_part_spills_from_vram_through_one_piece_of_ram(rig):
    (part,) = rig.load(Odd).parts
    n = rig.n(part.part)
    rig.stage(part.part)
    rig.promote(part.part)
    rig.move(part.part, n, n)
    peak = []
    move = Move(part.part, 1, Residency(n, n), Residency(0, n), n, write_image=True)
    rig.mover.move(move, lambda name, done, total: peak.append(rig.mover.live_ram_bytes))
    assert max(peak) <= max(part.ram_bytes)
    rig.stage(part.part)
    assert same_bits(rig.mover.object_of("m"), bits(Odd()))


def test_a_second_spill_of_the_same_bytes_writes_nothing(rig):
    (part,) = rig.load(Odd).parts
    rig.stage(part.part)
    rig.spill(part.part)
    rig.stage(part.part)
    assert rig.spill(part.part).copied_bytes == 0


def test_a_readable_part_is_dropped_and_read_again(rig):
    (part,) = rig.load(Odd, readable=True).parts
    assert part.readable
    rig.stage(part.part)
    assert rig.sources["m"].fills == 0
    assert rig.drop(part.part).copied_bytes == 0
    rig.stage(part.part)
    assert rig.sources["m"].fills == 1
    assert same_bits(rig.mover.object_of("m"), bits(Odd()))


def test_a_source_that_gives_other_bytes_is_refused(rig):
    (part,) = rig.load(Odd, readable=True).parts
    rig.stage(part.part)
    rig.drop(part.part)
    right = rig.sources["m"].tensors["large"].clone()
    rig.sources["m"].tensors["large"] += 1
    with pytest.raises(WeightsError, match="other bytes than when the model was first loaded"):
        rig.stage(part.part)
    rig.sources["m"].tensors["large"] = right
    rig.stage(part.part)


def test_a_source_that_tells_a_digest_of_what_it_read_spares_the_second_look(rig, monkeypatch):
    looks, digests = [], {}

    class TellingSource(TensorSource):
        def fill(self, targets, report=None, landed=None) -> None:
            super().fill(targets, report)
            for name in targets:
                landed(name, digests.get(name, name))

    monkeypatch.setattr(staging, "fingerprint", lambda memory: (looks.append(memory), fingerprint(memory))[1])
    rig.mover._build = lambda spec: Built(model := Odd(), TellingSource(named_tensors(model)))
    (part,) = rig.load(Odd).parts
    source = rig.mover._parts[part.part].source
    rig.stage(part.part)

    def again() -> int:
        """How many segments were looked at."""
        rig.drop(part.part)
        looks.clear()
        rig.stage(part.part)
        assert same_bits(rig.mover.object_of("m"), bits(Odd()))
        return len(looks)

    num_segments = len(part.ram_bytes)
    whole, known = again(), again()
    assert whole == num_segments > known
    digests["large"] = "another way of reading it"
    assert again() > known
    assert again() == known
    digests["large"] = None
    assert again() == again() > known
    source.tensors["large"] += 1
    rig.drop(part.part)
    with pytest.raises(WeightsError, match="other bytes than when the model was first loaded"):
        rig.stage(part.part)


def test_small_buffers_that_the_source_lacks_survive_with_the_skeleton(rig, tmp_path):
    model = Odd()
    source = TensorSource({name: t for name, t in model.state_dict().items() if name not in ("complex", "mask")})
    rig.mover._build = lambda spec: Built(model, source)
    (part,) = rig.load(Odd).parts
    assert part.readable
    rig.stage(part.part)
    rig.drop(part.part)
    rig.stage(part.part)
    assert same_bits(model, bits(Odd()))


def test_a_model_on_meta_is_filled_by_its_source(rig):
    with torch.device("meta"):
        model = torch.nn.Linear(5, 7)
    source = TensorSource({"weight": torch.ones(7, 5), "bias": torch.arange(7.0)})
    rig.mover._build = lambda spec: Built(model, source)
    (part,) = rig.load(Odd).parts
    assert part.readable
    rig.stage(part.part)
    assert torch.equal(model.weight, torch.ones(7, 5))
    assert torch.equal(model.bias, torch.arange(7.0))
    rig.promote(part.part)
    assert model.weight.device.type == "sim"


def test_a_model_on_meta_without_a_source_is_refused_by_name(rig):
    with torch.device("meta"):
        model = torch.nn.Linear(5, 7)
    source = TensorSource({"weight": torch.ones(7, 5)})
    rig.mover._build = lambda spec: Built(model, source)
    with pytest.raises(LoaderError, match="meta that no source can fill: 'bias'"):
        rig.load(Odd)


def test_a_model_that_the_loader_put_on_the_device_is_taken_from_there(rig):
    (part,) = rig.load(lambda: Odd().to("sim:0")).parts
    rig.mover.move(Move(part.part, 1, Residency(0, rig.n(part.part)), Residency(0, 0), rig.n(part.part)))
    model = rig.mover.object_of("m")
    gc.collect()
    assert rig.device.allocated_bytes() == 0
    assert same_bits(model, bits(Odd()))


def test_a_model_without_bytes_has_no_parts_and_works(rig):
    class Nothing(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.empty = torch.nn.Parameter(torch.empty(0, 3))

        def forward(self, x):
            return x + self.empty.sum()

    facts = rig.load(Nothing)
    assert facts.parts == ()
    model = rig.mover.object_of("m")
    assert model.empty.device.type == "sim"
    assert model(torch.ones(2, device="sim:0")).cpu().tolist() == [1.0, 1.0]
    assert rig.load(torch.nn.Identity, "n").parts == ()


def test_a_forward_of_a_parked_model_is_refused_in_words(rig):
    (part,) = rig.load(Odd).parts
    model = rig.mover.object_of("m")
    for step in (lambda part: None, rig.stage, rig.promote, lambda part: rig.move(part, 1, 0), rig.spill):
        step(part.part)
        if rig.mover.residency(part.part).vram == rig.n(part.part):
            model(IDS.to("sim:0"))
        else:
            with pytest.raises(ModelNotResidentError, match="'m' is not on its device"):
                model(IDS)


def test_the_guard_does_not_travel_with_copies(rig):
    (part,) = rig.load(Odd).parts
    rig.stage(part.part)
    model = rig.mover.object_of("m")
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(IDS), expected_output())
        assert torch.equal(pickle.loads(pickle.dumps(model))(IDS), expected_output())


def test_the_guard_leaves_with_a_model_that_keeps_its_weights(rig):
    rig.load(Odd)
    model = rig.mover.object_of("m")
    rig.mover.forget("m")
    assert not model._forward_pre_hooks
    assert not model._state_dict_pre_hooks


@pytest.mark.parametrize("end", ["forget", "close"])
@pytest.mark.parametrize("where", ["parked", "ready", "on disk"])
def test_a_model_whose_weights_are_gone_says_so_instead_of_running(rig, where, end):
    (part,) = rig.load(Odd).parts
    model = rig.mover.object_of("m")
    rig.stage(part.part)
    if where == "ready":
        rig.promote(part.part)
    elif where == "on disk":
        rig.spill(part.part)
    if end == "forget":
        rig.mover.forget("m")
    else:
        rig.mover.close()
    why = {"forget": "it was unregistered", "close": "the cache was closed"}[end]
    with pytest.raises(ModelNotResidentError, match=f"'m' has no weights any more: {why}"):
        model(IDS)


def test_a_model_that_was_given_other_weights_since_is_its_holders_own(rig):
    (part,) = rig.load(Odd).parts
    model = rig.mover.object_of("m")
    rig.stage(part.part)
    rig.mover.forget("m")
    fresh = Odd()
    for tensor, other in zip(named_tensors(model).values(), named_tensors(fresh).values(), strict=True):
        tensor.data = other.data
    with torch.no_grad():
        assert torch.equal(model(IDS), expected_output())
    assert same_bits(copy.deepcopy(model), bits(fresh))


def test_a_move_inside_inference_mode_leaves_ordinary_tensors(rig):
    (part,) = rig.load(Odd).parts
    with torch.inference_mode():
        rig.stage(part.part)
        rig.promote(part.part)
    model = rig.mover.object_of("m")
    assert not any(tensor.is_inference() for tensor in [*model.parameters(), *model.buffers()])
    with torch.no_grad():
        model.large.add_(1)


def test_forgetting_frees_everything_and_empties_the_model(rig):
    (part,) = rig.load(Odd).parts
    rig.stage(part.part)
    rig.promote(part.part)
    model = rig.mover.object_of("m")
    rig.mover.forget("m")
    rig.mover.forget("m")
    assert rig.device.allocated_bytes() == 0
    assert rig.mover.live_ram_bytes == 0
    assert {tensor.numel() for tensor in model.parameters()} == {0}
    with pytest.raises(UnknownModelError):
        rig.mover.object_of("m")
    rig.load(Odd)


def test_forgetting_an_unstaged_model_leaves_the_loaders_tensors_alone(rig):
    rig.load(Odd)
    model = rig.mover.object_of("m")
    rig.mover.forget("m")
    assert same_bits(model, bits(Odd()))


def test_ram_that_a_users_tensor_still_reads_is_reported_until_it_goes(rig):
    (part,) = rig.load(Odd, readable=True).parts
    rig.stage(part.part)
    view = rig.mover.object_of("m").large.detach()
    rig.drop(part.part)
    assert 0 < rig.mover.live_ram_bytes < sum(part.ram_bytes)
    assert torch.equal(view, Odd().large)
    del view
    assert rig.mover.live_ram_bytes == 0


def test_progress_names_the_model_and_ends_at_the_total(rig):
    (part,) = rig.load(Odd, "mine", readable=True).parts
    for vram, ram in ((0, 0), (rig.n(part.part), 0)):
        told = []
        rig.move(part.part, vram, ram, progress=lambda *args: told.append(args))
        names, done, totals = zip(*told, strict=True)
        assert set(names) == {"mine"}
        assert list(done) == sorted(done)
        assert set(totals) == {sum(part.vram_bytes)}
    assert done[-1] == sum(part.vram_bytes)


def test_page_locked_ram_is_counted_within_its_budget_and_given_back(tmp_path, caplog):
    rig = Rig(tmp_path, page_locked_bytes=3 * 4096)
    (part,) = rig.load(Odd).parts
    rig.stage(part.part)
    assert 0 < rig.mover.page_locked_bytes <= 3 * 4096
    rig.promote(part.part)
    rig.spill(part.part)
    assert rig.mover.page_locked_bytes == rig.device.page_locked_bytes == 0
    rig.faults.refuse_page_lock()
    rig.stage(part.part)
    assert len([record for record in caplog.records if "page-lock" in record.message]) == 1
    assert same_bits(rig.mover.object_of("m"), bits(Odd()))
    rig.close()


def test_host_only_models_are_usable_from_ram(tmp_path):
    model = Odd()
    mover = TorchMover(
        HostOnlyDevice(),
        segment_bytes=4096,
        build=lambda spec: Built(
            model, TensorSource(dict(model.state_dict()) | {"mask": model.mask, "complex": model.complex})
        ),
    )
    (part,) = mover.load(ModelSpec("m", LoaderSpec(call=Odd))).parts
    n = len(part.ram_bytes)
    assert part.vram_bytes == (0,) * n
    with pytest.raises(ModelNotResidentError):
        model(IDS)
    assert mover.move(Move(part.part, 1, Residency(0, n), Residency(0, 0), n)).freed_bytes is None
    with torch.no_grad():
        assert torch.equal(model(IDS), expected_output())
    mover.move(Move(part.part, 2, Residency(0, 0), Residency(0, n), n))
    with pytest.raises(ModelNotResidentError):
        model(IDS)
    mover.move(Move(part.part, 3, Residency(0, n), Residency(0, 0), n))
    with torch.no_grad():
        assert torch.equal(model(IDS), expected_output())
    mover.close()


def test_a_move_from_somewhere_else_is_a_bug_and_changes_nothing(rig):
    (part,) = rig.load(Odd).parts
    n = rig.n(part.part)
    with pytest.raises(InvalidTransitionError):
        rig.mover.move(Move(part.part, 1, Residency(0, 0), Residency(n, 0), n))
    rig.stage(part.part)
    with pytest.raises(InvalidTransitionError):
        rig.mover.move(Move(part.part, 1, Residency(0, 0), Residency(0, 2), n))
    with pytest.raises(InvalidTransitionError):
        rig.mover.load(ModelSpec("m", LoaderSpec(call=Odd)))


def test_nothing_works_after_close_and_closing_twice_is_fine(rig):
    (part,) = rig.load(Odd).parts
    rig.stage(part.part)
    rig.mover.close()
    rig.mover.close()
    assert rig.mover.live_ram_bytes == 0
    with pytest.raises(CacheClosedError):
        rig.load(Odd, "n")
    with pytest.raises(CacheClosedError):
        rig.mover.move(Move(part.part, 1, Residency(0, 1), Residency(0, 0), 1))


def test_a_part_that_was_forgotten_cannot_be_moved(rig):
    (part,) = rig.load(Odd).parts
    rig.mover.forget("m")
    with pytest.raises(MoveError, match="does not know this part"):
        rig.mover.move(Move(part.part, 1, Residency(0, 1), Residency(0, 0), 1))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_legal_sequence_of_moves_keeps_every_bit(tmp_path, data):
    with closing(Rig(tmp_path, segment_bytes=data.draw(st.sampled_from([2048, 8192, 1 << 20])))) as rig:
        move_about(rig, data)


def move_about(rig, data):
    (part,) = rig.load(Odd, readable=data.draw(st.booleans())).parts
    n, model, expected = rig.n(part.part), rig.mover.object_of("m"), bits(Odd())
    for _ in range(data.draw(st.integers(1, 12))):
        k, j = rig.mover.residency(part.part).vram, rig.mover.residency(part.part).ram
        if (k, j) == (0, n):
            result = rig.stage(part.part)
        else:
            k2 = data.draw(st.integers(0, n))
            if k2 > k:
                result = rig.move(part.part, k2, data.draw(st.integers(j, k2)) if k2 == n else j)
            elif data.draw(st.booleans()):
                result = rig.move(part.part, k2, data.draw(st.integers(0, min(k2, j)))) if k2 < k else Moved(0, 0.0)
            elif data.draw(st.booleans()):
                result = rig.move(part.part, k, data.draw(st.integers(j, k))) if j < k else Moved(0, 0.0)
            else:
                result = rig.spill(part.part)
        assert not isinstance(result, KeptWritten)
        if rig.mover.residency(part.part) != Residency(0, n):
            assert same_bits(model, expected)
            assert model.head.weight is model.embed.weight


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_a_staged_model_is_in_ram_once_and_a_dropped_one_not_at_all(tmp_path):
    size = 48 << 20

    def make():
        return torch.nn.ParameterList([torch.nn.Parameter(torch.ones(64, 256)) for _ in range(size // (64 << 10))])

    with closing(Rig(tmp_path, segment_bytes=4 << 20)) as rig:
        gc.collect()
        before = resident_bytes()
        (part,) = rig.load(make).parts
        rig.stage(part.part)
        assert resident_bytes() - before < 1.2 * size
        rig.spill(part.part)
        rig.mover.release_cached()
        assert resident_bytes() - before < 0.2 * size
