"""Fill the store: the wanted runs in order of worth, within a time budget, on whatever machine is at hand.

A campaign can be killed at any moment and goes on where it was. Time often comes in slices on machines that start bare:
what a slice has made, finished or under way, is packed into one archive and merged into the store elsewhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import tarfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors

from . import paper
from .config import Adjustment, RunConfig
from .data import LISTS, dataset_name, spec_of, training_images, write_atomically
from .errors import MislasError, RecordError
from .evaluate import BINS, reliability
from .methods import SETTINGS, configure
from .runs import Record, Store, plan, read_record, run
from .study import BRIEF, FORMS, GRID, LEARNED, SHORT, Rows, authors_variants, balanced
from .train import Options, OutOfTime

TABLE_3 = ("ce", "mixup", "mislas", "crt+mixup", "lws+mixup", "crt", "lws", "lws+mixup+shift", "lws+las")

#: Table 3's methods that share no Stage-1, and rules that cost nothing once Stage-1 is there.
OTHERS = ("ldam+drw", "bbn", "remix+drw")
RULES = ("ncm", "ncm+mixup", "logit-adjustment")

#: What open questions ask of other Stage-1s: a weight decay that the authors recommend, by title; images held out.
WEIGHT_DECAY = {
    "5e-4 in both stages": {"stage1.weight_decay": 5e-4, "stage2.weight_decay": 5e-4},
    "5e-4 in Stage-1": {"stage1.weight_decay": 5e-4},
    "5e-4 in Stage-2": {"stage2.weight_decay": 5e-4},
}
HELD_OUT = ("temperature", "temperature+mixup")

#: Table 1's last rows: mixup in Stage-2, too.
STAGE2_MIXUP = {"stage2.mixup": 1.0}


def wanted(
    dataset: str, imbalances: Sequence[float | None] | None = None, seeds: Sequence[int] = (0,)
) -> list[RunConfig]:
    """What the book would like to show of a dataset, most wanted first.

    The imbalance factors are 100, 50 and 10 unless others are asked for.

    At each imbalance factor Table 3's rows; what costs little beside them, on the same Stage-1: the grid and the forms
    of label-aware smoothing, the authors' variants, the controls of Table 1 and of Figure 6
    (:data:`mislas.study.LEARNED`); the balanced model, and one of as many images as the first imbalance factor leaves;
    Table 3's other methods; what open questions ask at the first imbalance factor; then the same for the next seed. Of
    a dataset of list files it is what its tables and figures have, with their backbones; it has one imbalance factor.
    Of Tiny-ImageNet at 64 pixels it is the same as of ImageNet-LT, at imbalance factor 100, after Table 1's rows on
    :data:`mislas.study.SHORT`, and the balanced model.
    """
    large = dataset_name(dataset) in (*LISTS, "tinyimagenet64")
    imbalances = imbalances or ((None,) if large else (100, 50, 10))
    if large:
        rows = _large(dataset_name(dataset))
        configs = [configure(dataset, m, i, seed, more) for seed in seeds for i in imbalances for m, more in rows]
        if dataset_name(dataset) not in LISTS:  # Figure 8's balanced model
            plain = [{"backbone": backbone} for backbone in ("resnet10", "resnet50")]
            configs += [configure(dataset, "ce", 1, seed, more) for seed in seeds for more in plain]
        return list({config.id: config for config in configs}.values())
    configs = []
    for seed in seeds:
        first = imbalances[0]
        configs += [configure(dataset, method, imbalance, seed) for imbalance in imbalances for method in TABLE_3]
        for imbalance in imbalances:
            variants = [*GRID, *FORMS, *authors_variants(dataset, imbalance).values()]
            configs += [configure(dataset, "mislas", imbalance, seed, changes) for changes in variants]
            for rows in LEARNED.values():
                configs += [configure(dataset, method, imbalance, seed, changes) for method, changes in _runs(rows)]
            configs += [configure(dataset, m, imbalance, seed, STAGE2_MIXUP) for m in ("crt+mixup", "lws+mixup")]
            configs += [configure(dataset, method, imbalance, seed) for method in RULES]
        configs += [configure(dataset, "ce", first, seed, changes) for changes in balanced(dataset, first).values()]
        configs += [configure(dataset, method, imbalance, seed) for method in OTHERS for imbalance in imbalances]
        configs += [configure(dataset, "mislas", first, seed, changes) for changes in WEIGHT_DECAY.values()]
        configs += [configure(dataset, method, first, seed) for method in HELD_OUT]
        rows, changes = BRIEF.get(dataset_name(dataset), ({}, {}))
        configs += [configure(dataset, method, first, seed, changes | more) for method, more in _runs(rows)]
    return list({config.id: config for config in configs}.values())


def _runs(rows: Rows) -> list[tuple[str, dict[str, Any]]]:
    """The runs of rows such as :data:`mislas.study.LEARNED` has, without the blanks."""
    return [run for row in rows.values() for run in row if run]


def _large(dataset: str) -> list[tuple[str, dict[str, Any]]]:
    """What Tables 1, 4, 6, 7, 8 and Figures 2, 8, 9 have of a dataset of list files, as (method, changes)."""
    rows = [(method, {}) for method in ("ce", "mixup", "mislas", "crt+mixup", "lws+mixup", "crt", "lws")]
    rows += [(method, {}) for method in paper.TABLE4.get(dataset, ())]
    rows += [(method, {}) for method in {"inaturalist18": paper.TABLE7, "places-lt": paper.TABLE8}.get(dataset, ())]
    heads, mixed = ("crt", "lws", "crt+mixup", "lws+mixup"), {"stage2.mixup": SETTINGS[dataset].mixup}
    if dataset == "tinyimagenet64":
        rows = [(method, SHORT) for method in ("ce", "mixup", *heads, "mislas")]
        rows += [(method, SHORT | mixed) for method in heads]
    if dataset in ("imagenet-lt", "tinyimagenet64"):
        for backbone in ("resnet50", "resnet10", "resnet101", "resnet152"):
            network = {"backbone": backbone}
            rows += [(method, network) for method in ("ce", "mixup", *heads)]
            rows += [(method, network) for method in paper.TABLE6.get(backbone, ())]
            rows += [(method, network | mixed) for method in heads]
    return rows


def parse_budget(text: str) -> float:
    """``"90s"``, ``"9m"``, ``"1.5h"`` to seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if not match or float(match[1]) == 0:
        raise MislasError(f"a budget is a number above 0 and a unit, such as 90s, 9m or 1.5h, got {text!r}")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


Rates = dict[tuple, float]


@dataclass(frozen=True)
class Job:
    """Runs that train together, and what that costs.

    Attributes:
        group: the runs.
        passes: training images through the network, forward and (in Stage-1) backward.
    """

    group: list[RunConfig]
    passes: int

    def seconds_at(self, rates: Rates) -> float | None:
        """What it takes at a device's rates (see :func:`images_per_second`); None if they have none of the kind."""
        rate = rates.get(_kind(self.group[0]))
        return None if rate is None else self.passes / rate

    def __str__(self) -> str:
        first = self.group[0]
        stage = "stage2" if first.stage2 else "stage1"
        names = [config.method for config in self.group]
        counts = {name: names.count(name) for name in names}
        what = ", ".join(f"{name} x{count}" if count > 1 else name for name, count in counts.items())
        return f"{first.data_title} seed {first.seed} {stage}: {what}   ({self.passes:,} images)"


def jobs(configs: Iterable[RunConfig], store: Store) -> list[Job]:
    """What :func:`campaign` would do, in order; ``together`` pulls Stage-1 runs forward."""
    return [Job(group, _epochs(group[0]) * _images(group[0])) for group in plan(configs, store)]


def _epochs(config: RunConfig) -> int:
    """Passes over the training images; a rule looks at them once, whatever it shifts."""
    if isinstance(config.stage2, Adjustment):
        return 1 + (config.stage2.shift_epochs or 0)
    return (config.stage2 or config.stage1).epochs


def _images(config: RunConfig) -> int:
    return training_images(config.dataset, config.imbalance, config.n_max)


def _kind(config: RunConfig) -> tuple:
    one = config.stage1
    kind = (one.second_sampler is not None, one.group, one.distillation is not None) if config.stage2 is None else ()
    return type(config.stage2).__name__, kind, config.backbone, config.precision, spec_of(config.dataset).size


def estimate(planned: Sequence[Job], rates: dict[str, Rates]) -> str:
    """Hours that jobs take, in words, on the device that has rates for most of their work, and of such the fastest;
    "more than" where it has rates for some of them only. Empty if no device has any."""
    costs = []
    for device, known in rates.items():
        told = [job for job in planned if job.seconds_at(known) is not None]
        if told:
            seconds = sum(job.seconds_at(known) for job in told)
            about = "about" if len(told) == len(planned) else "more than"
            costs.append((-sum(job.passes for job in told), seconds, f"{about} {seconds / 3600:.1f} h on {device}"))
    return min(costs)[-1] if costs else ""


def images_per_second(store: Store) -> dict[str, Rates]:
    """How fast each device of the store's records was, by kind of run (stage, network, precision, image size): the
    median of its runs."""
    rates: dict[str, dict[tuple, list[float]]] = {}
    for record in store:
        source = record.provenance
        if "together" in source:  # the seconds are not its own
            continue
        if source["seconds"] > 0 and record.config.stage1.holdout is None:  # those saw fewer images
            images = sum(source["class_counts"]) * _epochs(record.config)
            kinds = rates.setdefault(source["device"], {})
            kinds.setdefault(_kind(record.config), []).append(images / source["seconds"])
    return {device: {kind: median(found) for kind, found in kinds.items()} for device, kinds in rates.items()}


def campaign(
    configs: Sequence[RunConfig], store: Store, data_root: str | None, options: Options, budget: float | None = None
) -> bool:
    """Train what is missing, in order, until it is done or the budget is spent.

    Args:
        budget: seconds; training stops, checkpointed, before they are over (by the length of the epochs seen so far).

    Returns:
        Whether everything wanted is in the store.
    """
    if budget is not None:
        options = replace(options, deadline=time.monotonic() + budget)
    try:
        run(configs, store, data_root, options)
    except OutOfTime:
        return False
    return True


# ------------------------------------------------------------------------------------------------- pack and merge

_MEMBER = re.compile(r"\w[\w.-]*/\w[\w.-]*\.(json|npz|safetensors|ckpt)")
_SUFFIXES = (".npz", ".safetensors", ".json")  # records last: what has one is complete

Members = dict[str, bytes]  #: Files, by their path in a store.
Checkpoint = tuple[list[str], int]  #: Identities of the runs that train together, and their epoch.


def pack(configs: Iterable[RunConfig], store: Store, archive: Path) -> int:
    """Bring an archive up to date: all files of the runs that a campaign asks for and of those that they build on, as
    far as the store has them, and every checkpoint.

    What the store had before the campaign is packed, too. So nothing has to be remembered, and what a campaign left
    when it was killed is packed when it starts again. An archive never loses a run: those that it has stay as they
    are, of two checkpoints of the same runs it keeps the one further on, and only those of finished runs go.

    Args:
        configs: what the campaign asks for.
        archive: the tar. It is written each time, so that a call before anything trains shows whether it can be.

    Returns:
        How many files the archive has now.

    Raises:
        RecordError: the archive is there and is damaged or something else, or the store is damaged.
        OSError: the archive cannot be written; it is as it was.
    """
    kept = _read_archive(archive) if archive.exists() else {}
    found: Members = {}
    for path in store.under_way():  # before the runs, of which another process may finish one meanwhile
        with contextlib.suppress(FileNotFoundError):
            found[path.relative_to(store.root).as_posix()] = path.read_bytes()
    for config in {c.id: c for asked in configs for c in (asked, asked.stage1_only, *asked.experts)}.values():
        record = store.get(config)
        paths = [store.find(config, suffix) for suffix in _SUFFIXES] if record else []
        found |= {_name(record.config, path.suffix): path.read_bytes() for path in paths if path.exists()}
    old_records, old = _check(kept, archive)
    new_records, new = _check(found, store.root)
    further = {name: found[name] for name, (_, epoch) in new.items() if name in old and epoch > old[name][1]}
    members = found | kept | further
    finished = _finished([*old_records.values(), *new_records.values()], members)
    for name, (runs, _) in (old | new).items():
        if finished.issuperset(runs):
            del members[name]

    def write(handle: io.BufferedWriter) -> None:
        with tarfile.open(fileobj=handle, mode="w") as tar:
            for name, data in sorted(members.items()):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))

    write_atomically(archive, write)
    return len(members)


def merge(archive: Path, store: Store) -> list[Record]:
    """Add what an archive holds to a store. All of it is checked first: one flaw, and nothing is added.

    A run that is there already stays as it is, and must agree in configuration and measures; it gets what it lacks,
    such as weights. Of two checkpoints of the same runs the one further on is kept; those of finished runs are passed
    over.

    Returns:
        The records added.

    Raises:
        RecordError: damage, in the archive or in what the store has of its runs; a member that does not belong in a
            store; measures that do not follow from the predictions; or a conflict.
    """
    members = _read_archive(archive)
    records, checkpoints = _check(members, archive)
    writes = []
    for stem, record in records.items():
        existing = store.get(record.config)
        if existing is not None and existing.metrics != record.metrics:
            raise RecordError(
                f"{archive}: run {record.config.id} is in the store with other measures; keep one: delete "
                f"{existing.path} to take the archive's, or leave the archive alone"
            )
        lacks = [s for s in _SUFFIXES if existing is None or not store.find(record.config, s).exists()]
        writes += [stem + suffix for suffix in lacks if stem + suffix in members]
    there = [path for runs, _ in checkpoints.values() for run in runs for path in store.root.glob(f"*/*-{run}.*")]
    known = [read_record(path) for path in there if path.suffix == ".json"]
    finished = _finished([*records.values(), *known], [*members, *map(str, there)])
    for name, (runs, epoch) in checkpoints.items():
        path = store.root / name
        stored = _read_checkpoint(path.read_bytes(), path)[1] if path.exists() else -1
        if epoch > stored and not finished.issuperset(runs):
            writes.append(name)
    for name in writes:
        write_atomically(store.root / name, lambda handle, name=name: handle.write(members[name]))
    return [read_record(store.root / name) for name in writes if name.endswith(".json")]


def _name(config: RunConfig, suffix: str) -> str:
    return Store("").path(config, suffix).as_posix()


def _read_archive(archive: Path) -> Members:
    try:
        with tarfile.open(archive, "r:") as tar:
            return {member.name: tar.extractfile(member).read() if member.isfile() else b"" for member in tar}
    except (OSError, tarfile.TarError, ValueError) as error:
        raise RecordError(f"{archive} cannot be read ({error}); copy it again, or name another file") from error


def _check(members: Members, where: Path) -> tuple[dict[str, Record], dict[str, Checkpoint]]:
    """Check files of a store, each by itself and against the rest of its run.

    Returns:
        The records by name without ending, and the checkpoints by name.

    Raises:
        RecordError: a file is damaged, has a name that a store would not give it, or does not fit its run; or its run
            is not whole.
    """
    records: dict[str, Record] = {}
    for name, data in members.items():
        if not _MEMBER.fullmatch(name):
            raise RecordError(f"{where}: {name!r} does not belong in a store; take it out")
        if name.endswith(".json"):
            record = read_record(where / name, data.decode(errors="replace"))
            if name != _name(record.config, ".json"):
                raise RecordError(f"{where}: {name} does not belong there, but at {_name(record.config, '.json')}")
            records[name.removesuffix(".json")] = record
    checkpoints: dict[str, Checkpoint] = {}
    for name, data in members.items():
        stem, _, suffix = name.rpartition(".")
        if suffix == "ckpt":
            checkpoints[name] = _read_checkpoint(data, where / name)
        elif stem not in records:
            raise RecordError(f"{where}: {name} comes without its record; restore that, or take this out")
        elif suffix == "json" and f"{stem}.npz" not in members:
            raise RecordError(f"{where}: {name} comes without its .npz; restore that, or take this out")
        elif suffix == "npz":
            _check_measures(records[stem], data, where / name)
        elif suffix == "safetensors":
            read_weights(data, records[stem].config.id, where / name)
    return records, checkpoints


def _check_measures(record: Record, data: bytes, path: Path) -> None:
    """Hold a record's measures against its ``.npz``, every array of which must be whole."""
    try:
        with np.load(io.BytesIO(data)) as stored:
            arrays = {key: stored[key] for key in stored.files}
        names = ("target", "predicted", "confidence", "true_probability")
        target, predicted, confidence, _ = np.stack([arrays[name] for name in names])
        ece = reliability(confidence / 65535, predicted == target).ece
    except Exception as error:
        raise RecordError(f"{path} is damaged ({type(error).__name__}); restore it, or take its run out") from error
    # Rounding to steps of 1 / 65535 may have moved those at the edge of two bins: each adds up to 1 / N to both gaps.
    moved = (confidence % (65535 // BINS) == 0) & (confidence < 65535)
    for name, value, within in (
        ("accuracy", np.mean(predicted == target), 1e-5),
        ("ece", ece, 1e-5 + 2 * np.mean(moved)),
    ):
        said = record.metrics.get(name) if isinstance(record.metrics, dict) else None
        if not isinstance(said, int | float) or not abs(said - value) <= within:  # NaN is not within anything
            raise RecordError(f"{path} gives {name} {value:.4f}, its record says {said}; restore both or take both out")


def read_weights(content: bytes, run: str, path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a weights file.

    Args:
        content: what is in the file.
        run: identity of the run whose weights they must be.
        path: the file, for messages.

    Raises:
        RecordError: the file is damaged, or has the weights of another run.
    """
    try:
        tensors = load_safetensors(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    except (SafetensorError, ValueError) as error:
        raise RecordError(
            f"{path} is damaged ({type(error).__name__}); restore it, or delete it and train Stage-1 again"
        ) from error
    owner = header.get("__metadata__", {}).get("run", "unknown")
    if owner != run:
        raise RecordError(
            f"{path} has the weights of run {owner}, not of {run}; restore it, or delete it and train Stage-1 again"
        )
    return tensors


def _read_checkpoint(data: bytes, path: Path) -> Checkpoint:
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        runs, epoch = content["runs"], int(content["epoch"])
        own = runs[0] if len(runs) == 1 else hashlib.sha256("".join(runs).encode()).hexdigest()[:12]
    except Exception as error:
        raise RecordError(
            f"{path} is damaged ({type(error).__name__}); restore it, or delete it to start its runs afresh"
        ) from error
    if not path.stem.endswith(f"-{own}"):  # see Store.checkpoint
        raise RecordError(f"{path} does not belong there; it is the checkpoint of {', '.join(runs)}")
    return runs, epoch


def _finished(records: Iterable[Record], names: Iterable[str]) -> set[str]:
    """Identities of the runs that need no checkpoint: they have a record and, those of Stage-1, weights by name."""
    weights = {Path(name).stem.rpartition("-")[2] for name in names if name.endswith(".safetensors")}
    return {r.config.id for r in records if r.config.stage2 is not None or r.config.id in weights}
