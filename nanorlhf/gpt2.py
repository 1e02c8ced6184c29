"""GPT-2 (Radford et al. 2019): the policy, the reference model, and the policy with a value head.

Parameter names and layouts are those of the Hugging Face files, so that a folder maps one to one onto the modules: the
projections are `Conv1D`, whose weight is stored [in, out], the transpose of nn.Linear's. Evidence of equality:
tests/test_gpt2.py against transformers.

Positions come from the attention mask (`cumsum - 1`), not from the column: padding on either side leaves the logits of
real tokens unchanged. Masks are 1 on real tokens; masked keys are never attended to, except that a pad attends to
itself, which keeps its (meaningless) row and every gradient finite.

Deviations from transformers: models are built in eval mode (dropout is off in PPO and DPO; SFT calls `.train()`);
cross-attention and the attention variants that no released GPT-2 uses are refused, not ignored.
"""

import json
import re
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from . import hf
from .errors import InputError, naming, nearest

GELU_TANH = partial(F.gelu, approximate="tanh")  # GPT-2's own approximation
ACTIVATIONS = {"gelu_new": GELU_TANH, "gelu_pytorch_tanh": GELU_TANH, "gelu": F.gelu, "relu": F.relu}
SIZES = {  # the released models: width, layers, heads; 124, 355, 774 and 1558 million parameters
    "gpt2": (768, 12, 12),
    "gpt2-medium": (1024, 24, 16),
    "gpt2-large": (1280, 36, 20),
    "gpt2-xl": (1600, 48, 25),
}
SYNONYMS = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions"}
NOT_IMPLEMENTED = {  # keys of config.json that change the mathematics, with the one value that is implemented
    "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False,
    "add_cross_attention": False, "quantization_config": None,
}
CAUSAL_BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # old files store the causal mask as a tensor


@dataclass
class GPT2Config:
    """Shape and settings, under the field names of a Hugging Face config.json. The defaults are GPT-2 small."""
    vocab_size: int = 50257
    n_positions: int = 1024                  # the longest sequence
    n_embd: int = 768                        # C
    n_layer: int = 12
    n_head: int = 12                         # H
    n_inner: int | None = None               # width of the MLP; None means 4 * n_embd
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self):
        sizes = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
        hf.check_sizes(self, sizes if self.n_inner is None else (*sizes, "n_inner"), "GPT-2")
        hf.check_numbers(self, ("resid_pdrop", "embd_pdrop", "attn_pdrop"), "GPT-2", below=1)
        hf.check_numbers(self, ("layer_norm_epsilon", "initializer_range"), "GPT-2")
        if self.n_embd % self.n_head:
            raise InputError(f"GPT-2 config: n_embd {self.n_embd} is not a multiple of n_head {self.n_head}: change one of them")
        if not isinstance(self.activation_function, str) or self.activation_function not in ACTIVATIONS:
            close = nearest(self.activation_function, ACTIVATIONS)
            raise InputError(f"GPT-2 config: activation_function {self.activation_function!r} is not implemented; "
                             f"known are {', '.join(ACTIVATIONS)}" + (f" (did you mean {close}?)" if close else ""))

    @classmethod
    def preset(cls, name, **changes):
        """The shape of a released model: "gpt2", "gpt2-medium", "gpt2-large" or "gpt2-xl", with `changes`."""
        if name not in SIZES:
            raise InputError(f"no GPT-2 preset {name!r}; there are {', '.join(SIZES)}")
        width, layers, heads = SIZES[name]
        return cls(**{"n_embd": width, "n_layer": layers, "n_head": heads,
                      "bos_token_id": 50256, "eos_token_id": 50256, **changes})

    @classmethod
    def from_dict(cls, settings):
        """From the dict of a config.json. Keys that do not matter here are left out, those we cannot honour refused."""
        for key, implemented in NOT_IMPLEMENTED.items():
            if settings.get(key, implemented) != implemented:
                raise InputError(f"GPT-2 config: {key} = {settings[key]!r} is not implemented, only {implemented!r}: take "
                                 "another model")
        settings = {SYNONYMS.get(key, key): value for key, value in settings.items()}
        return cls(**{field.name: settings[field.name] for field in fields(cls) if field.name in settings})

    def to_dict(self):
        """The dict of a config.json that transformers reads as GPT2LMHeadModel."""
        return {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **asdict(self)}


class KVCache:
    """Keys and values of the tokens seen so far, so that a new token costs one position, not a whole sequence.

    The memory is laid out once, (batch, H, max_length, D) for each layer, and written in place: a step copies T new
    columns, never the past. For sampling, under `torch.no_grad()`: autograd cannot go back through the writes.
    """

    def __init__(self, config, batch_size, max_length, device=None, dtype=torch.float32):
        shape = (config.n_layer, batch_size, config.n_head, max_length, config.n_embd // config.n_head)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)    # (layers, B, H, max_length, D)
        self.values = torch.zeros(shape, device=device, dtype=dtype)  # (layers, B, H, max_length, D)
        self.length = 0  # columns in use, the same in every row and layer

    @property
    def max_length(self):
        return self.keys.size(3)

    def update(self, layer, k, v):
        """Append k, v (B, H, T, D) for one layer; returns all of its columns. `GPT2.hidden` then moves `length` on."""
        end = self.length + k.size(2)
        self.keys[layer, :, :, self.length:end] = k
        self.values[layer, :, :, self.length:end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def keep(self, rows):
        """Forget all but some rows, an index or a mask (batch,)."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]


class Conv1D(nn.Module):
    """x @ weight + bias with weight (in, out): GPT-2's name and layout for a linear layer."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out))
        self.bias = nn.Parameter(torch.empty(n_out))

    def forward(self, x):
        return F.linear(x, self.weight.t(), self.bias)


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config, layer):
        super().__init__()
        self.n_head, self.layer, self.dropout = config.n_head, layer, config.attn_pdrop
        self.c_attn = Conv1D(config.n_embd, 3 * config.n_embd)  # query, key and value side by side
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x, allowed, cache):
        """x (B, T, C) -> (B, T, C). allowed: a mask that broadcasts to (B, H, T, S), None: causal; cache: this layer's, or None."""
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=allowed, is_causal=allowed is None and T > 1,  # one new token may see all of its past
            dropout_p=self.dropout if self.training else 0.0)  # (B, H, T, D)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.n_inner or 4 * config.n_embd
        self.c_fc = Conv1D(config.n_embd, width)
        self.c_proj = Conv1D(width, config.n_embd)
        self.activation = ACTIVATIONS[config.activation_function]
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x):
        return self.dropout(self.c_proj(self.activation(self.c_fc(x))))


class Block(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x, allowed, cache):
        x = x + self.attn(self.ln_1(x), allowed, cache)
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    """The language model. Build it with `from_config` (random) or `from_pretrained`; both give it in eval mode."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self._initialise()

    @torch.no_grad()
    def _initialise(self):
        """Normal(0, initializer_range) weights, zero biases; the two projections of each layer that write to the
        residual stream are scaled by 1/sqrt(2 * n_layer), so that its variance does not grow with depth
        (Radford et al. 2019, section 2.3)."""
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif "ln_" not in name:  # layer norms start at one
                parameter.normal_(0.0, std / (2 * self.config.n_layer) ** 0.5 if "c_proj" in name else std)

    # ------------------------------------------------------------------------------------------------------- compute

    def forward(self, input_ids, attention_mask=None, cache=None):
        """Logits of the next token at every position.

        Args: input_ids (B, T) int64; attention_mask (B, T), 1 or True on real tokens, None for no padding; with a
            `cache` of length P, input_ids are the new tokens only and attention_mask is (B, P + T), past and new.
        Returns: (B, T, V) in the dtype of the weights. Rows of pads are finite and mean nothing.
        Raises: InputError when P + T exceeds n_positions, or a shape or a token id does not fit.
        """
        return self.logits(self.hidden(input_ids, attention_mask, cache))

    def hidden(self, input_ids, attention_mask=None, cache=None):
        """Hidden states after the final layer norm, (B, T, C); arguments as in `forward`."""
        past = 0 if cache is None else cache.length
        self._check(input_ids, attention_mask, cache, past)
        x = self.wte(input_ids) + self.wpe(position_ids(input_ids, attention_mask, past))  # (B, T, C)
        x = self.drop(x)
        allowed = attention_allowed(input_ids, attention_mask, past)
        for block in self.h:
            x = block(x, allowed, cache)
        if cache is not None:
            cache.length += input_ids.size(1)
        return self.ln_f(x)

    def logits(self, hidden):
        """Hidden states (..., C) to logits (..., V), in the weights' precision under autocast too: GPT-2's logits lie at -30 to -100,
        where bfloat16 has steps of 0.25 and 0.5, and no softmax can undo that."""
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.to(self.output_weight.dtype), self.output_weight)

    @property
    def output_weight(self):
        """(V, C): the embedding itself where the head is tied to it."""
        return self.wte.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def check_length(self, tokens):
        """InputError unless a query and a response of `tokens` in all fit the positions."""
        if tokens > self.config.n_positions:
            raise InputError(f"--max-query and --max-response come to {tokens} tokens, more than the {self.config.n_positions} "
                             "positions of this model: lower one of them")

    def new_cache(self, batch_size, max_length):
        """An empty `KVCache` for sequences of up to `max_length` tokens, on this model's device and in its dtype."""
        return KVCache(self.config, batch_size, max_length, self.wte.weight.device, self.wte.weight.dtype)

    def _check(self, input_ids, attention_mask, cache, past):
        if input_ids.dim() != 2:
            raise InputError(f"input_ids must be (B, T), not {tuple(input_ids.shape)}")
        total = past + input_ids.size(1)
        if total > self.config.n_positions:
            raise InputError(f"a sequence of {total} tokens is longer than the {self.config.n_positions} positions of "
                             "this model (n_positions): shorten the prompt or the response")
        if cache is not None and total > cache.max_length:
            raise InputError(f"a sequence of {total} tokens does not fit a KVCache of max_length {cache.max_length}")
        if attention_mask is not None and attention_mask.shape != (input_ids.size(0), total):
            raise InputError(f"attention_mask is {tuple(attention_mask.shape)}, it must be (B, T) = "
                             f"{(input_ids.size(0), total)}, covering the {past} cached and all new tokens")
        # On a GPU this would wait for the device, which itself stops on a bad index.
        if input_ids.device.type == "cpu" and input_ids.numel() and (
                int(input_ids.max()) >= self.config.vocab_size or int(input_ids.min()) < 0):
            bad = input_ids.max() if input_ids.max() >= self.config.vocab_size else input_ids.min()
            raise InputError(f"token id {int(bad)} is outside the vocabulary of {self.config.vocab_size}: "
                             "is the tokenizer this model's?")

    # --------------------------------------------------------------------------------------------------- make and save

    @property
    def device(self):
        return self.wte.weight.device

    def num_parameters(self):
        """Number of parameters, a tied head counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    @classmethod
    def from_config(cls, config):
        """A model with random weights (torch's global generator), in eval mode."""
        return cls(config).eval()

    @classmethod
    def from_pretrained(cls, folder_or_name, dtype=torch.float32):
        """A GPT-2 from a Hugging Face folder, cache or download (see `hf.resolve`), in eval mode and in `dtype`."""
        folder = hf.resolve(folder_or_name)
        settings = hf.read_config(folder)
        hf.check_model_type(settings, ("gpt2",), folder)
        with naming(folder / "config.json"):
            config = GPT2Config.from_dict(settings)
        model, rest = cls.from_state(config, hf.read_weights(folder), folder, dtype)
        if rest:
            raise InputError(f"{folder} has tensors that a GPT-2 language model does not: {', '.join(list(rest)[:3])}; name a language "
                             "model's folder")
        return model

    @classmethod
    def from_state(cls, config, tensors, source, dtype=torch.float32):
        """(model, rest) from tensors under their Hugging Face names, with or without the prefix "transformer.".

        `rest` holds the tensors that are not the language model's, such as the "score.weight" of a classifier. The
        tensors are believed before the config: the embedding's rows give vocab_size, and an lm_head.weight that differs
        from the embedding means an untied head.
        """
        tensors = {name: tensor for name, tensor in hf.strip_prefix(tensors, "transformer.", source).items()
                   if not CAUSAL_BUFFERS.fullmatch(name)}
        wte, head = tensors.get("wte.weight"), tensors.get("lm_head.weight")
        if wte is not None and wte.dim() == 2:
            config = replace(config, vocab_size=wte.size(0))
        if head is not None and config.tie_word_embeddings:
            if wte is not None and torch.equal(wte, head):
                del tensors["lm_head.weight"]
            else:
                config = replace(config, tie_word_embeddings=False)
        hf.check_layers(tensors, "h.", config.n_layer, source)
        with torch.device("meta"):  # shapes only: no time lost on random numbers that are overwritten
            model = cls(config).to(dtype)
        names = model.state_dict().keys()
        rest = {name: tensors.pop(name) for name in list(tensors) if name not in names}
        hf.load_into(model, tensors, source)
        return model.eval(), rest

    def to_state(self):
        """The tensors under the names that GPT2LMHeadModel has them on disk; a tied head is left out."""
        return {name if name.startswith("lm_head.") else f"transformer.{name}": tensor
                for name, tensor in self.state_dict().items()}

    def save_pretrained(self, folder):
        """Write config.json, generation_config.json and model.safetensors; transformers' AutoModelForCausalLM loads them."""
        hf.write(folder, self.to_state(), self.config.to_dict())
        ends = {name: getattr(self.config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        (Path(folder) / "generation_config.json").write_text(json.dumps(ends, indent=1) + "\n")


def position_ids(input_ids, attention_mask=None, past=0):
    """Position of each token among the real tokens of its row: cumsum(mask) - 1, clamped at 0 for pads on the left.

    Returns (B, T), or (1, T) without a mask. `attention_mask` (B, past + T).
    """
    if attention_mask is None:
        return torch.arange(past, past + input_ids.size(1), device=input_ids.device)[None]
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:]


def attention_allowed(input_ids, attention_mask=None, past=0):
    """Which key each query may attend to: bool (B, 1, T, past + T), or None where plain causal attention says it all.

    Query i stands in column past + i. It may see real tokens at or before that column, and always itself: a row with
    nothing to attend to would be a softmax over nothing, NaN.
    """
    T = input_ids.size(1)
    if attention_mask is None and (past == 0 or T == 1):
        return None
    query = torch.arange(past, past + T, device=input_ids.device)[:, None]  # (T, 1)
    key = torch.arange(past + T, device=input_ids.device)  # (past + T)
    causal = key <= query  # (T, past + T)
    if attention_mask is None:
        return causal[None, None]
    return (causal & attention_mask.bool()[:, None, None, :]) | (key == query)


class ValueHead(nn.Linear):
    """V(s_t) from the hidden state: (..., C) -> (...), always in float32. Starts at zero, so the first values are 0."""

    def __init__(self, n_embd):
        super().__init__(n_embd, 1)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden):
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.weight.float(), self.bias.float()).squeeze(-1)


class PolicyWithValue(nn.Module):
    """A policy and a value head on one shared transformer: one forward gives logits and values."""

    def __init__(self, gpt2):
        super().__init__()
        self.policy = gpt2
        self.value_head = ValueHead(gpt2.config.n_embd).to(gpt2.device)
        self.train(gpt2.training)

    def forward(self, input_ids, attention_mask=None, start=0, stop=None):
        """Logits and values at the positions start:stop of (B, T); gradients of both reach the transformer.

        Position Q - 1 predicts the first response token, T - 2 the last: with `start=Q - 1, stop=-1` the logits of the query, the
        larger part of the memory at V = 50257, are never made. PPO takes `rollout.hidden_states`, which leaves padding out too.
        Returns: logits (B, stop - start, V), values (B, stop - start) float32.
        """
        hidden = self.policy.hidden(input_ids, attention_mask)[:, start:stop]
        return self.policy.logits(hidden), self.value_head(hidden)

    def save_pretrained(self, folder):
        """The policy as GPT2 saves it, so that it loads without the head, and value_head.safetensors beside it."""
        self.policy.save_pretrained(folder)
        hf.write_tensors(Path(folder) / "value_head.safetensors", self.value_head.state_dict())

    @classmethod
    def from_pretrained(cls, folder_or_name, dtype=torch.float32):
        """Policy and value head from a folder; a folder without value_head.safetensors gives the zero head."""
        folder = hf.resolve(folder_or_name)
        model = cls(GPT2.from_pretrained(folder, dtype))
        path = folder / "value_head.safetensors"
        if path.is_file():
            hf.load_into(model.value_head, hf.read_tensors(path), path)
        return model
