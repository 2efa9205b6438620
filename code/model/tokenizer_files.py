"""The files that a tokenizer lies in, by the names that transformers gives them."""

from pathlib import Path

# SentencePiece models have several names; all end alike.
_PATTERNS = (
    "*.model", "added_tokens.json", "additional_chat_templates/*", "chat_template.*", "merges.txt",
    "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.*",
)  # fmt: skip


def tokenizer_files(folder: Path) -> list[Path]:
    """The files in `folder` that a tokenizer may be read from, by name; other files stay out."""
    return sorted({file for pattern in _PATTERNS for file in folder.glob(pattern)})
