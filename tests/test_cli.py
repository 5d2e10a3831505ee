"""The command line: whole miniature runs, and one sentence for every wrong input."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dpm_fast.cli import main

pytest.importorskip("tyro")
pytest.importorskip("matplotlib")

SMALL = ["--train-steps", "20", "--batch-size", "32", "--num-steps", "10", "--num-samples", "8"]
FIELDS = {
    "dataset", "bound_bits", "edge", "stderr_bits", "limit_bits", "null_bits", "bits_per_dim",
    "num_steps", "train_seconds", "examples_per_second", "seed", "versions",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained miniature model of binary-free, small images."""
    out = tmp_path_factory.mktemp("runs") / "images"
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8)
    source = out.parent / "noise.npy"
    np.save(source, images)
    options = ["--dense-width", "8", "--conv-channels", "4", "--eval-timesteps", "3"]
    assert main(["train", str(source), "--out", str(out), *SMALL, *options]) == 0
    return out


@pytest.mark.parametrize("dataset", ["swiss-roll", "heartbeat"])
def test_train_ends_with_a_result_and_pictures(dataset, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", dataset, "--out", str(out), *SMALL, "--eval-examples", "50"]) == 0
    result = json.loads((out / "result.json").read_text())
    assert result.keys() >= FIELDS
    assert result["dataset"] == dataset
    assert result["num_steps"] == 10
    assert result["bound_bits"] < result["limit_bits"] + 5 * result["stderr_bits"]
    assert "limit, E log2 p" in capsys.readouterr().out
    for name in ("samples", "trajectory", "bound_per_timestep", "loss"):
        assert (out / f"{name}.png").stat().st_size > 1000


def test_images_end_with_restorations_too(run):
    assert {"denoised.png", "inpainted.png"} <= {path.name for path in run.iterdir()}
    result = json.loads((run / "result.json").read_text())
    assert result["bits_per_dim"] == pytest.approx(-result["bound_bits"] / 64)
    assert result["bits_per_dim"] > 7  # grey levels that are noise cost 8 bits


def test_sample_is_a_function_of_its_seed(run, tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert (
            main(["sample", str(run), "--num", "3", "--seed", seed, "--out", str(tmp_path / name)])
            == 0
        )
    a, b, c = (np.load(tmp_path / name / "samples.npy") for name in "abc")
    assert a.shape == (3, 1, 8, 8)
    assert a.dtype == np.uint8
    assert (a == b).all()
    assert (a != c).any()


def test_inpaint_keeps_known_pixels(run, tmp_path):
    assert main(["inpaint", str(run), "--num", "3", "--out", str(tmp_path)]) == 0
    found = np.load(tmp_path / "inpainted.npz")
    assert (found["restored"] == found["true"])[found["known"]].all()
    assert (found["restored"] != found["true"])[~found["known"]].any()


def test_denoise_and_bound(run, tmp_path, capsys):
    assert main(["denoise", str(run), "--num", "2", "--out", str(tmp_path)]) == 0
    assert np.load(tmp_path / "denoised.npz")["restored"].shape == (2, 1, 8, 8)
    assert main(["bound", str(run), "--num", "4", "--draws", "2", "--edge", "discretized"]) == 0
    assert "discretized edge" in capsys.readouterr().out


def test_resume_continues(run, tmp_path):
    out = tmp_path / "run"
    half = ["train", "heartbeat", "--out", str(out), *SMALL, "--eval-examples", "5"]
    assert main([*half, "--max-seconds", "0.001"]) == 0
    assert main([*half, "--resume", "auto"]) == 0
    assert json.loads((out / "result.json").read_text())["train_steps"] == 20


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["teleport"], "command must be one of train, sample"),
        (["train"], "train requires a DATASET, got none"),
        (["train", "mars"], "data set must be one of swiss-roll"),
        (["train", "mnist"], "mnist requires path="),
        (
            ["train", "swiss-roll", "--preset", "magic"],
            "preset must be one of default, best, paper",
        ),
        (["train", "digits", "--num-scales", "5"], "divisible"),
        (["train", "swiss-roll", "--train-steps", "0"], "train_steps must be at least 1"),
        (["sample", "nowhere"], "nowhere does not exist"),
        (["info", "please"], "info takes no arguments"),
    ],
)
def test_wrong_input_is_one_sentence(arguments, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        status = main(arguments)
    except SystemExit as stop:  # tyro's own refusals
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2
    assert sentence in error
    assert "Traceback" not in error


def test_unknown_option_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "swiss-roll", "--train-stepz", "3"])
    assert stop.value.code == 2


def test_a_fault_inside_still_shows_its_traceback(run, monkeypatch):
    def broken(*args, **kwargs):
        return torch.ones(2) @ torch.ones(3)

    monkeypatch.setattr("dpm_fast.model.DiffusionModel.sample", broken)
    with pytest.raises(RuntimeError):
        main(["sample", str(run)])


def test_truncated_weights_are_refused(run, tmp_path, capsys):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    for file in copy.glob("checkpoint-*/weights.safetensors"):
        file.write_bytes(file.read_bytes()[:100])
    assert main(["sample", str(copy)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
