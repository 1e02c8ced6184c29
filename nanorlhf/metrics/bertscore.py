"""BERTScore: how well each token of a text is matched by its nearest token in the other, in an encoder's states.

    P = sum over tokens x of the prediction of w(x) max over y of cos(x, y), the weights w summing to 1
    R = the same from the reference's side, F = 2 P R / (P + R)

[CLS] and [SEP] weigh nothing but may be the nearest. A score means nothing without its encoder and layer: unrelated
texts reach 0.8 in some, so scores of two encoders do not compare, and a baseline (the score of unrelated texts) is
subtracted to make the numbers readable, not to change their order. For code there is more to distrust: see
docs/METRICS.md.

Kept from the package, so that numbers agree: pairs are matched in padded batches of `batch_size`, and padding counts as
a token of similarity 0. A token that resembles nothing (all its cosines are negative) thus gets 0 where the other text
is shorter than the longest of its batch, and its negative cosine where it is the longest. Under MiniLM 2 to 7 % of
CoNaLa pairs have such tokens and move by up to 0.012, a mean by 0.0001; batch_size=1 makes a score independent of its
neighbours.

The encoder and the tokenizer come from the caller (`nanorlhf.encoder.Encoder`, `nanorlhf.tokenizer.Tokenizer`).

Sources: Zhang et al. 2020, https://arxiv.org/abs/1904.09675; the arithmetic of the bert-score package, 0.3.13.
Deviations:
- Where all weights are 0 (with idf, a corpus of one reference) the score is 0, not NaN.
- The text is framed as the tokenizer frames it. The package asks RoBERTa's for a space in front, which transformers 5
  no longer heeds; a tokenizer folder with add_prefix_space = true has it here.
- Halves of surrogate pairs are read as "?".
"""

import math
from collections import Counter
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from nanorlhf.errors import InputError
from nanorlhf.metrics import inputs

# The layers that the package's authors found best on WMT16, by shape; other encoders: the last.
BEST_LAYERS = {("roberta", 12, 768): 10, ("roberta", 24, 1024): 17, ("bert", 12, 768): 9, ("bert", 24, 1024): 18}


def bert_score(predictions, references, encoder, tokenizer, layer=None, idf=False, baseline=None, batch_size=64):
    """(P, R, F), each a float32 tensor (B,) on the CPU: about 0 to 1, without a baseline.

    Args: predictions: list of str. references: list of str, or of lists of str: then P, R and F are each the best over
        the references. encoder, tokenizer: an `Encoder` and the `Tokenizer` that belongs to it. layer: whose output is
        compared, 0 (the embeddings) to the last; None: `default_layer`. idf: weigh a token by log((N + 1) / (df + 1)),
        df the number of the N references that hold it. baseline: a number b, or three for P, R, F: scores become (score
        - b) / (1 - b).
        batch_size: pairs matched at once (see the module's docstring), and texts encoded at once.
    Texts longer than the encoder are cut at the end. A pair with an empty text scores 0. No gradient.
    Raises: InputError for lists of different lengths, non-strings, a layer there is not, a baseline of 1 or more.
    """
    predictions, references = inputs.corpus(predictions, references)
    layer, baseline = _checked_layer(encoder, layer), _checked_baseline(baseline)
    if not predictions:
        return torch.zeros(0), torch.zeros(0), torch.zeros(0)
    flat = [text for texts in references for text in texts]
    states = _states(dict.fromkeys([*predictions, *flat]), encoder, tokenizer, layer, batch_size)
    weights = _weights(states, flat if idf else None, tokenizer)
    pairs = [(prediction, text) for prediction, texts in zip(predictions, references) for text in texts]
    scores = []
    for start in range(0, len(pairs), batch_size):
        scores += _match_batch(pairs[start:start + batch_size], states, weights)
    groups = torch.stack(scores).split([len(texts) for texts in references])
    best = torch.stack([group.amax(0) for group in groups])  # (B, 3)
    return tuple(((best - baseline) / (1 - baseline)).unbind(1))


def default_layer(encoder):
    """The layer that `bert_score` compares where none is given: `BEST_LAYERS`, else the last."""
    config = encoder.config
    shape = (config.model_type, config.num_hidden_layers, config.hidden_size)
    return BEST_LAYERS.get(shape, config.num_hidden_layers)


def _checked_layer(encoder, layer):
    layer, last = default_layer(encoder) if layer is None else layer, encoder.config.num_hidden_layers
    if not isinstance(layer, int) or isinstance(layer, bool) or not 0 <= layer <= last:
        raise InputError(f"layer={layer!r}: this encoder has layers 0 (its embeddings) to {last}")
    return layer


def _checked_baseline(baseline):
    values = torch.as_tensor(0.0 if baseline is None else baseline, dtype=torch.float32)
    if values.shape not in ((), (3,)) or not bool((values < 1).all()):
        raise InputError(f"baseline={baseline!r}: pass a number below 1, or three, for P, R and F")
    return values


@contextmanager
def _evaluating(encoder):
    """No dropout and no gradient; the mode is restored."""
    training = encoder.training
    encoder.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        encoder.train(training)


def _states(texts, encoder, tokenizer, layer, batch_size):
    """{text: (ids (T,), unit vectors (T, C))} of the texts, special tokens included, without padding."""
    readable = {text: text.strip().encode("utf-8", "replace").decode() for text in texts}
    texts = sorted(texts, key=lambda text: len(readable[text]))  # little padding
    device, found = next(encoder.parameters()).device, {}
    with _evaluating(encoder):
        for start in range(0, len(texts), batch_size):
            batch = texts[start:start + batch_size]
            ids, mask = tokenizer.batch([readable[text] for text in batch], side="right",
                                        max_length=encoder.config.max_tokens)  # (b, T), (b, T)
            hidden = encoder.all_layers(ids.to(device), mask.to(device))[layer].float().cpu()  # (b, T, C)
            unit, lengths = F.normalize(hidden, dim=-1), mask.sum(1).tolist()
            found |= {text: (ids[row, :n].tolist(), unit[row, :n]) for row, (text, n) in enumerate(zip(batch, lengths))}
    return found


def _weights(states, references, tokenizer):
    """{text: weights (T,)} that sum to 1, or are all 0; special tokens have 0. `references` not None: idf over them."""
    special = {tokenizer.cls_id, tokenizer.sep_id}
    frequency = Counter(token for text in references or () for token in set(states[text][0]))
    documents = 0 if references is None else len(references)
    weights = {}
    for text, (ids, _) in states.items():
        values = [0.0 if token in special else 1.0 if references is None
                  else math.log((documents + 1) / (frequency[token] + 1)) for token in ids]
        total = sum(values)
        weights[text] = torch.tensor(values) / (total or 1.0)
    return weights


def _match_batch(pairs, states, weights):
    """P, R and F of each pair of texts, a list of tensors (3,); a text shorter than its side's longest is padded."""
    lengths = [(len(states[prediction][0]), len(states[reference][0])) for prediction, reference in pairs]
    longest = [max(side) for side in zip(*lengths)]
    rows = []
    for (prediction, reference), (length, reference_length) in zip(pairs, lengths):
        similarity = states[prediction][1] @ states[reference][1].T  # (T, T')
        similarity = F.pad(similarity, (0, int(reference_length < longest[1]), 0, int(length < longest[0])))
        rows.append(_prf(similarity, weights[prediction], weights[reference]))
    return rows


def _prf(similarity, prediction_weights, reference_weights):
    """(P, R, F) as a tensor (3,); 0 for an empty text. A row or column beyond the weights is padding."""
    if not (prediction_weights.any() and reference_weights.any()):
        return torch.zeros(3)
    precision = similarity.amax(1)[:len(prediction_weights)] @ prediction_weights
    recall = similarity.amax(0)[:len(reference_weights)] @ reference_weights
    both = precision + recall
    return torch.stack([precision, recall, 2 * precision * recall / both if both else both])
