"""Text to token ids and back: byte-level BPE (GPT-2, RoBERTa, CodeBERT) and WordPiece (BERT).

The `tokenizers` package does the splitting and merging. This room adds what an RLHF run needs around it: reading every
file layout of Hugging Face folders, framing a (prompt, response) pair as each encoder family was trained to see it,
truncation that never loses a response's start, padding on either side, and training a small vocabulary from nothing.

Deviations from transformers:
- Special tokens never come out of user text. transformers turns the characters "<|endoftext|>" inside a prompt into the
  real EOS id, so data can end a sequence or forge a frame; here they are ordinary text unless `allow_special=True`.
- `encode` is text only; the frame (<s>, [CLS], ...) is the business of `encode_pair`, `batch` and `batch_pairs`.
- GPT-2 has no padding token: `pad_id` is then `eos_id`. Masks come from lengths, so a real EOS is never masked.
- Ids beyond the vocabulary (the padding rows of a larger embedding can be sampled) decode to nothing.
"""

import json
from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from . import hf
from .errors import InputError, naming

EOS, PAD = "<|endoftext|>", "<|pad|>"
FILES = "tokenizer.json, vocab.json + merges.txt, vocab.txt"
ROLES = ("bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token", "mask_token")

# What each family calls its tokens where its folder does not say; and the transformers class that reads it.
FAMILIES = {
    "gpt2": ("GPT2Tokenizer", {"bos_token": EOS, "eos_token": EOS, "unk_token": EOS}),
    "roberta": ("RobertaTokenizer", {
        "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<s>",
        "sep_token": "</s>", "mask_token": "<mask>"}),
    "bert": ("BertTokenizer", {
        "pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]",
        "mask_token": "[MASK]"}),
}


class Pair(NamedTuple):
    """One framed input: token ids and, equally long, the segment of each (0 prompt, 1 response; all 0 but for BERT)."""
    ids: list[int]
    type_ids: list[int]


class Tokenizer:
    """A `tokenizers` backend, its family ("gpt2", "roberta" or "bert") and the ids of its special tokens.

    Made by `from_pretrained` or `train`. `.bos_id .eos_id .pad_id .unk_id` are ints, or None where the vocabulary has
    no such token; for BERT, [CLS] and [SEP] serve as bos and eos.
    """

    def __init__(self, backend, family, special=None, settings=None):
        """`special` maps roles such as "eos_token" to tokens; `settings` is tokenizer_config.json as it was read."""
        self.backend, self.family, self.settings = backend, family, dict(settings or {})
        self.cut = 0  # inputs that a max_length has shortened so far
        usual = FAMILIES[family][1].items()
        present = {role: token for role, token in usual if backend.token_to_id(token) is not None}
        self.special = {**present, **(special or {})}
        known = {token.content for token in backend.get_added_tokens_decoder().values()}
        backend.add_special_tokens([token for token in dict.fromkeys(self.special.values()) if token not in known])
        backend.no_padding()     # some tokenizer.json files carry fixed padding and truncation
        backend.no_truncation()
        self.bos_id = self._id("bos_token", "cls_token")
        self.eos_id = self._id("eos_token", "sep_token")
        self.cls_id = self._id("cls_token", "bos_token")
        self.sep_id = self._id("sep_token", "eos_token")
        self.unk_id = self._id("unk_token")
        pad_id = self._id("pad_token")
        self.pad_id = self.eos_id if pad_id is None else pad_id
        flagged = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        self.special_ids = flagged | {backend.token_to_id(token) for token in self.special.values()}
        if family != "gpt2" and None in (self.cls_id, self.sep_id, self.pad_id):
            names = ", ".join(FAMILIES[family][1][role] for role in ("cls_token", "sep_token", "pad_token"))
            raise InputError(f"a {family} tokenizer needs {names} in its vocabulary: get it again")

    def _id(self, *roles):
        return next((self.backend.token_to_id(self.special[role]) for role in roles if role in self.special), None)

    @property
    def vocab_size(self):
        """The rows an embedding needs: the largest id plus one, special tokens included."""
        return 1 + max(self.backend.get_vocab(with_added_tokens=True).values())

    def check_fits(self, embedding_rows, where):
        """Raises InputError when the tokenizer has ids for which the model named by `where` has no embedding row, or no
        token that ends a response."""
        if self.vocab_size > embedding_rows:
            raise InputError(f"{where}: the tokenizer has {self.vocab_size} tokens but the embedding {embedding_rows} "
                             "rows; use the tokenizer that belongs to these weights")
        if self.eos_id is None:
            raise InputError(f"{where}: the tokenizer has no token that ends a text, such as {EOS}; use the tokenizer that belongs to "
                             "these weights")

    # ---- text <-> ids

    def encode(self, text, allow_special=False):
        """The token ids of a text, without a frame. With `allow_special`, "<|endoftext|>" in it is the real token."""
        return self._encode_many([text], allow_special)[0]

    def _encode_many(self, texts, allow_special=False):
        self.backend.encode_special_tokens = not allow_special   # "encode them as text", says the name
        try:
            return [e.ids for e in self.backend.encode_batch(list(texts), add_special_tokens=False)]
        except TypeError:
            for text in texts:
                _check_text(text)
            raise

    def decode(self, ids, skip_special=True):
        """The text of token ids (a list or a 1-D tensor). Bytes that are no UTF-8 become U+FFFD."""
        ids = ids.tolist() if isinstance(ids, torch.Tensor) else list(ids)
        if skip_special:
            ids = [i for i in ids if i not in self.special_ids]
        return self.backend.decode(ids, skip_special_tokens=False)

    def _frame(self):
        """What stands before, between and after: <s> a </s></s> b </s>; [CLS] a [SEP] b [SEP]; nothing for GPT-2."""
        if self.family == "gpt2":
            return [], [], []
        return [self.cls_id], [self.sep_id] * (2 if self.family == "roberta" else 1), [self.sep_id]

    def encode_pair(self, a, b=None, max_length=None):
        """Frames a text, or a prompt `a` and a response `b`, as the family was trained to see it; returns a Pair.

        At most `max_length` ids: the prompt gives way first and loses its beginning, for its end stands next to the
        response; the response loses its end, never its start. A text alone keeps its start. For GPT-2, a and b are
        encoded apart and joined, so no token spans the boundary.
        """
        bodies = self._encode_many([a] if b is None else [a, b])
        return self._framed(bodies[0], bodies[1] if b is not None else None, max_length)

    def _framed(self, a, b, max_length):
        start, between, end = self._frame()
        room = _room(max_length, len(start) + len(end) + (len(between) if b is not None else 0))
        if b is None:
            self.cut += len(a[:room]) < len(a)
            ids = start + a[:room] + end
            return Pair(ids, [0] * len(ids))
        self.cut += room is not None and len(a) + len(b) > room
        b = b[:room]
        if room is not None:
            a = a[max(0, len(a) + len(b) - room):]
        left, right = start + a + between, b + end
        return Pair(left + right, [0] * len(left) + [int(self.family == "bert")] * len(right))

    # ---- batches

    def pad(self, rows, side):
        """The module's `pad` with this tokenizer's padding id."""
        return pad(rows, self.pad_id, side)

    def batch(self, texts, side="left", max_length=None):
        """Encodes and pads: ids (B, T) int64, mask (B, T) int64, 1 on real tokens. Encoders get their frame.

        Longer texts are cut to `max_length` where the padding would stand: on the left a query keeps its end, on the
        right a text keeps its start.
        """
        _check_list(texts)
        start, _, end = self._frame()
        room = _room(max_length, len(start) + len(end))
        rows = self._encode_many(texts)
        if room is not None:
            self.cut += sum(len(row) > room for row in rows)
            rows = [row[-room:] if side == "left" else row[:room] for row in rows]
        return self.pad([start + row + end for row in rows], side)

    def batch_pairs(self, prompts, responses, side="right", max_length=None):
        """`encode_pair` for many: (ids, mask, type_ids), each (B, T) int64."""
        _check_list(prompts), _check_list(responses)
        if len(prompts) != len(responses):
            raise InputError(f"{len(prompts)} prompts but {len(responses)} responses")
        bodies = zip(self._encode_many(prompts), self._encode_many(responses))
        pairs = [self._framed(a, b, max_length) for a, b in bodies]
        ids, mask = self.pad([pair.ids for pair in pairs], side)
        type_ids, _ = pad([pair.type_ids for pair in pairs], 0, side)
        return ids, mask, type_ids

    # ---- from and to folders

    @classmethod
    def from_pretrained(cls, folder_or_name):
        """Reads a Hugging Face tokenizer: tokenizer.json, else vocab.json + merges.txt (BPE), else vocab.txt (BERT)."""
        folder = Path(hf.resolve(folder_or_name, what="tokenizer"))
        settings = _read_json(folder / "tokenizer_config.json")
        backend, family = _read_backend(folder, settings)
        named = {**settings, **_read_json(folder / "special_tokens_map.json")}
        special = {role: _content(named[role], folder) for role in ROLES if named.get(role)}
        with naming(folder):
            return cls(backend, family, special, settings)

    @classmethod
    def train(cls, texts, vocab_size):
        """Learns a byte-level BPE of at most `vocab_size` entries: 256 bytes, "<|endoftext|>", "<|pad|>", then merges.

        Every Unicode text survives encode and decode. The same texts give the same vocabulary, whatever the process.
        """
        _check_list(texts)
        if vocab_size < 258:
            raise InputError(f"vocab_size {vocab_size}: byte-level BPE needs at least 258 (256 bytes, {EOS}, {PAD})")
        backend = tokenizers.Tokenizer(models.BPE())
        # Digits are kept apart while merges are counted, so no entry holds two of them: a constant such as 1337 is then
        # spelled by four well-trained tokens and not by a rare one, and copying it from the intent into the code is
        # learnable. No split is needed afterwards: merges that were never learned cannot join digits, and what remains
        # is GPT-2's own scheme (words and identifiers whole), which every reader of vocab.json + merges.txt knows.
        digits = pre_tokenizers.Split(tokenizers.Regex(r" ?\p{N}"), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=2, show_progress=False,
                                      special_tokens=[EOS, PAD], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
        backend.train_from_iterator(texts, trainer)
        _make_byte_level(backend)
        return cls(backend, "gpt2", {"pad_token": PAD})

    def save_pretrained(self, folder):
        """Writes tokenizer.json, vocab.json + merges.txt or vocab.txt, and the two small files AutoTokenizer reads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
        self.backend.model.save(str(folder))
        defaults = {"tokenizer_class": FAMILIES[self.family][0]}
        if self.family == "bert":
            # transformers builds BERT's normaliser from these and not from tokenizer.json
            defaults |= _bert_options(self.backend)
        _write_json(folder / "tokenizer_config.json", {**defaults, **self.settings, **self.special})
        _write_json(folder / "special_tokens_map.json", self.special)


def pad(lists, pad_id, side):
    """Pads id lists to the longest: ids (B, T) int64, mask (B, T) int64. Masks come from lengths, never from ids."""
    if side not in ("left", "right"):
        raise InputError(f"side {side!r}: padding goes on the 'left' or on the 'right'")
    width = max((len(row) for row in lists), default=0)
    ids = torch.full((len(lists), width), pad_id, dtype=torch.int64)  # (B, T)
    mask = torch.zeros_like(ids)  # (B, T)
    for i, row in enumerate(lists):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, where] = torch.tensor(row, dtype=torch.int64)
        mask[i, where] = 1
    return ids, mask


# ---- reading the file layouts

def _read_backend(folder, settings):
    """(backend, family) from whichever of the three layouts the folder has."""
    has = {name: (folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt")}
    if has["tokenizer.json"]:
        backend = _from_tokenizer_json(folder / "tokenizer.json")
    elif has["vocab.json"] and has["merges.txt"]:
        backend = _from_vocab_and_merges(folder, _flag(settings, "add_prefix_space", False, folder))
    elif has["vocab.txt"]:
        backend = _from_vocab_txt(folder / "vocab.txt", settings)
    else:
        found = ", ".join(name for name in has if has[name]) or "none of them"
        raise InputError(f"no tokenizer in {folder}: looked for {FILES}; found {found}")
    _add_tokens(backend, folder, settings)
    return backend, _family(backend, settings, _read_json(folder / "config.json"))


def _family(backend, settings, config):
    """The tokenizer class named by the folder decides, then the model type, then the vocabulary itself."""
    if isinstance(backend.model, models.WordPiece):
        return "bert"
    for name in (settings.get("tokenizer_class") or "", config.get("model_type") or ""):
        for family in ("gpt2", "roberta"):
            if family in str(name).lower():
                return family
    frame = ("<s>", "</s>", "<pad>", "<mask>")
    return "roberta" if all(backend.token_to_id(token) is not None for token in frame) else "gpt2"


def _from_tokenizer_json(path):
    data = _read_json(path)
    model = data.get("model")
    if not isinstance(model, dict) or not model.get("vocab"):
        raise InputError(f'{path}: no vocabulary under "model"; it is no tokenizer.json of the `tokenizers` package')
    kind = model.get("type") or ("BPE" if "merges" in model else "WordPiece")  # old files do not name it
    byte_level = "ByteLevel" in json.dumps([data.get("pre_tokenizer"), data.get("decoder")])
    if not (kind == "WordPiece" or kind == "BPE" and byte_level):
        without = " without byte level" if kind == "BPE" else ""
        raise InputError(f"{path}: a {kind} tokenizer{without}; this library reads byte-level BPE (GPT-2, RoBERTa, "
                         "CodeBERT) and WordPiece (BERT)")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:
        if type(error) is not Exception:  # the package raises bare Exception where a file is bad
            raise
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{path}: tokenizers {tokenizers.__version__} cannot read it ({reason}): get it again, or upgrade") from None


def _from_vocab_and_merges(folder, add_prefix_space):
    vocab, merges = _read_json(folder / "vocab.json"), []
    for token, i in vocab.items():
        if type(i) is not int or not 0 <= i < hf.MAX_SIZE or not _is_unicode(token):
            raise InputError(f"{folder / 'vocab.json'}: {token!r} has the id {str(i)[:20]}: it maps tokens to whole numbers from 0 on; "
                             "get it again")
    lines = _read_text(folder / "merges.txt").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        pair = tuple(line.split(" "))
        if len(pair) != 2 or any(token not in vocab for token in (*pair, "".join(pair))):
            raise InputError(f"{folder / 'merges.txt'}:{number}: {line[:60]!r} does not merge two tokens of vocab.json "
                             "into a third; the two files must belong together")
        merges.append(pair)
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges))
    _make_byte_level(backend, add_prefix_space)
    return backend


def _from_vocab_txt(path, settings):
    tokens = _read_text(path).split("\n")   # not splitlines: U+2028 and others can be tokens
    vocab = {token: i for i, token in enumerate(tokens) if token}
    if "[UNK]" not in vocab:
        raise InputError(f"{path}: no [UNK] among its {len(vocab)} lines; a BERT vocabulary has one token a line")
    backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(
        lowercase=_flag(settings, "do_lower_case", True, path.parent),
        strip_accents=_flag(settings, "strip_accents", None, path.parent),
        handle_chinese_chars=_flag(settings, "tokenize_chinese_chars", True, path.parent))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return backend


def _flag(settings, name, default, folder):
    value = settings.get(name, default)
    if value is not default and type(value) is not bool:
        raise InputError(f"{folder / 'tokenizer_config.json'}: {name} is {repr(value)[:60]}; it is true or false")
    return value


def _make_byte_level(backend, add_prefix_space=False):
    """GPT-2's own scheme: its regular expression cuts words, then bytes stand for themselves."""
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()


def _add_tokens(backend, folder, settings):
    """Tokens that users appended to the vocabulary: by id, so that each gets the id its embedding row has."""
    try:
        added = {int(i): token for token, i in _read_json(folder / "added_tokens.json").items()}
        added |= {int(i): token for i, token in (settings.get("added_tokens_decoder") or {}).items()}
    except (TypeError, ValueError, AttributeError, OverflowError):
        raise InputError(f"{folder}: added_tokens.json, or added_tokens_decoder in tokenizer_config.json, does not map tokens to "
                         "whole numbers: get it again") from None
    for i, token in sorted(added.items(), key=lambda item: item[0]):
        text, is_special = _content(token, folder), isinstance(token, dict) and token.get("special", False)
        if backend.token_to_id(text) is None:
            (backend.add_special_tokens if is_special else backend.add_tokens)([text])
        if backend.token_to_id(text) != i:
            raise InputError(f"{folder}: the added token {text!r} should have id {i} but the vocabulary gives it "
                             f"{backend.token_to_id(text)}: the folder's files must belong together")


def _bert_options(backend):
    """BERT's three options as transformers names them, read back from the backend's normaliser."""
    state = json.loads(backend.to_str())["normalizer"] or {}
    options = (("do_lower_case", "lowercase"), ("strip_accents", "strip_accents"),
               ("tokenize_chinese_chars", "handle_chinese_chars"))
    return {ours: state[theirs] for ours, theirs in options if theirs in state}


def _read_json(path):
    """The object in a JSON file, {} where there is no such file."""
    return hf.read_json(path) if path.is_file() else {}


def _read_text(path):
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}): get it again") from None


def _write_json(path, data):
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _content(token, folder):
    """Special tokens are stored as a string or as {"content": string, "lstrip": ..., ...}."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str) or not text or not _is_unicode(text):
        raise InputError(f"{folder}: one of its special or added tokens is {repr(text)[:60]}, not text: mend tokenizer_config.json, "
                         "special_tokens_map.json or added_tokens.json, or get them again")
    return text


def _is_unicode(text):
    """False where JSON's escapes left half a surrogate pair."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _room(max_length, frame):
    """How many ids of text fit beside the frame; None where there is no limit."""
    if max_length is None:
        return None
    if max_length <= frame:
        raise InputError(f"max_length {max_length} leaves no room for text beside {frame} special tokens")
    return max_length - frame


def _check_list(texts):
    if isinstance(texts, str):
        raise InputError("expected a list of texts, found one string; write [text]")


def _check_text(text):
    if not isinstance(text, str):
        raise InputError(f"expected a text, found {type(text).__name__}: {text!r}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"text {text[:40]!r} holds half a surrogate pair at character {error.start}, which is no "
                         "Unicode; mend it with text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')"
                         ) from None
