"""`bench_*(call, benchmark)` runs once per case and provider of its module's ``cases``."""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch

from benchmarks import harness

_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "call" in metafunc.fixturenames and hasattr(metafunc.module, "cases"):
        pairs = [
            pytest.param((case, name), id=f"{case.name}-{case.mode}-{name}")
            for case in metafunc.module.cases(_DEVICE)
            for name in case.provider_names
        ]
        metafunc.parametrize("call", pairs, indirect=True)


@pytest.fixture
def call(request: pytest.FixtureRequest) -> Iterator[Callable[[], object]]:
    """A provider's call after its check; the benchmark carries the case's bytes and flops."""
    case, provider = request.param
    torch._dynamo.reset()
    with torch.set_grad_enabled(case.needs_grad):
        try:
            checked = harness.checked_call(case, provider, case.inputs())
        except harness.WrongResult as error:
            pytest.fail(f"{provider}: {error}", pytrace=False)
        except Exception as error:
            pytest.skip(f"{provider}: {type(error).__name__}: {error}")
        benchmark = request.getfixturevalue("benchmark")
        benchmark.group = f"{case.op} {case.name} {case.mode}"
        benchmark.extra_info.update(
            provider=provider, bytes=case.bytes, flops=case.flops, threads=torch.get_num_threads()
        )
        yield checked if _DEVICE.type == "cpu" else partial(_synchronized, checked)


def _synchronized(call: Callable[[], object]) -> None:
    call()
    torch.cuda.synchronize()
