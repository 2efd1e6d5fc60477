"""The deployed model: saved with a run, exported as files, checked in another process."""

from typing import TYPE_CHECKING

from jaxdistill._door import lazy

if TYPE_CHECKING:  # what `lazy` imports when it is asked for
  from jaxdistill.export._export import KINDS, Check, export, export_file, verify_exports
  from jaxdistill.export._folder import load_folder, save_folder
  from jaxdistill.export._folding import fold
  from jaxdistill.export._inputs import as_batch
  from jaxdistill.export._int8 import quantize_activations, quantize_weights
  from jaxdistill.export._process import ExportError, run_file
  from jaxdistill.export._program import Program, as_program
  from jaxdistill.export._student import DeployedWarning, Student, load_student, save_student

__all__ = [
  "KINDS",  # what can be exported
  "Check",  # how an exported file is checked and timed before it is kept
  "DeployedWarning",  # a student was saved in a lesser way than it could be
  "ExportError",  # an exported file cannot be loaded, or does not compute what the student does
  "Program",  # a network in inference mode, and what its weights are: call it, under ``jit`` too
  "Student",  # the program of a finished run: call it on inputs as they are stored
  "as_batch",  # the inputs as arrays of the expected shapes and dtypes
  "as_program",  # a model as a program, to be folded, quantised or exported
  "export",  # exports the student of a finished run into ``<run>/exports``, and checks every file
  "export_file",  # exports a program as one file, runs it in a process of its own
  "fold",  # folds every BatchNorm into the linear layer before it, where that is exact
  "load_folder",  # the student of a folder that `save_folder` wrote, as a program
  "load_student",  # loads the deployed network of a finished run from its folder alone
  "quantize_activations",  # computes convolutions and matrix products in int8
  "quantize_weights",  # stores the weights as int8
  "run_file",  # runs an exported file in a new process, which imports neither jaxdistill nor Flax
  "save_folder",  # the student as a folder for a hub of models: safetensors, program, config
  "save_student",  # saves a network, ready to call, in the folder ``student`` of a run
  "verify_exports",  # looks whether the exports of a run are what was checked
]

__getattr__, __dir__ = lazy(__name__)
