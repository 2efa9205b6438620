"""`check_data.py` reports on a stage's data sets."""

import subprocess
import sys
from pathlib import Path

import pytest

from test_training import copied_data, media
from tiny_run import TinyRun, tiny_world

CODE = Path(__file__).parent.parent / "code"


def check(run: TinyRun, *more: str) -> tuple[int, str, str]:
    return run_check(*run.arguments, *more)


def run_check(*arguments: str) -> tuple[int, str, str]:
    command = [sys.executable, "check_data.py", *arguments]
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


def test_check_data_explains_a_file(tmp_path: Path) -> None:
    images = tiny_world() / "data/mini_world/T-X_pair_data/image/images"
    names = sorted(path.name for path in images.iterdir())[:22]
    rows = [f"{name},a red ring {number}" for number, name in enumerate(names)]
    table = tmp_path / "own.csv"
    table.write_text("\n".join(["file,caption", *rows, f"gone.png,{'x ' * 300}", "a.png,"]))
    sets = ["--set", f"data.cache_dir={tmp_path}", "--set", "data.max_seq_length=100"]
    arguments = [*TinyRun(tmp_path, 1).arguments[2:], *sets, "--path", str(table)]
    code, output, error = run_check(*arguments, "--media_dir", str(images))
    assert code == 1, error
    assert output.count("\n") < 24
    assert "CSV with the columns file, caption" in output
    assert "23 conversations, direction medium_to_caption" in output
    assert "left out 1 (caption empty)" in output
    assert "input media: 23 image" in output and "1 input media are missing, first" in output
    assert "truncated to data.max_seq_length 100: 1 (4.3%)" in output
    first = output.split("row 0\n")[1].splitlines()[:2]
    assert first[0].startswith("    | <s> ### Human:")
    assert f"<Img>(image {names[0]}, 1 tokens)</Img>generate a caption" in first[0]
    assert first[1] == r"    > a red ring 0\n###"
    code, output, _ = run_check(*arguments, "--direction", "caption_to_medium")
    assert code == 1 and "input media: none\noutput media: 23 image" in output
    assert r"> a red ring 0[IMG0][IMG1][IMG2][IMG3]###" in output


def test_check_data_reports_own_data_by_name(tmp_path: Path) -> None:
    images = tiny_world() / "data/mini_world/T-X_pair_data/image"
    entry = f"{{name: own, path: {images / 'image.json'}, media_dir: {images / 'images'}, "
    sets = [f"data.datasets=[{entry}direction: medium_to_caption, limit: 5}}, mini_audio_enc]"]
    code, output, _ = check(TinyRun(tmp_path, 1, sets), "own")
    assert code == 0 and output.endswith("own: 5 of 5 usable, 5 media decoded\n")
    assert "mini_audio_enc" not in output
