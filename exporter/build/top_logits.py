"""The graph that finds the highest logits on the device, so that sampling brings a kilobyte back and not all of them.

Letters: N rows of logits, V vocabulary, K highest logits.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from runtime.step_engine_info import TOP_LOGITS


def top_logits_model(vocab_size: int) -> onnx.ModelProto:
    """logits float32 [N, V] -> values float32 [N, K], ids int64 [N, K]; K = min(TOP_LOGITS, V).

    Values come best first; in which order equal ones come is the library's choice. A NaN counts as infinity, so that a
    row has one where the first value is infinite, or it has an infinite logit.
    """
    count = min(TOP_LOGITS, vocab_size)
    # No reduction: those of ONNX Runtime on CUDA need cuDNN, which nothing else here does.
    nodes = [
        helper.make_node("IsNaN", ["logits"], ["is_nan"]),
        helper.make_node("Where", ["is_nan", "infinity", "logits"], ["ordered"]),
        helper.make_node("TopK", ["ordered", "count"], ["values", "ids"], axis=-1, largest=1, sorted=1),
    ]
    graph = helper.make_graph(
        nodes,
        "top_logits",
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", vocab_size])],
        [
            helper.make_tensor_value_info("values", TensorProto.FLOAT, ["N", count]),
            helper.make_tensor_value_info("ids", TensorProto.INT64, ["N", count]),
        ],
        [
            numpy_helper.from_array(np.array([count], np.int64), "count"),
            numpy_helper.from_array(np.array(np.inf, np.float32), "infinity"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
