"""From text to padded batches: queries, responses, and the two joined.

Query and response are tokenised apart and joined as ids, so no token spans the boundary and a rollout's tokens are those
that SFT and DPO train on.
"""
import torch

from nanorlhf.checkpoint import stream
from nanorlhf.data import format_query
from nanorlhf.errors import InputError
from nanorlhf.tokenizer import pad


def encode_queries(tokenizer, prompts, template, max_query):
    """Token ids of each query; one longer than max_query loses its beginning, the far end from the response.

    Returns: list of id lists, and how many were cut.
    Errors: InputError for a query without any token: there is nothing to continue.
    """
    rows = [tokenizer.encode(format_query(prompt, template)) for prompt in prompts]
    if bare := [prompt for prompt, row in zip(prompts, rows) if not row]:
        raise InputError(f"the tokenizer knows no part of {len(bare)} of {len(rows)} queries, such as that of the prompt {bare[0][:40]!r}: train a "
                         "byte-level one with all 256 bytes, or remove these rows")
    return [row[-max_query:] for row in rows], sum(len(row) > max_query for row in rows)


def encode_responses(tokenizer, responses, max_response):
    """Token ids of each response with EOS; one longer than max_response loses its end, EOS included.

    Returns: list of id lists, and how many were cut.
    """
    rows = [tokenizer.encode(response) + [tokenizer.eos_id] for response in responses]
    return [row[:max_response] for row in rows], sum(len(row) > max_response for row in rows)


def join(queries, responses, pad_id):
    """Right-padded query + response: ids (B, T) int64, attention_mask (B, T), response_mask (B, T) bool, 1 on the response."""
    ids, attention_mask = pad([query + response for query, response in zip(queries, responses)], pad_id, "right")
    columns = torch.arange(ids.shape[1])  # (T,)
    starts = torch.tensor([len(query) for query in queries])[:, None]  # (B, 1)
    return ids, attention_mask, (columns >= starts) & attention_mask.bool()


def response_states(model, ids, attention_mask, response_mask):
    """Hidden states (N, C) that predict the N response tokens of a batch, and these tokens (N,), row by row: nothing is computed
    further for queries and padding."""
    predicted = response_mask[:, 1:]  # (B, T - 1) token t is predicted at column t - 1
    # The mask changes no state, but the order in which gradients are summed: see rollout.hidden_states.
    return model.hidden(ids, attention_mask)[:, :-1][predicted], ids[:, 1:][predicted]


def predict(model, ids, attention_mask, response_mask):
    """Logits (N, V) that predict the N response tokens of a batch, and these tokens (N,), row by row."""
    hidden, targets = response_states(model, ids, attention_mask, response_mask)
    return model.logits(hidden), targets


def shuffled_batches(lengths, batch_size, generator, window=16):
    """Row indices in batches of similar length, in random order: each row once, the last batches smaller.

    Rows are shuffled, sorted by length within windows of `window` batches, and the batches shuffled again: little padding,
    and no order of lengths over the epoch.
    """
    order = torch.randperm(len(lengths), generator=generator).tolist()
    span, batches = window * batch_size, []
    for start in range(0, len(order), span):
        rows = sorted(order[start:start + span], key=lambda row: lengths[row])
        batches += [rows[i:i + batch_size] for i in range(0, len(rows), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def epoch_batches(lengths, batch_size, epochs, seed, done=0):
    """`shuffled_batches` of every epoch: (step, epoch, row indices, whether the epoch ends here), from step done + 1 on.

    The order of an epoch depends on the seed and its number alone, so that an interrupted run goes on with the batch that was next.
    """
    per_epoch = -(-len(lengths) // batch_size)
    for step in range(done + 1, epochs * per_epoch + 1):
        epoch, position = divmod(step - 1, per_epoch)
        if position == 0 or step == done + 1:
            batches = shuffled_batches(lengths, batch_size, stream(seed, "order", epoch))
        yield step, epoch + 1, batches[position], position == per_epoch - 1
