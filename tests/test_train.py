import copy
import itertools
import re
import shutil
import time
import warnings
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mislas.batches
import mislas.train
from mislas.adjust import adjust
from mislas.augment import Images
from mislas.batches import Batch, batches_of, draw_batches, host_rng, torch_rng
from mislas.data import load
from mislas.errors import Diverged, MislasError, RecordError
from mislas.evaluate import predict
from mislas.losses import LOSSES, LossSpec, cross_entropy, effective_number_weights
from mislas.methods import ONE_STAGE, configure
from mislas.metric import METRICS
from mislas.models import BACKBONES, CLASSIFIERS, backbone, init_kaiming, stage1_model
from mislas.train import (
    Objective,
    Options,
    OutOfTime,
    forward,
    learning_rate_factor,
    round_to_half,
    train_stage1,
    train_stage2,
)

QUICK = {"epochs": 4, "stage2.epochs": 4}


def digits_config(method, **changes):
    return configure("digits", method, 50, overrides=QUICK | changes)


@pytest.fixture(scope="module")
def trained(digits):
    """A backbone and its linear classifier, a little trained."""
    trained = train_stage1(digits_config("ce", epochs=1), digits, Options(device="cpu", progress=False))
    return trained.backbone, trained.heads[0]


@pytest.fixture
def stage1(trained):
    """A copy of them that a test may change."""
    return copy.deepcopy(trained)


def assert_equal(one, two):
    """Nested state, bit for bit."""
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one.keys() - {"seconds"}:
            assert_equal(one[key], two[key])
    elif isinstance(one, list | tuple):
        for left, right in zip(one, two, strict=True):
            assert_equal(left, right)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, two)
    else:
        assert one == two


def train(stage, digits, options, trained, checkpoint=None, evaluate=None):
    """Stage-1 with mixup, or two heads on shifted batch norm: four epochs."""
    if stage == "stage1":
        return train_stage1(digits_config("mixup"), digits, options, checkpoint, evaluate)
    configs = [digits_config("mislas"), digits_config("lws+mixup+shift")]
    return train_stage2(configs, copy.deepcopy(trained), digits, options, checkpoint, evaluate)


# --------------------------------------------------------------------------------------------------------- schedules


def test_the_multistep_schedule_warms_up_and_drops_at_160_and_180_of_200():
    stage = configure("cifar10", "ce").stage1
    factors = [learning_rate_factor(stage, epoch) for epoch in range(200)]
    expected = [0.2, 0.4, 0.6, 0.8] + [1] * 156 + [0.1] * 20 + [0.01] * 20
    np.testing.assert_allclose(factors, expected)


def test_the_cosine_schedule_starts_at_1_is_halved_midway_and_would_end_at_0():
    stage = configure("cifar10", "mislas").stage2
    factors = [learning_rate_factor(stage, epoch) for epoch in range(11)]
    np.testing.assert_allclose([factors[0], factors[5], factors[10]], [1, 0.5, 0], atol=1e-12)
    np.testing.assert_allclose(factors[9], (1 - np.cos(np.pi / 10)) / 2)
    assert (np.diff(factors) < 0).all()


# ----------------------------------------------------------------------------------------------------------- stage 1


def accuracy(trained, data):
    test = Images(data.test_images, data.spec.mean, data.spec.std, padding=0)
    (logits,) = predict(trained.backbone, trained.heads, test)
    return (logits.argmax(1) == data.test_targets).double().mean().item()


def test_stage1_learns_digits_the_same_way_twice(options):
    data = load("digits", imbalance=10)
    config = configure("digits", "ce", 10, overrides={"epochs": 6})
    one, two = (train_stage1(config, data, options) for _ in range(2))
    assert accuracy(one, data) > 0.8
    assert one.histories == two.histories
    assert_equal(one.backbone.state_dict(), two.backbone.state_dict())
    assert_equal(one.heads[0].state_dict(), two.heads[0].state_dict())


def test_another_seed_gives_another_model(digits, options, trained):
    other = train_stage1(replace(digits_config("ce", epochs=1), seed=1), digits, options)
    assert not torch.equal(other.heads[0].weight, trained[1].weight)


def test_the_seed_is_in_all_that_is_drawn(digits, options, stage1, monkeypatch):
    seen = []
    monkeypatch.setattr("mislas.batches.host_rng", lambda *parts: seen.append(parts) or host_rng(*parts))
    train_stage1(replace(digits_config("ce", epochs=1), seed=3), digits, options)
    train_stage2([replace(digits_config("crt"), seed=3)], stage1, digits, options)
    assert {(seed, purpose) for seed, purpose, *_ in seen} == {
        (3, purpose)
        for purpose in (
            *("init", "stage1", "stage1 modules"),
            *("stage2 head", "stage2", "stage2 modules", "stage2 heads"),
        )
    }


def test_weights_end_as_half_precision_holds_them(trained):
    for module in trained:
        for parameter in module.parameters():
            assert torch.equal(parameter, parameter.half().float())


def test_rounding_leaves_running_statistics_alone():
    layer = nn.BatchNorm2d(1)
    layer.running_mean.fill_(1 / 3)
    layer.weight.data.fill_(1 / 3)
    round_to_half(layer)
    assert layer.running_mean.item() == np.float32(1 / 3)
    assert layer.weight.item() == np.float16(1 / 3)


def test_the_history_has_rates_losses_and_what_the_callback_finds(digits, options):
    found = []

    def evaluate(network, heads):
        found.append(len(found))
        return [{"test_accuracy": found[-1]}]

    trained = train_stage1(digits_config("ce"), digits, replace(options, eval_every=2), evaluate=evaluate)
    (history,) = trained.histories
    assert [row["epoch"] for row in history] == [1, 2, 3, 4]
    np.testing.assert_allclose([row["lr"] for row in history], [0.05, 0.1, 0.1, 0.1])  # warm-up of 2; 3 of 4 is < 80%
    assert [row.get("test_accuracy") for row in history] == [None, 0, None, None]
    assert history[0]["train_loss"] > history[-1]["train_loss"] > 0


def untrained(config):
    """The network and the classifier that Stage-1 starts from, in training mode."""
    network, head = backbone("resnet8").train(), nn.Linear(64, 10)
    generator = torch_rng(config.seed, "init")
    init_kaiming(network, generator)
    init_kaiming(head, generator)
    return network, head


def test_stage1_with_mixup_is_sgd_on_mixed_images_and_labels(digits, options):
    """Against a loop of its own: labels mixed as vectors, torch's SGD, the rates of a warm-up over 2 epochs.

    The rate is low, so that rounding does not grow from step to step.
    """
    config = digits_config("mixup", epochs=2, lr=2e-3, weight_decay=0.05)
    network, head = untrained(config)
    optimizer = torch.optim.SGD([*network.parameters(), *head.parameters()], 1, 0.9, weight_decay=0.05, foreach=False)
    images = Images(digits.train_images, digits.spec.mean, digits.spec.std, padding=1)
    one_hot, targets, expected = torch.eye(10)[digits.train_targets], digits.train_targets.numpy(), []
    for epoch, optimizer.param_groups[0]["lr"] in enumerate((1e-3, 2e-3)):
        rng, total = host_rng(config.seed, "stage1", epoch), 0.0
        drawn = draw_batches(rng, targets, config.stage1, 1, False, torch.device("cpu"), "instance_balanced")
        for batch, lam, partner in drawn:
            x, y = images.batch(*batch), one_hot[batch[0]]
            logits = head(network(lam * x + (1 - lam) * x[partner]))
            loss = F.cross_entropy(logits, lam * y + (1 - lam) * y[partner])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(y)
        expected.append(total / len(targets))
    trained = train_stage1(config, digits, options)
    np.testing.assert_allclose([row["train_loss"] for row in trained.histories[0]], expected, rtol=1e-4)
    torch.testing.assert_close(trained.heads[0].weight, head.weight, atol=5e-4, rtol=0)
    torch.testing.assert_close(trained.backbone.bn.running_mean, network.bn.running_mean, atol=1e-4, rtol=0)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_look_at_the_test_set_along_the_way_changes_nothing(digits, options, trained, stage):
    def evaluate(network, heads):
        network.eval()
        return [{"test_accuracy": 0.5} for _ in heads]

    options = replace(options, eval_every=1)
    with_looks, without = (train(stage, digits, options, trained, evaluate=look) for look in (evaluate, None))
    for one, two in zip((with_looks.backbone, *with_looks.heads), (without.backbone, *without.heads), strict=True):
        assert_equal(one.state_dict(), two.state_dict())


def test_class_weights_and_samplers_are_deferred():
    weighted, resampled = (configure("cifar10", method).stage1 for method in ("ldam+drw", "ldam+drs"))
    assert [weighted.deferred(epoch) for epoch in (0, 159, 160, 199)] == [True, True, False, False]
    assert [resampled.sampler_in(epoch) for epoch in (159, 160)] == ["instance_balanced", "class_balanced"]
    assert {weighted.sampler_in(epoch) for epoch in range(200)} == {"instance_balanced"}


@pytest.fixture
def samplers(monkeypatch):
    """The samplers of the epochs that are drawn, in order."""
    names, draw = [], mislas.batches.draw
    monkeypatch.setattr("mislas.batches.draw", lambda name, *rest: names.append(name) or draw(name, *rest))
    return names


def test_training_asks_for_what_is_deferred_epoch_by_epoch(digits, options, samplers, monkeypatch):
    epochs = []

    class Noted(Objective):
        def __call__(self, logits, batch, epoch):
            epochs.append(epoch)
            return super().__call__(logits, batch, epoch)

    monkeypatch.setattr("mislas.train.Objective", Noted)
    train_stage1(digits_config("ldam+drs", epochs=5), digits, options)
    assert samplers == ["instance_balanced"] * 4 + ["class_balanced"]
    assert epochs == np.repeat(range(5), -(-len(digits.train_targets) // 32)).tolist()


@pytest.mark.parametrize("epochs", [1, 3, 4, 5])
def test_what_is_deferred_comes_in_the_last_epoch_at_least(epochs):
    stage = configure("digits", "ce+drw", overrides={"epochs": epochs}).stage1
    assert [stage.deferred(epoch) for epoch in range(epochs)] == [True] * (epochs - 1) + [False]


def test_the_objective_is_weighted_cross_entropy_once_weights_are_due():
    counts, stage = (50, 15, 5), configure("digits", "ce+drw", overrides={"epochs": 10}).stage1
    logits, targets = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 0, 1])
    batch, objective = Batch(torch.empty(0), targets), Objective(stage, counts, torch.device("cpu"))
    assert objective(logits, batch, 7).item() == pytest.approx(F.cross_entropy(logits, targets).item(), abs=1e-6)
    expected = F.cross_entropy(logits, targets, weight=effective_number_weights(counts, 0.9999))
    assert objective(logits, batch, 8).item() == pytest.approx(expected.item(), abs=1e-6)


def test_the_objective_mixes_losses_image_by_image():
    stage = configure("digits", "remix").stage1
    logits, targets, others = torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), torch.tensor([1, 1, 0, 2])
    weight = torch.tensor([0.0, 1.0, 0.3, 0.6])
    q = weight[:, None] * F.one_hot(targets, 3) + (1 - weight[:, None]) * F.one_hot(others, 3)
    objective = Objective(stage, (50, 15, 5), torch.device("cpu"))
    value = objective(logits, Batch(torch.empty(0), targets, others, weight), 0)
    assert value.item() == pytest.approx(F.cross_entropy(logits, q).item(), abs=1e-6)


def test_mixed_labels_are_weighted_by_both_of_their_classes():
    counts, stage = (50, 15, 5), configure("digits", "remix+drw", overrides={"epochs": 10}).stage1
    logits, targets, others = torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), torch.tensor([1, 1, 0, 2])
    own, w = torch.tensor([0.0, 1.0, 0.3, 0.6]), effective_number_weights(counts, 0.9999)
    log_p, one, two = logits.log_softmax(1), own * w[targets], (1 - own) * w[others]
    i = torch.arange(4)
    expected = -(one * log_p[i, targets] + two * log_p[i, others]).sum() / (one + two).sum()
    value = Objective(stage, counts, torch.device("cpu"))(logits, Batch(torch.empty(0), targets, others, own), 8)
    assert value.item() == pytest.approx(expected.item(), abs=1e-6)


def test_two_branches_change_over_by_a_parabola_and_the_second_has_its_own_sampler(
    digits, options, samplers, monkeypatch
):
    alphas, mix = [], mislas.train.mix_branches
    monkeypatch.setattr("mislas.train.mix_branches", lambda a, b, alpha: alphas.append(alpha) or mix(a, b, alpha))
    train_stage1(digits_config("bbn"), digits, options)
    assert list(dict.fromkeys(alphas)) == [1, 15 / 16, 12 / 16, 7 / 16]
    assert samplers == ["instance_balanced", "reverse"] * 4


def test_the_first_epoch_of_two_branches_trains_on_the_conventional_one_alone(digits, options):
    """alpha is 1 in epoch 0: the re-balancing branch and its half of the classifier get no gradient."""
    config = digits_config("bbn", epochs=1, weight_decay=0.0)
    trained = train_stage1(config, digits, options)
    network, head = stage1_model("resnet8", 10, two_branches=True)
    generator = torch_rng(config.seed, "init")
    init_kaiming(network, generator)
    init_kaiming(head, generator)
    other = trained.backbone.branches[1]
    round_to_half(network), round_to_half(head)
    assert torch.equal(other.conv2.weight, network.branches[1].conv2.weight)
    assert torch.equal(trained.heads[0].weight[:, 64:], head.weight[:, 64:])
    assert not torch.equal(trained.heads[0].weight[:, :64], head.weight[:, :64])


@pytest.mark.parametrize("method", ["lifted", "range"])
def test_a_metric_loss_of_weight_0_is_cross_entropy_alone_and_otherwise_it_counts(digits, options, trained, method):
    without = train_stage1(digits_config(method, epochs=1, metric_weight=0.0), digits, options)
    assert_equal(without.backbone.state_dict(), trained[0].state_dict())
    assert_equal(without.heads[0].state_dict(), trained[1].state_dict())
    with_it = train_stage1(digits_config(method, epochs=1), digits, options)
    assert not torch.equal(with_it.backbone.conv.weight, without.backbone.conv.weight)
    assert with_it.histories[0][0]["train_loss"] > without.histories[0][0]["train_loss"]


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (lambda features, targets: features.sum(dim=1), r"one number for a batch.*gave shape \(2,\)"),
        (lambda features, targets: None, r"one number for a batch.*gave None"),
        (nn.Bilinear(64, 64, 1), "parameters that learn"),
    ],
)
def test_a_metric_that_cannot_be_trained_with_is_refused(digits, options, monkeypatch, metric, message):
    if isinstance(metric, nn.Module):
        own, metric = metric, lambda features, targets: own(features, features).mean()
    monkeypatch.setitem(METRICS, "mine", metric)
    with pytest.raises(MislasError, match=f"^metric 'mine' .*{message}"):
        train_stage1(digits_config("ce", metric="mine", metric_weight=0.1), digits, options)


def test_a_metric_loss_is_added_with_its_weight(digits, options):
    """At a rate that changes nothing, an epoch's loss is its batches' mean, for the network that it begins with."""
    config = digits_config("lifted", epochs=1, lr=1e-12, weight_decay=0.0, metric_weight=0.3)
    network, head = untrained(config)
    total = 0.0
    for batch in batches_of(digits, config.stage1, "stage1", config.seed, options).epoch(0):
        with torch.no_grad():
            features = network(batch.images)
            loss = F.cross_entropy(head(features), batch.targets) + 0.3 * METRICS["lifted"](features, batch.targets)
        total += loss.item() * len(batch.targets)
    (row,) = train_stage1(config, digits, options).histories[0]
    assert row["train_loss"] == pytest.approx(total / len(digits.train_targets), rel=1e-4)


def two_batches(digits, options):
    return list(itertools.islice(batches_of(digits, digits_config("ce").stage1, "stage1", 0, options).epoch(0), 2))


def gradient(network, head, batch, options, precision="fp32"):
    """That of cross-entropy on a batch, by all parameters of the backbone."""
    network.to(memory_format=torch.channels_last).train().zero_grad()
    features = forward(network, digits_config("ce", precision=precision), options)(batch)
    F.cross_entropy(head(features), batch.targets).backward()
    return torch.cat([parameter.grad.flatten() for parameter in network.parameters()])


def cosine(one, two):
    return F.cosine_similarity(one, two, dim=0)


@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="compiling takes a C++ compiler")
@pytest.mark.parametrize(("precision", "native"), [("fp32", True), ("bf16", True), ("bf16", False)])
def test_a_compiled_backbone_has_the_gradient_of_the_plain_one(digits, stage1, options, precision, native, monkeypatch):
    monkeypatch.setattr("mislas.train.native_bfloat16", lambda device: native)
    batch, _ = two_batches(digits, options)
    plain, compiled = (
        gradient(*copy.deepcopy(stage1), batch, replace(options, compile=compile), precision)
        for compile in (False, True)
    )
    assert cosine(plain, compiled) > {"fp32": 0.99999, "bf16": 0.99}[precision]
    assert compiled.norm() == pytest.approx(plain.norm().item(), rel=0.02)


def test_a_backbone_that_cannot_be_compiled_says_what_to_do(digits, stage1, options, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (str(tmp_path / "no-compiler"),))
    torch._dynamo.reset()
    batch, _ = two_batches(digits, options)
    with pytest.raises(MislasError, match=r"the backbone cannot be compiled .*: leave out --compile"):
        gradient(*stage1, batch, replace(options, compile=True))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("from_scratch", [True, False])
def test_bfloat16_gradients_point_where_float32_ones_do(digits, stage1, options, from_scratch, native, monkeypatch):
    """Rounding costs far less than what one batch's gradient differs from another's, whoever multiplies."""
    monkeypatch.setattr("mislas.train.native_bfloat16", lambda device: native)
    network, head = stage1
    if from_scratch:
        network, head = stage1_model("resnet8", 10)
        init_kaiming(network, torch_rng(0, "init"))
        init_kaiming(head, torch_rng(0, "init"))
    first, second = two_batches(digits, options)
    exact, rounded = (gradient(network, head, first, options, precision) for precision in ("fp32", "bf16"))
    other = gradient(network, head, second, options)
    assert not torch.allclose(exact, rounded, rtol=1e-4, atol=0)  # it was rounded
    assert cosine(exact, rounded) > 0.98
    assert 1 - cosine(exact, rounded) < 0.1 * (1 - cosine(exact, other))
    assert rounded.norm() == pytest.approx(exact.norm().item(), rel=0.05)


@pytest.mark.parametrize("method", ONE_STAGE)
def test_every_one_stage_method_learns_digits(method, options):
    """Chance is 0.1; a fifth of the schedule is enough to be far from it."""
    data = load("digits", imbalance=10)
    config = configure("digits", method, 10, overrides={"epochs": 6})
    trained = train_stage1(config, data, options)
    assert accuracy(trained, data) > 0.5
    assert np.isfinite([row["train_loss"] for row in trained.histories[0]]).all()


# ----------------------------------------------------------------------------------------------------------- stage 2


def snapshot(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


@pytest.mark.parametrize("method", ["crt", "lws", "lws+las"])
def test_without_shift_stage2_leaves_the_backbone_as_it_is(digits, options, stage1, method):
    before = snapshot(stage1[0])
    train_stage2([digits_config(method, **{"stage2.epochs": 1})], stage1, digits, options)
    assert_equal(stage1[0].state_dict(), before)


def test_with_shift_only_the_running_statistics_change(digits, options, stage1):
    before = snapshot(stage1[0])
    train_stage2([digits_config("mislas", **{"stage2.epochs": 1})], stage1, digits, options)
    for name, value in stage1[0].state_dict().items():
        moved = name.endswith(("running_mean", "running_var", "num_batches_tracked"))
        assert torch.equal(value, before[name]) == (not moved), name


def test_stage2_of_mislas_is_sgd_on_smoothed_labels_of_balanced_batches(digits, options, trained):
    """Against a loop of its own: equations (1), (3) and (4) written out, torch's SGD, a cosine's two rates."""
    config = digits_config("mislas", **{"stage2.epochs": 2, "stage2.lr": 0.02})
    stage, (network, classifier) = config.stage2, copy.deepcopy(trained)
    network.train()  # its statistics shift
    scale, delta, bias = torch.ones(10), torch.zeros(10, 64), torch.zeros(10)
    for parameter in (scale, delta, bias):
        parameter.requires_grad_()
    groups = [{"params": [scale]}, {"params": [delta, bias]}]
    optimizer = torch.optim.SGD(groups, 1.0, stage.momentum, weight_decay=stage.weight_decay, foreach=False)
    counts = torch.tensor(digits.class_counts, dtype=torch.float64)
    rise = (torch.pi / 2 * (counts - counts.min()) / (counts.max() - counts.min())).sin()
    eps = (stage.eps_k + (stage.eps_1 - stage.eps_k) * rise).float()
    smoothed = torch.diag(1 - eps) + (1 - torch.eye(10)) * (eps / 9)[:, None]
    images = Images(digits.train_images, digits.spec.mean, digits.spec.std, padding=1)
    weight, constant = classifier.weight.detach(), classifier.bias.detach()
    targets, expected = digits.train_targets.numpy(), []
    for epoch, rate in enumerate((0.02, 0.01)):
        for group, ratio in zip(optimizer.param_groups, (1, stage.delta_lr), strict=True):
            group["lr"] = rate * ratio
        rng, total = host_rng(config.seed, "stage2", epoch), 0.0
        for batch, _, _ in draw_batches(rng, targets, stage, 1, False, torch.device("cpu"), "class_balanced"):
            with torch.no_grad():
                features = network(images.batch(*batch))
            logits = scale * (features @ (weight + delta).T + constant + bias)
            loss = F.cross_entropy(logits, smoothed[digits.train_targets[batch[0]]])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch[0])
        expected.append(total / len(targets))
    result = train_stage2([config], copy.deepcopy(trained), digits, options)
    np.testing.assert_allclose([row["train_loss"] for row in result.histories[0]], expected, rtol=1e-4)
    found, found_bias = result.heads[0].effective()
    torch.testing.assert_close(found, scale[:, None] * (weight + delta), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found_bias, scale * (constant + bias), atol=1e-4, rtol=1e-4)


def test_statistics_that_are_shifted_first_stay_while_the_classifier_learns(digits, options, stage1):
    """As a rule leaves them that shifts alike; and no batch of the classifier's moves them on."""
    changes = {"shift_epochs": 1, "shift_sampler": "instance_balanced"}
    moved = copy.deepcopy(stage1)
    adjust([digits_config("logit-adjustment", **changes)], moved, digits, options)
    before = snapshot(stage1[0])
    configs = [digits_config(method, **changes, **{"stage2.epochs": 2}) for method in ("crt", "lws")]
    train_stage2(configs, stage1, digits, options)
    assert not torch.equal(stage1[0].bn.running_mean, before["bn.running_mean"])
    assert_equal(stage1[0].state_dict(), moved[0].state_dict())


class Scales(nn.Module):
    """LWS, as a classifier of one's own."""

    def __init__(self, stage1, class_counts):
        super().__init__()
        self.stage1, self.scale = stage1, nn.Parameter(torch.ones(len(class_counts)))

    def forward(self, features):
        return self.scale * self.stage1(features)


def test_a_classifier_of_your_own_learns_as_the_same_one_of_equation_4(digits, options, trained, monkeypatch):
    monkeypatch.setitem(CLASSIFIERS, "scales", Scales)
    before = copy.deepcopy(trained[1].state_dict())
    lws, own = digits_config("lws"), digits_config("lws", classifier="scales")
    both = train_stage2([lws, own], trained, digits, options)
    one, other = both.heads
    assert (one.scale - 1).abs().max() > 0.01
    torch.testing.assert_close(other.scale, one.scale, atol=1e-4, rtol=1e-4)
    losses = [[row["train_loss"] for row in history] for history in both.histories]
    np.testing.assert_allclose(*losses, atol=1e-4)
    assert_equal(before, trained[1].state_dict())
    assert_equal(before, other.stage1.state_dict())


def test_a_classifier_of_your_own_starts_from_the_seed_in_training_mode(digits, options, trained, monkeypatch):
    seen = []

    class New(nn.Linear):
        def __init__(self, stage1, class_counts):
            super().__init__(stage1.in_features, len(class_counts))

        def forward(self, features):
            if features.any():  # the training's
                seen.append(self.training)
            return super().forward(features)

    monkeypatch.setitem(CLASSIFIERS, "new", New)
    looking = replace(options, eval_every=1)

    def looks(network, heads):
        predict(network, heads, Images(digits.test_images[:4], digits.spec.mean, digits.spec.std, padding=0))
        return [{} for _ in heads]

    config = digits_config("crt", classifier="new", **{"stage2.epochs": 2})
    first = train_stage2([config], trained, digits, looking, evaluate=looks).heads[0]
    assert seen.count(False) == 1  # in the look after the first epoch
    assert seen[-1]
    again = train_stage2([config], trained, digits, options).heads[0]
    assert_equal(first.state_dict(), again.state_dict())
    other = train_stage2([config.override({"stage2.draw": 1})], trained, digits, options).heads[0]
    assert not torch.equal(first.weight, other.weight)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda stage1, class_counts: nn.Linear(64, 9), r"logit of every class.*shape \(2, 10\) for two.*\(2, 9\)"),
        (lambda stage1, class_counts: stage1, "no parameter that learns"),
        (lambda stage1, class_counts: stage1.forward, r"torch\.nn\.Module, got <"),
    ],
)
def test_a_classifier_that_cannot_be_trained_is_refused(digits, options, trained, monkeypatch, make, message):
    monkeypatch.setitem(CLASSIFIERS, "mine", make)
    with pytest.raises(MislasError, match=f"^classifier 'mine' .*{message}"):
        train_stage2([digits_config("crt", classifier="mine")], trained, digits, options)


def test_another_draw_of_stage2_has_other_batches_and_weights_on_the_same_stage1(digits, options, trained):
    def learned(method, **changes):
        config = digits_config(method, **{"stage2.epochs": 1} | changes)
        assert config.stage1_only == digits_config(method).stage1_only
        return train_stage2([config], copy.deepcopy(trained), digits, options).heads[0].effective()[0]

    for method in ("crt", "lws", "mislas"):
        own, one, two, again = (learned(method, **more) for more in ({}, {"draw": 1}, {"draw": 2}, {"draw": 1}))
        assert torch.equal(one, again)
        assert not torch.equal(own, one)
        assert not torch.equal(one, two)
    with pytest.raises(MislasError, match="must share Stage-1"):
        train_stage2([digits_config("lws"), digits_config("crt", draw=1)], trained, digits, options)


def test_a_resumed_stage2_does_not_shift_again(digits, options, stage1, tmp_path, killed, monkeypatch):
    """The checkpoint has the statistics."""
    config = digits_config("crt", shift_epochs=1, **{"stage2.epochs": 2})
    whole = train_stage2([config], copy.deepcopy(stage1), digits, options)
    path, steps = tmp_path / "run.ckpt", -(-len(digits.train_targets) // config.stage2.batch_size)
    with killed(2 * steps + 1):  # in the second epoch after that of the shift
        train_stage2([config], copy.deepcopy(stage1), digits, replace(options, checkpoint_every=0), path)
    monkeypatch.setattr(mislas.train, "shift_statistics", None)
    resumed = train_stage2([config], stage1, digits, options, path)
    for one, two in zip((whole.backbone, *whole.heads), (resumed.backbone, *resumed.heads), strict=True):
        assert_equal(one.state_dict(), two.state_dict())


def test_the_seconds_of_a_run_count_its_shift_once(digits, options, stage1, tmp_path, killed, monkeypatch):
    config, path = digits_config("crt", shift_epochs=1, **{"stage2.epochs": 2}), tmp_path / "run.ckpt"
    monkeypatch.setattr(mislas.train, "shift_statistics", lambda *_: time.sleep(1))
    steps = -(-len(digits.train_targets) // config.stage2.batch_size)
    with killed(steps + 1):
        train_stage2([config], copy.deepcopy(stage1), digits, replace(options, checkpoint_every=0), path)
    monkeypatch.setattr(mislas.train, "shift_statistics", None)
    assert train_stage2([config], stage1, digits, options, path).seconds > 1


def test_shifted_statistics_are_the_exponential_average_over_batches(digits, options, stage1):
    network = stage1[0]
    mean, var = (getattr(network.bn, f"running_{name}").double().numpy() for name in ("mean", "var"))
    seen = []
    network.bn.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].double().numpy()))
    train_stage2([digits_config("mislas", **{"stage2.epochs": 1})], stage1, digits, options)
    assert len(seen) == -(-len(digits.train_targets) // 32)
    for x in seen:
        mean = 0.9 * mean + 0.1 * x.mean(axis=(0, 2, 3))
        var = 0.9 * var + 0.1 * x.var(axis=(0, 2, 3), ddof=1)
    np.testing.assert_allclose(network.bn.running_mean, mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(network.bn.running_var, var, rtol=1e-4)


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_statistics_of_a_cumulative_shift_are_means_over_its_batches(digits, options, stage1, tmp_path, killed, when):
    """Also of a run that was stopped and resumed."""
    shift = {"shift_bn": False, "shift_epochs": 2} if when == "before" else {"stage2.epochs": 2}
    config = digits_config("mislas", shift_average="cumulative", **shift)
    network = copy.deepcopy(stage1[0])
    seen = []
    network.bn.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].double().numpy()) if module.training else None
    )
    whole = train_stage2([config], (network, stage1[1]), digits, options)
    assert len(seen) == 2 * -(-len(digits.train_targets) // 32)
    mean = np.mean([x.mean(axis=(0, 2, 3)) for x in seen], axis=0)
    var = np.mean([x.var(axis=(0, 2, 3), ddof=1) for x in seen], axis=0)
    np.testing.assert_allclose(network.bn.running_mean, mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(network.bn.running_var, var, rtol=1e-4)

    path = tmp_path / "run.ckpt"
    with killed(len(seen) // 2 + 1):
        train_stage2([config], copy.deepcopy(stage1), digits, replace(options, checkpoint_every=0), path)
    resumed = train_stage2([config], stage1, digits, options, path)
    assert_equal(whole.backbone.state_dict(), resumed.backbone.state_dict())
    assert_equal(whole.heads[0].state_dict(), resumed.heads[0].state_dict())


def test_heads_trained_together_are_those_trained_alone(digits, options, trained):
    configs = [digits_config(method, **{"stage2.epochs": 2}) for method in ("crt", "lws", "lws+las")]
    together = train_stage2(configs, copy.deepcopy(trained), digits, options)
    for i, config in enumerate(configs):
        alone = train_stage2([config], copy.deepcopy(trained), digits, options)
        assert_equal(together.heads[i].state_dict(), alone.heads[0].state_dict())
        assert together.histories[i] == alone.histories[0]


def test_heads_trained_together_keep_their_own_optimisers(digits, options, trained):
    changes = {"schedule": "multistep", "momentum": 0.0, "weight_decay": 0.1}
    configs = [digits_config("crt"), digits_config("crt", **{f"stage2.{name}": v for name, v in changes.items()})]
    together = train_stage2(configs, copy.deepcopy(trained), digits, options)
    for head, config in zip(together.heads, configs, strict=True):
        alone = train_stage2([config], copy.deepcopy(trained), digits, options)
        assert_equal(head.state_dict(), alone.heads[0].state_dict())


def test_a_head_trains_on_what_stage1_did_not_hold_out(digits, options, stage1, monkeypatch):
    seen = []
    monkeypatch.setattr("mislas.train.batches_of", lambda data, *rest: seen.append(data) or batches_of(data, *rest))
    train_stage2([digits_config("crt", holdout=0.1, **{"stage2.epochs": 1})], stage1, digits, options)
    assert [len(data.train_targets) for data in seen] == [len(digits.hold_out(0.1)[0].train_targets)]


def test_heads_trained_together_under_shift_are_those_trained_alone(digits, options, trained):
    configs = [digits_config("mislas", **{"stage2.epochs": 1, "eps_1": eps}) for eps in (0.1, 0.4)]
    together = train_stage2(configs, copy.deepcopy(trained), digits, options)
    for head, config in zip(together.heads, configs, strict=True):
        alone = train_stage2([config], copy.deepcopy(trained), digits, options)
        assert_equal(head.state_dict(), alone.heads[0].state_dict())
        assert_equal(together.backbone.state_dict(), alone.backbone.state_dict())


def test_runs_that_see_other_features_do_not_train_together(digits, options, stage1):
    with pytest.raises(MislasError, match="must share Stage-1"):
        train_stage2([digits_config("lws"), digits_config("mislas")], stage1, digits, options)


# ------------------------------------------------------------------------------------ what modules of one's own draw


class Forgetful(nn.Sequential):
    """A network with dropout, which draws its masks from PyTorch's own generator."""

    num_features = 24

    def __init__(self):
        super().__init__(nn.Conv2d(3, 24, 3, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5))


def forgetful_classifier(classifier, class_counts):
    return nn.Sequential(nn.Dropout(0.5), nn.Linear(classifier.in_features, len(class_counts)))


@pytest.fixture
def own_modules(monkeypatch):
    monkeypatch.setitem(BACKBONES, "forgetful", Forgetful)
    monkeypatch.setitem(CLASSIFIERS, "forgetful", forgetful_classifier)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_run_whose_modules_draw_repeats_and_resumes_to_the_bit(
    own_modules, digits, options, trained, tmp_path, killed, stage
):
    config = digits_config("ce", backbone="forgetful", epochs=2)
    if stage == "stage2":
        config = digits_config("crt", **{"stage2.classifier": "forgetful", "stage2.epochs": 2})

    def train(options=options, checkpoint=None):
        if stage == "stage1":
            return train_stage1(config, digits, options, checkpoint)
        return train_stage2([config], copy.deepcopy(trained), digits, options, checkpoint)

    def weights(run):
        return [run.heads[0].state_dict(), run.backbone.state_dict()]

    first = weights(train())
    torch.manual_seed(7)  # whatever drew before
    assert_equal(weights(train()), first)
    path, per_epoch = tmp_path / "run.ckpt", -(-len(digits.train_targets) // 32)
    with killed(per_epoch + 3):
        train(replace(options, checkpoint_every=0), path)
    assert path.exists()
    assert_equal(weights(train(checkpoint=path)), first)
    assert first[0].keys() != {"weight", "bias"} or stage == "stage1"


def test_masks_differ_between_epochs_and_steps(own_modules, digits, options, monkeypatch):
    masks = []
    monkeypatch.setattr(
        nn.Dropout, "forward", lambda self, x: masks.append(F.dropout(torch.ones(8), 0.5, self.training)) or x
    )
    train_stage1(digits_config("ce", backbone="forgetful", epochs=3), digits, options)
    assert len(masks) > 6
    assert len(set(map(tuple, torch.stack(masks).tolist()))) > len(masks) / 2


def test_heads_that_draw_are_trained_together_as_alone(own_modules, digits, options, trained):
    own = {"stage2.classifier": "forgetful", "stage2.epochs": 2}
    configs = [digits_config("crt", **own), digits_config("lws"), digits_config("crt", **own | {"stage2.lr": 0.05})]
    configs[1] = configs[1].override({"stage2.epochs": 2, "stage2.sampler": configs[0].stage2.sampler})
    together = train_stage2(configs, copy.deepcopy(trained), digits, options)
    for head, config in zip(together.heads, configs, strict=True):
        alone = train_stage2([config], copy.deepcopy(trained), digits, options)
        assert_equal(head.state_dict(), alone.heads[0].state_dict())


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_training_leaves_the_caller_its_random_numbers(digits, options, trained, stage):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    train(stage, digits, options, trained)
    assert torch.equal(torch.rand(4), expected)


# ------------------------------------------------------------------------------------------- checkpoints and resuming


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_run_killed_within_an_epoch_and_resumed_equals_one_never_stopped(
    digits, options, trained, tmp_path, monkeypatch, killed, kill_after, stage
):
    options = replace(options, checkpoint_every=0)
    per_epoch = -(-len(digits.train_targets) // 32)
    with killed(2 * per_epoch + 5):
        train(stage, digits, options, trained, tmp_path / "killed")
    assert torch.load(tmp_path / "killed")["epoch"] == 2
    with monkeypatch.context() as patch:
        kill_after(patch, 2 * per_epoch)  # no epoch that is in the checkpoint is trained again
        resumed = train(stage, digits, options, trained, tmp_path / "killed")
    whole = train(stage, digits, options, trained, tmp_path / "whole")
    assert resumed.histories == whole.histories
    for one, two in zip((resumed.backbone, *resumed.heads), (whole.backbone, *whole.heads), strict=True):
        assert_equal(one.state_dict(), two.state_dict())
    assert_equal(torch.load(tmp_path / "killed"), torch.load(tmp_path / "whole"))  # momentum too


def test_a_run_killed_after_its_last_epoch_is_not_trained_again(digits, options, tmp_path, monkeypatch, kill_after):
    config = digits_config("ce", epochs=1)
    first = train_stage1(config, digits, options, tmp_path / "checkpoint")
    kill_after(monkeypatch, 0)
    second = train_stage1(config, digits, options, tmp_path / "checkpoint")
    assert_equal(first.backbone.state_dict(), second.backbone.state_dict())
    assert first.histories == second.histories


def test_out_of_time_stops_after_an_epoch_with_a_checkpoint(digits, options, tmp_path, near):
    with pytest.raises(OutOfTime, match="after epoch 1 of 4"):
        train_stage1(digits_config("ce"), digits, replace(options, deadline=near), tmp_path / "checkpoint")
    assert torch.load(tmp_path / "checkpoint")["epoch"] == 1


def test_a_shift_does_not_outlast_the_deadline(digits, stage1, options, monkeypatch):
    config = digits_config("crt", **{"stage2.shift_epochs": 2})
    monkeypatch.setattr("mislas.train.time", SimpleNamespace(monotonic=lambda: 10.0))
    with pytest.raises(OutOfTime, match="within the shift of batch norm, which starts again"):
        train_stage2([config], stage1, digits, replace(options, deadline=5))


def test_an_epoch_does_not_outlast_the_deadline(digits, options, tmp_path, monkeypatch):
    """It is looked for between two steps. What the epochs before have done is kept."""
    now, path, config = [0.0], tmp_path / "checkpoint", digits_config("ce", epochs=3)
    monkeypatch.setattr("mislas.train.time", SimpleNamespace(monotonic=lambda: now[0]))

    def slow(*_):  # after the first epoch an hour has gone
        now[0] += 3600
        return [{}]

    options = replace(options, eval_every=1, deadline=3)
    with pytest.raises(OutOfTime, match="after epoch 1 of 3"):
        train_stage1(config, digits, options, path, slow)
    kept = torch.load(path)
    with pytest.raises(OutOfTime, match="within epoch 2 of 3, which starts again"):
        train_stage1(config, digits, options, path, slow)
    assert_equal(torch.load(path), kept)


def test_time_left_is_held_against_the_epochs_seen_and_adds_up_over_starts(digits, options, tmp_path, monkeypatch):
    """10 s an epoch, and the time of 1.2 of them and 2 s must be left."""
    now = [0.0]
    monkeypatch.setattr("mislas.train.time", SimpleNamespace(monotonic=lambda: now[0]))

    def evaluate(network, heads):
        now[0] += 10
        return [{}]

    config, path, options = digits_config("ce", epochs=9), tmp_path / "run.ckpt", replace(options, eval_every=1)
    for deadline, after in ((25, 2), (53, 4)):
        with pytest.raises(OutOfTime, match=f"after epoch {after} of 9"):
            train_stage1(config, digits, replace(options, deadline=deadline), path, evaluate)
        assert torch.load(path)["seconds"] == 10 * after


@pytest.mark.parametrize("methods", [["ce"], ["lws+las", "lws"]])
def test_a_run_that_diverges_stops_at_once_and_says_which_rate_to_lower(digits, options, stage1, tmp_path, methods):
    stage = f"stage{len(methods)}"
    configs = [digits_config(method) for method in methods]
    configs[-1] = configs[-1].override({f"{stage}.lr": 1e30})
    path, options = tmp_path / "run.ckpt", replace(options, checkpoint_every=0)
    start = partial(train_stage1, configs[0]) if stage == "stage1" else partial(train_stage2, configs, stage1)
    with pytest.raises(MislasError, match=rf"{stage} {methods[-1]} seed 0 diverged.*--set {stage}.lr="):
        start(digits, options, path)
    assert not path.exists()


def test_a_full_disk_is_told_from_other_errors(digits, options, tmp_path, full_disk):
    path = tmp_path / "run.ckpt"
    with full_disk(), pytest.raises(OSError, match=re.escape(str(path))):
        train_stage1(digits_config("ce"), digits, replace(options, checkpoint_every=0), path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_weights_that_explode_in_the_last_step_are_seen_before_a_checkpoint(digits, options, trained, tmp_path, stage):
    few, path = digits.only(torch.arange(len(digits.train_targets)) < 32), tmp_path / "run.ckpt"
    config = digits_config("ce" if stage == "stage1" else "crt", **{f"{stage}.epochs": 1, f"{stage}.lr": 1e30})
    train = (
        partial(train_stage1, config) if stage == "stage1" else partial(train_stage2, [config], copy.deepcopy(trained))
    )
    with pytest.raises(Diverged, match=rf"{stage} .* diverged: its weights are not finite"):
        train(few, options, path)
    assert not path.exists()


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.99])
def test_a_checkpoint_cut_short_is_refused_and_left_alone(digits, options, tmp_path, keep):
    config, path = digits_config("ce", epochs=1), tmp_path / "run.ckpt"
    train_stage1(config, digits, options, path)
    content = path.read_bytes()
    content = content[: keep if keep >= 1 else int(keep * len(content))]
    path.write_bytes(content)
    with pytest.raises(RecordError, match=r"run\.ckpt cannot be read .*delete it to start the run afresh") as caught:
        train_stage1(config, digits, options, path)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == content


def test_a_checkpoint_of_another_run_is_refused_and_left_alone(digits, options, tmp_path):
    path = tmp_path / "run.ckpt"
    train_stage1(digits_config("ce", epochs=1), digits, options, path)
    content = path.read_bytes()
    with pytest.raises(RecordError, match=r"run\.ckpt belongs to other runs; delete it") as caught:
        train_stage1(digits_config("ce", epochs=2), digits, options, path)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == content


def test_a_checkpoint_of_other_images_is_refused_and_left_alone(digits, options, tmp_path):
    config, path = digits_config("ce", epochs=1), tmp_path / "run.ckpt"
    train_stage1(config, digits, options, path)
    content = path.read_bytes()
    other = replace(digits, train_images=255 - digits.train_images)
    with pytest.raises(RecordError, match=r"other images \(checksum \w{16}, now \w{16}\); bring those back"):
        train_stage1(config, other, options, path)
    assert path.read_bytes() == content


def test_a_batch_of_one_is_one_line_where_batch_norm_cannot_take_it(digits, options):
    config = digits_config("ce", backbone="resnet10", batch_size=1)
    with pytest.raises(MislasError, match=r"batch norm cannot train on a batch of 1 image\(s\) of this size"):
        train_stage1(config, digits, options)


# ------------------------------------------------------------------------------------------------------------- speed


@pytest.mark.skipif(not torch.cuda.is_available(), reason="counts the host's waits for a GPU")
@pytest.mark.parametrize("method", ["ce", "mixup", "remix+drw", "cutmix", "ldam", "bbn", "lifted", "range", "mislas"])
def test_the_host_waits_for_the_gpu_once_an_epoch_not_once_a_step(digits, method):
    def waits(batch_size):
        sizes = {"batch_size": batch_size, "stage2.batch_size": batch_size}
        config, options = digits_config(method, **sizes), Options(device="cuda", progress=False)
        trained = train_stage1(config.stage1_only, digits, options)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                if config.stage2 is None:
                    train_stage1(config, digits, options)
                else:
                    train_stage2([config], (trained.backbone, trained.heads[0]), digits, options)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing" in str(warning.message) for warning in seen)

    assert waits(16) == waits(64)


# ----------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("device", ["tpu", "cuda:99"])
def test_a_device_that_is_not_there_is_refused_in_one_line(device):
    with pytest.raises(MislasError, match=f"device '{device}' cannot be used here .*try 'cpu'") as caught:
        Options(device=device).torch_device()
    assert "\n" not in str(caught.value)


def test_a_loss_that_would_learn_is_refused(monkeypatch, digits):
    """Nothing would train it, and every result would be that of its first value."""
    scale = torch.nn.Parameter(torch.ones(()))
    monkeypatch.setitem(LOSSES, "mine", LossSpec(lambda class_counts: lambda z, y: cross_entropy(scale * z, y)))
    config = digits_config("ce").override({"stage1.loss": "mine"})
    with pytest.raises(MislasError, match="loss 'mine' has parameters that learn; only network and classifier"):
        train_stage1(config, digits, Options(device="cpu", progress=False))


def test_a_device_of_another_kind_is_refused():
    with pytest.raises(MislasError, match="device 'meta' is not supported; use 'cpu', 'cuda' or None"):
        Options(device="meta").torch_device()


def test_a_loss_that_gives_a_mean_is_refused(monkeypatch, digits):
    """As functional losses do by default: class weights and mixed labels would silently do nothing."""
    monkeypatch.setitem(LOSSES, "mine", LossSpec(lambda class_counts: torch.nn.functional.cross_entropy))
    config = digits_config("ce").override({"stage1.loss": "mine"})
    with pytest.raises(MislasError, match=r"loss 'mine' must give the loss of every image, .* gave shape \(\)"):
        train_stage1(config, digits, Options(device="cpu", progress=False))
