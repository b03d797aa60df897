"""Losses. Each maps logits (B, K) and targets (B,) to the mean loss over the batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import MislasError, unknown

Loss = Callable[[Tensor, Tensor], Tensor]

FORMS = ("concave", "linear", "convex", "power")


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
    counts = torch.as_tensor(class_counts, dtype=torch.float64)
    if counts.min() < 1:
        raise MislasError(f"class {int(counts.argmin())} has no image; label-aware smoothing needs at least one each")
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
        raise MislasError(f"label-aware smoothing needs 0 <= eps_k <= eps_1 <= 0.5, got eps_1={eps_1}, eps_k={eps_k}")
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
    """
    if over not in ("others", "all"):
        unknown("smoothing over", over, ("others", "all"))
    num_classes = len(factors)
    share = factors * num_classes / (num_classes - 1) if over == "others" else factors
    # Equation (1) moves eps_y * K / (K - 1) from the one-hot label to the uniform distribution over all K classes.

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        if logits.ndim != 2 or logits.shape[1] != num_classes:
            raise MislasError(f"logits must be (B, {num_classes}), one per class, got {tuple(logits.shape)}")
        log_p = F.log_softmax(logits, dim=1)
        eps = share.to(log_p)[targets]
        own = log_p.gather(1, targets[:, None]).squeeze(1)
        return -((1 - eps) * own + eps * log_p.mean(dim=1)).mean()

    return loss


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """``-log p_y``, mean over the batch."""
    return F.cross_entropy(logits, targets)
