"""Two models, room for one at a time: say get, and use what you are given."""

import torch

from modelcache import ModelCache


def load(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(*[torch.nn.Linear(256, 256) for _ in range(8)])


def main() -> None:
    # An accelerator in plain memory; on a machine with a GPU leave `device` out.
    with ModelCache(device="simulated", vram="3MiB", ram="64MiB") as cache:
        cache.register("first", lambda: load(1))
        cache.register("second", lambda: load(2))
        with torch.no_grad():
            for _ in range(3):
                for name in ("first", "second"):
                    cache.get(name)(torch.ones(1, 256))
        print(cache)
        print(cache.explain("first"))


if __name__ == "__main__":
    main()
