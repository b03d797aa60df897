"""Augmentation of whole batches on the device: crop, flip, normalisation, mixup."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import MislasError


class Images:
    """Images resident on a device as uint8; a batch is gathered, cropped, flipped and normalised in one go.

    Args:
        images: uint8, ``(N, H, W, 3)``.
        mean, std: per-channel statistics of pixel values in 0..1.
        padding: width of the black border from which random crops are taken, in pixels.
        device: where images live.

    Raises:
        MislasError: another shape or dtype.
    """

    def __init__(self, images: Tensor, mean, std, *, padding: int, device: torch.device | str = "cpu"):
        if (
            images.dtype != torch.uint8
            or images.ndim != 4
            or images.shape[1] != images.shape[2]
            or images.shape[3] != 3
        ):
            raise MislasError(f"images must be uint8 (N, H, H, 3), got {images.dtype} {tuple(images.shape)}")
        self.size = images.shape[1]
        self.padding = padding
        self.padded = F.pad(images, (0, 0, padding, padding, padding, padding)).to(device)
        scale = 1 / (255 * torch.tensor(std, dtype=torch.float32))
        self.scale = scale.to(device)
        self.shift = (-255 * torch.tensor(mean, dtype=torch.float32) * scale).to(device)
        self.pixel = torch.arange(self.size, device=device)

    def __len__(self) -> int:
        return len(self.padded)

    def batch(self, index: Tensor, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
        """Gather a batch.

        Args:
            index: which images, ``(B,)``.
            top, left: corner of each crop in the padded image, ``(B,)`` in ``0 .. 2 * padding``.
            flip: which crops to mirror left to right, bool ``(B,)``.

        Returns:
            float32 ``(B, 3, H, W)`` in channels-last memory.
        """
        rows = top[:, None] + self.pixel
        columns = left[:, None] + torch.where(flip[:, None], self.pixel.flip(0), self.pixel)
        crops = self.padded[index[:, None, None], rows[:, :, None], columns[:, None, :]]
        return (crops * self.scale + self.shift).permute(0, 3, 1, 2)

    def plain(self, start: int, stop: int) -> Tensor:
        """Images ``start .. stop - 1`` as they are, normalised: float32 ``(B, 3, H, W)``."""
        p = self.padding
        crops = self.padded[start:stop, p : p + self.size, p : p + self.size]
        return (crops * self.scale + self.shift).permute(0, 3, 1, 2)


def mixup(images: Tensor, lam: float, partner: Tensor) -> Tensor:
    """``lam * x_i + (1 - lam) * x_partner(i)`` (Zhang et al., 2018); the loss is mixed with the same weights."""
    return torch.lerp(images[partner], images, lam)
