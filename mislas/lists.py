"""Long-tailed datasets that do not fit in memory: public list files, and a folder of images::

    data = load_lists("places-lt", root="places", lists="lists")
    data.class_counts      # (219, 20, 115, ...), 365 of them
    data.train.file(0)     # places/data_256/a/airfield/00004851.jpg
    print(check("places-lt", root="places", lists="lists"))

A list has one ``path label`` a line, the path relative to the image root; it may be compressed (``.xz``). Nothing here
is fetched. The images of a batch are read by :mod:`mislas.pipeline`.
"""

from __future__ import annotations

import contextlib
import hashlib
import lzma
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from . import distributed
from .data import (
    LISTS,
    SPECS,
    ListSpec,
    LongTailed,
    cache_dir,
    dataset_name,
    decode,
    groups,
    load,
    long_tailed_counts,
)
from .errors import DataError, MislasError, unknown

#: A file in an image root that says how its images differ from the original ones.
PREPARED = "PREPARED.txt"


@dataclass(frozen=True)
class ImageList:
    """The images of one list file; only their paths are in memory.

    Attributes:
        root: the folder that paths start from.
        paths: relative, with forward slashes.
        targets: int64, ``(N,)``, in ``0 .. num_classes - 1``; every class occurs.
        num_classes: K.
    """

    root: Path
    paths: tuple[str, ...] = field(repr=False)
    targets: Tensor = field(repr=False)
    num_classes: int

    def __len__(self) -> int:
        return len(self.paths)

    def file(self, i: int) -> Path:
        """Where the i-th image lies."""
        return self.root / self.paths[i]

    def only(self, which: Tensor) -> ImageList:
        """The images in ``which``: indices, or bool ``(N,)``; their order in the list is kept for bool."""
        index = which.nonzero()[:, 0] if which.dtype == torch.bool else which
        return replace(self, paths=tuple(self.paths[i] for i in index.tolist()), targets=self.targets[index])

    @cached_property
    def class_counts(self) -> tuple[int, ...]:
        """Images per class, in label order."""
        return tuple(torch.bincount(self.targets, minlength=self.num_classes).tolist())

    @cached_property
    def groups(self) -> dict[str, list[int]]:
        """Classes of "many", "medium" and "few"; see :func:`mislas.data.groups`."""
        return groups(self.class_counts)

    @cached_property
    def checksum(self) -> str:
        """First 16 hex digits of the SHA-256 over the list's lines; pixels are not read. A compressed list is the same
        list."""
        lines = "".join(f"{path} {label}\n" for path, label in zip(self.paths, self.targets.tolist(), strict=True))
        return hashlib.sha256(lines.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class ListDataset(LongTailed):
    """A dataset of list files: a long-tailed training list and its balanced test list.

    Attributes:
        name: canonical name (a key of :data:`mislas.data.LISTS`).
        train, test: the two lists.
    """

    name: str
    train: ImageList
    test: ImageList

    @property
    def train_targets(self) -> Tensor:
        return self.train.targets

    @property
    def test_targets(self) -> Tensor:
        return self.test.targets

    @property
    def imbalance(self) -> float:
        """N_max / N_min of the whole training list."""
        return self.spec.imbalance

    def only(self, which: Tensor, targets: Tensor | None = None) -> ListDataset:
        """As :meth:`mislas.data.Dataset.only`."""
        train = self.train.only(which)
        return replace(self, train=train if targets is None else replace(train, targets=targets))

    @property
    def prepared(self) -> str:
        """What :func:`mislas.pipeline.shrink` has done to the images; empty if they are the original ones."""
        note = self.train.root / PREPARED
        return note.read_text().strip() if note.exists() else ""

    @property
    def checksum(self) -> str:
        """Of both lists (see :attr:`ImageList.checksum`) and of :attr:`prepared`."""
        return hashlib.sha256((self.train.checksum + self.test.checksum + self.prepared).encode()).hexdigest()[:16]


def load_lists(name: str, root: str | os.PathLike, lists: str | os.PathLike | None = None) -> ListDataset:
    """Read the two lists of a dataset, hold them to their :class:`mislas.data.ListSpec`, and make sure that every image
    is there; none is opened.

    Args:
        name: a key of :data:`LISTS`.
        root: the folder that the lists' paths start from.
        lists: the folder with the list files; None is ``root``.

    Raises:
        DataError: a list that is missing or wrong (see :func:`read_list`), or has other numbers of images than its
            ``ListSpec`` says; an image in both lists; images that are missing.
        MislasError: unknown name.
    """
    name = dataset_name(name)
    if name not in LISTS:
        unknown("dataset of list files", name, LISTS)
    spec, root = LISTS[name], Path(root).expanduser()
    folder = root if lists is None else Path(lists).expanduser()
    files = {"train": folder / spec.train_list, "test": folder / spec.test_list}
    both = {split: read_list(file, root, spec.num_classes) for split, file in files.items()}
    for split, images in both.items():
        if wrong := _unexpected(images, spec, split):
            found = f"list {files[split]}: {_sizes(images)}"
            raise DataError(f"{found}; {wrong}; fetch it again, or correct the ListSpec of {name!r}")
    if overlap := _overlap(**both):
        raise DataError(f"lists {spec.train_list} and {spec.test_list} in {folder}: {overlap}; take them out of one")
    for images in both.values():
        missing = missing_files(images)
        if missing:
            raise DataError(explain_missing(images, missing))
    return ListDataset(name, **both)


def load_from(name: str, data_root: str | os.PathLike | None) -> ListDataset:
    """A dataset in the one layout that training knows: images under ``data_root/NAME``, and the two list files in that
    folder or in ``data_root/lists``.

    ``generated`` is written to the cache folder if there is no ``data_root/generated``.

    Raises:
        DataError: no such folder, no list, or what :func:`load_lists` finds wrong.
    """
    spec = LISTS[name]
    if name == "generated" and (data_root is None or not (Path(data_root) / name).is_dir()):
        return load_lists(name, _generated())
    layout = f"a folder {name}/ with the images (or a link to it), and in it or in lists/ {spec.train_list} and "
    layout += f"{spec.test_list}, which may end in .xz"
    if data_root is None:
        raise DataError(f"dataset {name!r} needs data_root, a folder with {layout}; 'generated' needs none")
    root = Path(data_root) / name
    if not root.is_dir():
        raise DataError(f"no images for {name!r} under {data_root}: expected {layout}")
    for folder in (root, root.parent / "lists"):
        if any((folder / f"{spec.train_list}{suffix}").exists() for suffix in ("", ".xz")):
            return load_lists(name, root, folder)
    raise DataError(f"no list {spec.train_list} under {data_root}: expected {layout}")


def _generated() -> Path:
    """Where ``generated`` is, written there first if it is not."""
    root = cache_dir() / "generated-1"  # count up when generate() changes
    if not root.is_dir():
        try:
            root.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=root.parent, prefix=".generated-") as folder:
                generate(Path(folder) / "new")
                with contextlib.suppress(OSError):  # another process was faster
                    (Path(folder) / "new").rename(root)
        except OSError as error:
            raise DataError(
                f"the generated images cannot be written to {root} ({error}); set MISLAS_CACHE to a folder that can be "
                "written, or put generated/ into data_root"
            ) from error
    return root


# --------------------------------------------------------------------------------------------------- reading a list


def read_list(file: str | os.PathLike, root: str | os.PathLike, num_classes: int) -> ImageList:
    """Read a list file; images are not looked for.

    Args:
        file: ``path label`` a line; if it is not there, the same name with ``.xz``. Empty lines are passed over.
        root: the folder that paths start from.
        num_classes: K; labels are ``0 .. K - 1``.

    Raises:
        DataError: a file that is missing, damaged or empty; a line that is not ``path label``; a path that leaves the
            root; a label that is not in ``0 .. K - 1``; a class without an image.
    """
    file = Path(file)
    file = file if file.exists() else file.with_name(f"{file.name}.xz")
    try:
        opened = lzma.open if file.suffix == ".xz" else open
        with opened(file, "rt", encoding="utf-8-sig") as handle:  # some editors write a byte-order mark
            lines = handle.read().splitlines()
    except FileNotFoundError:
        raise DataError(
            f"no list file {file.with_suffix('')} or {file.name}; name the folder that has it with --lists"
        ) from None
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise DataError(f"list {file} cannot be read ({error}); fetch it again") from error
    paths, labels = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        path, *label = line.strip().rsplit(maxsplit=1)
        where = f"list {file}, line {number}"
        if not label:
            raise DataError(f"{where}: {path[:80]!r} has no label; a line is 'path label'")
        if not (label[0].isascii() and label[0].isdigit() and len(label[0]) < 10 and int(label[0]) < num_classes):
            raise DataError(f"{where}: label {label[0][:20]!r} is not an integer in 0..{num_classes - 1}")
        if "\\" in path:
            raise DataError(f"{where}: {path[:80]!r} has backslashes; paths have forward slashes")
        if path.startswith("/") or ".." in path.split("/"):
            raise DataError(f"{where}: {path[:80]!r} leaves the image root; paths are relative, without '..'")
        paths.append(path)
        labels.append(int(label[0]))
    if not paths:
        raise DataError(f"list {file} is empty; fetch it again")
    targets = torch.tensor(labels, dtype=torch.int64)
    empty = np.flatnonzero(np.bincount(targets.numpy(), minlength=num_classes) == 0)
    if len(empty):
        raise DataError(
            f"list {file} has no image of {len(empty)} of its {num_classes} classes ({_first(empty)}); "
            "every class needs at least one"
        )
    return ImageList(Path(root), tuple(paths), targets, num_classes)


def missing_files(images: ImageList) -> list[str]:
    """Paths of a list that are not under its root. Each folder is listed once, which is fast on network drives too."""
    folders: dict[str, list[str]] = defaultdict(list)
    for path in images.paths:
        folder, _, name = path.rpartition("/")
        folders[folder].append(name)
    missing = []
    for folder, names in folders.items():
        try:
            there = set(os.listdir(images.root / folder))
        except OSError:
            there = set()
        missing += [f"{folder}/{name}".lstrip("/") for name in names if name not in there]
    return missing


def explain_missing(images: ImageList, missing: Sequence[str]) -> str:
    """One line about missing images; if all are missing, where they may be."""
    root = images.root
    if len(missing) == len(images):
        examples = [images.paths[i] for i in (0, len(images) // 2, -1)]
        nearby = sorted(p for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
        for other in [*nearby, root.resolve().parent]:
            if any((other / path).is_file() for path in examples):
                return f"no image of the list is under {root}, but under {other}: use that as the root"
        for path in examples:
            first, _, rest = path.partition("/")
            if rest and (root / rest).is_file():
                return (
                    f"no image of the list is under {root}: its paths begin with {first!r}, and the images are there "
                    f"without it; move them into {root / first}"
                )
    return (
        f"{len(missing):,} of {len(images):,} images are missing under {root} ({_first(missing)}); "
        "complete the images, or choose another root"
    )


def _first(items: Sequence) -> str:
    return ", ".join(map(str, items[:3])) + (", ..." if len(items) > 3 else "")


# --------------------------------------------------------------------------------------------------------- decoding


def read_image(path: Path) -> Tensor:
    """Decode an image file: uint8 ``(3, H, W)``, RGB.

    JPEGs go through torchvision's decoder, which is faster; what it does not take, every other format, and everything
    where torchvision has no decoder, through Pillow. Both use libjpeg: pixels differ by 1 of 255 at most.

    Raises:
        DataError: a file that is missing, cut short, no image, or not of 8 bits a channel (see
            :func:`mislas.data.decode`).
    """
    try:
        content = path.read_bytes()
        decode_jpeg = _jpeg_decoder()
        if decode_jpeg and content[:2] == b"\xff\xd8":
            try:
                return decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8))
            except (RuntimeError, AttributeError):  # damage, a rare kind of JPEG, or torchvision built without libjpeg
                pass
        pixels = decode(content, f"image {path}")
    except DataError:
        raise
    except Exception as error:  # Pillow has many
        raise DataError(f"image {path} cannot be decoded ({' '.join(str(error).split())}); fetch it again") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


@lru_cache(maxsize=1)
def _jpeg_decoder() -> Callable[[Tensor], Tensor] | None:
    try:  # deprecated since torchvision 0.29: one day it will be gone
        from torchvision.io import ImageReadMode, decode_jpeg
    except ImportError:
        return None
    return partial(decode_jpeg, mode=ImageReadMode.RGB)


# --------------------------------------------------------------------------------------------------------- checking


@dataclass
class Report:
    """What :func:`check` found; ``print`` shows it.

    Attributes:
        title: what was checked.
        rows: (what, found, wrong); ``wrong`` is empty if all is well.
        note: see :attr:`ListSpec.note`.
    """

    title: str
    rows: list[tuple[str, str, str]] = field(default_factory=list)
    note: str = ""

    @property
    def ok(self) -> bool:
        return not any(wrong for _, _, wrong in self.rows)

    def add(self, what: str, found: str, wrong: str = "") -> None:
        self.rows.append((what, found, wrong))

    def __str__(self) -> str:
        lines = [self.title]
        for what, found, wrong in self.rows:
            text = "; ".join(part for part in (found, wrong) if part)
            lines.append(f"{'WRONG' if wrong else 'ok':5}  {what:12}  {text}")
        if self.note:
            lines.append(f"note   {self.note}")
        return "\n".join([*lines, "all is well" if self.ok else "the data are not as they should be"])


def check(
    name: str, root: str | os.PathLike | None, lists: str | os.PathLike | None = None, progress: bool = True
) -> Report:
    """Hold a dataset against what is expected of it: counts, classes, missing files; and decode every image.

    Args:
        name: a key of :data:`LISTS`, or an in-memory dataset of :data:`mislas.data.SPECS`.
        root: the folder with the images; ``digits`` needs none.
        lists: the folder with the list files; None is ``root``.
        progress: whether to show a progress bar.

    Raises:
        MislasError: an unknown name, or a folder that does not exist. What is wrong with the data is in the report.
    """
    name = dataset_name(name)
    if root is None and name != "digits":
        raise MislasError(f"checking {name!r} needs --root, the folder with its images; 'digits' needs none")
    for option, folder in (("--root", root), ("--lists", lists)):
        if folder is not None and not Path(folder).expanduser().is_dir():
            raise MislasError(f"{option} is an existing folder, got {str(folder)!r}")
    if name in SPECS:
        return _check_in_memory(name, root)
    return _check_lists(name, Path(root).expanduser(), lists, progress)


def _check_in_memory(name: str, root: str | os.PathLike | None) -> Report:
    spec = SPECS[name]
    report = Report(f"{name}: {spec.title}")
    try:
        data = load(name, root, imbalance=1)
    except DataError as error:
        report.add("images", "", str(error))
        return report
    expected = spec.train_per_class
    sizes = _span(min(data.class_counts), max(data.class_counts))
    found = f"{len(data.train_targets):,} images of {data.num_classes} classes, {sizes} a class"
    report.add("train", found, "" if set(data.class_counts) == {expected} else f"expected {expected} a class")
    report.add("test", f"{len(data.test_targets):,} images", _uneven(data.test_targets, data.num_classes))
    report.add("checksum", data.checksum)
    return report


def _uneven(targets: Tensor, num_classes: int) -> str:
    counts = torch.bincount(targets, minlength=num_classes)
    low, high = int(counts.min()), int(counts.max())
    return "" if low == high else f"expected a balanced test set, got {_span(low, high)} a class"


def _span(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _sizes(images: ImageList) -> str:
    counts = images.class_counts
    return f"{len(images):,} images of {images.num_classes:,} classes, {_span(min(counts), max(counts))} a class"


def _unexpected(images: ImageList, spec: ListSpec, split: str) -> str:
    """How many images ``spec`` expects of a list, ``train`` or ``test``, that has others; empty if it has those."""
    expected = getattr(spec, split)
    if len(images) != expected:
        return f"expected {expected:,} images"
    if split == "train" and (min(images.class_counts), max(images.class_counts)) != (spec.smallest, spec.largest):
        return f"expected {spec.smallest:,} to {spec.largest:,} a class"
    return ""


def _overlap(train: ImageList, test: ImageList) -> str:
    """What images two lists share; empty if none."""
    both = sorted(set(train.paths) & set(test.paths))
    return f"{len(both):,} images are in both lists ({_first(both)})" if both else ""


def _check_lists(name: str, root: Path, lists: str | os.PathLike | None, progress: bool) -> Report:
    spec = LISTS[name]
    report = Report(f"{name}: {spec.title}, images under {root}", note=spec.note)
    folder = root if lists is None else Path(lists).expanduser()
    found: dict[str, ImageList] = {}
    for split, file in (("train", spec.train_list), ("test", spec.test_list)):
        try:
            images = found[split] = read_list(folder / file, root, spec.num_classes)
        except DataError as error:
            report.add(f"{split} list", "", str(error))
            continue
        wrong = _unexpected(images, spec, split)
        if split == "test":
            wrong = wrong or _uneven(images.targets, spec.num_classes)
        twice = len(images) - len(set(images.paths))
        report.add(f"{split} list", _sizes(images), wrong or (f"{twice:,} lines repeat a path" if twice else ""))
    if len(found) == 2:
        overlap = _overlap(found["train"], found["test"])
        report.add("overlap", "" if overlap else "no image is in both lists", overlap)
        sizes = {group: len(classes) for group, classes in found["train"].groups.items()}
        report.add("groups", ", ".join(f"{group} {size}" for group, size in sizes.items()) + " classes")
    for split, images in found.items():
        missing = missing_files(images)
        there = sorted(set(images.paths) - set(missing))
        found_all = f"all {len(images):,} are there"
        report.add(f"{split} files", *(("", explain_missing(images, missing)) if missing else (found_all,)))
        if not there:
            continue
        bad = _undecodable(root, there, f"decode {split}", progress)
        wrong = f"{len(bad):,} cannot be decoded: {_first(list(bad))}" if bad else ""
        why = next(filter(None, bad.values()), "")
        report.add(f"{split} images", f"{len(there) - len(bad):,} of {len(there):,} can be decoded", wrong + why)
    return report


def _undecodable(root: Path, paths: Sequence[str], what: str, progress: bool) -> dict[str, str]:
    """Paths of files that cannot be decoded, in order, and why if they are not damaged."""

    def bad(path: str) -> str | None:
        try:
            read_image(root / path)
        except DataError as error:
            return "" if error.__cause__ else f"; {error}"
        return None

    found = zip(paths, in_threads(bad, paths, what, progress), strict=True)
    return {path: why for path, why in found if why is not None}


def in_threads(function: Callable[[str], Any], paths: Sequence[str], what: str, progress: bool) -> Iterator[Any]:
    """``map`` over paths in threads, with a progress bar: reading and decoding happen outside Python's lock."""
    hidden = {} if progress else {"disable": True}  # not said otherwise, TQDM_DISABLE has its way
    with (
        ThreadPoolExecutor(distributed.processors()) as pool,
        tqdm(total=len(paths), desc=what, unit=" images", mininterval=1.0, leave=False, **hidden) as bar,
    ):
        for start in range(0, len(paths), 512):  # a few at a time, so that it can be stopped
            for result in pool.map(function, paths[start : start + 512]):
                bar.update()
                yield result


# ------------------------------------------------------------------------------------------------------- generated


def generate(root: str | os.PathLike, seed: int = 0) -> None:
    """Write the dataset ``generated``: a tree of small JPEGs and its two lists, long-tailed at imbalance factor 20.

    Six classes of noisy gratings that differ in direction and colour, of 36 to 72 pixels a side: enough to learn
    something in seconds. The same seed gives the same pixels.

    Args:
        root: a folder, made if it is not there; it becomes both image root and folder of the lists.
        seed: of the noise.
    """
    spec, root = LISTS["generated"], Path(root)
    rng = np.random.default_rng(seed)
    counts = {
        "train": long_tailed_counts(spec.largest, spec.largest / spec.smallest, spec.num_classes),
        "test": (spec.test // spec.num_classes,) * spec.num_classes,
    }
    for split, file in (("train", spec.train_list), ("test", spec.test_list)):
        lines = []
        for k, count in enumerate(counts[split]):
            folder = root / split / f"class{k}"
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                Image.fromarray(_grating(rng, k, spec.num_classes)).save(folder / f"{i:04d}.jpg", quality=90)
                lines.append(f"{split}/class{k}/{i:04d}.jpg {k}\n")
        (root / file).write_text("".join(lines))


def _grating(rng: np.random.Generator, k: int, num_classes: int) -> np.ndarray:
    height, width = rng.integers(36, 73, size=2)
    angle = np.pi * k / num_classes + rng.normal(0, 0.15)
    y, x = np.mgrid[:height, :width]
    wave = np.sin(0.6 * (x * np.cos(angle) + y * np.sin(angle)) + rng.uniform(0, 2 * np.pi))
    colour = 0.5 + 0.5 * np.cos(2 * np.pi * (k / num_classes + np.arange(3) / 3))
    image = 128 + 50 * wave[..., None] * colour + rng.normal(0, 30, size=(height, width, 3))
    return np.clip(image, 0, 255).astype(np.uint8)
