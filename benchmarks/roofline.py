"""What a step would take if the device did nothing but its arithmetic, or nothing but move its data: the longer of the
two is the roofline (Williams et al., 2009). No way to run the step can be faster, but by doing other work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from mislas.models import native_bfloat16


class ByteCounter(TorchDispatchMode):
    """Within it, ``total`` grows by the bytes of the tensors that each operation reads and writes.

    Views and memory that is only reserved count nothing. Operations are counted one by one, as eager execution runs
    them: one that a compiler fuses with its neighbours moves less.
    """

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if not func.is_view and not func.__name__.startswith(("empty", "new_empty")):
            tensors = [leaf for leaf in tree_leaves((args, kwargs, found)) if isinstance(leaf, Tensor)]
            self.total += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return found


def work(step: Callable[[], Any]) -> tuple[int, int]:
    """FLOPs (matrix products and convolutions; a multiplication and an addition are two) and bytes of one step."""
    with FlopCounterMode(display=False) as flops:
        step()
    with ByteCounter() as moved:
        step()
    return flops.get_total_flops(), moved.total


def peaks(device: torch.device, seconds: float = 0.3) -> tuple[float, float]:
    """What the device reaches: FLOP/s of a large matrix product, and bytes/s of a large copy.

    The product is of bfloat16 numbers where the device multiplies those itself, of float32 ones elsewhere.
    """
    side, size = (8192, 2**28) if device.type == "cuda" else (2048, 2**26)
    numbers = torch.bfloat16 if native_bfloat16(device) else torch.float32
    matrix = torch.randn(side, side, device=device, dtype=numbers)
    source = torch.zeros(size, device=device)  # float32: too large for any cache
    product = Timer("a @ a", globals={"a": matrix}, num_threads=torch.get_num_threads())
    copy = Timer("b.copy_(a)", globals={"a": source, "b": source.clone()}, num_threads=torch.get_num_threads())
    flops = 2 * side**3 / product.blocked_autorange(min_run_time=seconds).median
    return flops, 2 * 4 * size / copy.blocked_autorange(min_run_time=seconds).median


def roofline_seconds(flops: float, moved: float, flop_rate: float, byte_rate: float) -> float:
    """The least time that work takes at some rates."""
    return max(flops / flop_rate, moved / byte_rate)
