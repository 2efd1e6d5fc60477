"""The processes of one program: how they find one another, and how one that dies ends the others.

A collective waits for every process, and for one that was killed until JAX's service misses its
heartbeats: a hundred seconds, by default. So each process holds a connection to process 0, which
the operating system closes when a process ends, however it ends. One that is merely silent says
nothing: a process may be slow, or stopped in a debugger.

What a process waits in cannot be interrupted from Python, and so it is left as a kill would leave
it: with a sentence, what is being saved finished, and what was saved before to go on from.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import re
import secrets
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jaxdistill import _check, runs
from jaxdistill.train._stops import Stopped

__all__ = ["distributed", "together"]

_KEY = "jaxdistill/processes"
# How a process is missing: from its n-th work with the others on, in it alone, or at once.
_ENDED, _LEFT, _DIED = "has ended", "left the training", "has died"
# Seconds: in which all leave by the same error; in which what is being saved has to be finished,
# where the others have died or not; in which an ended process waits for the others, as JAX does.
_GRACE, _HURRY, _SAVING, _PARTING = 5.0, 4.0, 600.0, 300.0


# What `jax.distributed.initialize` looks for, in words.
_LOOKED_FOR = (
  "the variable JAX_COORDINATOR_ADDRESS; SLURM (SLURM_JOB_ID and what else srun sets); Open MPI "
  "(OMPI_MCA_orte_hnp_uri, of mpirun); Kubernetes (KUBERNETES_SERVICE_HOST, with pip install "
  "'jax[k8s]'); a Cloud TPU's machine"
)


def distributed(
  coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
  """Makes this process one of several: `jax.distributed.initialize`, which finds them, or is told.

  To be called before anything else of JAX is, in every process. JAX knows SLURM, Open MPI,
  Kubernetes and Cloud TPU from their environment. What it does not find there, it is told.

  Args:
    coordinator: ``"host:port"``, of process 0, which all of them reach; found where left out.
    processes: how many there are; likewise.
    process: which of them this one is, from 0 on; likewise.

  Raises:
    TypeError: ``coordinator`` is no text, or a number no integer.
    ValueError: a number is out of range, ``coordinator`` has no port, or something was neither told
      nor found; says what was looked for.
    RuntimeError: JAX was used before, or the others did not come.
  """
  if coordinator is not None:
    if not isinstance(coordinator, str):
      raise TypeError(f"coordinator={_check.show(coordinator)} must be 'host:port', or None.")
    if not re.fullmatch(r".+:\d+", coordinator):
      raise ValueError(f"coordinator={coordinator!r} must be 'host:port', of process 0.")
  if processes is not None:
    _check.whole("processes", processes)
  if process is not None:
    _check.whole("process", process, least=0)
    if processes is not None and process >= processes:
      raise ValueError(
        f"process={process} must be below processes={processes}: they are counted from 0 on."
      )
  try:
    jax.distributed.initialize(coordinator, processes, process)
  except ValueError as error:
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    left = [name for name, value in given.items() if value is None]
    if not left:
      raise
    raise ValueError(
      f"{', '.join(left)} of the program's processes were not given, and JAX did not find them "
      f"({_check.short(error)}). It looks for {_LOOKED_FOR}. Say them: coordinator='host:port' of "
      "process 0, processes=N, process=I; --coordinator, --processes, --process of an experiment."
    ) from error


@contextlib.contextmanager
def together() -> Iterator[None]:
  """What all processes of a program do together: where one of them is missing, the others end.

  Nothing at all in a program of one process.
  """
  if not jax.distributed.is_initialized() or jax.process_count() == 1:
    yield
    return
  with _peers().working():
    yield


@functools.cache
def _peers() -> _Peers:
  return _Peers()


class _Peers:
  """The connections of this process: of process 0 to all the others, of another one to process 0.

  What is said on them are lines of four words: how a process is missing, which it is, in which of
  its works with the others, and by what.
  """

  def __init__(self) -> None:
    self._me, self._count = jax.process_index(), jax.process_count()
    # How many times this process has begun to work with the others, and whether it does so now.
    self._number, self._inside = 0, False
    self._links: dict[int, socket.socket] = {}
    self._parted: set[int] = set()
    self._died = threading.Event()
    self._ending = threading.Lock()
    _begin(self._connect)
    atexit.register(self._part)  # before JAX's own, which would wait for those that died

  @contextlib.contextmanager
  def working(self) -> Iterator[None]:
    """Marks what happens here as done by all processes."""
    self._number, self._inside = self._number + 1, True
    try:
      yield
    except Stopped:  # as all do, though one may still be saving
      raise
    except BaseException as error:
      # It may be that of a collective which broke: the sentence about that is under way.
      if self._died.wait(0.5):
        time.sleep(_HURRY + 1)  # this process is being ended, by the sentence that says why
      else:
        self._tell(_LEFT, f"by {_check.short(error)}")
      raise
    finally:
      self._inside = False

  def _connect(self) -> None:
    # The coordinator's address is that of process 0, and all have reached it. JAX has no public
    # name for it, nor for the store by which the port gets to the others.
    from jax._src import distributed

    state: Any = distributed.global_state
    host = str(state.coordinator_address).rsplit(":", 1)[0].strip("[]")
    try:
      if self._me:
        port, word = state.client.blocking_key_value_get(_KEY, int(1000 * _PARTING)).split()
        link = socket.create_connection((host, int(port)), timeout=60)
        link.sendall(f"{word} {self._me}\n".encode())
        self._hold(0, link)
      else:
        family = socket.getaddrinfo(host, None)[0][0]
        with socket.create_server(("", 0), family=family) as server:
          word = secrets.token_hex(16)
          state.client.key_value_set(_KEY, f"{server.getsockname()[1]} {word}")
          while len(self._links) < self._count - 1:
            self._accept(server.accept()[0], word)
    except (OSError, RuntimeError) as error:
      warnings.warn(
        f"process {self._me} has no connection to the others ({_check.short(error)}): that one "
        "dies is noticed by JAX's heartbeats alone (heartbeat_timeout_seconds of "
        "jax.distributed.initialize).",
        stacklevel=1,
      )

  def _accept(self, link: socket.socket, word: str) -> None:
    link.settimeout(10)
    with contextlib.suppress(OSError, ValueError):
      known, process = link.makefile().readline(100).split()
      if secrets.compare_digest(known, word):  # whoever does not know it is none of ours
        self._hold(int(process), link)
        return
    link.close()

  def _hold(self, process: int, link: socket.socket) -> None:
    link.settimeout(None)
    # A machine that is gone closes nothing; then the system asks, for ten seconds.
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 4), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3)):
      if hasattr(socket, name):
        link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    self._links[process] = link
    _begin(lambda: self._listen(process, link))

  def _listen(self, process: int, link: socket.socket) -> None:
    with contextlib.suppress(OSError):
      for line in link.makefile(encoding="utf-8", errors="replace"):
        self._hear(*line.rstrip("\n").split("\t"))
    if process not in self._parted:
      self._hear(_DIED, str(process), "0", "")

  def _hear(self, how: str, process: str, number: str, why: str) -> None:
    if self._me == 0:
      self._send((how, process, number, why), but=int(process))
    if how == _ENDED:
      self._parted.add(int(process))
    if how == _DIED:
      self._died.set()
    text = f"process {process} of {self._count} {' '.join([how, why]).strip()}"
    _begin(lambda: self._follow(how, int(number), text))

  def _follow(self, how: str, number: int, text: str) -> None:
    """Ends this process when it waits for one that is missing."""
    since = None
    while how != _LEFT or self._number <= number:
      if self._inside and self._number >= number:
        since = time.monotonic() if since is None else since
        if how == _DIED or time.monotonic() > since + _GRACE:
          self._end(text, _HURRY if how == _DIED else _SAVING)
      elif how == _LEFT and self._number == number:
        return  # this one has left, too
      time.sleep(0.1)

  def _end(self, text: str, patience: float) -> None:
    self._ending.acquire()  # once, and for ever
    print(
      f"jaxdistill: {text}, and process {self._me} ends with it. Start all of them again: a run "
      "goes on from its last checkpoint.",
      file=sys.stderr,
      flush=True,
    )
    runs.wait_for_saves(patience)
    _leave()

  def _part(self) -> None:
    """At the end of the program: goes when the others go, by JAX's own way if all are there."""
    self._tell(_ENDED, "")
    until = time.monotonic() + _PARTING
    while not self._died.is_set() and set(self._links) - self._parted:
      if time.monotonic() > until:
        return
      time.sleep(0.02)
    if self._died.is_set():
      _leave()

  def _tell(self, how: str, why: str) -> None:
    number = self._number + (how == _ENDED)
    self._send((how, str(self._me), str(number), " ".join(why.split())))

  def _send(self, words: tuple[str, ...], but: int | None = None) -> None:
    for process, link in list(self._links.items()):
      if process != but:
        with contextlib.suppress(OSError):
          link.sendall(("\t".join(words) + "\n").encode())


def _begin(work: Callable[[], None]) -> None:
  threading.Thread(target=work, daemon=True).start()


def _leave() -> None:
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError, ValueError, AttributeError):
      stream.flush()
  os._exit(1)
