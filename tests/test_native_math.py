"""Headers of csrc in every instruction set of this machine: error against float64, equal bits."""

import ctypes
import math
import platform
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from dpm_fast import noise
from tolerances import NORMAL_ATOL

pytestmark = pytest.mark.xdist_group("math_probe")

TESTS = Path(__file__).parent
FLAGS = shlex.split(
    "-O3 -std=c++17 -fPIC -shared -fopenmp -fno-math-errno -fno-trapping-math -ffp-contract=fast "
    "-Wall -Wextra"
)
INSTRUCTION_SETS = {
    "baseline": "",
    "avx2": "-march=x86-64-v3",
    "avx512": "-march=x86-64-v4 -mprefer-vector-width=512",
}
RUNS_ON = {  # capabilities of the machine, as torch names them
    "baseline": {"DEFAULT", "NO AVX", "AVX2", "AVX512"},
    "avx2": {"AVX2", "AVX512"},
    "avx512": {"AVX512"},
}
TINY = float(np.finfo(np.float32).tiny)


@pytest.fixture(scope="module", params=INSTRUCTION_SETS)
def probe(request, tmp_path_factory):
    """tests/native/math_probe.cpp as a shared object."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    isa = request.param
    if isa != "baseline" and (
        platform.machine() != "x86_64"
        or torch.backends.cpu.get_cpu_capability() not in RUNS_ON[isa]
    ):
        pytest.skip(f"this processor has no {isa}")
    library = tmp_path_factory.mktemp(isa) / "probe.so"
    source = TESTS / "native" / "math_probe.cpp"
    # Not -I: csrc/math.h would be found in place of the system's.
    command = [compiler, *FLAGS, *shlex.split(INSTRUCTION_SETS[isa]), "-iquote"]
    command += [str(TESTS.parent / "csrc"), str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def call(function, *arguments):
    """Calls a C function: arrays as addresses, numbers as float and int64 unless they say more."""

    def convert(argument):
        if isinstance(argument, np.ndarray):
            return ctypes.c_void_p(argument.ctypes.data)
        if isinstance(argument, float):
            return ctypes.c_float(argument)
        return ctypes.c_int64(argument) if isinstance(argument, int) else argument

    function(*map(convert, arguments))


def apply(probe, name, x):
    y = np.full_like(x, np.nan)
    call(getattr(probe, name), x, y, len(x))
    return y


def geometric(low, high, number=500_000):
    return np.exp(np.linspace(math.log(low), math.log(high), number))


def both_signs(x):
    return np.concatenate((x, -x, [0.0, -0.0]))


def expm1_minus_identity(x):
    small = np.where(np.abs(x) < 1.0, x, 0.0)
    series = np.polyval([*(1 / math.factorial(k) for k in range(20, 1, -1)), 0.0, 0.0], small)
    return np.where(np.abs(x) < 1.0, series, np.expm1(x) - x)


def softplus(x):
    return np.maximum(x, 0.0) + np.log1p(np.exp(-np.abs(x)))


def sigmoid(x):
    small = np.exp(-np.abs(x))
    return np.where(x < 0.0, small, 1.0) / (1.0 + small)


EXPONENTS = both_signs(np.concatenate((geometric(1e-30, 87.3), np.linspace(1e-3, 87.3, 2_000_000))))
POSITIVE = np.concatenate((geometric(TINY, 3.4e38, 2_000_000), np.linspace(0.5, 2.0, 1_000_000)))
# name: (inputs, the function in float64, ulp it may be wrong by)
FUNCTIONS = {
    "abs": (EXPONENTS, np.abs, 0.0),
    "sqrt": (np.append(geometric(TINY, 3.4e38), 0.0), np.sqrt, 0.5),
    "exp": (np.append(EXPONENTS, 88.0), np.exp, 1.1),
    "exp2_of_negative": (-np.abs(EXPONENTS), np.exp2, 3.5),
    "expm1": (np.append(EXPONENTS, 88.0), np.expm1, 1.6),
    "expm1_minus_identity": (
        both_signs(np.concatenate((geometric(1e-15, 87.3), np.linspace(0.1, 3.0, 2_000_000)))),
        expm1_minus_identity,
        3.1,
    ),
    "log": (POSITIVE, np.log, 1.3),
    "log1p": (
        np.concatenate((both_signs(geometric(1e-30, 0.99999994)), geometric(0.01, 1e38))),
        np.log1p,
        2.0,
    ),
    "sigmoid": (EXPONENTS, sigmoid, 2.5),
    "softplus": (EXPONENTS, softplus, 2.1),
    "tanh": (EXPONENTS, np.tanh, 3.5),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_error_in_units_of_the_last_place(probe, name):
    inputs, function, max_ulp = FUNCTIONS[name]
    x = inputs.astype(np.float32)
    exact = function(x.astype(np.float64))
    ulp = np.spacing(np.maximum(np.abs(exact).astype(np.float32), np.float32(TINY)))
    for kind in ("lanes", "scalar"):
        error = np.abs(apply(probe, f"{name}_{kind}", x) - exact) / ulp
        assert error.max() <= max_ulp, x[error.argmax()]


def test_normal_cdf(probe):
    x = both_signs(np.concatenate((geometric(1e-30, 1e30), np.linspace(0.0, 7.0, 2_000_000))))
    exact = torch.special.ndtr(torch.from_numpy(x.astype(np.float32)).double()).numpy()
    for kind in ("lanes", "scalar"):
        y = apply(probe, f"normal_cdf_{kind}", x.astype(np.float32))
        assert np.abs(y - exact).max() < 3e-7
        assert not y[x < -5.31].any()
        assert np.isnan(apply(probe, f"normal_cdf_{kind}", np.full(16, np.nan, np.float32))).all()
    y = apply(probe, "normal_cdf_double", x)
    np.testing.assert_allclose(y, torch.special.ndtr(torch.from_numpy(x)).numpy(), atol=1e-15)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_double_is_accurate_to_double(probe, name):
    inputs, function, _ = FUNCTIONS[name]
    x = inputs[:: len(inputs) // 10_000].astype(np.float64)
    # The reference of expm1_minus_identity cancels as much as the function does.
    np.testing.assert_allclose(apply(probe, f"{name}_double", x), function(x), rtol=1e-14)


@pytest.mark.parametrize("kind", ["lanes", "scalar"])
def test_extremes_are_finite_and_nan_stays(probe, kind):
    def value(name, *x):
        return apply(probe, f"{name}_{kind}", np.array(x, np.float32)).tolist()

    largest = pytest.approx(math.exp(88.0), rel=2e-7)
    huge = (3.4e38, math.inf, -3.4e38, -math.inf)
    assert value("exp", *huge) == [largest, largest, 0.0, 0.0]
    assert value("exp2_of_negative", -3.4e38, -math.inf, -126.0) == [2.0**-126] * 3
    assert value("expm1", *huge) == [largest, largest, -1.0, -1.0]
    assert value("sigmoid", *huge) == [1.0, 1.0, 0.0, 0.0]
    assert value("tanh", *huge) == [1.0, 1.0, -1.0, -1.0]
    assert value("softplus", 3e38, -3e38, 100.0, -100.0) == pytest.approx([3e38, 0.0, 100.0, 0.0])
    assert value("expm1_minus_identity", 0.0, -1e6, 1e6) == [0.0, 1e6 - 1, largest]
    assert value("log1p", -1.0) == pytest.approx([-127 * math.log(2.0)])
    assert value("log", math.inf, 1.0) == [math.inf, 0.0]
    for name in FUNCTIONS:
        assert np.isnan(value(name, math.nan)).all(), name


def test_clamp_keeps_nan(probe):
    x = np.array([-3, -1, 0, 0.5, 2, np.nan, np.inf, -np.inf] * 2, np.float32)
    y = np.empty_like(x)
    call(probe.clamp_lanes, x, y, -1.0, 1.0)
    np.testing.assert_array_equal(y, np.clip(x, -1, 1))


def test_sum_of_lanes(probe):
    x = np.arange(1, 17, dtype=np.float32) ** 7 / 3
    probe.sum_as_double.restype = ctypes.c_double
    assert probe.sum_as_double(ctypes.c_void_p(x.ctypes.data)) == pytest.approx(
        x.astype(np.float64).sum(), rel=1e-15
    )


STORAGE = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@pytest.mark.parametrize("kind", ["lanes", "scalar"])
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_conversion_of_every_half(probe, name, kind):
    halves = np.arange(2**16, dtype=np.uint16)
    y = np.empty(2**16, np.float32)
    call(getattr(probe, f"{name}_to_float_{kind}"), halves, y, len(y))
    expected = torch.from_numpy(halves).view(STORAGE[name]).float()
    assert torch.equal(torch.from_numpy(y).isnan(), expected.isnan())
    np.testing.assert_array_equal(y, expected.numpy())
    back = np.empty_like(halves)
    call(getattr(probe, f"{name}_from_float_{kind}"), y, back, len(y))
    quiet = 0x40 if name == "bfloat16" else 0x200  # a signaling NaN may become a quiet one
    np.testing.assert_array_equal(back, np.where(np.isnan(y), halves | quiet, halves))


@pytest.mark.parametrize("kind", ["lanes", "scalar"])
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_rounding_to_nearest_even(probe, name, kind):
    dtype = STORAGE[name]
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype).float()
    grid = halves[halves.isfinite()].unique()
    middle = (grid[1:].double() + grid[:-1].double()).div(2).float()  # exact, where ties are broken
    up, down = (torch.nextafter(middle, torch.tensor(s * math.inf)) for s in (1, -1))
    bits = torch.arange(0, 2**32, 4099).to(torch.uint32).view(torch.float32)
    x = torch.cat((middle, up, down, bits, torch.tensor([65519.0, 65520.0, -65520.0, 3.4e38])))
    x = torch.cat((x, torch.zeros(-len(x) % 16)))
    y = torch.zeros(len(x), dtype=torch.int16)
    call(getattr(probe, f"{name}_from_float_{kind}"), x.numpy(), y.numpy(), len(x))
    assert torch.equal(y.view(dtype).isnan(), x.isnan())
    assert torch.equal(y[~x.isnan()], x.to(dtype).view(torch.int16)[~x.isnan()])


@pytest.mark.parametrize("name", STORAGE)
@pytest.mark.parametrize("stride", [1, 3, -2])
@pytest.mark.parametrize("count", [0, 1, 7, 15, 16])
def test_partial_and_strided_memory(probe, name, stride, count):
    dtype = STORAGE[name]
    memory = torch.arange(64, dtype=torch.float32).to(dtype)
    start = 40 if stride < 0 else 2
    places = start + stride * torch.arange(count)
    address = ctypes.c_void_p(memory.data_ptr() + start * memory.element_size())
    y = np.full(16, np.nan, np.float32)
    call(getattr(probe, f"{name}_load"), address, stride, ctypes.c_int(count), -5.0, y)
    assert y.tolist() == memory.float()[places].tolist() + [-5.0] * (16 - count)

    x = np.arange(100, 116, dtype=np.float32)
    expected = memory.clone()
    expected[places] = torch.from_numpy(x[:count]).to(dtype)
    call(getattr(probe, f"{name}_store"), x, stride, ctypes.c_int(count), address)
    assert torch.equal(memory, expected)


def as_c(seed, stream, t, example):
    words = (ctypes.c_uint64(seed), ctypes.c_uint32(stream), ctypes.c_uint32(t))
    return *words, ctypes.c_uint64(example)


def filled(probe, name, identity, count):
    dtype = np.uint32 if name == "words" else np.float32
    out = np.zeros(count + 1, dtype)  # one more, which must stay as it is
    call(getattr(probe, f"{name}_filled"), *as_c(*identity), count, out)
    assert out[-1] == 0
    groups = np.zeros(-(-count // 4) * 4, dtype)
    first, num_groups = ctypes.c_uint32(0), len(groups) // 4
    call(getattr(probe, f"{name}_by_group"), *as_c(*identity), first, num_groups, groups)
    if name == "normals":  # a scalar may round otherwise than a lane
        np.testing.assert_allclose(groups[:count], out[:count], rtol=0, atol=2e-6)
    else:
        np.testing.assert_array_equal(groups[:count], out[:count])
    return out[:count]


def published_vectors(golden):
    stored = golden("philox")
    ten = stored["kat/rounds"] == 10
    vectors = [(stored["kat/counter"][ten], stored["kat/key"][ten], stored["kat/expected"][ten])]
    vectors += [(stored["random/counter"], stored["random/key"], stored["random/out"])]
    for seed in (0, 42, 1099511627781):
        counter, key = stored["stream/counter"], stored[f"stream/seed_{seed}/key"]
        keys = np.broadcast_to(key, (len(counter), 2))
        vectors.append((counter, keys, stored[f"stream/seed_{seed}/out"]))
    return (np.concatenate(column) for column in zip(*vectors, strict=True))


def test_published_vectors(probe, golden):
    out = np.zeros(4, np.uint32)
    for counter, key, expected in zip(*published_vectors(golden), strict=True):
        (c0, c1, c2, c3), (k0, k1) = map(int, counter), map(int, key)
        identity = (k1 << 32 | k0, c1 >> 24, c1 & 0xFFFFFF, c3 << 32 | c2)
        call(probe.words_by_group, *as_c(*identity), ctypes.c_uint32(c0), 1, out)
        assert out.tolist() == expected.tolist()


@pytest.mark.parametrize("count", [0, 1, 4, 63, 64, 127, 128, 129, 784, 3072])
@pytest.mark.parametrize(
    ("seed", "stream", "t", "example"), [(0, 0, 0, 0), (2**64 - 1, 255, 2**24 - 1, 2**63 - 1)]
)
def test_elements_of_an_example(probe, seed, stream, t, example, count):
    ids = torch.tensor([example])
    identity = (seed, stream, t, example)
    words = filled(probe, "words", identity, count)
    assert words.tolist() == noise.words(seed, stream, ids, t, count)[0].tolist()
    uniforms = filled(probe, "uniforms", identity, count)
    expected = noise.uniform(seed, stream, ids, t, (count,))[0]
    assert torch.equal(torch.from_numpy(uniforms), expected)
    normals = filled(probe, "normals", identity, count)
    exact = box_muller(noise.words(seed, stream, ids, t, -(-count // 4) * 4)[0].numpy())
    np.testing.assert_allclose(normals, exact[:count], rtol=0, atol=2e-6)


def box_muller(words):
    u = words.astype(np.float32) * np.float32(2**-32) + np.float32(2**-33)
    u = u.astype(np.float64).reshape(-1, 2)
    radius, angle = np.sqrt(-2 * np.log(u[:, 0])), 2 * math.pi * u[:, 1]
    return np.stack((radius * np.cos(angle), radius * np.sin(angle)), axis=1).ravel()


@pytest.mark.parametrize("group", [0, 5, 2**32 - 16])
def test_filled_from_a_group(probe, group):
    identity = as_c(3, 1, 9, 2**40 + 1)
    uniforms, normals = np.zeros(64, np.float32), np.zeros(64, np.float32)
    call(probe.filled_from, *identity, ctypes.c_uint32(group), uniforms, normals)
    words = np.zeros(64, np.uint32)
    call(probe.words_by_group, *identity, ctypes.c_uint32(group), 16, words)
    u = words.astype(np.float32) * np.float32(2**-32) + np.float32(2**-33)
    np.testing.assert_array_equal(uniforms, u)
    np.testing.assert_allclose(normals, box_muller(words), rtol=0, atol=2e-6)


class BoxMullerErrors(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_double) for name in ("log_relative", "radius", "cos_sin", "normal")),
        ("num_uniforms", ctypes.c_int64),
    )


@pytest.mark.slow
def test_normals_of_all_words(probe):
    errors = BoxMullerErrors()
    probe.box_muller_errors(ctypes.byref(errors))
    assert errors.num_uniforms > 79_000_000
    assert errors.log_relative < 1.2e-7
    assert errors.cos_sin < 1.8e-7
    assert errors.normal < 2e-6 < NORMAL_ATOL
