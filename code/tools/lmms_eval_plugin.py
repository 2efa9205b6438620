"""A model of lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval), found by its entry point.

python -m lmms_eval --model nextgpt --model_args config=mini --tasks TASK --batch_size 8

Tasks give images, videos and audio as their data sets hold them, and get text. With
`output=image` (`video`, `audio`) among the model's arguments the answer is lmms-eval's JSON of
generated media, {"text", "images"} (`videos`, `audios`), with the paths of files that are kept.
Only this module imports lmms-eval, which is installed apart.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image
from tqdm import tqdm

from nextgpt.common.errors import UserError
from nextgpt.common.json_io import to_json
from nextgpt.common.modality import MODALITIES
from nextgpt.config.loader import load_config
from nextgpt.conversation.messages import Conversation, Media, Text, Turn
from nextgpt.dataset.tables import modality_of_file
from nextgpt.generation.assistant import Assistant
from nextgpt.generation.events import Answer
from nextgpt.generation.settings import GenerationSettings
from nextgpt.media.writing import Sound, save_medium


def manifest() -> ModelManifest:
    """The entry point in the group `lmms_eval.models`."""
    return ModelManifest("nextgpt", simple_class_path=f"{__name__}.NextGPTModel")


class NextGPTModel(lmms):
    """The system as a model of lmms-eval; the arguments are those of `--model_args`.

    Args:
        config: name or YAML file.
        delta: tuned parameters; by default the last stage's.
        overrides: `key=value` of the configuration, separated by semicolons.
        output: `text`, or the modality of the media to be generated.
        media_out: folder of generated media.
        batch_size: answers that are generated together.
        seed: of the media.
    """

    def __init__(
        self,
        config: str = "mini",
        delta: str | None = None,
        overrides: str = "",
        output: str = "text",
        media_out: str = "outputs/lmms_eval",
        batch_size: int | str = 1,
        seed: int = 0,
        **_: Any,  # device and others that lmms-eval passes to every model
    ) -> None:
        super().__init__()
        if output not in ("text", *MODALITIES):
            raise UserError(f"output {output!r}: give text, {', '.join(MODALITIES)}")
        sets = [override for override in overrides.split(";") if override]
        settings = load_config(config, overrides=sets)
        self.assistant = Assistant.from_config(settings, delta and Path(delta))
        self.output, self.media_out = output, Path(media_out).absolute()
        self.batch_size_per_gpu, self.seed = int(batch_size), int(seed)

    @property
    def batch_size(self) -> int:
        """Answers that are generated together."""
        return self.batch_size_per_gpu

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answer each request: its media, then its text, in one human turn."""
        answers: list[str] = []
        with TemporaryDirectory() as folder, tqdm(total=len(requests), disable=None) as bar:
            for arguments, group in groupby(requests, key=lambda request: request.args[1]):
                waiting = list(group)
                for start in range(0, len(waiting), self.batch_size):
                    batch = waiting[start : start + self.batch_size]
                    answers += self._answer(batch, arguments, Path(folder))
                    bar.update(len(batch))
        return answers

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not supported: answers are generated."""
        raise UserError("nextgpt generates answers: tasks of output_type loglikelihood need more")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not supported: tasks of several rounds."""
        raise UserError("tasks of several rounds are not supported")

    def _answer(
        self, requests: Sequence[Instance], arguments: dict[str, Any], folder: Path
    ) -> list[str]:
        settings = self._settings(arguments)
        found = self.assistant.answer(
            [self._conversation(request, folder) for request in requests],
            seeds=[self.seed] * len(requests),
            settings=settings,
            media_at_once=self.batch_size,
        )
        pairs = zip(requests, found, strict=True)
        return [self._format(request, answer) for request, answer in pairs]

    def _settings(self, arguments: dict[str, Any]) -> GenerationSettings:
        """The configuration's settings with those of the task; greedy unless it says otherwise."""
        settings = GenerationSettings.from_config(self.assistant.config)
        until = arguments.get("until") or ()
        given = {
            name: arguments[name]
            for name in ("max_new_tokens", "top_p")
            if arguments.get(name) is not None
        }
        return replace(
            settings,
            temperature=float(arguments.get("temperature") or 0),
            stop=(until,) if isinstance(until, str) else tuple(until),
            modalities=frozenset({self.output} - {"text"}),
            **given,
        )

    def _conversation(self, request: Instance, folder: Path) -> Conversation:
        context, _, doc_to_visual, doc_id, task, split = request.args
        document = self.task_dict[task][split][doc_id]
        name = f"{task}_{split}_{doc_id}"
        shown = list(_media(doc_to_visual(document), folder / name.replace("/", "_")))
        return Conversation((Turn("human", (*shown, Text(context))),))

    def _format(self, request: Instance, answer: Answer) -> str:
        text = answer.text.strip()
        if self.output == "text":
            return text
        *_, doc_id, task, _ = request.args
        files = []
        for number, output in enumerate(answer.outputs):
            name = f"{task}_{doc_id}_{number}{MODALITIES[self.output].suffix}"
            save_medium(output, self.media_out / name)
            files.append(str(self.media_out / name))
        return to_json({"text": text, f"{self.output}s": files}, ensure_ascii=False)


def _media(visuals: Any, stem: Path) -> Iterator[Media]:
    """Yield a task's media as files: paths as they are, others written to files named `stem`.

    Raises:
        UserError: a medium of a kind that is not known.
    """
    items = visuals if isinstance(visuals, list | tuple) else [visuals]
    for number, item in enumerate(one for one in items if one is not None):
        file = stem.with_name(f"{stem.name}_{number}")
        if isinstance(item, str | Path):
            yield _file_medium(Path(item))
        elif isinstance(item, Image.Image):
            item.convert("RGB").save(file.with_suffix(".png"))
            yield Media("image", path=str(file.with_suffix(".png")))
        elif isinstance(item, list | tuple):
            yield from _media(item, file)
        elif (sound := _sound(item)) is not None:
            sound.save(file.with_suffix(".wav"))
            yield Media("audio", path=str(file.with_suffix(".wav")))
        else:
            raise UserError(f"a medium of the type {type(item).__name__} is not supported")


def _file_medium(path: Path) -> Media:
    if (modality := modality_of_file(path.name)) is None:
        raise UserError(f"{path}: neither image nor video nor audio by its name")
    return Media(modality, path=str(path.absolute()))


def _sound(item: Any) -> Sound | None:
    """Audio of Hugging Face's data sets: samples, or torchcodec's decoder."""
    if hasattr(item, "get_all_samples"):
        decoded = item.get_all_samples()
        return Sound(decoded.data.mean(dim=0).numpy().astype(np.float32), decoded.sample_rate)
    if isinstance(item, dict) and item.get("array") is not None:
        samples = np.asarray(item["array"], np.float32)
        return Sound(samples.mean(axis=0) if samples.ndim > 1 else samples, item["sampling_rate"])
    return None
