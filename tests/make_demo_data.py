"""Draw what everything runs on without a download: data/demo, data/astronaut.mp4.

    python tests/make_demo_data.py

Same seed, same pixels (Pillow's drawing may differ by a shade between versions).
"""

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps

DATA = Path(__file__).parent.parent / "data"
SIZE, SCALE = 48, 8  # drawn eight times as large, then scaled down
IMAGES = {"train": 40, "test": 10}  # of each emotion

# Heights are in 48ths of the face, upwards. Brow: inner and outer end above the eye.
# Mouth: how far its corners stand above its middle, and how far it is open.
FACES = {
    "angry": {"brow": (1.0, 4.5), "eye": 1.6, "corners": -1.5, "open": 0.0},
    "fear": {"brow": (6.5, 4.0), "eye": 3.0, "corners": -1.0, "open": 2.2},
    "happy": {"brow": (4.5, 4.5), "eye": 1.8, "corners": 4.0, "open": 0.0},
    "neutral": {"brow": (4.0, 4.0), "eye": 2.1, "corners": 0.0, "open": 0.0},
    "sad": {"brow": (5.5, 2.5), "eye": 1.5, "corners": -3.5, "open": 0.0},
    "surprise": {"brow": (7.0, 7.0), "eye": 3.2, "corners": 0.0, "open": 5.0},
}


def draw_face(emotion: str, random: np.random.Generator) -> Image.Image:
    """Draw one face of an emotion, every measure varied a little."""
    shape = FACES[emotion]
    size = SIZE * SCALE
    zoom = random.uniform(0.85, 1.1) * SCALE
    skin, background = random.uniform(120, 230), random.uniform(20, 200)
    dark = skin * random.uniform(0.15, 0.4)
    image = Image.new("L", (size, size), int(background))
    draw = ImageDraw.Draw(image)
    centre = size / 2 + random.uniform(-3, 3, 2) * SCALE

    def vary(value: float) -> float:
        return value + random.normal(0, 0.35)

    def at(x: float, y: float) -> tuple[float, float]:
        return centre[0] + x * zoom, centre[1] - y * zoom

    def ellipse(x: float, y: float, width: float, height: float, shade: float) -> None:
        corners = *at(x - width, y + height), *at(x + width, y - height)
        draw.ellipse(corners, int(shade))

    def line(points: list[tuple[float, float]], width: float) -> None:
        draw.line([at(*p) for p in points], int(dark), int(width * zoom), "curve")

    ellipse(0, 0, random.uniform(15, 18), random.uniform(19, 22), skin)
    inner, outer = (vary(value) for value in shape["brow"])
    eye = vary(shape["eye"])
    for side in (-1, 1):
        ellipse(side * 7, 5, 3.6, eye, min(skin * 1.25, 255))
        ellipse(side * 7, 5, 1.7, min(eye, 1.8), dark)
        line([(side * 3.5, 5 + inner), (side * 11, 5 + outer)], random.uniform(1, 1.8))
    line([(0, 2), (random.uniform(-1.5, 1.5), -3)], 0.8)
    corners, opening = vary(shape["corners"]), shape["open"]
    if opening:
        ellipse(0, -10, 3.5 if opening > 3 else 5.5, vary(opening), dark)
    else:
        x = np.linspace(-1, 1, 15)
        width = random.uniform(5.5, 7.5)
        line([(width * i, -10 + corners * (i * i - 0.5)) for i in x], 1.4)
    options = {"resample": Image.Resampling.BICUBIC, "fillcolor": int(background)}
    image = image.rotate(random.uniform(-6, 6), **options)
    if random.random() < 0.5:
        image = ImageOps.mirror(image)
    image = image.filter(ImageFilter.GaussianBlur(random.uniform(1, 4)))
    small = image.resize((SIZE, SIZE), Image.Resampling.BOX)
    slopes = random.uniform(-0.25, 0.25, (2, 1))  # of light, down and to the right
    light = np.add.outer(*slopes * np.linspace(-1, 1, SIZE))
    pixels = np.asarray(small) * (1 + light) + random.normal(0, 2, (SIZE, SIZE))
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def write_clip(
    path: Path, frames: Iterable[Image.Image], fps: float, quality: float = 5
) -> Path:
    """Write RGB images of one size as a video, in FFmpeg's quality of 0 to 10."""
    writer = None
    for frame in frames:
        if not writer:
            options = {"fps": fps, "quality": quality, "macro_block_size": 2}
            writer = imageio_ffmpeg.write_frames(str(path), frame.size, **options)
            writer.send(None)
        writer.send(frame.tobytes())
    writer.close()
    return path


def draw_frames(portrait: Path) -> Iterator[Image.Image]:
    """Draw eight seconds of video: a face that nods, and a visitor, its mirror."""
    face = Image.open(portrait).convert("RGB").crop((90, 0, 390, 300))
    visitor = ImageOps.mirror(face).resize((150, 150))
    for second in np.arange(0, 8, 1 / 15):
        frame = Image.new("RGB", (320, 240), "lightgray")
        angle = 25 * np.sin(1.5 * second)
        nodding = face.rotate(angle, Image.Resampling.BICUBIC).resize((150, 150))
        frame.paste(nodding, (10, int(50 - 15 * np.cos(second))))
        x = int(170 + 150 * max(0, 3.5 - second, second - 6.5))  # comes, stays, goes
        frame.paste(visitor, (x, 60))
        yield frame


def main() -> None:
    """Write data/demo/<part>/<emotion>/<number>.png, and the video beside demo/."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("data/demo"))
    args = parser.parse_args()
    random = np.random.default_rng(1)
    for part, count in IMAGES.items():
        for emotion in FACES:
            folder = args.output / part / emotion
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                image = draw_face(emotion, random)
                image.save(folder / f"{number:02}.png", optimize=True)
    clip = args.output.with_name("astronaut.mp4")
    write_clip(clip, draw_frames(DATA / "astronaut.jpg"), fps=15, quality=4)


if __name__ == "__main__":
    main()
