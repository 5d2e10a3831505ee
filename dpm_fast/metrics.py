"""What a run reports while it trains: averages over some steps, as rows of metrics.jsonl."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpm_fast.checkpoint import write_atomically


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
        finite = norm.isfinite()
        observed = torch.stack((loss.double(), norm.double(), torch.ones_like(norm).double()))
        self.sums[:3] += torch.where(finite, observed, 0.0)
        self.sums[3] += ~finite

    @property
    def num_skipped(self) -> int:
        """Steps skipped since the run began. Waits for the device."""
        return int(self.sums[3])

    def take(self) -> dict[str, Any]:
        """The columns of a row; the means begin anew. Waits for the device."""
        loss, norm, num_finite, skipped = self.sums.tolist()
        self.sums[:3] = 0
        return {
            "loss_bits_per_dim": loss / num_finite if num_finite else None,
            "gradient_norm": norm / num_finite if num_finite else None,
            "skipped_steps": int(skipped),
        }


class MetricsFile:
    """Appends rows to a metrics.jsonl; a crash loses the last one at most.

    Args:
        path: the file, made if need be.
        step: rows of later steps are removed, which a resumed run is about to write again.

    Raises:
        ValueError, OSError: for a file that cannot be read or written.
    """

    def __init__(self, path: Path, step: int):
        kept = [row for row in read_metrics(path) if row["step"] <= step] if path.exists() else []
        write_atomically(path, "".join(_line(row) for row in kept))
        self._file = path.open("a")

    def append(self, row: Mapping[str, Any]) -> None:
        self._file.write(_line(row))
        self._file.flush()

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


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
            raise ValueError(f"{path}, line {number} must be a JSON object with an integer step")
        rows.append(row)
    return rows


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row) + "\n"
