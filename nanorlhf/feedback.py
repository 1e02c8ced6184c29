"""Synthetic feedback: preference pairs from a policy's own samples and from mutated references.

A reward model learns what the pairs teach. Pairs of the reference against the policy's wrong answers show it the errors
that the policy makes; pairs against mutated references (another name, another constant, a neighbouring method) show it
errors that are one edit away from right. Every pair carries its provenance in `source`.
"""
import ast
import json
from pathlib import Path

from nanorlhf.metrics import exact_match

OPERATORS = [(ast.Add, ast.Sub, ast.Mult), (ast.FloorDiv, ast.Div, ast.Mod), (ast.Lt, ast.LtE, ast.Gt, ast.GtE),
             (ast.Eq, ast.NotEq), (ast.In, ast.NotIn), (ast.And, ast.Or)]


def preference_pairs(records, samples, rng, mutations=1, most=2):
    """Pairs (chosen: the reference, rejected: a wrong answer) of each record.

    Args:
        records: Records with a reference.
        samples: for each record, a list of the policy's responses; those that match the reference are not rejected.
        rng: random.Random.
        mutations: how many mutated references a record is given.
        most: at most so many sampled answers a record.
    Returns: list of dicts with prompt, chosen, rejected, source ("policy" or "mutation"), id.
    """
    names = sorted({name for record in records for name in _names(record.reference)})
    pairs = []
    for n, (record, responses) in enumerate(zip(records, samples)):
        wrong = [r for r in dict.fromkeys(responses) if not exact_match(r, record.reference)]
        mutated = {mutate(record.reference, names, rng) for _ in range(mutations)} - {None, *wrong}
        # A mutation comes out in ast.unparse's style; so must what it is set against, or quotes and spaces would tell them apart.
        rejected = [(record.reference, r, "policy") for r in wrong[:most]]
        rejected += [(ast.unparse(ast.parse(record.reference)), r, "mutation") for r in sorted(mutated)]
        pairs += [{"prompt": record.prompt, "chosen": chosen, "rejected": response, "source": source,
                   "id": f"{n if record.id is None else record.id}-{i}"} for i, (chosen, response, source) in enumerate(rejected)]
    return pairs


def mutate(code, names, rng, tries=8):
    """The code with one small error in it, or None where no edit was found.

    One node of the syntax tree changes: a name becomes another one, a number moves, a string becomes another, an
    operator its neighbour, two arguments trade places, a keyword argument goes. The result parses and is not equal to
    the code.
    """
    try:
        whole = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError):
        return None
    for _ in range(tries):
        tree = ast.parse(code)
        edits = [edit for node in ast.walk(tree) for edit in _edits(node, names)]
        if not edits:
            return None
        rng.choice(edits)(rng)
        mutated = ast.unparse(ast.fix_missing_locations(tree))
        if ast.dump(whole) != ast.dump(ast.parse(mutated)):
            return mutated
    return None


def _edits(node, names):
    """The ways to spoil one node in place, each a function of the random generator."""
    def other_name(rng):
        node.id = rng.choice(names)

    def other_number(rng):
        node.value += rng.choice([-2, -1, 1, 2, 5])

    def other_string(rng):
        words = [name for name in names if name != node.value] or [node.value + "_"]
        node.value = rng.choice(words) if len(node.value) > 1 else rng.choice([c for c in " ,.-_;:|/" if c != node.value])

    def other_operator(rng):
        old = node.ops[0] if isinstance(node, ast.Compare) else node.op
        family = next(f for f in OPERATORS if isinstance(old, f))
        new = rng.choice([kind for kind in family if not isinstance(old, kind)])()
        if isinstance(node, ast.Compare):
            node.ops[0] = new
        else:
            node.op = new

    def swap_arguments(rng):
        i = rng.randrange(len(node.args) - 1)
        node.args[i], node.args[i + 1] = node.args[i + 1], node.args[i]

    def drop_keyword(rng):
        node.keywords.pop(rng.randrange(len(node.keywords)))

    if isinstance(node, ast.Name) and names:
        yield other_name
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield other_number
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and names:
        yield other_string
    operator = node.ops[0] if isinstance(node, ast.Compare) else getattr(node, "op", None)
    if any(isinstance(operator, family) for family in OPERATORS):
        yield other_operator
    if isinstance(node, ast.Call) and len(node.args) > 1:
        yield swap_arguments
    if isinstance(node, ast.Call) and node.keywords:
        yield drop_keyword


def _names(code):
    """The identifiers a snippet uses; none if it does not parse."""
    try:
        return {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
    except (SyntaxError, ValueError, RecursionError):
        return set()


PAIR_FILES = ("preferences.jsonl", "preferences_validation.jsonl")  # in the reward model's run folder


def read_pairs(path):
    """Pairs as `write_pairs` wrote them."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def write_pairs(path, pairs):
    """Pairs as JSONL, which `nanorlhf.data.read` reads as preferences."""
    Path(path).write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs), encoding="utf-8")
