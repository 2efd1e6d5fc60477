"""Methods as objectives: what to compare, and with what weight.

A recipe, called with keywords, gives an objective. `combine` adds objectives up, so that a method
is put together from parts: ``combine(kd(), hint("hidden", "0/hidden"))``. A method of your own
needs none of this: a function ``(student, teacher, batch, *, ...) -> {name: Term}`` is an
objective, and the decorator `recipe` lets it be called as those here are. Those that learn nothing
of their own are written so: whoever copies `kd` into a file of his has his method, ``kd.function``.
`parts` has what bodies call; `projectors` are what the other recipes train beside the student.
"""

from jaxdistill.recipes import parts as parts
from jaxdistill.recipes import projectors as projectors
from jaxdistill.recipes.basics import (
  combine,
  fitnet,
  gaussian_regression,
  hint,
  kd,
  labels,
  multi_label,
  regression,
  teacher_bounded,
)
from jaxdistill.recipes.classifiers import catkd, srrl, with_class_maps
from jaxdistill.recipes.crd import crd
from jaxdistill.recipes.data_free import dafl, with_generator
from jaxdistill.recipes.fcfd import fcfd, fcfd_back, with_variables
from jaxdistill.recipes.features import (
  attention_transfer,
  cwd,
  ickd,
  mgd,
  nst,
  overhaul,
  overhaul_margins,
  structure,
  vid,
  vkd,
)
from jaxdistill.recipes.logits import ctkd, dist, kd_standardized, mlkd, ofa, sdd, ttm, wsl, wttm
from jaxdistill.recipes.many_to_one import fold_many_to_one, many_to_one, with_many_to_one
from jaxdistill.recipes.online import dml, each, mean_teacher
from jaxdistill.recipes.partitions import dkd, gdkd, nkd, rld
from jaxdistill.recipes.parts import recipe
from jaxdistill.recipes.prototypes import norm_direction
from jaxdistill.recipes.relations import (
  affinity,
  correlation_congruence,
  pkt,
  rkd,
  similarity_preserving,
)
from jaxdistill.recipes.review import reviewkd
from jaxdistill.recipes.self_distillation import pskd, tfkd, uskd
from jaxdistill.recipes.simkd import simkd
from jaxdistill.recipes.stages import activation_boundary, factor_transfer, fsp
from jaxdistill.recipes.views import crld, with_views

__all__ = [
  "activation_boundary",  # activation boundaries (AB)
  "affinity",  # affinity of two towers (CLIP-KD): which image goes with which text
  "attention_transfer",  # attention transfer (AT): where in the image each stage's energy is
  "catkd",  # class attention transfer (CAT-KD): where the evidence for each class is
  "combine",  # adds objectives up: the union of their terms
  "correlation_congruence",  # correlation congruence (CC)
  "crd",  # contrastive representation distillation (CRD), with banks of all training examples
  "crld",  # cross-view consistency (CRLD): two looks, each taught by what is said of either
  "ctkd",  # curriculum temperature (CTKD): the temperature is learned against the student
  "cwd",  # channel-wise distillation (CWD): where each channel is strongest
  "dafl",  # data-free learning (DAFL): a generator makes what the teacher is sure of
  "dist",  # DIST: correlations of predictions
  "dkd",  # decoupled knowledge distillation (DKD), with its warm-up
  "dml",  # deep mutual learning (DML): the members of a cohort teach each other
  "each",  # an objective for each member of a cohort
  "factor_transfer",  # factor transfer (FT)
  "fcfd",  # function consistency (FCFD): the teacher goes on from the student's maps
  "fcfd_back",  # its other half: the student goes on from the teacher's maps
  "fitnet",  # fitNets in one stage, as RepDistiller and mdistiller run it
  "fold_many_to_one",  # the student alone: the block of `many_to_one` folded into its classifier
  "fsp",  # flow of the solution procedure (FSP): how each layer's channels go with the next one's
  "gaussian_regression",  # numbers and their doubt: Gaussian NLL of labels, KL of the teacher's
  "gdkd",  # generalised decoupled knowledge distillation (GDKD)
  "hint",  # matches one intermediate layer, through a projector where the widths differ
  "ickd",  # inter-channel correlation (ICKD): which channels fire together
  "kd",  # soft targets and hard labels: Hinton, Vinyals, Dean, "Distilling the Knowledge", 2015
  "kd_standardized",  # logit standardisation (LSKD)
  "labels",  # cross-entropy on the labels alone: the baseline that distillation has to beat
  "many_to_one",  # many-to-one matching (NORM): several segments, each of them the teacher's map
  "mean_teacher",  # mean teacher: the student says what its own moving average says
  "mgd",  # masked generative distillation (MGD): the teacher's map from a part of the student's
  "mlkd",  # multi-level logit distillation (MLKD), of one view or two
  "multi_label",  # labels that are each on or off, and soft ones (MLD)
  "nkd",  # normalised knowledge distillation (NKD)
  "norm_direction",  # norm and direction (ND): KD++, and the ++ of other methods
  "nst",  # neuron selectivity transfer (NST): where each channel fires, and the labels
  "ofa",  # one-for-all distillation (OFA-KD)
  "overhaul",  # overhaul of feature distillation (OFD): partial L2 before the ReLU, and the labels
  "overhaul_margins",  # the margins of `overhaul` from the teacher's BatchNorms
  "pkt",  # probabilistic knowledge transfer (PKT): whom each example would pick as a neighbour
  "pskd",  # progressive self-distillation (PS-KD): labels give way to the student's past
  "recipe",  # makes a recipe of a method: a function becomes one that is called with keywords
  "regression",  # towards labels and the teacher's numbers
  "reviewkd",  # reviewKD: the student's stages, fused from the top down, match the teacher's
  "rkd",  # relational knowledge distillation (RKD): distances of pairs and angles of triples
  "rld",  # refined logit distillation (RLD)
  "sdd",  # scale-decoupled distillation (SDD): soft targets of an image's regions
  "similarity_preserving",  # similarity-preserving distillation (SP)
  "simkd",  # simKD: the student's last map is made the teacher's
  "srrl",  # softmax regression (SRRL): the feature as the teacher's classifier reads it
  "structure",  # pair-wise structure (SKD): which positions of an image look alike
  "teacher_bounded",  # regression that stops where the student is better than its teacher
  "tfkd",  # teacher-free distillation (Tf-KD): a designed teacher
  "ttm",  # transformed teacher matching (TTM)
  "uskd",  # universal self-knowledge distillation (USKD)
  "vid",  # variational information distillation (VID): the teacher's stages
  "vkd",  # VkD: an orthogonal projector to the teacher's normalised feature
  "with_class_maps",  # a network that also puts out the maps of `catkd`
  "with_generator",  # a student that sees what a generator makes of noise
  "with_many_to_one",  # the student with the block that `many_to_one` matches in
  "with_variables",  # a network that brings its variables along, for `fcfd_back`
  "with_views",  # a network that is shown two looks at each example
  "wsl",  # weighted soft labels (WSL)
  "wttm",  # weighted transformed teacher matching (WTTM)
]
