"""An ONNX model on the CPU, as a function of features."""

import threading
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from stream.core.formulas import Float64
from stream.errors import EncoderError

_ERRORS_ONLY: Final = 3
_DTYPES: Final[dict[str, type[np.floating[Any]]]] = {"tensor(float)": np.float32, "tensor(double)": np.float64}


class OnnxModel:
    """Features [n, F·d] to directions [n, d]: a model with one input and one output, of floats or doubles.

    One thread runs it, beside those of BLAS that the worker has one of, too. Weights in files of their own can't be
    had: the model is its bytes, and these have the hash.

    Args:
        read: gives its bytes, once.
        name: for errors.
    """

    def __init__(self, read: Callable[[], bytes], name: str) -> None:
        self._read = read
        self._name = name
        self._session: Any = None
        self._lock = threading.Lock()
        self._input = ""
        self._dtype: type[np.floating[Any]] = np.float64

    def load(self) -> None:
        """Make the model ready.

        Raises:
            EncoderError: onnxruntime is missing, or it can't run this.
        """
        with self._lock:
            if self._session is None:
                self._session = self._opened()

    def __call__(self, features: Float64) -> NDArray[Any]:
        """What the model says; whatever it raises."""
        if self._session is None:
            self.load()
        (said,) = self._session.run(None, {self._input: features.astype(self._dtype, copy=False)})
        return np.asarray(said)

    def _opened(self) -> Any:
        try:
            import onnxruntime
        except ImportError as exc:
            msg = "learned encoders need onnxruntime; pip install 'user-embedding-stream[learned]'"
            raise EncoderError(msg) from exc
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = _ERRORS_ONLY
        data = self._read()
        try:
            session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as exc:  # onnxruntime's errors have no common base
            first = str(exc).splitlines()[0][:200] if str(exc) else type(exc).__name__
            msg = f"encoder {self._name}: onnxruntime can't load the model ({first})"
            raise EncoderError(msg) from exc
        inputs, outputs = session.get_inputs(), session.get_outputs()
        if len(inputs) != 1 or len(outputs) != 1 or inputs[0].type not in _DTYPES:
            msg = f"encoder {self._name}: the model must have one input of floats or doubles, and one output"
            raise EncoderError(msg)
        self._input, self._dtype = inputs[0].name, _DTYPES[inputs[0].type]
        return session
