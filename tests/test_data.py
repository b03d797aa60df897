import hashlib
import io
import pickle
import re
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import cifar

from mislas import data
from mislas.data import (
    LISTS,
    SPECS,
    Spec,
    available,
    cache_dir,
    dataset_name,
    decode,
    empty_groups,
    groups,
    load,
    long_tailed_counts,
    long_tailed_indices,
    training_images,
    write_atomically,
)
from mislas.errors import DataError, MislasError

CIFAR10_LT_100 = (5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50)


# ---------------------------------------------------------------------------------------------- the long-tailed cut


def test_cifar10_lt_at_100_has_the_counts_of_the_literature():
    counts = long_tailed_counts(5000, 100, 10)
    assert counts == CIFAR10_LT_100
    assert sum(counts) == 12406


def test_cifar100_lt_at_100_has_10847_images():
    counts = long_tailed_counts(500, 100, 100)
    assert sum(counts) == 10847
    assert (counts[0], counts[-1]) == (500, 5)


def test_factor_1_keeps_every_image_of_a_balanced_set():
    targets = np.tile(np.arange(4), 25)
    assert long_tailed_counts(25, 1, 4) == (25,) * 4
    with pytest.raises(MislasError, match="at least 2 classes"):
        long_tailed_counts(25, 1, 1)
    assert sorted(long_tailed_indices(targets, 1, 4)) == list(range(100))


@pytest.mark.parametrize("imbalance", [0.5, 0, -1, float("nan"), float("inf")])
def test_an_impossible_factor_is_refused_in_one_line(imbalance):
    with pytest.raises(MislasError, match="finite number >= 1") as caught:
        long_tailed_counts(5000, imbalance, 10)
    assert "\n" not in str(caught.value)


def test_a_factor_that_empties_a_class_is_refused():
    with pytest.raises(MislasError, match=r"leaves class 9 with no image .* at most 50"):
        long_tailed_counts(50, 60, 10)


def test_a_class_without_images_is_refused():
    with pytest.raises(DataError, match="class 1 has no training image"):
        long_tailed_indices(np.array([0, 0, 2, 2]), 1, 3)


def cut_like_cao(targets, imb_factor, cls_num):
    """What IMBALANCECIFAR10 of Cao et al. (2019) does, in its own steps; imb_factor is 1 / IF."""
    img_max = len(targets) / cls_num
    rng, new_data = np.random.RandomState(0), []
    for the_class in np.unique(targets):
        the_img_num = int(img_max * (imb_factor ** (the_class / (cls_num - 1.0))))
        idx = np.where(targets == the_class)[0]
        rng.shuffle(idx)
        new_data.extend(idx[:the_img_num])
    return new_data


@pytest.mark.parametrize("imbalance", [10, 50, 100])
def test_the_cut_is_that_of_cao(imbalance):
    targets = np.random.RandomState(1).permutation(np.repeat(np.arange(10), 200))
    assert long_tailed_indices(targets, imbalance, 10).tolist() == cut_like_cao(targets, 1 / imbalance, 10)
    assert long_tailed_indices(targets.tolist(), imbalance, 10).tolist() == cut_like_cao(targets, 1 / imbalance, 10)


def test_a_smaller_set_is_cut_from_the_same_order():
    """Of each class the first images that the larger one keeps."""
    targets = np.repeat(np.arange(3), 50)
    large, small = (long_tailed_indices(targets, 4, 3, n_max) for n_max in (None, 20))
    assert np.bincount(targets[large]).tolist() == [50, 25, 12]
    assert np.bincount(targets[small]).tolist() == [20, 10, 5]
    for k, count in enumerate([20, 10, 5]):
        assert (small[targets[small] == k] == large[targets[large] == k][:count]).all()


def test_a_size_that_the_images_do_not_give_is_refused():
    with pytest.raises(DataError, match="n_max is 51, and there are 50 training images per class"):
        long_tailed_indices(np.repeat(np.arange(3), 50), 4, 3, 51)


def test_digits_are_cut_to_a_size():
    assert load("digits", imbalance=1, n_max=30).class_counts == (30,) * 10
    assert training_images("digits", 1, 30) == 300


def test_groups_end_at_100_and_20_images():
    assert groups((101, 100, 20, 19)) == {"many": [0], "medium": [1, 2], "few": [3]}


def test_a_group_may_be_empty():
    assert groups([200, 300]) == {"many": [0, 1], "medium": [], "few": []}


# ----------------------------------------------------------------------------------------------------------- digits


def test_digits_need_no_files_and_are_long_tailed():
    digits = load("digits", imbalance=10)
    assert digits.train_images.shape == (sum(digits.class_counts), 8, 8, 3)
    assert digits.class_counts == tuple(int(124 * 0.1 ** (k / 9)) for k in range(10))
    assert torch.bincount(digits.test_targets).tolist() == [50] * 10
    assert available("digits", "/nowhere")


def test_digits_are_scikit_learns_and_no_image_is_in_both_splits():
    from sklearn.datasets import load_digits

    digits = load("digits", imbalance=1)
    originals = np.rint(load_digits().images * 255 / 16).astype(np.uint8)
    known = {image.tobytes() for image in originals}
    splits = (digits.train_images, digits.test_images)
    train, test = ([image.tobytes() for image in images[..., 0].numpy()] for images in splits)
    assert known.issuperset(train + test)
    assert not set(train) & set(test)


def test_a_suffix_lt_names_the_same_dataset():
    assert load("digits-lt", imbalance=10).name == "digits"
    assert load("DIGITS-LT", imbalance=10).checksum == load("digits", imbalance=10).checksum


@pytest.mark.parametrize(
    ("asked", "name"),
    [("Textures", "Textures"), ("clinic-lt", "clinic-lt"), ("Clinic-LT", "clinic-lt"), ("Digits-LT", "digits")],
)
def test_a_name_is_looked_up_as_it_is_then_in_lower_case_then_without_lt(asked, name, monkeypatch):
    for new in ("Textures", "clinic-lt", "clinic"):
        monkeypatch.setitem(SPECS, new, SPECS["digits"])
    assert dataset_name(asked) == name
    assert load(asked, imbalance=10).name == name
    with pytest.raises(MislasError, match=r"unknown dataset 'textures'; did you mean 'Textures'\?"):
        dataset_name("textures")


def test_the_checksum_sees_one_pixel(digits):
    before = digits.checksum
    other = load("digits", imbalance=50)
    assert other.checksum == before
    changed = load("digits", imbalance=50)
    changed.train_images[0, 0, 0, 0] ^= 1
    assert changed.checksum != before


@pytest.mark.parametrize("name", ["train_images", "train_targets", "test_images", "test_targets"])
def test_the_checksum_is_of_all_images_and_labels(digits, name):
    changed = getattr(digits, name).clone()
    changed.view(-1)[-1] ^= 1
    assert replace(digits, **{name: changed}).checksum != digits.checksum


def test_normalisation_is_that_of_the_authors_code():
    """Statistics of the images on both CIFARs and on iNaturalist 2018, ImageNet's elsewhere."""
    cifar = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    assert {name: (SPECS[name].mean, SPECS[name].std) for name in ("cifar10", "cifar100", "cifar10-jpeg")} == {
        "cifar10": cifar, "cifar100": cifar, "cifar10-jpeg": cifar
    }  # fmt: skip
    imagenet = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    inaturalist = (0.466, 0.471, 0.380), (0.195, 0.194, 0.192)
    assert {name: (LISTS[name].mean, LISTS[name].std) for name in ("imagenet-lt", "places-lt", "inaturalist18")} == {
        "imagenet-lt": imagenet, "places-lt": imagenet, "inaturalist18": inaturalist
    }  # fmt: skip


def test_augmentation_is_the_usual_one_of_cifar_and_as_much_of_larger_images():
    """Crops of images padded by an eighth of their side, mirrored; digits are not, and have one pixel."""
    cifar = {"cifar10", "cifar100", "cifar10-jpeg", "cifar100-jpeg", "tinyimagenet32"}
    assert {name: (spec.size, spec.padding, spec.flip) for name, spec in SPECS.items()} == {
        **dict.fromkeys(cifar, (32, 4, True)), "tinyimagenet64": (64, 8, True), "digits": (8, 1, False)
    }  # fmt: skip


def test_an_unknown_dataset_lists_the_known_ones():
    with pytest.raises(MislasError, match=r"unknown dataset 'cifar1O'; did you mean 'cifar10'.*tinyimagenet64"):
        load("cifar1O")


# ------------------------------------------------------------------------------------------------------ image trees

CLASSES = ("ant", "bee", "cat")


@pytest.fixture
def root(monkeypatch, tmp_path):
    """A folder with the image tree of ``tiny``, a dataset of 3 classes, 6 + 2 JPEGs of 8x8 pixels each."""
    monkeypatch.setitem(SPECS, "tiny", Spec("Tiny", 3, 8, 6))
    monkeypatch.setenv("MISLAS_CACHE", str(tmp_path / "cache"))
    data._decoded.cache_clear()
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 2)):
        for name in CLASSES:
            folder = tmp_path / "data" / "tiny" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(256, size=(8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.jpg")
    yield tmp_path / "data"
    data._decoded.cache_clear()


def pack(root, suffix, prefix=""):
    """Replace the tree by an archive of it."""
    archive = root / f"tiny{suffix}"
    with tarfile.open(archive, f"w:{suffix.removeprefix('.tar').removeprefix('.')}") as tar:
        for path in sorted((root / "tiny").rglob("*"), reverse=True):
            tar.add(path, f"{prefix}{path.relative_to(root / 'tiny')}", recursive=False)
    shutil.rmtree(root / "tiny")
    return archive


def assert_same(one, two):
    assert one.class_names == two.class_names
    for name in ("train_images", "train_targets", "test_images", "test_targets"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name


def test_a_tree_gives_its_pixels_with_classes_in_order_of_name(root):
    tiny = load("tiny", root, imbalance=1)
    assert tiny.class_names == CLASSES
    assert tiny.class_counts == (6, 6, 6)
    assert tiny.test_targets.tolist() == [0, 0, 1, 1, 2, 2]
    files = [root / "tiny" / "test" / name / f"{i}.jpg" for name in CLASSES for i in range(2)]
    assert np.array_equal(tiny.test_images, [np.asarray(Image.open(file)) for file in files])


@pytest.mark.parametrize("prefix", ["", "./"])
@pytest.mark.parametrize("suffix", [".tar.xz", ".tar.gz", ".tar"])
def test_an_archive_gives_the_same_dataset_as_the_folder(root, suffix, prefix):
    folder = load("tiny", root, imbalance=3)
    pack(root, suffix, prefix)
    data._decoded.cache_clear()
    archive = load("tiny", root, imbalance=3)
    assert_same(folder, archive)
    assert folder.checksum == archive.checksum
    assert sorted(p.name for p in root.iterdir()) == [f"tiny{suffix}"]


def test_names_that_begin_with_a_dot_are_passed_over(root):
    clean = load("tiny", root, imbalance=1)
    for split in ("train", "test"):
        folder = root / "tiny" / split
        (folder / ".ipynb_checkpoints").mkdir()
        for stray in (".DS_Store", "ant/.DS_Store", "ant/._0.jpg", ".ipynb_checkpoints/0-checkpoint.jpg"):
            (folder / stray).write_bytes(b"no image")
    data._decoded.cache_clear()
    assert_same(clean, load("tiny", root, imbalance=1))
    pack(root, ".tar")
    data._decoded.cache_clear()
    assert_same(clean, load("tiny", root, imbalance=1))


def test_a_root_that_is_a_tree_is_that_of_a_dataset_with_as_many_classes(root, monkeypatch):
    monkeypatch.setitem(SPECS, "other", Spec("Other", 4, 8, 6))
    named = load("tiny", root, imbalance=1)
    assert [data.available(name, root / "tiny") for name in ("tiny", "other")] == [True, False]
    assert_same(named, load("tiny", root / "tiny", imbalance=1))
    with pytest.raises(DataError, match="no images for 'other'"):
        load("other", root / "tiny", imbalance=1)


def test_a_root_may_begin_at_home(root, monkeypatch):
    monkeypatch.setenv("HOME", str(root))
    assert data.available("tiny", "~")
    assert_same(load("tiny", "~", imbalance=1), load("tiny", root, imbalance=1))


@pytest.mark.parametrize("suffix", [None, ".tar"])
def test_files_that_change_are_read_again(root, suffix):
    if suffix:
        pack(root, suffix)
    before = load("tiny", root, imbalance=1).checksum
    if suffix:
        with tarfile.open(root / "tiny.tar") as tar:
            tar.extractall(root / "tiny", filter="data")
        (root / "tiny.tar").unlink()
    Image.new("RGB", (8, 8)).save(root / "tiny" / "train" / "ant" / "0.jpg")
    if suffix:
        pack(root, suffix)
    assert load("tiny", root, imbalance=1).checksum != before


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (Spec("Tiny", 3, 8, 5), "has 6 training images of a class, and its Spec says 5 of every class"),
        (Spec("Tiny", 3, 16, 6), r"test/ant/0\.jpg is 8x8 pixels, not 16x16"),
        (Spec("Tiny", 2, 8, 6), r"has 3 classes under train/; 'tiny' has 2"),
    ],
)
def test_decoded_images_are_held_to_a_changed_spec(root, monkeypatch, spec, message, restarted):
    first = load("tiny", root, imbalance=1)
    with monkeypatch.context() as patch:
        patch.setitem(SPECS, "tiny", spec)
        if restarted:
            data._decoded.cache_clear()
        with pytest.raises(DataError, match=message):
            load("tiny", root, imbalance=1)
    data._decoded.cache_clear()
    assert_same(first, load("tiny", root, imbalance=1))


def test_decoded_images_come_from_the_cache_the_second_time(root, monkeypatch):
    first = load("tiny", root, imbalance=1)
    data._decoded.cache_clear()
    monkeypatch.setattr(data, "_decode_tree", None)
    assert_same(first, load("tiny", root, imbalance=1))


def test_a_damaged_cache_is_ignored_and_mended(root, tmp_path):
    first = load("tiny", root, imbalance=1)
    (cached,) = (tmp_path / "cache").iterdir()
    whole = cached.read_bytes()
    cached.write_bytes(whole[: len(whole) // 2])
    data._decoded.cache_clear()
    assert_same(first, load("tiny", root, imbalance=1))
    assert cached.stat().st_size == len(whole)


def test_a_cache_that_cannot_be_written_is_a_warning(root, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MISLAS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="could not be cached.*MISLAS_CACHE"):
        assert load("tiny", root, imbalance=1).class_counts == (6, 6, 6)


def test_a_changed_tree_is_decoded_again(root):
    before = load("tiny", root, imbalance=1)
    Image.new("RGB", (8, 8)).save(root / "tiny" / "test" / "ant" / "0.jpg")
    data._decoded.cache_clear()
    after = load("tiny", root, imbalance=1)
    assert not torch.equal(before.test_images[0], after.test_images[0])
    assert after.test_images[0].sum() == 0


def truncate_archive(root):
    archive = pack(root, ".tar.xz")
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])


def truncate_image(root):
    path = root / "tiny" / "train" / "bee" / "3.jpg"
    path.write_bytes(path.read_bytes()[:-100])


def undecodable_image(root):
    (root / "tiny" / "train" / "bee" / "3.jpg").write_bytes(b"not an image")


def stray_file(root):
    (root / "tiny" / "train" / "bee" / "notes.txt").write_text("3.jpg is blurred")


def deep_image(root):
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(root / "tiny" / "train" / "bee" / "6.png")


def wrong_size(root):
    Image.new("RGB", (9, 8)).save(root / "tiny" / "test" / "bee" / "1.jpg")


def class_missing_in_test(root):
    shutil.rmtree(root / "tiny" / "test" / "cat")


def one_class_less(root):
    for split in ("train", "test"):
        shutil.rmtree(root / "tiny" / split / "cat")


def no_files(root):
    shutil.rmtree(root / "tiny")


@pytest.mark.parametrize(
    ("damage", "file", "message"),
    [
        pytest.param(*case, id=case[0].__name__)
        for case in (
            (truncate_archive, "tiny.tar.xz", "is damaged near .*fetch the file again"),
            (truncate_image, "train/bee/3.jpg", "is damaged near"),
            (undecodable_image, "train/bee/3.jpg", "is no image; move it away"),
            (stray_file, "train/bee/notes.txt", "is no image; move it away"),
            (deep_image, "train/bee/6.png", "has 16-bit or float pixels .*: convert to 8 bits first"),
            (wrong_size, "test/bee/1.jpg", "is 9x8 pixels, not 8x8"),
            (class_missing_in_test, "data/tiny", "class 'cat' has no image in train/ or in test/"),
            (one_class_less, "data/tiny", "has 2 classes under train/; 'tiny' has 3"),
            (no_files, "tiny/train/<class>/*", "no images for 'tiny' under .* or one of tiny.tar.xz"),
        )
    ],
)
def test_bad_files_are_one_line_that_names_the_file(root, tmp_path, damage, file, message):
    damage(root)
    with pytest.raises(DataError, match=message) as caught:
        load("tiny", root, imbalance=1)
    assert file in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_a_file_that_is_no_archive_is_one_line(root):
    pack(root, ".tar.gz").write_bytes(b"<html>404</html>")
    with pytest.raises(DataError, match=r"tiny\.tar\.gz is damaged near its beginning") as caught:
        load("tiny", root, imbalance=1)
    assert "\n" not in str(caught.value)


def test_a_tree_needs_data_root():
    with pytest.raises(DataError, match=r"'cifar10-jpeg' needs data_root.*'digits' needs none"):
        load("cifar10-jpeg")


def test_availability_of_a_tree(root):
    assert available("tiny", root)
    assert not available("tiny", root / "elsewhere")


def test_members_outside_an_archive_are_written_nowhere(root, tmp_path):
    archive = pack(root, ".tar")
    with tarfile.open(archive, "a") as tar:
        for name in ("../evil.jpg", "../train/evil.jpg", f"{tmp_path}/evil.jpg", "../../train/ant/evil.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 4
            tar.addfile(info, io.BytesIO(b"evil"))
    assert load("tiny", root, imbalance=1).class_counts == (6, 6, 6)
    assert not list(Path(tmp_path).rglob("*evil*"))


@pytest.mark.parametrize("damage", ["cut within", "a bit of"])
def test_a_plain_tar_with_a_damaged_header_is_damaged(root, damage):
    archive = pack(root, ".tar")
    with tarfile.open(archive) as tar:
        place = [member for member in tar if member.isfile()][-1].offset + 100
    whole = archive.read_bytes()
    archive.write_bytes(whole[:place] + (bytes([whole[place] ^ 1]) + whole[place + 1 :]) * (damage == "a bit of"))
    with pytest.raises(DataError, match="damaged"):
        load("tiny", root, imbalance=1)


# ----------------------------------------------------------------------------------------------------------- decoding


def tiff(image):
    buffer = io.BytesIO()
    image.save(buffer, "TIFF")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("mode", "pixel", "rgb"),
    [
        ("1", 255, (255, 255, 255)),
        ("L", 100, (100, 100, 100)),
        ("LA", (100, 0), (100, 100, 100)),
        ("P", 1, (10, 20, 30)),
        ("RGB", (1, 2, 3), (1, 2, 3)),
        ("RGBA", (1, 2, 3, 0), (1, 2, 3)),
        ("CMYK", (255, 0, 0, 0), (0, 255, 255)),
    ],
)
def test_what_has_at_most_8_bits_a_channel_becomes_rgb(mode, pixel, rgb):
    image = Image.new(mode, (3, 2), pixel)
    if mode == "P":
        image.putpalette([0, 0, 0, 10, 20, 30])
    pixels = decode(tiff(image), "a.tif")
    assert pixels.dtype == np.uint8
    assert pixels.shape == (2, 3, 3)
    assert (pixels == rgb).all()


@pytest.mark.parametrize(("kind", "mode"), [(np.uint16, "I;16"), (np.int32, "I"), (np.float32, "F")])
def test_16_bit_and_float_pixels_are_refused_in_one_line(kind, mode):
    content = tiff(Image.fromarray(np.full((2, 3), 200, kind)))
    with pytest.raises(DataError, match=rf"^x/a\.tif has 16-bit or float .* {mode}\): convert to 8 bits") as caught:
        decode(content, "x/a.tif")
    assert "\n" not in str(caught.value)


def test_other_pixels_than_those_are_refused_too():
    with pytest.raises(DataError, match=r"a\.tif has pixels of a rare kind \(Pillow's mode LAB\)"):
        decode(tiff(Image.new("LAB", (3, 2))), "a.tif")


# ------------------------------------------------------------------------------------------------ torchvision's files


@pytest.fixture
def cifar10(monkeypatch, tmp_path):
    """A folder with files in the format of CIFAR-10's, ten images each, whose MD5 is not looked at."""
    monkeypatch.setattr(cifar, "check_integrity", lambda *_: True)
    data._torchvision.cache_clear()
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        content = {"data": rng.integers(256, size=(10, 3072), dtype=np.uint8), "labels": rng.permutation(10).tolist()}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"name{k}" for k in range(10)]}))
    yield tmp_path
    data._torchvision.cache_clear()


def test_torchvisions_cifar10_is_read(cifar10):
    dataset = load("cifar10", cifar10, imbalance=1)
    assert dataset.class_counts == (5,) * 10
    assert dataset.class_names == tuple(f"name{k}" for k in range(10))
    content = pickle.loads((cifar10 / "cifar-10-batches-py" / "test_batch").read_bytes())
    assert dataset.test_targets.tolist() == content["labels"]
    planes = dataset.test_images.permute(0, 3, 1, 2).reshape(10, 3072)  # the format has channels first
    assert np.array_equal(planes, content["data"])
    assert available("cifar10", cifar10)


@pytest.fixture
def both_versions(cifar10, monkeypatch):
    """The same folder, with the same images in CIFAR-10's binary version beside torchvision's files."""
    folder = cifar10 / "cifar-10-batches-bin"
    folder.mkdir()
    checksums = {}
    for name in data._BINARY_SHA256:
        content = pickle.loads((cifar10 / "cifar-10-batches-py" / name.removesuffix(".bin")).read_bytes())
        rows = b"".join(
            bytes([k]) + pixels.tobytes() for k, pixels in zip(content["labels"], content["data"], strict=True)
        )
        (folder / name).write_bytes(rows)
        checksums[name] = hashlib.sha256(rows).hexdigest()
    monkeypatch.setattr(data, "_BINARY_SHA256", checksums)
    data._binary.cache_clear()
    yield cifar10
    data._binary.cache_clear()


def test_the_binary_version_holds_what_torchvision_reads(both_versions):
    first = load("cifar10", both_versions, imbalance=2)
    shutil.rmtree(both_versions / "cifar-10-batches-py")
    assert available("cifar10", both_versions)
    second = load("cifar10", both_versions, imbalance=2)
    assert second.checksum == first.checksum
    assert second.class_names[0] == "airplane"


@pytest.mark.parametrize("flaw", ["missing", "damaged"])
def test_a_flaw_in_the_binary_version_is_named(both_versions, flaw):
    shutil.rmtree(both_versions / "cifar-10-batches-py")
    path = both_versions / "cifar-10-batches-bin" / "data_batch_3.bin"
    if flaw == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(DataError, match=r"data_batch_3\.bin.*again"):
        load("cifar10", both_versions)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_missing_cifar_says_what_to_do_in_one_line(name, tmp_path):
    with pytest.raises(DataError, match=f"cannot read {name} under .*--download, or .*'{name}-jpeg'") as caught:
        load(name, tmp_path)
    assert "\n" not in str(caught.value)
    assert not available(name, tmp_path)


# ----------------------------------------------------------------------------------------------------- atomic writes


def test_a_write_replaces_the_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "new" / "file"
    for text in (b"one", b"two"):
        write_atomically(path, lambda handle, text=text: handle.write(text))
        assert path.read_bytes() == text
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("before", [None, b"old"])
def test_a_write_that_fails_midway_changes_nothing(tmp_path, before):
    path = tmp_path / "file"
    if before:
        path.write_bytes(before)

    def write(handle):
        handle.write(b"half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_atomically(path, write)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == ({"file": before} if before else {})


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path, full_disk):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with full_disk(), pytest.raises(OSError, match=re.escape(str(path))):
        write_atomically(path, lambda handle: handle.write(bytes(10**5)))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"file": b"old"}


@pytest.mark.parametrize("n_max", [49, 98, 103])
def test_one_image_is_left_where_the_factor_is_the_largest_class(n_max):
    """49 * (1 / 49) is less than 1 in binary."""
    counts = long_tailed_counts(n_max, n_max, 10)
    assert (counts[0], counts[-1]) == (n_max, 1)
    with pytest.raises(MislasError, match=f"at most {n_max}"):
        long_tailed_counts(n_max, n_max + 1, 10)


def test_groups_without_a_class_are_known_before_any_file_is_read():
    assert empty_groups("cifar10", 100) == ["few"]
    assert empty_groups("cifar100", 100) == []
    assert empty_groups("digits", 1) == ["medium", "few"]
    assert empty_groups("imagenet-lt", 256) == []


def test_decoded_images_are_cached_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for own, base, found in (
        ("~/own", "/base", tmp_path / "own"),
        ("", "/base", Path("/base/mislas")),
        ("", "", tmp_path / ".cache/mislas"),
    ):
        monkeypatch.setenv("MISLAS_CACHE", own)
        monkeypatch.setenv("XDG_CACHE_HOME", base)
        assert cache_dir() == found
