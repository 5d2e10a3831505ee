import re

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from dpm_fast.data import load
from dpm_fast.data_arrays import from_arrays, split

IMAGES = np.random.default_rng(0).integers(0, 256, (20, 3, 4, 5), dtype=np.uint8)
POINTS = np.random.default_rng(1).normal(size=(50, 2))


class Items(Dataset):
    def __init__(self, *items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


class Unsized(Dataset):
    def __getitem__(self, i):
        return torch.zeros(2)


class Stream(IterableDataset):
    def __iter__(self):
        yield torch.zeros(2)


class TestKinds:
    def test_bytes_have_256_levels(self):
        data = from_arrays(IMAGES, test=IMAGES[:3])
        assert (data.spec.kind, data.spec.levels) == ("discrete", 256)
        assert data.train.dtype == torch.uint8
        assert np.array_equal(data.train, IMAGES)
        assert np.array_equal(data.test, IMAGES[:3])

    def test_bytes_are_not_copied(self):
        x = torch.from_numpy(IMAGES)
        assert from_arrays(x, test=x).train.data_ptr() == x.data_ptr()

    @pytest.mark.parametrize("options", [{}, {"levels": 2}])
    def test_booleans_are_binary(self, options):
        data = from_arrays(IMAGES > 100, **options)
        assert data.spec.kind == "binary"
        assert data.train.dtype == torch.uint8
        assert set(data.train.unique().tolist()) == {0, 1}

    def test_two_levels_are_binary(self):
        data = from_arrays((IMAGES > 100).astype(np.float64), levels=2)
        assert data.spec.kind == "binary"

    @pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64, np.float32, ">f8", ">u2"])
    def test_other_numbers_with_levels(self, dtype):
        data = from_arrays(IMAGES.astype(dtype), test=IMAGES.astype(dtype), levels=300)
        assert data.spec.levels == 300
        assert data.train.dtype == torch.int32
        assert np.array_equal(data.train, IMAGES)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_real_numbers_are_continuous(self, dtype):
        x = torch.from_numpy(POINTS).to(dtype).requires_grad_()
        data = from_arrays(x, test=x)
        assert data.spec.kind == "continuous"
        assert torch.equal(data.train, x.detach().float())
        assert not data.train.requires_grad

    def test_levels_within_a_range(self):
        """As float32 images in [0, 1] or [-1, 1] have them; the levels come back exactly."""
        for low, high in ((0, 1), (-1, 1), (10, 245)):
            x = (IMAGES / 255 * (high - low) + low).astype(np.float32)
            data = from_arrays(x, test=x, levels=256, data_range=(low, high))
            assert np.array_equal(data.train, IMAGES)

    def test_continuous_data_on_a_grid_are_mentioned(self):
        x = np.random.default_rng(0).integers(0, 256, (100, 64)) / 255
        with pytest.warns(UserWarning, match="train has only 256 different values in 6400"):
            from_arrays(x)


class TestShapes:
    def test_vectors_and_grey_images_and_channels(self):
        assert from_arrays(POINTS).spec.shape == (2,)
        assert from_arrays(IMAGES[:, 0]).spec.shape == (1, 4, 5)
        assert from_arrays(IMAGES).spec.shape == (3, 4, 5)
        assert from_arrays(IMAGES[:, :, None]).spec.shape == (3, 1, 4, 5)

    def test_channels_last(self):
        stored = IMAGES.transpose(0, 2, 3, 1)
        data = from_arrays(stored, test=stored[:1], channels_last=True)
        assert np.array_equal(data.train, IMAGES)
        assert np.array_equal(data.test, IMAGES[:1])

    def test_stated_shape(self):
        data = from_arrays(IMAGES.reshape(20, 60), test=IMAGES, shape=(3, 4, 5))
        assert np.array_equal(data.train, IMAGES)
        assert from_arrays(IMAGES[:, 0], shape=(4, 5)).spec.shape == (4, 5)

    def test_strides_do_not_matter(self):
        view = IMAGES[::-1, :, ::2]
        assert np.array_equal(from_arrays(view, test=view).train, view)


class TestScaling:
    def test_standardize_uses_the_training_examples(self):
        spec = from_arrays(POINTS, test=100 * POINTS).spec
        assert spec.shift == pytest.approx(POINTS.mean(), abs=1e-6)
        assert 1 / spec.scale == pytest.approx(POINTS.std(), rel=1e-6)

    @pytest.mark.parametrize("levels", [None, 256])
    def test_standardize_does_not_depend_on_the_order_of_a_sum(self, levels):
        """As the number of threads decides it: a model refuses data of another specification."""
        x = np.random.default_rng(0).normal(100, 9, (400_000, 2))
        x = x.round() if levels else x
        described = {from_arrays(part, test=x[:1], levels=levels).spec for part in (x, x[::-1])}
        assert len(described) == 1

    def test_minus_one_one(self):
        spec = from_arrays(IMAGES, scaling="minus_one_one").spec
        assert spec.bins[1:] == pytest.approx((-1, 1), abs=1e-15)

    def test_none(self):
        spec = from_arrays(IMAGES, scaling="none").spec
        assert (spec.shift, spec.scale, spec.bin_width) == (0, 1, 1)


class TestSplit:
    @pytest.mark.parametrize(
        ("num_examples", "fraction", "num_test"),
        [(20, 0.1, 2), (2, 0.1, 1), (3, 0.99, 2), (1000, 0.25, 250)],
    )
    def test_fraction(self, num_examples, fraction, num_test):
        assert int(split(num_examples, fraction, seed=0).sum()) == num_test

    def test_is_a_partition_that_follows_the_seed(self):
        x = np.arange(100.0)[:, None]
        a, again, b = (from_arrays(x, seed=seed) for seed in (1, 1, 2))
        assert sorted(torch.cat((a.train, a.test)).flatten().tolist()) == list(range(100))
        assert torch.equal(a.test, again.test)
        assert not torch.equal(a.test, b.test)

    def test_spares_no_place(self):
        count = sum(split(40, 0.25, seed).int() for seed in range(400))
        assert ((count - 100).abs() < 50).all()  # binomial, deviation 8.7


class TestDatasets:
    def test_items_and_first_elements(self):
        x = torch.from_numpy(POINTS)
        labels = torch.zeros(50)
        for dataset in (TensorDataset(x, labels), Items(*x), Items(*POINTS)):
            assert torch.equal(load(dataset, test=dataset).train, x.float())

    @pytest.mark.parametrize(
        ("dataset", "error", "message"),
        [
            (Stream(), TypeError, "train must be a Dataset with a length and items, got Stream"),
            (Unsized(), TypeError, "train must be a Dataset with a length and items, got Unsized"),
            (
                Items({"image": 1}),
                TypeError,
                "train must have items that are arrays, tensors or images, or tuples that begin "
                "with one, got dict",
            ),
            (
                Items(torch.zeros(2), torch.zeros(3)),
                ValueError,
                "train must have items like its first, float32 of shape (2,), got float32 of "
                "shape (3,) at 1",
            ),
            (Items(), ValueError, "train must hold at least 2 examples, got 0"),
        ],
    )
    def test_refuses(self, dataset, error, message):
        with pytest.raises(error, match=re.escape(message)):
            load(dataset)


def spoiled(value: float) -> np.ndarray:
    x = POINTS.copy()
    x[3, 1] = value
    return x


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (np.zeros((0, 4)), {}, "train must hold at least 2 examples, got 0"),
        (np.zeros((1, 4)), {}, "train must hold at least 2 examples, got 1"),
        (np.zeros((4, 0)), {}, "train must have shape (N, D) or (N, C, *spatial), got (4, 0)"),
        (np.zeros(4), {}, "train must have shape (N, D) or (N, C, *spatial), got (4,)"),
        (np.ones(()), {}, "train must have shape (N, D) or (N, C, *spatial), got ()"),
        (spoiled(np.nan), {}, "train must be finite in float32, got NaN or infinity in 1 of 100"),
        (spoiled(-np.inf), {}, "train must be finite in float32, got NaN or infinity in 1 of 100"),
        (spoiled(1e300), {}, "train must be finite in float32, got NaN or infinity in 1 of 100"),
        (np.ones((4, 2)), {}, "train must vary to be standardized, got the constant 1.0"),
        (IMAGES.astype(int), {}, "train holds integers and requires levels, got None"),
        (IMAGES, {"levels": 17}, "train must be on the grid of 17 levels 0, 1, ..., 16, got "),
        (-IMAGES.astype(int), {"levels": 256}, "train must be on the grid of 256 levels 0, 1, "),
        (IMAGES + 0.25, {"levels": 256}, "train must be on the grid of 256 levels 0, 1, ..., 255"),
        (IMAGES / 255, {"levels": 256}, "train must be on the grid of 256 levels 0, 1, ..., 255"),
        (
            IMAGES / 200,
            {"levels": 256, "data_range": (0, 1)},
            "train scaled from data_range must be on the grid of 256 levels 0, 1, ..., 255, got",
        ),
        (POINTS, {"data_range": (0, 1)}, "data_range requires levels, got (0, 1) without"),
        (
            IMAGES,
            {"levels": 256, "data_range": (1, 1)},
            "data_range must be two increasing numbers, got (1, 1)",
        ),
        (
            IMAGES,
            {"levels": 256, "data_range": (0, 1, 2)},
            "data_range must be two increasing numbers, got (0, 1, 2)",
        ),
        (IMAGES, {"levels": 256.0}, "levels must be an integer in 2..2**16, got 256.0"),
        (IMAGES, {"shape": (3, 4, 4)}, "train must have examples of shape (3, 4, 4), got (20, 3"),
        (IMAGES, {"shape": (-1, -60)}, "train must have examples of shape (-1, -60), got (20, 3"),
        (IMAGES, {"shape": ()}, "train must have examples of shape (), got (20, 3, 4, 5)"),
        (POINTS, {"channels_last": True}, "train must have shape (N, *spatial, C), got (50, 2)"),
        (
            IMAGES.transpose(0, 2, 3, 1),
            {},
            "train must have shape (N, C, H, W), got (20, 4, 5, 3): give channels_last=True",
        ),
        (IMAGES, {"test": IMAGES[:, :2]}, "test must have shape (N, 3, 4, 5), got (20, 2, 4, 5)"),
        (IMAGES, {"test": IMAGES[:0]}, "test must hold at least one example, got none"),
        (POINTS, {"test": spoiled(np.nan)}, "test must be finite in float32, got NaN or infinity"),
        (IMAGES, {"scaling": "unit"}, "scaling must be one of standardize, minus_one_one, none, "),
        (POINTS, {"scaling": "minus_one_one"}, "scaling 'minus_one_one' requires data with grey"),
        (IMAGES, {"test_fraction": 0}, "test_fraction must be in (0, 1), got 0"),
        (IMAGES, {"test_fraction": 1.5}, "test_fraction must be in (0, 1), got 1.5"),
    ],
)
def test_refuses_values(x, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load(x, **options)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.array([[1, "a"], [2, None]], dtype=object), "hold real numbers, got an array of dtype"),
        (np.array([["a"], ["b"]]), "train must hold real numbers, got an array of dtype <U1"),
        (1j * POINTS, "train must hold real numbers, got an array of dtype complex128"),
        (np.zeros((4, 2), "M8[s]"), "train must hold real numbers, got an array of dtype datetime"),
        ([[1.0, 2.0], [3.0, 4.0]], "train must be an array, a tensor, or a torch Dataset with a "),
        (None, "train must be an array, a tensor, or a torch Dataset with a length, got NoneType"),
    ],
)
def test_refuses_types(x, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        load(x)
