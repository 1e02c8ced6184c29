"""Execution as metric and as reward: checks run in the sandbox, shares passed, what has none."""
import json
import math
import sys
from pathlib import Path

import pytest

from nanorlhf.data import Record
from nanorlhf.evaluation import add_execution
from nanorlhf.metrics.execution import execution_accuracy, passes_checks, run_checks
from nanorlhf.sandbox import Outcome, Sandbox
from nanorlhf.terms import ExecutionReward, load_reward

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox's walls need Linux")
CHECKS = [{"setup": "xs = [1, 2]", "value": "3"}, {"setup": "xs = [5]", "value": "5"}]


@pytest.fixture(scope="module")
def box():
    with Sandbox(timeout=5.0, workers=2) as box:
        yield box


@pytest.mark.parametrize("code, share", [
    ("sum(xs)", 1.0), ("3", 0.5), ("xs[0]", 0.5), ("sum(xs) + 1", 0.0), ("sum(", 0.0), ("", 0.0), ("undefined", 0.0),
    ("import os\nos._exit(0)", 0.0), ("'3'", 0.0), ("lambda: 3", 0.0), ("total = sum(xs)", 0.0), ("total = sum(xs)\ntotal", 1.0),
    ("float(sum(xs))", 1.0),  # 3.0 == 3, as in Python
    ("class E(int):\n    def __eq__(self, o): return True\nE(9)", 0.0),
])
def test_shares_by_hand(box, code, share):
    assert run_checks(box, [code], [CHECKS]) == [share]


def test_true_is_not_one(box):
    assert run_checks(box, ["len(xs) == 1"], [[{"setup": "xs = [0]", "value": "1"}]]) == [0.0]


def test_a_failure_is_not_none(box):
    """Code that gives no value does not pass where None is expected; code that gives None does."""
    check = [{"setup": "", "value": "None"}]
    assert run_checks(box, ["1 / 0", "None", "x = 1"], [check] * 3) == [0.0, 1.0, 1.0]


def test_expression_looks_at_what_the_code_changed(box):
    check = [{"setup": "xs = [1]", "value": "[1, 2]", "expression": "xs"}]
    assert run_checks(box, ["xs.append(2)", "xs + [2]"], [check, check]) == [1.0, 0.0]


def test_time_runs_out(box):
    with Sandbox(timeout=0.3, workers=1) as quick:
        assert run_checks(quick, ["while True: pass"], [CHECKS[:1]]) == [0.0]


def test_what_fails_its_first_check_is_spared_the_others():
    """Every code gives 3: one fails its first check, the other its second."""
    class Box:
        jobs = []

        def check_many(self, jobs):
            self.jobs += jobs
            return [Outcome(True, "ok", 0.0, "", 3) for _ in jobs]

    assert passes_checks(Box(), ["a", "b"], [CHECKS, CHECKS[::-1]]) == [False, False]
    assert [job["code"] for job in Box.jobs] == ["a", "b", "a"]


def test_what_has_no_checks_is_none_and_stays_out(box):
    assert run_checks(box, ["1", "sum(xs)", "2"], [None, CHECKS, []]) == [None, 1.0, None]
    assert execution_accuracy([None, 1.0, 0.5]) == 0.5 and execution_accuracy([None]) is None
    assert passes_checks(box, ["1", "sum(xs)", "2", "3", "xs[0]", "sum(", "3"], [None, CHECKS, [], CHECKS, CHECKS[:1], CHECKS, CHECKS[:1]]) == \
        [None, True, None, False, False, False, True]
    rows = add_execution([{"response": "1"}, {"response": "xs[0]"}], [Record("p"), Record("q", checks=CHECKS)], box)
    assert [row["execution"] for row in rows] == [None, 0.0]
    assert add_execution([{"response": "1"}], [Record("p", checks=CHECKS)], None) == [{"response": "1", "execution": None}]


def test_references_of_nano_pass_their_own_checks(box):
    """Every family once, of both test splits: a reference that failed here would be a fault of sandbox or data."""
    rows = {}
    for name in ("test", "test_hard"):
        for line in (ROOT / "data" / "nano" / f"{name}.jsonl").read_text().splitlines():
            row = json.loads(line)
            rows.setdefault(row["family"], row)
    rows = list(rows.values())
    assert len(rows) >= 60
    assert set(run_checks(box, [row["snippet"] for row in rows], [row["checks"] for row in rows])) == {1.0}


def test_execution_as_reward(box):
    """A share for prompts with checks, NaN for others; in a sum it is a term like any other."""
    records = [Record("p", "sum(xs)", checks=CHECKS), Record("q", "1")]
    execution = ExecutionReward(box, records)
    scores = execution(["p", "q", "p"], ["3", "1", "sum(xs)"], ["sum(xs)", "1", "sum(xs)"])
    assert scores[0] == 0.5 and math.isnan(scores[1]) and scores[2] == 1
    records = [Record("p", "sum(xs)", checks=CHECKS[i:i + 1]) for i in (0, 1, 1)] + [Record("p", "5", checks=CHECKS[1:])]
    shared = ExecutionReward(box, records)
    assert shared(["p", "p"], ["3", "5"], ["sum(xs)", "5"]) == [0.5, 1.0], "rows alike in prompt and reference share their checks"
    assert [record.checks for record in records] == [CHECKS[:1], CHECKS[1:], CHECKS[1:], CHECKS[1:]], "and keep their own"
    reward = load_reward(["2*execution - syntax"], execution=execution)
    assert reward(["p", "p"], ["3", "sum("], ["sum(xs)", "sum(xs)"]).tolist() == [0.0, 0.0]
    assert reward.values["execution"].tolist() == [0.5, 0.0]
