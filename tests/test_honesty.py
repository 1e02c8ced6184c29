"""Findings about an evaluation, each by hand; metrics as counts against `evaluate`; the figures of an evaluation."""
import random

import numpy as np
import pytest

from nanorlhf import plots
from nanorlhf.metrics import evaluate
from nanorlhf.metrics.counted import COUNTED
from nanorlhf.metrics.honesty import assess


def found(name, *args, **kwargs):
    return [finding for finding in assess(*args, **kwargs) if finding["name"] == name]


def test_repeated_answers_by_hand():
    """x, x, y: 2 different ones, the commonest 2 of 3; three different ones are no finding to flag, nor is one answer alone, nor one
    given twice in 21 (9.5 %); twice in 20 is 10 %, which is."""
    finding, = found("repeated", ["x", "x ", "y"], ["a"] * 3, ["p"] * 3)
    assert (finding["distinct"], finding["commonest"], finding["flag"]) == (2, 2, True)
    assert finding["share"] == pytest.approx(2 / 3)
    for predictions, flag in (["x", "y", "z"], False), (["x"], False), (["x", "x", *"abcdefghijklmnopqrs"], False), (
            ["x", "x", *"abcdefghijklmnopqr"], True):
        assert found("repeated", predictions, ["a"] * 21, ["p"] * 21)[0]["flag"] is flag


def test_empty_and_unparsable_by_hand():
    """"", "x", "x +", "(", "y": one of five empty (which parses), two do not parse. One of 100 empty is flagged, one of 101 not; one
    of 5 that does not parse is, one of 6 not."""
    predictions = ["", "x", "x +", "(", "y"]
    assert found("empty", predictions, ["a"] * 5, ["p"] * 5)[0]["share"] == 0.2
    finding, = found("unparsable", predictions, ["a"] * 5, ["p"] * 5)
    assert finding["share"] == 0.4 and finding["flag"] and "40.0%" in finding["says"]
    for name, bad, most in ("empty", " ", 99), ("unparsable", "(", 4):
        for others, flag in (most, True), (most + 1, False):
            assert found(name, [bad] + ["x"] * others, ["a"] * 102, ["p"] * 102)[0]["flag"] is flag


def test_copies_by_hand():
    """Of 8 answers one is part of its prompt and wrong, all three tokens of it; two others are right, by one of several references and
    as a tree, and one is too short. Two are training answers and wrong, with other spaces and as text that does not parse, one is
    right; an empty answer is nobody's, even if a training row has none. The second prompt's counts too under other references."""
    rows = [("foo.bar", "bar.foo", "make it foo.bar please"), ("foo(bar)", ["x", "foo( bar )"], "call foo(bar)"),
            ("a.b", "(a.b)", "give a.b"), ("-x", "x", "give -x"), ("sum( xs )", "max(xs)", "p"), ("f( ", "f()", "p"),
            ("len(xs)", "len(xs)", "p"), ("", "x", "p")]
    train = ["sum(xs)", "len(xs)", "f(", ""]

    def copies(rows):
        findings = assess(*map(list, zip(*rows)), train)
        return {finding["name"].split()[-1]: (finding["share"], finding["flag"]) for finding in findings if "copied" in finding["name"]}

    assert copies(rows) == {"prompt": (1 / 8, True), "train": (2 / 8, True)}
    rows[1] = "foo(bar)", ["x", "y"], rows[1][2]
    assert copies(rows) == {"prompt": (2 / 8, True), "train": (2 / 8, True)}
    assert copies(rows + [("x", "y", "p")] * 32) == {"prompt": (2 / 40, True), "train": (2 / 40, True)}  # 5 % is still flagged
    assert copies(rows + [("x", "y", "p")] * 33) == {"prompt": (2 / 41, False), "train": (2 / 41, False)}


def test_too_good_to_be_true_only_on_conala():
    values = {"codebleu": 0.61, "bleu": 0.59, "bertscore": None, "rougeL": 0.7}
    findings = found("implausible", ["x"], ["x"], ["p"], values=values, real_conala=True)
    assert [(finding["metric"], finding["value"], finding["limit"]) for finding in findings] == \
        [("codebleu", 0.61, 0.6), ("rougeL", 0.7, 0.7)] and all(finding["flag"] for finding in findings)
    assert not found("implausible", ["x"], ["x"], ["p"], values=values)
    assert not found("implausible", ["x"], ["x"], ["p"], real_conala=True)


def test_overlap_and_what_was_not_computed():
    finding, = found("overlap", ["x"], ["x"], ["p"], overlap=["train and test share 3 intents", "and 2 pairs"])
    assert finding["flag"] and finding["says"] == "train and test share 3 intents; and 2 pairs" and finding["pairs"] == 2
    finding, = found("overlap", ["x"], ["x"], ["p"])
    assert not finding["flag"] and finding["says"].startswith("no intent")
    finding, = found("not computed", ["x"], ["x"], ["p"], reasons={"a": "no encoder", "b": "no encoder", "c": "nothing ran"})
    assert finding["says"] == "not computed: a, b: no encoder; c: nothing ran" and finding["metrics"] == ["a", "b", "c"]
    assert not finding["flag"]
    assert assess([], [], [])[0]["name"] == "overlap"


def test_counted_metrics_are_those_of_evaluate():
    """On 60 random pairs of snippets, some empty, some broken: the score of the summed counts is the metric of the corpus."""
    rng = random.Random(0)
    parts = ["x", "y = 1", "sum(x for x in xs)", "print('a')", "", "d[k] +", "re.sub('a', 'b', s)", "if x:\n    y", "a.b(c, d=1)"]
    pairs = [(rng.choice(parts) + rng.choice(parts), rng.choice(parts)) for _ in range(60)]
    expected = evaluate(*map(list, zip(*pairs)))
    for name, metric in COUNTED.items():
        rows = np.array([metric.counts(prediction, [reference]) for prediction, reference in pairs], dtype=float)
        assert metric.score(rows.sum(0)) == pytest.approx(expected[name], rel=1e-12), name


def test_figures_of_an_evaluation(tmp_path):
    """Written where there is something to draw, None where there is not; a PNG each."""
    curves = {"a": {"bleu": ([1, 2, 3], [0.1, 0.2, 0.3]), "conala_bleu": ([1, 2], [10.0, 90.0])}, "b": {"bleu": ([1], [0.4])}}
    for path in (plots.plot_by_epoch(curves, "epoch", tmp_path / "1.png"), plots.plot_all_by_epoch(curves, "epoch", tmp_path / "2.png"),
                 plots.plot_targets({"a": {"bleu": 0.5, "ruby": None}}, tmp_path / "3.png")):
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert plots.plot_by_epoch({"a": {"loss": ([1], [2])}}, "epoch", tmp_path / "4.png") is None
    assert plots.plot_all_by_epoch({"a": {"loss": ([1], [2])}}, "epoch", tmp_path / "5.png") is None


def test_evaluations_of_a_log():
    """SFT's evaluations go by epoch, PPO's by step; of a step evaluated twice, after a resume, the last counts."""
    sft = [{"step": 5, "loss": 1.0}, {"step": 5, "epoch": 1, "eval/bleu": 0.1}, {"step": 10, "epoch": 2, "eval/bleu": 0.2}]
    assert plots.evaluations(sft) == ({"bleu": ([1, 2], [0.1, 0.2])}, "epoch")
    ppo = [{"step": 0, "eval/bleu": 0.1}, {"step": 10, "eval/bleu": 0.2}, {"step": 10, "eval/bleu": 0.3}]
    assert plots.evaluations(ppo) == ({"bleu": ([0, 10], [0.1, 0.3])}, "step")


@pytest.mark.parametrize("temperatures, expected", [([0.0, 0.0], "(greedy)"), ([1.0, 0.7], "(sampled)"), ([0.0, 1.0], ""), ([], "")])
def test_a_figure_says_how_answers_were_decoded(temperatures, expected):
    assert plots.decoding([{"step": 1, "loss": 2.0}, *({"step": 1, "temperature": each, "eval/bleu": 0.1} for each in temperatures)]) == expected
