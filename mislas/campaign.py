"""Fill the store: the wanted runs in order of worth, within a time budget, on whatever machine is at hand.

A campaign can be killed at any moment and goes on where it was. Time often comes in slices on machines that start bare:
what a slice has made, finished or under way, is packed into one archive and merged into the store elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from . import paper
from .config import RunConfig
from .data import LISTS, dataset_name, smallest_class, spec_of, training_images
from .errors import MislasError
from .methods import METHODS, configure, settings_of
from .models import RESNETS
from .runs import Store, plan
from .study import (
    AVERAGED,
    BRIEF,
    CHOICES,
    FORMS,
    GRID,
    LEARNED,
    REDRAWN,
    SHORT,
    UNSEEN,
    Rows,
    authors_variants,
    balanced,
)

TABLE_3 = ("ce", "mixup", "mislas", "crt+mixup", "lws+mixup", "crt", "lws", "lws+mixup+shift", "lws+las")

#: Table 3's methods that share no Stage-1.
OTHERS = ("ldam+drw", "bbn", "remix+drw")

#: A weight decay that the authors recommend, by title.
WEIGHT_DECAY = {
    "5e-4 in both stages": {"stage1.weight_decay": 5e-4, "stage2.weight_decay": 5e-4},
    "5e-4 in Stage-1": {"stage1.weight_decay": 5e-4},
    "5e-4 in Stage-2": {"stage2.weight_decay": 5e-4},
}

#: Table 1's last rows: mixup in Stage-2, too.
STAGE2_MIXUP = {"stage2.mixup": 1.0}


def wanted(
    dataset: str,
    imbalances: Sequence[float | None] | None = None,
    seeds: Sequence[int] = (0,),
    overrides: dict[str, Any] | None = None,
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

    Args:
        overrides: fields to change in every run before what tells it from others, as :class:`mislas.study.Study` does:
            see :meth:`RunConfig.override`.

    Raises:
        MislasError: an unknown dataset or field, or a value outside its range.
    """
    overrides = overrides or {}
    own = overrides.get("backbone", settings_of(dataset_name(dataset)).backbone)  # BBN doubles a block of ResNets alone

    def one(method: str, imbalance: float | None, seed: int, changes: dict[str, Any] | None = None) -> RunConfig:
        return configure(dataset, method, imbalance, seed, overrides).override(changes or {})

    large = dataset_name(dataset) in (*LISTS, "tinyimagenet64")
    imbalances = imbalances or ((None,) if large else (100, 50, 10))
    if large:
        rows = _large(dataset_name(dataset))
        configs = [one(m, i, seed, more) for seed in seeds for i in imbalances for m, more in rows]
        if dataset_name(dataset) not in LISTS:  # Figure 8's balanced model
            plain = [{"backbone": backbone} for backbone in ("resnet10", "resnet50")]
            configs += [one("ce", 1, seed, more) for seed in seeds for more in plain]
        return list({config.id: config for config in configs}.values())
    configs = []
    for seed in seeds:
        first = imbalances[0]
        configs += [one(method, imbalance, seed) for imbalance in imbalances for method in TABLE_3]
        for imbalance in imbalances:
            variants = [*GRID, *FORMS, *AVERAGED.values(), *authors_variants(dataset, imbalance).values()]
            configs += [one("mislas", imbalance, seed, changes) for changes in variants]
            for rows in LEARNED.values():
                configs += [one(method, imbalance, seed, changes) for method, changes in _runs(rows)]
            configs += [one(m, imbalance, seed, STAGE2_MIXUP) for m in ("crt+mixup", "lws+mixup")]
        configs += [one("ce", first, seed, changes) for changes in balanced(dataset, first).values()]
        others = [m for m in OTHERS if own in RESNETS or "second_sampler" not in METHODS[m].stage1]
        configs += [one(method, imbalance, seed) for method in others for imbalance in imbalances]
        configs += [one("mislas", first, seed, changes) for changes in WEIGHT_DECAY.values()]
        redrawn = [asked for draws in REDRAWN.values() for asked in draws]
        configs += [one(method, imbalance, seed, changes) for imbalance in imbalances for method, changes in redrawn]
        held_out = [asked for rows in UNSEEN.values() for asked in rows.values()]
        choices = [("mislas", changes) for changes in CHOICES]
        if smallest_class(dataset_name(dataset), first, overrides.get("n_max")) == 1:
            held_out = choices = []
        configs += [one(method, first, seed, changes) for method, changes in held_out + choices]
        if dataset_name(dataset) in BRIEF:
            brief, changes = BRIEF[dataset_name(dataset)]
            again = [asked for rows in brief.values() for asked in _runs(rows)] + held_out * (brief is LEARNED)
            configs += [one(method, first, seed, changes | more) for method, more in again]
    return list({config.id: config for config in configs}.values())


def _runs(rows: Rows) -> list[tuple[str, dict[str, Any]]]:
    """The runs of rows such as :data:`mislas.study.LEARNED` has."""
    return [run for row in rows.values() for run in row]


def _large(dataset: str) -> list[tuple[str, dict[str, Any]]]:
    """What Tables 1, 4, 6, 7, 8 and Figures 2, 8, 9 have of a dataset of list files, as (method, changes)."""
    rows = [(method, {}) for method in ("ce", "mixup", "mislas", "crt+mixup", "lws+mixup", "crt", "lws")]
    rows += [(method, {}) for method in paper.TABLE4.get(dataset, ())]
    rows += [(method, {}) for method in {"inaturalist18": paper.TABLE7, "places-lt": paper.TABLE8}.get(dataset, ())]
    heads, mixed = ("crt", "lws", "crt+mixup", "lws+mixup"), {"stage2.mixup": settings_of(dataset).mixup}
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
    """``"90s"``, ``"9m"``, ``"1.5h"`` to seconds.

    Raises:
        MislasError: anything else, or no time at all.
    """
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
    """Passes over the training images, those that shift batch norm included; a rule looks at them once more."""
    stage = config.stage2 or config.stage1
    return getattr(stage, "epochs", 1) + (getattr(stage, "shift_epochs", None) or 0)


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
        timed = source.get("seconds", 0) > 0 and source.get("class_counts")
        if timed and record.config.stage1.holdout is None:  # those saw fewer images
            images = sum(source["class_counts"]) * _epochs(record.config)
            kinds = rates.setdefault(source["device"], {})
            kinds.setdefault(_kind(record.config), []).append(images / source["seconds"])
    return {device: {kind: median(found) for kind, found in kinds.items()} for device, kinds in rates.items()}
