"""A model that accelerate had to split over the device, RAM and disk: park it, use the device, and bring it back.

Runs without a GPU: the device is a simulated one of 6 MiB. With a card, write "cuda:0" and leave `SimulatedDevice` out.
"""

import tempfile
from contextlib import closing
from pathlib import Path

import torch

import modelcache
from modelcache import ModelCache, format_bytes
from modelcache.testing import SimulatedDevice

PLACES = {"0": "sim:0", "1": "sim:0", "2": "sim:0", "3": "cpu", "4": "cpu", "5": "disk", "6": "disk", "7": "disk"}
ONES = torch.ones(1, 512)


def load() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(*[torch.nn.Linear(512, 512) for _ in PLACES])  # 8 MiB


def stuck(model: torch.nn.Module) -> None:
    try:
        model.to("cpu")
    except RuntimeError as error:
        print("accelerate:", error)


def use_for_another(device: SimulatedDevice) -> None:
    print("VRAM in use while it is parked:", format_bytes(device.allocated_bytes()))
    another = torch.nn.Linear(512, 2560).to("sim:0")  # 5 MiB, which had no room beside it
    another(ONES.to("sim:0"))
    print("VRAM in use by another model:  ", format_bytes(device.allocated_bytes()))


def alone(folder: Path, device: SimulatedDevice) -> None:
    model, answer = load(), load()(ONES)
    # accelerate's own function; it writes down what accelerate forgets, and gives this one model three methods.
    model = modelcache.dispatch_model(model, PLACES, offload_dir=folder, allow_materialize=True)
    stuck(model)
    print(modelcache.plan_materialize(model))  # nothing is read yet

    print("\n-- the function")
    modelcache.materialize_meta_tensors(model, target_device="cpu")
    model.to("cpu")  # works, and so do .cuda() and .half()
    use_for_another(device)
    modelcache.restore_dispatch(model)
    print("VRAM in use when it is back:   ", format_bytes(device.allocated_bytes()))
    print("the same answer:", torch.allclose(model(ONES).cpu(), answer, atol=1e-6))

    print("\n-- a method")
    model.materialize_all(device="cpu")  # or model.materialize()
    use_for_another(device)
    modelcache.restore_dispatch(model)
    stuck(model)

    print("\n-- a block")
    with model.materialized():
        model.cpu()
        use_for_another(device)
    print("the same answer:", torch.allclose(model(ONES).cpu(), answer, atol=1e-6))


def in_a_cache(folder: Path) -> None:
    answer = load()(ONES)
    with ModelCache(device="simulated", vram="5MiB", ram="64MiB") as cache:  # too small for all of it
        cache.register("split", lambda: modelcache.dispatch_model(load(), PLACES, offload_dir=folder))
        cache.register("other", lambda: torch.nn.Linear(512, 2048))
        for name in ("split", "other", "split"):
            output = cache.get(name)(ONES).cpu()
            print(cache)
            if name == "split":
                print("the same answer:", torch.allclose(output, answer, atol=1e-6))
        print(cache.explain("split"))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        with closing(SimulatedDevice(capacity_bytes=6 << 20)) as device:
            alone(Path(folder, "alone"), device)
        print("\n-- a cache")
        in_a_cache(Path(folder, "cached"))


if __name__ == "__main__":
    main()
