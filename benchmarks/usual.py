"""Training as people mostly write it, which the benchmarks compare with: PIL images, torchvision transforms, DataLoader
workers, eager float32."""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms

from mislas import Dataset


class PilImages(torch.utils.data.Dataset):
    """Images as people usually hold them."""

    def __init__(self, data: Dataset):
        spec = data.spec
        self.images = [Image.fromarray(image.numpy()) for image in data.train_images]
        self.targets = data.train_targets.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(spec.size, padding=spec.padding),
                *([transforms.RandomHorizontalFlip()] if spec.flip else []),
                transforms.ToTensor(),
                transforms.Normalize(spec.mean, spec.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int):
        return self.transform(self.images[i]), self.targets[i]


def usual_loader(data: Dataset, batch_size: int, device: torch.device) -> DataLoader:
    workers = min(8, os.cpu_count() or 1)
    return DataLoader(PilImages(data), batch_size, shuffle=True, num_workers=workers, pin_memory=device.type == "cuda")


def usual_epoch(
    network: nn.Module,
    loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    alpha: float | None = None,
) -> None:
    """One pass over the training images; ``alpha`` is mixup's, or None for none."""
    network.train()
    for images, targets in loader:
        images, targets = images.to(device), targets.to(device)
        if alpha is None:
            loss = F.cross_entropy(network(images), targets)
        else:
            lam, partner = (
                torch.distributions.Beta(alpha, alpha).sample().item(),
                torch.randperm(len(images), device=device),
            )
            logits = network(lam * images + (1 - lam) * images[partner])
            loss = lam * F.cross_entropy(logits, targets) + (1 - lam) * F.cross_entropy(logits, targets[partner])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
