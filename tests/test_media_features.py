"""Cached features are bit-exact wherever their media are first encoded."""

import sqlite3
from pathlib import Path

from tiny_run import TinyRun, trained


def cached_features(folder: Path, *sets: str) -> dict[bytes, bytes]:
    """Run stage 2 in bf16 with an empty cache; return the cached features by content."""
    cache = folder / "cache"
    sets = (
        *sets,
        "training.precision=bf16",
        "data.datasets=[mini_mosit]",
        f"data.cache_dir={cache}",
    )
    TinyRun(folder, 2, sets, ["--init-from", str(trained(1).folder)]).finish()
    with sqlite3.connect(cache / "features.sqlite") as database:
        return dict(database.execute("SELECT digest, vector FROM feature"))


def test_media_features_are_the_same_in_warm_start_and_training_step(
    tmp_path: Path,
) -> None:
    stepped = cached_features(tmp_path / "stepped")
    warmed = cached_features(tmp_path / "warmed", "output_projection.whiten_inputs=true")
    assert len(stepped) > 10 and warmed == stepped
