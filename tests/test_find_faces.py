"""Any picture: which faces are found in it, and how they are cut out.

The search is the real one on the portrait, and a fake with known boxes elsewhere.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import MODEL, PORTRAIT, ROOT, Ask, FakeSearch, noise, random_pixels
from PIL import Image, ImageFilter

import predict
import utils

PHOTO = utils.open_image(PORTRAIT)  # of 512 x 512 pixels, in color


def test_a_portrait(ask: Ask) -> None:
    code, out, _ = ask("--image", PORTRAIT, "--format", "json")
    record = json.loads(out)
    assert (code, record["status"], record["emotion"]) == (0, "ok", "happy")
    box = [record[name] for name in predict.BOX]
    np.testing.assert_allclose(box, [160, 70, 130, 130], atol=25)  # by eye
    network = utils.load_model(ROOT / MODEL)
    assert predict.find_emotions(str(PORTRAIT), network) == [record]


@pytest.mark.parametrize("name", ["ROTATE_90", "ROTATE_180", "ROTATE_270"])
def test_a_turned_portrait(name: str) -> None:
    image = PHOTO.transpose(Image.Transpose[name])
    [face], [turned] = predict.find_faces(PHOTO), predict.find_faces(image)
    np.testing.assert_array_equal(turned.pixels, face.pixels)
    x, y, side, _ = turned.box
    shown = utils.to_pixels(image.crop((x, y, x + side, y + side)))
    back = np.rot90(turned.pixels, -turned.angle // 90)  # as the heat map is
    np.testing.assert_allclose(back.astype(int), shown, atol=9)


def test_a_dark_portrait() -> None:
    dark = PHOTO.point(lambda value: 55 + value // 64)  # not found as it is
    (found,) = predict.find_faces(dark)
    np.testing.assert_allclose(found.box, [158, 51, 133, 133], atol=12)
    assert found.pixels.max() < 64  # what is classified has not been brightened


def test_a_closely_cut_face_is_its_own_crop() -> None:
    blurred = PHOTO.filter(ImageFilter.GaussianBlur(4))
    crop = blurred.crop((188, 81, 261, 154)).resize((224, 224))  # brow to chin
    (found,) = predict.find_faces(crop)
    assert (found.box, found.angle) == ((0, 0, 224, 224), 0)


def test_several_faces_in_a_panorama() -> None:
    wide = Image.new("RGB", (6000, 512), "gray")
    wide.paste(PHOTO, (4000, 0))
    wide.paste(PHOTO.resize((256, 256)), (100, 50))
    expected = [(100 + 79, 50 + 25, 66, 66), (4000 + 158, 51, 133, 133)]
    found = [face.box for face in predict.find_faces(wide)]
    np.testing.assert_allclose(found, expected, atol=20)


def test_boxes_are_square_inside_and_from_left_to_right(search: FakeSearch) -> None:
    image = Image.fromarray(random_pixels(5, 2048)[:1024])
    image.paste(0, (1500, 300, 1800, 600))  # what is found there shows nothing
    search.boxes = [(780, 200, 60, 200), (0, 960, 80, 64), (40, 0, 1200, 1000)]
    search.boxes.append((1600, 400, 60, 60))
    boxes = [face.box for face in predict.find_faces(image)]
    assert boxes == [(0, 938, 86, 86), (128, 0, 1024, 1024), (703, 193, 214, 214)]


def test_small_faces_are_reported_only_without_larger_ones(search: FakeSearch) -> None:
    image = Image.fromarray(random_pixels(5, 400))
    search.boxes = [(10, 10, 15, 19), (100, 100, 30, 40)]
    assert [face.box[0] for face in predict.find_faces(image)] == [94]
    search.boxes.pop()
    assert [face.box for face in predict.find_faces(image)] == [(8, 10, 20, 20)]


def test_large_photos_are_decoded_reduced_unless_faces_get_too_small(
    search: FakeSearch, tmp_path: Path
) -> None:
    path = tmp_path / "photo.jpg"
    Image.linear_gradient("L").resize((4000, 3000)).save(path)
    for side, sizes, box in (
        (100, [(2000, 1500)], (1192, 1192, 214, 214)),
        (80, [(2000, 1500), (4000, 3000)], (597, 597, 86, 86)),
    ):
        search.boxes, search.sizes = [(600, 600, side, side)], []
        (face,) = predict.read_faces(str(path), "auto")
        assert (search.sizes, face.box) == (sizes, box)


@pytest.mark.parametrize(
    ("size", "faces", "box"),
    [
        ((12, 12), "auto", (0, 0, 12, 12)),
        ((64, 48), "auto", (8, 0, 48, 48)),
        ((400, 300), "never", (50, 0, 300, 300)),
        ((65, 48), "auto", (9, 9, 32, 32)),
        ((48, 48), "always", (9, 9, 32, 32)),
    ],
)
def test_small_pictures_are_faces_and_larger_ones_are_searched(
    search: FakeSearch, tmp_path: Path, size: tuple, faces: str, box: tuple
) -> None:
    search.boxes = [(10, 10, 30, 30)]
    path = noise(tmp_path / "image.png", *size)
    assert [face.box for face in predict.read_faces(str(path), faces)] == [box]


def test_a_picture_without_a_face(search: FakeSearch, tmp_path: Path) -> None:
    path = noise(tmp_path / "image.png", 65, 20)
    with pytest.raises(predict.NoFaceError, match="no face found; if it is a closely"):
        predict.read_faces(str(path), "auto")
    Image.new("RGB", (48, 48), "gray").save(path)
    with pytest.raises(predict.NoFaceError, match=f"^{path}: shows nothing: nearly"):
        predict.read_faces(str(path), "never")
