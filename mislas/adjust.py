"""Stage-2 without gradients: rules that turn Stage-1's linear classifier into another linear classifier.

What a rule leaves open, tau or a temperature, is chosen on training images that Stage-1 held out, never on the test
set. Held-out images are long-tailed as the training set is, so each class counts alike, whatever its size.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import RunConfig
from .data import LongTailed
from .errors import MislasError
from .evaluate import predict
from .losses import check_counts, class_balanced_mean
from .train import Options, Trained, forward, plain_images, shift_statistics

TAUS = [tau / 10 for tau in range(21)]  # tried for tau-normalisation and logit adjustment: 0, 0.1, ..., 2


def tau_normalised(classifier: nn.Linear, tau: float) -> nn.Linear:
    """``z_k = (w_k x + b_k) / |w_k|^tau`` (Kang et al., 2020, where there is no bias). Tau 0 changes nothing."""
    factor = classifier.weight.norm(dim=1) ** -tau
    return _linear(classifier.weight * factor[:, None], classifier.bias * factor)


def nearest_class_mean(features: Tensor, targets: Tensor, num_classes: int) -> nn.Linear:
    """``z_k = m_k x - |m_k|^2 / 2``, largest for the class whose mean feature m_k is nearest (Kang et al., 2020).

    Features are taken as they are, where Kang et al. normalise them. Up to a term that all classes share it is
    ``-|x - m_k|^2 / 2``: probabilities are those of classes that are Gaussian with unit covariance.

    Args:
        features: of the training images, ``(N, M)``.
        targets: ``(N,)``; every class has at least one.
    """
    sums = torch.zeros(num_classes, features.shape[1]).index_add_(0, targets, features)
    means = sums / torch.bincount(targets, minlength=num_classes)[:, None]
    return _linear(means, -means.square().sum(dim=1) / 2)


def logit_adjusted(classifier: nn.Linear, class_counts: Sequence[int], tau: float) -> nn.Linear:
    """``z_k - tau log pi_k``, pi the training frequencies (Menon et al., 2021, equation 9). Tau 0 changes nothing."""
    counts = check_counts(class_counts)
    return _linear(classifier.weight, classifier.bias - tau * (counts / counts.sum()).log().float())


def temperature_scaled(classifier: nn.Linear, temperature: float) -> nn.Linear:
    """``z / T`` (Guo et al., 2017, equation 9): the prediction stays, its confidence changes. T 1 changes nothing.

    Raises:
        MislasError: a temperature that is not above 0.
    """
    if not temperature > 0:
        raise MislasError(f"a temperature must be > 0, got {temperature}")
    return _linear(classifier.weight / temperature, classifier.bias / temperature)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.load_state_dict({"weight": weight.detach(), "bias": bias.detach()})
    return layer


@torch.no_grad()
def best_tau(adjusted: Callable[[float], nn.Linear], features: Tensor, targets: Tensor) -> float:
    """The tau of :data:`TAUS` whose classifier is right most often, classes counting alike; the least of equals."""

    def accuracy(tau: float) -> float:
        right = adjusted(tau)(features).argmax(dim=1) == targets
        return class_balanced_mean(right.double(), targets).item()

    return max(TAUS, key=accuracy)


def best_temperature(logits: Tensor, targets: Tensor) -> float:
    """The temperature > 0 with the least negative log-likelihood, classes counting alike (Guo et al., 2017)."""
    inverse = torch.ones((), dtype=torch.float64, requires_grad=True)  # the loss is convex in 1 / T
    optimizer = torch.optim.LBFGS([inverse], max_iter=100, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = class_balanced_mean(F.cross_entropy(inverse * logits.double(), targets, reduction="none"), targets)
        loss.backward()
        return loss

    optimizer.step(closure)
    return 1 / inverse.clamp(1e-3, 1e3).item()


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
    """
    started, first, device = time.monotonic(), configs[0], options.torch_device()
    network, classifier = stage1
    network.to(device, memory_format=torch.channels_last).requires_grad_(False)
    train, held = data, None
    if first.stage1.holdout is not None:
        train, held = data.hold_out(first.stage1.holdout)
    if first.stage2.shift_epochs:
        shift_statistics(configs, network, forward(network, first, options), train, options)

    def features_of(which: Tensor) -> Tensor:
        return predict(network, [nn.Identity()], plain_images(data, options, which))[0]

    kept = torch.ones(len(data.train_targets), dtype=torch.bool)
    if held is not None:
        held_features, held_targets = features_of(held), data.train_targets[held]
        kept[held] = False
    adjusted = {
        "tau_norm": functools.partial(tau_normalised, classifier),
        "logit_adjustment": functools.partial(logit_adjusted, classifier, train.class_counts),
        "temperature": functools.partial(temperature_scaled, classifier),
    }
    heads, histories = [], []
    for config in configs:
        rule, value = config.stage2.rule, config.stage2.value
        if rule == "ncm":
            head = nearest_class_mean(features_of(kept.nonzero()[:, 0]), train.train_targets, data.num_classes)
        else:
            if value is None and rule == "temperature":
                value = best_temperature(classifier(held_features).detach(), held_targets)
            elif value is None:
                value = best_tau(adjusted[rule], held_features, held_targets)
            head = adjusted[rule](value)
        heads.append(head.to(device))
        histories.append([{"epoch": 0} | ({} if value is None else {"value": round(value, 6)})])
    return Trained(network, heads, histories, time.monotonic() - started)
