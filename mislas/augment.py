"""Augmentation of whole batches on the device: crop, flip, normalisation, mixup and its kin."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import distributed
from .errors import MislasError

if TYPE_CHECKING:
    from .config import Stage1


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

    def plain(self, batch_size: int = 500) -> Iterator[Tensor]:
        """All images in order as they are, normalised: batches of float32 ``(B, 3, H, W)``.

        Where several processes work together it is this one's piece of each batch.
        """
        p = self.padding
        for padded in self.padded.split(batch_size):
            padded = padded[distributed.piece(len(padded))]
            crops = padded[:, p : p + self.size, p : p + self.size]
            yield (crops * self.scale + self.shift).permute(0, 3, 1, 2)


def mixup(images: Tensor, lam: float | Tensor, partner: Tensor) -> Tensor:
    """``lam * x_i + (1 - lam) * x_partner(i)`` (Zhang et al., 2018); the loss is mixed with the same weights.

    Args:
        images: ``(B, C, H, W)``.
        lam: weight of the image itself, 0..1.
        partner: whom each image is mixed with, ``(B,)``.
    """
    return torch.lerp(images[partner], images, lam)


def cutmix(images: Tensor, lam: float, partner: Tensor, centre: tuple[float, float]) -> tuple[Tensor, float]:
    """Paste a box of the partner, a share ``1 - lam`` of the image, into each image (Yun et al., 2019, equation 2).

    Args:
        images: ``(B, C, H, W)``.
        lam: share of the image that stays, 0..1, before the box is cut at the image's edge.
        partner: whose box each image gets, ``(B,)``.
        centre: the box's centre, as shares of height and width in 0..1; the same for the whole batch.

    Returns:
        The images, and the share that really stayed: the weight of the image's own label.
    """
    height, width = images.shape[2:]
    side = (1 - lam) ** 0.5
    rows, columns = (
        slice(max(round((c - side / 2) * size), 0), min(round((c + side / 2) * size), size))
        for c, size in zip(centre, (height, width), strict=True)
    )
    mixed = images.clone(memory_format=torch.preserve_format)
    mixed[:, :, rows, columns] = images[:, :, rows, columns][partner]
    return mixed, 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)


def remix_weight(lam: float, counts: Tensor, partner_counts: Tensor, kappa: float, tau: float) -> Tensor:
    """Weight of an image's own label when images are mixed with ``lam`` (Chou et al., 2020).

    0 where the image's class is at least kappa times as large as its partner's and ``lam < tau``; 1 where it is at
    least kappa times smaller and ``1 - lam < tau``; else lam. The minority class gets the whole label.

    Args:
        lam: weight of the image itself, 0..1.
        counts, partner_counts: training images of the class of each image and of its partner, ``(B,)``.
        kappa: > 0 (the paper's: 3); infinite makes it mixup.
        tau: > 0 (the paper's: 0.5).

    Returns:
        float32 ``(B,)``.
    """
    weight, ratio = torch.full(counts.shape, lam, device=counts.device), counts / partner_counts
    if lam < tau:
        weight = torch.where(ratio >= kappa, 0.0, weight)
    if 1 - lam < tau:
        weight = torch.where(ratio <= 1 / kappa, 1.0, weight)
    return weight


@dataclass(frozen=True)
class Pairs:
    """What there is to mix a batch by.

    Attributes:
        lam: weight of an image itself, 0..1, from Beta(alpha, alpha): one for the batch.
        partner: whom each image is mixed with, ``(B,)``: places in the batch, in random order.
        sizes: training images of each image's class, float32 ``(B,)``.
        stage: the settings of the stage that mixes.
        rng: for what else is drawn; the same for a seed on every device.
    """

    lam: float
    partner: Tensor
    sizes: Tensor
    stage: Stage1
    rng: np.random.Generator


#: From images ``(B, 3, H, W)`` and their pairs to the mixed images, whom each was mixed with, ``(B,)``, and the weight
#: of its own label, 0..1: one number, or one for each image, ``(B,)``.
Mix = Callable[[Tensor, Pairs], tuple[Tensor, Tensor, float | Tensor]]


def _cutmix(images: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor, float]:
    mixed, kept = cutmix(images, pairs.lam, pairs.partner, tuple(pairs.rng.random(2)))
    return mixed, pairs.partner, kept


def _remix(images: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
    kappa, tau = pairs.stage.remix_kappa, pairs.stage.remix_tau
    weight = remix_weight(pairs.lam, pairs.sizes, pairs.sizes[pairs.partner], kappa, tau)
    return mixup(images, pairs.lam, pairs.partner), pairs.partner, weight


#: Ways to mix, other than mixup itself, by name.
MIXES: dict[str, Mix] = {"remix": _remix, "cutmix": _cutmix}


def mix(name: str, images: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor, float | Tensor]:
    """Mix a batch by a way of :data:`MIXES`: images, partners and weights; see :data:`Mix`.

    Raises:
        MislasError: what it gives has other shapes.
    """
    given = MIXES[name](images, pairs)
    if not (isinstance(given, tuple) and len(given) == 3):
        raise MislasError(f"mix {name!r} must give a tuple of images, partners and weights, got {given!r:.80}")
    mixed, partner, weight = given
    weight = weight if isinstance(weight, Tensor) and weight.ndim else float(weight)
    given = [tuple(shape) for shape in (mixed.shape, partner.shape, getattr(weight, "shape", partner.shape))]
    if given != [tuple(images.shape), (len(images),), (len(images),)]:
        raise MislasError(
            f"mix {name!r} must give as many images, partners and weights as it is given, {tuple(images.shape)}, "
            f"({len(images)},) and ({len(images)},), or one weight; it gave {', '.join(map(str, given))}"
        )
    return mixed, partner, weight
