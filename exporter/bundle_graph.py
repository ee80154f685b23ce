"""A bundle's graph in memory, with its weights readable wherever they lie."""

from __future__ import annotations

from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from runtime.bundle import Bundle


def load_graph(bundle: Bundle) -> ir.Model:
    """The graph of `bundle`. Its weights are mapped when somebody reads them, and never held."""
    model = ir.load(bundle.file(bundle.manifest.graph.file))
    folder = bundle.weights_folder
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            value.const_value = BundleTensor(
                tensor.location, tensor.offset, tensor.length, tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()), name=str(tensor.name), base_dir=folder,
            )  # fmt: skip
    return model


class BundleTensor(ir.ExternalTensor):
    """External data that may be a hard link, which onnx_ir's own class takes for an attack and does not read.

    A link in a bundle is what an export made; whether the file is still the one that was linked is `read_bundle`'s
    matter, which compares sizes, and hashes on request.
    """

    def numpy(self) -> npt.NDArray[Any]:
        """The data, mapped read-only."""
        shape = tuple(int(extent) for extent in self.shape.numpy())
        if 0 in shape:
            return np.empty(shape, self.dtype.numpy())
        count = int(np.prod(shape, dtype=np.int64)) * int(self.dtype.itemsize)
        raw = np.memmap(self.path, np.uint8, mode="r", offset=self.offset or 0, shape=(count,))
        return np.frombuffer(raw, self.dtype.numpy()).reshape(shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        array = self.numpy()
        return array if dtype is None and not copy else np.array(array, dtype)

    def tobytes(self) -> bytes:
        """The data, copied."""
        return self.numpy().tobytes()

    def tofile(self, file: BinaryIO) -> None:
        """Write the data to an open file."""
        file.write(self.numpy().reshape(-1).view(np.uint8).data)
