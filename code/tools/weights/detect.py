"""What a language model's folder holds, told from names, shapes, a few values and `config.json`."""

from collections.abc import Mapping

from torch import Tensor
from transformers import PreTrainedConfig

from nextgpt.model.upstream_checkpoint import NEW_ROWS

LLAMA_ROWS = 32000
LLAMA_1_POSITIONS = 2048  # max_position_embeddings; LLaMA-2, and so Vicuna v1.5, has 4096
VOCABULARIES = {
    LLAMA_ROWS: "LLaMA's own",
    LLAMA_ROWS + 1: "LLaMA's own and a row for padding, as Vicuna v0 has",
    LLAMA_ROWS + NEW_ROWS: "LLaMA's own and the new tokens of NExT-GPT 7b_tiva_v0",
    LLAMA_ROWS + NEW_ROWS + 4: "four more than with the new tokens of NExT-GPT 7b_tiva_v0: "
    "of another generation of the published code",
}
# The layer norms of a trained model scale by about 1 at least before its head, and fine-tuning
# moves a weight by hundredths: the largest of the norms' mean magnitudes tells the two apart.
_LARGEST_DIFFERENCE = 0.2


def is_weight(name: str) -> bool:
    """Whether a tensor called `name` is one: old files also hold a table computed from figures."""
    return not name.endswith("rotary_emb.inv_freq")


def norm_scale(tensors: Mapping[str, Tensor]) -> float:
    """The largest mean magnitude among the layer norms' weights; 1 where there are none."""
    norms = [tensor for name, tensor in tensors.items() if name.endswith("norm.weight")]
    return max((tensor.float().abs().mean().item() for tensor in norms), default=1.0)


def is_difference(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the tensors are a delta to be added to a model, and not the model's own weights."""
    return norm_scale(tensors) < _LARGEST_DIFFERENCE


def is_llama_1(figures: PreTrainedConfig) -> bool:
    """Whether `config.json` is that of LLaMA-1's family, to which Vicuna v0 belongs.

    It is all that says so: LLaMA-2 7B, and with it Vicuna v1.5, has the same names and shapes.
    """
    return figures.model_type == "llama" and figures.max_position_embeddings <= LLAMA_1_POSITIONS


def say_vocabulary(rows: int) -> str:
    """`32001 rows: ...`, with what is known of a vocabulary of that size."""
    return f"{rows} rows: {VOCABULARIES[rows]}" if rows in VOCABULARIES else f"{rows} rows"
