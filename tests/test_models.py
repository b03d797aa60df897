import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file
from torch import nn

from mislas.data import SPECS, Dataset, Spec
from mislas.errors import MislasError, RecordError
from mislas.methods import configure
from mislas.models import (
    BACKBONES,
    BasicBlock,
    CifarResNet,
    CosineClassifier,
    GeneralisedClassifier,
    TwoBranches,
    backbone,
    batch_norms,
    check_backbone,
    freeze_but_last_block,
    init_kaiming,
    load_backbone_weights,
    mix_branches,
    native_bfloat16,
    stage1_model,
    use_float32_products,
)
from mislas.runs import Store, batch_norm_statistics, run
from mislas.train import round_to_half, train_batch_norm

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


# --------------------------------------------------------------------------------------------------------- bfloat16


@pytest.fixture
def convolution():
    """A convolution, its input, and a gradient of its output; nothing is a bfloat16 number yet."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 7, 7, requires_grad=True)
    return nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=False), x, torch.randn(4, 5, 4, 4)


def test_float32_products_are_those_of_rounded_numbers_rounded_again(convolution):
    """Against float64; sums in another order may round to the neighbour, 2^-8 away."""
    plain, x, gradient = convolution
    with torch.autocast("cpu", torch.bfloat16):
        y = use_float32_products(copy.deepcopy(plain))(x)
    assert y.dtype == torch.bfloat16
    found = torch.autograd.grad(y, x, gradient.bfloat16())[0]
    rounded, weight = (tensor.detach().bfloat16().double().requires_grad_() for tensor in (x, plain.weight))
    exact = F.conv2d(rounded, weight, stride=2, padding=1)
    np.testing.assert_allclose(y.detach().float(), exact.detach(), rtol=2**-8, atol=1e-6)
    by_hand = torch.autograd.grad(exact, rounded, gradient.bfloat16().double())[0]
    np.testing.assert_allclose(found, by_hand, rtol=2**-8, atol=1e-6)


def test_float32_products_are_what_autocast_computes(convolution):
    plain, x, _ = convolution
    with torch.autocast("cpu", torch.bfloat16):
        one, two = plain(x), use_float32_products(copy.deepcopy(plain))(x)
    assert one.dtype == two.dtype == torch.bfloat16
    torch.testing.assert_close(one, two, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize(
    ("onednn", "instructions", "native"),
    [
        (True, {"architecture": "x86_64", "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, False),
        (True, {"architecture": "x86_64", "avx512_f": True, "avx512_bf16": True, "amx_bf16": False}, True),
        (True, {"architecture": "x86_64", "avx512_f": True, "avx512_bf16": False, "amx_bf16": True}, True),
        (True, {"architecture": "arm64", "bf16": True}, True),
        (False, {"architecture": "x86_64", "avx2": True}, False),
        (False, {"architecture": "arm64", "bf16": True}, False),
    ],
)
def test_bfloat16_is_native_only_where_there_are_instructions_for_it(monkeypatch, onednn, instructions, native):
    """oneDNN says it supports bfloat16 numbers on every AVX-512 processor, also by emulation."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)
    assert native_bfloat16(torch.device("cpu")) is native
    assert native_bfloat16(torch.device("cuda"))


def test_outside_autocast_convolutions_stay_what_they_are(convolution):
    plain, x, _ = convolution
    assert torch.equal(use_float32_products(copy.deepcopy(plain))(x), plain(x))


def test_a_network_with_float32_products_has_the_same_weights_under_the_same_names():
    network = backbone("resnet8")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    after = use_float32_products(network).state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(type(module) is nn.Conv2d for module in network.modules())


@pytest.mark.parametrize("depth", [2, 9, 33, -4])
def test_a_depth_that_is_not_6n_plus_2_is_refused(depth):
    with pytest.raises(MislasError, match=f"depth 6n \\+ 2 .*got {depth}"):
        CifarResNet(depth)


@pytest.mark.parametrize("name", ["vgg16", "resnet", "resnet26", "resnet32x", "ResNet32", ""])
def test_an_unknown_backbone_lists_the_known_ones(name):
    with pytest.raises(MislasError, match=f"unknown backbone '{name}'.* Known: .*resnet") as caught:
        backbone(name)
    listed = str(caught.value).partition("Known: ")[2].split(", ")
    assert sorted(listed) == sorted(f"resnet{d}" for d in (8, 10, 14, 18, 20, 32, 34, 44, 50, 56, 101, 110, 152))
    assert "\n" not in str(caught.value)


def test_the_nearest_backbone_is_named_first():
    with pytest.raises(MislasError, match="did you mean 'resnet32'\\? Known: resnet32, "):
        backbone("resnet32x")


# ------------------------------------------------------------------------------------------- torchvision's backbones

#: Parameters by torchvision's own models (their 1000-class fc included), and features.
TORCHVISION = {
    "resnet18": (11_689_512, 512),
    "resnet34": (21_797_672, 512),
    "resnet50": (25_557_032, 2048),
    "resnet101": (44_549_160, 2048),
    "resnet152": (60_192_808, 2048),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvisions_backbones_have_its_parameters_without_the_classifier(name):
    parameters, features = TORCHVISION[name]
    with torch.device("meta"):
        network = backbone(name)
        images = torch.empty(2, 3, 64, 64)
    assert network.num_features == features
    assert sum(p.numel() for p in network.parameters()) == parameters - 1000 * (features + 1)
    assert network(images).shape == (2, features)
    assert not [key for key in network.state_dict() if key.startswith("fc")]


def test_resnet10_has_one_basic_block_a_stage():
    network = backbone("resnet10")

    def conv(inputs, outputs, size=3):
        return size**2 * inputs * outputs + 2 * outputs

    def stage(inputs, outputs):
        shortcut = conv(inputs, outputs, 1) if outputs != inputs else 0
        return conv(inputs, outputs) + conv(outputs, outputs) + shortcut

    by_hand = conv(3, 64, 7) + stage(64, 64) + stage(64, 128) + stage(128, 256) + stage(256, 512)
    assert sum(p.numel() for p in network.parameters()) == by_hand
    assert network.num_features == 512
    assert network.eval()(torch.zeros(2, 3, 64, 64)).shape == (2, 512)


@pytest.fixture(scope="module")
def resnet18():
    """torchvision's own ResNet-18 with random weights, and images."""
    torch.manual_seed(0)
    network = torchvision.models.resnet18().eval()
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if name.endswith(("running_mean", "running_var")):
                value.uniform_(0.5, 1.5)
    return network, torch.randn(2, 3, 64, 64)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_of_torchvision_give_its_logits_before_fc(resnet18, suffix, tmp_path):
    original, images = resnet18
    path = tmp_path / f"weights{suffix}"
    save = torch.save if suffix == ".pth" else save_file
    save(original.state_dict(), path)
    network = backbone("resnet18")
    assert load_backbone_weights(network, path) == ["fc.bias", "fc.weight"]
    with torch.no_grad():
        torch.testing.assert_close(original.fc(network.eval()(images)), original(images))


def test_weights_without_counters_of_batches_load(resnet18, tmp_path):
    original, images = resnet18
    state = {k: v for k, v in original.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "old.pth")
    network = backbone("resnet18").eval()
    load_backbone_weights(network, tmp_path / "old.pth")
    with torch.no_grad():
        torch.testing.assert_close(original.fc(network(images)), original(images))


def without(state):
    del state["layer3.0.conv1.weight"]


def with_more(state):
    state["layer5.0.conv1.weight"] = torch.zeros(1)


def with_another_shape(state):
    state["conv1.weight"] = torch.zeros(64, 3, 3, 3)


def of_another_network(state):
    state.clear()
    state.update(backbone("resnet8").state_dict())


def not_a_state_dict(state):
    state["epoch"] = 3


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without, r"not of this backbone: it lacks 1 \(layer3.0.conv1.weight, ...\)"),
        (with_more, r"it has unknown 1 \(layer5.0.conv1.weight"),
        (with_another_shape, r"it has other shapes of 1 \(conv1.weight"),
        (of_another_network, r"it lacks 100 \(.*has unknown"),
        (not_a_state_dict, "does not hold a state dict"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_weights_that_do_not_fit_are_refused_and_change_nothing(resnet18, damage, message, tmp_path):
    state = dict(resnet18[0].state_dict())
    damage(state)
    torch.save(state, tmp_path / "w.pth")
    network = backbone("resnet18")
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(RecordError, match=message) as caught:
        load_backbone_weights(network, tmp_path / "w.pth")
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


class Evil:
    def __reduce__(self):
        return (open, ("executed", "w"))


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_unreadable_weights_are_one_line_and_execute_nothing(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network = backbone("resnet8")
    with pytest.raises(RecordError, match=f"there is no weights file {name}"):
        load_backbone_weights(network, name)
    for content in (b"", b"<html>404</html>", pickle.dumps({"conv.weight": Evil()}, 2)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RecordError, match=f"{name} cannot be read as weights") as caught:
            load_backbone_weights(network, name)
        assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_places_recipe_trains_the_last_block_only():
    with torch.device("meta"):
        network = backbone("resnet152")
    convolutions = {f"layer4.2.conv{i}.weight" for i in (1, 2, 3)}
    norms = {f"layer4.2.bn{i}.{kind}" for i in (1, 2, 3) for kind in ("weight", "bias")}
    assert set(freeze_but_last_block(network)) == convolutions | norms
    assert {name for name, p in network.named_parameters() if p.requires_grad} == convolutions | norms


def test_a_cifar_resnet_has_no_places_recipe():
    with pytest.raises(MislasError, match=r"one of resnet10, resnet18, .*resnet152"):
        freeze_but_last_block(backbone("resnet8"))


def test_a_stored_resnet10_comes_back_with_its_statistics(tmp_path):
    config = configure("tinyimagenet64", "ce", overrides={"backbone": "resnet10"})
    network, head = backbone("resnet10"), nn.Linear(512, 200)
    round_to_half(network), round_to_half(head)
    network.train()(torch.randn(4, 3, 64, 64))
    store = Store(tmp_path)
    store.put_weights(config, network, head)
    again, classifier = store.get_weights(config, 200)
    for one, two in ((network, again), (head, classifier)):
        assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())
    found = batch_norm_statistics(again)
    assert np.array_equal(found["bn_first_mean"], network.bn1.running_mean)
    assert found["bn_last_var"].shape == (512,)


def test_a_torchvision_backbone_trains_through_both_stages(monkeypatch, tmp_path, options):
    """On three classes of noise at 64 pixels: the loop, the store and the measures take it as they take ResNet-32."""
    monkeypatch.setitem(SPECS, "tinyimagenet64", Spec("Tiny", 3, 64, 6, padding=8))
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(256, (18, 64, 64, 3), dtype=torch.uint8, generator=rng)
    targets = torch.arange(18) % 3
    data = Dataset("tinyimagenet64", 1.0, images, targets, images[:6], targets[:6], ("a", "b", "c"))
    monkeypatch.setattr("mislas.runs.load", lambda *args, **kwargs: data)
    changes = {"backbone": "resnet10", "stage1.epochs": 1, "stage2.epochs": 1, "stage1.batch_size": 9}
    changes |= {"stage2.batch_size": 9, "precision": "fp32"}
    (record,) = run(configure("tinyimagenet64", "mislas", 1, 0, changes), Store(tmp_path), None, options)
    assert record.metrics["nll"] > 0
    assert record.arrays()["bn_last_mean"].shape == (512,)


def test_kaiming_weights_have_the_deviation_of_he_and_follow_the_generator():
    layers = [nn.Linear(500, 400), nn.Linear(500, 400)]
    for layer in layers:
        init_kaiming(layer, torch.Generator().manual_seed(3))
    assert torch.equal(layers[0].weight, layers[1].weight)
    assert layers[0].weight.std().item() == pytest.approx((2 / 500) ** 0.5, rel=0.01)
    assert not layers[0].bias.any()


# ------------------------------------------------------------------------------------------ a backbone of one's own


class Patches(nn.Module):
    """Patches, a mark for each channel, layer norm, their mean."""

    def __init__(self, num_features=5):
        super().__init__()
        self.num_features = num_features
        self.cut = nn.Conv2d(3, 5, 4, stride=4)
        self.mark = nn.Parameter(torch.randn(5, 1, 1))
        self.norm = nn.LayerNorm(5)

    def forward(self, images):
        return self.norm((self.cut(images) + self.mark).relu().mean(dim=(2, 3)))


ON_PATCHES = {"backbone": "patches", "stage1.epochs": 2, "stage2.epochs": 1}


def test_a_backbone_of_ones_own_trains_through_both_stages_and_comes_back(monkeypatch, tmp_path, options):
    monkeypatch.setitem(BACKBONES, "patches", Patches)
    config = configure("digits", "crt", 10, 0, ON_PATCHES)
    store = Store(tmp_path)
    (record,) = run(config, store, None, options)
    assert record.metrics["nll"] > 0
    assert not [name for name in record.arrays() if name.startswith("bn_")]
    network, head = store.get_weights(config.stage1_only, 10)
    assert isinstance(network, Patches)
    assert head.in_features == 5
    assert run(config, store, None, options) == [record]


def test_all_its_weights_are_the_seeds(monkeypatch, tmp_path, options):
    monkeypatch.setitem(BACKBONES, "patches", Patches)
    found = []
    for seed, folder in ((0, "a"), (0, "b"), (1, "c")):
        torch.manual_seed(len(found))
        config = configure("digits", "ce", 10, seed, {"backbone": "patches", "stage1.epochs": 1, "stage1.lr": 1e-12})
        before = torch.get_rng_state()
        run(config, Store(tmp_path / folder), None, options)
        assert torch.equal(torch.get_rng_state(), before)
        found.append(Store(tmp_path / folder).get_weights(config, 10)[0].mark)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("method", ["mislas", "lws+shift", "ncm"])
def test_without_batch_norm_there_is_nothing_to_shift(monkeypatch, tmp_path, options, method):
    monkeypatch.setitem(BACKBONES, "patches", Patches)
    changes = {"stage2.shift_epochs": 1} if method == "ncm" else {}
    changes |= {k: v for k, v in ON_PATCHES.items() if method != "ncm" or not k.startswith("stage2")}
    with pytest.raises(MislasError, match=r"no batch norm .* set stage2.shift_bn=false"):
        run(configure("digits", method, 10, 0, changes), Store(tmp_path), None, options)
    assert not list(tmp_path.rglob("*.*"))  # nothing was trained


def test_a_backbone_must_say_how_many_features_it_has(monkeypatch):
    monkeypatch.setitem(BACKBONES, "patches", lambda: Patches(num_features=None))
    with pytest.raises(MislasError, match=r"'patches' must say how many features .* num_features"):
        backbone("patches")


def test_a_network_in_place_of_what_makes_it_says_so(monkeypatch):
    monkeypatch.setitem(BACKBONES, "patches", Patches())
    with pytest.raises(MislasError, match=r"BACKBONES\['patches'\] must be a function that makes a network"):
        backbone("patches")


def test_a_backbone_must_give_the_features_that_it_says_it_does(monkeypatch, tmp_path, options):
    monkeypatch.setitem(BACKBONES, "patches", lambda: Patches(num_features=6))
    with pytest.raises(MislasError, match=r"\(B, 3, 8, 8\) into features \(B, 6\), .* two images gave \(2, 5\)"):
        run(configure("digits", "crt", 10, 0, ON_PATCHES), Store(tmp_path), None, options)
    assert not list(tmp_path.rglob("*.*"))


class Marked(nn.Module):
    """Batch norm and dropout, and weights that their maker has set."""

    num_features = 3

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Dropout(0.5)
        nn.init.constant_(self.conv.weight, 0.25)

    def forward(self, images):
        self.seen = self.drop(self.norm(self.conv(images)))
        return self.seen.mean(dim=(2, 3))


def test_a_backbone_of_ones_own_starts_as_it_was_made(monkeypatch, tmp_path, options):
    monkeypatch.setitem(BACKBONES, "marked", Marked)
    config = configure("digits", "ce", 10, 0, {"backbone": "marked", "epochs": 1, "lr": 1e-12})
    run(config, Store(tmp_path), None, options)
    assert Store(tmp_path).get_weights(config, 10)[0].conv.weight.detach().unique().tolist() == [0.25]


def test_shifted_batch_norm_moves_its_averages_and_leaves_dropout_off():
    network = Marked().train()
    train_batch_norm(network)
    before = network.norm.running_mean.clone()
    with torch.no_grad():
        network(torch.rand(8, 3, 5, 5) + 1)
    assert not torch.equal(network.norm.running_mean, before)
    assert (network.seen != 0).all()
    assert [m.training for m in (network, network.conv, network.norm, network.drop)] == [False, False, True, False]


@pytest.mark.parametrize(
    ("forward", "says"),
    [
        (lambda images: (images, images), "two images gave a tuple"),
        (lambda images: nn.Linear(5, 3)(images.flatten(1)), "with two images it raises RuntimeError: mat1 and mat2"),
    ],
)
def test_a_backbone_that_fails_says_on_what(monkeypatch, forward, says):
    network = Marked()
    network.forward = forward
    monkeypatch.setitem(BACKBONES, "marked", lambda: network)
    with pytest.raises(MislasError, match=rf"'marked' must turn images \(B, 3, 8, 8\) .*{says}"):
        check_backbone("marked", 8, False)


@pytest.mark.parametrize(
    ("layer", "found"), [(nn.BatchNorm1d(5), True), (nn.BatchNorm2d(5, track_running_stats=False), False)]
)
def test_batch_norm_is_what_has_running_statistics(layer, found):
    assert batch_norms(nn.Sequential(nn.Flatten(), layer)) == [layer] * found


def test_only_a_resnet_has_a_last_block_to_double_or_a_place_for_attention(monkeypatch):
    monkeypatch.setitem(BACKBONES, "patches", Patches)
    with pytest.raises(MislasError, match="attention is one more block of a ResNet, got 'patches'"):
        configure("digits", "oltr", 10, 0, {"backbone": "patches"})
    with pytest.raises(MislasError, match="doubles the last block of a ResNet, got 'patches'"):
        configure("digits", "bbn", 10, 0, {"backbone": "patches"})


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
    plain = nn.Linear(stage1.in_features, stage1.out_features, bias=False).to(X)
    torch.testing.assert_close(GeneralisedClassifier(plain, **kind)(X), plain(X))


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
        torch.testing.assert_close(network(x, which), plain(x))
        del plain.blocks[-1]
    torch.testing.assert_close(network(x), mix_branches(network(x, 0), network(x, 1), 0.5))
    assert network(x).shape == (2, network.num_features)


def test_stage1_has_the_classifier_and_the_branches_that_are_asked_for():
    network, head = stage1_model("resnet8", 10)
    assert (type(network), type(head), head.in_features) == (CifarResNet, nn.Linear, 64)
    network, head = stage1_model("resnet8", 10, scale=30.0, two_branches=True)
    assert (type(network), type(head), head.weight.shape) == (TwoBranches, CosineClassifier, (10, 128))
