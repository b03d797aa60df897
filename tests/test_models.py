import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mislas.errors import MislasError
from mislas.models import (
    BasicBlock,
    CifarResNet,
    CosineClassifier,
    GeneralisedClassifier,
    TwoBranches,
    backbone,
    init_kaiming,
    mix_branches,
    stage1_model,
)

# -------------------------------------------------------------------------------------------------------- backbones


def test_resnet32_has_the_papers_parameters():
    def conv(inputs, outputs):
        return 9 * inputs * outputs + 2 * outputs  # 3x3 weights; batch norm's scale and shift

    def stage(inputs, outputs, blocks=5):
        return conv(inputs, outputs) + (2 * blocks - 1) * conv(outputs, outputs)

    by_hand = conv(3, 16) + stage(16, 16) + stage(16, 32) + stage(32, 64)
    assert by_hand == 463504  # 464154 with the classifier: 0.46M in He et al. (2016), Table 6
    assert sum(p.numel() for p in backbone("resnet32").parameters()) == by_hand


@pytest.mark.parametrize(("name", "size"), [("resnet8", 16), ("resnet14", 32)])
def test_a_backbone_gives_64_features_per_image(name, size):
    assert backbone(name)(torch.zeros(2, 3, size, size)).shape == (2, 64)


def test_features_are_the_mean_over_positions():
    network = backbone("resnet8").eval()
    maps = []
    network.blocks.register_forward_hook(lambda module, inputs, output: maps.append(output.detach()))
    features = network(torch.randn(2, 3, 16, 16))
    assert maps[0].shape == (2, 64, 4, 4)
    np.testing.assert_allclose(features.detach(), maps[0].numpy().mean(axis=(2, 3)), atol=1e-6)


def test_a_shortcut_takes_every_other_pixel_and_pads_channels_with_zeros_on_both_sides():
    block = BasicBlock(2, 4, stride=2).eval()
    for conv in (block.conv1, block.conv2):
        nn.init.zeros_(conv.weight)  # only the shortcut is left
    x = torch.arange(1.0, 33.0).reshape(1, 2, 4, 4)
    expected = torch.zeros(1, 4, 2, 2)
    expected[0, 1] = torch.tensor([[1.0, 3.0], [9.0, 11.0]])
    expected[0, 2] = torch.tensor([[17.0, 19.0], [25.0, 27.0]])
    assert torch.equal(block(x), expected)


def test_a_block_is_relu_of_shortcut_plus_residual():
    block = BasicBlock(3, 3, stride=1).eval()
    x = torch.randn(2, 3, 5, 5)
    norm = 1 / np.sqrt(1 + 1e-5)  # batch norm as it starts: mean 0, variance 1, epsilon 1e-5
    inner = F.relu(F.conv2d(x, block.conv1.weight, padding=1) * norm)
    expected = F.relu(x + F.conv2d(inner, block.conv2.weight, padding=1) * norm)
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("depth", [2, 9, 33, -4])
def test_a_depth_that_is_not_6n_plus_2_is_refused(depth):
    with pytest.raises(MislasError, match=f"depth 6n \\+ 2 .*got {depth}"):
        CifarResNet(depth)


@pytest.mark.parametrize("name", ["vgg16", "resnet", "resnet32x", "ResNet32", ""])
def test_an_unknown_backbone_lists_the_known_ones(name):
    with pytest.raises(MislasError, match=f"unknown backbone '{name}'. Known: resnet8, .*resnet32"):
        backbone(name)


def test_kaiming_weights_have_the_deviation_of_he_and_follow_the_generator():
    layers = [nn.Linear(500, 400), nn.Linear(500, 400)]
    for layer in layers:
        init_kaiming(layer, torch.Generator().manual_seed(3))
    assert torch.equal(layers[0].weight, layers[1].weight)
    assert layers[0].weight.std().item() == pytest.approx((2 / 500) ** 0.5, rel=0.01)
    assert not layers[0].bias.any()


# ------------------------------------------------------------------------------- the classifier of equation (4)

CRT = {"a": 0, "learn_scale": False, "delta": "fresh"}
LWS = {"a": 1, "learn_scale": True, "delta": None}
PAPER = {"a": 1, "learn_scale": True, "delta": "zeros"}
AUTHORS = {"a": 0, "learn_scale": True, "delta": "stage1"}
FINE_TUNING = {"a": 0, "learn_scale": False, "delta": "stage1"}

X = torch.randn(40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.arange(40) % 4


@pytest.fixture
def stage1():
    """Stage-1's classifier: 6 features, 4 classes, in double precision."""
    torch.manual_seed(0)
    return nn.Linear(6, 4).double()


def sgd(groups, forward, steps=5):
    optimizer = torch.optim.SGD(groups, lr=0.5, momentum=0.9, weight_decay=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(forward(X), Y).backward()
        optimizer.step()


@pytest.mark.parametrize("kind", [LWS, PAPER, AUTHORS, FINE_TUNING], ids=["lws", "paper", "authors", "fine-tuning"])
def test_at_first_it_is_stage1s_classifier(stage1, kind):
    assert torch.equal(GeneralisedClassifier(stage1, **kind)(X), stage1(X))


@pytest.mark.parametrize("a", [0, 1])
def test_forward_is_equation_4(stage1, a):
    head = GeneralisedClassifier(stage1, a=a, learn_scale=True, delta="fresh")
    with torch.no_grad():
        head.scale.copy_(torch.tensor([0.5, -1.0, 2.0, 3.0]))
        head.delta.bias.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    w, b = stage1.weight.detach().numpy(), stage1.bias.detach().numpy()
    dw, db = head.delta.weight.detach().numpy(), head.delta.bias.detach().numpy()
    z = np.diag([0.5, -1.0, 2.0, 3.0]) @ ((a * w + dw) @ X.numpy().T + (a * b + db)[:, None])
    np.testing.assert_allclose(head(X).detach(), z.T, rtol=1e-12)


def test_crt_trains_like_a_plain_linear_classifier(stage1):
    head = GeneralisedClassifier(stage1, **CRT, generator=torch.Generator().manual_seed(2))
    plain = nn.Linear(6, 4).double()
    plain.load_state_dict(head.delta.state_dict())
    sgd(head.parameter_groups(0.5, 0.2), head)
    sgd([{"params": plain.parameters(), "lr": 0.1}], plain)
    for got, expected in zip(head.effective(), (plain.weight, plain.bias), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


def test_crt_starts_afresh_from_its_generator(stage1):
    one, two = (GeneralisedClassifier(stage1, **CRT, generator=torch.Generator().manual_seed(2)) for _ in range(2))
    assert torch.equal(one(X), two(X))
    assert not torch.allclose(one(X), stage1(X))


def test_lws_trains_like_one_scale_per_class(stage1):
    head = GeneralisedClassifier(stage1, **LWS)
    scale = torch.ones(4, dtype=torch.float64, requires_grad=True)
    sgd(head.parameter_groups(0.5, 1.0), head)
    sgd([{"params": [scale], "lr": 0.5}], lambda x: scale * stage1(x).detach())
    torch.testing.assert_close(head.scale.detach(), scale.detach(), atol=1e-6, rtol=0)
    assert (scale != 1).all()


def test_equation_4_trains_like_its_formula_with_two_rates(stage1):
    head = GeneralisedClassifier(stage1, **PAPER)
    w, b = stage1.weight.detach(), stage1.bias.detach()
    scale, dw, db = torch.ones(4), torch.zeros(4, 6), torch.zeros(4)
    scale, dw, db = (t.double().requires_grad_() for t in (scale, dw, db))
    sgd(head.parameter_groups(0.5, 0.2), head)
    sgd([{"params": [scale], "lr": 0.5}, {"params": [dw, db], "lr": 0.1}], lambda x: scale * (x @ (w + dw).T + b + db))
    for got, expected in ((head.scale, scale), (head.delta.weight, dw), (head.delta.bias, db)):
        torch.testing.assert_close(got.detach(), expected.detach(), atol=1e-6, rtol=0)


def test_the_merged_variant_without_scales_is_fine_tuning(stage1):
    head, plain = GeneralisedClassifier(stage1, **FINE_TUNING), copy.deepcopy(stage1)
    sgd(head.parameter_groups(0.5, 1.0), head)
    sgd([{"params": plain.parameters(), "lr": 0.5}], plain)
    torch.testing.assert_close(head(X), plain(X), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "kind", [CRT, LWS, PAPER, AUTHORS, FINE_TUNING], ids=["crt", "lws", "paper", "authors", "fine-tuning"]
)
def test_stage1s_weights_never_change(stage1, kind):
    before = copy.deepcopy(stage1.state_dict())
    head = GeneralisedClassifier(stage1, **kind)
    sgd(head.parameter_groups(0.5, 1.0), head)
    for name in ("weight", "bias"):
        assert torch.equal(getattr(head, name), before[name])
        assert torch.equal(getattr(stage1, name), before[name])
    assert head.learn_scale == bool((head.scale != 1).any())


@pytest.mark.parametrize(
    "wrong",
    [
        {"a": 0, "learn_scale": True, "delta": None},
        {"a": 2, "learn_scale": True, "delta": "zeros"},
        {"a": 0.5, "learn_scale": True, "delta": "zeros"},
        {"a": 1, "learn_scale": True, "delta": "random"},
    ],
)
def test_a_combination_without_sense_is_refused(stage1, wrong):
    with pytest.raises(MislasError, match="a must be 0 or 1 and delta 'zeros', 'fresh', 'stage1' or None"):
        GeneralisedClassifier(stage1, **wrong)


# ------------------------------------------------------------------------------------ other models that Stage-1 trains


def test_a_cosine_classifiers_logits_are_scaled_cosines():
    head = CosineClassifier(5, 3, scale=30.0)
    init_kaiming(head, torch.Generator().manual_seed(0))
    x = torch.randn(7, 5)
    expected = 30 * F.cosine_similarity(x[:, None], head.weight[None], dim=2)
    torch.testing.assert_close(head(x), expected)


def test_at_alpha_1_only_the_conventional_branch_is_seen_and_at_0_only_the_other():
    one, two = torch.randn(4, 3), torch.randn(4, 3)
    assert torch.equal(mix_branches(one, two, 1.0), torch.cat([one, torch.zeros(4, 3)], dim=1))
    assert torch.equal(mix_branches(one, two, 0.0), torch.cat([torch.zeros(4, 3), two], dim=1))


def test_two_branches_share_all_but_the_last_block():
    network = TwoBranches(backbone("resnet8")).eval()
    plain = backbone("resnet8").eval()
    plain.conv, plain.bn, plain.blocks = network.stem[0], network.stem[1], nn.Sequential(*network.stem[3:])
    x = torch.randn(2, 3, 16, 16)
    for which in (0, 1):
        plain.blocks.append(network.branches[which])
        torch.testing.assert_close(network.branch(x, which), plain(x))
        del plain.blocks[-1]
    torch.testing.assert_close(network(x), mix_branches(network.branch(x, 0), network.branch(x, 1), 0.5))
    assert network(x).shape == (2, network.num_features)


def test_stage1_has_the_classifier_and_the_branches_that_are_asked_for():
    network, head = stage1_model("resnet8", 10)
    assert (type(network), type(head), head.in_features) == (CifarResNet, nn.Linear, 64)
    network, head = stage1_model("resnet8", 10, scale=30.0, two_branches=True)
    assert (type(network), type(head), head.weight.shape) == (TwoBranches, CosineClassifier, (10, 128))
