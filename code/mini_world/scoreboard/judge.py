"""The judge: recognize the object of the mini world that an image, video or audio clip shows.

Rule-based, without learned parameters: media are matched with the renderer's templates. An
attribute that is absent or matches no value is None. On one core an image costs 4 ms, a video
20 ms, an audio clip 5 ms; the first of a modality 0.5 s more, for the templates.
"""

import numpy as np
from PIL import Image

from nextgpt.common.modality import Modality
from nextgpt.media.writing import Frames, Output, Sound
from nextgpt.mini_world.objects import ATTRIBUTES, Value
from nextgpt.mini_world.scoreboard.judge_audio import judge_samples
from nextgpt.mini_world.scoreboard.judge_visual import judge_frames

Judgement = dict[str, Value | None]  # attribute -> value; None: absent or undecidable


def judge(modality: Modality, medium: Output) -> Judgement:
    """Judge a medium: return the value, or None, of each attribute of its modality.

    Args:
        medium: an image or frames of any size, one object on a plain background, frames evenly
            spaced over the video; or mono audio.

    Raises:
        TypeError: the medium is not of `modality`.
    """
    if modality == "image" and isinstance(medium, Image.Image):
        judged = judge_frames(np.asarray(medium.convert("RGB"))[None])
    elif modality == "video" and isinstance(medium, Frames):
        judged = judge_frames(medium.frames)
    elif modality == "audio" and isinstance(medium, Sound):
        judged = judge_samples(medium.samples, medium.rate)
    else:
        raise TypeError(f"a medium of {modality} cannot be {type(medium).__name__}")
    return {name: judged[name] for name in ATTRIBUTES[modality]}
