"""Reward models against transformers' sequence classifiers, both ways; padding, cutting, ensembles, loading."""
import json
import math
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from torch import nn

from nanorlhf import encoder as encoders
from nanorlhf.encoder import Encoder, EncoderConfig
from nanorlhf.errors import InputError
from nanorlhf.gpt2 import GPT2, GPT2Config
from nanorlhf.reward import LastToken, OwnHead, RewardEnsemble, RewardModel, call_reward, last_token
from nanorlhf.run import RunFailed
from nanorlhf.terms import Combination, Term, load_reward
from nanorlhf.tokenizer import Tokenizer

FAMILIES = ("gpt2", "roberta", "bert")
PROMPTS = ["sort xs", "add the numbers a and b", "", "length of the list called names", "x"]
RESPONSES = ["xs.sort()", "a + b", "pass", "", "x = [y for y in range(10) if y]"]
TEXTS = PROMPTS * 3 + RESPONSES * 3


def write_tokenizer(family, folder):
    """A small tokenizer of each family's own kind and file layout."""
    if family == "gpt2":
        Tokenizer.train(TEXTS, 300).save_pretrained(folder)
    elif family == "roberta":
        tokens = ["<s>", "<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "<mask>"]
        (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "RobertaTokenizer"}))
    else:
        characters = sorted(set("".join(TEXTS).lower()) - {" "})
        tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *("##" + c for c in characters)]
        (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer",
                                                                  "do_lower_case": True}))


def shake(model, scale=0.2):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return model


def ours(family, folder, seed=0, **changes):
    """A RewardModel of ours with every parameter random and dropout that would show."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(family, folder)
    (folder / "config.json").write_text(json.dumps({"model_type": family}))  # tells the tokenizer its family
    tokenizer = Tokenizer.from_pretrained(folder)
    torch.manual_seed(seed)
    if family == "gpt2":
        backbone = GPT2.from_config(GPT2Config(**{**dict(vocab_size=tokenizer.vocab_size, n_positions=80, n_embd=16,
                                                         n_layer=2,
                                                         n_head=2, eos_token_id=tokenizer.eos_id), **changes}))
        head = LastToken(16)
    else:
        backbone = Encoder.from_config(EncoderConfig(**{**dict(
            model_type=family, vocab_size=tokenizer.vocab_size, hidden_size=16, num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=90), **changes}))
        head = encoders.new_head(backbone.config)
    return shake(RewardModel(backbone, head, tokenizer)).eval()


def theirs(family, folder, num_labels=1, **changes):
    """A random sequence classifier that transformers itself saved, beside the tokenizer; returns it."""
    transformers = pytest.importorskip("transformers")
    folder.mkdir(exist_ok=True)
    write_tokenizer(family, folder)
    tokenizer = Tokenizer.from_pretrained(folder)
    torch.manual_seed(3)
    if family == "gpt2":
        settings = dict(n_positions=80, n_embd=16, n_layer=2, n_head=2, pad_token_id=tokenizer.pad_id)
        name = "GPT2"
    else:
        settings = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                        max_position_embeddings=90, type_vocab_size={"roberta": 1, "bert": 2}[family])
        name = family.capitalize()
    config = getattr(transformers, name + "Config")(**{**settings, "vocab_size": tokenizer.vocab_size,
                                                       "num_labels": num_labels, **changes})
    model = shake(getattr(transformers, name + "ForSequenceClassification")(config)).eval()
    model.save_pretrained(folder)
    return model


def their_scores(model, folder, family):
    """Logits of transformers from texts alone: its own tokenizer, its own framing and padding. GPT-2 gets query and
    response encoded apart, and EOS, which is how a rollout's ids come about."""
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if family == "gpt2":
        rows = [tokenizer(p + "\n").input_ids + tokenizer(r).input_ids + [tokenizer.eos_token_id]
                for p, r in zip(PROMPTS, RESPONSES)]
        inputs = tokenizer.pad({"input_ids": rows}, return_tensors="pt", padding_side="right")
    else:
        inputs = tokenizer(PROMPTS, RESPONSES, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits[:, 0]


# ------------------------------------------------------------------------------------------- parity with transformers

@pytest.mark.parametrize("family", FAMILIES)
def test_their_classifier_is_our_reward_model(family, tmp_path):
    """...ForSequenceClassification with one label, saved by transformers: its logit is our score, gain 1 and bias 0."""
    model = theirs(family, tmp_path)
    found = RewardModel.from_pretrained(tmp_path).score(PROMPTS, RESPONSES)
    expected = their_scores(model, tmp_path, family)
    assert expected.std() > 0.01, "a constant would prove nothing"
    assert found.dtype == torch.float32 and (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_our_reward_model_is_their_classifier(family, tmp_path):
    """AutoModelForSequenceClassification loads what we save, without a missing or an unexpected tensor; the logit is
    the raw score, before gain and bias."""
    transformers = pytest.importorskip("transformers")
    model = ours(family, tmp_path / "tokenizer")
    model.gain, model.bias = 3.0, -1.5
    model.save_pretrained(tmp_path / "saved")
    peer, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "saved", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert peer.num_labels == 1
    expected = 3.0 * their_scores(peer.eval(), tmp_path / "saved", family) - 1.5
    assert (model.score(PROMPTS, RESPONSES) - expected).abs().max() < 1e-5


def test_pad_equal_to_eos_is_scored_at_eos(tmp_path):
    """GPT-2's own tokenizer has no pad. We score at the real EOS; a lone row in transformers gives the same, since the
    saved config names no pad that its search for the last token would take EOS for."""
    transformers = pytest.importorskip("transformers")
    model = ours("gpt2", tmp_path / "tokenizer")
    model.tokenizer.pad_id = model.tokenizer.eos_id
    together = model.score(PROMPTS, RESPONSES)
    model.save_pretrained(tmp_path / "saved")
    peer = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    for prompt, response, score in zip(PROMPTS, RESPONSES, together):
        ids, _, _ = model.encode([prompt], [response])
        assert ids[0, -1] == model.tokenizer.eos_id
        assert abs(peer(ids).logits.item() - score) < 1e-5


def test_an_untied_backbone_is_saved_and_loaded(tmp_path):
    """A policy whose output layer is its own, as SFT may leave it, is a backbone like any other."""
    model = ours("gpt2", tmp_path / "tokenizer", tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "saved")
    again = RewardModel.from_pretrained(tmp_path / "saved")
    assert torch.allclose(again.score(PROMPTS, RESPONSES), model.score(PROMPTS, RESPONSES), atol=1e-6)


# --------------------------------------------------------------------------------------------------------------- heads

def test_each_backbone_has_its_head(tmp_path):
    """new_head gives each family the head of its sequence classifier, and two draws of it differ."""
    heads = {"gpt2": LastToken, "roberta": encoders.RobertaHead, "bert": encoders.BertPoolerHead}
    for family, kind in heads.items():
        ours(family, tmp_path / family).backbone.save_pretrained(tmp_path / family)
        first, second = (RewardModel.from_pretrained(tmp_path / family, new_head="native") for _ in range(2))
        assert type(first.head) is kind
        assert any(not torch.equal(a, b) for a, b in zip(first.head.parameters(), second.head.parameters()))


def test_several_labels_are_no_reward(tmp_path):
    for family in FAMILIES:
        theirs(family, tmp_path / family, num_labels=2)
        with pytest.raises(InputError):
            RewardModel.from_pretrained(tmp_path / family)


# ------------------------------------------------------------------------------------------------------------- pooling

def test_last_token_by_hand():
    """Hidden states count 0, 1, 2, ... in one channel and the head reads it: masks of 3, 1, 4 tokens give 2, 0, 3."""
    head = LastToken(1)
    nn.init.ones_(head.score.weight)
    hidden = torch.arange(5.0).expand(3, 5)[..., None]
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 0]])
    assert head(hidden, mask).tolist() == [[2.0], [0.0], [3.0]]


def test_head_starts_small():
    """std 1 / sqrt(C + 1) = 1 / 32 for C = 1023, over 1023 weights; a bias starts at 0."""
    torch.manual_seed(0)
    layers = [LastToken(1023).score, OwnHead("linear", 1023, last_token).reward_head[-1], OwnHead("mlp", 1023, last_token).reward_head[-1]]
    assert [layer.weight.std().item() for layer in layers] == pytest.approx([1 / 32] * 3, rel=0.1)
    assert [layer.bias.item() for layer in layers[1:]] == [0, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_do_not_depend_on_company(family, tmp_path):
    """Alone, in any order, in batches of any size: padding and sorting by length leave each row's score."""
    model = ours(family, tmp_path)
    scores = model.score(PROMPTS, RESPONSES)
    for size in (1, 2, 3):
        assert torch.allclose(model.score(PROMPTS, RESPONSES, batch_size=size), scores, atol=1e-6)
    order = [3, 0, 4, 2, 1]
    shuffled = model.score([PROMPTS[i] for i in order], [RESPONSES[i] for i in order])
    assert torch.allclose(shuffled, scores[order], atol=1e-6)
    assert len({round(score, 4) for score in scores.tolist()}) == 5, "the scores should differ"


def test_the_prompt_and_the_template_matter(tmp_path):
    model = ours("gpt2", tmp_path)
    scores = model.score(["a", "b"], ["x", "x"])
    assert scores[0] != scores[1]
    model.template = "{prompt}\n>>> "
    assert (model.score(["a", "b"], ["x", "x"]) != scores).all()
    ids, _, _ = model.encode(["a"], ["x"])
    assert model.tokenizer.decode(ids[0], skip_special=False) == "a\n>>> x<|endoftext|>"


def test_score_is_without_dropout_and_restores_the_mode(tmp_path):
    for family in FAMILIES:
        model = ours(family, tmp_path / family)
        expected = model.score(PROMPTS, RESPONSES)
        model.train()
        assert torch.equal(model.score(PROMPTS, RESPONSES), expected) and model.training and model.head.training
        assert not expected.requires_grad


@pytest.mark.parametrize("family", FAMILIES)
def test_raw_scores_are_float32_under_autocast(family, tmp_path):
    """Of bfloat16's 8 bits the difference of two scores, which is all that the loss sees, would keep few."""
    model = ours(family, tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(*model.encode(PROMPTS, RESPONSES)).dtype == torch.float32


def test_gradient_reaches_backbone_and_head(tmp_path):
    for family in FAMILIES:
        model = ours(family, tmp_path / family)
        model(*model.encode(PROMPTS, RESPONSES)).sum().backward()
        used = [p for p in model.parameters() if p.grad is not None]
        assert any(p.grad.abs().sum() > 0 for p in model.head.parameters())
        assert sum(bool(p.grad.abs().sum() > 0) for p in used) > 0.8 * len(list(model.parameters()))


def test_score_of_nothing_and_of_the_wrong_number(tmp_path):
    model = ours("gpt2", tmp_path)
    assert model.score([], []).shape == (0,)
    with pytest.raises(ValueError, match="2 prompts but 1 responses"):
        model.score(["a", "b"], ["c"])


def test_a_model_is_a_reward(tmp_path):
    """reward(prompts, responses, references) -> (B,), like any other callable."""
    model = ours("gpt2", tmp_path)
    scores = model.score(PROMPTS, RESPONSES)
    assert torch.equal(model(PROMPTS, RESPONSES, [None] * 5), scores)
    assert torch.equal(model(prompts=PROMPTS, responses=RESPONSES, references=[None] * 5), scores)
    assert torch.equal(model(PROMPTS, responses=RESPONSES, references=[None] * 5), scores)


def test_one_text_is_no_list_of_texts(tmp_path):
    """Two texts of one length used to be scored letter against letter."""
    with pytest.raises(InputError, match="expected lists of prompts and of responses, found one text; write \\[text\\]"):
        ours("gpt2", tmp_path).score("sort xs", "sort xs")


# ------------------------------------------------------------------------------------------------- cutting to length

@pytest.mark.parametrize("family", FAMILIES)
def test_the_prompt_gives_way_to_the_response(family, tmp_path):
    """A prompt ten times too long: the response and its end are whole, and what is left of the prompt is its end."""
    model = ours(family, tmp_path)
    model.max_length = 24
    ids, mask, _ = model.encode(["x " * 200 + "sort xs"], ["xs.sort()"])
    assert ids.shape == (1, 24) and mask.all()
    body = "".join(model.tokenizer.decode(ids[0]).split())
    assert "sortxs" in body and body.endswith("xs.sort()")
    assert ids[0, -1] == model.tokenizer.eos_id
    assert torch.isfinite(model.score(["x " * 200], ["xs.sort()"])).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_long_response_keeps_its_start(family, tmp_path):
    model = ours(family, tmp_path)
    model.max_length = 12
    ids, _, _ = model.encode(["sort xs"], ["xs.sort()" + "y" * 100])
    body = "".join(model.tokenizer.decode(ids[0]).split())
    assert ids.shape == (1, 12) and "xs.s" in body
    if family == "gpt2":  # a response that was cut has no EOS, and at least one token of the query is left
        assert model.tokenizer.eos_id not in ids and model.tokenizer.decode(ids[0]).startswith("\n")
    else:  # the frame stays whole
        assert ids[0, -1] == model.tokenizer.eos_id


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_cut_is_counted_and_said_once(family, tmp_path, capsys):
    """Two of three rows are too long, in one batch and again in the next: 4, on one line of the screen. What just fits is not cut."""
    model = ours(family, tmp_path)
    model.max_length = int(model.encode(["a"], ["b" * 8])[1].sum())
    for _ in range(2):
        model.encode(["a", "ab", "a"], ["b" * 8, "b" * 8, "b" * 40])
    assert model.cut == 4
    assert f"it reads {model.max_length} tokens, and 2 of 3 prompts with their responses are longer" in (said := capsys.readouterr().err)
    assert said.count("\n") == 1


def test_max_length_is_at_most_what_the_backbone_holds(tmp_path):
    """RoBERTa's 90 position rows hold 88 tokens; texts longer than the table are cut, not refused."""
    for family, longest in (("gpt2", 80), ("bert", 90), ("roberta", 88)):
        model = ours(family, tmp_path / family)
        assert model.max_length == longest
        assert RewardModel(model.backbone, model.head, model.tokenizer, max_length=1000).max_length == longest
        assert RewardModel(model.backbone, model.head, model.tokenizer, max_length=10).max_length == 10
        assert torch.isfinite(model.score(["x " * 300], ["y " * 300])).all()


# --------------------------------------------------------------------------------------------- normalise, save and load

@pytest.mark.parametrize("family", FAMILIES)
def test_normalise_gives_mean_0_and_variance_1(family, tmp_path):
    model = ours(family, tmp_path)
    raw = model.score(PROMPTS, RESPONSES)
    for _ in range(2):  # a second time starts from the raw scores again
        model.normalise(PROMPTS, RESPONSES)
        scores = model.score(PROMPTS, RESPONSES)
        assert abs(scores.mean()) < 1e-5 and scores.var(unbiased=False).item() == pytest.approx(1, abs=1e-4)
        assert torch.allclose(scores, (raw - raw.mean()) / raw.std(unbiased=False), atol=1e-4), "the order is kept"


def test_normalise_of_equal_scores_is_finite(tmp_path):
    model = ours("gpt2", tmp_path)
    model.normalise(["a"] * 3, ["b"] * 3)
    assert torch.isfinite(model.score(["a"], ["b"])).all() and abs(model.score(["a"], ["b"])).item() < 1


@pytest.mark.parametrize("family", FAMILIES)
def test_save_and_load_keep_everything(family, tmp_path):
    model = ours(family, tmp_path / "tokenizer")
    model.template, model.max_length = "Q: {prompt}\nA: ", 33
    model.normalise(PROMPTS, RESPONSES)
    model.save_pretrained(tmp_path / "saved")
    again = RewardModel.from_pretrained(tmp_path / "saved")
    assert (again.gain, again.bias, again.template, again.max_length) == (
        model.gain, model.bias, "Q: {prompt}\nA: ", 33)
    assert torch.equal(again.score(PROMPTS, RESPONSES), model.score(PROMPTS, RESPONSES)) and not again.training


def test_a_new_head_starts_without_gain_and_bias(tmp_path):
    """Training again from a reward model: the backbone, tokenizer and template stay, head, gain and bias start anew."""
    model = ours("gpt2", tmp_path / "tokenizer")
    model.gain, model.bias, model.template = 2.0, 1.0, "Q: {prompt}"
    model.save_pretrained(tmp_path / "saved")
    fresh = RewardModel.from_pretrained(tmp_path / "saved", new_head="native", template="{prompt}: ", max_length=20)
    assert (fresh.gain, fresh.bias, fresh.template, fresh.max_length) == (1.0, 0.0, "{prompt}: ", 20)
    assert not torch.equal(fresh.head.score.weight, model.head.score.weight)
    assert torch.equal(fresh.backbone.wte.weight, model.backbone.wte.weight)
    assert RewardModel.from_pretrained(tmp_path / "saved", new_head="native").template == "Q: {prompt}"


def test_an_encoder_keeps_its_own_tokenizer(tmp_path):
    """Each family reads text in its own frame, whatever the policy's tokenizer: BERT with segments, RoBERTa with two
    separators, GPT-2 with EOS alone and the response marked."""
    frames = {}
    for family in FAMILIES:
        model = ours(family, tmp_path / family)
        ids, _, marks = model.encode(["a"], ["b"])
        frames[family] = (len(ids[0]), marks[0].int().tolist())
    assert frames == {"gpt2": (4, [0, 0, 1, 1]), "roberta": (6, [0] * 6), "bert": (5, [0, 0, 0, 1, 1])}


def test_a_language_model_is_no_reward_model(tmp_path):
    """But the start of one: with new_head it loads."""
    model = ours("gpt2", tmp_path)
    model.backbone.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no classification head.*train_reward.py") as error:
        RewardModel.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    assert torch.isfinite(RewardModel.from_pretrained(tmp_path, new_head="native").score(["a"], ["b"])).all()


def test_a_bare_encoder_is_no_reward_model(tmp_path):
    for family in ("roberta", "bert"):
        ours(family, tmp_path / family).backbone.save_pretrained(tmp_path / family)
        with pytest.raises(InputError, match="head"):
            RewardModel.from_pretrained(tmp_path / family)
        fresh = RewardModel.from_pretrained(tmp_path / family, new_head="native")
        assert torch.isfinite(fresh.score(["a"], ["b"])).all()


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    model = ours("gpt2", tmp_path / "tokenizer", vocab_size=100)
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(InputError, match="100"):
        RewardModel.from_pretrained(tmp_path / "saved")


# ------------------------------------------------------------------------------------------- ensembles, any callable

def constant(*values):
    return lambda prompts, responses, references: torch.tensor(values)


@pytest.mark.parametrize("combine, expected", [("mean", [2.0, 4.0]), ("min", [1.0, 4.0]), ("mean-std", [1.0, 4.0])])
def test_ensembles_by_hand(combine, expected):
    """Scores (1, 4) and (3, 4): means 2 and 4, biased standard deviations 1 and 0, minima 1 and 4."""
    ensemble = RewardEnsemble([constant(1.0, 4.0), constant(3.0, 4.0)], combine)
    assert ensemble(["p", "q"], ["r", "s"], [None, None]).tolist() == expected
    assert ensemble.disagreement.tolist() == [1.0, 0.0]
    assert ensemble.score(["p", "q"], ["r", "s"]).tolist() == expected


def test_mean_std_of_three():
    """Scores 0, 3, 6: mean 3, standard deviation sqrt(6)."""
    ensemble = RewardEnsemble([constant(0.0), constant(3.0), constant(6.0)], "mean-std")
    assert ensemble(["p"], ["r"]).item() == pytest.approx(3 - 6 ** 0.5)


def test_members_see_prompts_responses_and_references():
    seen = []

    def reward(*texts):
        seen.append(texts)
        return [0.0, 1.0]
    RewardEnsemble([reward, reward])(["p", "q"], ["r", "s"], ["t", None])
    assert seen == [(["p", "q"], ["r", "s"], ["t", None])] * 2


def test_ensembles_refuse_what_they_cannot_do():
    with pytest.raises(ValueError, match="'median'.*mean-std"):
        RewardEnsemble([constant(1.0)], "median")
    with pytest.raises(ValueError, match="at least one"):
        RewardEnsemble([])


@pytest.mark.parametrize("returned", [[1, 2], (1.0, 2.0), torch.tensor([1, 2]), torch.tensor([[1.0], [2.0]]),
                                      torch.tensor([1.0, 2.0], dtype=torch.float64), np.array([2.0, 1.0])[::-1], [np.float64(1), torch.tensor(2)]], ids=str)
def test_call_reward_takes_lists_and_tensors(returned):
    scores = call_reward(lambda *texts: returned, ["p", "q"], ["r", "s"])
    assert scores.tolist() == [1.0, 2.0] and scores.dtype == torch.float32


@pytest.mark.parametrize("returned", [[10 ** 400, 1], np.array([1j, 2]), torch.tensor([1j, 2]), [1j, 2], ["a", "b"], [[1], [2, 3]], None], ids=str)
def test_what_is_no_number_is_an_input_error(returned):
    with pytest.raises(InputError, match="it must return one number a response"):
        call_reward(lambda *texts: returned, ["p", "q"], ["r", "s"])


def test_a_reward_may_change_its_lists():
    """Sorted or stripped in place, they must not become what is scored next, and logged."""
    def sort(prompts, responses, references):
        responses.sort()
        prompts.clear()
        references.clear()
        return [1.0, 2.0]
    prompts, responses, references = ["p", "q"], ["s", "r"], ["t", None]
    call_reward(sort, prompts, responses, references)
    assert (prompts, responses, references) == (["p", "q"], ["s", "r"], ["t", None])


def test_a_model_that_gives_nan_is_not_left_out_of_a_sum(tmp_path):
    """A function says NaN where it cannot score a row; a model that does is broken, and training would go on without its rows."""
    model = ours("gpt2", tmp_path)
    nn.init.constant_(model.head.score.weight, math.nan)
    with pytest.raises(RunFailed, match="the reward term runs/reward is not finite"):
        Combination([Term("syntax", 1.0, constant(1.0, 1.0)), Term("runs/reward", 1.0, model)])(["p", "q"], ["r", "s"])


def test_a_model_that_gives_nan_is_not_left_out_in_an_ensemble():
    """Neither alone nor beside a sum, whose NaN leaves a row out."""
    bad = RewardEnsemble([lambda *texts: [math.nan, 1.0], lambda *texts: [1.0, 1.0]])
    with pytest.raises(RunFailed, match="member 1 of the reward ensemble"):
        bad(["p", "q"], ["r", "s"])
    kept = type("Sum", (), {"leaves_out": True, "__call__": lambda self, *texts: [math.nan, 1.0]})()
    with pytest.raises(RunFailed, match="member 2 of the reward ensemble"):
        RewardEnsemble([kept, lambda *texts: [math.nan, 1.0]])(["p", "q"], ["r", "s"])
    found = RewardEnsemble([kept, lambda *texts: [1.0, 1.0]])
    assert found.leaves_out and found(["p", "q"], ["r", "s"]).isnan().tolist() == [True, False]


def test_call_reward_fills_in_references():
    call_reward(lambda p, r, references: [float(references == [None, None])] * 2, ["p", "q"], ["r", "s"])
    assert call_reward(lambda p, r, references: [float(len(references))], ["p"], ["r"], ["t"]).tolist() == [1.0]


@pytest.mark.parametrize("returned", [[], [1.0], [1.0, 2.0, 3.0], 1.0], ids=str)
def test_the_wrong_number_of_scores_is_an_input_error(returned):
    with pytest.raises(InputError, match="scores for 2 responses"):
        call_reward(lambda *texts: returned, ["p", "q"], ["r", "s"])


# --------------------------------------------------------------------------------------------------------- load_reward

@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """A user's reward in the working directory, under a name no other test imports."""
    (tmp_path / "my_reward_zq.py").write_text("weight = 3\ndef length(prompts, responses, references):\n"
                                              "    return [float(len(r)) for r in responses]\n")
    (tmp_path / "broken_zq.py").write_text("import surely_not_installed_zq\n")
    monkeypatch.chdir(tmp_path)
    yield "my_reward_zq"
    for name in ("my_reward_zq", "broken_zq"):
        sys.modules.pop(name, None)


def test_module_and_function(user_module):
    path = list(sys.path)
    reward = load_reward([f"{user_module}:length"])
    assert reward(["p"], ["four"], [None]) == [4.0] and sys.path == path


def test_a_module_may_add_to_the_path(user_module, tmp_path):
    """Its own folder used to be taken from the path in place of ours: what it imports from there at its first score was not found."""
    (tmp_path / "lib_zq").mkdir()
    (tmp_path / "lib_zq" / "late_zq.py").write_text("score = 7.0\n")
    (tmp_path / "adds_zq.py").write_text("import sys\nsys.path.insert(0, 'lib_zq')\n"
                                         "def f(prompts, responses, references):\n    from late_zq import score\n    return [score]\n")
    path = list(sys.path)
    reward = load_reward(["adds_zq:f"])
    try:
        assert sys.path == ["lib_zq", *path] and reward(["p"], ["r"], [None]) == [7.0]
    finally:
        sys.path[:] = path


def test_a_folder_and_a_function_make_an_ensemble(user_module, tmp_path):
    model = ours("gpt2", tmp_path / "tokenizer")
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(load_reward([str(tmp_path / "saved")]).score(["p"], ["four"]), model.score(["p"], ["four"]))
    both = load_reward([str(tmp_path / "saved"), f"{user_module}:length"], "min")
    assert load_reward([str(tmp_path / "saved")], device="meta").device.type == "meta"
    assert isinstance(both, RewardEnsemble) and both.combine == "min" and len(both.rewards) == 2
    assert both(["p"], ["four"]).item() == pytest.approx(min(model.score(["p"], ["four"]).item(), 4.0))


@pytest.mark.parametrize("spec, words", [
    ("no_such_module_zq:f", ["no_such_module_zq", "Python path"]), ("my_reward_zq:width", ["my_reward_zq", "width"]),
    ("my_reward_zq:weight", ["weight"]), ("my_reward_zq:", ["my_reward_zq"]),
    ("broken_zq:f", ["surely_not_installed_zq"]),
    (":length", [":length"]), (".my_reward_zq:length", [".my_reward_zq"]), ("./no/such/folder", ["no/such/folder"]),
], ids=str)
def test_what_cannot_be_loaded_is_one_line(user_module, spec, words):
    path = list(sys.path)
    with pytest.raises(InputError) as error:
        load_reward([spec])
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
    assert sys.path == path


# ------------------------------------------------------------------------------------------- other heads, people's logits

def fresh(family, folder, kind="native", dim=0, **options):
    """A model with a new head on a saved bare model of ours, every parameter random."""
    ours(family, folder / "tokenizer").save_pretrained(folder)
    return shake(RewardModel.from_pretrained(folder, kind, human_feedback_dim=dim, **options)).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mlp_by_hand(family, tmp_path):
    """With weights 0 and biases 1, 2 and 3 in the three layers: relu(1) = 1, relu(0 * 1 + 2) = 2, and 0 * 2 + 3 = 3. With the last
    layer all ones, its input of 2s adds 16 * 2: 35."""
    model = fresh(family, tmp_path, "mlp")
    layers = [layer for layer in model.head.reward_head if isinstance(layer, nn.Linear)]
    assert [type(layer).__name__ for layer in model.head.reward_head] == ["Linear", "ReLU", "Dropout"] * 2 + ["Linear"]
    assert [model.head.reward_head[i].p for i in (2, 5)] == [0.1, 0.1]
    with torch.no_grad():
        for value, layer in enumerate(layers, start=1):
            layer.weight.zero_()
            layer.bias.fill_(value)
        assert model.score(["p"], ["r"]).item() == 3
        layers[-1].weight.fill_(1)
        assert model.score(["p"], ["r"]).item() == 35
        layers[1].bias.fill_(-2)
        assert model.score(["p"], ["r"]).item() == 3, "ReLU"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_linear_head_reads_the_pooled_state(family, tmp_path):
    """The score is w . h + b at the last token (GPT-2) or the first (encoders), whatever the padding beside it."""
    model = fresh(family, tmp_path, "linear")
    ids, mask, segments = model.encode(PROMPTS, RESPONSES)
    with torch.no_grad():
        gpt2 = family == "gpt2"
        hidden = model.backbone.hidden(ids, mask) if gpt2 else model.backbone(ids, mask, segments)
        layer, = model.head.reward_head
        for row in range(len(PROMPTS)):
            column = mask[row].sum().item() - 1 if gpt2 else 0
            expected = hidden[row, column] @ layer.weight[0] + layer.bias[0]
            assert model(ids, mask, segments)[row].item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("kind", ["native", "linear", "mlp"])
@pytest.mark.parametrize("family", FAMILIES)
def test_heads_and_feedback_survive_saving(family, kind, tmp_path):
    model = fresh(family, tmp_path / "a", kind, dim=5, human_feedback_weight=0.7)
    model.gain, model.bias = 2.0, -1.0
    model.save_pretrained(tmp_path / "b")
    again = RewardModel.from_pretrained(tmp_path / "b")
    vectors = [None, *[[float(i + j) for j in range(5)] for i in range(len(PROMPTS) - 1)]]
    assert torch.equal(again.score(PROMPTS, RESPONSES, feedback=vectors), model.score(PROMPTS, RESPONSES, feedback=vectors))
    assert torch.equal(again.score(PROMPTS, RESPONSES), model.score(PROMPTS, RESPONSES))
    assert not torch.equal(again.score(PROMPTS, RESPONSES), model.score(PROMPTS, RESPONSES, feedback=vectors))
    assert (again.human_feedback_dim, again.human_feedback_weight) == (5, 0.7)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_transformers_loads_the_backbone_of_a_model_with_our_head(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = fresh("gpt2", tmp_path / "a", kind, dim=3)
    model.save_pretrained(tmp_path / "b")
    their = transformers.AutoModel.from_pretrained(tmp_path / "b").eval()
    assert json.loads((tmp_path / "b" / "config.json").read_text())["architectures"] == ["GPT2Model"], "no classifier of theirs"
    ids, mask, _ = model.encode(PROMPTS[:1], RESPONSES[:1])
    with torch.no_grad():
        torch.testing.assert_close(their(ids, attention_mask=mask).last_hidden_state, model.backbone.hidden(ids, mask), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_feedback_by_hand(family, tmp_path):
    """A linear head w on pooled + weight * P f gives the score without f, plus weight * w . (P f). f = 0 and None are the same."""
    model = fresh(family, tmp_path, "linear", dim=3, human_feedback_weight=0.7)
    f = torch.tensor([1.0, -2.0, 0.5])
    with torch.no_grad():
        shift = 0.7 * model.head.reward_head[0].weight[0] @ (model.human_feedback.weight @ f)
    plain = model.score(PROMPTS, RESPONSES)
    informed = model.score(PROMPTS, RESPONSES, feedback=[f.tolist()] * len(PROMPTS))
    torch.testing.assert_close(informed - plain, shift.expand(len(PROMPTS)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.score(PROMPTS, RESPONSES, feedback=[[0.0] * 3] * len(PROMPTS)), plain)
    vectors = [[float(i), 1.0, -float(i)] for i in range(len(PROMPTS))]  # whatever order rows are scored in, each keeps its own
    alone = [model.score([p], [r], feedback=[v]).item() for p, r, v in zip(PROMPTS, RESPONSES, vectors)]
    assert model.score(PROMPTS, RESPONSES, feedback=vectors).tolist() == pytest.approx(alone, abs=1e-5)


def test_feedback_that_does_not_fit_is_one_line(tmp_path):
    model = fresh("gpt2", tmp_path / "a", dim=3)
    with pytest.raises(InputError, match="has 2 numbers, this reward model takes 3"):
        model.score(["p"], ["r"], feedback=[[1.0, 2.0]])
    with pytest.raises(InputError, match="trained without any"):
        fresh("gpt2", tmp_path / "b").score(["p"], ["r"], feedback=[[1.0, 2.0]])


@pytest.mark.parametrize("name, value", [
    ("gain", "2"), ("gain", True), ("bias", None), ("bias", 1e300), ("template", "Q:"), ("template", 3), ("max_length", 0), ("max_length", 8.0),
    ("head", "deep"), ("human_feedback_dim", -1), ("human_feedback_dim", 1 << 40), ("human_feedback_weight", "0.3")])
def test_settings_that_cannot_be_are_one_line(tmp_path, name, value):
    """Not a traceback at the first score, or scores of a model that was never trained so."""
    ours("gpt2", tmp_path / "tokenizer").save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "reward_model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(InputError, match=f"reward_model.json: {name} is .*, which it cannot be") as error:
        RewardModel.from_pretrained(tmp_path / "saved")
    assert "\n" not in str(error.value)


def test_a_head_that_is_gone_is_one_line(tmp_path):
    ours("gpt2", tmp_path / "tokenizer").save_pretrained(tmp_path / "saved")
    settings = json.loads((tmp_path / "saved" / "reward_model.json").read_text())
    (tmp_path / "saved" / "reward_model.json").write_text(json.dumps(settings | {"head": "mlp"}))
    with pytest.raises(InputError, match="no tensors reward_head"):
        RewardModel.from_pretrained(tmp_path / "saved")
