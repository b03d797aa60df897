"""All exercises of the book in the order of its pages, without their solutions."""

from __future__ import annotations

import json
import re
from pathlib import Path

from IPython.display import Markdown

ROOT = Path(__file__).resolve().parents[1]
#: The fence, the title, and the text.
EXERCISE = re.compile(r"^(`{3,})\{admonition\} (Exercise.*?)\n:class: tip\n(.*?)\n\1$", re.DOTALL | re.MULTILINE)


def pages() -> list[Path]:
    """Sources of the book's pages, in order, relative to the project's folder."""
    names = re.findall(r"(?:root|file): (\S+)", (ROOT / "_toc.yml").read_text())
    return [Path(f"{name}.md" if (ROOT / f"{name}.md").exists() else f"{name}.ipynb") for name in names]


def text(page: Path) -> str:
    """A page's prose."""
    content = (ROOT / page).read_text()
    if page.suffix == ".md":
        return content
    cells = json.loads(content)["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def exercises() -> Markdown:
    """Each page's exercises under a link to it, by the names that they have there."""
    parts = []
    for page in pages():
        prose = text(page)
        found = EXERCISE.findall(prose)
        if found:
            title = re.search(r"^# (.+)$", prose, re.MULTILINE)[1]
            parts.append(f"**[{title}](../{page.as_posix()})**")
        parts += [f"::::{{admonition}} {name}\n:class: tip\n{exercise}\n::::" for _, name, exercise in found]
    return Markdown("\n\n".join(parts))
