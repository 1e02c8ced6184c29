"""RUBY against hand computations, against zss, apted and networkx, and against hostile code; and the quality composite.

The oracle tests draw new trees and graphs in every run. A failure prints the seed; `METRICS_SEED=<seed>` repeats it.
"""

import ast
import importlib
import importlib.util
import json
import math
import os
import random
import time
from itertools import permutations
from pathlib import Path

import pytest

from nanorlhf.errors import InputError
from nanorlhf.metrics import quality_weights, ruby, ruby_quality
from nanorlhf.metrics.bleu import conala_tokens
from nanorlhf.metrics.match import parse
from nanorlhf.metrics.ruby import (cyclomatic_complexity, dependence_graph, flatten, graph_distance, make_tree,
                                   string_distance, style_faults, tree_distance)

room = importlib.import_module("nanorlhf.metrics.ruby")  # the module: `metrics.ruby` is the function
SEED = int(os.environ.get("METRICS_SEED", random.SystemRandom().randrange(2**32)))
CONALA = Path(__file__).resolve().parents[2] / "shared" / "data" / "conala"
needs_conala = pytest.mark.skipif(not (CONALA / "conala-test.json").is_file(),
                                  reason="../shared/data/conala is not there")


def needs(package):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None,
                              reason=f"{package} is the oracle (requirements-dev.txt)")


def snippets():
    return [row["snippet"] for row in json.loads((CONALA / "conala-test.json").read_text("utf-8"))]


# ---- strings

def table_distance(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]


def test_string_distance_by_hand():
    """kitten, sitting: k to s, e to i, g at the end: 3. abc, ca: drop a and b, add a: 3 (no transposition)."""
    assert string_distance("kitten", "sitting") == 3 and string_distance("abc", "ca") == 3
    assert string_distance("", "ab") == string_distance("ab", "") == 2 and string_distance("", "") == 0


def test_string_distance_equals_the_table():
    rng = random.Random(SEED)
    for _ in range(1000):
        a, b = (rng.choices("abc", k=rng.randrange(90)) for _ in range(2))
        assert string_distance(a, b) == table_distance(a, b), f"METRICS_SEED={SEED} {a} {b}"


# ---- trees

def postorder(tree):
    """("label", child, ...) -> Tree."""
    labels, leftmost = [], []

    def visit(node):
        first = [visit(child) for child in node[1:]]
        labels.append(node[0])
        leftmost.append(first[0] if first else len(labels) - 1)
        return leftmost[-1]

    visit(tree)
    return make_tree(labels, leftmost)


def random_tree(rng, size):
    """A tree of that many nodes: the root's label, then subtrees of random sizes."""
    children, left = [], size - 1
    while left:
        part = rng.randrange(1, left + 1)
        children.append(random_tree(rng, part))
        left -= part
    return (rng.choice("abc"), *children)


def test_tree_distance_by_hand():
    """Zhang and Shasha's own example: f(d(a, c(b)), e) and f(c(d(a, b)), e) differ by taking c out and putting it
    in elsewhere: 2."""
    one, other = ("f", ("d", ("a",), ("c", ("b",))), ("e",)), ("f", ("c", ("d", ("a",), ("b",))), ("e",))
    assert tree_distance(postorder(one), postorder(other)) == 2
    assert tree_distance(postorder(("a",)), postorder(("b",))) == 1
    assert tree_distance(postorder(("a", ("b",), ("c",))), postorder(("a", ("c",), ("b",)))) == 2, "order matters"
    assert tree_distance(postorder(one), postorder(("f",))) == 5


@needs("zss")
def test_tree_distance_equals_zss():
    import zss

    def tree(node):
        return zss.Node(node[0], [tree(child) for child in node[1:]])

    rng = random.Random(SEED)
    for _ in range(400):
        a, b = (random_tree(rng, rng.randrange(1, 16)) for _ in range(2))
        theirs = zss.distance(tree(a), tree(b), zss.Node.get_children, lambda x: 1, lambda x: 1,
                              lambda x, y: int(x.label != y.label))
        assert tree_distance(postorder(a), postorder(b)) == theirs, f"METRICS_SEED={SEED} {a} {b}"


class Unit:
    """apted's configuration for tuples, unit costs."""
    valuecls = int

    def delete(self, node):
        return 1

    insert = delete

    def rename(self, a, b):
        return int(a[0] != b[0])

    def children(self, node):
        return node[1:]


@needs("apted")
def test_tree_distance_equals_apted():
    from apted import APTED
    rng = random.Random(SEED)
    for _ in range(200):
        a, b = (random_tree(rng, rng.randrange(1, 25)) for _ in range(2))
        theirs = APTED(a, b, Unit()).compute_edit_distance()
        assert tree_distance(postorder(a), postorder(b)) == theirs, f"METRICS_SEED={SEED} {a} {b}"


@needs("zss")
@needs_conala
def test_tree_similarity_of_snippets_equals_zss_on_ast():
    """1 - TED / nodes, on trees built from `ast` again, contexts and operators folded away as the docstring says."""
    import zss

    def tree(node):
        held = [value for name, field in ast.iter_fields(node) if name != "kind"
                for value in (field if isinstance(field, list) else [field])]
        folded = (ast.operator, ast.unaryop, ast.boolop, ast.cmpop)
        label = [type(value).__name__ if isinstance(value, folded) else value for value in held
                 if value is not None and not isinstance(value, ast.AST) or isinstance(value, folded)]
        children = [value for value in held if isinstance(value, ast.AST)
                    and not isinstance(value, (*folded, ast.expr_context))]
        return zss.Node((type(node), [(type(value), value) for value in label]), [tree(child) for child in children])

    def count(node):
        return 1 + sum(map(count, node.children))

    rng = random.Random(SEED)
    for _ in range(60):
        codes = rng.sample(snippets(), 2)
        a, b = (tree(ast.parse(code)) for code in codes)
        distance = zss.distance(a, b, zss.Node.get_children, lambda x: 1, lambda x: 1,
                                lambda x, y: int(x.label != y.label))
        score, level = ruby(*codes)
        if level == "tree":
            assert score == pytest.approx(1 - distance / (count(a) + count(b) - 2)), f"METRICS_SEED={SEED} {codes}"


def test_tree_labels():
    """Names, constants and operators are in the label; 1, 1.0 and True differ; contexts and u"" do not show."""
    assert flatten(ast.parse("x + 1")).labels == [
        ("Name", "str", "x"), ("Constant", "int", 1), ("BinOp", "Add"), ("Expr",), ("Module",)]
    labels = [flatten(ast.parse(code)).labels for code in ("1", "1.0", "True")]
    assert labels[0] != labels[1] != labels[2] != labels[0]
    assert flatten(ast.parse("u'a'")) == flatten(ast.parse("'a'"))


# ---- graphs

def edges(code):
    return set(dependence_graph(ast.parse(code)).edges)


def test_dependence_graph_by_hand():
    """0 def, then by level: 1 total = 0, 2 for, 3 return, 4 total += x."""
    code = "def f(xs):\n  total = 0\n  for x in xs:\n    total += x\n  return total"
    assert edges(code) == {
        (0, 1, "control"), (0, 2, "control"), (0, 3, "control"), (2, 4, "control"),
        (0, 2, "data"),                     # xs
        (1, 4, "data"), (2, 4, "data"),     # total, x
        (1, 3, "data"), (4, 3, "data")}     # total, whether or not the loop ran


@pytest.mark.parametrize("code, expected", [
    ("a = 1\na = 2\nb = a", {(1, 2, "data")}),                                  # the first value is lost
    ("a = 1\nif b:\n  a = 2\nc = a", {(0, 2, "data"), (1, 3, "control"), (3, 2, "data")}),
    ("x = 1\ny = [x for x in z]", set()),                                       # another x
    ("d = {}\nd['a'] = 1\nprint(d)", {(0, 1, "data"), (1, 2, "data")}),         # writing to an item reads and defines
    ("import os\nos.getcwd()", {(0, 1, "data")}),
    ("with f() as g:\n  h = g\nh", {(0, 2, "control"), (0, 2, "data"), (2, 1, "data")}),
    ("try:\n  a\nexcept E as e:\n  e", {(0, 1, "control"), (0, 2, "control"), (2, 3, "control"), (2, 3, "data")}),
    ("for a in b:\n  c = d\n  d = a", {(0, 1, "control"), (0, 2, "control"), (0, 2, "data"), (2, 1, "data")}),
    ("a = 1\nb = a.x\nc = a[0]", {(0, 1, "data"), (0, 2, "data")}),              # reading an attribute or an item defines nothing
    ("x = f()\nx.a += 1\nprint(x)", {(0, 1, "data"), (1, 2, "data")}),
    ("import numpy as np\nnp.f()\nnumpy", {(0, 1, "data")}),
    ("a = 1", set()),
])
def test_dependence_edges(code, expected):
    assert edges(code) == expected


def slow_graph_distance(costs, edges_a, edges_b):
    """The least over every way to map nodes, None standing for deleted ones."""
    n, m = len(costs), len(costs[0])
    best = math.inf
    for mapping in set(permutations([*range(m), *[None] * n], n)):
        kept = {(mapping[i], mapping[j], kind) for i, j, kind in edges_a}
        cost = sum(1 if j is None else costs[i][j] for i, j in enumerate(mapping))
        cost += m - sum(j is not None for j in mapping)
        lost = sum(None in (mapping[i], mapping[j]) for i, j, _ in edges_a)
        kept = {edge for edge in kept if None not in edge}
        best = min(best, cost + lost + len(kept ^ set(edges_b)))
    return best


def random_edges(rng, nodes):
    return {(i, j, kind) for i in range(nodes) for j in range(nodes) for kind in ("control", "data")
            if i != j and rng.random() < 0.25}


def test_graph_distance_by_hand():
    """Two nodes and an edge against the same turned round: one edge out, one in: 2, or, cheaper, the nodes swapped at
    0.5 each: 1. Against a node alone: a node and its edge go: 2."""
    edge, turned = {(0, 1, "data")}, {(1, 0, "data")}
    assert graph_distance([[0, 1], [1, 0]], edge, turned) == 2
    assert graph_distance([[0, 0.5], [0.5, 0]], edge, turned) == 1
    assert graph_distance([[0], [1]], edge, set()) == 2
    assert graph_distance([[0, 1], [1, 0]], edge, {(0, 1, "control")}) == 2, "an edge is not replaced"


def test_graph_distance_equals_every_mapping(monkeypatch):
    monkeypatch.setattr(room, "MAX_EXPANSIONS", 10**6)
    rng = random.Random(SEED)
    for _ in range(150):
        n, m = rng.randrange(1, 5), rng.randrange(1, 5)
        costs = [[rng.choice([0, 0.25, 0.5, 1]) for _ in range(m)] for _ in range(n)]
        a, b = random_edges(rng, n), random_edges(rng, m)
        assert graph_distance(costs, a, b) == slow_graph_distance(costs, a, b), f"METRICS_SEED={SEED} {costs} {a} {b}"


@needs("networkx")
def test_graph_distance_equals_networkx(monkeypatch):
    import networkx
    monkeypatch.setattr(room, "MAX_EXPANSIONS", 10**6)
    rng = random.Random(SEED)

    def graph(nodes, edges):
        made = networkx.DiGraph()
        made.add_nodes_from((i, {"i": i}) for i in range(nodes))
        for i, j, _ in edges:
            made.add_edge(i, j, kinds={kind for s, t, kind in edges if (s, t) == (i, j)})
        return made

    for _ in range(40):
        n, m = rng.randrange(1, 6), rng.randrange(1, 5)
        costs = [[rng.choice([0, 0.25, 0.5, 1]) for _ in range(m)] for _ in range(n)]
        a, b = random_edges(rng, n), random_edges(rng, m)
        theirs = networkx.graph_edit_distance(
            graph(n, a), graph(m, b), node_subst_cost=lambda x, y: costs[x["i"]][y["i"]], node_del_cost=lambda x: 1,
            node_ins_cost=lambda x: 1, edge_subst_cost=lambda x, y: len(x["kinds"] ^ y["kinds"]),
            edge_del_cost=lambda x: len(x["kinds"]), edge_ins_cost=lambda x: len(x["kinds"]))
        assert graph_distance(costs, a, b) == pytest.approx(theirs), f"METRICS_SEED={SEED} {costs} {a} {b}"


# ---- the three levels

def test_string_level_by_hand():
    """f ( x against f ( y: neither parses, one of three tokens differs: 1 - 1/3. Nothing parses, as an empty tree."""
    assert ruby("f(x", "f(y") == (pytest.approx(2 / 3), "string")
    assert ruby("f(", "print(1)") == (1 - 3 / 4, "string"), "one side is enough: a replacement, two insertions"
    assert ruby("", "") == (1.0, "tree") and ruby("", "f(") == (0.0, "string")
    assert ruby("\x1c", "\x1c") == (1.0, "string"), "whitespace that does not parse: two lists without a token are equal"


def test_tree_level_by_hand():
    """f(x) and f(y): Expr, Call, f, x; one name differs of 4 + 4 nodes. Against nothing all four are inserted: 0."""
    assert ruby("f(x)", "f(y)") == (1 - 1 / 8, "tree")
    assert ruby("", "f(x)") == ruby("f(x)", "# nothing") == (0.0, "tree")


def test_graph_level_by_hand():
    """x = 1; y = x against x = 2; y = x: statements of three nodes (Assign, Name, value), one of which differs: 1/6.
    Two nodes and an edge each: 1 - (1/6) / 6."""
    assert ruby("x = 1\ny = x", "x = 2\ny = x") == (pytest.approx(1 - 1 / 36), "graph")
    assert ruby("x = 1\ny = x", "x = 1\ny = x") == (1.0, "graph")


def test_graphs_see_dependences_that_strings_do_not():
    """Swapping two independent statements changes no dependence; renaming one use does."""
    reference = "a = f()\nb = g()\nc = a + b"
    assert ruby("b = g()\na = f()\nc = a + b", reference) == (1.0, "graph")
    assert ruby("a = f()\nb = g()\nc = a + d", reference)[0] < 1


def test_a_statement_without_dependences_is_compared_as_a_tree():
    assert ruby("x = f(1)\ny = x", "x = f(1)")[1] == "tree"


def test_levels_are_bounded_by_work_not_by_time(monkeypatch):
    """The same pair on each level as the bounds shrink."""
    one = "a = 1\nb = a\nc = a + b"
    other = "a = 2\nb = a + a\nc = b\nd = c"
    assert ruby(one, other)[1] == "graph"
    monkeypatch.setattr(room, "MAX_EXPANSIONS", 2)
    assert ruby(one, other)[1] == "tree"
    monkeypatch.setattr(room, "MAX_CELLS", 100)
    score, level = ruby(one, other)
    tokens = [conala_tokens(code) for code in (one, other)]
    assert level == "string" and score == 1 - table_distance(*tokens) / max(map(len, tokens))
    monkeypatch.setattr(room, "MAX_EXPANSIONS", 500)
    assert ruby(one, other)[1] == "string", "the trees of a graph's nodes are bounded as well"


def test_many_statements_have_no_graph():
    code = "\n".join(f"x{i + 1} = x{i}" for i in range(room.MAX_STATEMENTS))
    assert ruby(code, code) == (1.0, "graph") and ruby(code + "\ny = x1", code)[1] == "tree"


def test_the_best_reference_counts():
    assert ruby("f(x)", ["g()", "f(y)"]) == ruby("f(x)", "f(y)")


def test_a_bounded_search_is_the_same_from_both_sides():
    """A long program against one of three statements: from the one side the search once ended in its bound, from the other in a distance."""
    a = ("u = urllib.request.urlopen(url)\nf = open(name, 'wb')\nmeta = u.info()\nsize = int(meta.getheaders('Content-Length')[0])\n"
         "print(('Downloading: %s Bytes: %s' % (name, size)))\ndone = 0\nblock = 8192\nwhile True:\n    buffer = u.read(block)\n"
         "    if (not buffer):\n        break\n    done += len(buffer)\n    f.write(buffer)\n"
         "    status = ('%10d  [%3.2f%%]' % (done, ((done * 100.0) / size)))\n    status = (status + (chr(8) * (len(status) + 1)))\n"
         "    print(status, end=' ')\nf.close()")
    b = "gen = (i for (i, x) in enumerate(testlist) if (x == 1))\nfor i in gen:\n    pass"
    assert ruby(a, b) == ruby(b, a)


@needs_conala
def test_identity_symmetry_and_range():
    rng, codes = random.Random(SEED), snippets()
    for code in codes:
        score, level = ruby(code, code)
        assert score == 1.0 and level in ("graph", "tree")
    for _ in range(200):
        a, b = rng.sample(codes, 2)
        score, level = ruby(a, b)
        assert 0 <= score <= 1 and ruby(b, a) == (pytest.approx(score), level), f"METRICS_SEED={SEED} {a!r} {b!r}"
        assert score < 1 or ast.dump(ast.parse(a)) == ast.dump(ast.parse(b)) or level == "graph"


# ---- hostile code

NESTED = "".join(" " * i + f"for a{i} in x:\n" for i in range(35)) + " " * 35 + "x = x"
HOSTILE = ["(" * 9000, "-" * 9000 + "1", "1+" * 9000 + "1", "\x00", "\ud800", "y" * 100_000, "a " * 9000, "a\n" * 3000,
           "a = " * 2000 + "1", "x" + ".y" * 5000, "if a: pass\n" + "elif b: pass\n" * 900, NESTED,
           "lambda:" * 3000 + "1", "\n".join(f"x{i} = f(x{i - 1})" for i in range(39)), "f(" + "a, " * 5000 + ")",
           "9" * 5000]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: f"{text[:6]!r} x {len(text)}")
def test_hostile_code_never_raises_and_takes_no_more_than_seconds(text):
    start = time.process_time()
    for prediction, reference in [(text, "x = 1\ny = x"), ("x = 1\ny = x", text), (text, text[:-2] + "\nz = x")]:
        score, level = ruby(prediction, reference)
        assert 0 <= score <= 1 and level in room.LEVELS
    assert 0 <= ruby_quality(text)["ruby_quality"] <= 1
    assert time.process_time() - start < 10


def test_random_unicode_never_raises():
    rng = random.Random(SEED)
    for _ in range(300):
        letters = [chr(rng.randrange(0x110000)) for _ in range(rng.randrange(20))]
        letters += rng.choices("()[]{}'\" \n=:,.#ab1", k=20)
        text = "".join(rng.sample(letters, len(letters)))
        scores = ruby(text, "f(x)")[0], ruby_quality(text)["ruby_quality"]
        assert all(0 <= score <= 1 for score in scores), f"METRICS_SEED={SEED} {text!r}"


@pytest.mark.parametrize("call, message", [
    (lambda: ruby(None, "a"), "prediction is a NoneType"), (lambda: ruby("a", 1), "reference is a int"),
    (lambda: ruby("a", []), "at least one reference"), (lambda: ruby_quality(b"a"), "code is a bytes"),
    (lambda: ruby_quality("a", 2), "executes=2"), (lambda: ruby_quality("a", "yes"), "executes='yes'"),
    (lambda: ruby_quality("a", math.nan), "executes=nan")])
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


# ---- quality

def test_quality_by_hand():
    """Two rules of ten broken (a space at the end, == None) and complexity 1: 0.5 + 0.25 + 0.25 * 0.8 without
    execution; with it 0.4 + 0.2 + 0.2 * 0.8 + 0.2 * executes."""
    code = "x = y == None \n"
    assert ruby_quality(code) == pytest.approx(
        {"ruby_quality": 0.95, "syntax": 1.0, "complexity": 1.0, "style": 0.8, "execution": None})
    for executes, share in [(True, 1.0), (False, 0.0), (0.5, 0.5)]:
        scores = ruby_quality(code, executes)
        assert scores["execution"] == share and scores["ruby_quality"] == pytest.approx(0.76 + 0.2 * share)


def test_quality_of_what_does_not_parse_or_says_nothing_is_0():
    for code in ("f(", "", "# nothing", "\x00"):
        assert ruby_quality(code) == {"ruby_quality": 0, "syntax": 0, "complexity": 0, "style": 0, "execution": None}
    assert ruby_quality("f(", True)["ruby_quality"] == pytest.approx(0.2), "what ran counts"


def test_quality_weights_sum_to_1_and_say_what_is_left_out():
    assert quality_weights() == pytest.approx({"syntax": 0.5, "complexity": 0.25, "style": 0.25})
    assert quality_weights(False) == {"syntax": 0.4, "complexity": 0.2, "style": 0.2, "execution": 0.2}


@pytest.mark.parametrize("code, complexity", [
    ("x = 1", 1), ("if a:\n  b\nelif c:\n  d\nelse:\n  e", 3), ("for a in b:\n  while c:\n    pass", 3),
    ("x = a and b and c or d", 4), ("[a for b in c if d for e in f]", 4), ("a if b else c", 2),
    ("try:\n  a\nexcept B:\n  c\nexcept D:\n  e", 3), ("assert a", 2), ("match a:\n  case 1: b\n  case _: c", 3)])
def test_cyclomatic_complexity_by_hand(code, complexity):
    assert cyclomatic_complexity(ast.parse(code)) == complexity


def test_complexity_falls_beyond_mccabes_limit():
    """c = 10: 1; c = 20: 10/20."""
    assert ruby_quality("\n".join(["if a: b"] * 9))["complexity"] == 1.0
    assert ruby_quality("\n".join(["if a: b"] * 19))["complexity"] == 0.5


@pytest.mark.parametrize("code, rule", [
    ("x = " + "a" * 76, "line longer than 79 characters"), ("x = 1 ", "whitespace at the end of a line"),
    ("if a:\n\tb", "tab in the indentation"), ("if a:\n  b", "indentation not by four"),
    ("a; b", "two statements on one line"), ("if a: b", "two statements on one line"),
    ("x == None", "comparison with None, True or False by =="),
    ("True != x == True", "comparison with None, True or False by =="),
    ("try:\n    a\nexcept:\n    b", "except without a class"), ("from a import *", "import *"),
    ("f = lambda: 0", "lambda bound to a name"), ("def fooBar():\n    pass", "name not in the usual case"),
    ("camelCase = 1", "name not in the usual case"), ("class foo_bar:\n    pass", "name not in the usual case")])
def test_each_style_rule(code, rule):
    faults = [name for name, broken in style_faults(code, parse(code)).items() if broken]
    assert rule in faults and (len(faults) == 1 or rule == "tab in the indentation"), faults


def test_good_style_has_no_faults():
    code = ("import os\n\nLIMIT = 3\n\n\nclass HTTPServer:\n    def run_all(self, x_1):\n"
            "        _private = x_1 is None\n"
            "        if _private:\n            return [x == 1 for x in os.environ]\n"
            "        key = sorted(x_1, key=lambda x: x)\n        return 'ü' == key\n")
    assert not any(style_faults(code, parse(code)).values()) and len(style_faults(code, parse(code))) == 10
    assert ruby_quality(code)["ruby_quality"] == 1.0
