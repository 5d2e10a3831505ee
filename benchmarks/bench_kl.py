"""One term of the bound on batches of MNIST size, alone and with its gradients.

"reference" is the textbook formula in float32, as one writes it; "reference_exact" is that of this
package, which keeps its digits where two variances nearly agree, and sums in float64.
"""

from collections.abc import Iterator
from functools import partial

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.harness import Case
from dpm_fast import dispatch, noise, ops, reference, use_backend
from dpm_fast.gaussian import GaussianDiffusion

N, SHAPE, NUM_STEPS = 512, (1, 28, 28), 1000
PROCESS = GaussianDiffusion.from_schedule("erase", NUM_STEPS)
KERNELS = [("perturbation", "logit_scaled"), ("epsilon", "learned_range"), ("x0", "fixed_small")]
ELEMENTS = N * 784


def textbook(
    x_0: Tensor, x_t: Tensor, out: Tensor, rows: Tensor, *, parameterization: str, variance: str
) -> Tensor:
    """1/2 [ln(sigma2_p / sigma2_q) + (sigma2_q + (mu_q - mu_p)^2) / sigma2_p - 1], summed."""
    row = reference.reverse_row(rows, x_0.dim())
    mu_out, sigma2_out = out, None
    if variance != "fixed_small":
        mu_out, sigma2_out = out.chunk(2, dim=1)
    if sigma2_out is None:
        log_sigma2_p = row.base.log()
    elif variance == "learned_range":
        log_sigma2_p = row.s * sigma2_out + row.base.log()
    else:
        log_sigma2_p = torch.nn.functional.logsigmoid(row.s * sigma2_out + torch.logit(row.base))
    difference = row.c_0 * x_0 + row.d * x_t - row.a * (row.p * x_t + row.q * mu_out)
    log_sigma2_q = row.delta_0 + row.base.log()
    nats = log_sigma2_p - log_sigma2_q + torch.exp(log_sigma2_q - log_sigma2_p) - 1
    nats = 0.5 * (nats + difference.square() * torch.exp(-log_sigma2_p))
    return nats.flatten(1).sum(dim=1)


def with_backend(name: str, x_0: Tensor, x_t: Tensor, out: Tensor, rows: Tensor) -> Tensor:
    with use_backend(name):
        return ops.kl(x_0, x_t, out, None, rows, joined=out.shape[1] == 2 * x_0.shape[1])


def cases(device: torch.device) -> Iterator[Case]:
    for parameterization, variance in KERNELS:
        learned = variance != "fixed_small"

        def inputs(kernel: tuple[str, str] = (parameterization, variance)) -> tuple[Tensor, ...]:
            ids = torch.arange(N)
            t = noise.stratified_timesteps(0, ids, 2, NUM_STEPS)
            x_0 = noise.normal(0, noise.Stream.DATA, ids, 0, SHAPE)
            x_t = PROCESS.sample_x_t(x_0, t, 0, ids)
            reverse = PROCESS.reverse(*kernel)
            event = (reverse.num_outputs, *SHAPE[1:])
            out = 0.5 * noise.normal(1, noise.Stream.DATA, ids, 0, event)
            return tuple(x.to(device) for x in (x_0, x_t, out, reverse.rows(t, x_t)))

        backends = {"native": "native" if device.type == "cpu" else "cuda", "triton": "triton"}
        providers = {
            "reference": partial(textbook, parameterization=parameterization, variance=variance)
        }
        for backend, provider in {"reference": "reference_exact", **backends}.items():
            if dispatch.why_absent(backend, device.type) is None:
                providers[provider] = partial(with_backend, backend)
        channels = 2 if learned else 1
        for mode, wrt in (("forward", ()), ("forward_backward", (2,))):
            tensors = 2 + channels * (1 if mode == "forward" else 2)
            yield Case(
                op="kl",
                name=f"{N}x1x28x28 {parameterization} {variance}",
                mode=mode,
                inputs=inputs,
                providers=providers,
                expected=partial(with_backend, "reference"),
                bytes=4 * tensors * ELEMENTS,
                flops=(90 if learned else 15) * ELEMENTS,
                wrt=wrt,
                # The textbook's formula loses digits; means nearly cancel in all of them.
                tolerances=dict.fromkeys(providers, 3e-5) | {"reference": 1e-4},
            )


def bench_kl(call: object, benchmark: BenchmarkFixture) -> None:
    benchmark(call)
