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
    """x, x, y: 2 different ones, the commonest 2 of 3; three different ones are no finding to flag."""
    finding, = found("repeated", ["x", "x ", "y"], ["a"] * 3, ["p"] * 3)
    assert (finding["distinct"], finding["commonest"], finding["flag"]) == (2, 2, True)
    assert finding["share"] == pytest.approx(2 / 3)
    assert not found("repeated", ["x", "y", "z"], ["a"] * 3, ["p"] * 3)[0]["flag"]


def test_empty_and_unparsable_by_hand():
    """"", "x", "x +", "(": one of four empty (which parses), two do not parse."""
    predictions = ["", "x", "x +", "("]
    assert found("empty", predictions, ["a"] * 4, ["p"] * 4)[0]["share"] == 0.25
    finding, = found("unparsable", predictions, ["a"] * 4, ["p"] * 4)
    assert finding["share"] == 0.5 and finding["flag"] and "50.0%" in finding["says"]


def test_copies_by_hand():
    """Answers: part of the prompt and wrong; part of the prompt and right; a training answer, wrong, with other spaces; a training
    answer that is right."""
    prompts = ["make it foo(bar) please", "call foo(bar)", "p", "p"]
    predictions, references = ["foo(bar)", "foo(bar)", "sum( xs )", "len(xs)"], ["bar(foo)", "foo(bar)", "max(xs)", "len(xs)"]
    findings = assess(predictions, references, prompts, ["sum(xs)", "len(xs)"])
    shares = {finding["name"]: finding["share"] for finding in findings if "share" in finding}
    assert shares["copied from the prompt"] == 0.25 and shares["copied from train"] == 0.25


def test_too_good_to_be_true_only_on_conala():
    values = {"codebleu": 0.61, "bleu": 0.59, "bertscore": None, "rougeL": 0.7}
    findings = found("implausible", ["x"], ["x"], ["p"], values=values, real_conala=True)
    assert [(finding["metric"], finding["value"], finding["limit"]) for finding in findings] == \
        [("codebleu", 0.61, 0.6), ("rougeL", 0.7, 0.7)] and all(finding["flag"] for finding in findings)
    assert not found("implausible", ["x"], ["x"], ["p"], values=values)


def test_overlap_and_what_was_not_computed():
    assert found("overlap", ["x"], ["x"], ["p"], overlap=["train and test share 3 intents"])[0]["flag"]
    assert not found("overlap", ["x"], ["x"], ["p"])[0]["flag"]
    finding, = found("not computed", ["x"], ["x"], ["p"], reasons={"a": "no encoder", "b": "no encoder", "c": "nothing ran"})
    assert finding["says"] == "not computed: a, b: no encoder; c: nothing ran" and finding["metrics"] == ["a", "b", "c"]
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
