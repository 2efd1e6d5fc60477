"""Libraries that only some calls need, and the extra of the package that brings each."""

from __future__ import annotations

import importlib.util

__all__ = ["EXTRAS", "MissingExtraError", "need", "there"]

# What is imported, and which extra of pyproject.toml installs it; the rest is always there.
EXTRAS = {
  "ai_edge_litert": "litert",
  "array_record": "data",
  "coremltools": "coreml",
  "cv2": "data",
  "grain": "data",
  "jax2onnx": "export",
  "jinja2": "report",
  "jsonschema": "report",
  "litert_converter": "litert",
  "magika": "foreign",
  "matplotlib": "report",
  "mlflow": "mlflow",
  "onnx": "export",
  "onnxruntime": "export",
  "optuna": "optuna",
  "qwix": "int8",
  "safetensors": "weights",
  "scipy": "report",
  "sklearn": "data",
  "stablehlo_coreml": "coreml",
  "tensorboardX": "tensorboard",
  "tensorflow": "prepare",
  "tensorflow_datasets": "data",
  "tokenizers": "text",
  "tyro": "experiments",
  "wandb": "wandb",
}


class MissingExtraError(ModuleNotFoundError):
  """A call needs a library that is not installed; the message names the extra that brings it."""


def there(library: str) -> bool:
  """Whether a library can be imported; it is not imported to find that out.

  >>> there("jax")
  True
  """
  return importlib.util.find_spec(library) is not None


def need(what: str, *libraries: str) -> None:
  """Raises where a library is absent: called before any work, and before the library's import.

  Args:
    what: the call, or the argument with its value, that needs them.
    *libraries: as they are imported; `EXTRAS` knows which extra brings each.

  Raises:
    MissingExtraError: one is not installed.

  >>> need("this example")
  """
  for library in libraries:
    if not there(library):
      raise MissingExtraError(
        f"{what} needs {library}, which is not installed: "
        f"pip install 'jaxdistill[{EXTRAS[library]}]'.",
        name=library,
      )
