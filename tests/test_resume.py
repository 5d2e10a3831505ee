"""Runs that are stopped, resumed, branched, damaged, or written by two."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dpm_fast
from dpm_fast import checkpoint
from dpm_fast.checkpoint import CheckpointError
from dpm_fast.config import TrainConfig
from dpm_fast.identity import identity
from dpm_fast.metrics import read_metrics
from dpm_fast.model import DiffusionModel
from small_runs import (
    CONFIG,
    NUM_STEPS,
    assert_equal_bits,
    points_spec,
    small_model,
    small_trainer,
    state_of,
)


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
    through = small_trainer(config, out=tmp_path / "through")
    through.fit()
    stopped = small_trainer(config, out=tmp_path / "stopped", resume="auto")
    assert stopped.fit(until=stop).stopped_by == "until"
    resumed = small_trainer(config, out=tmp_path / "stopped", resume="auto")
    assert resumed.step == stop
    assert_equal_bits(state_of(resumed), state_of(stopped))
    result = resumed.fit()
    assert (result.step, result.num_examples_seen) == (12, 12 * 16)
    assert result.stopped_by == "train_steps"
    assert_equal_bits(state_of(resumed), state_of(through))

    rows = [read_metrics(tmp_path / run / "metrics.jsonl") for run in ("through", "stopped")]
    for ours, theirs in zip(*rows, strict=True):
        loss = "loss_bits_per_dim" if config.loss == "bound" else "loss"
        for name in ("step", "num_examples_seen", loss, "gradient_norm"):
            assert ours[name] == theirs[name]
    assert [row["step"] for row in rows[0]] == [5, 10, 12]


def test_dropout_and_running_statistics_resume_too(tmp_path: Path) -> None:
    through = small_trainer(model=small_model(dropout=True))
    through.fit()
    small_trainer(model=small_model(dropout=True), out=tmp_path).fit(until=5)
    resumed = small_trainer(model=small_model(dropout=True), out=tmp_path, resume="auto")
    resumed.fit()
    assert_equal_bits(state_of(resumed), state_of(through))
    statistics = "network.layers.1.running_mean"
    assert torch.equal(
        resumed.averaged.state_dict()[statistics], resumed.model.state_dict()[statistics]
    )


def test_metrics_beyond_the_checkpoint_are_written_again(tmp_path: Path) -> None:
    small_trainer(out=tmp_path).fit(until=8)
    file = tmp_path / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    lost = json.loads(lines[-1]) | {"step": 10, "loss_bits_per_dim": -1.0}
    file.write_text("".join([*lines, json.dumps(lost) + "\n", '{"step": 11, "lo']))
    small_trainer(out=tmp_path, resume="auto").fit()
    rows = read_metrics(file)
    assert [row["step"] for row in rows] == [5, 10, 12]
    assert rows[1]["loss_bits_per_dim"] != -1.0
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)
    speed = 5 * CONFIG.batch_size / (seconds[1] - seconds[0])
    assert rows[1]["examples_per_second"] == pytest.approx(speed)


def test_a_damaged_metrics_file_is_refused(tmp_path: Path) -> None:
    small_trainer(out=tmp_path).fit(until=8)
    (tmp_path / "metrics.jsonl").write_text('{"step": "five"}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1 must be a JSON object"):
        small_trainer(out=tmp_path, resume="auto").fit()


def test_only_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    small_trainer(out=tmp_path).fit()
    names = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert names == ["checkpoint-00000008", "checkpoint-00000012"]


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    small_trainer(out=tmp_path).fit()
    with pytest.raises(CheckpointError, match=r"holds a run already: resume it \(auto, or"):
        small_trainer(out=tmp_path)
    assert checkpoint.load(tmp_path).step == 12
    assert small_trainer(out=tmp_path, resume="auto").fit().step == 12


def test_resuming_from_an_older_checkpoint(tmp_path: Path) -> None:
    """In the same directory the later checkpoint goes; into another the old one stays."""
    through = small_trainer(out=tmp_path / "run")
    through.fit()
    older = tmp_path / "run" / "checkpoint-00000008"
    branch = small_trainer(out=tmp_path / "branch", resume=older)
    branch.fit()
    assert_equal_bits(state_of(branch), state_of(through))
    assert checkpoint.load(tmp_path / "run").step == 12
    again = small_trainer(out=tmp_path / "run", resume=older)
    assert again.fit(until=8).step == 8
    assert checkpoint.load(tmp_path / "run").step == 12  # nothing is lost before a new step
    again.fit(until=9)
    names = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert names == ["checkpoint-00000008", "checkpoint-00000009"]
    again.fit()
    assert_equal_bits(state_of(again), state_of(through))


def test_a_run_does_not_go_on_in_the_directory_of_another(tmp_path: Path) -> None:
    small_trainer(out=tmp_path / "long").fit()
    small_trainer(out=tmp_path / "short").fit(until=4)
    for source in (tmp_path / "short", tmp_path / "short" / "checkpoint-00000004"):
        with pytest.raises(CheckpointError, match="long holds a run already: resume it"):
            small_trainer(out=tmp_path / "long", resume=source)
    assert checkpoint.load(tmp_path / "long").step == 12
    assert read_metrics(tmp_path / "long" / "metrics.jsonl")[-1]["step"] == 12


def test_a_run_with_a_damaged_pointer_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    small_trainer(out=tmp_path).fit(until=8)
    (tmp_path / "latest").write_text("checkpoint-00000099")
    with pytest.raises(CheckpointError, match="names checkpoint-00000099, which is missing"):
        small_trainer(out=tmp_path, resume="auto")
    assert small_trainer(out=tmp_path, resume=tmp_path / "checkpoint-00000008").fit().step == 12
    assert checkpoint.load(tmp_path).step == 12


def test_two_runs_do_not_write_one_directory(tmp_path: Path) -> None:
    first, second = small_trainer(out=tmp_path), small_trainer(out=tmp_path)
    refused = pytest.raises(CheckpointError, match="must have one writer, got a second one")
    with checkpoint.locked(tmp_path), refused:
        second.fit()
    first.fit(until=4)
    message = "with the latest checkpoint none, got checkpoint-00000004: another run wrote there"
    with pytest.raises(CheckpointError, match=message):
        second.fit()
    first.fit()
    assert checkpoint.load(tmp_path).step == 12


def _with_other_width() -> DiffusionModel:
    process = dpm_fast.GaussianDiffusion.from_schedule("log_linear", NUM_STEPS, learned=True)
    return DiffusionModel(process, dpm_fast.MLP(2, NUM_STEPS, hidden=(9,)))


def _with_other_steps() -> DiffusionModel:
    process = dpm_fast.GaussianDiffusion.from_schedule("log_linear", 9, learned=True)
    return DiffusionModel(process, dpm_fast.MLP(2, 9, hidden=(8,)))


def _with(schedule: str, parameterization: str | None = None, **options) -> DiffusionModel:
    process = dpm_fast.GaussianDiffusion.from_schedule(schedule, NUM_STEPS, learned=True)
    network = dpm_fast.MLP(2, NUM_STEPS, hidden=(8,))
    return DiffusionModel(process, network, parameterization, **options)


@pytest.mark.parametrize(
    ("make_model", "config", "message"),
    [
        (_with_other_width, CONFIG, r"hidden.* must have shape \(9, 2\), got \(8, 2\)"),
        (_with_other_steps, CONFIG, "is of a model with num_steps 8, not 9"),
        (lambda: _with("erase"), CONFIG, r"with betas_sha256 '\w+', not '\w+'"),
        (lambda: _with("log_linear", parameterization="decay"), CONFIG, "with parameterization '"),
        (lambda: _with("log_linear", variance="logit"), CONFIG, "with variance 'logit_scaled', n"),
        (lambda: _with("log_linear", t_base=0), CONFIG, "with t_base 1, not 0"),
        (lambda: _with("log_linear", data=points_spec()), CONFIG, "with data None, not {"),
        (
            lambda: small_model(learned=False),
            CONFIG,
            "holds process.schedule_weights, which the model",
        ),
        (
            small_model,
            replace(CONFIG, optimizer="rmsprop"),
            "exp_avg, which RMSprop for this model",
        ),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_before_anything_changes(
    tmp_path: Path, make_model, config: TrainConfig, message: str
) -> None:
    small_trainer(out=tmp_path).fit(until=4)
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message) as caught:
        small_trainer(config, model=model, out=tmp_path, resume="auto")
    assert "\n" not in str(caught.value)
    assert_equal_bits(before, model.state_dict())
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
    small_trainer(out=tmp_path / "run").fit(until=4)
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
        small_trainer(out=tmp_path / "changed", resume="auto")


@pytest.mark.parametrize("part", ["weights", "optimizer", "meter"])
def test_a_checkpoint_without_a_part_is_refused(tmp_path: Path, part: str) -> None:
    small_trainer(out=tmp_path).fit(until=4)
    state = tmp_path / "checkpoint-00000004" / "state.json"
    document = json.loads(state.read_text())
    del document["files"][f"{part}.safetensors"]
    state.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=f"lacks {part}.safetensors"):
        small_trainer(out=tmp_path, resume="auto")


def test_an_average_can_be_added_to_a_run_without_one(tmp_path: Path) -> None:
    small_trainer(replace(CONFIG, ema_decay=None), out=tmp_path).fit(until=4)
    trainer = small_trainer(out=tmp_path, resume="auto")
    assert_equal_bits(trainer.averaged.state_dict(), trainer.model.state_dict())
    assert trainer.fit().step == 12


def test_an_unwritable_directory_is_noticed_before_training(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(CheckpointError, match=r"cannot make the directory .*file/run"):
        small_trainer(out=file / "run")


def test_prior_rate_and_clamp_are_part_of_a_models_identity() -> None:
    def bits(prior_rate: float) -> DiffusionModel:
        process = dpm_fast.BinomialDiffusion(NUM_STEPS, prior_rate)
        return DiffusionModel(process, dpm_fast.MLP(2, NUM_STEPS, num_outputs=1))

    def clamped(clamp: tuple[float, float] | None) -> DiffusionModel:
        process = dpm_fast.GaussianDiffusion.from_schedule("erase", NUM_STEPS)
        return DiffusionModel(process, dpm_fast.MLP(2, NUM_STEPS, num_outputs=1), "x0", clamp=clamp)

    assert identity(bits(0.2), None) == identity(bits(0.2), None) != identity(bits(0.5), None)
    assert identity(clamped((-1, 1)), None) != identity(clamped(None), None)
