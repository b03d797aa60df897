"""What tables are made of: numbers as text, the marks, notes and captions that keep *paper*, *measured* and *tiny*
numbers apart, and the commands for what is missing.
"""

from __future__ import annotations

import functools
import html
import itertools
import re
import statistics
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .campaign import Rates, estimate, images_per_second, jobs
from .methods import METHODS
from .runs import Record, Store
from .study import Asked, Study, missing_by_command

DASH = "–"


def percent(values: Sequence[float]) -> str:
    """Fractions as percent: one value as it is, several as mean ± standard deviation (n - 1) over seeds."""
    scaled = [100 * value for value in values]
    if len(scaled) == 1:
        return f"{scaled[0]:.1f}"
    return f"{statistics.mean(scaled):.1f} ± {statistics.stdev(scaled):.1f}"


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


def row_titles(methods: Sequence[str]) -> list[str]:
    """Titles of methods; of those that share one, with their names."""
    titles = [METHODS[method].title for method in methods]
    return [t if titles.count(t) == 1 else f"{t} ({m})" for t, m in zip(titles, methods, strict=True)]


def cell(records: Sequence[Record], name: str, absent: str = DASH) -> str:
    """Mean and spread over seeds of a measure, in percent; a dash for a group without classes."""
    values = [record.metrics[name] for record in records]
    if not values:
        return absent
    return DASH if None in values else percent(values)


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
