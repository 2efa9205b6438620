"""Identifies by content what a run is built from, so that it is resumed with nothing else.

Recorded when a run starts and compared when it is resumed: the predecessor's delta, the rows of the
data sets, the caption embeddings, the frozen models, DeepSpeed's settings; not the media files.
Costs 1 s per GiB of weights the first time they are seen (`DigestCache`), milliseconds later.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from nextgpt.common.errors import MissingFileError, UserError
from nextgpt.common.file_digests import DigestCache
from nextgpt.common.io import atomic_write
from nextgpt.common.json_io import to_json
from nextgpt.common.paths import project_path
from nextgpt.config.schema import Config
from nextgpt.dataset.caption_embeddings import read_maker
from nextgpt.dataset.caption_records import output_modalities, sample_outputs
from nextgpt.dataset.conversations import ConversationDataset
from nextgpt.model.imagebind import fingerprint
from nextgpt.model.loading import find_folder, tokenizer_files, weight_files
from nextgpt.training.caption_check import text_encoder_fingerprints
from nextgpt.training.engine import read_deepspeed_config

RunInputs = dict[str, Any]  # as in the file: by section, by name, the identity
_Identity = dict[str, Any]  # digests, and the `file`, which may differ

_SAMPLED_ROWS = 8  # of a data set, whose embeddings are hashed


def identify_inputs(
    config: Config, dataset: ConversationDataset, predecessor: Path | None
) -> RunInputs:
    """Identify by content what a run with this configuration is built from.

    Args:
        dataset: the run's data sets.
        predecessor: file of the delta that the run starts from.

    Raises:
        UserError: a file cannot be read, or changes meanwhile.
    """
    digests = DigestCache(project_path(config.data.cache_dir))
    return {
        "predecessor": predecessor
        and {"file": str(predecessor), "digest": digests.digest(predecessor)},
        "datasets": {
            name: {
                "file": str(dataset.sources[name].annotation),
                "rows": len(index),
                "digest": index.digest,
            }
            for name, index in dataset.indexes.items()
        },
        "caption_embeddings": _identify_embeddings(config, dataset),
        "frozen": _identify_frozen(config, dataset, digests),
        "deepspeed": read_deepspeed_config(config.training),
    }


def write_inputs(inputs: RunInputs, file: Path) -> None:
    """Write the result of `identify_inputs`."""
    with atomic_write(file) as aside:
        aside.write_text(to_json(inputs, indent=1) + "\n", encoding="utf-8")


def read_inputs(file: Path) -> RunInputs | None:
    """The inputs in `file`; None if it does not exist.

    Raises:
        UserError: the file is damaged.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{file} is damaged: give --restart") from error


def compare_inputs(before: RunInputs, now: RunInputs) -> list[str]:
    """Lines on what differs from the start of the run.

    What was missing either time is not compared: a run that needs it fails by itself.
    """
    lines = _compare("predecessor", before["predecessor"], now["predecessor"])
    for section in ("datasets", "frozen"):
        for name in before[section].keys() & now[section].keys():
            lines += _compare(name, before[section][name], now[section][name])
    for modality in before["caption_embeddings"].keys() & now["caption_embeddings"].keys():
        old, new = (inputs["caption_embeddings"][modality] for inputs in (before, now))
        name = f"{modality} caption embeddings in {new['folder']}"
        other_maker = _compare(name, old["maker"], new["maker"]) if old["maker"] else []
        both = old["arrays"].keys() & new["arrays"].keys()
        changed = [file for file in both if old["arrays"][file] != new["arrays"][file]]
        if changed and not other_maker:
            lines.append(
                f"{name}: of {len(both)} looked at {len(changed)} are others than then, first "
                f"{min(changed)}"
            )
        lines += other_maker
    if before["deepspeed"] != now["deepspeed"]:
        lines.append(f"DeepSpeed's settings: {before['deepspeed']} then, {now['deepspeed']} now")
    return sorted(lines)


def _compare(name: str, before: _Identity | None, now: _Identity | None) -> list[str]:
    """A line if the content differs."""
    old, new = ({k: v for k, v in (one or {}).items() if k != "file"} for one in (before, now))
    if old == new and bool(before) == bool(now):
        return []
    return [f"{name}: {_format_identity(before)} then, {_format_identity(now)} now"]


def _format_identity(identity: _Identity | None) -> str:
    if not identity:
        return "nothing"
    words = [str(identity["file"])] if "file" in identity else []
    for key, value in identity.items():
        if key == "rows":
            words.append(f"{value:,} rows")
        elif key != "file":
            words.append(f"{key} {str(value)[:12]}")
    return ", ".join(words)


def _identify_embeddings(config: Config, dataset: ConversationDataset) -> dict[str, _Identity]:
    """By modality what computed the embeddings, and digests of a few."""
    if config.data.caption_embeddings == "online":
        return {}
    folder = project_path(config.data.caption_embedding_dir).resolve()
    identities = {}
    for modality in output_modalities(dataset):
        maker = read_maker(folder, modality)
        identities[modality] = {
            "folder": str(folder),
            "maker": maker
            and {
                "file": maker.model,
                "fingerprint": maker.fingerprint,
                "tokenizer": maker.tokenizer,
                "shape": list(maker.shape),
            },
            "arrays": {},
        }
    for name in dataset.sources:
        for _, medium in sample_outputs(dataset, name, _SAMPLED_ROWS):
            file = Path(medium.embedding or "")
            if file.is_file():  # samples without one are skipped
                digest = hashlib.sha256(file.read_bytes()).hexdigest()
                identities[medium.modality]["arrays"][file.name] = digest
    return identities


def _identify_frozen(
    config: Config, dataset: ConversationDataset, digests: DigestCache
) -> dict[str, _Identity]:
    """By name the frozen models that the run uses and that are on this machine."""
    folder = find_folder(config.language_model.path, "config.json")
    files = [*weight_files(folder), folder / "config.json", *tokenizer_files(folder)]
    named = {str(file.relative_to(folder)): file for file in files}
    identities: dict[str, _Identity] = {
        "language model": {"file": str(folder), "digest": digests.digest_files(named)}
    }
    if any(source.kind != "caption_out" for source in dataset.sources.values()):
        path = project_path(config.encoder.path)
        try:
            digest = fingerprint(path, digests)
            identities["media encoder"] = {"file": str(path), "digest": digest}
        except MissingFileError:  # conversations without media need none
            pass
    if config.data.caption_embeddings == "online":
        for modality in output_modalities(dataset):
            weights, tokenizer = text_encoder_fingerprints(config, modality)
            path = config.decoders[modality].path
            identities[f"text encoder of the {modality} decoder"] = {
                "file": path, "weights": weights, "tokenizer": tokenizer
            }  # fmt: skip
    return identities
