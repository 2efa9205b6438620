"""Losses and gradients equal the published system's on recorded small components."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from nextgpt.common.errors import UserError
from nextgpt.common.modality import MODALITIES
from nextgpt.config.loader import load_config
from nextgpt.conversation.prompt import IGNORE_INDEX
from nextgpt.model.build import build_model, build_on_meta, build_prompt_builder
from nextgpt.model.delta import load_delta, read_delta, write_delta
from nextgpt.model.nextgpt import Losses, NextGPT
from nextgpt.model.trainable import TRAINABLE_GROUPS, count_parameters, set_trainable
from parity.recipe import recipe_tensor
from parity_tools import PARITY, cases, relative_error
from test_conversation import CASE_NAMES
from tiny_components import model_to_published
from tiny_system import recorded_batch, tiny_config, tiny_model


def losses_of(case: str, *, whole_vocabulary: bool) -> tuple[NextGPT, Losses]:
    model = tiny_model(lora=case.startswith("stage3"))
    set_trainable(model, list(TRAINABLE_GROUPS), base_vocabulary=whole_vocabulary)
    return model, model(recorded_batch(case))


def weighted_loss(losses: Losses, video_weight: float) -> torch.Tensor:
    total = losses.text / losses.tokens
    for modality, distance in losses.alignment.items():
        weight = video_weight if modality == "video" else 1.0
        total = total + weight * distance / losses.signal_spans[modality]
    return total


def test_batch_padding_and_masks_equal_the_recorded() -> None:
    for case in CASE_NAMES:
        batch = recorded_batch(case)
        recorded = cases()[f"{case}.attention_mask"]
        opening = batch.input_ids.shape[1] - recorded.shape[1]
        assert torch.equal(batch.attention_mask[:, opening:], recorded), case
        assert torch.equal(batch.input_ids[:, opening:], cases()[f"{case}.input_ids"]), case
        assert torch.equal(batch.labels[:, opening:], cases()[f"{case}.targets"]), case


@pytest.mark.parametrize("whole_vocabulary", [True, False])
@pytest.mark.parametrize("case", CASE_NAMES)
def test_losses_and_gradients_equal_the_published(case: str, whole_vocabulary: bool) -> None:
    model, losses = losses_of(case, whole_vocabulary=whole_vocabulary)
    loss = weighted_loss(losses, video_weight=2.0 if case == "stage3.video" else 1.0)
    assert relative_error(loss, cases()[f"{case}.loss"]) < 1e-5
    modality = case.split(".")[1]
    if modality in losses.alignment:
        found = losses.alignment[modality] / losses.signal_spans[modality]
        assert relative_error(found, cases()[f"{case}.mse"]) < 1e-4
    loss.backward()
    embedding = model.language_model.get_input_embeddings()
    assert (embedding.weight.grad is not None) == whole_vocabulary
    assert embedding.new_rows.grad.any()
    recorded = {name.removeprefix(f"{case}.") for name in cases() if name.startswith(f"{case}.")}
    gradients = {"1": "grad_llama_proj", "2": "grad_fc_in", "3": "lora_A_grad_norms"}
    assert (gradients[case[5]] in recorded) == (modality in MODALITIES)
    if f"{case}.grad_llama_proj" in cases():
        grad = model.input_projection.weight.grad
        assert relative_error(grad, cases()[f"{case}.grad_llama_proj"]) < 1e-4
    if f"{case}.grad_fc_in" in cases():
        grad = model.output_projections[modality].fc.weight.grad
        assert relative_error(grad, cases()[f"{case}.grad_fc_in"]) < 1e-4
    if f"{case}.lora_A_grad_norms" in cases():
        norms = [p.grad.norm() for n, p in model.named_parameters() if ".lora_A." in n]
        assert relative_error(torch.stack(norms), cases()[f"{case}.lora_A_grad_norms"]) < 1e-4


def test_losses_without_text_labels_are_finite() -> None:
    """Truncation may remove all labels of an answer."""
    model = tiny_model(lora=False)
    batch = recorded_batch("stage1.image")
    batch.labels.fill_(IGNORE_INDEX)
    losses = model(batch)
    assert losses.tokens == 0 and losses.text.item() == 0
    losses.text.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("modality", MODALITIES)
def test_output_projections_equal_the_recorded(modality: str) -> None:
    projection = tiny_model(lora=False).output_projections[modality]
    recorded = {
        k: cases()[f"output_projection.{modality}.{k}"] for k in ("hidden", "embeds", "out")
    }
    found = projection(recorded["hidden"], recorded["embeds"])
    assert relative_error(found.view_as(recorded["out"]), recorded["out"]) < 1e-5


def published_file(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """Write the recorded stage 3 file, completed by the recipe."""
    tensors = torch.load(PARITY / "delta_stage3_tiny.pt", weights_only=True)
    for name, shape in json.loads((PARITY / "delta_keys_tiny.json").read_text()).items():
        if name not in tensors:
            tensors[name] = recipe_tensor(name, tuple(shape))
    torch.save(tensors, folder / "pytorch_model.pt")
    return folder, tensors


def empty_model() -> NextGPT:
    return build_model(tiny_config(), torch.float32, lora=True, output_projections=True)


def test_published_delta_round_trips_name_by_name(tmp_path: Path) -> None:
    folder, tensors = published_file(tmp_path)
    model = empty_model()
    report = load_delta(model, read_delta(folder), required=set(TRAINABLE_GROUPS))
    assert len(report) == len(TRAINABLE_GROUPS) and all("loaded" in line for line in report)
    written = model_to_published(model)
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(written[name], tensor.float()), name


def test_published_delta_with_wrong_names_or_shapes_lists_them(
    tmp_path: Path,
) -> None:
    folder, tensors = published_file(tmp_path)
    tensors["gen_text_hidden_fcs.0.fc.extra"] = torch.zeros(1)
    del tensors["llama_proj.bias"]
    tensors["gen_text_hidden_fcs_audio.0.fc.weight"] = torch.zeros(512, 64)
    torch.save(tensors, folder / "pytorch_model.pt")
    with pytest.raises(UserError) as refusal:
        load_delta(empty_model(), read_delta(folder), required=set(TRAINABLE_GROUPS))
    message = str(refusal.value)
    assert "unexpected output_projections.image.fc.extra" in message
    assert "missing input_projection.bias" in message
    assert "output_projections.audio.fc.weight: shape (512, 64), expected (512, 128)" in message


def test_published_7b_delta_has_the_models_names_and_shapes() -> None:
    """On the meta device, so that 7 billion parameters cost no memory."""
    config = load_config("7b")
    model = build_on_meta(config, LlamaConfig(), base_tokens=32000, lora=True)
    written = model_to_published(model)
    recorded = json.loads((PARITY / "delta_keys_7b.json").read_text())
    assert {name: list(tensor.shape) for name, tensor in written.items()} == recorded


def test_trainable_groups_have_the_published_parameter_counts() -> None:
    """In millions, from the paper, which counts the vocabulary separately."""
    config = load_config("7b")
    model = build_on_meta(config, LlamaConfig(), base_tokens=32000, lora=True)
    counts = {part: size / 1e6 for part, (size, _) in count_parameters(model).items()}
    assert round(counts["input_projection"], 1) == 4.2
    assert round(counts["lora"], 1) == 33.6
    published = {"image": 31.96, "video": 32.09, "audio": 31.79}
    for modality, projection in model.output_projections.items():
        trained = sum(p.numel() for p in projection.parameters())
        assert round(trained / 1e6, 2) == published[modality]


def test_merged_vicuna_with_padding_row_keeps_the_published_ids(tmp_path: Path) -> None:
    """Vicuna v0 has 32001 rows for 32000 tokens; the published new ids begin at 32000."""
    padded = LlamaForCausalLM.from_pretrained(PARITY / "llama_tiny")
    padded.resize_token_embeddings(1001)
    padded.save_pretrained(tmp_path / "padded")
    AutoTokenizer.from_pretrained(PARITY / "llama_tiny").save_pretrained(tmp_path / "padded")
    folder, tensors = published_file(tmp_path)
    config = tiny_config(overrides=[f"language_model.path={tmp_path / 'padded'}"])
    model = build_model(config, torch.float32, lora=True, output_projections=True)
    assert build_prompt_builder(config).signals.first_id == 1000
    load_delta(model, read_delta(folder), required=set(TRAINABLE_GROUPS))
    head = "llama_model.base_model.model.lm_head.weight"
    assert torch.equal(model_to_published(model)[head], tensors[head].float())


def test_delta_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    write_delta({"input_projection.bias": torch.zeros(128)}, 32000, tmp_path / "delta.safetensors")
    with pytest.raises(UserError, match="32000 tokens, this one has 1000"):
        load_delta(empty_model(), read_delta(tmp_path), required=set())
