"""Reward models, and ensembles of rewards.

A reward is a callable: reward(prompts, responses, references) -> (B,) scores. Models are one kind; rules, execution, sums and
functions of the user's are in terms.py, which makes a reward from what the command line says. Reward models read text, not
token ids: their tokenizer and backbone are their own, whatever the policy's.
"""
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from nanorlhf import encoder as encoders
from nanorlhf import hf
from nanorlhf.data import format_query
from nanorlhf.encoder import Encoder, EncoderConfig
from nanorlhf.errors import InputError, naming
from nanorlhf.gpt2 import GPT2, GPT2Config
from nanorlhf.run import RunFailed
from nanorlhf.sequences import join
from nanorlhf.tokenizer import Tokenizer

SETTINGS = "reward_model.json"
HEADS = ("native", "linear", "mlp")


class LastToken(nn.Module):
    """One linear layer on the hidden state of the last real token: GPT2ForSequenceClassification's head, without bias."""

    def __init__(self, width):
        super().__init__()
        self.score = nn.Linear(width, 1, bias=False)
        nn.init.normal_(self.score.weight, std=(width + 1) ** -0.5)  # Stiennon et al. 2020, appendix B.1

    def forward(self, hidden, attention_mask):
        return self.score(last_token(hidden, attention_mask))  # (B, 1)


class OwnHead(nn.Module):
    """A head that no family has, on the pooled state (B, C): "linear" is one layer, "mlp" is three,

        Linear - ReLU - Dropout - Linear - ReLU - Dropout - Linear

    The last layer starts as `LastToken`'s does. pool: `last_token` or `encoder.first_token`.
    """

    def __init__(self, kind, width, pool, dropout=0.1):
        super().__init__()
        self.kind, self.pool = kind, pool
        layers = []
        for _ in range(2 if kind == "mlp" else 0):
            layers += [nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout)]
        self.reward_head = nn.Sequential(*layers, nn.Linear(width, 1))
        nn.init.normal_(self.reward_head[-1].weight, std=(width + 1) ** -0.5)
        nn.init.zeros_(self.reward_head[-1].bias)

    def forward(self, hidden, attention_mask):
        return self.reward_head(self.pool(hidden, attention_mask))  # (B, 1)


def last_token(hidden, attention_mask):
    """The state (B, C) of the last real token of right-padded rows."""
    return hidden[torch.arange(len(hidden), device=hidden.device), attention_mask.sum(1) - 1]


class RewardModel(nn.Module):
    """score = gain * head(backbone(prompt, response)) + bias: one number a response.

    A GPT-2 backbone reads query, response and EOS, and its head is one linear layer on the last token. An encoder reads prompt
    and response as a pair, and its head is that of its family's sequence classifier. Folders are transformers' (GPT2-,
    Roberta- or BertForSequenceClassification with one label, whose logit is the raw score), with gain, bias and template in
    reward_model.json beside it.

    gain and bias are set after training, so that the scores of the SFT policy's samples have mean 0 and variance 1
    (`normalise`): a KL coefficient then means the same for every reward model.

    People's logits: a record of feedback may carry a vector f (D,), such as a rater's logits over answers to a questionnaire. A model
    made for them (`human_feedback_dim` = D) adds it to the state that the head reads,

        pooled + human_feedback_weight * P f                                 P: (C, D), learned

    and without a vector adds nothing. Trained with vectors dropped at random (train_reward.py), it scores well either way.
    Other heads than the family's own: see `OwnHead`. Their folders load in transformers as the bare backbone.
    """

    def __init__(self, backbone, head, tokenizer, template="{prompt}\n", max_length=None, human_feedback_dim=0, human_feedback_weight=0.3):
        super().__init__()
        self.backbone, self.head, self.tokenizer, self.template = backbone, head, tokenizer, template
        self.human_feedback = nn.Linear(human_feedback_dim, self.width, bias=False) if human_feedback_dim else None
        self.human_feedback_weight = human_feedback_weight
        longest = backbone.config.n_positions if isinstance(backbone, GPT2) else backbone.config.max_tokens
        self.max_length = min(max_length or longest, longest)
        self.gain, self.bias = 1.0, 0.0
        self.cut = 0  # inputs longer than max_length so far, each as often as it was read

    @property
    def device(self):
        return next(self.parameters()).device

    @property
    def human_feedback_dim(self):
        """D of the vectors it takes; 0: it takes none."""
        return self.human_feedback.in_features if self.human_feedback else 0

    @property
    def width(self):
        return self.backbone.config.n_embd if isinstance(self.backbone, GPT2) else self.backbone.config.hidden_size

    def encode(self, prompts, responses):
        """Padded model inputs (ids, attention_mask, segments), each (B, T) int64; segments are 1 on the response (for BERT).

        Too long: the prompt loses its beginning first. That is counted in `cut`, and said the first time.
        """
        if isinstance(self.backbone, GPT2):
            queries = [self.tokenizer.encode(format_query(prompt, self.template)) for prompt in prompts]
            answers = [self.tokenizer.encode(response) + [self.tokenizer.eos_id] for response in responses]
            cut = sum(len(query) + len(answer) > self.max_length for query, answer in zip(queries, answers))
            answers = [answer[:self.max_length - 1] for answer in answers]
            queries = [query[-(self.max_length - len(answer)):] for query, answer in zip(queries, answers)]
            inputs = join(queries, answers, self.tokenizer.pad_id)
        else:
            before = self.tokenizer.cut
            inputs = self.tokenizer.batch_pairs(prompts, responses, "right", self.max_length)
            cut = self.tokenizer.cut - before
        if cut and not self.cut:
            print(f"reward model: it reads {self.max_length} tokens, and {cut} of {len(prompts)} prompts with their responses are longer: "
                  "such prompts lose their beginning (said once)", file=sys.stderr)
        self.cut += cut
        return inputs

    def forward(self, ids, attention_mask, segments, feedback=None):
        """Raw scores (B,), float32, before gain and bias; gradient flows. feedback: (B, D), zeros where a row has none; or None."""
        gpt2 = isinstance(self.backbone, GPT2)
        hidden = self.backbone.hidden(ids, attention_mask) if gpt2 else self.backbone(ids, attention_mask, segments)  # (B, T, C)
        if feedback is not None:
            read = attention_mask.sum(1) - 1 if gpt2 else attention_mask.long().argmax(1)  # (B,) the column that the head reads
            column = F.one_hot(read, hidden.shape[1])[:, :, None]  # (B, T, 1)
            hidden = hidden + self.human_feedback_weight * column * self.human_feedback(feedback)[:, None]
        return self.head(hidden, attention_mask).squeeze(1).float()

    def vectors(self, feedback):
        """People's vectors, a list of lists or None, as (B, D), zeros for None; None for a model that takes none.

        Zeros rather than nothing also where nobody gave one: the projection then has a gradient of 0, and the optimiser a state.
        """
        if not self.human_feedback and all(vector is None for vector in feedback):
            return None
        for vector in feedback:
            if vector is not None and len(vector) != self.human_feedback_dim:
                raise InputError(f"a vector of feedback has {len(vector)} numbers, this reward model takes {self.human_feedback_dim}" +
                                 ("" if self.human_feedback else ": it was trained without any"))
        empty = [0.0] * self.human_feedback_dim
        return torch.tensor([empty if vector is None else vector for vector in feedback], device=self.device)

    @torch.no_grad()
    def score(self, prompts, responses, batch_size=128, feedback=None):
        """Scores of responses to prompts, lists of B texts -> (B,) float32. Rows of similar length are scored together.

        feedback: for each row people's vector (D,) or None; without it no row has one.
        """
        if isinstance(prompts, str) or isinstance(responses, str):
            raise InputError("expected lists of prompts and of responses, found one text; write [text]")
        if len(prompts) != len(responses):
            raise ValueError(f"{len(prompts)} prompts but {len(responses)} responses")
        feedback = [None] * len(prompts) if feedback is None else feedback
        was_training = self.training
        self.eval()
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(responses[i]))
        scores = torch.zeros(len(prompts), device=self.device)
        for start in range(0, len(order), batch_size):
            rows = order[start:start + batch_size]
            inputs = self.encode([prompts[i] for i in rows], [responses[i] for i in rows])
            scores[rows] = self(*(x.to(self.device) for x in inputs), self.vectors([feedback[i] for i in rows]))
        self.train(was_training)
        return self.gain * scores + self.bias

    def __call__(self, *args, **kwargs):
        """As a module on tensors, and as a reward on texts: model(prompts, responses, references)."""
        if "responses" in kwargs or args and not torch.is_tensor(args[0]):
            return self._as_reward(*args, **kwargs)
        return super().__call__(*args, **kwargs)

    def _as_reward(self, prompts, responses, references=None):
        return self.score(prompts, responses)

    def normalise(self, prompts, responses):
        """Set gain and bias so that these responses (the SFT policy's samples) have scores of mean 0 and variance 1."""
        self.gain, self.bias = 1.0, 0.0
        raw = self.score(prompts, responses)
        spread = raw.std(unbiased=False).item()
        if spread < 1e-6:
            print(f"all {len(responses)} responses have the same score: it is centred but not scaled")
        self.gain = 1 / spread if spread >= 1e-6 else 1.0
        self.bias = -raw.mean().item() * self.gain

    @classmethod
    def from_pretrained(cls, folder_or_name, new_head=None, template=None, max_length=None, human_feedback_dim=0, human_feedback_weight=0.3):
        """A reward model from a folder; with `new_head`, a fresh head on the folder's language model or encoder.

        Args: new_head: "native", the family's own; "linear" or "mlp", see `OwnHead`. human_feedback_dim and _weight: of a new
            head; a folder that holds a head knows its own.
        Without `new_head` a folder that holds no head is an InputError: it is not a reward model.
        """
        folder = hf.resolve(folder_or_name)
        settings = hf.read_config(folder)
        hf.check_model_type(settings, ("gpt2", "roberta", "bert"), folder)
        stored = _read_settings(folder / SETTINGS)
        backbone, rest = _build_gpt2(folder, settings) if hf.is_model_type(settings, "gpt2") else _build_encoder(folder, settings)
        if new_head:
            head, own = _new_head(backbone, new_head), {}
        else:
            own = {name: rest.pop(name) for name in list(rest) if name.startswith("human_feedback.")}
            head = _read_head(backbone, stored.get("head", "native"), rest, folder)
            human_feedback_dim, human_feedback_weight = stored.get("human_feedback_dim", 0), stored.get("human_feedback_weight", 0.3)
        model = cls(backbone, head, Tokenizer.from_pretrained(folder), template or stored.get("template", "{prompt}\n"),
                    max_length or stored.get("max_length"), human_feedback_dim, human_feedback_weight)
        model.tokenizer.check_fits(backbone.config.vocab_size, folder)
        if not new_head:
            if human_feedback_dim:
                hf.load_into(model.human_feedback, {name.removeprefix("human_feedback."): tensor for name, tensor in own.items()}, folder)
            model.gain, model.bias = stored.get("gain", 1.0), stored.get("bias", 0.0)
        return model.eval()

    def save_pretrained(self, folder):
        """Write weights, config, tokenizer and reward_model.json.

        With the family's own head, AutoModelForSequenceClassification gives the raw score (of a row without feedback).
        """
        config, tensors = self._to_state()
        hf.write(folder, tensors, config)
        self.tokenizer.save_pretrained(folder)
        settings = {"gain": self.gain, "bias": self.bias, "template": self.template, "max_length": self.max_length,
                    "head": getattr(self.head, "kind", "native"), "human_feedback_dim": self.human_feedback_dim,
                    "human_feedback_weight": self.human_feedback_weight}
        (Path(folder) / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n")

    def _to_state(self):
        """(config.json's dict, tensors under transformers' names)."""
        gpt2, native = isinstance(self.backbone, GPT2), not isinstance(self.head, OwnHead)
        kind = "ForSequenceClassification" if native else "Model"
        config = {**self.backbone.config.to_dict(), "architectures": ["GPT2" + kind]} if gpt2 else self.backbone.config.to_dict(kind)
        if native:
            config |= {"num_labels": 1, "id2label": {"0": "score"}, "label2id": {"score": 0}}
        tensors = {name: tensor for name, tensor in self.backbone.to_state().items() if not name.startswith("lm_head.")}
        if gpt2:
            # transformers looks for the last token that is not padding: with pad == eos it would stop before our EOS
            pad_id = self.tokenizer.pad_id if self.tokenizer.pad_id != self.tokenizer.eos_id else None
            config |= {"pad_token_id": pad_id, "tie_word_embeddings": True}  # there is no head to untie
        tensors |= encoders.classifier_state(self.backbone, self.head) if native and not gpt2 else self.head.state_dict()
        if self.human_feedback:
            tensors["human_feedback.weight"] = self.human_feedback.weight
        return config, tensors


def _read_settings(path):
    """What reward_model.json says; {} where there is no such file."""
    stored = hf.read_json(path) if path.is_file() else {}
    sound = {"gain": _is_finite, "bias": _is_finite, "template": lambda value: isinstance(value, str) and "{prompt}" in value,
             "max_length": lambda value: value is None or type(value) is int and value > 0, "head": lambda value: value in HEADS,
             "human_feedback_dim": lambda value: type(value) is int and 0 <= value < 1 << 16, "human_feedback_weight": _is_finite}
    for name, is_sound in sound.items():
        if name in stored and not is_sound(stored[name]):
            raise InputError(f"{path}: {name} is {repr(stored[name])[:60]}, which it cannot be: mend it, or train the model again")
    return stored


def _is_finite(value):
    return type(value) in (int, float) and abs(value) < 1e30


def _build_gpt2(folder, settings):
    """(GPT2, the tensors that are not its own) from a folder."""
    tensors = hf.read_weights(folder)
    tensors.pop("lm_head.weight", None)  # a reward model scores no tokens
    settings = {**settings, "tie_word_embeddings": True}
    with naming(folder / "config.json"):
        config = GPT2Config.from_dict(settings)
    return GPT2.from_state(config, tensors, folder)


def _build_encoder(folder, settings):
    """(Encoder, the tensors that are not its own) from a folder."""
    with naming(folder / "config.json"):
        config = EncoderConfig.from_dict(settings)
    return Encoder.from_state(config, hf.read_weights(folder), folder)


def _new_head(backbone, kind):
    """A fresh head of one of HEADS."""
    gpt2 = isinstance(backbone, GPT2)
    width = backbone.config.n_embd if gpt2 else backbone.config.hidden_size
    if kind != "native":
        return OwnHead(kind, width, last_token if gpt2 else encoders.first_token)
    return LastToken(width) if gpt2 else encoders.new_head(backbone.config)


def _read_head(backbone, kind, rest, folder):
    """The head that a folder's remaining tensors hold."""
    if kind == "native" and not isinstance(backbone, GPT2):
        head = encoders.read_head(backbone.config, rest, folder)
        if sum(p.shape[0] for name, p in head.named_parameters() if name.endswith(("classifier.bias", "out_proj.bias"))) != 1:
            raise InputError(f"{folder} classifies into several labels; a reward model has one: train one with train_reward.py")
        return head
    head = _new_head(backbone, kind)
    if kind == "native" and "score.weight" not in rest:
        raise InputError(f"{folder} has no classification head (no tensor score.weight): it is a language model, not a reward "
                         f"model; train one with: python train_reward.py --model {folder}")
    if kind != "native" and not any(name.startswith("reward_head.") for name in rest):
        raise InputError(f"{folder} has no tensors reward_head.*, the head that its {SETTINGS} speaks of: get the folder again, whole")
    hf.load_into(head, rest, folder)
    return head


class RewardEnsemble:
    """Several rewards as one: the mean, the minimum, or the mean minus the standard deviation of their scores.

    The last two distrust what the members disagree about (Coste et al. 2023, "Reward Model Ensembles Help Mitigate
    Overoptimization", who subtract a multiple of the variance, not the standard deviation). `.disagreement` is the standard
    deviation of each row of the latest call.

    Args: rewards, a list of callables; combine, "mean" | "min" | "mean-std".
    """

    def __init__(self, rewards, combine="mean"):
        if combine not in ("mean", "min", "mean-std"):
            raise ValueError(f"unknown combination {combine!r}: choose from mean, min, mean-std")
        if not rewards:
            raise ValueError("an ensemble needs at least one reward")
        self.rewards, self.combine, self.disagreement = list(rewards), combine, None

    def __call__(self, prompts, responses, references=None):
        scores = torch.stack([call_reward(reward, prompts, responses, references).cpu() for reward in self.rewards])  # (M, B)
        for number, (reward, row) in enumerate(zip(self.rewards, scores), 1):
            if row.isnan().any() and not getattr(reward, "leaves_out", False):  # a sum's NaN leaves a row out, a model's is a fault
                raise RunFailed(f"member {number} of the reward ensemble ({getattr(reward, '__name__', type(reward).__name__)}) gave NaN: mend it")
        self.disagreement = scores.std(0, unbiased=False)  # (B,)
        if self.combine == "min":
            return scores.min(0).values
        return scores.mean(0) - (self.disagreement if self.combine == "mean-std" else 0)

    @property
    def leaves_out(self):
        """Whether a score may be NaN, which leaves its row out of the update."""
        return any(getattr(reward, "leaves_out", False) for reward in self.rewards)

    def score(self, prompts, responses):
        """Scores (B,) without references."""
        return self(prompts, responses, [None] * len(prompts))


def term_values(reward):
    """{name: (B,)} of the terms that a sum, or the sums in an ensemble, gave in their latest call; {} for other rewards."""
    return {name: values for member in getattr(reward, "rewards", [reward]) for name, values in getattr(member, "values", {}).items()}


def call_reward(reward, prompts, responses, references=None):
    """Scores (B,) float32 of any reward; one that returns the wrong number of scores is an InputError."""
    references = [None] * len(prompts) if references is None else references
    name = getattr(reward, "__name__", type(reward).__name__)
    try:
        returned = reward(list(prompts), list(responses), list(references))  # it may keep or change its lists
    except Exception as error:
        error.add_note(f"in the reward {name}")
        raise
    try:
        if isinstance(returned, np.ndarray):
            returned = torch.as_tensor(np.ascontiguousarray(returned))  # torch takes no reversed view
        if isinstance(returned, torch.Tensor) and returned.is_complex():
            raise TypeError("complex numbers")
        scores = torch.as_tensor(returned, dtype=torch.float32).flatten()
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise InputError(f"the reward {name} returned {repr(returned)[:60]}; it must return one number a response") from None
    if len(scores) != len(prompts):
        raise InputError(f"the reward {name} returned {len(scores)} scores for {len(prompts)} responses; it must return one a response")
    return scores
