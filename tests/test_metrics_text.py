"""The text metrics against hand computations, against NLTK, sacreBLEU and rouge-score, and against garbage.

The oracle tests draw new pairs in every run. A failure prints the seed and the pair; `METRICS_SEED=<seed>` repeats it.
"""

import ast
import json
import math
import os
import random
import re
import sys
import time
import warnings
from fractions import Fraction
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from nanorlhf import metrics
from nanorlhf.errors import InputError
from nanorlhf.metrics import (bootstrap, bootstrap_interval, chrf, codebleu, conala_bleu, corpus_bleu, corpus_bootstrap,
                              evaluate, exact_match, paired_bootstrap, paired_corpus_bootstrap, parses, pass_at_k, rouge, ruby,
                              ruby_quality, sacrebleu, sentence_bleu, token_f1)
from nanorlhf.metrics.bleu import (SMOOTHING, bleu_counts, bleu_score, chrf_counts, chrf_score, conala_counts,
                                   conala_score, conala_tokens, sacrebleu_counts, sacrebleu_score, tokens_13a)
from nanorlhf.metrics.rouge import lcs_indices, lcs_length, porter_stem

SEED = int(os.environ.get("METRICS_SEED", random.SystemRandom().randrange(2**32)))
CONALA = Path(__file__).resolve().parents[2] / "shared" / "data" / "conala"
PAIRS = 2000
# What `evaluate` computes from texts alone, and what needs an encoder or a sandbox beside them.
NEED_MORE = {"bertscore", "bertscore_precision", "bertscore_recall", "quality_execution"}
COMPUTED = [name for name in metrics.METRIC_NAMES if name not in NEED_MORE]


# ---- pairs to compare on ----

ODDITIES = ["", " ", "\n", "x", ".", "é", "naïve Straße", "变量 = 1", "\U0001f916 = '\u200d'", "a\u00a0b", "İ", "\ud800",
            "\x00", "&quot;a&quot; &amp;lt; b", "1,000.5-2", "a-\nb", "a-\n", "<skipped>", "x\r\ny",
            "a\x0bb\x85c\u2028d", "a - b 3-4 .5 5.", "yyyyy y", "flies dying skies running agreed hopping falling",
            "_private __dunder__ camelCaseName HTTPServer"]
NAMES = ["x", "df", "my_list", "os", "re", "camelCase", "HTTPServer", "np", "values", "i", "sorting", "relational"]


def python_like(rng):
    """A line of Python-like text, for machines without CoNaLa."""
    name, other = rng.choice(NAMES), rng.choice(NAMES)
    return rng.choice([f"{name} = [{other} for {other} in range({rng.randrange(99)})]",
                       f"{name}.{other}('{rng.choice(NAMES)}', \"{rng.random():.3f}\")",
                       f"print({name}[{rng.randrange(9)}:-1], {other} != {rng.randrange(1000)})",
                       f"sorted({name}, key=lambda {other}: {other}[1])"])


def snippets(rng):
    if (CONALA / "conala-train.json").is_file():
        rows = json.loads((CONALA / "conala-train.json").read_text(encoding="utf-8"))
        return [row[key] for row in rng.sample(rows, 1500) for key in ("snippet", "rewritten_intent") if row[key]]
    return [python_like(rng) for _ in range(1500)]


def mutated(text, rng, others):
    """`text` after a few edits: pieces dropped, doubled, swapped, replaced, cut, broken into lines, odd text put in."""
    pieces = re.findall(r"\w+|\W", text)
    for _ in range(rng.randrange(5)):
        if not pieces:
            break
        i, j = rng.randrange(len(pieces)), rng.randrange(len(pieces))
        edit = rng.randrange(6)
        if edit == 0:
            del pieces[i]
        elif edit == 1:
            pieces.insert(j, pieces[i])
        elif edit == 2:
            pieces[i], pieces[j] = pieces[j], pieces[i]
        elif edit == 3:
            pieces[i] = rng.choice(NAMES)
        elif edit == 4:
            pieces = pieces[:i + 1]
        else:
            pieces.insert(i, rng.choice(["\n", rng.choice(ODDITIES), " "]))
    lines = ["".join(pieces)] + [rng.choice(others) for _ in range(rng.choice([0, 0, 0, 0, 1, 2]))]
    return "\n".join(lines)


def make_pairs(count, seed):
    """[(prediction, [one to three references])]."""
    rng = random.Random(seed)
    texts = snippets(rng)
    pairs = []
    for _ in range(count):
        text = rng.choice(texts)
        references = [mutated(text, rng, texts) for _ in range(rng.choice([1, 1, 2, 3]))]
        prediction = rng.choice([mutated(text, rng, texts), references[0], rng.choice(texts), rng.choice(ODDITIES)])
        if rng.random() < 0.05:
            references[0] = rng.choice(ODDITIES)
        pairs.append((prediction, references))
    return pairs


@pytest.fixture(scope="module")
def pairs():
    return make_pairs(PAIRS, SEED)


def assert_equal(cases, tolerance, what):
    """cases: (ours, theirs, input). The largest difference, relative above 1, must stay within the tolerance."""
    def difference(case):
        return abs(case[0] - case[1]) / max(1, abs(case[1]))
    worst = max(cases, key=difference)
    print(f"{what}: {len(cases)} comparisons, largest difference {difference(worst):.1e}, seed {SEED}")
    assert difference(worst) <= tolerance, \
        f"METRICS_SEED={SEED} {what}: ours {worst[0]!r}, source {worst[1]!r}, {worst[2]!r}"


# ---- NLTK BLEU ----

def words(text):
    return text.split()


def test_bleu_clips_repeated_words_by_hand():
    """Papineni's example: seven "the" against "the cat is on the mat" (two "the"). Clipped 2, possible 7, and the
    hypothesis is longer than the reference, so 2/7."""
    ours = sentence_bleu([words("the cat is on the mat")], ["the"] * 7, weights=(1.0,))
    assert ours == pytest.approx(2 / 7, abs=1e-15)


def test_bleu_brevity_penalty_by_hand():
    """12 tokens against 28, all right: precision 1, penalty exp(1 - 28/12) = exp(-4/3)."""
    assert sentence_bleu([["a"] * 28], ["a"] * 12, weights=(1.0,)) == pytest.approx(math.exp(-4 / 3), abs=1e-15)


def test_bleu_reference_length_is_the_closest_and_of_two_the_shorter():
    """Length 3; references of 2 and 4 are equally close: 2 counts, so no penalty, and all unigrams match the longer.
    Length 6; 8 is closer than 1: exp(1 - 8/6)."""
    assert sentence_bleu([list("abcd"), list("ab")], list("abc"), weights=(1.0,)) == 1.0
    ours = sentence_bleu([list("abcdefgh"), list("a")], list("abcdef"), weights=(1.0,))
    assert ours == pytest.approx(math.exp(-1 / 3), rel=1e-14)


def hand_smoothed():
    """a b c d against a b x d: matches 3, 1, 0, 0 of 4, 3, 2, 1; equal lengths, no penalty; BLEU = (p1 p2 p3 p4)^(1/4).

    method0  3/4, 1/3, f, f           with f the smallest normal float
    method1  3/4, 1/3, 0.1/2, 0.1/1
    method2  3/4, 2/4, 1/3, 1/2
    method3  3/4, 1/3, 1/(2*2), 1/(4*1)
    method4  3/4, 1/3, (ln 4 / 10) / 2, (ln 4 / 20) / 1
    method5  m0 = 7/4; m1 = (7/4 + 3/4 + 1/3)/3 = 17/18; m2 = (17/18 + 1/3 + 0)/3 = 23/54; m3 = 23/162; m4 = 23/486
    method7  4, then 5, with l = ln 4 / 20: m1 = 17/18; m2 = (17/18 + 1/3 + l)/3; m3 = (m2 + 2l)/3; m4 = (m3 + l + 0)/3
    """
    tiny, log4 = sys.float_info.min, math.log(4) / 20
    m2 = (17 / 18 + 1 / 3 + log4) / 3
    m3 = (m2 + 2 * log4) / 3
    return {"method0": (3 / 4, 1 / 3, tiny, tiny), "method1": (3 / 4, 1 / 3, 0.05, 0.1),
            "method2": (3 / 4, 2 / 4, 1 / 3, 1 / 2), "method3": (3 / 4, 1 / 3, 1 / 4, 1 / 4),
            "method4": (3 / 4, 1 / 3, log4, log4), "method5": (17 / 18, 23 / 54, 23 / 162, 23 / 486),
            "method7": (17 / 18, m2, m3, (m3 + log4) / 3)}


@pytest.mark.parametrize("smoothing", sorted(hand_smoothed()))
def test_bleu_smoothing_by_hand(smoothing):
    expected = math.exp(sum(math.log(p) for p in hand_smoothed()[smoothing]) / 4)
    ours = sentence_bleu([list("abxd")], list("abcd"), smoothing=smoothing)
    assert ours == pytest.approx(expected, rel=1e-12, abs=0), hand_smoothed.__doc__


def test_bleu_method6_by_hand():
    """a b c d against a b c x: p1 = 3/4, p2 = 2/3, then
    p3 = (1 + 5 * (2/3)^2 / (3/4)) / (2 + 5) = (1 + 80/27)/7 = 107/189; p4 = (0 + 5 * p3^2 / p2) / (1 + 5)."""
    p3 = 107 / 189
    expected = (3 / 4 * 2 / 3 * p3 * (5 * p3**2 / (2 / 3) / 6)) ** 0.25
    assert sentence_bleu([list("abcx")], list("abcd"), smoothing="method6") == pytest.approx(expected, rel=1e-12)
    with pytest.raises(InputError, match="method6"):
        sentence_bleu([list("abxd")], list("abcd"), smoothing="method6")


def test_bleu_one_token_leaves_zero_precisions_out_in_method4():
    """Length 1 has ln 1 = 0: the zeros stay zero and are left out of the mean, so exp(ln(1) / 4) = 1."""
    assert sentence_bleu([["a"]], ["a"], smoothing="method4") == 1.0


def test_corpus_bleu_charges_short_sentences_one_ngram_of_each_order():
    """[a b c d] and [x], both right. Matches 5, 3, 2, 1; possible 4+1, 3+1, 2+1, 1+1 (NLTK's floor of 1):
    (5/5 * 3/4 * 2/3 * 1/2)^(1/4) = (1/4)^(1/4). The official CoNaLa BLEU has no such floor and gives 100."""
    ours = corpus_bleu([[list("abcd")], [["x"]]], [list("abcd"), ["x"]])
    assert ours == pytest.approx(0.25 ** 0.25, rel=1e-14)
    assert conala_bleu(["a b c d", "x"], ["a b c d", "x"]) == pytest.approx(100, abs=1e-12)


def test_bleu_without_any_match_or_any_sentence_is_zero():
    assert sentence_bleu([["a"]], ["b"], smoothing="method5") == 0.0
    assert sentence_bleu([["a"]], [], smoothing="method1") == 0.0 == sentence_bleu([[]], ["a"]) == corpus_bleu([], [])


def nltk_value(function, *arguments):
    """NLTK's value, or the class of the error that our InputError stands for (method 6 only)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return function(*arguments)
        except (AssertionError, IndexError):
            return InputError


def our_value(function, *arguments):
    try:
        return function(*arguments)
    except InputError:
        return InputError


def test_sentence_bleu_equals_nltk(pairs):
    nltk = pytest.importorskip("nltk.translate.bleu_score", reason="NLTK is the oracle (requirements-dev.txt)")
    rng, smooth, cases = random.Random(SEED), nltk.SmoothingFunction(), []
    for prediction, references in pairs:
        split = rng.choice([words, conala_tokens])
        hypothesis, references = split(prediction), [split(reference) for reference in references]
        weights = rng.choice([(0.25,) * 4, (0.25,) * 4, (1.0,), (0.5, 0.3, 0.2), (0.2,) * 5])
        for name in rng.sample(sorted(SMOOTHING), 2):
            theirs = nltk_value(nltk.sentence_bleu, references, hypothesis, weights, getattr(smooth, name))
            ours = our_value(sentence_bleu, references, hypothesis, weights, name)
            if InputError in (ours, theirs):
                assert ours is theirs and name == "method6", f"METRICS_SEED={SEED} {name} {hypothesis!r} {references!r}"
            else:
                cases.append((ours, theirs, (name, weights, hypothesis, references)))
    assert_equal(cases, 1e-12, "sentence_bleu")


def test_corpus_bleu_equals_nltk(pairs):
    nltk = pytest.importorskip("nltk.translate.bleu_score", reason="NLTK is the oracle (requirements-dev.txt)")
    rng, smooth, cases = random.Random(SEED), nltk.SmoothingFunction(), []
    tokens = [([words(r) for r in references], words(prediction)) for prediction, references in pairs]
    for start, size in [*((i, 10) for i in range(0, PAIRS, 40)), (0, PAIRS)]:
        references, hypotheses = zip(*tokens[start:start + size])
        for name in SMOOTHING if size < PAIRS else rng.sample(sorted(SMOOTHING), 1):
            theirs = nltk_value(nltk.corpus_bleu, references, hypotheses, (0.25,) * 4, getattr(smooth, name))
            ours = our_value(corpus_bleu, references, hypotheses, (0.25,) * 4, name)
            if InputError in (ours, theirs):
                assert ours is theirs and name == "method6", f"METRICS_SEED={SEED} {name} rows {start}+{size}"
            else:
                cases.append((ours, theirs, (name, start, size)))
    assert_equal(cases, 1e-12, "corpus_bleu")


@pytest.mark.parametrize("call, message", [
    (lambda: sentence_bleu([["a"]], ["a"], smoothing="metod1"), "did you mean 'method1'"),
    (lambda: sentence_bleu([["a"]], ["a"], smoothing=1), "unknown smoothing"),
    (lambda: sentence_bleu([["a"]], "a b"), "not a list of tokens"),
    (lambda: sentence_bleu(["a", "b"], ["a"]), "not a list of tokens"),
    (lambda: sentence_bleu([], ["a"]), "non-empty list"),
    (lambda: corpus_bleu([[["a"]]], []), "0 hypotheses but 1"),
    (lambda: sentence_bleu([["a"]], ["a"], weights=()), "weights"),
    (lambda: sentence_bleu([["a"]], [None]), "not a list of tokens"),
])
def test_bleu_bad_input_is_one_clear_line(call, message):
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


# ---- the official CoNaLa BLEU ----

def slow_conala_tokens(code):
    """The rules, letter by letter: space around what is no ASCII letter, digit or underscore; a cut between lower and
    upper case; both quotes to backticks; whitespace separates."""
    ascii_words = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_"
    tokens, word = [], ""
    for letter in code:
        if letter not in ascii_words:
            tokens += [word, "" if letter.isspace() else "`" if letter in "'\"" else letter]
            word = ""
        elif word and "a" <= word[-1] <= "z" and "A" <= letter <= "Z":
            tokens.append(word)
            word = letter
        else:
            word += letter
    return [token for token in tokens + [word] if token]


def slow_conala_bleu(predictions, references):
    """bleu_score.py's rules in exact fractions, matching n-grams one by one."""
    matches, possible, length, reference_length = [0] * 4, [0] * 4, 0, 0
    for prediction, several in zip(predictions, references):
        hypothesis, several = slow_conala_tokens(prediction), [slow_conala_tokens(text) for text in several]
        length += len(hypothesis)
        reference_length += min(len(reference) for reference in several)
        for n in (1, 2, 3, 4):
            grams = [hypothesis[i:i + n] for i in range(len(hypothesis) - n + 1)]
            pools = [[reference[i:i + n] for i in range(len(reference) - n + 1)] for reference in several]
            possible[n - 1] += len(grams)
            for k, gram in enumerate(grams):  # the k-th gram matches if some reference holds as many as seen so far
                seen = grams[:k + 1].count(gram)
                matches[n - 1] += any(pool.count(gram) >= seen for pool in pools)
    if min(possible) == 0 or min(matches) == 0:
        return 0.0
    product = math.prod(Fraction(m, p) for m, p in zip(matches, possible))
    ratio = Fraction(length, reference_length) if reference_length else math.inf
    return 100 * float(product) ** 0.25 * (1 if ratio > 1 else math.exp(1 - 1 / ratio))


def test_conala_tokens_by_hand():
    assert conala_tokens("fooBar(\"x_1\")  + 'HTTPServer'") == [
        "foo", "Bar", "(", "`", "x_1", "`", ")", "+", "`", "HTTPServer", "`"]
    assert conala_tokens("a.b\n\té==1") == ["a", ".", "b", "é", "=", "=", "1"]
    assert conala_tokens("") == conala_tokens(" \n") == []


def test_conala_bleu_by_hand():
    """a b c d against a b c d e: all precisions 1, penalty exp(1 - 5/4), so 100 exp(-1/4) = 77.88.
    a b c d e against a b c d x: 4/5, 3/4, 2/3, 1/2, product 1/5, so 100 (1/5)^(1/4) = 66.87.
    a b c d against a b c x: 3/4, 2/3, 1/2, 0/1: one zero precision, so 0."""
    assert conala_bleu(["a b c d"], ["a b c d e"]) == pytest.approx(77.88007830714049, abs=1e-10)
    assert conala_bleu(["a b c d e"], ["a b c d x"]) == pytest.approx(66.87403049764221, abs=1e-10)
    assert conala_bleu(["a b c d"], ["a b c x"]) == 0.0


def test_conala_bleu_takes_the_shortest_reference_not_the_closest():
    """a b c d e against six tokens a b c d e f and the one token z: precisions 1, shortest length 1, no penalty: 100.
    By NLTK's closest reference the penalty would be exp(1 - 6/5)."""
    assert conala_bleu(["a b c d e"], [["a b c d e f", "z"]]) == pytest.approx(100, abs=1e-12)
    assert corpus_bleu([[list("abcdef"), ["z"]]], [list("abcde")]) == pytest.approx(math.exp(-0.2), rel=1e-12)


def test_conala_bleu_sees_no_difference_between_quotes_or_spacing():
    assert conala_bleu(["f( 'a' )"], ['f("a")']) == pytest.approx(100, abs=1e-12)


@pytest.mark.parametrize("predictions, references", [
    ([], []), ([""], [""]), ([""], ["x"]), (["x"], [""]), (["a b"], ["a b"])])
def test_conala_bleu_of_nothing_and_of_too_short_is_zero(predictions, references):
    assert conala_bleu(predictions, references) == 0.0


def test_conala_bleu_equals_a_slow_transcription(pairs):
    for prediction, references in pairs:
        for text in (prediction, *references):
            assert conala_tokens(text) == slow_conala_tokens(text), f"METRICS_SEED={SEED} {text!r}"
    cases = []
    for start, size in [*((i, 1) for i in range(0, PAIRS, 4)), *((i, 10) for i in range(0, PAIRS, 40)), (0, PAIRS)]:
        predictions, references = zip(*pairs[start:start + size])
        cases.append((conala_bleu(predictions, references), slow_conala_bleu(predictions, references), (start, size)))
    assert_equal(cases, 1e-9, "conala_bleu")


# ---- sacreBLEU and chrF ----

def test_tokens_13a_by_hand():
    """Full stop and comma stay between digits; a hyphen stays unless a digit is before it; other marks stand alone."""
    assert tokens_13a('x = 1,000.5-2; f("a-b", it\'s)') == [
        "x", "=", "1,000.5", "-", "2", ";", "f", "(", '"', "a-b", '"', ",", "it's", ")"]
    assert tokens_13a("x &lt; y, a.b") == ["x", "<", "y", ",", "a", ".", "b"]
    assert tokens_13a("ab-\ncd\nef <skipped>") == ["abcd", "ef"]
    assert tokens_13a("a-\n") == ["a-"]  # the end of the text is no line to be joined with


def test_sacrebleu_by_hand():
    """a b c d against a b x d: 3/4, 1/3, then the zeros 1/(2*2) and 1/(4*1): 100 (1/64)^(1/4) = 35.36; with a fifth
    reference token the penalty exp(1 - 5/4). Three tokens have no 4-gram: 0."""
    assert sacrebleu(["a b c d"], ["a b x d"]) == pytest.approx(100 * (1 / 64) ** 0.25, abs=1e-10)
    assert sacrebleu(["a b c d"], ["a b x d e"]) == pytest.approx(100 * (1 / 64) ** 0.25 * math.exp(-0.25), abs=1e-10)
    assert sacrebleu(["a b c"], ["a b c"]) == 0.0 == sacrebleu([], [])


def test_chrf_by_hand():
    """ab against abc: 1-grams 2 of 2 and 3, 2-grams 1 of 1 and 2, no 3-gram in the prediction. Precision 1,
    recall (2/3 + 1/2)/2 = 7/12; F2 = 5 * 7/12 / (4 + 7/12) = 7/11. Spaces do not count."""
    assert chrf(["ab"], ["abc"]) == pytest.approx(700 / 11, abs=1e-10)
    assert chrf(["a b"], [" ab c\n"]) == pytest.approx(700 / 11, abs=1e-10)
    assert chrf([""], [""]) == 0.0 == chrf([], []) == chrf(["x"], ["y"])


def test_chrf_takes_the_better_reference():
    assert chrf(["ab"], [["zz", "ab"]]) == 100.0


def test_chrf_breaks_ties_as_sacrebleu_does():
    """bbab against bya: P = 2/4 / 3, R = 2/3 / 3; against aa: P = 1/4 / 2, R = 1/2 / 2. F2 is 5/24 for both; in floats, by
    sacreBLEU's order of operations, the second is the larger by a bit, and its counts go into the corpus. It used to be the first."""
    assert chrf_counts("bbab", ["bya", "aa"]) == [4, 2, 1, 3, 1, 0] + [0] * 12
    library = pytest.importorskip("sacrebleu", reason="sacreBLEU is the oracle (requirements-dev.txt)")
    rng = random.Random(SEED)
    rows = [("".join(rng.choices("abc", k=rng.randrange(1, 9))), ["".join(rng.choices("abcx", k=rng.randrange(1, 9))) for _ in "12"])
            for _ in range(2000)]
    counts = [sum(column) for column in zip(*(chrf_counts(*row) for row in rows))]
    theirs = library.CHRF()._extract_corpus_statistics([row[0] for row in rows], streams([row[1] for row in rows]))
    assert counts == [sum(column) for column in zip(*theirs)], f"METRICS_SEED={SEED}"


def streams(references):
    """References per sentence -> sacreBLEU's reference streams, None where a sentence has fewer."""
    return [list(stream) for stream in zip_longest(*references)]


def test_sacrebleu_and_chrf_equal_sacrebleu(pairs):
    library = pytest.importorskip("sacrebleu", reason="sacreBLEU is the oracle (requirements-dev.txt)")
    bleu, char_f = library.BLEU(force=True), library.CHRF()
    tokenizer, cases = bleu.tokenizer, {"sacrebleu": [], "chrf": []}
    for prediction, references in pairs:
        assert tokens_13a(prediction) == tokenizer(prediction.rstrip()).split(), f"METRICS_SEED={SEED} {prediction!r}"
    for start, size in [*((i, 1) for i in range(PAIRS)), *((i, 10) for i in range(0, PAIRS, 40)), (0, PAIRS)]:
        predictions, references = map(list, zip(*pairs[start:start + size]))
        given, case = streams(references), pairs[start] if size == 1 else (start, size)
        for what, ours, theirs in (("sacrebleu", sacrebleu, bleu), ("chrf", chrf, char_f)):
            cases[what].append((ours(predictions, references), theirs.corpus_score(predictions, given).score, case))
    for what in cases:
        assert_equal(cases[what], 1e-9, what)


@pytest.mark.parametrize("metric", [conala_bleu, sacrebleu, chrf, evaluate])
@pytest.mark.parametrize("predictions, references, message", [
    (["a"], [], "1 predictions but 0 references"), (["a"], ["a", "b"], "1 predictions but 2"),
    ([None], ["a"], r"predictions\[0\] is a NoneType"), (["a", 3], ["a", "b"], r"predictions\[1\] is a int"),
    (["a"], [b"a"], r"references\[0\] is a bytes"), (["a"], [["a", 1]], r"references\[0\]\[1\] is a int"),
    (["a"], [[]], "at least one reference"), ("a", "a", "predictions is a str"),
    (["a"], None, "references is a NoneType"),
    (iter(["a"]), ["a"], "predictions is a list_iterator"),
])
def test_corpus_metrics_name_what_is_wrong(metric, predictions, references, message):
    with pytest.raises(InputError, match=message) as caught:
        metric(predictions, references)
    assert "\n" not in str(caught.value)


# ---- ROUGE ----

def test_rouge_by_hand():
    """the cat sat / the cat was on: 1-grams 2 of 3 and 4, F = 2*2/7; 2-grams 1 of 2 and 3, F = 2/5; LCS "the cat"."""
    scores = rouge("The cat sat.", "the CAT was on")
    assert scores["rouge1"] == pytest.approx((2 / 3, 1 / 2, 4 / 7), abs=1e-15)
    assert scores["rouge2"] == pytest.approx((1 / 2, 1 / 3, 2 / 5), abs=1e-15)
    assert scores["rougeL"] == scores["rougeLsum"] == pytest.approx((2 / 3, 1 / 2, 4 / 7), abs=1e-15)


def test_rouge_l_keeps_order_and_rouge_1_does_not():
    """police killed the gunman / the gunman killed police (after Lin 2004): all four words, LCS of two."""
    scores = rouge("the gunman killed police", "police killed the gunman")
    assert scores["rouge1"][2] == 1.0 and scores["rougeL"][2] == 0.5


def test_rouge_lsum_unites_lines_by_hand():
    """Lin 2004, section 3.2: against w1 w2 w3 w4 w5 the lines w1 w2 w6 w7 w8 and w1 w3 w8 w9 w5 hit {w1, w2} and
    {w1, w3, w5}: the union is 4 of 5, precision 4 of 10."""
    scores = rouge("w1 w2 w6 w7 w8\nw1 w3 w8 w9 w5", "w1 w2 w3 w4 w5")
    assert scores["rougeLsum"] == pytest.approx((4 / 10, 4 / 5, 2 * 0.4 * 0.8 / 1.2), abs=1e-15)


def test_rouge_lsum_clips_hits():
    """One "a" cannot hit both lines of the reference: 1 hit, precision 1, recall 1/2."""
    assert rouge("a", "a\na")["rougeLsum"] == pytest.approx((1.0, 0.5, 2 / 3), abs=1e-15)


def test_rouge_clips_repetition():
    """a a a / a: 1 hit of 3 and of 1."""
    assert rouge("a a a", "a")["rouge1"] == pytest.approx((1 / 3, 1.0, 0.5), abs=1e-15)


def test_rouge_stems_words_longer_than_three_letters_only():
    """running, runs -> run, as the reference has it; "was" and "dies" differ: three letters stay, die is irregular."""
    assert rouge("running runs", "run run", stem=True)["rouge1"][2] == 1.0
    assert rouge("running runs", "run run")["rouge1"][2] == 0.0
    assert rouge("was", "wa", stem=True)["rouge1"][2] == 0.0


def test_rouge_does_not_see_code_punctuation():
    assert rouge("x == [1]", "x = (1)")["rougeL"][2] == 1.0
    assert rouge("()[]", "()[]")["rougeL"] == (0.0, 0.0, 0.0)


def test_rouge_of_nothing_is_zero():
    for prediction, reference in [("", ""), ("a", ""), ("", "a"), ("\n", "a\n\nb")]:
        assert set(rouge(prediction, reference).values()) == {(0.0, 0.0, 0.0)}


def test_rouge_equals_rouge_score(pairs):
    library = pytest.importorskip("rouge_score.rouge_scorer", reason="rouge-score is the oracle (requirements-dev.txt)")
    kinds = ["rouge1", "rouge2", "rouge3", "rougeL", "rougeLsum"]
    scorers, cases = [library.RougeScorer(kinds, use_stemmer=stem) for stem in (False, True)], []
    for i, (prediction, references) in enumerate(pairs):
        stem = i % 2 == 1
        theirs, ours = scorers[stem].score_multi(references, prediction), rouge(prediction, references, kinds, stem)
        for kind in kinds:
            cases += [(a, b, (kind, stem, prediction, references)) for a, b in zip(ours[kind], theirs[kind])]
    assert_equal(cases, 1e-9, "rouge")


def test_rouge_lsum_equals_rouge_score_on_many_repeated_lines():
    """Few words on many lines: where the choice among equally long subsequences shows."""
    library = pytest.importorskip("rouge_score.rouge_scorer", reason="rouge-score is the oracle (requirements-dev.txt)")
    rng, scorer, cases = random.Random(SEED), library.RougeScorer(["rougeLsum"]), []
    for _ in range(PAIRS):
        texts = ["\n".join(" ".join(rng.choices("abcd", k=rng.randrange(7))) for _ in range(rng.randrange(1, 5)))
                 for _ in range(2)]
        ours, theirs = rouge(*texts, kinds=["rougeLsum"])["rougeLsum"], scorer.score(texts[1], texts[0])["rougeLsum"]
        cases += [(a, b, texts) for a, b in zip(ours, theirs)]
    assert_equal(cases, 1e-9, "rougeLsum, repeated lines")


def table_lcs(a, b):
    """The quadratic table, and rouge-score's walk back through it."""
    table = [[0] * (len(a) + 1) for _ in range(len(b) + 1)]
    for i, x in enumerate(b, 1):
        for j, y in enumerate(a, 1):
            table[i][j] = table[i - 1][j - 1] + 1 if x == y else max(table[i - 1][j], table[i][j - 1])
    i, j, found = len(b), len(a), []
    while i and j:
        if b[i - 1] == a[j - 1]:
            i, j = i - 1, j - 1
            found.append(i)
        elif table[i][j - 1] > table[i - 1][j]:
            j -= 1
        else:
            i -= 1
    return table[-1][-1], found


def test_bit_parallel_lcs_equals_the_table():
    rng = random.Random(SEED)
    for _ in range(500):
        a, b = (rng.choices("abc", k=rng.randrange(90)) for _ in range(2))
        length, found = table_lcs(a, b)
        assert (lcs_length(a, b), lcs_indices(a, b)) == (length, found), f"METRICS_SEED={SEED} {a} {b}"


def test_porter_stem_by_the_paper():
    """Porter 1980's examples, step by step, carried through all steps; then NLTK's: flies, spied, enjoy, geology."""
    pairs = """caresses caress ponies poni cats cat feed feed agreed agre plastered plaster motoring motor sing sing
        conflated conflat hopping hop falling fall hissing hiss fizzed fizz filing file happy happi relational relat
        conditional condit rational ration digitizer digit radically radic vietnamization vietnam operator oper
        hopefulness hope
        sensibility sensibl triplicate triplic formalize formal electrical electr goodness good revival reviv
        adjustable adjust replacement replac adoption adopt effective effect probate probat rate rate cease ceas
        controlling control rolling roll flies fli spied spi died die enjoy enjoy geology geolog dying die sky sky
        by by""".split()
    for word, stem in zip(pairs[::2], pairs[1::2]):
        assert porter_stem(word) == stem, word


def test_porter_stem_equals_nltk():
    porter = pytest.importorskip("nltk.stem.porter", reason="NLTK is the oracle (requirements-dev.txt)")
    rng, stemmer = random.Random(SEED), porter.PorterStemmer()
    endings = """s es ies sses ss ed ied eed ing at bl iz y ational tional enci anci izer bli alli entli eli ousli
        ization ation ator alism iveness fulness ousness aliti iviti biliti fulli logi icate ative alize iciti ical
        ful ness al ance ence er ic able ible ant ement ment ent ion sion tion ou ism ate iti ous ive ize e ll ly ally
        bly""".split()
    starts = ["".join(rng.choices("aeiouybcdlstzw1", k=rng.randrange(6))) for _ in range(20000)]
    starts += [start + start[-1] for start in starts if start]
    words = {start + "".join(rng.choices(endings, k=rng.randrange(3))) for start in starts}
    words |= set(re.findall("[a-z0-9]+", " ".join(snippets(rng)).lower()))
    words |= set(stemmer.pool) | {"y" * n for n in range(9)} | {"yy" * 2000}
    for word in words:
        assert porter_stem(word) == stemmer.stem(word), f"METRICS_SEED={SEED} {word!r}"


@pytest.mark.parametrize("kinds", ["rougeL", ["rouge"], ["rouge0"], ["rougeW"], [1], ["rouge1\n"]])
def test_rouge_unknown_kind(kinds):
    with pytest.raises(InputError, match="rougeLsum"):
        rouge("a", "a", kinds=kinds)


# ---- exact match, parsing, token F1, pass@k ----

@pytest.mark.parametrize("prediction, reference, expected", [
    ("x = 1", "x = 1", True), ("  x = 1\n", "x = 1", True), ("x=1  # one", "x = 1", True), ("f('a')", 'f("a")', True),
    ("(a + b)", "a + b", True), ("0x10", "16", True), ("x = 1", "x = 2", False), ("a + b", "b + a", False),
    ("f(", "f(", True), ("f(", "f( ", True), ("f((", "f(", False),  # unparsable: only as text
    ("print 'a'", "print  'a'", False), ("", "", True), ("", "# nothing", False), ("#a", "#b", False),
    ("1", "1.0", False), ("1", "True", False), ("x", ["y", "(x)"], True), ("x", ["y", "z"], False),
])
def test_exact_match(prediction, reference, expected):
    assert exact_match(prediction, reference) is expected


@pytest.mark.parametrize("code, expected", [
    ("x = 1", True), ("", True), ("f(", False), ("\x00", False), ("'\ud800'", False), ("(" * 1000, False),
    ("-" * 100000 + "1", False), ("print 1", False)], ids=lambda value: repr(value)[:12])
def test_parses(code, expected):
    assert parses(code) is expected


def test_parsing_is_silent():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert parses(r"re.sub('\d', x)") and parses("x is 1") and exact_match(r"'\d' ", r"('\d')")
    assert not seen


def test_token_f1_by_hand():
    """f ( x ) against f ( y ): 3 common of 4 and 4, F1 3/4. a a a against a: clipped 1, F1 = 2 * 1 / (3 + 1) = 1/2;
    unclipped it would be 3/2. Of several references the best."""
    assert token_f1("f(x)", "f( y )") == 0.75
    assert token_f1("a a a", "a") == 0.5
    assert token_f1("a", ["b", "a b"]) == pytest.approx(2 / 3)
    assert (token_f1("", ""), token_f1("a", ""), token_f1("", "a"), token_f1("a b", "b a")) == (1.0, 0.0, 0.0, 1.0)


def test_token_f1_is_symmetric_and_never_above_1(pairs):
    for prediction, references in pairs:
        score = token_f1(prediction, references[0])
        assert 0 <= score <= 1 and score == token_f1(references[0], prediction), f"METRICS_SEED={SEED} {prediction!r}"
        assert token_f1(prediction * 3, prediction) <= 1


def test_pass_at_k_by_hand():
    """5 samples, 2 right. k=1: 2/5. k=2: 1 - C(3,2)/C(5,2) = 1 - 3/10. k=4: every draw of 4 has a right one: 1."""
    assert [pass_at_k(5, 2, k) for k in (1, 2, 4, 5)] == pytest.approx([0.4, 0.7, 1.0, 1.0], abs=1e-15)
    assert pass_at_k(5, 0, 5) == 0.0 and pass_at_k(np.int64(3), 3, 1) == 1.0


def test_pass_at_k_equals_counting_every_draw():
    from itertools import combinations
    for n in range(1, 7):
        for c in range(n + 1):
            for k in range(1, n + 1):
                draws = [any(i < c for i in draw) for draw in combinations(range(n), k)]
                assert pass_at_k(n, c, k) == pytest.approx(sum(draws) / len(draws), abs=1e-15)


def test_pass_at_k_keeps_digits_at_large_n():
    """1 right of 10^5, k = 1: 10^-5, where 1 - (1 - 10^-5) computed in floats has lost 11 digits."""
    assert pass_at_k(100000, 1, 1) == 1e-5


@pytest.mark.parametrize("arguments", [
    (5, 6, 1), (5, -1, 1), (5, 2, 6), (5, 2, 0), (0, 0, 1), (5.0, 2, 1), ("5", 2, 1)])
def test_pass_at_k_bad_input(arguments):
    with pytest.raises(InputError, match="pass_at_k"):
        pass_at_k(*arguments)


@pytest.mark.parametrize("metric", [exact_match, token_f1, rouge])
def test_sentence_metrics_name_what_is_wrong(metric):
    with pytest.raises(InputError, match="prediction is a NoneType"):
        metric(None, "a")
    with pytest.raises(InputError, match="reference is a int"):
        metric("a", 1)
    with pytest.raises(InputError, match="at least one reference"):
        metric("a", [])


# ---- evaluate ----

def test_evaluate_is_its_parts():
    predictions, references = ["x = 1", "print( 'a' )", "f("], ["x = 2", ['print("a")', "y"], "f(1)"]
    scores = evaluate(predictions, references)
    assert set(scores.pop("reasons")) == NEED_MORE and set(scores) == set(metrics.METRIC_NAMES)
    assert {name for name, score in scores.items() if score is None} == NEED_MORE
    assert all(type(score) is float for name, score in scores.items() if name not in NEED_MORE)
    tokens = [[conala_tokens(t) for t in ([r] if isinstance(r, str) else r)] for r in references]
    assert scores["exact_match"] == 1 / 3 and scores["parses"] == 2 / 3
    assert scores["conala_bleu"] == conala_bleu(predictions, references)
    assert scores["bleu"] == corpus_bleu(tokens, [conala_tokens(p) for p in predictions], smoothing="method1")
    assert scores["sacrebleu"] == sacrebleu(predictions, references) and scores["chrf"] == chrf(predictions, references)
    for kind in ("rouge1", "rouge2", "rougeL"):
        assert scores[kind] == pytest.approx(np.mean([rouge(*pair)[kind][2] for pair in zip(predictions, references)]))
    assert scores["token_f1"] == pytest.approx(np.mean([token_f1(*pair) for pair in zip(predictions, references)]))
    for name, score in codebleu(predictions, references).items():
        assert scores[name] == score
    levels = [ruby(*pair) for pair in zip(predictions, references)]
    assert scores["ruby"] == pytest.approx(np.mean([score for score, _ in levels]))
    assert [scores[f"ruby_{level}"] for level in ("graph", "tree", "string")] == [0.0, 2 / 3, 1 / 3]
    qualities = [ruby_quality(prediction) for prediction in predictions]
    assert scores["ruby_quality"] == pytest.approx(np.mean([quality["ruby_quality"] for quality in qualities]))
    for part in ("syntax", "complexity", "style"):
        assert scores[f"quality_{part}"] == pytest.approx(np.mean([quality[part] for quality in qualities]))


def test_evaluate_counts_only_what_ran():
    """Of three verdicts one is missing: execution is the mean of the two; the row without weighs its other parts."""
    predictions, references = ["x = 1", "x = 2", "f("], ["x = 1"] * 3
    scores = evaluate(predictions, references, executes=[True, None, 0.5])
    assert scores["quality_execution"] == 0.75 and "quality_execution" not in scores["reasons"]
    assert scores["ruby_quality"] == pytest.approx((1 + 1 + 0.1) / 3)
    for executes in (None, [None] * 3):
        reason = evaluate(predictions, references, executes=executes)["reasons"]["quality_execution"]
        assert "no prediction was run" in reason and "syntax 50%, complexity 25%, style 25%" in reason
    with pytest.raises(InputError, match="one verdict for each of the 3 predictions"):
        evaluate(predictions, references, executes=[True])
    with pytest.raises(InputError, match="executes=2"):
        evaluate(predictions, references, executes=[2, True, True])


def test_evaluate_of_nothing_is_none_with_the_reason():
    scores = evaluate([], [])
    assert set(scores["reasons"]) == set(metrics.METRIC_NAMES) and "no predictions" in scores["reasons"]["rouge2"]
    assert all(scores[name] is None for name in metrics.METRIC_NAMES)


def test_evaluate_some_metrics_and_unknown_ones():
    assert set(evaluate(["a"], ["a"], metrics=["rougeL", "chrf"])) == {"rougeL", "chrf", "reasons"}
    with pytest.raises(InputError, match="did you mean 'rougeL'"):
        evaluate(["a"], ["a"], metrics=["rougel"])


def test_evaluate_of_identity_is_perfect():
    texts = ["print(sorted(values, key=lambda v: v[1]))", "x = [y for y in range(10)]"]
    scores = evaluate(texts, texts)
    for name, scale in {"conala_bleu": 100, "sacrebleu": 100, "chrf": 100}.items():
        assert scores[name] == pytest.approx(scale, abs=1e-9)
    for name in ("exact_match", "bleu", "rouge1", "rouge2", "rougeL", "token_f1", "parses", "ngram_match",
                 "syntax_match", "dataflow_match", "ruby", "ruby_quality"):
        assert scores[name] == pytest.approx(1, abs=1e-12)


def test_evaluating_500_predictions_is_fast():
    predictions, references = zip(*make_pairs(500, 1))
    start = time.process_time()
    evaluate(predictions, references)
    assert time.process_time() - start < 5


# ---- garbage never raises ----

GARBAGE = ["(" * 9000, "[" * 190, "-" * 9000 + "1", "1+" * 9000 + "1", "\x00" * 1000, "\ud800\udfff", "\ufeffx",
           "y" * 100_000, "a " * 9000, "\n" * 9000, "\\\n" * 5000, "0x" + "f" * 9000, "9" * 5000,
           "lambda:" * 3000 + "1",
           "f\"{" * 90, "🤖é" * 9000, "".join(" " * i + "if x:\n" for i in range(120)), "with (" * 90, r"'\d\N{x}'",
           "print 'a'", "async def", "\t x\n  y"]


@pytest.mark.parametrize("text", GARBAGE, ids=lambda text: f"{text[:6]!r} x {len(text)}")
def test_garbage_never_raises(text):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for prediction, reference in [(text, "print(1)"), ("print(1)", text), (text, text + " ")]:
            scores = evaluate([prediction], [reference])
            scores["stemmed"] = rouge(prediction, reference, ["rougeL"], stem=True)["rougeL"][2]
            assert all(math.isfinite(scores[name]) for name in (*COMPUTED, "stemmed"))


def test_random_unicode_never_raises():
    rng = random.Random(SEED)

    def text():
        letters = [chr(rng.randrange(0x110000)) for _ in range(rng.randrange(30))]
        letters += rng.choices("()[]{}'\"\\\n =:,.-#01ab", k=20)
        return "".join(rng.sample(letters, len(letters)))

    for _ in range(300):
        pair = text(), text()
        scores = evaluate(*([side] for side in pair))
        assert all(math.isfinite(scores[name]) for name in COMPUTED), f"METRICS_SEED={SEED} {pair!r}"


# ---- bootstrap ----

def test_bootstrap_of_two_values_by_hand():
    """[0, 1]: a draw of two has mean 0 with chance 1/4, 1/2 with 1/2, 1 with 1/4. The middle 40 % (quantiles 0.3, 0.7)
    is 1/2; the middle 60 % (0.2, 0.8) reaches from 0 to 1."""
    assert bootstrap_interval([0, 1], level=0.4, resamples=10000) == (0.5, 0.5)
    assert bootstrap_interval([0, 1], level=0.6, resamples=10000) == (0.0, 1.0)


def test_bootstrap_interval_agrees_with_normal_theory():
    """400 coin flips, half heads: standard error 0.5/20 = 0.025, so 0.5 -+ 1.96 * 0.025 = (0.451, 0.549)."""
    low, high = bootstrap_interval([0, 1] * 200, resamples=20000)
    assert low == pytest.approx(0.451, abs=0.003) and high == pytest.approx(0.549, abs=0.003)
    wide = bootstrap_interval([0, 1] * 200, level=0.99)
    assert wide[0] < low and high < wide[1]


def test_bootstrap_is_reproducible_and_of_constants_a_point():
    values = np.random.default_rng(3).normal(size=50)
    assert bootstrap_interval(values) == bootstrap_interval(list(values)) != bootstrap_interval(values, seed=1)
    assert bootstrap_interval([0.25] * 8) == (0.25, 0.25)


def test_a_bootstrap_of_many_rows_draws_in_blocks(monkeypatch):
    """Weights of at most _BLOCK numbers at once: 2 draws of 30 rows in 60, and the 201st alone. The numbers are the same."""
    values, sizes = np.random.default_rng(3).integers(0, 9, 30), []  # whole numbers: sums are exact
    whole = bootstrap_interval(values, resamples=201)
    real = np.random.default_rng
    monkeypatch.setattr(bootstrap, "_BLOCK", 60)
    monkeypatch.setattr(np.random, "default_rng", lambda seed: SimpleNamespace(
        multinomial=lambda *args, size, rng=real(seed): sizes.append(size) or rng.multinomial(*args, size=size)))
    assert bootstrap_interval(values, resamples=201) == whole and sizes == [2] * 100 + [1]


def test_paired_bootstrap_by_hand():
    """a = b: difference 0, p 1. a = b + 1 in every row: no draw at or below 0, so p = 2 * (0 + 1) / (2000 + 1)."""
    b = np.random.default_rng(0).integers(0, 9, 100)
    assert paired_bootstrap(b, b) == (0.0, 0.0, 0.0, 1.0)
    assert paired_bootstrap(b + 1, b) == (1.0, 1.0, 1.0, 2 / 2001)


def test_pairing_finds_what_two_intervals_do_not():
    """Hard and easy prompts shared by both systems: each interval is wide, the paired difference of 0.1 is not."""
    rng = np.random.default_rng(0)
    prompt = rng.normal(size=200)
    a, b = prompt + 0.1 + 0.2 * rng.normal(size=200), prompt + 0.2 * rng.normal(size=200)
    difference, low, high, p = paired_bootstrap(a, b)
    assert difference == pytest.approx((a - b).mean()) and 0 < low < difference < high and p < 0.05
    assert bootstrap_interval(a)[0] < bootstrap_interval(b)[1]


def test_paired_bootstrap_is_antisymmetric():
    a, b = np.random.default_rng(1).integers(0, 5, (2, 60))
    forward, backward = paired_bootstrap(a, b), paired_bootstrap(b, a)
    assert forward[0] == -backward[0] and forward[3] == backward[3]
    assert forward[1:3] == pytest.approx((-backward[2], -backward[1]), abs=1e-12)


def test_p_value_is_uniform_where_systems_do_not_differ():
    """Under no difference about 5 % of comparisons fall below 0.05 (200 trials: 10, standard deviation 3.1)."""
    rng = np.random.default_rng(0)
    p_values = [paired_bootstrap(*rng.normal(size=(2, 100)), resamples=500)[3] for _ in range(200)]
    assert 1 <= sum(p < 0.05 for p in p_values) <= 20 and 0.4 < np.mean(p_values) < 0.6


@pytest.mark.parametrize("count, score, whole", [
    (conala_counts, conala_score, conala_bleu),
    (sacrebleu_counts, sacrebleu_score, sacrebleu),
    (chrf_counts, chrf_score, chrf),
    (lambda prediction, references: bleu_counts([words(text) for text in references], words(prediction)), bleu_score,
     lambda predictions, references: corpus_bleu([[*map(words, texts)] for texts in references],
                                                 [*map(words, predictions)])),
], ids=["conala", "sacrebleu", "chrf", "nltk"])
def test_corpus_bootstrap_equals_resampling_the_texts(pairs, count, score, whole):
    """The value is the metric's own; and the metric of texts drawn by the same weights is the score of summed rows."""
    some = pairs[:60]
    rows = np.array([count(*pair) for pair in some])
    value, low, high = corpus_bootstrap(rows, score, resamples=200)
    assert value == pytest.approx(whole(*zip(*some)), rel=1e-12) and low <= value <= high
    drawn = np.random.default_rng(SEED).integers(0, 60, 60)
    drawn_texts = zip(*(some[i] for i in drawn))
    assert score(rows[drawn].sum(0)) == pytest.approx(whole(*drawn_texts), rel=1e-12), f"METRICS_SEED={SEED}"


def test_corpus_bootstrap_of_a_mean_is_the_bootstrap_of_the_mean():
    values = np.random.default_rng(2).integers(0, 7, 40)
    rows = np.stack([values, np.ones(40)], axis=1)
    mean, low, high = corpus_bootstrap(rows, lambda sums: sums[0] / sums[1])
    assert (low, high) == pytest.approx(bootstrap_interval(values), abs=1e-12) and mean == values.mean()
    other = rows[::-1]
    ours = paired_corpus_bootstrap(rows, other, lambda sums: sums[0] / sums[1])
    assert ours == pytest.approx(paired_bootstrap(values, values[::-1]), abs=1e-9)


def test_corpus_bootstrap_of_500_rows_is_fast():
    rows = np.random.default_rng(0).integers(5, 20, (500, 10))
    start = time.process_time()
    paired_corpus_bootstrap(rows, rows[::-1], conala_score)
    assert time.process_time() - start < 2


@pytest.mark.parametrize("call, message", [
    (lambda: bootstrap_interval([]), "at least one row"), (lambda: bootstrap_interval([1, math.nan]), "not finite"),
    (lambda: bootstrap_interval([1], level=95), "level=95"),
    (lambda: bootstrap_interval([1], resamples=0), "resamples=0"),
    (lambda: bootstrap_interval(["a"]), "pass numbers"), (lambda: paired_bootstrap([1, 2], [1]), "2 rows against 1"),
    (lambda: corpus_bootstrap([1, 2], sum), "needs 2 dimension"),
    (lambda: paired_corpus_bootstrap([[1], [2]], [[1]], sum), "2 rows against 1"),
])
def test_bootstrap_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_metrics_know_nothing_above_them():
    """The room imports the standard library, numpy, `nanorlhf.errors` and itself; no torch, so it starts fast."""
    allowed = {"numpy", "nanorlhf.errors", "nanorlhf.metrics"} | set(sys.stdlib_module_names)
    for name in ("__init__", "bleu", "bootstrap", "inputs", "match", "rouge"):
        source = (Path(metrics.__file__).parent / f"{name}.py").read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else \
                [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for module in modules:
                assert module in allowed or module.rpartition(".")[0] in allowed, f"{name} imports {module}"
