"""Exact match, parsing, pass@k and the token F1: metrics that need no n-grams.

Nothing here raises on strange code: text that Python cannot parse (syntax errors, NUL bytes, lone surrogates, nesting
beyond the parser's stack) simply does not parse.
"""

import ast
import math
import operator
import warnings
from collections import Counter

from nanorlhf.errors import InputError
from nanorlhf.metrics import inputs
from nanorlhf.metrics.bleu import conala_tokens

# SyntaxError: not Python. ValueError: NUL bytes, lone surrogates, integers too long to print. RecursionError and
# MemoryError: nesting deeper than the parser's, or ast.dump's, stack.
UNPARSABLE = (SyntaxError, ValueError, RecursionError, MemoryError)


def parse(code):
    """The `ast.Module` of `code`, or None where Python cannot parse it; never raises, never warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "\d" in generated code would print a SyntaxWarning per sample
        try:
            return ast.parse(code)
        except UNPARSABLE:
            return None


def parses(code):
    """True where `ast.parse` accepts `code`. Empty text parses: it is an empty module."""
    return parse(inputs.text(code, "code")) is not None


def canonical(code):
    """`ast.dump` of `code`: equal for two texts that differ in layout, comments, quotes and brackets only.

    None where the code does not parse, or holds no statement: an empty answer equals no comment-only reference.
    """
    tree = parse(code)
    if tree is None or not tree.body:
        return None
    try:
        return ast.dump(tree)
    except UNPARSABLE:
        return None


def exact_match(prediction, reference):
    """True if the texts are equal after `strip`, or both parse to the same syntax tree (`ast.dump` of `ast.parse`).

    Args: prediction: str. reference: str, or a list of str, of which one must match.
    Returns: bool, so a mean over a corpus is the exact-match rate in [0, 1].
    """
    prediction = inputs.text(prediction, "prediction").strip()
    references = [reference.strip() for reference in inputs.reference_texts(reference)]
    if prediction in references:
        return True
    tree = canonical(prediction)
    return tree is not None and any(tree == canonical(reference) for reference in references)


def token_f1(prediction, reference):
    """F1 of the two bags of tokens (`conala_tokens`), in [0, 1]: the cheap stand-in for CodeBLEU, under its own name.

    Counts are clipped: a token matches at most as often as it occurs on the other side, so repeating a right token
    gains nothing. 1 where neither side has a token, 0 where one has none; of several references the best counts.
    """
    tokens = Counter(conala_tokens(inputs.text(prediction, "prediction")))
    return max(_bag_f1(tokens, Counter(conala_tokens(text))) for text in inputs.reference_texts(reference))


def _bag_f1(a, b):
    """2 |a & b| / (|a| + |b|), which is the harmonic mean of |a & b| / |a| and |a & b| / |b|."""
    size = a.total() + b.total()
    return 2 * (a & b).total() / size if size else 1.0


def pass_at_k(n, c, k):
    """Chance that at least one of k samples passes, drawn from n of which c passed: 1 - C(n - c, k) / C(n, k).

    Unbiased, unlike 1 - (1 - c/n)^k. Source: Chen et al. 2021, https://arxiv.org/abs/2107.03374, section 2.1.
    Raises: InputError unless 0 <= c <= n and 1 <= k <= n; k > n cannot be estimated from n samples.
    """
    try:
        n, c, k = operator.index(n), operator.index(c), operator.index(k)
    except TypeError:
        raise InputError(f"pass_at_k(n={n!r}, c={c!r}, k={k!r}): pass three integers") from None
    if not (0 <= c <= n and 1 <= k <= n):
        raise InputError(f"pass_at_k(n={n}, c={c}, k={k}): needs 0 <= c <= n and 1 <= k <= n")
    draws = math.comb(n, k)
    return (draws - math.comb(n - c, k)) / draws
