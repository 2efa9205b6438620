"""Strategies of all properties: damaged bytes, and JSON with wrong values in wrong places."""

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hypothesis import strategies as st

from nextgpt.common.errors import shorten

Draw = Callable[[st.SearchStrategy], Any]

# Written in place of strings, because Python does not serialize the values.
_RAW = {
    '"@digits"': b"9" * 5000,
    **{f'"@nested {depth}"': b"[" * depth + b"]" * depth for depth in (100, 900, 980, 3000)},
    '"@objects"': b'{"a":' * 3000 + b"1" + b"}" * 3000,
    '"@infinity"': b"1e400",
    '"@nan"': b"NaN",
    '"@invalid"': b'"\xff\xc3"',
}
WRONG_VALUES = [
    None, True, 0, -1, 2.5, 10**30, "", " ", [], {}, [None], [[]], {"a": 1}, [{}], "\x00", "a\x00b",
    "\ud800", "a\udc00b", "\ud83d \ude00", "\U0001f600", "<image>", "<video> <video>", "text",
    "image", "gpt", "../1.png", "/etc/passwd", ".", "a" * 300 + ".png", "a/" * 3000 + "1.png",
    "word " * 5_000, " " * 2000, "<image>" * 200, *(raw.strip('"') for raw in _RAW),
]  # fmt: skip
_scalars = st.sampled_from(WRONG_VALUES) | st.integers() | st.floats() | st.text(max_size=20)
json_values = st.recursive(
    _scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


class Content(bytes):
    """Bytes that are shortened in messages."""

    def __repr__(self) -> str:
        return shorten(super().__repr__())


def to_bytes(value: Any) -> bytes:
    """The JSON text of `value`, with the values that Python does not serialize."""
    text = json.dumps(value).encode()
    for marker, raw in _RAW.items():
        text = text.replace(marker.encode(), raw)
    return text


@st.composite
def changed_json(draw: Draw, seed: Any, names: Sequence[str]) -> Any:
    """`seed` with one to three changes of values and keys; `names`: further keys that mean much."""
    value = copy.deepcopy(seed)
    for _ in range(draw(st.integers(1, 3))):
        holders = [one for one in _containers(value) if one]
        if not holders:
            break
        holder = draw(st.sampled_from(holders))
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        key = draw(st.sampled_from(keys))
        how = draw(st.sampled_from(["replace", "replace", "remove", "repeat", "wrap", "rename"]))
        if how == "replace":
            holder[key] = copy.deepcopy(draw(json_values))
        elif how == "remove":
            del holder[key]
        elif how == "wrap":
            old = holder[key]
            holder[key] = draw(st.sampled_from([[old], {"value": old}, [old] * 50]))
        elif isinstance(holder, list):
            holder.insert(draw(st.integers(0, len(holder))), copy.deepcopy(holder[key]))
        else:
            name = draw(st.sampled_from([*names, *holder, "x" * 10_000, "\ud800"]))
            holder[name] = holder.pop(key) if how == "rename" else copy.deepcopy(draw(json_values))
    return value


def _containers(value: Any) -> Iterator[dict | list]:
    """All dictionaries and lists in a value of JSON."""
    if isinstance(value, dict | list):
        yield value
        for item in value.values() if isinstance(value, dict) else value:
            yield from _containers(item)


@st.composite
def json_files(draw: Draw, seeds: Sequence[Any], names: Sequence[str]) -> bytes:
    """The text of one of `seeds` with changed values, or with damaged bytes."""
    seed = draw(st.sampled_from(seeds))
    if draw(st.integers(0, 3)):
        return to_bytes(draw(changed_json(seed, names)))
    return draw(damaged(to_bytes(seed)))


@st.composite
def damaged(draw: Draw, content: bytes) -> bytes:
    """`content` after one to four changes of its bytes."""
    for _ in range(draw(st.integers(1, 4))):
        content = draw(st.sampled_from(_CHANGES))(draw, content)
    return Content(content)


def _span(draw: Draw, content: bytes, longest: int) -> tuple[int, int]:
    start = draw(st.integers(0, len(content)))
    return start, min(len(content), start + draw(st.integers(0, longest)))


def _truncate(draw: Draw, content: bytes) -> bytes:
    return content[: draw(st.integers(0, len(content)))]


def _overwrite(draw: Draw, content: bytes) -> bytes:
    """Up to 200 bytes; damage often lies in the first."""
    last = draw(st.sampled_from([min(256, len(content)), len(content)]))
    start, new = draw(st.integers(0, last)), draw(st.binary(min_size=1, max_size=200))
    return content[:start] + new + content[start + len(new) :]


def _insert(draw: Draw, content: bytes) -> bytes:
    start = draw(st.integers(0, len(content)))
    marks = st.sampled_from([*(bytes([b]) for b in b'{}[],:"\\\n\x00\x80\xc3\xed\xff')])
    return content[:start] + draw(marks | st.binary(max_size=2000)) + content[start:]


def _delete(draw: Draw, content: bytes) -> bytes:
    start, end = _span(draw, content, draw(st.sampled_from([4, len(content)])))
    return content[:start] + content[end:]


def _repeat(draw: Draw, content: bytes) -> bytes:
    start, end = _span(draw, content, len(content))
    return content[:end] + content[start:end] * draw(st.integers(1, 3)) + content[end:]


def _move(draw: Draw, content: bytes) -> bytes:
    a, b, c = sorted(draw(st.integers(0, len(content))) for _ in range(3))
    return content[:a] + content[b:c] + content[a:b] + content[c:]


def _enlarge(draw: Draw, content: bytes) -> bytes:
    """Set an aligned field of the first 256 bytes, or of the last 2048, to a large number."""
    at = draw(st.integers(0, 128)) * 2
    if draw(st.booleans()):
        at = max(0, len(content) - 1 - draw(st.integers(0, 2047)))
    size = draw(st.sampled_from([2, 4, 8]))
    value = (1 << draw(st.integers(6, 8 * size - 1))) - draw(st.integers(0, 1))
    field = value.to_bytes(size, draw(st.sampled_from(["little", "big"])))
    return content[:at] + field + content[at + size :]


def _mark(_: Draw, content: bytes) -> bytes:
    return b"\xef\xbb\xbf" + content


_CHANGES = [_truncate, _overwrite, _insert, _delete, _repeat, _move, _enlarge, _mark]
