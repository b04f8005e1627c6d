"""The same trace without a cache: delete the model, load the next one from disk, move it to the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from modelcache.demo.cold_files import forget_pages
from modelcache.demo.records import Outcome, Served
from modelcache.demo.variants import Request, Workload


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by name, persistent or not."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def size_of(model: Any) -> int:
    """Bytes of its weights."""
    return sum(tensor.numel() * tensor.element_size() for tensor in weights_of(model).values())


def delete_and_reload(
    workload: Workload, requests: Sequence[Request], device: torch.device, tell: Callable[[int], None]
) -> Outcome:
    """Serve the trace with one model on the device at a time; `tell` is called with the requests done so far."""
    began_s = time.perf_counter()
    served: list[Served] = []
    answers: list[torch.Tensor] = []
    model, name, moved_bytes = None, None, 0
    for request in requests:
        is_switch = request.model != name
        if is_switch:
            # Deleting is not counted: it is done by the time somebody asks for the next model.
            model = None
            forget_pages(workload.files)
        asked_s = time.perf_counter()
        if is_switch:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            loaded = workload.variant(request.model).load()
            model, name = loaded.to(device), request.model
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            del loaded
        ready_s = time.perf_counter()
        answers.append(workload.answer(model, request, device))
        done_s = time.perf_counter()
        moved_bytes += size_of(model) if is_switch else 0
        served.append(
            Served(
                request,
                "disk" if is_switch else "vram",
                is_switch,
                asked_s - began_s,
                ready_s - began_s,
                done_s - began_s,
            )
        )
        tell(len(served))
    del model
    return Outcome(
        "reload",
        "delete and reload",
        tuple(served),
        tuple(answers),
        time.perf_counter() - began_s,
        {"disk to ram": moved_bytes, "ram to vram": moved_bytes},
    )
