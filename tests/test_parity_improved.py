"""Parity with improved-diffusion in float64: tables, kernels, samples, losses and whole bounds.

Its timesteps start at 0, ours at 1: golden "t0" is our t = 1, the decoder term, there computed with
the tanh approximation of the normal CDF (our edge "discretized_tanh").
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dpm_fast
from dpm_fast import noise, reference, sampling, schedules
from dpm_fast.data import DataSpec
from dpm_fast.gaussian import GaussianDiffusion
from dpm_fast.model import DiffusionModel
from dpm_fast.sampling import Posterior
from given_noise import use_noise
from tolerances import GOLDEN_RTOL

# A bin's probability is a difference of two values of tanh near 1, so the last digits of a decoder
# term depend on the machine's tanh: 5e-8 of the golden value is certain. Near the floor of 1e-12
# (mean types other than EPSILON), 2e-6 of the value is and 1e-4 of the gradient.
DECODER_RTOL = {"EPSILON": 5e-8, "START_X": 2e-6, "PREVIOUS_X": 2e-6}
DECODER_GRADIENT_RTOL = {"EPSILON": 5e-8, "START_X": 1e-4, "PREVIOUS_X": 1e-4}
# The golden KL at t = T is a sum of terms of order 1, of which as little as 1e-10 is left.
PRIOR_ATOL = 1e-16

PARAMETERIZATION = {"EPSILON": "epsilon", "START_X": "x0", "PREVIOUS_X": "previous"}
KERNELS = [
    ("linear", "EPSILON", "LEARNED_RANGE"),
    ("linear", "EPSILON", "FIXED_SMALL"),
    ("linear", "EPSILON", "FIXED_LARGE"),
    ("cosine", "EPSILON", "LEARNED_RANGE"),
    ("linear", "START_X", "LEARNED_RANGE"),
    ("linear", "PREVIOUS_X", "FIXED_LARGE"),
]
TIMESTEPS = [0, 1, 10, 500, 998, 999]
RESPACED = ["linear/T1000/100", "cosine/T1000/50", "linear/T1000/ddim50", "cosine/T4000/10,15,20"]
BOUNDS = [
    "linear100_plain",
    "linear1000_respaced100",
    "linear1000_respaced100_fixedsmall",
    "cosine1000_respaced100_fixedlarge",
]

every_kernel = pytest.mark.parametrize(("schedule", "mean", "variance"), KERNELS)
every_clip = pytest.mark.parametrize("clip", ["clip", "noclip"])


def close(actual, expected, rtol=GOLDEN_RTOL, atol=0.0):
    """Relative agreement; entries below 1e-3 of the largest one are measured against that."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    scale = expected.abs().max().item()
    torch.testing.assert_close(
        actual.detach(), expected, rtol=rtol, atol=max(atol, 1e-3 * rtol * scale)
    )


class Convolution(nn.Module):
    """The network behind the golden values."""

    def __init__(self, arrays, num_channels):
        super().__init__()
        self.weight = nn.Parameter(torch.from_numpy(arrays["W"])[:num_channels].clone())
        self.bias = nn.Parameter(torch.from_numpy(arrays["b"])[:num_channels].clone())

    def forward(self, x, t):
        return F.conv2d(x, self.weight, self.bias, padding=1)


def golden_model(arrays, process, mean, variance, clip):
    # A clamp acts on a predicted x_0; in improved-diffusion too, a predicted x_{t-1} ignores it.
    clamped = clip == "clip" and mean != "PREVIOUS_X"
    return DiffusionModel(
        process,
        Convolution(arrays, 6 if variance == "LEARNED_RANGE" else 3),
        PARAMETERIZATION[mean],
        variance=variance.lower(),
        clamp=(-1.0, 1.0) if clamped else None,
        data=DataSpec("pixels", (3, 8, 8), "discrete", shift=127.5, scale=1 / 127.5, levels=256),
    )


def bits_per_dim(nats, x):
    return nats / (math.prod(x.shape[1:]) * math.log(2))


@pytest.mark.parametrize("num_steps", [1000, 4000])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_tables(golden, schedule, num_steps):
    arrays, case = golden("improved_schedules"), f"{schedule}/T{num_steps}"

    def check(actual, name):
        close(actual, arrays[f"{case}/{name}"])

    check(schedules.beta_schedule(schedule, num_steps)[1:], "betas")
    process = GaussianDiffusion.from_schedule(schedule, num_steps)
    beta, alpha_bar, beta_bar, log_alpha_bar, sigma2_q, c_0, c_x = process.tables()
    check(beta[1:], "betas")
    check(alpha_bar[1:], "alphas_cumprod")
    check(alpha_bar[:-1], "alphas_cumprod_prev")
    check(torch.cat((alpha_bar[2:], torch.zeros(1))), "alphas_cumprod_next")
    check(log_alpha_bar[1:].exp(), "alphas_cumprod")
    check(alpha_bar[1:].sqrt(), "sqrt_alphas_cumprod")
    check(beta_bar[1:].sqrt(), "sqrt_one_minus_alphas_cumprod")
    check(beta_bar[1:].log(), "log_one_minus_alphas_cumprod")
    check(alpha_bar[1:].rsqrt(), "sqrt_recip_alphas_cumprod")
    check((beta_bar[1:] / alpha_bar[1:]).sqrt(), "sqrt_recipm1_alphas_cumprod")
    check(sigma2_q[1:], "posterior_variance")
    check(c_0[1:], "posterior_mean_coef1")
    check(c_x[1:], "posterior_mean_coef2")
    clipped = process.reverse("x0").table()[1:, reference.ReverseRow._fields.index("base")]
    check(clipped.log(), "posterior_log_variance_clipped")


@pytest.mark.parametrize("case", RESPACED)
def test_respaced_tables(golden, case):
    arrays = golden("improved_schedules")
    case, (schedule, num_steps, _) = f"respaced/{case}", case.split("/")
    full = GaussianDiffusion.from_schedule(schedule, int(num_steps[1:])).tables()
    kept = torch.from_numpy(arrays[f"{case}/timestep_map"]) + 1
    alpha_bar = full.alpha_bar[torch.cat((kept.new_zeros(1), kept))]
    betas = 1 - alpha_bar[1:] / alpha_bar[:-1]
    close(betas, arrays[f"{case}/betas"])

    tables = GaussianDiffusion(arrays[f"{case}/betas"]).tables()
    assert len(tables.beta) == len(kept) + 1
    close(tables.alpha_bar[1:], arrays[f"{case}/alphas_cumprod"])
    close(tables.alpha_bar[1:], full.alpha_bar[kept])
    close(tables.sigma2_q[1:], arrays[f"{case}/posterior_variance"])
    close(tables.c_0[1:], arrays[f"{case}/posterior_mean_coef1"])
    close(tables.c_x[1:], arrays[f"{case}/posterior_mean_coef2"])
    close(tables.sigma2_q[2:].log(), arrays[f"{case}/posterior_log_variance_clipped"][1:])


def test_discretized_gaussian(golden):
    arrays = {
        name.removeprefix("disc/"): torch.from_numpy(array)
        for name, array in golden("improved_functions").items()
        if name.startswith("disc/")
    }
    nats = reference.discretized_tanh_nats(
        arrays["x"],
        arrays["mean"],
        (2 * arrays["log_scale"]).exp(),
        reference.Bins(1 / 255, -1.0, 1.0),
    )
    # Probabilities are differences of numbers near 1: 1e-16 of them is 1e-4 of the floor, 1e-12.
    expected = -arrays["log_likelihood_nats"]
    torch.testing.assert_close(nats.neg().exp(), expected.neg().exp(), rtol=1e-9, atol=1e-15)
    assert nats.max().item() == pytest.approx(-math.log(1e-12), rel=1e-12)


def test_cases_are_all_of_the_golden_file(golden):
    names = [name.split("/") for name in golden("improved_terms")]
    found = {
        (name[0].removesuffix("_T1000"), name[1], name[2]) for name in names if name[-1] == "loss"
    }
    assert found == set(KERNELS)
    assert golden("improved_terms")["ts"].tolist() == TIMESTEPS


@pytest.mark.parametrize("golden_t", TIMESTEPS)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_forward_process(golden, monkeypatch, schedule, golden_t):
    arrays, case = golden("improved_terms"), f"{schedule}_T1000"
    x_0, eps = torch.from_numpy(arrays["x_start"]), torch.from_numpy(arrays["noise"])
    process, t = GaussianDiffusion.from_schedule(schedule, 1000), golden_t + 1
    use_noise(monkeypatch, lambda t: eps)
    x_t = process.sample_x_t(x_0, torch.full((4,), t), 0, torch.arange(4))
    close(x_t, arrays[f"{case}/t{golden_t}/x_t"])

    def check(actual, name):
        close(actual, arrays[f"{case}/t{golden_t}/{name}"])

    tables = process.tables()
    check(tables.beta_bar[t], "q_variance")
    check(tables.beta_bar[t].log(), "q_log_variance")
    check(tables.c_0[t] * x_0 + tables.c_x[t] * x_t, "q_posterior_mean")
    check(tables.sigma2_q[t], "q_posterior_variance")
    check(tables.sigma2_q[max(t, 2)].log(), "q_posterior_log_variance_clipped")
    bits = bits_per_dim(process.prior_nats(x_0, "discretized_tanh"), x_0)
    close(bits, arrays[f"{case}/prior_bpd"], atol=PRIOR_ATOL)


@every_clip
@pytest.mark.parametrize("golden_t", TIMESTEPS)
@every_kernel
@torch.no_grad()
def test_kernel(golden, monkeypatch, schedule, mean, variance, golden_t, clip):
    arrays = golden("improved_terms")
    case = f"{schedule}_T1000/{mean}/{variance}/t{golden_t}"
    x_0, eps = torch.from_numpy(arrays["x_start"]), torch.from_numpy(arrays["noise"])
    x_t = torch.from_numpy(arrays[f"{schedule}_T1000/t{golden_t}/x_t"])
    process = GaussianDiffusion.from_schedule(schedule, 1000)
    model = golden_model(arrays, process, mean, variance, clip)
    t, ids = torch.full((4,), golden_t + 1), torch.arange(4)
    out = model.network_output(x_t, t)

    mu_p, sigma2_p = model.reverse.moments(x_t, t, out)
    log_variance = torch.from_numpy(arrays[f"{case}/log_variance"])
    close(sigma2_p.log().expand_as(x_t), log_variance.expand_as(x_t))
    # Without clipping the file holds means of learned variances only, and the bound of all.
    if clip == "clip" or variance == "LEARNED_RANGE":
        close(mu_p, arrays[f"{case}/{clip}/mean"])
        # Its x_0 of a predicted x_{t-1} is clipped, for display: no mean of ours has that part.
        if mean != "PREVIOUS_X":
            predicted = model.reverse.x_0_from_mean(mu_p, x_t, t)
            close(predicted, arrays[f"{case}/{clip}/pred_xstart"])

    use_noise(monkeypatch, lambda t: eps)
    nats = model.term_nats(x_0, t, 0, ids, "discretized_tanh").detach()
    expected = arrays[f"{case}/{clip}/vb_bpd"]
    if golden_t == 0:
        close(bits_per_dim(nats, x_0), expected, rtol=DECODER_RTOL[mean])
        log_likelihood = arrays[f"{case}/{clip}/decoder_log_likelihood"]
        close(nats, -log_likelihood.sum(axis=(1, 2, 3)), rtol=DECODER_RTOL[mean])
    else:
        close(bits_per_dim(nats, x_0), expected)
    if golden_t in (10, 500) and clip == "clip":
        kl = arrays[f"{case}/clip/kl_nats"].sum(axis=(1, 2, 3))
        close(model.reverse.kl(x_0, x_t, t, out), kl)

    if clip == "clip":
        x_prev = sampling.reverse_trajectory(
            model, x_t, [golden_t + 1], 0, torch.arange(len(x_t)), Posterior(), lambda t: None,
            "mean", noise_at=lambda t: eps,
        )  # fmt: skip
        close(x_prev, arrays[f"{case}/p_sample_clip"])


@pytest.mark.parametrize("loss", ["MSE", "RESCALED_MSE", "KL", "RESCALED_KL"])
@every_kernel
def test_training(golden, monkeypatch, schedule, mean, variance, loss):
    arrays, kernel = golden("improved_terms"), f"{schedule}_T1000/{mean}/{variance}"
    case = f"{kernel}/train/{loss}"
    x_0, eps = torch.from_numpy(arrays["x_start"]), torch.from_numpy(arrays["noise"])
    process = GaussianDiffusion.from_schedule(schedule, 1000)
    model = golden_model(arrays, process, mean, variance, "noclip")
    t, ids = torch.from_numpy(arrays[f"{kernel}/train_t"]) + 1, torch.arange(4)
    assert t.min() == 1
    assert t.max() > 2
    use_noise(monkeypatch, lambda t: eps)
    monkeypatch.setattr(noise, "stratified_timesteps", lambda *args: t)

    def ours(kind, **options):
        return model.loss(
            x_0, seed=0, example_ids=ids, kind=kind, edge="discretized_tanh", **options
        )

    # Ours are means over the batch, and "bound" is T times one term, plus the prior's.
    expected = torch.from_numpy(arrays[f"{case}/loss"])
    rtol, gradient_rtol, scale = DECODER_RTOL[mean], DECODER_GRADIENT_RTOL[mean], 1.0
    if loss.endswith("KL"):
        per_example = bits_per_dim(model.term_nats(x_0, t, 0, ids, "discretized_tanh"), x_0)
        scale = 1.0 if loss == "RESCALED_KL" else 1000.0
        close(1000 / scale * per_example[1:], expected[1:])
        prior = torch.from_numpy(arrays[f"{schedule}_T1000/prior_bpd"])
        value, expected = ours("bound"), scale * expected + prior
        # Seen apart from terms of up to 5e4, whose last place is 7e-12; the prior is above 5e-10.
        close(value - 1000 * per_example.mean(), prior.mean(), atol=2e-11)
    elif variance == "LEARNED_RANGE":
        # vb_weight 1e-3 times T = 1000 steps: the terms weigh the same, rescaled or not.
        value = ours("hybrid", vb_weight=1e-3)
        mse = torch.from_numpy(arrays[f"{case}/mse"])
        close(ours("simple"), mse.mean())
        close(value - ours("simple"), arrays[f"{case}/vb"].mean(), rtol=rtol)
    else:
        value, rtol, gradient_rtol = ours("simple"), GOLDEN_RTOL, GOLDEN_RTOL
    close(value, expected.mean(), rtol=rtol)

    value.backward()
    for parameter, name in ((model.network.weight, "W"), (model.network.bias, "b")):
        # Of a fixed variance the file's network has three channels more, which nothing reads.
        gradient = torch.from_numpy(arrays[f"{case}/grad_{name}"])
        assert not gradient[len(parameter) :].any()
        close(parameter.grad * len(x_0), scale * gradient[: len(parameter)], rtol=gradient_rtol)


@every_clip
@pytest.mark.parametrize("run", BOUNDS)
def test_whole_bound(golden, monkeypatch, run, clip):
    arrays = golden("improved_bpd")
    schedule, num_steps, spacing, mean, variance = arrays[f"{run}/config"].tolist()
    process = GaussianDiffusion(arrays[f"{run}/betas"])
    last = process.num_steps
    assert last == arrays[f"{run}/num_timesteps"] == 100
    if spacing == "None":
        close(process.tables().beta, schedules.beta_schedule(schedule, int(num_steps)))
    model = golden_model(arrays, process, mean, variance, clip)
    stream, x_0 = torch.from_numpy(arrays["noise_stream"]), torch.from_numpy(arrays["x_start"])
    drawn = []

    def noise_at(t):  # timestep after timestep, the four examples of each
        drawn.extend(t.tolist())
        return stream[last - t[::4]].flatten(0, 1)

    use_noise(monkeypatch, noise_at)
    result = model.bound(x_0, timesteps="exact", edge="discretized_tanh")
    assert drawn == [t for t in range(last, 0, -1) for _ in x_0]
    expected = torch.from_numpy(arrays[f"{run}/{clip}/vb"]).flip(1)
    close(bits_per_dim(result.prior_nats, x_0), arrays[f"{run}/{clip}/prior_bpd"], atol=PRIOR_ATOL)
    per_timestep = bits_per_dim(result.per_timestep_nats[1:], x_0)
    close(per_timestep[1:], expected[:, 1:].mean(0))
    close(per_timestep[0], expected[:, 0].mean(), rtol=DECODER_RTOL[mean])
    close(result.bits_per_dim, arrays[f"{run}/{clip}/total_bpd"])
    found = dpm_fast.likelihood(
        model.network,
        x_0,
        betas=arrays[f"{run}/betas"],
        parameterization=PARAMETERIZATION[mean],
        variance=variance.lower(),
        clamp=clip == "clip",
        edge="discretized_tanh",
    )
    assert torch.equal(found.bits_per_dim, result.bits_per_dim)

    for t in (1, 2, 50, last):
        nats = model.term_nats(x_0, torch.full((4,), t), 0, torch.arange(4), "discretized_tanh")
        rtol = DECODER_RTOL[mean] if t == 1 else GOLDEN_RTOL
        close(bits_per_dim(nats, x_0), expected[:, t - 1], rtol=rtol)
