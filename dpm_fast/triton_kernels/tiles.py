"""Tiles: a block of the elements of one example, or of several small ones, for a program."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

NUM_WARPS = 8
ELEMENTS = 1024  # of a tile of one example: four for each thread
# One a thread, where there is more to keep in registers: several rows of coefficients, or float64.
FEW_ELEMENTS = 256


def tile_shape(num_elements: int, most: int = ELEMENTS) -> tuple[int, int]:
    """Examples and elements of each: a function of the event alone, as are the bits of its sums."""
    block = min(most, max(4, triton.next_power_of_2(num_elements)))
    return max(1, FEW_ELEMENTS // block), block


Strided = tuple[int, int, int, int]  # address; strides of example, channel, spatial element


def strided(x: Tensor | None) -> Strided | None:
    """How a kernel finds the elements (n, c, s) of a tensor that `collapsible` has passed."""
    if x is None:
        return None
    address, stride, shape = x.data_ptr(), x.stride(), x.shape
    if x.dim() == 2:
        return address, stride[0], stride[1], stride[1]
    spatial = [stride[i] for i in range(2, x.dim()) if shape[i] > 1]
    return address, stride[0], stride[1], spatial[-1] if spatial else 1


def shared_strided(x: Tensor | None, like: Tensor) -> Strided | None:
    """`strided` of a tensor that `check_shared` has passed."""
    if x is None or x.shape[0] == like.shape[0]:
        return strided(x)
    address, _, c, s = strided(x)  # type: ignore[misc]
    return address, 0, c, s


def extent(shape: torch.Size, tensors: Sequence[Strided | None]) -> tuple[int, int, int]:
    """(N, C, S): channels join the spatial elements where every tensor has them in one run."""
    n, channels = shape[0], shape[1]
    spatial = 1
    for size in shape[2:]:
        spatial *= size
    for tensor in tensors:
        if tensor is not None and channels > 1 and tensor[2] != spatial * tensor[3]:
            return n, channels, spatial
    return n, 1, channels * spatial


def room_for_pieces(sums: Tensor, num_pieces: int) -> Tensor:
    """[N, pieces, ...] for what `add_pieces` adds up to ``sums``, [N, ...]: itself where it can."""
    return sums if num_pieces == 1 else sums.new_empty(len(sums), num_pieces, *sums.shape[1:])


def add_pieces(pieces: Tensor, sums: Tensor) -> None:
    """In their order: that in which torch adds depends on the number of examples."""
    if pieces is sums:
        return
    num_columns = sums[0].numel()
    pieces_of_example[(len(sums),)](
        pieces, sums, pieces.shape[1], COLUMNS=num_columns,
        PADDED=triton.next_power_of_2(num_columns), num_warps=1,
    )  # fmt: skip


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


@triton.jit
def pieces_of_example(
    pieces,  # [N, pieces, COLUMNS] float64
    sums,  # [N, COLUMNS] float64, written
    num_pieces, COLUMNS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, PADDED)
    at = pieces + n * num_pieces * COLUMNS + column
    total = tl.zeros([PADDED], tl.float64)
    for piece in range(num_pieces):
        total += tl.load(at + piece * COLUMNS, mask=column < COLUMNS, other=0.0)
    tl.store(sums + n * COLUMNS + column, total, mask=column < COLUMNS)
