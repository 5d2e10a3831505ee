"""What the tests of all ops share: memory layouts, small events, and what bits may depend on."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor


def _half(x: Tensor) -> Tensor:
    """x as the second half of the channels of a larger tensor."""
    return torch.cat((torch.ones_like(x), x), dim=1)[:, x.shape[1] :]


# Of (N, C, H, W), any dtype.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channel half": _half,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "channel half of channels last": lambda x: _half(
        x.contiguous(memory_format=torch.channels_last)
    ),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every other example": lambda x: x.repeat_interleave(2, dim=0)[::2],
    "offset by one element": lambda x: (
        torch.cat((x.flatten(), x.new_zeros(1))).roll(1)[1:].view(x.shape)
    ),
}

# Types of examples and of a network's outputs.
storage_types = pytest.mark.parametrize(
    ("dtype", "out_dtype"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float64, torch.float64),
    ],
    ids=str,
)

# Events so small that a block of a GPU takes several, and more of them than two blocks take whole.
MANY_SMALL: list[tuple[tuple[int, ...], int]] = [((2,), 300), ((20,), 70), ((3, 5, 9), 9)]

# Batches that are split: one of an example for each block of a GPU, one of many.
SPLIT: list[tuple[tuple[int, ...], int]] = [((1, 28, 28), 7), ((2,), 300)]


def steps(n: int, num_steps: int = 50) -> tuple[int, ...]:
    """Timesteps of n examples, the first and the last one among them if n is large."""
    return tuple(7 * i % num_steps + 1 for i in range(n))


def assert_bits_are_those_of_any_run(run: Callable[[slice], Sequence[Tensor]], n: int) -> None:
    """Results of a batch of n are equal when it is split, and on one thread."""
    whole = run(slice(None))
    parts = [run(slice(*ends)) for ends in pairwise(sorted({0, 1, n // 2, n}))]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        again = run(slice(None))
    finally:
        torch.set_num_threads(threads)
    for i, result in enumerate(whole):
        assert torch.equal(result, again[i])
        assert torch.equal(result, torch.cat([part[i] for part in parts]))
