"""Give each user one of two models, keep a log, and ask the log which one does better."""

import tempfile
from pathlib import Path

import torch

from modelcache import ModelCache
from modelcache.ab import Experiment, analyse


def load(bias: float) -> torch.nn.Module:
    net = torch.nn.Linear(16, 1)
    torch.nn.init.constant_(net.bias, bias)
    return net.requires_grad_(requires_grad=False)


def main() -> None:
    log = Path(tempfile.mkdtemp()) / "exposures.jsonl"
    experiment = Experiment("encoder", {"old": 0.5, "new": 0.5}, share=0.8, overrides={"alice": "new"}, log=log)
    with ModelCache(vram="1MiB", ram="64MiB", device="simulated") as cache:
        cache.register("old", lambda: load(0.0), reload=True)
        cache.register("new", lambda: load(0.5), reload=True)
        for number in range(300):
            user = f"user-{number}"
            with experiment.serve(cache, user) as serving:  # the same arm for this user, today and tomorrow
                answer = serving.model(torch.full((1, 16), number % 5 / 10, device="sim:0")).item()
                serving.record(answer=answer)
        print("alice gets", experiment.assign("alice").arm)
    (found,) = analyse(log)
    print(*(f"{arm.arm}: {arm.num_units} users" for arm in found.arms), sep="\n")
    print("the split is as planned" if not found.alarm else found.alarm)
    for one in found.judgements:
        print(one.sentence)


if __name__ == "__main__":
    main()
