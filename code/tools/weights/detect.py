"""Detect what a language model folder holds, by names, shapes, layer norms and `config.json`."""

from collections.abc import Mapping

from torch import Tensor
from transformers import PreTrainedConfig

from nextgpt.model.upstream_checkpoint import NEW_ROWS

LLAMA_ROWS = 32000
LLAMA_1_POSITIONS = 2048  # max_position_embeddings; LLaMA-2, and so Vicuna v1.5, has 4096
VOCABULARIES = {
    LLAMA_ROWS: "LLaMA's",
    LLAMA_ROWS + 1: "LLaMA's and a padding row, as in Vicuna v0",
    LLAMA_ROWS + NEW_ROWS: "LLaMA's and the new tokens of NExT-GPT 7b_tiva_v0",
    LLAMA_ROWS + NEW_ROWS + 4: "four more than with the new tokens of NExT-GPT 7b_tiva_v0: "
    "another generation of the published code",
}
# Layer-norm weights of a trained model average about 1, at least before the head; fine-tuning
# changes weights by hundredths: the largest mean magnitude separates models from deltas.
_MAX_DELTA_NORM = 0.2


def is_weight(name: str) -> bool:
    """Whether `name` is a weight; old files also hold a computed rotary table."""
    return not name.endswith("rotary_emb.inv_freq")


def max_norm_weight(tensors: Mapping[str, Tensor]) -> float:
    """Return the largest mean magnitude of the layer norms' weights; 1 without layer norms."""
    norms = [tensor for name, tensor in tensors.items() if name.endswith("norm.weight")]
    return max((tensor.float().abs().mean().item() for tensor in norms), default=1.0)


def is_unmerged_delta(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the tensors are a delta to be added to a base model, not weights."""
    return max_norm_weight(tensors) < _MAX_DELTA_NORM


def is_llama_1(config: PreTrainedConfig) -> bool:
    """Whether the config is of the LLaMA-1 family, to which Vicuna v0 belongs.

    Only the config differs: LLaMA-2 7B, and so Vicuna v1.5, has the same names and shapes.
    """
    return config.model_type == "llama" and config.max_position_embeddings <= LLAMA_1_POSITIONS


def describe_vocabulary(rows: int) -> str:
    """Format a vocabulary size, with its origin if known: `32001 rows: ...`."""
    return f"{rows} rows: {VOCABULARIES[rows]}" if rows in VOCABULARIES else f"{rows} rows"
