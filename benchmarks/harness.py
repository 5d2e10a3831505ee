"""One description of a benchmark, checked against float64 and timed beside its competitors.

A file bench_<stem>.py has a function ``cases(device)`` that returns `Case`s; `measure` times them
for ``python -m benchmarks``, conftest.py gives the same calls to pytest-benchmark.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Normal

from benchmarks import roofs
from benchmarks.timing import Call, alternate, percentiles, timer
from dpm_fast import dispatch

MODES = ("forward", "forward_backward", "sample", "train")
COMPILED: Mapping[str, Mapping[str, Any]] = {
    "compile": {},
    "compile_max_autotune": {"mode": "max-autotune"},
    # On a CPU the generator of compiled code is ten times slower than eager PyTorch's.
    "compile_fallback_random": {"options": {"fallback_random": True}},
}


@dataclass(frozen=True)
class Case:
    """One piece of work and those who do it.

    Attributes:
        op, name, mode: columns of the results; the mode is one of `MODES`. Under
            "forward_backward" a call is the provider and `torch.autograd.grad` of its outputs.
        inputs: makes the arguments of every provider, on the device, the same at every call.
        providers: callables of ``*inputs``; "reference" is eager PyTorch. One that raises when
            first called, as for want of a package, is left out with its reason.
        expected: the result from the inputs in float64, a tensor or a tuple, or, where providers
            draw noise, the `Normal` that they draw from.
        bytes, flops: the least that any implementation moves and computes.
        wrt: which inputs are differentiated.
        compiled: the provider to put through `torch.compile`, None for none.
        tolerances: errors allowed to providers, relative to the magnitude and root mean square of
            the expected tensor; 32 units in the last place unless given. Compiled forms have that
            of their provider.
    """

    op: str
    name: str
    mode: str
    inputs: Callable[[], tuple[Tensor | None, ...]]
    providers: Mapping[str, Callable[..., Any]]
    expected: Callable[..., Tensor | tuple[Tensor, ...] | Normal]
    bytes: int
    flops: int
    wrt: tuple[int, ...] = ()
    compiled: str | None = "reference"
    tolerances: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if bool(self.wrt) != (self.mode == "forward_backward"):
            raise ValueError(f"wrt must name inputs in mode 'forward_backward' only: {self.wrt}")

    @property
    def provider_names(self) -> list[str]:
        """Those given, then their compiled forms."""
        return [*self.providers, *(COMPILED if self.compiled in self.providers else ())]

    def function(self, provider: str, device: torch.device) -> Callable[..., Any]:
        """The callable of one of `provider_names`."""
        if provider in self.providers:
            return self.providers[provider]
        options = dict(COMPILED[provider])
        if device.type == "cpu" and "mode" in options:
            options["mode"] += "-no-cudagraphs"
        return torch.compile(self.providers[self.compiled or ""], dynamic=False, **options)

    def tolerance(self, provider: str) -> float | None:
        given = provider if provider in self.providers else self.compiled or ""
        return self.tolerances.get(given)

    @property
    def needs_grad(self) -> bool:
        """Whether calls are made with autograd on; switched once, outside of the time."""
        return self.mode in ("forward_backward", "train")


@dataclass(frozen=True)
class Row:
    """One line of the results."""

    op: str
    case: str
    mode: str
    provider: str
    dtype: str
    threads: int
    median_us: float
    p20_us: float
    p80_us: float
    bytes: int
    flops: int
    roof_gb_per_s: float
    roof_gflop_per_s: float
    share_of_roof: float  # time at the nearer roof / median
    torch: str
    device: str
    malloc: str  # of a CPU: "tuned" (__main__.py), "default" or "custom"; "caching" on CUDA


@dataclass
class Outcome:
    """What `measure` found: times, and why there are none for the other providers."""

    rows: list[Row] = field(default_factory=list)
    wrong: dict[str, str] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    arithmetic: str = ""  # how its roof was measured
    disturbed: float = 0.0  # part of the rounds in which threads waited for a processor
    busy: bool = False  # too few rounds were without: no figures to publish


class WrongResult(Exception):
    """A provider computes something else than float64 does."""


def measure(
    case: Case,
    num_threads: int,
    *,
    seconds: float = 1.0,
    providers: Iterable[str] | None = None,
    malloc: str = "default",
) -> Outcome:
    """Times of the providers of a case, in alternating rounds of one process.

    Args:
        num_threads: of PyTorch, hence of every provider.
        seconds: measuring time per provider, checks, compilation and warming up not counted.
        providers: names of those to measure, all of them by default.
        malloc: the column of the rows.
    """
    torch.set_num_threads(num_threads)
    torch._dynamo.reset()  # compiled code keeps the number of threads it was made for
    outcome = Outcome()
    inputs = case.inputs()
    device, dtype = next((x.device, x.dtype) for x in inputs if x is not None)
    calls: dict[str, Call] = {}
    with torch.set_grad_enabled(case.needs_grad):
        for name in case.provider_names if providers is None else providers:
            try:
                calls[name] = checked_call(case, name, inputs)
            except WrongResult as error:
                outcome.wrong[name] = str(error)
            except Exception as error:
                reason = str(error).strip().split("\n")[0]
                outcome.unavailable[name] = f"{type(error).__name__}: {reason}"
        copy = roofs.copy(case.bytes, device, _num_copies(inputs))
        arithmetic = roofs.arithmetic(device)
        every_call = calls | {"roof of copying": copy.call, "roof of arithmetic": arithmetic.call}
        timing = alternate(every_call, timer(device), seconds)
    times, outcome.disturbed, outcome.busy = timing
    outcome.arithmetic = arithmetic.name
    gb_per_s = copy.amount / statistics.median(times["roof of copying"]) / 1e9
    gflop_per_s = arithmetic.amount / statistics.median(times["roof of arithmetic"]) / 1e9
    at_roof = max(case.bytes / gb_per_s, case.flops / gflop_per_s) / 1e9
    for name in calls:
        p20, median, p80 = percentiles(times[name])
        outcome.rows.append(
            Row(
                op=case.op,
                case=case.name,
                mode=case.mode,
                provider=name,
                dtype=str(dtype).removeprefix("torch."),
                threads=num_threads,
                median_us=round(1e6 * median, 2),
                p20_us=round(1e6 * p20, 2),
                p80_us=round(1e6 * p80, 2),
                bytes=case.bytes,
                flops=case.flops,
                roof_gb_per_s=round(gb_per_s, 1),
                roof_gflop_per_s=round(gflop_per_s, 1),
                share_of_roof=round(at_roof / median, 4),
                torch=torch.__version__,
                device=device_name(device),
                malloc=malloc if device.type == "cpu" else "caching",
            )
        )
    return outcome


def checked_call(case: Case, provider: str, inputs: tuple[Tensor | None, ...]) -> Call:
    """A call of a provider without arguments, after one whose result was right.

    On CUDA successive calls take turns between copies of the inputs that together exceed the L2
    cache twice; a CPU's caches are left as they are, for the roof of copying too.

    Raises:
        WrongResult: where the result differs from float64, or an input has changed.
        Exception: what the provider raises.
    """
    device = next(x.device for x in inputs if x is not None)
    function = case.function(provider, device)
    given = _copy(inputs)
    call = _bind(case, function, given)
    result = _as_tuple(call())
    for i, (x, before) in enumerate(zip(given, inputs, strict=True)):
        if x is not None and before is not None and not torch.equal(x, before):
            raise WrongResult(f"input {i} was changed")
    _check(case, result, inputs, case.tolerance(provider))
    others = [_bind(case, function, _copy(inputs)) for _ in range(_num_copies(inputs) - 1)]
    if not others:
        return call
    turn = itertools.cycle([call, *others])
    return lambda: next(turn)()


def device_name(device: torch.device) -> str:
    """Model of the processor, as in the committed results; with its vectors, as servers of one name
    may have some or others."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model, processors, *rest = dispatch.info().cpu.split(";")
    extensions = " ".join(rest).split()
    known = {"avx512f": "AVX-512", "avx2": "AVX2"}
    vectors = next((name for flag, name in known.items() if flag in extensions), None)
    model = f"{model} with {vectors}" if vectors else model
    return f"{model}, {processors.split(',')[0].strip()}"


def _bind(
    case: Case, function: Callable[..., Any], inputs: tuple[Tensor | None, ...]
) -> Callable[[], Any]:
    if case.mode != "forward_backward":
        return partial(function, *inputs)
    leaves = [_required(inputs[i]).requires_grad_() for i in case.wrt]
    weights = [_weights(x) for x in _as_tuple(function(*inputs))]

    def forward_backward() -> tuple[Tensor, ...]:
        outputs = _as_tuple(function(*inputs))
        gradients = torch.autograd.grad(outputs, leaves, weights)
        return *(x.detach() for x in outputs), *gradients

    return forward_backward


def _check(
    case: Case,
    result: tuple[Tensor, ...],
    inputs: tuple[Tensor | None, ...],
    tolerance: float | None,
) -> None:
    dtype = next(x.dtype for x in inputs if x is not None)
    distribution: Normal | None = None

    def values(*doubles: Tensor | None) -> tuple[Tensor, ...]:
        nonlocal distribution
        expected = case.expected(*doubles)
        if isinstance(expected, Normal):
            distribution = expected
            return (expected.mean,)
        return _as_tuple(expected)

    expected = _as_tuple(_bind(case, values, _copy(inputs, torch.float64))())
    if len(result) != len(expected):
        raise WrongResult(f"{len(result)} tensors, expected {len(expected)}")
    for i, (x, x_64) in enumerate(zip(result, expected, strict=True)):
        if x.shape != x_64.shape:
            raise WrongResult(f"tensor {i} has shape {tuple(x.shape)}, not {tuple(x_64.shape)}")
        if distribution is not None and i == 0:
            error, unit = _sampling_error(x, distribution), "standard errors / 6"
        else:
            allowed = tolerance or 32 * max(torch.finfo(d).eps for d in (x.dtype, dtype))
            tiny = torch.finfo(torch.float64).tiny  # both may be 0
            scale = x_64.abs() + x_64.square().mean().sqrt() + tiny
            error = float(((x.double() - x_64).abs() / (allowed * scale)).max())
            unit = f"tolerances of {allowed:.1g}"
        if not error <= 1:
            raise WrongResult(f"tensor {i} is off by {error:.3g} {unit}")


def _sampling_error(x: Tensor, distribution: Normal) -> float:
    """How far x is from a sample, in units of 6 standard errors (once in 1e9 for a true one).

    The standardised x must have mean 0, variance 1, no correlation with its neighbour, none with
    the mean, and a square that has none with the deviation.
    """
    mean, deviation = (p.flatten() for p in (distribution.mean, distribution.stddev))
    z = (x.detach().double().flatten() - mean) / deviation
    z2 = (z * z - 1) / math.sqrt(2)
    sums = [z, z2, z[1:] * z[:-1], z * _standardised(mean), z2 * _standardised(deviation)]
    errors = [float(s.mean().abs()) * math.sqrt(len(z)) / 6 for s in sums]
    return max(errors) if all(map(math.isfinite, errors)) else math.inf


def _standardised(x: Tensor) -> Tensor:
    x = x - x.mean()
    return x / x.square().mean().sqrt().clamp_min(torch.finfo(x.dtype).tiny)


def _copy(
    inputs: tuple[Tensor | None, ...], dtype: torch.dtype | None = None
) -> tuple[Tensor | None, ...]:
    """Copies, the floating-point ones of a dtype."""
    copies = (None if x is None else x.detach().clone() for x in inputs)
    return tuple(
        x.to(dtype) if x is not None and dtype and x.is_floating_point() else x for x in copies
    )


def _num_copies(inputs: tuple[Tensor | None, ...]) -> int:
    tensors = [x for x in inputs if x is not None]
    if tensors[0].device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(tensors[0].device).L2_cache_size
    return min(256, 1 + math.ceil(2 * cache / sum(x.nbytes for x in tensors)))


def _weights(x: Tensor) -> Tensor:
    """The gradient of the loss with respect to an output: no two alike, so none can be mixed up."""
    weights = torch.linspace(0.5, 1.5, x.numel(), dtype=torch.float64, device=x.device)
    return weights.to(x.dtype).view(x.shape)


def _as_tuple(x: Any) -> tuple[Tensor, ...]:
    return tuple(x) if isinstance(x, tuple | list) else (x,)


def _required(x: Tensor | None) -> Tensor:
    assert x is not None
    return x
