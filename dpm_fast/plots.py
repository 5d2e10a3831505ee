"""Pictures: trajectories, samples, restorations, the bound per timestep, the loss.

Functions take tensors and return a matplotlib Figure; `save` writes one. No global state of
matplotlib is touched, so they work without a display and in threads.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, ACCENT, SOFT = "#26323d", "#c2410c", "#5b8db8"
_DPI = 150


def save(figure: "Figure", path: Path) -> Path:
    """Write a PNG under a temporary name, then rename it, so that no half picture remains."""
    temporary = path.with_name(f".{path.name}.unfinished")
    try:
        figure.savefig(temporary, dpi=_DPI, format="png")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def trajectory_2d(
    forward: Mapping[int, Tensor],
    reverse: Mapping[int, Tensor],
    drift: Mapping[int, tuple[Tensor, Tensor]] | None = None,
) -> "Figure":
    """Data dissolving into noise, the learned way back, and the drift of the reverse steps.

    After figure 1 of [DPM]: one column per timestep, rows for x_t of the forward process, x_t of
    the model, and arrows mu_p(x, t) - x.

    Args:
        forward: t -> (N, 2) points.
        reverse: t -> (M, 2) points, for the same timesteps.
        drift: t -> (positions (K, 2), displacements (K, 2)); timesteps without one stay empty.
    """
    times = _times(forward, reverse, 2)
    rows = 3 if drift else 2
    figure = _figure(1.75 * len(times) + 0.4, 1.75 * rows + 0.3)
    axes = figure.subplots(rows, len(times), sharex=True, sharey=True, squeeze=False)
    angle = torch.atan2(forward[times[0]][:, 1], forward[times[0]][:, 0])
    radius = forward[times[0]].norm(dim=1)
    for column, t in enumerate(times):
        x = forward[t]
        color = (angle + 2 * radius).cpu() if len(x) == len(angle) else INK
        axes[0, column].scatter(x[:, 0], x[:, 1], c=color, s=1.2, lw=0, cmap="viridis", alpha=0.7)
        axes[0, column].set_title(f"t = {t}", fontsize=9, color=INK)
        y = reverse[t]
        axes[1, column].scatter(y[:, 0], y[:, 1], c=ACCENT, s=1.2, lw=0, alpha=0.5)
        if drift and t in drift:
            at, move = drift[t]
            scale = move.norm(dim=1).max().item() / 0.6 or 1.0
            axes[2, column].quiver(
                *at.T, *move.T, angles="xy", scale_units="xy", scale=scale, width=0.006, color=SOFT
            )
    for row, name in zip(
        axes, ("q: data to noise", "p: noise to data", "drift of p"), strict=False
    ):
        row[0].set_ylabel(name, fontsize=9, color=INK)
        for ax in row:
            ax.set(xlim=(-3, 3), ylim=(-3, 3), xticks=[], yticks=[], aspect="equal")
    return figure


def trajectory_images(forward: Mapping[int, Tensor], reverse: Mapping[int, Tensor]) -> "Figure":
    """Examples dissolving, one column per timestep, and below the model's way back.

    Args:
        forward, reverse: t -> (N, C, H, W), shown four by four, or (N, D) sequences, one row of
            pixels each; in the model's scale.
    """
    times = _times(forward, reverse)
    figure = _figure(1.6 * len(times) + 0.4, 3.7)
    axes = figure.subplots(2, len(times), squeeze=False)
    for row, states in enumerate((forward, reverse)):
        for column, t in enumerate(times):
            _show(axes[row, column], _tile(states[t][:16], 4))
            if row == 0:
                axes[row, column].set_title(f"t = {t}", fontsize=9, color=INK)
    axes[0, 0].set_ylabel("q: data to noise", fontsize=9, color=INK)
    axes[1, 0].set_ylabel("p: noise to data", fontsize=9, color=INK)
    return figure


def sample_grid(samples: Tensor, num_columns: int = 8) -> "Figure":
    """Samples side by side.

    Args:
        samples: (N, C, H, W) with C 1 or 3, or (N, D) sequences, one row of pixels each.
    """
    _check(samples, "samples")
    picture = _tile(samples, num_columns)
    height, width = picture.shape[:2]
    figure = _figure(6.0, min(max(6.0 * height / width, 1.0), 8.0))
    _show(figure.subplots(), picture)
    return figure


def comparison(
    true: Tensor, corrupted: Tensor, restored: Tensor, known: Tensor | None = None
) -> "Figure":
    """Rows of the same examples: true, corrupted, restored; the unknown part is tinted.

    Args:
        true, corrupted, restored: (N, C, H, W) or (N, D).
        known: bool mask of the same shape, for inpainting.
    """
    for name, x in (("true", true), ("corrupted", corrupted), ("restored", restored)):
        _check(x, name)
        if x.shape != true.shape:
            raise ValueError(f"{name} must have shape {tuple(true.shape)}, got {tuple(x.shape)}")
    columns = len(true)
    figure = _figure(0.95 * columns + 1.0, 3.1 if true.dim() == 4 else 1.6)
    axes = figure.subplots(3, 1)
    low, high = true.min().item(), true.max().item()
    rows = (("true", true), ("corrupted", corrupted), ("restored", restored))
    for ax, (name, x) in zip(axes, rows, strict=True):
        picture = _tile(x, columns, (low, high))
        if name == "corrupted" and known is not None:
            tint = torch.tensor((0.98, 0.86, 0.76))
            mask = _tile(known.float(), columns, (0.0, 1.0), pad=1.0)
            picture = torch.where(mask > 0.5, picture, tint)
        _show(ax, picture)
        ax.set_ylabel(name, fontsize=9, color=INK)
    return figure


def bound_per_timestep(
    per_timestep_nats: Tensor,
    num_dims: int,
    entropy_bounds: tuple[Tensor, Tensor] | None = None,
) -> "Figure":
    """The terms of the bound, bits per example, and what the entropy bounds leave open.

    Args:
        per_timestep_nats: (T + 1,), indexed by t; entry 1 is the decoder's.
        num_dims: D.
        entropy_bounds: lower and upper bounds of H_q(X_{t-1} | X_t), (T + 1,) nats per element.
            Their distance is shaded: how much the reverse step may depend on the data.
    """
    if per_timestep_nats.dim() != 1 or len(per_timestep_nats) < 3:
        shape = tuple(per_timestep_nats.shape)
        raise ValueError(f"per_timestep_nats must have shape (T + 1,), got {shape}")
    bits = per_timestep_nats.cpu() / math.log(2)
    t = torch.arange(len(bits))
    figure = _figure(6.0, 3.2)
    ax = figure.subplots()
    ax.semilogy(t[2:], bits[2:].clamp_min(1e-9), color=ACCENT, lw=1.3, label="KL of step t")
    lowest = bits[2:].clamp_min(1e-9).min().item()
    if entropy_bounds is not None:
        lower, upper = (e.detach().cpu() for e in entropy_bounds)
        room = (num_dims * (upper - lower) / math.log(2))[2:].clamp_min(1e-9)
        name = "width of the entropy bounds of H(x$_{t-1}$ | x$_t$)"
        ax.fill_between(t[2:], lowest, room, color=SOFT, alpha=0.25, lw=0, label=name)
    ax.set_ylim(bottom=lowest)
    ax.legend(fontsize=8, frameon=False)
    ax.set_ylabel("bits per example", fontsize=9)
    ax.set_xlabel("t", fontsize=9)
    note = f"sum over t ≥ 2: {bits[2:].sum():.3f} bits;  decoder (t = 1): {bits[1]:.3f} bits"
    ax.set_title(note, fontsize=9, color=INK)
    _style(ax)
    return figure


def loss_curve(
    metrics: Path | Sequence[Mapping[str, Any]], limit_bits_per_dim: float | None = None
) -> "Figure":
    """The training loss over the examples seen, bits/dim of the scaled data.

    Args:
        metrics: rows with num_examples_seen and loss_bits_per_dim, or a metrics.jsonl of them.
        limit_bits_per_dim: the least that any model can reach, if it is known.
    """
    if isinstance(metrics, Path):
        metrics = [json.loads(line) for line in metrics.read_text().splitlines() if line]
    points = [
        (row["num_examples_seen"], row["loss_bits_per_dim"])
        for row in metrics
        if row.get("loss_bits_per_dim") is not None
    ]
    if not points:
        raise ValueError("metrics must hold at least one loss, got none")
    seen, loss = zip(*points, strict=True)
    width = max(1, len(loss) // 25)
    smooth = [
        sum(loss[max(0, i - width) : i + width + 1]) / len(loss[max(0, i - width) : i + width + 1])
        for i in range(len(loss))
    ]
    figure = _figure(6.0, 2.7)
    ax = figure.subplots()
    ax.plot(seen, loss, color=SOFT, lw=0.7, alpha=0.6)
    ax.plot(seen, smooth, color=ACCENT, lw=1.5)
    if limit_bits_per_dim is not None:
        ax.axhline(limit_bits_per_dim, color=INK, lw=0.8, ls="--")
    span = sorted(loss)[: max(1, int(0.97 * len(loss)))]
    floor = min([span[0], *([] if limit_bits_per_dim is None else [limit_bits_per_dim])])
    margin = 0.08 * (span[-1] - floor) + 1e-3
    ax.set_ylim(floor - margin, span[-1] + margin)
    ax.set_xlabel("examples seen", fontsize=9)
    ax.set_ylabel("loss, bits/dim", fontsize=9)
    _style(ax)
    return figure


def _figure(width: float, height: float) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            "pictures require matplotlib, got none: pip install 'dpm_fast[plots]'"
        ) from None
    return Figure(figsize=(width, height), layout="constrained")


def _times(
    forward: Mapping[int, Tensor], reverse: Mapping[int, Tensor], dim: int | None = None
) -> list[int]:
    times = sorted(forward)
    if not times or sorted(reverse) != times:
        raise ValueError(
            f"forward and reverse must have the same timesteps, got {times} and {sorted(reverse)}"
        )
    for name, states in (("forward", forward), ("reverse", reverse)):
        for x in states.values():
            _check(x, name)
            if dim is not None and x.shape[1:] != (dim,):
                raise ValueError(f"{name} must have shape (N, {dim}), got {tuple(x.shape)}")
    return times


def _check(x: Tensor, name: str) -> None:
    if x.dim() not in (2, 4) or len(x) == 0 or (x.dim() == 4 and x.shape[1] not in (1, 3)):
        raise ValueError(
            f"{name} must have shape (N, D) or (N, C, H, W) with C 1 or 3, got {tuple(x.shape)}"
        )
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{name} must be finite, got NaN or infinity")


def _tile(
    x: Tensor, num_columns: int, limits: tuple[float, float] | None = None, pad: float = 1.0
) -> Tensor:
    """One picture (height, width, 3) in [0, 1]: images with thin gaps, or a sequence per row."""
    x = x.detach().float().cpu()
    low, high = limits or (x.min().item(), x.max().item())
    x = ((x - low) / max(high - low, 1e-12)).clamp(0, 1)
    if x.dim() == 2:
        return x[:, :, None].expand(-1, -1, 3)
    n, _, height, width = x.shape
    num_columns = min(num_columns, n)
    num_rows = -(-n // num_columns)
    picture = torch.full((3, num_rows * (height + 1) - 1, num_columns * (width + 1) - 1), pad)
    for i, image in enumerate(x):
        row, column = divmod(i, num_columns)
        top, left = row * (height + 1), column * (width + 1)
        picture[:, top : top + height, left : left + width] = image
    return picture.movedim(0, -1)


def _show(ax: Any, picture: Tensor) -> None:
    ax.imshow(picture.numpy(), interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    for side in ax.spines.values():
        side.set_visible(False)


def _style(ax: Any) -> None:
    ax.tick_params(labelsize=8)
    ax.grid(alpha=0.2, lw=0.5)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
