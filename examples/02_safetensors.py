"""A class of your own and its weights in a safetensors file: one copy in RAM, and evicted without being written."""

import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from modelcache import ModelCache


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x).relu()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, ModelCache(ram="256MiB", device="host_only") as cache:
        weights = Path(folder) / "net.safetensors"
        save_file(Net().state_dict(), weights)
        cache.register("net", model=Net, weights=weights)
        with torch.no_grad():
            before = cache.get("net")(torch.ones(1, 64))
            print(cache.evict("net"))  # its bytes are in the file: dropped, and read again when it is asked for
            after = cache.get("net")(torch.ones(1, 64))
        print("same answer after eviction:", torch.equal(before, after))


if __name__ == "__main__":
    main()
