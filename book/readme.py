"""Rewrite what README.md shows of the results, from the store: the table between its markers, and the picture."""

from __future__ import annotations

import re
from pathlib import Path

from mislas.cells import Table
from mislas.methods import METHODS
from mislas.plots import reliability_figure
from mislas.study import Study
from mislas.tables import TWO_STAGES, table3

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(?<=<!-- results: `make readme` writes this -->\n).*?(?=<!-- end of results -->)", re.DOTALL)


def results() -> Table:
    """The README's table: of Table 3 what all else builds on, from the committed store."""
    return table3(Study("stored", results_root=ROOT / "results"), "cifar10", methods=TWO_STAGES)


def rewrite(text: str) -> str:
    """README.md with its results replaced by the store's."""
    return BLOCK.sub(lambda _: results().to_markdown() + "\n", text)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(rewrite(readme.read_text()))
    study = Study("stored", results_root=ROOT / "results")
    panels = [(METHODS[name].title, name, 100) for name in TWO_STAGES if study.runs("cifar10", name, 100)]
    if panels:
        figure = reliability_figure(study, "cifar10", panels)
        figure.savefig(ROOT / "book" / "images" / "headline.png", dpi=100)
