import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dpm_fast.data import load

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 10, 8, 3), dtype=np.uint8)


def save(folder: Path, pixels: np.ndarray, suffix: str = ".png", mode: str | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(pixels):
        opened = Image.fromarray(image)
        (opened if mode is None else opened.convert(mode)).save(folder / f"{i}{suffix}")


def everything(data) -> list[bytes]:
    return sorted(x.numpy().tobytes() for part in (data.train, data.test) for x in part)


def test_color(tmp_path):
    save(tmp_path / "set", PIXELS)
    data = load(tmp_path / "set", test_fraction=0.5)
    assert (data.spec.name, data.spec.shape, data.spec.levels) == ("set", (3, 10, 8), 256)
    assert everything(data) == sorted(x.transpose(2, 0, 1).tobytes() for x in PIXELS)


def test_grey(tmp_path):
    save(tmp_path, PIXELS[..., 0], suffix=".bmp")
    data = load(tmp_path)
    assert data.spec.shape == (1, 10, 8)
    assert everything(data) == sorted(x.tobytes() for x in PIXELS[..., 0])


def test_given_split_and_subfolders(tmp_path):
    save(tmp_path / "train" / "cats", PIXELS[:2])
    save(tmp_path / "train" / "dogs", PIXELS[2:4])
    save(tmp_path / "test", PIXELS[4:])
    data = load(tmp_path)
    assert np.array_equal(data.train, PIXELS[:4].transpose(0, 3, 1, 2))
    assert np.array_equal(data.test, PIXELS[4:].transpose(0, 3, 1, 2))


def test_hidden_and_other_files_are_left_out(tmp_path):
    save(tmp_path, PIXELS)
    (tmp_path / "._0.png").write_bytes(b"resource fork")
    (tmp_path / "labels.txt").write_text("0")
    assert len(everything(load(tmp_path))) == len(PIXELS)


@pytest.mark.parametrize("mode", ["P", "RGBA", "CMYK"])
def test_modes_of_color(tmp_path, mode):
    save(tmp_path, PIXELS, suffix=".tif", mode=mode)
    assert load(tmp_path).spec.shape == (3, 10, 8)


@pytest.mark.parametrize("mode", ["1", "LA"])
def test_modes_of_grey(tmp_path, mode):
    grey = PIXELS[..., 0] if mode == "LA" else 255 * (PIXELS[..., 0] >> 7)
    save(tmp_path, grey, mode=mode)
    assert everything(load(tmp_path)) == sorted(x.tobytes() for x in grey)


def test_stated_color(tmp_path):
    save(tmp_path / "grey", PIXELS[:3, ..., 0])
    save(tmp_path / "color", PIXELS[3:])
    assert load(tmp_path, color=True).spec.shape == (3, 10, 8)
    assert load(tmp_path, color=False).spec.shape == (1, 10, 8)
    grey_as_color = load(tmp_path / "grey", color=True).train
    assert (grey_as_color == grey_as_color[:, :1]).all()


def test_crop_keeps_the_middle(tmp_path):
    save(tmp_path, PIXELS)
    data = load(tmp_path, size=(4, 6), fit="crop")
    middle = PIXELS[:, 3:7, 1:7].transpose(0, 3, 1, 2)
    assert everything(data) == sorted(x.tobytes() for x in middle)


def test_resize_keeps_the_proportions(tmp_path):
    """A half-dark image twice as wide as high: its middle square is half dark too."""
    for i, width in enumerate((64, 32)):
        pixels = np.zeros((width // 2, width), np.uint8)
        pixels[:, width // 2 :] = 200
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    data = load(tmp_path, size=8)
    for x in (data.train[0, 0], data.test[0, 0]):
        assert x.shape == (8, 8)
        assert (x[:, :3] < 10).all()
        assert (x[:, 5:] > 190).all()


def test_resize_to_a_rectangle(tmp_path):
    save(tmp_path, PIXELS)
    assert load(tmp_path, size=(5, 4)).spec.shape == (3, 5, 4)


def test_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    for i in range(2):
        Image.fromarray(PIXELS[i]).save(tmp_path / f"{i}.png", exif=exif)
    data = load(tmp_path)
    turned = np.rot90(PIXELS[:2], k=-1, axes=(1, 2)).transpose(0, 3, 1, 2)
    assert everything(data) == sorted(x.tobytes() for x in turned)


def test_no_images(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(ValueError, match=r"must hold images \(\.bmp, .*\), found none"):
        load(tmp_path)


def test_one_image(tmp_path):
    save(tmp_path, PIXELS[:1])
    with pytest.raises(ValueError, match="train must hold at least 2 examples, got 1"):
        load(tmp_path)


def test_different_sizes(tmp_path):
    save(tmp_path / "a", PIXELS)
    save(tmp_path / "b", PIXELS[:, 1:])
    wanted = r"b/0\.png must be of 10 x 8 pixels like 0\.png, got 9 x 8: give a size"
    with pytest.raises(ValueError, match=wanted):
        load(tmp_path)
    assert load(tmp_path, size=8).spec.shape == (3, 8, 8)


def test_grey_among_color(tmp_path):
    save(tmp_path / "a", PIXELS)
    save(tmp_path / "b", PIXELS[..., 0])
    wanted = r"b/0\.png must be in color like 0\.png, got grey: give color=True or color=False"
    with pytest.raises(ValueError, match=wanted):
        load(tmp_path)


def test_too_small_to_crop(tmp_path):
    save(tmp_path, PIXELS)
    wanted = r"0\.png must have at least 9 x 9 pixels to be cropped to that, got 10 x 8"
    with pytest.raises(ValueError, match=wanted):
        load(tmp_path, size=9, fit="crop")


def test_transparency(tmp_path):
    alpha = np.full((*PIXELS.shape[:3], 1), 255, np.uint8)
    alpha[3, 0, 0] = 254
    save(tmp_path, np.concatenate((PIXELS, alpha), axis=3))
    with pytest.raises(ValueError, match=r"3\.png must be opaque, got transparent pixels"):
        load(tmp_path)


def test_sixteen_bits(tmp_path):
    save(tmp_path, PIXELS[..., 0].astype(np.uint16) * 257)
    with pytest.raises(ValueError, match=r"0\.png must have 8 bits a channel, got the mode I;16"):
        load(tmp_path)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("keep", [0, 20, 200])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_damaged_image(tmp_path, keep, suffix):
    save(tmp_path, PIXELS, suffix=suffix)
    path = tmp_path / f"2{suffix}"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"2\{suffix} must be a whole image, but: "):
        load(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fit": "stretch"}, "fit must be one of resize, crop, got 'stretch'"),
        ({"size": 0}, "size must be positive, one number or (H, W), got 0"),
        ({"size": (8, 8, 3)}, "size must be positive, one number or (H, W), got (8, 8, 3)"),
        ({"levels": 256}, "takes the options size, fit, color, scaling, test_fraction, got"),
    ],
)
def test_options_are_checked(tmp_path, options, message):
    save(tmp_path, PIXELS)
    with pytest.raises(ValueError, match=re.escape(message)):
        load(tmp_path, **options)


def test_without_pillow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(RuntimeError, match="images require pillow: pip install"):
        load(tmp_path)
