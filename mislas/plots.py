"""The figures. Colours are safe for the colour-blind and differ in lightness, so that they survive a grey print."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .evaluate import Bins
from .study import Study

BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#595959"  # of Okabe and Ito's palette

STYLE = {
    "figure.dpi": 110,
    "savefig.bbox": "tight",
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def reliability_diagram(
    ax: Axes, bins: Bins, accuracy: float, ece: float, *, left: bool = True, low: bool = True
) -> None:
    """Accuracy against confidence, per bin (Guo et al., 2017), with the share of test images in each bin below it.

    Blue bars are the accuracy of a bin; the hatched orange part is its gap to the mean confidence. Where orange stands
    above the blue, the model is over-confident. Accuracy and ECE are fractions in 0..1.
    """
    centre = (bins.edges[:-1] + bins.edges[1:]) / 2
    width = np.diff(bins.edges)
    some = bins.count > 0
    ax.bar(centre[some], bins.accuracy[some], width[some], color=BLUE, edgecolor="white", linewidth=0.5)
    bottom = np.minimum(bins.accuracy, bins.confidence)
    ax.bar(
        centre[some], bins.gap[some], width[some], bottom[some],
        color=ORANGE, alpha=0.65, edgecolor=ORANGE, hatch="///", linewidth=0.5,
    )  # fmt: skip
    ax.plot([0, 1], [0, 1], "--", color=GREY, linewidth=1.2)
    share = bins.count / bins.count.sum()
    ax.bar(centre, -0.18 * share / share.max(), width, color=GREY, alpha=0.55, edgecolor="white", linewidth=0.5)
    ax.axhline(0, color="black", linewidth=0.6)
    ax.set(xlim=(0, 1), ylim=(-0.2, 1), xticks=[0, 0.5, 1], yticks=[0, 0.25, 0.5, 0.75, 1], aspect="equal")
    ax.text(
        0.05, 0.95, f"Acc. {100 * accuracy:.1f}%\nECE {100 * ece:.1f}%", va="top", transform=ax.transAxes,
        bbox={"facecolor": "white", "edgecolor": GREY, "alpha": 0.9, "boxstyle": "round,pad=0.3"},
    )  # fmt: skip
    ax.set_ylabel("Accuracy" if left else None)
    ax.set_xlabel("Confidence" if low else None)


def reliability_figure(
    study: Study, dataset: str, panels: Sequence[tuple[str, str, float]], columns: int = 3
) -> Figure:
    """Reliability diagrams side by side, first seed of each run; a legend stands in the space that is left.

    Args:
        study: whose runs to show.
        dataset: one of the paper's, e.g. ``"cifar10"``.
        panels: for each panel its title, method and imbalance factor. One that has not been measured says so.
        columns: panels in a row.
    """
    rows = -(-(len(panels) + 1) // columns)
    shown = []
    with plt.rc_context(STYLE):
        size = (3.2 * columns, 3.5 * rows)
        figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
        flat = axes.ravel()
        for i, (ax, (title, method, imbalance)) in enumerate(zip(flat, panels, strict=False)):
            ax.set_title(title)
            records = study.runs(dataset, method, imbalance)
            if records:
                shown.append(records[0])
                bins = records[0].predictions().reliability()
                metrics = records[0].metrics
                first_column, last_row = i % columns == 0, i + columns >= len(panels)
                reliability_diagram(ax, bins, metrics["accuracy"], metrics["ece"], left=first_column, low=last_row)
            else:
                ax.text(0.5, 0.4, "not measured yet", ha="center", va="center", color=GREY)
                ax.set(xlim=(0, 1), ylim=(-0.2, 1), xticks=[], yticks=[], aspect="equal")
        for ax in flat[len(panels) :]:
            ax.axis("off")
        handles = [
            plt.Rectangle((0, 0), 1, 1, color=BLUE, label="accuracy of the bin"),
            plt.Rectangle((0, 0), 1, 1, facecolor=ORANGE, alpha=0.65, hatch="///", label="gap to mean confidence"),
            plt.Line2D([], [], color=GREY, linestyle="--", label="perfect calibration"),
            plt.Rectangle((0, 0), 1, 1, color=GREY, alpha=0.55, label="share of test images"),
        ]
        flat[len(panels)].legend(handles=handles, loc="center left", frameon=False)
        used = sorted({f"{record.config.dataset}, seed {record.config.seed}" for record in shown})
        figure.suptitle(f"{study.kind}: {'; '.join(used)}" if used else "nothing measured yet", fontsize=11, color=GREY)
    return figure


def missing_commands(study: Study, dataset: str, panels: Sequence[tuple[str, str, float]]) -> list[str]:
    """The commands that measure the panels that nobody has measured yet."""
    missing: dict[float, list[str]] = {}
    for _, method, imbalance in panels:
        if not study.runs(dataset, method, imbalance):
            missing.setdefault(imbalance, []).append(method)
    return [study.command(dataset, methods, imbalance) for imbalance, methods in missing.items()]


def show(figure: Figure) -> None:
    """Display a figure and return nothing, so that a notebook cell prints no object."""
    plt.show()
    plt.close(figure)
