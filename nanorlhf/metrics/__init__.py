"""Metrics: strings in, plain floats out; each equal to its source, on the source's scale.

`evaluate` runs them over a corpus. Where a function and its module share a name, the name here is the function:
`nanorlhf.metrics.rouge(...)` scores; for the module's other names write `from nanorlhf.metrics.rouge import tokens`.
"""

from nanorlhf.errors import InputError, nearest
from nanorlhf.metrics import inputs
from nanorlhf.metrics.bleu import (chrf, conala_bleu, conala_tokens, corpus_bleu, sacrebleu, sentence_bleu)
from nanorlhf.metrics.bootstrap import (bootstrap_interval, corpus_bootstrap, paired_bootstrap,
                                        paired_corpus_bootstrap)
from nanorlhf.metrics.match import exact_match, parses, pass_at_k, token_f1
from nanorlhf.metrics.rouge import rouge

__all__ = ["METRIC_NAMES", "NotComputed", "bootstrap_interval", "chrf", "conala_bleu", "conala_tokens", "corpus_bleu",
           "corpus_bootstrap", "evaluate", "exact_match", "paired_bootstrap", "paired_corpus_bootstrap", "parses",
           "pass_at_k", "rouge", "sacrebleu", "sentence_bleu", "token_f1"]

BLEU_SMOOTHING = "method1"  # a zero count becomes 0.1, so that small corpora still rank


class NotComputed(Exception):
    """Raised by a metric of `evaluate` that lacks what it needs; the message is the reason shown in its place."""


def evaluate(predictions, references, metrics=None):
    """All metrics of a corpus: {name: float, or None where it could not be computed}, and {"reasons": {name: why}}.

    Args: predictions: list of str. references: list of str, or of lists of str where a prompt has several.
        metrics: names to compute; default all of `METRIC_NAMES`.

        name            is                                                                    scale
        exact_match     share equal as text or as syntax tree                                 0-1
        conala_bleu     the official CoNaLa BLEU                                              0-100
        bleu            NLTK corpus BLEU-4 on CoNaLa's tokens, smoothing method 1             0-1
        sacrebleu       sacreBLEU, 13a tokens, exp smoothing                                  0-100
        chrf            chrF2                                                                 0-100
        rouge1, 2, L    mean F1, no stemming: identifiers are no English words                0-1
        token_f1        mean F1 of the bags of CoNaLa's tokens, clipped                       0-1
        parses          share that Python's parser accepts (an empty prediction does)         0-1

    An empty corpus has no scores: every metric is None, with the reason.
    Raises: InputError for lists of different lengths, non-strings, unknown metric names. Strange texts never raise.
    """
    predictions, references = inputs.corpus(predictions, references)
    wanted = _checked_names(metrics)
    results, reasons = {}, {}
    for names, function in _METRICS.items():
        if wanted.isdisjoint(names):
            continue
        try:
            values = _run(function, predictions, references)
        except NotComputed as reason:
            values = [None] * len(names)
            reasons |= dict.fromkeys(wanted.intersection(names), str(reason))
        results |= {name: value for name, value in zip(names, values) if name in wanted}
    return results | {"reasons": reasons}


def _run(function, predictions, references):
    if not predictions:
        raise NotComputed("there are no predictions")
    values = function(predictions, references)
    return values if isinstance(values, tuple) else (values,)


def _checked_names(metrics):
    if metrics is None:
        return set(METRIC_NAMES)
    for name in metrics:
        if name not in METRIC_NAMES:
            guess = nearest(name, METRIC_NAMES)
            raise InputError(f"unknown metric {name!r}{f'; did you mean {guess!r}?' if guess else ''} "
                             f"Known: {', '.join(METRIC_NAMES)}")
    return set(metrics)


def _mean(values):
    return sum(values) / len(values)


def _mean_of(metric):
    return lambda predictions, references: _mean([float(metric(*pair)) for pair in zip(predictions, references)])


def _bleu(predictions, references):
    tokens = [[conala_tokens(text) for text in texts] for texts in references]
    return corpus_bleu(tokens, [conala_tokens(text) for text in predictions], smoothing=BLEU_SMOOTHING)


def _rouge_means(predictions, references):
    kinds = ("rouge1", "rouge2", "rougeL")
    scores = [rouge(prediction, texts, kinds) for prediction, texts in zip(predictions, references)]
    return tuple(_mean([score[kind][2] for score in scores]) for kind in kinds)


def _share_parsed(predictions, references):
    return _mean([float(parses(prediction)) for prediction in predictions])


# names -> function of (predictions, lists of references): one float, or a tuple of one per name, or NotComputed raised.
# To add a metric, add a line; what else it needs (an encoder, verdicts) becomes an argument of `evaluate`.
_METRICS = {
    ("exact_match",): _mean_of(exact_match),
    ("conala_bleu",): conala_bleu,
    ("bleu",): _bleu,
    ("sacrebleu",): sacrebleu,
    ("chrf",): chrf,
    ("rouge1", "rouge2", "rougeL"): _rouge_means,
    ("token_f1",): _mean_of(token_f1),
    ("parses",): _share_parsed,
}
METRIC_NAMES = tuple(name for names in _METRICS for name in names)
