"""Reads a zipped Core ML package back and says what is in it: ``check_coreml.py FILE OUTPUT``.

Core ML computes on a Mac alone, so this is what another machine can check: the package holds a
specification that coremltools reads, with a program whose operations and weights load. OUTPUT
receives as JSON the ``inputs`` and ``outputs``, ``{name: [shape, type]}``, and ``runtime``. This
file needs coremltools alone.
"""

import argparse
import json
import logging
import pathlib
import tempfile
import zipfile
from collections.abc import Sequence
from typing import Any

__all__ = ["main"]


def main(args: Sequence[str] | None = None) -> None:
  """The command; see the module."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("file", type=pathlib.Path)
  parser.add_argument("output", type=pathlib.Path)
  options = parser.parse_args(args)
  logging.disable(logging.WARNING)  # what Linux lacks of Core ML, which is known
  import coremltools
  from coremltools.converters.mil.frontend.milproto import load

  with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(options.file) as archive:
    archive.extractall(folder)  # it keeps members inside of the folder
    (package,) = pathlib.Path(folder).iterdir()
    model = coremltools.models.MLModel(str(package), skip_model_load=True)
    spec = model.get_spec()
    load.load(spec, spec.specificationVersion, file_weights_dir=model.weights_dir)

  def told(features: Any) -> dict[str, Any]:
    kinds = coremltools.proto.FeatureTypes_pb2.ArrayFeatureType.ArrayDataType
    arrays = {one.name: one.type.multiArrayType for one in features}
    return {n: [list(array.shape), kinds.Name(array.dataType)] for n, array in arrays.items()}

  found = {"inputs": told(spec.description.input), "outputs": told(spec.description.output)}
  runtime = f"coremltools {coremltools.__version__}"
  options.output.write_text(json.dumps({**found, "runtime": runtime}))


if __name__ == "__main__":
  main()
