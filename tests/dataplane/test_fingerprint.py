"""A fingerprint sees every change and every move of bytes, and is the same wherever the bytes are."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modelcache.dataplane.device.simulated import SimulatedDevice
from modelcache.dataplane.fingerprint import CHUNK_BYTES, TEMPORARY_BYTES, fingerprint


def flat(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def random(size, seed=0):
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@given(st.binary(max_size=70), st.binary(max_size=70))
def test_different_bytes_have_different_fingerprints(a, b):
    left, right = (torch.tensor(list(each), dtype=torch.uint8) for each in (a, b))
    assert (fingerprint(left) == fingerprint(right)) == (a == b)


@pytest.mark.parametrize("size", [1, 4096, (1 << 18) + 3, CHUNK_BYTES + (1 << 18) + 512, 2 * CHUNK_BYTES])
def test_each_changed_bit_is_seen_wherever_it_is(size):
    memory = random(size)
    before = fingerprint(memory)
    for at in sorted({0, size // 2, size - 1, max(0, size - 5)}):
        for bit in (0, 7):
            memory[at] ^= 1 << bit
            assert fingerprint(memory) != before
            memory[at] ^= 1 << bit
    assert fingerprint(memory) == before


@pytest.mark.parametrize("row", [64, 4096, 1 << 18, CHUNK_BYTES])
def test_swapped_rows_are_seen(row):
    memory = random(2 * CHUNK_BYTES)
    rows = memory.view(-1, row)
    before = fingerprint(memory)
    rows[[0, 1]] = rows[[1, 0]]
    assert fingerprint(memory) != before


def test_rows_that_differ_in_a_sign_only_are_seen_when_swapped():
    values = torch.ones(2, 64)
    values[1, 63] = -1.0
    assert fingerprint(flat(values)) != fingerprint(flat(values.flip(0)))


def test_a_uniform_shift_and_a_nan_payload_are_seen():
    values = torch.randn(5000)
    before = fingerprint(flat(values))
    assert fingerprint(flat(values + 1e-3)) != before
    nan = torch.full((4,), 0x7FC00000, dtype=torch.int32)
    other = nan.clone()
    other[2] = 0x7FC00001
    assert fingerprint(flat(nan)) != fingerprint(flat(other))


def test_zeros_of_different_lengths_differ():
    assert len({fingerprint(torch.zeros(size, dtype=torch.uint8)) for size in (0, 1, 2, 4, 512, 1024)}) == 6


def test_the_device_gives_the_same_number_within_its_bound_on_memory():
    device = SimulatedDevice(64 << 20, link_bytes_per_s=None)
    try:
        memory = random(3 * CHUNK_BYTES + 512)
        there = device.allocate(memory.numel())
        device.copy_in(there, memory).wait()
        device.memory.reset_peak() if hasattr(device.memory, "reset_peak") else None
        assert fingerprint(there) == fingerprint(memory)
        buffer = torch.empty(CHUNK_BYTES, dtype=torch.uint8)

        def fetch(start, stop):
            assert stop - start <= CHUNK_BYTES
            device.copy_out(buffer[: stop - start], there[start:stop]).wait()
            return buffer[: stop - start]

        assert fingerprint(there, fetch) == fingerprint(memory)
        del there
        tight = SimulatedDevice(memory.numel() + TEMPORARY_BYTES + 4096, link_bytes_per_s=None)
        there = tight.allocate(memory.numel())
        tight.copy_in(there, memory).wait()
        assert fingerprint(there) == fingerprint(memory)
        tight.close()
    finally:
        device.close()


def test_it_does_not_disturb_the_random_state_or_leave_inference_tensors():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with torch.inference_mode():
        first = fingerprint(random(4096))
    assert fingerprint(random(4096)) == first
    assert torch.equal(torch.get_rng_state(), state)
