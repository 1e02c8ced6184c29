"""RoBERTa / CodeBERT (Liu et al. 2019; Feng et al. 2020) and BERT (Devlin et al. 2019): one encoder.

Reward models and BERTScore read text with it.

The network is the same in both: token + position + segment embeddings, then layers of bidirectional attention and a
two-layer MLP, each followed by add-and-norm (post-norm), with the exact GELU. All that differs stands in `FAMILIES` and
`position_ids`:

                      RoBERTa, CodeBERT                  BERT
    positions         from pad_token_id + 1 = 2          from 0
    position rows     514 hold 512 tokens                512 hold 512
    segments          1 (all zeros)                      2 (prompt 0, response 1)
    layer norm eps    1e-5                               1e-12
    pad id            1                                  0
    classifier        token 0 -> dense, tanh, out_proj   token 0 -> pooler dense, tanh, classifier

Parameter names are those of the Hugging Face files. Evidence of equality: tests/test_encoder.py against transformers.

Deviations from transformers: positions count real tokens, so padding on the left leaves real tokens unchanged for BERT
too (transformers numbers BERT's columns, padding included); the classifier reads the first real token, not column 0.
The pooler that BERT folders carry belongs to the classification head; a bare `Encoder` leaves it aside and saves none.
"""

from dataclasses import asdict, dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import nn

from . import hf
from .errors import InputError, naming, nearest

FAMILIES = {  # what the released base models have
    "roberta": {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5,
                "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
    "bert": {"vocab_size": 30522, "max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12,
             "pad_token_id": 0},
}
# What a config.json means that leaves these out: transformers falls back to BERT's values for RoBERTa as well.
UNSAID = {"max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12}
NOT_IMPLEMENTED = {  # keys of config.json that change the mathematics, with the one value that is implemented
    "hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False,
    "quantization_config": None,
}
# Tensors of pretraining heads, and constants that old files store: no part of the encoder or of a classifier.
IGNORED = ("lm_head.", "cls.", "embeddings.position_ids", "embeddings.token_type_ids")
HEADS = ("pooler.", "classifier.")


@dataclass
class EncoderConfig:
    """Shape and settings, under the field names of a Hugging Face config.json; None means the family's own value."""
    model_type: str = "roberta"                  # "roberta" (CodeBERT too) or "bert"
    vocab_size: int | None = None
    hidden_size: int = 768                       # C
    num_hidden_layers: int = 12
    num_attention_heads: int = 12                # H
    intermediate_size: int = 3072                # width of the MLP
    max_position_embeddings: int | None = None   # rows of the position table; see `max_tokens`
    type_vocab_size: int | None = None
    layer_norm_eps: float | None = None
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None      # None means hidden_dropout_prob
    initializer_range: float = 0.02
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def __post_init__(self):
        if not isinstance(self.model_type, str) or self.model_type not in FAMILIES:
            close = nearest(self.model_type, FAMILIES)
            raise InputError(f"encoder config: model_type {self.model_type!r} is not implemented; known are "
                             f"{', '.join(FAMILIES)}" + (f" (did you mean {close}?)" if close else ""))
        for name, value in FAMILIES[self.model_type].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        hf.check_sizes(self, ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                              "max_position_embeddings", "type_vocab_size"), "encoder")
        dropouts = ("hidden_dropout_prob", "attention_probs_dropout_prob")
        hf.check_numbers(self, dropouts if self.classifier_dropout is None else (*dropouts, "classifier_dropout"), "encoder", below=1)
        hf.check_numbers(self, ("layer_norm_eps", "initializer_range"), "encoder")
        if type(self.pad_token_id) is not int or not 0 <= self.pad_token_id < self.vocab_size or self.max_tokens < 1:
            raise InputError(f"encoder config: pad_token_id {self.pad_token_id!r} does not go with a vocabulary of {self.vocab_size} "
                             f"and {self.max_position_embeddings} positions: correct it")
        if self.hidden_size % self.num_attention_heads:
            raise InputError(f"encoder config: hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                             f"{self.num_attention_heads}: change one of them")

    @property
    def max_tokens(self):
        """The longest sequence: RoBERTa's first pad_token_id + 1 position rows are never a token's."""
        return self.max_position_embeddings - (self.pad_token_id + 1 if self.model_type == "roberta" else 0)

    @classmethod
    def from_dict(cls, settings):
        """From the dict of a config.json. Keys that do not matter here are left out, those we cannot honour refused."""
        for key, implemented in NOT_IMPLEMENTED.items():
            if settings.get(key, implemented) != implemented:
                raise InputError(f"encoder config: {key} = {settings[key]!r} is not implemented, only {implemented!r}: take "
                                 "another model")
        settings = {**UNSAID, "model_type": _model_type(settings), **settings}
        return cls(**{field.name: settings[field.name] for field in fields(cls) if field.name in settings})

    def to_dict(self, architecture="Model"):
        """The dict of a config.json; `architecture` is the end of the transformers class name, as in RobertaModel."""
        name = {"roberta": "Roberta", "bert": "Bert"}[self.model_type] + architecture
        return {"architectures": [name], **asdict(self), "hidden_act": "gelu"}


def _model_type(settings):
    """Files from 2019 do not say `model_type`; the class name in `architectures` then does."""
    if settings.get("model_type"):
        return settings["model_type"]
    for family in FAMILIES:
        if hf.is_model_type({**settings, "model_type": None}, family):
            return family
    raise InputError('encoder config: config.json has neither "model_type" nor "architectures"; '
                     'add "model_type": "roberta" or "bert"')


def position_ids(config, input_ids, attention_mask=None):
    """Row of the position table for each token, (B, T). It counts real tokens: padding on either side changes nothing.

    RoBERTa: cumsum(ids != pad) * mask + pad_token_id, so that the first token has row 2 and pads have row 1, as it was
    trained. BERT: cumsum(mask) - 1, clamped at 0 for pads on the left.
    """
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if config.model_type == "roberta":
        real = real & (input_ids != config.pad_token_id)
        return real.cumsum(-1) * real + config.pad_token_id
    return (real.cumsum(-1) - 1).clamp(min=0)


class Embeddings(nn.Module):
    """LayerNorm(token + position + segment)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids, attention_mask, token_type_ids):
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        positions = position_ids(self.config, input_ids, attention_mask)  # (B, T)
        x = self.word_embeddings(input_ids) + self.position_embeddings(positions)  # (B, T, C)
        return self.dropout(self.LayerNorm(x + self.token_type_embeddings(token_type_ids)))


class SelfAttention(nn.Module):
    """softmax(q k' / sqrt(D)) v in H heads, over all real tokens."""

    def __init__(self, config):
        super().__init__()
        self.heads, self.dropout = config.num_attention_heads, config.attention_probs_dropout_prob
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, allowed):
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, T, D)
                   for layer in (self.query, self.key, self.value))
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=dropout)
        return out.transpose(1, 2).flatten(2)  # (B, T, C)


class AddNorm(nn.Module):
    """LayerNorm(residual + dropout(dense(x))): how both halves of a layer end."""

    def __init__(self, config, width):
        super().__init__()
        self.dense = nn.Linear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x, residual):
        return self.LayerNorm(residual + self.dropout(self.dense(x)))


class Layer(nn.Module):
    """Attention, then MLP. The nesting is that of the tensor names: attention.self.query, intermediate.dense, ..."""

    def __init__(self, config):
        super().__init__()
        self.attention = nn.ModuleDict({"self": SelfAttention(config), "output": AddNorm(config, config.hidden_size)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.intermediate_size)})
        self.output = AddNorm(config, config.intermediate_size)

    def forward(self, x, allowed):
        x = self.attention["output"](self.attention["self"](x, allowed), residual=x)
        return self.output(F.gelu(self.intermediate["dense"](x)), residual=x)


class Encoder(nn.Module):
    """input_ids (B, T) int64 -> hidden states (B, T, C). Built in eval mode by `from_config` and `from_pretrained`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))})
        self.apply(self._init)

    def _init(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def forward(self, input_ids, attention_mask=None, token_type_ids=None):
        """Hidden states of the last layer (B, T, C). `attention_mask` (B, T) is 1 on real tokens; None means all are.

        `token_type_ids` (B, T): BERT's segments, None means all 0. States of pads are meaningless (but finite). Raises
        InputError when T exceeds `config.max_tokens`.
        """
        for x in self._states(input_ids, attention_mask, token_type_ids):
            pass
        return x

    def all_layers(self, input_ids, attention_mask=None, token_type_ids=None):
        """A list of num_hidden_layers + 1 tensors (B, T, C): [0] the embeddings, [n] the output of layer n."""
        return list(self._states(input_ids, attention_mask, token_type_ids))

    def _states(self, input_ids, attention_mask, token_type_ids):
        if input_ids.size(1) > self.config.max_tokens:
            raise InputError(f"the encoder got {input_ids.size(1)} tokens but has positions for "
                             f"{self.config.max_tokens}; cut the text with the tokenizer's max_length")
        allowed = None
        if attention_mask is not None:
            # (B, 1, 1, T), broadcast over (B, H, T, T); a row of pads alone attends to nothing, which torch makes 0
            allowed = attention_mask.bool()[:, None, None, :]
        x = self.embeddings(input_ids, attention_mask, token_type_ids)  # (B, T, C)
        yield x
        for layer in self.encoder["layer"]:
            x = layer(x, allowed)
            yield x

    @classmethod
    def from_config(cls, config):
        """An encoder with random weights (torch's global generator), in eval mode."""
        return cls(config).eval()

    @classmethod
    def from_pretrained(cls, folder_or_name, dtype=torch.float32):
        """An encoder from a Hugging Face folder, cache or download (see `hf.resolve`), in eval mode and in `dtype`.

        Folders of classifiers and language models are fine: their heads are left aside.
        """
        folder = hf.resolve(folder_or_name)
        settings = hf.read_config(folder)
        hf.check_model_type(settings, tuple(FAMILIES), folder)
        with naming(folder / "config.json"):
            config = EncoderConfig.from_dict(settings)
        encoder, rest = cls.from_state(config, hf.read_weights(folder), folder, dtype)
        if unknown := [name for name in rest if not name.startswith(HEADS)]:
            raise InputError(f"{folder} has tensors that an encoder does not: {', '.join(unknown[:3])}; name an encoder's folder")
        return encoder

    @classmethod
    def from_state(cls, config, tensors, source, dtype=torch.float32):
        """(encoder, rest) from tensors under their Hugging Face names, with or without the prefix "roberta." / "bert.".

        `rest` holds the tensors that are not the encoder's, such as "classifier.dense.weight" and, without the prefix,
        "pooler.dense.weight": see `read_head`. The tensors are believed before the config: the embedding's rows give
        vocab_size.
        """
        tensors = hf.strip_prefix(tensors, f"{config.model_type}.", source)
        tensors = {_modern(name): tensor for name, tensor in tensors.items() if not name.startswith(IGNORED)}
        words = tensors.get("embeddings.word_embeddings.weight")
        if words is not None and words.dim() == 2:
            config = replace(config, vocab_size=words.size(0))
        hf.check_layers(tensors, "encoder.layer.", config.num_hidden_layers, source)
        with torch.device("meta"):  # shapes only: no time lost on random numbers that are overwritten
            encoder = cls(config).to(dtype)
        names = encoder.state_dict().keys()
        rest = {name: tensors.pop(name) for name in list(tensors) if name not in names}
        hf.load_into(encoder, tensors, source)
        return encoder.eval(), rest

    def to_state(self):
        """The tensors under the names that transformers' models with a head have on disk, prefix and all."""
        return {f"{self.config.model_type}.{name}": tensor for name, tensor in self.state_dict().items()}

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors; transformers' AutoModel loads them (and adds a random pooler)."""
        hf.write(folder, self.to_state(), self.config.to_dict())


def _modern(name):
    """BERT files converted from TensorFlow call a layer norm's weight and bias gamma and beta."""
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


# ---------------------------------------------------------------------------------------------- sequence classification

class RobertaHead(nn.Module):
    """out_proj(tanh(dense(x))) on the first token; named as in RobertaForSequenceClassification."""

    def __init__(self, config, num_labels=1):
        super().__init__()
        self.classifier = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.hidden_size),
                                         "out_proj": nn.Linear(config.hidden_size, num_labels)})
        self.dropout = nn.Dropout(_head_dropout(config))
        _init_head(config, self.classifier["dense"], self.classifier["out_proj"])

    def forward(self, hidden, attention_mask=None):
        x = self.dropout(first_token(hidden, attention_mask))  # (B, C)
        return self.classifier["out_proj"](self.dropout(torch.tanh(self.classifier["dense"](x))))


class BertPoolerHead(nn.Module):
    """classifier(tanh(pooler.dense(x))) on the first token; named as in BertForSequenceClassification."""

    def __init__(self, config, num_labels=1):
        super().__init__()
        self.pooler = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.hidden_size)})
        self.classifier = nn.Linear(config.hidden_size, num_labels)
        self.dropout = nn.Dropout(_head_dropout(config))
        _init_head(config, self.pooler["dense"], self.classifier)

    def forward(self, hidden, attention_mask=None):
        x = first_token(hidden, attention_mask)  # (B, C)
        return self.classifier(self.dropout(torch.tanh(self.pooler["dense"](x))))


def first_token(hidden, attention_mask=None):
    """The state (B, C) of the first real token: column 0, or where the padding on the left ends."""
    if attention_mask is None:
        return hidden[:, 0]
    first = attention_mask.long().argmax(-1)  # (B,) argmax finds the first 1
    return hidden[torch.arange(len(hidden), device=hidden.device), first]


def _head_dropout(config):
    return config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout


def _init_head(config, dense, out):
    """The last layer starts with std 1 / sqrt(C + 1), as reward heads do (Stiennon et al. 2020)."""
    nn.init.normal_(dense.weight, std=config.initializer_range)
    nn.init.zeros_(dense.bias)
    nn.init.normal_(out.weight, std=(config.hidden_size + 1) ** -0.5)
    nn.init.zeros_(out.bias)


def new_head(config, num_labels=1):
    """The family's classification head, random weights, in eval mode: hidden (B, T, C) -> logits (B, num_labels)."""
    return {"roberta": RobertaHead, "bert": BertPoolerHead}[config.model_type](config, num_labels).eval()


def read_head(config, rest, source):
    """The head in the tensors that `Encoder.from_state` left over; as many labels as its last layer has rows.

    An InputError where `rest` has none (the folder of a bare encoder or a language model).
    """
    if config.model_type == "roberta":  # some files carry a pooler, which RoBERTa's classifier does not use
        rest = {name: tensor for name, tensor in rest.items() if not name.startswith("pooler.")}
    out = rest.get("classifier.out_proj.weight", rest.get("classifier.weight"))
    if out is None:
        raise InputError(f"{source} has no classification head (no tensor classifier.*): it is no reward model; "
                         "train one with train_reward.py")
    head = new_head(config, num_labels=len(out) if out.dim() else 1)
    hf.load_into(head, rest, source)
    return head


def classifier_scores(encoder, head, input_ids, attention_mask=None, token_type_ids=None):
    """Logits (B, labels) of encoder and head; those of transformers' ...ForSequenceClassification."""
    return head(encoder(input_ids, attention_mask, token_type_ids), attention_mask)


def classifier_state(encoder, head):
    """The tensors of both under the names that transformers' ...ForSequenceClassification has on disk."""
    prefix = encoder.config.model_type + "."
    names = {name: prefix + name if name.startswith("pooler.") else name for name in head.state_dict()}
    return encoder.to_state() | {names[name]: tensor for name, tensor in head.state_dict().items()}
