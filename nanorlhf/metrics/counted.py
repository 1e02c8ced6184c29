"""Every metric as counts of a row and a score of their sum, so that a bootstrap can draw rows without counting again.

    counts = metric.counts(prediction, references)  # a list of numbers; a row
    metric.score(sum of rows)                       # the metric of the rows together

A mean over rows is the case of two numbers: (value, 1) and their quotient.
"""
from typing import Callable, NamedTuple

from nanorlhf.metrics.bleu import (bleu_counts, bleu_score, chrf_counts, chrf_score, conala_counts, conala_score, conala_tokens,
                                   sacrebleu_counts, sacrebleu_score)
from nanorlhf.metrics.codebleu import COMPONENTS, codebleu_components, codebleu_counts
from nanorlhf.metrics.match import exact_match, parses, token_f1
from nanorlhf.metrics.rouge import rouge
from nanorlhf.metrics.ruby import ruby, ruby_quality


class Counted(NamedTuple):
    """A metric: what a row counts, and what the summed counts score."""
    counts: Callable
    score: Callable


def mean_of(value):
    """The mean over rows of value(prediction, references)."""
    return Counted(lambda prediction, references: [float(value(prediction, references)), 1.0], lambda sums: sums[0] / sums[1])


def _bleu_counts(prediction, references):
    return bleu_counts([conala_tokens(reference) for reference in references], conala_tokens(prediction))


def _codebleu_score(sums):
    return sum(codebleu_components(sums)) / len(COMPONENTS)


# The names and scales are those of `evaluate`.
COUNTED = {
    "exact_match": mean_of(exact_match),
    "conala_bleu": Counted(conala_counts, conala_score),
    "bleu": Counted(_bleu_counts, lambda sums: bleu_score(sums, smoothing="method1")),
    "sacrebleu": Counted(sacrebleu_counts, sacrebleu_score),
    "chrf": Counted(chrf_counts, chrf_score),
    "rouge1": mean_of(lambda prediction, references: rouge(prediction, references, ("rouge1",))["rouge1"][2]),
    "rouge2": mean_of(lambda prediction, references: rouge(prediction, references, ("rouge2",))["rouge2"][2]),
    "rougeL": mean_of(lambda prediction, references: rouge(prediction, references, ("rougeL",))["rougeL"][2]),
    "codebleu": Counted(codebleu_counts, _codebleu_score),
    "token_f1": mean_of(token_f1),
    "ruby": mean_of(lambda prediction, references: ruby(prediction, references)[0]),
    "ruby_quality": mean_of(lambda prediction, references: ruby_quality(prediction)["ruby_quality"]),
    "parses": mean_of(lambda prediction, references: parses(prediction)),
}
