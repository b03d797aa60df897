"""What every notebook starts with: a profile, and from it the runs that a table or a figure shows.

study = Study("stored")
study.runs("cifar10", "mislas", imbalance=100)     # the records, one per seed; none if never measured
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .config import RunConfig
from .data import available, dataset_name
from .errors import DataError, MislasError, unknown
from .methods import configure
from .runs import Record, Store, run
from .train import Options

PROFILES = {
    "stored": "trains nothing; shows what is in the store",
    "tiny": "trains everything live on scikit-learn's digits, on the CPU, in seconds",
    "full": "the paper's schedule on the images under data_root; takes from the store what is there",
}

#: The paper's datasets and what may stand in for them, the exact one first. A record says which it used.
STAND_INS = {"cifar10": ("cifar10", "cifar10-jpeg"), "cifar100": ("cifar100", "cifar100-jpeg")}

MAX_SEEDS = 10


def default_results_root() -> Path:
    """``results/`` of the checkout that the library runs from, else of the working directory."""
    checkout = Path(__file__).resolve().parents[1] / "results"
    return checkout if checkout.is_dir() else Path("results")


class Study:
    """The parameters that every notebook has.

    Args:
        profile: ``"stored"``, ``"tiny"`` or ``"full"``; see :data:`PROFILES`.
        data_root: folder with the images, for ``"full"``.
        results_root: the store; None is the project's ``results/``. ``"tiny"`` keeps nothing.
        seeds: which seeds; None is every stored seed for ``"stored"``, and seed 0 otherwise.
        device: None takes a GPU if there is one; ``"tiny"`` runs on the CPU unless told otherwise.
        overrides: fields of the configuration to change in every run; see :meth:`RunConfig.override`.

    Raises:
        MislasError: unknown profile, bad seeds, or ``"full"`` without a data_root that exists.
    """

    def __init__(
        self,
        profile: str = "stored",
        data_root: str | Path | None = None,
        results_root: str | Path | None = None,
        seeds: Sequence[int] | None = None,
        device: str | None = None,
        overrides: dict[str, Any] | None = None,
    ):
        if profile not in PROFILES:
            unknown("profile", profile, PROFILES)
        if seeds is not None and (
            isinstance(seeds, str | int) or not seeds or not all(type(s) is int and s >= 0 for s in seeds)
        ):
            raise MislasError(f"seeds is a list of integers >= 0, such as [0, 1, 2], or null, got {seeds!r}")
        if profile == "full" and (data_root is None or not Path(data_root).is_dir()):
            raise DataError(f"profile 'full' needs data_root, an existing folder with the images, got {data_root!r}")
        configure("digits", "mislas", overrides=overrides)  # a wrong override stops here, not after an hour
        self.profile, self.data_root = profile, data_root
        self.seeds = list(seeds) if seeds is not None else None
        self.overrides = dict(overrides or {})
        if profile == "tiny":
            self._folder = tempfile.TemporaryDirectory(prefix="mislas-tiny-")
            self.store = Store(self._folder.name)
            self.options = Options(device=device or "cpu")
        else:
            self.store = Store(results_root or default_results_root())
            self.options = Options(device=device)

    @property
    def kind(self) -> str:
        """What its numbers are: ``"tiny"`` or ``"measured"``."""
        return "tiny" if self.profile == "tiny" else "measured"

    def datasets(self, dataset: str) -> tuple[str, ...]:
        """What the profile looks at for one of the paper's datasets: the exact one first, then stand-ins."""
        if self.profile == "tiny":
            return ("digits",)
        return STAND_INS.get(dataset_name(dataset), (dataset_name(dataset),))

    def configs(self, dataset: str, method: str, imbalance: float = 100) -> list[RunConfig]:
        """The configurations asked for, one per seed, on the first of :meth:`datasets` that can be had."""
        names = self.datasets(dataset)
        if self.profile == "full":
            names = [name for name in names if available(name, self.data_root)] or names[:1]
        base = configure(names[0], method, imbalance, 0, self.overrides)
        return [replace(base, seed=seed) for seed in self.seeds or [base.seed]]

    def runs(self, dataset: str, method: str | Sequence[str], imbalance: float = 100) -> list[Record]:
        """The records of one method, one per seed; trained now if the profile trains. Empty if never measured.

        Several methods in one call train together where they can; their records come back in one list.
        """
        methods = [method] if isinstance(method, str) else list(method)
        if self.profile != "stored":
            configs = [config for name in methods for config in self.configs(dataset, name, imbalance)]
            return run(configs, self.store, self.data_root, self.options)
        found = []
        for name in methods:
            for candidate in self.datasets(dataset):
                seeds = self.seeds if self.seeds is not None else range(MAX_SEEDS)
                base = configure(candidate, name, imbalance, 0, self.overrides)
                records = [self.store.get(replace(base, seed=seed)) for seed in seeds]
                records = [record for record in records if record is not None]
                if records:
                    found += records
                    break
        return found

    def command(self, dataset: str, methods: Sequence[str], imbalance: float) -> str:
        """The command that measures these runs."""
        parts = [f"mislas train --dataset {self.datasets(dataset)[0]} --imbalance {imbalance:g}"]
        parts.append(f"--method {' '.join(methods)}")
        if self.seeds:
            parts.append(f"--seed {' '.join(map(str, self.seeds))}")
        parts += [f"--set {key}={value}" for key, value in self.overrides.items()]
        return " ".join([*parts, "--data-root DIR"])

    def provenance(self, records: Sequence[Record]) -> str:
        """Where some numbers come from, in one line."""
        if self.kind == "tiny":
            return "Tiny smoke runs on scikit-learn's digits, trained just now: not a reproduction of the paper."
        return provenance_line(records)

    def __repr__(self) -> str:
        return f"profile {self.profile!r}: {PROFILES[self.profile]}"


def provenance_line(records: Sequence[Record]) -> str:
    """Where the numbers come from, in one line: data, seeds, commits, devices, dates. Same for the same records."""
    if not records:
        return "Nothing measured."
    sources = [record.provenance for record in records]

    def values(items) -> str:
        return ", ".join(sorted({str(item) for item in items}))

    dates = sorted(source["date"][:10] for source in sources)
    return (
        f"{len(records)} runs; data {values(s['data'] + ' (' + s['data_checksum'] + ')' for s in sources)}; "
        f"seeds {values(r.config.seed for r in records)}; commit {values(s['commit'][:10] for s in sources)}; "
        f"{values(s['device'] for s in sources)}; torch {values(s['torch'] for s in sources)}; "
        f"{dates[0] if dates[0] == dates[-1] else dates[0] + ' to ' + dates[-1]}; last epoch."
    )
