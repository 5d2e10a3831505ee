"""The training loop: averages, bad gradients, data, metrics, signals."""

import json
import math
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dpm_fast
from dpm_fast import checkpoint, evaluation
from dpm_fast.checkpoint import CheckpointError
from dpm_fast.config import EvaluationConfig, TrainConfig
from dpm_fast.data import Data, DataSpec
from dpm_fast.metrics import read_metrics, summary
from dpm_fast.model import DiffusionModel
from dpm_fast.optimization import learning_rate
from dpm_fast.restoration import inpaint
from dpm_fast.run import open_run
from dpm_fast.signals import Interrupted
from dpm_fast.trainer import NonFiniteGradientError, Trainer
from dpm_fast.training_data import epoch_order
from small_runs import (
    CONFIG,
    NUM_STEPS,
    SignalAt,
    assert_equal_bits,
    points_spec,
    small_data,
    small_model,
    small_trainer,
    state_of,
)


class DrawsFromTorch(nn.Module):
    """A network that notes what it draws from torch's generator."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.drawn = dpm_fast.MLP(2, NUM_STEPS, hidden=(8,)), []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.drawn.append(torch.rand(()).item())
        return self.network(x, t)


def test_what_a_network_draws_follows_from_the_seed_and_the_step() -> None:
    def drawn(seed: int) -> list[float]:
        process = dpm_fast.GaussianDiffusion.from_schedule("log_linear", NUM_STEPS)
        model = DiffusionModel(process, DrawsFromTorch())
        small_trainer(replace(CONFIG, seed=seed), model=model).fit(until=4)
        return model.network.drawn

    first, other = drawn(0), drawn(1)
    assert drawn(0) == first
    assert len({*first, *other}) == 8


def test_training_leaves_the_callers_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    small_trainer(model=small_model(dropout=True)).fit()
    assert torch.equal(torch.randn(4), expected)


def test_every_kind_of_parameter_is_trained_and_averaged() -> None:
    trainer = small_trainer(replace(CONFIG, ema_decay=0.75))
    names = [name for name, _ in trainer.model.named_parameters()]
    assert "process.schedule_weights" in names
    averages = dict(trainer.averaged.named_parameters())
    expected = {name: average.clone() for name, average in averages.items()}
    for step in range(1, 13):
        trainer.fit(until=step)
        decay = min(0.75, (1 + step) / (10 + step))
        for name, value in trainer.model.named_parameters():
            expected[name].lerp_(value.detach(), 1 - decay)
            assert torch.equal(averages[name], expected[name]), (step, name)
    for name, value in trainer.model.named_parameters():
        assert not torch.equal(value, dict(small_model().named_parameters())[name]), name
        assert not torch.equal(value, averages[name]), name
        assert not averages[name].requires_grad


def test_the_averaged_model_samples_with_its_own_schedule() -> None:
    trainer = small_trainer(replace(CONFIG, learning_rate=0.1))
    trainer.fit()
    beta = trainer.averaged.process.tables().beta
    assert not torch.equal(beta, trainer.model.process.tables().beta)
    assert trainer.averaged.reverse.process is trainer.averaged.process


def test_training_raises_the_bound() -> None:
    config = replace(CONFIG, train_steps=200, batch_size=64, learning_rate=1e-2, ema_decay=0.9)
    data = 0.1 * small_data()
    trainer = Trainer(small_model(learned=False), data, config, progress=False)
    before = trainer.averaged.bound(data).bound_bits.mean()
    trainer.fit()
    assert trainer.averaged.bound(data).bound_bits.mean() > before + 1


@pytest.mark.parametrize("size", [3, 16, 50])
def test_each_epoch_visits_every_example_once_in_an_order_of_its_own(size: int) -> None:
    device = torch.device("cpu")
    whole = epoch_order(7, 0, 4 * size, size, device)
    epochs = whole.view(4, size)
    assert torch.equal(epochs.sort(dim=1).values, torch.arange(size).expand(4, size))
    assert len({tuple(epoch.tolist()) for epoch in epochs}) > 1
    parts = [epoch_order(7, first, first + 1, size, device) for first in range(4 * size)]
    assert torch.equal(torch.cat(parts), whole)
    # A step looks at its own part of an epoch: the rest is not even copied.
    addresses = {
        epoch_order(7, i, i + 1, size, device).untyped_storage().data_ptr() for i in (0, 1)
    }
    assert len(addresses) == 1
    if size > 3:
        assert not torch.equal(epoch_order(8, 0, size, size, device), whole[:size])


class NotFiniteAt(nn.Module):
    """A network whose outputs are infinite in the given training steps."""

    def __init__(self, *steps: int) -> None:
        super().__init__()
        self.network, self.steps, self.step = dpm_fast.MLP(2, NUM_STEPS, hidden=(8,)), steps, 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.step += 1
        return self.network(x, t) * (math.inf if self.step in self.steps else 1.0)


def _sometimes_infinite(*steps: int) -> DiffusionModel:
    process = dpm_fast.GaussianDiffusion.from_schedule("log_linear", NUM_STEPS)
    return DiffusionModel(process, NotFiniteAt(*steps))


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
def test_nonfinite_gradients_are_skipped_and_counted(tmp_path: Path, optimizer: str) -> None:
    config = replace(CONFIG, optimizer=optimizer, nonfinite="skip")
    trainer = small_trainer(config, model=_sometimes_infinite(3, 4, 12), out=tmp_path)
    trainer.fit(until=2)
    before = state_of(trainer)
    trainer.fit(until=4)
    after = state_of(trainer)
    for name in before:
        if not name.startswith("averaged/"):
            assert torch.equal(before[name], after[name]), name
    assert trainer.fit().skipped_steps == 3
    assert all(bool(tensor.isfinite().all()) for tensor in state_of(trainer).values())
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["skipped_steps"] for row in rows] == [2, 2, 3]
    assert all(math.isfinite(row["loss_bits_per_dim"]) for row in rows)


def test_a_loss_that_is_no_code_length_is_not_in_bits(tmp_path: Path) -> None:
    config = replace(CONFIG, loss="hybrid")
    small_trainer(config, out=tmp_path).fit()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert all("loss_bits_per_dim" not in row and row["loss"] > 0 for row in rows)
    assert summary(rows[0]).startswith(f"loss {rows[0]['loss']:.4f}, ")


def test_a_row_without_a_finite_gradient_says_null(tmp_path: Path) -> None:
    trainer = small_trainer(model=_sometimes_infinite(*range(1, 12)), out=tmp_path)
    assert trainer.fit().skipped_steps == 11
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text.splitlines()[0])["loss_bits_per_dim"] is None
    assert "NaN" not in text


def test_a_run_without_a_single_finite_gradient_is_no_success(tmp_path: Path) -> None:
    trainer = small_trainer(model=_sometimes_infinite(*range(1, 13)), out=tmp_path)
    message = "gradients must be finite, got none that was in 12 steps: nothing was trained"
    with pytest.raises(NonFiniteGradientError, match=message):
        trainer.fit()


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
def test_nonfinite_gradients_are_raised_and_never_saved(tmp_path: Path, optimizer: str) -> None:
    config = replace(CONFIG, optimizer=optimizer, nonfinite="raise")
    trainer = small_trainer(config, model=_sometimes_infinite(7), out=tmp_path)
    with pytest.raises(NonFiniteGradientError, match="got 1 that were not in the first 8 steps"):
        trainer.fit()
    assert checkpoint.load(tmp_path).step == 4


def test_gradients_are_clipped_to_the_norm() -> None:
    trainer = small_trainer(replace(CONFIG, max_gradient_norm=1e-3, train_steps=1, log_every=1))
    trainer.fit()
    gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)


def test_learning_rates() -> None:
    config = TrainConfig(
        train_steps=100,
        learning_rate=2.0,
        final_learning_rate=0.1,
        learning_rate_decay="cosine",
    )
    assert learning_rate(config, 0) == 2.0
    assert learning_rate(config, 50) == pytest.approx(1.1)
    assert learning_rate(config, 100) == pytest.approx(0.2)
    constant = replace(config, learning_rate_decay="constant", warmup_steps=3)
    assert [learning_rate(constant, step) for step in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]
    exponential = replace(config, learning_rate_decay="exponential")
    assert learning_rate(exponential, 50) == pytest.approx(2 * math.sqrt(0.1))
    assert learning_rate(exponential, 1000) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (torch.zeros(0, 2), ValueError, "data must have at least one example, got none"),
        (torch.zeros(5, 3), ValueError, r"data must have shape \(N, 2\), got \(5, 3\)"),
        (torch.tensor([[0.0, torch.nan]]), ValueError, "data must be finite, got NaN or infinity"),
        (torch.tensor([[0.0, torch.inf]]), ValueError, "data must be finite, got NaN or infinity"),
        ([[0.0, 1.0]], TypeError, "data must be a Data or a tensor, got list"),
    ],
)
def test_data_that_cannot_be_trained_on_are_refused(data, error, message: str) -> None:
    with pytest.raises(error, match=message):
        Trainer(small_model(), data, CONFIG)


@pytest.mark.parametrize(
    ("spec", "value", "message"),
    [
        (DataSpec("levels", (2,), "discrete", levels=17), 200, "grid of 17 levels"),
        (DataSpec("bits", (2,), "binary"), 2, "must be 0 or 1 for a binomial process"),
    ],
)
def test_values_are_looked_at_once(spec, value, message, monkeypatch) -> None:
    """Before training, on any device."""
    process, num_outputs = dpm_fast.GaussianDiffusion.from_schedule("log_linear", NUM_STEPS), 2
    if spec.kind == "binary":
        process, num_outputs = dpm_fast.BinomialDiffusion(NUM_STEPS), 1
    network = dpm_fast.MLP(2, NUM_STEPS, num_outputs=num_outputs, hidden=(8,))
    model = DiffusionModel(process, network, data=spec)
    data = torch.ones(5000, 2, dtype=torch.uint8)
    data[4999, 1] = value
    with pytest.raises(ValueError, match=message):
        Trainer(model, data, CONFIG)
    trainer = Trainer(model, data[:4999], CONFIG, progress=False)
    check_data = DiffusionModel.check_data
    asked: list[bool | None] = []

    def record(self: DiffusionModel, x_0: torch.Tensor, *, values: bool | None = None) -> None:
        asked.append(values)
        check_data(self, x_0, values=values)

    monkeypatch.setattr(DiffusionModel, "check_data", record)
    trainer.fit(until=2)
    assert asked == [False, False]


def test_a_model_in_double_precision_trains_and_is_evaluated() -> None:
    examples, spec = small_data(), points_spec()
    data = Data(spec, examples, examples)
    trainer = Trainer(small_model(data=spec).double(), data, CONFIG, progress=False)
    trainer.fit()
    assert all(p.dtype == torch.float64 for p in trainer.averaged.parameters())
    config, here = EvaluationConfig(eval_examples=4, eval_timesteps=2), trainer.ranks
    bound = evaluation.evaluate(trainer.averaged, data, config, "decoder", here)
    assert bool(bound.bound_nats.isfinite().all())
    sampled = evaluation.sample(trainer.averaged, 2, config, here)
    assert sampled.dtype == torch.float64
    assert inpaint(trainer.averaged, examples[:2]).restored.shape == (2, 2)


def test_data_of_another_specification_are_refused() -> None:
    other = DataSpec("points", (2,), "continuous")
    data = Data(points_spec(), small_data(), small_data())
    with pytest.raises(ValueError, match="data must have the model's DataSpec"):
        Trainer(small_model(data=other), data, CONFIG)


def test_data_reach_the_model_in_its_own_scale() -> None:
    """Data in their units, with a specification, train like the same data scaled by hand."""
    examples, spec = small_data(), points_spec()
    in_model_units = Trainer(small_model(), spec.to_model(examples), CONFIG, progress=False)
    in_model_units.fit()
    for model, data in (
        (small_model(data=spec), examples),
        (small_model(data=spec), Data(spec, examples, examples)),
    ):
        trainer = Trainer(model, data, CONFIG, progress=False)
        trainer.fit()
        assert_equal_bits(state_of(trainer), state_of(in_model_units))
    with pytest.raises(ValueError, match=r"the model must be made with data=data\.spec"):
        Trainer(small_model(), Data(spec, examples, examples), CONFIG, progress=False)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"resume": "auto"}, ValueError, 'resume="auto" requires out'),
        ({"resume": "absent"}, CheckpointError, "absent does not exist"),
        ({"device": "abacus"}, ValueError, "device must be .* got 'abacus'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, error, message: str) -> None:
    with pytest.raises(error, match=message):
        small_trainer(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(
        ValueError, match="device must be one of this machine, got cuda:0: Torch not"
    ):
        small_trainer(device="cuda")


@pytest.mark.parametrize("device", ["meta", "mps", "xpu"])
def test_a_device_that_cannot_compute_is_refused(device: str) -> None:
    with pytest.raises(ValueError, match=f"device must be one .* got {device}") as caught:
        small_trainer(device=device)
    assert len(str(caught.value)) < 200


def test_a_model_without_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="parameter that requires a gradient, got none"):
        small_trainer(model=small_model().requires_grad_(False))


def test_frozen_parameters_stay() -> None:
    model = small_model()
    model.network.readout.requires_grad_(False)
    frozen = {n: p.clone() for n, p in model.network.readout.named_parameters()}
    small_trainer(model=model).fit()
    assert_equal_bits(frozen, dict(model.network.readout.named_parameters()))


def test_a_trainers_directory_is_opened_by_the_same_trainer(tmp_path: Path) -> None:
    trained = small_trainer(out=tmp_path)
    trained.fit()
    for directory in (tmp_path, str(tmp_path), tmp_path / "checkpoint-00000012"):
        with pytest.raises(ValueError, match=r"was written by Trainer, not by .*resume='auto'$"):
            open_run(directory, "cpu")
    again = small_trainer(out=tmp_path, resume="auto")
    assert_equal_bits(state_of(again), state_of(trained))


def test_a_time_limit_stops_with_a_checkpoint(tmp_path: Path) -> None:
    trainer = small_trainer(replace(CONFIG, max_seconds=1e-9), out=tmp_path)
    result = trainer.fit()
    assert (result.stopped_by, result.step) == ("max_seconds", 1)
    assert checkpoint.load(tmp_path).step == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step_with_a_checkpoint(tmp_path: Path, number) -> None:
    process = dpm_fast.GaussianDiffusion.from_schedule("log_linear", NUM_STEPS)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    trainer = small_trainer(model=DiffusionModel(process, SignalAt(3, number)), out=tmp_path)
    with pytest.raises(Interrupted, match=f"{number.name} after step 3; the checkpoint is in"):
        trainer.fit()
    assert checkpoint.load(tmp_path).step == 3
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_second_ctrl_c_acts_at_once(tmp_path: Path) -> None:
    process = dpm_fast.GaussianDiffusion.from_schedule("log_linear", NUM_STEPS)
    network = SignalAt(3, signal.SIGINT, signal.SIGINT)
    trainer = small_trainer(model=DiffusionModel(process, network), out=tmp_path)
    with pytest.raises(KeyboardInterrupt) as caught:
        trainer.fit()
    assert not isinstance(caught.value, Interrupted)
    assert checkpoint.load(tmp_path).step == 0


def test_training_works_in_a_thread() -> None:
    results: list[int] = []
    thread = threading.Thread(target=lambda: results.append(small_trainer().fit().step))
    thread.start()
    thread.join()
    assert results == [12]


def test_tensorboard_gets_the_metrics(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    small_trainer(replace(CONFIG, tensorboard=True), out=tmp_path).fit()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    written = [(event.step, event.value) for event in events.Scalars("loss_bits_per_dim")]
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert written == [(r["step"], pytest.approx(r["loss_bits_per_dim"])) for r in rows]


def test_the_progress_bar_says_loss_and_speed(capfd: pytest.CaptureFixture[str]) -> None:
    Trainer(small_model(), small_data(), CONFIG, progress=True).fit()
    shown = capfd.readouterr().err
    assert "12/12" in shown
    assert "bits/dim" in shown
    assert "examples/s" in shown
