from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mislas.campaign import images_per_second
from mislas.cli import main
from mislas.data import load
from mislas.errors import MislasError
from mislas.methods import configure
from mislas.models import CifarResNet, Float32Products, init_kaiming, use_float32_products
from mislas.runs import Store, run
from mislas.together import joint_features, kind, side_by_side, train_together
from mislas.train import Options, OutOfTime, stage1_run, train_stage1

OPTIONS = Options(device="cpu", progress=False, checkpoint_every=0)


def config(method, imbalance, seed=0, **changes):
    return configure("digits", method, imbalance, seed, {"epochs": 2, "precision": "fp32"} | changes)


#: Epochs of 14 batches and of 11, that end in batches of several sizes; one run ends before the others.
CONFIGS = [config("ce", 50), config("mixup", 50, 1), config("mixup", 100), config("ce", 100, 1, epochs=1)]


@pytest.fixture(scope="module", autouse=True)
def smooth():
    """Networks without kinks: where rounding moves a value across a ReLU's, gradients jump, and runs drift apart."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "relu", F.softplus)
        yield


@pytest.fixture(scope="module")
def datasets():
    return {imbalance: load("digits", imbalance=imbalance) for imbalance in (50, 100)}


def start(configs, datasets, folder, options=OPTIONS):
    """Train together, with checkpoints by the runs' identities."""
    runs = [stage1_run(c, datasets[c.imbalance], options, folder / c.id, together=len(configs)) for c in configs]
    return dict(train_together(runs, options))


@pytest.fixture(scope="module")
def joint(datasets, tmp_path_factory):
    """A folder of the last checkpoints of runs that trained together."""
    folder = tmp_path_factory.mktemp("joint")
    start(CONFIGS, datasets, folder)
    return folder


def assert_close(one, two, atol=1e-5):
    """Nested state, up to rounding; how long it took and beside whom is not compared."""
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one.keys() - {"seconds", "together"}:
            assert_close(one[key], two[key], atol)
    elif isinstance(one, list | tuple):
        for left, right in zip(one, two, strict=True):
            assert_close(left, right, atol)
    elif isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, two, atol=atol, rtol=1e-5)
    elif isinstance(one, float):
        assert one == pytest.approx(two, abs=3e-5)  # losses are stored with 5 digits
    else:
        assert one == two


# ------------------------------------------------------------------------------------------------------ one step


@pytest.mark.parametrize(("depth", "n"), [(8, 3), (14, 2)])
def test_side_by_side_networks_have_the_features_gradients_and_statistics_of_each_alone(depth, n, monkeypatch):
    monkeypatch.setattr(F, "relu", torch.relu)

    def networks():
        generator = torch.Generator().manual_seed(0)
        for _ in range(n):
            network = CifarResNet(depth).to(memory_format=torch.channels_last)
            init_kaiming(network, generator)
            yield network

    images = torch.randn(n, 6, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    images = [part.contiguous(memory_format=torch.channels_last) for part in images]
    alone, beside = list(networks()), list(networks())
    expected = [network(part) for network, part in zip(alone, images, strict=True)]
    features = joint_features(beside, images)
    for own, part in ((expected, alone), (features, beside)):
        assert all(network.training for network in part)
        sum((i + 1) * f.square().mean() for i, f in enumerate(own)).backward()
    assert_close(list(features), expected)
    for one, two in zip(beside, alone, strict=True):
        assert_close(one.state_dict(), two.state_dict())
        assert_close([p.grad for p in one.parameters()], [p.grad for p in two.parameters()])
        assert int(one.bn.num_batches_tracked) == 1
        assert not torch.equal(one.bn.running_mean, torch.zeros(16))


def test_side_by_side_networks_have_float32_products_if_each_alone_has(monkeypatch):
    networks = [use_float32_products(CifarResNet(8)) for _ in range(2)]
    monkeypatch.setattr(Float32Products, "_conv_forward", lambda self, x, weight, bias: pytest.fail("used"))
    with pytest.raises(pytest.fail.Exception, match="used"):
        joint_features(networks, [torch.zeros(2, 3, 12, 12)] * 2)
    joint_features([CifarResNet(8)] * 2, [torch.zeros(2, 3, 12, 12)] * 2)


# ------------------------------------------------------------------------------------------------------ whole runs


@pytest.mark.parametrize("which", range(len(CONFIGS)))
def test_runs_trained_together_are_those_trained_alone(datasets, joint, tmp_path, which):
    c = CONFIGS[which]
    train_stage1(c, datasets[c.imbalance], OPTIONS, tmp_path / "alone")
    one, two = (torch.load(path) for path in (joint / c.id, tmp_path / "alone"))
    assert_close(one, two)  # weights, running statistics, momentum, losses, learning rates
    assert (one["together"], two["together"]) == (4, 1)


def test_runs_killed_together_are_resumed_alone_and_together(datasets, joint, tmp_path, killed):
    with killed(60):
        start(CONFIGS, datasets, tmp_path)
    assert [torch.load(tmp_path / c.id)["epoch"] for c in CONFIGS] == [1, 1, 1, 1]
    first, *others = CONFIGS
    trained = train_stage1(first, datasets[first.imbalance], OPTIONS, tmp_path / first.id)
    assert trained.together == 4  # its seconds are not all its own
    start(others, datasets, tmp_path)
    for c in CONFIGS:
        assert_close(torch.load(tmp_path / c.id), torch.load(joint / c.id))


def test_a_run_begun_alone_goes_on_beside_another(datasets, joint, tmp_path, near):
    first, second = CONFIGS[1:3]
    with pytest.raises(OutOfTime):
        train_stage1(first, datasets[50], replace(OPTIONS, deadline=near), tmp_path / first.id)
    start([first, second], datasets, tmp_path)
    for c in (first, second):
        found = torch.load(tmp_path / c.id)
        assert found["together"] == 2
        assert_close(found, torch.load(joint / c.id))


def test_out_of_time_stops_each_run_after_an_epoch_with_a_checkpoint(datasets, tmp_path, near):
    with pytest.raises(OutOfTime, match="after epoch 1 of 2"):
        start(CONFIGS[1:], datasets, tmp_path, replace(OPTIONS, deadline=near))
    assert [torch.load(tmp_path / c.id)["epoch"] for c in CONFIGS[1:]] == [1, 1, 1]


# ------------------------------------------------------------------------------------------------------ the store


def test_the_store_is_filled_by_runs_that_train_together(tmp_path):
    store, configs = Store(tmp_path), [*CONFIGS[:3], config("lws", 50, **{"stage2.epochs": 1})]
    records = run(configs, store, options=replace(OPTIONS, together=2))
    assert [record.config for record in records] == configs
    assert [record.provenance.get("together") for record in records] == [2, 2, None, None]
    assert store.under_way() == []
    kinds = [k for rates in images_per_second(store).values() for k in rates]
    assert len(kinds) == 2  # of the Stage-1 run that trained alone, and of Stage-2
    for record in records[:3]:
        assert record.history[-1]["epoch"] == 2
        assert store.find(record.config, ".safetensors").exists()


def test_later_runs_of_a_kind_are_pulled_forward():
    ce, mixup, other, lws = config("ce", 50), config("mixup", 100), config("ce", 50, 1), config("lws", 50)
    bbn, deep = config("bbn", 50), config("ce", 50, backbone="resnet14")
    groups = [[ce], [lws], [bbn], [deep], [mixup], [other]]
    assert side_by_side(groups, 1) == [[group] for group in groups]
    assert side_by_side(groups, 2) == [[[ce], [mixup]], [[lws]], [[bbn]], [[deep]], [[other]]]
    assert side_by_side(groups, 8) == [[[ce], [mixup], [other]], [[lws]], [[bbn]], [[deep]]]


def test_what_is_not_one_small_network_in_memory_trains_alone():
    alone = [config("bbn", 50), config("lws", 50), configure("generated", "ce"), configure("imagenet-lt", "ce")]
    assert [kind(c) for c in alone] == [None] * 4
    ce = config("ce", 50)
    assert kind(ce) == kind(config("mixup", 10, 3, lr=1.0, epochs=9)) != kind(config("ce", 50, batch_size=16))


@pytest.mark.parametrize("together", [0, -1, 1.5, "2", None, True])
def test_a_bad_number_of_runs_is_refused_in_one_line(together):
    with pytest.raises(MislasError, match="is 1 or more, got") as caught:
        Options(together=together)
    assert "\n" not in str(caught.value)


def test_runs_that_train_together_are_not_compiled():
    with pytest.raises(MislasError, match="not compiled: leave out compile, or together"):
        Options(compile=True, together=2)


@pytest.mark.parametrize("command", [["train", "--method", "ce"], ["campaign"]])
def test_the_command_line_takes_together(command, tmp_path, capsys):
    arguments = [*command, "--dataset", "digits", "--results-root", str(tmp_path), "--quiet", "--together"]
    assert main([*arguments, "0"]) == 2
    assert capsys.readouterr().err == "mislas: together, the Stage-1 runs that train at once, is 1 or more, got 0\n"
    assert not list(tmp_path.rglob("*"))


def test_several_processes_do_not_train_several_runs(tmp_path):
    jobs = ["submit", "--dataset", "digits", "--method", "ce", "--gpus", "2", "--together", "2", "--dry-run"]
    assert main([*jobs, "--results-root", str(tmp_path)]) == 2
