"""What a model is given: numbers of NumPy are numbers, anything else is refused by name."""

import math
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dpm_fast
from dpm_fast import DiffusionModel, GaussianDiffusion, Posterior
from dpm_fast.data import Data, DataSpec

ROOT = Path(__file__).parent.parent
NUM_STEPS, DIM = 6, 3
X_0 = torch.randn(4, DIM, generator=torch.Generator().manual_seed(1))
IDS = torch.arange(4)
SPEC = DataSpec("points", (DIM,), "continuous")
PROCESS = GaussianDiffusion.from_schedule("erase", NUM_STEPS)


class Network(nn.Module):
    event_shape = (DIM,)

    def __init__(self, num_outputs: int = 2) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, num_outputs * DIM)

    def forward(self, x: Tensor, t: Tensor) -> Any:
        return self.linear(x)


class Tuple(Network):
    def forward(self, x: Tensor, t: Tensor) -> Any:
        return (self.linear(x),)


def model(network: Any = None, **options: Any) -> DiffusionModel:
    return DiffusionModel(PROCESS, Network() if network is None else network, **options)


def loss(**options: Any) -> Tensor:
    return model().loss(X_0, **{"seed": 0, "example_ids": IDS} | options)


def test_numbers_of_numpy_are_numbers() -> None:
    m = model()
    assert m.bound(X_0, draws=np.int64(2), timesteps=np.int64(3)).settings["draws"] == 2
    assert len(m.sample(np.int64(4), batch_size=np.int32(3))) == 4
    process = GaussianDiffusion.from_schedule("linear", np.int64(30))
    bits = dpm_fast.BinomialDiffusion(np.int64(10))
    assert (type(process.num_steps), type(bits.num_steps)) == (int, int)
    observed = X_0, np.float32(0.5)
    expected = m.sample(4, posterior=Posterior(observed=(X_0, 0.5)))
    assert torch.equal(m.sample(4, posterior=Posterior(observed=observed)), expected)
    assert loss(vb_weight=np.float32(0.1)).isfinite()
    clamp = model(Network(1), parameterization="x0", clamp=(np.float32(-1), 1)).reverse.clamp
    assert clamp == (-1.0, 1.0)
    assert type(clamp[0]) is float


@pytest.mark.parametrize(
    "wanted", [torch.tensor([0, 2]), np.array([0, 2]), [np.int64(2), 0], {0, 2}]
)
def test_a_trajectory_is_told_by_integers(wanted: Any) -> None:
    _, states = model().sample(4, final="mean", return_trajectory=wanted)
    assert {(type(t), t) for t in states} == {(int, 0), (int, 2)}


def test_a_start_may_be_of_numpy_or_a_tensor() -> None:
    expected = model(NETWORK).sample(4, start=(3, X_0))
    for t in (np.int64(3), torch.tensor(3)):
        assert torch.equal(model(NETWORK).sample(4, start=(t, X_0)), expected)


NETWORK = Network()
NO_TENSOR = Posterior(log_r=lambda x: 0.0)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: loss(example_ids=[0, 1, 2, 3]), TypeError, "example_ids must be .*, got list"),
        (lambda: loss(example_ids=np.arange(4)), TypeError, "example_ids must be .*, got ndarray"),
        (lambda: loss(example_ids=None), TypeError, "example_ids must be .*, got NoneType"),
        (lambda: model().bound(X_0, example_ids=[0]), TypeError, "example_ids must .*, got list"),
        (lambda: model().sample(2, example_ids=[0]), TypeError, "example_ids must .*, got list"),
        (
            lambda: model().loss(X_0.double(), seed=0, example_ids=IDS),
            TypeError,
            "x_0 must have dtype torch.float32 like the model, got torch.float64",
        ),
        (
            lambda: model().double().bound(X_0),
            TypeError,
            "x_0 must have dtype torch.float64 like the model, got torch.float32",
        ),
        (lambda: loss(importance="yes"), TypeError, "importance must be .*, got str"),
        (
            lambda: loss(kind="hybrid", vb_weight=-1),
            ValueError,
            "vb_weight must be finite and not negative, got -1",
        ),
        (
            lambda: loss(kind="hybrid", vb_weight=math.nan),
            ValueError,
            "vb_weight must be finite and not negative, got nan",
        ),
        (lambda: loss(kind="hybrid", vb_weight="a"), TypeError, "vb_weight must be .*, got str"),
        (lambda: model(Tuple()).bound(X_0), TypeError, "network must return .*, got tuple"),
        (lambda: DiffusionModel(PROCESS, None), TypeError, "network must be .*, got NoneType"),
        (lambda: DiffusionModel(PROCESS, Network), TypeError, "got the class Network"),
        (lambda: model(t_base="0"), ValueError, "t_base must be 0 or 1, got '0'"),
        (
            lambda: loss(example_ids=IDS.to("meta")),
            ValueError,
            "example_ids must be on cpu like x_0, got meta",
        ),
        (
            lambda: model().bound(X_0, batch_size="8"),
            ValueError,
            "batch_size must be an integer of at least 1, got '8'",
        ),
        (lambda: dpm_fast.Importance("6"), TypeError, "num_steps must be an integer, got str"),
        (lambda: dpm_fast.Importance(0), ValueError, "num_steps must be at least 1, got 0"),
        (
            lambda: dpm_fast.BinomialDiffusion(4, "half"),
            TypeError,
            "prior_rate must be a number, got str",
        ),
        (lambda: dpm_fast.entropies("erase"), TypeError, "process must be .*, got str"),
        (
            lambda: dpm_fast.load_2015_weights(NETWORK, {}),
            TypeError,
            "network must be a ConvDenseNetwork, got Network",
        ),
        (lambda: DiffusionModel("erase", NETWORK), TypeError, "process must be .*, got str"),
        (lambda: model(data="digits"), TypeError, "data must be a DataSpec, got str"),
        (
            lambda: model(data=Data(SPEC, X_0, X_0)),
            TypeError,
            "data must be a DataSpec, got Data: give its spec",
        ),
        (lambda: model(clamp=1.0, parameterization="x0"), ValueError, "clamp must be .*; got 1.0"),
        (
            lambda: model(clamp=("a", "b"), parameterization="x0"),
            ValueError,
            r"clamp must be .*; got \('a', 'b'\)",
        ),
        (lambda: GaussianDiffusion("linear"), TypeError, "betas must be .*, got str; .*from_sch"),
        (
            lambda: GaussianDiffusion([0.1, 0.2], num_bumps=1.5),
            TypeError,
            "num_bumps must be an integer, got float",
        ),
        (lambda: model().sample(4.0), TypeError, "n must be an integer, got float"),
        (lambda: model().sample("4"), TypeError, "n must be an integer, got str"),
        (lambda: model().sample(4, batch_size=2.0), TypeError, "batch_size must .*, got float"),
        (lambda: model().sample(4, posterior={}), TypeError, "posterior must be .*, got dict"),
        (
            lambda: model().sample(4, return_trajectory=5),
            TypeError,
            "return_trajectory must be an iterable of timesteps, got int",
        ),
        (
            lambda: model().sample(4, return_trajectory=["a"]),
            TypeError,
            "each timestep of return_trajectory must be an integer, got str",
        ),
        (
            lambda: model().sample(4, return_trajectory=torch.tensor([1.5])),
            TypeError,
            "each timestep of return_trajectory must be an integer, got float",
        ),
        (lambda: model().sample(4, start=X_0), TypeError, "start must be a pair .*, got Tensor"),
        (lambda: model().sample(4, start=(1, X_0, 2)), TypeError, "start must be a pair"),
        (lambda: model().sample(4, start=(X_0, 5)), TypeError, "start t must .*, got Tensor"),
        (lambda: model().sample(4, start=(5.0, X_0)), TypeError, "start t must .*, got float"),
        (
            lambda: model().sample(4, start=(5, X_0.numpy())),
            TypeError,
            "start x_t must be a tensor, got ndarray",
        ),
        (lambda: model().sample(4, posterior=NO_TENSOR), TypeError, "log_r must .*, got float"),
        (
            lambda: model().sample(4, posterior=Posterior(log_r=lambda x: torch.zeros(4))),
            ValueError,
            "log_r must be differentiable with respect to its argument",
        ),
        (
            lambda: model().sample(4, posterior=Posterior(log_r=lambda x: x.detach().sum(1))),
            ValueError,
            "log_r must be differentiable with respect to its argument",
        ),
        (
            lambda: model().sample(
                4, posterior=Posterior(log_r=lambda x: NETWORK.linear.weight.sum().expand(4))
            ),
            ValueError,
            "log_r must be differentiable with respect to its argument",
        ),
        (
            lambda: dpm_fast.Trainer(model(), X_0, {}),  # type: ignore[arg-type]
            TypeError,
            "config must be a TrainConfig, got dict",
        ),
        (
            lambda: dpm_fast.Trainer(NETWORK, X_0),  # type: ignore[arg-type]
            TypeError,
            "model must be a DiffusionModel, got Network",
        ),
        (
            lambda: dpm_fast.Trainer(model(), X_0.numpy()),
            TypeError,
            r"data must be a Data or a tensor, got ndarray \(dpm_fast.data.load makes Data of",
        ),
        (
            lambda: dpm_fast.Trainer(model(), X_0, resume=True),
            TypeError,
            "resume must be 'auto', a path or None, got bool",
        ),
        (
            lambda: dpm_fast.Trainer(model(), X_0).fit(until="2"),
            TypeError,
            "until must be an integer, got str",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    call: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()


def test_one_example_has_no_standard_error() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bound = model().bound(X_0[:1])
        assert math.isnan(bound.stderr)
        assert "± nan" in str(bound)


def test_modules_are_attributes_and_an_empty_backend_is_auto() -> None:
    code = "import dpm_fast; dpm_fast.data.load, dpm_fast.run.open_run; print(dpm_fast.info())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"DPM_FAST_BACKEND": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "must be one of" not in done.stdout
