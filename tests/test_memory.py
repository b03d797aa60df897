"""The memory of class centroids: against loops over its equations, finite differences, and trained on digits."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mislas.augment import Images
from mislas.batches import batches_of
from mislas.data import load
from mislas.evaluate import predict
from mislas.memory import MetaEmbedding, ModulatedAttention, attend, squared_distances, train_memory
from mislas.methods import configure
from mislas.models import backbone
from mislas.runs import Store, run
from mislas.train import Options, train_stage1

QUICK = {"epochs": 3, "stage2.epochs": 3}
TARGETS = torch.tensor([0, 3, 1, 1, 2, 3])


@pytest.fixture
def head():
    """Four classes, five features."""
    torch.manual_seed(0)
    return MetaEmbedding(nn.Linear(5, 4), torch.randn(4, 5)).double()


@pytest.fixture
def features():
    return torch.from_numpy(np.random.default_rng(0).standard_normal((6, 5)))


def test_logits_are_those_of_the_equations_image_by_image(head, features):
    p = {name: value.detach().numpy() for name, value in head.named_parameters()}
    expected = []
    for x in features.numpy():
        scores = np.exp(p["hallucinator.weight"] @ x + p["hallucinator.bias"])
        memory = sum(o * c for o, c in zip(scores / scores.sum(), p["centroids"], strict=True))
        selected = np.tanh(p["selector.weight"] @ x + p["selector.bias"]) * memory
        gamma = min(np.linalg.norm(x - c) for c in p["centroids"])
        v = 10 / gamma * (x + selected)
        length = np.linalg.norm(v)
        expected.append([16 * length / (1 + length) * (w @ v) / np.linalg.norm(w) / length for w in p["cosine.weight"]])
    np.testing.assert_allclose(head(features).detach(), expected, rtol=1e-9)


def test_an_image_far_from_every_class_is_classified_with_less_confidence(head):
    direction = F.normalize(torch.ones(1, 5).double())
    head.selector.weight.data.zero_()  # no memory: the embedding is 10 x / gamma
    head.selector.bias.data.zero_()
    head.centroids.data = direction.repeat(4, 1)
    lengths = [head.embed((1 + away) * direction).norm().item() for away in (0.1, 1, 10)]
    np.testing.assert_allclose(lengths, [10 * 1.1 / 0.1, 10 * 2 / 1, 10 * 11 / 10])


@pytest.mark.parametrize("margin", [1.0, 1e3])
def test_the_centroid_loss_is_its_equation_pair_by_pair(head, features, margin):
    near, far = 0, 0
    for x, y in zip(features.numpy(), TARGETS.tolist(), strict=True):
        for k, c in enumerate(head.centroids.detach().numpy()):
            if k == y:
                near += ((x - c) ** 2).sum() / 2 / 6
            else:
                far += ((x - c) ** 2).sum() / (6 * 4)
    expected = near + 0.3 * max(0, margin - far)
    assert head.centroid_loss(features, TARGETS, margin, repel=0.3).item() == pytest.approx(expected, rel=1e-10)
    assert (margin - far > 0) == (margin == 1e3)


def test_distances_as_a_product_of_matrices_are_distances(features):
    others = features[:4] + 1
    np.testing.assert_allclose(squared_distances(features, others), torch.cdist(features, others) ** 2, rtol=1e-9)
    assert squared_distances(features.float(), features.float()).min() > 0


def test_gradients_are_those_of_finite_differences(head, features):
    names, values = zip(*head.named_parameters(), strict=True)

    class Losses(nn.Module):
        def __init__(self, of):
            super().__init__()
            self.of = of

        def forward(self, x):
            return self.of.centroid_loss(x, TARGETS, margin=1e3), F.cross_entropy(self.of(x), TARGETS)

    def centroids(x, *parameters):
        return torch.func.functional_call(Losses(head), dict(zip(prefixed, parameters, strict=True)), (x,))[0]

    def classes(x, *parameters):  # the centroids are no parameters of the classifier
        return torch.func.functional_call(Losses(head), dict(zip(prefixed[1:], parameters[1:], strict=True)), (x,))[1]

    prefixed = [f"of.{name}" for name in names]
    assert names[0] == "centroids"
    x, *values = (value.detach().clone().requires_grad_() for value in (features, *values))
    assert torch.autograd.gradcheck(centroids, (x, *values))
    assert torch.autograd.gradcheck(classes, (x, *values))


def test_centroids_learn_from_their_own_loss_alone(head, features):
    F.cross_entropy(head(features), TARGETS).backward()
    assert head.centroids.grad is None
    assert all(p.grad is not None for p in head.parameters() if p is not head.centroids)
    head.zero_grad()
    head.centroid_loss(features, TARGETS).backward()
    assert head.centroids.grad.any()
    assert head.weight.grad is None


def test_centroids_have_a_rate_of_their_own(head):
    rest, centroids = head.parameter_groups(0.1)
    assert (rest["lr"], centroids["lr"], centroids["params"]) == (0.1, pytest.approx(0.01), [head.centroids])
    assert len(rest["params"]) == 5


# --------------------------------------------------------------------------------------------------------- attention


@pytest.fixture
def attention():
    """On maps of four channels and 3 x 3 places."""
    attention = ModulatedAttention(4, 3, torch.Generator().manual_seed(0)).double()
    for parameter in attention.parameters():  # biases, too, and what starts at zero
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))
    return attention


def test_attention_is_its_equation_place_by_place(attention):
    maps = np.random.default_rng(0).standard_normal((2, 4, 3, 3))
    p = {name: value.detach().numpy() for name, value in attention.named_parameters()}
    expected = maps.copy()
    for image, out in zip(maps, expected, strict=True):
        places = image.reshape(4, 9).T
        query, key, value = (
            [p[f"{name}.weight"][:, :, 0, 0] @ place + p[f"{name}.bias"] for place in places]
            for name in ("query", "key", "value")
        )
        where = np.exp(p["where.weight"] @ image.ravel() + p["where.bias"])
        for i in range(9):
            looks = np.exp([query[i] @ k for k in key])
            seen = sum(a * v for a, v in zip(looks / looks.sum(), value, strict=True))
            out[:, i // 3, i % 3] += where[i] / where.sum() * (p["back.weight"][:, :, 0, 0] @ seen)
    np.testing.assert_allclose(attention(torch.from_numpy(maps)).detach(), expected, rtol=1e-9)


def test_attention_has_the_gradients_of_finite_differences(attention):
    assert torch.autograd.gradcheck(attention, torch.randn(2, 4, 3, 3, dtype=torch.double, requires_grad=True))


@pytest.mark.parametrize(
    ("name", "size"), [("resnet8", 8), ("resnet8", 32), ("resnet8", 33), ("resnet10", 64), ("resnet10", 100)]
)
def test_a_backbone_with_attention_starts_as_the_backbone_that_it_was(name, size):
    network, images = backbone(name).eval(), torch.randn(2, 3, size, size)
    before = network(images)
    attend(network, size)
    assert any(isinstance(module, ModulatedAttention) for module in network.modules())
    assert torch.equal(network(images), before)


# ---------------------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def data():
    return load("digits", imbalance=10)


@pytest.fixture(scope="module")
def config():
    return configure("digits", "oltr", 10, overrides=QUICK)


@pytest.fixture(scope="module")
def trained(data, config):
    trained = train_stage1(config.stage1_only, data, Options(device="cpu", progress=False))
    return trained.backbone, trained.heads[0]


def test_memory_starts_at_the_class_means_and_the_hallucinator_at_stage1s_classifier(data, config, trained, options):
    still = config.override({"stage2.lr": 1e-12, "stage2.weight_decay": 0.0, "stage2.epochs": 1})
    network, classifier = copy.deepcopy(trained)
    found = train_memory(still, (network, classifier), data, options)
    images = Images(data.train_images, data.spec.mean, data.spec.std, padding=0)
    features = predict(trained[0], [nn.Identity()], images)[0]
    means = torch.stack([features[data.train_targets == k].mean(dim=0) for k in range(10)])
    torch.testing.assert_close(found.heads[0].centroids.data, means, atol=1e-5, rtol=1e-5)
    assert torch.equal(found.heads[0].hallucinator.weight, trained[1].weight)


@pytest.mark.parametrize("backbone_lr", [0.1, None])
def test_it_learns_digits_with_a_backbone_that_trains_or_does_not(data, config, trained, options, backbone_lr):
    config = config.override({"backbone_lr": backbone_lr})
    found = train_memory(config, copy.deepcopy(trained), data, options)
    before, after = trained[0].state_dict(), found.backbone.state_dict()
    same = [torch.equal(value, after[name]) for name, value in before.items()]
    assert all(same) if backbone_lr is None else not any(same)
    new = {name.split(".")[-2] for name in after.keys() - before.keys()}
    assert new == (set() if backbone_lr is None else {"query", "key", "value", "back", "where"})
    assert backbone_lr is None or found.backbone.blocks[-1].back.weight.any()
    test = Images(data.test_images, data.spec.mean, data.spec.std, padding=0)
    (logits,) = predict(found.backbone, found.heads, test)
    assert (logits.argmax(1) == data.test_targets).double().mean() > 0.6


def test_it_trains_on_what_stage1_did_not_hold_out(data, config, trained, options, monkeypatch):
    seen = []
    monkeypatch.setattr("mislas.memory.batches_of", lambda data, *rest: seen.append(data) or batches_of(data, *rest))
    train_memory(config.override({"holdout": 0.1, "stage2.epochs": 1}), copy.deepcopy(trained), data, options)
    assert [len(one.train_targets) for one in seen] == [len(data.hold_out(0.1)[0].train_targets)]


@pytest.mark.parametrize("weights", [None, "0123abcd"])
def test_the_backbone_trains_at_a_tenth_of_the_rate_and_its_last_block_alone_if_pretrained(
    data, options, monkeypatch, weights
):
    """Beside a loss of centroids of 1e4, of which a hundredth counts."""
    kept = {}

    def loop(configs, name, network, heads, groups, steps, *rest, **more):
        kept.update(rate=groups[0][-1]["lr"], learned=groups[0][-1]["params"], loss=next(steps(0))[0].item())
        raise ZeroDivisionError

    monkeypatch.setattr("mislas.memory._loop", loop)
    monkeypatch.setattr(MetaEmbedding, "centroid_loss", lambda *_: torch.tensor(1e4))
    network = backbone("resnet10")
    config = configure("digits", "oltr", 10, overrides={"weights": weights, "backbone": "resnet10"})
    with pytest.raises(ZeroDivisionError):
        train_memory(config, (network, nn.Linear(512, 10)), data, options)
    assert kept["rate"] == pytest.approx(0.1 * config.stage2.lr)
    last = network.layer4[-2:] if weights else network  # the block and the attention behind it
    assert {id(p) for p in kept["learned"]} == {id(p) for p in last.parameters()}
    assert kept["loss"] == pytest.approx(100, abs=30)


def test_a_killed_run_resumes_to_the_same_result(data, config, trained, options, tmp_path, killed):
    options = replace(options, checkpoint_every=0)
    whole = train_memory(config, copy.deepcopy(trained), data, options)
    with killed(25):  # of 16 steps an epoch
        train_memory(config, copy.deepcopy(trained), data, options, tmp_path / "checkpoint")
    assert torch.load(tmp_path / "checkpoint")["epoch"] == 1
    resumed = train_memory(config, copy.deepcopy(trained), data, options, tmp_path / "checkpoint")
    for one, two in ((resumed.heads[0], whole.heads[0]), (resumed.backbone, whole.backbone)):
        assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())
    assert resumed.histories == whole.histories


def test_a_run_is_stored_and_shares_stage1_with_every_other(options, tmp_path):
    quick = {"epochs": 1, "stage2.epochs": 1}
    oltr, crt = (configure("digits", method, 10, overrides=quick) for method in ("oltr", "crt"))
    assert oltr.stage1_only == crt.stage1_only
    store = Store(tmp_path)
    (record, _) = run([oltr, crt], store, options=options)
    assert record.config == oltr
    assert record.arrays()["weight_norm"].shape == (10,)
