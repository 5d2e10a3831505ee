"""metrics.jsonl: one JSON object per line, appended while a run trains."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpm_fast.checkpoint import write_atomically


class MetricsFile:
    """Appends rows; a row lost to a crash is at most the last.

    Args:
        path: the file; it is created if need be.
        step: rows of a later step are removed, which a resumed run is about to write again.
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
