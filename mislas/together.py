"""Many small networks at once: Stage-1 runs that train side by side in one process.

A ResNet-32 on batches of 128 small images leaves a large GPU idle most of the time. N of them are one network N times
as wide, in which convolutions have N groups of channels; batch norm is per channel anyway. So one pass computes the
features of all, and one pass back gives each its own gradients. Weights are put side by side in every step, and each
run keeps its own network, optimiser, schedule and checkpoint: it trains as it would alone, up to rounding. It may end
before the others, and it can be resumed alone.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.func import functional_call

from .batches import own_randomness
from .config import RunConfig
from .data import LISTS, spec_of
from .errors import MislasError
from .models import CIFAR_RESNETS, CifarResNet, Float32Products, use_float32_products
from .train import Forward, Options, OutOfTime, Run, Trained, autocast


def kind(config: RunConfig) -> tuple | None:
    """Equal for runs that can train together; None for one that trains alone.

    Together train Stage-1 runs of one CIFAR ResNet, with one branch and without experts, on images of one size that are
    held in memory, in equal batches, at one precision. Imbalance factor, seed, mixup, loss and schedule are each run's.
    """
    stage = config.stage1
    if config.stage2 is not None or config.backbone not in CIFAR_RESNETS or config.dataset in LISTS:
        return None
    if stage.second_sampler is not None or stage.distillation is not None:
        return None
    return config.backbone, config.precision, spec_of(config.dataset).size, stage.batch_size


def check_together(options: Options, processes: int) -> None:
    """Raise :class:`MislasError` if runs are to train side by side in one process and one run in several."""
    if options.together > 1 and processes > 1:
        raise MislasError(
            f"{processes} processes train one run at a time, not {options.together} together: leave out one of the two"
        )


def side_by_side(groups: Sequence[list[RunConfig]], together: int) -> list[list[list[RunConfig]]]:
    """What trains at once, in order: each group of runs, with up to ``together - 1`` later Stage-1 runs of its kind."""
    rest, ordered = list(groups), []
    while rest:
        first, *rest = rest
        which = kind(first[0])
        beside = [group for group in rest if which is not None and kind(group[0]) == which][: together - 1]
        rest = [group for group in rest if group not in beside]
        ordered.append([first, *beside])
    return ordered


def train_together(runs: Sequence[Run], options: Options) -> Iterator[tuple[int, Trained]]:
    """Train runs (see :func:`mislas.train.stage1_run`) in step with each other, on the device of their options.

    Yields:
        As each ends, its place in ``runs`` and what it left.

    Raises:
        OutOfTime: runs were stopped by their deadline; it is raised once all have stopped or ended.
    """
    live, stopped = dict(enumerate(runs)), None
    with own_randomness(options.torch_device()):
        while live:
            asked = []
            for which, run in list(live.items()):
                try:
                    asked.append(next(run))
                except StopIteration as end:
                    del live[which]
                    yield which, end.value
                except OutOfTime as error:
                    del live[which]
                    stopped = error
            compute([one for one in asked if isinstance(one, Forward)])
            losses = [one for one in asked if isinstance(one, Tensor)]
            if losses:
                torch.autograd.backward(losses)  # runs share no parameter: each gets its own gradient alone
    if stopped is not None:
        raise stopped


def compute(asked: Sequence[Forward]) -> None:
    """Answer what runs ask for: on one pass for equal networks and batches of equal shape (all but the last ones of
    epochs), else one after another."""
    equal: dict[tuple, list[Forward]] = {}
    for one in asked:
        equal.setdefault((one.config.backbone, one.config.precision, one.batch.images.shape), []).append(one)
    for group in equal.values():
        first = group[0]
        if len(group) == 1 or not isinstance(first.network, CifarResNet):
            for one in group:
                one.compute()
            continue
        images = [one.batch.images for one in group]
        with autocast(first.config, images[0].device):
            features = joint_features([one.network for one in group], images)
        for one, own in zip(group, features, strict=True):
            one.features = own.float()


def joint_features(networks: Sequence[CifarResNet], images: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Features of several networks in training, each on its own images, on one pass. Gradients reach each network's own
    parameters, and its running statistics move as if it were alone.

    Args:
        networks: N of one depth.
        images: for each of them float32 ``(B, 3, H, W)``.

    Returns:
        For each of them ``(B, 64)``.
    """
    n, blocks = len(networks), len(networks[0].blocks)
    weights = [dict(network.named_parameters()) for network in networks]
    wide = {name: torch.cat([own[name] for own in weights]) for name in weights[0]}
    buffers = [dict(network.named_buffers()) for network in networks]
    moving = {name: torch.stack([own[name] for own in buffers]) for name in buffers[0]}
    wide |= {name: value.flatten(0, 1) if value.ndim > 1 else value for name, value in moving.items()}
    network = _wide_network(2 * blocks + 2, n, isinstance(networks[0].conv, Float32Products))
    features = functional_call(network, wide, torch.cat(images, dim=1))
    for ndim in (1, 2):  # how many batches were seen; means and variances
        names = [name for name in moving if moving[name].ndim == ndim]
        own = [statistics[name] for name in names for statistics in buffers]
        torch._foreach_copy_(own, [value for name in names for value in moving[name].unbind()])
    return features.chunk(n, dim=1)


@functools.cache
def _wide_network(depth: int, networks: int, float32_products: bool) -> CifarResNet:
    """The wide network, without weights of its own."""
    with torch.device("meta"):
        network = CifarResNet(depth, networks)
    return use_float32_products(network) if float32_products else network
