"""Tables and figures of the large benchmarks, against cases worked by hand; runs are made up."""

import re

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest

from mislas import paper
from mislas.campaign import Job, _kind, estimate, wanted
from mislas.cells import how_to
from mislas.cli import _parser, parse_overrides
from mislas.large_tables import (
    TABLE1_GAINS,
    TABLE1_TITLES,
    adds_up,
    by_groups,
    released,
    table1,
    table1_gains,
    table1_runs,
    weight_norms,
)
from mislas.methods import configure
from mislas.plots import missing_commands, reliability_figure, weight_norm_figure
from mislas.study import SHORT, Study

R50 = {"backbone": "resnet50"}
PANELS = {"cRT": {"plain": "crt", "mixup": "crt+mixup"}, "LWS": {"plain": "lws", "mixup": "lws+mixup"}}


@pytest.fixture
def stored(made_up):
    return Study(results_root=made_up.root)


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def commands(text):
    """The commands in a text, parsed as the command line parses them."""
    found = re.findall("mislas (train .*?) --data-root DIR", text)
    return [_parser().parse_args(command.split()) for command in found]


# ---------------------------------------------------------------------------------------------------- study and costs


def test_tiny_trains_on_files_where_the_paper_does():
    study = Study("tiny")
    assert (study.datasets("places-lt"), study.datasets("cifar100")) == (("generated",), ("digits",))
    assert study.title("imagenet-lt") == "generated JPEG files"
    assert study.networks("places-lt", ["resnet50", "resnet152"]) == {"ResNet-8": {"backbone": "resnet8"}}
    assert study.neighbours("imagenet-lt") == {}
    assert study.options.workers == 0


def test_networks_are_those_asked_for_unless_the_overrides_name_one(tmp_path):
    assert Study(results_root=tmp_path).networks("imagenet-lt", ["resnet10", "resnet50"]) == {
        "ResNet-10": {"backbone": "resnet10"},
        "ResNet-50": R50,
    }
    study = Study(results_root=tmp_path, overrides={"backbone": "resnet18"})
    assert list(study.networks("imagenet-lt", ["resnet10", "resnet50"])) == ["ResNet-18"]


def test_the_neighbour_has_a_shorter_schedule_beside_the_default(stored):
    networks = stored.networks("tinyimagenet64", ["resnet10"])
    assert networks == {"ResNet-10, 30 epochs": SHORT, "ResNet-10, 200 epochs": {"backbone": "resnet10"}}
    first = wanted("tinyimagenet64")[0]
    assert first.canonical() == configure("tinyimagenet64", "ce", 100, 0, SHORT).canonical()
    mixed = stored.configs("tinyimagenet64", "lws+mixup", None, SHORT | {"stage2.mixup": 1.0})
    assert {c.id for c in mixed} <= {c.id for c in wanted("tinyimagenet64")[:11]}


def test_the_neighbour_of_the_large_benchmarks_is_named_as_one(stored):
    assert stored.neighbours("places-lt") == {
        "tinyimagenet64": "Tiny-ImageNet 64x64, long-tailed, a neighbour of Places-LT"
    }


def test_commands_for_lists_have_no_imbalance_factor_and_those_for_the_neighbour_have(stored):
    (large,) = commands(how_to(stored, "imagenet-lt", ["ce", "crt"], changes=R50))
    assert (large.dataset, large.method, large.imbalance) == ("imagenet-lt", ["ce", "crt"], [None])
    assert parse_overrides(large.set) == R50
    (near,) = commands(how_to(stored, "tinyimagenet64", ["ce"], changes=R50))
    assert near.imbalance == [100]


def test_what_it_takes_counts_stage_1_once(stored):
    passes = 115_846 * (180 + 10) / 1e6  # and one pass of Stage-2 for both heads
    assert f"# {passes:.1f} million image passes" in how_to(stored, "imagenet-lt", ["crt", "lws"])


def test_hours_are_for_the_fastest_device_that_has_rates_and_say_when_some_are_unknown():
    config, second = configure("imagenet-lt", "ce"), configure("imagenet-lt", "crt")
    planned, rates = [Job([config], 7_200_000), Job([config], 3_600_000)], {"fast": {_kind(config): 1000.0}}
    assert estimate(planned, rates | {"other": {}, "slow": {_kind(config): 10.0}}) == "about 3.0 h on fast"
    assert (
        estimate([*planned, Job([second], 1)], rates | {"small": {_kind(second): 1000.0}}) == "more than 3.0 h on fast"
    )
    assert estimate(planned, {}) == ""


# ------------------------------------------------------------------------------------------------- Tables 4, 6, 7, 8


def test_a_table_by_groups_sets_the_paper_beside_what_is_measured(made_up, stored):
    made_up("places-lt", "focal", right=(1, 0, 0, 0), ece=0.25)
    table = by_groups(stored, "places-lt", paper.TABLE8)
    assert table.frame["all", "paper"].tolist() == [f"{row[3]:.1f}" for row in paper.TABLE8.values()]
    assert table.frame.loc["Focal Loss"].tolist() == [
        "41.1",
        "25.0",
        "34.8",
        "25.0",
        "22.4",
        "25.0",
        "34.6",
        "25.0",
        "25.0",
    ]
    assert table.frame.loc["MiSLAS", ("all", "measured")] == "[a]"
    assert "Measured on places-lt" in table.caption
    (command,) = commands(table.notes[0])
    assert command.method == [method for method in paper.TABLE8 if method != "focal"]


def test_a_neighbour_has_no_number_of_the_paper(made_up, stored):
    rows = dict.fromkeys(paper.TABLE7, ())
    empty = by_groups(stored, "tinyimagenet64", rows, changes=R50)
    assert empty.frame.empty
    made_up("tinyimagenet64", "crt", R50)
    table = by_groups(stored, "tinyimagenet64", rows, ["all"], R50, "a neighbour")
    assert table.frame.columns.tolist() == [("all", "measured"), ("ECE", "measured")]
    assert table.frame.loc["cRT"].tolist() == ["75.0", "10.0"]
    assert "a neighbour" in table.caption


def test_another_backbone_of_the_neighbour_is_another_run(made_up, stored):
    made_up("tinyimagenet64", "crt", {"backbone": "resnet10"})
    assert by_groups(stored, "tinyimagenet64", {"crt": ()}, changes=R50).frame.empty


def test_rows_that_do_not_add_up_say_so(stored):
    frame = adds_up(stored, "places-lt", paper.TABLE8, "Places-LT").frame
    oltr = {"paper's words": (131 * 44.7 + 163 * 37.0 + 71 * 25.3) / 365,
            "authors' code": (131 * 44.7 + 157 * 37.0 + 77 * 25.3) / 365}  # fmt: skip
    for by, mean in oltr.items():
        assert frame.loc["OLTR", f"from its groups, {by}"] == f"{mean:.2f}"
    found = frame["adds up by"]
    assert found.to_dict() == {
        **dict.fromkeys(("Lifted Loss", "Focal Loss", "Range Loss", "cRT", "τ-normalized", "LWS"), "paper's words"),
        **dict.fromkeys(("OLTR+LFME", "cRT+mixup", "LWS+mixup", "MiSLAS"), "authors' code"),
        "FSLwF": "both",
        "OLTR": "neither",
    }
    for rows in paper.TABLE6.values():
        table = adds_up(stored, "imagenet-lt", rows, "")
        assert "adds up by" not in table.frame
        assert table.caption.endswith("Every row adds up to within 0.11; rounding explains 0.1.")


def test_tiny_shows_neither_the_paper_nor_the_authors():
    study = Study("tiny")
    for table in (adds_up(study, "places-lt", paper.TABLE8, ""), released(study, ["imagenet-lt"])):
        assert table.frame.empty
        assert "tiny" in str(table)


def test_released_numbers_are_the_authors(stored):
    frame = released(stored, ["places-lt"]).frame
    assert frame.loc["Places-LT, MiSLAS"].tolist() == ["40.4", "3.41"]


# ----------------------------------------------------------------------------------------------------------- Table 1


def test_cells_of_table_1_are_runs_with_the_alpha_of_their_dataset(stored):
    assert table1_runs(stored, "imagenet-lt", "crt", True, None) == ("mixup", {})
    assert table1_runs(stored, "imagenet-lt", "lws", True, False) == ("lws+mixup", {})
    assert table1_runs(stored, "imagenet-lt", "crt", False, True) == ("crt", {"stage2.mixup": 0.2})
    assert table1_runs(stored, "tinyimagenet64", "crt", False, True) == ("crt", {"stage2.mixup": 1.0})


def test_table_1_shows_the_papers_backbone_and_names_two_commands(made_up, stored):
    made_up("imagenet-lt", "mixup", {"backbone": "resnet101"})
    table = table1(stored, "imagenet-lt", {"backbone": "resnet101"})
    assert list(table.frame.index) == list(TABLE1_TITLES.values())
    assert table.frame["cRT", "paper"].tolist() == ["47.3", "47.7", "51.4", "51.4", "53.1", "–"]
    assert table.frame["LWS", "paper"].tolist() == ["47.3", "47.7", "52.3", "52.2", "53.5", "53.5"]
    assert table.frame.loc["Stage-1 (mixup)"].tolist() == ["47.7", "75.0", "10.0", "47.7", "75.0", "10.0"]
    plain, mixed = commands(str(table))
    assert set(plain.method) == {"ce", "crt", "lws", "crt+mixup", "lws+mixup"}
    assert parse_overrides(mixed.set) == {"backbone": "resnet101", "stage2.mixup": 0.2}


def test_what_mixup_adds_is_a_difference_of_rows(made_up, stored):
    made_up("imagenet-lt", "crt", R50, right=(1, 0, 0, 0))
    made_up("imagenet-lt", "crt+mixup", R50, right=(1, 1, 0, 0))
    frame = table1_gains(stored, "imagenet-lt", R50).frame
    assert list(frame.index) == list(TABLE1_GAINS)
    assert frame["cRT", "paper"].tolist() == ["-0.2", "+1.4", "-0.1", "–"]
    assert frame["LWS", "paper"].tolist() == ["-0.2", "+0.8", "-0.1", "-0.1"]
    assert frame["cRT", "measured"].tolist() == ["–", "+25.0 ± 25.0", "–", "–"]


def test_a_backbone_that_the_paper_lacks_has_no_column_of_the_paper(made_up, stored):
    made_up("imagenet-lt", "ce", {"backbone": "resnet18"})
    columns = table1(stored, "imagenet-lt", {"backbone": "resnet18"}).frame.columns
    assert "paper" not in {name for _, name in columns}


# ---------------------------------------------------------------------------------------------------- Figures 2, 8, 9


def test_weight_norms_are_means_by_group(made_up, stored):
    counts = np.array([200, 150, 50, 10, 5] + [30] * 195)
    norm = np.array([4.0, 2.0, 1.0, 6.0, 3.0] + [1.0] * 195)
    made_up("tinyimagenet64", "crt", R50, norm={"weight_norm": norm, "class_counts": counts})
    table = weight_norms(stored, "tinyimagenet64", ["crt", "lws"], R50)
    assert table.frame.loc["cRT"].tolist() == ["3.00", "1.00", "4.50", "1.50"]
    assert table.frame.loc["LWS"].tolist() == ["–"] * 4
    assert commands(str(table))[0].method == ["lws"]


def test_a_classifier_without_weights_of_a_class_is_said_to_have_none(made_up, stored):
    made_up("tinyimagenet64", "crt", R50, norm={"class_counts": np.arange(1, 201)})
    table = weight_norms(stored, "tinyimagenet64", ["crt"], R50)
    assert table.frame.loc["cRT"].tolist() == ["–"] * 4
    assert "No weights that belong to a class: cRT." in str(table)
    figure = weight_norm_figure(stored, "tinyimagenet64", PANELS, R50, "here")
    (text,) = [text.get_text() for ax in figure.axes[:1] for text in ax.get_legend().get_texts()][:1]
    assert text == "plain: no weights of a class"


def test_classes_of_figure_2_are_sorted_by_training_images(made_up, stored):
    counts, norm = np.array([5, 50, 500] + [1] * 197), np.array([1.0, 2.0, 3.0] + [0.5] * 197)
    made_up("tinyimagenet64", "crt", R50, norm={"weight_norm": norm, "class_counts": counts})
    figure = weight_norm_figure(stored, "tinyimagenet64", PANELS, R50, "here")
    light, dark = figure.axes[0].lines[:2]
    assert light.get_ydata()[:4].tolist() == [3, 2, 1, 0.5]
    norms, smooth = light.get_ydata(), dark.get_ydata()  # over 11 classes, at the ends over those that are there
    assert np.allclose(smooth[[0, 20, -1]], [norms[:6].mean(), norms[15:26].mean(), norms[-6:].mean()])
    legends = [text.get_text() for ax in figure.axes if ax.get_legend() for text in ax.get_legend().get_texts()]
    assert legends == ["plain", "mixup: not measured yet", "plain: not measured yet", "mixup: not measured yet"]
    assert "measured: tinyimagenet64, seed 0" in figure._suptitle.get_text()


def test_figure_2_without_runs_says_so(stored):
    assert str(weight_norm_figure(stored, "imagenet-lt", PANELS, R50)).startswith("ImageNet-LT: nothing to draw")


def test_reliability_diagrams_take_a_backbone_and_a_list_s_own_imbalance(made_up, stored):
    made_up("imagenet-lt", "ce", {"backbone": "resnet10"})
    panels = [("CE", "ce", None), ("MiSLAS", "mislas", None)]
    figure = reliability_figure(stored, "imagenet-lt", panels, changes={"backbone": "resnet10"})
    assert any("Acc. 75.0%" in text.get_text() for text in figure.axes[0].texts)
    (missing,) = missing_commands(stored, "imagenet-lt", panels, {"backbone": "resnet10"})
    assert commands(missing)[0].method == ["mislas"]
    assert len(commands(" ".join(missing_commands(stored, "imagenet-lt", panels, R50)))[0].method) == 2
