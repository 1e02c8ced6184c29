"""Synthetic feedback: mutations that parse and differ, the rules by which pairs are made, ratings, the command line."""
import ast
import dataclasses
import errno
import json
import math
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

import train_reward
from nanorlhf import feedback
from nanorlhf.config import options, parse
from nanorlhf.data import Record, load_splits, open_data, read
from nanorlhf.errors import InputError
from nanorlhf.evaluation import answer
from nanorlhf.feedback import (best_and_worst, comment, digit_tokens, format_rating, rate,
                               rating_from, read_pairs, write_pairs)
from nanorlhf.gpt2 import GPT2, GPT2Config
from nanorlhf.metrics import evaluate, exact_match
from nanorlhf.metrics.execution import run_checks
from nanorlhf.mutations import mutate, preference_pairs, passing, row_names
from nanorlhf.reward import RewardModel
from nanorlhf.run import RunFailed, main
from nanorlhf.sandbox import Sandbox
from nanorlhf.tokenizer import Tokenizer

NANO = Path(__file__).resolve().parent.parent / "data" / "nano" / "validation.jsonl"
GPT2_BPE = Path(__file__).resolve().parents[2] / "shared" / "data" / "gpt2-bpe"
linux = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox's walls need Linux")
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


def test_code_too_deep_to_be_written_again_has_no_mutation():
    """Python parses a sum of 600 terms, `ast.unparse` ends in a RecursionError; train_reward.py used to end with it."""
    deep = " + ".join("a" * 600)
    ast.parse(deep)
    assert mutate(deep, NAMES, random.Random(0)) is None
    assert preference_pairs([Record("p", reference=deep)], [["b"]], random.Random(0))[0]["rejected"] == "b"


def test_an_edit_that_python_cannot_parse_is_tried_again():
    """The 1 of `case -1:` may become -1, and `case --1:` is a syntax error, which used to end train_reward.py; 0, 2, 3 and 6 stay."""
    rng = random.Random(0)
    assert {mutate("match 0:\n    case -1:\n        pass", [], rng) for _ in range(200)} == {
        f"match {a}:\n    case -{b}:\n        pass" for a, b in [(a, 1) for a in (-2, -1, 1, 2, 5)] + [(0, b) for b in (0, 2, 3, 6)]}


@pytest.mark.filterwarnings("error")
def test_mutations_warn_of_nothing():
    """Of an escape in a reference, such as this one, Python 3.12 prints a warning at each ast.parse."""
    code = r"re.sub('\d', '', x)"
    assert mutate(code, NAMES, random.Random(0)) and preference_pairs([Record("p", reference=code)], [[]], random.Random(0))


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


def test_a_mutations_names_are_those_of_all_references():
    """Those of its own reference alone would leave "x" nothing to become."""
    pairs = preference_pairs([Record("p", reference="x"), Record("q", reference="y")], [[], []], random.Random(0))
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [("x", "y"), ("y", "x")]


def test_a_mutation_and_its_reference_are_of_one_style():
    """Quotes, or spaces, would tell them apart; what the policy wrote stands against the reference as it is."""
    pairs = preference_pairs([Record("p", reference='f("a",1)')], [["g"]], random.Random(0))
    assert [(pair["chosen"], pair["source"]) for pair in pairs] == [('f("a",1)', "policy"), ("f('a', 1)", "mutation")]


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


# ------------------------------------------------------------------------------------------ pairs whose answers are run

def test_what_passes_is_not_rejected():
    """`passes` is asked once, of all answers and mutations; what it says True of goes, False and None stay; `most`
    counts what is left. Answers b, c, d, e, of which c passes -> with most = 2: b and d."""
    asked_of = []

    def passes(codes, records):
        asked_of.append(list(zip(codes, (record.id for record in records))))
        return [{"c": True, "d": False}.get(code) for code in codes]

    pairs = preference_pairs(RECORDS, [["b", "c", "d", "e"], ["xs"]], random.Random(0), 0, 2, passes)
    assert asked_of == [[("b", "7"), ("c", "7"), ("d", "7"), ("e", "7"), ("xs", "8")]]
    assert [(pair["rejected"], pair["id"]) for pair in pairs] == [("b", "7-0"), ("d", "7-1"), ("xs", "8-0")]


def test_a_passing_mutation_is_not_rejected():
    """`max(a, b)` has one mutation without names to choose from, `max(b, a)`, which is as right."""
    records = [Record("p", reference="max(a, b)", checks=[{"setup": "a, b = 1, 2", "value": "2"}])]
    code = "max(b, a)"
    for verdict, kept in ((True, False), (False, True), (None, True)):
        pairs = preference_pairs(records, [[]], random.Random(0), 60,
                                 passes=lambda codes, rows: [verdict if each == code else False for each in codes])
        assert (code in [pair["rejected"] for pair in pairs]) is kept


def test_without_verdicts_the_pairs_are_those_of_no_filter():
    samples = [["b", "c", "b"], ["d"]]
    first, second = (preference_pairs(RECORDS, samples, random.Random(5), 3, passes=passes)
                     for passes in (None, lambda codes, records: [None] * len(codes)))
    assert first == second


@linux
def test_passing_runs_the_checks():
    records = [Record("p", reference="x", checks=[{"setup": "x = 2", "value": "2"}, {"setup": "x = 3", "value": "3"}]),
               Record("q", reference="x")]
    with Sandbox(workers=1) as box:
        assert passing(box)(["x", "2", "x", "x +"], [records[0], records[0], records[1], records[0]]) == \
            [True, False, None, False]


def test_mined_rows_share_ids():
    """Ids of mined rows are not unique; those of pairs made of them must be, or no reader takes the file."""
    records = [Record("a", id="7"), Record("b", id="7"), Record("c"), Record("d", id="x")]
    assert row_names(records) == ["7", "7.1", "2", "x"]


def test_line_ends_of_unicode_in_pairs(tmp_path):
    """U+2028 and U+0085 end a line for `str.splitlines`, not for JSONL; a resumed run used to stop on such a pair."""
    pairs = [{"prompt": "p", "chosen": "a\u2028b", "rejected": "c\x85d", "source": "policy", "id": "0"}]
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    assert read_pairs(tmp_path / "pairs.jsonl") == pairs
    assert read(tmp_path / "pairs.jsonl", "preference")[0].chosen == "a\u2028b"


# -------------------------------------------------------------------------------------------------------------- ratings

def test_rating_by_hand():
    """Digits of probability .1 .2 .1 .05 .05: mass .5, p = .2 .4 .2 .1 .1, and
    rating = 1 * .2 + 2 * .4 + 3 * .2 + 4 * .1 + 5 * .1 = 2.5; the likeliest is 2."""
    found = rating_from([math.log(p) for p in (.1, .2, .1, .05, .05)])
    assert found["rating"] == pytest.approx(2.5, abs=1e-12) and found["argmax"] == 2
    assert found["probabilities"] == pytest.approx([.2, .4, .2, .1, .1], abs=1e-12)
    assert found["mass"] == pytest.approx(.5, abs=1e-12)
    assert set(found) == {"rating", "argmax", "probabilities", "mass"}, "no `logits`: train_reward.py would read them"


def test_rating_at_the_edges():
    """Equal digits: 3, and the lowest of the likeliest. A mass that underflows leaves the rating as it is: e^-800 = 0,
    but p_1 = e^-10 / (1 + 4 e^-10), and so p_2 to p_4; 5 - rating = (4 + 3 + 2 + 1) p_1."""
    even = rating_from([-2.0] * 5)
    assert (even["rating"], even["argmax"]) == (pytest.approx(3), 1)
    far = rating_from([-810.0] * 4 + [-800.0])
    rest = math.exp(-10) / (1 + 4 * math.exp(-10))
    assert far["mass"] == 0 and far["argmax"] == 5 and far["rating"] == pytest.approx(5 - 10 * rest, abs=1e-12)


class FakeRater:
    """Its next token depends on the last code point of the prompt alone: ids are code points, logits a table."""

    config, device = SimpleNamespace(n_positions=1000), torch.device("cpu")
    pad_id = 0

    def encode(self, text):
        return list(map(ord, text))

    def hidden(self, ids, mask):
        return ids[:, :, None].float()

    def logits(self, hidden):  # (b, 1) -> (b, 128)
        table = torch.full((len(hidden), 128), -math.inf)
        table[:, 49:54] = torch.tensor([.1, .2, .1, .05, .05]).log()
        table[:, 65] = math.log(.5)
        return table + hidden  # a constant in each row: no probability changes


def test_rating_from_a_rater_logits_by_hand():
    """The rater says "A" with .5 and the digits as in `test_rating_by_hand`: 2.5, 2 and .5 again, for every row."""
    rater = FakeRater()
    rows = rate(rater, rater, ["p", "longer"], ["r", ""], batch_size=1)
    assert [row["rating"] for row in rows] == pytest.approx([2.5, 2.5], abs=1e-5)
    assert [row["mass"] for row in rows] == pytest.approx([.5, .5], abs=1e-5)
    assert [row["argmax"] for row in rows] == [2, 2]


def test_a_rater_that_is_not_finite_gives_no_rating(monkeypatch):
    rater = FakeRater()
    monkeypatch.setattr(FakeRater, "logits", lambda self, hidden: hidden.expand(-1, 128) * math.nan)
    with pytest.raises(RunFailed, match="not finite"):
        rate(rater, rater, ["p"], ["r"])


def test_ratings_are_those_of_a_plain_forward(models):
    """Each row by itself, without padding: log(p_k * mass) is the log-softmax of the last logits at the digit's token.
    The rating does not depend on the batch."""
    rater, tokenizer = GPT2.from_pretrained(models / "rater"), Tokenizer.from_pretrained(models / "rater")
    prompts, responses = ["add 1 to xs", "sum rows", "x"], ["xs + 1", "", "sum(rows) # {prompt}"]
    rows = rate(rater, tokenizer, prompts, responses, batch_size=2)
    digits = digit_tokens(tokenizer)
    for row, prompt, response in zip(rows, prompts, responses):
        text = f"Task: {prompt}\nCode: {response}\nFrom 1 (bad) to 5 (good)\nRating:"
        logps = rater(torch.tensor([tokenizer.encode(text)]))[0, -1].double().log_softmax(-1)[digits]
        assert [math.log(p * row["mass"]) for p in row["probabilities"]] == pytest.approx(logps.tolist(), abs=1e-5)
        assert row["rating"] == pytest.approx(sum(k * p for k, p in enumerate(logps.softmax(-1).tolist(), 1)), abs=1e-5)
    for other in (rate(rater, tokenizer, prompts, responses, batch_size=size) for size in (1, 3)):
        assert [row["rating"] for row in other] == pytest.approx([row["rating"] for row in rows], abs=1e-5)
    assert len({row["rating"] for row in rows}) == 3, "the response changes the rating"


def test_braces_in_prompt_and_response_stay():
    assert format_rating("a {response} {x}", "{prompt}", "P {prompt} R {response}!") == "P a {response} {x} R {prompt}!"


def test_a_rating_prompt_that_is_too_long_loses_its_beginning(models, capsys):
    """The rater reads 60 tokens; what it makes of 200 of them is what it makes of the last 60, and that is said."""
    rater, tokenizer = GPT2.from_pretrained(models / "rater"), Tokenizer.from_pretrained(models / "rater")
    rater.config = dataclasses.replace(rater.config, n_positions=60)
    row, = rate(rater, tokenizer, ["word " * 60], ["x"])
    assert "cut to length: 1 rating prompts of 1" in capsys.readouterr().out
    ids = tokenizer.encode(format_rating("word " * 60, "x"))[-60:]
    logps = rater(torch.tensor([ids]))[0, -1].double().log_softmax(-1)[digit_tokens(tokenizer)]
    assert row["mass"] == pytest.approx(logps.exp().sum().item(), abs=1e-5)


@pytest.mark.skipif(not GPT2_BPE.is_dir(), reason="GPT-2's vocabulary is not here")
def test_digits_of_gpt2():
    """After "Rating:" GPT-2's digits have a space before them, after a line end they have none. After a space neither
    is one token: "Rating: 1" is ":" and " 1", which "Rating: " has torn apart."""
    tokenizer = Tokenizer.from_pretrained(GPT2_BPE)
    assert [tokenizer.decode([i]) for i in digit_tokens(tokenizer)] == [" 1", " 2", " 3", " 4", " 5"]
    assert [tokenizer.decode([i]) for i in digit_tokens(tokenizer, "{prompt}{response} (1-5)\n")] == list("12345")
    with pytest.raises(InputError, match="one token of each of 1 to 5"):
        digit_tokens(tokenizer, "{prompt} {response} Rating: ")


def test_digits_with_and_without_a_space():
    """Where the vocabulary has " 1" to " 5" it is these; where it has bytes alone, "1" to "5"."""
    texts = [f"Rating: {digit}" for digit in "12345"]
    for vocab_size, lead in ((300, " "), (258, "")):
        tokenizer = Tokenizer.train(texts * 9, vocab_size)
        assert [tokenizer.decode([i]) for i in digit_tokens(tokenizer)] == [lead + digit for digit in "12345"]


@pytest.mark.parametrize("ids", [lambda text: [ord(c) // 2 for c in text], lambda text: [9] * text.count("1") + [7]],
                         ids=["two digits share a token", "the digit is not the last token"])
def test_digits_that_are_not_one_token_each(ids):
    with pytest.raises(InputError, match="one token of each"):
        digit_tokens(SimpleNamespace(encode=ids))


CHECKED = Record("p", reference="x + 1", checks=[{}, {}, {}])


@pytest.mark.parametrize("response, record, share, words", [
    (" \n", CHECKED, 0.0, "empty"), ("x +", CHECKED, 0.0, "does not parse"),
    ("x", CHECKED, 2 / 3, "passes 2 of 3 checks"), ("x", CHECKED, 0.0, "passes 0 of 3 checks"),
    ("x+1", CHECKED, None, "equals the reference"), ("x", CHECKED, None, ""), ("x", Record("p"), None, ""),
])
def test_comments_say_what_is_known(response, record, share, words):
    assert comment(response, record, share) == words


# -------------------------------------------------------------------------------------------------------------- ranking

@pytest.mark.parametrize("scores, margin, pair", [
    ({"a": 0.5, "b": 1.0, "c": 0.0}, 0, ("b", "c")),
    ({"a": 1.0, "b": 1.0}, 0, None),
    ({"a": 1.0, "b": 1.0, "c": 0.5, "d": 0.5}, 0, ("a", "c")),        # of equals the first
    ({"a": 1.0, "b": 0.5}, 0.5, None), ({"a": 1.0, "b": 0.5}, 0.49, ("a", "b")),   # strictly more than the margin
    ({"a": None, "b": 1.0, "c": 0.0}, 0, ("b", "c")), ({"a": None, "b": 1.0}, 0, None), ({"a": None}, 0, None),
    ({}, 0, None),
    ({"": 2.0, "b": 1.0, "c": 0.0}, 0, ("b", "c")), ({"": 0.0, "b": 1.0}, 0, ("b", "")), ({"": 2.0, "b": 1.0}, 0, None),
    ({"a": -3.0, "b": -1.0}, 0, ("b", "a")),
])
def test_best_and_worst_by_hand(scores, margin, pair):
    assert best_and_worst(scores, margin) == pair


# ---------------------------------------------------------------------------------------------------- the command line

def launch(words, out, *more):
    """`python -m nanorlhf.feedback` in this process: its exit code. Words are split at spaces."""
    try:
        words = [*words.split(), "--out", str(out), *more]
        main(feedback.make_or_leave, parse(feedback.Config, feedback.PRESETS, words))
    except SystemExit as exit:
        return exit.code
    return 0


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """policy/ and rater/: random GPT-2s of one layer; reward/: a reward model on the policy."""
    home = tmp_path_factory.mktemp("models")
    texts = ["add 1 to xs\nxs + 1", "Task: sum rows\nCode: sum(rows)\nRating: 5"]
    tokenizer = Tokenizer.train(texts * 9, 290)
    for seed, (name, positions) in enumerate({"policy": 40, "rater": 400}.items()):
        torch.manual_seed(seed)
        config = GPT2Config(vocab_size=tokenizer.vocab_size, n_positions=positions, n_embd=16, n_layer=1, n_head=2,
                            initializer_range=0.3)
        GPT2.from_config(config).save_pretrained(home / name)
        tokenizer.save_pretrained(home / name)
    RewardModel.from_pretrained(home / "policy", new_head="native").save_pretrained(home / "reward")
    return home


@pytest.fixture
def home(tmp_path, monkeypatch, models):
    """A folder to work in, with the models, rows that have checks, and the same rows with less."""
    monkeypatch.chdir(tmp_path)
    for name in ("policy", "rater", "reward"):
        os.symlink(models / name, name)
    names = ["alpha", "beta", "gamma", "delta"]
    rows = [{"id": f"{name}{n}", "intent": f"the larger of {name} and {n}", "snippet": f"max({name}, {n})", "checks": [
        {"setup": f"{name} = {value}", "value": repr(max(value, n))} for value in (n - 1, n + 1)]}
            for name in names for n in range(10)]
    write("checked.jsonl", rows)
    write("plain.jsonl", [{"prompt": row["intent"], "reference": row["snippet"]} for row in rows])
    write("prompts.jsonl", [{"prompt": row["intent"]} for row in rows])
    write("answered.jsonl", [{"id": f"r{n}", "prompt": row["intent"], "response": row["snippet"] + " +" * (n % 2),
                              "question_id": n // 2} for n, row in enumerate(rows)])
    return tmp_path


def write(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def answers_of(monkeypatch, *templates):
    """Let the policy answer "the larger of NAME and N" with these texts, {0} for NAME and {1} for N."""
    monkeypatch.setattr(feedback, "sample", lambda config, records, device: [
        [template.format(*record.prompt.split()[3::2]) for template in templates] for record in records])


SAMPLED = " --policy ./policy --max-query 16 --max-response 8 --device cpu"
RATED = "--kind ratings --rater ./rater"
RANKED = "--kind pairs --policy p --device cpu --data "


def test_ratings_of_samples(home, capsys):
    """JSONL and JSON hold the same rows, a second run repeats them to the last bit; held-out rows are not touched."""
    words = f"{RATED} --data plain.jsonl --samples 3 {SAMPLED}"
    assert [launch(words, out) for out in ("a.jsonl", "new/er/a.json", "again.jsonl")] == [0, 0, 0]
    shown = capsys.readouterr().out
    assert "the five digits had" in shown and "do not trust these ratings" in shown, "a random rater says no digits"
    rows, train = rows_of("a.jsonl"), load_splits("plain.jsonl").train
    assert json.loads(Path("new/er/a.json").read_text()) == rows
    assert Path("a.jsonl").read_bytes() == Path("again.jsonl").read_bytes()
    for row in rows:
        assert " ".join(row) == "id prompt response rating argmax probabilities mass comment source"
        assert row["source"] == {"kind": "ratings", "data": "plain.jsonl", "split": "train", "seed": 0,
                                 "rater": "./rater", "policy": "./policy", "temperature": 1.0}
        assert 1 < row["rating"] < 5 and row["argmax"] in range(1, 6) and 0 < row["mass"] < 1
        assert row["comment"] in ("", "empty", "does not parse")
    assert {row["prompt"] for row in rows} == {record.prompt for record in train}
    assert len(rows) == len({(row["prompt"], row["response"]) for row in rows}) > len(train)
    assert launch(words + " --seed 1", "other.jsonl") == 0
    assert [row["response"] for row in rows_of("other.jsonl")] != [row["response"] for row in rows]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_ratings_are_read_back(home, name):
    """`read` knows them for feedback, with or without the name of the format; train_reward.py learns from them."""
    assert launch(f"{RATED} --data answered.jsonl --split all", name) == 0
    records = read(name)
    assert records == read(name, "feedback") and len(records) == 40
    assert {record.comment for record in records} == {None, "does not parse"}
    assert all(record.logits is None and record.meta["source"]["rater"] == "./rater" for record in records)
    config = parse(train_reward.Config, argv=["--data", name])
    splits, _ = open_data(config)
    training, held_out = train_reward.examples(splits, None, None, config)
    ratings = [row["rating"] for row in training]
    assert splits.kind == "feedback" and (len(training), len(held_out)) == (len(splits.train), len(splits.validation))
    assert sum(ratings) == pytest.approx(0, abs=1e-6) and sum(x * x for x in ratings) / len(ratings) == pytest.approx(1)


def test_ratings_of_answers_in_the_data(home):
    """Ids and questions stay, so that splits go on holding a question together; no policy is named as the source."""
    assert launch(f"{RATED} --data answered.jsonl", "a.jsonl") == 0
    given = {row["id"]: row for row in rows_of("answered.jsonl")}
    for row in rows_of("a.jsonl"):
        assert all(row[column] == given[row["id"]][column] for column in ("prompt", "response", "question_id"))
        assert (row["source"]["policy"], row["source"]["temperature"]) == (None, None)
        assert row["comment"] == ("" if row["response"].endswith(")") else "does not parse")


@linux
def test_comments_come_from_running_the_code(home, monkeypatch):
    """NAME is N - 1 in one check and N + 1 in the other: NAME alone is the larger in one of two."""
    answers_of(monkeypatch, "max({0}, {1})", "{0}", "max(")
    assert launch(f"{RATED} {SAMPLED} --data checked.jsonl --max-rows 3", "a.jsonl") == 0
    assert [row["comment"] for row in rows_of("a.jsonl")] == \
        ["passes 2 of 2 checks", "passes 1 of 2 checks", "does not parse"] * 3


@linux
def test_pairs_ranked_by_execution(home, monkeypatch, capsys):
    """Shares 0, 1/2 and 1 of the checks: the best against the worst."""
    answers_of(monkeypatch, "{0} +", "{0}", "max({1}, {0})")
    assert launch(RANKED + "checked.jsonl --max-rows 5", "a.jsonl") == 0
    rows = rows_of("a.jsonl")
    assert [row["prompt"] for row in rows] == [record.prompt for record in load_splits("checked.jsonl").train[:5]]
    for row in rows:
        name, number = row["prompt"].split()[3::2]
        assert (row["chosen"], row["rejected"]) == (f"max({number}, {name})", f"{name} +")
        assert (row["chosen_score"], row["rejected_score"]) == (1.0, 0.0)
        assert row["source"] == {"kind": "pairs", "data": "checked.jsonl", "split": "train", "seed": 0, "policy": "p",
                                 "rank": "execution", "temperature": 1.0, "chosen": "policy", "rejected": "policy"}
    assert [(r.chosen, r.rejected) for r in read("a.jsonl")] == [(row["chosen"], row["rejected"]) for row in rows]
    assert "5 pairs of 5 prompts; none of 0 " in capsys.readouterr().out


@linux
@pytest.mark.parametrize("answers, margin, counts", [
    (["{0}", "{0} + 0"], 0, "none of 5 whose"), (["{0}", "max({0}, {1})"], 0.5, "none of 5 whose"),
    (["{0}"], 0, "of 5 with one answer only")], ids=["tie", "margin", "one answer"])
def test_no_pair(home, monkeypatch, capsys, answers, margin, counts):
    """1/2 against 1 differs by 1/2, which is not more than a margin of 1/2. Without any pair nothing is written."""
    answers_of(monkeypatch, *answers)
    assert launch(f"{RANKED} checked.jsonl --max-rows 5 --margin {margin}", "a.jsonl") == 2
    error = capsys.readouterr().err
    assert "nothing to write: 0 pairs of 5 prompts" in error and counts in error and error.count("\n") == 1
    assert not Path("a.jsonl").exists()


@pytest.mark.parametrize("rank", ["codebleu", "bleu", "rougeL", "chrf", "exact_match", "token_f1"])
def test_pairs_ranked_by_a_metric(home, monkeypatch, rank):
    """A sample with the reference's text is the policy's, not the reference; the worst shares no token with it."""
    answers_of(monkeypatch, "?", "max({0}, {1})")
    assert launch(f"{RANKED} plain.jsonl --rank {rank} --with-reference", "a.jsonl") == 0
    for row in rows_of("a.jsonl"):
        assert row["chosen"].startswith("max(") and row["rejected"] == "?" and row["source"]["chosen"] == "policy"
        assert row["chosen_score"] == pytest.approx(evaluate([row["chosen"]], [row["chosen"]], [rank])[rank])
        assert row["chosen_score"] > row["rejected_score"]


def test_the_reference_as_a_candidate(home, monkeypatch):
    """It is chosen where it is better than every sample; one that is as good, `max(NAME,N)`, is preferred to it."""
    answers_of(monkeypatch, "{0}", "max({0},{1})")
    assert launch(RANKED + "plain.jsonl --rank exact_match --with-reference", "a.jsonl") == 0
    assert all("," in row["chosen"] and ", " not in row["chosen"] for row in rows_of("a.jsonl"))
    answers_of(monkeypatch, "{0}")
    assert launch(RANKED + "plain.jsonl --rank exact_match --with-reference --samples 1 --overwrite", "a.jsonl") == 0
    for row in rows_of("a.jsonl"):
        assert row["chosen"].startswith("max(") and not row["rejected"].startswith("max(")
        assert (row["source"]["chosen"], row["source"]["rejected"]) == ("reference", "policy")


def test_samples_are_the_different_answers_of_the_policy(home):
    """Three samples with the seeds 2000, 2001 and 2002 of `answer`, in this order, each text once."""
    config = parse(feedback.Config, argv=f"{RATED} {SAMPLED} --samples 3 --seed 2 --temperature 0.2".split())
    records = load_splits("prompts.jsonl").validation
    policy, tokenizer = GPT2.from_pretrained("./policy"), Tokenizer.from_pretrained("./policy")
    answers = [answer(policy, tokenizer, records, config, 0.2, seed=seed, batch_size=64) for seed in (2000, 2001, 2002)]
    wanted = [list(dict.fromkeys(row["response"] for row in rows)) for rows in zip(*answers)]
    assert feedback.sample(config, records, torch.device("cpu")) == wanted


def test_a_ranking_that_is_none_names_its_option(home, capsys):
    assert launch(f"--kind pairs --data prompts.jsonl {SAMPLED}", "a.jsonl", "--rank", "syntx + length") == 2
    assert "--rank syntx: no folder and no term" in capsys.readouterr().err


def test_pairs_ranked_by_a_reward_model(home):
    """Of a real policy's samples: the model's best score against its worst, both as the model says them."""
    assert launch(f"--kind pairs --rank ./reward --data prompts.jsonl {SAMPLED}", "a.jsonl") == 0
    rows, model = rows_of("a.jsonl"), RewardModel.from_pretrained("./reward")
    assert len(rows) > 20
    for column in ("chosen", "rejected"):
        scores = model.score([row["prompt"] for row in rows], [row[column] for row in rows]).tolist()
        assert [row[f"{column}_score"] for row in rows] == pytest.approx(scores, abs=1e-5)
    assert all(row["chosen_score"] > row["rejected_score"] for row in rows)


def test_pairs_ranked_by_a_function(home, monkeypatch):
    """The shortest answer is the best one."""
    Path("rank_zq.py").write_text("def short(prompts, responses, references): return [-len(r) for r in responses]\n")
    answers_of(monkeypatch, "{0} + {0}", "{1}")
    assert launch(RANKED + "prompts.jsonl --rank rank_zq:short", "a.jsonl") == 0
    assert all(len(row["chosen"]) == 1 and row["chosen_score"] == -1 for row in rows_of("a.jsonl"))


def test_what_cannot_be_scored_is_not_ranked(home, monkeypatch, capsys):
    """A sum says NaN where it cannot score an answer, and NaN is neither more nor less than anything; of a lone function it is a fault."""
    Path("unranked_zq.py").write_text("def f(prompts, responses, references):\n"
                                   "    return [float('nan') if r.startswith('?') else len(r) for r in responses]\n")
    answers_of(monkeypatch, "?", "{0} + {0}", "?" * 40, "{1}", "??")
    assert launch(RANKED + "prompts.jsonl --rank 1*unranked_zq:f", "a.jsonl") == 0
    rows = rows_of("a.jsonl")
    assert len(rows) == 32 and all(" + " in row["chosen"] and row["rejected"].isdigit() for row in rows)
    answers_of(monkeypatch, "?", "{1}")
    assert launch(RANKED + "prompts.jsonl --rank 1*unranked_zq:f", "b.jsonl") == 2 and "of 32 that cannot be ranked" in capsys.readouterr().err
    assert launch(RANKED + "prompts.jsonl --rank unranked_zq:f", "b.jsonl") == 1
    assert "--rank unranked_zq:f: the reward is not finite for" in capsys.readouterr().err and not Path("b.jsonl").exists()


@linux
def test_a_sum_with_execution(home, monkeypatch):
    """execution - 0.25 * exact_match: max(N, NAME) has 1, the reference's text 0.75, NAME 0.5."""
    answers_of(monkeypatch, "max({0}, {1})", "max({1}, {0})", "{0}")
    assert launch(RANKED + "checked.jsonl --max-rows 2", "a.jsonl", "--rank", "execution - 0.25*exact_match") == 0
    for row in rows_of("a.jsonl"):
        assert row["chosen"][4].isdigit() and (row["chosen_score"], row["rejected_score"]) == (1.0, 0.5)


@linux
def test_mutations_that_pass_are_discarded(home, capsys):
    """`max(N, NAME)` is a mutation that passes: run, it goes, with others of the kind; with the sandbox off it stays,
    and the row says that it was not checked."""
    words = "--kind mutations --data checked.jsonl --mutations 8 --max-rows 6"
    assert launch(words, "run.jsonl") == 0 and launch(words + " --sandbox off", "not.jsonl") == 0
    shown, ran, all_of_them = capsys.readouterr().out, rows_of("run.jsonl"), rows_of("not.jsonl")
    kept = {(row["prompt"], row["rejected"]) for row in ran}
    gone = [row for row in all_of_them if (row["prompt"], row["rejected"]) not in kept]
    assert any(row["rejected"][4].isdigit() and row["rejected"].count(row["prompt"].split()[3]) for row in gone)
    assert {row["source"]["checked"] for row in ran} == {True}
    assert {row["source"]["checked"] for row in all_of_them} == {False}
    assert len(ran) + len(gone) == len(all_of_them)
    assert f"; {len(gone)} mutations that pass all checks were discarded, {len(ran)} fail some" in shown
    checks = {record.prompt: record.checks for record in read("checked.jsonl")}
    with Sandbox(workers=1) as box:
        for rows, verdict in ((ran, False), (gone, True)):
            shares = run_checks(box, [row["rejected"] for row in rows], [checks[row["prompt"]] for row in rows])
            assert {share == 1 for share in shares} == {verdict}
    assert len(read("run.jsonl", "preference")) == len(ran)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_mutations_without_checks(home, capsys, split):
    """Four rows of a split, one mutation each; nothing to run."""
    assert launch(f"--kind mutations --data plain.jsonl --mutations 1 --split {split}", "a.jsonl") == 0
    rows, records = rows_of("a.jsonl"), getattr(load_splits("plain.jsonl"), split)
    assert sorted(row["prompt"] for row in rows) == sorted(record.prompt for record in records) and len(rows) == 4
    assert "0 fail some, 4 were not run; 0 references gave none" in capsys.readouterr().out
    source = {"kind": "mutations", "data": "plain.jsonl", "split": split, "seed": 0, "checked": False}
    assert all(row["source"] == source for row in rows)


def test_mutations_of_another_seed_and_of_another_style(home):
    """A seed draws others, and repeats its own; the reference is written as its mutation is, or spaces would tell them apart."""
    write("dense.jsonl", [{"prompt": row["prompt"], "reference": row["reference"].replace(", ", ",")} for row in rows_of("plain.jsonl")])
    found = {}
    for name, seed in (("a", 0), ("b", 1), ("c", 1)):
        assert launch(f"--kind mutations --data dense.jsonl --split all --seed {seed}", f"{name}.jsonl") == 0
        found[name] = {(row["prompt"], row["rejected"]) for row in rows_of(f"{name}.jsonl")}
        assert all(", " in row["chosen"] for row in rows_of(f"{name}.jsonl"))
    assert found["a"] != found["b"] == found["c"]


@pytest.mark.parametrize("mass, doubted", [(0.09, True), (0.11, False)])
def test_the_words_of_ratings_by_hand(home, monkeypatch, capsys, mass, doubted):
    """Ratings 1 and 4 in turn: mean 2.5, deviation 1.5. Below a tenth of its probability on digits the rater was saying something else."""
    monkeypatch.setattr(feedback, "rate", lambda model, tokenizer, prompts, *rest: [
        {"rating": 1 + 3 * (i % 2), "mass": mass} for i in range(len(prompts))])
    assert launch(f"{RATED} --data answered.jsonl --split all", "a.jsonl") == 0
    shown = capsys.readouterr().out
    assert f"40 ratings, mean 2.50, standard deviation 1.50; the five digits had {mass:.1%} of the rater's probability" in shown
    assert ("do not trust these ratings" in shown) == doubted


def test_the_options_of_ratings_reach_the_rater(home, monkeypatch):
    """A rating prompt, a batch size or a precision that is accepted, written down as such, and does nothing."""
    asked, real = [], feedback.rate
    monkeypatch.setattr(feedback, "rate", lambda *args: asked.append(args[4:]) or real(*args))
    template = "{prompt} {response} Rating:"
    assert launch(f"{RATED} --data answered.jsonl --batch-size 7 --precision bf16 --device cpu", "a.jsonl", "--rating-prompt", template) == 0
    assert asked == [(template, 7, "bf16")]


def test_a_rater_reads_at_the_precision_asked_for(models):
    """bfloat16 keeps 8 bits of a logit: not the same ratings, and nearly the same."""
    rater, tokenizer = GPT2.from_pretrained(models / "rater"), Tokenizer.from_pretrained(models / "rater")
    whole, half = (rate(rater, tokenizer, ["add 1"], ["xs"], precision=precision)[0]["rating"] for precision in ("fp32", "bf16"))
    assert whole != half and whole == pytest.approx(half, abs=0.2)


def test_a_tokenizer_of_another_model_is_refused(home, capsys):
    """An id beyond the embedding is an IndexError on a CPU, and on a GPU whatever lies there."""
    GPT2.from_config(GPT2Config(vocab_size=100, n_positions=40, n_embd=16, n_layer=1, n_head=2)).save_pretrained("misfit")
    Tokenizer.from_pretrained("./policy").save_pretrained("misfit")
    for words in ("--kind ratings --rater ./misfit --data answered.jsonl", "--kind pairs --rank syntax --policy ./misfit --data prompts.jsonl"):
        assert launch(words, "a.jsonl") == 2
        assert "tokens but the embedding 100 rows" in capsys.readouterr().err


def test_a_rater_that_cannot_answer_is_refused_before_anything_is_sampled(home, monkeypatch, capsys):
    """Sampling may take hours. Its digits share a token here."""
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: [9] * len(text))
    monkeypatch.setattr(feedback, "sample", lambda *args: pytest.fail("sampled"))
    assert launch(f"{RATED} {SAMPLED} --data prompts.jsonl", "a.jsonl") == 2 and "one token of each of 1 to 5" in capsys.readouterr().err


def test_where_no_sandbox_can_be_had(home, monkeypatch, capsys):
    """Ratings do without what the checks say; mutations that nobody ran would be taken for wrong ones, and are refused until
    --sandbox off says that they may be."""
    def refuse(*args, **options):
        raise InputError("no walls here")
    monkeypatch.setattr("nanorlhf.evaluation.Sandbox", refuse)
    answers_of(monkeypatch, "{0}")
    assert launch(f"{RATED} {SAMPLED} --data checked.jsonl --max-rows 2", "a.jsonl") == 0
    assert [row["comment"] for row in rows_of("a.jsonl")] == ["", ""] and "execution is not measured: no walls here" in capsys.readouterr().out
    assert launch("--kind mutations --data checked.jsonl", "b.jsonl") == 2 and "no walls here" in capsys.readouterr().err
    assert launch("--kind mutations --data checked.jsonl --sandbox off", "b.jsonl") == 0
    assert launch("--kind mutations --data plain.jsonl", "c.jsonl") == 0, "nothing to run"


ERRORS = {  # words: what the line must say
    "": "--kind is missing: one of ratings, pairs, mutations",
    "--kind rating": "did you mean ratings?",
    "--kind pairs --ratter x": "did you mean --rater?",
    "--kind ratings": "--rater is missing",
    "--kind pairs": "--policy is missing",
    "--kind mutations --rater gpt2 --margin 1": "--rater, --margin: not for --kind mutations",
    "--kind mutations --device cpu": "--device: not for --kind mutations",
    "--kind ratings --rater r --rank bleu": "--rank: not for --kind ratings",
    "--kind pairs --policy p --mutations 3": "--mutations: not for --kind pairs",
    "--kind ratings --rater r --samples 3": "--samples: for samples of a policy",
    "--kind pairs --policy p --samples 1": "--samples 1 leaves nothing to rank",
    "--kind pairs --policy p --temperature 0": "greedy samples are all alike",
    "--kind pairs --policy p --sandbox off": "contradict each other",
    "--kind pairs --policy p --rank bleu --sandbox weak": "--sandbox: --rank bleu runs no code",
    "--kind mutations --sandbox require --data plain.jsonl": "has no checks",
    "--kind ratings --rater r --rating-prompt {prompt}_Rating:": "needs {prompt}, {response}",
    "--kind ratings --rater r --rating-prompt {prompt}{response}": "asks for a digit",
    "--kind mutations --template {x}": "has no {prompt}",
    "--kind mutations --data nowhere.jsonl": "no such file",
    "--kind mutations --data prompts.jsonl": "no row has a reference",
    f"{RATED} --data prompts.jsonl": "rows without a response to rate",
    "--kind ratings --rater ./nowhere --data answered.jsonl": "no folder ./nowhere",
    f"{RATED} --policy ./nowhere --data prompts.jsonl": "no folder ./nowhere",
    f"{RATED} --policy ./policy --data prompts.jsonl": "more than the 40 positions",
    RANKED + "plain.jsonl": "has no checks",
    RANKED + "plain.jsonl --rank codebleau": "did you mean codebleu?",
    RANKED + "plain.jsonl --rank ./nowhere": "no folder ./nowhere",
    RANKED + "plain.jsonl --rank bertscore": "no encoder was given",
    RANKED + "prompts.jsonl --rank bleu": "have no reference",
    RANKED + "prompts.jsonl --rank syntax --with-reference": "--with-reference: the rows",
}
OUTS = {"a.csv": "must end in .jsonl", "folder.json": "is a folder",
        "plain.jsonl": "is there already; pass --overwrite", "plain.jsonl/a.json": "cannot be written: Not a directory",
        "a" * 300 + ".json": "cannot be written: File name too long"}


@pytest.mark.parametrize("words, out, says", [
    *((words, "a.jsonl", says) for words, says in ERRORS.items()),
    *(("--kind mutations --data plain.jsonl", out, says) for out, says in OUTS.items())])
def test_errors_are_one_line_and_write_nothing(home, capsys, words, out, says):
    (home / "folder.json").mkdir()
    before = {path: path.read_bytes() for path in home.iterdir() if path.is_file()}
    assert launch(words, out) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1, error
    assert {path: path.read_bytes() for path in home.iterdir() if path.is_file()} == before


def test_a_folder_that_cannot_be_written_to_is_said_before_any_work(home, monkeypatch, capsys):
    """The nearest folder that is there, of one that is to be made. (Root may write everywhere: the answer of the system is made up.)"""
    monkeypatch.setattr(feedback.os, "access", lambda folder, mode: Path(folder) != home)
    assert launch("--kind mutations --data plain.jsonl", "new/er/a.jsonl") == 2
    assert f"{home} cannot be written to; name another folder" in (shown := capsys.readouterr()).err and "data:" not in shown.out


def test_overwrite_replaces_the_file(home):
    Path("a.jsonl").write_text("old")
    assert launch("--kind mutations --data plain.jsonl --overwrite", "a.jsonl") == 0
    assert len(rows_of("a.jsonl")) > 30


def interrupt(*args):
    raise KeyboardInterrupt


def fill_the_disk(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def terminate(*args):
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("fault, code, says", [
    (interrupt, 130, "SIGINT: interrupted; a.jsonl was not written"),
    (terminate, 143, "SIGTERM: interrupted; a.jsonl was not written"),
    (fill_the_disk, 1, "failed: a.jsonl was not written: No space left on device"),
], ids=["Ctrl-C", "SIGTERM", "full disk"])
def test_an_interrupted_write_leaves_the_old_file(home, monkeypatch, capsys, fault, code, says):
    """Stopped just before the rename: one line, the old file as it was, and no other."""
    Path("a.jsonl").write_text("old")
    monkeypatch.setattr(feedback.os, "fsync", fault)
    before = sorted(home.iterdir())
    assert launch("--kind mutations --data plain.jsonl --overwrite", "a.jsonl") == code
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert Path("a.jsonl").read_text() == "old" and sorted(home.iterdir()) == before


def test_a_dry_run_keeps_nothing(home, capsys):
    before = sorted(home.iterdir())
    assert launch(f"{RATED} {SAMPLED} --data prompts.jsonl --dry-run", "a.jsonl") == 0
    assert sorted(home.iterdir()) == before and "nothing was kept" in capsys.readouterr().out


def test_a_dry_run_takes_no_more_rows_than_asked_for(home, capsys):
    assert launch(f"{RATED} {SAMPLED} --data prompts.jsonl --split all --max-rows 2 --dry-run", "a.jsonl") == 0
    assert "; 6 rows of all\n" in capsys.readouterr().out, "two of each split"


def test_rows_in_other_splits_are_said(home, capsys):
    """40 rows of one file, split 8 : 1 : 1; the user may have wanted them all."""
    assert launch("--kind mutations --data plain.jsonl", "a.jsonl") == 0
    assert "; 32 rows of train, 8 rows are in other splits (--split)\n" in capsys.readouterr().out


@pytest.mark.parametrize("rank, line", [("bleu + syntax", "--rank bleu + syntax: the rows of --data prompts.jsonl have no reference to go by"),
                                        ("reward policy", "--rank reward policy: 'reward policy' is no term"),
                                        ("execution", "leave execution and --sandbox out")])
def test_what_cannot_rank_is_said_of_rank(home, capsys, rank, line):
    """Before anything is sampled."""
    assert launch(f"--kind pairs {SAMPLED} --data prompts.jsonl", "a.jsonl", "--rank", rank) == 2
    error = capsys.readouterr().err
    assert line in error and "--reward" not in error


def test_help_is_quick():
    """Without torch, well under 2 s of processor time; every option is named and has its help."""
    before = os.times()
    done = subprocess.run([sys.executable, "-m", "nanorlhf.feedback", "--help"], cwd=NANO.parents[2],
                          capture_output=True, text=True)
    after = os.times()
    assert done.returncode == 0 and done.stderr == "" and "python -m nanorlhf.feedback [--config" in done.stdout
    for opt in options(feedback.Config).values():
        assert opt.help and (f"  --[no-]{opt.flag[2:]}" if opt.kind is bool else f"  {opt.flag} ") in done.stdout
    assert after.children_user + after.children_system - before.children_user - before.children_system < 2
