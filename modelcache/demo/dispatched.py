"""A model that accelerate dispatched over CPU and disk: what it cannot do any more, and what it can again."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from modelcache import ModelCache, Tier, materialize_meta_tensors
from modelcache.demo.accelerator import Accelerator
from modelcache.demo.records import Budgets, Check, Rescue
from modelcache.demo.reloading import size_of, weights_of
from modelcache.demo.variants import SENTENCES, embed, load_sentence_model
from modelcache.demo.weights import SentenceModel

TO_ERROR = "You can't move a model that has some modules offloaded to cpu or disk."
CPU_ERROR = "Cannot copy out of meta tensor; no data!"
_NAME = "dispatched"
_RAM_BYTES = 1 << 30


def rescue(sentences: SentenceModel, accelerator: Accelerator, budgets: Budgets, work_folder: Path) -> Rescue:
    """Show accelerate's two errors, then move the model all the same, alone and through a cache."""
    began_s = time.perf_counter()
    original = load_sentence_model(str(sentences.folder))
    expected = {name: tensor.clone() for name, tensor in weights_of(original).items()}
    tokens = sentences.encode(SENTENCES[:4])
    vectors = embed(original, tokens, torch.device("cpu"))

    model = _dispatched(original, work_folder / "offloaded-1")
    num_meta = sum(tensor.is_meta for tensor in weights_of(model).values())
    to_error, cpu_error = _error_of(lambda: model.to("cpu")), _error_of(model.cpu)
    materialize_meta_tensors(model, "cpu")
    alone = _equality(weights_of(model), expected)

    again = _dispatched(load_sentence_model(str(sentences.folder)), work_folder / "offloaded-2")
    checks = [
        Check('accelerate refuses .to("cpu")', to_error.startswith(TO_ERROR), to_error),
        Check("accelerate fails in .cpu()", CPU_ERROR in cpu_error, cpu_error),
        Check("materialized, it is the same bit for bit", *alone),
        *_through_cache(again, expected, vectors, tokens, accelerator, budgets),
    ]
    return Rescue(to_error, cpu_error, num_meta, size_of(model), time.perf_counter() - began_s, tuple(checks))


def _through_cache(
    dispatched: Any,
    expected: dict[str, torch.Tensor],
    vectors: torch.Tensor,
    tokens: dict[str, torch.Tensor],
    accelerator: Accelerator,
    budgets: Budgets,
) -> list[Check]:
    """Registered as it is, brought up, parked, and brought up again."""
    with ModelCache(vram=budgets.vram_bytes, ram=_RAM_BYTES, device=accelerator.device, progress=False) as cache:
        cache.register(_NAME, lambda: dispatched)
        with cache.get(_NAME) as model:
            first = embed(model, tokens, accelerator.torch_device)
        freed = cache.park(_NAME)
        parked = cache.info(_NAME)
        parked_is_equal, parked_number = _equality(weights_of(dispatched), expected)
        with cache.get(_NAME) as model:
            back = embed(model, tokens, accelerator.torch_device)
            restored = _equality(weights_of(model), expected)
    difference = max(float((out - vectors).abs().max()) for out in (first, back))
    tolerance = 1e-6 if accelerator.torch_device.type != "cuda" else 1e-3
    return [
        Check(
            "parked by the cache, it left VRAM and is the same",
            parked.tier is Tier.RAM and parked.vram_bytes == 0 and parked_is_equal,
            f"{freed.vram_bytes / 2**20:.1f} MiB freed, {parked_number}",
        ),
        Check("restored, it is the same bit for bit", *restored),
        Check("its vectors are those of the original", difference <= tolerance, f"largest difference {difference:.1e}"),
    ]


def _dispatched(model: Any, folder: Path) -> Any:
    """The model with its first layers on the CPU and the rest on disk."""
    from accelerate import dispatch_model

    layers = len(model.encoder.layer)
    device_map: dict[str, str] = {"embeddings": "cpu", "pooler": "disk"}
    device_map |= {f"encoder.layer.{i}": "cpu" if i < layers // 3 else "disk" for i in range(layers)}
    return dispatch_model(model, device_map=device_map, main_device="cpu", offload_dir=str(folder), force_hooks=True)


def _error_of(call: Any) -> str:
    try:
        call()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return "no error"


def _equality(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> tuple[bool, str]:
    equal = [
        name
        for name, tensor in expected.items()
        if name in found and not found[name].is_meta and torch.equal(found[name].cpu(), tensor)
    ]
    return len(equal) == len(expected), f"{len(equal)} of {len(expected)} tensors equal"
