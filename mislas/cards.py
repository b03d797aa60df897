"""One card per method, from the registry's own words and from what was measured: the book's catalogue."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from IPython.display import Markdown

from .cells import percent
from .config import differences
from .methods import METHODS, configure
from .study import Study


def settings(method: str, dataset: str = "cifar10") -> dict[str, Any]:
    """How a method's configuration differs from the plain model's, by field; a Stage-2 is named in full."""
    found = differences(configure(dataset, method), configure(dataset, "ce"))
    return {key: value for key, value in found.items() if "." in key and value is not None}


def card(names: str | Sequence[str], study: Study, dataset: str = "cifar10", imbalance: float = 100) -> str:
    """A method's card in MyST Markdown: idea, equation, source, settings, and where it stands in our measurements.

    Args:
        names: a method, or several that are variants of the first: one card, and a line of standings for each.
        study: whose measurements to show.
        dataset, imbalance: where they were made, and whose settings are shown.

    Raises:
        KeyError: a name that is not in the registry.
    """
    names = [names] if isinstance(names, str) else list(names)
    method = METHODS[names[0]]
    changes = ", ".join(f"`{key}={value}`" for key, value in settings(names[0], dataset).items())
    lines = [
        f":::{{admonition}} {method.title} — `{names[0]}`",
        ":class: method-card",
        f"{method.idea}\n\n$$\n\\begin{{aligned}}\n{method.equation}\n\\end{{aligned}}\n$$\n",
        f"- *Source:* {method.source}; {method.where}.",
        f"- *Settings that differ from the plain model's, on {dataset}:* {changes or 'none'}.",
    ]
    for name in names:
        where = f" ({METHODS[name].where})" if name != names[0] else ""
        lines.append(f"- `{name}`{where}: {standing(name, study, dataset, imbalance)}.")
    return "\n".join([*lines, ":::"])


def standing(name: str, study: Study, dataset: str, imbalance: float) -> str:
    """Where a method stands in our measurements, in words; or the command that would tell."""
    records = study.runs(dataset, name, imbalance)
    if not records:
        return f"not measured yet, `{study.command(dataset, [name], imbalance)}`"
    used = ", ".join(sorted({record.config.dataset for record in records}))
    accuracy, ece = (percent([record.metrics[key] for record in records]) for key in ("accuracy", "ece"))
    return f"*{study.kind}* on `{used}`, IF {imbalance:g}: accuracy {accuracy}%, ECE {ece}%, n = {len(records)}"


def cards(names: Iterable[str | Sequence[str]], study: Study) -> Markdown:
    """The cards of several methods, one under the other; see :func:`card`."""
    return Markdown("\n\n".join(card(name, study) for name in names))
