"""What a number was produced with: the hardware, and the versions of what computed it."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import platform
from typing import Any

import jax
import numpy as np

__all__ = ["environment"]


def environment() -> dict[str, Any]:
  """Hardware and versions that the numbers were produced with."""
  return {
    "device": jax.devices()[0].device_kind,
    "devices": jax.device_count(),
    "processor": _processor(),
    "cores": os.cpu_count(),
    "python": platform.python_version(),
    "jax": jax.__version__,
    "numpy": np.__version__,
    **{name: _version(name) for name in ("flax", "optax", "jaxdistill")},
  }


def _version(name: str) -> str | None:
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:  # a checkout on the path
    return None


def _processor() -> str:
  """The processor's own name where the system tells it."""
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
  except (OSError, StopIteration):
    return platform.processor() or platform.machine()
