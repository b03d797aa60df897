"""Backbones and classifiers. A backbone maps images to features; a classifier maps features to logits."""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import MislasError


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a parameter-free shortcut (He et al., 2016, option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.stride, self.grow = stride, outputs - inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.grow:
            half = self.grow // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.grow - half))
        return F.relu(x + y)


class CifarResNet(nn.Module):
    """ResNet of depth 6n + 2 for small images (He et al., 2016, 4.2): (B, 3, H, W) to features (B, 64)."""

    num_features = 64

    def __init__(self, depth: int = 32):
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise MislasError(f"a CIFAR ResNet has depth 6n + 2 (8, 14, 20, 32, ...), got {depth}")
        self.conv = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        layers, inputs = [], 16
        for outputs, stride in ((16, 1), (32, 2), (64, 2)):
            for b in range(blocks):
                layers.append(BasicBlock(inputs, outputs, stride if b == 0 else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(images)))
        return self.blocks(x).mean(dim=(2, 3))


def backbone(name: str) -> nn.Module:
    """A backbone by name: ``resnet32`` is the paper's on CIFAR; any ``resnet{6n+2}`` of that family is allowed."""
    match = re.fullmatch(r"resnet(\d+)", name)
    if not match:
        raise MislasError(f"unknown backbone {name!r}. Known: resnet8, resnet14, resnet20, resnet32, ... (6n + 2)")
    return CifarResNet(int(match[1]))


def init_kaiming(module: nn.Module, generator: torch.Generator) -> None:
    """He-normal weights for every convolution and classifier, zero biases; batch norm starts as the identity."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear | CosineClassifier):
            nn.init.kaiming_normal_(layer.weight, generator=generator)
            if getattr(layer, "bias", None) is not None:
                nn.init.zeros_(layer.bias)


class GeneralisedClassifier(nn.Module):
    r"""The Stage-2 classifier of equation (4): ``z = diag(s) (a W + dW)^T x``, W fixed.

    The bias is W's weight on a constant feature 1, so ``z = s * ((a W + dW) x + (a b + db))``.

    =======================  ===  ===========  ========  =======================================
    classifier               a    learn_scale  delta     learned
    =======================  ===  ===========  ========  =======================================
    cRT (Kang et al., 2020)  0    no           "fresh"   a new classifier
    LWS (Kang et al., 2020)  1    yes          None      one scale per class
    MiSLAS, equation (4)     1    yes          "zeros"   scales, and a shift of W at its own rate
    MiSLAS, authors' code    0    yes          "stage1"  scales, and W itself at its own rate
    =======================  ===  ===========  ========  =======================================

    The last row is the same function with W and dW merged, so that weight decay acts on W + dW.

    Args:
        stage1: Stage-1's linear classifier; copied, never changed.
        a: 0 or 1, whether Stage-1's weights are kept.
        learn_scale: whether s is learned (it starts at 1).
        delta: how dW starts: ``"zeros"``, ``"fresh"`` (He-normal), ``"stage1"`` (a copy of W), or None for no dW.
        generator: randomness for ``"fresh"``.
    """

    def __init__(
        self,
        stage1: nn.Linear,
        *,
        a: int,
        learn_scale: bool,
        delta: str | None,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        if a not in (0, 1) or delta not in ("zeros", "fresh", "stage1", None) or (a == 0 and delta is None):
            raise MislasError(
                f"generalised classifier: a must be 0 or 1 and delta 'zeros', 'fresh', 'stage1' or None "
                f"(not None when a is 0), got a={a!r}, delta={delta!r}"
            )
        weight, bias = stage1.weight.detach(), stage1.bias.detach()
        self.a, self.learn_scale = a, learn_scale
        self.register_buffer("weight", weight.clone())
        self.register_buffer("bias", bias.clone())
        self.scale = nn.Parameter(torch.ones_like(bias), requires_grad=learn_scale)
        if delta is None:
            self.delta = None
        else:
            self.delta = nn.Linear(weight.shape[1], weight.shape[0]).to(weight)
            with torch.no_grad():
                self.delta.weight.copy_(weight if delta == "stage1" else torch.zeros_like(weight))
                self.delta.bias.copy_(bias if delta == "stage1" else torch.zeros_like(bias))
            if delta == "fresh":
                fresh = nn.Linear(weight.shape[1], weight.shape[0])  # drawn on the CPU: the same on every device
                init_kaiming(fresh, generator)
                self.delta.load_state_dict(fresh.state_dict())

    def effective(self) -> tuple[Tensor, Tensor]:
        """The linear classifier that this is: weight ``(K, M)`` and bias ``(K,)``, scales included."""
        weight, bias = self.a * self.weight, self.a * self.bias
        if self.delta is not None:
            weight, bias = weight + self.delta.weight, bias + self.delta.bias
        return self.scale[:, None] * weight, self.scale * bias

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(features, *self.effective())

    def parameter_groups(self, lr: float, delta_lr: float) -> list[dict]:
        """Optimiser groups: s at ``lr``; dW at ``lr * delta_lr``."""
        groups = [{"params": [self.scale], "lr": lr}] if self.learn_scale else []
        if self.delta is not None:
            groups.append({"params": list(self.delta.parameters()), "lr": lr * delta_lr})
        return groups


class CosineClassifier(nn.Module):
    """``z_k = scale * cos(w_k, x)``: features and weights are normalised, there is no bias (Cao et al., 2019).

    Args:
        num_features, num_classes: M and K.
        scale: what cosines are multiplied by, > 0; a softmax over bare cosines could not be confident.
    """

    def __init__(self, num_features: int, num_classes: int, scale: float):
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(num_classes, num_features))

    def forward(self, features: Tensor) -> Tensor:
        return self.scale * F.linear(F.normalize(features), F.normalize(self.weight))


class TwoBranches(nn.Module):
    """A CIFAR ResNet whose last block is there twice: conventional and re-balancing branch (BBN, Zhou et al., 2020).

    ``network(images)`` are the features for testing: both branches side by side, ``(B, 2 M)``. In training each branch
    sees its own images, ``network.branch(images, which)``, and the features are mixed by :func:`mix_branches`.
    """

    def __init__(self, network: CifarResNet):
        super().__init__()
        *shared, last = network.blocks
        channels = last.conv2.out_channels
        self.stem = nn.Sequential(network.conv, network.bn, nn.ReLU(), *shared)
        self.branches = nn.ModuleList([last, BasicBlock(last.conv1.in_channels, channels, last.stride)])
        self.num_features = 2 * network.num_features

    def branch(self, images: Tensor, which: int) -> Tensor:
        """Features ``(B, M)`` of the conventional (0) or the re-balancing (1) branch."""
        return self.branches[which](self.stem(images)).mean(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor:
        shared = self.stem(images)
        return mix_branches(*(block(shared).mean(dim=(2, 3)) for block in self.branches), alpha=0.5)


def mix_branches(conventional: Tensor, rebalancing: Tensor, alpha: float) -> Tensor:
    """``[alpha f_c, (1 - alpha) f_r]``: features side by side, weighted (Zhou et al., 2020, equation 1).

    The classifier has weights for each half, so its logits are ``alpha W_c f_c + (1 - alpha) W_r f_r``. Testing uses
    alpha 0.5. (The authors' code doubles both features.)
    """
    return torch.cat([alpha * conventional, (1 - alpha) * rebalancing], dim=1)


def stage1_model(
    name: str, num_classes: int, *, scale: float | None = None, two_branches: bool = False
) -> tuple[nn.Module, nn.Module]:
    """What Stage-1 trains: a backbone (see :func:`backbone`), and a linear or (with a scale) cosine classifier."""
    network = backbone(name)
    if two_branches:
        if not isinstance(network, CifarResNet):
            raise MislasError(f"two branches need a CIFAR ResNet (resnet8, resnet20, resnet32, ...), got {name!r}")
        network = TwoBranches(network)
    if scale is None:
        return network, nn.Linear(network.num_features, num_classes)
    return network, CosineClassifier(network.num_features, num_classes, scale)
