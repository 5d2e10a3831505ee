"""The figures that a newcomer is promised, by whole runs of the command line's own presets."""

import json
from pathlib import Path

import numpy as np
import pytest

from dpm_fast.cli import main

pytest.importorskip("tyro")
pytest.importorskip("matplotlib")
pytestmark = pytest.mark.slow


def _train(dataset: str, out: Path, *options: str) -> dict:
    assert main(["train", dataset, "--out", str(out), *options]) == 0
    return json.loads((out / "result.json").read_text())


def test_the_demo_comes_close_to_the_true_likelihood(tmp_path):
    result = _train("swiss-roll", tmp_path)
    assert result["edge"] == "decoder"
    assert result["limit_bits"] == pytest.approx(-1.391, abs=1e-3)
    assert 0 < result["gap_bits"] < 0.25
    assert result["train_seconds"] < 600  # two minutes on two cores that do nothing else


def test_the_heartbeat_is_learned_almost_exactly(tmp_path):
    result = _train("heartbeat", tmp_path)
    assert result["edge"] == "decoder"
    assert -2.34 < result["bound_bits"] < result["limit_bits"] + 0.01
    assert result["valid_fraction"] >= 0.995
    assert result["train_seconds"] < 900  # four minutes on two cores that do nothing else


def test_digits_beat_the_null_model_and_keep_known_pixels(tmp_path):
    result = _train("digits", tmp_path, "--train-steps", "1000")  # a fifth of the preset
    assert result["bound_bits"] > result["null_bits"] + 100  # measured: 143
    assert main(["inpaint", str(tmp_path), "--num", "4"]) == 0
    found = np.load(tmp_path / "inpainted.npz")
    assert (found["restored"] == found["true"])[found["known"]].all()
