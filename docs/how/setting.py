import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxdistill as jd

x = np.random.default_rng(0).normal(size=(600, 8)).astype(np.float32)
y = np.argmax(x[:, :3] * x[:, 3:6], axis=1)  # three classes
examples = jd.data.from_arrays(x[:500], y[:500])
held_out = jd.data.from_arrays(x[500:], y[500:])
source = jd.data.on_device(examples, batch_size=50, data_seed=0)
batches = jd.data.evaluation_batches(held_out, batch_size=100)


def mlp(width, outputs=3):
  module = nn.Sequential([nn.Dense(width), nn.relu, nn.Dense(outputs)])
  return jd.networks.linen(module, features={"hidden": "layers_0"})


large, small, adam = mlp(64), mlp(4), optax.adam(1e-2)
taught = jd.fit(large, jd.recipes.labels(), data=source, optimizer=adam, steps=200)
teacher = jd.teachers.frozen(taught)
