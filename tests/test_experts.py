"""A student and its experts: against equations written out, and trained on digits from experts to OLTR."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax
from sklearn.metrics import recall_score

from mislas import runs
from mislas.augment import Images
from mislas.batches import Batch
from mislas.data import load
from mislas.errors import DataError
from mislas.evaluate import predict
from mislas.experts import Experts, distillation, of_group, selection
from mislas.methods import configure
from mislas.runs import Store, plan, run
from mislas.train import Options, train_stage1

QUICK = {"epochs": 4, "stage2.epochs": 2}
OPTIONS = Options(device="cpu", progress=False)
LFME = configure("digits", "oltr+lfme", 10, overrides=QUICK)
STUDENT = LFME.stage1_only


def test_an_expert_teaches_in_full_until_the_student_has_a_share_of_its_accuracy():
    weights = [selection(student, 0.8, threshold=0.5) for student in (0, 0.4, 0.5, 0.6, 0.8, 0.9)]
    np.testing.assert_allclose(weights, [1, 1, 0.75, 0.5, 0, 0])
    assert selection(0.0, 0.0) == 1
    assert selection(0.1, 0.0) == 0
    assert selection(0.35, 0.5) == pytest.approx(0.15 / 0.5 / 0.7)


def test_distillation_is_the_mean_divergence_from_the_expert():
    rng = np.random.default_rng(0)
    student, expert = rng.standard_normal((2, 6, 4))
    p, q = (softmax(logits / 2, axis=1) for logits in (student, expert))
    one, two = torch.from_numpy(student), torch.from_numpy(expert)
    assert distillation(one, two, 2.0).item() == pytest.approx(rel_entr(q, p).sum() / 6)
    assert distillation(one, one + 3, 2.0).item() == pytest.approx(0, abs=1e-12)
    assert torch.autograd.gradcheck(lambda x: distillation(x, two, 2.0), (one.requires_grad_(),))


# ------------------------------------------------------------------------------------------------------------ groups


def test_a_group_keeps_its_images_and_their_labels(digits):
    few = of_group(digits, digits.groups, "few")
    inside = np.isin(digits.train_targets, digits.groups["few"])
    np.testing.assert_array_equal(few.train_targets, digits.train_targets[inside])
    np.testing.assert_array_equal(few.train_images, digits.train_images[inside])
    assert few.test_images is digits.test_images


@pytest.mark.parametrize(("imbalance", "empty"), [(1, "medium"), (5, "few")])
@pytest.mark.parametrize("group", ["many", "few"])
def test_without_three_groups_no_expert_is_trained(options, imbalance, empty, group):
    data = load("digits", imbalance=imbalance)
    config = replace(STUDENT.experts[["many", "medium", "few"].index(group)], imbalance=imbalance)
    message = f"digits at imbalance factor {imbalance} has no class with {empty} shots, .*choose an imbalance factor"
    with pytest.raises(DataError, match=message) as caught:
        train_stage1(config, data, options)
    assert "\n" not in str(caught.value)


def test_experts_are_stage1_runs_of_their_own():
    many, medium, few = STUDENT.experts
    assert [e.stage1.group for e in STUDENT.experts] == ["many", "medium", "few"]
    for expert in (many, medium, few):
        assert expert.stage1 == replace(
            STUDENT.stage1, distillation=None, sampler="instance_balanced", group=expert.stage1.group
        )
        assert (expert.stage2, expert.experts, expert.stage1_only) == (None, [], expert)
    assert LFME.experts == STUDENT.experts
    assert STUDENT.method == "ce+experts+holdout"
    assert configure("digits", "oltr").experts == []


# ---------------------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def data():
    return load("digits", imbalance=10)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A store with the experts, the student, and OLTR on it; and what was trained, in order."""
    trained, original = [], runs._run_group

    def noted(group, *rest):
        trained.append(group)
        return original(group, *rest)

    store = Store(tmp_path_factory.mktemp("store"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "_run_group", noted)
        run(LFME, store, options=OPTIONS)
    return store, trained


@pytest.fixture
def models(whole):
    return [whole[0].get_weights(expert, 10) for expert in STUDENT.experts]


@pytest.fixture
def teachers(data, models):
    train, held = data.hold_out(0.1)
    return Experts(models, data.groups, train, data.only(held), STUDENT, Options(device="cpu"))


def test_experts_come_first_then_the_student_then_oltr(whole):
    store, trained = whole
    assert trained == [[expert] for expert in STUDENT.experts] + [[STUDENT], [LFME]]
    assert plan([LFME, STUDENT], store) == []
    assert plan([STUDENT], Store("/nowhere")) == trained[:-1]
    other = LFME.override({"stage2.epochs": 1})
    assert plan([other], store) == [[other]]


def test_student_and_oltr_learn_digits_and_experts_their_group(whole, data):
    store, _ = whole
    assert store.get(STUDENT).metrics["accuracy"] > 0.5
    assert store.get(LFME).metrics["accuracy"] > 0.5
    for expert in STUDENT.experts:
        predicted = store.get(expert).predictions().predicted
        assert set(predicted.tolist()) <= set(data.groups[expert.stage1.group])


def test_confidence_and_accuracy_are_the_experts_on_their_own_classes(data, models, teachers):
    train, held = data.hold_out(0.1)
    for place, ((network, head), classes) in enumerate(zip(models, data.groups.values(), strict=True)):
        for images, targets, check in (
            (train.train_images, train.train_targets, "confidence"),
            (data.train_images[held], data.train_targets[held], "accuracy"),
        ):
            logits = predict(network, [head], Images(images, data.spec.mean, data.spec.std, padding=0))[0].numpy()
            own = np.flatnonzero(np.isin(targets, classes))
            p = softmax(logits[own][:, classes], axis=1)
            if check == "confidence":
                expected = [p[i, classes.index(int(targets[n]))] for i, n in enumerate(own)]
                np.testing.assert_allclose(teachers.confidence[own], expected, rtol=1e-3)
            else:
                guesses = np.array(classes)[p.argmax(axis=1)]
                recalls = recall_score(targets[own], guesses, labels=classes, average=None)
                assert teachers.accuracy[place] == pytest.approx(recalls.mean())


def test_image_weights_go_from_the_experts_confidence_to_1(teachers):
    np.testing.assert_allclose(teachers.image_weights(0), teachers.confidence)
    np.testing.assert_allclose(teachers.image_weights(1), torch.ones_like(teachers.confidence))
    np.testing.assert_allclose(teachers.image_weights(0.25), 0.75 * teachers.confidence + 0.25, rtol=1e-6)


def test_the_students_lesson_is_the_weighted_sum_over_groups(data, models, teachers):
    logits = torch.randn(8, 10, requires_grad=True)
    images = torch.randn(8, 3, 16, 16)
    expected = 0
    for (network, head), classes, weight in zip(models, data.groups.values(), (0.5, 0.0, 1.0), strict=True):
        expected = expected + weight * distillation(logits[:, classes], head(network(images))[:, classes], 2.0).item()
    batch = Batch(images, torch.zeros(8, dtype=torch.int64))
    found = teachers.teach(logits, batch, [0.5, 0.0, 1.0])
    assert found.item() == pytest.approx(expected, rel=1e-5)
    found.backward()
    assert not logits.grad[:, data.groups["medium"]].any()
    assert teachers.teach(logits, batch, [0, 0, 0]).item() == 0


def test_a_student_is_taught_and_its_images_are_weighed_from_the_first_epoch_on(data, options, monkeypatch):
    """By experts whose lesson costs 7, of images that weigh nothing."""
    shares = []

    class Teachers:
        def __init__(self, models, groups, data, held, config, options):
            self.images = len(data.train_targets)

        def expert_weights(self, network, head):
            return [1.0]

        def image_weights(self, share):
            shares.append(share)
            return torch.zeros(self.images)

        def teach(self, logits, batch, weights):
            return 0 * logits.sum() + 7 * weights[0]

    monkeypatch.setattr("mislas.train.Experts", Teachers)
    (history,) = train_stage1(STUDENT, data, options).histories
    assert [row["train_loss"] for row in history] == [7] * 4
    assert shares == [0, 0.25, 0.5, 0.75]


def test_an_expert_has_nothing_to_teach_itself(data, models, teachers):
    weights = teachers.expert_weights(*copy.deepcopy(models[0]))
    assert weights == [0.0, 1.0, 1.0]  # it is as good on its group, and knows nothing of the others


def test_a_student_killed_and_resumed_equals_one_never_stopped(data, whole, models, options, tmp_path, killed):
    options = replace(options, checkpoint_every=0)
    with killed(25):
        train_stage1(STUDENT, data, options, tmp_path / "checkpoint", experts=models)
    assert 0 < torch.load(tmp_path / "checkpoint")["epoch"] < 4
    resumed = train_stage1(STUDENT, data, options, tmp_path / "checkpoint", experts=models)
    network, head = whole[0].get_weights(STUDENT, 10)
    for one, two in ((resumed.backbone, network), (resumed.heads[0], head)):
        assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())
    losses = [
        [row["train_loss"] for row in history] for history in (resumed.histories[0], whole[0].get(STUDENT).history)
    ]
    assert losses[0] == losses[1]
