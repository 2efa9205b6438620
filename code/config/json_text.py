"""JSON text that every reader takes: Python's own writer puts `NaN` and `Infinity` into it."""

import json
import math
from typing import Any


def to_json(value: Any, *, indent: int | None = None, ensure_ascii: bool = True) -> str:
    """Serialize `value` to JSON (RFC 8259); floats that are not finite become `null`.

    Raises:
        TypeError: it holds what JSON has not, e.g. a path.
    """
    return json.dumps(_finite(value), indent=indent, ensure_ascii=ensure_ascii, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value
