"""The rows of the paper's tables. A method is a name and how its Stage-1 and Stage-2 are trained.

To add a row, add one entry to :data:`METHODS`: what it changes in Stage-1, and what Stage-2 is, if it has one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from . import losses
from .config import RunConfig, Stage1, Stage2
from .data import dataset_name
from .errors import unknown


@dataclass(frozen=True)
class Settings:
    """The paper's Table 5 for one dataset, with what the paper leaves to the works it follows."""

    stage1: dict[str, Any]
    stage2: dict[str, Any]
    delta_lr: float
    eps_1: float
    eps_k: float
    mixup: float = 1.0
    backbone: str = "resnet32"
    precision: str = "bf16"


_CIFAR1 = dict(epochs=200, batch_size=128, lr=0.1, weight_decay=2e-4, schedule="multistep", warmup=5)
_CIFAR2 = dict(epochs=10, batch_size=128, lr=0.1, weight_decay=2e-4)
_CIFAR10 = Settings(_CIFAR1, _CIFAR2, delta_lr=0.5, eps_1=0.3, eps_k=0.0)
_CIFAR100 = Settings(_CIFAR1, _CIFAR2, delta_lr=0.2, eps_1=0.4, eps_k=0.1)

SETTINGS: dict[str, Settings] = {
    "cifar10": _CIFAR10,
    "cifar10-jpeg": _CIFAR10,
    "cifar100": _CIFAR100,
    "cifar100-jpeg": _CIFAR100,
    "tinyimagenet32": _CIFAR100,  # the measured neighbour of CIFAR-100-LT: its settings, not the paper's dataset
    "tinyimagenet64": _CIFAR100,
    "digits": Settings(  # small enough for a laptop and for tests; not from the paper
        dict(epochs=20, batch_size=32, lr=0.1, weight_decay=2e-4, schedule="multistep", warmup=2),
        dict(epochs=5, batch_size=32, lr=0.1, weight_decay=2e-4),
        delta_lr=0.5,
        eps_1=0.3,
        eps_k=0.0,
        backbone="resnet8",
        precision="fp32",
    ),
}

LOSSES: dict[str, Any] = {"ce": losses.cross_entropy}


@dataclass(frozen=True)
class Method:
    """One row of a table.

    Attributes:
        title: as the paper prints it.
        idea: one sentence.
        source: citation.
        mixup: whether Stage-1 uses mixup; alpha is the dataset's (1 on CIFAR).
        stage1: fields of :class:`Stage1` that differ from the dataset's settings.
        stage2: fields of :class:`Stage2`, or None for a one-stage method. With ``loss="las"`` the dataset's eps_1
            and eps_k are filled in.
    """

    title: str
    idea: str
    source: str
    mixup: bool = False
    stage1: dict[str, Any] = field(default_factory=dict)
    stage2: dict[str, Any] | None = None


CRT = dict(a=0, learn_scale=False, delta="fresh", delta_lr=1.0)
LWS = dict(a=1, learn_scale=True)
GENERALISED = dict(a=1, learn_scale=True, delta="zeros")  # equation (4); delta_lr is the dataset's
LAS = dict(loss="las", form="concave", smoothing_over="others")

KANG = "Kang et al., Decoupling representation and classifier for long-tailed recognition, ICLR 2020"
ZHANG = "Zhang et al., mixup: Beyond empirical risk minimization, ICLR 2018"
MISLAS = "Improving calibration for long-tailed recognition (the paper)"

METHODS: dict[str, Method] = {
    "ce": Method("CE", "Cross-entropy on the images as they come.", "the plain model"),
    "mixup": Method("mixup", "Train on convex combinations of images and of their labels.", ZHANG, mixup=True),
    "crt": Method("cRT", "Freeze the backbone; learn a new classifier on balanced classes.", KANG, stage2=CRT),
    "lws": Method("LWS", "Freeze the backbone; learn one scale per class on balanced classes.", KANG, stage2=LWS),
    "crt+mixup": Method("cRT+mixup", "cRT on a backbone trained with mixup.", KANG, mixup=True, stage2=CRT),
    "lws+mixup": Method("LWS+mixup", "LWS on a backbone trained with mixup.", KANG, mixup=True, stage2=LWS),
    "lws+mixup+shift": Method(
        "LWS+mixup+SL",
        "LWS+mixup, batch norm's running statistics shifted.",
        MISLAS,
        True,
        {},
        LWS | {"shift_bn": True},
    ),
    "lws+las": Method("LWS+LAS", "LWS learned with label-aware smoothing.", MISLAS, stage2=LWS | LAS),
    "mislas": Method(
        "MiSLAS",
        "mixup in Stage-1; then scales and a shift of the classifier, label-aware smoothing, shifted batch norm.",
        MISLAS,
        mixup=True,
        stage2=GENERALISED | LAS | {"shift_bn": True},
    ),
}


def configure(
    dataset: str,
    method: str,
    imbalance: float = 100,
    seed: int = 0,
    overrides: dict[str, Any] | None = None,
) -> RunConfig:
    """The configuration of a row of a table: the dataset's settings (Table 5), the method's recipe, your overrides.

    Args:
        dataset: a key of :data:`mislas.data.SPECS`.
        method: a key of :data:`METHODS`.
        imbalance: imbalance factor, >= 1.
        seed: 0 or more.
        overrides: see :meth:`RunConfig.override`.

    Raises:
        MislasError: unknown dataset, method or field, or a value outside its range.
    """
    dataset = dataset_name(dataset)
    if method not in METHODS:
        unknown("method", method, METHODS)
    settings, recipe = SETTINGS[dataset], METHODS[method]
    stage1 = Stage1(**settings.stage1 | {"mixup": settings.mixup if recipe.mixup else None} | recipe.stage1)
    stage2 = None
    if recipe.stage2 is not None:
        filled = {}
        if recipe.stage2.get("delta"):
            filled["delta_lr"] = settings.delta_lr
        if recipe.stage2.get("loss") == "las":
            filled |= {"eps_1": settings.eps_1, "eps_k": settings.eps_k}
        stage2 = Stage2(**settings.stage2 | filled | recipe.stage2)
    config = RunConfig(dataset, imbalance, settings.backbone, seed, settings.precision, stage1, stage2, method)
    return config.override(overrides or {})


def loss_for(stage: Stage1 | Stage2, class_counts: tuple[int, ...]) -> losses.Loss:
    """The loss that a stage trains with, made for a training set's class counts."""
    if stage.loss == "las":
        factors = losses.smoothing_factors(class_counts, stage.eps_1, stage.eps_k, stage.form, stage.power)
        return losses.label_aware_smoothing(factors, over=stage.smoothing_over)
    if stage.loss not in LOSSES:
        unknown("loss", stage.loss, [*LOSSES, "las"])
    return LOSSES[stage.loss]
