"""The mini world's judge on files instead of media in memory."""

from pathlib import Path

from nextgpt.common.modality import Modality
from nextgpt.mini_world.scoreboard.judge import Judgement, judge
from nextgpt.mini_world.scoreboard.samples import read_medium


def judge_file(modality: Modality, path: Path) -> Judgement:
    """Judge an image, video or audio file of any supported format.

    Raises:
        MediaError: the file is missing, broken or not of this modality.
    """
    return judge(modality, read_medium(modality, path))
