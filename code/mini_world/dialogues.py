"""Sampler of in-place multimodal dialogues, the rows of MosIT files.

A dialogue has a state: an object, its known attributes and the modality in which it was last shown.
Each request asks for text, an image, a video or a sound; the course's four cases ask for several
outputs at once. An edit ("the same in green") keeps the modality of the last medium; other requests
name one.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.mini_world.captions import canonical_caption, sample_caption
from nextgpt.mini_world.media_set import MediaSet
from nextgpt.mini_world.objects import (
    ATTRIBUTES,
    OPPOSITE_MOTION,
    Split,
    WorldObject,
    attribute_variants,
    sample_object,
)
from nextgpt.mini_world.questions import sample_question, sample_world_question
from nextgpt.mini_world.request_templates import (
    AUDIO_REQUESTS,
    COUNTED_AUDIO_REQUESTS,
    COURSE_REQUESTS,
    EDIT_REQUESTS,
    LEAD_INS,
    MEDIUM_LAYOUTS,
    OPENING_REQUESTS,
    REVERSE_REQUESTS,
    VISUAL_REQUESTS,
)
from nextgpt.mini_world.unsupported_requests import sample_unsupported_edit
from nextgpt.mini_world.words import as_sentence, choose, fill_template

OUTPUTS: tuple[str, ...] = ("text", *MODALITIES)
# The course's four cases and the modality of the human's input.
CASE_INPUT: dict[str, Modality | None] = {
    "T+I→T+A": "image",
    "T+V→T+A": "video",
    "T+I→T+I+V": "image",
    "T→T+I+V+A": None,
}
Turn = dict[str, Any]
Answer = tuple[str | tuple[Modality, str], ...]  # texts and (modality, caption), in order

# Attributes that are known after an input of each modality.
_KNOWN: dict[Modality, tuple[str, ...]] = {
    "image": ATTRIBUTES["image"],
    "video": ATTRIBUTES["video"],
    "audio": ("size", "shape", "count"),
}


@dataclass(frozen=True)
class DialogueState:
    """State of a dialogue.

    Attributes:
        obj: the object it is about.
        known: known attributes of the object.
        last: modality in which it was last shown; None before the first medium.
        name_object: whether captions of its sound name the object, not timbre and pitch.
    """

    obj: WorldObject
    known: frozenset[str]
    last: Modality | None
    name_object: bool

    @classmethod
    def initial(cls, obj: WorldObject) -> "DialogueState":
        """Return the state before anything is shown."""
        return cls(obj, frozenset({"size", "shape"}), None, name_object=True)

    @classmethod
    def after_input(cls, obj: WorldObject, modality: Modality) -> "DialogueState":
        """Return the state after the human has shown a medium."""
        return cls(obj, frozenset(_KNOWN[modality]), modality, name_object=modality != "audio")

    def after_output(self, obj: WorldObject, modality: Modality, *named: str) -> "DialogueState":
        """Return the state after a medium of `obj` whose request named the attributes `named`."""
        return replace(self, obj=obj, known=self.known | set(named), last=modality)


@dataclass(frozen=True)
class Exchange:
    """A request, its answer, and the state after it."""

    request: str
    answer: Answer
    state: DialogueState


@dataclass(frozen=True)
class DialogueSampler:
    """Samples requests with their answers.

    Attributes:
        split: split of the request templates, and of objects that no medium shows.
        edit_splits: splits of the (shape, colour) pairs that an edit may lead to.
        unsupported_edits: proportion of later rounds that ask for an unsupported edit of the image
            or video shown last, see `unsupported_requests`.
    """

    rng: np.random.Generator
    split: Split = "training"
    edit_splits: Collection[Split] = ("training",)
    unsupported_edits: float = 0.0

    def opening(
        self, output: str, obj: WorldObject | None = None, template: str | None = None
    ) -> Exchange:
        """Sample a first request without media.

        Args:
            obj: the object it is about; None samples one.
            template: of the request for a medium; None samples one of `OPENING_REQUESTS`.
        """
        obj = obj or sample_object(self.rng, self.split)
        state = DialogueState.initial(obj)
        if output == "text":
            return self.follow_up(state, output)
        template = template or OPENING_REQUESTS[output].sample(self.rng, self.split)
        request = as_sentence(fill_template(template, self.rng, obj))
        state = state.after_output(obj, output, *_KNOWN[output])
        state = replace(state, name_object="{timbre}" not in template)
        return Exchange(request, _present(state, output), state)

    def follow_up(self, state: DialogueState, output: str) -> Exchange:
        """Sample a request for `output` that refers to `state`."""
        if output == "text":
            if state.last is None:
                question, answer = sample_world_question(state.obj, self.rng, self.split)
            else:
                question, answer = sample_question(
                    state.obj, state.last, self.rng, state.known, self.split
                )
            return Exchange(question, (answer,), state)
        if output == state.last:
            request, after = self._edit(state, output)
        elif output == "audio":
            request, after = self._request_audio(state)
        else:
            request, after = self._request_visual(state, output)
        return Exchange(request, _present(after, output), after)

    def course_case(self, case: str, obj: WorldObject) -> Exchange:
        """Sample a request of one of the course's four cases (`CASE_INPUT`)."""
        if case == "T+I→T+I+V":
            obj = choose(self.rng, attribute_variants(obj, "colour", self.edit_splits))
        elif case != "T→T+I+V+A":
            obj = replace(obj, count=1)
        template = COURSE_REQUESTS[case].sample(self.rng, self.split)
        request = as_sentence(fill_template(template, self.rng, obj))
        state = DialogueState.after_input(obj, "video")
        if case == "T→T+I+V+A":
            answer = sum((_present(state, modality) for modality in MODALITIES), ())
            return Exchange(request, answer, state.after_output(obj, "audio", "count"))
        if case == "T+I→T+I+V":
            return Exchange(request, _present(state, "image") + _present(state, "video"), state)
        source = CASE_INPUT[case] or "image"
        state = DialogueState.after_input(obj, source)
        answer = (as_sentence(canonical_caption(obj, source)), *_present(state, "audio"))
        return Exchange(request, answer, replace(state, last="audio"))

    def dialogue(
        self, source: Modality | None, goal: str, rounds: int, media_set: MediaSet
    ) -> list[Turn]:
        """Sample the turns of a dialogue, in MosIT's in-place format.

        Args:
            source: modality of the first input; None for text only.
            goal: the first request: one of `OUTPUTS`, or a case of `CASE_INPUT`.
            rounds: number of rounds; in later ones the human sometimes shows a new medium.
            media_set: the inputs, and the file names of the answers.
        """
        turns: list[Turn] = []
        state: DialogueState | None = None
        for number in range(rounds):
            if number > 0:
                source = choose(self.rng, tuple(MODALITIES)) if self.rng.random() < 0.2 else None
                goal = choose(self.rng, OUTPUTS)
            media: list[tuple[str, Modality, WorldObject]] = []
            if source is not None:
                name, obj = media_set.sample(source, self.rng)
                state, media = DialogueState.after_input(obj, source), [(name, source, obj)]
            exchange = self._exchange(state, goal)
            if number and self.unsupported_edits and self.rng.random() < self.unsupported_edits:
                exchange = self._unsupported_edit(state) or exchange
            state = exchange.state
            turns += [
                self._human_turn(exchange.request, media),
                _assistant_turn(exchange.answer, media_set),
            ]
        return turns

    def _exchange(self, state: DialogueState | None, goal: str) -> Exchange:
        if goal in CASE_INPUT:
            obj = state.obj if state else sample_object(self.rng, self.split)
            return self.course_case(goal, obj)
        return self.follow_up(state, goal) if state else self.opening(goal)

    def _unsupported_edit(self, state: DialogueState | None) -> Exchange | None:
        """Sample an edit that is declined; None unless an image or video was shown last."""
        if state is None or state.last not in ("image", "video"):
            return None
        request, answer = sample_unsupported_edit(state.last, self.rng)
        return Exchange(request, (answer,), state)

    def _human_turn(self, request: str, media: list[tuple[str, Modality, WorldObject]]) -> Turn:
        value = request
        for _, modality, _ in media:
            layout = choose(self.rng, MEDIUM_LAYOUTS)
            value = layout.format(medium=f"<{modality}>", request=request)
        entries = [
            {"modality": modality, "name": name, "caption": sample_caption(obj, modality, self.rng)}
            for name, modality, obj in media
        ]
        return {"from": "human", "value": value, "media": entries}

    def _edit(self, state: DialogueState, output: Modality) -> tuple[str, DialogueState]:
        """Request the same medium with one attribute changed."""
        if output == "video" and "motion" in state.known and self.rng.random() < 0.3:
            edited = replace(state.obj, motion=OPPOSITE_MOTION[str(state.obj.motion)])
            request = REVERSE_REQUESTS.sample(self.rng, self.split)
            return request, state.after_output(edited, output)
        possible = {
            attribute: variants
            for attribute in EDIT_REQUESTS[output]
            if (variants := attribute_variants(state.obj, attribute, self.edit_splits))
        }
        attribute = choose(self.rng, list(possible))
        edited = choose(self.rng, possible[attribute])
        template = EDIT_REQUESTS[output][attribute].sample(self.rng, self.split)
        request = as_sentence(fill_template(template, self.rng, edited))
        return request, state.after_output(edited, output, attribute)

    def _request_audio(self, state: DialogueState) -> tuple[str, DialogueState]:
        """Request the object's sound: one note, unless the request names a count."""
        counted = self.rng.random() < 0.5
        obj = state.obj if counted else replace(state.obj, count=1)
        templates = COUNTED_AUDIO_REQUESTS if counted else AUDIO_REQUESTS
        known = state.known | {"count"} if counted else state.known - {"count"}
        request = fill_template(templates.sample(self.rng, self.split), self.rng, obj)
        return as_sentence(request), replace(state, obj=obj, known=known, last="audio")

    def _request_visual(self, state: DialogueState, output: Modality) -> tuple[str, DialogueState]:
        """Request an image or video of the object; often names attributes not known yet."""
        unknown = {"colour", "place"} - state.known
        details = sorted(unknown) if unknown and self.rng.random() < 0.6 else []
        request = VISUAL_REQUESTS[state.last, output].sample(self.rng, self.split)
        if details:
            slots = " ".join(f"{{{name}}}" for name in details)
            request = f"{request.rstrip('.')}, {slots.replace('{colour}', 'in {colour}')}."
        named = [*details, "motion"] if output == "video" else details
        request = as_sentence(fill_template(request, self.rng, state.obj))
        return request, state.after_output(state.obj, output, *named)


def _assistant_turn(answer: Answer, media_set: MediaSet) -> Turn:
    return {
        "from": "gpt",
        "value": " ".join(part if isinstance(part, str) else f"<{part[0]}>" for part in answer),
        "media": [
            {
                "modality": part[0],
                "name": media_set.answer_name(*part),
                "caption": part[1],
            }
            for part in answer
            if not isinstance(part, str)
        ],
    }


def _present(state: DialogueState, modality: Modality) -> Answer:
    """Answer with a lead-in that contains the caption, and the medium."""
    caption = canonical_caption(state.obj, modality, state.known, name_object=state.name_object)
    return as_sentence(f"{LEAD_INS[modality]} {caption}"), (modality, caption)
