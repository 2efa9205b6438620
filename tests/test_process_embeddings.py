"""Precomputed caption embeddings: resumable, the same on any number of ranks."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nextgpt import process_embeddings
from nextgpt.common.errors import MediaError, UserError
from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.conversation.batch import Example, collate
from nextgpt.dataset.caption_embeddings import (
    EmbeddingMaker,
    embedding_path,
    read_embedding,
)
from nextgpt.dataset.readers import iter_captions, read_record
from nextgpt.decoders.text_encoders import TextEncoder
from nextgpt.mini_world.mini_decoders import build_mini_decoder
from nextgpt.tools.embed_captions import embed_captions
from nextgpt.tools.embedding_store import EmbeddingStore
from tiny_decoders import TINY, tiny_decoder
from tiny_system import tiny_encoder

CPU = torch.device("cpu")
SHAPES: dict[Modality, tuple[int, ...]] = {"image": (12, 32), "video": (12, 32), "audio": (16,)}
COLOURS = ("red", "blue", "green", "white", "black")


def pairs(count: int = 5) -> list[dict[str, str]]:
    """Return caption pairs in the course's format."""
    return [{"image_name": f"{i}.png", "caption": f"A {COLOURS[i]} circle"} for i in range(count)]


def written(folder: Path, records: list[dict[str, Any]]) -> Path:
    """Write the records as an annotation file."""
    file = folder / "captions.json"
    file.write_text(json.dumps(records), encoding="utf-8")
    return file


def embed(file: Path, out: Path, modality: Modality = "image", **options: Any) -> int:
    """Embed on the CPU with tiny components; return the number of new embeddings."""
    options = {"model": str(tiny_decoder(modality)), "batch_size": 2, **options}
    return embed_captions(file, modality, out, device=CPU, **options)


def arrays(folder: Path) -> dict[str, bytes]:
    """Return every embedding's bytes by file name."""
    return {path.name: path.read_bytes() for path in folder.glob("*.npy")}


@pytest.mark.parametrize("modality", MODALITIES)
def test_embeddings_equal_the_text_encoder_in_half_precision(
    modality: Modality, tmp_path: Path
) -> None:
    """Of the verbatim caption, not the cleaned one."""
    file = written(tmp_path, [{f"{modality}_name": "sub/a.b", "caption": 'A "red" circle.'}])
    assert embed(file, tmp_path / "out", modality) == 1
    path = tmp_path / "out" / "a.b.npy"
    assert np.load(path, allow_pickle=False).dtype == np.float16
    found = read_embedding(path, SHAPES[modality])
    encoder = TextEncoder(modality, str(tiny_decoder(modality)), CPU)
    assert torch.equal(found, encoder.encode(['A "red" circle.'])[0].half().float())
    assert not torch.equal(found, encoder.encode(["a red circle."])[0].half().float())


def test_embeddings_equal_those_encoded_during_training(tmp_path: Path) -> None:
    record = {"image_name": "a.png", "caption": 'A "Red"  circle (small)'}
    file = written(tmp_path, [record])
    encoded = tiny_encoder().encode(read_record(record, "caption_out", file, 0))
    batch = collate([Example(encoded, [], [None])], pad_id=0, feature_width=4)
    assert batch.unencoded_captions == {"image": [record["caption"]]}
    assert list(iter_captions(file, "image")) == [("a.png", record["caption"])]


FORMS = {
    "later_release": {
        "output_video": "v.mp4",
        "video_captions": "A red circle",
        "video_caption_embeddings": "v.mp4.npy",
        "conversations": [
            {"from": "human", "value": "Show a circle"},
            {"from": "gpt", "value": "Sure! <video>"},
        ],
    },
    "instruction": {
        "video_name": "v.mp4",
        "conversation": [
            {"from": "human", "value": "Show a circle", "input_modality": "text"},
            {
                "from": "gpt",
                "value": "Sure!",
                "caption": "A red circle",
                "output_modality": "video",
            },
        ],
    },
    "mosit": {
        "conversation": [
            {"from": "human", "value": "Show a circle"},
            {
                "from": "gpt",
                "value": "Sure! <video>",
                "media": [{"modality": "video", "name": "v.mp4", "caption": "A red circle"}],
            },
        ],
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_embeddings_are_the_same_for_every_annotation_format(form: str, tmp_path: Path) -> None:
    plain = written(tmp_path, [{"video_name": "v.mp4", "caption": "A red circle"}])
    assert embed(plain, tmp_path / "plain", "video") == 1
    assert embed(written(tmp_path, [FORMS[form]]), tmp_path / "out", "video") == 1
    assert arrays(tmp_path / "out") == arrays(tmp_path / "plain")


def test_embeddings_interrupted_run_resumes_to_the_same_result(tmp_path: Path) -> None:
    file, out = written(tmp_path, pairs()), tmp_path / "out"
    (out / "2.png.npy").mkdir(parents=True)  # in the way of the second batch
    with pytest.raises(UserError, match=r"2\.png"):
        embed(file, out)
    assert sorted(p.name for p in out.glob("[01].png.npy")) == ["0.png.npy", "1.png.npy"]
    assert not list(out.glob(".*partial*"))
    (out / "2.png.npy").rmdir()
    times = {path: path.stat().st_mtime_ns for path in out.glob("*.npy")}
    assert embed(file, out) == 3
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert embed(file, out) == 0
    embed(file, tmp_path / "whole")
    assert arrays(out) == arrays(tmp_path / "whole")


def test_embeddings_with_truncated_records_are_recomputed(tmp_path: Path) -> None:
    file, out = written(tmp_path, pairs(3)), tmp_path / "out"
    embed(file, out)
    listing = out / "captions.image.rank0.jsonl"
    listing.write_bytes(listing.read_bytes()[:-5])
    assert embed(file, out) == 1
    assert len(listing.read_text().splitlines()) == 3
    assert embed(file, out) == 0


def test_embeddings_removed_are_recomputed(tmp_path: Path) -> None:
    file, out = written(tmp_path, pairs(3)), tmp_path / "out"
    embed(file, out)
    (out / "1.png.npy").unlink()
    assert embed(file, out) == 1


def test_embeddings_on_two_ranks_equal_one_and_resume(tmp_path: Path) -> None:
    file = written(tmp_path, pairs())
    made = [embed(file, tmp_path / "two", rank=rank, world_size=2) for rank in (0, 1)]
    assert made == [3, 2]
    embed(file, tmp_path / "one")
    assert arrays(tmp_path / "two") == arrays(tmp_path / "one")
    assert embed(file, tmp_path / "two") == 0


def test_embeddings_of_all_modalities_share_a_folder(tmp_path: Path) -> None:
    for modality in MODALITIES:
        embed(
            written(tmp_path, [{f"{modality}_name": f"a.{modality}", "caption": "red"}]),
            tmp_path / "out",
            modality,
        )
    assert sorted(arrays(tmp_path / "out")) == ["a.audio.npy", "a.image.npy", "a.video.npy"]


def test_embeddings_of_another_text_encoder_raise_but_a_moved_one_does_not(tmp_path: Path) -> None:
    file, out = written(tmp_path, pairs(2)), tmp_path / "out"
    embed(file, out)
    for name, seed in (("same", 1), ("other", 2)):
        build_mini_decoder("image", tmp_path / name, seed, ["a small red circle on the left"], TINY)
    assert embed(file, out, model=str(tmp_path / "same")) == 0
    with pytest.raises(UserError, match=r"embeddings\.image\.json.*other differs"):
        embed(file, out, model=str(tmp_path / "other"))


def test_embeddings_second_caption_for_a_medium_raises(tmp_path: Path) -> None:
    out = tmp_path / "out"
    embed(written(tmp_path, pairs(2)), out)
    changed = [pairs(2)[0], {"image_name": "1.png", "caption": "a green star"}]
    with pytest.raises(UserError, match=r"1\.png\.npy .*'A blue circle', not 'a green star'"):
        embed(written(tmp_path, changed), out)
    with pytest.raises(UserError, match=r"1\.png has two captions"):
        embed(written(tmp_path, [*pairs(2), changed[1]]), tmp_path / "new")
    assert embed(written(tmp_path, [*pairs(2), pairs(2)[0]]), tmp_path / "new") == 2


def test_embeddings_few_second_captions_are_skipped_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"image_name": f"{i}.png", "caption": "a red circle"} for i in range(40)]
    second = {"image_name": "7.png", "caption": "a green star"}
    assert embed(written(tmp_path, [*rows, second]), tmp_path / "out") == 40
    output = capsys.readouterr().out
    assert "7.png has two captions, 'a red circle' and 'a green star'" in output
    assert "1 of 41 captions are second ones" in output
    assert embed(written(tmp_path, rows), tmp_path / "out") == 0  # the first was embedded
    assert "two captions" not in capsys.readouterr().out


def test_embeddings_non_finite_raise(tmp_path: Path) -> None:
    store = EmbeddingStore(tmp_path, "audio", EmbeddingMaker("m", "f", "t", (2,)))
    with pytest.raises(UserError, match="not finite"):
        store.write(["a.wav"], ["a bell"], torch.tensor([[1e6, 0.0]]))
    assert not arrays(tmp_path)


def test_embedding_store_read_error_names_file_and_shapes(tmp_path: Path) -> None:
    path = embedding_path(tmp_path, "folder/a.png")
    assert path == tmp_path / "a.png.npy"
    with pytest.raises(MediaError, match=r"a\.png\.npy"):
        read_embedding(path, (2,))
    path.write_bytes(b"no array")
    with pytest.raises(MediaError, match=r"a\.png\.npy"):
        read_embedding(path, (2,))
    np.save(path, np.zeros((3,), np.float16))
    with pytest.raises(UserError, match=r"a\.png\.npy: shape \(3,\), expected \(2,\)"):
        read_embedding(path, (2,))
    assert read_embedding(path, (3,)).dtype == torch.float32


def test_embedding_that_is_no_array_of_its_shape_is_refused_without_reading_it(
    tmp_path: Path,
) -> None:
    shape = (4, 1 << 40)  # 8 terabytes, in a file of 200 bytes
    path = tmp_path / "lying.npy"
    with path.open("wb") as file:
        header = {"descr": "<f2", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(bytes(100))
    np.savez(tmp_path / "archive", np.zeros(3))
    np.save(tmp_path / "words.npy", np.array(["a", "b", "c"]))
    (tmp_path / "archive.npz").rename(tmp_path / "archive.npy")
    for name, expected in (("lying", shape), ("archive", (3,)), ("words", (3,))):
        with pytest.raises(MediaError, match=rf"{name}\.npy: cannot load"):
            read_embedding(tmp_path / f"{name}.npy", expected)


def test_process_embeddings_accepts_course_arguments_and_launcher_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(tmp_path, pairs(3))
    out, model = str(tmp_path / "out"), str(tiny_decoder("image"))
    words = ["process_embeddings.py", "--local_rank=0", str(file), "image", out, model]
    monkeypatch.setattr(sys, "argv", words)
    for rank, names in (("1", ["1.png.npy"]), ("0", ["0.png.npy", "1.png.npy", "2.png.npy"])):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        process_embeddings.main()
        assert sorted(arrays(tmp_path / "out")) == names
