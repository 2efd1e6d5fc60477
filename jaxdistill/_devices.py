"""The axes of a mesh over which batches are split, and the mesh on which something lies.

A batch is split by whoever trains, evaluates or asks a teacher: the names are the same for all.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

__all__ = ["AXIS", "FSDP", "batch_axes", "mesh_of"]

AXIS = "data"
# What shards parameters over data-parallel devices: batches are split over it too.
FSDP = "fsdp"


def batch_axes(mesh: Mesh) -> tuple[str, ...]:
  """The axes of a mesh over which a batch is split where nobody says otherwise."""
  return tuple(axis for axis in mesh.axis_names if axis in (AXIS, FSDP))


def mesh_of(tree: Any) -> Mesh | None:
  """The mesh of several devices on which the first leaf lies that lies on one; None without.

  Where one of several processes is among them, that mesh: what lies on it lies nowhere else.

  Args:
    tree: arrays, or their shapes and shardings.
  """
  shardings = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(tree))
  found = [
    at
    for at in shardings
    if isinstance(at, NamedSharding) and isinstance(at.mesh, Mesh) and at.mesh.size > 1
  ]
  found.sort(key=lambda at: at.is_fully_addressable)  # stable
  mesh: Any = found[0].mesh if found else None
  return mesh
