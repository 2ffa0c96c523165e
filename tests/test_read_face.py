"""Whatever a file's format, the network gets the pixels that a person sees.

Expected values are worked out from the array that the file was written from.
"""

import os
from pathlib import Path

import numpy as np
import pytest
from conftest import UNIX, random_pixels
from PIL import Image, ImageOps

import utils

GRAY = random_pixels(1)
FACE, BLACK = Image.fromarray(GRAY), Image.new("L", (48, 48))
LEFT = np.tile(np.arange(48) < 24, (48, 1))
COARSE = Image.fromarray(np.kron(GRAY[::8, ::8], np.ones((16, 16), np.uint8)))


def write(path: Path, image: Image.Image, **options: object) -> Path:
    """Save an image and return its path."""
    image.copy().save(path, **options)  # Pillow keeps options with an image
    return path


WIDE = {  # the face in 16 bits a pixel, by the largest value
    white: Image.fromarray(np.round(GRAY / 255 * white).astype(np.uint16))
    for white in (255, 4095, 65535)
}
SEE_THROUGH = Image.merge("LA", [FACE, Image.fromarray(LEFT).convert("L")])
ANIMATION = {"save_all": True, "append_images": [BLACK, FACE]}
WITHOUT_40 = np.where(GRAY == 40, 255, GRAY)
KINDS = {  # of files: ending, image, options of save, and the pixels that are expected
    **{end: (end, FACE, {}, GRAY) for end in "bmp gif jp2 pgm png tif".split()},
    "PNG named .jpg": ("jpg", FACE, {"format": "png"}, GRAY),
    "P": ("png", FACE.convert("P"), {}, GRAY),
    "red": ("png", Image.merge("RGB", [FACE, BLACK, BLACK]), {}, np.rint(0.299 * GRAY)),
    **{f"16 bits of {n}": ("png", image, {}, GRAY) for n, image in WIDE.items()},
    "see-through": ("png", SEE_THROUGH, {}, np.where(LEFT, GRAY, 255)),
    "P without 40": ("png", FACE.convert("P"), {"transparency": 40}, WITHOUT_40),
    "broken EXIF": ("png", FACE, {"exif": b"no such header"}, GRAY),
    "blank, then a face": ("gif", BLACK, ANIMATION, GRAY),
    "oblong": ("png", ImageOps.expand(FACE, (26, 0)), {}, GRAY),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_any_kind_of_file(tmp_path: Path, kind: tuple) -> None:
    end, image, options, expected = kind
    path = write(tmp_path / f"face.{end}", image, **options)
    np.testing.assert_array_equal(utils.read_pixels(path), expected)


@pytest.mark.parametrize("end", ["avif", "heic", "jpg", "webp"])
def test_a_phone_photo_stands_upright(tmp_path: Path, end: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    lying = COARSE.transpose(Image.Transpose.ROTATE_90)
    for image, options in ((COARSE, {}), (lying, {"exif": exif.tobytes()})):
        path = write(tmp_path / f"photo.{end}", image, quality=95, **options)
        pixels = np.asarray(utils.open_image(path).convert("L"), int)
        assert np.abs(pixels - np.asarray(COARSE)).mean() < 6


def test_scaling_down_does_not_alias(tmp_path: Path) -> None:
    stripes = np.zeros((480, 480), np.uint8)
    stripes[:, ::2] = 255  # too fine for 48 pixels: only their mean remains
    pixels = utils.read_pixels(write(tmp_path / "face.png", Image.fromarray(stripes)))
    assert np.abs(pixels - 127.5).max() <= 5  # 127.5 without a filter


def test_pictures_without_a_meaning_are_refused(tmp_path: Path) -> None:
    blank, vague = "shows nothing: nearly black or", "its pixels have no defined range"
    for values, reason in (
        (np.full_like(GRAY, 77), blank),
        (GRAY // 36, blank),
        (np.tile(GRAY[:, :11], (60, 1)), blank),
        (np.float32(GRAY), vague),
        (np.int32(GRAY) * 1000, vague),
    ):
        path = write(tmp_path / "face.tif", Image.fromarray(values))
        with pytest.raises(OSError, match=f"^{path}: {reason}"):
            utils.read_pixels(path)


def test_broken_files_are_reported_by_name(tmp_path: Path) -> None:
    jpeg = write(tmp_path / "whole.jpg", FACE).read_bytes()
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    path = tmp_path / "face"
    for content, reason in (
        (b"", "empty file"),
        (postscript, "not an image"),  # Pillow would start a program to draw it
        (jpeg[: len(jpeg) // 2], "image file is truncated"),
    ):
        path.write_bytes(content)
        with pytest.raises(OSError, match=f"^{path}: {reason}"):
            utils.read_pixels(path)


def test_what_would_fill_the_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Image.MAX_IMAGE_PIXELS == 250_000_000
    face = write(tmp_path / "face.png", FACE)
    # At less than half the size, Pillow itself refuses.
    for limit in (2000, 1000):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(OSError, match=f"^{face}: too large; 250 million pixels at"):
            utils.read_pixels(face)


@UNIX
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(OSError, match=r"pipe\.jpg: not a file"):
        utils.read_pixels(tmp_path / "pipe.jpg")


@UNIX
def test_list_files(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    for name in "b.png A.JPG deep/er/c .hidden.png Thumbs.db .git/d.png".split():
        (tmp_path / name).touch()
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "again").symlink_to(tmp_path / "deep")
    found = [os.path.relpath(path, tmp_path) for path in utils.list_files(tmp_path)]
    assert found == ["A.JPG", "b.png", "again/er/c"]
