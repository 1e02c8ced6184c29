"""What callers from outside rely on: public names, the order and the names of their arguments, and the defaults.

A renamed argument or a changed default breaks a caller who names it, and no other test. An argument more, after these, is fine.
"""
import importlib
import inspect

import pytest
import torch

from nanorlhf.encoder import Encoder, EncoderConfig
from nanorlhf.gpt2 import GPT2, GPT2Config, PolicyWithValue

CONTRACT = {
    "nanorlhf.masked": ["masked_mean(x, mask, dim=None)", "masked_var(x, mask, unbiased=False)",
                        "whiten(x, mask, center=True, unbiased=False, eps=1e-08)"],
    "nanorlhf.logprobs": ["token_logprobs(logits, targets, temperature=1.0)", "kl_estimate(logprobs, ref_logprobs, estimator='k1')",
                          "exact_kl(logits, ref_logits, temperature=1.0)"],
    "nanorlhf.advantages": [
        "shape_rewards(scores, kl, response_mask, kl_coef)",
        "gae(rewards, values, response_mask, gamma=1.0, lam=0.95, last_values=None)",
        "FixedKLController(kl_coef)", "AdaptiveKLController(kl_coef, target, horizon)",
        "FixedKLController.update(self, kl, n_steps)", "AdaptiveKLController.update(self, kl, n_steps)"],
    "nanorlhf.losses": [
        "ppo_policy_loss(new_logprobs, logprobs, advantages, response_mask, cliprange=0.2, dual_clip=None)",
        "ppo_value_loss(new_values, values, returns, response_mask, cliprange_value=0.2)",
        "bradley_terry_loss(chosen_scores, rejected_scores, margin=None, center_coef=0.0)",
        "rating_loss(scores, ratings)", "sft_loss(logits, labels, ignore_index=-100)",
        "dpo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=0.1, "
        "loss_type='sigmoid', label_smoothing=0.0, reference_free=False)"],
    "kernels": [
        "token_logprobs(logits, targets, temperature=1.0)", "exact_kl(logits, ref_logits, temperature=1.0)",
        "gae(rewards, values, response_mask, gamma=1.0, lam=0.95, last_values=None)",
        "linear_token_logprobs(hidden, weight, targets, temperature=1.0)",
        "fused_ppo_loss(logits, targets, logprobs, advantages, mask, temperature=1.0, cliprange=0.2, dual_clip=None, ref_logprobs=None, "
        "kl_coef=0.0, kl_estimator='k3', entropy_coef=0.0, inplace=False)",
        "fused_dpo_loss(chosen_logits, rejected_logits, chosen_targets, rejected_targets, chosen_mask, rejected_mask, ref_chosen_logps, "
        "ref_rejected_logps, beta=0.1, loss_type='sigmoid', label_smoothing=0.0)"],
    "nanorlhf.gpt2": ["GPT2.from_pretrained(folder_or_name)", "GPT2.from_config(config)", "GPT2.save_pretrained(self, folder)",
                      "GPT2.forward(self, input_ids, attention_mask=None, cache=None)"],
    "nanorlhf.encoder": ["Encoder.from_pretrained(folder_or_name)", "Encoder.forward(self, input_ids, attention_mask=None)"],
    "nanorlhf.reward": ["RewardModel.from_pretrained(folder_or_name)", "RewardModel.save_pretrained(self, folder)",
                        "RewardModel.score(self, prompts, responses)", "RewardEnsemble(rewards, combine='mean')",
                        "RewardEnsemble.__call__(self, prompts, responses, references=None)"],
    "nanorlhf.tokenizer": ["Tokenizer.from_pretrained(folder_or_name)", "Tokenizer.train(texts, vocab_size)",
                           "Tokenizer.encode(self, text)", "Tokenizer.decode(self, ids)", "Tokenizer.batch(self, texts, side='left')"],
    "nanorlhf.rollout": ["generate(model, queries, query_mask, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, eos_id=None, "
                         "generator=None)"],
    "nanorlhf.sandbox": [
        "Sandbox(timeout=1.0, memory_mb=256, workers=2, mode='auto')", "Sandbox.check(self, code, tests, entry_point=None)",
        "Sandbox.evaluate(self, code, setup='', expression=None)", "Sandbox.check_many(self, jobs)",
        "Outcome(passed, status, seconds, detail='', value=None)"],
    "nanorlhf.metrics": [
        "sentence_bleu(references_tokens, hypothesis_tokens, weights=(0.25, 0.25, 0.25, 0.25), smoothing='method0')",
        "corpus_bleu(list_of_references_tokens, hypotheses_tokens, weights=(0.25, 0.25, 0.25, 0.25), smoothing='method0')",
        "conala_bleu(predictions, references)", "sacrebleu(predictions, references)", "chrf(predictions, references)",
        "rouge(prediction, reference, kinds=('rouge1', 'rouge2', 'rougeL', 'rougeLsum'), stem=False)",
        "codebleu(predictions, references, weights=(0.25, 0.25, 0.25, 0.25))", "token_f1(prediction, reference)",
        "ruby(prediction, reference)", "ruby_quality(code, executes=None)",
        "bert_score(predictions, references, encoder, tokenizer, layer=None, idf=False, baseline=None)",
        "exact_match(prediction, reference)", "pass_at_k(n, c, k)", "evaluate(predictions, references)"],
}


@pytest.mark.parametrize("module, line", [(module, line) for module, lines in CONTRACT.items() for line in lines])
def test_signatures(module, line):
    if module == "kernels":
        pytest.importorskip("triton")
    name, _, arguments = line.partition("(")
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    shown = [str(parameter.replace(annotation=inspect.Parameter.empty)) for parameter in inspect.signature(found).parameters.values()]
    wanted = inspect.signature(eval(f"lambda {arguments[:-1]}: 0"))
    assert shown[:len(wanted.parameters)] == [str(parameter) for parameter in wanted.parameters.values()]


@pytest.mark.parametrize("kind", [GPT2, PolicyWithValue, Encoder])
def test_folders_are_named_alike(kind, tmp_path):
    """GPT-2 and the encoder used to call it name_or_folder, the tokenizer and the reward model folder_or_name."""
    if kind is Encoder:
        model = Encoder.from_config(EncoderConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                                                  intermediate_size=8, max_position_embeddings=12))
    else:
        model = GPT2.from_config(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    model.save_pretrained(folder=tmp_path)
    again = kind.from_pretrained(folder_or_name=tmp_path)
    again = again.policy if kind is PolicyWithValue else again
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
