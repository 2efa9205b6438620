"""Questions with text answers: about a medium, or about the mini world in general."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from nextgpt.common.modality import Modality
from nextgpt.mini_world.captions import canonical_caption
from nextgpt.mini_world.objects import SHAPES, SIZES, Split, WorldObject
from nextgpt.mini_world.words import TemplateSet, as_sentence, choose, fill_template


@dataclass(frozen=True)
class Topic:
    """A topic of questions about a medium.

    Attributes:
        required: attributes of the object that must be known.
        questions: question templates.
        answers: answer templates; empty where the answer is a caption.
    """

    required: tuple[str, ...]
    questions: TemplateSet
    answers: tuple[str, ...]


_IMAGE_TOPICS = {
    "describe": Topic(
        required=("size", "shape"),
        questions=TemplateSet(
            (
                "What do you see?",
                "Describe it.",
                "What is shown here?",
                "Tell me what this is.",
                "Describe what there is.",
                "Say what you see.",
                "Describe in words what you see.",
                "Put what you see into a sentence.",
                "Give me a caption.",
                "Write down what is there.",
                "In words, what is there?",
                "Put what is there into a sentence.",
                "Say in words what is shown.",
                "A description, please.",
            ),
            ("Put into words what is there.", "Give me a description."),
            ("Tell me in a sentence what you see.", "What is there to see?"),
        ),
        answers=(),
    ),
    "shape": Topic(
        required=("shape",),
        questions=TemplateSet(
            (
                "What shape is it?",
                "Which shape do you see?",
                "What is its shape?",
                "Tell me its shape.",
                "Say which shape it is.",
                "Name its shape.",
                "The shape, please.",
                "Tell me the shape.",
                "Give me its shape.",
            ),
            ("Name the shape.",),
            ("Which shape has it?", "Say its shape."),
        ),
        answers=("It is a {shape}.", "A {shape}."),
    ),
    "colour": Topic(
        required=("colour",),
        questions=TemplateSet(
            (
                "What colour is it?",
                "Which colour does it have?",
                "What is its colour?",
                "Tell me its colour.",
                "Say which colour it has.",
                "Name its colour.",
                "The colour, please.",
                "Tell me the colour.",
                "Give me its colour.",
            ),
            ("Name the colour.",),
            ("Which colour is it?", "Say its colour."),
        ),
        answers=("It is {colour}.", "The colour is {colour}."),
    ),
    "size": Topic(
        required=("size",),
        questions=TemplateSet(
            (
                "How big is it?",
                "What size is it?",
                "Is it small or big?",
                "Tell me its size.",
                "Say how big it is.",
                "Name its size.",
                "The size, please.",
                "Tell me the size.",
                "Give me its size.",
            ),
            ("Name the size.",),
            ("Which size has it?", "Say its size."),
        ),
        answers=("It is {size}.",),
    ),
    "place": Topic(
        required=("place",),
        questions=TemplateSet(
            (
                "Where is it?",
                "Where do you see it?",
                "In which place is it?",
                "Tell me where it is.",
                "Say its place.",
                "Name its place.",
                "The place, please.",
                "Tell me the place.",
                "Give me its place.",
            ),
            ("Name the place.",),
            ("Say where it is.", "In which place do you see it?"),
        ),
        answers=("It is {place}.",),
    ),
    "sound": Topic(
        required=("shape", "size"),
        questions=TemplateSet(
            (
                "Say in words how it sounds.",
                "Which sound belongs to it? Only name it.",
                "Tell me in words what it sounds like.",
                "Which sound would it make? Answer in words.",
                "Only name its sound.",
                "Name its sound in words.",
                "Say which sound it would make.",
                "Name the sound that belongs to it.",
                "Tell me the name of its sound.",
            ),
            ("Name the sound that it would make.",),
            ("Which sound would belong to it? Say it in words.",),
        ),
        answers=("It sounds like a {pitch} {timbre}.",),
    ),
}
_MOTION_TOPIC = Topic(
    required=("motion",),
    questions=TemplateSet(
        (
            "What does it do?",
            "How does it change?",
            "What happens to it?",
            "Tell me what it does.",
            "Describe the motion.",
            "Name what it does.",
            "Which motion is it?",
            "Say how it moves or changes.",
            "Tell me the motion.",
            "Give me its motion.",
            "The motion, please.",
            "Name its motion.",
        ),
        ("Name the motion.",),
        ("Say what it does.", "Which motion do you see?"),
    ),
    answers=("It {moves}.",),
)
_AUDIO_TOPICS = {
    "describe": Topic(
        required=(),
        questions=TemplateSet(
            (
                "What do you hear?",
                "Describe this sound.",
                "Tell me what you hear.",
                "Describe what is to be heard.",
                "Say what you hear.",
                "Describe in words what you hear.",
                "Put what you hear into a sentence.",
                "Write down what is to be heard.",
                "In words, what is to be heard?",
                "Put what is to be heard into a sentence.",
                "Say in words what is heard.",
            ),
            ("Put into words what is to be heard.",),
            ("Tell me in a sentence what you hear.", "What is there to hear?"),
        ),
        answers=(),
    ),
    "timbre": Topic(
        required=(),
        questions=TemplateSet(
            (
                "Which instrument is it?",
                "What kind of sound is it?",
                "Tell me the instrument.",
                "Say which instrument it is.",
                "Name what is played.",
                "Only the instrument, please.",
                "Name what you hear played.",
                "Give me the instrument.",
            ),
            ("Name the instrument.",),
            ("Say the instrument.", "Which instrument do you hear?"),
        ),
        answers=("It is a {timbre}.", "A {timbre}."),
    ),
    "pitch": Topic(
        required=(),
        questions=TemplateSet(
            (
                "Is it high or low?",
                "How high is the sound?",
                "Tell me the pitch.",
                "Say how high it is.",
                "Name how high it is.",
                "Only the pitch, please.",
                "Say the pitch.",
                "Give me the pitch.",
                "Name its pitch.",
            ),
            ("Name the pitch.",),
            ("Is the sound high or low?", "Say how high the sound is."),
        ),
        answers=("It is {pitch}.",),
    ),
    "count": Topic(
        required=(),
        questions=TemplateSet(
            (
                "How many times does it sound?",
                "How often do you hear it?",
                "Tell me how often it sounds.",
                "Say how many sounds there are.",
                "How many sounds are there?",
                "Count how often it sounds.",
                "Give me the number of sounds.",
                "Count them.",
                "Count how many there are.",
                "Count the tones.",
                "How many are there?",
                "Name the number of sounds.",
            ),
            ("Count the sounds.",),
            ("How many sounds do you hear?", "Say how often you hear it."),
        ),
        answers=("It sounds {count}.",),
    ),
    "maker": Topic(
        required=(),
        questions=TemplateSet(
            (
                "What made this sound?",
                "Which thing sounds like this?",
                "Who makes this sound?",
                "Tell me which thing makes this sound.",
                "Say which thing you hear.",
                "Name the thing that sounds.",
                "Whose sound is this?",
                "Name what makes this sound.",
                "Name the thing that sounds like this.",
                "Name the thing that you hear.",
            ),
            ("Name the thing that is heard.",),
            ("Which thing makes this sound?", "Say which thing made this sound."),
        ),
        answers=("A {size} {shape}.", "It is a {size} {shape}."),
    ),
}
TOPICS: dict[Modality, dict[str, Topic]] = {
    "image": _IMAGE_TOPICS,
    "video": _IMAGE_TOPICS | {"motion": _MOTION_TOPIC},
    "audio": _AUDIO_TOPICS,
}
# Attributes that an answer names where they are not the topic itself; "describe" names all known
# ones. These topics take knowledge of the world: no medium shows which object makes which sound.
ANSWERED_ATTRIBUTES = {"sound": ("pitch", "timbre"), "maker": ("size", "shape")}


def sample_question(
    obj: WorldObject,
    modality: Modality,
    rng: np.random.Generator,
    known: Collection[str] | None = None,
    split: Split = "training",
    topic: str | None = None,
    describe_proportion: float = 0.4,
) -> tuple[str, str]:
    """Sample a question about a medium, with its answer.

    Args:
        known: known attributes of the object; None for all.
        split: split of the question templates.
        topic: a key of `TOPICS[modality]`; None samples one that can be answered. Those of
            `ANSWERED_ATTRIBUTES` have three times the weight of others.
        describe_proportion: probability of "describe" before all topics are sampled uniformly.
    """
    topics = TOPICS[modality]
    if topic is None:
        names = [n for n, t in topics.items() if known is None or set(t.required) <= set(known)]
        names += [name for name in names if name in ANSWERED_ATTRIBUTES] * 2
        describe = rng.random() < describe_proportion and "describe" in names
        topic = "describe" if describe else choose(rng, names)
    question = topics[topic].questions.sample(rng, split)
    if topic == "describe":
        return question, as_sentence(canonical_caption(obj, modality, known))
    return question, fill_template(choose(rng, topics[topic].answers), None, obj)


# Question and answer templates about the world, by topic.
WORLD_TOPICS: dict[str, tuple[TemplateSet, tuple[str, ...]]] = {
    "sound": (
        TemplateSet(
            (
                "What does a {size} {shape} sound like?",
                "How does a {size} {shape} sound?",
                "Tell me what a {size} {shape} sounds like.",
                "Which sound comes from a {size} {shape}? Answer in words.",
                "What sound is made by a {size} {shape}?",
                "Say which sound a {size} {shape} has.",
                "Which sound belongs to a {size} {shape}?",
                "Which sound is that of a {size} {shape}?",
                "Name the sound that a {size} {shape} makes.",
            ),
            ("Which sound does a {size} {shape} make?",),
            ("What is the sound of a {size} {shape}?", "Tell me the sound of a {size} {shape}."),
        ),
        ("It sounds like a {pitch} {timbre}.", "Like a {pitch} {timbre}."),
    ),
    "maker": (
        TemplateSet(
            (
                "Which thing sounds like a {pitch} {timbre}?",
                "What makes the sound of a {pitch} {timbre}?",
                "Which thing makes the sound of a {pitch} {timbre}?",
                "Who sounds like a {pitch} {timbre}?",
                "Whose noise is that of a {pitch} {timbre}?",
                "To which thing belongs the sound of a {pitch} {timbre}?",
                "A {pitch} {timbre} is the sound of which thing?",
                "Whose is the sound of a {pitch} {timbre}?",
                "Tell me whose sound a {pitch} {timbre} is.",
                "From which thing comes a {pitch} {timbre}?",
            ),
            ("Whose sound is a {pitch} {timbre}?",),
            (
                "Which thing has the sound of a {pitch} {timbre}?",
                "Name the thing that sounds like a {pitch} {timbre}.",
            ),
        ),
        ("A {size} {shape}.", "That is a {size} {shape}."),
    ),
    "shape": (
        TemplateSet(
            (
                "Which shape sounds like a {timbre}?",
                "Which shape makes the sound of a {timbre}?",
                "Which shape has the sound of a {timbre}?",
                "Which shape do you hear as a {timbre}?",
                "A {timbre} is the sound of which shape?",
                "Which shape is it that sounds like a {timbre}?",
                "When a {timbre} is heard, which shape is it?",
                "Which shape is that of a {timbre}?",
                "Tell me the shape that sounds like a {timbre}.",
            ),
            ("Which shape is heard as a {timbre}?",),
            ("Name the shape that sounds like a {timbre}.", "What shape sounds like a {timbre}?"),
        ),
        ("The {shape}.", "A {shape}."),
    ),
    "pitch": (
        TemplateSet(
            (
                "Is the sound of a {size} {shape} high or low?",
                "Does a {size} {shape} sound high or low?",
                "How high is the sound of a {size} {shape}?",
                "Is a {size} {shape} heard high or low?",
                "How high is a {size} {shape} heard?",
                "Say how high a {size} {shape} sounds.",
                "Tell me whether a {size} {shape} sounds high or low.",
            ),
            ("How high does a {size} {shape} sound?",),
            (
                "Tell me how high a {size} {shape} sounds.",
                "Is a {size} {shape} high or low in sound?",
            ),
        ),
        ("It is {pitch}.", "A {size} {shape} sounds {pitch}."),
    ),
}


def sample_world_question(
    obj: WorldObject,
    rng: np.random.Generator,
    split: Split = "training",
    topic: str | None = None,
) -> tuple[str, str]:
    """Sample a question about how objects sound, without a medium, with its answer.

    Args:
        split: split of the question templates.
        topic: a key of `WORLD_TOPICS`; None samples one.
    """
    questions, answers = WORLD_TOPICS[topic or choose(rng, list(WORLD_TOPICS))]
    question = as_sentence(fill_template(questions.sample(rng, split), rng, obj))
    return question, fill_template(choose(rng, answers), None, obj)


def world_facts() -> list[tuple[str, str]]:
    """Return all canonical training questions about the world, each with its first answer."""
    facts = {}
    for shape in SHAPES:
        for size in SIZES:
            obj = WorldObject(shape, "yellow", size, "middle", None, 1)
            for questions, answers in WORLD_TOPICS.values():
                for question in questions.training:
                    asked = fill_template(question, None, obj)
                    facts[asked] = fill_template(answers[0], None, obj)
    return list(facts.items())
