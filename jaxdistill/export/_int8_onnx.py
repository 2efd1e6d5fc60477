"""ONNX models whose activations are int8 too, by ONNX Runtime's own static quantiser.

The scale of what goes into each operation is found by running the float model on a calibration's
examples (smallest and largest value). The file has QuantizeLinear and DequantizeLinear around
what ONNX Runtime then computes in eight-bit integers, with a scale for each output channel of a
kernel. Both operands are unsigned, which its documentation ("Quantize ONNX models": QDQ, U8U8) has
for CPUs of every kind: with signed kernels sums saturate where a CPU has no VNNI, and what 1.32
makes there of signed activations it refuses to load.
"""

from __future__ import annotations

import logging
import pathlib
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxdistill import _extras
from jaxdistill.export import _inputs

__all__ = ["quantized_onnx"]


def quantized_onnx(model: bytes, calibration: Mapping[str, Any], batch_size: int = 256) -> bytes:
  """An ONNX model in int8, weights and activations.

  Args:
    model: the bytes of the float model.
    calibration: inputs ``[N, ...]`` by their names in the model, of the training split; a few
      hundred are enough.
    batch_size: how many examples to calibrate with at once, at most.

  Returns:
    The bytes of the file.

  Raises:
    ImportError: onnxruntime or onnx is not installed.
    ValueError: the quantiser cannot do it, or found no operation to quantise.
  """
  _extras.need("int8 in ONNX", "onnx", "onnxruntime")
  from onnxruntime import quantization
  from onnxruntime.quantization.shape_inference import quant_pre_process

  size = len(next(iter(calibration.values())))
  with tempfile.TemporaryDirectory() as folder:
    given, ready, made = (pathlib.Path(folder, name) for name in ("given", "ready", "made"))
    given.write_bytes(model)
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.ERROR)  # it advises to do what is done here
    try:
      quant_pre_process(str(given), str(ready), skip_symbolic_shape=True)
      quantization.quantize_static(
        str(ready),
        str(made),
        _reader(quantization, _inputs.padded_batches(calibration, size, min(size, batch_size))),
        quant_format=quantization.QuantFormat.QDQ,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QUInt8,
        op_types_to_quantize=["Conv", "Gemm", "MatMul"],
        per_channel=True,
        extra_options={"WeightSymmetric": True},  # one zero point for all channels, as it computes
      )
    except Exception as error:  # A quantiser may fail on anything that nobody has tried.
      reason = " ".join(str(error).split())[:300] or type(error).__name__
      raise ValueError(f"ONNX Runtime cannot quantise it: {reason}") from error
    finally:
      root.setLevel(before)
    quantized = made.read_bytes()
  if b"DequantizeLinear" not in quantized:
    raise ValueError("ONNX Runtime found no operation that it computes in int8.")
  return quantized


def _reader(quantization: Any, batches: Iterator[Mapping[str, np.ndarray]]) -> Any:
  """The batches in the form that the quantiser reads."""

  class Reader(quantization.CalibrationDataReader):
    def get_next(self) -> dict[str, np.ndarray] | None:
      return next(({n: np.asarray(a) for n, a in batch.items()} for batch in batches), None)

  return Reader()
