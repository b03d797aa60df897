"""What a batch is: drawn on the host, made on the device, mixed."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mislas.augment import MIXES, mixup
from mislas.batches import batches_of, draw_batches, host_rng, torch_rng
from mislas.errors import MislasError
from mislas.methods import configure
from mislas.train import train_stage1

TARGETS = np.repeat(np.arange(3), (50, 15, 5))
STAGE = configure("digits", "ce").stage1  # batches of 32: the last of 70 has 6


def digits_config(method, **changes):
    return configure("digits", method, 50, overrides={"epochs": 1} | changes)


def batches(stage=STAGE, seed=0, padding=1, flip=True):
    rng, device = np.random.default_rng(seed), torch.device("cpu")
    return list(draw_batches(rng, TARGETS, stage, padding, flip, device, stage.sampler))


def test_an_epoch_shows_every_image_once_and_ends_with_a_smaller_batch():
    drawn = batches()
    assert [len(index) for (index, *_), _, _ in drawn] == [32, 32, 6]
    assert torch.cat([index for (index, *_), _, _ in drawn]).sort()[0].tolist() == list(range(70))


def test_crops_lie_within_the_border_and_flips_happen_only_where_allowed():
    top, left, flip = (torch.cat([batch[i] for batch, _, _ in batches(padding=2)]) for i in (1, 2, 3))
    assert set(top.tolist()) == set(left.tolist()) == {0, 1, 2, 3, 4}
    assert set(flip.tolist()) == {True, False}
    assert not any(batch[3].any() for batch, _, _ in batches(flip=False))


def test_without_mixup_there_is_no_partner():
    assert all(lam == 1 and partner is None for _, lam, partner in batches())


def test_mixup_has_a_weight_and_a_permutation_per_batch():
    drawn = batches(replace(STAGE, mixup=1.0))
    assert len({lam for _, lam, _ in drawn}) == 3
    for (index, *_), lam, partner in drawn:
        assert 0 < lam < 1
        assert sorted(partner.tolist()) == list(range(len(index)))


def test_the_sampler_is_the_stages():
    stage = replace(STAGE, sampler="class_balanced")
    index = np.concatenate([batch[0] for seed in range(100) for batch, _, _ in batches(stage, seed)])
    np.testing.assert_allclose(np.bincount(TARGETS[index]) / len(index), [1 / 3] * 3, atol=0.02)


def test_random_numbers_depend_on_every_part_of_their_purpose():
    draws = [host_rng(*parts).integers(2**60) for parts in ((0, "a", 1), (0, "a", 2), (0, "b", 1), (1, "a", 1))]
    assert len(set(draws)) == 4
    assert host_rng(0, "a", 1).integers(2**60) == draws[0]
    assert torch_rng(0, "a").initial_seed() == torch_rng(0, "a").initial_seed() != torch_rng(0, "b").initial_seed()


def differing_box(one, two):
    """The first and last row and column in which two batches differ, or None."""
    rows, columns = ((one != two).any(dim=0).any(dim=0).any(dim=dim).nonzero().flatten() for dim in (1, 0))
    return (rows[0], rows[-1], columns[0], columns[-1]) if len(rows) else None


def test_labels_of_cutmix_are_weighted_by_the_box(digits, options):
    """Beside the plain epoch of the same crops: what mixing takes is drawn after them."""
    both = (batches_of(digits, digits_config(m).stage1, "stage1", 0, options).epoch(0) for m in ("cutmix", "ce"))
    boxes = 0
    for batch, plain in zip(*both, strict=True):
        box = differing_box(batch.images, plain.images)
        if box:
            top, bottom, left, right = box
            area = (bottom - top + 1) * (right - left + 1)
            assert batch.weight == pytest.approx(1 - area.item() / 64)
        boxes += box is not None
    assert boxes > 5


def test_labels_of_remix_go_to_the_partner_of_an_image_of_a_much_larger_class_alone(digits, options):
    counts, moved = torch.tensor(digits.class_counts), 0
    for batch in batches_of(digits, digits_config("remix").stage1, "stage1", 0, options).epoch(0):
        to_partner = batch.weight == 0
        assert (counts[batch.targets] >= 3 * counts[batch.partner_targets])[to_partner].all()
        moved += to_partner.sum().item()
    assert moved > 0


def with_its_neighbour(images, pairs):
    """By a share that grows along the batch, which is drawn, and that labels keep the square of."""
    partner = torch.arange(len(images)).roll(1)
    share = torch.from_numpy(np.sort(pairs.rng.random(len(images)))).float()
    return mixup(images, share[:, None, None, None], partner), partner, share**2


def test_a_mix_of_ones_own_chooses_partners_and_weights(digits, options, monkeypatch):
    seen = []
    monkeypatch.setitem(MIXES, "mine", lambda *given: seen.append(given) or with_its_neighbour(*given))
    config = digits_config("mixup", mix="mine")
    mixed, plain = (
        list(batches_of(digits, c.stage1, "stage1", 0, options).epoch(0)) for c in (config, digits_config("ce"))
    )
    for one, other, (images, pairs) in zip(mixed, plain, seen, strict=True):
        assert torch.equal(images, other.images)
        assert torch.equal(one.targets, other.targets)
        assert torch.equal(one.partner_targets, other.targets.roll(1))
        assert pairs.sizes.tolist() == [digits.class_counts[target] for target in other.targets]
        share = one.weight.sqrt()[:, None, None, None]
        torch.testing.assert_close(one.images, share * images + (1 - share) * images.roll(1, 0))
    again = list(batches_of(digits, config.stage1, "stage1", 0, options).epoch(0))
    assert all(torch.equal(one.images, other.images) for one, other in zip(mixed, again, strict=True))
    assert train_stage1(config, digits, options).histories[0][-1]["train_loss"] > 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (lambda images, pairs: (images[:2], pairs.partner, 0.5), r"it gave \(2, 3, 8, 8\), \(32,\), \(32,\)"),
        (lambda images, pairs: (images, pairs.partner[:2], 0.5), r"it gave \(32, 3, 8, 8\), \(2,\), "),
        (lambda images, pairs: (images, pairs.partner, torch.ones(32, 1)), r"it gave .*, \(32,\), \(32, 1\)"),
    ],
)
def test_a_mix_that_gives_something_else_is_refused(digits, options, monkeypatch, given, said):
    monkeypatch.setitem(MIXES, "mine", given)
    batches = batches_of(digits, digits_config("mixup", mix="mine").stage1, "stage1", 0, options)
    with pytest.raises(MislasError, match=f"mix 'mine' must give as many .*{said}"):
        next(batches.epoch(0))
