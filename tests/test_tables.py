"""Tables against cases worked by hand; runs are made up."""

import json
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mislas.errors import MislasError
from mislas.methods import METHODS, configure
from mislas.study import ALL_OF_THEIRS, LEARNED, Study, authors_variants
from mislas.tables import (
    BY_GROUP,
    HELD_OUT,
    beside_authors_code,
    by_group,
    chosen,
    compare,
    copies,
    distance,
    gaps_by_group,
    learned_on,
    measures,
    over_confidence,
    redrawn,
    selection,
    shift_remarks,
    shift_sizes,
    shifts,
    table2,
    table2_gains,
    table3,
    table5,
    true_probabilities,
    two_ways,
    variants,
)

STEPS = {"cross-entropy": {"eps_1": 0.0, "eps_k": 0.0}, "default": {}}


def test_table_2_sets_the_paper_beside_cifar_100_and_nobody_else(made_up):
    made_up("cifar10-jpeg", "lws")
    study = Study(results_root=made_up.root)
    table = table2(study, "cifar100", [100])
    assert table.frame.to_dict("list") == {("IF 100", "paper"): ["41.2", "44.2", "45.3", "47.0"]}
    assert table.caption == "Top-1 accuracy (%), CIFAR-100-LT: paper. Nothing of it is measured yet."
    neighbour = table2(study, "cifar10", [100], title="a neighbour")
    assert {name for _, name in neighbour.frame.columns} == {"measured", "ECE"}
    assert neighbour.frame["IF 100", "measured"].tolist()[0] == "75.0"
    assert "a neighbour" in neighbour.caption


def test_beside_the_paper_the_exact_images_come_first_and_others_are_marked(made_up):
    made_up("cifar10-jpeg", "ce")
    made_up("cifar10-jpeg", "mislas", right=(1, 0))
    study = Study(results_root=made_up.root)
    alone = table3(study, "cifar10", [100], ["ce", "mislas"])
    assert alone.frame["IF 100", "measured"].tolist() == ["75.0", "50.0"]
    assert alone.caption.endswith("Measured on cifar10-jpeg.")
    made_up("cifar10", "mislas", right=(1, 1, 1, 1))
    mixed = table3(study, "cifar10", [100], ["ce", "mislas"])
    assert mixed.frame["IF 100", "measured"].tolist() == ["75.0*", "100.0"]
    assert [cell.count("*") for cell in mixed.frame["IF 100", "ECE"]] == [1, 0]
    assert "Measured on cifar10; where marked *, on cifar10-jpeg" in mixed.caption
    command = "mislas train --dataset cifar10 --imbalance 100 --method ce --data-root DIR"
    assert f"[*] On exact images: `{command} --results-root {made_up.root}`" in mixed.notes
    far = distance(study, "cifar10", [100])
    assert far.frame["IF 100"].to_dict() == {"MiSLAS": "+17.9"}  # no distance of a copy's


def test_a_copy_is_held_against_the_exact_images(made_up):
    made_up("cifar10", "ce", right=(1, 1, 1, 1), ece=0.1)
    made_up("cifar10-jpeg", "ce", right=(1, 1, 0, 0), ece=0.25)
    made_up("cifar10-jpeg", "mixup")
    table = copies(Study(results_root=made_up.root), "cifar10", ["ce", "mixup"])
    assert table.frame.loc["CE"].tolist() == ["100.0", "10.0", "50.0", "25.0", "-50.0", "+15.0"]
    assert list(table.frame.index) == ["CE"]
    assert table.notes[0] == "Not measured on both yet: mixup."


def test_a_table_of_which_nothing_is_known_names_the_command_alone(tmp_path):
    table = table2(Study(results_root=tmp_path), "tinyimagenet32", [100])
    assert table.frame.empty
    assert "<table" not in table._repr_html_()
    assert "|" not in str(table)
    assert "--dataset tinyimagenet32" in str(table)


def test_gains_of_table_2_are_differences_of_its_rows(made_up):
    made_up("cifar100", "lws", right=(1, 0, 0, 0), ece=0.3)
    made_up("cifar100", "lws+mixup", right=(1, 1, 0, 0), ece=0.1)
    frame = table2_gains(Study(results_root=made_up.root), "cifar100", [100]).frame
    assert frame["IF 100", "paper"].tolist() == ["+3.0", "+1.1", "+1.7"]
    assert frame["IF 100", "measured"].tolist() == ["+25.0 ± 25.0", "–", "–"]
    assert frame["IF 100", "ECE"].tolist() == ["-20.0", "–", "–"]


def test_variants_are_held_against_the_first_row(made_up):
    made_up("cifar10", "mislas", STEPS["cross-entropy"], right=(1, 0, 0, 0), ece=0.2)
    made_up("cifar10", "mislas", right=(1, 1, 0, 0), ece=0.1)
    changes = STEPS | {"linear": {"form": "linear"}}
    table = variants(Study(results_root=made_up.root), "cifar10", "mislas", changes, published={"default": 3.3})
    assert table.frame.loc["cross-entropy"].tolist() == ["–", "25.0", "20.0", "1.000", "–"]
    assert table.frame.loc["default"].tolist() == ["+3.3", "50.0", "10.0", "1.000", "+25.0 ± 25.0"]
    assert table.frame.loc["linear"].tolist() == ["–", "not measured", "–", "–", "–"]
    assert table.frame.columns[0] == ("paper", "difference")
    command = "mislas train --dataset cifar10 --imbalance 100 --method mislas --set form=linear --data-root DIR"
    assert table.notes[0] == f"Not measured yet: `{command} --results-root {made_up.root}`"
    many = (
        changes | {form: {"form": form} for form in ("convex", "a", "b")} | {"a": {"eps_1": 0.5}, "b": {"eps_1": 0.4}}
    )
    several = variants(Study(results_root=made_up.root), "cifar10", "mislas", many)  # a campaign trains them together
    command = f"mislas campaign --dataset cifar10 --imbalance 100 --data-root DIR --results-root {made_up.root}"
    assert several.notes[0] == f"Not measured yet: `{command}`"


def test_variants_of_the_tiny_profile_show_no_paper(made_up, monkeypatch):
    record, study = made_up("digits", "mislas"), Study("tiny")
    monkeypatch.setattr(study, "sweep", lambda *_: [[record], [record]])
    table = variants(study, "cifar10", "mislas", STEPS, published={"default": 3.3})
    assert {head for head, _ in table.frame.columns} == {"tiny"}
    assert "3.3" not in str(table)


def test_probabilities_by_group_know_an_empty_group(made_up):
    # CIFAR-10-LT, IF 100: classes 0 to 7 are many, 8 and 9 medium, none few
    own = [0.95] * 4 + [0.45] * 4 + [0.25, 0.75]
    record = made_up("cifar10", "lws", right=[1] * 10, own=own)
    parts = by_group(record)
    assert [None if p is None else len(p) for p in parts.values()] == [8, 2, None]
    table = true_probabilities(Study(results_root=made_up.root), "cifar10", {"CE": "lws", "LAS": "lws+las"})
    assert table.frame["CE", "mean"].tolist() == ["0.700", "0.500", "–"]
    assert table.frame["CE", "> 0.9"].tolist() == ["50.0", "0.0", "–"]
    assert table.frame["LAS", "mean"].tolist() == ["–"] * 3
    assert "--method lws+las" in table.notes[0]


BEFORE = {"bn_first_mean": [0.0, 0], "bn_first_var": [4.0, 1], "bn_last_mean": [1.0, 1], "bn_last_var": [1.0, 1]}
AFTER = {"bn_first_mean": [2.0, -1], "bn_first_var": [6.0, 4], "bn_last_mean": [1.5, 1], "bn_last_var": [1.0, 0.9]}


def arrays(values):
    return {key: np.array(value, float) for key, value in values.items()}


def test_sizes_of_a_shift_by_hand():
    sizes = shift_sizes(arrays(BEFORE), arrays(AFTER))
    assert sizes["first"] == pytest.approx(
        {"mean": 1.5, "variance": 2.5, "mean_relative": (2 / 2 + 1) / 2, "variance_relative": (2 / 4 + 3) / 2}
    )
    assert sizes["last"] == pytest.approx(
        {"mean": 0.25, "variance": 0.05, "mean_relative": 0.25, "variance_relative": 0.05}
    )


def test_remarks_on_figure_6_follow_from_the_sizes(made_up):
    made_up("cifar10", "lws", norm=arrays(BEFORE))
    made_up("cifar10", "lws+shift", norm=arrays(AFTER))
    study = Study(results_root=made_up.root)
    pairs = {"a": (("lws", {}), ("lws+shift", {})), "b": (("lws+mixup", {}), ("lws+mixup+shift", {}))}
    remarks = shift_remarks(study, "cifar10", pairs).frame
    assert remarks["a", "absolute"].tolist() == ["yes", "no", "yes", "yes"]
    assert remarks["b", "relative"].tolist() == ["–"] * 4
    table = shifts(study, "cifar10", pairs)
    assert table.frame.loc["a: first BN"].tolist() == ["1.500", "2.500", "1.000", "1.750"]
    assert table.frame.loc["b: last BN"].tolist() == ["–"] * 4
    assert table.notes[0].count(" --method lws+mixup lws+mixup+shift ") == 1


def test_a_shift_compares_the_same_data_only(made_up):
    made_up("cifar10", "lws")
    made_up("cifar10-jpeg", "lws+shift")
    table = shifts(Study(results_root=made_up.root), "cifar10", {"a": (("lws", {}), ("lws+shift", {}))})
    assert table.frame.empty


def test_table_5_of_the_defaults_is_the_papers_on_cifar(tmp_path):
    frame = table5(Study(results_root=tmp_path)).frame
    for name in ("LT CIFAR-10", "LT CIFAR-100"):
        assert frame.loc[f"{name}: paper"].tolist() == frame.loc[f"{name}: code"].tolist()
    assert frame.loc["LT CIFAR-10: code"].tolist() == [
        *("0.1", "128", "0.0002", "200", "multistep", "10", "cosine", "0.3", "0", "0.5"),
    ]


def test_table_5_says_what_differs(tmp_path):
    table = table5(Study(results_root=tmp_path, overrides={"lr": 0.05, "eps_1": 0.4}))
    assert table.frame.loc["LT CIFAR-10: code", ("Common", "LR")] == "0.05 / 0.1, differs"
    assert table.frame.loc["LT CIFAR-10: code", ("Stage-2", "ε₁")] == "0.4, differs"
    assert table.notes[0] == "Cells that agree: 44; that differ: 6."  # all five rates, and CIFAR-10's eps_1


def test_table_5_of_the_tiny_profile_has_no_row_of_the_paper():
    assert list(table5(Study("tiny")).frame.index) == ["digits: code"]


def test_selection_is_the_best_epoch_that_was_looked_at_minus_the_last(made_up):
    looks = [(40, 0.5), (80, 0.8), (120, None), (200, 0.75)]
    history = [{"epoch": epoch} | ({} if found is None else {"test_accuracy": found}) for epoch, found in looks]
    made_up("cifar10-jpeg", "ce", history=history)
    frame = selection(Study(results_root=made_up.root), "cifar10", ["ce", "mixup"]).frame
    assert frame.loc["CE"].tolist() == ["75.0", "80.0", "+5.0", "3"]
    assert frame.loc["mixup"].tolist() == ["–"] * 4


def test_measures_leave_out_a_group_without_classes(made_up):
    record, other = made_up("cifar10-jpeg", "ce"), made_up("cifar10-jpeg", "mixup")
    record.metrics.update({key: 0.25 for key in BY_GROUP if "few" not in key}, accuracy_few=None, ece_few=None)
    other.metrics.update(record.metrics)
    study = Study(results_root=made_up.root)
    known = {"ce": [record], "mixup": [other]}
    study.side_by_side = lambda dataset, asked: [known.get(method, []) for method, *_ in asked]
    frame = measures(study, "cifar10", ["ce", "mixup", "crt"], columns=BY_GROUP).frame
    accuracies = ["accuracy", "accuracy, many", "accuracy, medium"]
    assert list(frame.columns) == [*accuracies, "ECE", "ECE, many", "ECE, medium"]
    assert frame.loc["CE"].tolist() == ["25.0"] * 6
    assert frame.loc["cRT"].tolist() == ["–"] * 6
    other.metrics["accuracy_few"] = 0.5
    frame = measures(study, "cifar10", ["ce", "mixup"], columns=BY_GROUP).frame
    assert frame["accuracy, few"].tolist() == ["–", "50.0"]


def test_rows_of_measures_may_have_changes_and_titles_of_their_own(made_up):
    made_up("cifar10", "mislas", right=(1, 0))
    made_up("cifar10", "mislas", right=(1, 1), changes={"shift_bn": False})
    rows = {"shifted": ("mislas", {}), "left alone": ("mislas", {"shift_bn": False})}
    rows["smoother"] = ("mislas", {"eps_1": 0.5})
    table = measures(Study(results_root=made_up.root), "cifar10", rows, columns={"accuracy": ("accuracy", 100, 1)})
    assert table.frame["accuracy"].to_dict() == {"shifted": "50.0", "left alone": "100.0", "smoother": "–"}
    assert "--set eps_1=0.5" in table.notes[0]


def test_over_confidence_by_true_and_by_predicted_class(made_up):
    """Eight images of classes 0, 0, 0, 0, 8, 8, 8, 8 by hand: class 0 is the largest and one of many, 8 is medium."""
    arrays = {
        "target": np.repeat([0, 8], 4),
        "predicted": np.array([0, 0, 0, 0, 0, 0, 8, 8]),
        "confidence": np.rint(65535 * np.array([1, 1, 0.8, 0.8, 0.9, 0.9, 0.5, 0.5])),
    }
    made_up("cifar10", "ce", imbalance=100, right=[0] * 8, norm=arrays)
    study = Study(results_root=made_up.root)
    frame = over_confidence(study, "cifar10", ["ce", "mixup"]).frame
    assert frame.loc["CE"].to_dict() == {
        ("by true class", "largest"): "-10.0",  # 3.6 / 4 - 1
        ("by true class", "many"): "-10.0",
        ("by true class", "medium"): "20.0",  # 2.8 / 4 - 2 / 4
        ("by predicted class", "largest"): "23.3",  # 5.4 / 6 - 4 / 6
        ("by predicted class", "many"): "23.3",
        ("by predicted class", "medium"): "-50.0",  # 0.5 - 1
    }
    assert set(frame.loc["mixup"]) == {"–"}
    (record,) = study.runs("cifar10", "ce", 100, {})
    assert gaps_by_group(record)["by predicted class", "few"] is None


def test_redrawn_has_every_draw_in_order_with_the_seeds_own_first(made_up):
    found = {}
    for draw, right in ((0, (1, 0)), (1, (1, 1)), (2, (0, 0))):
        changes = {"stage2.draw": draw} if draw else {}
        record = made_up("cifar10", "mislas", right=right, changes=changes)
        record.metrics.update(mce=0.1 * draw, accuracy_medium=None)
        found["mislas", str(changes)] = [record]
    study = Study(results_root=made_up.root)
    study.side_by_side = lambda dataset, asked: [found.get((m, str(changes)), []) for m, _, changes in asked]
    table = redrawn(study, "cifar10", 50)
    assert table.frame.columns.tolist() == ["accuracy", "ECE", "MCE", "NLL"]
    assert table.frame.loc["MiSLAS"].tolist() == [
        *("50.0 / 100.0 / 0.0", "10.0 / 10.0 / 10.0", "0.0 / 10.0 / 20.0", "1.000 / 1.000 / 1.000")
    ]
    assert set(table.frame.loc["cRT+mixup"]) == {"– / – / –"}
    assert "IF 50" in table.caption
    assert "campaign" in table.notes[0]


def test_learned_on_has_a_cell_for_each_run_and_names_what_is_missing(made_up):
    records = {"lws": made_up("cifar10-jpeg", "lws"), "ncm": made_up("cifar10-jpeg", "ncm")}
    records["lws"].metrics.update(accuracy=0.5, accuracy_medium=0.25, accuracy_few=None)
    records["ncm"].metrics.update(accuracy=0.75, accuracy_medium=None, accuracy_few=None)
    study = Study(results_root=made_up.root)
    study.side_by_side = lambda dataset, asked: [[records[m]] if m in records else [] for m, *_ in asked]
    rows = {"scales": [("lws", {}), ("lws+shift", {})], "means": [("ncm", {}), ("ncm+shift", {})]}
    table = learned_on(study, "cifar10", rows, ("old", "new"))
    assert table.frame.columns.tolist() == [(c, g) for c in ("old", "new") for g in ("all", "medium", "ECE")]
    assert table.frame.loc["scales"].tolist() == ["50.0", "25.0", "10.0"] + ["not measured"] * 3
    assert table.frame.loc["means"].tolist() == ["75.0", "–", "10.0"] + ["not measured"] * 3
    assert "--method lws+shift ncm+shift" in table.notes[0]


@pytest.mark.parametrize("columns", list(LEARNED.values()), ids=list(LEARNED))
def test_runs_of_a_row_differ_in_batch_norm_alone(columns):
    for row in columns.values():
        configs = [configure("cifar10", method, overrides=changes) for method, changes in row]
        cleared = []
        for config in configs:
            off = {"shift_epochs": None, "shift_sampler": None}
            if not hasattr(config.stage2, "rule"):
                off["shift_bn"] = False
            cleared.append(replace(config, stage2=replace(config.stage2, **off), method=""))
        assert len({config.id for config in configs}) == len(configs)
        assert len({config.id for config in cleared}) == 1


def test_two_ways_show_what_their_files_have_and_leave_out_single_runs(tmp_path):
    setting = {
        "dataset": "digits", "data_checksum": "abc", "imbalance": 100.0, "method": "ce",
        "epochs": 20, "device": "A device", "compile": False,
    }  # fmt: skip
    way = {"runs": 2, "mean": 70.04, "deviation": 1.26}
    found = {"usual": way, "ours": way | {"mean": 71.0}, "difference": 0.96, "interval": [-2.0, 3.92]}
    runs = [{"seed": seed, "commit": "0123456789abcdef", "date": "2026-01-02T03:04:05"} for seed in (1, 0)]
    content = {"setting": setting, "found": found, "runs": runs}
    (tmp_path / "accuracy-a.json").write_text(json.dumps(content))
    (tmp_path / "accuracy-b.json").write_text(json.dumps(content | {"found": found | {"interval": None}}))
    table = two_ways(tmp_path)
    assert table.frame.index.tolist() == ["digits IF=100, ce, 20 epochs"]
    assert table.frame.iloc[0].tolist() == ["70.0 ± 1.3 (n=2)", "71.0 ± 1.3 (n=2)", "+1.0", "-2.0 to +3.9"]
    (note,) = table.notes
    assert "data abc; seeds 0, 1; commit 0123456789; A device; 2026-01-02; last epoch." in note
    assert two_ways(tmp_path / "empty").caption == "Not measured yet."


def test_the_readme_quotes_the_store():
    """``make readme`` would change nothing."""
    root = Path(__file__).parents[1]
    text = (root / "README.md").read_text()
    assert runpy.run_path(str(root / "book" / "readme.py"))["rewrite"](text) == text


def test_the_authors_published_numbers_stand_beside_ours(made_up):
    made_up("cifar10", "mixup", imbalance=50)
    changes = authors_variants("cifar10", 50)[ALL_OF_THEIRS]
    made_up("cifar10-jpeg", "mislas", imbalance=50, changes=changes, ece=0.034)
    table = beside_authors_code(Study(results_root=made_up.root), "cifar10", [50])
    assert table.frame["authors' code", "accuracy"].tolist() == ["78.1", "85.7", "85.7"]
    assert table.frame["authors' code", "ECE"].tolist() == ["2.49", "2.01", "2.01"]
    first, second, third = table.frame["measured", "accuracy"]
    assert (first[-1] != "*", second, third[-1]) == (True, "–", "*")
    assert table.frame["measured", "ECE"].tolist() == ["10.0", "–", "3.4*"]
    assert "mislas train --dataset cifar10 --imbalance 50 --method mislas --data-root DIR" in table.notes[0]


def test_an_imbalance_factor_that_the_paper_lacks_stands_alone(made_up):
    made_up("cifar10", "ce", imbalance=20)
    table = table3(Study(results_root=made_up.root), "cifar10", [20], ["ce"])
    assert [column for _, column in table.frame.columns] == ["measured", "ECE"]
    with pytest.raises(MislasError, match="unknown dataset of Table 3 'tinyimagenet32'"):
        distance(Study(results_root=made_up.root), "tinyimagenet32")


def test_methods_of_one_title_are_told_apart(made_up, monkeypatch):
    stored = Study(results_root=made_up.root)
    monkeypatch.setitem(METHODS, "ce-b", replace(METHODS["ce"], stage1={"beta": 0.99}))
    made_up("cifar10", "ce")
    frame = measures(stored, "cifar10", ["ce", "ce-b", "mixup"], columns={"accuracy": ("accuracy", 100, 1)}).frame
    assert frame.index.tolist() == ["CE (ce)", "CE (ce-b)", "mixup"]
    assert frame.loc["CE (ce)", "accuracy"] == "75.0"


def test_what_is_chosen_by_held_out_images_and_by_the_test_set(made_up):
    """Three settings; each of the three measures has its best at another."""
    study = Study(results_root=made_up.root)
    settings = [{"stage1.holdout": 0.1, "eps_1": eps} for eps in (0.1, 0.2, 0.3)]
    measured = [(0.5, 1.0, (0, 0, 0, 1)), (0.25, 0.5, (1, 1, 0, 0)), (0.125, 2.0, (1, 1, 1, 0))]
    for changes, (accuracy, nll, right) in zip(settings, measured, strict=True):
        table = chosen(study, "cifar10", "mislas", settings, 50)
        assert set(table.frame.values.flat) <= {"–"}
        assert table.notes[0].startswith("Not measured yet")
        record = made_up("cifar10", "mislas", right=right, changes=changes, imbalance=50)
        content = json.loads(record.path.read_text())
        content["metrics"] |= {"held_out_accuracy": accuracy, "held_out_nll": nll}
        record.path.write_text(json.dumps(content))
    frame = chosen(study, "cifar10", "mislas", settings, 50).frame
    assert frame.values.tolist() == [
        ["eps_1 = 0.1", "50.0", "1.000", "25.0", "10.0", "1.000"],
        ["eps_1 = 0.2", "25.0", "0.500", "50.0", "10.0", "1.000"],
        ["eps_1 = 0.3", "12.5", "2.000", "75.0", "10.0", "1.000"],
    ]


def test_a_change_without_meaning_is_told_from_one_without_effect(made_up):
    made_up("cifar10", "mislas", right=(1, 0, 1, 0))
    made_up("cifar10", "mislas", right=(1, 0, 1, 0), changes={"eps_1": 0.2})
    rows = {"plain": {}, "gamma": {"gamma": 2.0}, "eps": {"eps_1": 0.2}}
    frame = variants(Study(results_root=made_up.root), "cifar10", "mislas", rows).frame
    assert frame["measured", "difference"].tolist() == ["–", "the same run", "+0.0 ± 0.0"]


def test_a_single_method_and_imbalance_factor_need_no_list(made_up):
    made_up("cifar10", "ce", imbalance=50)
    study = Study(results_root=made_up.root)
    assert str(compare(study, "cifar10", "ce", 50)) == str(compare(study, "cifar10", ["ce"], [50]))
    assert str(measures(study, "cifar10", "ce", 50)) == str(measures(study, "cifar10", ["ce"], 50))
    made_up("places-lt", "ce")
    frame = compare(study, "places-lt", "ce", None).frame
    assert frame.columns.tolist() == [("top-1", "measured"), ("top-1", "ECE")]
    assert frame.iloc[0, 0] == "75.0"


def test_what_is_held_out_is_a_column_where_it_is_measured(made_up):
    made_up("cifar10", "mixup")
    record = made_up("cifar10", "ce")
    content = json.loads(record.path.read_text())
    content["metrics"] |= {"held_out_accuracy": 0.5, "held_out_nll": 1.25}
    record.path.write_text(json.dumps(content))
    frame = measures(Study(results_root=made_up.root), "cifar10", ["ce", "mixup"], columns=HELD_OUT).frame
    assert frame.values.tolist() == [["50.0", "1.250"], ["–", "–"]]


def test_a_measure_that_is_no_number_is_refused(made_up):
    made_up("cifar10", "ce")
    columns = {"all": ("all", 1, 1, lambda predictions: predictions.correct)}
    with pytest.raises(MislasError, match="measure 'all' must be a number, or None for no value, got array"):
        measures(Study(results_root=made_up.root), "cifar10", ["ce"], columns=columns)


def test_a_measure_of_ones_own_is_a_column(made_up):
    stored = Study(results_root=made_up.root)
    made_up("cifar10", "ce")
    predictions = stored.runs("cifar10", "ce", 100)[0].predictions()
    columns = {"accuracy": ("accuracy", 100, 1), "wrong": ("wrong", 100, 2, lambda p: float((~p.correct).mean()))}
    frame = measures(stored, "cifar10", ["ce"], columns=columns).frame
    assert frame.loc["CE"].tolist() == ["75.0", f"{100 * (predictions.predicted != predictions.target).mean():.2f}"]
    with pytest.raises(MislasError, match="unknown measure 'aurc'"):
        measures(stored, "cifar10", ["ce"], columns={"aurc": ("AURC", 1, 3)})
