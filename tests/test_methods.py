from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F

from mislas.data import SPECS
from mislas.errors import MislasError
from mislas.losses import cross_entropy
from mislas.methods import METHODS, ONE_STAGE, configure, loss_for

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


@pytest.mark.parametrize("dataset", SPECS)
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
    with pytest.raises(MislasError, match=r"unknown stage1.loss 'focl'; did you mean 'focal'\? Known: .*ce, las"):
        configure("digits", "ce", overrides={"stage1.loss": "focl"})


def test_losses_are_made_for_the_class_counts():
    logits, targets = torch.randn(6, 2), torch.tensor([0, 1, 0, 1, 1, 0])
    q = torch.tensor([[0.7, 0.3], [0.0, 1.0]])[targets]  # eps_1 = 0.3 for the larger class, eps_K = 0 for the other
    loss = loss_for(configure("digits", "mislas").stage2, (50, 5))
    assert loss(logits, targets).mean().item() == pytest.approx(F.cross_entropy(logits, q).item(), abs=1e-6)
    assert loss_for(configure("digits", "crt").stage2, (50, 5)) is cross_entropy
