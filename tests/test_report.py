"""Claims, their effects and their intervals, on made-up runs; and what is missing."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap, norm
from torchmetrics.functional.classification import binary_calibration_error

from mislas.campaign import images_per_second, jobs, wanted
from mislas.methods import configure
from mislas.report import CLAIMS, _interval, across, claim_table, effect, gaps, norm_balance, summary, verdict
from mislas.runs import Store
from mislas.study import AS_MANY, Study, balanced

N = 2000
TARGETS = np.arange(N) % 10
SOURCE = {
    "date": "2026-01-01T00:00:00+00:00", "device": "A device", "seconds": 100.0, "class_counts": [1000],
    "data": "made up", "data_checksum": "0", "commit": "0", "torch": "0",
}  # fmt: skip


def put(store, config, accuracy, confidence, seed=0, **source):
    """A made-up run: right with probability ``accuracy``, sure by ``confidence``."""
    rng = np.random.default_rng(seed)
    right = rng.random(N) < accuracy
    sure = np.clip(rng.normal(confidence, 0.05, N), 0.1, 1)
    arrays = {
        "target": TARGETS.astype(np.uint8),
        "predicted": np.where(right, TARGETS, (TARGETS + 1) % 10).astype(np.uint8),
        "confidence": np.rint(sure * 65535).astype(np.uint16),
        "true_probability": np.rint(np.where(right, sure, 0.05) * 65535).astype(np.uint16),
        "weight_norm": np.linspace(2, 1 + 0.5 * ("mixup" in config.method), 10),
        "class_counts": np.arange(10, 0, -1),
    }
    metrics = {"accuracy": right.mean(), "ece": 0.1, "nll": 1.0}
    return store.put(config, metrics, [], arrays, SOURCE | source)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("results"))
    for i, (method, accuracy, confidence) in enumerate([("ce", 0.6, 0.9), ("mixup", 0.61, 0.8), ("mislas", 0.8, 0.75)]):
        put(store, configure("cifar10-jpeg", method), accuracy, confidence, i)
    put(store, configure("cifar10-jpeg", "ce", 1), 0.9, 0.95, 7)
    return store


def records(store, *methods):
    return [store.get(configure("cifar10-jpeg", method)) for method in methods]


# ----------------------------------------------------------------------------------------------------------- effects


def test_the_effect_on_accuracy_is_the_paired_difference_and_its_interval_scipys(store):
    ce, mislas = records(store, "ce", "mislas")
    gain = mislas.predictions().correct.astype(float) - ce.predictions().correct
    middle, low, high = effect([mislas], [ce], "accuracy")
    assert middle == pytest.approx(100 * gain.mean())
    expected = bootstrap((gain,), np.mean, method="basic", n_resamples=4000, rng=1).confidence_interval
    assert (low, high) == pytest.approx([100 * end for end in expected], abs=0.5)
    half = norm.ppf(0.975) * 100 * gain.std() / N**0.5
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)


def test_the_interval_mirrors_the_resampled_differences_at_the_measured_one():
    assert _interval(np.array([1.0, *np.linspace(0, 4, 101)]), 0.9) == pytest.approx((1, 2 - 3.8, 2 - 0.2))


def test_the_effect_on_ece_is_the_difference_of_torchmetrics_eces(store):
    eces = []
    for record in records(store, "mislas", "ce"):
        p = record.predictions()
        eces.append(binary_calibration_error(torch.from_numpy(p.confidence), torch.from_numpy(p.correct).long(), 15))
    middle, low, high = effect(*([record] for record in records(store, "mislas", "ce")), "ece")
    assert middle == pytest.approx(100 * float(eces[0] - eces[1]), abs=0.05)  # edges of bins, in float32
    assert low < middle < high


def test_over_confidence_is_confidence_minus_accuracy(store):
    ce, mislas = (record.predictions() for record in records(store, "ce", "mislas"))
    expected = (ce.confidence.mean() - ce.correct.mean()) - (mislas.confidence.mean() - mislas.correct.mean())
    middle, _, _ = effect(*([record] for record in records(store, "ce", "mislas")), "over-confidence")
    assert middle == pytest.approx(100 * expected)


def test_seeds_are_averaged_and_narrow_the_interval(tmp_path):
    store = Store(tmp_path)
    pairs = []
    for seed in range(4):
        base = configure("cifar10-jpeg", "ce", seed=seed), configure("cifar10-jpeg", "mislas", seed=seed)
        pairs.append([put(store, base[0], 0.6, 0.9, 2 * seed), put(store, base[1], 0.7, 0.9, 2 * seed + 1)])
    old, new = ([pair[i] for pair in pairs] for i in (0, 1))
    one, four = effect(new[:1], old[:1], "accuracy"), effect(new, old, "accuracy")
    singles = [effect([n], [o], "accuracy")[0] for n, o in zip(new, old, strict=True)]
    assert four[0] == pytest.approx(np.mean(singles))
    assert four[2] - four[1] < 0.7 * (one[2] - one[1])


def test_several_seeds_show_their_spread(tmp_path):
    store, gains = Store(tmp_path), []
    for seed, accuracy in enumerate((0.7, 0.75, 0.72)):
        old = put(store, configure("cifar10-jpeg", "ce", seed=seed), 0.6, 0.9, 2 * seed)
        new = put(store, configure("cifar10-jpeg", "mixup", seed=seed), accuracy, 0.9, 2 * seed + 1)
        gains.append(100 * (new.metrics["accuracy"] - old.metrics["accuracy"]))
    table = claim_table(Study("stored", results_root=tmp_path), "cifar10", CLAIMS[1])
    assert table.frame.iloc[0]["measured"] == f"{np.mean(gains):+.1f} ± {np.std(gains, ddof=1):.1f}"
    assert table.frame.iloc[0]["runs each"] == "3"


def test_a_run_against_itself_has_no_effect(store):
    (ce,) = records(store, "ce")
    for measure in ("accuracy", "ece", "over-confidence"):
        assert effect([ce], [ce], measure) == (0, 0, 0)


@pytest.mark.parametrize(
    ("expected", "low", "high", "says"),
    [
        ("more", 0.1, 2, "supports"),
        ("more", -2, -0.1, "contradicts"),
        ("more", -0.1, 2, "leaves open"),
        ("less", -2, -0.1, "supports"),
        ("less", 0.1, 2, "contradicts"),
        ("less", -1, 1, "leaves open"),
        ("same", -0.9, 0.9, "supports"),
        ("same", 0.2, 0.8, "supports"),
        ("same", 1.1, 2, "contradicts"),
        ("same", -2, -1.1, "contradicts"),
        ("same", -0.5, 1.5, "leaves open"),
        ("no more", -5, 0.9, "supports"),
        ("no more", 1.1, 2, "contradicts"),
        ("no more", -5, 1.5, "leaves open"),
    ],
)
def test_verdicts(expected, low, high, says):
    assert verdict(expected, low, high) == says


# ------------------------------------------------------------------------------------------------------------ tables


def test_a_claim_shows_effects_verdicts_and_the_commands_for_the_rest(store):
    study = Study("stored", results_root=store.root)
    table = claim_table(study, "cifar10", CLAIMS[0])
    first = table.frame.iloc[4]  # below the four with a balanced set as large as the long tail
    assert first["verdict"] == "supports"  # over-confident by 30 points against 5
    assert float(first["measured"]) == pytest.approx(25, abs=3)
    assert table.frame["verdict"].tolist() == ["not measured"] * 4 + ["supports"] * 2 + ["not measured"] * 2
    assert any("--method crt" in note for note in table.notes)
    assert table.notes[-1].startswith("2 runs; data made up")


def test_a_comparison_is_made_on_one_set_of_images_and_a_copy_is_marked(tmp_path):
    """MiSLAS is measured on both, CE on the exact images alone, LDAM on the copy alone."""
    study = Study("stored", results_root=tmp_path)
    for i, (dataset, method, right) in enumerate(
        [("cifar10", "ce", 0.6), ("cifar10", "mislas", 0.8), ("cifar10-jpeg", "mislas", 0.7)]
    ):
        put(study.store, configure(dataset, method), right, 0.9, i)
    put(study.store, configure("cifar10-jpeg", "ldam+drw"), 0.6, 0.9, 3)
    table = claim_table(study, "cifar10", CLAIMS[5])
    effects = dict(
        zip(zip(table.frame.index, table.frame["measure"], strict=True), table.frame["measured"], strict=True)
    )
    ce, ldam = (effects[f"MiSLAS against {title}", "accuracy"] for title in ("CE", "LDAM+DRW"))
    assert float(ce) == pytest.approx(20, abs=4)
    assert ldam.endswith("*")
    assert float(ldam.rstrip("*")) == pytest.approx(10, abs=4)
    assert "Measured on cifar10; where marked *, on cifar10-jpeg" in table.caption


def test_the_summary_counts_every_comparison_once(store):
    frame = summary(Study("stored", results_root=store.root), "cifar10").frame
    marks = ["✓", "✗", "?", "–"]
    assert frame[marks].sum(axis=1).tolist() == [*(len(claim.comparisons) for claim in CLAIMS), 3]
    assert frame.iloc[5][marks].tolist() == [3, 0, 1, 12]  # CE and mixup in accuracy, CE in ECE; open: balanced CE
    assert frame.iloc[6][marks].tolist() == [1, 0, 0, 2]  # norms of Stage-1's own classifier


def test_the_summary_says_between_which_ends_effects_lie(store):
    """MiSLAS is right by 0.8, CE by 0.6, mixup by 0.61; the ECEs of MiSLAS, CE and balanced CE are 0.05, 0.3, 0.05."""
    accuracy, ece = summary(Study("stored", results_root=store.root), "cifar10").frame.iloc[5][["accuracy", "ECE"]]
    assert [float(end) for end in accuracy.split(" to ")] == pytest.approx([19, 20], abs=4)
    assert [float(end) for end in ece.split(" to ")] == pytest.approx([-25, 0], abs=4)  # no claim against mixup
    once = summary(Study("stored", results_root=store.root), "cifar10").frame.iloc[0]
    assert once["accuracy"] == "–"
    assert float(once["ECE"]) == pytest.approx(25, abs=4)  # against the balanced model: one effect, not a span


def test_other_imbalance_factors_stand_beside_the_first(store, tmp_path):
    """Only what is measured at another factor; the balanced model is the same for all."""
    study = Study("stored", results_root=tmp_path)
    for imbalance, right, sure in ((100, 0.6, 0.9), (50, 0.7, 0.7), (1, 0.9, 0.95)):
        put(study.store, configure("cifar10-jpeg", "ce", imbalance), right, sure, int(imbalance))
    put(study.store, configure("cifar10-jpeg", "mixup", 100), 0.6, 0.9, 100)
    frame = across(study, "cifar10").frame
    assert list(frame.columns) == ["IF 100", "IF 50", "IF 10"]
    title = "C1, CE against CE on all images, balanced"
    assert frame.index.tolist() == [f"{title}: over-confidence", f"{title}: ECE"]
    # 30 and 0 points too sure, against 5
    assert [cell.split()[1] if " " in cell else cell for cell in frame.iloc[0]] == ["✓", "✗", "–"]
    assert [float(cell.split()[0]) for cell in frame.iloc[0][:2]] == pytest.approx([25, -5], abs=3)
    assert across(Study("stored", results_root=store.root), "cifar10").frame.empty


def test_the_same_size_is_that_of_the_long_tail():
    """12,406 images of CIFAR-10 at IF 100, 20,431 at IF 10."""
    assert balanced("cifar10", 100)[AS_MANY] == {"imbalance": 1, "n_max": 1240}
    assert balanced("cifar10", 10)[AS_MANY] == {"imbalance": 1, "n_max": 2043}


def test_a_command_for_balanced_data_names_its_size_once(tmp_path):
    notes = claim_table(Study("stored", results_root=tmp_path), "cifar10", CLAIMS[0]).notes
    train = "mislas train --dataset cifar10 --imbalance 1 --method ce"
    where = f"--data-root DIR --results-root {tmp_path}"
    assert f"Not measured yet: `{train} --set n_max=1240 {where}`" in notes
    assert f"Not measured yet: `{train} {where}`" in notes


def test_an_empty_store_leaves_every_claim_unmeasured(tmp_path):
    study = Study("stored", results_root=tmp_path)
    assert set(claim_table(study, "cifar10", CLAIMS[4]).frame["verdict"]) == {"not measured"}


def test_norms_of_rare_classes_are_held_against_those_of_frequent_ones(made_up):
    """Of five classes the rarest two and the most frequent two, in whatever order; means over seeds."""

    def norms(*values):
        return {"weight_norm": np.array(values), "class_counts": np.array([9, 500, 80, 3, 200])}

    made_up("cifar10", "crt", norm=norms(1, 3, 100, 2, 1))  # 1.5 / 2
    made_up("cifar10", "crt+mixup", norm=norms(2, 1, 100, 4, 3))  # 3 / 2
    made_up("cifar10", "crt+mixup", norm=norms(9, 1, 1, 9, 1), seed=1)  # no such run without mixup
    for seed, rare in enumerate((1, 2)):
        made_up("cifar10", "lws", norm=norms(2, 2, 0, 2, 2), seed=seed)
        made_up("cifar10", "lws+mixup", norm=norms(rare, 2, 0, rare, 2), seed=seed)  # 1 / 2 and 1
    table = norm_balance(Study(results_root=made_up.root), "cifar10", [100, 50])
    assert table.frame["IF 100"].tolist() == ["–", "0.75 → 1.50 ✓", "1.00 → 0.75 ✗"]
    assert table.frame["IF 50"].tolist() == ["–"] * 3
    assert "--imbalance 100 --method ce mixup " in table.notes[0]
    assert "--imbalance 50 --method ce mixup crt crt+mixup lws lws+mixup " in table.notes[1]


def test_every_side_of_every_claim_is_wanted_by_the_campaign():
    """Otherwise the gap page would never ask for it."""
    ids = {config.id for config in wanted("cifar10-jpeg", [100])}
    for claim in CLAIMS:
        for c in claim.comparisons:
            for side in (c.new, c.old):
                method, imbalance, changes = side.on("cifar10-jpeg")
                assert configure("cifar10-jpeg", method, imbalance, 0, changes).id in ids, c.title


def test_comparisons_ask_for_what_the_paper_says():
    asked = {claim.name: claim.comparisons for claim in CLAIMS}
    both = {"accuracy": "more", "ece": "less"}

    def stage2(side):
        return configure("cifar10", side.method, overrides=side.changes).stage2

    assert all(c.expected == "more" and c.old.data and not c.new.data for c in asked["C1"])
    expected = {key: [c.expected for c in asked["C2"] if c.measure == key] for key in both}
    assert expected == {"accuracy": ["same", "more", "more", "no more", "no more"], "ece": ["less"] * 3}
    assert all("mixup" in c.new.method and ("mixup" not in c.old.method or c.new.changes) for c in asked["C2"])
    for c in asked["C3"]:
        eps = [getattr(stage2(side), "eps_1", None) or 0 for side in (c.new, c.old)]
        assert (c.expected, eps[0] > eps[1]) == (both[c.measure], True)
    for c in asked["C4"]:
        assert (c.measure, c.expected) == ("accuracy", "more")
        assert (stage2(c.new).shift_bn, stage2(c.old).shift_bn) == (True, False)
    assert {(c.measure, c.expected) for c in asked["C5"]} == {("accuracy", "same")}
    for c in asked["C6"]:
        assert (c.new.method, c.new.changes, c.expected) == ("mislas", {}, both[c.measure])
        assert c.old.method != "mislas"


def test_gaps_name_what_is_missing_its_cost_and_the_command(store):
    table = gaps(Study(results_root=store.root), ["cifar10-jpeg"], [100])
    row = table.frame.iloc[0]
    assert row["runs missing"].split(" of ")[0] != "0"
    assert table.frame.index[0] == "cifar10-jpeg [1]"
    end = f"--data-root DIR --results-root {store.root}"
    train = "mislas train --dataset cifar10-jpeg --imbalance 1 --method ce"
    assert table.notes == [
        f"[1] `mislas campaign --dataset cifar10-jpeg --imbalance 100 {end}`",
        f"[2] `{train} --set backbone=resnet32 n_max=1240 {end}`",
    ]
    assert float(row["million image passes"]) > 0


def test_gaps_are_those_of_the_seeds_and_overrides_asked_for(tmp_path):
    study = Study(results_root=tmp_path, seeds=[1, 2], overrides={"stage2.epochs": 3})
    table = gaps(study, ["cifar10"])
    assert table.frame.iloc[-1][["IF", "runs missing"]].tolist() == ["1", "4 of 4"]
    assert table.caption == "What is not measured yet, seeds 1, 2."
    changed, end = "--set stage2.epochs=3", f"--data-root DIR --results-root {tmp_path}"
    train = "mislas train --dataset cifar10 --imbalance 1 --method ce --seed 1 2 --set backbone=resnet32"
    assert table.notes == [
        f"[1] `mislas campaign --dataset cifar10 --seed 1 2 {changed} {end}`",
        f"[2] `{train} {end}`, `{train} n_max=1240 {end}`",
    ]


def test_gaps_look_at_the_imbalance_factors_that_a_dataset_has(tmp_path):
    small, large = (gaps(Study(results_root=tmp_path), [name]) for name in ("cifar100", "tinyimagenet64"))
    assert small.frame["IF"].tolist() == ["100", "50", "10", "1"]
    assert large.frame["IF"].tolist() == ["100", "1"]
    assert [note.count("mislas train") for note in large.notes] == [0, 2]  # both balanced networks


def test_gaps_estimate_hours_from_the_rates_of_stored_runs(tmp_path):
    """Stage-1 at 1000 images in 100 s over 200 epochs, so 2000 a second: all that one seed of CE would take."""
    store = Store(tmp_path)
    put(store, configure("cifar10-jpeg", "ce"), 0.6, 0.9)
    (job,) = jobs([replace(configure("cifar10-jpeg", "ce"), seed=1)], store)
    rates = images_per_second(store)["A device"]
    assert job.seconds_at(rates) == pytest.approx(200 * 12406 / 2000)


def test_of_several_runs_of_a_kind_the_median_rate_counts(tmp_path):
    store = Store(tmp_path)
    for seed, seconds in enumerate((100, 200, 1000)):
        put(store, configure("cifar10-jpeg", "ce", seed=seed), 0.6, 0.9, seconds=seconds)
    (rate,) = images_per_second(store)["A device"].values()
    assert rate == 200 * 1000 / 200
