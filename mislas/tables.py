"""Tables that keep *paper*, *measured* and *tiny* numbers apart, for notebooks, the book and the README."""

from __future__ import annotations

import html
import statistics
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pandas as pd

from . import paper
from .methods import METHODS
from .study import Study

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
        frame: cells as text, methods as rows; columns may have two levels.
        caption: what it shows and on which data.
        notes: footnotes and provenance, one paragraph each. Text between backquotes is code.
    """

    frame: pd.DataFrame
    caption: str
    notes: list[str] = field(default_factory=list)

    def _repr_html_(self) -> str:
        body = self.frame.to_html(classes="mislas-table", border=0, justify="center", sparsify=True)
        notes = "".join(f'<p class="mislas-note">{_inline(note)}</p>' for note in self.notes)
        caption = f'<p class="mislas-caption">{_inline(self.caption)}</p>'
        return f'{caption}<div class="mislas-scroll">{body}</div>{notes}'

    def to_markdown(self) -> str:
        """A GitHub table with one header row, then the notes."""
        columns = [" ".join(c) if isinstance(c, tuple) else str(c) for c in self.frame.columns]
        rows = [["", *columns], ["---", *["---:"] * len(columns)]]
        rows += [[str(name), *map(str, cells)] for name, cells in zip(self.frame.index, self.frame.values, strict=True)]
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        return "\n".join([*lines, "", self.caption, *(line for note in self.notes for line in ("", note))])

    __str__ = __repr__ = to_markdown


def _inline(text: str) -> str:
    """Escape for HTML; `code` between backquotes becomes <code>."""
    parts = html.escape(text).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))


def compare(
    study: Study,
    dataset: str,
    methods: Sequence[str],
    imbalances: Sequence[float],
    published: Callable[[str, float], float | None] = lambda method, imbalance: None,
    titles: dict[str, str] | None = None,
) -> Table:
    """Top-1 accuracy and ECE of methods on one dataset: the paper's beside ours, per imbalance factor.

    With the tiny profile the paper's numbers are left out: a smoke run is never set beside them. A cell that has not
    been measured says so; the note under the table names the command that would.

    Args:
        study: whose runs to show.
        dataset: one of the paper's, e.g. ``"cifar10"``.
        methods: rows, in order; a row that the library does not have yet shows the paper's number alone.
        imbalances: imbalance factors, in order.
        published: the paper's accuracy in percent for (method, imbalance), or None.
        titles: row names; default the registry's.
    """
    tiny = study.kind == "tiny"
    known = [method for method in methods if method in METHODS]
    rows = known if tiny else list(methods)
    if study.profile != "stored":
        study.runs(dataset, known, imbalances[0])  # train what shares a pass together
    notes, columns, shown = [], {}, []
    marks = iter(string.ascii_lowercase)
    for imbalance in imbalances:
        head = f"IF {imbalance:g}"
        missing: list[str] = []
        mark = None
        accuracy, ece = [], []
        if study.profile != "stored":
            study.runs(dataset, known, imbalance)
        for method in rows:
            records = study.runs(dataset, method, imbalance) if method in METHODS else []
            shown += records
            if records:
                many = f" (n={len(records)})" if len(records) > 1 else ""
                accuracy.append(percent([r.metrics["accuracy"] for r in records]) + many)
                ece.append(percent([r.metrics["ece"] for r in records]))
            elif method in METHODS:
                mark = mark or next(marks)
                missing.append(method)
                accuracy.append(f"not measured [{mark}]")
                ece.append(DASH)
            else:
                accuracy.append("no code yet")
                ece.append(DASH)
        if not tiny:
            numbers = [published(method, imbalance) for method in rows]
            columns[head, "paper"] = [DASH if number is None else f"{number:.1f}" for number in numbers]
        columns[head, study.kind] = accuracy
        columns[head, "ECE"] = ece
        if missing:
            notes.append(f"[{mark}] `{study.command(dataset, missing, imbalance)}`")
    names = {name: method.title for name, method in METHODS.items()} | (titles or {})
    frame = pd.DataFrame(columns, index=[names[method] for method in rows])
    frame.columns = pd.MultiIndex.from_tuples(frame.columns)
    if tiny:
        caption = (
            "Top-1 accuracy and ECE (%) of tiny smoke runs on scikit-learn's digits: "
            "they show that the code runs, not what the paper found."
        )
    else:
        used = sorted({record.config.dataset for record in shown})
        on = f"measured on {', '.join(used)}" if used else "nothing measured yet"
        caption = (
            f"Top-1 accuracy (%), {paper.DATASETS.get(dataset, dataset)}: paper, and {on}, with the measured ECE (%)."
        )
        notes.append(study.provenance(shown))
    return Table(frame, caption, notes)


def table3(study: Study, dataset: str, imbalances: Sequence[float] = paper.IMBALANCES) -> Table:
    """Table 3 for one dataset, with cRT and LWS without mixup added."""
    numbers = paper.TABLE3[dataset]

    def published(method: str, imbalance: float) -> float | None:
        return numbers[method][paper.IMBALANCES.index(imbalance)] if method in numbers else None

    order = ["ce", "mixup", "ldam+drw", "bbn", "remix+drw", "crt", "lws", "crt+mixup", "lws+mixup", "mislas"]
    return compare(study, dataset, order, imbalances, published, paper.TITLES)


MEASURES = {
    "accuracy": ("accuracy", 100, 1),
    "accuracy_many": ("many", 100, 1),
    "accuracy_medium": ("medium", 100, 1),
    "accuracy_few": ("few", 100, 1),
    "confidence": ("confidence", 100, 1),
    "ece": ("ECE", 100, 1),
    "adaptive_ece": ("adaptive ECE", 100, 1),
    "classwise_ece": ("classwise ECE", 100, 2),
    "mce": ("MCE", 100, 1),
    "nll": ("NLL", 1, 3),
    "brier": ("Brier", 1, 3),
}


def measures(study: Study, dataset: str, methods: Sequence[str], imbalance: float = 100) -> Table:
    """Every measure of some methods: mean over seeds; all in percent but NLL (nats) and Brier (0..2)."""
    rows, shown = {}, []
    for method in methods:
        records = study.runs(dataset, method, imbalance)
        shown += records
        cells = []
        for key, (_, scale, digits) in MEASURES.items():
            values = [record.metrics[key] for record in records]
            absent = not values or None in values
            cells.append(DASH if absent else f"{scale * statistics.mean(values):.{digits}f}")
        rows[METHODS[method].title] = cells
    frame = pd.DataFrame.from_dict(rows, orient="index", columns=[title for title, _, _ in MEASURES.values()])
    what = "tiny smoke runs on digits" if study.kind == "tiny" else paper.DATASETS.get(dataset, dataset)
    caption = f"All measures, {what}, IF {imbalance:g}. A dash: not measured, or a group without classes."
    return Table(frame, caption, [study.provenance(shown)])


def distance(study: Study, dataset: str, imbalance: float = 100) -> Table:
    """How far our mean accuracy is from the paper's, in percentage points, for the rows of Table 3 that we measured."""
    rows, shown = {}, []
    for method, numbers in paper.TABLE3[dataset].items():
        records = study.runs(dataset, method, imbalance) if method in METHODS else []
        published = numbers[paper.IMBALANCES.index(imbalance)]
        if records and published is not None:
            shown += records
            ours = 100 * statistics.mean(record.metrics["accuracy"] for record in records)
            rows[paper.TITLES[method]] = [f"{published:.1f}", f"{ours:.1f}", f"{ours - published:+.1f}"]
    frame = pd.DataFrame.from_dict(rows, orient="index", columns=["paper", "measured", "difference"])
    caption = f"Top-1 accuracy (%), {paper.DATASETS[dataset]}, IF {imbalance:g}: measured minus paper, in points."
    return Table(frame, caption, [study.provenance(shown)])


def readme_table(study: Study) -> Table:
    """One screen for the README: CIFAR-10-LT at IF 100, the paper beside us."""
    rows, shown = {}, []
    for method in ("ce", "mixup", "crt", "lws", "crt+mixup", "lws+mixup", "mislas"):
        records = study.runs("cifar10", method, 100)
        shown += records
        published = paper.TABLE3["cifar10"].get(method)
        rows[METHODS[method].title] = [
            f"{published[0]:.1f}" if published else DASH,
            percent([r.metrics["accuracy"] for r in records]) if records else "not measured",
            percent([r.metrics["ece"] for r in records]) if records else DASH,
            percent([r.metrics["nll"] / 100 for r in records], 2) if records else DASH,
        ]
    columns = ["accuracy, paper", "accuracy, measured", "ECE, measured", "NLL, measured"]
    frame = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
    caption = "Top-1 accuracy and ECE (%), NLL (nats); ResNet-32, CIFAR-10-LT, imbalance factor 100."
    return Table(frame, caption, [study.provenance(shown)])
