"""Any picture: which faces are classified, and what is told of them in each format.

The search is the real one on the portrait, and a fake with known boxes elsewhere.
"""

import csv
import io
import json
import locale
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import EMOTIONS, LINUX, MODEL, ROOT, UNIX, file_size_limit, random_pixels
from PIL import Image

import predict
import train
import utils
from utils import UserError

CROP = ROOT / "data" / "demo" / "test" / "happy" / "03.png"
PORTRAIT = ROOT / "data" / "astronaut.jpg"
FACE = (175, 65, 100, 150)  # of the astronaut, by eye: left, top, width, height


class FakeSearch:
    """Find faces at given boxes: left, top, width, height."""

    def __init__(self) -> None:
        self.boxes: list[tuple[float, ...]] = []
        self.sizes: list[tuple[int, int]] = []

    def __call__(self, image: Image.Image, size: int, border: float = 0) -> tuple:
        """Answer as predict.search does."""
        self.sizes.append(image.size)
        boxes = np.reshape(self.boxes, (-1, 4)).astype(float)
        boxes[:, 2:] += boxes[:, :2]
        return boxes, np.ones(len(boxes))


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch) -> FakeSearch:
    """Put a search that finds nothing yet into predict.py's hands."""
    search = FakeSearch()
    monkeypatch.setattr(predict, "search", search)
    return search


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """Write a picture of 400 x 300 pixels."""
    return noise(tmp_path / "photo.png", 400, 300)


def noise(path: Path, width: int, height: int) -> Path:
    """Write a picture of noise."""
    pixels = np.random.default_rng(3).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def run(*words: object) -> int:
    """Run predict.py here, with the model that ships; return its exit code."""
    try:
        return predict.main(["--model", str(ROOT / MODEL), *map(str, words)])
    except SystemExit as stop:
        return stop.code


def test_a_portrait(capsys: pytest.CaptureFixture) -> None:
    assert run("--image", PORTRAIT, "--format", "json") == 0
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
    assert run("--image", blank, tiny, "--format", "csv", "--faces", "never") == 1
    out = capsys.readouterr().out
    assert (
        out.count(",no_face,") == out.count(",shows nothing: of one gray all over") == 2
    )
    assert run("--image", small) == 0
    image = Image.new("L", (400, 300), value)  # and no crop of a blank place is one
    image.paste(Image.fromarray(random_pixels(5, 100)), (200, 100))
    search.boxes = [(10, 10, 60, 60), (210, 110, 60, 60)]
    assert [face.box for face in predict.find_faces(image)] == [(208, 108, 64, 64)]


@UNIX
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be-sig"])
def test_lists_as_any_system_writes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str, end: str
) -> None:
    names = ["a b.png", "\u9854.png", '"as it stands"', "'quoted'.png"]
    for name in names:
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    lines = ["'a b.png'", '"\u9854.png"', names[2], "", f'"{names[3]}"', '"none.png"']
    content = end.join(lines).encode(encoding.removesuffix("-be-sig"))
    if encoding == "utf-16-be-sig":
        content = b"\xfe\xff" + end.join(lines).encode("utf-16-be")
    assert predict.read_list(content) == [*names, "none.png"]


def test_lists_in_an_encoding_of_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locale, "getencoding", lambda: "cp1252")
    assert predict.read_list(b"caf\xe9.png\r\n\x81.png") == ["café.png", "\udc81.png"]


def test_patterns_that_the_shell_has_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.png", "a.png", "deep/c.png", "a[1].png", "d.jpg"):
        (tmp_path / name).write_bytes(CROP.read_bytes())
    monkeypatch.chdir(tmp_path)
    for pattern, expected in {
        "?.png": ["a.png", "b.png"],
        "**/*.png": ["a.png", "a[1].png", "b.png", os.path.join("deep", "c.png")],
        "de*": [os.path.join("deep", "c.png")],
        "a[1].png": ["a[1].png"],  # a file of that name
    }.items():
        assert predict.find_images([pattern])[0] == expected
    with pytest.raises(UserError, match=r"^\*\.gif: no such file or folder$"):
        predict.find_images(["*.gif"])


def test_what_is_no_file(capsys: pytest.CaptureFixture) -> None:
    for image, reason in {
        "https://example.org/a.jpg": "a URL; save the picture, and name its file",
        "0": "no such file or folder; the camera is webcam:0",
    }.items():
        with pytest.raises(SystemExit) as stop:
            predict.main(["--image", image])
        assert stop.value.code == f"predict.py: error: {image}: {reason}"


def test_other_files_of_a_folder_are_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    crop, notes = tmp_path / "a.png", tmp_path / "notes.txt"
    crop.write_bytes(CROP.read_bytes())
    for path in (notes, tmp_path / "clip.mp4", tmp_path / "._a.png"):
        path.write_bytes(b"something else")
    assert run("--image", tmp_path) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and out.startswith(f"{crop}: ")
    assert err == "predict.py: ignored, no pictures: 2\n"
    assert run("--image", crop, notes) == 1
    assert (
        capsys.readouterr().err == f"predict.py: error: {notes}: {predict.NO_VIDEO}\n"
    )


def test_records_come_one_by_one_and_in_order() -> None:
    second, begun = threading.Event(), []

    def paths() -> Iterator[str]:
        for number in range(1000):
            begun.append(number)
            yield str(number)

    def read(path: str) -> list:
        if path == "1":
            assert second.wait(60)
        return []

    results = predict.predict_files(utils.load_model(ROOT / MODEL), paths(), read)
    assert next(results) == ("0", [])  # although the second is not done
    assert len(begun) <= predict.AHEAD
    second.set()
    assert [path for path, _ in results] == [str(n) for n in range(1, 1000)]


@pytest.fixture
def mixed(search: FakeSearch, tmp_path: Path, photo: Path) -> list[Path]:
    """Return a crop, a photo of two faces, and a file that is no image."""
    search.boxes = [(202, 102, 75, 75), (12, 22, 56, 56)]
    crop, broken = tmp_path / "crop.png", tmp_path / "broken.jpg"
    crop.write_bytes(CROP.read_bytes())
    broken.write_bytes(b"")
    return [crop, photo, broken]


def expected(path: Path, faces: str = "auto") -> list[np.ndarray]:
    """Return the probabilities of an image's faces."""
    network = utils.load_model(ROOT / MODEL)
    found = predict.read_faces(str(path), faces)
    pixels = np.stack([face.pixels for face in found])
    return list(network.predict(utils.to_input(pixels)))


def test_text(mixed: list[Path], capsys: pytest.CaptureFixture) -> None:
    assert run("--image", *mixed) == 1
    out, err = capsys.readouterr()
    crop, photo, broken = mixed
    answers = []
    for probabilities in [*expected(crop), *expected(photo)]:
        best = probabilities.argmax()
        answers.append(
            f"{EMOTIONS[best].capitalize()} ({100 * max(probabilities):.1f} %)"
        )
    assert out == (
        f"{crop}: {answers[0]}\n{photo} face 1: {answers[1]}\n"
        f"{photo} face 2: {answers[2]}\n"
    )
    assert err == f"predict.py: error: {broken}: empty file\n"


def test_csv(mixed: list[Path], capsys: pytest.CaptureFixture) -> None:
    assert run("--image", *mixed, "--format", "csv", "--min-confidence", 0.999) == 1
    out = capsys.readouterr().out
    header = (
        "path,time,status,face,x,y,width,height,emotion,confidence,"
        "angry,fear,happy,neutral,sad,surprise,message"
    )
    assert out.splitlines()[0] == header
    rows = list(csv.DictReader(io.StringIO(out)))
    crop, photo, broken = map(str, mixed)
    assert [row["path"] for row in rows] == [crop, photo, photo, broken]
    assert [row["status"] for row in rows] == ["unsure", "unsure", "unsure", "error"]
    assert [row["face"] for row in rows] == ["1", "1", "2", ""]
    places = [[row[n] for n in ("x", "y", "width", "height")] for row in rows]
    assert places == [
        ["0", "0", "48", "48"],
        ["10", "20", "60", "60"],
        ["200", "100", "80", "80"],
        ["", "", "", ""],
    ]
    for row, probabilities in zip(
        rows, [*expected(mixed[0]), *expected(mixed[1])], strict=False
    ):
        rounded = [str(round(float(p), 4)) for p in probabilities]
        assert [row[name] for name in EMOTIONS] == rounded
        assert row["confidence"] == rounded[probabilities.argmax()]
        assert row["emotion"] == EMOTIONS[probabilities.argmax()]
        assert row["message"] == ""
    assert out.splitlines()[-1] == f"{broken},,error,{',' * 13}empty file"


def test_json(
    mixed: list[Path], search: FakeSearch, capsys: pytest.CaptureFixture
) -> None:
    search.boxes = []
    assert run("--image", *mixed, "--format", "json") == 1
    out, err = capsys.readouterr()
    crop, photo, broken = map(json.loads, out.splitlines())
    (probabilities,) = expected(mixed[0])
    assert crop == {
        "path": str(mixed[0]),
        "time": None,
        "status": "ok",
        "face": 1,
        "x": 0,
        "y": 0,
        "width": 48,
        "height": 48,
        "emotion": EMOTIONS[probabilities.argmax()],
        "confidence": pytest.approx(max(probabilities), abs=5e-5),
        "probabilities": pytest.approx(
            dict(zip(EMOTIONS, probabilities, strict=True)), abs=5.1e-5
        ),
        "message": "",
    }
    assert (photo["status"], photo["face"], photo["emotion"]) == ("no_face", None, None)
    assert (broken["status"], broken["message"]) == ("error", "empty file")
    assert "--faces never" in photo["message"]
    assert err.splitlines() == [
        f"predict.py: error: {mixed[1]}: {photo['message']}",
        f"predict.py: error: {mixed[2]}: empty file",
    ]


def test_unsure(capsys: pytest.CaptureFixture) -> None:
    assert run("--image", CROP, "--min-confidence", 1) == 0
    probabilities = expected(CROP)[0]
    emotion = EMOTIONS[probabilities.argmax()].capitalize()
    line = f"Unsure ({emotion} {probabilities.max():.1%})".replace("%", " %")
    assert capsys.readouterr().out.splitlines()[0] == line


def test_output_is_replaced_only_by_a_record(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "emotions.csv"
    path.write_text("old")
    with pytest.raises(SystemExit, match="no such file"):
        predict.main(["--image", "missing.jpg", "--output", str(path)])
    assert path.read_text() == "old"
    assert run("--image", CROP, "--format", "csv", "--output", path) == 0
    assert capsys.readouterr() == ("", "")
    assert run("--image", CROP, "--format", "csv") == 0
    assert path.read_text() == capsys.readouterr().out
    new = tmp_path / "new" / "folder" / path.name
    assert run("--image", CROP, "--format", "csv", "--output", new) == 0
    assert new.read_text() == path.read_text()
    with pytest.raises(SystemExit, match=r"emotions\.csv/a\.csv: cannot write: "):
        predict.main(["--image", str(CROP), "--output", str(path / "a.csv")])


def test_a_list_on_stdin_in_its_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    paths = [tmp_path / f"{number:03}.png" for number in range(150)]
    faces = [random_pixels(number) for number in range(150)]
    for path, face in zip(paths, faces, strict=True):
        Image.fromarray(face).save(path)
    paths = paths[::-1]
    paths.insert(70, tmp_path / "missing.png")
    text = "".join(f"{path}\n" for path in paths).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    assert run("--image", "-", "--format", "json") == 1
    out, err = capsys.readouterr()
    records = [json.loads(line) for line in out.splitlines()]
    assert [record["path"] for record in records] == [str(path) for path in paths]
    assert [r["status"] for r in records].count("ok") == 150
    assert records[70]["message"] == "no such file"
    network = utils.load_model(ROOT / MODEL)
    values = network.predict(utils.to_input(np.stack(faces[::-1])))
    got = [r["confidence"] for r in records if r["status"] == "ok"]
    np.testing.assert_allclose(got, values.max(axis=1), atol=1e-4)
    assert err == f"predict.py: error: {tmp_path}/missing.png: no such file\n"


@pytest.mark.parametrize("option", ["--plot", "--explain"])
def test_pictures(
    mixed: list[Path], tmp_path: Path, option: str, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "drawn"
    other = tmp_path / "other" / "crop.png"
    other.parent.mkdir()
    other.write_bytes(mixed[0].read_bytes())
    assert run("--image", *mixed, other, option, folder) == 1
    names = {path.name for path in folder.iterdir()}
    kind = {"--plot": "emotions", "--explain": "heat"}[option]
    assert names == {f"crop-{kind}.png", f"crop-{kind}-2.png", f"photo-{kind}.png"}
    for path in folder.iterdir():
        with Image.open(path) as image:
            assert image.size == ((960, 480) if "crop" in path.name else (1120, 480))
    assert run("--image", mixed[1], option, tmp_path / "one.png") == 0
    drawn = folder / f"photo-{kind}.png"
    assert (tmp_path / "one.png").read_bytes() == drawn.read_bytes()
    with pytest.raises(SystemExit, match="name a folder"):
        predict.main(["--image", *map(str, mixed), option, "one.png"])


def test_a_plot_has_the_picture_s_resolution(
    search: FakeSearch, tmp_path: Path
) -> None:
    photo, plot = noise(tmp_path / "photo.png", 1200, 700), tmp_path / "plot.png"
    assert run("--image", photo, "--plot", plot) == 1  # no face
    with Image.open(photo) as image, Image.open(plot) as drawn:
        assert drawn.size == (1680, 700)
        cut = drawn.convert("RGB").crop((0, 0, 1200, 700))
        difference = np.asarray(cut, int) - np.asarray(image)  # no frame, every pixel
        assert np.abs(difference).max() <= 2
    noise(photo, 3000, 2500)
    search.boxes = [(50 * n, 40 * n, 80, 80) for n in range(50)]
    assert run("--image", photo, "--plot", plot) == 0
    with Image.open(plot) as drawn:
        assert drawn.size == (2000 + 833, 1667)


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """Return a folder of photos whose names are those of what would be drawn."""
    folder = tmp_path / "album"
    (folder / "sub").mkdir(parents=True)
    for name in ("mia.png", "sub/MIA.jpg", "sub/mia-emotions.png", "mia-emotions.png"):
        (folder / name).write_bytes(CROP.read_bytes())
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Return what the files below a folder hold."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_what_was_drawn_is_drawn_anew_and_not_read(
    album: Path, capsys: pytest.CaptureFixture
) -> None:
    photos, words = contents(album), ["--image", album, "--plot", album]
    words += ["--output", album / "result.csv", "--format", "csv"]
    assert run(*words) == 0
    assert capsys.readouterr() == ("", "")
    written = contents(album)
    drawn = {"mia-emotions-2.png", "MIA-emotions.png", "mia-emotions-emotions.png"}
    drawn |= {"mia-emotions-emotions-2.png"}
    assert set(written) == {*photos, *drawn, "result.csv"}
    assert written == written | photos
    rows = (album / "result.csv").read_text().splitlines()[1:]
    assert [Path(row.split(",")[0]).name for row in rows] == [
        "mia-emotions.png",
        "mia.png",
        "MIA.jpg",
        "mia-emotions.png",
    ]
    assert run(*words) == 0
    assert capsys.readouterr() == ("", "")
    assert contents(album) == written


@pytest.mark.parametrize("ending", ["png", "jpg", "pdf", "svg"])
def test_the_file_drawn_into_is_no_input_of_the_next_run(
    tmp_path: Path, ending: str, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "mia.png").write_bytes(CROP.read_bytes())
    target = tmp_path / f"a.{ending}"
    words = ["--image", tmp_path, "--plot", target]
    assert run(*words) == 0
    first = capsys.readouterr()
    assert run(*words) == 0
    assert capsys.readouterr() == first
    if ending in ("png", "jpg"):
        assert run("--image", tmp_path) == 0
        assert capsys.readouterr() == first
        assert run("--image", target) == 1
        message = "drawn by predict.py; name the photo itself"
        assert capsys.readouterr().err == f"predict.py: error: {target}: {message}\n"


def refuse(capsys: pytest.CaptureFixture, line: str, *words: object) -> None:
    """Make sure that predict.py ends with a line and 2."""
    assert run(*words) == 2
    assert capsys.readouterr() == ("", f"predict.py: error: {line}\n")


@UNIX
@pytest.mark.parametrize("option", ["--plot", "--explain", "--output"])
def test_no_image_is_written_over(
    album: Path,
    option: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    mia = album / "mia.png"
    (album / "link.png").symlink_to("mia.png")
    os.link(mia, album / "hard.png")
    before, line = contents(album), "{}: is to be read; name another file to write"
    monkeypatch.chdir(album)
    for name in ("mia.png", "./sub/../mia.png", mia, "link.png", "hard.png"):
        refuse(capsys, line.format(mia), "--image", mia, option, name)
        refuse(capsys, line.format("link.png"), "--image", "link.png", option, name)
    refuse(capsys, line.format("sub/MIA.jpg"), "--image", "sub", option, "sub/MIA.jpg")
    Path("model.png").write_bytes((ROOT / MODEL).read_bytes())
    words = ["--model", "model.png", "--image", mia, option, "model.png"]
    refuse(capsys, line.format("model.png"), *words)
    Path("model.png").unlink()
    assert contents(album) == before


def test_no_image_of_a_list_is_written_over(
    album: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (album / "damaged.png").write_bytes(CROP.read_bytes()[:99])
    (album / "notes.txt").write_text("no picture")
    (album / "MIA-heat.png").write_bytes(CROP.read_bytes())
    before = contents(album)
    for output, named, line in (
        ("mia.png", True, "../album/mia.png: is to be read; name another file to w"),
        ("mia.png", False, "mia.png: is a picture; name another file to write"),
        ("damaged.png", False, "damaged.png: is a picture; name another file to write"),
        (
            "notes.txt",
            True,
            "../album/notes.txt: is to be read; name another file to w",
        ),
    ):
        lines = [str(CROP)] * 60 + [f"../album/{output}"] * named
        text = io.BytesIO("\n".join(lines).encode())
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(text))
        monkeypatch.chdir(album)
        assert run("--image", "-", "--output", output) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith(f"predict.py: error: {line}")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"sub/MIA.jpg\n")))
    assert run("--image", "-", "--explain", ".") == 0
    assert set(contents(album)) == {*before, "MIA-heat-2.png"}
    assert contents(album) == contents(album) | before


def test_no_file_is_written_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    line = "{}: is to be written twice; name another file"
    words = ["--image", CROP, "--plot", "a.png"]
    refuse(capsys, line.format("b/../A.png"), *words, "--explain", "b/../A.png")
    refuse(capsys, line.format("a.png"), *words, "--output", "a.png")
    refuse(capsys, line.format("b"), *words[:2], "--plot", "b", "--output", "b")
    assert list(tmp_path.iterdir()) == []
    words[3] = "03-heat.png"
    assert run(*words, "--explain", ".", "--output", "03-heat-2.png") == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"03-heat.png", "03-heat-2.png", "03-heat-3.png"}


def test_names_are_cut_between_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(name: bytes) -> str:
        return name.decode()  # as Windows does: without surrogates for broken bytes

    monkeypatch.setattr(os, "fsdecode", decode)
    path = "x" + 90 * "\u9854" + ".png"
    (picture,) = {
        predict.name_picture(tmp_path, name, "heat", set())
        for name in (path, f"sub/{path}")
    }
    assert picture == tmp_path / ("x" + 66 * "\u9854" + "-heat.png")


def test_heat_is_where_an_answer_rests() -> None:
    class Network:
        """Is the surer of class 0 the brighter a patch of the face is."""

        def predict(self, faces: np.ndarray, tta: bool) -> np.ndarray:
            bright = faces[:, 20:24, 30:34, 0].mean(axis=(1, 2))
            return np.stack([bright, 1 - bright], axis=1)

    pixels = np.zeros((48, 48), np.uint8)
    pixels[20:24, 30:34] = 255
    heat = predict.occlude(Network(), pixels, np.array([0.9, 0.1]))
    assert heat.shape == (48, 48)
    assert heat[20:24, 30:34].min() > 0.5 and heat.max() == 1
    far = np.abs(np.mgrid[-22:26, -32:16]).max(axis=0) > 16
    assert heat[far].max() == 0
    assert predict.occlude(Network(), pixels, np.array([0.1, 0.9])).max() == 0


@pytest.fixture
def strange(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, search: FakeSearch
) -> list[str]:
    """Return strange names of a crop, in a folder that is the current one."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    names = [
        "two\nlines.png",
        "\x1b[2Jcleared.png",
        os.fsdecode(b"latin-\xe9.png"),
        "\u202egnp.right-to-left",
        "-dash.png",
        "=1+1.png",
        "+1.png",
        "@home.png",
        "x" * 251 + ".png",
        "\u9854" * 83 + ".png",
    ]
    for name in names:
        Path(name).write_bytes(CROP.read_bytes())
    return names


ESCAPED = [
    r"two\nlines.png",
    r"\x1b[2Jcleared.png",
    r"latin-\udce9.png",
    r"\u202egnp.right-to-left",
]


@LINUX
def test_strange_names_in_text(
    strange: list[str], capsys: pytest.CaptureFixture
) -> None:
    missing = [f"no\n{name}" for name in strange[:2]]
    words = [f"--image={strange[4]}", "--model", str(ROOT / MODEL)]
    assert run(*words) == 0  # a leading dash
    capsys.readouterr()
    assert run("--image", *strange[:4], *strange[5:], *missing) == 1
    out, err = capsys.readouterr()
    lines = out.split("\n")
    names = [*ESCAPED, *strange[5:]]
    assert [line.rpartition(": ")[0] for line in lines] == [*names, ""]
    assert err.split("\n") == [
        rf"predict.py: error: no\n{ESCAPED[0]}: no such file",
        rf"predict.py: error: no\n{ESCAPED[1]}: no such file",
        "",
    ]
    with pytest.raises(SystemExit, match=r"error: no\\ntwo\\nlines\.png: no such file"):
        predict.main(["--image", missing[0]])


@LINUX
def test_strange_names_in_csv_and_json(
    strange: list[str], capsys: pytest.CaptureFixture
) -> None:
    assert run("--format", "csv", f"--image={strange[4]}") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["path"] for row in rows] == ["./-dash.png"]
    images = [*strange[:4], *strange[5:]]
    assert run("--image", *images, "--format", "csv") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    formulas = ["./=1+1.png", "./+1.png", "./@home.png"]
    assert [row["path"] for row in rows] == [*ESCAPED, *formulas, *strange[8:]]
    assert run("--image", *images, "--format", "json") == 0
    out = capsys.readouterr().out
    assert out.replace("\n", "").isascii() and "\x1b" not in out
    assert [json.loads(line)["path"] for line in out.splitlines()] == images


@LINUX
def test_strange_names_are_drawn(strange: list[str]) -> None:
    assert run("--image", ".", "--plot", "drawn") == 0
    sizes = [Image.open(path).size for path in Path("drawn").iterdir()]
    assert len(sizes) == len(strange) and min(map(min, sizes)) >= 48


@UNIX
def test_a_full_disk_leaves_whole_records(tmp_path: Path) -> None:
    path, record = tmp_path / "emotions.csv", "x" * 99 + "\n"
    output = predict.Output(path, "csv", EMOTIONS)
    with (
        file_size_limit(1050),
        pytest.raises(UserError, match=r"emotions\.csv: cannot write: "),
    ):
        for _ in range(20):
            output.write(record)
    assert path.read_text() == 10 * record


def test_messages_about_usage_are_safe_to_print(capsys: pytest.CaptureFixture) -> None:
    for parse, words in (  # argparse itself would print both as they are
        (predict.parse_args, ["--image", "a", "--\x1b[2J\n"]),
        (train.parse_args, ["--model-path", "\x1b[2J\n"]),
    ):
        with pytest.raises(SystemExit):
            parse(words)
        error = capsys.readouterr().err
        assert r"\x1b[2J\n" in error and "\x1b" not in error


def test_temporary_files_are_nobody_else_s(tmp_path: Path) -> None:
    names = {"a.png", ".a-emotions.new.txt", "a-emotions.new.png"}
    for name in names:
        (tmp_path / name).write_bytes(CROP.read_bytes())
    assert run("--image", tmp_path / "a.png", "--plot", tmp_path) == 0
    assert {path.name for path in tmp_path.iterdir()} == {*names, "a-emotions.png"}


@LINUX
def test_a_full_stdout() -> None:
    with open("/dev/full", "w") as full:
        words = [sys.executable, ROOT / "predict.py", "--image", CROP]
        result = subprocess.run(
            words, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True
        )
    line = "predict.py: error: stdout: cannot write: No space left on device\n"
    assert (result.returncode, result.stderr) == (1, line)


def test_wrong_usage(capsys: pytest.CaptureFixture) -> None:
    for words in (
        ["--image", "a.jpg", "--evaluate", "b"],
        ["--image", "a.jpg", "--min-confidence", "2"],
        ["--image", "a.jpg", "--faces", "maybe"],
        ["--image", "a.jpg", "--format", "xml"],
    ):
        with pytest.raises(SystemExit) as stop:
            predict.main(words)
        assert stop.value.code == 2
