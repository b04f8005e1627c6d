"""Models of transformers, peft and diffusers, dispatched by accelerate, made whole."""

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
from modelcache.dataplane.materialize.entry_points import is_dispatched, materialize_meta_tensors, restore_dispatch
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


def test_a_checkpoint_of_pickled_weights_is_read_from_where_transformers_stored_it_anew(tmp_path):
    source = llama()
    source.config.save_pretrained(tmp_path)
    torch.save(source.state_dict(), tmp_path / "pytorch_model.bin")
    model = type(source).from_pretrained(
        tmp_path, device_map=LAYER_1_ON_DISK, offload_folder=str(tmp_path / "o"), use_safetensors=False
    )
    assert len(meta_names(model)) == 9
    os.unlink(tmp_path / "pytorch_model.bin")
    materialize_meta_tensors(model)
    assert_whole(model, state(source))


@can_be_all_on_disk
@pytest.mark.parametrize("offload_buffers", [False, True])
def test_buffers_that_are_not_saved_stay_the_models_own(tmp_path, offload_buffers):
    source = llama()
    model = from_disk(source, tmp_path, ALL_ON_DISK, offload_buffers=offload_buffers)
    frequencies = model.model.rotary_emb.inv_freq
    materialize_meta_tensors(model)
    assert_whole(model, state(source))
    assert torch.equal(model.model.rotary_emb.inv_freq, source.model.rotary_emb.inv_freq)
    assert frequencies.is_meta or model.model.rotary_emb.inv_freq is frequencies


def test_weights_that_transformers_would_keep_wider_have_the_dtype_of_their_placeholder(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        d_model=16, d_ff=24, num_layers=1, num_decoder_layers=1, num_heads=2, d_kv=8, vocab_size=32,
        decoder_start_token_id=0,
    )  # fmt: skip
    source = T5ForConditionalGeneration(config).eval()
    places = {"shared": "cpu", "encoder": "cpu", "decoder": "disk", "lm_head": "cpu"}
    model = from_disk(source, tmp_path, places, dtype=torch.float16)
    wide = model.encoder.block[0].layer[1].DenseReluDense.wo.weight
    placeholder = model.decoder.block[0].layer[2].DenseReluDense.wo.weight
    assert (wide.dtype, placeholder.is_meta) == (torch.float32, True)
    materialize_meta_tensors(model)
    weight = model.decoder.block[0].layer[2].DenseReluDense.wo.weight
    assert weight.dtype == placeholder.dtype
    assert torch.equal(weight, source.decoder.block[0].layer[2].DenseReluDense.wo.weight.to(weight.dtype))
    assert model.encoder.block[0].layer[1].DenseReluDense.wo.weight is wide


def test_what_transformers_refuses_on_a_dispatched_model_works_on_a_whole_one(tmp_path):
    from accelerate import Accelerator
    from transformers import FeatureExtractionPipeline

    source = llama()
    model = from_disk(source, tmp_path, LAYER_1_ON_DISK | {"lm_head": "disk"})
    with pytest.raises(ValueError, match="accelerate"):
        FeatureExtractionPipeline(model=model, tokenizer=object(), task="feature-extraction", device="cpu")
    materialize_meta_tensors(model)
    model.resize_token_embeddings(40)
    assert model.lm_head.weight.shape == (40, 16)
    assert torch.equal(model.lm_head.weight[:32], source.lm_head.weight)
    assert Accelerator(cpu=True).prepare(model) is model
    pipe = FeatureExtractionPipeline(model=model, tokenizer=object(), task="feature-extraction", device="cpu")
    assert pipe.device == torch.device("cpu")


@can_be_all_on_disk
def test_a_dispatched_part_of_another_model_loses_its_device_map_too(tmp_path):
    class Whole(nn.Module):
        def __init__(self, language, head):
            super().__init__()
            self.language, self.head = language, head

    source = llama(tied=True)
    model = Whole(from_disk(source, tmp_path, ALL_ON_DISK), nn.Linear(4, 4))
    with torch.no_grad():
        model.language(IDS)
    assert model.language.hf_device_map
    materialize_meta_tensors(model)
    assert leftovers(model) == {}
    assert_same(model.language.state_dict(), state(source))
    assert model.language.lm_head.weight is model.language.model.embed_tokens.weight
    restore_dispatch(model)
    assert model.language.hf_device_map == ALL_ON_DISK


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


def test_adapters_made_on_meta_are_filled_from_where_their_data_is_said_to_be(tmp_path):
    import peft

    source = llama()
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    expected = peft.get_peft_model(copy.deepcopy(source), config).eval()
    save_file({name: t for name, t in expected.state_dict().items() if "lora_" in name}, tmp_path / "lora.safetensors")
    adapted = peft.get_peft_model(from_disk(source, tmp_path / "m", LAYER_1_ON_DISK), config).eval()
    adapted.load_state_dict(load_file(tmp_path / "lora.safetensors"), strict=False)  # what is on meta takes nothing
    lora = tmp_path / "lora"
    lora.mkdir()
    os.rename(tmp_path / "lora.safetensors", lora / "lora.safetensors")
    materialize_meta_tensors(adapted, extra_sources=lora)
    assert_same(adapted.state_dict(), state(expected))
    with torch.no_grad():
        assert torch.allclose(adapted(IDS).logits, expected(IDS).logits, atol=1e-5)


def test_saved_adapters_are_loaded_onto_a_whole_model(tmp_path):
    import peft

    source = llama()
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    expected = peft.get_peft_model(copy.deepcopy(source), config).eval()
    expected.save_pretrained(tmp_path / "lora")
    model = materialize_meta_tensors(from_disk(source, tmp_path / "m", LAYER_1_ON_DISK))
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "lora").eval()
    assert_same(adapted.state_dict(), state(expected))


def test_an_adapted_model_moves_through_its_wrapper(sim):
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(llama(), config).eval()
    expected = state(adapted)
    cpu_offload(adapted, ACCELERATOR)
    with pytest.raises(NotImplementedError, match=NO_DATA):
        adapted.to("sim:0")  # accelerate blocks only the model inside
    materialize_meta_tensors(adapted)
    adapted.to("sim:0")
    assert {parameter.device.type for parameter in adapted.parameters()} == {"sim"}
    adapted.to("cpu")
    assert_same(adapted.state_dict(), expected)
    restore_dispatch(adapted, on_modified="error")
    with torch.no_grad():
        assert adapted(IDS).logits.shape == (1, 3, 32)


def test_adapters_added_and_merged_while_whole_stay_after_the_restore(tmp_path):
    import peft

    source = llama()
    model = from_disk(source, tmp_path, LAYER_1_ON_DISK)
    materialize_meta_tensors(model)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    merged = peft.get_peft_model(model, config).merge_and_unload()
    assert merged is model
    with torch.no_grad():
        logits = model(IDS).logits
    assert not torch.allclose(logits, source(IDS).logits, atol=1e-3)
    restore_dispatch(model)
    assert model.model.layers[1].self_attn.q_proj.weight.is_meta
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, logits, atol=1e-5)


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


def test_a_pipeline_placed_by_a_device_map_is_free_of_it(tmp_path):
    from diffusers import DDPMPipeline, DDPMScheduler

    source = unet()
    source.save_pretrained(tmp_path)
    places = {name: "disk" if name == "up_blocks" else "cpu" for name, _ in source.named_children()}
    model = type(source).from_pretrained(
        tmp_path, device_map=places, offload_folder=str(tmp_path / "o"), low_cpu_mem_usage=True
    )
    pipe = DDPMPipeline(unet=model, scheduler=DDPMScheduler(num_train_timesteps=4))
    pipe.hf_device_map = {"unet": "cpu"}
    with pytest.raises(RuntimeError, match=REFUSES):
        pipe.to("cpu")
    materialize_meta_tensors(pipe)
    assert_same(pipe.unet.state_dict(), state(source))
    pipe.to(torch.float64)
    pipe.to(torch.float32)
    restore_dispatch(pipe, on_modified="error")
    assert pipe.hf_device_map == {"unet": "cpu"}
    assert is_dispatched(pipe)
