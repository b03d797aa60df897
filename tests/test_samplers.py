import numpy as np
import pytest
from scipy.stats import chisquare

from mislas.errors import MislasError
from mislas.samplers import SAMPLERS, class_balanced, class_cyclic, draw, instance_balanced, reverse

COUNTS = (30, 10, 4, 1)
TARGETS = np.random.default_rng(5).permutation(np.repeat(np.arange(4), COUNTS))


def test_instance_balanced_is_a_permutation():
    index = instance_balanced(np.random.default_rng(0), TARGETS)
    assert sorted(index) == list(range(45))
    assert index.tolist() != list(range(45))


def draws(times=1000):
    rng = np.random.default_rng(0)
    return np.concatenate([class_balanced(rng, TARGETS) for _ in range(times)])


def test_class_balanced_draws_classes_uniformly():
    assert chisquare(np.bincount(TARGETS[draws()])).pvalue > 0.01


def test_class_balanced_draws_the_images_of_a_class_uniformly():
    index = draws()
    for k in range(3):
        counts = np.bincount(index, minlength=45)[k == TARGETS]
        assert len(counts) == COUNTS[k]
        assert chisquare(counts).pvalue > 0.01


def test_class_balanced_draws_are_independent_of_the_one_before():
    classes = TARGETS[draws()]
    pairs = np.bincount(4 * classes[:-1:2] + classes[1::2], minlength=16)
    assert chisquare(pairs).pvalue > 0.01


@pytest.mark.parametrize("sampler", [class_balanced, reverse, class_cyclic])
def test_a_class_without_images_is_refused(sampler):
    with pytest.raises(MislasError, match="class 1 has no image to draw"):
        sampler(np.random.default_rng(0), np.array([0, 0, 2]))


def test_reverse_draws_a_class_with_odds_of_its_inverse_size():
    rng = np.random.default_rng(0)
    seen = np.bincount(TARGETS[np.concatenate([reverse(rng, TARGETS) for _ in range(1000)])])
    odds = 1 / np.array(COUNTS)
    assert chisquare(seen, seen.sum() * odds / odds.sum()).pvalue > 0.01


def test_class_cyclic_shows_four_of_every_class_in_a_cycle():
    classes = TARGETS[class_cyclic(np.random.default_rng(0), TARGETS)]
    whole = len(TARGETS) // 16 * 16
    for cycle in classes[:whole].reshape(-1, 4, 4):  # cycles of K classes, four of each in a row
        assert (cycle == cycle[:, :1]).all()
        assert sorted(cycle[:, 0]) == [0, 1, 2, 3]


def test_class_cyclic_uses_every_image_of_a_class_before_any_again():
    targets = np.repeat(np.arange(4), (100, 10, 4, 1))
    index = class_cyclic(np.random.default_rng(0), targets)
    for k in range(4):
        shown, members = index[targets[index] == k], np.flatnonzero(targets == k)
        for start in range(0, len(shown) - len(members) + 1, len(members)):
            assert sorted(shown[start : start + len(members)]) == members.tolist()
        last = shown[len(shown) // len(members) * len(members) :]
        assert len(set(last)) == len(last)


def test_class_cyclic_shuffles_classes_and_images_in_every_round():
    targets = np.repeat(np.arange(2), (60, 10))
    index = class_cyclic(np.random.default_rng(0), targets)
    rounds = index[targets[index] == 1][:30].reshape(3, 10)
    assert len({tuple(images) for images in rounds}) == 3
    first_of_cycles = targets[index[:64:8]]
    assert set(first_of_cycles) == {0, 1}


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_a_seed_decides_an_epoch_of_as_many_indices_as_images(sampler):
    one, two, other = (sampler(np.random.default_rng(seed), TARGETS).tolist() for seed in (1, 1, 2))
    assert one == two != other
    assert sampler(np.random.default_rng(1), TARGETS.tolist()).tolist() == one  # torchvision's targets are lists
    assert len(one) == 45
    assert set(one) <= set(range(45))


@pytest.mark.parametrize(
    "drawn",
    [
        lambda rng, targets: np.arange(len(targets) - 1),
        lambda rng, targets: np.ones(len(targets), bool),
        lambda rng, targets: np.arange(len(targets)) / 2,
        lambda rng, targets: np.arange(len(targets)) + 1,
        lambda rng, targets: np.arange(len(targets)) - 1,
    ],
    ids=["too few", "booleans", "fractions", "beyond the end", "negative"],
)
def test_a_sampler_that_draws_something_else_is_refused(monkeypatch, drawn):
    monkeypatch.setitem(SAMPLERS, "mine", drawn)
    with pytest.raises(MislasError, match="sampler 'mine' must draw as many indices as there are images"):
        draw("mine", np.random.default_rng(0), TARGETS)


def test_an_unknown_sampler_lists_the_known_ones():
    with pytest.raises(MislasError, match="did you mean 'reverse'"):
        draw("revers", np.random.default_rng(0), TARGETS)
