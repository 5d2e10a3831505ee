"""Every op on every backend that is here against float64: `dpm-fast selftest`, in seconds."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpm_fast import noise, ops
from dpm_fast.binomial import BinomialDiffusion
from dpm_fast.dispatch import BACKENDS, BackendError, requested, use_backend, why_absent
from dpm_fast.gaussian import GaussianDiffusion
from dpm_fast.model import DiffusionModel
from dpm_fast.networks import MLP, ConvDenseNetwork, RBFNetwork
from dpm_fast.reference import Bins
from dpm_fast.sampling import Posterior

EVENT = (3, 13, 8)
SMALL_EVENT = (5,)  # of which a block of a GPU takes several
LONG_EVENT = (1, 16390)  # more than the 16384 elements that a kernel takes in one piece
NUM_STEPS = 100
T = torch.tensor([1, 2, 50, 99, NUM_STEPS])
IDS = torch.tensor([0, 1, 2, 2**33, -1])
# Of float32 results, relative to the largest of an example; normals may differ by 1e-5.
TOLERANCE = 2e-5

Case = Callable[[torch.device, torch.dtype], Tensor]
_Kernel = tuple[str, str | None]  # parameterization, variance


@dataclass(frozen=True)
class Check:
    """An op on a backend: its largest error, relative to the largest value of the same example
    in float64."""

    op: str
    device: str
    backend: str
    error: float
    milliseconds: float

    @property
    def passed(self) -> bool:
        return self.error <= TOLERANCE  # not where it is NaN

    def __str__(self) -> str:
        verdict = "ok" if self.passed else "WRONG"
        return (
            f"{self.op:<28} {self.device:<6} {self.backend:<10} {self.error:8.1e} "
            f"{self.milliseconds:9.2f} ms  {verdict}"
        )


def selftest() -> Iterator[Check]:
    """Check each op on each backend of this CPU and, where there is one, of its GPU; or on the one
    backend that was asked for.

    Raises:
        BackendError: where that one can run nowhere here.
    """
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    asked = requested()
    backends = BACKENDS if asked == "auto" else (asked,)
    if not any(why_absent(name, device) is None for name in backends for device in devices):
        reasons = "; ".join(str(why_absent(asked, device)) for device in devices)
        raise BackendError(f"the backend {asked!r} cannot run here: {reasons}")
    conv = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before, conv.fp32_precision = conv.fp32_precision, "ieee"  # not 10 bits, as a GPU's default
    try:
        yield from _checks(devices, backends)
    finally:
        conv.fp32_precision = before


def _checks(devices: Sequence[str], backends: Sequence[str]) -> Iterator[Check]:
    for name, case in CASES.items():
        with use_backend("reference"):
            expected = case(torch.device("cpu"), torch.float64)
        for device in map(torch.device, devices):
            for backend in backends:
                if why_absent(backend, device.type) is None:
                    with use_backend(backend):
                        if device.type == "cuda" or backend != "triton":  # not an interpreter
                            case(device, torch.float32)  # may compile
                        began = time.perf_counter()
                        found = case(device, torch.float32).cpu()
                        seconds = time.perf_counter() - began
                    error = _error(found, expected)
                    yield Check(name, device.type, backend, error, seconds * 1e3)


def _error(found: Tensor, expected: Tensor) -> float:
    """The largest of the examples' errors, each relative to its own largest value."""
    if found.shape != expected.shape:
        return float("inf")
    n = expected.shape[0]
    difference = (found.double() - expected).abs().reshape(n, -1).amax(dim=1)
    return (difference / expected.abs().reshape(n, -1).amax(dim=1)).max().item()


@dataclass(frozen=True)
class _Batch:
    """Inputs that are the same numbers in all dtypes and on all devices."""

    device: torch.device
    dtype: torch.dtype
    event: tuple[int, ...] = EVENT

    @property
    def t(self) -> Tensor:
        return self._of_each(T)

    @property
    def ids(self) -> Tensor:
        return self._of_each(IDS)

    def _of_each(self, values: Tensor) -> Tensor:
        return (values[1:2] if self.event == LONG_EVENT else values).to(self.device)

    def normal(self, seed: int) -> Tensor:
        x = noise.normal(seed, noise.Stream.DATA, self.ids.cpu(), 0, self.event)
        return x.to(self.device, self.dtype)

    def x_0(self) -> Tensor:
        return self.normal(1)

    def x_t(self) -> Tensor:
        return 0.9 * self.normal(1) + 0.3 * self.normal(3)

    def output(self, seed: int, dtype: torch.dtype | None = None) -> Tensor:
        """What a network might say, rounded to ``dtype`` and, for float32 inputs, stored so."""
        out = (0.5 * self.normal(seed)).float().to(dtype or torch.float32)
        return out if dtype and self.dtype == torch.float32 else out.to(self.dtype)

    def bits(self, seed: int) -> Tensor:
        u = noise.uniform(seed, noise.Stream.DATA, self.ids.cpu(), 0, self.event)
        return (u > 0.5).to(self.device, self.dtype)


def _random(name: str) -> Case:
    def case(device: torch.device, _: torch.dtype) -> Tensor:
        size = EVENT[-1] if name == "words" else EVENT
        ids, t = IDS.to(device), T.to(device)
        return getattr(ops, name)(7, noise.Stream.REVERSE, ids, t, size).double()

    return case


def _noise(event: tuple[int, ...] = EVENT, gradient: bool = False) -> Case:
    def case(device: torch.device, dtype: torch.dtype) -> Tensor:
        batch = _Batch(device, dtype, event)
        if not gradient:
            process = GaussianDiffusion.from_schedule("cosine", NUM_STEPS)
            return process.sample_x_t(batch.x_0(), batch.t, 7, batch.ids)
        n = len(batch.ids)
        coefficients = torch.tensor([[0.6, 0.8]], dtype=dtype, device=device).repeat(n, 1)
        coefficients.requires_grad_()
        x_t = ops.noise(batch.x_0(), coefficients, 7, batch.ids, batch.t)
        return torch.autograd.grad(x_t.square().sum(), coefficients)[0]

    return case


def _reverse(
    batch: _Batch, kernel: _Kernel, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Both outputs, where there are two, and the rows."""
    reverse = GaussianDiffusion.from_schedule("cosine", NUM_STEPS).reverse(*kernel)
    sigma2_out = batch.output(4, dtype) if reverse.num_outputs == 2 else None
    return batch.output(2, dtype), sigma2_out, reverse.rows(batch.t, batch.x_t())


def _step(kernel: _Kernel, event: tuple[int, ...] = EVENT, in_place: bool = False) -> Case:
    def case(device: torch.device, dtype: torch.dtype) -> Tensor:
        batch = _Batch(device, dtype, event)
        x_0, out = batch.x_0(), _reverse(batch, kernel)
        step = ops.step_ if in_place else ops.step
        with torch.no_grad():
            return step(
                batch.x_t(), *out, 7, batch.ids, batch.t, known=(x_0 > 1, x_0), observed=(x_0, 0.5)
            )

    return case


def _kl(
    kernel: _Kernel,
    event: tuple[int, ...] = EVENT,
    gradient: str = "",  # with respect to this output
    out_dtype: torch.dtype | None = None,
    **options: Any,
) -> Case:
    def case(device: torch.device, dtype: torch.dtype) -> Tensor:
        batch = _Batch(device, dtype, event)
        mu_out, sigma2_out, rows = _reverse(batch, kernel, out_dtype)
        wanted = {"": None, "mu": mu_out, "sigma2": sigma2_out}[gradient]
        if wanted is not None:
            wanted.requires_grad_()
        nats = ops.kl(batch.x_0(), batch.x_t(), mu_out, sigma2_out, rows, **options)
        return nats if wanted is None else torch.autograd.grad(nats.sum(), wanted)[0]

    return case


def _bernoulli(op: str, event: tuple[int, ...] = EVENT) -> Case:
    def case(device: torch.device, dtype: torch.dtype) -> Tensor:
        batch = _Batch(device, dtype, event)
        process = BinomialDiffusion(NUM_STEPS, prior_rate=0.3)
        x_0, x_t, out = batch.bits(1), batch.bits(2), batch.output(2)
        t, ids = batch.t, batch.ids
        rows = process.reverse("x0").rows(t, x_t)
        if op == "gradient":
            out.requires_grad_()
            return torch.autograd.grad(ops.bernoulli_kl(x_0, x_t, out, rows).sum(), out)[0]
        with torch.no_grad():
            if op == "noise":
                return process.sample_x_t(x_0, t, 7, ids)
            if op == "kl":
                return ops.bernoulli_kl(x_0, x_t, out, rows)
            step = ops.bernoulli_step_ if op == "step_" else ops.bernoulli_step
            return step(x_t, out, rows, 7, ids, t)

    return case


def _conv(*, activation: str = "per_scale", gradient: bool = False) -> Case:
    def case(device: torch.device, dtype: torch.dtype) -> Tensor:
        ids, seeds, channels = IDS.cpu(), range(2), (3, 8, 6)

        def normal(seed: int, *event: int) -> Tensor:
            x = noise.normal(seed, noise.Stream.DATA, ids, 0, event)
            return x.to(device, dtype)

        x = normal(1, 3, 12, 8).requires_grad_(gradient)
        weights = [
            [0.2 * normal(2 + s, f, c, 3, 3)[i] for s in seeds]
            for i, (c, f) in enumerate(itertools.pairwise(channels))
        ]
        biases = [[normal(4 + s, f)[i] for s in seeds] for i, f in enumerate(channels[1:])]
        out = ops.multiscale_conv_stack(x, weights, biases, activation=activation)
        return torch.autograd.grad(out.square().sum(), x)[0] if gradient else out

    return case


def _trajectory(
    make: Callable[..., torch.nn.Module],
    event: tuple[int, ...] = SMALL_EVENT,
    *,
    is_binomial: bool = False,
    **options: Any,
) -> Case:
    """A few steps, since each makes the roundings of those before it larger."""

    def case(device: torch.device, dtype: torch.dtype) -> Tensor:
        process: GaussianDiffusion | BinomialDiffusion
        if is_binomial:
            process = BinomialDiffusion(NUM_STEPS)
        else:
            process = GaussianDiffusion.from_schedule("log_linear", NUM_STEPS)
        shape = event if len(event) > 1 else event[0]
        network = make(shape, NUM_STEPS, num_outputs=1 if is_binomial else 2, **options)
        for i, parameter in enumerate(network.parameters()):
            ids = torch.zeros(1, dtype=torch.int64)
            values = noise.normal(i, noise.Stream.DATA, ids, 0, parameter.shape)[0]
            parameter.data = 0.3 * values
        model = DiffusionModel(process, network).to(device, dtype)
        batch = _Batch(device, dtype, event)
        known = batch.normal(8) > 0.5, batch.bits(9)
        return model.sample(
            len(IDS), seed=5, example_ids=batch.ids, start=(4, batch.bits(7)),
            posterior=Posterior(known=known, known_as="forward"), final="sample",
        )  # fmt: skip

    return case


_PERTURBATION: _Kernel = ("perturbation", None)
_EPSILON: _Kernel = ("epsilon", "learned_range")
_FIXED: _Kernel = ("epsilon", "fixed_small")
_GREY = Bins(1 / 255, -1.0, 1.0)
_CONV: dict[str, Any] = {"dense_layers": 0, "conv_layers": 2, "conv_channels": 6, "num_scales": 2}

CASES: dict[str, Case] = {
    "words": _random("words"),
    "uniform": _random("uniform"),
    "normal": _random("normal"),
    "noise": _noise(),
    "noise, long": _noise(LONG_EVENT),
    "noise, small": _noise(SMALL_EVENT),
    "noise, gradient": _noise(gradient=True),
    "noise, small, gradient": _noise(SMALL_EVENT, gradient=True),
    "step perturbation": _step(_PERTURBATION),
    "step epsilon": _step(_FIXED),
    "step epsilon, long": _step(_FIXED, LONG_EVENT),
    "step perturbation, small": _step(_PERTURBATION, SMALL_EVENT),
    "step_ perturbation": _step(_PERTURBATION, in_place=True),
    "kl perturbation": _kl(_PERTURBATION),
    "kl perturbation, long": _kl(_PERTURBATION, LONG_EVENT),
    "kl perturbation, small": _kl(_PERTURBATION, SMALL_EVENT),
    "kl epsilon, small, discretized": _kl(_EPSILON, SMALL_EVENT, edge="discretized", bins=_GREY),
    "kl perturbation, bfloat16": _kl(_PERTURBATION, out_dtype=torch.bfloat16),
    "kl epsilon, discretized": _kl(_EPSILON, edge="discretized", bins=_GREY),
    "kl perturbation, d mu": _kl(_PERTURBATION, gradient="mu"),
    "kl perturbation, d sigma2": _kl(_PERTURBATION, gradient="sigma2"),
    "kl epsilon, d mu": _kl(_EPSILON, gradient="mu"),
    "multiscale_conv": _conv(),
    "multiscale_conv, after_sum": _conv(activation="after_sum"),
    "multiscale_conv, gradient": _conv(gradient=True),
    "bernoulli_noise": _bernoulli("noise"),
    "bernoulli_noise, long": _bernoulli("noise", LONG_EVENT),
    "bernoulli_step": _bernoulli("step"),
    "bernoulli_step_": _bernoulli("step_"),
    "bernoulli_kl": _bernoulli("kl"),
    "bernoulli_kl, long": _bernoulli("kl", LONG_EVENT),
    "bernoulli_kl, small": _bernoulli("kl", SMALL_EVENT),
    "bernoulli_kl, gradient": _bernoulli("gradient"),
    "trajectory, RBF": _trajectory(RBFNetwork, num_units=16),
    "trajectory, MLP": _trajectory(MLP, hidden=(100, 30)),
    "trajectory, MLP, bits": _trajectory(MLP, is_binomial=True, hidden=(40,)),
    "trajectory, images": _trajectory(ConvDenseNetwork, (2, 4, 6), **_CONV),
    "trajectory, images, bits": _trajectory(ConvDenseNetwork, (2, 4, 6), is_binomial=True, **_CONV),
}
