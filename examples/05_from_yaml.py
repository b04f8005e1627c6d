"""A cache from a file: checked as a whole, every problem with its place."""

import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from modelcache import ConfigError, ModelCache

GOOD = """
device: simulated
simulated: {capacity: 64MiB}
budgets: {vram: 1MiB, ram: 16MiB}
preload: [net]
models:
  net: {loader: safetensors, model: "torch.nn:Identity", weights: net.safetensors}
"""
BAD = """
budgets: {vram: 16 Gb}
polcy: {idle: 3:30}
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "models.yaml"
        path.write_text(BAD)
        try:
            ModelCache.from_yaml(path)
        except ConfigError as error:
            print(str(error).replace(folder, "."))
        save_file({"unused": torch.ones(1)}, path.with_name("net.safetensors"))
        path.write_text(GOOD)
        with ModelCache.from_yaml(path) as cache:
            print(cache.get("net")(torch.ones(2)).tolist())


if __name__ == "__main__":
    main()
