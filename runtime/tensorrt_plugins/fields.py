"""A plugin's attributes and what it serialises, as TensorRT's plugin fields: one-dimensional arrays with a name.

The ONNX parser passes an int as INT32 (a larger one silently becomes 0), a float as FLOAT32, a string as CHAR with a
zero at its end; an absent attribute as no field at all, with a warning in the log.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.errors import BackendError
from runtime.kernels.cuda.launch import DeviceLimits
from runtime.tensorrt_plugins.signature import Attributes, Signature

_KINDS: Mapping[type, tuple[str, type[np.generic]]] = {
    int: ("INT64", np.int64),
    float: ("FLOAT32", np.float32),
    str: ("CHAR", np.int8),
}
_ASKED: Mapping[type, tuple[str, type[np.generic]]] = {**_KINDS, int: ("INT32", np.int32)}
_LIMITS = ("planned_multiprocessors", "planned_shared_bytes", "planned_major", "planned_minor")


def names_asked_for(trt: Any, signature: Signature) -> Any:
    """The PluginFieldCollection by which the parser learns which attributes to pass."""
    return trt.PluginFieldCollection(
        [
            trt.PluginField(name, np.array([], _ASKED[kind][1]), getattr(trt.PluginFieldType, _ASKED[kind][0]))
            for name, kind in signature.attributes.items()
        ]
    )


def read_attributes(signature: Signature, fields: Iterable[Any]) -> Attributes:
    """A node's attributes out of plugin fields. Raises BackendError if one is missing."""
    given = {field.name: field.data for field in fields}
    found: dict[str, int | float | str] = {}
    for name, kind in signature.attributes.items():
        if name in given:
            found[name] = _value(given[name], kind)
        elif name in signature.defaults:
            found[name] = signature.defaults[name]
        else:
            raise BackendError(f"{signature.name} has no attribute {name!r}. Export the bundle again.")
    return found


def read_limits(fields: Iterable[Any]) -> DeviceLimits:
    """The device that a serialised plugin was planned for. Raises BackendError if it does not say."""
    given = {field.name: field.data for field in fields}
    missing = [name for name in _LIMITS if name not in given]
    if missing:
        raise BackendError(f"The plan holds a plugin without {', '.join(missing)}. Build the engine again.")
    multiprocessors, shared_bytes, major, minor = (int(_value(given[name], int)) for name in _LIMITS)
    return DeviceLimits(multiprocessors, shared_bytes, (major, minor))


def serialized(attributes: Attributes, planned: DeviceLimits) -> dict[str, tuple[str, npt.NDArray[Any]]]:
    """All that a plugin is made of, by name: a PluginFieldType and an array."""
    limits = (planned.multiprocessors, planned.shared_bytes, *planned.compute_capability)
    values = {**attributes, **dict(zip(_LIMITS, limits, strict=True))}
    return {name: (_KINDS[type(value)][0], _array(value)) for name, value in values.items()}


def _array(value: int | float | str) -> npt.NDArray[Any]:
    if isinstance(value, str):
        return np.frombuffer(value.encode() + b"\0", np.int8).copy()
    return np.array([value], _KINDS[type(value)][1])


def _value(data: Any, kind: type) -> int | float | str:
    array = np.asarray(data).reshape(-1)
    if kind is str:
        return array.astype(np.int8).tobytes().split(b"\0")[0].decode()
    return kind(array[0])  # type: ignore[no-any-return]
