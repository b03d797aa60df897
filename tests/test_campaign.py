import contextlib
import io
import json
import shutil
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save as save_safetensors

from mislas.archive import merge, pack
from mislas.campaign import TABLE_3, images_per_second, jobs, parse_budget, wanted
from mislas.cli import main
from mislas.errors import MislasError, RecordError
from mislas.methods import configure
from mislas.models import BACKBONES
from mislas.runs import Store, check_classes, run
from mislas.study import BRIEF, FORMS, GRID, UNSEEN, Study
from mislas.train import Options, OutOfTime

QUICK = {"epochs": 3, "stage2.epochs": 1}
OPTIONS = Options(device="cpu", progress=False)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A store with CE and LWS, never interrupted."""
    store = Store(tmp_path_factory.mktemp("full"))
    run(configs(), store, options=OPTIONS)
    return store


def configs():
    return [configure("digits", method, 10, 0, QUICK) for method in ("ce", "lws")]


def test_wanted_begins_with_table_3_and_names_no_run_twice():
    runs = wanted("cifar10-jpeg", seeds=(0, 1))
    assert [c.method for c in runs[:3]] == ["ce", "mixup", "mislas"]
    assert len({c.id for c in runs}) == len(runs)
    for imbalance in (100, 50, 10):
        grid = {(c.stage2.eps_1, c.stage2.eps_k) for c in runs if c.method == "mislas" and c.imbalance == imbalance}
        assert len(grid) == 21


def test_overrides_come_before_what_a_run_varies_as_in_a_notebook(tmp_path):
    """The 21 cells of the grid keep their eps_1, and the controls on a short Stage-1 theirs."""
    overrides = {"eps_1": 0.25, "stage1.epochs": 3}
    runs = wanted("cifar10", [100], [1], overrides)
    study = Study("full", tmp_path, tmp_path, seeds=[1], overrides=overrides)
    asked = [(m, {}) for m in TABLE_3] + [("mislas", changes) for changes in GRID + FORMS]
    asked += [run for rows in BRIEF["cifar10"][0].values() for row in rows.values() for run in row if run]
    assert {study.configs("cifar10", m, 100, changes)[0].id for m, changes in asked} <= {c.id for c in runs}
    assert runs[2].stage2.eps_1 == 0.25
    cells = {(c.stage2.eps_1, c.stage2.eps_k) for c in runs if c.method == "mislas"}
    assert cells >= {(cell["eps_1"], cell["eps_k"]) for cell in GRID}
    assert {c.stage1.epochs for c in runs} == {3, 10}


def test_images_are_held_out_only_of_classes_that_have_more_than_one():
    held_out = [[c.stage1.holdout for c in wanted("digits", [10], overrides={"n_max": n})] for n in (19, 20)]
    assert [any(each) for each in held_out] == [False, True]


def test_what_a_short_stage1_is_measured_on_is_wanted_of_one_that_holds_images_out_too():
    runs = {config.id for config in wanted("tinyimagenet32", [100])}
    for method, changes in [asked for rows in UNSEEN.values() for asked in rows.values()]:
        for more in ({}, {"stage1.epochs": 20}):
            config = configure("tinyimagenet32", method, 100, 0).override(changes | more)
            assert config.stage1.holdout == 0.1
            assert config.id in runs


def test_of_a_backbone_of_ones_own_no_last_block_is_doubled(monkeypatch):
    monkeypatch.setitem(BACKBONES, "mine", None)
    methods = {config.method for config in wanted("cifar10", [100], overrides={"backbone": "mine"})}
    assert {"mislas", "ldam+drw", "remix+drw"} <= methods
    assert "bbn" not in methods


def test_all_that_is_wanted_of_digits_can_be_trained():
    for config in wanted("digits", [100]):
        check_classes(config)


def test_the_grid_of_21_cells_is_one_job(tmp_path):
    cells = [c for c in wanted("digits", [10]) if c.method == "mislas" and c.stage2.form == "concave"]
    together = [job for job in jobs(cells, Store(tmp_path)) if job.group[0].stage2]
    assert max(len(job.group) for job in together) >= 21


def test_the_controls_of_figure_6_are_wanted():
    runs = {config.id for config in wanted("cifar10-jpeg")}
    assert configure("cifar10-jpeg", "lws", overrides={"stage2.shift_bn": True}).id in runs
    assert configure("cifar10-jpeg", "logit-adjustment+mixup", 50, overrides={"shift_epochs": 1}).id in runs


def test_a_job_costs_epochs_times_images(tmp_path):
    (job,) = jobs([configure("cifar10", "ce")], Store(tmp_path))
    assert job.passes == 200 * 12406
    assert job.seconds_at({}) is None


def test_a_rule_costs_a_pass_over_the_images_and_one_for_each_epoch_of_shift(tmp_path):
    found = jobs([configure("cifar10", "ncm+shift")], Store(tmp_path))
    assert [job.passes for job in found] == [200 * 12406, (1 + 10) * 12406]


def test_cost_follows_the_rate_of_the_stores_runs(full):
    (job,) = jobs([configure("digits", "mixup", 10, 0, QUICK)], full)
    provenance = full.get(configs()[0]).provenance
    rates = images_per_second(full)[provenance["device"]]
    assert job.seconds_at(rates) == pytest.approx(provenance["seconds"], rel=0.01)


def test_rates_are_not_those_of_runs_that_held_images_out(tmp_path):
    store, source = Store(tmp_path), {"device": "A device", "seconds": 10.0, "class_counts": [100]}
    source |= {"date": "2026-01-01", "commit": "0", "torch": "0", "data": "made up", "data_checksum": "0"}
    metrics = {"accuracy": 0.5, "ece": 0.1, "nll": 1.0}
    for config in (configure("cifar10", "temperature"), configure("cifar10", "ce", overrides={"stage1.holdout": 0.1})):
        store.put(config, metrics, [], {}, source)
    assert images_per_second(store) == {}
    store.put(configure("cifar10", "ce"), metrics, [], {}, source)
    assert [list(rates.values()) for rates in images_per_second(store).values()] == [[200 * 100 / 10]]


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("9m", 540), ("1.5h", 5400)])
def test_budget(text, seconds):
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "9", "m", "-9m", "0m", "9 minutes"])
def test_bad_budget(text):
    with pytest.raises(MislasError, match="such as 90s, 9m"):
        parse_budget(text)


def files(store):
    return {path.relative_to(store.root).as_posix(): path.read_bytes() for path in store.root.glob("*/*")}


def members(archive):
    with tarfile.open(archive) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def write(archive, content):
    with tarfile.open(archive, "w") as tar:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return archive


def suffixes(names):
    return sorted(name.rpartition(".")[2] for name in names)


def checkpoint(path, runs, epoch):
    """What :func:`pack` and :func:`merge` look at in a checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"runs": runs, "epoch": epoch}, path)
    return path.read_bytes()


def test_slices_give_the_same_runs_as_no_interruption(full, tmp_path, near):
    """Every slice runs on a fresh store and passes its archive on, as on machines that start bare. By the clock that
    stands still a second is enough for an epoch, and for no other."""
    archive = tmp_path / "a.tar"
    for slice_ in range(10):
        store = Store(tmp_path / f"slice{slice_}")
        if archive.exists():
            merge(archive, store)
        with contextlib.suppress(OutOfTime):
            run(configs(), store, options=replace(OPTIONS, eval_every=10, deadline=near))
        pack(configs(), store, archive)
        if all(map(store.get, configs())):
            break
    assert slice_ >= 2
    assert suffixes(members(archive)) == ["json", "json", "npz", "npz", "safetensors"]
    for config in configs():
        assert store.get(config).metrics == full.get(config).metrics


def test_an_archive_has_every_run_whole_with_the_stage_1_that_it_builds_on(full, tmp_path):
    archive = tmp_path / "a.tar"
    assert pack(configs()[1:], full, archive) == 5
    assert members(archive) == files(full)
    assert pack([], full, tmp_path / "none.tar") == 0


@pytest.mark.parametrize("method", ["+mine", ".mine", "my own/ce"])
def test_a_method_of_any_name_is_packed(full, tmp_path, method):
    archive, store, ce = tmp_path / "a.tar", Store(tmp_path / "store"), configs()[0]
    record, named = full.get(ce), replace(ce, method=method)
    store.put(named, record.metrics, record.history, record.arrays(), record.provenance)
    assert pack([named], store, archive) == 2
    assert [record.config.method for record in merge(archive, Store(tmp_path / "other"))] == [method]


def test_what_a_killed_start_left_is_packed_by_the_next(full, tmp_path):
    archive, store, other = tmp_path / "a.tar", Store(tmp_path / "store"), Store(tmp_path / "other")
    assert pack(configs(), store, archive) == 0
    shutil.copytree(full.root, store.root)  # trained, then killed before it was packed
    assert pack(configs(), store, archive) == 5
    assert len(merge(archive, other)) == 2


def test_an_archive_keeps_what_a_later_store_lacks(full, tmp_path):
    archive = tmp_path / "a.tar"
    pack(configs(), full, archive)
    before = members(archive)
    assert pack(configs(), Store(tmp_path / "empty"), archive) == 5
    assert members(archive) == before


def test_an_archive_has_the_checkpoint_further_on_and_none_of_a_finished_run(full, tmp_path):
    ce, archive, store = configs()[0], tmp_path / "a.tar", Store(tmp_path / "store")
    path = store.checkpoint([ce])
    name = path.relative_to(store.root).as_posix()
    for epoch, kept in ((2, 2), (1, 2), (3, 3)):
        checkpoint(path, [ce.id], epoch)
        pack([ce], store, archive)
        (content,) = members(archive).values()
        assert torch.load(io.BytesIO(content))["epoch"] == kept
    path.unlink()
    assert pack([ce], store, archive) == 1
    assert pack([ce], full, archive) == 3
    assert name not in members(archive)


@pytest.mark.parametrize("content", [b"", b"my notes"])
def test_a_file_that_is_no_archive_is_left_alone(tmp_path, content):
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(RecordError, match=r"cannot be read .*name another file"):
        pack(configs(), Store(tmp_path / "store"), path)
    assert path.read_bytes() == content


def test_an_archive_that_cannot_be_written_is_told_before_anything_trains(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mislas.cli.run", None)
    (tmp_path / "file").touch()
    command = ["campaign", "--dataset", "digits", "--imbalance", "10", "--results-root", str(tmp_path / "results")]
    assert main([*command, "--pack", str(tmp_path / "file" / "a.tar")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "file") in line


def test_merge_adds_what_is_new_and_leaves_what_is_there(full, tmp_path):
    archive, store = tmp_path / "a.tar", Store(tmp_path / "store")
    pack(configs(), full, archive)
    assert [record.config.method for record in merge(archive, store)] == ["ce", "lws"]
    assert files(store) == files(full)
    assert merge(archive, store) == []
    store.find(configs()[0], ".safetensors").unlink()
    assert merge(archive, store) == []
    assert files(store) == files(full)


@pytest.mark.parametrize("method", ["ce", "temperature"])  # one Stage-1, whichever the other machine was asked for
@pytest.mark.parametrize(("stored", "packed"), [(5, 3), (3, 5)])
def test_merge_keeps_the_checkpoint_that_is_further_on(tmp_path, stored, packed, method):
    store, ce = Store(tmp_path / "store"), configs()[0]
    path = store.checkpoint([ce])
    path.parent.mkdir(parents=True)
    path.write_bytes(checkpoint(tmp_path / "own.ckpt", [ce.id], stored))
    content = checkpoint(tmp_path / "other.ckpt", [ce.id], packed)
    name = Store("").checkpoint([replace(ce, method=method)]).as_posix()
    merge(write(tmp_path / "a.tar", {name: content}), store)
    assert store.under_way() == [path]
    assert torch.load(path, weights_only=True)["epoch"] == 5


def test_an_archive_has_one_checkpoint_of_a_run_whatever_it_is_called(tmp_path):
    ce, archive = configs()[0], tmp_path / "a.tar"
    for epoch, method, kept in ((2, "ce", 2), (1, "plain", 2), (3, "plain", 3)):
        store = Store(tmp_path / f"{epoch}")
        checkpoint(store.checkpoint([replace(ce, method=method)]), [ce.id], epoch)
        assert pack([ce], store, archive) == 1
        (content,) = members(archive).values()
        assert torch.load(io.BytesIO(content))["epoch"] == kept


def test_merge_passes_over_the_checkpoints_of_finished_runs(full, tmp_path):
    (ce, lws), store = configs(), Store(tmp_path / "store")
    shutil.copytree(full.root, store.root)
    content = {}
    for group in ([ce], [lws], [lws, replace(lws, seed=1)]):
        path = Store(tmp_path / "other").checkpoint(group)
        content[f"digits-if10/{path.name}"] = checkpoint(path, [config.id for config in group], 1)
    archive = write(tmp_path / "a.tar", content)
    merge(archive, store)
    assert store.under_way() == [store.checkpoint([lws, replace(lws, seed=1)])]
    store.find(ce, ".safetensors").unlink()  # now CE trains again, for its weights
    merge(archive, store)
    assert store.checkpoint([ce]) in store.under_way()
    assert store.checkpoint([lws]) not in store.under_way()


def cut(data):
    return data[: len(data) // 2]


def without(key):
    def change(data):
        arrays = dict(np.load(io.BytesIO(data)))
        del arrays[key]
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        return buffer.getvalue()

    return change


def measure(key, value):
    def change(data):
        record = json.loads(data)
        record["metrics"][key] = value
        return json.dumps(record).encode()

    return change


@pytest.mark.parametrize(
    ("suffix", "change", "message"),
    [
        ("json", cut, "cannot be read"),
        ("npz", cut, "damaged"),
        ("safetensors", cut, "damaged"),
        ("safetensors", lambda data: b"", "damaged"),
        ("safetensors", lambda data: save_safetensors({"a": torch.zeros(1)}, {"run": "another"}), "of run another"),
        ("safetensors", lambda data: save_safetensors({"a": torch.zeros(1)}), "of run unknown"),
        ("npz", None, r"without its \.npz"),
        ("json", None, "without its record"),
        ("json", lambda data: data.replace(b'"seed": 0', b'"seed": 7'), "was changed"),
        ("json", lambda data: json.dumps(json.loads(data) | {"metrics": None}).encode(), "cannot be read"),
        ("json", lambda data: data.replace(b'"accuracy": ', b'"accurate": '), "cannot be read"),
        ("json", lambda data: b"[" * 100_000, "cannot be read"),
        ("json", measure("accuracy", None), "cannot be read .*metrics.accuracy is None"),
        ("json", measure("ece", "0.1"), r"cannot be read .*metrics\.ece is .0\.1"),
        ("json", measure("ece", float("nan")), "its record says nan"),
        ("json", measure("accuracy", 0.123), r"gives accuracy .* says 0\.123"),
        ("json", measure("ece", 0.987), r"gives ece .* says 0\.987"),
        ("npz", without("confidence"), "damaged"),
        ("npz", without("true_probability"), "damaged"),
    ],
)
def test_merge_refuses_damage_and_adds_nothing(full, tmp_path, suffix, change, message):
    content = {}
    for name, data in files(full).items():
        if not name.endswith(suffix):
            content[name] = data
        elif change is not None:
            content[name] = change(data)
    store = Store(tmp_path / "store")
    with pytest.raises(RecordError, match=message) as caught:
        merge(write(tmp_path / "bad.tar", content), store)
    assert "\n" not in str(caught.value)
    assert not store.root.exists()


@pytest.mark.parametrize("sparse", [False, True])
def test_merge_refuses_an_archive_that_claims_more_than_it_has(tmp_path, sparse):
    """64 GiB in a header; sparse, that is a file of zeros of which nothing is stored."""
    info = tarfile.TarInfo("digits-if10/ce-s0-0123456789ab.json")
    info.size = 2**36
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    if sparse:
        header[124:136], header[156:157], header[483:495] = b"0" * 11 + b"\0", b"S", b"%011o\0" % 2**35
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "bomb.tar").write_bytes(bytes(header) + bytes(20 * 512))
    with pytest.raises(RecordError, match=r"cannot be read \(.*is larger than the archive"):
        merge(tmp_path / "bomb.tar", Store(tmp_path / "store"))


@pytest.mark.parametrize(
    "name",
    ["../../evil.json", "../evil.json", ".hidden/evil.json", "evil.json", "a/b/evil.json", "a/evil.txt"],
)
def test_merge_refuses_what_does_not_belong_in_a_store(full, tmp_path, name):
    archive = write(tmp_path / "bad.tar", {**files(full), name: b"{}"})
    with pytest.raises(RecordError, match="does not belong in a store"):
        merge(archive, Store(tmp_path / "store"))
    assert list(tmp_path.iterdir()) == [archive]


@pytest.mark.parametrize(("old", "new"), [("digits-if10/", "digits-if50/"), ("/ce-s0", "/ce-s1"), ("/ce-", "/mixup-")])
def test_merge_refuses_a_run_under_another_name(full, tmp_path, old, new):
    archive = write(tmp_path / "bad.tar", {name.replace(old, new): data for name, data in files(full).items()})
    with pytest.raises(RecordError, match="does not belong there, but at digits-if10/"):
        merge(archive, Store(tmp_path / "store"))
    assert list(tmp_path.iterdir()) == [archive]


@pytest.mark.parametrize("where", ["archive", "store"])
def test_merge_refuses_a_damaged_checkpoint_before_it_adds_a_run(full, tmp_path, where):
    mixup, store = configure("digits", "mixup", 10), Store(tmp_path / "store")
    path = store.checkpoint([mixup])
    content = files(full) | {path.relative_to(store.root).as_posix(): checkpoint(path, [mixup.id], 1)}
    if where == "archive":
        content = {name: b"garbage" if name.endswith("ckpt") else data for name, data in content.items()}
    else:
        path.write_bytes(b"garbage")
    before = files(store)
    with pytest.raises(RecordError, match=r"ckpt is damaged .*restore it, or delete it"):
        merge(write(tmp_path / "a.tar", content), store)
    assert files(store) == before


def test_merge_refuses_the_checkpoint_of_other_runs(tmp_path):
    ce, lws = configs()
    for group in ([ce], [ce, lws]):
        name = f"digits-if10/{Store().checkpoint(group).name}"
        archive = write(tmp_path / "a.tar", {name: checkpoint(tmp_path / "other.ckpt", [lws.id], 1)})
        with pytest.raises(RecordError, match=f"it is the checkpoint of {lws.id}"):
            merge(archive, Store(tmp_path / "store"))


def put(store, sure, right, own, measures):
    """A run with these predictions of class 0, which has many training images, and these measures in its record."""
    target, lws = np.zeros(len(right), np.uint8), configs()[1]
    arrays = {
        "target": target,
        "predicted": np.where(right, 0, 1).astype(np.uint8),
        "confidence": np.rint(np.array(sure) * 65535).astype(np.uint16),
        "true_probability": np.rint(np.array(own) * 65535).astype(np.uint16),
        "class_counts": np.array([200] + [10] * 9),
    }
    accuracy, ece = float(np.mean(right)), measures["ece"]
    known = {"accuracy": accuracy, "accuracy_many": accuracy, "ece_many": ece, "confidence": float(np.mean(sure))}
    source = dict.fromkeys(("date", "commit", "device", "torch", "data", "data_checksum"), "made up")
    store.put(lws, known | measures, [], arrays, source)
    return write(store.root.with_suffix(".tar"), files(store))


#: Bin (0.4, 0.467]: 0.45 sure, half of them right; bin (0.933, 1]: all sure, all right.
WORKED = {"ece": 0.05 / 2, "mce": 0.05, "nll": -(np.log(0.45) + np.log(0.2)) / 4}


def worked(root, **measures):
    return put(Store(root), [0.45, 0.45, 1, 1], [1, 0, 1, 1], [0.45, 0.2, 1, 1], WORKED | measures)


def test_merge_works_out_the_measures(tmp_path):
    assert len(merge(worked(tmp_path / "right"), Store(tmp_path / "store"))) == 1


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("ece", 0.026, "0.0250"),
        ("ece_many", 0.0, "0.0250"),
        ("accuracy_many", None, "0.7500"),
        ("accuracy_few", 0.999, "nan"),
        ("confidence", 0.726, "0.7250"),
        ("mce", 0.051, "0.0500"),
        ("nll", 0.001, "0.6020"),
    ],
)
def test_merge_refuses_measures_that_do_not_follow_from_the_predictions(tmp_path, name, value, found):
    with pytest.raises(RecordError, match=rf"gives {name} {found}.*, its record says {value}"):
        merge(worked(tmp_path / "wrong", **{name: value}), Store(tmp_path / "other"))


def test_merge_allows_for_a_confidence_that_rounding_moved_into_the_bin_below(tmp_path):
    """0.200001 is above the edge at 0.2, but not once it is rounded. With it apart ECE = (0.8 + 0.15) / 2."""
    measures = {"ece": 0.475, "mce": 0.8, "nll": -np.log(0.200001 * 0.1) / 2}
    archive = put(Store(tmp_path / "made"), [0.200001, 0.15], [1, 0], [0.200001, 0.1], measures)
    assert len(merge(archive, Store(tmp_path / "store"))) == 1


def test_merge_allows_for_a_probability_that_is_rounded_to_0(tmp_path):
    """The least likely that is rounded so is 1 / 131070; of one that is 1e-9 the likelihood's logarithm is far less."""
    archives = [
        put(Store(tmp_path / name), [1], [0], [1e-9], {"ece": 1.0, "mce": 1.0, "nll": nll})
        for name, nll in (("right", -np.log(1e-9)), ("wrong", 11.0))
    ]
    assert len(merge(archives[0], Store(tmp_path / "store"))) == 1
    with pytest.raises(RecordError, match=r"gives nll 11\.7835 to inf, its record says 11"):
        merge(archives[1], Store(tmp_path / "other"))


@pytest.mark.parametrize("damage", ["within a file", "between files", "within a header", "a bit of a header"])
def test_an_archive_that_is_cut_or_damaged_is_refused(full, tmp_path, damage):
    archive = tmp_path / "a.tar"
    pack(configs(), full, archive)
    whole = archive.read_bytes()
    with tarfile.open(archive) as tar:
        second = tar.getmembers()[1].offset
    damaged = {
        "within a file": whole[:3000],
        "between files": whole[:second],
        "within a header": whole[: second + 100],
        "a bit of a header": whole[: second + 10] + bytes([whole[second + 10] ^ 1]) + whole[second + 11 :],
    }[damage]
    archive.write_bytes(damaged)
    with pytest.raises(RecordError, match=r"cannot be read .*copy it again"):
        merge(archive, Store(tmp_path / "store"))
    assert not (tmp_path / "store").exists()
    with pytest.raises(RecordError, match="cannot be read"):
        pack(configs(), full, archive)
    assert archive.read_bytes() == damaged


def test_merge_refuses_a_run_that_the_store_has_with_other_measures(full, tmp_path):
    archive, store = tmp_path / "a.tar", Store(tmp_path / "store")
    pack(configs(), full, archive)
    shutil.copytree(full.root, store.root)
    path = store.get(configs()[0]).path
    path.write_bytes(measure("accuracy", 0.123)(path.read_bytes()))
    store.find(configs()[1]).unlink()
    before = files(store)
    with pytest.raises(RecordError, match="other measures"):
        merge(archive, store)
    assert files(store) == before
