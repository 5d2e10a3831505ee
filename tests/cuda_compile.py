"""Compiles CUDA sources with nvcc and reads what each kernel uses on each architecture."""

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
# As setup.py compiles; relocatable or debug code would use other registers.
FLAGS = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "-cudart", "static"]

_KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<architecture>\w+)'\n"
    r"(?:.*\n)*?.*Function properties for (?P=name)\n"
    r"\s*(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads\n"
    r".*Used (?P<registers>\d+) registers(?P<rest>.*)\n"
)


@dataclass(frozen=True)
class KernelUsage:
    name: str  # demangled, with template arguments
    architecture: str
    registers: int
    spill_store_bytes: int
    spill_load_bytes: int
    stack_bytes: int  # local memory: arrays that are indexed at run time, spills
    shared_bytes: int  # static
    barriers: int

    @property
    def stays_in_registers(self) -> bool:
        return self.spill_store_bytes == self.spill_load_bytes == self.stack_bytes == 0


def find_nvcc() -> str:
    """Path of nvcc, empty where there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which(str(Path(home) / "bin" / "nvcc")) or shutil.which("nvcc") or ""


def kernel_usage(
    source: Path,
    scratch: Path,
    architectures: Sequence[str] = ARCHITECTURES,
    flags: Sequence[str] = (),
) -> list[KernelUsage]:
    """Compile `source` whole, host code included, and list what ptxas says of every kernel."""
    code = [f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}" for arch in architectures]
    command = [find_nvcc(), *FLAGS, *code, "-Xptxas", "-v", "-Xcompiler", "-Wall,-Wextra", *flags]
    command += ["-c", str(source), "-o", str(scratch / f"{source.stem}.o")]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.returncode == 0, result.stdout
    kernels = list(_KERNEL.finditer(result.stdout))
    assert len(kernels) == result.stdout.count("Compiling entry function"), result.stdout
    names = _demangle([kernel["name"] for kernel in kernels])
    return [
        KernelUsage(
            name=name,
            architecture=kernel["architecture"],
            registers=int(kernel["registers"]),
            spill_store_bytes=int(kernel["stores"]),
            spill_load_bytes=int(kernel["loads"]),
            stack_bytes=int(kernel["stack"]),
            shared_bytes=_amount(r"(\d+) bytes smem", kernel["rest"]),
            barriers=_amount(r"used (\d+) barriers", kernel["rest"]),
        )
        for name, kernel in zip(names, kernels, strict=True)
    ]


def _amount(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    return int(match[1]) if match else 0


def _demangle(names: list[str]) -> list[str]:
    if not shutil.which("c++filt"):
        return names
    text = "\n".join(names)
    result = subprocess.run(["c++filt"], input=text, capture_output=True, text=True)
    return result.stdout.splitlines()
