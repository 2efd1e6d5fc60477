"""What can be captured from a network: the names that an adapter takes as features."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

from jaxdistill.networks._features import Adapter, Call
from jaxdistill.networks._linen import linen
from jaxdistill.networks._nnx import nnx
from jaxdistill.types import Network

__all__ = ["capturable"]


def capturable(network: Any, inputs: Any) -> dict[str, Any]:
  """What can be captured from a network, by abstract evaluation only.

  Args:
    network: from `networks.linen` or `networks.nnx`; or a module, or a function ``rngs -> module``,
      that one of them understands without further arguments.
    inputs: what the network sees, or its shapes (``jax.ShapeDtypeStruct``).

  Returns:
    Names that the adapter takes as ``features``, each with its shape; a tuple or a dict of shapes
    where a `Path` has to say which ``element``. What a transform hides is not among them.

  Raises:
    ValueError: ``network`` was made by neither of the two.

  >>> found = capturable(nn.Sequential([nn.Dense(4), nn.Dense(3)]), jax.numpy.ones((2, 5)))
  >>> found["layers_0"].shape
  (2, 4)
  """
  if not isinstance(network, Network):
    network = linen(network) if isinstance(network, nn.Module) else nnx(network)
  # A network is two functions; those of an adapter are its methods, which lead back to it.
  adapter = getattr(network.apply, "__self__", None)
  if not isinstance(adapter, Adapter):
    raise ValueError(
      f"network {network.name!r} was not made by networks.linen or networks.nnx; give the one that "
      "was, or the module."
    )
  key = jax.eval_shape(lambda: jax.random.key(0))
  variables = jax.eval_shape(adapter.variables, key, inputs)
  return adapter.survey(Call(variables, inputs, False, key))[0]
