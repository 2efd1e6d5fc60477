"""Compilation in the background: the compiler leaves Python free to trace what comes next."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from typing import Any

__all__ = ["Ahead"]


class Ahead:
  """A jitted function that is compiled while Python goes on."""

  def __init__(self, function: Callable[..., Any]) -> None:
    """Nothing is compiled yet.

    Args:
      function: from ``jax.jit``.
    """
    self.function: Any = function
    self.pending: concurrent.futures.Future[Any] | None = None

  def compile(self, *args: Any, options: dict[str, Any] | None = None) -> None:
    """Traces the function here, and has it compiled in a thread of its own.

    Tracing stays in the caller's thread, where its settings are (``jax.enable_x64`` and the like
    are of a thread).

    Args:
      *args: arguments, or their shapes, dtypes and shardings.
      options: of the compiler, for what `compiled` gives. A call has none of them, and compiles.
    """
    lowered = self.function.lower(*args)
    pool = concurrent.futures.ThreadPoolExecutor(1)
    self.pending = pool.submit(lowered.compile, compiler_options=options)
    pool.shutdown(wait=False)

  def compiled(self) -> Any:
    """What `compile` made: ``jax.stages.Compiled``; waits for it."""
    assert self.pending is not None
    return self.pending.result()

  def __call__(self, *args: Any) -> Any:
    """Calls the function, once it is compiled.

    ``jax.jit`` keeps what it lowered together with its executable: arguments like those that it was
    compiled for, without ``options``, compile nothing more, and others are compiled as ever.
    """
    if self.pending is not None:
      self.pending.result()
    return self.function(*args)
