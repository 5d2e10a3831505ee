"""The training loop: resumption, averages, bad gradients, metrics, signals, data parallelism."""

import json
import math
import multiprocessing
import os
import signal
import socket
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dpm_fast
from dpm_fast import checkpoint
from dpm_fast.checkpoint import CheckpointError
from dpm_fast.config import TrainConfig
from dpm_fast.data import Data, DataSpec
from dpm_fast.metrics import read_metrics
from dpm_fast.model import DiffusionModel
from dpm_fast.optimization import learning_rate
from dpm_fast.signals import Interrupted
from dpm_fast.trainer import NonFiniteGradientError, Trainer
from dpm_fast.training_data import epoch_order

NUM_STEPS = 8
CONFIG = TrainConfig(train_steps=12, batch_size=16, log_every=5, checkpoint_every=4)


class Dropout(nn.Module):
    """A network that draws from torch's generator, with a buffer that training changes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 4)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layers(x)


def _model(*, learned: bool = True, dropout: bool = False, data: DataSpec | None = None):
    process = dpm_fast.GaussianDiffusion.from_schedule("log_linear", NUM_STEPS, learned=learned)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Dropout() if dropout else dpm_fast.MLP(2, NUM_STEPS, hidden=(8,))
    return DiffusionModel(process, network, data=data)


def _examples(num_examples: int = 50) -> Tensor:
    return torch.randn(num_examples, 2, generator=torch.Generator().manual_seed(1))


def _trainer(config: TrainConfig = CONFIG, model: DiffusionModel | None = None, **options):
    return Trainer(
        _model() if model is None else model, _examples(), config, progress=False, **options
    )


def _state(trainer: Trainer) -> dict[str, Tensor]:
    """Everything that later steps follow from."""
    trainer._saved_step = None
    states = {"weights": trainer.model.state_dict(), "averaged": trainer.averaged.state_dict()}
    moments = {
        f"{i}/{key}": tensor
        for i, memory in trainer.optimizer.state_dict()["state"].items()
        for key, tensor in memory.items()
    }
    return {
        f"{part}/{name}": tensor.clone()
        for part, tensors in (states | {"moments": moments}).items()
        for name, tensor in tensors.items()
    }


def _assert_equal_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        replace(CONFIG, optimizer="rmsprop", learning_rate_decay="exponential", warmup_steps=3),
        replace(CONFIG, ema_decay=None, max_gradient_norm=0.1, loss="simple"),
        replace(CONFIG, precision="bfloat16"),
    ],
    ids=["adam", "rmsprop", "clipped", "bfloat16"],
)
@pytest.mark.parametrize("stop", [4, 7])
def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(
    tmp_path: Path, config: TrainConfig, stop: int
) -> None:
    through = _trainer(config, out=tmp_path / "through")
    through.fit()
    stopped = _trainer(config, out=tmp_path / "stopped", resume="auto")
    assert stopped.fit(until=stop).stopped_by == "until"
    resumed = _trainer(config, out=tmp_path / "stopped", resume="auto")
    assert resumed.step == stop
    _assert_equal_bits(_state(resumed), _state(stopped))
    result = resumed.fit()
    assert (result.step, result.num_examples_seen) == (12, 12 * 16)
    assert result.stopped_by == "train_steps"
    _assert_equal_bits(_state(resumed), _state(through))

    rows = [read_metrics(tmp_path / run / "metrics.jsonl") for run in ("through", "stopped")]
    for ours, theirs in zip(*rows, strict=True):
        for name in ("step", "num_examples_seen", "loss_bits_per_dim", "gradient_norm"):
            assert ours[name] == theirs[name]
    assert [row["step"] for row in rows[0]] == [5, 10, 12]


def test_dropout_and_running_statistics_resume_too(tmp_path: Path) -> None:
    through = _trainer(model=_model(dropout=True))
    through.fit()
    _trainer(model=_model(dropout=True), out=tmp_path).fit(until=5)
    resumed = _trainer(model=_model(dropout=True), out=tmp_path, resume="auto")
    resumed.fit()
    _assert_equal_bits(_state(resumed), _state(through))
    statistics = "network.layers.1.running_mean"
    assert torch.equal(
        resumed.averaged.state_dict()[statistics], resumed.model.state_dict()[statistics]
    )


def test_training_leaves_the_callers_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    _trainer(model=_model(dropout=True)).fit()
    assert torch.equal(torch.randn(4), expected)


def test_every_kind_of_parameter_is_trained_and_averaged() -> None:
    trainer = _trainer(replace(CONFIG, ema_decay=0.75))
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
        assert not torch.equal(value, dict(_model().named_parameters())[name]), name
        assert not torch.equal(value, averages[name]), name
        assert not averages[name].requires_grad


def test_the_averaged_model_samples_with_its_own_schedule() -> None:
    trainer = _trainer(replace(CONFIG, learning_rate=0.1))
    trainer.fit()
    beta = trainer.averaged.process.tables().beta
    assert not torch.equal(beta, trainer.model.process.tables().beta)
    assert trainer.averaged.reverse.process is trainer.averaged.process


def test_training_raises_the_bound() -> None:
    config = replace(CONFIG, train_steps=200, batch_size=64, learning_rate=1e-2, ema_decay=0.9)
    data = 0.1 * _examples()
    trainer = Trainer(_model(learned=False), data, config, progress=False)
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
    trainer = _trainer(config, model=_sometimes_infinite(3, 4, 12), out=tmp_path)
    trainer.fit(until=2)
    before = _state(trainer)
    trainer.fit(until=4)
    after = _state(trainer)
    for name in before:
        if not name.startswith("averaged/"):
            assert torch.equal(before[name], after[name]), name
    assert trainer.fit().skipped_steps == 3
    assert all(bool(tensor.isfinite().all()) for tensor in _state(trainer).values())
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["skipped_steps"] for row in rows] == [2, 2, 3]
    assert all(math.isfinite(row["loss_bits_per_dim"]) for row in rows)


def test_a_row_without_a_finite_gradient_says_null(tmp_path: Path) -> None:
    trainer = _trainer(model=_sometimes_infinite(*range(1, 13)), out=tmp_path)
    assert trainer.fit().skipped_steps == 12
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text.splitlines()[0])["loss_bits_per_dim"] is None
    assert "NaN" not in text


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
def test_nonfinite_gradients_are_raised_and_never_saved(tmp_path: Path, optimizer: str) -> None:
    config = replace(CONFIG, optimizer=optimizer, nonfinite="raise")
    trainer = _trainer(config, model=_sometimes_infinite(7), out=tmp_path)
    with pytest.raises(NonFiniteGradientError, match="got 1 that were not in the first 8 steps"):
        trainer.fit()
    assert checkpoint.load(tmp_path).step == 4


def test_gradients_are_clipped_to_the_norm() -> None:
    trainer = _trainer(replace(CONFIG, max_gradient_norm=1e-3, train_steps=1, log_every=1))
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


def test_metrics_beyond_the_checkpoint_are_written_again(tmp_path: Path) -> None:
    _trainer(out=tmp_path).fit(until=8)
    file = tmp_path / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    lost = json.loads(lines[-1]) | {"step": 10, "loss_bits_per_dim": -1.0}
    file.write_text("".join([*lines, json.dumps(lost) + "\n", '{"step": 11, "lo']))
    _trainer(out=tmp_path, resume="auto").fit()
    rows = read_metrics(file)
    assert [row["step"] for row in rows] == [5, 10, 12]
    assert rows[1]["loss_bits_per_dim"] != -1.0
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)
    speed = 5 * CONFIG.batch_size / (seconds[1] - seconds[0])
    assert rows[1]["examples_per_second"] == pytest.approx(speed)


def test_a_damaged_metrics_file_is_refused(tmp_path: Path) -> None:
    _trainer(out=tmp_path).fit(until=8)
    (tmp_path / "metrics.jsonl").write_text('{"step": "five"}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1 must be a JSON object"):
        _trainer(out=tmp_path, resume="auto").fit()


def test_only_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    _trainer(out=tmp_path).fit()
    names = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert names == ["checkpoint-00000008", "checkpoint-00000012"]


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    _trainer(out=tmp_path).fit()
    with pytest.raises(CheckpointError, match=r"holds a run already: resume it \(auto\)"):
        _trainer(out=tmp_path)
    assert checkpoint.load(tmp_path).step == 12
    assert _trainer(out=tmp_path, resume="auto").fit().step == 12


def test_resuming_from_an_older_checkpoint(tmp_path: Path) -> None:
    """In the same directory the later checkpoint goes; into another the old one stays."""
    through = _trainer(out=tmp_path / "run")
    through.fit()
    older = tmp_path / "run" / "checkpoint-00000008"
    branch = _trainer(out=tmp_path / "branch", resume=older)
    branch.fit()
    _assert_equal_bits(_state(branch), _state(through))
    assert checkpoint.load(tmp_path / "run").step == 12
    again = _trainer(out=tmp_path / "run", resume=older)
    assert checkpoint.load(tmp_path / "run").step == 8
    again.fit()
    _assert_equal_bits(_state(again), _state(through))


def _with_other_width() -> DiffusionModel:
    process = dpm_fast.GaussianDiffusion.from_schedule("log_linear", NUM_STEPS, learned=True)
    return DiffusionModel(process, dpm_fast.MLP(2, NUM_STEPS, hidden=(9,)))


def _with_other_steps() -> DiffusionModel:
    process = dpm_fast.GaussianDiffusion.from_schedule("log_linear", 9, learned=True)
    return DiffusionModel(process, dpm_fast.MLP(2, 9, hidden=(8,)))


@pytest.mark.parametrize(
    ("make_model", "config", "message"),
    [
        (_with_other_width, CONFIG, r"hidden.* must have shape \(9, 2\), got \(8, 2\)"),
        (_with_other_steps, CONFIG, "is of the model 'gaussian T=8 perturbation logit_scaled', n"),
        (lambda: _model(learned=False), CONFIG, "holds process.schedule_weights, which the model"),
        (_model, replace(CONFIG, optimizer="rmsprop"), "exp_avg, which RMSprop for this model"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_before_anything_changes(
    tmp_path: Path, make_model, config: TrainConfig, message: str
) -> None:
    _trainer(out=tmp_path).fit(until=4)
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message) as caught:
        _trainer(config, model=model, out=tmp_path, resume="auto")
    assert "\n" not in str(caught.value)
    _assert_equal_bits(before, model.state_dict())
    assert checkpoint.load(tmp_path).step == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda moments, name: {name: moments[name][:1]},
            r"must have shape \(8, 2\), got \(1, 2\)",
        ),
        (lambda moments, name: {}, "lacks exp_avg of network.hidden.0.weight"),
        (lambda moments, name: {"other/step": moments[name]}, "holds other/step, which Adam for"),
    ],
)
def test_moments_that_do_not_fit_are_refused(tmp_path: Path, change, message: str) -> None:
    _trainer(out=tmp_path / "run").fit(until=4)
    found = checkpoint.load(tmp_path / "run")
    name = "network.hidden.0.weight/exp_avg"
    moments = found.parts["optimizer"]
    changed = change(moments, name)
    parts = found.parts | {
        "optimizer": {n: t for n, t in moments.items() if n != name or name in changed} | changed
    }
    (tmp_path / "changed").mkdir()
    checkpoint.save(tmp_path / "changed", 4, parts, found.state)
    with pytest.raises(CheckpointError, match=message):
        _trainer(out=tmp_path / "changed", resume="auto")


@pytest.mark.parametrize("part", ["weights", "optimizer", "meter"])
def test_a_checkpoint_without_a_part_is_refused(tmp_path: Path, part: str) -> None:
    _trainer(out=tmp_path).fit(until=4)
    state = tmp_path / "checkpoint-00000004" / "state.json"
    document = json.loads(state.read_text())
    del document["files"][f"{part}.safetensors"]
    state.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=f"lacks {part}.safetensors"):
        _trainer(out=tmp_path, resume="auto")


def test_an_average_can_be_added_to_a_run_without_one(tmp_path: Path) -> None:
    _trainer(replace(CONFIG, ema_decay=None), out=tmp_path).fit(until=4)
    trainer = _trainer(out=tmp_path, resume="auto")
    _assert_equal_bits(trainer.averaged.state_dict(), trainer.model.state_dict())
    assert trainer.fit().step == 12


def _spec() -> DataSpec:
    return DataSpec("points", (2,), "continuous", shift=1.0, scale=2.0)


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
        Trainer(_model(), data, CONFIG)


def test_data_of_another_specification_are_refused() -> None:
    other = DataSpec("points", (2,), "continuous")
    data = Data(_spec(), _examples(), _examples())
    with pytest.raises(ValueError, match="data must have the model's DataSpec"):
        Trainer(_model(data=other), data, CONFIG)


def test_data_reach_the_model_in_its_own_scale() -> None:
    """Data in their units, with a specification, train like the same data scaled by hand."""
    examples, spec = _examples(), _spec()
    in_model_units = Trainer(_model(), spec.to_model(examples), CONFIG, progress=False)
    in_model_units.fit()
    for model, data in (
        (_model(data=spec), examples),
        (_model(data=spec), Data(spec, examples, examples)),
        (_model(), Data(spec, examples, examples)),
    ):
        trainer = Trainer(model, data, CONFIG, progress=False)
        trainer.fit()
        _assert_equal_bits(_state(trainer), _state(in_model_units))


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
        _trainer(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="device cuda needs CUDA, which torch does not find"):
        _trainer(device="cuda")


def test_a_model_without_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="parameter that requires a gradient, got none"):
        _trainer(model=_model().requires_grad_(False))


def test_frozen_parameters_stay() -> None:
    model = _model()
    model.network.readout.requires_grad_(False)
    frozen = {n: p.clone() for n, p in model.network.readout.named_parameters()}
    _trainer(model=model).fit()
    _assert_equal_bits(frozen, dict(model.network.readout.named_parameters()))


def test_an_unwritable_directory_is_noticed_before_training(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(CheckpointError, match=r"cannot make the directory .*file/run"):
        _trainer(out=file / "run")


def test_a_time_limit_stops_with_a_checkpoint(tmp_path: Path) -> None:
    trainer = _trainer(replace(CONFIG, max_seconds=1e-9), out=tmp_path)
    result = trainer.fit()
    assert (result.stopped_by, result.step) == ("max_seconds", 1)
    assert checkpoint.load(tmp_path).step == 1


class SignalAt(nn.Module):
    """A network that sends this process signals in a training step."""

    def __init__(self, step: int, *numbers: signal.Signals) -> None:
        super().__init__()
        self.network, self.step, self.numbers = dpm_fast.MLP(2, NUM_STEPS), step, numbers

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.step -= 1
        if self.step == 0:
            for number in self.numbers:
                signal.raise_signal(number)
        return self.network(x, t)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step_with_a_checkpoint(tmp_path: Path, number) -> None:
    process = dpm_fast.GaussianDiffusion.from_schedule("log_linear", NUM_STEPS)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    trainer = _trainer(model=DiffusionModel(process, SignalAt(3, number)), out=tmp_path)
    with pytest.raises(Interrupted, match=f"{number.name} after step 3; the checkpoint is in"):
        trainer.fit()
    assert checkpoint.load(tmp_path).step == 3
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_second_ctrl_c_acts_at_once(tmp_path: Path) -> None:
    process = dpm_fast.GaussianDiffusion.from_schedule("log_linear", NUM_STEPS)
    network = SignalAt(3, signal.SIGINT, signal.SIGINT)
    trainer = _trainer(model=DiffusionModel(process, network), out=tmp_path)
    with pytest.raises(KeyboardInterrupt) as caught:
        trainer.fit()
    assert not isinstance(caught.value, Interrupted)
    assert checkpoint.load(tmp_path).step == 0


def test_training_works_in_a_thread() -> None:
    results: list[int] = []
    thread = threading.Thread(target=lambda: results.append(_trainer().fit().step))
    thread.start()
    thread.join()
    assert results == [12]


def test_tensorboard_gets_the_metrics(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    _trainer(replace(CONFIG, tensorboard=True), out=tmp_path).fit()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    written = [(event.step, event.value) for event in events.Scalars("loss_bits_per_dim")]
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert written == [(r["step"], pytest.approx(r["loss_bits_per_dim"])) for r in rows]


def test_the_progress_bar_says_loss_and_speed(capfd: pytest.CaptureFixture[str]) -> None:
    Trainer(_model(), _examples(), CONFIG, progress=True).fit()
    shown = capfd.readouterr().err
    assert "12/12" in shown
    assert "bits/dim" in shown
    assert "examples/s" in shown


def _train_in_a_rank(rank: int, port: int, out: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    state = _train_and_resume(out)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    torch.save(state, f"{out}-{rank}.pt")


def _train_and_resume(out: str) -> dict[str, Tensor]:
    config = replace(CONFIG, batch_size=15)
    _trainer(config, _model(learned=False), out=out, resume="auto").fit(until=7)
    trainer = _trainer(config, _model(learned=False), out=out, resume="auto")
    trainer.fit()
    return _state(trainer)


def test_ranks_share_a_batch_without_changing_the_run(tmp_path: Path) -> None:
    """15 examples among 2 ranks: shares of different sizes still average to the batch's mean."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dpm_fast.trainer"])
    processes = [
        context.Process(target=_train_in_a_rank, args=(rank, port, str(tmp_path / "two")))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    one = _train_and_resume(str(tmp_path / "one"))
    for process in processes:
        process.join(timeout=100)
        assert process.exitcode == 0
    first, second = (torch.load(tmp_path / f"two-{r}.pt", weights_only=True) for r in range(2))
    _assert_equal_bits(first, second)
    assert one.keys() == first.keys()
    for name in one:
        # The sum over two shares rounds differently, and Adam divides by tiny moments at first.
        torch.testing.assert_close(first[name], one[name], rtol=1e-3, atol=1e-5)
    rows = [read_metrics(tmp_path / run / "metrics.jsonl") for run in ("one", "two")]
    for ours, theirs in zip(*rows, strict=True):
        assert ours["loss_bits_per_dim"] == pytest.approx(theirs["loss_bits_per_dim"], rel=1e-5)
