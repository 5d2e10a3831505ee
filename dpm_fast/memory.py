"""How much memory a call takes, and the largest batch that a given amount is enough for."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dpm_fast.noise import as_integer

_UNITS = {
    prefix + unit: base**power
    for power, prefix in enumerate(("", "k", "m", "g", "t"))
    for unit, base in (("b", 1000), ("ib", 1024))
    if prefix or unit == "b"
}
# A batch is tried that is so much larger than one whose peak is known.
_GROWTH = 16


def num_bytes(amount: int | str, name: str) -> int:
    """An amount of memory: bytes, or a number with a unit as "2GiB", "512 MiB", "1.5GB".

    Raises:
        TypeError, ValueError: for anything else.
    """
    number = as_integer(amount)
    if isinstance(amount, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?) *([a-z]*)", amount.strip().lower())
        if match and (match[2] or "b") in _UNITS and (match[2] or match[1].isdigit()):
            number = int(float(match[1]) * _UNITS[match[2] or "b"])
    elif number is None:
        raise TypeError(f"{name} must be bytes or text as '2GiB', got {type(amount).__name__}")
    if number is None or number < 1:
        raise ValueError(
            f"{name} must be a positive number of bytes, or one of B, kB ... TB, KiB ... TiB as "
            f"'2GiB', got {amount!r}"
        )
    return number


def largest_batch(
    call: Callable[[int], object], most: int, max_bytes: int, device: torch.device
) -> int:
    """The largest batch of at most ``most`` whose call takes no more than ``max_bytes``.

    A few calls are made to find out, the last of them of the batch that is returned.

    Args:
        call: does the work of a batch of so many.

    Raises:
        ValueError: where a batch of one takes more.
    """
    size, peak = 1, peak_bytes(partial(call, 1), device)
    if peak > max_bytes:
        raise ValueError(
            f"max_memory must be enough for a batch of one pair, {peak} bytes, got {max_bytes}"
        )
    slope = float(peak)  # bytes of one more
    while True:
        guess = min(most, size + int((max_bytes - peak) / slope), _GROWTH * size)
        if guess <= 1.05 * size:
            return size
        peak_of_guess = peak_bytes(partial(call, guess), device)
        slope = max(1.0, (peak_of_guess - peak) / (guess - size))
        if peak_of_guess > max_bytes:  # as where other kernels take over
            most = (size + guess) // 2
        else:
            size, peak = guess, peak_of_guess
            slope = max(slope, peak / size)  # it may have been flat by chance


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most memory that a call holds at a time, beyond what is held before.

    On CUDA what torch's allocator counts, whose peaks (`torch.cuda.max_memory_allocated`) start
    anew. Elsewhere the tensors that operations of torch return, those of the one at work twice:
    inside it may have them in another layout, as oneDNN's convolutions do. What a kernel needs for
    each thread, a few MiB, is not seen.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with _TensorBytes() as tensors:
        call()
    return tensors.peak


class _TensorBytes(TorchDispatchMode):
    """Counts the storages of tensors that operations make, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self._alive = {key: one for key, one in self._alive.items() if not one[0].expired()}
        given = _storages((args, kwargs))
        made = {
            key: (StorageWeakRef(storage), storage.nbytes())
            for key, storage in _storages(out).items()
            if key not in given and key not in self._alive
        }
        self._alive |= made
        held = sum(size for _, size in (*self._alive.values(), *made.values()))
        self.peak = max(self.peak, held)
        return out


def _storages(tree: object) -> dict[int, torch.UntypedStorage]:
    storages = [x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, Tensor)]
    return {storage._cdata: storage for storage in storages}
