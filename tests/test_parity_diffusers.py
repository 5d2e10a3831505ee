"""Parity with diffusers' DDPM scheduler in float64: noising, single steps and respaced sampling.

Its timesteps start at 0, ours at 1.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dpm_fast import sampling, schedules
from dpm_fast.gaussian import GaussianDiffusion
from dpm_fast.model import DiffusionModel
from dpm_fast.respacing import RespacedReverse
from dpm_fast.sampling import Posterior
from given_noise import use_noise
from tolerances import GOLDEN_RTOL

PARAMETERIZATION = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "velocity"}
# diffusers' variance_type -> ours, and the array of which the network's second half is made
VARIANCES = {
    "fixed_small": ("fixed_small", None),
    "fixed_small_log": ("fixed_small", None),
    "fixed_large": ("fixed_large", None),
    "learned_range": ("learned_range", "predicted_variance_range"),
    "learned": ("learned", "predicted_variance_learned"),
}
every_schedule = pytest.mark.parametrize("schedule", ["linear", "cosine"])


def close(actual, expected, rtol=GOLDEN_RTOL):
    """Relative agreement; entries below 1e-3 of the largest one are measured against that."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    atol = 1e-3 * rtol * expected.abs().max().item()
    torch.testing.assert_close(actual.detach(), expected, rtol=rtol, atol=atol)


class Output(nn.Module):
    """A network that returns what it was given at the start."""

    def __init__(self, out):
        super().__init__()
        self.out = out

    def forward(self, x, t):
        return self.out


class Convolution(nn.Module):
    event_shape = (3, 6, 6)

    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x, t):
        return F.conv2d(x, self.weight, self.bias, padding=1)


@every_schedule
def test_schedule(golden, schedule):
    arrays = golden("diffusers_float64")
    close(schedules.beta_schedule(schedule, 1000)[1:], arrays[f"{schedule}1000/betas"])
    tables = GaussianDiffusion.from_schedule(schedule, 1000).tables()
    close(tables.alpha_bar[1:], arrays[f"{schedule}1000/alphas_cumprod"])


@every_schedule
def test_noising_and_velocity(golden, monkeypatch, schedule):
    arrays = golden("diffusers_float64")
    x_0, eps = torch.from_numpy(arrays["x0"]), torch.from_numpy(arrays["noise"])
    t = torch.from_numpy(arrays[f"{schedule}1000/add_noise/timesteps"]) + 1
    process = GaussianDiffusion.from_schedule(schedule, 1000)
    use_noise(monkeypatch, lambda t: eps)
    x_t = process.sample_x_t(x_0, t, 0, torch.arange(len(t)))
    close(x_t, arrays[f"{schedule}1000/add_noise/out"])
    velocity = process.reverse("velocity").simple_target(x_0, x_t, t)
    close(velocity, arrays[f"{schedule}1000/get_velocity/out"])
    close(process.reverse("epsilon").simple_target(x_0, x_t, t), eps)
    close(process.reverse("x0").simple_target(x_0, x_t, t), x_0)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("clip", ["clip", "noclip"])
@pytest.mark.parametrize("prediction", PARAMETERIZATION)
@every_schedule
def test_step(golden, schedule, prediction, clip, variance):
    arrays, case = golden("diffusers_float64"), f"{schedule}1000/{prediction}/{clip}"
    x_t, mu_out = torch.from_numpy(arrays["sample"]), torch.from_numpy(arrays["model_output"])
    eps, limit = torch.from_numpy(arrays["variance_noise"]), arrays["clip_sample_range"].item()
    name, learned = VARIANCES[variance]
    out = mu_out
    if learned is not None:
        sigma2_out = torch.from_numpy(arrays[learned])
        # Its "learned" output is the variance, ours the variance's logarithm.
        out = torch.cat((mu_out, sigma2_out.log() if name == "learned" else sigma2_out), dim=1)
    model = DiffusionModel(
        GaussianDiffusion.from_schedule(schedule, 1000),
        Output(out),
        PARAMETERIZATION[prediction],
        variance=name,
        clamp=(-limit, limit) if clip == "clip" else None,
    )
    timesteps = arrays[f"{schedule}1000/timesteps"].tolist()
    assert timesteps == [999, 500, 1, 0]
    for golden_t in timesteps:
        t = torch.full((len(x_t),), golden_t + 1)
        x_prev = sampling.reverse_trajectory(
            model, x_t, [golden_t + 1], 0, torch.arange(len(x_t)), Posterior(), lambda t: None,
            "mean", noise_at=lambda t: eps,
        )  # fmt: skip
        close(x_prev, arrays[f"{case}/t{golden_t}/{variance}/prev_sample"])
        if variance == "fixed_small":
            mu_p, _ = model.reverse.moments(x_t, t, out)
            x_0 = model.reverse.x_0_from_mean(mu_p, x_t, t)
            close(x_0, arrays[f"{case}/t{golden_t}/pred_original_sample"])


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@every_schedule
@torch.no_grad()
def test_respaced_sampling(golden, schedule, spacing):
    arrays, case = golden("diffusers_float64"), f"{schedule}1000/loop/{spacing}"
    kept = (torch.from_numpy(arrays[f"{case}/timesteps"]).flip(0) + 1).tolist()
    process, last = GaussianDiffusion.from_schedule(schedule, 1000), len(kept)
    weight, bias = torch.from_numpy(arrays["W"]), torch.from_numpy(arrays["b"])
    limit = arrays["clip_sample_range"].item()
    model = DiffusionModel(process, Convolution(weight, bias), "epsilon", clamp=(-limit, limit))
    stream = torch.from_numpy(arrays["noise_stream"])
    drawn = []

    def noise_at(t):
        drawn.append(t)
        return stream[last - kept.index(t)]

    samples = sampling.reverse_trajectory(
        model, stream[0], kept[::-1], 0, torch.arange(2), Posterior(), lambda t: None, "mean",
        noise_at=noise_at, reverse=RespacedReverse(model.reverse, kept, None), end=0,
    )  # fmt: skip
    assert drawn == kept[:0:-1]
    if spacing == "trailing":
        # It ends at its timestep 39, and adds noise at every timestep but 0; there the posterior's
        # variance, 0, is raised to 1e-20.
        samples = samples + 1e-10 * stream[last]
    assert arrays[f"{case}/n_noise_used"] == len(drawn) + (spacing == "trailing")
    close(samples, arrays[f"{case}/final"])
