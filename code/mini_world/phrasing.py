"""How people ask for pictures, videos and sounds, and how the assistant leads them in."""

from conversation.parts import Modality
from mini_world.words import Wording

# In words alone, naming everything.
OPENINGS: dict[Modality, Wording] = {
    "image": Wording(
        (
            "Show me a {size} {colour} {shape} {place}.",
            "Draw a {size} {colour} {shape} {place}.",
            "I want a picture of a {size} {colour} {shape} {place}.",
            "Make an image: {place}, a {size} {colour} {shape}.",
            "Could you paint a {colour} {shape}, {size}, {place}?",
            "Can I see a {size} {colour} {shape} {place}?",
            "Let me see a picture: a {colour} {shape}, {size}, {place}.",
            "Give me an image that shows a {size} {colour} {shape} {place}.",
            "Please draw a {size} and {colour} {shape} {place}.",
            "I would like a picture of a {colour} {shape} that is {size}, {place}.",
        ),
        (
            "Please create a picture with a {size} {colour} {shape} {place}.",
            "I would love to see a {colour} and {size} {shape} {place}.",
        ),
    ),
    "video": Wording(
        (
            "Show me a video of a {size} {colour} {shape} {place} {moving}.",
            "I want a video in which a {size} {colour} {shape} {place} {moves}.",
            "Make a video: {place}, a {size} {colour} {shape} {moves}.",
            "Film a {size} {colour} {shape} {place}, {moving}.",
            "A clip of a {colour} {shape}, {size}, {place}, that {moves}, please.",
            "Can I watch a {size} {colour} {shape} {place} {moving}?",
            "Let me see how a {size} {colour} {shape} {place} {moves}.",
            "Please film a {colour} {shape}, {size}, {place}, as it {moves}.",
            "I want to watch how a {size} {colour} {shape} {moves} {place}.",
            "Give me a video that shows a {size} and {colour} {shape} {place} {moving}.",
        ),
        (
            "Please create a video where a {size} {colour} {shape} {moves} {place}.",
            "I would love to watch a {colour} and {size} {shape} {place} as it {moves}.",
        ),
    ),
    "audio": Wording(
        (
            "Let me hear a {size} {shape} {count}.",
            "Play a {pitch} {timbre} {count}.",
            "Make the sound of a {size} {shape}, {count}.",
            "I want to hear a {pitch} {timbre} {count}.",
            "Please play the sound of a {pitch} {timbre}, {count}.",
            "Can I hear a {pitch} {timbre} {count}?",
            "Let me listen to a {size} {shape}, {count}.",
            "Give me the sound of a {pitch} {timbre}, {count}.",
            "How does a {size} {shape} sound {count}? Play it.",
            "I would like to hear a {pitch} {timbre}, {count}.",
        ),
        (
            "Create a sound: a {pitch} {timbre}, {count}.",
            "I would love to hear how a {size} {shape} sounds {count}.",
        ),
    ),
}

# Leaning on the last medium, which stays of its kind.
_COMMON = {
    "colour": Wording(
        (
            "The same in {colour}.",
            "Now make it {colour}.",
            "Make it {colour}, please.",
            "Can you show it in {colour}?",
            "I want it {colour}.",
            "Change it to {colour}.",
        ),
        ("I would like it {colour}.", "Change the colour to {colour}."),
    ),
    "size": Wording(
        (
            "The same, but {size}.",
            "Now make it {size}.",
            "Make it {size}, please.",
            "I want it {size}.",
            "Change it to a {size} one.",
        ),
        ("I would like it {size}.",),
    ),
    "place": Wording(
        (
            "The same, but {place}.",
            "Put it {place}.",
            "Now have it {place}, please.",
            "I want it {place}.",
        ),
        ("I would like it {place}.",),
    ),
    "shape": Wording(
        (
            "The same, but as a {shape}.",
            "Turn it into a {shape}.",
            "Now make it a {shape}.",
            "I want a {shape}.",
            "Change it into a {shape}.",
        ),
        ("I would like a {shape} instead.",),
    ),
}
EDITS: dict[Modality, dict[str, Wording]] = {
    "image": _COMMON,
    "video": _COMMON
    | {
        "motion": Wording(
            (
                "The same, but let it {move}.",
                "Now make it {move}.",
                "Let it {move} instead.",
                "I want it to {move}.",
            ),
            ("I would like it to {move}.",),
        )
    },
    "audio": {
        "size": Wording(
            (
                "The same, but {pitch}.",
                "Now make it {pitch}, please.",
                "The same sound, {pitch}.",
                "I want it {pitch}.",
            ),
            ("I would like it {pitch}.",),
        ),
        "count": Wording(
            (
                "The same, but {count}.",
                "Let me hear it {count}.",
                "Now {count}, please.",
                "I want to hear it {count}.",
            ),
            ("I would like to hear it {count}.",),
        ),
    },
}
REVERSE = Wording(
    (
        "The same, the other way.",
        "Now the other way round.",
        "Play it in reverse.",
        "Turn it around.",
        "Reverse it, please.",
    ),
    ("Turn the motion around.",),
)

HEAR = Wording(
    (
        "What does it sound like?",
        "Let me hear it.",
        "How does it sound? Play it.",
        "Play its sound, please.",
        "Can I hear it?",
        "I want to hear it.",
    ),
    ("Make me hear what this sounds like.",),
)
HEAR_COUNTED = Wording(
    (
        "Let me hear it {count}.",
        "Make it sound {count}.",
        "Play its sound {count}.",
        "I want to hear it {count}.",
    ),
    ("I would like to hear it {count}.",),
)

# (how it was last shown, what is wanted now)
SHOW: dict[tuple[Modality | None, Modality], Wording] = {
    (None, "image"): Wording(
        ("Show me a picture of it.", "Draw it.", "What does it look like?", "I want to see it."),
        ("Paint it.",),
    ),
    ("video", "image"): Wording(
        (
            "Show me a still picture of it.",
            "A picture of it, please.",
            "Draw it.",
            "I want one picture of it.",
        ),
        ("Give me a single frame of it.",),
    ),
    ("audio", "image"): Wording(
        (
            "Show me what made this sound.",
            "Draw what you hear.",
            "A picture of what makes this sound.",
            "Let me see what you hear.",
            "Draw the thing that sounds like this.",
        ),
        ("Paint the thing that is heard.",),
    ),
    (None, "video"): Wording(
        ("Show me a video of it {moving}.", "Film it, {moving}.", "I want to watch it {moving}."),
        ("A clip of it {moving}.",),
    ),
    ("image", "video"): Wording(
        (
            "Let it {move}.",
            "Make it {move}.",
            "Show me a video of it {moving}.",
            "I want to watch it {moving}.",
            "Film it so that it {moves}.",
        ),
        ("Animate it so that it {moves}.",),
    ),
    ("audio", "video"): Wording(
        (
            "Show what makes this sound, {moving}.",
            "A video of what made this sound, {moving}.",
            "Film the thing that sounds like this, {moving}.",
            "Let me watch what you hear, {moving}.",
        ),
        ("Animate the thing that is heard, {moving}.",),
    ),
}

# The course's four cases: several at once.
_WHAT_AND_SOUND = Wording(
    (
        "What is this, and what does it sound like?",
        "Describe it and let me hear it.",
        "Tell me what you see and play its sound.",
        "Tell me what it is, and let me hear it.",
        "What do you see? Play its sound, too.",
    ),
    ("Say what it is, then play how it sounds.",),
)
COURSE_REQUESTS: dict[str, Wording] = {
    "T+I→T+A": _WHAT_AND_SOUND,
    "T+V→T+A": _WHAT_AND_SOUND,
    "T+I→T+I+V": Wording(
        (
            "Make it {colour}, and then a video of it {moving}.",
            "Show it in {colour}, and also a video in which it {moves}.",
            "A picture of it in {colour} and a video of that {moving}, please.",
            "Draw it in {colour}, then film it {moving}.",
            "I want it in {colour}, and then a video in which it {moves}.",
        ),
        ("First paint it {colour}, then animate it so that it {moves}.",),
    ),
    "T→T+I+V+A": Wording(
        (
            "Show me a picture of a {size} {colour} {shape} {place}, a video of it {moving}, "
            "and let me hear it {count}.",
            "I want to see a {size} {colour} {shape} {place}, then how it {moves}, "
            "and hear it {count}.",
            "Draw a {size} {colour} {shape} {place}, film it {moving}, and play its sound {count}.",
            "Show me a {size} {colour} {shape} {place}, let me watch it {moving}, "
            "and let me hear it {count}.",
            "I want a picture, a video and the sound of a {size} {colour} {shape} {place} "
            "that {moves} and is heard {count}.",
        ),
        (
            "Create a picture, a video and a sound: a {size} {colour} {shape} {place} that {moves} "
            "and sounds {count}.",
        ),
    ),
}

# How a medium stands among the human's words: mostly before them.
VIEWED = (
    "{medium} {request}",
    "{medium} {request}",
    "{medium} {request}",
    "Here: {medium} {request}",
    "{request} {medium}",
)

# Before the caption of what comes.
LEADS: dict[Modality, str] = {
    "image": "Here is the picture:",
    "video": "Here is the video:",
    "audio": "It sounds like this:",
}
