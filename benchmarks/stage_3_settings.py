"""Compares settings of the mini system's third stage by what is learned about things never shown.

    python benchmarks/stage_3_settings.py --init-from DELTA --steps 60 "" \
        "training.learning_rate=1e-3" \
        "language_model.lora_target_modules=[q_proj,v_proj] training.seed=1"

Each argument is a variant: settings as `--set` of train.py takes them, parted by spaces; an empty
one is the configuration as it is. Each starts from the second stage's DELTA, trains on the mini
world's data, and then reads right answers to questions about media of held-out pairs in held-out
words. Printed are the loss per token of the answers about pictures, videos and sounds, and the
share of the answers whose tokens, but for the first two, are all the likeliest: the first two say
how it is worded, not what is seen. 60 steps take 6 minutes on a Zen 3 core, which has no bf16.
"""

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F

from nextgpt.callbacks import build_callbacks
from nextgpt.common.cli import run_cli
from nextgpt.common.device import autocast_to, choose_device
from nextgpt.common.distributed import init_process_group
from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.common.paths import project_path
from nextgpt.config.loader import load_config
from nextgpt.config.schema import Config
from nextgpt.conversation.batch import Example, collate
from nextgpt.conversation.messages import Conversation, Text, Turn
from nextgpt.conversation.prompt import IGNORE_INDEX
from nextgpt.generation.requests import human_turn
from nextgpt.media.transforms import load_views
from nextgpt.mini_world.media_set import MediaSet, seeded_rng, write_medium
from nextgpt.mini_world.questions import sample_question
from nextgpt.model.build import build_media_encoder, build_model, build_prompt_builder
from nextgpt.model.delta import load_delta, read_delta
from nextgpt.model.nextgpt import NextGPT
from nextgpt.model.trainable import TRAINABLE_GROUPS
from nextgpt.training.trainer import RunOptions, Trainer

SEED, ASKED, AT_ONCE = 77, 120, 20  # questions about each modality, and read at once
_WORDING = 2  # tokens


@torch.no_grad()
def ask_validation(config: Config, folder: Path) -> dict[Modality, list[Example]]:
    """Questions about things of held-out pairs in held-out words, with right answers."""
    device, encoder = choose_device(), build_prompt_builder(config)
    imagebind = build_media_encoder(config).to(device)
    album = MediaSet("settings", SEED, dict.fromkeys(MODALITIES, ASKED), split="validation")
    rng = seeded_rng(SEED, "questions")
    asked: dict[Modality, list[Example]] = {modality: [] for modality in MODALITIES}
    for name, modality, thing in album:
        write_medium(folder / name, modality, thing, SEED)
        question, answer = sample_question(thing, modality, rng, split="validation")
        turns = (
            human_turn(question, {modality: [folder / name]}),
            Turn("assistant", (Text(answer),)),
        )
        encoded = encoder.encode(Conversation(turns), config.data.max_seq_length)
        views = load_views(modality, folder / name)[None].to(device)
        feature_E = imagebind.encode(modality, views)[0].float().cpu()
        asked[modality].append(Example(encoded, [feature_E], []))
    return asked


@torch.no_grad()
def judge(trainer: Trainer, model: NextGPT, samples: list[Example]) -> tuple[float, float]:
    """Loss per token and the share of right answers, in the run's precision."""
    loss, tokens, right = 0.0, 0, 0
    for start in range(0, len(samples), AT_ONCE):
        some = samples[start : start + AT_ONCE]
        batch = collate(some, pad_id=0, feature_width=trainer.config.encoder.width)
        batch = batch.to(trainer.device)
        wanted_BL = batch.labels[:, 1:]
        told_BL = wanted_BL != IGNORE_INDEX
        with autocast_to(trainer.dtype, trainer.device):
            embeddings = model.embed(batch.input_ids, batch.media_positions, batch.features)
            hidden_BLH = model.last_hidden_states(embeddings, batch.attention_mask)[:, :-1]
            logits_NV = model.language_model.get_output_embeddings()(hidden_BLH[told_BL]).float()
        wanted_N = wanted_BL[told_BL]
        loss += float(F.cross_entropy(logits_NV, wanted_N, reduction="sum"))
        tokens += len(wanted_N)
        wrong_BL = told_BL.masked_scatter(told_BL, logits_NV.argmax(dim=-1) != wanted_N)
        wrong_BL &= told_BL.cumsum(dim=1) > _WORDING
        right += int((~wrong_BL.any(dim=1)).sum())
    return loss / tokens, right / len(samples)


def try_settings(settings: list[str], init_from: Path, asked: dict[Modality, list[Example]]) -> str:
    """Train with `settings`; what came of it, in words."""
    config = load_config("mini", 3, settings)
    trainer = Trainer(config, RunOptions(3, init_from), build_callbacks(config))
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    model = build_model(trainer.config, trainer.dtype, lora=True, output_projections=True)
    delta = read_delta(project_path(trainer.config.save_path) / "stage_3")
    load_delta(model, delta, set(TRAINABLE_GROUPS))
    model.to(trainer.device).eval()
    found = []
    for modality, samples in asked.items():
        loss, right = judge(trainer, model, samples)
        found.append(f"{modality} {loss:.3f} {right:.0%}")
    return f"{', '.join(found)}; {seconds:.0f} s"


def main() -> None:
    """Arguments in, a row for each variant out."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("variants", nargs="+", metavar="SETTINGS")
    parser.add_argument("--init-from", type=Path, required=True, help="the second stage's delta")
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    init_process_group(choose_device())
    with TemporaryDirectory() as folder:
        asked = ask_validation(load_config("mini", 3), Path(folder))
        for number, variant in enumerate(arguments.variants):
            own = [f"save_path={folder}/{number}", f"training.max_steps={arguments.steps}"]
            came = try_settings([*own, *variant.split()], arguments.init_from.resolve(), asked)
            print(f"{variant or 'as it is'}: {came}", flush=True)


if __name__ == "__main__":
    run_cli(main)
