"""What the machine can do: copying at a case's footprint, float32 arithmetic."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch


class Roof(NamedTuple):
    """A call that keeps one resource busy, how much of it a call uses, and how it does that."""

    call: Callable[[], object]
    amount: int
    name: str


def copy(num_bytes: int, device: torch.device, num_copies: int = 1) -> Roof:
    """Reads and writes ``num_bytes`` in all, in turn between ``num_copies`` pairs of buffers."""
    half = max(num_bytes, 2**16) // 2
    pairs = [torch.zeros(2, half, dtype=torch.uint8, device=device) for _ in range(num_copies)]
    turn = itertools.cycle([(target, source) for target, source in pairs])

    def call() -> None:
        target, source = next(turn)
        target.copy_(source)

    return Roof(call, 2 * half, "torch copy")


def arithmetic(device: torch.device) -> Roof:
    """Float32 multiply-adds of a matrix product."""
    n = 640 if device.type == "cpu" else 4096
    a = torch.full((n, n), 1 / n, device=device)
    out = torch.empty_like(a)
    return Roof(lambda: torch.mm(a, a, out=out), 2 * n**3, "torch float32 matrix product")
