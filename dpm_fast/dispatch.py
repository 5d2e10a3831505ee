"""Backends of the ops: which are available, which one is chosen and why; and what is installed."""

import importlib
import importlib.util
import logging
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch  # before the extension: both then share one OpenMP runtime, hence one pool of threads
from torch import Tensor

from dpm_fast import __version__

_log = logging.getLogger("dpm_fast")

# Prefixes of the instruction sets that decide how fast a loop over floats can be.
_VECTOR_EXTENSIONS = ("amx", "asimd", "avx", "f16c", "fma", "sse4", "sve")


BACKENDS = ("reference", "native", "triton")
# What `auto` takes on a device, the first that is available: for an op by name, or for all others.
# Convolutions on a GPU are left to torch: their kernels, which run if asked for, were never timed
# on one against cuDNN's.
_OTHERS = ""
_PREFERENCE: dict[str, dict[str, tuple[str, ...]]] = {
    "cpu": {_OTHERS: ("native",)},
    "cuda": {_OTHERS: ("native", "triton"), "multiscale_conv": ("reference",)},
}
_NATIVE = {"cpu": "_native_cpu", "cuda": "_native_cuda"}


class BackendError(RuntimeError):
    """A backend that was asked for cannot run here; the message says why."""


@cache
def why_absent(backend: str, device_type: str) -> str | None:
    """Why a backend cannot run on a kind of device, or None if it can."""
    if backend == "reference":
        return None
    if backend == "native":
        if device_type not in _NATIVE:
            return f"there are no native kernels for {device_type}"
        module, reason = _load(_NATIVE[device_type])
        if module is None or device_type == "cpu" or not torch.cuda.is_available():
            return reason
        unusable = module.why_unusable()
        return f"built, but cannot run on this GPU: {unusable}" if unusable else None
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "triton runs on CPU tensors in its interpreter only (TRITON_INTERPRET=1)"
    if device_type == "cuda" and torch.cuda.is_available():
        return _why_triton_cannot_start()
    return None if device_type in ("cpu", "cuda") else f"triton does not run on {device_type}"


def _why_triton_cannot_start() -> str | None:
    """It compiles its launcher with a C compiler and Python.h when it first meets a GPU."""
    from triton.runtime import driver

    try:
        driver.active.get_current_target()
    except Exception as error:  # of many kinds
        return f"triton cannot start: {str(error).strip().partition(chr(10))[0]}"
    return None


@cache
def _load(name: str) -> tuple[ModuleType | None, str | None]:
    """A native module, or why there is none."""
    try:
        return importlib.import_module(f"dpm_fast.{name}"), None
    except ModuleNotFoundError:
        reason = Path(__file__).with_name(f"{name}.absent")
        if reason.exists():
            return None, f"not built: {reason.read_text().strip()}"
        return None, (
            f"not built: none is in {reason.parent}; pip install -e . builds it, and where the "
            "package is installed elsewhere, start Python outside of its source"
        )
    except ImportError as error:
        return None, f"built, but cannot be loaded: {error}"


_requested = os.environ.get("DPM_FAST_BACKEND") or "auto"
# By what was asked for, the type of device, and what is preferred there.
_chosen: dict[tuple[str, str, tuple[str, ...]], str] = {}


def requested() -> str:
    """What was asked for: "auto" or the name of a backend.

    Raises:
        BackendError: where DPM_FAST_BACKEND names none.
    """
    return _known(_requested)


def _known(name: str) -> str:
    if name not in ("auto", *BACKENDS):
        raise BackendError(
            f"DPM_FAST_BACKEND must be one of auto, {', '.join(BACKENDS)}, got {name!r}"
        )
    return name


def backend(op: str, x: Tensor) -> str:
    """The backend that runs an op on tensors like x: "reference", "native" or "triton".

    Raises:
        BackendError: where the backend that was asked for cannot run.
    """
    # device.type makes a new string each time, which costs as much as all else here
    requested, device_type = _requested, "cpu" if x.is_cpu else x.device.type
    chosen = _for_device(requested, op, device_type)
    if x.dtype == torch.float64 and not _takes_float64(chosen, device_type):
        if requested != "auto":
            raise BackendError(
                f"the backend {requested!r} cannot run {op} on {device_type} in float64: "
                "its kernels compute in float32; ask for 'auto' or 'reference'"
            )
        return "reference"
    return chosen


def kernels(op: str, x: Tensor) -> str:
    """`backend` inside of an op's implementation, which has kernels only: "native" or "triton".

    Raises:
        BackendError: also where the reference should run, which the public function calls instead.
    """
    chosen = backend(op, x)
    if chosen == "reference":
        raise BackendError(
            f"torch.ops.dpm_fast holds kernels, and {op} of {x.dtype} on {x.device.type} runs in "
            "the reference: call it through dpm_fast.ops, where the backend is chosen"
        )
    return chosen


@cache
def _log_lack(op: str, backend: str, device_type: str) -> None:
    _log.info("%s has no %s kernels on %s and runs in the reference", op, backend, device_type)


# The part of the lanes of all threads that must hold images, or parts of them, for the native stack
# to be faster than oneDNN's channels-last convolutions: the widest layer and that part, ascending;
# by dtype and whether all kernels are 3 x 3. Measured forward and with gradients on Zen 4 with
# AVX-512, two threads, torch 2.13, stacks of 28 x 28 and 32 x 32 images
# (benchmarks/bench_multiscale_conv.py): with full lanes kernels of 3 x 3 in float32 gain 2.5 at 20
# channels and 1.5 to 2 from 64 to 128; those of 5 x 5, which have no short cut, 1.4 at 20, and lose
# at 32. A single image of 20 channels fills 7 or 14 of 32 lanes and gains 1.5 to 2, since torch has
# much to do besides; one of 64 channels loses. oneDNN multiplies bfloat16 twice as fast as float32
# where a processor has an instruction for it, else a tenth as fast, and has no fast float16 or
# float64.
_LANES_WORTH: dict[tuple[torch.dtype, bool], tuple[tuple[int, float], ...]] = {
    (torch.float32, True): ((32, 0.2), (128, 0.66)),
    (torch.float32, False): ((24, 0.75),),
    (torch.bfloat16, True): ((24, 0.8),),
    (torch.float16, True): ((128, 0.1),),
    (torch.float16, False): ((128, 0.2),),
    (torch.float64, True): ((32, 0.35), (64, 0.7)),
    (torch.float64, False): ((32, 0.35), (64, 0.7)),
}
# The same forward alone where the processor has avx512_bf16, by which kernels of every size are
# multiplied then. On two threads, with all lanes full, 3 x 3 gain 1.8 at 20 channels of one scale
# and 2.5 of three, 1.1 to 1.2 at 32, 1.03 to 1.07 at 48, and 7 x 7 1.4 at 24; 32 channels of 5 x 5
# gain 1.03 to 1.06 and of 7 x 7 lose 2 %, so both are left to oneDNN. With half of the lanes full
# 24 channels of 3 x 3 gain 1.09 and of 5 x 5 lose 2 %; with nine tenths 3 x 3 of 32 lose 2 %, of 48
# 7 %.
_LANES_WORTH_IN_PAIRS: dict[bool, tuple[tuple[int, float], ...]] = {
    True: ((24, 0.4), (48, 0.97)),
    False: ((24, 0.6),),
}
# Where both have AVX2 alone it gains 1.6 at 20 channels; without vectors of 32 bytes it loses.
_LANES_WORTH_FACTOR = {"avx512_bf16": 1.0, "avx512": 1.0, "avx2": 1.5}


def convolution_route(
    x: Tensor,
    kernels: Sequence[Sequence[int]],
    num_scales: int,
    full: float,
    differentiable: bool = False,
) -> str:
    """Who runs a stack of multiscale convolutions, "native" or "reference".

    With "auto" that may depend on the number of examples: bits of the results are those of another
    batch only where both take the same route.

    Args:
        x: (N, C, H, W).
        kernels: shape (F, C, K, K) of each layer's.
        full: the part of the lanes of all threads that would hold images.
        differentiable: whether a gradient will be wanted, which CUDA C++ has not, nor have the
            kernels of pairs of bfloat16 (csrc/pairs.h).
    """
    chosen = backend("multiscale_conv", x)
    if chosen != "native":
        return chosen
    if differentiable and not _native_has("multiscale_conv_gradient", x.device.type):
        _log_lack("the gradient of multiscale_conv", "native", "cuda")
        return "reference"
    if not x.is_cpu:
        return chosen
    facts = _native_cpu_facts()
    if num_scales > facts.max_scales:
        if _requested == "native":
            raise BackendError(
                f"the backend 'native' takes {facts.max_scales} scales, got {num_scales}"
            )
        return "reference"
    if _requested == "native":
        return "native"
    width = max(max(shape[:2]) for shape in kernels)
    # Without an instruction of its own one narrow type is as slow elsewhere as the other.
    is_slow = x.dtype == torch.bfloat16 and not facts.multiplies_bfloat16
    dtype = torch.float16 if is_slow else x.dtype
    in_threes = all(shape[2] == 3 for shape in kernels)
    if dtype == torch.bfloat16 and facts.instruction_set == "avx512_bf16" and not differentiable:
        rows = _LANES_WORTH_IN_PAIRS[in_threes]
    else:
        rows = _LANES_WORTH.get((dtype, in_threes), ())
    worth = next((part for widest, part in rows if width <= widest), None)
    if worth is None or facts.instruction_set not in _LANES_WORTH_FACTOR:
        return "reference"
    return "native" if full >= worth * _LANES_WORTH_FACTOR[facts.instruction_set] else "reference"


def convolution_threads(x: Tensor) -> int:
    """Threads that a native convolution of x would run on."""
    if not x.is_cpu or backend("multiscale_conv", x) != "native":
        return 1
    return _native_cpu_facts().threads


def takes_tail(x: Tensor) -> bool:
    """Whether the kernels of a stack on x also take what follows it in a network: those of CPUs."""
    chosen = backend("multiscale_conv", x)
    return chosen == "native" and _native_has("multiscale_conv_gradient", x.device.type)


class TrajectoryLimits(NamedTuple):
    """What kernels whose networks stay in shared memory take. For the functions see
    csrc/bind_cuda.cpp."""

    max_layers: int  # of a network of vectors
    shared_bytes: int  # of a block
    bytes_needed: Callable[[int, int, list[tuple[int, int, bool, bool]]], int]
    max_image_layers: int  # of a network of images, convolutions and layers of each pixel
    max_scales: int
    image_bytes_needed: Callable[..., tuple[int, int]]  # of a block, and of packed operands


def trajectory_limits(x: Tensor) -> TrajectoryLimits | None:
    """Of the native trajectories of tensors like x; those of a CPU have none."""
    module, _ = native(x)
    if not hasattr(module, "trajectory_bytes"):
        return None
    with torch.cuda.device_of(x):
        shared_bytes = module.most_shared_bytes()
    return TrajectoryLimits(
        module.MAX_DENSE_LAYERS,
        shared_bytes,
        module.trajectory_bytes,
        module.MAX_LAYERS,
        module.MAX_SCALES,
        module.image_network_bytes,
    )


_ON_CPU = torch.empty(0)  # made here, where nobody traces or transforms


@torch.compiler.assume_constant_result
def _native_has(function: str, device_type: str) -> bool:
    module = native(_ON_CPU)[0] if device_type == "cpu" else _load(_NATIVE[device_type])[0]
    return hasattr(module, function)


@cache
def log_limit(op: str, needed: str) -> None:
    _log.info("%s would need %s, and runs in the reference", op, needed)


class _CpuFacts(NamedTuple):
    instruction_set: str
    max_scales: int
    multiplies_bfloat16: bool  # whether the processor has an instruction for it
    threads: int


@torch.compiler.assume_constant_result
def _native_cpu_facts() -> _CpuFacts:
    module, _ = _load("_native_cpu")
    assert module is not None
    set_in_use, *_ = module.instruction_sets()
    bfloat16 = module.MULTIPLIES_BFLOAT16
    return _CpuFacts(set_in_use, module.MAX_SCALES, bfloat16, torch.get_num_threads())


def _takes_float64(backend: str, device_type: str) -> bool:
    return backend == "reference" or (backend == "native" and device_type == "cpu")


def _for_device(requested: str, op: str, device_type: str) -> str:
    table = _PREFERENCE.get(device_type, {})
    preferred = table.get(op) or table.get(_OTHERS, ())
    key = requested, device_type, preferred
    chosen = _chosen.get(key)
    if chosen is None:
        chosen = _chosen[key] = _choose(*key)
    return chosen


@torch.compiler.assume_constant_result  # it imports, which cannot be traced
def _choose(requested: str, device_type: str, preferred: tuple[str, ...]) -> str:
    if requested == "auto":
        reasons = {name: why_absent(name, device_type) for name in preferred}
        usable = [name for name, reason in reasons.items() if reason is None]
        chosen = usable[0] if usable else "reference"
        passed_over = [f"{n}: {r}" for n, r in reasons.items() if r and n not in usable[:1]]
        if passed_over and (not usable or reasons[preferred[0]]):
            # pip shows nothing of a build without a compiler: the first op without kernels says it.
            _log.log(
                logging.INFO if usable else logging.WARNING,
                "ops on %s use the backend %s (%s)",
                device_type,
                chosen,
                "; ".join(passed_over),
            )
        return chosen
    reason = why_absent(_known(requested), device_type)
    if reason is not None:
        raise BackendError(f"the backend {requested!r} cannot run on {device_type}: {reason}")
    return requested


class use_backend:
    """Choose the backend of all ops, until further notice or for the body of a ``with``.

    The choice is made when this is called, and it is the whole process's: ops in all threads follow
    it, as they must, since PyTorch runs backward passes of a GPU in threads of its own. ``with``
    brings back what was asked for before. Threads that want different backends at the same time
    need processes.

    Args:
        name: "reference" (plain PyTorch), "native" (C++ on a CPU, CUDA C++ on a GPU), "triton",
            or "auto", which takes the best one that is there.

    Raises:
        ValueError: for another name.
        BackendError: by the first op on a device where it cannot run.
    """

    def __init__(self, name: str):
        if name not in ("auto", *BACKENDS):
            raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}, got {name!r}")
        self._before = _requested
        self._request(name)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        self._request(self._before)

    @staticmethod
    def _request(name: str) -> None:
        global _requested
        _requested = name


def can_scale(x: Tensor) -> bool:
    """Whether the native module in use scales the rows of x; that of CUDA does not."""
    if not x.is_cpu or _for_device(_requested, "scale", "cpu") != "native":
        return False
    return hasattr(native(x)[0], "scale")


def native(x: Tensor) -> tuple[Any, int]:
    """The native module for tensors like x, and the last argument of its functions: threads, or
    the current stream."""
    module, reason = _load(_NATIVE["cpu" if x.is_cpu else x.device.type])
    if module is None:
        raise BackendError(f"no native kernels for {x.device}: {reason}")
    if x.is_cpu:
        return module, torch.get_num_threads()
    return module, torch.cuda.current_stream(x.device).cuda_stream


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
    native_cuda: str
    backends: str

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
        native_cpu=_or_reason(lambda: _build_info("_native_cpu")),
        native_cuda=_or_reason(lambda: _build_info("_native_cuda")),
        backends=_or_reason(_backends),
    )


def _or_reason(describe: Callable[[], str]) -> str:
    # A bug report is wanted most from the machine on which something unforeseen is broken.
    try:
        return describe()
    except PackageNotFoundError:
        return "not installed"
    except BackendError as error:  # a sentence
        return str(error)
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


def _build_info(name: str) -> str:
    module, reason = _load(name)
    if module is None:
        return reason or "unknown"
    return "; ".join(f"{fact} {value}" for fact, value in module.build_info().items())


def _backends() -> str:
    """What runs on each kind of device that is here."""
    kinds = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    chosen = [f"{kind} {backend('', torch.empty(0, device=kind))}" for kind in kinds]
    return f"{', '.join(chosen)} (asked for: {_requested})"
