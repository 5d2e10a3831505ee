"""Every backend of an op as a test runs it: on this CPU, and on the GPU where there is one.

Without a GPU, CUDA C++ runs in the host runner and Triton in its interpreter; with one, both run
on it.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from dpm_fast import dispatch, use_backend
from host_runner import build

HAS_GPU = torch.cuda.is_available()
# Convolutions of bfloat16 have it, where the processor does; all else is then that of AVX-512.
BFLOAT16_SET = "avx512_bf16"


@dataclass(frozen=True)
class Backend:
    name: str  # "native" or "triton"
    device: str = "cpu"
    instruction_set: str | None = None
    in_host_runner: bool = False

    def __str__(self) -> str:
        kind = "host_runner" if self.in_host_runner else self.instruction_set
        return "-".join(filter(None, [self.name, self.device if HAS_GPU else None, kind]))

    @property
    def interpreted(self) -> bool:
        return self.name == "triton" and self.device == "cpu"

    @property
    def dtypes(self) -> list[torch.dtype]:
        """Storage types that it computes itself."""
        narrow = [torch.float32, torch.bfloat16, torch.float16]
        return [*narrow, torch.float64] if self.instruction_set else narrow

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(use_backend(self.name))
            if self.instruction_set:
                module, _ = dispatch.native(torch.empty(0))
                best = module.instruction_sets()[0]
                stack.callback(module.use_instruction_set, best)
                module.use_instruction_set(self.instruction_set)
            if self.in_host_runner:
                patch = stack.enter_context(pytest.MonkeyPatch.context())
                module = build.load_native_cuda()
                patch.setattr(dispatch, "native", lambda device: (module, 0))
            yield


def _backends() -> list[Backend]:
    found = []
    if dispatch.why_absent("native", "cpu") is None:
        module, _ = dispatch.native(torch.empty(0))
        sets = [name for name in module.instruction_sets() if name != BFLOAT16_SET]
        found += [Backend("native", instruction_set=name) for name in sets]
    if HAS_GPU:
        kinds = [Backend("native", "cuda"), Backend("triton", "cuda")]
        return found + [b for b in kinds if dispatch.why_absent(b.name, "cuda") is None]
    if not build.lacking():
        found.append(Backend("native", in_host_runner=True))
    if dispatch.why_absent("triton", "cpu") is None:
        found.append(Backend("triton"))
    return found


BACKENDS = _backends()
CPU_BACKENDS = [backend for backend in BACKENDS if backend.instruction_set]
BFLOAT16 = Backend("native", instruction_set=BFLOAT16_SET)
needs_bfloat16_set = pytest.mark.skipif(
    not CPU_BACKENDS or BFLOAT16_SET not in dispatch.native(torch.empty(0))[0].instruction_sets(),
    reason=f"needs the native extension and a processor with {BFLOAT16_SET}",
)
TRITON = [backend for backend in BACKENDS if backend.name == "triton"]
each_backend = pytest.mark.parametrize("backend", BACKENDS, ids=str)
# Of tests for which the interpreter takes long: `make check` has it there.
each_backend_in_time = pytest.mark.parametrize(
    "backend",
    [pytest.param(b, marks=pytest.mark.slow if b.interpreted else ()) for b in BACKENDS],
    ids=str,
)
HOST_RUNNER = next((backend for backend in BACKENDS if backend.in_host_runner), None)
needs_host_runner = pytest.mark.skipif(HOST_RUNNER is None, reason="needs the host runner")


@contextlib.contextmanager
def running_in(order: str) -> Iterator[Backend]:
    """The host runner, which goes through blocks and threads in this order."""
    assert HOST_RUNNER is not None
    with build.order(build.load_native_cuda(), blocks=order, threads=order, seed=3):
        yield HOST_RUNNER


@contextlib.contextmanager
def rounding_to_tf32() -> Iterator[None]:
    """Convolutions of float32 on a GPU, which tests otherwise have exact, as torch's default is."""
    conv = torch.backends.cudnn.conv
    before, conv.fp32_precision = conv.fp32_precision, "tf32"
    try:
        yield
    finally:
        conv.fp32_precision = before
