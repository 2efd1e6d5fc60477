"""Divergences between predictions ``[..., K]``, one value per example; public through `logits`.

They take classes masked to −inf (or below −1e30) in both networks: such a class has no part in any
sum, mean or gradient. A class that only one network masks has probability 0 there; where the
other's probability makes the divergence infinite, it comes out finite and absurdly large (around
1e30) instead, and so does `cross_entropy` of a label that is masked.

Throughout, p = softmax(teacher_logits / temperature), q = softmax(student_logits / temperature)
and logarithms are natural.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from jaxdistill.losses._log_space import (
  MASKED,
  AnyArray,
  Scalar,
  absolute,
  check_positive,
  check_share,
  distribution,
  float_arrays,
  is_masked,
  kl,
  log_mixture,
  log_probabilities,
  one_hot,
  pair,
  soften,
)

__all__ = [
  "cross_entropy",
  "decoupled_kd",
  "generalized_jsd",
  "reverse_kl",
  "skew_kl",
  "skew_reverse_kl",
  "soft_target_kl",
  "total_variation",
]


def cross_entropy(
  student_logits: Float[AnyArray, "*batch K"],
  labels: Integer[AnyArray, "*batch"] | Float[AnyArray, "*batch K"],
  *,
  label_smoothing: Scalar = 0.0,
) -> Float[Array, "*batch"]:
  """Cross-entropy (CE) with hard labels or a distribution.

  −Σ_k y_k log q_k, q = softmax(student_logits),
  y = (1 − label_smoothing) · labels + label_smoothing / K, integer labels as one-hot rows.

  Args:
    student_logits: ``[..., K]``. Classes masked to −inf are left out, and smoothing spreads over
      the others (K is their number).
    labels: ``[...]`` integers, or ``[..., K]`` distributions (mixup). An integer outside
      ``0 .. K-1`` names no class and contributes 0.
    label_smoothing: the share of y that is spread evenly, in [0, 1]. 0, plain cross-entropy, is
      PyTorch's.

  Returns:
    ``[...]``, in nats.

  Raises:
    ValueError: ``labels`` are neither of the two, or ``label_smoothing`` is outside [0, 1].

  Source: Szegedy, Vanhoucke, Ioffe, Shlens, Wojna, "Rethinking the Inception Architecture for
  Computer Vision", 2016 (for label smoothing).

  Other codes: here label_smoothing / K goes to every class, the label's included, as in PyTorch and
  optax; fairseq spreads it over the K − 1 others.

  >>> logits = jnp.log(jnp.array([0.75, 0.25]))
  >>> round(cross_entropy(logits, jnp.array(0)).item(), 4)  # -log 0.75
  0.2877
  >>> round(cross_entropy(logits, jnp.array([0.5, 0.5])).item(), 4)
  0.837
  """
  check_share("label_smoothing", label_smoothing)
  student = float_arrays(student_logits)[0]
  targets = distribution(labels, student)
  # A zero that is known when tracing saves a pass over the classes.
  if not (isinstance(label_smoothing, float | int) and label_smoothing == 0):
    smoothing = jnp.asarray(label_smoothing, student.dtype)
    valid = (~is_masked(student)).astype(student.dtype)
    count = jnp.maximum(jnp.sum(valid, axis=-1, keepdims=True), 1)
    targets = (1 - smoothing) * targets + smoothing * valid / count
  return -jnp.sum(targets * jax.nn.log_softmax(soften(student, 1.0), axis=-1), axis=-1)


def soft_target_kl(
  student_logits: Float[AnyArray, "*batch K"],
  teacher_logits: Float[AnyArray, "*batch K"],
  *,
  temperature: Scalar = 4.0,
) -> Float[Array, "*batch"]:
  """Knowledge distillation (KD): KL of the teacher's softened probabilities from the student's.

  temperature² · Σ_k p_k log(p_k / q_k), where a p_k of 0 contributes 0,
  p = softmax(teacher_logits / temperature), q = softmax(student_logits / temperature).

  Args:
    student_logits: ``[..., K]``, q's logits. Classes masked to −inf in both are left out.
    teacher_logits: ``[..., K]``, p's logits.
    temperature: softens both, > 0. 4 is RepDistiller's and mdistiller's for CIFAR-100.

  Returns:
    ``[...]``, in nats · temperature².

  Raises:
    ValueError: the shapes differ or ``temperature`` is not positive.

  Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015.

  Other codes: this, as the mean over the batch, is the number of RepDistiller, mdistiller and, with
  labels, torchdistill; without labels torchdistill leaves temperature² out. TextBrewer has the
  cross-entropy −Σ_k p_k log q_k without temperature², KD_Lib a squared error of the probabilities.

  >>> student, teacher = jnp.zeros(2), jnp.log(jnp.array([0.75, 0.25]))
  >>> round(soft_target_kl(student, teacher, temperature=1.0).item(), 4)
  0.1308
  >>> soft_target_kl(teacher, teacher).item()
  0.0
  """
  log_q, log_p, squared = log_probabilities(student_logits, teacher_logits, temperature)
  return squared * kl(log_p, log_q)


def reverse_kl(
  student_logits: Float[AnyArray, "*batch K"],
  teacher_logits: Float[AnyArray, "*batch K"],
  *,
  temperature: Scalar = 1.0,
) -> Float[Array, "*batch"]:
  """Reverse KL (RKL), as in MiniLLM: mode-seeking where `soft_target_kl` covers mass.

  temperature² · Σ_k q_k log(q_k / p_k), where a q_k of 0 contributes 0,
  p = softmax(teacher_logits / temperature), q = softmax(student_logits / temperature).

  Args:
    student_logits: ``[..., K]``, q's logits. Classes masked to −inf in both are left out.
    teacher_logits: ``[..., K]``, p's logits.
    temperature: softens both, > 0. 1 is MiniLLM's.

  Returns:
    ``[...]``, in nats · temperature².

  Raises:
    ValueError: the shapes differ or ``temperature`` is not positive.

  Source: Gu, Dong, Wei, Huang, "MiniLLM: Knowledge Distillation of Large Language Models", 2023.

  Other codes: this one is exact over the classes, position by position, as in DistiLLM's code,
  which has no temperature; MiniLLM's policy gradient over sequences is another estimator.

  >>> student, teacher = jnp.zeros(2), jnp.log(jnp.array([0.75, 0.25]))
  >>> round(reverse_kl(student, teacher).item(), 4)
  0.1438
  """
  log_q, log_p, squared = log_probabilities(student_logits, teacher_logits, temperature)
  return squared * kl(log_q, log_p)


def generalized_jsd(
  student_logits: Float[AnyArray, "*batch K"],
  teacher_logits: Float[AnyArray, "*batch K"],
  *,
  beta: Scalar = 0.5,
  temperature: Scalar = 1.0,
) -> Float[Array, "*batch"]:
  """Generalised Jensen-Shannon divergence (JSD, GKD): both networks against their mixture.

  temperature² · [beta · KL(p ‖ m) + (1 − beta) · KL(q ‖ m)], m = beta · p + (1 − beta) · q,
  KL(a ‖ b) = Σ_k a_k log(a_k / b_k),
  p = softmax(teacher_logits / temperature), q = softmax(student_logits / temperature).

  As written it goes to 0 at both ends, beta → 0 and beta → 1 (divided by beta it tends to KL(p‖q)
  at 0; divided by 1 − beta, to KL(q‖p) at 1). For these two use `soft_target_kl` and `reverse_kl`.

  Args:
    student_logits: ``[..., K]``, q's logits. Classes masked to −inf in both are left out.
    teacher_logits: ``[..., K]``, p's logits.
    beta: the teacher's share of the mixture, in [0, 1]. 0.5, the symmetric divergence, is TRL's
      and one of the paper's.
    temperature: softens both, > 0. 1 is the paper's.

  Returns:
    ``[...]``, in nats · temperature².

  Raises:
    ValueError: the shapes differ, ``temperature`` is not positive or ``beta`` outside [0, 1].

  Source: Agarwal, Vieillard, Zhou, Stanczyk, Ramos, Geist, Bachem, "On-Policy Distillation of
  Language Models: Learning from Self-Generated Mistakes", 2023.

  Other codes: this is the paper's formula at every beta. TRL and Liger put KL(p ‖ q) at beta = 0
  and KL(q ‖ p) at beta = 1, EasyDeL the reverse, with other weights between; TRL and Liger have no
  temperature².

  >>> student, teacher = jnp.zeros(2), jnp.log(jnp.array([0.75, 0.25]))
  >>> round(generalized_jsd(student, teacher).item(), 4)
  0.0338
  >>> generalized_jsd(student, teacher, beta=0.0).item()
  0.0
  """
  check_share("beta", beta)
  log_q, log_p, squared = log_probabilities(student_logits, teacher_logits, temperature)
  share = jnp.asarray(beta, log_q.dtype)
  log_m = log_mixture(log_p, log_q, share)
  return squared * (share * kl(log_p, log_m) + (1 - share) * kl(log_q, log_m))


def total_variation(
  student_logits: Float[AnyArray, "*batch K"],
  teacher_logits: Float[AnyArray, "*batch K"],
  *,
  temperature: Scalar = 1.0,
) -> Float[Array, "*batch"]:
  """Total variation distance (TVD) of the softened probabilities.

  temperature² · ½ Σ_k |p_k − q_k|,
  p = softmax(teacher_logits / temperature), q = softmax(student_logits / temperature).

  Its gradient is 0 where p_k = q_k.

  Args:
    student_logits: ``[..., K]``, q's logits. Classes masked to −inf in both are left out.
    teacher_logits: ``[..., K]``, p's logits.
    temperature: softens both, > 0. 1 is the paper's.

  Returns:
    ``[...]``, in [0, temperature²].

  Raises:
    ValueError: the shapes differ or ``temperature`` is not positive.

  Source: Wen, Li, Du, Mou, "f-Divergence Minimization for Sequence-Level Knowledge Distillation",
  2023.

  Other codes: temperature² is here as in DistillKit; Liger and DistiLLM's code have none.

  >>> student, teacher = jnp.zeros(2), jnp.log(jnp.array([0.75, 0.25]))
  >>> round(total_variation(student, teacher).item(), 4)
  0.25
  """
  log_q, log_p, squared = log_probabilities(student_logits, teacher_logits, temperature)
  return squared * 0.5 * jnp.sum(absolute(jnp.exp(log_p) - jnp.exp(log_q)), axis=-1)


def skew_kl(
  student_logits: Float[AnyArray, "*batch K"],
  teacher_logits: Float[AnyArray, "*batch K"],
  *,
  skew: Scalar = 0.1,
  temperature: Scalar = 1.0,
) -> Float[Array, "*batch"]:
  """Skew KL (SKL) of DistiLLM: the teacher from a mixture of both.

  temperature² · KL(p ‖ m), m = skew · p + (1 − skew) · q,
  KL(a ‖ b) = Σ_k a_k log(a_k / b_k),
  p = softmax(teacher_logits / temperature), q = softmax(student_logits / temperature).

  skew = 0 is `soft_target_kl`, skew = 1 is 0.

  Args:
    student_logits: ``[..., K]``, q's logits. Classes masked to −inf in both are left out.
    teacher_logits: ``[..., K]``, p's logits.
    skew: the teacher's share of the mixture, in [0, 1]. 0.1 is the paper's.
    temperature: softens both, > 0. 1 is the paper's.

  Returns:
    ``[...]``, in nats · temperature²; at most −log(skew) · temperature².

  Raises:
    ValueError: the shapes differ, ``temperature`` is not positive or ``skew`` outside [0, 1].

  Source: Ko, Kim, Chen, Yun, "DistiLLM: Towards Streamlined Distillation for Large Language
  Models", 2024.

  Other codes: the published code leaves out Σ_k p_k log p_k, which changes the value and not the
  student's gradient, and has no temperature; this is the paper's divergence, least (0) at q = p.

  >>> student, teacher = jnp.zeros(2), jnp.log(jnp.array([0.75, 0.25]))
  >>> round(skew_kl(student, teacher).item(), 4)
  0.107
  """
  check_share("skew", skew)
  log_q, log_p, squared = log_probabilities(student_logits, teacher_logits, temperature)
  return squared * kl(log_p, log_mixture(log_p, log_q, skew))


def skew_reverse_kl(
  student_logits: Float[AnyArray, "*batch K"],
  teacher_logits: Float[AnyArray, "*batch K"],
  *,
  skew: Scalar = 0.1,
  temperature: Scalar = 1.0,
) -> Float[Array, "*batch"]:
  """Skew reverse KL (SRKL) of DistiLLM: the student from a mixture of both.

  temperature² · KL(q ‖ m), m = (1 − skew) · p + skew · q,
  KL(a ‖ b) = Σ_k a_k log(a_k / b_k),
  p = softmax(teacher_logits / temperature), q = softmax(student_logits / temperature).

  skew = 0 is `reverse_kl`, skew = 1 is 0.

  Args:
    student_logits: ``[..., K]``, q's logits. Classes masked to −inf in both are left out.
    teacher_logits: ``[..., K]``, p's logits.
    skew: the student's share of the mixture, in [0, 1]. 0.1 is the paper's.
    temperature: softens both, > 0. 1 is the paper's.

  Returns:
    ``[...]``, in nats · temperature²; at most −log(skew) · temperature².

  Raises:
    ValueError: the shapes differ, ``temperature`` is not positive or ``skew`` outside [0, 1].

  Source: Ko, Kim, Chen, Yun, "DistiLLM: Towards Streamlined Distillation for Large Language
  Models", 2024.

  Other codes: this is the published code's at temperature 1, which has no temperature.

  >>> student, teacher = jnp.zeros(2), jnp.log(jnp.array([0.75, 0.25]))
  >>> round(skew_reverse_kl(student, teacher).item(), 4)
  0.1131
  """
  check_share("skew", skew)
  log_q, log_p, squared = log_probabilities(student_logits, teacher_logits, temperature)
  return squared * kl(log_q, log_mixture(log_q, log_p, skew))


def decoupled_kd(
  student_logits: Float[AnyArray, "*batch K"],
  teacher_logits: Float[AnyArray, "*batch K"],
  labels: Integer[AnyArray, "*batch"],
  *,
  temperature: Scalar = 4.0,
  target_weight: Scalar = 1.0,
  nontarget_weight: Scalar = 8.0,
) -> Float[Array, "*batch"]:
  """Decoupled knowledge distillation (DKD): the label's class apart from the others.

  temperature² · (target_weight · KL([p_y, 1 − p_y] ‖ [q_y, 1 − q_y])
    + nontarget_weight · KL(p̂ ‖ q̂)),
  y = labels, p̂ and q̂ = p and q over the classes other than y, each divided by its sum,
  KL(a ‖ b) = Σ_k a_k log(a_k / b_k),
  p = softmax(teacher_logits / temperature), q = softmax(student_logits / temperature).

  With nontarget_weight = 1 − p_y it is `soft_target_kl`. With two classes (or two that are not
  masked) the second part is exactly 0.

  Args:
    student_logits: ``[..., K]``, q's logits. Classes masked to −inf in both are left out.
    teacher_logits: ``[..., K]``, p's logits.
    labels: ``[...]`` integers. One that is masked or outside ``0 .. K-1`` has p_y = q_y = 0.
    temperature: softens both, > 0. 4 is mdistiller's for CIFAR-100.
    target_weight: weight of the (label, rest) pair. 1 is the paper's.
    nontarget_weight: weight of the other classes. 8 is the paper's for ResNet-32x4 to 8x4; it
      chose 2 to 8 by the teacher.

  Returns:
    ``[...]``, in nats · temperature².

  Raises:
    ValueError: the shapes differ or ``temperature`` is not positive.

  Source: Zhao, Cui, Song, Qiu, Liang, "Decoupled Knowledge Distillation", 2022.

  Other codes: mdistiller, the published code, takes logarithms of sums of a softmax and gives −inf
  at confident logits; this one has its values elsewhere, and stays in log space. Its warm-up over
  epochs is the recipe's. OFAKD's copy takes nontarget_weight 2 at temperature 1.

  >>> student, teacher = jnp.zeros(3), jnp.log(jnp.array([0.5, 0.375, 0.125]))
  >>> round(decoupled_kd(student, teacher, jnp.array(0), temperature=1.0).item(), 4)
  1.1054
  """
  check_positive("temperature", temperature)
  student, teacher = pair(student_logits, teacher_logits)
  scale = jnp.asarray(temperature, student.dtype)
  is_target = one_hot(labels, student)
  student_pair, log_q = _decouple(soften(student, scale), is_target)
  teacher_pair, log_p = _decouple(soften(teacher, scale), is_target)
  target_part = jnp.asarray(target_weight, scale.dtype) * kl(teacher_pair, student_pair)
  nontarget_part = jnp.asarray(nontarget_weight, scale.dtype) * kl(log_p, log_q)
  return jnp.square(scale) * (target_part + nontarget_part)


def _decouple(logits: Array, is_target: Array) -> tuple[Array, Array]:
  """Log-probabilities of (label, rest) ``[..., 2]`` and of the others among themselves."""
  target = jnp.max(jnp.where(is_target, logits, MASKED), axis=-1)
  others = jnp.where(is_target, MASKED, logits)
  rest = jax.nn.logsumexp(others, axis=-1, keepdims=True)
  odds = target - rest[..., 0]
  return -jax.nn.softplus(jnp.stack([-odds, odds], axis=-1)), others - rest
