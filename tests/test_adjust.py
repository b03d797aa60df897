import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize, minimize_scalar
from sklearn.metrics import balanced_accuracy_score, log_loss
from sklearn.neighbors import NearestCentroid
from torch import nn

from mislas.adjust import adjust
from mislas.augment import Images
from mislas.batches import batches_of
from mislas.data import SPECS
from mislas.errors import MislasError
from mislas.evaluate import predict
from mislas.losses import class_balanced_mean
from mislas.methods import configure
from mislas.models import stage1_model
from mislas.rules import (
    RULES,
    Rule,
    best_tau,
    best_temperature,
    logit_adjusted,
    nearest_class_mean,
    tau_normalised,
    temperature_scaled,
    vector_scaled,
)
from mislas.train import train_stage1

rng = np.random.default_rng(0)
TARGETS = np.repeat(np.arange(3), (40, 12, 4))
FEATURES = torch.from_numpy(rng.standard_normal((56, 5)) + 2 * np.eye(5)[TARGETS]).float()
LABELS = torch.from_numpy(TARGETS)


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    return nn.Linear(5, 3)


def numpy(layer):
    return layer.weight.detach().numpy(), layer.bias.detach().numpy()


# ------------------------------------------------------------------------------------------------------------ rules


@pytest.mark.parametrize("rule", [tau_normalised, lambda c, v: logit_adjusted(c, [40, 12, 4], v)])
def test_tau_0_is_the_raw_classifier(classifier, rule):
    for one, two in zip(numpy(rule(classifier, 0.0)), numpy(classifier), strict=True):
        np.testing.assert_array_equal(one, two)


def test_tau_1_makes_all_weights_equally_long(classifier):
    weight, bias = numpy(tau_normalised(classifier, 1.0))
    norms = np.linalg.norm(classifier.weight.detach().numpy(), axis=1)
    np.testing.assert_allclose(np.linalg.norm(weight, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(bias, classifier.bias.detach().numpy() / norms, rtol=1e-6)


def test_logit_adjustment_by_hand(classifier):
    _, bias = numpy(logit_adjusted(classifier, [40, 12, 4], 2.0))
    frequencies = np.array([40, 12, 4]) / 56
    np.testing.assert_allclose(bias, classifier.bias.detach().numpy() - 2 * np.log(frequencies), rtol=1e-6)


def test_temperature_1_changes_nothing_and_2_halves_the_logits(classifier):
    for temperature in (1.0, 2.0):
        logits = temperature_scaled(classifier, temperature)(FEATURES)
        torch.testing.assert_close(logits, classifier(FEATURES) / temperature)


def test_nearest_class_mean_is_scikit_learns():
    head = nearest_class_mean(FEATURES, LABELS, 3)
    points = torch.from_numpy(rng.standard_normal((200, 5))).float() + 0.5
    expected = NearestCentroid().fit(FEATURES, TARGETS).predict(points)
    np.testing.assert_array_equal(head(points).argmax(1), expected)


def test_nearest_class_means_probabilities_are_those_of_unit_gaussians():
    means = np.stack([FEATURES.numpy()[k == TARGETS].mean(axis=0) for k in range(3)])
    density = np.exp(-((FEATURES.numpy()[:, None] - means) ** 2).sum(axis=2) / 2)
    p = nearest_class_mean(FEATURES, LABELS, 3)(FEATURES).softmax(1)
    np.testing.assert_allclose(p.detach(), density / density.sum(axis=1, keepdims=True), atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- choosing


def test_the_class_balanced_mean_by_hand():
    values, targets = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.5]), torch.tensor([0, 0, 0, 0, 1])
    assert class_balanced_mean(values, targets).item() == pytest.approx((0.75 + 0.5) / 2)


def test_the_best_temperature_is_scipys_and_scikit_learns():
    logits = 4 * FEATURES[:, :3]
    weights = 1 / np.bincount(TARGETS)[TARGETS]

    def loss(log_t):
        p = (logits.double() / np.exp(log_t)).softmax(1).numpy()
        return log_loss(TARGETS, p, sample_weight=weights)

    expected = np.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded", options={"xatol": 1e-9}).x)
    assert best_temperature(logits, LABELS) == pytest.approx(expected, rel=1e-4)


def test_the_best_scale_and_shift_of_each_logit_are_scipys_and_scikit_learns(classifier):
    targets = np.concatenate([TARGETS[:50], TARGETS[-1:], TARGETS[:5]])  # a few wrong ones: the likeliest is finite
    weights = 1 / np.bincount(targets)[targets]
    logits = classifier(FEATURES).detach().double().numpy()

    def loss(x):
        z = logits * x[:3] + x[3:]
        p = np.exp(z - z.max(axis=1, keepdims=True))
        return log_loss(targets, p / p.sum(axis=1, keepdims=True), sample_weight=weights)

    start = np.repeat([1.0, 0.0], 3)
    best = minimize(loss, start, method="BFGS", options={"gtol": 1e-7}).fun
    head = vector_scaled(classifier, FEATURES, torch.from_numpy(targets))
    found = head(FEATURES).detach().double().softmax(1).numpy()
    assert log_loss(targets, found, sample_weight=weights) == pytest.approx(best, rel=1e-6)
    assert best < loss(start) - 0.1
    a, c = (numpy(head)[0] / numpy(classifier)[0]), numpy(head)[1]
    np.testing.assert_allclose(a, a[:, :1].repeat(5, axis=1), rtol=1e-4)  # each logit has a scale of its own
    np.testing.assert_allclose(
        head(FEATURES).detach(), logits * a[:, 0] + c - a[:, 0] * numpy(classifier)[1], atol=1e-4
    )


def test_scales_alone_are_likelier_than_any_near_them(classifier):
    def loss(head):
        return class_balanced_mean(nn.functional.cross_entropy(head(FEATURES), LABELS, reduction="none"), LABELS).item()

    head = vector_scaled(classifier, FEATURES, LABELS, shift=False)
    a = numpy(head)[0] / numpy(classifier)[0]
    np.testing.assert_allclose(a, a[:, :1].repeat(5, axis=1), rtol=1e-4)
    np.testing.assert_allclose(numpy(head)[1], a[:, 0] * numpy(classifier)[1], rtol=1e-4)
    least = loss(head)
    for k in range(3):
        for factor in (0.9, 1.1):
            moved = copy.deepcopy(head)
            moved.weight.data[k] *= factor
            moved.bias.data[k] *= factor
            assert loss(moved) > least
    assert loss(vector_scaled(classifier, FEATURES, LABELS)) < least < loss(classifier)


def test_the_temperature_of_calibrated_logits_is_1():
    p = torch.tensor([[0.7, 0.3]]).repeat(100, 1)
    targets = torch.tensor([0] * 70 + [1] * 30)
    mirrored = torch.cat([p, p.flip(1)]), torch.cat([targets, 1 - targets])  # both classes with 100 images
    assert best_temperature(mirrored[0].log(), mirrored[1]) == pytest.approx(1, abs=1e-4)


def test_the_best_tau_is_the_first_with_the_best_balanced_accuracy(classifier):
    head = nearest_class_mean(FEATURES, LABELS, 3)
    head.weight.data[0] *= 3  # the head class shouts

    def score(tau):
        return balanced_accuracy_score(TARGETS, tau_normalised(head, tau)(FEATURES).argmax(1))

    taus = np.arange(21) / 10
    scores = [score(tau) for tau in taus]
    with torch.no_grad():
        assert best_tau(lambda tau: tau_normalised(head, tau), FEATURES, LABELS) == taus[int(np.argmax(scores))]
    assert max(scores) > score(0.0)


# ------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def held(digits):
    """A Stage-1 that held images out, and the test accuracy of a classifier on it."""
    from mislas.train import Options

    config = configure("digits", "temperature", 50, overrides={"epochs": 6})
    trained = train_stage1(config.stage1_only, digits, Options(device="cpu", progress=False))
    return trained.backbone, trained.heads[0]


def test_rules_share_a_pass_and_leave_stage1_alone(digits, held, options):
    before = copy.deepcopy(held[0].state_dict())
    configs = [
        configure("digits", method, 50, overrides={"epochs": 6, "holdout": 0.1})
        for method in (
            "temperature",
            "tau-norm",
            "ncm",
            "logit-adjustment",
            "vector-scaling",
            "logit-adjustment+temperature",
        )
    ]
    assert len({config.shared_pass for config in configs}) == 1
    trained = adjust(configs, copy.deepcopy(held), digits, options)
    for name, value in trained.backbone.state_dict().items():
        assert torch.equal(value, before[name])
    chosen = [history[0].get("value") for history in trained.histories]
    assert chosen[0] > 0
    assert 0 <= chosen[1] <= 2
    assert chosen[2:5] == [None, 1.0, None]
    test = Images(digits.test_images, digits.spec.mean, digits.spec.std, padding=0)
    raw, scaled, *_, adjusted_and_scaled = predict(trained.backbone, [held[1], *trained.heads], test)
    torch.testing.assert_close(scaled, raw / chosen[0], atol=1e-4, rtol=1e-4)
    train, which = digits.hold_out(0.1)
    prior = torch.tensor(train.class_counts) / sum(train.class_counts)
    torch.testing.assert_close(adjusted_and_scaled, (raw - prior.log()) / chosen[5], atol=1e-4, rtol=1e-4)
    images = Images(digits.train_images[which], digits.spec.mean, digits.spec.std, padding=0)
    (logits,) = predict(trained.backbone, [held[1]], images)
    assert chosen[5] == pytest.approx(best_temperature(logits - prior.log(), digits.train_targets[which]), rel=1e-4)


def test_vector_scaling_is_fitted_to_the_images_held_out_and_class_means_to_the_others(digits, held, options):
    configs = [
        configure("digits", method, 50, overrides={"epochs": 6, "holdout": 0.1}) for method in ("vector-scaling", "ncm")
    ]
    trained = adjust(configs, copy.deepcopy(held), digits, options)
    train, which = digits.hold_out(0.1)
    out = digits.train_images[which], digits.train_targets[which]
    for head, rule, (images, targets) in zip(
        trained.heads,
        (lambda *seen: vector_scaled(held[1], *seen), lambda *seen: nearest_class_mean(*seen, 10)),
        (out, (train.train_images, train.train_targets)),
        strict=True,
    ):
        plain = Images(images, digits.spec.mean, digits.spec.std, padding=0)
        expected = rule(predict(trained.backbone, [nn.Identity()], plain)[0], targets)
        torch.testing.assert_close(head.weight, expected.weight, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(head.bias, expected.bias, atol=1e-4, rtol=1e-4)


def test_a_rule_of_ones_own_is_one_more_entry(digits, held, options, monkeypatch):
    def shouting(known, value):
        head = copy.deepcopy(known.classifier)
        head.bias.data[known.class_counts.index(min(known.class_counts))] += value
        return head

    monkeypatch.setitem(RULES, "shouting", Rule(shouting, choose=lambda known: float(len(known.held_out()[1]))))
    with pytest.raises(MislasError, match=r"stage2.value of 'shouting' must be >= 0 and finite, .* got -1.0"):
        configure("digits", "temperature", 50, overrides={"rule": "shouting", "value": -1.0})
    changes = {"epochs": 6, "rule": "shouting"}
    configs = [configure("digits", "temperature", 50, overrides=changes | more) for more in ({}, {"value": 7.0})]
    trained = adjust(configs, copy.deepcopy(held), digits, options)
    held_out = len(digits.hold_out(0.1)[1])
    assert [history[0]["value"] for history in trained.histories] == [held_out, 7.0]
    moved = [(head.bias - held[1].bias).tolist() for head in trained.heads]
    assert moved == [pytest.approx([0.0] * 9 + [value]) for value in (held_out, 7.0)]


def test_a_rule_has_a_classifier_of_its_own_that_it_may_change(digits, held, options, monkeypatch):
    def zeroed(known):
        known.classifier.weight.data.zero_()
        return known.classifier

    monkeypatch.setitem(RULES, "zeroed", Rule(zeroed))
    configs = [configure("digits", "temperature", 50, overrides={"epochs": 6, "rule": "zeroed"})]
    configs += [configure("digits", "temperature", 50, overrides={"epochs": 6, "value": 1.0})]
    stage1 = copy.deepcopy(held)
    zero, same = adjust(configs, stage1, digits, options).heads
    assert not zero.weight.any()
    torch.testing.assert_close(same.weight, held[1].weight)
    torch.testing.assert_close(stage1[1].weight, held[1].weight)


def test_images_that_are_not_held_out_cannot_be_looked_at(digits, options, monkeypatch):
    monkeypatch.setitem(RULES, "peeping", Rule(lambda known: vector_scaled(known.classifier, *known.held_out())))
    config = configure("digits", "ncm", 50, overrides={"rule": "peeping"})
    network = stage1_model("resnet8", 10)
    with pytest.raises(MislasError, match=r"held-out images, and there are none: set stage1.holdout \(and holds_out"):
        adjust([config], network, digits, options)


def test_what_a_rule_draws_follows_from_the_seed(digits, held, options, monkeypatch):
    monkeypatch.setitem(RULES, "drawn", Rule(lambda known: nn.Linear(64, 10)))
    configs = [configure("digits", "ncm", 50, seed, {"epochs": 6, "rule": "drawn"}) for seed in (0, 0, 1)]
    one, same, other = (adjust([config], copy.deepcopy(held), digits, options).heads[0].weight for config in configs)
    torch.testing.assert_close(one, same, rtol=0, atol=0)
    assert not torch.allclose(one, other)


@pytest.mark.parametrize("head", [nn.Sequential(nn.Linear(64, 10)), nn.Linear(64, 9)])
def test_a_rule_makes_a_linear_classifier_of_all_classes(digits, held, options, monkeypatch, head):
    monkeypatch.setitem(RULES, "slip", Rule(lambda known: head))
    config = configure("digits", "ncm", 50, overrides={"epochs": 6, "rule": "slip"})
    with pytest.raises(MislasError, match=r"rule 'slip' must make a linear classifier of \(10, 64\) weights, got "):
        adjust([config], copy.deepcopy(held), digits, options)


@pytest.mark.parametrize("rule", [
    lambda c: tau_normalised(c, 1.0), lambda c: logit_adjusted(c, [40, 12, 4], 1.0),
    lambda c: temperature_scaled(c, 2.0), lambda c: vector_scaled(c, FEATURES, LABELS, shift=False),
])  # fmt: skip
def test_no_bias_counts_as_a_bias_of_zero(classifier, rule):
    without = nn.Linear(5, 3, bias=False)
    without.weight, classifier.bias.data = classifier.weight, torch.zeros(3)
    for one, two in zip(numpy(rule(without)), numpy(rule(classifier)), strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("sampler", [None, "instance_balanced"])
def test_shifted_statistics_are_those_of_the_sampled_images(digits, held, options, sampler, monkeypatch):
    """The first batch norm's mean: over images as they come, or over classes of equal weight."""
    changes = {"epochs": 6, "holdout": 0.1, "shift_epochs": 10, "shift_sampler": sampler}
    config = configure("digits", "ncm+shift", 50, overrides=changes)
    network = copy.deepcopy(held[0])
    first = network.bn
    first.momentum = None  # a plain average in place of a moving one
    first.reset_running_stats()
    unmoved = copy.deepcopy(network)
    monkeypatch.setitem(SPECS, "digits", replace(digits.spec, padding=0))  # no augmentation
    adjust([config], (network, held[1]), digits, options)
    train, maps = digits.hold_out(0.1)[0], []
    unmoved.bn.register_forward_pre_hook(lambda module, inputs: maps.append(inputs[0].mean(dim=(2, 3))))
    predict(unmoved, [nn.Identity()], Images(train.train_images, digits.spec.mean, digits.spec.std, padding=0))
    maps = torch.cat(maps).double()
    balanced = torch.stack([maps[train.train_targets == k].mean(0) for k in range(10)]).mean(0)
    right, wrong = (maps.mean(0), balanced) if sampler else (balanced, maps.mean(0))
    assert (first.running_mean - right).norm() < 0.2 * (first.running_mean - wrong).norm()


def test_statistics_are_shifted_on_images_that_are_not_mixed(digits, held, options, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "mislas.train.batches_of", lambda data, stage, *rest: seen.append(stage) or batches_of(data, stage, *rest)
    )
    config = configure("digits", "ncm+mixup+shift", 50, overrides={"epochs": 6, "holdout": 0.1, "shift_epochs": 1})
    adjust([config], copy.deepcopy(held), digits, options)
    assert [stage.mixup for stage in seen] == [None]


def test_a_rule_with_shift_moves_running_statistics_and_nothing_else(digits, held, options):
    config = configure("digits", "ncm+shift", 50, overrides={"epochs": 6, "holdout": 0.1, "shift_epochs": 1})
    network = copy.deepcopy(held[0])
    trained = adjust([config], (network, held[1]), digits, options)
    for name, value in trained.backbone.state_dict().items():
        moved = name.endswith(("running_mean", "running_var", "num_batches_tracked"))
        assert torch.equal(value, held[0].state_dict()[name]) == (not moved), name


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_is_above_0(classifier, temperature):
    with pytest.raises(MislasError, match="temperature must be > 0"):
        temperature_scaled(classifier, temperature)
