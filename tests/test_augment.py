import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv

from mislas.augment import MIXES, Images, cutmix, mix, mixup, remix_weight
from mislas.errors import MislasError

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
RAW = torch.from_numpy(np.random.default_rng(0).integers(256, size=(7, 8, 8, 3), dtype=np.uint8))


def images(padding=2):
    return Images(RAW, MEAN, STD, padding=padding)


def reference(i, top, left, flip, padding=2):
    """One image by torchvision: zero padding, crop, flip, pixels to 0..1, normalisation."""
    x = tv.crop(tv.pad(RAW[i].permute(2, 0, 1), padding), top, left, 8, 8)
    x = tv.hflip(x) if flip else x
    return tv.normalize(tv.to_dtype(x, torch.float32, scale=True), MEAN, STD)


def test_a_batch_is_that_of_torchvision_image_by_image():
    rng = np.random.default_rng(1)
    index, (top, left) = rng.integers(7, size=50), rng.integers(5, size=(2, 50))
    flip = rng.integers(2, size=50).astype(bool)
    batch = images().batch(*map(torch.from_numpy, (index, top, left, flip)))
    expected = torch.stack([reference(*draw) for draw in zip(index, top, left, flip, strict=True)])
    torch.testing.assert_close(batch, expected, atol=1e-5, rtol=0)


def test_the_border_is_black():
    corner = images().batch(*(torch.tensor([v]) for v in (3, 0, 0)), torch.tensor([False]))[0, :, 0, 0]
    np.testing.assert_allclose(corner, -np.array(MEAN) / np.array(STD), atol=1e-5)


@pytest.mark.parametrize("padding", [0, 2])
def test_plain_images_are_normalised_and_nothing_else(padding):
    plain = next(images(padding).plain(5))[2:]
    expected = (RAW[2:5].numpy() / 255 - MEAN) / STD
    np.testing.assert_allclose(plain.permute(0, 2, 3, 1), expected, atol=1e-5)


def test_plain_is_the_centre_crop():
    centre = torch.full((7,), 2)
    batch = images().batch(torch.arange(7), centre, centre, torch.zeros(7, dtype=torch.bool))
    assert torch.equal(next(images().plain()), batch)


def test_batches_are_float32_in_channels_last_memory():
    zero = torch.zeros(4, dtype=torch.long)
    for batch in (images().batch(zero, zero, zero, zero.bool()), next(images().plain(4))):
        assert batch.shape == (4, 3, 8, 8)
        assert batch.dtype == torch.float32
        assert batch.is_contiguous(memory_format=torch.channels_last)
    assert len(images()) == 7


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_mixup_is_its_formula(lam):
    x, partner = next(images().plain(4)), [2, 0, 1, 3]
    expected = lam * x.numpy() + (1 - lam) * x.numpy()[partner]
    np.testing.assert_allclose(mixup(x, lam, torch.tensor(partner)), expected, atol=1e-5)


@pytest.mark.parametrize(
    "wrong", [RAW.float(), RAW[0], RAW.permute(0, 3, 1, 2), RAW[:, :6], RAW[..., :1]], ids=lambda t: str(t.shape)
)
def test_other_images_are_refused(wrong):
    with pytest.raises(MislasError, match=r"must be uint8 \(N, H, H, 3\)"):
        Images(wrong, MEAN, STD, padding=0)


def test_cutmix_pastes_the_partners_box_and_returns_the_share_that_stayed():
    x = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])
    mixed, lam = cutmix(x, 0.75, torch.tensor([1, 0]), (0.5, 0.5))  # a box of half the side: rows and columns 2..5
    box = torch.zeros(8, 8)
    box[2:6, 2:6] = 1
    assert torch.equal(mixed[0], box.expand(3, 8, 8))
    assert torch.equal(mixed[1], 1 - box.expand(3, 8, 8))
    assert lam == 1 - 16 / 64


def test_cutmix_cuts_the_box_at_the_edge_and_counts_what_is_left():
    x = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])
    mixed, lam = cutmix(x, 0.75, torch.tensor([1, 0]), (0.0, 1.0))  # a corner: 2 by 2 of the 4 by 4 are inside
    assert mixed[0, 0].sum() == 4
    assert mixed[0, 0, :2, 6:].sum() == 4
    assert lam == 1 - 4 / 64


@pytest.mark.parametrize(("lam", "share"), [(1.0, 1.0), (0.0, 0.0)])
def test_cutmix_at_its_ends_keeps_or_replaces_everything(lam, share):
    x = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])
    mixed, kept = cutmix(x, lam, torch.tensor([1, 0]), (0.5, 0.5))
    assert kept == share
    assert torch.equal(mixed, x if lam else x.flip(0))


@pytest.mark.parametrize(
    ("lam", "expected"),
    [
        (0.4, [0.0, 0.4, 0.4, 0.4]),  # lam < tau: the label of a much larger class's image goes to the partner
        (0.6, [0.6, 1.0, 0.6, 0.6]),  # 1 - lam < tau: that of a much smaller class's image stays
        (0.5, [0.5, 0.5, 0.5, 0.5]),
    ],
)
def test_remix_gives_the_label_to_the_minority(lam, expected):
    own, partner = torch.tensor([90.0, 10.0, 50.0, 29.0]), torch.tensor([30.0, 30.0, 50.0, 10.0])
    np.testing.assert_allclose(remix_weight(lam, own, partner, 3.0, 0.5), expected)


def test_a_mix_that_gives_images_alone_says_so(monkeypatch):
    monkeypatch.setitem(MIXES, "mine", lambda images, pairs: images)
    with pytest.raises(MislasError, match="mix 'mine' must give a tuple of images, partners and weights, got tensor"):
        mix("mine", torch.zeros(2, 3, 4, 4), None)
    monkeypatch.setitem(MIXES, "mine", lambda images, pairs: (images, torch.tensor([1, 0]), torch.tensor(0.25)))
    assert mix("mine", torch.zeros(2, 3, 4, 4), None)[2] == 0.25


def test_remix_with_infinite_kappa_is_mixup():
    own, partner = torch.tensor([5000.0, 1.0]), torch.tensor([1.0, 5000.0])
    np.testing.assert_allclose(remix_weight(0.3, own, partner, float("inf"), 0.5), [0.3, 0.3])
