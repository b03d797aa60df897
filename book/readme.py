"""Rewrite what README.md shows of the results, from the store: the table between its markers, and the picture."""

from __future__ import annotations

import re
from pathlib import Path

from mislas.plots import reliability_figure
from mislas.study import Study
from mislas.tables import Table, readme_table

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(?<=<!-- results: `make readme` writes this -->\n).*?(?=<!-- end of results -->)", re.DOTALL)
PANELS = [
    ("Plain model", "ce", 100),
    ("cRT", "crt", 100),
    ("LWS", "lws", 100),
    ("mixup", "mixup", 100),
    ("MiSLAS", "mislas", 100),
]


def results() -> Table:
    """The README's table, from the committed store."""
    return readme_table(Study("stored", results_root=ROOT / "results"))


def rewrite(text: str) -> str:
    """README.md with its results replaced by the store's."""
    return BLOCK.sub(lambda _: results().to_markdown() + "\n", text)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(rewrite(readme.read_text()))
    figure = reliability_figure(Study("stored", results_root=ROOT / "results"), "cifar10", PANELS)
    figure.savefig(ROOT / "book" / "images" / "headline.png", dpi=100)
