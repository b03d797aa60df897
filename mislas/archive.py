"""What a campaign has made, packed into one archive and merged into a store elsewhere."""

from __future__ import annotations

import contextlib
import io
import re
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from .config import RunConfig
from .data import check_end, groups, write_atomically
from .errors import RecordError
from .evaluate import BINS, Predictions, reliability
from .runs import STEPS, Record, Store, group_id, predictions_in, read_record, read_weights

_MEMBER = re.compile(r"\w[\w.-]*/[\w-][\w.-]*\.(json|npz|safetensors|ckpt)")
_SUFFIXES = (".npz", ".safetensors", ".json")  # records last: what has one is complete

Members = dict[str, bytes]  #: Files, by their path in a store.
Checkpoint = tuple[list[str], int]  #: Identities of the runs that train together, and their epoch.


def pack(configs: Iterable[RunConfig], store: Store, archive: Path) -> int:
    """Bring an archive up to date: all files of the runs that a campaign asks for and of those that they build on, as
    far as the store has them, and every checkpoint.

    What the store had before the campaign is packed, too. So nothing has to be remembered, and what a campaign left
    when it was killed is packed when it starts again. An archive never loses a run: those that it has stay as they
    are, of two checkpoints of the same runs it keeps the one further on, and only those of finished runs go. Processes
    that pack at the same time need an archive each.

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
    old_records, old = checked(kept, archive)
    new_records, new = checked(found, store.root)
    members, names = found | kept, {tuple(runs): name for name, (runs, _) in old.items()}
    for name, (runs, epoch) in new.items():
        before = names.get(tuple(runs))  # it may be called by another name of the same method
        if before is not None:
            del members[name]
            members[before] = found[name] if epoch > old[before][1] else kept[before]
    finished = _finished([*old_records.values(), *new_records.values()], members)
    for name, (runs, _) in (old | new).items():
        if finished.issuperset(runs):
            members.pop(name, None)

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
            store; measures that do not follow from the predictions, of which all but ``adaptive_ece``,
            ``classwise_ece`` and ``brier`` do; or a conflict.
    """
    members = _read_archive(archive)
    records, checkpoints = checked(members, archive)
    writes: list[tuple[Path, str]] = []
    for stem, record in records.items():
        existing = store.get(record.config)
        if existing is not None and existing.metrics != record.metrics:
            raise RecordError(
                f"{archive}: run {record.config.id} is in the store with other measures; keep one: delete "
                f"{existing.path} to take the archive's, or leave the archive alone"
            )
        lacks = [s for s in _SUFFIXES if existing is None or not store.find(record.config, s).exists()]
        writes += [(store.root / name, name) for name in (stem + suffix for suffix in lacks) if name in members]
    there = [path for runs, _ in checkpoints.values() for run in runs for path in store.root.glob(f"*/*-{run}.*")]
    known = [read_record(path) for path in there if path.suffix == ".json"]
    finished = _finished([*records.values(), *known], [*members, *map(str, there)])
    for name, (runs, epoch) in sorted(checkpoints.items(), key=lambda item: item[1][1]):  # the furthest on comes last
        path = store.known(store.root / name)
        stored = _read_checkpoint(path.read_bytes(), path)[1] if path.exists() else -1
        if epoch > stored and not finished.issuperset(runs):
            writes.append((path, name))
    for path, name in writes:
        write_atomically(path, lambda handle, name=name: handle.write(members[name]))
    return [read_record(path) for path, _ in writes if path.suffix == ".json"]


def _name(config: RunConfig, suffix: str) -> str:
    return Store("").path(config, suffix).as_posix()


def _read_archive(archive: Path) -> Members:
    try:
        with tarfile.open(archive, "r:") as tar:
            members = {}
            for member in tar:
                if member.issparse() or member.size > archive.stat().st_size:  # it claims more than there is
                    raise tarfile.ReadError(f"{member.name!r} is larger than the archive")
                members[member.name] = tar.extractfile(member).read() if member.isfile() else b""
            check_end(tar)
        return members
    except (OSError, tarfile.TarError, ValueError) as error:
        raise RecordError(f"{archive} cannot be read ({error}); copy it again, or name another file") from error


def checked(members: Members, where: Path) -> tuple[dict[str, Record], dict[str, Checkpoint]]:
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
    """Hold the measures that :func:`_bounds` knows against a record's ``.npz``, every array of which must be whole."""
    try:
        with np.load(io.BytesIO(data)) as stored:
            arrays = {key: stored[key] for key in stored.files}
        predictions = predictions_in(arrays)
        np.stack(list(vars(predictions).values()))  # an error if one is shorter
        bounds = _bounds(predictions, arrays["class_counts"])
    except Exception as error:
        raise RecordError(f"{path} is damaged ({type(error).__name__}); restore it, or take its run out") from error
    for name, found in bounds.items():
        said = record.metrics.get(name)
        low, high = found or (np.nan, np.nan)  # NaN, found or said, is in no bounds
        if found is said is None or (said is not None and low - 1e-5 <= said <= high + 1e-5):
            continue
        gives = f"{low:.4f} to {high:.4f}" if low < high else f"{low:.4f}"
        raise RecordError(f"{path} gives {name} {gives}, its record says {said}; restore both or take both out")


def _bounds(predictions: Predictions, class_counts: Sequence[int]) -> dict[str, tuple[float, float] | None]:
    """By name the least and the most that measures can be, given probabilities rounded to steps; None for those of a
    group without images.

    Rounding may have moved confidences at the edge of two bins. Of a bin of n, m such can change the gap by
    2 m / (n - m), and each changes an ECE over N by up to 2 / N. Of ``nll`` there is no most where a probability is
    rounded to 0.
    """
    edge = np.rint(predictions.confidence * STEPS) / (STEPS // BINS)
    moved = (edge % 1 == 0) & (edge < BINS)
    parts = {"": np.ones(len(moved), bool)}
    parts |= {f"_{name}": np.isin(predictions.target, classes) for name, classes in groups(class_counts).items()}
    bounds: dict[str, tuple[float, float] | None] = {}
    for end, part in parts.items():
        bounds |= {f"accuracy{end}": None, f"ece{end}": None}
        if part.any():
            correct = predictions.correct[part]
            ece, more = reliability(predictions.confidence[part], correct).ece, 2 * moved[part].mean()
            bounds |= {f"accuracy{end}": (correct.mean(),) * 2, f"ece{end}": (ece - more, ece + more)}
    bins, at = predictions.reliability(), np.bincount(edge[moved].astype(int), minlength=BINS + 1)
    near = at[:-1] + at[1:]
    more = (2 * near / np.maximum(bins.count - near, 1)).max()
    own, half = predictions.true_probability, 0.5 / STEPS
    with np.errstate(divide="ignore"):
        nll = -np.log(own + half).mean(), -np.log(np.maximum(own - half, 0)).mean()
    mean = predictions.confidence.mean()
    return bounds | {"confidence": (mean, mean), "mce": (bins.mce - more, bins.mce + more), "nll": nll}


def _read_checkpoint(data: bytes, path: Path) -> Checkpoint:
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        runs, epoch = content["runs"], int(content["epoch"])
        own = group_id(runs)
    except Exception as error:
        raise RecordError(
            f"{path} is damaged ({type(error).__name__}); restore it, or delete it to start its runs afresh"
        ) from error
    if not path.stem.endswith(f"-{own}"):
        raise RecordError(f"{path} does not belong there; it is the checkpoint of {', '.join(runs)}")
    return runs, epoch


def _finished(records: Iterable[Record], names: Iterable[str]) -> set[str]:
    """Identities of the runs that need no checkpoint: they have a record and, those of Stage-1, weights by name."""
    weights = {Path(name).stem.rpartition("-")[2] for name in names if name.endswith(".safetensors")}
    return {r.config.id for r in records if r.config.stage2 is not None or r.config.id in weights}
