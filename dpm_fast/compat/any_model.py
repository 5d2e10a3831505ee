"""The likelihood of a Gaussian diffusion model, whatever library trained it."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from dpm_fast.bound import Bound
from dpm_fast.data import DataSpec, model_dtype
from dpm_fast.gaussian import GaussianDiffusion
from dpm_fast.model import DiffusionModel
from dpm_fast.noise import check_integer


def likelihood(
    network: nn.Module,
    x_0: Tensor,
    *,
    betas: Sequence[float] | np.ndarray | Tensor,
    parameterization: str = "epsilon",
    variance: str = "learned_range",
    bits: int | None = 8,
    data_range: tuple[float, float] = (-1.0, 1.0),
    clamp: bool = True,
    edge: str | None = None,
    t_base: int = 0,
    **options: Any,
) -> Bound:
    """Lower bound on log p(x_0) of each example, by a network that is trained already.

    Every choice that such a figure depends on is an argument, and is in `Bound.settings`. The
    network is put in evaluation mode meanwhile.

    Args:
        network: (x (N, *event), t (N,)) -> mu_out, or mu_out and then sigma2_out as channels of one
            tensor; or an object whose attribute ``sample`` is that, as diffusers' networks give.
        x_0: (N, *event), in ``data_range``; integers are grey levels 0..2^bits - 1, and are brought
            into it.
        betas: beta_1 ... beta_T of the forward process.
        parameterization: what mu_out predicts: "epsilon", "x0", "velocity", "previous", or one of
            `dpm_fast.gaussian.GaussianReverse`.
        variance: "learned_range" ([iDDPM]), "fixed_small", "fixed_large", "learned", or another one
            of `GaussianReverse`.
        bits: log2 of the number of grey levels, which x_0 has to consist of; None for real numbers,
            whose bound is on a density.
        data_range: what the lowest and the highest grey level are to the network.
        clamp: limit a predicted x_0 to ``data_range``, as samplers of images do. Either way the
            bound is one of the model that is named so.
        edge: see `DiffusionModel.bound`; default "discretized" for grey levels, the probability of
            each; "discretized_tanh" is [iDDPM]'s approximation of it. Default "decoder" without.
        t_base: the network's first timestep.
        options: of `DiffusionModel.bound`: timesteps, seed, example_ids, draws, batch_size,
            max_memory, progress, partial.

    Returns:
        A `Bound`: nats and bits of each example, bits per dimension, the curve over timesteps. Of
        grey levels `Bound.bits_per_dim` is the usual figure.

    Raises:
        ValueError, TypeError: for data that are no such grey levels, and where
            `GaussianDiffusion`, `DiffusionModel` or `DiffusionModel.bound` raise them.
    """
    if not isinstance(x_0, Tensor) or x_0.dim() < 2:
        given = tuple(x_0.shape) if isinstance(x_0, Tensor) else type(x_0).__name__
        raise TypeError(f"x_0 must be a tensor (N, *event), got {given}")
    low, high = data_range
    if not low < high:
        raise ValueError(f"data_range must be (low, high) with low < high, got {data_range}")
    data = None if bits is None else grey_levels(tuple(x_0.shape[1:]), bits, (low, high))
    process = GaussianDiffusion(betas)
    is_clamped = clamp and process.reverse(parameterization, variance).predicts_x_0
    model = DiffusionModel(
        process,
        network,
        parameterization,
        variance=variance,
        clamp=(low, high) if is_clamped else None,
        data=data,
        t_base=t_base,
    )
    if data is not None and not x_0.is_floating_point():
        x_0 = data.to_model(x_0, model_dtype(model))
    with _in_evaluation_mode(model):
        bound = model.bound(
            x_0, edge=edge or ("decoder" if data is None else "discretized"), **options
        )
    chosen = {"bits": bits, "data_range": (low, high), "clamp": model.reverse.clamp}
    chosen["t_base"] = t_base
    return dataclasses.replace(bound, settings=bound.settings | chosen)


def grey_levels(
    shape: tuple[int, ...], bits: int, data_range: tuple[float, float] = (-1.0, 1.0)
) -> DataSpec:
    """2^bits grey levels from low to high."""
    low, high = data_range
    levels = 2 ** check_integer(bits, "bits")
    if levels < 2:
        raise ValueError(f"bits must be at least 1, got {bits}")
    scale = (high - low) / (levels - 1)
    return DataSpec("images", shape, "discrete", shift=-low / scale, scale=scale, levels=levels)


@contextlib.contextmanager
def _in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
