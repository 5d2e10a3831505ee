"""Diffusion models that other libraries trained: their likelihood, and the rest of this package."""

from dpm_fast.compat.any_model import likelihood
from dpm_fast.compat.diffusers import from_diffusers

__all__ = ["from_diffusers", "likelihood"]
