"""Compare two variants of a model without reloading either, and without reading noise as a result."""

import torch

from modelcache import ModelCache
from modelcache.ab import compare


def network(width: int) -> torch.nn.Module:
    """Two networks that were trained on the same thing would stand here."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(16, width), torch.nn.ReLU(), torch.nn.Linear(width, 1))
    return layers.requires_grad_(requires_grad=False)


def run(model: torch.nn.Module, item: list[float]) -> float:
    """One call: the raw model, on its device, and one item."""
    return model(torch.tensor([item], device="sim:0")).item()


def closeness(output: float, item: list[float]) -> float:
    """A score of one output; more is better."""
    return -abs(output - sum(item) / 16)


def main() -> None:
    with ModelCache(vram="1MiB", ram="64MiB", device="simulated") as cache:
        cache.register("wide", lambda: network(512), reload=True)
        cache.register("narrow", lambda: network(8), reload=True)
        items = [[float((i * j) % 7) for j in range(16)] for i in range(60)]
        result = compare(cache, ["wide", "narrow"], items, run=run, score=closeness, seed=0)
        print(result)
        result = compare(cache, ["wide", "wide"], items, run=run, score=closeness, seed=0)
        print(result.judgements[0].sentence)


if __name__ == "__main__":
    main()
