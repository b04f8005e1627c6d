"""Hostile folders for sentence-transformers, which are made of parts, and hostile configurations of modelcache itself."""

from __future__ import annotations

import json
import os
from pathlib import Path

from hostile.contents import LOADED, MARK, case, copied, edit, payload_module, safetensors_bytes, torch_zip

# ------------------------------------------------------------------------------ folders for sentence-transformers


case("a good folder of parts", "sentence-transformers", LOADED)(copied("sentence-transformers"))


def _parts(folder: Path, *more: dict) -> None:
    modules = folder / "modules.json"
    listed = json.loads(modules.read_text())
    listed += [
        {"idx": len(listed) + number, "name": str(len(listed) + number), **part} for number, part in enumerate(more)
    ]
    modules.write_text(json.dumps(listed))


_DENSE = {"in_features": 8, "out_features": 4, "bias": True, "activation_function": "torch.nn.modules.activation.Tanh"}
_DENSE_TYPE = "sentence_transformers.models.Dense"
_DENSE_WEIGHTS = safetensors_bytes(
    {"linear.weight": ("F32", [4, 8], bytes(128)), "linear.bias": ("F32", [4], bytes(16))}
)
_DENSE_SHARD = "model-00001-of-00001.safetensors"
_DENSE_INDEX = json.dumps({"weight_map": dict.fromkeys(("linear.weight", "linear.bias"), _DENSE_SHARD)}).encode()


def _dense(folder: Path, path: str, weights: bytes | None = _DENSE_WEIGHTS, **changes: object) -> None:
    place = folder / path
    place.mkdir(parents=True, exist_ok=True)
    edit(place / "config.json", **{**_DENSE, **changes})
    if weights is not None:
        (place / "model.safetensors").write_bytes(weights)
    _parts(folder, {"path": path, "type": _DENSE_TYPE})


for _name, _build, _words in [
    ("with one more part", lambda folder: _dense(folder, "2_Dense"), LOADED),
    ("with a part far below", lambda folder: _dense(folder, "x/y/2_Dense"), LOADED),
    (
        "with a part whose class is in the folder",
        lambda folder: _parts(folder, {"path": "", "type": "payload.Model"}),
        "sets 'type' to 'payload.Model'",
    ),
    (
        "with a part whose class is in the library",
        lambda folder: _parts(folder, {"path": "", "type": "os.system"}),
        "sets 'type' to 'os.system'",
    ),
    (
        "with a part above it",
        lambda folder: _parts(folder, {"path": "../elsewhere", "type": _DENSE_TYPE}),
        "outside the folder",
    ),
    (
        "with a part at the root",
        lambda folder: _parts(folder, {"path": "/etc", "type": _DENSE_TYPE}),
        "outside the folder",
    ),
    ("with a part that is only a pickle", lambda folder: _dense_pickled(folder, "2_Dense"), "pytorch_model.bin"),
    ("with such a part far below", lambda folder: _dense_pickled(folder, "x/y/2_Dense"), "pytorch_model.bin"),
    (
        "with a pickle beside an index that nobody follows",
        lambda folder: _dense_pickled(folder, "2_Dense", index=b"{}"),
        "has a pickle and no model.safetensors",
    ),
    (
        "with a pickle beside an index and its shard",
        lambda folder: _dense_pickled(folder, "2_Dense", index=_DENSE_INDEX, shard=_DENSE_WEIGHTS),
        "has a pickle and no model.safetensors",
    ),
    ("with a damaged part", lambda folder: _dense(folder, "2_Dense", b""), "the file is empty"),
    ("with a damaged part far below", lambda folder: _dense(folder, "x/y/2_Dense", b""), "the file is empty"),
    (
        "with a private key far below",
        lambda folder: _dense(folder, "x/y/2_Dense", _attn_implementation_internal="evil/kernels"),
        "sets '_attn_implementation_internal'",
    ),
    (
        "with an activation that is a function",
        lambda folder: _dense(folder, "2_Dense", activation_function=f"{folder.name}.payload.Model"),
        LOADED,
    ),
    (
        "with an activation that is none of torch's modules",
        lambda folder: _dense(folder, "2_Dense", activation_function="torch.hub.list"),
        "raised ValueError",
    ),
    ("with a router to its own classes", lambda folder: _router(folder, "payload.Model"), "sets 'types'"),
    (
        "with a part that is an adapter to another model",
        lambda folder: (folder / "config.json").rename(folder / "adapter_config.json"),
        "adapter_config.json",
    ),
    (
        "with a list of parts twice as deep",
        lambda folder: (folder / "modules.json").write_bytes(b"[" * 100_000),
        "JSON",
    ),
    (
        "that is told to trust remote code",
        lambda folder: edit(folder / "sentence_bert_config.json", model_args={"trust_remote_code": True}),
        "sets 'trust_remote_code'",
    ),
    (
        "that is told to read pickles",
        lambda folder: _only_pickled(folder),
        "has a pickle and no model.safetensors",
    ),
    (
        "whose model names a pickle as weights",
        lambda folder: edit(folder / "config.json", transformers_weights="adapter_model.bin"),
        "sets 'transformers_weights'",
    ),
]:

    @case(f"a folder {_name}", "sentence-transformers", _words)
    def _(folder: Path, good: Path, build=_build) -> None:
        copied("sentence-transformers")(folder, good)
        payload_module(folder)
        (folder / "adapter_model.bin").write_bytes(torch_zip(folder))
        build(folder)


def _only_pickled(folder: Path) -> None:
    _dense(folder, "2_Dense")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(torch_zip(folder))
    edit(folder / "sentence_bert_config.json", model_args={"use_safetensors": False})


def _dense_pickled(folder: Path, path: str, *, index: bytes | None = None, shard: bytes | None = None) -> None:
    _dense(folder, path, None)
    (folder / path / "pytorch_model.bin").write_bytes(torch_zip(folder))
    if index is not None:
        (folder / path / "model.safetensors.index.json").write_bytes(index)
    if shard is not None:
        (folder / path / _DENSE_SHARD).write_bytes(shard)


def _router(folder: Path, kind: str) -> None:
    place = folder / "2_Router"
    place.mkdir()
    edit(place / "router_config.json", types={"q": kind}, structure={"query": ["q"]}, parameters={})
    (place / "q").mkdir()
    payload_module(folder)
    _parts(folder, {"path": "2_Router", "type": "sentence_transformers.models.Router"})


# ---------------------------------------------------------------------------------------------- configurations

_BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"
for _name, _text, _words in [
    ("that asks for an object", "!!python/object/apply:os.system ['touch {mark}']\n", "tags"),
    ("with aliases", _BOMB, "anchors and aliases are not allowed"),
    ("nested deeply", "a: " + "[" * 5000 + "\n", "nested deeper than 32 levels"),
    ("above its cap", "#" * 70_000, "is larger than 64 KiB"),
    ("with a NUL", "a: \0\n", "control character U+0000"),
    ("of two documents", "version: 1\n---\nversion: 1\n", "a second document"),
    ("with a key twice", "version: 1\nversion: 1\n", "is already set on line 1"),
    ("that trusts remote code", "models:\n  m: {{path: ., trust_remote_code: true}}\n", "cannot be set in a file"),
    ("that allows pickles", "models:\n  m: {{path: ., allow_pickle: true}}\n", "cannot be set in a file"),
    ("with a name above the folder", "models:\n  ../m: {{path: .}}\n", "is not a valid name"),
    ("with a name of a device", "models:\n  nul: {{path: .}}\n", "is the name of a device"),
    ("with a name written backwards", 'models:\n  "m\\u202e": {{path: .}}\n', "is not a valid name"),
    ("with a name of 65 letters", "models:\n  " + "m" * 65 + ": {{path: .}}\n", "is not a valid name"),
    ("with a path with a NUL", 'models:\n  m: {{path: "a\\0b"}}\n', "models.m.path"),
    ("with a size that is not a number", "budgets:\n  vram: .nan\n", "budgets.vram"),
    ("with a size that is a bomb", "budgets:\n  vram: " + "9" * 5000 + "GiB\n", "budgets.vram"),
    ("whose loader is code", "models:\n  m: {{loader: \"__import__('os').system('x')\"}}\n", "models.m.loader"),
    ("that says where to import from", "python_path: [.]\n", "unknown key 'python_path'"),
]:

    @case(f"a configuration {_name}", "config", _words, "configurations")
    def _(folder: Path, _good: Path, text=_text) -> None:
        if "{mark}" in text:
            text = text.replace("{mark}", str(folder.parent / MARK))
        (folder / "modelcache.yaml").write_text(text.replace("{{", "{").replace("}}", "}"))


@case("a configuration that is a pipe", "config", "is not a regular file", "configurations")
def _(folder: Path, _good: Path) -> None:
    os.mkfifo(folder / "modelcache.yaml")


@case("a configuration that names a function of the folder", "config", LOADED, "configurations")
def _(folder: Path, _good: Path) -> None:
    payload_module(folder)  # checking a configuration imports nothing
    (folder / "modelcache.yaml").write_text(f"models:\n  m: {{loader: '{folder.name}.payload:Model'}}\n")
