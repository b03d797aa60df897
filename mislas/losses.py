"""Losses. Each maps logits (B, K) and targets (B,) to the loss of every image, (B,); :func:`mean` makes it a number."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import MislasError, unknown

Loss = Callable[[Tensor, Tensor], Tensor]

FORMS = ("concave", "linear", "convex", "power")
SMOOTHING = ("others", "all")


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """``-log p_y``."""
    return F.cross_entropy(logits, targets, reduction="none")


def mean(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """The batch's loss: ``sum(w_i l_i) / sum(w_i)``, so that weights of another scale change nothing."""
    return values.mean() if weights is None else (weights * values).sum() / weights.sum()


def class_balanced_mean(values: Tensor, targets: Tensor) -> Tensor:
    """The mean over classes of each class's mean: ``values`` and ``targets`` are ``(N,)``."""
    return mean(values, 1 / torch.bincount(targets).to(values)[targets])


# ------------------------------------------------------------------------------------------ label-aware smoothing


def smoothing_factors(
    class_counts: Sequence[int], eps_1: float, eps_k: float, form: str = "concave", power: float | None = None
) -> Tensor:
    """Label-smoothing factor of each class, ``eps_y = f(N_y)`` (paper, equations 3 and 7).

    The class with most images (N_1) gets ``eps_1`` and the one with fewest (N_K) ``eps_K``, in whatever order the
    classes come. If all classes have the same size, every factor is ``eps_1``.

    Args:
        class_counts: training images per class, ``(K,)``, each at least 1.
        eps_1, eps_k: ``0 <= eps_k <= eps_1 <= 0.5`` (the paper's range; up to 1 works and warns).
        form: ``"concave"``, ``"linear"``, ``"convex"`` (equation 3) or ``"power"`` (equation 7).
        power: exponent p > 0 of the power form; p < 1 is concave, p > 1 convex.

    Returns:
        float32 ``(K,)``.

    Raises:
        MislasError: values outside their range, an unknown form, or a class with no image.
    """
    check_smoothing(eps_1, eps_k, form, power)
    counts = check_counts(class_counts)
    spread = counts.max() - counts.min()
    t = (counts - counts.min()) / spread if spread > 0 else torch.ones_like(counts)
    if form == "concave":
        rise = torch.sin(torch.pi / 2 * t)
    elif form == "linear":
        rise = t
    elif form == "convex":  # eps_1 + (eps_1 - eps_K) sin(3 pi / 2 + pi / 2 t), written as a rise from eps_K
        rise = 1 + torch.sin(1.5 * torch.pi + torch.pi / 2 * t)
    else:
        rise = t**power
    return (eps_k + (eps_1 - eps_k) * rise).float()


def check_smoothing(eps_1: float, eps_k: float, form: str, power: float | None) -> None:
    """Raise :class:`MislasError` if the settings of label-aware smoothing are outside their range."""
    if not 0 <= eps_k <= eps_1 <= 1:
        raise MislasError(
            "label-aware smoothing is for 0 <= eps_k <= eps_1 <= 0.5 (with a warning up to 1), got "
            f"eps_1={eps_1}, eps_k={eps_k}"
        )
    if eps_1 > 0.5:
        warnings.warn(f"eps_1={eps_1} is outside the paper's range 0 <= eps_k <= eps_1 <= 0.5", stacklevel=3)
    if form not in FORMS:
        unknown("form of the related function", form, FORMS)
    if (form == "power") != (power is not None) or (power is not None and not power > 0):
        raise MislasError(f"power > 0 goes with form='power' and no other, got form={form!r}, power={power!r}")


def label_aware_smoothing(factors: Tensor, *, over: str = "others") -> Loss:
    r"""Cross-entropy against ``q`` with class-wise smoothing (paper, equation 1).

    Args:
        factors: ``eps_y`` of each class, ``(K,)``.
        over: how eps_y is spread. ``"others"`` is equation (1): ``q_y = 1 - eps_y``, ``q_i = eps_y / (K - 1)``.
            ``"all"`` is the authors' code: eps_y / K on all K classes, so ``q_y = 1 - eps_y + eps_y / K``.

    Raises:
        MislasError: another ``over``; the loss itself, if logits have another number of classes.
    """
    if over not in SMOOTHING:
        unknown("smoothing over", over, SMOOTHING)
    num_classes = len(factors)
    share = factors * num_classes / (num_classes - 1) if over == "others" else factors
    # Equation (1) moves eps_y * K / (K - 1) from the one-hot label to the uniform distribution over all K classes.

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        if logits.ndim != 2 or logits.shape[1] != num_classes:
            raise MislasError(f"logits must be (B, {num_classes}), one per class, got {tuple(logits.shape)}")
        log_p = F.log_softmax(logits, dim=1)
        eps = share.to(log_p)[targets]
        own = log_p.gather(1, targets[:, None]).squeeze(1)
        return -((1 - eps) * own + eps * log_p.mean(dim=1))

    return loss


# ----------------------------------------------------------------------------------- re-weighting and re-margining


def check_counts(class_counts: Sequence[int]) -> Tensor:
    """Training images per class as float64 ``(K,)``; :class:`MislasError` if a class has none."""
    counts = torch.as_tensor(class_counts, dtype=torch.float64)
    if counts.min() < 1:
        raise MislasError(f"class {int(counts.argmin())} has no image; this loss needs at least one of each")
    return counts


def focal(gamma: float) -> Loss:
    """Focal loss ``-(1 - p_y)^gamma log p_y`` (Lin et al., 2017, equation 4); gamma 0 is cross-entropy.

    Raises:
        MislasError: gamma below 0.
    """
    if not gamma >= 0:
        raise MislasError(f"gamma of the focal loss must be >= 0, got {gamma}")

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        own = F.log_softmax(logits, dim=1).gather(1, targets[:, None]).squeeze(1)
        rest = (-own.expm1()).clamp_min(torch.finfo(own.dtype).tiny)  # 1 - p_y; the slope of 0^gamma is infinite
        return -(rest**gamma) * own

    return loss


def effective_number_weights(class_counts: Sequence[int], beta: float) -> Tensor:
    """Class weights ``(1 - beta) / (1 - beta^N_y)``, scaled to a sum of K (Cui et al., 2019).

    Args:
        class_counts: training images per class, ``(K,)``, each at least 1.
        beta: in ``[0, 1)``; 0 weighs all classes alike, and towards 1 the weights become inverse frequencies.

    Returns:
        float32 ``(K,)``.

    Raises:
        MislasError: beta outside its range, or a class with no image.
    """
    if not 0 <= beta < 1:
        raise MislasError(f"beta of the effective number must be in [0, 1), got {beta}")
    weights = (1 - beta) / (1 - beta ** check_counts(class_counts))
    return (weights * len(weights) / weights.sum()).float()


def ldam(class_counts: Sequence[int], max_margin: float, scale: float) -> Loss:
    """Cross-entropy with a margin on the true class that is larger for rarer classes (Cao et al., 2019).

    ``-log softmax(z - scale * D_y e_y)_y`` with ``D_k = C / N_k^(1/4)`` and C such that the rarest class has
    ``max_margin``. Logits are those of a cosine classifier, ``z = scale * cos``: the margin is one of cosines.

    Raises:
        MislasError: a margin below 0, a scale that is not above it, or a class with no image.
    """
    if not (max_margin >= 0 and scale > 0):
        raise MislasError(f"LDAM needs max_margin >= 0 and scale > 0, got {max_margin} and {scale}")
    margins = check_counts(class_counts) ** -0.25
    margins = (scale * max_margin / margins.max() * margins).float()

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        margin = margins.to(logits)[targets]
        return cross_entropy(logits.scatter_add(1, targets[:, None], -margin[:, None]), targets)

    return loss


def logit_adjusted(class_counts: Sequence[int], adjustment: float) -> Loss:
    """Cross-entropy of ``z + adjustment * log pi``, pi the training frequencies (Menon et al., 2021, equation 10).

    With adjustment 1 it is balanced softmax (Ren et al., 2020); with 0, cross-entropy.

    Raises:
        MislasError: a class with no image.
    """
    counts = check_counts(class_counts)
    shift = (adjustment * (counts / counts.sum()).log()).float()

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(logits + shift.to(logits), targets)

    return loss


# ------------------------------------------------------------------------------------------------------- registry


@dataclass(frozen=True)
class LossSpec:
    """A loss by name.

    Attributes:
        make: called with ``class_counts`` and the settings as keywords, returns the loss.
        settings: fields of a stage that the loss needs.
        optional: fields that it may have.
    """

    make: Callable[..., Loss]
    settings: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()

    def __post_init__(self):
        for names in (self.settings, self.optional):
            if not isinstance(names, tuple):
                raise MislasError(f"settings of a loss are a tuple of names, such as ('gamma',), got {names!r}")


def _las(class_counts, eps_1, eps_k, form, smoothing_over, power=None) -> Loss:
    return label_aware_smoothing(smoothing_factors(class_counts, eps_1, eps_k, form, power), over=smoothing_over)


LOSSES: dict[str, LossSpec] = {
    "ce": LossSpec(lambda class_counts: cross_entropy),
    "las": LossSpec(_las, ("eps_1", "eps_k", "form", "smoothing_over"), ("power",)),
    "focal": LossSpec(lambda class_counts, gamma: focal(gamma), ("gamma",)),
    "ldam": LossSpec(ldam, ("max_margin", "scale")),
    "logit_adjusted": LossSpec(logit_adjusted, ("adjustment",)),
}
