"""nanorlhf.monitor: each alarm fires where its trouble is and nowhere else, by hand-computed limits; a replayed log
gives the same alarms; and PPO sets alarms off where it is paid for length, and none where it is paid for right answers.
"""
import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanorlhf import plots
from nanorlhf.config import parse
from nanorlhf.monitor import (BANDS, CURED, GOLD, RAISED, REST, Alarm, Monitor, cures, distinct_n, gold_metric,
                              kl_bands, standard_error)
from nanorlhf.plots import plot_overoptimisation
from nanorlhf.run import main

ROOT = Path(__file__).resolve().parent.parent

# A real run of the default job, rounded (distinct-2: its start and end are those of its answers before and after).
KL = [0.0, 0.35, 0.4, 0.58, 0.68, 0.77, 0.97, 1.01, 1.13, 1.18, 1.25, 1.14, 1.23, 1.38, 1.37, 1.34, 1.28, 1.23, 1.3,
      1.45, 1.24, 1.37, 1.27, 1.31, 1.26, 1.34, 1.39, 1.12, 1.16, 1.25]
ENTROPY = [1.75, 1.46, 1.2, 1.1, 0.98, 0.88, 0.79, 0.71, 0.77, 0.71, 0.68, 0.69, 0.69, 0.62, 0.68, 0.64, 0.61, 0.64,
           0.63, 0.61, 0.59, 0.64, 0.59, 0.6, 0.63, 0.56, 0.6, 0.57, 0.57, 0.55]
EXPLAINED = [0.0, 0.01, 0.02, 0.03, 0.03, 0.01, 0.03, 0.03, 0.02, 0.03, 0.04, 0.02, 0.01, 0.01, 0.02, 0.01, 0.02,
             -0.08, 0.06, 0.02, -0.02, -0.01, -0.05, -0.03, 0.01, 0.02, 0.02, -0.03, 0.02, -0.03]
LENGTH = [13.09, 13.07, 12.24, 12.23, 12.04, 11.74, 12.04, 12.03, 11.3, 10.79, 11.42, 10.95, 11.24, 11.86, 11.74,
          11.44, 11.49, 11.49, 10.79, 11.57, 12.07, 10.84, 11.57, 10.88, 11.23, 11.56, 11.5, 11.27, 11.3, 11.16]
REWARD, EXACT_MATCH = [0.06, 0.95, 0.97, 0.98], [0.195, 0.375, 0.385, 0.36]  # at steps 0, 10, 20, 30


def healthy():
    """The rows of that run's log."""
    rows = [{"step": 0, "eval/reward": REWARD[0], "eval/exact_match": EXACT_MATCH[0], "eval/kl": 0.0}]
    for i in range(30):
        rows.append({"step": i + 1, "objective/kl": KL[i], "policy/entropy": ENTROPY[i],
                     "policy/clipfrac": 0.13 * 0.8 ** i, "value/explained_variance": EXPLAINED[i],
                     "response/length": LENGTH[i],
                     "response/distinct": 0.37 + 0.15 * 0.8 ** i, "objective/disagreement": 0.3 + 0.005 * i})
        if (i + 1) % 10 == 0:
            at = (i + 1) // 10
            rows.append({"step": i + 1, "eval/reward": REWARD[at], "eval/exact_match": EXACT_MATCH[at], "eval/kl": 1.4})
    return rows


def fired(alarms):
    return [(alarm.name, alarm.step) for alarm in alarms]


def training(metric, values):
    """Rows of one metric at steps 1, 2, ..."""
    return [{"step": step, metric: value} for step, value in enumerate(values, start=1)]


def evaluations(gold, reward=None, name="eval/exact_match"):
    """Rows of evaluations at steps 0, 10, ...; the learned reward rises unless given."""
    reward = range(len(gold)) if reward is None else reward
    return [{"step": 10 * i, name: g, "eval/reward": float(r)} for i, (g, r) in enumerate(zip(gold, reward))]


def test_a_healthy_run_is_silent():
    assert Monitor(eval_rows=200).replay(healthy()) == []


# ---- Bands

TROUBLE = {  # name: (metric, the value at first, the value from step 31 on, the step of the alarm)
    "kl_high": ("objective/kl", 2.0, 30.0, 33), "entropy": ("policy/entropy", 1.5, 0.02, 33),
    "distinct": ("response/distinct", 0.5, 0.01, 33), "length": ("response/length", 12.0, 31.0, 33),
    "clipfrac": ("policy/clipfrac", 0.1, 0.6, 33),
    "explained_variance": ("value/explained_variance", 0.3, -2.0, 36),
    "disagreement": ("objective/disagreement", 0.2, 0.9, 33)}


@pytest.mark.parametrize("name", TROUBLE)
def test_each_band_fires_on_its_trouble_once_and_alone(name):
    """A median of 5 is out of band once 3 of the last 5 are: step 33. Of 11, 6: step 36. All else is healthy."""
    metric, good, bad, at = TROUBLE[name]
    rows = healthy() + [{**healthy()[-2], "step": step} for step in range(31, 51)]
    rows = [{**row, metric: good if row["step"] <= 30 else bad} if "objective/kl" in row else row for row in rows]
    alarms = Monitor(eval_rows=200).replay(rows)
    assert fired(alarms) == [(name, at)]
    assert alarms[0].message.startswith(f"step {at}: ") and BANDS[name].advice in alarms[0].message
    assert f"{bad:.3g}" in alarms[0].message and "\n" not in alarms[0].message
    assert ("times that of step 1: " in alarms[0].message) == BANDS[name].relative


def test_a_response_that_shrinks_is_length_drift_too():
    """Half of 10 is 5: 5 is within the band, 4.99 is not. The message has the number, the limit and whence it comes."""
    assert Monitor(200).replay(training("response/length", [10.0] * 5 + [5.0] * 10)) == []
    (alarm,) = Monitor(200).replay(training("response/length", [10.0] * 5 + [4.99] * 10))
    assert alarm == Alarm("length", 8, "step 8: the response length, 4.99 tokens over the last 5 steps, is below 5, "
                          f"0.5 times that of step 1: {BANDS['length'].advice}")


LIMITS = [("kl_high", 15.0, 15.01), ("entropy", 0.1, 0.099), ("distinct", 0.25, 0.249), ("length", 0.5, 0.499),
          ("length", 2.0, 2.01), ("clipfrac", 0.4, 0.401), ("explained_variance", -0.5, -0.501),
          ("disagreement", 2.0, 2.01)]


@pytest.mark.parametrize("name, inside, outside", LIMITS)
def test_the_limits_themselves_are_within_the_band(name, inside, outside):
    """Relative ones, too: they are multiples of the value of step 1, here 4 (a power of 2: no product is rounded)."""
    start, times = 4.0, 4.0 if BANDS[name].relative else 1.0
    for value, expected in ((inside, []), (outside, [name])):
        alarms = Monitor(200).replay(training(BANDS[name].metric, [start] + [value * times] * 40))
        assert [alarm.name for alarm in alarms] == expected


@pytest.mark.parametrize("name", TROUBLE)
@pytest.mark.parametrize("bad", [1e9, -1e9])
def test_single_steps_never_fire(name, bad):
    """Two steps in any five, however far out."""
    metric, good, _, _ = TROUBLE[name]
    values = [good] * 5 + [bad, good, good, bad, good] * 8
    assert Monitor(200).replay(training(metric, values)) == []


def test_a_relative_band_from_0_is_none():
    """No disagreement at step 1, or no distinct token: nothing is a multiple of that."""
    for metric in ("objective/disagreement", "response/distinct"):
        assert any(band.metric == metric and band.relative for band in BANDS.values())
        assert Monitor(200).replay(training(metric, [0.0] * 3 + [0.9] * 9)) == []


def test_a_relative_band_measures_from_step_1():
    """The same lengths, 12 to 20 tokens: within twice 12, not within twice 9."""
    assert Monitor(200).replay(training("response/length", [12.0] + [20.0] * 9)) == []
    assert fired(Monitor(200).replay(training("response/length", [9.0] + [20.0] * 9))) == [("length", 5)]


def test_explained_variance_is_not_judged_while_the_value_head_is_new():
    """At step 21 a window of 11 holds steps 11 to 21: of 15 bad steps it sees 5."""
    name = "explained_variance"
    assert fired(Monitor(200).replay(training(f"value/{name}", [-1.0] * 40))) == [(name, 21)]
    assert Monitor(200).replay(training(f"value/{name}", [-1.0] * 15 + [0.1] * 25)) == []


def test_kl_bands_of_a_target():
    """Target 6: 2 to 18 nats, the lower limit from step 101 on. 20 is within the band of a target of 10, and 16 within
    that of 6, although it is above the 15 that holds without a target."""
    def run(kl, target):
        return fired(Monitor(200, kl_target=target).replay(training("objective/kl", [kl] * 110)))
    assert run(18.1, 6.0) == [("kl_high", 5)]
    assert run(18.0, 6.0) == run(16.0, 6.0) == run(20.0, 10.0) == run(2.0, 6.0) == []
    assert run(1.99, 6.0) == [("kl_low", 101)]
    assert Monitor(200).replay(training("objective/kl", [0.01] * 150)) == [], "without a target nothing is too low"
    assert run(16.0, None) == [("kl_high", 5)]
    for kl, advice in ((18.1, "the steering is too slow; raise --kl-coef"), (1.99, "the policy hardly moves; lower --kl-coef")):
        (alarm,) = Monitor(200, kl_target=6.0).replay(training("objective/kl", [kl] * 110))
        assert alarm.message.split(": ", 2)[2].startswith(advice), "not that of the other side"


def test_bands_may_be_ones_own():
    bands = {"eos": BANDS["clipfrac"]._replace(metric="response/eos", low=0.5, high=math.inf, window=1)}
    rows = training("response/eos", [0.9, 0.4]) + training("policy/clipfrac", [0.9] * 9)
    assert fired(Monitor(200, bands=bands).replay(rows)) == [("eos", 2)]


# ---- When an alarm begins

def test_an_alarm_is_not_repeated_until_it_has_been_silent():
    """KL 1 and 30, bad in 6-12: out of band from step 8 (3 of 5) to 14 (10-14 holds 10, 11, 12). From 15 to 19 it is
    silent, REST = 5 looks; bad again from 18: 3 of 5 at step 20, which is the sixth look: a new alarm. Bad again from
    17 already: out of band at 19 after four looks, 15 to 18: still the old alarm."""
    assert REST == 5
    bad_again_from_18 = [1.0] * 5 + [30.0] * 7 + [1.0] * 5 + [30.0] * 20
    assert fired(Monitor(200).replay(training("objective/kl", bad_again_from_18))) == [("kl_high", 8), ("kl_high", 20)]
    bad_again_from_17 = [1.0] * 5 + [30.0] * 7 + [1.0] * 4 + [30.0] * 20
    assert fired(Monitor(200).replay(training("objective/kl", bad_again_from_17))) == [("kl_high", 8)]


def test_rows_without_the_metric_are_no_looks():
    """The KL is out of band to step 7, within it at steps 8 to 10 and out of it again at 11: three looks of silence,
    whatever else is logged between them."""
    monitor, kl = Monitor(200), training("objective/kl", [30.0] * 5 + [1.0] * 3 + [30.0] * 5)
    others = [{"step": 8, "eval/reward": 1.0}, {"step": 8, "alarm": ["kl_high"]}, {"step": 8, "response/eos": 1.0}] * 6
    assert fired(monitor.replay(kl[:8])) == [("kl_high", 5)] and monitor.replay(others + kl[8:]) == []


def test_two_alarms_of_one_step():
    rows = [{"step": step, "objective/kl": 99.0, "policy/clipfrac": 0.9} for step in range(1, 9)]
    assert fired(Monitor(200).replay(rows)) == [("kl_high", 5), ("clipfrac", 5)]


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, None, "12", [99.0], {}])
def test_what_is_no_number_is_not_judged(junk):
    """Neither in the way nor counted: 2 of 5 finite values are bad, then 3."""
    rows = training("objective/kl", [junk, 1.0, junk, 1.0, 1.0, 99.0, junk, junk, 99.0, junk])
    monitor = Monitor(200)
    assert monitor.replay(rows) == [] and fired(monitor.see(11, {"objective/kl": 99.0})) == [("kl_high", 11)]
    monitor.see(12, {"eval/reward": junk, "eval/exact_match": 0.5})
    monitor.see(12, {"eval/reward": 0.5, "eval/exact_match": junk})
    monitor.see(12, {})
    assert monitor.evaluations == []


def troubled():
    """A run in which everything goes wrong at some time, the KL twice."""
    rows = []
    for step in range(0, 81):
        if step:
            rows.append({"step": step, "objective/kl": 30.0 if 20 < step < 30 or step > 60 else 2.0,
                         "policy/entropy": 1.9 * 0.93 ** step,
                         "response/length": 12.0 + step * 0.4, "response/distinct": max(0.01, 0.5 - step / 100),
                         "value/explained_variance": 0.5 - step / 30, "policy/clipfrac": step / 100,
                         "objective/disagreement": 0.2 + step / 100, "objective/score": math.nan if step == 7 else 0.1})
        if step % 10 == 0:
            rows.append({"step": step, "eval/reward": step / 10, "eval/exact_match": max(0.0, 0.5 - step / 200)})
    return rows


def test_a_replayed_log_is_the_live_run():
    """Resumed after any row: the alarms are those of the uninterrupted run, from a log that also records them."""
    rows, live, logged = troubled(), Monitor(200), []
    found = []
    for row in rows:
        alarms = live.see(row["step"], {name: value for name, value in row.items() if name != "step"})
        logged.append(row)
        if alarms:
            logged.append({"step": row["step"], "alarm": [alarm.name for alarm in alarms]})
        found += alarms
    names = [alarm.name for alarm in found]
    assert set(names) == {*BANDS, "gold"} and names.count("kl_high") == 2 and len(names) == len(BANDS) + 2
    logged = [json.loads(json.dumps(row)) for row in logged]
    for cut in range(len(logged) + 1):
        monitor = Monitor(200)
        assert monitor.replay(logged[:cut]) + monitor.replay(logged[cut:]) == found


def test_what_raises_kl_is_told_again_while_it_holds():
    """KL 20 in steps 1 to 17: the median of 5 is judged from step 5 on; given at 5, and after every 5 looks that it holds: 10 and 15.
    Without `repeat` once. After the rest of REST looks without it, it begins anew, whatever was counted before."""
    rows = [{"step": step, "objective/kl": 20.0} for step in range(1, 18)]
    assert [alarm.step for alarm in Monitor(200, repeat=True).replay(rows)] == [5, 10, 15] and fired(Monitor(200).replay(rows)) == [("kl_high", 5)]
    calm = [{"step": step, "objective/kl": 1.0} for step in range(18, 30)]
    again = [{"step": step, "objective/kl": 20.0} for step in range(30, 41)]
    assert [alarm.step for alarm in Monitor(200, repeat=True).replay(rows + calm + again)] == [5, 10, 15, 32, 37]


def test_where_gold_was_best():
    """Exact match .3 .4 .1 at steps 0 10 20."""
    monitor = Monitor(200)
    monitor.replay(evaluations([0.3, 0.4, 0.1]))
    assert monitor.gold_words(20) == "exact match was best at step 10: 0.400, against 0.100 at step 20"
    assert monitor.gold_words(15) == "exact match was best at step 10: 0.400", "no evaluation of that step holds it"


# ---- Gold

def test_standard_error():
    """.5 and .5 over 200 rows: sqrt(2 * .25 / 200) = .05. 0 and .2 over 50: p = .1, sqrt(2 * .09 / 50) = .06. 1 and
    1: 0."""
    assert standard_error(0.5, 0.5, 200) == pytest.approx(0.05) and standard_error(0.2, 0.0, 50) == pytest.approx(0.06)
    assert standard_error(1.0, 1.0, 10) == standard_error(0.0, 0.0, 10) == 0


def test_gold_falls_by_more_than_two_standard_errors():
    """200 rows, .5 -> .4: p = .45, sqrt(2 * .45 * .55 / 200) = .04975, twice that .0995 < .1: an alarm. .5 -> .4005: p
    = .45025, .099504 > .0995: none. The first evaluation at .4 averages with the .5 before it: a fall of .05, no alarm
    yet. The first at .29 gives (.5 + .29) / 2 = .395, and one at once. The learned reward, 0 1 2, is then 1.5."""
    assert fired(Monitor(200).replay(evaluations([0.5, 0.4]))) == []
    (alarm,) = Monitor(200).replay(evaluations([0.5, 0.4, 0.4, 0.4]))
    assert alarm == Alarm("gold", 20, "step 20: the learned reward rose by 1.5 since step 0 while exact match fell by "
                          "0.1 to 0.4, 2.0 standard errors (means of two evaluations): over-optimisation; raise "
                          "--kl-coef, or mend the reward")
    assert Monitor(200).replay(evaluations([0.5, 0.4005, 0.4005, 0.4005])) == []
    assert fired(Monitor(200).replay(evaluations([0.5, 0.29]))) == [("gold", 10)]
    assert Monitor(200).replay(evaluations([0.5, 0.4, 0.5, 0.4, 0.5, 0.4])) == [], "one evaluation in two is no fall"


def test_more_rows_show_a_smaller_fall():
    """.5 -> .4, seen as .45 at step 10: p = .475, and over 1000 rows twice sqrt(2 * .475 * .525 / 1000) is .0447 < .05.
    Over 100, .4 itself is within twice sqrt(2 * .45 * .55 / 100) = .1407."""
    assert fired(Monitor(1000).replay(evaluations([0.5, 0.4]))) == [("gold", 10)]
    assert Monitor(100).replay(evaluations([0.5, 0.4, 0.4, 0.4])) == []


def test_a_fall_counts_from_the_best_evaluation():
    """Gao et al.'s curve: gold rises from .2 to .5 and falls to .3, still above its start. Means of two: .2, .275,
    .425, .5, .5, .4, .3. The earliest best, of steps 20 and 30, is named; .5 -> .4 is as above."""
    (alarm,) = Monitor(200).replay(evaluations([0.2, 0.35, 0.5, 0.5, 0.5, 0.3, 0.3]))
    assert fired([alarm]) == [("gold", 50)]
    assert "since step 30" in alarm.message and alarm.message.endswith("or stop at step 30")
    assert "fell by 0.1 to 0.4, 2.0 standard errors" in alarm.message, "of the best and the last"


def test_one_lucky_evaluation_is_not_what_gold_fell_from():
    """.3 .45 .3 .3: means .3, .375, .375, .3; .375 -> .3 over 200 rows is within twice sqrt(2 * .3375 * .6625 / 200) =
    .0946, which .45 -> .3 is not."""
    assert Monitor(200).replay(evaluations([0.3, 0.45, 0.3, 0.3, 0.3])) == []
    assert 0.15 > 2 * standard_error(0.45, 0.3, 200)


@pytest.mark.parametrize("reward, expected", [
    ([0, 1, 2], [("gold", 10)]), ([0, 0, 0], []), ([0, -1, -2], []), ([2, 0, 1], []), ([0, -1, 1.1], [("gold", 20)]),
    ([0, -1, 1.0], [])])
def test_gold_needs_a_learned_reward_that_rises(reward, expected):
    """From the best, here step 0, to the mean of the last two; the same mean (-1 and 1 against 0) is no rise."""
    assert fired(Monitor(200).replay(evaluations([0.5, 0.2, 0.2], reward))) == expected


def test_the_learned_reward_too_counts_from_the_best_evaluation():
    """It fell from 5 before gold was best, and rose from 0 since."""
    rows = evaluations([0.2, 0.5, 0.5, 0.3, 0.3], [5, 0, 0, 1, 1])
    (alarm,) = Monitor(200).replay(rows)
    assert fired([alarm]) == [("gold", 30)] and "rose by 0.5 since step 20" in alarm.message


def test_evaluations_without_the_gold_are_passed_over():
    """Exact match .5, not known, .4, .4, beside CodeBLEU."""
    rows = [{**row, "eval/codebleu": 0.5} for row in evaluations([0.5, math.nan, 0.4, 0.4])]
    assert fired(Monitor(200).replay(rows)) == [("gold", 30)]


def test_gold_is_execution_before_exact_match_before_codebleu():
    fell, rose = [0.5, 0.2, 0.2], [0.2, 0.4, 0.5]
    for first, second in (("execution", "exact_match"), ("exact_match", "codebleu"), ("execution", "codebleu")):
        for golds, expected in (((fell, rose), ["gold"]), ((rose, fell), [])):
            columns = (evaluations(gold, name=f"eval/{name}") for gold, name in zip(golds, (first, second)))
            rows = [{**a, **b} for a, b in zip(*columns)]
            assert [alarm.name for alarm in Monitor(200).replay(rows)] == expected
    other = Monitor(200).replay(evaluations(fell, name="eval/conala_bleu"))
    assert other == [] and list(GOLD) == ["eval/execution", "eval/exact_match", "eval/codebleu"]


def test_a_gold_too_low_to_fall_is_passed_over():
    """200 rows. A best of .015 may fall by .015, and twice sqrt(2 * .0075 * .9925 / 200) is .01725: CodeBLEU is gold. A
    best of .02 may fall by .02 > 2 sqrt(2 * .01 * .99 / 200) = .0199: it is gold itself."""
    rows = evaluations([0.0, 0.015, 0.0])
    assert gold_metric(rows, 200) == gold_metric(evaluations([0.0, 0.0]), 200) == "eval/exact_match"
    rows = [{**row, "eval/codebleu": value} for row, value in zip(rows, [0.4, 0.22, 0.22])]
    assert gold_metric(rows, 200) == "eval/codebleu" and gold_metric([], 200) is None
    (alarm,) = Monitor(200).replay(rows)
    assert "while CodeBLEU fell by 0.18 to 0.22" in alarm.message
    assert gold_metric([*rows, {"eval/exact_match": 0.02}], 200) == "eval/exact_match"


def test_noise_is_no_fall_and_a_fall_is_not_missed():
    """300 runs of 20 evaluations on 200 prompts while the learned reward rises. Prompts whose answers are right with a
    probability of their own, .35 on average, at every evaluation alike: at most 3 % of the runs have an alarm. Gold
    that sinks from .4 to .2: 99 %. Prompts that are all alike, the worst case: at most 25 %."""
    generator = np.random.default_rng(0)

    def share(factors, a=0.5):
        prompts = generator.beta(a, a * 0.65 / 0.35, size=(300, 200, 1))
        runs = (generator.random((300, 200, 20)) < np.clip(prompts * factors / 0.35, 0, 1)).mean(1)
        return sum(bool(Monitor(200).replay(evaluations(run.tolist()))) for run in runs) / 300
    assert share(np.full(20, 0.35)) <= 0.03
    assert share(np.linspace(0.4, 0.2, 20)) >= 0.99
    assert 0.1 < share(np.full(20, 0.35), a=1e6) <= 0.25


# ---- The rest

def test_what_a_larger_kl_penalty_cures():
    """Updates that are too large and values that mislead it does not, and a KL below its target least of all."""
    names = {*BANDS, *kl_bands(6.0), "gold"}
    cured = {name for name in names if cures(Alarm(name, 1, ""))}
    assert cured == set(CURED) == names - {"clipfrac", "explained_variance", "kl_low"} and RAISED == 1.5


def test_distinct_n():
    """"f(x)" is f ( x ), and "f(x) y_1" has y_1 after it: bigrams 3 + 4, of which f(, (x, x), )y_1 are different: 4 /
    7. Unigrams 4 + 5, five different. White space is nothing, and texts below n tokens hold no n-gram."""
    texts = ["f(x)", " f( x )\n y_1"]
    assert distinct_n(texts) == pytest.approx(4 / 7) and distinct_n(texts, n=1) == pytest.approx(5 / 9)
    assert distinct_n(["a", "b", ""]) == distinct_n([]) == 0.0 and distinct_n(["a b"]) == 1.0
    assert distinct_n(["a a a a a"]) == 1 / 4 and distinct_n(["a b", "b a"]) == 1.0


@given(st.lists(st.text("ab( ", max_size=12), max_size=8), st.integers(1, 3), st.integers(1, 5))
def test_distinct_n_of_copies_and_of_another_order(texts, n, copies):
    """m copies hold m times the n-grams, none of them new; the order of texts is nothing."""
    assert distinct_n(texts * copies, n) == pytest.approx(distinct_n(texts, n) / copies)
    assert distinct_n(texts[::-1], n) == distinct_n(texts, n) and 0 <= distinct_n(texts, n) <= 1


def test_the_room_needs_no_torch():
    code = "import sys, nanorlhf.monitor; assert not {'torch', 'numpy', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=20)


# ---- The figure

def write_log(folder, rows):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def overoptimised(count=31):
    """Gao et al.'s shapes for RL, d (alpha - beta log d) with d = sqrt(KL): evaluations with both rewards."""
    rows = []
    for i in range(count):
        d = i / 3
        rows.append({"step": 10 * i, "eval/kl": d * d - 1e-8, "eval/reward": 0.1 + d * (1 - 0.1 * math.log(d + 1e-9)),
                     "eval/exact_match": max(0.0, 0.2 + d * (0.2 - 0.1 * math.log(d + 1e-9)))})
    return rows


@pytest.fixture
def drawn(monkeypatch):
    """Catches the figure instead of rendering it: drawn() is its list of visible axes."""
    caught = []
    monkeypatch.setattr(plots, "_write", lambda figure, path: caught.append(figure) or path)
    return lambda: [axes for axes in caught[-1].axes if axes.get_visible()]


def test_the_figure_shows_changes_against_the_root_of_kl(drawn, tmp_path):
    """Learned above gold, both 0 at step 0, a negative KL estimate as 0, the dashed line at the KL of the best gold."""
    rows = overoptimised()
    assert plot_overoptimisation(write_log(tmp_path, rows)) == tmp_path / "plots" / "overoptimisation.png"
    learned, gold = drawn()
    assert [axes.get_title(loc="left") for axes in drawn()] == ["Learned reward", "Gold: exact match"]
    best = max(rows, key=lambda row: row["eval/exact_match"])
    for axes, name in ((learned, "eval/reward"), (gold, "eval/exact_match")):
        x, y = axes.collections[0].get_offsets().T
        assert x.tolist() == pytest.approx([max(0, row["eval/kl"]) for row in rows])
        assert y.tolist() == pytest.approx([row[name] - rows[0][name] for row in rows]) and y[0] == 0
        assert axes.get_xscale() == "function" and axes.transScale.transform((9.0, 0))[0] == pytest.approx(3)
        dashed = [line for line in axes.get_lines() if line.is_dashed()]
        assert len(dashed) == 1 and dashed[0].get_xdata()[0] == pytest.approx(best["eval/kl"])
        assert "nats" in axes.get_xlabel()
    steps = [int(text.get_text()) for text in gold.texts if text.get_text().isdigit()]
    assert steps == list(range(300, -1, -30)), "31 steps: every third is written, the last among them"


@pytest.mark.parametrize("points, expected", [
    ([(1.4, 0.88), (1.41, 0.91), (1.6, 0.9)], {"10": "top", "20": "bottom", "30": "bottom"}),
    ([(1.4, 0.91), (1.41, 0.88), (1.6, 0.9)], {"10": "bottom", "20": "top", "30": "bottom"}),
    ([(1.4, 0.9), (1.4, 0.9), (1.4, 0.9)], {"30": "bottom", "20": "top"})])
def test_numbers_do_not_cover_one_another(points, expected, drawn, tmp_path):
    """Of neighbours the highest has its number above (bottom-aligned), another below, and a third none."""
    rows = [{"step": 10 * i, "eval/kl": kl, "eval/reward": reward, "eval/exact_match": 0.5}
            for i, (kl, reward) in enumerate([(0.0, 0.0), *points])]
    plot_overoptimisation(write_log(tmp_path, rows))
    sides = {text.get_text(): text.get_va() for text in drawn()[0].texts if text.get_text().isdigit()}
    assert sides == {"0": "bottom", **expected}


def test_points_follow_the_steps_not_the_kl(drawn, tmp_path):
    """The KL may shrink again; a step that was logged twice counts as the second time; rows that lack a number are left
    out."""
    def row(step, kl, reward, gold=0.3):
        return {"step": step, "eval/kl": kl, "eval/reward": reward, "eval/codebleu": gold}
    rows = [row(0, 0.0, 0.0), row(10, 4.0, 10.0), row(20, 1.0, 20.0), row(10, 2.0, 5.0), row(30, math.nan, 1.0, 0.9),
            {"step": 40, "eval/kl": 3.0, "eval/reward": 1.0}, {"step": 40, "objective/kl": 9.0}]
    plot_overoptimisation(write_log(tmp_path, rows), reward="Reward: execution")
    assert drawn()[0].collections[0].get_offsets().tolist() == [[0, 0], [2, 5], [1, 20]]
    assert [axes.get_title(loc="left") for axes in drawn()] == ["Reward: execution", "Gold: CodeBLEU"]


@pytest.mark.parametrize("missing", ["eval/kl", "eval/reward", "eval/exact_match", "all but one"])
def test_no_figure_without_gold_reward_or_kl(missing, tmp_path, capsys):
    rows = [{name: value for name, value in row.items() if name != missing}
            for row in overoptimised(1 if missing == "all but one" else 9)]
    assert plot_overoptimisation(write_log(tmp_path, rows)) is None
    words = capsys.readouterr().out
    assert words.startswith(f"{tmp_path}: no plot of over-optimisation: ") and words.count("\n") == 1
    assert not (tmp_path / "plots").exists()


@pytest.mark.filterwarnings("error")
def test_the_figure_is_a_whole_png(tmp_path):
    """Also where the KL never left 0, of which matplotlib has nothing to complain."""
    for rows in (overoptimised(), [{**row, "eval/kl": 0.0} for row in overoptimised(3)]):
        content = plot_overoptimisation(write_log(tmp_path, rows)).read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n" and content[-8:-4] == b"IEND" and len(content) > 10_000
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["overoptimisation.png"]


# ---- Training

REWARDS = '''
from difflib import SequenceMatcher

def length(prompts, responses, references):
    return [len(response) / 8 for response in responses]

def right(prompts, responses, references):
    return [SequenceMatcher(None, *pair, autojunk=False).ratio() for pair in zip(responses, references)]
'''


def launch(script, *words):
    """A script in this process, on one thread (faster, for a model so small) and without its plots. Returns its log."""
    module = importlib.import_module(script)
    config = parse(module.Config, module.PRESETS, list(words), prog=f"{script}.py")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, script.replace("train", "plot"), lambda folder: None)
        main(module.train, config)
    torch.set_num_threads(threads)
    return [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """(folder, flags of the data): in sft/ an SFT policy of one layer that is right about one time in four."""
    home = tmp_path_factory.mktemp("monitor")
    names = "xs rows items names words values keys lines parts cells nodes pairs".split()
    rows = [{"id": f"{call}-{name}-{i}", "prompt": f"{call} of {name} {i}", "reference": f"{call}(x)"}
            for i in range(10) for call in ("len", "sum", "max") for name in names]
    (home / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "monitor_rewards.py").write_text(REWARDS)
    flags = ["--data", str(home / "data.jsonl"), "--max-query", "20", "--max-response", "24", "--validation", "0.3",
             "--device", "cpu"]
    launch("train_sft", "--out", str(home / "sft"), *flags, "--n-layer", "1", "--n-head", "2", "--n-embd", "16",
           "--vocab-size", "290", "--epochs", "8", "--batch-size", "16", "--lr", "0.02", "--eval-rows", "20")
    return home, flags


def train(policy, reward, monkeypatch):
    """The log of 15 steps of PPO on a reward of REWARDS."""
    home, flags = policy
    monkeypatch.syspath_prepend(str(home))
    return launch("train_ppo", "--out", str(home / reward), "--policy", str(home / "sft" / "final"), "--reward",
                  f"monitor_rewards:{reward}", *flags, "--steps", "15", "--batch-size", "64", "--minibatch-size", "32",
                  "--eval-every", "5", "--eval-rows", "100", "--lr", "0.003", "--kl-coef", "0.05")


def test_a_reward_that_can_be_hacked_sets_off_the_alarms(policy, monkeypatch):
    """PPO is paid for characters: responses grow, exact match goes to 0, and the learned reward rises."""
    rows = train(policy, "length", monkeypatch)
    alarms = Monitor(eval_rows=100).replay(rows)
    assert {"gold", "length"} <= {alarm.name for alarm in alarms}, alarms
    scores = [row["eval/reward"] for row in rows if "eval/reward" in row]
    assert scores[-1] > scores[0] and alarms[0].step <= 15


def test_a_good_reward_sets_off_none(policy, monkeypatch):
    """PPO is paid for right characters: exact match does not fall while the learned reward rises."""
    rows = train(policy, "right", monkeypatch)
    assert Monitor(eval_rows=100).replay(rows) == []
    first, *_, last = [row for row in rows if "eval/reward" in row]
    assert last["eval/reward"] > first["eval/reward"] and last["eval/exact_match"] >= first["eval/exact_match"] > 0
