"""Checkpoints: directories that appear whole or not at all, and are read without unpickling.

    run/checkpoint-00001000/state.json          step, counters, size and SHA-256 of the other files
    run/checkpoint-00001000/<part>.safetensors  tensors by name: weights, averaged weights, ...
    run/latest                                  the name of the newest checkpoint

A checkpoint is written beside its final name, flushed to the disk, and renamed; `latest` is
replaced afterwards, and only then are old checkpoints removed, each renamed away first. A process
killed between any two of these steps leaves a run whose `latest` can be loaded.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

FORMAT = "dpm_fast checkpoint 1"
LATEST, STATE = "latest", "state.json"
_NAME = re.compile(r"checkpoint-(\d{8,})")
_PART_FILE = re.compile(r"[a-z_]+\.safetensors")
_UNFINISHED, _DISCARDED = ".unfinished", ".discarded"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, found, trusted or used; the message is one sentence."""


@dataclass(frozen=True)
class Checkpoint:
    """What was saved: `parts[part][name]` are tensors on the CPU, `state` is plain JSON."""

    path: Path
    step: int
    parts: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save(
    run: Path,
    step: int,
    parts: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    keep: int | None = None,
) -> Path:
    """Write a checkpoint, make it the latest, remove all but it and the newest of the others.

    Args:
        run: the run's directory; it exists.
        step: number of training steps taken, at least 0.
        parts: tensors by part ("weights") and name; any device and dtype.
        state: anything JSON can express.
        keep: number of checkpoints to keep, None for all.

    Returns:
        The new checkpoint's directory.

    Raises:
        CheckpointError: when the disk refuses, or the run already has a checkpoint of this step.
            Whatever had been written before is still there.
    """
    target = run / f"checkpoint-{step:08d}"
    if target.exists():
        raise CheckpointError(f"{run} must have no checkpoint of step {step} yet, got {target}")
    unfinished = run / f".{target.name}{_UNFINISHED}"
    try:
        _remove_leftovers(run)
        unfinished.mkdir()
        for part, tensors in parts.items():
            # Copies: tensors that share memory cannot be stored as they are.
            copies = {n: t.detach().to("cpu", copy=True).contiguous() for n, t in tensors.items()}
            (unfinished / f"{part}.safetensors").write_bytes(safetensors.torch.save(copies))
        files = {file.name: _fingerprint(file) for file in sorted(unfinished.iterdir())}
        document = {"format": FORMAT, "step": step, "files": files, "state": dict(state)}
        (unfinished / STATE).write_text(json.dumps(document, indent=1))
        for file in unfinished.iterdir():
            _flush(file)
        _flush(unfinished)
        unfinished.rename(target)
        _flush(run)
        write_atomically(run / LATEST, f"{target.name}\n")
        if keep is not None:
            others = [path for path in _checkpoints(run) if path != target]
            for old in others[: max(len(others) - keep + 1, 0)]:
                _discard(old)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise CheckpointError(f"cannot write {target}: {_reason(error)}") from error
    return target


def find(path: Path) -> Path:
    """The checkpoint meant by ``path``: a checkpoint's directory, or the latest of a run's.

    Raises:
        CheckpointError: if there is none.
    """
    if (path / STATE).exists():
        return path
    if not path.is_dir():
        problem = "is not a directory" if path.exists() else "does not exist"
        raise CheckpointError(f"a run or checkpoint directory is required, but {path} {problem}")
    pointer = path / LATEST
    if not pointer.exists():
        # The process may have ended after the first rename and before `latest` was written.
        if found := _checkpoints(path):
            return found[-1]
        raise CheckpointError(f"{path} holds no checkpoint: {LATEST} and checkpoint-* are missing")
    try:
        name = pointer.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {pointer}: {_reason(error)}") from error
    if not _NAME.fullmatch(name):
        raise CheckpointError(f"{pointer} must name a checkpoint of its run, got {name[:80]!r}")
    if not (path / name).is_dir():
        raise CheckpointError(f"{pointer} names {name}, which is missing{_others(path)}")
    return path / name


def pointer(run: Path) -> str | None:
    """What a directory says of its latest checkpoint, right or wrong; None without a trace."""
    if (run / LATEST).exists():
        return (run / LATEST).read_bytes().decode(errors="replace").strip()
    found = _checkpoints(run) if run.is_dir() else []
    return found[-1].name if found else None


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """While entered, no other process, and nothing else in this one, can enter the same.

    Raises:
        CheckpointError: at once, where one has.
    """
    try:
        descriptor = os.open(run, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"cannot open {run}: {_reason(error)}") from error
    try:
        # A file system without locks protects nothing, but can hold a run.
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CheckpointError(f"{run} must have one writer, got a second one") from None
        yield
    finally:
        os.close(descriptor)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint completely, or refuse it.

    Args:
        path: a checkpoint's directory, or a run's, of which the latest is read.

    Raises:
        CheckpointError: for anything missing, truncated, altered since it was written, or foreign.
    """
    path = find(path)
    try:
        document = json.loads((path / STATE).read_text())
    except (OSError, ValueError, RecursionError) as error:
        reason = _reason(error) + _others(path.parent, path)
        raise CheckpointError(f"cannot read {path / STATE}: {reason}") from error
    step, files, state = _checked(document, path)
    parts = {}
    for name, written in files.items():
        file = path / name
        try:
            if _fingerprint(file) != written:
                raise CheckpointError(
                    f"{file} is damaged: its size or SHA-256 differs from what {STATE} "
                    f"recorded when it was written{_others(path.parent, path)}"
                )
            parts[file.stem] = safetensors.torch.load_file(file)
        except (OSError, safetensors.SafetensorError) as error:
            reason = _reason(error) + _others(path.parent, path)
            raise CheckpointError(f"cannot read {file}: {reason}") from error
    return Checkpoint(path, step, parts, state)


def check_fits(required: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuse tensors other than the required ones in name, shape or dtype, and new NaNs.

    Args:
        required: what the tensors are to replace.
        tensors: finite wherever those are.
        source: what an error should call their origin.

    Raises:
        CheckpointError: naming one that does not fit.
    """
    for name, ours in required.items():
        if name not in tensors:
            raise CheckpointError(f"{source} lacks {name}, which the model requires")
        check_tensor(ours, tensors[name], f"{source}: {name}")
    for name in tensors:
        if name not in required:
            raise CheckpointError(f"{source} holds {name}, which the model does not have")


def check_tensor(ours: Tensor, theirs: Tensor, name: str) -> None:
    """Refuse a tensor that cannot replace ours; see `check_fits`."""
    if theirs.shape != ours.shape:
        raise CheckpointError(
            f"{name} must have shape {tuple(ours.shape)}, got {tuple(theirs.shape)}"
        )
    if theirs.dtype != ours.dtype:
        raise CheckpointError(f"{name} must be of {ours.dtype}, got {theirs.dtype}")
    # A mask of the model's own may well hold infinities.
    if not bool(theirs.isfinite().all()) and bool(ours.isfinite().all()):
        raise CheckpointError(f"{name} must be finite, got NaN or infinity")


def number(checkpoint: Checkpoint, key: str) -> float:
    """A number, not negative, of a checkpoint's state."""
    value: Any = checkpoint.state.get(key)
    if type(value) not in (int, float) or not 0 <= value < float("inf"):
        raise CheckpointError(f"{checkpoint.path}: {key} must be a number from 0, got {value!r}")
    return value


def rewind(run: Path, checkpoint: Path) -> None:
    """Make an older checkpoint of the run the latest, and remove the later ones."""
    try:
        write_atomically(run / LATEST, f"{checkpoint.name}\n")
        for later in _checkpoints(run):
            if _step(later) > _step(checkpoint):
                _discard(later)
    except OSError as error:
        raise CheckpointError(f"cannot rewind {run}: {_reason(error)}") from error


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file so that a reader, or a crash, meets the old or the new content.

    Raises:
        OSError: naming the file; the old content is still there.
    """
    unfinished = path.with_name(f".{path.name}{_UNFINISHED}")
    try:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
        _flush(unfinished)
        unfinished.replace(path)
        _flush(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise OSError(error.errno, f"cannot write {path}: {_reason(error)}") from error


def _checkpoints(run: Path) -> list[Path]:
    return sorted((p for p in run.iterdir() if _NAME.fullmatch(p.name)), key=_step)


def _step(checkpoint: Path) -> int:
    match = _NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else -1


def _discard(checkpoint: Path) -> None:
    # Renamed first: a removal that is interrupted must not leave half a checkpoint.
    discarded = checkpoint.with_name(f".{checkpoint.name}{_DISCARDED}")
    checkpoint.rename(discarded)
    shutil.rmtree(discarded)


def _remove_leftovers(run: Path) -> None:
    for suffix in (_UNFINISHED, _DISCARDED):
        for leftover in run.glob(f".checkpoint-*{suffix}"):
            shutil.rmtree(leftover)


def _flush(path: Path) -> None:
    """Have the operating system write a file's, or a directory's, content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fingerprint(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
        return {"bytes": opened.tell(), "sha256": digest}


def _checked(document: Any, path: Path) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """The fields of a state.json, which may come from anywhere."""
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        found = document.get("format") if isinstance(document, dict) else document
        raise CheckpointError(f"{path / STATE} must be a {FORMAT!r}, got {str(found)[:80]!r}")
    step, files, state = (document.get(key) for key in ("step", "files", "state"))
    if type(step) is not int or step < 0:
        raise CheckpointError(f"{path / STATE}: step must be an integer from 0, got {step!r}")
    if not isinstance(files, dict) or not all(_PART_FILE.fullmatch(name) for name in files):
        raise CheckpointError(
            f"{path / STATE}: files must map names of .safetensors to hashes, "
            f"got {str(files)[:80]!r}"
        )
    if not isinstance(state, dict):
        raise CheckpointError(f"{path / STATE}: state must be an object, got {str(state)[:80]!r}")
    return step, files, state


def _others(run: Path, excluded: Path | None = None) -> str:
    names = [p.name for p in _checkpoints(run) if p != excluded]
    if not names:
        return ""
    advice = f"{run / names[-1]} can be given instead, to train as --resume"
    return f"; the run also has {', '.join(names)}: {advice}"


def _reason(error: Exception) -> str:
    """The operating system's words without the file name, which the message already has."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
