"""Models under diffusers' group offloading, made whole and given back to their groups."""

import copy
import os
from contextlib import closing
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from dispatched import IDS, Tied, X, assert_same, assert_whole, portrait, state
from safetensors.torch import load_file, save_file
from torch import nn

from modelcache.dataplane.device.simulated import SimulatedDevice
from modelcache.dataplane.materialize.diffusers_state import offloads_groups
from modelcache.dataplane.materialize.entry_points import (
    is_dispatched,
    materialize_meta_tensors,
    materialized,
    plan_materialize,
    restore_dispatch,
)
from modelcache.errors import MaterializeError

diffusers = pytest.importorskip("diffusers")
group_offloading = pytest.importorskip("diffusers.hooks.group_offloading")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

IMAGE = torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8)
KINDS = {
    "by leaf": {"offload_type": "leaf_level"},
    "by block": {"offload_type": "block_level", "num_blocks_per_group": 1},
}


@pytest.fixture(autouse=True)
def _quiet():
    diffusers.utils.logging.set_verbosity_error()
    yield
    diffusers.utils.logging.set_verbosity_warning()


@pytest.fixture
def sim():
    with closing(SimulatedDevice(16 << 20, link_bytes_per_s=None)) as device:
        yield device


def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"), add_attention=False,
    ).eval()  # fmt: skip


def run(model, image=IMAGE):
    with torch.no_grad():
        return model(image, 1).sample


def offload(model, folder=None, kind="by leaf", onto="cpu"):
    """Group offloading into files of a folder, or into RAM without one."""
    to_disk = {} if folder is None else {"offload_to_disk_path": str(folder)}
    diffusers.hooks.apply_group_offloading(model, onload_device=torch.device(onto), **KINDS[kind], **to_disk)
    return model


def parts(model):
    return {n: t for n, t in [*model.named_parameters(), *model.named_buffers()]}


def objects(model):
    return {name: id(tensor) for name, tensor in parts(model).items()}


def differing(model, expected):
    return sum(not torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@pytest.fixture(params=["files", "ram"])
def folder(request, tmp_path):
    """Where the groups keep their weights."""
    return tmp_path / "groups" if request.param == "files" else None


# --- whole, and back ---


@pytest.mark.parametrize("forwards", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_a_group_offloaded_model_becomes_whole_and_moves(folder, kind, forwards):
    model = unet()
    expected, output, known = state(model), run(model), objects(model)
    offload(model, folder, kind)
    for _ in range(forwards):
        assert torch.allclose(run(model), output, atol=1e-5)
    if folder is not None:
        assert differing(model, expected) > 50  # not on meta: no error, only garbage
    assert is_dispatched(model)
    assert materialize_meta_tensors(model) is model
    assert_whole(model, expected)
    assert objects(model) == known
    assert not any(offloads_groups(module) for module in model.modules())
    assert torch.allclose(run(model), output, atol=1e-5)
    assert model.to(device="cpu", dtype=torch.float64).dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS)
def test_the_groups_come_back_and_work(folder, kind):
    model = offload(unet(), folder, kind)
    output, known = run(unet()), objects(model)
    chains = {name: (vars(m).get("forward"), list(hooks(m))) for name, m in model.named_modules()}
    for _ in range(2):
        materialize_meta_tensors(model)
        model.to(torch.float64)
        model.to(torch.float32)
        restore_dispatch(model, on_modified="error")
        assert is_dispatched(model)
        assert {name: (vars(m).get("forward"), list(hooks(m))) for name, m in model.named_modules()} == chains
        assert objects(model) == known
        for _ in range(2):
            assert torch.allclose(run(model), output, atol=1e-5)
        if folder is not None:
            assert differing(model, state(unet())) > 50
    assert_whole(materialize_meta_tensors(model), state(unet()))


def hooks(module):
    return getattr(vars(module).get("_diffusers_hook"), "hooks", {})


def test_a_block_of_code_sees_a_whole_model(folder):
    model = offload(unet(), folder)
    with materialized(model):
        assert_whole(model, state(unet()))
    with pytest.raises(ValueError, match="mine"), materialized(model):
        raise ValueError("mine")
    assert torch.allclose(run(model), run(unet()), atol=1e-5)


def test_the_plan_counts_what_is_in_files(tmp_path):
    model = unet()
    total = sum(t.numel() * t.element_size() for t in parts(model).values())
    assert plan_materialize(offload(model, tmp_path)).needed_bytes == total
    assert plan_materialize(offload(unet())).needed_bytes == 0
    source = plan_materialize(model).tensors[0].source
    assert source.startswith(f"file {tmp_path}/group_")


def test_a_model_of_another_library_becomes_whole(folder):
    model = offload(Tied(), folder, "by block")
    output = Tied()(IDS)
    assert_whole(materialize_meta_tensors(model), state(Tied()))
    assert model.head.weight is model.embed.weight
    restore_dispatch(model)
    assert torch.allclose(model(IDS), output, atol=1e-6)


def test_buffers_replaced_by_a_move_are_the_groups_own_again(folder):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    expected = state(model)
    offload(model, folder)
    known = objects(model)
    materialize_meta_tensors(model)
    model.double().float()
    assert objects(model) != known
    restore_dispatch(model)
    assert objects(model) == known
    assert_whole(materialize_meta_tensors(model), expected)


def test_a_pipeline_becomes_whole_and_is_given_back(folder):
    pipe = diffusers.DDPMPipeline(unet=unet(), scheduler=diffusers.DDPMScheduler(num_train_timesteps=2))
    options = {} if folder is None else {"offload_to_disk_path": str(folder)}
    pipe.enable_group_offload(torch.device("cpu"), **KINDS["by leaf"], **options)
    materialize_meta_tensors(pipe)
    assert_whole(pipe.unet, state(unet()))
    pipe.to(torch.float64)
    pipe.to(torch.float32)
    pipe.enable_model_cpu_offload(device="cpu")  # refused while groups are active
    pipe.remove_all_hooks()
    restore_dispatch(pipe)
    assert is_dispatched(pipe)
    assert torch.allclose(run(pipe.unet), run(unet()), atol=1e-5)


def test_weights_left_in_place_by_a_failed_forward_become_whole(folder):
    model = offload(unet(), folder)
    model.conv_in.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(model)
    assert_whole(materialize_meta_tensors(model), state(unet()))


# --- devices ---


def test_groups_in_ram_go_to_the_accelerator_and_home_again(sim):
    model = offload(unet(), onto="sim:0")
    output = run(unet())
    assert torch.allclose(run(model, IMAGE.to("sim:0")).cpu(), output, atol=1e-5)
    assert {t.device.type for t in parts(model).values()} == {"cpu"}
    materialize_meta_tensors(model, "sim:0")
    assert {t.device.type for t in parts(model).values()} == {"sim"}
    assert torch.allclose(run(model, IMAGE.to("sim:0")).cpu(), output, atol=1e-5)
    restore_dispatch(model)
    assert {t.device.type for t in parts(model).values()} == {"cpu"}
    assert sim.allocated_bytes() == 0
    assert torch.allclose(run(model, IMAGE.to("sim:0")).cpu(), output, atol=1e-5)


@pytest.mark.parametrize("moved", ["by us", "by itself"])
def test_groups_in_files_are_read_onto_the_accelerator(tmp_path, sim, moved):
    model = offload(unet(), tmp_path)
    materialize_meta_tensors(model, "sim:0" if moved == "by us" else "cpu")
    model.to("sim:0")
    assert torch.allclose(run(model, IMAGE.to("sim:0")).cpu(), run(unet()), atol=1e-5)
    restore_dispatch(model, on_modified="error")
    assert sim.allocated_bytes() == 0
    assert torch.allclose(run(model), run(unet()), atol=1e-5)


# --- changes ---

CHANGED = "down_blocks.0.resnets.0.conv1"
CHANGES = {
    "in place": lambda layer: layer.weight.add_(1),
    "behind the version": lambda layer: layer.weight.data.add_(1),
    "another object": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight + 1)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_change_survives_being_given_back(folder, kind, change):
    model = offload(unet(), folder, kind)
    files = {path: path.read_bytes() for path in folder.iterdir()} if folder else {}
    with torch.no_grad(), materialized(model):
        CHANGES[change](model.get_submodule(CHANGED))
        expected, output = state(model), run(model)
    for _ in range(2):
        assert torch.allclose(run(model), output, atol=1e-5)
    assert_whole(materialize_meta_tensors(model), expected)
    assert {path: path.read_bytes() for path in files} == files


def test_a_change_of_dtype_survives_being_given_back(folder):
    model = offload(unet(), folder)
    with materialized(model):
        model.to(torch.float64)
        output = run(model, IMAGE.double())
    for _ in range(2):
        assert torch.equal(run(model, IMAGE.double()), output)
    assert_whole(materialize_meta_tensors(model), {name: t.double() for name, t in state(unet()).items()})


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_weights_in_files_can_be_an_error_or_be_discarded(tmp_path, change):
    model = offload(unet(), tmp_path)
    materialize_meta_tensors(model)
    with torch.no_grad():
        CHANGES[change](model.get_submodule(CHANGED))
    before = portrait(model)
    with pytest.raises(MaterializeError, match="written to") as caught:
        restore_dispatch(model, on_modified="error")
    assert caught.value.names == (f"{CHANGED}.weight",)
    assert portrait(model) == before
    restore_dispatch(model, on_modified="discard")
    assert torch.allclose(run(model), run(unet()), atol=1e-5)
    assert_whole(materialize_meta_tensors(model), state(unet()))


def tied_over_two_groups(folder):
    """Two layers with one bias in a group each, and what diffusers should have written for them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].bias = model[0].bias
    expected = state(model)
    offload(model, folder)
    groups = [hooks(layer)["group_offloading"].group for layer in model]
    for layer, group in zip(("0", "1"), groups, strict=True):
        data = {key: expected[f"{layer}.weight"] for key, t in group.key_to_tensor.items() if t.dim() == 2}
        data |= {key: expected[f"{layer}.bias"] for key, t in group.key_to_tensor.items() if t.dim() == 1}
        save_file(data, group.safetensors_file_path)
    return model, expected, groups


def test_a_tensor_of_two_groups_becomes_whole_when_their_files_agree(tmp_path):
    model, expected, _ = tied_over_two_groups(tmp_path)
    assert_whole(materialize_meta_tensors(model), expected)
    assert model[0].bias is model[1].bias
    restore_dispatch(model)
    assert_whole(materialize_meta_tensors(model), expected)


def test_a_tensor_of_two_groups_is_refused_when_their_files_differ(tmp_path):
    model, expected, groups = tied_over_two_groups(tmp_path)
    key = next(key for key, tensor in groups[1].key_to_tensor.items() if tensor.dim() == 1)
    data = load_file(groups[1].safetensors_file_path) | {key: torch.zeros(3)}
    save_file(data, groups[1].safetensors_file_path)
    before = portrait(model)
    with pytest.raises(MaterializeError, match="two versions") as caught:
        materialize_meta_tensors(model)
    assert caught.value.names == ("0.bias",)
    assert portrait(model) == before


@pytest.mark.parametrize("changed", ["0", "1"])
def test_two_groups_with_one_tensor_stay_in_ram_together(tmp_path, changed):
    model, _, _ = tied_over_two_groups(tmp_path)
    materialize_meta_tensors(model)
    with torch.no_grad():
        model.get_parameter(f"{changed}.weight").add_(1)
    expected, output = state(model), model(X)
    restore_dispatch(model)
    for _ in range(2):
        assert torch.allclose(model(X), output, atol=1e-6)
    assert_whole(materialize_meta_tensors(model), expected)


# --- others' hooks ---


@pytest.mark.parametrize("kind", KINDS)
def test_layerwise_casting_stays_and_works(folder, kind):
    model = unet()
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    offload(model, folder, kind)
    output = run(model)
    materialize_meta_tensors(model)
    layer = model.mid_block.resnets[0].conv1
    assert list(hooks(layer)) == ["layerwise_casting"]
    assert torch.equal(layer.weight, unet().mid_block.resnets[0].conv1.weight.bfloat16())
    assert torch.allclose(run(model), output, atol=1e-5)
    assert layer.weight.dtype == torch.bfloat16
    restore_dispatch(model, on_modified="error")
    assert torch.allclose(run(model), output, atol=1e-5)


class Noted(diffusers.hooks.ModelHook):
    """Says when it runs, and runs the forward itself."""

    def __init__(self, name, seen):
        super().__init__()
        self.name, self.seen = name, seen

    def new_forward(self, module, *args, **kwargs):
        self.seen.append(self.name)
        return self.fn_ref.original_forward(*args, **kwargs)


def noted(layer, name, seen):
    diffusers.hooks.HookRegistry.check_if_exists_or_initialize(layer).register_hook(Noted(name, seen), name)


def test_hooks_inside_and_outside_of_the_group_keep_their_order(folder):
    model, seen = nn.Sequential(nn.Linear(3, 3)), []
    expected, output = state(model), model(X)
    noted(model[0], "inner", seen)
    offload(model, folder)
    noted(model[0], "middle", seen)
    noted(model[0], "outer", seen)
    materialize_meta_tensors(model)
    assert list(hooks(model[0])) == ["inner", "middle", "outer"]
    assert torch.allclose(model(X), output, atol=1e-6)
    assert seen == ["outer", "middle", "inner"]
    assert_same(model.state_dict(), expected)
    restore_dispatch(model)
    assert torch.allclose(model(X), output, atol=1e-6)
    materialize_meta_tensors(model)
    for name in ("middle", "outer", "inner"):
        model[0]._diffusers_hook.remove_hook(name)
    seen.clear()
    assert torch.allclose(model(X), output, atol=1e-6)
    assert seen == []
    assert model[0].forward == nn.Linear.forward.__get__(model[0])


@pytest.mark.parametrize("change", ["add", "remove"])
def test_hooks_changed_meanwhile_stop_the_restore(folder, change):
    model, seen = nn.Sequential(nn.Linear(3, 3)), []
    noted(model[0], "inner", seen)
    offload(model, folder)
    noted(model[0], "outer", seen)
    materialize_meta_tensors(model)
    if change == "add":
        noted(model[0], "new", seen)
    else:
        model[0]._diffusers_hook.remove_hook("inner")
    before = portrait(model)
    with pytest.raises(MaterializeError, match="since|was set after"):
        restore_dispatch(model)
    assert portrait(model) == before


def test_a_forward_patched_over_the_group_survives(folder):
    model = offload(unet(), folder)
    hooked = model.conv_out.forward
    model.conv_out.forward = lambda x: hooked(x) * 2
    output = run(model)
    materialize_meta_tensors(model)
    assert not is_dispatched(model)
    model.to(torch.float64)
    assert torch.allclose(run(model, IMAGE.double()).float(), output, atol=1e-5)
    model.to(torch.float32)
    restore_dispatch(model)
    assert torch.allclose(run(model), output, atol=1e-5)


def test_a_class_can_be_swapped_afterwards(folder):
    class Zero(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) * 0

    model = materialize_meta_tensors(offload(unet(), folder))
    model.conv_out.__class__ = Zero
    assert not run(model).any()


# --- what is refused, and what stays as it was ---


def test_a_whole_model_can_be_copied_and_the_copy_is_on_its_own(folder):
    model = materialize_meta_tensors(offload(unet(), folder))
    twin = copy.deepcopy(model)
    assert_whole(twin, state(unet()))
    twin.to(torch.float64)
    restore_dispatch(model)
    assert torch.allclose(run(twin, IMAGE.double()).float(), run(unet()), atol=1e-5)
    assert torch.allclose(run(model), run(unet()), atol=1e-5)


@pytest.mark.parametrize("damage", ["missing", "cut short", "of another model"])
def test_a_file_that_cannot_be_used_is_named_and_nothing_is_touched(tmp_path, damage):
    model = offload(unet(), tmp_path)
    path = Path(hooks(model.conv_in)["group_offloading"].group.safetensors_file_path)
    if damage == "missing":
        path.unlink()
    elif damage == "cut short":
        os.truncate(path, path.stat().st_size - 4)
    else:
        save_file({"tensor_0": torch.zeros(2, 2), "tensor_1": torch.zeros(8)}, path)
    before = portrait(model)
    with pytest.raises(MaterializeError, match=path.name) as caught:
        materialize_meta_tensors(model)
    assert "conv_in.weight" in caught.value.names
    assert portrait(model) == before


def test_two_models_in_one_folder_are_refused_by_name(tmp_path):
    both = {"one": offload(unet(), tmp_path), "two": offload(unet(), tmp_path)}
    with pytest.raises(MaterializeError, match="a folder of its own") as caught:
        materialize_meta_tensors(both)
    assert {"one.conv_in.weight", "two.conv_in.weight"} <= set(caught.value.names)
    apart = {"one": offload(unet(), tmp_path / "1"), "two": offload(unet(), tmp_path / "2")}
    for model in materialize_meta_tensors(apart).values():
        assert_whole(model, state(unet()))


def test_an_interrupt_at_any_tensor_leaves_the_groups_working(tmp_path):
    model = offload(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), tmp_path)
    output = model(X)
    for position in range(4):
        calls = iter(range(9))

        def stop(*_, calls=calls, position=position):
            if next(calls) == position:
                raise KeyboardInterrupt

        before = portrait(model)
        with pytest.raises(KeyboardInterrupt):
            materialize_meta_tensors(model, progress=stop)
        assert portrait(model) == before
    assert torch.allclose(model(X), output, atol=1e-6)


def test_a_file_lost_meanwhile_stops_the_restore(tmp_path):
    model = offload(unet(), tmp_path)
    materialize_meta_tensors(model)
    next(path for path in tmp_path.iterdir() if path.stat().st_size > 100).unlink()
    before = portrait(model)
    for on_modified in ("write", "error", "discard"):
        with pytest.raises(MaterializeError, match="cannot restore the dispatch"):
            restore_dispatch(model, on_modified=on_modified)
        assert portrait(model) == before


def test_two_offloaders_on_one_module_are_refused(folder):
    model = offload(nn.Sequential(nn.Linear(3, 3)), folder)
    cpu_offload(model, torch.device("cpu"))
    before = portrait(model)
    with pytest.raises(MaterializeError, match="at once"):
        materialize_meta_tensors(model)
    assert portrait(model) == before


def test_a_diffusers_without_the_attributes_we_read_is_refused(folder):
    model = offload(nn.Sequential(nn.Linear(3, 3)), folder)
    del model[0]._diffusers_hook._fn_refs
    with pytest.raises(MaterializeError, match="'_fn_refs'"):
        materialize_meta_tensors(model)


def test_the_offloader_of_a_components_manager_is_refused_by_name():
    from diffusers.modular_pipelines.components_manager import custom_offload_with_hook

    model = unet()
    custom_offload_with_hook("unet", model, torch.device("cpu"))
    before = portrait(model)
    with pytest.raises(MaterializeError, match="CustomOffloadHook"):
        materialize_meta_tensors(model)
    assert portrait(model) == before


# --- streams ---


@pytest.fixture
def streams(monkeypatch):
    """Groups with a stream on a machine without one: the CPU's streams do nothing, and its pinning is a copy."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    monkeypatch.setattr(torch.cpu.Stream, "synchronize", lambda self: None, raising=False)

    def apply(model, folder, kind):
        config = group_offloading.GroupOffloadingConfig(
            onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), non_blocking=True,
            record_stream=False, low_cpu_mem_usage=False, stream=torch.cpu.Stream(),
            offload_to_disk_path=None if folder is None else str(folder),
            **{"num_blocks_per_group": 1} | KINDS[kind]
            | {"offload_type": group_offloading.GroupOffloadingType(KINDS[kind]["offload_type"])},
        )  # fmt: skip
        group_offloading._apply_group_offloading(model, config)
        return model

    return apply


@pytest.mark.parametrize("forwards", [0, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_groups_that_prefetch_on_a_stream_become_whole_and_come_back(streams, folder, kind, forwards):
    model, output = streams(unet(), folder, kind), run(unet())
    for _ in range(forwards):
        assert torch.allclose(run(model), output, atol=1e-5)
    chains = {name: (vars(m).get("forward"), list(hooks(m))) for name, m in model.named_modules()}
    materialize_meta_tensors(model)
    assert_whole(model, state(unet()))
    assert not any(hooks(module) for module in model.modules())
    model.double().float()
    restore_dispatch(model, on_modified="error")
    assert {name: (vars(m).get("forward"), list(hooks(m))) for name, m in model.named_modules()} == chains
    for _ in range(2):
        assert torch.allclose(run(model), output, atol=1e-5)


@pytest.mark.parametrize("on_modified", ["write", "discard"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_change_reaches_the_copies_of_a_stream_or_is_discarded(streams, folder, kind, change, on_modified):
    model = streams(unet(), folder, kind)
    run(model)
    materialize_meta_tensors(model)
    model.double().float()  # memory of its own
    with torch.no_grad():
        CHANGES[change](model.get_submodule(CHANGED))
    changed, output = state(model), run(model)
    with pytest.raises(MaterializeError, match="written to"):
        restore_dispatch(model, on_modified="error")
    restore_dispatch(model, on_modified=on_modified)
    if on_modified == "discard":
        changed, output = state(unet()), run(unet())
    for _ in range(2):
        assert torch.allclose(run(model), output, atol=1e-5)
    assert_whole(materialize_meta_tensors(model), changed)


# --- quantized ---


def test_quantized_weights_in_a_group_become_whole_and_come_back(sim):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).eval()
    quantize_(model, Int8WeightOnlyConfig())
    inputs = torch.randn(2, 64)
    output, weight = model(inputs), model[0].weight
    offload(model)
    materialize_meta_tensors(model)
    assert model[0].weight is weight
    assert torch.allclose(model(inputs), output)
    restore_dispatch(model)
    assert torch.allclose(model(inputs), output)
    assert torch.allclose(materialize_meta_tensors(model)(inputs), output)
