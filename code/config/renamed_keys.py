"""Deprecated configuration keys and values, still read, and their current names."""

from typing import Any

from nextgpt.common.errors import UserError

RENAMED_KEYS = {
    "language_model.template": "language_model.prompt_format",
    "language_model.attention": "language_model.attn_implementation",
    "language_model.lora_targets": "language_model.lora_target_modules",
    "language_model.train_vocabulary": "language_model.trainable_embeddings",
    "input_projection.tokens": "input_projection.tokens_per_medium",
    "output_projection.width": "output_projection.d_model",
    "output_projection.feedforward": "output_projection.dim_feedforward",
    "output_projection.centred": "output_projection.whiten_inputs",
    "data.root": "data.data_dir",
    "data.embeddings": "data.caption_embedding_dir",
    "data.cache": "data.cache_dir",
    "data.max_length": "data.max_seq_length",
    "data.row_length": "data.packed_seq_length",
    "data.workers": "data.num_workers",
    "training.trains": "training.trainable",
    "training.learning_rates": "training.group_learning_rates",
    "training.epsilon": "training.adam_epsilon",
    "training.warmup": "training.warmup_ratio",
    "training.gradient_clipping": "training.max_grad_norm",
    "training.alignment_weights": "training.alignment_loss_weights",
    "training.fit_input_projection": "input_projection.init",
    "training.keep_states": "training.cache_hidden_states",
    "training.save_every": "training.save_steps",
    "training.keep_checkpoints": "training.save_total_limit",
    "training.deepspeed": "training.deepspeed_config",
    "serving.decoder_placement": "serving.offload_decoders",
    **{
        f"decoders.{modality}.{old}": f"decoders.{modality}.{new}"
        for modality in ("image", "video", "audio")
        for old, new in (
            ("caption_shape", "prompt_embeds_shape"),
            ("steps", "num_inference_steps"),
            ("frames", "num_frames"),
            ("seconds", "audio_length_in_s"),
        )
    },
}
# Renamed values, by the deprecated key.
RENAMED_VALUES: dict[str, dict[Any, Any]] = {
    "language_model.template": {"published": "vicuna_v0", "own": "tokenizer"},
    "language_model.train_vocabulary": {"new": "new_tokens", "all": "full"},
    "training.fit_input_projection": {True: "least_squares", False: "random"},
    "serving.decoder_placement": {"offloaded": True, "kept": False},
    "data.batching": {"one_dataset_in_turn": "round_robin"},
}


def update_keys(values: dict[str, Any], source: str) -> list[str]:
    """Replace deprecated keys and values in place.

    Args:
        values: nested sections, as in a YAML file.
        source: the file or argument they come from, for messages.

    Returns:
        One message per replacement, with the current name.

    Raises:
        UserError: a deprecated key and its current name are both set.
    """
    notes = []
    for old in dict.fromkeys([*RENAMED_KEYS, *RENAMED_VALUES]):
        new = RENAMED_KEYS.get(old, old)
        section, key = _find(values, old)
        if key not in section:
            continue
        value, renamed = section[key], RENAMED_VALUES.get(old, {})
        has_new_value = isinstance(value, bool | str) and value in renamed
        if old == new and not has_new_value:
            continue
        target, new_key = _find(values, new, create=True)
        if new_key in target and old != new:
            raise UserError(f"{source}: {old} is the earlier name of {new}: set the latter alone")
        del section[key]
        target[new_key] = renamed[value] if has_new_value else value
        value_note = f"{old} {value} is now called {new} {target[new_key]}"
        notes.append(f"{source}: {value_note if has_new_value else f'{old} is now called {new}'}")
    return notes


def _find(values: dict, path: str, *, create: bool = False) -> tuple[dict, str]:
    """Return the section of the key at `path` (empty if absent) and the key's last name."""
    *sections, key = path.split(".")
    for name in sections:
        inner = values.setdefault(name, {}) if create else values.get(name)
        if not isinstance(inner, dict):
            return {}, key
        values = inner
    return values, key
