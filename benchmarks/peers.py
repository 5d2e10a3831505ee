"""The reverse step as other libraries do it, on the process that all of them know.

That process is "linear" with T = 1000 and epsilon predicted, x_0 clamped to [-1, 1]; t is ours,
1...T. Each function returns ``step(x_t, out, ...) -> x_prev``, which imports its library when
first called and raises what that import raises.

A package on PyPI is meant; [iDDPM]'s code is not there, `denoising_diffusion_pytorch` with
"learned_range" is its arithmetic.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

NUM_STEPS = 1000
Step = Callable[..., Tensor]


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
