"""What is installed, built and available on this machine, and why not where it is not."""

import importlib
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch  # before the extension: both then share one OpenMP runtime, hence one pool of threads

from dpm_fast import __version__

# Prefixes of the instruction sets that decide how fast a loop over floats can be.
_VECTOR_EXTENSIONS = ("amx", "asimd", "avx", "f16c", "fma", "sse4", "sve")


@dataclass(frozen=True)
class Info:
    """One line of text per fact; `print(dpm_fast.info())` is what a bug report should quote."""

    dpm_fast: str
    python: str
    torch: str
    triton: str
    numpy: str
    system: str
    cpu: str
    cuda: str
    native_cpu: str

    def __str__(self) -> str:
        width = max(len(field.name) for field in fields(self))
        return "\n".join(f"{f.name:<{width}}  {getattr(self, f.name)}" for f in fields(self))


def info() -> Info:
    """Versions, processor, GPU and native extension. Cheap; never raises."""
    return Info(
        dpm_fast=__version__,
        python=_or_reason(_python),
        torch=torch.__version__,
        triton=_or_reason(lambda: version("triton")),
        numpy=_or_reason(lambda: version("numpy")),
        system=_or_reason(platform.platform),
        cpu=_or_reason(_cpu),
        cuda=_or_reason(_cuda),
        native_cpu=_or_reason(_native_cpu),
    )


def _or_reason(describe: Callable[[], str]) -> str:
    # A bug report is wanted most from the machine on which something unforeseen is broken.
    try:
        return describe()
    except PackageNotFoundError:
        return "not installed"
    except Exception as error:
        return f"unknown ({type(error).__name__}: {error})"


def _python() -> str:
    return f"{platform.python_version()} ({platform.python_implementation()})"


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        text = ""
    facts = dict(line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    facts = {name.strip(): value.strip() for name, value in facts.items()}
    model = facts.get("model name") or platform.processor() or platform.machine()
    flags = (facts.get("flags") or facts.get("Features") or "").split()
    vector = " ".join(sorted(flag for flag in flags if flag.startswith(_VECTOR_EXTENSIONS)))
    threads = f"{os.cpu_count()} processors, {torch.get_num_threads()} torch threads"
    return "; ".join(filter(None, [model, threads, vector]))


def _cuda() -> str:
    if torch.version.cuda is None:
        return "none: this torch was built without CUDA"
    if not torch.cuda.is_available():
        return f"none: torch is built for CUDA {torch.version.cuda} but finds no usable device"
    devices = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        gigabytes = device.total_memory / 2**30
        devices.append(f"{device.name} (sm_{device.major}{device.minor}, {gigabytes:.0f} GiB)")
    return f"CUDA {torch.version.cuda}: {'; '.join(devices)}"


def _native_cpu() -> str:
    try:
        module = importlib.import_module("dpm_fast._native_cpu")
    except ModuleNotFoundError:
        reason = Path(__file__).with_name("_native_cpu.absent")
        if reason.exists():
            return f"not built: {reason.read_text().strip()}"
        return "not built: this source tree was never installed (pip install -e .)"
    except ImportError as error:
        return f"built, but cannot be loaded: {error}"
    return "; ".join(f"{name} {value}" for name, value in module.build_info().items())
