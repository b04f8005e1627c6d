"""Every way in which accelerate takes a model's weights away, undone."""

import copy
import os
from collections import UserDict
from pathlib import Path

import pytest
import torch
from accelerate import (
    cpu_offload,
    cpu_offload_with_hook,
    disk_offload,
    dispatch_model,
    init_empty_weights,
    load_checkpoint_and_dispatch,
    load_checkpoint_in_model,
)
from accelerate.hooks import (
    AlignDevicesHook,
    ModelHook,
    SequentialHook,
    add_hook_to_module,
    attach_align_device_hook,
)
from accelerate.utils import OffloadedWeightsLoader
from dispatched import (
    ACCELERATOR,
    DISK_ONLY,
    REFUSES,
    SPLIT,
    Holder,
    Nested,
    OwnParameter,
    Root,
    Tiny,
    X,
    assert_moves,
    assert_same,
    assert_stuck,
    assert_whole,
    built_by_accelerate,
    check_round,
    leftovers,
    meta_names,
    portrait,
    state,
)
from safetensors.torch import save_file
from torch import nn

from modelcache.dataplane.materialize.entry_points import is_dispatched, materialize_meta_tensors, plan_materialize
from modelcache.errors import MaterializeError


def dispatched(folder, model=None, **options):
    model = model or Tiny().eval()
    return dispatch_model(model, SPLIT, offload_dir=folder, **options)


class Plus100(ModelHook):
    def post_forward(self, module, output):
        return output + 100


# --- entry points ---


def test_a_model_dispatched_to_cpu_and_disk_becomes_whole_and_moves(tmp_path):
    model = Tiny().eval()
    expected, output = state(model), model(X)
    dispatched(tmp_path, model)
    model(X)
    with pytest.raises(RuntimeError, match=REFUSES):
        model.to("cpu")
    with pytest.raises(RuntimeError, match=REFUSES):
        model.cuda()
    assert_stuck(model)
    assert materialize_meta_tensors(model) is model
    assert_whole(model, expected)
    assert torch.allclose(model(X), output, atol=1e-6)
    assert_moves(model)


@pytest.mark.parametrize("offload_buffers", [False, True])
def test_cpu_entries_with_an_accelerator_as_main_device_become_whole(tmp_path, offload_buffers):
    model = Tiny().eval()
    model.batchnorm.register_buffer("absent", None)
    model.batchnorm.register_buffer("passing", torch.ones(2), persistent=False)
    check_round(
        model,
        lambda m: dispatched(tmp_path, m, main_device=ACCELERATOR, offload_buffers=offload_buffers),
        X,
    )
    assert model.batchnorm.absent is None
    assert "batchnorm.passing" not in model.state_dict()
    assert model.batchnorm.passing.tolist() == [1, 1]


@pytest.mark.parametrize("offload_buffers", [False, True])
def test_cpu_offload_becomes_whole(offload_buffers):
    check_round(Tiny().eval(), lambda m: cpu_offload(m, ACCELERATOR, offload_buffers=offload_buffers), X)


@pytest.mark.parametrize("offload_buffers", [False, True])
def test_disk_offload_becomes_whole(tmp_path, offload_buffers):
    check_round(Tiny().eval(), lambda m: disk_offload(m, tmp_path, ACCELERATOR, offload_buffers=offload_buffers), X)


def test_cpu_offload_with_hook_leaves_a_plain_model():
    model = Tiny().eval()
    expected = state(model)
    cpu_offload_with_hook(model, ACCELERATOR)
    assert is_dispatched(model)
    assert_whole(materialize_meta_tensors(model), expected)


def test_a_parameter_of_the_root_under_a_sequential_hook_becomes_whole():
    model = Root()
    cpu_offload(copy.deepcopy(model), ACCELERATOR)
    check_round(model, lambda m: cpu_offload(m, ACCELERATOR), X)


def test_a_model_dispatched_twice_becomes_whole_and_loses_both_hooks(tmp_path):
    def twice(model):
        dispatched(tmp_path, model)
        dispatched(tmp_path, model)
        assert isinstance(model.linear2._hf_hook, SequentialHook)

    check_round(Tiny().eval(), twice, X)


def test_a_second_dispatch_that_copied_placeholders_is_no_obstacle(tmp_path):
    def twice(model):
        dispatched(tmp_path, model, main_device=ACCELERATOR)
        dispatched(tmp_path, model, main_device=ACCELERATOR)

    check_round(Tiny().eval(), twice)


def test_a_checkpoint_that_was_never_on_a_real_device_becomes_whole(tmp_path):
    source = Tiny().eval()
    torch.save(source.state_dict(), tmp_path / "m.bin")
    with init_empty_weights():
        model = Tiny().eval()
    places = {"linear1": "cpu", "batchnorm": "disk", "linear2": "disk"}
    load_checkpoint_and_dispatch(model, str(tmp_path / "m.bin"), places, offload_folder=tmp_path / "o")
    assert_stuck(model)
    materialize_meta_tensors(model)
    assert_whole(model, state(source))
    assert torch.allclose(model(X), source(X), atol=1e-6)


def test_a_folder_that_no_hook_knows_of_can_be_named(tmp_path):
    source = Nested()
    torch.save(source.state_dict(), tmp_path / "m.bin")
    with init_empty_weights():
        model = Nested()
    load_checkpoint_in_model(
        model, str(tmp_path / "m.bin"), {"blk": "disk", "out": "cpu"}, offload_folder=str(tmp_path / "o")
    )
    before = portrait(model)
    with pytest.raises(MaterializeError) as caught:
        materialize_meta_tensors(model)
    assert set(caught.value.names) == {"blk.scale", "blk.lin.weight", "blk.lin.bias"}
    assert "extra_sources" in str(caught.value)
    assert portrait(model) == before
    others = copy.deepcopy(model), copy.deepcopy(model), copy.deepcopy(model)
    save_file(source.state_dict(), tmp_path / "all.safetensors")
    loader = OffloadedWeightsLoader(save_folder=str(tmp_path / "o"))
    sources = [tmp_path / "o", loader, dict(source.state_dict()), [{}, str(tmp_path)]]
    for one, extra in zip((model, *others), sources, strict=True):
        assert_whole(materialize_meta_tensors(one, extra_sources=extra), state(source))


@pytest.mark.filterwarnings("ignore:The following device_map keys:UserWarning")
def test_a_parameter_mapped_by_name_that_no_hook_owns_is_found(tmp_path):
    source = Nested()
    torch.save(source.state_dict(), tmp_path / "m.bin")
    with init_empty_weights():
        model = Nested()
    places = {"blk.scale": "disk", "blk.lin": "disk", "out": "cpu"}
    load_checkpoint_and_dispatch(model, str(tmp_path / "m.bin"), places, offload_folder=str(tmp_path / "o"))
    assert "_hf_hook" not in vars(model.blk)
    assert model.blk.scale.is_meta
    materialize_meta_tensors(model)
    assert_whole(model, state(source))


def test_a_module_under_two_parents_stays_one_module():
    shared = nn.Linear(3, 3)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared)})
    check_round(model, lambda m: cpu_offload(m, ACCELERATOR))
    assert model["a"][0] is model["b"][0]


def test_a_preloaded_class_becomes_whole_below_its_own_hook():
    model = nn.Sequential(Holder(), nn.Linear(3, 3))
    check_round(model, lambda m: cpu_offload(m, ACCELERATOR, preload_module_classes=["Holder"]), X)


def test_a_parameter_list_becomes_whole():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.ParameterList([nn.Parameter(torch.randn(2))])})
    check_round(model, lambda m: cpu_offload(m, ACCELERATOR))


def test_a_hook_added_by_hand_becomes_whole():
    def hook(model):
        add_hook_to_module(model[0], AlignDevicesHook(execution_device=ACCELERATOR, offload=True))

    check_round(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), hook, X)


def test_a_mapping_that_is_not_accelerates_and_hooks_without_history_become_whole():
    def attach(model):
        weights = UserDict(state(model))
        attach_align_device_hook(model, execution_device=ACCELERATOR, offload=True, weights_map=weights)
        for module in model.modules():
            vars(module._hf_hook).pop("original_devices", None) if "_hf_hook" in vars(module) else None

    check_round(Tiny().eval(), attach, X)


def test_data_of_one_dispatch_is_never_taken_for_a_part_outside_of_it():
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(3, 3)), "0": nn.Linear(3, 3)})
    cpu_offload(model["a"], ACCELERATOR)
    model["0"].to("meta")
    with pytest.raises(MaterializeError) as caught:
        materialize_meta_tensors(model)
    assert caught.value.names == ("0.weight", "0.bias")


# --- tensors come back as they were ---


def test_the_placeholders_dtype_wins_over_the_files(tmp_path):
    model = dispatched(tmp_path)
    model.half()
    materialize_meta_tensors(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert torch.equal(model.linear2.weight, Tiny().linear2.weight.half())


def test_every_dtype_of_an_offload_folder_comes_back_bit_exact(tmp_path):
    model = nn.Module()
    model.scalar = nn.Parameter(torch.tensor(1.5, dtype=torch.bfloat16))
    model.brain = nn.Parameter(torch.randn(4, 6).bfloat16())
    model.empty = nn.Parameter(torch.empty(0, 4))
    model.pair = nn.Parameter(torch.randn(2, 2, dtype=torch.complex64))
    model.register_buffer("flags", torch.tensor([True, False]))
    model.register_buffer("count", torch.tensor(7))
    expected = state(model)
    disk_offload(model, tmp_path, ACCELERATOR, offload_buffers=True)
    assert len(meta_names(model)) == 6
    materialize_meta_tensors(model)
    for name, tensor in expected.items():
        got = model.state_dict()[name]
        assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(got.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


@built_by_accelerate("1.15", "cannot store fp8 in an offload folder")
def test_fp8_in_an_offload_folder_comes_back_bit_exact(tmp_path):
    eighth = torch.randn(3, 2).to(torch.float8_e4m3fn)
    model = nn.ParameterDict({"eighth": nn.Parameter(eighth.clone(), requires_grad=False)})
    disk_offload(model, tmp_path, ACCELERATOR)
    assert meta_names(model) == ["eighth"]
    materialize_meta_tensors(model)
    assert model["eighth"].dtype == torch.float8_e4m3fn
    assert torch.equal(model["eighth"].view(torch.uint8), eighth.view(torch.uint8))


def test_strides_survive_the_disk(tmp_path):
    model = nn.Sequential(nn.Conv2d(4, 4, 3)).to(memory_format=torch.channels_last)
    model[0].weight.requires_grad_(False)
    stride = model[0].weight.stride()
    check_round(model, lambda m: disk_offload(m, tmp_path, ACCELERATOR))
    assert model[0].weight.stride() == stride
    assert not model[0].weight.requires_grad


def test_the_dtype_of_a_safetensors_index_is_obeyed(tmp_path):
    source = Tiny()
    save_file(source.state_dict(), tmp_path / "m.safetensors")
    model = copy.deepcopy(source).to(torch.bfloat16)
    index = {
        name: {"safetensors_file": str(tmp_path / "m.safetensors"), "weight_name": name, "dtype": "bfloat16"}
        for name, _ in model.named_parameters()
    }
    dispatch_model(model, dict.fromkeys(SPLIT, "disk"), offload_index=index, **DISK_ONLY)
    materialize_meta_tensors(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, source.get_parameter(name).bfloat16())


def test_class_flag_and_attributes_of_a_parameter_survive():
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].weight = OwnParameter(model[0].weight.data, requires_grad=False)
    cpu_offload(model, ACCELERATOR)
    model(X)
    model[0].weight.note = "mine"
    materialize_meta_tensors(model)
    assert type(model[0].weight) is OwnParameter
    assert model[0].weight.note == "mine"
    assert not model[0].weight.requires_grad
    assert model[0].bias.requires_grad


def test_live_buffers_are_not_overwritten_by_stale_copies(tmp_path):
    model = Tiny().train()
    disk_offload(model, tmp_path, ACCELERATOR)
    with torch.no_grad():
        model(X)
        model(X)
    mean = model.batchnorm.running_mean.clone()
    materialize_meta_tensors(model)
    assert int(model.batchnorm.num_batches_tracked) == 2
    assert torch.equal(model.batchnorm.running_mean, mean)


def test_gradients_of_parameters_that_stayed_are_kept(tmp_path):
    model = Tiny()
    model.linear2.weight.grad = gradient = torch.randn(5, 4)
    dispatch_model(model, {"linear1": "disk", "batchnorm": "cpu", "linear2": "cpu"}, offload_dir=tmp_path)
    materialize_meta_tensors(model)
    assert model.linear2.weight.grad is gradient


def test_weights_left_in_place_by_a_failed_forward_are_kept(tmp_path):
    model = Tiny().eval()
    expected = state(model)
    dispatched(tmp_path, model)
    forward = model.linear2._old_forward
    model.linear2._old_forward = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        model(X)
    model.linear2._old_forward = forward
    assert not model.linear2.weight.is_meta
    assert_whole(materialize_meta_tensors(model), expected)


def test_the_memory_of_a_checkpoint_is_the_models_own(tmp_path):
    source = Tiny().eval()
    path = tmp_path / "m.safetensors"
    save_file(source.state_dict(), path)
    model = copy.deepcopy(source)
    index = {
        name: {"safetensors_file": str(path), "weight_name": name, "dtype": "float32"}
        for name, _ in model.named_parameters()
    }
    dispatch_model(model, dict.fromkeys(SPLIT, "disk"), offload_index=index, **DISK_ONLY)
    materialize_meta_tensors(model)
    assert path.name not in Path("/proc/self/maps").read_text()
    os.truncate(path, 16)
    assert_same(model.state_dict(), source.state_dict())


def test_weights_that_the_dispatch_keeps_in_ram_are_shared_unless_copies_are_asked_for():
    for copies in ("auto", "always"):
        model = Tiny()
        cpu_offload(model, ACCELERATOR)
        kept = model.linear1._hf_hook.weights_map["weight"]
        materialize_meta_tensors(model, copy=copies)
        assert (model.linear1.weight.data_ptr() == kept.data_ptr()) == (copies == "auto")
        assert torch.equal(model.linear1.weight, kept)


def test_views_of_one_memory_stay_views_when_copied():
    both = torch.arange(6.0)
    model = nn.ParameterDict({"a": nn.Parameter(both[:3]), "b": nn.Parameter(both[2:])})
    cpu_offload(model, ACCELERATOR)
    materialize_meta_tensors(model, copy="always")
    with torch.no_grad():
        model["a"][2] = 70
    assert model["b"].tolist() == [70, 3, 4, 5]
    assert both[2] == 2


# --- around the call ---


@pytest.mark.parametrize("where", ["meta context", "default device", "empty weights", "inference mode"])
def test_what_the_caller_has_set_does_not_leak_into_the_weights(tmp_path, where):
    model = Tiny().eval()
    expected = state(model)
    disk_offload(model, tmp_path, ACCELERATOR)
    if where == "default device":
        torch.set_default_device("meta")
        try:
            materialize_meta_tensors(model)
        finally:
            torch.set_default_device(None)
    else:
        contexts = {
            "meta context": torch.device("meta"),
            "empty weights": init_empty_weights(include_buffers=True),
            "inference mode": torch.inference_mode(),
        }
        with contexts[where]:
            if where == "inference mode":
                model(X)
            materialize_meta_tensors(model)
    assert_whole(model, expected)
    assert not any(tensor.is_inference() for tensor in model.parameters())
    assert model(X).requires_grad


def test_a_plain_model_is_left_alone():
    model = Tiny()
    before = portrait(model)
    materialize_meta_tensors(materialize_meta_tensors(model))
    assert portrait(model) == before
    assert not is_dispatched(model)


def test_a_deep_copy_is_made_whole_without_touching_the_original(tmp_path):
    model = Tiny().eval()
    output = model(X)
    dispatched(tmp_path, model)
    twin = copy.deepcopy(model)
    materialize_meta_tensors(twin)
    assert leftovers(twin) == {}
    twin.to(torch.float64)
    assert twin.linear2.weight.dtype == torch.float64
    assert meta_names(model) == ["linear2.weight", "linear2.bias"]
    assert model.linear1.weight.dtype == torch.float32
    assert torch.allclose(model(X), output, atol=1e-6)


def test_what_the_user_patched_before_the_dispatch_survives(tmp_path):
    model = Tiny().eval()
    plain = model.linear1.forward
    model.linear1.forward = lambda x: plain(x) * 2
    model.to = lambda *_: "mine"
    output = model(X)
    dispatched(tmp_path, model)
    materialize_meta_tensors(model)
    assert torch.allclose(model(X), output, atol=1e-6)
    assert model.to("cpu") == "mine"


def test_what_the_user_patched_after_the_dispatch_survives(tmp_path):
    model = dispatched(tmp_path)
    hooked = model.linear2.forward
    model.linear2.forward = lambda x: hooked(x) * 2
    output = model(X)
    materialize_meta_tensors(model)
    assert not is_dispatched(model)
    assert torch.allclose(model(X), output, atol=1e-6)
    model.to("cpu")


def test_a_class_can_be_swapped_afterwards():
    class Zero(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 0

    model = Tiny().eval()
    cpu_offload(model, ACCELERATOR)
    materialize_meta_tensors(model)
    model.linear1.__class__ = Zero
    assert torch.equal(model.linear1(X), torch.zeros(8, 4))


def test_hooks_of_others_stay_and_work():
    model = Tiny().eval()
    output = model(X)
    cpu_offload(model, ACCELERATOR)
    add_hook_to_module(model.linear2, Plus100(), append=True)
    materialize_meta_tensors(model)
    assert not is_dispatched(model)
    assert isinstance(model.linear2._hf_hook, Plus100)
    assert torch.allclose(model(X), output + 100, atol=1e-4)
    model.to(torch.float64)
    assert model(X.double()).dtype == torch.float64


def test_two_hooks_of_others_stay_in_their_order():
    class Double(ModelHook):
        def post_forward(self, module, output):
            return output * 2

    model = Tiny().eval()
    output = model(X)
    cpu_offload(model, ACCELERATOR)
    add_hook_to_module(model.linear2, Double(), append=True)
    add_hook_to_module(model.linear2, Plus100(), append=True)
    materialize_meta_tensors(model)
    assert torch.allclose(model(X), output * 2 + 100, atol=1e-4)


def test_torch_hooks_stay():
    model = Tiny().eval()
    seen = []
    model.linear2.register_forward_hook(lambda *_: seen.append("forward"))
    cpu_offload(model, ACCELERATOR)
    materialize_meta_tensors(model)
    model(X)
    assert seen == ["forward"]


def test_a_parametrized_model_becomes_whole():
    model = nn.Sequential(nn.Linear(3, 3))
    torch.nn.utils.parametrizations.weight_norm(model[0])
    check_round(model, lambda m: cpu_offload(m, ACCELERATOR), X)


def test_a_traced_model_gets_the_forward_of_its_class_back():
    model = torch.fx.symbolic_trace(Tiny().eval())
    forward = type(model).forward
    cpu_offload(model, ACCELERATOR)
    assert type(model).forward is not forward
    materialize_meta_tensors(model)
    assert type(model).forward is forward
    assert meta_names(model) == []
    assert torch.allclose(model(X), Tiny().eval()(X), atol=1e-6)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_compiled_model_becomes_whole(tmp_path, when):
    model = Tiny().eval()
    expected, output = state(model), model(X)
    compiled = torch.compile(model, backend="eager") if when == "before" else model
    dispatched(tmp_path, model)
    if when == "after":
        compiled = torch.compile(model, backend="eager")
    assert is_dispatched(compiled)
    assert materialize_meta_tensors(compiled) is compiled
    assert_whole(model, expected)
    with torch.no_grad():
        assert torch.allclose(compiled(X), output, atol=1e-6)
    compiled.to(torch.float64)


def test_progress_counts_bytes_up_to_all_of_them(tmp_path):
    model = dispatched(tmp_path)
    seen = []
    materialize_meta_tensors(model, progress=lambda *report: seen.append(report))
    assert sorted(name for _, _, name in seen) == ["linear2.bias", "linear2.weight"]
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert {total for _, total, _ in seen} == {seen[-1][0]} == {100}


def test_one_worker_and_many_give_the_same(tmp_path):
    for workers in (1, 3):
        model = nn.ModuleList(nn.Linear(8, 8) for _ in range(140))
        expected = state(model)
        disk_offload(model, tmp_path / str(workers), ACCELERATOR)
        assert_whole(materialize_meta_tensors(model, num_workers=workers), expected)


def test_the_plan_says_where_everything_is_and_changes_nothing(tmp_path):
    model = nn.ModuleDict({"whole": dispatched(tmp_path, main_device=ACCELERATOR), "gone": nn.Linear(2, 2)})
    model["gone"].to("meta")
    before = portrait(model)
    plan = plan_materialize(model)
    assert portrait(model) == before
    sources = {tensor.names: tensor.source for tensor in plan.tensors}
    assert sources["whole.linear1.weight",] == "memory of the dispatch on cpu"
    assert sources["whole.linear2.weight",] == f"file {tmp_path}/linear2.weight.dat"
    assert plan.missing == ("gone.weight", "gone.bias")
    assert plan.needed_bytes == 100
    assert "missing  gone.weight" in str(plan)
    assert plan_materialize(model, copy="always").needed_bytes == 196


def test_arguments_without_sense_are_refused(tmp_path):
    model = dispatched(tmp_path)
    before = portrait(model)
    for wrong in (
        {"target_device": "meta"},
        {"copy": "sometimes"},
        {"num_workers": 0},
        {"extra_sources": tmp_path / "nothing"},
        {"tied_params": [["linear1.weight", "nowhere"]]},
    ):
        with pytest.raises(ValueError):
            materialize_meta_tensors(model, **wrong)
    for wrong in ({"extra_sources": 7}, {"tied_params": ["linear1.weight"]}):
        with pytest.raises(TypeError):
            materialize_meta_tensors(model, **wrong)
    assert portrait(model) == before
