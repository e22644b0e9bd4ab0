"""The `digits` feature extractor: a small classifier of 8x8 digits, trained in ten seconds, weights committed.

    python -m analysis.digits_classifier          # the committed weights' accuracy on the held-out digits
    python -m analysis.digits_classifier --train  # train again and replace the weights

A Fréchet distance needs features with a covariance of full rank, while a classifier trained by cross-entropy alone
gathers its features on as many directions as there are classes. So the features are batch-normalised (unit variance
each) and their correlations are penalised, as in VICReg (Bardes et al. 2022, equation 3): the condition number of the
features' covariance falls from 4,460 to 124, at the same accuracy.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liquiddiff.seeding import generator, initialise

WEIGHTS = Path(__file__).with_suffix(".safetensors")
DIM = 64  # features
SEED, EPOCHS, BATCH, LR = 0, 40, 64, 3e-3
DECORRELATE = 1.0  # weight of the covariance penalty


class DigitsNet(nn.Module):
    """(N, 1, 8, 8) in [-1, 1] -> features (N, 64), normalised over the augmented training digits."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1),  # (N, 24, 8, 8)
            nn.GELU(),
            nn.Conv2d(24, 48, 3, padding=1, stride=2),  # (N, 48, 4, 4)
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(48 * 4 * 4, DIM),
            nn.BatchNorm1d(DIM, affine=False),
        )
        self.head = nn.Sequential(nn.GELU(), nn.Linear(DIM, 10))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """The features; `head(features)` gives the ten logits."""
        return self.encoder(x_NCHW)


def load_net(path: str | Path = WEIGHTS) -> DigitsNet:
    """The trained network, in eval mode."""
    from safetensors.torch import load_file

    net = DigitsNet()
    net.load_state_dict(load_file(path))
    return net.eval()


def split() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(train images, train labels, held-out images, held-out labels): uint8 (N, 1, 8, 8), 80 : 20, stratified."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy(np.round(digits.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(digits.target)
    kept, held = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=digits.target, random_state=SEED)
    return images[kept], labels[kept], images[held], labels[held]


@torch.no_grad()
def accuracy(net: DigitsNet, images: Tensor, labels: Tensor) -> float:
    """Share of the uint8 images that `net` classifies rightly."""
    return (net.head(net(images / 127.5 - 1)).argmax(1) == labels).float().mean().item()


def _augment(x: Tensor, rng: torch.Generator) -> Tensor:
    """Turns (0.2 rad), zooms (10 %), shifts (0.8 pixel) and noise (up to sd 0.05)."""
    n = len(x)
    turn, zoom = ((torch.rand(2, n, generator=rng) - 0.5) * torch.tensor([[0.4], [0.2]])).unbind()
    shift = (torch.rand(2, n, generator=rng) - 0.5) * 0.4  # the grid runs from -1 to 1
    cos, sin = turn.cos() * (1 + zoom), turn.sin() * (1 + zoom)
    affine = torch.stack([cos, -sin, shift[0], sin, cos, shift[1]], dim=1).view(n, 2, 3)
    grid = F.affine_grid(affine, list(x.shape), align_corners=False)
    moved = F.grid_sample(x + 1, grid, align_corners=False) - 1  # +1: what moves in is background
    return moved + 0.05 * torch.rand(n, 1, 1, 1, generator=rng) * torch.randn(x.shape, generator=rng)


def train() -> DigitsNet:
    """The network, trained from SEED on one thread."""
    images, labels, _, _ = split()
    x, rng, net = images / 127.5 - 1, generator(SEED, "digits classifier"), DigitsNet()
    initialise(net, SEED)
    steps_per_epoch = len(x) // BATCH
    optimizer = torch.optim.AdamW(net.parameters(), LR, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=EPOCHS * steps_per_epoch)
    for _ in range(EPOCHS):
        order = torch.randperm(len(x), generator=rng)
        for batch in order.split(BATCH)[:steps_per_epoch]:
            z_ND = net(_augment(x[batch], rng))
            covariance = z_ND.T @ z_ND / len(z_ND)
            correlation = (covariance - covariance.diag().diag()).square().sum() / DIM
            loss = F.cross_entropy(net.head(z_ND), labels[batch], label_smoothing=0.1) + DECORRELATE * correlation
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def main() -> None:
    """Print the held-out accuracy of the committed weights, or of new ones."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--train", action="store_true", help=f"train again and write {WEIGHTS.name}")
    if parser.parse_args().train:
        from safetensors.torch import save_file

        torch.set_num_threads(1)  # the order of sums is part of the seed
        save_file(train().state_dict(), WEIGHTS)
    _, _, images, labels = split()
    share = accuracy(load_net(), images, labels)
    kib = WEIGHTS.stat().st_size / 1024
    print(f"held-out accuracy {share:.2%} on {len(labels)} digits, {WEIGHTS.name} {kib:.0f} KiB")


if __name__ == "__main__":
    main()
