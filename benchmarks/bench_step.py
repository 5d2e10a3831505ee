"""One reverse step with its noise, 512 images of 1 x 28 x 28: eager PyTorch, peers and the op.

"reference" is a step as one writes it, its coefficients looked up beforehand; "reference_exact"
that of this package, which takes any parameterization.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Normal

import dpm_fast
from benchmarks import peers
from benchmarks.harness import Case
from dpm_fast import ops, reference
from dpm_fast.gaussian import GaussianDiffusion, GaussianReverse

N, EVENT = 512, (1, 28, 28)
NUM_STEPS, T = peers.NUM_STEPS, 500


def cases(device: torch.device) -> list[Case]:
    erase = GaussianDiffusion.from_schedule("erase", NUM_STEPS).reverse("perturbation")
    linear = GaussianDiffusion.from_schedule("linear", NUM_STEPS)
    fixed = linear.reverse("epsilon", "fixed_small", (-1.0, 1.0))
    ranged = linear.reverse("epsilon", "learned_range", (-1.0, 1.0))

    def others(variance: str) -> dict[str, Callable[..., Tensor]]:
        return {
            "diffusers": peers.diffusers_step(T, variance),
            "denoising_diffusion_pytorch": peers.denoising_diffusion_pytorch_step(T, variance),
        }

    return [
        _case("perturbation, learned variance", erase, {}, device),
        _case("epsilon, fixed_small", fixed, others("fixed_small"), device),
        _case("epsilon, learned_range", ranged, others("learned_range"), device),
    ]


def _case(
    name: str,
    reverse: GaussianReverse,
    others: Mapping[str, Callable[..., Tensor]],
    device: torch.device,
) -> Case:
    t = torch.full((N,), T, device=device)

    def inputs() -> tuple[Tensor, ...]:
        generator = torch.Generator(device).manual_seed(0)
        x_t, *out = (
            torch.randn(N, *EVENT, generator=generator, device=device)
            for _ in range(1 + reverse.num_outputs)
        )
        # As networks give it: both outputs in one tensor. Variances within [iDDPM]'s range.
        out[1:] = [x.clamp(-1, 1) for x in out[1:]]
        return x_t, torch.cat(out, dim=1), reverse.rows(t, x_t)

    beta, alpha_bar = (
        x[T].item() for x in (reverse.process.tables().beta, reverse.process.tables().alpha_bar)
    )
    before = reverse.process.tables().alpha_bar[T - 1].item()
    posterior = beta * (1 - before) / (1 - alpha_bar)
    logit_beta = math.log(beta / (1 - beta))

    def textbook(x_t: Tensor, out: Tensor, _: Tensor) -> Tensor:
        if name.startswith("perturbation"):
            mu_out, sigma2_out = out.chunk(2, dim=1)
            mu = math.sqrt(1 - beta) * x_t + math.sqrt(beta) * mu_out
            sigma2 = torch.sigmoid(sigma2_out / math.sqrt(NUM_STEPS) + logit_beta)
            return mu + sigma2.sqrt() * torch.randn_like(x_t)
        eps = out[:, : x_t.shape[1]]
        x_0 = (x_t - math.sqrt(1 - alpha_bar) * eps) / math.sqrt(alpha_bar)
        mu = math.sqrt(before) * beta / (1 - alpha_bar) * x_0.clamp(-1, 1)
        mu = mu + math.sqrt(1 - beta) * (1 - before) / (1 - alpha_bar) * x_t
        if name.endswith("fixed_small"):
            return mu + math.sqrt(posterior) * torch.randn_like(x_t)
        part = (out[:, x_t.shape[1] :] + 1) / 2
        log_sigma2 = part * math.log(beta) + (1 - part) * math.log(posterior)
        return mu + torch.exp(0.5 * log_sigma2) * torch.randn_like(x_t)

    def exact(x_t: Tensor, out: Tensor, rows: Tensor) -> Tensor:
        mu, sigma2 = reference.reverse_moments(x_t, *reverse.split(x_t, out), rows)
        return mu + sigma2.sqrt() * torch.randn_like(x_t)

    def expected(x_t: Tensor, out: Tensor, rows: Tensor) -> Normal:
        mu, sigma2 = reference.reverse_moments(x_t, *reverse.split(x_t, out), rows)
        return Normal(mu, sigma2.expand_as(mu).sqrt())

    ids = torch.arange(N, device=device)

    def op(x_t: Tensor, out: Tensor, rows: Tensor) -> Tensor:
        return ops.step(x_t, *reverse.split(x_t, out), rows, 0, ids, t)

    backends = ("native", "triton") if device.type == "cuda" else ("native",)
    providers: dict[str, Callable[..., Any]] = {"reference": textbook, "reference_exact": exact}
    providers |= {backend: partial(_with, backend, op) for backend in backends}
    return Case(
        op="step",
        name=f"{name}, {N}x{'x'.join(map(str, EVENT))}",
        mode="forward",
        inputs=inputs,
        providers=providers | others,
        expected=expected,
        bytes=4 * N * 28 * 28 * (2 + reverse.num_outputs),
        flops=0,
    )


def _with(backend: str, op: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
    with dpm_fast.use_backend(backend):
        return op(*arguments)


def bench_step(call: Callable[[], object], benchmark: Any) -> None:
    benchmark(call)
