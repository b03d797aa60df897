"""How fast training is here, as ratios in one run.

Stage-1:

- usual: PIL images, torchvision transforms, DataLoader workers, eager, float32, batches of 128.
- ours: what ``mislas train`` runs.
- bare: ours without data: the same forward, backward and step, over and over on one resident batch.
- roofline: that step's arithmetic and memory traffic at the rates that this device reaches for each alone.
- together: several models like ours at once (never compiled).
- at once: as many processes as this one has threads, each doing what bare does, on one thread (only on a CPU).

Stage-2:

- one head: MiSLAS alone.
- grid: the 21 cells of Figures 5 and 10 on one pass through the backbone.

All take turns, so that a machine whose speed drifts treats them alike. Images are random: only time is measured.

    python benchmarks/train.py [--images 2560] [--repeats 5] [--compile] [--device cpu] [--together 2] [--save FILE]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing.synchronize import Barrier
from pathlib import Path

import torch
import torch.nn.functional as F
from roofline import peaks, roofline_seconds, work
from torch import get_num_threads, nn

from mislas import Dataset, Options, RunConfig, configure
from mislas.models import backbone, native_bfloat16, use_float32_products
from mislas.runs import provenance
from mislas.study import GRID
from mislas.together import train_together
from mislas.train import stage1_run, train_stage1, train_stage2

BATCH, BACKBONE = 128, "resnet32"


def random_data(images: int) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (images, 32, 32, 3), dtype=torch.uint8, generator=generator)
    targets = torch.arange(images) % 10
    return Dataset("cifar10", 1.0, pixels, targets, pixels[:10], targets[:10], tuple("0123456789"))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def sgd(network: nn.Module, **kwargs) -> torch.optim.SGD:
    return torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4, **kwargs)


def usual(data: Dataset, device: torch.device) -> Callable[[], float]:
    from usual import usual_epoch, usual_loader  # here: processes that compute at once need no torchvision

    network = nn.Sequential(backbone(BACKBONE), nn.Linear(64, 10)).to(device).train()
    optimizer = sgd(network)
    loader = usual_loader(data, BATCH, device)

    def epoch() -> float:
        start = time.perf_counter()
        usual_epoch(network, loader, optimizer, device)
        synchronize(device)
        return time.perf_counter() - start

    return epoch


def second_epoch(train: Callable[[Callable], object], device: torch.device, models: int = 1) -> Callable[[], float]:
    """Seconds of the second of three epochs of the real loop, by the number of models that train in it; the first
    epoch, which warms up and compiles, is not timed."""

    def epoch() -> float:
        marks = []

        def mark(network: nn.Module, heads: list[nn.Module]) -> list[dict]:
            synchronize(device)
            marks.append(time.perf_counter())
            return [{} for _ in heads]

        train(mark)
        return (marks[2 * models - 1] - marks[models - 1]) / models  # each leaves a mark after an epoch

    return epoch


def ours(data: Dataset, options: Options) -> Callable[[], float]:
    config = configure("cifar10", "ce", 1, overrides={"epochs": 3, "backbone": BACKBONE})
    return second_epoch(lambda mark: train_stage1(config, data, options, evaluate=mark), options.torch_device())


def together(n: int, data: Dataset, options: Options) -> Callable[[], float]:
    configs = [configure("cifar10", "ce", 1, seed, {"epochs": 3, "backbone": BACKBONE}) for seed in range(n)]

    def train(mark: Callable) -> None:
        list(train_together([stage1_run(config, data, options, evaluate=mark) for config in configs], options))

    return second_epoch(train, options.torch_device(), n)


def stage2(configs: list[RunConfig], data: Dataset, options: Options) -> Callable[[], float]:
    model = backbone(BACKBONE), nn.Linear(64, 10)
    return second_epoch(lambda mark: train_stage2(configs, model, data, options, evaluate=mark), options.torch_device())


def bare_step(options: Options) -> Callable[[], None]:
    device = options.torch_device()
    network = nn.Sequential(backbone(BACKBONE), nn.Linear(64, 10))
    network = network.to(device, memory_format=torch.channels_last).train()
    if not native_bfloat16(device):
        use_float32_products(network)
    forward = torch.compile(network, dynamic=False) if options.compile else network
    optimizer = sgd(network, fused=True)
    images = torch.randn(BATCH, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    targets = torch.arange(BATCH, device=device) % 10

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            logits = forward(images)
        loss = F.cross_entropy(logits.float(), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def bare(data: Dataset, options: Options) -> Callable[[], float]:
    step, device = bare_step(options), options.torch_device()

    def epoch() -> float:
        start = time.perf_counter()
        for _ in range(len(data.train_targets) // BATCH):
            step()
        synchronize(device)
        return time.perf_counter() - start

    return epoch


def start_beside(images: int, options: Options, barrier: Barrier) -> None:
    """What each of the processes that compute at once begins with."""
    global beside
    torch.set_num_threads(1)
    beside = barrier, bare(random_data(images), options)
    beside[1]()  # warms up, and compiles


def epoch_beside(_: int) -> float:
    barrier, epoch = beside
    barrier.wait()  # each process takes one epoch, and all begin together
    return epoch()


def at_once(processes: int, data: Dataset, options: Options) -> Callable[[], float]:
    context = multiprocessing.get_context("spawn")
    arguments = len(data.train_targets), options, context.Barrier(processes)
    pool = ProcessPoolExecutor(processes, context, start_beside, arguments)
    return lambda: max(pool.map(epoch_beside, range(processes))) / processes


def roofline(data: Dataset, options: Options) -> Callable[[], float]:
    step = bare_step(replace(options, compile=False))
    step()  # the optimiser's state is made in the first one
    flops, moved = work(step)

    def epoch() -> float:
        return len(data.train_targets) / BATCH * roofline_seconds(flops, moved, *peaks(options.torch_device()))

    return epoch


RATIOS = [  # name, the time above, the time below
    ("ours against the usual loop", "usual", "ours"),
    ("ours against bare computation", "bare", "ours"),
    ("ours against the roofline", "roofline", "ours"),
    ("ours, compiled against not", "not compiled", "ours"),
    ("{together} models together against one after another", "ours", "together"),
    ("{threads} processes at once, a thread each, against one of {threads} threads", "bare", "at once"),
    ("the grid of 21 against one run, cost", "grid", "one head"),
]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2560, help="images in an epoch, a multiple of 128")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="compile the network, and compare with not doing so")
    parser.add_argument("--device")
    parser.add_argument("--together", type=int, default=2, metavar="N", help="models that train at once (default: 2)")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write what was measured as JSON")
    arguments = parser.parse_args(argv)
    options = Options(arguments.device, arguments.compile, eval_every=1, progress=False)
    device, data = options.torch_device(), random_data(arguments.images // BATCH * BATCH)
    three = {"stage2.epochs": 3, "backbone": BACKBONE}
    grid = [configure("cifar10", "mislas", 1, overrides=three | cell) for cell in GRID]
    loops = {
        "usual": usual(data, device),
        "ours": ours(data, options),
        "bare": bare(data, options),
        "roofline": roofline(data, options),
        "together": together(arguments.together, data, replace(options, compile=False)),
        "one head": stage2(grid[-1:], data, options),
        "grid": stage2(grid, data, options),
    }
    if options.compile:
        loops["not compiled"] = ours(data, replace(options, compile=False))
    threads = get_num_threads()
    if device.type == "cpu" and threads > 1:
        loops["at once"] = at_once(threads, data, options)
    for name in loops.keys() & {"usual", "bare", "at once"}:  # the others leave out their first epoch
        loops[name]()
    seconds = {name: [] for name in loops}
    for _ in range(arguments.repeats):
        for name, epoch in loops.items():
            seconds[name].append(epoch())
    source = provenance(data, options, 0.0)
    found = {key: source[key] for key in ("device", "torch", "threads", "compile", "commit")} | {
        "date": source["date"][:10],
        "images": len(data.train_targets),
        "repeats": arguments.repeats,
        "images_per_second": {name: spread([len(data.train_targets) / s for s in seconds[name]]) for name in loops},
        "ratios": {
            name.format(together=arguments.together, threads=threads): spread(
                [a / b for a, b in zip(seconds[top], seconds[bottom], strict=True)]
            )
            for name, top, bottom in RATIOS
            if top in loops and bottom in loops
        },
    }
    print("{device}, torch {torch}, {threads} threads, compile={compile}".format(**found))
    for name, (middle, low, high) in found["images_per_second"].items():
        print(f"{name:12} {middle:8.0f} images/s   ({low:.0f} .. {high:.0f})")
    for name, (middle, low, high) in found["ratios"].items():
        print(f"{name}: {middle:.2f}   ({low:.2f} .. {high:.2f})")
    if arguments.save:
        arguments.save.parent.mkdir(parents=True, exist_ok=True)
        arguments.save.write_text(json.dumps(found, indent=1) + "\n")


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median, least and greatest."""
    return statistics.median(values), min(values), max(values)


if __name__ == "__main__":
    main()
