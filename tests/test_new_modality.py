"""A fourth modality needs one registration and no change of the package."""

from pathlib import Path

import pytest
import torch

from nextgpt.common.modality import MODALITIES, ModalitySpec, register_modality
from nextgpt.config.loader import load_config
from nextgpt.conversation.batch import Example, collate
from nextgpt.conversation.messages import Conversation, Media, Text, Turn
from nextgpt.generation.assistant import Assistant
from nextgpt.generation.cli import save_answer
from nextgpt.generation.settings import GenerationSettings
from nextgpt.model.build import build_model, build_prompt_builder
from nextgpt.model.trainable import set_trainable
from nextgpt.serving.sampling_settings import setting_specs
from nextgpt.training.feature_caches import FeatureCaches
from nextgpt.training.media_features import BatchEncoder
from tiny_components import favour, tiny_overrides
from tiny_decoders import tiny_decoder

IMAGE_ADAPTER = "nextgpt.decoders.pipelines:StableDiffusionDecoder"
DEPTH = ModalitySpec("depth", "DEP", "depth map", ".png", "image/png", IMAGE_ADAPTER)
DECODER = {"signal_tokens": 3, "prompt_embeds_shape": [12, 32], "num_inference_steps": 1}


def test_registered_modality_trains_and_answers(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    register_modality(DEPTH)
    request.addfinalizer(lambda: MODALITIES.pop("depth"))
    decoder = {**DECODER, "path": tiny_decoder("image"), "guidance_scale": 3}
    overrides = [f"decoders.depth.{key}={value}" for key, value in decoder.items()]
    config = load_config("7b", 2, [*tiny_overrides(tmp_path), *overrides])
    builder, cpu = build_prompt_builder(config), torch.device("cpu")
    torch.manual_seed(0)
    model = build_model(config, torch.float32, lora=False, output_projections=True)
    set_trainable(model, ["output_projections", "vocabulary"], base_vocabulary=False)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-3)
    question = Turn("human", (Text("draw how far away it is"),))
    answer = Turn("assistant", (Text("here"), Media("depth", caption="a near red circle")))
    sample = Example(builder.encode(Conversation((question, answer))), [], [None])
    encoder = BatchEncoder(config, FeatureCaches(config), cpu)
    batch = encoder.encode(collate([sample], 0, config.encoder.width))
    loss = model(batch).alignment["depth"]
    loss.backward()
    optimizer.step()
    assert model(batch).alignment["depth"] < loss

    favour(model, [builder.signals.span("depth")[0] - builder.signals.first_id], strength=1e3)
    settings = GenerationSettings.from_config(config)
    assert "guidance_depth" in [spec.name for spec in setting_specs(settings)]
    assistant = Assistant(config, builder, model.eval(), cpu, [])
    answers = (
        assistant.chat(Conversation((question,)), seed=s, settings=settings) for s in range(9)
    )
    made = next(answer for answer in answers if answer.outputs)
    assert "[DEP2]" in made.token_names
    saved = save_answer(made, (question,), tmp_path)
    assert saved[0].name == "answer_1_depth.png" and saved[0].read_bytes()[1:4] == b"PNG"
