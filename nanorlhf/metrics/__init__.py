"""Metrics: strings in, plain floats out; each equal to its source, on the source's scale.

docs/METRICS.md says what each is, how it is checked, which two components of CodeBLEU are proxies, and when not to
believe a number for code.

`evaluate` runs them over a corpus. Where a function and its module share a name, the name here is the function:
`nanorlhf.metrics.rouge(...)` scores; for the module's other names write `from nanorlhf.metrics.rouge import tokens`.
"""

from collections import Counter
from typing import NamedTuple

from nanorlhf.errors import InputError, nearest
from nanorlhf.metrics import inputs
from nanorlhf.metrics.bertscore import bert_score, default_layer
from nanorlhf.metrics.bleu import (chrf, conala_bleu, conala_tokens, corpus_bleu, sacrebleu, sentence_bleu)
from nanorlhf.metrics.bootstrap import (bootstrap_interval, corpus_bootstrap, paired_bootstrap,
                                        paired_corpus_bootstrap)
from nanorlhf.metrics.codebleu import codebleu
from nanorlhf.metrics.execution import execution_accuracy, run_checks
from nanorlhf.metrics.match import exact_match, parses, pass_at_k, token_f1
from nanorlhf.metrics.rouge import rouge
from nanorlhf.metrics.ruby import LEVELS, quality_weights, ruby, ruby_quality

__all__ = ["METRIC_NAMES", "NotComputed", "bert_score", "bootstrap_interval", "chrf", "codebleu", "conala_bleu",
           "conala_tokens", "corpus_bleu", "corpus_bootstrap", "evaluate", "exact_match",
           "execution_accuracy", "paired_bootstrap",
           "paired_corpus_bootstrap", "parses", "pass_at_k", "quality_weights", "rouge", "run_checks", "ruby", "ruby_quality",
           "sacrebleu", "sentence_bleu", "token_f1"]

BLEU_SMOOTHING = "method1"  # a zero count becomes 0.1, so that small corpora still rank


class NotComputed(Exception):
    """Raised by a metric of `evaluate` that lacks what it needs; the message is the reason shown in its place."""


class Given(NamedTuple):
    """What `evaluate` was given beside the texts."""
    executes: list | None
    encoder: object
    tokenizer: object
    layer: int | None
    idf: bool
    baseline: object


def evaluate(predictions, references, metrics=None, *, executes=None, encoder=None, tokenizer=None, encoder_name=None,
             layer=None, idf=False, baseline=None):
    """All metrics of a corpus: {name: float, or None where it could not be computed}, and {"reasons": {name: why}}.

    Args: predictions: list of str. references: list of str, or of lists of str where a prompt has several.
        metrics: names to compute; default all of `METRIC_NAMES`.
        executes: what really ran, one entry per prediction: True, False, a share of passed checks, or None.
        encoder, tokenizer, layer, idf, baseline: for BERTScore, see `bert_score`. encoder_name: what "notes" calls it.

        name                    is                                                                            scale
        exact_match             share equal as text or as syntax tree                                         0-1
        conala_bleu             the official CoNaLa BLEU                                                      0-100
        bleu                    NLTK corpus BLEU-4 on CoNaLa's tokens, smoothing method 1                     0-1
        sacrebleu               sacreBLEU, 13a tokens, exp smoothing                                          0-100
        chrf                    chrF2                                                                         0-100
        rouge1, 2, L            mean F1, no stemming: identifiers are no English words                        0-1
        codebleu                CodeBLEU with equal weights, and its components ngram_match,                  0-1
                                weighted_ngram_match, syntax_match, dataflow_match
        token_f1                mean F1 of the bags of CoNaLa's tokens, clipped                               0-1
        ruby                    mean RUBY; ruby_graph, ruby_tree, ruby_string: share compared on that level   0-1
        ruby_quality            mean of the composite; quality_syntax, quality_complexity, quality_style,     0-1
                                quality_execution: means of its parts, execution over those that ran
        bertscore               mean F; bertscore_precision, bertscore_recall; names its encoder in "notes"   0-1
        parses                  share that Python's parser accepts (an empty prediction does)                 0-1

    An empty corpus has no scores: every metric is None, with the reason. Where BERTScore was computed there is also
    {"notes": {"bertscore": encoder, layer and options}}.
    Raises: InputError for lists of different lengths, non-strings, unknown metric names. Strange texts never raise.
    """
    predictions, references = inputs.corpus(predictions, references)
    wanted = _checked_names(metrics)
    given = Given(_checked_verdicts(executes, predictions), encoder, tokenizer, layer, idf, baseline)
    results, reasons = {}, {}
    for names, function in _METRICS.items():
        if wanted.isdisjoint(names):
            continue
        try:
            values = _run(function, predictions, references, given)
        except NotComputed as reason:
            values = [None] * len(names)
            reasons |= {name: str(reason) for name in names if name in wanted}
        results |= {name: value for name, value in zip(names, values) if name in wanted}
    notes = {name: _encoder_note(given, encoder_name) for name in _BERTSCORE if results.get(name) is not None}
    return results | {"reasons": reasons} | ({"notes": notes} if notes else {})


def _run(function, predictions, references, given):
    if not predictions:
        raise NotComputed("there are no predictions")
    values = function(predictions, references, given)
    return values if isinstance(values, tuple) else (values,)


def _checked_verdicts(executes, predictions):
    """One verdict per prediction; None where nothing ran at all."""
    if executes is None:
        return None
    if not hasattr(executes, "__len__") or len(executes) != len(predictions):
        raise InputError(f"executes: pass a list with one verdict for each of the {len(predictions)} predictions, None "
                         "where one did not run")
    return list(executes)


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
    return lambda predictions, references, given: _mean([float(metric(*pair)) for pair in zip(predictions, references)])


def _corpus(metric):
    return lambda predictions, references, given: metric(predictions, references)


def _bleu(predictions, references, given):
    tokens = [[conala_tokens(text) for text in texts] for texts in references]
    return corpus_bleu(tokens, [conala_tokens(text) for text in predictions], smoothing=BLEU_SMOOTHING)


def _rouge_means(predictions, references, given):
    kinds = ("rouge1", "rouge2", "rougeL")
    scores = [rouge(prediction, texts, kinds) for prediction, texts in zip(predictions, references)]
    return tuple(_mean([score[kind][2] for score in scores]) for kind in kinds)


def _codebleu(predictions, references, given):
    return tuple(codebleu(predictions, references).values())


def _ruby_mean_and_levels(predictions, references, given):
    scores = [ruby(*pair) for pair in zip(predictions, references)]
    levels = Counter(level for _, level in scores)
    return _mean([score for score, _ in scores]), *(levels[level] / len(scores) for level in LEVELS)


def _quality_means(predictions, references, given):
    parts = [ruby_quality(*pair) for pair in zip(predictions, given.executes or [None] * len(predictions))]
    return tuple(_mean([part[name] for part in parts]) for name in ("ruby_quality", "syntax", "complexity", "style"))


def _execution_mean(predictions, references, given):
    """The mean over the predictions that ran; what ruby_quality weighs instead is part of the reason."""
    ran = [float(verdict) for verdict in given.executes or () if verdict is not None]
    if not ran:
        weights = ", ".join(f"{name} {weight:.0%}" for name, weight in quality_weights().items())
        raise NotComputed(f"no prediction was run (pass executes); ruby_quality weighs {weights}")
    return _mean(ran)


def _bertscore_means(predictions, references, given):
    if given.encoder is None or given.tokenizer is None:
        raise NotComputed("no encoder was given: pass encoder and tokenizer")
    scores = bert_score(predictions, references, given.encoder, given.tokenizer, given.layer, given.idf, given.baseline)
    return tuple(float(score.mean()) for score in scores)


def _encoder_note(given, name):
    config = given.encoder.config
    layer = default_layer(given.encoder) if given.layer is None else given.layer
    return (f"{name or 'unnamed encoder'}: {config.model_type}, {config.num_hidden_layers} layers of "
            f"{config.hidden_size}; layer {layer}, {'idf' if given.idf else 'no idf'}, baseline {given.baseline}")


def _share_parsed(predictions, references, given):
    return _mean([float(parses(prediction)) for prediction in predictions])


_BERTSCORE = ("bertscore_precision", "bertscore_recall", "bertscore")
# names -> function of (predictions, lists of references, Given): one float, or a tuple of one per name, or NotComputed
# raised. To add a metric, add a line; what else it needs becomes an argument of `evaluate` and a field of `Given`.
_METRICS = {
    ("exact_match",): _mean_of(exact_match),
    ("conala_bleu",): _corpus(conala_bleu),
    ("bleu",): _bleu,
    ("sacrebleu",): _corpus(sacrebleu),
    ("chrf",): _corpus(chrf),
    ("rouge1", "rouge2", "rougeL"): _rouge_means,
    ("codebleu", "ngram_match", "weighted_ngram_match", "syntax_match", "dataflow_match"): _codebleu,
    ("token_f1",): _mean_of(token_f1),
    ("ruby", "ruby_graph", "ruby_tree", "ruby_string"): _ruby_mean_and_levels,
    ("ruby_quality", "quality_syntax", "quality_complexity", "quality_style"): _quality_means,
    ("quality_execution",): _execution_mean,
    _BERTSCORE: _bertscore_means,
    ("parses",): _share_parsed,
}
METRIC_NAMES = tuple(name for names in _METRICS for name in names)
