"""Tiny components on disk, selected by configuration overrides."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nextgpt.common.modality import Modality
from nextgpt.config.loader import load_config
from nextgpt.conversation.messages import Conversation, Text, Turn
from nextgpt.model.build import build_model, build_prompt_builder
from nextgpt.model.delta import DELTA_FILE, write_delta
from nextgpt.model.imagebind.encoder import ImageBind, ImageBindConfig, TrunkConfig
from nextgpt.model.imagebind.loading import save_imagebind
from nextgpt.model.nextgpt import NextGPT
from nextgpt.model.output_projection import OutputProjection
from nextgpt.model.trainable import tuned_parameters
from nextgpt.model.upstream_checkpoint import Tensors, delta_to_published
from parity_tools import PARITY, fill_by_recipe
from tiny_decoders import TINY, tiny_decoder
from tiny_system import TINY_OVERRIDES, tiny_model

TINY_IMAGEBIND = ImageBindConfig(
    vision=TrunkConfig(width=64, blocks=2, heads=4),
    audio=TrunkConfig(width=48, blocks=2, heads=4),
    output_dim=32,
)
_SHAPES: dict[Modality, tuple[int, ...]] = {
    "image": (TINY.text_tokens, TINY.text_width),
    "video": (TINY.text_tokens, TINY.text_width),
    "audio": (TINY.audio_embed_dim,),
}
_PROJECTION = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "heads": 2, "dim_feedforward": 32
}  # fmt: skip


def tiny_overrides(folder: Path) -> list[str]:
    """Return the overrides of config 7b for the components in `folder`."""
    lengths = {
        "image": {"height": TINY.image_size, "width": TINY.image_size},
        "video": {"height": TINY.image_size, "width": TINY.image_size, "num_frames": 3},
        "audio": {"audio_length_in_s": 0.025},
    }
    return [
        *TINY_OVERRIDES,
        f"save_path={folder / 'tuned'}",
        f"encoder.path={folder / 'imagebind'}",
        "training.precision=fp32",
        *(f"output_projection.{key}={value}" for key, value in _PROJECTION.items()),
        *(
            f"decoders.{modality}.{key}={value}"
            for modality, shape in _SHAPES.items()
            for key, value in {
                "path": tiny_decoder(modality),
                "prompt_embeds_shape": list(shape),
                "num_inference_steps": 2,
                **lengths[modality],
            }.items()
        ),
    ]


def write_tiny_components(folder: Path, favoured: Sequence[int] = ()) -> None:
    """Write the encoder and, to `folder`/tuned/stage_3, tuned parameters with LoRA.

    Args:
        favoured: new tokens, counted from the first, that the head is made to prefer.
    """
    imagebind = ImageBind(TINY_IMAGEBIND)
    fill_by_recipe(imagebind, "visual_encoder.")
    save_imagebind(imagebind, folder / "imagebind", torch.float32)
    write_tiny_delta(folder / "tuned" / "stage_3" / DELTA_FILE, favoured)


def write_tiny_delta(path: Path, favoured: Sequence[int] = ()) -> None:
    """Write the recorded tuned parameters with output projections for the tiny decoders."""
    model = tiny_model(lora=True)
    hidden = model.language_model.config.hidden_size
    torch.manual_seed(0)
    for modality, shape in _SHAPES.items():
        model.output_projections[modality] = OutputProjection(
            hidden, prompt_embeds_shape=shape, **_PROJECTION
        )
    favour(model, favoured)
    tensors = {n: p.detach() for n, p in tuned_parameters(model, base_vocabulary=False)}
    write_delta(tensors, model.base_vocabulary_size, path)


@torch.no_grad()
def favour(model: NextGPT, favoured: Sequence[int], strength: float = 25.0) -> None:
    """Scale the head's rows of the new tokens `favoured`, so that they are sampled often."""
    model.language_model.get_output_embeddings().new_rows[list(favoured)] *= strength


def script_language_model(
    folder: Path, answer: Sequence[int], *, endless: bool = False
) -> list[str]:
    """Write a language model that always generates the distinct ids `answer`; return overrides.

    Attention and feed-forward layers add nothing; the tokens of the prompt's end and of the answer
    have directions of their own, and the head leads from each to the next. The folder gets tuned
    parameters without LoRA.

    Args:
        endless: repeat the answer instead of its last token, which ends it.
    """
    overrides = [*tiny_overrides(folder), f"language_model.path={folder / 'scripted'}"]
    own = AutoModelForCausalLM.from_pretrained(PARITY / "llama_tiny")
    tokenizer = AutoTokenizer.from_pretrained(PARITY / "llama_tiny")
    own.save_pretrained(folder / "scripted")
    tokenizer.save_pretrained(folder / "scripted")
    config = load_config("7b", overrides=overrides)
    model = build_model(config, torch.float32, lora=False, output_projections=True)
    prompt = Conversation((Turn("human", (Text("a"),)),))
    chain = [build_prompt_builder(config).encode(prompt).input_ids[-1], *answer]
    assert len(set(chain)) == len(chain) <= own.config.hidden_size
    rows = own.config.vocab_size
    embedding = torch.zeros(rows + 38, own.config.hidden_size)
    head = embedding.clone()
    last = answer[0] if endless else answer[-1]
    for direction, (token, following) in enumerate(pairwise([*chain[:-1], last])):
        embedding[token, direction] = 1
        head[following, direction] = 9
    with torch.no_grad():
        own.get_input_embeddings().weight.copy_(embedding[:rows])
        own.get_output_embeddings().weight.copy_(head[:rows])
        own.model.norm.weight.fill_(1)
        for layer in own.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.language_model.get_input_embeddings().new_rows.copy_(embedding[rows:])
        model.language_model.get_output_embeddings().new_rows.copy_(head[rows:])
    own.save_pretrained(folder / "scripted")
    tensors = {n: p.detach() for n, p in tuned_parameters(model, base_vocabulary=False)}
    write_delta(tensors, rows, folder / "tuned" / "stage_3" / DELTA_FILE)
    return overrides


def model_to_published(model: NextGPT) -> Tensors:
    """The tuned tensors of `model` in the published layout."""
    tuned = tuned_parameters(model, base_vocabulary=True)
    return delta_to_published({name: p.detach() for name, p in tuned})
