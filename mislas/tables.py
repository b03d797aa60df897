"""Tables of what is measured, beside the paper's numbers where it has them; those of the large benchmarks are in
:mod:`mislas.large_tables`.
"""

from __future__ import annotations

import functools
import itertools
import json
import statistics
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from . import paper
from .campaign import OTHERS
from .cells import (
    DASH,
    Table,
    cell,
    difference,
    marked,
    missing_notes,
    paired,
    percent,
    points,
    row_titles,
    star,
    table_of,
)
from .config import GROUPS, RunConfig, value_of
from .data import groups
from .errors import MislasError, unknown
from .evaluate import auroc, chance_ece, surest_accuracy
from .methods import METHODS, configure
from .runs import Record
from .study import ALL_OF_THEIRS, REDRAWN, Asked, Rows, Study, authors_variants


def compare(
    study: Study,
    dataset: str,
    methods: str | Sequence[str],
    imbalances: float | Sequence[float] | None,
    published: Callable[[str, float], float | None] = lambda method, imbalance: None,
    titles: dict[str, str] | None = None,
    title: str | None = None,
) -> Table:
    """Top-1 accuracy and ECE of methods on one dataset: the paper's beside ours, per imbalance factor.

    With the tiny profile the paper's numbers are left out: a smoke run is never set beside them. Where the paper has
    none, so is their column, and what is measured comes from one dataset (:meth:`mislas.study.Study.side_by_side`).
    Beside the paper's, a cell comes from the exact dataset where that is measured; if others of the table do not, these
    are marked. A cell that has not been measured has a mark, too. Notes under the table name the commands for both.

    Args:
        study: whose runs to show.
        dataset: one of the paper's, e.g. ``"cifar10"``.
        methods: rows, in order.
        imbalances: imbalance factors, in order. None is the only one of a dataset of list files, and 100 of others.
        published: the paper's accuracy in percent for (method, imbalance), or None.
        titles: row names; default the registry's.
        title: what the caption calls the dataset; default :meth:`mislas.study.Study.title`.
    """
    methods = [methods] if isinstance(methods, str) else methods
    imbalances = [imbalances] if imbalances is None or isinstance(imbalances, Real) else imbalances
    beside = study.kind != "tiny" and any(
        published(method, imbalance) is not None for method in methods for imbalance in imbalances
    )
    asked: list[Asked] = []
    found: list[list[Record]] = []
    for imbalance in imbalances:
        runs = [(method, imbalance, {}) for method in methods]
        asked += runs
        found += study.each(dataset, runs) if beside else study.side_by_side(dataset, runs)
    shown = [record for records in found for record in records]
    accuracies, notes = marked(study, dataset, asked, found)
    for place, records in enumerate(found):
        if records:
            many = f" (n={len(records)})" if len(records) > 1 else ""
            accuracies[place] = cell(records, "accuracy") + many + star(records, shown)
    columns: dict[tuple[str, str], list[str]] = {}
    for place, imbalance in enumerate(imbalances):
        head = "top-1" if imbalance is None else f"IF {imbalance:g}"
        cells = slice(place * len(methods), (place + 1) * len(methods))
        if beside:
            numbers = [published(method, imbalance) for method in methods]
            columns[head, "paper"] = [DASH if number is None else f"{number:.1f}" for number in numbers]
        columns[head, study.kind] = accuracies[cells]
        columns[head, "ECE"] = [cell(records, "ece") + star(records, shown) for records in found[cells]]
    names = {name: method.title for name, method in METHODS.items()} | (titles or {})
    frame = pd.DataFrame(columns, index=[names[method] for method in methods])
    said = f"{'paper and measured' if beside else study.kind}, with the {study.kind} ECE (%)"
    caption = f"Top-1 accuracy (%), {title or study.title(dataset)}: {'paper' if beside and not shown else said}."
    return table_of(study, frame, caption, notes, shown, beside)


#: Table 3's two Stage-1s and what builds on them, with cRT and LWS without mixup added; and all its rows, in order.
TWO_STAGES = ("ce", "mixup", "crt", "lws", "crt+mixup", "lws+mixup", "mislas")
TABLE3_ROWS = (*TWO_STAGES[:2], *OTHERS, *TWO_STAGES[2:])


def table3(
    study: Study,
    dataset: str,
    imbalances: Sequence[float] = paper.IMBALANCES,
    methods: Sequence[str] = TABLE3_ROWS,
) -> Table:
    """Table 3 for one dataset: :data:`TABLE3_ROWS`, or some of them."""
    published = functools.partial(_published_table3, dataset)
    titles = paper.TITLES if study.kind != "tiny" and not study.overrides else None  # they name the paper's epochs
    return compare(study, dataset, methods, imbalances, published, titles)


def _published_table3(dataset: str, method: str, imbalance: float) -> float | None:
    numbers = paper.TABLE3.get(dataset, {}).get(method)
    return numbers[paper.IMBALANCES.index(imbalance)] if numbers and imbalance in paper.IMBALANCES else None


def beside_authors_code(study: Study, dataset: str, imbalances: Sequence[float] = paper.IMBALANCES) -> Table:
    """Accuracy and ECE that the authors published with their code, best epoch on the test set, beside ours at the last:
    Stage-1 with mixup; MiSLAS by the paper; and MiSLAS by their configuration (:data:`mislas.study.ALL_OF_THEIRS`)."""
    theirs = paper.AUTHORS_CODE[dataset]
    rows = {
        f"{name}, IF {imbalance:g}": (theirs[method][imbalance], (method, imbalance, changes))
        for imbalance in imbalances
        for name, method, changes in (
            ("mixup", "mixup", {}),
            ("MiSLAS, the paper's equations", "mislas", {}),
            ("MiSLAS, their configuration", "mislas", authors_variants(dataset, imbalance)[ALL_OF_THEIRS]),
        )
    }
    asked = [run for _, run in rows.values()]
    found = study.each(dataset, asked)
    shown = [record for records in found for record in records]
    beside = study.kind != "tiny"
    cells: dict[tuple[str, str], list[str]] = {}
    if beside:
        cells["authors' code", "accuracy"] = [f"{accuracy:.1f}" for (accuracy, _), _ in rows.values()]
        cells["authors' code", "ECE"] = [f"{ece:g}" for (_, ece), _ in rows.values()]
    for head, key in {"accuracy": "accuracy", "ECE": "ece"}.items():
        cells[study.kind, head] = [cell(records, key) + star(records, shown) for records in found]
    frame = pd.DataFrame(cells, index=list(rows))
    caption = f"Top-1 accuracy and ECE (%), {study.title(dataset)}: published with the authors' code, and ours."
    return table_of(study, frame, caption, missing_notes(study, dataset, asked, found), shown, beside)


def table2(
    study: Study, dataset: str, imbalances: Sequence[float] = paper.IMBALANCES, title: str | None = None
) -> Table:
    """Table 2 for one dataset: LWS as mixup, shifted batch norm and label-aware smoothing are added."""
    published = functools.partial(_published_table2, dataset)
    return compare(study, dataset, list(paper.TABLE2), imbalances, published, paper.TABLE2_TITLES, title)


def _published_table2(dataset: str, method: str, imbalance: float) -> float | None:
    known = dataset == "cifar100" and imbalance in paper.IMBALANCES
    return paper.TABLE2[method][paper.IMBALANCES.index(imbalance)] if known else None


def table2_gains(
    study: Study, dataset: str, imbalances: Sequence[float] = paper.IMBALANCES, title: str | None = None
) -> Table:
    """What each module of Table 2 adds to accuracy and ECE, in points: every row minus the row before it.

    Ours compare equal data and seeds, with the standard error of :func:`difference`; a dash where a row is missing.
    """
    methods = list(paper.TABLE2)
    beside = study.kind != "tiny" and dataset == "cifar100"
    columns, shown = {}, []
    for imbalance in imbalances:
        measured = study.side_by_side(dataset, [(method, imbalance, {}) for method in methods])
        records = dict(zip(methods, measured, strict=True))
        steps = [paired(records[new], records[old]) for old, new in itertools.pairwise(methods)]
        shown += [record for found in records.values() for record in found]
        if beside:
            numbers = [_published_table2(dataset, method, imbalance) for method in methods]
            gains = [DASH if new is None else points(new - old) for old, new in itertools.pairwise(numbers)]
            columns[f"IF {imbalance:g}", "paper"] = gains
        columns[f"IF {imbalance:g}", study.kind] = [difference(new, old) if new else DASH for new, old in steps]
        columns[f"IF {imbalance:g}", "ECE"] = [_ece_change(new, old) if new else DASH for new, old in steps]
    frame = pd.DataFrame(columns, index=["+ MU", "+ SL", "+ LAS, and ΔW"])
    caption = (
        f"What each module adds to top-1 accuracy and to ECE, in points, {title or study.title(dataset)}."
        + " ± is the standard error over the test images, not over seeds." * bool(shown)
    )
    return table_of(study, frame, caption, [], shown, beside)


def _ece_change(new: Sequence[Record], old: Sequence[Record]) -> str:
    means = [statistics.mean(record.metrics["ece"] for record in records) for records in (new, old)]
    return points(100 * (means[0] - means[1]))


def variants(
    study: Study,
    dataset: str,
    method: str,
    changes: dict[str, dict[str, Any]],
    imbalance: float = 100,
    published: dict[str, float] | None = None,
    title: str | None = None,
) -> Table:
    """Accuracy, ECE and NLL of one method under several changes, and how far accuracy is from the first row's.

    Args:
        study: whose runs to show; see :meth:`mislas.study.Study.sweep`.
        changes: row names, and what each row changes of the method. The first row is what the others are held against.
        published: the paper's difference in points, by row name; left out with the tiny profile.
        title: what the caption calls the dataset; default :meth:`mislas.study.Study.title`.
    """
    found = study.sweep(dataset, method, list(changes.values()), imbalance)
    rows = {}
    for name, records in zip(changes, found, strict=True):
        new, old = paired(records, found[0])
        away = DASH
        if new and records is not found[0]:
            same = all(one.config.id == other.config.id for one, other in zip(new, old, strict=True))
            away = "the same run" if same else difference(new, old)  # what it changes may mean nothing in this method
        rows[name] = [
            percent([record.metrics["accuracy"] for record in records]) if records else "not measured",
            percent([record.metrics["ece"] for record in records]) if records else DASH,
            f"{statistics.mean(record.metrics['nll'] for record in records):.3f}" if records else DASH,
            away,
        ]
    frame = pd.DataFrame.from_dict(rows, orient="index")
    frame.columns = pd.MultiIndex.from_tuples((study.kind, c) for c in ("accuracy", "ECE", "NLL", "difference"))
    beside = bool(published) and study.kind != "tiny"
    if beside:
        said = [points(published[name]) if name in published else DASH for name in changes]
        frame.insert(0, ("paper", "difference"), said)
    caption = (
        f"{METHODS[method].title} with changes, {title or study.title(dataset)}, IF {imbalance:g}: accuracy, ECE (%), "
        "NLL (nats), and accuracy minus the first row's (points, ± standard error over the test images)."
    )
    asked = [(method, imbalance, change) for change in changes.values()]
    notes = missing_notes(study, dataset, asked, found)
    return table_of(study, frame, caption, notes, [record for records in found for record in records], beside)


def learned_on(
    study: Study,
    dataset: str,
    rows: Rows,
    columns: Sequence[str],
    imbalance: float = 100,
    title: str | None = None,
    changes: dict[str, Any] | None = None,
) -> Table:
    """Accuracy over all, medium and few classes, where there are such, and ECE: what Stage-2 learns in rows, on what in
    columns.

    Args:
        rows: for each of ``columns`` a run, as (method, changes). See :data:`mislas.study.LEARNED`.
        columns: their titles.
        title: what the caption calls the dataset; default :meth:`mislas.study.Study.title`.
        changes: what is changed in every run.
    """
    asked = {
        (name, column): (run[0], imbalance, (changes or {}) | run[1])
        for name, row in rows.items()
        for column, run in zip(columns, row, strict=True)
    }
    runs = list(asked.values())
    measured = study.side_by_side(dataset, runs)
    found = dict(zip(asked, measured, strict=True))
    shown = [record for records in measured for record in records]
    heads = {group: GROUP_METRICS[group] for group in ("all", "medium", "few")} | {"ECE": "ece"}
    known = [head for head, key in heads.items() if any(record.metrics[key] is not None for record in shown)]
    cells = {}
    for column, head in itertools.product(columns, known):
        cells[column, head] = [cell(found[name, column], heads[head], "not measured") for name in rows]
    frame = pd.DataFrame(cells, index=list(rows))
    caption = (
        f"Top-1 accuracy and ECE (%), {title or study.title(dataset)}, IF {imbalance:g}: "
        "by what Stage-2 learns, and by batch norm's statistics."
    )
    return table_of(study, frame, caption, missing_notes(study, dataset, runs, measured), shown)


def true_probabilities(
    study: Study, dataset: str, methods: dict[str, str], imbalance: float = 100, title: str | None = None
) -> Table:
    """Probability that runs give to the true class, by group of classes: mean, and share of images above 0.9 (%).

    Args:
        methods: column titles and methods. First seed of each.
    """
    columns, shown = {}, []
    asked = [(method, imbalance, {}) for method in methods.values()]
    found = study.side_by_side(dataset, asked)
    for head, all_seeds in zip(methods, found, strict=True):
        records = all_seeds[:1]
        shown += records
        parts = by_group(records[0]) if records else dict.fromkeys(GROUPS)
        columns[head, "mean"] = [DASH if p is None else f"{p.mean():.3f}" for p in parts.values()]
        columns[head, "> 0.9"] = [DASH if p is None else f"{100 * (p > 0.9).mean():.1f}" for p in parts.values()]
    frame = pd.DataFrame(columns, index=GROUPS)
    caption = (
        f"Probability of the true class, {title or study.title(dataset)}, IF {imbalance:g}, first seed: "
        "mean over test images, and share above 0.9 (%). A dash: not measured, or a group without classes."
    )
    return table_of(study, frame, caption, missing_notes(study, dataset, asked, found), shown)


def by_group(record: Record) -> dict[str, np.ndarray | None]:
    """A run's probabilities of the true class for test images of many, medium and few classes; None for no class."""
    predictions = record.predictions()
    named = groups(record.arrays()["class_counts"].tolist())
    inside = {name: np.isin(predictions.target, classes) for name, classes in named.items()}
    return {name: predictions.true_probability[mask] if mask.any() else None for name, mask in inside.items()}


def over_confidence(
    study: Study,
    dataset: str,
    methods: Sequence[str] | dict[str, tuple[str, dict[str, Any]]],
    imbalance: float = 100,
    title: str | None = None,
) -> Table:
    """Mean confidence minus accuracy, in points, for the largest class and for each group of classes: over the images
    that are of it, and over those that are taken for it. Mean over seeds. Only the second says how far a prediction may
    be believed: a model knows what it predicts, and not the true class.

    Args:
        methods: as :func:`measures` takes them.
    """
    methods = _rows(methods)
    asked = [(method, imbalance, own) for method, own in methods.values()]
    measured = study.side_by_side(dataset, asked)
    shown = [record for records in measured for record in records]
    gaps = [[gaps_by_group(record) for record in records] for records in measured]
    each = list(itertools.chain.from_iterable(gaps))
    known = [key for key in (each[0] if each else ()) if any(gap[key] is not None for gap in each)]
    cells = {key: [_mean([gap[key] for gap in found], 100, 1) for found in gaps] for key in known}
    frame = pd.DataFrame(cells, index=list(methods))
    caption = (
        f"Mean confidence minus accuracy (points), {title or study.title(dataset)}, IF {imbalance:g}: over the images "
        "of a group of classes, and over the predictions of one. A dash: nothing to take it over."
    )
    return table_of(study, frame, caption, missing_notes(study, dataset, asked, measured), shown)


def gaps_by_group(record: Record) -> dict[tuple[str, str], float | None]:
    """A run's mean confidence minus its accuracy over some test images: those of a group of classes, by their true
    class and by the predicted one. None for no images."""
    predictions, counts = record.predictions(), record.arrays()["class_counts"]
    named = {"largest": [int(counts.argmax())]} | groups(counts.tolist())
    found = {}
    for head, classes in (("by true class", predictions.target), ("by predicted class", predictions.predicted)):
        for name, members in named.items():
            mask = np.isin(classes, members)
            gap = predictions.confidence[mask] - predictions.correct[mask]
            found[head, name] = float(gap.mean()) if mask.any() else None
    return found


PLACES = {"first": "first BN", "last": "last BN"}


def shift_sizes(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """How far batch norm's running statistics moved, averaged over channels, for the ``"first"`` and ``"last"`` layer.

    Args:
        before, after: arrays of two runs: ``bn_first_mean``, ``bn_first_var``, and the same of ``last``; each ``(C,)``.

    Returns:
        By layer: ``mean`` and ``variance``, the absolute changes; ``mean_relative``, that of the mean in old standard
        deviations; ``variance_relative``, that of the variance as a share of the old one.
    """
    sizes = {}
    for place in PLACES:
        mean, variance = (np.abs(after[f"bn_{place}_{k}"] - before[f"bn_{place}_{k}"]) for k in ("mean", "var"))
        old = before[f"bn_{place}_var"]
        sizes[place] = {
            "mean": float(mean.mean()),
            "variance": float(variance.mean()),
            "mean_relative": float((mean / np.sqrt(old)).mean()),
            "variance_relative": float((variance / old).mean()),
        }
    return sizes


Pairs = dict[str, tuple[tuple[str, dict[str, Any]], tuple[str, dict[str, Any]]]]


def shifts(study: Study, dataset: str, pairs: Pairs, imbalance: float = 100, title: str | None = None) -> Table:
    """The size of the change in the first and the last batch norm; see :func:`shift_sizes`.

    Args:
        pairs: row titles, and for each the runs before and after, as (method, changes). First seed of each.
    """
    found, notes, shown = _shifts(study, dataset, pairs, imbalance)
    rows = {
        f"{name}: {PLACES[place]}": [f"{size:.3f}" for size in sizes[place].values()] if sizes else [DASH] * 4
        for name, sizes in found.items()
        for place in PLACES
    }
    frame = pd.DataFrame.from_dict(rows, orient="index", columns=["Δμ", "Δσ²", "Δμ / σ", "Δσ² / σ²"])
    caption = (
        f"Absolute change of batch norm's running statistics, mean over channels, {title or study.title(dataset)}, "
        f"IF {imbalance:g}, first seed. The last two columns are relative to the old statistics."
    )
    return table_of(study, frame, caption, notes, shown)


def shift_remarks(study: Study, dataset: str, pairs: Pairs, imbalance: float = 100, title: str | None = None) -> Table:
    """Whether the paper's two remarks on Figure 6 hold, for the sizes of :func:`shifts`."""
    found, _, shown = _shifts(study, dataset, pairs, imbalance)
    columns = {}
    for name, sizes in found.items():
        for scale, mean, variance in (
            ("absolute", "mean", "variance"),
            ("relative", "mean_relative", "variance_relative"),
        ):
            cells = [DASH] * 4
            if sizes:
                first, last = sizes["first"], sizes["last"]
                holds = [
                    first[variance] > first[mean],
                    last[variance] > last[mean],
                    last[mean] < first[mean],
                    last[variance] < first[variance],
                ]
                cells = ["yes" if yes else "no" for yes in holds]
            columns[name, scale] = cells
    index = [
        "(i) σ² changes more than μ, first BN",
        "(i) σ² changes more than μ, last BN",
        "(ii) μ changes less in the last BN",
        "(ii) σ² changes less in the last BN",
    ]
    frame = pd.DataFrame(columns, index=index)
    caption = f"Do the paper's two remarks hold? {title or study.title(dataset)}, IF {imbalance:g}."
    return table_of(study, frame, caption, [], shown)


def _shifts(
    study: Study, dataset: str, pairs: Pairs, imbalance: float
) -> tuple[dict[str, dict[str, dict[str, float]]], list[str], list[Record]]:
    """Sizes by row title (empty if not measured), the commands that are missing, and the records used."""
    found, shown = {}, []
    asked = [(method, imbalance, changes) for pair in pairs.values() for method, changes in pair]
    measured = study.side_by_side(dataset, asked)
    for name, old, new in zip(pairs, measured[::2], measured[1::2], strict=True):
        before, after = paired(old, new)
        shown += before[:1] + after[:1]
        found[name] = shift_sizes(before[0].arrays(), after[0].arrays()) if before else {}
    return found, missing_notes(study, dataset, asked, measured), shown


def table5(study: Study) -> Table:
    """Table 5, the settings: the paper's beside what the code trains MiSLAS with, the study's overrides included.

    Where a cell of the code differs it says so. The tiny profile shows what it trains with, the settings of the digits,
    and no row of the paper.
    """
    columns = paper.TABLE5_COLUMNS
    rows: dict[str, list[str]] = {}
    if study.kind == "tiny":
        ours = _settings(configure("digits", "mislas", overrides=study.overrides))
        rows["digits: code"] = [_setting(value) for value in ours]
        caption = "Settings of the tiny profile, as the code has them; they are not from the paper."
        notes = []
    else:
        agree = differ = 0
        for dataset, said in paper.TABLE5.items():
            name = paper.TABLE5_TITLES[dataset]
            rows[f"{name}: paper"] = [_setting(value) for value in said]
            ours = _settings(configure(dataset, "mislas", overrides=study.overrides))
            same = [mine == theirs for mine, theirs in zip(ours, said, strict=True)]
            agree, differ = agree + sum(same), differ + same.count(False)
            rows[f"{name}: code"] = [
                _setting(value) + ("" if equal else ", differs") for value, equal in zip(ours, same, strict=True)
            ]
        caption = "Table 5: the paper's settings, and what the code trains MiSLAS with."
        notes = [f"Cells that agree: {agree}; that differ: {differ}."]
    frame = pd.DataFrame.from_dict(rows, orient="index", columns=pd.MultiIndex.from_tuples(columns))
    return Table(frame, caption + study.changed(), notes)


def _settings(config: RunConfig) -> list[Any]:
    """A configuration's values in the columns of Table 5; where its stages differ in a common one, both."""
    found = []
    for fields in paper.TABLE5_COLUMNS.values():
        values = dict.fromkeys(value_of(config, path) for path in fields)
        found.append(next(iter(values)) if len(values) == 1 else tuple(values))
    return found


def _setting(value: Any) -> str:
    if isinstance(value, tuple):
        return " / ".join(map(_setting, value))
    return value if isinstance(value, str) else f"{value:g}"


MEASURES = {
    "accuracy": ("accuracy", 100, 1),
    "confidence": ("confidence", 100, 1),
    "ece": ("ECE", 100, 1),
    "nll": ("NLL", 1, 3),
    "brier": ("Brier", 1, 3),
    "mce": ("MCE", 100, 1),
    "adaptive_ece": ("adaptive ECE", 100, 1),
    "classwise_ece": ("classwise ECE", 100, 2),
    "accuracy_many": ("acc., many", 100, 1),
    "accuracy_medium": ("acc., medium", 100, 1),
    "accuracy_few": ("acc., few", 100, 1),
}
#: Of runs that hold training images out (``stage1.holdout``): what a setting may be chosen by.
HELD_OUT = {"held_out_accuracy": ("acc., held out", 100, 1), "held_out_nll": ("NLL, held out", 1, 3)}
#: Accuracy and ECE by group of classes.
BY_GROUP = {
    f"{key}{group}": (f"{title}{group.replace('_', ', ')}", 100, 1)
    for key, title in (("accuracy", "accuracy"), ("ece", "ECE"))
    for group in ("", "_many", "_medium", "_few")
}


#: Whether confidence tells right from wrong, and how much of an ECE is chance.
RANKING = {
    "accuracy": ("accuracy", 100, 1),
    "surest": ("accuracy, surest half", 100, 1, surest_accuracy),
    "auroc": ("AUROC", 100, 1, auroc),
    "ece": ("ECE", 100, 1),
    "chance": ("ECE by chance", 100, 1, chance_ece),
}


def measures(
    study: Study,
    dataset: str,
    methods: Sequence[str] | dict[str, tuple[str, dict[str, Any]]],
    imbalance: float | None = 100,
    title: str | None = None,
    columns: dict[str, tuple] = MEASURES,
    changes: dict[str, Any] | None = None,
) -> Table:
    """Every measure of some methods: mean over seeds; all in percent but NLL (nats) and Brier (0..2).

    A group that has no classes in any of the runs has no column.

    Args:
        methods: names; or, by the row's title, a method and what the row changes of it.
        imbalance: None is the only one of a dataset of list files, and 100 of others.
        columns: of a record's metrics, by name: column title, factor, digits. :data:`MEASURES`, :data:`BY_GROUP`,
            :data:`RANKING` or :data:`HELD_OUT`. A measure of your own has a fourth part, a function of a run's
            :class:`mislas.evaluate.Predictions`.
        changes: what is changed in every run.

    Raises:
        UnknownName: a column that is neither among the metrics nor has a function.
    """
    methods = _rows(methods)
    for key, (*_, last) in columns.items():
        if not callable(last) and key not in MEASURES | BY_GROUP | HELD_OUT:
            unknown("measure", key, MEASURES | BY_GROUP | HELD_OUT)

    def value(record: Record, key: str) -> float | None:
        own = columns[key][3:]
        found = own[0](record.predictions()) if own else record.metrics.get(key)
        if not (found is None or isinstance(found, Real)):
            raise MislasError(f"measure {key!r} must be a number, or None for no value, got {found!r:.80}")
        return found

    asked = [(method, imbalance, (changes or {}) | own) for method, own in methods.values()]
    measured = study.side_by_side(dataset, asked)
    shown = [record for records in measured for record in records]
    found = {key: [[value(record, key) for record in records] for records in measured] for key in columns}
    columns = {
        key: columns[key] for key, rows in found.items() if any(v is not None for values in rows for v in values)
    }
    rows = {}
    for i, name in enumerate(methods):
        cells = []
        for key, (_, scale, digits, *_) in columns.items():
            cells.append(_mean(found[key][i], scale, digits))
        rows[name] = cells
    frame = pd.DataFrame.from_dict(rows, orient="index", columns=[head for head, *_ in columns.values()])
    factor = "" if imbalance is None else f", IF {imbalance:g}"
    units = " NLL in nats, Brier from 0 to 2, the others in %." if "nll" in columns else " In %."
    caption = f"Accuracy and calibration, {title or study.title(dataset)}{factor}.{units * bool(shown)}"
    return table_of(study, frame, caption, missing_notes(study, dataset, asked, measured), shown)


def _rows(
    methods: Sequence[str] | dict[str, tuple[str, dict[str, Any]]],
) -> dict[str, tuple[str, dict[str, Any]]]:
    """By the row's title, a method and what the row changes of it."""
    if isinstance(methods, dict):
        return methods
    methods = [methods] if isinstance(methods, str) else methods
    return {name: (method, {}) for name, method in zip(row_titles(methods), methods, strict=True)}


def _mean(values: Sequence[float | None], scale: float, digits: int) -> str:
    """Mean over seeds; a dash where there is none, or a group without classes."""
    return DASH if not values or None in values else f"{scale * statistics.mean(values):.{digits}f}"


def redrawn(study: Study, dataset: str, imbalance: float = 100) -> Table:
    """Measures of each draw of Stage-2 on the same Stage-1 (:data:`mislas.study.REDRAWN`), mean over seeds."""
    asked = [(method, imbalance, changes) for draws in REDRAWN.values() for method, changes in draws]
    measured = study.side_by_side(dataset, asked)
    shown = [record for records in measured for record in records]
    keys = ("accuracy", "accuracy_medium", "ece", "mce", "nll")
    keys = [key for key in keys if any(record.metrics[key] is not None for record in shown)]
    rows, left = {}, iter(measured)
    for title, draws in REDRAWN.items():
        found = [next(left) for _ in draws]
        rows[title] = [
            " / ".join(_mean([record.metrics[key] for record in records], *MEASURES[key][1:]) for records in found)
            for key in keys
        ]
    frame = pd.DataFrame.from_dict(rows, orient="index", columns=[MEASURES[key][0] for key in keys])
    caption = (
        f"Three draws of Stage-2 on one Stage-1, the seed's own first, {study.title(dataset)}, IF {imbalance:g}. "
        "NLL in nats, the others in %."
    )
    return table_of(study, frame, caption, missing_notes(study, dataset, asked, measured), shown)


def selection(
    study: Study, dataset: str, methods: Sequence[str], imbalance: float = 100, title: str | None = None
) -> Table:
    """What reporting the best epoch on the test set would add to accuracy: last, best, difference; mean over seeds.

    The best is that of the epochs at which a run looked at the test set, so the difference is a lower bound.
    """
    rows, shown = {}, []
    asked = [(method, imbalance, {}) for method in methods]
    found = study.side_by_side(dataset, asked)
    for name, records in zip(row_titles(methods), found, strict=True):
        shown += records
        looked = [[row["test_accuracy"] for row in record.history if "test_accuracy" in row] for record in records]
        if not records:
            rows[name] = [DASH] * 4
            continue
        last, best = (statistics.mean(of(values) for values in looked) for of in (lambda v: v[-1], max))
        epochs = sorted({len(values) for values in looked})
        alone = epochs == [1]  # a run that looked once, at its end, says nothing of selection
        rows[name] = [
            f"{100 * last:.1f}",
            DASH if alone else f"{100 * best:.1f}",
            DASH if alone else points(100 * (best - last)),
            ", ".join(map(str, epochs)),
        ]
    columns = ["last epoch", "best on the test set", "gain", "epochs looked at"]
    frame = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
    caption = f"Top-1 accuracy (%), {title or study.title(dataset)}, IF {imbalance:g}: what selection adds."
    return table_of(study, frame, caption, missing_notes(study, dataset, asked, found), shown)


def chosen(
    study: Study,
    dataset: str,
    method: str,
    changes: Sequence[dict[str, Any]],
    imbalance: float = 100,
    title: str | None = None,
) -> Table:
    """Which of several settings each measure on held-out images would choose, and which the test set, as it must not;
    and what the setting then comes to on both. Mean over seeds; a dash until all are measured.

    Args:
        changes: of the method, each with ``stage1.holdout``; fields that all have alike are not shown.
    """
    found = study.sweep(dataset, method, list(changes), imbalance)
    shown = [record for records in found for record in records]
    measured = all("held_out_nll" in record.metrics for record in shown) and all(found)
    alike = {key for key, value in changes[0].items() if all(other.get(key) == value for other in changes)}
    columns = HELD_OUT | {key: (f"test {MEASURES[key][0]}", *MEASURES[key][1:]) for key in ("accuracy", "ece", "nll")}
    means = [
        {key: statistics.mean(record.metrics[key] for record in records) for key in columns} if measured else {}
        for records in found
    ]
    rows = {}
    for name, key, best in (
        ("accuracy, held out", "held_out_accuracy", max),
        ("NLL, held out", "held_out_nll", min),
        ("accuracy on test images", "accuracy", max),
    ):
        place = best(range(len(found)), key=lambda at, key=key: means[at][key]) if measured else 0
        setting = ", ".join(f"{field} = {value}" for field, value in changes[place].items() if field not in alike)
        cells = [_mean([means[place][key]] if measured else [], *form) for key, (_, *form) in columns.items()]
        rows[name] = [setting if measured else DASH, *cells]
    heads = ["setting", *(head for head, *_ in columns.values())]
    frame = pd.DataFrame.from_dict(rows, orient="index", columns=heads)
    caption = (
        f"What of {len(found)} settings of {METHODS[method].title} would be chosen, by rows, and what it comes to, "
        f"{title or study.title(dataset)}, IF {imbalance:g}. NLL in nats, the others in %; on held-out images every "
        "class counts alike."
    )
    asked = [(method, imbalance, change) for change in changes]
    return table_of(study, frame, caption, missing_notes(study, dataset, asked, found), shown)


#: What a row's cells are called: paper's names of groups, and the metric that each is.
GROUP_METRICS = {"many": "accuracy_many", "medium": "accuracy_medium", "few": "accuracy_few", "all": "accuracy"}


def distance(study: Study, dataset: str, imbalances: Sequence[float] = paper.IMBALANCES) -> Table:
    """How far our mean accuracy is from the paper's, in percentage points, where Table 3 has both: on the exact images
    alone, since what a lossy copy differs by is its own doing.

    Raises:
        MislasError: a dataset that Table 3 does not have.
    """
    if dataset not in paper.TABLE3:
        unknown("dataset of Table 3", dataset, paper.TABLE3)
    rows, shown = {}, []
    for method in paper.TABLE3[dataset]:
        cells = []
        for imbalance in imbalances:
            records = [r for r in study.runs(dataset, method, imbalance) if r.config.dataset == dataset]
            published = _published_table3(dataset, method, imbalance)
            if records and published is not None:
                shown += records
                ours = 100 * statistics.mean(record.metrics["accuracy"] for record in records)
                cells.append(points(ours - published))
            else:
                cells.append(DASH)
        if set(cells) != {DASH}:
            rows[paper.TITLES.get(method, METHODS[method].title)] = cells
    frame = pd.DataFrame.from_dict(rows, orient="index", columns=[f"IF {imbalance:g}" for imbalance in imbalances])
    caption = (
        f"Top-1 accuracy, {paper.DATASETS[dataset]}: measured minus paper, in points; a dash where one is missing."
    )
    return table_of(study, frame, caption, [], shown)


def copies(study: Study, dataset: str, methods: Sequence[str], imbalance: float = 100) -> Table:
    """Accuracy and ECE of the same methods on a dataset and on its stand-ins, and how far these are from it, in points.

    Methods that are not measured on all of them are left out. The copies' images may come in another order, so another
    part of them may have been cut away.
    """
    exact, *others = study.datasets(dataset)
    found = {
        name: {m: [r for r in study.runs(name, m, imbalance) if r.config.dataset == name] for m in methods}
        for name in (exact, *others)
    }
    known = [method for method in methods if all(runs[method] for runs in found.values())]
    heads = {"accuracy": "accuracy", "ECE": "ece"}
    means = {
        (name, head): [100 * statistics.mean(record.metrics[key] for record in runs[method]) for method in known]
        for name, runs in found.items()
        for head, key in heads.items()
    }
    cells = {column: [f"{value:.1f}" for value in values] for column, values in means.items()}
    for name, head in itertools.product(others, heads):
        pairs = zip(means[name, head], means[exact, head], strict=True)
        cells["difference", head] = [points(copy - original) for copy, original in pairs]
    frame = pd.DataFrame(cells, index=[METHODS[method].title for method in known])
    shown = [record for runs in found.values() for method in known for record in runs[method]]
    caption = (
        f"Top-1 accuracy and ECE (%), IF {imbalance:g}, {study.kind}: {' and '.join(found)}; differences in points."
    )
    missing = [method for method in methods if method not in known]
    notes = [f"Not measured on both yet: {', '.join(METHODS[method].title for method in missing)}."] if missing else []
    return Table(frame, caption, [*notes, study.provenance(shown)])


def two_ways(folder: Path) -> Table:
    """What ``benchmarks/accuracy.py`` has measured of two ways of training: accuracy of each, and ours minus usual.

    Args:
        folder: with its files, ``accuracy-*.json``. Files with one run of a way are left out.
    """
    rows, notes = {}, []
    for path in sorted(folder.glob("accuracy-*.json")):
        measured = json.loads(path.read_text())
        setting, found = measured["setting"], measured["found"]
        if found["interval"] is None:
            continue
        name = "{dataset} IF={imbalance:g}, {method}, {epochs} epochs".format(**setting)
        rows[name] = {
            **{way: "{mean:.1f} ± {deviation:.1f} (n={runs})".format(**found[way]) for way in ("usual", "ours")},
            "difference": points(found["difference"]),
            "95% interval": " to ".join(map(points, found["interval"])),
        }
        source = {
            key: ", ".join(sorted({str(run[key])[:10] for run in measured["runs"]}))
            for key in ("seed", "commit", "date")
        }
        notes.append(
            f"{name}: data {setting['data_checksum']}; seeds {source['seed']}; commit {source['commit']}; "
            f"{setting['device']}{', compiled' * setting['compile']}; {source['date']}; last epoch."
        )
    caption = "Top-1 accuracy (%): usual and ours, mean ± standard deviation over seeds; difference in points."
    return Table(pd.DataFrame.from_dict(rows, orient="index"), caption if rows else "Not measured yet.", notes)
