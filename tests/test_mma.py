"""The host bodies of csrc/mma.cuh: each instruction against numpy, by the layout of the PTX ISA.

The kernels that call them place every element by the formulas of the PTX ISA, not by those of
mma.cuh; `test_the_same_sources_compile_for_every_architecture` compiles the instructions.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from host_runner import build
from tolerances import rounding

KERNELS = Path(__file__).parent / "host_runner" / "kernels"

pytestmark = pytest.mark.skipif(bool(build.lacking()), reason=build.lacking())


@pytest.fixture(scope="module")
def proof():
    return build.load("proof", [*sorted(KERNELS.glob("*.cu")), KERNELS / "bind.cpp"])


def tf32(x: np.ndarray) -> np.ndarray:
    """Ten bits of mantissa, ties away from zero."""
    bits = x.view(np.uint32) + np.uint32(0x1000) & np.uint32(0xFFFFE000)
    return bits.view(np.float32)


def check(d: np.ndarray, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> None:
    a, b, c = (x.astype(np.float64) for x in (a, b, c))
    allowed = rounding(torch.float32, a.shape[1] + 1) * (np.abs(a) @ np.abs(b) + np.abs(c))
    assert (np.abs(d - (a @ b + c)) <= allowed).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("threads", build.ORDERS)
def test_products_of_16_bits(proof, dtype, threads) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(16, 16, generator=generator).to(dtype)
    b = torch.randn(16, 8, generator=generator).to(dtype)
    c = torch.randn(16, 8, generator=generator)
    d = c.clone()
    with build.order(proof, threads=threads):
        proof.multiply_halves(a.data_ptr(), b.data_ptr(), d.data_ptr(), dtype == torch.bfloat16)
    check(d.numpy(), a.float().numpy(), b.float().numpy(), c.numpy())


@pytest.mark.parametrize("threads", build.ORDERS)
def test_products_of_tf32(proof, threads) -> None:
    generator = np.random.default_rng(0)
    shapes = (16, 8), (8, 8), (16, 8)
    a, b, c = (generator.standard_normal(shape).astype(np.float32) for shape in shapes)
    a, b, d = tf32(a), tf32(b), c.copy()
    with build.order(proof, threads=threads):
        proof.multiply_tf32(a.ctypes.data, b.ctypes.data, d.ctypes.data)
    check(d, a, b, c)
    again = c.copy()  # what is below tf32 is not looked at
    finer = (a.view(np.uint32) | np.uint32(0x1FFF)).view(np.float32)
    proof.multiply_tf32(finer.ctypes.data, b.ctypes.data, again.ctypes.data)
    np.testing.assert_array_equal(again, d)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_roundings(proof, dtype) -> None:
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 65504.0, 65520.0, 1e-7, 6e-8, 3e38]
    ties = [1 + 2.0**-k for k in (8, 9, 11, 12)] + [1 + 3 * 2.0**-k for k in (8, 9, 11, 12)]
    generator = np.random.default_rng(0)
    spread = generator.standard_normal(998) * 2.0 ** generator.integers(-30, 17, 998)
    x = np.array([*special, *ties, *spread], np.float32)
    out = np.empty((2, x.size), np.float32)
    proof.round_pairs(x.ctypes.data, out.ctypes.data, x.size, dtype == torch.bfloat16)
    np.testing.assert_array_equal(out[0], np.where(np.isnan(x), np.nan, tf32(x)))
    np.testing.assert_array_equal(out[1], torch.from_numpy(x).to(dtype).float().numpy())
