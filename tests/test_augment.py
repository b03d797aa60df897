import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv

from mislas.augment import Images, mixup
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
    plain = images(padding).plain(2, 5)
    expected = (RAW[2:5].numpy() / 255 - MEAN) / STD
    np.testing.assert_allclose(plain.permute(0, 2, 3, 1), expected, atol=1e-5)


def test_plain_is_the_centre_crop():
    centre = torch.full((7,), 2)
    batch = images().batch(torch.arange(7), centre, centre, torch.zeros(7, dtype=torch.bool))
    assert torch.equal(images().plain(0, 7), batch)


def test_batches_are_float32_in_channels_last_memory():
    zero = torch.zeros(4, dtype=torch.long)
    for batch in (images().batch(zero, zero, zero, zero.bool()), images().plain(0, 4)):
        assert batch.shape == (4, 3, 8, 8)
        assert batch.dtype == torch.float32
        assert batch.is_contiguous(memory_format=torch.channels_last)
    assert len(images()) == 7


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_mixup_is_its_formula(lam):
    x, partner = images().plain(0, 4), [2, 0, 1, 3]
    expected = lam * x.numpy() + (1 - lam) * x.numpy()[partner]
    np.testing.assert_allclose(mixup(x, lam, torch.tensor(partner)), expected, atol=1e-5)


@pytest.mark.parametrize(
    "wrong", [RAW.float(), RAW[0], RAW.permute(0, 3, 1, 2), RAW[:, :6], RAW[..., :1]], ids=lambda t: str(t.shape)
)
def test_other_images_are_refused(wrong):
    with pytest.raises(MislasError, match=r"must be uint8 \(N, H, H, 3\)"):
        Images(wrong, MEAN, STD, padding=0)
