"""What a reader of an evaluation should know before believing it: findings about the predictions, each with its numbers.

A finding is {"name", "flag", "says", ...numbers}: `flag` is True where the number is one to distrust the evaluation for. Nothing
is left out because it is good: the shares are there either way.
"""
from collections import Counter

from nanorlhf.metrics.bleu import conala_tokens
from nanorlhf.metrics.match import canonical, parses

# Of the systems published for CoNaLa none comes near these: what does has seen the test rows, or is not measured on CoNaLa.
IMPLAUSIBLE = {"codebleu": 0.6, "bertscore": 0.9, "bleu": 0.6, "rougeL": 0.7, "rouge1": 0.7}
REPEATED, UNPARSABLE, COPIED, EMPTY = 0.1, 0.2, 0.05, 0.01  # shares of the predictions from which a finding is flagged


def finding(name, flag, says, **numbers):
    return {"name": name, "flag": bool(flag), "says": says, **numbers}


def assess(predictions, references, prompts, train_snippets=(), values=None, reasons=None, real_conala=False, overlap=()):
    """Findings about one policy's answers.

    Args:
        predictions, references, prompts: lists of str, a row each (a reference may be a list of several).
        train_snippets: the answers of the training rows.
        values: {metric: value}; reasons: {metric: why it could not be computed}, both as `evaluate` gives them.
        real_conala: the rows are CoNaLa's, for which IMPLAUSIBLE holds.
        overlap: sentences about rows that are in train and test.
    """
    found = _implausible(values or {}) if real_conala else []
    found += [finding("overlap", bool(overlap), "; ".join(overlap) or "no intent or pair of the test is in train", pairs=len(overlap))]
    if predictions:
        found += _repeated(predictions) + _broken(predictions) + _copied(predictions, references, prompts, train_snippets)
    if reasons:
        by_reason = {why: [name for name in reasons if reasons[name] == why] for why in dict.fromkeys(reasons.values())}
        says = "; ".join(f"{', '.join(names)}: {why}" for why, names in by_reason.items())
        found.append(finding("not computed", False, f"not computed: {says}", metrics=list(reasons)))
    return found


def _implausible(values):
    """A finding for each metric that is too good to be true on CoNaLa."""
    return [finding("implausible", True, f"{name} {values[name]:.3f} is at least {limit}, which no published system reaches on CoNaLa: "
                    "look for test rows in the training data", metric=name, value=values[name], limit=limit)
            for name, limit in IMPLAUSIBLE.items() if (values.get(name) or 0) >= limit]


def _repeated(predictions):
    """How many different answers there are, and how often the commonest is given."""
    counts = Counter(prediction.strip() for prediction in predictions)
    text, times = counts.most_common(1)[0]
    share = times / len(predictions)
    return [finding("repeated", times > 1 and share >= REPEATED,
                    f"{len(counts)} different answers to {len(predictions)} prompts; the commonest, {text[:40]!r}, is given {times} times",
                    distinct=len(counts), commonest=times, share=share)]


def _broken(predictions):
    """Shares of empty answers and of answers that are not Python."""
    empty = sum(not prediction.strip() for prediction in predictions) / len(predictions)
    unparsable = sum(not parses(prediction) for prediction in predictions) / len(predictions)
    return [finding("empty", empty >= EMPTY, f"{empty:.1%} of the answers are empty", share=empty),
            finding("unparsable", unparsable >= UNPARSABLE, f"{unparsable:.1%} of the answers do not parse as Python", share=unparsable)]


def _copied(predictions, references, prompts, train_snippets):
    """Shares of wrong answers that are part of their prompt, and that are a training answer as it stands."""
    train = set(map(_key, train_snippets))
    from_prompt = from_train = 0
    for prediction, reference, prompt in zip(predictions, references, prompts):
        right = {_key(text) for text in ([reference] if isinstance(reference, str) else reference)}
        wrong = _key(prediction) and _key(prediction) not in right
        from_prompt += bool(wrong and len(conala_tokens(prediction)) > 2 and prediction.strip() in prompt)
        from_train += bool(wrong and _key(prediction) in train)
    prompt_share, train_share = from_prompt / len(predictions), from_train / len(predictions)
    return [finding("copied from the prompt", prompt_share >= COPIED,
                    f"{prompt_share:.1%} of the answers are wrong and stand in their prompt word for word", share=prompt_share),
            finding("copied from train", train_share >= COPIED,
                    f"{train_share:.1%} of the answers are wrong and are the answer of a training row", share=train_share)]


def _key(code):
    """What makes two snippets the same: their syntax tree, or their text without surrounding space."""
    return canonical(code) or code.strip()
