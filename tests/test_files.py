"""Files that appear whole or not at all."""

from pathlib import Path

import numpy as np
import pytest

from dpm_fast import files


def test_arrays_are_written_as_they_are(tmp_path):
    x = np.arange(6).reshape(2, 3)
    np.testing.assert_array_equal(np.load(files.write_array(tmp_path / "x.npy", x)), x)
    found = np.load(files.write_arrays(tmp_path / "x.npz", {"x": x, "y": x[0]}))
    np.testing.assert_array_equal(found["x"], x)
    np.testing.assert_array_equal(found["y"], x[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.npy", "x.npz"]


@pytest.mark.parametrize("where", ["write_bytes", "replace"])
def test_a_failure_leaves_the_old_file_and_says_why(where, tmp_path, monkeypatch):
    path = tmp_path / "x.npy"
    path.write_bytes(b"old")

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, where, fail)
    with pytest.raises(OSError, match=f"^cannot write {path}: No space left on device$"):
        files.write_array(path, np.zeros(3))
    assert [p.name for p in tmp_path.iterdir()] == ["x.npy"]
    assert path.read_bytes() == b"old"


def test_a_missing_or_impossible_directory_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^cannot write .*absent/x: No such file"):
        files.write(tmp_path / "absent" / "x", b"")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"^cannot write .*file/x: Not a directory$"):
        files.write(tmp_path / "file" / "x", b"")
    with pytest.raises(FileExistsError, match=r"^cannot make the directory .*file: File exists$"):
        files.make_directory(tmp_path / "file")
    assert files.make_directory(tmp_path / "a" / "b").is_dir()
