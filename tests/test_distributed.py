"""Two gloo processes on the CPU give what one process gives."""

import itertools
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from filelock import FileLock
from torch import nn

from mislas import Options, Store, configure, run
from mislas.batches import batches_of, plain_images
from mislas.config import Stage1
from mislas.data import load
from mislas.distributed import agree, average_gradients, gather, piece, processors, replicate, started, world
from mislas.errors import Diverged, MislasError
from mislas.evaluate import predict
from mislas.models import TwoBranches, backbone, stage1_model

KINDS = ["mislas", "bbn", "oltr+lfme", "fslwf", "ncm+mixup+shift", "range"]
N, WORLD = 7, 2  # a batch that two processes cannot halve


# ------------------------------------------------------------------------------------------------ what each does alone


@pytest.mark.parametrize("n", [0, 1, 2, 7, 256])
@pytest.mark.parametrize("of", [1, 2, 3, 4])
def test_pieces_are_the_batch(n, of):
    places = list(range(n))
    pieces = [places[piece(n, which, of)] for which in range(of)]
    assert list(itertools.chain(*pieces)) == places
    assert max(map(len, pieces)) - min(map(len, pieces)) <= 1


def test_processes_share_the_processors_that_their_machine_lets_them_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(10)), raising=False)
    assert processors() == 10
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert processors() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert processors() == 1


@pytest.mark.parametrize(("device", "gpus"), [(None, True), ("cuda", True), ("cpu", False)])
def test_each_process_takes_a_gpu_unless_they_train_on_the_cpu(monkeypatch, device, gpus):
    """On a machine that says it has GPUs, and processes that are one."""
    taken, backends = [], []
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(dist, "rendezvous", lambda where: iter([(dist.HashStore(), 1, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **rest: backends.append(backend))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    with started(device):
        pass
    assert taken == [1] * gpus
    assert backends == ["cpu:gloo,cuda:nccl" if gpus else "gloo"]


def test_an_error_that_is_sent_to_another_process_knows_its_run():
    error = pickle.loads(pickle.dumps(Diverged("its loss is nan", "0123456789ab")))
    assert (type(error), str(error), error.run) == (Diverged, "its loss is nan", "0123456789ab")


def test_one_process_changes_nothing():
    part, network = torch.ones(3, 2, requires_grad=True), backbone("resnet8")
    assert world() == 1
    assert gather(part) is part
    assert replicate(network) is network
    assert all(type(m) is not nn.SyncBatchNorm for m in network.modules())
    assert agree(lambda: 3) == agree(3) == 3


# ------------------------------------------------------------------------------------------------ what two do together


def model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()), nn.Linear(4 * 36, 3)


def batch(n=N):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(n, 3, 8, 8, generator=generator) * 3 + 1, torch.arange(n) % 3


def one_step(n=N):
    """Loss, gradients and running statistics of a step on a batch, by this process's share of it."""
    network, head = model()
    images, targets = batch(n)
    call = replicate(network)
    features = gather(call(images[piece(n)]), n)
    loss = nn.functional.cross_entropy(head(features), targets)
    loss.backward()
    average_gradients(head.parameters())
    gradients = [p.grad for p in (*network.parameters(), *head.parameters())]
    return [loss.detach(), *gradients, network[1].running_mean, network[1].running_var, features.detach()]


def two_branch_gradients():
    torch.manual_seed(3)
    network = TwoBranches(backbone("resnet8"))
    call, images = replicate(network), torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    features = [gather(call(shown[piece(3)], which), 3) for which, shown in enumerate(images.split(3))]
    torch.cat(features).square().mean().backward()
    return [p.grad for p in network.parameters()]


def digits_batches(method):
    """Batches of an epoch: images put together again, labels, and the share of the own label."""
    data, config = load("digits", imbalance=50), configure("digits", method, 50)
    found = batches_of(data, config.stage1, "stage1", 0, Options(device="cpu")).epoch(0)
    return [(gather(b.images, len(b.targets)), b.targets, b.weight) for b in found]


def digits_logits():
    data = load("digits", imbalance=50)
    torch.manual_seed(5)
    network, head = stage1_model("resnet8", 10)
    return predict(network, [head], plain_images(data, Options(device="cpu")))[0]


def digits_runs(folder):
    """What runs on digits come to, of every kind of Stage-1 and Stage-2."""
    short = {"precision": "fp32", "stage1.epochs": 1, "stage1.lr": 0.001, "stage2.epochs": 1, "stage2.lr": 0.001}
    configs = [configure("digits", method, 50, overrides=short) for method in KINDS]
    records = run(configs, Store(folder), None, Options(device="cpu", progress=False))
    return {r.config.method: [r.metrics["nll"], r.history[-1].get("train_loss", 0.0)] for r in records}


def refused():
    stage = Stage1(epochs=1, batch_size=3, lr=0.1, weight_decay=0, schedule="cosine")
    try:
        batches_of(load("digits", imbalance=50), stage, "stage1", 0, Options(device="cpu"))
    except MislasError as error:
        return str(error)


def fail_at_first():
    def fails():
        raise MislasError("the first says no")

    try:
        agree(fails)
    except MislasError as error:
        return str(error)


def everything(folder):
    return {
        "runs": digits_runs(folder / "store"),
        "step": one_step(),
        "one image": one_step(1),
        "two branches": two_branch_gradients(),
        "ce": digits_batches("ce"),
        "mixup": digits_batches("mixup"),
        "remix": digits_batches("remix"),
        "logits": digits_logits(),
    }


def process(rank, folder):
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=WORLD)
    found = everything(folder) | {"refused": refused(), "agreed": agree(rank + 5), "failed": fail_at_first()}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """A function that has something worked out in a folder, once for all processes of pytest-xdist."""
    own = tmp_path_factory.getbasetemp()
    common = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def get(name, work):
        done = common / f"{name}.done"
        with FileLock(common / f"{name}.lock"):
            if not done.exists():
                folder = tmp_path_factory.mktemp(name)
                work(folder)
                done.write_text(str(folder))
        return Path(done.read_text())

    return get


@pytest.fixture(scope="module")
def found(once):
    def work(folder):
        multiprocessing.spawn(process, (folder,), nprocs=WORLD)

    folder = once("two", work)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return everything(tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("method", KINDS)
def test_a_run_of_two_processes_is_that_of_one(found, alone, method):
    for two in found:
        assert two["runs"][method] == pytest.approx(alone["runs"][method], abs=1e-3)


@pytest.mark.parametrize("what", ["step", "one image", "two branches", "ce", "mixup", "remix", "logits"])
def test_each_of_two_processes_has_what_one_has(found, alone, what):
    one = alone[what]
    for two in found:
        torch.testing.assert_close(two[what], one, rtol=1e-4, atol=1e-6)


def test_what_the_first_has_is_agreed_upon(found):
    for two in found:
        assert two["agreed"] == 5
        assert two["failed"] == "the first says no"


def test_a_batch_that_cannot_be_shared_evenly_is_refused(found):
    assert "3 images cannot be shared evenly by 2 processes" in found[0]["refused"]


# ------------------------------------------------------------------------------------------------------ whole runs

# At the usual learning rates rounding grows within some epochs to what another seed would do.
SETTINGS = {"backbone": "resnet10", "stage1.epochs": 3, "stage2.epochs": 2, "stage1.lr": 0.001, "stage2.lr": 0.01}


def torchrun(store, *more, **kwargs):
    settings = [f"--set={key}={value}" for key, value in SETTINGS.items()]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *more]
    train = ["-m", "mislas.cli", "train", "--dataset", "generated", "--method", "mislas", "--device", "cpu"]
    train += ["--workers", "0", "--quiet", "--results-root", str(store), *settings]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command + train, env=environment, stdout=-1, stderr=-1, text=True, **kwargs)


@pytest.fixture(scope="module")
def one_process(once):
    config = configure("generated", "mislas", overrides=SETTINGS)

    def work(folder):
        run([config], Store(folder), None, Options(device="cpu", workers=0, progress=False))

    return config, Store(once("one", work))


def same(config, one, two):
    for stage in (config.stage1_only, config):
        a, b = one.get(stage), two.get(stage)
        assert b.provenance["device"].startswith("2 x ")
        losses = ([row["train_loss"] for row in record.history] for record in (a, b))
        np.testing.assert_allclose(*losses, rtol=5e-3)
        assert (a.predictions().predicted == b.predictions().predicted).mean() > 0.96
        for name in ("accuracy", "ece", "nll", "brier", "confidence"):
            assert b.metrics[name] == pytest.approx(a.metrics[name], abs=0.02)
        for name in ("weight_norm", "bn_first_mean", "bn_first_var", "bn_last_mean", "bn_last_var"):
            x, y = a.arrays()[name], b.arrays()[name]  # as vectors: how rounding grows in an element depends on the CPU
            assert np.linalg.norm(y - x) < 0.05 * np.linalg.norm(x), name


@pytest.fixture(scope="module")
def two_processes(once):
    def work(folder):
        training = torchrun(folder)
        said, complained = training.communicate(timeout=240)
        assert training.returncode == 0, complained
        (folder / "said").write_text(said)

    folder = once("undisturbed", work)
    return (folder / "said").read_text(), Store(folder)


def test_a_run_started_by_torchrun_is_that_of_one_process(one_process, two_processes):
    (config, one), (said, two) = one_process, two_processes
    same(config, one, two)
    assert said.count(config.id) == 1  # the first process alone reports


def test_a_killed_process_is_started_again_and_changes_no_bit(one_process, two_processes, tmp_path):
    (config, _), (_, undisturbed), store = one_process, two_processes, Store(tmp_path)
    training = torchrun(tmp_path, "--max-restarts", "1")
    checkpoint = store.checkpoint([config.stage1_only])
    until = time.monotonic() + 240
    while not checkpoint.exists():
        assert training.poll() is None, training.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(training.pid)], capture_output=True, text=True, check=True)
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    _, complained = training.communicate(timeout=240)
    assert training.returncode == 0, complained
    for stage in (config.stage1_only, config):
        a, b = undisturbed.get(stage), store.get(stage)
        losses = ([row["train_loss"] for row in record.history] for record in (a, b))
        np.testing.assert_array_equal(*losses)
        for name, expected in a.arrays().items():
            np.testing.assert_array_equal(b.arrays()[name], expected, err_msg=name)
    assert not list(tmp_path.glob("*/*.ckpt"))


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm1d(4),
        nn.BatchNorm2d(4, affine=False),
        nn.BatchNorm2d(4, momentum=None),
        nn.BatchNorm2d(4, track_running_stats=False),
    ],
)
def test_batch_norm_that_each_process_would_keep_for_itself_is_refused(monkeypatch, layer):
    monkeypatch.setattr("mislas.distributed.world", lambda: 2)
    with pytest.raises(MislasError, match=r"several processes train together .* the backbone has BatchNorm"):
        replicate(nn.Sequential(layer))
