"""Several processes that train one run together, one per GPU, started by ``torchrun``::

    torchrun --nproc-per-node 4 -m mislas.cli train --dataset imagenet-lt --method mislas --data-root data

Every process runs the backbone on its piece of a batch. Then the features of all pieces are gathered, and what follows,
classifiers, losses and measures, every process computes on the whole batch. Batch norm's statistics are those of the
whole batch, and mixup mixes across the pieces. So the numbers are those of one process, up to rounding, and how many
there are is no part of a run's identity. With one process nothing here does anything.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .errors import MislasError

T = TypeVar("T")


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, ``0 .. world() - 1``; 0 writes the store and speaks to the user."""
    return dist.get_rank() if world() > 1 else 0


def local_rank() -> int:
    """Which of the processes on its machine this is: the GPU it takes."""
    return int(os.environ.get("LOCAL_RANK", 0))


def processors() -> int:
    """The processors that this process may use, of those of its machine, when all processes there share them; at
    least 1."""
    may = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, may // int(os.environ.get("LOCAL_WORLD_SIZE", world())))


@contextmanager
def started(device: str | None = None) -> Iterator[None]:
    """Join the processes that ``torchrun`` (or Slurm) has started, and leave them at the end.

    They find each other by the environment: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT. Without them, or
    with a world of one, this is a process on its own.

    Args:
        device: what they will train on, as :class:`mislas.train.Options` has it; with ``"cpu"`` no GPU is taken.
    """
    size = os.environ.get("WORLD_SIZE") or "1"
    if not size.isdecimal():
        raise MislasError(f"WORLD_SIZE says how many processes train together, a number, got {size!r}; unset it")
    if int(size) == 1:
        yield
        return
    on_gpus = torch.cuda.is_available() and device != "cpu"
    if on_gpus:
        torch.cuda.set_device(local_rank())
    try:
        store, which, of = next(dist.rendezvous("env://"))
    except ValueError as error:
        raise MislasError(
            f"WORLD_SIZE says that {size} processes train together, but "
            f"{' '.join(str(error).split())}; start them by torchrun, or unset WORLD_SIZE"
        ) from None
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # addresses of processes that died may still be there
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpus else "gloo",
        store=dist.PrefixStore(f"mislas/{attempt}", store), rank=which, world_size=of,
    )  # fmt: skip
    try:
        yield
    finally:
        dist.destroy_process_group()


def check_batch_size(batch_size: int, of: int | None = None) -> None:
    """Raise :class:`MislasError` if a batch cannot be shared evenly by the processes, or by ``of`` of them."""
    of = of or world()
    if batch_size % of:
        raise MislasError(
            f"a batch of {batch_size} images cannot be shared evenly by {of} processes; start a number of them that "
            "divides it"
        )


def piece(n: int, which: int | None = None, of: int | None = None) -> slice:
    """The places of a process in a batch of ``n`` images, its own or another's.

    Pieces are in order, disjoint, together the whole batch, and differ in length by at most 1: the last batch of an
    epoch is as long as it is, and if it has fewer images than there are processes some pieces are empty.
    """
    which, of = (rank() if which is None else which), (of or world())
    return slice(n * which // of, n * (which + 1) // of)


# ---------------------------------------------------------------------------------------------------- across processes


def gather(part: Tensor, n: int | None = None) -> Tensor:
    """The whole batch ``(n, ...)`` from the pieces of all processes, differentiable.

    Every process is taken to compute the same loss of the whole batch. So the gradient that reaches a piece is complete
    already, and comes multiplied by the number of processes, over which :class:`DistributedDataParallel` averages.

    Args:
        part: what this process has, ``(b, ...)``.
        n: images of the whole batch; None asks the other processes.
    """
    if world() == 1:
        return part
    if n is None:
        count = torch.tensor(len(part), device=part.device)
        dist.all_reduce(count)
        n = int(count)
    return _Gather.apply(part, n)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, n: int) -> Tensor:
        ctx.n, pieces = n, [piece(n, other) for other in range(world())]
        sent = part.new_zeros(-(-n // world()), *part.shape[1:])
        sent[: len(part)] = part
        received = [torch.empty_like(sent) for _ in pieces]
        dist.all_gather(received, sent)
        return torch.cat([got[: p.stop - p.start] for got, p in zip(received, pieces, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[piece(ctx.n)] * world(), None


class _Sum(torch.autograd.Function):
    """The sum over all processes; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Sum.forward(ctx, gradient)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Make the gradients of all processes equal, where they are equal but for rounding: replicas must not drift."""
    if world() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def agree(value: T | Callable[[], T]) -> T:
    """What process 0 has; a function is called there alone.

    Raises:
        MislasError, OSError: what the function raises, in every process; after another exception the others wait until
            the first has ended.
    """
    if world() == 1:
        return value() if callable(value) else value
    box: list[Any] = [None, None]
    if rank() == 0:
        try:
            box[0] = value() if callable(value) else value
        except (MislasError, OSError) as error:
            box[1] = error
    dist.broadcast_object_list(box)
    if box[1] is not None:
        raise box[1]
    return box[0]


@contextmanager
def first() -> Iterator[None]:
    """Process 0 goes before the others: what it writes (a cache, say) they find."""
    if rank() > 0:
        dist.barrier()
    try:
        yield
    finally:
        if world() > 1 and rank() == 0:
            dist.barrier()


# -------------------------------------------------------------------------------------------------------- the network


class SyncedBatchNorm(nn.BatchNorm2d):
    """Batch norm over the pieces of all processes; :class:`torch.nn.SyncBatchNorm` is for GPUs only."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        wide = x.float()
        sums = torch.cat([wide.sum(dim=(0, 2, 3)), wide.new_tensor([x.numel() / x.shape[1]])])
        sums = _Sum.apply(sums)
        n = sums[-1].detach()
        mean = sums[:-1] / n
        centred = wide - mean.view(-1, 1, 1)
        var = _Sum.apply(centred.square().sum(dim=(0, 2, 3))) / n
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        return (centred * scale.view(-1, 1, 1) + self.bias.view(-1, 1, 1)).to(x.dtype)


def synchronise_batch_norm(network: nn.Module) -> None:
    """Let batch norm take its statistics over the pieces of all processes, in place; parameters stay what they are.

    Raises:
        MislasError: batch norm of another kind than the usual, of which each process would keep statistics of its own.
    """
    if world() == 1:
        return
    for layer in network.modules():
        usual = type(layer) in (nn.BatchNorm2d, SyncedBatchNorm, nn.SyncBatchNorm)
        as_made = usual and layer.affine and layer.track_running_stats and layer.momentum is not None
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and not as_made:
            raise MislasError(
                "several processes train together with a BatchNorm2d that has scale, shift and running averages; the "
                f"backbone has {layer}: use one process, or another backbone"
            )
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.BatchNorm2d:
                if child.weight.device.type == "cuda":
                    setattr(parent, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))
                else:
                    child.__class__ = SyncedBatchNorm


def replicate(network: nn.Module) -> nn.Module:
    """The network as it is called in training: with DDP around it if it has anything to learn."""
    synchronise_batch_norm(network)
    if world() == 1 or not any(p.requires_grad for p in network.parameters()):
        return network
    with warnings.catch_warnings():  # newer versions of torch warn of the argument, older ones have no other
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(network, broadcast_buffers=False, gradient_as_bucket_view=True)
