"""What a plugin computes, told without TensorRT: its signature, and the launches that compute it.

TensorRT's many questions (types, shapes, formats, workspace) are all answered out of this, in `callbacks.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar, Generic, TypeVar

from runtime.kernels.cuda.launch import DeviceLimits, Kernel, Launcher
from runtime.tensorrt_plugins.signature import Attributes, Signature, Sizes, Types

Problem = TypeVar("Problem")


class Operation(ABC, Generic[Problem]):
    """One kind of node. A Problem is what the launchers of its kernels are given besides addresses."""

    signature: ClassVar[Signature]

    @abstractmethod
    def problem(self, attributes: Attributes, sizes: Sizes, types: Types) -> Problem:
        """One call of the node. sizes: by axis. types: by key of the signature's `choices`.

        Raises BackendError for what no kernel computes.
        """

    @abstractmethod
    def workspace_bytes(self, problem: Problem, limits: DeviceLimits) -> int:
        """Scratch memory that a launch needs on such a device."""

    @abstractmethod
    def kernels(self, problem: Problem, limits: DeviceLimits) -> tuple[Kernel, ...]:
        """What a launch runs, to be compiled and loaded ahead."""

    @abstractmethod
    def launch(
        self, launcher: Launcher, problem: Problem, inputs: Sequence[int], outputs: Sequence[int], workspace: int
    ) -> None:
        """Queue the work. inputs, outputs, workspace: device addresses."""

    def hardest(self, low: Sizes, high: Sizes) -> Iterator[Sizes]:
        """Sizes between `low` and `high` that between them need the most workspace and all the kernels."""
        yield high
