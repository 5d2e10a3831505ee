"""Models of diffusers: a network and a scheduler of theirs as a `DiffusionModel`."""

from typing import Any

from torch import nn

from dpm_fast.compat.any_model import grey_levels
from dpm_fast.gaussian import GaussianDiffusion
from dpm_fast.model import DiffusionModel

_PARAMETERIZATIONS = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "velocity"}
# Not "fixed_large_log", which gives NaN there, nor "learned", whose output is the variance itself.
_VARIANCES = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "learned_range": "learned_range",
}


def from_diffusers(
    network: nn.Module,
    scheduler: Any,
    *,
    shape: tuple[int, ...] | None = None,
    bits: int | None = 8,
) -> DiffusionModel:
    """The model that diffusers' sampler draws from in all T steps, with a loss, a likelihood bound,
    posteriors and fused steps.

    Its forward process is that of ``scheduler.betas``, in float64; the reverse steps are those of
    ``prediction_type`` and ``variance_type`` ("fixed_small" where a scheduler has none), with the
    predicted x_0 clamped where ``clip_sample`` says so.

    Args:
        network: (x, t) -> an object with the tensor ``sample``, or that tensor; one that is
            conditioned on more than t needs a module around it that supplies the rest.
        scheduler: a `DDPMScheduler`, or another one with ``betas`` and ``config``.
        shape: (C, H, W) of an example, by default as ``network.config`` has it.
        bits: of the grey levels from -1 to 1 that the data are; None for real numbers.

    Raises:
        ValueError: for dynamic thresholding, which is no Gaussian step, for another prediction or
            variance, or where the shape is not known.
    """
    config = scheduler.config
    if config.get("thresholding", False):
        raise ValueError("scheduler must not have thresholding, whose steps depend on all pixels")
    prediction = config.get("prediction_type", "epsilon")
    variance = config.get("variance_type") or "fixed_small"
    for name, given, known in (
        ("prediction_type", prediction, _PARAMETERIZATIONS),
        ("variance_type", variance, _VARIANCES),
    ):
        if given not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {given!r}")
    limit = float(config.get("clip_sample_range", 1.0))
    return DiffusionModel(
        GaussianDiffusion(scheduler.betas),
        network,
        _PARAMETERIZATIONS[prediction],
        variance=_VARIANCES[variance],
        clamp=(-limit, limit) if config.get("clip_sample", False) else None,
        data=None if bits is None else grey_levels(shape or _shape_of(network), bits),
        t_base=0,
    )


def _shape_of(network: nn.Module) -> tuple[int, ...]:
    config = getattr(network, "config", None)
    channels, size = getattr(config, "in_channels", None), getattr(config, "sample_size", None)
    if channels is None or size is None:
        raise ValueError("shape must be given, as the network's config tells none")
    sides = (size, size) if isinstance(size, int) else tuple(size)
    return (channels, *sides)
