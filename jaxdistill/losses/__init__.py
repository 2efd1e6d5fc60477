"""Distillation losses: plain functions, student first, one value per example.

`logits` compares what two networks predict, `partitions` does so by parts of the classes, `binary`
label by label, `regression` for numbers and `ranking` for scores of pairs; `self_distillation`
needs no teacher, `views` has several looks at one image. `features` compares what networks hold
inside, `prototypes` with the means of the classes, and `relations` how they place examples beside
each other.
``losses.soft_target_kl(student, teacher, temperature=4.0)`` is one line of NumPy's kind: it can be
called in any training loop, and imports nothing but JAX.
"""

from jaxdistill.losses.binary import binary_cross_entropy, binary_focal, binary_soft_target_kl
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
  many_to_one,
  neuron_selectivity,
  overhaul,
  overhaul_margin,
  pairwise_structure,
  variational_information,
)
from jaxdistill.losses.logits import (
  adaptive_kl,
  alpha_beta,
  batch_gram,
  class_gram,
  cross_entropy,
  generalized_jsd,
  inter_class_correlation,
  intra_class_correlation,
  logit_l2,
  negative_log_acceptance,
  one_for_all,
  reverse_kl,
  skew_kl,
  skew_reverse_kl,
  soft_label_weight,
  soft_target_kl,
  standardize_logits,
  total_variation,
  transformed_teacher,
  weighted_soft_labels,
  weighted_transformed_teacher,
  z_loss,
)
from jaxdistill.losses.partitions import (
  decoupled_kd,
  generalized_decoupled_kd,
  normalized_kd,
  partition_kl,
  refined_kd,
)
from jaxdistill.losses.prototypes import class_means, norm_and_direction
from jaxdistill.losses.ranking import affinity, margin_mse
from jaxdistill.losses.regression import gaussian_kl, gaussian_nll, huber, teacher_bounded
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
from jaxdistill.losses.self_distillation import (
  consistency,
  self_nontarget,
  self_target,
  virtual_teacher,
)
from jaxdistill.losses.views import (
  cross_view_kd,
  region_logits,
  region_weight,
  scale_decoupled_kd,
)

__all__ = [
  "Banks",  # memory banks (CRD): an embedding of every training example by each network
  "activation_boundary",  # activation boundaries (AB): which units are on
  "adaptive_kl",  # adaptive KL (AKL): KL on the likely classes, reverse KL on the others
  "affinity",  # affinity of two towers (CLIP-KD's CRD, TinyCLIP): which image goes with which text
  "alpha_beta",  # α-β-divergence (ABKD): between KL, reverse KL and squared error
  "attention_relation",  # self-attention relations (MiniLMv2): how positions attend to each other
  "attention_transfer",  # attention transfer (AT)
  "batch_gram",  # batch correlation (MLKD): which examples are predicted alike
  "binary_cross_entropy",  # binary cross-entropy (BCE) of labels that are each on or off
  "binary_focal",  # focal loss: labels that are easy count less
  "binary_soft_target_kl",  # multi-label logits distillation (MLD)
  "channel_wise",  # channel-wise distillation (CWD): where each channel is strongest
  "class_attention",  # class attention (CAT-KD): where the evidence for each class is
  "class_gram",  # class correlation (MLKD): which classes are likely together
  "class_means",  # means of features by class, for `norm_and_direction`
  "consistency",  # consistency (MT, mean teacher): squared error of the probabilities
  "contrastive",  # contrastive distillation within the batch (InfoNCE), both ways round
  "contrastive_bank",  # contrastive representation distillation (CRD)
  "correlation_congruence",  # correlation congruence (CC)
  "cross_entropy",  # cross-entropy (CE) with hard labels or a distribution
  "cross_view_kd",  # cross-view distillation (CRLD): within and across a weak and a strong view
  "decoupled_kd",  # decoupled knowledge distillation (DKD): the label's class apart from the others
  "factor_transfer",  # factor transfer (FT): distance of two factors' energies over the image
  "flow_of_solution",  # flow of the solution procedure (FSP)
  "gaussian_kl",  # KL of two Gaussians: the teacher's mean and its variance
  "gaussian_nll",  # heteroscedastic regression: errors in the units of the student's own doubt
  "generalized_decoupled_kd",  # generalised DKD (GDKD): the teacher's first few classes apart
  "generalized_jsd",  # generalised Jensen-Shannon divergence (JSD, GKD)
  "hierarchical_context",  # hierarchical context loss (HCL) of ReviewKD
  "hint_cosine",  # hints by direction (Lcos of DistilBERT): cosine distance of two features
  "hint_l2",  # hints (FitNets): squared error of two features
  "hint_normalized",  # hints to a normalised teacher (VkD): smooth L1 to its z-scores
  "huber",  # Huber's loss (smooth L1)
  "init_banks",  # memory banks (CRD) before the first batch: random unit rows
  "inter_channel_correlation",  # inter-channel correlation (ICKD)
  "inter_class_correlation",  # inter-class relation (DIST)
  "intra_class_correlation",  # intra-class relation (DIST)
  "logit_l2",  # logit regression (L2): mean squared error of the logits
  "many_to_one",  # many-to-one matching (NORM): several segments, each of them the teacher's map
  "margin_mse",  # margin MSE: by how much the relevant candidate is ahead
  "negative_log_acceptance",  # negative log-acceptance (LK), of drafts in speculative decoding
  "neuron_selectivity",  # neuron selectivity transfer (NST): where channels fire
  "norm_and_direction",  # norm and direction (ND, of KD++): towards the class's mean
  "normalized_kd",  # normalised knowledge distillation (NKD)
  "one_for_all",  # one-for-all distillation (OFA-KD): the label's class is enhanced by a power
  "overhaul",  # overhaul of feature distillation (OFD): partial L2 before the activation
  "overhaul_margin",  # margins of the overhaul (OFD)
  "pairwise_structure",  # pair-wise structure (SKD): which positions of an image look alike
  "partition_kl",  # partition KL: a set of classes, and those outside it (what DKD and GDKD share)
  "probabilistic_transfer",  # probabilistic knowledge transfer (PKT)
  "refined_kd",  # refined logits (RLD): what the teacher puts above the label is not taught
  "region_logits",  # logits of an image's regions, for SDD
  "region_weight",  # weights of regions (SDD), for any loss
  "relational_angle",  # relational knowledge distillation by angle (RKD-A)
  "relational_distance",  # relational knowledge distillation by distance (RKD-D)
  "reverse_kl",  # reverse KL (RKL), as in MiniLLM: mode-seeking where `soft_target_kl` covers mass
  "scale_decoupled_kd",  # scale-decoupled distillation (SDD): soft targets of an image's regions
  "self_nontarget",  # non-target part of USKD: Zipf's law for the other classes
  "self_target",  # target part of USKD: a soft label of the student's own
  "similarity_preserving",  # similarity-preserving distillation (SP, SPKD)
  "skew_kl",  # skew KL (SKL) of DistiLLM: the teacher from a mixture of both
  "skew_reverse_kl",  # skew reverse KL (SRKL) of DistiLLM: the student from a mixture of both
  "soft_label_weight",  # weights of soft labels (WSL), for any loss
  "soft_target_kl",  # knowledge distillation (KD)
  "standardize_logits",  # logit standardisation (LSKD): z-scores over the classes
  "teacher_bounded",  # teacher-bounded regression: errors where the student is no better
  "total_variation",  # total variation distance (TVD) of the softened probabilities
  "transformed_teacher",  # transformed teacher matching (TTM): a power flattens the teacher alone
  "variational_information",  # variational information distillation (VID)
  "virtual_teacher",  # Tf-KD: a designed teacher that is right and says little
  "weighted_soft_labels",  # weighted soft labels (WSL)
  "weighted_transformed_teacher",  # weighted TTM (WTTM): more where the teacher is less sure
  "z_loss",  # z-loss: keeps the logits' normaliser near 1
]
