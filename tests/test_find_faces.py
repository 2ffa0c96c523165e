"""Any picture: which faces are found in it, and how they are cut out.

The search is the real one on the portrait, and a fake with known boxes elsewhere.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import MODEL, PORTRAIT, ROOT, Ask, FakeSearch, noise, random_pixels
from PIL import Image

import predict
import utils


def test_a_portrait(ask: Ask) -> None:
    code, out, _ = ask("--image", PORTRAIT, "--format", "json")
    record = json.loads(out)
    assert (code, record["status"], record["face"]) == (0, "ok", 1)
    assert record["emotion"] == "happy"
    assert record["width"] == record["height"]
    box = [record[name] for name in predict.BOX]
    np.testing.assert_allclose(box, [160, 70, 130, 130], atol=25)  # by eye
    assert predict.find_emotions(PORTRAIT, ROOT / MODEL) == [record]
    network = utils.load_model(str(ROOT / MODEL))
    assert predict.find_emotions(str(PORTRAIT), network) == [record]


@pytest.fixture(scope="module")
def portrait() -> Image.Image:
    """Return the portrait, 512 x 512 pixels, in color."""
    return utils.open_image(PORTRAIT)


@pytest.fixture(scope="module")
def face(portrait: Image.Image) -> predict.Face:
    """Return the face that is found in the portrait."""
    (face,) = predict.find_faces(portrait)
    return face


@pytest.mark.parametrize("name", ["ROTATE_90", "ROTATE_180", "ROTATE_270"])
def test_a_turned_portrait(
    portrait: Image.Image, face: predict.Face, name: str
) -> None:
    (turned,) = predict.find_faces(portrait.transpose(Image.Transpose[name]))
    np.testing.assert_array_equal(turned.pixels, face.pixels)
    x, y, side, _ = turned.box
    shown = portrait.transpose(Image.Transpose[name]).crop((x, y, x + side, y + side))
    back = np.rot90(turned.pixels, -turned.angle // 90)  # as the heat map is
    np.testing.assert_allclose(back.astype(int), utils.to_pixels(shown), atol=9)
    mask = Image.new("L", portrait.size)
    x, y, width, height = face.box
    mask.paste(255, (x, y, x + width, y + height))
    left, top, right, bottom = mask.transpose(Image.Transpose[name]).getbbox()
    assert turned.box == (left, top, right - left, bottom - top)


@pytest.mark.parametrize(("divisor", "tolerance"), [(4, 12), (24, 20)])
def test_a_dark_portrait(
    portrait: Image.Image, face: predict.Face, divisor: int, tolerance: int
) -> None:
    dark = portrait.point(lambda value: value // divisor)
    (found,) = predict.find_faces(dark)
    np.testing.assert_allclose(found.box, face.box, atol=tolerance)
    assert found.pixels.max() < 64  # what is classified has not been brightened


@pytest.mark.parametrize("size", [96, 224, 600])
def test_a_closely_cut_face_is_its_own_crop(
    portrait: Image.Image, face: predict.Face, size: int
) -> None:
    x, y, width, height = face.box
    crop = portrait.crop((x, y, x + width, y + height)).resize((size, size))
    (found,) = predict.find_faces(crop)
    assert found.box == (0, 0, size, size)


def test_several_real_faces(portrait: Image.Image, face: predict.Face) -> None:
    group = Image.new("RGB", (1200, 800), "gray")
    group.paste(portrait, (600, 200))
    group.paste(portrait.resize((256, 256)), (100, 50))
    half = np.add((100, 50, 0, 0), np.divide(face.box, 2))
    whole = np.add((600, 200, 0, 0), face.box)
    found = [face.box for face in predict.find_faces(group)]
    np.testing.assert_allclose(found, [half, whole], atol=12)


def test_a_wide_picture(portrait: Image.Image, face: predict.Face) -> None:
    wide = Image.new("RGB", (6000, 512), "gray")
    wide.paste(portrait, (4000, 0))
    (found,) = predict.find_faces(wide)
    np.testing.assert_allclose(found.box, np.add((4000, 0, 0, 0), face.box), atol=20)


def test_a_box_is_that_of_the_whole_photo(tmp_path: Path) -> None:
    path = noise(tmp_path / "large.jpg", 2400, 2500)  # decoded at half the size
    (face,) = predict.read_faces(str(path), "never")
    assert face.box == (0, 50, 2400, 2400)


def test_boxes_are_square_inside_and_from_left_to_right(search: FakeSearch) -> None:
    image = Image.fromarray(random_pixels(5, 2048)[:1024])
    search.boxes = [(780, 200, 60, 200), (0, 960, 80, 64), (40, 0, 1200, 1000)]
    faces = predict.find_faces(image)
    assert search.sizes == [(2048, 1024)]
    boxes = [face.box for face in faces]
    assert boxes == [(0, 938, 86, 86), (128, 0, 1024, 1024), (703, 193, 214, 214)]


def test_small_faces_are_reported_only_without_larger_ones(search: FakeSearch) -> None:
    image = Image.fromarray(random_pixels(5, 400))
    search.boxes = [(10, 10, 15, 19), (100, 100, 30, 40)]
    assert [face.box[0] for face in predict.find_faces(image)] == [94]
    search.boxes.pop()
    assert [face.box for face in predict.find_faces(image)] == [(8, 10, 20, 20)]


def test_faces_are_cropped_from_the_upright_picture(
    search: FakeSearch, tmp_path: Path
) -> None:
    pixels, exif = np.full((3000, 2000), 50, np.uint8), Image.Exif()
    pixels[900:948, 600:648] = random_pixels(8)
    exif[0x0112] = 6  # to be turned clockwise
    lying = Image.fromarray(pixels).transpose(Image.Transpose.ROTATE_90)
    lying.save(tmp_path / "phone.png", exif=exif)
    search.boxes = [(601.5, 901.5, 45, 45)]
    (face,) = predict.read_faces(str(tmp_path / "phone.png"), "auto")
    assert (search.sizes, face.box) == ([(2000, 3000)], (600, 900, 48, 48))
    np.testing.assert_array_equal(face.pixels, random_pixels(8))


def test_large_photos_are_decoded_reduced_unless_faces_get_too_small(
    portrait: Image.Image,
    face: predict.Face,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened = []

    def open_image(path: str, **options: int) -> Image.Image:
        image = original(path, **options)
        opened.append(image.size)
        return image

    original = utils.open_image
    monkeypatch.setattr(utils, "open_image", open_image)
    for size, sizes in ((1536, [(2000, 1500)]), (768, [(2000, 1500), (4000, 3000)])):
        photo = Image.new("RGB", (4000, 3000), "gray")
        photo.paste(portrait.resize((size, size)), (300, 500))
        photo.save(tmp_path / "photo.jpg", quality=95)
        opened.clear()
        (found,) = predict.read_faces(str(tmp_path / "photo.jpg"), "auto")
        assert opened == sizes
        box = np.array(face.box) * size / 512 + [300, 500, 0, 0]
        np.testing.assert_allclose(found.box, box, atol=0.05 * size)


@pytest.mark.parametrize(
    ("size", "faces", "box"),
    [
        ((64, 48), "auto", (8, 0, 48, 48)),
        ((400, 300), "never", (50, 0, 300, 300)),
        ((65, 20), "auto", None),
        ((48, 48), "always", None),
    ],
)
def test_when_faces_are_searched(
    search: FakeSearch, tmp_path: Path, size: tuple, faces: str, box: tuple | None
) -> None:
    path = str(noise(tmp_path / "image.png", *size))
    if box:
        assert [face.box for face in predict.read_faces(path, faces)] == [box]
    else:
        with pytest.raises(predict.NoFaceError, match="no face found; if it is a clos"):
            predict.read_faces(path, faces)
    assert bool(search.sizes) == (box is None)


@pytest.mark.parametrize("value", [0, 128, 255])
def test_what_shows_nothing_is_no_face(
    search: FakeSearch, tmp_path: Path, value: int, ask: Ask
) -> None:
    blank, tiny = tmp_path / "blank.png", noise(tmp_path / "tiny.png", 48, 11)
    Image.new("RGB", (48, 48), (value,) * 3).save(blank)
    words = ["--image", blank, tiny, "--format", "csv", "--faces", "never"]
    code, out, _ = ask(*words)
    assert (code, out.count(",no_face,")) == (1, 2)
    assert out.count(",shows nothing: nearly black or of one gray") == 2
    assert ask("--image", noise(tmp_path / "small.png", 12, 12))[0] == 0
    image = Image.new("L", (400, 300), value)  # and no crop of a blank place is one
    image.paste(Image.fromarray(random_pixels(5, 100)), (200, 100))
    search.boxes = [(10, 10, 60, 60), (210, 110, 60, 60)]
    assert [face.box for face in predict.find_faces(image)] == [(208, 108, 64, 64)]
