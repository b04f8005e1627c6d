"""Has this copy been written to since its block was filled?

A fingerprint is a 64-bit number of some bytes and their order, computed with integer operations where the bytes are, so
a NaN's payload counts and nothing crosses a link. It is the multilinear family over 32-bit words with fixed random
64-bit weights (Lemire and Kaser, "Strongly universal string hashing is fast", 2014), a row of words at a time, the rows
joined by a mixer that is not linear. It finds every single changed word and misses a swap or a random change with a
chance of about 2**-32 or less; it is no defence against somebody who looks for a collision.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import numpy as np
import torch

Words = np.ndarray[Any, np.dtype[Any]]

_ROW_WORDS = 1 << 16
_ROWS_AT_ONCE = 16
# Widened, a piece stays in the cache of one core. By numpy: torch gives work of this size to threads that wait for each
# other, very long where others work.
_PIECE_WORDS = 1 << 15
CHUNK_BYTES = _ROWS_AT_ONCE * _ROW_WORDS * 4
"""How much is looked at in one go; `fetch` is asked for no more."""
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_own = threading.local()
TEMPORARY_BYTES = (_ROWS_AT_ONCE + 1) * _ROW_WORDS * 8
"""What `fingerprint` may allocate where the bytes are, at most."""


def fingerprint(memory: torch.Tensor, fetch: Callable[[int, int], torch.Tensor] | None = None) -> int:
    """The fingerprint of a flat uint8 tensor, on any device.

    Args:
        memory: The bytes.
        fetch: Gives bytes ``[start, stop)`` of `memory` in RAM, valid until the next call: for a device that has no
            room to compute.

    Raises:
        torch.OutOfMemoryError: The device has no room for `TEMPORARY_BYTES`; never with `fetch`.
    """
    size = memory.numel()
    with torch.inference_mode(False), torch.no_grad():
        sums: list[torch.Tensor] = []
        weights = _weights()[: max(1, size // 4)].to(memory.device if fetch is None else "cpu")
        for start in range(0, size, CHUNK_BYTES):
            stop = min(start + CHUNK_BYTES, size)
            chunk = memory[start:stop] if fetch is None else fetch(start, stop)
            # A processor works in its cache; elsewhere each step costs a launch. The number is the same.
            sums += _sums_in_cache(chunk, weights) if chunk.device.type == "cpu" else _row_sums(chunk, weights)
        # Device work is enqueued first and read back once: each read-back waits for the device.
        return joined(size, torch.cat(sums).tolist() if sums else ())


def sums_of(chunk: torch.Tensor) -> list[int]:
    """What `joined` wants to know of some bytes in RAM that are followed by others.

    Args:
        chunk: Flat uint8, `CHUNK_BYTES` of it unless they are the last ones.
    """
    with torch.inference_mode(False), torch.no_grad():
        sums = _sums_in_cache(chunk, _weights())
        return torch.cat(sums).tolist() if sums else []


def joined(size_bytes: int, sums: Iterable[int]) -> int:
    """The fingerprint of so many bytes, from the sums of all their chunks in order."""
    state = size_bytes
    for value in sums:
        state = _mixed((state * _GOLDEN + value) & _MASK)
    return state


def _row_sums(chunk: torch.Tensor, weights: torch.Tensor) -> list[torch.Tensor]:
    num_words = chunk.numel() // 4
    num_rows = num_words // _ROW_WORDS
    words = chunk[: num_words * 4].view(torch.int32)
    sums: list[torch.Tensor] = []
    if num_rows:
        sums.append((words[: num_rows * _ROW_WORDS].view(num_rows, _ROW_WORDS) * weights).sum(dim=1))
    if rest := num_words - num_rows * _ROW_WORDS:
        sums.append((words[num_rows * _ROW_WORDS :] * weights[:rest]).sum(dim=0, keepdim=True))
    if odd := chunk.numel() % 4:
        sums.append(chunk[-odd:].to(torch.int64))
    return sums


def _wide() -> Words:
    """A buffer of this thread, kept: the system would make one of this size anew each time, page by page."""
    found: Words | None = getattr(_own, "wide", None)
    if found is None:
        found = _own.wide = np.empty(_PIECE_WORDS, np.int64)
    return found


def _product(words: Words, weights: Words, wide: Words) -> int:
    """The inner product, to be taken modulo 2**64; other threads run meanwhile."""
    total = 0
    for start in range(0, words.size, _PIECE_WORDS):
        piece = words[start : start + _PIECE_WORDS]
        np.copyto(wide[: piece.size], piece)
        total += int(np.dot(wide[: piece.size], weights[start : start + piece.size]))
    return total


def _sums_in_cache(chunk: torch.Tensor, weights: torch.Tensor) -> list[torch.Tensor]:
    words, factors = chunk[: chunk.numel() // 4 * 4].view(torch.int32).numpy(), weights.numpy()
    wide = _wide()
    sums = [
        _product(words[start : start + _ROW_WORDS], factors, wide) & _MASK for start in range(0, words.size, _ROW_WORDS)
    ]
    found = [torch.from_numpy(np.array(sums, np.uint64).view(np.int64))] if sums else []
    if odd := chunk.numel() % 4:
        found.append(chunk[-odd:].to(torch.int64))
    return found


@cache
def _weights() -> torch.Tensor:
    """Random odd 64-bit weights, the same in every process; shape (_ROW_WORDS,), int64, on the CPU."""
    generator = torch.Generator(device="cpu")
    generator.manual_seed(0x6D6F64656C)
    halves = torch.randint(0, 1 << 32, (2, _ROW_WORDS), generator=generator, dtype=torch.int64, device="cpu")
    return (halves[0] << 32) ^ halves[1] | 1


def _mixed(value: int) -> int:
    """The finalizer of splitmix64: a bijection of 64 bits with no linear structure."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
