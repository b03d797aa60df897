import hashlib
import io
import lzma
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mislas import lists
from mislas.cli import main
from mislas.errors import DataError, MislasError
from mislas.lists import LISTS, ImageList, check, generate, load_lists, read_image, read_list

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding.*:DeprecationWarning")

LIST = "a/one.jpg 0\na/two words.jpg 1\n\nb/three.png 0\nfour.jpg 2\n"


@pytest.fixture
def written(tmp_path):
    """Writes a list of three classes and reads it."""

    def read(text, num_classes=3):
        (tmp_path / "list.txt").write_text(text)
        return read_list(tmp_path / "list.txt", tmp_path / "images", num_classes)

    return read


# --------------------------------------------------------------------------------------------------- reading a list


def test_a_list_gives_paths_targets_and_counts(written, tmp_path):
    images = written(LIST)
    assert images.paths == ("a/one.jpg", "a/two words.jpg", "b/three.png", "four.jpg")
    assert images.targets.tolist() == [0, 1, 0, 2]
    assert images.targets.dtype == torch.int64
    assert images.class_counts == (2, 1, 1)
    assert images.groups == {"many": [], "medium": [], "few": [0, 1, 2]}
    assert images.file(2) == tmp_path / "images" / "b/three.png"
    assert len(images) == 4


def test_a_compressed_list_is_the_same_list(written, tmp_path):
    plain = written(LIST)
    (tmp_path / "list.txt").unlink()
    with lzma.open(tmp_path / "list.txt.xz", "wt") as handle:
        handle.write(LIST.replace("\n", "\r\n").replace(" 2", "\t 2 "))
    packed = read_list(tmp_path / "list.txt", tmp_path / "images", 3)
    assert packed.paths == plain.paths
    assert packed.checksum == plain.checksum


def test_a_byte_order_mark_is_no_part_of_a_path(written):
    assert written("\ufeff" + LIST).paths == written(LIST).paths


def test_the_checksum_is_that_of_the_lines(written):
    lines = LIST.replace("\n\n", "\n")
    assert written(LIST).checksum == hashlib.sha256(lines.encode()).hexdigest()[:16]
    assert written(LIST.replace("one.jpg 0", "one.jpg 2")).checksum != written(LIST).checksum


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jpg 0\nb.jpg\nc.jpg 2\n", r"line 2: 'b.jpg' has no label; a line is 'path label'"),
        ("a.jpg 0\nb.jpg -1\n", r"line 2: label '-1' is not an integer in 0\.\.2"),
        ("a.jpg 0\n\nb.jpg 1.0\n", r"line 3: label '1.0' is not an integer"),
        ("a.jpg 0\nb.jpg one\n", r"line 2: label 'one' is not an integer"),
        ("a.jpg 0\nb.jpg 1_0\n", r"line 2: label '1_0' is not an integer"),
        ("a.jpg 0\nb.jpg ٣\n", r"line 2: label '٣' is not an integer"),
        ("a.jpg 0\nb.jpg " + "1" * 5000, r"line 2: label '1{20}' is not an integer"),
        ("a.jpg 0\nb.jpg 3\n", r"line 2: label '3' is not an integer in 0\.\.2"),
        ("a.jpg 1\nb.jpg 1\n", r"has no image of 2 of its 3 classes \(0, 2\)"),
        ("", "is empty"),
        ("\n \n", "is empty"),
        ("../a.jpg 0\n", r"line 1: '../a.jpg' leaves the image root"),
        ("/etc/a.jpg 0\n", r"line 1: '/etc/a.jpg' leaves the image root"),
        ("a/../../b.jpg 0\n", r"leaves the image root"),
        ("a\\b.jpg 0\n", r"has backslashes; paths have forward slashes"),
    ],
)
def test_a_bad_list_is_one_line_that_names_the_place(written, text, message):
    with pytest.raises(DataError, match=message) as caught:
        written(text)
    assert "list.txt" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_list_that_is_not_there_names_both_endings(tmp_path):
    with pytest.raises(DataError, match=r"no list file .*list\.txt or list\.txt\.xz; .*--lists"):
        read_list(tmp_path / "list.txt", tmp_path, 3)


@pytest.mark.parametrize(("name", "content"), [("list.txt.xz", b"<html>404</html>"), ("list.txt", b"\xff\xfe\x00 0\n")])
def test_an_unreadable_list_is_one_line(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"list .*{name} cannot be read") as caught:
        read_list(tmp_path / "list.txt", tmp_path, 3)
    assert "\n" not in str(caught.value)


def test_a_compressed_list_cut_short_is_damaged(tmp_path):
    rng = np.random.default_rng(0)
    whole = lzma.compress("".join(f"{rng.integers(10**9)}.jpg {k % 3}\n" for k in range(999)).encode())
    (tmp_path / "list.txt.xz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"list\.txt\.xz cannot be read"):
        read_list(tmp_path / "list.txt", tmp_path, 3)


# ------------------------------------------------------------------------------------------------------ missing files


def image_list(root, paths):
    return ImageList(root, tuple(paths), torch.zeros(len(paths), dtype=torch.int64), 1)


@pytest.fixture
def tree(tmp_path):
    """Three empty files in two folders, and their list."""
    root = tmp_path / "data" / "images"
    paths = ["train/a/1.jpg", "train/a/2.jpg", "train/b/1.jpg"]
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root, paths


def test_missing_files_are_found(tree):
    root, paths = tree
    assert lists.missing_files(image_list(root, paths)) == []
    more = ["train/a/3.jpg", "train/c/1.jpg", "0.jpg"]
    assert sorted(lists.missing_files(image_list(root, paths + more))) == sorted(more)


def explanation(root, paths):
    images = image_list(root, paths)
    return lists.explain_missing(images, lists.missing_files(images))


def test_some_missing_files_are_counted_and_named(tree):
    root, paths = tree
    text = explanation(root, [*paths, *(f"train/a/9{i}.jpg" for i in range(5))])
    assert "5 of 8 images are missing" in text
    assert "train/a/90.jpg, train/a/91.jpg, train/a/92.jpg, ..." in text


def test_a_root_one_level_too_high_is_recognised(tree):
    root, paths = tree
    assert f"under {root}: use that as the root" in explanation(root.parent, paths)


def test_a_root_one_level_too_deep_is_recognised(tree):
    root, paths = tree
    assert f"under {root}: use that as the root" in explanation(root / "train", paths)


def test_images_without_the_first_folder_of_the_list_are_recognised(tree):
    root, paths = tree
    text = explanation(root, [f"data_256/{path}" for path in paths])
    assert f"begin with 'data_256', and the images are there without it; move them into {root / 'data_256'}" in text


def test_a_root_without_any_image_says_what_is_missing(tree):
    _, paths = tree
    assert "3 of 3 images are missing under /nowhere" in explanation(Path("/nowhere"), paths)


# ----------------------------------------------------------------------------------------------------------- decoding


def encoded(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


@pytest.fixture
def picture():
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(256, size=(5, 7, 3), dtype=np.uint8))
    return small.resize((41, 30), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("with_torchvision", [True, False])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "WEBP"])
def test_an_image_decodes_as_pillow_decodes_it(kind, with_torchvision, picture, tmp_path, monkeypatch):
    if not with_torchvision:
        monkeypatch.setattr(lists, "_jpeg_decoder", lambda: None)
    content = encoded(picture, format=kind)
    (tmp_path / "image.JPEG").write_bytes(content)  # ImageNet has a PNG that is called JPEG
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    pixels = read_image(tmp_path / "image.JPEG")
    assert pixels.dtype == torch.uint8
    np.testing.assert_allclose(pixels.permute(1, 2, 0).numpy().astype(int), expected, atol=1)


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "1"])
def test_other_colour_modes_become_rgb(mode, picture, tmp_path):
    kind = "JPEG" if mode in ("L", "CMYK") else "PNG"
    (tmp_path / "image").write_bytes(encoded(picture.convert(mode), format=kind))
    assert read_image(tmp_path / "image").shape == (3, 30, 41)


@pytest.mark.parametrize("with_torchvision", [True, False])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_an_exif_orientation_turns_nothing(kind, with_torchvision, picture, tmp_path, monkeypatch):
    if not with_torchvision:
        monkeypatch.setattr(lists, "_jpeg_decoder", lambda: None)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be shown turned by 90 degrees
    (tmp_path / "plain").write_bytes(encoded(picture, format=kind))
    (tmp_path / "turned").write_bytes(encoded(picture, format=kind, exif=exif))
    assert torch.equal(read_image(tmp_path / "turned"), read_image(tmp_path / "plain"))


def test_16_bit_pixels_are_refused_in_one_line(tmp_path):
    Image.fromarray(np.full((30, 41), 40000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match=r"^image .*deep\.png has 16-bit or float pixels .*: convert to 8") as caught:
        read_image(tmp_path / "deep.png")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", [lambda c: c[:-50], lambda c: c[: len(c) // 2], lambda c: b"", lambda c: b"<html>"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_damaged_images_are_one_line(kind, damage, picture, tmp_path):
    (tmp_path / "image").write_bytes(damage(encoded(picture, format=kind)))
    with pytest.raises(DataError, match=r"image .*image cannot be decoded \(.*\); fetch it again") as caught:
        read_image(tmp_path / "image")
    assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------- the generated dataset, whole


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("generated")
    generate(root)
    return root


@pytest.fixture
def generated(original, tmp_path):
    """A copy to damage."""
    shutil.copytree(original, tmp_path / "set")
    return tmp_path / "set"


def test_what_is_generated_is_what_is_expected(original):
    data = load_lists("generated", original)
    assert data.class_counts == tuple(int(120 * 20 ** (-k / 5)) for k in range(6))
    assert sum(data.class_counts) == len(data.train) == LISTS["generated"].train
    assert {group: len(classes) for group, classes in data.groups.items()} == {"many": 1, "medium": 2, "few": 3}
    assert torch.bincount(data.test_targets).tolist() == [5] * 6
    assert data.imbalance == 20
    assert data.num_classes == 6
    assert not set(data.train.paths) & set(data.test.paths)


def test_generating_again_gives_the_same_files(original, tmp_path):
    generate(tmp_path)
    for path in ("generated_train.txt", "train/class0/0000.jpg", "test/class5/0004.jpg"):
        assert (tmp_path / path).read_bytes() == (original / path).read_bytes()


def test_the_generated_images_can_be_told_apart(original):
    """Nearest class mean of the colour, on the test list: far above chance."""
    data = load_lists("generated", original)

    def colours(images):
        return torch.stack([read_image(images.file(i)).float().std(dim=(1, 2)) for i in range(len(images))])

    train, test = colours(data.train), colours(data.test)
    means = torch.stack([train[data.train_targets == k].mean(0) for k in range(6)])
    predicted = torch.cdist(test, means).argmin(1)
    assert (predicted == data.test_targets).double().mean() > 0.6


def test_all_is_well_with_it(original, capsys):
    assert main(["data", "check", "generated", "--root", str(original)]) == 0
    out = capsys.readouterr().out
    assert "256 images of 6 classes, 6 to 120 a class" in out
    assert "many 1, medium 2, few 3 classes" in out
    assert "256 of 256 can be decoded" in out
    assert "WRONG" not in out
    assert out.endswith("all is well\n")


def lose_images(root):
    (root / "train/class1/0003.jpg").unlink()
    (root / "train/class2/0001.jpg").unlink()


def cut_an_image(root):
    path = root / "test/class4/0002.jpg"
    path.write_bytes(path.read_bytes()[:-100])


def deepen_an_image(root):
    Image.fromarray(np.full((40, 40), 40000, np.uint16)).save(root / "train/class0/0000.jpg", "PNG")


def lose_a_line(root):
    path = root / "generated_train.txt"
    path.write_text(path.read_text().partition("\n")[2])


def lose_the_list(root):
    (root / "generated_test.txt").unlink()


def lose_a_label(root):
    path = root / "generated_train.txt"
    path.write_text(path.read_text().replace("class5/0000.jpg 5", "class5/0000.jpg"))


def unbalance_the_test_set(root):
    path = root / "generated_test.txt"
    path.write_text(path.read_text().replace("class5/0000.jpg 5", "class5/0000.jpg 4"))


def lose_a_test_line(root):
    path = root / "generated_test.txt"
    path.write_text(path.read_text().partition("\n")[2])


def move_an_image_across_classes(root):
    path = root / "generated_train.txt"
    path.write_text(path.read_text().replace("class0/0000.jpg 0", "class0/0000.jpg 1"))


def shrink_the_smallest_class(root):
    path = root / "generated_train.txt"
    path.write_text(path.read_text().replace("class5/0000.jpg 5", "class5/0000.jpg 4"))


def leak(root):
    path = root / "generated_test.txt"
    path.write_text(path.read_text().replace("test/class3/0000.jpg", "train/class3/0000.jpg"))


def repeat_a_line(root):
    path = root / "generated_train.txt"
    path.write_text(path.read_text().replace("class0/0001.jpg", "class0/0000.jpg"))


def rename_the_folder(root):
    (root / "train").rename(root / "moved")


@pytest.mark.parametrize(
    ("damage", "what", "message"),
    [
        (
            lose_images,
            "train files",
            "2 of 256 images are missing under .* \\(train/class1/0003.jpg, train/class2/0001",
        ),
        (cut_an_image, "test images", "29 of 30 can be decoded; 1 cannot be decoded: test/class4/0002.jpg"),
        (deepen_an_image, "train images", "255 of 256 .*: train/class0/0000.jpg; image .*0000.jpg has 16-bit or float"),
        (lose_a_line, "train list", "255 images .*; expected 256 images"),
        (lose_a_test_line, "test list", "29 images .*; expected 30 images"),
        (lose_the_list, "test list", "no list file .*generated_test.txt"),
        (lose_a_label, "train list", "'train/class5/0000.jpg' has no label"),
        (unbalance_the_test_set, "test list", "expected a balanced test set, got 4 to 6 a class"),
        (move_an_image_across_classes, "train list", "6 to 119 a class; expected 6 to 120 a class"),
        (shrink_the_smallest_class, "train list", "5 to 120 a class; expected 6 to 120 a class"),
        (leak, "overlap", "1 images are in both lists \\(train/class3/0000.jpg\\)"),
        (repeat_a_line, "train list", "1 lines repeat a path"),
        (rename_the_folder, "train files", "256 of 256 images are missing"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_wrong_is_in_the_report_and_the_status_is_1(generated, damage, what, message, capsys):
    damage(generated)
    assert main(["data", "check", "generated", "--root", str(generated), "--quiet"]) == 1
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("WRONG")]
    assert line.startswith(f"WRONG  {what}")
    assert re.search(message, line), line
    assert out.endswith("the data are not as they should be\n")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_images, "2 of 256 images are missing"),
        (lose_the_list, "no list file .*generated_test.txt"),
        (lose_a_label, "has no label"),
        (lose_a_line, "list .*generated_train.txt: 255 images .*; expected 256 images; .* the ListSpec of 'generated'"),
        (lose_a_test_line, "list .*generated_test.txt: 29 images of 6 classes, 4 to 5 a class; expected 30 images"),
        (move_an_image_across_classes, "6 to 119 a class; expected 6 to 120 a class"),
        (shrink_the_smallest_class, "5 to 120 a class; expected 6 to 120 a class"),
        (leak, "_train.txt and .*_test.txt in .*: 1 images are in both lists .*class3/0000.jpg.*; take them out of"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_loading_stops_before_training_in_one_line(generated, damage, message):
    damage(generated)
    with pytest.raises(DataError, match=message) as caught:
        load_lists("generated", generated)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("doubtful", [unbalance_the_test_set, repeat_a_line])
def test_what_no_spec_forbids_is_left_to_check(generated, doubtful):
    doubtful(generated)
    assert len(load_lists("generated", generated).train) == 256
    assert not check("generated", generated, progress=False).ok


def test_lists_may_be_elsewhere(generated, tmp_path):
    (tmp_path / "lists").mkdir()
    for path in generated.glob("*.txt"):
        path.rename(tmp_path / "lists" / path.name)
    assert len(load_lists("generated", generated, tmp_path / "lists").train) == 256
    with pytest.raises(DataError, match="--lists"):
        load_lists("generated", generated)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["places-tl", "--root", "."], "unknown dataset 'places-tl'; did you mean 'places-lt'? Known: places-lt, "),
        (["places-lt"], "checking 'places-lt' needs --root"),
        (["cifar10-jpeg"], "checking 'cifar10-jpeg' needs --root"),
        (["places-lt", "--root", "/nowhere"], "--root is an existing folder, got '/nowhere'"),
        (["places-lt", "--root", ".", "--lists", "/nowhere"], "--lists is an existing folder, got '/nowhere'"),
    ],
)
def test_bad_usage_is_one_line_and_status_2(arguments, message, capsys):
    assert main(["data", "check", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_in_memory_datasets_are_checked_too(tmp_path, capsys):
    assert main(["data", "check", "digits"]) == 0
    assert "1,240 images of 10 classes, 124 a class" in capsys.readouterr().out
    assert main(["data", "check", "cifar10-jpeg", "--root", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "WRONG  images" in out
    assert "no images for 'cifar10-jpeg'" in out


def test_a_name_is_taken_in_any_case_and_unknown_ones_are_refused(original, monkeypatch):
    assert load_lists("Generated", original).name == "generated"
    with pytest.raises(MislasError, match=r"unknown dataset 'imagenet'; did you mean 'imagenet-lt'\?"):
        load_lists("imagenet", original)
    with pytest.raises(MislasError, match=r"unknown dataset of list files 'digits'. Known: generated, imagenet-lt"):
        load_lists("digits", original)
    monkeypatch.setitem(LISTS, "Clinic-LT", LISTS["generated"])
    assert load_lists("Clinic-LT", original).name == "Clinic-LT"
    assert check("Clinic-LT", original, progress=False).ok


def test_the_table_has_the_sizes_of_the_paper_and_of_the_lists():
    sizes = {name: (s.num_classes, s.train, s.test, s.smallest, s.largest) for name, s in LISTS.items()}
    assert sizes["imagenet-lt"] == (1000, 115846, 50000, 5, 1280)
    assert sizes["places-lt"] == (365, 62500, 36500, 5, 4980)
    assert sizes["inaturalist18"][:3] == (8142, 437513, 24426)
    assert "184.5K" in LISTS["places-lt"].note


def test_check_says_what_the_paper_counts_otherwise(tmp_path):
    report = check("places-lt", tmp_path)
    assert not report.ok
    assert "note   the paper says 184.5K images" in str(report)
