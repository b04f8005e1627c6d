"""What an operator reads about a file that cannot be used: place, what was found, what to do. Every line is exact."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelcache.config import check_text
from modelcache.errors import ConfigError

#: What makes texts that get far.
WORDS = "abm:{}[]&*!#-|>'\\\n\t ,.0123456789%GiB" + '"'

GOLDEN: dict[str, tuple[str, list[str]]] = {
    "size with an unknown unit": (
        "budgets:\n  vram: 16 Gb\n",
        [
            "modelcache.yaml:2:9: budgets.vram: unknown unit 'Gb' (gigabits?); use GB or GiB, e.g. \"16GiB\"",
        ],
    ),
    "size without a unit": (
        "budgets:\n  vram: 16\n",
        [
            'modelcache.yaml:2:9: budgets.vram: 16 bytes is smaller than any model; add a unit: "16GiB"',
        ],
    ),
    "negative size": (
        "budgets:\n  vram: -4GiB\n",
        [
            "modelcache.yaml:2:9: budgets.vram: must be greater than 0, got -4GiB",
        ],
    ),
    "size that is no number": (
        "budgets:\n  vram: .nan\n",
        [
            'modelcache.yaml:2:9: budgets.vram: must be a size such as "16GiB" or "80%", got the number nan',
        ],
    ),
    "share above all": (
        "budgets:\n  vram: 120%\n",
        [
            "modelcache.yaml:2:9: budgets.vram: 120% is above 100%",
        ],
    ),
    "share of nothing": (
        "budgets:\n  ram: 0%\n",
        [
            "modelcache.yaml:2:8: budgets.ram: must be greater than 0%, got 0%",
        ],
    ),
    "unit of another system": (
        "budgets:\n  ram: 24Gi\n",
        [
            "modelcache.yaml:2:8: budgets.ram: unknown unit 'Gi'; use GB or GiB, e.g. \"24GiB\"",
        ],
    ),
    "size as a list": (
        "budgets:\n  ram: [1GiB]\n",
        [
            'modelcache.yaml:2:8: budgets.ram: must be a size such as "16GiB" or "80%", got a list',
        ],
    ),
    "size that is empty": (
        "budgets:\n  ram:\n",
        [
            'modelcache.yaml:2:7: budgets.ram: is empty; write a size such as "16GiB" or "80%", or remove the key',
        ],
    ),
    "unknown key": (
        "buget:\n  vram: 1GiB\n",
        [
            "modelcache.yaml:1:1: unknown key 'buget'; did you mean 'budgets'? known keys: version, device, memory, budgets, policy, preload, roots, image_dir, segment, max_waiters, lease_sites, progress, simulated, models, ab",
        ],
    ),
    "unknown key in a section": (
        "budgets:\n  rma: 1GiB\n",
        [
            "modelcache.yaml:2:3: budgets: unknown key 'rma'; did you mean 'ram'? known keys: vram, ram, page_locked, ram_spare, disk",
        ],
    ),
    "key set twice": (
        "budgets:\n  vram: 1GiB\n  ram: 2GiB\n  vram: 3GiB\n",
        [
            "modelcache.yaml:4:3: budgets.vram: is already set on line 2; YAML would silently keep one: remove the other",
        ],
    ),
    "model named twice": (
        "models:\n  a: {loader: 'm:f'}\n  b: {loader: 'm:f'}\n  a: {loader: 'm:g'}\n",
        [
            "modelcache.yaml:4:3: models.a: is already set on line 2; YAML would silently keep one: remove the other",
        ],
    ),
    "anchor and alias": (
        "models:\n  a: &x {loader: 'm:f'}\n  b: *x\n",
        [
            "modelcache.yaml:2:6: anchors and aliases are not allowed here; write the value out",
            "modelcache.yaml:3:6: anchors and aliases are not allowed here; write the value out",
            "modelcache.yaml:3:6: models.b: must be a mapping of keys to values, got ''",
        ],
    ),
    "tag": (
        "version: !!python/object/apply:os.system ['true']\n",
        [
            "modelcache.yaml:1:10: tags (words that begin with !) are not allowed here; remove it",
            "modelcache.yaml:1:10: version: must be 1, the only version of this format, got a list",
        ],
    ),
    "deep nesting": (
        "models: [[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]\n",
        [
            "modelcache.yaml:1:9: models: must be a mapping of keys to values, got a list",
            "modelcache.yaml:1:40: nested deeper than 32 levels; this does not look like a modelcache configuration",
        ],
    ),
    "two documents": (
        "version: 1\n---\nversion: 1\n",
        [
            "modelcache.yaml:2:1: a second document begins here; keep one document per file",
        ],
    ),
    "no mapping": (
        "- a\n- b\n",
        [
            "modelcache.yaml:1:1: a configuration is a mapping of keys to values, not a list",
        ],
    ),
    "tabs": (
        "budgets:\n\tvram: 1GiB\n",
        [
            "modelcache.yaml:2:1: a tab in the indentation; use spaces",
        ],
    ),
    "path as a name": (
        "models:\n  ../llama: {loader: 'm:f'}\n",
        [
            "modelcache.yaml:2:3: models.../llama: '../llama' is not a valid name; use a-z, 0-9, '.', '_', '-', 1 to 64 characters, beginning and ending with a letter or digit; paths go in 'path'",
        ],
    ),
    "name in capitals": (
        "models:\n  My Model: {loader: 'm:f'}\n",
        [
            "modelcache.yaml:2:3: models.My Model: 'My Model' is not a valid name; did you mean 'my-model'? use a-z, 0-9, '.', '_', '-', 1 to 64 characters, beginning and ending with a letter or digit; paths go in 'path'",
        ],
    ),
    "path out of the folder": (
        "models:\n  llama: {loader: transformers, path: ../../etc}\n",
        [
            "modelcache.yaml:2:39: models.llama.path: '../../etc' leaves the folder of this file; add its folder to 'roots' if this is intended",
        ],
    ),
    "path missing": (
        "models:\n  llama: {loader: transformers}\n",
        [
            "modelcache.yaml:2:3: models.llama: path is missing; the loader 'transformers' needs it",
        ],
    ),
    "loader missing": (
        "models:\n  llama: {path: models/llama}\n",
        [
            "modelcache.yaml:2:3: models.llama: needs the key 'loader'",
        ],
    ),
    "unknown loader": (
        "models:\n  llama: {loader: transformer, path: a}\n",
        [
            "modelcache.yaml:2:19: models.llama.loader: unknown loader 'transformer'; did you mean 'transformers'? a loader is one of transformers, sentence-transformers, safetensors, or your own function, \"package.module:function\"",
        ],
    ),
    "option of another loader": (
        "models:\n  mine: {loader: 'pkg:load', path: a}\n",
        [
            "modelcache.yaml:2:30: models.mine.path: is no option of the loader 'pkg:load'; it takes no options; give them inside the function",
        ],
    ),
    "misspelt option": (
        "models:\n  mine: {loader: 'pkg:load', worksapce: 1GiB}\n",
        [
            "modelcache.yaml:2:30: models.mine: unknown key 'worksapce'; did you mean 'workspace'? known keys: loader, path, model, weights, task, dtype, size, workspace, pin, priority, idle, concurrency, reload, on_write",
        ],
    ),
    "time that YAML would read as 210": (
        "policy:\n  idle: 3:30\n",
        [
            'modelcache.yaml:2:9: policy.idle: cannot read \'3:30\'; write a duration such as "90s", "10m", "1m30s" or "never"',
        ],
    ),
    "octal": (
        "max_waiters: 010\n",
        [
            "modelcache.yaml:1:14: max_waiters: must be a whole number, 1 or more, got the number 010",
        ],
    ),
    "flag in another language": (
        "progress: ja\n",
        [
            "modelcache.yaml:1:11: progress: must be true or false, got 'ja'",
        ],
    ),
    "unknown policy": (
        "policy:\n  evict: lur\n",
        [
            "modelcache.yaml:2:10: policy.evict: must be lru or cost, got 'lur'; did you mean 'lru'?",
        ],
    ),
    "preload of nobody": (
        "preload: [embd]\nmodels:\n  embed: {loader: 'm:f'}\n",
        [
            "modelcache.yaml:1:11: preload[0]: no model is called 'embd'; did you mean 'embed'?",
        ],
    ),
    "pin to nowhere": (
        "models:\n  a: {loader: 'm:f', pin: gpu}\n",
        [
            "modelcache.yaml:2:27: models.a.pin: must be vram or ram, got 'gpu'",
        ],
    ),
    "concurrency below nothing": (
        "models:\n  a: {loader: 'm:f', concurrency: -1}\n",
        [
            'modelcache.yaml:2:35: models.a.concurrency: must be a whole number, 1 or more, or "unlimited", got the number -1',
        ],
    ),
    "nickname of a dtype": (
        "models:\n  a: {loader: transformers, path: x, dtype: bf16}\n",
        [
            "modelcache.yaml:2:45: models.a.dtype: must be auto, bfloat16, float16, float32 or float64, got 'bf16'; did you mean 'bfloat16'?",
        ],
    ),
    "nickname of a device": (
        "device: gpu\n",
        [
            "modelcache.yaml:1:9: device: must be auto, cuda:N (such as cuda:0), simulated or host_only, got 'gpu'; did you mean 'cuda:0'?",
        ],
    ),
    "version of the future": (
        "version: 2\n",
        [
            "modelcache.yaml:1:10: version: must be 1, the only version of this format, got the number 2",
        ],
    ),
    "url as a path": (
        "models:\n  a: {loader: transformers, path: 'https://x/y'}\n",
        [
            "modelcache.yaml:2:35: models.a.path: must be a path on this machine, got 'https://x/y'; nothing is downloaded: fetch it first",
        ],
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_a_broken_file_is_answered_with_place_and_fix(name: str) -> None:
    text, lines = GOLDEN[name]
    with pytest.raises(ConfigError) as caught:
        check_text(text)
    assert str(caught.value).splitlines() == lines


def test_every_problem_of_a_file_is_found_in_one_pass() -> None:
    text = (
        "buget: {vram: 1GiB}\nbudgets:\n  vram: 16 Gb\n  rma: 1GiB\npolicy: {idle: 3:30, evict: lur}\npreload: [embd]\n"
        "models:\n  embed: {loader: transformer, path: ../../etc}\n  qwen: {loader: transformers, dtype: bf16}\n"
    )
    with pytest.raises(ConfigError) as caught:
        check_text(text)
    assert [(f.line, f.key) for f in caught.value.findings] == [
        (1, ""),
        (3, "budgets.vram"),
        (4, "budgets"),
        (5, "policy.idle"),
        (5, "policy.evict"),
        (6, "preload[0]"),
        (8, "models.embed.loader"),
        (8, "models.embed.path"),
        (9, "models.qwen"),
        (9, "models.qwen.dtype"),
    ]


def test_the_fields_of_a_config_error_are_those_of_its_first_problem() -> None:
    with pytest.raises(ConfigError) as caught:
        check_text("version: 1\nbudgets:\n  vram: 16\n", "cache.yaml")
    error = caught.value
    assert (error.path, error.line, error.column, error.key) == ("cache.yaml", 3, 9, "budgets.vram")


def test_a_decimal_size_is_taken_and_remarked_on() -> None:
    found = check_text("budgets:\n  vram: 24GB\n")
    (warning,) = found.warnings
    assert str(warning) == (
        'modelcache.yaml:2:9: budgets.vram: "24GB" is 22.35 GiB; if you mean the binary unit, write "24GiB"'
    )
    assert warning.severity == "warning"


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=200) | st.text(alphabet=WORDS, max_size=200))
def test_only_a_config_error_escapes_from_any_text(text: str) -> None:
    try:
        check_text(text.encode("utf-8", "replace").decode())
    except ConfigError as error:
        assert str(error)
