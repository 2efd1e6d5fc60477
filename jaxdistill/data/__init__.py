"""Examples to batches: sources, their order and views, streams, transforms, TFDS.

Examples (`load`, `from_arrays`, `from_dicts`) become a source of training batches (`on_device`,
`streamed`, `iterated`, `mixed`) or `evaluation_batches`; an `Augmentation` says what a batch shows
of an example, and a transform mixes a whole batch.
"""

from typing import TYPE_CHECKING

from jaxdistill._door import lazy

if TYPE_CHECKING:  # what `lazy` imports when it is asked for
  from jaxdistill.data import tokenizers as tokenizers
  from jaxdistill.data import transforms as transforms
  from jaxdistill.data._batches import Batches, evaluation_batches, made_ahead
  from jaxdistill.data._examples import (
    Examples,
    Fields,
    Records,
    from_arrays,
    from_dicts,
    from_sequence,
    some_labels,
  )
  from jaxdistill.data._on_host import (
    OnHost,
    central_crop,
    colour_jitter,
    random_resized_crop,
  )
  from jaxdistill.data._sources import (
    Part,
    Source,
    mixed,
    on_device,
    transformed,
  )
  from jaxdistill.data._streams import iterated, record_files, streamed
  from jaxdistill.data._strong import rand_augment
  from jaxdistill.data._tfds import Digits, load, records, splits
  from jaxdistill.data._tokens import Packed, from_text, pack, shifted
  from jaxdistill.data._views import (
    CIFAR,
    DIGITS,
    Augmentation,
    Normalize,
    augment,
    choice,
    crop,
    crop_flip,
    divide_by,
    epoch_order,
    identity,
    normalizer,
    two_views,
  )

__all__ = [
  "CIFAR",  # mean and standard deviation of CIFAR's channels
  "DIGITS",  # the largest value of the handwritten digits
  "Augmentation",  # what may happen to an input before it is normalised
  "Batches",  # the batches of a split, made one by one: of more than the device holds
  "Digits",  # handwritten digits that come with scikit-learn, as a TFDS set: no download
  "Examples",  # a split in memory, as stored: not normalised, not augmented
  "Fields",  # what of a row is the input and what is the label, where rows are dicts
  "Normalize",  # what `normalize` may be: a function, (mean, std), or None
  "OnHost",  # a step of what happens to a picture when it is read
  "Packed",  # documents side by side in rows of one length
  "Part",  # which share of a batch a process reads: (its number, of how many)
  "Records",  # random access to dicts of features
  "Source",  # where training batches come from, from the first step to the last
  "augment",  # augments a batch: each example by the choice, or the key, of this view of it
  "central_crop",  # what a network is tested on: the middle of a picture, resized
  "choice",  # which of finitely many augmentations a view of an example shows
  "colour_jitter",  # brightness, contrast and saturation changed at random, on the host
  "crop",  # random crops of a padded image, all numbered: shifts by up to ``padding`` pixels
  "crop_flip",  # random crops and their mirror images, all numbered: what CIFAR is trained with
  "divide_by",  # a normalisation that casts to float32 and divides
  "epoch_order",  # the order in which an epoch shows the examples: a permutation of ``0 .. size-1``
  "evaluation_batches",  # all examples in batches in their own order, on the device or streamed
  "from_arrays",  # makes `Examples` of a user's own arrays
  "from_dicts",  # reads rows that are dicts into memory: all of them, once
  "from_sequence",  # opens rows that can be asked for by number
  "from_text",  # text as examples of packed tokens
  "identity",  # the augmentation that shows every example as it is
  "iterated",  # batches of a stream that can only be iterated, in the stream's own order
  "load",  # reads a whole TFDS split into memory, without TensorFlow
  "made_ahead",  # what a function makes of some numbers, in their order, a few of them ahead
  "mixed",  # mixes unlabelled transfer data into every batch, at a fixed share of it
  "normalizer",  # the function that a ``normalize`` argument stands for
  "on_device",  # keeps all examples on the device; an item is a row of indices
  "pack",  # lays documents side by side into rows, each prediction exactly once
  "rand_augment",  # strong augmentation: a few of fourteen operations, and a grey square
  "random_resized_crop",  # a random rectangle of a picture, resized and mirrored, on the host
  "record_files",  # random access to the records of ArrayRecord files, one after another
  "records",  # opens a TFDS split for random access; nothing is decoded yet
  "shifted",  # windows of a text as what is read, what is predicted, and what of it counts
  "some_labels",  # chooses which labels may be used: a share of them, the classes in proportion
  "splits",  # which parts of a TFDS set are train, validation and test: split strings for `load`
  "streamed",  # reads batches through Grain; an item carries the rows themselves
  "tokenizers",  # bytes, characters, byte-pair encodings; how many bytes each token stands for
  "transformed",  # a source with a transform of whole batches: mixup, label smoothing
  "transforms",  # transforms of a batch, ``(key, Batch) -> Batch``, that both networks then see
  "two_views",  # two looks at every example in a batch: weakly augmented, and strongly
]

__getattr__, __dir__ = lazy(__name__)
