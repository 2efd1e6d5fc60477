"""`docs/losses.md` is what the docstrings say, and the docstrings say all that is needed."""

import importlib.util
import pathlib
import re
import sys
import xml.etree.ElementTree

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import losses, recipes

ROOT = pathlib.Path(__file__).parent.parent


def load(page):
  spec = importlib.util.spec_from_file_location(f"docs_{page}", ROOT / "docs" / f"{page}.py")
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module  # where dataclasses look up annotations
  spec.loader.exec_module(module)
  return module


sys.path.insert(0, str(ROOT / "docs"))  # as for a script of that folder
try:
  docs, methods = load("losses"), load("methods")
finally:
  sys.path.remove(str(ROOT / "docs"))
ENTRIES = {entry.name: entry for _, entries in docs.families().values() for entry in entries}
FUNCTIONS = [name for name, entry in ENTRIES.items() if entry.is_function]

# No number that a paper chose, so no origin; and no arrays of features or logits.
NOT_CHOSEN = {"where"}
NO_SHAPE = {"banks", "key", "width"}
# What a formula may use only where it says what it is.
BINDINGS = {
  r"\bKL\(": "KL(a ‖ b) = ",
  r"Huber\(": "Huber(x) = ",
  r"\bn\(": "n(v) = ",
  r"softplus\(": "softplus(x) = ",
  r"\[[a-z] [<>≤]": "[·] is 1 where",
  "[φΦ]": "φ and Φ are ",
  r"\bp_[kyi]|KL\(p|p̂": "p = softmax(teacher_logits",
  r"(?<!− )\bq_[kyi]|KL\(q|q̂": "q = softmax(student_logits",
  "ε": "ε = 1e-7",
  "[₊₋]": "P₊ is ",
  r"\bstd_k": "std_k z = ",
  r"\ba·b\b": "‖a‖‖b‖ + 1e-8",
}
# Where published codes are known to disagree, and whose name must be beside what this one is.
DISAGREE = {
  "activation_boundary": ["RepDistiller", "torchdistill"],
  "attention_transfer": ["RepDistiller", "torchdistill", "KD_Lib", "paper"],
  "channel_wise": ["published code", "CIRKD"],
  "class_attention": ["published code"],
  "contrastive_bank": ["RepDistiller", "mdistiller", "torchdistill"],
  "correlation_congruence": ["RepDistiller", "torchdistill"],
  "cross_entropy": ["PyTorch", "fairseq"],
  "decoupled_kd": ["mdistiller", "OFAKD"],
  "factor_transfer": ["RepDistiller", "torchdistill"],
  "flow_of_solution": ["RepDistiller", "torchdistill"],
  "class_gram": ["published code", "mask"],
  "generalized_decoupled_kd": ["published code"],
  "generalized_jsd": ["TRL", "Liger", "EasyDeL"],
  "hint_l2": ["RepDistiller", "torchdistill", "paper"],
  "hint_normalized": ["published code"],
  "inter_channel_correlation": ["torchdistill"],
  "inter_class_correlation": ["torchdistill", "paper"],
  "logit_l2": ["PyTorch", "TextBrewer", "paper"],
  "many_to_one": ["published code"],
  "neuron_selectivity": ["RepDistiller", "TextBrewer"],
  "normalized_kd": ["cls_KD", "SDD"],
  "overhaul": ["mdistiller", "BatchNorm"],
  "refined_kd": ["published code"],
  "pairwise_structure": ["published code", "IFVD"],
  "relational_distance": ["RepDistiller", "KD_Lib"],
  "reverse_kl": ["MiniLLM", "DistiLLM"],
  "similarity_preserving": ["RepDistiller", "torchdistill"],
  "skew_kl": ["published code"],
  "soft_target_kl": ["RepDistiller", "torchdistill", "TextBrewer", "KD_Lib"],
  "standardize_logits": ["PyTorch", "JAX"],
  "total_variation": ["DistillKit", "Liger"],
  "transformed_teacher": ["published code"],
  "variational_information": ["RepDistiller", "mdistiller"],
  "weighted_soft_labels": ["published code", "cls_KD"],
}


def test_the_page_is_current(capsys):
  assert docs.main(["--check"]) == 0, f"docs/losses.md is stale: run `{docs.command}`"
  assert capsys.readouterr().err == ""


def test_a_stale_page_is_refused_and_the_remedy_named(tmp_path, monkeypatch, capsys):
  stale = tmp_path / "losses.md"
  monkeypatch.setattr(docs, "PAGE", stale)
  assert docs.main(["--check"]) == 1  # missing
  stale.write_text(docs.page().replace("Source", "source") + "x", "utf-8")
  assert docs.main(["--check"]) == 1
  assert docs.command in capsys.readouterr().err
  assert docs.main([]) == 0
  assert docs.main(["--check"]) == 0


def test_every_method_has_a_row_with_what_was_measured_of_it(monkeypatch, tmp_path, capsys):
  assert methods.main(["--check"]) == 0, f"docs/methods.md is stale: run `{methods.command}`"
  assert set(methods.listed()) | methods.PARTS == set(recipes.__all__) - {"parts", "projectors"}
  rows = re.findall(r"^\| `(\w+)` \|.*$", methods.page(), re.M)
  assert sorted(rows) == sorted(methods.listed())
  # A table of the comparison that got another form has no gains.
  assert len(methods.gains()) >= 40
  kd = methods.row("kd", "what", "where").split(" | ")
  assert kd[3] == methods.gains()["kd"]
  assert kd[4:] == ["1.00", "0", "0 |"]
  assert methods.row("regression", "what", "where").count("not measured") == 4

  stale = tmp_path / "methods.md"
  stale.write_text(methods.page().replace("| `kd` |", "| `kdd` |"), "utf-8")
  monkeypatch.setattr(methods, "PAGE", stale)
  assert methods.main(["--check"]) == 1
  assert methods.command in capsys.readouterr().err
  assert methods.main([]) == methods.main(["--check"]) == 0
  # A method that is new in the door, and a row whose method is gone.
  logits = dict(methods.TAKE["Of logits"], gone="nowhere")
  del logits["kd"]
  monkeypatch.setitem(methods.TAKE, "Of logits", logits)
  with pytest.raises(ValueError, match=r"lacks \['kd'\], and has \['gone'\]"):
    methods.main([])


def test_every_public_name_is_on_the_page_once_and_linked():
  page = docs.page()
  assert sorted(ENTRIES) == sorted(set(losses.__all__))
  headings = re.findall(r"^### (\w+)$", page, re.M)
  assert sorted(headings) == sorted(ENTRIES)
  anchors = set(re.findall(r"\]\(#(\w+)\)", page))
  assert anchors == {name.lower() for name in ENTRIES}


def test_those_that_give_no_value_per_example_are_marked():
  marked = re.findall(r"^\| \[`(\w+)`\]\(#\w+\) †", docs.page(), re.M)
  assert marked == [
    "class_gram",
    "intra_class_correlation",
    "contrastive_bank",
    "correlation_congruence",
  ]


@pytest.mark.parametrize("name", ENTRIES)
def test_docstrings_name_method_and_source(name):
  entry = ENTRIES[name]
  assert re.search("[A-Z]", entry.acronym), "the first line needs the acronym in brackets"
  authors, title, year, _ = entry.source
  assert authors, 'write ``Source: Authors, "Title", year``'
  assert re.match("[A-Zv]", authors)
  assert len(title) > 10
  assert 2010 <= int(year) <= 2030
  codes = entry.doc.labelled["Other codes"]
  assert re.search(r"\b(this|here)\b", codes), f"which one is this? {codes}"
  for other in DISAGREE.get(name, []):
    assert other in codes, f"what does {other} do?"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_formulas_bind_their_symbols(name):
  entry = ENTRIES[name]
  assert re.search("[=Σ²√]", entry.formula), "the second paragraph is the formula"
  text = " ".join([entry.formula, *entry.remarks, entry.returns])
  for argument in entry.defaults.keys() - {"where", "key", "banks"}:
    assert re.search(rf"\b{argument}(?![a-z])", text), f"the formula does not use {argument}"
  for symbol, binding in BINDINGS.items():
    if re.search(symbol, entry.formula):
      assert binding in entry.formula, f"{symbol} is not bound"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arguments_have_shapes_and_defaults_an_origin(name):
  entry = ENTRIES[name]
  described = entry.doc.sections["Args"]
  assert list(described) == list(entry.defaults), "Args are not the function's arguments"
  for argument, default in entry.defaults.items():
    text = described[argument]
    if default is None or argument in NOT_CHOSEN:
      scalar = argument in NO_SHAPE or argument.startswith("num_")
      assert scalar or "``[" in text, f"{argument} has no shape"
      continue
    value = re.escape(default.removesuffix(".0"))
    origin = rf"(?<![\w.]){value}(, [^.;]*,)? is [^.;]*'s\b"
    assert re.search(origin, text), f"say whose {argument} = {default} is: '{default} is X's'"
  assert "``[" in entry.returns or name == "init_banks", "Returns has no shape"


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("One.\n\nSources: nobody.", "'Sources:' is none of"),
    ("One.\n\nArgs:\n  x: it.\n\nAfterthought.", "after the sections"),
  ],
)
def test_a_docstring_that_cannot_be_read_is_refused(text, message):
  with pytest.raises(ValueError, match=message):
    docs.parse(text)


def test_a_docstring_is_taken_apart():
  doc = docs.parse("""A (B): c.

    x_k =
      2

    Args:
      x: ``[B]``,
        more: of it.
      y: last.

    Source: D, "E", 2020.

    >>> f()
    """)
  assert doc.summary == "A (B): c."
  assert doc.paragraphs == ["x_k =\n  2"]
  assert doc.sections == {"Args": {"x": "``[B]``, more: of it.", "y": "last."}}
  assert doc.labelled == {"Source": 'D, "E", 2020.'}


PARITY = "".join(path.read_text("utf-8") for path in (ROOT / "tests" / "parity").glob("*.py"))
TYPESET = {name: "\n".join(docs.typeset(name)) for name in docs.BESIDE if name != "shared"}


def test_every_function_is_typeset_and_nothing_else_is():
  assert sorted(TYPESET) == sorted(FUNCTIONS)
  assert all(TYPESET.values())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_typeset_is_the_docstrings_formula(name):
  formula, typeset = ENTRIES[name].formula, TYPESET[name]
  for argument in ENTRIES[name].defaults:
    if re.search(rf"\b{argument}(?![a-z])", formula):
      assert re.search(rf"\\text{{[^}}]*\b{argument}\b", typeset), f"{argument} is not typeset"
  for power in re.findall(r"\b1e-0?(\d+)", formula):
    assert f"10^{{-{power}}}" in typeset, f"1e-{power} is not typeset"
  assert typeset.count("{") == typeset.count("}")
  assert typeset.count(r"\left") == typeset.count(r"\right")


def test_who_was_compared_is_what_the_parity_tests_compare():
  compared = {name for name in TYPESET if "compared" in docs.BESIDE[name]}
  assert compared == set(re.findall(r"losses\.(\w+)", PARITY)) & set(FUNCTIONS)
  for name in compared:
    # Who is named as run is run.
    for run in re.findall(r"torchdistill's `(\w+)`", docs.BESIDE[name]["compared"]):
      assert f"torchdistill.{run}(" in PARITY, f"no parity test of torchdistill's {run}"


@pytest.mark.slow
def test_every_loss_has_a_curve(monkeypatch):
  pytest.importorskip("matplotlib", reason="needs the extra: pip install '.[report]'")
  monkeypatch.syspath_prepend(ROOT / "docs")
  import curves

  drawn = curves.curves(docs.averaged())
  assert set(drawn) == set(FUNCTIONS) - docs.PIECES
  drawing = curves.drawing("logit_l2", drawn["logit_l2"])
  assert drawing == curves.drawing("logit_l2", drawn["logit_l2"])
  # Both curves, in the colours of the theme alone.
  assert drawing.count("<polyline") == 2
  assert "equal" in drawing
  assert not re.search("#[0-9a-f]{3}|fill=|stroke=", drawing)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(FUNCTIONS) - docs.PIECES))
def test_a_curves_gradient_is_its_slope(name, monkeypatch):
  pytest.importorskip("matplotlib", reason="needs the extra: pip install '.[report]'")
  monkeypatch.syspath_prepend(ROOT / "docs")
  import curves

  curve = curves.curves(docs.averaged())[name]
  where = jnp.linspace(curve.low, curve.high, 400, dtype=jnp.float32)
  value, gradient = (np.asarray(y, np.float64) for y in curves._along(curve.value, where))
  assert np.isfinite(gradient).all()
  assert np.ptp(value) > 1e-3, "a level line shows nothing"
  # No gradient passes through a part of the first three, and the last two jump.
  if name in {
    "adaptive_kl",
    "self_target",
    "weighted_soft_labels",
    "self_nontarget",
    "teacher_bounded",
  }:
    return
  # Trapezoids of the gradient are the value; jumps and knees cost a step's width.
  area = np.concatenate([[0], np.cumsum((gradient[1:] + gradient[:-1]) / 2 * np.diff(where))])
  np.testing.assert_allclose(area, value - value[0], atol=2e-2 * np.ptp(value) + 1e-5)


def test_formulas_are_mathml():
  converter = pytest.importorskip("latex2mathml.converter", reason="needs the extra: '.[docs]'")
  for name in FUNCTIONS:
    for equation in docs.typeset(name):
      made = converter.convert(equation, display="block")
      xml.etree.ElementTree.fromstring(re.sub(r"&(\w+);", "", made))
      assert "\\" not in made, f"{name}: {equation}"
