"""Test your own app without a GPU: a device with little memory, and one that breaks when you say so."""

import torch

from modelcache import DeviceMemoryError, ModelCache
from modelcache.testing import SimulatedDevice


def load() -> torch.nn.Module:
    return torch.nn.Linear(256, 256).requires_grad_(requires_grad=False)


def main() -> None:
    device = SimulatedDevice(capacity_bytes=1 << 20)
    with ModelCache(device=device, vram="800KiB", ram="16MiB") as cache:
        cache.register("net", load)
        hog = torch.zeros(150_000, device="sim:0")  # somebody else takes memory that the budget counts on
        more = torch.zeros(100_000, device="sim:0")
        try:
            cache.get("net")
        except DeviceMemoryError as error:
            print("the device refused:", error)
        del hog, more
        print(cache.get("net")(torch.ones(1, 256)).shape, "once the memory is back")


if __name__ == "__main__":
    main()
