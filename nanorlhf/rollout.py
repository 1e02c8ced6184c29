"""Sampling: queries in, responses out, with everything PPO needs to know of them later.

Queries are padded on the left, so that every response starts in the same column Q and the tensors of a batch line up:

    column            0 ........ Q-1 | Q .......... Q+R-1
    query_response    pad pad q q q  | r r r EOS pad pad
    attention_mask     0   0  1 1 1  | 1 1 1  1   0   0
    response_mask                    | 1 1 1  1   0   0

The logits that predict response token t stand in column Q - 1 + t. Masks come from lengths, never from token values, so
that pad == EOS is harmless.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nanorlhf.errors import InputError
from nanorlhf.logprobs import log_softmax
from nanorlhf.ops import TORCH
from nanorlhf.tokenizer import pad


@torch.no_grad()
def generate(model, queries, query_mask, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, eos_id=None, generator=None,
             batch_size=None):
    """Sample a response to each query, with a KV cache; a row stops at its EOS, the batch when every row has stopped.

    Args:
        model: a GPT2; dropout is off while it samples.
        queries: (B, Q) int64, left-padded.
        query_mask: (B, Q), 1 on query tokens.
        max_new_tokens: the longest response R, EOS included.
        temperature: softmax(logits / temperature) is sampled; 0 means greedy.
        top_k, top_p: keep the k likeliest tokens, then the smallest set of probability >= p; 0 and 1.0 keep all. With
            either, what is sampled is no longer the policy that the log-probs describe: PPO leaves them off.
        eos_id: the token that ends a response; None never ends one.
        generator: torch.Generator on the model's device; the same one gives the same text.
        batch_size: rows sampled at once, one such part after the other: the cache is of that many rows. None: all.
    Returns: responses (B, R') int64 with R' <= R the longest response, EOS (or 0) after the end; response_mask (B, R')
        bool, True on sampled tokens, EOS included; logprobs (B, R') float32 of the sampled tokens under the whole
        distribution at the temperature (1 if greedy), 0 where the mask is False.
    """
    if not queries.shape[1] or not bool((query_mask[:, -1] != 0).all()):
        raise InputError("queries must be padded on the left and not empty: the last column of query_mask has zeros")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    if top_k < 0 or not 0 < top_p <= 1:
        raise InputError(f"top_k must be at least 0 and top_p above 0 and at most 1, not {top_k} and {top_p}")
    query_length = queries.shape[1]
    if query_length + max_new_tokens > model.config.n_positions:
        raise InputError(f"{query_length} query tokens + {max_new_tokens} new ones exceed the model's {model.config.n_positions} positions")
    was_training = model.training
    model.eval()
    try:
        parts = [_sample(model, ids, mask, max_new_tokens, temperature, top_k, top_p, eos_id, generator)
                 for ids, mask in zip(queries.split(batch_size or len(queries)), query_mask.split(batch_size or len(queries)))]
    finally:
        model.train(was_training)
    longest = max(responses.shape[1] for responses, _, _ in parts)
    return tuple(torch.cat([F.pad(part, (0, longest - part.shape[1]), value=after) for part in column])
                 for column, after in zip(zip(*parts), (eos_id or 0, False, 0.0)))


def _sample(model, queries, query_mask, max_new_tokens, temperature, top_k, top_p, eos_id, generator):
    """The loop of `generate`: one column of tokens a turn. Once half of the rows have ended, they are left out of the rest."""
    batch, query_length = queries.shape
    cache = model.new_cache(batch, query_length + max_new_tokens)
    mask = torch.cat([query_mask != 0, query_mask.new_ones(batch, max_new_tokens, dtype=torch.bool)], 1)  # (B, Q + R)
    responses = queries.new_full((batch, max_new_tokens), eos_id or 0)  # (B, R)
    response_mask = torch.zeros_like(responses, dtype=torch.bool)  # (B, R)
    logprobs = torch.zeros_like(responses, dtype=torch.float32)  # (B, R)
    rows = torch.arange(batch, device=queries.device)  # (b,) the rows still computed
    going = torch.ones_like(rows, dtype=torch.bool)  # (b,) those that have not met EOS
    inputs = queries
    for t in range(max_new_tokens):
        hidden = model.hidden(inputs, attention_mask=mask[rows, :query_length + t], cache=cache)[:, -1]  # (b, C)
        logp = log_softmax(model.logits(hidden), temperature or 1.0)  # (b, V)
        tokens = logp.argmax(-1) if temperature == 0 else draw(logp, top_k, top_p, generator)  # (b,)
        tokens = torch.where(going, tokens, eos_id or 0)
        responses[rows, t], response_mask[rows, t] = tokens, going
        logprobs[rows, t] = torch.where(going, logp.gather(1, tokens[:, None]).squeeze(1), 0)
        if eos_id is not None:
            going = going & (tokens != eos_id)
        left = int(going.sum())
        if not left:
            break
        if left <= len(rows) // 2:
            cache.keep(going)
            rows, tokens, going = rows[going], tokens[going], going[going]
        inputs = tokens[:, None]
    return responses[:, :t + 1], response_mask[:, :t + 1], logprobs[:, :t + 1]


def draw(logp, top_k, top_p, generator):
    """Draw one token a row from log-probabilities (B, V), after keeping the top k and then the top p of them -> (B,)."""
    if top_k:
        kth = logp.topk(min(top_k, logp.shape[-1])).values[:, -1:]  # (B, 1)
        logp = logp.masked_fill(logp < kth, -float("inf"))
    if top_p < 1:
        ordered, order = logp.sort(-1, descending=True)
        p = ordered.softmax(-1)
        outside = p.cumsum(-1) - p >= top_p  # the tokens before this one have the mass already
        logp = logp.masked_fill(outside.gather(-1, order.argsort(-1)), -float("inf"))
    return torch.multinomial(logp.exp(), 1, generator=generator).squeeze(1)


@dataclass
class Rollout:
    """Queries, responses and what the policy and the reference thought of them. B rows, Q + R = T columns."""
    query_response: torch.Tensor  # (B, T) int64
    attention_mask: torch.Tensor  # (B, T) bool
    response_mask: torch.Tensor  # (B, R) bool
    logprobs: torch.Tensor  # (B, R) of the policy that sampled
    entropy: torch.Tensor  # (B, R)
    ref_logprobs: torch.Tensor  # (B, R)
    values: torch.Tensor  # (B, R) value before each response token
    last_values: torch.Tensor  # (B,) value after the last response token
    ended: torch.Tensor  # (B,) bool, the response ended with EOS
    responses: list  # B decoded responses

    @property
    def lengths(self):
        return self.response_mask.sum(1)  # (B,)

    def select(self, rows):
        """The tensors of some rows, responses left out: what an update needs."""
        return Rollout(**{name: value[rows] if torch.is_tensor(value) else [] for name, value in vars(self).items()})


def hidden_states(model, query_response, attention_mask, response_length):
    """The hidden states (B, R, C) that predict the response tokens, and the values (B, R + 1) before each of them and after the
    last column; None for a model without a value head. `model`: a GPT2, or a PolicyWithValue.

    The padding in front of a row is taken out, so that the transformer sees as many columns as the longest row has tokens; a
    row's tokens must have no gap. After its last token the states are whatever: they are masked.
    """
    policy, width = getattr(model, "policy", model), query_response.shape[1]
    pads, lengths = attention_mask.int().argmax(1, keepdim=True), attention_mask.sum(1, keepdim=True)  # (B, 1) each
    columns = torch.arange(int(lengths.max()), device=lengths.device)  # (T',)
    tokens = query_response.gather(1, (columns + pads).clamp(max=width - 1))  # (B, T') each row moved left by its pads
    # Causal attention never looks at the padding, now on the right: the mask changes no state that counts. It stays because it gives
    # padding its positions, and with others the position embedding's gradient would be summed in another order.
    hidden = policy.hidden(tokens, columns < lengths)  # (B, T', C)
    before = torch.arange(width - response_length - 1, width, device=lengths.device) - pads  # (B, R + 1) where Q - 1 ... T - 1 are now
    hidden = hidden.gather(1, before.clamp(max=len(columns) - 1)[..., None].expand(-1, -1, hidden.shape[2]))  # (B, R + 1, C)
    return hidden[:, :-1], model.value_head(hidden) if hasattr(model, "value_head") else None


def score_tokens(model, query_response, attention_mask, response_length, temperature, ops=TORCH):
    """Log-probs and entropy of the response tokens, in one forward over query and response.

    Args:
        model: a GPT2, or a PolicyWithValue.
        query_response, attention_mask: (B, T); the last `response_length` = R columns are the response.
        ops: who computes them, and whether the logits are ever whole (nanorlhf.ops).
    Returns: logprobs (B, R), entropy (B, R), values (B, R + 1): the values before each response token and after the last
        column; None for a model without a value head. Gradient flows.
    """
    hidden, values = hidden_states(model, query_response, attention_mask, response_length)
    targets = query_response[:, -response_length:]  # (B, R)
    logprobs, entropy = ops.score(getattr(model, "policy", model), hidden, targets, temperature)
    return logprobs, entropy, values


@torch.no_grad()
def score_in_parts(model, query_response, attention_mask, response_length, temperature, part=128, ops=TORCH):
    """`score_tokens` without gradient, `part` rows of like length at a time: never more than (part, R, V) logits in memory."""
    order = attention_mask.sum(1).argsort()
    columns = zip(*(score_tokens(model, query_response[rows], attention_mask[rows], response_length, temperature, ops)
                    for rows in order.split(part)))
    return tuple(None if column[0] is None else torch.cat(column)[order.argsort()] for column in columns)


@torch.no_grad()
def roll_out(actor, reference, tokenizer, queries, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, generator=None,
             micro_batch_size=128, ops=TORCH, generation_batch_size=None):
    """Sample responses and score them with policy, value head and reference under the same padding.

    The policy's log-probs come from a scoring forward, not from the sampling loop: it is the computation that the update
    repeats, so that the first ratio is 1.

    Args:
        actor: a PolicyWithValue.
        reference: a GPT2 that does not change.
        queries: list of B lists of token ids.
        micro_batch_size: rows of a scoring forward. ops: as for `score_tokens`.
        generation_batch_size: `batch_size` of `generate`.
    Returns: a Rollout on the actor's device.
    """
    device = next(actor.parameters()).device
    query_ids, query_mask = (x.to(device) for x in pad(queries, tokenizer.pad_id, "left"))  # (B, Q) each
    response_ids, response_mask, _ = generate(actor.policy, query_ids, query_mask, max_new_tokens, temperature, top_k, top_p,
                                              tokenizer.eos_id, generator, generation_batch_size)
    query_response = torch.cat([query_ids, response_ids], 1)  # (B, T)
    attention_mask = torch.cat([query_mask.bool(), response_mask], 1)
    scored = (query_response, attention_mask, response_ids.shape[1], temperature or 1.0, micro_batch_size, ops)
    logprobs, entropy, values = score_in_parts(actor, *scored)
    ref_logprobs, _, _ = score_in_parts(reference, *scored)
    last = response_mask.sum(1)  # (B,) column of `values` after the last token
    return Rollout(
        query_response, attention_mask, response_mask, logprobs, entropy, ref_logprobs, values[:, :-1],
        last_values=values.gather(1, last[:, None]).squeeze(1),
        ended=has_ended(response_ids, response_mask, tokenizer.eos_id),
        responses=decode(tokenizer, response_ids, response_mask))


def has_ended(response_ids, response_mask, eos_id):
    """Whether the last sampled token of each response is EOS, also where that is the last column: (B, R) -> (B,) bool."""
    last = response_mask.sum(1, keepdim=True) - 1  # (B, 1)
    return response_ids.gather(1, last).squeeze(1) == eos_id


def decode(tokenizer, response_ids, response_mask):
    """The responses as text, the EOS at the end left out. Special tokens sampled before the end stay in the text: a reward or a
    metric must see them."""
    texts = []
    for ids, length in zip(response_ids.cpu(), response_mask.sum(1).tolist()):
        ids = ids[:length].tolist()
        texts.append(tokenizer.decode(ids[:-1] if ids[-1] == tokenizer.eos_id else ids, skip_special=False))
    return texts
