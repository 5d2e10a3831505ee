"""Every op on every backend that is here against float64: `dpm-fast selftest`, in seconds."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dpm_fast import noise, ops
from dpm_fast.binomial import BinomialDiffusion
from dpm_fast.dispatch import BACKENDS, use_backend, why_absent
from dpm_fast.gaussian import GaussianDiffusion

EVENT = (3, 13, 8)
NUM_STEPS = 100
T = torch.tensor([1, 2, 50, 99, NUM_STEPS])
IDS = torch.tensor([0, 1, 2, 2**33, -1])
TOLERANCE = 2e-5  # of float32 results, relative to the largest; normals may differ by 1e-5

Case = Callable[[torch.device, torch.dtype], Tensor]


@dataclass(frozen=True)
class Check:
    """An op on a backend: its largest error, relative to the largest value in float64."""

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
    """Check each op on each backend of this CPU and, where there is one, of its GPU."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for name, case in CASES.items():
        with use_backend("reference"):
            expected = case(torch.device("cpu"), torch.float64)
        for device in map(torch.device, devices):
            for backend in BACKENDS:
                if why_absent(backend, device.type) is None:
                    with use_backend(backend):
                        case(device, torch.float32)  # may compile
                        began = time.perf_counter()
                        found = case(device, torch.float32).cpu()
                        seconds = time.perf_counter() - began
                    difference = (found.double() - expected).abs().max()
                    error = (difference / expected.abs().max()).item()
                    yield Check(name, device.type, backend, error, seconds * 1e3)


def _gaussian(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x_0 and x_t that all dtypes share."""
    x_0 = noise.normal(1, noise.Stream.DATA, IDS, 0, EVENT, torch.float32)
    return x_0.to(device, dtype), (0.9 * x_0 + 0.3).to(device, dtype)


def _outputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    out = 0.5 * noise.normal(2, noise.Stream.DATA, IDS, 0, (2 * EVENT[0], *EVENT[1:]))
    mu_out, sigma2_out = out.to(device, dtype).chunk(2, dim=1)
    return mu_out, sigma2_out


def _bits(device: torch.device, dtype: torch.dtype, seed: int) -> Tensor:
    u = noise.uniform(seed, noise.Stream.DATA, IDS, 0, EVENT)
    return (u > 0.5).to(device, dtype)


def _normal(device: torch.device, dtype: torch.dtype) -> Tensor:
    eps = ops.normal(7, noise.Stream.REVERSE, IDS.to(device), T.to(device), EVENT)
    return eps.to(dtype)


def _noise(device: torch.device, dtype: torch.dtype) -> Tensor:
    x_0, _ = _gaussian(device, dtype)
    process = GaussianDiffusion.from_schedule("cosine", NUM_STEPS)
    return process.sample_x_t(x_0, T.to(device), 7, IDS.to(device))


def _step(parameterization: str, variance: str | None) -> Case:
    def case(device: torch.device, dtype: torch.dtype) -> Tensor:
        reverse = GaussianDiffusion.from_schedule("cosine", NUM_STEPS).reverse(
            parameterization, variance
        )
        x_0, x_t = _gaussian(device, dtype)
        mu_out, sigma2_out = _outputs(device, dtype)
        t, ids = T.to(device), IDS.to(device)
        if reverse.num_outputs == 1:
            sigma2_out = None  # type: ignore[assignment]
        known = x_0 > 1, x_0
        with torch.no_grad():
            return ops.step(
                x_t, mu_out, sigma2_out, reverse.rows(t, x_t), 7, ids, t,
                known=known, observed=(x_0, 0.5),
            )  # fmt: skip

    return case


def _kl(parameterization: str, variance: str | None, want_gradient: bool) -> Case:
    def case(device: torch.device, dtype: torch.dtype) -> Tensor:
        reverse = GaussianDiffusion.from_schedule("cosine", NUM_STEPS).reverse(
            parameterization, variance
        )
        x_0, x_t = _gaussian(device, dtype)
        mu_out, sigma2_out = _outputs(device, dtype)
        mu_out = mu_out.detach().requires_grad_(want_gradient)
        if reverse.num_outputs == 1:
            sigma2_out = None  # type: ignore[assignment]
        nats = ops.kl(x_0, x_t, mu_out, sigma2_out, reverse.rows(T.to(device), x_t))
        if not want_gradient:
            return nats
        (gradient,) = torch.autograd.grad(nats.sum(), mu_out)
        return gradient

    return case


def _bernoulli(op: str) -> Case:
    def case(device: torch.device, dtype: torch.dtype) -> Tensor:
        process = BinomialDiffusion(NUM_STEPS, prior_rate=0.3)
        reverse = process.reverse("x0")
        x_0, x_t = _bits(device, dtype, 1), _bits(device, dtype, 2)
        out, _ = _outputs(device, dtype)
        t, ids = T.to(device), IDS.to(device)
        with torch.no_grad():
            if op == "noise":
                return process.sample_x_t(x_0, t, 7, ids)
            rows = reverse.rows(t, x_t)
            if op == "step":
                return ops.bernoulli_step(x_t, out, rows, 7, ids, t)
            return ops.bernoulli_kl(x_0, x_t, out, rows)

    return case


CASES: dict[str, Case] = {
    "normal": _normal,
    "noise": _noise,
    "step perturbation": _step("perturbation", None),
    "step epsilon": _step("epsilon", "fixed_small"),
    "kl perturbation": _kl("perturbation", None, False),
    "kl perturbation, gradient": _kl("perturbation", None, True),
    "kl epsilon, gradient": _kl("epsilon", "learned_range", True),
    "bernoulli_noise": _bernoulli("noise"),
    "bernoulli_step": _bernoulli("step"),
    "bernoulli_kl": _bernoulli("kl"),
}
