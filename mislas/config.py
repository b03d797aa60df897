"""A run's configuration: everything that decides its numbers, and the identity that follows from it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, fields, replace
from typing import Any

from .data import dataset_name
from .errors import MislasError, unknown
from .losses import check_smoothing
from .models import check_backbone
from .samplers import SAMPLERS

SCHEDULES = ("multistep", "cosine")
PRECISIONS = ("fp32", "bf16")
DELTAS = ("zeros", "fresh", "stage1")
SMOOTHING = ("others", "all")

# A field whose value is None is "off" and is left out of the canonical form. A field added later starts as None, so
# that the identities of runs measured before it stay what they were.


@dataclass(frozen=True)
class Stage1:
    """Representation learning: backbone and linear classifier together.

    Attributes:
        epochs, batch_size, lr, momentum, weight_decay: SGD.
        schedule: ``"multistep"`` (x0.1 after 80% and 90% of the epochs: 160 and 180 of 200) or ``"cosine"`` (to 0).
        warmup: epochs of linear warm-up (Cao et al., 2019, use 5 on CIFAR).
        loss: name in :data:`mislas.methods.LOSSES`.
        sampler: name in :data:`mislas.samplers.SAMPLERS`.
        mixup: alpha of mixup's Beta(alpha, alpha), or None for no mixup.
    """

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    schedule: str
    momentum: float = 0.9
    warmup: int = 0
    loss: str = "ce"
    sampler: str = "instance_balanced"
    mixup: float | None = None


@dataclass(frozen=True)
class Stage2:
    """Classifier learning on a frozen backbone, with the generalised classifier of equation (4).

    Attributes:
        epochs, batch_size, lr, momentum, weight_decay, schedule, sampler, mixup: as in :class:`Stage1`.
        a, learn_scale, delta: see :class:`mislas.models.GeneralisedClassifier`.
        delta_lr: learning rate of dW as a ratio of ``lr`` (Table 5, column dW).
        loss: ``"ce"`` or ``"las"`` (label-aware smoothing, equation 1).
        eps_1, eps_k, form, power, smoothing_over: of label-aware smoothing; see :mod:`mislas.losses`.
        shift_bn: whether the running mean and variance of batch norm are updated (section 3.3).
    """

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    a: int
    learn_scale: bool
    delta: str | None = None
    delta_lr: float | None = None
    loss: str = "ce"
    eps_1: float | None = None
    eps_k: float | None = None
    form: str | None = None
    power: float | None = None
    smoothing_over: str | None = None
    shift_bn: bool = False
    schedule: str = "cosine"
    momentum: float = 0.9
    sampler: str = "class_balanced"
    mixup: float | None = None


@dataclass(frozen=True)
class RunConfig:
    """One run. Made by :func:`mislas.methods.configure`, which fills in the paper's Table 5.

    Attributes:
        dataset: canonical dataset name.
        imbalance: imbalance factor, >= 1.
        backbone: see :func:`mislas.models.backbone`.
        seed: of initialisation, order, crops, mixup: 0 or more.
        precision: ``"bf16"`` (autocast, float32 master weights) or ``"fp32"``; evaluation is always float32.
        stage1: see :class:`Stage1`.
        stage2: see :class:`Stage2`; None where the method has one stage.
        method: the registry's name for this recipe. A label: it does not enter the identity.
    """

    dataset: str
    imbalance: float
    backbone: str
    seed: int
    precision: str
    stage1: Stage1
    stage2: Stage2 | None = None
    method: str = "custom"

    def __post_init__(self):
        object.__setattr__(self, "dataset", dataset_name(self.dataset))
        object.__setattr__(self, "imbalance", float(self.imbalance))
        if not self.imbalance >= 1:
            raise MislasError(f"imbalance factor must be >= 1 (1 is balanced), got {self.imbalance:g}")
        check_backbone(self.backbone)
        if not (isinstance(self.seed, int) and self.seed >= 0):
            raise MislasError(f"seed must be an integer >= 0, got {self.seed!r}")
        if self.precision not in PRECISIONS:
            unknown("precision", self.precision, PRECISIONS)
        for name, stage in (("stage1", self.stage1), ("stage2", self.stage2)):
            if stage is not None:
                _check_stage(name, stage)

    def canonical(self) -> dict[str, Any]:
        """What decides the numbers, as plain JSON types; fields that are off (None) are left out."""
        full = dataclasses.asdict(self)
        full.pop("method")
        return _without_none(full)

    @property
    def id(self) -> str:
        """Identity: 12 hex digits of the SHA-256 of the canonical JSON."""
        text = json.dumps(self.canonical(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def stage1_only(self) -> RunConfig:
        """The Stage-1 run that this one builds on: a run of its own, shared by every Stage-2."""
        method = "mixup" if self.stage1.mixup else self.stage1.loss
        return replace(self, stage2=None, method=method) if self.stage2 else self

    @property
    def shared_pass(self) -> str:
        """Equal for runs whose Stage-2 sees the same features: they train together on one backbone pass."""
        if self.stage2 is None:
            return self.id
        keys = ("epochs", "batch_size", "sampler", "shift_bn", "mixup")
        return f"{self.stage1_only.id}:" + ",".join(str(getattr(self.stage2, key)) for key in keys)

    def to_json(self) -> dict[str, Any]:
        return {"method": self.method, **self.canonical()}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> RunConfig:
        stored = dict(stored)
        stored["stage1"] = Stage1(**stored["stage1"])
        if stored.get("stage2") is not None:
            stored["stage2"] = Stage2(**stored["stage2"])
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
                top[where] = replace(stage, **_meaningful(stage, new))
        return replace(self, **top) if top else self


_TOP = tuple(f.name for f in fields(RunConfig) if f.name not in ("stage1", "stage2", "method"))
_STAGE = {"stage1": {f.name: f for f in fields(Stage1)}, "stage2": {f.name: f for f in fields(Stage2)}}


def field_names() -> list[str]:
    """Every field that an override may name."""
    return [*_TOP, *(f"{stage}.{name}" for stage, known in _STAGE.items() for name in known)]


def locate(key: str) -> tuple[str | None, str]:
    """Which part of a configuration a key names: (None, field) or (stage, field)."""
    if key in _TOP:
        return None, key
    stage, _, field = key.rpartition(".")
    for where in (stage,) if stage else ("stage1", "stage2"):
        if field in _STAGE.get(where, ()):
            return where, field
    unknown("field", key, field_names())


def check_type(key: str, value: Any, where: str | None, field: str) -> Any:
    """Return ``value`` as the field's type, or say what the field takes."""
    owner = {None: RunConfig, "stage1": Stage1, "stage2": Stage2}[where]
    annotation = str({f.name: f.type for f in fields(owner)}[field])
    if value is None and "None" in annotation:
        return None
    kind = annotation.split(" | ")[0]
    if kind == "float" and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind == "int" and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind == "bool" and isinstance(value, bool):
        return value
    if kind == "str" and isinstance(value, str):
        return value
    raise MislasError(f"{key} takes {annotation.replace(' | ', ' or ')}, got {value!r}")


def _meaningful(stage: Stage1 | Stage2, new: dict[str, Any]) -> dict[str, Any]:
    after = {**dataclasses.asdict(stage), **new}
    idle = set()
    if after["loss"] != "las":
        idle |= {"eps_1", "eps_k", "form", "power", "smoothing_over"}
    if after.get("delta") is None:
        idle.add("delta_lr")
    return {key: value for key, value in new.items() if key not in idle}


def _check_stage(name: str, stage: Stage1 | Stage2) -> None:
    positive = ("epochs", "batch_size", "lr")
    for key in positive:
        if not getattr(stage, key) > 0:
            raise MislasError(f"{name}.{key} must be > 0, got {getattr(stage, key)!r}")
    for key in ("momentum", "weight_decay"):
        if not getattr(stage, key) >= 0:
            raise MislasError(f"{name}.{key} must be >= 0, got {getattr(stage, key)!r}")
    if stage.mixup is not None and not stage.mixup > 0:
        raise MislasError(f"{name}.mixup is alpha > 0, or null for no mixup, got {stage.mixup!r}")
    if stage.schedule not in SCHEDULES:
        unknown(f"{name}.schedule", stage.schedule, SCHEDULES)
    if stage.sampler not in SAMPLERS:
        unknown(f"{name}.sampler", stage.sampler, SAMPLERS)
    if isinstance(stage, Stage1):
        return
    if stage.a not in (0, 1):
        raise MislasError(f"{name}.a is 0 or 1, got {stage.a!r}")
    if stage.delta is not None and stage.delta not in DELTAS:
        unknown(f"{name}.delta", stage.delta, DELTAS)
    if stage.delta is None and not (stage.a and stage.learn_scale):
        raise MislasError("stage2 learns nothing, or from nothing: set delta, or a=1 and learn_scale=true")
    if (stage.delta is None) != (stage.delta_lr is None) or (stage.delta_lr is not None and stage.delta_lr <= 0):
        raise MislasError(f"{name}.delta_lr > 0 goes with delta and only with it, got {stage.delta_lr!r}")
    if stage.loss == "las":
        if None in (stage.eps_1, stage.eps_k, stage.form, stage.smoothing_over):
            raise MislasError("loss 'las' needs eps_1, eps_k, form and smoothing_over")
        check_smoothing(stage.eps_1, stage.eps_k, stage.form, stage.power)
        if stage.smoothing_over not in SMOOTHING:
            unknown(f"{name}.smoothing_over", stage.smoothing_over, SMOOTHING)
    elif stage.eps_1 is not None or stage.eps_k is not None:
        raise MislasError(f"eps_1 and eps_k belong to loss 'las'; {name}.loss is {stage.loss!r}")


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return value
