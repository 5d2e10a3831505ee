"""The model: its loss and gradients, its copies, and what it refuses."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dpm_fast
from dpm_fast import schedules
from dpm_fast.binomial import BinomialDiffusion
from dpm_fast.data import DataSpec
from dpm_fast.gaussian import GaussianDiffusion
from dpm_fast.model import DiffusionModel
from dpm_fast.networks import MLP
from dpm_fast.sampling import Posterior

NUM_STEPS, DIM = 8, 3
BYTES = DataSpec("bytes", (DIM,), "discrete", shift=127.5, scale=2 / 255, levels=256)
BINARY = DataSpec("bits", (DIM,), "binary")
X_0 = torch.randn(16, DIM, generator=torch.Generator().manual_seed(1))
IDS = torch.arange(16)


def network(num_outputs: int = 2) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    module = MLP(DIM, NUM_STEPS, hidden=(8,), num_outputs=num_outputs)
    for parameter in module.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return module


def gaussian(*args: Any, learned: bool = False, outputs: int = 2, **kwargs: Any) -> DiffusionModel:
    process = GaussianDiffusion.from_schedule("erase", NUM_STEPS, learned=learned)
    return DiffusionModel(process, network(outputs), *args, **kwargs)


class Identity(nn.Module):
    event_shape = (DIM,)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x


def with_identity() -> DiffusionModel:
    return DiffusionModel(GaussianDiffusion.from_schedule("erase", NUM_STEPS), Identity())


def binomial(**kwargs: Any) -> DiffusionModel:
    return DiffusionModel(BinomialDiffusion(NUM_STEPS), network(1), **kwargs)


@pytest.mark.parametrize("kind", ["bound", "simple", "hybrid"])
@pytest.mark.parametrize("edge", ["decoder", "paper"])
def test_gradients_reach_everything_that_learns(kind: str, edge: str) -> None:
    model = gaussian("epsilon", variance="learned_range", learned=True)
    loss = model.loss(X_0, seed=0, example_ids=IDS, kind=kind, edge=edge)
    assert loss.shape == ()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name
    beta = model.process.tables().beta
    (first,) = torch.autograd.grad(beta[1], model.process.schedule_weights, allow_unused=True)
    assert first is None or not first.any()


def test_first_beta_survives_training() -> None:
    model = gaussian(learned=True)
    before = model.process.tables().beta.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.loss(X_0, seed=0, example_ids=IDS).backward()
    optimizer.step()
    after = model.process.tables().beta
    assert after[1] == before[1]
    assert (after[2:] != before[2:]).all()


def test_a_learned_schedule_is_built_once_per_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model, count = gaussian(learned=True), []
    build = schedules.learned_beta
    monkeypatch.setattr(schedules, "learned_beta", lambda *args: count.append(args) or build(*args))
    calls = {
        "loss": lambda: model.loss(X_0, seed=0, example_ids=IDS).backward(),
        "bound": lambda: model.bound(X_0),
        "sample": lambda: model.sample(
            4, posterior=Posterior(observed=(X_0[:4], 1.0), guidance="x0")
        ),
    }
    for name, call in calls.items():
        count.clear()
        call()
        assert len(count) == 1, name
    before = model.bound(X_0).bound_nats
    model.process.schedule_weights.data.fill_(0.5)
    assert not torch.equal(model.bound(X_0).bound_nats, before)


def test_simple_loss_is_the_error_of_the_noise() -> None:
    class Constant(nn.Module):
        event_shape = (DIM,)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return torch.full_like(x, 2.0)

    process = GaussianDiffusion.from_schedule("erase", NUM_STEPS)
    model = DiffusionModel(process, Constant(), "epsilon")
    x_0, ids = torch.zeros(20000, DIM), torch.arange(20000)
    loss = model.loss(x_0, seed=0, example_ids=ids, kind="simple")
    assert loss.item() == pytest.approx(5.0, abs=0.1)  # E (2 - eps)^2, standard error 0.018


def test_hybrid_adds_the_bound_of_the_variance() -> None:
    model = gaussian("epsilon", variance="learned_range")
    simple, light, heavy = (
        model.loss(X_0, seed=0, example_ids=IDS, kind=kind, vb_weight=weight)
        for kind, weight in (("simple", 0.0), ("hybrid", 1.0), ("hybrid", 3.0))
    )
    assert light != simple
    torch.testing.assert_close(heavy - simple, 3 * (light - simple))


@pytest.mark.parametrize("learned", [False, True])
def test_copies_are_independent_and_equal(learned: bool) -> None:
    model = gaussian(learned=learned)
    expected = model.bound(X_0).bound_nats
    clone = copy.deepcopy(model)
    assert clone.reverse.process is clone.process
    for parameter in model.parameters():
        parameter.data.add_(0.5)
    assert torch.equal(clone.bound(X_0).bound_nats, expected)
    assert not torch.equal(model.bound(X_0).bound_nats, expected)
    model.load_state_dict(clone.state_dict())
    assert torch.equal(model.bound(X_0).bound_nats, expected)


def test_dequantized_levels_fill_their_bins() -> None:
    model = gaussian(data=BYTES)
    x_0 = BYTES.to_model(torch.full((4000, DIM), 9))
    x = model.dequantize(x_0, 0, torch.arange(4000))
    offset = (x - x_0) / BYTES.bin_width
    assert offset.abs().max() <= 0.5 + 1e-4
    assert offset.std().item() == pytest.approx(12**-0.5, rel=0.03)
    assert torch.equal(gaussian().dequantize(x_0, 0, torch.arange(4000)), x_0)


def test_network_that_counts_from_zero() -> None:
    seen = []

    class Recorder(nn.Module):
        event_shape = (DIM,)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            seen.append(t)
            return torch.cat((x, x), dim=1)

    process = GaussianDiffusion.from_schedule("erase", NUM_STEPS)
    for t_base in (0, 1):
        seen.clear()
        DiffusionModel(process, Recorder(), t_base=t_base).bound(X_0)
        from_0 = [t for t in range(NUM_STEPS - 1, -1, -1) for _ in X_0]
        assert torch.cat(seen).tolist() == [t + t_base for t in from_0]


@pytest.mark.parametrize(
    "make",
    [gaussian, binomial],
)
@pytest.mark.parametrize("mode", ["bumps", "per_timestep"])
def test_gradients_of_each_example_by_torch_func(make: Any, mode: str) -> None:
    outputs = 2 if make is gaussian else 1
    model, x_0 = make(), (X_0 > 0).float() if make is binomial else X_0
    model.network = MLP(DIM, NUM_STEPS, hidden=(8,), num_outputs=outputs, readout=mode)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)

    def loss(values: dict[str, Tensor], x: Tensor, ids: Tensor) -> Tensor:
        with torch.nn.utils.stateless._reparametrize_module(model, values):
            return model.loss(x, seed=0, example_ids=ids)

    values = {name: p.detach() for name, p in model.named_parameters()}

    def of_one(values: dict[str, Tensor], x: Tensor, i: Tensor) -> Tensor:
        return loss(values, x[None], i[None])

    with dpm_fast.use_backend("reference"):
        found = torch.func.vmap(torch.func.grad(of_one), in_dims=(None, 0, 0))(values, x_0, IDS)
        whole = model.loss(x_0, seed=0, example_ids=IDS)
        expected = torch.autograd.grad(whole, list(model.parameters()))
    for name, gradient in zip(values, expected, strict=True):
        torch.testing.assert_close(found[name].mean(0), gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("make", [gaussian, binomial])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_network_rounds_nothing_but_what_it_sees(make: Any, dtype: torch.dtype) -> None:
    wide, x_0 = make(), (X_0 > 0).float() if make is binomial else X_0.to(dtype).float()
    narrow = copy.deepcopy(wide).to(dtype)
    tolerance = {"atol": 0.02 if dtype == torch.bfloat16 else 0.003, "rtol": 0.02}
    samples = narrow.sample(8)
    assert samples.dtype == torch.float32
    if make is gaussian:
        torch.testing.assert_close(samples, wide.sample(8), atol=0.1, rtol=0.1)
    for x in (x_0, x_0.to(dtype)):  # examples of either width, the same noise
        loss = narrow.loss(x, seed=0, example_ids=IDS)
        torch.testing.assert_close(loss, wide.loss(x_0, seed=0, example_ids=IDS), **tolerance)
        loss.backward()
        found, wanted = narrow.bound(x).bound_nats, wide.bound(x_0).bound_nats
        torch.testing.assert_close(found, wanted, atol=0.3, rtol=0.02)


def test_narrow_examples_have_the_bound_of_the_same_in_float32() -> None:
    """x_t of narrow examples is in float32."""
    model = gaussian("x0", outputs=1)
    x_0 = X_0.bfloat16()
    torch.testing.assert_close(
        model.bound(x_0).bound_nats, model.bound(x_0.float()).bound_nats, atol=0, rtol=0
    )
    for kind in ("bound", "simple"):
        losses = [model.loss(x, seed=0, example_ids=IDS, kind=kind) for x in (x_0, x_0.float())]
        assert torch.equal(*losses)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gaussian("eps"), r"parameterization must be one of .*, got 'eps'"),
        (lambda: gaussian(variance="big"), r"variance must be one of .*, got 'big'"),
        (lambda: gaussian(clamp=(-1, 1)), r"clamp must be .* with 'perturbation'"),
        (lambda: gaussian(t_base=2), r"t_base must be 0 or 1, got 2"),
        (
            lambda: gaussian(outputs=1),
            r"num_outputs 2 for 'perturbation' with variance 'logit_scaled', got 1",
        ),
        (
            lambda: gaussian("epsilon"),
            r"network must have num_outputs 1 for 'epsilon' with variance 'fixed_small', got 2",
        ),
        (
            lambda: gaussian(data=DataSpec("plane", (2,), "continuous")),
            r"network must have event_shape \(2,\) for the data, got \(3,\)",
        ),
        (lambda: gaussian(data=BINARY), r"data of kind 'binary' do not fit a gaussian process"),
        (lambda: binomial(data=BYTES), r"data of kind 'discrete' do not fit a binomial process"),
        (
            lambda: DiffusionModel(BinomialDiffusion(NUM_STEPS + 1), network(1)),
            r"network must have num_steps 9 for the binomial process, got 8",
        ),
    ],
)
def test_a_model_refuses(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("call", ["loss", "bound"])
@pytest.mark.parametrize(
    ("make", "x_0", "error", "message"),
    [
        (gaussian, X_0[:, :2], ValueError, r"x_0 must have shape \(N, 3\), got \(16, 2\)"),
        (gaussian, X_0[0], ValueError, r"x_0 must have shape \(N, 3\), got \(3,\)"),
        (gaussian, X_0[:0], ValueError, r"at least one example, got none"),
        (gaussian, X_0 * torch.nan, ValueError, r"x_0 must be finite, got NaN or infinity"),
        (gaussian, X_0 / 0, ValueError, r"x_0 must be finite, got NaN or infinity"),
        (gaussian, X_0.long(), TypeError, r"floating-point .*, got torch.int64"),
        (gaussian, [[0.0] * 3], TypeError, r"floating-point .*, got list"),
        (binomial, X_0, ValueError, r"x_0 must be 0 or 1 for a binomial process"),
        (lambda: gaussian(data=BYTES), X_0, ValueError, r"must be on the grid of 256 levels"),
        (with_identity, X_0, ValueError, r"return shape \((\d+), 6\).* got \(\1, 3\)"),
    ],
)
def test_data_are_refused(
    make: Any, x_0: Any, error: type[Exception], message: str, call: str
) -> None:
    arguments = {"seed": 0, "example_ids": torch.arange(len(x_0))}
    with pytest.raises(error, match=message):
        getattr(make(), call)(x_0, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "mse"}, r"kind must be one of bound, simple, hybrid, got 'mse'"),
        ({"edge": "none"}, r"edge must be one of decoder, .*, got 'none'"),
        ({"edge": "discretized"}, r"edge 'discretized' requires discrete data"),
        ({"example_ids": IDS[:3]}, r"example_ids must have shape \(16,\), got \(3,\)"),
        ({"example_ids": IDS.float()}, r"example_ids must have dtype int64, got torch.float32"),
        ({"seed": 2**64}, r"seed must be a 64-bit integer, got 18446744073709551616"),
    ],
)
def test_loss_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gaussian().loss(X_0, **{"seed": 0, "example_ids": IDS, **arguments})


def test_loss_kinds_fit_the_model() -> None:
    bits = (X_0 > 0).float()
    with pytest.raises(ValueError, match="loss kind 'simple' requires a Gaussian process"):
        binomial().loss(bits, seed=0, example_ids=IDS, kind="simple")
    with pytest.raises(ValueError, match="requires a learned variance, got 'fixed_small'"):
        gaussian("epsilon", outputs=1).loss(X_0, seed=0, example_ids=IDS, kind="hybrid")
    with pytest.raises(ValueError, match="mean free of the variance, got 'decay'"):
        gaussian("decay").loss(X_0, seed=0, example_ids=IDS, kind="simple")


@pytest.mark.parametrize("t", [0, NUM_STEPS + 1])
def test_timesteps_outside_the_trajectory_are_refused(t: int) -> None:
    with pytest.raises(ValueError, match=rf"t must lie in 1..8, got {t}"):
        gaussian().term_nats(X_0, torch.full((16,), t), 0, IDS)


def test_dropout_in_training_mode_is_told() -> None:
    network = nn.Sequential(nn.Linear(2, 4), nn.Dropout())
    model = DiffusionModel(
        GaussianDiffusion.from_schedule("erase", 4), AtAnyTime(network), "perturbation"
    )
    for call in (lambda: model.sample(2), lambda: model.bound(torch.zeros(2, 2))):
        with pytest.warns(UserWarning, match="is in training mode: model.eval"):
            call()
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.sample(2)


class AtAnyTime(nn.Module):
    event_shape = (2,)

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.network(x)


def test_what_a_model_is_can_be_read() -> None:
    model = DiffusionModel(GaussianDiffusion.from_schedule("erase", 4, learned=True), MLP(2, 4))
    assert "parameterization='perturbation', variance='logit_scaled', t_base=1" in repr(model)
    assert "GaussianDiffusion(num_steps=4, learned=True)" in repr(model)
    assert repr(BinomialDiffusion(5, torch.tensor(0.25))) == (
        "BinomialDiffusion(num_steps=5, prior_rate=0.25)"
    )
