"""data/demo is what its script draws, small, and without repeated pictures."""

from pathlib import Path

import make_demo_data
import numpy as np
import pytest
from conftest import EMOTIONS, ROOT
from PIL import Image

import utils

DEMO = ROOT / "data" / "demo"


def test_the_script_draws_the_same_faces_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["make_demo_data.py", "--output", str(tmp_path)])
    make_demo_data.main()
    names = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.png"))
    assert names == sorted(path.relative_to(DEMO) for path in DEMO.rglob("*.png"))
    for name in names:
        with Image.open(tmp_path / name) as drawn, Image.open(DEMO / name) as kept:
            difference = np.asarray(drawn, int) - np.asarray(kept, int)
        assert np.abs(difference).mean() < 1  # Pillow's versions may draw a shade apart


def test_counts_and_size() -> None:
    train_index, test_index = (
        utils.index_folder(DEMO / name, EMOTIONS)[0].table for name in ("train", "test")
    )
    assert set(train_index.emotion.value_counts()) == {40}
    assert set(test_index.emotion.value_counts()) == {10}
    assert train_index.digest.is_unique
    assert not test_index.digest.isin(train_index.digest).any()
    assert sum(path.stat().st_size for path in DEMO.rglob("*.png")) < 1_000_000
