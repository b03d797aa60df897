import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from sklearn.metrics import accuracy_score, balanced_accuracy_score, log_loss
from sklearn.utils.class_weight import compute_sample_weight
from torch import nn
from torchmetrics.functional.classification import binary_calibration_error

from mislas import runs
from mislas.augment import Images
from mislas.config import SCHEDULES
from mislas.data import SPECS, Dataset, load
from mislas.errors import ForeignRecord, MislasError, RecordError
from mislas.evaluate import predict
from mislas.losses import LOSSES, LossSpec, cross_entropy
from mislas.methods import configure
from mislas.models import GeneralisedClassifier, backbone
from mislas.runs import SOURCE, Store, claimed, finish, plan, read_weights, run
from mislas.samplers import SAMPLERS
from mislas.train import Options, OutOfTime, Trained

QUICK = {"epochs": 3, "stage2.epochs": 2}
OPTIONS = Options(device="cpu", progress=False)


def config(method, seed=0, **changes):
    return configure("digits", method, 50, seed, QUICK | changes)


CE, LWS = config("ce"), config("lws")


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A store with CE and LWS, to read from."""
    store = Store(tmp_path_factory.mktemp("full"))
    run([CE, LWS], store, options=OPTIONS)
    return store


@pytest.fixture
def store(full, tmp_path):
    """A copy of it, to change."""
    return Store(shutil.copytree(full.root, tmp_path / "store"))


@pytest.fixture
def calls(monkeypatch):
    """Counts what is trained: a list of ("stage1" or "stage2", methods)."""
    made, one, two = [], runs.train_stage1, runs.train_stage2

    def train_stage1(config, *rest):
        made.append(("stage1", [config.method]))
        return one(config, *rest)

    def train_stage2(configs, *rest):
        made.append(("stage2", [config.method for config in configs]))
        return two(configs, *rest)

    monkeypatch.setattr(runs, "train_stage1", train_stage1)
    monkeypatch.setattr(runs, "train_stage2", train_stage2)
    return made


def contents(store):
    return {path.relative_to(store.root): path.read_bytes() for path in store.root.rglob("*") if path.is_file()}


# --------------------------------------------------------------------------------------------------- what is trained


def test_a_configuration_never_trains_twice(store, calls):
    before = contents(store)
    again = run([CE, LWS, CE], store, options=OPTIONS)
    assert calls == []
    assert [record.config for record in again] == [CE, LWS, CE]
    assert contents(store) == before


def test_a_configuration_under_another_name_is_the_same_run(store, calls):
    renamed = replace(LWS, method="ours")
    assert run(renamed, store, options=OPTIONS)[0].path == store.get(LWS).path
    assert calls == []


def test_a_run_goes_on_from_its_checkpoint_under_another_name(full, tmp_path, killed):
    """And no other process trains it meanwhile: the lock, too, is of what it is."""
    store, renamed = Store(tmp_path), replace(CE, method="plain")
    with killed(15):
        run(renamed, store, options=replace(OPTIONS, checkpoint_every=0))
    (path,) = store.under_way()
    assert path.name.startswith("plain-s0-")
    assert store.checkpoint([CE]) == path
    assert store.lock(CE) == store.lock(renamed)
    with killed(10):  # of the 12 of an epoch: what is there is not overwritten by a training from the start
        run(CE, store, options=replace(OPTIONS, checkpoint_every=0))
    assert store.under_way() == [path]
    assert torch.load(path, weights_only=True)["epoch"] == 1
    assert run(CE, store, options=OPTIONS)[0].metrics == full.get(CE).metrics
    assert store.under_way() == []


def test_stage1_is_trained_once_and_stage2_runs_share_a_pass(tmp_path, calls):
    store = Store(tmp_path)
    records = run([config("crt", epochs=1), config("lws", epochs=1)], store, options=OPTIONS)
    assert calls == [("stage1", ["ce"]), ("stage2", ["crt", "lws"])]
    assert [record.config.method for record in records] == ["crt", "lws"]
    assert store.get(config("ce", epochs=1)) is not None
    run(config("lws+las", epochs=1), store, options=OPTIONS)
    assert calls[2:] == [("stage2", ["lws+las"])]


def test_stage1_comes_before_what_builds_on_it():
    assert plan([LWS, config("mixup"), config("crt"), config("mislas")], Store("/nowhere")) == [
        [CE],
        [LWS, config("crt")],
        [config("mixup")],
        [config("mislas")],
    ]


def test_what_another_process_trains_is_waited_for(full, tmp_path, calls, capfd):
    """It holds the lock, and leaves its runs behind as it lets go."""
    store = Store(tmp_path)
    lock = FileLock(store.lock(CE))
    Path(lock.lock_file).parent.mkdir()
    with ThreadPoolExecutor() as pool:
        with lock:
            waiting = pool.submit(run, CE, store, options=replace(OPTIONS, progress=True))
            said = ""
            while "another process trains" not in said:
                assert not waiting.done(), waiting.result()
                said += capfd.readouterr().err
            for suffix in (".npz", ".safetensors", ".json"):
                shutil.copy(full.find(CE, suffix), store.path(CE, suffix))
        (record,) = waiting.result()
    assert record.provenance == full.get(CE).provenance
    assert calls == []
    assert not list(tmp_path.glob("*/*.lock"))


def test_a_run_is_waited_for_in_whatever_company_another_process_trains_it(full, tmp_path, near):
    """Here it is CE, which the other has locked; both groups begin with what they lock first."""
    store, mixup = Store(tmp_path), config("mixup")
    for mine, others in (([CE], [CE, mixup]), ([CE, mixup], [CE])):
        with (
            claimed([others], store, OPTIONS),
            pytest.raises(OutOfTime, match="another process still trains ce-s0"),
            claimed([mine], store, replace(OPTIONS, deadline=time.monotonic() + 0.1)),
        ):
            pass
    with claimed([[CE]], store, OPTIONS), claimed([[mixup]], store, OPTIONS):
        assert len(list(tmp_path.glob("*/*.lock"))) == 2
    assert not list(tmp_path.glob("*/*.lock"))


def test_no_mark_is_left_where_a_disk_knows_no_locks(tmp_path, monkeypatch):
    """It would outlive a process that is killed, and nobody could train that run again."""

    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    with claimed([[CE]], Store(tmp_path), OPTIONS), claimed([[CE]], Store(tmp_path), OPTIONS):
        pass


def test_nothing_more_is_begun_after_the_deadline(tmp_path):
    configs = [configure("digits", method, 50, overrides=QUICK | {"epochs": 1}) for method in ("ce", "ncm")]
    with pytest.raises(OutOfTime, match="before a training"):
        run(configs, Store(tmp_path), options=replace(OPTIONS, deadline=time.monotonic() - 1))
    assert not list(Store(tmp_path))
    run(configs[0], Store(tmp_path), options=OPTIONS)
    run(configs[0], Store(tmp_path), options=replace(OPTIONS, deadline=time.monotonic() - 1))  # it is there


def test_waiting_for_another_process_ends_at_the_deadline(tmp_path):
    store = Store(tmp_path)
    path = store.lock(CE)
    path.parent.mkdir()
    with FileLock(path), pytest.raises(OutOfTime, match="another process still trains ce-s0"):
        run(CE, store, options=replace(OPTIONS, deadline=time.monotonic() + 0.1))


def test_a_lock_that_a_killed_process_left_is_free(tmp_path, calls):
    store = Store(tmp_path)
    path = store.lock(CE)
    code = "import sys, filelock, os; filelock.FileLock(sys.argv[1]).acquire(); os.kill(os.getpid(), 9)"
    path.parent.mkdir()
    assert subprocess.run([sys.executable, "-c", code, path], check=False).returncode == -9
    assert path.exists()
    run(CE, store, options=OPTIONS)
    assert calls == [("stage1", ["ce"])]
    assert not path.exists()


def test_a_store_that_cannot_be_written_stops_before_training(tmp_path, calls, monkeypatch):
    def acquire(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(FileLock, "acquire", acquire)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OSError, match="Read-only"):
        run(CE, tmp_path, options=OPTIONS)
    assert not calls


def test_what_a_process_left_that_was_killed_as_it_wrote_goes_when_its_runs_are_done(tmp_path, calls):
    store, group = Store(tmp_path), [config("crt", epochs=1), config("lws", epochs=1)]
    paths = [store.checkpoint(group), store.path(group[0], ".json"), store.path(group[1], ".npz")]
    *left, other = (path.with_name(f".{path.name}.0123.part") for path in (*paths, store.path(CE, ".json")))
    other.parent.mkdir()
    for part in (*left, other):
        part.touch()
    run(group, store, options=OPTIONS)
    assert not any(part.exists() for part in left)
    assert other.exists()


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.EACCES])  # the latter: a lock that another user left
def test_a_disk_without_locks_is_no_hindrance(tmp_path, calls, monkeypatch, error):
    def acquire(*_, **__):
        raise OSError(error, "No locks available")

    monkeypatch.setattr(FileLock, "acquire", acquire)
    run(config("ce", epochs=1), Store(tmp_path), options=OPTIONS)
    assert calls == [("stage1", ["ce"])]


def test_stage1_is_trained_again_where_only_its_weights_are_missing(store, calls):
    store.find(CE, ".safetensors").unlink()
    before = contents(store)
    run(config("crt"), store, options=OPTIONS)
    assert calls == [("stage1", ["ce"]), ("stage2", ["crt"])]
    assert {path: contents(store)[path] for path in before} == before


@pytest.mark.parametrize("together", [1, 2])
def test_a_run_that_diverges_leaves_the_rest_to_be_trained(tmp_path, capfd, together):
    """What builds on it is not; in a pass that it shares with others, they go on without it."""
    store, hot = Store(tmp_path), {"stage1.lr": 1e30}
    asked = [
        config("lws", **hot), config("mislas"), config("crt", **{"stage2.lr": 1e30}), config("crt", **hot), LWS, CE,
    ]  # fmt: skip
    with pytest.raises(MislasError) as caught:
        run(asked, store, options=replace(OPTIONS, together=together, progress=True))
    assert [store.get(one) is not None for one in asked] == [False, True, False, False, True, True]
    first, second = str(caught.value).split("; ")[::2]
    assert "stage1 ce seed 0 diverged" in first
    assert "stage2 crt seed 0 diverged" in second
    assert capfd.readouterr().err.count("going on with the other runs") == 2


@pytest.mark.parametrize("batches", [15, 50], ids=["in stage 1", "in stage 2"])
def test_a_killed_run_resumes_to_the_same_result(full, tmp_path, killed, batches):
    store = Store(tmp_path)
    with killed(batches):
        run([CE, LWS], store, options=replace(OPTIONS, checkpoint_every=0))
    (checkpoint,) = store.under_way()
    in_stage1 = batches == 15
    assert checkpoint.name.startswith("ce" if in_stage1 else "lws")
    assert (store.get(CE) is None) == in_stage1
    assert store.get(LWS) is None
    for got in run([CE, LWS], store, options=OPTIONS):
        expected = full.get(got.config)
        assert got.metrics == expected.metrics
        assert got.history == expected.history
        for name, array in expected.arrays().items():
            assert np.array_equal(got.arrays()[name], array), name
    assert store.under_way() == []
    assert contents(store).keys() == contents(full).keys()


def test_a_record_is_written_last(full, tmp_path, monkeypatch):
    """What has one is complete."""

    def full_disk(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    store, record = Store(tmp_path), full.get(CE)
    monkeypatch.setattr(np, "savez_compressed", full_disk)
    with pytest.raises(OSError, match="No space"):
        store.put(CE, record.metrics, record.history, record.arrays(), record.provenance)
    assert store.get(CE) is None


def test_a_store_may_be_named_by_its_folder(full, monkeypatch):
    assert [record.metrics for record in run([CE, LWS], str(full.root))] == [full.get(c).metrics for c in (CE, LWS)]
    monkeypatch.setattr("mislas.runs.default_results_root", lambda: full.root)
    assert Store().root == full.root
    assert run(CE)[0].metrics == full.get(CE).metrics


def test_runs_that_train_together_go_on_in_whatever_order_they_are_asked_for(full, tmp_path, killed):
    store, crt = Store(tmp_path), config("crt")
    with killed(50):
        run([crt, LWS], store, options=replace(OPTIONS, checkpoint_every=0))
    assert [path.stem.split("-")[0] for path in store.under_way()] == ["together"]
    got, _ = run([LWS, crt], store, options=OPTIONS)
    assert got.metrics == full.get(LWS).metrics
    assert store.under_way() == []


# ---------------------------------------------------------------------------------------------------- what is stored


@pytest.mark.parametrize("which", [CE, LWS], ids=["ce", "lws"])
def test_a_records_measures_follow_from_its_predictions(full, digits, which):
    record = full.get(which)
    predictions = record.predictions()
    assert np.array_equal(predictions.target, digits.test_targets)
    assert record.metrics["accuracy"] == pytest.approx(accuracy_score(predictions.target, predictions.predicted))
    counts = np.bincount(digits.train_targets)
    for name, classes in (("many", counts > 100), ("medium", (counts >= 20) & (counts <= 100)), ("few", counts < 20)):
        inside = classes[predictions.target]
        expected = accuracy_score(predictions.target[inside], predictions.predicted[inside])
        assert record.metrics[f"accuracy_{name}"] == pytest.approx(expected, abs=1e-6)
    confidence, correct = torch.from_numpy(predictions.confidence), torch.from_numpy(predictions.correct).long()
    ece = binary_calibration_error(confidence, correct, n_bins=15).item()
    assert record.metrics["ece"] == pytest.approx(ece, abs=1e-4)
    assert record.metrics["confidence"] == pytest.approx(predictions.confidence.mean(), abs=1e-4)
    right = predictions.correct
    np.testing.assert_array_equal(predictions.confidence[right], predictions.true_probability[right])


def test_a_record_says_where_its_numbers_come_from(full, digits):
    source = full.get(LWS).provenance
    assert source["data"] == "digits"
    assert source["data_checksum"] == digits.checksum
    assert source["class_counts"] == list(digits.class_counts)
    assert source["torch"] == torch.__version__
    assert source["numpy"] == np.__version__
    assert source["seconds"] > 0
    assert "CPU" in source["device"]
    assert datetime.fromisoformat(source["date"]).utcoffset() is not None
    assert {"commit", "mislas", "python", "threads", "compile"} <= source.keys()


@pytest.mark.parametrize(
    ("used", "native", "said"),
    [(4, True, "(CPU, 4 cores)"), (1, True, "(CPU, 1 of 4 cores)"), (4, False, "(CPU without bfloat16, 4 cores)")],
)
def test_a_processor_is_named_with_the_cores_that_are_used(used, native, said, monkeypatch):
    monkeypatch.setattr(runs.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(runs.torch, "get_num_threads", lambda: used)
    monkeypatch.setattr(runs, "native_bfloat16", lambda device: native)
    assert runs.device_name(torch.device("cpu")).endswith(said)


def test_a_record_is_json_with_the_configuration_identity_and_history(full):
    content = json.loads(full.get(LWS).path.read_text())
    assert content["id"] == LWS.id
    assert content["config"]["stage2"]["learn_scale"] is True
    assert [row["epoch"] for row in content["history"]] == [1, 2]
    assert content["history"][-1]["test_accuracy"] == round(content["metrics"]["accuracy"], 4)


def test_norms_are_those_of_the_stored_classifier(full):
    _, head = full.get_weights(CE, 10)
    norms = np.linalg.norm(head.weight.detach().numpy(), axis=1)
    np.testing.assert_allclose(full.get(CE).arrays()["weight_norm"], norms, rtol=1e-6)


def test_norms_of_a_classifier_with_scales_are_scaled(digits, tmp_path):
    head = GeneralisedClassifier(nn.Linear(64, 10), a=1, learn_scale=True, delta=None)
    head.scale.data.copy_(torch.arange(1.0, 11))
    test = Images(digits.test_images, digits.spec.mean, digits.spec.std, padding=0)
    finish([LWS], Trained(backbone("resnet8"), [head], [[{}]], 1.0), digits, test, Store(tmp_path), OPTIONS)
    norms = np.arange(1, 11) * head.weight.norm(dim=1).numpy()
    np.testing.assert_allclose(Store(tmp_path).get(LWS).arrays()["weight_norm"], norms, rtol=1e-6)


def test_a_classifier_without_weights_of_a_class_has_no_norms(digits, tmp_path):
    class Few(nn.Linear):  # a weight, and of two dimensions
        def __init__(self):
            super().__init__(64, 3)

        def forward(self, features):
            return super().forward(features) @ torch.eye(3, 10)

    test = Images(digits.test_images, digits.spec.mean, digits.spec.std, padding=0)
    finish([LWS], Trained(backbone("resnet8"), [Few()], [[{}]], 1.0), digits, test, Store(tmp_path), OPTIONS)
    arrays = Store(tmp_path).get(LWS).arrays()
    assert "weight_norm" not in arrays
    assert len(arrays["class_counts"]) == 10


def test_a_look_along_the_way_counts_what_is_right(full, digits):
    """Of a model trained to its end, it finds what the record says of the end."""
    network, head = full.get_weights(CE, 10)
    network.to(memory_format=torch.channels_last)
    test = Images(digits.test_images, digits.spec.mean, digits.spec.std, padding=0)
    (row,) = runs._along_the_way(digits, test)(network, [head])
    assert row == {"test_accuracy": round(full.get(CE).metrics["accuracy"], 4)}


def test_batch_norm_statistics_are_those_of_the_stored_backbone(full):
    network, _ = full.get_weights(CE, 10)
    arrays = full.get(CE).arrays()
    np.testing.assert_array_equal(arrays["bn_first_mean"], network.bn.running_mean)
    np.testing.assert_array_equal(arrays["bn_last_var"], network.blocks[-1].bn2.running_var)


def test_stored_weights_give_the_recorded_predictions_exactly(full, digits):
    network, head = full.get_weights(CE, 10)
    test = Images(digits.test_images, digits.spec.mean, digits.spec.std, padding=0)
    (logits,) = predict(network.to(memory_format=torch.channels_last), [head], test)
    p = logits.double().softmax(1).numpy()
    stored = full.get(CE).arrays()
    assert np.array_equal(p.argmax(axis=1), stored["predicted"])
    assert np.array_equal(np.rint(p.max(axis=1) * 65535), stored["confidence"])


def test_weights_come_back_as_they_were_put(digits, options, tmp_path):
    store, trained = Store(tmp_path), runs.train_stage1(config("ce", epochs=1), digits, options)
    store.put_weights(CE, trained.backbone, trained.heads[0])
    network, head = store.get_weights(CE, 10)
    x = torch.randn(5, 3, 16, 16).to(memory_format=torch.channels_last)
    network = network.to(memory_format=torch.channels_last).eval()
    assert torch.equal(head(network(x)), trained.heads[0](trained.backbone(x)))
    assert network.conv.weight.dtype == torch.float32


def test_weights_that_share_memory_come_back(tmp_path):
    """safetensors refuses them as they are."""
    norm = nn.BatchNorm2d(4)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Conv2d(4, 4, 3), norm)
    store = Store(tmp_path)
    store.put_weights(CE, network, nn.Linear(4, 10))
    path = store.find(CE, ".safetensors")
    found = read_weights(path.read_bytes(), CE.id, path)
    assert found.keys() == {*(f"backbone.{n}" for n in network.state_dict()), "classifier.weight", "classifier.bias"}


def test_resnet32s_weights_take_under_1_mb(tmp_path):
    store = Store(tmp_path)
    store.put_weights(CE, backbone("resnet32"), nn.Linear(64, 100))
    assert store.find(CE, ".safetensors").stat().st_size < 1_000_000


@pytest.mark.parametrize(("dataset", "classes"), [("cifar10", 10), ("cifar100", 100), ("tinyimagenet32", 200)])
def test_ten_thousand_predictions_take_under_100_kb(tmp_path, monkeypatch, dataset, classes):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(10_000, classes, generator=generator)
    targets = torch.randint(classes, (10_000,), generator=generator)
    pixels = torch.zeros(10_000, 1, 1, 3, dtype=torch.uint8)
    data = Dataset(dataset, 1, pixels[:classes], torch.arange(classes), pixels, targets, ())
    monkeypatch.setattr(runs, "predict", lambda *_: [logits])
    which, store = configure(dataset, "ce", 1), Store(tmp_path)
    finish([which], Trained(backbone("resnet8"), [nn.Linear(64, classes)], [[{}]], 1.0), data, None, store, OPTIONS)
    record = store.get(which)
    assert record.path.with_suffix(".npz").stat().st_size < 100_000
    assert np.array_equal(record.predictions().predicted, logits.argmax(1))
    np.testing.assert_allclose(record.predictions().confidence, logits.softmax(1).amax(1), atol=1e-5)


def test_seeds_are_read_off_the_names_of_the_files(made_up):
    for seed in (0, 12, 3):
        made_up("cifar10", "lws+mixup+shift", seed=seed)
    made_up("cifar10", "ce", seed=7, imbalance=10)
    store = Store(made_up.root)
    assert store.seeds("cifar10", 100) == [0, 3, 12]
    assert store.seeds("cifar10", 10.0) == [7]
    assert store.seeds("cifar100", 100) == []


def test_weights_come_ready_to_be_looked_at_and_a_second_stages_are_not_kept(full):
    network, head = full.get_weights(CE)
    assert head.out_features == 10
    assert not any(module.training for part in (network, head) for module in part.modules())
    with pytest.raises(RecordError, match="only Stage-1's are kept: get those of its stage1_only"):
        full.get_weights(LWS)


def test_what_is_held_out_is_measured_every_class_counting_alike(digits, tmp_path):
    asked = configure("digits", "lws", 50, 0, QUICK | {"holdout": 0.2})
    (record,) = run(asked, tmp_path, options=OPTIONS)
    network, head = Store(tmp_path).get_weights(asked.stage1_only)
    _, held = digits.hold_out(0.2)
    images = Images(digits.train_images[held], digits.spec.mean, digits.spec.std, padding=0)
    y = digits.train_targets[held].numpy()
    (logits,) = predict(network, [head], images)
    stage1 = Store(tmp_path).get(asked.stage1_only)
    assert stage1.metrics["held_out_accuracy"] == pytest.approx(balanced_accuracy_score(y, logits.argmax(1)), abs=1e-6)
    weights = compute_sample_weight("balanced", y)
    nll = log_loss(y, logits.double().softmax(1).numpy(), sample_weight=weights, labels=np.arange(10))
    assert stage1.metrics["held_out_nll"] == pytest.approx(nll, abs=1e-5)
    assert record.metrics["held_out_nll"] != stage1.metrics["held_out_nll"]
    assert "held_out_nll" not in run(CE, tmp_path, options=OPTIONS)[0].metrics


def test_a_changed_loss_is_told_from_the_one_that_a_record_is_of(tmp_path, monkeypatch):
    def one(class_counts):
        return cross_entropy

    def other(class_counts):
        return lambda logits, targets: 2 * cross_entropy(logits, targets)

    monkeypatch.setitem(LOSSES, "own", LossSpec(one))
    asked = config("lws", epochs=1, **{"stage1.loss": "own", "stage2.epochs": 1})
    run(asked, tmp_path, options=OPTIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(asked, tmp_path, options=OPTIONS)
    monkeypatch.setitem(LOSSES, "own", LossSpec(other))
    with pytest.warns(UserWarning, match=r"LOSSES\.own has changed since .* was trained with it"):
        run(asked, tmp_path, options=OPTIONS)


def test_an_entry_without_source_text_is_told_by_its_name_alone(tmp_path, monkeypatch):
    monkeypatch.setitem(SCHEDULES, "own", ((0.5,), 0.1))
    (record,) = run(config("ce", epochs=1, schedule="own"), tmp_path, options=OPTIONS)
    assert record.provenance["registered"] == ["SCHEDULES.own"]
    assert "sources" not in record.provenance


def test_putting_a_run_that_is_there_changes_nothing(store):
    before, record = contents(store), store.get(CE)
    returned = store.put(CE, {"accuracy": 0.0}, [], {}, {})
    assert returned.metrics == record.metrics
    assert contents(store) == before


def test_a_failed_write_leaves_no_record(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(TypeError):
        store.put(CE, {"accuracy": 0.5}, [], {"x": np.zeros(3)}, {"not": {"json"}})
    assert store.get(CE) is None
    assert not list(tmp_path.rglob("*.part"))


def test_a_store_lists_its_records(full):
    assert [record.config for record in full] == [CE, LWS]
    assert list(Store(full.root / "nothing")) == []


def test_groups_have_checkpoints_of_their_own(full):
    groups = ([LWS], [config("crt")], [LWS, config("crt")], [LWS, config("lws+las")], [replace(LWS, seed=1)])
    assert len({full.checkpoint(group) for group in groups}) == len(groups)


# ------------------------------------------------------------------------------------------------------------ damage


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit(path):
    path.write_text(path.read_text().replace('"lr": 0.1', '"lr": 0.2'))


def rename_field(path):
    path.write_text(path.read_text().replace('"momentum"', '"momentun"'))


def drop_metrics(path):
    path.write_text(path.read_text().replace('"metrics"', '"measures"'))


def drop_id(path):
    path.write_text(path.read_text().replace('"id"', '"identity"'))


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "cannot be read .*restore it, or delete it to run again"),
        (empty, "cannot be read .*restore it, or delete it to run again"),
        (rename_field, "cannot be read .*momentun.*restore it, or delete it"),
        (drop_metrics, "cannot be read .*metrics.*restore it, or delete it"),
        (edit, f"was changed: its configuration has identity .* not {CE.id}"),
        (drop_id, "cannot be read .*restore it, or delete it"),
    ],
)
def test_a_damaged_record_is_refused_in_one_line_and_never_overwritten(store, calls, damage, message):
    path = store.get(CE).path
    damage(path)
    before = contents(store)
    for attempt in (
        lambda: store.get(CE),
        lambda: list(store),
        lambda: run([CE], store, options=OPTIONS),
        lambda: store.put(CE, {}, [], {}, {}),
    ):
        with pytest.raises(RecordError, match=message) as caught:
            attempt()
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert contents(store) == before
    assert calls == []


def test_runs_of_code_that_is_not_loaded_are_left_out_with_one_warning(store, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(SPECS, "mine", SPECS["digits"])
        patch.setitem(SAMPLERS, "mine", SAMPLERS["class_cyclic"])
        of_mine, by_mine = replace(CE, dataset="mine"), CE.override({"stage1.sampler": "mine"})
        for each in (of_mine, by_mine):
            store.put(each, {"accuracy": 0.5, "ece": 0.1}, [], {}, dict.fromkeys(SOURCE, ""))
        assert len(list(store)) == 4
    with pytest.warns(UserWarning, match=r"left out: .*needs code .*\(1 more like it\)") as caught:
        assert {record.config.id for record in store} == {CE.id, LWS.id}
    assert len(caught) == 1
    with pytest.raises(ForeignRecord, match=f"{by_mine.id}.json needs code that is not loaded: unknown stage1.sam"):
        store.get(by_mine)


@pytest.mark.parametrize("damage", [cut, empty, lambda path: path.unlink()], ids=["cut", "empty", "missing"])
def test_damaged_arrays_are_refused_in_one_line(store, damage):
    path = store.get(CE).path.with_suffix(".npz")
    damage(path)
    with pytest.raises(RecordError, match=r"cannot be read .*restore it, or delete its .json") as caught:
        store.get(CE).predictions()
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", [cut, empty])
def test_damaged_weights_are_refused_in_one_line_and_never_overwritten(store, damage):
    path = store.find(CE, ".safetensors")
    damage(path)
    before = contents(store)
    with pytest.raises(RecordError, match=r"is damaged .*delete it and train Stage-1 again") as caught:
        run(config("crt"), store, options=OPTIONS)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert contents(store) == before


def test_weights_of_another_network_are_refused(store):
    other = config("ce", backbone="resnet14")
    shutil.copy(store.find(CE, ".safetensors"), store.path(other, ".safetensors"))
    with pytest.raises(RecordError, match=f"has the weights of run {CE.id}, not of {other.id}"):
        store.get_weights(other, 10)


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(RecordError, match=f"the weights of ce \\({CE.id}\\) are not in"):
        Store(tmp_path).get_weights(CE, 10)


def test_a_damaged_checkpoint_stops_the_run_and_is_left_alone(tmp_path):
    store = Store(tmp_path)
    path = store.checkpoint([CE])
    path.parent.mkdir()
    path.write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(RecordError, match=r"cannot be read .*delete it to start the run afresh"):
        run(CE, store, options=OPTIONS)
    assert contents(store) == {path.relative_to(tmp_path): b"PK\x03\x04 cut short"}


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        (("schema",), 2, "its schema is 2, this version's is 1"),
        (("config", "method"), None, "config.method is None"),
        (("metrics", "accuracy"), None, "metrics.accuracy is None"),
        (("metrics", "nll"), "0.5", "metrics.nll is '0.5'"),
        (("metrics",), [], "TypeError"),
        (("provenance", "date"), 20260101, "provenance.date is 20260101"),
        (("provenance", "seconds"), "long", "provenance.seconds is 'long'"),
        (("provenance", "class_counts"), [5, "4"], "class_counts is '4'"),
        (("provenance", "registered"), [5], "a name of provenance.registered is 5"),
        (("history",), {}, "history is {}"),
        (("history",), ["epoch"], "AttributeError"),
        (("history", -1, "train_loss"), "0.5", "history's train_loss is '0.5'"),
    ],
)
def test_a_record_with_values_of_other_types_is_refused_in_one_line(store, part, value, message):
    path = store.find(CE)
    content = json.loads(path.read_text())
    *outer, last = part
    place = content
    for key in outer:
        place = place[key]
    place[last] = value
    path.write_text(json.dumps(content))
    with pytest.raises(RecordError, match=f"{re.escape(str(path))} cannot be read .*{re.escape(message)}"):
        list(store)


def test_the_store_needs_the_data_only_to_train(store, monkeypatch):
    monkeypatch.setattr(runs, "load", None)
    assert run(CE, store)[0].metrics == store.get(CE).metrics


def test_runs_of_several_imbalance_factors_each_have_their_data(tmp_path):
    configs = [configure("digits", "ce", imbalance, overrides={"epochs": 1}) for imbalance in (50, 100)]
    for record in run(configs, Store(tmp_path), options=OPTIONS):
        expected = load("digits", imbalance=record.config.imbalance).class_counts
        assert tuple(record.provenance["class_counts"]) == tuple(record.arrays()["class_counts"]) == expected


def test_a_record_that_its_dataset_no_longer_allows_is_left_out(store, monkeypatch):
    """The digits have 124 images of a class; cut to 20 of each by another registration, 100 are too many."""
    with monkeypatch.context() as patch:
        patch.setitem(SPECS, "mine", SPECS["digits"])
        store.put(
            replace(CE, dataset="mine", n_max=100), {"accuracy": 0.5, "ece": 0.1}, [], {}, dict.fromkeys(SOURCE, "")
        )
        patch.setitem(SPECS, "mine", replace(SPECS["digits"], train_per_class=60))
        with pytest.warns(UserWarning, match=r"left out: .*does not fit .* here: n_max must be in 1 .. 60"):
            assert {record.config.id for record in store} == {CE.id, LWS.id}


@pytest.mark.parametrize("lost", [("metrics", "accuracy"), ("provenance", "date"), ("metrics",)])
def test_a_record_without_a_part_is_refused_in_one_line(store, lost):
    path = store.find(CE)
    content = json.loads(path.read_text())
    *outer, last = lost
    (content[outer[0]] if outer else content).pop(last)
    path.write_text(json.dumps(content))
    with pytest.raises(RecordError, match=f"cannot be read .*{last}.*restore it"):
        list(store)


def test_stage_2_says_that_its_stage_1_saw_other_data(store, tmp_path):
    path = store.find(CE)
    content = json.loads(path.read_text())
    content["provenance"]["data_checksum"] = "0" * 16
    path.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match=f"Stage-1 {CE.id} was trained on other data than digits is here"):
        run(config("crt"), store, options=OPTIONS)


def test_what_cannot_be_trained_stops_the_rest_before_it_begins(tmp_path):
    """At imbalance factor 100 the rarest of the digits has one image: none to hold out."""
    store = Store(tmp_path)
    impossible = configure("digits", "temperature", 100)
    with pytest.raises(MislasError, match=r"temperature holds out images of every class, and the rarest of .* has 1"):
        run([config("ce"), impossible], store, options=OPTIONS)
    with pytest.raises(MislasError, match="leaves class 7 with no image"):
        run([config("ce"), configure("digits", "ce", 1000)], store, options=OPTIONS)
    assert list(store) == []


def test_a_method_of_any_name_has_a_file_of_its_own(tmp_path):
    named = replace(CE, method="a/b c")
    assert Store(tmp_path).path(named, ".json").name == f"a-b-c-s0-{CE.id}.json"


@pytest.mark.parametrize("name", ["my cells", "a+b", "a/b", ".hidden"])
def test_a_dataset_whose_name_no_folder_can_have_stops_before_it_is_read(tmp_path, monkeypatch, name):
    monkeypatch.setitem(SPECS, name, SPECS["digits"])
    monkeypatch.setattr(runs, "load", None)
    message = f"dataset {name!r} cannot name a folder of a store: register it under a name of letters, digits"
    with pytest.raises(MislasError, match=re.escape(message)):
        run(replace(CE, dataset=name), Store(tmp_path), options=OPTIONS)


def test_a_commit_is_that_of_the_repository_which_has_the_library(tmp_path, monkeypatch):
    """Installed into an ignored folder of somebody's repository the library has no commit; tracked there it has."""

    def git(*arguments):
        named = ["-c", "user.name=A", "-c", "user.email=a@b.c"]
        done = subprocess.run(["git", "-C", tmp_path, *named, *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    file = tmp_path / "installed" / "runs.py"
    file.parent.mkdir()
    file.touch()
    monkeypatch.setattr(runs, "__file__", str(file))
    git("init")
    (tmp_path / ".gitignore").write_text("installed\n")
    git("add", ".gitignore")
    git("commit", "-m", "first")
    assert runs._commit() == "unknown"
    git("add", "--force", "installed")
    git("commit", "-m", "second")
    assert runs._commit() == git("rev-parse", "HEAD")
    file.write_text("changed")
    assert runs._commit() == git("rev-parse", "HEAD") + "+changes"


def test_what_has_no_class_for_an_expert_is_said_before_anything_trains(tmp_path):
    configs = [configure("digits", method, 2, overrides=QUICK) for method in ("ce", "oltr+lfme")]
    with pytest.raises(MislasError, match=r"an expert on each group of classes, and digits IF=2 has no .* few "):
        run(configs, Store(tmp_path), options=OPTIONS)
    assert not list(tmp_path.iterdir())


def test_the_checkpoint_of_a_group_goes_once_its_runs_are_done_in_others(tmp_path, near):
    """Three classifiers are stopped together; then two of them are wanted, and then all."""
    store = Store(tmp_path)
    configs = [configure("digits", m, 50, overrides=QUICK | {"stage2.epochs": 3}) for m in ("lws", "crt", "lws+las")]
    run(configs[0].stage1_only, store, options=OPTIONS)
    with pytest.raises(OutOfTime):
        run(configs, store, options=replace(OPTIONS, deadline=near))
    (path,) = store.under_way()
    run(configs[:2], store, options=OPTIONS)
    assert store.under_way() == [path]
    run(configs, store, options=OPTIONS)
    assert store.under_way() == []
