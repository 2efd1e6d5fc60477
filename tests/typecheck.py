"""Annotated shapes are checked at every call, in the tests: jaxtyping, with beartype behind it.

jaxtyping's own import hook checks every function of every module: what walks through a program and
is called ten thousand times a run, and functions inside of others, which it wraps anew each time.
This one takes the modules that speak of shapes, and the functions in them that are annotated; mypy
sees to types that are no shapes.
"""

import ast
import importlib.abc
import importlib.machinery
import sys

import jaxtyping
from beartype import BeartypeConf, beartype

# An int passes for a float, as PEP 484 has it.
checked = jaxtyping.jaxtyped(typechecker=beartype(conf=BeartypeConf(is_pep484_tower=True)))


def _annotated(node):
  every = ast.walk(node.args)
  return node.returns or any(getattr(argument, "annotation", None) for argument in every)


class _Marks(ast.NodeTransformer):
  """Puts the check on classes, whose fields it sees, and on functions that say what they take.

  First of the decorators of a function, where there still are annotations, and last of a class's,
  after what makes it a dataclass.
  """

  def _check(self, node):
    mark = ast.parse(f"__import__({__name__!r}).checked", mode="eval").body
    return [ast.copy_location(mark, node)]

  def visit_ClassDef(self, node):
    node.decorator_list = self._check(node) + node.decorator_list
    return self.generic_visit(node)

  def visit_FunctionDef(self, node):
    node.decorator_list += self._check(node) if _annotated(node) else []
    return self.generic_visit(node)


class _Loader(importlib.machinery.SourceFileLoader):
  def get_code(self, fullname):
    """Compiled anew: what Python keeps beside a module is without checks."""
    tree = _Marks().visit(ast.parse(self.get_data(self.path), self.path))
    return compile(ast.fix_missing_locations(tree), self.path, "exec", dont_inherit=True)


class Finder(importlib.abc.MetaPathFinder):
  """Finds the modules of jaxdistill that import jaxtyping."""

  def find_spec(self, fullname, path=None, target=None):
    if fullname.partition(".")[0] != "jaxdistill":
      return None
    spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
    if spec is None or b"jaxtyping" not in spec.loader.get_data(spec.origin):
      return None
    spec.loader = _Loader(spec.loader.name, spec.loader.path)
    return spec


def install():
  """From now on, what is imported is checked."""
  sys.meta_path.insert(0, Finder())
