"""A model that accelerate split over CPU and disk: park it, and bring it back."""

import tempfile

import torch
from accelerate import dispatch_model

from modelcache import ModelCache


def load_split(folder: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(128, 128) for _ in range(4)])
    places = {"0": "cpu", "1": "cpu", "2": "disk", "3": "disk"}
    return dispatch_model(model, device_map=places, main_device="cpu", offload_dir=folder, force_hooks=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        split = load_split(folder)
        expected = split(torch.ones(1, 128))
        for move in (lambda: split.to("cpu"), split.cpu):
            try:
                move()
            except (RuntimeError, NotImplementedError) as error:
                print("accelerate:", str(error).splitlines()[0])
        with ModelCache(device="simulated", vram="16MiB", ram="64MiB") as cache, torch.no_grad():
            cache.register("split", lambda: split)  # accepted as it is, and made whole
            answer = cache.get("split")(torch.ones(1, 128)).cpu()
            print("the same answer:", torch.allclose(answer, expected, atol=1e-6))
            print(cache.park("split"))
            answer = cache.get("split")(torch.ones(1, 128)).cpu()
            print("and again after parking:", torch.allclose(answer, expected, atol=1e-6))


if __name__ == "__main__":
    main()
