"""From predictions to numbers: accuracy by group, calibration, and what a reliability diagram shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import distributed
from .augment import Images
from .errors import MislasError

if TYPE_CHECKING:
    from .pipeline import ImageBatches

BINS = 15  # the paper's, everywhere
CELLS = 2**22  # probabilities held in float64 at once: all of iNaturalist 2018's would take gigabytes


@torch.no_grad()
def predict(network: nn.Module, heads: Sequence[nn.Module], images: Images | ImageBatches) -> list[Tensor]:
    """Logits of every head on plain images, one pass through the backbone, float32: ``(N, K)`` per head, on the CPU."""
    for module in (network, *heads):
        module.eval()
    outputs: list[list[Tensor]] = [[] for _ in heads]
    for batch in images.plain():
        features = distributed.gather(network(batch))
        for output, head in zip(outputs, heads, strict=True):
            output.append(head(features).float().cpu())
    return [torch.cat(output) for output in outputs]


@dataclass(frozen=True)
class Bins:
    """Predictions sorted into bins of confidence. Each array has one entry per bin.

    Attributes:
        edges: bin limits, ``(n_bins + 1,)``; a bin holds ``edges[i] < confidence <= edges[i + 1]``.
        count: predictions in the bin.
        accuracy: share of them that is right, 0..1; NaN where the bin is empty.
        confidence: their mean confidence, 0..1; NaN where the bin is empty.
    """

    edges: np.ndarray
    count: np.ndarray
    accuracy: np.ndarray
    confidence: np.ndarray

    @property
    def gap(self) -> np.ndarray:
        """``|accuracy - confidence|``, 0 where the bin is empty."""
        return np.nan_to_num(np.abs(self.accuracy - self.confidence))

    @property
    def ece(self) -> float:
        """Expected calibration error, 0..1: the mean gap, bins weighted by their count (Guo et al., 2017)."""
        return float((self.gap * self.count).sum() / self.count.sum())

    @property
    def mce(self) -> float:
        """Maximum calibration error, 0..1: the largest gap of a non-empty bin."""
        return float(self.gap.max())


def reliability(confidence: np.ndarray, correct: np.ndarray, n_bins: int = BINS, adaptive: bool = False) -> Bins:
    """Sort predictions into bins of confidence: the data of a reliability diagram.

    Args:
        confidence: probability of the predicted class, 0..1, ``(N,)``.
        correct: whether the prediction is right, ``(N,)``.
        n_bins: number of bins, at least 1.
        adaptive: bins of equal count in place of equal width. Their limits are quantiles, so equal confidences share
            a bin.

    Raises:
        MislasError: empty or mismatched input, or a confidence outside 0..1.
    """
    confidence, correct = np.asarray(confidence, np.float64), np.asarray(correct, np.float64)
    if confidence.ndim != 1 or confidence.shape != correct.shape or not len(confidence):
        raise MislasError(
            f"confidence and correct must be equally long, not empty, one-dimensional; "
            f"got shapes {confidence.shape} and {correct.shape}"
        )
    if not (confidence.min() >= 0 and confidence.max() <= 1 + 1e-6):  # NaN fails too
        raise MislasError(f"confidences must lie in 0..1, got {confidence.min():.4g} .. {confidence.max():.4g}")
    if n_bins < 1:
        raise MislasError(f"n_bins must be at least 1, got {n_bins}")
    edges = np.linspace(0, 1, n_bins + 1)
    if adaptive:
        edges = np.quantile(confidence, edges)
    which = bin_of(confidence, edges)
    count = np.bincount(which, minlength=n_bins)
    with np.errstate(invalid="ignore"):
        accuracy = np.bincount(which, correct, n_bins) / count
        mean_confidence = np.bincount(which, confidence, n_bins) / count
    return Bins(edges, count, accuracy, mean_confidence)


def bin_of(confidence: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The bin that holds each confidence, ``edges[i] < confidence <= edges[i + 1]``; 0 is in the first: ``(N,)``."""
    return np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, len(edges) - 2)


@dataclass(frozen=True)
class Predictions:
    """What is kept of a run's test predictions: enough for every diagram, small enough for git. Each ``(N,)``.

    Attributes:
        target, predicted: classes, int64 in 0 .. K - 1.
        confidence: probability of the predicted class, 0..1.
        true_probability: probability of the true class, 0..1.
    """

    target: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    true_probability: np.ndarray

    @property
    def correct(self) -> np.ndarray:
        """Whether each prediction is right, bool ``(N,)``."""
        return self.predicted == self.target

    def reliability(self, n_bins: int = BINS) -> Bins:
        """Bins of equal width; see :func:`reliability`."""
        return reliability(self.confidence, self.correct, n_bins)


def auroc(predictions: Predictions) -> float | None:
    """How well confidence tells right from wrong: the probability that it is higher for a right prediction than for a
    wrong one, 0..1, where equal ones count half. None if all predictions are right, or all wrong."""
    from sklearn.metrics import roc_auc_score  # here: it takes a second to import, and training needs none of it

    correct = predictions.correct
    return float(roc_auc_score(correct, predictions.confidence)) if 0 < correct.mean() < 1 else None


def surest_accuracy(predictions: Predictions, share: float = 0.5) -> float:
    """Accuracy over the share of the images, at least one, of which the network is surest."""
    order = np.argsort(-predictions.confidence, kind="stable")
    return float(predictions.correct[order[: max(1, round(share * len(order)))]].mean())


def chance_ece(predictions: Predictions, n_bins: int = BINS) -> float:
    r"""The ECE that chance alone leaves: its expectation for a network with these confidences ``p_i`` that is right
    exactly as often as it says.

    The sum of what is right in a bin has variance ``sum p_i (1 - p_i)``, and a normal number is away from its mean by
    ``sqrt(2 / pi)`` standard deviations on average. (Normal is near enough from some ten predictions in a bin on.)
    """
    p = predictions.confidence
    variance = np.bincount(bin_of(p, np.linspace(0, 1, n_bins + 1)), p * (1 - p), n_bins)
    return float(np.sqrt(2 / np.pi * variance).sum() / len(p))


def _look(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """Of some images, in float64: class and probability of the prediction, probability of the true class and its
    logarithm, sum of squared probabilities, and the logarithm of the softmax's denominator. Each ``(n,)``."""
    logits = logits.double()
    log_p = F.log_softmax(logits, dim=1)
    p = log_p.exp()
    largest, predicted = p.max(dim=1)
    log_own = log_p.gather(1, targets[:, None])[:, 0]
    return predicted, largest, log_own.exp(), log_own, p.square().sum(dim=1), logits.logsumexp(dim=1)


def summarise(
    logits: Tensor | np.ndarray, targets: Tensor | np.ndarray, groups: dict[str, list[int]] | None = None
) -> tuple[dict[str, float | None], Predictions]:
    """All measures of a run, and its predictions.

    Args:
        logits: float ``(N, K)``, on any device.
        targets: int64 ``(N,)``, classes in 0 .. K - 1.
        groups: classes of "many", "medium", "few", as :func:`mislas.data.groups` gives them; an empty group's measures
            are None.

    Returns:
        Measures by name: ``accuracy`` and ``ece`` and the same with ``_many``, ``_medium``, ``_few``;
        ``adaptive_ece``, ``classwise_ece`` (mean over classes of the ECE of "is it class k?": Kull et al., 2019; Nixon
        et al., 2019), ``mce``, ``nll`` (nats), ``brier`` (0..2), ``confidence`` (mean).
        Accuracies, ECEs and the like are fractions in 0..1.

    Raises:
        MislasError: logits and targets that do not fit each other.
    """
    logits, targets = torch.as_tensor(logits), torch.as_tensor(targets)
    if logits.ndim != 2 or len(logits) != len(targets):
        raise MislasError(f"logits must be (N, K) with N targets, got {tuple(logits.shape)} and {tuple(targets.shape)}")
    logits, targets = logits.detach().cpu(), targets.cpu()
    if len(targets) and not (targets.min() >= 0 and targets.max() < logits.shape[1]):
        raise MislasError(f"targets must be in 0 .. {logits.shape[1] - 1}, got {targets.min()} .. {targets.max()}")
    y = targets.numpy()
    parts = [
        _look(*part)
        for part in zip(*(t.split(max(1, CELLS // logits.shape[1])) for t in (logits, targets)), strict=True)
    ]
    predicted, largest, own, log_own, squares, normaliser = map(torch.cat, zip(*parts, strict=True))
    predictions = Predictions(y, predicted.numpy(), largest.numpy(), own.numpy())
    classwise: list[float] = []
    width = max(1, CELLS // max(1, len(logits)))
    for first in range(0, logits.shape[1], width):  # by columns, since a class's bins are over all images
        p = (logits[:, first : first + width].double() - normaliser[:, None]).exp().numpy()
        classwise += [reliability(p_k, y == k).ece for k, p_k in enumerate(p.T, first)]
    correct, confidence = predictions.correct, predictions.confidence
    bins = predictions.reliability()
    measures: dict[str, float | None] = {
        "accuracy": float(correct.mean()),
        "confidence": float(confidence.mean()),
        "ece": bins.ece,
        "mce": bins.mce,
        "adaptive_ece": reliability(confidence, correct, adaptive=True).ece,
        "classwise_ece": float(np.mean(classwise)),
        "nll": -float(log_own.mean()),
        "brier": float((squares - 2 * own + 1).mean()),
    }
    for name, classes in (groups or {}).items():
        inside = np.isin(y, classes)
        some = bool(inside.any())
        measures[f"accuracy_{name}"] = float(correct[inside].mean()) if some else None
        measures[f"ece_{name}"] = reliability(confidence[inside], correct[inside]).ece if some else None
    return measures, predictions
