"""Files that a reader, or a crash, meets as they were or whole."""

import contextlib
import io
from pathlib import Path

import numpy as np


def write(path: Path, content: bytes | memoryview) -> Path:
    """Replace a file by new content, or leave it as it was.

    Raises:
        OSError: naming the path and the operating system's reason.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        unfinished.write_bytes(content)
        unfinished.replace(path)
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
