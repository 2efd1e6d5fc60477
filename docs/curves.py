"""The curves on the page of the losses: value and gradient of each, along one line of students.

    python docs/curves.py        # how many there are, and the bytes of their drawings

`docs/conf.py` draws them while the site is built, from the library's own functions, so that none is
stored. What a loss is given goes by the names of its arguments and by its family; a line runs from
one student to another, the dashed mark is where the student is as the teacher.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.ticker import MaxNLocator

from jaxdistill import losses

__all__ = ["Curve", "curves", "drawing"]

POINTS = 81
# Of both pictures; the third is between them, the last two are left and below, for the figures.
WIDTH, HEIGHT, GAP, LEFT, BELOW = 190, 110, 26, 44, 34
TEACHER = (2.0, 1.0, 0.0, -1.0)  # logits of four classes; the first is the label


@dataclasses.dataclass(frozen=True)
class Curve:
  """A line of students through a loss.

  Attributes:
    value: of where one is on the line; a number to a number.
    moves: what is along it, for a caption.
    low: where it begins.
    high: where it ends.
    equal: where the student is the teacher; None where there is no such place.
  """

  value: Callable[[jax.Array], jax.Array]
  moves: str
  low: float
  high: float
  equal: float | None


# What is given, for the argument of each name: a function of where one is on the line.
Given = Mapping[str, Callable[[jax.Array], object]]


def _fixed(value: object) -> Callable[[jax.Array], object]:
  return lambda x: value


def _numbers(seed: int, *shape: int) -> jax.Array:
  """Drawn once and for all."""
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def _blend(*shape: int, seed: int = 0, teacher: jax.Array | None = None) -> Given:
  """Student and teacher: at 0 the student is a draw of its own, at 1 the teacher."""
  end = _numbers(seed, *shape) if teacher is None else teacher
  start = _numbers(seed + 1, *end.shape)
  return {"student": lambda x: start + x * (end - start), "teacher": _fixed(end)}


def _logits(rows: int = 1) -> Given:
  """Logits of one example, or of several of which the first moves."""
  others = _numbers(3, rows - 1, 4)
  teacher = jnp.concatenate([jnp.asarray([TEACHER]), others + _numbers(4, rows - 1, 4)])

  def student(x: jax.Array) -> jax.Array:
    return jnp.concatenate([jnp.stack([x, *map(jnp.float32, TEACHER[1:])])[None], others])

  return {
    "student_logits": student,
    "logits": student,
    "teacher_logits": _fixed(teacher),
    "labels": _fixed(jnp.zeros(rows, jnp.int32)),
    "inside": _fixed(jnp.asarray([[True, True, False, False]])),
    "top": _fixed(2),  # of four classes five would leave no rest
  }


def _zipf() -> Given:
  """Of a loss that looks at no logit of the label: another one moves."""

  def student(x: jax.Array) -> jax.Array:
    return jnp.stack([jnp.float32(2), x, jnp.float32(0), jnp.float32(-1)])[None]

  weak = jnp.asarray([[1.0, 0.5, 0.2, -0.5]])
  return {
    "student_logits": student,
    "weak_logits": _fixed(weak),
    "labels": _fixed(jnp.zeros(1, jnp.int32)),
  }


def _views() -> Given:
  """Two looks at one image, and its regions."""
  student, teacher = _logits()["student_logits"], jnp.asarray([TEACHER])
  parts = _numbers(5, 4, 4)

  def regions(x: jax.Array) -> jax.Array:
    return jnp.concatenate([student(x), parts])[None]

  return {
    "student_weak": student,
    "student_strong": _fixed(teacher / 2),
    "teacher_weak": _fixed(3 * teacher),  # 0.95 of its label: both masks let the example in
    "teacher_strong": _fixed(teacher),
    "student_regions": regions,
    "teacher_regions": _fixed(jnp.concatenate([teacher, parts])[None]),
    "labels": _fixed(jnp.zeros(1, jnp.int32)),
  }


def _bank() -> Given:
  """Four examples beside banks of twelve, of three classes."""
  labels = jnp.arange(12) % 3
  given = {
    **_blend(4, 6),
    "labels": _fixed(labels[:4]),
    "index": _fixed(jnp.arange(4)),
    "banks": _fixed(losses.init_banks(jax.random.key(0), labels, 6)),
    "key": _fixed(jax.random.key(1)),
    "negatives": _fixed(4),
  }
  # The first batch sets the normalisers, which stay for the rest of a run, as here.
  first: dict[str, Any] = {name: make(jnp.float32(0)) for name, make in given.items()}
  return {**given, "banks": _fixed(losses.contrastive_bank(**first)[1])}


def _pairs() -> Given:
  """Two layers' maps of either network."""
  lower, upper = _blend(1, 4, 4, 3), _blend(1, 4, 4, 5, seed=7)
  return {
    f"{which}_pair": lambda x, which=which: (lower[which](x), upper[which](x))
    for which in ("student", "teacher")
  }


def _towers() -> Given:
  """Embeddings of four images and of their texts."""
  images, texts = _blend(4, 6), _blend(4, 6, seed=7)
  return {
    f"{which}_{name}": given[which]
    for which in ("student", "teacher")
    for name, given in (("images", images), ("texts", texts))
  }


def _number(*teacher: float) -> Given:
  """A number, with a logarithm of its variance beside it where the teacher has one."""
  rest = [jnp.float32(value) for value in teacher[1:]]
  return {
    "student": lambda x: jnp.stack([x, *rest])[None],
    "student_scores": lambda x: jnp.stack([x, *rest])[None],
    "student_logits": lambda x: jnp.stack([x, *rest])[None],
    "teacher": _fixed(jnp.asarray([teacher])),
    "teacher_scores": _fixed(jnp.asarray([teacher])),
    "teacher_logits": _fixed(jnp.asarray([teacher])),
    "target": _fixed(jnp.zeros((1, 1))),
    "labels": _fixed(jnp.ones((1, 1))),
  }


def _prototypes() -> Given:
  means = _numbers(9, 4, 6)
  teacher = means[:1] + 0.3 * _numbers(8, 1, 6)
  return {
    **_blend(teacher=teacher),
    "labels": _fixed(jnp.zeros(1, jnp.int32)),
    "means": _fixed(means),
  }


def _wide() -> Given:
  """A student's map of twice the teacher's channels."""
  teacher = _numbers(0, 1, 4, 4, 3)
  both = _blend(teacher=jnp.concatenate([teacher, teacher], -1))
  return {"student": both["student"], "teacher": _fixed(teacher)}


_LOGIT = (
  "the student's logit of the label; the others, 1, 0 and −1, are the teacher's, whose label has 2"
)
_FEATURE = "from features drawn at random (0) to the teacher's (1), and on"
_BATCH = "; three more examples stay as they are"
_WHOLE = _LOGIT.replace("logit of", "logit, for the whole image, of") + "; its regions stay"
_WEAK = (
  "the student's logit of the label in the weak view; its others are 1, 0 and −1, the teacher's 6, "
  "3, 0 and −3 there and 2, 1, 0 and −1 in the strong view"
)
_OTHER = "the student's logit of a class that is not the label; the others are 2 (its), 0 and −1"
_TAG = "the student's logit of one label, which is on; the teacher's is 1"
_NUMBER = "the student's number; the teacher's is 1, the label 0"
_MEAN = "the student's mean, at a variance of 1; the teacher's is 1, the label 0"
_SCORE = "the right candidate's score; the teacher's is 2, the other's 0"
# By family: what is given, what is along the line, from where to where, and where both are equal.
FAMILIES: dict[str, tuple[Given, str, float, float, float | None]] = {
  "logits": (_logits(), _LOGIT, -4, 8, 2),
  "partitions": (_logits(), _LOGIT, -4, 8, 2),
  "self_distillation": (_logits(), _LOGIT, -4, 8, 2),
  "views": (_views(), _WHOLE, -4, 8, 2),
  "binary": (_number(1.0), _TAG, -5, 5, 1),
  "regression": (_number(1.0), _NUMBER, -3, 3, 1),
  "ranking": (_number(2.0, 0.0), _SCORE, -4, 8, 2),
  "features": (_blend(1, 4, 4, 3), _FEATURE, -1, 3, 1),
  "prototypes": (_prototypes(), _FEATURE, -1, 3, 1),
  "relations": (_blend(4, 6), _FEATURE, -1, 3, 1),
}
# What is not as its family.
_several = (_logits(4), _LOGIT + _BATCH, -4.0, 8.0, 2.0)
_gaussian = (_number(1.0, 0.0), _MEAN, -3.0, 3.0, 1.0)
OTHERS: dict[str, tuple[Given, str, float, float, float | None]] = {
  "affinity": (_towers(), _FEATURE, -1, 3, 1),
  "attention_relation": ({**_blend(1, 4, 6), "num_heads": _fixed(2)}, _FEATURE, -1, 3, 1),
  "batch_gram": _several,
  "class_gram": _several,
  "cross_view_kd": (_views(), _WEAK, -4, 8, None),
  "contrastive_bank": (_bank(), _FEATURE, -1, 3, 1),
  "flow_of_solution": (_pairs(), _FEATURE, -1, 3, 1),
  "gaussian_kl": _gaussian,
  "gaussian_nll": _gaussian,
  "hint_normalized": (_blend(1, 8), _FEATURE, -1, 3, None),
  "intra_class_correlation": _several,
  "many_to_one": (_wide(), _FEATURE, -1, 3, 1),
  "overhaul": ({**_blend(1, 4, 4, 3), "margin": _fixed(jnp.full(3, -0.5))}, _FEATURE, -1, 3, 1),
  "self_nontarget": (_zipf(), _OTHER, -4, 8, None),
  "self_target": _several,
  "variational_information": (
    {
      "student_mean": _blend(1, 4, 4, 3)["student"],
      "teacher": _blend(1, 4, 4, 3)["teacher"],
      "raw_variance": _fixed(jnp.full(3, 0.5413)),  # a variance of 1
    },
    _FEATURE,
    -1,
    3,
    1,
  ),
}


def curves(families: Mapping[str, list[str]]) -> dict[str, Curve]:
  """A curve for each loss.

  Args:
    families: the names of the losses of each family.

  Returns:
    The curves by name.

  Raises:
    KeyError: a family, or a needed argument of a loss, for which nothing is given here.
  """
  return {
    name: _curve(name, *OTHERS.get(name, FAMILIES[family]))
    for family, names in families.items()
    for name in names
  }


def _curve(name: str, given: Given, *line: str | float | None) -> Curve:
  """The loss of what is given; what is not, at its own default."""
  loss = getattr(losses, name)
  parameters = inspect.signature(loss).parameters.values()
  used = {p.name: given[p.name] for p in parameters if p.default is p.empty or p.name in given}
  teacher = any(argument.startswith("teacher") for argument in used)

  def value(x: jax.Array) -> jax.Array:
    values = loss(**{key: make(x) for key, make in used.items()})
    return jnp.mean(values[0] if isinstance(values, tuple) else values)

  moves, low, high, equal = line
  return Curve(value, moves, low, high, equal if teacher else None)


# Much to compile and little to compute. Without XLA's optimisations (level 0) it would be quicker
# still, but there a maximum's gradient compares numbers that were rounded twice, and is 0 / 0.
_OPTIONS = {
  "xla_cpu_parallel_codegen_split_count": 1,
  "xla_cpu_use_fusion_emitters": False,
  "xla_llvm_disable_expensive_passes": True,
}


@functools.partial(jax.jit, static_argnums=0, compiler_options=_OPTIONS)
def _along(value: Callable[[jax.Array], jax.Array], where: jax.Array) -> tuple[jax.Array, ...]:
  return jax.vmap(jax.value_and_grad(value))(where)


def drawing(name: str, curve: Curve) -> str:
  """Value and gradient beside each other.

  Args:
    name: of the loss, for the title.
    curve: its curve.

  Returns:
    An SVG to be put into a page: its colours are the theme's, light or dark.

  Raises:
    ValueError: a value or a gradient on the line is not finite.
  """
  where = np.linspace(curve.low, curve.high, POINTS)
  found = [np.asarray(y, np.float64) for y in _along(curve.value, jnp.asarray(where, jnp.float32))]
  if not np.isfinite(found).all():
    raise ValueError(f"{name}: not all of the curve is finite; choose another line for it.")
  width, height = 2 * (LEFT + WIDTH) + GAP + 8, 20 + HEIGHT + BELOW
  parts = [
    f'<svg class="drawing curve" viewBox="0 0 {width} {height}" role="img" '
    'xmlns="http://www.w3.org/2000/svg">',
    f"<title>{name}: value and gradient</title>",
  ]
  for i, (title, y) in enumerate(zip(("value", "gradient"), found, strict=True)):
    parts += _panel(title, where, y, curve.equal, LEFT + i * (LEFT + WIDTH + GAP))
  return "\n".join([*parts, "</svg>"])


def _panel(title: str, x: np.ndarray, y: np.ndarray, equal: float | None, left: int) -> list[str]:
  """One picture with its frame and figures, whose upper left corner is at (left, 20)."""
  low, high = min(y.min(), 0.0), max(y.max(), 0.0)
  # A curve of nothing but 0 and of rounding is level.
  span = max(high - low, 1e-6)
  across = left + (x - x[0]) / (x[-1] - x[0]) * WIDTH

  def down(number: float | np.ndarray) -> float | np.ndarray:
    return 20 + HEIGHT - 4 - (number - low) / span * (HEIGHT - 8)

  bottom = 20 + HEIGHT
  points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(across, down(y), strict=True))
  parts = [
    f'<rect x="{left}" y="20" width="{WIDTH}" height="{HEIGHT}"/>',
    f'<text x="{left + WIDTH / 2}" y="14">{title}</text>',
    f'<path class="zero" d="M{left} {down(0.0):.1f} h{WIDTH}"/>',
  ]
  if equal is not None:
    at = left + (equal - x[0]) / (x[-1] - x[0]) * WIDTH
    parts.append(f'<path class="equal" d="M{at:.1f} 20 v{HEIGHT}"/>')
  parts.append(f'<polyline points="{points}"/>')
  for tick in MaxNLocator(3, steps=[1, 2, 5, 10]).tick_values(low, low + span):
    if low <= tick <= low + span:
      text = f"{tick:.4g}".replace("-", "−")
      parts.append(f'<text class="small end" x="{left - 5}" y="{down(tick) + 4:.1f}">{text}</text>')
  for tick in np.linspace(x[0], x[-1], 5):
    place = left + (tick - x[0]) / (x[-1] - x[0]) * WIDTH
    text = f"{tick:g}".replace("-", "−")
    parts.append(f'<text class="small" x="{place:.1f}" y="{bottom + 15}">{text}</text>')
  return parts


if __name__ == "__main__":
  import losses as page  # docs/losses.py: a script's own folder comes first

  drawn = {name: drawing(name, curve) for name, curve in curves(page.averaged()).items()}
  print(f"{len(drawn)} curves, {sum(map(len, drawn.values())):,} bytes")
