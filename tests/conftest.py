"""Fixtures of every test: golden data, poisoned memory, a bounded number of threads."""

import os
import signal
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path

# The arrays here are small: past two threads, waking the others costs more than they compute; one
# where processes share the cores. Set before torch is imported, so that it also holds in the
# processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")

import numpy as np
import pytest
import torch

torch.backends.cudnn.conv.fp32_precision = "ieee"  # by default a GPU's convolutions keep 10 bits

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell that starts the tests in the background says so, and then no test could interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)

if not torch.cuda.is_available():
    # Read when a kernel is decorated, which is when its module is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

GOLDEN = Path(__file__).parent / "golden"


@cache
def _load_golden(name: str) -> Mapping[str, np.ndarray]:
    # Reads an array anew at every access, so that no test can alter what another one sees.
    return np.load(GOLDEN / f"{name}.npz")


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Mapping[str, np.ndarray]]:
    """`golden("philox")` maps the array names of tests/golden/philox.npz to arrays."""
    return _load_golden


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def poisoned_allocate(*args: object, **kwargs: object) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
            return tensor.detach().fill_(torch.nan).requires_grad_(tensor.requires_grad)
        if tensor.dtype is not torch.bool:
            return tensor.fill_(torch.iinfo(tensor.dtype).max)
        return tensor

    return poisoned_allocate


@pytest.fixture(scope="session", autouse=True)
def _poison_uninitialized_memory() -> Iterator[None]:
    """Fill what `torch.empty` and its kin return, so that an element nobody wrote is seen.

    `torch.utils.deterministic.fill_uninitialized_memory` would do it, but acts only under
    deterministic algorithms; our tests of bit-equal results must not lean on that mode.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in ("empty", "empty_like", "empty_permuted", "empty_strided"):
            patch.setattr(torch, name, _poisoned(getattr(torch, name)))
        for name in ("new_empty", "new_empty_strided"):
            patch.setattr(torch.Tensor, name, _poisoned(getattr(torch.Tensor, name)))
        yield
