"""A second process finds the image that the first one kept, and does without `from_pretrained`."""

import json
import logging
import os
import subprocess
import sys
import zlib
from pathlib import Path
from threading import Event

import pytest
import torch
from movers import bits

from modelcache import ModelCache

CONFIG = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 64,
}
MODELS = {"llama": "bfloat16", "mixtral": "auto"}  # files in another dtype; files that are fused

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def transformers():
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    return transformers


@pytest.fixture
def folders(transformers, tmp_path):
    torch.manual_seed(0)
    llama = transformers.LlamaConfig(**CONFIG, intermediate_size=96, tie_word_embeddings=True)
    llama = transformers.LlamaForCausalLM(llama)
    llama.generation_config.max_new_tokens = 7
    llama.save_pretrained(tmp_path / "llama")
    mixtral = transformers.MixtralConfig(**CONFIG, intermediate_size=512, num_local_experts=4)
    transformers.MixtralForCausalLM(mixtral).save_pretrained(tmp_path / "mixtral")
    return tmp_path


def opened(root: Path, *, disk: str = "64MiB", names=tuple(MODELS)) -> ModelCache:
    cache = ModelCache(device="host_only", ram="256MiB", disk=disk, image_dir=root / "images", progress=False)
    for name in names:
        cache.register(name, loader="transformers", path=str(root / name), dtype=MODELS[name])
    return cache


def kept(root: Path) -> list[Path]:
    return sorted((root / "images" / "kept").glob("*.image"))


def keep(root: Path, number: int = 1, **options) -> None:
    with opened(root, **options) as cache:
        for name in options.get("names", MODELS):
            cache.get(name)(torch.arange(6)[None])
        for _ in range(200):
            if len(kept(root)) == number:
                return
            Event().wait(0.05)
    raise AssertionError(kept(root))


def looked_at(root: Path) -> dict[str, object]:
    """What a process sees of the models, and how often it asked transformers to load one."""
    import transformers

    calls = []
    load = transformers.PreTrainedModel.from_pretrained.__func__
    counted = classmethod(lambda cls, *args, **kwargs: calls.append(cls.__name__) or load(cls, *args, **kwargs))
    transformers.PreTrainedModel.from_pretrained = counted
    found: dict[str, object] = {}
    try:
        with opened(root) as cache:
            for name in MODELS:
                with cache.get(name) as model:
                    found[name] = seen(model)
            for _ in range(200):
                if len(kept(root)) == len(MODELS):
                    break
                Event().wait(0.05)
    finally:
        transformers.PreTrainedModel.from_pretrained = classmethod(load)
    return {"calls": calls, **found}


def seen(model) -> dict[str, object]:
    with torch.no_grad():
        logits = model(torch.arange(9)[None]).logits
    return {
        "bits": {name: zlib.crc32(value.numpy().tobytes()) for name, value in bits(model).items()},
        "logits": logits.float().flatten().tolist(),
        "written": model.generate(torch.arange(3)[None], do_sample=False).tolist(),
        "config": model.config.to_dict(),
        "generation": model.generation_config.to_dict(),
        "rest": [model.name_or_path, str(model.dtype), model.training, type(model).__name__],
        "ties": [model.lm_head.weight is model.get_input_embeddings().weight],
    }


LOOK = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path[:0] = [sys.argv[2]]
import test_second_start as t
json.dump(t.looked_at(Path(sys.argv[1])), sys.stdout, default=str)
"""


def in_a_process(root: Path) -> dict[str, object]:
    command = [sys.executable, "-c", LOOK, str(root), os.path.dirname(__file__)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(answer.stdout)


def test_a_second_process_has_the_same_models_without_from_pretrained(folders):
    first = in_a_process(folders)
    assert first.pop("calls") == ["LlamaForCausalLM", "MixtralForCausalLM"]
    assert len(kept(folders)) == 2
    second = in_a_process(folders)
    assert second.pop("calls") == []
    assert second == first


@pytest.fixture
def calls(transformers, monkeypatch):
    calls = []
    load = transformers.PreTrainedModel.from_pretrained.__func__
    counted = classmethod(lambda cls, *args, **kwargs: calls.append(cls.__name__) or load(cls, *args, **kwargs))
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", counted)
    return calls


def test_a_changed_source_is_loaded_anew_and_its_old_image_is_swept(folders, calls, transformers):
    keep(folders, names=("llama",))
    (old,) = kept(folders)
    torch.manual_seed(1)
    config = transformers.LlamaConfig.from_pretrained(folders / "llama")
    other = transformers.LlamaForCausalLM(config)
    other.save_pretrained(folders / "llama")
    calls.clear()
    keep(folders, names=("llama",))
    (new,) = kept(folders)
    assert new != old
    assert calls == ["LlamaForCausalLM"]
    with opened(folders) as cache, cache.get("llama") as model:
        assert torch.equal(model.model.norm.weight, other.model.norm.weight.bfloat16())
        assert torch.equal(model.lm_head.weight, other.lm_head.weight.bfloat16())
    assert calls == ["LlamaForCausalLM"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "in the header"])
def test_a_damaged_image_is_an_ordinary_load_with_one_warning(folders, calls, caplog, damage):
    keep(folders, names=("llama",))
    (image,) = kept(folders)
    raw = bytearray(image.read_bytes())
    if damage == "cut":
        del raw[-1]
    else:
        raw[200 if damage == "in the header" else -3000] ^= 1
    image.write_bytes(raw)
    calls.clear()
    with (
        caplog.at_level(logging.WARNING, "modelcache"),
        opened(folders) as cache,
        cache.get("llama") as model,
    ):
        found = bits(model)
        assert [str(image) in record.getMessage() for record in caplog.records] == [True]
    assert calls == ["LlamaForCausalLM"]
    calls.clear()
    with opened(folders) as cache, cache.get("llama") as model:
        assert bits(model).keys() == found.keys()
        assert all(torch.equal(value, found[name]) for name, value in bits(model).items())


def test_without_a_disk_budget_nothing_is_kept(folders, calls):
    with opened(folders, disk="none") as cache:
        cache.get("llama")(torch.arange(6)[None])
    assert not (folders / "images").exists()


def test_the_disk_budget_holds_for_kept_images(folders, calls):
    keep(folders, names=("mixtral",))
    (image,) = kept(folders)
    size = image.stat().st_size
    with opened(folders, disk=str(size + 1000) + "B", names=("llama",)) as cache:
        cache.get("llama")(torch.arange(6)[None])
        for _ in range(200):
            if kept(folders) not in ([image], []):
                break
            Event().wait(0.05)
    (left,) = kept(folders)
    assert left != image
    assert left.stat().st_size <= size + 1000


def test_a_folder_that_is_read_into_place_needs_no_image(folders, calls):
    with ModelCache(device="host_only", ram="256MiB", disk="64MiB", image_dir=folders / "images") as cache:
        cache.register("plain", loader="transformers", path=str(folders / "llama"))
        cache.register("mine", lambda: torch.nn.Linear(9, 9))
        for name in ("plain", "mine"):
            with cache.get(name):
                pass
    assert kept(folders) == []


def test_a_class_with_another_dtype_than_its_files_has_an_image_too(tmp_path):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    reference = torch.nn.Linear(300, 300)
    save_file(reference.state_dict(), tmp_path / "w.safetensors")

    def start():
        cache = ModelCache(device="host_only", ram="64MiB", disk="64MiB", image_dir=tmp_path / "images", progress=False)
        options = {"weights": str(tmp_path / "w.safetensors"), "dtype": "bfloat16"}
        cache.register("m", model=torch.nn.Linear, model_args={"in_features": 300, "out_features": 300}, **options)
        return cache

    for _ in range(2):
        with start() as cache, cache.get("m") as model:
            assert torch.equal(model.weight, reference.weight.bfloat16())
            for _ in range(200):
                if kept(tmp_path):
                    break
                Event().wait(0.05)
    (image,) = kept(tmp_path)
    raw = bytearray(image.read_bytes())
    raw[-600:] = bytes(600)
    image.write_bytes(raw)  # the second was from it
    with start() as cache, cache.get("m") as model:
        assert torch.equal(model.bias, reference.bias.bfloat16())
    assert not image.exists() or image.read_bytes() != bytes(raw)


def test_a_source_that_changes_while_it_is_loaded_is_not_kept(folders, transformers, monkeypatch, caplog):
    load = transformers.PreTrainedModel.from_pretrained.__func__

    def changing(cls, *args, **options):
        loaded = load(cls, *args, **options)
        with (folders / "llama" / "config.json").open("a") as file:  # a change of the weights refuses the load itself
            file.write("\n")
        return loaded

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(changing))
    with caplog.at_level(logging.WARNING, "modelcache"), opened(folders, names=("llama",)) as cache:
        from contextlib import suppress

        from modelcache.errors import ModelCacheError

        with suppress(ModelCacheError), cache.get("llama"):
            pass
    assert kept(folders) == []
    assert "no image of it is kept" in caplog.text


def test_an_image_that_a_model_cannot_be_built_around_is_not_deleted(folders, calls, monkeypatch):
    keep(folders, names=("llama",))
    (image,) = kept(folders)
    calls.clear()
    monkeypatch.setattr("modelcache.dataplane.loading.folder_loaders.object_print", lambda model: "another")
    with opened(folders, names=("llama",)) as cache, cache.get("llama"):
        pass
    assert calls == ["LlamaForCausalLM"]
    assert kept(folders) == [image]


class Plain(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.empty(32, 64))


class Transposed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.empty(64, 32).t())


def test_a_class_that_lays_its_tensors_out_in_another_way_has_an_image_of_its_own(tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.randn(32, 64)}, tmp_path / "w.safetensors")
    for number, (kind, stride) in enumerate({Transposed: (1, 32), Plain: (64, 1)}.items(), 1):
        cache = ModelCache(device="host_only", ram="64MiB", disk="64MiB", image_dir=tmp_path / "images", progress=False)
        with cache:
            cache.register("m", model=kind, weights=str(tmp_path / "w.safetensors"), dtype="float64")
            with cache.get("m") as model:
                assert model.w.stride() == stride
            for _ in range(200):
                if len(kept(tmp_path)) == number:
                    break
                Event().wait(0.05)
        assert len(kept(tmp_path)) == number


@pytest.mark.parametrize("how", ["mapped", "under the old date"])
def test_bytes_that_changed_without_a_sign_are_found_at_every_reload(tmp_path, how):
    import mmap

    from safetensors.torch import save_file

    from modelcache.errors import WeightsError

    path = tmp_path / "w.safetensors"
    save_file({"w": torch.ones(32, 64)}, path)
    with (
        path.open("r+b") as file,
        mmap.mmap(file.fileno(), 0) as mapped,
        ModelCache(device="host_only", ram="64MiB", progress=False) as cache,
    ):
        mapped[-1] = mapped[-1]  # a page that is written to already is written to again unnoticed
        cache.register("m", model=Plain, weights=str(path))
        for _ in range(3):
            with cache.get("m"):
                pass
            cache.evict("m")
        before = path.stat()
        mapped[-8:] = bytes(8)
        if how != "mapped":
            mapped.flush()
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        with pytest.raises(WeightsError):
            cache.get("m")()
