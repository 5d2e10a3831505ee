"""Importance sampling of timesteps: probabilities, weights, moments, and what it is good for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dpm_fast.checkpoint import CheckpointError
from dpm_fast.config import TrainConfig
from dpm_fast.gaussian import GaussianDiffusion
from dpm_fast.importance import FLOOR, WARM_UP, WINDOW, Importance
from dpm_fast.model import DiffusionModel
from dpm_fast.networks import MLP
from dpm_fast.trainer import Trainer

NUM_STEPS = 20


def known(second_moments: Tensor) -> Importance:
    importance = Importance(len(second_moments) - 1)
    importance.moments[0] = WINDOW
    importance.moments[1] = second_moments
    return importance


def test_probabilities_follow_the_moments_above_a_floor() -> None:
    moments = torch.zeros(NUM_STEPS + 1, dtype=torch.float64)
    moments[2:5] = torch.tensor([1.0, 4.0, 25.0])
    importance = known(moments)
    for first in (1, 2):
        share = importance.masses(first).double()
        share /= share.sum()
        n = NUM_STEPS - first + 1
        expected = torch.full((n,), FLOOR / n, dtype=torch.float64)
        expected[2 - first : 5 - first] += (1 - FLOOR) * torch.tensor([1.0, 2.0, 5.0]) / 8
        torch.testing.assert_close(share, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("num_strata", [1, 3, 7])
def test_timesteps_have_their_probabilities_and_weights_undo_them(num_strata: int) -> None:
    importance = known(10 ** torch.linspace(4, -4, NUM_STEPS + 1, dtype=torch.float64))
    share = importance.masses(2).double()
    share /= share.sum()
    ids, count = torch.arange(30_000) + 12345, torch.zeros(NUM_STEPS - 1)
    for stratum in range(num_strata):
        t, weight = importance.timesteps(4, ids, 2, stratum, num_strata)
        torch.testing.assert_close(weight, 1 / share[t - 2], rtol=1e-6, atol=0)
        count += torch.bincount(t - 2, minlength=NUM_STEPS - 1)
        assert (t.diff()[:100] != 0).any() or num_strata > 1
    # The Weyl sequence strays from N p by less than 3 in each stratum.
    assert (count - len(ids) * num_strata * share).abs().max() < 3 * num_strata
    part, _ = importance.timesteps(4, ids[50:60], 2)
    whole, _ = importance.timesteps(4, ids, 2)
    assert torch.equal(part, whole[50:60])


def test_every_timestep_is_equally_likely_until_all_have_been_seen() -> None:
    importance = Importance(NUM_STEPS)
    t = torch.arange(1, NUM_STEPS + 1)
    for num_seen in range(WARM_UP + 1):
        assert (importance.masses(1).unique().numel() == 1) == (num_seen < WARM_UP)
        importance.record(t, t.double())
        importance.update()


def test_terms_that_are_not_finite_or_all_zero_do_no_harm() -> None:
    importance = Importance(2)
    for _ in range(WARM_UP):
        importance.record(
            torch.tensor([1, 2, 2, 2]), torch.tensor([3.0, 4.0, torch.nan, torch.inf])
        )
        importance.update()
    assert importance.moments[:, 1:].tolist() == [[WARM_UP] * 2, [9.0, 16.0]]
    nothing = known(torch.zeros(3, dtype=torch.float64))
    assert nothing.masses(1).unique().numel() == 1


def test_moments_are_means_of_the_latest_squares() -> None:
    importance, t = Importance(3), torch.tensor([2, 2, 3])
    importance.record(t, torch.tensor([1.0, 3.0, 2.0]))
    assert not importance.moments.any()
    importance.update()
    assert not importance.recorded.any()
    assert importance.moments.tolist() == [[0, 0, 2, 1], [0, 0, 5, 4]]
    importance.record(t, torch.tensor([5.0, 5.0, 4.0]))
    importance.update()
    assert importance.moments.tolist() == [[0, 0, 4, 2], [0, 0, 15, 10]]
    importance.moments[0] = 10 * WINDOW
    importance.record(torch.tensor([2]), torch.tensor([0.0]))
    importance.update()
    assert importance.moments[1, 2].item() == pytest.approx(15 * (1 - 1 / (WINDOW + 1)))


def test_records_of_several_processes_add_up() -> None:
    t, nats = torch.arange(60) % NUM_STEPS + 1, torch.arange(60).double() / 4
    whole, parts = Importance(NUM_STEPS), [Importance(NUM_STEPS) for _ in range(2)]
    whole.record(t, nats)
    for part, begin, end in zip(parts, (0, 17), (17, 60), strict=True):
        part.record(t[begin:end], nats[begin:end])
    assert torch.equal(parts[0].recorded + parts[1].recorded, whole.recorded)


def test_losses_vary_less() -> None:
    torch.manual_seed(0)
    process = GaussianDiffusion.from_schedule("log_linear", NUM_STEPS)
    model = DiffusionModel(process, MLP(2, NUM_STEPS, hidden=(8,)))
    x_0, ids = torch.randn(64, 2), torch.arange(64)
    importance = Importance(NUM_STEPS)

    def spread(importance: Importance | None) -> float:
        losses = [
            model.loss(x_0, seed=seed, example_ids=ids * 31, importance=importance)
            for seed in range(60)
        ]
        return torch.stack(losses).std().item()

    with torch.no_grad():
        for step in range(20):
            model.loss(x_0, seed=1000, example_ids=ids + 64 * step, importance=importance)
            importance.update()
        before = importance.moments.clone()
        assert spread(importance) < 0.8 * spread(None)
        assert torch.equal(importance.moments, before)


def test_only_the_bound_is_sampled_by_importance() -> None:
    process = GaussianDiffusion.from_schedule("erase", NUM_STEPS)
    model = DiffusionModel(process, MLP(2, NUM_STEPS, hidden=(8,)), "epsilon", variance="learned")
    for kind in ("simple", "hybrid"):
        with pytest.raises(ValueError, match=f"requires the loss kind 'bound', got '{kind}'"):
            model.loss(
                torch.zeros(3, 2),
                seed=0,
                example_ids=torch.arange(3),
                kind=kind,
                importance=Importance(NUM_STEPS),
            )


def trainer(**options: Any) -> Trainer:
    torch.manual_seed(0)
    process = GaussianDiffusion.from_schedule("log_linear", 8)
    model = DiffusionModel(process, MLP(2, 8, hidden=(8,)))
    config = TrainConfig(train_steps=12, batch_size=16, timesteps="importance")
    return Trainer(model, torch.randn(50, 2), config, progress=False, device="cpu", **options)


def test_a_resumed_run_knows_the_moments(tmp_path: Path) -> None:
    through = trainer()
    through.fit()
    assert through.importance is not None
    assert through.importance.masses(1).unique().numel() > 1
    stopped = trainer(out=tmp_path)
    stopped.fit(until=7)
    resumed = trainer(out=tmp_path, resume="auto")
    assert resumed.importance is not None and stopped.importance is not None
    assert torch.equal(resumed.importance.moments, stopped.importance.moments)
    resumed.fit()
    assert torch.equal(resumed.importance.moments, through.importance.moments)
    for ours, theirs in zip(resumed.model.parameters(), through.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_moments_begin_where_a_run_had_none(tmp_path: Path) -> None:
    """A run may change to importance sampling; moments of another shape are refused."""
    first = trainer(out=tmp_path)
    first.importance = None
    first.fit(until=3)
    later = trainer(out=tmp_path, resume="auto")
    assert later.importance is not None and not later.importance.moments.any()
    later.fit(until=5)
    assert later.importance.moments[0].sum() == 2 * 16
    later.importance.moments = torch.zeros(2, 5, dtype=torch.float64)
    later.step = 6
    later._save()
    with pytest.raises(CheckpointError, match=r"moments must have shape \(2, 9\), got \(2, 5\)"):
        trainer(out=tmp_path, resume="auto")


def test_importance_is_for_the_bound() -> None:
    for options in ({"loss": "simple"}, {"loss": "hybrid"}):
        with pytest.raises(ValueError, match="timesteps must be 'even', or with the loss 'bound'"):
            TrainConfig(timesteps="importance", **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"timesteps must be .*, got 'all'"):
        TrainConfig(timesteps="all")  # type: ignore[arg-type]
