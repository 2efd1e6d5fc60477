"""A student as a folder of files that hubs of models take: weights, program, what it takes.

`save_folder` writes it from a finished run, `load_folder` gives the student back, and the model
card beside them comes from `jaxdistill.reports.write_model_folder`.
"""

from __future__ import annotations

import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import _check, _extras, runs
from jaxdistill.export import _export, _student
from jaxdistill.export._process import ExportError
from jaxdistill.export._program import Program
from jaxdistill.export.runtimes import run_stablehlo
from jaxdistill.networks import weights

__all__ = ["load_folder", "save_folder"]

PyTree = Any
_CONFIG, _WEIGHTS, _PROGRAM = "config.json", "model.safetensors", "program.stablehlo"
_INPUTS, _LIBRARY = "preprocessor_config.json", "jaxdistill"


def save_folder(
  run: str | os.PathLike[str], folder: str | os.PathLike[str], *, instance: int = 0
) -> pathlib.Path:
  """Writes the student of a finished run as a folder for a hub of models.

  ``model.safetensors`` has the weights by path, ``program.stablehlo`` (`jax.export`) the network as
  a function of them and of inputs as they are stored, normalisation included,
  ``preprocessor_config.json`` the shapes and dtypes of these inputs, ``config.json`` the rest and
  the digest of each file, and ``run_stablehlo.py`` runs all of it with JAX alone.

  Args:
    run: the run's folder.
    folder: where to write; made if it is not there, files of an earlier call are replaced.
    instance: which of the networks of a run over several seeds.

  Returns:
    The folder.

  Raises:
    FileExistsError: the folder holds something else.
    FileNotFoundError: there is no finished run.
    ImportError: safetensors is not installed.
    ValueError: the program cannot take batches of any size, or the weights hold NaN.
  """
  _extras.need("export.save_folder", "safetensors")
  runs.check_place(folder, "network of export.save_folder")
  target = _check.folder("folder", folder)
  if runs.listing(target) and not _ours(target):
    raise FileExistsError(
      f"folder={target} holds something that is no student of ours; take another."
    )
  student = _student.load_student(run, instance=instance)
  runs.check_nan("the student's weights", student.leaves)
  with runs.writes(target):
    target.mkdir(parents=True, exist_ok=True)
  about = _export.write_stablehlo(target / _PROGRAM, student, weights=False)
  weights.save_safetensors(target / _WEIGHTS, student.leaves, metadata={"format": "flax"})
  shapes = jax.tree.map(lambda s: {"shape": s.shape, "dtype": str(s.dtype)}, student.inputs)
  runs.write_json(target / _INPUTS, {"inputs": shapes, "normalized_by": _PROGRAM})
  script = pathlib.Path(run_stablehlo.__file__)
  shutil.copyfile(script, target / script.name)
  files = (_PROGRAM, f"{_PROGRAM}.json", _WEIGHTS, _INPUTS, script.name)
  told = {
    "library_name": _LIBRARY,
    "architectures": [student.name],
    "outputs": list(student.outputs),
    "ignored": list(student.ignored),
    "num_labels": student.classes,
    "parameters": student.info["parameters"],
    "flops": student.info.get("flops"),
    "jax": about["jax"],
    "files": {name: runs.size_and_digest(target / name) for name in files},
  }
  runs.write_json(target / _CONFIG, told)
  return target


def load_folder(folder: str | os.PathLike[str]) -> Program:
  """Gives back the student of a folder that `save_folder` wrote, if each file is as it was written.

  Args:
    folder: the folder, as it was written or as a hub gave it back.

  Returns:
    The program: ``program(inputs [B, ...]) -> logits [B, ..., K]``, for any B.

  Raises:
    ExportError: a file is damaged, or no file of ours.
    FileNotFoundError: there is no such folder.
    ImportError: safetensors is not installed.
  """
  _extras.need("export.load_folder", "safetensors")
  place = _check.folder("folder", folder)
  if not (place / _CONFIG).is_file():
    raise FileNotFoundError(f"folder={place} has no {_CONFIG}: export.save_folder writes it.")
  try:
    told = runs.read_json(place / _CONFIG)
    wrong = {n: runs.altered(runs.within(place, n), one) for n, one in told["files"].items()}
    bad = next((f"{name} {problem}" for name, problem in wrong.items() if problem), None)
    if bad or not {_PROGRAM, _WEIGHTS} <= set(wrong):
      raise ValueError(bad or "it lists no program and weights")
    name, outputs, ignored = told["architectures"][0], told["outputs"], told["ignored"]
    with weights.opened(place / _WEIGHTS) as tensors:
      leaves = {path: jnp.asarray(tensor.read()) for path, tensor in tensors.items()}
    exported = run_stablehlo.load(os.fspath(place / _PROGRAM))
  except (OSError, ValueError, KeyError, IndexError, TypeError, runs.CheckpointError) as error:
    raise ExportError(f"{place} cannot be read ({error}); save the folder again.") from error
  except SystemExit as error:  # how a script that is run says it
    raise ExportError(str(error)) from error
  (_, expected), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)

  def call(given: Mapping[str, Any], inputs: PyTree) -> Any:
    return exported.call(dict(given), inputs)

  stored = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], np.dtype(a.dtype)), expected)
  platforms = tuple(exported.platforms)
  return Program(name, leaves, call, stored, tuple(outputs), tuple(ignored), platforms)


def _ours(folder: pathlib.Path) -> bool:
  """Whether an earlier call wrote the folder."""
  try:
    return runs.read_json(folder / _CONFIG).get("library_name") == _LIBRARY
  except (OSError, ValueError, AttributeError):
    return False
