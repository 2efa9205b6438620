"""Sampling: answer the documents of a protocol; keep texts, media and a record of each.

The output folder holds `run.json` (what the samples depend on), `samples.jsonl` (a record a line,
by doc_id) and `media/`. Documents are dealt to the ranks; each appends to a file of its own,
`samples.rank<r>.jsonl`, which are merged at the end and at the next start. An interrupted call is
continued with any number of ranks, and loses a batch a rank at most.

Records have lmms-eval's field names. Of generated media, `resps` holds its JSON form of an answer,
{"text", "images"} (`videos`, `audios`), with paths relative to the folder.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nextgpt.common.distributed import compute_on_rank_0, finish_together, rank_and_world
from nextgpt.common.errors import MediaError, UserError
from nextgpt.common.io import atomic_write
from nextgpt.common.json_io import append_json_lines, read_json, to_json
from nextgpt.common.modality import MODALITIES
from nextgpt.conversation.messages import Conversation, Media, Text, Turn
from nextgpt.dataset.pair_forms import CAPTION_PROMPT
from nextgpt.evaluation.benchmark_data import Document
from nextgpt.evaluation.caption_passing import decode_captions, written_caption
from nextgpt.evaluation.media_scores import check_real_medium
from nextgpt.evaluation.protocols import Protocol
from nextgpt.generation.assistant import Assistant
from nextgpt.generation.events import Answer
from nextgpt.generation.settings import GenerationSettings
from nextgpt.media.writing import Output, save_medium

SAMPLES, RUN, MEDIA = "samples.jsonl", "run.json", "media"
ANSWER, PASSED, CEILING = "answer", "passed", "ceiling"
Record = dict[str, Any]


@dataclass(frozen=True)
class SamplingRun:
    """What to sample, and where to.

    Attributes:
        documents: those to answer, in order.
        seed: of the media; document i has seed + i.
        identity: what the samples depend on besides the protocol and the settings, such as the
            fingerprint of the tuned parameters; compared when a run is continued.
    """

    protocol: Protocol
    documents: Sequence[Document]
    out: Path
    seed: int = 0
    identity: dict[str, Any] | None = None


def sample(assistant: Assistant, run: SamplingRun) -> None:
    """Answer the documents that have no record yet; all ranks must call it.

    Texts are decoded greedily.

    Raises:
        UserError: the folder holds samples of another run, or a component is missing.
    """
    settings = sampling_settings(assistant, run.protocol)
    done = compute_on_rank_0(lambda: _prepare(assistant, run, settings))
    rank, world = rank_and_world()
    waiting = [document for document in run.documents if document.doc_id not in done]
    mine, size = waiting[rank::world], assistant.config.evaluation.batch_size
    file = run.out / f"samples.rank{rank}.jsonl"
    quiet = True if rank else None  # None: on a terminal only
    with (
        finish_together(),
        tqdm(total=len(mine), desc=run.protocol.name, unit="sample", disable=quiet) as bar,
    ):
        for start in range(0, len(mine), size):
            batch = mine[start : start + size]
            append_json_lines(file, _sample_batch(assistant, run, batch, settings))
            bar.update(len(batch))
    compute_on_rank_0(lambda: _merge(run.out))


def sampling_settings(assistant: Assistant, protocol: Protocol) -> GenerationSettings:
    """The configuration's settings with greedy decoding; media of the protocol's modality alone."""
    settings = GenerationSettings.from_config(assistant.config)
    media = frozenset({protocol.modality} if protocol.task == "generate" else ())
    return replace(settings, temperature=0.0, modalities=media)


def read_samples(out: Path) -> list[Record]:
    """Read the records of a folder, by doc_id; those of an interrupted run too.

    Raises:
        UserError: there are none, or a line is damaged.
    """
    records = {record["doc_id"]: record for file in _sample_files(out) for record in _lines(file)}
    if not records:
        raise UserError(f"{out} holds no {SAMPLES}: sample first")
    return [records[doc_id] for doc_id in sorted(records)]


def prompt_of(protocol: Protocol, document: Document, assistant: Assistant) -> Conversation:
    """The conversation of one human turn: stage 1's question, or a request for a medium."""
    if protocol.task == "describe":
        medium = Media(protocol.modality, path=str(document.medium.absolute()))
        return Conversation((Turn("human", (medium, Text(CAPTION_PROMPT))),))
    template = assistant.config.serving.task_prompts[protocol.modality]
    request = template.replace("{prompt}", document.captions[0])
    return Conversation((Turn("human", (Text(request),)),))


def _sample_batch(
    assistant: Assistant,
    run: SamplingRun,
    documents: Sequence[Document],
    settings: GenerationSettings,
) -> list[Record]:
    """Answer documents together, or one by one where a medium cannot be used."""
    protocol = run.protocol
    prompts = [prompt_of(protocol, document, assistant) for document in documents]
    try:
        if protocol.task == "generate":
            for document in documents:
                check_real_medium(protocol.modality, document.medium)
        answers = assistant.answer(
            prompts,
            seeds=[run.seed + document.doc_id for document in documents],
            settings=settings,
            media_at_once=assistant.config.evaluation.batch_size,
        )
    except MediaError as error:
        if len(documents) == 1:
            return [_record(protocol, documents[0], prompts[0]) | {"error": str(error)}]
        return [
            record
            for document in documents
            for record in _sample_batch(assistant, run, [document], settings)
        ]
    records = []
    for document, prompt, answer in zip(documents, prompts, answers, strict=True):
        record = _record(protocol, document, prompt)
        if protocol.task == "generate":
            written = written_caption(answer.turn.parts, protocol.modality)
            record |= {"written": written, "media": {}}
            if answer.outputs:
                _keep_medium(run, record, ANSWER, answer.outputs[0])
        records.append(record | _responses(protocol, record, answer))
    if protocol.task == "generate" and assistant.config.evaluation.caption_passing:
        columns = {
            PASSED: [record["written"] for record in records],
            CEILING: [document.captions[0] for document in documents],
        }
        for name, captions in columns.items():
            _decode_captions(assistant, run, records, name, captions, settings)
    return records


def _decode_captions(
    assistant: Assistant,
    run: SamplingRun,
    records: Sequence[Record],
    name: str,
    captions: Sequence[str],
    settings: GenerationSettings,
) -> None:
    """Decode the captions that are not empty, with the answers' seeds; keep the media as `name`."""
    pairs = [pair for pair in zip(records, captions, strict=True) if pair[1]]
    if pairs:
        rows, given = zip(*pairs, strict=True)
        seeds = [run.seed + row["doc_id"] for row in rows]
        outputs = decode_captions(assistant, run.protocol.modality, given, seeds, settings)
        for row, output in zip(rows, outputs, strict=True):
            _keep_medium(run, row, name, output)


def _record(protocol: Protocol, document: Document, prompt: Conversation) -> Record:
    captions = list(document.captions)
    (text,) = (part.text for part in prompt.turns[0].parts if isinstance(part, Text))
    return {
        "doc_id": document.doc_id,
        "doc": {"medium": str(document.medium.absolute()), "captions": captions},
        "target": captions if protocol.task == "describe" else captions[0],
        "arguments": [text],
        "resps": [[""]],
        "filtered_resps": [""],
    }


def _responses(protocol: Protocol, record: Record, answer: Answer) -> Record:
    text = answer.text.strip()
    if protocol.task == "generate":
        media = [record["media"][ANSWER]] if ANSWER in record["media"] else []
        text = to_json({"text": text, f"{protocol.modality}s": media}, ensure_ascii=False)
    return {"resps": [[text]], "filtered_resps": [text]}


def _keep_medium(run: SamplingRun, record: Record, name: str, output: Output) -> None:
    suffix = MODALITIES[run.protocol.modality].suffix
    file = f"{MEDIA}/{record['doc_id']:06d}_{name}{suffix}"
    save_medium(output, run.out / file)
    record["media"][name] = file


def _prepare(assistant: Assistant, run: SamplingRun, settings: GenerationSettings) -> set[int]:
    """Merge the records of earlier calls; check and write `run.json`; the doc_ids that are done."""
    run.out.mkdir(parents=True, exist_ok=True)
    decode = {m: vars(settings.decode[m]) for m in sorted(settings.modalities or ())}
    state = {
        "protocol": run.protocol.name,
        "config": assistant.config.name,
        "seed": run.seed,
        "generation": {name: getattr(settings, name) for name in ("temperature", "max_new_tokens")},
        "decode": decode,
        "caption_passing": assistant.config.evaluation.caption_passing,
        **(run.identity or {}),
    }
    state = json.loads(to_json(state))
    file = run.out / RUN
    if file.is_file() and (before := read_json(file)) != state:
        changed = sorted(k for k in before.keys() | state if before.get(k) != state.get(k))
        raise UserError(
            f"{run.out} holds samples of another run (other {', '.join(changed)}): give another "
            "--out, or remove it"
        )
    with atomic_write(file) as partial:
        partial.write_text(to_json(state, indent=1) + "\n", encoding="utf-8")
    done = _merge(run.out)
    _check_documents(run)
    return done


def _check_documents(run: SamplingRun) -> None:
    """Raise a UserError if a record is of another document than the run's."""
    documents = {document.doc_id: document for document in run.documents}
    for record in _lines(run.out / SAMPLES) if (run.out / SAMPLES).is_file() else ():
        document, doc = documents.get(record["doc_id"]), record["doc"]
        if document and (Path(doc["medium"]).name, doc["captions"]) != (
            document.medium.name,
            list(document.captions),
        ):
            raise UserError(
                f"{run.out} holds samples of other data (document {document.doc_id}): give another "
                "--out, or remove it"
            )


def _merge(out: Path) -> set[int]:
    """Write all records to `samples.jsonl` and remove the ranks' files; return the doc_ids."""
    merged = out / SAMPLES
    files = [file for file in _sample_files(out) if file != merged]
    if files:
        records = {r["doc_id"]: r for file in _sample_files(out) for r in _lines(file)}
        with atomic_write(merged) as partial:
            append_json_lines(partial, (records[doc_id] for doc_id in sorted(records)))
        for file in files:
            file.unlink()
    return {record["doc_id"] for record in _lines(merged)} if merged.is_file() else set()


def _sample_files(out: Path) -> list[Path]:
    files = [out / SAMPLES, *sorted(out.glob("samples.rank*.jsonl"))]
    return [file for file in files if file.is_file()]


def _lines(file: Path) -> Iterator[Record]:
    """Yield the records; a line without an end was cut off by an interruption."""
    with file.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            if line.endswith("\n"):
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise UserError(f"{file}: line {number} is damaged: {error}") from error
