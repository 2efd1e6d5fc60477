"""Several networks that are trained in the same step, as one: students that teach each other.

A cohort is a network like any other, so it is trained, swept, saved and gone on with as one. What
its members share is the batch: each has its parameters, its statistics and its dropout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax

from jaxdistill import _check
from jaxdistill.types import Model, Network, Outputs, compute_dtype

__all__ = ["cohort", "members"]

PyTree = Any


def cohort(
  networks: Mapping[str, Network], *, lead: str | None = None, name: str | None = None
) -> Network:
  """Several networks as one, which are trained side by side, each to be deployed by itself.

  ``Outputs.members`` has what each of them puts out: what `recipes.dml` compares, and what
  `recipes.each` gives any objective to. `members` takes the trained model apart again.

  Args:
    networks: two or more by name, of any architectures.
    lead: the member whose logits are the cohort's own. By these go the log's accuracy, validation,
      a sweep's choice, and the program that a run leaves in its folder. None for the mean of all
      members' logits: their ensemble.
    name: for messages and reports; made of the members' names by default.

  Returns:
    The network. Its variables are ``{collection: {member: ...}}``, and its features
    ``"<member>/<feature>"``.

  Raises:
    TypeError: a member is no network.
    ValueError: there are fewer than two, or none is called ``lead``; and when it runs, the members'
      logits have no mean, since their shapes differ.

  >>> import flax.linen as nn
  >>> from jaxdistill.networks import linen
  >>> both = cohort({"wide": linen(nn.Dense(3)), "deep": linen(nn.Sequential([nn.Dense(3)] * 2))})
  >>> variables = both.init(jax.random.key(0), jax.numpy.ones((2, 3)))
  >>> sorted(variables["params"])
  ['deep', 'wide']
  >>> outputs, _ = both.apply(variables, jax.numpy.ones((2, 3)), train=False, key=None)
  >>> outputs.logits.shape, sorted(outputs.members)
  ((2, 3), ['deep', 'wide'])
  """
  if not isinstance(networks, Mapping) or len(networks) < 2:
    raise ValueError(
      f'networks={_check.show(networks)} must be two or more by name: {{"small": networks.linen('
      '...), "smaller": networks.linen(...)}.'
    )
  for member, network in networks.items():
    # A term's name, and a path in a checkpoint, are made of it.
    if not isinstance(member, str) or not member or "/" in member:
      raise ValueError(f"networks has the name {member!r}; take a word without a slash.")
    if not isinstance(network, Network):
      raise TypeError(
        f"networks[{member!r}]={_check.show(network)} must be a Network: networks.linen(module)."
      )
  if lead is not None and lead not in networks:
    raise ValueError(f"lead={lead!r} is no member; there are {sorted(networks)}.")
  made = _Cohort(tuple(networks.items()), lead, name or f"cohort of {', '.join(networks)}")
  return made.network()


def members(model: Model) -> dict[str, Model]:
  """The members of a trained cohort, each a model by itself.

  Args:
    model: a model of a `cohort`, as `jaxdistill.fit` returns it.

  Returns:
    ``{name: model}``, over as many seeds. Their variables are the cohort's, no copies.

  Raises:
    TypeError: its network is no cohort.
  """
  network = model.network if isinstance(model, Model) else None
  if network is None or not isinstance(network.apply, _Cohort):
    raise TypeError(f"model={_check.show(model)} must be the model of a networks.cohort(...).")
  return {
    member: Model(one, _of(model.variables, member), model.seeds)
    for member, one in network.apply.members
  }


@dataclasses.dataclass(frozen=True)
class _Cohort:
  """The apply function of a cohort."""

  members: tuple[tuple[str, Network], ...]
  lead: str | None
  name: str

  def network(self) -> Network:
    return Network(self.init, self, self.name, self.at_rest, self.axes, self.at_use)

  def axes(self, inputs: Any) -> dict[str, tuple[Any, ...]]:
    found = {}
    for member, network in self.members:
      for path, names in ({} if network.axes is None else network.axes(inputs)).items():
        collection, _, rest = path.partition("/")
        found[f"{collection}/{member}/{rest}"] = names
    return found

  def at_use(self, specs: Mapping[str, Any], read: Any) -> Network:
    """The cohort whose members read each of these parameters where they use it."""

    def used(member: str, network: Network) -> Network:
      start = f"params/{member}/"
      mine = {f"params/{p[len(start) :]}": s for p, s in specs.items() if p.startswith(start)}
      return network if network.at_use is None else network.at_use(mine, read)

    reading = tuple((member, used(member, network)) for member, network in self.members)
    return dataclasses.replace(self, members=reading).network()

  def init(self, key: Any, inputs: Any) -> dict[str, PyTree]:
    # Each from a key of its own: two of one architecture would begin as twins, and stay it.
    keys = jax.random.split(key, len(self.members))
    return _together(
      {m: net.init(k, inputs) for k, (m, net) in zip(keys, self.members, strict=True)}
    )

  def __call__(
    self, variables: Mapping[str, PyTree], inputs: Any, *, train: bool, key: Any = None
  ) -> tuple[Outputs, dict[str, PyTree]]:
    each: dict[str, Outputs] = {}
    moved: dict[str, dict[str, PyTree]] = {}
    for i, (member, network) in enumerate(self.members):
      own = None if key is None else jax.random.fold_in(key, i)
      each[member], moved[member] = network.apply(
        _of(variables, member), inputs, train=train, key=own
      )
    # A collection that one of them left as it was comes back as it was.
    state = {name: {**variables[name], **updated} for name, updated in _together(moved).items()}
    features = {f"{m}/{name}": x for m, one in each.items() for name, x in one.features.items()}
    lead = self._mean(each) if self.lead is None else each[self.lead]
    return dataclasses.replace(lead, features=features, members=each), state

  def _mean(self, each: Mapping[str, Outputs]) -> Outputs:
    logits = [one.logits for one in each.values()]
    if any(one is None for one in logits):
      return Outputs()
    shapes = {member: one.logits.shape for member, one in each.items()}
    if len(set(shapes.values())) > 1:
      raise ValueError(
        f"{self.name}: logits of the shapes {shapes} have no mean; name the member whose logits "
        f"are the cohort's own, lead={next(iter(each))!r}."
      )
    return Outputs(logits=sum(x.astype(compute_dtype(*logits)) for x in logits) / len(logits))

  def at_rest(self, paths: Collection[str]) -> Network:
    """The cohort whose normalisations at these paths go by their averages in training too."""

    def rested(member: str, network: Network) -> Network:
      mine = {path.partition("/")[2] for path in paths if path.partition("/")[0] == member}
      return network.at_rest(mine) if mine and network.at_rest is not None else network

    still = tuple((member, rested(member, network)) for member, network in self.members)
    return dataclasses.replace(self, members=still).network()


def _of(variables: Mapping[str, PyTree], member: str) -> dict[str, PyTree]:
  """A member's collections."""
  return {name: tree[member] for name, tree in variables.items() if member in tree}


def _together(each: Mapping[str, Mapping[str, PyTree]]) -> dict[str, dict[str, PyTree]]:
  """``{member: {collection: tree}}`` turned inside out."""
  names = dict.fromkeys(name for one in each.values() for name in one)
  return {name: {m: one[name] for m, one in each.items() if name in one} for name in names}
