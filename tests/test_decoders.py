"""Decoders and text encoders against the diffusers pipelines."""

import json
import shutil
import wave
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from nextgpt.common.errors import UserError
from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.decoders.pipelines import DiffusionSettings, build_decoder, initial_noise
from nextgpt.decoders.text_encoders import TextEncoder
from nextgpt.media.writing import Frames, Output, Sound, save_medium
from nextgpt.mini_world.mini_decoders import build_mini_decoder
from nextgpt.model.loading import resolve_model_path
from tiny_decoders import CAPTIONS, TINY, tiny_decoder

CPU = torch.device("cpu")
SHAPES = {"image": (12, 32), "video": (12, 32), "audio": (16,)}
OPTIONS = DiffusionSettings(
    num_inference_steps=2, guidance_scale=3.0, num_frames=3, audio_length_in_s=0.025, seed=5
)
# The pipelines' own names for the length of what comes out.
LENGTH = {"image": {}, "video": {"num_frames": 3}, "audio": {"audio_length_in_s": 0.025}}


def pipeline(modality: Modality) -> DiffusionPipeline:
    """Load the diffusers pipeline as its manual describes."""
    pipeline_class = MODALITIES[modality].decoder_class.pipeline_class()
    return pipeline_class.from_pretrained(tiny_decoder(modality), dtype=torch.float32)


def decode(modality: Modality, options: DiffusionSettings = OPTIONS, scale: float = 1.0) -> Output:
    """Decode the first caption from its embedding."""
    folder = str(tiny_decoder(modality))
    embeddings = TextEncoder(modality, folder, CPU).encode(CAPTIONS[:1])
    return build_decoder(modality, folder, CPU).decode(embeddings * scale, options)[0]


def values(output: Output) -> np.ndarray:
    """Return an output's values, pixels as 0..255."""
    array = output[0] if isinstance(output, Frames | Sound) else np.asarray(output)
    return array.astype(np.float64)


@pytest.mark.parametrize("modality", MODALITIES)
def test_text_encoder_equals_the_pipelines_encode_prompt(modality: Modality) -> None:
    encoder = TextEncoder(modality, str(tiny_decoder(modality)), CPU)
    found = encoder.encode(CAPTIONS)
    pipe = pipeline(modality)
    encode = pipe._encode_prompt if modality == "audio" else pipe.encode_prompt
    with torch.no_grad():
        expected = encode(CAPTIONS, CPU, 1, False)
    torch.testing.assert_close(found, expected if modality == "audio" else expected[0])
    assert found.shape[1:] == encoder.shape == SHAPES[modality]
    assert not torch.allclose(found[0], found[1])


def test_text_encoder_audio_embeddings_have_unit_norm() -> None:
    encoder = TextEncoder("audio", str(tiny_decoder("audio")), CPU)
    torch.testing.assert_close(encoder.encode(CAPTIONS).norm(dim=-1), torch.ones(2))


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("modality", MODALITIES)
def test_decoder_caption_embeds_equal_the_prompt(modality: Modality, guidance_scale: float) -> None:
    options = DiffusionSettings(**{**vars(OPTIONS), "guidance_scale": guidance_scale})
    found = values(decode(modality, options))
    expected = pipeline(modality)(
        CAPTIONS[0],
        num_inference_steps=2,
        guidance_scale=guidance_scale,
        generator=torch.Generator().manual_seed(5),
        **({"output_type": "np"} if modality == "image" else {}),
        **LENGTH[modality],
    )[0][0]
    if modality == "audio":
        np.testing.assert_allclose(found, expected, atol=1e-5)
    else:
        np.testing.assert_allclose(found, (expected * 255).round(), atol=1)
        assert (found != (expected * 255).round()).mean() < 1e-3


@pytest.mark.parametrize("modality", MODALITIES)
def test_decoder_batch_equals_single_samples_with_their_seeds(modality: Modality) -> None:
    folder = str(tiny_decoder(modality))
    decoder = build_decoder(modality, folder, CPU)
    embeddings = TextEncoder(modality, folder, CPU).encode(CAPTIONS)
    both = decoder.decode(embeddings, OPTIONS)
    second = decoder.decode(embeddings[1:], DiffusionSettings(**{**vars(OPTIONS), "seed": 6}))
    atol = 1e-5 if modality == "audio" else 1
    np.testing.assert_allclose(values(both[1]), values(second[0]), atol=atol)


def test_initial_noise_is_shared_across_frames_as_configured() -> None:
    noise = initial_noise(
        (2, 8, 4, 40, 40), 0.9, [torch.Generator().manual_seed(s) for s in (5, 6)]
    )
    frames = noise.transpose(1, 2).flatten(2)  # (2, 4, N)
    assert frames.std(dim=-1) == pytest.approx(torch.ones(2, 4), abs=0.03)
    assert torch.corrcoef(frames[0])[0, 1:] == pytest.approx(torch.full((3,), 0.9), abs=0.01)
    assert torch.corrcoef(frames[:, 0])[0, 1].abs() < 0.05  # two videos share nothing
    decoder = build_decoder("video", str(tiny_decoder("video")), torch.device("cpu"))
    embeddings = decoder.text_encoder.encode(CAPTIONS)
    alike, apart = (
        decoder.decode(embeddings, DiffusionSettings(**{**vars(OPTIONS), "shared_noise": shared}))
        for shared in (1.0, 0.0)
    )
    for still, moving in zip(alike, apart, strict=True):
        assert _change(still) < 0.3 * _change(moving)


def _change(video: Frames) -> float:
    """Return the mean absolute difference of consecutive frames."""
    return float(np.abs(np.diff(video.frames.astype(float), axis=0)).mean())


def test_decoder_ignores_the_norm_of_audio_embeddings() -> None:
    np.testing.assert_allclose(
        values(decode("audio")), values(decode("audio", scale=7.0)), atol=1e-6
    )


@pytest.mark.parametrize("modality", MODALITIES)
def test_decoder_output_depends_on_the_seed_alone(modality: Modality, tmp_path: Path) -> None:
    outputs = [
        decode(modality, DiffusionSettings(**{**vars(OPTIONS), "seed": seed})) for seed in (5, 5, 6)
    ]
    paths = [tmp_path / f"{index}{MODALITIES[modality].suffix}" for index in range(2)]
    for output, path in zip(outputs, paths, strict=False):
        save_medium(output, path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert sorted(tmp_path.iterdir()) == paths  # nothing is left aside
    assert (values(outputs[0]) != values(outputs[2])).any()


@pytest.mark.parametrize("modality", MODALITIES)
def test_decoder_callback_sees_every_step_and_can_stop(modality: Modality) -> None:
    decoder = build_decoder(modality, str(tiny_decoder(modality)), CPU)
    embeddings = torch.zeros(1, *SHAPES[modality])
    seen: list[tuple[int, int]] = []
    decoder.decode(embeddings, OPTIONS, lambda step, steps: seen.append((step, steps)))
    assert seen == [(1, 2), (2, 2)]

    def stop(step: int, steps: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decoder.decode(embeddings, OPTIONS, stop)


@pytest.mark.parametrize("modality", MODALITIES)
def test_decoder_offload_keeps_outputs_and_frees_the_device_when_stopped(
    modality: Modality, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cpu", 0)  # the same as without a number, but told apart by name
    decoder = build_decoder(modality, str(tiny_decoder(modality)), device, offloaded=True)
    embeddings = decoder.text_encoder.encode(CAPTIONS[:1])
    parts = decoder.pipeline.components.values()
    networks = {part for part in parts if isinstance(part, nn.Module)} - {
        decoder.text_encoder.encoder
    }
    moves: dict[nn.Module, list[str]] = {network: [] for network in networks}
    move = nn.Module.to

    def told(module: nn.Module, *args: object, **kwargs: object) -> nn.Module:
        if module in moves and isinstance(args[0], torch.device):
            moves[module].append(str(args[0]))
        return move(module, *args, **kwargs)

    for kind in {type(network) for network in networks}:
        monkeypatch.setattr(kind, "to", told)
    np.testing.assert_array_equal(
        values(decoder.decode(embeddings, OPTIONS)[0]), values(decode(modality))
    )
    assert networks and all(places == ["cpu:0", "cpu"] for places in moves.values())

    def stop(step: int, steps: int) -> None:
        assert all(places[-1] == "cpu:0" for places in moves.values())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decoder.decode(embeddings, OPTIONS, stop)
    assert all(places == 2 * ["cpu:0", "cpu"] for places in moves.values())


def test_decoder_outputs_have_the_expected_types_and_shapes() -> None:
    image, video, sound = (decode(modality) for modality in MODALITIES)
    assert isinstance(image, Image.Image)
    assert image.size == (16, 16)  # the pipeline's own size
    assert video.frames.shape == (3, 16, 16, 3)
    assert video.frames.dtype == np.uint8
    assert sound.samples.shape == (400,)
    assert sound.samples.dtype == np.float32
    assert sound.rate == 16000
    wide = decode("video", DiffusionSettings(**{**vars(OPTIONS), "height": 24, "width": 32}))
    assert wide.frames.shape == (3, 24, 32, 3)


def test_decoder_wrong_embedding_shape_raises() -> None:
    decoder = build_decoder("image", str(tiny_decoder("image")), CPU)
    with pytest.raises(UserError, match=r"\(12, 32\), not \(77, 768\)"):
        decoder.decode(torch.zeros(1, 77, 768))


@pytest.mark.parametrize(
    "options", [{"height": 100}, {"num_inference_steps": 0}, {"num_frames": 0}]
)
def test_decoder_wrong_option_is_named(options: dict[str, int]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        DiffusionSettings(**options)


@pytest.mark.parametrize(
    "file",
    [
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
    ],
)
def test_decoder_missing_file_is_named(file: str, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(tiny_decoder("image"), folder)
    (folder / file).unlink()
    with pytest.raises(UserError, match=file.split("/")[1]):
        TextEncoder("image", str(folder), CPU)


def test_text_encoder_needs_only_tokenizer_and_text_encoder_files(tmp_path: Path) -> None:
    for part in ("tokenizer", "text_encoder"):
        shutil.copytree(tiny_decoder("video") / part, tmp_path / part)
    encoder = TextEncoder("video", str(tmp_path), CPU)
    assert (
        encoder.fingerprints()
        == TextEncoder("video", str(tiny_decoder("video")), CPU, torch.float16).fingerprints()
    )


@pytest.mark.parametrize("modality", ["image", "audio"])
def test_decoder_folders_in_published_layout_load(modality: Modality, tmp_path: Path) -> None:
    folder = tmp_path / "published"
    shutil.copytree(tiny_decoder(modality), folder)
    tokenizer = folder / "tokenizer"
    vocabulary = json.loads((tokenizer / "tokenizer.json").read_text())["model"]
    (tokenizer / "vocab.json").write_text(json.dumps(vocabulary["vocab"]))
    merges = [" ".join(pair) for pair in vocabulary["merges"]]
    (tokenizer / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    (tokenizer / "tokenizer.json").unlink()
    weights = folder / "text_encoder" / "model.safetensors"
    if modality == "image":
        tensors = {f"text_model.{name}": t for name, t in load_file(weights).items()}
        tensors["text_model.embeddings.position_ids"] = torch.arange(12)[None]
        save_file(tensors, weights, metadata={"format": "pt"})
    found = TextEncoder(modality, str(folder), CPU).encode(CAPTIONS)
    expected = TextEncoder(modality, str(tiny_decoder(modality)), CPU).encode(CAPTIONS)
    assert torch.equal(found, expected)


def test_decoder_hub_names_that_moved_are_mapped(capsys: pytest.CaptureFixture[str]) -> None:
    name = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert resolve_model_path("runwayml/stable-diffusion-v1-5") == name
    assert "gone from the hub" in capsys.readouterr().out
    assert resolve_model_path(name) == name
    with pytest.raises(UserError, match="no such folder"):
        resolve_model_path("../no/such/folder")


def test_decoder_builder_is_deterministic(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        build_mini_decoder("image", tmp_path / name, seed, CAPTIONS[:1], TINY)
    weights = "unet/diffusion_pytorch_model.safetensors"
    first = (tiny_decoder("image") / weights).read_bytes()
    assert (tmp_path / "a" / weights).read_bytes() == first
    assert (tmp_path / "b" / weights).read_bytes() != first


def test_video_writer_keeps_frames_in_a_browser_format(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 15 * 17).reshape(15, 17)  # odd sides
    frames = np.stack([np.full((15, 17, 3), level) + ramp[..., None] for level in (0, 9)])
    video = Frames(frames.clip(0, 255).astype(np.uint8), 8)
    save_medium(video, tmp_path / "x.mp4")
    with av.open(tmp_path / "x.mp4") as container:
        stream = container.streams.video[0]
        assert (stream.codec.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 8)
        read = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(stream)])
    assert read.shape == (2, 16, 18, 3)
    assert np.abs(read[:, :15, :17].astype(float) - video.frames).mean() < 4


def test_audio_writer_clips_to_16_bit(tmp_path: Path) -> None:
    save_medium(Sound(np.array([0, 0.5, -3], np.float32), 16000), tmp_path / "x.wav")
    with wave.open(str(tmp_path / "x.wav")) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 16000)
        samples = np.frombuffer(file.readframes(3), "<i2")
    assert samples.tolist() == [0, 16384, -32767]


def test_media_writer_failure_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.wav"
    path.write_bytes(b"older")
    with pytest.raises(TypeError):
        save_medium(Sound(None, 16000), path)  # type: ignore[arg-type]
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"older"]
