"""One card per method, from the registry's own words and from what was measured: the book's catalogue."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .methods import METHODS, configure
from .study import Study
from .tables import percent


class Markdown:
    """Text that Jupyter shows as Markdown."""

    def __init__(self, text: str):
        self.text = text

    def _repr_markdown_(self) -> str:
        return self.text

    __repr__ = __str__ = lambda self: self.text


def settings(method: str, dataset: str = "cifar10") -> dict[str, Any]:
    """How a method's configuration differs from the plain model's, by field; a Stage-2 is named in full."""
    ours, plain = (configure(dataset, name).to_json() for name in (method, "ce"))
    return {
        f"{stage}.{key}": value
        for stage in ("stage1", "stage2")
        for key, value in ours.get(stage, {}).items()
        if value != plain.get(stage, {}).get(key)
    }


def card(name: str, study: Study, dataset: str = "cifar10", imbalance: float = 100) -> str:
    """A method's card in MyST Markdown: idea, equation, source, settings, and where it stands in our measurements.

    Raises:
        KeyError: a name that is not in the registry.
    """
    method = METHODS[name]
    records = study.runs(dataset, name, imbalance)
    if records:
        used = ", ".join(sorted({record.config.dataset for record in records}))
        accuracy, ece = (percent([record.metrics[key] for record in records]) for key in ("accuracy", "ece"))
        standing = f"*{study.kind}* on `{used}`, IF {imbalance:g}: accuracy {accuracy}%, ECE {ece}%, n = {len(records)}"
    else:
        standing = f"not measured yet: `{study.command(dataset, [name], imbalance)}`"
    changes = ", ".join(f"`{key}={value}`" for key, value in settings(name, dataset).items())
    return "\n".join(
        [
            f":::{{admonition}} {method.title} — `{name}`",
            ":class: method-card",
            method.idea,
            "",
            "$$",
            method.equation,
            "$$",
            "",
            f"*Source:* {method.source}; {method.where}.",
            "",
            f"*Settings on {dataset}, where they differ from the plain model's:* {changes or 'none'}.",
            "",
            f"*Standing:* {standing}.",
            ":::",
        ]
    )


def cards(names: Iterable[str], study: Study) -> Markdown:
    """The cards of several methods, one under the other."""
    return Markdown("\n\n".join(card(name, study) for name in names))
