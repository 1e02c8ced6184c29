"""A new sample of damaged files each run (`python -m bench.fuzz` does 10,000), and that the fuzzer sees what it looks for."""
import random
import time

import pytest

from bench.fuzz import attempt, fuzz, guarded
from nanorlhf.errors import InputError

MUTANTS = 300


def test_damaged_files_load_or_are_refused():
    seed = random.SystemRandom().randrange(10 ** 9)
    print(f"seed {seed}")
    counts, failures = fuzz(MUTANTS, seed)
    assert not failures, f"python -m bench.fuzz --seed {seed} --mutants {MUTANTS}: {failures}"
    totals = {outcome: sum(count[outcome] for count in counts.values()) for outcome in ("loaded", "refused")}
    assert sum(totals.values()) == MUTANTS and all(total > MUTANTS / 20 for total in totals.values())


def test_the_same_seed_damages_the_same():
    assert fuzz(30, 5, only="conala") == fuzz(30, 5, only="conala")


def raises(error):
    def reader(folder):
        raise error
    return reader


@pytest.mark.parametrize("reader, outcome", [
    (lambda folder: None, "loaded"),
    (raises(InputError("x.csv:1: bad; mend it")), "refused"),
    (raises(InputError("one\ntwo")), "not one short line: 'one\\ntwo'"),
    (raises(InputError("x" * 2000)), "not one short line: "),
    (raises(KeyError("a")), "KeyError: 'a'"),
    (raises(ValueError("bad")), "ValueError: bad"),
    (raises(SystemExit(2)), "SystemExit: 2"),
    (lambda folder: time.sleep(5), "TimeoutError: took longer than 0.2 s"),
    (lambda folder: bytearray(2 ** 31), "MemoryError: "),
], ids=["sound", "refused", "two lines", "long", "KeyError", "ValueError", "exit", "hang", "memory"])
def test_what_goes_wrong_is_seen(reader, outcome, tmp_path):
    assert attempt(tmp_path, reader, seconds=0.2, memory_mb=256).startswith(outcome)


def test_the_guard_leaves_no_limits_behind():
    import resource
    import signal
    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)
    with guarded(seconds=1, memory_mb=256):
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
    assert before == (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM))
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
