"""What XLA compiles, kept on disk between processes."""

from __future__ import annotations

import os
import pathlib

import jax
from jax.experimental.compilation_cache import compilation_cache

from jaxdistill import _check
from jaxdistill.runs._files import user_cache

__all__ = ["keep_compiled"]


def keep_compiled(folder: str | os.PathLike[str] | None = None) -> pathlib.Path:
  """Keeps what XLA compiles on disk, so that the next process need not compile it again.

  Switches JAX's persistent compilation cache on, for this process, and for short programs too,
  which JAX alone leaves out. A program is found again by everything that decides it: its text, the
  compiler's options and version, the device. Nothing is ever removed; the folder may be deleted at
  any time.

  Args:
    folder: where; by default the one that ``JAX_COMPILATION_CACHE_DIR`` names, else
      ``user_cache("compiled")``.

  Returns:
    The folder.

  Raises:
    TypeError: ``folder`` is no path.
  """
  if folder is None:
    chosen = getattr(
      jax.config, "jax_compilation_cache_dir", None
    )  # as the environment or the script has set it
    place = pathlib.Path(chosen) if chosen else user_cache("compiled")
  else:
    place = _check.folder("folder", folder)
  jax.config.update("jax_compilation_cache_dir", str(place))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
  compilation_cache.reset_cache()  # JAX looks at its settings once, at the first compilation
  return place
