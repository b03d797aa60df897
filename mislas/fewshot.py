"""Few-shot learning without forgetting (Gidaris and Komodakis, 2018): the weights of rare classes are generated.

A generator learns to make the weights of a cosine classifier from a few images of a class. It learns on episodes, in
which some classes with enough images are posed as novel; then it makes the weights of the classes that have few.

What their work leaves open for long-tailed data, where no class is new, is decided here:

- Base classes are those with many and medium images, novel ones those with few (:func:`base_and_novel`).
- The backbone has seen all of them in Stage-1, as it has seen the classes that episodes pose as novel.
- An episode poses as many classes as novel as there are novel ones, but at most half of the base classes.
- Images are shown without augmentation, and of a novel class all its training images are. (Batches are augmented.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .batches import batches_of, host_rng, plain_images, torch_rng, training_part
from .config import RunConfig
from .data import LongTailed
from .errors import MislasError
from .evaluate import predict
from .losses import cross_entropy
from .models import CosineClassifier
from .samplers import one_image_each
from .train import Options, Trained, _loop, alone, forward


def base_and_novel(data: LongTailed) -> tuple[list[int], list[int]]:
    """The classes with enough images to learn from, and those with few, each in order.

    Novel are the few-shot classes. Where there are none, or less than two others, it is the third with the fewest
    training images, rounded down, but at least one.
    """
    novel = data.groups["few"]
    if not novel or data.num_classes - len(novel) < 2:
        by_size = np.argsort(data.class_counts, kind="stable")
        novel = sorted(by_size[: max(1, data.num_classes // 3)].tolist())
    return [k for k in range(data.num_classes) if k not in set(novel)], novel


class WeightGenerator(nn.Module):
    r"""A cosine classifier of base classes, and what makes the weights of novel ones from images ("Few-shot
    classification weight generator" in their section 3).

    ``w = average * mean_i z_i + attended * mean_i sum_b a_ib w_b``, where ``z_i`` are the features of a class's images
    and ``w_b`` the base weights, all of unit length, and ``a_i = softmax_b(sharpness * cos(query z_i, key_b))``.
    ``average``, ``attended`` (both (M,), products are elementwise), ``query`` (M, M), the keys (Kb, M), sharpness, the
    scale of the cosines and the base weights are learned. The first two start at 1, the query at the identity,
    sharpness at 10, keys at random.

    Args:
        stage1: Stage-1's classifier of all K classes; copied, never changed.
        base, novel: classes, in order.
        shown: features of each novel class's images, ``(N_k, M)`` each, N_k >= 1.
        generator: randomness of the keys.
    """

    def __init__(
        self,
        stage1: CosineClassifier,
        base: list[int],
        novel: list[int],
        shown: list[Tensor],
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        width = stage1.weight.shape[1]
        self.weight = nn.Parameter(stage1.weight.detach()[base].clone())
        self.scale = nn.Parameter(torch.tensor(float(stage1.scale)))
        self.average = nn.Parameter(torch.ones(width))
        self.attended = nn.Parameter(torch.ones(width))
        self.query = nn.Parameter(torch.eye(width))
        self.keys = nn.Parameter(torch.randn(len(base), width, generator=generator) * (2 / width) ** 0.5)
        self.sharpness = nn.Parameter(torch.tensor(10.0))
        counts = torch.tensor([len(images) for images in shown])
        share = (torch.arange(int(counts.max())) < counts[:, None]) / counts[:, None]
        for name, value in {
            "order": torch.tensor(base + novel).argsort(),  # of base and novel rows, side by side, for class order
            "shown": pad_sequence(shown, batch_first=True),  # (Kn, S, M)
            "share": share,  # (Kn, S): 1 / N_k for an image, 0 where there is none
        }.items():
            self.register_buffer(name, value, persistent=False)

    def generate(self, shown: Tensor, share: Tensor, known: Tensor | None = None) -> Tensor:
        """Weights ``(n, M)`` of n classes.

        Args:
            shown: features of their images, ``(n, S, M)``.
            share: weight of each image in its class, ``(n, S)``; rows sum to 1.
            known: which base classes may be attended to, bool ``(Kb,)``; None is all.
        """
        z = F.normalize(shown, dim=2)
        match = self.sharpness * (F.normalize(z @ self.query.T, dim=2) @ F.normalize(self.keys).T)
        if known is not None:
            match = match.masked_fill(~known, -torch.inf)
        others = match.softmax(dim=2) @ F.normalize(self.weight)
        from_images, from_others = ((share[:, :, None] * part).sum(dim=1) for part in (z, others))
        return self.average * from_images + self.attended * from_others

    def episode(self, features: Tensor, shown: Tensor, posed: Tensor) -> Tensor:
        """Logits ``(B, Kb)`` of the base classes, those in ``posed`` (n,) known only from ``shown`` (n, S, M)."""
        known = torch.ones(len(self.weight), dtype=torch.bool, device=posed.device).index_fill(0, posed, False)
        share = torch.full(shown.shape[:2], 1 / shown.shape[1], device=shown.device)
        generated = self.generate(shown, share.to(shown), known)
        return self._logits(features, self.weight.index_copy(0, posed, generated))

    def all_weights(self) -> Tensor:
        """Weights of every class, ``(K, M)``: learned where it is base, generated where it is novel."""
        return torch.cat([self.weight, self.generate(self.shown, self.share)])[self.order]

    def forward(self, features: Tensor) -> Tensor:
        return self._logits(features, self.all_weights())

    def _logits(self, features: Tensor, weight: Tensor) -> Tensor:
        return self.scale * F.linear(F.normalize(features), F.normalize(weight))

    @torch.no_grad()
    def classifier(self) -> CosineClassifier:
        """The classifier of all classes that this has come to be."""
        weight = self.all_weights()
        found = CosineClassifier(weight.shape[1], len(weight), self.scale.item()).to(weight.device)
        found.weight.copy_(weight)
        return found


def draw_episodes(
    rng: np.random.Generator, targets: np.ndarray, episodes: int, classes: int, shots: int
) -> tuple[np.ndarray, np.ndarray]:
    """What episodes pose as novel: distinct classes ``(episodes, classes)``, and images of each,
    ``(episodes, classes, shots)``, drawn independently."""
    known = int(targets.max()) + 1
    posed = np.stack([rng.permutation(known)[:classes] for _ in range(episodes)])
    images = one_image_each(rng, targets, posed.repeat(shots, axis=1).ravel())
    return posed, images.reshape(episodes, classes, shots)


def train_few_shot(
    config: RunConfig,
    stage1: tuple[nn.Module, CosineClassifier],
    data: LongTailed,
    options: Options,
    checkpoint: Path | None = None,
    evaluate: Callable | None = None,
) -> Trained:
    """Learn to generate weights on the frozen backbone, and generate those of the novel classes.

    Args:
        config: its ``stage2`` is a FewShot.
        stage1: the trained backbone and its cosine classifier. The backbone is frozen in place; nothing else changes.

    Returns:
        A cosine classifier of all classes.

    Raises:
        MislasError: fewer than two base classes.
        OutOfTime, Diverged, RecordError: as of :func:`mislas.train.train_stage1`.
    """
    stage, device = config.stage2, options.torch_device()
    data = training_part(config, data)
    network, classifier = stage1
    network.to(device, memory_format=torch.channels_last).requires_grad_(False)
    base, novel = base_and_novel(data)
    if len(base) < 2:
        raise MislasError(
            "episodes pose some of the base classes as novel beside the others, which takes at least 2 of them; "
            f"{data.name} has {data.num_classes} classes, of which {len(base)} is base"
        )
    plain = plain_images(data, options, torch.arange(len(data.train_targets)))
    features = predict(network, [nn.Identity()], plain)[0]
    shown = [features[data.train_targets == k] for k in novel]
    head = WeightGenerator(classifier, base, novel, shown, torch_rng(config.seed, "stage2 head")).to(device)

    inside = torch.isin(data.train_targets, torch.tensor(base))
    targets = torch.searchsorted(torch.tensor(base), data.train_targets[inside])
    data = data.only(inside, targets)
    batches = batches_of(data, stage, "stage2", config.seed, options)
    features = features[inside].to(device)
    features_of, posing = forward(network, config, options), max(1, min(len(novel), len(base) // 2))
    steps = -(-len(targets) // stage.batch_size)

    def episodes(epoch: int) -> Iterator[list[Tensor]]:
        rng = host_rng(config.seed, "episodes", epoch)
        drawn = draw_episodes(rng, targets.numpy(), steps, posing, stage.shots)
        for batch, posed, images in zip(
            batches.epoch(epoch), *(torch.from_numpy(d).to(device) for d in drawn), strict=True
        ):
            with torch.no_grad():
                x = features_of(batch)
            logits = head.episode(x, features[images], posed)
            asked = (batch.index[:, None] != images.flatten()).all(dim=1).float()  # not about an image that is shown
            losses = asked * cross_entropy(logits, batch.targets)
            yield [losses.sum() / asked.sum().clamp_min(1)]

    trained = alone(_loop(
        [config], "stage2", network, [head], [[{"params": list(head.parameters()), "lr": stage.lr}]], episodes,
        data, options, checkpoint, evaluate, mode=nn.Module.eval,
    ), options)  # fmt: skip
    return replace(trained, heads=[head.classifier()])
