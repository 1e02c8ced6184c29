"""What --reward names: rules, sums of terms, their normalisation, and what cannot be a reward."""
import math

import numpy as np
import pytest
import torch

from nanorlhf import metrics
from nanorlhf.errors import InputError
from nanorlhf.reward import RewardEnsemble, call_reward, term_values
from nanorlhf.run import RunFailed
from nanorlhf.terms import RULES, Combination, Spread, Term, load_reward, needs_execution, parse_sum, repeated, reward_folders

PROMPTS, REFERENCES = ["p", "q", "r"], ["x + 1", None, "f(a, b)"]


def constant(*values):
    return lambda prompts, responses, references: list(values)


# ---- rules

@pytest.mark.parametrize("name, response, expected", [
    ("syntax", "x = 1", 1.0), ("syntax", "x = = 1", 0.0), ("syntax", "", 0.0), ("syntax", "  \n", 0.0),
    ("length", "x + 1", 3.0), ("length", "", 0.0), ("length", "foo_bar(1)", len(metrics.conala_tokens("foo_bar(1)"))),
    ("repetition", "a b c d", 0.0), ("repetition", "", 0.0), ("repetition", "a", 0.0),
    ("repetition", "a a a a", 2 / 3),  # pairs aa aa aa: one of three is new
    ("repetition", "a b a b a", 0.5),  # ab ba ab ba: two of four are new
])
def test_rules_by_hand(name, response, expected):
    assert RULES[name](["p"], [response], [None]) == [pytest.approx(expected)]


@pytest.mark.parametrize("name", ["exact_match", "bleu", "rougeL", "codebleu", "token_f1", "ruby"])
def test_metrics_against_the_reference(name):
    """1 for the reference itself (n-gram scores of three tokens are below), less for another text, NaN without a reference; and what
    `evaluate` says of this one pair, which it says of no other way round."""
    same, missing, other = RULES[name](PROMPTS, ["x + 1", "anything", "x = f(a) + 1"], REFERENCES)
    assert other == pytest.approx(metrics.evaluate(["x = f(a) + 1"], ["f(a, b)"], [name])[name])
    assert math.isnan(missing) and 0 <= other < 1
    assert same > other and (same == pytest.approx(1) or name in ("bleu", "codebleu"))


# ---- sums

def test_a_sum_by_hand():
    """0.5 * (1, 2, 3) - 2 * (0, 1, 0) = (0.5, -1, 1.5)."""
    reward = Combination([Term("a", 0.5, constant(1, 2, 3)), Term("b", -2, constant(0, 1, 0))])
    assert reward(PROMPTS, ["", "", ""], REFERENCES).tolist() == [0.5, -1.0, 1.5]
    assert {name: values.tolist() for name, values in reward.values.items()} == {"a": [1, 2, 3], "b": [0, 1, 0]}


def test_each_term_is_clipped_before_its_weight():
    """clip 1: (-5, .5, 5) -> (-1, .5, 1), times 3; unclipped values are what is logged."""
    reward = Combination([Term("a", 3, constant(-5, 0.5, 5))], clip=1.0)
    assert reward(PROMPTS, ["", "", ""]).tolist() == [-3.0, 1.5, 3.0]
    assert reward.values["a"].tolist() == [-5, 0.5, 5]


def test_each_term_is_clipped_after_its_normalisation():
    """(100, 104) has mean 102 and deviation 2: (110, 103) is (4, .5), clipped to 1 (1, .5), times 3."""
    values = iter([[100, 104], [110, 103]])
    reward = Combination([Term("a", 3, lambda *texts: next(values))], clip=1.0, normalise=True)
    reward.start(["p", "q"], ["", ""])
    assert reward(["p", "q"], ["", ""]).tolist() == [3.0, 1.5]


def test_a_failed_term_is_nan_and_spoils_its_row_alone():
    reward = Combination([Term("a", 1, constant(1, math.nan, 3)), Term("b", 0.0, constant(1, 1, 1))], clip=2.0, normalise=True)
    scores = reward.learn(PROMPTS, ["", "", ""])
    assert scores.isnan().tolist() == [False, True, False] and reward.leaves_out
    assert reward.running["a"].count == 2, "what failed does not enter the mean"
    assert RewardEnsemble([reward, constant(0, 0, 0)]).leaves_out and not RewardEnsemble([constant(0)]).leaves_out


def test_a_term_alone_leaves_out_what_it_cannot_score():
    """A metric has nothing to say of a row without a reference, execution of one without checks: that is no fault of theirs."""
    for spec, execution in (("bleu", None), ("execution", constant(1, math.nan, 1))):
        reward = load_reward([spec], execution=execution)
        assert reward(PROMPTS, ["x", "x", "x"], REFERENCES).isnan().tolist() == [False, True, False] and reward.leaves_out


def test_infinity_is_no_failure_but_a_fault():
    with pytest.raises(RunFailed, match="term a is not finite"):
        Combination([Term("a", 1, constant(1, math.inf, 3))])(PROMPTS, ["", "", ""])


def test_normalisation_by_hand():
    """start sees (1, 3): mean 2, deviation 1, so a later (5, 2) is (3, 0) by the yardstick.

    learn sees it too: of (1, 3, 5, 2) the mean is 2.75 and the variance (1.75^2 + .25^2 + 2.25^2 + .75^2) / 4 = 2.1875.
    """
    values = iter([[1, 3], [5, 2], [5, 2], [5, 2]])
    reward = Combination([Term("a", 2, lambda *texts: next(values))], normalise=True)
    reward.start(["p", "q"], ["", ""])
    assert reward(["p", "q"], ["", ""]).tolist() == [6.0, 0.0]
    scores = reward.learn(["p", "q"], ["", ""])
    assert scores.tolist() == pytest.approx([2 * 2.25 / 2.1875 ** 0.5, 2 * -0.75 / 2.1875 ** 0.5])
    assert reward(["p", "q"], ["", ""]).tolist() == [6.0, 0.0], "evaluations keep their yardstick"


def test_running_spread_equals_numpy_in_any_cut():
    rng = np.random.default_rng(0)
    values = rng.normal(1e4, 3, 200)
    for cuts in ([50], [1, 2, 199], list(range(1, 200))):
        spread = Spread()
        for part in np.split(values, cuts):
            spread.see(torch.tensor(part))
        assert spread.mean == pytest.approx(values.mean(), rel=1e-12)
        assert spread.squares == pytest.approx(((values - values.mean()) ** 2).sum(), rel=1e-9)
    spread = Spread()
    spread.see(torch.tensor([2.0, 2.0]))
    assert spread.scale(torch.tensor([2.0, 5.0])).tolist() == [0, 3], "what did not vary is only centred"
    spread = Spread()
    spread.see(torch.tensor([0.25, 0.75]))
    assert spread.scale(torch.tensor([0.5, 1.25])).tolist() == [0, 3], "what varied little, by 0.25, is scaled"


def test_state_goes_through_json_and_back():
    import json
    reward = Combination([Term("a", 1, constant(1, 2, 4))], normalise=True)
    reward.start(PROMPTS, ["", "", ""])
    reward.learn(PROMPTS, ["", "", ""])
    other = Combination([Term("a", 1, constant(1, 2, 4))], normalise=True)
    other.restore(json.loads(json.dumps(reward.state)))
    assert torch.equal(other.learn(PROMPTS, ["", "", ""]), reward.learn(PROMPTS, ["", "", ""]))
    for state in ({}, Combination([Term("b", 1, constant(1, 2, 4))]).state):
        with pytest.raises(InputError, match="resume with the same --reward"):
            other.restore(state)


# ---- from the command line

@pytest.mark.parametrize("spec, terms", [
    ("execution", [(1, "execution")]),
    ("0.7*runs/reward + 0.3*execution - 0.05*length + syntax",
     [(0.7, "runs/reward"), (0.3, "execution"), (-0.05, "length"), (1, "syntax")]),
    ("-0.05*length", [(-0.05, "length")]), ("2 * syntax  +  1e-3*length", [(2, "syntax"), (0.001, "length")]),
    ("syntax - -2*length", [(1, "syntax"), (2, "length")]), ("a-b/c+d", [(1, "a-b/c+d")]),
    ("- 0.5*length + syntax", [(-0.5, "length"), (1, "syntax")]), ("-length + syntax", [(-1, "length"), (1, "syntax")]),
    ("+syntax", [(1, "syntax")]), ("- length", [(-1, "length")]), ("syntax + -length", [(1, "syntax"), (-1, "length")]),
    ("my.module:f - .5*other:g", [(1, "my.module:f"), (-0.5, "other:g")]),
])
def test_parsing_a_sum(spec, terms):
    assert parse_sum(spec) == terms


def test_a_folder_with_a_strange_name_is_one_term(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "2*a + b").mkdir()
    assert parse_sum("2*a + b") == [(1.0, "2*a + b")]


@pytest.mark.parametrize("spec, words", [
    ("syntax + ", "is no term"), ("0.5*", "is no term"), ("", "is no term"), ("syntax length", "is no term"),
    ("1.2.3*syntax", "'1.2.3' is no number"), ("syntax + syntax", "syntax is there twice"), ("2*3*syntax", "is no term"),
    ("syntx", "did you mean syntax?"), ("2*bleau", "did you mean bleu?"), ("execution", "needs rows with checks"),
    ("0.5*execution + syntax", "needs rows with checks"), ("+", "a sign alone"),
    ("0.7runs/reward", "'0.7runs/reward' is no term; write weight*term"), ("0.5*(syntax + length)", "without brackets"), ("BLEU", "did you mean bleu?"),
    ("qqq", "no term of that name; Terms are execution, syntax"),
])
def test_what_is_no_sum_is_one_line(spec, words):
    with pytest.raises(InputError) as error:
        load_reward([spec])
    assert words in str(error.value) and "\n" not in str(error.value)


def test_functions_that_cannot_be_a_reward(tmp_path, monkeypatch):
    """Said when it is loaded, not by a traceback at the first score; what fails inside carries the reward's name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd_zq.py").write_text("def two(prompts, responses): return []\ndef named(*, prompts): return []\nnumber = 3\n"
                                        "def boom(prompts, responses, references): return {}['oops']\n"
                                        "def many(*columns): return [1.0] * len(columns[0])\n")
    for name, words in (("two", "two(prompts, responses) cannot be called with (prompts, responses, references)"),
                        ("named", "cannot be called with"), ("number", "number is of type int; name a function"),
                        ("booom", "odd_zq has no function 'booom'; did you mean boom?"),
                        ("xyz", "odd_zq has no function 'xyz'; name one that it defines")):
        with pytest.raises(InputError) as error:
            load_reward([f"odd_zq:{name}"])
        assert words in str(error.value)
    assert call_reward(load_reward(["odd_zq:many"]), ["a"], ["b"]).tolist() == [1.0]
    with pytest.raises(KeyError) as error:
        call_reward(load_reward(["odd_zq:boom"]), ["a"], ["b"])
    assert error.value.__notes__ == ["in the reward boom"]
    with pytest.raises(InputError, match="--reward names syntax twice"):
        load_reward(["syntax", "length", "syntax"])


def test_a_folder_is_one_by_any_name(tmp_path, monkeypatch):
    """Under another path the same model would count double, or never disagree with itself."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").symlink_to("a")
    assert repeated(["a", "c", "./a"]) == "./a" and repeated(["a", "b"]) == "b" and repeated(["a", str(tmp_path / "a")]) == str(tmp_path / "a")
    assert repeated(["syntax", "length", "syntax"]) == "syntax" and repeated(["a", "c", "./c"]) is None
    with pytest.raises(InputError, match=r"\./a is there twice; add up its weights"):
        parse_sum("0.5*a + 0.5*./a")
    for name in ("a/final", "length", "execution"):  # a folder of a rule's name is not what the rule's name means
        (tmp_path / name).mkdir()
    assert repeated(["a", "a/final"]) == "a/final"
    monkeypatch.setattr("nanorlhf.terms.hf.resolve", lambda name: f"resolved {name}")
    assert reward_folders(["0.5*a + syntax - length", "nowhere", "b", "execution"]) == {"reward model 1": "resolved a", "reward model 2": "resolved b"}


@pytest.mark.parametrize("source, words", [("import sys\nsys.exit(5)\n", "SystemExit: 5"), ("1 / 0\n", "ZeroDivisionError: division by zero"),
                                           ("import os.path as f\nfrom math import nothing\n", "ImportError: cannot import name 'nothing'")])
def test_a_module_that_cannot_be_imported(tmp_path, monkeypatch, source, words):
    monkeypatch.chdir(tmp_path)
    name = f"broken_zq{len(source)}"
    (tmp_path / f"{name}.py").write_text(source)
    with pytest.raises(InputError) as error:
        load_reward([f"{name}:f"])
    assert f"--reward {name}:f: importing {name} ended with {words}" in str(error.value)


def test_execution_is_found_in_any_spec():
    assert needs_execution(["runs/a", "0.1*execution + syntax"]) and not needs_execution(["runs/execution", "syntax"])


@pytest.mark.parametrize("spec, options, expected", [
    ("length", dict(clip=2.0), [1, 2]), ("length", dict(normalise=True), [-1, 1]), ("2*length", dict(clip=0.5, normalise=True), [-1, 1]),
    ("lengths_zq:f", dict(clip=2.0), [1, 2]), ("lengths_zq:f", dict(normalise=True), [-1, 1])])
def test_clip_and_normalisation_reach_the_terms(tmp_path, monkeypatch, spec, options, expected):
    """Of one term too, a lone function among them: lengths 1 and 3, of mean 2 and deviation 1."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lengths_zq.py").write_text("def f(prompts, responses, references): return [len(text.split()) for text in responses]\n")
    reward = load_reward([spec], **options)
    reward.start(["p", "q"], ["x", "x + 1"])
    assert reward(["p", "q"], ["x", "x + 1"]).tolist() == expected


def test_several_specs_make_an_ensemble_of_sums():
    reward = load_reward(["2*syntax", "length"], "min")
    assert reward(["p", "q"], ["x = 1", "x"], [None, None]).tolist() == [2.0, 1.0]
    assert reward.disagreement.tolist() == [0.5, 0.5]
    assert {name: values.tolist() for name, values in term_values(reward).items()} == {"syntax": [1, 1], "length": [3, 1]}
