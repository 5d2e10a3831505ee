"""Data from files: idx, .npz and .npy arrays, CIFAR-10's binary version.

Nothing is unpickled, and nothing is downloaded.
"""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from dpm_fast.data import Data
from dpm_fast.data_arrays import from_arrays

_CIFAR10_RECORD = 1 + 3 * 32 * 32  # a label, then the red, green and blue planes


def mnist(path: Path, *, scaling: str = "standardize") -> Data:
    """MNIST, or a set stored like it: a directory with its idx files, or an .npz file.

    Args:
        path: a directory with train-images-idx3-ubyte and t10k-images-idx3-ubyte, either of them
            also with the suffix .gz; or an .npz file with the arrays x_train and x_test.
        scaling: see `from_arrays`.
    """
    if path.is_dir():
        train, test = (read_idx(_idx_file(path, part)) for part in ("train", "t10k"))
    else:
        train, test = _train_and_test(path)
    return from_arrays(train, test=test, name="mnist", levels=256, scaling=scaling)


def cifar10(path: Path, *, scaling: str = "standardize") -> Data:
    """CIFAR-10: a directory with the files of its binary version, or an .npz file.

    Args:
        path: a directory with data_batch_1.bin, ..., data_batch_5.bin and test_batch.bin; or an
            .npz file with the arrays x_train and x_test, (N, 3, 32, 32) or (N, 32, 32, 3).
        scaling: see `from_arrays`.
    """
    if path.is_dir():
        batches = [f"data_batch_{i}.bin" for i in range(1, 6)]
        train = np.concatenate([read_cifar10(path / name) for name in batches])
        test = read_cifar10(path / "test_batch.bin")
    else:
        train, test = _train_and_test(path)
    last = train.shape[-1:] == (3,) != train.shape[1:2]
    return from_arrays(
        train, test=test, name="cifar10", levels=256, channels_last=last, scaling=scaling
    )


def read_idx(path: Path) -> np.ndarray:
    """An idx file of unsigned bytes, gzipped if its name ends in .gz."""
    raw = _read(path)
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise ValueError(
            f"{path} must be an idx file of unsigned bytes, which begins with 00 00 08, "
            f"got {raw[:3].hex(' ') or 'nothing'}"
        )
    start = 4 + 4 * raw[3]
    if len(raw) < start:
        raise ValueError(f"{path} must have {start} bytes before its data, got {len(raw)}")
    shape = tuple(int(n) for n in np.frombuffer(raw, ">u4", raw[3], 4))
    num_bytes = start + math.prod(shape)
    if len(raw) != num_bytes:
        raise ValueError(f"{path} must have {num_bytes} bytes for shape {shape}, got {len(raw)}")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def read_cifar10(path: Path) -> np.ndarray:
    """The images of one file of CIFAR-10's binary version, (N, 3, 32, 32) uint8."""
    if not path.exists():
        pickled = path.with_suffix("").exists()
        raise FileNotFoundError(
            f"{path} does not exist"
            + (", only the pickled version: the binary version is required" if pickled else "")
        )
    raw = _read(path)
    if len(raw) == 0 or len(raw) % _CIFAR10_RECORD:
        raise ValueError(f"{path} must have a multiple of {_CIFAR10_RECORD} bytes, got {len(raw)}")
    records = np.frombuffer(raw, np.uint8).reshape(-1, _CIFAR10_RECORD)
    if records[:, 0].max() > 9:
        raise ValueError(f"{path} must have labels in 0..9, got {records[:, 0].max()}")
    return records[:, 1:].reshape(-1, 3, 32, 32)


def read_arrays(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """(train, test) of an .npz file, (train, None) of an .npy file.

    An .npz file has arrays named x_train and x_test, or train and test (with or without the
    second), or a single array of any name.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    with path.open("rb") as file:
        if not file.read(6).startswith((b"\x93NUMPY", b"PK")):
            raise ValueError(f"{path} must be an .npy or .npz file, got other content")
        file.seek(0)
        try:
            content = np.load(file, allow_pickle=False)
            if isinstance(content, np.ndarray):
                return content, None
            names = content.files
            for train, test in (("x_train", "x_test"), ("train", "test")):
                if train in names:
                    return content[train], content[test] if test in names else None
            if len(names) == 1:
                return content[names[0]], None
        except Exception as error:  # damage shows as errors of ten undocumented types
            raise ValueError(
                f"{path} must be a whole array file without pickled objects, but: {error}"
            ) from error
    raise ValueError(
        f"{path} must hold an array x_train or train, or a single array, "
        f"got {', '.join(names) or 'none'}"
    )


def _train_and_test(path: Path) -> tuple[np.ndarray, np.ndarray]:
    train, test = read_arrays(path)
    if test is None:
        raise ValueError(f"{path} must hold the arrays x_train and x_test, got one array")
    return train, test


def _idx_file(folder: Path, part: str) -> Path:
    names = [f"{part}-images-idx3-ubyte", f"{part}-images.idx3-ubyte"]
    names += [f"{name}.gz" for name in names]
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise FileNotFoundError(f"{folder} must hold {names[0]} or {names[0]}.gz, found neither")


def _read(path: Path) -> bytearray:
    """The bytes of a file, writable so that arrays over them are."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return bytearray(file.read())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} must be a whole gzip file, but: {error}") from error
