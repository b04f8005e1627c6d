"""Many tasks, two models, one event loop that is never blocked."""

import asyncio

import torch

from modelcache import LeaseTimeoutError, ModelCache


def load() -> torch.nn.Module:
    return torch.nn.Linear(128, 128).requires_grad_(requires_grad=False)


async def answer(cache: ModelCache, name: str, number: int) -> float:
    async with cache.aget(name, timeout=30) as model:  # the raw module, held for the block
        return float(model(torch.full((1, 128), float(number), device="sim:0")).sum())


async def main() -> None:
    async with ModelCache(device="simulated", vram="128KiB", ram="16MiB") as cache:
        for name in ("a", "b"):
            cache.register(name, load)
        answers = await asyncio.gather(*(answer(cache, "ab"[number % 2], number) for number in range(20)))
        print(len(answers), "answers")
        async with cache.aget("a"):
            try:
                await asyncio.create_task(answer_soon(cache))
            except LeaseTimeoutError as error:
                print("refused:", error)


async def answer_soon(cache: ModelCache) -> None:
    async with cache.aget("b", timeout=0.05):
        print("there was room for both")


if __name__ == "__main__":
    asyncio.run(main())
