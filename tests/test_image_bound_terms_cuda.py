"""Terms of the bound of images in CUDA C++, a block for each image, against the float64 reference.

In the host runner, or on a GPU where there is one.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import test_image_trajectory_cuda as images
from backends import Backend, needs_host_runner, rounding_to_tf32, running_in
from dpm_fast import trajectory, use_backend
from dpm_fast.model import DiffusionModel
from dpm_fast.trajectory import BoundTerms
from host_runner import build
from test_bound_terms import assert_terms_of_reference
from test_multiscale_conv_cuda import KERNELS, assert_sanitized, multiprocessors
from test_trajectory import T

pytestmark = [
    pytest.mark.filterwarnings("error"),
    pytest.mark.skipif(not KERNELS, reason="needs CUDA C++ kernels, or the host runner"),
]

N = 3


@pytest.fixture(autouse=True, params=KERNELS, ids=str)
def backend(request: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    monkeypatch.setattr(images, "device", request.param.device)
    with request.param.use():
        yield request.param


def examples(model: DiffusionModel) -> Tensor:
    x_0 = torch.randn(N, *model.network.event_shape, generator=torch.Generator().manual_seed(7))
    x_0 = (x_0 > 0).float() if model.process.kind == "binomial" else x_0
    return x_0.to(images.device)


@pytest.mark.parametrize("name", images.NETWORKS)
def test_networks(name: str) -> None:
    shape, options = images.NETWORKS[name]
    model = images.gaussian(shape, **options)
    assert_terms_of_reference(model, examples(model))


def test_fixed_variance_and_bits() -> None:
    for model in (images.gaussian(variance="fixed_small"), images.binomial()):
        assert_terms_of_reference(model, examples(model))


@pytest.mark.parametrize("edge", ["decoder", "paper"])
def test_the_bound_takes_the_kernel_whose_bits_depend_on_no_division(edge: str) -> None:
    model = images.gaussian()
    x_0 = examples(model)
    options: dict[str, Any] = {"edge": edge, "seed": 4, "draws": 2}
    whole = model.bound(x_0, **options)
    assert "network included" in whole.settings["path"]
    for size in (1, 5, 40):
        parts = model.bound(x_0, batch_size=size, **options)
        assert torch.equal(parts.bound_nats, whole.bound_nats)
    with use_backend("reference"):
        reference = model.bound(x_0, **options)
    torch.testing.assert_close(whole.bound_nats, reference.bound_nats, rtol=1e-4, atol=1e-2)


@needs_host_runner
def test_neither_orders_of_threads_nor_numbers_of_blocks_change_a_bit() -> None:
    of_bits = images.binomial()
    of_scales = images.gaussian((3, 8, 12), num_scales=3)  # for more warps than one

    def bounds() -> list[Tensor]:
        return [model.bound(examples(model)).bound_nats for model in (of_bits, of_scales)]

    expected = bounds()
    for order in build.ORDERS:
        for count in (1, 132):  # all timesteps of an image by one block, or runs of them
            with running_in(order) as runner, runner.use(), multiprocessors(count):
                assert all(map(torch.equal, bounds(), expected))


@pytest.mark.parametrize("name", ["three scales of colors", "after_sum", "per_location", "wide"])
def test_bfloat16_errs_as_autocast_does(name: str) -> None:
    shape, options = images.NETWORKS[name]
    model = images.gaussian(shape, **options)
    x_0 = examples(model)
    ids = torch.arange(N, device=x_0.device)
    with use_backend("reference"):
        exact = model.bound(x_0, example_ids=ids).per_timestep_nats
    with torch.autocast(images.device, torch.bfloat16):
        found = model.bound(x_0, example_ids=ids)
        with use_backend("reference"):
            by_torch = model.bound(x_0, example_ids=ids)
    assert "network included" in found.settings["path"]
    assert "network included" not in by_torch.settings["path"]
    error, of_torch = (
        (bound.per_timestep_nats - exact).square().mean().sqrt() for bound in (found, by_torch)
    )
    assert 0.1 * of_torch < error < 1.5 * of_torch


def test_float32_is_exact_unless_torch_may_round_to_tf32() -> None:
    model = images.gaussian(conv_channels=9)
    x_0 = examples(model)
    exact = model.bound(x_0)
    with rounding_to_tf32():
        rounded = model.bound(x_0)
    error = (rounded.per_timestep_nats - exact.per_timestep_nats).abs().max()
    assert 1e-5 < error / exact.per_timestep_nats.abs().max() < 0.03


def test_not_finite_stays_in_its_image() -> None:
    model = images.gaussian()
    x_0 = examples(model)
    x_0[1, 0, 2, 3] = torch.nan
    terms = BoundTerms(model, T, 5, x_0.device)(x_0, torch.arange(N, device=x_0.device), T, 1)
    assert terms[:, 1].isnan().all()
    assert terms[:, [0, 2]].isfinite().all()


def test_the_launcher_refuses_what_the_kernel_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trajectory, "_why_stepwise", lambda *_: None)
    model = images.gaussian((1, 4, 4), dense_layers=1)
    with pytest.raises(ValueError, match="without a dense path"):
        model.bound(examples(model))


def test_opcheck() -> None:
    model = images.gaussian()
    with torch.no_grad():
        terms = BoundTerms(model, T, 5, torch.device(images.device))
    inputs = terms._inputs._replace(noise_ids=torch.arange(N, device=images.device), last=3)
    arguments = (examples(model).flatten(1), *inputs)
    torch.library.opcheck(torch.ops.dpm_fast._bound_terms, arguments)


@pytest.mark.slow
@needs_host_runner
def test_the_kernel_under_sanitizers() -> None:
    assert_sanitized(__file__, "test_networks or test_bfloat16")
