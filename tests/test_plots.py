"""Pictures: what each of them shows, every error, and writing that is all or nothing."""

import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from dpm_fast import GaussianDiffusion, drawing, plots
from dpm_fast.entropy import entropies

pytest.importorskip("matplotlib")

from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.quiver import Quiver
from PIL import Image

TIMES = (0, 5, 10)


def states(*shape: int, seed: int = 0) -> dict[int, torch.Tensor]:
    """Some state for every timestep, in the order a sampler returns them."""
    generator = torch.Generator().manual_seed(seed)
    return {t: torch.randn(shape, generator=generator) for t in reversed(TIMES)}


def tile(figure: Figure, row: int, column: int, side: int, axes: int = 0) -> np.ndarray:
    """One image of a mosaic of square images, (side, side, 3), after undoing the zoom."""
    zoom = -(-64 // side)
    picture = figure.axes[axes].images[0].get_array()
    y, x = (i * (zoom * side + 4) for i in (row, column))
    block = picture[y : y + zoom * side, x : x + zoom * side]
    assert (block == block[::zoom, ::zoom].repeat(zoom, 0).repeat(zoom, 1)).all()
    return np.asarray(block[::zoom, ::zoom])


# Writing


def test_save_writes_a_png_of_the_figures_size(tmp_path):
    path = plots.save(plots.sample_grid(torch.rand(8, 3, 4, 4)), tmp_path / "grid.png")
    assert path == tmp_path / "grid.png"
    with Image.open(path) as picture:
        assert picture.width == drawing.WIDTH * 150
        assert picture.mode == "RGBA"  # images keep every color


def test_save_takes_the_format_from_the_ending(tmp_path):
    figure = plots.loss_curve([{"num_examples_seen": 1, "loss_bits_per_dim": 2.0}])
    assert plots.save(figure, str(tmp_path / "a.pdf")).read_bytes().startswith(b"%PDF")
    assert b"<svg" in plots.save(figure, tmp_path / "a.svg").read_bytes()
    with pytest.raises(ValueError, match=r"path must end in \.png, \.pdf, \.svg, got '.*a\.bmp'"):
        plots.save(figure, tmp_path / "a.bmp")


def test_a_drawing_of_many_points_is_a_small_file(tmp_path):
    x = {t: torch.randn(2000, 2) for t in (0, 1, 2, 3, 4, 5)}
    path = plots.save(plots.trajectory_2d(x, x), tmp_path / "x.png")
    assert path.stat().st_size < 300e3
    with Image.open(path) as picture:
        assert picture.mode == "P"


@pytest.mark.parametrize("where", ["savefig", "write_bytes", "replace"])
def test_a_failure_leaves_the_old_picture_and_nothing_else(where, tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    path.write_bytes(b"old")
    figure = plots.sample_grid(torch.rand(2, 1, 4, 4))

    def fail(self: object, *args: object, **kwargs: object) -> None:
        if where == "write_bytes":  # a full disk takes a part
            with self.open("wb") as file:
                file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(Figure if where == "savefig" else Path, where, fail)
    with pytest.raises(OSError, match="no space left"):
        plots.save(figure, path)
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"]
    assert path.read_bytes() == b"old"


def test_save_into_a_missing_directory_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        plots.save(plots.sample_grid(torch.rand(2, 3)), tmp_path / "absent" / "x.png")


def test_threads_draw_what_one_thread_draws(tmp_path):
    x = {0: torch.randn(50, 2)}

    def draw(i: int) -> bytes:
        return plots.save(plots.trajectory_2d(x, x), tmp_path / f"{i}.png").read_bytes()

    alone = draw(0)
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(draw, range(1, 5))) == {alone}


def test_no_global_state_of_matplotlib_is_used(tmp_path, monkeypatch):
    import matplotlib

    before = dict(matplotlib.rcParams)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would fail
    x = states(4, 2)
    for figure in (
        plots.trajectory_2d(x, x, lambda x, t: -x),
        plots.comparison(x[0], x[0], x[0]),
        plots.bound_per_timestep(torch.rand(5), 2),
    ):
        plots.save(figure, tmp_path / "x.png")
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plots.trajectory_2d(states(4, 2), states(4, 2)),
        lambda: plots.trajectory_images(states(4, 1, 4, 4), states(4, 1, 4, 4)),
        lambda: plots.trajectory_sequences(states(4, 5), states(4, 5)),
        lambda: plots.sample_grid(torch.rand(2, 3)),
        lambda: plots.comparison(*torch.rand(3, 2, 1, 4, 4), torch.ones(1, 4, 4)),
        lambda: plots.comparison(*torch.rand(3, 2, 2)),
        lambda: plots.bound_per_timestep(torch.rand(5), 2),
        lambda: plots.loss_curve(rows([1.0])),
    ],
)
def test_without_matplotlib_the_error_names_the_extra(draw, monkeypatch):
    for module in ("figure", "colors", "ticker"):
        monkeypatch.setitem(sys.modules, f"matplotlib.{module}", None)
    with pytest.raises(ImportError, match=r"pip install 'dpm_fast\[plots\]'"):
        draw()


# Trajectories


def test_trajectory_2d_draws_the_points_in_the_order_of_time():
    forward, reverse = states(20, 2), states(30, 2, seed=1)
    figure = plots.trajectory_2d(forward, reverse)
    assert [ax.get_title() for ax in figure.axes] == ["t = 0", "t = 5", "t = 10", "", "", ""]
    for i, ax in enumerate(figure.axes):
        expected = (forward, reverse)[i // 3][TIMES[i % 3]]
        np.testing.assert_allclose(ax.collections[0].get_offsets(), expected)
        assert ax.get_xlim() == ax.get_ylim() == figure.axes[0].get_xlim()
    colors = [ax.collections[0].get_facecolors() for ax in figure.axes]
    assert len(np.unique(colors[0], axis=0)) > 10
    for i, color in enumerate(colors):
        np.testing.assert_array_equal(color, colors[i // 3 * 3])


def test_points_of_one_direction_have_one_color():
    x = torch.tensor([[1.0, 1.0], [2.0, 2.0], [-1.0, 1.0]])
    colors = drawing.colors_of_places(x.numpy())
    np.testing.assert_array_equal(colors[0], colors[1])
    assert np.abs(colors[0] - colors[2]).max() > 0.2


def quivers(figure: Figure) -> list[list[Quiver]]:
    """The arrows in each panel of the third row."""
    return [[a for a in ax.collections if isinstance(a, Quiver)] for ax in figure.axes[6:]]


def test_drift_arrows_point_along_the_drift():
    def drift(x: torch.Tensor, t: int) -> torch.Tensor:
        assert t >= 1
        assert x.dtype == torch.float32
        return torch.stack((-x[:, 1], x[:, 0]), 1) / t

    x = states(20, 2)
    no_arrows, *shown = quivers(plots.trajectory_2d(x, x, drift))
    assert no_arrows == []  # no reverse step leaves t = 0
    for (arrows,) in shown:
        u, v = np.asarray(arrows.U), np.asarray(arrows.V)
        moved = np.abs(arrows.XY).sum(axis=1) > 0
        np.testing.assert_allclose((u * arrows.X + v * arrows.Y)[moved], 0, atol=1e-6)
        assert (u * -arrows.Y + v * arrows.X)[moved].min() > 0
        np.testing.assert_array_equal(np.hypot(u, v)[~moved], 0)


def test_stronger_drift_is_darker_and_no_shorter():
    at = torch.cartesian_prod(torch.linspace(-1, 1, 4), torch.linspace(-1, 1, 4))
    move = torch.linspace(0.1, 1, 16)[:, None] * torch.tensor([[0.6, -0.8]])
    x = states(20, 2)
    ((), (), (arrows,)) = quivers(plots.trajectory_2d(x, x, {10: (at, move)}))
    np.testing.assert_allclose(arrows.XY, at)
    assert (np.diff(arrows.get_array()) >= 0).all()
    lengths = np.hypot(arrows.U, arrows.V)
    assert (np.diff(lengths) >= -1e-12).all()
    np.testing.assert_allclose(arrows.U / lengths, 0.6, rtol=1e-6)
    assert lengths.max() < 2 / 3  # neighbors do not overlap


def test_no_drift_at_any_timestep_is_no_third_row():
    x = states(20, 2)
    assert len(plots.trajectory_2d(x, x, {}).axes) == 6


def test_trajectory_images_show_a_row_per_example_and_run_back():
    forward, reverse = states(3, 1, 8, 8), states(2, 1, 8, 8, seed=1)
    figure = plots.trajectory_images(forward, reverse)
    labels = [[text.get_text() for text in ax.get_xticklabels()] for ax in figure.axes]
    assert labels == [["t = 0", "5", "10"], ["t = 10", "5", "0"]]
    low, high = forward[0].min(), forward[0].max()
    for axes, (frames, order) in enumerate(((forward, TIMES), (reverse, TIMES[::-1]))):
        for row in range(2):  # as many as both have
            for column, t in enumerate(order):
                grey = ((frames[t][row, 0] - low) / (high - low)).clamp(0, 1)
                shown = tile(figure, row, column, 8, axes)
                np.testing.assert_allclose(shown, grey[..., None].expand(8, 8, 3), atol=1e-6)
    assert plots.trajectory_images(forward, reverse, 1).axes[0].images[0].get_array().shape[0] == 64


def test_trajectory_of_sequences_is_a_raster_per_timestep():
    forward, reverse = ({t: (x > 0).float() for t, x in states(6, 9).items()} for _ in range(2))
    figure = plots.trajectory_images(forward, reverse)
    assert len(figure.axes) == 6
    for i, ax in enumerate(figure.axes):
        (raster,) = ax.images
        np.testing.assert_array_equal(raster.get_array(), forward[TIMES[i % 3]])
        assert raster.get_clim() == (0, 1)
    channel = {t: x[:, None] for t, x in forward.items()}
    few = plots.trajectory_sequences(channel, channel, num_examples=2)
    np.testing.assert_array_equal(few.axes[2].images[0].get_array(), forward[10][:2])


@pytest.mark.parametrize(
    ("draw", "shape"),
    [
        (plots.trajectory_2d, (4, 2)),
        (plots.trajectory_images, (4, 1, 4, 4)),
        (plots.trajectory_sequences, (4, 5)),
    ],
)
def test_trajectories_refuse_what_does_not_fit(draw, shape):
    good = states(*shape)
    with pytest.raises(ValueError, match="reverse must hold the state of one timestep at least"):
        draw(good, {})
    late = {t + 1: x for t, x in good.items()}
    with pytest.raises(
        ValueError, match=r"the timesteps \[0, 5, 10\] of forward, got \[1, 6, 11\]"
    ):
        draw(good, late)
    with pytest.raises(ValueError, match="forward must have one shape at all timesteps"):
        draw(good | {5: good[5][:1]}, good)
    with pytest.raises(ValueError, match=r"reverse\[5\] must hold finite values, got NaN"):
        draw(good, good | {5: good[5] * math.inf})
    with pytest.raises(ValueError, match=r"forward\[0\] must hold finite values, got no values"):
        draw({t: x[:0] for t, x in good.items()}, good)
    with pytest.raises(ValueError, match=r"reverse must have examples of shape .*, got \(7,\)"):
        draw(good, states(4, 7))


def test_trajectories_refuse_other_kinds_of_examples():
    for draw, wrong, required in (
        (plots.trajectory_2d, states(4, 3), r"\(N, 2\)"),
        (plots.trajectory_sequences, states(4, 1, 4, 4), r"\(N, D\) or \(N, 1, D\)"),
        (plots.trajectory_images, states(4, 2, 4, 4), r"\(N, C, H, W\) with C 1 or 3"),
    ):
        with pytest.raises(ValueError, match=f"must have shape {required}.*, got"):
            draw(wrong, wrong)


@pytest.mark.parametrize(
    "drift",
    [
        lambda x, t: x[:, :1],
        lambda x, t: x[:-1],
        {5: (torch.zeros(3, 2), torch.zeros(2, 2))},
        {5: (torch.zeros(3, 3), torch.zeros(3, 3))},
    ],
)
def test_drift_of_a_wrong_shape_is_an_error(drift):
    with pytest.raises(ValueError, match=r"drift\[5\] must have shapes \(K, 2\), got"):
        plots.trajectory_2d(states(4, 2), states(4, 2), drift)


def test_drift_that_is_not_finite_is_an_error():
    with pytest.raises(ValueError, match=r"drift\[5\] must hold finite values, got NaN"):
        plots.trajectory_2d(states(4, 2), states(4, 2), lambda x, t: x * math.nan)


# Samples


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 3])
def test_sample_grid_of_images(channels, dtype):
    x = torch.arange(6 * channels * 16).reshape(6, channels, 4, 4) % 250
    figure = plots.sample_grid(x.to(dtype), num_columns=4)
    x = x.to(dtype).double()
    for i in range(6):
        expected = ((x[i] - x.min()) / (x.max() - x.min())).movedim(0, -1).expand(4, 4, 3)
        np.testing.assert_allclose(tile(figure, i // 4, i % 4, 4), expected, atol=1e-12)
    assert (tile(figure, 1, 2, 4) == 1).all()  # the last row is filled up with white
    assert figure.axes[0].images[0].get_array().shape == (2 * 64 + 4, 4 * 64 + 3 * 4, 3)


def test_sample_grid_clips_to_a_value_range():
    x = torch.tensor([-1.0, 0.0, 0.25, 2.0]).reshape(1, 1, 2, 2)
    shown = tile(plots.sample_grid(x, value_range=(0.0, 1.0)), 0, 0, 2)
    np.testing.assert_allclose(shown[..., 0], [[0, 0], [0.25, 1]])


@pytest.mark.parametrize(
    ("num", "height", "width", "columns"),
    [(64, 8, 8, 16), (32, 8, 8, 8), (1, 8, 8, 1), (17, 8, 8, 6), (64, 8, 16, 8)],
)
def test_number_of_columns(num, height, width, columns):
    assert drawing.num_columns(num, height, width) == columns


def test_images_that_are_not_square_keep_their_aspect():
    figure = plots.sample_grid(torch.rand(4, 1, 8, 16), num_columns=1)
    height, width, _ = figure.axes[0].images[0].get_array().shape
    box = figure.axes[0].get_window_extent()
    assert (height, width) == (4 * 32 + 3 * 4, 64)
    assert box.height / box.width == pytest.approx(height / width)


def test_sample_grid_of_sequences_continues_to_the_right():
    x = (torch.rand(25, 10) > 0.5).float()
    figure = plots.sample_grid(x)
    shown = [np.asarray(ax.images[0].get_array()) for ax in figure.axes]
    assert [len(part) for part in shown] == [9, 9, 7]
    np.testing.assert_array_equal(np.concatenate(shown), x)
    assert {ax.get_ylim() for ax in figure.axes} == {(8.5, -0.5)}


def test_sample_grid_of_points():
    x = torch.randn(50, 2)
    (ax,) = plots.sample_grid(x).axes
    np.testing.assert_allclose(ax.collections[0].get_offsets(), x)
    assert ax.get_xlim()[1] == ax.get_ylim()[1] > x.abs().max()


@pytest.mark.parametrize("shape", [(6, 1, 4, 4), (25, 10), (50, 2)])
def test_a_title_has_a_place_of_its_own(shape):
    figure = plots.sample_grid(torch.rand(shape), title="samples\nof something")
    figure.draw_without_rendering()
    title = figure._suptitle.get_window_extent()
    assert title.y1 <= figure.bbox.y1
    assert title.y0 >= max(ax.get_window_extent().y1 for ax in figure.axes)


@pytest.mark.parametrize("shape", [(4,), (4, 2, 8, 8), (4, 3, 8), (1, 1, 1, 4, 4)])
def test_samples_of_another_shape_are_an_error(shape):
    with pytest.raises(ValueError, match=r"samples must have shape .* got \("):
        plots.sample_grid(torch.zeros(shape))


@pytest.mark.parametrize(
    ("x", "problem"), [(torch.empty(0, 2), "no values"), (torch.full((3, 2), math.nan), "NaN")]
)
def test_bad_samples_are_an_error(x, problem):
    with pytest.raises(ValueError, match=f"samples must hold finite values, got {problem}"):
        plots.sample_grid(x)


# Restorations


def test_comparison_of_images_shows_what_was_known():
    true, corrupted, restored = torch.rand(3, 2, 1, 4, 4)
    known = torch.zeros(4, 4, dtype=torch.bool)
    known[:, :2] = True
    figure = plots.comparison(true, corrupted, restored, known[None])
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels == ["true", "corrupted", "restored"]
    low, high = true.min(), true.max()
    for row, x in enumerate((true, corrupted, restored)):
        for column in range(2):
            grey = ((x[column, 0] - low) / (high - low)).clamp(0, 1)[..., None].expand(4, 4, 3)
            shown = tile(figure, row, column, 4)
            seen = known.numpy() if row == 1 else np.ones((4, 4), bool)
            np.testing.assert_allclose(shown[seen], grey.numpy()[seen], atol=1e-6)
            assert (shown[~seen] == to_rgb(drawing.SAND)).all()


def test_a_pixel_with_an_unknown_channel_is_unknown():
    x = torch.rand(1, 3, 4, 4)
    known = torch.ones_like(x, dtype=torch.bool)
    known[0, 1, 2, 3] = False
    flat = (tile(plots.comparison(x, x, x, known), 1, 0, 4) == to_rgb(drawing.SAND)).all(-1)
    assert np.argwhere(flat).tolist() == [[2, 3]]


def test_many_images_are_compared_in_bands():
    x = torch.rand(23, 1, 4, 4)
    figure = plots.comparison(x, x, x)
    assert len(figure.axes) == 3
    low, high = x.min(), x.max()
    expected = ((x[17, 0] - low) / (high - low))[..., None].expand(4, 4, 3)
    np.testing.assert_allclose(tile(figure, 2, 1, 4, axes=2), expected, atol=1e-6)
    assert (tile(figure, 2, 7, 4, axes=2) == 1).all()


@pytest.mark.parametrize("shape", [(5, 8), (5, 1, 8)])
def test_comparison_of_sequences_masks_the_unknown(shape):
    true, corrupted, restored = (torch.rand(3, *shape) > 0.5).float()
    known = torch.rand(shape) > 0.5
    figure = plots.comparison(true, corrupted, restored, known)
    assert [ax.get_title() for ax in figure.axes] == ["true", "corrupted", "restored"]
    for ax, x in zip(figure.axes, (true, corrupted, restored), strict=True):
        np.testing.assert_array_equal(ax.images[0].get_array().data, x.reshape(5, 8))
    hidden = [np.ma.getmaskarray(ax.images[0].get_array()) for ax in figure.axes]
    np.testing.assert_array_equal(hidden[1], ~known.reshape(5, 8))
    assert not hidden[0].any()
    assert not hidden[2].any()


def test_comparison_of_points_keeps_their_colors():
    true, corrupted, restored = torch.randn(3, 20, 2)
    figure = plots.comparison(true, corrupted, restored)
    for ax, x in zip(figure.axes, (true, corrupted, restored), strict=True):
        np.testing.assert_allclose(ax.collections[0].get_offsets(), x)
        colors = [a.collections[0].get_facecolors() for a in (ax, figure.axes[0])]
        np.testing.assert_array_equal(*colors)


def test_points_of_which_a_coordinate_is_known_are_lines():
    x = torch.randn(3, 2)
    known = torch.tensor([[True, False], [False, True], [True, True]])
    _, ax, _ = plots.comparison(x, x, x, known).axes
    upright, level = ax.lines
    assert set(upright.get_xdata()) == {x[0, 0].item()}
    assert set(level.get_ydata()) == {x[1, 1].item()}
    np.testing.assert_allclose(ax.collections[0].get_offsets(), x[2:])
    assert ax.get_title() == "corrupted: one coordinate known"
    assert plots.comparison(x, x, x, known[2:].expand(3, 2)).axes[1].get_title() == "corrupted"


def test_comparison_refuses_what_does_not_fit():
    x = torch.rand(4, 1, 4, 4)
    with pytest.raises(ValueError, match=r"restored must have shape \(4, 1, 4, 4\), got \(3, 1"):
        plots.comparison(x, x, x[:3])
    with pytest.raises(ValueError, match="corrupted must hold finite values, got NaN"):
        plots.comparison(x, x / 0, x)
    with pytest.raises(ValueError, match=r"known must have shape .* or \(1, 4, 4\), got \(4, 4\)"):
        plots.comparison(x, x, x, torch.ones(4, 4))


# The bound


def terms(num_steps: int = 20) -> torch.Tensor:
    """Plausible terms: a decoder below zero, KLs of similar size."""
    nats = 0.2 + 0.1 * torch.rand(num_steps + 1, dtype=torch.float64)
    nats[0], nats[1] = 0.0, -1.5
    return nats


def test_bound_curve_and_parts_are_in_bits():
    nats = terms()
    figure = plots.bound_per_timestep(
        nats, 3, prior_nats=torch.tensor([0.1, 0.3]), stderr_bits=0.25
    )
    curve, bars = figure.axes
    t, kl = curve.lines[0].get_data()
    np.testing.assert_array_equal(t, range(2, 21))
    np.testing.assert_allclose(kl, nats[2:] / math.log(2))
    names = [text.get_text() for text in bars.get_yticklabels()]
    assert names == ["decoder, t = 1", "KL, t = 2 … T", "prior", "−K"]
    parts = np.array([nats[1], nats[2:].sum(), 0.2]) / math.log(2)
    np.testing.assert_allclose([b.get_width() for b in bars.patches], [*parts, parts.sum()])
    np.testing.assert_allclose([b.get_x() for b in bars.patches], [0, *parts.cumsum()[:2], 0])
    total = f"{parts.sum():.3f} ± 0.250"
    assert [text.get_text() for text in bars.texts] == [
        f"{parts[0]:.3f}".replace("-", "−"), f"{parts[1]:.3f}", f"{parts[2]:.3f}", total,
    ]  # fmt: skip


def test_parts_of_the_bound_add_up_in_the_units_of_the_data():
    bars = plots.bound_per_timestep(terms(), 3, prior_nats=0.0, offset_bits=6.0).axes[1]
    *parts, total = [bar.get_width() for bar in bars.patches]
    assert total == pytest.approx(sum(parts))
    assert parts[-1] == 6.0
    assert bars.get_yticklabels()[3].get_text() == "scale of the data"
    assert bars.get_xlabel() == "bits per example, units of the data"
    scaled = plots.bound_per_timestep(terms(), 3, prior_nats=0.0).axes[1]
    assert scaled.get_xlabel() == "bits per example, scaled data"


def test_many_steps_are_averaged_and_their_sum_stays():
    nats = 0.01 + torch.rand(2001, dtype=torch.float64)
    curve = plots.bound_per_timestep(nats, 1).axes[0].lines[0]
    t, kl = curve.get_data()
    assert len(t) == drawing._CURVE_POINTS
    bits = nats[2:] / math.log(2)
    assert np.trapezoid(kl, t) == pytest.approx(bits.sum().item(), rel=0.02)
    assert kl.std() < 0.5 * bits.std().item()
    assert "mean over neighbors" in curve.get_label()


@pytest.mark.parametrize("in_octaves", [False, True])
def test_means_of_bins_cover_everything_once(in_octaves):
    x = np.arange(2.0, 1000.0)
    means = drawing._bin_means(x, in_octaves)
    assert (means[0], len(means) <= drawing._CURVE_POINTS) == (2.0, True)
    assert (np.diff(means) > 0).all()
    np.testing.assert_array_equal(drawing._bin_means(np.ones(998), in_octaves), 1.0)


def test_second_scale_of_the_bound_is_bits_per_dim():
    figure = plots.bound_per_timestep(terms(), 5)
    figure.draw_without_rendering()
    (right,) = figure.axes[0].child_axes
    np.testing.assert_allclose(right.get_ylim(), np.array(figure.axes[0].get_ylim()) / 5)
    assert plots.bound_per_timestep(terms(), 1).axes[0].child_axes == []


def test_entropy_bounds_shade_up_to_their_distance():
    process = GaussianDiffusion.from_schedule("erase", 20)
    table = entropies(process)
    assert table.lower[1] == -math.inf  # allowed: t = 1 is not drawn
    figure = plots.bound_per_timestep(terms(), 3, (table.lower, table.upper))
    ((shade,), (line,)) = figure.axes[0].collections, figure.axes[0].lines
    corners = shade.get_paths()[0].vertices
    distance = 3 * (table.upper - table.lower)[2:] / math.log(2)
    for t, most in zip(line.get_xdata(), distance, strict=True):
        assert corners[corners[:, 0] == t, 1].max() == pytest.approx(most.item())


def test_the_best_kl_of_gaussian_data_lies_in_the_shade():
    """For N(0, v) data the reverse process is known, and so is the KL of its steps."""
    process = GaussianDiffusion.from_schedule("linear", 50)
    tables, variance = process.tables(), 0.3
    marginal = tables.alpha_bar * variance + tables.beta_bar
    exact = tables.beta[2:] * marginal[1:-1] / marginal[2:]
    kl = torch.zeros(51, dtype=torch.float64)
    kl[2:] = 0.5 * torch.log(exact / tables.sigma2_q[2:])
    table = entropies(process)
    curve = plots.bound_per_timestep(kl, 1, (table.lower, table.upper)).axes[0]
    corners = curve.collections[0].get_paths()[0].vertices
    for t, bits in curve.lines[0].get_xydata():
        assert 0 < bits <= corners[corners[:, 0] == t, 1].max()


def test_scales_of_the_bound_follow_the_terms():
    flat = plots.bound_per_timestep(terms(), 1).axes[0]
    assert (flat.get_xscale(), flat.get_yscale()) == ("linear", "linear")
    assert flat.get_ylim()[0] == 0
    steep = torch.arange(1001.0).clamp_min(1) ** -1.5
    axes = plots.bound_per_timestep(steep, 1).axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")


def test_a_logarithmic_axis_passes_over_zeros():
    nats = 10.0 ** -torch.linspace(0, 3, 41, dtype=torch.float64)
    nats[[4, 7, 40]] = 0.0
    curve = plots.bound_per_timestep(nats, 1).axes[0]
    assert curve.get_yscale() == "log"
    t = curve.lines[0].get_xdata()
    np.testing.assert_array_equal(t, [i for i in range(2, 41) if i not in (4, 7, 40)])
    np.testing.assert_allclose(curve.lines[0].get_ydata(), nats[t] / math.log(2))


def test_a_bound_without_any_kl_can_be_drawn(tmp_path):
    plots.save(plots.bound_per_timestep(torch.zeros(3), 1, prior_nats=0.0), tmp_path / "x.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2), 1), r"per_timestep_nats must have shape \(T \+ 1,\), T >= 2, got \(2,\)"),
        ((torch.zeros(3, 3), 1), r"per_timestep_nats must have shape .*, got \(3, 3\)"),
        ((torch.full((4,), math.nan), 1), "per_timestep_nats must hold finite values, got NaN"),
        ((torch.zeros(4), 0), "num_dims must be at least 1, got 0"),
        ((terms(), 1, (torch.zeros(3), terms())), r"must have shape \(21,\), got \(3,\)"),
        ((terms(), 1, (terms(), terms() / 0)), "entropy_bounds must hold finite values, got NaN"),
    ],
)
def test_bounds_that_do_not_fit_are_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        plots.bound_per_timestep(*arguments)


def test_a_prior_that_is_not_finite_is_an_error():
    with pytest.raises(ValueError, match="prior_nats must hold finite values"):
        plots.bound_per_timestep(terms(), 1, prior_nats=math.inf)


# The loss


def rows(losses: list[float | None]) -> list[dict[str, object]]:
    return [
        {"step": i, "num_examples_seen": 100 * i, "loss_bits_per_dim": loss}
        for i, loss in enumerate(losses, start=1)
    ]


def test_loss_curve_shows_the_loss_and_its_mean():
    losses = (3 + np.random.default_rng(0).normal(size=300)).tolist()
    losses[7] = None  # no step of that row was finite
    (ax,) = plots.loss_curve(rows(losses), limit_bits_per_dim=-0.5).axes
    raw, smooth, limit = ax.lines
    known = [i for i in range(300) if i != 7]
    np.testing.assert_array_equal(raw.get_xdata(), [100 * (i + 1) for i in known])
    np.testing.assert_array_equal(raw.get_ydata(), [losses[i] for i in known])
    assert 0 < np.std(smooth.get_ydata()) < 0.5 * np.std(raw.get_ydata())
    assert set(limit.get_ydata()) == {-0.5}
    assert ax.get_ylim()[0] < -0.5
    assert [text.get_text() for text in ax.texts] == ["limit −0.500"]


def test_smoothing_is_a_centered_mean():
    line = np.arange(20.0)
    np.testing.assert_allclose(drawing._moving_mean(line, 5)[2:-2], line[2:-2])
    np.testing.assert_allclose(drawing._moving_mean(line, 5)[:2], [1.0, 1.5])
    np.testing.assert_array_equal(drawing._moving_mean(line, 1), line)


def test_the_first_losses_do_not_set_the_scale():
    (ax,) = plots.loss_curve(rows([1e6, 1e5, *np.linspace(3, 2, 200).tolist()])).axes
    low, high = ax.get_ylim()
    assert low < 2 < 3 < high < 5


def test_a_cliff_is_cut_and_what_follows_fills_the_axes():
    (ax,) = plots.loss_curve(rows([4.0, 2.0, *np.linspace(0.13, 0.12, 13).tolist()])).axes
    low, high = ax.get_ylim()
    assert low < 0.12 < 0.13 < high < 0.2


def test_losses_in_the_units_of_the_data():
    (ax,) = plots.loss_curve(rows([3.0, 2.0]), 4.5, 2.0).axes
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [5.0, 4.0])
    assert set(ax.lines[2].get_ydata()) == {4.5}
    assert ax.get_ylabel() == "loss, bits/dim,\nunits of the data"


def test_bounds_evaluated_during_training_have_their_own_axes():
    metrics = rows([3.0, 2.0, 1.0])
    metrics[0]["eval_bound_bits"], metrics[2]["eval_bound_bits"] = -4.0, -2.0
    loss, bound = plots.loss_curve(metrics).axes
    np.testing.assert_array_equal(bound.lines[0].get_xydata(), [[100, -4], [300, -2]])
    assert loss.get_xlim() == bound.get_xlim()


@pytest.mark.parametrize("kind", [str, Path])
def test_loss_curve_reads_a_file_whose_last_line_is_cut(kind, tmp_path):
    pytest.importorskip("safetensors")
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "".join(json.dumps(row) + "\n" for row in rows([3.0, 2.0])) + '{"step": 3, "num'
    )
    (ax,) = plots.loss_curve(kind(path)).axes
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [3.0, 2.0])


@pytest.mark.parametrize("metrics", [[], rows([None, None])])
def test_metrics_without_a_loss_are_an_error(metrics):
    with pytest.raises(ValueError, match=f"must hold a loss_bits_per_dim, got {len(metrics)} rows"):
        plots.loss_curve(metrics)


def test_a_loss_that_is_not_finite_is_an_error():
    with pytest.raises(ValueError, match="loss_bits_per_dim must hold finite values, got NaN"):
        plots.loss_curve(rows([1.0, math.nan]))


def test_a_loss_without_unit_is_not_in_bits():
    metrics = [{"num_examples_seen": i, "loss": 0.5} for i in range(1, 4)]
    (axes,) = plots.loss_curve(metrics, 1.0, 3.0).axes
    assert axes.get_ylabel() == "loss"
    assert all(set(line.get_ydata()) == {0.5} for line in axes.get_lines() if len(line.get_ydata()))
