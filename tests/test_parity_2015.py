"""The 2015 code's objective, gradients and sampling steps, by the library's own model.

Its timesteps count from 0: its t is ours less one. Whole sampling chains end in test_golden.py.
"""

import math

import numpy as np
import pytest
import torch

from dpm_fast import reference, sampling
from dpm_fast.gaussian import GaussianDiffusion
from dpm_fast.model import DiffusionModel
from dpm_fast.sampling import Posterior
from dpm_fast.weights_2015 import load_2015_weights
from test_golden import close, tensor
from test_networks import network_2015, params_2015

NUM_STEPS = 40
MODES = ["plain", "inpaint", "denoise", "both"]


def model_2015(arrays, case):
    network = network_2015(arrays, case)
    load_2015_weights(network, params_2015(arrays, f"{case}/param/"))
    return DiffusionModel(GaussianDiffusion.from_schedule("erase", NUM_STEPS), network)


def objective_bits(model, x_0, eps, t):
    """-log likelihood in bits per pixel less that of a unit Gaussian, from one timestep.

    That code multiplies the KL of one step by T, where the bound has T - 1 such terms.
    """
    tables = model.process.tables()
    x_t = reference.noised(x_0, eps, tables.alpha_bar[t].sqrt(), tables.beta_bar[t].sqrt())
    t_of_each = torch.full((len(x_0),), t)
    kl = model.reverse.kl(x_0, x_t, t_of_each, model.network_output(x_t, t_of_each))
    gaussian = 0.5 * x_0[0].numel() * (1 + reference.LOG_2PI)
    nats = NUM_STEPS * kl + model.process.prior_nats(x_0, "paper") - gaussian
    return nats.mean() / (x_0[0, 0].numel() * math.log(2))


def posterior_2015(stored, mode, known, y):
    return Posterior(
        known=(tensor(stored["mask"]), known) if mode in ("inpaint", "both") else None,
        observed=(y, stored["denoise_sigma"].item()) if mode in ("denoise", "both") else None,
    )


@pytest.mark.parametrize("case", ["m0", "m1", "m2"])
@torch.no_grad()
def test_objective_at_every_timestep(golden, case):
    arrays = golden("sohldickstein_mlp")
    model = model_2015(arrays, case)
    x_0, eps = tensor(arrays[f"{case}/X0"]), tensor(arrays[f"{case}/N"])
    bits = [objective_bits(model, x_0, eps, t) for t in range(2, NUM_STEPS + 1)]
    close(torch.stack(bits), arrays[f"{case}/cost_t1_to_Tm1"], floor=0.0)


@pytest.mark.parametrize(("case", "index"), [("m0", 7), ("m1", 20), ("m2", 20)])
def test_gradient_of_the_objective(golden, case, index):
    arrays = golden("sohldickstein_mlp")
    model = model_2015(arrays, case)
    x_0, eps = tensor(arrays[f"{case}/X0"]), tensor(arrays[f"{case}/N"])
    objective_bits(model, x_0, eps, index + 1).backward()
    expected = network_2015(arrays, case)
    # The conversion of weights permutes and crops, so it converts gradients as well.
    load_2015_weights(expected, params_2015(arrays, f"{case}/t{index}/grad/"))
    parameters = dict(model.network.named_parameters())
    assert len(parameters) > 6
    for name, gradient in expected.named_parameters():
        assert gradient.abs().max() > 0
        close(parameters[name].grad, gradient.detach())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("index", [1, 20, 39])
@torch.no_grad()
def test_one_sampling_step(golden, index, mode):
    arrays = golden("sohldickstein_sampler")
    model = model_2015(golden("sohldickstein_mlp"), "m0")
    # The image that a step is conditioned on is the start of its trajectory.
    x_T = tensor(arrays["XT"])
    posterior = posterior_2015(arrays, mode, x_T, x_T)
    at = f"step/t{index}"
    x = tensor(arrays["Xmid"])
    posterior = posterior.to_batch(x.shape, slice(None), x)
    x_prev = sampling.reverse_trajectory(
        model,
        x,
        [index + 1],
        0,
        torch.arange(len(x)),
        posterior,
        lambda t: posterior.known,
        "x_1",
        noise_at=lambda t: tensor(arrays[f"{at}/noise"]),
    )
    close(x_prev, arrays[f"{at}/{mode}/out"])


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_states_along_a_chain(golden, mode):
    arrays = golden("sohldickstein_sampler")
    model = model_2015(golden("sohldickstein_mlp"), "m0")
    eps = tensor(arrays["chain/noise_XT"])
    x_true = tensor(arrays["X_true"])
    y = x_true + arrays["denoise_sigma"].item() * eps
    posterior = posterior_2015(arrays, mode, x_true, y).to_batch(y.shape, slice(None), y)
    steps = tensor(arrays["chain/noise_steps"])
    start = sampling.start_of_trajectory(eps, posterior, posterior.known)
    states = {NUM_STEPS: start}
    sampling.reverse_trajectory(
        model,
        start,
        range(NUM_STEPS, 1, -1),
        0,
        torch.arange(len(start)),
        posterior,
        lambda t: posterior.known,
        "x_1",
        lambda t, x: states.update({t: x.clone()}),
        lambda t: steps[NUM_STEPS - t],
    )
    assert sorted(states) == list(range(1, NUM_STEPS + 1))
    close(states[1], arrays[f"chain/{mode}/X0"])
    # The state before each step, counted like our t, and the last one under 0.
    stored = arrays[f"chain/{mode}/plot_X"]
    for t, expected in zip(arrays[f"chain/{mode}/plot_t"].tolist(), stored, strict=True):
        close(states[max(t, 1)], expected)
    if posterior.known is not None:
        mask = arrays["mask"]
        assert np.array_equal(states[1].numpy()[mask], arrays["X_true"][mask])
