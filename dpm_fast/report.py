"""Pictures of a trained model, in its run directory."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from dpm_fast import noise, plots
from dpm_fast.binomial import BinomialDiffusion
from dpm_fast.bound import Bound
from dpm_fast.data import Data
from dpm_fast.entropy import entropies
from dpm_fast.model import DiffusionModel
from dpm_fast.sampling import Posterior


@torch.no_grad()
def pictures(
    out: Path, model: DiffusionModel, data: Data, bound: Bound, samples: Tensor
) -> Iterator[Path]:
    """Draw what a run of this kind of data has to show, and yield each path when written."""
    yield sample_picture(out / "samples.png", model, samples)
    yield trajectory_picture(out / "trajectory.png", model, data)
    rate = None
    if isinstance(model.process, BinomialDiffusion):
        rate = data.spec.to_model(data.train).mean().item()
    table = entropies(model.process, rate)
    figure = plots.bound_per_timestep(
        bound.per_timestep_nats, bound.num_dims, (table.lower, table.upper)
    )
    yield plots.save(figure, out / "bound_per_timestep.png")
    metrics = out / "metrics.jsonl"
    if metrics.exists() and metrics.stat().st_size:
        limit = None if data.limit_bits is None else -data.limit_bits / bound.num_dims
        if limit is not None:
            limit -= bound.bits_per_dim_offset
        yield plots.save(plots.loss_curve(metrics, limit), out / "loss.png")
    if len(data.spec.shape) == 3:
        yield from _restorations(out, model, data)


def sample_picture(path: Path, model: DiffusionModel, samples: Tensor) -> Path:
    """Samples: a grid of images or sequences, or points of the plane."""
    if model.event_shape == (2,):
        t = model.process.num_steps
        return plots.save(plots.trajectory_2d({0: samples}, {0: samples}), path) if t else path
    return plots.save(plots.sample_grid(_drawn(model, samples[:64])), path)


def comparison_picture(
    path: Path,
    model: DiffusionModel,
    x_0: Tensor,
    corrupted: Tensor,
    restored: Tensor,
    known: Tensor | None = None,
) -> Path:
    """True, corrupted and restored examples."""
    if known is None and len(x_0.shape) == 4:
        restored = _drawn(model, restored)
    return plots.save(plots.comparison(x_0, corrupted, restored, known), path)


def trajectory_picture(path: Path, model: DiffusionModel, data: Data) -> Path:
    """The forward process of held-out data beside the model's reverse trajectory."""
    num_steps = model.process.num_steps
    times = sorted({0, *(round(num_steps * f) for f in (0.1, 0.25, 0.5, 0.75, 1.0))})
    num = 2000 if data.spec.shape == (2,) else 16
    x_0 = data.spec.to_model(data.test[:num])
    ids = torch.arange(len(x_0))
    forward = {
        t: model.process.sample_x_t(x_0, torch.full_like(ids, t), 0, ids) if t else x_0
        for t in times
    }
    samples, reverse = model.sample(len(x_0), seed=1, return_trajectory=times)
    reverse = {t: reverse.get(t, samples) for t in times}
    if data.spec.shape != (2,):
        return plots.save(plots.trajectory_images(forward, reverse), path)
    line = torch.linspace(-2.6, 2.6, 14)
    grid = torch.cartesian_prod(line, line)
    drift = {}
    for t in times[1:]:
        t_of_each = torch.full((len(grid),), t)
        out = model.network_output(grid, t_of_each)
        mu_p, _ = model.reverse.moments(grid, t_of_each, out)
        drift[t] = (grid, mu_p - grid)
    return plots.save(plots.trajectory_2d(forward, reverse, drift), path)


def _restorations(out: Path, model: DiffusionModel, data: Data) -> Iterator[Path]:
    x_0 = data.spec.to_model(data.test[:8])
    ids = torch.arange(len(x_0))
    eps = noise.normal(0, noise.Stream.DATA, ids, noise.MAX_TIMESTEP, x_0.shape[1:])
    y, sigma = x_0 + 0.7 * eps, 0.7
    restored = model.sample(len(x_0), posterior=Posterior(observed=(y, sigma), guidance="x_0"))
    yield comparison_picture(out / "denoised.png", model, x_0, y, restored)
    mask = (torch.arange(x_0.shape[-1]) < x_0.shape[-1] // 2).expand(x_0.shape)
    posterior = Posterior(known=(mask, x_0), known_as="forward")
    restored = model.sample(len(x_0), posterior=posterior)
    corrupted = torch.where(mask, x_0, torch.zeros_like(x_0))
    yield comparison_picture(out / "inpainted.png", model, x_0, corrupted, restored, mask)


def _drawn(model: DiffusionModel, x: Tensor) -> Tensor:
    """Samples of discrete data at the nearest grey levels, in model scale."""
    spec = model.data
    return x if spec is None else spec.to_model(spec.to_data(x))
