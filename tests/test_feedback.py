"""Synthetic feedback: mutations that parse and differ, and the rules by which pairs are made."""
import ast
import json
import random
from pathlib import Path

import pytest

from nanorlhf.data import Record, read
from nanorlhf.feedback import mutate, preference_pairs, write_pairs
from nanorlhf.metrics import exact_match

NANO = Path(__file__).resolve().parent.parent / "data" / "nano" / "validation.jsonl"
NAMES = ["names", "rows", "text", "x", "xs"]
KINDS = {  # code of which one node can be edited, and everything it may become
    "a": {"names", "rows", "text", "x", "xs"},
    "7": {"5", "6", "8", "9", "12"},
    "not 1.5": {"not -0.5", "not 0.5", "not 2.5", "not 3.5", "not 6.5"},
    "['word']": {f"[{name!r}]" for name in NAMES},  # in a list: by itself it would be a docstring
    "[',']": {f"[{c!r}]" for c in " .-_;:|/"},
}


def snippets():
    records = read(NANO)
    return [record.reference for record in records[::max(1, len(records) // 150)]]


# -------------------------------------------------------------------------------------------------------------- mutate

def test_mutations_parse_and_differ():
    """On 150 snippets of the validation split, five mutations each: all parse, none is equal in its syntax tree."""
    rng, found = random.Random(0), 0
    for code in snippets():
        for _ in range(5):
            mutated = mutate(code, NAMES, rng)
            if mutated is not None:
                found += 1
                assert ast.dump(ast.parse(mutated)) != ast.dump(ast.parse(code)), (code, mutated)
                assert not exact_match(mutated, code), (code, mutated)
    assert found > 0.95 * 5 * len(snippets()), "nearly every snippet should have an edit"


def test_mutations_depend_on_the_generator_alone():
    first, again, other = ([mutate(code, NAMES, rng) for code in snippets()]
                           for rng in (random.Random(1), random.Random(1), random.Random(2)))
    assert first == again != other


@pytest.mark.parametrize("code, allowed", KINDS.items(), ids=KINDS)
def test_single_edits_by_hand(code, allowed):
    """With one node to edit, 60 mutations are within what the edit allows, and reach all of it."""
    rng = random.Random(0)
    assert {mutate(code, NAMES, rng) for _ in range(60)} == allowed


@pytest.mark.parametrize("code, allowed", [
    ("a + b", {"a - b", "a * b"}), ("a < b", {"a <= b", "a > b", "a >= b"}), ("a == b", {"a != b"}),
    ("a in b", {"a not in b"}),
    ("a and b", {"a or b"}), ("a // b", {"a / b", "a % b"}), ("f(a, b)", {"f(b, a)"}), ("f(a, key=b)", {"f(a)"}),
])
def test_operators_arguments_and_keywords(code, allowed):
    """Without names to choose from, only the operator, the order of arguments or the keyword can change."""
    rng = random.Random(0)
    assert {mutate(code, [], rng) for _ in range(40)} == allowed


@pytest.mark.parametrize("code", ["def f(:", "x = ", "a b c", "\0", "(" * 500], ids=range(5))
def test_what_does_not_parse_has_no_mutation(code):
    assert mutate(code, NAMES, random.Random(0)) is None


@pytest.mark.parametrize("code", ["", "pass", "True", "None"])
def test_nothing_to_edit_gives_none(code):
    assert mutate(code, NAMES, random.Random(0)) is None


def test_one_name_cannot_become_another():
    """The only name known is the one in use: eight tries, then None rather than a copy."""
    assert mutate("x", ["x"], random.Random(0)) is None


def test_the_arguments_stay_as_they_are():
    names = list(NAMES)
    mutate("f(a, b) + 1", names, random.Random(0))
    assert names == NAMES


# ----------------------------------------------------------------------------------------------------- preference pairs

RECORDS = [Record("add", reference="a + b", id="7"), Record("length", reference="len(xs)", id="8")]


def test_pairs_by_hand():
    """Three wrong answers, one of them twice, one right but for white space, `most` = 2 -> two pairs, in order."""
    samples = [["a - b", "a+b", "a - b", "b", "c"], ["len(xs)"]]
    pairs = preference_pairs(RECORDS, samples, random.Random(0), mutations=0, most=2)
    assert pairs == [
        {"prompt": "add", "chosen": "a + b", "rejected": "a - b", "source": "policy", "id": "7-0"},
        {"prompt": "add", "chosen": "a + b", "rejected": "b", "source": "policy", "id": "7-1"}]


def test_unparsable_and_empty_answers_are_rejected_ones():
    pairs = preference_pairs(RECORDS[:1], [["a +", ""]], random.Random(0), mutations=0)
    assert [pair["rejected"] for pair in pairs] == ["a +", ""]


def test_mutations_make_pairs_too():
    """The names come from all references; a right policy leaves the mutations alone to learn from."""
    pairs = preference_pairs(RECORDS, [["a + b"], ["len(xs)"]], random.Random(0), mutations=3)
    assert pairs and all(pair["source"] == "mutation" for pair in pairs)
    for pair in pairs:
        assert not exact_match(pair["rejected"], pair["chosen"])
        names = {node.id for node in ast.walk(ast.parse(pair["rejected"])) if isinstance(node, ast.Name)}
        assert names <= {"a", "b", "len", "xs"}
    assert len({pair["id"] for pair in pairs}) == len(pairs), "ids are unique"
    assert len({(pair["prompt"], pair["rejected"]) for pair in pairs}) == len(pairs), "no mutation twice"


def test_pairs_are_deterministic():
    samples = [["b", "c"], ["d"]]
    first, again = (preference_pairs(RECORDS, samples, random.Random(5), mutations=3) for _ in range(2))
    assert first == again


def test_no_pair_twice():
    """A mutation that the policy also wrote teaches once: the policy sampled "1 or 1", also a mutation."""
    pairs = preference_pairs([Record("p", reference="1 and 1", id="1")], [["1 or 1"]], random.Random(0), mutations=40)
    rejected = [pair["rejected"] for pair in pairs]
    assert "1 or 1" in rejected and len(rejected) == len(set(rejected))


def test_rows_without_ids_still_make_pairs_that_can_be_read(tmp_path):
    """Most data have no ids; `read` refuses an id that occurs twice, so the pairs of two rows must not share one."""
    records = [Record("add", reference="a + b"), Record("length", reference="len(xs)")]
    pairs = preference_pairs(records, [["b"], ["xs"]], random.Random(0))
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    assert len(read(tmp_path / "pairs.jsonl", "preference")) == len(pairs) > 2


def test_references_that_do_not_parse_still_make_policy_pairs():
    pairs = preference_pairs([Record("p", reference="print 'x'", id="1")], [["print 'y'", "print 'x'"]],
                             random.Random(0))
    assert [(pair["rejected"], pair["source"]) for pair in pairs] == [("print 'y'", "policy")]


def test_written_pairs_are_read_back(tmp_path):
    pairs = preference_pairs(RECORDS, [["é = 'ß'\nx"], ["", "y"]], random.Random(0))
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    records = read(tmp_path / "pairs.jsonl", "preference")
    assert [(r.prompt, r.chosen, r.rejected, r.id) for r in records] == \
        [(p["prompt"], p["chosen"], p["rejected"], p["id"]) for p in pairs]
    assert [json.loads(line)["source"] for line in (tmp_path / "pairs.jsonl").read_text("utf-8").splitlines()] == \
        [p["source"] for p in pairs]
