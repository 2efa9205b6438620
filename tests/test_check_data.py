"""`check_data.py` reports on a stage's data sets."""

import subprocess
import sys
from pathlib import Path

import pytest

from test_training import copied_data, media
from tiny_run import TinyRun

CODE = Path(__file__).parent.parent / "code"


def check(run: TinyRun, *more: str) -> tuple[int, str, str]:
    command = [sys.executable, "check_data.py", *run.arguments, *more]
    done = subprocess.run(command, cwd=CODE, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("stage", [1, 3])
def test_check_data_reports_complete_data_sets(tmp_path: Path, stage: int) -> None:
    code, output, _ = check(TinyRun(tmp_path, stage))
    assert code == 0
    if stage == 1:
        assert "mini_image_enc: 36 of 36 usable, 36 media decoded" in output
        assert "mini_audio_enc: 7 of 7 usable, 7 media decoded" in output
    else:
        assert output.count("usable") == 4


def test_check_data_counts_and_names_missing_and_broken_media(tmp_path: Path) -> None:
    data = copied_data(tmp_path)
    first, second, *_ = media(data, "image")
    first.unlink()
    second.write_bytes(b"no picture")
    run = TinyRun(tmp_path, 1, [f"data.data_dir={data}", f"data.cache_dir={tmp_path / 'cache'}"])
    code, output, _ = check(run, "mini_image_enc")
    assert code == 1
    assert "mini_image_enc: 34 of 36 usable" in output
    assert f"{first} is missing" in output and f"{second}: not readable as an image" in output
    assert "mini_video_enc" not in output


def test_check_data_names_the_command_for_missing_embeddings(tmp_path: Path) -> None:
    run = TinyRun(tmp_path, 2, [f"data.caption_embedding_dir={tmp_path}"])
    code, output, _ = check(run, "mini_audio_dec", "--decode", "0")
    assert code == 1
    assert "mini_audio_dec: 0 of 7 usable" in output and "and 2 more" in output
    assert "run process_embeddings.py on these captions" in output


def test_check_data_names_the_row_of_a_bad_record(tmp_path: Path) -> None:
    data = copied_data(tmp_path)
    annotation = data / "mini_world" / "T-X_pair_data" / "image" / "image.json"
    annotation.write_text('[{"image_name": "a.png"}]')
    run = TinyRun(tmp_path, 1, [f"data.data_dir={data}", f"data.cache_dir={tmp_path / 'cache'}"])
    code, _, output = check(run, "mini_image_enc")
    assert code == 2 and "row 0" in output and "caption" in output
