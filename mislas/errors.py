"""Errors that a user can act on, each in one line: what was wrong, what is allowed, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import NoReturn


class MislasError(ValueError):
    """Bad input. The message is one line and says what is allowed."""


class UnknownName(MislasError):
    """A name that nothing is registered under: a slip, or code that has not been loaded."""


class DataError(MislasError):
    """A data file is missing, damaged, or not what its name promises."""


class Diverged(MislasError):
    """A run's loss or weights are no numbers any more. ``run`` is the identity of its configuration."""

    def __init__(self, message: str, run: str):
        super().__init__(message)
        self.run = run

    def __reduce__(self):  # by default it would be made from the message alone
        return type(self), (str(self), self.run)


class RecordError(MislasError):
    """A stored record, weights file or checkpoint is cut short or contradicts what is asked of it."""


class ForeignRecord(RecordError):
    """A record of a run that needs code that is not loaded, or that what is registered here does not allow."""


def unknown(kind: str, name: object, known: Iterable[str]) -> NoReturn:
    """Raise :class:`UnknownName`, the known names listed with the nearest first."""
    known = sorted(known)
    said = str(name).lower()
    near = [k for k in known if k.lower() == said] or difflib.get_close_matches(said, known, n=3, cutoff=0.5)
    ratio = {k: difflib.SequenceMatcher(None, k, said).ratio() for k in near}
    near.sort(key=lambda k: (-ratio[k], k.rpartition(".")[0]))  # stage1.epochs before stage2.epochs
    near += [k for k in known if k not in near and k.rpartition(".")[2].startswith(str(name))]
    hint = f"; did you mean {near[0]!r}?" if near else "."
    rest = [n for n in known if n not in near]
    raise UnknownName(f"unknown {kind} {name!r}{hint} Known: {', '.join(near + rest)}")
