"""Models built without their bytes are, but for these, what `from_pretrained` makes."""

import json

import pytest
import torch
from safetensors import safe_open

from modelcache.dataplane.image import lay_out
from modelcache.dataplane.loading.adapters import named_tensors
from modelcache.dataplane.loading.skeletons import (
    UnlikeError,
    facts_of,
    layout_of,
    object_print,
    on_meta,
    take_layout,
    transformers_skeleton,
)

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 60,
    "max_position_embeddings": 32,
}
CONFIGS = {
    "LlamaForCausalLM": ("LlamaConfig", {**SIZES, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "MixtralForCausalLM": ("MixtralConfig", {**SIZES, "num_key_value_heads": 2, "num_local_experts": 2}),
    "BertForMaskedLM": ("BertConfig", SIZES),
    "T5ForConditionalGeneration": (
        "T5Config",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 60},
    ),
    "WhisperForConditionalGeneration": (
        "WhisperConfig",
        {
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "vocab_size": 60,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
            "begin_suppress_tokens": [3, 4],
        },
    ),
}


@pytest.fixture(scope="module")
def transformers():
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    return transformers


@pytest.fixture(scope="module")
def folders(transformers, tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    torch.manual_seed(0)
    for name, (config, options) in CONFIGS.items():
        model = getattr(transformers, name)(getattr(transformers, config)(**options))
        if name == "LlamaForCausalLM":
            model.generation_config.max_new_tokens = 7
        model.save_pretrained(root / name)
    return root


def loaded(transformers, folders, name, dtype):
    model_class = getattr(transformers, name)
    return model_class, model_class.from_pretrained(folders / name, local_files_only=True, dtype=dtype).eval()


@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_skeleton_is_the_loaded_model_without_its_bytes(transformers, folders, name, dtype, tmp_path):
    model_class, model = loaded(transformers, folders, name, dtype)
    facts = json.loads(json.dumps(facts_of(model)))
    default = torch.get_default_dtype()
    skeleton = transformers_skeleton(model_class, folders / name, facts)
    assert torch.get_default_dtype() is default
    layout = layout_of(model)
    sizes, views = [size for size, _ in layout], [each for _, each in layout]
    take_layout(skeleton, lay_out(sizes, 4096), views)
    assert object_print(skeleton) == facts["object"]
    assert all(tensor.is_meta for tensor in named_tensors(skeleton).values())

    assert type(skeleton) is type(model)
    assert skeleton.config.to_dict() == model.config.to_dict()
    assert (skeleton.name_or_path, skeleton.dtype, skeleton.training) == (model.name_or_path, model.dtype, False)
    assert {each.training for each in skeleton.modules()} == {False}
    if model.can_generate():
        assert skeleton.generation_config.to_dict() == model.generation_config.to_dict()
    wanted = {key: (p.dtype, p.shape, p.requires_grad) for key, p in model.named_parameters()}
    assert {key: (p.dtype, p.shape, p.requires_grad) for key, p in skeleton.named_parameters()} == wanted

    skeleton.to_empty(device="cpu")
    skeleton.tie_weights()
    skeleton.load_state_dict(model.state_dict())
    for each, folder in ((skeleton, "ours"), (model, "theirs")):
        each.save_pretrained(tmp_path / folder)
    assert saved(tmp_path / "ours") == saved(tmp_path / "theirs")


def saved(folder):
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {key: file.get_tensor(key).tolist() for key in file.keys()}


def test_what_differs_shows_in_the_print(transformers, folders):
    model_class, model = loaded(transformers, folders, "BertForMaskedLM", "auto")
    facts = facts_of(model)

    def changed(change):
        skeleton = transformers_skeleton(model_class, folders / "BertForMaskedLM", facts)
        assert object_print(skeleton) == facts["object"]
        change(skeleton)
        return object_print(skeleton) != facts["object"]

    assert changed(lambda m: setattr(m.config, "hidden_act", "relu"))
    assert changed(lambda m: m.train())
    assert changed(lambda m: setattr(m.bert.encoder.layer[0].attention.self, "num_attention_heads", 2))
    assert changed(lambda m: setattr(m.bert.encoder.layer[1], "output", torch.nn.Identity()))
    assert changed(lambda m: m.register_buffer("b", None))
    assert changed(lambda m: m.cls.predictions.decoder.weight.requires_grad_(False))


def test_a_model_that_computes_with_values_when_it_is_built_has_no_skeleton():
    class Counts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.steps = torch.arange(3.0).tolist()

    class Stray(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.zeros(3)

    assert on_meta(Counts) is None
    assert on_meta(Stray) is None
    assert on_meta(lambda: torch.nn.Linear(2, 2)).weight.is_meta


def test_views_of_one_storage_are_no_skeleton_s_affair():
    model = torch.nn.Module()
    both = torch.zeros(4, 4)
    model.a, model.b = torch.nn.Parameter(both[:2]), torch.nn.Parameter(both[2:])
    layout = layout_of(model)
    skeleton = torch.nn.Module()
    for name in "ab":
        skeleton.register_parameter(name, torch.nn.Parameter(torch.zeros(2, 4, device="meta")))
    with pytest.raises(UnlikeError, match="share memory"):
        take_layout(skeleton, lay_out([size for size, _ in layout], 4096), [each for _, each in layout])
