"""The pure step, its state, where it is compiled, the loop, and `fit`, which is all of them.

`optimizers` are those of published recipes.
"""

from typing import TYPE_CHECKING

from jaxdistill._door import lazy

if TYPE_CHECKING:  # what `lazy` imports when it is asked for
  from jaxdistill.train import optimizers as optimizers
  from jaxdistill.train._fit import (
    Fitted,
    Run,
    Watch,
    check_run,
    fit,
  )
  from jaxdistill.train._generations import born_again
  from jaxdistill.train._identity import describe, described_data, described_student, traced
  from jaxdistill.train._in_chunks import in_chunks
  from jaxdistill.train._loop import (
    Intervals,
    Log,
    claimed_folder,
    run_steps,
    start_or_resume,
  )
  from jaxdistill.train._memory import Memory, memory
  from jaxdistill.train._mesh import (
    AXIS,
    Dispatch,
    data_parallel,
    mesh,
    with_jit,
    with_pmap,
    with_students,
  )
  from jaxdistill.train._optax import TermsApart, Transformation, is_optimizer
  from jaxdistill.train._plan import (
    Optimizer,
    Plan,
    check_hyper,
    check_student,
    check_teacher,
  )
  from jaxdistill.train._processes import distributed
  from jaxdistill.train._program import Program, Values
  from jaxdistill.train._sharding import Rule, Rules, Variable, annotated, fsdp, shardings
  from jaxdistill.train._shared_teacher import share_teacher
  from jaxdistill.train._side_by_side import (
    UNROLLED,
    at_once,
    example_key,
    inputs_of,
    students_by,
  )
  from jaxdistill.train._state import State, deployed_variables, init_state
  from jaxdistill.train._step import make_step, reduce_terms
  from jaxdistill.train._stops import Stopped, concurrently, stop_signal, stopped, time_limit

__all__ = [
  "AXIS",  # the name of the mesh's axis over which batches are split
  "UNROLLED",  # how many students one after another one program has at most
  "Dispatch",  # how a chunk of steps is compiled, and how its arguments get to the devices
  "Fitted",  # what `fit` returns
  "Intervals",  # at which steps the loop stops to log, to validate, to save
  "Log",  # turns a chunk's sums into a line of the log
  "Memory",  # what a train step needs on one device, in bytes
  "Optimizer",  # an optax optimiser, or a function of hyper-parameters that makes one
  "Plan",  # what is trained, from what, by what: the arguments that `fit` and its like share
  "Program",  # what a run calls: put together and checked abstractly, compiled once
  "Rule",  # along which axes of the mesh an array is cut, or a function that says so
  "Rules",  # rules by path, or one for all
  "Run",  # where a run, a sweep or a search is saved, and what it says on its way
  "State",  # everything that a training run changes; the teacher is not in it
  "Stopped",  # a run was asked to stop (SIGTERM, Ctrl-C, its time is up): it has saved
  "TermsApart",  # in an optimiser's state: it wants some terms' gradients by themselves
  "Transformation",  # one optimiser, as optax has them
  "Values",  # what differs between the students of one program
  "Variable",  # what a rule is told of an array: path, shape, dtype, names of axes
  "Watch",  # what `fit` looks at on its way, and which checkpoints it keeps by that
  "annotated",  # a rule that goes by the names that a module gives the axes of its variables
  "at_once",  # how many students a CPU trains best side by side
  "born_again",  # born-again networks (BAN): generations, each taught by the one before
  "check_hyper",  # the objective's keywords: complete, with finite numbers
  "check_run",  # a `Run`, of a folder's path too
  "check_student",  # the network, and the variables that it starts from where a model is given
  "check_teacher",  # a teacher whose variables are arrays without NaN
  "claimed_folder",  # the run's folder
  "concurrently",  # trains in a thread what the next trainings need nothing of
  "data_parallel",  # a one-axis mesh, named `AXIS`, over which batches are split
  "deployed_variables",  # the variables that are evaluated and deployed
  "describe",  # what a run's folder says of it, beside what is computed
  "described_data",  # the data, as ``config.json`` holds them
  "described_student",  # the student, as ``config.json`` holds it
  "distributed",  # makes this process one of several, found by JAX or told
  "example_key",  # a random key's shape, to trace with
  "fit",  # trains a student, or the same student from several seeds as one compiled program
  "fsdp",  # fully sharded data parallelism: a rule that cuts each array along its largest axis
  "in_chunks",  # an objective in chunks of tokens, without arrays [tokens, vocabulary]
  "init_state",  # initialises a training state; pure, so it can be jitted and vmapped over keys
  "inputs_of",  # the shapes of a batch's inputs, as the networks see them
  "is_optimizer",  # whether it has ``init`` and ``update``, as optax's have
  "make_step",  # builds the pure train step
  "memory",  # what a train step needs on a device, asked of the compiler before there is anything
  "mesh",  # a mesh of several axes: `AXIS`, and others for the networks
  "optimizers",  # optimisers as published recipes run them
  "reduce_terms",  # reduces an objective's terms to the loss, and to sums for the log
  "run_steps",  # runs a program from a step to the last one
  "shardings",  # where variables lie by rules: what ``jax.device_put`` takes
  "share_teacher",  # the sources with the teacher's outputs on them
  "start_or_resume",  # the state to go on from, and its step
  "stop_signal",  # gives ``step -> the signal to stop by``, 0 for none
  "stopped",  # what a run is left by that a signal has stopped
  "students_by",  # the rule for how several students of one network are trained in one program
  "time_limit",  # ends what a script trains after so many seconds, as SIGTERM would: saved
  "traced",  # what is computed: the beginning, a step, and the optimiser's part of it
  "with_jit",  # compiles by `jax.jit` over a mesh, networks whole or in parts. The way to train
  "with_pmap",  # compiles by `jax.pmap`, sums through ``psum`` over the axis `AXIS`
  "with_students",  # compiles by `jax.jit` with the students of a sweep shared out over the devices
]

__getattr__, __dir__ = lazy(__name__)
