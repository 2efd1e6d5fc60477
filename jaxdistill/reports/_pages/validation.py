"""A JSON file held against its schema: what is not as it should be is told, and left out."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from jaxdistill import _check, runs
from jaxdistill.reports._format import listed

__all__ = ["read_json", "sound"]

_TOLD = 12  # sentences about one file
_TYPES = {
  "array": "a list",
  "boolean": "true or false",
  "integer": "a whole number",
  "null": "null",
  "number": "a number",
  "object": "a mapping",
  "string": "a text",
}


def read_json(path: pathlib.Path, what: str, problems: list[str]) -> Any:
  """A file's JSON with None for what is no finite number.

  Args:
    path: the file.
    what: what it holds, which begins a sentence.
    problems: where a sentence goes if it cannot be read.

  Returns:
    The value; None where there is no file, or a broken one.
  """
  try:
    return _finite(runs.read_json(path))
  except FileNotFoundError:
    return None
  except ValueError as error:
    problems.append(f"{what} ({path.name}) {error}.")
    return None


def _finite(value: Any) -> Any:
  if isinstance(value, dict):
    return {key: _finite(one) for key, one in value.items()}
  if isinstance(value, list):
    return [_finite(one) for one in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


def sound(
  value: Any, schema: Mapping[str, Any], name: str, *, deeper: Sequence[str] = ()
) -> tuple[Any, list[str]]:
  """A file's value without the entries that its schema refuses.

  Args:
    value: from `read_json`.
    schema: a JSON schema.
    name: the file's, for the sentences.
    deeper: entries that hold others by name, each of which is an entry of its own two levels down:
      a report's ``models`` by model and number.

  Returns:
    ``(value, sentences)``: a copy whose refused entries are not there, as if nobody had written
    them, and what was wrong where. None where the whole of it is of another kind.
  """
  import jsonschema

  wrong: dict[tuple[Any, ...], str] = {}
  refused: set[tuple[Any, ...]] = set()
  for error in jsonschema.Draft202012Validator(schema).iter_errors(value):
    path = tuple(error.absolute_path)
    # Of several forms that are allowed, the nearest says best what is wrong.
    inner = jsonschema.exceptions.best_match([error])
    place = ".".join(map(str, inner.absolute_path))
    wrong.setdefault((*inner.absolute_path, error.validator), _words(inner, place))
    if error.validator == "additionalProperties" and isinstance(error.instance, Mapping):
      known = error.schema.get("properties", {})
      refused |= {(*path, key) for key in error.instance if key not in known}
    elif error.validator != "required" or len(path) > (2 if path[:1] and path[0] in deeper else 0):
      refused.add(path[:3] if path and path[0] in deeper else path[:1])
  told = [f"{name}: {text}" for text in wrong.values()]
  if len(told) > _TOLD:
    told = [*told[:_TOLD], f"{name} has {len(told) - _TOLD} more entries that are wrong."]
  return (None if () in refused else _without(value, refused)), told


def _words(error: Any, place: str) -> str:
  """What is wrong, in a sentence without its file."""
  if error.validator == "required":
    missing = [name for name in error.validator_value if name not in error.instance]
    return f"{place or 'it'} lacks {listed(missing)}."
  if error.validator == "additionalProperties":
    unknown = set(error.instance) - set(error.schema.get("properties", {}))
    return f"{place or 'it'} has {listed(sorted(unknown))}, which nobody knows."
  if error.validator == "type":
    allowed = error.validator_value
    kinds = [allowed] if isinstance(allowed, str) else allowed
    kind = " or ".join(_TYPES[one] for one in kinds)
    return f"{place or 'it'} should be {kind}, and is {_check.show(error.instance)}."
  return f"{place or 'it'} is wrong: {error.message[:200]}."


def _without(value: Any, refused: set[tuple[Any, ...]], path: tuple[Any, ...] = ()) -> Any:
  if isinstance(value, dict):
    return {
      key: _without(one, refused, (*path, key))
      for key, one in value.items()
      if (*path, key) not in refused
    }
  if isinstance(value, list):
    kept = [(i, one) for i, one in enumerate(value) if (*path, i) not in refused]
    return [_without(one, refused, (*path, i)) for i, one in kept]
  return value
