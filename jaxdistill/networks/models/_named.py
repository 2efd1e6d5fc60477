"""Networks by the names that papers call them: a module, its attributes, a docstring for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import flax.linen as nn

__all__ = ["named"]

M = TypeVar("M", bound=nn.Module)


def named(
  module: type[M], name: str, title: str, parameters: int, **attributes: Any
) -> Callable[..., M]:
  """The function of one name, with its own docstring: ``(num_classes=100, **options) -> module``.

  Args:
    module: has ``num_classes`` among its attributes; the function belongs to its file.
    name: of the function.
    title: what the docstring begins with.
    parameters: how many there are at 100 classes.
    **attributes: what the name stands for.

  Returns:
    The function; an option that the name settles is a TypeError.
  """

  def make(num_classes: int = 100, **options: Any) -> M:
    return module(num_classes=num_classes, **attributes, **options)

  # A name of its own and a docstring of its own, so that help(resnet20) is about resnet20.
  shown = attributes.get("width", attributes["depth"])
  make.__name__ = make.__qualname__ = name
  make.__module__ = module.__module__
  make.__doc__ = f"""{title}: {f"{parameters:,}".replace(",", " ")} parameters at 100 classes.

  Args:
    num_classes: K.
    **options: further attributes of `{module.__name__}`, such as ``dtype``.

  Returns:
    The module.

  >>> {name}(num_classes=10).{"width" if "width" in attributes else "depth"}
  {shown}
  """
  return make
