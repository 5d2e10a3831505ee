"""Pictures of a trained model, in its run directory."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from dpm_fast import drawing, plots, progress
from dpm_fast.bound import Bound
from dpm_fast.config import TrainConfig
from dpm_fast.data import Data, DataSpec, model_dtype
from dpm_fast.entropy import entropies
from dpm_fast.metrics import read_metrics
from dpm_fast.model import DiffusionModel
from dpm_fast.restoration import Restoration, denoise, inpaint

_FRACTIONS_OF_T = (0.1, 0.25, 0.5, 1.0)
# Points of the plane that a picture shows, and examples of other kinds.
_MANY, _FEW = 2000, 64


def pictures(
    out: Path,
    model: DiffusionModel,
    data: Data,
    bound: Bound,
    samples: Tensor,
    train: TrainConfig,
    step: int,
) -> Iterator[Path]:
    """Draw what there is to see of a model, and yield the path of each picture when written.

    Args:
        out: the run's directory, from which metrics.jsonl is read.
        model: trained.
        data: what it was trained on.
        bound: of held-out data.
        samples: (N, *event), model scale.
        train: how it was trained.
        step: training steps taken.
    """
    offset_bits = bound.num_dims * bound.bits_per_dim_offset
    if is_drawable(data.spec):
        bits = offset_bits - bound.bound_bits.mean().item()
        k = f"K = {drawing.number(-bits)} bits"
        yield sample_picture(out / "samples.png", data.spec, samples, step, k)
        yield trajectory_picture(out / "trajectory.png", model, data)
    rate = data.train.double().mean().item() if data.spec.kind == "binary" else None
    table = entropies(model.process, rate)
    figure = plots.bound_per_timestep(
        bound.per_timestep_nats,
        bound.num_dims,
        (table.lower, table.upper),
        prior_nats=bound.prior_nats,
        stderr_bits=bound.stderr if len(bound.bound_nats) > 1 else None,
        offset_bits=offset_bits,
    )
    yield plots.save(figure, out / "bound_per_timestep.png")
    rows = read_metrics(out / "metrics.jsonl")
    if any(row.get(name) is not None for row in rows for name in ("loss_bits_per_dim", "loss")):
        limit = None if data.limit_bits is None else -data.limit_bits / bound.num_dims
        # A discretized edge gives probabilities, whatever the scale.
        of_levels = train.edge.startswith("discretized")
        offset = 0.0 if of_levels else -data.spec.log2_jacobian_per_dim
        yield plots.save(plots.loss_curve(rows, limit, offset), out / "loss.png")
    if is_drawable(data.spec) and len(data.spec.shape) == 3:
        true = data.test[:8]
        sigma = 0.1 if data.spec.kind == "binary" else 0.7
        with progress.of_samples(model, len(true)):
            denoised = denoise(model, true, sigma=sigma)
        yield restoration_picture(out, denoised)
        if true.shape[-1] > 1:  # a part is known and a part is not
            with progress.of_samples(model, len(true)):
                inpainted = inpaint(model, true)
            yield restoration_picture(out, inpainted)


def is_drawable(spec: DataSpec) -> bool:
    """Whether there are pictures of such examples: vectors, sequences, grey or color images."""
    channels, *rest = (1, *spec.shape) if len(spec.shape) == 1 else spec.shape
    return (len(rest), channels) in ((1, 1), (2, 1), (2, 3))


def sample_picture(
    path: Path, spec: DataSpec, samples: Tensor, step: int, quality: str = ""
) -> Path:
    """Samples in model scale, drawn in the units of the data.

    Args:
        path: of the picture.
        spec: what an example is.
        samples: (N, *event).
        step: training steps of the model.
        quality: what more the title says of it.
    """
    shown = spec.to_data(samples[: _MANY if spec.shape == (2,) else _FEW].cpu()).float()
    value_range = None if spec.kind == "continuous" else (0.0, (spec.levels or 2) - 1.0)
    details = ", ".join(filter(None, (f"{step} training steps", quality)))
    title = f"{spec.name}: {len(shown)} samples\n{details}"
    return plots.save(plots.sample_grid(shown, value_range=value_range, title=title), path)


def restoration_picture(directory: Path, restoration: Restoration) -> Path:
    """True, corrupted and restored examples."""
    figure = plots.comparison(
        restoration.true.float(),
        restoration.corrupted.nan_to_num(restoration.spec.shift),
        restoration.restored.float(),
        restoration.known,
    )
    return plots.save(figure, directory / f"{restoration.name}.png")


@torch.no_grad()
def trajectory_picture(path: Path, model: DiffusionModel, data: Data) -> Path:
    """The forward process of held-out data beside the model's reverse trajectory."""
    device = next(model.parameters()).device
    in_plane = data.spec.shape == (2,)
    x_0 = data.spec.to_model(data.test[: _MANY if in_plane else _FEW], model_dtype(model))
    x_0 = x_0.to(device)
    ids = torch.arange(len(x_0), device=device)
    times = sorted({0, *(max(1, round(model.process.num_steps * f)) for f in _FRACTIONS_OF_T)})
    forward = {0: x_0}
    for t in times[1:]:
        forward[t] = model.process.sample_x_t(x_0, torch.full_like(ids, t), 0, ids)
    with progress.of_samples(model, len(x_0)):
        samples, states = model.sample(len(x_0), return_trajectory=times[1:])
    reverse = {0: samples, **states}
    if not in_plane:
        return plots.save(plots.trajectory_images(forward, reverse), path)

    def drift(x: Tensor, t: int) -> Tensor:
        x = x.to(device)
        t_of_each = torch.full((len(x),), t, device=device)
        mu_p, _ = model.reverse.moments(x, t_of_each, model.network_output(x, t_of_each))
        return mu_p - x

    return plots.save(plots.trajectory_2d(forward, reverse, drift), path)
