"""RUBY: how far a program is from its reference, as graphs where that can be, else as trees, else as strings.

    level     compared                                    similarity
    graph     program dependence graphs, both with edges  1 - GED / (nodes and edges of both)
    tree      syntax trees, both parse                    1 - TED / (nodes of both, but for the Module)
    string    tokens, always                              1 - SED / (tokens of the longer)

GED, TED and SED are the edit distances of graphs, trees (Zhang and Shasha 1989) and token strings. `ruby` says which
level it used. A lone statement depends on nothing and says nothing as a graph: most one-liners are compared as trees.

The distances are exact. Exact graph edit distance takes exponential time, so it gives up after MAX_EXPANSIONS partial
mappings and the pair is compared as trees; trees too large for MAX_CELLS are compared as strings. Both bounds count
work, not seconds: a score is the same on every machine.

`ruby_quality` is another thing under a similar name: a composite that looks at one program, with no reference.

Source: Tran et al. 2019, "Does BLEU give meaningful in code migration?", section on RUBY. Deviations: their graphs come
from a Java or C# compiler, ours from `ast`, one node a statement; replacing a statement costs what its trees differ,
TED / (nodes of both), instead of 1 for any difference; every inserted or deleted node or edge costs 1, as theirs.
"""

import ast
import heapq
import re
from collections import Counter
from typing import NamedTuple

from nanorlhf.errors import InputError
from nanorlhf.metrics import inputs
from nanorlhf.metrics.bleu import conala_tokens
from nanorlhf.metrics.match import parse

LEVELS = ("graph", "tree", "string")
MAX_STATEMENTS = 40      # nodes of a graph
LOOP_DEPTH = 3           # loops in loops that are followed twice
MAX_EXPANSIONS = 500     # partial mappings of two graphs that are looked into
MAX_CELLS = 1_000_000    # table cells of Zhang and Shasha's algorithm


def ruby(prediction, reference):
    """(score, level): similarity in [0, 1] and which of "graph", "tree", "string" it was measured on.

    Args: prediction: str. reference: str, or a list of str, of which the most similar counts.
    Equal programs score 1 and only the string level reaches 0: two trees that share nothing still map node to node,
    which costs 1 a pair, so unrelated snippets of like size score about 0.5. Scores of different levels are not on one
    scale.
    """
    prediction = _Program(inputs.text(prediction, "prediction"))
    references = [_Program(reference) for reference in inputs.reference_texts(reference)]
    return max((_similarity(prediction, reference) for reference in references), key=lambda pair: pair[0])


class _Program:
    """A text with its tree and graph, each None where it has none."""

    def __init__(self, code):
        self.code, module = code, parse(code)
        self.tree = None if module is None else flatten(module)
        self.graph = None if module is None else dependence_graph(module)


def _similarity(a, b):
    for level, similarity in (("graph", _graph_similarity), ("tree", _tree_similarity)):
        score = similarity(getattr(a, level), getattr(b, level))
        if score is not None:
            return score, level
    return _string_similarity(a.code, b.code), "string"


def _string_similarity(a, b):
    a, b = conala_tokens(a), conala_tokens(b)
    longer = max(len(a), len(b))
    return 1 - string_distance(a, b) / longer if longer else 1.0


def _tree_similarity(a, b):
    if a is None or b is None or a.cells * b.cells > MAX_CELLS:
        return None
    nodes = len(a.labels) + len(b.labels) - 2  # the Module that every program has does not count
    return 1 - tree_distance(a, b) / nodes if nodes else 1.0


def _graph_similarity(a, b):
    if not (a and b and a.edges and b.edges):
        return None
    if sum(tree.cells for tree in a.nodes) * sum(tree.cells for tree in b.nodes) > MAX_CELLS:
        return None
    a, b = sorted((a, b), key=_size)  # the search is bounded: from either side it must be the same one
    costs = [[tree_distance(x, y) / (len(x.labels) + len(y.labels)) for y in b.nodes] for x in a.nodes]
    distance = graph_distance(costs, a.edges, b.edges)
    if distance is None:
        return None
    return 1 - distance / (len(a.nodes) + len(a.edges) + len(b.nodes) + len(b.edges))


def _size(graph):
    """An order of graphs: the smaller first, equal ones by what they hold."""
    return len(graph.nodes), len(graph.edges), repr((sorted(graph.edges), [node.labels for node in graph.nodes]))


# ---- strings

def string_distance(a, b):
    """Levenshtein distance of two sequences: fewest insertions, deletions and replacements.

    Bit-parallel (Hyyrö 2003): a column of the table is two integers, the steps up and the steps down.
    """
    if not a:
        return len(b)
    positions = {}
    for i, token in enumerate(a):
        positions[token] = positions.get(token, 0) | 1 << i
    full, last = (1 << len(a)) - 1, 1 << (len(a) - 1)
    up, down, distance = full, 0, len(a)
    for token in b:
        hit = positions.get(token, 0)
        same = (((hit & up) + up) ^ up) | hit | down  # the diagonal step is free
        right_up, right_down = down | (full & ~(same | up)), up & same
        distance += bool(right_up & last) - bool(right_down & last)
        right_up, right_down = (right_up << 1 | 1) & full, (right_down << 1) & full
        up, down = right_down | (full & ~(same | right_up)), right_up & same
    return distance


# ---- trees

class Tree(NamedTuple):
    """An ordered tree in postorder: the label of each node, its leftmost leaf, and the key roots, which are the nodes
    that are no leftmost child: Zhang and Shasha's tables are theirs. `cells` is the size of all key roots' subtrees."""
    labels: list
    leftmost: list[int]
    keyroots: list[int]
    cells: int


def make_tree(labels, leftmost):
    """Tree from postorder labels and leftmost leaves."""
    highest = {leaf: node for node, leaf in enumerate(leftmost)}
    keyroots = sorted(highest.values())
    return Tree(labels, leftmost, keyroots, sum(root - leftmost[root] + 1 for root in keyroots))


def flatten(node, body=True):
    """The Tree of an `ast` node. Names, constants and operators are part of their node's label; contexts are left out.

    With body=False, a statement without the statements in it: its head.
    """
    labels, leftmost, stack = [], [], [(node, None)]
    while stack:  # no recursion: code may be nested deeper than Python's stack
        node, first = stack.pop()
        if first is not None:
            labels.append(_label(node))
            leftmost.append(first)
            continue
        stack.append((node, len(labels)))
        stack += [(child, None) for child in reversed(list(_children(node))) if body or not isinstance(child, _BODIES)]
    return make_tree(labels, leftmost)


_BODIES = (ast.stmt, ast.excepthandler, ast.match_case)
_FOLDED = (ast.expr_context, ast.operator, ast.unaryop, ast.boolop, ast.cmpop)


def _children(node):
    return (child for child in ast.iter_child_nodes(node) if not isinstance(child, _FOLDED))


def _label(node):
    """The class of a node with what it holds that is no node, and its operators: ("Name", "str", "x"), ("BinOp",
    "Add")."""
    label = [type(node).__name__]
    for name in node._fields:
        if name in ("kind", "type_comment"):  # u"x" is "x"
            continue
        for value in _as_list(getattr(node, name, None)):
            if isinstance(value, _FOLDED) and not isinstance(value, ast.expr_context):
                label.append(type(value).__name__)
            elif value is not None and not isinstance(value, ast.AST):
                label += [type(value).__name__, value]  # 1, 1.0 and True differ
    return tuple(label)


def _as_list(value):
    return value if isinstance(value, list) else [value]


def tree_distance(a, b):
    """Tree edit distance of two Trees, unit costs: fewest insertions, deletions and renamings of nodes.

    Zhang and Shasha 1989: trees[i][j], the distance of the subtrees at i and j, from tables over forests, one table for
    each pair of key roots.
    """
    trees = [[0] * len(b.labels) for _ in a.labels]
    for i in a.keyroots:
        for j in b.keyroots:
            _fill(a, b, i, j, trees)
    return trees[-1][-1]


def _fill(a, b, i, j, trees):
    """The table of forest distances for key roots i and j; writes the distances of the subtrees that it meets."""
    start_a, start_b, left_b, labels_b = a.leftmost[i], b.leftmost[j], b.leftmost, b.labels
    above = list(range(j - start_b + 2))  # the row of the empty forest: insert everything
    rows = [above]
    for x in range(start_a, i + 1):
        row, whole, label, distances = [above[0] + 1], a.leftmost[x] == start_a, a.labels[x], trees[x]
        before = rows[a.leftmost[x] - start_a]  # the row of the forest left of the subtree at x
        for y in range(start_b, j + 1):
            column = y - start_b
            best = min(above[column + 1], row[column]) + 1
            if whole and left_b[y] == start_b:
                best = min(best, above[column] + (label != labels_b[y]))
                distances[y] = best
            else:
                best = min(best, before[left_b[y] - start_b] + distances[y])
            row.append(best)
        rows.append(row)
        above = row


# ---- graphs

class Graph(NamedTuple):
    """A program dependence graph: the head of each statement as a Tree, and edges (from, to, "control" or "data")."""
    nodes: list[Tree]
    edges: frozenset


def dependence_graph(module):
    """The Graph of an `ast.Module`, or None beyond MAX_STATEMENTS.

    Control edges lead from a statement to those in its body; data edges from a statement that defines a name to those
    that may read that value. Writing to an attribute or an item defines the name it belongs to. Scopes are not told
    apart beyond the order in which names are defined.
    """
    statements = [node for node in ast.walk(module) if isinstance(node, (ast.stmt, ast.excepthandler))]
    if len(statements) > MAX_STATEMENTS:
        return None
    numbers = {statement: number for number, statement in enumerate(statements)}
    edges = set()
    _follow(module.body, None, {}, numbers, edges, LOOP_DEPTH)
    return Graph([flatten(statement, body=False) for statement in statements], frozenset(edges))


def _follow(body, parent, defined, numbers, edges, loops):
    """Adds the edges of a block; `defined` maps a name to the statements whose value it may hold, and moves on.

    A loop's body is followed twice, so that what one round defines reaches the next, but only `loops` levels deep.
    """
    for statement in body:
        number = numbers[statement]
        if parent is not None:
            edges.add((parent, number, "control"))
        reads, writes = _reads_and_writes(statement)
        edges.update((source, number, "data") for name in reads for source in defined.get(name, ()) if source != number)
        defined |= {name: {number} for name in writes}
        blocks = [block for name in ("body", "handlers", "orelse", "finalbody")
                  if (block := getattr(statement, name, None))]
        blocks += [case.body for case in getattr(statement, "cases", ())]
        is_loop = isinstance(statement, (ast.For, ast.AsyncFor, ast.While))
        for block in blocks * (2 if is_loop and loops else 1):
            before = dict(defined)
            _follow(block, number, defined, numbers, edges, max(loops - is_loop, 0))
            if not isinstance(statement, (ast.With, ast.AsyncWith)):  # the block may have been skipped
                for name, sources in before.items():
                    defined[name] = defined[name] | sources


def _reads_and_writes(statement):
    """The names that the head of a statement reads, and those it defines."""
    reads, writes, local = set(), set(), set()
    stack = [statement]
    while stack:
        node = stack.pop()
        stack += [child for child in ast.iter_child_nodes(node) if not isinstance(child, _BODIES)]
        if isinstance(node, ast.Name):
            (reads if isinstance(node.ctx, ast.Load) else writes).add(node.id)
        elif isinstance(node, (ast.Attribute, ast.Subscript)) and not isinstance(node.ctx, ast.Load):
            writes |= {name.id for name in ast.walk(node.value) if isinstance(name, ast.Name)}
        elif isinstance(node, ast.arg):
            writes.add(node.arg)
        elif isinstance(node, ast.alias):
            writes.add(node.asname or node.name.split(".")[0])
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.ExceptHandler)) and node.name:
            writes.add(node.name)
        elif isinstance(node, (ast.comprehension, ast.Lambda)):
            bound = node.target if isinstance(node, ast.comprehension) else node.args
            local |= {name.id for name in ast.walk(bound) if isinstance(name, ast.Name)}
            local |= {name.arg for name in ast.walk(bound) if isinstance(name, ast.arg)}
    if isinstance(statement, ast.AugAssign) and isinstance(statement.target, ast.Name):
        reads.add(statement.target.id)
    return reads - local, writes - local


class _Mapping(NamedTuple):
    """The first nodes of one graph mapped to nodes of another (None: deleted): cost so far, and edges between them."""
    targets: tuple
    cost: float
    edges_a: int
    edges_b: int


def graph_distance(costs, edges_a, edges_b):
    """Edit distance of two graphs, or None where it would take more than MAX_EXPANSIONS.

    Args: costs[i][j]: of replacing node i of the first graph by node j of the second, at most 1. edges: sets of (from,
        to, kind) between different nodes. Inserting or deleting a node or an edge costs 1; edges are not replaced.
    A* over partial mappings (Riesen, Fankhauser and Bunke 2007): nodes are mapped one after the other, the mapping with
    the least cost plus bound goes on first, and the first complete one is the cheapest, since the bound never says too
    much.
    """
    n, m = len(costs), len(costs[0])
    pairs_a, pairs_b = _by_pair(edges_a), _by_pair(edges_b)
    cheapest = [sum(min(1, *row) for row in costs[i:]) for i in range(n + 1)]  # of nodes i, i + 1, ..., at least

    def bound(mapping):
        i = len(mapping.targets)
        used = i - mapping.targets.count(None)
        nodes = max(abs((n - i) - (m - used)), cheapest[i])  # of a complete mapping m - used: all that is left is inserted
        edges = (len(edges_a) - mapping.edges_a) - (len(edges_b) - mapping.edges_b)
        return nodes + abs(edges)

    empty = _Mapping((), 0, 0, 0)
    heap, serial = [(bound(empty), 0, 0, empty)], 0  # ties: the longer mapping, then the older
    for _ in range(MAX_EXPANSIONS):
        _, _, _, mapping = heapq.heappop(heap)
        i = len(mapping.targets)
        if i == n:
            return mapping.cost + bound(mapping)
        for j in [*(j for j in range(m) if j not in mapping.targets), None]:
            longer, serial = _extended(mapping, j, costs, pairs_a, pairs_b), serial + 1
            heapq.heappush(heap, (longer.cost + bound(longer), -i, serial, longer))
    return None


def _extended(mapping, j, costs, pairs_a, pairs_b):
    """The next node mapped to j too; edges to the nodes before it that have no partner are deleted or inserted."""
    i = len(mapping.targets)
    cost, edges_a, edges_b = mapping.cost + (1 if j is None else costs[i][j]), mapping.edges_a, mapping.edges_b
    for k, l in enumerate(mapping.targets):
        ours, theirs = pairs_a.get((i, k), _NONE), pairs_b.get((j, l), _NONE)  # a pair with None in it has no edges
        cost += len(ours ^ theirs)
        edges_a, edges_b = edges_a + len(ours), edges_b + len(theirs)
    return _Mapping((*mapping.targets, j), cost, edges_a, edges_b)


_NONE = frozenset()


def _by_pair(edges):
    """(i, k) -> the edges between i and k as a set of (kind, whether it starts at i), for both orders of the pair."""
    pairs = {}
    for source, target, kind in edges:
        pairs.setdefault((source, target), set()).add((kind, True))
        pairs.setdefault((target, source), set()).add((kind, False))
    return pairs


# ---- quality without a reference

QUALITY_WEIGHTS = {"syntax": 0.4, "complexity": 0.2, "style": 0.2, "execution": 0.2}
SIMPLE = 10  # McCabe's limit
MAX_LINE = 79


def ruby_quality(code, executes=None):
    """A composite of one program's quality: {"ruby_quality", "syntax", "complexity", "style", "execution"}, in [0, 1].

    Args: code: str. executes: True or False, or the share of checks passed, of a program that really was run in the
        sandbox; None where nothing was run. Nothing is guessed: "execution" is then None.

        part         weight   is
        syntax       40 %     1 if Python parses the text and it holds a statement, else 0
        complexity   20 %     min(1, 10 / c), c McCabe's cyclomatic complexity: 1 + branches, loops, conditions (see
                              `cyclomatic_complexity`); no worse than 1 up to his limit of 10
        style        20 %     share of ten rules of PEP 8 that hold (see `style_faults`)
        execution    20 %     `executes`

    Text without syntax has no complexity and no style: both are 0. "ruby_quality" is the weighted sum; without
    execution the other weights are scaled to sum to 1: 50, 25, 25 % (`quality_weights` says which were used).
    Raises: InputError for a non-string, or `executes` outside [0, 1].
    """
    tree = parse(inputs.text(code, "code"))
    parts = {"syntax": 0.0, "complexity": 0.0, "style": 0.0, "execution": _share(executes)}
    if tree is not None and tree.body:
        faults = style_faults(code, tree)
        parts |= {"syntax": 1.0, "complexity": min(1.0, SIMPLE / cyclomatic_complexity(tree)),
                  "style": 1 - sum(faults.values()) / len(faults)}
    total = sum(weight * parts[name] for name, weight in quality_weights(executes).items())
    return {"ruby_quality": total, **parts}


def quality_weights(executes=None):
    """The weights that `ruby_quality` uses: without execution its weight is left out and the others sum to 1."""
    if executes is not None:
        return dict(QUALITY_WEIGHTS)
    rest = {name: weight for name, weight in QUALITY_WEIGHTS.items() if name != "execution"}
    return {name: weight / sum(rest.values()) for name, weight in rest.items()}


def _share(executes):
    if executes is not None and not (isinstance(executes, (bool, int, float)) and 0 <= executes <= 1):
        raise InputError(f"executes={executes!r}: pass True, False or a share of passed checks; None where nothing ran")
    return None if executes is None else float(executes)


def cyclomatic_complexity(tree):
    """1 + the decisions of an `ast` tree: if, for, while, except, assert, case, a if b else c, each `for` and `if` of a
    comprehension, each further operand of and / or. Source: McCabe 1976."""
    decisions = 0
    for node in ast.walk(tree):
        if isinstance(node, (ast.If, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.Assert, ast.IfExp,
                             ast.match_case)):
            decisions += 1
        elif isinstance(node, ast.comprehension):
            decisions += 1 + len(node.ifs)
        elif isinstance(node, ast.BoolOp):
            decisions += len(node.values) - 1
    return 1 + decisions


_SNAKE, _CAPS = re.compile(r"_*[^A-Z]*|[A-Z0-9_]+"), re.compile(r"_*[A-Z][^_]*")


def style_faults(code, tree):
    """{rule: whether `code` breaks it} for ten rules of PEP 8 that a text and its tree show."""
    lines, nodes = code.split("\n"), list(ast.walk(tree))
    starts = Counter(node.lineno for node in nodes if isinstance(node, ast.stmt))
    defined = [node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    defined += [node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return {
        "line longer than 79 characters": any(len(line) > MAX_LINE for line in lines),
        "whitespace at the end of a line": any(line != line.rstrip() for line in lines),
        "tab in the indentation": any("\t" in line[:len(line) - len(line.lstrip())] for line in lines),
        "indentation not by four": any(node.col_offset % 4 for node in nodes if isinstance(node, ast.stmt)
                                       and starts[node.lineno] == 1),
        "two statements on one line": any(count > 1 for count in starts.values()),
        "comparison with None, True or False by ==": any(_compares_singleton(node) for node in nodes),
        "except without a class": any(isinstance(node, ast.ExceptHandler) and node.type is None for node in nodes),
        "import *": any(isinstance(node, ast.alias) and node.name == "*" for node in nodes),
        "lambda bound to a name": any(isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda)
                                      and isinstance(node.targets[0], ast.Name) for node in nodes),
        "name not in the usual case": any(not _SNAKE.fullmatch(name) for name in defined) or any(
            not _CAPS.fullmatch(node.name) for node in nodes if isinstance(node, ast.ClassDef)),
    }


def _compares_singleton(node):
    return isinstance(node, ast.Compare) and any(
        isinstance(operation, (ast.Eq, ast.NotEq)) and isinstance(value, ast.Constant) and any(
            value.value is singleton for singleton in (None, True, False))
        for operation, value in zip(node.ops, node.comparators))
