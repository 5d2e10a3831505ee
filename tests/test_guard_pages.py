"""The native ops of a CPU on tensors that end, or begin, where no memory may be touched.

AddressSanitizer does not look into masked loads and stores, which a short event is read and
written by. A process of its own for each instruction set: a fault ends it.
"""

import ctypes
import mmap
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from backends import BFLOAT16, CPU_BACKENDS, needs_bfloat16_set
from dpm_fast import dispatch
from dpm_fast.reference import BernoulliRow, ReverseRow

Place = Callable[[Tensor], Tensor]
Call = Callable[[Place], list[Tensor]]  # runs an op on tensors that are placed so

EVENTS = [(d,) for d in (*range(1, 20), 31, 32, 33, 47, 63, 64, 65, 97, 128, 129, 200, 257)]
EVENTS += [(2, 3, 5), (3, 5, 7), (2, 33), (3, 16)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
N = 3
NUM_PAGES = 8  # of a tensor at most
OUT = object()  # in the inputs of a call: the next of its outputs
READ_ONE_BEYOND = "reads one element beyond the end"


class Areas:
    """Memory between two pages that fault."""

    def __init__(self) -> None:
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        self.areas: list[tuple[mmap.mmap, int]] = []
        self.num_used = 0

    def place(self, x: Tensor, at_end: bool) -> Tensor:
        """A copy of x that ends where an area does, or begins there."""
        if self.num_used == len(self.areas):
            self.areas.append(self._new())
        _, begin = self.areas[self.num_used]
        self.num_used += 1
        num_bytes, size = x.numel() * x.element_size(), NUM_PAGES * mmap.PAGESIZE
        assert num_bytes <= size
        memory = (ctypes.c_uint8 * num_bytes).from_address(begin + at_end * (size - num_bytes))
        return torch.frombuffer(memory, dtype=x.dtype).view(x.shape).copy_(x)

    def _new(self) -> tuple[mmap.mmap, int]:
        memory = mmap.mmap(-1, (NUM_PAGES + 2) * mmap.PAGESIZE)
        begin = ctypes.addressof(ctypes.c_uint8.from_buffer(memory)) + mmap.PAGESIZE
        for page in (begin - mmap.PAGESIZE, begin + NUM_PAGES * mmap.PAGESIZE):
            assert self.libc.mprotect(page, mmap.PAGESIZE, 0) == 0
        return memory, begin


def calls(native: Any, event: tuple[int, ...], dtype: torch.dtype) -> Iterator[Call]:
    """Every op, with and without what it may be given."""
    shape = (N, *event)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, x_t, mu, shift, drift = (torch.randn(shape).to(dtype) for _ in range(5))
    bits, mask = (x > 0).to(dtype), x_t > 0
    variance = torch.rand(shape).to(wide) + 0.1
    flip = (torch.rand(shape) * 0.4 + 0.05).to(dtype)
    rows = torch.rand(N, len(ReverseRow._fields)).to(wide) * 0.3 + 0.1
    fixed = rows.clone()
    fixed[:, ReverseRow._fields.index("s")] = 0
    bit_rows = torch.rand(N, len(BernoulliRow._fields)).to(wide) * 0.4
    pair, factors = torch.rand(N, 2).to(wide), torch.rand(N, dtype=torch.float64)
    ids, t = torch.arange(N), torch.arange(N) + 1
    like_x, nats = torch.zeros(shape, dtype=dtype), torch.zeros(N, dtype=torch.float64)

    def call(op: Callable[..., None], inputs: list[Any], outputs: list[Tensor]) -> Call:
        def run(place: Place) -> list[Tensor]:
            written = [place(out) for out in outputs]
            left = iter(written)

            def placed(a: Any) -> Any:
                if isinstance(a, tuple):
                    return tuple(map(placed, a))
                return next(left) if a is OUT else place(a) if isinstance(a, Tensor) else a

            op(*map(placed, inputs))
            return written

        return run

    counters = [5, 2, ids, t]
    grads = [OUT] * 5
    yield call(
        native.kl,
        [x, x_t, mu, shift, False, rows, 0, 0.0, 0.0, 0.0, OUT, *grads, None, 1],
        [nats, *[like_x] * 4, torch.zeros(N, rows.shape[1], dtype=torch.float64)],
    )
    for given in ([None] * 5, [x, variance, drift, mask, x_t]):
        inputs = [x_t, mu, shift, rows, *counters, *given, False, OUT, 1]
        yield call(native.step, inputs, [like_x])
    yield call(native.noise, [x, pair, *counters, OUT, 1], [like_x])
    yield call(
        native.noise_gradient,
        [x, x_t, pair, *counters, OUT, OUT, None, 1],
        [like_x, torch.zeros(N, 2, dtype=torch.float64)],
    )
    flat = like_x.view(N, -1)
    for random, out in enumerate((flat.long(), flat, flat)):
        yield call(native.fill, [random, *counters, OUT, 1], [out])
    yield call(native.scale, [x, OUT, factors, 1], [like_x])
    yield call(native.bernoulli_noise, [bits, pair, *counters, OUT, 1], [like_x])
    yield call(native.bernoulli_kl, [bits, bits, mu, bit_rows, OUT, OUT, None, 1], [nats, like_x])
    for given in ([None] * 5, [mask, bits, bits, flip, drift]):
        inputs = [bits, mu, *given, bit_rows, *counters, False, OUT, 1]
        yield call(native.bernoulli_step, inputs, [like_x])
    if len(event) == 1 and dtype == torch.float32:
        (dim,) = event
        hidden = torch.rand(3, dim) / dim, torch.rand(3)
        layers = hidden, (torch.rand(N, dim, 3) / 10, torch.rand(N, dim))
        states = torch.zeros(2, *shape)
        for radial in ([None, None, layers], [torch.rand(3, dim), -torch.rand(3), layers[1:]]):
            for is_binomial, table in ((False, fixed), (True, bit_rows)):
                for given in ([None] * 5, [pair, mask, bits, bits, flip]):
                    inputs = [x, table, is_binomial, *radial, 2, 0.1, None, 5, 1, 0, ids]
                    before = torch.arange(3) - 1
                    inputs += [*given, before, 2, 1, False, OUT, before, OUT, 1]
                    yield call(native.trajectory, inputs, [like_x, states])
                inputs = [x, table, is_binomial, *radial, 2, 0.1, None, 5, 0, ids, pair, 2, 1]
                inputs += [OUT, 1]
                yield call(native.bound_terms, inputs, [torch.zeros(2, N, dtype=torch.float64)])


def main(instruction_set: str, fault: str) -> None:
    native, _ = dispatch.native(torch.empty(0))
    native.use_instruction_set(instruction_set)
    areas = Areas()
    if fault:
        ctypes.string_at(areas.place(torch.zeros(5), True).data_ptr(), 6 * 4)
    torch.manual_seed(0)
    for dtype in DTYPES:
        for event in EVENTS:
            for call in calls(native, event, dtype):
                expected = call(Tensor.clone)
                for at_end in (False, True):
                    areas.num_used = 0
                    found = call(lambda x, at_end=at_end: areas.place(x, at_end))
                    assert all(map(torch.equal, found, expected)), (dtype, event, at_end)


def run(instruction_set: str, fault: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "faulthandler", __file__, instruction_set, fault]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend", [*CPU_BACKENDS, pytest.param(BFLOAT16, marks=needs_bfloat16_set)], ids=str
)
def test_no_op_touches_memory_beside_its_tensors(backend) -> None:
    done = run(backend.instruction_set)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not CPU_BACKENDS, reason="needs the native ops of a CPU")
def test_a_fault_is_seen() -> None:
    assert run(CPU_BACKENDS[0].instruction_set, READ_ONE_BEYOND).returncode == -signal.SIGSEGV


if __name__ == "__main__":
    main(*sys.argv[1:])
