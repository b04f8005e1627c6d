"""A vision pair with the truth known: a small network for handwritten digits against itself with rounded weights."""

import tempfile
from pathlib import Path

import torch

from modelcache import ModelCache
from modelcache.ab import Metric, compare
from modelcache.demo.digits import DigitsNet, train


def blurred(net: DigitsNet) -> DigitsNet:
    """The candidate: the same network with weights rounded to three levels."""
    for parameter in net.parameters():
        step = parameter.data.abs().max()
        parameter.data = (parameter.data / step).round() * step
    return net


def main() -> None:
    digits = train(Path(tempfile.mkdtemp()), seed=0)
    items = [{"place": i, "label": int(digits.labels[i])} for i in range(120)]

    def run(model: DigitsNet, item: dict[str, int]) -> torch.Tensor:
        with torch.inference_mode():
            return model(digits.images[item["place"] : item["place"] + 1].to("sim:0")).cpu()[0].softmax(0)

    right = Metric("correct", lambda output, item: float(output.argmax() == item["label"]))
    sure = Metric("probability", lambda output, item: float(output[item["label"]]))
    with ModelCache(vram="4MiB", ram="64MiB", device="simulated") as cache:
        cache.register("trained", digits.load, reload=True)
        cache.register("rounded", lambda: blurred(digits.load()), reload=True)
        result = compare(cache, ["trained", "rounded"], items, run=run, score=[right, sure], seed=0)
    print(result)


if __name__ == "__main__":
    main()
