"""Stage-2 without gradients: the rules of :mod:`mislas.rules`, applied to a trained network."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Sequence

import torch
from torch import nn

from .batches import plain_images, seeded, torch_rng
from .config import RunConfig
from .data import LongTailed
from .errors import MislasError
from .evaluate import predict
from .rules import RULES, Known, Seen
from .train import Options, Trained, forward, shift_statistics


def adjust(
    configs: Sequence[RunConfig], stage1: tuple[nn.Module, nn.Linear], data: LongTailed, options: Options
) -> Trained:
    """Apply the rules of several runs that share Stage-1 and batch norm's statistics.

    Args:
        configs: runs with equal :attr:`RunConfig.shared_pass`, whose ``stage2`` is an Adjustment.
        stage1: the trained backbone and its linear classifier. The backbone is frozen in place, and its running
            statistics are changed if the runs shift them; nothing else is.

    Returns:
        One linear classifier per run; its history has one row, with the value that was given or chosen.

    Raises:
        MislasError: a rule that makes no linear classifier of Stage-1's shape, or looks at held-out images where there
            are none; or a network without batch norm that should be shifted.
        OutOfTime: the options' deadline is here, during the shift.
    """
    started, first, device = time.monotonic(), configs[0], options.torch_device()
    network, classifier = stage1
    network.to(device, memory_format=torch.channels_last).requires_grad_(False)
    train, held = data, torch.empty(0, dtype=torch.long)
    if first.stage1.holdout is not None:
        train, held = data.hold_out(first.stage1.holdout)
    if first.stage2.shift_epochs:
        shift_statistics(configs, network, forward(network, first, options), train, options)

    def seen(part: LongTailed) -> Seen:
        images = plain_images(part, options, torch.arange(len(part.train_targets)))
        return predict(network, [nn.Identity()], images)[0], part.train_targets

    @functools.cache
    def trained() -> Seen:
        return seen(train)

    @functools.cache
    def held_out() -> Seen:
        if not len(held):
            raise MislasError(
                "a rule looks at held-out images, and there are none: set stage1.holdout (and "
                "holds_out=True in a Rule of your own, so that this is said before training)"
            )
        return seen(data.only(held))

    heads, histories = [], []
    for config in configs:
        rule, value = RULES[config.stage2.rule], config.stage2.value
        known = Known(copy.deepcopy(classifier).cpu(), train.class_counts, trained, held_out)
        with seeded(torch_rng(config.seed, "stage2 rule")):  # a rule of one's own may draw
            if rule.choose is None:
                head, row = rule.make(known), {}
            else:
                value = float(rule.choose(known)) if value is None else value
                head, row = rule.make(known, value), {"value": round(value, 6)}
        if not isinstance(head, nn.Linear) or head.weight.shape != classifier.weight.shape:
            raise MislasError(
                f"rule {config.stage2.rule!r} must make a linear classifier of {tuple(classifier.weight.shape)} "
                f"weights, got {head}"
            )
        heads.append(head.to(device))
        histories.append([{"epoch": 0} | row])
    return Trained(network, heads, histories, time.monotonic() - started)
