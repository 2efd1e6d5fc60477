"""Any Flax module as a network: adapters, our own models, foreign weights, precision.

``networks.linen(module)`` and ``networks.nnx(module)`` take modules that nobody here wrote,
unedited; `models` holds those that the literature compares.
"""

from typing import TYPE_CHECKING

from jaxdistill._door import lazy

if TYPE_CHECKING:  # what `lazy` imports when it is asked for
  from jaxdistill.networks import models as models
  from jaxdistill.networks import pretrained as pretrained
  from jaxdistill.networks import weights as weights
  from jaxdistill.networks._capturable import capturable
  from jaxdistill.networks._cohort import cohort, members
  from jaxdistill.networks._features import Path
  from jaxdistill.networks._heads import with_head
  from jaxdistill.networks._int8 import Int8, int8_weights
  from jaxdistill.networks._linen import linen
  from jaxdistill.networks._nnx import nnx, nnx_variables
  from jaxdistill.networks._precision import count_products, mixed_precision
  from jaxdistill.networks._remat import remat
  from jaxdistill.networks._sample import CachingDecoder, check_decoder, sample

__all__ = [
  "CachingDecoder",  # what `sample` asks of a module in order that each token is read once
  "Int8",  # a weight in eight bits, and what its integers are multiplied by
  "Path",  # where a feature comes from, when a string does not say enough
  "capturable",  # what can be captured from a network, by abstract evaluation only
  "check_decoder",  # raises where an argument is no `CachingDecoder`
  "cohort",  # several networks as one, trained side by side, each deployed by itself
  "count_products",  # counts a network's matrix products and convolutions by the dtype that they
  "int8_weights",  # a model whose kernels and embeddings are kept in eight bits
  "linen",  # a Linen module as a `Network`
  "members",  # the members of a trained cohort, each a model by itself
  "mixed_precision",  # a network that keeps its parameters in float32 and computes in a shorter
  "models",  # networks that sow what there is to distil from
  "nnx",  # an NNX module as a `Network`
  "nnx_variables",  # the variables of a module, as its network takes them
  "pretrained",  # language models in Hugging Face's folders, read into `models.Decoder` and written
  "remat",  # a network whose backward pass computes again what it would have kept
  "sample",  # continues prompts token by token, of any causal network; each row by its own key
  "weights",  # weights that other programs wrote, as variables of ours: Orbax, Flax's msgpack
  "with_head",  # a language model's network that puts out hidden states and its head, and no logits
]

__getattr__, __dir__ = lazy(__name__)
