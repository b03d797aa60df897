"""Batches of a stage: drawn on the host, so that a seed gives the same on every device, and made on the device."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from . import distributed
from .augment import Images, Pairs, mix, mixup
from .config import RunConfig, Stage1, Stage2
from .data import Dataset, LongTailed
from .lists import ListDataset
from .samplers import draw

if TYPE_CHECKING:
    from .pipeline import ImageBatches
    from .train import Options


# ------------------------------------------------------------------------------------------------------- randomness


def host_rng(*parts: Any) -> np.random.Generator:
    """A NumPy generator for a purpose, e.g. ``host_rng(seed, "stage1", epoch)``: the same on every device."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


def torch_rng(*parts: Any) -> torch.Generator:
    """A CPU generator for a purpose; initial weights are drawn on the CPU, so that devices agree."""
    return torch.Generator().manual_seed(int(host_rng(*parts).integers(2**62)))


@contextlib.contextmanager
def own_randomness(device: torch.device) -> Iterator[None]:
    """Within it :func:`seed_modules` may be called: after it PyTorch's own generators are as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def seed_modules(device: torch.device, seed: int) -> None:
    """Start what modules draw while they train, such as dropout's masks: PyTorch's own generators, the host's and the
    device's. (``torch.manual_seed`` does the same for all devices, and is too slow for every step.)"""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


@contextlib.contextmanager
def seeded(generator: torch.Generator) -> Iterator[None]:
    """Within it what draws from PyTorch's own generator, such as a network's layers, starts as ``generator`` did."""
    with own_randomness(generator.device):
        seed_modules(generator.device, generator.initial_seed())
        yield


def draw_batches(
    rng: np.random.Generator,
    targets: np.ndarray,
    stage: Stage1 | Stage2,
    padding: int,
    flip: bool,
    device: torch.device,
    sampler: str,
) -> Iterator[tuple[tuple[Tensor, ...], float, Tensor | None]]:
    """One epoch: for each batch ((index, top, left, flip), lambda, partner), drawn on the host and moved in one go."""
    index = draw(sampler, rng, targets)
    n = len(index)
    top, left = rng.integers(2 * padding + 1, size=(2, n))
    mirrored = rng.integers(2, size=n).astype(bool) if flip else np.zeros(n, bool)
    steps = math.ceil(n / stage.batch_size)
    lams = rng.beta(stage.mixup, stage.mixup, size=steps) if stage.mixup else np.ones(steps)
    starts = range(0, n, stage.batch_size)
    partners = [rng.permutation(min(stage.batch_size, n - start)) for start in starts] if stage.mixup else None
    parts = [index, top, left, mirrored] + ([np.concatenate(partners)] if partners else [])
    epoch = [torch.from_numpy(part).to(device) for part in parts]
    for lam, index, top, left, mirrored, *partner in zip(
        lams, *(p.split(stage.batch_size) for p in epoch), strict=True
    ):
        yield (index, top, left, mirrored), float(lam), partner[0] if partner else None


# ------------------------------------------------------------------------------------------------------------- batches


@dataclass
class Batch:
    """Augmented images and their labels.

    Attributes:
        images: float32 ``(B, 3, H, W)``, mixed if the stage mixes. Where several processes train together it is this
            one's :func:`mislas.distributed.piece` of the batch; all else is of the whole batch.
        targets: ``(B,)``.
        partner_targets: labels that were mixed in, ``(B,)``, or None.
        weight: weight of the image's own label in 0..1: one number, or one per image (Remix).
        index: places of the images in the training set, ``(B,)``, where a batch comes from one.
    """

    images: Tensor
    targets: Tensor
    partner_targets: Tensor | None = None
    weight: float | Tensor = 1.0
    index: Tensor | None = None


def mixed(
    batch: Batch, stage: Stage1 | Stage2, lam: float, partner: Tensor, rng: np.random.Generator, counts: Tensor
) -> Batch:
    """A plain batch mixed with itself, by mixup or in the stage's other way.

    Args:
        batch: with all its images; this process's piece of them is mixed and returned.
        lam: weight of the image itself, 0..1.
        partner: whom each image is mixed with, ``(B,)``.
        rng: what else a way to mix draws from, such as the centre of CutMix's box.
        counts: training images of each class, ``(K,)``.
    """
    name, images, weight = getattr(stage, "mix", None), batch.images, lam
    if name is None:
        images = mixup(images, lam, partner)
    else:
        images, partner, weight = mix(name, images, Pairs(lam, partner, counts[batch.targets], stage, rng))
    piece = distributed.piece(len(partner))
    return Batch(images[piece], batch.targets, batch.targets[partner], weight, batch.index)


class Batches:
    """A training set on the device, and the epochs of one stage over it: the same for a seed on every device."""

    def __init__(self, data: Dataset, stage: Stage1 | Stage2, stage_name: str, seed: int | str, device: torch.device):
        self.images = Images(data.train_images, data.spec.mean, data.spec.std, padding=data.spec.padding, device=device)
        self.targets, self.targets_host = data.train_targets.to(device), data.train_targets.numpy()
        self.counts = torch.tensor(data.class_counts, dtype=torch.float32, device=device)
        self.stage, self.purpose, self.flip, self.device = stage, (seed, stage_name), data.spec.flip, device

    def epoch(self, epoch: int, sampler: str | None = None) -> Iterator[Batch]:
        """The batches of an epoch (from 0), by the stage's sampler or another."""
        stage, purpose = self.stage, (*self.purpose, epoch) if sampler is None else (*self.purpose, epoch, sampler)
        centres = host_rng(*purpose, "centres")
        draws = draw_batches(
            host_rng(*purpose), self.targets_host, stage, self.images.padding, self.flip, self.device,
            sampler or stage.sampler_in(epoch),
        )  # fmt: skip
        for drawn, lam, partner in draws:
            index = drawn[0]
            if partner is None:
                drawn = [part[distributed.piece(len(index))] for part in drawn]
            batch = Batch(self.images.batch(*drawn), self.targets[index], index=index)
            yield batch if partner is None else mixed(batch, stage, lam, partner, centres, self.counts)


class ListBatches:
    """What :class:`Batches` is, for a dataset whose images are files."""

    def __init__(
        self, data: ListDataset, stage: Stage1 | Stage2, stage_name: str, seed: int | str, device: torch.device,
        workers: int | None = None,
    ):  # fmt: skip
        from .pipeline import ImageBatches  # here: torchvision takes seconds to import

        self.images = ImageBatches(data.train, data.spec, stage.batch_size, device=device, workers=workers)
        self.counts = torch.tensor(data.class_counts, dtype=torch.float32, device=device)
        self.targets_host = data.train_targets.numpy()
        self.stage, self.purpose, self.device = stage, (seed, stage_name), device

    def epoch(self, epoch: int, sampler: str | None = None) -> Iterator[Batch]:
        """The batches of an epoch (from 0), by the stage's sampler or another."""
        stage, purpose = self.stage, (*self.purpose, epoch) if sampler is None else (*self.purpose, epoch, sampler)
        rng = host_rng(*purpose)
        order = draw(sampler or stage.sampler_in(epoch), rng, self.targets_host)
        index = torch.from_numpy(order).to(self.device).split(stage.batch_size)
        sizes = [len(places) for places in index]
        drawn = zip(self.images.shown(order, rng), index, strict=True)
        plain = (Batch(images, self.images.targets[places], index=places) for (images, _), places in drawn)
        if stage.mixup is None:
            yield from plain
            return
        rng, centres = host_rng(*purpose, "mix"), host_rng(*purpose, "centres")
        lams = rng.beta(stage.mixup, stage.mixup, size=len(sizes))
        partners = torch.from_numpy(np.concatenate([rng.permutation(size) for size in sizes])).to(self.device)
        for batch, lam, partner in zip(plain, lams, partners.split(sizes), strict=True):
            batch.images = distributed.gather(batch.images, len(partner))
            yield mixed(batch, stage, float(lam), partner, centres, self.counts)


def batches_of(
    data: LongTailed, stage: Stage1 | Stage2, stage_name: str, seed: int | str, options: Options
) -> Batches | ListBatches:
    """The epochs of a stage over a dataset, on the device that the options say.

    Raises:
        MislasError: a batch size that the processes that train together do not divide.
    """
    distributed.check_batch_size(stage.batch_size)
    if isinstance(data, ListDataset):
        return ListBatches(data, stage, stage_name, seed, options.torch_device(), options.workers)
    return Batches(data, stage, stage_name, seed, options.torch_device())


def plain_images(data: LongTailed, options: Options, which: Tensor | None = None) -> Images | ImageBatches:
    """A dataset's images without augmentation, as :func:`mislas.evaluate.predict` takes them.

    Args:
        which: indices of training images; None is the test set.
    """
    device = options.torch_device()
    if isinstance(data, ListDataset):
        from .pipeline import ImageBatches  # here: torchvision takes seconds to import

        images = data.test if which is None else data.train.only(which)
        batch_size = max(distributed.world(), min(256, len(images)))
        return ImageBatches(images, data.spec, batch_size, device=device, workers=options.workers)
    images = data.test_images if which is None else data.train_images[which]
    return Images(images, data.spec.mean, data.spec.std, padding=0, device=device)


def training_part(config: RunConfig, data: LongTailed) -> LongTailed:
    """What a run trains on: all of a dataset, or what Stage-1 did not hold out."""
    return data if config.stage1.holdout is None else data.hold_out(config.stage1.holdout)[0]
