"""Tiles: a block of the elements of one example, or of several small ones, for a program."""

import triton
import triton.language as tl

from dpm_fast.ops.common import Strided

NUM_WARPS = 8
ELEMENTS = 1024  # of a tile of one example: four for each thread
# One a thread, where there is more to keep in registers: several rows of coefficients, or float64.
FEW_ELEMENTS = 256


def tile_shape(num_elements: int, most: int = ELEMENTS) -> tuple[int, int]:
    """Examples and elements of each: a function of the event alone, as are the bits of its sums."""
    block = min(most, max(4, triton.next_power_of_2(num_elements)))
    return max(1, FEW_ELEMENTS // block), block


def strides_of(tensor: Strided | None) -> tuple[int, int, int]:
    return (0, 0, 1) if tensor is None else tensor[1:]


@triton.jit
def examples_of(rank, N, num_elements, ROWS: tl.constexpr):
    """The examples [ROWS] of a tile, and how many elements each has: beyond N it is the last one
    again, with none."""
    n = rank.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    if ROWS == 1:  # there are as many tiles as examples
        return n, tl.zeros([1], tl.int32) + num_elements
    return tl.minimum(n, N - 1), tl.where(n < N, num_elements, 0)


@triton.jit
def in_a_row(first, COUNT: tl.constexpr):
    """Numbers [1, COUNT] from the first on, of elements or of groups of four of them."""
    return (tl.arange(0, COUNT).to(tl.int64) + first)[None, :]


@triton.jit
def tile_of_program(N, num_elements, num_blocks, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Examples [ROWS, 1], elements and groups in a row, and which of the elements there are."""
    n, counts = examples_of(tl.program_id(0) // num_blocks, N, num_elements, ROWS)
    block = (tl.program_id(0) % num_blocks).to(tl.int64)
    i = in_a_row(block * BLOCK, BLOCK)
    groups = in_a_row(block * (BLOCK // 4), BLOCK // 4)
    return n[:, None], i, groups, i < counts[:, None]


@triton.jit
def offsets(n, i, strides, S, FLAT: tl.constexpr):
    """Where the elements i of the examples n lie; FLAT: channels are part of the spatial run."""
    at = n * strides[0]
    if FLAT:
        return at + i * strides[2]
    c = i // S
    return at + c * strides[1] + (i - c * S) * strides[2]


@triton.jit
def load(x, n, i, strides, S, inside, FLAT: tl.constexpr):
    at = offsets(n, i, strides, S, FLAT)
    return tl.load(x + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store(x, value, n, i, strides, S, inside, FLAT: tl.constexpr):
    at = offsets(n, i, strides, S, FLAT)
    tl.store(x + at, value.to(x.dtype.element_ty), mask=inside)
