"""ImageNet's recipe on a made set of the same features, at a tiny setting."""

import importlib
import io
import json
import pathlib
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from jaxdistill import teachers

ROOT = pathlib.Path(__file__).parent.parent
SIZES = {"train": 300, "validation": 60}


class MadeImagenet(tfds.core.GeneratorBasedBuilder):
  """Pictures of many sizes as JPEG, with the features of TFDS's imagenet2012."""

  VERSION = tfds.core.Version("5.1.0")
  code_path = None

  def _info(self):
    features = {
      "image": tfds.features.Image(encoding_format="jpeg"),
      "label": tfds.features.ClassLabel(num_classes=1000),
      "file_name": tfds.features.Text(),
    }
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

  def _split_generators(self, dl_manager):
    return {name: self._generate_examples(name, size) for name, size in SIZES.items()}

  def _generate_examples(self, name, size):
    for row in range(size):
      random = np.random.default_rng(row)
      pixels = random.integers(0, 256, (30 + row % 20, 50 - row % 13, 3)).astype(np.uint8)
      file = io.BytesIO()
      Image.fromarray(pixels).save(file, "JPEG")
      file.seek(0)
      yield row, {"image": file, "label": row % 10, "file_name": f"{name}_{row}.JPEG"}


@pytest.mark.slow
def test_the_recipe_streams_caches_and_reports(tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(str(ROOT / "experiments"))
  MadeImagenet(data_dir=str(tmp_path / "tfds")).download_and_prepare(file_format="array_record")
  script = importlib.import_module("imagenet")
  words = ["--short", "--dataset", "made_imagenet", "--data-dir", str(tmp_path / "tfds")]
  words += ["--out", str(tmp_path / "run"), "--no-keep-compiled"]
  script.main(*script.parse([*words, "--cache-part", "2/3"]))
  manifest = json.loads((tmp_path / "run" / "outputs" / "manifest.json").read_text())
  assert manifest["augmentation"].startswith("random_resized_crop(28")
  assert not manifest["views"]  # a part of it
  script.main(*script.parse(words))
  assert not teachers.verify_cache(tmp_path / "run" / "outputs")
  report = json.loads((tmp_path / "run" / "report.json").read_text())
  assert report["examples"] == SIZES["validation"]
  assert set(report["models"]) == {"teacher", "baseline", "student"}
  assert "imagenet" in sys.modules
