"""Networks that sow what there is to distil from; modules nobody here wrote work as well.

>>> from jaxdistill import networks
>>> networks.models.resnet20(num_classes=100).depth
20
"""

from jaxdistill.networks.models.decoder import (
  Cache,
  Decoder,
  DecoderBlock,
  DecoderConfig,
  Rope,
  spread,
  stacked,
  unstacked,
  with_layers,
)
from jaxdistill.networks.models.resnet import (
  BasicBlock,
  ResNet,
  resnet8,
  resnet8x4,
  resnet14,
  resnet20,
  resnet32,
  resnet32x4,
  resnet44,
  resnet56,
  resnet110,
)
from jaxdistill.networks.models.small import MLP, Conv3x3, ConvNet, patches_convolution
from jaxdistill.networks.models.vit import EncoderBlock, VisionTransformer, vit_tiny
from jaxdistill.networks.models.wide_resnet import (
  WideBlock,
  WideResNet,
  wrn_16_1,
  wrn_16_2,
  wrn_40_1,
  wrn_40_2,
)

__all__ = [
  "MLP",
  "BasicBlock",
  "Cache",
  "Conv3x3",
  "ConvNet",
  "Decoder",
  "DecoderBlock",
  "DecoderConfig",
  "EncoderBlock",
  "ResNet",
  "Rope",
  "VisionTransformer",
  "WideBlock",
  "WideResNet",
  "patches_convolution",
  "resnet8",
  "resnet8x4",
  "resnet14",
  "resnet20",
  "resnet32",
  "resnet32x4",
  "resnet44",
  "resnet56",
  "resnet110",
  "spread",
  "stacked",
  "unstacked",
  "vit_tiny",
  "with_layers",
  "wrn_16_1",
  "wrn_16_2",
  "wrn_40_1",
  "wrn_40_2",
]
