"""data/nano: the files equal a fresh generation, every check holds, and nothing of one split is in another."""

import ast
import builtins
import importlib.util
import json
import keyword
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path
from string import Template

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "data" / "nano"
SPLITS = {"train": 6000, "validation": 500, "test": 600, "test_hard": 300}


def load_generator():
    spec = importlib.util.spec_from_file_location("nano_generate", FOLDER / "generate.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses looks its module up
    spec.loader.exec_module(module)
    return module


nano = load_generator()


@pytest.fixture(scope="module")
def rows():
    """Split -> its rows, as committed."""
    return {s: [json.loads(line) for line in (FOLDER / f"{s}.jsonl").read_text("utf-8").splitlines()] for s in SPLITS}


@pytest.fixture(scope="module")
def all_rows(rows):
    return [row for split in rows.values() for row in split]


def run(check, snippet):
    """What a reader of README.md would do with a check."""
    scope = {}
    exec(check["setup"], scope)
    if "expression" in check:
        exec(snippet, scope)
    return eval(check.get("expression", snippet), scope)


def strict(intent):
    """An intent as a reader might retype it: lower case, no backticks or quotes, single spaces."""
    return " ".join(re.sub("[`'\"]", "", intent.lower()).split())


# ----------------------------------------------------------------------------------------------------
# The files


def test_files_equal_a_fresh_generation():
    """Byte for byte, in a process with another hash seed."""
    command = [sys.executable, str(FOLDER / "generate.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONHASHSEED": "17", "LC_ALL": "C"})
    assert done.returncode == 0, done.stderr


def test_check_names_the_file_that_differs(tmp_path, monkeypatch):
    monkeypatch.setattr(nano, "FOLDER", tmp_path)
    monkeypatch.setattr(nano, "rendered", lambda: {"train.jsonl": "{}\n"})
    monkeypatch.setattr(sys, "argv", ["generate.py", "--check"])
    with pytest.raises(SystemExit, match="train.jsonl differs"):
        nano.main()
    (tmp_path / "train.jsonl").write_text("{}\n")
    nano.main()


def test_counts_ids_and_keys(rows):
    for split, n in SPLITS.items():
        assert len(rows[split]) == n
        assert [row["id"] for row in rows[split]] == [f"nano-{split}-{i:04d}" for i in range(n)]
        for row in rows[split]:
            assert list(row) == ["id", "family", "intent", "snippet", "checks"]
            assert 2 <= len(row["checks"]) <= 3
            assert all(set(check) - {"expression"} == {"setup", "value"} for check in row["checks"])


# ----------------------------------------------------------------------------------------------------
# Checks


def test_every_check_holds(all_rows):
    for row in all_rows:
        for check in row["checks"]:
            value = run(check, row["snippet"])
            assert repr(value) == check["value"], row
            literal = ast.literal_eval(check["value"])  # a plain builtin that survives its repr
            assert type(literal) is type(value) and literal == value and not isinstance(value, (set, frozenset)), row


def test_setups_bind_plain_literals_under_the_names_of_the_snippet(all_rows):
    for row in all_rows[::4]:
        used = {node.id for node in ast.walk(ast.parse(row["snippet"])) if isinstance(node, ast.Name)}
        for node in ast.parse(row["checks"][0]["setup"]).body:
            if isinstance(node, ast.Import):
                assert node.names[0].name in ("collections", "datetime", "math", "re")
            elif not ast.unparse(node.value).startswith("datetime.date("):
                ast.literal_eval(node.value)
            assert isinstance(node, ast.Import) or {target.id for target in node.targets} <= used


def test_hardly_any_row_has_one_answer_for_all_its_checks(all_rows):
    """A constant answer must fail: True on each of a row's checks would reward always saying True."""
    same = [row for row in all_rows if len({check["value"] for check in row["checks"]}) == 1]
    assert len(same) < 0.005 * len(all_rows), Counter(row["family"] for row in same)


SWAPS = {
    ast.Gt: ast.Lt, ast.Lt: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.LtE: ast.GtE, ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr,
}
CALLS = {"max": "min", "min": "max", "sum": "len", "len": "sum", "all": "any", "upper": "lower", "title": "upper",
         "startswith": "endswith", "endswith": "startswith", "count": "find", "sorted": "list", "append": "extend"}


def mutants(snippet):
    """(kind, mutated snippet): a constant, variable, operator or called name changed at one place."""
    size = len(list(ast.walk(ast.parse(snippet))))
    names = {n.id for n in ast.walk(ast.parse(snippet)) if isinstance(n, ast.Name)} - set(dir(builtins))
    for place in range(size):
        tree = ast.parse(snippet)
        node = list(ast.walk(tree))[place]
        kind = "operator"
        if isinstance(node, ast.Constant) and type(node.value) is int:
            kind, node.value = "constant", node.value + 1
        elif isinstance(node, ast.Constant) and type(node.value) is str:
            kind, node.value = "constant", "qz"
        elif isinstance(node, ast.Name) and node.id in names and len(names) > 1:
            kind, node.id = "variable", min(names - {node.id})
        elif isinstance(node, ast.Name) and node.id in CALLS:
            node.id = CALLS[node.id]
        elif isinstance(node, ast.Attribute) and node.attr in CALLS:
            node.attr = CALLS[node.attr]
        elif isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
            node.ops = [SWAPS[type(node.ops[0])]()]
        elif isinstance(node, ast.BinOp) and type(node.op) in SWAPS:
            node.op = SWAPS[type(node.op)]()
        elif isinstance(node, ast.UnaryOp):
            node.op = ast.UAdd()
        else:
            continue
        yield kind, ast.unparse(tree)


def holds(row, snippet):
    """Whether `snippet` passes all checks of the row; whatever it raises is a failure."""
    try:
        return all(repr(run(check, snippet)) == check["value"] for check in row["checks"])
    except Exception:
        return False


def test_checks_detect_mutations(rows):
    """Of one-place changes of a constant, a variable or an operator, at least 90 % of each kind fail a check.

    Many of the rest are equal on any input: `len([xs for x in xs if x > 2])` counts as well as the reference.
    """
    sample = random.Random(0).sample(rows["train"], 500) + rows["test_hard"]
    tried, caught = Counter(), Counter()
    for row in sample:
        for kind, mutant in mutants(row["snippet"]):
            tried[kind] += 1
            caught[kind] += not holds(row, mutant)
    for kind in sorted(tried):
        print(f"{kind}: {caught[kind]} of {tried[kind]} mutants detected ({caught[kind] / tried[kind]:.1%})")
    assert set(tried) == {"constant", "variable", "operator"} and min(tried.values()) > 300
    assert all(caught[kind] >= 0.9 * tried[kind] for kind in tried)


# ----------------------------------------------------------------------------------------------------
# Intents and snippets


def test_snippets_are_canonical_and_short(all_rows):
    for row in all_rows:
        assert ast.unparse(ast.parse(row["snippet"])) == row["snippet"]
        assert len(row["snippet"]) <= 80 and "\n" not in row["snippet"]
        assert 3 <= len(row["intent"].split()) <= 25 and row["intent"] == " ".join(row["intent"].split(" "))


def test_an_intent_names_every_variable(all_rows):
    for row in all_rows:
        names = re.findall(r"^(\w+) = ", row["checks"][0]["setup"], flags=re.M)
        assert all(re.search(rf"\b{name}\b", row["intent"]) for name in names), row


def test_no_intent_occurs_twice(all_rows):
    """Stronger than "the same intent always has the same snippet", and than no overlap between splits."""
    snippets = defaultdict(set)
    for row in all_rows:
        snippets[strict(row["intent"])].add((row["id"], row["snippet"]))
    assert [found for found in snippets.values() if len(found) > 1] == []


def test_no_snippet_is_in_two_splits_or_two_families(rows, all_rows):
    snippets = {split: {row["snippet"] for row in rows[split]} for split in SPLITS}
    for a, b in combinations(SPLITS, 2):
        assert not snippets[a] & snippets[b], (a, b)
    assert len({(row["snippet"], row["family"]) for row in all_rows}) == len({row["snippet"] for row in all_rows})


# ----------------------------------------------------------------------------------------------------
# Families and pairs


def test_families_are_many_balanced_and_in_every_split(rows):
    counts = Counter(row["family"] for row in rows["train"])
    assert set(nano.FAMILIES) <= set(counts) and len(nano.FAMILIES) >= 60
    assert max(counts.values()) <= 3 * min(counts.values())
    for split in ("validation", "test"):
        assert {row["family"] for row in rows[split]} == set(counts)


def test_families_have_distinct_phrasings():
    """No two families share a phrasing, whatever stands in the slots."""
    blind = defaultdict(set)
    for fam in nano.FAMILIES.values():
        assert len(set(fam.phrasings)) >= 5, fam.name
        for phrasing in fam.phrasings:
            for template in (phrasing, fam.snippet):
                assert set(Template(template).get_identifiers()) == set(fam.slots), template
            blind[re.sub(r"\$\w+", "$", phrasing)].add(fam.name)
    assert {text: names for text, names in blind.items() if len(names) > 1} == {}


def test_names_shadow_nothing_and_kinds_are_all_used():
    bound = set()
    for fam in nano.FAMILIES.values():
        tree = ast.parse(nano.render(fam.snippet, nano.draw_fill(fam, random.Random(0))))
        bound |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        bound |= {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}
    assert bound >= {"x", "kv"}
    for kind, names in nano.NAMES.items():
        assert len(set(names)) == len(names)
        for name in names:
            assert name.isidentifier() and not keyword.iskeyword(name) and not hasattr(builtins, name), (kind, name)
            assert name not in bound | {"collections", "datetime", "math", "re"}, (kind, name)
    used = {kind for fam in nano.FAMILIES.values() for kind in fam.slots.values()}
    assert used == set(nano.NAMES) | set(nano.CONSTANTS)


def test_hard_pairs_are_unseen_but_their_halves_are_not(rows):
    trained = {row["family"] for row in rows["train"] if "+" in row["family"]}
    hard = {row["family"] for row in rows["test_hard"]}
    assert len(trained) >= 40 and len(hard) >= 20 and all("+" in name for name in hard)
    assert not hard & {row["family"] for split in ("train", "validation", "test") for row in rows[split]}
    for half in (0, 1):
        assert {name.split("+")[half] for name in hard} <= {name.split("+")[half] for name in trained}
    assert {half for name in hard for half in name.split("+")} <= set(nano.FAMILIES)


def test_a_pair_puts_one_snippet_into_the_other():
    pair = nano.compose("sum", "even")
    assert pair.snippet == "sum([x for x in $xs if x % 2 == 0])" and pair.slots == {"xs": "numbers"}
    assert "get the sum of the even numbers in list `$xs`" in pair.phrasings
    pair = nano.compose("join", "split")
    assert pair.snippet == "$sep.join($s.split($by))" and pair.slots == {"s": "text", "by": "sep", "sep": "sep"}


def test_a_family_without_variety_is_refused_by_name():
    """One name and five phrasings cannot give 57 different intents."""
    fam = nano.Family("tiny", "abs($n)", {"n": "day"}, ("a $n",) * 5)
    with pytest.raises(ValueError, match="tiny"):
        nano.family_rows(fam, {"train": 80, "validation": 2, "test": 2}, {}, set())
