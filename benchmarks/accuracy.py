"""Do two ways of training reach the same accuracy? One schedule in both, for several seeds:

- usual: PIL images, torchvision transforms, DataLoader workers, eager float32, torch's SGD.
- ours: what ``mislas train`` runs: bfloat16, channels-last, fused SGD, augmentation on the device.

Network, initial distribution, learning rates, weight decay and epochs are the same; each way draws its own randomness,
so that a seed of one has nothing to do with the same seed of the other. Measured is test accuracy at the last epoch.
With --save every run is kept as it ends: the same command goes on where it was stopped.

    python benchmarks/accuracy.py --dataset cifar10-jpeg --data-root data --save benchmarks/results/accuracy-mine.json
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.stats import t
from torch import nn
from tqdm import tqdm
from usual import usual_epoch, usual_loader

from mislas import Dataset, MislasError, Options, RunConfig, configure, load
from mislas.batches import plain_images
from mislas.data import SPECS, write_atomically
from mislas.evaluate import predict
from mislas.models import init_kaiming, stage1_model
from mislas.runs import device_name, provenance
from mislas.train import learning_rate_factor, train_stage1

CONFIDENCE = 0.95


def usual(config: RunConfig, data: Dataset, options: Options) -> tuple[nn.Module, nn.Module]:
    stage, device = config.stage1, options.torch_device()
    torch.manual_seed(config.seed)
    network = nn.Sequential(*stage1_model(config.backbone, data.num_classes))
    init_kaiming(network, torch.default_generator)
    network.to(device)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=stage.lr, momentum=stage.momentum, weight_decay=stage.weight_decay
    )
    loader = usual_loader(data, stage.batch_size, device)
    for epoch in tqdm(range(stage.epochs), f"usual, seed {config.seed}", leave=False, disable=not options.progress):
        for group in optimizer.param_groups:
            group["lr"] = stage.lr * learning_rate_factor(stage, epoch)
        usual_epoch(network, loader, optimizer, device, stage.mixup)
    return network[0], network[1]


def ours(config: RunConfig, data: Dataset, options: Options) -> tuple[nn.Module, nn.Module]:
    trained = train_stage1(config, data, options)
    return trained.backbone, trained.heads[0]


WAYS: dict[str, Callable] = {"usual": usual, "ours": ours}


def measure(way: str, config: RunConfig, data: Dataset, options: Options) -> dict[str, Any]:
    """A way of training, its seed and test accuracy (0..1), and where and when it was measured."""
    start = time.perf_counter()
    network, head = WAYS[way](config, data, options)
    seconds = time.perf_counter() - start
    (logits,) = predict(network, [head], plain_images(data, options))
    accuracy = (logits.argmax(1) == data.test_targets).double().mean().item()
    return {"way": way, "seed": config.seed, "accuracy": round(accuracy, 6), **provenance(data, options, seconds)}


def compare(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation of both ways, and ours minus usual with Welch's interval, in points of accuracy.

    A standard deviation takes two runs; without it there is no interval. What is not there is None.
    """
    values = {way: [100 * run["accuracy"] for run in runs if run["way"] == way] for way in WAYS}
    found: dict[str, Any] = {
        way: {
            "runs": len(some),
            "mean": statistics.mean(some) if some else None,
            "deviation": statistics.stdev(some) if len(some) > 1 else None,
        }
        for way, some in values.items()
    }
    found |= {"difference": None, "standard_error": None, "interval": None}
    if all(values.values()):
        first, second = (statistics.mean(some) for some in values.values())
        found["difference"] = second - first
    if all(len(some) > 1 for some in values.values()):
        parts = [(statistics.variance(some) / len(some), len(some) - 1) for some in values.values()]
        variance = sum(part for part, _ in parts)
        freedom = variance**2 / sum(part**2 / n for part, n in parts) if variance else 1
        half = t.ppf((1 + CONFIDENCE) / 2, freedom) * math.sqrt(variance)
        found["standard_error"] = math.sqrt(variance)
        found["interval"] = [found["difference"] - half, found["difference"] + half]
    return found


def stored(path: Path | None, setting: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs that a file has; :class:`MislasError` if it is of another setting."""
    if path is None or not path.exists():
        return []
    try:
        content = json.loads(path.read_text())
        known, runs = content["setting"], content["runs"]
    except (ValueError, KeyError, TypeError) as error:
        raise MislasError(f"{path} cannot be read ({type(error).__name__}); delete it, or name another file") from error
    other = [key for key in setting if known.get(key) != setting[key]]
    if other:
        raise MislasError(
            f"{path} was measured with {other[0]} {known.get(other[0])!r}, not {setting[other[0]]!r}; name another file"
        )
    return runs


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="digits", metavar="NAME", help=f"one of: {', '.join(SPECS)}")
    parser.add_argument("--data-root", metavar="DIR", help="folder with the images; digits needs none")
    parser.add_argument("--imbalance", type=float, default=100, metavar="IF")
    parser.add_argument("--method", choices=("ce", "mixup"), default="ce")
    parser.add_argument("--epochs", type=int, metavar="N", help="default: the method's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--compile", action="store_true", help="fuse our backbone with torch.compile")
    parser.add_argument("--device")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--save", type=Path, metavar="FILE", help="keep every run as it ends, as JSON")
    arguments = parser.parse_args(argv)
    try:
        accuracy(arguments)
    except MislasError as error:
        print(f"accuracy.py: {error}", file=sys.stderr)
        return 2
    return 0


def accuracy(arguments: argparse.Namespace) -> None:
    options = Options(arguments.device, arguments.compile, eval_every=2**31, progress=not arguments.quiet)
    changes = {"precision": "bf16"} | ({} if arguments.epochs is None else {"epochs": arguments.epochs})
    configs = [
        configure(arguments.dataset, arguments.method, arguments.imbalance, seed, changes) for seed in arguments.seeds
    ]
    first = configs[0]
    if first.dataset not in SPECS:
        raise MislasError(f"the usual loop here is for images that fit in memory: {', '.join(SPECS)}")
    data = load(first.dataset, arguments.data_root, first.imbalance)
    setting = {
        "dataset": first.dataset,
        "data_checksum": data.checksum,
        "imbalance": first.imbalance,
        "method": first.method,
        "epochs": first.stage1.epochs,
        "device": device_name(options.torch_device()),
        "compile": options.compile,
    }
    runs = stored(arguments.save, setting)
    have = {(run["way"], run["seed"]) for run in runs}
    todo = [(config, way) for config in configs for way in WAYS if (way, config.seed) not in have]
    for config, way in todo:
        runs.append(measure(way, config, data, options))
        if arguments.save:
            content = {"setting": setting, "found": compare(runs), "runs": runs}
            text = json.dumps(content, indent=1) + "\n"
            write_atomically(arguments.save, lambda handle, text=text: handle.write(text.encode()))
        print("seed {seed}, {way}: {accuracy:.2%} in {seconds:.0f} s".format(**runs[-1]), flush=True)
    found = compare(runs)
    print("{dataset} IF={imbalance:g}, {method}, {epochs} epochs, {device}, compile={compile}".format(**setting))
    for way in WAYS:
        print(f"{way:10} {found[way]['mean']:.2f} % of {found[way]['runs']} runs{deviation(found[way]['deviation'])}")
    print(f"ours minus usual: {found['difference']:+.2f} points", end="")
    if found["interval"]:
        low, high = found["interval"]
        print(
            f", standard error {found['standard_error']:.2f}, {CONFIDENCE:.0%} interval {low:+.2f} .. {high:+.2f}",
            end="",
        )
    print()


def deviation(value: float | None) -> str:
    return "" if value is None else f", standard deviation {value:.2f}"


if __name__ == "__main__":
    sys.exit(main())
