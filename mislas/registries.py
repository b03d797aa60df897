"""What a configuration calls by name: where a script registers its own, and which entries are not the library's."""

from __future__ import annotations

import hashlib
import inspect
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .augment import MIXES
from .config import SCHEDULES, RunConfig
from .data import LISTS, SPECS
from .losses import LOSSES
from .metric import METRICS
from .models import BACKBONES, CLASSIFIERS
from .rules import RULES
from .samplers import SAMPLERS

if TYPE_CHECKING:
    from .runs import Record

#: By name. Methods and settings are no part of it: what they say is in a configuration itself.
REGISTRIES: dict[str, dict[str, Any]] = {
    "SPECS": SPECS,
    "LISTS": LISTS,
    "LOSSES": LOSSES,
    "SAMPLERS": SAMPLERS,
    "MIXES": MIXES,
    "METRICS": METRICS,
    "RULES": RULES,
    "BACKBONES": BACKBONES,
    "CLASSIFIERS": CLASSIFIERS,
    "SCHEDULES": SCHEDULES,
}
_LIBRARY = {registry: dict(known) for registry, known in REGISTRIES.items()}  # before any script could register


def source_of(entry: Any) -> str | None:
    """12 hex digits of the SHA-256 of the source text of an entry's function or class; None where there is none."""
    made = getattr(entry, "make", entry)
    made = made if hasattr(made, "__qualname__") else type(made)
    if str(made.__module__).startswith(f"{__package__}."):  # a dataset's facts are held by a class of the library
        return None
    try:
        text = inspect.getsource(made)
    except (OSError, TypeError):
        return None
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def check_sources(record: Record) -> None:
    """Warn if the code of what a script registered for a stored run is no longer what the run was trained with."""
    then = record.provenance.get("sources", {})
    for registry, name, entry in entries_of([record.config]) if then else ():
        own, now = f"{registry}.{name}", source_of(entry)
        if now is not None and then.get(own, now) != now:
            warnings.warn(
                f"{own} has changed since {record.path} was trained with it, and that record stays: give what you "
                "changed another name, or delete the record to run again",
                stacklevel=3,
            )


def entries_of(configs: Iterable[RunConfig]) -> tuple[tuple[str, str, Any], ...]:
    """What runs call by name that a script registered, beside the library's entries or in place of one.

    An identity has the name only. So a record says which they are, and a job brings them along.

    Returns:
        Of each entry: its registry's name in :data:`REGISTRIES`, its own name there, and the entry.
    """
    named = set()
    for config in configs:
        parts = config.canonical()
        named |= {config.dataset, config.backbone, *parts["stage1"].values(), *parts.get("stage2", {}).values()}
    return tuple(
        (registry, name, entry)
        for registry, known in REGISTRIES.items()
        for name, entry in known.items()
        if name in named and _LIBRARY[registry].get(name) is not entry
    )
