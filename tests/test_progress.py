"""The progress line: counts what is really called, and leaves the network as it was."""

import dataclasses
import sys

import pytest
import torch

from backends import CPU_BACKENDS
from dpm_fast import (
    MLP,
    DiffusionModel,
    GaussianDiffusion,
    Posterior,
    evaluation,
    parallel,
    progress,
    trajectory,
)
from dpm_fast.config import EvaluationConfig
from dpm_fast.data import load

pytest.importorskip("tqdm")

CONFIG = EvaluationConfig(eval_batch_size=4)


@pytest.fixture
def model() -> DiffusionModel:
    process = GaussianDiffusion.from_schedule("erase", 6)
    return DiffusionModel(process, MLP(2, 6, hidden=(4,)), "velocity", variance="logit")


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """(name, calls counted, calls expected) of each line."""
    found: list[tuple[str, int, int]] = []

    class Line(progress.tqdm):
        def close(self) -> None:
            if not self.disable:  # once
                found.append((self.desc, self.n, self.total))
            super().close()

    monkeypatch.setattr(progress, "tqdm", Line)
    return found


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        dataclasses.replace(CONFIG, eval_draws=2),
        dataclasses.replace(CONFIG, eval_edge="paper"),
        dataclasses.replace(CONFIG, eval_timesteps=3),
        dataclasses.replace(CONFIG, eval_timesteps=3, eval_edge="paper"),
    ],
)
def test_a_bound_is_as_many_terms_as_announced(model, lines, config):
    data = load("swiss-roll", num_train=1, num_test=9)
    evaluation.evaluate(model, data, config, "decoder", parallel.ranks("cpu"))
    ((name, counted, total),) = lines
    terms = (config.eval_timesteps or 5) + (config.eval_edge != "paper")
    assert (name, counted, total) == ("bound", *2 * (9 * terms * config.eval_draws,))


@pytest.mark.parametrize("parameterization", ["velocity", "perturbation"])
def test_samples_are_as_many_calls_as_announced(lines, parameterization):
    process = GaussianDiffusion.from_schedule("erase", 6)
    outputs = process.reverse(parameterization).num_outputs
    network = MLP(2, 6, hidden=(4,), num_outputs=outputs)
    model = DiffusionModel(process, network, parameterization)
    samples = evaluation.sample(model, 9, CONFIG, parallel.ranks("cpu"))
    ((name, counted, total),) = lines
    assert (name, counted) == ("samples", total)
    assert torch.equal(samples, model.sample(9))


def test_short_and_silent_work_shows_nothing(model, capsys, monkeypatch):
    with progress.of_samples(model, 3):
        model.sample(3)
    monkeypatch.setattr(progress, "_SECONDS_BEFORE_IT_SHOWS", 0.0)
    with progress.of_samples(model, 3, show=False):
        model.sample(3)
    assert capsys.readouterr().err == ""
    with progress.of_samples(model, 3):
        model.sample(3)
    assert "samples: 100%" in capsys.readouterr().err


def test_a_bound_shows_a_line_where_it_is_asked_to(model, capsys, monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS_BEFORE_IT_SHOWS", 0.0)
    model.bound(torch.zeros(3, 2))
    assert capsys.readouterr().err == ""
    model.bound(torch.zeros(3, 2), progress=True)
    assert "bound: 100%" in capsys.readouterr().err


def test_a_bound_without_tqdm_asks_for_it(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "dpm_fast.progress", None)
    with pytest.raises(ImportError, match=r"progress=True requires tqdm, got none: pip install"):
        model.bound(torch.zeros(3, 2), progress=True)
    model.bound(torch.zeros(3, 2))


@pytest.mark.skipif(not CPU_BACKENDS, reason="needs the native extension")
def test_counting_leaves_whole_trajectories_to_the_kernels(model):
    with progress.of_samples(model, 3):
        assert trajectory.can_launch(model, Posterior(), 3)
