"""Numbers as text, against cases worked by hand; runs are made up."""

from mislas.cells import difference, paired, percent, points
from mislas.report import Outcome


def test_percent_is_mean_and_sample_standard_deviation():
    assert percent([0.5]) == "50.0"
    assert percent([0.5, 0.6]) == "55.0 ± 7.1"  # sd of (50, 60) with n - 1 is 10 / sqrt(2)


def test_difference_has_the_standard_error_of_a_paired_difference(made_up):
    new = made_up("cifar10", "lws", right=(1, 1, 1, 0))
    old = made_up("cifar10", "crt", right=(1, 0, 1, 1))
    # per image 0, 1, 0, -1: mean 0, standard deviation sqrt(2 / 3), over the root of 4 images
    assert difference([new], [old]) == "+0.0 ± 40.8"


def test_half_a_digit_has_one_text_however_it_was_summed():
    assert {points(0.25 + noise) for noise in (1e-12, -1e-12)} == {"+0.2"}
    assert {points(-0.25 + noise) for noise in (1e-12, -1e-12)} == {"-0.2"}
    assert points(-1e-9) == "+0.0"
    assert str(Outcome([], [], ["a run"], ["another"], 0.25 + 1e-12)) == "+0.2"


def test_difference_averages_seeds_image_by_image(made_up):
    new = [made_up("cifar10", "lws", seed=seed, right=right) for seed, right in enumerate([(1, 1), (1, 0)])]
    old = [made_up("cifar10", "crt", seed=seed, right=right) for seed, right in enumerate([(1, 0), (0, 0)])]
    # per image (1 - 0.5, 0.5 - 0): both 0.5, so no spread
    assert difference(new, old) == "+50.0 ± 0.0"


def test_paired_keeps_equal_data_and_seeds(made_up):
    new = [made_up("cifar10", "lws", seed=seed) for seed in (0, 1, 2)]
    old = [made_up("cifar10", "crt", seed=2), made_up("cifar10", "crt", seed=0), made_up("cifar10-jpeg", "crt", seed=1)]
    both = paired(new, old)
    assert [[r.config.seed for r in records] for records in both] == [[0, 2], [0, 2]]
    assert paired(new, []) == ([], [])
