"""The decoders' own text encoders: from a caption to the embedding that a projection imitates.

Only the tokenizer and the text encoder of a pipeline are loaded: 0.25 GB of Stable Diffusion's
2.1 GB in half precision. What comes out equals the pipeline's own `encode_prompt`.
"""

from collections.abc import Sequence
from hashlib import sha256

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import ClapTextModelWithProjection, CLIPTextModel, CLIPTokenizer, RobertaTokenizer

from nextgpt.common.json_io import to_json
from nextgpt.common.modality import Modality
from nextgpt.model.pretrained_folder import (
    TEXT_FILES,
    check_kind,
    explain_load_errors,
    load_pretrained,
    resolve_model_name,
)

# Tells apart how tokenizers of one vocabulary split words and treat case, accents and punctuation.
_PROBE = "A Red-ish café's two  drums (3.5 s); 日本 — THE END!"


class TextEncoder:
    """Tokenizer and text encoder of one pipeline, frozen."""

    def __init__(
        self, modality: Modality, path: str, device: torch.device, dtype: torch.dtype | None = None
    ) -> None:
        """Load the two parts from a diffusers folder or hub name; `dtype` none: half on CUDA.

        On the meta device no weight is read: names, shapes and kind are checked all the same.

        Raises:
            InputError: naming the file that is missing or does not fit.
        """
        self.modality: Modality = modality
        self.path = resolve_model_name(path)
        check_kind(self.path, modality)
        dtype = dtype or (torch.float16 if device.type == "cuda" else torch.float32)
        audio = modality == "audio"
        tokenizer_class = RobertaTokenizer if audio else CLIPTokenizer
        encoder_class = ClapTextModelWithProjection if audio else CLIPTextModel
        with explain_load_errors(self.path, *TEXT_FILES):
            self.tokenizer = tokenizer_class.from_pretrained(self.path, subfolder="tokenizer")
        on_meta = device.type == "meta"
        encoder = load_pretrained(encoder_class, self.path, dtype, "text_encoder", on_meta=on_meta)
        self.encoder = encoder.to(device).eval().requires_grad_(False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one caption's embedding: (T, D) tokens and width, or (D,) for sound."""
        if self.modality == "audio":
            return (self.encoder.config.projection_dim,)
        return (self.tokenizer.model_max_length, self.encoder.config.hidden_size)

    def fingerprints(self) -> tuple[str, str]:
        """Hex digests of the text encoder's weights in half precision, and of the tokenizer.

        Neither depends on the path, nor on the format of the files.
        """
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
        """Embed B captions as the pipelines do: padded, and cut, to the tokenizer's length.

        Returns:
            image, video: CLIP's last hidden state (B, T, D); audio: CLAP's text projection brought
            to unit length (B, D), as AudioLDM (arXiv 2301.12503) takes it. In the encoder's dtype.
        """
        tokens = self.tokenizer(
            list(captions),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).to(self.encoder.device)
        if self.modality == "audio":
            projected_BD = self.encoder(tokens.input_ids, tokens.attention_mask).text_embeds
            return normalize(projected_BD, dim=-1)
        # No mask: Stable Diffusion and ZeroScope let the padding be seen, and use its states.
        return self.encoder(tokens.input_ids).last_hidden_state
