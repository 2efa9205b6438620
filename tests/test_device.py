"""The precision of a run: bf16 only with hardware support."""

from types import SimpleNamespace

import pytest
import torch

from nextgpt.common.device import choose_dtype
from nextgpt.common.errors import UserError
from nextgpt.mini_world.component_training.runner import bf16_autocast
from nextgpt.tools.memory_estimate import estimate_memory
from tiny_system import tiny_config

GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of this compute capability, on which torch would emulate bf16."""
    major, minor = request.param
    properties = SimpleNamespace(major=major, minor=minor, name="a GPU", total_memory=24e9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda _: True)


def on(*capabilities: tuple[int, int]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("capability", capabilities, indirect=True)


@on((7, 0), (7, 5))
@pytest.mark.usefixtures("capability")
def test_choose_dtype_emulated_bf16_selects_fp16_and_refuses_bf16() -> None:
    assert choose_dtype("auto", GPU) == choose_dtype("fp16", GPU) == torch.float16
    assert choose_dtype("fp32", GPU) == torch.float32
    with pytest.raises(UserError, match=r"training.precision bf16: .* set it to auto or fp16"):
        choose_dtype("bf16", GPU)
    assert ", float16," in estimate_memory(tiny_config(1), 1, 1).summary


@on((8, 0), (8, 9), (9, 0))
@pytest.mark.usefixtures("capability")
def test_choose_dtype_native_bf16_is_selected() -> None:
    assert choose_dtype("auto", GPU) == choose_dtype("bf16", GPU) == torch.bfloat16
    assert ", bfloat16," in estimate_memory(tiny_config(1), 1, 1).summary


@on((8, 0))
@pytest.mark.usefixtures("capability")
def test_choose_dtype_agrees_across_mixed_gpus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first GPU decides, even for a process on a second GPU without bf16."""
    known = {0: SimpleNamespace(major=8), 1: SimpleNamespace(major=7)}
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", known.__getitem__)
    assert choose_dtype("auto", torch.device("cuda", 1)) == torch.bfloat16


@on((7, 5))
@pytest.mark.usefixtures("capability")
def test_choose_dtype_amd_gpus_support_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert choose_dtype("auto", GPU) == torch.bfloat16


@pytest.mark.parametrize(
    ("flags", "chosen"),
    [
        ({}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
    ],
)
def test_choose_dtype_cpu_uses_bf16_if_fast_or_requested(
    flags: dict[str, bool], chosen: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    assert choose_dtype("auto", CPU) == chosen
    assert choose_dtype("bf16", CPU) == torch.bfloat16
    with bf16_autocast(CPU):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == chosen
