"""The figures at the end of a run: joined over ranks, and as the text of result.json."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dpm_fast import MLP, DiffusionModel, GaussianDiffusion, evaluation
from dpm_fast.bound import Bound
from dpm_fast.config import EvaluationConfig
from dpm_fast.data import load
from dpm_fast.parallel import Ranks


class _Twins(Ranks):
    """Rank 0 of two that have the same figures."""

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            tensor *= 2


def _bound(num_examples: int) -> Bound:
    return Bound(
        bound_nats=-torch.arange(1.0, num_examples + 1, dtype=torch.float64),
        null_nats=torch.ones(num_examples, dtype=torch.float64),
        per_timestep_nats=torch.tensor([0.0, 2.0, 4.0], dtype=torch.float64),
        prior_nats=torch.zeros(num_examples, dtype=torch.float64),
        mc_variance_nats2=4.0,
        num_dims=2,
        edge="decoder",
        settings={"num_steps": 2},
    )


def test_ranks_join_means_by_their_shares_and_variances_by_the_squares() -> None:
    joined = evaluation._joined(_bound(3), 6, _Twins(0, 2, torch.device("cpu")))
    assert joined.per_timestep_nats.tolist() == [0.0, 2.0, 4.0]
    # The mean of two independent means of variance 4 has variance 2.
    assert joined.mc_variance_nats2 == 2.0
    assert len(joined.bound_nats) == 6


def test_what_is_not_finite_is_null() -> None:
    text = evaluation.to_json({"bound_bits": math.nan, "gap_bits": -math.inf, "edge": "paper"})
    assert json.loads(text, parse_constant=pytest.fail) == {
        "bound_bits": None,
        "gap_bits": None,
        "edge": "paper",
    }


def test_every_rank_has_a_file_of_its_own(tmp_path: Path) -> None:
    process = GaussianDiffusion.from_schedule("erase", 6)
    model, data = DiffusionModel(process, MLP(2, 6)), load("swiss-roll", num_train=1, num_test=9)
    ranks = _Twins(1, 2, torch.device("cpu"))
    config, file = EvaluationConfig(), tmp_path / "sums"
    evaluation.evaluate(model, data, config, "decoder", ranks, partial=file)
    assert [path.name for path in tmp_path.iterdir()] == ["sums.1-of-2"]


def test_a_single_example_has_no_standard_error(recwarn: pytest.WarningsRecorder) -> None:
    figures = evaluation.result(_bound(1), load("swiss-roll"))
    assert figures["gap_bits"] is not None
    assert figures["gap_stderr_bits"] is None
    assert not recwarn.list
