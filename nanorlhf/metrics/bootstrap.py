"""Bootstrap intervals and paired comparisons: how much of a difference is the test set's luck.

Rows (test prompts) are drawn with replacement; the interval is the percentile interval of the statistic over the draws
(Efron and Tibshirani 1993, chapter 13; for metrics of generated text, Koehn 2004, https://aclanthology.org/W04-3250).
Two systems are compared on the same draws, so that what makes a prompt hard for both cancels. A corpus statistic such
as BLEU is no mean over rows: it is computed anew from the summed counts of each draw (`bleu.conala_counts` and
`bleu.conala_score`, and so on), which costs no new counting.

Same seed, same numbers. The intervals speak of other prompts, not of other training runs: seeds are a separate source.
"""

import numpy as np

from nanorlhf.errors import InputError

_BLOCK = 1 << 22  # weights held at once: 32 MB


def bootstrap_interval(values, level=0.95, resamples=2000, seed=0):
    """Percentile interval (low, high) of the mean of `values`, one value per row.

    Raises: InputError for no values, values that are not finite, a level outside (0, 1), fewer than one resample.
    """
    values = _rows(values, "values", 1)
    return _interval(_resampled(values[:, None], _mean_over(len(values)), resamples, seed), level)


def paired_bootstrap(a, b, level=0.95, resamples=2000, seed=0):
    """Mean of a - b over rows of the same prompts -> (mean_difference, low, high, p_value).

    The two-sided p-value inverts the interval: twice the smaller share of draws at or beyond 0, either side, counting
    the data themselves as one draw, so never below 2 / (resamples + 1).
    """
    a, b = _rows(a, "a", 1), _rows(b, "b", 1)
    _same_length(a, b)
    draws = _resampled((a - b)[:, None], _mean_over(len(a)), resamples, seed)
    return float(np.mean(a - b)), *_interval(draws, level), _p_value(draws)


def corpus_bootstrap(counts, score, level=0.95, resamples=2000, seed=0):
    """A corpus statistic with its interval -> (value, low, high).

    Args: counts: (N, K), one row of counts per sentence. score: sum of rows (K,) -> float.
    Example: corpus_bootstrap([conala_counts(p, [r]) for p, r in pairs], conala_score)
    """
    counts = _rows(counts, "counts", 2)
    return float(score(counts.sum(0))), *_interval(_resampled(counts, score, resamples, seed), level)


def paired_corpus_bootstrap(counts_a, counts_b, score, level=0.95, resamples=2000, seed=0):
    """score(a) - score(b) of two systems on the same sentences -> (difference, low, high, p_value)."""
    counts_a, counts_b = _rows(counts_a, "counts_a", 2), _rows(counts_b, "counts_b", 2)
    _same_length(counts_a, counts_b)
    columns = counts_a.shape[1]

    def difference(sums):
        return float(score(sums[:columns]) - score(sums[columns:]))

    both = np.concatenate([counts_a, counts_b], axis=1)  # (N, 2K): one draw of rows serves both
    draws = _resampled(both, difference, resamples, seed)
    return difference(both.sum(0)), *_interval(draws, level), _p_value(draws)


def _mean_over(n):
    return lambda sums: sums[0] / n


def _resampled(rows, score, resamples, seed):
    """score(summed rows) for each draw of N from N rows with replacement -> (resamples,)."""
    if resamples < 1:
        raise InputError(f"resamples={resamples}: needs at least 1 (2000 is usual)")
    n = len(rows)
    generator = np.random.default_rng(seed)
    values = []
    while len(values) < resamples:
        block = min(resamples - len(values), max(_BLOCK // n, 1))
        weights = generator.multinomial(n, np.full(n, 1 / n), size=block)  # (block, N): how often each row was drawn
        values += [score(sums) for sums in weights.astype(np.float64) @ rows]
    return np.array(values)


def _interval(draws, level):
    if not 0 < level < 1:
        raise InputError(f"level={level}: needs a share between 0 and 1, such as 0.95")
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _p_value(draws):
    smaller = min((draws <= 0).sum(), (draws >= 0).sum())
    return min(1.0, float(2 * (smaller + 1) / (len(draws) + 1)))


def _rows(values, name, dimensions):
    """`values` as float64 with that many dimensions: at least one row, finite."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"{name}: pass numbers, the same number of them in each row") from None
    if array.ndim != dimensions or not len(array):
        raise InputError(f"{name} has shape {array.shape}: needs {dimensions} dimension(s) and at least one row")
    if not np.isfinite(array).all():
        raise InputError(f"{name} holds values that are not finite: leave those rows out of both systems")
    return array


def _same_length(a, b):
    if len(a) != len(b):
        raise InputError(f"{len(a)} rows against {len(b)}: a paired comparison needs the same prompts, in one order")
