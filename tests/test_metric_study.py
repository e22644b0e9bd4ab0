"""The example of docs/reading.md: a sliced Wasserstein distance, and damage of known strength."""

import pytest
import torch

from analysis import metric_study


def test_a_sliced_distance_is_zero_for_the_same_and_counts_a_shift_as_its_square():
    x = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    assert metric_study.sliced(x, x[torch.randperm(200)]) == pytest.approx(0, abs=1e-9)
    shift = torch.zeros(16)
    shift[3] = 2.0
    assert metric_study.sliced(x, x + shift) == pytest.approx(4.0, rel=0.15)  # 1,000 directions
    assert metric_study.sliced(x, 3 * x) == pytest.approx(4 * float(x.square().sum(1).mean()), rel=0.1)


def test_damage_is_what_it_says():
    images = torch.full((4, 1, 8, 8), 128, dtype=torch.uint8)
    assert torch.equal(metric_study.damaged(images, "blur", 0.5), images)  # nothing to blur
    noisy = metric_study.damaged(images, "noise", 0.1).float()
    assert noisy.std() == pytest.approx(25.5, rel=0.15)
    labels = torch.tensor([1, 1, 1, 1, 2, 3, 4, 5])
    kept = metric_study.dropped(torch.arange(8), labels, 0.5)
    assert len(kept) == 8 and int((labels[kept] == 1).sum()) == 2
