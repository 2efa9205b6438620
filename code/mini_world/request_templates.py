"""Templates of requests for images, videos and sounds, and lead-ins of the answers."""

from collections.abc import Sequence
from itertools import product

from nextgpt.common.modality import Modality
from nextgpt.mini_world.words import TemplateSet

# Without a medium, naming all attributes.
OPENING_REQUESTS: dict[Modality, TemplateSet] = {
    "image": TemplateSet(
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
            "Create an image of a {size} {colour} {shape} {place}.",
            "Make a picture with a {colour} and {size} {shape} {place}, please.",
            "I should like to see a {size} {shape} {place}, in {colour}.",
            "I would be glad to see a {colour} {shape} {place}, a {size} one.",
            "It would be nice to see a {size} {colour} {shape} {place}.",
        ),
        (
            "Please create a picture with a {size} {colour} {shape} {place}.",
            "I would love to see a {colour} and {size} {shape} {place}.",
        ),
        (
            "Could you draw a {size} {colour} {shape} {place}?",
            "Let me see an image of a {colour} {shape}, {size}, {place}.",
        ),
    ),
    "video": TemplateSet(
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
            "Create a clip of a {size} {colour} {shape} {place} that {moves}.",
            "Make a video with a {colour} and {size} {shape} {place} as it {moves}, please.",
            "I should like to watch a {size} {shape} {place}, in {colour}, {moving}.",
            "I would be glad to watch a {size} {colour} {shape} {place} as it {moves}.",
            "It would be nice to watch a {size} {colour} {shape} {place} {moving}.",
        ),
        (
            "Please create a video where a {size} {colour} {shape} {moves} {place}.",
            "I would love to watch a {colour} and {size} {shape} {place} as it {moves}.",
        ),
        (
            "Could you film a {size} {colour} {shape} {place} that {moves}?",
            "Let me watch a video: a {size} {colour} {shape} {place}, {moving}.",
        ),
    ),
    "audio": TemplateSet(
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
            "Make a {pitch} {timbre} sound {count}, please.",
            "I should like to hear the sound that a {size} {shape} makes, {count}.",
            "Play me what a {size} {shape} sounds like, {count}.",
            "I want to hear how a {size} {shape} sounds, {count}.",
            "Let me hear how a {size} {shape} sounds {count}.",
            "I would be glad to hear a {pitch} {timbre} {count}.",
            "It would be nice to hear a {size} {shape} {count}.",
        ),
        (
            "Create a sound: a {pitch} {timbre}, {count}.",
            "I would love to hear how a {size} {shape} sounds {count}.",
        ),
        (
            "Could you play a {pitch} {timbre} {count}?",
            "Please let me hear the sound of a {size} {shape}, {count}.",
        ),
    ),
}

# Edits of the last medium, which keep its modality, by the edited attribute.
_VISUAL_EDITS = {
    "colour": TemplateSet(
        (
            "The same in {colour}.",
            "Now make it {colour}.",
            "Make it {colour}, please.",
            "Can you show it in {colour}?",
            "I want it {colour}.",
            "Change it to {colour}.",
            "Colour it {colour}.",
            "Give it the colour {colour}.",
            "Could it be {colour}?",
            "I prefer it {colour}.",
            "Turn it {colour}.",
            "Let it be {colour} now.",
            "Change its colour, make it {colour}.",
            "I would like to have it {colour}.",
            "I would prefer it {colour}.",
        ),
        ("I would like it {colour}.", "Change the colour to {colour}."),
        ("Please make it {colour}.", "Show me the same in {colour}."),
    ),
    "size": TemplateSet(
        (
            "The same, but {size}.",
            "Now make it {size}.",
            "Make it {size}, please.",
            "I want it {size}.",
            "Change it to a {size} one.",
            "Could it be {size}?",
            "I prefer it {size}.",
            "Let it be {size} now.",
            "Change its size, make it {size}.",
            "I should like a {size} one.",
            "Rather {size}, please.",
            "I would like to have it {size}.",
            "I would prefer it {size}.",
        ),
        ("I would like it {size}.",),
        ("Please make it {size}.", "Show me a {size} one."),
    ),
    "place": TemplateSet(
        (
            "The same, but {place}.",
            "Put it {place}.",
            "Now have it {place}, please.",
            "I want it {place}.",
            "Could it be {place}?",
            "I prefer it {place}.",
            "Let it be {place} now.",
            "Change its place, have it {place}.",
            "I should like to have it {place}.",
            "Rather {place}, please.",
            "Show it {place}.",
            "I would like to have it {place}.",
            "I would prefer it {place}.",
        ),
        ("I would like it {place}.",),
        ("Please put it {place}.", "Show me the same {place}."),
    ),
    "shape": TemplateSet(
        (
            "The same, but as a {shape}.",
            "Turn it into a {shape}.",
            "Now make it a {shape}.",
            "I want a {shape}.",
            "Change it into a {shape}.",
            "Could it be a {shape}?",
            "I prefer a {shape}.",
            "Let it be a {shape} now.",
            "Change its shape, make it a {shape}.",
            "I should like to have a {shape}.",
            "Rather a {shape}, please.",
            "Replace it by a {shape}.",
        ),
        ("I would like a {shape} instead.",),
        ("Please turn it into a {shape}.", "Show me a {shape} instead."),
    ),
}
EDIT_REQUESTS: dict[Modality, dict[str, TemplateSet]] = {
    "image": _VISUAL_EDITS,
    "video": _VISUAL_EDITS
    | {
        "motion": TemplateSet(
            (
                "The same, but let it {move}.",
                "Now make it {move}.",
                "Let it {move} instead.",
                "I want it to {move}.",
                "Could it {move}?",
                "I prefer that it {moves}.",
                "Change the motion: let it {move}.",
                "I should like it to {move}.",
                "This time it {moves}.",
                "Show it {moving}.",
                "I would like to have it {moving}.",
                "I would prefer that it {moves}.",
            ),
            ("I would like it to {move}.",),
            ("Please let it {move}.", "Show me the same, but {moving}."),
        )
    },
    "audio": {
        "size": TemplateSet(
            (
                "The same, but {pitch}.",
                "Now make it {pitch}, please.",
                "The same sound, {pitch}.",
                "I want it {pitch}.",
                "Could it be {pitch}?",
                "I prefer it {pitch}.",
                "Change its pitch, make it {pitch}.",
                "I should like it to be {pitch}.",
                "Rather {pitch}, please.",
                "I would like to have it {pitch}.",
            ),
            ("I would like it {pitch}.",),
            ("Please make it {pitch}.", "Please let me hear it {pitch}."),
        ),
        "count": TemplateSet(
            (
                "The same, but {count}.",
                "Let me hear it {count}.",
                "Now {count}, please.",
                "I want to hear it {count}.",
                "Could it sound {count}?",
                "Play it {count}.",
                "I should like it {count}.",
                "Rather {count}, please.",
            ),
            ("I would like to hear it {count}.",),
            ("Please play it {count}.", "Make it sound {count} now."),
        ),
    },
}
REVERSE_REQUESTS = TemplateSet(
    (
        "The same, the other way.",
        "Now the other way round.",
        "Play it in reverse.",
        "Turn it around.",
        "Reverse it, please.",
        "Reverse the motion.",
        "Let it go the other way.",
        "The opposite motion, please.",
        "Change the direction.",
        "Do the motion backwards.",
        "I want to see it the other way round.",
        "The motion the other way, please.",
        "Make it do the opposite.",
        "Turn the motion into its opposite.",
        "Let the motion go the other way around.",
        "Have the motion the other way around, please.",
        "Turn around what it does.",
        "Turn its direction around.",
        "Let the motion turn around.",
        "Turn its way around, please.",
        "I want the motion turned around.",
        "It should turn around.",
    ),
    ("Turn the motion around.",),
    ("Please play it the other way.", "Make the motion go the other way."),
)

AUDIO_REQUESTS = TemplateSet(
    (
        "What does it sound like?",
        "Let me hear it.",
        "How does it sound? Play it.",
        "Play its sound, please.",
        "Can I hear it?",
        "I want to hear it.",
        "Make its sound.",
        "Make me hear it.",
        "Let me listen to what it sounds like.",
        "Play what this sounds like.",
        "I should like to hear this.",
    ),
    ("Make me hear what this sounds like.",),
    ("Please play its sound.", "Let me hear what it sounds like."),
)
COUNTED_AUDIO_REQUESTS = TemplateSet(
    (
        "Let me hear it {count}.",
        "Make it sound {count}.",
        "Play its sound {count}.",
        "I want to hear it {count}.",
        "Let it sound {count}.",
        "Make me hear it {count}.",
        "I should like to hear its sound {count}.",
        "Can I hear it {count}?",
    ),
    ("I would like to hear it {count}.",),
    ("Please let it sound {count}.", "Let me listen to it {count}."),
)

# By the last modality (None: nothing shown yet) and the requested one.
VISUAL_REQUESTS: dict[tuple[Modality | None, Modality], TemplateSet] = {
    (None, "image"): TemplateSet(
        (
            "Show me a picture of it.",
            "Draw it.",
            "What does it look like?",
            "I want to see it.",
            "Paint a picture of it.",
            "Make an image of it.",
        ),
        ("Paint it.",),
        ("Show it to me.", "Please paint it for me."),
    ),
    ("video", "image"): TemplateSet(
        (
            "Show me a still picture of it.",
            "A picture of it, please.",
            "Draw it.",
            "I want one picture of it.",
            "Give me a picture of it.",
            "Show me one frame of it.",
            "A single image of it, please.",
            "Paint it, as it is.",
            "I should like a still image of it.",
            "Give me one image out of it.",
        ),
        ("Give me a single frame of it.",),
        ("Please show me a single picture of it.", "Draw one still image of it."),
    ),
    ("audio", "image"): TemplateSet(
        (
            "Show me what made this sound.",
            "Draw what you hear.",
            "A picture of what makes this sound.",
            "Let me see what you hear.",
            "Draw the thing that sounds like this.",
            "Paint what you hear.",
            "Paint what made this sound.",
            "A picture of what is heard, please.",
            "Make an image of what you hear.",
            "I want to see a picture of what makes this sound.",
            "Draw the thing that you hear.",
            "Give me an image of the thing that sounds.",
        ),
        ("Paint the thing that is heard.",),
        ("Please draw what makes this sound.", "Show me a picture of what you hear."),
    ),
    (None, "video"): TemplateSet(
        (
            "Show me a video of it {moving}.",
            "Film it, {moving}.",
            "I want to watch it {moving}.",
            "Make a video of it {moving}.",
            "Let me watch it {moving}.",
            "Give me a clip in which it {moves}.",
        ),
        ("A clip of it {moving}.",),
        ("Please make a video of it {moving}.", "Let me see it {moving}."),
    ),
    ("image", "video"): TemplateSet(
        (
            "Let it {move}.",
            "Make it {move}.",
            "Show me a video of it {moving}.",
            "I want to watch it {moving}.",
            "Film it so that it {moves}.",
            "Animate it, {moving}.",
            "Bring it to life: it {moves}.",
            "Make a clip in which it {moves}.",
            "Let me see how it {moves}.",
            "Turn it into a video in which it {moves}.",
            "I should like a video of it {moving}.",
        ),
        ("Animate it so that it {moves}.",),
        ("Please make a video in which it {moves}.", "Show me how it {moves}."),
    ),
    ("audio", "video"): TemplateSet(
        (
            "Show what makes this sound, {moving}.",
            "A video of what made this sound, {moving}.",
            "Film the thing that sounds like this, {moving}.",
            "Let me watch what you hear, {moving}.",
            "Animate what you hear, {moving}.",
            "Film what made this sound, {moving}.",
            "A clip of what is heard, {moving}, please.",
            "Make a video of what you hear, {moving}.",
            "I want to watch what makes this sound, {moving}.",
            "Animate what sounds like this, {moving}.",
            "Give me a video of the thing that sounds, {moving}.",
        ),
        ("Animate the thing that is heard, {moving}.",),
        (
            "Please film what you hear, {moving}.",
            "Show me a video of what makes this sound, {moving}.",
        ),
    ),
}

# The course's four cases request several outputs at once; their requests are combined from parts.
_DESCRIBE = (
    "describe it",
    "tell me what you see",
    "tell me what it is",
    "say what this is",
    "say in words what you see",
    "name what is shown",
)
_PLAY = (
    "let me hear it",
    "play its sound",
    "play what it sounds like",
    "let me listen to it",
    "make the sound of it",
    "let me hear how it sounds",
)
_QUESTIONS = ("what is this", "what do you see", "what is shown here")
_SOUND_QUESTIONS = ("what does it sound like", "how does it sound", "what would it sound like")
_RECOLOUR = (
    "make it {colour}",
    "show it in {colour}",
    "draw it in {colour}",
    "turn it {colour}",
    "colour it {colour}",
    "give me a picture of it in {colour}",
    "paint a {colour} one",
)
_FILM = (
    "film it {moving}",
    "make a video of it {moving}",
    "show me a video in which it {moves}",
    "let it {move}",
    "show how it {moves}",
    "make a clip in which it {moves}",
    "animate it, {moving}",
)
_SEQUENCES = (
    "{first}, then {second}.",
    "{first}, and then {second}.",
    "{first}. Then {second}.",
    "{first}, and {second}, too.",
    "{first}, and also {second}.",
    "first {first}, then {second}.",
    "first {first}, and after that {second}.",
)


def _sequences(first: Sequence[str], second: Sequence[str]) -> tuple[str, ...]:
    """Combine every first request with every second one."""
    return tuple(
        template.replace("{first}", one).replace("{second}", other)
        for template, one, other in product(_SEQUENCES, first, second)
    )


_DESCRIBE_AND_PLAY = TemplateSet(
    (
        *_sequences(_DESCRIBE, _PLAY),
        *(f"{ask}? {play.capitalize()}." for ask, play in product(_QUESTIONS, _PLAY)),
        *(f"{ask}, and {ask_sound}?" for ask, ask_sound in product(_QUESTIONS, _SOUND_QUESTIONS)),
    ),
    ("Say what it is, then play how it sounds.",),
    ("Tell me what it is and let me hear its sound.", "What is it? Let me hear how it sounds."),
)
# Image, video and sound of one object, requested in turn or as one list.
_DRAW_OBJECT = tuple(
    f"{ask} a {{size}} {{colour}} {{shape}} {{place}}"
    for ask in ("draw", "show me", "I want to see", "make an image of")
)
_FILM_IT = ("film it {moving}", "make a video of it {moving}", "show me how it {moves}")
_PLAY_IT = ("play its sound {count}", "let me hear it {count}")
_THREE_STEPS = (
    "{0}, {1}, and {2}.",
    "first {0}, then {1}, then {2}.",
    "{0}. Then {1}, and after that {2}.",
)
_OUTPUT_LISTS = (
    "picture, video and sound, please",
    "a picture, a video and a sound, please",
    "I want a picture, a video and the sound",
    "I would like picture, video and sound",
    "give me an image, a clip and a sound",
    "give me a picture and a video, and the sound, too",
    "a picture, a video and the sound of it",
    "make an image, a video and its sound",
    "show me a picture and a clip, and let me hear the sound",
    "draw it, film it, and play its sound",
)
_OBJECT_DESCRIPTIONS = (
    "a {size} {colour} {shape} {place} that {moves} and sounds {count}",
    "a {size} {colour} {shape} {place}, {moving}, heard {count}",
    "a {colour} {shape}, {size}, {place}, that {moves} and is heard {count}",
    "a {size} {colour} {shape} {place}, it {moves} and sounds {count}",
)
_THREE_OUTPUTS = (
    *(
        turns.replace("{0}", draw).replace("{1}", film).replace("{2}", play)
        for turns, draw, film, play in product(_THREE_STEPS, _DRAW_OBJECT, _FILM_IT, _PLAY_IT)
    ),
    *(f"{outputs}: {obj}." for outputs, obj in product(_OUTPUT_LISTS, _OBJECT_DESCRIPTIONS)),
)
COURSE_REQUESTS: dict[str, TemplateSet] = {
    "T+I→T+A": _DESCRIBE_AND_PLAY,
    "T+V→T+A": _DESCRIBE_AND_PLAY,
    "T+I→T+I+V": TemplateSet(
        _sequences(_RECOLOUR, _FILM),
        ("First paint it {colour}, then animate it so that it {moves}.",),
        (
            "Please draw it in {colour} and make a video of it {moving}.",
            "Show me a {colour} one and let me watch it {moving}.",
        ),
    ),
    "T→T+I+V+A": TemplateSet(
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
            "Picture, video and sound, please: a {size} {colour} {shape} {place} that {moves}, "
            "heard {count}.",
            "First draw a {size} {colour} {shape} {place}, then make a video of it {moving}, "
            "then play its sound {count}.",
            "Make a picture, a clip and the sound of a {colour} {shape}, {size}, {place}, "
            "that {moves} and sounds {count}.",
            *_THREE_OUTPUTS,
        ),
        (
            "Create a picture, a video and a sound: a {size} {colour} {shape} {place} that {moves} "
            "and sounds {count}.",
        ),
        (
            "Please draw a {size} {colour} {shape} {place}, make a clip of it {moving}, "
            "and let me hear it {count}.",
            "Let me see a {size} {colour} {shape} {place}, watch it {moving}, and hear it {count}.",
        ),
    ),
}

# Position of a medium in the human's turn: mostly before the text.
MEDIUM_LAYOUTS = (
    "{medium} {request}",
    "{medium} {request}",
    "{medium} {request}",
    "Here: {medium} {request}",
    "{request} {medium}",
)

# Precede the caption of the medium in an answer.
LEAD_INS: dict[Modality, str] = {
    "image": "Here is the picture:",
    "video": "Here is the video:",
    "audio": "It sounds like this:",
}
