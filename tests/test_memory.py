"""How much memory a call is said to take, and the batch that follows from it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dpm_fast import MLP, DiffusionModel, GaussianDiffusion
from dpm_fast.memory import largest_batch, num_bytes, peak_bytes

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("amount", "expected"),
    [
        (512, 512),
        ("512", 512),
        ("512B", 512),
        ("3 kB", 3000),
        ("2GiB", 2**31),
        (" 1.5 gib ", 3 * 2**29),
        ("0.5TB", 5 * 10**11),
        ("64MiB", 2**26),
    ],
)
def test_amounts(amount: int | str, expected: int) -> None:
    assert num_bytes(amount, "max_memory") == expected


@pytest.mark.parametrize("amount", ["", "GiB", "-2GiB", "2 G", "2ib", "1e9", "0.1B", "2GiBs", -1])
def test_amounts_that_are_none(amount: int | str) -> None:
    with pytest.raises(ValueError, match="max_memory must be a positive number of bytes"):
        num_bytes(amount, "max_memory")


@pytest.mark.parametrize("amount", [True, 2.0, None, [2]])
def test_amounts_of_other_types(amount: object) -> None:
    with pytest.raises(TypeError, match="max_memory must be bytes or text as '2GiB'"):
        num_bytes(amount, "max_memory")  # type: ignore[arg-type]


def test_the_peak_counts_what_lives_and_the_result_at_work_twice() -> None:
    given = torch.ones(1000)

    def chain() -> None:
        a = torch.empty_like(given)  # 4000 bytes, 8000 while it is made
        b = a.view(10, 100)[:5] + 1  # half of them
        del a
        b.mul_(2)
        b.exp()
        given.view(100, 10).add_(0)

    assert peak_bytes(chain, CPU) == 4000 + 2 * 2000
    assert peak_bytes(lambda: given.add_(0), CPU) == 0
    assert peak_bytes(lambda: [given.exp() for _ in range(5)], CPU) == 6 * 4000
    assert peak_bytes(lambda: [given.exp().sum() for _ in range(5)], CPU) < 2.1 * 4000


def allocate(size: int) -> None:
    torch.empty(1000 + 100 * size, dtype=torch.uint8).fill_(0)


@pytest.mark.parametrize("max_bytes", [10_000, 123_456, 10**7])
def test_the_largest_batch_nearly_fills_the_memory(max_bytes: int) -> None:
    tried: list[int] = []

    def call(size: int) -> None:
        tried.append(size)
        allocate(size)

    size = largest_batch(call, 5000, max_bytes, CPU)
    possible = min(5000, (max_bytes // 2 - 1000) // 100)
    assert 0.9 * possible <= size <= possible
    assert max(tried) == size  # no trial took more
    assert sum(tried) < 3 * size + 20


def test_a_batch_whose_kernels_change_fits_too() -> None:
    def call(size: int) -> None:
        allocate(size if size < 100 else 10 * size)

    for max_bytes in (25_000, 30_000, 300_000):
        size = largest_batch(call, 5000, max_bytes, CPU)
        assert peak_bytes(lambda size=size: call(size), CPU) <= max_bytes
        assert size >= 50


def test_too_little_for_one() -> None:
    with pytest.raises(ValueError, match="for a batch of one pair, 2200 bytes, got 2199"):
        largest_batch(allocate, 10, 2199, CPU)


@pytest.mark.parametrize("in_launches", [False, True])
def test_a_bound_within_its_memory(in_launches: bool) -> None:
    """Of calls of a network, and of the kernels of a CPU that take it along, where they are."""
    model = DiffusionModel(
        GaussianDiffusion.from_schedule("erase", 50), MLP(4, 50, hidden=(32, 32))
    )
    if not in_launches:
        model.network.register_forward_hook(lambda *call: None)
    x_0 = torch.randn(200, 4)
    expected = model.bound(x_0)
    if in_launches and "network included" not in expected.settings["path"]:
        pytest.skip("needs native ops of a CPU")
    for max_memory, least in (("100 kB", 70), ("1MB", 700), (2**40, 4096)):
        found = model.bound(x_0, max_memory=max_memory)
        size = int(found.settings["path"].split(" of ")[1].split()[0])
        assert least <= size <= (10_000 if in_launches else 4096)
        torch.testing.assert_close(found.bound_nats, expected.bound_nats)
    found = model.bound(x_0, max_memory="1GiB", batch_size=300)
    assert "of 300 terms" in found.settings["path"]


_RESIDENT = """
import sys, torch
from torch import nn
from dpm_fast import DiffusionModel, GaussianDiffusion

class Network(nn.Module):
    event_shape = (3, 32, 32)
    def __init__(self):
        super().__init__()
        layers = [nn.Conv2d(3, 64, 3, padding=1), nn.GroupNorm(8, 64), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(64, 6, 3, padding=1))
    def forward(self, x, t):
        return self.layers(x)

def peak():  # not ru_maxrss, which begins with that of the process that started this one
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])

model = DiffusionModel(GaussianDiffusion.from_schedule("erase", 4), Network())
x_0 = torch.randn(60, 3, 32, 32)
model.bound(x_0[:1], batch_size=1)  # libraries are loaded
before = peak()
print(model.bound(x_0, max_memory=sys.argv[1]).settings["path"])
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_process_grows_by_no_more_than_it_may(tmp_path: Path) -> None:
    script = tmp_path / "resident.py"
    script.write_text(_RESIDENT)
    # The C library keeps freed memory but for large blocks, and of other sizes finds no use for it.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, str(script), "64MiB"],
        check=True,
        capture_output=True,
        text=True,
        env=environment,
    )
    path, grown = done.stdout.splitlines()
    size = int(path.split(" of ")[1].split()[0])
    assert size >= 32
    # Beyond tensors: the pages of torch's own code that the first calls had not touched.
    assert 0.4 * 2**26 < int(grown) < 2**26 + 2**23
