"""From a list of image files to normalised batches on the device, with the augmentation of Kang et al. (2020)::

    data = load_lists("places-lt", root="places", lists="lists")
    batches = ImageBatches(data.train, data.spec, batch_size=256, device="cuda")
    for images, targets in batches.epoch(rng, "class_balanced"): ...
    for images in ImageBatches(data.test, data.spec, batch_size=256, device="cuda").plain(): ...

Worker processes do what differs from image to image: read, decode, cut out and resize to one size, as uint8. The device
does the rest for a whole batch at once: mirror, jitter colours, normalise. All that is random is drawn from the
generator of the epoch, so batches are the same with any number of workers, and add up to the same over any number of
ranks.
"""

from __future__ import annotations

import io
import math
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as TF

from . import distributed
from .data import ListSpec, write_atomically
from .errors import DataError, MislasError
from .lists import PREPARED, ImageList, in_threads, read_image
from .samplers import draw

#: In place of an image's seed: the test crop.
PLAIN = -1


# ------------------------------------------------------------------------------------------------------ one image


def crop_box(
    rng: np.random.Generator,
    height: int,
    width: int,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """A random crop as torchvision's RandomResizedCrop draws it (Szegedy et al., 2015).

    Its share of the area is uniform in ``scale``, the logarithm of width / height uniform between those of ``ratio``.
    After ten attempts that do not fit, the largest central crop with a ratio inside the limits.

    Returns:
        top, left, height, width, in pixels.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    h = min(height, round(width / ratio[0]))
    w = min(width, round(height * ratio[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def crop(image: Tensor, size: int, seed: int) -> Tensor:
    """Cut an image to ``size`` pixels a side, resized with antialiasing: uint8 ``(3, H, W)`` to ``(3, size, size)``.

    Args:
        seed: of :func:`crop_box`, >= 0; or :data:`PLAIN` for the test crop: the shorter side to ``size * 8 / 7`` (256
            for 224), then the centre.
    """
    if seed == PLAIN:
        return TF.center_crop(TF.resize(image, [size * 8 // 7], antialias=True), [size, size])
    box = crop_box(np.random.default_rng(seed), *image.shape[1:])
    return TF.resized_crop(image, *box, [size, size], antialias=True)


# -------------------------------------------------------------------------------------------------------- a batch


def jitter_(images: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Change brightness, contrast and saturation in place, each image by its own factors in its own order.

    Each change is ``factor * x + (1 - factor) * other``, clipped to 0..1, where ``other`` is black (0, brightness), the
    mean of the image's greys (1, contrast), or its greys (2, saturation).

    Args:
        images: float ``(B, 3, H, W)`` in 0..1.
        factors: ``(B, 3)``; 1 changes nothing. Of brightness, contrast, saturation.
        order: int64 ``(B, 3)``, a permutation of 0, 1, 2 for each image.
    """
    for change in order.T:
        which, factor = (t.view(-1, 1, 1, 1) for t in (change, factors.gather(1, change[:, None])))
        red, green, blue = images.split(1, dim=1)
        grey = 0.2989 * red + 0.587 * green + 0.114 * blue  # ITU-R 601, as torchvision
        other = torch.where(which == 2, grey, torch.where(which == 1, grey.mean((2, 3), keepdim=True), 0.0))
        images.lerp_(other, 1 - factor).clamp_(0, 1)
    return images


def pieces(n: int, batch_size: int, rank: int, world: int) -> list[tuple[int, int]]:
    """Which positions of an epoch a rank takes in each step, ``(start, stop)``: its
    :func:`mislas.distributed.piece` of every batch."""
    steps = ((start, distributed.piece(min(batch_size, n - start), rank, world)) for start in range(0, n, batch_size))
    return [(start + part.start, start + part.stop) for start, part in steps]


class _Decoder(torch.utils.data.Dataset):
    """What runs in the workers: (index, seed) pairs of a batch to its crops, or to the line that says what is wrong."""

    def __init__(self, images: ImageList, size: int):
        self.images, self.size = images, size

    def __getitems__(self, items: Sequence[tuple[int, int]]) -> Tensor | str:
        crops = torch.empty(len(items), 3, self.size, self.size, dtype=torch.uint8)
        try:
            for place, (index, seed) in zip(crops, items, strict=True):
                place.copy_(crop(read_image(self.images.file(index)), self.size, seed))
        except DataError as error:  # as a value: an exception would arrive wrapped in a worker's traceback
            return str(error)
        return crops


def _as_it_is(batch: Tensor | str) -> Tensor | str:
    return batch


class ImageBatches:
    """Batches of a list of images.

    Args:
        images: see :func:`mislas.lists.load_lists`.
        spec: its size, statistics and jitter.
        batch_size: images of a step, over all ranks together.
        device: where batches go.
        workers: processes that decode; 0 decodes in this one, None takes one per processor and rank.
        rank, world: which of how many processes that train together this is; each gets its piece of every batch. None
            is what it is (:mod:`mislas.distributed`).

    Raises:
        MislasError: a batch size smaller than the number of ranks, or a rank that is not in ``0 .. world - 1``.
    """

    def __init__(
        self,
        images: ImageList,
        spec: ListSpec,
        batch_size: int,
        *,
        device: torch.device | str = "cpu",
        workers: int | None = None,
        rank: int | None = None,
        world: int | None = None,
    ):
        rank = distributed.rank() if rank is None else rank
        world = distributed.world() if world is None else world
        if not 0 <= rank < world <= batch_size:
            raise MislasError(
                f"rank is in 0..world - 1 and the batch size at least world, got rank {rank}, world {world}, "
                f"batch size {batch_size}"
            )
        self.images, self.spec, self.device = images, spec, torch.device(device)
        self.pieces = pieces(len(images), batch_size, rank, world)
        self.targets = images.targets.to(self.device)
        self.mean, self.std = (
            torch.tensor(values, device=self.device).view(1, 3, 1, 1) for values in (spec.mean, spec.std)
        )
        self.workers = distributed.processors() if workers is None else workers
        self._idle: list[tuple[list, DataLoader]] = []  # nobody reads from them; two epochs at once take two

    def __len__(self) -> int:
        """Images of the list, not of this rank."""
        return len(self.images)

    def epoch(self, rng: np.random.Generator, sampler: str = "instance_balanced") -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch of augmented batches: random resized crop, mirror, colour jitter where the dataset has it.

        Args:
            rng: of this epoch; every rank passes an equal one. The order of the images is what is drawn first.
            sampler: name in :data:`mislas.samplers.SAMPLERS`.

        Yields:
            Images, float32 ``(B, 3, size, size)``, normalised, in channels-last memory; and targets, int64 ``(B,)``.

        Raises:
            DataError: an image that cannot be read.
            MislasError: an unknown sampler.
        """
        return self.shown(draw(sampler, rng, self.images.targets.numpy()), rng)

    def shown(self, index: np.ndarray, rng: np.random.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """What :meth:`epoch` yields, for images that are drawn already: int64 ``(N,)``."""
        n, strength = len(index), self.spec.jitter
        seeds = rng.integers(2**62, size=n)
        mirrored = rng.integers(2, size=n).astype(bool)
        factors = rng.uniform(max(0, 1 - strength), 1 + strength, size=(n, 3)).astype(np.float32)
        order = rng.permuted(np.tile(np.arange(3), (n, 1)), axis=1)
        drawn = [torch.from_numpy(part).to(self.device) for part in (index, mirrored, factors, order)]
        for crops, part in self._decoded(index, seeds):
            shown, flip, factor, turn = (whole[part] for whole in drawn)
            images = torch.where(flip.view(-1, 1, 1, 1), crops.flip(3), crops).float().div_(255)
            if strength:
                jitter_(images, factor, turn)
            yield self._normalised(images), self.targets[shown]

    def plain(self) -> Iterator[Tensor]:
        """All images in order, the test crop: images as those of :meth:`epoch`, without targets."""
        for crops, _ in self._decoded(np.arange(len(self)), np.full(len(self), PLAIN)):
            yield self._normalised(crops.float().div_(255))

    def _decoded(self, index: np.ndarray, seeds: np.ndarray) -> Iterator[tuple[Tensor, slice]]:
        parts = [slice(*piece) for piece in self.pieces]
        work, loader = self._idle.pop() if self._idle else self._new_loader()
        work[:] = [list(zip(index[part].tolist(), seeds[part].tolist(), strict=True)) for part in parts]
        try:
            decoded = iter(loader)
            for part in parts:
                try:
                    crops = next(decoded)
                except RuntimeError as error:
                    if "DataLoader worker" not in str(error):
                        raise
                    raise MislasError(
                        f"a process that decodes images died ({str(error).splitlines()[0]}); give this machine more "
                        "shared memory (docker run --shm-size), or use fewer workers"
                    ) from error
                if isinstance(crops, str):
                    raise DataError(crops)
                yield crops.to(self.device, non_blocking=True), part
        finally:
            self._idle.append((work, loader))

    def _new_loader(self) -> tuple[list[list[tuple[int, int]]], DataLoader]:
        """What the workers are to do, read anew at the start of every epoch; and what has them do it."""
        work: list[list[tuple[int, int]]] = []
        loader = DataLoader(
            _Decoder(self.images, self.spec.size),
            batch_sampler=work,
            num_workers=self.workers,
            collate_fn=_as_it_is,
            persistent_workers=self.workers > 0,
            worker_init_fn=_ignore_preemption,
            pin_memory=self.device.type == "cuda",
        )
        return work, loader

    def _normalised(self, images: Tensor) -> Tensor:
        return images.sub_(self.mean).div_(self.std).contiguous(memory_format=torch.channels_last)


def _ignore_preemption(_: int) -> None:
    """In a process that decodes: a cluster's signal that the job has to stop is for the process that trains."""
    for name in ("SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


# -------------------------------------------------------------------------------------------------------- smaller


def shrink(images: ImageList, folder: str | os.PathLike, side: int = 256, progress: bool = True) -> None:
    """Copy the images of a list into ``folder``, the shorter side at most ``side`` pixels: faster to decode.

    They are other pixels (resized, and compressed again at JPEG quality 95), so a note is left in the folder that
    :attr:`mislas.lists.ListDataset.checksum` counts in. It can be stopped at any moment, and goes on where it was.

    Args:
        images: the list.
        folder: the new image root, not the old one.
        side: of the shorter side, in pixels.
        progress: whether to show a progress bar.

    Raises:
        MislasError: a folder that is the list's own root, or has images of another size or of an unknown one.
        DataError: an image that cannot be read.
    """
    folder, note = Path(folder).expanduser(), f"shorter side at most {side} pixels, JPEG quality 95\n"
    if folder.resolve() == images.root.resolve():
        raise MislasError(f"{folder} is where the images are; shrink them into another folder")
    if (folder / PREPARED).exists():
        if (folder / PREPARED).read_text() != note:
            raise MislasError(f"{folder} has images of another size; choose another folder, or delete it")
    elif any((folder / top).exists() for top in {path.partition("/")[0] for path in images.paths}):
        raise MislasError(f"{folder} has images already, and no note of their size; choose another folder")
    write_atomically(folder / PREPARED, lambda handle: handle.write(note.encode()))

    def one(path: str) -> None:
        target = folder / path
        if target.exists():
            return
        pixels = read_image(images.root / path)
        if min(pixels.shape[1:]) <= side:
            content = (images.root / path).read_bytes()
        else:
            buffer = io.BytesIO()
            small = Image.fromarray(TF.resize(pixels, [side], antialias=True).permute(1, 2, 0).numpy())
            small.save(buffer, "JPEG", quality=95, subsampling=0)
            content = buffer.getvalue()
        write_atomically(target, lambda handle: handle.write(content), flush=False)

    for _ in in_threads(one, list(dict.fromkeys(images.paths)), "shrink", progress):
        pass
