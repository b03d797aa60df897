from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss
from torch import nn
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

from mislas import evaluate
from mislas.augment import Images
from mislas.errors import MislasError
from mislas.evaluate import Predictions, auroc, chance_ece, predict, reliability, summarise, surest_accuracy

GROUPS = {"many": [0, 1], "medium": [2, 4], "few": [3]}
SEEDS = [0, 1, 2]


def sample(seed, n=1000, classes=5):
    """Logits of an over-confident classifier that is right more often than not, and the labels."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, (n,), generator=generator)
    logits = 2 * torch.randn(n, classes, dtype=torch.float64, generator=generator)
    logits[torch.arange(n), targets] += 2
    return logits, targets


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("measure", "norm"), [("ece", "l1"), ("mce", "max")])
def test_calibration_error_is_that_of_torchmetrics(measure, norm, seed):
    logits, targets = sample(seed)
    expected = multiclass_calibration_error(logits.softmax(1), targets, num_classes=5, n_bins=15, norm=norm).item()
    assert summarise(logits, targets, GROUPS)[0][measure] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("n_bins", [1, 2, 10, 100])
def test_ece_is_that_of_torchmetrics_with_any_number_of_bins(n_bins):
    logits, targets = sample(3)
    expected = multiclass_calibration_error(logits.softmax(1), targets, num_classes=5, n_bins=n_bins).item()
    assert summarise(logits, targets, {})[1].reliability(n_bins).ece == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_classwise_ece_is_the_mean_of_torchmetrics_binary_ones(seed):
    logits, targets = sample(seed)
    columns = enumerate(logits.softmax(1).T.contiguous())
    expected = np.mean([binary_calibration_error(p_k, (targets == k).long(), n_bins=15).item() for k, p_k in columns])
    assert summarise(logits, targets, GROUPS)[0]["classwise_ece"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_nll_is_scikit_learns_and_brier_its_definition(seed):
    logits, targets = sample(seed)
    p = logits.softmax(1).numpy()
    measures, _ = summarise(logits, targets, GROUPS)
    assert measures["nll"] == pytest.approx(log_loss(targets, p, labels=range(5)), abs=1e-9)
    assert measures["brier"] == pytest.approx(((p - np.eye(5)[targets]) ** 2).sum(axis=1).mean(), abs=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_accuracy_of_all_and_of_groups_is_scikit_learns(seed):
    logits, targets = sample(seed)
    measures, _ = summarise(logits, targets, GROUPS)
    predicted = logits.argmax(1).numpy()
    assert measures["accuracy"] == pytest.approx(accuracy_score(targets, predicted))
    for name, classes in GROUPS.items():
        inside = np.isin(targets, classes)
        assert measures[f"accuracy_{name}"] == pytest.approx(accuracy_score(targets[inside], predicted[inside]))


def test_ece_of_a_group_is_that_of_its_images_alone():
    logits, targets = sample(0)
    inside = torch.from_numpy(np.isin(targets, GROUPS["medium"]))
    expected = multiclass_calibration_error(logits.softmax(1)[inside], targets[inside], num_classes=5).item()
    assert summarise(logits, targets, GROUPS)[0]["ece_medium"] == pytest.approx(expected, abs=1e-6)


def test_predictions_are_what_the_softmax_says():
    logits, targets = sample(0)
    _, predictions = summarise(logits, targets, GROUPS)
    p = logits.softmax(1).numpy()
    assert np.array_equal(predictions.target, targets)
    assert np.array_equal(predictions.predicted, logits.argmax(1))
    np.testing.assert_allclose(predictions.confidence, p.max(axis=1))
    np.testing.assert_allclose(predictions.true_probability, [row[y] for row, y in zip(p, targets, strict=True)])


def test_two_bins_by_hand():
    bins = reliability(np.array([0.4, 0.3, 0.8, 0.6]), np.array([True, False, True, False]), n_bins=2)
    assert bins.count.tolist() == [2, 2]
    np.testing.assert_allclose(bins.accuracy, [0.5, 0.5])
    np.testing.assert_allclose(bins.confidence, [0.35, 0.7])
    assert bins.ece == pytest.approx(0.5 * 0.15 + 0.5 * 0.2)
    assert bins.mce == pytest.approx(0.2)


def test_a_bin_holds_its_upper_edge_and_the_first_one_0():
    bins = reliability(np.array([0.0, 0.25, 0.5, 0.75, 1.0]), np.ones(5), n_bins=4)
    assert bins.count.tolist() == [2, 1, 1, 1]


@pytest.mark.parametrize(("confidence", "correct", "ece"), [(0.0, 0, 0.0), (0.0, 1, 1.0), (1.0, 1, 0.0), (1.0, 0, 1.0)])
def test_confidence_0_and_1_count(confidence, correct, ece):
    bins = reliability(np.array([confidence]), np.array([correct]))
    assert bins.count.sum() == 1
    assert bins.ece == bins.mce == ece


def test_empty_bins_are_nan_and_have_no_gap():
    bins = reliability(np.array([0.9]), np.array([1]), n_bins=2)
    assert np.isnan(bins.accuracy[0])
    assert np.isnan(bins.confidence[0])
    np.testing.assert_allclose(bins.gap, [0, 0.1])


def test_adaptive_bins_hold_equal_counts():
    confidence = np.random.default_rng(0).beta(5, 1, size=150)
    bins = reliability(confidence, confidence > 0.7, adaptive=True)
    assert bins.count.tolist() == [10] * 15


def test_adaptive_ece_is_that_of_sorted_tenths():
    rng = np.random.default_rng(0)
    confidence, correct = rng.random(100), rng.integers(2, size=100)
    parts = np.split(np.argsort(confidence), 10)
    expected = np.mean([abs(correct[part].mean() - confidence[part].mean()) for part in parts])
    assert reliability(confidence, correct, 10, adaptive=True).ece == pytest.approx(expected)


def test_a_perfect_predictor_has_no_error():
    targets = torch.arange(5).repeat(4)
    measures, _ = summarise(100 * torch.eye(5)[targets], targets, GROUPS)
    assert measures["accuracy"] == measures["accuracy_few"] == 1
    for name in ("ece", "mce", "adaptive_ece", "classwise_ece", "nll", "brier", "ece_many"):
        assert measures[name] == pytest.approx(0, abs=1e-12)


def test_a_predictor_that_knows_its_chances_has_no_error():
    logits = torch.tensor([0.6, 0.3, 0.1]).log().repeat(10, 1)
    targets = torch.tensor([0] * 6 + [1] * 3 + [2])
    measures, _ = summarise(logits, targets, {})
    assert measures["accuracy"] == 0.6
    assert measures["confidence"] == pytest.approx(0.6)
    assert measures["ece"] == pytest.approx(0, abs=1e-6)
    assert measures["classwise_ece"] == pytest.approx(0, abs=1e-6)


def test_measures_do_not_depend_on_how_much_is_held_at_once(monkeypatch):
    logits, targets = sample(0)
    whole, predictions = summarise(logits, targets, GROUPS)
    monkeypatch.setattr(evaluate, "CELLS", 2100)  # 420 images or 2 classes at a time
    parts, same = summarise(logits, targets, GROUPS)
    assert parts == pytest.approx(whole, abs=1e-12)
    for name in ("predicted", "confidence", "true_probability"):
        np.testing.assert_allclose(getattr(same, name), getattr(predictions, name), rtol=1e-12)


def test_arrays_and_groups_left_out_are_measured_alike():
    logits, targets = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 4
    whole, _ = summarise(logits, targets, {"many": [0, 1]})
    plain, _ = summarise(logits.numpy(), targets.numpy())
    assert plain == {name: value for name, value in whole.items() if not name.endswith("_many")}


def test_an_empty_group_has_no_measures():
    logits, targets = sample(0)
    measures, _ = summarise(logits, targets, {"many": [0, 1, 2, 3, 4], "medium": [], "few": []})
    assert measures["accuracy_many"] == measures["accuracy"]
    assert all(measures[name] is None for name in ("accuracy_medium", "ece_medium", "accuracy_few", "ece_few"))


HALF = np.array([0.5, 0.5])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((HALF, np.array([1])), r"equally long, not empty.*got shapes \(2,\) and \(1,\)"),
        ((HALF[None], HALF[None]), "one-dimensional"),
        ((np.array([]), np.array([])), "not empty"),
        ((np.array([0.5, np.nan]), HALF), r"must lie in 0\.\.1"),
        ((np.array([0.5, 1.1]), HALF), r"must lie in 0\.\.1, got 0\.5 \.\. 1\.1"),
        ((np.array([-0.1, 0.5]), HALF), r"must lie in 0\.\.1"),
        ((HALF, HALF, 0), "n_bins must be at least 1"),
    ],
)
def test_bad_confidences_are_refused(arguments, message):
    with pytest.raises(MislasError, match=message):
        reliability(*arguments)


@pytest.mark.parametrize(
    ("logits", "targets"),
    [
        (torch.zeros(3, 2), torch.zeros(2, dtype=torch.long)),
        (torch.zeros(3), torch.zeros(3, dtype=torch.long)),
        (torch.zeros(0, 2), torch.zeros(0, dtype=torch.long)),
        (torch.full((3, 2), torch.nan), torch.zeros(3, dtype=torch.long)),
        (torch.zeros(3, 2), torch.tensor([0, 1, 2])),
    ],
    ids=["lengths", "one dimension", "empty", "nan", "label"],
)
def test_bad_logits_are_refused(logits, targets):
    with pytest.raises(MislasError):
        summarise(logits, targets, {})


def test_predict_gives_the_logits_of_every_head_in_float32_and_evaluation_mode():
    torch.manual_seed(0)
    raw = torch.randint(256, (7, 4, 4, 3), dtype=torch.uint8)
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))
    heads = [nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3)), nn.Linear(6, 2)]
    images = Images(raw, (0.5,) * 3, (0.25,) * 3, padding=1)
    got = predict(network, heads, SimpleNamespace(plain=lambda: images.plain(3)))
    x = (raw.permute(0, 3, 1, 2).flatten(1) / 255 - 0.5) / 0.25
    features = network[1](x) / np.sqrt(1 + 1e-5)  # batch norm as it starts
    for logits, head in zip(got, heads, strict=True):
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, head(features).detach(), atol=1e-5, rtol=0)


# ----------------------------------------------------------------------------------------------------- right from wrong


def predictions(confidence, correct):
    n = len(confidence)
    return Predictions(np.zeros(n, int), 1 - np.array(correct, int), np.array(confidence), np.array(confidence))


def test_auroc_is_the_share_of_pairs_in_which_the_right_one_is_surer():
    """Right at 0.9 and 0.5, wrong at 0.7 and 0.5: of four pairs two are in order and one is a tie."""
    assert auroc(predictions([0.9, 0.5, 0.7, 0.5], [1, 1, 0, 0])) == pytest.approx(2.5 / 4)
    assert auroc(predictions([0.9, 0.5], [1, 1])) is None
    assert auroc(predictions([0.9, 0.5], [0, 0])) is None


@pytest.mark.parametrize(("share", "expected"), [(0.5, 1.0), (0.75, 2 / 3), (1.0, 0.5), (0.01, 1.0)])
def test_accuracy_of_the_surest(share, expected):
    assert surest_accuracy(predictions([0.6, 0.9, 0.8, 0.7], [0, 1, 1, 0]), share) == pytest.approx(expected)


@pytest.mark.parametrize("n_bins", [1, 15])
def test_the_ece_of_chance_is_what_calibrated_networks_have_on_average(n_bins):
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.1, 1, 2000)
    drawn = [reliability(confidence, rng.random(2000) < confidence, n_bins).ece for _ in range(2000)]
    assert chance_ece(predictions(confidence, np.ones(2000)), n_bins) == pytest.approx(np.mean(drawn), rel=0.03)
    assert chance_ece(predictions(np.ones(10), np.ones(10))) == 0
