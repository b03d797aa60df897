"""Rules in place of Stage-2: what turns Stage-1's linear classifier into another linear classifier, without gradients
through a network. :func:`mislas.adjust.adjust` applies them.

What a rule leaves open, from a temperature to a scale for each class, is fitted to training images that Stage-1 held
out, never to the test set. Held-out images are long-tailed as the training set is, so each class counts alike, whatever
its size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import MislasError
from .losses import check_counts, class_balanced_mean
from .models import bias_of

TAUS = [tau / 10 for tau in range(21)]  # tried for tau-normalisation (as Kang et al.) and logit adjustment: 0, ..., 2


def tau_normalised(classifier: nn.Linear, tau: float) -> nn.Linear:
    """``z_k = (w_k x + b_k) / |w_k|^tau`` (Kang et al., 2020, who leave the bias out). Tau 0 changes nothing."""
    factor = classifier.weight.norm(dim=1) ** -tau
    return _linear(classifier.weight * factor[:, None], bias_of(classifier) * factor)


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
    return _linear(classifier.weight, bias_of(classifier) - tau * (counts / counts.sum()).log().float())


def temperature_scaled(classifier: nn.Linear, temperature: float) -> nn.Linear:
    """``z / T`` (Guo et al., 2017, equation 9): the prediction stays, its confidence changes. T 1 changes nothing.

    Raises:
        MislasError: a temperature that is not above 0.
    """
    if not temperature > 0:
        raise MislasError(f"a temperature must be > 0, got {temperature}")
    return _linear(classifier.weight / temperature, bias_of(classifier) / temperature)


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
    _most_likely([inverse], lambda: inverse * logits.double(), targets)
    return 1 / inverse.clamp(1e-3, 1e3).item()


def vector_scaled(classifier: nn.Linear, features: Tensor, targets: Tensor, shift: bool = True) -> nn.Linear:
    """``a_k z_k + c_k`` with the least negative log-likelihood, classes counting alike (vector scaling, Guo et al.,
    2017, section 4.2). Unlike a temperature it may change predictions. If it can be right about all images there is no
    likeliest one: the search ends where every probability is about 1.

    Args:
        features: of held-out images, ``(N, M)``.
        targets: ``(N,)``; every class has at least one.
        shift: whether there is a c; without it, this is the classifier of LWS (Kang et al., 2020).
    """
    with torch.no_grad():
        logits = classifier(features).double()
    scale = torch.ones(logits.shape[1], dtype=torch.float64, requires_grad=True)  # the loss is convex in both
    offset = torch.zeros(logits.shape[1], dtype=torch.float64, requires_grad=shift)
    _most_likely([scale, offset] if shift else [scale], lambda: scale * logits + offset, targets)
    a, c = scale.detach().float(), offset.detach().float()
    return _linear(a[:, None] * classifier.weight, a * bias_of(classifier) + c)


def _most_likely(parameters: list[Tensor], logits: Callable[[], Tensor], targets: Tensor) -> None:
    """Minimise, in place, the negative log-likelihood of logits that depend on parameters, classes counting alike."""
    optimizer = torch.optim.LBFGS(parameters, max_iter=200, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = class_balanced_mean(F.cross_entropy(logits(), targets, reduction="none"), targets)
        loss.backward()
        return loss

    optimizer.step(closure)


# --------------------------------------------------------------------------------------------------------- the rules

Seen = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Known:
    """What a rule may use; tensors are on the CPU.

    Attributes:
        classifier: Stage-1's, a copy for this rule alone.
        class_counts: images of each class that it was trained on, ``(K,)``.
        trained: gives features ``(N, M)`` and targets ``(N,)`` of these images, without augmentation.
        held_out: gives the same of the images that it was not trained on; :class:`MislasError` if there are none.
    """

    classifier: nn.Linear
    class_counts: Sequence[int]
    trained: Callable[[], Seen]
    held_out: Callable[[], Seen]


@dataclass(frozen=True)
class Rule:
    """How a rule makes its classifier.

    Attributes:
        make: ``make(known)``, or, of a rule with a value, ``make(known, value)``, is the new classifier.
        choose: of a rule with a value: ``choose(known)`` is the one that does best on images held out.
        least: the smallest value.
        holds_out: whether ``make`` itself looks at images held out.
    """

    make: Callable[..., nn.Linear]
    choose: Callable[[Known], float] | None = None
    least: float = 0.0
    holds_out: bool = False


def _with_tau(adjusted: Callable[[Known, float], nn.Linear]) -> Rule:
    return Rule(adjusted, lambda known: best_tau(functools.partial(adjusted, known), *known.held_out()))


def _with_temperature(classifier: Callable[[Known], nn.Linear]) -> Rule:
    def choose(known: Known) -> float:
        features, targets = known.held_out()
        return best_temperature(classifier(known)(features).detach(), targets)

    return Rule(lambda known, temperature: temperature_scaled(classifier(known), temperature), choose, least=1e-3)


#: One of your own is one more entry.
#:
#: :meta hide-value:
RULES: dict[str, Rule] = {
    "tau_norm": _with_tau(lambda known, tau: tau_normalised(known.classifier, tau)),
    "ncm": Rule(lambda known: nearest_class_mean(*known.trained(), len(known.class_counts))),
    "logit_adjustment": _with_tau(lambda known, tau: logit_adjusted(known.classifier, known.class_counts, tau)),
    "temperature": _with_temperature(lambda known: known.classifier),
    "adjusted_temperature": _with_temperature(lambda known: logit_adjusted(known.classifier, known.class_counts, 1.0)),
    "vector_scaling": Rule(lambda known: vector_scaled(known.classifier, *known.held_out()), holds_out=True),
    "class_scales": Rule(lambda known: vector_scaled(known.classifier, *known.held_out(), shift=False), holds_out=True),
}
