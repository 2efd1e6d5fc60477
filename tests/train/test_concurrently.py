"""Trainings in threads beside one another: what stops or fails one ends all of them, saved."""

import functools
import os
import signal
import threading
import time

import jax
import numpy as np
import optax
import pytest

from jaxdistill import data, networks, recipes, runs, train
from small_networks import Dense


@pytest.fixture
def alone(monkeypatch):
  """One device, as where trainings may go on at once."""
  monkeypatch.setattr(jax, "local_device_count", lambda: 1)


def endless(began=None):
  """A training as signals see it, which ends by `train.Stopped` alone."""
  with train.stop_signal(listening=True) as asked:
    if began is not None:
      began.set()
    for step in range(1000):
      if number := asked(step):
        raise train.stopped(number, f"saved at {step}")
      time.sleep(0.01)
  raise AssertionError("nobody stopped it")


def at_once(beside, here):
  """A script of two trainings; what is beside it is seen to its end."""
  with train.concurrently() as start:
    STARTED.append(start(beside))
    return here(), STARTED[-1].result()


STARTED = []


def test_what_fails_beside_stops_the_script_and_is_what_is_raised(alone):
  def fails():
    raise ValueError("a rate of -1")

  handler = signal.getsignal(signal.SIGTERM)
  with pytest.raises(ValueError, match="a rate of -1"):
    at_once(fails, endless)
  assert signal.getsignal(signal.SIGTERM) is handler


def test_where_the_script_fails_what_is_beside_it_stops(alone):
  began = threading.Event()

  def fails():
    assert began.wait(10)
    raise KeyError("no such teacher")

  with pytest.raises(KeyError, match="no such teacher"):
    at_once(functools.partial(endless, began), fails)
  assert isinstance(STARTED[-1].exception(), train.Stopped)


@pytest.mark.parametrize("trains", [True, False])
def test_sigterm_stops_all_of_them(alone, trains):
  began = threading.Event()

  def terminate():
    began.wait(10)
    os.kill(os.getpid(), signal.SIGTERM)

  def script():
    threading.Thread(target=terminate).start()
    if trains:
      endless()

  with pytest.raises(train.Stopped) as left:
    at_once(functools.partial(endless, began), script)
  assert left.value.code == 143
  assert isinstance(STARTED[-1].exception(), train.Stopped)


def test_a_time_limit_around_it_stops_all_of_them(alone):
  with pytest.raises(train.Stopped), train.time_limit(0.2):
    at_once(endless, endless)
  assert isinstance(STARTED[-1].exception(), train.Stopped)


def test_over_several_devices_one_comes_after_the_other():
  with train.concurrently() as start:
    assert start(threading.current_thread).result() is threading.main_thread()


@pytest.mark.slow
def test_two_runs_at_once_are_each_alone_and_go_on_where_both_were_stopped(alone, tmp_path):
  """To the bit: they share nothing but the machine."""
  rng = np.random.default_rng(0)
  examples = data.from_arrays(rng.standard_normal((64, 6), np.float32), rng.integers(0, 3, 64))
  source = data.on_device(examples, batch_size=16, data_seed=0)
  network = networks.linen(Dense(3))

  def fit(folder, seed, *, terminates=False):
    def terminate(step, record):
      if terminates and step == 4:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)  # the handler runs between two bytecodes

    return train.fit(
      network,
      recipes.labels(),
      data=source,
      optimizer=optax.sgd(0.1),
      steps=12,
      seed=seed,
      dispatch=train.with_jit(train.data_parallel(jax.devices()[:1])),
      watch=train.Watch(log_every=1, callback=terminate),
      run=train.Run(folder, progress=None),
    )

  one, two = fit(tmp_path / "one", 0), fit(tmp_path / "two", 1)
  both = tmp_path / "both"
  beside = functools.partial(fit, both / "one", 0)
  with pytest.raises(train.Stopped):
    at_once(beside, lambda: fit(both / "two", 1, terminates=True))
  here, beside = at_once(beside, lambda: fit(both / "two", 1))
  assert runs.fingerprint(beside.variables) == runs.fingerprint(one.variables)
  assert runs.fingerprint(here.variables) == runs.fingerprint(two.variables)
