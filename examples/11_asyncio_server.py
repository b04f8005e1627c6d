"""A plain asyncio server: one line in, one line out, several models behind one budget; the loop is never blocked."""

import asyncio

import torch

from modelcache import LeaseTimeoutError, ModelCache, UnknownModelError


def load(factor: float) -> torch.nn.Module:
    net = torch.nn.Linear(128, 128, bias=False)
    torch.nn.init.constant_(net.weight, factor)
    return net.requires_grad_(requires_grad=False)


async def answer(cache: ModelCache, line: str) -> str:
    """``NAME NUMBER`` -> a number, or what went wrong in words."""
    name, _, number = line.partition(" ")
    try:
        async with cache.aget(name, timeout=30) as model:  # waiters queue; the event loop stays free
            x = torch.full((1, 128), float(number), device="sim:0")
            return f"{float((await asyncio.to_thread(model, x)).mean()):.1f}"
    except (LeaseTimeoutError, UnknownModelError, ValueError) as error:
        return f"error: {error}"


async def main() -> None:
    async with ModelCache(device="simulated", vram="128KiB", ram="16MiB") as cache:
        for number, name in enumerate(("one", "two", "three"), 1):
            cache.register(name, lambda number=number: load(number / 128), reload=True)

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while line := (await reader.readline()).decode().strip():
                writer.write((await answer(cache, line) + "\n").encode())
                await writer.drain()
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]

        async def client(lines: list[str]) -> list[str]:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write("".join(f"{line}\n" for line in lines).encode())
            replies = [(await reader.readline()).decode().strip() for _ in lines]
            writer.close()
            await writer.wait_closed()
            return replies

        asked = [["one 1", "two 1", "three 1"], ["three 2", "one 2"], ["four 1", "two 3"]]
        for lines, replies in zip(asked, await asyncio.gather(*map(client, asked)), strict=True):
            print(*(f"{line} -> {reply}" for line, reply in zip(lines, replies, strict=True)), sep="\n")
        server.close()
        await server.wait_closed()


if __name__ == "__main__":
    asyncio.run(main())
