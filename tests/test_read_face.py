"""Whatever a file's format, the network gets the pixels that a person sees.

Expected values are worked out from the array that the file was written from.
"""

import errno
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import UNIX, random_pixels
from PIL import Image
from tensorflow.keras.preprocessing.image import ImageDataGenerator

import utils

GRAY = random_pixels(1)


def write(path: Path, image: Image.Image, **options: object) -> Path:
    """Save an image and return its path."""
    image.copy().save(path, **options)  # Pillow keeps options with an image
    return path


HALF = np.where(np.arange(48) < 24, 255, 0).astype(np.uint8) * np.ones_like(GRAY)
INK = np.stack([*np.zeros((3, 48, 48), np.uint8), 255 - GRAY], axis=-1)
FACE, BLACK = Image.fromarray(GRAY), Image.new("L", (48, 48))


def of_bits(white: int) -> Image.Image:
    """Return the face in 16 bits a pixel, of which white is the largest value."""
    return Image.fromarray(np.round(GRAY / 255 * white).astype(np.uint16))


def see_through() -> Image.Image:
    """Return the face in LA, its right half transparent."""
    return Image.merge("LA", [FACE, Image.fromarray(HALF)])


def oblong(*shape: int) -> Image.Image:
    """Return a black image of this shape with the face in its middle."""
    image = Image.new("L", shape)
    image.paste(FACE, ((shape[0] - 48) // 2, (shape[1] - 48) // 2))
    return image


def turned(orientation: int) -> Image.Exif:
    """Return EXIF data with an orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def animated(*values: int) -> dict:
    """Return the options of an animation that goes on with blank frames and a face."""
    frames = [Image.new("L", (48, 48), value) for value in values]
    return {"save_all": True, "append_images": [*frames, FACE]}


WIDE, PART = of_bits(65535), np.where(HALF == 255, GRAY, 255)
KINDS = {  # of files: ending, image, options of save, and the pixels that are expected
    **{
        f"{mode} {end}": (end, FACE.convert(mode), {}, GRAY)
        for mode in ("L", "LA", "P", "RGB", "RGBA")
        for end in ("png", "PNG", "tif")
    },
    **{end: (end, FACE, {}, GRAY) for end in ("bmp", "gif", "pgm")},
    "webp": ("webp", FACE, {"lossless": True}, GRAY),
    "CMYK": ("tif", Image.fromarray(INK, "CMYK"), {}, GRAY),
    "1 bit": ("png", Image.fromarray(GRAY > 127), {}, 255 * (GRAY > 127)),
    **{f"16 bits {end}": (end, WIDE, {}, GRAY) for end in ("png", "tif", "pgm")},
    **{f"16 bits of {n}": ("png", of_bits(n), {}, GRAY) for n in (255, 4095)},
    # as Pillow reads 12-bit values in 16-bit colors
    "dim": ("png", Image.fromarray(GRAY // 16).convert("RGB"), {}, GRAY // 16 * 17),
    **{mode: ("png", see_through().convert(mode), {}, PART) for mode in ("LA", "RGBA")},
    **{
        f"{image.mode}, one value transparent": (
            "png",
            image,
            {"transparency": transparent},
            np.where(GRAY == 40, 255, GRAY),
        )
        for image, transparent in [
            (FACE, 40),
            (FACE.convert("P"), 40),
            (FACE.convert("RGB"), (40, 40, 40)),
            (WIDE, 40 * 257),
        ]
    },
    "upright": ("png", FACE, {"exif": turned(1)}, GRAY),
    "mirrored": ("png", FACE, {"exif": turned(2)}, np.fliplr(GRAY)),
    "upside down": ("png", FACE, {"exif": turned(3)}, np.rot90(GRAY, 2)),
    "turned left": ("png", FACE, {"exif": turned(6)}, np.rot90(GRAY, 3)),
    "turned right": ("png", FACE, {"exif": turned(8)}, np.rot90(GRAY, 1)),
    "broken EXIF": ("png", FACE, {"exif": b"no such header"}, GRAY),
    "oblong": ("png", oblong(100, 48), {}, GRAY),
    "high": ("png", oblong(48, 90), {}, GRAY),
    "animation": ("gif", Image.fromarray(255 - GRAY), animated(), 255 - GRAY),
    **{
        f"animation {end}": (end, BLACK, animated(0, 255), GRAY)
        for end in ("gif", "png", "tif")
    },
}


@pytest.mark.parametrize(
    ("end", "image", "options", "expected"), KINDS.values(), ids=KINDS
)
def test_any_kind_of_file(
    tmp_path: Path, end: str, image: Image.Image, options: dict, expected: np.ndarray
) -> None:
    path = write(tmp_path / f"face.{end}", image, **options)
    np.testing.assert_array_equal(utils.read_pixels(path), expected)


def test_colours_weigh_as_in_rec_601(tmp_path: Path) -> None:
    image = Image.new("RGB", (48, 48), (200, 100, 50))
    image.paste("black", (0, 0, 24, 24))
    pixels = utils.read_pixels(write(tmp_path / "face.png", image))
    gray = round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)
    assert np.unique(pixels).tolist() == [0, gray]


def test_scaling_down_does_not_alias(tmp_path: Path) -> None:
    stripes = np.zeros((480, 480), np.uint8)
    stripes[:, ::2] = 255  # too fine for 48 pixels: only their mean remains
    pixels = utils.read_pixels(write(tmp_path / "face.png", Image.fromarray(stripes)))
    assert np.abs(pixels - 127.5).max() <= 5  # 127.5 without a filter


def test_heic_without_exif(tmp_path: Path) -> None:
    image = Image.fromarray(np.kron(GRAY[::8, ::8], np.ones((8, 8), np.uint8)))
    pixels = utils.read_pixels(write(tmp_path / "photo.heic", image, quality=95))
    assert np.abs(np.subtract(pixels, image, dtype=int)).mean() < 9


def test_heic_stands_upright(tmp_path: Path) -> None:
    upright = Image.fromarray(np.kron(GRAY[::8, ::8], np.ones((16, 16), np.uint8)))
    lying = upright.transpose(Image.Transpose.ROTATE_90)
    options = {"exif": turned(6).tobytes(), "quality": 95}
    path = write(tmp_path / "photo.HEIC", lying, **options)
    assert path.read_bytes()[4:11] == b"ftyphei"
    image = utils.open_image(path)
    difference = np.abs(np.asarray(image.convert("L"), int) - np.asarray(upright, int))
    assert (image.size, difference.mean() < 6) == ((96, 96), True)


@pytest.mark.parametrize("size", [(12, 12), (12, 3000), (2000, 13)])
def test_extreme_sizes(tmp_path: Path, size: tuple[int, int]) -> None:
    image = Image.new("L", size, 77)
    image.putpixel((0, 0), 0)
    pixels = utils.read_pixels(write(tmp_path / "face.png", image))
    assert (pixels.shape, np.median(pixels)) == ((48, 48), 77)


@pytest.mark.parametrize("size", [(1, 1), (11, 3000), (2000, 11), (48, 48)])
def test_what_shows_nothing_is_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    path = write(tmp_path / "face.png", Image.new("L", size, 77))
    with pytest.raises(OSError, match=f"{path}: shows nothing: .*below 12 pixels"):
        utils.read_pixels(path)
    path = write(path, Image.fromarray(GRAY // 36))
    with pytest.raises(OSError, match="shows nothing: nearly black"):
        utils.read_pixels(path)
    blank = {"save_all": True, "append_images": [Image.new("L", (48, 48), 255)]}
    path = write(tmp_path / "face.gif", BLACK, **blank)
    with pytest.raises(OSError, match="shows nothing"):
        utils.read_pixels(path)


def test_network_input(tmp_path: Path) -> None:
    face = utils.to_input(utils.read_pixels(write(tmp_path / "face.png", FACE)))
    assert (face.shape, face.dtype) == ((48, 48, 1), np.float32)
    assert (face.min(), face.max()) == (0, 1)
    # Bit-equal to what the tutorials' ImageDataGenerator(rescale=1 / 255) gives.
    keras_face = ImageDataGenerator(rescale=1 / 255).standardize(
        GRAY[..., np.newaxis].astype(np.float32)
    )
    np.testing.assert_array_equal(face, keras_face)


def declare(png: bytes, width: int, height: int) -> bytes:
    """Return a PNG file's bytes that declare another size."""
    header = png[12:16] + struct.pack(">II", width, height) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


def test_broken_files_are_reported_by_name(tmp_path: Path) -> None:
    png, jpeg, avif = (
        write(tmp_path / f"whole.{end}", FACE).read_bytes()
        for end in ("png", "jpg", "avif")
    )
    too_large = "too large; 250 million pixels at most: scale it down"
    path = tmp_path / "face"
    for content, reason in (
        (b"no image at all", "not an image"),
        (b"", "empty file"),
        (bytes(5000), "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (jpeg[: len(jpeg) // 2], "truncated"),
        (png[: len(png) // 2], "truncated"),
        (png[:16], "truncated"),
        (avif[:700], "not an image"),
        (declare(png, 20_000, 13_000), too_large),
        (declare(png, 30_000, 30_000), too_large),
    ):
        path.write_bytes(content)
        with pytest.raises(OSError) as error:
            utils.read_pixels(path)
        assert str(error.value).startswith(f"{path}: ")
        assert reason in str(error.value).lower()
        assert "\n" not in str(error.value)


def test_a_bomb_in_a_tile(tmp_path: Path) -> None:
    side = 16_000  # of the only tile; the image is a corner of it
    tags = {256: 48, 257: 48, 258: 8, 259: 1, 262: 1, 322: side, 323: side, 324: 0}
    tags[325] = side * side
    content = struct.pack("<2sHIH", b"II", 42, 8, len(tags))
    for tag, value in tags.items():
        content += struct.pack("<HHII", tag, 4, 1, value)
    path = tmp_path / "face.tif"
    path.write_bytes(content + bytes(4))
    with pytest.raises(OSError, match="too large; 250 million pixels at most"):
        utils.read_pixels(path)


def test_the_ending_of_a_name_does_not_matter(tmp_path: Path) -> None:
    png = write(tmp_path / "face.png", FACE)
    for name in ("face.jpg", "face.txt", "face"):
        png = png.rename(tmp_path / name)
        np.testing.assert_array_equal(utils.read_pixels(png), GRAY)


@UNIX
def test_paths_without_a_file_are_reported_by_name(tmp_path: Path) -> None:
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "link.jpg").symlink_to("nowhere")
    (tmp_path / "cycle.jpg").symlink_to("cycle.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    for name, reason in {
        "folder.jpg": "not a file",
        "pipe.jpg": "not a file",
        "link.jpg": "no such file",
        "cycle.jpg": "no such file",
        "a\0b.jpg": "no such file",
        "missing.jpg": "no such file",
    }.items():
        with pytest.raises(OSError, match=f"{name}: {reason}"):
            utils.read_pixels(tmp_path / name)


@pytest.mark.parametrize(
    "values",
    [
        GRAY.astype(np.float32),
        GRAY.astype(np.int32) * 100_000,
        GRAY.astype(np.int32) - 100,
    ],
)
def test_pixels_without_a_known_range_are_refused(
    tmp_path: Path, values: np.ndarray
) -> None:
    with pytest.raises(OSError, match="no defined range"):
        utils.read_pixels(write(tmp_path / "face.tif", Image.fromarray(values)))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
        (RuntimeError("Invalid box\nsecond line"), "Invalid box"),
    ],
)
def test_a_reason_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    path = write(tmp_path / "face.png", FACE)
    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(OSError, match=f"^{path}: {reason}$"):
        utils.read_pixels(path)


def make_files(folder: Path, names: str) -> None:
    """Make empty files, and the folders that they are in."""
    for path in map(folder.joinpath, names.split()):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_list_files(tmp_path: Path) -> None:
    make_files(tmp_path, "b.png A.JPG deep/er/c .hidden.png Thumbs.db desktop.ini")
    make_files(tmp_path, ".git/d.png deep/thumbs.DB")
    found = [os.path.relpath(path, tmp_path) for path in utils.list_files(tmp_path)]
    assert found == ["A.JPG", "b.png", "deep/er/c"]


@UNIX
def test_links_to_folders_are_followed_once_each(tmp_path: Path) -> None:
    make_files(tmp_path, "here/own.png here/deep/b.png there/a.png there/on/c.png")
    for link, target in {
        "here/link": "../there",
        "here/twice": "../there",
        "here/deep/up": "..",
        "there/back": "../here",
        "there/on/on": "on",  # leads to itself: no folder
        "there/nowhere": "missing",
    }.items():
        (tmp_path / link).symlink_to(target)
    found = utils.list_files(tmp_path / "here")
    assert [os.path.relpath(path, tmp_path / "here") for path in found] == [
        "own.png",
        "deep/b.png",
        "link/a.png",
        "link/nowhere",
        "link/on/c.png",
        "link/on/on",
    ]
