"""Real torch models of a few kilobytes, whose bytes are known without asking anybody."""

from __future__ import annotations

import ctypes
import random
from functools import cache

import numpy as np
import torch

# torch imports it in the middle of the first call that a mode looks at, and keeps the frames of that call for good.
import torch._dynamo
from torch import nn

WIDTH = 16
#: Layers of 1 KiB by model; with a rest of 1 KiB, each is a segment of its own.
NUM_LAYERS = {"a": 2, "b": 1, "c": 2, "d": 3}
SEGMENT_BYTES = 1024
SIZES = {name: (layers + 1) * SEGMENT_BYTES for name, layers in NUM_LAYERS.items()}


@cache
def first_bytes(name: str) -> dict[str, bytes]:
    """What the loader of a model gives, by tensor. Layers hold small whole numbers, so that sums of them are exact."""
    draw = random.Random(name)
    layers = {
        f"layer{i}": np.array(draw.choices((-1, 0, 1), k=WIDTH * WIDTH), np.float32).tobytes()
        for i in range(NUM_LAYERS[name])
    }
    # Any bytes: among them are NaNs of every kind, and -0.0.
    return {**layers, "bent": draw.randbytes(8 * 4 * 4), "noise": draw.randbytes(255 * 2)}


def _tensor(data: bytes, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)


class Tiny(nn.Module):
    """Some layers, one of them under two names; a parameter that is not contiguous; a buffer of noise.

    Attributes:
        known: The bytes that each tensor must have.
        writes: Goes up when a write begins and when it ends.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.known = dict(first_bytes(name))
        self.before: dict[str, bytes] = {}
        self.writes = 0
        self.num_layers = NUM_LAYERS[name]
        for key in self._layers():
            layer = _tensor(self.known[key], torch.float32, WIDTH, WIDTH)
            self.register_parameter(key, nn.Parameter(layer, requires_grad=False))
        self.tied = self.layer0
        self.bent = nn.Parameter(_tensor(self.known["bent"], torch.float32, 8, 4).t(), requires_grad=False)
        self.noise: torch.Tensor
        self.register_buffer("noise", _tensor(self.known["noise"], torch.bfloat16, 255))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for key in self._layers():
            x = x @ getattr(self, key)
        return x

    def _layers(self) -> tuple[str, ...]:
        return tuple(f"layer{i}" for i in range(self.num_layers))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Each by its first name."""
        return {key: getattr(self, key) for key in (*self._layers(), "bent", "noise")}


def expected_of(known: dict[str, bytes]) -> bytes:
    """What a call on ones gives for these bytes."""
    x = np.ones((1, WIDTH), np.float32)
    for name, data in known.items():
        if name.startswith("layer"):
            x = x @ np.frombuffer(data, np.float32).reshape(WIDTH, WIDTH)
    return x.tobytes()


def bytes_of(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor without gaps, on any device, past every operator: the simulated device is plain memory."""
    return ctypes.string_at(tensor.data_ptr(), tensor.numel() * tensor.itemsize)


def put(tensor: torch.Tensor, data: bytes) -> None:
    """Write to a tensor in the way that nothing but its bytes shows."""
    ctypes.memmove(tensor.data_ptr(), data, len(data))
