"""The command line: whole miniature runs, and one sentence for every wrong input."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import dpm_fast
from dpm_fast import checkpoint, plots
from dpm_fast.cli import _is_about_input, main
from dpm_fast.metrics import read_metrics
from dpm_fast.run import open_run

pytest.importorskip("tyro")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).parent.parent
SMALL = ["--train-steps", "20", "--batch-size", "32", "--num-steps", "10", "--num-samples", "8"]
IMAGE_OPTIONS = ["--dense-width", "8", "--conv-channels", "4", "--eval-timesteps", "3"]
POINT_OPTIONS = ["--num-train", "500", "--num-test", "50", "--hidden", "8"]
FIELDS = {
    "dataset", "bound_bits", "edge", "stderr_bits", "limit_bits", "null_bits", "bits_per_dim",
    "num_steps", "train_seconds", "examples_per_second", "seed", "versions",
}  # fmt: skip


def _images(path: Path, shape: tuple[int, ...] = (60, 8, 8)) -> Path:
    np.save(path, np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A miniature model of noise images."""
    folder = tmp_path_factory.mktemp("runs")
    out = folder / "images"
    source = str(_images(folder / "noise.npy"))
    assert main(["train", source, "--out", str(out), *SMALL, *IMAGE_OPTIONS]) == 0
    return out


@pytest.fixture(scope="module")
def points(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A miniature model of the Swiss roll."""
    out = tmp_path_factory.mktemp("runs") / "points"
    assert main(["train", "swiss-roll", "--out", str(out), *SMALL, *POINT_OPTIONS]) == 0
    return out


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings end without pictures, which take most of the time of a miniature run."""
    monkeypatch.setattr("dpm_fast.report.pictures", lambda *given: iter(()))


def _result(run: Path) -> dict:
    return json.loads((run / "result.json").read_text())


def _weights(run: Path) -> torch.Tensor:
    parts = checkpoint.load(run).parts
    tensors = [*parts["weights"].values(), *parts["averaged"].values()]
    return torch.cat([tensor.flatten() for tensor in tensors])


def _complaint(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """What a refused command says, after checking how it says it."""
    assert main(arguments) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert error[0].startswith("dpm-fast: ")
    return error[0]


@pytest.mark.parametrize("dataset", ["swiss-roll", "heartbeat"])
def test_train_ends_with_a_result_a_table_and_pictures(dataset, tmp_path, capsys):
    out = tmp_path / "run"
    options = [*SMALL, "--num-train", "100", "--num-test", "50"]
    assert main(["train", dataset, "--out", str(out), *options]) == 0
    result = _result(out)
    assert result.keys() >= FIELDS
    assert result["dataset"] == dataset
    assert result["num_steps"] == 10
    assert (result["train_steps"], result["stopped_by"]) == (20, "train_steps")
    assert result["bound_bits"] < result["limit_bits"] + 5 * result["stderr_bits"]
    assert (result["valid_fraction"] is None) == (dataset == "swiss-roll")
    assert result["paper_bits"] == {"swiss-roll": None, "heartbeat": -2.414}[dataset]
    shown = capsys.readouterr().out
    assert ("[DPM] table 1, paper edge" in shown) == (dataset == "heartbeat")
    for line in ("bound K, decoder edge", "limit, E log2 p", "null model", "bits/dim"):
        assert line in shown
    for name in ("samples", "trajectory", "bound_per_timestep", "loss"):
        assert (out / f"{name}.png").stat().st_size > 1000
    assert [row["step"] for row in read_metrics(out / "metrics.jsonl")] == [20]


def test_figures_are_in_the_units_of_the_data(run):
    assert {"denoised.png", "inpainted.png"} <= {path.name for path in run.iterdir()}
    result = _result(run)
    assert result["bits_per_dim"] == pytest.approx(-result["bound_bits"] / 64)
    assert 7.5 < result["bits_per_dim"] < 20  # grey levels that are noise cost 8 bits
    assert 7.5 < -result["null_bits"] / 64 < 9


@pytest.mark.parametrize("shape", [(60, 2, 8, 8), (60, 1, 4, 1), (60, 5)])
def test_data_of_unusual_shapes_train_too(tmp_path, shape):
    source = _images(tmp_path / "array.npy", shape)
    config = {
        "data": {"dataset": "array"},
        "process": {"kind": "gaussian", "num_steps": 5},
        "network": {"kind": "mlp", "hidden": [4]}
        if len(shape) == 2
        else {"kind": "conv_dense", "conv_channels": 2, "dense_layers": 0},
        "train": {"train_steps": 2, "batch_size": 4},
        "evaluation": {"num_samples": 2},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    out = tmp_path / "run"
    options = ["--config-file", str(tmp_path / "config.json"), "--out", str(out)]
    assert main(["train", str(source), *options, "--seed", "3"]) == 0
    assert _result(out)["seed"] == 3
    assert main(["sample", str(out), "--num", "2"]) == 0
    assert np.load(out / "sampled.npy").shape == (2, *shape[1:])


@pytest.mark.parametrize(
    ("name", "shape", "levels", "options"),
    [
        ("points.npy", (300, 5), None, ["--hidden", "8"]),
        ("bits.npy", (300, 6), 2, ["--hidden", "8"]),
        ("bits.npz", (300, 6), 2, ["--hidden", "8", "--levels", "2"]),
        ("masks.npy", (60, 4, 4), 2, ["--dense-width", "8", "--conv-channels", "4"]),
    ],
)
def test_the_preset_fits_the_array(tmp_path, name, shape, levels, options):
    random = np.random.default_rng(0)
    x = random.normal(size=shape) if levels is None else random.integers(0, levels, shape)
    if name.endswith(".npz"):
        np.savez(tmp_path / name, train=x, test=x[:50])
    else:
        np.save(tmp_path / name, x.astype(bool) if levels else x)
    out = tmp_path / "run"
    assert main(["train", str(tmp_path / name), "--out", str(out), *SMALL, *options]) == 0
    assert _result(out)["bound_bits"] < 0
    for command in ("sample", "denoise", "inpaint"):
        assert main([command, str(out), "--num", "2"]) == 0
    if levels == 2:  # by default a tenth of the bits are flipped, not half of them
        found = np.load(out / "denoised.npz")
        assert 0 < (found["corrupted"] != found["true"]).mean() < 0.35
    assert np.load(out / "sampled.npy").shape[0] == 2
    found = np.load(out / "inpainted.npz")
    assert (found["restored"] == found["true"])[found["known"]].all()


def test_samples_are_a_function_of_the_seed(run, tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        options = ["--num", "3", "--seed", seed, "--out", str(tmp_path / name)]
        assert main(["sample", str(run), *options]) == 0
        assert (tmp_path / name / "sampled.png").stat().st_size > 1000
    a, b, c = (np.load(tmp_path / name / "sampled.npy") for name in "abc")
    assert a.shape == (3, 1, 8, 8)
    assert a.dtype == np.uint8
    assert (a == b).all()
    assert (a != c).any()


def test_samples_in_fewer_steps(run, tmp_path, capsys):
    options = ["sample", str(run), "--num", "3", "--num-inference-steps", "4", "--eta", "0"]
    assert main([*options, "--out", str(tmp_path)]) == 0
    opened = open_run(run, "cpu")
    samples = opened.model.sample(3, num_inference_steps=4, eta=0.0)
    expected = opened.spec.to_data(samples).numpy()
    assert (np.load(tmp_path / "sampled.npy") == expected).all()
    record = json.loads((tmp_path / "sampled.json").read_text())
    assert record["versions"]["torch"] == torch.__version__
    options_of = {"num": 3, "seed": 0, "num_inference_steps": 4, "eta": 0.0}
    assert record.items() >= (options_of | {"train_steps": opened.step}).items()
    sentence = "num_inference_steps must be in 1..10, got 11"
    assert sentence in _complaint(capsys, [*options[:5], "11"])
    assert "eta must be in [0, 1], got 2" in _complaint(capsys, [*options[:6], "--eta", "2"])


@pytest.mark.parametrize("data", ["images", "points"])
def test_inpaint_keeps_every_bit_of_what_is_known(data, run, points, tmp_path):
    trained = run if data == "images" else points
    options = ["--num", "3", "--fraction", "0.4", "--out", str(tmp_path)]
    assert main(["inpaint", str(trained), *options]) == 0
    found = np.load(tmp_path / "inpainted.npz")
    true, restored, known = found["true"], found["restored"], found["known"]
    assert true.dtype == restored.dtype == (np.uint8 if data == "images" else np.float32)
    assert known.any()
    assert (restored[known] == true[known]).all()
    assert (found["corrupted"][known] == true[known]).all()
    assert np.isnan(found["corrupted"][~known]).all()
    assert (restored[~known] != true[~known]).any()
    assert (tmp_path / "inpainted.png").stat().st_size > 1000


def test_denoise_restores_what_it_is_given(run, tmp_path):
    options = ["--num", "2", "--out", str(tmp_path), "--guidance", "x_t"]
    assert main(["denoise", str(run), "--sigma", "0.01", *options]) == 0
    found = np.load(tmp_path / "denoised.npz")
    true, corrupted, restored = (found[name] for name in ("true", "corrupted", "restored"))
    assert restored.shape == true.shape == (2, 1, 8, 8)
    one_sigma = 0.01 * true.astype(float).std()
    assert 0.5 * one_sigma < (corrupted - true).std() < 2 * one_sigma
    assert np.abs(restored - corrupted).max() < 8 * one_sigma + 0.5


def test_bound_reports_with_the_runs_options_or_others(run, points, capsys):
    result = _result(points)
    assert main(["bound", str(points)]) == 0
    first = capsys.readouterr().out
    assert f"{result['bound_bits']:.4f} ± {result['stderr_bits']:.4f} bits" in first
    assert main(["bound", str(run), "--num", "4", "--draws", "2", "--edge", "discretized"]) == 0
    second = capsys.readouterr().out
    assert "4 held-out examples" in second
    assert "discretized edge" in second
    assert "Monte-Carlo error" in second


def test_an_interrupted_bound_goes_on_from_its_file(points, tmp_path, capsys, monkeypatch):
    file, calls = tmp_path / "sums.npz", []
    find = dpm_fast.bound._Terms.__call__

    def interrupt(terms, begin, end):
        calls.append(end - begin)
        os.kill(os.getpid(), signal.SIGINT)
        return find(terms, begin, end)

    command = ["bound", str(points), "--partial", str(file), "--max-memory", "64 kB"]
    with monkeypatch.context() as patch:
        patch.setattr(dpm_fast.bound, "largest_batch", lambda *_: 200)
        patch.setattr(dpm_fast.bound._Terms, "__call__", interrupt)
        assert main(command) == 130
    told = capsys.readouterr().err
    assert f"interrupted SIGINT after 200 of 500 terms; their sums are in {file}" in told
    assert calls == [200]
    assert main(command) == 0
    continued = capsys.readouterr().out
    assert main(["bound", str(points)]) == 0
    assert continued == capsys.readouterr().out
    other = _complaint(capsys, [*command, "--seed", "7"])
    assert f"{file} holds sums of another bound, with seed 0, not 7" in other


def test_info_and_help(capsys):
    assert main(["info"]) == 0
    assert torch.__version__ in capsys.readouterr().out
    assert main(["--help"]) == 0
    assert "dpm-fast train DATASET" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"dpm-fast {dpm_fast.__version__}\n"
    assert main(["info", "--help"]) == 0
    assert "usage: dpm-fast info" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert capsys.readouterr().out.startswith("Options for swiss-roll. Other data have others")
    for arguments in (["train", "--help"], ["train", "digits", "--help"], ["sample", "--help"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code in (None, 0)
        assert "--seed" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", ["--help", "train --help"])
def test_a_reader_that_leaves_early_is_no_error(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "dpm_fast", *arguments.split()]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_help_needs_no_torch():
    code = "import sys, dpm_fast.cli as c; c.main(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
    assert done.returncode == 0


@pytest.mark.usefixtures("without_pictures")
def test_a_resumed_run_keeps_its_options_and_becomes_the_same_run(points, tmp_path, capsys):
    out = tmp_path / "run"
    begin = ["train", "swiss-roll", "--out", str(out), *SMALL, *POINT_OPTIONS]
    assert main([*begin, "--max-seconds", "1e-9"]) == 0
    assert _result(out)["stopped_by"] == "max_seconds"
    assert main(["train", "swiss-roll", "--out", str(out), "--resume", "auto"]) == 0
    assert _result(out)["stopped_by"] == "train_steps"
    assert torch.equal(_weights(out), _weights(points))
    assert _result(out)["bound_bits"] == _result(points)["bound_bits"]
    capsys.readouterr()
    wrong = ["train", "swiss-roll", "--out", str(out), "--resume", "auto", "--num-steps", "11"]
    assert "process.num_steps must be 10 to resume" in _complaint(capsys, wrong)
    again = ["train", "swiss-roll", "--out", str(out)]
    assert "holds a run already" in _complaint(capsys, again)
    assert torch.equal(_weights(out), _weights(points))


@pytest.mark.usefixtures("without_pictures")
def test_a_checkpoint_goes_on_with_the_options_of_its_run(points, tmp_path, capsys):
    out, source = tmp_path / "run", ["--resume", str(points / "checkpoint-00000000")]
    assert main(["train", "swiss-roll", "--out", str(out), *source]) == 0
    assert torch.equal(_weights(out), _weights(points))
    capsys.readouterr()
    wrong = ["train", "swiss-roll", "--out", str(tmp_path / "other"), *source, "--num-train", "9"]
    assert f"data.num_train must be 500 to resume {points}, got 9" in _complaint(capsys, wrong)
    occupied = ["train", "swiss-roll", "--out", str(out), *source]
    assert f"{out} holds a run already" in _complaint(capsys, occupied)
    assert not (tmp_path / "other").exists()


def test_a_refused_option_costs_a_resumed_run_nothing(points, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(points, out)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    resume = ["--resume", str(out / "checkpoint-00000000"), "--eval-edge", "discretized"]
    arguments = ["train", "swiss-roll", "--out", str(out), *resume]
    assert "requires discrete data" in _complaint(capsys, arguments)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


@pytest.mark.usefixtures("without_pictures")
def test_what_has_a_checkpoint_can_be_opened(tmp_path, monkeypatch):
    """A run that is killed right after its first checkpoint, or right before it."""
    begin = ["train", "swiss-roll", "--out", str(tmp_path), *SMALL, *POINT_OPTIONS]

    class Killed(BaseException):
        pass

    def killed(*arguments, **options):
        raise Killed

    save = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", killed)
    with pytest.raises(Killed):
        main(begin)
    monkeypatch.setattr(checkpoint, "save", lambda *a, **o: (save(*a, **o), killed()))
    with pytest.raises(Killed):
        main([*begin, "--resume", "auto"])
    monkeypatch.setattr(checkpoint, "save", save)
    assert main(["sample", str(tmp_path), "--num", "2"]) == 0
    assert main([*begin[:4], "--resume", "auto"]) == 0
    assert _result(tmp_path)["train_steps"] == 20


def test_a_run_that_another_process_writes_is_left_alone(points, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(points, out)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    longer = ["train", "swiss-roll", "--out", str(out), "--resume", "auto", "--train-steps", "30"]
    with checkpoint.locked(out):
        assert "must have one writer, got a second one" in _complaint(capsys, longer)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


@pytest.mark.usefixtures("without_pictures")
def test_a_finished_run_is_left_alone(points, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(points, out)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    resume = ["train", "swiss-roll", "--out", str(out), "--resume", "auto"]
    assert main([*resume, "--learning-rate", "0.1"]) == 0
    assert f"{out} is finished: 20 steps" in capsys.readouterr().out
    message = "is of a run with seed 0, not 5"
    assert message in _complaint(capsys, [*resume, "--seed", "5"])
    message = "train_steps must be at least 20, which"
    assert message in _complaint(capsys, [*resume, "--train-steps", "5"])
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    # One that was stopped between its last step and its result is finished.
    (out / "result.json").write_text('{"train_steps": 10}')
    assert main(resume) == 0
    assert _result(out)["bound_bits"] == _result(points)["bound_bits"]


def test_a_checkpoint_of_another_model_is_one_sentence(points, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(points, copy)
    text = (copy / "config.json").read_text()
    (copy / "config.json").write_text(text.replace('"log_linear"', '"erase"'))
    assert "is of a model with betas_sha256" in _complaint(capsys, ["sample", str(copy)])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["teleport"],
            "bound, denoise, inpaint, info, selftest, got 'teleport'",
        ),
        (["train"], "train requires a DATASET first, got none"),
        (["train", "--seed", "1", "swiss-roll"], "train requires a DATASET first"),
        (["train", "mars"], "data set must be one of swiss-roll"),
        (["train", "absent.npy"], "absent.npy does not exist"),
        (["train", "mnist"], "mnist requires path (--path), where"),
        (["train", "mnist", "--path", "absent.npz"], "absent.npz does not exist"),
        (["train", "swiss-roll", "--path", "x"], "path is for mnist and cifar10"),
        (["train", "swiss-roll", "--size", "9"], "swiss-roll takes the options"),
        (["train", "swiss-roll", "--preset", "magic"], "preset must be one of default, best, pap"),
        (["train", "swiss-roll", "--preset"], "argument --preset: expected one argument"),
        (["train", "swiss-roll", "--config-file", "absent"], "cannot read the configuration abse"),
        (["train", "swiss-roll", "--train-steps", "0"], "train_steps must be at least 1, got 0"),
        (
            ["train", "swiss-roll", "--train-steps", "x"],
            "--train-steps must be an integer, got",
        ),
        (["train", "swiss-roll", "--learning-rate", "x"], "--learning-rate must be a number, got"),
        (["train", "swiss-roll", "--ema-decay", "x"], "--ema-decay must be FLOAT or none, got 'x'"),
        (["train", "swiss-roll", "--hidden", "8", "x"], "--hidden has values of a wrong kind, got"),
        (
            ["train", "digits", "--size", "9"],
            "digits takes the options test_fraction, scal",
        ),
        (["train", "swiss-roll", "--train-stepz", "3"], "Unrecognized options: --train-stepz, 3"),
        (["train", "swiss-roll", "--loss", "x"], "invalid choice 'x' for argument '--loss'"),
        (["train", "swiss-roll", "--num-steps", "1"], "num_steps must be an integer in 2..2**24"),
        (["train", "swiss-roll", "--resume", "absent"], "absent does not exist"),
        (["train", "swiss-roll", "--device", "abacus"], "device must be a device torch knows"),
        (["train", "swiss-roll", "--device", "meta"], "device must be one that computes, got meta"),
        (["train", "swiss-roll", "--device", "mps"], "device must be one of this machine, got mps"),
        (["train", "swiss-roll", "--device", "xpu"], "device must be one of this machine, got xpu"),
        (["train", "swiss-roll", "--eval-edge", "discretized"], "requires discrete data"),
        (["train", "heartbeat", "--parameterization", "epsilon"], "parameterization must be"),
        (["train", "digits", "--num-scales", "5"], "divisible"),
        (["sample"], "Missing from dpm-fast sample: RUN"),
        (["sample", "absent"], "absent does not exist"),
        (["sample", "."], "holds no checkpoint"),
        (["info", "please"], "info takes no arguments, got please"),
    ],
)
def test_wrong_input_is_one_sentence(arguments, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sentence in _complaint(capsys, arguments)
    assert not list(tmp_path.glob("runs/*"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["sample", "--num", "0"], "num must be at least 1, got 0"),
        (["denoise", "--sigma", "0"], "sigma must be positive, got 0"),
        (["denoise", "--sigma", "nan"], "sigma must be"),
        (["inpaint", "--fraction", "1"], "fraction must be in (0, 1)"),
        (["bound", "--timesteps", "0"], "dpm-fast: timesteps must be at least 1, got 0"),
        (["bound", "--max-memory", "lots"], "max_memory must be a positive number of bytes, "),
        (["bound", "--num", "0"], "dpm-fast: num must be at least 1, got 0"),
        (["bound", "--num", "3.5"], "--num must be INT or none, got '3.5'"),
        (["bound", "--edge", "magic"], "invalid choice 'magic'"),
        (["sample", "--seed", "18446744073709551616"], "seed must be a 64-bit integer"),
        (["sample", "--out", "/dev/null/out"], "cannot make the directory /dev/null/out: Not a"),
        (["inpaint", "--out", "/dev/null"], "cannot make the directory /dev/null: File exists"),
    ],
)
def test_wrong_options_of_a_trained_run_are_one_sentence(run, arguments, sentence, capsys):
    command, *options = arguments
    assert sentence in _complaint(capsys, [command, str(run), *options])


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("config.json", "{", "config.json is not JSON"),
        ("config.json", '{"data": {"dataset": "x"}}', "config.json lacks process"),
        ("config.json", None, "cannot read the configuration"),
        ("data.json", "[", "cannot read"),
        ("data.json", "{}", "levels, got none of them"),
        ("data.json", '{"shape": 3}', "a data specification must have name"),
        ("latest", "/etc", "latest must name a checkpoint of its run, got '/etc'"),
    ],
)
def test_a_damaged_run_is_one_sentence(run, tmp_path, capsys, file, content, sentence):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    if content is None:
        (copy / file).unlink()
    else:
        (copy / file).write_text(content)
    assert sentence in _complaint(capsys, ["sample", str(copy)])


def test_damaged_weights_are_one_sentence(run, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    for file in copy.glob("checkpoint-*/averaged.safetensors"):
        file.write_bytes(file.read_bytes()[:100])
    assert "averaged.safetensors is damaged" in _complaint(capsys, ["sample", str(copy)])


@pytest.mark.usefixtures("without_pictures")
def test_data_that_have_changed_since_are_refused(tmp_path, capsys):
    source, out = _images(tmp_path / "noise.npy"), tmp_path / "run"
    assert main(["train", str(source), "--out", str(out), *SMALL, *IMAGE_OPTIONS]) == 0
    _images(source, (60, 4, 4))
    capsys.readouterr()
    assert "noise.npy must be DataSpec" in _complaint(capsys, ["bound", str(out)])


@pytest.mark.parametrize(
    ("command", "file"), [("sample", "sampled.npy"), ("inpaint", "inpainted.npz")]
)
def test_a_full_disk_is_one_sentence_and_what_was_written_stays(
    points, tmp_path, capsys, command, file
):
    copy = tmp_path / "copy"
    shutil.copytree(points, copy)
    (copy / file).write_text("old")
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (256, hard))
    try:
        complaint = _complaint(capsys, [command, str(copy)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))
    assert complaint == f"dpm-fast: cannot write {copy / file}: File too large"
    assert (copy / file).read_text() == "old"
    assert not list(copy.glob(".*"))
    assert torch.equal(_weights(copy), _weights(points))


def test_samples_leave_the_pictures_of_the_training(points, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(points, copy)
    assert main(["sample", str(copy), "--num", "3"]) == 0
    assert (copy / "samples.png").read_bytes() == (points / "samples.png").read_bytes()
    assert (copy / "sampled.png").exists()


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("arguments", "warning"),
    [
        (["bound", "--timesteps", "11"], "timesteps 11 of T = 10: every timestep is evaluated"),
        (["bound", "--num", "51"], "num 51 is more than the 50 held-out examples: all are used"),
        (["denoise", "--num", "51"], "num 51 is more than the 50 held-out examples: all are used"),
        (["denoise", "--sigma", "1e9"], "sigma 1e+09 is in the model's scale, in which data vary"),
        (["inpaint", "--fraction", "0.01"], "fraction 0.01 of 2 places is none or all: 1 of them"),
    ],
)
def test_what_is_not_done_as_asked_is_told(points, tmp_path, capsys, arguments, warning):
    command, *options = arguments
    place = [] if command == "bound" else ["--out", str(tmp_path)]
    assert main([command, str(points), *options, *place]) == 0
    assert f"dpm-fast: warning: {warning}" in capsys.readouterr().err


@pytest.mark.filterwarnings("default")
def test_every_timestep_by_their_number_needs_no_warning(points, capsys):
    assert main(["bound", str(points), "--timesteps", "10"]) == 0
    assert "timesteps" not in capsys.readouterr().err


def test_training_tells_of_odd_directories_and_batches(tmp_path, capsys):
    (tmp_path / "theirs.txt").touch()
    source, options = _images(tmp_path / "one_pixel.npy", (60, 1, 1)), [*SMALL, *IMAGE_OPTIONS]
    batch = ["--batch-size", "100"]
    assert main(["train", str(source), "--out", str(tmp_path), *options, *batch]) == 0
    errors = capsys.readouterr().err
    assert f"warning: {tmp_path} holds files that are not of a run" in errors
    assert "warning: batch_size 100 is more than the 54 training examples" in errors
    # Of one pixel, there is no part to complete.
    assert (tmp_path / "denoised.png").exists()
    assert not (tmp_path / "inpainted.png").exists()


def test_an_interrupted_evaluation_says_how_it_goes_on(tmp_path, capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("dpm_fast.evaluation.sample", interrupt)
    assert main(["train", "swiss-roll", "--out", str(tmp_path), *SMALL, *POINT_OPTIONS]) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("dpm-fast: interrupted after the training, which is in")
    assert "--resume auto finishes the evaluation" in last


@pytest.mark.parametrize(
    ("command", "function", "told"),
    [
        ("sample", "sample", "before {}/sampled.npy was written"),
        ("bound", "evaluate", "with nothing kept of the bound; --partial FILE keeps its sums"),
    ],
)
def test_an_interrupted_command_says_what_is_lost(
    command, function, told, points, capsys, monkeypatch
):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"dpm_fast.evaluation.{function}", interrupt)
    assert main([command, str(points)]) == 130
    assert capsys.readouterr().err == f"dpm-fast: interrupted {told.format(points)}\n"


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.filterwarnings("default")
def test_warnings_of_the_library_are_one_line(tmp_path, capsys):
    source = tmp_path / "grid.npy"
    np.save(source, np.random.default_rng(0).integers(0, 9, (900, 1, 4, 4)).astype(np.float32))
    options = ["--out", str(tmp_path / "run"), *SMALL, *IMAGE_OPTIONS]
    assert main(["train", str(source), *options]) == 0
    warned = "dpm-fast: warning: train has only 9 different values"
    assert sum(line.startswith(warned) for line in capsys.readouterr().err.splitlines()) == 1


def test_a_fault_inside_shows_its_traceback(run, monkeypatch):
    def faulty(*args, **kwargs):
        return torch.ones(2) @ torch.ones(3)

    monkeypatch.setattr("dpm_fast.model.DiffusionModel.sample", faulty)
    with pytest.raises(RuntimeError):
        main(["sample", str(run)])


def test_a_fault_in_an_expression_of_ours_shows_its_traceback(run, monkeypatch):
    monkeypatch.setattr(plots, "save", None)
    with pytest.raises(TypeError):
        main(["sample", str(run)])


@pytest.mark.parametrize(
    ("statement", "module", "is_refusal"),
    [
        ("if True: raise ValueError('n must be 1')", "dpm_fast.absent", True),
        ("if True: raise ValueError('n must be 1')", "other", False),
        ("int('raise ')", "dpm_fast.absent", False),
        ("assert not True, 'a fault'", "dpm_fast.absent", False),
    ],
)
def test_refusals_are_raise_statements_of_ours(statement, module, is_refusal):
    """Told by the instruction: there may be no source, as here."""
    with pytest.raises((ValueError, AssertionError)) as caught:
        exec(statement, {"__name__": module})
    assert _is_about_input(caught.value) is is_refusal


def test_a_traceback_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("DPM_FAST_TRACEBACK", "1")
    with pytest.raises(ValueError, match="command must be one of"):
        main(["teleport"])


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_so(tmp_path, capsys, number, status):
    def send() -> None:
        while not (tmp_path / "metrics.jsonl").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()
    options = [*POINT_OPTIONS, *SMALL, "--train-steps", "1000000"]
    assert main(["train", "swiss-roll", "--out", str(tmp_path), *options]) == status
    step = checkpoint.load(tmp_path).step
    last = capsys.readouterr().err.splitlines()[-1]
    saved = f"after step {step}; the checkpoint is in {tmp_path}"
    assert last == f"dpm-fast: interrupted {number.name} {saved}"
    assert not (tmp_path / "result.json").exists()


def _latest(run: Path) -> str:
    return (run / "latest").read_text() if (run / "latest").exists() else ""


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.slow
def test_a_killed_run_resumes_as_if_nothing_had_happened(tmp_path):
    options = ["--train-steps", "1500", "--checkpoint-every", "25", "--log-every", "10"]
    through = tmp_path / "through"
    begin = ["train", "swiss-roll", "--out", str(through), *POINT_OPTIONS, *SMALL, *options]
    assert main(begin) == 0
    killed = tmp_path / "killed"
    begin = [*begin[:3], str(killed), *begin[4:], "--resume", "auto"]
    for delay in (0.0, 0.2, 0.5):
        process = subprocess.Popen([sys.executable, "-m", "dpm_fast", *begin], cwd=ROOT)
        before = _latest(killed)
        while _latest(killed) == before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(delay)
        process.kill()
        process.wait()
        assert checkpoint.load(killed).step < 1500
    assert main(["train", "swiss-roll", "--out", str(killed), "--resume", "auto", *options]) == 0
    assert torch.equal(_weights(killed), _weights(through))
    losses = [
        [row["loss_bits_per_dim"] for row in read_metrics(run / "metrics.jsonl")]
        for run in (through, killed)
    ]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_torchrun_trains_and_evaluates_on_all_ranks(points, tmp_path):
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *("-m", "dpm_fast", "train", "swiss-roll", "--out", str(tmp_path), *SMALL, *POINT_OPTIONS),
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    ours, one = _result(tmp_path), _result(points)
    assert ours["num_examples"] == one["num_examples"] == 50
    for name in ("bound_bits", "stderr_bits", "null_bits", "gap_bits"):
        assert ours[name] == pytest.approx(one[name], rel=1e-3), name
    torch.testing.assert_close(_weights(tmp_path), _weights(points), rtol=1e-3, atol=1e-5)
    assert done.stdout.count("bound K, decoder edge") == 1
    for name in ("denoise", "inpaint"):
        # torchrun itself would take --num for an option of its own, cut short
        command[command.index("dpm_fast") + 1 :] = [name, str(tmp_path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(f"{name[:-1] if name[-1] == 'e' else name}ed.npz") == 1
