"""Binomial diffusion on the heartbeat data and on batches of binary MNIST.

"reference" is the textbook in float32, as one writes it: `torch.rand` and a comparison, and for
the bound a cross-entropy less an entropy, which keeps no digits where p is nearly q.
"reference_exact" is that of this package, with the noise of its contract.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.distributions import Normal

from benchmarks.harness import Case
from dpm_fast import dispatch, noise, ops, reference, use_backend
from dpm_fast.binomial import BinomialDiffusion
from dpm_fast.reference import BernoulliRow

NUM_STEPS = 1000
PROCESS = BinomialDiffusion(NUM_STEPS, 0.2)
SHAPES = {"heartbeat 10000x20": (10000, (20,)), "512x1x28x28": (512, (1, 28, 28))}
SEED = 0
Provider = Callable[..., Tensor]


def textbook_noise(x_0: Tensor, rows: Tensor, ids: Tensor, t: Tensor) -> Tensor:
    rate_0, rate_1 = (rate.view(-1, *(1 for _ in x_0.shape[1:])) for rate in rows.unbind(1))
    rate = rate_0 + (rate_1 - rate_0) * x_0
    return (torch.rand_like(rate) < rate).to(x_0.dtype)


def textbook_logit(x_t: Tensor, out: Tensor, rows: Tensor) -> Tensor:
    row = reference.bernoulli_row(rows, x_t.dim())
    h = torch.where(x_t > 0.5, row.h_01, row.h_00)
    offset = torch.where(x_t > 0.5, row.o_1, row.o_0)
    return offset + torch.where(row.c > 0, torch.log1p(row.c * torch.sigmoid(out + h)), out)


def textbook_step(x_t: Tensor, out: Tensor, rows: Tensor, ids: Tensor, t: Tensor) -> Tensor:
    rate = torch.sigmoid(textbook_logit(x_t, out, rows))
    return (torch.rand_like(rate) < rate).to(x_t.dtype)


def textbook_kl(x_0: Tensor, x_t: Tensor, out: Tensor, rows: Tensor) -> Tensor:
    row = reference.bernoulli_row(rows, x_t.dim())
    j, k = x_0 > 0.5, x_t > 0.5
    m = torch.where(
        j, torch.where(k, row.m_11, row.m_10), torch.where(k, row.m_01, row.m_00)
    )  # of the value that x_{t-1} seldom has, which is the one that x_t has not
    logit = textbook_logit(x_t, out, rows)
    logit_of_m = torch.where(_is_0(row, j, k), -logit, logit)
    cross_entropy = m * F.softplus(-logit_of_m) + (1 - m) * F.softplus(logit_of_m)
    entropy = -torch.xlogy(m, m) - torch.special.xlog1py(1 - m, -m)
    return (cross_entropy - entropy).flatten(1).sum(dim=1)


def _is_0(row: BernoulliRow, j: Tensor, k: Tensor) -> Tensor:
    """Whether the rarer value is 0: there p raises its log-odds by lowering the logit."""
    b = torch.where(j, torch.where(k, row.b_11, row.b_10), torch.where(k, row.b_01, row.b_00))
    return torch.where(row.c > 0, torch.where(j, -b, b), b) < 0


def with_backend(name: str, op: str, *args: Tensor) -> Tensor:
    with use_backend(name):
        if op == "kl":
            return ops.bernoulli_kl(*args)
        *tensors, ids, t = args
        return getattr(ops, f"bernoulli_{op}")(*tensors, SEED, ids, t)


def bits_of(rate: Tensor) -> Normal:
    """Independent bits, as far as their means and variances go."""
    return Normal(rate, (rate * (1 - rate)).sqrt())


def expected_noise(x_0: Tensor, rows: Tensor, ids: Tensor, t: Tensor) -> Normal:
    rate_0, rate_1 = (rate.view(-1, *(1 for _ in x_0.shape[1:])) for rate in rows.unbind(1))
    return bits_of(torch.where(x_0 > 0.5, rate_1, rate_0))


def expected_step(x_t: Tensor, out: Tensor, rows: Tensor, ids: Tensor, t: Tensor) -> Normal:
    return bits_of(torch.sigmoid(reference.bernoulli_logit(x_t, out, rows)))


def make_inputs(
    op: str, shape: str, parameterization: str, device: torch.device
) -> tuple[Tensor, ...]:
    n, event = SHAPES[shape]
    ids = torch.arange(n)
    u = noise.uniform(0, noise.Stream.DATA, ids, 0, event)
    x_0 = (u < 0.4).float()
    t = noise.stratified_timesteps(0, ids, 2, NUM_STEPS)
    if op != "kl":  # rates that are not next to 0 or 1, where a sample would tell little
        t = torch.full_like(ids, NUM_STEPS if op == "step" else NUM_STEPS // 2)
    x_t = PROCESS.sample_x_t(x_0, t, 0, ids)
    out = 0.5 * noise.normal(1, noise.Stream.DATA, ids, 0, event)
    rows = PROCESS.reverse(parameterization).rows(t, x_t)
    inputs = {
        "noise": (x_0, PROCESS.noise_rows(t, x_0), ids, t),
        "step": (x_t, out, rows, ids, t),
        "kl": (x_0, x_t, out, rows),
    }[op]
    return tuple(x.to(device) for x in inputs)


TEXTBOOK = {"noise": textbook_noise, "step": textbook_step, "kl": textbook_kl}
EXPECTED = {
    "noise": expected_noise,
    "step": expected_step,
    "kl": partial(with_backend, "reference", "kl"),
}
WORK = [
    ("noise", "rate", "forward"),
    ("step", "rate", "sample"),
    ("step", "x0", "sample"),
    ("kl", "rate", "forward"),
    ("kl", "perturbation", "forward_backward"),
    ("kl", "x0", "forward_backward"),
]
# Additions and multiplications of one element: Philox counts as none, being of integers.
FLOPS = {"noise": 2, "step": 20, "kl": 60}
TENSORS = {"noise": 2, "step": 3, "kl": 3}


def cases(device: torch.device) -> Iterator[Case]:
    backends = {"native": "native" if device.type == "cpu" else "cuda", "triton": "triton"}
    for shape, (n, event) in SHAPES.items():
        num_elements = n * torch.Size(event).numel()
        for op, parameterization, mode in WORK:
            providers: dict[str, Provider] = {"reference": TEXTBOOK[op]}
            for backend, provider in {"reference": "reference_exact", **backends}.items():
                if dispatch.why_absent(backend, device.type) is None:
                    providers[provider] = partial(with_backend, backend, op)
            has_gradient = mode == "forward_backward"
            yield Case(
                op=f"bernoulli_{op}",
                name=shape if op == "noise" else f"{shape} {parameterization}",
                mode=mode,
                inputs=partial(make_inputs, op, shape, parameterization, device),
                providers=providers,
                expected=EXPECTED[op],
                bytes=4 * (TENSORS[op] + has_gradient) * num_elements,
                flops=FLOPS[op] * num_elements,
                wrt=(2,) if has_gradient else (),
                # The textbook's formula loses digits.
                tolerances={"reference": 1e-2} if op == "kl" else {},
            )


def bench_bernoulli(call: object, benchmark: BenchmarkFixture) -> None:
    benchmark(call)
