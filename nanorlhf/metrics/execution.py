"""Execution: generated code is run, and its values are compared with those that the reference gave.

The one metric, and the one reward, that cannot be talked into anything: a row carries checks, each {"setup": bindings,
"value": the expected value as a literal, "expression": what to look at afterwards, if not the code's last line}. The code
runs in the sandbox; the value comes back and is compared here, so that what is expected never enters the process that runs
the code. Equality is Python's, but True is not 1 (`sandbox.same`).
"""
import ast

from nanorlhf.metrics.match import parses
from nanorlhf.sandbox import same


def run_checks(box, codes, checks):
    """The share of its checks that each code passes.

    Args: box, an open Sandbox; codes, list of sources; checks, for each a list of checks, or None where there are none.
    Returns: a list of floats in [0, 1], None where there was nothing to check. A check whose code raises, runs out of time
        or memory, ends its process, or gives a value that is no plain builtin, is not passed. What does not parse is not run.
    """
    jobs = [(i, check) for i, (code, some) in enumerate(zip(codes, checks)) if some and parses(code) for check in some]
    outcomes = box.check_many([{"code": codes[i], "setup": check["setup"], "expression": check.get("expression")} for i, check in jobs])
    passed = [0] * len(codes)
    for (i, check), outcome in zip(jobs, outcomes):
        passed[i] += outcome.passed and same(outcome.value, ast.literal_eval(check["value"]))
    return [count / len(some) if some else None for count, some in zip(passed, checks)]


def passes_checks(box, codes, checks):
    """Whether each code passes all its checks, None where it has none: as `run_checks`, but what fails its first check is
    spared the others."""
    first = run_checks(box, codes, [some and some[:1] for some in checks])
    going = [i for i, share in enumerate(first) if share == 1]
    rest = dict(zip(going, run_checks(box, [codes[i] for i in going], [checks[i][1:] for i in going])))
    return [None if share is None else share == 1 and rest[i] in (1, None) for i, share in enumerate(first)]


def execution_accuracy(shares):
    """The share of codes that pass all their checks, of `run_checks`' shares that are not None; None if none is left."""
    known = [share for share in shares if share is not None]
    return sum(share == 1 for share in known) / len(known) if known else None
