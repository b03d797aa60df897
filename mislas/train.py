"""The two stages, in one loop.

Stage-1 trains the backbone with one linear classifier. Stage-2 freezes the backbone and trains any number of
classifiers on one pass through it: features and batch statistics do not depend on the classifier, so each is trained
exactly as it would be alone.
"""

from __future__ import annotations

import copy
import io
import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import distributed
from .batches import Batch, batches_of, own_randomness, seed_modules, seeded, torch_rng, training_part
from .config import SCHEDULES, RunConfig, Stage1, Stage2
from .data import LongTailed, write_atomically
from .errors import Diverged, MislasError, RecordError
from .experts import Experts, of_group
from .losses import effective_number_weights, mean
from .methods import loss_for
from .metric import metric_for
from .models import (
    CLASSIFIERS,
    RESNETS,
    GeneralisedClassifier,
    batch_norms,
    check_batch_norm,
    freeze_but_last_block,
    init_kaiming,
    load_backbone_weights,
    mix_branches,
    native_bfloat16,
    stage1_model,
    use_float32_products,
)


class OutOfTime(Exception):
    """The deadline is near, or here. The same run goes on from its last checkpoint."""


@dataclass
class Options:
    """How to train, as opposed to what: nothing here decides a number (up to the rounding of the device).

    Attributes:
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``; None takes a GPU if there is one. Of several processes on a machine
            each takes its own.
        compile: fuse the backbone with ``torch.compile`` (needs a C++ compiler; pays on long runs).
        eval_every: epochs between evaluations on the test set along the way; the last epoch is always evaluated.
        checkpoint_every: seconds between checkpoints; several processes write one every epoch.
        progress: whether to show a progress bar.
        workers: processes that decode image files; 0 decodes in this one, None takes one per processor.
        deadline: a time of ``time.monotonic()`` by which training stops with :class:`OutOfTime`: checkpointed before an
            epoch that would end after it; or at it, without what the epoch under way has done (several processes that
            train together end that epoch).
        together: how many Stage-1 runs of small networks train at once (:mod:`mislas.together`), at least 1.

    Raises:
        MislasError: ``eval_every`` or ``together`` below 1, ``workers`` below 0; or ``together`` above 1 with
            ``compile``: what they compute on one pass is not compiled.
    """

    device: str | None = None
    compile: bool = False
    eval_every: int = 10
    checkpoint_every: float = 30.0
    progress: bool = True
    workers: int | None = None
    deadline: float | None = None
    together: int = 1

    def __post_init__(self):
        if self.eval_every < 1:
            raise MislasError(f"eval_every, the epochs between evaluations, is 1 or more, got {self.eval_every!r}")
        if self.workers is not None and self.workers < 0:
            raise MislasError(f"workers, the processes that decode images, are 0 or more, got {self.workers!r}")
        if not (type(self.together) is int and self.together >= 1):
            raise MislasError(f"together, the Stage-1 runs that train at once, is 1 or more, got {self.together!r}")
        if self.together > 1 and self.compile:
            raise MislasError("runs that train together are not compiled: leave out compile, or together")

    def torch_device(self) -> torch.device:
        """The device, or :class:`MislasError` if this machine does not have it. On a GPU convolutions of float32 are
        then computed in float32; PyTorch's default rounds their inputs (TF32)."""
        try:
            device = torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
            if device.type == "cuda" and device.index is None and distributed.world() > 1:
                device = torch.device("cuda", distributed.local_rank())
            torch.empty(1, device=device)
            if device.type == "cuda":
                torch.backends.cudnn.allow_tf32 = False
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise MislasError(
                f"device {self.device!r} cannot be used here ({reason}); try 'cpu', or name none"
            ) from error
        if device.type not in ("cpu", "cuda"):  # others lack float64, or autocast
            raise MislasError(f"device {self.device!r} is not supported; use 'cpu', 'cuda' or None")
        return device


@dataclass
class Trained:
    """What training leaves: the backbone, one classifier per run, the history of each run, the seconds it took, and
    how many runs trained at once in them."""

    backbone: nn.Module
    heads: list[nn.Module]
    histories: list[list[dict[str, float]]]
    seconds: float
    together: int = 1


def learning_rate_factor(stage: Stage1 | Stage2, epoch: int) -> float:
    """The factor on the learning rate in an epoch (from 0)."""
    warmup = getattr(stage, "warmup", 0)
    if epoch < warmup:
        return (epoch + 1) / warmup
    done, steps = epoch / stage.epochs, SCHEDULES[stage.schedule]
    if steps is None:
        return 0.5 * (1 + math.cos(math.pi * done))
    milestones, factor = steps
    return factor ** sum(done >= milestone for milestone in milestones)


class Objective:
    """The loss of a stage on a batch: by class weights if the stage has them, mixed as the labels are."""

    def __init__(self, stage: Stage1 | Stage2, class_counts: Sequence[int], device: torch.device):
        beta, self.stage = getattr(stage, "beta", None), stage
        with device:  # what losses keep lies there: nothing is copied in a step
            self.loss = loss_for(stage, class_counts)
            self.class_weights = None if beta is None else effective_number_weights(class_counts, beta)
            tried = self.loss(torch.zeros(2, len(class_counts)), torch.zeros(2, dtype=torch.long))
        if tried.shape != (2,):
            raise MislasError(
                f"loss {stage.loss!r} must give the loss of every image, shape (2,) for two, and no mean of them; it "
                f"gave shape {tuple(tried.shape)}"
            )
        if tried.requires_grad:
            raise MislasError(f"loss {stage.loss!r} has parameters that learn; only network and classifier are trained")

    def __call__(self, logits: Tensor, batch: Batch, epoch: int) -> Tensor:
        weights = None if self.class_weights is None or self.stage.deferred(epoch) else self.class_weights
        value = self.loss(logits, batch.targets)
        if batch.partner_targets is None:
            return mean(value, None if weights is None else weights[batch.targets])
        value = torch.cat([value, self.loss(logits, batch.partner_targets)])
        own = batch.weight
        if isinstance(own, float):
            own = torch.full(batch.targets.shape, own, device=value.device)
        share = torch.cat([own, 1 - own])
        if weights is not None:
            share = share * weights[torch.cat([batch.targets, batch.partner_targets])]
        return mean(value, share)


# --------------------------------------------------------------------------------------------------------- training


@dataclass
class Forward:
    """What a run asks for before a step: the features of a batch, which may be computed beside those of other runs.

    Attributes:
        config: the run's.
        network: its backbone.
        batch: the images.
        features_of: computes their features, float32 ``(B, M)``.
        features: the answer.
    """

    config: RunConfig
    network: nn.Module
    batch: Batch
    features_of: Callable[[Batch], Tensor]
    features: Tensor | None = None

    def compute(self) -> None:
        """Answer, for this run alone."""
        self.features = self.features_of(self.batch)


#: Training that waits, at each yield, for what it needs computed: features, then the gradient of its loss.
Run = Generator[Forward | Tensor, None, Trained]


def alone(run: Run, options: Options) -> Trained:
    """Train one run to its end. (:func:`mislas.together.train_together` is for several.)"""
    with own_randomness(options.torch_device()):
        while True:
            try:
                asked = next(run)
            except StopIteration as end:
                return end.value
            if isinstance(asked, Forward):
                asked.compute()
            else:
                asked.backward()


def train_stage1(
    config: RunConfig,
    data: LongTailed,
    options: Options,
    checkpoint: Path | None = None,
    evaluate: Callable | None = None,
    weights: Path | None = None,
    experts: Sequence[tuple[nn.Module, nn.Module]] = (),
) -> Trained:
    """Train backbone and classifier; resumes from ``checkpoint`` if it is there.

    With ``weights``, a file that has the checksum of the configuration, the backbone starts from them and only its last
    block trains, beside the classifier.

    The final weights are rounded to half precision, as they are stored: the model that is evaluated and built upon is
    the one in the file.

    Args:
        evaluate: ``(network, heads)`` to a dict of measures per head, for the history, every ``eval_every`` epochs.
        experts: with distillation, the trained models of :attr:`RunConfig.experts`, in order.

    Raises:
        OutOfTime: the options' deadline is near; a checkpoint is there, if it has a place.
        Diverged: the loss, weights or statistics are not finite.
        RecordError: the checkpoint, or the file of weights, is damaged or of something else.
        MislasError: what of the configuration this device, data or number of processes does not allow.
    """
    return alone(stage1_run(config, data, options, checkpoint, evaluate, weights, experts), options)


def stage1_run(
    config: RunConfig,
    data: LongTailed,
    options: Options,
    checkpoint: Path | None = None,
    evaluate: Callable | None = None,
    weights: Path | None = None,
    experts: Sequence[tuple[nn.Module, nn.Module]] = (),
    together: int = 1,
) -> Run:
    """What :func:`train_stage1` does, for whoever computes what it asks for; ``together`` is how many train at once."""
    stage, device = config.stage1, options.torch_device()
    whole, held = data, None
    if stage.holdout is not None:
        data, held = data.hold_out(stage.holdout)
    if stage.group is not None:
        data = of_group(data, whole.groups, stage.group)
    generator = torch_rng(config.seed, "init")
    with seeded(generator):
        network, head = stage1_model(
            config.backbone, data.num_classes, scale=stage.scale, two_branches=stage.second_sampler is not None
        )
    if config.backbone in RESNETS:  # one of your own starts as you made it
        init_kaiming(network, generator)
    init_kaiming(head, generator)
    if stage.weights is not None:
        load_backbone_weights(network, weights)
        freeze_but_last_block(network)
    network.to(device, memory_format=torch.channels_last)
    head.to(device)
    learned = [p for p in (*network.parameters(), *head.parameters()) if p.requires_grad]
    groups = [{"params": learned, "lr": stage.lr}]
    batches = batches_of(data, stage, "stage1", config.seed, options)
    objective, features_of = Objective(stage, data.class_counts, device), forward(network, config, options)
    metric = None if stage.metric is None else metric_for(stage.metric, network.num_features, device)

    def one_branch(epoch: int) -> Iterator[Forward | list[Tensor]]:
        for batch in batches.epoch(epoch):
            asked = Forward(config, network, batch, features_of)
            yield asked
            loss = objective(head(asked.features), batch, epoch)
            if metric is not None:
                loss = loss + stage.metric_weight * metric(asked.features, batch.targets)
            yield [loss]

    def taught(epoch: int) -> Iterator[list[Tensor]]:
        expert_weights = teachers.expert_weights(network, head)
        image_weights = teachers.image_weights(epoch / stage.epochs)
        for batch in batches.epoch(epoch):
            logits = head(features_of(batch))
            own = (image_weights[batch.index] * objective.loss(logits, batch.targets)).mean()
            yield [own + teachers.teach(logits, batch, expert_weights)]

    def two_branches(epoch: int) -> Iterator[list[Tensor]]:
        alpha = 1 - (epoch / stage.epochs) ** 2  # parabolic decay (Zhou et al., 2020)
        for pair in zip(batches.epoch(epoch), batches.epoch(epoch, stage.second_sampler), strict=True):
            features = [features_of(batch, which) for which, batch in enumerate(pair)]
            logits = head(mix_branches(*features, alpha))
            conventional, rebalancing = (objective(logits, batch, epoch) for batch in pair)
            yield [alpha * conventional + (1 - alpha) * rebalancing]

    steps = two_branches if stage.second_sampler else one_branch
    if stage.distillation is not None:
        teachers = Experts(experts, whole.groups, data, whole.only(held), config, options)
        steps = taught
    trained = yield from _loop(
        [config], "stage1", network, [head], [groups], steps,
        data, options, checkpoint, evaluate, mode=nn.Module.train, together=together,
    )  # fmt: skip
    for module in (network, head):
        round_to_half(module)
    return trained


def train_stage2(
    configs: Sequence[RunConfig],
    stage1: tuple[nn.Module, nn.Linear],
    data: LongTailed,
    options: Options,
    checkpoint: Path | None = None,
    evaluate: Callable | None = None,
) -> Trained:
    """Train the classifiers of several runs on one pass through their common frozen backbone.

    Args:
        configs: runs with equal :attr:`RunConfig.shared_pass`.
        stage1: the trained backbone and its linear classifier. The backbone is frozen in place: none of its weights
            requires gradients any more; and its batch norm is changed if the runs shift it. Nothing else is.

    Raises:
        MislasError: runs that do not see the same features, one that diverged, or a shift without batch norm.
        OutOfTime: the deadline of the options is near.
    """
    if len({config.shared_pass for config in configs}) != 1:
        raise MislasError("runs trained on one pass must share Stage-1, epochs, batch size, sampler, mixup and BN mode")
    first, device = configs[0], options.torch_device()
    data = training_part(first, data)
    network, classifier = stage1
    network.to(device, memory_format=torch.channels_last).requires_grad_(False)
    heads, groups, objectives = [], [], []
    for config in configs:
        generator = torch_rng(config.stage2_seed, "stage2 head")
        head, group = stage2_classifier(config.stage2, classifier, data.class_counts, generator)
        heads.append(head.to(device))
        groups.append(group)
        objectives.append(Objective(config.stage2, data.class_counts, device))
    batches = batches_of(data, first.stage2, "stage2", first.stage2_seed, options)
    features_of = forward(network, first, options)
    if first.stage2.shift_bn:
        check_batch_norm(network)
    started = time.monotonic()
    if first.stage2.shift_epochs and not (checkpoint and checkpoint.exists()):  # which has what they were moved to
        shift_statistics(configs, network, features_of, data, options)
    shifting = time.monotonic() - started

    cumulative = first.stage2.shift_bn and first.stage2.shift_average is not None
    steps = math.ceil(len(data.train_targets) / first.stage2.batch_size)

    def on_frozen_features(epoch: int) -> Iterator[list[Tensor]]:
        average = CumulativeStatistics(network, epoch * steps) if cumulative else None
        seed = torch_rng(first.stage2_seed, "stage2 heads", epoch).initial_seed()
        for step, batch in enumerate(batches.epoch(epoch)):
            with torch.no_grad():
                features = features_of(batch)
                if average is not None:
                    average.update()
            losses = []
            for head, objective in zip(heads, objectives, strict=True):
                seed_modules(device, seed + step)  # each draws what it would alone
                losses.append(objective(head(features), batch, epoch))
            yield losses

    return alone(_loop(
        list(configs), "stage2", network, heads, groups, on_frozen_features,
        data, options, checkpoint, evaluate,
        mode=train_batch_norm if first.stage2.shift_bn else nn.Module.eval, seconds=shifting,
    ), options)  # fmt: skip


def stage2_classifier(
    stage: Stage2, stage1: nn.Linear, class_counts: Sequence[int], generator: torch.Generator
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """The classifier that Stage-2 trains, as it starts, and its optimiser's parameter groups.

    Args:
        stage1: Stage-1's classifier; never changed.
        class_counts: images of each class that Stage-2 trains on, ``(K,)``.
        generator: of what is drawn for it.

    Raises:
        MislasError: one of :data:`mislas.models.CLASSIFIERS` that is no module, whose logits are not ``(B, K)``, or
            that learns nothing.
    """
    if stage.classifier is None:
        with seeded(generator):
            head = GeneralisedClassifier(
                stage1, a=stage.a, learn_scale=stage.learn_scale, delta=stage.delta, generator=generator
            )
        return head, head.parameter_groups(stage.lr, stage.delta_lr or 1.0)
    frozen = copy.deepcopy(stage1).cpu().requires_grad_(False)
    with seeded(generator):
        head = CLASSIFIERS[stage.classifier](frozen, class_counts)
    if not isinstance(head, nn.Module):
        raise MislasError(f"classifier {stage.classifier!r} must make a torch.nn.Module, got {head!r}")
    with torch.no_grad():
        shape = tuple(head.eval()(torch.zeros(2, stage1.in_features)).shape)
    if shape != (2, len(class_counts)):
        raise MislasError(
            f"classifier {stage.classifier!r} must give a logit of every class for every image, shape "
            f"(2, {len(class_counts)}) for two; it gave shape {shape}"
        )
    learned = [parameter for parameter in head.parameters() if parameter.requires_grad]
    if not learned:
        raise MislasError(f"classifier {stage.classifier!r} has no parameter that learns; what needs none is a rule")
    return head, [{"params": learned, "lr": stage.lr}]


def train_batch_norm(network: nn.Module) -> None:
    """Shifted batch norm (paper, section 3.3): running means and variances follow the batches, and nothing else of the
    network trains. Dropout, if it has any, stays off."""
    network.eval()
    for layer in batch_norms(network):
        layer.train()


class CumulativeStatistics:
    """Batch norm's running statistics as their mean over all batches so far, each of which counts alike, in place of a
    moving average (equations (5) and (6) are of one batch). :meth:`update` follows each batch.

    Args:
        network: whose batch norm trains; its momentum is set.
        batches: how many are in its running statistics already; without any, they do not count.
    """

    def __init__(self, network: nn.Module, batches: int = 0):
        layers = batch_norms(network)
        for layer in layers:
            layer.momentum = 1.0  # a batch leaves its own statistics
        self.running = [statistic for layer in layers for statistic in (layer.running_mean, layer.running_var)]
        self.mean = [statistic.clone() for statistic in self.running]
        self.batches = batches

    def update(self) -> None:
        """Take in the batch that the network has just seen."""
        self.batches += 1
        for so_far, running in zip(self.mean, self.running, strict=True):
            running.copy_(so_far.lerp_(running, 1 / self.batches))


def shift_statistics(
    configs: Sequence[RunConfig],
    network: nn.Module,
    features_of: Callable[..., Tensor],
    data: LongTailed,
    options: Options,
) -> None:
    """Move batch norm's running statistics over unmixed batches, class-balanced unless ``stage2.shift_sampler`` names
    other ones; weights stay (paper, section 3.3).

    Args:
        configs: runs with equal :attr:`RunConfig.shared_pass`, whose ``stage2`` has ``shift_epochs``.
        features_of: what sends a batch through ``network``; see :func:`forward`.

    Raises:
        MislasError: a network without batch norm.
        OutOfTime: the options' deadline is here. Nothing is checkpointed; the shift starts again.
    """
    config = configs[0]
    epochs = config.stage2.shift_epochs
    check_batch_norm(network)
    plain = config.override({"stage1.mixup": None}).stage1
    batches = batches_of(data, plain, "shift", config.stage2_seed, options)
    train_batch_norm(network)
    average = CumulativeStatistics(network) if config.stage2.shift_average is not None else None
    clock = _Clock(options, 0.0)
    with torch.no_grad(), progress_bar(configs, "shift", epochs * len(data.train_targets), options) as bar:
        for epoch in range(epochs):
            for batch in batches.epoch(epoch, config.stage2.shift_sampler or "class_balanced"):
                features_of(batch)
                if average is not None:
                    average.update()
                bar.update(len(batch.targets))
                if clock.late():
                    network.eval()
                    raise OutOfTime("stopped within the shift of batch norm, which starts again")
    network.eval()


def autocast(config: RunConfig, device: torch.device) -> torch.autocast:
    """The context in which a run's backbone computes."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")


def forward(network: nn.Module, config: RunConfig, options: Options) -> Callable[..., Tensor]:
    """What gives the features of a batch, float32 ``(B, M)``, computed at the run's precision.

    Where several processes train together each sends its piece of the images through ``network``, whose batch norm is
    changed in place to take statistics over all of them.
    """
    device = options.torch_device()
    if not native_bfloat16(device):
        use_float32_products(network)
    call = plain = distributed.replicate(network)
    if options.compile:
        # On a CPU, a loop that writes where it reads waits for its own stores.
        call = torch.compile(plain, dynamic=False, options={"inplace_buffers": device.type != "cpu"})
    whole: list[torch.Size] = []  # a batch's shape: what an epoch leaves over is not worth compiling again
    precision = autocast(config, device)

    def features_of(batch: Batch, *branch: int) -> Tensor:
        try:
            whole[:] = whole or [batch.images.shape]
            with precision:
                features = (call if batch.images.shape == whole[0] else plain)(batch.images, *branch)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise MislasError(
                f"batch norm cannot train on a batch of {len(batch.targets)} image(s) of this size: the last batch of "
                "an epoch is what batch_size leaves over; choose another batch_size"
            ) from error
        except RuntimeError as error:
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            raise MislasError(
                f"the backbone cannot be compiled ({str(error).splitlines()[0]}): leave out --compile (compile=False), "
                "or install a C++ compiler"
            ) from error
        return distributed.gather(features.float(), len(batch.targets))

    return features_of


def _loop(
    configs: list[RunConfig],
    stage_name: str,
    network: nn.Module,
    heads: list[nn.Module],
    groups: list[list[dict]],
    steps: Callable[[int], Iterator[Forward | list[Tensor]]],
    data: LongTailed,
    options: Options,
    checkpoint: Path | None,
    evaluate: Callable | None,
    mode: Callable[[nn.Module], Any],
    together: int = 1,
    seconds: float = 0.0,
) -> Run:
    """Optimise heads (and what else is in ``groups``) on the losses that ``steps(epoch)`` yields, one per head.

    Args:
        mode: brings the network into the mode in which it trains: ``nn.Module.train``, ``nn.Module.eval``, or
            :func:`train_batch_norm`.
        seconds: what the runs took so far; a checkpoint knows it already.

    Raises:
        Diverged: a run did. Its checkpoint, if it has one, is of an epoch before.
    """
    stages = [getattr(config, stage_name) for config in configs]
    stage, device = stages[0], options.torch_device()
    seed = configs[0].seed if stage_name == "stage1" else configs[0].stage2_seed
    optimizers = [
        torch.optim.SGD(group, lr=s.lr, momentum=s.momentum, weight_decay=s.weight_decay, fused=True)
        for group, s in zip(groups, stages, strict=True)
    ]
    base_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]

    def to_training() -> None:
        mode(network)
        for head in heads:
            head.train()

    to_training()

    images = len(data.train_targets)
    state = _State(network, heads, optimizers, data.checksum, [[] for _ in configs], seconds=seconds, together=together)
    if checkpoint is not None and checkpoint.exists():
        state.load(checkpoint, configs)
    learned_alone = [p for head in heads for p in head.parameters() if p.requires_grad]
    clock = _Clock(options, state.seconds)
    with progress_bar(configs, stage_name, stage.epochs * images, options, state.epoch * images) as bar:
        for epoch in range(state.epoch, stage.epochs):
            factors = [learning_rate_factor(s, epoch) for s in stages]
            for optimizer, rates, factor in zip(optimizers, base_rates, factors, strict=True):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * factor
            totals, left = torch.zeros(len(heads), device=device), images
            seed_modules(device, torch_rng(seed, f"{stage_name} modules", epoch, distributed.rank()).initial_seed())
            for losses in steps(epoch):
                if isinstance(losses, Forward):  # first the features on which the losses will be
                    yield losses
                    continue
                step = torch.stack(losses)
                yield from _descend(step, optimizers, learned_alone)
                size = min(stage.batch_size, left)
                totals += step.detach() * size
                left -= size
                bar.update(size)
                if left and clock.late():
                    network.eval()
                    raise OutOfTime(f"stopped within epoch {epoch + 1} of {stage.epochs}, which starts again")
            rows = [
                {"epoch": epoch + 1, "lr": s.lr * factor, "train_loss": round(total, 5)}
                for s, factor, total in zip(stages, factors, (totals / images).tolist(), strict=True)
            ]
            last = epoch + 1 == stage.epochs
            _check_finite(configs, stage_name, rows, network, heads if last else [])
            if evaluate is not None and not last and (epoch + 1) % options.eval_every == 0:
                for row, found in zip(rows, evaluate(network, heads), strict=True):
                    row |= found
                to_training()
            for history, row in zip(state.histories, rows, strict=True):
                history.append(row)
            bar.set_postfix(epoch=f"{epoch + 1}/{stage.epochs}", loss=f"{rows[0]['train_loss']:.3f}", refresh=False)
            state.epoch, state.seconds = epoch + 1, clock.seconds()
            over, due = clock.after_epoch(last)
            if checkpoint is not None and due and distributed.rank() == 0:
                state.save(checkpoint, configs)
            if over:
                network.eval()
                raise OutOfTime(f"stopped after epoch {epoch + 1} of {stage.epochs}")
    network.eval()
    return Trained(network, heads, state.histories, state.seconds, state.together)


def _descend(
    losses: Tensor, optimizers: Sequence[torch.optim.Optimizer], learned_alone: Sequence[Tensor]
) -> Iterator[Tensor]:
    """One step down the gradient of each head's loss. Heads share no parameter, so the sum gives each its own alone.
    ``learned_alone`` are their parameters, whose gradients several processes that train together make equal."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    yield losses.sum()  # for its gradient
    distributed.average_gradients(learned_alone)
    for optimizer in optimizers:
        optimizer.step()


class _Clock:
    """When to checkpoint and when to stop. Several processes do both after an epoch only, and checkpoint every one.

    Args:
        options: whose ``checkpoint_every`` and ``deadline`` hold.
        before: seconds that the runs took until now.
    """

    def __init__(self, options: Options, before: float):
        self.single = distributed.world() == 1
        self.every = options.checkpoint_every if self.single else 0.0
        self.deadline = math.inf if options.deadline is None else options.deadline
        self.before, self.epochs = before, 0
        self.started = self.saved = time.monotonic()

    def seconds(self) -> float:
        """What the runs took, all starts together."""
        return self.before + time.monotonic() - self.started

    def late(self) -> bool:
        """Whether to stop within an epoch."""
        return self.single and time.monotonic() > self.deadline

    def after_epoch(self, last: bool) -> tuple[bool, bool]:
        """Whether to stop here, since another epoch would end too late; and whether a checkpoint is due."""
        self.epochs += 1
        now = time.monotonic()
        per_epoch = (now - self.started) / self.epochs
        over = distributed.agree(not last and now + 1.2 * per_epoch + 2 > self.deadline)
        near = now + 3 * per_epoch + 2 > self.deadline  # an epoch may take longer than those before, and be stopped
        due = last or over or near or now - self.saved >= self.every
        if due:
            self.saved = now
        return over, due


def _check_finite(
    configs: Sequence[RunConfig],
    stage_name: str,
    rows: Sequence[dict[str, float]],
    network: nn.Module,
    heads: Sequence[nn.Module],
) -> None:
    """Stop a run that diverged before it is checkpointed, not after the hours that are left of it. After the last
    epoch no loss would tell of the weights: ``heads`` are given, and they are looked at, rounded to half precision."""

    def sound(module: nn.Module) -> bool:
        return all(parameter.half().isfinite().all() for parameter in module.parameters())

    backbone = not heads or sound(network)
    for config, row, head in zip(configs, rows, heads or [None] * len(configs), strict=True):
        if not math.isfinite(row["train_loss"]):
            what = f"mean loss in epoch {row['epoch']} is {row['train_loss']}"
        elif not backbone or (head is not None and not sound(head)):
            what = "weights are not finite"
        else:
            continue
        raise Diverged(
            f"{_describe([config], stage_name)} diverged: its {what}; try a learning rate below "
            f"{getattr(config, stage_name).lr:g}: --set {stage_name}.lr=NUMBER",
            config.id,
        )


def progress_bar(configs: Sequence[RunConfig], stage_name: str, images: int, options: Options, done: int = 0) -> tqdm:
    """A bar that counts images; shown by the main process alone, and only if the options want one."""
    shown = options.progress and distributed.rank() == 0
    return tqdm(
        total=images, initial=done, unit="img", unit_scale=True, desc=_describe(configs, stage_name), mininterval=1.0,
        leave=False, **({} if shown else {"disable": True}),  # not said otherwise, TQDM_DISABLE has its way
    )  # fmt: skip


def _describe(configs: Sequence[RunConfig], stage_name: str) -> str:
    first = configs[0]
    who = first.stage1_only.method if stage_name == "stage1" else ", ".join(config.method for config in configs)
    return f"{first.data_title} {stage_name} {who} seed {first.seed}"


@dataclass
class _State:
    """All that changes while training; a checkpoint is this, so that a resumed run equals one never stopped."""

    network: nn.Module
    heads: list[nn.Module]
    optimizers: list[torch.optim.Optimizer]
    data: str  # its checksum
    histories: list[list[dict[str, float]]]
    epoch: int = 0
    seconds: float = 0.0
    together: int = 1

    def save(self, path: Path, configs: list[RunConfig]) -> None:
        content = {
            "runs": [config.id for config in configs],
            "data": self.data,
            "epoch": self.epoch,
            "seconds": self.seconds,
            "together": self.together,
            "histories": self.histories,
            "network": self.network.state_dict(),
            "heads": [head.state_dict() for head in self.heads],
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        buffer = io.BytesIO()  # into a file, torch.save would not say that the disk is full
        torch.save(content, buffer)
        write_atomically(path, lambda handle: handle.write(buffer.getbuffer()))

    def load(self, path: Path, configs: list[RunConfig]) -> None:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            if content["runs"] != [config.id for config in configs]:
                raise RecordError(f"checkpoint {path} belongs to other runs; delete it to start these afresh")
            if content.get("data", self.data) != self.data:
                raise RecordError(
                    f"checkpoint {path} is of a training on other images (checksum {content['data']}, now "
                    f"{self.data}); bring those back, or delete it to start afresh"
                )
            self.network.load_state_dict(content["network"])
            for own, stored in zip(self.heads + self.optimizers, content["heads"] + content["optimizers"], strict=True):
                own.load_state_dict(stored)
            self.epoch, self.seconds = content["epoch"], content["seconds"]
            self.together = max(self.together, content.get("together", 1))
            self.histories = content["histories"]
        except RecordError:
            raise
        except Exception as error:
            raise RecordError(
                f"checkpoint {path} cannot be read ({type(error).__name__}); delete it to start the run afresh"
            ) from error


@torch.no_grad()
def round_to_half(module: nn.Module) -> None:
    """Round parameters (not batch norm's running statistics) to half precision, in place, keeping their dtype."""
    for parameter in module.parameters():
        parameter.copy_(parameter.half().float())
