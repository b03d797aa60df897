"""Figures: what they say, where it can be read off their texts, lines and patches; runs are made up."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest

from mislas import paper
from mislas.evaluate import reliability
from mislas.plots import (
    OVER,
    UNDER,
    density,
    forms_figure,
    matrix_figure,
    missing_variants,
    reliability_diagram,
    reliability_figure,
    schedule_figure,
    shift_figure,
    violin_figure,
)
from mislas.study import FORMS, GRID, Study

HALVES = {"CE": "lws", "LAS": "lws+las"}
SHIFTED = ("lws+mixup", {}), ("lws+mixup+shift", {})


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def texts(figure):
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_text()]


def test_density_integrates_to_one_and_keeps_what_piles_up_at_the_ends():
    at = np.linspace(0, 1, 2001)
    values = np.random.default_rng(0).beta(0.3, 0.3, size=500)
    curve = density(values, at)
    assert ((curve[1:] + curve[:-1]) / 2 * np.diff(at)).sum() == pytest.approx(1, abs=1e-3)
    peak = density(np.ones(10), np.array([1.0]), width=0.04)  # the whole kernel folded into its left half
    assert peak == pytest.approx(2 / (0.04 * np.sqrt(2 * np.pi)), rel=1e-3)


def test_bars_are_accuracies_and_gaps_say_on_which_side_the_confidence_is():
    """Two bins by hand: in the first the network is less sure than right, in the second surer."""
    confidence, correct = np.array([0.3, 0.4, 0.7, 0.7]), np.array([1, 0, 1, 0])
    ax = plt.figure().add_subplot()
    reliability_diagram(ax, reliability(confidence, correct, 2), 0.5, 0.175)
    under, over = matplotlib.colors.to_rgba(UNDER["facecolor"]), matplotlib.colors.to_rgba(OVER["facecolor"])
    bars, above, below, share = ([patch for patch in c if patch.get_height()] for c in ax.containers)
    assert [bar.get_height() for bar in bars] == [0.5, 0.5]
    for (gap,), bottom, height, colour in ((above, 0.5, 0.2, over), (below, 0.35, 0.15, under)):
        assert (gap.get_y(), gap.get_height()) == (pytest.approx(bottom), pytest.approx(height))
        assert gap.get_facecolor() == pytest.approx(colour, abs=0.02)
    assert [bar.get_height() for bar in share] == [pytest.approx(-0.18)] * 2


def test_a_figure_without_runs_says_so_under_its_title(tmp_path):
    study = Study(results_root=tmp_path)
    for figure in (
        matrix_figure(study, "cifar100", title="here"),
        violin_figure(study, "cifar100", HALVES, title="here"),
        shift_figure(study, "cifar100", *SHIFTED, title="here"),
        reliability_figure(study, "cifar100", [("CE", "ce", 100)], title="here"),
    ):
        assert str(figure) == "here: nothing to draw, it is not measured yet."


def test_matrix_shows_measured_cells_marks_and_stars(made_up):
    made_up("cifar10", "mislas", {"eps_1": 0.0, "eps_k": 0.0}, right=(1, 0, 0, 0), ece=0.05)
    made_up("cifar10", "mislas", right=(1, 1, 1, 0), ece=0.4)
    study = Study(results_root=made_up.root)
    figure = matrix_figure(study, "cifar10")
    for ax, numbers, best in zip(figure.axes, (("25.0", "75.0"), ("5.0", "40.0")), ((3, 0), (0, 0)), strict=True):
        cells = {tuple(np.floor(text.get_position()).astype(int)): text.get_text() for text in ax.texts}
        assert len(cells) == 21
        assert (cells[0, 0], cells[3, 0]) == numbers
        assert list(cells.values()).count("–") == 19
        (star,) = [line for line in ax.lines if len(line.get_xdata())]
        assert (int(star.get_xdata()[0]), int(star.get_ydata()[0])) == best
        frames = [patch.get_xy() for patch in ax.patches if not patch.get_fill()]
        assert np.allclose(frames, [(0.07, 0.07), (3.07, 0.07)])
    assert "cifar10, seed 0" in figure.get_suptitle()
    assert missing_variants(study, "cifar10", "mislas", GRID) == [study.campaign_command("cifar10", [100])]
    assert missing_variants(study, "cifar10", "mislas", [{}]) == []
    both = Study("stored", results_root=study.store.root, seeds=[0, 1])  # the second has not been measured
    assert missing_variants(both, "cifar10", "mislas", [{}]) == [both.campaign_command("cifar10", [100])]


def test_violin_names_an_empty_group_and_a_missing_half(made_up):
    made_up("cifar10", "lws", right=[1] * 10, own=[0.75] * 8 + [0.25] * 2)
    figure = violin_figure(Study(results_root=made_up.root), "cifar10", HALVES)
    assert {"mean 0.75", "mean 0.25", "no class of this size", "CE", "LAS: not measured yet"} <= set(texts(figure))


def test_shift_figure_draws_both_runs_channel_by_channel(made_up):
    made_up("cifar10", "lws+mixup")
    made_up("cifar10", "lws+mixup+shift", norm={"bn_first_mean": np.full(16, 3.0)})
    figure = shift_figure(Study(results_root=made_up.root), "cifar10", *SHIFTED)
    before, after = (line.get_ydata() for line in figure.axes[0].lines)
    assert before.tolist() == [0.0] * 16
    assert after.tolist() == [3.0] * 16
    assert [len(ax.lines[0].get_ydata()) for ax in figure.axes] == [16, 16, 64, 64]


def test_forms_run_from_eps_k_to_eps_1_over_the_class_counts(tmp_path):
    panels = {"a": {"concave": {}}, "b": {str(p["power"]): p for p in FORMS if "power" in p}}
    figure = forms_figure(Study(results_root=tmp_path), "cifar100", panels)
    curve = figure.axes[0].lines[0]
    assert curve.get_xdata()[[0, -1]].tolist() == [5, 500]
    assert curve.get_ydata()[[0, -1]] == pytest.approx([0.1, 0.4])
    assert len(figure.axes[1].lines) == 5  # four powers and the marks of the classes


def test_schedules_are_those_of_the_training_loop(tmp_path):
    figure = schedule_figure(Study(results_root=tmp_path), list(paper.TABLE5)[:2])
    (first,), (second,) = (ax.lines for ax in figure.axes)  # both CIFARs share a line
    rates = first.get_ydata()
    assert len(rates) == 200
    assert rates[[0, 4, 159, 160, 179, 180]] == pytest.approx([0.02, 0.1, 0.1, 0.01, 0.01, 0.001])
    assert second.get_ydata()[[0, 5]] == pytest.approx([0.1, 0.05])


def test_no_text_is_smaller_than_ten_points(made_up):
    right = [1, 0] * 10
    for method, changes in (("lws", {}), ("lws+las", {}), SHIFTED[0], SHIFTED[1], ("mislas", {})):
        made_up("cifar10", method, changes, right=right)
    study = Study(results_root=made_up.root)
    for figure in (
        matrix_figure(study, "cifar10"),
        violin_figure(study, "cifar10", HALVES),
        shift_figure(study, "cifar10", *SHIFTED),
        forms_figure(study, "cifar10", {"a": {"concave": {}}}),
        schedule_figure(study, ["cifar10"]),
    ):
        figure.draw_without_rendering()
        sizes = [t.get_fontsize() for t in figure.findobj(matplotlib.text.Text) if t.get_text() and t.get_visible()]
        assert min(sizes) >= 10
