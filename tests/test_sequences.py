"""Texts to batches: cutting and its counts, joined masks by hand, picked logits against full ones, batches."""
import pytest
import tokenizers
import torch

from nanorlhf.errors import InputError
from nanorlhf.gpt2 import GPT2, GPT2Config
from nanorlhf.sequences import encode_queries, encode_responses, epoch_batches, join, predict, shuffled_batches
from nanorlhf.tokenizer import Tokenizer

TEXTS = ["sort the list xs", "xs.sort()", "add a to b", "a + b", "the list of names", "len(names)"] * 4


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS, 300)


def tiny(**changes):
    torch.manual_seed(0)
    model = GPT2.from_config(GPT2Config(**{**dict(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2),
                                           **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


# ------------------------------------------------------------------------------------------------------------- cutting

def test_queries_lose_their_beginning(tokenizer):
    """The end of a query stands next to the response, so it stays; one of exactly max_query tokens is not cut."""
    prompts = ["sort the list xs", "a + b", "the list of names"]
    whole, none_cut = encode_queries(tokenizer, prompts, "{prompt}\n", 1000)
    assert none_cut == 0 and whole == [tokenizer.encode(prompt + "\n") for prompt in prompts]
    room = len(whole[1])
    rows, count = encode_queries(tokenizer, prompts, "{prompt}\n", room)
    assert rows == [row[len(row) - room:] for row in whole] and rows[1] == whole[1]
    assert count == sum(len(row) > room for row in whole) == 2


def test_queries_follow_the_template(tokenizer):
    rows, _ = encode_queries(tokenizer, ["a + b"], "# {prompt} {x}\n>>> ", 1000)
    assert tokenizer.decode(rows[0]) == "# a + b {x}\n>>> "


def test_a_query_without_any_token_is_named():
    """A BPE that was not given all bytes leaves out what it does not know. Such a query was met only in `generate`, after an epoch
    of training, as one that was padded on the wrong side; in DPO it cost the first token of its response."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"<|endoftext|>": 0, "a": 1, "b": 2}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    narrow = Tokenizer(backend, "gpt2", {"eos_token": "<|endoftext|>"})
    assert encode_queries(narrow, ["ab", "\u65e5a"], "{prompt}\n", 10) == ([[1, 2], [1]], 0)
    with pytest.raises(InputError, match="knows no part of 1 of 2 queries, such as that of the prompt '\u65e5'"):
        encode_queries(narrow, ["ab", "\u65e5"], "{prompt}\n", 10)


def test_responses_end_with_eos_or_lose_their_end(tokenizer):
    """EOS counts: a response of n tokens needs n + 1 slots, and in n slots it stands without EOS, and is counted."""
    ids = tokenizer.encode("xs.sort()")
    n, eos = len(ids), tokenizer.eos_id
    assert encode_responses(tokenizer, ["xs.sort()", ""], n + 1) == ([ids + [eos], [eos]], 0)
    assert encode_responses(tokenizer, ["xs.sort()", ""], n) == ([ids, [eos]], 1)
    assert encode_responses(tokenizer, ["xs.sort()", ""], 1) == ([ids[:1], [eos]], 1)


def test_special_text_in_a_response_is_not_eos(tokenizer):
    """The characters <|endoftext|> in the data do not end a response."""
    rows, _ = encode_responses(tokenizer, ["a <|endoftext|> b"], 1000)
    assert rows[0].count(tokenizer.eos_id) == 1 and rows[0][-1] == tokenizer.eos_id


# ---------------------------------------------------------------------------------------------------------------- join

def test_join_by_hand():
    """Two rows, padded on the right with 9; the response mask covers the response, not the query, not the padding.

        1 2 | 3 4 5 |        mask 1 1 1 1 1        response 0 0 1 1 1
        6   | 9     | 9 9 9  mask 1 1 0 0 0        response 0 1 0 0 0     a real 9 (EOS) counts though 9 is the pad
    """
    ids, attention_mask, response_mask = join([[1, 2], [6]], [[3, 4, 5], [9]], 9)
    assert ids.tolist() == [[1, 2, 3, 4, 5], [6, 9, 9, 9, 9]]
    assert attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert response_mask.tolist() == [[False, False, True, True, True], [False, True, False, False, False]]
    assert ids.dtype == torch.int64 and response_mask.dtype == torch.bool


def test_no_token_spans_the_boundary(tokenizer):
    """"xs" + ".sort()" joined as ids keeps the query's ids first, whatever the two would merge to as one text."""
    queries, _ = encode_queries(tokenizer, ["the lis"], "{prompt}", 99)
    responses, _ = encode_responses(tokenizer, ["t of names"], 99)
    ids, _, response_mask = join(queries, responses, tokenizer.pad_id)
    assert ids[0].tolist() != tokenizer.encode("the list of names") + [tokenizer.eos_id], "they should merge"
    assert ids[0][~response_mask[0]].tolist() == tokenizer.encode("the lis")
    assert tokenizer.decode(ids[0][response_mask[0]].tolist()) == "t of names"


# ------------------------------------------------------------------------------------------------------------- predict

def test_predict_by_hand():
    """A query of 2 and a response of 3 in columns 2, 3, 4: their logits are those of columns 1, 2, 3."""
    model = tiny()
    ids, attention_mask, response_mask = join([[1, 2]], [[3, 4, 5]], 0)
    logits, targets = predict(model, ids, attention_mask, response_mask)
    assert targets.tolist() == [3, 4, 5]
    assert torch.allclose(logits, model(ids)[0, 1:4], atol=1e-6)


@pytest.mark.parametrize("changes", [{}, dict(tie_word_embeddings=False)], ids=["tied", "untied"])
def test_predict_equals_full_logits_picked(changes):
    """Ragged rows, row by row and unpadded: the same logits in the same order, no head over query and padding."""
    model = tiny(**changes)
    queries, responses = [[1], [2, 3, 4, 5], [6, 7]], [[8, 9, 10], [11], [12, 13, 14, 15, 16]]
    logits, targets = predict(model, *join(queries, responses, 0))
    assert targets.tolist() == [token for response in responses for token in response]
    expected = [model(torch.tensor([query + response]))[0, len(query) - 1:-1]
                for query, response in zip(queries, responses)]
    assert torch.allclose(logits, torch.cat(expected), atol=1e-5)


def test_predict_carries_gradient():
    model = tiny()
    logits, _ = predict(model, *join([[1, 2], [3]], [[3, 4, 5], [6]], 0))
    logits.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters()) and model.wpe.weight.grad.abs().sum() > 0


# ------------------------------------------------------------------------------------------------------------- batches

def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("count, batch_size", [(1, 4), (4, 4), (7, 3), (100, 8), (1000, 32), (50, 1)])
def test_each_row_comes_once(count, batch_size):
    """A permutation of the rows in ceil(count / batch_size) batches none above its size."""
    lengths = torch.randint(1, 60, (count,), generator=generator(1)).tolist()
    batches = shuffled_batches(lengths, batch_size, generator())
    assert sorted(row for batch in batches for row in batch) == list(range(count))
    assert all(1 <= len(batch) <= batch_size for batch in batches)
    assert len(batches) == -(-count // batch_size), "a schedule counts on this many steps an epoch"


def test_batches_are_reproducible_and_shuffled():
    lengths = torch.randint(1, 60, (200,), generator=generator(1)).tolist()
    first, again, other = (shuffled_batches(lengths, 16, generator(seed)) for seed in (3, 3, 4))
    assert first == again and first != other
    one = generator(3)
    assert shuffled_batches(lengths, 16, one) == first and shuffled_batches(lengths, 16, one) != first


def padding(lengths, batches):
    """Share of the columns that are padding."""
    columns = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    return 1 - sum(lengths) / columns


def test_batches_are_of_like_length_and_in_no_order_of_it():
    """Lengths 1 to 60: batches in plain random order waste about half, these less than a tenth; yet short and long
    batches alternate (rank correlation of a batch's place and its length near 0)."""
    lengths = torch.randint(1, 61, (2048,), generator=generator(1)).tolist()
    batches = shuffled_batches(lengths, 16, generator())
    plain = torch.randperm(2048, generator=generator()).split(16)
    assert padding(lengths, batches) < 0.1 < 0.4 < padding(lengths, [batch.tolist() for batch in plain])
    longest = torch.tensor([max(lengths[row] for row in batch) for batch in batches], dtype=torch.float32)
    place = torch.arange(len(longest), dtype=torch.float32)
    assert torch.corrcoef(torch.stack([place, longest]))[0, 1].abs() < 0.3


def test_batches_are_of_other_rows_each_time():
    """512 different lengths: sorted as a whole, every epoch would put the same 16 rows together; sorted in windows, hardly any."""
    found = [{frozenset(batch) for batch in shuffled_batches(range(512), 16, generator(seed))} for seed in (3, 4)]
    assert len(found[0] & found[1]) < 4


def test_an_interrupted_run_goes_on_with_the_batch_that_was_next():
    """25 rows in batches of 3: 9 steps an epoch. Each epoch has every row, in an order of its own; what is left after any number of steps
    is the same as it was."""
    lengths = [7 * row % 25 for row in range(25)]
    whole = list(epoch_batches(lengths, 3, 2, seed=0))
    assert [(step, epoch, end) for step, epoch, _, end in whole] == [(n, 1 + (n > 9), n in (9, 18)) for n in range(1, 19)]
    orders = [[rows for _, at, rows, _ in whole if at == epoch] for epoch in (1, 2)]
    assert all(sorted(sum(order, [])) == list(range(25)) for order in orders) and orders[0] != orders[1]
    for done in range(19):
        assert list(epoch_batches(lengths, 3, 2, seed=0, done=done)) == whole[done:]
    assert list(epoch_batches(lengths, 3, 2, seed=1)) != whole
