"""The tables of the large benchmarks: Tables 1, 4, 6, 7 and 8, and the weight norms of Figure 2."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from . import paper
from .cells import (
    DASH,
    Table,
    cell,
    difference,
    how_to,
    marked,
    paired,
    points,
    row_titles,
    table_of,
)
from .config import GROUPS
from .data import groups
from .methods import METHODS, settings_of
from .runs import Record
from .study import Study
from .tables import GROUP_METRICS


def by_groups(
    study: Study,
    dataset: str,
    published: dict[str, Sequence[float]],
    columns: Sequence[str] = paper.GROUPS,
    changes: dict[str, Any] | None = None,
    title: str | None = None,
) -> Table:
    """Tables 4, 6, 7 and 8: top-1 accuracy by group of classes and over all, the paper's beside ours, and our ECE.

    With the tiny profile and on neighbours there is no number of the paper. A method that has not been measured names
    the command.

    Args:
        dataset: a dataset of the paper, or a neighbour.
        published: rows, and the paper's accuracy (%) in each of ``columns``; empty where the paper has none.
        columns: of :data:`mislas.paper.GROUPS`.
        changes: what is changed in every run, such as the backbone.
        title: what the caption calls the data; default :meth:`mislas.study.Study.title`.
    """
    beside = study.kind != "tiny" and dataset in paper.DATASETS and all(published.values())
    asked = [(method, None, changes or {}) for method in published]
    found = study.each(dataset, asked)
    marks, notes = marked(study, dataset, asked, found, functools.partial(how_to, study))
    cells: dict[tuple[str, str], list[str]] = {}
    for place, column in enumerate(columns):
        if beside:
            cells[column, "paper"] = [f"{published[method][place]:.1f}" for method in published]
        cells[column, study.kind] = [
            mark or cell(records, GROUP_METRICS[column]) for mark, records in zip(marks, found, strict=True)
        ]
    cells["ECE", study.kind] = [cell(records, "ece") for records in found]
    frame = pd.DataFrame(cells, index=[paper.TITLES_LARGE.get(m, METHODS[m].title) for m in published])
    shown = [record for records in found for record in records]
    caption = f"Top-1 accuracy{' and ECE' * bool(shown)} (%), {title or study.title(dataset)}."
    return table_of(study, frame, caption, notes, shown, beside)


#: Rows of Table 1 as the paper prints them.
TABLE1_TITLES = {
    (False, None): "Stage-1 (no mixup)",
    (True, None): "Stage-1 (mixup)",
    (False, False): "Stage-1 (no mixup) + Stage-2 (no mixup)",
    (False, True): "Stage-1 (no mixup) + Stage-2 (mixup)",
    (True, False): "Stage-1 (mixup) + Stage-2 (no mixup)",
    (True, True): "Stage-1 (mixup) + Stage-2 (mixup)",
}


def table1_runs(study: Study, dataset: str, head: str, first: bool, second: bool | None) -> tuple[str, dict[str, Any]]:
    """A cell of Table 1 as (method, changes); mixup's alpha in Stage-2 is that of the dataset in Stage-1.

    Args:
        head: ``"crt"`` or ``"lws"``.
        first: whether Stage-1 has mixup.
        second: whether Stage-2 has; None: there is no Stage-2.
    """
    if second is None:
        return ("mixup" if first else "ce"), {}
    alpha = settings_of(study.datasets(dataset)[0]).mixup
    return head + "+mixup" * first, {"stage2.mixup": alpha} if second else {}


def _beside_table1(study: Study, dataset: str, changes: dict[str, Any]) -> bool:
    """Whether the paper has numbers to set beside ours."""
    return study.kind != "tiny" and dataset == "imagenet-lt" and changes["backbone"] in paper.TABLE1[False, None]


def table1(study: Study, dataset: str, changes: dict[str, Any], title: str | None = None) -> Table:
    """Table 1 for one backbone: top-1 accuracy of cRT and LWS with and without mixup in each stage, and the ECE."""
    beside = _beside_table1(study, dataset, changes)
    heads = {"crt": "cRT", "lws": "LWS"}
    cells: dict[tuple[str, str], list[str]] = {}
    runs = [table1_runs(study, dataset, head, *setup) for head in heads for setup in TABLE1_TITLES]
    asked = [(method, None, changes | more) for method, more in runs]
    found = study.each(dataset, asked)
    marks, notes = marked(study, dataset, asked, found, functools.partial(how_to, study))
    for place, name in enumerate(heads.values()):
        its = slice(place * len(TABLE1_TITLES), (place + 1) * len(TABLE1_TITLES))
        if beside:
            numbers = [paper.TABLE1[setup][changes["backbone"]][place] for setup in TABLE1_TITLES]
            cells[name, "paper"] = [DASH if number is None else f"{number:.1f}" for number in numbers]
        cells[name, study.kind] = [
            mark or cell(records, "accuracy") for mark, records in zip(marks[its], found[its], strict=True)
        ]
        cells[name, "ECE"] = [cell(records, "ece") for records in found[its]]
    frame = pd.DataFrame(cells, index=list(TABLE1_TITLES.values()))
    shown = [record for records in found for record in records]
    caption = f"Top-1 accuracy{' and ECE' * bool(shown)} (%), {title or study.title(dataset)}."
    return table_of(study, frame, caption, notes, shown, beside)


#: What Table 1 says about mixup, as differences of its rows: new minus old.
TABLE1_GAINS = {
    "mixup in Stage-1, seen after Stage-1": ((True, None), (False, None)),
    "mixup in Stage-1, seen after Stage-2": ((True, False), (False, False)),
    "mixup in Stage-2, none in Stage-1": ((False, True), (False, False)),
    "mixup in Stage-2, after Stage-1 with it": ((True, True), (True, False)),
}


def table1_gains(study: Study, dataset: str, changes: dict[str, Any], title: str | None = None) -> Table:
    """What mixup adds to accuracy in each stage, in points, for one backbone: differences of the rows of Table 1.

    Ours compare equal data and seeds, with the standard error of :func:`difference`; a dash where a row is missing.
    """
    beside = _beside_table1(study, dataset, changes)
    cells: dict[tuple[str, str], list[str]] = {}
    shown: list[Record] = []
    for place, (head, name) in enumerate({"crt": "cRT", "lws": "LWS"}.items()):
        published, ours = [], []
        for pair in TABLE1_GAINS.values():
            if beside:
                new, old = (paper.TABLE1[setup][changes["backbone"]][place] for setup in pair)
                published.append(DASH if new is None or old is None else points(new - old))
            runs = [table1_runs(study, dataset, head, *setup) for setup in pair]
            new, old = paired(*(study.runs(dataset, method, None, changes | more) for method, more in runs))
            shown += new + old
            ours.append(difference(new, old) if new else DASH)
        if beside:
            cells[name, "paper"] = published
        cells[name, study.kind] = ours
    frame = pd.DataFrame(cells, index=list(TABLE1_GAINS))
    caption = (
        f"What mixup adds to top-1 accuracy, in points, {title or study.title(dataset)}. ± is the standard error over "
        "the test images, not over seeds."
    )
    return table_of(study, frame, caption, [], shown, beside)


def adds_up(study: Study, dataset: str, rows: dict[str, Sequence[float]], title: str) -> Table:
    """Whether rows of Tables 6 and 8 agree with themselves: *all* is the mean of the groups, weighted by their classes,
    by every definition of the groups in :data:`mislas.paper.GROUP_SIZES`.

    Every number is rounded to 0.1, which explains a miss of 0.1; 0.11 is let pass, since rows of Table 6 miss by little
    more.
    """
    definitions = paper.GROUP_SIZES[dataset]
    cells = {}
    for method, (*by_group, everything) in rows.items() if study.kind != "tiny" else ():
        means = {name: float(np.dot(sizes, by_group) / sum(sizes)) for name, sizes in definitions.items()}
        agrees = [name for name, mean in means.items() if abs(mean - everything) <= 0.11]
        told = {0: "neither", len(means): "both"}.get(len(agrees), ", ".join(agrees))
        cells[METHODS[method].title] = [f"{everything:.1f}", *(f"{mean:.2f}" for mean in means.values()), told]
    columns = ["all, paper", *(f"from its groups, {name}" for name in definitions), "adds up by"]
    frame = pd.DataFrame.from_dict(cells, orient="index", columns=columns)
    sizes = "; ".join(f"{', '.join(map(str, sizes))} by the {name}" for name, sizes in definitions.items())
    caption = f"{title}: the paper's accuracy over all classes (%), and the mean of its groups. Classes: {sizes}."
    if (frame["adds up by"] == "both").all():
        frame = frame.drop(columns="adds up by")
        caption += " Every row adds up to within 0.11; rounding explains 0.1."
    return Table(frame, caption if cells else "The tiny profile shows no number of the paper.")


def released(study: Study, datasets: Sequence[str]) -> Table:
    """Accuracy and ECE that the authors published with their code, per dataset and stage."""
    rows = {
        f"{paper.DATASETS[dataset]}, {name}": [f"{number:g}" for number in paper.AUTHORS_CODE_LARGE[dataset][method]]
        for dataset in (datasets if study.kind != "tiny" else ())
        for method, name in {"mixup": "Stage-1 (mixup)", "mislas": "MiSLAS"}.items()
    }
    frame = pd.DataFrame.from_dict(rows, orient="index", columns=["accuracy", "ECE"])
    caption = "Accuracy and ECE (%) that the authors published with their code."
    return Table(frame, caption if rows else "The tiny profile shows no number of the authors.")


def weight_norms(
    study: Study, dataset: str, methods: Sequence[str], changes: dict[str, Any], title: str | None = None
) -> Table:
    """Norms of the classifier's weights, mean over the classes of each group, first seed: what Figure 2 draws.

    LWS's norms include its scales. The last column is few over many: how far rare classes are from being favoured. A
    classifier of your own may have no weights that belong to a class, and so no norms.
    """
    rows, shown, missing, without = {}, [], [], []
    measured = study.each(dataset, [(method, None, changes) for method in methods])
    for name, method, all_seeds in zip(row_titles(methods), methods, measured, strict=True):
        records = all_seeds[:1]
        shown += records
        missing += [] if records else [method]
        means = dict.fromkeys(GROUPS)
        arrays = records[0].arrays() if records else {}
        if "weight_norm" in arrays:
            means = {
                group: float(arrays["weight_norm"][classes].mean()) if classes else None
                for group, classes in groups(arrays["class_counts"].tolist()).items()
            }
        elif records:
            without.append(name)
        ratio = means["few"] / means["many"] if means["few"] and means["many"] else None
        rows[name] = [DASH if m is None else f"{m:.2f}" for m in (*means.values(), ratio)]
    frame = pd.DataFrame.from_dict(rows, orient="index", columns=[*GROUPS, "few / many"])
    caption = (
        f"Mean L2 norm of the classifier's weights by group of classes, {title or study.title(dataset)}, first seed."
    )
    notes = [f"Not measured yet: `{how_to(study, dataset, missing, None, changes)}`"] if missing else []
    notes += [f"No weights that belong to a class: {', '.join(without)}."] if without else []
    return table_of(study, frame, caption, notes, shown)
