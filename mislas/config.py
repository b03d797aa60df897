"""A run's configuration: everything that decides its numbers, and the identity that follows from it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any

from .augment import MIXES
from .data import LISTS, dataset_name, spec_of, training_images
from .errors import MislasError, unknown
from .losses import LOSSES, SMOOTHING, LossSpec, check_smoothing
from .metric import METRICS
from .models import BACKBONES, CLASSIFIERS, DELTAS, RESNETS, STAGES
from .rules import RULES, Rule
from .samplers import SAMPLERS

#: Steps of a schedule: shares of the epochs after which the rate is multiplied, and by what; None is cosine, to 0.
SCHEDULES = {"multistep": ((0.8, 0.9), 0.1), "multistep-bbn": ((0.6, 0.8), 0.01), "cosine": None}
PRECISIONS = ("fp32", "bf16")
GROUPS = ("many", "medium", "few")
AVERAGES = ("cumulative",)  # of batch norm's statistics, beside the moving one

# A field whose value is None is "off" and is left out of the canonical form. A field added later starts as None, so
# that the identities of runs measured before it stay what they were.


@dataclass(frozen=True, kw_only=True)
class Sgd:
    """What every stage with gradients has: an optimiser, its schedule, and how batches are drawn.

    Attributes:
        epochs, batch_size, lr, momentum, weight_decay: SGD.
        schedule: ``"multistep"`` (x0.1 after 80% and 90% of the epochs: 160 and 180 of 200), ``"multistep-bbn"``
            (x0.01 after 60% and 80%: Zhou et al., 2020) or ``"cosine"`` (to 0).
        sampler: name in :data:`mislas.samplers.SAMPLERS`.
    """

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    schedule: str
    momentum: float = 0.9
    sampler: str

    def sampler_in(self, epoch: int) -> str:
        """The sampler of an epoch (from 0)."""
        return self.sampler


@dataclass(frozen=True, kw_only=True)
class Stage1(Sgd):
    """Representation learning: backbone and linear classifier together.

    Attributes:
        warmup: epochs of linear warm-up (Cao et al., 2019, use 5 on CIFAR).
        loss: name in :data:`mislas.losses.LOSSES`; gamma, max_margin and adjustment belong to some of them.
        mixup: alpha of mixup's Beta(alpha, alpha), or None for no mixup.
        mix: name in :data:`mislas.augment.MIXES` of another way to mix than mixup, with ``mixup`` as its alpha.
        remix_kappa, remix_tau: of Remix, > 0; see :func:`mislas.augment.remix_weight`.
        gamma: of the focal loss, >= 0.
        max_margin: of LDAM, > 0.
        scale: of a cosine classifier, > 0; None is a linear classifier.
        adjustment: of the logit-adjusted loss, >= 0.
        beta: class weights by effective number, in [0, 1); None is no weights.
        defer: share of the epochs after which beta and deferred_sampler come into force; None is from the start.
        deferred_sampler: the sampler from then on.
        second_sampler: sampler of a second branch of the network (BBN); None is one branch.
        holdout: share of each class's images kept out of training, for a rule to be fitted to; in (0, 0.5].
        weights: the backbone starts from a file of pretrained weights and only its last block trains
            (:func:`mislas.models.freeze_but_last_block`); None starts from random weights. The file is named by the
            first 8 hex digits of its SHA-256, as in torchvision's file names, since its place decides no number.
        metric: name in :data:`mislas.metric.METRICS` of a loss of the features, added to ``loss``; None is none.
        metric_weight: what it is multiplied by, >= 0.
        group: train on the classes of one group alone, ``"many"``, ``"medium"`` or ``"few"``: an expert on them.
        distillation: temperature > 0 at which the three experts teach (:mod:`mislas.experts`); None is without them.
    """

    sampler: str = "instance_balanced"
    warmup: int = 0
    loss: str = "ce"
    mixup: float | None = None
    mix: str | None = None
    remix_kappa: float | None = None
    remix_tau: float | None = None
    gamma: float | None = None
    max_margin: float | None = None
    scale: float | None = None
    adjustment: float | None = None
    beta: float | None = None
    defer: float | None = None
    deferred_sampler: str | None = None
    second_sampler: str | None = None
    holdout: float | None = None
    weights: str | None = None
    metric: str | None = None
    metric_weight: float | None = None
    group: str | None = None
    distillation: float | None = None

    def deferred(self, epoch: int) -> bool:
        """Whether what is deferred is still to come in an epoch (from 0). In the last it never is."""
        return self.defer is not None and epoch < min(round(self.defer * self.epochs, 6), self.epochs - 1)

    def sampler_in(self, epoch: int) -> str:
        return self.deferred_sampler if self.deferred_sampler and not self.deferred(epoch) else self.sampler


@dataclass(frozen=True, kw_only=True)
class Stage2(Sgd):
    """Classifier learning on a frozen backbone: the generalised classifier of equation (4), or one of your own.

    Attributes:
        a, learn_scale, delta: see :class:`mislas.models.GeneralisedClassifier`.
        classifier: name in :data:`mislas.models.CLASSIFIERS` of another one; a, learn_scale and delta are then None.
        delta_lr: learning rate of dW as a ratio of ``lr`` (Table 5, column dW).
        loss: name in :data:`mislas.losses.LOSSES`: ``"las"`` is label-aware smoothing, equation (1).
        eps_1, eps_k, form, power, smoothing_over: of label-aware smoothing; see :mod:`mislas.losses`.
        gamma, adjustment: as in :class:`Stage1`.
        shift_bn: whether the running mean and variance of batch norm are updated (section 3.3).
        shift_epochs, shift_sampler: as in :class:`Adjustment`: what moves them before the classifier is learned.
        shift_average: as in :class:`Adjustment`, of either.
        mixup: as in :class:`Stage1`.
        draw: another draw of batches and initial weights than the seed's, 1 or more, on the same Stage-1.
    """

    schedule: str = "cosine"
    sampler: str = "class_balanced"
    a: int | None = None
    learn_scale: bool | None = None
    delta: str | None = None
    delta_lr: float | None = None
    loss: str = "ce"
    eps_1: float | None = None
    eps_k: float | None = None
    form: str | None = None
    power: float | None = None
    smoothing_over: str | None = None
    gamma: float | None = None
    adjustment: float | None = None
    shift_bn: bool = False
    shift_epochs: int | None = None
    shift_sampler: str | None = None
    mixup: float | None = None
    draw: int | None = None
    classifier: str | None = None
    shift_average: str | None = None


@dataclass(frozen=True)
class Adjustment:
    """Stage-2 without gradients: Stage-1's classifier, changed by a rule (:mod:`mislas.adjust`).

    Attributes:
        rule: name in :data:`mislas.rules.RULES`: ``"tau_norm"``, ``"ncm"`` (nearest class mean),
            ``"logit_adjustment"``, ``"temperature"``, ``"adjusted_temperature"`` (logit adjustment, tau 1, then a
            temperature), ``"vector_scaling"``, ``"class_scales"`` (that without a shift: LWS on images held out).
        value: tau of tau-normalisation (>= 0) or of logit adjustment (>= 0), or the temperature (>= 0.001). None:
            chosen on the images that Stage-1 held out. Other rules have none.
        shift_epochs: epochs of class-balanced batches that first move batch norm's running statistics (section 3.3).
        shift_sampler: name in :data:`mislas.samplers.SAMPLERS`, in place of class-balanced batches.
        shift_average: ``"cumulative"``: every batch of the shift counts alike. None is PyTorch's moving average, as in
            the authors' code, in which the last ten or twenty batches count. Equations (5) and (6) are of one batch.
    """

    rule: str
    value: float | None = None
    shift_epochs: int | None = None
    shift_sampler: str | None = None
    shift_average: str | None = None


@dataclass(frozen=True, kw_only=True)
class FewShot(Sgd):
    """Stage-2 that learns to make a classifier's weights from a few images (:mod:`mislas.fewshot`), on episodes.

    Attributes:
        batch_size: images that episodes ask about.
        shots: images that an episode shows of each class that it poses as novel, at least 1.
    """

    schedule: str = "cosine"
    sampler: str = "class_balanced"
    shots: int

    loss, mixup = "ce", None  # no fields: episodes know no other


@dataclass(frozen=True, kw_only=True)
class Memory(Sgd):
    """Stage-2 with a memory of class centroids (:mod:`mislas.memory`), in which the backbone may train on.

    Attributes:
        lr: the classifier's.
        centroid_weight: what the centroid loss is multiplied by, >= 0.
        backbone_lr: learning rate of the backbone as a ratio of ``lr``, > 0; None freezes it.
        attention: whether a backbone that trains on gets a last block of modulated attention.
    """

    schedule: str = "multistep"
    sampler: str = "class_cyclic"
    centroid_weight: float
    backbone_lr: float | None = None
    attention: bool = False

    loss, mixup = "ce", None  # no fields: it knows no other


Stage = Stage1 | Stage2 | Adjustment | FewShot | Memory
#: The kinds of Stage-2 that are told by a field of their own; else it is :class:`Stage2`.
_KINDS = {"rule": Adjustment, "shots": FewShot, "centroid_weight": Memory}


def stage2_kind(given: Iterable[str]) -> type[Stage2 | Adjustment | FewShot | Memory]:
    """Which Stage-2 it is that has these fields."""
    return next((kind for field, kind in _KINDS.items() if field in given), Stage2)


@dataclass(frozen=True)
class RunConfig:
    """One run. Made by :func:`mislas.methods.configure`, which fills in the paper's Table 5.

    Attributes:
        dataset: canonical dataset name.
        imbalance: imbalance factor, >= 1; of a dataset of list files, that of its training list.
        backbone: name in :data:`mislas.models.BACKBONES`.
        seed: of initialisation, order, crops, mixup: 0 or more.
        precision: ``"bf16"`` (autocast, float32 master weights) or ``"fp32"``; evaluation is always float32.
        stage1: see :class:`Stage1`.
        stage2: a :class:`Stage2`, :class:`Adjustment`, :class:`FewShot` or :class:`Memory`; None where the method has
            one stage.
        method: the registry's name for this recipe. A label: it does not enter the identity.
        n_max: training images of the largest class; None is all that the dataset has. Not of a dataset of list files.
    """

    dataset: str
    imbalance: float
    backbone: str
    seed: int
    precision: str
    stage1: Stage1
    stage2: Stage2 | Adjustment | FewShot | Memory | None = None
    method: str = "custom"
    n_max: int | None = None

    def __post_init__(self):
        object.__setattr__(self, "dataset", dataset_name(self.dataset))
        object.__setattr__(self, "imbalance", float(self.imbalance))
        if not 1 <= self.imbalance < math.inf:
            raise MislasError(f"imbalance factor must be >= 1 (1 is balanced) and finite, got {self.imbalance:g}")
        if self.dataset in LISTS and self.imbalance != spec_of(self.dataset).imbalance:
            raise MislasError(
                f"the imbalance factor of {self.dataset} is {spec_of(self.dataset).imbalance:g}, a fact about its "
                f"training list and no parameter; got {self.imbalance:g}, leave it out"
            )
        object.__setattr__(self, "n_max", check_type("n_max", self.n_max, None, "n_max"))
        if self.n_max is not None:
            _check_n_max(self)
            if self.n_max == spec_of(self.dataset).train_per_class:  # all there are: the same run as without
                object.__setattr__(self, "n_max", None)
        if self.backbone not in BACKBONES:
            unknown("backbone", self.backbone, BACKBONES)
        if not (isinstance(self.seed, Integral) and not isinstance(self.seed, bool) and self.seed >= 0):
            raise MislasError(f"seed must be an integer >= 0, got {self.seed!r}")
        object.__setattr__(self, "seed", int(self.seed))
        if self.precision not in PRECISIONS:
            unknown("precision", self.precision, PRECISIONS)
        for where in ("stage1", "stage2"):
            object.__setattr__(self, where, _typed(where, getattr(self, where)))
        _check_stage("stage1", self.stage1)
        _check_stage1(self.stage1)
        if self.stage1.weights is not None and self.backbone not in STAGES:
            names = ", ".join(STAGES)
            raise MislasError(f"stage1.weights needs one of torchvision's backbones ({names}), got {self.backbone!r}")
        if self.stage1.second_sampler is not None and self.backbone not in RESNETS:
            raise MislasError(f"stage1.second_sampler doubles the last block of a ResNet, got {self.backbone!r}")
        if getattr(self.stage2, "attention", False) and self.backbone not in RESNETS:
            raise MislasError(f"stage2.attention is one more block of a ResNet, got {self.backbone!r}; set it to false")
        if isinstance(self.stage2, Adjustment):
            _check_adjustment(self.stage2, self.stage1)
        elif self.stage2 is not None:
            _check_stage("stage2", self.stage2)
            {FewShot: _check_few_shot, Memory: _check_memory, Stage2: _check_stage2}[type(self.stage2)](self.stage2)
        few_shot = isinstance(self.stage2, FewShot)
        if few_shot and self.stage1.scale is None:
            raise MislasError("stage2 with shots needs a cosine classifier: set stage1.scale")
        if self.stage2 is not None and ((self.stage1.scale and not few_shot) or self.stage1.second_sampler):
            raise MislasError("stage2 needs a linear classifier: stage1.scale and stage1.second_sampler must be null")

    @property
    def shifts(self) -> bool:
        """Whether Stage-2 shifts batch norm's running statistics (section 3.3)."""
        return any(getattr(self.stage2, name, None) for name in ("shift_bn", "shift_epochs"))

    def canonical(self) -> dict[str, Any]:
        """What decides the numbers, as plain JSON types; fields that are off (None) are left out."""
        full = dataclasses.asdict(self)
        full.pop("method")
        return _without_none(full)

    @functools.cached_property
    def id(self) -> str:
        """Identity: 12 hex digits of the SHA-256 of the canonical JSON."""
        text = json.dumps(self.canonical(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def data_title(self) -> str:
        """What the run trains on, in words: equal for runs on the same images."""
        largest = "" if self.n_max is None else f" N_max={self.n_max}"
        return f"{self.dataset} IF={self.imbalance:g}{largest}"

    @property
    def stage1_only(self) -> RunConfig:
        """The Stage-1 run that this one builds on: a run of its own, shared by every Stage-2."""
        method = self.stage1.loss
        if self.stage1.mixup:
            how = self.stage1.mix or "mixup"
            method = how if method == "ce" else f"{method}+{how}"
        if self.stage1.scale is not None:
            method += "+cosine"
        if self.stage1.distillation is not None:
            method += "+experts"
        if self.stage1.holdout is not None:
            method += "+holdout"
        return replace(self, stage2=None, method=method) if self.stage2 else self

    @property
    def stage2_seed(self) -> int | str:
        """What Stage-2 draws by: the seed, or another draw beside it."""
        draw = getattr(self.stage2, "draw", None)
        return self.seed if draw is None else f"{self.seed}, draw {draw}"

    @property
    def experts(self) -> list[RunConfig]:
        """The runs that teach this one's Stage-1, each a Stage-1 of its own; none without distillation."""
        if self.stage1.distillation is None:
            return []
        alone = dict(distillation=None, sampler="instance_balanced", deferred_sampler=None, defer=None)
        plain = replace(self.stage1, **alone)
        return [
            replace(self, stage1=replace(plain, group=group), stage2=None, method=f"expert+{group}") for group in GROUPS
        ]

    @property
    def needs(self) -> set[str]:
        """Identities of the Stage-1 runs that this one is or builds on: its own, and those that teach it."""
        return {run.id for run in (self.stage1_only, *self.experts)}

    @property
    def shared_pass(self) -> str:
        """Equal for runs whose Stage-2 sees the same features: they train together on one backbone pass."""
        if self.stage2 is None:
            return self.id
        if not isinstance(self.stage2, Stage2 | Adjustment):
            return self.id
        keys = ("shift_epochs", "shift_sampler", "shift_average")
        if isinstance(self.stage2, Stage2):
            keys += ("epochs", "batch_size", "sampler", "mixup", "draw", "shift_bn")
        kind = type(self.stage2).__name__
        return f"{self.stage1_only.id}:{kind}," + ",".join(str(getattr(self.stage2, key)) for key in keys)

    def to_json(self) -> dict[str, Any]:
        """The canonical form and the method's name, as a record keeps it; :meth:`from_json` reads it."""
        return {"method": self.method, **self.canonical()}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> RunConfig:
        """The run that :meth:`to_json` has written.

        Raises:
            MislasError, TypeError, KeyError: values or fields that a run cannot have.
        """
        stored = dict(stored)
        stored["stage1"] = Stage1(**stored["stage1"])
        if stored.get("stage2") is not None:
            stored["stage2"] = stage2_kind(stored["stage2"])(**stored["stage2"])
        return cls(**stored)

    def override(self, changes: dict[str, Any]) -> RunConfig:
        """A copy with some fields changed.

        Keys are ``"seed"``, ``"stage1.epochs"``, ``"stage2.eps_1"`` and so on. A bare name of a stage's field means
        Stage-1's if Stage-1 has it (``"epochs"``), else Stage-2's (``"eps_1"``). Keys without meaning in this run are
        passed over (Stage-2's in a one-stage run, ``eps_1`` without label-aware smoothing, ``delta_lr`` without dW),
        so that one set of overrides serves a whole table.

        Raises:
            MislasError: for an unknown field or a value of the wrong type.
        """
        top, stages = {}, {"stage1": {}, "stage2": {}}
        for key, value in changes.items():
            where, field = locate(key)
            (top if where is None else stages[where])[field] = check_type(key, value, where, field)
        for where, new in stages.items():
            stage = getattr(self, where)
            if new and stage is not None:
                top[where] = _change(stage, new)
        return replace(self, **top) if top else self


_TOP = tuple(f.name for f in fields(RunConfig) if f.name not in ("stage1", "stage2", "method"))
_TYPES = {
    None: {f.name: f.type for f in fields(RunConfig)},
    "stage1": {f.name: f.type for f in fields(Stage1)},
    "stage2": {f.name: f.type for owner in (Stage2, *_KINDS.values()) for f in fields(owner)},
}
#: Fields that mean something for some losses only. (A cosine classifier's scale serves any loss.)
_LOSS_SETTINGS = {name for spec in LOSSES.values() for name in spec.settings + spec.optional} - {"scale"}


def field_names() -> list[str]:
    """Every field that an override may name."""
    return [*_TOP, *(f"{stage}.{name}" for stage in ("stage1", "stage2") for name in _TYPES[stage])]


def locate(key: str) -> tuple[str | None, str]:
    """Which part of a configuration a key names: (None, field) or (stage, field).

    Raises:
        MislasError: no field is called so.
    """
    if key in _TOP:
        return None, key
    stage, _, field = key.rpartition(".")
    for where in (stage,) if stage else ("stage1", "stage2"):
        if where and field in _TYPES.get(where, ()):
            return where, field
    unknown("field", key, field_names())


def value_of(config: RunConfig, key: str) -> Any:
    """What a run has in the field that a key names; None, too, if its stage has no such field."""
    where, field = locate(key)
    part = getattr(config, where) if where else config
    return None if part is None else vars(part).get(field)


def takes(config: RunConfig, key: str, value: Any) -> bool:
    """Whether a run has what an override would set, which a key without meaning in it does not."""
    return value_of(config, key) == check_type(key, value, *locate(key))


def differences(config: RunConfig, other: RunConfig) -> dict[str, Any]:
    """What a run has otherwise than another: by key, its value."""
    pairs = ((key, value_of(config, key), value_of(other, key)) for key in field_names())
    return {key: own for key, own, others in pairs if own != others}


def assignment(key: str, value: Any) -> str:
    """``key=value`` as ``--set`` takes it."""
    return f"{key}={value if isinstance(value, str) else json.dumps(value)}"


def takes_text(key: str) -> bool:
    """Whether the field that a key names takes text."""
    where, field = locate(key)
    return str(_TYPES[where][field]).startswith("str")


def check_type(key: str, value: Any, where: str | None, field: str) -> Any:
    """Return ``value`` as the field's type.

    Raises:
        MislasError: it is of another; the error says what the field takes.
    """
    annotation = str(_TYPES[where][field])
    if value is None and "None" in annotation:
        return None
    kind = annotation.split(" | ")[0]
    if kind == "float" and isinstance(value, Real) and not isinstance(value, bool):  # NumPy's, too
        return float(value)
    if kind == "int" and isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    if kind == "bool" and isinstance(value, bool):
        return value
    if kind == "str" and isinstance(value, str):
        return value
    raise MislasError(f"{key} takes {annotation.replace(' | ', ' or ')}, got {value!r}")


def _typed(where: str, stage: Stage | None) -> Stage | None:
    """A stage whose values have their fields' types: a run is the same run with 1 and with 1.0."""
    if stage is None:
        return None
    return replace(
        stage, **{key: check_type(f"{where}.{key}", value, where, key) for key, value in vars(stage).items()}
    )


def _change(stage: Stage, new: dict[str, Any]) -> Stage:
    """``stage`` with ``new`` values. Settings that mean nothing beside them are off, whether new or old."""
    after = dataclasses.asdict(stage)
    after |= {key: value for key, value in new.items() if key in after}
    if isinstance(stage, Stage1):  # what takes whole images does not mix; without mixup there is no other way to mix
        if any(after[key] is not None and key not in new for key in ("second_sampler", "metric", "distillation")):
            after["mixup"] = None
        if after["mixup"] is None and "mix" not in new:
            after["mix"] = None
        if after["mix"] != "remix" and not new.keys() & {"remix_kappa", "remix_tau"}:
            after |= {"remix_kappa": None, "remix_tau": None}
    if isinstance(stage, Memory) and after["backbone_lr"] is None and "attention" not in new:
        after["attention"] = False
    if isinstance(stage, Stage2 | Adjustment) and not (after.get("shift_bn") or after["shift_epochs"]):
        after["shift_average"] = None
    if isinstance(stage, Adjustment) and getattr(RULES.get(after["rule"]), "choose", True) is None:
        after["value"] = None
    if isinstance(stage, Stage1 | Stage2):
        spec = LOSSES.get(after["loss"])
        idle = _LOSS_SETTINGS - {*spec.settings, *spec.optional} if spec else set()
        if "power" not in new and after.get("form") != "power":
            idle.add("power")
        if isinstance(stage, Stage2) and after["classifier"] is not None:
            after |= {"a": None, "learn_scale": None, "delta": None}
        if isinstance(stage, Stage2) and after["delta"] is None:
            idle.add("delta_lr")
        after |= dict.fromkeys(idle & after.keys())
    return type(stage)(**after)


# ----------------------------------------------------------------------------------------------------------- checks


#: What numbers of a stage must be, in words and as a test, and which; None is no number.
_RANGES: tuple[tuple[str, Callable[[float], bool], tuple[str, ...]], ...] = (
    (
        "> 0 and finite",
        lambda value: 0 < value < math.inf,
        ("epochs", "batch_size", "lr", "delta_lr", "max_margin", "scale", "remix_kappa", "remix_tau"),
    ),
    (
        ">= 0 and finite",
        lambda value: 0 <= value < math.inf,
        ("weight_decay", "warmup", "gamma", "adjustment", "metric_weight", "centroid_weight"),
    ),
    (">= 0 and < 1", lambda value: 0 <= value < 1, ("momentum",)),
)


def _check_stage(name: str, stage: Stage1 | Stage2 | FewShot | Memory) -> None:
    """What every stage with gradients has: numbers in their ranges, optimiser, schedule, sampler, loss."""
    for said, holds, keys in _RANGES:
        for key in keys:
            value = getattr(stage, key, None)
            if value is not None and not holds(value):
                raise MislasError(f"{name}.{key} must be {said}, got {value!r}")
    if stage.mixup is not None and not 0 < stage.mixup < math.inf:
        raise MislasError(f"{name}.mixup is alpha > 0, or null for no mixup, got {stage.mixup!r}")
    if stage.schedule not in SCHEDULES:
        unknown(f"{name}.schedule", stage.schedule, SCHEDULES)
    match SCHEDULES[stage.schedule]:
        case None | ((*_,), int() | float()):
            pass
        case other:
            raise MislasError(
                f"SCHEDULES[{stage.schedule!r}] must be None, which is cosine, or shares of the epochs and a factor, "
                f"such as ((0.8, 0.9), 0.1); got {other!r}"
            )
    if stage.sampler not in SAMPLERS:
        unknown(f"{name}.sampler", stage.sampler, SAMPLERS)
    for loss, spec in LOSSES.items():
        if not isinstance(spec, LossSpec):
            raise MislasError(f"LOSSES[{loss!r}] must be a LossSpec, such as LossSpec(make), got {spec!r}")
    allowed = {loss: spec for loss, spec in LOSSES.items() if all(hasattr(stage, key) for key in spec.settings)}
    if stage.loss not in LOSSES:
        unknown(f"{name}.loss", stage.loss, allowed)
    spec = LOSSES[stage.loss]
    if stage.loss not in allowed:
        lacks = ", ".join(key for key in spec.settings if not hasattr(stage, key))
        raise MislasError(
            f"loss {stage.loss!r} needs {lacks}, which {name} does not have; it has {', '.join(allowed)}, or register "
            "one that has its settings inside"
        )
    for key in (*spec.settings, *spec.optional):
        if hasattr(stage, key) and key not in {*_LOSS_SETTINGS, "scale"}:
            raise MislasError(
                f"loss {stage.loss!r} takes {key}, which {name} has for something else; a loss may take "
                f"{', '.join(sorted(k for k in _LOSS_SETTINGS if hasattr(stage, k)))}"
            )
    if any(getattr(stage, key, None) is None for key in spec.settings):
        *most, last = spec.settings
        needs = f"{', '.join(most)} and {last}" if most else last
        raise MislasError(f"loss {stage.loss!r} needs {needs} in {name}")
    for key in sorted(_LOSS_SETTINGS - {*spec.settings, *spec.optional}):
        if getattr(stage, key, None) is not None:
            owner = next(loss for loss, other in LOSSES.items() if key in other.settings + other.optional)
            raise MislasError(f"{key} belongs to loss {owner!r}; {name}.loss is {stage.loss!r}")


def _check_n_max(config: RunConfig) -> None:
    if config.dataset in LISTS:
        raise MislasError(f"n_max cuts a dataset, and {config.dataset} is long-tailed as it is; leave it out")
    most = spec_of(config.dataset).train_per_class
    if not 1 <= config.n_max <= most:
        raise MislasError(
            f"n_max must be in 1 .. {most}, the images that {config.dataset} has of a class, got {config.n_max}"
        )
    training_images(config.dataset, config.imbalance, config.n_max)  # a class that is left empty stops here


def _check_stage1(stage: Stage1) -> None:
    if stage.beta is not None and not 0 <= stage.beta < 1:
        raise MislasError(f"stage1.beta, of the effective number, must be in [0, 1), got {stage.beta!r}")
    if stage.mix is not None and stage.mix not in MIXES:
        unknown("stage1.mix", stage.mix, MIXES)
    if stage.mix is not None and stage.mixup is None:
        raise MislasError(f"stage1.mix={stage.mix!r} needs stage1.mixup, its alpha")
    remix = (stage.remix_kappa is not None, stage.remix_tau is not None)
    if remix != (stage.mix == "remix",) * 2:
        raise MislasError("stage1.remix_kappa and stage1.remix_tau go with mix='remix' and only with it")
    for key in ("deferred_sampler", "second_sampler"):
        if getattr(stage, key) is not None and getattr(stage, key) not in SAMPLERS:
            unknown(f"stage1.{key}", getattr(stage, key), SAMPLERS)
    if stage.defer is not None and not 0 < stage.defer < 1:
        raise MislasError(f"stage1.defer is a share of the epochs, between 0 and 1, got {stage.defer!r}")
    deferred = stage.beta is not None or stage.deferred_sampler is not None
    if (stage.defer is not None and not deferred) or (stage.defer is None and stage.deferred_sampler is not None):
        raise MislasError("stage1.defer needs beta or deferred_sampler to defer, and deferred_sampler needs defer")
    if stage.second_sampler is not None and stage.mixup is not None:
        raise MislasError("two branches mix features in place of images: stage1.mixup must be null")
    if stage.second_sampler is not None and stage.weights is not None:
        raise MislasError("two branches start from random weights: stage1.weights must be null")
    if stage.weights is not None and not re.fullmatch("[0-9a-f]{8}", stage.weights):
        raise MislasError(
            f"stage1.weights is the first 8 hex digits of the SHA-256 of a file of weights, got {stage.weights!r}"
        )
    if stage.metric is not None and stage.metric not in METRICS:
        unknown("stage1.metric", stage.metric, METRICS)
    if (stage.metric is None) != (stage.metric_weight is None):
        raise MislasError(f"stage1.metric_weight goes with metric and only with it, got {stage.metric_weight!r}")
    if stage.metric is not None and (stage.mixup is not None or stage.second_sampler is not None):
        raise MislasError(
            "stage1.metric compares images of one class each: stage1.mixup and stage1.second_sampler must be null"
        )
    if stage.group is not None and stage.group not in GROUPS:
        unknown("stage1.group", stage.group, GROUPS)
    samplers = {stage.sampler, stage.deferred_sampler, stage.second_sampler} - {None}
    if stage.group is not None and (samplers != {"instance_balanced"} or stage.distillation is not None):
        raise MislasError("stage1.group takes 'instance_balanced' batches, one branch, and no distillation")
    if stage.distillation is not None and not 0 < stage.distillation < math.inf:
        raise MislasError(f"stage1.distillation is a temperature > 0, or null, got {stage.distillation!r}")
    if stage.distillation is not None and stage.holdout is None:
        raise MislasError("stage1.distillation compares student and experts on held-out images: set stage1.holdout")
    if stage.distillation is not None and {stage.mixup, stage.second_sampler, stage.metric, stage.beta} != {None}:
        raise MislasError(
            "stage1.distillation weighs whole images: mixup, second_sampler, metric and beta of stage1 must be null"
        )
    if stage.holdout is not None and not 0 < stage.holdout <= 0.5:
        raise MislasError(f"stage1.holdout is a share of each class, above 0 and at most 0.5, got {stage.holdout!r}")


def _check_stage2(stage: Stage2) -> None:
    if stage.classifier is not None:
        if stage.classifier not in CLASSIFIERS:
            unknown("stage2.classifier", stage.classifier, CLASSIFIERS)
        if (stage.a, stage.learn_scale, stage.delta) != (None, None, None):
            raise MislasError("stage2.a, learn_scale and delta are equation (4)'s: leave them out beside classifier")
    else:
        if stage.a not in (0, 1):
            raise MislasError(f"stage2.a is 0 or 1, got {stage.a!r}")
        if stage.learn_scale is None:
            raise MislasError("stage2.learn_scale is true or false; it is null only beside stage2.classifier")
        if stage.delta is not None and stage.delta not in DELTAS:
            unknown("stage2.delta", stage.delta, DELTAS)
        if stage.delta is None and not (stage.a and stage.learn_scale):
            raise MislasError("stage2 learns nothing, or from nothing: set delta, or a=1 and learn_scale=true")
    if stage.draw is not None and stage.draw < 1:
        raise MislasError(f"stage2.draw counts from 1, or is null for the seed's own draw, got {stage.draw!r}")
    if (stage.delta is None) != (stage.delta_lr is None):
        raise MislasError(f"stage2.delta_lr goes with delta and only with it, got {stage.delta_lr!r}")
    if stage.loss == "las":
        check_smoothing(stage.eps_1, stage.eps_k, stage.form, stage.power)
        if stage.smoothing_over not in SMOOTHING:
            unknown("stage2.smoothing_over", stage.smoothing_over, SMOOTHING)
    _check_shift(stage)


def _check_shift(stage: Stage2 | Adjustment) -> None:
    if stage.shift_epochs is not None and stage.shift_epochs < 1:
        raise MislasError(f"stage2.shift_epochs must be at least 1, or null for no shift, got {stage.shift_epochs!r}")
    if stage.shift_sampler is not None:
        if stage.shift_sampler not in SAMPLERS:
            unknown("stage2.shift_sampler", stage.shift_sampler, SAMPLERS)
        if stage.shift_epochs is None:
            raise MislasError("stage2.shift_sampler says which images shift batch norm: set stage2.shift_epochs, too")
    if stage.shift_average is not None:
        if stage.shift_average not in AVERAGES:
            unknown("stage2.shift_average", stage.shift_average, AVERAGES)
        if stage.shift_epochs is None and not getattr(stage, "shift_bn", False):
            raise MislasError("stage2.shift_average is of shifted batch norm: set stage2.shift_bn, or shift_epochs")


def _check_few_shot(stage: FewShot) -> None:
    if stage.shots < 1:
        raise MislasError(f"stage2.shots must be at least 1, got {stage.shots!r}")


def _check_memory(stage: Memory) -> None:
    if stage.backbone_lr is not None and not 0 < stage.backbone_lr < math.inf:
        raise MislasError(f"stage2.backbone_lr must be > 0, or null to freeze the backbone, got {stage.backbone_lr!r}")
    if stage.attention and stage.backbone_lr is None:
        raise MislasError("stage2.attention is learned with the backbone: set stage2.backbone_lr, or attention=false")


def _check_adjustment(stage: Adjustment, stage1: Stage1) -> None:
    if stage.rule not in RULES:
        unknown("stage2.rule", stage.rule, RULES)
    rule = RULES[stage.rule]
    if not isinstance(rule, Rule):
        raise MislasError(f"RULES[{stage.rule!r}] must be a Rule, such as Rule(make), got {rule!r}")
    if stage.value is not None and rule.choose is None:
        raise MislasError(
            f"stage2.value goes with a rule that chooses one, Rule(make, choose): {stage.rule!r} has none, got "
            f"{stage.value!r}; leave it out"
        )
    if stage.value is not None and not rule.least <= stage.value < math.inf:
        raise MislasError(
            f"stage2.value of {stage.rule!r} must be >= {rule.least:g} and finite, or null to choose it on held-out "
            f"images; got {stage.value!r}"
        )
    if rule.choose is not None and stage.value is None and stage1.holdout is None:
        raise MislasError(f"{stage.rule!r} chooses its value on held-out images: set stage1.holdout, or stage2.value")
    if rule.holds_out and stage1.holdout is None:
        raise MislasError(f"{stage.rule!r} is fitted to held-out images: set stage1.holdout")
    _check_shift(stage)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return value
