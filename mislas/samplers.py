"""Which training images an epoch shows, and in what order.

A sampler takes a NumPy generator and the targets and returns one epoch of indices, as many as there are images.
Indices are drawn on the host once per epoch, so that a seed gives the same batches on every device.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .errors import MislasError, unknown


def instance_balanced(rng: np.random.Generator, targets: np.ndarray) -> np.ndarray:
    """Every image once, in random order."""
    return rng.permutation(len(targets))


def class_balanced(rng: np.random.Generator, targets: np.ndarray) -> np.ndarray:
    """Independent draws: a class uniformly, then one of its images uniformly (Kang et al., 2020, q = 0).

    Raises:
        MislasError: a class without images, here and in the samplers below.
    """
    return one_image_each(rng, targets, rng.integers(int(np.max(targets)) + 1, size=len(targets)))


def reverse(rng: np.random.Generator, targets: np.ndarray) -> np.ndarray:
    """Independent draws: a class with odds 1 / N_k, then one of its images uniformly (Zhou et al., 2020)."""
    odds = 1 / _counts(targets)
    return one_image_each(rng, targets, rng.choice(len(odds), size=len(targets), p=odds / odds.sum()))


def one_image_each(rng: np.random.Generator, targets: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """An image of each of ``classes``, uniformly among the images of that class."""
    order, counts = np.argsort(targets, kind="stable"), _counts(targets)
    starts = np.cumsum(counts) - counts
    within = (rng.random(len(classes)) * counts[classes]).astype(np.int64)
    return order[starts[classes] + within]


def _counts(targets: np.ndarray) -> np.ndarray:
    counts = np.bincount(targets)
    if not counts.all():
        raise MislasError(f"class {counts.argmin()} has no image to draw; labels count from 0 and leave none out")
    return counts


def class_cyclic(rng: np.random.Generator, targets: np.ndarray, per_visit: int = 4) -> np.ndarray:
    """The authors' code: cycle through the classes in shuffled order, four of each from its own shuffled cycle."""
    counts = _counts(targets)
    classes = len(counts)
    visits = -(-len(targets) // (classes * per_visit))
    images = np.empty((classes, visits * per_visit), np.int64)
    for k, members in enumerate(np.split(np.argsort(targets, kind="stable"), np.cumsum(counts)[:-1])):
        rounds = -(-images.shape[1] // len(members))
        images[k] = np.concatenate([rng.permutation(members) for _ in range(rounds)])[: images.shape[1]]
    images = images.reshape(classes, visits, per_visit)
    turns = [images[rng.permutation(classes), visit] for visit in range(visits)]
    return np.concatenate(turns).reshape(-1)[: len(targets)]


SAMPLERS: dict[str, Callable[[np.random.Generator, np.ndarray], np.ndarray]] = {
    "instance_balanced": instance_balanced,
    "class_balanced": class_balanced,
    "class_cyclic": class_cyclic,
    "reverse": reverse,
}


def draw(sampler: str, rng: np.random.Generator, targets: np.ndarray) -> np.ndarray:
    """An epoch's indices by a sampler of :data:`SAMPLERS`, int64, one for each image of ``targets``.

    Raises:
        MislasError: an unknown sampler, or one that draws something else.
    """
    if sampler not in SAMPLERS:
        unknown("sampler", sampler, SAMPLERS)
    n, index = len(targets), np.asarray(SAMPLERS[sampler](rng, targets))
    if index.shape != (n,) or index.dtype.kind not in "iu" or not (index.min() >= 0 and index.max() < n):
        raise MislasError(
            f"sampler {sampler!r} must draw as many indices as there are images, integers in 0 .. {n - 1}, shape "
            f"({n},); it drew {index.dtype} of shape {index.shape}"
        )
    return index.astype(np.int64, copy=False)
