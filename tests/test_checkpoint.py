"""Checkpoints: written whole, kept, found, and refused where anything is wrong with them."""

import json
import math
import multiprocessing
import random
import resource
import shutil
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from dpm_fast import checkpoint
from dpm_fast.checkpoint import CheckpointError


def _parts(step: int, size: int = 5) -> dict[str, dict[str, torch.Tensor]]:
    values = torch.full((size,), float(step))
    return {"weights": {"layer.weight": values}, "optimizer": {"layer.weight/step": values[0]}}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with a checkpoint of step 10."""
    checkpoint.save(tmp_path, 10, _parts(10), {"seconds": 1.5})
    return tmp_path


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    weights = {
        "float32": torch.randn(3, 4),
        "float64": torch.randn(2, dtype=torch.float64),
        "bfloat16": torch.randn(5).bfloat16(),
        "int64": torch.tensor([2**62 + 1]),
        "scalar": torch.tensor(0.1),
        "empty": torch.zeros(0, 3),
        "transposed": torch.randn(3, 4).T,
        "nonfinite": torch.tensor([torch.nan, torch.inf, -0.0]),
    }
    weights["shared"] = weights["float32"][1:]
    checkpoint.save(tmp_path, 7, {"weights": weights}, {"seconds": 0.1, "none": None})
    loaded = checkpoint.load(tmp_path)
    assert loaded.step == 7
    assert loaded.state == {"seconds": 0.1, "none": None}
    assert loaded.parts["weights"].keys() == weights.keys()
    for name, tensor in weights.items():
        same = loaded.parts["weights"][name]
        assert (same.dtype, same.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(
            same.reshape(-1).view(torch.uint8), tensor.contiguous().reshape(-1).view(torch.uint8)
        )


def test_the_last_k_are_kept_and_the_latest_is_found(tmp_path: Path) -> None:
    for step in (1, 2, 30, 100_000_000):
        checkpoint.save(tmp_path, step, _parts(step), {}, keep=2)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["checkpoint-00000030", "checkpoint-100000000", "latest"]
    assert checkpoint.load(tmp_path).step == 100_000_000
    assert checkpoint.load(tmp_path / "checkpoint-00000030").step == 30


def test_a_crash_before_latest_is_written_loses_nothing(run: Path) -> None:
    shutil.copytree(run / "checkpoint-00000010", run / ".checkpoint-00000020.unfinished")
    (run / "latest").unlink()
    assert checkpoint.pointer(run) == "checkpoint-00000010"
    assert checkpoint.load(run).step == 10
    checkpoint.save(run, 20, _parts(20), {})
    assert checkpoint.load(run).parts["weights"]["layer.weight"][0] == 20
    assert not list(run.glob(".*"))


def test_rewind_makes_an_older_checkpoint_the_latest(run: Path) -> None:
    for step in (20, 30):
        checkpoint.save(run, step, _parts(step), {})
    checkpoint.rewind(run, run / "checkpoint-00000020")
    assert checkpoint.load(run).step == 20
    assert not (run / "checkpoint-00000030").exists()
    checkpoint.save(run, 30, _parts(31), {})
    assert checkpoint.load(run).parts["weights"]["layer.weight"][0] == 31


def test_a_checkpoint_is_never_overwritten(run: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 10 yet, got .*-00000010$"):
        checkpoint.save(run, 10, _parts(11), {})
    assert checkpoint.load(run).parts["weights"]["layer.weight"][0] == 10


def test_a_full_disk_gives_one_sentence_and_loses_nothing(run: Path) -> None:
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(CheckpointError, match=r"cannot write .*checkpoint-00000020: File too"):
            checkpoint.save(run, 20, _parts(20, size=10_000), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-00000010", "latest"]
    assert checkpoint.load(run).step == 10


def test_an_unwritable_directory_gives_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(
        CheckpointError, match=r"cannot write .*file/checkpoint-.*: Not a directory"
    ):
        checkpoint.save(file, 1, _parts(1), {})


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def _flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [_truncate, _flip_a_bit])
def test_damaged_tensors_are_refused(run: Path, damage) -> None:
    checkpoint.save(run, 20, _parts(20), {})
    damage(run / "checkpoint-00000020" / "weights.safetensors")
    message = (
        r"weights\.safetensors is damaged.*; the run also has checkpoint-00000010: "
        r".*checkpoint-00000010 can be given instead, to train as --resume$"
    )
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(run)


@pytest.mark.parametrize("file", ["weights.safetensors", "state.json"])
def test_what_is_missing_or_cut_short_names_another_checkpoint(run: Path, file: str) -> None:
    checkpoint.save(run, 20, _parts(20), {})
    latest = run / "checkpoint-00000020"
    if file == "state.json":
        (latest / file).write_text((latest / file).read_text()[:40])
    else:
        (latest / file).unlink()
    message = rf"cannot read {latest / file}: .*; the run also has checkpoint-00000010: "
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(run)


def test_missing_tensors_are_refused(run: Path) -> None:
    (run / "checkpoint-00000010" / "optimizer.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors: No such file"):
        checkpoint.load(run)


def test_a_malicious_tensor_file_is_refused(run: Path) -> None:
    """A header that claims far more than there is, with a hash that fits."""
    folder = run / "checkpoint-00000010"
    header = json.dumps({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}})
    (folder / "weights.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header.encode() + b"\0" * 64
    )
    document = json.loads((folder / "state.json").read_text())
    document["files"]["weights.safetensors"] = checkpoint._fingerprint(
        folder / "weights.safetensors"
    )
    (folder / "state.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=r"cannot read .*weights\.safetensors"):
        checkpoint.load(run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", r"cannot read .*state\.json"),
        ("\udcff", r"cannot read .*state\.json"),
        ("[" * 100_000, r"cannot read .*state\.json"),
        ("[]", r"must be a 'dpm_fast checkpoint 1', got '\[\]'"),
        ({"format": "pickle"}, r"must be a 'dpm_fast checkpoint 1', got 'pickle'"),
        ({"step": "ten"}, r"step must be an integer from 0, got 'ten'"),
        ({"step": -1}, r"step must be an integer from 0, got -1"),
        ({"step": True}, r"step must be an integer from 0, got True"),
        ({"files": None}, r"files must map names of .* got 'None'"),
        ({"files": {"../../secret.safetensors": {}}}, r"files must map names .*secret"),
        ({"state": []}, r"state must be an object, got '\[\]'"),
    ],
)
def test_a_foreign_state_file_is_refused(run: Path, change, message: str) -> None:
    file = run / "checkpoint-00000010" / "state.json"
    text = change if isinstance(change, str) else json.dumps(json.loads(file.read_text()) | change)
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.load(run)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"../elsewhere", r"latest must name a checkpoint of its run, got '\.\./elsewhere'"),
        (b"checkpoint-00000099", r"names checkpoint-00000099, which is missing; the run also has"),
        (b"\xff\xfe", r"cannot read .*latest"),
    ],
)
def test_a_wrong_pointer_is_refused(run: Path, content: bytes, message: str) -> None:
    (run / "latest").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(run)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        checkpoint.load(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoint.load(tmp_path / "absent")
    pickled = tmp_path / "model.pt"
    torch.save({"weights": torch.zeros(1)}, pickled)
    with pytest.raises(CheckpointError, match=r"model\.pt is not a directory"):
        checkpoint.load(pickled)


@pytest.mark.parametrize(
    ("required", "message"),
    [
        ({"a": torch.zeros(2), "b": torch.zeros(1)}, "file lacks b, which the model requires"),
        ({"a": torch.zeros(3)}, r"file: a must have shape \(3,\), got \(2,\)"),
        ({"a": torch.zeros(2).char()}, r"file: a must be of torch.int8, got torch.float32"),
        ({}, "file holds a, which the model does not have"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(required, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        checkpoint.check_fits(required, {"a": torch.zeros(2)}, "file")
    checkpoint.check_fits({"a": torch.ones(2)}, {"a": torch.zeros(2)}, "file")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_new_nans_are_refused_but_not_a_mask_of_infinities(value: float) -> None:
    given = {"a": torch.tensor([0.0, value])}
    with pytest.raises(CheckpointError, match="file: a must be finite, got NaN or infinity"):
        checkpoint.check_fits({"a": torch.zeros(2)}, given, "file")
    checkpoint.check_fits({"a": torch.tensor([0.0, -math.inf])}, given, "file")


@pytest.mark.parametrize("value", ["1", None, True, -1, float("nan"), float("inf")])
def test_numbers_of_the_state_are_checked(value) -> None:
    found = checkpoint.Checkpoint(Path("run"), 1, {}, {"seconds": value})
    with pytest.raises(CheckpointError, match="seconds must be a number from 0"):
        checkpoint.number(found, "seconds")


def test_a_new_checkpoint_is_kept_whatever_the_others_are(run: Path) -> None:
    for step in (90, 100):
        checkpoint.save(run, step, _parts(step), {})
    checkpoint.save(run, 30, _parts(30), {}, keep=2)
    names = sorted(path.name for path in run.iterdir())
    assert names == ["checkpoint-00000030", "checkpoint-00000100", "latest"]
    assert checkpoint.load(run).step == 30


def test_a_run_has_one_writer(run: Path) -> None:
    refused = pytest.raises(CheckpointError, match="must have one writer, got a second one")
    with checkpoint.locked(run), refused, checkpoint.locked(run):
        pass
    with checkpoint.locked(run):
        pass


def _save_forever(run: Path, saved: Connection) -> None:
    step = 1
    while True:
        checkpoint.save(run, step, _parts(step, size=20_000), {"step": step}, keep=1)
        saved.send(step)
        step += 1


@pytest.mark.slow
def test_killed_at_any_moment_it_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dpm_fast.checkpoint"])
    draw = random.Random(0)
    steps = set()
    for attempt in range(40):
        run = tmp_path / str(attempt)
        run.mkdir()
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_save_forever, args=(run, sender))
        process.start()
        # After some saves, at some part of the next one, however fast the disk is.
        for _ in range(draw.randint(1, 9)):
            receiver.recv()
        begin = time.monotonic()
        receiver.recv()
        time.sleep(draw.uniform(0, time.monotonic() - begin))
        process.kill()
        process.join()
        loaded = checkpoint.load(run)
        assert loaded.state == {"step": loaded.step}
        weight = loaded.parts["weights"]["layer.weight"]
        assert torch.equal(weight, torch.full((20_000,), float(loaded.step)))
        checkpoint.rewind(run, loaded.path)
        checkpoint.save(run, loaded.step + 1, _parts(0), {}, keep=1)
        assert sorted(path.name for path in run.iterdir()) == [
            f"checkpoint-{loaded.step + 1:08d}",
            "latest",
        ]
        steps.add(loaded.step)
    assert len(steps) > 5  # the moments did differ
