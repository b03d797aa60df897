import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize

from mislas.errors import MislasError
from mislas.losses import (
    LOSSES,
    cross_entropy,
    effective_number_weights,
    focal,
    label_aware_smoothing,
    ldam,
    logit_adjusted,
    mean,
    smoothing_factors,
)

rng = np.random.default_rng(0)
LOGITS = torch.from_numpy(3 * rng.standard_normal((30, 4)))
TARGETS = torch.arange(30) % 4
FACTORS = torch.tensor([0.4, 0.3, 0.15, 0.0])

SHAPES = [("concave", None), ("linear", None), ("convex", None), ("power", 2.0), ("power", 0.5)]


# ---------------------------------------------------------------------------------------------------------- factors


@pytest.mark.parametrize(("form", "power"), SHAPES)
def test_the_largest_class_gets_eps_1_and_the_smallest_eps_k(form, power):
    factors = smoothing_factors([500, 100, 30, 5], 0.4, 0.1, form, power)
    assert factors[0].item() == pytest.approx(0.4, abs=1e-7)
    assert factors[-1].item() == pytest.approx(0.1, abs=1e-7)
    assert (factors.diff() < 0).all()


@pytest.mark.parametrize(
    ("form", "power", "middle"),
    [
        ("concave", None, 0.1 + 0.3 * 0.70710678),  # sin(pi / 4)
        ("linear", None, 0.25),
        ("convex", None, 0.4 - 0.3 * 0.70710678),  # sin(3 pi / 2 + pi / 4)
        ("power", 2.0, 0.1 + 0.3 * 0.25),
        ("power", 0.5, 0.1 + 0.3 * 0.70710678),
    ],
)
def test_a_class_halfway_between_by_hand(form, power, middle):
    assert smoothing_factors([10, 7, 4], 0.4, 0.1, form, power)[1].item() == pytest.approx(middle, abs=1e-6)


def test_a_third_of_the_way_up_the_concave_form_is_halfway():
    assert smoothing_factors([40, 20, 10], 0.5, 0.0)[1].item() == pytest.approx(0.25)  # sin(pi / 6) = 1 / 2


def test_power_1_is_linear():
    counts = [50, 31, 7, 3]
    np.testing.assert_allclose(
        smoothing_factors(counts, 0.4, 0.1, "power", 1.0), smoothing_factors(counts, 0.4, 0.1, "linear"), atol=1e-7
    )


@pytest.mark.parametrize(("form", "power"), SHAPES)
def test_classes_may_come_in_any_order(form, power):
    counts, order = np.array([500, 100, 30, 5]), [2, 0, 3, 1]
    expected = smoothing_factors(counts, 0.4, 0.1, form, power)[order]
    assert torch.equal(smoothing_factors(counts[order], 0.4, 0.1, form, power), expected)


@pytest.mark.parametrize(("form", "power"), SHAPES)
def test_equally_large_classes_all_get_eps_1(form, power):
    np.testing.assert_allclose(smoothing_factors([7, 7, 7], 0.4, 0.1, form, power), [0.4] * 3)


@pytest.mark.parametrize(
    ("eps_1", "eps_k"), [(0.1, 0.2), (0.3, -0.1), (1.1, 0.0), (-0.1, -0.2), (float("nan"), 0.0), (0.3, float("nan"))]
)
def test_eps_out_of_range_is_refused(eps_1, eps_k):
    with pytest.raises(MislasError, match=r"0 <= eps_k <= eps_1 <= 0\.5") as caught:
        smoothing_factors([10, 5], eps_1, eps_k)
    assert "\n" not in str(caught.value)


def test_eps_beyond_the_papers_range_warns():
    with pytest.warns(UserWarning, match="eps_1=0.6 is outside the paper's range"):
        factors = smoothing_factors([10, 5], 0.6, 0.1)
    np.testing.assert_allclose(factors, [0.6, 0.1])


@pytest.mark.filterwarnings("error")
def test_eps_at_the_ends_of_the_range_does_not_warn():
    np.testing.assert_allclose(smoothing_factors([10, 5], 0.5, 0.5), [0.5, 0.5])
    np.testing.assert_allclose(smoothing_factors([10, 5], 0.0, 0.0), [0.0, 0.0])


@pytest.mark.parametrize(
    ("form", "power"),
    [("power", None), ("power", 0.0), ("power", -1.0), ("power", float("nan")), ("concave", 2.0), ("linear", 2.0)],
)
def test_a_power_belongs_to_the_power_form_and_is_positive(form, power):
    with pytest.raises(MislasError, match="power > 0 goes with form='power' and no other"):
        smoothing_factors([10, 5], 0.4, 0.1, form, power)


def test_an_unknown_form_lists_the_known_ones():
    with pytest.raises(MislasError, match=r"unknown form .*'concav'; did you mean 'concave'\? Known: .*linear"):
        smoothing_factors([10, 5], 0.4, 0.1, "concav")


def test_a_class_without_images_is_refused():
    with pytest.raises(MislasError, match="class 1 has no image"):
        smoothing_factors([10, 0, 5], 0.4, 0.1)


# ------------------------------------------------------------------------------------------------------------- loss


def q_of_equation_1():
    q = np.empty((30, 4))
    for row, y in zip(q, TARGETS.tolist(), strict=True):
        eps = FACTORS[y].item()
        row[:] = eps / 3
        row[y] = 1 - eps
    return q


def test_it_is_cross_entropy_against_q_of_equation_1():
    p = np.exp(LOGITS.numpy())
    p /= p.sum(axis=1, keepdims=True)
    by_hand = -(q_of_equation_1() * np.log(p)).sum(axis=1).mean()
    assert label_aware_smoothing(FACTORS)(LOGITS, TARGETS).mean().item() == pytest.approx(by_hand, abs=1e-7)


def test_it_is_torchs_cross_entropy_with_q_as_target():
    expected = F.cross_entropy(LOGITS, torch.from_numpy(q_of_equation_1())).item()
    assert label_aware_smoothing(FACTORS)(LOGITS, TARGETS).mean().item() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.4])
def test_over_all_classes_with_equal_factors_it_is_torchs_label_smoothing(eps):
    loss = label_aware_smoothing(torch.full((4,), eps), over="all")
    expected = F.cross_entropy(LOGITS, TARGETS, label_smoothing=eps).item()
    assert loss(LOGITS, TARGETS).mean().item() == pytest.approx(expected, abs=1e-6)


def test_over_all_classes_with_unequal_factors_q_keeps_a_share_of_its_own():
    q = F.one_hot(TARGETS, 4) * (1 - FACTORS[TARGETS, None]) + FACTORS[TARGETS, None] / 4
    expected = F.cross_entropy(LOGITS, q.double()).item()
    assert label_aware_smoothing(FACTORS, over="all")(LOGITS, TARGETS).mean().item() == pytest.approx(
        expected, abs=1e-7
    )


@pytest.mark.parametrize("over", ["others", "all"])
def test_without_smoothing_it_is_cross_entropy(over):
    loss = label_aware_smoothing(torch.zeros(4), over=over)(LOGITS, TARGETS).mean().item()
    assert loss == pytest.approx(F.cross_entropy(LOGITS, TARGETS).mean().item(), abs=1e-12)


def test_cross_entropy_is_minus_log_p_of_the_true_class():
    p = np.exp(LOGITS.numpy())
    own = (p / p.sum(axis=1, keepdims=True))[np.arange(30), TARGETS]
    assert cross_entropy(LOGITS, TARGETS).mean().item() == pytest.approx(-np.log(own).mean(), abs=1e-12)


@pytest.mark.parametrize("eps", [0.05, 0.3, 0.5])
@pytest.mark.parametrize("y", [0, 2])
def test_its_minimum_is_equation_2(eps, y):
    loss = label_aware_smoothing(torch.full((4,), eps, dtype=torch.float64))

    def value_and_gradient(z):
        z = torch.tensor(z[None], requires_grad=True)
        value = loss(z, torch.tensor([y])).mean()
        value.backward()
        return value.item(), z.grad[0].numpy()

    z = minimize(value_and_gradient, np.zeros(4), jac=True, method="BFGS", options={"gtol": 1e-10}).x
    gaps = z[y] - np.delete(z, y)
    np.testing.assert_allclose(gaps, np.log(3 * (1 - eps) / eps), atol=1e-6)


@pytest.mark.parametrize("over", ["others", "all"])
def test_its_gradient_is_that_of_finite_differences(over):
    loss = label_aware_smoothing(FACTORS, over=over)
    assert torch.autograd.gradcheck(lambda z: loss(z, TARGETS), LOGITS.clone().requires_grad_())


def test_logits_of_another_shape_are_refused():
    loss = label_aware_smoothing(FACTORS)
    for wrong in (LOGITS[:, :3], LOGITS[0]):
        with pytest.raises(MislasError, match=r"logits must be \(B, 4\)"):
            loss(wrong, TARGETS)


def test_an_unknown_spread_lists_the_known_ones():
    with pytest.raises(MislasError, match="unknown smoothing over 'other'; did you mean 'others'"):
        label_aware_smoothing(FACTORS, over="other")


# -------------------------------------------------------------------------------------- re-weighting, re-margining

COUNTS = [500, 100, 30, 5]
P = LOGITS.softmax(1)[torch.arange(30), TARGETS]


def test_focal_by_its_formula():
    expected = -((1 - P) ** 2) * P.log()
    torch.testing.assert_close(focal(2.0)(LOGITS, TARGETS), expected)


def test_focal_with_gamma_0_is_cross_entropy():
    torch.testing.assert_close(focal(0.0)(LOGITS, TARGETS), cross_entropy(LOGITS, TARGETS))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_has_a_finite_gradient_where_the_network_is_certain(gamma):
    logits = torch.tensor([[200.0, 0, 0, 0], [0, 200.0, 0, 0]], requires_grad=True)
    focal(gamma)(logits, torch.tensor([0, 0])).sum().backward()
    assert logits.grad.isfinite().all()


def test_effective_number_weights_by_hand():
    weights = effective_number_weights(
        [3, 1], 0.5
    )  # (1 - b) / (1 - b^n): 0.5 / 0.875 = 4/7 and 1; scaled to a sum of 2
    np.testing.assert_allclose(weights, [2 * (4 / 7) / (11 / 7), 2 / (11 / 7)], rtol=1e-6)


def test_effective_number_with_beta_0_weighs_all_alike():
    np.testing.assert_allclose(effective_number_weights(COUNTS, 0.0), [1.0] * 4)


def test_effective_number_towards_beta_1_is_inverse_frequency():
    inverse = 1 / np.array(COUNTS)
    np.testing.assert_allclose(effective_number_weights(COUNTS, 1 - 1e-9), 4 * inverse / inverse.sum(), rtol=1e-5)


def test_the_mean_with_class_weights_is_torchs_weighted_cross_entropy():
    weights = effective_number_weights(COUNTS, 0.99).double()
    expected = F.cross_entropy(LOGITS, TARGETS, weight=weights)
    assert mean(cross_entropy(LOGITS, TARGETS), weights[TARGETS]).item() == pytest.approx(expected.item(), abs=1e-12)


def test_ldam_without_margins_is_cross_entropy():
    torch.testing.assert_close(ldam(COUNTS, 0.0, 30.0)(LOGITS, TARGETS), cross_entropy(LOGITS, TARGETS))


def test_ldam_subtracts_scaled_margins_that_grow_with_rarity():
    margins = 0.5 * (5 / np.array(COUNTS)) ** 0.25  # C such that the rarest class has 0.5
    shifted = LOGITS.numpy() - 2 * np.eye(4)[TARGETS] * margins
    expected = F.cross_entropy(torch.from_numpy(shifted), TARGETS, reduction="none")
    torch.testing.assert_close(ldam(COUNTS, 0.5, 2.0)(LOGITS, TARGETS), expected, atol=1e-6, rtol=0)


def test_balanced_softmax_by_its_formula():
    odds = torch.tensor(COUNTS) * LOGITS.exp()
    expected = -(odds / odds.sum(1, keepdim=True))[torch.arange(30), TARGETS].log()
    torch.testing.assert_close(logit_adjusted(COUNTS, 1.0)(LOGITS, TARGETS), expected, atol=1e-6, rtol=0)


def test_logit_adjustment_0_is_cross_entropy():
    torch.testing.assert_close(logit_adjusted(COUNTS, 0.0)(LOGITS, TARGETS), cross_entropy(LOGITS, TARGETS))


@pytest.mark.parametrize("loss", [focal(0.5), focal(2.0), ldam(COUNTS, 0.5, 30.0), logit_adjusted(COUNTS, 1.0)])
def test_gradients_are_those_of_finite_differences(loss):
    assert torch.autograd.gradcheck(lambda z: loss(z, TARGETS), LOGITS.clone().requires_grad_())


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_gives_one_value_per_image(name):
    settings = {"eps_1": 0.3, "eps_k": 0.0, "form": "concave", "smoothing_over": "others"} | dict.fromkeys(
        ("gamma", "max_margin", "scale", "adjustment"), 0.5
    )
    loss = LOSSES[name].make(COUNTS, **{key: settings[key] for key in LOSSES[name].settings})
    assert loss(LOGITS, TARGETS).shape == (30,)


def test_a_class_without_images_has_no_weight():
    for make in (lambda: effective_number_weights([3, 0], 0.9), lambda: ldam([0, 3], 0.5, 30.0)):
        with pytest.raises(MislasError, match="has no image"):
            make()


def test_beta_outside_its_range_is_refused():
    with pytest.raises(MislasError, match=r"beta .* must be in \[0, 1\), got 1"):
        effective_number_weights(COUNTS, 1.0)


@pytest.mark.parametrize(
    "make", [lambda: focal(-0.5), lambda: ldam([9, 3], -0.1, 30.0), lambda: ldam([9, 3], 0.5, 0.0)]
)
def test_settings_outside_their_range_are_refused(make):
    with pytest.raises(MislasError, match=r"must be >= 0|needs max_margin"):
        make()
