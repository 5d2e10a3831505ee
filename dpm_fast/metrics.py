"""What a run reports while it trains: averages over some steps, as rows of metrics.jsonl."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from tqdm import tqdm

from dpm_fast import files


class Meter:
    """Mean loss and gradient norm since the last row, and the steps skipped in all.

    Collected on the device that trains, and read only where a row is written, so that no step
    waits for the one before it.

    Attributes:
        sums: (4,) float64: losses and gradient norms of the finite steps, the number of these,
            and the number of steps skipped since the run began.
    """

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)

    def add(self, loss: Tensor, norm: Tensor) -> None:
        """Count one step; it was skipped if its gradient norm is not finite."""
        taken = norm.isfinite()
        observed = torch.stack((loss.double(), norm.double(), torch.ones_like(norm).double()))
        self.sums[:3] += torch.where(taken & loss.isfinite(), observed, 0.0)
        self.sums[3] += ~taken

    @property
    def num_skipped(self) -> int:
        """Steps skipped since the run began. Waits for the device."""
        return int(self.sums[3])

    def take(self, loss_name: str) -> dict[str, Any]:
        """The columns of a row; the means begin anew. Waits for the device."""
        loss, norm, num_finite, skipped = self.sums.tolist()
        self.sums[:3] = 0
        return {
            loss_name: loss / num_finite if num_finite else None,
            "gradient_norm": norm / num_finite if num_finite else None,
            "skipped_steps": int(skipped),
        }


class MetricsFile:
    """Appends rows to a metrics.jsonl; a crash loses the last one at most.

    Args:
        path: the file, made if need be.
        step: with the first row, those of later steps are removed, which a resumed run writes
            again.

    Raises:
        ValueError, OSError: for a file that cannot be read or written.
    """

    def __init__(self, path: Path, step: int):
        path.touch()
        self._path = path
        self._kept = [row for row in read_metrics(path) if row["step"] <= step]
        self._file: TextIO | None = None

    def append(self, row: Mapping[str, Any]) -> None:
        if self._file is None:
            files.write(self._path, "".join(_line(row) for row in self._kept))
            self._file = self._path.open("a")
        self._file.write(_line(row))
        self._file.flush()

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()


@contextlib.contextmanager
def recorder(
    out: Path | None, step: int, tensorboard: bool
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A function that writes a row of metrics wherever a run keeps them.

    Args:
        out: the run's directory, None to keep nothing.
        step: the last step taken; see `MetricsFile`.
        tensorboard: write for TensorBoard too.
    """
    if out is None:
        yield lambda row: None
        return
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(MetricsFile(out / "metrics.jsonl", step))
        board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            board = SummaryWriter(str(out / "tensorboard"), purge_step=step)
            stack.callback(board.close)

        def record(row: Mapping[str, Any]) -> None:
            file.append(row)
            if board is not None:
                for name, value in row.items():
                    if value is not None:
                        board.add_scalar(name, value, row["step"])

        yield record


def progress_bar(total: int, initial: int, *, show: bool) -> "tqdm[Any]":
    """A bar of steps on standard error."""
    return tqdm(
        total=total,
        initial=initial,
        disable=not show,
        unit="step",
        dynamic_ncols=True,
        # A log that is not a terminal gets a line now and then.
        mininterval=0.2 if sys.stderr.isatty() else 20,
    )


def summary(row: Mapping[str, Any]) -> str:
    """A row as it stands behind the bar."""
    in_bits = "loss_bits_per_dim" in row
    loss = row["loss_bits_per_dim" if in_bits else "loss"]
    if loss is None:
        shown = "no finite gradient"
    else:
        shown = f"{loss:.4f} bits/dim (scaled data)" if in_bits else f"loss {loss:.4f}"
    skipped = f", {row['skipped_steps']} steps skipped" if row["skipped_steps"] else ""
    return f"{shown}, {row['examples_per_second']:.3g} examples/s{skipped}"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, without a last line that was cut short.

    Raises:
        ValueError: for a line that is not a JSON object with a step.
    """
    *lines, _unfinished = path.read_text().split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            raise ValueError(
                f"{path}, line {number} must be a JSON object with an integer step, "
                f"got {line[:80]!r}"
            )
        rows.append(row)
    return rows


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"
