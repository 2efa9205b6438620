"""The judge: which thing of the mini world does a picture, a video or a sound show?

By rules alone, nothing is learned: what is seen and heard is compared with what the renderer draws
and plays. What is not there, or is none of the values, is None. On one core a picture costs 4 ms,
a video 20 ms, a sound 5 ms; the first of a kind half a second more, for the templates.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from nextgpt.common.modality import Modality
from nextgpt.media.decoding import read_image, read_video_frames
from nextgpt.media.transforms import read_audio
from nextgpt.media.writing import Frames, Output, Sound
from nextgpt.mini_world.objects import ATTRIBUTES, Value
from nextgpt.mini_world.render_audio import SAMPLE_RATE
from nextgpt.mini_world.scoreboard.judge_audio import judge_samples
from nextgpt.mini_world.scoreboard.judge_visual import judge_frames

Seen = dict[str, Value | None]  # attribute -> one of `things.VALUES`, None: nothing or undecidable


def judge(modality: Modality, medium: Output) -> Seen:
    """What a medium shows: for each of the modality's attributes its value, or None.

    Args:
        modality: of the attributes asked for, and of the medium.
        medium: a picture or frames of any size, the thing on a plain ground; frames are taken as
            evenly spaced over the whole video; or a mono sound.

    Raises:
        TypeError: the medium is of another modality.
    """
    if modality == "image" and isinstance(medium, Image.Image):
        seen = judge_frames(np.asarray(medium.convert("RGB"))[None])
    elif modality == "video" and isinstance(medium, Frames):
        seen = judge_frames(medium.frames)
    elif modality == "audio" and isinstance(medium, Sound):
        seen = judge_samples(medium.samples, medium.rate)
    else:
        raise TypeError(f"a medium of {modality} cannot be {type(medium).__name__}")
    return {name: seen[name] for name in ATTRIBUTES[modality]}


def judge_file(modality: Modality, path: Path) -> Seen:
    """What a file shows: as `judge`, of a picture, a video or a sound track in any known format.

    Raises:
        MediaError: the file is missing, broken or not of this modality.
    """
    if modality == "image":
        return judge(modality, read_image(path))
    if modality == "video":
        frames = read_video_frames(path, lambda count, _: range(count))
        return judge(modality, Frames(np.stack(frames), 0))
    return judge(modality, Sound(read_audio(path, SAMPLE_RATE).numpy(), SAMPLE_RATE))
