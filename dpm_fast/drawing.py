"""Parts of pictures: points, arrows, image mosaics, rasters, curves, and how they look."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 7.5  # inches: 1125 pixels, sharp on a page 900 wide
INK, GREY, PALE = "#26323d", "#7b8794", "#e9edf1"
BLUE, ORANGE, SAND = "#2c6e9b", "#c2410c", "#f3c9a5"
_WEAK, _STRONG = "#6f9dbd", "#0b2f49"
# Hues around the circle, of similar lightness.
_WHEEL = ("#c2410c", "#a3760a", "#3f8a3a", "#16808c", "#3f63b5", "#7f4bb0", "#b8336f", "#c2410c")
_TILE = 64  # pixels of an image's longer side, at least
_GAP = 4  # pixels between images
_CURVE_POINTS = 125


def new_figure(
    width: float, height: float, layout: Literal["constrained"] | None = "constrained"
) -> "Figure":
    """A figure of so many inches that no window, and no pyplot, knows about."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            "pictures require matplotlib, got none: pip install 'dpm_fast[plots]'"
        ) from None
    return Figure(figsize=(width, height), layout=layout)


def panels(
    rows: int, columns: int, width: float, aspect: float = 1.0
) -> tuple["Figure", np.ndarray]:
    """Panels ``width`` inches wide, ``aspect`` times as high; several rows have names beside them.

    Returns the figure and its axes, (rows, columns).
    """
    names = 0.45 if rows > 1 else 0.0
    figure = new_figure(width * columns, (width - names / columns) * aspect * rows + 0.3)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        _frame(ax, GREY, 0.6)
    return figure, axes


def label(axes: np.ndarray, columns: Iterable[str], rows: Iterable[str] = ()) -> None:
    """Titles above the columns of panels, and beside the rows."""
    for ax, text in zip(axes[0], columns, strict=True):
        ax.set_title(text, fontsize=9, color=INK)
    for ax, text in zip(axes[:, 0], rows, strict=False):
        ax.set_ylabel(text, fontsize=9, color=INK)


def points(ax: "Axes", x: np.ndarray, colors: np.ndarray | str, limit: float) -> None:
    """Points of the plane (N, 2) in the square from -limit to limit."""
    size = float(np.clip(4000 / max(len(x), 1), 1.5, 12.0))
    ax.scatter(x[:, 0], x[:, 1], c=colors, s=size, lw=0, alpha=0.8, rasterized=True)
    ax.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")


def partly_known_points(
    ax: "Axes", x: np.ndarray, known: np.ndarray, colors: np.ndarray, limit: float
) -> None:
    """Points of the plane (N, 2) where both coordinates are ``known`` (N, 2), else their lines."""
    both = known.all(axis=1)
    points(ax, x[both], colors[both], limit)
    width = float(np.clip(200 / len(x), 0.3, 1.2))
    for axis, draw in enumerate((ax.axvline, ax.axhline)):
        for i in np.flatnonzero(known[:, axis] & ~both):
            draw(x[i, axis], color=tuple(colors[i]), lw=width, alpha=0.8)


def half_side(clouds: Iterable[np.ndarray], share: float = 1.0) -> float:
    """Half the side of a square around the origin that holds a share of the coordinates."""
    return 1.05 * max(float(np.quantile(np.abs(x), share)) for x in clouds) or 1.0


def entitle(figure: "Figure", title: str) -> "Figure":
    """A title above all panels."""
    if title:
        drawn = figure.suptitle(title, fontsize=9, color=INK)
        if figure.get_layout_engine() is None:
            drawn.set(y=1 - 0.06 / figure.get_figheight(), va="top")
    return figure


def colors_of_places(x: np.ndarray) -> np.ndarray:
    """A hue for the direction from the origin, (N, 4)."""
    turns = np.arctan2(x[:, 1], x[:, 0]) / (2 * math.pi) % 1.0
    return _colormap(_WHEEL)(turns)


def arrows(ax: "Axes", x: np.ndarray, move: np.ndarray) -> None:
    """Arrows at x (K, 2) along ``move`` (K, 2), the darker the stronger.

    Their lengths differ little, so that directions are seen where the field is weak too.
    """
    length = np.linalg.norm(move, axis=1)
    # Outside the data, most are far stronger than any within.
    strength = np.sqrt(length / (np.median(length) or 1.0)).clip(max=1.0)
    spacing = np.ptp(x) / math.sqrt(len(x)) or 1.0
    direction = move / np.where(length > 0, length, 1.0)[:, None]
    shown = spacing * (0.55 + 0.4 * strength[:, None]) * direction
    ax.quiver(
        x[:, 0], x[:, 1], shown[:, 0], shown[:, 1], strength,
        cmap=_colormap((_WEAK, _STRONG)), clim=(0, 1), pivot="middle",
        angles="xy", scale_units="xy", scale=1.0, width=0.009,
        headwidth=3.4, headlength=3.4, headaxislength=3.0,
    )  # fmt: skip


def rgb(x: np.ndarray, value_range: tuple[float, float]) -> np.ndarray:
    """Images (..., C, H, W) as (..., H, W, 3) in [0, 1]."""
    low, high = value_range
    x = np.clip((x - low) / ((high - low) or 1.0), 0.0, 1.0)
    return np.broadcast_to(np.moveaxis(x, -3, -1), (*x.shape[:-3], *x.shape[-2:], 3))


def in_rows(x: np.ndarray, num_columns: int) -> np.ndarray:
    """(N, ...) as (rows, num_columns, ...), the last row filled up with ones: white."""
    fill = np.ones((-len(x) % num_columns, *x.shape[1:]))
    return np.concatenate((x, fill)).reshape(-1, num_columns, *x.shape[1:])


def num_columns(num: int, height: int, width: int) -> int:
    """Columns of a picture about twice as wide as high, without a ragged last row if possible."""
    ideal = math.sqrt(2 * num * height / width)

    def cost(columns: int) -> float:
        return abs(math.log(columns / ideal)) + (0.6 if num % columns else 0.0)

    return min(range(num, 0, -1), key=cost)


def mosaic(tiles: np.ndarray) -> np.ndarray:
    """Tiles (rows, columns, H, W, 3) as one picture with thin white gaps, (height, width, 3)."""
    zoom = -(-_TILE // max(tiles.shape[2:4]))
    tiles = tiles.repeat(zoom, axis=2).repeat(zoom, axis=3)
    tiles = np.pad(tiles, ((0, 0), (0, 0), (0, _GAP), (0, _GAP), (0, 0)), constant_values=1.0)
    rows, columns, height, width, _ = tiles.shape
    picture = tiles.swapaxes(1, 2).reshape(rows * height, columns * width, 3)
    return picture[:-_GAP, :-_GAP]


def figure_of_mosaics(
    mosaics: Sequence[np.ndarray],
    *,
    width: float = WIDTH,
    beside: bool = False,
    left: float = 0.0,
    top: float = 0.0,
) -> tuple["Figure", list["Axes"]]:
    """Mosaics of one shape beside or below each other.

    Args:
        mosaics: (height, width, 3) each.
        width: of the figure, inches.
        beside: rather than below.
        left, top: inches left free for text.
    """
    pad, gap = 0.06, 0.2
    rows, columns = (1, len(mosaics)) if beside else (len(mosaics), 1)
    across = (width - left - 2 * pad - gap * (columns - 1)) / columns
    down = across * mosaics[0].shape[0] / mosaics[0].shape[1]
    height = top + 2 * pad + down * rows + gap * (rows - 1)
    figure = new_figure(width, height, layout=None)
    axes = []
    for i, picture in enumerate(mosaics):
        row, column = divmod(i, columns)
        x, y = left + pad + column * (across + gap), pad + (rows - 1 - row) * (down + gap)
        ax = figure.add_axes((x / width, y / height, across / width, down / height))
        ax.imshow(picture, interpolation="nearest", aspect="auto")
        ax.set(xticks=[], yticks=[])
        ax.set_frame_on(False)
        axes.append(ax)
    return figure, axes


def name_parts(axis: Any, names: Sequence[str]) -> None:
    """Names for the equal parts of a side of a mosaic."""
    low, high = sorted(axis.get_view_interval())
    part = (high - low) / len(names)
    axis.set_ticks([low + part * (i + 0.5) for i in range(len(names))], names)
    axis.set_tick_params(length=0, labelsize=8, labelcolor=INK)


def raster(
    ax: "Axes",
    x: np.ndarray,
    value_range: tuple[float, float],
    known: np.ndarray | None = None,
) -> None:
    """Sequences (N, D) from pale to dark, a row each; what is not ``known`` (N, D) in sand."""
    low, high = value_range
    shown = np.ma.masked_array(x, False if known is None else ~known)
    colors = _colormap((PALE, INK)).with_extremes(bad=SAND)
    ax.imshow(shown, cmap=colors, vmin=low, vmax=high, aspect="auto", interpolation="nearest")


def raster_aspect(num_rows: int, num_columns: int) -> float:
    """Height over width: square cells, within reason."""
    return min(max(num_rows / num_columns, 0.75), 1.6)


def kl_curve(ax: "Axes", kl: np.ndarray, room: np.ndarray | None, num_dims: int) -> None:
    """The KL of steps 2..T, (T - 1,) bits, and the most that the best may be, likewise."""
    t = np.arange(2, len(kl) + 2)
    sums = np.abs(kl).cumsum()
    if t[np.searchsorted(sums, sums[-1] / 2)] < t[-1] / 10:
        ax.set_xscale("log")
    at, text = t, "KL of step t"
    if len(t) > 2 * _CURVE_POINTS:  # of single steps, Monte-Carlo noise would be seen and no curve
        at, kl = (_bin_means(x, ax.get_xscale() == "log") for x in (t, kl))
        text = "KL of step t, mean over neighbors"
    low = min(0.0, float(kl.min()))
    met = kl > 0
    if met.any() and kl.max() > 30 * kl[met].min():
        ax.set_yscale("log")
        at, kl = at[met], kl[met]
        low = max(0.7 * float(kl.min()), 1e-5 * float(kl.max()))  # below, nothing adds to the sum
    ax.plot(at, kl, color=ORANGE, lw=1.6, label=text)
    if room is not None:
        text = "where the best possible KL lies, from the entropy bounds"
        ax.fill_between(t, low, room, color=BLUE, alpha=0.15, lw=0, label=text)
    ax.set_ylim(bottom=low)
    ax.margins(x=0.01)
    ax.legend(fontsize=8, frameon=False, labelcolor=INK)
    if num_dims > 1:
        units = (lambda bits: bits / num_dims, lambda bits_per_dim: bits_per_dim * num_dims)
        right = ax.secondary_yaxis("right", functions=units)
        right.set_ylabel("bits/dim", fontsize=9, color=INK)
        right.tick_params(labelsize=8, colors=INK)
    chart(ax, "t", "bits per example")


def bound_parts(
    ax: "Axes", parts: Mapping[str, float], with_sum: bool, stderr_bits: float | None
) -> None:
    """Bars of the parts, each beginning where the one above ends, and of their sum."""
    names, lengths = list(parts), np.array(list(parts.values()))
    starts = lengths.cumsum() - lengths
    colors = [GREY, ORANGE, BLUE, SAND][: len(parts)]
    if with_sum:
        names.append("−K")
        lengths, starts = np.append(lengths, lengths.sum()), np.append(starts, 0.0)
        colors.append(INK)
    decimals = 3 if np.abs(lengths).max() < 100 else 1
    texts = [number(length, decimals) for length in lengths]
    if with_sum and stderr_bits is not None:
        texts[-1] += f" ± {number(stderr_bits, decimals)}"
    places, ends = range(len(names)), starts + lengths
    ax.barh(places, lengths, left=starts, color=colors, height=0.62)
    # Down to where the next bar begins: one of no length is seen there.
    for place, end in enumerate(ends[: len(parts) - 1]):
        ax.plot([end, end], [place - 0.31, place + 1.31], color=GREY, lw=0.8)
    for place, text, right in zip(places, texts, np.maximum(starts, ends), strict=True):
        note(ax, text, (float(right), place))
    low, high = min(0.0, float(ends.min())), max(0.0, float(ends.max()))
    ax.set_xlim(low + 0.04 * low, high + 0.2 * ((high - low) or 1.0))
    ax.axvline(0, color=INK, lw=0.8)
    ax.set_yticks(places, names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    chart(ax)
    ax.grid(False, axis="y")
    ax.tick_params(axis="y", length=0)


def loss_over_examples(ax: "Axes", seen: np.ndarray, loss: np.ndarray, limit: float | None) -> None:
    """The loss as it was measured, its moving mean, and the limit."""
    smooth = _moving_mean(loss, 1 + 2 * (len(loss) // 50))
    marker = "o" if len(loss) <= 12 else None
    ax.plot(seen, loss, color=ORANGE, lw=0.8, alpha=0.35)
    ax.plot(seen, smooth, color=ORANGE, lw=1.6, marker=marker, ms=4)
    # The first steps of a run can lie a thousand times above the rest, most of which is within a
    # few times the range of the lower three quarters.
    least, most, quartile = float(loss.min()), float(loss.max()), float(np.quantile(loss, 0.75))
    shown = [least, min(most, least + 3 * (quartile - least)), float(smooth[-1])]
    if limit is not None:
        shown.append(limit)
        ax.axhline(limit, color=INK, lw=0.9, ls=(0, (4, 3)))
        text, transform = f"limit {number(limit)}", ax.get_yaxis_transform()
        note(ax, text, (1.0, limit), transform=transform)
    margin = 0.12 * (max(shown) - min(shown)) or 0.1
    ax.set_ylim(min(shown) - margin, max(shown) + margin)
    chart(ax)


def note(
    ax: "Axes",
    text: str,
    place: tuple[float, float],
    *,
    transform: Any = None,
) -> None:
    """Text to the right of a place."""
    ax.annotate(
        text, place, xycoords=transform or ax.transData, xytext=(4, 0), textcoords="offset points",
        ha="left", va="center", fontsize=8, color=INK, annotation_clip=False,
        bbox={"facecolor": "white", "linewidth": 0, "pad": 0.6, "alpha": 0.85},
    )  # fmt: skip


def number(value: float, decimals: int = 3) -> str:
    """With a minus sign, not a hyphen."""
    return f"{value:.{decimals}f}".replace("-", "−")


def chart(ax: "Axes", x: str = "", y: str = "") -> None:
    """The look of axes with scales, and their labels."""
    ax.set_xlabel(x, fontsize=9, color=INK)
    ax.set_ylabel(y, fontsize=9, color=INK)
    ax.tick_params(labelsize=8, colors=INK)
    ax.grid(color=PALE, lw=0.7)
    ax.set_axisbelow(True)
    _frame(ax, INK, 0.8)
    ax.spines[["top", "right"]].set_visible(False)


def _frame(ax: "Axes", color: str, width: float) -> None:
    for side in ax.spines.values():
        side.set(color=color, linewidth=width)


def _moving_mean(x: np.ndarray, width: int) -> np.ndarray:
    """Mean of the ``width`` (odd) values around each, of fewer at the ends."""
    half = width // 2
    return np.array([x[max(0, i - half) : i + half + 1].mean() for i in range(len(x))])


def _bin_means(x: np.ndarray, in_octaves: bool) -> np.ndarray:
    """Means of equal parts of x, or of parts whose ends have equal ratios."""
    spaced = np.geomspace if in_octaves else np.linspace
    ends = np.unique(spaced(1, len(x), _CURVE_POINTS).round().astype(int))
    return np.array([part.mean() for part in np.split(x, ends[:-1])])


def _colormap(colors: Sequence[str]) -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("", list(colors))
