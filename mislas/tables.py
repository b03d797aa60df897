"""Tables that keep *paper*, *measured* and *tiny* numbers apart, for notebooks, the book and the README."""

from __future__ import annotations

import functools
import html
import itertools
import json
import re
import statistics
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from . import paper
from .campaign import OTHERS, Rates, estimate, images_per_second, jobs
from .config import GROUPS, RunConfig, value_of
from .data import groups
from .errors import unknown
from .methods import METHODS, configure, settings_of
from .runs import Record, Store
from .study import ALL_OF_THEIRS, Asked, Rows, Study, authors_variants, missing_by_command

DASH = "–"


def percent(values: Sequence[float], digits: int = 1) -> str:
    """Fractions as percent: one value as it is, several as mean ± standard deviation (n - 1) over seeds."""
    scaled = [100 * value for value in values]
    if len(scaled) == 1:
        return f"{scaled[0]:.{digits}f}"
    return f"{statistics.mean(scaled):.{digits}f} ± {statistics.stdev(scaled):.{digits}f}"


@dataclass(repr=False)
class Table:
    """A table, its caption and the notes under it; Jupyter shows it as HTML, ``print`` as Markdown.

    Attributes:
        frame: cells as text, methods as rows; columns may have two levels. An empty one is not shown.
        caption: what it shows and on which data.
        notes: footnotes and provenance, one paragraph each. Text between backquotes is code.
    """

    frame: pd.DataFrame
    caption: str
    notes: list[str] = field(default_factory=list)

    def _repr_html_(self) -> str:
        body = ""
        if not self.frame.empty:
            body = self.frame.to_html(classes="mislas-table", border=0, justify="center", sparsify=True)
            body = re.sub("ε_([1K])", r"ε<sub>\1</sub>", body)
            body = re.sub(r"(?<=\w)\+(?=\w)", "+<wbr>", body)  # a long name may break there
            body = re.sub(r"(?<=[> ])-(?=\d)", "−", body)
            body = re.sub(r"(?<=\d)\*(?=</td>)", '<span class="mislas-star">*</span>', body)
            body = f'<div class="mislas-scroll">{body}</div>'
        notes = "".join(f'<p class="mislas-note">{_inline(note)}</p>' for note in self.notes)
        caption = f'<p class="mislas-caption">{_inline(self.caption)}</p>' if self.caption else ""
        return f"{caption}{body}{notes}"

    def to_markdown(self) -> str:
        """A GitHub table with one header row, then the notes."""
        columns = [" ".join(c) if isinstance(c, tuple) else str(c) for c in self.frame.columns]
        rows = [["", *columns], ["---", *["---:"] * len(columns)]]
        rows += [[str(name), *map(str, cells)] for name, cells in zip(self.frame.index, self.frame.values, strict=True)]
        lines = [] if self.frame.empty else ["| " + " | ".join(row) + " |" for row in rows] + [""]
        return "\n".join([*lines, self.caption, *(line for note in self.notes for line in ("", note))])

    __str__ = __repr__ = to_markdown


def _inline(text: str) -> str:
    """Escape for HTML; `code` between backquotes becomes <code>, whose options do not break."""
    parts = html.escape(text).split("`")
    parts[1::2] = [f"<code>{_OPTION.sub(_WHOLE, part)}</code>" for part in parts[1::2]]
    return "".join(parts)


_OPTION, _WHOLE = re.compile(r"(?<!\S)--[a-z-]+"), r'<span class="mislas-option">\g<0></span>'


def table_of(
    study: Study, frame: pd.DataFrame, caption: str, notes: list[str], shown: Sequence[Record], beside: bool = False
) -> Table:
    """A table with its data and provenance. Where nothing is measured, what is left is what others published; if that
    is nothing, what would be in it, and the commands; and if there are none, nothing at all."""
    if shown:
        return Table(
            frame, caption + measured_on(study, shown) + study.changed(shown), [*notes, study.provenance(shown)]
        )
    published = [column for column in frame.columns if {"paper", "authors' code"} & {*column}]
    if beside:
        frame = frame[published] if published else frame
    elif notes:
        frame = pd.DataFrame()
    else:
        return Table(pd.DataFrame(), "")
    return Table(frame, f"{caption} Nothing of it is measured yet.{study.changed()}", notes)


def measured_on(study: Study, shown: Sequence[Record]) -> str:
    """The end of a caption: whose numbers these are, the images that the runs saw, and what :func:`star` means."""
    if study.kind == "tiny":
        return " Tiny smoke runs: they show that the code runs, not what the paper found."
    exact, *copies = _used(shown)
    if not copies:
        return f" Measured on {exact}."
    return f" Measured on {exact}; where marked *, on {', '.join(copies)}: compare these with each other only."


def star(records: Sequence[Record], shown: Sequence[Record]) -> str:
    """The mark of a cell whose runs saw other images than the exact ones that some of its table saw."""
    return "*" if records and records[0].config.dataset in _used(shown)[1:] else ""


def starred(cells: dict[str, list[tuple[str, Sequence[Record]]]], shown: Sequence[Record]) -> dict[str, list[str]]:
    """Rows or columns of cells, each with its :func:`star`; a cell comes as its text and the runs that it is of."""
    return {name: [text + star(of, shown) for text, of in found] for name, found in cells.items()}


def _used(shown: Sequence[Record]) -> list[str]:
    """The datasets of some runs; an exact one comes before its copies, whose names begin with its own."""
    return sorted({record.config.dataset for record in shown})


def compare(
    study: Study,
    dataset: str,
    methods: Sequence[str],
    imbalances: Sequence[float],
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
        imbalances: imbalance factors, in order.
        published: the paper's accuracy in percent for (method, imbalance), or None.
        titles: row names; default the registry's.
        title: what the caption calls the dataset; default :meth:`mislas.study.Study.title`.
    """
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
            accuracies[place] = _metric(records, "accuracy") + many + star(records, shown)
    columns: dict[tuple[str, str], list[str]] = {}
    for place, imbalance in enumerate(imbalances):
        head, cells = f"IF {imbalance:g}", slice(place * len(methods), (place + 1) * len(methods))
        if beside:
            numbers = [published(method, imbalance) for method in methods]
            columns[head, "paper"] = [DASH if number is None else f"{number:.1f}" for number in numbers]
        columns[head, study.kind] = accuracies[cells]
        columns[head, "ECE"] = [_metric(records, "ece") + star(records, shown) for records in found[cells]]
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
        cells[study.kind, head] = [_metric(records, key) + star(records, shown) for records in found]
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


def paired(new: Sequence[Record], old: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """What of two sets of runs can be compared: those of equal data and seeds, in equal order."""
    index = {(record.config.dataset, record.config.seed): record for record in old}
    both = [record for record in new if (record.config.dataset, record.config.seed) in index]
    return both, [index[record.config.dataset, record.config.seed] for record in both]


def difference(new: Sequence[Record], old: Sequence[Record]) -> str:
    """Accuracy of some runs minus that of others, in points, with its standard error over the test images.

    Both are tested on the same images, so the error is that of a paired difference: the spread over the images of
    (share of ``new`` that is right) - (share of ``old`` that is right), by the root of their number. It does not know
    how another training of the same network would have come out.

    Args:
        new, old: not empty, on the same test set.
    """
    right = [np.mean([record.predictions().correct for record in records], axis=0) for records in (new, old)]
    delta = right[0] - right[1]
    return f"{points(100 * delta.mean())} ± {100 * delta.std(ddof=1) / len(delta) ** 0.5:.1f}"


def points(difference: float) -> str:
    """A difference in points, with its sign. What lies half-way, such as 0.25, has one text wherever it is shown: which
    way it goes is not left to how it was summed."""
    return f"{round(difference, 6):+z.1f}"


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
        rows[name] = [
            percent([record.metrics["accuracy"] for record in records]) if records else "not measured",
            percent([record.metrics["ece"] for record in records]) if records else DASH,
            f"{statistics.mean(record.metrics['nll'] for record in records):.3f}" if records else DASH,
            difference(new, old) if new and records is not found[0] else DASH,
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


def marked(
    study: Study,
    dataset: str,
    asked: Sequence[Asked],
    found: Sequence[Sequence[Record]],
    say: Callable[..., str] | None = None,
) -> tuple[list[str], list[str]]:
    """For each run ``[a]``, ``[b]``, ... if no record was found, else an empty string; and the notes that say what each
    mark means and which command measures its runs. One more names what measures, on exact images, what has a
    :func:`star`. Where no record at all was found, there is nothing to tell apart, and no mark.

    Args:
        say: of a dataset, methods, imbalance factor and changes makes the command; default
            :meth:`mislas.study.Study.command`.
    """
    say = say or study.command
    cells, notes = [""] * len(asked), []
    shown = [record for records in found for record in records]
    letters = itertools.chain(string.ascii_lowercase, itertools.repeat("+"))
    for command in study.missing(asked, found):
        blank = [
            place
            for place, (method, *rest) in enumerate(asked)
            if not found[place] and method in command[0] and rest == list(command[1:])
        ]
        mark = f"[{next(letters)}]" if blank and shown else ""
        for place in blank:
            cells[place] = mark
        what = "Not measured yet" if blank else "Not measured with every seed yet"
        notes.append(f"{mark} {what}: `{say(dataset, *command)}`".strip())
    exact = [[] if star(records, shown) else ["exact, or missing"] for records in found]
    starred_runs = missing_by_command(asked, exact)
    return cells, notes + [f"[*] On exact images: `{say(dataset, *command)}`" for command in starred_runs]


def missing_notes(study: Study, dataset: str, asked: Sequence[Asked], found: Sequence[Sequence[Record]]) -> list[str]:
    """Notes naming the commands for the runs that were not found; for many, the campaign's: it trains them together."""
    commands = study.missing(asked, found)
    if len(commands) > 3:
        return [f"Not measured yet: `{study.campaign_command(dataset, [asked[0][1]])}`"]
    return [f"Not measured yet: `{study.command(dataset, *command)}`" for command in commands]


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
        cells[column, head] = [_metric(found[name, column], heads[head], "not measured") for name in rows]
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
#: Accuracy and ECE by group of classes.
BY_GROUP = {
    f"{key}{group}": (f"{title}{group.replace('_', ', ')}", 100, 1)
    for key, title in (("accuracy", "accuracy"), ("ece", "ECE"))
    for group in ("", "_many", "_medium", "_few")
}


def row_titles(methods: Sequence[str]) -> list[str]:
    """Titles of methods; of those that share one, with their names."""
    titles = [METHODS[method].title for method in methods]
    return [t if titles.count(t) == 1 else f"{t} ({m})" for t, m in zip(titles, methods, strict=True)]


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
        columns: of a record's metrics, by name: column title, factor, digits. :data:`MEASURES` or :data:`BY_GROUP`. A
            measure of your own has a fourth part, a function of a run's :class:`mislas.evaluate.Predictions`.
        changes: what is changed in every run.

    Raises:
        UnknownName: a column that is neither among the metrics nor has a function.
    """
    if not isinstance(methods, dict):
        methods = {name: (method, {}) for name, method in zip(row_titles(methods), methods, strict=True)}
    for key, (*_, last) in columns.items():
        if not callable(last) and key not in MEASURES | BY_GROUP:
            unknown("measure", key, MEASURES | BY_GROUP)

    def value(record: Record, key: str) -> float | None:
        own = columns[key][3:]
        return own[0](record.predictions()) if own else record.metrics[key]

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
            values = found[key][i]
            absent = not values or None in values
            cells.append(DASH if absent else f"{scale * statistics.mean(values):.{digits}f}")
        rows[name] = cells
    frame = pd.DataFrame.from_dict(rows, orient="index", columns=[head for head, *_ in columns.values()])
    factor = "" if imbalance is None else f", IF {imbalance:g}"
    units = " NLL in nats, Brier from 0 to 2, the others in %." if "nll" in columns else " In %."
    caption = f"Accuracy and calibration, {title or study.title(dataset)}{factor}.{units * bool(shown)}"
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


# ----------------------------------------------------------------------- the large benchmarks: Tables 1, 4, 6, 7, 8


def how_to(
    study: Study,
    dataset: str,
    methods: Sequence[str],
    imbalance: float | None = None,
    changes: dict[str, Any] | None = None,
) -> str:
    """The command that measures some runs; as a comment, the images that pass through the network for it, Stage-1
    included, and the hours on the fastest device whose rate for such runs the store knows."""
    configs = [config for method in methods for config in study.configs(dataset, method, imbalance, changes)]
    planned = jobs(configs, study.store)
    images = sum(job.passes for job in planned)
    hours = estimate(planned, _rates(study.store.root, len(list(study.store.root.glob("*/*.json")))))
    cost = f"{images / 1e6:,.1f} million image passes" + (f", {hours}" if hours else "")
    return f"{study.command(dataset, methods, imbalance, changes)}  # {cost}"


@functools.lru_cache(maxsize=1)
def _rates(root: Path, count: int) -> dict[str, Rates]:
    """Rates of a store that has ``count`` files."""
    return images_per_second(Store(root))


#: What a row's cells are called: paper's names of groups, and the metric that each is.
GROUP_METRICS = {"many": "accuracy_many", "medium": "accuracy_medium", "few": "accuracy_few", "all": "accuracy"}


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
            mark or _metric(records, GROUP_METRICS[column]) for mark, records in zip(marks, found, strict=True)
        ]
    cells["ECE", study.kind] = [_metric(records, "ece") for records in found]
    frame = pd.DataFrame(cells, index=[paper.TITLES_LARGE.get(m, METHODS[m].title) for m in published])
    shown = [record for records in found for record in records]
    caption = f"Top-1 accuracy{' and ECE' * bool(shown)} (%), {title or study.title(dataset)}."
    return table_of(study, frame, caption, notes, shown, beside)


def _metric(records: Sequence[Record], name: str, absent: str = DASH) -> str:
    """Mean and spread over seeds of a measure, in percent; a dash for a group without classes."""
    values = [record.metrics[name] for record in records]
    if not values:
        return absent
    return DASH if None in values else percent(values)


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
            mark or _metric(records, "accuracy") for mark, records in zip(marks[its], found[its], strict=True)
        ]
        cells[name, "ECE"] = [_metric(records, "ece") for records in found[its]]
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
        cells[paper.TITLES_LARGE[method]] = [f"{everything:.1f}", *(f"{mean:.2f}" for mean in means.values()), told]
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


def distance(study: Study, dataset: str, imbalances: Sequence[float] = paper.IMBALANCES) -> Table:
    """How far our mean accuracy is from the paper's, in percentage points, where Table 3 has both: on the exact images
    alone, since what a lossy copy differs by is its own doing."""
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
            rows[paper.TITLES[method]] = cells
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


# ------------------------------------------------------------------------------------------ one schedule in two ways


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
