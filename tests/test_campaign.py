import io
import shutil
import tarfile
from dataclasses import replace

import pytest

from mislas.campaign import campaign, files, images_per_second, jobs, merge, pack, parse_budget, wanted
from mislas.errors import MislasError, RecordError
from mislas.methods import configure
from mislas.runs import Store, run
from mislas.train import Options

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


def test_cost_follows_the_rate_of_the_stores_runs(full):
    (job,) = jobs([configure("digits", "mixup", 10, 0, QUICK)], full)
    provenance = full.get(configs()[0]).provenance
    rates = images_per_second(full)[provenance["device"]]
    assert job.seconds_at(rates) == pytest.approx(provenance["seconds"], rel=0.01)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("9m", 540), ("1.5h", 5400)])
def test_budget(text, seconds):
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "9", "m", "-9m", "0m", "9 minutes"])
def test_bad_budget(text):
    with pytest.raises(MislasError, match="such as 90s, 9m"):
        parse_budget(text)


def test_slices_give_the_same_runs_as_no_interruption(full, tmp_path):
    """Every slice runs on a fresh store and passes its archive on, as on machines that start bare."""
    archive = None
    for slice_ in range(10):
        store = Store(tmp_path / f"slice{slice_}")
        if archive is not None:
            merge(archive, store)
        before = files(store)
        done = campaign(configs(), store, None, replace(OPTIONS, eval_every=10), budget=0.01)
        new = tmp_path / f"{slice_}.tar"
        pack(store, new, before)
        if archive is not None:  # archives add up
            merge(archive, store)
            pack(store, new)
        archive = new
        if done:
            break
    assert done
    assert slice_ >= 2
    for config in configs():
        assert store.get(config).metrics == full.get(config).metrics


def test_merge_adds_what_is_new_and_leaves_what_is_there(full, tmp_path):
    archive, store = tmp_path / "a.tar", Store(tmp_path / "store")
    assert pack(full, archive) == len(files(full)) == 5
    assert [record.config.method for record in merge(archive, store)] == ["ce", "lws"]
    assert files(store) == files(full)
    assert all((store.root / p).read_bytes() == (full.root / p).read_bytes() for p in files(full))
    assert merge(archive, store) == []


def rewrite(archive, target, change):
    with tarfile.open(archive) as old, tarfile.open(target, "w") as new:
        for member in old:
            name, data = change(member.name, old.extractfile(member).read())
            if name is not None:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                new.addfile(info, io.BytesIO(data))
    return target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n, d: (n, d[: len(d) // 2]) if n.endswith(".json") else (n, d), "cannot be read"),
        (lambda n, d: (n, d[: len(d) // 2]) if n.endswith(".npz") else (n, d), "damaged"),
        (lambda n, d: (None, b"") if n.endswith(".npz") else (n, d), "without its .npz"),
        (lambda n, d: (None, b"") if n.endswith(".json") else (n, d), "without its record"),
        (lambda n, d: ("../../evil.json", d) if n.endswith(".json") else (n, d), "does not belong"),
        (lambda n, d: (n, d.replace(b'"seed": 0', b'"seed": 7')) if n.endswith(".json") else (n, d), "was changed"),
    ],
    ids=["record cut short", "arrays cut short", "no arrays", "no record", "path outside", "record edited"],
)
def test_merge_refuses_damage_and_adds_nothing(full, tmp_path, change, message):
    good = tmp_path / "good.tar"
    pack(full, good)
    bad = rewrite(good, tmp_path / "bad.tar", change)
    store = Store(tmp_path / "store")
    with pytest.raises(RecordError, match=message) as caught:
        merge(bad, store)
    assert "\n" not in str(caught.value)
    assert not store.root.exists()


def test_merge_refuses_an_archive_cut_short(full, tmp_path):
    archive = tmp_path / "a.tar"
    pack(full, archive)
    archive.write_bytes(archive.read_bytes()[:3000])
    with pytest.raises(RecordError):
        merge(archive, Store(tmp_path / "store"))
    assert not (tmp_path / "store").exists()


def test_merge_refuses_a_run_that_the_store_has_with_other_measures(full, tmp_path):
    archive = tmp_path / "a.tar"
    pack(full, archive)
    store = Store(tmp_path / "store")
    shutil.copytree(full.root, store.root)
    path = store.get(configs()[0]).path
    text = path.read_text()
    accuracy = full.get(configs()[0]).metrics["accuracy"]
    path.write_text(text.replace(f'"accuracy": {accuracy}', '"accuracy": 0.123'))
    with pytest.raises(RecordError, match="other measures"):
        merge(archive, store)
    assert "0.123" in path.read_text()
