"""The paper's claims, held against what was measured: effect sizes, their uncertainty, and a verdict each.

A claim is a list of comparisons between runs that differ in what the claim is about. Runs are compared on the same
test images and seeds, and the interval is a bootstrap over those images: it knows how much a finite test set leaves
open, and nothing of how another training would have come out; for that there are seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd

from . import paper
from .campaign import STAGE2_MIXUP, estimate, images_per_second, jobs, wanted
from .cells import DASH, Table, missing_notes, paired, points, star, starred, table_of
from .evaluate import BINS, Predictions, bin_of
from .methods import METHODS
from .runs import Record
from .study import ALL_IMAGES, AS_MANY, FORMS, NO_SMOOTHING, Asked, Study, balanced

SMALL = 1.0  # points within which an effect counts as "limited"; the paper calls 0.3 so (appendix D.2)


@dataclass(frozen=True)
class Side:
    """One side of a comparison: a method, what is changed of it, and the data: long-tailed if ``data`` is None, else
    that one of :func:`mislas.study.balanced`."""

    method: str
    imbalance: float = 100
    changes: dict[str, Any] = field(default_factory=dict)
    data: str | None = None

    def on(self, dataset: str) -> Asked:
        """The run, as (method, imbalance, changes)."""
        data = balanced(dataset, self.imbalance)[self.data] if self.data else {}
        return self.method, self.imbalance, self.changes | data


@dataclass(frozen=True)
class Comparison:
    """``new`` minus ``old`` in one measure.

    Attributes:
        title: what changes, in words.
        measure: a key of :data:`MEASURES`.
        expected: what the claim says of the difference: ``"more"``, ``"less"``, ``"no more"`` or ``"same"``.
        new, old: the two sides.
    """

    title: str
    measure: str
    expected: str
    new: Side
    old: Side

    @property
    def name(self) -> str:
        """The measure's, as tables print it."""
        return "ECE" if self.measure == "ece" else self.measure

    def at(self, imbalance: float) -> Comparison:
        """The same at another imbalance factor."""
        new, old = (replace(side, imbalance=imbalance) for side in (self.new, self.old))
        return replace(self, new=new, old=old)


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper, where it stands, and the comparisons that test it."""

    name: str
    text: str
    where: str
    comparisons: list[Comparison]


def _both(title: str, new: Side, old: Side, ece: str | None = "less") -> list[Comparison]:
    expected = {"accuracy": "more", "ece": ece}
    return [Comparison(title, measure, what, new, old) for measure, what in expected.items() if what]


CLAIMS: list[Claim] = [
    Claim(
        "C1", "Networks trained on long-tailed data are more over-confident than those trained on balanced data, and "
        "so are the two-stage models.",
        "sections 1 and 4.2, Figures 1 and 7",
        [
            Comparison(f"{METHODS[method].title} against CE on {data}", measure, "more",
                       Side(method), Side("ce", data=data))
            for data in (AS_MANY, ALL_IMAGES)
            for method, measure in (("ce", "over-confidence"), ("ce", "ece"), ("crt", "ece"), ("lws", "ece"))
        ],
    ),
    Claim(
        "C2", "mixup in Stage-1 hardly changes Stage-1's accuracy but improves what Stage-2 reaches, and calibrates; "
        "mixup in Stage-2 adds nothing.",
        "section 3.1, Table 1",
        [
            Comparison("Stage-1: mixup against CE", "accuracy", "same", Side("mixup"), Side("ce")),
            Comparison("Stage-1: mixup against CE", "ece", "less", Side("mixup"), Side("ce")),
            *_both("cRT: with mixup in Stage-1", Side("crt+mixup"), Side("crt")),
            *_both("LWS: with mixup in Stage-1", Side("lws+mixup"), Side("lws")),
            Comparison("cRT+mixup: mixup in Stage-2, too", "accuracy", "no more",
                       Side("crt+mixup", changes=STAGE2_MIXUP), Side("crt+mixup")),
            Comparison("LWS+mixup: mixup in Stage-2, too", "accuracy", "no more",
                       Side("lws+mixup", changes=STAGE2_MIXUP), Side("lws+mixup")),
        ],
    ),
    Claim(
        "C3", "Label-aware smoothing improves both accuracy and calibration.",
        "sections 3.2 and 4.2, Figures 3, 5 and 10",
        [
            *_both("MiSLAS: smoothing against none", Side("mislas"), Side("mislas", changes=NO_SMOOTHING)),
            *_both("LWS: smoothing against cross-entropy", Side("lws+las"), Side("lws")),
        ],
    ),
    Claim(
        "C4", "Shifted batch norm improves accuracy.", "sections 3.3 and 4.2, Table 2 and Figure 6",
        [
            Comparison("LWS+mixup: shifted", "accuracy", "more", Side("lws+mixup+shift"), Side("lws+mixup")),
            Comparison("MiSLAS: shifted against not", "accuracy", "more",
                       Side("mislas"), Side("mislas", changes={"shift_bn": False})),
            Comparison("LWS, no mixup: shifted", "accuracy", "more", Side("lws+shift"), Side("lws")),
        ],
    ),
    Claim(
        "C5", "The form of the related function f hardly matters.", "appendix D.2, Figure 11",
        [
            Comparison("concave against " + " ".join(f"{value:.2g}" if key == "power" else value
                                                     for key, value in change.items()),
                       "accuracy", "same", Side("mislas"), Side("mislas", changes=change))
            for change in FORMS
        ],
    ),
    Claim(
        "C6", "MiSLAS is the most accurate of all, and better calibrated than the plain and the two-stage models, even "
        "than a plain model trained on balanced data.",
        "sections 4.2 and 4.3, Tables 3 and 4, Figures 4 and 7",
        [
            comparison
            for old in ("ce", "mixup", "crt", "lws", "crt+mixup", "lws+mixup")
            for comparison in _both(f"MiSLAS against {METHODS[old].title}", Side("mislas"), Side(old),
                                    ece=None if old == "mixup" else "less")  # no claim against Stage-1 with mixup
        ]
        + [
            Comparison(f"MiSLAS against CE on {data}", "ece", "less", Side("mislas"), Side("ce", data=data))
            for data in (AS_MANY, ALL_IMAGES)
        ]
        + [
            Comparison(f"MiSLAS against {METHODS[old].title}", "accuracy", "more", Side("mislas"), Side(old))
            for old in ("ldam+drw", "bbn", "remix+drw")
        ],
    ),
]  # fmt: skip


# ---------------------------------------------------------------------------------------------- effect and uncertainty


def _accuracy(p: Predictions) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    return p.correct[:, None].astype(float), lambda sums: sums[..., 0]


def _over_confidence(p: Predictions) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    return (p.confidence - p.correct)[:, None], lambda sums: sums[..., 0]


def _ece(p: Predictions) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    gaps = np.zeros((len(p.confidence), BINS))
    which = bin_of(p.confidence, np.linspace(0, 1, BINS + 1))
    gaps[np.arange(len(gaps)), which] = p.correct - p.confidence
    return gaps, lambda sums: np.abs(sums).sum(axis=-1)


#: A measure as columns of numbers per test image, and a function of their means over images: resampled, it costs one
#: matrix product.
MEASURES = {"accuracy": _accuracy, "over-confidence": _over_confidence, "ece": _ece}


@lru_cache(maxsize=1)
def _resamples(n: int) -> np.ndarray:
    """Shares of n images in the test set as it is (the first row), and in test sets drawn from it: rows of sum 1."""
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=1000)
    return np.vstack([np.ones(n), drawn]) / n


def effect(
    new: Sequence[Record], old: Sequence[Record], measure: str, level: float = 0.95
) -> tuple[float, float, float]:
    """``new`` minus ``old``, averaged over seeds, with a basic bootstrap interval over the test images.

    Resampling adds to an ECE, and most to a small one; the basic interval, ``2 * effect`` minus the percentiles, undoes
    a part of it where the percentile interval would double it (Davison & Hinkley, 1997, section 5.2). A part stays: if
    one side is calibrated all but perfectly, its true ECE some tenths of a point, the interval of the difference lies
    about half a point too high, and holds the truth in about four cases of five (simulated).

    Args:
        new, old: runs of equal data and seeds, in equal order, on the same test set.
        measure: ``"accuracy"``, ``"ece"`` (15 bins) or ``"over-confidence"`` (mean confidence minus accuracy).

    Returns:
        Effect, lower and upper end, in points (1 / 100). All runs see the same resampled images.
    """
    return _interval(_differences(new, old, measure).mean(axis=0), level)


def _differences(new: Sequence[Record], old: Sequence[Record], measure: str) -> np.ndarray:
    """``new`` minus ``old`` in points, ``(seeds, test sets)``: the test set as it is, then the resampled ones."""
    sides = [[MEASURES[measure](record.predictions()) for record in records] for records in (new, old)]
    weights = _resamples(len(sides[0][0][0]))
    values = [np.array([of(weights @ columns) for columns, of in side]) for side in sides]
    return 100 * (values[0] - values[1])


def _interval(difference: np.ndarray, level: float = 0.95) -> tuple[float, float, float]:
    high, low = 2 * difference[0] - np.quantile(difference[1:], [(1 - level) / 2, (1 + level) / 2])
    return float(difference[0]), float(low), float(high)


def verdict(expected: str, low: float, high: float) -> str:
    """What an interval says of a claim: ``"supports"``, ``"contradicts"`` or ``"leaves open"``.

    ``"more"`` and ``"less"`` are about the sign. ``"same"`` means within :data:`SMALL` points, ``"no more"`` less than
    :data:`SMALL` points above.
    """
    if expected == "less":
        return verdict("more", -high, -low)
    if expected == "more":
        return "supports" if low > 0 else "contradicts" if high < 0 else "leaves open"
    if high < SMALL and (expected == "no more" or low > -SMALL):
        return "supports"
    return "contradicts" if low > SMALL or (expected == "same" and high < -SMALL) else "leaves open"


NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Outcome:
    """What was measured of a comparison.

    Attributes:
        asked: the two runs.
        found: their records.
        new, old: those of equal data and seeds; if there are none, so is what follows.
        effect: ``new`` minus ``old`` in points, mean over seeds.
        deviation: standard deviation (n - 1) of the seeds' effects; None of a single one.
        low, high: see :func:`effect`.
        says: see :func:`verdict`.
    """

    asked: list[Asked]
    found: list[list[Record]]
    new: list[Record]
    old: list[Record]
    effect: float = math.nan
    deviation: float | None = None
    low: float = math.nan
    high: float = math.nan
    says: str = NOT_MEASURED

    def __str__(self) -> str:
        return DASH if not self.new else points(self.effect) + (f" ± {self.deviation:.1f}" if self.deviation else "")


def outcome(study: Study, dataset: str, c: Comparison) -> Outcome:
    """A comparison, held against the runs of a study."""
    asked = [side.on(study.datasets(dataset)[0]) for side in (c.new, c.old)]
    found = study.side_by_side(dataset, asked)
    new, old = paired(*found)
    if not new:
        says = "no common data and seed" if all(found) else NOT_MEASURED
        return Outcome(asked, found, new, old, says=says)
    differences = _differences(new, old, c.measure)
    middle, low, high = _interval(differences.mean(axis=0))
    spread = float(differences[:, 0].std(ddof=1)) if len(new) > 1 else None
    return Outcome(asked, found, new, old, middle, spread, low, high, verdict(c.expected, low, high))


def _shown(outcomes: Iterable[Outcome]) -> list[Record]:
    """The records that were compared."""
    return [record for o in outcomes for record in o.new + o.old]


def _missing(study: Study, dataset: str, outcomes: Sequence[Outcome]) -> list[str]:
    """How to measure what is missing."""
    asked, found = [run for o in outcomes for run in o.asked], [records for o in outcomes for records in o.found]
    return missing_notes(study, dataset, asked, found)


def claim_table(study: Study, dataset: str, claim: Claim) -> Table:
    """A claim's comparisons on one dataset: effect, interval, seeds, verdict; and how to measure what is missing."""
    outcomes = [outcome(study, dataset, c) for c in claim.comparisons]
    shown = _shown(outcomes)
    cells = [
        [
            o.says,
            c.name,
            {"same": f"within {SMALL:g}", "no more": f"not above {SMALL:g}"}.get(c.expected, c.expected),
            f"{o}{star(o.new, shown)}",
            f"{points(o.low)} to {points(o.high)}" if o.new else DASH,
            str(len(o.new)),
        ]
        for c, o in zip(claim.comparisons, outcomes, strict=True)
    ]
    columns = ["verdict", "measure", "claimed", study.kind, "95% interval", "runs each"]
    frame = pd.DataFrame(cells, index=[c.title for c in claim.comparisons], columns=columns)
    caption = f"{claim.name}, {study.title(dataset)}, IF 100: differences in points, bootstrap over the test images."
    return table_of(study, frame, caption, _missing(study, dataset, outcomes), shown, beside=True)


MARKS = {"supports": "✓", "contradicts": "✗", "leaves open": "?"}
LEGEND = ", ".join(f"{mark} {kind}" for kind, mark in MARKS.items())


def summary(study: Study, dataset: str) -> Table:
    """How many comparisons of each claim support it, contradict it, leave it open, or have not been made, as
    :data:`MARKS`; and between which ends the effects on accuracy and ECE lie, in points."""
    rows, shown = {}, []
    for claim in CLAIMS:
        outcomes = [outcome(study, dataset, c) for c in claim.comparisons]
        shown += _shown(outcomes)
        by_measure = [
            [o for c, o in zip(claim.comparisons, outcomes, strict=True) if o.new and c.measure == key]
            for key in ("accuracy", "ece")
        ]
        rows[f"{claim.name}: {claim.text}"] = [o.says for o in outcomes], by_measure
    norms = [norms_outcome(study, dataset, pair, 100) for pair in NORMS.values()]
    shown += _shown(norms)
    rows[f"C7: {NORMS_CLAIM}"] = [o.says for o in norms], [[], []]
    cells = []
    for says, by_measure in rows.values():
        counts = [says.count(kind) for kind in MARKS]
        cells.append([*counts, len(says) - sum(counts), *(_span(outcomes, shown) for outcomes in by_measure)])
    frame = pd.DataFrame(cells, index=list(rows), columns=[*MARKS.values(), DASH, "accuracy", "ECE"])
    caption = (
        f"Comparisons per claim, {study.title(dataset)}, IF 100: {LEGEND}, {DASH} not measured. Effects on accuracy "
        "and ECE in points, from the lowest to the highest."
    )
    return table_of(study, frame, caption, [], shown, beside=True)


def _span(outcomes: Sequence[Outcome], shown: Sequence[Record]) -> str:
    """The lowest and the highest effect, as text."""
    ends = [of(outcomes, key=lambda o: o.effect) for of in (min, max)] if outcomes else []
    return " to ".join(dict.fromkeys(f"{points(o.effect)}{star(o.new, shown)}" for o in ends)) or DASH


def across(study: Study, dataset: str, imbalances: Sequence[float] = paper.IMBALANCES) -> Table:
    """Comparisons at several imbalance factors: effects in points, and each verdict as one of :data:`MARKS`.

    A comparison that is measured at none but the first factor is left out: :func:`claim_table` has it.
    """
    rows, shown = {}, []
    for claim in CLAIMS:
        for c in claim.comparisons:
            outcomes = [outcome(study, dataset, c.at(imbalance)) for imbalance in imbalances]
            if any(o.new for o in outcomes[1:]):
                cells = [(f"{o} {MARKS[o.says]}" if o.new else DASH, o.new) for o in outcomes]
                rows[f"{claim.name}, {c.title}: {c.name}"] = cells
                shown += _shown(outcomes)
    columns = [f"IF {imbalance:g}" for imbalance in imbalances]
    frame = pd.DataFrame.from_dict(starred(rows, shown), orient="index", columns=columns)
    caption = f"Effects in points at each imbalance factor, {study.title(dataset)}: {LEGEND}."
    return table_of(study, frame, caption, [], shown)


NORMS_CLAIM = "With mixup in Stage-1, weights of rare classes grow beside those of frequent ones."

#: Classifiers of Figure 2, and Stage-1's own: without and with mixup in Stage-1.
NORMS = {"Stage-1's own": ("ce", "mixup"), "cRT": ("crt", "crt+mixup"), "LWS": ("lws", "lws+mixup")}


def norms_outcome(
    study: Study, dataset: str, pair: tuple[str, str], imbalance: float, changes: dict[str, Any] | None = None
) -> Outcome:
    """Whether :func:`rare_over_frequent`, mean over seeds, is larger for the second method than for the first: they are
    ``low`` and ``high`` here. Weights are no matter of test images, so there is no interval."""
    asked = [(method, imbalance, changes or {}) for method in pair]
    found = study.side_by_side(dataset, asked)
    old, new = paired(*found)
    if not new:
        return Outcome(asked, found, new, old)
    before, after = (float(np.mean([rare_over_frequent(record) for record in side])) for side in (old, new))
    says = "supports" if after > before else "contradicts"
    return Outcome(asked, found, new, old, after - before, None, before, after, says)


def norm_balance(
    study: Study,
    dataset: str,
    imbalances: Sequence[float] = paper.IMBALANCES,
    changes: dict[str, Any] | None = None,
    title: str | None = None,
) -> Table:
    """Whether mixup in Stage-1 makes the classifier's weights longer for rare classes than for frequent ones: their
    :func:`rare_over_frequent`, without and with it, and whether it rises.

    Args:
        changes: what is changed in every run.
        title: what the caption calls the dataset; default :meth:`mislas.study.Study.title`.
    """
    columns: dict[str, list[tuple[str, list[Record]]]] = {}  # text, and the runs it is of
    shown, notes = [], []
    for imbalance in imbalances:
        outcomes = [norms_outcome(study, dataset, pair, imbalance, changes) for pair in NORMS.values()]
        notes += _missing(study, dataset, outcomes)
        columns[f"IF {imbalance:g}"] = [
            (f"{o.low:.2f} → {o.high:.2f} {MARKS[o.says]}" if o.new else DASH, o.new) for o in outcomes
        ]
        shown += _shown(outcomes)
    caption = (
        "Mean weight norm of the rarer half of the classes over that of the other half, without and with mixup in "
        f"Stage-1, {title or study.title(dataset)}: {MARKS['supports']} it rises, {MARKS['contradicts']} it falls."
    )
    frame = pd.DataFrame(starred(columns, shown), index=list(NORMS))
    return table_of(study, frame, caption, notes, shown, beside=True)


def rare_over_frequent(record: Record) -> float:
    """Mean norm of the classifier's weights over the rarer half of the classes, by that over the more frequent half; a
    class in the middle counts for neither."""
    arrays = record.arrays()
    norms = arrays["weight_norm"][np.argsort(arrays["class_counts"], kind="stable")]
    half = len(norms) // 2
    return float(norms[:half].mean() / norms[-half:].mean())


# ------------------------------------------------------------------------------------------------------------- gaps


def gaps(study: Study, datasets: Iterable[str], imbalances: Sequence[float] = ()) -> Table:
    """What a campaign wants and the study's store lacks: runs, and what they cost on the fastest device that the store
    knows. The commands are under the table.

    The cost is what has to be trained anew, Stage-1 included, at the rate of stored runs of the same kind.

    Args:
        imbalances: imbalance factors; without any they are what :func:`mislas.campaign.wanted` takes. The balanced
            model is always looked for.
    """
    rates, rows, titles, marks, devices = images_per_second(study.store), [], [], {}, set()
    seeds = study.seeds or [0]
    for dataset in datasets:
        everything = wanted(dataset, imbalances, seeds, study.overrides)
        for imbalance in dict.fromkeys(config.imbalance for config in everything):
            configs = [config for config in everything if config.imbalance == imbalance]
            missing = [config for config in configs if study.store.get(config) is None]
            if not missing:
                continue
            planned = jobs(configs, study.store)
            if imbalance > 1:
                commands = [study.campaign_command(dataset, imbalances)]
            else:  # balanced models, each alone
                sizes = [{} if config.n_max is None else {"n_max": config.n_max} for config in missing]
                changes = [{"backbone": config.backbone} | size for config, size in zip(missing, sizes, strict=True)]
                commands = dict.fromkeys(study.command(dataset, ["ce"], 1, change) for change in changes)
            mark = marks.setdefault(", ".join(f"`{command}`" for command in commands), f"[{len(marks) + 1}]")
            passes = sum(job.passes for job in planned)
            hours, _, device = estimate(planned, rates).partition(" on ")
            devices |= {device} - {""}
            rows.append([f"{imbalance:g}", f"{len(missing)} of {len(configs)}", f"{passes / 1e6:.1f}", hours or DASH])
            titles.append(f"{dataset} {mark}")
    columns = ["IF", "runs missing", "million image passes", "estimated"]
    frame = pd.DataFrame(rows, columns=columns, index=titles)
    which = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    caption = f"What is not measured yet, {which}." if rows else "All that a campaign wants is measured."
    if devices:
        caption += f" Estimated on {', '.join(sorted(devices))}: the fastest that has done such runs."
    return Table(frame, caption, [f"{mark} {commands}" for commands, mark in marks.items()])
