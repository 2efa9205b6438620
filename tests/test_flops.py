"""The count of floating-point operations against PyTorch's counter on whole passes."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nextgpt.conversation.batch import Batch, Example, collate
from nextgpt.model.nextgpt import NextGPT
from nextgpt.model.output_projection import OutputProjection
from nextgpt.model.trainable import set_trainable
from nextgpt.training.flops import count_flops, peak_flops
from test_batch import ENCODER, recorded_samples, texts
from tiny_system import tiny_model

STAGES = {
    1: ["input_projection", "vocabulary"],
    2: ["output_projections", "vocabulary"],
    3: ["input_projection", "output_projections", "lora", "vocabulary"],
    4: ["output_projections"],
}


def model_with(groups: list[str], *, checkpointing: bool = False) -> NextGPT:
    """Return the recorded model with a small output projection, in which `groups` train."""
    model = tiny_model(lora=True)
    model.language_model.set_attn_implementation("eager")
    if checkpointing:
        model.language_model.activation_checkpointing_enable({"use_reentrant": False})
    model.output_projections.clear()
    if "output_projections" in groups:  # as in a run
        model.output_projections["image"] = OutputProjection(
            model.language_model.config.hidden_size,
            16,
            (77, 768),
            encoder_layers=1,
            decoder_layers=1,
            heads=2,
            dim_feedforward=16,
        )
    set_trainable(model, groups, base_vocabulary=False)
    return model


def one_image_batch() -> Batch:
    """Return a conversation with an image in, and one with an image out, of the same length."""
    samples = recorded_samples()
    shown = next(s for s in samples if s.features and not s.caption_embeds)
    made = next(
        s for s in samples if s.caption_embeds and s.prompt.signal_spans[0][1].modality == "image"
    )
    batch = collate([shown, made], pad_id=2, feature_width=32)
    batch.attention_mask[:] = 1  # padding computes too
    return batch


def counted(model: NextGPT, batch: Batch) -> int:
    """Return PyTorch's count of a forward and backward pass."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        losses = model(batch)
        (losses.text + sum(losses.alignment.values())).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "groups", [*STAGES.values(), ["lora"], ["lora", "output_projections"]], ids=str
)
def test_flops_equal_the_counter(groups: list[str], checkpointing: bool) -> None:
    if checkpointing and groups == STAGES[4]:
        pytest.skip("not checkpointed: no gradient passes through the language model")
    model, batch = model_with(groups, checkpointing=checkpointing), one_image_batch()
    done = counted(model, batch)
    assert count_flops(model, recomputation=True).of([batch]) == done
    without = count_flops(model).of([batch])
    assert without < done if checkpointing else without == done


def test_flops_of_a_frozen_weight_are_4_and_of_a_trained_6() -> None:
    model = model_with(STAGES[3])
    frozen = trained = 0
    for name, parameter in model.language_model.model.layers.named_parameters():
        if parameter.dim() == 2:
            frozen += parameter.numel() * (not parameter.requires_grad)
            trained += parameter.numel() * parameter.requires_grad
        assert parameter.requires_grad == (".lora_" in name)
    assert count_flops(model).token == 4 * frozen + 6 * trained
    assert count_flops(model, recomputation=True) == count_flops(model)  # nothing is


def test_flops_do_not_depend_on_packing_and_padding() -> None:
    costs = count_flops(model_with(STAGES[3]))
    examples = [Example(one, [], []) for one in texts("It rains.", "So.", "Because of the wind.")]
    options = {"pad_id": ENCODER.tokenizer.eos_token_id, "feature_width": 32}
    alone = [collate([one], **options) for one in examples]
    assert costs.of(alone) > 0
    for packing in ({}, {"packed_seq_length": 64}, {"packed_seq_length": 200, "pad_rows": True}):
        assert costs.of([collate(examples, **options, **packing)]) == costs.of(alone)


def test_peak_is_known_by_the_card_and_only_in_half_precision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    card, half = torch.device("cuda"), torch.bfloat16
    for name, peak in (
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A10G", None),
        ("a card", None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert peak_flops(card, half) == peak
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100-SXM4-80GB")
    assert peak_flops(card, torch.float16) == 312e12
    assert peak_flops(card, torch.float32) is None
    assert peak_flops(torch.device("cpu"), half) is None
