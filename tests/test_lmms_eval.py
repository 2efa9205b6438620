"""lmms-eval itself, in its own environment, asks the mini system by the plug-in."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from nextgpt import evaluate as entry
from nextgpt.common.cli import run_cli
from nextgpt.evaluation.caption_scores import score_captions
from nextgpt.media.decoding import read_image
from nextgpt.mini_world.write_data import write_world

ROOT = Path(__file__).resolve().parent.parent
PYTHON = ROOT / ".venv-lmms-eval" / "bin" / "python"
PROTOCOLS = {"image": "coco_captions", "audio": "audiocaps_captions"}
ROWS = 6

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not PYTHON.is_file(), reason="bash scripts/install_lmms_eval.sh installs lmms-eval"
    ),
]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of six caption pairs by modality."""
    world = tmp_path_factory.mktemp("world") / "world"
    write_world(world, scale=0.06, progress=False)
    files = {}
    for modality in PROTOCOLS:
        folder = world / "T-X_pair_data" / modality
        rows = json.loads((folder / f"{modality}.json").read_text())[:ROWS]
        files[modality] = folder / "few.json"
        files[modality].write_text(json.dumps(rows))
    return files


def write_task(folder: Path, name: str, documents: list[dict]) -> None:
    """Write a task of lmms-eval: a YAML file, its functions and its data."""
    folder.mkdir(exist_ok=True)
    shutil.copy(Path(__file__).with_name("lmms_eval_task.py"), folder / "functions.py")
    (folder / f"{name}.json").write_text(json.dumps(documents))
    functions = {
        "doc_to_visual": "media", "doc_to_text": "prompt", "doc_to_target": "target",
        "process_results": "score",
    }  # fmt: skip
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.json")}},
        "test_split": "test",
        "output_type": "generate_until",
        "generation_kwargs": {"max_new_tokens": 60},
        "metadata": [{"version": 1}],
    }
    lines = [f"{key}: !function functions.{value}\n" for key, value in functions.items()]
    lines.append("metric_list:\n- metric: cider\n  aggregation: !function functions.cider\n")
    lines.append("  higher_is_better: true\n")
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task) + "".join(lines))


def run_lmms_eval(folder: Path, tasks: list[str], arguments: str) -> tuple[dict, dict[str, list]]:
    """Run lmms-eval; return its results and, by task, the samples it logged."""
    out = folder / "out"
    done = subprocess.run(
        [
            PYTHON,
            "-m",
            "lmms_eval",
            "--model",
            "nextgpt",
            "--model_args",
            arguments,
            "--tasks",
            ",".join(tasks),
            "--include_path",
            folder,
            "--batch_size",
            "3",
            "--output_path",
            out,
            "--log_samples",
        ],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = next(out.rglob("*_results.json"), None)
    assert results, done.stderr[-3000:]  # errors end it with exit code 0
    samples = {
        task: [json.loads(line) for line in next(out.rglob(f"*_samples_{task}.jsonl")).open()]
        for task in tasks
    }
    return json.loads(results.read_text())["results"], samples


def test_lmms_eval_gives_the_answers_and_figures_of_our_protocols(
    pairs: dict[str, Path], tmp_path: Path
) -> None:
    for modality, file in pairs.items():
        documents = [
            {
                "medium": str(file.parent / f"{modality}s" / row[f"{modality}_name"]),
                "caption": row["caption"],
                "prompt": "generate a caption",
            }
            for row in json.loads(file.read_text())
        ]
        write_task(tmp_path / "tasks", f"mini_{modality}", documents)
    results, logged = run_lmms_eval(
        tmp_path / "tasks", [f"mini_{modality}" for modality in pairs], "config=mini"
    )
    for modality, file in pairs.items():
        out = tmp_path / modality
        line = ["evaluate.py", "--protocol", PROTOCOLS[modality], "--data", str(file)]
        line += ["--out", str(out), "--set", "generation.max_new_tokens=60"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [*line, "--set", "evaluation.batch_size=3"])
            run_cli(entry.main)
        ours = [json.loads(line) for line in (out / "samples.jsonl").open()]
        theirs = sorted(logged[f"mini_{modality}"], key=lambda sample: sample["doc_id"])
        assert [sample["filtered_resps"][0] for sample in ours] == [
            sample["filtered_resps"] for sample in theirs
        ]
        figure = json.loads((out / "results.json").read_text())["metrics"]["answer"]["CIDEr-D"]
        assert results[f"mini_{modality}"]["cider,none"] == pytest.approx(figure)
        assert (
            0
            < figure
            == score_captions(
                [sample["filtered_resps"][0] for sample in ours],
                [sample["target"] for sample in ours],
            )["CIDEr-D"]
        )


def test_lmms_eval_gets_images_with_the_text(tmp_path: Path) -> None:
    captions = ["a big red circle on the left", "a small blue square at the top"]
    documents = [{"medium": "", "caption": c, "prompt": f"Draw {c}."} for c in captions]
    write_task(tmp_path / "tasks", "mini_draw", documents)
    arguments = f"config=mini,output=image,media_out={tmp_path / 'media'}"
    _, logged = run_lmms_eval(tmp_path / "tasks", ["mini_draw"], arguments)
    for sample in logged["mini_draw"]:
        answer = json.loads(sample["filtered_resps"])
        (image,) = answer["images"]
        assert answer["text"] and read_image(image).size == (64, 64)
