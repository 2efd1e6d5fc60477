"""Trackers: where else a run's numbers go, beside its folder.

A tracker is any object with `start`, `log` and `finish`, see `Tracker`; four are here. What is
tracked is what ``metrics.jsonl`` has, at the same moment: chunks of steps whose numbers are on the
host already. A tracker that fails costs no run: it is said once, and the run goes on.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import io
import json
import os
import pathlib
import re
import time
import uuid
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxdistill import _check, _extras
from jaxdistill.runs._files import read_object, read_text, write_text
from jaxdistill.runs._folder import read_config, read_metrics, to_json, write_json

__all__ = [
  "CSV",
  "MLflow",
  "TensorBoard",
  "Tracked",
  "Tracker",
  "TrackerWarning",
  "Wandb",
  "check_trackers",
  "track",
]

_TRIES = 3  # failures in a row after which a tracker is asked no more: each may wait for a server


class TrackerWarning(UserWarning):
  """A tracker failed; the run goes on."""


@runtime_checkable
class Tracker(Protocol):
  """What a run tells of itself, and to whom: three methods, on any object.

  Each run has a copy of its own (``copy.copy``) of what was given, so that one tracker serves many
  runs, and `start` may keep on ``self`` what belongs to one.
  """

  def start(self, config: Mapping[str, Any]) -> None:
    """Begins a run, or goes on with one.

    Args:
      config: what ``config.json`` holds, and as ``run`` a dict of its ``name``, its ``group`` (the
        name of its search, else of the folder that its own lies in, or None), its ``folder`` (a
        path, or None), ``search`` (the folder of the search that it is a student of, or None) and
        ``resumed_from``, the step that it goes on from: later steps come again.
    """

  def log(self, step: int, numbers: Mapping[str, float]) -> None:
    """Takes a line of the log.

    Args:
      step: the last of those that it is of.
      numbers: means over its steps, and over the seeds; those of a validation begin with
        ``validation/``.
    """

  def finish(self, files: Sequence[pathlib.Path]) -> None:
    """Ends the run, or leaves one that was stopped or failed.

    Args:
      files: what is to be kept with it; none where it did not come to its end.
    """


class Tracked:
  """A run's trackers together; of several processes, the first one's alone.

  Args:
    trackers: as the user gave them.
    config: what defines the run.
    name: its own.
    folder: where it is kept; None for memory.
    search: the folder of the search that it is a student of; None where it is none, or for memory.
    resumed_from: the step that it goes on from.

  Attributes:
    trackers: the run's own copies, by which another `Tracked` goes on with the same runs.
  """

  def __init__(
    self,
    trackers: Sequence[Tracker],
    config: Mapping[str, Any],
    *,
    name: str,
    folder: pathlib.Path | None,
    search: pathlib.Path | None = None,
    resumed_from: int = 0,
  ) -> None:
    within = search or (None if folder is None else folder.parent)
    about: dict[str, Any] = {"name": name, "resumed_from": resumed_from}
    about["group"] = None if within is None else within.name
    for what, path in (("folder", folder), ("search", search)):
      about[what] = None if path is None else os.fspath(path)
    self.trackers = [copy.copy(one) for one in trackers]
    self._failed = {id(one): 0 for one in self.trackers}
    self._ended = False
    for one in self.trackers:
      if not self._asked(one, "start", {**to_json(config), "run": about}):
        self._failed[id(one)] = _TRIES  # what has not begun has no place for numbers

  @property
  def working(self) -> list[Tracker]:
    """Those of the trackers that have not failed for good."""
    return [one for one in self.trackers if self._failed[id(one)] < _TRIES]

  def log(self, step: int, numbers: Mapping[str, Any]) -> None:
    """Hands a line on; a value may have a leading axis over seeds, whose mean it is then."""
    plain = {name: float(np.mean(np.asarray(value, np.float64))) for name, value in numbers.items()}
    for one in self.trackers:
      self._asked(one, "log", step, plain)

  def finish(self, files: Sequence[pathlib.Path] = ()) -> None:
    """Ends the run, once."""
    if not self._ended:
      self._ended = True
      for one in self.trackers:
        self._asked(one, "finish", [path for path in files if path.is_file()])

  def _asked(self, tracker: Tracker, what: str, *given: Any) -> bool:
    """Calls a tracker; whether it did as it was asked."""
    before = self._failed[id(tracker)]
    if before >= _TRIES:
      return False
    try:
      getattr(tracker, what)(*given)
    except Exception as error:
      self._failed[id(tracker)] += 1
      if not hasattr(tracker, "_said"):
        with contextlib.suppress(AttributeError):  # one with slots says it more than once
          tracker._said = True  # type: ignore[attr-defined]
        warnings.warn(
          f"the tracker {type(tracker).__name__} failed to {what}: {_check.short(error)}. The run "
          "goes on, and its folder has every line.",
          TrackerWarning,
          stacklevel=3,
        )
      return False
    self._failed[id(tracker)] = 0
    return True


def track(
  trackers: Sequence[Tracker],
  config: Mapping[str, Any] | None = None,
  *,
  folder: str | os.PathLike[str] | None,
  name: str | None = None,
  step: int | None = None,
  numbers: Mapping[str, Any] | None = None,
  files: Sequence[str | os.PathLike[str]] = (),
) -> None:
  """Adds numbers and files to a run's trackers after its end, such as a report.

  Args:
    trackers: those that the run had; they go on with its runs, which its folder names.
    config: what defines the run; its ``config.json`` by default.
    folder: the run's; None where it has none.
    name: its own; the folder's by default.
    step: that of the numbers.
    numbers: by name.
    files: what is to be kept with the run.

  Raises:
    FileNotFoundError: no config is given, and the folder holds no run; the folder or a file is not
      there.
    TypeError: a tracker is none, the step no integer, or a number none.
    ValueError: there are numbers without a step, or a step without numbers.

  >>> track([], {}, folder=None, name="mine", step=1, numbers={"accuracy": 0.9})
  """
  check_trackers(trackers, folder)
  path = None if folder is None else _check.folder("folder", folder)
  kept = _given(path, step, numbers, files)
  if not trackers:
    return
  if config is None:
    config = read_config("" if folder is None else folder)
  lines = []
  if path is not None and (path / "metrics.jsonl").is_file():
    lines = read_metrics(path)[0]
  tracked = Tracked(
    trackers,
    config,
    name=name or ("run" if path is None else path.name),
    folder=path,
    resumed_from=max((line["step"] for line in lines), default=0),
  )
  if numbers is not None and step is not None:
    tracked.log(step, numbers)
  tracked.finish(kept)


def _given(folder: pathlib.Path | None, step: Any, numbers: Any, files: Any) -> list[pathlib.Path]:
  """The files, after what `track` was given has been looked at: a tracker's failure is not said."""
  if (numbers is None) != (step is None):
    raise ValueError(
      f"step={_check.show(step)} and numbers={_check.show(numbers)}: numbers are of a step, give "
      "both or neither."
    )
  if step is not None:
    _check.whole("step", step, least=0)
    if not isinstance(numbers, Mapping):
      raise TypeError(f"numbers={_check.show(numbers)} must be numbers by name.")
    for name, value in numbers.items():
      if np.asarray(value).dtype.kind not in "biuf":
        raise TypeError(f"numbers has {name!r}: {_check.show(value)}, which is no number.")
  if folder is not None and not folder.is_dir():
    raise FileNotFoundError(f"folder={os.fspath(folder)!r} is not there: give a run's.")
  if isinstance(files, str | os.PathLike):
    raise TypeError(f"files={_check.show(files)} must be a list of paths.")
  found = [_check.folder("files", file) for file in files]
  missing = [os.fspath(file) for file in found if not file.is_file()]
  if missing:
    raise FileNotFoundError(f"files has {missing}, which are not there, or are no files.")
  return found


def check_trackers(trackers: Any, folder: Any) -> None:
  """Trackers, and a folder for those that write into the run's.

  Args:
    trackers: what was given.
    folder: the run's folder, or None.

  Raises:
    TypeError: one is no tracker.
    ValueError: one writes into the run's folder, and there is none.

  >>> check_trackers([], None)
  """
  if isinstance(trackers, str | Mapping) or not isinstance(trackers, Sequence):
    raise TypeError(f"trackers={_check.show(trackers)} must be a list, such as [runs.CSV()].")
  for one in trackers:
    if isinstance(one, type) or not isinstance(one, Tracker):
      raise TypeError(
        f"trackers has {_check.show(one)}, which is none: give runs.TensorBoard(), runs.MLflow(), "
        "runs.Wandb() or runs.CSV(), or an object with start, log and finish (runs.Tracker)."
      )
    if not isinstance(one, CSV | TensorBoard):
      continue
    if folder is None:
      raise ValueError(
        f"trackers has {type(one).__name__}, which writes into the run's folder, and there is none."
      )
    if sum(isinstance(other, type(one)) for other in trackers) > 1:
      raise ValueError(
        f"trackers has {type(one).__name__} more than once, and both would write the same file."
      )


class CSV:
  """A table of all lines, ``metrics.csv`` in the run's folder: a column for each number."""

  def start(self, config: Mapping[str, Any]) -> None:
    """Begins the table, or goes on with what a run before has written."""
    about = config["run"]
    self._path = pathlib.Path(about["folder"]) / "metrics.csv"
    self._rows: list[dict[str, Any]] = []
    if self._path.is_file():
      found = csv.DictReader(io.StringIO(read_text(self._path)))
      try:
        self._rows = [row for row in found if int(row["step"]) <= about["resumed_from"]]
      except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
          f"{self._path} is damaged, or no table of ours: move it away, and metrics.jsonl has all "
          "lines before."
        ) from error
    self._write()

  def log(self, step: int, numbers: Mapping[str, float]) -> None:
    """Adds a line; all of them are written anew where it has a number that none had before."""
    row = {"step": step, **numbers}
    self._rows.append(row)
    if set(row) <= set(self._names):
      with self._path.open("a", encoding="utf-8", newline="") as file:
        csv.DictWriter(file, self._names, restval="").writerow(row)
    else:
      self._write()

  def finish(self, files: Sequence[pathlib.Path]) -> None:
    """Nothing is open."""

  def _write(self) -> None:
    self._names = list(dict.fromkeys(["step", *(name for row in self._rows for name in row)]))
    text = io.StringIO()
    table = csv.DictWriter(text, self._names, restval="")
    table.writeheader()
    table.writerows(self._rows)
    write_text(self._path, text.getvalue())


class TensorBoard:
  """TensorBoard's event files, under ``tensorboard/`` in the run's folder.

  Raises:
    MissingExtraError: tensorboardX is not installed.
  """

  def __init__(self) -> None:
    _extras.need("runs.TensorBoard", "tensorboardX")

  def start(self, config: Mapping[str, Any]) -> None:
    """Opens the writer; what a killed run wrote after its last checkpoint is hidden."""
    import tensorboardX

    about = config["run"]
    folder = pathlib.Path(about["folder"]) / "tensorboard"
    if folder.is_symlink():  # a folder from elsewhere says where nothing is written
      raise OSError(f"{folder} is a link out of its folder: remove it.")
    self._writer = tensorboardX.SummaryWriter(str(folder), purge_step=about["resumed_from"] + 1)

  def log(self, step: int, numbers: Mapping[str, float]) -> None:
    """Writes a scalar for each number."""
    for name, value in numbers.items():
      self._writer.add_scalar(name, value, step)

  def finish(self, files: Sequence[pathlib.Path]) -> None:
    """Closes the writer; TensorBoard has no place for files."""
    self._writer.close()


class MLflow:
  """Runs of an MLflow experiment, on a server or in a database.

  A run that goes on goes on in the same run of MLflow, whose number lies in its folder as
  ``mlflow.json``, and no step is there twice. The group is the tag ``jaxdistill.group``. Students
  of a search that has a folder are below its run (MLflow's nested runs), which begins with the
  first of them.

  Args:
    tracking_uri: of the server, ``"http://localhost:5000"``, or of a database,
      ``"sqlite:///mlflow.db"``; None for what MLflow takes by itself (``MLFLOW_TRACKING_URI``).
    experiment: its name; made where there is none.

  Raises:
    MissingExtraError: MLflow is not installed.
    TypeError: an argument is no text.
  """

  def __init__(self, tracking_uri: str | None = None, *, experiment: str = "jaxdistill") -> None:
    _extras.need("runs.MLflow", "mlflow")
    if not isinstance(tracking_uri, str | None):
      raise TypeError(f"tracking_uri={_check.show(tracking_uri)} must be an address, or None.")
    if not isinstance(experiment, str) or not experiment:
      raise TypeError(f"experiment={_check.show(experiment)} must be a name.")
    self.tracking_uri, self.experiment = tracking_uri, experiment
    self._run: str | None = None

  def start(self, config: Mapping[str, Any]) -> None:
    """Finds the run or creates it, with the configuration's plain values as parameters."""
    from mlflow.entities import Param
    from mlflow.tracking import MlflowClient

    about = config["run"]
    self._below = about["search"] is not None
    self._client: Any = MlflowClient(tracking_uri=self.tracking_uri)
    known = self._noted(about["folder"]) or self._run
    found = None if known is None else self._found(known)
    if known is None or found is None:
      below = {}
      if self._below:
        below["mlflow.parentRunId"] = self._search(pathlib.Path(about["search"]))
      run, self._last = self._made(about["name"], about["group"], about["folder"], below), -1
    else:
      run = known
      self._client.update_run(run, status="RUNNING", name=about["name"])
      steps = [m.step for n in found.metrics for m in self._client.get_metric_history(run, n)]
      self._last = max(steps, default=-1)
    self._run = run
    if found is None or not found.params:  # a search's run is there before its configuration
      params = [Param(_key(name), str(value)) for name, value in _plain(config).items()]
      for first in range(0, len(params), 100):  # the most that one request may have
        self._client.log_batch(run, params=params[first : first + 100])

  def _noted(self, folder: str | None) -> str | None:
    """The run that a folder names."""
    note = _noted(_note({"folder": folder}, "mlflow"), "tracking_uri", self.tracking_uri)
    return note.get("run")

  def _found(self, run: str) -> Any:
    """What a run holds; None where it was removed."""
    from mlflow.exceptions import MlflowException

    try:
      return self._client.get_run(run).data
    except MlflowException:
      return None

  def _made(self, name: str, group: str | None, folder: str | None, tags: Mapping[str, str]) -> str:
    """A new run, which its folder names from now on."""
    own = {"jaxdistill.group": group or "", "jaxdistill.folder": folder or "", **tags}
    made = self._client.create_run(self._experiment_id(), run_name=name, tags=own)
    run = str(made.info.run_id)
    _keep(_note({"folder": folder}, "mlflow"), {"run": run, "tracking_uri": self.tracking_uri})
    return run

  def _search(self, folder: pathlib.Path) -> str:
    """The run of a student's search, which may be the first to tell of it."""
    known = self._noted(os.fspath(folder))
    if known is not None and self._found(known) is not None:
      return known
    return self._made(folder.name, folder.parent.name, os.fspath(folder), {})

  def _experiment_id(self) -> Any:
    from mlflow.exceptions import MlflowException

    found = self._client.get_experiment_by_name(self.experiment)
    if found is None:
      with contextlib.suppress(MlflowException):  # another process has just made it
        return self._client.create_experiment(self.experiment)
      found = self._client.get_experiment_by_name(self.experiment)
    return found.experiment_id

  def log(self, step: int, numbers: Mapping[str, float]) -> None:
    """Logs a line in one request, unless the run has it already."""
    from mlflow.entities import Metric

    if step <= self._last:
      return
    now = int(1000 * time.time())
    metrics = [Metric(_key(name), value, now, step) for name, value in numbers.items()]
    self._client.log_batch(self._run, metrics=metrics)
    self._last = step

  def finish(self, files: Sequence[pathlib.Path]) -> None:
    """Uploads the files, and ends the run."""
    for path in files:
      self._client.log_artifact(self._run, str(path))
    # Two lines that MLflow prints of each run: those of a search will do for all of its students.
    with contextlib.redirect_stdout(io.StringIO()) if self._below else contextlib.nullcontext():
      self._client.set_terminated(self._run)


class Wandb:
  """Runs of a Weights & Biases project.

  A run that goes on goes on under the same number, which lies in its folder as ``wandb.json`` with
  the step that it has come to, and no step is logged twice. Offline, each part is a folder of its
  own with that number, which ``wandb sync`` puts together.

  Args:
    project: its name.
    **init: what else ``wandb.init`` takes: ``entity``, ``tags``, ``mode="offline"``, ``settings``.

  Raises:
    MissingExtraError: wandb is not installed.
    TypeError: ``project`` is no text.
  """

  def __init__(self, project: str = "jaxdistill", **init: Any) -> None:
    _extras.need("runs.Wandb", "wandb")
    if not isinstance(project, str) or not project:
      raise TypeError(f"project={_check.show(project)} must be a name.")
    self.project, self.init = project, init
    self._about: dict[str, Any] = {}

  def start(self, config: Mapping[str, Any]) -> None:
    """Begins the run, or goes on with it."""
    import wandb

    about = config["run"]
    self._note = _note(about, "wandb")
    self._about = _noted(self._note, "project", self.project) or dict(self._about)
    if not self._about:
      self._about = {"id": uuid.uuid4().hex[:12], "project": self.project, "last": -1}
      _keep(self._note, self._about)
    self._run: Any = wandb.init(
      **{
        "project": self.project,
        "name": about["name"],
        "group": about["group"],
        "dir": about["folder"],
        "config": {name: value for name, value in config.items() if name != "run"},
        "id": self._about["id"],
        "resume": "allow",
        "reinit": "create_new",  # several runs of one process are apart
        **self.init,
      }
    )

  def log(self, step: int, numbers: Mapping[str, float]) -> None:
    """Logs a line, unless the run has it already."""
    if step <= self._about["last"]:
      return
    # Noted first: of a process that is killed in between, a line is missing rather than doubled.
    self._about["last"] = step
    _keep(self._note, self._about)
    self._run.log(dict(numbers), step=step)

  def finish(self, files: Sequence[pathlib.Path]) -> None:
    """Uploads the files, and ends the run."""
    for path in files:
      self._run.save(str(path), base_path=str(path.parent), policy="now")
    self._run.finish()


def _note(about: Mapping[str, Any], name: str) -> pathlib.Path | None:
  """Where a run's folder names the tracker's own run."""
  return None if about["folder"] is None else pathlib.Path(about["folder"]) / f"{name}.json"


def _noted(path: pathlib.Path | None, name: str, wanted: Any) -> dict[str, Any]:
  """What a note says, if it is of the same place; nothing where there is none."""
  if path is None or not path.is_file():
    return {}
  found = read_object(path)
  return found if found.get(name) == wanted else {}


def _keep(path: pathlib.Path | None, note: Mapping[str, Any]) -> None:
  if path is not None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, note)


def _key(name: str) -> str:
  """A name of letters that MLflow takes.

  >>> _key("top-5, %")
  'top-5_ _'
  """
  return re.sub(r"[^\w\-. :/]", "_", name)


def _plain(config: Mapping[str, Any], under: str = "") -> dict[str, Any]:
  """The numbers, words and short lists of a configuration by their path.

  >>> _plain({"steps": 10, "objective": {"temperature": 4.0}})
  {'steps': 10, 'objective.temperature': 4.0}
  """
  found: dict[str, Any] = {}
  for name, value in config.items():
    if isinstance(value, Mapping):
      found |= {} if name == "run" and not under else _plain(value, f"{under}{name}.")
    elif len(json.dumps(value)) <= 250:  # digests and shapes, not the data's whole description
      found[f"{under}{name}"] = value
  return found
