"""Metrics of generated media against closed forms, and their networks with tiny random weights."""

from math import log, log10
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cosine_similarity
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from nextgpt.common.errors import UserError
from nextgpt.config.loader import load_config
from nextgpt.evaluation.inception import InceptionV3, load_inception, resize_tensorflow
from nextgpt.evaluation.media_scores import (
    FRAMES,
    SCORERS,
    MediaSet,
    frechet_distance,
    inception_score,
    kl_divergence,
)
from nextgpt.evaluation.networks import MetricNetworks, read_frames, read_images
from nextgpt.evaluation.panns import Cnn14, load_panns
from nextgpt.media.transforms import read_audio
from nextgpt.media.writing import Frames
from tiny_metrics import CAPTIONS, tiny_networks, write_medium


def networks(**keys: str) -> MetricNetworks:
    sets = [f"evaluation.{key}={path}" for key, path in keys.items()]
    return MetricNetworks(load_config("7b", overrides=sets).evaluation, torch.device("cpu"))


@pytest.fixture(scope="module")
def all_networks() -> MetricNetworks:
    return networks(**tiny_networks())


# Closed forms.


def test_frechet_distance_of_shifted_features_is_the_squared_shift() -> None:
    features = torch.randn(50, 4, generator=torch.manual_seed(0))
    shifted = features + torch.tensor([1.0, 2.0, 0.0, 0.0])
    assert frechet_distance(features, shifted) == pytest.approx(5, abs=1e-4)
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-4)


def test_frechet_distance_of_scaled_features_is_that_of_their_deviations() -> None:
    """For S2 = 4 S1: tr(S1 + S2 - 2 (S1 S2)^(1/2)) = tr S1."""
    features = torch.randn(60, 3, generator=torch.manual_seed(1))
    features -= features.mean(dim=0)
    trace = features.var(dim=0).sum().item()
    assert frechet_distance(features, 2 * features) == pytest.approx(trace, rel=1e-4)
    assert frechet_distance(features[:1], features) is None


def test_inception_score_is_the_number_of_classes_that_are_told_apart() -> None:
    assert inception_score(torch.zeros(7, 5)) == pytest.approx(1)
    one_part = torch.eye(3).repeat(40, 1) * 100
    # Each of the ten random parts has all three classes in nearly equal numbers.
    assert inception_score(one_part) == pytest.approx(3, rel=0.1)


def test_kl_divergence_is_from_the_real_distribution() -> None:
    real, found = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    expected = 0.5 * log(0.5 / 0.25) + 0.5 * log(0.5 / 0.75)
    assert kl_divergence(real, found) == pytest.approx(expected, rel=1e-5)
    assert kl_divergence(real, real) == pytest.approx(0, abs=1e-9)


# Inception.


def test_inception_has_the_published_number_of_parameters() -> None:
    """torchvision's inception_v3 has 27,161,264, of which 3,326,696 in the auxiliary classifier."""
    with torch.device("meta"):
        network = InceptionV3(classes=1000)
    assert sum(p.numel() for p in network.parameters()) == 27_161_264 - 3_326_696


def test_resize_is_that_of_tensorflow_1() -> None:
    """Pixel i of n is at i · n / size, without half-pixel centres; the last one is repeated."""
    row = torch.tensor([[[[0.0, 10.0, 20.0]]]])
    found = resize_tensorflow(row, 6)[0, 0, 0]
    assert found.tolist() == pytest.approx([0, 5, 10, 15, 20, 20])


def test_inception_loads_from_its_file_and_refuses_others(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = InceptionV3().eval()
    state = network.state_dict()
    without = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    torch.save(without, tmp_path / "pt_inception.pth")  # as published before counters were saved
    images = [np.full((20, 30, 3), level, np.uint8) for level in (0, 200)]
    found = networks(inception=tmp_path / "pt_inception.pth").image_features(images)
    pixels = torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image in images])
    with torch.no_grad():
        assert torch.allclose(found, network(pixels), atol=1e-6)
    assert found.shape == (2, 2048)
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="pt_inception"):
        load_inception(tmp_path / "other.pth")


# PANNs.


def test_cnn14_has_the_published_number_of_parameters() -> None:
    """80,753,615 without the Fourier transform and the mel filters (arXiv 1912.10211)."""
    with torch.device("meta"):
        named = Cnn14().named_parameters()
    fixed = ("spectrogram_extractor", "logmel_extractor")
    assert sum(p.numel() for name, p in named if not name.startswith(fixed)) == 80_753_615


def test_cnn14_measures_mel_energies_in_decibel_at_the_frames_centres() -> None:
    """With one filter that sums all bins, and the first bin's transform alone: squared sums."""
    network = Cnn14()
    stft = network.spectrogram_extractor.stft
    with torch.no_grad():
        stft.conv_real.weight.zero_()[0] = 1
        stft.conv_imag.weight.zero_()
        network.logmel_extractor.melW[:, 0] = 1
        samples = torch.randn(1, 8000, generator=torch.manual_seed(0))
        found = network.log_mel(samples)
    assert found.shape == (1, 51, 64)
    window = samples[0, 5 * 160 - 256 : 5 * 160 + 256]
    assert found[0, 5, 0] == pytest.approx(20 * log10(abs(window.sum().item())), abs=1e-3)
    assert found[0, 5, 1] == pytest.approx(-100)  # nothing: the floor


def test_cnn14_loads_from_its_file_and_refuses_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nextgpt.evaluation.panns.WIDTHS", (4,) * 6)  # 300 MB otherwise
    torch.manual_seed(0)
    network = Cnn14().eval()
    torch.save({"model": network.state_dict(), "iteration": 3}, tmp_path / "Cnn14.pth")
    files = media_files("audio", tmp_path)
    found = networks(audio_tagger=tmp_path / "Cnn14.pth").audio_features(files)
    with torch.no_grad():
        expected = network(torch.stack([read_audio(file) for file in files]))
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    assert [one.shape for one in found] == [(3, 4), (3, 527)]
    torch.save({"model": {"fc1.bias": torch.zeros(2)}}, tmp_path / "other.pth")
    torch.save([1], tmp_path / "list.pth")
    for name, fault in (("other.pth", "Cnn14_16k"), ("list.pth", "no checkpoint of PANNs")):
        with pytest.raises(UserError, match=fault):
            load_panns(tmp_path / name)


# Scores with networks.


def media_files(modality: str, folder: Path, first: int = 0) -> list[Path]:
    suffix = {"image": ".png", "video": ".mp4", "audio": ".wav"}[modality]
    return [
        write_medium(modality, folder / f"{number}{suffix}", number)
        for number in range(first, first + 3)
    ]


@pytest.mark.parametrize(
    ("modality", "distances"), [("image", ["FID"]), ("video", ["FID"]), ("audio", ["FD", "KL"])]
)
def test_distances_of_media_to_themselves_are_zero(
    modality: str, distances: list[str], all_networks: MetricNetworks, tmp_path: Path
) -> None:
    files, others = media_files(modality, tmp_path), media_files(modality, tmp_path, 10)
    captions = CAPTIONS[:3]
    same = SCORERS[modality](MediaSet(files, files, captions), all_networks)
    other = SCORERS[modality](MediaSet(others, files, captions), all_networks)
    for name in distances:
        assert same[name] == pytest.approx(0, abs=1e-5)
        assert other[name] > same[name]


def test_clip_score_is_a_hundred_times_the_mean_positive_cosine(
    all_networks: MetricNetworks, tmp_path: Path
) -> None:
    files, folder = media_files("image", tmp_path), tiny_networks()["clip"]
    model, tokenizer = CLIPModel.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    expected = []
    for file, caption in zip(files, CAPTIONS, strict=False):
        pixels = processor(images=Image.open(file), return_tensors="pt")
        with torch.no_grad():
            output = model(**pixels, **tokenizer(caption, return_tensors="pt"))
        expected.append(cosine_similarity(output.image_embeds, output.text_embeds).item())
    assert min(expected) < 0 < max(expected)
    scores = SCORERS["image"](MediaSet(files, files, CAPTIONS[:3]), all_networks)
    clipped = [max(one, 0) for one in expected]
    assert scores["CLIPScore"] == pytest.approx(100 * sum(clipped) / 3, rel=1e-4)


def test_clipsim_is_the_mean_cosine_over_evenly_spaced_frames(
    all_networks: MetricNetworks, tmp_path: Path
) -> None:
    (file, *_) = media_files("video", tmp_path)
    frames = list(read_frames([file], FRAMES))
    cosines = all_networks.image_embeddings(frames) @ all_networks.image_captions(CAPTIONS[:1]).T
    scores = SCORERS["video"](MediaSet([file], [file], CAPTIONS[:1]), all_networks)
    assert scores["CLIPSIM"] == pytest.approx(cosines.mean().item(), rel=1e-5)
    assert scores["FID"] == pytest.approx(0, abs=1e-4)


def test_frames_are_evenly_spaced_from_the_first_on(tmp_path: Path) -> None:
    levels = [20 * number for number in range(12)]
    frames = np.stack([np.full((32, 32, 3), level, np.uint8) for level in levels])
    Frames(frames, 4).save(tmp_path / "v.mp4")
    found = [int(frame.mean().round()) for frame in read_frames([tmp_path / "v.mp4"], 4)]
    assert found == pytest.approx([0, 60, 120, 180], abs=3)


def test_clap_score_and_features_use_both_networks(
    all_networks: MetricNetworks, tmp_path: Path
) -> None:
    files = media_files("audio", tmp_path)
    scores = SCORERS["audio"](MediaSet(files, files, CAPTIONS[:3]), all_networks)
    found = all_networks.audio_embeddings(files) * all_networks.audio_captions(CAPTIONS[:3])
    assert scores["CLAP score"] == pytest.approx(found.sum(-1).mean().item(), rel=1e-5)
    features, logits = all_networks.audio_features(files)
    head = all_networks._tagger.classifier
    assert torch.allclose(head(features), logits, atol=1e-5)


def test_sentence_embeddings_do_not_depend_on_padding(all_networks: MetricNetworks) -> None:
    alone = all_networks.sentence_embeddings(CAPTIONS[:1])
    padded = all_networks.sentence_embeddings([CAPTIONS[0], CAPTIONS[2] + " " + CAPTIONS[1]])
    assert torch.allclose(alone[0], padded[0], atol=1e-5)
    assert alone.norm(dim=-1).tolist() == pytest.approx([1])


def test_networks_that_are_null_leave_their_metrics_out(tmp_path: Path) -> None:
    files = media_files("image", tmp_path)
    media = MediaSet(files, files, CAPTIONS[:3])
    assert SCORERS["image"](media, networks()) == {}
    only = networks(clip=tiny_networks()["clip"])
    assert SCORERS["image"](media, only).keys() == {"CLIPScore"}
    with pytest.raises(UserError, match=r"evaluation\.inception is null"):
        networks().image_features(read_images(files))
    with pytest.raises(UserError, match="nowhere"):
        networks(clip="/nowhere/clip").image_captions(["a"])
