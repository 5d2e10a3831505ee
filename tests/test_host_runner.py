"""The host runner of CUDA kernels: right kernels run right, and wrong ones are seen to be wrong."""

import ctypes
import re
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import cuda_compile
from host_runner import build
from tolerances import rounding

KERNELS = Path(__file__).parent / "host_runner" / "kernels"
SOURCES = sorted(KERNELS.glob("*.cu"))
STORAGE = {torch.float16: "half", torch.bfloat16: "bfloat16"}

needs_compiler = pytest.mark.skipif(bool(build.lacking()), reason=build.lacking())
needs_nvcc = pytest.mark.skipif(not cuda_compile.find_nvcc(), reason="needs nvcc")
pytestmark = needs_compiler


@pytest.fixture(scope="module")
def proof():
    return build.load("proof", [*SOURCES, KERNELS / "bind.cpp"])


def block_sums(proof, x, *, barriers=True):
    out = torch.empty(len(x))
    proof.block_sum(x.data_ptr(), out.data_ptr(), len(x), barriers)
    return out


@pytest.mark.parametrize("blocks", build.ORDERS)
@pytest.mark.parametrize("threads", build.ORDERS)
def test_a_right_reduction_is_right_in_every_order(proof, blocks, threads):
    x = torch.randn(5, 256)
    with build.order(proof, blocks=blocks, threads=threads):
        out = block_sums(proof, x)
    bound = rounding(torch.float32, 256) * x.double().abs().sum(1)
    assert ((out - x.double().sum(1)).abs() <= bound).all()
    assert torch.equal(out, block_sums(proof, x))


# In reverse the thread that is added has always finished: one order is not enough.
@pytest.mark.parametrize("threads", ["forward", "shuffled"])
def test_a_missing_barrier_shows_in_the_result(proof, threads):
    x = torch.randn(5, 256)
    with build.order(proof, threads=threads):
        assert (block_sums(proof, x, barriers=False) != block_sums(proof, x)).all()


def test_a_race_between_blocks_shows_in_another_order(proof):
    results = {}
    for order in build.ORDERS:
        results[order] = torch.zeros(20, dtype=torch.int32)
        with build.order(proof, blocks=order, seed=1):
            proof.race_between_blocks(results[order].data_ptr(), 20)
    assert results["forward"].tolist() == list(range(1, 21))
    assert results["reverse"].tolist() == [1] * 20
    assert results["shuffled"].tolist() not in (results["forward"].tolist(), [1] * 20)


def test_shuffled_orders_are_functions_of_their_seed(proof):
    def run(seed):
        out = torch.zeros(50, dtype=torch.int32)
        with build.order(proof, blocks="shuffled", seed=seed):
            proof.race_between_blocks(out.data_ptr(), 50)
        return out.tolist()

    assert run(1) == run(1) != run(2)


@pytest.mark.parametrize("size", [(1, 1, 1, 1, 1, 1), (3, 2, 4, 5, 3, 7), (2, 1, 1, 1024, 1, 1)])
def test_indices_number_every_thread_once(proof, size):
    out = torch.empty(int(np.prod(size)), dtype=torch.int32)
    proof.number(out.data_ptr(), *size)
    assert out.tolist() == list(range(len(out)))


@pytest.mark.parametrize("num_threads", [1, 32, 100])
@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_counting_threads(proof, num_threads, fraction):
    x = (torch.arange(num_threads) < fraction * num_threads).to(torch.int32) * 7
    out = torch.zeros(4, dtype=torch.int32)
    proof.count(x.data_ptr(), out.data_ptr(), num_threads)
    count = int((x != 0).sum())
    assert out.tolist() == [count, count, count > 0, count == num_threads]


@pytest.mark.parametrize("width", [2, 8, 32])
@pytest.mark.parametrize("dtype", ["int32", "uint32", "float32", "float64", "int64"])
@pytest.mark.parametrize("threads", build.ORDERS)
def test_shuffles_follow_their_definition(proof, dtype, width, threads):
    n = 128
    x = np.random.default_rng(0).integers(-(2**31), 2**31, n).astype(dtype)
    out = np.zeros((4, n), dtype)
    with build.order(proof, threads=threads):
        getattr(proof, f"shuffle_{dtype}")(x.ctypes.data, out.ctypes.data, n, width)
    lane = np.arange(n)
    first, last = lane // width * width, lane // width * width + width - 1
    sources = [
        first + 3 % width,
        np.where(lane + 3 <= last, lane + 3, lane),
        np.where(lane - 3 >= first, lane - 3, lane),
        np.where(lane ^ 3 <= last, lane ^ 3, lane),
    ]
    np.testing.assert_array_equal(out, x[np.array(sources)])


def test_votes_are_among_the_lanes_of_the_mask(proof):
    x = np.zeros(32, np.int32)
    x[[0, 3, *range(16, 32)]] = 5
    out = np.zeros((3, 32), np.uint32)
    proof.vote(x.ctypes.data, out.ctypes.data)
    low, high = out[:, :16], out[:, 16:]
    np.testing.assert_array_equal(low, np.array([[0b1001], [1], [0]]).repeat(16, 1))
    np.testing.assert_array_equal(high, np.array([[0xFFFF0000], [1], [1]]).repeat(16, 1))


def test_what_a_lane_that_has_exited_would_bring_is_nan(proof):
    x, out = torch.randn(32), torch.empty(32)
    proof.shuffle_from_exited(x.data_ptr(), out.data_ptr(), 10)
    assert torch.equal(out[:9], x[1:10])
    assert out[9].isnan()


@pytest.mark.parametrize("shared_bytes", [4 * 96, 48 * 1024, 48 * 1024 + 1, 227 * 1024])
def test_dynamic_shared_memory(proof, shared_bytes):
    x, out = torch.randn(3, 96), torch.empty(3, 96)
    proof.reverse(x.data_ptr(), out.data_ptr(), 3, 96, shared_bytes)
    assert torch.equal(out, x.flip(1))


def test_what_nobody_wrote_is_neither_zero_nor_left_over(proof):
    block_sums(proof, torch.randn(1, 256))
    out = torch.zeros(2, 64)
    proof.uninitialized(out.data_ptr())
    assert out[0].isnan().all()
    assert (out[1] < -1e38).all()


STUCK_LANES = r"31 in __shfl_xor_sync at faults\.cu:\d+ with mask 0xffffffff, 1 in __syncthreads"
FAULTS = {
    "barrier_after_exit": r"4 after the end, 60 in __syncthreads at faults\.cu:\d+",
    "two_barriers": r"32 in __syncthreads at faults.cu:(\d+), 32 in __syncthreads at faults.cu:\d+",
    "barrier_against_shuffle": STUCK_LANES,
    "lane_outside_its_mask": r"not in its own mask, .*, thread \(16, 0, 0\) of block \(0, 0, 0\)",
    "width_of_three": r"width must be a power of two up to 32, in __shfl_sync at faults\.cu:\d+",
    "index_out_of_bounds": r"index out of bounds, in the kernel at faults\.cu:\d+, thread \(63, 0",
    "misaligned": r"misaligned access, in the kernel at faults\.cu:\d+, thread \(0, 0, 0\)",
    "past_dynamic_shared": r"write past the dynamic shared memory that was asked for",
}


@pytest.mark.parametrize("name", FAULTS)
def test_undefined_behavior_is_an_error_that_names_kernel_and_place(proof, name):
    out = torch.zeros(1024)
    with pytest.raises(RuntimeError, match=rf"^{name} \(grid 2x1x1, .*{FAULTS[name]}"):
        proof.fault(name, out.data_ptr())
    x = torch.ones(2, 256)
    assert block_sums(proof, x).tolist() == [256, 256]


@pytest.mark.parametrize(
    ("num_blocks", "block", "shared_bytes", "message"),
    [
        (0, 32, 128, "(grid 0x1x1, block 32x1x1, 128 bytes of shared memory): invalid config"),
        (
            1,
            1025,
            8192,
            "(grid 1x1x1, block 1025x1x1, 8192 bytes of shared memory): invalid config",
        ),
        (1, 32, 228 * 1024, "(grid 1x1x1, block 32x1x1, 233472 bytes of shared memory): invalid a"),
    ],
)
def test_a_launch_that_a_gpu_refuses_is_an_error(proof, num_blocks, block, shared_bytes, message):
    with pytest.raises(RuntimeError, match=f"^reverse {re.escape(message)}"):
        proof.reverse(0, 0, num_blocks, block, shared_bytes)


def test_the_device_has_the_number_of_multiprocessors_that_a_test_gives_it(proof):
    before = proof.num_multiprocessors()
    build.set_attribute(proof, "multiprocessors", before + 7)
    assert proof.num_multiprocessors() == before + 7
    build.set_attribute(proof, "multiprocessors", before)


def converted(proof, name, x, dtype):
    out = np.empty(x.shape, dtype)
    getattr(proof, name)(x.ctypes.data, out.ctypes.data, x.size)
    return out


def rounding_cases(num_kept_bits):
    """float32 of every kept part, every rounding bit, and rests below, at and above a tie."""
    num_rest_bits = 32 - num_kept_bits - 1
    kept = np.arange(2 ** (num_kept_bits + 1), dtype=np.uint32) << num_rest_bits
    bits = kept[:, None] | np.array([0, 1, 2**num_rest_bits - 1], np.uint32)
    return bits.ravel().view(np.float32)


# Sign, exponent of 8 bits, mantissa: what is left of a float32.
ROUNDING_CASES = {torch.float16: rounding_cases(1 + 8 + 10), torch.bfloat16: rounding_cases(16)}


@pytest.mark.parametrize("dtype", STORAGE)
def test_every_value_of_a_storage_type_widens_as_in_torch(proof, dtype):
    bits = np.arange(2**16, dtype=np.uint16)
    out = converted(proof, f"from_{STORAGE[dtype]}", bits, np.float32)
    expected = torch.from_numpy(bits.view(np.int16)).view(dtype).float()
    np.testing.assert_array_equal(out, expected)
    assert np.array_equal(np.signbit(out), expected.signbit()) or dtype == torch.float16
    returned = converted(proof, f"to_{STORAGE[dtype]}", out, np.uint16)
    np.testing.assert_array_equal(returned, np.where(np.isnan(out), 0x7FFF, bits))


@pytest.mark.parametrize("dtype", STORAGE)
def test_float32_rounds_to_a_storage_type_as_in_torch(proof, dtype):
    x = ROUNDING_CASES[dtype]
    out = converted(proof, f"to_{STORAGE[dtype]}", x, np.uint16)
    expected = torch.from_numpy(x).to(dtype).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(out, np.where(np.isnan(x), 0x7FFF, expected))


def test_arithmetic_functions_are_those_of_float64(proof):
    x = np.random.default_rng(0).uniform(-10, 10, 1000).astype(np.float32)
    out = np.empty((10, x.size), np.float32)
    proof.functions(x.ctypes.data, out.ctypes.data, x.size)
    x = x.astype(np.float64)
    magnitude = np.abs(x)
    expected = [np.exp(x), np.exp2(x), np.log(magnitude), np.log2(magnitude), np.sin(x), np.cos(x)]
    expected += [magnitude**-0.5, 1 / x, np.cos(np.pi * x), x * x - 1]
    np.testing.assert_allclose(out, expected, rtol=2 * rounding(torch.float32), atol=1e-7)


def test_bit_functions_are_those_of_integers(proof):
    x = np.random.default_rng(0).integers(0, 2**32, 1000, dtype=np.uint32)
    x[:4] = [0, 1, 2**31, 2**32 - 1]
    out = np.empty((8, x.size), np.uint32)
    proof.bit_functions(x.ctypes.data, out.ctypes.data, x.size)
    for value, results in zip(x.tolist(), out.T.tolist(), strict=True):
        assert results == [
            value * 0xD2511F53 >> 32,
            value.bit_count(),
            32 - value.bit_length(),
            (value & -value).bit_length(),
            int(f"{value:032b}"[::-1], 2),
            value,
            ((value ^ 0xFFFFFFFF) << 7 | value >> 25) & 0xFFFFFFFF,
            min(int(np.float32(value)), 2**31 - 1),
        ]


def test_barriers_cost_little(proof):
    out = torch.empty(64 * 256, dtype=torch.int32)
    seconds = []
    for _ in range(3):
        start = time.process_time()
        proof.many_barriers(out.data_ptr(), 64, 10)
        seconds.append(time.process_time() - start)
    assert (out == 10).all()
    assert min(seconds) < 0.1


def test_a_source_is_compiled_again_when_a_header_has_changed(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "CACHE", tmp_path / "cache")
    header, source = tmp_path / "value.h", tmp_path / "value.cu"
    source.write_text('#include "value.h"\nint value() { return kValue; }\n')
    objects = []
    for value in (1, 1, 2, 1):
        header.write_text(f"constexpr int kValue = {value};\n")
        objects.append(build._compile(source, [], context=""))
    assert [a == b for a, b in pairwise(objects)] == [True, False, False]
    assert objects[0] == objects[3]
    header.write_text("constexpr int kOther = 1;\n")
    with pytest.raises(build.BuildError, match="kValue"):
        build._compile(source, [], context="")


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_the_same_sources_compile_for_every_architecture(tmp_path, source):
    usage = cuda_compile.kernel_usage(source, tmp_path)
    assert {kernel.architecture for kernel in usage} == set(cuda_compile.ARCHITECTURES)
    assert all(kernel.stays_in_registers and kernel.registers > 0 for kernel in usage)
    sums = [kernel for kernel in usage if "block_sum_kernel<true>" in kernel.name]
    assert [(kernel.shared_bytes, kernel.barriers) for kernel in sums] in ([], [(1024, 1)] * 3)


@pytest.mark.slow
@needs_nvcc
def test_local_memory_and_spills_are_reported(tmp_path):
    source = tmp_path / "spilling.cu"
    source.write_text("""
__global__ void indexed(int* x, int n) {
  int counts[32] = {};
  for (int i = 0; i < n; ++i) ++counts[x[i] & 31];
  for (int k = 0; k < 32; ++k) x[k] = counts[k];
}
__global__ void __launch_bounds__(1024, 2) spilling(float* x) {
  float values[100];
#pragma unroll
  for (int k = 0; k < 100; ++k) values[k] = x[k * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int k = 0; k < 100; ++k) x[(99 - k) * 1024 + threadIdx.x] = values[k];
}
""")
    usage = {
        kernel.name: kernel for kernel in cuda_compile.kernel_usage(source, tmp_path, ["sm_90"])
    }
    indexed, spilling = usage["indexed(int*, int)"], usage["spilling(float*)"]
    assert indexed.stack_bytes == 128
    assert indexed.spill_store_bytes == indexed.spill_load_bytes == 0
    assert spilling.spill_store_bytes > 0 and spilling.spill_load_bytes > 0
    assert not (indexed.stays_in_registers or spilling.stays_in_registers)


@pytest.mark.slow
@needs_nvcc
def test_conversions_have_the_bits_of_the_headers_of_cuda(proof, tmp_path):
    source = tmp_path / "conversions.cpp"
    source.write_text("""
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define CONVERT(name, From, To, expression) \\
  extern "C" void name(const From* x, To* out, long size) { \\
    for (long i = 0; i < size; ++i) out[i] = expression; \\
  }
CONVERT(to_half, float, unsigned short, __half_as_ushort(__float2half_rn(x[i])))
CONVERT(from_half, unsigned short, float, __half2float(__ushort_as_half(x[i])))
CONVERT(to_bfloat16, float, unsigned short, __bfloat16_as_ushort(__float2bfloat16_rn(x[i])))
CONVERT(from_bfloat16, unsigned short, float, __bfloat162float(__ushort_as_bfloat16(x[i])))
""")
    include = Path(cuda_compile.find_nvcc()).resolve().parent.parent / "include"
    library = tmp_path / "conversions.so"
    command = ["g++", "-O1", "-shared", "-fPIC", f"-I{include}", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    cuda = ctypes.CDLL(str(library))

    def by_cuda(name, x, dtype):
        out = np.empty(x.shape, dtype)
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (x, out)]
        getattr(cuda, name)(*pointers, ctypes.c_long(x.size))
        return out

    patterns = np.arange(2**16, dtype=np.uint16)
    for dtype, name in STORAGE.items():
        for direction, x, to in (
            (f"to_{name}", ROUNDING_CASES[dtype], np.uint16),
            (f"from_{name}", patterns, np.float32),
        ):
            ours, theirs = converted(proof, direction, x, to), by_cuda(direction, x, to)
            assert ours.tobytes() == theirs.tobytes()


SANITIZED = """
import sys
from pathlib import Path
import numpy as np
from host_runner import build

kernels = Path(sys.argv[1])
proof = build.load("proof", [*sorted(kernels.glob("*.cu")), kernels / "bind.cpp"])
x = np.ones((3, 256), np.float32)
sums = np.empty(3, np.float32)
for order in build.ORDERS:
    with build.order(proof, blocks=order, threads=order):
        proof.block_sum(x.ctypes.data, sums.ctypes.data, 3, True)
assert sums.tolist() == [256, 256, 256]
out = np.zeros(64, np.float32)
try:
    proof.fault("barrier_after_exit", out.ctypes.data)
except RuntimeError as error:
    print(error)
proof.block_sum(x.ctypes.data, sums.ctypes.data, 3, True)
print("clean", flush=True)
proof.fault(sys.argv[2], out.ctypes.data)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "report"),
    [
        ("past_the_tensor", r"heap-buffer-overflow(.|\n)* in .*past_the_tensor"),
        ("past_dynamic_shared", r"use-after-poison(.|\n)* in .*past_dynamic_shared"),
        ("index_out_of_bounds", r"faults.cu:\d+:\d+: runtime error: index 64 out of bounds"),
    ],
)
def test_sanitizers_see_what_kernels_do(fault, report):
    environment = build.sanitizer_environment() | {"PYTHONPATH": str(KERNELS.parents[1])}
    if not all(Path(library).exists() for library in environment["LD_PRELOAD"].split(":")):
        pytest.skip("needs libasan")
    command = [sys.executable, "-c", SANITIZED, str(KERNELS), fault]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.stdout.startswith("barrier_after_exit") and "clean" in result.stdout
    assert result.returncode != 0
    assert re.search(report, result.stderr), result.stderr
