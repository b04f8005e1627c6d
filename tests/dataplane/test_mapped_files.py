"""What is nothing but a file's bytes in a mapping of it is left to the file; whatever may be more stays."""

from contextlib import closing

import pytest
import torch
from movers import Rig, bits, same_bits
from safetensors import safe_open
from safetensors.torch import save_file

from modelcache.dataplane.files import mapped as mapped_files
from modelcache.dataplane.files.mapped import leave_to_files, unwritten_regions
from modelcache.dataplane.loading.loaders import build
from modelcache.dataplane.loading.weights import Location
from modelcache.headers import model_headers
from modelcache.move import Moved
from modelcache.spec import LoaderSpec, ModelSpec


@pytest.fixture
def path(tmp_path):
    torch.manual_seed(0)
    where = tmp_path / "model with a space.safetensors"
    save_file({"a": torch.randn(300, 40), "b": torch.randn(7).bfloat16(), "c": torch.arange(5)}, where)
    return where


def opened(path):
    """The tensors of a file as libraries get them, and their places."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: torch.nn.Parameter(file.get_tensor(name), requires_grad=name != "c") for name in file.keys()}
    (header,) = model_headers(path, name="m")
    if not unwritten_regions([path]):
        pytest.skip("this version of safetensors copies what it reads")
    return tensors, {name: Location(header, name) for name in tensors}


def left(tensors) -> set[str]:
    return {name for name, tensor in tensors.items() if tensor.is_meta}


def test_tensors_that_only_show_their_file_are_left_to_it(path):
    tensors, where = opened(path)
    a = tensors["a"]
    a.note = "kept"
    leave_to_files(tensors, where)
    assert left(tensors) == {"a", "b", "c"}
    assert tensors["a"] is a
    assert (type(a), a.shape, a.dtype, a.requires_grad, a.note) == (
        torch.nn.Parameter, (300, 40), torch.float32, True, "kept",
    )  # fmt: skip
    assert not tensors["c"].requires_grad
    assert unwritten_regions([path]) == []


def test_nothing_is_left_to_a_file_when_something_was_written_to_what_shows_it(path):
    tensors, where = opened(path)
    tensors["a"].data[17] += 1
    expected = tensors["a"].detach().clone()
    leave_to_files(tensors, where)
    assert torch.equal(tensors["a"], expected)
    assert left(tensors) == set()


def test_copies_and_conversions_stay(path):
    tensors, where = opened(path)
    tensors["a"] = torch.nn.Parameter(tensors["a"].detach().clone())
    tensors["b"] = torch.nn.Parameter(tensors["b"].detach().float())
    leave_to_files(tensors, where)
    assert left(tensors) == {"c"}


def test_views_of_the_same_bytes_stay_so_that_they_stay_views(path):
    tensors, where = opened(path)
    tensors["head"] = torch.nn.Parameter(tensors["a"].detach())
    tensors["row"] = tensors["c"].detach()[1:2]
    leave_to_files(tensors, where)
    assert left(tensors) == {"b"}


def test_a_tensor_of_another_place_in_the_file_stays(path):
    tensors, where = opened(path)
    tensors["b"], tensors["a"] = tensors["a"], tensors["b"]
    leave_to_files(tensors, where)
    assert left(tensors) == {"c"}


def test_a_file_that_was_replaced_is_not_the_one_that_is_shown(path):
    tensors, where = opened(path)
    path.unlink()
    save_file({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, path)
    leave_to_files(tensors, where)
    assert left(tensors) == set()


def test_where_the_system_does_not_tell_everything_stays(path, monkeypatch):
    tensors, where = opened(path)
    monkeypatch.setattr(mapped_files, "_REGIONS", path.with_name("missing"))
    leave_to_files(tensors, where)
    assert left(tensors) == set()


def test_a_transformers_folder_goes_from_its_files_to_its_place(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=200, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "llama")
    expected = bits(LlamaForCausalLM.from_pretrained(tmp_path / "llama"))
    spec = ModelSpec("m", LoaderSpec(kind="transformers", options={"path": str(tmp_path / "llama")}))
    with closing(Rig(tmp_path, build=build, segment_bytes=16 << 10)) as rig:
        (part,) = rig.mover.load(spec).parts
        rig.facts[part.part] = part
        model = rig.mover.object_of("m")
        assert all(parameter.is_meta for parameter in model.parameters())
        for _ in range(2):
            rig.stage(part.part)
            assert same_bits(model, expected)
            assert model.lm_head.weight is model.model.embed_tokens.weight
            rig.promote(part.part)
            assert isinstance(rig.drop(part.part), Moved)
