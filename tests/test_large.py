"""Both stages on datasets of list files: from JPEGs to records."""

import hashlib
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mislas import paper
from mislas.batches import ListBatches, batches_of, host_rng
from mislas.campaign import wanted
from mislas.cli import main
from mislas.data import LISTS, available, dataset_name, load, training_images
from mislas.errors import DataError, MislasError, RecordError
from mislas.lists import generate
from mislas.methods import configure
from mislas.models import backbone, find_weights, init_kaiming
from mislas.pipeline import ImageBatches
from mislas.runs import Store, run
from mislas.samplers import draw
from mislas.train import Options, OutOfTime, train_stage1

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding.*:DeprecationWarning")

OPTIONS = Options(device="cpu", progress=False, workers=0)
QUICK = {"stage1.epochs": 3, "stage2.epochs": 1}


@pytest.fixture(scope="module")
def data():
    return load("generated")


def quick(method, **changes):
    return configure("generated", method, overrides=QUICK | changes)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """What the command line leaves of both stages."""
    root = tmp_path_factory.mktemp("results")
    methods = ["ce", "mixup", "mislas", "crt+mixup", "lws+mixup"]
    sets = [part for key, value in QUICK.items() for part in ("--set", f"{key}={value}")]
    command = ["train", "--dataset", "generated", "--method", *methods, *sets, "--workers", "0", "--quiet"]
    assert main([*command, "--device", "cpu", "--results-root", str(root)]) == 0
    return Store(root)


# ------------------------------------------------------------------------------------------------------ end to end


def test_the_command_line_trains_both_stages_from_jpegs(store, data):
    found = {record.config.method: record for record in store}
    assert found.keys() == {"ce", "mixup", "mislas", "crt+mixup", "lws+mixup"}
    for record in found.values():
        assert record.config.imbalance == 20
        assert record.path.parent.name == "generated-if20"
        assert record.provenance["data_checksum"] == data.checksum
        assert tuple(record.provenance["class_counts"]) == data.class_counts
        assert np.array_equal(record.arrays()["target"], data.test_targets)
        assert np.isfinite(record.metrics["nll"])
    assert found["ce"].metrics["accuracy"] > 0.25  # chance is 1/6; two deviations above it are 0.3 on 30 images
    losses = [row["train_loss"] for row in found["ce"].history]
    assert losses[-1] < losses[0]


def test_a_stored_model_gives_its_recorded_accuracy_again(store, capsys):
    record = store.get(quick("mixup"))
    assert main(["eval", record.config.id, "--results-root", str(store.root), "--device", "cpu"]) == 0
    assert f"from weights: accuracy {record.metrics['accuracy']:.4f}, recorded" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["mixup", "mislas"])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(store, tmp_path, method, near):
    config = quick(method)
    other = Store(tmp_path)
    if config.stage2 is not None:
        config = config.override({"stage2.epochs": 2})
        run(config, store, None, OPTIONS)
        run(config.stage1_only, other, None, OPTIONS)
    with pytest.raises(OutOfTime):
        run(config, other, None, replace(OPTIONS, deadline=near))
    assert len(other.under_way()) == 1
    (record,), whole = run(config, other, None, OPTIONS), store.get(config)
    assert not other.under_way()
    assert record.metrics == whole.metrics
    assert record.history == whole.history
    for name, array in record.arrays().items():
        assert np.array_equal(array, whole.arrays()[name])


def test_rules_and_held_out_images_work_on_files(tmp_path, data):
    configs = [quick("tau-norm+shift"), quick("ncm")]
    configs[0] = configs[0].override({"shift_epochs": 1})
    tau, ncm = run(configs, Store(tmp_path), None, OPTIONS)
    assert 0 <= tau.history[-1]["value"] <= 2
    assert ncm.metrics["accuracy"] > 1 / 6
    kept, held = data.hold_out(0.1)
    assert len(kept.train) + len(held) == len(data.train)
    assert np.bincount(data.train_targets[held]).tolist() == [max(1, round(n / 10)) for n in data.class_counts]
    assert {data.train.paths[i] for i in held.tolist()} == set(data.train.paths) - set(kept.train.paths)
    last = [max(np.flatnonzero(data.train_targets == k)) for k in range(6)]
    assert set(last) <= set(held.tolist())


def test_the_memory_and_metric_families_work_on_files(tmp_path):
    """Lifted and range loss see features of files; FSLwF, OLTR and experts look at the training images again."""
    methods = ("lifted", "range", "fslwf", "oltr", "oltr+lfme")
    configs = [quick(method, **{"stage1.epochs": 1, "stage2.batch_size": 64}) for method in methods]
    for record in run(configs, Store(tmp_path), None, OPTIONS):
        assert np.isfinite(record.metrics["nll"])
        assert len(record.arrays()["target"]) == 30


def test_batches_say_where_their_images_are(data):
    for stage in (quick("mixup").stage1, quick("crt").stage2):
        batches = batches_of(data, stage, "stage1", 0, OPTIONS)
        for batch in batches.epoch(1):
            assert torch.equal(data.train_targets[batch.index], batch.targets)
    plain = batches_of(data, replace(stage, sampler="instance_balanced"), "stage2", 0, OPTIONS).epoch(0)
    assert torch.cat([batch.index for batch in plain]).sort()[0].tolist() == list(range(256))


def test_two_branches_take_a_torchvision_backbone(data):
    changes = {"backbone": "resnet10", "stage1.epochs": 1, "stage1.batch_size": 128}
    config = configure("generated", "bbn", overrides=changes)
    trained = train_stage1(config, data, OPTIONS)
    assert trained.heads[0].weight.shape == (6, 1024)
    assert np.isfinite(trained.histories[0][0]["train_loss"])


# --------------------------------------------------------------------------------------------------------- batches


def test_mixed_batches_are_plain_ones_mixed_by_a_generator_of_their_own(data):
    stage = quick("mixup").stage1
    got = list(ListBatches(data, stage, "stage1", 3, torch.device("cpu"), 0).epoch(2))
    plain = ImageBatches(data.train, data.spec, 32, workers=0).epoch(host_rng(3, "stage1", 2))
    rng, lams = host_rng(3, "stage1", 2, "mix"), set()
    for lam, (x, y), batch in zip(rng.beta(0.2, 0.2, size=8), plain, got, strict=True):
        partner = rng.permutation(len(y))
        lams.add(lam)
        torch.testing.assert_close(batch.images, lam * x + (1 - lam) * x[partner], atol=1e-5, rtol=0)
        assert torch.equal(batch.targets, y)
        assert torch.equal(batch.partner_targets, y[partner])
        assert batch.weight == lam
    assert len(lams) == 8


def test_a_stage_without_mixup_gets_plain_batches_and_another_sampler_another_epoch(data):
    batches = batches_of(data, quick("ce").stage1, "stage1", 0, OPTIONS)
    first = next(batches.epoch(0))
    assert first.partner_targets is None
    assert not torch.equal(first.images, next(batches.epoch(0, "class_balanced")).images)


@pytest.mark.parametrize("method", ["cutmix", "remix"])
def test_other_ways_to_mix_reach_images_from_files(data, method):
    batch = next(batches_of(data, quick(method).stage1, "stage1", 0, OPTIONS).epoch(0))
    assert batch.images.shape == (32, 3, 32, 32)
    weight = torch.as_tensor(batch.weight)
    assert ((weight >= 0) & (weight <= 1)).all()


# ------------------------------------------------------------------------------------------------- names and layout


@pytest.mark.parametrize(("method", "sampler"), [("ldam+drs", "class_balanced"), ("ldam+drw", "instance_balanced")])
def test_a_deferred_sampler_comes_in_the_last_fifth_of_the_epochs(data, method, sampler, monkeypatch):
    seen = []
    monkeypatch.setattr("mislas.batches.draw", lambda name, *rest: seen.append(name) or draw(name, *rest))
    stage = quick(method, **{"stage1.epochs": 5}).stage1
    batches = batches_of(data, stage, "stage1", 0, OPTIONS)
    for epoch in (3, 4):
        next(batches.epoch(epoch))
    assert seen == ["instance_balanced", sampler]


def test_names_of_lists_are_names_and_not_a_suffix():
    assert [dataset_name(name) for name in ("ImageNet-LT", "places-lt", "inaturalist18", "cifar10-lt")] == [
        *("imagenet-lt", "places-lt", "inaturalist18", "cifar10")
    ]
    with pytest.raises(MislasError, match="unknown dataset 'places'; did you mean 'places-lt'"):
        dataset_name("places")


def test_the_imbalance_factor_of_a_list_is_a_fact():
    assert {name: configure(name, "ce").imbalance for name in LISTS} == {
        "imagenet-lt": 256, "places-lt": 996, "inaturalist18": 500, "generated": 20
    }  # fmt: skip
    assert configure("cifar10", "ce").imbalance == 100
    with pytest.raises(MislasError, match=r"imbalance factor of places-lt is 996, a fact.*got 50, leave it out"):
        configure("places-lt", "ce", 50)


def test_training_images_are_known_before_a_file_is_read(digits):
    assert training_images("inaturalist18", 500) == 437_513
    assert training_images("digits", 50) == len(digits.train_targets)


@pytest.mark.parametrize("lists", ["generated", "lists"])
def test_images_are_under_their_name_and_lists_beside_or_in_a_folder_of_their_own(tmp_path, lists, data):
    generate(tmp_path / "generated")
    (tmp_path / lists).mkdir(exist_ok=True)
    for name in ("generated_train.txt", "generated_test.txt"):
        (tmp_path / "generated" / name).rename(tmp_path / lists / name)
    assert available("generated", tmp_path)
    found = load("generated", tmp_path)
    assert found.train.root == tmp_path / "generated"
    assert found.checksum == data.checksum


def test_missing_files_are_explained_by_the_layout(tmp_path):
    layout = r"a folder places-lt/ with the images .* in lists/ Places_LT_train.txt and Places_LT_test.txt"
    with pytest.raises(DataError, match=f"needs data_root, a folder with {layout}"):
        load("places-lt")
    with pytest.raises(DataError, match=f"no images for 'places-lt' under {re.escape(str(tmp_path))}.*{layout}"):
        load("places-lt", tmp_path)
    (tmp_path / "places-lt").mkdir()
    assert available("places-lt", tmp_path)
    with pytest.raises(DataError, match=f"no list Places_LT_train.txt under .*{layout}") as caught:
        load("places-lt", tmp_path)
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------- settings and weights


@pytest.mark.parametrize(
    ("dataset", "network"), [("imagenet-lt", "resnet50"), ("places-lt", "resnet152"), ("inaturalist18", "resnet50")]
)
def test_the_large_datasets_have_the_settings_of_table_5(dataset, network):
    config = configure(dataset, "mislas")
    one, two = config.stage1, config.stage2
    got = (one.lr, one.batch_size, one.weight_decay, one.epochs, one.schedule)
    assert (*got, two.epochs, two.schedule, two.eps_1, two.eps_k, two.delta_lr) == paper.TABLE5[dataset]
    assert (two.lr, two.batch_size, two.weight_decay) == got[:3]
    assert (one.mixup, config.backbone, one.warmup) == (0.2, network, 0)
    assert (one.weights is None) == (dataset != "places-lt")


def test_the_weights_of_places_are_those_of_torchvision():
    from torchvision.models import ResNet152_Weights

    assert ResNet152_Weights.IMAGENET1K_V1.url.endswith(f"resnet152-{configure('places-lt', 'ce').stage1.weights}.pth")


@pytest.fixture
def pretrained(tmp_path):
    """A data root with weights of ResNet-10, and their checksum."""
    network = backbone("resnet10")
    init_kaiming(network, torch.Generator().manual_seed(5))
    torch.save(network.state_dict(), tmp_path / "new.pth")
    checksum = hashlib.sha256((tmp_path / "new.pth").read_bytes()).hexdigest()[:8]
    (tmp_path / "weights").mkdir()
    (tmp_path / "new.pth").rename(tmp_path / "weights" / f"resnet10-{checksum}.pth")
    return SimpleNamespace(root=tmp_path, checksum=checksum, network=network)


def test_pretrained_weights_stay_but_for_the_last_block(pretrained, tmp_path):
    changes = {"weights": pretrained.checksum, "stage1.epochs": 1, "backbone": "resnet10"}
    config = configure("generated", "mixup", overrides=changes)
    store = Store(tmp_path / "results")
    run(config, store, pretrained.root, OPTIONS)
    network, _ = store.get_weights(config, 6)
    before = dict(pretrained.network.named_parameters())
    for name, parameter in network.named_parameters():
        stayed = torch.equal(parameter, before[name].half().float())
        assert stayed != name.startswith("layer4.0."), name


def test_weights_are_part_of_the_identity_by_their_checksum_alone(pretrained):
    one = configure("places-lt", "ce")
    assert one.canonical()["stage1"]["weights"] == "394f9c45"
    assert one.override({"weights": pretrained.checksum}).id != one.id != one.override({"weights": None}).id
    with pytest.raises(MislasError, match=r"first 8 hex digits of the SHA-256 of a file of weights, got 'r152\.pth'"):
        one.override({"weights": "r152.pth"})
    with pytest.raises(MislasError, match=r"weights needs one of torchvision's backbones .*got 'resnet32'"):
        one.override({"backbone": "resnet32"})


def test_weights_that_are_missing_or_others_are_one_line(pretrained):
    assert find_weights(pretrained.checksum, pretrained.root).name == f"resnet10-{pretrained.checksum}.pth"
    with pytest.raises(RecordError, match=r"there is no .*weights/\*-394f9c45.pth; put the file .* there"):
        find_weights("394f9c45", pretrained.root)
    with pytest.raises(RecordError, match="need data_root"):
        find_weights("394f9c45", None)
    (pretrained.root / "weights" / "x-394f9c45.pth").write_bytes(b"")
    with pytest.raises(RecordError, match=r"has SHA-256 e3b0c442\.\.\., not 394f9c45"):
        find_weights("394f9c45", pretrained.root)


# --------------------------------------------------------------------------------------------------------- campaigns


def test_a_campaign_wants_what_the_tables_of_a_list_have():
    configs = wanted("imagenet-lt", [None])
    assert {c.backbone for c in configs} == set(paper.TABLE1[False, None])
    for network, rows in paper.TABLE6.items():
        assert rows.keys() <= {c.method for c in configs if c.backbone == network}
    mixed = [c for c in configs if c.stage2 is not None and getattr(c.stage2, "mixup", None) == 0.2]
    assert len(mixed) == 4 * 4
    assert set(paper.TABLE8) <= {c.method for c in wanted("places-lt", [None])}
    assert len({c.id for c in configs}) == len(configs)


def test_a_campaign_on_lists_runs_from_the_command_line(tmp_path, capsys):
    assert main(["campaign", "--dataset", "generated", "--dry-run", "--results-root", str(tmp_path)]) == 0
    assert "0 of 7 runs are in the store; 5 jobs to do" in capsys.readouterr().out
