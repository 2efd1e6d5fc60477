"""What RepDistiller, mdistiller, OFAKD and others compute, for torchdistill's gaps.

Written for these tests, with PyTorch's own functions wherever it has them; channels first, autograd
does the gradients, and each returns the number that is published: the mean over the batch.
"""

import beside  # first: it leaves these tests out where there is no PyTorch

# isort: split
from torch.distributions import Bernoulli, Categorical, kl_divergence

torch = beside.torch
functional = torch.nn.functional


def smaller(student, teacher):
  """The larger of two maps, average-pooled to the smaller, as all of RepDistiller's losses do."""
  height, width = (min(pair) for pair in zip(student.shape[2:], teacher.shape[2:], strict=True))
  pool = functional.adaptive_avg_pool2d
  return pool(student, (height, width)), pool(teacher, (height, width))


def soften(logits, temperature):
  return Categorical(logits=logits / temperature)


def mixture(first, second, share):
  """Categorical of share · first + (1 − share) · second, from the logits up."""
  parts = torch.stack([first.logits, second.logits])
  shares = torch.tensor([share, 1 - share], dtype=parts.dtype).log()
  return Categorical(logits=torch.logsumexp(parts + shares[:, None, None], 0))


def decoupled(student, teacher, labels, temperature, target_weight, nontarget_weight):
  """DKD: a Bernoulli for the label against the rest, a categorical for the rest."""
  q, p = soften(student, temperature), soften(teacher, temperature)
  own = labels[:, None]
  rest = torch.ones_like(student, dtype=torch.bool).scatter(1, own, False)
  size = (len(student), student.shape[1] - 1)
  target = kl_divergence(
    Bernoulli(p.probs.gather(1, own)[:, 0]), Bernoulli(q.probs.gather(1, own)[:, 0])
  )
  nontarget = kl_divergence(
    Categorical(logits=(teacher / temperature)[rest].reshape(size)),
    Categorical(logits=(student / temperature)[rest].reshape(size)),
  )
  return temperature**2 * (target_weight * target + nontarget_weight * nontarget).mean()


def pearson_loss(student, teacher, temperature, axis):
  """DIST, along the classes (axis 1) or the batch (0), with 1e-8 added to the denominator."""
  a, b = (x.div(temperature).softmax(1) for x in (student, teacher))
  a, b = a - a.mean(axis, keepdim=True), b - b.mean(axis, keepdim=True)
  cosine = (a * b).sum(axis) / (a.norm(dim=axis) * b.norm(dim=axis) + 1e-8)
  return temperature**2 * (1 - cosine.mean())


def one_for_all(student, teacher, labels, power, temperature):
  y = functional.one_hot(labels, student.shape[1])
  targets = (teacher.div(temperature).softmax(1) + y) ** power - y
  return functional.cross_entropy(student / temperature, targets)


def neuron_selectivity(student, teacher):
  """NST with the kernel (aᵀb)², as the [B, C, C'] matrix of all channels' products."""
  s, t = (functional.normalize(x.flatten(2), dim=2) for x in smaller(student, teacher))
  kernel = [torch.bmm(a, b.mT).square().mean() for a, b in ((t, t), (s, s), (s, t))]
  return kernel[0] + kernel[1] - 2 * kernel[2]


def flow(lower, upper):
  lower, upper = (x.flatten(2) for x in smaller(lower, upper))
  return torch.einsum("bcn,bdn->bcd", lower, upper) / lower.shape[2]


def flow_of_solution(student_lower, student_upper, teacher_lower, teacher_upper):
  student, teacher = flow(student_lower, student_upper), flow(teacher_lower, teacher_upper)
  return functional.mse_loss(student, teacher)


def factor_transfer(student, teacher):
  s, t = (functional.normalize(x.square().mean(1).flatten(1)) for x in smaller(student, teacher))
  return functional.l1_loss(s, t)


def overhaul(student, teacher, margin):
  """Partial L2: above the margin where the teacher is below it, and wherever the teacher is on."""
  student, teacher = smaller(student, teacher)
  margin = margin.reshape(1, -1, 1, 1).expand_as(teacher)
  target = torch.maximum(teacher, margin)
  pushed = functional.relu(student - target).square()
  return torch.where(teacher > 0, (student - teacher).square(), pushed).sum() / len(student)


def attention_relation(student, teacher, num_heads, valid):
  """MiniLMv2: attention weights are what attention makes of the unit vectors."""

  def weights(x):
    heads = x.unflatten(2, (num_heads, -1)).transpose(1, 2)
    positions = torch.eye(x.shape[1], dtype=x.dtype).expand(*heads.shape[:2], -1, -1)
    attend = functional.scaled_dot_product_attention
    seen = valid[:, None, None, :]
    # 1 in both networks where nobody looks: it adds 0, and a logarithm of 0 has no gradient.
    return attend(heads, heads, positions, attn_mask=seen).masked_fill(~seen, 1.0)

  p, q = weights(teacher), weights(student)
  divergence = (torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum(3).mean(1)
  return (divergence * valid).mean()


def similarity_preserving(student, teacher):
  s, t = (functional.normalize(x.flatten(1) @ x.flatten(1).T, dim=1) for x in (student, teacher))
  return functional.mse_loss(s, t)


def correlation_congruence(student, teacher):
  size = functional.l1_loss(student, teacher, reduction="none")
  return torch.linalg.vecdot(size[:-1], size[1:]).mean()


def contrastive(student, teacher, temperature):
  scores = functional.normalize(student.flatten(1)) @ functional.normalize(teacher.flatten(1)).T
  own = torch.arange(len(scores))
  there = functional.cross_entropy(scores / temperature, own)
  return (there + functional.cross_entropy(scores.T / temperature, own)) / 2
