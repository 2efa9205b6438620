"""The paper's tables as protocols, end to end with tiny components, data sets and networks."""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nextgpt import evaluate as entry
from nextgpt.common.cli import run_cli
from nextgpt.common.errors import UserError
from nextgpt.config.loader import load_config
from nextgpt.evaluation.benchmark_data import Document
from nextgpt.evaluation.caption_scores import score_captions
from nextgpt.evaluation.media_scores import SCORERS, MediaSet
from nextgpt.evaluation.protocols import PROTOCOLS, Protocol, find_protocol
from nextgpt.evaluation.report import format_report
from nextgpt.evaluation.runner import RESULTS
from nextgpt.evaluation.sampler import RUN, SAMPLES, read_samples
from nextgpt.media.decoding import read_image
from serving_harness import scripted_ids
from tiny_components import script_language_model, write_tiny_components
from tiny_metrics import CAPTIONS, tiny_networks, write_audiocaps, write_coco, write_msrvtt
from tiny_run import _CONTEXT, _free_port, run_entry

WRITERS = {"coco": write_coco, "msrvtt": write_msrvtt, "audiocaps": write_audiocaps}
DESCRIBING = [p for p in PROTOCOLS.values() if p.task == "describe"]
GENERATING = [p for p in PROTOCOLS.values() if p.task == "generate"]


def named(protocol: Protocol) -> str:
    return protocol.name


class System:
    """Tiny components with a scripted language model, and the data sets of all protocols."""

    def __init__(self, folder: Path, script: tuple[str, ...]) -> None:
        write_tiny_components(folder)
        self.overrides = [
            *script_language_model(folder, scripted_ids(*script)),
            f"data.data_dir={folder / 'data'}",
            "generation.max_new_tokens=40",
            "evaluation.batch_size=3",
            *(f"evaluation.{key}={path}" for key, path in tiny_networks().items()),
        ]
        self.data = folder / "data" / "evaluation"
        for name, write in WRITERS.items():
            write(self.data / name)

    def arguments(self, protocol: str, out: Path, *more: str) -> list[str]:
        sets = [word for override in self.overrides for word in ("--set", override)]
        return ["--config", "7b", *sets, "--protocol", protocol, "--out", str(out), *more]

    def run(self, protocol: str, out: Path, *more: str) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["evaluate.py", *self.arguments(protocol, out, *more)])
            run_cli(entry.main)

    def fail(self, protocol: str, out: Path, *more: str) -> None:
        with pytest.raises(SystemExit) as ended:
            self.run(protocol, out, *more)
        assert ended.value.code == 2


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> System:
    """Every answer has an image, a video and audio, announced by the same words."""
    script = ("Sure", "image", "video", "the music", "audio")
    return System(tmp_path_factory.mktemp("scripted"), script)


@pytest.fixture(scope="module")
def wordless(tmp_path_factory: pytest.TempPathFactory) -> System:
    """Every answer is text alone."""
    return System(tmp_path_factory.mktemp("wordless"), ("Sure",))


def samples_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / SAMPLES).read_text().splitlines()]


def results_of(out: Path) -> dict:
    return json.loads((out / RESULTS).read_text())


# Data sets.


def documents_of(protocol: str, folder: Path) -> dict[int, Document]:
    config = load_config("7b")
    return {d.doc_id: d for d in find_protocol(protocol).documents(config, folder)}


def test_coco_has_the_test_split_for_captions_and_all_of_val2014_for_images(tmp_path: Path) -> None:
    folder = write_coco(tmp_path)
    captions, images = documents_of("coco_captions", folder), documents_of("coco_images", folder)
    assert len(captions) == len(CAPTIONS) and len(images) == len(CAPTIONS) + 1
    assert captions[1].captions == (CAPTIONS[1], f"this is {CAPTIONS[1]}.")
    assert captions[1].medium == folder / "val2014" / "COCO_val2014_000000000001.jpg"


def test_msrvtt_has_the_test_split_with_all_captions(tmp_path: Path) -> None:
    documents = documents_of("msrvtt_videos", write_msrvtt(tmp_path))
    assert len(documents) == len(CAPTIONS)
    assert documents[0].captions == (CAPTIONS[0], "again")


def test_documents_are_in_one_order_without_those_whose_media_are_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = write_audiocaps(tmp_path)
    before = list(documents_of("audiocaps_sounds", folder))
    assert before == list(documents_of("audiocaps_captions", folder)) != sorted(before)
    (folder / "audios" / "id_2.wav").unlink()
    assert list(documents_of("audiocaps_sounds", folder)) == [n for n in before if n != 2]
    assert "1 of 4 media are missing" in capsys.readouterr().out


def test_own_caption_pairs_are_grouped_by_medium(tmp_path: Path) -> None:
    folder = write_msrvtt(tmp_path)
    rows = [("video0.mp4", "one"), ("video1.mp4", "two"), ("video0.mp4", "three")]
    file = folder / "pairs.csv"
    file.write_text("video,caption\n" + "".join(f"{name},{text}\n" for name, text in rows))
    documents = documents_of("msrvtt_captions", file)
    assert {d.captions for d in documents.values()} == {("one", "three"), ("two",)}


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (None, "holds no dataset_coco.json"),
        ('{"images": [{"split": "test"}]}', "not in the published layout"),
        ("{", "not in the published layout"),
        ('{"images": []}', "none of the 0 media"),
    ],
)
def test_data_in_another_layout_is_refused(tmp_path: Path, content: str | None, fault: str) -> None:
    if content is not None:
        (tmp_path / "dataset_coco.json").write_text(content)
    with pytest.raises(UserError, match=fault):
        documents_of("coco_captions", tmp_path)


def test_unknown_protocol_suggests_the_nearest(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(UserError, match="'coco_captions' meant"):
        find_protocol("coco_caption")


# End to end.


@pytest.mark.parametrize("protocol", DESCRIBING, ids=named)
def test_describing_protocols_score_the_texts(
    protocol: Protocol, system: System, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    system.run(protocol.name, tmp_path)
    samples = samples_of(tmp_path)
    assert [sample["doc_id"] for sample in samples] == list(range(len(CAPTIONS)))
    for sample, caption in zip(samples, CAPTIONS, strict=True):
        assert sample["target"][0] == caption == sample["doc"]["captions"][0]
        assert sample["arguments"] == ["generate a caption"]
        assert sample["resps"] == [sample["filtered_resps"]]
        assert sample["filtered_resps"][0].startswith("Sure")
        assert "media" not in sample
    result = results_of(tmp_path)
    found = result["metrics"]["answer"]
    texts = [sample["filtered_resps"][0] for sample in samples]
    expected = score_captions(texts, [sample["target"] for sample in samples])
    assert {name: found[name] for name in expected} == expected
    assert ("SBERT-sim" in found) == (protocol.modality == "audio")
    assert set(found) - {"answers with a medium"} == set(protocol.metrics)
    assert result["samples"] == len(CAPTIONS) and result["skipped"] == 0
    assert result["run"]["protocol"] == protocol.name and len(result["run"]["fingerprint"]) == 16
    printed = capsys.readouterr().out
    assert protocol.title in printed and "CIDEr-D" in printed and "paper" in printed


@pytest.mark.parametrize("protocol", GENERATING, ids=named)
def test_generating_protocols_score_answers_caption_passing_and_ceiling(
    protocol: Protocol, system: System, tmp_path: Path
) -> None:
    system.run(protocol.name, tmp_path)
    samples = samples_of(tmp_path)
    count = len(CAPTIONS) + (protocol.name == "coco_images")
    assert len(samples) == count
    for sample in samples:
        assert sample["doc"]["captions"][0] in sample["arguments"][0]
        assert sample["target"] == sample["doc"]["captions"][0]
        answer = json.loads(sample["filtered_resps"][0])
        assert answer[f"{protocol.modality}s"] == [sample["media"]["answer"]]
        assert "Sure" in answer["text"]
        assert all((tmp_path / file).is_file() for file in sample["media"].values())
        assert "ceiling" in sample["media"]
        assert bool(sample["written"]) == ("passed" in sample["media"])
    result = results_of(tmp_path)
    for kind, scores in result["metrics"].items():
        assert set(scores) == {*protocol.metrics, "answers with a medium"}, kind
        there = [sample for sample in samples if kind in sample["media"]]
        assert scores["answers with a medium"] == len(there) / count
    assert {"answer", "ceiling"} <= result["metrics"].keys()
    if protocol.modality != "video":  # which follows the image, not text
        assert {sample["written"] for sample in samples} == {
            "Sure" if protocol.modality == "image" else "the music"
        }
        assert "passed" in result["metrics"]


def test_answers_ceiling_and_passed_media_differ_and_answers_follow_the_seed(
    system: System, tmp_path: Path
) -> None:
    system.run("coco_images", tmp_path / "one", "--samples", "2")
    system.run("coco_images", tmp_path / "two", "--samples", "2")
    system.run("coco_images", tmp_path / "other", "--samples", "2", "--seed", "9")
    for sample in samples_of(tmp_path / "one"):
        pixels = {
            k: np.asarray(read_image(tmp_path / "one" / f)) for k, f in sample["media"].items()
        }
        assert len({pixel.tobytes() for pixel in pixels.values()}) == 3
        for kind, file in sample["media"].items():
            bytes_of = [(tmp_path / run / file).read_bytes() for run in ("one", "two", "other")]
            assert bytes_of[0] == bytes_of[1] != bytes_of[2], kind


def test_scores_equal_those_of_the_kept_media(system: System, tmp_path: Path) -> None:
    """Scoring apart from sampling, from the files alone."""
    from test_media_scores import networks

    system.run("audiocaps_sounds", tmp_path, "--sample-only")
    assert not (tmp_path / RESULTS).exists()
    system.run("audiocaps_sounds", tmp_path, "--score-only", "--delta", "/nowhere")
    samples = samples_of(tmp_path)
    media = MediaSet(
        [tmp_path / sample["media"]["passed"] for sample in samples],
        [Path(sample["doc"]["medium"]) for sample in samples],
        [sample["target"] for sample in samples],
    )
    expected = SCORERS["audio"](media, networks(**tiny_networks()))
    found = results_of(tmp_path)["metrics"]["passed"]
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_answers_without_media_are_counted(wordless: System, tmp_path: Path) -> None:
    wordless.run("coco_images", tmp_path, "--set", "evaluation.caption_passing=false")
    assert all(sample["media"] == {} for sample in samples_of(tmp_path))
    assert results_of(tmp_path)["metrics"] == {"answer": {"answers with a medium": 0.0}}


@pytest.mark.parametrize("protocol", ["coco_captions", "coco_images"])
def test_broken_media_are_skipped_and_counted(
    protocol: str, system: System, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data = tmp_path / "coco"
    shutil.copytree(system.data / "coco", data)
    (data / "val2014" / "COCO_val2014_000000000002.jpg").write_bytes(b"not an image")
    system.run(protocol, tmp_path / "out", "--data", str(data))
    broken = samples_of(tmp_path / "out")[2]
    assert "000000000002.jpg" in broken["error"] and broken["filtered_resps"] == [""]
    count = len(documents_of(protocol, data)) - 1
    assert results_of(tmp_path / "out")["samples"] == count
    assert f"{count} samples, 1 skipped" in capsys.readouterr().out


def test_metrics_without_a_network_are_named(
    system: System, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    system.run("coco_images", tmp_path, "--samples", "2", "--set", "evaluation.clip=null")
    assert "CLIPScore: not computed, evaluation.clip is null" in capsys.readouterr().out
    assert "CLIPScore" not in results_of(tmp_path)["metrics"]["answer"]


# Resume, ranks.


def test_more_samples_continue_the_first_ones(system: System, tmp_path: Path) -> None:
    system.run("coco_captions", tmp_path / "all")
    system.run("coco_captions", tmp_path / "parts", "--samples", "2")
    first = (tmp_path / "parts" / SAMPLES).read_bytes()
    assert len(first.splitlines()) == 2
    system.run("coco_captions", tmp_path / "parts")
    assert (tmp_path / "parts" / SAMPLES).read_bytes() == (tmp_path / "all" / SAMPLES).read_bytes()


def test_samples_of_another_run_are_refused(
    system: System, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    system.run("coco_captions", tmp_path, "--sample-only")
    system.fail("coco_captions", tmp_path, "--seed", "1")
    assert "samples of another run (other seed)" in capsys.readouterr().err
    system.fail("msrvtt_captions", tmp_path, "--score-only")
    assert "samples of coco_captions, not of msrvtt_captions" in capsys.readouterr().err
    system.fail("coco_captions", tmp_path / "none", "--score-only")
    assert "sample first" in capsys.readouterr().err


def test_samples_of_other_data_are_refused(
    system: System, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    system.run("coco_captions", tmp_path / "out", "--sample-only", "--samples", "2")
    file = shutil.copytree(system.data / "coco", tmp_path / "coco") / "dataset_coco.json"
    data = json.loads(file.read_text())
    for image in data["images"][1:]:
        image["sentences"][0]["raw"] += " elsewhere"
    file.write_text(json.dumps(data))
    system.fail("coco_captions", tmp_path / "out", "--data", str(tmp_path / "coco"))
    assert "samples of other data (document " in capsys.readouterr().err


def start_ranks(system: System, out: Path, log: Path, world: int, *more: str) -> list:
    """Start the ranks of an evaluation in processes of their own."""
    _CONTEXT.set_forkserver_preload(["nextgpt.evaluate", "tiny_run"])
    log.mkdir(parents=True, exist_ok=True)
    port, processes = str(_free_port()), []
    for rank in range(world):
        environment = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            "LOCAL_WORLD_SIZE": str(os.cpu_count()),
        }  # fmt: skip
        arguments = system.arguments("coco_images", out, *more)
        process = _CONTEXT.Process(
            target=run_entry,
            args=("evaluate", arguments, environment, log / f"{rank}.output", -1),
        )
        process.start()
        processes.append(process)
    return processes


def test_ranks_and_an_interruption_leave_samples_as_they_are(
    system: System, tmp_path: Path
) -> None:
    """Two ranks are killed after their first records, then one rank continues."""
    one_by_one = ("--set", "evaluation.batch_size=1")
    system.run("coco_images", tmp_path / "alone", *one_by_one)
    out = tmp_path / "ranks"
    processes = start_ranks(system, out, tmp_path / "log", 2, *one_by_one)
    end = time.monotonic() + 120
    while len(list(out.glob("samples.rank*.jsonl"))) < 2:
        assert time.monotonic() < end, (tmp_path / "log" / "0.output").read_text()
        time.sleep(0.01)
    for process in processes:
        process.kill()
        process.join()
    with next(out.glob("samples.rank*.jsonl")).open("a") as file:
        file.write('{"doc_id": 4, "resps"')  # cut off
    assert 0 < len(read_samples(out)) < len(CAPTIONS) + 1
    for process in start_ranks(system, out, tmp_path / "log", 2, *one_by_one):
        process.join(120)
        assert process.exitcode == 0, (tmp_path / "log" / "0.output").read_text()
    assert samples_of(out) == samples_of(tmp_path / "alone")
    assert not list(out.glob("samples.rank*"))
    for file in (tmp_path / "alone" / "media").iterdir():
        assert (out / "media" / file.name).read_bytes() == file.read_bytes()
    assert results_of(out) == results_of(tmp_path / "alone")
    assert json.loads((out / RUN).read_text())["protocol"] == "coco_images"


# The command line.


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["--protocol", "coco"], "'coco_images' meant"),
        (["--protocol", "coco_images", "--cells", "T-I"], "belong to the protocol mini_world"),
        (["--protocol", "coco_images", "--samples", "0"], "give at least 1"),
        (["--score-only"], "need --protocol"),
        (["--protocol", "coco_images", "--data", "/nowhere"], "/nowhere does not exist"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    arguments: list[str], fault: str, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["evaluate.py", "--out", str(tmp_path), *arguments])
        with pytest.raises(SystemExit) as ended:
            run_cli(entry.main)
    assert ended.value.code == 2 and fault in capsys.readouterr().err


def test_papers_values_are_of_reported_metrics() -> None:
    for protocol in PROTOCOLS.values():
        assert protocol.paper and set(protocol.paper) <= set(protocol.metrics)


def test_report_shows_the_papers_values_in_the_last_column() -> None:
    protocol = Protocol(
        "p", "A protocol", "generate", "image", "p", read=None, metrics=("FID",), paper={"FID": 1.5}
    )
    result = {
        "samples": 3,
        "skipped": 0,
        "metrics": {"answer": {"FID": 2.25}, "ceiling": {"FID": None}},
    }
    *_, head, line = format_report(protocol, result).splitlines()
    assert head.split() == ["answer", "ceiling", "paper"]
    assert line.split() == ["FID", "2.25", "-", "1.5"]
