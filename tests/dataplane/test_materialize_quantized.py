"""Quantized weights that a dispatch took away: made whole with all that belongs to them, or refused by name.

Libraries that are not installed are skipped, with a reason.
"""

import tempfile
from contextlib import closing

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from dispatched import (
    ACCELERATOR,
    DISK_ONLY,
    assert_same,
    assert_whole,
    can_offload_torchao,
    meta_names,
    portrait,
    state,
)
from safetensors.torch import save_file
from torch import nn

from modelcache.dataplane.device.simulated import SimulatedDevice
from modelcache.dataplane.materialize.entry_points import (
    is_dispatched,
    materialize_meta_tensors,
    plan_materialize,
    restore_dispatch,
)
from modelcache.errors import MaterializeError

# What the libraries say about themselves and each other.
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::ResourceWarning"
)

INPUTS = torch.linspace(-1, 1, 128).reshape(2, 64)


@pytest.fixture
def sim():
    with closing(SimulatedDevice(4 << 20, link_bytes_per_s=None)) as device:
        yield device


def layer(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(64, 64)


def run(model, inputs=INPUTS):
    with torch.no_grad():
        return model(inputs)


def on_ram(model):
    cpu_offload(model, ACCELERATOR)


def on_disk(model):
    disk_offload(model, tempfile.mkdtemp(), ACCELERATOR)


def assert_refused(model, names, words, *where, **options):
    """It is refused for these tensors, and nothing was touched."""
    before = portrait(model)
    with pytest.raises(MaterializeError, match=words) as caught:
        materialize_meta_tensors(model, *where, **options)
    assert caught.value.names == names
    assert portrait(model) == before


# --- bitsandbytes ---


def bitsandbytes_model(kind):
    bnb = pytest.importorskip("bitsandbytes")
    if kind == "int8":
        quantized = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    else:
        quantized = bnb.nn.Linear4bit(64, 64, quant_type=kind, compute_dtype=torch.float32)
    quantized.load_state_dict(layer().state_dict())
    return nn.Sequential(quantized).eval().to("cpu")


@pytest.fixture(params=["ram", "disk"])
def offload(request, tmp_path):
    if request.param == "ram":
        return on_ram
    return lambda model: disk_offload(model, tmp_path, ACCELERATOR)


@pytest.mark.parametrize("kind", ["int8", "nf4", "fp4"])
def test_a_bitsandbytes_model_becomes_whole_is_restored_and_becomes_whole_again(offload, kind):
    model = bitsandbytes_model(kind)
    output, weight = run(model), model[0].weight
    offload(model)
    assert meta_names(model) == ["0.weight", "0.bias"]
    for copies in ("auto", "always"):
        materialize_meta_tensors(model, copy=copies)
        assert not is_dispatched(model)
        assert type(model[0].weight) is type(weight)
        assert model[0].weight.dtype == weight.dtype
        if kind != "int8":
            assert model[0].weight.quant_state is model[0].quant_state
            assert not model[0].quant_state.absmax.is_meta
        assert torch.allclose(run(model), output, atol=1e-5)
        model.to("cpu")
        assert torch.allclose(run(model), output, atol=1e-5)
        restore_dispatch(model)
        assert meta_names(model) == ["0.weight", "0.bias"]


def test_a_bitsandbytes_forward_in_between_changes_nothing(offload):
    model = bitsandbytes_model("int8")
    output = run(model)
    offload(model)
    assert torch.allclose(run(model), output, atol=1e-5)
    assert torch.allclose(run(materialize_meta_tensors(model)), output, atol=1e-5)


@pytest.mark.parametrize(("kind", "lost", "words"), [("int8", "SCB", "scales"), ("nf4", "weight.", "statistics")])
def test_a_bitsandbytes_weight_without_what_belongs_to_it_is_refused(kind, lost, words):
    model = bitsandbytes_model(kind)
    cpu_offload(model, ACCELERATOR)
    kept = model[0]._hf_hook.weights_map.dataset
    for name in [name for name in kept if name.startswith(f"0.{lost}")]:
        del kept[name]
    assert_refused(model, ("0.weight",), f"without its .*{words}")


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_live_bitsandbytes_weights_do_not_change_device(sim, kind):
    model = nn.ModuleDict({"a": bitsandbytes_model(kind), "b": layer()})
    cpu_offload(model["b"], ACCELERATOR)
    assert_refused(model, ("a.0.weight",), "bitsandbytes quantizes weights when they change device", "sim:0")
    assert torch.allclose(run(materialize_meta_tensors(model)["b"]), run(layer()))


# --- torchao ---


def torchao_model():
    torchao = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(layer(0), layer(1)).eval()
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    return model


@can_offload_torchao
@pytest.mark.parametrize("copies", ["auto", "always"])
@pytest.mark.parametrize("forwards", [0, 1])
def test_a_torchao_model_becomes_whole_is_restored_and_becomes_whole_again(forwards, copies):
    model = torchao_model()
    output, kind = run(model), type(model[0].weight)
    cpu_offload(model, ACCELERATOR)
    for _ in range(2):
        for _ in range(forwards):
            run(model)
        materialize_meta_tensors(model, copy=copies)
        assert not is_dispatched(model)
        assert meta_names(model) == []
        for linear in model:
            assert type(linear.weight) is kind
            assert isinstance(linear.weight, nn.Parameter)
            assert not linear.weight.requires_grad
        assert torch.allclose(run(model), output)
        restore_dispatch(model, on_modified="error")
        assert torch.allclose(run(model), output)


@can_offload_torchao
def test_the_bytes_of_a_torchao_weight_are_those_inside_it():
    model = torchao_model()
    cpu_offload(model, ACCELERATOR)
    plan = plan_materialize(model, copy="always")
    names, _ = model[0].weight.__tensor_flatten__()
    inner = [getattr(model[0].weight, name) for name in names]
    weight_bytes = sum(tensor.numel() * tensor.element_size() for tensor in inner)
    assert 64 * 64 < weight_bytes < 64 * 64 * 2
    assert plan.needed_bytes == 2 * (weight_bytes + 64 * 4)


@can_offload_torchao
def test_two_torchao_weights_that_were_one_are_one_again():
    model = torchao_model()
    model[1].weight = model[0].weight
    cpu_offload(model, ACCELERATOR)
    run(model)
    materialize_meta_tensors(model)
    assert model[1].weight is model[0].weight


@can_offload_torchao
def test_a_torchao_model_goes_to_the_accelerator_and_comes_back(sim):
    model = torchao_model()
    output = run(model)
    cpu_offload(model, "sim:0")
    materialize_meta_tensors(model, "sim:0")
    assert {parameter.device.type for parameter in model.parameters()} == {"sim"}
    assert model[0].weight.qdata.device.type == "sim"
    materialize_meta_tensors(model)
    assert torch.allclose(run(model), output)
    assert model[0].weight.qdata.device.type == "cpu"


def test_a_torchao_model_that_accelerate_failed_to_store_is_whole(tmp_path):
    model = torchao_model()
    output = run(model)
    with pytest.raises(RuntimeError, match="numpy"):
        disk_offload(model, tmp_path, ACCELERATOR)
    assert torch.allclose(run(materialize_meta_tensors(model)), output)


@can_offload_torchao
def test_plain_weights_in_ram_under_a_quantized_placeholder_are_refused():
    model = torchao_model()
    cpu_offload(model, ACCELERATOR)
    model[0]._hf_hook.weights_map.dataset["0.weight"] = torch.zeros(64, 64)
    assert_refused(model, ("0.weight",), "stored before it was quantized")


@can_offload_torchao
def test_plain_weights_on_disk_under_quantized_placeholders_are_refused(tmp_path):
    model, plain = torchao_model(), nn.Sequential(layer(0), layer(1))
    path = tmp_path / "m.safetensors"
    save_file(plain.state_dict(), path)
    index = {
        name: {"safetensors_file": str(path), "weight_name": name, "dtype": "float32"} for name in plain.state_dict()
    }
    dispatch_model(model, {"0": "disk", "1": "disk"}, offload_index=index, **DISK_ONLY)
    assert_refused(model, ("0.weight", "1.weight"), "stored before it was quantized")


@can_offload_torchao
def test_a_model_that_transformers_quantized_while_loading_is_refused_for_what_is_on_disk(tmp_path, monkeypatch):
    torchao = pytest.importorskip("torchao.quantization")
    from transformers import LlamaConfig, LlamaForCausalLM, TorchAoConfig

    # It quantizes on the accelerator, and takes CUDA where it finds none.
    monkeypatch.setattr("transformers.integrations.torchao.get_current_accelerator", lambda: "cpu")
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=32, max_position_embeddings=32,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    places = dict.fromkeys(["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    model = LlamaForCausalLM.from_pretrained(
        tmp_path, device_map=places | {"model.layers.1": "disk"}, offload_folder=str(tmp_path / "o"),
        quantization_config=TorchAoConfig(torchao.Int8WeightOnlyConfig()), dtype=torch.bfloat16,
    )  # fmt: skip
    assert model.model.layers[1].mlp.up_proj.weight.is_meta
    before = portrait(model)
    with pytest.raises(MaterializeError, match="stored before it was quantized") as caught:
        materialize_meta_tensors(model)
    assert len(caught.value.names) == 7
    assert all(name.startswith("model.layers.1.") and name.endswith("_proj.weight") for name in caught.value.names)
    assert portrait(model) == before


# --- HQQ, quanto, compressed-tensors ---


def hqq_model():
    hqq = pytest.importorskip("hqq.core.quantize")
    config = hqq.BaseQuantizeConfig(nbits=4, group_size=64)
    plain = layer().requires_grad_(False)  # accelerate could not store its bias otherwise
    linear = hqq.HQQLinear(plain, config, compute_dtype=torch.float32, device="cpu")
    return nn.Sequential(linear).eval()


def test_an_hqq_model_becomes_whole_and_its_scales_stay(offload):
    model = hqq_model()
    output, scales = run(model), dict(model[0].meta)
    offload(model)
    assert meta_names(model) == ["0.W_q"]
    for _ in range(2):
        materialize_meta_tensors(model)
        assert not is_dispatched(model)
        assert all(model[0].meta[key] is value for key, value in scales.items())
        assert torch.allclose(run(model), output)
        restore_dispatch(model, on_modified="error")
        assert torch.allclose(run(model), output)


def test_an_hqq_model_is_not_parted_from_its_scales(sim):
    model = hqq_model()
    cpu_offload(model, ACCELERATOR)
    assert_refused(model, ("0.W_q",), "keeps the scales of these weights outside", "sim:0")


class HQQLinear(nn.Module):
    """What the layer of that library is like: the packed weight is a parameter, its scales are in a dictionary."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        packed = torch.randint(0, 255, (64, 64), dtype=torch.uint8, generator=generator)
        self.W_q = nn.Parameter(packed, requires_grad=False)
        self.meta = {"scale": torch.full((64, 1), 0.01), "zero": torch.full((64, 1), 128.0), "nbits": 8}

    def forward(self, x):
        return x @ ((self.W_q.float() - self.meta["zero"]) * self.meta["scale"]).T


def test_scales_outside_of_a_modules_tensors_stay_where_they_are(offload, sim):
    model = nn.Sequential(HQQLinear())
    output, scales = run(model), dict(model[0].meta)
    offload(model)
    assert_refused(model, ("0.W_q",), "keeps the scales of these weights outside", "sim:0")
    materialize_meta_tensors(model)
    assert_refused(model, ("0.W_q",), "use target_device='cpu'", "sim:0")
    assert model[0].meta == scales
    assert torch.equal(run(model), output)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_quanto_model_is_whole_after_an_offload_that_worked_or_failed(frozen):
    quanto = pytest.importorskip("optimum.quanto")
    model = nn.Sequential(layer()).eval()
    quanto.quantize(model, weights=quanto.qint8)
    if frozen:
        quanto.freeze(model)
    output = run(model)
    if frozen:
        with pytest.raises(TypeError):
            cpu_offload(model, ACCELERATOR)
    else:
        cpu_offload(model, ACCELERATOR)
    materialize_meta_tensors(model)
    assert not is_dispatched(model)
    assert torch.allclose(run(model), output)


@pytest.mark.parametrize("storage", ["cpu", "disk"])
def test_a_model_that_compressed_tensors_offloads_is_refused(tmp_path, storage):
    offloading = pytest.importorskip("compressed_tensors.offload")
    model = nn.Sequential(layer())
    folder = {"offload_dir": str(tmp_path)} if storage == "disk" else {}
    offloading.offload_module(
        model[0], torch.device("cpu"), torch.device("cpu") if storage == "cpu" else "disk", **folder
    )
    output = run(model)
    with pytest.raises(MaterializeError, match=r"module '0' keeps its weights in a \w+Cache of another library"):
        materialize_meta_tensors(model)
    assert torch.equal(run(model), output)


# --- packed integers with scales, as GPTQ, AWQ and compressed-tensors lay them out ---


class Packed(nn.Module):
    """Four-bit integers packed into int32 buffers, with half-precision scales and an index."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        words = torch.randint(-(2**31), 2**31 - 1, (8, 64), dtype=torch.int32, generator=generator)
        self.register_buffer("qweight", words)
        self.register_buffer("qzeros", words[:1, :8].clone())
        self.register_buffer("scales", torch.rand(1, 64, generator=generator).half())
        self.register_buffer("g_idx", torch.zeros(64, dtype=torch.int32))
        self.bias = nn.Parameter(torch.rand(64, generator=generator))

    def forward(self, x):
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)
        unpacked = (self.qweight.unsqueeze(1) >> shifts.view(1, 8, 1)) & 15
        return x @ (unpacked.reshape(64, 64).float() * self.scales.float()) + self.bias


@pytest.mark.parametrize("offload_buffers", [False, True])
@pytest.mark.parametrize("place", ["ram", "disk"])
def test_packed_integers_come_back_bit_for_bit(tmp_path, place, offload_buffers):
    model = nn.Sequential(Packed())
    expected, output = state(model), run(model)
    if place == "ram":
        cpu_offload(model, ACCELERATOR, offload_buffers=offload_buffers)
    else:
        disk_offload(model, tmp_path, ACCELERATOR, offload_buffers=offload_buffers)
    assert len(meta_names(model)) == (5 if offload_buffers else 1)
    assert_whole(materialize_meta_tensors(model), expected)
    assert torch.equal(run(model), output)
    restore_dispatch(model, on_modified="error")
    assert torch.equal(run(model), output)


def test_a_layer_that_was_not_quantized_beside_one_that_was_becomes_whole(tmp_path):
    pytest.importorskip("bitsandbytes")
    model = nn.ModuleDict({"quantized": bitsandbytes_model("int8"), "plain": layer(1)})
    expected = state(model["plain"])
    dispatch_model(model, {"quantized": "cpu", "plain": "disk"}, offload_dir=tmp_path)
    output = run(model["quantized"])
    materialize_meta_tensors(model)
    assert_same(model["plain"].state_dict(), expected)
    assert torch.equal(run(model["quantized"]), output)
