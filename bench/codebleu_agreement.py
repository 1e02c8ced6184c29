"""How near CodeBLEU's two proxies (syntax and data flow from `ast`) are to codebleu 0.7.0 (tree-sitter), on CoNaLa.

    python bench/codebleu_agreement.py --data ../shared/data/conala            # the table of docs/METRICS.md
    python bench/codebleu_agreement.py --data ../shared/data/conala --seed 1   # other mutations and neighbours

Every test reference of CoNaLa makes one pair of each kind:

    renamed, edited   the reference after edits of its syntax tree: names and constants replaced, arguments dropped,
                      calls wrapped and unwrapped; it still parses
    other row         the reference of a random training row
    neighbour         of 200 random training rows the one with the highest token F1
    broken            the reference after edits of its tokens; 3 of 4 no longer parse

The library is asked in three processes with different hash seeds: pairs on which it contradicts itself are counted as
unstable. "clean" leaves those out, and the pairs in which the library's removal of docstrings, or the edit, leaves code
that tree-sitter marks as an error. Needs codebleu==0.7.0 and tree-sitter-python==0.21.0 (requirements-dev.txt).
"""

import argparse
import ast
import json
import logging
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from nanorlhf.metrics.codebleu import codebleu
from nanorlhf.metrics.match import token_f1

NAMES = ["x", "df", "foo", "os", "values"]
CONSTANTS = [1, "a", 2.0, None]
COMPONENTS = ("syntax_match", "dataflow_match")


# ---- pairs

class Edit(ast.NodeTransformer):
    """Edits about three places in ten; what comes out parses."""

    def __init__(self, rng):
        self.rng = rng

    def visit_Name(self, node):
        return ast.Name(self.rng.choice(NAMES), node.ctx) if self.rng.random() < 0.3 else node

    def visit_Constant(self, node):
        return ast.Constant(self.rng.choice(CONSTANTS)) if self.rng.random() < 0.3 else node

    def visit_JoinedStr(self, node):
        return node

    def visit_Call(self, node):
        self.generic_visit(node)
        if node.args and self.rng.random() < 0.3:
            node.args = node.args[:-1]
        if self.rng.random() < 0.2:
            return ast.Call(ast.Name("str", ast.Load()), [node], [])
        return node.func.value if isinstance(node.func, ast.Attribute) and self.rng.random() < 0.2 else node


def edited(code, rng):
    return ast.unparse(ast.fix_missing_locations(Edit(rng).visit(ast.parse(code))))


def broken(code, rng):
    """One to four tokens dropped, doubled, swapped or replaced, or the end cut off."""
    tokens = re.findall(r"\w+|\s+|.", code, re.DOTALL)
    for _ in range(rng.randrange(1, 5)):
        i, j, kind = rng.randrange(len(tokens)), rng.randrange(len(tokens)), rng.randrange(5)
        if kind == 0:
            tokens[i] = ""
        elif kind == 1:
            tokens.insert(j, tokens[i])
        elif kind == 2:
            tokens[i], tokens[j] = tokens[j], tokens[i]
        elif kind == 3:
            tokens[i] = rng.choice([*NAMES, ")", ","])
        else:
            tokens = tokens[:max(i, 1)]
    return "".join(tokens)


def nearest(code, others):
    """The snippet with the highest token F1."""
    return max(others, key=lambda other: token_f1(other, code))


def make_pairs(test, train, seed, neighbours=200):
    """{kind: [(prediction, reference)]}, one pair a test reference and kind."""
    rng = random.Random(seed)
    return {
        "renamed, edited": [(edited(code, rng), code) for code in test],
        "other row": [(rng.choice(train), code) for code in test],
        "neighbour": [(nearest(code, rng.sample(train, neighbours)), code) for code in test],
        "broken": [(broken(code, rng), code) for code in test],
    }


# ---- both sides

def ours(pairs):
    """[(syntax_match, dataflow_match)] of each pair."""
    scores = [codebleu([prediction], [reference]) for prediction, reference in pairs]
    return [tuple(score[name] for name in COMPONENTS) for score in scores]


def library(pairs):
    """[(syntax_match, dataflow_match or None, whether tree-sitter reads both without errors)] of each pair.

    None: no data flow in the reference.
    """
    from codebleu.dataflow_match import corpus_dataflow_match, dfg_function, get_data_flow
    from codebleu.parser import remove_comments_and_docstrings
    from codebleu.syntax_match import corpus_syntax_match
    from codebleu.utils import get_tree_sitter_language
    from tree_sitter import Parser
    logging.disable(logging.WARNING)  # it warns of every reference without data flow
    language = get_tree_sitter_language("python")
    parser = Parser()
    parser.language = language

    def bare(code):
        try:
            return remove_comments_and_docstrings(code, "python")
        except Exception:  # as the library does: whatever the tokeniser raises on broken code
            return code

    scores = []
    for prediction, reference in pairs:
        prediction, reference = prediction.strip(), reference.strip()
        flows = get_data_flow(bare(reference), [parser, dfg_function["python"]])
        scores.append((
            corpus_syntax_match([[reference]], [prediction], "python", language),
            corpus_dataflow_match([[reference]], [prediction], "python", language) if flows else None,
            not any(parser.parse(bare(code).encode()).root_node.has_error for code in (prediction, reference))))
    return scores


def library_elsewhere(pairs, hash_seed):
    """`library` in a process of its own, where the order of Python's sets is another."""
    done = subprocess.run([sys.executable, __file__, "--library"], input=json.dumps(pairs), stdout=subprocess.PIPE,
                          text=True, env={**os.environ, "PYTHONHASHSEED": str(hash_seed)}, check=True)
    return json.loads(done.stdout)


# ---- the comparison

def ranks(values):
    """Ranks from 0, ties sharing their mean."""
    values = np.asarray(values, dtype=float)
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[inverse]


def spearman(a, b):
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def compare(mine, theirs):
    """{"n", "spearman", "ours", "library", "difference"}: the last three are means, of the absolute difference."""
    mine, theirs = np.array(mine), np.array(theirs)
    return {"n": len(mine), "spearman": spearman(mine, theirs), "ours": float(mine.mean()),
            "library": float(theirs.mean()), "difference": float(np.abs(mine - theirs).mean())}


def agreement(pairs, hash_seeds=(1, 2, 3)):
    """{component: {"all" | "clean": compare(...), "unstable": share of pairs}}; pairs without data flow have none."""
    mine, runs = ours(pairs), [library_elsewhere(pairs, seed) for seed in hash_seeds]
    results = {}
    for i, component in enumerate(COMPONENTS):
        known = [k for k in range(len(pairs)) if runs[0][k][i] is not None]
        stable = [k for k in known if len({run[k][i] for run in runs}) == 1]
        clean = [k for k in stable if runs[0][k][2]]
        results[component] = {"unstable": 1 - len(stable) / len(known)}
        for name, rows in (("all", known), ("clean", clean)):
            results[component][name] = compare([mine[k][i] for k in rows], [runs[0][k][i] for k in rows])
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder with conala-test.json and conala-train.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--library", action="store_true", help="pairs as JSON on stdin, the library's scores on stdout")
    arguments = parser.parse_args()
    if arguments.library:
        print(json.dumps(library(json.load(sys.stdin))))
        return
    test, train = ([row["snippet"] for row in json.loads((arguments.data / f"conala-{name}.json").read_text("utf-8"))]
                   for name in ("test", "train"))
    print("| pairs | component | which | n | Spearman | mean, ours | mean, library | mean abs. difference | unstable |")
    print("|---|---|---|---:|---:|---:|---:|---:|---:|")
    for kind, pairs in make_pairs(test, train, arguments.seed).items():
        for component, found in agreement(pairs).items():
            for which in ("all", "clean"):
                row = found[which]
                unstable = f"{found['unstable']:.1%}" if which == "all" else ""
                print(f"| {kind} | {component} | {which} | {row['n']} | {row['spearman']:.3f} | {row['ours']:.3f} | "
                      f"{row['library']:.3f} | {row['difference']:.4f} | {unstable} |", flush=True)


if __name__ == "__main__":
    main()
