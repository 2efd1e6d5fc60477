"""Mutants of the core: small wrong changes, and the tests that have to notice each of them.

    python tests/mutants.py                       # all of them, one after another
    python tests/mutants.py --jobs 4              # four at a time
    python tests/mutants.py --only step           # those with "step" in their name
    python tests/mutants.py --list

Each run copies the repository to a temporary folder, makes one change there, and runs the tests
that are named with it, which must fail. A mutant that lives is a behaviour that no test holds: the
command names it and ends with status 1. The tests are of those that `pytest` alone runs, so that
what dies here dies there too; test_mutants.py sees that, and that each snippet is still there.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Mutant:
  """One wrong change.

  Attributes:
    name: the part of the core, and what is wrong.
    file: in ``jaxdistill/``.
    old: what is there, once.
    new: what is put in its place.
    means: what a user would get.
    tests: ``file::function`` in ``tests/``, of which one at least must fail.
  """

  name: str
  file: str
  old: str
  new: str
  means: str
  tests: tuple[str, ...]


LOGITS = "losses/test_losses_logits.py::"
FEATURES = "losses/test_losses_features.py::"
RELATIONS = "losses/test_losses_relations.py::"
PADDING = "recipes/test_padding.py::"
STEP = "train/test_step.py::"
CHUNKS = "train/test_in_chunks.py::"
TRAIN = "train/test_train.py::"
ONLINE = "train/test_online.py::"
DOT = "train/test_dot.py::"
SWEEP = "search/test_sweep.py::"
STUDY = "search/test_study.py::"
SHARDING = "train/test_sharding.py::"
TWICE = "train/test_nothing_twice.py::"
TOKENS = "data/test_tokens.py::"
METRICS = "evaluation/test_metrics.py::"
CHECKPOINTS = "runs/test_checkpoints.py::"
CACHED = "teachers/test_cached.py::"

MUTANTS = [
  # --- Losses. ---
  Mutant(
    "loss: no temperature squared",
    "losses/logits.py",
    "return squared * softmax_kl(teacher, student)",
    "return softmax_kl(teacher, student)",
    "soft targets fade as the temperature rises",
    (LOGITS + "test_value_is_the_formula",),
  ),
  Mutant(
    "loss: labels of no class pull",
    "losses/_log_space.py",
    "jnp.exp(log_q) * total - targets",
    "jnp.exp(log_q) - targets",
    "a label outside of the classes flattens what the student says",
    (LOGITS + "test_the_derivative_of_cross_entropy_is_that_of_autodiff",),
  ),
  Mutant(
    "loss: temperature instead of its square",
    "losses/_log_space.py",
    "soften(teacher, scale), jnp.square(scale)",
    "soften(teacher, scale), scale",
    "all divergences are weighed by T",
    (LOGITS + "test_value_is_the_formula",),
  ),
  Mutant(
    "loss: reverse is forward",
    "losses/logits.py",
    "return squared * softmax_kl(student, teacher)",
    "return squared * softmax_kl(teacher, student) + 0",
    "reverse_kl covers mass",
    (LOGITS + "test_value_is_the_formula",),
  ),
  Mutant(
    "loss: a closed form of the wrong sign",
    "losses/_log_space.py",
    "(jnp.exp(log_b) - jnp.exp(log_a)) * by_b",
    "(jnp.exp(log_a) - jnp.exp(log_b)) * by_b",
    "the student climbs away from the teacher",
    (LOGITS + "test_float64_stays_and_gradient_is_the_derivative",),
  ),
  Mutant(
    "loss: no temperature on the teacher",
    "losses/_log_space.py",
    "return soften(student, scale), soften(teacher, scale)",
    "return soften(student, scale), soften(teacher, 1.0)",
    "the student is tempered and the teacher is not",
    (LOGITS + "test_value_is_the_formula",),
  ),
  Mutant(
    "loss: the others of a label do not add up to 1",
    "losses/partitions.py",
    "within, without = (part - mass for",
    "within, without = (part + 0 * mass for",
    "DKD's second part is of no distribution",
    (LOGITS + "test_value_is_the_formula",),
  ),
  Mutant(
    "loss: smoothing spares the label",
    "losses/logits.py",
    "smoothing * valid / count",
    "smoothing * valid / (count - 1)",
    "targets add up to more than 1",
    (LOGITS + "test_value_is_the_formula",),
  ),
  Mutant(
    "loss: tokens are averaged with their padding",
    "losses/features.py",
    "return (2,) if features.ndim == 3 else tuple(range(1, features.ndim))",
    "return tuple(range(1, features.ndim))",
    "a hint on tokens counts pads",
    (PADDING + "test_padded_positions_count_nowhere", FEATURES + "test_value_is_the_formula"),
  ),
  Mutant(
    "loss: the variance is rewarded",
    "losses/features.py",
    "/ variance + jnp.log(variance))",
    "/ variance - jnp.log(variance))",
    "VID's variances grow without end",
    (FEATURES + "test_value_is_the_formula",),
  ),
  Mutant(
    "loss: what is off may be anything",
    "losses/features.py",
    "counts = (teacher > 0) | (student > target)",
    "counts = teacher > 0",
    "OFD says nothing to units that the teacher has off",
    (FEATURES + "test_value_is_the_formula",),
  ),
  Mutant(
    "loss: windows lose their last row",
    "losses/pooling.py",
    "-(-(i + 1) * size // windows)",
    "(i + 1) * size // windows",
    "maps of sizes that do not divide are pooled otherwise than PyTorch's",
    (FEATURES + "test_pooling_is_adaptive",),
  ),
  Mutant(
    "loss: queries are not scaled",
    "losses/features.py",
    'product("bqhd,bkhd->bhqk", x, x) / x.shape[-1] ** 0.5',
    'product("bqhd,bkhd->bhqk", x, x)',
    "attention relations are too sharp",
    (FEATURES + "test_value_is_the_formula",),
  ),
  Mutant(
    "loss: excluded rows are seen",
    "losses/_maps.py",
    "jnp.where(valid[:, None], x.reshape(size, math.prod(x.shape[1:])), 0.0)",
    "x.reshape(size, math.prod(x.shape[1:]))",
    "NaN in padding reaches relations",
    (RELATIONS + "test_a_mask_is_as_if_the_example_were_not_there",),
  ),
  Mutant(
    "loss: relations are averaged over padding",
    "losses/relations.py",
    "count = jnp.maximum(jnp.sum(valid), 1).astype(pairs.dtype)",
    "count = jnp.asarray(len(valid), pairs.dtype)",
    "a padded batch relates less",
    (RELATIONS + "test_a_mask_is_as_if_the_example_were_not_there",),
  ),
  Mutant(
    "loss: memory forgets what it should keep",
    "losses/relations.py",
    "mixed = keep * old + (1 - keep)",
    "mixed = (1 - keep) * old + keep",
    "CRD's momentum is turned round, which at the default of 0.5 nobody sees",
    (RELATIONS + "test_crd_rows_move_with_momentum",),
  ),
  Mutant(
    "loss: a gradient through the banks",
    "losses/relations.py",
    "banks = jax.tree.map(lambda x: jax.lax.stop_gradient(jnp.asarray(x)), banks)",
    "banks = jax.tree.map(jnp.asarray, banks)",
    "CRD's memory is trained",
    (RELATIONS + "test_crd_gradient_is_the_derivative",),
  ),
  Mutant(
    "loss: contrast one way round",
    "losses/relations.py",
    "-0.5 * (jnp.diagonal(forth) + jnp.diagonal(back))",
    "-jnp.diagonal(forth)",
    "the teacher does not look for its student",
    (RELATIONS + "test_value_is_the_formula",),
  ),
  # --- Masks and recipes. ---
  Mutant(
    "mask: soft targets ask for a label",
    "recipes/basics.py",
    '"soft": Term(soft, weight=soft_weight),',
    '"soft": Term(soft, weight=soft_weight, where=batch.labelled),',
    "unlabelled data teaches nothing",
    (STEP + "test_unlabelled_examples_reach_the_soft_term_alone",),
  ),
  Mutant(
    "mask: unknown labels count",
    "recipes/parts.py",
    "return Term(values, weight=hard_weight, where=batch.labelled)",
    "return Term(values, weight=hard_weight)",
    "the label 0 is trained where there is none",
    ("recipes/test_recipes_labels.py::test_the_term_is_the_mean_over_what_is_labelled",),
  ),
  Mutant(
    "mask: the weights are ignored",
    "train/_step.py",
    "    factors.append(weight)\n",
    "",
    "padding and weights count as 1",
    (STEP + "test_a_term_is_a_sum_over_a_sum",),
  ),
  Mutant(
    "mask: a masked value leaks",
    "train/_step.py",
    "jnp.where(mask == 0, 0, values) * mask",
    "values * mask",
    "NaN in padding is NaN in the loss",
    (STEP + "test_a_masked_value_cannot_leak",),
  ),
  Mutant(
    "mask: nothing counted is 0/0",
    "train/_step.py",
    "mean = total / jnp.where(count == 0, 1, count)",
    "mean = total / count",
    "a batch without labels ends the run",
    (STEP + "test_an_empty_mask_gives_zero_value_and_gradient",),
  ),
  Mutant(
    "mask: an example of tokens counts as its first",
    "train/_step.py",
    "weight = jnp.max(weight, axis=tuple(range(values.ndim, weight.ndim)))",
    "weight = weight[(slice(None),) * values.ndim + (0,) * (weight.ndim - values.ndim)]",
    "sentences padded on the left are left out",
    (PADDING + "test_one_value_an_example_counts_as_its_heaviest_token",),
  ),
  Mutant(
    "mask: objectives see padding of the student",
    "train/_step.py",
    "_without_padding(outputs, batch),",
    "outputs,",
    "garbage in padding reaches projectors' gradients",
    (PADDING + "test_padded_examples_count_nowhere[hint]",),
  ),
  Mutant(
    "mask: objectives see padding of the teacher",
    "train/_step.py",
    "_without_padding(outputs, batch), _without_padding(target, batch)",
    "_without_padding(outputs, batch), target",
    "garbage in padding reaches gradients",
    (PADDING + "test_padded_examples_count_nowhere[hint]",),
  ),
  Mutant(
    "mask: a projector's statistics count padding",
    "recipes/parts.py",
    'keywords = {"mask": there | ~jnp.any(there), **keywords}',
    "keywords = dict(keywords)",
    "the projection of an example depends on padding",
    (PADDING + "test_padded_examples_count_nowhere[fitnet]",),
  ),
  Mutant(
    "mask: no statistics of nothing",
    "recipes/parts.py",
    "there | ~jnp.any(there)",
    "there",
    "one batch of padding makes a projector NaN for ever",
    (PADDING + "test_a_batch_that_is_all_padding_leaves_finite_statistics",),
  ),
  Mutant(
    "mask: a class of padding is related",
    "recipes/logits.py",
    "temperature=temperature, where=counted)",
    "temperature=temperature)",
    "DIST relates padding",
    (PADDING + "test_padded_examples_count_nowhere[dist]",),
  ),
  Mutant(
    "mask: training accuracy of unknown labels",
    "train/_step.py",
    "== labels).astype(jnp.float32), where=known)",
    "== labels).astype(jnp.float32), where=None)",
    "accuracy over examples that have no label",
    (STEP + "test_training_accuracy_is_of_what_is_labelled",),
  ),
  Mutant(
    "recipe: parts of a sum draw alike",
    "recipes/basics.py",
    'own["key"] = jax.random.fold_in(key, i)',
    'own["key"] = key',
    "two objectives that draw are one",
    ("recipes/test_recipe.py::test_parts_of_a_sum_draw_and_begin_each_for_itself",),
  ),
  Mutant(
    "recipe: stages weigh half",
    "recipes/parts.py",
    "2.0 ** (i - count + 1)",
    "2.0 ** (i - count)",
    "AB and OFD at half of their published weights",
    ("recipes/test_recipes_features.py::test_a_recipe_is_its_formula_and_trains[overhaul]",),
  ),
  Mutant(
    "recipe: the paraphraser pleases the student",
    "recipes/stages.py",
    'losses.factor_transfer(running("translator"), jax.lax.stop_gradient(factor))',
    'losses.factor_transfer(running("translator"), factor)',
    "a factor that is easy to imitate and says nothing",
    ("recipes/test_recipes_stages.py::test_the_paraphraser_gets_no_gradient_from_the_factor",),
  ),
  # --- Projectors. ---
  Mutant(
    "projector: not trained",
    "train/_step.py",
    'objective_params=trained["objective"],',
    "objective_params=state.objective_params,",
    "a hint through a random map",
    (STEP + "test_student_statistics_and_projector_move",),
  ),
  Mutant(
    "projector: statistics do not move",
    "recipes/parts.py",
    "self.state[name] = {**mine, **updated}",
    "self.state[name] = dict(mine)",
    "averages of 0 and 1 for ever",
    ("recipes/test_recipes_features.py::test_a_recipe_is_its_formula_and_trains[overhaul]",),
  ),
  Mutant(
    "projector: runs on its averages",
    "recipes/parts.py",
    "module.apply(variables, *inputs, train=True, mutable=list(mine))",
    "module.apply(variables, *inputs, train=False, mutable=list(mine))",
    "BatchNorm without a batch",
    ("recipes/test_recipes_features.py::test_a_recipe_is_its_formula_and_trains[overhaul]",),
  ),
  Mutant(
    "projector: twins",
    "recipes/parts.py",
    "module.init(jax.random.fold_in(key, i), *inputs, train=True)",
    "module.init(key, *inputs, train=True)",
    "two modules of one shape start alike",
    ("recipes/test_recipe.py::test_modules_of_one_shape_begin_apart",),
  ),
  Mutant(
    "projector: every seed has the same",
    "train/_state.py",
    "made = objective.init(objective_key, seen, taught)",
    "made = objective.init(jax.random.key(0), seen, taught)",
    "a spread over seeds that is too small",
    (STEP + "test_what_an_objective_learns_begins_by_the_seed",),
  ),
  Mutant(
    "projector: never negative",
    "recipes/projectors.py",
    "return jax.nn.relu(y) if self.use_relu else y",
    "return jax.nn.relu(y)",
    "maps from before a ReLU cannot be matched",
    ("recipes/test_projectors.py::test_conv_norm_and_relu",),
  ),
  Mutant(
    "projector: gates the wrong way round",
    "recipes/projectors.py",
    "y = y * attention[..., :1] + above * attention[..., 1:]",
    "y = y * attention[..., 1:] + above * attention[..., :1]",
    "ReviewKD fuses otherwise than published",
    ("recipes/test_projectors.py::test_fusion_is_the_formula",),
  ),
  Mutant(
    "projector: the temperature helps the student",
    "recipes/projectors.py",
    "return fixed - jnp.asarray(reversal",
    "return fixed + jnp.asarray(reversal",
    "CTKD's temperature makes the loss small",
    ("recipes/test_projectors.py::test_a_learned_temperature_climbs_what_the_others_descend",),
  ),
  Mutant(
    "projector: deployed in place of the student",
    "train/_state.py",
    "if deployed is None:\n    return student\n",
    'if deployed is None:\n    return {**student, "objective": state.objective_params}\n',
    "what only training needs is shipped",
    (STEP + "test_only_the_student_is_deployed",),
  ),
  # --- The step. ---
  Mutant(
    "step: the teacher trains",
    "teachers/_frozen.py",
    "return self.network.apply(variables, batch.inputs, train=False, key=None)[0]",
    "return self.network.apply(variables, batch.inputs, train=True, key=jax.random.key(0))[0]",
    "a teacher whose BatchNorm sees the batch, and whose dropout is on",
    ("teachers/test_teachers.py::test_teachers_stop_gradients_and_run_in_inference_mode",),
  ),
  Mutant(
    "step: a gradient through the teacher",
    "types.py",
    "return jax.lax.stop_gradient(self.apply(variables, placed(batch, variables)))",
    "return self.apply(variables, placed(batch, variables))",
    "whoever differentiates by the inputs gets the teacher's slope too",
    ("teachers/test_teachers.py::test_no_gradient_of_the_inputs_gets_past_a_teacher",),
  ),
  Mutant(
    "step: the student's statistics stand still",
    "train/_step.py",
    "({**model_state, **updated}, remembered)",
    "(model_state, remembered)",
    "a student that is evaluated on averages of 0 and 1",
    (STEP + "test_student_statistics_and_projector_move",),
  ),
  Mutant(
    "step: every step draws the same",
    "train/_step.py",
    "step_key = jax.random.fold_in(state.key, state.step)",
    "step_key = state.key",
    "one dropout mask for the whole run",
    (TRAIN + "test_steps_devices_and_micro_batches_draw_each_for_itself",),
  ),
  Mutant(
    "step: every device draws the same",
    "train/_step.py",
    "step_key = jax.random.fold_in(step_key, jax.lax.axis_index(self.axis_name))",
    "step_key = step_key",
    "under pmap the shares of a batch have one dropout mask",
    (TRAIN + "test_steps_devices_and_micro_batches_draw_each_for_itself",),
  ),
  Mutant(
    "step: micro-batches draw alike",
    "train/_step.py",
    "dataclasses.replace(at, states=states, batch=part, keys=its_keys)",
    "dataclasses.replace(at, states=states, batch=part)",
    "a batch has as many dropout masks as a micro-batch has examples",
    (TRAIN + "test_steps_devices_and_micro_batches_draw_each_for_itself",),
  ),
  Mutant(
    "step: gradients of devices are averaged",
    "train/_step.py",
    "parts, loss = jax.lax.psum((parts, loss), self.axis_name)",
    "parts, loss = jax.lax.pmean((parts, loss), self.axis_name)",
    "under pmap the learning rate is divided by the number of devices",
    (TRAIN + "test_pmap_is_jit_without_state_across_examples",),
  ),
  Mutant(
    "step: the mean of the devices' means",
    "train/_step.py",
    "count = jax.lax.psum(count, axis_name)",
    "count = count * jax.lax.psum(1.0, axis_name)",
    "under pmap a share with few labels weighs as much as one with many",
    (TRAIN + "test_pmap_is_jit_without_state_across_examples",),
  ),
  Mutant(
    "step: statistics of one device",
    "train/_step.py",
    "return jax.lax.pmean(leaf, axis_name) if inexact else leaf",
    "return leaf",
    "under pmap the averages are of the first device's share",
    (TRAIN + "test_under_pmap_statistics_are_the_mean_of_the_shares",),
  ),
  Mutant(
    "step: a device counts for itself",
    "train/_step.py",
    "counts = jax.lax.psum(counts, self.axis_name)",
    "counts = counts",
    "accumulation under pmap takes steps that are too large",
    (TRAIN + "test_accumulation_keeps_the_rows_of_every_device_and_works_under_pmap",),
  ),
  Mutant(
    "step: the mean of the micro-batches' means",
    "train/_step.py",
    "      part = dataclasses.replace(part, counts=counts)\n",
    "",
    "a micro-batch with few labels weighs as much as one with many",
    (TRAIN + "test_accumulated_is_whole_in_float64",),
  ),
  Mutant(
    "step: micro-batches of neighbours",
    "train/_step.py",
    "jnp.moveaxis(leaf.reshape(size // count, count, *leaf.shape[1:]), 1, 0)",
    "leaf.reshape(count, size // count, *leaf.shape[1:])",
    "rows move between the devices",
    (TRAIN + "test_micro_batches_move_batchnorm_one_after_another",),
  ),
  Mutant(
    "step: the average starts a step late",
    "train/_step.py",
    "past = step.astype(jnp.float32)",
    "past = (step + 1).astype(jnp.float32)",
    "another decay than the one that is told",
    (TRAIN + "test_the_moving_average_is_by_hand",),
  ),
  Mutant(
    "step: a member's padding is not blanked",
    "train/_step.py",
    "**there, members=members))",
    "**there, members=outputs.members))",
    "one NaN in padding is in every member's gradient",
    (ONLINE + "test_padding_of_a_member_leaks_nowhere",),
  ),
  Mutant(
    "online: peers are not stopped",
    "recipes/online.py",
    "mine.logits, jax.lax.stop_gradient(peer.logits), temperature=temperature",
    "mine.logits, peer.logits, temperature=temperature",
    "each member is also moved towards what its pupils say",
    (ONLINE + "test_dml_by_hand_and_no_gradient_passes_a_peer",),
  ),
  Mutant(
    "online: a moving teacher is not saved",
    "train/_state.py",
    'teacher=items.get("teacher"),',
    'teacher=shapes.teacher and jax.tree.map(lambda leaf: leaf.copy(), items["student"]),',
    "a resumed student is taught by itself",
    (ONLINE + "test_a_run_with_a_moving_teacher_goes_on_with_the_same_bits",),
  ),
  Mutant(
    "dot: both momenta are the labels'",
    "train/optimizers.py",
    "second = jax.tree.map(moved(1), state.distilled, distilled, met)",
    "second = jax.tree.map(moved(-1), state.distilled, distilled, met)",
    "nothing is distillation-oriented",
    (DOT + "test_dot_by_hand",),
  ),
  # --- Data and resume. ---
  Mutant(
    "resume: a step too far",
    "train/_loop.py",
    "return from_items(items, shapes, objective), step\n",
    "return from_items(items, shapes, objective), step + 1\n",
    "a resumed run has one step less, on other batches",
    (TRAIN + "test_a_resumed_run_ends_with_the_same_bits",),
  ),
  Mutant(
    "resume: trains on from the average",
    "train/_state.py",
    'student = dict(items["trained" if "trained" in items else "student"])',
    # Copies: one buffer that is donated twice crashes, which is no test that fails.
    'student = dict(jax.tree.map(lambda leaf: leaf.copy(), items["student"]))',
    "a resumed run with an average is another run",
    (TRAIN + "test_a_run_with_an_average_resumes_with_the_same_bits",),
  ),
  Mutant(
    "resume: a stream goes on where it was",
    "data/_streams.py",
    "    if at != step:\n",
    "    if at < 0:\n",
    "a run that goes on from an earlier step sees other batches",
    ("data/test_data.py::test_resumes_at_any_step_in_any_chunks",),
  ),
  Mutant(
    "resume: one order for all epochs",
    "data/_sources.py",
    "rows_of(order(seed, n // steps), n % steps, batch, part)",
    "rows_of(order(seed, 0), n % steps, batch, part)",
    "every epoch shows the same batches",
    (
      "data/test_data.py::test_every_epoch_is_its_own_permutation",
      "data/test_data.py::test_both_kinds_of_source_give_the_same_bits",
    ),
  ),
  Mutant(
    "resume: processes share their rows",
    "data/_sources.py",
    "first = step * batch_size + process * mine",
    "first = step * batch_size",
    "all processes read the first one's share",
    ("data/test_sources.py::test_parts_are_the_batch",),
  ),
  Mutant(
    "data: views are all the first",
    "data/_sources.py",
    "view = epochs if views is None else epochs % views",
    "view = epochs if views is None else epochs * 0",
    "numbered views that never come",
    ("data/test_data.py::test_a_view_comes_back_when_its_turn_does",),
  ),
  Mutant(
    "data: the last part of a batch is dropped",
    "data/_batches.py",
    "count = -(-len(examples) // batch_size)",
    "count = len(examples) // batch_size",
    "metrics of most of the test set",
    ("data/test_data.py::test_evaluation_pads_the_last_batch_and_nothing_else",),
  ),
  Mutant(
    "data: padding is evaluated",
    "data/_batches.py",
    'weight=of_real(used.get("weight", np.ones(len(rows), np.float32))),',
    'weight=used.get("weight", np.ones(len(rows), np.float32)),',
    "the first example counts several times",
    ("data/test_data.py::test_evaluation_pads_the_last_batch_and_nothing_else",),
  ),
  # --- Selection. ---
  Mutant(
    "selection: the worst checkpoint",
    "runs/_checkpoints.py",
    "key=lambda s: (-scores[s], s))",
    "key=lambda s: (scores[s], s))",
    "the lowest accuracy is kept as the best",
    (CHECKPOINTS + "test_the_last_ones_and_the_best_are_kept",),
  ),
  Mutant(
    "selection: the last of equal checkpoints",
    "runs/_checkpoints.py",
    "key=lambda s: (-scores[s], s))",
    "key=lambda s: (-scores[s], -s))",
    "which of two equal steps is best depends on when it is asked",
    (CHECKPOINTS + "test_the_last_ones_and_the_best_are_kept",),
  ),
  Mutant(
    "selection: one checkpoint too few",
    "runs/_checkpoints.py",
    "[s for s in complete if s <= step][-self.keep_last :]",
    "[s for s in complete if s <= step][-self.keep_last + 1 :]",
    "a damaged last checkpoint has none before it",
    (CHECKPOINTS + "test_the_last_ones_and_the_best_are_kept",),
  ),
  Mutant(
    "selection: the highest loss",
    "search/_choice.py",
    "sign * row.metrics[metric] if measured",
    "row.metrics[metric] if measured",
    "a sweep by nll chooses its worst point",
    (SWEEP + "test_by_nll_the_lowest_is_chosen",),
  ),
  Mutant(
    "selection: the last of equal points",
    "search/_choice.py",
    "(float(np.mean(scores[i])), -i)",
    "(float(np.mean(scores[i])), i)",
    "of equal points another is chosen",
    (SWEEP + "test_ties_and_noise",),
  ),
  Mutant(
    "selection: an error over n",
    "search/_choice.py",
    "float(np.std(values, ddof=1)) / math.sqrt(count)",
    "float(np.std(values)) / math.sqrt(count)",
    "fewer ties than there are",
    (SWEEP + "test_ties_and_noise",),
  ),
  Mutant(
    "selection: what is not finite is chosen",
    "search/_choice.py",
    "return metric in row.metrics and bool(np.all(np.isfinite(row.metrics[metric])))",
    "return metric in row.metrics",
    "a sweep whose metric is NaN chooses its first point",
    (SWEEP + "test_nothing_is_chosen_by_what_is_not_finite",),
  ),
  Mutant(
    "selection: halving keeps too few",
    "search/_sweep.py",
    "finished[: math.ceil(points / halving.factor ** (rung + 1))]",
    "finished[: math.floor(points / halving.factor ** (rung + 1))]",
    "where points do not divide, one that should go on is dropped",
    (SWEEP + "test_halving_of_points_and_steps_that_do_not_divide",),
  ),
  Mutant(
    "selection: halving keeps the worst",
    "search/_sweep.py",
    "finished.sort(key=lambda i: (-float(np.mean(choice.score(found[i].row))), i))",
    "finished.sort(key=lambda i: (float(np.mean(choice.score(found[i].row))), i))",
    "the best points are dropped",
    (SWEEP + "test_halving_of_points_and_steps_that_do_not_divide",),
  ),
  Mutant(
    "selection: rungs end early",
    "search/_choice.py",
    "return math.ceil(steps / self.factor ** (self.rungs - 1 - rung))",
    "return math.floor(steps / self.factor ** (self.rungs - 1 - rung))",
    "points are judged after fewer steps than is told",
    (SWEEP + "test_halving_of_points_and_steps_that_do_not_divide",),
  ),
  # --- Metrics and calibration. ---
  Mutant(
    "calibration: bins closed on the left",
    "evaluation/metrics.py",
    "confidence[:, None] > EDGES[None, :]",
    "confidence[:, None] >= EDGES[None, :]",
    "another ECE than the published definition's",
    (METRICS + "test_bins_are_closed_on_the_right",),
  ),
  Mutant(
    "calibration: errors cancel",
    "evaluation/metrics.py",
    'np.abs(host["bin_correct"] - host["bin_confidence"]).sum(axis=-1)',
    'np.abs((host["bin_correct"] - host["bin_confidence"]).sum(axis=-1))',
    "too sure in one bin and too modest in another is calibrated",
    (METRICS + "test_metrics_are_their_definitions",),
  ),
  Mutant(
    "calibration: the mean of bins",
    "evaluation/metrics.py",
    'np.abs(host["bin_correct"] - host["bin_confidence"]).sum(axis=-1)',
    'np.abs(host["bin_correct"] - host["bin_confidence"]).mean(axis=-1) * host["examples"]',
    "an ECE that grows with the test set",
    (METRICS + "test_metrics_are_their_definitions",),
  ),
  Mutant(
    "metric: six in the top five",
    "evaluation/metrics.py",
    "(rank < min(5, classes))",
    "(rank <= min(5, classes))",
    "a top-5 accuracy that is too high",
    (METRICS + "test_metrics_are_their_definitions", METRICS + "test_ties_and_few_classes"),
  ),
  Mutant(
    "metric: the student's KL",
    "evaluation/metrics.py",
    "teacher_probs * (teacher_log - student_log))",
    "jnp.exp(student_log) * (student_log - teacher_log))",
    "fidelity the wrong way round",
    (METRICS + "test_fidelity_is_its_definition",),
  ),
  # --- Teachers and their caches. ---
  Mutant(
    "cache: one view for all",
    "teachers/_cache.py",
    "row = (batch.view % jnp.int32(views)) * jnp.int32(size) + batch.index",
    "row = batch.index",
    "every view is taught by what the teacher said of the first",
    (CACHED + "test_fifty_steps_equal_those_with_the_teacher_in_the_step",),
  ),
  Mutant(
    "cache: rows of a neighbour",
    "teachers/_cache.py",
    "row = (batch.view % jnp.int32(views)) * jnp.int32(size) + batch.index",
    "row = (batch.view % jnp.int32(views)) * jnp.int32(size) + batch.index + 1",
    "each example is taught what the teacher said of the next",
    (CACHED + "test_fifty_steps_equal_those_with_the_teacher_in_the_step",),
  ),
  Mutant(
    "cache: the next view",
    "teachers/_cache.py",
    "store.rows(index, view % store.count)",
    "store.rows(index, (view + 1) % store.count)",
    "on the host, an example is taught by another view of it",
    (CACHED + "test_wherever_rows_lie_they_are_the_same",),
  ),
  Mutant(
    "cache: float16 reaches the loss",
    "teachers/_cache.py",
    "value.astype(jnp.float32) if widen and value.dtype == jnp.float16 else value",
    "value",
    "soft targets in half precision",
    (CACHED + "test_float16_is_rounded_and_comes_back_as_float32",),
  ),
  Mutant(
    "cache: rows in another order",
    "teachers/_cache_files.py",
    "if not record.startswith(start) or len(record)",
    "if len(record)",
    "a cache of a data set that was sorted otherwise teaches each example another",
    ("teachers/test_cache.py::test_rows_of_other_examples_are_noticed",),
  ),
  Mutant(
    "teacher: members are tempered before they are combined",
    "teachers/_frozen.py",
    "return jax.nn.logsumexp(log_probability, axis=0, b=column)",
    "return jax.nn.logsumexp(log_probability, axis=0)",
    "an ensemble's weights are ignored",
    ("teachers/test_teachers.py::test_rules_are_their_formulas",),
  ),
  Mutant(
    "chunks: the last one's positions count twice",
    "train/_in_chunks.py",
    "jnp.where(fresh[None], where, jnp.zeros_like(where))",
    "jnp.broadcast_to(where, shape)",
    "positions that were in the chunk before weigh double",
    (CHUNKS + "test_examples_that_a_teacher_skipped_count_for_the_labels_alone",),
  ),
  Mutant(
    "chunks: logits of all students at once",
    "train/_in_chunks.py",
    "jax.custom_batching.sequential_vmap(function)",
    "function",
    "a sweep of twelve needs twelve times the memory",
    (CHUNKS + "test_students_side_by_side_have_one_students_logits_at_a_time",),
  ),
  Mutant(
    "chunks: the last positions that count are left out",
    "_chunks.py",
    "(most + self.size - 1) // self.size",
    "most // self.size",
    "tokens are in no loss",
    (CHUNKS + "test_what_nothing_counts_is_not_computed",),
  ),
  Mutant(
    "chunks: gradients overwrite each other",
    "_chunks.py",
    "there + part",
    "part",
    "positions that two chunks share keep the gradient of the later one, which is 0",
    (CHUNKS + "test_the_loss_in_chunks_and_all_its_gradients",),
  ),
  Mutant(
    "sharding: what is whole stays whole",
    "train/_sharding.py",
    "    if not at.is_fully_replicated or at.is_equivalent_to(sharding, np.ndim(leaf)):",
    "    if at is not None:",
    "a teacher that lies on every device of the mesh is not cut by its rules",
    (SHARDING + "test_a_teacher_in_parts_is_moved_once_and_kept_in_its_dtype",),
  ),
  Mutant(
    "sharding: the smallest axis",
    "train/_sharding.py",
    "max(sizes)[1]",
    "min(sizes)[1]",
    "FSDP cuts a bias-sized axis of each kernel",
    (SHARDING + "test_fsdp_cuts_the_largest_axis_that_divides",),
  ),
  Mutant(
    "shared teacher: though answers depend on the batch",
    "train/_shared_teacher.py",
    "if not fill.alone():",
    "if False:",
    "a teacher that relates examples is asked about other batches than the student sees",
    (TWICE + "test_a_teacher_whose_answers_depend_on_the_batch_is_run_in_every_step",),
  ),
  Mutant(
    "shared teacher: for a few steps",
    "train/_shared_teacher.py",
    "or passes < source.whole.size",
    "or False",
    "a short run waits until the teacher has seen all examples",
    (TWICE + "test_a_run_shorter_than_the_examples_asks_of_those_it_sees_alone",),
  ),
  Mutant(
    "tokens: weights are not shifted",
    "data/_tokens.py",
    "return tokens[:, :-1], tokens[:, 1:], known[:, 1:]",
    "return tokens[:, :-1], tokens[:, 1:], known[:, :-1]",
    "the last token of a prompt is learnt and the answer's last is not",
    (TOKENS + "test_the_shift_by_hand",),
  ),
  Mutant(
    "tokens: a packed document's weights are those of what is read",
    "data/_tokens.py",
    "piece[:-1], piece[1:], known[1:]",
    "piece[:-1], piece[1:], known[:-1]",
    "packed answers lose their first token",
    (TOKENS + "test_prompts_are_read_and_not_learnt",),
  ),
  Mutant(
    "study: nothing is pruned",
    "search/_study.py",
    "pruned = not last and bool(trial.should_prune())",
    "pruned = False",
    "hopeless trials are trained to their end",
    (STUDY + "test_the_pruner_masks_a_trial",),
  ),
  Mutant(
    "study: a finished one trains its best student again",
    "search/_study.py",
    'self.found[trial.number] = self.search.kept(0, row["chunk"], row["place"])',
    "pass",
    "a study that is looked at again costs a training",
    (STUDY + "test_a_finished_study_is_given_back",),
  ),
  Mutant(
    "sweep: a point's schedule is passed over",
    "search/_grid.py",
    "made = as_objective(made, **own)",
    "pass",
    "a point of the table was trained with the objective's default",
    (SWEEP + "test_what_is_no_number_reaches_the_objective",),
  ),
  Mutant(
    "teacher: one that draws its answers is cached",
    "teachers/_cache.py",
    "if one.shape != other.shape or not _off(other, one) <= _ROUNDING:",
    "if one.shape != other.shape:",
    "a cache keeps one answer of many by chance",
    ("teachers/test_foreign.py::test_one_that_draws_its_answers_is_refused",),
  ),
  Mutant(
    "evaluation: NaN of a task counts as measured",
    "evaluation/_evaluate.py",
    "if not unknown or not self._finite():",
    "if True:",
    "a number that nobody measured stands in a report",
    ("test_bad_input.py::test_a_number_that_a_task_makes_nan_was_not_measured",),
  ),
  Mutant(
    "export: NaN is deployed",
    "runs/_trees.py",
    'raise ValueError(f"{where} holds NaN; take a checkpoint from before the run went wrong.")',
    "pass",
    "a network that puts out NaN is saved, exported and started from",
    ("test_bad_input.py::test_files_and_folders_refuse",),
  ),
  Mutant(
    "teacher: classes in their own order",
    "teachers/_frozen.py",
    "jnp.take(logits, chosen, axis=-1)",
    "jnp.take(logits, np.sort(chosen), axis=-1)",
    "a narrowed teacher's classes are not the student's",
    ("teachers/test_teachers.py::test_a_subset_keeps_the_order_that_it_was_given",),
  ),
  # --- What is refused before long work. ---
  Mutant(
    "step: labels that nobody may use",
    "train/_program.py",
    "raise nothing_counts(source.name)",
    "return",
    "a run is compiled, and ends after its first chunk",
    (TRAIN + "test_labels_that_nobody_may_use_are_said_before_the_first_step",),
  ),
  Mutant(
    "step: nothing counts and nobody says it",
    "train/_loop.py",
    "if not self._counted and end >= min(self._epoch, self._steps):",
    "if False:",
    "a stream whose weights are all 0 trains nothing",
    (TRAIN + "test_an_epoch_in_which_nothing_counted_is_said_once",),
  ),
  Mutant(
    "selection: a point's numbers are not looked at",
    "types.py",
    "if made.check is not None:",
    "if False:",
    "a student of a negative weight climbs, and may be chosen",
    (SWEEP + "test_errors_say_what_to_do",),
  ),
  Mutant(
    "selection: a point's rate is not looked at",
    "search/_grid.py",
    "_check_rates(optimizer, {n: value for n, value in point.items() if n not in mine})",
    "_check_rates(optimizer, {})",
    "a student of a rate of 0 is trained, and moves nowhere",
    (SWEEP + "test_errors_say_what_to_do",),
  ),
  Mutant(
    "resume: a folder of another kind",
    "runs/_folder.py",
    "other = other_kind(place, kind)",
    "other = None",
    "a run is written into a teacher's cache",
    ("test_bad_input.py::test_a_folder_is_of_one_kind",),
  ),
  Mutant(
    "checkpoint: variables over something else that has a manifest",
    "runs/_checkpoints.py",
    'check_place(path, "saved variables", name="path")',
    "pass",
    "a teacher's cache is removed for the variables",
    ("test_bad_input.py::test_a_folder_is_of_one_kind",),
  ),
  Mutant(
    "step: an objective without a gradient",
    "train/_step.py",
    "_check_reached(each, trained)",
    "pass",
    "a student of comparisons alone is trained, and stays as it was begun",
    ("test_bad_input.py::test_fit_refuses_before_it_claims_a_folder",),
  ),
  Mutant(
    "metrics: a teacher of one target beside a student of three",
    "evaluation/tasks.py",
    "fits = self.fits or (_same_logits if self.classes else None)",
    "fits = None",
    "its one number is broadcast, and a distance to it is measured",
    ("evaluation/test_tasks.py::test_a_teacher_of_another_shape_is_refused_by_both",),
  ),
]


def run(mutant: Mutant, *, cache: str, timeout: float) -> tuple[str, str]:
  """What became of a mutant, ``"killed"``, ``"alive"`` or ``"broken"``; and what pytest said."""
  with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
    copy = pathlib.Path(folder) / "jaxdistill"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "shared")
    shutil.copytree(ROOT, copy, ignore=ignored, symlinks=True)
    path = copy / "jaxdistill" / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
      return "broken", f"{mutant.file} has its snippet {text.count(mutant.old)} times, not once."
    path.write_text(text.replace(mutant.old, mutant.new))
    # One cache of compiled programs for all: a mutant changes few of them.
    environment = os.environ | {
      "JAX_COMPILATION_CACHE_DIR": cache,
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05",
      "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
      "PYTHONPATH": str(copy),
      "PYTHONDONTWRITEBYTECODE": "1",
    }
    tests = [f"tests/{test}" for test in mutant.tests]
    command = [sys.executable, "-m", "pytest", "-x", "-n0", "-p", "no:cacheprovider", *tests]
    try:
      done = subprocess.run(
        command, cwd=copy, env=environment, capture_output=True, text=True, timeout=timeout
      )
    except subprocess.TimeoutExpired:
      return "killed", f"no end after {timeout:g} s"
  # Nothing collected, or a module that cannot be imported, says nothing of the tests.
  failed = done.returncode == 1 and re.search("^(FAILED|ERROR) tests/", done.stdout, re.MULTILINE)
  fate = "killed" if failed else "alive" if done.returncode == 0 else "broken"
  return fate, done.stdout[-3000:] + done.stderr[-1000:]


def main() -> int:
  """Runs the mutants; 1 where one is alive or broken."""
  parser = argparse.ArgumentParser(description="Runs mutants of the core against their tests.")
  parser.add_argument("--only", default="", help="mutants whose name has this text")
  parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
  parser.add_argument("--timeout", type=float, default=900, help="seconds for a mutant's tests")
  parser.add_argument("--list", action="store_true", help="only name them")
  options = parser.parse_args()
  chosen = [mutant for mutant in MUTANTS if options.only in mutant.name]
  if not chosen:
    parser.error(f"--only {options.only!r} names no mutant; --list has them all.")
  if options.list:
    for mutant in chosen:
      print(f"{mutant.name}: {mutant.means} ({mutant.file})")
    return 0

  def timed(mutant: Mutant) -> tuple[Mutant, str, str, float]:
    begun = time.monotonic()
    fate, said = run(mutant, cache=cache, timeout=options.timeout)
    return mutant, fate, said, time.monotonic() - begun

  left = []
  with (
    tempfile.TemporaryDirectory(prefix="compiled-") as cache,
    concurrent.futures.ThreadPoolExecutor(options.jobs) as pool,
  ):
    for mutant, fate, said, seconds in pool.map(timed, chosen):
      print(f"{fate:7} {seconds:5.0f} s  {mutant.name}", flush=True)
      if fate != "killed":
        left.append(mutant)
        print(f"  {mutant.means}\n  {' '.join(mutant.tests)}\n{said}", flush=True)
  print(f"{len(chosen) - len(left)} of {len(chosen)} mutants were killed.")
  return 1 if left else 0


if __name__ == "__main__":
  sys.exit(main())
