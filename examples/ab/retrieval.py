"""What configs/ab_compare.yaml compares: two variants of MiniLM, asked to find a sentence by half of it."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

from modelcache.demo.variants import SENTENCES, embed, load_sentence_model
from modelcache.demo.weights import SentenceModel, sentence_model


@cache
def source() -> SentenceModel:
    """The real all-MiniLM-L6-v2 where its package is installed, else one of the same shape with random weights."""
    return sentence_model(Path(tempfile.mkdtemp()), synthetic=False, seed=0)


def all_layers() -> Any:
    """The baseline."""
    return load_sentence_model(str(source().folder))


def five_layers() -> Any:
    """The candidate: smaller, faster, and not as good."""
    return load_sentence_model(str(source().folder), num_hidden_layers=5)


def find(model: Any, item: dict[str, Any]) -> torch.Tensor:
    """Similarities of half a sentence to all whole ones, float32 (sentences,) in RAM."""
    device = next(model.parameters()).device
    vectors = embed(model, source().encode([item["half"], *SENTENCES]), device)
    return vectors[1:] @ vectors[0]


def margin(similarities: torch.Tensor, item: dict[str, Any]) -> float:
    """How far the right sentence is ahead of the best wrong one; more is better."""
    wrong = similarities.clone()
    wrong[item["answer"]] = -1
    return float(similarities[item["answer"]] - wrong.max())
