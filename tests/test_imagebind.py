"""ImageBind against recorded features and published names, and its files."""

import json
import os
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nextgpt.common.errors import UserError
from nextgpt.common.file_digests import DigestCache
from nextgpt.model.imagebind.encoder import IMAGEBIND_HUGE, ImageBind, ImageBindConfig, TrunkConfig
from nextgpt.model.imagebind.loading import fingerprint as encoder_fingerprint
from nextgpt.model.imagebind.loading import is_left_out, load_imagebind, save_imagebind
from parity_tools import PARITY, cases, fill_by_recipe, relative_error
from record_full_size import RECORD, full_size_features

TINY = ImageBindConfig(
    vision=TrunkConfig(width=64, blocks=2, heads=4),
    audio=TrunkConfig(width=48, blocks=2, heads=4),
    output_dim=32,
)
PUBLISHED = {
    name: tuple(shape)
    for name, shape in json.loads((PARITY / "imagebind_huge_keys.json").read_text()).items()
}


@pytest.fixture(scope="module")
def tiny() -> ImageBind:
    model = ImageBind(TINY).eval()
    fill_by_recipe(model, "visual_encoder.")
    return model


def published_file(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """Write the full file's names and shapes in a few kilobytes: every tensor repeats one value."""
    torch.save({name: torch.ones(()).expand(shape) for name, shape in shapes.items()}, path)
    return path


@pytest.mark.parametrize("modality", ["image", "video", "audio"])
def test_imagebind_features_equal_the_recorded(tiny: ImageBind, modality: str) -> None:
    with torch.no_grad():
        features = tiny.encode(modality, cases()[f"in.{modality}"].float())
    assert relative_error(features, cases()[f"imagebind.{modality}"]) < 1e-5


def test_imagebind_views_have_unit_norm_and_videos_their_mean(tiny: ImageBind) -> None:
    clips = cases()["in.video"].float()[:1]
    with torch.no_grad():
        views = tiny.forward_views("video", clips[0])
        video = tiny.encode("video", clips)
    torch.testing.assert_close(views.norm(dim=-1), torch.ones(len(views)))
    torch.testing.assert_close(video[0], views.mean(0))


def test_imagebind_huge_has_the_published_names_and_shapes() -> None:
    with torch.device("meta"):
        model = ImageBind(IMAGEBIND_HUGE)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == {name: shape for name, shape in PUBLISHED.items() if not is_left_out(name)}


@pytest.mark.slow
def test_imagebind_huge_features_equal_the_recorded() -> None:
    """This project's encoder recorded them: see record_full_size.py."""
    recorded = load_file(RECORD)
    for modality, features in full_size_features().items():
        assert features.shape == (1, 1024)
        assert relative_error(features, recorded[modality]) < 1e-4, modality


def test_imagebind_leaves_out_text_depth_thermal_and_imu() -> None:
    kept = {name.split(".")[1] for name in PUBLISHED if not is_left_out(name)}
    left_out = {name.split(".")[1] for name in PUBLISHED if is_left_out(name)}
    assert kept == {"vision", "audio"}
    assert left_out == {"text", "depth", "thermal", "imu"}


def test_imagebind_published_file_loads_by_file_or_folder(tmp_path: Path) -> None:
    path = published_file(tmp_path / "imagebind_huge.pth", PUBLISHED)
    for given in (path, tmp_path):
        model = load_imagebind(given)
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert all(tensor.flatten()[0] == 1 for tensor in model.state_dict().values())


def test_imagebind_published_file_with_wrong_names_lists_them(tmp_path: Path) -> None:
    wrong = dict(PUBLISHED)
    wrong["modality_heads.visual.2.weight"] = wrong.pop("modality_heads.vision.2.weight")
    wrong["modality_heads.audio.2.weight"] = (512, 768)
    path = published_file(tmp_path / "imagebind_huge.pth", wrong)
    with pytest.raises(UserError) as raised:
        load_imagebind(path)
    message = str(raised.value)
    assert "3 faults" in message
    assert "missing modality_heads.vision.2.weight" in message
    assert "unexpected modality_heads.visual.2.weight" in message
    assert "modality_heads.audio.2.weight: shape (512, 768), expected (1024, 768)" in message


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 0.0), (torch.float16, 2e-3)])
def test_imagebind_save_and_load_round_trip(
    tiny: ImageBind, tmp_path: Path, dtype: torch.dtype, tolerance: float
) -> None:
    save_imagebind(tiny, tmp_path / "mini", dtype)
    loaded = load_imagebind(tmp_path / "mini")
    assert loaded.config == TINY
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float32}
    stored = load_file(tmp_path / "mini" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    assert sorted(path.name for path in (tmp_path / "mini").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    with torch.no_grad():
        views = cases()["in.image"]
        error = relative_error(loaded.encode("image", views), tiny.encode("image", views))
    assert error <= tolerance


def test_imagebind_fingerprint_depends_on_weights_and_config_only(
    tiny: ImageBind, tmp_path: Path
) -> None:
    fingerprint = partial(encoder_fingerprint, digests=DigestCache(tmp_path / "cache"))
    for name in ("a", "b"):
        save_imagebind(tiny, tmp_path / name, torch.float16)
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")

    weights = tmp_path / "b" / "model.safetensors"
    save_file({name: tensor * 1.01 for name, tensor in load_file(weights).items()}, weights)
    assert fingerprint(tmp_path / "a") != fingerprint(tmp_path / "b")

    before = fingerprint(tmp_path / "a")
    config = tmp_path / "a" / "config.json"
    config.write_text(config.read_text().replace('"heads": 4', '"heads": 2'))
    assert fingerprint(tmp_path / "a") != before


def test_imagebind_fingerprint_depends_on_every_byte_of_large_files(
    tiny: ImageBind, tmp_path: Path
) -> None:
    """Even with unchanged size and modification time, as after `cp -p`."""
    save_imagebind(tiny, tmp_path, torch.float16)
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights) | {"padding": torch.zeros(3 << 20)}
    save_file(tensors, weights)
    size, times = weights.stat().st_size, weights.stat().st_mtime_ns
    digests = DigestCache(tmp_path / "cache")
    seen = {encoder_fingerprint(tmp_path, digests)}
    offsets = range(9, size, size // 50)
    for offset in offsets:
        with weights.open("r+b") as file:
            file.seek(offset)
            byte = file.read(1)
            file.seek(offset)
            file.write(bytes([byte[0] ^ 1]))
        os.utime(weights, ns=(times, times))
        seen.add(encoder_fingerprint(tmp_path, digests))
    assert weights.stat().st_size == size and len(seen) == 1 + len(offsets)


def test_imagebind_missing_files_name_the_expected_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"imagebind_huge\.pth"):
        load_imagebind(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"not an archive", b"PK\x03\x04 cut off"],
    ids=["empty", "text", "truncate"],
)
def test_imagebind_unreadable_published_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "imagebind_huge.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match="download or build it again"):
        load_imagebind(path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "not the configuration"),
        ("[]", "not the configuration"),
        ('{"vision": {"width": 64}}', "not the configuration"),
        (json.dumps({**asdict(TINY), "pixels": 224}), "pixels"),
        (None, "No such file"),
    ],
)
def test_imagebind_bad_config_is_named(
    tiny: ImageBind, tmp_path: Path, content: str | None, expected: str
) -> None:
    save_imagebind(tiny, tmp_path, torch.float16)
    config = tmp_path / "config.json"
    if content is None:
        config.unlink()
    else:
        config.write_text(content)
    with pytest.raises(UserError, match=expected):
        load_imagebind(tmp_path)


def test_imagebind_truncated_weight_file_is_named(tiny: ImageBind, tmp_path: Path) -> None:
    save_imagebind(tiny, tmp_path, torch.float16)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_imagebind(tmp_path)
