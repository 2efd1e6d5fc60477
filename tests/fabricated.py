"""Run folders as training leaves them, made up in a moment: answers of three models, and logs."""

import json

import numpy as np

from jaxdistill import reports, runs
from jaxdistill.evaluation import predictions
from jaxdistill.evaluation.predictions import Answers, Predictions
from jaxdistill.reports._pages import analysis

COSTS = {"flops": 1000, "throughput": 1e4, "throughput_batch": 128}
TEACHER = {**COSTS, "parameters": 1000, "bytes": 4000, "latency_ms": {"median": 0.4, "p95": 0.5}}
STUDENT = {**COSTS, "parameters": 100, "bytes": 400, "latency_ms": {"median": 0.1, "p95": 0.2}}
DESCRIBED = {"teacher": "a large one", "baseline": "on labels alone", "student": "distilled"}


def answers(labels, accuracy, seeds, *, classes=4, seed=0):
  """Answers that are right with a probability (one, or one for each example)."""
  random = np.random.default_rng(seed)
  shape = (seeds, len(labels))
  wrong = (labels + random.integers(1, classes, shape)) % classes
  right = random.random(shape) < accuracy
  confidence = random.uniform(0.5, 1, shape).astype(np.float32)
  probability = np.where(right, confidence, (1 - confidence) / 3).astype(np.float32)
  return Answers(np.where(right, labels, wrong).astype(np.int32), confidence, probability)


def gathered(size=400, *, seeds=3, classes=4, student=0.93, baseline=0.85, seed=0, **rest):
  """Answers of a good teacher, a student and, unless it is None, a baseline."""
  labels = (np.arange(size) % classes).astype(np.int32)
  models = {"teacher": answers(labels, 0.97, 1, classes=classes, seed=seed)}
  if baseline is not None:
    models["baseline"] = answers(labels, baseline, seeds, classes=classes, seed=seed + 1)
  models["student"] = answers(labels, student, seeds, classes=classes, seed=seed + 2)
  about = {"dataset": "made up 1.0", "split": "test", "seeds": tuple(range(seeds))}
  return Predictions(np.arange(size), labels, models, **{**about, "num_classes": classes, **rest})


def measured(found, name):
  """A model of those answers, as `reports.measure_model` would have measured it."""
  quality = analysis.quality(found, name)
  teacher = found.models["teacher"].predicted
  agreement = (found.models[name].predicted == teacher[:1]).mean(axis=1)
  some = np.full(len(agreement), 0.1)
  quality |= {"top5": np.ones(len(agreement)), "brier": some, "agreement": agreement}
  quality |= {"kl": some, "accuracy_where_teacher_wrong": some}
  costs = TEACHER if name == "teacher" else STUDENT
  return reports.Measured(quality, costs, DESCRIBED[name], found.models[name])


def built(found, **changed):
  """The report of those answers; other measurements may stand in a model's place."""
  parts = {name: measured(found, name) for name in found.models} | changed
  return reports.build_report(
    dataset=found.dataset,
    split=found.split,
    examples=len(found),
    seeds=found.seeds,
    varied="initialisation",
    commands=["python train.py --out runs/a"],
    **parts,
  )


def logs(folder, names=("baseline", "student")):
  for name in names:
    (folder / name).mkdir(exist_ok=True)
    lines = [
      {"step": s, "loss": [2 / s, 3 / s, 2.5 / s], "soft": [1 / s] * 3, "epoch": s / 10}
      for s in range(1, 40)
    ]
    lines[-1]["validation/accuracy"] = [0.9, 0.91, 0.92]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / name / "metrics.jsonl").write_text(text)


def run(folder, found=None, *, pages=True, **changed):
  """A run's folder with its report, or with the numbers of one alone; returns it."""
  found = gathered() if found is None else found
  folder.mkdir(exist_ok=True)
  logs(folder)
  (folder / "config.json").write_text(json.dumps({"experiment": "made up", "rate": 0.1}))
  report = built(found, **changed)
  if pages:
    reports.write_report(folder, report, predictions=found)
  else:
    runs.write_json(folder / "report.json", {**report, "predictions": "predictions.npz"})
    predictions.save(folder / "predictions.npz", found)
  return folder


def exported(folder, **changed):
  """A list of exported files with one that is there, of 4 bytes."""
  (folder / "exports").mkdir(exist_ok=True)
  (folder / "exports" / "student.onnx").write_bytes(b"onnx")
  entry = {
    "file": "student.onnx",
    "kind": "onnx",
    "bytes": 4,
    "runtime": "onnxruntime 1.22",
    "passed": True,
    "accuracy": 0.93,
    "agreement": 1.0,
    "largest_difference": 1.5e-6,
    "tolerance": 1e-4,
    "latency_ms": {"median": 0.031, "p95": 0.045},
    "least_jax": None,
    "problem": None,
  }
  listed = {"version": 1, "batch_size": 1, "examples": 400, "split": "test"}
  listed |= {"student_accuracy": 0.93, "files": [entry | changed]}
  (folder / "exports" / "exports.json").write_text(json.dumps(listed))
