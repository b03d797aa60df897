"""What every notebook starts with: a profile, and from it the runs that a table or a figure shows.

study = Study("stored")
study.runs("cifar10", "mislas", imbalance=100)     # the records, one per seed; none if never measured
study.sweep("cifar10", "mislas", GRID)             # the same for each of several changes, trained together
study.side_by_side("cifar10", [("ce", 100, {}), ("mislas", 100, {})])    # runs to compare: all on the same images
study.neighbours("cifar100")                       # what is measured beside a dataset that may be out of reach
"""

from __future__ import annotations

import json
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import paper
from .config import RunConfig, assignment, check_type, locate, takes, value_of
from .data import LISTS, available, dataset_name, spec_of, training_images
from .errors import DataError, MislasError, unknown
from .methods import AFTER_TRAINING, HOLDOUT, METHODS, configure, settings_of
from .registries import entries_of
from .runs import Record, Store, default_results_root, run
from .train import Options

_LIBRARY = dict(METHODS)  # before any script could add to them

#: Fields that say which run, not how it is trained: no overrides; and what to do instead.
WHICH = {
    "dataset": "ask the tables and figures for it",
    "imbalance": "ask the tables and figures for it",
    "seed": "use seeds",
}

PROFILES = {
    "stored": "trains nothing; shows what is in the store",
    "tiny": "trains everything live on a tiny dataset, on the CPU, in seconds",
    "full": "the paper's schedule on the images under data_root; takes from the store what is there",
}

#: The paper's datasets and what may stand in for them, the exact one first. A record says which it used.
STAND_INS = {"cifar10": ("cifar10", "cifar10-jpeg"), "cifar100": ("cifar100", "cifar100-jpeg")}

#: What ``tiny`` trains on in place of datasets that fit in memory, and of those that do not.
TINY = {"digits": "scikit-learn's digits", "generated": "generated JPEG files"}

#: What is measured beside a dataset of the paper where a table or figure shows that one alone: the same experiment on
#: other images, under their own name, in panels of their own.
NEIGHBOURS = {
    "cifar100": ("cifar10", "tinyimagenet32"),
    "imagenet-lt": ("tinyimagenet64",),
    "places-lt": ("tinyimagenet64",),
    "inaturalist18": ("tinyimagenet64",),
}

#: Changes of MiSLAS that share one pass through its backbone. Figures 5 and 10: eps_1 and eps_K, 0.0 to 0.5.
GRID = [{"eps_1": a / 10, "eps_k": b / 10} for a in range(6) for b in range(a + 1)]
#: The same on a Stage-1 that has held images out, by which a cell may be chosen.
CHOICES = [HOLDOUT | cell for cell in GRID]
#: Figure 11: forms of the related function beside the default, concave. The paper's text gives no p: these p are ours.
FORMS = [{"form": "linear"}, {"form": "convex"}] + [{"form": "power", "power": p} for p in (1 / 3, 0.5, 2.0, 3.0)]
#: A shorter schedule than the default 200 epochs: what can be measured without a GPU of Tiny-ImageNet at 64 pixels.
SHORT = {"backbone": "resnet10", "stage1.epochs": 30}
#: Batch norm's statistics of a frozen backbone: left alone, or those of plain images, drawn in two ways.
STATISTICS = ("Stage-1's", "plain images, as they come", "plain images, balanced classes")
BALANCED = {"shift_epochs": 1}  # a running average has forgotten what it was after an epoch
DRAWN = BALANCED | {"shift_sampler": "instance_balanced"}
NO_SMOOTHING = {"eps_1": 0.0, "eps_k": 0.0}
#: How batch norm's running statistics average over the batches of a shift.
AVERAGED = {"moving": {}, "cumulative": {"shift_average": "cumulative"}}
#: Runs whose Stage-2 is drawn anew on the same Stage-1, by title: for each its draws, the seed's own first, as (method,
#: changes).
REDRAWN = {
    title: [(method, changes)] + [(method, changes | {"stage2.draw": draw}) for draw in (1, 2)]
    for title, method, changes in (
        ("cRT+mixup", "crt+mixup", {}),
        ("LWS+mixup", "lws+mixup", {}),
        ("MiSLAS", "mislas", {}),
        ("MiSLAS, cumulative", "mislas", AVERAGED["cumulative"]),
        ("MiSLAS without SL", "mislas", {"shift_bn": False}),
    )
}

Rows = dict[str, list[tuple[str, dict[str, Any]]]]


def _rules(end: str) -> Rows:
    """Rows of :data:`LEARNED` without gradients, for methods whose names end so."""
    return {
        "nothing (logit adjustment)": [(f"logit-adjustment{end}", changes) for changes in ({}, DRAWN, BALANCED)],
        "class means (NCM)": [(f"ncm{end}", changes) for changes in ({}, DRAWN, BALANCED)],
    }


def _learned(end: str) -> Rows:
    """Rows of :data:`LEARNED` that every Stage-1 has, for methods whose names end so."""
    return _rules(end) | {
        "a scale per class (LWS)": [(f"lws{end}", {}), (f"lws{end}", DRAWN), (f"lws{end}+shift", {})],
        "a new classifier (cRT)": [(f"crt{end}", {}), (f"crt{end}", DRAWN), (f"crt{end}+shift", {})],
    }


def _mislas(changes: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """A row of :data:`LEARNED`: MiSLAS with changes."""
    alone = changes | {"shift_bn": False}
    return [("mislas", alone), ("mislas", alone | DRAWN), ("mislas", changes)]


#: By Stage-1 and by what Stage-2 learns on it: the run, as (method, changes), with each of the three
#: :data:`STATISTICS`.
LEARNED = {
    "Stage-1 with mixup": _learned("+mixup")
    | {"scales and ΔW": _mislas(NO_SMOOTHING), "scales and ΔW, smoothed (MiSLAS)": _mislas({})},
    "Stage-1 without mixup": _learned(""),
}


def _unseen(end: str, *own: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """A table of :data:`UNSEEN`: ``own`` are the methods that look at Stage-1's own images."""
    held = [method + end for method, (*_, stage1, _) in AFTER_TRAINING.items() if stage1]
    rows = {f"{METHODS[method].title}, nine tenths": (method, HOLDOUT) for method in own}
    return rows | {METHODS[method].title: (method, {}) for method in held}


#: On one Stage-1 that has held a tenth of the images out: what it says itself, what is learned on its own images, and
#: what is fitted to those held out. By Stage-1 and title the run, as (method, changes).
UNSEEN = {
    "Stage-1 without mixup": _unseen("", "ce", "lws"),
    "Stage-1 with mixup": _unseen("+mixup", "mixup", "lws+mixup", "mislas"),
}
#: What is measured after a short Stage-1 as well, by dataset: rows of :data:`LEARNED` by Stage-1, and changes. With
#: many classes, where :data:`UNSEEN` is measured so, too, and, as a control, with few.
BRIEF: dict[str, tuple[dict[str, Rows], dict[str, Any]]] = {
    "tinyimagenet32": (LEARNED, {"stage1.epochs": 20}),
    **dict.fromkeys(
        ("cifar10", "cifar10-jpeg"),
        ({"Stage-1 with mixup": _rules("+mixup"), "Stage-1 without mixup": _rules("")}, {"stage1.epochs": 10}),
    ),
}


#: Titles of the two of :func:`balanced`.
ALL_IMAGES, AS_MANY = "all images, balanced", "as many images, balanced"


def balanced(dataset: str, imbalance: float) -> dict[str, dict[str, Any]]:
    """What to change of a long-tailed run to train it on balanced data, by title: on all images of the dataset, as the
    paper does, or on as many as there are at the imbalance factor (up to rounding), so that only the balance differs.
    """
    same_size = training_images(dataset, imbalance) // spec_of(dataset).num_classes
    return {ALL_IMAGES: {"imbalance": 1}, AS_MANY: {"imbalance": 1, "n_max": same_size}}


#: What the authors' code does in another way than the paper's equations for MiSLAS's Stage-2, by title.
AUTHORS_CODE = {
    "smoothing over all K classes": {"smoothing_over": "all"},
    "W and ΔW merged": {"a": 0, "delta": "stage1"},
    "sampler cycles through classes": {"stage2.sampler": "class_cyclic"},
    "batch norm not shifted": {"shift_bn": False},
}
THEIR_FACTORS, ALL_OF_THEIRS = "their smoothing factors and ΔW's rate", "all that their configuration has"


def authors_variants(dataset: str, imbalance: float | None) -> dict[str, dict[str, Any]]:
    """What to change of MiSLAS to make it more like the authors' code, by title: nothing; one thing at a time
    (:data:`AUTHORS_CODE`); where they published a configuration for the dataset and the imbalance factor, what that
    sets in another way than Table 5; and all of it together."""
    rows = {"the paper's equations": {}, **AUTHORS_CODE}
    theirs = settings_of(dataset_name(dataset)).authors.get(imbalance)
    if theirs is None:
        return rows
    factors = {f"stage2.{key}": value for key, value in theirs.items() if key != "shift_bn"}
    every = {}
    for changes in AUTHORS_CODE.values():
        if "shift_bn" not in changes or "shift_bn" in theirs:
            every |= changes
    every |= factors
    return rows | ({THEIR_FACTORS: factors} if factors else {}) | {ALL_OF_THEIRS: every}


#: A run of a table or a figure: method, imbalance factor, changes.
Asked = tuple[str, float | None, dict[str, Any]]


def missing_by_command(
    asked: Sequence[Asked], found: Sequence[Sequence[Record]]
) -> list[tuple[list[str], float | None, dict[str, Any]]]:
    """The runs of which no record was found, by the commands that measure them: a command names several methods, which
    share all else. Each once.

    Args:
        asked: the runs.
        found: the records of each, as :meth:`Study.side_by_side` gives them.
    """
    commands: dict[str, tuple[list[str], float | None, dict[str, Any]]] = {}
    for (method, imbalance, changes), records in zip(asked, found, strict=True):
        if not records:
            key = json.dumps([imbalance, changes], sort_keys=True)
            methods, *_ = commands.setdefault(key, ([], imbalance, changes))
            if method not in methods:
                methods.append(method)
    return list(commands.values())


def check_overrides(overrides: dict[str, Any]) -> None:
    """Raise :class:`MislasError` for overrides that are no fields with values of their types, or that decide which runs
    a page shows rather than how they are trained."""
    if not isinstance(overrides, dict) or not all(isinstance(key, str) for key in overrides):
        raise MislasError(
            "overrides is a dict of fields and values, {\"epochs\": 20}, for papermill -y '{overrides: {epochs: 20}}'; "
            f"got {overrides!r}"
        )
    for key, value in overrides.items():
        if key in WHICH:
            raise MislasError(f"{key} says which run, not how it is trained, and is no override; {WHICH[key]}")
        check_type(key, value, *locate(key))


class Study:
    """The parameters that every notebook has.

    Args:
        profile: ``"stored"``, ``"tiny"`` or ``"full"``; see :data:`PROFILES`.
        data_root: folder with the images, for ``"full"``.
        results_root: the store; None is the project's ``results/``, and with ``"tiny"`` one that goes with the study.
        seeds: which seeds; None is every stored seed for ``"stored"``, and seed 0 otherwise.
        device: None takes a GPU if there is one; ``"tiny"`` runs on the CPU unless told otherwise.
        overrides: fields of the configuration to change in every run; see :meth:`RunConfig.override`.

    Raises:
        MislasError: unknown profile, bad seeds or overrides, ``"stored"`` with a results_root or ``"full"`` with a
            data_root that does not exist.
    """

    def __init__(
        self,
        profile: str = "stored",
        data_root: str | Path | None = None,
        results_root: str | Path | None = None,
        seeds: Sequence[int] | None = None,
        device: str | None = None,
        overrides: dict[str, Any] | None = None,
    ):
        if profile not in PROFILES:
            unknown("profile", profile, PROFILES)
        if seeds is not None and not (
            isinstance(seeds, list | tuple | range)
            and seeds
            and all(type(seed) is int and seed >= 0 for seed in seeds)
            and len(set(seeds)) == len(seeds)
        ):
            raise MislasError(
                "seeds is a list of different integers >= 0, [0, 1], for papermill -y '{seeds: [0, 1]}', or null; got "
                f"{seeds!r}"
            )
        if profile == "full" and (data_root is None or not Path(data_root).expanduser().is_dir()):
            raise DataError(f"profile 'full' needs data_root, an existing folder with the images, got {data_root!r}")
        if profile == "stored" and results_root is not None and not Path(results_root).expanduser().is_dir():
            raise DataError(f"profile 'stored' shows what is in results_root, an existing folder, got {results_root!r}")
        check_overrides(overrides or {})  # a slip stops here, not after an hour
        self.profile, self.data_root = profile, data_root
        self.seeds = list(seeds) if seeds is not None else None
        self.overrides = dict(overrides or {})
        if profile == "tiny":
            if not results_root:
                self._folder = tempfile.TemporaryDirectory(prefix="mislas-tiny-")
                results_root = self._folder.name
            self.options = Options(device=device or "cpu", workers=0)
        else:
            self.options = Options(device=device)
        self.store = Store(results_root or None)

    def changed(self, shown: Sequence[Record] = ()) -> str:
        """What the overrides change, as captions say it: ``" With epochs=2."``; empty without any.

        Args:
            shown: the runs of the table or figure. What some of them have otherwise, because the page varies it itself,
                is left out, and what none of them has.
        """
        fields = []
        for key, value in self.overrides.items():
            found = [value_of(record.config, key) for record in shown]
            if all(own in (None, value) for own in found) and (value in found or not shown):
                fields.append(f"{key}={value}")
        return f" With {', '.join(fields)}." if fields else ""

    def missing(
        self, asked: Sequence[Asked], found: Sequence[Sequence[Record]]
    ) -> list[tuple[list[str], float | None, dict[str, Any]]]:
        """What :func:`missing_by_command` gives, of runs that lack a record, or one for some of the asked seeds."""
        seeds = len(self.seeds or [0])
        return missing_by_command(asked, [records if len(records) >= seeds else [] for records in found])

    @property
    def kind(self) -> str:
        """What its numbers are: ``"tiny"`` or ``"measured"``."""
        return "tiny" if self.profile == "tiny" else "measured"

    def datasets(self, dataset: str) -> tuple[str, ...]:
        """What the profile looks at for one of the paper's datasets: the exact one first, then stand-ins."""
        if self.profile == "tiny":
            return ("generated",) if dataset_name(dataset) in LISTS else ("digits",)
        return STAND_INS.get(dataset_name(dataset), (dataset_name(dataset),))

    def title(self, dataset: str) -> str:
        """How a caption names what the profile shows for a dataset."""
        if self.profile == "tiny":
            return TINY[self.datasets(dataset)[0]]
        return paper.DATASETS.get(dataset) or f"{spec_of(dataset_name(dataset)).title}, long-tailed"

    def networks(self, dataset: str, backbones: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Backbones that a table goes through: their titles, and what each changes of a run.

        With ``"tiny"``, or if the overrides name a backbone, it is that one alone. Of Tiny-ImageNet at 64 pixels
        :data:`SHORT` comes first.
        """
        short = {}
        if dataset_name(dataset) == "tinyimagenet64" and not self.overrides:
            short = {f"ResNet-10, {SHORT['stage1.epochs']} epochs": SHORT}
        if self.profile == "tiny" or "backbone" in self.overrides:
            backbones = [self.configs(dataset, "ce", None)[0].backbone]
        full = f", {self.configs(dataset, 'ce')[0].stage1.epochs} epochs" * bool(short)
        return short | {f"{name.replace('resnet', 'ResNet-')}{full}": {"backbone": name} for name in backbones}

    def neighbours(self, dataset: str) -> dict[str, str]:
        """What to show beside one of the paper's datasets: names and titles; see :data:`NEIGHBOURS`.

        None with ``"tiny"``, which has one dataset; with ``"full"`` those whose images are under data_root.
        """
        names = () if self.profile == "tiny" else NEIGHBOURS.get(dataset_name(dataset), ())
        if self.profile == "full":
            names = [name for name in names if self._have(name)]
        return {name: f"{self.title(name)}, a neighbour of {self.title(dataset)}" for name in names}

    def _have(self, dataset: str) -> list[str]:
        return [name for name in self.datasets(dataset) if available(name, self.data_root)]

    def trains(self, dataset: str) -> bool:
        """Whether runs that are missing are trained now. With ``"full"`` they are, unless only images of the dataset's
        neighbours are under data_root; if there are none at all, the attempt says what is missing."""
        if self.profile == "full":
            return bool(self._have(dataset)) or not self.neighbours(dataset)
        return self.profile == "tiny"

    def configs(
        self, dataset: str, method: str, imbalance: float | None = None, changes: dict[str, Any] | None = None
    ) -> list[RunConfig]:
        """The configurations asked for, one per seed, on the first of :meth:`datasets` that can be had.

        Without ``imbalance`` it is 100, or that of the dataset's training list. ``changes`` are made after the study's
        overrides, in the same way.
        """
        names = self.datasets(dataset)
        if self.profile == "full":
            names = self._have(dataset) or names
        base = self._configure(names[0], method, imbalance, changes)
        return [replace(base, seed=seed) for seed in self.seeds or [base.seed]]

    def _configure(self, name: str, method: str, imbalance: float | None, changes: dict[str, Any] | None) -> RunConfig:
        return configure(name, method, imbalance, 0, self.overrides).override(changes or {})

    def _stored(
        self, name: str, method: str, imbalance: float | None, changes: dict[str, Any] | None = None
    ) -> dict[int, Record]:
        base = self._configure(name, method, imbalance, changes)
        seeds = self.store.seeds(name, base.imbalance)
        wanted = seeds if self.seeds is None else self.seeds
        records = {seed: self.store.get(replace(base, seed=seed)) for seed in wanted}
        return {seed: record for seed, record in records.items() if record is not None}

    def runs(
        self, dataset: str, method: str, imbalance: float | None = None, changes: dict[str, Any] | None = None
    ) -> list[Record]:
        """The records of one method, one per seed; trained now if the profile trains. Empty if never measured."""
        return self.each(dataset, [(method, imbalance, changes or {})])[0]

    def each(self, dataset: str, asked: Sequence[Asked]) -> list[list[Record]]:
        """What :meth:`runs` gives for each of several runs. What is trained is trained in one call: Stage-2s share a
        pass through the backbone where they can."""
        if self.trains(dataset):
            groups = [self.configs(dataset, *one) for one in asked]
            configs = [config for group in groups for config in group]
            records = iter(run(configs, self.store, self.data_root, self.options))
            return [[next(records) for _ in group] for group in groups]
        names = self.datasets(dataset)
        return [next(filter(None, (list(self._stored(name, *one).values()) for name in names)), []) for one in asked]

    def side_by_side(self, dataset: str, asked: Sequence[Asked]) -> list[list[Record]]:
        """What :meth:`each` gives, for runs that are to be compared.

        What is stored is taken from the one of :meth:`datasets` that has most of them, the exact one if they are equal:
        a method on a dataset and another on its stand-in differ in more than the method.
        """
        if self.trains(dataset):
            return self.each(dataset, asked)
        measured = [[list(self._stored(name, *one).values()) for one in asked] for name in self.datasets(dataset)]
        return max(measured, key=lambda found: sum(map(bool, found)))

    def sweep(
        self, dataset: str, method: str, changes: Sequence[dict[str, Any]], imbalance: float | None = None
    ) -> list[list[Record]]:
        """The records of one method under several changes: for each change a list, one per seed, empty if not measured.

        What is trained is trained as :meth:`each` does. What is stored is taken where variants can be compared: from
        the one dataset, and the seeds on it, that have most of the changes.
        """
        if self.trains(dataset):
            return self.each(dataset, [(method, imbalance, change) for change in changes])
        measured: dict[tuple[int, int], dict[int, Record]] = {}
        for place, name in enumerate(self.datasets(dataset)):
            for i, change in enumerate(changes):
                for seed, record in self._stored(name, method, imbalance, change).items():
                    measured.setdefault((place, seed), {})[i] = record
        most = max(map(len, measured.values()), default=0)
        best = sorted(key for key, cells in measured.items() if len(cells) == most)
        chosen = [measured[key] for key in best if key[0] == best[0][0]]
        return [[cells[i] for cells in chosen if i in cells] for i in range(len(changes))]

    def command(
        self, dataset: str, methods: Sequence[str], imbalance: float | None, changes: dict[str, Any] | None = None
    ) -> str:
        """The command that measures these runs; where it needs what a script registers, ``python SCRIPT.py`` for one
        that does and then is the command line."""
        fields = self.overrides | (changes or {})
        imbalance = fields.pop("imbalance", imbalance)
        return self._command("train", dataset, [imbalance], methods, fields)

    def campaign_command(self, dataset: str, imbalances: Sequence[float | None] = ()) -> str:
        """The command that measures all that the book shows of a dataset, :data:`GRID` and :data:`FORMS` included, at
        some imbalance factors; without any, at those that a campaign takes by itself."""
        return self._command("campaign", dataset, imbalances, None, self.overrides)

    def _command(
        self,
        name: str,
        dataset: str,
        imbalances: Sequence[float | None],
        methods: Sequence[str] | None,
        fields: dict[str, Any],
    ) -> str:
        first = self.datasets(dataset)[0]
        imbalances = [] if first in LISTS else imbalances
        some = next(iter(imbalances), None)
        configs = [configure(first, method, some, 0, fields) for method in methods or ("ce",)]
        if methods is not None:  # what changes nothing in any of these is an override for other rows
            fields = {key: to for key, to in fields.items() if any(takes(config, key, to) for config in configs)}
        own = entries_of(configs) or any(_LIBRARY.get(method) is not METHODS[method] for method in methods or ())
        parts = [f"{'python SCRIPT.py' if own else 'mislas'} {name} --dataset {first}"]
        if imbalances:
            parts.append("--imbalance " + " ".join(f"{100 if i is None else i:g}" for i in imbalances))
        if methods is not None:
            parts.append(f"--method {' '.join(methods)}")
        if self.seeds:
            parts.append(f"--seed {' '.join(map(str, self.seeds))}")
        if fields:
            parts.append("--set " + " ".join(assignment(key, value) for key, value in fields.items()))
        parts.append("--data-root DIR")
        if self.profile != "tiny" and self.store.root.absolute() != default_results_root().absolute():
            parts.append(f"--results-root {shlex.quote(str(self.store.root))}")
        return " ".join(parts)

    def provenance(self, records: Sequence[Record]) -> str:
        """Where some numbers come from, in one line; a record that is named twice counts once."""
        records = list({record.config.id: record for record in records}.values())
        if self.kind == "tiny":
            names = ", ".join(sorted({TINY[record.config.dataset] for record in records}))
            return f"Tiny smoke runs{' on ' * bool(names)}{names}: not a reproduction of the paper."
        return provenance_line(records)

    def __repr__(self) -> str:
        return f"profile {self.profile!r}: {PROFILES[self.profile]}"


def provenance_line(records: Sequence[Record]) -> str:
    """Where the numbers come from, in one line: data, seeds, commits, devices, dates. Same for the same records."""
    if not records:
        return "Nothing measured."
    sources = [record.provenance for record in records]

    def values(items) -> str:
        return ", ".join(sorted({str(item) for item in items}))

    dates = sorted(source["date"][:10] for source in sources)
    seeds = sorted({record.config.seed for record in records})
    own = sorted({entry for source in sources for entry in source.get("registered", ())})
    return (
        f"{len(records)} run{'s' * (len(records) > 1)}; "
        f"data {values(s['data'] + ' (' + s['data_checksum'] + ')' for s in sources)}; "
        f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}; "
        f"commit {values(s['commit'][:10] for s in sources)}; "
        f"{values(s['device'] for s in sources)}; torch {values(s['torch'] for s in sources)}; "
        f"{dates[0] if dates[0] == dates[-1] else dates[0] + ' to ' + dates[-1]}; last epoch"
        f"{'; registered by a script: ' + ', '.join(own) if own else ''}."
    )
