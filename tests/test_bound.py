"""The bound: its estimators agree, its parts add up, its units are those of the data."""

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpm_fast import evaluation
from dpm_fast.binomial import BinomialDiffusion
from dpm_fast.data import DataSpec
from dpm_fast.gaussian import GaussianDiffusion
from dpm_fast.importance import Importance
from dpm_fast.model import DiffusionModel
from dpm_fast.networks import MLP
from tolerances import mean_stderr_multiple

NUM_STEPS, DIM, NUM_EXAMPLES = 10, 4, 12
GREY = DataSpec("grey", (DIM,), "discrete", shift=3.5, scale=0.5, levels=8)


class Zero(nn.Module):
    """With "perturbation", the exact reverse kernel of unit-Gaussian data."""

    event_shape = (DIM,)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.cat((0 * x, 0 * x), dim=1)


def build(process: Any, num_outputs: int, data: DataSpec | None = None) -> DiffusionModel:
    generator = torch.Generator().manual_seed(3)
    module = MLP(DIM, NUM_STEPS, hidden=(8,), num_outputs=num_outputs)
    for parameter in module.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return DiffusionModel(process, module, data=data)


def gaussian(data: DataSpec | None = None) -> DiffusionModel:
    return build(GaussianDiffusion.from_schedule("erase", NUM_STEPS), 2, data)


def continuous_data() -> Tensor:
    return torch.randn(NUM_EXAMPLES, DIM, generator=torch.Generator().manual_seed(7))


def grey_data() -> Tensor:
    levels = torch.randint(0, 8, (NUM_EXAMPLES, DIM), generator=torch.Generator().manual_seed(7))
    return GREY.to_model(levels)


# name: (model, x_0, edge)
CASES: dict[str, tuple[Callable[[], DiffusionModel], Callable[[], Tensor], str]] = {
    "decoder": (gaussian, continuous_data, "decoder"),
    "paper": (gaussian, continuous_data, "paper"),
    "discretized": (lambda: gaussian(GREY), grey_data, "discretized"),
    "discretized_tanh": (lambda: gaussian(GREY), grey_data, "discretized_tanh"),
    "binomial": (
        lambda: build(BinomialDiffusion(NUM_STEPS, 0.3), 1),
        lambda: (continuous_data() > 0).float(),
        "decoder",
    ),
    "binomial_paper": (
        lambda: build(BinomialDiffusion(NUM_STEPS, 0.3), 1),
        lambda: (continuous_data() > 0).float(),
        "paper",
    ),
}


def arbitrary_importance() -> Importance:
    importance = Importance(NUM_STEPS)
    importance.moments[0] = 100
    importance.moments[1] = 10 ** torch.linspace(3, -3, NUM_STEPS + 1)
    return importance


@pytest.mark.parametrize("by_importance", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_loss_is_an_unbiased_estimate(name: str, by_importance: bool) -> None:
    make_model, make_data, edge = CASES[name]
    model, x_0 = make_model(), make_data().repeat(50, 1)
    ids = torch.arange(len(x_0))
    with torch.no_grad():
        losses = torch.stack(
            [
                model.loss(
                    x_0,
                    seed=seed,
                    example_ids=ids,
                    edge=edge,
                    importance=arbitrary_importance() if by_importance else None,
                )
                for seed in range(40)
            ]
        )
    exact = model.bound(x_0, edge=edge, draws=2, seed=1000)
    assert exact.mc_stderr is not None
    error = math.hypot(
        losses.std().item() / math.sqrt(len(losses)), exact.mc_stderr / exact.num_dims
    )
    assert error < 0.1 * exact.bits_per_dim.mean().abs()
    difference = losses.mean() - exact.bits_per_dim.mean()
    # Forty seeds tell the error within a third.
    assert abs(difference.item()) < 1.5 * mean_stderr_multiple() * error


@pytest.mark.parametrize("by_importance", [False, True])
@pytest.mark.parametrize(
    "timesteps", [4, *(pytest.param(k, marks=pytest.mark.slow) for k in (1, NUM_STEPS - 1))]
)
@pytest.mark.parametrize("name", CASES)
def test_strata_agree_with_every_timestep(name: str, timesteps: int, by_importance: bool) -> None:
    make_model, make_data, edge = CASES[name]
    model, x_0 = make_model(), make_data().repeat(20, 1)
    exact = model.bound(x_0, edge=edge, draws=2, seed=1000)
    assert exact.mc_stderr is not None
    importance = arbitrary_importance() if by_importance else None
    means = torch.stack(
        [
            model.bound(
                x_0, edge=edge, timesteps=timesteps, importance=importance, seed=seed
            ).bound_bits.mean()
            for seed in range(12)
        ]
    )
    error = math.hypot(means.std().item() / math.sqrt(len(means)), exact.mc_stderr)
    difference = means.mean() - exact.bound_bits.mean()
    # Twelve seeds tell the error within a factor of two.
    assert abs(difference.item()) < 2 * mean_stderr_multiple() * error
    assert error < 0.2 * exact.bound_bits.mean().abs()


@pytest.mark.parametrize(
    ("timesteps", "draws"), [("exact", 2), (NUM_STEPS - 1, 2), (3, 2), (1, 8), ("importance", 8)]
)
def test_monte_carlo_error_is_that_between_seeds(timesteps: str | int, draws: int) -> None:
    model, x_0 = gaussian(), continuous_data()
    options: dict[str, Any] = {"timesteps": timesteps}
    if draws > 2:  # terms that vary with t more than with the noise, few of them
        process = GaussianDiffusion.from_schedule("erase", NUM_STEPS)
        model, x_0 = DiffusionModel(process, Zero()), torch.full((2, DIM), 10.0)
    if timesteps == "importance":
        options = {"timesteps": 1, "importance": arbitrary_importance()}
    bounds = [model.bound(x_0, draws=draws, seed=seed, **options) for seed in range(40)]
    spread = torch.stack([b.bound_bits.mean() for b in bounds]).std().item()
    stated = math.sqrt(sum(b.mc_stderr**2 for b in bounds if b.mc_stderr) / len(bounds))
    assert stated == pytest.approx(spread, rel=0.5)  # 40 seeds: 11 % (1 sigma)
    assert model.bound(x_0, **options).mc_stderr is None


@pytest.mark.parametrize("timesteps", [NUM_STEPS, 1000])
def test_as_many_timesteps_as_there_are_is_every_one(timesteps: int) -> None:
    model, x_0 = gaussian(), continuous_data()
    expected = model.bound(x_0)
    found = model.bound(x_0, timesteps=timesteps)
    assert torch.equal(found.bound_nats, expected.bound_nats)
    assert found.settings == expected.settings


@pytest.mark.parametrize("timesteps", ["exact", 3])
def test_bits_do_not_depend_on_the_batch(timesteps: str | int) -> None:
    """Of a network that gives the same bits in any batch, as matrix products may not."""
    model = DiffusionModel(GaussianDiffusion.from_schedule("erase", NUM_STEPS), Zero())
    whole = model.bound(continuous_data(), timesteps=timesteps, draws=3)
    for batch_size in (1, 5):
        part = model.bound(continuous_data(), timesteps=timesteps, draws=3, batch_size=batch_size)
        for field in ("bound_nats", "per_timestep_nats"):
            assert torch.equal(getattr(part, field), getattr(whole, field))
        assert part.mc_stderr == whole.mc_stderr


class Recorder(Zero):
    """Knows the sizes of the batches it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.sizes.append(len(x))
        return super().forward(x, t)


def recorded() -> tuple[DiffusionModel, list[int]]:
    network = Recorder()
    return DiffusionModel(
        GaussianDiffusion.from_schedule("erase", NUM_STEPS), network
    ), network.sizes


@pytest.mark.parametrize("num_examples", [1, 3, NUM_EXAMPLES])
@pytest.mark.parametrize(
    ("options", "terms_per_example"),
    [({}, NUM_STEPS), ({"edge": "paper", "draws": 2}, 2 * (NUM_STEPS - 1)), ({"timesteps": 4}, 5)],
)
def test_examples_of_any_number_fill_batches(
    num_examples: int, options: dict[str, Any], terms_per_example: int
) -> None:
    model, sizes = recorded()
    result = model.bound(continuous_data()[:num_examples], batch_size=7, **options)
    full, rest = divmod(num_examples * terms_per_example, 7)
    assert sizes == [7] * full + [rest] * bool(rest)
    calls = "1 network call" if len(sizes) == 1 else f"{len(sizes)} network calls"
    path = f"{calls} of {sizes[0]} terms at most, kernels: "
    assert result.settings["path"].startswith(path)


def test_few_pairs_are_one_call_and_1024_are_the_default() -> None:
    model, sizes = recorded()
    result = model.bound(continuous_data()[:1])
    assert sizes == [NUM_STEPS]
    assert result.settings["path"].startswith("1 network call of 10 terms at most, ")
    result = gaussian().bound(continuous_data()[:1], timesteps=1, batch_size=1)
    assert result.settings["path"].startswith("2 network calls of 1 term at most, ")
    model.bound(continuous_data(), draws=20)
    assert sizes[1:] == [1024, 1024, NUM_EXAMPLES * NUM_STEPS * 20 - 2048]


@pytest.mark.parametrize("name", CASES)
def test_an_example_has_its_terms_in_any_company(name: str) -> None:
    make_model, make_data, edge = CASES[name]
    model, x_0, ids = make_model(), make_data(), torch.arange(NUM_EXAMPLES) * 5 - 9
    for timesteps in ("exact", 3):
        options: dict[str, Any] = {"edge": edge, "timesteps": timesteps, "draws": 2, "seed": 8}
        whole = model.bound(x_0, example_ids=ids, **options)
        for i in (0, 7):
            alone = model.bound(x_0[i : i + 1], example_ids=ids[i : i + 1], **options)
            for field in ("bound_nats", "null_nats", "prior_nats"):
                found, expected = getattr(alone, field), getattr(whole, field)[i : i + 1]
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_progress_is_told_before_each_call_and_at_the_end() -> None:
    model, sizes = recorded()
    told: list[tuple[int, int]] = []
    model.bound(continuous_data(), batch_size=50, progress=lambda *numbers: told.append(numbers))
    assert told == [(0, 120), (50, 120), (100, 120), (120, 120)]
    assert sizes == [50, 50, 20]


def test_the_path_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "dpm_fast"):
        result = gaussian().bound(continuous_data())
    assert f"bound: 12 examples in {result.settings['path']}" in caplog.messages


class TwoAlike:
    """Ranks of which the other one has the same share."""

    device = torch.device("cpu")

    def sum_(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            tensor.mul_(2)

    def gather(self, mine: Tensor, num_items: int) -> Tensor:
        return torch.cat((mine, mine))


def test_draws_of_all_ranks_tell_the_error_of_strata() -> None:
    mine = gaussian().bound(continuous_data(), timesteps=3, draws=4)
    whole = evaluation._joined(mine, 2 * NUM_EXAMPLES, TwoAlike())  # type: ignore[arg-type]
    assert mine.strata_nats is not None and whole.strata_nats is not None
    assert mine.mc_variance_nats2 is not None and mine.mc_stderr is not None
    # Ranks share the places in the strata: only the noise at t = 1 averages out.
    torch.testing.assert_close(whole.strata_nats, mine.strata_nats)
    variance = (mine.mc_stderr * math.log(2)) ** 2 - mine.mc_variance_nats2 / 2
    assert whole.mc_stderr == pytest.approx(math.sqrt(variance) / math.log(2))


def test_edge_paper_of_bits_by_hand() -> None:
    """T = 2: a bit x_0 is 1 in x_1 with probability x_0 / 2 + 0.3 / 2."""
    x_0 = torch.tensor([[0.0, 1.0, 1.0]])
    entropy = {
        rate: -rate * math.log(rate) - (1 - rate) * math.log(1 - rate) for rate in (0.15, 0.65)
    }
    nats = BinomialDiffusion(2, prior_rate=0.3).prior_nats(x_0, "paper")
    assert nats.item() == pytest.approx(entropy[0.15] + 2 * entropy[0.65], abs=1e-12)


def test_bound_of_unit_gaussian_data_is_tight() -> None:
    process = GaussianDiffusion.from_schedule("erase", NUM_STEPS)
    x_0 = continuous_data().repeat(100, 1)
    result = DiffusionModel(process, Zero()).bound(x_0, draws=2)
    assert result.mc_stderr is not None
    assert result.mc_stderr < 0.05
    log_density = -0.5 * (x_0.double() ** 2 + math.log(2 * math.pi)).sum(dim=1)
    torch.testing.assert_close(-result.null_nats, log_density)
    gap = (result.bound_nats - log_density).mean().item() / math.log(2)
    assert abs(gap) < mean_stderr_multiple() * result.mc_stderr
    assert result.gap_to_null_bits.mean().item() == pytest.approx(gap, abs=1e-9)


@pytest.mark.parametrize("scale", [0.25, 8.0])
def test_units_of_the_data(scale: float) -> None:
    process = GaussianDiffusion.from_schedule("erase", NUM_STEPS)
    spec = DataSpec("scaled", (DIM,), "continuous", shift=1.0, scale=scale)
    x_data = continuous_data().repeat(100, 1) / scale + 1.0
    result = DiffusionModel(process, Zero(), data=spec).bound(spec.to_model(x_data), draws=2)
    assert result.mc_stderr is not None
    density = torch.distributions.Normal(1.0, 1.0 / scale).log_prob(x_data).sum(1).double()
    expected = -density.mean().item() / (DIM * math.log(2))
    error = mean_stderr_multiple() * result.mc_stderr / DIM
    assert error < 0.1
    assert result.data_bits_per_dim.mean().item() == pytest.approx(expected, abs=error)
    torch.testing.assert_close(
        result.bits_per_dim - result.data_bits_per_dim,
        torch.full_like(result.bits_per_dim, math.log2(scale)),
    )
    torch.testing.assert_close(result.bound_bits, -DIM * result.bits_per_dim)


def test_discretized_figures_are_of_the_data() -> None:
    model, x_0 = gaussian(GREY), grey_data()
    result = model.bound(x_0, edge="discretized")
    assert torch.equal(result.bits_per_dim, result.data_bits_per_dim)
    dequantized = model.bound(x_0)
    offset = dequantized.data_bits_per_dim - dequantized.bits_per_dim
    torch.testing.assert_close(offset, torch.ones_like(offset))  # -log2 0.5
    # The null model's bins are exhaustive: e^-nats sums to one over the levels of an element.
    levels = GREY.to_model(torch.arange(8)[:, None].expand(8, DIM))
    total = (-model.null_nats(levels, "discretized") / DIM).exp().sum().item()
    assert total == pytest.approx(1.0, abs=1e-12)


def test_edge_paper_replaces_the_first_step() -> None:
    model, x_0 = gaussian().double(), continuous_data().double()
    paper, decoder = model.bound(x_0, edge="paper"), model.bound(x_0)
    torch.testing.assert_close(paper.per_timestep_nats[2:], decoder.per_timestep_nats[2:])
    beta_bar = model.process.tables().beta_bar
    expected = 0.5 * DIM * (math.log(2 * math.pi * math.e) + (beta_bar[1] / beta_bar[-1]).log())
    torch.testing.assert_close(paper.prior_nats, expected.expand(NUM_EXAMPLES))


def test_printed_table_states_figure_and_edge() -> None:
    result = gaussian().bound(continuous_data(), draws=2)
    text = str(result)
    assert f"{result.bound_bits.mean():.4f} ± {result.stderr:.4f} bits per example" in text
    assert f"{result.mc_stderr:.4f}" in text
    assert "decoder" in text
    expected = result.bound_bits.std() / math.sqrt(NUM_EXAMPLES)
    assert result.stderr == pytest.approx(expected.item())
    assert repr(result) == (
        f"Bound(bound_nats (12,), K {result.bound_bits.mean():.4f} ± {result.stderr:.4f} bits per "
        f"example, {result.bits_per_dim.mean():.4f} bits/dim, edge 'decoder')"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"timesteps": 0}, "timesteps must be 'exact' or an integer of at least 1, got 0"),
        ({"timesteps": "all"}, "timesteps must be 'exact' or an integer of .* 1, got 'all'"),
        ({"edge": "none"}, "edge must be one of decoder, discretized, .*, got 'none'"),
        ({"edge": "discretized"}, "edge 'discretized' requires discrete data"),
        ({"timesteps": True}, "timesteps must be 'exact' or an integer of at least 1, got True"),
        ({"importance": Importance(NUM_STEPS)}, "importance requires .* below T = 10, got all"),
        (
            {"importance": Importance(NUM_STEPS), "timesteps": NUM_STEPS},
            "importance requires a number of timesteps below T = 10, got all",
        ),
        (
            {"importance": Importance(4), "timesteps": 2},
            "importance must have num_steps 10, got 4",
        ),
        ({"draws": True}, "draws must be an integer of at least 1, got True"),
        ({"draws": 0}, "draws must be an integer of at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"max_memory": 0}, "max_memory must be a positive number of bytes, .* as '2GiB', got 0"),
        ({"max_memory": "2 parsecs"}, "max_memory must be a positive number .*, got '2 parsecs'"),
        ({"max_memory": 100}, "max_memory must be enough for a batch of one pair, [0-9]+ bytes"),
        ({"example_ids": torch.arange(3)}, r"example_ids must have shape \(12,\), got \(3,\)"),
        ({"seed": 2**64}, "seed must be a 64-bit integer, got 18446744073709551616"),
    ],
)
def test_bound_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gaussian().bound(continuous_data(), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_memory": 1.5}, "max_memory must be bytes or text as '2GiB', got float"),
        ({"progress": 1}, "progress must be True, False or a function of two numbers, got int"),
        ({"partial": 3}, "partial must be a path, got int"),
    ],
)
def test_bound_refuses_types(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        gaussian().bound(continuous_data(), **arguments)
