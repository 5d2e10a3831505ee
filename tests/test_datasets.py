import math
import sys

import numpy as np
import pytest
import torch

from dpm_fast import datasets, noise
from dpm_fast.data import Data, load
from tolerances import mean_stderr_multiple

LN_2 = math.log(2)


@pytest.fixture(scope="module")
def swiss_roll() -> Data:
    return load("swiss-roll")


@pytest.fixture(scope="module")
def dead_leaves() -> torch.Tensor:
    return load("dead-leaves", num_train=1000, num_test=1).train[:, 0].double()


def stderr(x: torch.Tensor) -> float:
    return float(x.std() / math.sqrt(len(x)))


@pytest.mark.parametrize(
    ("name", "options"),
    [("swiss-roll", {}), ("heartbeat", {}), ("dead-leaves", {"size": 8, "color": True})],
)
def test_generated_examples_are_functions_of_seed_and_index(name, options):
    long = load(name, seed=3, num_train=300, num_test=40, **options)
    short = load(name, seed=3, num_train=7, num_test=30, **options)
    other = load(name, seed=4, num_train=300, num_test=40, **options)
    assert torch.equal(long.train[:7], short.train)
    assert torch.equal(long.test[:30], short.test)
    assert not torch.equal(long.train, other.train)
    assert not torch.equal(long.train[:40], long.test)


def test_generated_examples_stay_the_same():
    """Published figures name a seed: its examples must not change with the version."""
    points = load("swiss-roll", num_train=2, num_test=1)
    expected = [[-1.4101, 0.666404], [-1.506627, 0.541575]]
    torch.testing.assert_close(points.train, torch.tensor(expected), rtol=0, atol=1e-6)
    assert load("heartbeat", num_train=8).train.argmax(dim=1).tolist() == [2, 2, 0, 4, 4, 1, 1, 1]
    leaves = load("dead-leaves", num_train=2, num_test=1, size=8).train
    assert leaves[0, 0, 0].tolist() == [81, 127, 127, 11, 187, 187, 187, 218]


@pytest.mark.parametrize("options", [{"num_train": 0}, {"num_test": 0}, {"num_test": 2**40}])
def test_number_of_examples_is_checked(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} must be in 1..2\\*\\*32, got"):
        load("heartbeat", **options)


class TestSwissRoll:
    def test_shape_and_scale(self, swiss_roll):
        assert swiss_roll.train.shape == (100_000, 2)
        assert swiss_roll.test.shape == (10_000, 2)
        assert (swiss_roll.spec.shift, swiss_roll.spec.scale) == (0, 1)
        assert swiss_roll.spec.kind == "continuous"

    def test_true_moments_are_zero_and_one(self):
        node, weight = np.polynomial.legendre.leggauss(100)
        curve = datasets._spiral(torch.from_numpy((node + 1) / 2))
        weight = torch.from_numpy(weight / 2)
        variance = weight @ curve**2 + datasets.SWISS_ROLL_NOISE**2
        assert (weight @ curve).abs().max() < 1e-14
        assert variance.mean().item() == pytest.approx(1, abs=1e-14)

    def test_sample_moments(self, swiss_roll):
        x = swiss_roll.train.double()
        allowed = mean_stderr_multiple(3)
        for values, mean in ((x[:, 0], 0), (x[:, 1], 0), ((x**2).sum(dim=1), 2)):
            assert abs(values.mean() - mean) < allowed * stderr(values)

    def test_density_integrates_to_one_and_to_the_limit(self):
        """Trapezoid rule on a grid of 1.5 points per noise: its error is below 1e-12 there."""
        x, area = grid(points_per_noise=1.5)
        log_p = datasets.swiss_roll_log_density(x)
        p = log_p.exp() * area
        assert p.sum().item() == pytest.approx(1, abs=1e-12)
        assert (p @ (x**2).sum(dim=1)).item() == pytest.approx(2, abs=1e-11)
        assert (p @ log_p).item() / LN_2 == pytest.approx(datasets.SWISS_ROLL_LIMIT_BITS, abs=1e-11)

    def test_held_out_examples_reach_the_limit(self, swiss_roll):
        bits = swiss_roll.log_density(swiss_roll.test) / LN_2
        assert swiss_roll.limit_bits == datasets.SWISS_ROLL_LIMIT_BITS
        assert abs(bits.mean() - swiss_roll.limit_bits) < mean_stderr_multiple() * stderr(bits)
        assert stderr(bits) < 0.02

    @pytest.mark.parametrize("radius", [0.1, 1, 2, 3, 5, 8])
    def test_density_has_converged(self, radius):
        angle = torch.linspace(0, 2 * math.pi, 500, dtype=torch.float64)
        x = radius * torch.stack((angle.cos(), angle.sin()), dim=1)
        log_p = datasets.swiss_roll_log_density(x)
        twice = datasets.swiss_roll_log_density(x, num_panels=256)
        assert ((log_p - twice).abs() <= 1e-12 * twice.abs().clamp(min=1)).all()

    def test_density_is_the_average_over_the_curve(self, swiss_roll):
        x = swiss_roll.test[:5].double()
        u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
        theta = math.pi * (1.5 + 3 * u)
        curve = torch.stack((theta * theta.cos() - 2, theta * theta.sin() - 2 / 3 / math.pi), dim=1)
        curve *= 0.147110811529695
        distance2 = ((x[:, None] - curve) ** 2).sum(dim=2)
        p = (distance2 / (-2 * 0.05**2)).exp().mean(dim=1) / (2 * math.pi * 0.05**2)
        torch.testing.assert_close(swiss_roll.log_density(x), p.log(), rtol=1e-9, atol=1e-9)

    def test_density_refuses_other_shapes(self):
        with pytest.raises(ValueError, match=r"x must have shape \(N, 2\), got \(4, 3\)"):
            datasets.swiss_roll_log_density(torch.zeros(4, 3))


def grid(points_per_noise: float) -> tuple[torch.Tensor, float]:
    """Points at which the Swiss roll's density is not below e^-50 of its peak, and their area."""
    step = datasets.SWISS_ROLL_NOISE / points_per_noise
    curve = datasets._spiral(torch.linspace(0, 1, 10_000, dtype=torch.float64))
    margin = 10 * datasets.SWISS_ROLL_NOISE
    low, high = curve.amin(dim=0) - margin, curve.amax(dim=0) + margin
    axes = [torch.arange(a, b, step, dtype=torch.float64) for a, b in zip(low, high, strict=True)]
    return torch.cartesian_prod(*axes), step**2


class TestHeartbeat:
    def test_sequences(self):
        data = load("heartbeat")
        assert data.train.shape == (10_000, 20)
        assert data.spec.kind == "binary"
        assert data.limit_bits == math.log2(1 / 5)
        x = data.train.tolist()
        assert all(row[5:] == row[:-5] and sum(row[:5]) == 1 for row in x)

    def test_phases_are_equally_likely(self):
        count = load("heartbeat").train[:, :5].double().sum(dim=0)
        deviation = math.sqrt(10_000 * 0.2 * 0.8)
        assert ((count - 2000).abs() < mean_stderr_multiple(5) * deviation).all()

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float32])
    def test_validity(self, dtype):
        valid = torch.eye(5).repeat(1, 4)
        missing, extra, shifted = valid.clone(), valid.clone(), valid.clone()
        missing[:, -5:] = 0
        extra[:, 10:15] = 1
        shifted[:, :5] = shifted[:, :5].roll(1, dims=1)
        blank, full, double = torch.zeros(1, 20), torch.ones(1, 20), valid[:1] + valid[1:2]
        for wrong in (missing, extra, shifted, blank, full, double):
            assert not datasets.is_valid_heartbeat(wrong.to(dtype)).any()
        assert datasets.is_valid_heartbeat(valid.to(dtype)).all()

    @pytest.mark.parametrize("row", [[0.5, 0.5, 0, 0, 0], [1, -1, 0, 0, 0], [1, 1, -1, 0, 0]])
    def test_values_other_than_bits_are_not_valid(self, row):
        assert not datasets.is_valid_heartbeat(torch.tensor([row * 4])).any()

    def test_probability(self):
        x = torch.cat((torch.eye(5).repeat(1, 4), torch.zeros(1, 20)))
        p = load("heartbeat").log_density(x).exp()
        torch.testing.assert_close(p, torch.tensor([0.2] * 5 + [0.0], dtype=torch.float64))

    def test_shape_is_checked(self):
        with pytest.raises(ValueError, match=r"x must have shape \(N, 20\), got \(4, 19\)"):
            datasets.is_valid_heartbeat(torch.zeros(4, 19))


def same_leaf(distance: float, size: int) -> float:
    """Probability that one disk tops two pixels: E area of both / E area of either, over r^-3."""
    r = np.exp(np.linspace(math.log(datasets.SMALLEST_LEAF_RADIUS), math.log(size), 100_001))
    h = np.minimum(distance / (2 * r), 1)
    both = 2 * r**2 * (np.arccos(h) - h * np.sqrt(1 - h**2))
    weight = r**-2.0  # r^-3 dr in steps of log r
    return float((weight * both).sum() / (weight * (2 * math.pi * r**2 - both)).sum())


class TestDeadLeaves:
    def test_shape_and_range(self):
        data = load("dead-leaves", num_train=20, num_test=3, size=12, color=True)
        assert data.train.shape == (20, 3, 12, 12)
        assert data.test.shape == (3, 3, 12, 12)
        assert data.train.dtype == torch.uint8
        assert data.spec.levels == 256
        assert data.limit_bits is None

    def test_grey_levels_are_uniform(self, dead_leaves):
        """Of one pixel per image, since the pixels of an image depend on one another."""
        for x in (dead_leaves[:, 0, 0], dead_leaves[:, 15, 20]):
            count = torch.bincount((x / 16).long(), minlength=16)
            deviation = math.sqrt(len(x) / 16 * 15 / 16)
            assert ((count - len(x) / 16).abs() < mean_stderr_multiple(32) * deviation).all()

    @pytest.mark.parametrize("where", ["corner", "middle"])
    @pytest.mark.parametrize("offset", [(0, 0), (0, 1), (1, 1), (3, 0), (6, 8)])
    def test_correlation_is_that_of_the_model(self, dead_leaves, offset, where):
        """Two pixels agree if one leaf tops both, else are independent; wherever they are."""
        first = slice(0, 6) if where == "corner" else slice(12, 18)
        y, x = (slice(first.start + o, first.stop + o) for o in offset)
        z = dead_leaves - 127.5
        product = (z[:, first, first] * z[:, y, x]).mean(dim=(1, 2)) / ((256**2 - 1) / 12)
        expected = same_leaf(math.hypot(*offset), size=32)
        assert abs(product.mean() - expected) < mean_stderr_multiple(10) * stderr(product)
        assert stderr(product) < 0.04

    def test_images_are_what_a_painter_makes(self):
        """Bottom to top, disk by disk, from the same random numbers; enough of them to cover."""
        size, num_rounds, ids = 8, 4, torch.arange(3)
        per_round = datasets._LEAVES_PER_ROUND
        expected = torch.full((3, 1, size, size), -1)
        pixel = torch.arange(size) + 0.5
        for t in reversed(range(0, 2 * num_rounds, 2)):
            u = noise.uniform(5, noise.Stream.DATA, ids, t, (per_round, 3))
            grey = noise.words(5, noise.Stream.DATA, ids, t + 1, per_round) >> 24
            radius = datasets._leaf_radius(u[..., 0], size)
            for i in range(3):
                for leaf in reversed(range(per_round)):
                    r = radius[i, leaf]
                    y, x = u[i, leaf, 1:] * (size + 2 * r) - r
                    disk = (pixel[:, None] - y) ** 2 + (pixel - x) ** 2 < r**2
                    expected[i, 0, disk] = grey[i, leaf]
        assert torch.equal(
            load("dead-leaves", seed=5, num_train=3, num_test=1, size=size).train, expected
        )

    def test_radii_follow_their_distribution(self):
        """Those of evenly spaced u, in order, are the quantiles of r^-3 (size + 2 r)^2."""
        size, u = 32, (torch.arange(100_000) + 0.5) / 100_000
        r = np.linspace(2, size, 1_000_001)
        density = r**-3 * (size + 2 * r) ** 2
        share = np.cumsum(density) - density / 2
        expected = np.interp(u, share / share[-1], r)
        radius = datasets._leaf_radius(u, size).sort().values
        np.testing.assert_allclose(radius, expected, rtol=1e-3)

    def test_size_is_checked(self):
        with pytest.raises(ValueError, match="size must be at least 4, got 3"):
            load("dead-leaves", size=3)


class TestDigits:
    def test_are_those_of_scikit_learn(self):
        from sklearn.datasets import load_digits

        data = load("digits")
        assert data.spec.shape == (1, 8, 8)
        assert data.spec.levels == 17
        assert (len(data.train), len(data.test)) == (1438, 359)
        ours = torch.cat((data.train, data.test)).flatten(1).numpy()
        theirs = load_digits().data
        assert sorted(map(tuple, ours)) == sorted(map(tuple, theirs))

    def test_split_follows_the_seed(self):
        assert torch.equal(load("digits", seed=1).test, load("digits", seed=1).test)
        assert not torch.equal(load("digits", seed=1).test, load("digits", seed=2).test)

    def test_without_scikit_learn(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
        with pytest.raises(RuntimeError, match=r"digits require scikit-learn: pip install"):
            load("digits")
