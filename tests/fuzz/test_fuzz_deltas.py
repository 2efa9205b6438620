"""Damaged and hostile files of tuned parameters: loaded, or an error that names the file.

Code in a pickle is never executed, and no memory is allocated for what a header claims.
"""

import json
import pickle
import re
import zipfile
from collections.abc import Callable
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from fuzz_oracle import REFUSED, examples, outcome
from fuzz_strategies import Content, Draw, changed_json, damaged
from nextgpt.model.build import build_model
from nextgpt.model.delta import load_delta, read_delta
from nextgpt.model.nextgpt import NextGPT
from nextgpt.model.trainable import tuned_parameters
from nextgpt.model.upstream_checkpoint import Tensors, delta_to_published
from tiny_system import tiny_config

pytestmark = pytest.mark.filterwarnings(
    "ignore:Detected pickle protocol", "ignore:torch.quantize_per_tensor"
)
DTYPES = [
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8,
    torch.bool, torch.complex64, torch.float8_e4m3fn,
]  # fmt: skip
HEADER_NAMES = ["__metadata__", "vocabulary_size", "dtype", "shape", "data_offsets"]


@cache
def model() -> NextGPT:
    return build_model(tiny_config(), torch.float32, lora=False, output_projections=False)


def tuned(*, base: bool) -> Tensors:
    return {n: p.detach().clone() for n, p in tuned_parameters(model(), base_vocabulary=base)}


def to_safetensors(tensors: Tensors) -> bytes:
    return save(tensors, {"vocabulary_size": str(model().base_vocabulary_size)})


def to_torch(content: Any, *, is_zip: bool = True) -> bytes:
    file = BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=is_zip)
    return file.getvalue()


@cache  # their bytes differ from call to call
def valid_files() -> tuple[bytes, list[bytes]]:
    """A file of ours, and published ones of torch's present and its earlier format."""
    published = delta_to_published(tuned(base=True))
    written = [to_torch(published, is_zip=is_zip) for is_zip in (True, False)]
    return to_safetensors(tuned(base=False)), written


@st.composite
def safetensors_files(draw: Draw) -> bytes:
    """Damaged bytes, or a header with changed values."""
    content, _ = valid_files()
    if draw(st.booleans()):
        return draw(damaged(content))
    length = int.from_bytes(content[:8], "little")
    header = draw(changed_json(json.loads(content[8 : 8 + length]), HEADER_NAMES))
    text = json.dumps(header).encode()
    return Content(len(text).to_bytes(8, "little") + text + content[8 + length :])


@st.composite
def torch_files(draw: Draw) -> bytes:
    """Damaged bytes, or a whole archive with a damaged member."""
    content = draw(st.sampled_from(valid_files()[1]))
    if draw(st.booleans()) or not zipfile.is_zipfile(BytesIO(content)):
        return draw(damaged(content))
    source = zipfile.ZipFile(BytesIO(content))
    members = {name: source.read(name) for name in source.namelist()}
    name = draw(st.sampled_from([name for name in members if "/data/" not in name]))
    members[name] = draw(damaged(members[name]))
    return archive(members, draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])))


def archive(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = BytesIO()
    with zipfile.ZipFile(file, "w", compression) as target:
        for name, content in members.items():
            target.writestr(name, content)
    return Content(file.getvalue())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("deltas")


def load(path: Path) -> None:
    load_delta(model(), read_delta(path), {"input_projection", "vocabulary"})


def loaded(name: str, path: Path, content: bytes) -> str:
    path.unlink(missing_ok=True)  # tensors of an earlier one may still be mapped
    path.write_bytes(content)
    return outcome(name, lambda: load(path), path)


@examples(80)
@given(content=safetensors_files())
def test_damaged_safetensors_are_loaded_or_refused(folder: Path, content: bytes) -> None:
    loaded("safetensors", folder / "delta.safetensors", content)


@examples(80)
@given(content=torch_files())
def test_damaged_torch_files_are_loaded_or_refused(folder: Path, content: bytes) -> None:
    loaded("torch file", folder / "pytorch_model.pt", content)


def test_torch_file_with_another_storage_key_is_refused(folder: Path) -> None:
    content = re.sub(rb"X(.\0\0\0)\d(\d{8,})", rb"X\g<1>0\g<2>", valid_files()[1][1], count=1)
    assert content != valid_files()[1][1]
    assert loaded("storage key", folder / "pytorch_model.pt", content) == REFUSED


def test_archive_that_unfolds_to_more_than_its_size_is_refused(folder: Path) -> None:
    members = {"a/data.pkl": bytes(300 << 20), "a/version": b"3\n"}
    content = archive(members, zipfile.ZIP_DEFLATED)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
    before = peak_memory()
    assert loaded("bomb", folder / "pytorch_model.pt", content) == REFUSED
    assert peak_memory() - before < 100 << 20


def peak_memory() -> int:
    """Highest resident memory of this process in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def as_parameter(tensor: Tensor) -> Any:
    return torch.nn.Parameter(tensor, requires_grad=False)


WRONG_TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "parameter": as_parameter,
    "sparse": lambda t: t.to_sparse(),
    "on the meta device": lambda t: t.to("meta"),
    "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "scalar": lambda t: t.flatten()[0].clone(),
    "empty": lambda t: t[:0],
    "one row": lambda t: t[:1],
    "one row more": lambda t: torch.cat([t, t[:1]]),
    "flat": lambda t: t.flatten(),
    "transposed": lambda t: t.T.contiguous() if t.ndim == 2 else t,
    "expanded": lambda t: t.flatten()[:1].expand(1 << 40),
    "strided": lambda t: torch.as_strided(t.flatten(), (len(t),), (0,)),
    "a number": lambda t: 1.0,
    "a list": lambda t: [t],
    "nothing": lambda t: None,
    **{str(dtype): lambda t, dtype=dtype: t.to(dtype) for dtype in DTYPES},
}
NEVER_LOADED = {
    "sparse", "on the meta device", "quantized", "scalar", "expanded", "a number", "a list",
    "nothing", "torch.int64", "torch.uint8", "torch.bool", "torch.complex64",
}  # fmt: skip


@examples(80)
@example(True, "scalar", 0, None)
@example(False, "torch.int64", 0, None)
@example(False, "torch.complex64", 0, None)
@example(True, "sparse", 0, None)
@example(True, "on the meta device", 0, None)
@given(
    published=st.booleans(),
    change=st.sampled_from(sorted(WRONG_TENSORS)),
    key=st.integers(0, 3),
    name=st.sampled_from([None, None, None, "", "x", "\x00", "llama_proj.mm_a", 3, None, ("a",)]),
)
def test_wrong_tensors_are_loaded_or_refused(
    folder: Path, published: bool, change: str, key: int, name: Any
) -> None:
    tensors: dict = tuned(base=published)
    tensors = delta_to_published(tensors) if published else tensors
    old = sorted(tensors)[key % len(tensors)]
    tensor = tensors.pop(old)
    tensors[old if name is None else name] = WRONG_TENSORS[change](tensor)
    try:
        content = to_torch(tensors) if published else to_safetensors(tensors)
    except Exception:  # noqa: BLE001 not all can be written
        return
    path = folder / ("pytorch_model.pt" if published else "delta.safetensors")
    result = loaded(f"tensors, {path.suffix}", path, content)
    assert result == REFUSED or change not in NEVER_LOADED


class Code:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def hostile(canary: Path) -> dict[str, Code]:
    """Calls that create the file `canary`."""
    import os
    import shutil
    import subprocess

    line = f"open({str(canary)!r}, 'w').close()"
    return {
        "os.system": Code(os.system, f"touch {canary}"),
        "subprocess": Code(subprocess.call, ["touch", str(canary)]),
        "eval": Code(eval, line),
        "exec": Code(exec, line),
        "open": Code(open, str(canary), "w"),
        "mkdir": Code(os.mkdir, str(canary)),
        "copy": Code(shutil.copyfile, __file__, str(canary)),
        "torch.save": Code(torch.save, 1, str(canary)),
        "Path.touch": Code(Path.touch, canary),
    }


@examples(30)
@given(
    call=st.sampled_from(sorted(hostile(Path()))),
    form=st.sampled_from(["zip", "pickle", "torch before 1.6"]),
    suffix=st.sampled_from([".pt", ".safetensors", ".bin"]),
    protocol=st.integers(0, 5),
)
def test_pickled_code_is_never_executed(
    folder: Path, call: str, form: str, suffix: str, protocol: int
) -> None:
    canary = folder / "canary"
    code = {"llama_proj.weight": hostile(canary)[call]}
    content = pickle.dumps(code, protocol)
    if form == "zip":
        content = archive({"a/data.pkl": content, "a/version": b"3\n", "a/byteorder": b"little"})
    elif form == "torch before 1.6":
        numbers = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
        content = b"".join(pickle.dumps(number, 2) for number in numbers) + content
    assert loaded("code", folder / f"code{suffix}", content) == REFUSED
    assert not canary.exists()
