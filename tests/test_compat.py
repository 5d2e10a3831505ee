"""Models that other libraries trained: their likelihood, and diffusers' schedulers."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dpm_fast
from dpm_fast import schedules
from dpm_fast.compat import from_diffusers
from dpm_fast.compat.any_model import grey_levels
from dpm_fast.gaussian import GaussianDiffusion
from dpm_fast.model import DiffusionModel
from dpm_fast.noise import Stream, normal

BETAS = schedules.beta_schedule("linear", 30)[1:]
LEVELS = torch.randint(0, 256, (5, 1, 4, 4), generator=torch.Generator().manual_seed(0)).byte()


class Network(nn.Module):
    """With dropout, timesteps from 0, and what diffusers' networks return."""

    def __init__(self, num_outputs: int = 2):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, num_outputs, 3, padding=1)
        self.dropout = nn.Dropout()
        self.config = SimpleNamespace(in_channels=1, sample_size=4)
        self.seen: list[int] = []

    def forward(self, x: Tensor, t: Tensor) -> SimpleNamespace:
        self.seen += t.tolist()
        return SimpleNamespace(sample=self.dropout(self.conv(x) * (1 + t[:, None, None, None])))


def test_likelihood_is_the_bound_of_the_model_that_it_names() -> None:
    network = Network()
    network.dropout.eval()
    found = dpm_fast.likelihood(network, LEVELS, betas=BETAS, seed=3)
    assert (min(network.seen), max(network.seen)) == (0, 29)
    model = DiffusionModel(
        GaussianDiffusion(BETAS),
        network.eval(),
        "epsilon",
        variance="learned_range",
        clamp=(-1.0, 1.0),
        data=grey_levels((1, 4, 4), 8),
        t_base=0,
    )
    x_0 = LEVELS / 127.5 - 1
    expected = model.bound(x_0, edge="discretized", seed=3)
    torch.testing.assert_close(found.bound_nats, expected.bound_nats, rtol=1e-6, atol=0)
    scaled = dpm_fast.likelihood(network, x_0, betas=BETAS, seed=3)
    assert torch.equal(scaled.bound_nats, expected.bound_nats)
    chosen = {"bits": 8, "data_range": (-1.0, 1.0), "clamp": (-1.0, 1.0), "t_base": 0}
    assert found.settings == expected.settings | chosen
    free = dpm_fast.likelihood(network, x_0, betas=BETAS, seed=3, clamp=False)
    assert not torch.allclose(free.bound_nats, expected.bound_nats)


def test_a_network_is_in_evaluation_mode_for_its_likelihood_alone() -> None:
    network = Network()
    network.conv.eval()  # as one may freeze a part of it
    first, second = (dpm_fast.likelihood(network, LEVELS, betas=BETAS) for _ in range(2))
    assert torch.equal(first.bound_nats, second.bound_nats)
    assert network.training
    assert network.dropout.training
    assert not network.conv.training


def test_real_numbers_have_a_density() -> None:
    x_0 = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    network, options = Network(1), {"betas": BETAS, "variance": "fixed_small"}
    found = dpm_fast.likelihood(network, x_0, bits=None, **options)
    assert found.edge == "decoder"
    with pytest.raises(ValueError, match="x_0 in data units must be"):
        dpm_fast.likelihood(network, x_0, **options)
    few = dpm_fast.likelihood(network, LEVELS // 128, bits=1, data_range=(0, 1), **options)
    assert few.edge == "discretized"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"x_0": [1.0]}, TypeError, "x_0 must be a tensor"),
        ({"x_0": torch.zeros(4)}, TypeError, r"x_0 must be a tensor \(N, \*event\), got \(4,\)"),
        ({"x_0": LEVELS, "bits": 7}, ValueError, "x_0 in data units must be"),
        ({"bits": None}, TypeError, "x_0 must be a floating-point tensor"),
        ({"bits": 0}, ValueError, "bits must be at least 1, got 0"),
        ({"bits": 8.5}, TypeError, "bits must be an integer"),
        ({"data_range": (1, -1)}, ValueError, "data_range must be"),
        ({"betas": [2.0]}, ValueError, "betas"),
        ({"network": lambda x, t: None}, TypeError, "the network must return a tensor"),
        ({"draws": 0}, ValueError, "draws must be an integer of at least 1"),
    ],
)
def test_wrong_input(options: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"network": Network(), "x_0": LEVELS, "betas": BETAS} | options
    with pytest.raises(error, match=message):
        dpm_fast.likelihood(arguments.pop("network"), arguments.pop("x_0"), **arguments)


def scheduler(**config: Any) -> SimpleNamespace:
    return SimpleNamespace(betas=BETAS.float(), config=config)


def test_a_scheduler_says_what_a_step_is() -> None:
    model = from_diffusers(Network(1), scheduler(clip_sample=True, clip_sample_range=2.0))
    reverse = model.reverse
    assert (reverse.parameterization, reverse.variance) == ("epsilon", "fixed_small")
    assert (reverse.clamp, model.t_base, model.event_shape) == ((-2.0, 2.0), 0, (1, 4, 4))
    assert model.eval().sample(2).isfinite().all()
    config = {"prediction_type": "v_prediction", "variance_type": "learned_range"}
    reverse = from_diffusers(Network(), scheduler(**config), shape=(1, 2, 2), bits=None).reverse
    assert (reverse.parameterization, reverse.variance) == ("velocity", "learned_range")
    assert reverse.clamp is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"thresholding": True}, "must not have thresholding"),
        ({"prediction_type": "flow_prediction"}, "prediction_type must be one of epsilon, sample"),
        ({"variance_type": "learned"}, "variance_type must be one of fixed_small"),
    ],
)
def test_what_is_no_gaussian_step_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_diffusers(Network(), scheduler(**config))


def test_a_shape_that_nobody_tells_has_to_be_given() -> None:
    network = Network(1)
    del network.config
    with pytest.raises(ValueError, match="shape must be given"):
        from_diffusers(network, scheduler())


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_samples_are_those_of_diffusers(
    prediction: str, variance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedulers = pytest.importorskip("diffusers.schedulers.scheduling_ddpm")
    network = Network(2 if variance == "learned_range" else 1).eval()
    ddpm = schedulers.DDPMScheduler(
        30, beta_end=0.5, prediction_type=prediction, variance_type=variance
    )
    model = from_diffusers(network, ddpm)
    found, states = model.sample(3, seed=1, return_trajectory=[30])
    x, ids = states[30], torch.arange(3)
    for t in range(30, 0, -1):
        eps = normal(1, Stream.REVERSE, ids, t, (1, 4, 4))
        monkeypatch.setattr(schedulers, "randn_tensor", lambda *_, eps=eps, **__: eps)
        with torch.no_grad():
            x = ddpm.step(network(x, torch.full((3,), t - 1)).sample, t - 1, x).prev_sample
    torch.testing.assert_close(found, x, rtol=0, atol=1e-3 * float(x.abs().amax()))
