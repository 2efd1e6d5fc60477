"""What is on disk: a run's folder, verified checkpoints, digests, and the one atomic write.

A run is a folder: ``config.json``, ``metrics.jsonl``, ``checkpoints/``. Files are verified, not
believed: what is published has a manifest of sizes and SHA-256, written last.
"""

from typing import TYPE_CHECKING

from jaxdistill._door import lazy

if TYPE_CHECKING:  # what `lazy` imports when it is asked for
  from jaxdistill.runs._checkpoints import (
    Checkpoints,
    CheckpointWarning,
    load_variables,
    save_variables,
    wait_for_saves,
  )
  from jaxdistill.runs._compiled import keep_compiled
  from jaxdistill.runs._files import (
    WRITING,
    altered,
    digest,
    entry,
    parse_json,
    read_digested,
    read_json,
    read_npz,
    read_object,
    read_text,
    replacing,
    sha256,
    size_and_digest,
    user_cache,
    within,
    write_digested,
    write_npz,
    write_text,
    writes,
  )
  from jaxdistill.runs._fingerprints import fingerprint, short_digest, tree_identity
  from jaxdistill.runs._folder import (
    Metrics,
    check_config,
    check_place,
    claim,
    command,
    commands,
    differing,
    environment,
    hold,
    other_kind,
    read_config,
    read_metrics,
    release,
    restore_config,
    to_json,
    write_json,
  )
  from jaxdistill.runs._manifest import (
    MANIFEST,
    CheckpointError,
    clear_unfinished,
    first_few,
    listing,
    locate,
    publish,
    verify,
  )
  from jaxdistill.runs._orbax import find_collections, nested_dicts, read_foreign_orbax
  from jaxdistill.runs._progress import Progress, progress_bar, say_saved
  from jaxdistill.runs._shards import Together
  from jaxdistill.runs._traced import Traced, traced
  from jaxdistill.runs._trackers import (
    CSV,
    MLflow,
    TensorBoard,
    Tracked,
    Tracker,
    TrackerWarning,
    Wandb,
    check_trackers,
    track,
  )
  from jaxdistill.runs._trees import (
    check_nan,
    from_outline,
    holding,
    is_key,
    lies_in_parts,
    named_leaves,
    outline,
  )

__all__ = [
  "CSV",  # a tracker: a table of all lines, ``metrics.csv`` in the run's folder
  "MANIFEST",  # the name of a manifest's file
  "WRITING",  # how a file or folder is called until it is whole
  "CheckpointError",  # a checkpoint is damaged or half written, or could not be saved
  "CheckpointWarning",  # a checkpoint was skipped, because it is damaged or half written
  "Checkpoints",  # a folder of checkpoints by step: saved asynchronously, verified before use
  "MLflow",  # a tracker: runs of an MLflow experiment, on a server or in a database
  "Metrics",  # appends to ``metrics.jsonl``, each step once
  "Progress",  # how far something is; `progress_bar` makes it
  "TensorBoard",  # a tracker: TensorBoard's event files in the run's folder
  "Together",  # the processes that write one folder: what one could not do, all hear of
  "Traced",  # what a traced function computes: a digest, and its operations in words
  "Tracked",  # a run's trackers together; one that fails costs no run
  "Tracker",  # what a run tells of itself, and to whom: `start`, `log` and `finish` on any object
  "TrackerWarning",  # a tracker failed; the run goes on
  "Wandb",  # a tracker: runs of a Weights & Biases project
  "altered",  # how a file differs from what a manifest says of it, in words
  "check_config",  # what defines a run, as its folder keeps it
  "check_nan",  # raises where variables hold NaN
  "check_place",  # raises where a folder is another kind's, or none can be made
  "check_trackers",  # trackers, and a folder for those that write into the run's
  "claim",  # makes a run's folder, or goes on in one that holds the same configuration
  "clear_unfinished",  # finishes or removes what a killed process left behind
  "command",  # the command that repeats a run
  "commands",  # the two commands of a report: the one that repeats the run
  "differing",  # in which settings two configurations differ, in words
  "digest",  # the digest of a manifest's own content
  "entry",  # what an object of JSON has under a name, if it is of a kind
  "environment",  # hardware and versions that the numbers were produced with
  "find_collections",  # finds where collections lie in a tree that somebody else laid out
  "fingerprint",  # a digest of a pytree's paths, shapes, dtypes and values
  "first_few",  # the first few names
  "from_outline",  # the tree again, from its outline and its leaves by path
  "hold",  # holds a run's folder for this process: of two jobs in one, the second is refused
  "holding",  # which of several trees hold NaN, or numbers that are not finite
  "is_key",  # whether a leaf, or its shape, is of typed random keys
  "keep_compiled",  # keeps what XLA compiles on disk: JAX's persistent compilation cache
  "lies_in_parts",  # whether an array of a tree is cut, or lies on other processes' devices
  "listing",  # what is in a folder; nothing if there is none
  "load_variables",  # loads what `save_variables` saved, after verifying it
  "locate",  # the folder; or the complete one that a killed process had no time to rename
  "named_leaves",  # the leaves by their path, ``params/Dense_0/kernel``
  "nested_dicts",  # nested dictionaries from leaves by path
  "other_kind",  # what else than a run, or another kind of ours, a folder holds
  "outline",  # the containers as JSON, so that a tree comes back without ``like``
  "parse_json",  # what JSON says that anybody may have written
  "progress_bar",  # a bar in a terminal or a notebook; elsewhere a line every few seconds
  "publish",  # writes the manifest of the folder being written for ``target``
  "read_config",  # reads a run's configuration
  "read_digested",  # reads a manifest that has its own digest in it
  "read_foreign_orbax",  # reads collections from a checkpoint that somebody else's program wrote
  "read_json",  # what a file of JSON says that anybody may have written
  "read_metrics",  # reads the lines of a run's ``metrics.jsonl``, and counts the torn ones
  "read_npz",  # the arrays of an archive that anybody may have written
  "read_object",  # what a file of JSON says that holds an object
  "read_text",  # the text of a file that anybody may have written
  "release",  # gives back a folder whose run failed before its first checkpoint
  "replacing",  # a path to write to, which then takes the place of the file
  "restore_config",  # reads a run's configuration back into the dataclass that it was written from
  "save_variables",  # saves one pytree, such as a teacher's or a deployed student's variables
  "say_saved",  # says, beside the progress, where something was saved
  "sha256",  # the SHA-256 of a file
  "short_digest",  # 16 hexadecimal digits of what JSON holds
  "size_and_digest",  # what a manifest says of a file
  "to_json",  # turns arrays, paths and numbers that JSON does not know into ones that it does
  "traced",  # lists what a traced function computes
  "track",  # adds numbers and files to a run's trackers after its end, such as a report
  "tree_identity",  # paths, shapes, dtypes and checksum of a tree of variables
  "user_cache",  # the user's folder for what can be made anew
  "verify",  # compares the files with the manifest; the digests only of these items
  "wait_for_saves",  # waits for the saves under way, of a process that is about to be left
  "within",  # the path of a file that another file names, if it lies in that file's folder
  "write_digested",  # writes a manifest with its own digest in it
  "write_json",  # writes JSON so that the file is never seen half written
  "write_npz",  # writes arrays as `read_npz` reads them, compressed where that is believed
  "write_text",  # writes a text so that the file is never seen half written
  "writes",  # says in one sentence that something cannot be written, whichever library notices it
]

__getattr__, __dir__ = lazy(__name__)
