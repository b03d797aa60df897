"""Learning from multiple experts (LFME; Xiang et al., 2020): a student that three experts teach.

An expert is a network trained on the images of one group of classes alone: many, medium or few shots. The student sees
all classes; it is taught less by an expert the nearer it comes to it (self-paced expert selection), and images that
experts find hard count less at first (curriculum instance selection).

Constants and class-balanced batches are those of the authors' code for ImageNet-LT. Accuracies are compared on training
images that all four were denied, classes counting alike, where the authors have a validation set. An image's weight
starts at the expert's confidence, reaches 1 at the end and weighs its loss; in their code it starts lower in groups
with larger classes, reaches 1 at half of the epochs and weighs the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batches import Batch, plain_images
from .data import LongTailed
from .errors import DataError
from .evaluate import predict
from .losses import class_balanced_mean

if TYPE_CHECKING:
    from .config import RunConfig
    from .train import Options

THRESHOLD = 0.3  # an expert teaches in full until the student has this share of its accuracy


def of_group(data: LongTailed, groups: dict[str, list[int]], group: str) -> LongTailed:
    """A dataset with the training images of one group of classes; labels stay what they are.

    Raises:
        DataError: one of the three groups is empty.
    """
    empty = [name for name, classes in groups.items() if not classes]
    if empty:
        raise DataError(
            f"{data.name} at imbalance factor {data.imbalance:g} has no class with {empty[0]} shots, and there must be "
            "an expert for many, medium and few; choose an imbalance factor that gives all three"
        )
    inside = torch.isin(data.train_targets, torch.tensor(groups[group]))
    return data.only(inside)


def selection(student: float, expert: float, threshold: float = THRESHOLD) -> float:
    """Weight of an expert, 0..1, by the accuracies of student and expert on its classes (0..1): 1 up to ``threshold``
    of the expert's, from there in a straight line to 0 where the student is as good."""
    if student <= threshold * expert:
        return 1.0
    return max(0.0, (expert - student) / (expert * (1 - threshold))) if expert > 0 else 0.0


def distillation(student: Tensor, expert: Tensor, temperature: float) -> Tensor:
    """Mean over the images of ``KL(softmax(expert / T) || softmax(student / T))``: logits of one group's classes."""
    soft = [F.log_softmax(logits / temperature, dim=1) for logits in (student, expert)]
    return F.kl_div(*soft, log_target=True, reduction="batchmean")


class Experts:
    """Trained experts, and how much the student learns from each of them and from each image.

    Args:
        models: backbone and classifier (of all K classes) of each expert, in the order of ``groups``.
        groups: classes of each group.
        data: training set, without what is held out.
        held: training set of what is.
        config: the student's run, whose Stage-1 has the temperature of the distillation.
    """

    def __init__(
        self,
        models: Sequence[tuple[nn.Module, nn.Module]],
        groups: dict[str, list[int]],
        data: LongTailed,
        held: LongTailed,
        config: RunConfig,
        options: Options,
    ):
        from .train import forward  # here: it imports this module

        device = options.torch_device()
        self.temperature, self.models = config.stage1.distillation, []
        self.classes = [torch.tensor(classes, device=device) for classes in groups.values()]
        confidence = torch.zeros(len(data.train_targets))
        self.held, self.accuracy = [], []
        for (network, head), classes in zip(models, groups.values(), strict=True):
            for module in (network, head):
                module.to(device, memory_format=torch.channels_last).requires_grad_(False).eval()
            self.models.append((forward(network, config, options), head))
            group = torch.tensor(classes)
            inside, held_inside = (torch.isin(some.train_targets, group).nonzero()[:, 0] for some in (data, held))
            images, held_images = plain_images(data, options, inside), plain_images(held, options, held_inside)
            self.held.append((held_images, held.train_targets[held_inside]))
            own, unseen = (predict(network, [head], some)[0][:, classes] for some in (images, held_images))
            labels = torch.searchsorted(torch.tensor(classes), data.train_targets[inside])
            confidence[inside] = own.softmax(dim=1).gather(1, labels[:, None]).squeeze(1)
            guesses = torch.tensor(classes)[unseen.argmax(dim=1)]
            self.accuracy.append(_accuracy(guesses, self.held[-1][1]))
        self.confidence = confidence.to(device)

    def expert_weights(self, network: nn.Module, head: nn.Module) -> list[float]:
        """The experts' weights for a student as it is now, which is left in training mode."""
        found = [_accuracy(predict(network, [head], images)[0].argmax(dim=1), y) for images, y in self.held]
        network.train()
        return [selection(student, expert) for student, expert in zip(found, self.accuracy, strict=True)]

    def image_weights(self, progress: float) -> Tensor:
        """Weights of the training images, ``(N,)``: from an expert's probability of the label to 1, in a straight
        line, as ``progress`` goes from 0 to 1."""
        return self.confidence + (1 - self.confidence) * progress

    def teach(self, logits: Tensor, batch: Batch, weights: Sequence[float]) -> Tensor:
        """What the student's logits ``(B, K)`` lack of the experts': the weighted sum of the distillations."""
        total = logits.new_zeros(())
        for (features_of, head), classes, weight in zip(self.models, self.classes, weights, strict=True):
            if weight > 0:
                with torch.no_grad():
                    expert = head(features_of(batch))[:, classes]
                total = total + weight * distillation(logits[:, classes], expert, self.temperature)
        return total


def _accuracy(guesses: Tensor, targets: Tensor) -> float:
    return class_balanced_mean((guesses == targets).double(), targets).item()
