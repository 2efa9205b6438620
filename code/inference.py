"""Generate answers: text and media in, text to the terminal and media into a folder.

python inference.py --prompt "what does it sound like?" --image drum.png --out outputs/drum
python inference.py --prompt "and film it" --history outputs/drum/history.json --out outputs/drum
python inference.py --cases ../data/mini_world/examples/cases.json --out outputs/cases

Exit code 3: an answer to one of the cases lacks a medium that the file says it should have.
"""

import argparse
import sys
from pathlib import Path

from nextgpt.common.cli import NOT_AS_EXPECTED, run_cli
from nextgpt.common.modality import MODALITIES
from nextgpt.config.loader import add_config_arguments, load_config_from
from nextgpt.generation.history import read_history
from nextgpt.generation.requests import Request, human_turn, read_cases

# Upstream's names of some configuration keys.
PUBLISHED_FLAGS = {
    "top_p": "generation.top_p",
    "temperature": "generation.temperature",
    "max_new_tokens": "generation.max_new_tokens",
    "guidance_scale_for_img": "decoders.image.guidance_scale",
    "num_inference_steps_for_img": "decoders.image.num_inference_steps",
    "guidance_scale_for_vid": "decoders.video.guidance_scale",
    "num_inference_steps_for_vid": "decoders.video.num_inference_steps",
    "height": "decoders.video.height",
    "width": "decoders.video.width",
    "num_frames": "decoders.video.num_frames",
    "guidance_scale_for_aud": "decoders.audio.guidance_scale",
    "num_inference_steps_for_aud": "decoders.audio.num_inference_steps",
    "audio_length_in_s": "decoders.audio.audio_length_in_s",
}


def main() -> None:
    """Parse the arguments and answer."""
    parser = _parser()
    arguments = parser.parse_args()
    flags = [(key, getattr(arguments, flag)) for flag, key in PUBLISHED_FLAGS.items()]
    overrides = [f"{key}={value}" for key, value in flags if value is not None]
    config = load_config_from(arguments, overrides=overrides)
    media = {modality: getattr(arguments, modality) for modality in MODALITIES}
    if arguments.cases and (arguments.history or any(media.values())):
        parser.error("--cases has its own media: leave out --image, --video, --audio, --history")
    if arguments.cases:
        requests = read_cases(arguments.cases, arguments.out)
    else:
        history = read_history(arguments.history) if arguments.history else ()
        turn = human_turn(arguments.prompt, media)
        requests = [Request(arguments.prompt, history, turn, arguments.out)]
    # Imported late: `--help` and configuration errors need not wait for the libraries.
    from nextgpt.generation.cli import answer_requests

    if not answer_requests(config, arguments.nextgpt_ckpt_path, requests, arguments.seed):
        sys.exit(NOT_AS_EXPECTED)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="generate answers", allow_abbrev=False)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="the text; never parsed as a path")
    what.add_argument("--cases", type=Path, help="JSON file of several prompts with media")
    for modality in MODALITIES:
        parser.add_argument(
            f"--{modality}",
            type=Path,
            action="append",
            default=[],
            help=f"input {modality}; may be repeated",
        )
    parser.add_argument("--history", type=Path, help="history.json of the previous answer")
    parser.add_argument("--out", type=Path, required=True, help="folder for the answer's files")
    parser.add_argument("--seed", type=int, default=0, help="the same one gives the same answer")
    add_config_arguments(parser)
    parser.add_argument(
        "--nextgpt_ckpt_path", type=Path, help="tuned parameters; by default the last stage's"
    )
    for flag, key in PUBLISHED_FLAGS.items():
        parser.add_argument(f"--{flag}", help=f"short for --set {key}=")
    return parser


if __name__ == "__main__":
    run_cli(main)
