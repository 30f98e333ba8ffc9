"""scikit-learn's digits: real images that need no download. Split with every digit in both parts alike."""

from __future__ import annotations

from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor


class Digits(NamedTuple):
    """Images `[n, 1, 8, 8]` from 0 to 1 and labels `[n]`, for training and for the test."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


def digits(seed: int = 0, test: int = 360) -> Digits:
    """`seed` draws which `test` of the 1797 images are kept from training."""
    pixels, labels = load_digits(return_X_y=True)
    x, test_x, y, test_y = train_test_split(
        pixels, labels, test_size=test, random_state=seed, stratify=labels
    )
    images = (torch.tensor(one, dtype=torch.float32).view(-1, 1, 8, 8) / 16 for one in (x, test_x))
    x, test_x = images
    return Digits(x, torch.tensor(y), test_x, torch.tensor(test_y))
