"""The PyTorch side of the benchmarks: the same networks, and distillation as its users write it.

The networks have the shapes, the layers and, but for what their libraries choose themselves, the
arithmetic of `jaxdistill.networks.models`; `count` lets a benchmark check that the parameters are
as many. Everything here is plain PyTorch in its defaults: eager, NCHW, the teacher under
`torch.no_grad`.

Needs the extra ``peers``: pip install 'jaxdistill[peers]'.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


def count(*modules):
  """How many parameters these modules have."""
  return sum(parameter.numel() for module in modules for parameter in module.parameters())


def mlp(widths=(16,), inputs=64, num_classes=10):
  """`jaxdistill.networks.models.MLP`."""
  layers = [nn.Flatten()]
  for width in widths:
    layers += [nn.Linear(inputs, width), nn.ReLU()]
    inputs = width
  return nn.Sequential(*layers, nn.Linear(inputs, num_classes))


def convnet(channels=(32, 64, 64), strides=(1, 2, 1), dense=256, size=8, num_classes=10):
  """`jaxdistill.networks.models.ConvNet`, for square images of one channel."""
  layers, before = [], 1
  for after, stride in zip(channels, strides, strict=True):
    layers += [nn.Conv2d(before, after, 3, stride, padding=1), nn.ReLU()]
    before, size = after, size // stride
  layers += [nn.Flatten(), nn.Linear(size * size * before, dense), nn.ReLU()]
  return nn.Sequential(*layers, nn.Linear(dense, num_classes))


class Block(nn.Module):
  """`jaxdistill.networks.models.resnet.BasicBlock`."""

  def __init__(self, before, after, stride):
    super().__init__()
    self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
    self.norm1 = nn.BatchNorm2d(after)
    self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
    self.norm2 = nn.BatchNorm2d(after)
    self.shortcut = nn.Identity()
    if stride != 1 or before != after:
      self.shortcut = nn.Sequential(
        nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)
      )

  def forward(self, x):
    """Maps to maps, after the last ReLU."""
    y = functional.relu(self.norm1(self.conv1(x)))
    return functional.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
  """`jaxdistill.networks.models.ResNet`; gives logits and ``stage3``."""

  def __init__(self, depth, num_classes=100, width=(16, 16, 32, 64)):
    super().__init__()
    before = width[0]
    self.stem = nn.Sequential(
      nn.Conv2d(3, before, 3, padding=1, bias=False), nn.BatchNorm2d(before), nn.ReLU()
    )
    blocks = []
    for stage, after in enumerate(width[1:]):
      for block in range((depth - 2) // 6):
        blocks.append(Block(before, after, 2 if stage and not block else 1))
        before = after
    self.blocks = nn.Sequential(*blocks)
    self.classifier = nn.Linear(before, num_classes)

  def forward(self, x):
    """Images to logits and the last stage's maps."""
    maps = self.blocks(self.stem(x))
    return self.classifier(maps.mean((2, 3))), maps


class EncoderBlock(nn.Module):
  """`jaxdistill.networks.models.vit.EncoderBlock`."""

  def __init__(self, width, num_heads):
    super().__init__()
    self.attention_norm = nn.LayerNorm(width, eps=1e-6)
    self.attention = nn.MultiheadAttention(width, num_heads, batch_first=True)
    self.mlp = nn.Sequential(
      nn.LayerNorm(width, eps=1e-6),
      nn.Linear(width, 4 * width),
      nn.GELU(approximate="tanh"),
      nn.Linear(4 * width, width),
    )

  def forward(self, x):
    """Tokens to tokens."""
    y = self.attention_norm(x)
    x = x + self.attention(y, y, y, need_weights=False)[0]
    return x + self.mlp(x)


class VisionTransformer(nn.Module):
  """`jaxdistill.networks.models.VisionTransformer`, mean pooling; gives logits and ``pooled``."""

  def __init__(self, width, depth, num_heads, patch_size=4, num_classes=100, size=32):
    super().__init__()
    self.embed = nn.Conv2d(3, width, patch_size, patch_size)
    self.positions = nn.Parameter(0.02 * torch.randn(1, (size // patch_size) ** 2, width))
    self.blocks = nn.Sequential(*(EncoderBlock(width, num_heads) for _ in range(depth)))
    self.norm = nn.LayerNorm(width, eps=1e-6)
    self.classifier = nn.Linear(width, num_classes)

  def forward(self, x):
    """Images to logits and the pooled tokens."""
    tokens = self.embed(x).flatten(2).mT + self.positions
    pooled = self.norm(self.blocks(tokens)).mean(1)
    return self.classifier(pooled), pooled


def soft_targets(student, teacher, temperature):
  """Hinton's soft targets with their ``temperature ** 2``."""
  ours = functional.log_softmax(student / temperature, 1)
  theirs = functional.softmax(teacher / temperature, 1)
  return temperature**2 * functional.kl_div(ours, theirs, reduction="batchmean")


WIDTHS = {
  "resnet8": (8, (16, 16, 32, 64)),
  "resnet8x4": (8, (32, 64, 128, 256)),
  "resnet32x4": (32, (32, 64, 128, 256)),
}
"""Depth and widths of `jaxdistill.networks.models`' networks of these names."""


def cifar_step(teacher, student, batch_size, device, *, autocast, compiled):
  """A step of soft targets on made-up images, as a loop of PyTorch's users has it.

  Args:
    teacher: a name of `WIDTHS`.
    student: likewise.
    batch_size: images in a batch.
    device: PyTorch's.
    autocast: whether to compute in bfloat16, channels last.
    compiled: ``"default"`` or ``"reduce-overhead"`` for `torch.compile`'s mode; else eager.

  Returns:
    A function that runs a step and does not wait.
  """
  networks = [ResNet(WIDTHS[n][0], width=WIDTHS[n][1]).to(device) for n in (teacher, student)]
  if autocast:
    networks = [network.to(memory_format=torch.channels_last) for network in networks]
  teacher, student = networks
  teacher.eval().requires_grad_(False)
  parameters = list(student.parameters())
  optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
  if compiled in ("default", "reduce-overhead"):
    teacher, student = (torch.compile(network, mode=compiled) for network in networks)
  random = torch.Generator().manual_seed(0)
  count = max(512, batch_size)
  images = torch.randint(0, 255, (count, 3, 32, 32), dtype=torch.uint8, generator=random)
  labels = torch.randint(0, 100, (count,), generator=random).to(device)
  images = images.to(device)
  mean = torch.tensor((0.5071, 0.4867, 0.4408), device=device).view(1, 3, 1, 1) * 255
  std = torch.tensor((0.2675, 0.2565, 0.2761), device=device).view(1, 3, 1, 1) * 255
  order = torch.randperm(count, generator=random).to(device)

  def run():
    rows = order[:batch_size]
    inputs, targets = (images[rows].float() - mean) / std, labels[rows]
    if autocast:
      inputs = inputs.contiguous(memory_format=torch.channels_last)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
      with torch.no_grad():
        # A copy: the next compiled call may write into the memory of a CUDA graph's outputs.
        theirs = teacher(inputs)[0].float()
      ours = student(inputs)[0].float()
    loss = 0.1 * functional.cross_entropy(ours, targets) + 0.9 * soft_targets(ours, theirs, 4.0)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

  return run


def train(
  student, inputs, labels, batches, *, outputs, temperature, soft_weight, rate, hard_weight=0.1
):
  """A plain distillation loop.

  Args:
    student: the module to train.
    inputs: ``[N, 1, H, W]``, all training images, normalised.
    labels: ``[N]``.
    batches: ``[steps, B]``, the rows of each step.
    outputs: ``(images, rows) -> logits``, the teacher's.
    temperature: of the soft targets.
    soft_weight: of the soft targets.
    rate: Adam's learning rate.
    hard_weight: of the labels.
  """
  optimizer = torch.optim.Adam(student.parameters(), lr=rate)
  for rows in batches:
    images, targets = inputs[rows], labels[rows]
    with torch.no_grad():
      theirs = outputs(images, rows)
    ours = student(images)
    loss = hard_weight * functional.cross_entropy(ours, targets)
    loss = loss + soft_weight * soft_targets(ours, theirs, temperature)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
