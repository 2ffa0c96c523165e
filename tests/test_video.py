"""Video: each frame is answered as a picture, then averaged over a second of a face.

The references are FFmpeg's own frames, the functions for pictures, and plain means.
"""

import json
import subprocess
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
from make_demo_data import write_clip
from PIL import Image, ImageOps

import predict
import utils

SIZE = 320, 240


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
        frame.paste(ImageOps.mirror(portrait), (140, 20))
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", frames, 10)


def watch(ask: Ask, *words: object) -> tuple[int, list[dict], str]:
    """Return exit code, records and stderr of predict.py --format json --image."""
    code, out, err = ask("--format", "json", "--image", *words)
    return code, list(map(json.loads, out.splitlines())), err


def test_each_face_keeps_its_number_and_the_mean_of_a_second(
    clip: Path, ask: Ask
) -> None:
    network = utils.load_model(ROOT / MODEL)
    code, records, _ = watch(ask, clip)
    assert (code, len(records)) == (0, 12)
    answers = {1: [], 2: []}
    for number, frame in enumerate(read_clip(clip)[1][:24:2]):
        (face,), track = predict.find_faces(frame), 1 if number < 7 else 2
        (answer,) = network.predict(utils.to_input(face.pixels[np.newaxis]))
        answers[track].append(answer)
        mean = np.mean(answers[track][-5:], axis=0)  # five frames are a second
        record = records[number]
        assert (record["time"], record["face"]) == (pytest.approx(number / 5), track)
        assert tuple(record[name] for name in predict.BOX) == face.box
        told = list(record["probabilities"].values())
        np.testing.assert_allclose(told, mean, atol=6e-5)
        assert record["emotion"] == EMOTIONS[np.argmax(mean)]
    _, out, _ = ask("--image", clip, PORTRAIT, "--format", "csv", "--fps", 1)
    heads, first, *_, last = [line.split(",")[:4] for line in out.splitlines()]
    assert heads == ["path", "time", "status", "face"]
    assert (first, last) == (
        [str(clip), "0.0", "ok", "1"],
        [str(PORTRAIT), "", "ok", "1"],
    )


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple]]:
    """Let frame after frame show the faces of a list: left, and the probabilities.

    Ctrl-C is pressed at its end.
    """
    script: list[list[tuple]] = []

    def find(image: Image.Image, size: int) -> list[predict.Face]:
        if not script:
            raise KeyboardInterrupt
        faces = script.pop(0)
        return [predict.Face(answer, (left, 50, 60, 60)) for left, answer in faces]

    def classify(network: utils.Network, faces: list) -> np.ndarray:
        return np.reshape([face.pixels for face in faces], (len(faces), 6))

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
        found = predict.follow(tracks, faces, np.ones((len(faces), 6)), time, 1)
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


def test_nothing_to_see(tmp_path: Path, ask: Ask) -> None:
    sound, gray = tmp_path / "sound.mp4", tmp_path / "gray.mp4"
    ffmpeg("-f", "lavfi", "-i", "sine=d=1", sound)
    write_clip(gray, [Image.new("RGB", SIZE)] * 3, 5)
    for path, reason in (
        (sound, "not a readable image or video\n"),
        (gray, "no face found\n"),
        ("webcam:77", "camera not found, or access denied\n"),
    ):
        code, [record], err = watch(ask, path)
        assert (code, err.count("\n")) == (1, 1)
        assert err.startswith(f"predict.py: error: {path}: {reason}")
        assert record["message"].startswith(reason.strip())


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
    for words, line in (
        ([clip, "--explain", tmp_path], f"{clip}: --explain does not work on videos"),
        ([clip, "--plot", clip], f"{clip}: is an input; name another file to write"),
        (
            [PORTRAIT, "--plot", copy],
            f"{copy}: is a video file, but {PORTRAIT} is not a video",
        ),
        (
            [clip, PORTRAIT, "--plot", copy],
            f"{copy}: one file for several images; name a folder",
        ),
    ):
        assert ask("--image", *words) == (2, "", f"predict.py: error: {line}\n")
    assert clip.read_bytes() == before


@pytest.fixture
def camera(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let FFmpeg's own picture of stripes stand for the camera, for two seconds."""
    source = "testsrc=duration=2:size=320x240:rate=30"
    monkeypatch.setattr(predict, "name_camera", lambda n: (source, ["-f", "lavfi"]))


@pytest.mark.usefixtures("camera")
def test_a_camera(monkeypatch: pytest.MonkeyPatch, ask: Ask) -> None:
    code, records, _ = watch(ask, "webcam:1", "--faces", "never")
    assert code == 0
    times = [record["time"] for record in records]
    np.testing.assert_allclose(times, np.arange(0, 2, 0.2))
    assert {record["path"] for record in records} == {"webcam:1"}
    assert ask("--image", "webcam") == (0, "", "")  # nobody is there
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    _, out, _ = ask("--image", "webcam", "--faces", "never")
    assert out.count("\r0:0") == 10  # one line that is rewritten
    assert "\n" not in out.partition("0:01.8")[0]


@pytest.mark.usefixtures("camera")
def test_ctrl_c_ends_with_the_table(
    scripted: list, clip: Path, tmp_path: Path, ask: Ask
) -> None:
    table = "\n   1      1.4    0.0 %    0.0 %  100.0 %    0.0 %    0.0 %    0.0 %\n"
    for image, expected in (("webcam", 0), (clip, 130)):
        scripted += [[(20, HAPPY)]] * 7
        copy = tmp_path / "copy.mp4"
        code, out, _ = ask("--image", image, "--plot", copy)
        assert code == expected
        assert copy.exists() == (image == "webcam")  # whole, or none at all
        assert out.startswith("0:00.0 face 1: Happy (80.0 %)\n")
        assert out.endswith(table) == (image == "webcam")
        copy.unlink(missing_ok=True)


@UNIX
def test_a_copy_on_a_full_disk(clip: Path, tmp_path: Path, ask: Ask) -> None:
    target = tmp_path / "copy.mkv"
    target.write_bytes(b"old")
    with file_size_limit(7000):
        code, _, _ = ask("--image", clip, "--plot", target)
    assert code.startswith(f"predict.py: error: {target}: ")
    assert target.read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]
