"""Trajectories of images in CUDA C++, a block for each: states, orders and limits.

In the host runner, or on a GPU where there is one.
"""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import test_trajectory_images
from backends import Backend, needs_host_runner, rounding_to_tf32, running_in
from dpm_fast import trajectory, use_backend
from dpm_fast.binomial import BinomialDiffusion
from dpm_fast.known_networks import parameters_of, work_of
from dpm_fast.model import DiffusionModel
from dpm_fast.networks import ConvDenseNetwork
from dpm_fast.ops.whole_network import image_sizes
from dpm_fast.sampling import Posterior
from host_runner import build
from test_multiscale_conv_cuda import KERNELS, assert_sanitized, multiprocessors
from test_trajectory import T, assert_close, assert_same_states, filled, given_to_the_op, stepwise

pytestmark = pytest.mark.skipif(not KERNELS, reason="needs CUDA C++ kernels, or the host runner")

N = 6  # more than the runner has multiprocessors
SHAPE = (3, 5, 7)
SMALL = {"conv_layers": 2, "conv_channels": 4, "dense_layers": 0, "pixel_width": 5}
# Odd sizes and channels that fill no unit; every number of layers; features of several passes, and
# layers of each pixel that are wider than the convolutions.
NETWORKS: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {
    "nothing else": ((1, 4, 6), {"conv_layers": 1, "pixel_layers": 1}),
    "one pixel": ((1, 1, 1), {}),
    "two pixel layers": (SHAPE, {"pixel_layers": 3}),
    "three scales": ((1, 8, 12), {"num_scales": 3, "conv_channels": 7, "pixel_layers": 1}),
    "three scales of colors": ((3, 4, 8), {"num_scales": 3, "conv_layers": 3}),
    "after_sum": ((2, 6, 10), {"num_scales": 2, "activation": "after_sum", "kernel_size": 5}),
    "per_location": ((2, 6, 10), {"bias": "per_location", "readout": "per_timestep"}),
    "wide": ((1, 5, 9), {"conv_channels": 20, "pixel_width": 34}),
}

device = "cpu"  # of the models, while a kernel is in use


@pytest.fixture(autouse=True, params=KERNELS, ids=str)
def backend(request, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    monkeypatch.setitem(globals(), "device", request.param.device)
    with request.param.use():
        yield request.param


def gaussian(
    shape: tuple[int, int, int] = SHAPE, variance: str | None = None, **options: Any
) -> DiffusionModel:
    return test_trajectory_images.gaussian(shape, variance, **(SMALL | options)).to(device)


def binomial() -> DiffusionModel:
    network = filled(ConvDenseNetwork(SHAPE, T, num_outputs=1, **SMALL), 0.4)
    return DiffusionModel(BinomialDiffusion(T, prior_rate=0.3), network, "x0").to(device)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str) -> None:
    shape, options = NETWORKS[name]
    assert_same_states(gaussian(shape, **options), N)


def test_the_network_of_2015() -> None:
    """Whose images of 28 x 28 fill the shared memory of a block."""
    options = {"conv_layers": 4, "conv_channels": 20, "pixel_width": 20}
    model = gaussian((1, 28, 28), **options)
    for parameter in model.network.parameters():
        parameter.data /= 4  # of 20 channels and not of 4
    x_t = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    assert_same_states(model, 2, start=(2, x_t), final="mean")


@pytest.mark.parametrize("final", ["x_1", "mean", "sample"])
def test_fixed_variance_and_bits(final: str) -> None:
    assert_same_states(gaussian(variance="fixed_small"), N, final=final)
    assert_same_states(binomial(), N, final=final)


VALUES = torch.randn(N, *SHAPE, generator=torch.Generator().manual_seed(2))
FACTORS: dict[str, dict[str, Any]] = {
    "known": {"known": (VALUES[0] > 0.2, VALUES)},
    "known_forward": {"known": (VALUES > 0.5, VALUES[:1]), "known_as": "forward"},
    "observed": {"observed": (VALUES, VALUES[1].exp())},
    "all": {
        "known": (VALUES > 0.5, VALUES.mT.contiguous().mT),
        "observed": (VALUES[3], 0.7),
        "known_as": "forward",
    },
}


@pytest.mark.parametrize("name", FACTORS)
def test_posterior(name: str) -> None:
    factors = dict(FACTORS[name])
    assert_same_states(gaussian(), N, posterior=Posterior(**factors), final="mean")
    if "known" in factors:
        mask, values = (tensor.expand(N, *SHAPE) for tensor in factors["known"])
        samples = gaussian().sample(N, posterior=Posterior(**factors))
        assert torch.equal(samples.cpu()[mask], values[mask])
        factors["known"] = factors["known"][0], (factors["known"][1] > 0).float()
    if "observed" in factors:
        flip = torch.as_tensor(factors["observed"][1]).clamp(0.05, 0.5)
        factors["observed"] = (factors["observed"][0] > 0).float(), flip
    assert_same_states(binomial(), N, posterior=Posterior(**factors))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_respaced_timesteps(eta: float) -> None:
    options = {"num_inference_steps": 5, "eta": eta, "seed": 3}
    model = gaussian(variance="fixed_small")
    found = model.sample(N, **options)
    assert_close(found, stepwise(model, N, **options))
    with use_backend("reference"):
        assert_close(found.double(), model.double().sample(N, **options))


@pytest.mark.parametrize("t", [1, 5])
def test_start(t: int) -> None:
    assert_same_states(gaussian(), N, start=(t, VALUES), final="mean")


def test_bits_depend_on_neither_batches_nor_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = gaussian(), torch.arange(23) * 2**33 + 7
    options: dict[str, Any] = {"seed": 2**63 + 9, "return_trajectory": [3, 7, T]}
    whole, states = model.sample(23, example_ids=ids, **options)
    for part in (ids[:0], ids[3:4], ids[9:], ids[::7]):
        found = model.sample(len(part), example_ids=part, seed=2**63 + 9)
        assert torch.equal(found, whole[torch.isin(ids, part).to(whole.device)])
    for name in ("_LAUNCH_WORK", "_LAUNCH_WORK_OF_GPU"):
        monkeypatch.setattr(trajectory, name, 1)
    again, by_launches = model.sample(23, example_ids=ids, **options)
    assert torch.equal(again, whole)
    assert all(torch.equal(states[t], by_launches[t]) for t in states)


@needs_host_runner
def test_neither_orders_of_threads_nor_numbers_of_blocks_change_a_bit() -> None:
    models = (gaussian((3, 8, 12), num_scales=3), binomial())  # for more warps than one
    posterior = Posterior(**FACTORS["all"])
    of_colors = gaussian()

    def sample() -> list[Tensor]:
        plain = [model.sample(N, seed=5, final="sample") for model in models]
        return [*plain, of_colors.sample(N, seed=5, posterior=posterior)]

    with running_in("forward") as runner, runner.use():
        expected = sample()
    for order in build.ORDERS:
        for count in (1, 132):  # four images to a multiprocessor, or one
            with running_in(order) as runner, runner.use(), multiprocessors(count):
                assert all(map(torch.equal, sample(), expected))


def test_a_pixel_changes_its_image_and_its_neighborhood_alone() -> None:
    """Halos, filled-up channels and other images do not meet it."""
    model = gaussian(conv_layers=1, pixel_layers=1)
    x_t = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1))
    before = model.sample(3, start=(2, x_t)).cpu()
    x_t[1, 2, 1, 5] = 3e38  # whose products overflow
    after = model.sample(3, start=(2, x_t)).cpu()
    near = torch.zeros(3, 5, 7, dtype=torch.bool)
    near[1, 0:3, 4:7] = True
    assert torch.equal((after != before).any(1), near)


def test_what_a_layer_left_beside_odd_channels_is_no_input() -> None:
    """Features that overflow at known pixels, next to one that does not meet itself."""
    model = gaussian(conv_layers=1, pixel_layers=1)
    kernel = model.network.conv[0].weights[0].data
    kernel *= 100
    kernel[:, :, 1, 1] = 0
    x_t = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(1))
    x_t[0, :, 1, 5] = 3e38
    known = torch.zeros(5, 7, dtype=torch.bool)
    known[0:3, 4:7] = True
    known[1, 5] = False
    posterior = Posterior(known=(known.expand(SHAPE), torch.zeros(SHAPE)))
    assert not model.sample(1, start=(3, x_t)).isfinite().all()
    assert model.sample(1, start=(3, x_t), posterior=posterior).isfinite().all()


def test_float32_is_exact_unless_torch_may_round_to_tf32() -> None:
    model = gaussian(conv_channels=9)
    exact = model.sample(N, seed=1)
    with rounding_to_tf32():
        rounded = model.sample(N, seed=1)
    assert torch.equal(model.sample(N, seed=1), exact)
    largest = float(exact.abs().amax())
    error = float((rounded - exact).abs().amax())
    assert 1e-5 * largest < error < 0.03 * largest  # T steps of the roundings of 2^-11


@pytest.mark.parametrize("name", ["three scales of colors", "after_sum", "per_location", "wide"])
def test_bfloat16_errs_as_autocast_does(name: str) -> None:
    shape, options = NETWORKS[name]
    model = gaussian(shape, **options)
    with use_backend("reference"):
        exact = model.sample(N, seed=1)
    with torch.autocast(device, torch.bfloat16):
        assert trajectory.can_launch(model, Posterior(), N)
        found = model.sample(N, seed=1)
        with use_backend("reference"):
            by_torch = model.sample(N, seed=1)
    error, of_torch = ((x - exact).square().mean().sqrt() for x in (found, by_torch))
    assert 0.1 * of_torch < error < 1.5 * of_torch
    with torch.autocast(device, torch.float16):
        assert "asks for torch.float16" in reason(model)


def reason(model: DiffusionModel, num_examples: int = 4, batch_size: int = 10**6) -> str:
    return str(trajectory._why_stepwise(model, Posterior(), num_examples, batch_size))


@needs_host_runner
def test_what_no_block_can_hold_goes_step_by_step(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "dpm_fast")
    of_2015 = {"conv_layers": 4, "conv_channels": 20, "pixel_width": 20}
    assert reason(gaussian((1, 28, 28), **of_2015)) == "None"
    large = gaussian((1, 28, 28), num_scales=3, **of_2015)
    assert reason(large).endswith("bytes of the 232448 that a block has")
    with torch.autocast(device, torch.bfloat16):
        assert reason(large) == "None"
    assert "no room for a dense path" in reason(gaussian(dense_layers=1, dense_width=3))
    assert_same_states(gaussian((1, 2, 3), conv_layers=13, pixel_layers=3), 2)
    deep = gaussian((1, 2, 3), conv_layers=14, pixel_layers=3)
    assert reason(deep) == "its 17 layers are more than a kernel's 16"
    assert deep.sample(2).isfinite().all()
    assert "its 17 layers are more" in caplog.text
    tall = gaussian((1, 4, 4), pixel_layers=10)
    assert reason(tall) == "its 9 layers of each pixel are more than a kernel's 8"
    wide = gaussian((1, 256, 256), num_scales=9)
    assert reason(wide) == "its 9 scales are more than a kernel's 8"


@needs_host_runner
def test_work_that_was_never_timed_has_to_be_asked_for() -> None:
    model = gaussian((1, 28, 28), conv_layers=4, conv_channels=20, pixel_width=20)
    few = trajectory._IMAGE_STEP_WORK_OF_GPU // work_of(model.network)
    assert 128 < few < 512
    with use_backend("auto"):
        assert reason(model, few) == "None"
        assert "unless native is asked for" in reason(model, few + 1)
        assert reason(model, 10**6, batch_size=few) == "None"  # many steps of the same work
    assert reason(model, few + 1) == "None"


@needs_host_runner
def test_bytes_of_shared_memory_are_those_that_are_used() -> None:
    """A launch is refused where one byte less is there than a block needs."""
    model = gaussian()
    module = build.load_native_cuda()
    sizes = image_sizes(parameters_of(model.network, 1, torch.float32))
    needed, packed = module.image_network_bytes(*sizes, 3)
    # Units of 8 bytes, 3 to a pixel of 5 channels and 16 to a gap, a halo of one pixel. Layers of
    # a column take 9 taps of 2 units, or 2 or 3 units, in steps of 4: offsets, biases, weights.
    tile = (7 * 3 + 16 + 3) + (5 + 1) * (7 * 3 + 16)
    steps, readout = [5, 5, 1], 16 + 32 + 256
    operands = sum(16 * count + 32 + 256 * count for count in steps) + readout
    assert needed == operands + 2 * 8 * tile + 4 * (3 * 5 * 7 + 1)
    assert packed == operands + 2 * readout
    most = module.most_shared_bytes()
    try:
        build.set_attribute(module, "shared_bytes_per_block", needed)
        assert reason(model) == "None"
        assert_same_states(model, 3, posterior=Posterior(known=(VALUES[0] > 0, VALUES[:3])))
        build.set_attribute(module, "shared_bytes_per_block", needed - 1)
        assert f"needs {needed} bytes of the" in reason(model)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trajectory, "_why_stepwise", lambda *_: None)
            with pytest.raises(ValueError, match=rf"needs {needed} bytes of shared memory"):
                model.sample(2)
    finally:
        build.set_attribute(module, "shared_bytes_per_block", most)


@pytest.mark.parametrize("options", [{"dense_layers": 1}, {"conv_layers": 17}], ids=str)
def test_the_launcher_refuses_what_the_kernel_has_not(
    options: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trajectory, "_why_stepwise", lambda *_: None)
    with pytest.raises(ValueError, match=r"many layers|without a dense path"):
        gaussian((1, 4, 4), **options).sample(2)


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.dpm_fast._trajectory, given_to_the_op(gaussian(), N))


@pytest.mark.slow
@needs_host_runner
def test_the_kernel_under_sanitizers() -> None:
    assert_sanitized(__file__, "test_posterior")
