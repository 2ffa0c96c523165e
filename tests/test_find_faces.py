"""Any picture: which faces are found in it, and how they are cut out.

The search is the real one on the portrait, and a fake with known boxes elsewhere.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import (
    MODEL,
    PORTRAIT,
    ROOT,
    FakeSearch,
    noise,
    random_pixels,
    run_predict,
)
from PIL import Image

import predict
import utils

FACE = (175, 65, 100, 150)  # of the astronaut, by eye: left, top, width, height


def test_a_portrait(capsys: pytest.CaptureFixture) -> None:
    assert run_predict("--image", PORTRAIT, "--format", "json") == 0
    (record,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (record["status"], record["face"], record["emotion"]) == ("ok", 1, "happy")
    assert record["width"] == record["height"]
    x, y = record["x"] + record["width"] / 2, record["y"] + record["height"] / 2
    assert abs(x - (FACE[0] + FACE[2] / 2)) < 25
    assert abs(y - (FACE[1] + FACE[3] / 2)) < 25
    assert 90 < record["width"] < 190
    assert predict.find_emotions(PORTRAIT, ROOT / MODEL) == [record]
    network = utils.load_model(str(ROOT / MODEL))
    assert predict.find_emotions(str(PORTRAIT), network) == [record]


@pytest.fixture(scope="module")
def portrait() -> Image.Image:
    """Return the portrait, 512 x 512 pixels, in color."""
    return utils.open_image(PORTRAIT)


@pytest.mark.parametrize("name", ["ROTATE_90", "ROTATE_180", "ROTATE_270"])
def test_a_turned_portrait(portrait: Image.Image, name: str) -> None:
    (face,) = predict.find_faces(portrait)
    (turned,) = predict.find_faces(portrait.transpose(Image.Transpose[name]))
    np.testing.assert_array_equal(turned.pixels, face.pixels)
    mask = Image.new("L", portrait.size)
    x, y, width, height = face.box
    mask.paste(255, (x, y, x + width, y + height))
    left, top, right, bottom = mask.transpose(Image.Transpose[name]).getbbox()
    assert turned.box == (left, top, right - left, bottom - top)


def test_a_dark_portrait(portrait: Image.Image) -> None:
    (face,) = predict.find_faces(portrait)
    dark = portrait.point(lambda value: value // 4)
    (found,) = predict.find_faces(dark)
    np.testing.assert_allclose(found.box, face.box, atol=12)
    assert found.pixels.max() < 64  # what is classified has not been brightened
    (found,) = predict.find_faces(portrait.point(lambda value: value // 24))
    np.testing.assert_allclose(found.box, face.box, atol=20)


@pytest.mark.parametrize("size", [96, 224, 600])
def test_a_closely_cut_face_is_its_own_crop(portrait: Image.Image, size: int) -> None:
    (face,) = predict.find_faces(portrait)
    x, y, width, height = face.box
    crop = portrait.crop((x, y, x + width, y + height)).resize((size, size))
    (found,) = predict.find_faces(crop)
    assert found.box == (0, 0, size, size)


@pytest.mark.parametrize("kind", ["16 bits", "RGBA", "P", "animation", "heic"])
def test_faces_are_found_in_any_kind_of_picture(
    portrait: Image.Image, tmp_path: Path, kind: str
) -> None:
    (face,) = predict.find_faces(portrait)
    gray, clear = np.asarray(portrait.convert("L")), portrait.convert("RGBA")
    clear.putalpha(254)
    black = Image.new("RGB", portrait.size)
    image, name, options = {
        "16 bits": (Image.fromarray(gray.astype(np.uint16) * 257), "a.png", {}),
        "RGBA": (clear, "a.png", {}),
        "P": (portrait.quantize(), "a.png", {"transparency": 3}),
        "animation": (black, "a.webp", {"save_all": True, "append_images": [portrait]}),
        "heic": (portrait, "a.heic", {}),
    }[kind]
    image.save(tmp_path / name, **options)
    (found,) = predict.read_faces(str(tmp_path / name), "auto")
    np.testing.assert_allclose(found.box, face.box, atol=12)


def test_several_real_faces(portrait: Image.Image) -> None:
    (face,) = predict.find_faces(portrait)
    group = Image.new("RGB", (1200, 800), "gray")
    group.paste(portrait, (600, 200))
    group.paste(portrait.resize((256, 256)), (100, 50))
    half = [100 + face.box[0] / 2, 50 + face.box[1] / 2, *np.array(face.box[2:]) / 2]
    whole = [600 + face.box[0], 200 + face.box[1], *face.box[2:]]
    found = [face.box for face in predict.find_faces(group)]
    np.testing.assert_allclose(found, [half, whole], atol=12)


def test_boxes_are_square_inside_and_from_left_to_right(search: FakeSearch) -> None:
    image = Image.fromarray(random_pixels(5, 2048)[:1024])
    search.boxes = [(780, 200, 60, 200), (0, 960, 80, 64), (40, 0, 1200, 1000)]
    faces = predict.find_faces(image)
    assert search.sizes == [(2048, 1024)]
    boxes = [face.box for face in faces]
    assert boxes == [(0, 938, 86, 86), (128, 0, 1024, 1024), (703, 193, 214, 214)]


def test_small_faces_are_those_of_nobody_else(search: FakeSearch) -> None:
    image = Image.fromarray(random_pixels(5, 400))
    search.boxes = [(10, 10, 15, 19), (100, 100, 30, 40)]
    assert [face.box[0] for face in predict.find_faces(image)] == [94]
    search.boxes.pop()
    assert [face.box for face in predict.find_faces(image)] == [(8, 10, 20, 20)]


def test_faces_are_cut_from_the_original(search: FakeSearch, tmp_path: Path) -> None:
    pixels = np.full((2000, 3000), 50, np.uint8)
    face = random_pixels(8, 48)
    pixels[900:948, 600:648] = face
    path = tmp_path / "large.png"
    Image.fromarray(pixels).save(path)
    search.boxes = [(601.5, 901.5, 45, 45)]
    (found,) = predict.read_faces(str(path), "auto")
    assert found.box == (600, 900, 48, 48)
    np.testing.assert_array_equal(found.pixels, face)


def test_large_photos_are_decoded_small_as_far_as_faces_allow(
    portrait: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    def open_image(path: str, **options: int) -> Image.Image:
        image = original(path, **options)
        opened.append(image.size)
        return image

    original = utils.open_image
    monkeypatch.setattr(utils, "open_image", open_image)
    (face,) = predict.find_faces(portrait)
    photo = Image.new("RGB", (4000, 3000), "gray")
    for size, sizes in ((1536, [(2000, 1500)]), (768, [(2000, 1500), (4000, 3000)])):
        photo.paste("gray", (0, 0, *photo.size))
        photo.paste(portrait.resize((size, size)), (300, 500))
        photo.save(tmp_path / "photo.jpg", quality=95)
        opened.clear()
        (found,) = predict.read_faces(str(tmp_path / "photo.jpg"), "auto")
        assert opened == sizes
        box = np.array(face.box) * size / 512 + [300, 500, 0, 0]
        np.testing.assert_allclose(found.box, box, atol=0.05 * size)


def test_boxes_are_those_of_the_upright_picture(
    search: FakeSearch, tmp_path: Path
) -> None:
    pixels = np.random.default_rng(4).integers(0, 256, (200, 100), np.uint8)
    lying = Image.fromarray(pixels).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    lying.save(tmp_path / "phone.png", exif=exif)
    search.boxes = [(31.5, 121.5, 45, 45)]
    (face,) = predict.read_faces(str(tmp_path / "phone.png"), "auto")
    assert search.sizes == [(100, 200)]
    assert face.box == (30, 120, 48, 48)
    np.testing.assert_array_equal(face.pixels, pixels[120:168, 30:78])


@pytest.mark.parametrize(
    ("size", "faces", "searched"),
    [
        ((64, 48), "auto", False),
        ((65, 20), "auto", True),
        ((48, 48), "always", True),
        ((400, 300), "never", False),
    ],
)
def test_when_faces_are_searched(
    search: FakeSearch, tmp_path: Path, size: tuple, faces: str, searched: bool
) -> None:
    path = str(noise(tmp_path / "image.png", *size))
    if searched:
        with pytest.raises(predict.NoFaceError, match="no face found; if it is a clos"):
            predict.read_faces(path, faces)
    else:
        side = min(size)
        box = ((size[0] - side) // 2, (size[1] - side) // 2, side, side)
        assert [face.box for face in predict.read_faces(path, faces)] == [box]
    assert bool(search.sizes) == searched


@pytest.mark.parametrize("value", [0, 128, 255])
def test_what_shows_nothing_is_no_face(
    search: FakeSearch, tmp_path: Path, value: int, capsys: pytest.CaptureFixture
) -> None:
    blank, tiny, small = (tmp_path / f"{n}.png" for n in ("blank", "tiny", "small"))
    Image.new("RGB", (48, 48), (value,) * 3).save(blank)
    noise(tiny, 48, 11)
    noise(small, 12, 12)
    assert (
        run_predict("--image", blank, tiny, "--format", "csv", "--faces", "never") == 1
    )
    out = capsys.readouterr().out
    assert (
        out.count(",no_face,") == out.count(",shows nothing: of one gray all over") == 2
    )
    assert run_predict("--image", small) == 0
    image = Image.new("L", (400, 300), value)  # and no crop of a blank place is one
    image.paste(Image.fromarray(random_pixels(5, 100)), (200, 100))
    search.boxes = [(10, 10, 60, 60), (210, 110, 60, 60)]
    assert [face.box for face in predict.find_faces(image)] == [(208, 108, 64, 64)]
