"""What a pre-flight check returns, and the words that its messages share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["Finding", "PreflightError", "PreflightWarning", "percent", "quoted"]


class PreflightWarning(UserWarning):
  """Something about a run that is about to start deserves a look."""


class PreflightError(ValueError):
  """A run that is about to start would learn something else than it is meant to.

  Attributes:
    findings: all that was found, the `Finding` that stops it among them.
  """

  def __init__(self, message: str, findings: Sequence[Finding] = ()) -> None:
    super().__init__(message)
    self.findings = list(findings)


@dataclasses.dataclass(frozen=True)
class Finding:
  """What a check has found.

  Attributes:
    check: the check's name, ``"capacity_gap"``.
    message: what was found, with its numbers.
    fix: what to do about it.
    values: the numbers, for whoever goes on with them.
  """

  check: str
  message: str
  fix: str
  values: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __str__(self) -> str:
    return f"{self.message} {self.fix}"


def percent(share: float) -> str:
  """A share of 1 as a message shows it.

  >>> percent(0.98567)
  '98.57%'
  """
  return f"{100 * share:.2f}%"


def quoted(names: Iterable[str]) -> str:
  """Names in a row.

  >>> quoted(["labels", "soft"])
  "'labels', 'soft'"
  """
  return ", ".join(map(repr, names))
