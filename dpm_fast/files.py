"""Files that a reader, or a crash, meets as they were or whole."""

import contextlib
import io
import os
from pathlib import Path

import numpy as np


def write(path: Path, content: str | bytes | memoryview) -> Path:
    """Replace a file by new content, on the disk when this returns, or leave it as it was.

    Raises:
        OSError: naming the path and the operating system's reason.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
        flush(unfinished)
        unfinished.replace(path)
        flush(path.parent)
    except OSError as error:
        raise type(error)(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()
    return path


def write_array(path: Path, array: np.ndarray) -> Path:
    """Write an .npy file, see `write`."""
    content = io.BytesIO()  # numpy, given a file, says how many items fitted but not why
    np.save(content, array)
    return write(path, content.getbuffer())


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    """Write an .npz file, see `write`."""
    content = io.BytesIO()
    np.savez(content, **arrays)  # type: ignore[arg-type]
    return write(path, content.getbuffer())


def flush(path: Path) -> None:
    """Have the operating system write a file's, or a directory's, content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> Path:
    """Make a directory unless it is there.

    Raises:
        OSError: naming the path and the operating system's reason.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(f"cannot make the directory {path}: {error.strerror}") from error
    return path
