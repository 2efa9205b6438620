"""Gradients do not depend on micro batches, packing or processes; packed samples are isolated."""

import copy
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import varlen
from transformers import modeling_flash_attention_utils

from nextgpt.config.loader import load_config
from nextgpt.conversation.batch import Batch, Example, collate, pack_first_fit
from nextgpt.conversation.messages import Conversation
from nextgpt.conversation.prompt import EncodedPrompt
from nextgpt.model.nextgpt import NextGPT
from nextgpt.model.output_projection import OutputProjection
from nextgpt.model.trainable import TRAINABLE_GROUPS, set_trainable
from nextgpt.training.data import collate_by_length
from nextgpt.training.engine import StepCounts, TrainEngine
from parity_tools import cases, relative_error
from test_conversation import CASE_NAMES
from tiny_system import ask, recorded_conversation, tiny_encoder, tiny_model

ENCODER = tiny_encoder()
WIDTH = 32  # of a recorded feature


def recorded_samples() -> list[Example]:
    """Return all recorded conversations and two without media: 24 samples of many lengths."""
    conversations = [recorded_conversation(case, row) for case in CASE_NAMES for row in (0, 1)]
    conversations += [Conversation(ask("Why?", answer)) for answer in ("So.", "It rains. " * 9)]
    samples = []
    for index, conversation in enumerate(conversations):
        encoded = ENCODER.encode(conversation)
        row = index % 2
        features = [cases()[f"imagebind.{m.modality}"][row] for _, m in encoded.media_positions]
        targets = [cases()[f"in.caption_emb.{m.modality}"][row] for _, m in encoded.signal_spans]
        samples.append(Example(encoded, features, targets))
    return samples


@pytest.fixture(scope="module")
def model() -> NextGPT:
    """The recorded model with smaller output projections; all groups train."""
    model = tiny_model(lora=True)
    torch.manual_seed(0)
    for modality, recorded in model.output_projections.items():
        model.output_projections[modality] = OutputProjection(
            recorded.fc.in_features,
            prompt_embeds_shape=recorded.prompt_embeds_shape,
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            heads=2,
            dim_feedforward=32,
        )
    set_trainable(model, list(TRAINABLE_GROUPS), base_vocabulary=False)
    return model


def step_gradient(
    model: NextGPT, samples: list[Example], world: int, size: int, row_length: int | None
) -> torch.Tensor:
    """Compute the gradient of a step over `world` processes in micro batches of `size`.

    As DeepSpeed: the mean over all micro batches of the gradients of the engine's losses.
    """
    shares = [samples[rank::world] for rank in range(world)]
    batches = [
        batch
        for share in shares
        for batch in collate_by_length(
            share, size, pad_id=2, feature_width=WIDTH, packed_seq_length=row_length
        )
    ]
    training = load_config("7b", 3).training
    engine = SimpleNamespace(training=training, world=world, accumulation=len(batches) // world)
    counts = StepCounts(
        tokens=sum(int((batch.labels[:, 1:] >= 0).sum()) for batch in batches),
        signal_spans={
            m: sum(len(batch.signal_spans.get(m, ())) for batch in batches)
            for m in ENCODER.signals.counts
        },
    )
    model.zero_grad()
    for batch in batches:
        (TrainEngine._normalize(engine, model(batch), counts) / len(batches)).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.fixture(scope="module")
def at_once(model: NextGPT) -> torch.Tensor:
    samples = recorded_samples()
    return step_gradient(model, samples, world=1, size=len(samples), row_length=None)


@pytest.mark.parametrize("row_length", [None, 300])
@pytest.mark.parametrize(("world", "size"), [(1, 1), (1, 3), (1, 8), (2, 4), (3, 2), (4, 6)])
def test_gradients_equal_for_every_split_of_a_batch(
    model: NextGPT, at_once: torch.Tensor, world: int, size: int, row_length: int | None
) -> None:
    found = step_gradient(model, recorded_samples(), world, size, row_length)
    assert found.shape == at_once.shape and at_once.norm() > 1
    assert relative_error(found, at_once) < 1e-6


def attend_by_conversation(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """Compute variable-length attention, as flash-attn's function of these arguments on a GPU."""
    assert causal and cu_seqlens_q.equal(cu_seqlens_k) and cu_seqlens_q.dtype == torch.int32
    assert cu_seqlens_q.diff().max() <= max_seqlen_q == max_seqlen_k
    parts = []
    for start, end in pairwise(cu_seqlens_q.tolist()):
        one = [states[start:end].transpose(0, 1) for states in (query, key, value)]
        options = {"is_causal": True, "scale": softmax_scale, "enable_gqa": True}
        parts.append(F.scaled_dot_product_attention(*one, **options).transpose(0, 1))
    return torch.cat(parts)


def attend_as_torch(*states_and_bounds: Any, scale: float, **options: Any) -> torch.Tensor:
    """Compute it with the arguments of PyTorch's function."""
    assert options["window_size"] == (-1, 0)  # causal
    return attend_by_conversation(*states_and_bounds, softmax_scale=scale, causal=True)


@pytest.fixture
def reference_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the kernels of both libraries, which need a GPU, by reference implementations."""
    monkeypatch.setattr(varlen, "varlen_attn", attend_as_torch)
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    kernels = (None, attend_by_conversation, None, None, None)
    monkeypatch.setattr(modeling_flash_attention_utils, "_lazy_imports", lambda *_, **__: kernels)


@pytest.mark.usefixtures("reference_kernels")
@pytest.mark.parametrize("row_length", [None, 300])
@pytest.mark.parametrize("attention", ["sdpa", "eager", "varlen", "flash_attention_2"])
def test_attention_keeps_gradients_of_packed_rows(
    model: NextGPT, at_once: torch.Tensor, attention: str, row_length: int | None
) -> None:
    config = model.language_model.config
    before, config._attn_implementation = config._attn_implementation, attention
    found = step_gradient(model, recorded_samples(), world=1, size=8, row_length=row_length)
    config._attn_implementation = before
    assert relative_error(found, at_once) < 1e-6


# ---------------------------------------------------------------- packed rows


def texts(*answers: str) -> list[EncodedPrompt]:
    return [ENCODER.encode(Conversation(ask("Why is it so?", answer))) for answer in answers]


def packed(encoded: list[EncodedPrompt], row_length: int) -> tuple[Batch, list[tuple[int, int]]]:
    """Return the packed batch of `encoded`, and the row and offset of each."""
    examples = [Example(one, [], []) for one in encoded]
    batch = collate(examples, pad_id=2, feature_width=WIDTH, packed_seq_length=row_length)
    return batch, pack_first_fit([len(one.input_ids) for one in encoded], row_length)


def states(model: NextGPT, batch: Batch) -> torch.Tensor:
    """Last hidden states (B, L, H) of a batch without media."""
    embeddings = model.embed(batch.input_ids, batch.media_positions, batch.features)
    return model.last_hidden_states(embeddings, batch.attention_mask, batch.position_ids)


@pytest.fixture(params=["sdpa", "eager"])
def reader(request: pytest.FixtureRequest) -> NextGPT:
    model = copy.deepcopy(tiny_model(lora=True))
    model.language_model.set_attn_implementation(request.param)
    return model


@torch.no_grad()
def test_packing_equals_one_sample_per_row(reader: NextGPT) -> None:
    encoded = texts("It rains.", "The sun shines on the lake.", "So.", "Because of the wind.")
    together, places = packed(encoded, row_length=120)
    assert len(together.input_ids) < len(encoded)
    hidden = states(reader, together)
    for one, (row, first) in zip(encoded, places, strict=True):
        alone, _ = packed([one], row_length=1)
        wanted = states(reader, alone)[0]
        found = hidden[row, first : first + len(wanted)]
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("changed", [0, 1, 2])
def test_packing_isolates_samples_in_a_row(reader: NextGPT, changed: int) -> None:
    encoded = texts("The sun shines on the lake.", "It rains in the hills.", "Because of the wind.")
    batch, places = packed(encoded, row_length=1000)
    assert len(batch.input_ids) == 1
    before = states(reader, batch)[0]
    (row, first), length = places[changed], len(encoded[changed].input_ids)
    batch.input_ids[row, first : first + length] = (
        batch.input_ids[row, first : first + length] + 7
    ) % 900
    after = states(reader, batch)[0]
    for index, (_, start) in enumerate(places):
        here = slice(start, start + len(encoded[index].input_ids))
        apart = (after[here] - before[here]).abs().max()
        assert (apart < 1e-6) == (index != changed), (index, apart)
