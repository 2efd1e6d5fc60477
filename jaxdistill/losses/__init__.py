"""Distillation losses: plain functions, student first, one value per example.

`logits` compares what two networks predict, `features` what they hold inside, and `relations` how
they place examples beside each other. ``losses.soft_target_kl(student, teacher, temperature=4.0)``
is one line of NumPy's kind: it can be called in any training loop, and imports nothing but JAX.
"""

from jaxdistill.losses.features import (
  activation_boundary,
  attention_relation,
  attention_transfer,
  channel_wise,
  class_attention,
  factor_transfer,
  flow_of_solution,
  hierarchical_context,
  hint_cosine,
  hint_l2,
  hint_normalized,
  inter_channel_correlation,
  neuron_selectivity,
  overhaul,
  overhaul_margin,
  pairwise_structure,
  variational_information,
)
from jaxdistill.losses.logits import (
  cross_entropy,
  decoupled_kd,
  generalized_jsd,
  inter_class_correlation,
  intra_class_correlation,
  logit_l2,
  one_for_all,
  reverse_kl,
  skew_kl,
  skew_reverse_kl,
  soft_target_kl,
  standardize_logits,
  total_variation,
)
from jaxdistill.losses.relations import (
  Banks,
  contrastive,
  contrastive_bank,
  correlation_congruence,
  init_banks,
  probabilistic_transfer,
  relational_angle,
  relational_distance,
  similarity_preserving,
)

__all__ = [
  "Banks",  # memory banks (CRD): an embedding of every training example by each network
  "activation_boundary",  # activation boundaries (AB): which units are on
  "attention_relation",  # self-attention relations (MiniLMv2): how positions attend to each other
  "attention_transfer",  # attention transfer (AT)
  "channel_wise",  # channel-wise distillation (CWD): where each channel is strongest
  "class_attention",  # class attention (CAT-KD): where the evidence for each class is
  "contrastive",  # contrastive distillation within the batch (InfoNCE), both ways round
  "contrastive_bank",  # contrastive representation distillation (CRD)
  "correlation_congruence",  # correlation congruence (CC)
  "cross_entropy",  # cross-entropy (CE) with hard labels or a distribution
  "decoupled_kd",  # decoupled knowledge distillation (DKD): the label's class apart from the others
  "factor_transfer",  # factor transfer (FT): distance of two factors' energies over the image
  "flow_of_solution",  # flow of the solution procedure (FSP)
  "generalized_jsd",  # generalised Jensen-Shannon divergence (JSD, GKD)
  "hierarchical_context",  # hierarchical context loss (HCL) of ReviewKD
  "hint_cosine",  # hints by direction (Lcos of DistilBERT): cosine distance of two features
  "hint_l2",  # hints (FitNets): squared error of two features
  "hint_normalized",  # hints to a normalised teacher (VkD): smooth L1 to its z-scores
  "init_banks",  # memory banks (CRD) before the first batch: random unit rows
  "inter_channel_correlation",  # inter-channel correlation (ICKD)
  "inter_class_correlation",  # inter-class relation (DIST)
  "intra_class_correlation",  # intra-class relation (DIST)
  "logit_l2",  # logit regression (L2): mean squared error of the logits
  "neuron_selectivity",  # neuron selectivity transfer (NST): where channels fire
  "one_for_all",  # one-for-all distillation (OFA-KD): the label's class is enhanced by a power
  "overhaul",  # overhaul of feature distillation (OFD): partial L2 before the activation
  "overhaul_margin",  # margins of the overhaul (OFD)
  "pairwise_structure",  # pair-wise structure (SKD): which positions of an image look alike
  "probabilistic_transfer",  # probabilistic knowledge transfer (PKT)
  "relational_angle",  # relational knowledge distillation by angle (RKD-A)
  "relational_distance",  # relational knowledge distillation by distance (RKD-D)
  "reverse_kl",  # reverse KL (RKL), as in MiniLLM: mode-seeking where `soft_target_kl` covers mass
  "similarity_preserving",  # similarity-preserving distillation (SP, SPKD)
  "skew_kl",  # skew KL (SKL) of DistiLLM: the teacher from a mixture of both
  "skew_reverse_kl",  # skew reverse KL (SRKL) of DistiLLM: the student from a mixture of both
  "soft_target_kl",  # knowledge distillation (KD)
  "standardize_logits",  # logit standardisation (LSKD): z-scores over the classes
  "total_variation",  # total variation distance (TVD) of the softened probabilities
  "variational_information",  # variational information distillation (VID)
]
