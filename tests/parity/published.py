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


def among(logits, classes, temperature):
  """Log-probabilities within some of the classes; the others are shut out after the temperature."""
  return functional.log_softmax((logits / temperature).masked_fill(~classes, -1e9), 1)


def in_parts(student, teacher, inside, temperature):
  """KL of (inside, outside), inside and outside, by example: what GDKD and DKD weigh."""
  q, p = soften(student, temperature), soften(teacher, temperature)
  pairs = kl_divergence(*(Bernoulli((x.probs * inside).sum(1)) for x in (p, q)))
  within, without = (
    functional.kl_div(
      among(student, part, temperature),
      among(teacher, part, temperature),
      reduction="none",
      log_target=True,
    ).sum(1)
    for part in (inside, ~inside)
  )
  return pairs, within, without


def generalized_decoupled(student, teacher, top, temperature, weights):
  places = teacher.topk(top, dim=1).indices
  inside = torch.zeros_like(teacher, dtype=torch.bool).scatter(1, places, True)
  parts = in_parts(student, teacher, inside, temperature)
  return temperature**2 * sum(w * part for w, part in zip(weights, parts, strict=True)).mean()


def refined(student, teacher, labels, temperature, target_temperature, weights):
  own = labels[:, None]
  p = soften(teacher, target_temperature).probs.max(1).values
  q = soften(student, target_temperature).probs.gather(1, own)[:, 0]
  target = target_temperature**2 * kl_divergence(Bernoulli(p), Bernoulli(q))
  above = teacher >= teacher.gather(1, own)
  nontarget = temperature**2 * in_parts(student, teacher, above, temperature)[2]
  return (weights[0] * target + weights[1] * nontarget).mean()


def normalized(student, teacher, labels, temperature, nontarget_weight):
  own = labels[:, None]
  label = teacher.softmax(1).gather(1, own) * student.log_softmax(1).gather(1, own)
  size = (len(student), student.shape[1] - 1)
  rest = torch.ones_like(student, dtype=torch.bool).scatter(1, own, False)
  q, p = ((x / temperature)[rest].reshape(size) for x in (student, teacher))
  others = functional.cross_entropy(q, p.softmax(1))
  return -label.mean() + nontarget_weight * temperature**2 * others


def transformed(student, teacher, power, weighted):
  powers = teacher.softmax(1) ** power
  total = powers.sum(1, keepdim=True)
  values = functional.kl_div(student.log_softmax(1), powers / total, reduction="none").sum(1)
  return (values * total[:, 0] if weighted else values).mean()


def weighted_soft_labels(student, teacher, labels, temperature):
  hard = [
    functional.cross_entropy(x.detach(), labels, reduction="none") for x in (student, teacher)
  ]
  weight = 1 - torch.exp(-hard[0] / (hard[1] + 1e-7))
  soft = functional.cross_entropy(
    student / temperature, (teacher / temperature).softmax(1), reduction="none"
  )
  return (weight * temperature**2 * soft).mean()


def grams(student, teacher, temperature, by_class):
  q, p = ((x / temperature).softmax(1) for x in (student, teacher))
  of_class = [x.T @ x if by_class else x @ x.T for x in (p, q)]
  return (of_class[0] - of_class[1]).square().sum() / len(of_class[0])


def self_target(student, labels):
  q = student.softmax(1).gather(1, labels[:, None])
  target = (q.square() + 1 - q.square().mean(0, keepdim=True)).detach()
  return -(target * q.log()).mean()


def virtual(student, labels, correct, temperature):
  classes = student.shape[1]
  own = functional.one_hot(labels, classes).to(student)
  teacher = correct * own + (1 - correct) / (classes - 1) * (1 - own)
  soft = (teacher / temperature).softmax(1)
  return functional.kl_div(student.log_softmax(1), soft, reduction="batchmean")


def multi_label(student, teacher):
  q, p = Bernoulli(logits=student), Bernoulli(logits=teacher)
  return kl_divergence(p, q).sum(1).mean()


def affinity(a, b, c, d, student_temperature, teacher_temperature):
  a, b, c, d = (functional.normalize(x) for x in (a, b, c, d))
  ours, theirs = a @ b.T / student_temperature, c @ d.T / teacher_temperature

  def apart(student, teacher):
    return functional.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="batchmean")

  return (apart(ours, theirs) + apart(ours.T, theirs.T)) / 2


def norm_and_direction(student, teacher, labels, means):
  longest = torch.maximum(student.norm(dim=1), teacher.norm(dim=1))
  towards = functional.normalize(means)[labels]
  return (1 - (student * towards).sum(1) / longest).mean()


def regions(student, teacher, labels, temperature):
  """SDD: regions ``[B, N, K]``, the whole first; twice where it is right of but one of the two."""
  q, p = ((x / temperature).log_softmax(2) for x in (student, teacher))
  each = temperature**2 * functional.kl_div(q, p, reduction="none", log_target=True).sum(2)
  right = teacher.argmax(2) == labels[:, None]
  return (each * torch.where(right == right[:, :1], 1.0, 2.0)).sum() / each.numel()


def self_nontarget(student, weak, labels, by_log):
  """USKD's other classes. Its code ranks by log q, since a name is reused; the paper by q."""
  size, classes = student.shape
  w, q = weak.softmax(1), student.softmax(1)
  own = labels[:, None]
  ranked = student.log_softmax(1) if by_log else q
  order = w / (1 - w.gather(1, own) + 1e-6) + ranked / (1 - ranked.gather(1, own) + 1e-6)
  places = order.argsort(1, descending=True).argsort(1)
  zipf = 1 / torch.arange(1, classes + 1).to(student)
  others = functional.one_hot(labels, classes) == 0
  target = zipf[places][others].reshape(size, -1)
  target = (target / target.sum(1, keepdim=True)).detach()
  return -(target * student[others].reshape(size, -1).log_softmax(1)).sum(1).mean()


def past_and_labels(student, past, labels, share):
  """PS-KD: one soft target, of the label and of what was said an epoch ago."""
  own = functional.one_hot(labels, student.shape[1]).to(student)
  target = (1 - share) * own + share * past
  return (-target * student.log_softmax(1)).mean(0).sum()


def mean_squares(student, teacher):
  """Mean teacher: squares of softmaxes apart, over classes and batch."""
  q, p = student.softmax(1), teacher.softmax(1)
  return functional.mse_loss(q, p, reduction="sum") / student.shape[1] / len(student)


def softmax_regression(features, taught, said, logits, feature_weight, regression_weight):
  """SRRL, from pooled features and the logits that the teacher's classifier says of both."""
  matched = (features - taught).square().mean(1).mean()
  return feature_weight * matched + regression_weight * functional.mse_loss(said, logits)


def softened(student, teacher, temperature=1.0):
  """T² KL of each example."""
  q, p = soften(student, temperature), soften(teacher, temperature)
  return temperature**2 * kl_divergence(p, q)


def cross_view(weak, strong, weak_teacher, strong_teacher, temperature, least):
  """CRLD: the mask of the weak view is of the pairs within a view, the strong one's of the rest."""
  w, s = weak_teacher.detach(), strong_teacher.detach()
  sure = [x.softmax(1).amax(1) >= bound for x, bound in zip((w, s), least, strict=True)]
  within = softened(weak, w, temperature) + softened(strong, s, temperature)
  across = softened(strong, w, temperature) + softened(weak, s, temperature)
  return (2 * sure[0] * within).mean() + (0.5 * sure[1] * across).mean()


def focal(logits, labels, focus, positive_share):
  """Detectron's and torchvision's: of the probability of what is the case, each label's own."""
  y = labels.to(logits)
  off = 1 - (logits.sigmoid() * y + (1 - logits.sigmoid()) * (1 - y))
  share = positive_share * y + (1 - positive_share) * (1 - y)
  entropy = functional.binary_cross_entropy_with_logits(logits, y, reduction="none")
  return (share * off**focus * entropy).sum(1).mean()


def mutual(each, labels):
  """DML: the labels and the mean of what the others say, which stay as they are."""
  total = 0
  for i, mine in enumerate(each):
    others = [softened(mine, peer.detach()).mean() for j, peer in enumerate(each) if j != i]
    total = total + functional.cross_entropy(mine, labels) + sum(others) / len(others)
  return total


def without_data(student, logits, feature):
  """DAFL, with its weights for CIFAR: 1, 5 and 0.1, and a logarithm to base 10."""
  sure = functional.cross_entropy(logits, logits.argmax(1))
  mean = logits.softmax(1).mean(0)
  balance = (mean * mean.log10()).sum()
  taught = softened(student, logits.detach()).mean()
  return taught + sure + 5 * balance - 0.1 * feature.abs().mean()


def convolved(x, kernel, bias=None):
  """A convolution that keeps the size; x channels first, the kernel as Flax has it."""
  return functional.conv2d(x, kernel.permute(3, 2, 0, 1), bias, padding="same")


def generated(student, teacher, keep, align, first, second):
  """MGD, a sum over all of the map and the mean over the batch; each layer a kernel and a bias."""
  x = convolved(student, *align)
  x = convolved(functional.relu(convolved(x * keep, *first)), *second)
  return functional.mse_loss(x, teacher, reduction="sum") / len(teacher)


def connected(features, kernel, scale, bias, slope=0.0):
  """A convolution, BatchNorm by the batch, and a ReLU: SRRL's connector, with a slope FCFD's."""
  x = functional.batch_norm(convolved(features, kernel), None, None, scale, bias, training=True)
  return functional.leaky_relu(x, slope)


def function_consistent(lower, upper, lower_target, upper_target):
  """FCFD: all maps that came to a layer beside the teacher's; of the last one, what is pooled."""

  def pooled(x):
    return functional.adaptive_avg_pool2d(x.relu(), 1).flatten(1)

  below = sum(functional.mse_loss(x, lower_target) for x in lower)
  above = sum(functional.mse_loss(x, upper_target) for x in upper)
  return below + above + sum(functional.mse_loss(pooled(x), pooled(upper_target)) for x in upper)


def two_momenta(weights, gradients, rate, momentum, delta, weight_decay):
  """DOT, from each step's (labels', distilled) gradients, None where there is no path; → weights.

  The published optimiser keeps a velocity only of what has a gradient, and what has but one of the
  two goes by the mean of both momenta.
  """
  velocity = {}
  for pair in gradients:
    alone = any(gradient is None for gradient in pair)
    began, moved = weights, 0
    for name, gradient, sign in zip(("labels", "distilled"), pair, (-1, 1), strict=True):
      if gradient is None:
        continue
      if name == "labels" or alone:
        gradient = gradient + weight_decay * began
      keeps = momentum if alone else momentum + sign * delta
      velocity[name] = keeps * velocity[name] + gradient if name in velocity else gradient
      moved = moved + velocity[name]
    weights = began - rate * moved
  return weights
