"""Hostile folders for transformers: configurations, pipelines and adapters that say what to run or to read."""

from __future__ import annotations

import json
import os
from pathlib import Path

from hostile.contents import GOOD, LOADED, case, copied, edit, payload_module, pickled, torch_zip

# ------------------------------------------------------------------------------------- folders for transformers


case("a good folder", "transformers", LOADED)(copied("transformers"))
case("a good folder, by an automatic class", "transformers", LOADED, options={"model": "AutoModel"})(
    copied("transformers")
)

for _name, _changes, _words in [
    ("trusts remote code", {"trust_remote_code": True}, "sets 'trust_remote_code'"),
    ("trusts it inside", {"text_config": {"trust_remote_code": True}}, "sets 'trust_remote_code'"),
    ("names kernels", {"_attn_implementation_internal": "evil/kernels"}, "sets '_attn_implementation_internal'"),
    ("names kernels openly", {"attn_implementation": "evil/kernels"}, "sets 'attn_implementation'"),
    (
        "names kernels for a part",
        {"attn_implementation": {"text_config": "evil/kernels"}},
        "sets 'attn_implementation'",
    ),
    ("has a private key", {"_flash_attn_3_loader": "x"}, "sets '_flash_attn_3_loader'"),
    ("names pipelines", {"custom_pipelines": {"x": {"impl": "payload.Model"}}}, "sets 'custom_pipelines'"),
    ("is nested deeply", {"x": json.loads("[" * 70 + "]" * 70)}, "nested deeper than 64 levels"),
    ("names a pickle as weights", {"transformers_weights": "adapter_model.bin"}, "sets 'transformers_weights'"),
    ("names other weights", {"transformers_weights": "other.safetensors"}, "sets 'transformers_weights'"),
    ("names weights outside", {"transformers_weights": "../outside.safetensors"}, "sets 'transformers_weights'"),
]:

    @case(f"a configuration that {_name}", "transformers", _words)
    def _(folder: Path, good: Path, changes=_changes) -> None:
        copied("transformers")(folder, good)
        payload_module(folder)
        (folder / "adapter_model.bin").write_bytes(torch_zip(folder))
        (folder / "other.safetensors").write_bytes(b"")
        edit(folder / "config.json", **changes)


for _name, _changes in [
    ("modules of its own", {"auto_map": {"AutoConfig": "payload.Config", "AutoModel": "payload.Model"}}),
    ("modules of another folder", {"auto_map": {"AutoModel": "../other--payload.Model"}}),
    ("a name that is a path", {"_name_or_path": "../../../etc"}),
    ("an architecture of another module", {"architectures": ["os.system"]}),
    ("an architecture that is no model", {"architectures": ["Trainer"]}),
    ("an architecture that is a list", {"architectures": [["BertModel"]]}),
    ("labels with private names", {"id2label": {"0": "_x"}, "label2id": {"_x": 0}}),
]:

    @case(f"a configuration with {_name}", "transformers", LOADED)
    def _(folder: Path, good: Path, changes=_changes) -> None:
        copied("transformers")(folder, good)
        payload_module(folder)
        edit(folder / "config.json", **changes)


@case(
    "a kind of model that only its own code knows", "transformers", "raised ValueError", options={"model": "AutoModel"}
)
def _(folder: Path, good: Path) -> None:
    copied("transformers")(folder, good)
    payload_module(folder)
    auto_map = {"AutoConfig": "payload.Config", "AutoModel": "payload.Model"}
    edit(folder / "config.json", model_type="hostile", auto_map=auto_map)


@case("a quantizer that nobody knows", "transformers", LOADED)
def _(folder: Path, good: Path) -> None:
    copied("transformers")(folder, good)
    payload_module(folder)
    edit(folder / "config.json", quantization_config={"quant_method": "payload"})


for _name, _raw, _words in [
    ("is no JSON", b"not JSON", "no usable JSON"),
    ("is above its cap", b" " * (2**20 + 1), "are more than the 1,048,576 allowed"),
    ("has a key twice", b'{"model_type":"bert","model_type":"hostile"}', "appears twice"),
    ("is a pickle", b"\x80\x04K\x01.", "no usable JSON"),
    ("nests 100,000 lists", b"[" * 100_000, "no usable JSON"),
]:

    @case(f"a configuration that {_name}", "transformers", _words)
    def _(folder: Path, good: Path, raw=_raw) -> None:
        copied("transformers")(folder, good)
        (folder / "config.json").write_bytes(raw)


@case("a configuration that is a pipe", "transformers", "a named pipe")
def _(folder: Path, good: Path) -> None:
    copied("transformers")(folder, good)
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


@case("a configuration that is a link to a device", "transformers", "a device")
def _(folder: Path, good: Path) -> None:
    copied("transformers")(folder, good)
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/dev/zero")


@case("a configuration of generation that trusts remote code", "transformers", "sets 'trust_remote_code'")
def _(folder: Path, good: Path) -> None:
    copied("transformers")(folder, good)
    payload_module(folder)
    edit(folder / "generation_config.json", trust_remote_code=True)


@case("a generation of its own", "transformers", LOADED)
def _(folder: Path, good: Path) -> None:
    copied("transformers")(folder, good)
    (folder / "custom_generate").mkdir()
    payload_module(folder, "custom_generate/generate.py")


@case("a pickle beside good weights", "transformers", LOADED)
def _(folder: Path, good: Path) -> None:
    copied("transformers")(folder, good)
    (folder / "pytorch_model.bin").write_bytes(torch_zip(folder))


@case("a pickle in place of weights", "transformers", "(pickle, not loaded)")
def _(folder: Path, good: Path) -> None:
    copied("transformers")(folder, good)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(torch_zip(folder))


@case("an index of pickles in place of weights", "transformers", "no file 'model.safetensors'")
def _(folder: Path, good: Path) -> None:
    copied("transformers")(folder, good)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "pytorch_model-1.bin"}}))
    (folder / "pytorch_model-1.bin").write_bytes(torch_zip(folder))


@case("a pickle with the name of weights", "transformers", "this is a ZIP archive")
def _(folder: Path, good: Path) -> None:
    copied("transformers")(folder, good)
    (folder / "model.safetensors").write_bytes(torch_zip(folder))


@case("a file in place of a folder", "transformers", "this is a file, not the folder of a model", weights="config.json")
def _(folder: Path, good: Path) -> None:
    copied("transformers")(folder, good)


@case(
    "a folder that is not there",
    "transformers",
    "there is no such folder, and nothing is downloaded",
    weights="evil/repo",
)
def _(_folder: Path, _good: Path) -> None:
    pass


# Pipelines read the files of a tokenizer, of which there are many kinds.

_TASK = {"task": "feature-extraction"}


def _auto_tokenizer(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["payload.Tokenizer", "payload.Tokenizer"]})


for _name, _build, _words in [
    ("that is good", lambda _folder: None, LOADED),
    ("with a tokenizer of its own", _auto_tokenizer, LOADED),
    (
        "with a class of tokenizer that nobody knows",
        lambda folder: edit(folder / "tokenizer_config.json", tokenizer_class="payload.Tokenizer"),
        LOADED,
    ),
    (
        "whose tokenizer trusts remote code",
        lambda folder: (_auto_tokenizer(folder), edit(folder / "tokenizer_config.json", trust_remote_code=True)),
        LOADED,
    ),
    (
        "with a pickled vocabulary",
        lambda folder: (folder / "vocab.pkl").write_bytes(pickled(folder)),
        LOADED,
    ),
    (
        "with a pipe for a tokenizer",
        lambda folder: ((folder / "tokenizer.json").unlink(), os.mkfifo(folder / "tokenizer.json")),
        LOADED,
    ),
    ("with a damaged tokenizer", lambda folder: (folder / "tokenizer.json").write_bytes(b"[" * 5000), "raised"),
    (
        "with templates that run code",
        lambda folder: (folder / "chat_template.jinja").write_text(
            "{{ ''.__class__.__mro__[1].__subclasses__() }}{% set x = cycler.__init__.__globals__.os.system('true') %}"
        ),
        LOADED,
    ),
    (
        "with a pipeline of its own",
        lambda folder: edit(folder / "config.json", custom_pipelines={_TASK["task"]: {"impl": "payload.Model"}}),
        "sets 'custom_pipelines'",
    ),
]:

    @case(f"a pipeline {_name}", "transformers", _words, "pipelines", options=_TASK)
    def _(folder: Path, good: Path, build=_build) -> None:
        copied("transformers")(folder, good)
        payload_module(folder)
        build(folder)


# Adapters: peft reads them when transformers finds their configuration beside a model.

_LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["query"], "base_model_name_or_path": "x"}


def _adapted(folder: Path, good: Path, **changes: object) -> None:
    copied("transformers")(folder, good)
    edit(folder / "adapter_config.json", **{**_LORA, **changes})


@case("an adapter that is a pickle", "transformers", "adapter_model.bin")
def _(folder: Path, good: Path) -> None:
    _adapted(folder, good)
    (folder / "adapter_model.bin").write_bytes(torch_zip(folder))


@case("an adapter with a damaged header", "transformers", "the file is empty")
def _(folder: Path, good: Path) -> None:
    _adapted(folder, good)
    (folder / "adapter_model.safetensors").write_bytes(b"")


for _name, _changes, _words in [
    (
        "names a module to import",
        {"megatron_config": {"x": 1}, "megatron_core": "{package}.payload"},
        "sets 'megatron_config'",
    ),
    ("names a library", {"auto_mapping": {"base_model_class": "X", "parent_library": "{package}.payload"}}, LOADED),
    (
        "names a pickle of covariances",
        {"init_lora_weights": "corda", "corda_config": {"cache_file": "c.pt"}},
        "sets 'cache_file'",
    ),
    (
        "names a pickle of gradients",
        {"init_lora_weights": "lora_ga", "lora_ga_config": {"cache_file": "c.pt"}},
        "sets 'cache_file'",
    ),
    ("trusts remote code", {"trust_remote_code": True}, "sets 'trust_remote_code'"),
]:

    @case(f"an adapter that {_name}", "transformers", _words)
    def _(folder: Path, good: Path, changes=_changes) -> None:
        payload_module(folder)
        text = json.dumps(changes).replace("{package}", folder.name)
        _adapted(folder, good, **json.loads(text))
        (folder / "adapter_model.safetensors").write_bytes(GOOD)
