"""What we rely on in the installed accelerate; a new version that changes it fails here first."""

import copy

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook, add_hook_to_module
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
from dispatched import ACCELERATOR, DISK_ONLY, SPLIT, Holder, Tied, Tiny, X, built_by_accelerate, leftovers
from torch import nn

from modelcache.dataplane.materialize import accelerate_state as state
from modelcache.dataplane.materialize.journal import ABSENT, Entry, swap_all


def unhook(model):
    swap_all([swap for module in model.modules() for swap in state.unhooking(module)], check=lambda: None)


@pytest.fixture
def split(tmp_path):
    return dispatch_model(Tiny().eval(), SPLIT, main_device=ACCELERATOR, offload_dir=tmp_path)


def test_a_module_without_hooks_has_nothing_to_read_and_nothing_to_take_off():
    model = Tiny()
    assert state.own_hook(model) is None
    assert state.hooks_of(model) == []
    assert state.offloads_of(model) == []
    assert state.unhooking(model) == []


def test_chains_are_opened_to_any_depth_in_the_order_they_run():
    module = nn.Linear(2, 2)
    hooks = [ModelHook() for _ in range(4)]
    add_hook_to_module(module, SequentialHook(SequentialHook(hooks[0], hooks[1]), hooks[2]))
    add_hook_to_module(module, hooks[3], append=True)
    assert state.hooks_of(module) == hooks


def test_the_hook_of_a_compiled_module_is_read_on_its_original_only():
    model = Tiny()
    compiled = torch.compile(model, backend="eager")
    cpu_offload(model, ACCELERATOR)
    assert hasattr(compiled, "_hf_hook")
    assert state.own_hook(compiled) is None
    assert state.own_hook(model) is not None


def test_placing_hooks_are_told_from_others():
    assert state.places_tensors(AlignDevicesHook())
    cpu_offload_with_hook(model := Tiny(), ACCELERATOR)
    assert state.places_tensors(state.own_hook(model))
    assert not state.places_tensors(ModelHook())
    assert not state.is_unknown_offloader(ModelHook())

    class CustomOffloadHook(ModelHook):
        pass

    assert state.is_unknown_offloader(CustomOffloadHook())
    assert not state.is_unknown_offloader(AlignDevicesHook(offload=True))


@built_by_accelerate("1.7", "has no hook for layerwise casting")
def test_a_casting_hook_is_nobody_who_places():
    from accelerate.hooks import LayerwiseCastingHook

    casting = LayerwiseCastingHook(torch.float16, torch.float32, non_blocking=False)
    assert not state.places_tensors(casting)
    assert not state.is_unknown_offloader(casting)


def test_kept_weights_in_ram_are_found_with_the_memory_they_have(split):
    (offload,) = state.offloads_of(split.linear1)
    kept = state.find_kept(offload.weights, "weight")
    assert isinstance(kept, state.KeptTensor)
    assert kept.key == "linear1.weight"
    assert kept.table["linear1.weight"] is kept.tensor
    assert torch.equal(kept.tensor, Tiny().linear1.weight)
    assert state.find_kept(offload.weights, "nothing") is None
    assert not offload.covers_subtree


def test_kept_weights_on_disk_are_found_without_reading_them(split, tmp_path):
    (offload,) = state.offloads_of(split.linear2)
    for file in tmp_path.glob("*.dat"):
        file.unlink()
    kept = state.find_kept(offload.weights, "weight")
    assert isinstance(kept, state.KeptInDat)
    assert (kept.path, kept.dtype, kept.shape) == (str(tmp_path / "linear2.weight.dat"), torch.float32, (5, 4))
    assert state.base_of(offload.weights)[1] == "linear2."


def test_an_index_into_safetensors_is_read():
    index = {"a.w": {"safetensors_file": "/x.safetensors", "weight_name": "old.w", "dtype": "bfloat16"}}
    loader = OffloadedWeightsLoader(index=index)
    kept = state.find_kept(PrefixedDataset(PrefixedDataset(loader, "a."), ""), "w")
    assert isinstance(kept, state.KeptInSafetensors)
    assert (kept.path, kept.tensor_name, kept.dtype) == ("/x.safetensors", "old.w", torch.bfloat16)


def test_a_loaders_tensors_in_ram_come_before_its_index():
    tensor = torch.ones(2)
    loader = OffloadedWeightsLoader(state_dict={"w": tensor}, index={"w": {"dtype": "float32", "shape": [2]}})
    kept = state.find_kept(loader, "w")
    assert isinstance(kept, state.KeptTensor)
    assert kept.tensor is tensor


def test_placeholders_in_a_mapping_are_no_data():
    assert state.find_kept({"w": torch.empty(2, device="meta"), "n": None}, "w") is None
    assert state.find_kept({"w": torch.empty(2, device="meta"), "n": None}, "n") is None


def test_the_last_of_two_dispatches_comes_first(tmp_path):
    model = Tiny()
    cpu_offload(model, ACCELERATOR, state_dict=dict(model.state_dict()))
    cpu_offload(model, ACCELERATOR, state_dict=dict(Tiny().state_dict()))
    first, second = state.offloads_of(model.linear1)
    chain = state.hooks_of(model.linear1)
    assert first.weights is chain[-1].weights_map
    assert second.weights is chain[0].weights_map


def test_a_preloaded_class_covers_its_subtree():
    model = nn.Sequential(Holder())
    cpu_offload(model, ACCELERATOR, preload_module_classes=["Holder"])
    (offload,) = state.offloads_of(model[0])
    assert offload.covers_subtree
    assert sorted(state.keys_below(offload.weights, "dense.")) == ["dense.bias", "dense.weight"]


def test_flags_of_ties_are_read(tmp_path):
    model = Tied()
    dispatch_model(model, {"embed": "disk", "mid": "disk", "head": "disk"}, offload_dir=tmp_path, **DISK_ONLY)
    (embed,), (head,) = state.offloads_of(model.embed), state.offloads_of(model.head)
    assert embed.tied_names == head.tied_names == {"weight"}
    assert embed.tied_memory is head.tied_memory
    assert not state.has_confused_ties(embed)
    (mid,) = state.offloads_of(model.mid)
    assert mid.tied_names == set()


def test_a_folder_is_opened_and_a_broken_one_refused(tmp_path):
    disk_offload(Tiny(), tmp_path, ACCELERATOR)
    loader = state.open_folder(tmp_path)
    kept = state.find_kept(loader, "linear1.weight")
    assert isinstance(kept, state.KeptInDat)
    assert state.place_for_writing(kept) is None
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(ValueError, match=r"index\.json"):
        state.open_folder(tmp_path)


def test_a_change_takes_precedence_where_it_is_put(split, tmp_path):
    for module in (split.linear1, split.linear2):
        weights = state.offloads_of(module)[0].weights
        table, key = state.place_for_writing(state.find_kept(weights, "weight"))
        table[key] = torch.zeros_like(weights["weight"])
        assert torch.equal(weights["weight"], table[key])
        assert isinstance(state.find_kept(weights, "weight"), state.KeptTensor)
    assert torch.equal(split(X), Tiny().linear2.bias.expand(8, 5))


def test_unhooking_leaves_no_trace_and_can_be_taken_back(split):
    before = {path: dict(vars(module)) for path, module in split.named_modules()}
    swaps = [swap for module in split.modules() for swap in state.unhooking(module)]
    swap_all(swaps, check=lambda: None)
    assert leftovers(split) == {}
    assert split.forward.__func__ is Tiny.forward
    for swap in reversed(swaps):
        swap.undo()
    assert {path: dict(vars(module)) for path, module in split.named_modules()} == before


def test_every_wrapped_mover_is_unwrapped_however_often_it_was_wrapped(tmp_path):
    model = Tiny()
    model.to = own = lambda *_: "mine"
    for _ in range(3):
        dispatch_model(model, SPLIT, offload_dir=tmp_path)
    assert model.to is not own
    unhook(model)
    assert model.to is own
    assert "cuda" not in vars(model)


def test_a_deep_copys_movers_are_its_own_again(split):
    twin = copy.deepcopy(split)
    unhook(twin)
    assert twin.to.__self__ is twin
    assert "to" in vars(split)


def test_a_mover_patched_by_somebody_else_is_left_alone():
    model = Tiny()
    model.to = wrapper = lambda *_: None
    assert state.unhooking(model) == []
    assert model.to is wrapper


def test_a_forward_patched_over_the_hook_keeps_working_over_a_hook_that_does_nothing():
    module = nn.Linear(3, 3)
    add_hook_to_module(module, AlignDevicesHook(execution_device=ACCELERATOR))
    hooked = module.forward
    module.forward = lambda x: hooked(x) + 1
    output = module(X)
    unhook(module)
    assert type(state.own_hook(module)) is ModelHook
    assert torch.equal(module(X), output)


def test_hooks_of_others_are_kept_in_their_order():
    module = nn.Linear(3, 3)
    mine = [ModelHook(), ModelHook()]
    add_hook_to_module(module, mine[0])
    add_hook_to_module(module, AlignDevicesHook(execution_device=ACCELERATOR), append=True)
    unhook(module)
    assert state.own_hook(module) is mine[0]
    add_hook_to_module(module, AlignDevicesHook(execution_device=ACCELERATOR), append=True)
    add_hook_to_module(module, mine[1], append=True)
    unhook(module)
    assert state.hooks_of(module) == mine
    module(X)


# --- the journal ---


def test_a_failing_check_undoes_every_swap_and_a_second_interrupt_does_not_stop_it():
    class Table(dict):
        interrupts = 1

        def __setitem__(self, key, value):
            if value == "old" and self.interrupts:
                self.interrupts -= 1
                raise KeyboardInterrupt
            super().__setitem__(key, value)

    table = Table(a="old", b="old")
    swaps = [Entry(table, "a", "old", "new"), Entry(table, "b", "old", ABSENT), Entry(table, "c", ABSENT, "new")]

    def check():
        assert dict(table) == {"a": "new", "c": "new"}
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        swap_all(swaps, check)
    assert dict(table) == {"a": "old", "b": "old"}
    assert table.interrupts == 0
