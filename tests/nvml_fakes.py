"""NVML in memory: the answers of real cards, with the error classes of the real bindings."""

from __future__ import annotations

from types import SimpleNamespace

import pynvml

GIB = 1024**3


def error(name):
    return pynvml.NVMLError(getattr(pynvml, f"NVML_ERROR_{name}"))


class Card:
    """One card, or one slice of a card."""

    def __init__(self, name="NVIDIA GeForce RTX 4090", uuid="GPU-aaaa-1", total=24 * GIB, free=20 * GIB, slices=None):
        self.name, self.uuid, self.total, self.free = name, uuid, total, free
        self.slices = slices  # None: cannot be cut. A list: cut, an empty slot is None.
        self.memory_error = None
        self.users = []
        self.link = (4, 16)  # PCIe generation and lanes; None: not told
        self.instance = (0, 0)


class FakeNvml:
    """Answers as NVML does, with the error classes of the real bindings."""

    NVMLError = pynvml.NVMLError

    def __init__(self, *cards):
        self.cards = list(cards)
        self.init_error = None
        self.num_inits = 0
        self.num_open = 0
        self.num_asked = 0

    def nvmlInit(self):
        self.num_inits += 1
        if self.init_error:
            raise error(self.init_error)
        self.num_open += 1

    def nvmlShutdown(self):
        if self.init_error:
            raise error("UNINITIALIZED")
        self.num_open -= 1

    def nvmlSystemGetDriverVersion(self):
        return "580.126.09"

    def nvmlSystemGetCudaDriverVersion(self):
        return 13020

    def nvmlDeviceGetMaxPcieLinkGeneration(self, handle):
        return self._link(handle)[0]

    def nvmlDeviceGetMaxPcieLinkWidth(self, handle):
        return self._link(handle)[1]

    def _link(self, handle):
        if handle.link is None:
            raise error("NOT_SUPPORTED")
        return handle.link

    def nvmlDeviceGetCount(self):
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index):
        return self.cards[index]

    def nvmlDeviceGetHandleByUUID(self, uuid):
        for card in self.cards:
            for handle in (card, *(card.slices or ())):
                if handle is not None and handle.uuid == uuid:
                    return handle
        raise error("NOT_FOUND")

    def nvmlDeviceGetName(self, handle):
        return handle.name

    def nvmlDeviceGetUUID(self, handle):
        return handle.uuid

    def nvmlDeviceGetMemoryInfo(self, handle):
        self.num_asked += 1
        if handle.memory_error:
            raise error(handle.memory_error)
        return SimpleNamespace(total=handle.total, free=handle.free, used=handle.total - handle.free)

    def nvmlDeviceGetMigMode(self, handle):
        if handle.uuid.startswith("MIG-"):
            raise error("INVALID_ARGUMENT")
        if handle.slices is None:
            raise error("NOT_SUPPORTED")
        return (1, 1)

    def nvmlDeviceGetMaxMigDeviceCount(self, handle):
        if handle.slices is None:
            raise error("NOT_SUPPORTED")
        return len(handle.slices)

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle, slot):
        if handle.slices[slot] is None:
            raise error("NOT_FOUND")
        return handle.slices[slot]

    def nvmlDeviceGetGpuInstanceId(self, handle):
        return handle.instance[0]

    def nvmlDeviceGetComputeInstanceId(self, handle):
        return handle.instance[1]

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in handle.users]

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle):
        return []


def sliced_card():
    small = Card("NVIDIA A100-SXM4-80GB MIG 1g.10gb", "MIG-s1", 9 * GIB, 8 * GIB)
    large = Card("NVIDIA A100-SXM4-80GB MIG 3g.40gb", "MIG-s2", 39 * GIB, 30 * GIB)
    small.instance, large.instance = (7, 0), (2, 0)
    return Card("NVIDIA A100-SXM4-80GB", "GPU-parent", 80 * GIB, 70 * GIB, slices=[None, small, large, None])
