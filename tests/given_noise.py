"""Noise of golden files in place of that of a seed."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dpm_fast import ops, reference


def use_noise(monkeypatch: pytest.MonkeyPatch, noise_at: Callable[[Tensor], Tensor]) -> None:
    """Let the forward process draw ``noise_at(t)``, t (N,), in place of its own noise."""

    def noise(
        x_0: Tensor, coefficients: Tensor, seed: int, example_ids: Tensor, t: Tensor
    ) -> Tensor:
        eps = noise_at(t)
        assert eps.shape == x_0.shape
        assert eps.dtype == x_0.dtype == coefficients.dtype == torch.float64
        signal, spread = (c.view(-1, *(1 for _ in x_0.shape[1:])) for c in coefficients.unbind(1))
        return reference.noised(x_0, eps, signal, spread)

    monkeypatch.setattr(ops, "noise", noise)
