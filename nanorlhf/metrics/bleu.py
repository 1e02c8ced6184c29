"""BLEU in its three dialects, and chrF: n-gram overlap of generated code with its reference.

The dialects share n-gram counting and differ in everything else, which is why "BLEU" without a name means little:

                        tokens           a zero precision           reference length           scale
    NLTK corpus_bleu    the caller's     smoothing methods 0 to 7   closest (a tie: shorter)   0-1
    conala_bleu         `conala_tokens`  makes the score 0          shortest                   0-100
    sacrebleu           `tokens_13a`     1 / 2^k matches ("exp")    closest (a tie: shorter)   0-100

Every metric is in two halves, so that a bootstrap can resample sentences without counting again:
`*_counts(prediction, references)` gives one row of integers per sentence, `*_score(sum of rows)` the corpus score.
A BLEU row is [prediction length, reference length, matches of order 1..N, possible matches of order 1..N].

Deviation from the sources: an empty corpus scores 0 where they divide by zero or index an empty list.
Source of BLEU: Papineni et al. 2002, https://aclanthology.org/P02-1040. Sources of the dialects stand at each function.
"""

import math
import re
import sys
from collections import Counter

from nanorlhf.errors import InputError, nearest
from nanorlhf.metrics import inputs

MAX_ORDER = 4
CHRF_ORDER, CHRF_BETA = 6, 2


# ---- counting, shared by all ----

def ngram_counts(tokens, n):
    """Counter of the n-grams of a sequence, as tuples; empty where the sequence is shorter than n."""
    return Counter(zip(*(tokens[i:] for i in range(n))))


def clipped_matches(hypothesis, references, n):
    """N-gram matches, each n-gram counted at most as often as in the one reference that holds it most often."""
    counts = ngram_counts(hypothesis, n)
    most = ngram_counts(references[0], n)
    for reference in references[1:]:
        most |= ngram_counts(reference, n)
    return sum(min(count, most[ngram]) for ngram, count in counts.items() if ngram in most)


def closest_length(length, references):
    """The reference length closest to `length`; of two equally close, the shorter."""
    return min(map(len, references), key=lambda candidate: (abs(candidate - length), candidate))


def _counts(hypothesis, references, reference_length, orders=MAX_ORDER, fewest=0):
    """One BLEU row; `fewest` is the least number of possible matches a sentence is charged with (NLTK: 1)."""
    length = len(hypothesis)
    matches = [clipped_matches(hypothesis, references, n) for n in range(1, orders + 1)]
    return [length, reference_length, *matches, *(max(length - n + 1, fewest) for n in range(1, orders + 1))]


def _split(counts):
    """A summed BLEU row -> (prediction length, reference length, matches, possible) in Python integers."""
    length, reference_length, *rest = (int(count) for count in counts)
    return length, reference_length, rest[:len(rest) // 2], rest[len(rest) // 2:]


def _brevity_penalty(length, reference_length):
    """For length > 0: where nothing was predicted nothing matched, and all scores are 0 without asking."""
    return 1.0 if length >= reference_length else math.exp(1 - reference_length / length)


def _corpus_counts(count, predictions, references):
    """The sum over sentences of `count(prediction, references)`; None for an empty corpus."""
    predictions, references = inputs.corpus(predictions, references)
    rows = [count(prediction, several) for prediction, several in zip(predictions, references)]
    return [sum(column) for column in zip(*rows)] or None


# ---- NLTK ----
# Each smoothing method maps (matches, possible, length, last) to the list of precisions, orders 1..N. `last` is
# (references, hypothesis) of the last sentence: methods 5 to 7 look at it even for a whole corpus, as NLTK's do.

def _method0(matches, possible, length, last):
    """No smoothing: a zero becomes the smallest normal float, so the score is tiny, not 0 (1.2e-77 for two zeros)."""
    return [m / p if m else sys.float_info.min for m, p in zip(matches, possible)]


def _method1(matches, possible, length, last):
    """A zero count becomes 0.1."""
    return [(m or 0.1) / p for m, p in zip(matches, possible)]


def _method2(matches, possible, length, last):
    """One is added to both counts, for orders above 1 (Lin and Och 2004)."""
    return [m / p if i == 0 else (m + 1) / (p + 1) for i, (m, p) in enumerate(zip(matches, possible))]


def _method3(matches, possible, length, last):
    """The k-th zero count becomes 1 / 2^k (NIST)."""
    precisions, k = [], 0
    for m, p in zip(matches, possible):
        k += m == 0
        precisions.append(m / p if m else 1 / (2**k * p))
    return precisions


def _method4(matches, possible, length, last):
    """The k-th zero count becomes ln(length) / (5 * 2^k); it stays zero, and is left out, where the length is 1."""
    precisions, k = [], 0
    for m, p in zip(matches, possible):
        k += m == 0
        precisions.append(1 / (2**k * 5 / math.log(length)) / p if m == 0 and length > 1 else m / p)
    return precisions


def _method5(matches, possible, length, last):
    """Each precision becomes the mean of its (already averaged) lower and its upper neighbour and itself."""
    return _neighbour_means([m / p for m, p in zip(matches, possible)], last)


def _method6(matches, possible, length, last):
    """From trigrams on, interpolates with the prior p[n-1]^2 / p[n-2] at weight 5 (Gao and He 2013)."""
    if len(matches) < 3 or matches[2] == 0:
        raise InputError("smoothing 'method6' needs at least one matching trigram and weights for three orders or "
                         "more: use another method")
    precisions = [m / p for m, p in zip(matches, possible)]
    for i in range(2, len(precisions)):
        prior = precisions[i - 1] ** 2 / precisions[i - 2]
        ngrams = max(len(last[1]) - i, 0)  # of the last sentence alone, while matches[i] is the corpus's
        precisions[i] = (matches[i] + 5 * prior) / (ngrams + 5)
    return precisions


def _method7(matches, possible, length, last):
    """Method 4, then method 5."""
    return _neighbour_means(_method4(matches, possible, length, last), last)


def _neighbour_means(precisions, last):
    """m[n] = (m[n-1] + p[n] + p[n+1]) / 3, with m[0] = p[1] + 1: hence scores above 1."""
    references, hypothesis = last
    fivegrams = clipped_matches(hypothesis, references, 5) / max(len(hypothesis) - 4, 1)  # 5 whatever the weights
    above = precisions[1:] + [fivegrams]
    means, below = [], precisions[0] + 1
    for precision, upper in zip(precisions, above):
        below = (below + precision + upper) / 3
        means.append(below)
    return means


SMOOTHING = {f"method{i}": method for i, method in enumerate(
    (_method0, _method1, _method2, _method3, _method4, _method5, _method6, _method7))}


def bleu_counts(references_tokens, hypothesis_tokens, orders=MAX_ORDER):
    """One row of counts for `bleu_score`. As in NLTK, a sentence too short for an order has 1 possible match there."""
    closest = closest_length(len(hypothesis_tokens), references_tokens)
    return _counts(hypothesis_tokens, references_tokens, closest, orders, fewest=1)


def bleu_score(counts, weights=(0.25,) * MAX_ORDER, smoothing="method0", last=None):
    """NLTK's BLEU in [0, 1] from a summed row: exp(sum_n w_n log p_n) times the brevity penalty; 0 without any match.

    `last` is (references_tokens, hypothesis_tokens) of the last sentence, read by methods 5 to 7 only.
    """
    length, reference_length, matches, possible = _split(counts)
    if matches[0] == 0:
        return 0.0
    precisions = SMOOTHING[smoothing](matches, possible, length, last)
    logs = math.fsum(w * math.log(p) for w, p in zip(weights, precisions) if p > 0)
    return _brevity_penalty(length, reference_length) * math.exp(logs)


def sentence_bleu(references_tokens, hypothesis_tokens, weights=(0.25,) * MAX_ORDER, smoothing="method0"):
    """NLTK's `sentence_bleu`: BLEU of one tokenised hypothesis against its tokenised references, in [0, 1].

    Args: references_tokens: list of token lists. hypothesis_tokens: list of tokens. weights: one per n-gram order.
        smoothing: "method0" to "method7" (Chen and Cherry 2014, https://aclanthology.org/W14-3346), each with NLTK's
        constants (epsilon 0.1, alpha 5, k 5). 5 and 7 may exceed 1; 6 raises where no trigram matches.
    Raises: InputError for text in place of tokens, no reference, unknown smoothing.
    """
    return corpus_bleu([references_tokens], [hypothesis_tokens], weights, smoothing)


def corpus_bleu(list_of_references_tokens, hypotheses_tokens, weights=(0.25,) * MAX_ORDER, smoothing="method0"):
    """NLTK's `corpus_bleu`, in [0, 1]: counts are summed over sentences before dividing.

    Args: as in `sentence_bleu`, one entry per sentence. Smoothing 5 to 7 looks at the last sentence, as in NLTK.
    """
    _check_bleu_options(weights, smoothing)
    _check_tokens(list_of_references_tokens, hypotheses_tokens)
    pairs = list(zip(list_of_references_tokens, hypotheses_tokens))
    if not pairs:
        return 0.0
    rows = [bleu_counts(references, hypothesis, len(weights)) for references, hypothesis in pairs]
    return bleu_score([sum(column) for column in zip(*rows)], weights, smoothing, last=pairs[-1])


def _check_bleu_options(weights, smoothing):
    if smoothing not in tuple(SMOOTHING):
        guess = nearest(smoothing, SMOOTHING)
        raise InputError(f"unknown smoothing {smoothing!r}{f'; did you mean {guess!r}?' if guess else ''} "
                         f"Known: {', '.join(SMOOTHING)}")
    numbers = isinstance(weights, (list, tuple)) and all(isinstance(weight, (int, float)) for weight in weights)
    if not numbers or not weights:
        raise InputError(f"weights={weights!r}: pass one number per n-gram order, such as (0.25, 0.25, 0.25, 0.25)")


def _check_tokens(list_of_references, hypotheses):
    """Text where tokens are due would be scored letter by letter, silently: the classic misuse of NLTK's BLEU."""
    if len(list_of_references) != len(hypotheses):
        raise InputError(f"{len(hypotheses)} hypotheses but {len(list_of_references)} lists of references")
    for i, (references, hypothesis) in enumerate(zip(list_of_references, hypotheses)):
        if not isinstance(references, (list, tuple)) or not references:
            raise InputError(f"references of sentence {i}: pass a non-empty list of token lists")
        for name, tokens in [("hypothesis", hypothesis), *(("a reference", reference) for reference in references)]:
            if not isinstance(tokens, (list, tuple)) or not all(isinstance(token, (str, int)) for token in tokens):
                raise InputError(f"sentence {i}: {name} is not a list of tokens; split the text first (and references "
                                 "are a list of token lists)")


# ---- the official CoNaLa evaluation ----

_NOT_WORD = re.compile(r"([^A-Za-z0-9_])")
_CAMEL = re.compile(r"([a-z])([A-Z])")


def conala_tokens(code):
    """Code -> tokens by the rules of the official CoNaLa evaluation (after Ling et al. 2016).

    Every character outside [A-Za-z0-9_] stands alone, words split where a lower-case letter meets an upper-case one,
    both quotes become a backtick, whitespace only separates.
    """
    spaced = _CAMEL.sub(r"\1 \2", _NOT_WORD.sub(r" \1 ", code))
    return spaced.replace('"', "`").replace("'", "`").split()


def conala_counts(prediction, references):
    """One row of counts for `conala_score`: a text and the list of its references."""
    references = [conala_tokens(reference) for reference in references]
    return _counts(conala_tokens(prediction), references, min(map(len, references)))


def conala_score(counts):
    """BLEU-4 in [0, 100] from a summed row: the geometric mean of the precisions times the brevity penalty."""
    length, reference_length, matches, possible = _split(counts)
    if min(matches) == 0:  # no smoothing: one zero precision is a zero score
        return 0.0
    mean = math.exp(sum(math.log(m / p) for m, p in zip(matches, possible)) / MAX_ORDER)
    return 100 * mean * _brevity_penalty(length, reference_length)


def conala_bleu(predictions, references):
    """The official CoNaLa BLEU of a corpus, 0-100, the number that papers on CoNaLa report.

    Args: predictions: list of str. references: list of str, or of lists of str where there are several.
    Source: conala-corpus/conala-baseline, eval/conala_eval.py and eval/bleu_score.py.
    """
    counts = _corpus_counts(conala_counts, predictions, references)
    return conala_score(counts) if counts else 0.0


# ---- sacreBLEU ----

# mteval-v13a: ASCII punctuation but ' , - . stands alone; a full stop or comma only next to a non-digit, a hyphen
# only after a digit. The order of the substitutions matters.
_13A = [(re.compile(pattern), replacement) for pattern, replacement in (
    (r"([{-~[-` -&(-+:-@/])", r" \1 "),
    (r"([^0-9])([.,])", r"\1 \2 "),
    (r"([.,])([^0-9])", r" \1 \2"),
    (r"([0-9])(-)", r"\1 \2 "),
)]
_ENTITIES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))


def tokens_13a(text):
    """Text -> tokens as mteval-v13a makes them. Made for newswire: it drops "<skipped>", joins lines hyphenated at
    their end and reads HTML entities, in code too."""
    text = text.rstrip().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in _ENTITIES:
        text = text.replace(entity, character)
    text = f" {text} "
    for pattern, replacement in _13A:
        text = pattern.sub(replacement, text)
    return text.split()


def sacrebleu_counts(prediction, references):
    """One row of counts for `sacrebleu_score`: a text and the list of its references."""
    hypothesis, references = tokens_13a(prediction), [tokens_13a(reference) for reference in references]
    return _counts(hypothesis, references, closest_length(len(hypothesis), references))


def sacrebleu_score(counts):
    """BLEU-4 in [0, 100] from a summed row; the k-th zero becomes 1 / 2^k; 0 where no prediction has four tokens."""
    length, reference_length, matches, possible = _split(counts)
    if not any(matches) or min(possible) == 0:
        return 0.0
    logs, k = 0.0, 0
    for m, p in zip(matches, possible):
        k += m == 0
        logs += math.log(100 * m / p if m else 100 / (2**k * p))
    return _brevity_penalty(length, reference_length) * math.exp(logs / MAX_ORDER)


def sacrebleu(predictions, references):
    """sacreBLEU's corpus score with its defaults, 0-100: 13a tokens, "exp" smoothing, mixed case.

    Args: predictions: list of str. references: list of str, or of lists of str, per prediction (sacreBLEU itself takes
        them the other way round, as one list per reference stream).
    Source: Post 2018, https://aclanthology.org/W18-6319; signature nrefs|case:mixed|eff:no|tok:13a|smooth:exp.
    """
    counts = _corpus_counts(sacrebleu_counts, predictions, references)
    return sacrebleu_score(counts) if counts else 0.0


# ---- chrF ----

def chrf_counts(prediction, references):
    """One row for `chrf_score`: [in the prediction, in the reference, matches] for 1- to 6-grams of characters.

    Whitespace is removed first. Of several references the one with the best sentence score counts.
    """
    hypothesis = "".join(prediction.split())
    counts = [_char_ngrams(hypothesis, n) for n in range(1, CHRF_ORDER + 1)]
    rows = [_chrf_row(counts, "".join(reference.split())) for reference in references]
    return max(rows, key=chrf_score)  # the first of the best


def _char_ngrams(text, n):
    return Counter([text[i:i + n] for i in range(len(text) - n + 1)])


def _chrf_row(hypothesis_counts, reference):
    row = []
    for n, counts in enumerate(hypothesis_counts, start=1):
        reference_counts = _char_ngrams(reference, n)
        matches = sum(min(count, reference_counts[ngram]) for ngram, count in counts.items()
                      if ngram in reference_counts)
        possible = counts.total() if reference_counts else 0  # no recall to be had: the order is left out
        row += [possible, reference_counts.total(), matches]
    return row


def chrf_score(counts):
    """chrF2 in [0, 100] from a summed row: F-beta (beta 2) of the mean precision and mean recall over the orders that
    both sides have."""
    counts = [int(count) for count in counts]
    orders = [(hyp, ref, match) for hyp, ref, match in zip(counts[::3], counts[1::3], counts[2::3]) if hyp and ref]
    if not any(match for _, _, match in orders):
        return 0.0
    precision = recall = 0.0
    for hyp, ref, match in orders:  # sacreBLEU's operations in its order: the last bit decides which of two references is the better
        precision, recall = precision + match / hyp, recall + match / ref
    precision, recall, factor = precision / len(orders), recall / len(orders), CHRF_BETA ** 2
    return 100 * ((1 + factor) * precision * recall / (factor * precision + recall))


def chrf(predictions, references):
    """chrF2 of a corpus, 0-100, with sacreBLEU's defaults: characters up to 6-grams, no words, no whitespace.

    Args: as in `sacrebleu`. Source: Popović 2015, https://aclanthology.org/W15-3049.
    """
    counts = _corpus_counts(chrf_counts, predictions, references)
    return chrf_score(counts) if counts else 0.0
