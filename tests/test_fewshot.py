"""Weights generated from few images: against loops over the equations, on episodes, and trained on digits."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mislas.augment import Images
from mislas.batches import batches_of
from mislas.data import SPECS, load
from mislas.errors import MislasError
from mislas.evaluate import predict
from mislas.fewshot import WeightGenerator, base_and_novel, draw_episodes, train_few_shot
from mislas.methods import configure
from mislas.models import CosineClassifier
from mislas.runs import Store, run
from mislas.train import Options, train_stage1

BASE, NOVEL = [0, 2, 3], [1, 4]
QUICK = {"epochs": 4, "stage2.epochs": 3}


@pytest.fixture
def generator():
    """Three base classes, two novel ones with two images and one, everything that is learned away from its start."""
    torch.manual_seed(0)
    stage1 = CosineClassifier(6, 5, scale=10.0).double()
    nn.init.normal_(stage1.weight)
    made = WeightGenerator(stage1, BASE, NOVEL, [torch.randn(2, 6).double(), torch.randn(1, 6).double()]).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return made


def unit(x):
    return x / np.linalg.norm(x)


def by_loops(g, images, known):
    """Their equations, one image and one base class at a time."""
    p = {name: value.detach().numpy() for name, value in g.named_parameters()}
    from_images, from_others = 0, 0
    for image in images.numpy():
        z = unit(image)
        match = {b: p["sharpness"] * unit(p["query"] @ z) @ unit(p["keys"][b]) for b in known}
        total = sum(np.exp(value) for value in match.values())
        from_images = from_images + z / len(images)
        for b, value in match.items():
            from_others = from_others + np.exp(value) / total * unit(p["weight"][b]) / len(images)
    return p["average"] * from_images + p["attended"] * from_others


def test_generated_weights_are_those_of_the_equations(generator):
    images = [generator.shown[0], generator.shown[1, :1]]
    expected = np.stack([by_loops(generator, shown, range(3)) for shown in images])
    found = generator.generate(generator.shown, generator.share).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_logits_are_scaled_cosines_in_the_order_of_the_classes(generator):
    features = torch.randn(7, 6).double()
    weight = np.empty((5, 6))
    weight[BASE] = generator.weight.detach()
    weight[NOVEL] = generator.generate(generator.shown, generator.share).detach()
    expected = [[generator.scale.item() * unit(x) @ unit(w) for w in weight] for x in features.numpy()]
    np.testing.assert_allclose(generator(features).detach(), expected, rtol=1e-10)
    np.testing.assert_allclose(generator.classifier()(features.float()).detach(), expected, rtol=1e-4)


def test_in_an_episode_a_class_is_known_only_from_the_images_that_are_shown(generator):
    features, shown, posed = torch.randn(7, 6).double(), torch.randn(1, 4, 6).double(), torch.tensor([1])
    logits = generator.episode(features, shown, posed)
    weight = generator.weight.detach().numpy().copy()
    weight[1] = by_loops(generator, shown[0], [0, 2])
    expected = [[generator.scale.item() * unit(x) @ unit(w) for w in weight] for x in features.numpy()]
    np.testing.assert_allclose(logits.detach(), expected, rtol=1e-10)
    F.cross_entropy(logits, torch.tensor([0, 1, 2, 1, 1, 0, 2])).backward()
    assert all(parameter.grad.isfinite().all() for parameter in generator.parameters())
    assert [bool(row.any()) for row in generator.weight.grad] == [True, False, True]
    assert [bool(row.any()) for row in generator.keys.grad] == [True, False, True]


def test_without_attention_a_weight_is_the_mean_of_the_images(generator):
    with torch.no_grad():
        generator.average.fill_(1)
        generator.attended.zero_()
    expected = F.normalize(generator.shown[0], dim=1).mean(dim=0)
    torch.testing.assert_close(generator.generate(generator.shown, generator.share)[0], expected)


def test_gradients_are_those_of_finite_differences(generator):
    features, shown, posed = torch.randn(4, 6).double(), torch.randn(1, 2, 6).double(), torch.tensor([2])
    names, values = zip(*generator.named_parameters(), strict=True)

    def episode(*parameters):
        state = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(_Episode(generator), {f"of.{n}": v for n, v in state.items()}, (features,))

    class _Episode(nn.Module):
        def __init__(self, of):
            super().__init__()
            self.of = of

        def forward(self, x):
            return self.of.episode(x, shown, posed)

    assert torch.autograd.gradcheck(episode, values)


def test_it_starts_from_stage1s_weights_and_scale():
    stage1 = CosineClassifier(6, 5, scale=10.0)
    nn.init.normal_(stage1.weight)
    start = WeightGenerator(stage1, BASE, NOVEL, [torch.randn(2, 6)] * 2)
    features = torch.randn(3, 6)
    torch.testing.assert_close(start(features)[:, BASE], stage1(features)[:, BASE])


# ---------------------------------------------------------------------------------------------------------- episodes


def test_novel_are_the_few_or_else_the_third_with_the_fewest_images(digits):
    assert base_and_novel(digits) == (digits.groups["many"] + digits.groups["medium"], digits.groups["few"])
    balanced = load("digits", imbalance=1)
    assert not balanced.groups["few"]
    assert base_and_novel(balanced) == ([3, 4, 5, 6, 7, 8, 9], [0, 1, 2])  # of equals, the first
    counts = (5, 4, 300, 200, 19, 18, 17, 16, 1, 3)
    targets = torch.arange(10).repeat_interleave(torch.tensor(counts))
    shuffled = replace(balanced, train_targets=targets)
    assert base_and_novel(shuffled) == ([2, 3], [0, 1, 4, 5, 6, 7, 8, 9])


def test_where_almost_all_classes_are_few_a_third_is_novel():
    counts = torch.tensor((5, 4, 300, 2, 19, 18, 17, 16, 1, 3))
    data = replace(load("digits", imbalance=1), train_targets=torch.arange(10).repeat_interleave(counts))
    assert base_and_novel(data) == ([0, 1, 2, 4, 5, 6, 7], [3, 8, 9])


def test_episodes_pose_distinct_classes_and_show_images_of_them():
    targets = np.random.default_rng(1).permutation(np.repeat(np.arange(6), (40, 9, 3, 20, 5, 1)))
    posed, images = draw_episodes(np.random.default_rng(0), targets, episodes=300, classes=3, shots=4)
    assert posed.shape == (300, 3)
    assert images.shape == (300, 3, 4)
    assert all(len(set(classes)) == 3 for classes in posed.tolist())
    np.testing.assert_array_equal(targets[images], np.broadcast_to(posed[:, :, None], images.shape))
    np.testing.assert_allclose(np.bincount(posed.ravel()) / 300, [0.5] * 6, atol=0.1)
    assert len(set(images.ravel().tolist())) == len(targets)


# ---------------------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def data():
    return load("digits", imbalance=10)


@pytest.fixture(scope="module")
def config():
    return configure("digits", "fslwf", 10, overrides=QUICK)


@pytest.fixture(scope="module")
def trained(data, config):
    trained = train_stage1(config.stage1_only, data, Options(device="cpu", progress=False))
    return trained.backbone, trained.heads[0]


def test_it_learns_digits_and_the_novel_ones_too(data, config, trained, options):
    before = copy.deepcopy(trained[0].state_dict())
    found = train_few_shot(config, copy.deepcopy(trained), data, options)
    assert all(torch.equal(value, before[name]) for name, value in found.backbone.state_dict().items())
    test = Images(data.test_images, data.spec.mean, data.spec.std, padding=0)
    (logits,) = predict(found.backbone, found.heads, test)
    right = logits.argmax(1) == data.test_targets
    novel = torch.isin(data.test_targets, torch.tensor(base_and_novel(data)[1]))
    assert right.double().mean() > 0.6
    assert right[novel].double().mean() > 0.4
    losses = [row["train_loss"] for row in found.histories[0]]
    assert losses[-1] < losses[0]


def test_an_episode_does_not_ask_about_the_images_that_it_shows(data, config, trained, options, monkeypatch):
    def all_shown(rng, targets, steps, posing, shots):
        posed, _ = draw_episodes(rng, targets, steps, posing, shots)
        return posed, np.broadcast_to(np.arange(len(targets)), (*posed.shape, len(targets))).copy()

    monkeypatch.setattr("mislas.fewshot.draw_episodes", all_shown)
    learned = train_few_shot(config, copy.deepcopy(trained), data, options)
    assert [row["train_loss"] for row in learned.histories[0]] == [0.0] * config.stage2.epochs


def test_it_learns_from_base_classes_that_stage1_did_not_hold_out(data, config, trained, options, monkeypatch):
    seen, kept = [], data.hold_out(0.1)[0]
    monkeypatch.setattr("mislas.fewshot.batches_of", lambda data, *rest: seen.append(data) or batches_of(data, *rest))
    train_few_shot(config.override({"holdout": 0.1, "stage2.epochs": 1}), copy.deepcopy(trained), data, options)
    base = torch.tensor(base_and_novel(kept)[0])
    assert [len(one.train_targets) for one in seen] == [torch.isin(kept.train_targets, base).sum()]


def test_a_killed_run_resumes_to_the_same_classifier(data, config, trained, options, tmp_path, killed):
    options = replace(options, checkpoint_every=0)
    whole = train_few_shot(config, copy.deepcopy(trained), data, options)
    with killed(25):  # of 14 steps an epoch
        train_few_shot(config, copy.deepcopy(trained), data, options, tmp_path / "checkpoint")
    assert 0 < torch.load(tmp_path / "checkpoint")["epoch"] < 3
    resumed = train_few_shot(config, copy.deepcopy(trained), data, options, tmp_path / "checkpoint")
    assert torch.equal(resumed.heads[0].weight, whole.heads[0].weight)
    assert resumed.heads[0].scale == whole.heads[0].scale
    assert resumed.histories == whole.histories


def test_a_run_is_stored_beside_its_stage1_of_a_cosine_classifier(options, tmp_path):
    config = configure("digits", "fslwf", 10, overrides={"epochs": 1, "stage2.epochs": 1})
    store = Store(tmp_path)
    (record,) = run(config, store, options=replace(options, eval_every=1))
    assert record.config == config
    assert store.get(config.stage1_only).path.name.startswith("ce-cosine-s0-")
    assert record.arrays()["weight_norm"].shape == (10,)
    assert isinstance(store.get_weights(config.stage1_only, 10)[1], CosineClassifier)


def test_two_classes_are_too_few_for_episodes(options, monkeypatch):
    """One would be novel, and the only other one posed as novel has no class beside it."""
    digits = load("digits", imbalance=10)
    monkeypatch.setitem(SPECS, "digits", replace(SPECS["digits"], num_classes=2))
    two = torch.isin(digits.train_targets, torch.tensor([0, 9]))
    data = digits.only(two, digits.train_targets[two].clamp(max=1))
    config = configure("digits", "fslwf", 10, overrides=QUICK)
    stage1 = nn.Flatten(), CosineClassifier(192, 2, 10.0)
    with pytest.raises(MislasError, match="at least 2 of them; digits has 2 classes, of which 1 is base"):
        train_few_shot(config, stage1, data, options)
