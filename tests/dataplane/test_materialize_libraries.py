"""Models of transformers, peft, diffusers, bitsandbytes and torchao, dispatched by accelerate, made whole."""

import copy
import os
from contextlib import closing, nullcontext

import pytest
import torch
from accelerate import cpu_offload
from dispatched import (
    ACCELERATOR,
    IDS,
    INSTALLED,
    NO_DATA,
    REFUSES,
    assert_same,
    assert_whole,
    built_by_accelerate,
    leftovers,
    meta_names,
    portrait,
    skip_if_offloaded_ties_cannot_run,
    state,
)
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import nn

from modelcache.dataplane.device.simulated import SimulatedDevice
from modelcache.dataplane.materialize import is_dispatched, materialize_meta_tensors, restore_dispatch
from modelcache.errors import MaterializeError

# What the libraries say about themselves and each other while they load.
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::ResourceWarning"
)

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "max_position_embeddings": 32,
}
LAYER_1_ON_DISK = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}
ALL_ON_DISK = dict.fromkeys(LAYER_1_ON_DISK, "disk")

can_be_all_on_disk = built_by_accelerate("1.15", "refuses a map with everything on disk")
runs_tied_on_disk = built_by_accelerate("1.15", "mixes up the weights of a forward when tied ones are on disk")
can_offload_torchao = built_by_accelerate("1.14", "cannot offload torchao's tensors")


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity_warning()
    logging.enable_progress_bar()


@pytest.fixture
def sim():
    with closing(SimulatedDevice(64 << 20, link_bytes_per_s=None)) as device:
        yield device


def llama(*, tied=False):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=tied)).eval()


def from_disk(source, folder, places, **options):
    """The model saved and loaded again with these places."""
    source.save_pretrained(folder)
    return type(source).from_pretrained(folder, device_map=places, offload_folder=str(folder / "o"), **options)


def assert_stuck(model):
    with pytest.raises(RuntimeError, match=REFUSES):
        model.to("cpu")
    with pytest.raises(NotImplementedError, match=NO_DATA):
        model.cpu()


# --- transformers ---


@pytest.mark.parametrize("forwards", [0, 1])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "on_disk",
    [
        pytest.param(["model.layers.1"], id="layer"),
        pytest.param(["lm_head"], id="head"),
        pytest.param(["lm_head", "model.embed_tokens"], id="head and embed"),
        pytest.param(list(ALL_ON_DISK), id="all", marks=can_be_all_on_disk),
    ],
)
def test_a_llama_becomes_whole_with_its_ties_as_they_were(tmp_path, on_disk, tied, forwards):
    source = llama(tied=tied)
    with torch.no_grad():
        logits = source(IDS).logits
    places = LAYER_1_ON_DISK | {"model.layers.1": "cpu"} | dict.fromkeys(on_disk, "disk")
    model = from_disk(source, tmp_path, places)
    if forwards and tied and on_disk == ["lm_head", "model.embed_tokens"]:
        skip_if_offloaded_ties_cannot_run()
    if forwards and not (tied and on_disk == ["lm_head"]):  # transformers itself fails here with KeyError: lm_head
        with torch.no_grad():
            model(IDS)
    if meta_names(model):
        assert_stuck(model)
    materialize_meta_tensors(model)
    assert_whole(model, state(source))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, logits, atol=1e-5)
    model.to("cpu")
    assert model.generate(IDS, max_new_tokens=2, do_sample=False).shape == (1, 5)
    assert leftovers(model) == {}
    model.save_pretrained(tmp_path / "again")
    assert_same(type(source).from_pretrained(tmp_path / "again").state_dict(), state(source))


@can_be_all_on_disk
def test_a_llama_is_restored_to_its_dispatch(tmp_path):
    source = llama(tied=True)
    model = from_disk(source, tmp_path, ALL_ON_DISK)
    with torch.no_grad():
        logits = model(IDS).logits
        before = portrait(model)
        materialize_meta_tensors(model)
        restore_dispatch(model)
        assert portrait(model) == before
        assert torch.equal(model(IDS).logits, logits)


def test_a_bert_with_names_and_dtype_unlike_its_checkpoint_becomes_whole(tmp_path):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=32,
        max_position_embeddings=32,
    )  # fmt: skip
    source = BertModel(config).eval()
    source.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in load_file(path).items()
    }
    save_file(old, path, metadata={"format": "pt"})
    places = {"embeddings": "disk", "encoder.layer.0": "cpu", "encoder.layer.1": "disk", "pooler": "cpu"}
    model = BertModel.from_pretrained(tmp_path, device_map=places, dtype=torch.bfloat16)
    assert_stuck(model)
    materialize_meta_tensors(model)
    assert_whole(model, {name: tensor.bfloat16() for name, tensor in state(source).items()})
    model.to(torch.float32)
    with torch.no_grad():
        assert torch.allclose(model(IDS).last_hidden_state, source.bfloat16().float()(IDS).last_hidden_state, atol=1e-4)


@pytest.mark.parametrize("forwards", [0, pytest.param(1, marks=runs_tied_on_disk)])
def test_a_gpt2_with_tied_head_becomes_whole(tmp_path, forwards):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=32, bos_token_id=0, eos_token_id=0)
    source = GPT2LMHeadModel(config).eval()
    places = {"transformer.wte": "disk", "transformer.wpe": "cpu", "transformer.drop": "cpu"}
    places |= {"transformer.h.0": "cpu", "transformer.h.1": "disk", "transformer.ln_f": "cpu", "lm_head": "disk"}
    model = from_disk(source, tmp_path, places)
    for _ in range(forwards):
        with torch.no_grad():
            model(IDS)
    assert_stuck(model)
    is_confused = Version("1.15") > INSTALLED
    with pytest.warns(UserWarning, match="1.14 and older mix up") if is_confused else nullcontext():
        materialize_meta_tensors(model)
    assert_whole(model, state(source))
    assert model.lm_head.weight is model.transformer.wte.weight
    # These two are equal, and were taken away beside a real tie.
    assert model.transformer.h[1].ln_1.weight is not model.transformer.h[1].ln_2.weight


@can_be_all_on_disk
def test_a_t5_has_one_tensor_under_its_four_names(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        d_model=16, d_ff=24, num_layers=1, num_decoder_layers=1, num_heads=2, d_kv=8, vocab_size=32,
        decoder_start_token_id=0,
    )  # fmt: skip
    source = T5ForConditionalGeneration(config).eval()
    model = from_disk(source, tmp_path, dict.fromkeys(["shared", "encoder", "decoder", "lm_head"], "disk"))
    with torch.no_grad():
        model(input_ids=IDS, decoder_input_ids=IDS)
    assert_stuck(model)
    materialize_meta_tensors(model)
    embeddings = model.shared, model.encoder.embed_tokens, model.decoder.embed_tokens, model.lm_head
    assert len({module.weight.data_ptr() for module in embeddings}) == 1
    model.generate(IDS, max_new_tokens=2, do_sample=False)
    assert_whole(model, state(source))


def test_fused_experts_come_back_in_the_layout_of_the_model(tmp_path):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        **SMALL, moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1,
        mlp_only_layers=[], head_dim=8,
    )  # fmt: skip
    source = Qwen3MoeForCausalLM(config)
    model = from_disk(source, tmp_path, LAYER_1_ON_DISK, dtype=torch.bfloat16)
    assert model.model.layers[1].mlp.experts.down_proj.is_meta
    materialize_meta_tensors(model)
    assert_whole(model, {name: tensor.bfloat16() for name, tensor in state(source).items()})


def test_a_head_that_was_missing_from_the_checkpoint_is_named(tmp_path):
    source = llama()
    source.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    places = LAYER_1_ON_DISK | {"lm_head": "disk"}
    model = type(source).from_pretrained(tmp_path, device_map=places, offload_folder=str(tmp_path / "o"))
    before = portrait(model)
    with pytest.raises(MaterializeError) as caught:
        materialize_meta_tensors(model)
    assert caught.value.names == ("lm_head.weight",)
    assert portrait(model) == before


def test_a_checkpoint_deleted_meanwhile_is_named(tmp_path):
    model = from_disk(llama(), tmp_path, LAYER_1_ON_DISK)
    os.unlink(tmp_path / "model.safetensors")
    before = portrait(model)
    with pytest.raises(MaterializeError, match="model.safetensors") as caught:
        materialize_meta_tensors(model)
    assert len(caught.value.names) == 9
    assert portrait(model) == before


def test_a_model_split_over_the_simulated_device_is_parked_in_ram_and_comes_back(tmp_path, sim):
    source = llama(tied=True)
    places = {name: "sim:0" if place == "cpu" else place for name, place in LAYER_1_ON_DISK.items()}
    places |= {"model.layers.0": "cpu"}
    model = from_disk(source, tmp_path, places)
    # Its disk entries cannot be run as they are: safetensors does not read onto a simulated device. We need not ask it.
    with torch.no_grad():
        logits = source(IDS).logits
    assert sim.allocated_bytes()
    with pytest.raises(RuntimeError, match=REFUSES):
        model.to("cpu")
    materialize_meta_tensors(model)
    assert sim.allocated_bytes() == 0
    assert_whole(model, state(source))
    model.to("sim:0")
    with torch.no_grad():
        assert torch.allclose(model(IDS.to("sim:0")).logits.cpu(), logits, atol=1e-5)
    model.cpu()
    assert_same(model.state_dict(), state(source))
    restore_dispatch(model)
    assert model.model.layers[0].mlp.up_proj.weight.is_meta
    assert model.lm_head.weight.device == torch.device("sim:0")


def test_a_pipeline_of_transformers_is_accepted_and_knows_its_device(tmp_path, sim):
    from transformers import FeatureExtractionPipeline

    source = llama()
    places = dict.fromkeys(LAYER_1_ON_DISK, "sim:0") | {"model.layers.1": "disk"}
    model = from_disk(source, tmp_path, places)
    pipe = FeatureExtractionPipeline(model=model, tokenizer=object(), task="feature-extraction")
    assert pipe.device == torch.device("sim:0")
    assert is_dispatched(pipe)
    assert materialize_meta_tensors(pipe) is pipe
    assert pipe.device == torch.device("cpu")
    assert_whole(model, state(source))
    restore_dispatch(pipe)
    assert pipe.device == torch.device("sim:0")
    assert is_dispatched(pipe)


# --- peft ---


def test_adapters_made_on_meta_are_named(tmp_path):
    import peft

    model = from_disk(llama(), tmp_path, LAYER_1_ON_DISK)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    with pytest.raises(MaterializeError) as caught:
        materialize_meta_tensors(adapted)
    assert len(caught.value.names) == 2
    assert all(".layers.1." in name and "lora_" in name for name in caught.value.names)


def test_adapters_put_on_a_whole_model_work(tmp_path):
    import peft

    source = llama()
    model = materialize_meta_tensors(from_disk(source, tmp_path, LAYER_1_ON_DISK))
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        assert torch.allclose(adapted(IDS).logits, source(IDS).logits, atol=1e-5)


@pytest.mark.parametrize("merged", [False, True])
def test_an_adapted_model_offloaded_as_a_whole_becomes_whole(merged):
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(llama(), config).eval()
    expected = state(copy.deepcopy(adapted).merge_and_unload() if merged else adapted)
    cpu_offload(adapted, ACCELERATOR)
    model = adapted.merge_and_unload() if merged else adapted
    assert meta_names(model)
    materialize_meta_tensors(model)
    assert meta_names(model) == []
    assert all(torch.allclose(tensor, expected[name], atol=1e-6) for name, tensor in model.state_dict().items())
    model.to(torch.float64)


# --- diffusers ---


def unet():
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"), add_attention=False,
    ).eval()  # fmt: skip


def test_a_diffusers_model_loaded_to_disk_becomes_whole(tmp_path):
    source = unet()
    source.save_pretrained(tmp_path)
    places = {name: "disk" if name == "up_blocks" else "cpu" for name, _ in source.named_children()}
    model = type(source).from_pretrained(
        tmp_path, device_map=places, offload_folder=str(tmp_path / "o"), low_cpu_mem_usage=True
    )
    assert meta_names(model)
    materialize_meta_tensors(model)
    assert_same(model.state_dict(), state(source))
    assert not is_dispatched(model)
    model.to("cpu")


@pytest.mark.parametrize("kind", ["sequential", "model"])
def test_a_diffusers_pipeline_forgets_its_offloading_and_can_have_it_back(kind):
    from diffusers import DDPMPipeline, DDPMScheduler

    source = unet()
    pipe = DDPMPipeline(unet=copy.deepcopy(source), scheduler=DDPMScheduler(num_train_timesteps=4))
    enable = pipe.enable_sequential_cpu_offload if kind == "sequential" else pipe.enable_model_cpu_offload
    enable(device="cpu")
    assert is_dispatched(pipe)
    hooks = len(pipe._all_hooks)
    materialize_meta_tensors(pipe)
    assert_whole(pipe.unet, state(source))
    pipe.maybe_free_model_hooks()
    assert_whole(pipe.unet, state(source))
    pipe.to("cpu")
    restore_dispatch(pipe)
    assert is_dispatched(pipe)
    assert len(pipe._all_hooks) == hooks


# --- quantized and wrapped weights ---


@pytest.mark.parametrize("kind", ["8 bit", "4 bit"])
def test_bitsandbytes_weights_get_their_statistics_back(kind):
    import bitsandbytes as bnb

    torch.manual_seed(0)
    if kind == "8 bit":
        layer = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32)
    layer.load_state_dict(nn.Linear(64, 64).state_dict())
    model = nn.Sequential(layer).eval().to("cpu")
    inputs = torch.randn(2, 64)
    with torch.no_grad():
        output = model(inputs)
    cpu_offload(model, ACCELERATOR)
    assert meta_names(model)
    materialize_meta_tensors(model)
    assert not is_dispatched(model)
    assert type(model[0].weight) is type(layer.weight)
    with torch.no_grad():
        assert torch.allclose(model(inputs), output, atol=1e-5)
    if kind == "4 bit":
        assert model[0].weight.quant_state is model[0].quant_state
        assert not model[0].quant_state.absmax.is_meta


@pytest.mark.parametrize(("key", "words"), [("SCB", "without its scales"), ("weight.absmax", "statistics")])
def test_bitsandbytes_weights_without_statistics_are_refused_by_name(key, words):
    import bitsandbytes as bnb

    if key == "SCB":
        layer = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(64, 64, quant_type="nf4")
    layer.load_state_dict(nn.Linear(64, 64).state_dict())
    model = nn.Sequential(layer).eval().to("cpu")
    cpu_offload(model, ACCELERATOR)
    weights = model[0]._hf_hook.weights_map.dataset
    for name in [name for name in weights if key == "SCB" and "SCB" in name or key != "SCB" and "weight." in name]:
        del weights[name]
    before = portrait(model)
    with pytest.raises(MaterializeError, match=words) as caught:
        materialize_meta_tensors(model)
    assert caught.value.names == ("0.weight",)
    assert portrait(model) == before


@can_offload_torchao
@pytest.mark.parametrize("forwards", [0, 1])
def test_torchao_weights_are_parameters_again(forwards):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64)).eval()
    quantize_(model, Int8WeightOnlyConfig())
    inputs = torch.randn(2, 64)
    output = model(inputs)
    cpu_offload(model, ACCELERATOR)
    for _ in range(forwards):
        model(inputs)
    kind = type(model[0].weight)
    materialize_meta_tensors(model)
    assert not is_dispatched(model)
    assert type(model[0].weight) is kind
    assert isinstance(model[0].weight, nn.Parameter)
    assert torch.allclose(model(inputs), output)


@can_offload_torchao
def test_plain_data_for_a_quantized_placeholder_is_refused_by_name():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = nn.Sequential(nn.Linear(64, 64)).eval()
    quantize_(model, Int8WeightOnlyConfig())
    cpu_offload(model, ACCELERATOR)
    model[0]._hf_hook.weights_map.dataset["0.weight"] = torch.zeros(64, 64)
    before = portrait(model)
    with pytest.raises(MaterializeError, match="before it was quantized") as caught:
        materialize_meta_tensors(model)
    assert caught.value.names == ("0.weight",)
    assert portrait(model) == before
