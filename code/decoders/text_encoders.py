"""The decoders' text encoders: a caption's embedding is the target of an output projection.

Of a pipeline only these are loaded: 0.25 GB of Stable Diffusion's 2.1 GB in half precision. The
result equals the pipeline's own `encode_prompt`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import ClapTextModelWithProjection, CLIPTextModel, CLIPTokenizer, RobertaTokenizer

from nextgpt.common.json_io import to_json
from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.model.loading import explain_load_errors, load_pretrained, resolve_model_path

_FILES = (  # without these transformers would use an empty vocabulary or default sizes
    "tokenizer/tokenizer_config.json", "tokenizer/tokenizer.json|tokenizer/merges.txt",
    "text_encoder/config.json",
)  # fmt: skip
# Tokenizers of one vocabulary may differ in words, case, accents and punctuation.
_PROBE = "A Red-ish café's two  drums (3.5 s); 日本 — THE END!"


@dataclass(frozen=True)
class TextEncoderSpec:
    """A kind of text encoder: classes of transformers, and the embedding of a caption.

    Pooled: one projected vector of unit length (D,), as in AudioLDM (arXiv 2301.12503); else the
    last hidden states (T, D).
    """

    tokenizer: Any
    model: Any
    pooled: bool


CLIP = TextEncoderSpec(CLIPTokenizer, CLIPTextModel, pooled=False)
CLAP = TextEncoderSpec(RobertaTokenizer, ClapTextModelWithProjection, pooled=True)


class TextEncoder:
    """Tokenizer and text encoder of one pipeline, frozen."""

    def __init__(
        self, modality: Modality, path: str, device: torch.device, dtype: torch.dtype | None = None
    ) -> None:
        """Load both from a diffusers folder or hub name; `dtype` None: half precision on CUDA.

        On the meta device no weight is read, but names, shapes and the pipeline are checked.

        Raises:
            UserError: names the file that is missing or does not fit.
        """
        self.modality = modality
        self.path = resolve_model_path(path)
        adapter = MODALITIES[modality].decoder_class
        adapter.check_pipeline(self.path, modality)
        spec: TextEncoderSpec = adapter.text_encoder_spec
        self.pooled = spec.pooled
        dtype = dtype or (torch.float16 if device.type == "cuda" else torch.float32)
        with explain_load_errors(self.path, *_FILES):
            self.tokenizer = spec.tokenizer.from_pretrained(self.path, subfolder="tokenizer")
        on_meta = device.type == "meta"
        encoder = load_pretrained(spec.model, self.path, dtype, "text_encoder", on_meta=on_meta)
        self.encoder = encoder.to(device).eval().requires_grad_(False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one caption's embedding: (T, D), or (D,) if pooled."""
        if self.pooled:
            return (self.encoder.config.projection_dim,)
        return (self.tokenizer.model_max_length, self.encoder.config.hidden_size)

    def fingerprints(self) -> tuple[str, str]:
        """Return hex digests of weights (half precision) and tokenizer, whatever their files."""
        weights = sha256()
        for name, tensor in sorted(self.encoder.state_dict().items()):
            weights.update(name.encode())
            weights.update(tensor.to("cpu", torch.float16).contiguous().numpy().tobytes())
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        probe = self.tokenizer(_PROBE)["input_ids"]
        tokenizer = to_json([vocabulary, self.tokenizer.model_max_length, probe])
        return weights.hexdigest(), sha256(tokenizer.encode()).hexdigest()

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> Tensor:
        """Embed B captions, padded and truncated as in the pipelines: (B, T, D), pooled (B, D)."""
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        tokens = self.tokenizer(list(captions), **options).to(self.encoder.device)
        if self.pooled:
            projected_BD = self.encoder(tokens.input_ids, tokens.attention_mask).text_embeds
            return normalize(projected_BD, dim=-1)
        # No mask: Stable Diffusion and ZeroScope attend to the padding, and use its states.
        return self.encoder(tokens.input_ids).last_hidden_state

    def normalize(self, prompt_embeds: Tensor) -> Tensor:
        """Scale predicted embeddings (..., D) as `encode` does: pooled ones to unit length."""
        return normalize(prompt_embeds.float(), dim=-1) if self.pooled else prompt_embeds
