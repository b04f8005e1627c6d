"""A small convolutional network for handwritten digits, trained by the demo on the images that scikit-learn carries."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

_TEST_EVERY = 5
_NUM_EPOCHS = 5
_BATCH = 64


class DigitsNet(nn.Module):
    """Images, float32 (n, 1, 8, 8) in 0..1, to logits, float32 (n, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 16, 1024),
            nn.ReLU(),
            nn.Linear(1024, 10),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of each image."""
        logits: torch.Tensor = self.layers(images)
        return logits


@dataclass(frozen=True, slots=True)
class Digits:
    """The images the network has not seen, and where its weights are.

    Attributes:
        path: Its trained weights, safetensors.
        images: float32 (n, 1, 8, 8).
        labels: int64 (n,).
    """

    path: Path
    images: torch.Tensor
    labels: torch.Tensor

    def load(self) -> DigitsNet:
        """The network from its file."""
        from safetensors.torch import load_file

        net = DigitsNet()
        net.load_state_dict(load_file(str(self.path)))
        return net.eval()


def train(folder: Path, seed: int) -> Digits:
    """Train the network on four fifths of the images, save it, and keep the rest for the requests."""
    from safetensors.torch import save_file
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target, dtype=torch.int64)
    is_test = torch.arange(len(labels)) % _TEST_EVERY == 0
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        net = DigitsNet()
        _fit(net, images[~is_test], labels[~is_test])
    path = folder / "digits-cnn.safetensors"
    save_file(net.state_dict(), str(path))
    return Digits(path, images[is_test], labels[is_test])


def _fit(net: DigitsNet, images: torch.Tensor, labels: torch.Tensor) -> None:
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    net.train()
    for _ in range(_NUM_EPOCHS):
        for batch in torch.split(torch.randperm(len(labels)), _BATCH):
            loss = nn.functional.cross_entropy(net(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    net.eval()
