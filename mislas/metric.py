"""Losses of features: they compare the images of a batch with each other, and are added to a classifier's loss.

Each maps features ``(B, M)`` and targets ``(B,)`` to one number >= 0. It is 0, with gradient 0, where a batch has
nothing to compare. Sizes do not depend on the data and nothing is copied to the device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import MislasError

MetricLoss = Callable[[Tensor, Tensor], Tensor]

_NOTHING = -1e30  # log of an empty sum, but finite: so are its gradients


def lifted_structured(features: Tensor, targets: Tensor, margin: float = 1.0) -> Tensor:
    r"""Lifted structured loss, smooth form (Oh Song et al., 2016, equation 4; margin 1 is theirs).

    ``J = 1 / (2 |P|) sum_{(i, j) in P} max(0, J_ij)^2`` over the pairs P of one class, with
    ``J_ij = log(sum_{(i, k) in N} exp(margin - D_ik) + sum_{(j, l) in N} exp(margin - D_jl)) + D_ij``: N are the pairs
    of two classes, D is the Euclidean distance.
    """
    distance = _distances(features)
    same = targets[:, None] == targets
    from_others = (margin - distance).masked_fill(same, _NOTHING).logsumexp(dim=1)
    pairs = torch.logaddexp(from_others[:, None], from_others) + distance  # each pair is there twice
    positive = same.triu(1)
    return (pairs.clamp_min(0).square() * positive).sum() / (2 * positive.sum().clamp_min(1))


def range_loss(
    features: Tensor, targets: Tensor, k: int = 2, margin: float = 1.0, alpha: float = 1.0, beta: float = 1.0
) -> Tensor:
    """Range loss, ``alpha * intra + beta * inter`` (Zhang et al., 2017, equations 5 to 8; distances are squared).

    ``intra`` sums, over the classes of the batch, the harmonic mean of the k largest distances between two images of
    the class (k 2 is theirs; of as many as there are, if fewer). ``inter = max(0, margin - d)``, d the distance between
    the two nearest class centres, which are means over the batch.

    Their margin and weights belong to unscaled features of their network. Ours are for features of unit length, whose
    distances lie in 0..4 (0..2 if no feature is negative).
    """
    batch = len(targets)
    same = targets[:, None] == targets
    one, two = torch.triu_indices(batch, batch, 1, device=targets.device)
    distance = _distances(features)[one, two].square()
    which = same.int().argmax(dim=1)  # a class goes by its first image; pairs of two classes come last
    which = torch.where(same[one, two], which[one], batch)
    order = distance.argsort(descending=True)
    order = order[which[order].argsort(stable=True)]  # class by class, the largest distance first
    which, distance = which[order], distance[order]
    rank = torch.arange(len(which), device=which.device) - torch.searchsorted(which, which)
    taken = ((rank < k) & (which < batch)).to(distance)
    inverse = taken / distance.clamp_min(torch.finfo(distance.dtype).eps)
    inverses, counts = (distance.new_zeros(batch + 1).index_add(0, which, part) for part in (inverse, taken))
    intra = (counts / inverses.clamp_min(torch.finfo(distance.dtype).tiny)).sum()

    centres = same.to(features) @ features / same.sum(dim=1, keepdim=True)  # of each image's class
    nearest = _distances(centres).square().masked_fill(same, torch.inf).amin()
    return alpha * intra + beta * (margin - nearest).clamp_min(0)


def _distances(points: Tensor) -> Tensor:
    """Euclidean distances ``(B, B)``, exact for near points; the gradient where two are equal is 0."""
    return torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")


def on_the_sphere(loss: MetricLoss) -> MetricLoss:
    """``loss`` of features scaled to unit length.

    Both sources leave features as they come, which ties margins to one network. Here a margin means the same on every
    backbone, and only directions are asked for: the length of a feature is the classifier's.
    """
    return lambda features, targets: loss(F.normalize(features), targets)


def metric_for(name: str, width: int, device: torch.device) -> MetricLoss:
    """A metric loss of :data:`METRICS`, tried on two features of ``width`` numbers.

    Raises:
        MislasError: it gives no single number, or has parameters: only network and classifier are trained.
    """
    loss = METRICS[name]
    with device:
        value = loss(torch.zeros(2, width), torch.arange(2))
    if not (isinstance(value, Tensor) and value.shape == ()):
        given = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise MislasError(f"metric {name!r} must give one number for a batch, a tensor of shape (), and gave {given}")
    if value.requires_grad:
        raise MislasError(f"metric {name!r} has parameters that learn; only network and classifier are trained")
    return loss


#: Metric losses by name, as they are trained with.
METRICS: dict[str, MetricLoss] = {
    "lifted": on_the_sphere(lifted_structured),
    "range": on_the_sphere(range_loss),
}
