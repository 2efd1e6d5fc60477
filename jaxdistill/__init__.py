"""jaxdistill: knowledge distillation in JAX and Flax.

>>> from jaxdistill import losses
"""

__version__ = "0.1.0"
