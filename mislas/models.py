"""Backbones and classifiers. A backbone maps images to features; a classifier maps features to logits."""

from __future__ import annotations

import copy
import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from .errors import MislasError, RecordError, unknown


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a parameter-free shortcut (He et al., 2016, option A), for each of ``n`` networks."""

    def __init__(self, inputs: int, outputs: int, stride: int, n: int = 1):
        super().__init__()
        self.stride, self.grow, self.n = stride, outputs - inputs, n
        self.conv1 = nn.Conv2d(n * inputs, n * outputs, 3, stride, 1, groups=n, bias=False)
        self.bn1 = nn.BatchNorm2d(n * outputs)
        self.conv2 = nn.Conv2d(n * outputs, n * outputs, 3, 1, 1, groups=n, bias=False)
        self.bn2 = nn.BatchNorm2d(n * outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.grow:
            half = self.grow // 2
            x = x[:, :, :: self.stride, :: self.stride].movedim(1, -1).unflatten(-1, (self.n, -1))
            x = F.pad(x, (half, self.grow - half)).flatten(-2).movedim(-1, 1)
        return F.relu(x + y)


class CifarResNet(nn.Module):
    """ResNet of depth 6n + 2 for small images (He et al., 2016, 4.2): (B, 3, H, W) to features (B, 64).

    Args:
        depth: 6n + 2.
        networks: how many of them are side by side, each with its own images and weights in a group of channels of its
            own: ``(B, 3 networks, H, W)`` to ``(B, 64 networks)``.
    """

    num_features = 64

    def __init__(self, depth: int = 32, networks: int = 1):
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise MislasError(f"a CIFAR ResNet has depth 6n + 2 (8, 14, 20, 32, ...), got {depth}")
        self.conv = nn.Conv2d(3 * networks, 16 * networks, 3, 1, 1, groups=networks, bias=False)
        self.bn = nn.BatchNorm2d(16 * networks)
        layers, inputs = [], 16
        for outputs, stride in ((16, 1), (32, 2), (64, 2)):
            for b in range(blocks):
                layers.append(BasicBlock(inputs, outputs, stride if b == 0 else 1, networks))
                inputs = outputs
        self.blocks = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(images)))
        return self.blocks(x).mean(dim=(2, 3))


class Float32Products(nn.Conv2d):
    """A convolution that autocast would compute in bfloat16, on a processor without instructions for that: inputs,
    weights and outputs are rounded to bfloat16, and so are their gradients; products and sums are float32, as they are
    inside those instructions. Results are autocast's, up to the order of sums, without its software emulation.
    """

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not torch.is_autocast_enabled(x.device.type):
            return super()._conv_forward(x, weight, bias)
        with torch.autocast(x.device.type, enabled=False):
            return super()._conv_forward(x.bfloat16().float(), weight.bfloat16().float(), bias).bfloat16()


def native_bfloat16(device: torch.device) -> bool:
    """Whether a processor multiplies bfloat16 numbers itself. Other devices are taken to.

    That oneDNN supports them is not enough: where there is AVX-512 without instructions for them it emulates them, at
    a third of the speed of float32.
    """
    if device.type != "cpu":
        return True
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    instructions = torch.cpu.get_capabilities()
    return any(instructions.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # the last is ARM's


def use_float32_products(network: nn.Module) -> nn.Module:
    """Turn a network's convolutions into :class:`Float32Products`, in place. Returns the network."""
    for module in network.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = Float32Products
    return network


#: The CIFAR family (He et al., 2016, 4.2), and torchvision's ResNets by their blocks in each of four stages. ResNet-10
#: is the long-tailed literature's (Liu et al., 2019): one basic block a stage. Depths 50 and 152 are torchvision's.
CIFAR_RESNETS = {f"resnet{depth}": depth for depth in (8, 14, 20, 32, 44, 56, 110)}
STAGES = {
    "resnet10": (1, 1, 1, 1),
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
}


#: The library's own, whose last block is known: some methods double it, or add one.
RESNETS = (*CIFAR_RESNETS, *STAGES)


def torchvision_resnet(name: str) -> nn.Module:
    """torchvision's ResNet, one of :data:`STAGES`, without its ``fc``. ``state_dict`` has torchvision's names, so its
    pretrained weights fit; see :func:`load_backbone_weights`."""
    from torchvision.models import resnet

    block = resnet.BasicBlock if name in ("resnet10", "resnet18", "resnet34") else resnet.Bottleneck
    network = resnet.ResNet(block, list(STAGES[name]))
    network.num_features = network.fc.in_features
    network.fc = nn.Identity()
    return network


#: What builds each backbone: images ``(B, 3, H, W)`` to features ``(B, num_features)``, a number that it has as an
#: attribute. One of your own is one more entry.
#:
#: - ``resnet8``, ``14``, ``20``, ``32`` (the paper's on CIFAR), ``44``, ``56``, ``110``: :class:`CifarResNet`, with 64
#:   features.
#: - ``resnet10``, ``18``, ``34`` (basic blocks, 512 features) and ``resnet50``, ``101``, ``152`` (bottlenecks, 2048):
#:   :func:`torchvision_resnet`, for images of some 64 pixels and more.
#:
#: :meta hide-value:
BACKBONES: dict[str, Callable[[], nn.Module]] = {
    name: functools.partial(CifarResNet, depth) for name, depth in CIFAR_RESNETS.items()
} | {name: functools.partial(torchvision_resnet, name) for name in STAGES}


def backbone(name: str) -> nn.Module:
    """A network of :data:`BACKBONES`, its weights random.

    Raises:
        MislasError: an unknown name, or a network that does not say how many features it has.
    """
    if name not in BACKBONES:
        unknown("backbone", name, BACKBONES)
    if isinstance(BACKBONES[name], nn.Module):
        raise MislasError(f"BACKBONES[{name!r}] must be a function that makes a network, such as its class; it is one")
    network = BACKBONES[name]()
    if not isinstance(getattr(network, "num_features", None), int):
        raise MislasError(
            f"backbone {name!r} must say how many features an image gets, (B, 3, H, W) to (B, num_features): give the "
            "network an attribute num_features"
        )
    return network


def batch_norms(network: nn.Module) -> list[nn.Module]:
    """The batch-norm layers of a network that have running statistics, in order."""
    kind = nn.modules.batchnorm._BatchNorm  # of any number of dimensions, and over several processes
    return [m for m in network.modules() if isinstance(m, kind) and m.running_mean is not None]


def check_batch_norm(network: nn.Module) -> None:
    """Raise :class:`MislasError` if there is no batch norm to shift."""
    if not batch_norms(network):
        raise MislasError(
            "the backbone has no batch norm whose statistics could shift: set stage2.shift_bn=false, and leave out "
            "stage2.shift_epochs"
        )


def check_backbone(name: str, size: int, shifts: bool) -> None:
    """Build a backbone and show it two black images, so that one of your own fails before hours of training.

    Args:
        size: pixels a side.
        shifts: whether batch norm's statistics will be shifted.

    Raises:
        MislasError: features of another shape than ``(B, num_features)``, or nothing to shift.
    """
    if name in RESNETS:
        return
    with torch.no_grad(), torch.random.fork_rng([]):
        network = backbone(name).eval()
        what = f"backbone {name!r} must turn images (B, 3, {size}, {size}) into features (B, {network.num_features})"
        try:
            features = network(torch.zeros(2, 3, size, size))
        except Exception as error:  # whatever it raises: it is not ours
            raise MislasError(f"{what}; with two images it raises {type(error).__name__}: {error}") from error
    found = tuple(features.shape) if isinstance(features, Tensor) else f"a {type(features).__name__}"
    if found != (2, network.num_features):
        raise MislasError(f"{what}, as its num_features says; two images gave {found}")
    if shifts:
        check_batch_norm(network)


def load_backbone_weights(network: nn.Module, path: str | os.PathLike) -> list[str]:
    """Fill a backbone from a file of weights, such as torchvision's ImageNet-pretrained ones.

    Args:
        network: a backbone; changed in place, and only if everything in the file fits.
        path: ``.safetensors``, or a ``.pth`` state dict, read as plain tensors (nothing in it is executed).

    Returns:
        Names in the file that were left out: the classifier's, ``fc.*``.

    Raises:
        RecordError: a file that is missing or unreadable, a tensor missing, left over, or of another shape.
            Batch norm's ``num_batches_tracked`` may be missing, as in old files: no result depends on it.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            stored = load_safetensors(path.read_bytes())
        else:
            stored = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise RecordError(f"there is no weights file {path}; download it first, nothing is fetched for you") from None
    except Exception as error:  # pickle, zip and safetensors each have their own
        raise RecordError(
            f"{path} cannot be read as weights ({type(error).__name__}); it must be a whole .safetensors file, "
            "or a .pth that holds a state dict and nothing else"
        ) from error
    if not isinstance(stored, dict) or not all(isinstance(value, Tensor) for value in stored.values()):
        raise RecordError(f"{path} does not hold a state dict (names to tensors); save network.state_dict() alone")
    left_out = sorted(name for name in stored if name.startswith("fc."))
    found = {name: value for name, value in stored.items() if name not in left_out}
    own = network.state_dict()
    wrong = {
        "lacks": [name for name in own if name not in found and not name.endswith("num_batches_tracked")],
        "has unknown": [name for name in found if name not in own],
        "has other shapes of": [name for name in found if name in own and found[name].shape != own[name].shape],
    }
    if any(wrong.values()):
        parts = [f"{what} {len(names)} ({', '.join(names[:2])}, ...)" for what, names in wrong.items() if names]
        raise RecordError(f"{path} is not of this backbone: it {', '.join(parts)}; choose the backbone it was made for")
    network.load_state_dict(found, strict=False)
    return left_out


def find_weights(checksum: str, data_root: str | os.PathLike | None) -> Path:
    """The file of pretrained weights under ``data_root/weights`` whose SHA-256 begins with ``checksum``.

    Args:
        checksum: 8 hex digits. torchvision's file names end in them: ``resnet152-394f9c45.pth``.
        data_root: the folder with ``weights/``.

    Raises:
        RecordError: no file with the checksum in its name, or one that has another.
    """
    if data_root is None:
        raise RecordError(f"pretrained weights {checksum} need data_root, a folder with weights/*-{checksum}.pth in it")
    folder = Path(data_root).expanduser() / "weights"
    found = sorted(path for path in folder.glob(f"*-{checksum}.*") if path.suffix in (".pth", ".safetensors"))
    if not found:
        raise RecordError(
            f"there is no {folder}/*-{checksum}.pth; put the file of pretrained weights there, named by the first 8 "
            "hex digits of its SHA-256 (torchvision's names have them); nothing is fetched for you"
        )
    with found[0].open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    if not digest.startswith(checksum):
        raise RecordError(f"{found[0]} has SHA-256 {digest[:8]}..., not {checksum}; fetch it again, or name it by that")
    return found[0]


def freeze_but_last_block(network: nn.Module) -> list[str]:
    """Freeze a pretrained ResNet but for its last residual block: the recipe for Places-LT (Liu et al., 2019; Kang et
    al., 2020), with a ResNet-152 pretrained on ImageNet. In the authors' code the block starts from random weights.

    Only gradients are switched off; whether batch norm's running statistics move is decided by ``network.train``.

    Returns:
        Names of the parameters that still train.

    Raises:
        MislasError: a backbone that is not one of torchvision's.
    """
    if not hasattr(network, "layer4"):
        raise MislasError(f"only a pretrained ResNet can be frozen but for its last block: one of {', '.join(STAGES)}")
    network.requires_grad_(False)
    network.layer4[-1].requires_grad_(True)
    return [name for name, parameter in network.named_parameters() if parameter.requires_grad]


def init_kaiming(module: nn.Module, generator: torch.Generator) -> None:
    """He-normal weights for every convolution and classifier, zero biases; batch norm starts as the identity."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear | CosineClassifier):
            nn.init.kaiming_normal_(layer.weight, generator=generator)
            if getattr(layer, "bias", None) is not None:
                nn.init.zeros_(layer.bias)


def bias_of(classifier: nn.Linear) -> Tensor:
    """A linear classifier's bias ``(K,)``; one without bias counts as one whose bias is 0."""
    return classifier.weight.new_zeros(len(classifier.weight)) if classifier.bias is None else classifier.bias


DELTAS = ("zeros", "fresh", "stage1")


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
        stage1: Stage-1's linear classifier; copied, never changed. One without bias counts as one whose bias is 0.
        a: 0 or 1, whether Stage-1's weights are kept.
        learn_scale: whether s is learned (it starts at 1).
        delta: how dW starts: ``"zeros"``, ``"fresh"`` (He-normal), ``"stage1"`` (a copy of W), or None for no dW.
        generator: randomness for ``"fresh"``.

    Raises:
        MislasError: a delta of another name.
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
        if a not in (0, 1) or delta not in (*DELTAS, None) or (a == 0 and delta is None):
            raise MislasError(
                f"generalised classifier: a must be 0 or 1 and delta {', '.join(map(repr, DELTAS))} or None "
                f"(not None when a is 0), got a={a!r}, delta={delta!r}"
            )
        weight = stage1.weight.detach()
        bias = bias_of(stage1).detach()
        self.a, self.learn_scale = a, learn_scale
        self.register_buffer("weight", weight.clone())
        self.register_buffer("bias", bias.clone())
        self.scale = nn.Parameter(torch.ones_like(bias), requires_grad=learn_scale)
        self.delta = None
        if delta is not None:
            self.delta = nn.Linear(weight.shape[1], weight.shape[0])  # on the CPU: a draw is the same on every device
            if delta == "fresh":
                init_kaiming(self.delta, generator)
            else:
                start = weight, bias
                for own, stage1s in zip(self.delta.parameters(), start, strict=True):
                    own.data.copy_(stage1s if delta == "stage1" else torch.zeros_like(stage1s))
            self.delta.to(weight)

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


#: Stage-2 classifiers beside that of equation (4): ``make(stage1, class_counts)`` gives a module, which maps features
#: ``(B, M)`` to logits ``(B, K)``; what of it asks for gradients is trained. ``stage1`` is a copy of Stage-1's linear
#: classifier, frozen. The library has none; one of your own is an entry.
CLASSIFIERS: dict[str, Callable[[nn.Linear, Sequence[int]], nn.Module]] = {}


def class_weights(classifier: nn.Module, num_classes: int) -> Tensor | None:
    """The weights of each class, ``(K, M)``, scales included; None where a classifier of your own has no ``weight``
    of that kind."""
    if isinstance(classifier, GeneralisedClassifier):
        return classifier.effective()[0]
    weight = getattr(classifier, "weight", None)
    return weight if isinstance(weight, Tensor) and weight.ndim == 2 and len(weight) == num_classes else None


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
    """A ResNet whose last block is there twice: conventional and re-balancing branch (BBN, Zhou et al., 2020).

    ``network(images)`` are the features for testing: both branches side by side, ``(B, 2 M)``. In training each branch
    sees its own images: ``network(images, which)`` are the features ``(B, M)`` of the conventional (0) or the
    re-balancing (1) branch, to be mixed by :func:`mix_branches`.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        if isinstance(network, CifarResNet):
            *shared, last = network.conv, network.bn, nn.ReLU(), *network.blocks
        else:
            first = network.conv1, network.bn1, network.relu, network.maxpool
            *shared, last = *first, network.layer1, network.layer2, network.layer3, *network.layer4
        self.stem = nn.Sequential(*shared)
        self.branches = nn.ModuleList([last, copy.deepcopy(last)])
        self.num_features = 2 * network.num_features

    def forward(self, images: Tensor, which: int | None = None) -> Tensor:
        shared = self.stem(images)
        if which is not None:
            return self.branches[which](shared).mean(dim=(2, 3))
        return mix_branches(*(block(shared).mean(dim=(2, 3)) for block in self.branches), alpha=0.5)


def mix_branches(conventional: Tensor, rebalancing: Tensor, alpha: float) -> Tensor:
    """``[alpha f_c, (1 - alpha) f_r]``, ``(B, 2 M)``: features ``(B, M)`` side by side, weighted (Zhou et al., 2020).

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
        network = TwoBranches(network)
    if scale is None:
        return network, nn.Linear(network.num_features, num_classes)
    return network, CosineClassifier(network.num_features, num_classes, scale)
