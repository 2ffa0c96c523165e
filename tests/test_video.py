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
from conftest import (
    EMOTIONS,
    MODEL,
    PORTRAIT,
    ROOT,
    UNIX,
    Ask,
    file_size_limit,
    random_pixels,
)
from PIL import Image

import predict
import utils

SIZE = 320, 240


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


def watch(ask: Ask, *words: object) -> tuple[int, list[dict], str]:
    """Return exit code, records and stderr of predict.py --format json --image."""
    code, out, err = ask("--format", "json", "--image", *words)
    return code, list(map(json.loads, out.splitlines())), err


def test_each_face_keeps_its_number_and_the_mean_of_a_second(
    clip: Path, ask: Ask
) -> None:
    network = utils.load_model(ROOT / MODEL)
    expected, answers = [], {1: [], 2: []}
    for number, frame in enumerate(read_clip(clip)[1][:24:2]):
        (face,), track = predict.find_faces(frame), 1 if number < 7 else 2
        (answer,) = network.predict(utils.to_input(face.pixels[np.newaxis]))
        answers[track].append(answer)
        mean = np.mean(answers[track][-5:], axis=0)  # five frames are a second
        expected.append((number / 5, track, face.box, mean))
    code, records, _ = watch(ask, clip)
    assert (code, len(records)) == (0, len(expected))
    for record, (time, track, box, mean) in zip(records, expected, strict=True):
        assert list(record)[:4] == ["path", "time", "status", "face"]
        assert (record["time"], record["face"]) == (pytest.approx(time), track)
        assert tuple(record[name] for name in predict.BOX) == box
        told = list(record["probabilities"].values())
        np.testing.assert_allclose(told, mean, atol=6e-5)
        assert record["emotion"] == EMOTIONS[np.argmax(mean)]
    _, out, _ = ask("--image", clip, PORTRAIT, "--format", "csv", "--fps", 1)
    rows = [line.split(",")[:4] for line in out.splitlines()]
    assert rows[:2] == [
        ["path", "time", "status", "face"],
        [str(clip), "0.0", "ok", "1"],
    ]
    assert rows[-1] == [str(PORTRAIT), "", "ok", "1"]


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


def test_text_reports_changes_and_sums_up(
    scripted: list, tmp_path: Path, ask: Ask
) -> None:
    path = write_clip(tmp_path / "gray.mp4", [Image.new("RGB", SIZE)] * 15, 5)
    scripted += [[(20, HAPPY)]] * 5  # means of 0.8 to 1.2 s: 0.8, 0.68, 0.56, 0.44
    scripted += [[(20, SAD), (200, SAD)]] * 4  # the second for less than a second
    scripted += [[]] * 2 + [[(30, SAD)]] * 4  # away for less than a second: the same
    code, out, _ = ask("--image", path, "--min-confidence", 0.6)
    assert code == 0
    assert out.splitlines() == [
        "0:00.0 face 1: Happy (80.0 %)",
        "0:01.0 face 2: Sad (80.0 %)",
        "0:01.2 face 1: Unsure (Happy 56.0 %)",
        "0:01.4 face 1: Unsure (Sad 56.0 %)",
        "0:01.6 face 1: Sad (68.0 %)",
        "",
        "face  seconds    Angry     Fear    Happy  Neutral      Sad Surprise",
        "   1      2.6    0.0 %    0.0 %   53.8 %    0.0 %   46.2 %    0.0 %",
    ]


def test_a_face_that_jumps_or_was_away_gets_a_new_number() -> None:
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
    for time in (4, 5.5):  # looks that are further apart than a second
        found = predict.follow(tracks, faces, np.ones((2, 6)), time, gap=1.6)
        assert [track.number for track in found] == [4, 5]


def test_pictures_of_a_video(clip: Path, tmp_path: Path, ask: Ask) -> None:
    target = tmp_path / "new" / "copy.mp4"
    told = ask("--image", clip, "--plot", target)
    assert told[0] == 0
    (about, frames), (_, before) = read_clip(target), read_clip(clip)
    assert (about["size"], about["fps"], len(frames)) == (SIZE, 10, 30)
    changed = [
        np.abs(np.subtract(a, b, dtype=int)).max() > 100
        for a, b in zip(frames, before, strict=True)
    ]
    assert changed == [True] * 24 + [False] * 6  # boxes are where faces are
    assert ask("--image", clip, "--plot", tmp_path) == told
    with Image.open(tmp_path / "clip-emotions.png") as image:
        assert image.size == (1000, 400)  # two faces below each other
    assert {path.name for path in tmp_path.iterdir()} == {"clip-emotions.png", "new"}


def test_phones_turn_their_videos(clip: Path, tmp_path: Path, ask: Ask) -> None:
    turned = tmp_path / "turned.mp4"
    ffmpeg("-i", clip, "-vf", "transpose=clock", "-qp", 0, tmp_path / "side.mp4")
    flag = ["-display_rotation", 90, "-i", tmp_path / "side.mp4"]
    ffmpeg(*flag, "-c", "copy", turned)
    assert read_clip(turned)[0]["size"] == SIZE
    boxes = [
        [[record[name] for name in predict.BOX] for record in watch(ask, path)[1]]
        for path in (clip, turned)
    ]
    np.testing.assert_allclose(*boxes, atol=3)


@pytest.mark.parametrize(
    ("options", "times"),
    [
        (["-vf", "setpts=10*PTS", "-r", 1], [0.0, 13.0]),  # 1 frame a second, 30 s
        (["-t", 1, "-r", 1000], [0.0, 0.8]),
        (["-vf", "select=lt(n\\,5)+gt(n\\,9)", "-fps_mode", "vfr"], [0.0, 1.2]),
    ],
)
def test_frame_rates(
    clip: Path, tmp_path: Path, options: list, times: list[float], ask: Ask
) -> None:
    path = tmp_path / "other.mkv"
    ffmpeg("-i", clip, *options, path)
    code, records, _ = watch(ask, path)
    assert code == 0
    first = [record["time"] for record in records if record["face"] == 1]
    np.testing.assert_allclose([first[0], first[-1]], times, atol=0.41)
    assert (np.diff(first) > 0.15).all()  # at most five looks a second


def test_files_without_video_or_face(tmp_path: Path, ask: Ask) -> None:
    sound, gray = tmp_path / "sound.mp4", tmp_path / "gray.mp4"
    ffmpeg("-f", "lavfi", "-i", "sine=d=1", sound)
    write_clip(gray, [Image.new("RGB", SIZE)] * 3, 5)
    for path, reason in {sound: predict.NO_VIDEO, gray: "no face found"}.items():
        code, [record], err = watch(ask, path)
        assert (code, err) == (1, f"predict.py: error: {path}: {reason}\n")
        assert record["message"] == reason


def test_a_cut_video_keeps_whole_records(clip: Path, tmp_path: Path, ask: Ask) -> None:
    long, cut = tmp_path / "long.mkv", tmp_path / "cut.mkv"
    ffmpeg("-stream_loop", 3, "-i", clip, "-c", "copy", long)
    cut.write_bytes(long.read_bytes()[: long.stat().st_size // 2])
    code, records, err = watch(ask, cut)
    assert code == 1 and err.count("\n") == 1
    assert err.startswith(f"predict.py: error: {cut}: ends after ")
    assert err.endswith(" of 12.0 seconds\n")
    assert len(records) > 12 and {record["status"] for record in records} == {"ok"}


def test_usage(clip: Path, tmp_path: Path, ask: Ask) -> None:
    before, copy = clip.read_bytes(), tmp_path / "a.mp4"
    for image, option, target, line in (
        (clip, "--explain", tmp_path, f"{clip}: --explain does not work on videos"),
        (clip, "--plot", clip, f"{clip}: is an input; name another file to write"),
        (
            PORTRAIT,
            "--plot",
            copy,
            f"{copy}: is a video file, but {PORTRAIT} is not a video",
        ),
    ):
        error = f"predict.py: error: {line}\n"
        assert ask("--image", image, option, target) == (2, "", error)
    assert clip.read_bytes() == before
    line = f"predict.py: error: {copy}: one file for several images; name a folder\n"
    assert ask("--image", clip, clip, "--plot", copy) == (2, "", line)


@pytest.fixture
def camera(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let FFmpeg's own picture of stripes stand for the camera, for a second."""
    source = "testsrc=duration=1:size=320x240:rate=30"
    monkeypatch.setattr(predict, "name_camera", lambda n: (source, ["-f", "lavfi"]))


@pytest.mark.usefixtures("camera")
def test_a_camera(ask: Ask) -> None:
    code, records, _ = watch(ask, "webcam:1", "--faces", "never")
    assert code == 0
    assert [record["time"] for record in records] == [0.0, 0.2, 0.4, 0.6, 0.8]
    assert {record["path"] for record in records} == {"webcam:1"}
    assert ask("--image", "webcam") == (0, "", "")  # nobody is there


@pytest.mark.usefixtures("camera")
@pytest.mark.parametrize("from_camera", [True, False])
def test_ctrl_c_ends_with_the_table(
    scripted: list,
    clip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ask: Ask,
    from_camera: bool,
) -> None:
    scripted += [[(20, HAPPY)]] * 9
    classify, looks = predict.classify, iter(range(5))

    def classify_five(network: utils.Network, faces: list) -> np.ndarray:
        if next(looks, None) is None:
            raise KeyboardInterrupt
        return classify(network, faces)

    monkeypatch.setattr(predict, "classify", classify_five)
    image, copy = "webcam" if from_camera else clip, tmp_path / "copy.mp4"
    code, out, _ = ask("--image", image, "--fps", 10, "--plot", copy)
    assert code == (0 if from_camera else 130)
    assert copy.exists() == from_camera  # whole, or none at all
    assert out.startswith("0:00.0 face 1: Happy (80.0 %)\n")


@pytest.mark.usefixtures("camera")
def test_a_terminal_has_one_line_for_a_camera(
    monkeypatch: pytest.MonkeyPatch, ask: Ask
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    code, out, _ = ask("--image", "webcam", "--faces", "never")
    assert code == 0
    assert out.count("\r0:00.") == 5 and "\n" not in out.partition("0:00.8")[0]


@UNIX
def test_a_copy_on_a_full_disk(clip: Path, tmp_path: Path, ask: Ask) -> None:
    target = tmp_path / "copy.mkv"
    target.write_bytes(b"old")
    with file_size_limit(7000):
        code, _, _ = ask("--image", clip, "--plot", target)
    assert code.startswith(f"predict.py: error: {target}: ")
    assert target.read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]


def test_no_camera(ask: Ask) -> None:
    code, _, err = ask("--image", "webcam:77")
    line = "webcam:77: camera not found, or access denied: "
    assert err.startswith(f"predict.py: error: {line}")
    assert (code, err.count("\n")) == (1, 1)
