"""What batches of image files cost the processor, as ratios in one run: ours against the usual transforms.

- usual: Pillow decodes; torchvision's RandomResizedCrop, flip, ColorJitter, ToTensor and Normalize, image by image.
- workers: what a worker of :class:`mislas.pipeline.ImageBatches` does: decode, crop, resize. With a GPU this is all.
- whole: the same and the rest of the batch, on the processor too.
- shrunk: as workers, on images whose shorter side was brought to 256 pixels beforehand.

Measured is processor time, which other programs on the machine do not change much; the ways take turns all the same.
Images are random JPEGs of ImageNet's usual 500 x 375 pixels.

    python benchmarks/pipeline.py [--images 128] [--repeats 3]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import transforms

from mislas.lists import LISTS, ImageList, read_image
from mislas.pipeline import ImageBatches, crop, shrink

SPEC = LISTS["imagenet-lt"]


def write_images(root: Path, count: int) -> ImageList:
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(256, size=(24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), float)
        noisy = np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(root / f"{i}.jpg", quality=90)
    return ImageList(root, tuple(f"{i}.jpg" for i in range(count)), torch.zeros(count, dtype=torch.int64), 1)


def usual(images: ImageList) -> None:
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(SPEC.size),
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(SPEC.jitter, SPEC.jitter, SPEC.jitter),
            transforms.ToTensor(),
            transforms.Normalize(SPEC.mean, SPEC.std),
        ]
    )
    for start in range(0, len(images), 64):
        some = range(start, min(start + 64, len(images)))
        torch.stack([transform(Image.open(images.file(i)).convert("RGB")) for i in some])


def whole(images: ImageList) -> None:
    for _ in ImageBatches(images, SPEC, 64, workers=0).epoch(np.random.default_rng(0)):
        pass


def workers(images: ImageList) -> None:
    for seed in range(len(images)):
        crop(read_image(images.file(seed)), SPEC.size, seed)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args(argv)
    warnings.simplefilter("ignore", DeprecationWarning)
    with tempfile.TemporaryDirectory() as folder:
        large, small = Path(folder) / "large", Path(folder) / "small"
        large.mkdir()
        images = write_images(large, arguments.images)
        shrink(images, small, progress=False)
        ways = {
            "usual": lambda: usual(images),
            "workers": lambda: workers(images),
            "whole": lambda: whole(images),
            "shrunk": lambda: workers(replace(images, root=small)),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(arguments.repeats + 1):  # the first round warms up
            for name, way in ways.items():
                started = time.process_time()
                way()
                seconds[name].append(time.process_time() - started)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    for name, median in medians.items():
        each = 1000 * median / arguments.images
        print(f"{name:7}  {each:6.2f} ms of processor an image   {median / medians['usual']:5.2f} of usual")


if __name__ == "__main__":
    main()
