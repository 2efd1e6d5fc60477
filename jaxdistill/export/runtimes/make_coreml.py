"""Makes a Core ML package of a StableHLO program, zipped: ``make_coreml.py PROGRAM OUTPUT``.

PROGRAM is a portable artifact, as ``jax.export.Exported.mlir_module_serialized`` is. This file
needs stablehlo-coreml, which brings JAX and coremltools; it runs on Linux and on a Mac.
"""

import argparse
import logging
import pathlib
import shutil
import tempfile
from collections.abc import Sequence

__all__ = ["main"]


def main(args: Sequence[str] | None = None) -> None:
  """The command; see the module."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("program", type=pathlib.Path)
  parser.add_argument("output", type=pathlib.Path)
  parser.add_argument("--inputs", nargs="+", required=True, help="names, in the program's order")
  parser.add_argument("--outputs", nargs="+", required=True, help="names, in the program's order")
  options = parser.parse_args(args)
  logging.disable(logging.WARNING)  # what Linux lacks of Core ML, which is known
  import coremltools
  import stablehlo_coreml
  from jax._src.interpreters.mlir import make_ir_context
  from jax._src.lib.mlir.dialects import hlo

  with make_ir_context() as context:
    module = hlo.deserialize_portable_artifact(context, options.program.read_bytes())
    least = coremltools.target.iOS18  # the least that the converter knows
    model = coremltools.convert(
      stablehlo_coreml.convert(module, minimum_deployment_target=least),
      source="milinternal",
      minimum_deployment_target=least,
      compute_precision=coremltools.precision.FLOAT32,
      pass_pipeline=stablehlo_coreml.build_pass_pipeline(),
      skip_model_load=True,
    )
  spec = model.get_spec()
  for features, names in (
    (spec.description.input, options.inputs),
    (spec.description.output, options.outputs),
  ):
    for old, new in zip([one.name for one in features], names, strict=True):
      coremltools.utils.rename_feature(spec, old, new)
  with tempfile.TemporaryDirectory() as folder:
    package = pathlib.Path(folder, "student.mlpackage")
    named = coremltools.models.MLModel(spec, weights_dir=model.weights_dir, skip_model_load=True)
    named.save(str(package))
    made = shutil.make_archive(str(package), "zip", folder, package.name)
    shutil.move(made, options.output)


if __name__ == "__main__":
  main()
