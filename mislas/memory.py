"""OLTR (Liu et al., 2019): a memory of class centroids enriches the features of an image before it is classified.

Forms and constants are those of the authors' code (stage 2 of ImageNet-LT), with three differences. Their attention
starts from random weights in place of zeros. Their features pass through another layer of 512 units before memory and
classifier. And in their own gradient of the centroids' loss its weight of 0.01 does not reach the centroids, and a
centroid's pull is divided by one more than its images in the batch: with four of them their memory moves 20 times as
fast as by the loss's derivative, which is what we take.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batches import batches_of, plain_images, torch_rng, training_part
from .config import RunConfig
from .data import LongTailed
from .evaluate import predict
from .losses import cross_entropy
from .models import CifarResNet, CosineClassifier, freeze_but_last_block, init_kaiming
from .rules import nearest_class_mean
from .train import Options, Trained, _loop, alone, forward

CENTROID_LR = 0.1  # the centroids' learning rate, as a ratio of the classifier's


class ModulatedAttention(nn.Module):
    r"""Modulated attention, the last block of a backbone (their section 3): ``f + where(f) * seen(f)``, on a map
    ``(B, C, side, side)`` to one of the same shape.

    ``seen`` is self-attention: ``U sum_j softmax_j(q_i . k_j) v_j`` at place i, with q, k, v and U linear in the
    channels, C / 2 of them in between. ``where`` spreads a weight of 1 over an image's places: the softmax of a linear
    function of the whole map. U starts at zero, so the block starts as the identity.

    Args:
        channels: C, even.
        side: of the map, in places.
        generator: randomness of the other weights.
    """

    def __init__(self, channels: int, side: int, generator: torch.Generator | None = None):
        super().__init__()
        self.query, self.key, self.value = (nn.Conv2d(channels, channels // 2, 1) for _ in range(3))
        self.back = nn.Conv2d(channels // 2, channels, 1, bias=False)
        self.where = nn.Linear(channels * side**2, side**2)
        init_kaiming(self, generator)
        nn.init.zeros_(self.back.weight)

    def forward(self, maps: Tensor) -> Tensor:
        query, key, value = (layer(maps).flatten(2).mT for layer in (self.query, self.key, self.value))
        seen = F.scaled_dot_product_attention(query, key, value, scale=1.0).mT.unflatten(2, maps.shape[2:])
        where = self.where(maps.flatten(1)).softmax(dim=1).unflatten(1, (1, *maps.shape[2:]))
        return maps + where.to(maps.dtype) * self.back(seen)


def attend(network: nn.Module, size: int, generator: torch.Generator | None = None) -> None:
    """Give a backbone for images of ``size`` pixels a side :class:`ModulatedAttention` as its last block, in place."""
    last, stride = (network.blocks, 4) if isinstance(network, CifarResNet) else (network.layer4, 32)
    last.append(ModulatedAttention(network.num_features, math.ceil(size / stride), generator))


class MetaEmbedding(nn.Module):
    r"""Dynamic meta-embedding and the cosine classifier on it (their section 3).

    ``v = reach / gamma * (x + e * m)`` with ``m = sum_i o_i c_i``, ``o = softmax(hallucinator x)``,
    ``e = tanh(selector x)``, and reachability ``gamma = min_i |x - c_i|``; logits are
    ``z_k = scale * |v| / (1 + |v|) * cos(w_k, v)``. The centroids learn from :meth:`centroid_loss` alone.

    Args:
        stage1: Stage-1's linear classifier, where the hallucinator starts; copied, never changed.
        centroids: mean features of the classes, ``(K, M)``, where the memory starts.
        scale, reach: 16 and 10 are theirs.
        generator: randomness of the selector and the classifier.
    """

    def __init__(
        self,
        stage1: nn.Linear,
        centroids: Tensor,
        scale: float = 16.0,
        reach: float = 10.0,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        classes, width = centroids.shape
        self.reach = reach
        self.hallucinator = copy.deepcopy(stage1)
        self.selector = nn.Linear(width, width)
        self.cosine = CosineClassifier(width, classes, scale)
        init_kaiming(self.selector, generator)
        init_kaiming(self.cosine, generator)
        self.centroids = nn.Parameter(centroids.clone())

    @property
    def weight(self) -> Tensor:
        """The classifier's weights, ``(K, M)``."""
        return self.cosine.weight

    def embed(self, features: Tensor) -> Tensor:
        """Meta-embeddings ``(B, M)``."""
        memory = self.centroids.detach()
        nearest = squared_distances(features, memory).amin(dim=1, keepdim=True).sqrt()
        concepts = self.hallucinator(features).softmax(dim=1) @ memory
        return self.reach / nearest * (features + self.selector(features).tanh() * concepts)

    def forward(self, features: Tensor) -> Tensor:
        embedded = self.embed(features)
        length = embedded.norm(dim=1, keepdim=True)
        return length / (1 + length) * self.cosine(embedded)

    def centroid_loss(self, features: Tensor, targets: Tensor, margin: float = 10.0, repel: float = 0.01) -> Tensor:
        """Discriminative centroid loss: features near their class's centroid and, on average, far from the others.

        ``mean_n |x_n - c_y|^2 / 2 + repel * max(0, margin - sum_n sum_{k != y} |x_n - c_k|^2 / (B K))``.
        """
        distances = squared_distances(features, self.centroids)
        own = distances.gather(1, targets[:, None])
        return own.mean() / 2 + repel * (margin - (distances.sum() - own.sum()) / distances.numel()).clamp_min(0)

    def parameter_groups(self, lr: float) -> list[dict]:
        """Optimiser groups: the centroids at ``lr * CENTROID_LR``, the rest at ``lr``."""
        rest = [parameter for parameter in self.parameters() if parameter is not self.centroids]
        return [{"params": rest, "lr": lr}, {"params": [self.centroids], "lr": lr * CENTROID_LR}]


def squared_distances(points: Tensor, centroids: Tensor) -> Tensor:
    """Squared Euclidean distances ``(B, K)`` of points ``(B, M)`` from centroids ``(K, M)``, above 0: as a product of
    matrices, since K may be thousands."""
    lengths = points.square().sum(dim=1, keepdim=True) + centroids.square().sum(dim=1)
    return (lengths - 2 * points @ centroids.T).clamp_min(1e-6)


def train_memory(
    config: RunConfig,
    stage1: tuple[nn.Module, nn.Linear],
    data: LongTailed,
    options: Options,
    checkpoint: Path | None = None,
    evaluate: Callable | None = None,
) -> Trained:
    """Learn memory, meta-embedding and classifier, and train the backbone on with them.

    Args:
        config: its ``stage2`` is a Memory.
        stage1: the trained backbone, changed in place if it trains on, of a pretrained one its last block alone, and by
            attention; and its linear classifier.

    Raises:
        OutOfTime, Diverged, RecordError: as of :func:`mislas.train.train_stage1`.
    """
    stage, device = config.stage2, options.torch_device()
    data = training_part(config, data)
    network, classifier = stage1
    trains = stage.backbone_lr is not None
    network.requires_grad_(trains)
    if trains and config.stage1.weights is not None:
        freeze_but_last_block(network)
    if stage.attention:
        attend(network, data.spec.size, torch_rng(config.seed, "stage2 attention"))
    network.to(device, memory_format=torch.channels_last)
    plain = plain_images(data, options, torch.arange(len(data.train_targets)))
    means = nearest_class_mean(predict(network, [nn.Identity()], plain)[0], data.train_targets, data.num_classes).weight
    head = MetaEmbedding(classifier, means.detach(), generator=torch_rng(config.seed, "stage2 head")).to(device)
    groups = head.parameter_groups(stage.lr)
    if trains:
        learned = [parameter for parameter in network.parameters() if parameter.requires_grad]
        groups.append({"params": learned, "lr": stage.lr * stage.backbone_lr})
    batches = batches_of(data, stage, "stage2", config.seed, options)
    features_of = forward(network, config, options)

    def steps(epoch: int) -> Iterator[list[Tensor]]:
        for batch in batches.epoch(epoch):
            features = features_of(batch)
            loss = cross_entropy(head(features), batch.targets).mean()
            yield [loss + stage.centroid_weight * head.centroid_loss(features, batch.targets)]

    return alone(_loop(
        [config], "stage2", network, [head], [groups], steps, data, options, checkpoint, evaluate,
        mode=nn.Module.train if trains else nn.Module.eval,
    ), options)  # fmt: skip
