import multiprocessing
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image
from scipy.stats import kstest, pearsonr
from torchvision import transforms

from mislas import pipeline
from mislas.cli import main
from mislas.errors import DataError, MislasError
from mislas.lists import LISTS, generate, load_lists, read_image
from mislas.pipeline import PLAIN, ImageBatches, crop, crop_box, jitter_, pieces, shrink

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding.*:DeprecationWarning")

SPEC = LISTS["generated"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("generated")
    generate(root)
    return root


@pytest.fixture(scope="module")
def data(root):
    return load_lists("generated", root)


# --------------------------------------------------------------------------------------------------------- one image


@pytest.fixture(scope="module")
def boxes():
    """Random crops of a 300x400 image: top, left, height, width in columns."""
    rng = np.random.default_rng(0)
    return np.array([crop_box(rng, 300, 400) for _ in range(4000)], float).T


def test_crops_are_inside_the_image(boxes):
    top, left, height, width = boxes
    assert (boxes >= 0).all()
    assert (height > 0).all()
    assert (top + height).max() <= 300
    assert (left + width).max() <= 400


def test_small_crops_have_uniform_area_and_log_uniform_ratio():
    """Below half the area every ratio fits, so nothing is drawn again: both are what they were drawn as."""
    rng = np.random.default_rng(1)
    _, _, height, width = np.array([crop_box(rng, 3000, 3000, (0.1, 0.5)) for _ in range(2000)], float).T
    area, ratio = height * width / 3000**2, np.log(width / height)
    assert kstest(area, "uniform", (0.1, 0.4)).pvalue > 0.01
    assert kstest(ratio, "uniform", (np.log(3 / 4), np.log(16 / 9))).pvalue > 0.01
    assert abs(pearsonr(area, ratio).statistic) < 0.1


def test_crops_are_distributed_as_torchvisions(boxes):
    torch.manual_seed(0)
    image = torch.empty(3, 300, 400)
    draw = transforms.RandomResizedCrop.get_params
    theirs = np.array([draw(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)], float).T
    for ours, other in zip(boxes, theirs, strict=True):
        deciles = np.arange(0.1, 1, 0.1)
        np.testing.assert_allclose(np.quantile(ours, deciles), np.quantile(other, deciles), atol=12)


@pytest.mark.parametrize(
    ("size", "box"), [((10, 100), (0, 43, 10, 13)), ((100, 10), (43, 0, 13, 10)), ((1, 1), (0, 0, 1, 1))]
)
def test_an_image_that_no_crop_fits_gives_its_centre(size, box):
    assert crop_box(np.random.default_rng(0), *size, scale=(0.9, 1.0)) == box


def pillow(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def test_a_training_crop_is_pillows(data):
    image = read_image(data.train.file(3))
    top, left, height, width = crop_box(np.random.default_rng(7), *image.shape[1:])
    cut = pillow(image).crop((left, top, left + width, top + height)).resize((32, 32), Image.Resampling.BILINEAR)
    np.testing.assert_allclose(crop(image, 32, 7).permute(1, 2, 0).numpy().astype(int), cut, atol=1)


@pytest.mark.parametrize("size", [(300, 500), (411, 290), (256, 256), (40, 60)])
def test_a_test_crop_at_224_is_resize_256_and_centre(size):
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(256, size=(9, 9, 3), dtype=np.uint8))
    image = np.array(small.resize(size[::-1], Image.Resampling.BICUBIC))
    expected = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])(Image.fromarray(image))
    got = crop(torch.from_numpy(image).permute(2, 0, 1), 224, PLAIN)
    np.testing.assert_allclose(got.permute(1, 2, 0).numpy().astype(int), expected, atol=1)


# ------------------------------------------------------------------------------------------------------------- jitter


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0), (2, 1, 0)])
def test_jitter_is_torchvisions_adjustments_in_that_order(order):
    rng = torch.Generator().manual_seed(0)
    images, factors = torch.rand(5, 3, 6, 7, generator=rng), 0.6 + 0.8 * torch.rand(5, 3, generator=rng)
    adjust = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation)
    expected = []
    for image, own in zip(images, factors, strict=True):
        for change in order:
            image = adjust[change](image, own[change].item())
        expected.append(image)
    got = jitter_(images.clone(), factors, torch.tensor(order).expand(5, 3))
    torch.testing.assert_close(got, torch.stack(expected), atol=1e-6, rtol=0)


def test_each_image_is_jittered_in_its_own_order():
    images, factors = torch.rand(2, 3, 4, 4), torch.tensor([[0.6, 1.4, 0.7], [0.6, 1.4, 0.7]])
    orders = torch.tensor([[0, 1, 2], [2, 1, 0]])
    both = jitter_(images.clone(), factors, orders)
    for i in range(2):
        assert torch.equal(both[i : i + 1], jitter_(images[i : i + 1].clone(), factors[i : i + 1], orders[i : i + 1]))


def test_factors_of_1_change_nothing():
    images = torch.rand(3, 3, 4, 4)
    order = torch.arange(3).expand(3, 3)
    torch.testing.assert_close(jitter_(images.clone(), torch.ones(3, 3), order), images)


# ------------------------------------------------------------------------------------------------------------- ranks


@pytest.mark.parametrize(("n", "batch_size", "world"), [(20, 8, 1), (20, 8, 2), (21, 8, 3), (17, 8, 4), (7, 7, 7)])
def test_pieces_of_ranks_partition_every_batch(n, batch_size, world):
    by_rank = [pieces(n, batch_size, rank, world) for rank in range(world)]
    for step, start in enumerate(range(0, n, batch_size)):
        positions = [list(range(*by_rank[rank][step])) for rank in range(world)]
        assert sum(positions, []) == list(range(start, min(start + batch_size, n)))  # noqa: RUF017
        sizes = [len(p) for p in positions]
        assert max(sizes) - min(sizes) <= 1


def collect(batches, seed=3, sampler="class_balanced"):
    return list(batches.epoch(np.random.default_rng(seed), sampler))


@pytest.fixture(scope="module")
def alone(data):
    """One epoch of batches of 50, decoded in this process."""
    return collect(ImageBatches(data.train, SPEC, 50, workers=0))


def assert_equal(one, two):
    for (x, y), (other_x, other_y) in zip(one, two, strict=True):
        assert torch.equal(x, other_x)
        assert torch.equal(y, other_y)


@pytest.mark.parametrize("batch_size", [50, 51])  # 51 leaves one image for three ranks
def test_the_ranks_batches_together_are_the_single_process_batches(data, batch_size):
    alone, *ranks = (
        collect(ImageBatches(data.train, SPEC, batch_size, workers=0, rank=rank, world=world))
        for rank, world in ((0, 1), (0, 3), (1, 3), (2, 3))
    )
    together = [tuple(map(torch.cat, zip(*step, strict=True))) for step in zip(*ranks, strict=True)]
    assert_equal(together, alone)


def test_batches_do_not_depend_on_the_number_of_workers(data, alone):
    batches = ImageBatches(data.train, SPEC, 50, workers=2)
    next(batches.epoch(np.random.default_rng(8)))  # an epoch that is left after its first batch
    assert_equal(collect(batches), alone)
    assert_equal(collect(batches), alone)


@pytest.mark.parametrize("workers", [0, 2])
def test_two_epochs_that_are_read_at_once_are_those_read_one_by_one(data, alone, workers):
    """As the two branches of BBN read them."""
    batches = ImageBatches(data.train, SPEC, 50, workers=workers)
    for _ in range(2):
        epochs = (batches.epoch(np.random.default_rng(seed), "class_balanced") for seed in (3, 4))
        first, second = zip(*zip(*epochs, strict=True), strict=True)
        assert_equal(first, alone)
        assert_equal(second, collect(batches, 4))


@pytest.mark.parametrize(("batch_size", "rank", "world"), [(0, 0, 1), (2, 0, 3), (8, 2, 2), (8, -1, 2)])
def test_impossible_ranks_and_batch_sizes_are_refused(data, batch_size, rank, world):
    with pytest.raises(MislasError, match=r"rank is in 0\.\.world - 1 and the batch size at least world"):
        ImageBatches(data.train, SPEC, batch_size, workers=0, rank=rank, world=world)


# ------------------------------------------------------------------------------------------------------------ batches


def test_an_epoch_is_shaped_typed_and_laid_out_for_training(alone):
    assert [len(y) for _, y in alone] == [50, 50, 50, 50, 50, 6]
    for x, y in alone:
        assert x.shape == (len(y), 3, 32, 32)
        assert x.dtype == torch.float32
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert y.dtype == torch.int64


def test_an_instance_balanced_epoch_shows_every_image_once(data):
    targets = torch.cat([y for _, y in collect(ImageBatches(data.train, SPEC, 100, workers=0), 0, "instance_balanced")])
    assert torch.bincount(targets).tolist() == list(data.class_counts)


def test_an_epoch_follows_its_generator(data, alone):
    again, other = (collect(ImageBatches(data.train, SPEC, 50, workers=0), seed) for seed in (3, 4))
    assert_equal(again, alone)
    assert not torch.equal(other[0][0], alone[0][0])


def test_images_go_with_their_targets_and_half_are_mirrored(data):
    """On images that say who they are: the class in the brightness, left darker than right."""
    strip = torch.linspace(-0.1, 0.1, 32).expand(3, 32, 32)

    class Marked(ImageBatches):
        def _decoded(self, index, seeds):
            level = self.images.targets[torch.from_numpy(index)].view(-1, 1, 1, 1) / 10 + 0.25
            yield ((level + strip) * 255).round().byte(), slice(0, len(index))

    plain = replace(SPEC, jitter=0.0, mean=(0.0,) * 3, std=(1.0,) * 3)
    ((x, y),) = Marked(data.train, plain, 256, workers=0).epoch(np.random.default_rng(0), "class_balanced")
    torch.testing.assert_close(x.mean((1, 2, 3)), y / 10 + 0.25, atol=0.003, rtol=0)
    mirrored = x[:, 0, 0, 0] > x[:, 0, 0, -1]
    assert 0.4 < mirrored.double().mean() < 0.6


def test_without_jitter_a_batch_is_the_normalised_crops(data):
    spec = replace(SPEC, jitter=0.0)
    rng = np.random.default_rng(5)
    ((x, y),) = ImageBatches(data.train, spec, 256, workers=0).epoch(np.random.default_rng(5), "instance_balanced")
    index = rng.permutation(256)
    seeds = rng.integers(2**62, size=256)
    normalise = transforms.Normalize(spec.mean, spec.std)
    for i in range(0, 256, 51):
        expected = normalise(crop(read_image(data.train.file(index[i])), 32, int(seeds[i])).float() / 255)
        near = [torch.allclose(x[i], candidate, atol=1e-5) for candidate in (expected, expected.flip(2))]
        assert any(near)
        assert y[i] == data.train_targets[index[i]]


def test_jitter_changes_the_colours_of_training_batches_only(data):
    quiet = replace(SPEC, jitter=0.0)
    assert not torch.allclose(
        *(collect(ImageBatches(data.train, spec, 256, workers=0))[0][0].mean() for spec in (SPEC, quiet))
    )
    plain = (torch.cat(list(ImageBatches(data.test, spec, 16, workers=0).plain())) for spec in (SPEC, quiet))
    assert torch.equal(*plain)


def test_plain_batches_are_the_test_transform_in_order(data):
    usual = transforms.Compose(
        [
            transforms.Resize(36),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize(SPEC.mean, SPEC.std),
        ]
    )
    expected = torch.stack([usual(Image.open(data.test.file(i)).convert("RGB")) for i in range(30)])
    batches = list(ImageBatches(data.test, SPEC, 16, workers=0).plain())
    assert [len(x) for x in batches] == [16, 14]
    torch.testing.assert_close(torch.cat(batches), expected, atol=2 / 255 / min(SPEC.std), rtol=0)


def test_an_unknown_sampler_lists_the_known_ones(data):
    with pytest.raises(MislasError, match=r"unknown sampler 'balanced'.*class_balanced"):
        collect(ImageBatches(data.train, SPEC, 50, workers=0), sampler="balanced")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_stops_in_one_line_that_names_it(root, tmp_path, workers):
    shutil.copytree(root, tmp_path / "set")
    path = tmp_path / "set" / "test/class2/0001.jpg"
    path.write_bytes(path.read_bytes()[:-100])
    damaged = load_lists("generated", tmp_path / "set")
    with pytest.raises(DataError, match=r"class2/0001\.jpg cannot be decoded") as caught:
        list(ImageBatches(damaged.test, SPEC, 8, workers=workers).plain())
    assert "\n" not in str(caught.value)


def test_an_image_of_16_bits_stops_in_one_line_that_names_it(root, tmp_path):
    shutil.copytree(root, tmp_path / "set")
    Image.fromarray(np.full((40, 40), 40000, np.uint16)).save(tmp_path / "set" / "test/class2/0001.jpg", "PNG")
    deep = load_lists("generated", tmp_path / "set").test
    with pytest.raises(DataError, match=r"class2/0001\.jpg has 16-bit or float pixels"):
        list(ImageBatches(deep, SPEC, 8, workers=0).plain())
    with pytest.raises(DataError, match=r"class2/0001\.jpg has 16-bit or float pixels"):
        shrink(deep, tmp_path / "small", 40, progress=False)


def test_a_worker_that_dies_is_one_line(data, monkeypatch):
    monkeypatch.setattr(pipeline, "read_image", lambda path: os._exit(1))
    with pytest.raises(MislasError, match=r"a process that decodes images died .*fewer workers") as caught:
        list(ImageBatches(data.test, SPEC, 8, workers=1).plain())
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads what Linux says of a process")
def test_a_clusters_signals_leave_the_processes_that_decode_alone(data):
    before = set(multiprocessing.active_children())
    batches = ImageBatches(data.train, SPEC, 8, workers=1).epoch(np.random.default_rng(0))
    next(batches)
    (worker,) = {*multiprocessing.active_children()} - before
    status = Path(f"/proc/{worker.pid}/status").read_text()
    ignored = int(re.search(r"SigIgn:\s*(\w+)", status)[1], 16)
    assert all(ignored >> (number - 1) & 1 for number in (signal.SIGUSR1, signal.SIGUSR2))


# ------------------------------------------------------------------------------------------------------------- shrink


def test_shrunk_images_are_smaller_and_say_so(root, data, tmp_path, capsys):
    arguments = ["data", "shrink", "generated", "--root", str(root), "--to", str(tmp_path / "small"), "--side", "40"]
    assert main([*arguments, "--lists", str(root), "--quiet"]) == 0
    assert "286 images are in" in capsys.readouterr().out
    small = load_lists("generated", tmp_path / "small", root)
    for i in range(0, 256, 25):
        before, after = read_image(data.train.file(i)), read_image(small.train.file(i))
        if min(before.shape[1:]) <= 40:
            assert small.train.file(i).read_bytes() == data.train.file(i).read_bytes()
        else:
            assert min(after.shape[1:]) == 40
            expected = pillow(before).resize(after.shape[:0:-1], Image.Resampling.BILINEAR)
            difference = np.asarray(expected).astype(int) - after.permute(1, 2, 0).numpy()
            assert np.abs(difference).mean() < 3
    assert data.prepared == ""
    assert small.prepared == "shorter side at most 40 pixels, JPEG quality 95"
    assert small.checksum != data.checksum
    assert small.train.checksum == data.train.checksum


def test_shrinking_goes_on_where_it_was(data, tmp_path):
    shrink(data.test, tmp_path, 40, progress=False)
    one, two = (tmp_path / data.test.paths[i] for i in (0, 1))
    two.unlink()
    before = one.stat().st_mtime_ns
    shrink(data.test, tmp_path, 40, progress=False)
    assert one.stat().st_mtime_ns == before
    assert two.exists()


def test_shrinking_over_other_images_is_refused(data, tmp_path):
    with pytest.raises(MislasError, match="is where the images are"):
        shrink(data.test, data.test.root, progress=False)
    shrink(data.test, tmp_path, 40, progress=False)
    with pytest.raises(MislasError, match="has images of another size"):
        shrink(data.test, tmp_path, 41, progress=False)
    (tmp_path / "PREPARED.txt").unlink()
    with pytest.raises(MislasError, match="has images already, and no note of their size; choose another folder"):
        shrink(data.test, tmp_path, 40, progress=False)
    assert not (tmp_path / "PREPARED.txt").exists()
