"""What the core does alone: every room, `fit` on arrays, `evaluate`, `load_student`.

`.ci/run` runs it where nothing else is installed, and test_extras where all else is hidden.
"""

import importlib
import sys

import flax.linen as nn
import numpy as np
import optax

import jaxdistill as jd

# Those of TFDS are all that a door cannot give without an extra.
BY_NAME = {"Digits", "load", "records", "splits"}


def main(folder):
  for room in (name for name in jd.__all__ if name.islower() and name != "fit"):
    door = importlib.import_module(f"jaxdistill.{room}")
    for name in set(door.__all__) - (BY_NAME if room == "data" else set()):
      getattr(door, name)
  x = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
  examples = jd.data.from_arrays(x, np.argmax(x, axis=1))
  network = jd.networks.linen(nn.Dense(4))
  fitted = jd.fit(
    network,
    jd.recipes.labels(),
    data=jd.data.on_device(examples, batch_size=20, data_seed=0),
    optimizer=optax.adam(0.1),
    steps=40,
    run=folder,
  )
  found = jd.evaluation.evaluate(fitted, jd.data.evaluation_batches(examples, batch_size=20))
  student = jd.export.load_student(folder)
  again = np.mean(np.argmax(student(x), axis=1) == examples.labels)
  assert found["accuracy"] > 0.5, found
  np.testing.assert_allclose(again, found["accuracy"], rtol=1e-6)
  print(f"the core alone: accuracy {again:.2f}")


if __name__ == "__main__":
  main(sys.argv[1])
