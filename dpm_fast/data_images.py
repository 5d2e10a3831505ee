"""Data from a folder of images."""

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from dpm_fast.data import Data
from dpm_fast.data_arrays import from_arrays

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
FITS = ("resize", "crop")
_GREY_MODES = ("1", "L", "LA")
_COLOR_MODES = ("P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


def image_folder(
    path: Path,
    *,
    size: int | tuple[int, int] | None = None,
    fit: str = "resize",
    color: bool | None = None,
    scaling: str = "standardize",
    test_fraction: float = 0.1,
    seed: int = 0,
) -> Data:
    """All images in a folder and its subfolders, 8 bits a channel.

    Args:
        path: the folder. If it has subfolders named train and test, these are the split.
        size: side, or (H, W), of an example; None requires images of equal sizes.
        fit: how an image becomes one of ``size``: "resize" scales it until it just covers that
            and cuts what hangs over, "crop" only cuts; both keep the middle.
        color: True for (3, H, W) examples, False for (1, H, W); None requires images that are
            all in color or all grey.
        scaling, test_fraction, seed: see `from_arrays`.

    Raises:
        ValueError: for no images, one that is damaged, transparent or of more than 8 bits, and
            for images that differ in size or color where the options allow none of it.
        RuntimeError: without pillow.
    """
    if fit not in FITS:
        raise ValueError(f"fit must be one of {', '.join(FITS)}, got {fit!r}")
    sides = (size, size) if isinstance(size, int) else size
    if sides is not None and (len(sides) != 2 or min(sides) < 1):
        raise ValueError(f"size must be positive, one number or (H, W), got {size}")
    parts = [path / "train", path / "test"]
    if not all(part.is_dir() for part in parts):
        parts = [path]
    train, *test = (read_images(part, sides, fit, color) for part in parts)
    return from_arrays(
        train,
        test=test[0] if test else None,
        name=path.resolve().name,
        channels_last=True,
        scaling=scaling,
        test_fraction=test_fraction,
        seed=seed,
    )


def read_images(
    folder: Path, size: tuple[int, int] | None, fit: str, color: bool | None
) -> np.ndarray:
    """(N, H, W, C) uint8, in the order of the paths; the arguments are those of `image_folder`."""
    pil_image, pil_ops = _pillow()
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
    )
    if not files:
        raise ValueError(f"{folder} must hold images ({', '.join(SUFFIXES)}), found none")
    examples: np.ndarray | None = None
    for i, file in enumerate(files):
        try:
            with pil_image.open(file) as opened:
                image = pil_ops.exif_transpose(opened)
        except (OSError, SyntaxError, ValueError, pil_image.DecompressionBombError) as error:
            raise ValueError(f"{file} must be a whole image, but: {error}") from error
        image = _in_mode(file, image, color)
        if size is not None and fit == "resize":
            image = pil_ops.fit(image, size[::-1], pil_image.Resampling.LANCZOS)
        elif size is not None:
            image = _cropped(file, image, size)
        example = np.atleast_3d(np.asarray(image))
        if examples is None:
            examples = np.empty((len(files), *example.shape), np.uint8)
        elif example.shape[:2] != examples.shape[1:3]:
            raise ValueError(
                f"{file} must be of {examples.shape[1]} x {examples.shape[2]} pixels like "
                f"{files[0].name}, got {example.shape[0]} x {example.shape[1]}: give a size"
            )
        elif example.shape != examples.shape[1:]:
            raise ValueError(
                f"{file} must be {_kind(examples)} like {files[0].name}, got {_kind(example)}: "
                "give color=True or color=False"
            )
        examples[i] = example
    assert examples is not None
    return examples


def _in_mode(file: Path, image: "Image", color: bool | None) -> "Image":
    """The image in mode L or RGB."""
    if image.mode not in _GREY_MODES + _COLOR_MODES:
        raise ValueError(f"{file} must have 8 bits a channel, got the mode {image.mode}")
    if color is None:
        color = image.mode in _COLOR_MODES
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            raise ValueError(f"{file} must be opaque, got transparent pixels")
    return image.convert("RGB" if color else "L")


def _cropped(file: Path, image: "Image", size: tuple[int, int]) -> "Image":
    top, left = (image.height - size[0]) // 2, (image.width - size[1]) // 2
    if min(top, left) < 0:
        raise ValueError(
            f"{file} must have at least {size[0]} x {size[1]} pixels to be cropped to that, "
            f"got {image.height} x {image.width}"
        )
    return image.crop((left, top, left + size[1], top + size[0]))


def _kind(example: np.ndarray) -> str:
    return "in color" if example.shape[-1] == 3 else "grey"


def _pillow() -> tuple[ModuleType, ModuleType]:
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise RuntimeError("images require pillow: pip install 'dpm_fast[data]'") from error
    return Image, ImageOps
