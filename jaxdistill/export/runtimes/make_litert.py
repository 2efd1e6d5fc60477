"""Makes a LiteRT file of a StableHLO program: ``make_litert.py PROGRAM OUTPUT``.

PROGRAM is a portable artifact, as ``jax.export.Exported.mlir_module_serialized`` is. This file
needs litert-converter alone.
"""

import argparse
import pathlib
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
  from litert_converter.mlir import ir, passmanager
  from litert_converter.mlir._mlir_libs import converter_api_ext as converter
  from litert_converter.mlir.dialects import stablehlo

  context = ir.Context()
  converter.prepare_mlir_context(context)
  with context, ir.Location.unknown():
    module = stablehlo.deserialize_portable_artifact(context, options.program.read_bytes())
    converter.set_signature(
      module.operation,
      signature_name="serving_default",
      input_names=options.inputs,
      output_names=options.outputs,
    )
    config = converter.ConvertToTFLConfig()
    config.model_origin_framework = "JAX"
    converter.run_convert_to_tfl_passes(module, passmanager.PassManager(), config)
    options.output.write_bytes(converter.export_flatbuffer_to_bytes(module.operation))


if __name__ == "__main__":
  main()
