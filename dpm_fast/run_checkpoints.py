"""The checkpoints of a training run: which one it goes on from, and when it may write another."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dpm_fast import checkpoint, files
from dpm_fast.checkpoint import Checkpoint, CheckpointError


class RunCheckpoints:
    """Reads at once, writes inside `writing`, and removes nothing before there is something new.

    Args:
        out: the run's directory, made if need be; None keeps nothing on disk.
        resume: "auto" for the latest in ``out`` if there is one; a run or checkpoint; None for
            none.
        keep: number of checkpoints kept.
        writes: whether it is this process that writes the run's checkpoints.

    Attributes:
        found: the checkpoint to go on from, or None.

    Raises:
        TypeError: for a ``resume`` of another kind.
        ValueError: for "auto" without ``out``.
        CheckpointError: for a checkpoint that cannot be read, and for an ``out`` that cannot be
            made, or holds a run other than the resumed one.
    """

    def __init__(self, out: Path | None, resume: str | Path | None, keep: int, *, writes: bool):
        if resume is not None and not isinstance(resume, str | Path):
            raise TypeError(f"resume must be 'auto', a path or None, got {type(resume).__name__}")
        if resume == "auto" and out is None:
            raise ValueError('resume="auto" requires out, the directory of the run')
        self._pointer = None if out is None else checkpoint.pointer(out)
        source = resume
        if resume == "auto":
            source = None if self._pointer is None else out
        self.found: Checkpoint | None = None if source is None else checkpoint.load(Path(source))
        resumes_out = (
            out is not None
            and self.found is not None
            and self.found.path.resolve().parent == out.resolve()
        )
        if self._pointer is not None and not resumes_out:
            raise CheckpointError(
                f"{out} holds a run already: resume it (auto, or one of its checkpoints), or "
                "choose another directory"
            )
        self._out, self._keep, self._is_writing = out if writes else None, keep, False
        # Later checkpoints than the one resumed, and a pointer to them, are to be removed.
        self._must_rewind = resumes_out
        self._saved_step = self.found.step if self.found is not None and resumes_out else None
        if self._out is not None:
            try:
                files.make_directory(self._out)
            except OSError as error:
                raise CheckpointError(str(error)) from error

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """While entered, once or more, this object alone may write the run.

        Raises:
            CheckpointError: if another one does, or has done since this object was made.
        """
        if self._out is None or self._is_writing:
            yield
            return
        with checkpoint.locked(self._out):
            if (now := checkpoint.pointer(self._out)) != self._pointer:
                raise CheckpointError(
                    f"{self._out} must be as this run left it, with the latest checkpoint "
                    f"{self._pointer or 'none'}, got {now or 'none'}: another run wrote there"
                )
            self._is_writing = True
            try:
                yield
            finally:
                self._is_writing = False

    def wants(self, step: int) -> bool:
        """Whether a checkpoint of this step is to be saved."""
        return self._out is not None and step != self._saved_step

    def save(
        self, step: int, parts: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
    ) -> None:
        """See `checkpoint.save`."""
        assert self._out is not None
        self.rewind()
        saved = checkpoint.save(self._out, step, parts, state, keep=self._keep)
        self._pointer, self._saved_step = saved.name, step

    def rewind(self) -> None:
        """Make the resumed checkpoint the latest, now that the run has gone on from it."""
        if self._must_rewind and self._out is not None:
            assert self.found is not None
            checkpoint.rewind(self._out, self.found.path)
            self._must_rewind, self._pointer = False, self.found.path.name
