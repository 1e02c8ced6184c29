"""Sampling: against an uncached loop, transformers' greedy search and re-scoring; EOS, top-k and top-p by hand."""
import copy
import math
import os
from dataclasses import replace
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from torch import nn

from nanorlhf.gpt2 import GPT2, GPT2Config, PolicyWithValue
from nanorlhf.ops import TORCH
from nanorlhf.rollout import Rollout, decode, generate, hidden_states, roll_out, score_in_parts, score_tokens
from nanorlhf.tokenizer import Tokenizer, pad

BASE = dict(vocab_size=40, n_positions=32, n_embd=24, n_layer=2, n_head=3)
EOS = 9


def shaken(model, scale=0.3):
    """Random everywhere: fresh models have nearly flat distributions, and zero biases that hide faults."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return model


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    return shaken(GPT2.from_config(GPT2Config(**{**BASE, **changes})))


def ragged(lengths=(1, 4, 7, 3), vocab=40, seed=1, pad_id=0):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, vocab, (n,), generator=generator).tolist() for n in lengths]
    return pad(rows, pad_id, "left")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Scripted(nn.Module):
    """Stands in for a GPT2 whose logits at step t are table[t], (B, V): what `generate` does can be told by hand."""

    def __init__(self, table):
        super().__init__()
        self.table, self.calls = table, 0
        self.config = GPT2Config(vocab_size=table.shape[-1], n_positions=64, n_embd=2, n_layer=1, n_head=1)

    def new_cache(self, batch_size, max_length):
        self.rows = torch.arange(batch_size)

        def keep(rows):
            self.rows = self.rows[rows]

        return SimpleNamespace(length=0, keep=keep)

    def hidden(self, inputs, attention_mask, cache):
        self.calls += 1
        cache.length += inputs.shape[1]
        return torch.full((*inputs.shape, 1), float(self.calls - 1))

    def logits(self, hidden):
        return self.table[int(hidden[0, 0])][self.rows]


def script(rows, vocab=12):
    """Logits that make row b greedily write rows[b]."""
    return torch.nn.functional.one_hot(torch.tensor(rows).T, vocab).float() * 5


def one_token(probabilities, count, generator_seed=0, **options):
    """`count` draws of one token from a known distribution -> (frequencies (V,), the logprob of each draw)."""
    table = torch.tensor(probabilities).log().expand(1, count, -1)
    ones = torch.ones(count, 1, dtype=torch.int64)
    responses, _, logprobs = generate(Scripted(table), ones, ones, 1, generator=seeded(generator_seed), **options)
    return torch.bincount(responses[:, 0], minlength=len(probabilities)) / count, responses[:, 0], logprobs[:, 0]


def uncached(model, ids, mask, steps, temperature, eos_id, generator):
    """The definition of sampling: a whole forward for every token, unoptimised. Rows are cut at EOS afterwards."""
    start = ids.shape[1]
    for _ in range(steps):
        logits = model(ids, mask)[:, -1]
        tokens = logits.argmax(-1) if temperature == 0 else \
            torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
        ids, mask = torch.cat([ids, tokens[:, None]], 1), torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    rows = ids[:, start:].tolist()
    return [row[:row.index(eos_id) + 1] if eos_id in row else row for row in rows]


def cut(responses, mask):
    return [row[:length].tolist() for row, length in zip(responses, mask.sum(1).tolist())]


# ------------------------------------------------------------------------------------------------------------- parity

@pytest.mark.parametrize("temperature", [0, 0.7, 1.0, 1.5])
@pytest.mark.parametrize("eos_id", [None, EOS])
@torch.no_grad()
def test_cached_equals_uncached(temperature, eos_id):
    """The same tokens as a loop without a cache, drawn from an equal generator, on ragged left-padded queries."""
    model, (ids, mask) = tiny(), ragged()
    responses, response_mask, _ = generate(model, ids, mask, 12, temperature, eos_id=eos_id, generator=seeded(3))
    assert cut(responses, response_mask) == uncached(model, ids, mask, 12, temperature, eos_id, seeded(3))


@pytest.mark.parametrize("changes", [{}, dict(tie_word_embeddings=False), dict(n_head=1, n_layer=3, n_inner=50)],
                         ids=["base", "untied", "deep"])
def test_greedy_equals_transformers(tmp_path, changes):
    """Random checkpoints, ragged left-padded batches, an EOS that some rows meet and others do not."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(4)
    theirs = shaken(transformers.GPT2LMHeadModel(transformers.GPT2Config(
        **{**BASE, **changes}, bos_token_id=0, eos_token_id=0)))
    theirs.eval().save_pretrained(tmp_path)
    ours, (ids, mask) = GPT2.from_pretrained(tmp_path), ragged((5, 1, 8, 3, 2, 6))
    eos_id = generate(ours, ids, mask, 10, 0)[0][1, 3].item()  # row 1 will end after at most 4 tokens
    expected = theirs.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False, eos_token_id=eos_id,
                               pad_token_id=eos_id)[:, ids.shape[1]:]
    responses, response_mask, _ = generate(ours, ids, mask, 10, 0, eos_id=eos_id)
    assert torch.equal(responses, expected)
    assert response_mask[1].sum() <= 4 and response_mask.all(1).any(), "the batch should mix short and long responses"


@torch.no_grad()
def test_a_row_alone_is_the_row_in_a_batch():
    """Left padding changes nothing: each query by itself gives what it gives beside longer ones."""
    model, (ids, mask) = tiny(), ragged()
    together, together_mask, logprobs = generate(model, ids, mask, 8, 0, eos_id=EOS)
    for row in range(len(ids)):
        query = ids[row:row + 1, mask[row].bool()]
        alone, alone_mask, alone_logprobs = generate(model, query, torch.ones_like(query), 8, 0, eos_id=EOS)
        assert cut(alone, alone_mask) == cut(together, together_mask)[row:row + 1]
        length = alone.shape[1]
        assert torch.allclose(alone_logprobs[0], logprobs[row, :length], atol=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@torch.no_grad()
def test_logprobs_equal_a_scoring_forward(temperature):
    """What `generate` returns is what `score_tokens` finds in one forward, to 1e-5, and exactly 0 after the end."""
    model, (ids, mask) = tiny(), ragged((1, 4, 7, 3, 2, 9))
    responses, response_mask, logprobs = generate(model, ids, mask, 12, temperature, eos_id=EOS, generator=seeded())
    whole, whole_mask = torch.cat([ids, responses], 1), torch.cat([mask.bool(), response_mask], 1)
    scored, entropy, values = score_tokens(model, whole, whole_mask, responses.shape[1], temperature)
    assert not response_mask.all() and logprobs.dtype == torch.float32 and values is None
    assert (scored - logprobs)[response_mask].abs().max() < 1e-5
    assert (logprobs[~response_mask] == 0).all()
    logp = (model(whole, whole_mask)[:, ids.shape[1] - 1:-1] / temperature).log_softmax(-1)
    by_hand = -(logp.exp() * logp).sum(-1)
    assert (entropy - by_hand)[response_mask].abs().max() < 1e-5
    if temperature != 1:
        unscaled, _, _ = score_tokens(model, whole, whole_mask, responses.shape[1], 1.0)
        assert (unscaled - logprobs)[response_mask].abs().max() > 0.1, "the temperature should matter here"


def test_greedy_logprobs_are_at_temperature_1():
    """Greedy: the log-probs are those of the whole distribution at temperature 1."""
    model, (ids, mask) = tiny(), ragged()
    responses, response_mask, logprobs = generate(model, ids, mask, 6, 0)
    whole, whole_mask = torch.cat([ids, responses], 1), torch.cat([mask.bool(), response_mask], 1)
    with torch.no_grad():
        scored, _, _ = score_tokens(model, whole, whole_mask, 6, 1.0)
    assert torch.allclose(scored, logprobs, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ reproducibility

def test_same_generator_same_text():
    model, (ids, mask) = tiny(), ragged()
    first, again, other = (generate(model, ids, mask, 10, generator=seeded(seed)) for seed in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first[0], other[0])


def test_the_global_generator_is_left_alone():
    """With a generator of its own, sampling neither reads nor moves torch's global state."""
    model, (ids, mask) = tiny(), ragged()
    state = torch.get_rng_state()
    first = generate(model, ids, mask, 10, generator=seeded(5))[0]
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(77)
    assert torch.equal(first, generate(model, ids, mask, 10, generator=seeded(5))[0])


# ---------------------------------------------------------------------------------------------------------- EOS, masks

def test_each_row_stops_at_its_own_eos():
    """EOS = 9. Row 0 ends at once, row 1 in the last slot, row 2 never; after its end row 0 is filled with EOS.

        row 0   9 9 9   mask 1 0 0          row 1   4 5 9   mask 1 1 1          row 2   4 5 6   mask 1 1 1
    """
    model, ones = Scripted(script([[9, 7, 7], [4, 5, 9], [4, 5, 6]])), torch.ones(3, 2, dtype=torch.int64)
    responses, mask, logprobs = generate(model, ones, ones, 3, 0, eos_id=9)
    assert responses.tolist() == [[9, 9, 9], [4, 5, 9], [4, 5, 6]] and responses.dtype == torch.int64
    assert mask.tolist() == [[True, False, False], [True] * 3, [True] * 3] and mask.dtype == torch.bool
    expected = 5 - math.log(11 + math.exp(5))  # one logit of 5 among 12, the rest 0
    assert torch.allclose(logprobs, torch.tensor(expected) * mask) and logprobs[0, 1:].eq(0).all()


def test_the_batch_stops_when_every_row_has():
    """Two rows end after one and two tokens: R' = 2 of the 5 allowed, and the model is not asked for more."""
    model, ones = Scripted(script([[9, 4, 4, 4, 4], [4, 9, 4, 4, 4]])), torch.ones(2, 3, dtype=torch.int64)
    responses, mask, _ = generate(model, ones, ones, 5, 0, eos_id=9)
    assert responses.tolist() == [[9, 9], [4, 9]] and mask.tolist() == [[True, False], [True, True]]
    assert model.calls == 2


def test_without_eos_nothing_ends():
    """eos_id None: the same script runs to the last slot, token 9 and token 0 like any other."""
    model, ones = Scripted(script([[9, 0, 4], [0, 9, 9]])), torch.ones(2, 3, dtype=torch.int64)
    responses, mask, _ = generate(model, ones, ones, 3, 0)
    assert responses.tolist() == [[9, 0, 4], [0, 9, 9]] and mask.all()


def test_eos_may_be_token_0():
    """0 is an id, not "no EOS"."""
    model, ones = Scripted(script([[4, 0, 4], [0, 4, 4]])), torch.ones(2, 1, dtype=torch.int64)
    responses, mask, _ = generate(model, ones, ones, 3, 0, eos_id=0)
    assert responses.tolist() == [[4, 0], [0, 0]] and mask.tolist() == [[True, True], [True, False]]


def test_pad_equal_to_eos_is_harmless():
    """Queries padded with the EOS id, one with a real EOS in it: as if padded with any other id."""
    model = tiny()
    rows = [[3], [EOS, 4, EOS, 5], [7] * 6]
    results = []
    for pad_id in (EOS, 0, 17):
        ids, mask = pad(rows, pad_id, "left")
        results.append(generate(model, ids, mask, 10, eos_id=EOS, generator=seeded(2)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_generation_in_parts():
    """Four rows, one at a time: one generator draws for the first, then for the second ...; a shorter response is filled up with EOS,
    no mask and log-prob 0. The cache is never of more rows than a part, nor of more columns than 6 + 12. Greedy, it is what one batch
    gives."""
    model, sizes, draws = tiny(), [], seeded(5)
    ids, mask = pad([[3], [4, 5], [7] * 6, [8, 2]], EOS, "left")
    alone = [generate(model, ids[i:i + 1], mask[i:i + 1], 12, eos_id=EOS, generator=draws) for i in range(4)]
    assert len({responses.shape[1] for responses, _, _ in alone}) > 1, "one should be shorter"
    new_cache = model.new_cache
    model.new_cache = lambda *size: sizes.append(size) or new_cache(*size)
    together = generate(model, ids, mask, 12, eos_id=EOS, generator=seeded(5), batch_size=1)
    assert sizes == [(1, 18)] * 4
    for found, parts, after in zip(together, zip(*alone), (EOS, False, 0.0)):
        for row, (part,) in zip(found, parts):
            assert torch.equal(row[:len(part)], part) and (row[len(part):] == after).all()
    for size in (1, 3, 4, 9):
        for found, whole in zip(generate(model, ids, mask, 12, 0, eos_id=EOS, batch_size=size), generate(model, ids, mask, 12, 0, eos_id=EOS)):
            torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mask", [[[1, 1, 0], [1, 1, 1]], [[0, 0, 0], [0, 1, 1]]], ids=["right padding", "empty query"])
def test_right_padding_and_empty_queries_are_refused(mask):
    ids = torch.ones(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="left"):
        generate(tiny(), ids, torch.tensor(mask), 3)


def test_queries_without_columns_are_refused():
    """A batch of empty queries only, as `pad` makes it: (B, 0)."""
    ids, mask = pad([[], []], 0, "left")
    with pytest.raises(ValueError, match="empty"):
        generate(tiny(), ids, mask, 3)


def test_more_tokens_than_positions_are_refused_at_once():
    """5 + 4 > 8, and nothing is sampled first; 5 + 3 = 8 just fit."""
    model, (ids, mask) = tiny(n_positions=8), ragged((5, 3))
    with pytest.raises(ValueError, match="8 positions"):
        generate(model, ids, mask, 4, 0)
    assert generate(model, ids, mask, 3, 0)[0].shape == (2, 3)


def test_no_new_token_is_refused():
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, not 0"):
        generate(tiny(), *ragged(), 0)


@pytest.mark.parametrize("options", [{"top_k": -1}, {"top_p": 0.0}, {"top_p": -0.5}, {"top_p": 2.0}])
def test_what_no_token_can_be_drawn_from_is_refused(options):
    """These used to fail within torch, or to mean nothing."""
    with pytest.raises(ValueError, match="top_k must be at least 0 and top_p above 0 and at most 1, not"):
        generate(tiny(), *ragged(), 3, **options)


# ---------------------------------------------------------------------------------------- dropout, gradient, train flag

@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_and_the_mode_restored(training):
    model, (ids, mask) = tiny(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5), ragged()
    expected = generate(model, ids, mask, 8, 0)
    model.train(training)
    found = generate(model, ids, mask, 8, 0)
    assert all(torch.equal(a, b) for a, b in zip(expected, found))
    assert model.training is training and model.h[0].training is training
    assert not found[2].requires_grad


def test_the_mode_stays_when_the_request_is_refused():
    model, (ids, mask) = tiny(n_positions=8).train(), ragged((5, 3))
    with pytest.raises(ValueError):
        generate(model, ids, mask, 10, 0)
    assert model.training


def test_the_arguments_are_not_written_to():
    model, (ids, mask) = tiny(), ragged()
    ids_before, mask_before = ids.clone(), mask.clone()
    generate(model, ids, mask, 5, generator=seeded())
    assert torch.equal(ids, ids_before) and torch.equal(mask, mask_before)


# ------------------------------------------------------------------------------------------------- the distribution

def chi_square(counts, p):
    return (((counts - counts.sum() * p) ** 2) / (counts.sum() * p)).sum().item()


def test_frequencies_are_the_softmax_at_the_temperature():
    """20,000 draws of one token of 8 at T = 0.6: chi-square with 7 degrees of freedom is below 24.3 but once in 1,000;
    against the distribution at T = 1 it is far above."""
    model = tiny(vocab_size=8)
    query = torch.tensor([[3, 1, 4]]).expand(20000, 3)
    responses, _, _ = generate(model, query, torch.ones_like(query), 1, 0.6, generator=seeded(1))
    counts = torch.bincount(responses[:, 0], minlength=8).float()
    logits = model(query[:1])[0, -1].detach()
    assert chi_square(counts, (logits / 0.6).softmax(-1)) < 24.3
    assert chi_square(counts, logits.softmax(-1)) > 240


P = [0.05, 0.5, 0.15, 0.3]  # shuffled, so that ranks are not ids


@pytest.mark.parametrize("options, kept", [
    (dict(), [0.05, 0.5, 0.15, 0.3]),
    (dict(top_k=3), [0, 0.5 / 0.95, 0.15 / 0.95, 0.3 / 0.95]),
    (dict(top_k=2), [0, 0.625, 0, 0.375]),
    (dict(top_k=1), [0, 1, 0, 0]),
    (dict(top_k=9), [0.05, 0.5, 0.15, 0.3]),
    (dict(top_p=0.9), [0, 0.5 / 0.95, 0.15 / 0.95, 0.3 / 0.95]),   # 0.5 + 0.3 < 0.9, so 0.15 is needed
    (dict(top_p=0.7), [0, 0.625, 0, 0.375]),                       # 0.5 < 0.7 <= 0.8
    (dict(top_p=0.4), [0, 1, 0, 0]),
    (dict(top_p=1e-6), [0, 1, 0, 0]),                              # never nothing
    (dict(top_k=2, top_p=0.6), [0, 1, 0, 0]),                      # of the two 0.625 is enough; of all 0.5 is not
    (dict(temperature=0.5, top_p=0.6), [0, 1, 0, 0]),              # squared: 0.25 / 0.365 = 0.68
    (dict(temperature=2.0, top_k=2), [0, 0.5635, 0, 0.4365]),      # sqrt 0.5 / (sqrt 0.5 + sqrt 0.3)
], ids=str)
def test_top_k_and_top_p_by_hand(options, kept):
    """What is dropped never occurs; what stays keeps its proportions (5,000 draws: 4 standard deviations are 0.029)."""
    frequencies, _, _ = one_token(P, 5000, **options)
    kept = torch.tensor(kept)
    assert (frequencies[kept == 0] == 0).all()
    assert (frequencies - kept).abs().max() < 0.029


def test_top_p_stops_where_it_is_reached():
    """Four tokens of 1/4: two of them are 0.5 already, so that a third does not belong to the smallest set of at least 0.5."""
    frequencies, _, _ = one_token([0.25] * 4, 200, top_p=0.5)
    assert (frequencies > 0).sum() == 2


def test_top_k_logprobs_are_of_the_whole_distribution():
    """Top-k restricts what is drawn, not what is reported: log 0.5 and log 0.3, not log 0.625 and log 0.375."""
    _, tokens, logprobs = one_token(P, 50, top_k=2)
    assert torch.allclose(logprobs, torch.tensor(P).log()[tokens])


def test_top_k_1_is_greedy():
    model, (ids, mask) = tiny(), ragged()
    greedy = generate(model, ids, mask, 10, 0, eos_id=EOS)
    top = generate(model, ids, mask, 10, 1.0, top_k=1, eos_id=EOS, generator=seeded())
    assert all(torch.allclose(a, b) if a.is_floating_point() else torch.equal(a, b) for a, b in zip(greedy, top))


def test_extreme_logits_stay_finite():
    """Logits of +-1e4 have probabilities 0 and 1: no NaN, and the one possible token is drawn."""
    table = torch.full((1, 6, 5), -1e4)
    table[..., 3] = 1e4
    ones = torch.ones(6, 1, dtype=torch.int64)
    responses, _, logprobs = generate(Scripted(table), ones, ones, 1, 0.7, top_p=0.9, generator=seeded())
    assert (responses == 3).all() and (logprobs == 0).all()


# ------------------------------------------------------------------------------------------------------------- roll_out

def spell(ids, skip_special):
    assert skip_special is False, "a special token sampled before the end must stay visible"
    return " ".join(map(str, ids))


TOKENIZER = SimpleNamespace(pad_id=EOS, eos_id=EOS, decode=spell)  # pad == eos, as GPT-2 has it
QUERIES = [[3], [5, EOS, 6, 2], [1, 2, 3, 4, 5, 6]]


def actor_and_reference(seed=0):
    actor = PolicyWithValue(tiny(seed))
    torch.manual_seed(seed)
    nn.init.normal_(actor.value_head.weight)
    nn.init.normal_(actor.value_head.bias)
    return actor, tiny(seed + 1)


@pytest.fixture(scope="module")
def rolled():
    actor, reference = actor_and_reference()
    return actor, reference, roll_out(actor, reference, TOKENIZER, QUERIES * 3, 12, 0.8, generator=seeded(1))


def test_rollout_lines_up(rolled):
    """Queries on the left, responses from column Q, the masks of both, and the text without EOS."""
    _, _, batch = rolled
    B, R = batch.response_mask.shape
    Q = batch.query_response.shape[1] - R
    assert (B, Q) == (9, 6) and batch.response_mask.dtype == batch.attention_mask.dtype == torch.bool
    for row, query in enumerate(QUERIES * 3):
        ids, mask, length = batch.query_response[row], batch.attention_mask[row], batch.lengths[row]
        assert ids[:Q][mask[:Q]].tolist() == query and mask[:Q].sum() == len(query)
        assert torch.equal(mask[Q:], batch.response_mask[row])
        assert batch.response_mask[row].tolist() == [t < length for t in range(R)]
        response = ids[Q:Q + length].tolist()
        assert EOS not in response[:-1] and batch.ended[row] == (response[-1] == EOS)
        assert batch.responses[row] == spell(response[:-1] if response[-1] == EOS else response, False)
    assert batch.ended.any() and not batch.ended.all(), "both ways of ending should be here"


@torch.no_grad()
def test_rollout_equals_each_row_by_itself(rolled):
    """Log-probs, entropy, reference, values and last value of every row, from a forward over that row unpadded."""
    actor, reference, batch = rolled
    Q = 6
    for row, query in enumerate(QUERIES * 3):
        length = batch.lengths[row].item()
        whole = torch.tensor([query + batch.query_response[row, Q:Q + length].tolist()])
        first, response = len(query), whole[0, len(query):, None]
        logp = (actor.policy(whole)[0, first - 1:-1] / 0.8).log_softmax(-1)
        ref_logp = (reference(whole)[0, first - 1:-1] / 0.8).log_softmax(-1)
        values = actor.value_head(actor.policy.hidden(whole))[0, first - 1:]
        for found, expected in ((batch.logprobs, logp.gather(1, response)[:, 0]), (batch.values, values[:-1]),
                                (batch.ref_logprobs, ref_logp.gather(1, response)[:, 0]),
                                (batch.entropy, -(logp.exp() * logp).sum(1))):
            assert torch.allclose(found[row, :length], expected, atol=2e-5)
        assert abs(batch.last_values[row] - values[-1]) < 2e-5


@torch.no_grad()
def test_rollout_logprobs_are_those_of_the_samples(rolled):
    """The same generator in `generate` gives the same text and the same log-probs to 1e-5."""
    actor, _, batch = rolled
    ids, mask = pad(QUERIES * 3, EOS, "left")
    responses, response_mask, logprobs = generate(actor.policy, ids, mask, 12, 0.8, eos_id=EOS, generator=seeded(1))
    assert torch.equal(batch.query_response[:, 6:], responses) and torch.equal(batch.response_mask, response_mask)
    assert (batch.logprobs - logprobs)[response_mask].abs().max() < 1e-5


def test_rollout_carries_no_gradient(rolled):
    assert not any(value.requires_grad for value in vars(rolled[2]).values() if torch.is_tensor(value))


def test_eos_in_the_last_slot_has_ended():
    """Scripted: row 0 writes EOS as its third and last token and has ended; row 1 was cut."""
    model = Scripted(script([[4, 5, EOS], [4, 5, 6]]))
    responses, mask, _ = generate(model, *pad([[1], [2]], 0, "left"), 3, 0, eos_id=EOS)
    assert mask.all() and decode(TOKENIZER, responses, mask) == ["4 5", "4 5 6"]
    actor, reference = actor_and_reference()
    greedy, greedy_mask, _ = generate(actor.policy, *pad(QUERIES, EOS, "left"), 4, 0)
    tokenizer = SimpleNamespace(pad_id=EOS, eos_id=greedy[0, 3].item(), decode=spell)
    batch = roll_out(actor, reference, tokenizer, QUERIES, 4, 0.0)
    expected = [tokenizer.eos_id in row for row in greedy.tolist()]
    assert batch.ended.tolist() == expected and expected[0]


def test_a_greedy_rollout_is_scored_at_temperature_1():
    """As `generate` reports it: 0 divides no logits."""
    actor, reference = actor_and_reference()
    batch = roll_out(actor, reference, TOKENIZER, QUERIES, 6, 0.0)
    _, mask, logprobs = generate(actor.policy, *pad(QUERIES, EOS, "left"), 6, 0, eos_id=EOS)
    assert torch.equal(batch.response_mask, mask) and torch.allclose(batch.logprobs[mask], logprobs[mask], atol=1e-5)


def test_special_tokens_before_the_end_stay_in_the_text():
    """Responses [4, PAD, 5, EOS] and [PAD, 4]: only the closing EOS goes. A dropped <|pad|> would let a policy write what neither
    reward nor exact match sees."""
    tokenizer = Tokenizer.train(["x = 1\n"] * 4, 300)
    x, pad_id, eos_id = tokenizer.encode("x")[0], tokenizer.pad_id, tokenizer.eos_id
    assert pad_id != eos_id
    ids, mask = pad([[x, pad_id, x, eos_id], [pad_id, x]], eos_id, "right")
    name = tokenizer.decode([pad_id], skip_special=False)
    assert name and decode(tokenizer, ids, mask) == [f"x{name}x", f"{name}x"]


def test_ended_rows_are_left_out_and_the_others_go_on():
    """Rows end after 1, 2, 3, 4, 5 and 6 tokens: each turn's cache holds fewer rows, every row is written in its own place."""
    lengths = [3, 1, 6, 2, 5, 4]
    model = Scripted(script([[row + 1] * (n - 1) + [9] * (7 - n) for row, n in enumerate(lengths)]))
    sizes, new_cache = [], model.new_cache
    def counted(batch_size, max_length):
        cache = new_cache(batch_size, max_length)
        keep = cache.keep
        cache.keep = lambda rows: (keep(rows), sizes.append(len(model.rows)))
        return cache
    model.new_cache = counted
    ones = torch.ones(6, 1, dtype=torch.long)
    responses, mask, _ = generate(model, ones, ones, 6, 0, eos_id=9)
    assert mask.sum(1).tolist() == lengths and sizes == [3, 1]
    for row, n in enumerate(lengths):
        assert responses[row].tolist() == [row + 1] * (n - 1) + [9] * (7 - n)


def test_scoring_in_parts_is_scoring_whole(rolled):
    """On real tokens, and for the value after the last of them; what is masked is whatever."""
    actor, reference, batch = rolled
    whole = score_tokens(actor, batch.query_response, batch.attention_mask, 12, 0.8)
    valued = torch.cat([torch.ones(len(batch.lengths), 1, dtype=torch.bool), batch.response_mask], 1)  # (B, R + 1)
    for part in (1, 4, 100):
        parts = score_in_parts(actor, batch.query_response, batch.attention_mask, 12, 0.8, part)
        for a, b, real in zip(whole, parts, (batch.response_mask, batch.response_mask, valued)):
            assert not b.requires_grad and torch.allclose(a[real], b[real], atol=1e-6)
    assert score_in_parts(reference, batch.query_response, batch.attention_mask, 12, 0.8, 4)[2] is None


def test_scoring_in_parts_is_of_few_rows_of_like_length():
    """Rows of 7, 3, 6, 2, 5 and 4 tokens, at most 4 at a time: first those of 2 to 5 tokens, then those of 6 and 7."""
    (ids, mask), model, seen = ragged((7, 3, 6, 2, 5, 4)), tiny(), []
    hidden = model.hidden
    model.hidden = lambda ids, *rest: seen.append(tuple(ids.shape)) or hidden(ids, *rest)
    score_in_parts(model, ids, mask, 1, 1.0, 4)
    assert seen == [(4, 5), (2, 7)]


def test_a_rollout_is_made_in_the_parts_and_by_the_ops_asked_for():
    """3 queries: sampled 2 at a time, scored 1 at a time under the actor and then under the reference, by the given functions. Without
    that --generation-batch-size, --micro-batch-size and --low-memory would spare no memory."""
    (actor, reference), sampled, scored = actor_and_reference(), [], []
    new_cache = actor.policy.new_cache
    actor.policy.new_cache = lambda rows, length: sampled.append(rows) or new_cache(rows, length)
    ops = replace(TORCH, token_logprobs=lambda logits, *rest: scored.append(len(logits)) or TORCH.token_logprobs(logits, *rest))
    roll_out(actor, reference, TOKENIZER, QUERIES, 4, generator=seeded(), micro_batch_size=1, ops=ops, generation_batch_size=2)
    assert sampled == [2, 1] and scored == [1] * 6


@pytest.mark.parametrize("rows", [slice(None), slice(3, 4)], ids=["ragged rows", "one row"])
def test_padding_that_is_taken_out_changes_nothing(rolled, rows):
    """States, values and gradients are those of the padded rows, and the transformer has seen no column more than it must."""
    actor, batch = rolled[0], rolled[2].select(rows)
    ids, mask, real = batch.query_response, batch.attention_mask, batch.response_mask
    seen, hook = [], actor.policy.hidden
    actor.policy.hidden = lambda ids, *rest: seen.append(ids.shape[1]) or hook(ids, *rest)
    try:
        found = hidden_states(actor, ids, mask, 12)
    finally:
        del actor.policy.hidden
    assert seen == [int(mask.sum(1).max())] and (len(ids) > 1 or seen[0] < ids.shape[1])
    whole = actor.policy.hidden(ids, mask)[:, -13:]
    expected, grads = (whole[:, :-1], actor.value_head(whole)), []
    for states, values in (found, expected):
        actor.zero_grad()
        ((states[real] ** 2).sum() + (values[:, :-1][real] ** 3).sum() + values[:, 0].sum()).backward()
        grads.append([p.grad.clone() for p in actor.parameters() if p.grad is not None])
    assert torch.allclose(found[0][real], expected[0][real], atol=1e-5)
    assert torch.allclose(found[1][:, :-1][real], expected[1][:, :-1][real], atol=1e-5)
    last = batch.lengths[:, None]
    assert torch.allclose(found[1].gather(1, last), expected[1].gather(1, last), atol=1e-5)
    assert len(grads[0]) == len(grads[1]) and all(torch.allclose(a, b, atol=1e-3, rtol=1e-4) for a, b in zip(*grads))


def test_select_takes_the_rows_of_every_tensor(rolled):
    batch, rows = rolled[2], torch.tensor([4, 0])
    some = batch.select(rows)
    assert isinstance(some, Rollout) and some.responses == []
    for name, value in vars(batch).items():
        if torch.is_tensor(value):
            assert torch.equal(getattr(some, name), value[rows])


def test_score_tokens_with_and_without_value_head():
    """The same log-probs either way; values (B, R + 1); gradient reaches the transformer from all three."""
    actor, _ = actor_and_reference()
    ids, mask = ragged((5, 9, 7))
    plain, entropy, none = score_tokens(actor.policy, ids, mask, 4, 0.9)
    logprobs, actor_entropy, values = score_tokens(actor, ids, mask, 4, 0.9)
    assert none is None and values.shape == (3, 5)
    assert torch.allclose(plain, logprobs, atol=1e-6) and torch.allclose(entropy, actor_entropy, atol=1e-6)
    for result in (logprobs, actor_entropy, values):
        gradient, = torch.autograd.grad(result.sum(), actor.policy.wpe.weight, retain_graph=True)
        assert gradient.isfinite().all() and gradient.abs().sum() > 0


def test_rollout_does_not_change_the_models(rolled):
    actor, reference = actor_and_reference(3)
    before = copy.deepcopy((actor.state_dict(), reference.state_dict()))
    roll_out(actor, reference, TOKENIZER, QUERIES, 5, generator=seeded())
    for old, model in zip(before, (actor, reference)):
        assert all(torch.equal(old[name], tensor) for name, tensor in model.state_dict().items())
