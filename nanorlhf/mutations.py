"""Wrong answers to set against a reference: a policy's own, and mutations of the reference.

The policy's wrong answers show a reward model the errors that it makes; mutations (another name, another constant, a
neighbouring operator) show errors that are one edit away from right.

An answer that differs from the reference is not wrong for that: `max(a, b)` may become `max(b, a)`. Where rows have
checks, `passing` runs them, and what passes is not rejected.
"""
import ast

from nanorlhf.metrics import exact_match
from nanorlhf.metrics.execution import passes_checks
from nanorlhf.metrics.match import UNPARSABLE, parse

OPERATORS = [(ast.Add, ast.Sub, ast.Mult), (ast.FloorDiv, ast.Div, ast.Mod), (ast.Lt, ast.LtE, ast.Gt, ast.GtE),
             (ast.Eq, ast.NotEq), (ast.In, ast.NotIn), (ast.And, ast.Or)]


def preference_pairs(records, samples, rng, mutations=1, most=2, passes=None):
    """Pairs (chosen: the reference, rejected: a wrong answer) of each record.

    Args:
        records: Records with a reference.
        samples: for each record, a list of the policy's responses; those that match the reference are not rejected.
        rng: random.Random.
        mutations: how many mutated references a record is given.
        most: at most so many sampled answers a record.
        passes: a callable (codes, records) -> list of True, False or None (not known), such as `passing(box)`, called
            once. What it says True of is not wrong, and so not rejected. None: nothing is run.
    Returns: list of dicts with prompt, chosen, rejected, source ("policy" or "mutation"), id.
    """
    names = sorted({name for record in records for name in identifiers(record.reference)})
    wrong = [[r for r in dict.fromkeys(responses) if not exact_match(r, record.reference)]
             for record, responses in zip(records, samples)]
    mutated = [[code for code in mutations_of(record.reference, names, rng, mutations) if code not in some]
               for record, some in zip(records, wrong)]
    if passes is not None:
        verdicts = each(passes, [some + more for some, more in zip(wrong, mutated)], records)
        wrong, mutated = ([[code for code in some if known[code] is not True]
                           for some, known in zip(answers, verdicts)] for answers in (wrong, mutated))
    pairs = []
    for name, record, some, more in zip(row_names(records), records, wrong, mutated):
        rejected = [(record.reference, response, "policy") for response in some[:most]]
        # A mutation comes out in ast.unparse's style; so must what it is set against, or quotes would tell them apart.
        rejected += [(ast.unparse(parse(record.reference)), response, "mutation") for response in more]
        pairs += [{"prompt": record.prompt, "chosen": chosen, "rejected": response, "source": source,
                   "id": f"{name}-{i}"} for i, (chosen, response, source) in enumerate(rejected)]
    return pairs


def passing(box):
    """A `passes`: True where a code passes all checks of its record, None where it has none. box: an open Sandbox."""
    def passes(codes, records):
        return passes_checks(box, codes, [record.checks for record in records])
    return passes


def each(function, answers, records):
    """What function(codes, records) says of all answers (a list a record, none twice): {answer: value} for each record.

    The function is called once: code is run, and models are asked, in batches.
    """
    codes = [code for some in answers for code in some]
    found = iter(function(codes, [record for record, some in zip(records, answers) for _ in some]))
    return [{code: next(found) for code in some} for some in answers]


def row_names(records):
    """A name for each row, each once: its id, or its number where it has none or shares it (as mined rows may)."""
    names, taken = [], set()
    for number, record in enumerate(records):
        name = str(number) if record.id is None else record.id
        names.append(f"{name}.{number}" if name in taken else name)
        taken.add(names[-1])
    return names


# ---- Mutations

def mutate(code, names, rng, tries=8):
    """The code with one small error in it, or None where no edit was found.

    One node of the syntax tree changes: a name becomes another one, a number moves, a string becomes another, an
    operator its neighbour, two arguments trade places, a keyword argument goes. The result parses and is not equal to
    the code.
    """
    if parse(code) is None:
        return None
    try:
        whole = ast.dump(ast.parse(ast.unparse(parse(code))))
    except UNPARSABLE:  # nested so deep that it cannot be written again
        return None
    for _ in range(tries):
        tree = parse(code)
        edits = [edit for node in ast.walk(tree) for edit in _edits(node, names)]
        if not edits:
            return None
        rng.choice(edits)(rng)
        try:
            mutated = ast.unparse(ast.fix_missing_locations(tree))
            if whole != ast.dump(ast.parse(mutated)):
                return mutated
        except UNPARSABLE:  # the 1 of `case -1:` may become -1, and `case --1:` is no pattern
            continue
    return None


def mutations_of(code, names, rng, count):
    """The different results of `count` calls of `mutate`, sorted."""
    return sorted({mutate(code, names, rng) for _ in range(count)} - {None})


def _edits(node, names):
    """The ways to spoil one node in place, each a function of the random generator."""
    def other_name(rng):
        node.id = rng.choice(names)

    def other_number(rng):
        node.value += rng.choice([-2, -1, 1, 2, 5])

    def other_string(rng):
        words = [name for name in names if name != node.value] or [node.value + "_"]
        marks = [mark for mark in " ,.-_;:|/" if mark != node.value]
        node.value = rng.choice(words if len(node.value) > 1 else marks)

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


def identifiers(code):
    """The identifiers a snippet uses; none if it does not parse."""
    return {node.id for node in ast.walk(parse(code) or ast.Module()) if isinstance(node, ast.Name)}
