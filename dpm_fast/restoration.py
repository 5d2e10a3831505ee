"""Corrupted examples restored by a model: denoising and inpainting ([DPM] section 2.5)."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dpm_fast import files, noise, ops, reference
from dpm_fast.data import DataSpec, model_dtype
from dpm_fast.model import DiffusionModel
from dpm_fast.sampling import Posterior

# Corruption has a timestep of its own, so that it shares no noise with a process or a data set.
_CORRUPTION_T = noise.MAX_TIMESTEP


@dataclass(frozen=True)
class Restoration:
    """Examples, what is left of them, and the model's answer to that; in data units.

    Attributes:
        name: "denoised" or "inpainted".
        spec: what an example is.
        true: (N, *event).
        corrupted: (N, *event) floating point; NaN where nothing is known.
        restored: (N, *event), of the dtype of ``true``; bit-equal to it where ``known``.
        known: (N, *event) bool, or None.
    """

    name: str
    spec: DataSpec
    true: Tensor
    corrupted: Tensor
    restored: Tensor
    known: Tensor | None = None

    def write(self, path: Path) -> Path:
        """Write the arrays as an .npz file."""
        arrays = {"true": self.true, "corrupted": self.corrupted, "restored": self.restored}
        if self.known is not None:
            arrays["known"] = self.known
        return files.write_arrays(path, {name: x.numpy() for name, x in arrays.items()})


def denoise(
    model: DiffusionModel,
    true: Tensor,
    *,
    sigma: float | None = None,
    seed: int = 0,
    guidance: Literal["x_t", "x0"] = "x0",
) -> Restoration:
    """Add noise to examples, and draw approximately from p(x_0 | noisy).

    The noisy example shifts the mean of each reverse step, as if its factor varied little over the
    width of the step and, under guidance "x_t", were the same at all timesteps. So the model's
    likelihood says nothing about how exact the result is.

    Args:
        model: with a data specification.
        true: (N, *event), data units.
        sigma: standard deviation of the noise in the model's scale, 0.5 by default; for binary
            data the probability that a bit is flipped, in (0, 1/2], by default 0.1, since 1/2
            leaves nothing of them.
        seed: of all noise.
        guidance: see `Posterior`; binary data know only "x_t".

    Raises:
        ValueError: for a sigma out of range.
    """
    spec, x_0 = _in_model_scale(model, true)
    if sigma is None:
        sigma = 0.1 if model.process.kind == "binomial" else 0.5
    example_ids = torch.arange(len(true), device=x_0.device)
    drawn = (seed, noise.Stream.DATA, example_ids, _CORRUPTION_T, x_0.shape[1:])
    if model.process.kind == "binomial":
        flips = reference.bernoulli(torch.full_like(x_0, sigma), ops.uniform(*drawn))
        y, guidance = (x_0 - flips).abs(), "x_t"
    else:
        y = x_0 + sigma * ops.normal(*drawn)
    posterior = Posterior(observed=(y, sigma), guidance=guidance)
    restored = spec.to_data(model.sample(len(true), seed=seed, posterior=posterior).cpu())
    return Restoration("denoised", spec, true, y.cpu() / spec.scale + spec.shift, restored)


def inpaint(
    model: DiffusionModel, true: Tensor, *, fraction: float = 0.5, seed: int = 0
) -> Restoration:
    """Forget the end of each example, and draw it approximately from p(x_0 | what is known).

    Each reverse step is given the known elements noised to its own level, which say less than the
    elements themselves: the result is not exact, however many steps there are.

    Args:
        model: with a data specification.
        true: (N, *event), data units.
        fraction: of the last axis that is unknown, in (0, 1); at least one place of it is, and
            one is not.
        seed: of all noise.

    Raises:
        ValueError: for a fraction out of range, or an axis of one place.
    """
    spec, x_0 = _in_model_scale(model, true)
    width = true.shape[-1]
    if not 0 < fraction < 1 or width < 2:
        raise ValueError(
            f"fraction must be in (0, 1), of an axis of 2 or more, got {fraction} of {width}"
        )
    num_known = min(max(round(width * (1 - fraction)), 1), width - 1)
    if num_known != round(width * (1 - fraction)):
        warnings.warn(
            f"fraction {fraction:g} of {width} places is none or all: {width - num_known} of them "
            "will be unknown",
            stacklevel=2,
        )
    known = (torch.arange(width) < num_known).expand(true.shape)
    posterior = Posterior(known=(known.to(x_0.device), x_0), known_as="forward")
    sampled = spec.to_data(model.sample(len(true), seed=seed, posterior=posterior).cpu())
    # Known elements of the data themselves: scaling there and back rounds continuous data.
    restored = torch.where(known, true, sampled)
    corrupted = torch.where(known, true.float(), torch.nan)
    return Restoration("inpainted", spec, true, corrupted, restored, known)


def _in_model_scale(model: DiffusionModel, true: Tensor) -> tuple[DataSpec, Tensor]:
    if model.data is None:
        raise ValueError("restoration requires a model with a data specification, got none")
    x_0 = model.data.to_model(true, model_dtype(model))
    return model.data, x_0.to(next(model.parameters()).device)
