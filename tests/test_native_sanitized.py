"""The CPU extension under AddressSanitizer and UBSan: a build that passes the tests of its ops."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from host_runner import build

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("sanitized")]

ROOT = Path(__file__).parent.parent
NOT_SOURCE = shutil.ignore_patterns(".*", "build", "runs", "*.egg-info", "*.so", "*.absent")
SANITIZE = "-fsanitize=address,undefined"
BUILD = {
    "CXX": "g++",
    "CXXFLAGS": f"{SANITIZE} -fno-sanitize=vptr -fno-sanitize-recover=all -O1 -g0",
    "LDFLAGS": SANITIZE,
    "DPM_FAST_CUDA": "0",
}
TESTS = [
    f"tests/test_{name}.py"
    for name in (
        "kl",
        "step",
        "noise_op",
        "bernoulli",
        "multiscale_conv_op",
        "multiscale_conv_bfloat16",
        "image_network",
        "trajectory",
        "trajectory_images",
        "bound_terms",
    )
]
# All instruction sets. Those left out make many small calls of the kinds that others make too.
# An interrupt is heard between launches, which take a hundred times as long here.
CHOSEN = (
    "(native or conv_bfloat16) and not host_runner and not gradcheck and not every_bit "
    "and not interrupt"
)
# A tensor that claims more than there is, by the 16 elements that are read at once. 3,712 bytes and
# their redzone of 128 come in a chunk of 4,096: with a full chunk what follows may be no memory at
# all, and then the fault is a plain segmentation fault.
PAST_THE_END = """
import ctypes
import torch
from dpm_fast import _native_cpu as native
malloc = ctypes.CDLL(None).malloc
malloc.restype, malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
memory, scale = malloc(4 * 928), torch.ones(1, dtype=torch.float64)
for size in (928, 944):
    floats = (ctypes.c_float * size).from_address(memory)
    x = torch.frombuffer(floats, dtype=torch.float32).view(1, size)
    native.scale(x, torch.empty(1, size), scale, 1)
    print(size, flush=True)
"""


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """Runs Python in a copy of the tree whose extension is built with sanitizers."""
    if reason := build.lacking():
        pytest.skip(reason)
    environment = build.sanitizer_environment()
    if not all(Path(library).exists() for library in environment["LD_PRELOAD"].split(":")):
        pytest.skip("needs libasan")
    source = tmp_path_factory.mktemp("sanitized") / "source"
    shutil.copytree(ROOT, source, ignore=NOT_SOURCE)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    built = subprocess.run(
        command, cwd=source, env=os.environ | BUILD, capture_output=True, text=True
    )
    assert list((source / "dpm_fast").glob("_native_cpu*.so")), built.stdout + built.stderr

    def run(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=source,
            env=environment | {"PYTHONPATH": str(source)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return run


def test_a_fault_is_seen(sanitized):
    result = sanitized("-c", PAST_THE_END)
    assert result.stdout.startswith("928\n")
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stdout


def test_the_ops_pass_their_tests(sanitized):
    pytest_ = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow"]
    result = sanitized(*pytest_, "-k", CHOSEN, *TESTS)
    assert result.returncode == 0, result.stdout[-10_000:]
    assert " passed" in result.stdout
