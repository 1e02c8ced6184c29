"""The wiring of the scripts: that each number reaches the place that it is for.

The functions have tests of their own; here runs of a few steps, of one layer on a few rows, are held against what can be told
from outside: weights on disk, logged numbers, and losses written out row by row without padding.
"""
import copy
import importlib
import json
import math
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from nanorlhf import evaluation
from nanorlhf.config import parse
from nanorlhf.data import Record, Splits
from nanorlhf.errors import InputError
from nanorlhf.evaluation import add_rewards, answer, known, open_sandbox, report, sample_answers, split_results, summary, table
from nanorlhf.gpt2 import GPT2, GPT2Config, PolicyWithValue
from nanorlhf.ops import TORCH, choose
from nanorlhf.reward import RewardModel
from nanorlhf.rollout import roll_out
from nanorlhf.run import RunFailed, adamw, main
from nanorlhf.sandbox import Outcome
from nanorlhf.terms import Combination, Term
from nanorlhf.tokenizer import Tokenizer

train_sft, train_reward, train_ppo, train_dpo = (
    importlib.import_module(name) for name in ("train_sft", "train_reward", "train_ppo", "train_dpo"))

TEXT = ["--max-query", "20", "--max-response", "8", "--device", "cpu"]


def settings(module, *words):
    return parse(module.Config, module.PRESETS, list(words), exit_on_error=False)


def launch(module, *words):
    """A script's `parse` and `main` in this process, without the drawing, which takes longer than all the rest."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("plot_sft", "plot_reward", "plot_dpo", "plot_ppo", "plot_overoptimisation"):
            patch.setattr(module, name, lambda *what: None, raising=False)
        main(module.train, settings(module, *map(str, words), *TEXT))


def log(folder, having):
    """The lines of a run's log that have this number."""
    return [row for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if having in row]


def column(folder, name):
    return [row[name] for row in log(folder, name)]


def results(folder):
    return json.loads((folder / "results.json").read_text())


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def shaken(model, scale, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def logps(model, query, response, temperature=1.0):
    """log pi of every token (R, V) where a response is to be predicted: one row, no padding."""
    return (model(torch.tensor([query + response]))[0, len(query) - 1:-1] / temperature).log_softmax(-1)


def write_data(folder, train, validation, test):
    folder.mkdir(parents=True)
    for name, rows in (("train", train), ("validation", validation), ("test", test)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def pair(n, good, bad):
    return {"id": str(n), "prompt": f"add {n} to xs", "chosen": f"xs {good} {n}", "rejected": f"xs {bad} {n}"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A policy of random weights that ends its answers early and late, and data: rows, one row, pairs, and pairs of which those
    for validation are the wrong way round, so that every step of training makes validation worse."""
    home = tmp_path_factory.mktemp("wiring")
    rows = [{"id": str(n), "prompt": f"add {n} to xs", "reference": f"xs + {n}"} for n in range(26)]
    write_data(home / "rows", rows[:16], rows[16:24], rows[24:])
    write_data(home / "one", rows[:1], rows[16:18], rows[24:])
    pairs = [pair(n, "+", "-") for n in range(26)]
    write_data(home / "pairs", pairs[:16], pairs[16:24], pairs[24:])
    write_data(home / "opposed", pairs[:16], [pair(n, "-", "+") for n in range(16, 24)], pairs[24:])
    tokenizer = Tokenizer.train([text for n in range(26) for text in (f"add {n} to xs\n", f"xs + {n}", f"xs - {n}")], 290)
    torch.manual_seed(0)
    policy = shaken(GPT2.from_config(GPT2Config(
        vocab_size=tokenizer.vocab_size, n_positions=28, n_embd=16, n_layer=1, n_head=2, bos_token_id=tokenizer.eos_id,
        eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id)), 0.2)
    with torch.no_grad():
        policy.ln_f.bias += 6 * nn.functional.normalize(policy.wte.weight[tokenizer.eos_id], dim=0)
    policy.save_pretrained(home / "policy")
    tokenizer.save_pretrained(home / "policy")
    return home


@pytest.fixture(scope="module")
def policy(home):
    return GPT2.from_pretrained(home / "policy")


@pytest.fixture(scope="module")
def tokenizer(home):
    return Tokenizer.from_pretrained(home / "policy")


@pytest.fixture(scope="module")
def records(home):
    """Those of the validation rows."""
    return [Record(**json.loads(line)) for line in (home / "rows" / "validation.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------- the best, the rates

SCHEDULE = ["--lr", "1e-2", "--warmup", "0.25", "--save-steps", "1", "--keep-checkpoints", "99"]


@pytest.fixture(scope="module")
def sft_opposed(home):
    """SFT on one answer, validated on one that shares no token with it: 4 epochs of 2 steps."""
    rows = [{"prompt": f"add {n} to xs", "reference": "xs + 1" if n < 16 else "%" * 8} for n in range(24)]
    write_data(home / "other", rows[:16], rows[16:22], rows[22:])
    launch(train_sft, "--data", home / "other", "--out", home / "opposed-runs" / "sft", "--model", home / "policy", "--epochs", "4",
           "--batch-size", "8", "--patience", "99", "--eval-rows", "1", "--label-smoothing", "0", *SCHEDULE)
    return home / "opposed-runs" / "sft"


@pytest.fixture(scope="module")
def reward_opposed(home):
    launch(train_reward, "--data", home / "opposed", "--out", home / "opposed-reward" / "run", "--model", home / "policy", "--epochs", "4",
           "--batch-size", "8", "--patience", "99", *SCHEDULE)
    return home / "opposed-reward" / "run"


@pytest.fixture(scope="module")
def dpo_opposed(home):
    launch(train_dpo, "--data", home / "opposed", "--out", home / "opposed-runs" / "dpo", "--policy", home / "policy", "--epochs", "4",
           "--batch-size", "8", "--eval-every", "2", *SCHEDULE)
    return home / "opposed-runs" / "dpo"


@pytest.mark.parametrize("run", ["sft_opposed", "reward_opposed", "dpo_opposed"])
def test_final_is_the_best_and_not_the_last(run, home, request):
    """final/ would hold the last weights, or the worst, where training makes validation worse."""
    folder = request.getfixturevalue(run)
    evaluations = {row["step"]: row["eval/loss"] for row in log(folder, "eval/loss")}
    best = min(evaluations, key=evaluations.get)
    assert best < 8 == max(evaluations) and evaluations[8] > evaluations[best] + 0.01, "the test wants a run that gets worse"
    assert results(folder)["best_step"] == best
    final = weights(folder / "final")
    assert same(final, weights(folder / "checkpoints" / f"step-{best}" if best else home / "policy"))
    assert not same(final, weights(folder / "checkpoints" / "step-8"))
    found = results(folder)
    assert (found["validation_loss"] if run == "sft_opposed" else found["validation"]["eval/loss"]) == pytest.approx(evaluations[best])


@pytest.mark.parametrize("run", ["sft_opposed", "reward_opposed", "dpo_opposed"])
def test_the_learning_rate_warms_up_and_falls(run, request):
    """A rate that stays where it is: of 8 steps the first 2 warm up to 0.01, which then falls to 0 one step after the last."""
    assert column(request.getfixturevalue(run), "lr") == pytest.approx([0.01 * share for share in (
        1 / 3, 2 / 3, 6 / 6, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6)])


@pytest.mark.parametrize("run", ["sft_opposed", "reward_opposed", "dpo_opposed"])
def test_the_optimiser_moves_at_the_logged_rate(run, home, request):
    """A rate that is logged and never set: Adam's first step moves every weight that has a gradient by the rate, here 0.01 / 3."""
    before, after = weights(home / "policy"), weights(request.getfixturevalue(run) / "checkpoints" / "step-1")
    assert max((after[name] - before[name]).abs().max().item() for name in before if name in after) == pytest.approx(0.01 / 3, rel=0.03)


# --------------------------------------------------------------------------------------------------------- inside DPO

@pytest.fixture(scope="module")
def dpo(home):
    """20 steps on 16 pairs."""
    launch(train_dpo, "--data", home / "pairs", "--out", home / "runs" / "dpo", "--policy", home / "policy", "--epochs", "10",
           "--batch-size", "8", "--eval-every", "5", "--lr", "3e-3", "--save-steps", "0")
    return home / "runs" / "dpo"


def test_dpo_encodes_query_chosen_rejected_in_this_order(tokenizer):
    """Chosen and rejected swapped: the policy would learn what people do not want."""
    encoded = train_dpo.encode(tokenizer, [Record("add 1 to xs", chosen="xs + 1", rejected="xs - 1")], settings(train_dpo))
    assert [[tokenizer.decode(ids) for ids in row] for row in encoded] == [["add 1 to xs\n", "xs + 1", "xs - 1"]]
    assert all(ids[-1] == tokenizer.eos_id for row in encoded for ids in row[1:])


def test_dpo_prefers_the_chosen(dpo, home, policy, tokenizer):
    """The policy would move from what people chose: log pi(chosen) - log pi(rejected) must grow, on pairs not trained on too."""
    tuned = GPT2.from_pretrained(dpo / "final")
    gains = []
    for name in ("train", "validation"):
        for row in map(json.loads, (home / "pairs" / f"{name}.jsonl").read_text().splitlines()):
            query = tokenizer.encode(row["prompt"] + "\n")
            good, bad = (tokenizer.encode(row[kind]) + [tokenizer.eos_id] for kind in ("chosen", "rejected"))
            ratios = [sum(sign * logps(model, query, ids)[range(len(ids)), ids].sum().item() for sign, ids in ((1, good), (-1, bad)))
                      for model in (policy, tuned)]
            gains.append(ratios[1] - ratios[0])
    assert min(gains) > 0.5, gains
    assert results(dpo)["best_step"] == 20 and column(dpo, "eval/accuracy")[-1] == 1, "and so the best is the last"


@pytest.mark.parametrize("words", [
    ["--beta", "0.3", "--label-smoothing", "0.2"], ["--beta", "0.3", "--reference-free"], ["--loss-type", "ipo", "--beta", "0.2"],
    ["--loss-type", "robust", "--beta", "0.3", "--label-smoothing", "0.2"], ["--loss-type", "hinge", "--beta", "0.3"]],
    ids=["smoothing", "reference-free", "ipo", "robust", "hinge"])
def test_dpo_loss_by_hand(words, policy, tokenizer):
    """An option that does not reach the loss, or a margin of the wrong sign. Policy minus reference is `moved`, so h is 2, -3, 1.5, .5."""
    config = settings(train_dpo, *words)
    pairs = train_dpo.encode(tokenizer, [Record(f"add {n} to xs", chosen=f"xs + {n}", rejected=f"xs - {n} - {n}") for n in range(4)], config)
    moved = torch.tensor([[2.0, 0.0], [-2.0, 1.0], [0.5, -1.0], [0.3, -0.2]])
    whole = torch.tensor([[(logps(policy, query, ids)[range(len(ids)), ids]).sum().item() / (len(ids) if "ipo" in words else 1)
                           for ids in (good, bad)] for query, good, bad in pairs])
    losses, stats = train_dpo.batch_loss(policy, tokenizer, pairs, whole - moved, config)
    above = (whole if "--reference-free" in words else moved).tolist()  # log pi - log ref
    h, e, beta = [good - bad for good, bad in above], config.label_smoothing, config.beta
    right, wrong = ([math.log1p(math.exp(sign * beta * x)) for x in h] for sign in (-1, 1))  # -log sigmoid(+-beta h)
    expected = {"sigmoid": [(1 - e) * a + e * b for a, b in zip(right, wrong)],
                "robust": [((1 - e) * a - e * b) / (1 - 2 * e) for a, b in zip(right, wrong)],
                "ipo": [(x - 1 / (2 * beta)) ** 2 for x in h], "hinge": [max(0, 1 - beta * x) for x in h]}[config.loss_type]
    assert losses.tolist() == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert stats["loss"] == pytest.approx(sum(expected) / 4, rel=1e-3)
    assert stats["rewards/chosen"] == pytest.approx(beta * sum(good for good, _ in above) / 4, rel=1e-3)
    assert stats["rewards/rejected"] == pytest.approx(beta * sum(bad for _, bad in above) / 4, rel=1e-3)
    assert stats["rewards/margin"] == pytest.approx(beta * sum(h) / 4, rel=1e-3) and abs(sum(h)) > 0.1
    assert stats["rewards/accuracy"] == sum(x > 0 for x in h) / 4 != 0.5
    assert stats["logps/chosen"] == pytest.approx(whole[:, 0].mean().item(), rel=1e-4)
    assert stats["logps/rejected"] == pytest.approx(whole[:, 1].mean().item(), rel=1e-4)


# ------------------------------------------------------------------------------------------------ inside the reward model

@pytest.fixture(scope="module")
def reward(home):
    """A reward model of pairs that one character tells apart, normalised on the policy's samples."""
    launch(train_reward, "--data", home / "pairs", "--out", home / "runs" / "reward", "--policy", home / "policy", "--epochs", "8",
           "--batch-size", "8", "--patience", "99", "--lr", "1e-2", "--temperature", "0.7", "--seed", "3")
    return home / "runs" / "reward"


def test_the_reward_model_prefers_the_chosen(reward, home):
    """Chosen and rejected swapped: PPO would be paid for what people do not want."""
    model = RewardModel.from_pretrained(reward / "final")
    for name in ("train", "validation", "test"):
        rows = [json.loads(line) for line in (home / "pairs" / f"{name}.jsonl").read_text().splitlines()]
        chosen, rejected = (model.score([row["prompt"] for row in rows], [row[kind] for row in rows]) for kind in ("chosen", "rejected"))
        assert (chosen > rejected).all(), name


def test_scores_of_the_policys_samples_are_normalised(reward, records, policy, tokenizer):
    """Scores of another level and scale than the KL coefficient expects: the samples drawn here again have mean 0 and variance 1."""
    model = RewardModel.from_pretrained(reward / "final")
    rows = answer(policy, tokenizer, records, settings(train_reward, *TEXT), 0.7, seed=3)
    scores = model.score([row["prompt"] for row in rows], [row["response"] for row in rows])
    assert scores.mean().item() == pytest.approx(0, abs=1e-4) and scores.std(unbiased=False).item() == pytest.approx(1, abs=1e-4)
    assert abs(results(reward)["gain"] - 1) > 0.01, "the test wants raw scores of another scale"


def test_ratings_are_standardised_over_the_training_rows():
    """Raw ratings, or validation rows on a yardstick of their own. Of 1, 3, 5 the mean is 3 and the variance 8 / 3."""
    rows = [[Record(f"p{rating}", response="r", rating=rating) for rating in ratings] for ratings in ([1, 3, 5], [3, 7])]
    train, held_out = train_reward.rated(Splits(*rows, []), settings(train_reward))
    assert [row["rating"] for row in train] == pytest.approx([-1.2247449, 0, 1.2247449])
    assert [row["rating"] for row in held_out] == pytest.approx([0, 2.4494897])


@pytest.mark.parametrize("coefficient", [0, 0.01, 1])
def test_the_centring_term_by_hand(coefficient, home):
    """Scores whose level drifts: c times the mean of (s_chosen + s_rejected)^2 is part of the loss."""
    torch.manual_seed(0)
    model = RewardModel.from_pretrained(home / "policy", "native")
    rows = [{"prompt": "add 1 to xs", "chosen": "xs + 1", "rejected": "xs"}, {"prompt": "p", "chosen": "a", "rejected": "xs - 1"}]
    scores = [model.score([row["prompt"] for row in rows], [row[kind] for row in rows]).tolist() for kind in ("chosen", "rejected")]
    loss, _ = train_reward.batch_loss(model, rows, settings(train_reward, "--center-coef", str(coefficient)))
    centring = sum((a + b) ** 2 for a, b in zip(*scores)) / 2
    assert loss.item() == pytest.approx(sum(math.log1p(math.exp(b - a)) for a, b in zip(*scores)) / 2 + coefficient * centring, rel=1e-4)
    assert centring > 0.01, "the test wants scores with a level"


# ------------------------------------------------------------------------------------------------------------- dropout

@pytest.mark.parametrize("module, words", [(train_sft, ["--label-smoothing", "0"]), (train_reward, [])], ids=["sft", "reward"])
def test_dropout_is_on_in_training_and_off_in_validation(module, words, home, tokenizer, tmp_path):
    """Training without dropout, or validation with it. One batch an epoch of all rows at a rate of nearly 0: only dropout moves the
    loss, from epoch to epoch in training, and never in validation."""
    model = GPT2.from_pretrained(home / "policy")
    config = {**vars(model.config), "embd_pdrop": 0.3, "attn_pdrop": 0.3, "resid_pdrop": 0.3}
    wet = GPT2.from_config(GPT2Config(**config))
    wet.load_state_dict(model.state_dict())
    wet.save_pretrained(tmp_path / "wet")
    tokenizer.save_pretrained(tmp_path / "wet")
    launch(module, "--data", home / "pairs", "--model", tmp_path / "wet", "--out", tmp_path / "run", "--epochs", "3", "--batch-size", "16",
           "--lr", "1e-12", "--patience", "99", *words)
    first, second, third = column(tmp_path / "run", "loss")
    assert min(abs(first - second), abs(second - third), abs(first - third)) > 1e-4
    assert column(tmp_path / "run", "eval/loss") == pytest.approx([column(tmp_path / "run", "eval/loss")[0]] * 3, abs=1e-6)


def test_validation_of_a_reward_model_is_without_dropout(home):
    """Whatever mode it is called in: the same numbers every time."""
    torch.manual_seed(0)
    model = RewardModel.from_pretrained(home / "policy", "mlp")
    rows = [{"id": "1", "prompt": "p", "chosen": "xs + 1", "rejected": "xs", "source": "data"}]
    found = [train_reward.validate(model.train(mode), rows, settings(train_reward)) for mode in (False, True, True)]
    assert found[0] == found[1] == found[2]


# --------------------------------------------------------------------------------------------------------- inside PPO

PPO = ["--reward", "length", "--batch-size", "8", "--minibatch-size", "8", "--micro-batch-size", "8"]


@pytest.fixture(scope="module")
def ppo(home):
    """3 steps at a high rate, paid for length, sampled at 0.7."""
    launch(train_ppo, "--data", home / "rows", "--out", home / "runs" / "ppo", "--policy", home / "policy", *PPO, "--steps", "3",
           "--lr", "1e-2", "--temperature", "0.7", "--seed", "3", "--eval-every", "3", "--eval-rows", "5", "--save-steps", "1",
           "--keep-checkpoints", "3")
    return home / "runs" / "ppo"


def test_the_kl_of_the_rollout_is_to_the_reference(ppo):
    """KL of the policy to itself: it would be 0 for ever, and nothing would hold the policy back."""
    first, *later = column(ppo, "objective/kl_k3")
    assert first == pytest.approx(0, abs=1e-6) and min(later) > 1e-3


def test_validation_answers_are_sampled_and_their_kl_is_to_the_reference(ppo, home, policy, tokenizer, records):
    """Greedy answers, or a KL to the policy itself: the answers of the last step can be drawn again from its weights."""
    trained = GPT2.from_pretrained(ppo / "checkpoints" / "step-3")
    rows = answer(trained, tokenizer, records[:5], settings(train_ppo, *TEXT), 0.7, policy, seed=3)
    logged = [row for row in map(json.loads, (ppo / "samples.jsonl").read_text().splitlines()) if row["step"] == 3]
    assert [row["response"] for row in logged] == [row["response"] for row in rows]
    assert [row["kl"] for row in logged] == pytest.approx([row["kl"] for row in rows], abs=1e-4)
    assert column(ppo, "eval/kl")[-1] == pytest.approx(sum(row["kl"] for row in rows) / 5, abs=1e-4)
    assert abs(column(ppo, "eval/kl")[-1]) > 1e-2 and {row["temperature"] for row in log(ppo, "eval/kl")} == {0.7}
    greedy = answer(trained, tokenizer, records[:5], settings(train_ppo, *TEXT), 0)
    assert [row["response"] for row in greedy] != [row["response"] for row in rows], "the test wants a policy that is not sure"


def test_adams_epsilon_by_hand(home, tmp_path):
    """Another epsilon than 1e-5: after one step Adam has moved each weight by -lr g / (|g| + eps), here with |g| far below eps."""
    launch(train_ppo, "--data", home / "rows", "--out", tmp_path / "ppo", "--policy", home / "policy", *PPO, "--steps", "1",
           "--ppo-epochs", "1", "--lr", "1e-2", "--max-grad-norm", "1e-5", "--eval-rows", "1", "--save-steps", "1")
    folder = tmp_path / "ppo" / "checkpoints" / "step-1"
    before, after = (adamw([PolicyWithValue.from_pretrained(where)], 1.0) for where in (home / "policy", folder))
    before, after = ([p for group in optimizer.param_groups for p in group["params"]] for optimizer in (before, after))
    state = load_file(folder / "trainer.safetensors")
    moved = 0.0
    for i, (old, new) in enumerate(zip(before, after)):
        gradient = state[f"optimizer/{i}/exp_avg"] / 0.1  # the first moment after one step is (1 - 0.9) g
        torch.testing.assert_close(new - old, -1e-2 * gradient / (gradient.abs() + 1e-5), rtol=1e-3, atol=1e-6)
        moved = max(moved, (new - old).abs().max().item())
    assert 1e-4 < moved < 9e-3, "with an epsilon far below |g| it would be lr, 0.01, almost everywhere"


class Enough(Exception):
    """Ends a run where the test has seen what it wants."""


def first_update(home, folder, *words, craft=lambda batch: batch):
    """(batch, advantages, returns) that step 1 of a run of PPO hands to its update; `craft` may change its rollout."""
    def stop(actor, optimizer, *found):
        raise Enough(*found[:3])
    real = train_ppo.roll_out
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Enough) as caught:
        patch.setattr(train_ppo, "update", stop)
        patch.setattr(train_ppo, "roll_out", lambda *args: craft(real(*args)))
        launch(train_ppo, "--data", home / "rows", "--out", folder, "--policy", home / "policy", *PPO, "--eval-rows", "1", *words)
    return caught.value.args


def tokens_of(batch, i):
    """(query, response) of a row of a rollout as ids, without padding."""
    row, width = batch.query_response[i], batch.response_mask.shape[1]
    return row[:-width][batch.attention_mask[i, :-width]].tolist(), row[-width:][batch.response_mask[i]].tolist()


KL = {"k1": lambda d: d, "k2": lambda d: d * d / 2, "k3": lambda d: math.exp(-d) - 1 + d, "abs": abs}


@pytest.mark.parametrize("kind", KL)
def test_every_kl_estimator_and_whitening_by_hand(kind, home, tmp_path):
    """Another estimate than the one asked for, or advantages whitened with the padding. Row i has score i and i + 1 tokens, as far as
    the batch is wide; gamma 1, lambda 0.95, kl_coef 0.5."""
    def craft(batch):
        generator = torch.Generator().manual_seed(0)
        batch.ref_logprobs, batch.values = (batch.logprobs - torch.randn(batch.logprobs.shape, generator=generator) for _ in range(2))
        batch.responses = ["x " * i for i in range(8)]
        batch.response_mask = torch.arange(batch.logprobs.shape[1]) <= torch.arange(8)[:, None] % batch.logprobs.shape[1]
        crafted.append(batch)
        return batch
    crafted = []
    _, advantages, returns = first_update(home, tmp_path / kind, "--kl-estimator", kind, "--kl-coef", "0.5", craft=craft)
    batch, = crafted
    expected, raw = [], []
    for i, length in enumerate(batch.lengths.tolist()):
        d, values = ((batch.logprobs - batch.ref_logprobs)[i].tolist(), batch.values[i].tolist())
        advantage, column = 0.0, []
        rewards = [-0.5 * KL[kind](x) for x in d[:length]]
        rewards[-1] += i
        for t in reversed(range(length)):
            following = values[t + 1] if t + 1 < length else 0.0
            advantage = rewards[t] + following - values[t] + 0.95 * advantage
            column.insert(0, advantage)
        raw += column
        expected.append([a + v for a, v in zip(column, values)])
    mean = sum(raw) / len(raw)
    std = math.sqrt(sum((a - mean) ** 2 for a in raw) / len(raw))
    found = [row[:len(wanted)].tolist() for row, wanted in zip(returns, expected)]
    for row, wanted in zip(found, expected):
        assert row == pytest.approx(wanted, abs=1e-4)
    assert advantages[batch.response_mask].tolist() == pytest.approx([(a - mean) / std for a in raw], abs=1e-4)
    assert not advantages[~batch.response_mask].any()


@pytest.mark.parametrize("words", [["--top-k", "1"], ["--top-p", "1e-6"]], ids=["top_k", "top_p"])
def test_rollouts_keep_the_likeliest_tokens_that_were_asked_for(words, home, policy, tmp_path):
    """Sampling from the whole distribution although --top-k or --top-p bounds it: here to the likeliest token at every place."""
    batch, _, _ = first_update(home, tmp_path / "run", *words)
    for i in range(8):
        query, response = tokens_of(batch, i)
        assert logps(policy, query, response).argmax(-1).tolist() == response


def test_the_rollout_is_scored_at_the_temperature_asked_for(home, policy, tmp_path):
    """--temperature that does not reach the rollout: its log-probs, and at step 1 the reference's too, are those at 0.7."""
    batch, _, _ = first_update(home, tmp_path / "run", "--temperature", "0.7")
    for i in range(8):
        query, response = tokens_of(batch, i)
        expected = logps(policy, query, response, 0.7)[range(len(response)), response].tolist()
        for found in (batch.logprobs, batch.ref_logprobs):
            assert found[i][batch.response_mask[i]].tolist() == pytest.approx(expected, abs=1e-4)


def test_every_step_draws_anew(home, tmp_path):
    """The same noise at every step: one prompt and a policy that stands still would get the same 8 answers for ever."""
    launch(train_ppo, "--data", home / "one", "--out", tmp_path / "ppo", "--policy", home / "policy", *PPO, "--steps", "3", "--lr", "1e-12",
           "--eval-rows", "1", "--eval-every", "99")
    first, second, third = column(tmp_path / "ppo", "policy/entropy")
    assert min(abs(first - second), abs(second - third), abs(first - third)) > 1e-4


@pytest.fixture(scope="module")
def rolled(home, policy, tokenizer):
    """Makes (an actor with a value head that says something, 16 ragged responses of its at temperature 0.7, advantages, returns)."""
    def make(ops=TORCH):
        actor = PolicyWithValue(copy.deepcopy(policy))
        nn.init.normal_(actor.value_head.weight, std=0.1, generator=torch.Generator().manual_seed(0))
        queries = [tokenizer.encode(f"add {n} to xs\n" if n % 2 else "add xs\n") for n in range(16)]
        batch = roll_out(actor, policy, tokenizer, queries, 8, 0.7, generator=torch.Generator().manual_seed(0), ops=ops)
        generator = torch.Generator().manual_seed(1)
        advantages, noise = (torch.randn(batch.logprobs.shape, generator=generator) for _ in range(2))
        return actor, batch, advantages, batch.values + noise
    return make


def test_the_minibatch_loss_by_hand(rolled):
    """A clip range or a weight that stays at its default, or values clipped to themselves: after the actor has moved, ratios and
    values leave clips that are narrow here, and the dual clip binds too."""
    actor, batch, advantages, returns = rolled()
    shaken(actor, 0.08)
    config = settings(train_ppo, "--cliprange", "0.05", "--cliprange-value", "0.03", "--dual-clip", "1.5", "--vf-coef", "0.3",
                      "--entropy-coef", "0.05", "--temperature", "0.7")
    tokens = batch.response_mask.sum() + 10  # there are other micro-batches
    loss, stats = train_ppo.minibatch_loss(actor, batch, advantages, returns, tokens, config)
    policy_losses, value_losses, entropies, bound = [], [], [], {"ratio": 0, "value": 0, "dual": 0}
    for i in range(16):
        query, response = tokens_of(batch, i)
        logp = logps(actor.policy, query, response, 0.7)
        values = actor.value_head(actor.policy.hidden(torch.tensor([query + response])))[0, len(query) - 1:-1].tolist()
        for t, token in enumerate(response):
            entropies.append(-(logp[t].exp() * logp[t]).sum().item())
            ratio, a = math.exp(logp[t, token].item() - batch.logprobs[i, t].item()), advantages[i, t].item()
            plain, clipped = -a * ratio, -a * min(max(ratio, 0.95), 1.05)
            cost = max(plain, clipped)
            policy_losses.append(min(cost, -a * 1.5) if a < 0 else cost)
            old, goal = batch.values[i, t].item(), returns[i, t].item()
            plain_value, clipped_value = (values[t] - goal) ** 2, (min(max(values[t], old - 0.03), old + 0.03) - goal) ** 2
            value_losses.append(0.5 * max(plain_value, clipped_value))
            bound["ratio"] += clipped > plain
            bound["value"] += clipped_value > plain_value
            bound["dual"] += a < 0 and cost > -a * 1.5
    count = len(policy_losses)
    assert count + 10 == tokens and min(bound.values()) >= 3, bound
    assert loss.item() == pytest.approx((sum(policy_losses) + 0.3 * sum(value_losses) - 0.05 * sum(entropies)) / (count + 10), abs=1e-5)
    assert stats["loss/policy"] == pytest.approx(sum(policy_losses) / count, abs=1e-5)
    assert stats["loss/value"] == pytest.approx(sum(value_losses) / count, abs=1e-5)
    assert stats["policy/clipfrac"] == pytest.approx(bound["ratio"] / count) and stats["value/clipfrac"] == pytest.approx(bound["value"] / count)


@pytest.mark.parametrize("low_memory", [False, True])
def test_the_first_ratio_is_1_at_any_temperature(low_memory, rolled):
    """The update would take log-probs at another temperature than the rollout, with logits in parts as with whole ones."""
    ops = choose("torch", "cpu", low_memory)
    actor, batch, advantages, returns = rolled(ops)
    _, stats = train_ppo.minibatch_loss(actor, batch, advantages, returns, batch.response_mask.sum(),
                                        settings(train_ppo, "--temperature", "0.7"), ops)
    assert stats["policy/ratio"] == pytest.approx(1, abs=1e-5) and abs(stats["policy/approx_kl"]) < 1e-8


# ---------------------------------------------------------------------------------------------------- inside evaluation

@pytest.mark.parametrize("low_memory", [False, True])
def test_the_kl_of_a_model_to_itself_is_0_at_its_temperature(low_memory, policy, tokenizer, records):
    """The reference scored at another temperature than the one sampled at, and greedy answers at 1; another model's KL is not 0."""
    config, ops = settings(train_ppo, *TEXT), choose("torch", "cpu", low_memory)
    for temperature in (0.7, 0):
        assert all(abs(row["kl"]) < 1e-4 for row in answer(policy, tokenizer, records, config, temperature, policy, ops=ops))
    other = shaken(copy.deepcopy(policy), 0.1)
    assert max(abs(row["kl"]) for row in answer(policy, tokenizer, records, config, 0.7, other, ops=ops)) > 0.1


def test_only_answers_that_end_have_ended(policy, tokenizer, records):
    """An answer cut before EOS that counts as ended, or one whose EOS takes the last place that counts as cut. With more room, what had
    not ended goes on."""
    rooms = [answer(policy, tokenizer, records * 2, settings(train_ppo, "--max-query", "12", "--max-response", str(room)), 1.0)
             for room in range(1, 9)]
    for room, rows in enumerate(rooms[:-1], 1):
        assert [row["ended"] for row in rows] == [row["length"] == longer["length"] for row, longer in zip(rows, rooms[room])]
    assert any(row["ended"] and row["length"] == room for room, rows in enumerate(rooms, 1) for row in rows)
    assert not all(row["ended"] for row in rooms[3]), "the test wants both kinds"


def test_the_summary_of_three_answers_by_hand():
    """One of three ended, one could not be scored: each mean is over the rows that have the value."""
    rows = [{"reference": "xs + 1", "response": "xs + 1", "exact_match": 1.0, "ended": True, "length": 4, "kl": 0.5, "reward": 2.0},
            {"reference": "xs + 2", "response": "xs", "exact_match": 0.0, "ended": False, "length": 8, "kl": -0.2, "reward": None},
            {"reference": None, "response": "y", "exact_match": None, "ended": False, "length": 6, "kl": 0.0, "reward": -1.0}]
    numbers = summary(rows)
    assert numbers["ended"] == pytest.approx(1 / 3) and known(numbers)["eval/eos"] == pytest.approx(1 / 3)
    assert (numbers["length"], numbers["kl"], numbers["reward"]) == (6, pytest.approx(0.1), 0.5)
    assert numbers["exact_match"] == 0.5 and numbers["left_out"] == 1 and numbers["execution"] is None
    assert None not in known(numbers).values() and "eval/execution" not in known(numbers), "the log holds numbers"


@pytest.mark.parametrize("words", [["--top-k", "1"], ["--top-p", "1e-6"]], ids=["top_k", "top_p"])
def test_answers_keep_the_likeliest_tokens_that_were_asked_for(words, policy, tokenizer, records):
    """Validation that samples from the whole distribution although training does not: bounded to the likeliest token it is greedy."""
    found = [[row["response"] for row in answer(policy, tokenizer, records, settings(train_ppo, *TEXT, *more), temperature)]
             for more, temperature in ((words, 1.0), ([], 0), ([], 1.0))]
    assert found[0] == found[1] != found[2], "the test wants a policy that is not sure"


def test_the_kl_of_an_answer_by_hand(policy, tokenizer, records, monkeypatch):
    """The reference's log-probs less the policy's, padding counted, or another row's: log pi - log ref of the tokens sampled, summed."""
    other, batches, real = shaken(copy.deepcopy(policy), 0.1), [], evaluation.generate
    monkeypatch.setattr(evaluation, "generate", lambda *args: batches.append((args, real(*args))) or batches[-1][1])
    records = [Record("xs"), *records]  # a short query: it is padded
    rows = answer(policy, tokenizer, records, settings(train_ppo, *TEXT, "--micro-batch-size", "2"), 0.7, other, batch_size=3)
    expected = []
    for (_, ids, mask, *_), (responses, response_mask, _) in batches:
        for i in range(len(ids)):
            query, response = ids[i][mask[i].bool()].tolist(), responses[i][response_mask[i].bool()].tolist()
            pi, ref = (logps(model, query, response, 0.7)[range(len(response)), response].sum().item() for model in (policy, other))
            expected.append(pi - ref)
    assert len(batches) == 3 and len({row["length"] for row in rows}) > 1, "the test wants ragged answers"
    assert [row["kl"] for row in rows] == pytest.approx(expected, abs=1e-4)


def test_rewards_of_answers_by_hand():
    """A row left out that counts as 0, or a term under another's name: 2 * length + known, which is NaN for the second row."""
    rows = [{"id": str(n), "prompt": "p", "response": "x" * n, "reference": None} for n in range(3)]
    found = add_rewards(rows, Combination([Term("length", 2.0, lambda p, responses, r: [len(text) for text in responses]),
                                           Term("known", 1.0, lambda *texts: [5, math.nan, 7])]))
    assert [(row["reward"], row["reward/length"], row["reward/known"]) for row in found] == [(5, 0, 5), (None, 1, None), (11, 2, 7)]
    assert (summary(found)["reward"], summary(found)["reward/length"], summary(found)["left_out"]) == (8, 1, 1)
    with pytest.raises(RunFailed, match="step 3: the reward is not finite for 2 of 3 responses: rows 0, 2$"):
        add_rewards(rows, lambda *texts: [math.nan, 1.0, math.inf], "step 3")


def test_the_gain_is_the_last_model_less_the_first():
    """The table would say that training made worse what it made better. Exact matches 0 1 - 1 against 1 1 1 -: over the two rows that
    both have, 1 - 0.5; the model between is in no gain."""
    matches = {"SFT": (0.0, 1.0, None, 1.0), "half": (0.0, 0.0, 0.0, 0.0), "PPO": (1.0, 1.0, 1.0, None)}
    answers = {(mode, name): [{"prompt": f"p{n}", "reference": "x", "response": f"{mode} {name}", "exact_match": match}
                              for n, match in enumerate(matches[name])] for mode in ("sampled", "greedy") for name in matches}
    results = split_results(answers, ["SFT", "half", "PPO"])
    gain = results["gain"]["greedy"]["exact_match"]
    assert gain["difference"] == 0.5 and 0 <= gain["low"] <= 0.5 <= gain["high"] <= 1 and results["gain"]["sampled"]["execution"] is None
    shown = table("test", 4, results).splitlines()
    assert "| test, 4 prompts | SFT | half | PPO | PPO - SFT [95 %] |" in shown and "|---|---:|---:|---:|---:|" in shown
    assert "| exact match (AST-equal), greedy | 0.667 | 0.000 | 1.000 | +0.500 [+0.000, +1.000] |" in shown
    assert not any("passes its checks" in line for line in shown), "what no row has is no line"
    assert sample_answers(answers, ["SFT", "PPO"], 2) == [
        {"prompt": f"p{n}", "reference": "x", "SFT": "greedy SFT", "PPO": "greedy PPO"} for n in range(2)]


def test_a_report_is_of_sampled_and_of_greedy_answers(policy, tokenizer, records, tmp_path, capsys):
    """Test answers of another temperature or seed than asked for, of the wrong model, or of one split alone: each can be drawn again.
    The KL is to the reference, and of sampled answers alone."""
    config = settings(train_ppo, *TEXT, "--temperature", "0.7", "--seed", "5")
    models = {"SFT": policy, "PPO": shaken(copy.deepcopy(policy), 0.1)}
    splits = Splits([], [], records[:6], {"hard": records[6:]})
    (tmp_path / "answers.jsonl").write_text("of a report that was interrupted")
    found = report(tmp_path, models, tokenizer, splits, config, lambda p, responses, r: [len(text) for text in responses], policy)
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    wanted = [(split, mode, name, row["response"]) for split, some in (("test", records[:6]), ("hard", records[6:]))
              for mode, temperature in (("sampled", 0.7), ("greedy", 0)) for name, model in models.items()
              for row in answer(model, tokenizer, some, config, temperature, seed=5)]
    assert [(row["split"], row["mode"], row["model"], row["response"]) for row in rows] == wanted
    assert all(("kl" in row) == (row["mode"] == "sampled") for row in rows)
    test = found["test"]["test"]
    assert abs(test["sampled"]["SFT"]["kl"]) < 1e-4 < 0.1 < abs(test["sampled"]["PPO"]["kl"]) and list(found["test"]) == ["test", "hard"]
    shown = [text for split, mode, name, text in wanted if (split, mode, name) == ("test", "greedy", "PPO")][:5]
    assert [sample["PPO"] for sample in found["samples"]] == shown
    assert [sample["prompt"] for sample in found["samples"]] == [record.prompt for record in records[:5]]
    said = capsys.readouterr().out
    assert "| test, 6 prompts | SFT | PPO |" in said and "| hard, 2 prompts |" in said
    assert "| reward, sampled |" in said, "a rule is not a learned reward"


class Box:
    """A sandbox that notes how it was asked for; every code passes."""
    layers, asked = {"seccomp": True, "landlock": False}, None

    def __init__(self, timeout, **options):
        type(self).asked = {"timeout": timeout, **options}

    def check_many(self, jobs):
        return [Outcome(True, "ok", 0.0, "", 1) for _ in jobs]

    def close(self):
        pass


CHECKED = Splits([Record("p", "1", checks=[{"setup": "", "value": "1"}])], [], [])


def test_the_sandbox_is_the_one_asked_for(monkeypatch, capsys):
    """A time limit, a number of workers or a mode that stays at its default."""
    monkeypatch.setattr(evaluation, "Sandbox", Box)
    words = ["--sandbox", "weak", "--sandbox-timeout", "0.25", "--sandbox-workers", "3"]
    assert isinstance(open_sandbox(settings(train_ppo, *words), CHECKED), Box)
    assert Box.asked == {"timeout": 0.25, "workers": 3, "mode": "weak"} and capsys.readouterr().out == "sandbox: seccomp\n"


def test_references_that_cannot_be_checked_do_not_fail_their_checks(monkeypatch, capsys):
    """Every code gives 1: of a row without checks, one without a reference, one whose reference passes and one whose fails, the last."""
    monkeypatch.setattr(evaluation, "Sandbox", Box)
    rows = [Record("p", "1"), Record("p", None, checks=CHECKED.train[0].checks), *CHECKED.train]
    open_sandbox(settings(train_ppo), Splits(rows, [], []))
    assert "fail their own checks" not in capsys.readouterr().out
    open_sandbox(settings(train_ppo), Splits(rows, [Record("p", "1", id="q7", checks=[{"setup": "", "value": "2"}])], []))
    assert "references that fail their own checks: 1 of the 2 tried, such as q7\n" in capsys.readouterr().out


@pytest.mark.parametrize("splits, words, needed, outcome", [
    (Splits([Record("p", "1")], [], []), [], False, None), (Splits([Record("p", "1")], [], []), [], True, "has no checks to run code on"),
    (CHECKED, ["--sandbox", "off"], False, None), (CHECKED, ["--sandbox", "off"], True, "--reward asks for execution"),
    (CHECKED, [], False, None), (CHECKED, [], True, "no walls here"), (CHECKED, ["--sandbox", "require"], False, "no walls here"),
    (CHECKED, ["--sandbox", "weak"], False, "no walls here")])
def test_where_no_sandbox_can_be_had(monkeypatch, capsys, splits, words, needed, outcome):
    """A reward of execution without a sandbox would be none, and a wall that was asked for must not go silently. Else the run goes on."""
    def refuse(*args, **options):
        raise InputError("no walls here")
    monkeypatch.setattr(evaluation, "Sandbox", refuse)
    if outcome:
        with pytest.raises(InputError, match=outcome):
            open_sandbox(settings(train_ppo, *words), splits, needed)
    else:
        assert open_sandbox(settings(train_ppo, *words), splits, needed) is None
        assert ("not measured" in capsys.readouterr().out) == (splits is CHECKED)
