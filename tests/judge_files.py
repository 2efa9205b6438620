"""The mini world's judge on files instead of media in memory."""

from pathlib import Path

import numpy as np

from nextgpt.common.modality import Modality
from nextgpt.media.decoding import read_image, read_video_frames
from nextgpt.media.transforms import read_audio
from nextgpt.media.writing import Frames, Sound
from nextgpt.mini_world.render_audio import SAMPLE_RATE
from nextgpt.mini_world.scoreboard.judge import Judgement, judge


def judge_file(modality: Modality, path: Path) -> Judgement:
    """Judge an image, video or audio file of any supported format.

    Raises:
        MediaError: the file is missing, broken or not of this modality.
    """
    if modality == "image":
        return judge(modality, read_image(path))
    if modality == "video":
        frames = read_video_frames(path, lambda count, _: range(count))
        return judge(modality, Frames(np.stack(frames), 0))
    return judge(modality, Sound(read_audio(path, SAMPLE_RATE).numpy(), SAMPLE_RATE))
