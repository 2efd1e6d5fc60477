"""Teachers: frozen, of other programs, combined, narrowed to some classes, cached.

A teacher is made here and nowhere else; what is made of teachers is a teacher again.
"""

from typing import TYPE_CHECKING

from jaxdistill._door import lazy

if TYPE_CHECKING:  # what `lazy` imports when it is asked for
  from jaxdistill.teachers._cache import (
    Filled,
    Filler,
    cached,
    check_source,
    compare_cache,
    fill,
    with_outputs,
  )
  from jaxdistill.teachers._cache_files import CacheError, verify_cache
  from jaxdistill.teachers._foreign import foreign
  from jaxdistill.teachers._frozen import (
    RULES,
    answered,
    asked_on_host,
    brought,
    check_tokenizer,
    combine_logits,
    ensemble,
    frozen,
    grouped,
    layers,
    members_of,
    networks_of,
    restore,
    subset,
    tokenizer_of,
    vocabulary,
    with_networks,
  )
  from jaxdistill.teachers._moving import decay_of, moving_average
  from jaxdistill.teachers.cache_writer import write

__all__ = [
  "RULES",  # how an ensemble may combine its members' logits
  "CacheError",  # a cache is damaged, or half written
  "Filled",  # what one process has filled of a cache
  "Filler",  # runs the teacher over every example of a view
  "answered",  # a teacher that can be compiled, for one batch
  "asked_on_host",  # whether a teacher is another program's
  "brought",  # a teacher whose outputs come along with the batches
  "cached",  # a source whose batches bring the teacher's outputs along
  "check_source",  # whether a teacher's outputs can be kept beside a source's examples
  "check_tokenizer",  # a teacher reads the tokens that it was trained on, or it is an error
  "combine_logits",  # combines the members' logits into one teacher's, at temperature 1
  "compare_cache",  # computes a sample of a cache again
  "decay_of",  # of a teacher that is a moving average of its student
  "ensemble",  # any number of models, of any architectures, as one teacher
  "fill",  # fills a cache, or this process' part of it: any number of them need not talk
  "foreign",  # a Python function of arrays on the host as a teacher, of any program
  "frozen",  # a model as a teacher: evaluated in inference mode, gradients stopped
  "grouped",  # a teacher of fine classes as one of coarse classes, combined at temperature 1
  "layers",  # a teacher's layers as a student's beginning
  "members_of",  # the networks that a teacher is made of, as far as they are known
  "moving_average",  # a teacher that is a moving average of its student: mean teacher
  "networks_of",  # those networks, and where in the teacher's variables each one's begin
  "restore",  # the deployed network of a run folder of ours, with its variables
  "subset",  # a teacher narrowed to some of its classes, and renormalised over them
  "tokenizer_of",  # the digest of the tokenizer whose tokens a teacher reads
  "verify_cache",  # checks every digest, count and id of a cache
  "vocabulary",  # a language model's teacher with a vocabulary padded to another size
  "with_networks",  # a teacher whose networks are others, of the same variables
  "with_outputs",  # a source whose batches take their rows out of arrays of the program
  "write",  # a cache written with NumPy alone: `cache_writer`, a file to copy into other programs
]

__getattr__, __dir__ = lazy(__name__)
