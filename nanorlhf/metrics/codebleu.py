"""CodeBLEU for Python: n-grams, n-grams with keywords, subtrees and data flow, each on its own and weighed together.

    component              is                                                             against codebleu 0.7.0
    ngram_match            BLEU-4 on whitespace tokens, a zero count becomes 0.1          equal
    weighted_ngram_match   clipped n-gram recall; keywords weigh 1, other tokens 0.2      equal, faults included
    syntax_match           share of the reference's subtrees found in the prediction      proxy: trees from `ast`
    dataflow_match         share of the reference's data-flow edges found, clipped        proxy: flow on those trees

The trees are drawn by `nanorlhf.metrics.syntax`; docs/METRICS.md has the measured agreement of the proxies.

Kept from the library, so that numbers compare: everything is pooled over the corpus (counts are summed, then divided),
and over all references of a prediction, of which none is chosen; the weighted part's brevity penalty takes every
reference to be 2 tokens long; snippets below four tokens lose n-gram points even where they equal the reference.

Deviations from the library:
- A data flow where nothing matches is 0 in the total too, where the library reads that 0 as 1. Where no reference has
  any data flow, dataflow_match is 1: nothing was there to be missed (the library: 0 on its own, 1 in the total).
- A string that begins a line is kept unless it stands alone; the library takes it for a docstring, and what is left of
  `' '.join(x)` no longer parses.
- Code that does not parse is one ERROR node over the pieces that do, and has the data flow of its tokens.
- Names of merged edges stand in order of appearance; in the library their order changes from process to process.
- The two sides of an assignment are matched part by part only where both are sequences of one length; the library
  compares the number of children of any two nodes. Loops nested beyond LOOP_DEPTH are followed once, not twice: its
  time doubles with each level.
- An empty corpus scores 0.

Sources: Ren et al. 2020, https://arxiv.org/abs/2009.10297; the library's arithmetic, github.com/k4black/codebleu 0.7.0.
"""

import math
from collections import Counter

from nanorlhf.errors import InputError
from nanorlhf.metrics import inputs
from nanorlhf.metrics.bleu import MAX_ORDER, bleu_counts, bleu_score, ngram_counts
from nanorlhf.metrics.syntax import Node, draw, leaves

COMPONENTS = ("ngram_match", "weighted_ngram_match", "syntax_match", "dataflow_match")
KEYWORDS = frozenset("""False None True and as assert async await break class continue def del elif else except finally
    for from global if import in is lambda nonlocal not or pass raise return try while with yield match case
    type""".split())
OTHER_WEIGHT = 0.2
ASSUMED_LENGTH = 2  # the library measures the pair (tokens, weights) instead of the tokens
LOOP_DEPTH = 3


def codebleu(predictions, references, weights=(0.25,) * 4):
    """CodeBLEU of a corpus: {"codebleu": weighted sum, and its four components by name}, each in [0, 1].

    Args: predictions: list of str. references: list of str, or of lists of str, per prediction. weights: of
        ngram_match, weighted_ngram_match, syntax_match, dataflow_match, in this order.
    Raises: InputError for lists of different lengths, non-strings, weights that are not four numbers.
    """
    predictions, references = inputs.corpus(predictions, references)
    if not isinstance(weights, (list, tuple)) or len(weights) != 4 or not all(
            isinstance(weight, (int, float)) for weight in weights):
        raise InputError(f"weights={weights!r}: pass four numbers, one for each of {', '.join(COMPONENTS)}")
    rows = [codebleu_counts(*pair) for pair in zip(predictions, references)]
    components = codebleu_components([sum(column) for column in zip(*rows)]) if rows else (0.0,) * 4
    total = sum(weight * component for weight, component in zip(weights, components))
    return {"codebleu": total, **dict(zip(COMPONENTS, components))}


def codebleu_counts(prediction, references):
    """One row for `codebleu_components`: a BLEU row, (matched, possible) weights of orders 1 to 4, their reference
    length, (matched, all) subtrees, (matched, all) data-flow edges."""
    prediction, references = prediction.strip(), [reference.strip() for reference in references]
    tokens, reference_tokens = prediction.split(), [reference.split() for reference in references]
    weighted = [sum(column) for column in zip(*(_weighted_recall(tokens, other) for other in reference_tokens))]
    found, row = structure(prediction), [0, 0, 0, 0]
    for subtrees, edges in map(structure, references):
        row[0] += sum(subtree in found[0] for subtree in subtrees.elements())
        row[1] += subtrees.total()
        row[2] += (found[1] & edges).total()
        row[3] += edges.total()
    return [*bleu_counts(reference_tokens, tokens), *weighted, ASSUMED_LENGTH, *row]


def codebleu_components(counts):
    """The four components from a summed row, so that a bootstrap need not count again."""
    cut = 2 + 2 * MAX_ORDER  # where the BLEU row ends
    weighted, (reference_length, subtrees, all_subtrees, edges, all_edges) = counts[cut:-5], counts[-5:]
    return (bleu_score(counts[:cut], smoothing="method1"),
            _weighted_score(counts[0], reference_length, weighted[::2], weighted[1::2]),
            subtrees / all_subtrees,
            edges / all_edges if all_edges else 1.0)


# ---- weighted n-grams

def _weighted_recall(tokens, reference):
    """[matched, possible] of orders 1 to 4 against one reference; an order it is too short for counts as 1 possible."""
    row = []
    for n in range(1, MAX_ORDER + 1):
        ours, theirs = ngram_counts(tokens, n), ngram_counts(reference, n)
        weights = {ngram: 1 if n > 1 or ngram[0] in KEYWORDS else OTHER_WEIGHT for ngram in theirs}
        row += [sum(weights[ngram] * min(count, ours[ngram]) for ngram, count in theirs.items()),
                max(1, sum(weights[ngram] * count for ngram, count in theirs.items()))]
    return row


def _weighted_score(length, reference_length, matched, possible):
    """BLEU's form, on recalls: exp(mean log) times the brevity penalty; a zero count becomes 0.1."""
    if matched[0] == 0 or length == 0:
        return 0.0
    mean = sum(math.log((m or 0.1) / p) for m, p in zip(matched, possible)) / MAX_ORDER
    return min(1.0, math.exp(1 - reference_length / length)) * math.exp(mean)


# ---- syntax

def structure(code):
    """(Counter of subtrees, Counter of data-flow edges) of a text; equal for equal texts, whatever they are."""
    tree = draw(code)
    subtrees = []
    _shape(tree, subtrees)
    return Counter(subtrees), data_flow(tree)


def _shape(node, subtrees):
    """The kinds of a node and all below it, as text; appends those of every node that has children to `subtrees`.

    Names, numbers and operators do not count, nor do leaves: CodeBLEU compares structure here.
    """
    if node.children is None:
        return node.kind
    shape = f"({node.kind} {' '.join([_shape(child, subtrees) for child in node.children])})"
    subtrees.append(shape)
    return shape


# ---- data flow

class _Flow:
    """Follows names through a drawn tree: items (name, order, relation, names it comes from, their orders).

    `defined` maps a name to the orders of the leaves that may have defined it. As in the library a "name" is the text
    of any leaf: attributes and keywords count, and so does a string once it was assigned to, as in df["a"] = 1.
    """

    def __init__(self):
        self.defined, self.loops = {}, 0

    def visit(self, node):
        """The items of a node; `defined` moves on."""
        if node.text is not None:
            return [self.leaf(node)]
        return getattr(self, node.kind, self.children)(node)

    def leaf(self, leaf):
        if leaf.text in self.defined:
            return leaf.text, leaf.order, "comesFrom", (leaf.text,), tuple(self.defined[leaf.text])
        if leaf.kind == "identifier":
            self.defined[leaf.text] = [leaf.order]
        return leaf.text, leaf.order, "comesFrom", (), ()

    def children(self, node):
        """Comprehension clauses first: they define what the body uses."""
        first = sorted(node.children or (), key=lambda child: child.kind != "for_in_clause")  # stable
        return [item for child in first for item in self.visit(child)]

    def bind(self, targets, values, relation="computedFrom"):
        """The leaves of `targets` now come from the leaves of `values`."""
        sources = leaves(values)
        names, orders = tuple([leaf.text for leaf in sources]), tuple([leaf.order for leaf in sources])
        items = [(leaf.text, leaf.order, relation, names, orders) for leaf in leaves(targets)]
        self.defined |= {leaf.text: [leaf.order] for leaf in leaves(targets)}
        return items

    def assignment(self, node):
        target, value = node.children[0], node.children[-1]
        if len(node.children) == 1 or value.kind == "type":  # x: int
            return []
        items = self.visit(value)
        return items + [item for pair in _paired(target, value) for item in self.bind(*pair)]

    augmented_assignment = for_in_clause = assignment

    def default_parameter(self, node):
        name, value = node.children
        return self.visit(value) + self.bind(name, value, "comesFrom")

    def if_statement(self, node):
        """Each branch starts from what was defined before; afterwards any of them may have run."""
        before, items, after = dict(self.defined), [], []
        for child in node.children:
            if child.kind in ("elif_clause", "else_clause"):
                after.append(self.defined)
                self.defined = dict(before)
            items += self.visit(child)
        may_skip = node.children[-1].kind != "else_clause"
        for other in [*after, *([before] if may_skip else [])]:
            self.defined = {name: sorted({*self.defined.get(name, ()), *other.get(name, ())})
                            for name in {**self.defined, **other}}
        return items

    def for_statement(self, node):
        target, value, *rest = node.children
        clause = Node("for_in_clause", (target, value))
        return self.loop([clause, *rest])

    def while_statement(self, node):
        return self.loop(node.children)

    def loop(self, children):
        """Twice, so that what one round defines reaches the next."""
        self.loops += 1
        rounds = 2 if self.loops <= LOOP_DEPTH else 1
        items = [item for _ in range(rounds) for child in children for item in self.visit(child)]
        self.loops -= 1
        return _merged(items, lambda item: item[:3])


def _paired(target, value):
    """a, b = c, d: a comes from c and b from d; anything else as a whole."""
    sequences = ("pattern_list", "tuple_pattern", "list_pattern"), ("expression_list", "tuple", "list")
    if target.kind in sequences[0] and value.kind in sequences[1] and len(target.children) == len(value.children):
        return zip(target.children, value.children)
    return [(target, value)]


def _merged(items, key):
    """Items of one key become one, with the sources of all, each once; an item alone stays as it is."""
    merged = {}
    for item in items:
        first = merged.setdefault(key(item), item)
        if first is not item:
            names, orders = (tuple(dict.fromkeys(first[i] + item[i])) for i in (3, 4))
            merged[key(item)] = (*first[:3], names, orders)
    return list(merged.values())


def data_flow(tree):
    """Counter of edges (variable, relation, variables it comes from); variables are numbered as they appear.

    A leaf without a source that is no source itself makes no edge.
    """
    items = sorted(_Flow().visit(tree), key=lambda item: item[1])
    linked = {order for item in items if item[4] for order in (item[1], *item[4])}
    numbers, edges = {}, Counter()
    for name, _, relation, names, _ in _merged([item for item in items if item[1] in linked], lambda item: item[1]):
        for each in (*names, name):
            numbers.setdefault(each, len(numbers))
        edges[numbers[name], relation, tuple([numbers[each] for each in names])] += 1
    return edges
