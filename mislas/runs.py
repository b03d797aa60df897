"""The store of what was measured, and the one way to fill it: ``run(configs, store, data_root)``.

A finished run is a JSON record (configuration, measures, history, provenance), an ``.npz`` (test predictions, class
weight norms, batch-norm statistics) and, for Stage-1, ``.safetensors`` weights; all are named by the run's identity.
An ``.npz`` takes 6 bytes an image before compression, 8 with more than 256 classes: under 100 KB for CIFAR, some 300 KB
for ImageNet-LT's 50,000.
A run that is under way is a ``.ckpt`` beside them. A record is written last, so what has a record is complete.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import nn
from tqdm import tqdm

from . import __version__, distributed
from .adjust import adjust
from .augment import Images
from .batches import plain_images
from .config import Adjustment, FewShot, Memory, RunConfig
from .data import LongTailed, empty_groups, load, smallest_class, spec_of, write_atomically
from .errors import Diverged, ForeignRecord, MislasError, RecordError, UnknownName
from .evaluate import Predictions, predict, summarise
from .fewshot import train_few_shot
from .lists import ListDataset
from .losses import class_balanced_mean, cross_entropy
from .memory import train_memory
from .methods import changed
from .models import batch_norms, check_backbone, class_weights, find_weights, native_bfloat16, stage1_model
from .registries import check_sources, entries_of, source_of
from .together import check_together, side_by_side, train_together
from .train import Options, OutOfTime, Trained, stage1_run, train_stage1, train_stage2

if TYPE_CHECKING:
    from .pipeline import ImageBatches

SCHEMA = 1
STEPS = 65535  # probabilities are stored as so many of them: 16-bit fixed point
SOURCE = ("date", "commit", "device", "torch", "data", "data_checksum")  # what tables cite of where a run comes from


@dataclass(frozen=True)
class Record:
    """A finished run.

    Attributes:
        config: what was run.
        metrics: see :func:`mislas.evaluate.summarise`; of the last epoch.
        history: per epoch: lr, train_loss, and test accuracy where it was measured.
        provenance: commit, date, device, versions, wall time, data name and checksum; ``together``, where several runs
            trained at once in that time, is how many.
        path: the JSON file.
    """

    config: RunConfig
    metrics: dict[str, float | None]
    history: list[dict[str, float]]
    provenance: dict[str, Any]
    path: Path

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays stored with the run."""
        path = self.path.with_suffix(".npz")
        try:
            with np.load(path) as stored:
                return {key: stored[key] for key in stored.files}
        except Exception as error:
            raise RecordError(
                f"{path} cannot be read ({type(error).__name__}); restore it, or delete its .json, too, and run again"
            ) from error

    def predictions(self) -> Predictions:
        """Test predictions; probabilities are stored in steps of 1 / :data:`STEPS`. A confidence may so come to lie on
        the edge of a bin, and fall into the bin below: the exact ECE and MCE are those in ``metrics``."""
        try:
            return predictions_in(self.arrays())
        except KeyError as error:
            raise RecordError(f"{self.path.with_suffix('.npz')} has no {error}; restore it") from error

    def row(self) -> dict[str, Any]:
        """The run in one flat row: what it is, its measures (as in ``metrics``), and where they come from."""
        config, source = self.config, self.provenance
        what = {key: getattr(config, key) for key in ("id", "dataset", "imbalance", "method", "seed", "backbone")}
        whence = {key: source[key] for key in (*SOURCE, "seconds") if key in source}
        return what | {"changed": changed(config)} | self.metrics | whence


def predictions_in(arrays: dict[str, np.ndarray]) -> Predictions:
    """The test predictions among the arrays of a record; KeyError if one of theirs is missing."""
    target, predicted = (arrays[name].astype(np.int64) for name in ("target", "predicted"))
    confidence, true_probability = (arrays[name] / STEPS for name in ("confidence", "true_probability"))
    return Predictions(target, predicted, confidence, true_probability)


def default_results_root() -> Path:
    """``results/`` of the checkout that the library runs from, else of the working directory."""
    above = Path(__file__).resolve().parents[1]  # site-packages, if installed: whose results/ would be another's
    return above / "results" if (above / "pyproject.toml").exists() else Path("results")


class Store:
    """Finished runs under a folder, looked up by identity. Files are only ever added.

    Args:
        root: the folder; None is :func:`default_results_root`.
    """

    def __init__(self, root: str | os.PathLike | None = None):
        self.root = default_results_root() if root is None else Path(root).expanduser()

    def path(self, config: RunConfig, suffix: str) -> Path:
        """Where a run's file goes.

        Raises:
            MislasError: a dataset whose name cannot begin a folder's.
        """
        if not re.fullmatch(r"\w[\w.-]*", config.dataset):
            raise MislasError(
                f"dataset {config.dataset!r} cannot name a folder of a store: register it under a name of letters, "
                "digits, '_', '-' and '.' that begins with one of the first three"
            )
        folder = f"{config.dataset}-if{config.imbalance:g}"
        method = re.sub(r"^\.|[^\w.-]", "-", config.method)
        return self.root / folder / f"{method}-s{config.seed}-{config.id}{suffix}"

    def find(self, config: RunConfig, suffix: str = ".json") -> Path:
        """Where a run's file is, whatever name it was stored under, or where it would go."""
        return self.known(self.path(config, suffix))

    @staticmethod
    def known(path: Path) -> Path:
        """The file that ends in the same identity as ``path`` and lies beside it, whatever its name begins with;
        ``path`` itself if it or none is there."""
        if path.exists():
            return path
        return next(iter(path.parent.glob(f"*-{path.stem.rpartition('-')[2]}{path.suffix}")), path)

    def get(self, config: RunConfig) -> Record | None:
        """The record of a run, or None if it has not been measured."""
        path = self.find(config)
        return read_record(path) if path.exists() else None

    def seeds(self, dataset: str, imbalance: float) -> list[int]:
        """Seeds of which any run on this data is there, by the files' names."""
        names = self.root.glob(f"{dataset}-if{imbalance:g}/*.json")
        return sorted({int(found[1]) for found in (re.search(r"-s(\d+)-\w+$", name.stem) for name in names) if found})

    def __iter__(self) -> Iterator[Record]:
        """All records. Those that need a dataset, a loss or a sampler that is not registered, or is registered in a way
        that does not allow them, are left out, with a warning at the end."""
        foreign = []
        for path in sorted(self.root.glob("*/*.json")):
            try:
                yield read_record(path)
            except ForeignRecord as error:
                foreign.append(str(error))
        if foreign:
            more = f" ({len(foreign) - 1} more like it)" if len(foreign) > 1 else ""
            warnings.warn(f"left out: {foreign[0]}{more}", stacklevel=2)

    def checkpoint(self, group: Sequence[RunConfig]) -> Path:
        """Where the checkpoint of runs that train together is, or would go; no other group has it."""
        if len(group) == 1:
            return self.find(group[0], ".ckpt")
        name = f"together-s{group[0].seed}-{group_id([config.id for config in group])}.ckpt"
        return self.path(group[0], ".ckpt").with_name(name)

    def lock(self, config: RunConfig) -> Path:
        """The lock of a run, named by what it is: one method may go by several names."""
        return self.path(config, "").with_name(f"{config.id}.lock")

    def under_way(self) -> list[Path]:
        """Checkpoints of runs that have not finished."""
        return sorted(self.root.glob("*/*.ckpt"))

    def put(
        self, config: RunConfig, metrics: dict, history: list, arrays: dict[str, np.ndarray], provenance: dict
    ) -> Record:
        """Add a finished run. A run that is already there is left as it is."""
        existing = self.get(config)
        if existing is not None:
            return existing
        path = self.path(config, ".json")
        write_atomically(path.with_suffix(".npz"), lambda handle: np.savez_compressed(handle, **arrays))
        record = Record(config, metrics, history, provenance, path)
        content = {
            "schema": SCHEMA,
            "id": config.id,
            "config": config.to_json(),
            "metrics": {key: None if value is None else round(value, 6) for key, value in metrics.items()},
            "provenance": provenance,
            "history": history,
        }
        text = json.dumps(content, indent=1) + "\n"
        write_atomically(path, lambda handle: handle.write(text.encode()))
        return record

    def put_weights(self, config: RunConfig, network: nn.Module, head: nn.Module) -> None:
        """Keep Stage-1's model: parameters in half precision (they are rounded to it), statistics as they are."""
        tensors = {}
        for prefix, module in (("backbone.", network), ("classifier.", head)):
            parameters = {name for name, _ in module.named_parameters()}
            for name, value in module.state_dict().items():
                value = value.detach().cpu().clone(memory_format=torch.contiguous_format)  # it may share memory
                tensors[prefix + name] = value.half() if name in parameters else value
        content = save_safetensors(tensors, metadata={"run": config.id})
        write_atomically(self.path(config, ".safetensors"), lambda handle: handle.write(content))

    def get_weights(self, config: RunConfig, num_classes: int | None = None) -> tuple[nn.Module, nn.Module]:
        """Stage-1's backbone and classifier, in float32 and evaluation mode.

        Args:
            num_classes: None is as many as the dataset has.

        Raises:
            RecordError: they are not there, or damaged.
        """
        path, num_classes = self.find(config, ".safetensors"), num_classes or spec_of(config.dataset).num_classes
        try:
            tensors = {n: value.float() for n, value in read_weights(path.read_bytes(), config.id, path).items()}
            stage = config.stage1
            network, head = stage1_model(
                config.backbone, num_classes, scale=stage.scale, two_branches=stage.second_sampler is not None
            )
            for prefix, module in (("backbone.", network), ("classifier.", head)):
                own = {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
                module.load_state_dict(own)
        except FileNotFoundError:
            hint = "; only Stage-1's are kept: get those of its stage1_only, and train_stage2 makes the rest again"
            raise RecordError(
                f"the weights of {config.method} ({config.id}) are not in {self.root}{hint if config.stage2 else ''}"
            ) from None
        except (RuntimeError, OSError) as error:
            raise RecordError(
                f"{path} is damaged ({type(error).__name__}); delete it and train Stage-1 again"
            ) from error
        return network.eval(), head.eval()


def group_id(runs: Sequence[str]) -> str:
    """What the checkpoint of runs that train together is called by: one's identity, or 12 hex digits for several,
    in whatever order they are asked for."""
    return runs[0] if len(runs) == 1 else hashlib.sha256("".join(sorted(runs)).encode()).hexdigest()[:12]


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


def read_record(path: Path, text: str | None = None) -> Record:
    """The record in a file, or in ``text`` that is to become that file.

    Raises:
        ForeignRecord: the run needs code that is not here, such as a loss that another script registers, or what is
            registered here does not allow it.
        RecordError: it is not whole, has values of other types than a record, or is of another version's schema.
    """
    try:
        content = json.loads(path.read_text() if text is None else text)
        config = RunConfig.from_json(content["config"])
        record = Record(config, content["metrics"], content["history"], content["provenance"], path)
        identity = content["id"]
        _check_types(content)
    except UnknownName as error:
        raise ForeignRecord(f"record {path} needs code that is not loaded: {error}") from error
    except MislasError as error:
        raise ForeignRecord(f"record {path} does not fit what is registered here: {error}") from error
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise RecordError(
            f"record {path} cannot be read ({type(error).__name__}: {error}); restore it, or delete it to run again"
        ) from error
    if identity != config.id:
        raise RecordError(f"record {path} was changed: its configuration has identity {config.id}, not {identity}")
    return record


def _check_types(content: dict[str, Any]) -> None:
    """Raise an error of Python's own if a record has, beside what decides its numbers, what :meth:`Store.put` never
    writes."""
    if content["schema"] != SCHEMA:
        raise ValueError(f"its schema is {content['schema']!r}, this version's is {SCHEMA}")
    metrics, history, source = (content[part] for part in ("metrics", "history", "provenance"))
    number = int | float
    values = (item for row in history for item in row.items())  # there may be thousands
    odd = [item for item in values if not isinstance(item[1], (int, float, type(None)))]
    for name, value, kind in (
        ("config.method", content["config"]["method"], str),
        *((f"metrics.{key}", metrics[key], number) for key in ("accuracy", "ece")),
        *((f"metrics.{key}", value, number | None) for key, value in metrics.items()),
        *((f"provenance.{key}", source[key], str) for key in SOURCE),
        ("provenance.seconds", source.get("seconds", 0), number),
        *(("a number of provenance.class_counts", count, int) for count in source.get("class_counts", ())),
        *(("a name of provenance.registered", name, str) for name in source.get("registered", ())),
        ("history", history, list),
        *((f"history's {key}", value, number | None) for key, value in odd),
    ):
        if not isinstance(value, kind):
            raise TypeError(f"{name} is {value!r}")


# ------------------------------------------------------------------------------------------------------------- runs


def run(
    configs: RunConfig | Iterable[RunConfig],
    store: Store | str | os.PathLike | None = None,
    data_root: str | os.PathLike | None = None,
    options: Options | None = None,
    download: bool = False,
) -> list[Record]:
    """Get runs from the store, training first what is not there.

    Stage-1 is trained once for all runs that share it, and Stage-2 runs that can share a pass through the backbone do.
    A run that was killed goes on from its checkpoint. What another process trains into the store just now is waited
    for. Stage-1 runs of small networks train side by side if ``options.together`` says so. Where several processes
    train together each of them calls this, and all must see the store and the data; the first of them writes.

    Args:
        store: a store, or its folder; None is the default one.
        data_root: folder with the images; see :func:`mislas.data.load`.
        download: see :func:`mislas.data.load`.

    Returns:
        One record per configuration, in order.

    Raises:
        MislasError: a run diverged: whatever does not build on it was trained all the same. Or a run cannot be, such as
            one that holds images out of classes of one, or shifts batch norm where there is none: nothing was trained.
    """
    configs = [configs] if isinstance(configs, RunConfig) else list(configs)
    store, options = store if isinstance(store, Store) else Store(store), options or Options()
    for config in configs:
        check_classes(config)
    for asked in dict.fromkeys((c.backbone, spec_of(c.dataset).size, c.shifts) for c in configs):
        check_backbone(*asked)
    check_together(options, distributed.world())
    left, diverged = configs, {}
    while True:
        try:
            _train(left, store, data_root, options, download)
            break
        except Diverged as error:
            diverged[error.run] = error
            left = [config for config in left if not {config.id, *config.needs} & diverged.keys()]
            if left and options.progress and distributed.rank() == 0:
                tqdm.write(f"{error}; going on with the other runs", file=sys.stderr)
    if diverged:
        raise MislasError("; ".join(map(str, diverged.values())))
    records = [store.get(config) for config in configs]
    for record in records:
        check_sources(record)
    return records


def _train(
    configs: list[RunConfig], store: Store, data_root: str | os.PathLike | None, options: Options, download: bool
) -> None:
    datasets: dict[str, LongTailed] = {}
    for groups in distributed.agree(lambda: side_by_side(plan(configs, store), options.together)):
        with claimed(groups, store, options):
            groups = distributed.agree(lambda groups=groups: [group for group in groups if not _done(group, store)])
            if not groups:
                continue
            if distributed.agree(options.deadline is not None and time.monotonic() > options.deadline):
                raise OutOfTime("stopped before a training")
            needed = {group[0].data_title: group[0] for group in groups}
            datasets = {key: data for key, data in datasets.items() if key in needed}  # no others are kept in memory
            for key, of in needed.items():
                if key not in datasets:
                    with distributed.first():
                        datasets[key] = load(of.dataset, data_root, of.imbalance, n_max=of.n_max, download=download)
            first = groups[0][0]
            if len(groups) > 1:
                _run_together([config for (config,) in groups], datasets, store, options)
                continue
            _run_group(groups[0], datasets[first.data_title], store, data_root, options)
            distributed.agree(None)  # nobody goes on before the first has written


def plan(configs: Iterable[RunConfig], store: Store) -> list[list[RunConfig]]:
    """What has to be trained to have these runs: groups that train together, in the order of ``configs``,
    but each Stage-1 before what builds on it.

    Stage-1 is trained if its record is wanted and missing, or if its weights are needed and missing; so are experts.
    """

    def steps_to(config: RunConfig) -> list[RunConfig]:
        before = config.experts if config.stage2 is None else [config.stage1_only]
        missing = (run for run in before if not _done([run], store))
        return [*(step for run in missing for step in steps_to(run)), config]

    groups: dict[tuple[bool, str], dict[str, RunConfig]] = {}
    for config in configs:
        if store.get(config) is not None:
            continue
        for step in steps_to(config):
            groups.setdefault((step.stage2 is not None, step.shared_pass), {}).setdefault(step.id, step)
    return [list(group.values()) for group in groups.values()]


def check_classes(config: RunConfig) -> None:
    """Raise :class:`MislasError` if a class would have no image to train on, by the imbalance factor or since Stage-1
    holds some out, or a group of classes no class for its expert. Files are not read."""
    smallest = smallest_class(config.dataset, config.imbalance, config.n_max)
    if config.stage1.holdout is not None and smallest < 2:
        raise MislasError(
            f"{config.method} holds out images of every class, and the rarest of {config.data_title} has {smallest}; "
            "use a smaller imbalance factor"
        )
    experts = config.stage1.distillation is not None
    if experts and (empty := empty_groups(config.dataset, config.imbalance, config.n_max)):
        raise MislasError(
            f"{config.method} trains an expert on each group of classes, and {config.data_title} has no class with "
            f"{' or '.join(empty)} shots; use another imbalance factor, or another dataset"
        )


def _done(group: Sequence[RunConfig], store: Store) -> bool:
    """Whether all that training a group leaves in the store is there."""
    return all(store.get(c) and (c.stage2 is not None or store.find(c, ".safetensors").exists()) for c in group)


@contextlib.contextmanager
def claimed(groups: Sequence[Sequence[RunConfig]], store: Store, options: Options) -> Iterator[None]:
    """Keep these runs for this process; first wait for another that trains them into the same store.

    Every run has a lock, which is free again when its process ends, however that ends. Processes that
    train one run together take none: while one of them waits, the others would give it up.

    Raises:
        OutOfTime: the options' deadline comes first.
        OSError: the store's folder cannot be written.
    """
    if distributed.world() > 1:
        yield
        return
    runs = (config for group in groups for config in group)
    locks = sorted((store.lock(config), store.path(config, "").name) for config in runs)  # so no circle waits
    acquired = []
    with contextlib.ExitStack() as held:
        for path, name in locks:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path, fallback_to_soft=False)  # a file as a mark would outlive a process that is killed
            try:
                lock.acquire(timeout=0)
            except Timeout:
                if options.progress:
                    tqdm.write(f"another process trains {name}: waiting for it", file=sys.stderr)
                left = -1 if options.deadline is None else max(0, options.deadline - time.monotonic())
                try:
                    lock.acquire(timeout=left, poll_interval=0.5)
                except Timeout:
                    raise OutOfTime(f"another process still trains {name}") from None
            except NotImplementedError:
                continue
            except OSError:
                if not os.access(path.parent, os.W_OK):  # said now, not after an epoch
                    raise
                continue  # a disk that knows no locks, or a lock that another user left
            held.callback(lock.release)
            acquired.append(path)
        try:
            yield
        finally:
            for path in acquired:
                with contextlib.suppress(OSError):  # not every system removes what is open
                    path.unlink()


def _along_the_way(data: LongTailed, test: Images | ImageBatches) -> Callable:
    def evaluate(network: nn.Module, heads: Sequence[nn.Module]) -> list[dict[str, float]]:
        correct = [logits.argmax(1) == data.test_targets for logits in predict(network, heads, test)]
        return [{"test_accuracy": round(float(c.double().mean()), 4)} for c in correct]

    return evaluate


def _run_together(configs: list[RunConfig], datasets: dict[str, LongTailed], store: Store, options: Options) -> None:
    """Train Stage-1 runs at once. Each has its own checkpoint and is stored as it ends."""
    tests = {key: plain_images(data, options) for key, data in datasets.items()}
    parts = [(config, datasets[config.data_title], tests[config.data_title]) for config in configs]
    runs = [
        stage1_run(config, data, options, store.checkpoint([config]), _along_the_way(data, test), together=len(configs))
        for config, data, test in parts
    ]
    for which, trained in train_together(runs, options):
        config, data, test = parts[which]
        finish([config], trained, data, test, store, options)


def _run_group(
    group: list[RunConfig],
    data: LongTailed,
    store: Store,
    data_root: str | os.PathLike | None,
    options: Options,
) -> None:
    group = sorted(group, key=lambda config: config.id)  # in their checkpoint's order
    first, test = group[0], plain_images(data, options)
    checkpoint, along_the_way = store.checkpoint(group), _along_the_way(data, test)
    if first.stage2 is None:
        experts = [store.get_weights(expert, data.num_classes) for expert in first.experts]
        weights = first.stage1.weights and find_weights(first.stage1.weights, data_root)
        trained = train_stage1(first, data, options, checkpoint, along_the_way, weights, experts)
    else:
        stage1 = store.get_weights(first.stage1_only, data.num_classes)
        before = store.get(first.stage1_only)
        if before is not None:
            check_sources(before)
        if before is not None and before.provenance["data_checksum"] != data.checksum:
            warnings.warn(
                f"Stage-1 {before.config.id} was trained on other data than {data.name} is here (checksum "
                f"{before.provenance['data_checksum']}, not {data.checksum}): another list, or another JPEG decoder",
                stacklevel=2,
            )
        if isinstance(first.stage2, Adjustment):
            trained = adjust(group, stage1, data, options)
        elif isinstance(first.stage2, FewShot | Memory):
            train = train_few_shot if isinstance(first.stage2, FewShot) else train_memory
            trained = train(first, stage1, data, options, checkpoint, along_the_way)
        else:
            trained = train_stage2(group, stage1, data, options, checkpoint, along_the_way)
    finish(group, trained, data, test, store, options)


def finish(
    group: list[RunConfig],
    trained: Trained,
    data: LongTailed,
    test: Images | ImageBatches,
    store: Store,
    options: Options,
) -> None:
    """Evaluate trained runs at their last epoch and store them, with Stage-1's weights; their checkpoint goes."""
    statistics = batch_norm_statistics(trained.backbone)
    source = provenance(data, options, trained.seconds)
    if trained.together > 1:
        source["together"] = trained.together
    outputs = predict(trained.backbone, trained.heads, test)
    unseen = held_out(group[0], trained, data, options)
    if distributed.rank() > 0:
        return
    if group[0].stage2 is None:
        store.put_weights(group[0], trained.backbone, trained.heads[0])
    done = []  # all are worked out before the first is stored: of a group that is stored in part the rest trains anew
    for config, head, logits, own, history in zip(
        group, trained.heads, outputs, unseen, trained.histories, strict=True
    ):
        metrics, predictions = summarise(logits, data.test_targets, data.groups)
        metrics |= own
        history[-1]["test_accuracy"] = round(metrics["accuracy"], 4)
        weight = class_weights(head, data.num_classes)
        small = np.uint8 if data.num_classes <= 256 else np.uint16
        arrays = {
            "target": predictions.target.astype(small),
            "predicted": predictions.predicted.astype(small),
            "confidence": np.rint(predictions.confidence * STEPS).astype(np.uint16),
            "true_probability": np.rint(predictions.true_probability * STEPS).astype(np.uint16),
            **({} if weight is None else {"weight_norm": weight.detach().norm(dim=1).cpu().numpy()}),
            "class_counts": np.array(data.class_counts, np.int32),
            **statistics,
        }
        done.append((config, metrics, history, arrays))
    for config, *measured in done:
        own = {f"{registry}.{name}": source_of(entry) for registry, name, entry in entries_of([config])}
        known = {name: text for name, text in own.items() if text is not None}
        registered = {"registered": list(own)} | ({"sources": known} if known else {}) if own else {}
        store.put(config, *measured, source | registered)
    checkpoint = store.checkpoint(group)
    checkpoint.unlink(missing_ok=True)
    for name in (checkpoint.stem, *(store.path(config, "").name for config in group)):
        for part in checkpoint.parent.glob(f".{name}.*.part"):  # of a process killed while it wrote
            part.unlink(missing_ok=True)
    _tidy(checkpoint.parent)


def held_out(config: RunConfig, trained: Trained, data: LongTailed, options: Options) -> list[dict[str, float]]:
    """Of each head, accuracy and NLL on the training images that Stage-1 held out, every class counting alike: what a
    setting may be chosen by, as it may not on test images. Nothing where none are held out, or of an expert.

    A rule that is fitted to these very images says too well of itself there.
    """
    if config.stage1.holdout is None or config.stage1.group is not None:
        return [{} for _ in trained.heads]
    _, held = data.hold_out(config.stage1.holdout)
    targets, found = data.train_targets[held], []
    for logits in predict(trained.backbone, trained.heads, plain_images(data, options, held)):
        right, losses = (logits.argmax(1) == targets).double(), cross_entropy(logits.double(), targets)
        found.append(
            {
                "held_out_accuracy": float(class_balanced_mean(right, targets)),
                "held_out_nll": float(class_balanced_mean(losses, targets)),
            }
        )
    return found


def _tidy(folder: Path) -> None:
    """Remove the checkpoints of groups that were never ended and whose runs have all been done since, in others."""
    for path in folder.glob("together-*.ckpt"):
        try:
            runs = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["runs"]
        except Exception:  # damaged, or gone: said when somebody goes on with it
            continue
        if all(any(folder.glob(f"*-{run}.json")) for run in runs):
            path.unlink(missing_ok=True)


def batch_norm_statistics(network: nn.Module) -> dict[str, np.ndarray]:
    """Running mean and variance of the first and the last batch-norm layer (Figure 6); nothing if there is none."""
    layers = batch_norms(network)
    return {
        f"bn_{place}_{name}": getattr(layer, f"running_{name}").cpu().numpy()
        for place, layer in zip(("first", "last"), (layers[:1] + layers[-1:]), strict=False)
        for name in ("mean", "var")
    }


def provenance(data: LongTailed, options: Options, seconds: float) -> dict[str, Any]:
    """Where, when and with what a run was made."""
    device = options.torch_device()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "mislas": __version__,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "compile": options.compile,
        "seconds": round(seconds, 3),
        "data": data.name,
        "data_checksum": data.checksum,
        "class_counts": list(data.class_counts),
        **({"data_prepared": data.prepared} if isinstance(data, ListDataset) and data.prepared else {}),
    }


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's name, as records have it, with the cores that this process computes on, whether it
    lacks bfloat16 instructions, and how many processes train together."""
    together = f"{distributed.world()} x " if distributed.world() > 1 else ""
    if device.type == "cuda":
        return together + torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    cores, used = os.cpu_count(), torch.get_num_threads()
    lacks = "" if native_bfloat16(device) else " without bfloat16"
    return f"{together}{name} (CPU{lacks}, {cores if used == cores else f'{used} of {cores}'} cores)"


def _commit() -> str:
    """The commit of the code that runs, with ``+changes`` if files of the library differ from it; ``"unknown"`` where
    they are in no repository, or only lie in somebody else's."""
    here = Path(__file__).resolve().parent

    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", here, *args], capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "--", Path(__file__).name)
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
