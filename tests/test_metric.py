"""Metric losses against plain loops over pairs, hand-worked batches, their limits, and finite differences."""

import itertools
import math

import numpy as np
import pytest
import torch

from mislas.metric import METRICS, lifted_structured, range_loss

rng = np.random.default_rng(0)
FEATURES = torch.from_numpy(rng.standard_normal((14, 3)))
TARGETS = torch.tensor([0, 1, 0, 2, 0, 1, 0, 3, 2, 0, 4, 1, 4, 0])  # class 3 has one image; 2 and 4 have one pair


def lifted_by_loops(x, y, margin):
    x, y, total, pairs = x.numpy(), y.tolist(), 0.0, 0
    for i, j in itertools.combinations(range(len(y)), 2):
        if y[i] != y[j]:
            continue
        others = sum(
            math.exp(margin - math.dist(x[end], x[k])) for end in (i, j) for k in range(len(y)) if y[k] != y[end]
        )
        total += max(0.0, math.log(others) + math.dist(x[i], x[j])) ** 2
        pairs += 1
    return total / (2 * pairs)


def range_by_loops(x, y, k, margin, alpha, beta):
    x, y, intra = x.numpy(), y.numpy(), 0.0
    for c in set(y.tolist()):
        pairs = itertools.combinations(x[y == c], 2)
        largest = sorted((math.dist(a, b) ** 2 for a, b in pairs), reverse=True)[:k]
        if largest:
            intra += len(largest) / sum(1 / d for d in largest)
    centres = [x[y == c].mean(axis=0) for c in set(y.tolist())]
    nearest = min(math.dist(a, b) ** 2 for a, b in itertools.combinations(centres, 2))
    return alpha * intra + beta * max(0.0, margin - nearest)


@pytest.mark.parametrize("margin", [1.0, 0.2, -3.0])
def test_the_lifted_loss_is_equation_4_pair_by_pair(margin):
    expected = lifted_by_loops(FEATURES, TARGETS, margin)
    assert lifted_structured(FEATURES, TARGETS, margin).item() == pytest.approx(expected, rel=1e-10)
    assert expected > 0


def test_the_lifted_loss_by_hand():
    """Two images at 0 and 2 on a line, one of another class at 5: log(exp(1 - 5) + exp(1 - 3)) + 2, squared, halved."""
    value = lifted_structured(torch.tensor([[0.0], [2.0], [5.0]]), torch.tensor([7, 7, 1]))
    assert value.item() == pytest.approx(math.log1p(math.exp(-2)) ** 2 / 2, rel=1e-5)


def test_the_lifted_loss_is_0_once_classes_are_far_enough_apart():
    features = torch.tensor([[0.0], [0.1], [50.0]], requires_grad=True)
    value = lifted_structured(features, torch.tensor([0, 0, 1]))
    value.backward()
    assert value.item() == 0
    assert not features.grad.any()


@pytest.mark.parametrize("k", [1, 2, 3, 100])
@pytest.mark.parametrize("margin", [0.01, 30.0])
def test_the_range_loss_is_its_equations_class_by_class(k, margin):
    expected = range_by_loops(FEATURES, TARGETS, k, margin, 0.7, 0.3)
    assert range_loss(FEATURES, TARGETS, k, margin, 0.7, 0.3).item() == pytest.approx(expected, rel=1e-10)


def test_the_range_loss_by_hand():
    """Class 0 at 0, 1 and 2: squared distances 4, 1, 1, of which 4 and 1 have the harmonic mean 1.6. Its centre is 1
    away from class 1's, at 1 and 3: one squared distance, 4."""
    features, targets = torch.tensor([[0.0], [1.0], [2.0], [1.0], [3.0]]), torch.tensor([0, 0, 0, 1, 1])
    assert range_loss(features, targets, margin=1.0).item() == pytest.approx(1.6 + 4)
    assert range_loss(features, targets, margin=3.0).item() == pytest.approx(1.6 + 4 + 2)
    assert range_loss(features, targets, margin=3.0, alpha=0.5, beta=0.1).item() == pytest.approx(2.8 + 0.2)


@pytest.mark.parametrize(
    "loss", [lifted_structured, range_loss, lambda x, y: range_loss(x, y, margin=30.0), *METRICS.values()]
)
def test_gradients_are_those_of_finite_differences(loss):
    features = FEATURES.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, TARGETS), (features,))


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize(
    ("targets", "something"), [([0, 1, 2, 3], False), ([1, 1, 1, 1], True), ([5], False), ([0, 0, 0, 1], True)]
)
def test_a_batch_with_little_to_compare_has_a_finite_loss_and_gradient(name, targets, something):
    for equal in (False, True):  # two images may be the same: balanced samplers draw some twice
        points = torch.ones(len(targets), 3) if equal else FEATURES[: len(targets)].float()
        points = points.clone().requires_grad_()
        value = METRICS[name](points, torch.tensor(targets))
        value.backward()
        assert value.isfinite()
        assert points.grad.isfinite().all()
        if not something and name == "lifted":
            assert value.item() == 0


def test_one_class_has_no_other_to_be_far_from():
    one_class = torch.zeros(5, dtype=torch.int64)
    assert lifted_structured(FEATURES[:5], one_class).item() == 0
    assert range_loss(FEATURES[:5], one_class, margin=1e9, alpha=0.0).item() == 0


@pytest.mark.parametrize("name", METRICS)
def test_trained_metrics_see_directions_alone_and_classes_by_any_number(name):
    lengths = torch.from_numpy(rng.uniform(0.5, 9, (14, 1)))
    value = METRICS[name](FEATURES, TARGETS).item()
    assert METRICS[name](lengths * FEATURES, 17 * TARGETS).item() == pytest.approx(value, rel=1e-10)
