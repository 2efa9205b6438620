"""Compares settings of the mini system's third stage by what is learned about things never shown.

    python benchmarks/stage_3_settings.py --init-from DELTA --steps 60 "" \
        "training.learning_rate=1e-3" "language_model.lora_targets=[q_proj,v_proj] training.seed=1"

Each argument is a variant: settings as `--set` of train.py takes them, parted by spaces; an empty
one is the configuration as it is. Each starts from the second stage's DELTA, trains on the mini
world's data, and then reads right answers to questions about media of held-out pairs in held-out
words. Printed are the loss per token of the answers about pictures, videos and sounds, and the
share of the answers whose tokens, but for the first two, are all the likeliest: the first two say
how it is worded, not what is seen. 60 steps take some 12 minutes on a core without bf16.
"""

import argparse
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent / "code"))

from chat.requests import human_turn
from config.entry import run_entry
from config.loader import load_config
from config.schema import Config
from conversation.encoding import IGNORE
from conversation.parts import MODALITIES, Conversation, Modality, Text, Turn
from dataset.media import load_views
from mini_world.album import Album, generator, write_medium
from mini_world.questions import ask
from model.build import build_conversation_encoder, build_media_encoder, build_model
from model.delta import load_delta, read_delta
from model.device import choose_device
from model.parts import PARTS
from training.loop import RunOptions, Trainer
from training.samples import ReadySample, collate

SEED, ASKED, AT_ONCE = 77, 120, 20  # questions about each modality, and read at once
_WORDING = 2  # tokens


@torch.no_grad()
def ask_held_out(config: Config, modality: Modality, folder: Path) -> list[ReadySample]:
    """Questions about things of held-out pairs in held-out words, with right answers."""
    device, encoder = choose_device(), build_conversation_encoder(config)
    sight = build_media_encoder(config).to(device)
    rng = generator(SEED, f"questions {modality}")
    samples = []
    for name, _, thing in Album("settings", SEED, {modality: ASKED}, split="held_out"):
        write_medium(folder / name, modality, thing, SEED)
        question, answer = ask(thing, modality, rng, split="held_out")
        turns = (
            human_turn(question, {modality: [folder / name]}),
            Turn("assistant", (Text(answer),)),
        )
        encoded = encoder.encode(Conversation(turns), config.data.max_length)
        views = load_views(modality, folder / name)[None].to(device)
        feature = sight.encode(modality, views)[0].float().cpu().numpy()
        samples.append(ReadySample(encoded, [feature], {}, []))
    return samples


@torch.no_grad()
def judge(trainer: Trainer, delta: Path, samples: list[ReadySample]) -> tuple[float, float]:
    """Loss per token and the share of right answers, in the run's precision."""
    model = build_model(trainer.config, trainer.dtype, lora=True, output_projections=True)
    load_delta(model, read_delta(delta), set(PARTS))
    model.to(trainer.device).eval()
    loss, tokens, right = 0.0, 0, 0
    for start in range(0, len(samples), AT_ONCE):
        some = samples[start : start + AT_ONCE]
        batch = collate(some, pad_id=0, feature_width=trainer.config.encoder.width).batch
        batch = batch.to(trainer.device)
        with trainer.autocast():
            embeddings = model.embed(batch.input_ids, batch.slots, batch.features)
            hidden_BLH = model.read(embeddings, batch.attention_mask)[:, :-1]
            logits_BLV = model.language_model.get_output_embeddings()(hidden_BLH).float()
        wanted_BL = batch.targets[:, 1:]
        told_BL = wanted_BL != IGNORE
        loss += float(F.cross_entropy(logits_BLV[told_BL], wanted_BL[told_BL], reduction="sum"))
        tokens += int(told_BL.sum())
        wrong_BL = told_BL & (told_BL.cumsum(dim=1) > _WORDING)
        wrong_BL &= logits_BLV.argmax(dim=-1) != wanted_BL
        right += int((~wrong_BL.any(dim=1)).sum())
    return loss / tokens, right / len(samples)


def main() -> None:
    """Arguments in, a row for each variant out."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("variants", nargs="+", metavar="SETTINGS")
    parser.add_argument("--init-from", type=Path, required=True, help="the second stage's delta")
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    with TemporaryDirectory() as name:
        folder = Path(name)
        asked = {m: ask_held_out(load_config("mini", 3), m, folder) for m in MODALITIES}
        for number, variant in enumerate(arguments.variants):
            sets = [f"save_path={folder / str(number)}", f"training.max_steps={arguments.steps}"]
            trainer = Trainer(
                load_config("mini", 3, sets + variant.split()),
                RunOptions(3, arguments.init_from.resolve()),
            )
            start = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - start
            delta = folder / str(number) / "stage_3"
            row = [
                f"{m} {loss:.3f} {right:.0%}"
                for m in MODALITIES
                for loss, right in [judge(trainer, delta, asked[m])]
            ]
            print(f"{variant or 'as it is'}: {', '.join(row)}; {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    run_entry(main)
