"""Reverse steps and loops of other libraries, on the process that all of them know.

That process is "linear" with T = 1000 and epsilon predicted, x_0 clamped to [-1, 1]; t is ours,
1...T. A function ending in ``_step`` returns ``step(x_t, out, ...) -> x_prev``, one ending in
``_loop`` takes a network(x, t) and returns ``loop(x_t, timesteps) -> x_prev``. They import their
library when first called and raise what that import raises.

A package on PyPI is meant; [iDDPM]'s code is not there, `denoising_diffusion_pytorch` with
"learned_range" is its arithmetic.
"""

import contextlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

NUM_STEPS = 1000
Step = Callable[..., Tensor]
Loop = Callable[[Tensor, range], Tensor]


def diffusers_step(t: int, variance: str = "fixed_small") -> Step:
    """`diffusers.DDPMScheduler.step`; the variance is its ``variance_type``."""

    @cache
    def scheduler() -> Any:
        from diffusers import DDPMScheduler

        return DDPMScheduler(NUM_STEPS, variance_type=variance)

    def step(x_t: Tensor, out: Tensor, *_: object) -> Tensor:
        return scheduler().step(out, t - 1, x_t, return_dict=False)[0]

    return step


def denoising_diffusion_pytorch_step(t: int, variance: str = "fixed_small") -> Step:
    """`denoising_diffusion_pytorch.GaussianDiffusion.p_sample`, or the learned variance's."""
    learned = {"fixed_small": False, "learned_range": True}[variance]

    @cache
    def diffusion(device: torch.device, channels: int, side: int) -> Any:
        _import_torchvision()
        import denoising_diffusion_pytorch as peer

        kind = peer.LearnedGaussianDiffusion if learned else peer.GaussianDiffusion
        return kind(
            _Given(channels, learned),
            image_size=side,
            timesteps=NUM_STEPS,
            objective="pred_noise",
            beta_schedule="linear",
        ).to(device)

    def step(x_t: Tensor, out: Tensor, *_: object) -> Tensor:
        peer = diffusion(x_t.device, x_t.shape[1], x_t.shape[-1])
        peer.model.out = out
        return peer.p_sample(x_t, t - 1)[0]

    return step


def diffusers_loop(network: nn.Module) -> Loop:
    """As a pipeline of diffusers has it, with the variance "fixed_small"."""

    def loop(x_t: Tensor, timesteps: range) -> Tensor:
        from diffusers import DDPMScheduler

        scheduler = DDPMScheduler(NUM_STEPS, variance_type="fixed_small")
        for t in timesteps:
            out = network(x_t, torch.tensor([t], device=x_t.device))
            x_t = scheduler.step(out, t - 1, x_t, return_dict=False)[0]
        return x_t

    return loop


def denoising_diffusion_pytorch_loop(network: nn.Module) -> Loop:
    """That of `GaussianDiffusion.p_sample_loop`, from any timestep on."""

    @cache
    def diffusion(device: torch.device, channels: int, side: int) -> Any:
        _import_torchvision()
        import denoising_diffusion_pytorch as peer

        return peer.GaussianDiffusion(
            _OfItsTimesteps(network, channels),
            image_size=side,
            timesteps=NUM_STEPS,
            objective="pred_noise",
            beta_schedule="linear",
        ).to(device)

    def loop(x_t: Tensor, timesteps: range) -> Tensor:
        peer = diffusion(x_t.device, x_t.shape[1], x_t.shape[-1])
        for t in timesteps:
            x_t, _ = peer.p_sample(x_t, t - 1)
        return x_t

    return loop


@contextlib.contextmanager
def drawing(numbers: Iterable[Tensor]) -> Iterator[None]:
    """Both libraries take these normal numbers, a tensor for each step, in place of torch's."""
    left = iter(numbers)

    def draw(*_: object, **__: object) -> Tensor:
        return next(left)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch, "randn_like", draw))
        if importlib.util.find_spec("diffusers"):  # which has a function of its own for it
            module = importlib.import_module("diffusers.schedulers.scheduling_ddpm")
            stack.enter_context(mock.patch.object(module, "randn_tensor", draw))
        yield


class _Given(nn.Module):
    """A network whose output is known already."""

    self_condition = False

    def __init__(self, channels: int, learned: bool):
        super().__init__()
        self.channels = channels
        self.out_dim = 2 * channels if learned else channels
        self.out = torch.empty(0)

    def forward(self, *_: object) -> Tensor:
        return self.out


class _OfItsTimesteps(nn.Module):
    """A network whose timesteps count from 0, and are the same for all examples."""

    self_condition = False

    def __init__(self, network: nn.Module, channels: int):
        super().__init__()
        self.network, self.channels, self.out_dim = network, channels, channels

    def forward(self, x: Tensor, t: Tensor, *_: object) -> Tensor:
        return self.network(x, t[:1] + 1)


@cache
def _import_torchvision() -> None:
    """Import torchvision, or what of it works.

    Its wheel on PyPI is built for torch with CUDA: beside a torch without, its C++ operators
    are missing and the import stops at the first of them, although nobody calls them here.
    """
    try:
        import torchvision
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        _kept_alive.append(library)
        import torchvision  # noqa: F401


_kept_alive: list[torch.library.Library] = []
