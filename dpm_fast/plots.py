"""Pictures: trajectories, samples, restorations, the bound per timestep, the loss.

Functions take tensors or arrays and return a matplotlib Figure; `save` writes one. Examples are
images (N, C, H, W) with C 1 or 3, sequences (N, D) or (N, 1, D), or points of the plane (N, 2); the
states of a trajectory are a mapping t -> x_t, as `DiffusionModel.sample(return_trajectory=...)`
returns it. pyplot is not used and no setting of matplotlib is changed: no display is needed, and
several threads may draw.
"""

import io
import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from dpm_fast import drawing, files
from dpm_fast.drawing import BLUE, GREY, INK, PALE, SAND, WIDTH

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array: TypeAlias = Tensor | np.ndarray
States: TypeAlias = Mapping[int, Array]
Drift: TypeAlias = Callable[[Tensor, int], Array] | Mapping[int, tuple[Array, Array]]

FORMATS = (".png", ".pdf", ".svg")
_DPI = 150
_TITLES = ("data to noise\n$q(x_t)$", "noise to data\n$p(x_t)$")
# Formulas are typeset by one parser that all figures of a process share.
_rendering = threading.Lock()


def save(figure: "Figure", path: str | Path) -> Path:
    """Write a picture so that a reader, or a crash, meets the old file or the whole new one.

    Args:
        figure: a matplotlib Figure.
        path: its ending chooses the format: .png, .pdf or .svg.

    Raises:
        ValueError: for another ending.
        OSError: for a path that cannot be written; what it held before is left as it was.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ValueError(f"path must end in {', '.join(FORMATS)}, got {str(path)!r}")
    content = io.BytesIO()
    with _rendering:
        figure.savefig(content, dpi=_DPI, format=path.suffix[1:])
    if path.suffix == ".png" and not any(ax.images for ax in figure.axes):
        content = _with_palette(content)
    return files.write(path, content.getbuffer())


def trajectory_2d(forward: States, reverse: States, drift: Drift | None = None) -> "Figure":
    """Points dissolving into noise, the model's way back, and the drift of its steps.

    After figure 1 of [DPM]: a column per timestep; rows for x_t under q, x_t under p, and arrows
    mu_p(x, t) - x. Points keep the color of the place they have at the first timestep shown.

    Args:
        forward: t -> (N, 2).
        reverse: t -> (M, 2), at the same timesteps.
        drift: a function of x (K, 2) float32 and t >= 1 that returns mu_p(x, t) - x (K, 2); or
            its values at points of the caller's choice, t -> (x (K, 2), mu_p - x (K, 2)).

    Raises:
        ValueError: for empty, non-finite or wrongly shaped states, or differing timesteps.
    """
    states = _trajectories(forward, reverse)
    times, first = _first(states)
    if first.shape[1:] != (2,):
        raise ValueError(f"forward must have shape (N, 2), got {first.shape}")
    limit = drawing.half_side((x for frames in states for x in frames.values()), share=0.995)
    fields = {} if drift is None else _fields(drift, times, limit)
    panel = min(WIDTH / len(times), 2.4)
    figure, axes = drawing.panels(3 if fields else 2, len(times), panel)
    for row, frames in zip(axes, states, strict=False):
        colors = drawing.colors_of_places(frames[times[0]])
        for ax, x in zip(row, frames.values(), strict=True):
            drawing.points(ax, x, colors, limit)
    for ax, t in zip(axes[2] if fields else (), times, strict=False):
        if t in fields:
            drawing.points(ax, states[1][t], PALE, limit)
            drawing.arrows(ax, *fields[t])
        else:
            ax.spines[:].set_visible(False)
            text = "darker:\nstronger"
            ax.text(0, 0, text, fontsize=8, color=GREY, ha="center", va="center")
    drawing.label(axes, _at_t(times), (*_TITLES, "drift\n$\\mu_p(x, t) - x$"))
    return figure


def trajectory_images(forward: States, reverse: States, num_examples: int = 8) -> "Figure":
    """Images dissolving, and beside them the model's way back; a row per example.

    Black and white are the range of the first timestep shown, and noise beyond it is clipped.
    Sequences are drawn by `trajectory_sequences`.

    Args:
        forward: t -> (N, C, H, W).
        reverse: t -> (M, C, H, W), at the same timesteps.
        num_examples: at most so many are shown.

    Raises:
        ValueError: for empty, non-finite or wrongly shaped states, or differing timesteps.
    """
    states = _trajectories(forward, reverse)
    times, first = _first(states)
    if first.ndim == 2:
        return trajectory_sequences(forward, reverse)
    num_rows = min(num_examples, *(len(frames[times[0]]) for frames in states))
    orders = (times, times[::-1])
    mosaics = []
    for frames, order in zip(states, orders, strict=True):
        tiles = np.stack([frames[t][:num_rows] for t in order], axis=1)
        mosaics.append(drawing.mosaic(drawing.rgb(tiles, _range(first))))
    figure, axes = drawing.figure_of_mosaics(mosaics, beside=True, top=0.42)
    for ax, order, title in zip(axes, orders, _TITLES, strict=True):
        drawing.name_parts(ax.xaxis, [f"t = {order[0]}", *map(str, order[1:])])
        ax.xaxis.tick_top()
        ax.set_title(title.replace("\n", ", "), fontsize=9, color=INK)
    return figure


def trajectory_sequences(forward: States, reverse: States, num_examples: int = 32) -> "Figure":
    """Sequences dissolving, and below the model's way back: a raster per timestep.

    Args:
        forward: t -> (N, D) or (N, 1, D), a row per example, drawn from pale (the least value at
            the first timestep, 0 for binary data) to dark (the greatest, 1).
        reverse: t -> (M, D) or (M, 1, D), at the same timesteps.
        num_examples: at most so many are shown.

    Raises:
        ValueError: for empty, non-finite or wrongly shaped states, or differing timesteps.
    """
    states = _trajectories(forward, reverse)
    times, first = _first(states)
    if first.ndim != 2:
        raise ValueError(f"forward must have shape (N, D) or (N, 1, D), got {first.shape}")
    aspect = drawing.raster_aspect(len(first[:num_examples]), first.shape[1])
    figure, axes = drawing.panels(2, len(times), min(WIDTH / len(times), 2.4), aspect)
    for row, frames in zip(axes, states, strict=True):
        for ax, x in zip(row, frames.values(), strict=True):
            drawing.raster(ax, x[:num_examples], _range(first))
    drawing.label(axes, _at_t(times), _TITLES)
    return figure


def sample_grid(
    samples: Array,
    num_columns: int | None = None,
    value_range: tuple[float, float] | None = None,
    title: str = "",
) -> "Figure":
    """Samples side by side.

    Args:
        samples: images; sequences, a row each, continued to the right; or points.
        num_columns: of images; if None, what makes the picture about twice as wide as high.
        value_range: the values drawn black and white; if None, the range of the samples.
        title: what they are samples of.

    Raises:
        ValueError: for samples that are empty, not finite or of another shape.
    """
    x = _examples("samples", samples)
    value_range = value_range or _range(x)
    if x.ndim == 4:
        num_columns = num_columns or drawing.num_columns(len(x), *x.shape[2:])
        tiles = drawing.in_rows(drawing.rgb(x, value_range), min(num_columns, len(x)))
        figure, _ = drawing.figure_of_mosaics([drawing.mosaic(tiles)], top=0.42 if title else 0.0)
        return drawing.entitle(figure, title)
    if x.shape[1] == 2:
        figure, axes = drawing.panels(1, 1, 5.0)
        drawing.points(axes[0, 0], x, drawing.colors_of_places(x), drawing.half_side([x]))
        return drawing.entitle(figure, title)
    num_panels = min(-(-len(x) // x.shape[1]), 6)
    num_rows = -(-len(x) // num_panels)
    width = min(WIDTH / num_panels, 4.0)
    aspect = drawing.raster_aspect(num_rows, x.shape[1])
    figure, axes = drawing.panels(1, num_panels, width, aspect)
    for ax, begin in zip(axes[0], range(0, len(x), num_rows), strict=False):
        drawing.raster(ax, x[begin : begin + num_rows], value_range)
    axes[0, 0].set_ylim(num_rows - 0.5, -0.5)  # shared: the last panel may be shorter
    return drawing.entitle(figure, title)


def comparison(
    true: Array, corrupted: Array, restored: Array, known: Array | None = None
) -> "Figure":
    """The same examples true, corrupted and restored: images in rows, others in columns.

    Args:
        true, corrupted, restored: (N, *event), examples of any kind. The range of the true ones is
            drawn from black to white, or from pale to dark.
        known: (N, *event) or (*event), true where inpainting was given the value; the rest of the
            corrupted images and sequences is drawn in a flat color, and points of which one
            coordinate is known as the lines on which they lie.

    Raises:
        ValueError: for examples that are empty, not finite, or of differing shapes.
    """
    named = {"true": true, "corrupted": corrupted, "restored": restored}
    examples = {name: _examples(name, x) for name, x in named.items()}
    x_0 = examples["true"]
    for name, x in examples.items():
        if x.shape != x_0.shape:
            raise ValueError(f"{name} must have shape {x_0.shape}, got {x.shape}")
    mask = None if known is None else _mask(known, tuple(true.shape)).reshape(x_0.shape)
    if x_0.ndim == 4:
        return _compare_images(examples, mask)
    is_plane = x_0.shape[1] == 2
    aspect = 1.0 if is_plane else drawing.raster_aspect(*x_0.shape)
    figure, axes = drawing.panels(1, 3, WIDTH / 3, aspect)
    colors, limit = drawing.colors_of_places(x_0), drawing.half_side(examples.values())
    titles = dict(zip(examples, examples, strict=True))
    for ax, (name, x) in zip(axes[0], examples.items(), strict=True):
        seen = mask if name == "corrupted" else None
        if not is_plane:
            drawing.raster(ax, x, _range(x_0), seen)
        elif seen is None or seen.all():
            drawing.points(ax, x, colors, limit)
        else:
            drawing.partly_known_points(ax, x, seen, colors, limit)
            titles[name] = "corrupted: one coordinate known"
    drawing.label(axes, titles.values())
    return figure


def bound_per_timestep(
    per_timestep_nats: Array,
    num_dims: int,
    entropy_bounds: tuple[Array, Array] | None = None,
    *,
    prior_nats: Array | float | None = None,
    stderr_bits: float | None = None,
    offset_bits: float | None = None,
) -> "Figure":
    """The terms of the bound: a curve of the KL of each step, and bars for the parts of -K.

    The best KL of step t is H_q(X_{t-1} | X_t) - H_q(X_{t-1} | X_t, X_0), and the lower bound of
    the first entropy is the second: so it is at most the distance of the bounds, which is shaded.

    Args:
        per_timestep_nats: (T + 1,), T >= 2, mean over examples, indexed by t. Entry 0 is unused,
            entry 1 the decoder's -log p(x_0 | x_1), entry t >= 2 the KL of step t. A logarithmic
            axis leaves out zeros: timesteps that a stratified estimate did not meet.
        num_dims: D.
        entropy_bounds: lower and upper bounds of H_q(X_{t-1} | X_t), each (T + 1,), nats per
            element, as in `EntropyTables`.
        prior_nats: the part of -K without a network, per example or its mean; with it the sum of
            the parts is drawn too.
        stderr_bits: standard error of the mean of K, bits per example.
        offset_bits: added to -K of the scaled data for that in the units of the data, bits per
            example; if None, -K is drawn of the scaled data.

    Raises:
        ValueError: for wrong shapes or values that are not finite.
    """
    terms = _finite("per_timestep_nats", per_timestep_nats) / math.log(2)
    if terms.ndim != 1 or len(terms) < 3:
        raise ValueError(f"per_timestep_nats must have shape (T + 1,), T >= 2, got {terms.shape}")
    if num_dims < 1:
        raise ValueError(f"num_dims must be at least 1, got {num_dims}")
    room = None
    if entropy_bounds is not None:
        lower, upper = (_entropy_bound(nats, len(terms)) for nats in entropy_bounds)
        room = num_dims * (upper - lower) / math.log(2)
    parts = {"decoder, t = 1": float(terms[1]), "KL, t = 2 … T": float(terms[2:].sum())}
    if prior_nats is not None:
        parts["prior"] = float(_finite("prior_nats", prior_nats).mean()) / math.log(2)
    if offset_bits:
        parts["scale of the data"] = offset_bits
    height = 0.27 * (len(parts) + (prior_nats is not None))
    figure = drawing.new_figure(WIDTH, 3.5 + height)
    curve, bars = figure.subplots(2, 1, height_ratios=(2.4, height))
    drawing.kl_curve(curve, terms[2:], room, num_dims)
    drawing.bound_parts(bars, parts, prior_nats is not None, stderr_bits)
    units = "scaled data" if offset_bits is None else "units of the data"
    bars.set_xlabel(f"bits per example, {units}")
    return figure


def loss_curve(
    metrics: str | Path | Sequence[Mapping[str, Any]],
    limit_bits_per_dim: float | None = None,
    offset_bits_per_dim: float | None = None,
) -> "Figure":
    """The training loss over the examples seen, and below it the bound where it was evaluated.

    Args:
        metrics: a metrics.jsonl or its rows: num_examples_seen with loss_bits_per_dim (absent or
            None where no step was finite) or, where no row has that, with a loss without unit, to
            which limit and offset do not apply; and eval_bound_bits, bits per example, where
            evaluated.
        limit_bits_per_dim: the least loss that any model can reach, if it is known.
        offset_bits_per_dim: added to losses of the scaled data for those in the units of the data,
            which the limit is in too; if None, both are of the scaled data.

    Raises:
        ValueError: for metrics without a loss, or values that are not finite.
        OSError: for a file that cannot be read.
    """
    if isinstance(metrics, str | Path):
        from dpm_fast.metrics import read_metrics

        metrics = read_metrics(Path(metrics))
    seen, loss = _column(metrics, "loss_bits_per_dim")
    units = "scaled data" if offset_bits_per_dim is None else "units of the data"
    label = f"loss, bits/dim,\n{units}"
    loss = loss + (offset_bits_per_dim or 0.0)
    if not len(loss):
        (seen, loss), label, limit_bits_per_dim = _column(metrics, "loss"), "loss", None
    if not len(loss):
        raise ValueError(f"metrics must hold a loss_bits_per_dim, got {len(metrics)} rows without")
    seen_at, bound = _column(metrics, "eval_bound_bits")
    rows = 2 if len(bound) else 1
    figure = drawing.new_figure(WIDTH, 1.2 + 1.6 * rows)
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
    drawing.loss_over_examples(axes[0], seen, loss, limit_bits_per_dim)
    axes[0].set_ylabel(label)
    if len(bound):
        axes[1].plot(seen_at, bound, color=BLUE, lw=1.2, marker="o", ms=3)
        drawing.chart(axes[1], y="bound K, bits")
    from matplotlib.ticker import EngFormatter

    axes[-1].xaxis.set_major_formatter(EngFormatter())
    axes[-1].set_xlabel("examples seen", fontsize=9, color=INK)
    axes[-1].set_xlim(left=0)
    return figure


def _with_palette(png: io.BytesIO) -> io.BytesIO:
    """A drawing in 256 colors, a third of the size; only images need more."""
    from PIL import Image

    content = io.BytesIO()
    drawn = Image.open(png).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    drawn.save(content, "png", optimize=True, dpi=(_DPI, _DPI))
    return content


def _compare_images(examples: Mapping[str, np.ndarray], known: np.ndarray | None) -> "Figure":
    """Bands of three rows; a pixel is known if all its channels are."""
    pictures = {name: drawing.rgb(x, _range(examples["true"])) for name, x in examples.items()}
    if known is not None:
        shown = np.moveaxis(known, 1, -1).all(axis=-1, keepdims=True)
        pictures["corrupted"] = np.where(shown, pictures["corrupted"], _as_rgb(SAND))
    num = len(examples["true"])
    num_columns = -(-num // -(-num // 10))  # bands of equal length, ten columns at most
    rows = [drawing.in_rows(picture, num_columns) for picture in pictures.values()]
    bands = [drawing.mosaic(np.stack(band)) for band in zip(*rows, strict=True)]
    width = min(WIDTH, 1.2 * num_columns + 0.8)
    figure, axes = drawing.figure_of_mosaics(bands, width=width, left=0.7)
    for ax in axes:
        drawing.name_parts(ax.yaxis, list(pictures))
    return figure


def _fields(
    drift: Drift, times: Sequence[int], limit: float
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Where the arrows of each timestep are, and the displacements there; (K, 2) each."""
    if callable(drift):
        line = torch.linspace(-limit, limit, 15)[1:-1]
        grid = torch.cartesian_prod(line, line)
        drift = {t: (grid, drift(grid, t)) for t in times if t >= 1}
    found = {}
    for t in times:
        if t not in drift:
            continue
        x, move = (_finite(f"drift[{t}]", values) for values in drift[t])
        if x.shape != move.shape or x.ndim != 2 or x.shape[1] != 2:
            raise ValueError(f"drift[{t}] must have shapes (K, 2), got {x.shape} and {move.shape}")
        found[t] = (x, move)
    return found


def _as_rgb(color: str) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(color[1:]), np.uint8) / 255


def _trajectories(forward: States, reverse: States) -> list[dict[int, np.ndarray]]:
    """The states of both trajectories in the order of time, checked."""
    found = []
    for name, states in (("forward", forward), ("reverse", reverse)):
        if not states:
            raise ValueError(f"{name} must hold the state of one timestep at least, got none")
        frames = {t: _examples(f"{name}[{t}]", states[t]) for t in sorted(states)}
        shapes = {x.shape for x in frames.values()}
        if len(shapes) > 1:
            raise ValueError(f"{name} must have one shape at all timesteps, got {sorted(shapes)}")
        found.append(frames)
    times, others = list(found[0]), list(found[1])
    if others != times:
        raise ValueError(f"reverse must have the timesteps {times} of forward, got {others}")
    event, other = (frames[times[0]].shape[1:] for frames in found)
    if other != event:
        raise ValueError(f"reverse must have examples of shape {event}, got {other}")
    return found


def _first(states: Sequence[dict[int, np.ndarray]]) -> tuple[list[int], np.ndarray]:
    """The timesteps, and the forward state at the first of them."""
    times = list(states[0])
    return times, states[0][times[0]]


def _at_t(times: Iterable[int]) -> list[str]:
    return [f"t = {t}" for t in times]


def _range(x: np.ndarray) -> tuple[float, float]:
    return float(x.min()), float(x.max())


def _finite(name: str, values: Array | Sequence[float] | float) -> np.ndarray:
    """A float64 array, whatever the values were."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().double()
    x = np.asarray(values, dtype=np.float64)
    if x.size == 0 or not np.isfinite(x).all():
        problem = "no values" if x.size == 0 else "NaN or infinity"
        raise ValueError(f"{name} must hold finite values, got {problem}")
    return x


def _examples(name: str, values: Array) -> np.ndarray:
    """Images (N, C, H, W); sequences of either form, and points, (N, D)."""
    x = _finite(name, values)
    if x.ndim == 3 and x.shape[1] == 1:
        x = x[:, 0]
    if x.ndim != 2 and not (x.ndim == 4 and x.shape[1] in (1, 3)):
        raise ValueError(
            f"{name} must have shape (N, C, H, W) with C 1 or 3, (N, 1, D) or (N, D), got {x.shape}"
        )
    return x


def _mask(known: Array, shape: tuple[int, ...]) -> np.ndarray:
    mask = _finite("known", known).astype(bool)
    if mask.shape not in (shape, shape[1:]):
        raise ValueError(f"known must have shape {shape} or {shape[1:]}, got {mask.shape}")
    return np.broadcast_to(mask, shape)


def _entropy_bound(nats: Array, num_rows: int) -> np.ndarray:
    """Rows 2..T of a table; at t = 1 a bound may be infinite."""
    if tuple(nats.shape) != (num_rows,):
        raise ValueError(f"entropy_bounds must have shape ({num_rows},), got {tuple(nats.shape)}")
    return _finite("entropy_bounds", nats[2:])


def _column(metrics: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """The examples seen and the values, of the rows that have a value."""
    rows = [row for row in metrics if row.get(name) is not None]
    if not rows:
        return np.empty(0), np.empty(0)
    seen = _finite("num_examples_seen", [row["num_examples_seen"] for row in rows])
    return seen, _finite(name, [row[name] for row in rows])
