"""A file that is exchanged between the look at its header and the reading of its bytes is never loaded as the other."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from modelcache import ModelCache, ModelCacheError

CONFIG = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 16}


def exchange(path: Path) -> None:
    """Put another good file in its place, of the same size."""
    from safetensors.torch import load_file

    other = path.with_name("other")
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, other)
    other.rename(path)


def overwrite(path: Path) -> None:
    """Write other bytes into the same file, and set its time back."""
    found = path.stat()
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\x80\x3f")
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 1))


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4)


@pytest.fixture
def cache():
    with ModelCache(device="host_only", ram="64MiB", progress=False) as cache:
        yield cache


@pytest.mark.parametrize("change", [exchange, overwrite, shorten, Path.unlink])
def test_a_class_and_a_file_that_changes_while_the_class_is_built(change, cache, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(4, 4), "bias": torch.ones(4)}, path)

    def changing() -> torch.nn.Module:
        if path.exists():
            change(path)
        return torch.nn.Linear(4, 4)

    cache.register("m", loader="safetensors", model=changing, weights=str(path))
    with pytest.raises(ModelCacheError, match=r"changed since|no file|removed|safetensors refuses it"):
        cache.get("m", timeout=15)


@pytest.mark.parametrize("dtype", ["auto", "float16"])
def test_a_folder_whose_file_is_exchanged_while_the_library_loads_it(dtype, cache, tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    config = transformers.BertConfig(**CONFIG)
    transformers.BertModel(config).save_pretrained(tmp_path)

    class Exchanging(transformers.BertModel):
        @classmethod
        def from_pretrained(cls, folder: str, **options: object):
            exchange(Path(folder) / "model.safetensors")
            return transformers.BertModel.from_pretrained(folder, **options)

    cache.register("m", loader="transformers", path=str(tmp_path), model=Exchanging, dtype=dtype)
    with pytest.raises(ModelCacheError, match="changed"):
        cache.get("m", timeout=15)
