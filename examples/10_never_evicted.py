"""An embedding model that stays in VRAM whatever else comes and goes."""

import tempfile
from pathlib import Path

import torch

from modelcache import ModelCache
from modelcache.demo.variants import embed, load_sentence_model
from modelcache.demo.weights import sentence_model


def main() -> None:
    # The real all-MiniLM-L6-v2 where its package is installed, else one of the same shape with random weights.
    source = sentence_model(Path(tempfile.mkdtemp()), synthetic=False, seed=0)
    with ModelCache(vram="128MiB", ram="512MiB", device="simulated", progress=False) as cache:
        cache.register("embed", lambda: load_sentence_model(str(source.folder)), pin="vram", reload=True)
        for number in range(3):
            cache.register(f"other{number}", lambda: torch.nn.Linear(2048, 2048), reload=True)
        with cache.get("embed") as model:
            vectors = embed(model, source.encode(["free my VRAM", "release GPU memory"]), torch.device("sim:0"))
        print("similarity:", round(float(vectors[0] @ vectors[1]), 3))
        for number in range(3):
            cache.get(f"other{number}")(torch.ones(1, 2048))
        print("embed is still", cache.info("embed").state)
        print(cache)


if __name__ == "__main__":
    main()
