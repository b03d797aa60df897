"""Long-tailed datasets by name; those that fit in memory: images as uint8 tensors, targets, class counts, groups::

    data = load("cifar10-jpeg", data_root="data", imbalance=100)
    data.train_images      # (12406, 32, 32, 3) uint8
    data.class_counts      # (5000, 2997, 1796, ...)
    data.groups            # {"many": [...], "medium": [...], "few": [...]}

Nothing here knows of methods or runs. Files are found through an explicit ``data_root``; ``digits`` needs none. The
datasets that do not fit in memory, :data:`LISTS`, are read by :mod:`mislas.lists`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import secrets
import tarfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Self

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from .errors import DataError, MislasError, unknown

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # the authors', on both CIFARs
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MANY, FEW = 100, 20  # many: more than 100 training images; few: fewer than 20; medium: between (paper, A.2)


@dataclass(frozen=True)
class Spec:
    """What is fixed about a dataset before any file is read.

    Attributes:
        title: as tables write it.
        num_classes: number of classes, K.
        size: side of an image, in pixels.
        train_per_class: training images of every class before the cut.
        mean, std: per-channel statistics of pixel values in 0..1.
        padding: width of the border from which random crops are taken, in pixels.
        flip: whether training mirrors half of the images left to right.
        files: where images come from: ``"tree"`` (a folder per class), ``"torchvision"`` or ``"bundled"``.
    """

    title: str
    num_classes: int
    size: int
    train_per_class: int
    mean: tuple[float, float, float] = CIFAR_MEAN
    std: tuple[float, float, float] = CIFAR_STD
    padding: int = 4
    flip: bool = True
    files: str = "tree"


SPECS: dict[str, Spec] = {
    "digits": Spec("digits", 10, 8, 124, (0.3053,) * 3, (0.3760,) * 3, padding=1, flip=False, files="bundled"),
    "cifar10": Spec("CIFAR-10", 10, 32, 5000, files="torchvision"),
    "cifar100": Spec("CIFAR-100", 100, 32, 500, files="torchvision"),
    "cifar10-jpeg": Spec("CIFAR-10 (JPEG)", 10, 32, 5000),
    "cifar100-jpeg": Spec("CIFAR-100 (JPEG)", 100, 32, 500),
    "tinyimagenet32": Spec("Tiny-ImageNet 32x32", 200, 32, 500, IMAGENET_MEAN, IMAGENET_STD),
    "tinyimagenet64": Spec("Tiny-ImageNet 64x64", 200, 64, 500, IMAGENET_MEAN, IMAGENET_STD, padding=8),
}


@dataclass(frozen=True)
class ListSpec:
    """What is expected of a dataset, and how its images are prepared.

    Attributes:
        title: as the paper writes it.
        num_classes: number of classes, K.
        train, test: lines of its two lists.
        smallest, largest: training images of the smallest and the largest class.
        train_list, test_list: file names, with or without ``.xz``.
        mean, std: per-channel statistics of pixel values in 0..1 (Kang et al., 2020).
        jitter: strength of brightness, contrast and saturation jitter in training; 0 is none (Kang et al., 2020).
        size: side of the training and test crops, in pixels. The shorter side is resized to ``size * 8 / 7`` for tests.
        note: what a reader should know.
    """

    title: str
    num_classes: int
    train: int
    test: int
    smallest: int
    largest: int
    train_list: str
    test_list: str
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    jitter: float = 0.4
    size: int = 224
    note: str = ""

    @property
    def imbalance(self) -> float:
        """N_max / N_min, a fact about the list; of the datasets in :data:`SPECS` it is a parameter."""
        return self.largest / self.smallest


#: ImageNet-LT and Places-LT are those of Liu et al. (2019), iNaturalist 2018 that of Van Horn et al. (2018).
#: ``generated`` is what :func:`mislas.lists.generate` writes: for tests, and to try things without any download.
#:
#: :meta hide-value:
LISTS: dict[str, ListSpec] = {
    "imagenet-lt": ListSpec(
        "ImageNet-LT", 1000, 115_846, 50_000, 5, 1280, "ImageNet_LT_train.txt", "ImageNet_LT_test.txt"
    ),
    "places-lt": ListSpec(
        "Places-LT", 365, 62_500, 36_500, 5, 4980, "Places_LT_train.txt", "Places_LT_test.txt",
        note="the paper says 184.5K images; the public training list has 62,500, with the paper's class sizes",
    ),
    "inaturalist18": ListSpec(
        "iNaturalist 2018", 8142, 437_513, 24_426, 2, 1000, "iNaturalist18_train.txt", "iNaturalist18_val.txt",
        (0.466, 0.471, 0.380), (0.195, 0.194, 0.192), jitter=0.0,
    ),
    "generated": ListSpec(
        "generated gratings", 6, 256, 30, 6, 120, "generated_train.txt", "generated_test.txt", size=32
    ),
}  # fmt: skip


def dataset_name(name: str) -> str:
    """The canonical name of a dataset: a key of :data:`SPECS` or :data:`LISTS`.

    ``digits-lt`` and ``digits`` are one, since the imbalance factor is a parameter; ``places-lt`` is a name.

    Args:
        name: looked up as it is, then in lower case, then without ``-lt``.

    Raises:
        UnknownName: no dataset has that name.
    """
    if isinstance(name, str):
        for candidate in (name, name.lower(), name.lower().removesuffix("-lt")):
            if candidate in SPECS or candidate in LISTS:
                return candidate
    unknown("dataset", name, [*SPECS, *LISTS])


def spec_of(name: str) -> Spec | ListSpec:
    """What is fixed about a dataset, in memory or not, by its canonical name."""
    return SPECS[name] if name in SPECS else LISTS[name]


def training_images(name: str, imbalance: float, n_max: int | None = None) -> int:
    """How many training images a dataset has, before any file is read; see :func:`load`."""
    spec = spec_of(name)
    return spec.train if isinstance(spec, ListSpec) else sum(_counts(spec, imbalance, n_max))


def smallest_class(name: str, imbalance: float, n_max: int | None = None) -> int:
    """How many training images the rarest class of a dataset has, before any file is read; see :func:`load`."""
    spec = spec_of(name)
    return spec.smallest if isinstance(spec, ListSpec) else min(_counts(spec, imbalance, n_max))


def empty_groups(name: str, imbalance: float, n_max: int | None = None) -> list[str]:
    """Which of many, medium and few no class of a dataset belongs to, before any file is read; see :func:`load`. Of
    list files that is not known: none."""
    spec = spec_of(name)
    found = {} if isinstance(spec, ListSpec) else groups(_counts(spec, imbalance, n_max))
    return [group for group, classes in found.items() if not classes]


def _counts(spec: Spec, imbalance: float, n_max: int | None) -> tuple[int, ...]:
    return long_tailed_counts(spec.train_per_class if n_max is None else n_max, imbalance, spec.num_classes)


class LongTailed:
    """What a dataset in memory, :class:`Dataset`, and one of list files, :class:`mislas.lists.ListDataset`, have in
    common: a training set, long-tailed or balanced, and its balanced test set.

    A subclass has ``name``, ``imbalance``, ``train_targets`` and ``test_targets``, int64 ``(N,)`` in
    ``0 .. num_classes - 1``, ``only(which)`` and ``checksum``.
    """

    @property
    def spec(self) -> Spec | ListSpec:
        """What is fixed about the dataset."""
        return spec_of(self.name)

    @property
    def num_classes(self) -> int:
        """Number of classes, K."""
        return self.spec.num_classes

    @cached_property
    def class_counts(self) -> tuple[int, ...]:
        """Training images per class, in label order."""
        return tuple(torch.bincount(self.train_targets, minlength=self.num_classes).tolist())

    @cached_property
    def groups(self) -> dict[str, list[int]]:
        """Classes of "many", "medium" and "few"; see :func:`groups`."""
        return groups(self.class_counts)

    def hold_out(self, share: float) -> tuple[Self, Tensor]:
        """This dataset with a share of each class's training images taken out, and the indices of those, ``(M,)``.

        Of every class the last ``max(1, round(share * N_k))`` are taken: a class is in random order after the cut, and
        in the order of its list otherwise.

        Raises:
            DataError: a class would be left without an image.
        """
        out = in_last_place(self.train_targets, self.class_counts, share)
        return self.only(~out), out.nonzero()[:, 0]


@dataclass(frozen=True)
class Dataset(LongTailed):
    """A dataset in memory.

    Attributes:
        name: canonical name (a key of :data:`SPECS`).
        imbalance: the imbalance factor N_max / N_min that was asked for; 1 is balanced.
        train_images, test_images: uint8, ``(N, H, W, 3)``.
        train_targets, test_targets: int64, ``(N,)``, in ``0 .. num_classes - 1``.
        class_names: names in label order.
    """

    name: str
    imbalance: float
    train_images: Tensor = field(repr=False)
    train_targets: Tensor = field(repr=False)
    test_images: Tensor = field(repr=False)
    test_targets: Tensor = field(repr=False)
    class_names: tuple[str, ...] = field(repr=False)

    def only(self, which: Tensor, targets: Tensor | None = None) -> Dataset:
        """This dataset with the training images in ``which``, bool ``(N,)`` or indices, alone; with other labels if
        given."""
        targets = self.train_targets[which] if targets is None else targets
        return dataclasses.replace(self, train_images=self.train_images[which], train_targets=targets)

    @cached_property
    def checksum(self) -> str:
        """First 16 hex digits of the SHA-256 over all pixels and targets, so that a record can say what it saw."""
        digest = hashlib.sha256()
        for tensor in (self.train_images, self.train_targets, self.test_images, self.test_targets):
            digest.update(np.ascontiguousarray(tensor.numpy()).data)
        return digest.hexdigest()[:16]


def in_last_place(targets: Tensor, class_counts: Sequence[int], share: float) -> Tensor:
    """Which images to hold out: of every class the last ``max(1, round(share * N_k))``; bool ``(N,)``.

    Raises:
        DataError: a class would be left without an image.
    """
    out = torch.zeros(len(targets), dtype=torch.bool)
    order, start = targets.argsort(stable=True), 0
    for k, count in enumerate(class_counts):
        taken = max(1, round(share * count))
        if taken >= count:
            raise DataError(f"class {k} has {count} image(s), too few to hold any out; use a smaller imbalance factor")
        out[order[start + count - taken : start + count]] = True
        start += count
    return out


# ---------------------------------------------------------------------------------------------- the long-tailed cut


def long_tailed_counts(n_max: int, imbalance: float, num_classes: int) -> tuple[int, ...]:
    """Images to keep per class: ``N_k = int(N_max * IF^(-k / (K - 1)))`` (Cao et al., 2019).

    Args:
        n_max: images of the largest class, at least 1.
        imbalance: IF = N_max / N_min, at least 1.
        num_classes: K, at least 2.

    Raises:
        MislasError: if IF < 1 or K < 2, or if the smallest class would be left with no image.
    """
    if num_classes < 2:
        raise MislasError(f"a long tail needs at least 2 classes, got {num_classes}")
    if not (np.isfinite(imbalance) and imbalance >= 1):
        raise MislasError(f"imbalance factor must be a finite number >= 1 (1 is balanced), got {imbalance!r}")
    ratio = 1 / imbalance
    counts = [int(n_max * ratio ** (k / (num_classes - 1.0))) for k in range(num_classes)]
    if imbalance == n_max:
        counts[-1] = 1  # n_max * (1 / n_max) may be rounded to less
    if min(counts) < 1:
        raise MislasError(
            f"imbalance factor {imbalance:g} leaves class {counts.index(min(counts))} with no image "
            f"(the largest class has {n_max}); use an imbalance factor of at most {n_max}"
        )
    return tuple(counts)


def long_tailed_indices(
    targets: np.ndarray | Sequence[int], imbalance: float, num_classes: int, n_max: int | None = None
) -> np.ndarray:
    """Which images stay. Classes are cut in label order, each shuffled by one ``RandomState(0)`` (Cao et al., 2019).

    ``n_max`` images stay of the largest class: None is as many as the smallest class has before the cut.

    Raises:
        DataError: a class without images, or with fewer than ``n_max``.
    """
    targets = np.asarray(targets)
    available = np.bincount(targets, minlength=num_classes)
    if available.min() == 0:
        raise DataError(f"class {int(available.argmin())} has no training image; every class needs at least one")
    most = min(len(targets) // num_classes, int(available.min()))
    if n_max is None:
        n_max = most
    if n_max > most:
        raise DataError(f"n_max is {n_max}, and there are {most} training images per class; lower it, or leave it out")
    counts = long_tailed_counts(n_max, imbalance, num_classes)
    rng = np.random.RandomState(0)
    kept = []
    for k, count in enumerate(counts):
        index = np.flatnonzero(targets == k)
        rng.shuffle(index)
        kept.append(index[:count])
    return np.concatenate(kept)


def groups(class_counts: tuple[int, ...] | list[int]) -> dict[str, list[int]]:
    """Classes by training images: many > 100, medium 20..100, few < 20 (paper, A.2). A group may be empty."""
    named: dict[str, list[int]] = {"many": [], "medium": [], "few": []}
    for k, count in enumerate(class_counts):
        named["many" if count > MANY else "few" if count < FEW else "medium"].append(k)
    return named


# ---------------------------------------------------------------------------------------------------------- loading


def load(
    name: str,
    data_root: str | os.PathLike | None = None,
    imbalance: float = 100,
    *,
    n_max: int | None = None,
    download: bool = False,
) -> LongTailed:
    """Read a dataset and cut its training set long-tailed.

    Args:
        name: a key of :data:`SPECS`, where a suffix ``-lt`` is accepted, or of :data:`LISTS`.
        data_root: folder with the files. ``cifar10``: torchvision's ``cifar-10-batches-py``, or the same images in
            CIFAR-10's binary version, ``cifar-10-batches-bin``; ``cifar100``: ``cifar-100-python``. Others of
            :data:`SPECS`: an image tree ``NAME/train/<class>/*`` and ``NAME/test/<class>/*``, a folder or
            ``NAME.tar[.xz|.gz]``; names that begin with a dot are passed over. Those of :data:`LISTS`: see
            :func:`mislas.lists.load_from`. ``digits`` and ``generated`` need none.
        imbalance: IF = N_max / N_min >= 1; 1 is balanced. Lists are long-tailed as they are: no parameter there.
        n_max: training images of the largest class, at least 1; None keeps all that it has. Nor is this one of lists.
        download: fetch CIFAR-10/100 into ``data_root`` if missing; torchvision verifies the checksum.

    Raises:
        DataError: missing or damaged files, images that contradict the dataset's entry, or a class without images.
        MislasError: unknown name, or IF < 1.
    """
    name = dataset_name(name)
    data_root = None if data_root is None else Path(data_root).expanduser()
    if name in LISTS:
        from .lists import load_from  # here: it imports this module

        return load_from(name, data_root)
    spec = SPECS[name]
    if spec.files == "bundled":
        splits = _digits()
    elif data_root is None:
        raise DataError(f"dataset {name!r} needs data_root, the folder that holds its files; 'digits' needs none")
    elif spec.files == "torchvision":
        folders = [Path(data_root) / folder for folder in CIFAR_FOLDERS[name]]
        there = next((folder for folder in folders if folder.is_dir()), None)
        if there and there.name == BINARY and not download:
            splits = _binary(there)
        else:
            splits = _torchvision(name, str(data_root), download)
    else:
        splits = _tree(name, str(data_root), spec.size, spec.num_classes)
        sizes = np.bincount(splits[0][1], minlength=spec.num_classes)
        if set(sizes.tolist()) != {spec.train_per_class}:
            found = " to ".join(map(str, sorted({int(sizes.min()), int(sizes.max())})))
            raise DataError(
                f"{name} has {found} training images of a class, and its Spec says "
                f"{spec.train_per_class} of every class; images that are long-tailed as they are belong in list files"
            )
    (train_images, train_targets), (test_images, test_targets), class_names = splits
    index = long_tailed_indices(train_targets, imbalance, spec.num_classes, n_max)
    return Dataset(
        name,
        float(imbalance),
        torch.from_numpy(train_images[index]),
        torch.from_numpy(train_targets[index].astype(np.int64)),
        torch.from_numpy(test_images),
        torch.from_numpy(test_targets.astype(np.int64)),
        class_names,
    )


def available(name: str, data_root: str | os.PathLike) -> bool:
    """Whether the files of a dataset are under ``data_root``; they are not opened."""
    name, root = dataset_name(name), Path(data_root).expanduser()
    if name in LISTS:
        return name == "generated" or (root / name).is_dir()
    if SPECS[name].files == "tree":
        try:
            return bool(_find_place(name, root))
        except DataError:
            return False
    folders = CIFAR_FOLDERS.get(name)
    return folders is None or any((root / folder).is_dir() for folder in folders)


#: CIFAR-10's binary version.
BINARY = "cifar-10-batches-bin"
#: Where CIFAR's files may lie under ``data_root``, most wanted first.
CIFAR_FOLDERS = {"cifar10": ("cifar-10-batches-py", BINARY), "cifar100": ("cifar-100-python",)}
#: In the order of their labels, which is the alphabet's.
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_BINARY_SHA256 = {
    "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
    "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
    "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
    "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
    "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
    "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
}

Splits = tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray], tuple[str, ...]]


@lru_cache(maxsize=1)
def _digits() -> Splits:
    """scikit-learn's handwritten digits, 8x8: of every class the last 50 images are the test set."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.repeat(np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None], 3, axis=3)
    test = np.zeros(len(images), bool)
    for k in range(10):
        test[np.flatnonzero(digits.target == k)[-50:]] = True
    targets = digits.target
    return (images[~test], targets[~test]), (images[test], targets[test]), tuple("0123456789")


@lru_cache(maxsize=2)
def _torchvision(name: str, data_root: str, download: bool) -> Splits:
    from torchvision import datasets

    reader = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    try:
        train, test = (reader(data_root, train=t, download=download) for t in (True, False))
    except Exception as error:  # torchvision raises RuntimeError, URLError, unpickling errors, ... for the same thing
        raise DataError(
            f"cannot read {name} under {data_root} ({' '.join(str(error).split())}); put torchvision's files there, "
            f"fetch them by mislas train --download, or use the image tree as '{name}-jpeg'"
        ) from error
    return (train.data, np.array(train.targets)), (test.data, np.array(test.targets)), tuple(train.classes)


@lru_cache(maxsize=1)
def _binary(folder: Path) -> Splits:
    """CIFAR-10's binary version: of each image a byte with its class, then its red, green and blue pixels."""
    parts = []
    for name, checksum in _BINARY_SHA256.items():
        try:
            content = (folder / name).read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {folder / name} ({error.strerror}); unpack CIFAR-10 again") from error
        if hashlib.sha256(content).hexdigest() != checksum:
            raise DataError(f"{folder / name} is not CIFAR-10's: its SHA-256 is another; unpack or download it again")
        parts.append(np.frombuffer(content, np.uint8).reshape(-1, 1 + 3 * 32 * 32))
    train, test = (
        (np.ascontiguousarray(rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)), rows[:, 0].astype(np.int64))
        for rows in (np.concatenate(parts[:-1]), parts[-1])
    )
    return train, test, CIFAR10_CLASSES


def _tree(name: str, data_root: str, size: int, num_classes: int) -> Splits:
    """An image tree, decoded once for as long as its files are the same."""
    return _decoded(name, _find_tree(name, Path(data_root)), size, num_classes)


@lru_cache(maxsize=2)
def _decoded(name: str, tree: _Tree, size: int, num_classes: int) -> Splits:
    """The same, kept as plain arrays in the cache folder, too."""
    cached = cache_dir() / f"{name}-{tree.identity}-2.npz"  # count up when what decode() takes or gives changes
    arrays = None
    if cached.exists():
        try:
            with np.load(cached) as stored:
                arrays = {key: stored[key] for key in stored.files}
        except Exception:  # a cache cut short is only a cache: decode again
            arrays = None
    if arrays is None or (arrays["train_images"].shape[1], len(arrays["class_names"])) != (size, num_classes):
        arrays = _decode_tree(name, tree, size, num_classes)  # says which image or class is not as expected
        try:
            write_atomically(cached, lambda handle: np.savez(handle, **arrays))
        except OSError as error:
            warnings.warn(f"decoded images could not be cached at {cached} ({error}); set MISLAS_CACHE", stacklevel=2)
    return (
        (arrays["train_images"], arrays["train_targets"]),
        (arrays["test_images"], arrays["test_targets"]),
        tuple(arrays["class_names"].tolist()),
    )


def cache_dir() -> Path:
    """Where decoded images are kept: MISLAS_CACHE, else ``mislas`` in the user's cache folder."""
    own, base = os.environ.get("MISLAS_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own).expanduser() if own else (Path(base) if base else Path.home() / ".cache") / "mislas"


def _find_place(name: str, root: Path) -> Path:
    """The tree's folder or archive; the root itself, if it is a tree of as many classes."""
    if all((root / name / split).is_dir() for split in ("train", "test")):
        return root / name
    archives = [root / f"{name}{suffix}" for suffix in (".tar.xz", ".tar.gz", ".tar")]
    archive = next((path for path in archives if path.is_file()), None)
    if archive is not None:
        return archive
    if all(len(list((root / split).glob("[!.]*/"))) == SPECS[name].num_classes for split in ("train", "test")):
        return root
    raise DataError(
        f"no images for {name!r} under {root}: expected {name}/train/<class>/* and {name}/test/<class>/*, "
        f"or one of {', '.join(p.name for p in archives)}"
    )


@dataclass(frozen=True)
class _Tree:
    """An image tree: its place, a function that iterates over (member name, bytes), and an identity of its files."""

    place: Path
    members: Callable[[], Iterator[tuple[str, bytes]]] = field(compare=False)
    identity: str


def _find_tree(name: str, root: Path) -> _Tree:
    place = _find_place(name, root)
    if place.is_dir():
        pattern = "[!.]*/[!.]*"
        files = sorted(p for split in ("train", "test") for p in (place / split).glob(pattern) if p.is_file())
        listing = "\n".join(f"{p.relative_to(place)} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in files)

        def from_folder() -> Iterator[tuple[str, bytes]]:
            for path in files:
                yield path.relative_to(place).as_posix(), path.read_bytes()

        return _Tree(place, from_folder, hashlib.sha256(listing.encode()).hexdigest()[:16])

    def from_archive() -> Iterator[tuple[str, bytes]]:  # members are read in memory; nothing is extracted to disk
        with tarfile.open(place) as tar:
            for member in tar:
                name = member.name.removeprefix("./")
                if member.isfile() and "/." not in name and name.startswith(("train/", "test/")):
                    yield name, tar.extractfile(member).read()
            if place.suffix == ".tar":  # compression notices a cut by itself
                check_end(tar)

    about = place.stat()
    return _Tree(place, from_archive, _digest(place, about.st_size, about.st_mtime_ns))


def check_end(tar: tarfile.TarFile) -> None:
    """Raise :class:`tarfile.ReadError` if a plain tar does not end where its last member was read: tarfile takes a
    header that is cut or damaged for the end."""
    tar.fileobj.seek(tar.offset)
    rest = tar.fileobj.read()
    if not rest or any(rest):
        raise tarfile.ReadError("it is damaged, or ends early")


@lru_cache(maxsize=8)
def _digest(path: Path, size: int, changed: int) -> str:
    """Of a file's content, read once for as long as its size and time of change are the same."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()[:16]


def _decode_tree(name: str, tree: _Tree, size: int, num_classes: int) -> dict[str, np.ndarray]:
    source = tree.place
    found: dict[str, list[tuple[str, str, np.ndarray]]] = {"train": [], "test": []}
    member = None
    try:
        for member, content in tqdm(tree.members(), desc=f"decode {source.name}", unit=" images", leave=False):
            parts = member.split("/")
            if len(parts) != 3 or parts[0] not in found:
                continue
            pixels = decode(content, f"{source}: {member}")
            if pixels.shape != (size, size, 3):
                raise DataError(f"{source}: {member} is {pixels.shape[1]}x{pixels.shape[0]} pixels, not {size}x{size}")
            found[parts[0]].append((parts[1], parts[2], pixels))
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"{source}: {member} is no image; move it away, or replace it if it should be one") from error
    except Exception as error:  # lzma, tarfile, zlib and Pillow each have their own
        reason = " ".join(str(error).split())
        raise DataError(
            f"{source} is damaged near {member or 'its beginning'} ({reason}); fetch the file again"
        ) from error
    names = sorted({label for label, _, _ in found["train"]})
    if len(names) != num_classes:
        raise DataError(f"{source} has {len(names)} classes under train/; {name!r} has {num_classes}")
    label_of = {label: k for k, label in enumerate(names)}
    arrays: dict[str, np.ndarray] = {"class_names": np.array(names)}
    for split, images in found.items():
        stray = {label for label, _, _ in images} ^ set(names)
        if stray:
            raise DataError(f"{source}: class {min(stray)!r} has no image in train/ or in {split}/")
        images.sort(key=lambda item: item[:2])
        arrays[f"{split}_images"] = np.stack([pixels for _, _, pixels in images])
        arrays[f"{split}_targets"] = np.array([label_of[label] for label, _, _ in images], np.int64)
    return arrays


#: Pillow's modes of at most 8 bits a channel that it turns into RGB; of 16-bit or float pixels it makes white or black.
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")


def decode(content: bytes, name: str) -> np.ndarray:
    """Decode an image with Pillow: uint8 ``(H, W, 3)``, RGB, as it is stored: an EXIF orientation turns nothing.

    Args:
        content: of the image's file.
        name: of that file, for the error.

    Raises:
        DataError: a mode that is not in :data:`MODES`.
        Exception: Pillow's own, of which there are many, for a file that is damaged or no image.
    """
    image = Image.open(io.BytesIO(content))
    if image.mode not in MODES:
        kind = "16-bit or float pixels" if image.mode[0] in "IF" else "pixels of a rare kind"
        raise DataError(f"{name} has {kind} (Pillow's mode {image.mode}): convert to 8 bits first, grey or RGB")
    return np.array(image.convert("RGB"))


def write_atomically(path: Path, write: Callable[[io.BufferedWriter], None], flush: bool = True) -> None:
    """Call ``write`` on a temporary file beside ``path``, flush it to disk, then rename it into place.

    Args:
        flush: False leaves the flush to the system: for many small files, of which each takes a while to flush.

    Raises:
        OSError: it cannot be written; ``path`` is as it was, and the error names it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        with part.open("wb") as handle:
            write(handle)
            if flush:
                handle.flush()
                os.fsync(handle.fileno())
        os.replace(part, path)
    except OSError as error:
        if error.filename is None:  # a full disk does not say which
            error.filename = str(path)
        raise
    finally:
        part.unlink(missing_ok=True)
