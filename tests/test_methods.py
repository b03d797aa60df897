import re
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mislas.data import LISTS, SPECS
from mislas.errors import MislasError
from mislas.losses import LOSSES, LossSpec, cross_entropy
from mislas.methods import METHODS, ONE_STAGE, configure, loss_for
from mislas.train import learning_rate_factor

TABLE_5 = {  # Stage-1: lr, batch size, weight decay, epochs, schedule; Stage-2: epochs, schedule, eps_1, eps_K, dW
    "cifar10": ((0.1, 128, 2e-4, 200, "multistep"), (10, "cosine", 0.3, 0.0, 0.5)),
    "cifar100": ((0.1, 128, 2e-4, 200, "multistep"), (10, "cosine", 0.4, 0.1, 0.2)),
}


@pytest.mark.parametrize("copy", ["", "-jpeg"])
@pytest.mark.parametrize("dataset", TABLE_5)
def test_mislas_has_the_settings_of_table_5(dataset, copy):
    config = configure(dataset + copy, "mislas")
    one, two = config.stage1, config.stage2
    assert (
        (one.lr, one.batch_size, one.weight_decay, one.epochs, one.schedule),
        (two.epochs, two.schedule, two.eps_1, two.eps_k, two.delta_lr),
    ) == TABLE_5[dataset]
    assert (two.lr, two.batch_size, two.weight_decay) == (0.1, 128, 2e-4)
    assert (one.momentum, two.momentum) == (0.9, 0.9)
    assert config.backbone == "resnet32"


def test_mislas_is_mixup_then_equation_4_with_smoothing_and_shifted_batch_norm():
    config = configure("cifar10", "mislas")
    assert config.stage1.mixup == 1.0
    assert asdict(config.stage2) | {
        "a": 1,
        "learn_scale": True,
        "delta": "zeros",
        "loss": "las",
        "form": "concave",
        "smoothing_over": "others",
        "shift_bn": True,
        "sampler": "class_balanced",
        "mixup": None,
    } == asdict(config.stage2)


@pytest.mark.parametrize(
    ("method", "a", "learn_scale", "delta"),
    [
        ("crt", 0, False, "fresh"),
        ("lws", 1, True, None),
        ("crt+mixup", 0, False, "fresh"),
        ("lws+mixup", 1, True, None),
    ],
)
def test_crt_and_lws_are_special_cases_of_equation_4(method, a, learn_scale, delta):
    config = configure("cifar10", method)
    stage2 = config.stage2
    assert (stage2.a, stage2.learn_scale, stage2.delta) == (a, learn_scale, delta)
    assert (stage2.loss, stage2.shift_bn, stage2.sampler) == ("ce", False, "class_balanced")
    assert (config.stage1.mixup is not None) == method.endswith("mixup")


def test_the_rows_of_the_ablation_differ_in_one_thing_each():
    """Table 2: LWS+mixup, then shifted batch norm."""
    mixup, shifted = (configure("cifar100", method).stage2 for method in ("lws+mixup", "lws+mixup+shift"))
    assert asdict(mixup) | {"shift_bn": True} == asdict(shifted)


@pytest.mark.parametrize("dataset", [*SPECS, *LISTS])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_be_configured_on_every_dataset(dataset, method):
    config = configure(dataset, method)
    assert (config.dataset, config.method) == (dataset, method)
    assert (config.stage2 is None) == (method in ONE_STAGE)


def test_methods_have_distinct_identities():
    assert len({configure("digits", method).id for method in METHODS}) == len(METHODS)


def test_an_unknown_method_lists_the_known_ones():
    with pytest.raises(
        MislasError, match=r"unknown method 'mixpu'; did you mean 'mixup'\? Known: .*lws\+las"
    ) as caught:
        configure("digits", "mixpu")
    assert "\n" not in str(caught.value)


def test_an_unknown_loss_lists_the_known_ones():
    with pytest.raises(MislasError, match=r"unknown stage1.loss 'focl'; did you mean 'focal'\? Known: .*ce"):
        configure("digits", "ce", overrides={"stage1.loss": "focl"})


def test_losses_are_made_for_the_class_counts():
    logits, targets = torch.randn(6, 2), torch.tensor([0, 1, 0, 1, 1, 0])
    q = torch.tensor([[0.7, 0.3], [0.0, 1.0]])[targets]  # eps_1 = 0.3 for the larger class, eps_K = 0 for the other
    loss = loss_for(configure("digits", "mislas").stage2, (50, 5))
    assert loss(logits, targets).mean().item() == pytest.approx(F.cross_entropy(logits, q).item(), abs=1e-6)
    assert loss_for(configure("digits", "crt").stage2, (50, 5)) is cross_entropy


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (cross_entropy, "loss 'mine' cannot be made of class counts and its settings: .*'targets'"),
        (lambda class_counts: None, "loss 'mine' must be made as a function of logits and targets, got None"),
    ],
)
def test_a_loss_that_cannot_be_made_says_so(monkeypatch, make, message):
    monkeypatch.setitem(LOSSES, "mine", LossSpec(make))
    with pytest.raises(MislasError, match=message):
        loss_for(configure("digits", "ce", 10, overrides={"loss": "mine"}).stage1, (50, 5))


def test_every_method_says_what_it_does_where_it_is_from_and_what_it_computes():
    for method in METHODS.values():
        assert method.title
        assert method.idea.endswith(".")
        assert method.equation
        assert re.search(r"(19|20)\d\d$|the paper\)$|the plain model", method.source)


def test_rows_are_named_by_the_papers_tables():
    """Table 3's rows, and those of Tables 2, 4 and 6 to 8."""

    def rows(table):
        return {name for name, method in METHODS.items() if table in method.tables}

    assert rows(3) == {"ce", "mixup", "ldam+drw", "bbn", "remix+drw", "crt+mixup", "lws+mixup", "mislas"}
    assert rows(4) == {"ce", "ce+drw", "focal+drw", "ldam+drw", "cb-focal", "bbn", "remix+drw"} | {
        "range", "fslwf", "oltr", "oltr+lfme", "crt+mixup", "lws+mixup", "mislas",
    }  # fmt: skip
    assert rows(6) == {"crt", "lws", "crt+mixup", "lws+mixup", "mislas"}
    assert rows(7) == rows(6) | {"tau-norm"}
    assert rows(8) == rows(7) | {"focal", "lifted", "range", "fslwf", "oltr", "oltr+lfme"}
    assert rows(2) == {"lws", "lws+mixup", "lws+mixup+shift", "mislas"}


DRW, LDAM = {"beta": 0.9999, "defer": 0.8}, {"loss": "ldam", "max_margin": 0.5, "scale": 30.0}
REMIX = {"mix": "remix", "remix_kappa": 3.0, "remix_tau": 0.5}
OLTR = {"centroid_weight": 0.01, "backbone_lr": 0.1, "attention": True}


@pytest.mark.parametrize(
    ("method", "recipe"),
    [
        ("focal", {"loss": "focal", "gamma": 2.0}),
        ("cb", {"beta": 0.9999}),
        ("cb-focal", {"loss": "focal", "gamma": 0.5, "beta": 0.999}),
        ("ldam", LDAM),
        ("ce+drw", DRW),
        ("focal+drw", {"loss": "focal", "gamma": 1.0} | DRW),
        ("ldam+drw", LDAM | DRW),
        ("ldam+drs", LDAM | {"deferred_sampler": "class_balanced", "defer": 0.8}),
        ("cutmix", {"mixup": 1.0, "mix": "cutmix"}),
        ("remix", {"mixup": 1.0} | REMIX),
        ("remix+drw", {"mixup": 1.0, "epochs": 300} | REMIX | DRW),
        ("bbn", {"second_sampler": "reverse", "schedule": "multistep-bbn"}),
        ("balanced-softmax", {"loss": "logit_adjusted", "adjustment": 1.0}),
        ("lifted", {"metric": "lifted", "metric_weight": 0.1}),
        ("range", {"metric": "range", "metric_weight": 0.1}),
        ("fslwf", {"scale": 10.0}),
        ("oltr+lfme", {"distillation": 2.0, "sampler": "class_cyclic", "holdout": 0.1}),
        ("tau-norm", {"holdout": 0.1}),
        ("temperature", {"holdout": 0.1}),
        ("temperature+mixup", {"mixup": 1.0, "holdout": 0.1}),
        ("logit-adjustment+temperature", {"holdout": 0.1}),
        ("logit-adjustment+temperature+mixup", {"mixup": 1.0, "holdout": 0.1}),
        ("lws-held-out", {"holdout": 0.1}),
        ("lws-held-out+mixup", {"mixup": 1.0, "holdout": 0.1}),
        ("vector-scaling", {"holdout": 0.1}),
        ("vector-scaling+mixup", {"mixup": 1.0, "holdout": 0.1}),
    ],
)
def test_stage1_is_the_plain_models_but_for_the_recipe_of_its_source(method, recipe):
    plain, stage = (asdict(configure("cifar10", name).stage1) for name in ("ce", method))
    assert {name: value for name, value in stage.items() if value != plain[name]} == recipe


@pytest.mark.parametrize(
    ("method", "recipe"),
    [
        ("tau-norm", {"rule": "tau_norm", "value": None}),
        ("ncm+shift", {"rule": "ncm", "shift_epochs": 10}),
        ("logit-adjustment", {"rule": "logit_adjustment", "value": 1.0}),
        ("temperature", {"rule": "temperature", "value": None}),
        ("logit-adjustment+temperature", {"rule": "adjusted_temperature", "value": None}),
        ("lws-held-out", {"rule": "class_scales", "value": None}),
        ("vector-scaling", {"rule": "vector_scaling", "value": None}),
        ("fslwf", {"shots": 5}),
        ("oltr", OLTR),
        ("oltr+lfme", OLTR),
    ],
)
def test_stage2_has_the_recipe_of_its_source(method, recipe):
    stage = asdict(configure("cifar10", method).stage2)
    assert {name: stage[name] for name in recipe} == recipe


def test_remix_with_drw_runs_for_300_epochs_and_bbn_on_its_own_schedule():
    assert configure("cifar10", "remix+drw").stage1.epochs == 300
    bbn = configure("cifar10", "bbn").stage1
    factors = [learning_rate_factor(bbn, epoch) for epoch in (5, 119, 120, 159, 160)]
    np.testing.assert_allclose(factors, [1, 1, 0.01, 0.01, 0.0001])


def test_decoupled_methods_come_with_and_without_mixup_and_shift():
    for name in ("crt", "lws", "tau-norm", "ncm"):
        ends = ("", "+mixup", "+shift", "+mixup+shift")
        plain, mixed, shifted, both = (configure("cifar10", name + end) for end in ends)
        assert [c.stage1.mixup for c in (plain, mixed, shifted, both)] == [None, 1.0, None, 1.0]
        switch = "shift_epochs" if name in ("tau-norm", "ncm") else "shift_bn"
        assert [bool(getattr(c.stage2, switch)) for c in (plain, mixed, shifted, both)] == [False, False, True, True]


def test_a_slip_in_a_recipe_names_the_method_and_the_field(monkeypatch):
    monkeypatch.setitem(METHODS, "mine", replace(METHODS["ce"], stage1={"los": "focal"}))
    with pytest.raises(MislasError, match=r"method 'mine': .*'los'"):
        configure("digits", "mine")
    monkeypatch.setitem(METHODS, "mine", replace(METHODS["crt"], stage2={"a": 0}))
    with pytest.raises(MislasError, match=r"method 'mine': .*missing learn_scale"):
        configure("digits", "mine")


def test_numbers_of_a_recipe_are_those_of_the_command_line(monkeypatch):
    """``gamma=2`` is 2.0, so that both name one run; what has no such type says so."""
    recipe = ONE_STAGE["focal"]
    monkeypatch.setitem(METHODS, "mine", replace(recipe, stage1=dict(loss="focal", gamma=2)))
    assert configure("cifar10", "mine").id == configure("cifar10", "focal", overrides={"gamma": 2}).id
    for slip, says in ({"epochs": 2.0}, "epochs takes int, got 2.0"), ({"lr": "high"}, "lr takes float, got 'high'"):
        monkeypatch.setitem(METHODS, "mine", replace(recipe, stage1=slip))
        with pytest.raises(MislasError, match=f"method 'mine': {says}"):
            configure("cifar10", "mine")


def test_a_dataset_without_settings_says_where_they_go(monkeypatch):
    monkeypatch.setitem(SPECS, "mine", SPECS["digits"])
    with pytest.raises(MislasError, match=r"no settings to train mine with: add an entry to mislas.methods.SETTINGS"):
        configure("mine", "ce")
