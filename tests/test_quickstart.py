"""The quickstart: a fresh clone, one command, answers to the course's four cases."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from nextgpt.common.modality import MODALITIES
from nextgpt.media.transforms import load_views
from nextgpt.mini_world.scoreboard.items import CASES

ROOT = Path(__file__).parent.parent
SUFFIX_OF = {"image": ".png", "video": ".mp4", "audio": ".wav"}


def kinds_in(answers: Path, case: dict) -> list[str]:
    """Return the modalities of a case's answer, text first."""
    folder = answers / case["name"].replace("→", "-")
    there = {path.suffix for path in folder.iterdir()}
    return ["text", *(modality for modality in MODALITIES if SUFFIX_OF[modality] in there)]


@pytest.mark.slow
def test_quickstart_in_a_fresh_clone_gives_four_answers(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    bare = {name: os.environ[name] for name in ("HOME", "PATH", "LANG") if name in os.environ}
    bare["PATH"] = ":".join(p for p in bare["PATH"].split(":") if not p.startswith(str(ROOT)))
    log = tmp_path / "quickstart.log"
    with log.open("w") as file:
        command = ["bash", "scripts/quickstart.sh"]
        done = subprocess.run(command, cwd=clone, env=bare, stdout=file, stderr=file)
    printed = log.read_text()
    assert done.returncode in (0, 3), printed[-5000:]
    for stage in (1, 2, 3, 4):
        folder = clone / f"ckpt/delta_ckpt/nextgpt/mini_tiva_v0/stage_{stage}"
        assert (folder / "delta.safetensors").is_file()
        losses = [json.loads(line)["loss"] for line in (folder / "log/metrics.jsonl").open()]
        third = len(losses) // 3
        assert sum(losses[-third:]) < sum(losses[:third]), f"stage {stage} learned nothing"
        assert f"stage {stage}: as expected" in printed
    outputs = clone / "outputs/quickstart"
    answers = outputs / "trained"
    cases = json.loads((clone / "code/mini_world/demo_examples/cases.json").read_text())
    assert len(cases) == 4
    histories = sorted(answers.glob("T*/history.json"))
    assert len(histories) == len(cases)
    right = [case["name"] for case in cases if kinds_in(answers, case) == case["expects"]]
    assert f"{len(right)} of 4 answers have the expected media" in printed
    assert (done.returncode == 0) == (printed.count("4 of 4 answers have") == 2)
    report = (outputs / "report.html").read_text()
    assert report.count("<video controls") >= 4 and report.count("as expected") == 4
    measured = json.loads((outputs / "cases/scoreboard.json").read_text())["cells"]
    assert {cell: metrics["n"] for cell, metrics in measured.items()} == dict.fromkeys(CASES, 40)
    for cell, metrics in measured.items():
        assert metrics["modalities"] >= 0.9, f"{cell}: {metrics['modalities']} with all media"
    for modality in MODALITIES:
        files = list(answers.rglob(f"*{SUFFIX_OF[modality]}"))
        assert files, f"no answer called for {modality}"
        for file in files:
            assert str(file.relative_to(clone)) in printed or str(file) in printed
            load_views(modality, file)
