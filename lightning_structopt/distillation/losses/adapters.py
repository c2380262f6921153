"""Small trained layers that bring a student's features to the width of a teacher's, and what they act on."""

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from lightning_structopt._precision import widened


def channel_dim(features: Tensor) -> int:
    """Return which dimension holds channels: 1 of maps (N, C, H, W), the last of (N, C) and of tokens (N, L, C)."""
    return 1 if features.ndim > 3 else -1


def make_adapter(inputs: int, outputs: int, like: Tensor, seed: int) -> nn.Module:
    """Return a trainable linear map of channels, the same at every position.

    Args:
        inputs: Channels that come in.
        outputs: Channels that go out.
        like: Features that it is for: decides on layer and device.
        seed: Of its initial weights; the global random state is left alone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if like.ndim in {4, 5}:
            convolution = nn.Conv2d if like.ndim == 4 else nn.Conv3d
            return convolution(inputs, outputs, kernel_size=1, device="cpu").to(like.device)
        return nn.Linear(inputs, outputs, device="cpu").to(like.device)


def adapt_features(adapter: nn.Module, features: Tensor) -> Tensor:
    """Return ``features`` after ``adapter``, in float32 or better; autocast may choose what it computes in."""
    weight = next(adapter.parameters(), features)  # none in an `Identity`
    adapted: Tensor = adapter(features.to(weight.dtype))
    return widened(adapted)


def resize_like(features: Tensor, like: Tensor) -> Tensor:
    """Return maps (N, C, H, W) resampled to the height and width of ``like``; anything else as it is."""
    if features.ndim != 4 or like.ndim != 4 or features.shape[2:] == like.shape[2:]:
        return features
    # Antialiasing makes it an average where it shrinks.
    return interpolate(features, size=like.shape[2:], mode="bilinear", antialias=True)
