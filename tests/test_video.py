"""Video: each frame is answered as a picture, then averaged over a second of a face.

The references are FFmpeg's own frames, the functions for pictures, and plain means.
"""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from conftest import EMOTIONS, MODEL, ROOT, UNIX, file_size_limit, random_pixels
from conftest import run_predict as run
from PIL import Image

import predict
import utils

PORTRAIT = ROOT / "data" / "astronaut.jpg"
SIZE = 320, 240
TABLE = "face  seconds    Angry     Fear    Happy  Neutral      Sad Surprise"


def write_clip(path: Path, frames: list[Image.Image], fps: float) -> Path:
    """Write a video."""
    writer = imageio_ffmpeg.write_frames(
        str(path), frames[0].size, fps=fps, macro_block_size=2
    )
    writer.send(None)
    for frame in frames:
        writer.send(frame.tobytes())
    writer.close()
    return path


def read_clip(path: Path) -> tuple[dict, list[Image.Image]]:
    """Return what FFmpeg tells about a video, and its frames."""
    frames = imageio_ffmpeg.read_frames(str(path))
    about = next(frames)
    return about, [Image.frombytes("RGB", about["size"], frame) for frame in frames]


def ffmpeg(*words: object) -> None:
    """Run FFmpeg."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error"]
    subprocess.run([*command, *map(str, words)], check=True)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a face that moves for 1.4 s, another for 1 s, and 0.6 s without any."""
    portrait = utils.open_image(PORTRAIT).resize((200, 200))
    frames = [Image.new("RGB", SIZE, "gray") for _ in range(30)]
    for number, frame in enumerate(frames[:14]):
        frame.paste(portrait, (number - 40, 20))
    for frame in frames[14:24]:
        frame.paste(portrait.transpose(Image.Transpose.FLIP_LEFT_RIGHT), (140, 20))
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", frames, 10)


def read_records(text: str) -> list[dict]:
    """Return the records of JSON lines."""
    return [json.loads(line) for line in text.splitlines()]


def test_each_face_keeps_its_number_and_the_mean_of_a_second(
    clip: Path, capsys: pytest.CaptureFixture
) -> None:
    network = utils.load_model(ROOT / MODEL)
    expected, answers = [], {1: [], 2: []}
    for number, frame in enumerate(read_clip(clip)[1][:24:2]):
        (face,), track = predict.find_faces(frame), 1 if number < 7 else 2
        (answer,) = network.predict(utils.to_input(face.pixels[np.newaxis]))
        answers[track].append(answer)
        mean = np.mean(answers[track][-5:], axis=0)  # five frames are a second
        expected.append((number / 5, track, face.box, mean))
    assert run("--image", clip, "--format", "json") == 0
    records = read_records(capsys.readouterr().out)
    assert len(records) == len(expected)
    for record, (time, track, box, mean) in zip(records, expected, strict=True):
        assert list(record)[:4] == ["path", "time", "status", "face"]
        assert (record["time"], record["face"]) == (pytest.approx(time), track)
        assert tuple(record[name] for name in predict.BOX) == box
        told = list(record["probabilities"].values())
        np.testing.assert_allclose(told, mean, atol=6e-5)
        assert record["emotion"] == EMOTIONS[np.argmax(mean)]


def test_csv_has_the_time_after_the_path(
    clip: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run("--image", clip, PORTRAIT, "--format", "csv", "--fps", 1) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.startswith("path,time,status,face,x,")
    begins = [row.split(",")[:4] for row in rows]
    video = [[str(clip), time, "ok", face] for time, face in (("0.0", "1"),)]
    assert begins[0] == video[0] and begins[-1] == [str(PORTRAIT), "", "ok", "1"]
    assert [row[1] for row in begins] == ["0.0", "1.0", "2.0", ""]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple]]:
    """Let frame after frame show the faces of a list: left, and the probabilities."""
    script: list[list[tuple]] = []
    answers: list[list[float]] = []
    frames: Iterator = iter(script)

    def find(image: Image.Image, size: int) -> list[predict.Face]:
        faces = next(frames)
        answers.extend(answer for _, answer in faces)
        pixels = random_pixels(1)
        return [predict.Face(pixels, (left, 50, 60, 60)) for left, _ in faces]

    def classify(network: utils.Network, faces: list) -> np.ndarray:
        taken, answers[: len(faces)] = answers[: len(faces)], []
        return np.reshape(taken, (len(faces), 6))

    monkeypatch.setattr(predict, "find_faces", find)
    monkeypatch.setattr(predict, "classify", classify)
    return script


HAPPY, SAD = [0, 0, 0.8, 0, 0.2, 0], [0, 0, 0.2, 0, 0.8, 0]


def test_text_tells_changes_and_sums_up(
    scripted: list, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    gray = [Image.new("RGB", SIZE)] * 15
    path = write_clip(tmp_path / "gray.mp4", gray, 5)
    scripted += [[(20, HAPPY)]] * 5  # means of 0.8 to 1.2 s: 0.8, 0.68, 0.56, 0.44
    scripted += [[(20, SAD), (200, SAD)]] * 4  # the second for less than a second
    scripted += [[]] * 2 + [[(30, SAD)]] * 4  # away for less than a second: the same
    assert run("--image", path) == 0
    assert capsys.readouterr().out.splitlines() == [
        "0:00.0 face 1: Happy (80.0 %)",
        "0:01.0 face 2: Sad (80.0 %)",
        "0:01.4 face 1: Sad (56.0 %)",
        "",
        TABLE,
        "   1      2.6    0.0 %    0.0 %   53.8 %    0.0 %   46.2 %    0.0 %",
    ]


def test_unsure_goes_by_the_mean(
    scripted: list, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = write_clip(tmp_path / "gray.mp4", [Image.new("RGB", SIZE)] * 4, 5)
    scripted += [[(20, HAPPY)], [(20, SAD)], [(20, HAPPY)], [(20, HAPPY)]]
    assert run("--image", path, "--min-confidence", 0.55) == 0
    assert capsys.readouterr().out.splitlines() == [
        "0:00.0 face 1: Happy (80.0 %)",
        "0:00.2 face 1: Unsure (Happy 50.0 %)",
        "0:00.4 face 1: Happy (60.0 %)",
    ]


def test_what_moves_too_far_or_stays_away_is_another_face() -> None:
    tracks: list[predict.Track] = []
    for time, lefts, numbers in (
        (0.0, [0, 100], [1, 2]),
        (0.2, [20, 90], [1, 2]),
        (0.4, [70, 20], [2, 1]),
        (1.4, [20, 200], [1, 3]),
        (2.5, [20, 200], [4, 5]),
    ):
        faces = [predict.Face(random_pixels(1), (x, 0, 60, 60)) for x in lefts]
        found = predict.follow(tracks, faces, np.ones((len(faces), 6)), time)
        assert [track.number for track in found] == numbers


def test_pictures_of_a_video(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    target = tmp_path / "new" / "copy.mp4"
    assert run("--image", clip, "--plot", target) == 0
    told = capsys.readouterr()
    (about, frames), (_, before) = read_clip(target), read_clip(clip)
    assert (about["size"], about["fps"], len(frames)) == (SIZE, 10, 30)
    changed = [
        np.abs(np.subtract(a, b, dtype=int)).max() > 100
        for a, b in zip(frames, before, strict=True)
    ]
    assert changed == [True] * 24 + [False] * 6  # boxes are where faces are
    assert run("--image", clip, "--plot", tmp_path) == 0
    assert capsys.readouterr() == told
    with Image.open(tmp_path / "clip-emotions.png") as image:
        assert image.size == (1000, 400)  # two faces below each other
    assert {path.name for path in tmp_path.iterdir()} == {"clip-emotions.png", "new"}


def test_phones_turn_their_videos(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    turned = tmp_path / "turned.mp4"
    ffmpeg("-i", clip, "-vf", "transpose=clock", "-qp", 0, tmp_path / "side.mp4")
    flag = ["-display_rotation", 90, "-i", tmp_path / "side.mp4"]
    ffmpeg(*flag, "-c", "copy", turned)
    assert read_clip(turned)[0]["size"] == SIZE
    records = []
    for path in (clip, turned):
        assert run("--image", path, "--format", "json") == 0
        records.append(read_records(capsys.readouterr().out))
    boxes = [[[r[name] for name in predict.BOX] for r in rows] for rows in records]
    np.testing.assert_allclose(*boxes, atol=3)


@pytest.mark.parametrize(
    ("options", "times"),
    [
        (["-vf", "setpts=10*PTS", "-r", 1], [0.0, 13.0]),  # 1 frame a second, 30 s
        (["-t", 1, "-r", 1000], [0.0, 0.8]),
        (["-t", 0.05], [0.0, 0.0]),  # one frame
        (["-vf", "select=lt(n\\,5)+gt(n\\,9)", "-fps_mode", "vfr"], [0.0, 1.2]),
    ],
)
def test_frame_rates(
    clip: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    options: list,
    times: list[float],
) -> None:
    path = tmp_path / "other.mkv"
    ffmpeg("-i", clip, *options, path)
    assert run("--image", path, "--format", "json") == 0
    records = read_records(capsys.readouterr().out)
    first = [record["time"] for record in records if record["face"] == 1]
    np.testing.assert_allclose([first[0], first[-1]], times, atol=0.41)
    steps = np.diff(first)
    assert (steps > 0.15).all()  # at most five looks a second


def test_what_is_wrong_is_one_line_and_keeps_whole_records(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    sound, text, cut = (tmp_path / name for name in ("a.mp4", "a.txt", "cut.mkv"))
    ffmpeg("-f", "lavfi", "-i", "sine=d=1", sound)
    text.write_text("no video")
    long = tmp_path / "long.mkv"
    ffmpeg("-stream_loop", 3, "-i", clip, "-c", "copy", long)
    cut.write_bytes(long.read_bytes()[: long.stat().st_size // 2])
    gray = write_clip(tmp_path / "gray.mp4", [Image.new("RGB", SIZE)] * 3, 5)
    for path, line in (
        (sound, predict.NO_VIDEO),
        (text, predict.NO_VIDEO),
        (gray, "no face found"),
    ):
        assert run("--image", path, "--format", "json") == 1
        out, err = capsys.readouterr()
        assert err == f"predict.py: error: {path}: {line}\n"
        assert [record["message"] for record in read_records(out)] == [line]
    assert run("--image", cut, "--format", "json") == 1
    out, err = capsys.readouterr()
    records = read_records(out)
    assert err.startswith(f"predict.py: error: {cut}: ends after ")
    assert err.endswith(" of 12.0 seconds\n") and err.count("\n") == 1
    assert len(records) > 12 and {record["status"] for record in records} == {"ok"}


def test_usage(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    before = clip.read_bytes()
    for words, line in (
        (["--image", clip, "--explain", tmp_path], f"{clip}: --explain takes no video"),
        (["--image", clip, "--plot", clip], "is to be read; name another file"),
        (["--image", PORTRAIT, "--plot", tmp_path / "a.mp4"], "the copy of a video"),
        (["--image", clip, "--fps", 0], "--fps: 0.0 is not above 0, up to 1000"),
        (["--evaluate", tmp_path, "--fps", 9], "--fps makes no sense with --evaluate"),
    ):
        assert run(*words) == 2
        assert line in capsys.readouterr().err
    assert clip.read_bytes() == before
    assert run("--image", clip, clip, "--plot", tmp_path / "a.mp4") == (
        f"predict.py: error: {tmp_path / 'a.mp4'}: "
        "one file for several images; name a folder"
    )


def test_videos_in_folders_are_passed_over(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "clip.mp4").write_bytes(clip.read_bytes())
    (tmp_path / "face.jpg").write_bytes(PORTRAIT.read_bytes())
    assert run("--image", tmp_path) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{tmp_path / 'face.jpg'}: Happy (")
    assert err == "predict.py: ignored, no pictures: 1\n"


@pytest.fixture
def camera(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let FFmpeg's own picture of stripes stand for the camera, for a second."""
    source = "testsrc=duration=1:size=320x240:rate=30"
    monkeypatch.setattr(predict, "name_camera", lambda n: (source, ["-f", "lavfi"]))


@pytest.mark.usefixtures("camera")
def test_a_camera(capsys: pytest.CaptureFixture) -> None:
    assert run("--image", "webcam:1", "--faces", "never", "--format", "json") == 0
    records = read_records(capsys.readouterr().out)
    assert [record["time"] for record in records] == [0.0, 0.2, 0.4, 0.6, 0.8]
    assert {record["path"] for record in records} == {"webcam:1"}
    assert run("--image", "webcam") == 0  # nobody is there
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("camera")
@pytest.mark.parametrize("from_camera", [True, False])
def test_ctrl_c_ends_with_the_table(
    scripted: list,
    clip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    from_camera: bool,
) -> None:
    scripted += [[(20, HAPPY)]] * 9

    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    classify, count = predict.classify, iter([None] * 5)
    monkeypatch.setattr(
        predict, "classify", lambda *a: (next(count, stop) or classify)(*a)
    )
    path = "webcam" if from_camera else clip
    words = ["--fps", 10, "--plot", tmp_path / "copy.mp4"]
    assert run("--image", path, *words) == (0 if from_camera else 130)
    assert (tmp_path / "copy.mp4").exists() == from_camera  # whole, or none at all
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "0:00.0 face 1: Happy (80.0 %)"


def test_a_terminal_has_one_line_for_a_camera(
    camera: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert run("--image", "webcam", "--faces", "never") == 0
    out = capsys.readouterr().out
    assert out.count("\r0:00.") == 5 and "\n" not in out.partition("0:00.8")[0]


@UNIX
def test_a_copy_on_a_full_disk(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    target = tmp_path / "copy.mp4"
    target.write_bytes(b"old")
    with file_size_limit(2000):
        assert f"predict.py: error: {target}: " in str(
            run("--image", clip, "--plot", target)
        )
    assert target.read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]
    line = f"predict.py: error: {target / 'a.mp4'}: cannot write: File exists"
    assert run("--image", clip, "--plot", target / "a.mp4") == line


def test_no_camera(capsys: pytest.CaptureFixture) -> None:
    assert run("--image", "webcam:77") == 1
    line = "webcam:77: no camera there, or it is not allowed: "
    err = capsys.readouterr().err
    assert err.startswith(f"predict.py: error: {line}") and err.count("\n") == 1
