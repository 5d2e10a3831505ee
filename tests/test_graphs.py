"""Steps as CUDA graphs: all of it but the capture itself, for which a function is run again here.

tests/test_gpu.py has the same with a GPU.
"""

import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dpm_fast
from dpm_fast import graphs
from dpm_fast.binomial import BinomialDiffusion
from dpm_fast.gaussian import GaussianDiffusion
from dpm_fast.model import DiffusionModel
from dpm_fast.progress import network_calls
from dpm_fast.sampling import Posterior

T, D, N = 60, 3, 5
IDS = torch.arange(N) * 2**33 + 7


class Network(nn.Module):
    """One that no kernel knows."""

    def __init__(self, num_outputs: int = 2):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(num_outputs * D, D, generator=generator))
        self.event_shape = (D,)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight.T + t[:, None] / T)


def run_again(run: Callable[[], None]) -> Callable[[], None]:
    """A graph, as far as its results go: what is captured reads and writes the same tensors."""
    run()
    return run


@pytest.fixture(autouse=True)
def capturing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    monkeypatch.setattr(graphs, "_DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(graphs, "capture_on_gpu", run_again)
    monkeypatch.delenv("DPM_FAST_GRAPHS", raising=False)
    caplog.set_level(logging.DEBUG, "dpm_fast")
    with dpm_fast.use_backend("reference"):
        yield


def gaussian(network: nn.Module | None = None) -> DiffusionModel:
    process = GaussianDiffusion.from_schedule("log_linear", T)
    return DiffusionModel(process, network or Network())


def binomial() -> DiffusionModel:
    return DiffusionModel(BinomialDiffusion(T), Network(1))


VALUES = torch.randn(N, D, generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([True, False, False])
SIGMA = torch.tensor([1.0, torch.inf, 0.5])
POSTERIORS: dict[str, Posterior] = {
    "none": Posterior(),
    "known": Posterior(known=(MASK, VALUES)),
    "known forward": Posterior(known=(MASK, VALUES[0]), known_as="forward"),
    "observed": Posterior(observed=(VALUES, 0.7)),
    "observed of x_0": Posterior(observed=(VALUES, SIGMA), guidance="x0"),
    "log_r": Posterior(log_r=lambda x: -x.square().sum(1)),
    "all": Posterior(
        known=(MASK, VALUES),
        observed=(VALUES, SIGMA),
        log_r=lambda x: x.sum(1),
        known_as="forward",
    ),
}


def sample(model: DiffusionModel, use_graphs: bool | None, **options: Any) -> Any:
    options = {"seed": 3, "example_ids": IDS, "batch_size": 2} | options
    return model.sample(N, use_graphs=use_graphs, **options)


def assert_same(model: DiffusionModel, **options: Any) -> None:
    """Bit for bit: here a graph runs the same code."""
    by_graph, by_steps = (sample(model, use, **options) for use in (True, False))
    if isinstance(by_steps, tuple):
        assert by_graph[1].keys() == by_steps[1].keys()
        for t, state in by_steps[1].items():
            assert torch.equal(by_graph[1][t], state)
        by_graph, by_steps = by_graph[0], by_steps[0]
    assert torch.equal(by_graph, by_steps)


# The last step is of no graph unless it ends at x_1: every posterior has one way to end.
@pytest.mark.parametrize(
    ("name", "final"),
    [
        *itertools.product(POSTERIORS, ["sample"]),
        *itertools.product(("none", "all"), ["x_1", "mean"]),
    ],
)
def test_states_are_those_of_single_steps(name, final, caplog) -> None:
    options = {"posterior": POSTERIORS[name], "final": final, "return_trajectory": range(1, T + 1)}
    assert_same(gaussian(), **options)
    shapes = [f"sample: steps of shape ({n}, 3) are a CUDA graph" for n in (2, 1)]
    without = "sample: no CUDA graph, since nobody asked for one"
    assert [m for m in caplog.messages if "step by step" not in m] == [*shapes, without]


@pytest.mark.parametrize(
    "options", [{"num_inference_steps": 55}, {"eta": 0.0}, {"stop": 4}], ids=str
)
def test_other_ways_through_the_timesteps(options, caplog) -> None:
    posterior = {"posterior": POSTERIORS["known forward"]}
    assert_same(gaussian(), **posterior, **options)
    assert caplog.text.count("are a CUDA graph") == 2


def test_bits(caplog) -> None:
    posterior = Posterior(
        known=(MASK, (VALUES > 0).float()),
        observed=((VALUES > 0).float(), 0.2),
        known_as="forward",
    )
    assert_same(binomial())
    assert_same(binomial(), posterior=posterior, return_trajectory=range(1, T + 1))
    assert caplog.text.count("are a CUDA graph") == 4


def test_starts_and_lengths(caplog) -> None:
    x_t = torch.randn(N, D, generator=torch.Generator().manual_seed(2))
    for t in (1, 2, 3, graphs._LEAST_STEPS, graphs._LEAST_STEPS + 1):
        assert_same(gaussian(), start=(t, x_t), final="mean")
        assert ("are a CUDA graph" in caplog.text) == (t - 1 >= graphs._LEAST_STEPS)


def test_states_are_not_overwritten_by_later_steps() -> None:
    _, states = sample(gaussian(), True, return_trajectory=range(1, T + 1))
    assert len({float(state.sum()) for state in states.values()}) == T


def test_a_call_with_another_seed_has_other_noise() -> None:
    model = gaussian()
    first, second = sample(model, True), sample(model, True, seed=4)
    assert not torch.equal(first, second)
    assert torch.equal(second, sample(model, False, seed=4))


def test_changed_parameters_are_seen() -> None:
    model = gaussian()
    before = sample(model, True)
    model.network.weight = nn.Parameter(-model.network.weight)
    assert not torch.equal(sample(model, True), before)
    assert_same(model)


def test_what_cannot_be_captured_goes_step_by_step(monkeypatch, caplog) -> None:
    def refused(run: Callable[[], None]) -> Callable[[], None]:
        run()
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(graphs, "capture_on_gpu", refused)
    assert_same(gaussian())
    said = [message for message in caplog.messages if "cannot be captured" in message]
    assert said == [
        "sample: no CUDA graph, since a step cannot be captured: "
        "CUDA error: operation not permitted when stream is capturing"
    ]


def frozen(run: Callable[[], None]) -> Callable[[], None]:
    """As if all that a graph reads were constants of it."""
    run()
    return lambda: None


def frozen_in_time(run: Callable[[], None]) -> Callable[[], None]:
    """As if t were a constant of the graph."""
    (captured,) = (cell.cell_contents for cell in run.__closure__ if "x" in dir(cell.cell_contents))
    t = captured.t.clone()
    run()

    def replay() -> None:
        captured.t.copy_(t)
        run()

    return replay


def test_a_graph_that_ignores_its_inputs_is_not_taken(monkeypatch, caplog) -> None:
    for capture in (frozen, frozen_in_time):
        monkeypatch.setattr(graphs, "capture_on_gpu", capture)
        for eta in (None, 0.0):
            assert_same(gaussian(), eta=eta)
            assert "a step and its graph differ" in caplog.text
            caplog.clear()


def test_small_steps_without_noise_are_compared_with_how_far_they_go(monkeypatch, caplog) -> None:
    monkeypatch.setattr(graphs, "capture_on_gpu", frozen)
    process = GaussianDiffusion.from_schedule("linear", 1000)
    model = DiffusionModel(process, Network(1), "epsilon", variance="fixed_small")
    samples = model.sample(4, seed=1, eta=0.0, use_graphs=True)
    assert torch.equal(samples, model.sample(4, seed=1, eta=0.0))
    assert "a step and its graph differ" in caplog.text


class Dropping(Network):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x, t), 0.5, self.training)


def test_a_network_that_answers_differently_each_time_is_not_captured(caplog) -> None:
    model = gaussian(Dropping())
    assert sample(model.train(), True).isfinite().all()
    assert "a step and its graph differ" in caplog.text
    caplog.clear()
    assert_same(model.eval())
    assert "are a CUDA graph" in caplog.text


def test_the_switches(monkeypatch, caplog) -> None:
    sample(gaussian(), False)
    sample(gaussian(), None)
    monkeypatch.setenv("DPM_FAST_GRAPHS", "1")
    sample(gaussian(), False)
    assert caplog.text.count("no CUDA graph, since nobody asked for one") == 3
    assert "are a CUDA graph" not in caplog.text
    sample(gaussian(), None)
    assert "are a CUDA graph" in caplog.text


class Counting(Network):
    """A buffer that a step changes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))


@pytest.mark.parametrize(
    ("network", "options", "reason"),
    [
        (Counting, {}, "a network in training may change its buffers, and would once more"),
        (Network, {"callback": lambda t, x: None}, "Python runs between steps, in the callback"),
    ],
)
def test_what_a_graph_would_do_otherwise(network, options, reason, caplog) -> None:
    assert_same(gaussian(network()), **options)
    assert f"no CUDA graph, since {reason}" in caplog.text


def test_hooks_are_called_in_every_step(caplog) -> None:
    model, calls = gaussian(), []
    model.network.register_forward_hook(lambda *_: calls.append(1))
    assert_same(model)
    assert "modules have hooks" in caplog.text
    assert len(calls) == 2 * 3 * (T - 1)


def test_a_progress_line_counts_replays(monkeypatch) -> None:
    model = gaussian()
    counts: list[int] = []

    def without_python(run: Callable[[], None]) -> Callable[[], None]:
        run()

        def replay() -> None:
            with graphs._uncounted(model.network):
                run()

        return replay

    monkeypatch.setattr(graphs, "capture_on_gpu", without_python)
    monkeypatch.setattr("dpm_fast.progress.tqdm.update", lambda _, count: counts.append(count))
    with network_calls(model.network, 3 * (T - 1), "samples"):
        sample(model, True)
        assert sum(counts) == 3 * (T - 1)
    assert not model.network._forward_hooks


class Failing(Network):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        raise RuntimeError("of the network itself")


def test_an_error_of_the_network_is_the_users() -> None:
    with pytest.raises(RuntimeError, match="of the network itself"):
        sample(gaussian(Failing()), True)
