"""Losses on logits ``[..., K]``: one value per example, the leading axes are kept.

Student first, teacher second, labels third. Inputs are computed in float32 (float64 stays float64),
nothing is averaged over the batch, and no gradient is ever stopped: freezing the teacher is the
business of the teacher's forward pass.

The divergences, from `cross_entropy` to `weighted_soft_labels`, take classes masked to −inf (or
below −1e30) in both networks: such a class has no part in any sum, mean or gradient. A class that
only one network masks has probability 0 there; where the other's probability makes the divergence
infinite, it comes out finite and absurdly large (around 1e30) instead, and so does `cross_entropy`
of a label that is masked. `z_loss` leaves masked classes out too; the other functions take none.

Throughout, p = softmax(teacher_logits / temperature), q = softmax(student_logits / temperature)
and logarithms are natural.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, Shaped

from jaxdistill import _check
from jaxdistill.losses._log_space import (
  AnyArray,
  Logits,
  PerExample,
  Scalar,
  absolute,
  bounded,
  check_classes,
  counted,
  distribution,
  float_arrays,
  is_masked,
  kl,
  log_mixture,
  log_probabilities,
  one_hot,
  pair,
  soften,
  softened_pair,
  softmax_cross_entropy,
  softmax_kl,
)
from jaxdistill.losses._maps import norm, product, tame

__all__ = [
  "adaptive_kl",
  "alpha_beta",
  "batch_gram",
  "class_gram",
  "cross_entropy",
  "generalized_jsd",
  "inter_class_correlation",
  "intra_class_correlation",
  "logit_l2",
  "negative_log_acceptance",
  "one_for_all",
  "reverse_kl",
  "skew_kl",
  "skew_reverse_kl",
  "soft_label_weight",
  "soft_target_kl",
  "standardize_logits",
  "total_variation",
  "transformed_teacher",
  "weighted_soft_labels",
  "weighted_transformed_teacher",
  "z_loss",
]


def cross_entropy(
  student_logits: Logits,
  labels: Integer[AnyArray, "*batch"] | Logits,
  *,
  label_smoothing: Scalar = 0.0,
) -> PerExample:
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
    ValueError: ``labels`` are neither of the two (their values are looked at outside of a compiled
      program alone), there is but one output, or ``label_smoothing`` is outside [0, 1].

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
  _check.number("label_smoothing", label_smoothing, least=0, most=1)
  check_classes(student_logits, "student_logits")
  student = float_arrays(student_logits)[0]
  # [..., K]: an integer becomes a one-hot row, so that one formula serves hard and mixed labels.
  targets = distribution(labels, student)
  # A zero that is known when tracing saves a pass over the classes.
  if not (isinstance(label_smoothing, float | int) and label_smoothing == 0):
    smoothing = jnp.asarray(label_smoothing, student.dtype)
    # A share for a class that is masked would cost 1e30 of it: the others have it among them.
    valid = (~is_masked(student)).astype(student.dtype)
    count = jnp.maximum(jnp.sum(valid, axis=-1, keepdims=True), 1)
    targets = (1 - smoothing) * targets + smoothing * valid / count
  return softmax_cross_entropy(soften(student, 1.0), targets)


def soft_target_kl(
  student_logits: Logits, teacher_logits: Logits, *, temperature: Scalar = 4.0
) -> PerExample:
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
    ValueError: the shapes differ, there is but one output, or ``temperature`` is not positive.

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
  student, teacher, squared = softened_pair(student_logits, teacher_logits, temperature)
  # Gradients of softened targets shrink as 1/T². Hinton's T² undoes that, so that a weight beside
  # the labels' term means the same at every temperature.
  return squared * softmax_kl(teacher, student)


def reverse_kl(
  student_logits: Logits, teacher_logits: Logits, *, temperature: Scalar = 1.0
) -> PerExample:
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
    ValueError: the shapes differ, there is but one output, or ``temperature`` is not positive.

  Source: Gu, Dong, Wei, Huang, "MiniLLM: Knowledge Distillation of Large Language Models", 2023.

  Other codes: this one is exact over the classes, position by position, as in DistiLLM's code,
  which has no temperature; MiniLLM's policy gradient over sequences is another estimator.

  >>> student, teacher = jnp.zeros(2), jnp.log(jnp.array([0.75, 0.25]))
  >>> round(reverse_kl(student, teacher).item(), 4)
  0.1438
  """
  student, teacher, squared = softened_pair(student_logits, teacher_logits, temperature)
  # The student's own probabilities do the weighing: it pays for classes that it favours and the
  # teacher does not, and nothing for those that it leaves out.
  return squared * softmax_kl(student, teacher)


def generalized_jsd(
  student_logits: Logits, teacher_logits: Logits, *, beta: Scalar = 0.5, temperature: Scalar = 1.0
) -> PerExample:
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
    ValueError: the shapes differ, there is but one output, ``temperature`` is not positive, or
      ``beta`` outside [0, 1].

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
  _check.number("beta", beta, least=0, most=1)
  log_q, log_p, squared = log_probabilities(student_logits, teacher_logits, temperature)
  share = jnp.asarray(beta, log_q.dtype)
  # m is at least a share of either side, so that neither KL can exceed −log of that share.
  log_m = log_mixture(log_p, log_q, share)
  return squared * (share * kl(log_p, log_m) + (1 - share) * kl(log_q, log_m))


def total_variation(
  student_logits: Logits, teacher_logits: Logits, *, temperature: Scalar = 1.0
) -> PerExample:
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
    ValueError: the shapes differ, there is but one output, or ``temperature`` is not positive.

  Source: Wen, Li, Du, Mou, "f-Divergence Minimization for Sequence-Level Knowledge Distillation",
  2023.

  Other codes: temperature² is here as in DistillKit; Liger and DistiLLM's code have none.

  >>> student, teacher = jnp.zeros(2), jnp.log(jnp.array([0.75, 0.25]))
  >>> round(total_variation(student, teacher).item(), 4)
  0.25
  """
  log_q, log_p, squared = log_probabilities(student_logits, teacher_logits, temperature)
  # `absolute`: at p = q JAX's own slope of |x| is 1, which would push a student that has arrived.
  return squared * 0.5 * jnp.sum(absolute(jnp.exp(log_p) - jnp.exp(log_q)), axis=-1)


def skew_kl(
  student_logits: Logits, teacher_logits: Logits, *, skew: Scalar = 0.1, temperature: Scalar = 1.0
) -> PerExample:
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
    ValueError: the shapes differ, there is but one output, ``temperature`` is not positive, or
      ``skew`` outside [0, 1].

  Source: Ko, Kim, Chen, Yun, "DistiLLM: Towards Streamlined Distillation for Large Language
  Models", 2024.

  Other codes: the published code leaves out Σ_k p_k log p_k, which changes the value and not the
  student's gradient, and has no temperature; this is the paper's divergence, least (0) at q = p.

  >>> student, teacher = jnp.zeros(2), jnp.log(jnp.array([0.75, 0.25]))
  >>> round(skew_kl(student, teacher).item(), 4)
  0.107
  """
  _check.number("skew", skew, least=0, most=1)
  log_q, log_p, squared = log_probabilities(student_logits, teacher_logits, temperature)
  # m ≥ skew · p, so where q misses a class of the teacher's the logarithm is −log(skew) at most,
  # where that of `soft_target_kl` has no bound.
  return squared * kl(log_p, log_mixture(log_p, log_q, skew))


def skew_reverse_kl(
  student_logits: Logits, teacher_logits: Logits, *, skew: Scalar = 0.1, temperature: Scalar = 1.0
) -> PerExample:
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
    ValueError: the shapes differ, there is but one output, ``temperature`` is not positive, or
      ``skew`` outside [0, 1].

  Source: Ko, Kim, Chen, Yun, "DistiLLM: Towards Streamlined Distillation for Large Language
  Models", 2024.

  Other codes: this is the published code's at temperature 1, which has no temperature.

  >>> student, teacher = jnp.zeros(2), jnp.log(jnp.array([0.75, 0.25]))
  >>> round(skew_reverse_kl(student, teacher).item(), 4)
  0.1131
  """
  _check.number("skew", skew, least=0, most=1)
  log_q, log_p, squared = log_probabilities(student_logits, teacher_logits, temperature)
  # The same bound the other way round: here m holds a share of the student's own q.
  return squared * kl(log_q, log_mixture(log_q, log_p, skew))


def alpha_beta(
  student_logits: Logits,
  teacher_logits: Logits,
  *,
  alpha: Scalar = 0.2,
  beta: Scalar = 0.7,
  temperature: Scalar = 1.0,
) -> PerExample:
  """α-β-divergence (ABKD): between KL(p ‖ q), reverse KL and squared error, by two numbers.

  temperature² · Σ_k [α/(α+β) · p_k^(α+β) + β/(α+β) · q_k^(α+β) − p_k^α · q_k^β] / (α · β),
  α = alpha, β = beta, and its limit where one of them is 0,
  p = softmax(teacher_logits / temperature), q = softmax(student_logits / temperature).

  (1, 0) is `soft_target_kl`, (0, 1) is `reverse_kl`, (1, 1) half the squared distance of p and q,
  (½, ½) four times 1 − Σ_k √(p_k · q_k). A smaller alpha cares less about where the error is
  largest, a smaller beta less about where the student is sure.

  Args:
    student_logits: ``[..., K]``, q's logits. Classes masked to −inf in both are left out.
    teacher_logits: ``[..., K]``, p's logits.
    alpha: at least 0. 0.2 is the paper's, for instruction following.
    beta: at least 0, and not 0 together with alpha. 0.7 is the paper's, likewise.
    temperature: softens both, > 0. 1 is the paper's.

  Returns:
    ``[...]``, times temperature².

  Raises:
    ValueError: the shapes differ, there is but one output, ``temperature`` is not positive, or
      ``alpha`` or ``beta`` is below 0, or both are 0.

  Source: Wang, Yang, Wang, Jiang, Xu, Huang, "ABKD: Pursuing a Proper Allocation of the Probability
  Mass in Knowledge Distillation via α-β-Divergence", 2025.

  Other codes: this is the paper's divergence, in log space; temperature² is ours.

  >>> student, teacher = jnp.zeros(2), jnp.log(jnp.array([0.75, 0.25]))
  >>> round(alpha_beta(student, teacher, alpha=1.0, beta=1.0).item(), 4)  # (¼² + ¼²) / 2
  0.0625
  """
  for name, value in (("alpha", alpha), ("beta", beta)):
    _check.number(name, value, least=0)
  if not isinstance(alpha, jax.core.Tracer) and not isinstance(beta, jax.core.Tracer):
    _check.number("alpha + beta", float(alpha) + float(beta), above=0)
  log_q, log_p, squared = log_probabilities(student_logits, teacher_logits, temperature)
  alpha, beta = jnp.asarray(alpha, log_q.dtype), jnp.asarray(beta, log_q.dtype)
  # D(α, β) of (p, q) is D(β, α) of (q, p): so that the larger of the two is what is divided by.
  swap = beta > alpha
  large, small = jnp.where(swap, beta, alpha), jnp.where(swap, alpha, beta)
  base, other = jnp.where(swap, log_q, log_p), jnp.where(swap, log_p, log_q)
  total = large + small

  def moved(power: Any) -> Array:
    """base^(total) · ((other / base)^power − 1) / power, which at 0 is a logarithm."""
    by = power * (other - base)
    near = jnp.abs(by) < 1
    # Both forms are finite wherever they are not taken, or their gradients would be NaN times 0.
    step = jnp.where(near, by, 0.0)
    tiny = jnp.abs(step) < 1e-4
    series = 1 + step / 2 * (1 + step / 3 * (1 + step / 4))
    ratio = jnp.where(tiny, series, jnp.expm1(step) / jnp.where(tiny, 1.0, step))
    apart = jnp.where(near | (power == 0), other - base, 0.0)
    far = jnp.exp((total - power) * base + power * other) - jnp.exp(total * base)
    return jnp.where(
      near, jnp.exp(total * base) * apart * ratio, far / jnp.where(power == 0, 1.0, power)
    )

  # [..., K]: each summand is at least 0, since what is subtracted grows with its power.
  each = (moved(total) - moved(small)) / large
  each = each + jax.lax.stop_gradient(jnp.maximum(-each, 0))
  return squared * jnp.sum(each, axis=-1)


def adaptive_kl(
  student_logits: Logits, teacher_logits: Logits, *, head: Scalar = 0.5, temperature: Scalar = 1.0
) -> PerExample:
  """Adaptive KL (AKL): KL where the student errs on the likely classes, reverse KL on the others.

  temperature² · [h · KL(p ‖ q) + (1 − h) · KL(q ‖ p)], KL(a ‖ b) = Σ_k a_k log(a_k / b_k),
  h = Σ_{k in H} |p_k − q_k| / Σ_k |p_k − q_k|, H the teacher's most likely classes whose
  probabilities sum up to head at most, and the first in any case,
  p = softmax(teacher_logits / temperature), q = softmax(student_logits / temperature).

  No gradient passes through h. Classes are sorted for it: of the losses in chunks of tokens
  (`jaxdistill.train.in_chunks`) this one gathers a vocabulary that lies in parts.

  Args:
    student_logits: ``[..., K]``, q's logits. Classes masked to −inf in both are left out.
    teacher_logits: ``[..., K]``, p's logits.
    head: the share of the teacher's mass that H has, in [0, 1]. 0.5 is the paper's.
    temperature: softens both, > 0. 1 is the paper's.

  Returns:
    ``[...]``, in nats · temperature².

  Raises:
    ValueError: the shapes differ, there is but one output, ``temperature`` is not positive, or
      ``head`` outside [0, 1].

  Source: Wu, Tao, Wang, Yang, Zhao, Wong, "Rethinking Kullback-Leibler Divergence in Knowledge
  Distillation for Large Language Models", 2024.

  Other codes: this is the paper's, in whose code the most likely class is in H too; temperature² is
  ours.

  >>> student, teacher = jnp.zeros(2), jnp.log(jnp.array([0.75, 0.25]))
  >>> round(adaptive_kl(student, teacher).item(), 4)  # (0.1308 + 0.1438) / 2
  0.1373
  """
  _check.number("head", head, least=0, most=1)
  log_q, log_p, squared = log_probabilities(student_logits, teacher_logits, temperature)
  p, q = jax.lax.stop_gradient((jnp.exp(log_p), jnp.exp(log_q)))
  order = jnp.argsort(-p, axis=-1)
  ranked, errors = (jnp.take_along_axis(x, order, axis=-1) for x in (p, jnp.abs(p - q)))
  first = jax.lax.broadcasted_iota(jnp.int32, p.shape, p.ndim - 1) == 0
  likely = (jnp.cumsum(ranked, axis=-1) <= jnp.asarray(head, p.dtype)) | first
  total = jnp.sum(errors, axis=-1)
  share = jnp.sum(jnp.where(likely, errors, 0.0), axis=-1) / jnp.where(total == 0, 1.0, total)
  return squared * (share * kl(log_p, log_q) + (1 - share) * kl(log_q, log_p))


def negative_log_acceptance(
  student_logits: Logits, teacher_logits: Logits, *, temperature: Scalar = 1.0
) -> PerExample:
  """Negative log-acceptance (LK): how often speculative decoding keeps what the student drafts.

  −temperature² · log Σ_k min(p_k, q_k),
  p = softmax(teacher_logits / temperature), q = softmax(student_logits / temperature).

  The sum is the probability that a draft of q's is accepted, 1 − `total_variation` (at temperature
  1). At a teacher that is sure it is the cross-entropy.

  Args:
    student_logits: ``[..., K]``, q's logits. Classes masked to −inf in both are left out.
    teacher_logits: ``[..., K]``, p's logits.
    temperature: softens both, > 0. 1 is the paper's.

  Returns:
    ``[...]``, in nats · temperature²; finite where p and q have nothing in common.

  Raises:
    ValueError: the shapes differ, there is but one output, or ``temperature`` is not positive.

  Source: Samarin, Krutikov, Shevtsov, Skvortsov, Fisin, Golubev, "LK Losses: Direct Acceptance Rate
  Optimization for Speculative Decoding", 2026.

  Other codes: speculators bounds the sum from below, where its gradient is 0; this is in log space
  and needs no bound.

  >>> student, teacher = jnp.zeros(2), jnp.log(jnp.array([0.75, 0.25]))
  >>> round(negative_log_acceptance(student, teacher).item(), 4)  # -log(½ + ¼)
  0.2877
  """
  log_q, log_p, squared = log_probabilities(student_logits, teacher_logits, temperature)
  # Not the logarithm of a sum of minima: where they are below 1e-38 it would be −inf, its slope 0.
  return -squared * jax.nn.logsumexp(jnp.minimum(log_p, log_q), axis=-1)


def transformed_teacher(
  student_logits: Logits, teacher_logits: Logits, *, power: Scalar = 0.1
) -> PerExample:
  """Transformed teacher matching (TTM): a power flattens the teacher, the student stays as it is.

  KL(r ‖ q), KL(a ‖ b) = Σ_k a_k log(a_k / b_k), r_k = p_k^power / Σ_j p_j^power,
  p = softmax(teacher_logits), q = softmax(student_logits).

  A power is a temperature of 1 / power on the teacher alone, without temperature² in front:
  r = softmax(power · teacher_logits).

  Args:
    student_logits: ``[..., K]``, q's logits. Classes masked to −inf in both are left out.
    teacher_logits: ``[..., K]``, p's logits.
    power: > 0. 0.1 is the published code's for VGG-13 to VGG-8.

  Returns:
    ``[...]``, in nats.

  Raises:
    ValueError: the shapes differ, there is but one output, or ``power`` is not positive.

  Source: Zheng, Yang, "Knowledge Distillation Based on Transformed Teacher Matching", 2024.

  Other codes: these are the values of the published code, which raises probabilities to the power;
  where one of them is below 1e-38 that loses it, and here, in log space, it stays.

  >>> student, teacher = jnp.zeros(2), 2 * jnp.log(jnp.array([0.75, 0.25]))
  >>> round(transformed_teacher(student, teacher, power=0.5).item(), 4)  # as of [¾, ¼]
  0.1308
  """
  log_q, log_r, _ = _transformed(student_logits, teacher_logits, power)
  return kl(log_r, log_q)


def weighted_transformed_teacher(
  student_logits: Logits, teacher_logits: Logits, *, power: Scalar = 0.2
) -> PerExample:
  """Weighted transformed teacher matching (WTTM): more of TTM where the teacher is less sure.

  (Σ_j p_j^power) · KL(r ‖ q), KL(a ‖ b) = Σ_k a_k log(a_k / b_k), r_k = p_k^power / Σ_j p_j^power,
  p = softmax(teacher_logits), q = softmax(student_logits).

  The sum in front is 1 for a teacher that is sure and K^(1 − power) for one that knows nothing. It
  is not divided by its mean over the batch, so that a weight has to be smaller than that of
  `transformed_teacher`. It is a function of the teacher alone.

  Args:
    student_logits: ``[..., K]``, q's logits. Classes masked to −inf in both are left out.
    teacher_logits: ``[..., K]``, p's logits.
    power: > 0. 0.2 is the published code's for VGG-13 to VGG-8.

  Returns:
    ``[...]``, in nats.

  Raises:
    ValueError: the shapes differ, there is but one output, or ``power`` is not positive.

  Source: Zheng, Yang, "Knowledge Distillation Based on Transformed Teacher Matching", 2024.

  Other codes: these are the values of the published code, here in log space.

  >>> student, teacher = jnp.zeros(2), 2 * jnp.log(jnp.array([0.75, 0.25]))
  >>> round(weighted_transformed_teacher(student, teacher, power=0.5).item(), 4)  # 1.2649 of it
  0.1655
  """
  log_q, log_r, log_sum = _transformed(student_logits, teacher_logits, power)
  return jnp.exp(log_sum) * kl(log_r, log_q)


def _transformed(student: Any, teacher: Any, power: Scalar) -> tuple[Array, Array, Array]:
  """Logarithms of q, of r, and of the sum of the teacher's powers."""
  _check.number("power", power, above=0)
  log_q, log_p, _ = log_probabilities(student, teacher, 1.0)
  raised = jnp.asarray(power, log_p.dtype) * log_p
  log_sum = jax.nn.logsumexp(raised, axis=-1, keepdims=True)
  return log_q, raised - log_sum, log_sum[..., 0]


def soft_label_weight(
  student_logits: Logits, teacher_logits: Logits, labels: Integer[AnyArray, "*batch"]
) -> PerExample:
  """Weights of soft labels (WSL): 0 where the student has learned the label, 1 where it lags.

  1 − exp(−c_s / (c_t + 1e-7)), c_s and c_t = −log softmax(z)_y of student_logits and teacher_logits
  at y = labels.

  It multiplies the values of any loss, ``weight * losses.reverse_kl(...)``; `weighted_soft_labels`
  is the published one. No gradient passes through it: the student would else learn to be given
  small weights.

  Args:
    student_logits: ``[..., K]``. Classes masked to −inf in both are left out.
    teacher_logits: ``[..., K]``.
    labels: ``[...]`` integers. One outside ``0 .. K-1`` has the weight 0.

  Returns:
    ``[...]``, in [0, 1].

  Raises:
    ValueError: the shapes differ, or there is but one output.

  Source: Zhou, Song, Chen, Zhou, Wang, Yuan, Zhang, "Rethinking Soft Labels for Knowledge
  Distillation: A Bias-Variance Tradeoff Perspective", 2021.

  Other codes: this is the published code's.

  >>> student, teacher = jnp.log(jnp.array([0.25, 0.75])), jnp.log(jnp.array([0.5, 0.5]))
  >>> round(soft_label_weight(student, teacher, jnp.array(0)).item(), 4)  # 1 − exp(−2)
  0.8647
  """
  student, teacher = pair(student_logits, teacher_logits)
  ours, theirs = (cross_entropy(jax.lax.stop_gradient(z), labels) for z in (student, teacher))
  return -jnp.expm1(-ours / (theirs + 1e-7))


def weighted_soft_labels(
  student_logits: Logits,
  teacher_logits: Logits,
  labels: Integer[AnyArray, "*batch"],
  *,
  temperature: Scalar = 2.0,
) -> PerExample:
  """Weighted soft labels (WSL): the teacher's, where the student lags behind on the label.

  −w · temperature² · Σ_k p_k log q_k, w = `soft_label_weight` at labels,
  p = softmax(teacher_logits / temperature), q = softmax(student_logits / temperature).

  The gradient does not pass through w. A cross-entropy, it is not 0 at q = p.

  Args:
    student_logits: ``[..., K]``, q's logits. Classes masked to −inf in both are left out.
    teacher_logits: ``[..., K]``, p's logits.
    labels: ``[...]`` integers. One outside ``0 .. K-1`` contributes 0.
    temperature: softens both, > 0. 2 is the published code's for ImageNet.

  Returns:
    ``[...]``, in nats · temperature².

  Raises:
    ValueError: the shapes differ, there is but one output, or ``temperature`` is not positive.

  Source: Zhou, Song, Chen, Zhou, Wang, Yuan, Zhang, "Rethinking Soft Labels for Knowledge
  Distillation: A Bias-Variance Tradeoff Perspective", 2021.

  Other codes: this is the published code's, whose teacher runs in training mode, which is none of
  the formula. cls_KD's copy for CIFAR-100 has temperature 4.

  >>> student, teacher = jnp.log(jnp.array([0.25, 0.75])), jnp.log(jnp.array([0.5, 0.5]))
  >>> round(weighted_soft_labels(student, teacher, jnp.array(0), temperature=1.0).item(), 4)
  0.7237
  """
  log_q, log_p, squared = log_probabilities(student_logits, teacher_logits, temperature)
  weight = soft_label_weight(student_logits, teacher_logits, labels)
  return -weight * squared * jnp.sum(jnp.exp(log_p) * log_q, axis=-1)


def logit_l2(student_logits: Logits, teacher_logits: Logits) -> PerExample:
  """Logit regression (L2): mean squared error of the logits.

  mean_k (student_logits_k − teacher_logits_k)².

  Args:
    student_logits: ``[..., K]``, no class masked to −inf.
    teacher_logits: ``[..., K]``, no class masked to −inf.

  Returns:
    ``[...]``.

  Raises:
    ValueError: the shapes differ.

  Source: Ba, Caruana, "Do Deep Nets Really Need to be Deep?", 2014.

  Other codes: this, as the mean over the batch, is PyTorch's ``MSELoss``; the paper has half of the
  sum, and TextBrewer divides both logits by a temperature first.

  >>> logit_l2(jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 0.0]])).tolist()
  [2.0]
  """
  student, teacher = pair(student_logits, teacher_logits)
  return jnp.mean(jnp.square(student - teacher), axis=-1)


def z_loss(logits: Logits) -> PerExample:
  """Z-loss (Z): keeps the logits' normaliser near 1, so that they do not drift in low precision.

  (log Σ_k exp(z_k))², z = logits.

  Args:
    logits: ``[..., K]``; classes masked to −inf are left out.

  Returns:
    ``[...]``, in nats².

  Raises:
    ValueError: there is but one output.

  Source: Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways", 2022.

  Other codes: T5X and Levanter have this as well, and a weight of 1e-4 for it; here the weight is
  the term's.

  >>> round(z_loss(jnp.zeros(2)).item(), 4)  # log(2)²
  0.4805
  """
  check_classes(logits, "logits")
  (z,) = float_arrays(logits)
  return jnp.square(jax.nn.logsumexp(soften(z, 1.0), axis=-1))


def standardize_logits(logits: Logits) -> Float[Array, "*batch K"]:
  """Logit standardisation (LSKD): z-scores over the classes, for use in front of any loss.

  (z − mean_k z) / (1e-7 + std_k z), z = logits,
  std_k z = √(Σ_k (z_k − mean_k z)² / (K − 1)).

  Apply it to both networks' logits; the temperature then multiplies standard deviations. The
  gradient flows through mean and std, as in the published code.

  Args:
    logits: ``[..., K]``, no class masked to −inf. A row of equal logits gives zeros, with a
      gradient of 0; the formula's own, of the order of 1e7, would end a run.

  Returns:
    ``[..., K]``, float32 (or float64).

  Raises:
    ValueError: there is but one output.

  Source: Sun, Ren, Li, Wang, Cao, "Logit Standardization in Knowledge Distillation", 2024.

  Other codes: K − 1, here, is the published code's and torchdistill's, PyTorch's default; NumPy's
  and JAX's is K.

  >>> standardize_logits(jnp.array([[1.0, 2.0, 3.0]])).round(3).tolist()
  [[-1.0, 0.0, 1.0]]
  """
  check_classes(logits, "logits")
  (z,) = float_arrays(logits)
  # A scale of more than 1e9 cancels, but for the 1e-7; its square would not be finite.
  z = tame(bounded(z), -1)
  z = _centred(z, axis=-1)
  # [..., 1]. K − 1, as in PyTorch.
  spread = norm(z, axis=-1) / (z.shape[-1] - 1) ** 0.5
  return _moving(z, spread) / (1e-7 + spread)


def inter_class_correlation(
  student_logits: Logits, teacher_logits: Logits, *, temperature: Scalar = 4.0
) -> PerExample:
  """Inter-class relation (DIST): how an example's classes rank and spread.

  temperature² · (1 − a·b / (‖a‖‖b‖ + 1e-8)), which is 1 − Pearson's correlation over the classes,
  a = q − mean_k q, b = p − mean_k p,
  p = softmax(teacher_logits / temperature), q = softmax(student_logits / temperature).
  The gradient is 0 for a row of equal logits (a head that starts at 0), where the formula's own is
  of the order of 1e7.

  Args:
    student_logits: ``[..., K]``, q's logits; no class masked to −inf.
    teacher_logits: ``[..., K]``, p's logits; no class masked to −inf.
    temperature: softens both, > 0. 4 is the published code's for CIFAR-100 (1 for ImageNet).

  Returns:
    ``[...]``, in [0, 2 · temperature²]; temperature² where either is uniform.

  Raises:
    ValueError: the shapes differ, there is but one output, or ``temperature`` is not positive.

  Source: Huang, You, Wang, Qian, Xu, "Knowledge Distillation from A Stronger Teacher", 2022.

  Other codes: temperature² is the published code's, absent from the paper's; torchdistill clamps
  ‖a‖‖b‖ where this one, like the published code, adds 1e-8 to it.

  >>> logits = jnp.array([[2.0, 1.0]])
  >>> inter_class_correlation(logits, -logits, temperature=1.0).round(3).tolist()
  [2.0]
  """
  log_q, log_p, squared = log_probabilities(student_logits, teacher_logits, temperature)
  q, p = jnp.exp(log_q), jnp.exp(log_p)
  # Pearson's correlation is the cosine of what is centred: shift and scale of a row do not count,
  # only which classes it ranks above which.
  a, b = _centred(q, axis=-1), _centred(p, axis=-1)
  return squared * (1 - _cosine(a, b, axis=-1))


def intra_class_correlation(
  student_logits: Logits,
  teacher_logits: Logits,
  *,
  temperature: Scalar = 4.0,
  where: Shaped[AnyArray, "*batch"] | None = None,
) -> Float[Array, " K"]:
  """Intra-class relation (DIST): how a class ranks the examples. One value per **class**.

  temperature² · (1 − a·b / (‖a‖‖b‖ + 1e-8)) for each class k, over the batch (all leading axes):
  a_i = q_ik − mean_i q_ik, b_i = p_ik − mean_i p_ik,
  p = softmax(teacher_logits / temperature), q = softmax(student_logits / temperature).

  Args:
    student_logits: ``[..., K]``, q's logits; no class masked to −inf.
    teacher_logits: ``[..., K]``, p's logits; no class masked to −inf.
    temperature: softens both, > 0. 4 is the published code's for CIFAR-100 (1 for ImageNet).
    where: ``[...]``, which examples count (not 0); the others may hold anything. None counts all.

  Returns:
    ``[K]``, in [0, 2 · temperature²]; all 0 where fewer than two examples count. It depends on
    who is in the batch: under ``pmap`` or gradient accumulation that is the device's share or the
    micro-batch.

  Raises:
    ValueError: the shapes differ, there is but one output, or ``temperature`` is not positive.

  Source: Huang, You, Wang, Qian, Xu, "Knowledge Distillation from A Stronger Teacher", 2022.

  Other codes: temperature² and 1e-8 are here as in the published code, whose number is the mean
  over the classes; the paper's has no temperature², and torchdistill clamps ‖a‖‖b‖ instead.

  >>> student, teacher = jnp.array([[2.0, 0.0], [0.0, 0.0]]), jnp.array([[0.0, 0.0], [1.0, 0.0]])
  >>> intra_class_correlation(student, teacher, temperature=1.0).round(3).tolist()
  [2.0, 2.0]
  """
  student, teacher = pair(student_logits, teacher_logits)
  valid = counted(where, student.shape[:-1])[..., None]
  # Before the softmax as well as after it: a value that is masked only later can still leak NaN.
  student, teacher = jnp.where(valid, student, 0.0), jnp.where(valid, teacher, 0.0)
  log_q, log_p, squared = log_probabilities(student, teacher, temperature)
  # All leading axes are examples to a class: the sums below leave [1, ..., 1, K].
  axes = tuple(range(student.ndim - 1))
  count = jnp.sum(valid, axis=axes, keepdims=True).astype(student.dtype)

  def centre(x: Array) -> Array:
    # From the largest on, so that rounding in the mean cannot show where all are equal.
    largest = jnp.max(jnp.where(valid, x, 0.0), axis=axes, keepdims=True)
    x = x - jax.lax.stop_gradient(largest)
    mean = jnp.sum(jnp.where(valid, x, 0.0), axis=axes, keepdims=True) / jnp.maximum(count, 1)
    return jnp.where(valid, x - mean, 0.0)

  # [K]; a single example correlates with nothing.
  cosine = _cosine(centre(jnp.exp(log_q)), centre(jnp.exp(log_p)), axis=axes)
  return jnp.where(count.reshape(1) > 1, squared * (1 - cosine), 0.0)


def class_gram(
  student_logits: Logits,
  teacher_logits: Logits,
  *,
  temperature: Scalar = 4.0,
  where: Shaped[AnyArray, "*batch"] | None = None,
) -> Float[Array, " K"]:
  """Class correlation (MLKD): which classes are likely together. One value per **class**.

  Σ_j (G_kj(p) − G_kj(q))² for each class k, G(a) = Σ_i a_i a_iᵀ, a matrix over the classes, summed
  over the examples i of the batch (all leading axes),
  p = softmax(teacher_logits / temperature), q = softmax(student_logits / temperature).

  Args:
    student_logits: ``[..., K]``, q's logits; no class masked to −inf.
    teacher_logits: ``[..., K]``, p's logits; no class masked to −inf.
    temperature: softens both, > 0. 4 is the first of the published code's five.
    where: ``[...]``, which examples count (not 0); the others may hold anything. None counts all.

  Returns:
    ``[K]``. It grows with the square of the batch, and depends on who is in it: under ``pmap`` or
    gradient accumulation that is the device's share or the micro-batch.

  Raises:
    ValueError: the shapes differ, there is but one output, or ``temperature`` is not positive.

  Source: Jin, Wang, Lin, "Multi-Level Logit Distillation", 2023.

  Other codes: this, as the mean over the classes, is the published code's, without its mask, which
  multiplies a mean and so picks nothing. Neither has temperature².

  >>> student, teacher = jnp.zeros((1, 2)), jnp.log(jnp.array([[0.75, 0.25]]))
  >>> [round(v, 4) for v in class_gram(student, teacher, temperature=1.0).tolist()]
  [0.1016, 0.0391]
  """
  q, p = _counted_probabilities(student_logits, teacher_logits, temperature, where)
  apart = product("ik,ij->kj", p, p) - product("ik,ij->kj", q, q)
  return jnp.sum(jnp.square(apart), axis=-1)


def batch_gram(
  student_logits: Logits,
  teacher_logits: Logits,
  *,
  temperature: Scalar = 4.0,
  where: Shaped[AnyArray, "*batch"] | None = None,
) -> PerExample:
  """Batch correlation (MLKD): which examples are predicted alike.

  Σ_j (p_i·p_j − q_i·q_j)² over the examples j of the batch (all leading axes), for each example i,
  p = softmax(teacher_logits / temperature), q = softmax(student_logits / temperature).

  Args:
    student_logits: ``[..., K]``, q's logits; no class masked to −inf.
    teacher_logits: ``[..., K]``, p's logits; no class masked to −inf.
    temperature: softens both, > 0. 4 is the first of the published code's five.
    where: ``[...]``, which examples count (not 0); the others may hold anything and have the value
      0. None counts all.

  Returns:
    ``[...]``. It depends on who is in the batch: under ``pmap`` or gradient accumulation that is
    the device's share or the micro-batch.

  Raises:
    ValueError: the shapes differ, there is but one output, or ``temperature`` is not positive.

  Source: Jin, Wang, Lin, "Multi-Level Logit Distillation", 2023.

  Other codes: this, as the mean over the batch, is the published code's, without its mask, which
  multiplies a mean and so picks nothing. Neither has temperature².

  >>> student, teacher = jnp.zeros((1, 2)), jnp.log(jnp.array([[0.75, 0.25]]))
  >>> batch_gram(student, teacher, temperature=1.0).tolist()  # (5/8 − 1/2)²
  [0.015625]
  """
  q, p = _counted_probabilities(student_logits, teacher_logits, temperature, where)
  apart = product("ik,jk->ij", p, p) - product("ik,jk->ij", q, q)
  return jnp.sum(jnp.square(apart), axis=-1).reshape(np.shape(student_logits)[:-1])


def _counted_probabilities(
  student_logits: Any, teacher_logits: Any, temperature: Scalar, where: Any
) -> list[Array]:
  """Both networks' probabilities as rows ``[N, K]``, with zeros for who does not count."""
  student, teacher = pair(student_logits, teacher_logits)
  valid = counted(where, student.shape[:-1])[..., None]
  # Before the softmax as well as after it: a value that is masked only later can still leak NaN.
  student, teacher = jnp.where(valid, student, 0.0), jnp.where(valid, teacher, 0.0)
  log_q, log_p, _ = log_probabilities(student, teacher, temperature)
  return [jnp.where(valid, jnp.exp(x), 0.0).reshape(-1, student.shape[-1]) for x in (log_q, log_p)]


def one_for_all(
  student_logits: Logits,
  teacher_logits: Logits,
  labels: Integer[AnyArray, "*batch"],
  *,
  power: Scalar = 1.0,
  temperature: Scalar = 1.0,
) -> PerExample:
  """One-for-all distillation (OFA-KD): the label's class is enhanced by a power.

  −Σ_k [(p_k + y_k)^power − y_k] log q_k, y one-hot of labels,
  p = softmax(teacher_logits / temperature), q = softmax(student_logits / temperature).

  At power = 1 it is the cross-entropy with the teacher's probabilities.

  Args:
    student_logits: ``[..., K]``, q's logits (of an exit head, or the last); no class masked to
      −inf.
    teacher_logits: ``[..., K]``, p's logits; no class masked to −inf.
    labels: ``[...]`` integers. One outside ``0 .. K-1`` enhances no class.
    power: > 0. 1 is the published code's for CIFAR-100 (1.5 for ImageNet); larger trusts the
      label more.
    temperature: softens both, > 0. 1 is the published code's.

  Returns:
    ``[...]``, in nats.

  Raises:
    ValueError: the shapes differ, there is but one output, or ``temperature`` or ``power`` is not
      positive.

  Source: Hao, Guo, Han, Tang, Hu, Wang, Xu, "One-for-All: Bridge the Gap Between Heterogeneous
  Architectures in Knowledge Distillation", 2023.

  Other codes: the values of OFAKD, the published code, which takes the logarithm of a softmax; here
  it is a log-softmax, which stays finite. Neither has temperature².

  >>> student, teacher = jnp.zeros(2), jnp.log(jnp.array([0.75, 0.25]))
  >>> round(one_for_all(student, teacher, jnp.array(0), power=2.0).item(), 4)  # 2.125 · log 2
  1.4729
  """
  _check.number("power", power, above=0)
  log_q, log_p, _ = log_probabilities(student_logits, teacher_logits, temperature)
  # At the label (p + 1)^power − 1, by log1p and expm1, which keep the digits of a small p.
  exponent = jnp.asarray(power, log_q.dtype)
  # p^power as an exponential: its gradient is finite where p is 0, whatever the power.
  enhanced = jnp.expm1(exponent * jnp.log1p(jnp.exp(log_p)))
  targets = jnp.where(one_hot(labels, log_q), enhanced, jnp.exp(exponent * log_p))
  return -jnp.sum(targets * log_q, axis=-1)


def _centred(x: Array, axis: int) -> Array:
  """Less the mean over an axis, and exactly 0 where all are equal."""
  # From the first one on, so that rounding in the mean cannot show.
  x = x - jax.lax.index_in_dim(x, 0, axis)
  return x - jnp.mean(x, axis=axis, keepdims=True)


def _moving(x: Array, size: Array) -> Array:
  """The same values, without a gradient where the size is 0."""
  return jnp.where(size > 0, x, jax.lax.stop_gradient(x))


def _cosine(a: Array, b: Array, axis: int | tuple[int, ...]) -> Array:
  """Cosine of two arrays over axes, with DIST's 1e-8 in the denominator."""
  # Of shape 1 along the axes, so that they divide without an alignment of ranks.
  sizes = norm(a, axis), norm(b, axis)
  # Beside a size of 0 the 1e-8 is all there is, and the gradient would be 1e8 times the other side.
  a, b = _moving(a, sizes[0]), _moving(b, sizes[1])
  dot = jnp.sum(a * b, axis=axis, keepdims=True)
  return jnp.squeeze(dot / (sizes[0] * sizes[1] + 1e-8), axis=axis)
