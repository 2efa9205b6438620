"""Explains an annotation file or folder: form, media, lengths in tokens, samples as tokenized."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nextgpt.common.errors import MediaError, UserError
from nextgpt.common.paths import project_path
from nextgpt.config.schema import Config, DatasetConfig
from nextgpt.conversation.messages import Media
from nextgpt.conversation.prompt import IGNORE_INDEX, EncodedPrompt, PromptBuilder
from nextgpt.dataset.catalog import resolve_entry
from nextgpt.dataset.conversations import ConversationDataset
from nextgpt.dataset.pair_forms import named_modalities
from nextgpt.dataset.tables import annotation_rows, describe_form
from nextgpt.model.build import build_prompt_builder

_MAX_TOKENIZED = 20_000  # conversations, evenly spaced; some 10 s
_SAMPLES = 3
_PERCENTILES = (50, 90, 99)


@dataclass
class Description:
    """What was found.

    Attributes:
        unusable: number of rows that are left out, and of missing input media.
        lines: for people.
    """

    unusable: int = 0
    lines: list[str] = field(default_factory=list)


def describe_data(
    config: Config, path: Path, media_dir: Path | None = None, direction: str | None = None
) -> Description:
    """Describe `path`, any path of `data.datasets`.

    Args:
        config: for the tokenizer, the signal tokens and `data.max_seq_length`.
        media_dir, direction: as in `data.datasets`; by default the folder of `path`, and what its
            first record is: from medium to caption, or an instruction.

    Raises:
        UserError: the file cannot be read, has too many unusable rows or records of unknown form.
    """
    name, direction = path.name, direction or _guess_direction(path)
    media = str(media_dir.absolute()) if media_dir else None
    values = {"name": name, "path": str(path.absolute())}
    values |= {"media_dir": media, "direction": direction}
    entry = DatasetConfig.model_validate(values)
    source = resolve_entry(entry, path, project_path(config.data.caption_embedding_dir))
    dataset = ConversationDataset([source], project_path(config.data.cache_dir))
    index, missing = dataset.indexes[name], _missing_media(dataset, name)
    lines = [
        f"{path}: {describe_form(path)}",
        f"{len(index):,} conversations, direction {direction}",
        *index.report,
        *_describe_media(dataset, name),
        *([f"{len(missing):,} input media are missing, first {missing[0]}"] if missing else ()),
    ]
    try:
        builder = build_prompt_builder(config)
    except UserError as error:
        lines.append(f"lengths and samples need the tokenizer of the configuration: {error}")
    else:
        lines += _describe_lengths(dataset, name, builder, config.data.max_seq_length)
        lines += _describe_samples(dataset, name, builder, config.data.max_seq_length)
    return Description(len(index.left_out) + len(missing), lines)


def render_prompt(builder: PromptBuilder, prompt: EncodedPrompt) -> Iterator[tuple[bool, str]]:
    """Yield (whether it carries the loss, text) of each stretch of a tokenized conversation.

    New tokens have their names, and an input medium is `(image a.png, 8 tokens)`; line breaks are
    escaped.
    """
    hidden = {start + i for start, _ in prompt.media_positions for i in range(builder.media_tokens)}
    media = dict(prompt.media_positions)
    ids, labels = prompt.input_ids, prompt.labels

    def named(position: int) -> str | None:
        """The name of what is no text."""
        if medium := media.get(position):
            name = Path(medium.path or "").name
            return f"({medium.modality} {name}, {builder.media_tokens} tokens)"
        if position in hidden:
            return ""
        is_new = ids[position] >= builder.signals.first_id
        return builder.signals.name(ids[position]) if is_new else None

    for has_loss, stretch in groupby(range(len(ids)), lambda i: labels[i] != IGNORE_INDEX):
        text = ""
        for is_text, positions in groupby(stretch, lambda i: named(i) is None):
            if is_text:
                text += builder.tokenizer.decode([ids[i] for i in positions])
            else:
                text += "".join(named(i) or "" for i in positions)
        yield has_loss, text.replace("\n", "\\n")


def _guess_direction(path: Path) -> str:
    record = next((r for r, _ in annotation_rows(path) if isinstance(r, dict)), {})
    is_pair = "caption" in record and len(named_modalities(record)) == 1
    return "medium_to_caption" if is_pair else "instruction"


def _missing_media(dataset: ConversationDataset, name: str) -> list[str]:
    """Messages for the conversations with a missing input medium."""
    missing = []
    for row in tqdm(range(dataset.sizes[name]), desc="media", unit=" rows", delay=2):
        try:
            dataset[name, row]
        except MediaError as fault:
            missing.append(str(fault))
    return missing


def _describe_media(dataset: ConversationDataset, name: str) -> Iterator[str]:
    """Count the media of both sides."""
    counts: dict[str, Counter[str]] = {"input": Counter(), "output": Counter()}
    for row in range(dataset.sizes[name]):
        for turn in dataset.record(name, row).turns:
            side = "input" if turn.role == "human" else "output"
            counts[side].update(part.modality for part in turn.parts if isinstance(part, Media))
    for side, found in counts.items():
        media = ", ".join(f"{count:,} {modality}" for modality, count in found.items())
        yield f"{side} media: {media or 'none'}"


def _describe_samples(
    dataset: ConversationDataset, name: str, builder: PromptBuilder, max_length: int
) -> Iterator[str]:
    """Some conversations as they are tokenized."""
    yield "samples as tokenized (| without loss, > with loss):"
    for row in _spaced_rows(dataset.sizes[name], _SAMPLES):
        yield f"  row {dataset.file_row(name, row)}"
        try:
            prompt = builder.encode(dataset.record(name, row), max_length)
        except MediaError as fault:
            yield f"    cannot be used: {fault}"
            continue
        for has_loss, text in render_prompt(builder, prompt):
            yield f"    {'>' if has_loss else '|'} {text}"


def _spaced_rows(size: int, count: int) -> list[int]:
    """At most `count` evenly spaced rows."""
    return np.unique(np.linspace(0, size - 1, min(size, count)).astype(int)).tolist()


def _describe_lengths(
    dataset: ConversationDataset, name: str, builder: PromptBuilder, max_length: int
) -> Iterator[str]:
    """Percentiles of the lengths, and how many conversations are truncated."""
    size = dataset.sizes[name]
    rows = _spaced_rows(size, _MAX_TOKENIZED)
    lengths = np.array(
        [
            len(builder.encode(dataset.record(name, row)).input_ids)
            for row in tqdm(rows, desc="tokens", unit=" rows", delay=2)
        ]
    )
    of = f"{len(rows):,} conversations" + (" (evenly spaced)" if len(rows) < size else "")
    found = np.percentile(lengths, _PERCENTILES, method="higher").astype(int)
    shares = ", ".join(f"{p} % up to {n}" for p, n in zip(_PERCENTILES, found, strict=True))
    yield f"tokens of {of}: {shares}, longest {lengths.max()}"
    cut = int((lengths > max_length).sum())
    yield f"truncated to data.max_seq_length {max_length}: {cut:,} ({cut / len(rows):.1%})"
