"""The denoising loss on tiny parts: gradients, weights, latents, exact training."""

import copy
import re
import shutil
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from media_files import write_frames
from nextgpt.common.errors import UserError
from nextgpt.common.modality import MODALITIES, Modality
from nextgpt.common.paths import project_path
from nextgpt.config.loader import load_config
from nextgpt.config.schema import Config
from nextgpt.conversation.batch import Batch, Example, TargetMedium, collate
from nextgpt.conversation.messages import Conversation, Media, Text, Turn
from nextgpt.decoders.denoising import (
    DenoisingSettings,
    LatentDenoiser,
    load_noise_schedule,
    noise_seed,
)
from nextgpt.decoders.latents import ImageFormat, SpectrogramFormat, VideoFormat
from nextgpt.decoders.log_mel import LogMel
from nextgpt.decoders.text_encoders import TextEncoder
from nextgpt.mini_world.captions import sample_caption
from nextgpt.mini_world.media_set import write_medium
from nextgpt.mini_world.objects import sample_object
from nextgpt.model.build import build_model, build_prompt_builder
from nextgpt.model.nextgpt import NextGPT
from nextgpt.training.denoising import (
    DenoisingLoss,
    denoising_settings,
    latent_space,
    open_target_latents,
)
from nextgpt.training.trainer import configure_trainable
from test_training import ONE_AT_A_TIME, copied_data, from_stage, media, zero
from tiny_components import tiny_overrides
from tiny_decoders import tiny_decoder
from tiny_run import TinyRun, same
from tiny_system import randomise_adapters

CPU = torch.device("cpu")
KINDS = ("image", "video", "audio")
WEIGHTS = "training.denoising_loss_weights={image: 1, video: 0.5, audio: 2}"
PREDICTIONS = ("epsilon", "v_prediction", "sample")


def denoising_config(folder: Path, *sets: str, stage: int = 3) -> Config:
    """The tiny system with denoising losses; `folder` gets the cache."""
    return load_config(
        "7b", stage, [*tiny_overrides(folder), f"data.cache_dir={folder}", WEIGHTS, *sets]
    )


def denoiser_of(
    modality: Modality,
    prediction: str = "v_prediction",
    settings: DenoisingSettings | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    checkpointing: bool = False,
) -> LatentDenoiser:
    """The denoiser of a tiny decoder, made to predict something else."""
    folder, settings = tiny_decoder(modality), settings or DenoisingSettings()
    loaded = LatentDenoiser.load(
        modality, folder, settings, CPU, dtype, activation_checkpointing=checkpointing
    )
    scheduler = loaded.scheduler.from_config(loaded.scheduler.config, prediction_type=prediction)
    return LatentDenoiser(modality, loaded.unet, scheduler, settings, loaded.empty)


def some_moments(config: Config, modality: Modality, count: int) -> Tensor:
    """Moments (count, 2, C, ...) of random latents."""
    space = latent_space(modality, Path(tiny_decoder(modality)), config.decoders[modality])
    drawn = torch.randn(count, 2, *space.shape, generator=torch.Generator().manual_seed(5))
    drawn[:, 1] = drawn[:, 1].abs() / 10
    return drawn.half()


def alphas_float64() -> Tensor:
    """The tiny decoders' cumulative alphas from the definition, with zero terminal SNR."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    roots = (1 - betas).cumprod(0).sqrt()
    first, last = roots[0].clone(), roots[-1].clone()
    return ((roots - last) * first / (first - last)) ** 2


def reference_loss(
    modality: Modality,
    unet: torch.nn.Module,
    prediction: str,
    gamma: float,
    embeds: Tensor,
    moments: Tensor,
    seeds: list[int],
) -> Tensor:
    """The loss by its formula, medium by medium in float64."""
    total = embeds.new_zeros(())
    for embed, (mean, deviation), seed in zip(embeds, moments.double(), seeds, strict=True):
        generator = torch.Generator().manual_seed(seed)
        step = int(torch.randint(1000, (), generator=generator))
        torch.rand((), generator=generator)  # of the condition's dropout
        latents = mean + deviation * torch.randn(mean.shape, generator=generator)
        noise = torch.randn((1, *mean.shape), generator=generator)[0].double()
        alpha = alphas_float64()[step]
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        timestep = torch.tensor([step])
        if modality == "audio":
            unit = embed / embed.square().sum().sqrt()
            output = unet(noisy[None], timestep, None, class_labels=unit[None]).sample[0]
        else:
            output = unet(noisy[None], timestep, embed[None]).sample[0]
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
        target = {"epsilon": noise, "v_prediction": velocity, "sample": latents}[prediction]
        snr = alpha / (1 - alpha)
        scale = {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[prediction]
        weight = snr.clamp(max=gamma) / scale
        total = total + weight * (output - target).square().mean()
    return total


def tiny_batch(config: Config) -> Batch:
    """One conversation with three output media after an input medium, and another with one."""
    builder = build_prompt_builder(config)
    draw = Turn("human", (Media("image"), Text("draw and play it")))
    answer = [Text("here"), *(Media(kind, caption=kind) for kind in KINDS)]
    more = (Turn("human", (Text("again"),)), Turn("assistant", (Media("image", caption="a"),)))
    examples = []
    for turns in ((draw, Turn("assistant", tuple(answer))), more):
        prompt = builder.encode(Conversation(turns))
        torch.manual_seed(len(turns[0].parts))
        features = [torch.randn(config.encoder.width) for _ in prompt.media_positions]
        embeds, targets = [], []
        for number, (_, medium) in enumerate(prompt.signal_spans):
            shape = config.decoders[medium.modality].prompt_embeds_shape
            embeds.append(torch.randn(shape))
            moments = some_moments(config, medium.modality, 2)[len(examples)]
            targets.append(TargetMedium(0, moments, f"row {len(examples)} {number}"))
        examples.append(Example(prompt, features, embeds, targets))
    return collate(examples, builder.tokenizer.eos_token_id, config.encoder.width)


def tiny_model_of(config: Config) -> NextGPT:
    torch.manual_seed(0)
    model = build_model(config, torch.float32, lora=True, output_projections=True)
    randomise_adapters(model)
    configure_trainable(model, config)
    return model.eval()


# ---------------------------------------------------------------- the loss and its gradient


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_denoising_gradient_equals_the_formulas_in_float64(
    kind: Modality, prediction: str, tmp_path: Path
) -> None:
    denoiser = denoiser_of(kind, prediction, DenoisingSettings(snr_gamma=5.0))
    config = denoising_config(tmp_path)
    moments, seeds = some_moments(config, kind, 3), [4, 5, 6]
    torch.manual_seed(1)
    embeds = 3 * torch.randn(3, *config.decoders[kind].prompt_embeds_shape)
    before = copy.deepcopy(denoiser.unet.state_dict())

    found = embeds.clone().requires_grad_()
    loss = denoiser.loss(found, moments, seeds)
    loss.backward()
    expected = embeds.double().requires_grad_()
    unet = copy.deepcopy(denoiser.unet).double()
    reference = reference_loss(kind, unet, prediction, 5.0, expected, moments, seeds)
    reference.backward()

    assert loss.item() == pytest.approx(reference.item(), rel=1e-4)
    assert expected.grad.abs().max() > 0
    scale = float(expected.grad.abs().max())
    torch.testing.assert_close(found.grad.double(), expected.grad, rtol=1e-3, atol=1e-3 * scale)
    assert all(p.grad is None and not p.requires_grad for p in denoiser.unet.parameters())
    assert all(torch.equal(t, before[n]) for n, t in denoiser.unet.state_dict().items())


def test_denoising_gradient_reaches_what_trains_and_nothing_frozen(tmp_path: Path) -> None:
    """Of stage 3: both projections, new rows, LoRA; against the whole model in float64."""
    config = denoising_config(tmp_path)
    model, batch = tiny_model_of(config), tiny_batch(config)
    loss = DenoisingLoss.load(config, CPU, torch.float32)
    losses = model(batch)
    loss.add_to(losses, batch, step=7)
    assert losses.denoising.keys() == set(KINDS)
    sum(losses.denoising.values()).backward()

    double = copy.deepcopy(model).double()
    double.zero_grad()
    wide = copy.copy(batch)
    wide.features = batch.features.double()
    embeds = double(wide).prompt_embeds
    total = torch.zeros((), dtype=torch.float64)
    for kind in KINDS:
        targets = batch.targets[kind]
        unet = copy.deepcopy(denoiser_of(kind).unet).double()
        moments = torch.stack([target.latents for target in targets])
        seeds = [noise_seed(config.training.seed, 7, target.key) for target in targets]
        gamma = 5.0 if kind == "image" else 1e30
        if kind == "image":
            total += reference_loss(kind, unet, "v_prediction", gamma, embeds[kind], moments, seeds)
        else:  # without min-SNR weighting
            total += unweighted_loss(kind, unet, embeds[kind], moments, seeds)
    total.backward()

    expected = dict(double.named_parameters())
    groups = set()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, name
            continue
        gradient = expected[name].grad
        if gradient is None or not gradient.any():
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        groups.add(name.split(".")[0] if ".lora_" not in name else "lora")
        scale = float(gradient.abs().max())
        torch.testing.assert_close(
            parameter.grad.double(), gradient, rtol=0.01, atol=0.01 * scale, msg=name
        )
    assert groups == {"input_projection", "output_projections", "language_model", "lora"}


def unweighted_loss(
    kind: Modality, unet: torch.nn.Module, embeds: Tensor, moments: Tensor, seeds: list[int]
) -> Tensor:
    """The loss of v without weights: with gamma SNR the weight is SNR / (SNR + 1), divided out."""
    total = embeds.new_zeros(())
    for row, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        alpha = alphas_float64()[int(torch.randint(1000, (), generator=generator))]
        part = slice(row, row + 1)
        weighted = reference_loss(
            kind, unet, "v_prediction", 1e30, embeds[part], moments[part], [seed]
        )
        total = total + weighted / alpha  # SNR / (SNR + 1) is alpha
    return total


@pytest.mark.parametrize("kind", KINDS)
def test_denoising_activation_checkpointing_and_bf16_keep_the_gradient(
    kind: Modality, tmp_path: Path
) -> None:
    config = denoising_config(tmp_path)
    moments, seeds = some_moments(config, kind, 2), [1, 2]
    torch.manual_seed(2)
    embeds = torch.randn(2, *config.decoders[kind].prompt_embeds_shape)
    gradients = []
    for dtype, checkpointing in (
        (torch.float32, False),
        (torch.float32, True),
        (torch.bfloat16, True),
    ):
        given = embeds.clone().requires_grad_()
        denoiser = denoiser_of(kind, dtype=dtype, checkpointing=checkpointing)
        denoiser.loss(given, moments, seeds).backward()
        gradients.append(given.grad)
    assert torch.equal(gradients[0], gradients[1])
    assert (gradients[2] - gradients[0]).norm() < 0.05 * gradients[0].norm()


def test_denoising_pooled_embedding_counts_by_its_direction(tmp_path: Path) -> None:
    config, denoiser = denoising_config(tmp_path), denoiser_of("audio")
    moments, embeds = some_moments(config, "audio", 2), torch.randn(2, 16)
    losses = [denoiser.loss(factor * embeds, moments, [1, 2]) for factor in (1, 7)]
    torch.testing.assert_close(losses[0], losses[1])


def test_min_snr_weights_equal_their_definition() -> None:
    snr = alphas_float64() / (1 - alphas_float64())
    clamped = snr.clamp(max=5)
    expected = {
        "epsilon": torch.where(snr > 0, clamped / snr, 1),
        "v_prediction": clamped / (snr + 1),
        "sample": clamped,
    }
    for prediction, weights in expected.items():
        denoiser = denoiser_of("image", prediction, DenoisingSettings(snr_gamma=5.0))
        found = denoiser._weights(torch.arange(1000)).double()
        torch.testing.assert_close(found, weights, rtol=2e-3, atol=1e-6)
    unweighted = denoiser_of("image", "epsilon")._weights(torch.arange(1000))
    assert torch.equal(unweighted, torch.ones(1000))


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_denoising_condition_dropout_takes_the_empty_caption(
    kind: Modality, tmp_path: Path
) -> None:
    config = denoising_config(tmp_path)
    moments, seeds = some_moments(config, kind, 40), list(range(40))
    torch.manual_seed(3)
    embeds = torch.randn(40, *config.decoders[kind].prompt_embeds_shape, requires_grad=True)
    denoiser = denoiser_of(kind, settings=DenoisingSettings(condition_dropout=0.5))
    denoiser.loss(embeds, moments, seeds).backward()
    dropped = [not gradient.any() for gradient in embeds.grad]
    assert 8 < sum(dropped) < 32
    row = dropped.index(True)
    part = slice(row, row + 1)
    empty = denoiser.empty.expand(1, *embeds.shape[1:])
    alone = denoiser_of(kind).loss(empty, moments[part], seeds[part])
    found = denoiser.loss(embeds[part].detach(), moments[part], seeds[part])
    torch.testing.assert_close(found, alone)


def test_denoising_latents_are_sampled_or_means(tmp_path: Path) -> None:
    moments = some_moments(denoising_config(tmp_path), "image", 1)
    certain = torch.stack([moments[:, 0], torch.zeros_like(moments[:, 1])], dim=1)
    embeds = torch.randn(1, 12, 32)
    sampled, mean = (
        denoiser_of("image", settings=DenoisingSettings(samples_latents=samples))
        for samples in (True, False)
    )
    assert mean.loss(embeds, moments, [1]) == sampled.loss(embeds, certain, [1])
    assert mean.loss(embeds, moments, [1]) != sampled.loss(embeds, moments, [1])


def test_denoising_unknown_prediction_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "decoder"
    shutil.copytree(tiny_decoder("image"), folder)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(file.read_text().replace("v_prediction", "flow"))
    with pytest.raises(UserError, match="unknown prediction_type flow"):
        load_noise_schedule(folder)


# ---------------------------------------------------------------- latents of target media


@pytest.mark.parametrize("kind", KINDS)
def test_latents_of_the_mini_decoders_decode_to_the_medium(kind: Modality, tmp_path: Path) -> None:
    """Rounded to half precision, scaled as the UNet sees them."""
    config = load_config("mini")
    path = tmp_path / f"medium{MODALITIES[kind].suffix}"
    write_medium(path, kind, sample_object(np.random.default_rng(3)), seed=0)
    decoder = config.decoders[kind]
    space = latent_space(kind, project_path(decoder.path), decoder)
    loaded, vae = space.format.load(path), space.load_vae(CPU)
    moments = space.encode(vae, loaded)
    assert moments.shape == (2, *space.shape) and moments.dtype == torch.float16
    assert (moments[1] > 0).all()
    latents = moments[0].float() / space.scaling_factor
    frames = latents.transpose(0, 1) if kind == "video" else latents[None]
    with torch.no_grad():
        decoded = vae.decode(frames).sample
    difference = (decoded - space.format.vae_inputs(loaded)).abs().mean()
    assert difference < 0.08, difference  # pixels and log amplitudes are in -1..1


@pytest.mark.parametrize("kind", KINDS)
def test_mini_decoders_denoise_better_given_the_true_caption(
    kind: Modality, tmp_path: Path
) -> None:
    config = load_config("mini", 2)
    decoder, folder = config.decoders[kind], project_path(config.decoders[kind].path)
    space = latent_space(kind, folder, decoder)
    vae, rng = space.load_vae(CPU), np.random.default_rng(4)
    moments, captions = [], []
    for number in range(6):
        obj, path = sample_object(rng), tmp_path / f"{number}{MODALITIES[kind].suffix}"
        write_medium(path, kind, obj, seed=0)
        moments.append(space.encode(vae, space.format.load(path)))
        captions.append(sample_caption(obj, kind, rng))
    settings = replace(denoising_settings(config, kind), snr_gamma=None)
    denoiser = LatentDenoiser.load(kind, folder, settings, CPU, torch.float32)
    embeds = TextEncoder(kind, str(folder), CPU).encode(captions)
    with torch.no_grad():
        right, wrong = (
            sum(
                denoiser.loss(given, torch.stack(moments), range(n, n + 6)).item() / 18
                for n in (0, 6, 12)
            )
            for given in (embeds, embeds.roll(1, 0))
        )
    assert right < 0.9 * wrong and right < 0.3, (right, wrong)


def test_video_format_takes_frames_at_the_decoders_rate(tmp_path: Path) -> None:
    levels = np.arange(0, 250, 10)  # 25 frames, a second
    frames = [np.full((32, 48, 3), level, np.uint8) for level in levels]
    path = write_frames(tmp_path / "a.mp4", "libx264", frames)
    loaded = VideoFormat(16, 24, num_frames=6, fps=5).load(path)
    assert loaded.shape == (6, 16, 24, 3)
    shown = loaded.float().mean(dim=(1, 2, 3)).tolist()
    assert shown == pytest.approx([0, 50, 100, 150, 200, 240], abs=4)  # the last one stays


def test_image_format_scales_and_crops_to_the_centre(tmp_path: Path) -> None:
    pixels = np.zeros((40, 120, 3), np.uint8)
    pixels[:, 35:85] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    target = ImageFormat(16, 16)
    loaded = target.load(tmp_path / "a.png")
    assert loaded.shape == (1, 16, 16, 3) and loaded.min() == 255
    assert torch.equal(target.vae_inputs(loaded), torch.ones(1, 3, 16, 16))


def test_log_mel_equals_the_published_spectrogram() -> None:
    """Against transformers' implementation, with AudioLDM's settings."""
    samples_S = torch.randn(16000, generator=torch.Generator().manual_seed(0)) / 5
    log_mel = LogMel()
    filters = mel_filter_bank(513, 64, 0, 8000, 16000, norm="slaney", mel_scale="slaney")
    scaled = samples_S - samples_S.mean()
    scaled = scaled * (0.5 / scaled.abs().max())
    expected = spectrogram(
        np.pad(scaled.numpy(), (0, 320)),
        window_function(1024, "hann"),
        frame_length=1024,
        hop_length=160,
        power=1.0,
        center=True,
        pad_mode="reflect",
        mel_filters=filters,
        mel_floor=1e-5,
        log_mel="log",
    )
    found = log_mel.of_clip(samples_S, frames=102)
    assert found.shape == (102, 64)
    np.testing.assert_allclose(found.numpy(), expected.T[:102], rtol=1e-3, atol=1e-3)
    short = SpectrogramFormat(log_mel, 102)
    assert short.vae_inputs(found).shape == (1, 1, 102, 64)


def test_latents_are_cached_by_content_and_size(tmp_path: Path) -> None:
    config = denoising_config(tmp_path, stage=2)
    latents = open_target_latents(config)["image"]
    path = tmp_path / "a.png"
    Image.fromarray(np.full((20, 20, 3), 90, np.uint8)).save(path)
    content = latents.cache.identify(path)
    moments = torch.randn(2 * prod(latents.space.shape)).half().numpy()
    latents.cache.put_many([(content, moments)])
    np.testing.assert_array_equal(open_target_latents(config)["image"].cache.get(path), moments)
    assert (tmp_path / "latents.sqlite").is_file()
    folder = tmp_path / "decoder"
    shutil.copytree(tiny_decoder("image"), folder)
    vae = folder / "vae" / "config.json"
    vae.write_text(vae.read_text().replace('"scaling_factor": 1.0', '"scaling_factor": 2.0'))
    for other in ("decoders.image.height=24", f"decoders.image.path={folder}"):
        changed = open_target_latents(denoising_config(tmp_path, other, stage=2))["image"]
        assert changed.cache.get(path) is None
    Image.fromarray(np.full((20, 20, 3), 91, np.uint8)).save(path)
    assert open_target_latents(config)["image"].cache.get(path) is None


# ---------------------------------------------------------------- whole runs

MEDIA_AND_TEXT = (
    "data.datasets=[{name: mini_image_dec, limit: 7}, {name: mini_video_dec, limit: 7}, "
    "mini_audio_dec, {name: mini_question, limit: 3}]"
)


def denoising_run(folder: Path, *sets: str, world: int = 1, flags: tuple[str, ...] = ()) -> TinyRun:
    """A run of stage 3 in which some ranks and micro batches have no target media."""
    init = () if "--resume" in flags else from_stage(2)
    more = [*ONE_AT_A_TIME, MEDIA_AND_TEXT, WEIGHTS, "training.max_steps=6", *sets]
    return TinyRun(folder, 3, more, [*init, *flags], world=world)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """The run in one process."""
    return denoising_run(tmp_path_factory.mktemp("alone")).finish()


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("stage", "precision", "checkpointing"),
    [
        (3, "fp32", "true"),
        pytest.param(1, "fp32", "false", marks=SLOW),
        pytest.param(2, "bf16", "true", marks=SLOW),
        pytest.param(3, "bf16", "true", marks=SLOW),
        pytest.param(2, "fp16", "false", marks=SLOW),
    ],
)
def test_denoising_two_processes_have_the_losses_of_one(
    tmp_path: Path, alone: TinyRun, stage: int, precision: str, checkpointing: str
) -> None:
    sets = [
        zero(stage, tmp_path),
        f"training.precision={precision}",
        f"training.activation_checkpointing={checkpointing}",
    ]
    run = denoising_run(tmp_path, *sets, world=2).finish()
    tolerance = 1e-4 if precision == "fp32" else 2e-2
    for row, expected in zip(run.metrics, alone.metrics, strict=True):
        for name in filter(re.compile("loss|denoising_").match, expected):
            assert row[name] == pytest.approx(expected[name], rel=tolerance), name
    found = {name for row in alone.metrics for name in row if name.startswith("denoising_")}
    assert found == {f"denoising_{kind}" for kind in KINDS}


def test_denoising_resumes_bit_exactly_with_other_latents_cached(
    tmp_path: Path, alone: TinyRun
) -> None:
    """The first run encodes latents that the resumed one reads."""
    sets = ["training.save_steps=2", f"data.cache_dir={tmp_path / 'cache'}"]
    run = denoising_run(tmp_path, *sets)
    run.kill_when(lambda: len(run.metrics) >= 4)
    resumed = denoising_run(tmp_path, *sets, flags=("--resume",)).finish()
    assert "resumed after step" in resumed.output
    assert resumed.metrics == alone.metrics and same(resumed.delta, alone.delta)
    assert (tmp_path / "cache" / "latents.sqlite").is_file()


def test_denoising_leaves_out_and_counts_missing_media(tmp_path: Path) -> None:
    data = copied_data(tmp_path)
    images = media(data, "image")
    for file in images[::2]:
        file.unlink()
    shutil.rmtree(media(data, "video")[0].parent)
    sets = [f"data.data_dir={data}", WEIGHTS, "training.max_steps=2"]
    run = TinyRun(tmp_path, 2, sets, from_stage(1)).finish()
    missing = len(images[::2])
    assert f"mini_image_dec: {missing} of {len(images)} image target media are not in" in run.output
    assert "mini_video_dec: 24 of 24 video target media are not in" in run.output
    assert "mini_audio_dec" not in run.output.partition("steps of")[0]
    names = {name for row in run.metrics for name in row}
    assert "denoising_image" in names and "denoising_video" not in names
    assert {"alignment_video", "alignment_image"} <= names


def test_denoising_size_of_media_cannot_change_in_a_resumed_run(tmp_path: Path) -> None:
    run = denoising_run(tmp_path, "training.save_steps=1")
    run.kill_when(lambda: "step_000001" in run.checkpoints)
    frames = ("decoders.video.num_frames=2",)
    again = denoising_run(tmp_path, "training.save_steps=1", *frames, flags=("--resume",))
    assert "decoders.video.num_frames: 3 there, 2 now" in again.fail()


def test_denoising_with_cached_hidden_states_and_validation(tmp_path: Path) -> None:
    """Two processes with the cache agree with one without it."""
    sets = [MEDIA_AND_TEXT.replace(", {name: mini_question, limit: 3}", ""), WEIGHTS]
    sets += ["training.max_steps=4", "training.epochs=2", "data.validation.share=0.2"]
    sets += ["training.validate_steps=2"]
    plain = TinyRun(tmp_path / "plain", 4, sets, from_stage(3)).finish()
    sets = [*sets, "training.cache_hidden_states=true"]
    cached = TinyRun(tmp_path / "cached", 4, sets, from_stage(3), world=2).finish()
    for row, expected in zip(cached.metrics, plain.metrics, strict=True):
        shared = [n for n in expected if "denoising_" in n or "alignment_" in n]
        assert shared
        for name in shared:
            assert row[name] == pytest.approx(expected[name], rel=1e-4), name
    assert "validation_denoising_image" in cached.metrics[1]
