"""The figures. Colours are safe for the colour-blind and differ in lightness, so that they survive a grey print."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from .cells import DASH, Table, how_to, paired
from .data import SPECS, long_tailed_counts
from .evaluate import Bins
from .losses import smoothing_factors
from .runs import Record
from .study import GRID, Asked, Study
from .tables import PLACES, by_group
from .train import learning_rate_factor

BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#595959"  # of Okabe and Ito's palette
GREEN, LIGHT = "#009E73", "#A9D6F5"  # LIGHT differs from BLUE in grey, too

#: The gap of a reliability diagram's bin, where the model is over- and where it is under-confident.
OVER = {"facecolor": "#F0C05A", "edgecolor": ORANGE, "hatch": "///"}
UNDER = {"facecolor": LIGHT, "edgecolor": BLUE, "hatch": "\\\\\\"}

#: Curves of Figure 2: light, dark, line. Without mixup, with mixup.
NORM_LOOKS = ((LIGHT, BLUE, "--"), ("#F5D08A", "#B36B00", "-"))

STYLE = {
    "figure.dpi": 200,  # sharp where the screen or the printer is
    "savefig.bbox": "tight",
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def reliability_diagram(
    ax: Axes,
    bins: Bins,
    accuracy: float,
    ece: float,
    *,
    left: bool = True,
    low: bool = True,
    largest: float | None = None,
) -> None:
    """Accuracy against confidence, per bin (Guo et al., 2017), with the share of test images in each bin below it.

    Blue bars are the accuracy of a bin; the hatched part is its gap to the mean confidence: orange and above the blue
    where the model is over-confident, the light upper end of the blue where it is under-confident. Accuracy and ECE are
    fractions in 0..1. ``largest`` is the share that is drawn longest, so that several panels have one scale; default
    this panel's largest.
    """
    centre = (bins.edges[:-1] + bins.edges[1:]) / 2
    width = np.diff(bins.edges)
    some = bins.count > 0
    ax.bar(centre[some], bins.accuracy[some], width[some], color=BLUE, edgecolor="white", linewidth=0.5)
    bottom = np.minimum(bins.accuracy, bins.confidence)
    for where, look in ((bins.confidence >= bins.accuracy, OVER), (bins.confidence < bins.accuracy, UNDER)):
        ax.bar(centre[where], bins.gap[where], width[where], bottom[where], linewidth=0.5, **look)
    ax.plot([0, 1], [0, 1], "--", color=GREY, linewidth=1.2)
    share = bins.count / bins.count.sum()
    depth = -0.18 * share / (largest or share.max())
    ax.bar(centre, depth, width, color=GREY, alpha=0.55, edgecolor="white", linewidth=0.5)
    ax.axhline(0, color="black", linewidth=0.6)
    ax.set(xlim=(0, 1), ylim=(-0.2, 1), xticks=[0, 0.5, 1], yticks=[0, 0.25, 0.5, 0.75, 1], aspect="equal")
    ax.text(
        0.05, 0.95, f"Acc. {100 * accuracy:.1f}%\nECE {100 * ece:.1f}%", va="top", transform=ax.transAxes,
        bbox={"facecolor": "white", "edgecolor": GREY, "alpha": 0.9, "boxstyle": "round,pad=0.3"},
    )  # fmt: skip
    ax.set_ylabel("Accuracy" if left else None)
    ax.set_xlabel("Confidence" if low else None)


def _heading(study: Study, dataset: str, shown: Sequence[Record], title: str | None) -> str:
    """The line above a figure: which data, whose numbers."""
    seeds: dict[str, set[int]] = {}
    for record in shown:
        seeds.setdefault(record.config.dataset, set()).add(record.config.seed)
    used = [f"{name}, seed {', '.join(map(str, sorted(some)))}" for name, some in seeds.items()]
    changed = study.changed(shown).replace(" With", "; with")
    lines = title or study.title(dataset), f"{study.kind}: {'; '.join(used)}{changed}"
    return "\n".join(textwrap.fill(line, 58, break_on_hyphens=False, break_long_words=False) for line in lines)


def _nothing(study: Study, dataset: str, title: str | None) -> Table:
    """What stands in the place of a figure of which nothing is measured."""
    return Table(pd.DataFrame(), f"{title or study.title(dataset)}: nothing to draw, it is not measured yet.")


#: Title, method and imbalance factor of a panel, and what is changed in its run, if anything.
Panel = tuple[str, str, float | None] | tuple[str, str, float | None, dict[str, Any]]


def _asked(panels: Sequence[Panel], changes: dict[str, Any] | None) -> list[Asked]:
    """The panels' runs, as (method, imbalance, changes)."""
    return [(method, imbalance, (changes or {}) | dict(*own)) for _, method, imbalance, *own in panels]


def reliability_figure(
    study: Study,
    dataset: str,
    panels: Sequence[Panel],
    columns: int = 3,
    title: str | None = None,
    changes: dict[str, Any] | None = None,
) -> Figure | Table:
    """Reliability diagrams side by side, first seed of each run; a legend stands in the space that is left, or below.

    Args:
        study: whose runs to show.
        dataset: one of the paper's, e.g. ``"cifar10"``.
        panels: for each panel its title, method and imbalance factor (None: see :meth:`mislas.study.Study.configs`),
            and, if it has any, changes of its own. One that has not been measured says so.
        columns: panels in a row.
        title: what the figure calls the dataset; default :meth:`mislas.study.Study.title`.
        changes: what is changed in every run.
    """
    found = study.side_by_side(dataset, _asked(panels, changes))
    if not any(found):
        return _nothing(study, dataset, title)
    rows = -(-len(panels) // columns)
    shown = []
    with plt.rc_context(STYLE):
        below = 0.0 if len(panels) < rows * columns else 0.9  # inches of the legend
        size = (3.2 * columns, 3.5 * rows + below)
        figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
        flat = axes.ravel()
        drawn = [records[0].predictions().reliability() if records else None for records in found]
        largest = max(bins.count.max() / bins.count.sum() for bins in drawn if bins)
        for i, (ax, (heading, *_), records, bins) in enumerate(zip(flat, panels, found, drawn, strict=False)):
            ax.set_title(heading)
            if bins:
                shown.append(records[0])
                metrics = records[0].metrics
                left = i % columns == 0 or not drawn[i - 1]
                low = i + columns >= len(panels) or not drawn[i + columns]
                reliability_diagram(ax, bins, metrics["accuracy"], metrics["ece"], left=left, low=low, largest=largest)
            else:
                ax.text(0.5, 0.4, "not measured yet", ha="center", va="center", color=GREY)
                ax.set(xlim=(0, 1), ylim=(-0.2, 1), xticks=[], yticks=[], aspect="equal")
        for ax in flat[len(panels) :]:
            ax.axis("off")
        handles = [
            plt.Rectangle((0, 0), 1, 1, color=BLUE, label="accuracy of the bin"),
            plt.Rectangle((0, 0), 1, 1, label="gap: surer than right", **OVER),
            plt.Rectangle((0, 0), 1, 1, label="gap: less sure than right", **UNDER),
            plt.Line2D([], [], color=GREY, linestyle="--", label="perfect calibration"),
            plt.Rectangle((0, 0), 1, 1, color=GREY, alpha=0.55, label=f"share of test images (longest: {largest:.0%})"),
        ]
        if not below:
            flat[len(panels)].legend(handles=handles, loc="center left", frameon=False)
        else:
            figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
        figure.suptitle(_heading(study, dataset, shown, title), fontsize=11, color=GREY)
    return figure


def missing_commands(
    study: Study,
    dataset: str,
    panels: Sequence[Panel],
    changes: dict[str, Any] | None = None,
) -> list[str]:
    """The commands that measure the panels that nobody has measured yet, and what they cost; see :func:`how_to`."""
    asked = _asked(panels, changes)
    missing = study.missing(asked, study.side_by_side(dataset, asked))
    return [how_to(study, dataset, *command) for command in missing]


def missing_variants(
    study: Study, dataset: str, method: str, changes: Sequence[dict[str, Any]], imbalance: float = 100
) -> list[str]:
    """The command that measures variants of a method, if any has not been measured with every seed asked for."""
    found = study.sweep(dataset, method, changes, imbalance)
    missing = study.missing([(method, imbalance, change) for change in changes], found)
    return [study.campaign_command(dataset, [imbalance])] if missing else []


# ----------------------------------------------------------------------------------------------------------- Table 5


def schedule_figure(study: Study, datasets: Sequence[str]) -> Figure:
    """Learning rate over the epochs of both stages, as the code sets it for MiSLAS. Nothing here is measured.

    Args:
        datasets: the paper's; datasets with the same two curves share a line.
    """
    configs = {study.title(name): study.configs(name, "mislas")[0] for name in datasets}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 1, figsize=(6, 6.4), layout="constrained")
        for ax, stage in zip(axes, ("stage1", "stage2"), strict=True):
            curves: dict[tuple[float, ...], list[str]] = {}
            for name, config in configs.items():
                part = getattr(config, stage)
                rates = tuple(part.lr * learning_rate_factor(part, epoch) for epoch in range(part.epochs))
                curves.setdefault(rates, []).append(name)
            looks = zip(("-", "--", "-.", ":"), (BLUE, "black", ORANGE, GREEN), strict=True)
            for (rates, names), (line, colour) in zip(curves.items(), looks, strict=False):
                epochs = np.arange(1, len(rates) + 1)
                ax.plot(epochs, rates, line, drawstyle="steps-mid", color=colour, linewidth=2, label=", ".join(names))
            ax.set(title=f"Stage-{stage[-1]}", xlabel="epoch", ylabel="learning rate", ylim=(0, None))
            ax.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), fontsize=10)
    return figure


# ---------------------------------------------------------------------------------------------------------- Figure 3


def density(values: np.ndarray, at: np.ndarray, width: float = 0.04) -> np.ndarray:
    """Density of values in 0..1: a Gaussian kernel, reflected at 0 and 1 so that what piles up there stays in sight.

    Args:
        values: in 0..1, ``(N,)``, not empty.
        at: where to estimate it, ``(M,)``.
        width: standard deviation of the kernel.

    Returns:
        ``(M,)``; its integral from 0 to 1 is 1.
    """
    counts, edges = np.histogram(values, bins=1000, range=(0, 1))
    centres = (edges[:-1] + edges[1:]) / 2
    places = np.concatenate([-centres, centres, 2 - centres])
    kernel = np.exp(-0.5 * ((at[:, None] - places) / width) ** 2) / (width * np.sqrt(2 * np.pi))
    return kernel @ np.tile(counts, 3) / len(values)


def violin_figure(
    study: Study, dataset: str, methods: dict[str, str], imbalance: float = 100, title: str | None = None
) -> Figure | Table:
    """Probability of the true class for many, medium and few classes: one method above each line, another below.

    The half-violins are densities (:func:`density`), on one scale within a group. Ticks are means.

    Args:
        study: whose runs to show, first seed of each.
        methods: two legends and methods, the upper half first.
    """
    measured = study.side_by_side(dataset, [(method, imbalance, {}) for method in methods.values()])
    found = {name: records[:1] for name, records in zip(methods, measured, strict=True)}
    shown = [record for records in found.values() for record in records]
    if not shown:
        return _nothing(study, dataset, title)
    parts = {name: by_group(records[0]) for name, records in found.items() if records}
    rows = list(next(iter(parts.values())))
    at = np.linspace(0, 1, 301)
    with plt.rc_context(STYLE):
        figure, ax = plt.subplots(figsize=(6, 5.4), layout="constrained")
        looks = dict(zip(methods, ((1, LIGHT, ""), (-1, BLUE, "///")), strict=True))
        for name, (_, colour, hatch) in looks.items():
            label = name if name in parts else f"{name}: not measured yet"
            ax.fill_between([], [], facecolor=colour, hatch=hatch, edgecolor="white", linewidth=0, label=label)
        for y, group in zip((0, -1, -2), rows, strict=True):
            ax.axhline(y, color="black", linewidth=0.6)
            curves = {name: density(p[group], at) for name, p in parts.items() if p[group] is not None}
            if not curves:
                ax.text(0.5, y + 0.05, "no class of this size", ha="center", va="bottom", color=GREY)
            for name, curve in curves.items():
                side, colour, hatch = looks[name]
                edge = y + side * 0.45 * curve / max(other.max() for other in curves.values())
                ax.fill_between(at, y, edge, facecolor=colour, edgecolor="white", hatch=hatch, linewidth=0)
                ax.plot(at, edge, color="black", linewidth=0.8)
                mean = parts[name][group].mean()
                ax.plot([mean, mean], [y, y + side * 0.3], color="black", linewidth=2.5)
                ax.text(1.02, y + side * 0.2, f"mean {mean:.2f}", va="center")
        ax.set(
            xlim=(0, 1), ylim=(-2.6, 0.6), yticks=[0, -1, -2], yticklabels=rows, xlabel="probability of the true class"
        )
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
        figure.suptitle(_heading(study, dataset, shown, title), fontsize=11, color=GREY)
    return figure


# ---------------------------------------------------------------------------------------------------- Figures 5 and 10


def matrix_figure(study: Study, dataset: str, imbalance: float = 100, title: str | None = None) -> Figure | Table:
    """Accuracy and ECE of MiSLAS for eps_1 and eps_K from 0.0 to 0.5, eps_K <= eps_1; darker is better.

    Means over seeds. Marked are cross-entropy (both 0), the dataset's default (Table 5), and the best cell.
    """
    found = study.sweep(dataset, "mislas", GRID, imbalance)
    shown = [record for records in found for record in records]
    if not shown:
        return _nothing(study, dataset, title)
    chosen = study.configs(dataset, "mislas", imbalance)[0].stage2
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 1, figsize=(5.2, 9.4), layout="constrained")
        for ax, name, key, sign in zip(axes, ("Accuracy (%)", "ECE (%)"), ("accuracy", "ece"), (1, -1), strict=True):
            cells = {
                (round(10 * change["eps_1"]), round(10 * change["eps_k"])): [100 * r.metrics[key] for r in records]
                for change, records in zip(GRID, found, strict=True)
            }
            _matrix(ax, {cell: float(np.mean(values)) for cell, values in cells.items() if values}, sign)
            ax.set_title(name)
            frames = {
                "cross-entropy": (0, 0, "--", GREEN),
                "the default": (10 * chosen.eps_1, 10 * chosen.eps_k, "-", ORANGE),
            }
            for label, (x, y, line, colour) in frames.items():
                style = {"fill": False, "edgecolor": colour, "linestyle": line, "linewidth": 3, "label": label}
                unbroken = {"dash_offset": 0, "dash_list": None}
                halo = [withStroke(linewidth=5.5, foreground="white", dashes=unbroken)]  # seen on any shade
                ax.add_patch(plt.Rectangle((x + 0.07, y + 0.07), 0.86, 0.86, path_effects=halo, **style))
            ax.plot([], [], linestyle="", marker="*", markersize=9, color="black", label="best")
            ax.legend(loc="upper left", frameon=False, title="darker is better", alignment="left")
        figure.suptitle(_heading(study, dataset, shown, title), fontsize=11, color=GREY)
    return figure


def _matrix(ax: Axes, values: dict[tuple[int, int], float], sign: int) -> None:
    """One matrix: a shaded square with its number per cell, a dash where nothing is measured, a star at the best."""
    import seaborn as sns  # here: it takes seconds to import

    cells = pd.Series(values).unstack(0).reindex(index=range(6), columns=range(6))
    low, high = sorted((sign * min(values.values()), sign * max(values.values())))
    spread = high - low or 1.0  # one value alone is light
    sns.heatmap(
        sign * cells, vmin=low - 0.1 * spread, vmax=high + 0.15 * spread, cmap="Blues", cbar=False, square=True, ax=ax,
        annot=cells, fmt=".1f", annot_kws={"size": 11}, linewidths=2,
    )  # fmt: skip
    for x in range(6):
        for y in range(x + 1):
            if (x, y) not in values:
                ax.text(x + 0.5, y + 0.5, DASH, ha="center", va="center")
            elif sign * values[x, y] == high:
                ax.plot(x + 0.79, y + 0.77, "*", markersize=9, color="white" if high > low else "black")
    shades = ax.collections[0].get_facecolors()[cells.notna().to_numpy().ravel()]
    for number, shade in zip(ax.texts, shades, strict=False):  # first in texts are the numbers
        number.set_color("black" if sns.utils.relative_luminance(shade) > 0.18 else "white")  # the better contrast
    labels = [f"{i / 10}" for i in range(6)]
    ax.set(
        xlabel="$\\epsilon_1$ (largest class)",
        ylabel="$\\epsilon_K$ (smallest class)",
        xticklabels=labels,
        yticklabels=labels,
    )
    ax.invert_yaxis()
    ax.tick_params(length=0, labelrotation=0)


# ---------------------------------------------------------------------------------------------------------- Figure 6


def shift_figure(
    study: Study,
    dataset: str,
    before: tuple[str, dict[str, Any]],
    after: tuple[str, dict[str, Any]],
    imbalance: float = 100,
    title: str | None = None,
) -> Figure | Table:
    """Running mean and variance of the first and the last batch norm, per channel, in two runs; first common seed.

    Args:
        before, after: the runs, as (method, changes).
    """
    asked = [(method, imbalance, changes) for method, changes in (before, after)]
    old, new = paired(*study.side_by_side(dataset, asked))
    if not old:
        return _nothing(study, dataset, title)
    a, b = old[0].arrays(), new[0].arrays()
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(4, 1, figsize=(6, 10), layout="constrained")
        kinds = [(place, kind) for place in PLACES for kind in ("mean", "var")]
        for ax, (place, kind) in zip(axes, kinds, strict=True):
            key = f"bn_{place}_{kind}"
            channels = np.arange(1, len(a[key]) + 1)
            ax.vlines(channels, a[key], b[key], color=GREY, linewidth=1.2)
            ax.plot(
                channels, a[key], "o", markersize=6, markerfacecolor="white", color=ORANGE, label="before the shift"
            )
            ax.plot(channels, b[key], "o", markersize=4, color=BLUE, label="after the shift")
            ax.set_title(
                f"{PLACES[place]}, {'running mean μ' if kind == 'mean' else 'running variance σ²'}", loc="left"
            )
            ax.margins(x=0.02)
        axes[-1].set_xlabel("channel")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
        figure.suptitle(_heading(study, dataset, [old[0], new[0]], title), fontsize=11, color=GREY)
    return figure


# ---------------------------------------------------------------------------------------------------------- Figure 2


def weight_norm_figure(
    study: Study,
    dataset: str,
    panels: dict[str, dict[str, str]],
    changes: dict[str, Any],
    title: str | None = None,
) -> Figure | Table:
    """Norms of the classifier's weights, classes sorted by training images; light as they are, dark smoothed.

    Grey in the background: the training images of each class, on a logarithmic scale. First seed of each run. The
    moving average spans a twentieth of the classes, at least three. A classifier of your own may have no weights that
    belong to a class; the legend says so.

    Args:
        panels: panel titles, and for each its two curves: legend and method.
    """
    measured = iter(study.each(dataset, [(m, None, changes) for curves in panels.values() for m in curves.values()]))
    found = {heading: {label: next(measured)[:1] for label in curves} for heading, curves in panels.items()}
    shown = [record for curves in found.values() for records in curves.values() for record in records]
    if not shown:
        return _nothing(study, dataset, title)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(len(panels), 1, figsize=(6, 3.6 * len(panels)), layout="constrained", squeeze=False)
        for ax, (heading, curves) in zip(axes.ravel(), found.items(), strict=True):
            behind = ax.twinx()
            for (label, records), (light, dark, line) in zip(curves.items(), NORM_LOOKS, strict=False):
                if not records:
                    ax.plot([], [], line, color=dark, label=f"{label}: not measured yet")
                    continue
                arrays = records[0].arrays()
                if "weight_norm" not in arrays:
                    ax.plot([], [], line, color=dark, label=f"{label}: no weights of a class")
                    continue
                order = np.argsort(-arrays["class_counts"], kind="stable")
                norms, rank = arrays["weight_norm"][order], np.arange(1, len(order) + 1)
                width = 2 * max(1, len(order) // 40) + 1
                ax.plot(rank, norms, color=light, linewidth=0.8)
                smooth = pd.Series(norms).rolling(width, center=True, min_periods=1).mean()
                ax.plot(rank, smooth, line, color=dark, linewidth=2, label=label)
            for record in [record for records in curves.values() for record in records][:1]:
                counts = np.sort(record.arrays()["class_counts"])[::-1]
                behind.fill_between(np.arange(1, len(counts) + 1), counts, color=GREY, alpha=0.15, linewidth=0)
            behind.set(yscale="log", ylabel="training images (grey)")
            ax.set(title=heading, xlabel="class, by training images", ylabel="weight norm", ylim=(0, None))
            ax.set_zorder(1)
            ax.patch.set_visible(False)
            ax.legend(frameon=False, loc="best")
        figure.suptitle(_heading(study, dataset, shown, title), fontsize=11, color=GREY)
    return figure


# --------------------------------------------------------------------------------------------------------- Figure 11


def forms_figure(
    study: Study, dataset: str, panels: dict[str, dict[str, dict[str, Any]]], imbalance: float = 100
) -> Figure:
    """The related function: the smoothing factor of a class against its number of images. Nothing here is measured.

    Args:
        panels: panel titles, and for each its curves: legend, and what is changed of MiSLAS.
    """
    name = study.datasets(dataset)[0]
    counts = long_tailed_counts(SPECS[name].train_per_class, imbalance, SPECS[name].num_classes)
    at = np.linspace(min(counts), max(counts), 400)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(len(panels), 1, figsize=(6, 3.6 * len(panels)), layout="constrained", squeeze=False)
        for ax, (heading, curves) in zip(axes.ravel(), panels.items(), strict=True):
            styles = zip(("-", "--", "-.", ":"), (BLUE, "black", ORANGE, GREEN), strict=True)
            for (label, changes), (line, colour) in zip(curves.items(), styles, strict=False):
                s = study.configs(dataset, "mislas", imbalance, changes)[0].stage2
                factors = smoothing_factors(at, s.eps_1, s.eps_k, s.form, s.power)
                ax.plot(at, factors, line, color=colour, linewidth=2, label=label)
            ax.plot(
                counts, np.full(len(counts), 0.0), "|", color=GREY, markersize=10, label="the classes", clip_on=False
            )
            ax.set(title=heading, xlabel="training images of the class", ylabel="smoothing factor ε", ylim=(0, None))
            ax.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
        figure.suptitle(f"{study.title(dataset)}, IF {imbalance:g}", fontsize=11, color=GREY)
    return figure


def show(figure: Figure | Table) -> None:
    """Display a figure, or what stands in its place, and return nothing, so that a notebook cell prints no object."""
    if isinstance(figure, Table):
        display(figure)
        return
    plt.show()
    plt.close(figure)
