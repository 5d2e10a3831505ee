"""One reverse step with its noise, 512 images of 1 x 28 x 28: eager PyTorch, peers and the op."""

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

    def eager(x_t: Tensor, out: Tensor, rows: Tensor) -> Tensor:
        mu, sigma2 = reference.reverse_moments(x_t, *reverse.split(x_t, out), rows)
        return mu + sigma2.sqrt() * torch.randn_like(x_t)

    def expected(x_t: Tensor, out: Tensor, rows: Tensor) -> Normal:
        mu, sigma2 = reference.reverse_moments(x_t, *reverse.split(x_t, out), rows)
        return Normal(mu, sigma2.expand_as(mu).sqrt())

    ids = torch.arange(N, device=device)

    def op(x_t: Tensor, out: Tensor, rows: Tensor) -> Tensor:
        return ops.step(x_t, *reverse.split(x_t, out), rows, 0, ids, t)

    backends = ("native", "triton") if device.type == "cuda" else ("native",)
    providers: dict[str, Callable[..., Any]] = {"reference": eager}
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
