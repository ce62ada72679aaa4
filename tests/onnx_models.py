"""Small ONNX models for tests."""

from collections.abc import Sequence

import numpy as np
from onnx import TensorProto, helper, numpy_helper


def model_of(
    nodes: Sequence[object],
    tensors: dict[str, np.ndarray],
    *,
    width: int | None,
    dim: int | None,
    kind: int = TensorProto.DOUBLE,
    rows: int | None = None,
) -> bytes:
    """A model from ``x`` [rows, width] to ``y`` [rows, dim]; None is any."""
    graph = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info("x", kind, [rows, width])],
        [helper.make_tensor_value_info("y", kind, [rows, dim])],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    made: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9
    ).SerializeToString()
    return made


def linear(weights: np.ndarray) -> bytes:
    """``y = x @ weights``, in the weights' precision."""
    kind = TensorProto.DOUBLE if weights.dtype == np.float64 else TensorProto.FLOAT
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    return model_of([node], {"w": weights}, width=weights.shape[0], dim=weights.shape[1], kind=kind)
