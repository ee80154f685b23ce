"""What a plugin node looks like from outside: its tensors with their types and axes, and its attributes.

Axes are letters, and a letter stands for one size throughout a node; a type may be one of several, which tensors share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from runtime.errors import BackendError

Attributes = Mapping[str, int | float | str]
Sizes = Mapping[str, int]
Types = Mapping[str, str]
UNKNOWN = -1
"""A size that is not known before an engine runs."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """An input or output. type: "float32" and the like, or a key of the signature's `choices`. axes: a letter each."""

    name: str
    type: str
    axes: str


@dataclass(frozen=True, slots=True)
class Signature:
    """name: of the node in the domain `cierzo`. attributes: their types; those in `defaults` may be absent.

    dynamic: axes whose sizes may change from step to step. implied: those that other axes say, so that nothing is
    missing where a graph leaves them open. choices: names for types that tensors share, and what each may be.
    from_attributes: axes whose size is an attribute. aliases: outputs that are written into an input.
    """

    name: str
    attributes: Mapping[str, type]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    dynamic: str
    implied: str = ""
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    defaults: Attributes = field(default_factory=dict)
    from_attributes: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[int, int] = field(default_factory=dict)

    def allowed(self, tensor: Tensor) -> tuple[str, ...]:
        """The types that a tensor may have."""
        return self.choices.get(tensor.type, (tensor.type,))

    def bind_types(self, types: Sequence[str]) -> Types:
        """What each of `choices` is, given the types of all inputs.

        Raises BackendError if they do not fit; the sentence names the input and what it may be.
        """
        found: dict[str, str] = {}
        for tensor, dtype in zip(self.inputs, types, strict=True):
            allowed = (found[tensor.type],) if tensor.type in found else self.allowed(tensor)
            if dtype not in allowed:
                raise BackendError(
                    f"{self.name} takes {tensor.name} in {' or '.join(allowed)}, not in {dtype}. Build with "
                    "--arithmetic bfloat16 or float16, or without plugins (--plugins none)."
                )
            if tensor.type in self.choices:
                found[tensor.type] = dtype
        return found

    def bind_sizes(self, attributes: Attributes, shapes: Sequence[Sequence[int]]) -> Sizes:
        """The size of every axis, given the shapes of all inputs; UNKNOWN where none tells it yet.

        Raises BackendError if shapes contradict each other or an attribute.
        """
        sizes: dict[str, int] = {axis: int(attributes[name]) for axis, name in self.from_attributes.items()}
        for tensor, shape in zip(self.inputs, shapes, strict=True):
            if len(shape) != len(tensor.axes):
                raise BackendError(f"{self.name} takes {tensor.name} with axes {tensor.axes}, not {list(shape)}.")
            for axis, size in zip(tensor.axes, shape, strict=True):
                if sizes.setdefault(axis, size) == UNKNOWN:
                    sizes[axis] = size
                elif size not in (UNKNOWN, sizes[axis]):
                    raise BackendError(
                        f"{self.name} was given {tensor.name} of {list(shape)} with axes {tensor.axes}, but {axis} is "
                        f"{sizes[axis]} elsewhere in the node."
                    )
        return sizes
