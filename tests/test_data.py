import json
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpm_fast.data import Data, DataSpec, load
from dpm_fast.data_arrays import describe

GREY = DataSpec("grey", (1, 2, 2), "discrete", 127.5, 2 / 255, 256)
REAL = DataSpec("real", (3,), "continuous", 2.0, 0.5)
BITS = DataSpec("bits", (4,), "binary")


class TestDataSpec:
    def test_scale(self):
        x = torch.tensor([[[[0, 255], [128, 1]]]], dtype=torch.uint8)
        expected = torch.tensor([[[[-1, 1], [1 / 255, -253 / 255]]]])
        torch.testing.assert_close(GREY.to_model(x), expected)
        assert GREY.to_model(x).dtype == torch.float32
        assert GREY.to_model(x, torch.float64).dtype == torch.float64
        torch.testing.assert_close(
            REAL.to_model(torch.tensor([[2.0, 3.0, 0.0]])), torch.tensor([[0.0, 0.5, -1.0]])
        )

    def test_bits_stay_bits(self):
        x = torch.tensor([[0, 1, 1, 0]], dtype=torch.uint8)
        assert torch.equal(BITS.to_model(x), x.float())
        assert torch.equal(BITS.to_data(torch.tensor([[0.1, 0.9, 7.0, -3.0]])), x)

    @settings(deadline=None, derandomize=True)
    @given(
        levels=st.integers(3, 2**16),
        shift=st.floats(0, 1),
        log_scale=st.floats(-12, 3),
        dtype=st.sampled_from([torch.float32, torch.float64]),
    )
    def test_levels_return_unchanged(self, levels, shift, log_scale, dtype):
        scale = math.exp(log_scale)
        spec = DataSpec("x", (1,), "discrete", shift * (levels - 1), scale, levels)
        x = torch.arange(0, levels, max(1, levels // 997))[:, None].to(spec.dtype)
        x_model = spec.to_model(x, dtype)
        spec.check_on_grid(x_model)
        assert torch.equal(spec.to_data(x_model), x)
        assert spec.to_data(x_model).dtype == spec.dtype

    def test_real_numbers_return(self):
        x = torch.tensor([[1.5, -2.0, 1e3]])
        torch.testing.assert_close(REAL.to_data(REAL.to_model(x)), x)

    def test_samples_outside_the_range_become_the_extreme_levels(self):
        x = torch.tensor([[[[-9.0, 9.0], [1.003, -1.003]]]])
        assert GREY.to_data(x).flatten().tolist() == [0, 255, 255, 0]

    def test_units(self):
        assert GREY.log2_jacobian_per_dim == math.log2(2 / 255)
        assert GREY.bin_width == 2 / 255
        assert GREY.bins == pytest.approx((1 / 255, -1, 1), abs=1e-15)
        assert GREY.num_dims == 4
        assert (GREY.bits, BITS.bits, REAL.bits) == (8, 1, None)
        assert DataSpec("digits", (64,), "discrete", levels=17).bits == math.log2(17)

    def test_density_changes_by_the_jacobian(self):
        """A unit Gaussian of the model is N(shift, scale^-2) of the data."""
        x = torch.tensor([[2.5, 1.0, 2.0]], dtype=torch.float64)
        in_model = torch.distributions.Normal(0.0, 1.0).log_prob(REAL.to_model(x, torch.float64))
        in_data = torch.distributions.Normal(REAL.shift, 1 / REAL.scale).log_prob(x)
        bits_model, bits_data = (-p.mean() / math.log(2) for p in (in_model, in_data))
        torch.testing.assert_close(bits_data, bits_model - REAL.log2_jacobian_per_dim)

    @pytest.mark.parametrize("spec", [GREY, REAL, BITS])
    def test_travels_through_json(self, spec):
        assert DataSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"name": 5}, TypeError, "name must be a string, got 5"),
            ({"shape": 784}, TypeError, "shape must be a tuple, got 784"),
            ({"shape": [1, 2, 2]}, TypeError, "shape must be a tuple, got [1, 2, 2]"),
            ({"shape": ()}, ValueError, "shape must be positive integers, got ()"),
            ({"shape": (3, 0)}, ValueError, "shape must be positive integers, got (3, 0)"),
            ({"shape": (3, 2.0)}, ValueError, "shape must be positive integers, got (3, 2.0)"),
            ({"kind": "grey"}, ValueError, "kind must be one of continuous, discrete, binary, got"),
            ({"shift": math.nan}, ValueError, "shift must be finite, got nan"),
            ({"scale": math.inf}, ValueError, "scale must be finite, got inf"),
            ({"scale": 0.0}, ValueError, "scale must be positive, got 0.0"),
            ({"scale": "2"}, TypeError, "scale must be a number, got '2'"),
            ({"levels": 1}, ValueError, "levels must be an integer in 2..2**16, got 1"),
            ({"levels": 2**16 + 1}, ValueError, "levels must be an integer in 2..2**16, got"),
            ({"levels": None}, ValueError, "levels must be an integer in 2..2**16, got None"),
            ({"kind": "continuous"}, ValueError, "levels must be None for continuous data, got"),
            (
                {"kind": "binary", "levels": None},
                ValueError,
                "binary data must have shift 0 and scale 1, got 127.5",
            ),
        ],
    )
    def test_refuses(self, change, error, message):
        with pytest.raises(error, match=re.escape(message)):
            DataSpec(**{**vars(GREY), **change})

    def test_from_dict_refuses_other_attributes(self):
        values = GREY.to_dict()
        with pytest.raises(ValueError, match=r"must have name, shape, .*, got name, .*, extra"):
            DataSpec.from_dict({**values, "extra": 1})
        with pytest.raises(ValueError, match="must have name, shape, kind, shift, scale, levels"):
            DataSpec.from_dict({})
        with pytest.raises(TypeError, match="shape must be a list of integers, got 784"):
            DataSpec.from_dict({**values, "shape": 784})

    @pytest.mark.parametrize("method", ["to_model", "to_data"])
    def test_shape_is_checked(self, method):
        with pytest.raises(ValueError, match=r"x must have shape \(N, 1, 2, 2\), got \(5, 4\)"):
            getattr(GREY, method)(torch.zeros(5, 4))
        with pytest.raises(TypeError, match="x must be a tensor, got ndarray"):
            getattr(GREY, method)(np.zeros((5, 1, 2, 2)))

    def test_grid_is_checked(self):
        x = GREY.to_model(torch.arange(4).view(1, 1, 2, 2))
        GREY.check_on_grid(x)
        x[0, 0, 1, 1] += 0.2 * GREY.bin_width
        with pytest.raises(ValueError, match=r"must be on the grid of 256 levels .*, got 3\.[12]"):
            GREY.check_on_grid(x)
        with pytest.raises(ValueError, match=r"256 levels 0, 1, \.\.\., 255, got 256"):
            GREY.check_on_grid(GREY.to_model(torch.full((1, 1, 2, 2), 256)))

    @pytest.mark.parametrize("quantity", ["bin_width", "bins"])
    def test_continuous_data_have_no_levels(self, quantity):
        with pytest.raises(ValueError, match="real must be discrete to have grey levels, got cont"):
            getattr(REAL, quantity)


class TestData:
    def test_shows_itself_in_a_line(self):
        x = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
        text = repr(Data(GREY, x, x[:1]))
        assert text == "Data(grey: 3 train + 1 test, shape (1, 2, 2), 256 levels)"

    def test_refuses_examples_unlike_the_specification(self):
        x = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
        with pytest.raises(ValueError, match=r"test must have shape \(N, 1, 2, 2\), got \(3, 2, 2"):
            Data(GREY, x, x[:, 0])
        with pytest.raises(ValueError, match="test must hold at least one example, got none"):
            Data(GREY, x, x[:0])
        with pytest.raises(TypeError, match=r"train must be of torch\.uint8, got torch\.float32"):
            Data(GREY, x.float(), x)
        with pytest.raises(TypeError, match="spec must be a DataSpec, got NoneType"):
            Data(None, x, x)

    def test_values_are_those_of_the_specification(self):
        few = DataSpec("digits", (2,), "discrete", levels=17)
        bits = DataSpec("bits", (2,), "binary")
        x = torch.tensor([[0, 16], [1, 1]], dtype=torch.uint8)
        assert len(Data(few, x, x[1:]).train) == 2
        with pytest.raises(ValueError, match=r"test must hold values in 0..16, got 0..200"):
            Data(few, x, torch.tensor([[200, 0]], dtype=torch.uint8))
        with pytest.raises(ValueError, match=r"train must hold values in 0..1, got 0..16"):
            Data(bits, x, x[1:])
        many = DataSpec("deep", (2,), "discrete", levels=1000)
        with pytest.raises(ValueError, match=r"train must hold values in 0..999, got -1..5"):
            Data(many, torch.tensor([[-1, 5]], dtype=torch.int32), x.int())


class TestLoad:
    def test_unknown_name(self):
        known = "swiss-roll, heartbeat, dead-leaves, digits, mnist, cifar10"
        with pytest.raises(ValueError, match=f"must be one of {known}, .* got 'swissroll'"):
            load("swissroll")

    @pytest.mark.parametrize("path", ["no/such/folder", "missing.npz", "missing.npy"])
    def test_missing_path(self, path):
        with pytest.raises(FileNotFoundError, match=f"{path} does not exist"):
            load(path)

    def test_other_files(self, tmp_path):
        (tmp_path / "data.csv").write_text("1,2\n")
        with pytest.raises(ValueError, match=r"data.csv must be a folder of images, an .npy or an"):
            load(tmp_path / "data.csv")

    def test_path_goes_with_stored_sets(self):
        with pytest.raises(ValueError, match=r"mnist requires path \(--path\), where .*, got none"):
            load("mnist")
        with pytest.raises(ValueError, match="path is for mnist and cifar10, got it with 'digits'"):
            load("digits", path="/somewhere")
        with pytest.raises(ValueError, match="path is for mnist and cifar10, got it with ndarray"):
            load(np.zeros((4, 2)), path="/somewhere")

    def test_unknown_option(self):
        with pytest.raises(ValueError, match=r"digits takes the options .*scaling.*, got 'size'"):
            load("digits", size=3)
        with pytest.raises(ValueError, match=r"ndarray takes the options test, .*, got 'sise'"):
            load(np.zeros((4, 2)), sise=3)

    def test_none_is_the_default_of_an_option(self):
        data = load("heartbeat", num_train=3, num_test=None, seed=7)
        assert (len(data.train), len(data.test)) == (3, 2000)

    def test_seed_reaches_the_loader(self):
        assert not torch.equal(load("heartbeat", seed=1).train, load("heartbeat", seed=2).train)

    def test_arrays_and_options_reach_their_loader(self):
        x = np.arange(12.0).reshape(6, 2)
        data = load(x, test=x[:2], name="mine", scaling="none")
        assert data.spec == DataSpec("mine", (2,), "continuous")
        assert data.train.tolist() == x.tolist()
        assert data.test.tolist() == x[:2].tolist()


@pytest.mark.parametrize("levels", [None, 5, 300])
def test_standardized_data_have_unit_variance(levels):
    """To nine digits; discrete data with the uniform noise of one level that models see."""
    generator = torch.Generator().manual_seed(0)
    if levels is None:
        x = 3 + 7 * torch.randn(1000, 4, generator=generator)
    else:
        x = torch.randint(levels, (1000, 4), generator=generator, dtype=torch.int32)
        x = x.to(torch.uint8) if levels <= 256 else x
    spec = describe("x", x, levels)
    x_model = spec.to_model(x, torch.float64)
    noise_variance = 0.0 if levels is None else spec.bin_width**2 / 12
    assert x_model.mean().item() == pytest.approx(0, abs=1e-8)
    assert (x_model**2).mean().item() + noise_variance == pytest.approx(1, abs=1e-8)
