import gzip
import math
import os
import pickle
import re
import struct
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpm_fast.data import load
from dpm_fast.data_files import read_arrays, read_cifar10, read_idx

TRAIN = np.random.default_rng(0).integers(0, 256, (12, 28, 28), dtype=np.uint8)
TEST = np.random.default_rng(1).integers(0, 256, (5, 28, 28), dtype=np.uint8)
COLOR = np.random.default_rng(2).integers(0, 256, (11, 3, 32, 32), dtype=np.uint8)


def idx(images: np.ndarray) -> bytes:
    header = struct.pack(f">4B{images.ndim}I", 0, 0, 8, images.ndim, *images.shape)
    return header + images.tobytes()


def cifar(images: np.ndarray, label: int = 9) -> bytes:
    return b"".join(bytes([label]) + image.tobytes() for image in images)


class TestMnist:
    @pytest.mark.parametrize("dots", [False, True])
    @pytest.mark.parametrize("zipped", [False, True])
    def test_idx(self, tmp_path, zipped, dots):
        for part, images in (("train", TRAIN), ("t10k", TEST)):
            name = f"{part}-images{'.' if dots else '-'}idx3-ubyte"
            if zipped:
                (tmp_path / f"{name}.gz").write_bytes(gzip.compress(idx(images)))
            else:
                (tmp_path / name).write_bytes(idx(images))
        data = load("mnist", path=tmp_path)
        assert np.array_equal(data.train[:, 0], TRAIN)
        assert np.array_equal(data.test[:, 0], TEST)
        assert (data.spec.name, data.spec.shape, data.spec.levels) == ("mnist", (1, 28, 28), 256)

    def test_npz(self, tmp_path):
        path = tmp_path / "set.npz"
        np.savez(path, x_train=TRAIN, y_train=np.zeros(12), x_test=TEST, y_test=np.zeros(5))
        data = load("mnist", path=str(path), scaling="minus_one_one")
        assert np.array_equal(data.train[:, 0], TRAIN)
        assert np.array_equal(data.test[:, 0], TEST)
        assert data.spec.scale == 2 / 255

    def test_missing_files(self, tmp_path):
        wanted = "must hold train-images-idx3-ubyte or train-images-idx3-ubyte.gz, found neither"
        with pytest.raises(FileNotFoundError, match=re.escape(wanted)):
            load("mnist", path=tmp_path)
        with pytest.raises(FileNotFoundError, match=r"none\.npz does not exist"):
            load("mnist", path=tmp_path / "none.npz")

    def test_npz_without_a_split(self, tmp_path):
        np.savez(tmp_path / "set.npz", TRAIN)
        with pytest.raises(ValueError, match="must hold the arrays x_train and x_test, got one"):
            load("mnist", path=tmp_path / "set.npz")


class TestIdx:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "must be an idx file of unsigned bytes, which begins with 00 00 08, got nothing"),
            (b"\x00\x00\x0d\x03", "which begins with 00 00 08, got 00 00 0d"),
            (idx(TRAIN)[:10], "must have 16 bytes before its data, got 10"),
            (idx(TRAIN)[:-1], "must have 9424 bytes for shape (12, 28, 28), got 9423"),
            (idx(TRAIN) + b"x", "must have 9424 bytes for shape (12, 28, 28), got 9425"),
            (
                b"\x00\x00\x08\x03" + b"\xff" * 12,
                f"must have {16 + (2**32 - 1) ** 3} bytes for shape (4294967295, 4294967295, 42949",
            ),
        ],
    )
    def test_refuses(self, tmp_path, content, message):
        path = tmp_path / "train-images-idx3-ubyte"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{path.name} .*{re.escape(message)}"):
            read_idx(path)

    def test_truncated_gzip(self, tmp_path):
        path = tmp_path / "train-images-idx3-ubyte.gz"
        path.write_bytes(gzip.compress(idx(TRAIN))[:-100])
        with pytest.raises(ValueError, match="must be a whole gzip file, but: Compressed file end"):
            read_idx(path)
        path.write_bytes(idx(TRAIN))
        with pytest.raises(ValueError, match="must be a whole gzip file, but: Not a gzipped file"):
            read_idx(path)


class TestCifar10:
    @pytest.fixture
    def folder(self, tmp_path):
        for i in range(5):
            (tmp_path / f"data_batch_{i + 1}.bin").write_bytes(cifar(COLOR[2 * i : 2 * i + 2], i))
        (tmp_path / "test_batch.bin").write_bytes(cifar(COLOR[10:]))
        return tmp_path

    def test_binary_version(self, folder):
        data = load("cifar10", path=folder)
        assert np.array_equal(data.train, COLOR[:10])
        assert np.array_equal(data.test, COLOR[10:])
        assert data.spec.name == "cifar10"

    @pytest.mark.parametrize("last", [False, True])
    def test_npz(self, tmp_path, last):
        x = COLOR.transpose(0, 2, 3, 1) if last else COLOR
        np.savez(tmp_path / "set.npz", x_train=x[:8], x_test=x[8:])
        data = load("cifar10", path=tmp_path / "set.npz")
        assert np.array_equal(data.train, COLOR[:8])
        assert np.array_equal(data.test, COLOR[8:])

    def test_missing_batch(self, folder):
        (folder / "data_batch_4.bin").unlink()
        with pytest.raises(FileNotFoundError, match=r"data_batch_4\.bin does not exist$"):
            load("cifar10", path=folder)

    def test_pickled_version(self, tmp_path):
        (tmp_path / "data_batch_1").write_bytes(pickle.dumps({}))
        with pytest.raises(FileNotFoundError, match="only the pickled version: the binary version"):
            load("cifar10", path=tmp_path)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "must have a multiple of 3073 bytes, got 0"),
            (cifar(COLOR)[:-1], "must have a multiple of 3073 bytes, got 33802"),
            (cifar(COLOR, label=10), "must have labels in 0..9, got 10"),
        ],
    )
    def test_refuses(self, tmp_path, content, message):
        path = tmp_path / "test_batch.bin"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(f"{path} {message}")):
            read_cifar10(path)


class TestArrays:
    def test_npy(self, tmp_path):
        np.save(tmp_path / "points.npy", np.arange(40.0).reshape(20, 2))
        data = load(tmp_path / "points.npy", test_fraction=0.2)
        assert (data.spec.name, len(data.train), len(data.test)) == ("points", 16, 4)

    @pytest.mark.parametrize("names", [("x_train", "x_test"), ("train", "test")])
    def test_npz_with_a_split(self, tmp_path, names):
        np.savez(tmp_path / "set.npz", **dict(zip(names, (TRAIN, TEST), strict=True)), other=1)
        data = load(tmp_path / "set.npz")
        assert np.array_equal(data.train[:, 0], TRAIN)
        assert np.array_equal(data.test[:, 0], TEST)

    @pytest.mark.parametrize("name", ["x_train", "train", "arr_0", "images"])
    def test_npz_without_a_split(self, tmp_path, name):
        np.savez_compressed(tmp_path / "set.npz", **{name: TRAIN})
        data = load(tmp_path / "set.npz", seed=4)
        assert (len(data.train), len(data.test)) == (11, 1)

    def test_options_of_arrays(self, tmp_path):
        np.savez(tmp_path / "set.npz", train=TRAIN, test=TEST)
        data = load(tmp_path / "set.npz", name="mine", shape=(784,), scaling="none")
        assert (data.spec.name, data.spec.shape, data.spec.scale) == ("mine", (784,), 1)

    def test_ambiguous_npz(self, tmp_path):
        np.savez(tmp_path / "set.npz", images=TRAIN, masks=TRAIN)
        wanted = "must hold an array x_train or train, or a single array, got images, masks"
        with pytest.raises(ValueError, match=wanted):
            load(tmp_path / "set.npz")

    def test_empty_npz(self, tmp_path):
        zipfile.ZipFile(tmp_path / "set.npz", "w").close()
        with pytest.raises(ValueError, match=r"must hold an array x_train or train, .* got none"):
            load(tmp_path / "set.npz")

    @pytest.mark.parametrize("suffix", [".npy", ".npz"])
    def test_nothing_is_unpickled(self, tmp_path, suffix):
        class Canary:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "unpickled"),)

        path = tmp_path / f"set{suffix}"
        content = np.array([[Canary()], [Canary()]], dtype=object)
        (np.save if suffix == ".npy" else np.savez)(path, content)
        with pytest.raises(ValueError, match="without pickled objects, but: Object arrays cannot"):
            load(path)
        path.write_bytes(pickle.dumps(Canary()))
        with pytest.raises(ValueError, match=r"must be an \.npy or \.npz file, got other content"):
            load(path)
        assert not (tmp_path / "unpickled").exists()

    @pytest.mark.parametrize("suffix", [".npy", ".npz"])
    @pytest.mark.parametrize("keep", [0, 3, 60, 1000, -1])
    def test_truncated(self, tmp_path, suffix, keep):
        path = tmp_path / f"set{suffix}"
        (np.save if suffix == ".npy" else np.savez_compressed)(path, TRAIN)
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(ValueError, match=rf"set\{suffix} must be an? "):
            load(path)

    @settings(deadline=None, derandomize=True)
    @given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255), npz=st.booleans())
    def test_damage_is_harmless_or_an_error(self, tmp_path_factory, place, value, npz):
        """Whatever one byte becomes: the array is read, or one sentence says why it is not."""
        path = tmp_path_factory.getbasetemp() / ("set.npz" if npz else "set.npy")
        (np.savez if npz else np.save)(path, TRAIN[:2, :4, :4])
        content = bytearray(path.read_bytes())
        content[math.floor(place * len(content))] = value
        path.write_bytes(content)
        message = None
        try:
            train, test = read_arrays(path)
        except ValueError as error:
            message = str(error)
        if message is None:
            assert isinstance(train, np.ndarray)
            assert test is None
        else:
            assert re.match(rf"{path} must (be|hold) an? ", message)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
    def test_unreadable(self, tmp_path):
        path = tmp_path / "set.npy"
        np.save(path, TRAIN)
        path.chmod(0)
        with pytest.raises(PermissionError, match=r"set\.npy"):
            load(path)
