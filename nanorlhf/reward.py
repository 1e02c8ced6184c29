"""Rewards: models that score a response, ensembles of them, and any function of the user's.

A reward is a callable: reward(prompts, responses, references) -> (B,) scores. `load_reward` makes one from what the
command line says. Reward models read text, not token ids: their tokenizer and backbone are their own, whatever the policy's.
"""
import importlib
import json
import os
import sys
from pathlib import Path

import torch
from torch import nn

from nanorlhf import encoder as encoders
from nanorlhf import hf
from nanorlhf.data import format_query
from nanorlhf.encoder import Encoder, EncoderConfig
from nanorlhf.errors import InputError, naming, nearest
from nanorlhf.gpt2 import GPT2, GPT2Config
from nanorlhf.sequences import join
from nanorlhf.tokenizer import Tokenizer

SETTINGS = "reward_model.json"


class LastToken(nn.Module):
    """One linear layer on the hidden state of the last real token: GPT2ForSequenceClassification's head, without bias."""

    def __init__(self, width):
        super().__init__()
        self.score = nn.Linear(width, 1, bias=False)
        nn.init.normal_(self.score.weight, std=(width + 1) ** -0.5)  # Stiennon et al. 2020, appendix B.1

    def forward(self, hidden, attention_mask):
        last = attention_mask.sum(1) - 1  # (B,) right-padded: the column of the last real token
        return self.score(hidden[torch.arange(len(hidden), device=hidden.device), last])  # (B, 1)


class RewardModel(nn.Module):
    """score = gain * head(backbone(prompt, response)) + bias: one number a response.

    A GPT-2 backbone reads query, response and EOS, and its head is one linear layer on the last token. An encoder reads prompt
    and response as a pair, and its head is that of its family's sequence classifier. Folders are transformers' (GPT2-,
    Roberta- or BertForSequenceClassification with one label, whose logit is the raw score), with gain, bias and template in
    reward_model.json beside it.

    gain and bias are set after training, so that the scores of the SFT policy's samples have mean 0 and variance 1
    (`normalise`): a KL coefficient then means the same for every reward model.
    """

    def __init__(self, backbone, head, tokenizer, template="{prompt}\n", max_length=None):
        super().__init__()
        self.backbone, self.head, self.tokenizer, self.template = backbone, head, tokenizer, template
        longest = backbone.config.n_positions if isinstance(backbone, GPT2) else backbone.config.max_tokens
        self.max_length = min(max_length or longest, longest)
        self.gain, self.bias = 1.0, 0.0
        self.cut = 0  # inputs longer than max_length so far, each as often as it was read

    @property
    def device(self):
        return next(self.parameters()).device

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

    def forward(self, ids, attention_mask, segments):
        """Raw scores (B,), float32, before gain and bias; gradient flows."""
        hidden = (self.backbone.hidden(ids, attention_mask) if isinstance(self.backbone, GPT2) else
                  self.backbone(ids, attention_mask, segments))  # (B, T, C)
        return self.head(hidden, attention_mask).squeeze(1).float()

    @torch.no_grad()
    def score(self, prompts, responses, batch_size=128):
        """Scores of responses to prompts, lists of B texts -> (B,) float32. Rows of similar length are scored together."""
        if len(prompts) != len(responses):
            raise ValueError(f"{len(prompts)} prompts but {len(responses)} responses")
        was_training = self.training
        self.eval()
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(responses[i]))
        scores = torch.zeros(len(prompts), device=self.device)
        for start in range(0, len(order), batch_size):
            rows = order[start:start + batch_size]
            inputs = self.encode([prompts[i] for i in rows], [responses[i] for i in rows])
            scores[rows] = self(*(x.to(self.device) for x in inputs))
        self.train(was_training)
        return self.gain * scores + self.bias

    def __call__(self, *args, **kwargs):
        """As a module on tensors, and as a reward on texts: model(prompts, responses, references)."""
        if args and not torch.is_tensor(args[0]):
            return self.score(args[0], args[1])
        return super().__call__(*args, **kwargs)

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
    def from_pretrained(cls, folder_or_name, new_head=False, template=None, max_length=None):
        """A reward model from a folder; with `new_head`, a fresh head on the folder's language model or encoder.

        Without `new_head` a folder that holds no head is an InputError: it is not a reward model.
        """
        folder = hf.resolve(folder_or_name)
        settings = hf.read_config(folder)
        hf.check_model_type(settings, ("gpt2", "roberta", "bert"), folder)
        stored = _read_settings(folder / SETTINGS)
        build = _build_gpt2 if hf.is_model_type(settings, "gpt2") else _build_encoder
        backbone, head = build(folder, settings, new_head)
        model = cls(backbone, head, Tokenizer.from_pretrained(folder), template or stored.get("template", "{prompt}\n"),
                    max_length or stored.get("max_length"))
        model.tokenizer.check_fits(backbone.config.vocab_size, folder)
        if not new_head:
            model.gain, model.bias = stored.get("gain", 1.0), stored.get("bias", 0.0)
        return model.eval()

    def save_pretrained(self, folder):
        """Write weights, config, tokenizer and reward_model.json; AutoModelForSequenceClassification gives the raw score."""
        config, tensors = self._to_state()
        hf.write(folder, tensors, config)
        self.tokenizer.save_pretrained(folder)
        settings = {"gain": self.gain, "bias": self.bias, "template": self.template, "max_length": self.max_length}
        (Path(folder) / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n")

    def _to_state(self):
        """(config.json's dict, tensors under transformers' names)."""
        one_label = {"num_labels": 1, "id2label": {"0": "score"}, "label2id": {"score": 0}}
        if not isinstance(self.backbone, GPT2):
            config = self.backbone.config.to_dict("ForSequenceClassification")
            return config | one_label, encoders.classifier_state(self.backbone, self.head)
        # transformers looks for the last token that is not padding: with pad == eos it would stop before our EOS
        pad_id = self.tokenizer.pad_id if self.tokenizer.pad_id != self.tokenizer.eos_id else None
        config = {**self.backbone.config.to_dict(), "architectures": ["GPT2ForSequenceClassification"],
                  "pad_token_id": pad_id, "tie_word_embeddings": True}  # there is no head to untie
        tensors = {name: tensor for name, tensor in self.backbone.to_state().items() if not name.startswith("lm_head.")}
        return config | one_label, tensors | self.head.state_dict()


def _read_settings(path):
    """What reward_model.json says of gain, bias, template and max_length; {} where there is no such file."""
    stored = hf.read_json(path) if path.is_file() else {}
    sound = {"gain": _is_finite, "bias": _is_finite, "template": lambda value: isinstance(value, str) and "{prompt}" in value,
             "max_length": lambda value: value is None or type(value) is int and value > 0}
    for name, is_sound in sound.items():
        if name in stored and not is_sound(stored[name]):
            raise InputError(f"{path}: {name} is {repr(stored[name])[:60]}, which it cannot be: mend it, or train the model again")
    return stored


def _is_finite(value):
    return type(value) in (int, float) and abs(value) < 1e30


def _build_gpt2(folder, settings, new_head):
    """(GPT2, LastToken) from a folder."""
    tensors = hf.read_weights(folder)
    if "lm_head.weight" not in tensors:  # a classifier: nothing to untie, whatever its config says
        settings = {**settings, "tie_word_embeddings": True}
    with naming(folder / "config.json"):
        config = GPT2Config.from_dict(settings)
    backbone, rest = GPT2.from_state(config, tensors, folder)
    head = LastToken(backbone.config.n_embd)
    if not new_head:
        if "score.weight" not in rest:
            raise InputError(f"{folder} has no classification head (no tensor score.weight): it is a language model, not a reward "
                             f"model; train one with: python train_reward.py --model {folder}")
        hf.load_into(head, rest, folder)
    return backbone, head


def _build_encoder(folder, settings, new_head):
    """(Encoder, the head of its family's sequence classifier) from a folder."""
    with naming(folder / "config.json"):
        config = EncoderConfig.from_dict(settings)
    backbone, rest = Encoder.from_state(config, hf.read_weights(folder), folder)
    head = encoders.new_head(backbone.config) if new_head else encoders.read_head(backbone.config, rest, folder)
    if sum(p.shape[0] for name, p in head.named_parameters() if name.endswith(("classifier.bias", "out_proj.bias"))) != 1:
        raise InputError(f"{folder} classifies into several labels; a reward model has one: train one with train_reward.py")
    return backbone, head


class RewardEnsemble:
    """Several rewards as one: the mean, the minimum, or the mean minus the standard deviation of their scores.

    The last two distrust what the members disagree about (Coste et al. 2023, "Reward Model Ensembles Help Mitigate
    Overoptimization"). `.disagreement` is the standard deviation of each row of the latest call.

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
        self.disagreement = scores.std(0, unbiased=False)  # (B,)
        if self.combine == "min":
            return scores.min(0).values
        return scores.mean(0) - (self.disagreement if self.combine == "mean-std" else 0)

    def score(self, prompts, responses):
        """Scores (B,) without references."""
        return self(prompts, responses, [None] * len(prompts))


def call_reward(reward, prompts, responses, references=None):
    """Scores (B,) float32 of any reward; one that returns the wrong number of scores is an InputError."""
    references = [None] * len(prompts) if references is None else references
    name, returned = getattr(reward, "__name__", type(reward).__name__), reward(prompts, responses, references)
    try:
        scores = torch.as_tensor(returned, dtype=torch.float32).flatten()
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"the reward {name} returned {repr(returned)[:60]}; it must return one number a response") from None
    if len(scores) != len(prompts):
        raise InputError(f"the reward {name} returned {len(scores)} scores for {len(prompts)} responses; it must return one a response")
    return scores


def load_reward(specs, combine="mean", device="cpu"):
    """The reward that --reward names: a folder, several folders (an ensemble), or module:function.

    Args: specs, a list of strings; combine, how an ensemble combines; device, where models go.
    """
    rewards = [_function(spec) if _is_function(spec) else RewardModel.from_pretrained(spec).to(device) for spec in specs]
    return rewards[0] if len(rewards) == 1 else RewardEnsemble(rewards, combine)


def _is_function(spec):
    return ":" in spec and not os.path.exists(spec)


def _function(spec):
    """module:function -> the function; the module is looked for in the working directory too."""
    module_name, _, name = spec.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), name]):
        raise InputError(f"--reward {spec}: neither a folder nor module:function, such as my_rewards:length")
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise InputError(f"--reward {spec}: no module {error.name!r}; it is looked for in {os.getcwd()} and on the Python path") \
            from None
    except SyntaxError as error:
        raise InputError(f"--reward {spec}: {error.filename}:{error.lineno}: {error.msg}; mend it there") from None
    finally:
        sys.path.pop(0)
    function = getattr(module, name, None)
    if not callable(function):
        near = nearest(name, dir(module), cutoff=0.7)
        raise InputError(f"--reward {spec}: {module_name} has no function {name!r}; " +
                         (f"did you mean {near}?" if near else "name one that it defines"))
    return function
