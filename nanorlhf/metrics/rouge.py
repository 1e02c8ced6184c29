"""ROUGE-N, ROUGE-L and ROUGE-Lsum, equal to Google's rouge-score, with the Porter stemmer it takes from NLTK.

ROUGE was made for prose: only [a-z0-9] survive its tokeniser, so brackets, operators and quotes of code vanish, and
`x == 1` equals `x = 1`. Read it beside a metric that sees punctuation.

Sources: Lin 2004, https://aclanthology.org/W04-1013; Porter 1980 with NLTK's extensions.
Deviation: longest common subsequences are found with Hyyrö's (2004) bit-parallel rows instead of a table, about
64 times less work and memory, with the same result.
"""

import re
from collections import Counter
from functools import lru_cache

from nanorlhf.errors import InputError
from nanorlhf.metrics import inputs
from nanorlhf.metrics.bleu import clipped_matches

KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")

_TOKEN = re.compile(r"[a-z0-9]+")
_KIND = re.compile(r"rouge([1-9]|L|Lsum)")


def rouge(prediction, reference, kinds=KINDS, stem=False):
    """ROUGE of one text: {kind: (precision, recall, F1)}, each in [0, 1].

    Args: prediction: str. reference: str, or a list of str: then each kind takes the reference with the best F1.
        kinds: of "rouge1" to "rouge9" (n-grams), "rougeL" (longest common subsequence), "rougeLsum" (the same line by
        line). stem: strip word endings (Porter) from words longer than three letters.
    Raises: InputError for non-strings and unknown kinds.
    """
    if isinstance(kinds, str) or not all(isinstance(kind, str) and _KIND.fullmatch(kind) for kind in kinds):
        raise InputError(f"kinds={kinds!r}: pass a list of rouge1 to rouge9, rougeL, rougeLsum")
    prediction = inputs.text(prediction, "prediction")
    references = inputs.reference_texts(reference)
    scores = [_scores(prediction, reference, kinds, stem) for reference in references]
    return {kind: max((score[kind] for score in scores), key=lambda score: score[2]) for kind in kinds}


def _scores(prediction, reference, kinds, stem):
    sides = tokens(prediction, stem), tokens(reference, stem)
    scores = {}
    for kind in kinds:
        if kind == "rougeLsum":
            scores[kind] = _rouge_lsum(_lines(prediction, stem), _lines(reference, stem))
        elif kind == "rougeL":
            scores[kind] = _prf(lcs_length(*sides), *map(len, sides))
        else:
            n = int(kind[5:])
            scores[kind] = _prf(clipped_matches(sides[0], [sides[1]], n), *(len(side) - n + 1 for side in sides))
    return scores


def _prf(hits, in_prediction, in_reference):
    """(precision, recall, F1); all 0 where nothing was hit."""
    if not hits:
        return 0.0, 0.0, 0.0
    precision, recall = hits / in_prediction, hits / in_reference
    return precision, recall, 2 * precision * recall / (precision + recall)


def tokens(text, stem=False):
    """Text -> lower-case runs of [a-z0-9]; everything else separates."""
    found = _TOKEN.findall(text.lower())
    return [porter_stem(token) if len(token) > 3 else token for token in found] if stem else found


def _lines(text, stem):
    """The tokens of each line; empty lines, a trailing newline's among them, hold none and are left out."""
    return [tokens(line, stem) for line in text.split("\n") if line]


# ---- longest common subsequence ----

def _lcs_rows(prediction, reference):
    """Yields, per reference token, the row of the LCS table as bits: bit j is set where the LCS with the prediction's
    first j + 1 tokens is one longer than with its first j."""
    positions = {}
    for j, token in enumerate(prediction):
        positions[token] = positions.get(token, 0) | 1 << j
    full = (1 << len(prediction)) - 1
    row = full  # complemented: a zero bit is a step
    for token in reference:
        hit = row & positions.get(token, 0)
        row = ((row + hit) | (row - hit)) & full
        yield full & ~row


def lcs_length(prediction, reference):
    """Length of the longest common subsequence of two token lists."""
    steps = 0
    for steps in _lcs_rows(prediction, reference):
        pass
    return steps.bit_count()


def lcs_indices(prediction, reference):
    """The positions in `reference` of one longest common subsequence: the one that rouge-score's backtracking finds.

    Which one matters for ROUGE-Lsum, where the positions from several lines are united.
    """
    rows = [0, *_lcs_rows(prediction, reference)]
    i, j, found = len(reference), len(prediction), []

    def cell(i, j):  # LCS length of the first i reference and first j prediction tokens
        return (rows[i] & ((1 << j) - 1)).bit_count()

    while i > 0 and j > 0:
        if reference[i - 1] == prediction[j - 1]:
            i, j = i - 1, j - 1
            found.append(i)
        elif cell(i, j - 1) > cell(i - 1, j):
            j -= 1
        else:
            i -= 1
    return found


def _rouge_lsum(prediction, reference):
    """Union LCS (Lin 2004, section 3.2): a reference line's tokens are hit if any prediction line's LCS has them; each
    token is counted at most as often as it occurs on either side."""
    sizes = sum(map(len, prediction)), sum(map(len, reference))
    if len(prediction) == len(reference) == 1:  # a union of one, whose clipping never bites
        return _prf(lcs_length(prediction[0], reference[0]), *sizes)
    left = Counter(token for line in prediction for token in line)
    left &= Counter(token for line in reference for token in line)
    hits = 0
    for line in reference:
        union = set().union(*(lcs_indices(other, line) for other in prediction))
        for i in union:
            hits += left[line[i]] > 0
            left[line[i]] -= 1
    return _prf(hits, *sizes)


# ---- the Porter stemmer ----
# A word is a pattern of consonants c and vowels v; its measure m is the number of "vc" in it. Within one step only the
# first suffix that matches is considered, whether or not its condition then holds.

_IRREGULAR = {"skies": "sky", "sky": "sky", "dying": "die", "lying": "lie", "tying": "tie", "news": "news",
              "innings": "inning", "inning": "inning", "outings": "outing", "outing": "outing",
              "cannings": "canning", "canning": "canning", "howe": "howe", "proceed": "proceed",
              "exceed": "exceed", "succeed": "succeed"}

_STEP2 = [("ational", "ate"), ("tional", "tion"), ("enci", "ence"), ("anci", "ance"), ("izer", "ize"), ("bli", "ble"),
          ("alli", "al"), ("entli", "ent"), ("eli", "e"), ("ousli", "ous"), ("ization", "ize"), ("ation", "ate"),
          ("ator", "ate"), ("alism", "al"), ("iveness", "ive"), ("fulness", "ful"), ("ousness", "ous"),
          ("aliti", "al"), ("iviti", "ive"), ("biliti", "ble"), ("fulli", "ful")]
_STEP3 = [("icate", "ic"), ("ative", ""), ("alize", "al"), ("iciti", "ic"), ("ical", "ic"), ("ful", ""), ("ness", "")]
_STEP4 = ("al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment", "ent", "ion", "ou", "ism", "ate",
          "iti", "ous", "ive", "ize")


@lru_cache(maxsize=1 << 14)
def porter_stem(word):
    """The Porter stem of a lower-case word, with NLTK's extensions (its default mode)."""
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) <= 2:
        return word
    for step in (_plural, _past, _final_y, _step2, _step3, _step4, _final_e, _final_ll):
        word = step(word)
    return word


def _pattern(stem):
    """"c" per consonant, "v" per vowel; y is a vowel after a consonant, else a consonant. Digits are consonants."""
    kinds, previous = [], "v"  # so that a leading y is a consonant
    for letter in stem:
        previous = "v" if letter in "aeiou" or (letter == "y" and previous == "c") else "c"
        kinds.append(previous)
    return "".join(kinds)


def _measure(stem):
    return _pattern(stem).count("vc")


def _short(stem):
    """Porter's *o: ends consonant-vowel-consonant, the last not w, x or y; NLTK adds two letters, vowel-consonant."""
    pattern = _pattern(stem)
    return pattern == "vc" or (pattern.endswith("cvc") and stem[-1] not in "wxy")


def _plural(word):  # step 1a
    if word.endswith("ies"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("sses"):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word


def _past(word):  # step 1b
    if word.endswith("ied"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    for suffix in ("ed", "ing"):
        stem = word.removesuffix(suffix)
        if stem != word and "v" in _pattern(stem):
            return _repair(stem)
    return word


def _repair(stem):
    """What follows a removed -ed or -ing: conflat -> conflate, hopp -> hop, fil -> file."""
    if stem.endswith(("at", "bl", "iz")):
        return stem + "e"
    if len(stem) >= 2 and stem[-1] == stem[-2] and _pattern(stem)[-1] == "c":
        return stem if stem[-1] in "lsz" else stem[:-1]
    return stem + "e" if _measure(stem) == 1 and _short(stem) else stem


def _final_y(word):  # step 1c, NLTK's: happy -> happi, but enjoy and by stay
    return word[:-1] + "i" if word.endswith("y") and len(word) > 2 and _pattern(word[:-1])[-1] == "c" else word


def _replace(word, rules):
    """Applies the first rule whose suffix matches, if what is left of it has a positive measure."""
    for suffix, replacement in rules:
        if word.endswith(suffix):
            stem = word[:-len(suffix)]
            return stem + replacement if _measure(stem) > 0 else word
    return word


def _step2(word):
    if word.endswith("alli") and _measure(word[:-4]) > 0:
        return _step2(word[:-2])  # radicalli -> radical, then again
    if word.endswith("logi"):  # here the l belongs to the stem, so that geologi -> geolog
        return word[:-1] if _measure(word[:-3]) > 0 else word
    return _replace(word, _STEP2)


def _step3(word):
    return _replace(word, _STEP3)


def _step4(word):
    for suffix in _STEP4:
        if word.endswith(suffix):
            stem = word[:-len(suffix)]
            return stem if _measure(stem) > 1 and (suffix != "ion" or stem[-1] in "st") else word
    return word


def _final_e(word):  # step 5a
    if not word.endswith("e"):
        return word
    measure = _measure(word[:-1])
    return word[:-1] if measure > 1 or (measure == 1 and not _short(word[:-1])) else word


def _final_ll(word):  # step 5b
    return word[:-1] if word.endswith("ll") and _measure(word[:-1]) > 1 else word
