"""data.py: every reader, splits, leakage, the facts of CoNaLa v1.1, the download."""

import hashlib
import http.server
import json
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from nanorlhf import data
from nanorlhf.config import parse
from nanorlhf.data import Record, Splits, check_leakage, describe, format_query, leakage, load_splits, normalise, open_data, read, split
from nanorlhf.errors import InputError
from nanorlhf.options import DataOptions, data_flags

CONALA = Path(__file__).resolve().parents[2] / "shared" / "data" / "conala"
needs_conala = pytest.mark.skipif(not CONALA.is_dir(), reason="../shared/data/conala is not here")


def write(folder, name, content):
    """A file of the given text, bytes, list (as JSON), or rows (a .jsonl name: one object a line)."""
    path = folder / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_bytes(content.encode("utf-8"))
    elif name.endswith(".jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    else:
        path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return path


# ----------------------------------------------------------------------------------------------------
# Readers, good input

CHECKS = [{"setup": "xs = [1, 2]", "value": "3"}]
GOOD = [  # (format, file name, content, the one record expected)
    ("conala", "a.json", [{"intent": "i", "rewritten_intent": "r `x`", "snippet": "s", "question_id": 7}],
     Record("r `x`", "s", meta={"question_id": 7, "intent": "i"})),
    ("conala", "a.json", [{"intent": "i", "rewritten_intent": None, "snippet": "s", "question_id": 7}],
     Record("i", "s", meta={"question_id": 7, "intent": "i"})),
    ("conala", "a.json", [{"intent": "i", "rewritten_intent": "  ", "snippet": "s", "question_id": 7}],
     Record("i", "s", meta={"question_id": 7, "intent": "i"})),
    ("conala-mined", "a.jsonl",
     [{"parent_answer_post_id": 3, "prob": 0.75, "snippet": "s", "intent": "i", "id": "7_3_0", "question_id": 7}],
     Record("i", "s", id="7_3_0", probability=0.75,
            meta={"parent_answer_post_id": 3, "question_id": 7, "intent": "i"})),
    ("nano", "a.jsonl", [{"id": "n-1", "family": "sum", "intent": "sum xs", "snippet": "sum(xs)", "checks": CHECKS}],
     Record("sum xs", "sum(xs)", id="n-1", checks=CHECKS, meta={"family": "sum"})),
    ("prompts", "a.json", ["p"], Record("p")),
    ("prompts", "a.csv", "prompt\np\n", Record("p")),
    ("prompts", "a.jsonl", '"p"\n', Record("p")),
    ("reference", "a.csv", "prompt,reference\np,r\n", Record("p", "r")),
    ("reference", "a.tsv", "prompt\treference\np, q\tr\n", Record("p, q", "r")),
    ("response", "a.csv", "prompt,response\np,r\n", Record("p", response="r")),
    ("response", "a.csv", "prompt,response,rating\np,r,4\n", Record("p", response="r", rating=4.0)),
    ("response", "a.csv", "prompt,response,rating\np,r,\n", Record("p", response="r")),
    ("response", "a.jsonl", [{"prompt": "p", "response": "r", "comment": "good"}], Record("p", response="r", comment="good")),
    ("response", "a.json", [{"prompt": "p", "response": "", "rating": -1.5}], Record("p", response="", rating=-1.5)),
    ("preference", "a.jsonl", [{"prompt": "p", "chosen": "c", "rejected": "r"}], Record("p", chosen="c", rejected="r")),
    ("preference", "a.csv", "prompt,chosen_response,rejected_response\np,c,r\n", Record("p", chosen="c", rejected="r")),
    ("feedback", "a.jsonl", [{"prompt": "p", "response": "r", "rating": 3, "logits": [0, 1.5], "comment": "good"}],
     Record("p", response="r", rating=3.0, logits=[0.0, 1.5], comment="good")),
    ("feedback", "a.csv", 'prompt,response,rating,logits,comment\np,r,3,"[0, 1.5]",\n',
     Record("p", response="r", rating=3.0, logits=[0.0, 1.5])),
]


@pytest.mark.parametrize("kind, name, content, expected", GOOD, ids=[f"{row[0]}-{row[1]}" for row in GOOD])
def test_each_format_is_read_by_its_columns_and_by_its_name(tmp_path, kind, name, content, expected):
    path = write(tmp_path, name, content)
    assert data._read(path) == ([expected], kind)
    assert read(path, data_format=kind) == [expected]


@pytest.mark.parametrize("kind, name, content, expected", GOOD, ids=[f"{row[0]}-{row[1]}" for row in GOOD])
def test_bom_and_crlf_change_nothing(tmp_path, kind, name, content, expected):
    raw = write(tmp_path, name, content).read_bytes()
    path = write(tmp_path, "b" + name, b"\xef\xbb\xbf" + raw.replace(b"\n", b"\r\n"))
    assert read(path) == [expected]


def test_a_column_of_another_format_is_kept_in_its_field_and_unknown_ones_in_meta(tmp_path):
    path = write(tmp_path, "a.csv", "prompt,response,reference,author\np,r,ref,me\n")
    assert read(path) == [Record("p", "ref", "r", meta={"author": "me"})]


def test_blank_lines_multi_line_cells_unicode_and_a_large_cell(tmp_path):
    """A 1 MB cell passes csv's default limit of 128 KiB; U+2028 inside a JSON string does not end the line."""
    big = "x" * 1_000_000
    path = write(tmp_path, "a.csv", f'prompt,reference\n\n"two\nlines, ""quoted""",é\n\n{big},r\n')
    assert read(path) == [Record('two\nlines, "quoted"', "é"), Record(big, "r")]
    path = write(tmp_path, "a.jsonl", '\n{"prompt": "a\u2028b", "reference": "\u5b57"}\n\n')
    assert read(path) == [Record("a\u2028b", "字")]


def test_probability_cut_keeps_rows_at_the_cut(tmp_path):
    rows = [{"intent": f"i{p}", "snippet": "s", "prob": p, "question_id": 1, "id": "same"} for p in (0.2, 0.5, 0.9)]
    path = write(tmp_path, "mined.jsonl", rows)
    assert [r.probability for r in read(path, min_probability=0.5)] == [0.5, 0.9]
    assert len(read(path)) == 3
    with pytest.raises(InputError, match="none of 3 rows has prob >= 0.95; lower --min-probability"):
        read(path, min_probability=0.95)
    with pytest.raises(InputError, match="--min-probability 2: must lie between 0 and 1"):
        read(path, min_probability=2)


# ----------------------------------------------------------------------------------------------------
# Readers, bad input (every kind of bad row: tests/test_bad_input.py)

def test_a_missing_file_names_its_nearest_neighbour_and_a_folder_is_refused(tmp_path):
    write(tmp_path, "train.csv", "prompt\np\n")
    with pytest.raises(InputError, match=r"trian\.csv: no such file; did you mean train\.csv\?"):
        read(tmp_path / "trian.csv")
    with pytest.raises(InputError, match="is a folder where a file was expected"):
        read(tmp_path)


def test_probability_cut_on_other_formats_is_not_ignored(tmp_path):
    with pytest.raises(InputError, match="--min-probability is for conala-mined rows, not for reference"):
        read(write(tmp_path, "a.csv", "prompt,reference\np,r\n"), min_probability=0.5)


def test_skip_bad_rows_says_how_many_and_which(tmp_path, capsys):
    """Of 6 rows, line 3 has too many cells, lines 4, 5 and 7 a bad rating: two stay, and each of the others is listed."""
    path = write(tmp_path, "a.csv", "prompt,response,rating\np,r,1\np,r,1,2\np,r,x\np,r,inf\nq,r,2\nq,r,?\n")
    assert [r.rating for r in read(path, skip_bad_rows=True)] == [1.0, 2.0]
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and lines[0] == f"{path}: skipped 4 of 6 rows"
    assert [line.split(": ")[0].strip() for line in lines[1:]] == [f"{path}:{number}" for number in (3, 4, 5, 7)]
    assert "4 cells where the header has 3" in lines[1] and all("not a finite number" in line for line in lines[2:])


def test_skip_bad_rows_covers_malformed_lines_and_double_ids_but_never_skips_everything(tmp_path):
    path = write(tmp_path, "a.jsonl", '{oops\n{"prompt": "p", "id": 1}\n{"prompt": "q", "id": 1}\n')
    assert read(path, skip_bad_rows=True) == [Record("p", id="1")]
    with pytest.raises(InputError, match="not one of 1 rows is sound; the first: .*a.jsonl:1: malformed JSON"):
        read(write(tmp_path, "a.jsonl", "{oops\n"), skip_bad_rows=True)


def test_the_answer_is_what_training_would_copy():
    rows = [Record("p", "reference", "response", "chosen"), Record("p", None, "response", "chosen"), Record("p", None, "response"), Record("p")]
    assert [row.answer for row in rows] == ["reference", "chosen", "response", None]


def test_format_query():
    assert format_query("sort `x`") == "sort `x`\n"
    assert format_query("{a}", "# {prompt}\n{b}") == "# {a}\n{b}"  # other braces are text, in prompt and template
    with pytest.raises(InputError, match="has no {prompt}; write for example"):
        format_query("p", "prompt")


# ----------------------------------------------------------------------------------------------------
# Splits


def rows_of(n, per_prompt=1, question=None):
    """n rows; `per_prompt` neighbours share a prompt, and row i has question_id question(i)."""
    metas = [{} if question is None else {"question_id": question(i)} for i in range(n)]
    return [Record(f"prompt {i // per_prompt}", f"answer {i}", meta=metas[i]) for i in range(n)]


def test_split_counts_order_and_determinism():
    """100 rows of 100 prompts, shares 0.2 and 0.1: 20 validation, 10 test, 70 train; every row once, in file order."""
    records = rows_of(100)
    parts = split(records, validation=0.2, test=0.1, seed=3)
    assert [len(part) for part in parts] == [70, 20, 10]
    assert sorted((r.answer for part in parts for r in part)) == sorted(r.answer for r in records)
    for part in parts:
        assert part == sorted(part, key=records.index)
    assert split(records, 0.2, 0.1, seed=3) == parts
    assert split(records, 0.2, 0.1, seed=4) != parts


def test_split_without_held_out_shares_is_the_identity():
    records = rows_of(10, question=lambda i: i % 3)  # groups interleave, and the order must survive
    assert split(records, 0, 0) == (records, [], [])


@pytest.mark.parametrize("seed", range(20))
def test_split_keeps_prompts_and_questions_together(seed):
    """Rows 2k and 2k+1 share a prompt up to quotes and case; three prompts share a question: groups of 6 rows."""
    records = [Record(f"Sort  `x{i // 2}`" if i % 2 else f"sort x{i // 2}", str(i), meta={"question_id": i // 6})
               for i in range(60)]
    train, validation, test = split(records, 0.2, 0.2, seed)
    assert [len(train), len(validation), len(test)] == [36, 12, 12]
    assert not check_leakage(Splits(train, validation, test))["overlap"]


def test_split_follows_chains():
    """a-b share a prompt, b-c a question, c-d a prompt: a chain of four that must not be cut."""
    chain = [Record("p", "a"), Record("p", "b", meta={"question_id": 1}), Record("q", "c", meta={"question_id": "1"}),
             Record("q", "d")]
    records = chain + [Record("other", "e"), Record("more", "f")]
    for seed in range(10):
        train, validation, test = split(records, 0.2, 0.2, seed)
        assert train == chain and len(validation) == len(test) == 1


def test_rows_whose_question_is_empty_share_no_question():
    """As cells of a CSV: tied to one another they would be a single group, which cannot be split."""
    records = rows_of(30, question=lambda i: "" if i % 2 else None)
    assert [len(part) for part in split(records, 0.2, 0.1)] == [21, 6, 3]
    assert "question_ids" not in leakage(records, records)


def test_where_no_group_fits_the_smallest_is_held_out():
    """Groups of 6, 4 and 2 rows, and room for 1 in the test: it gets the 2, whatever the seed."""
    records = [Record(f"p{size}", str(i)) for size in (6, 2, 4) for i in range(size)]
    for seed in range(6):
        train, _, test = split(records, 0, 0.1, seed)
        assert (len(train), test) == (10, records[6:8])


@pytest.mark.parametrize("validation, test", [(0.1, 0.1), (0.5, 0.4), (0.01, 0.9), (0.1, 0.0), (0.0, 0.1)])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 1, 1), (1, 5, 5), (7, 7, 7)])
def test_small_sets_get_a_row_in_every_split(sizes, validation, test):
    records = [Record(f"p{group}", str(i)) for group, size in enumerate(sizes) for i in range(size)]
    for seed in range(6):
        parts = split(records, validation, test, seed)
        assert [bool(part) for part in parts] == [True, validation > 0, test > 0]
        assert sum(map(len, parts)) == len(records)


def test_too_few_prompts_or_no_train_share_is_an_error():
    with pytest.raises(InputError, match="10 rows with 2 different prompts cannot make 3 splits; add rows"):
        split(rows_of(10, per_prompt=5))
    with pytest.raises(InputError, match="leave nothing to train on"):
        split(rows_of(10), 0.6, 0.4)
    with pytest.raises(InputError, match="test share 1.0: must be at least 0 and below 1"):
        load_splits("nano", test=1.0)


def test_a_file_is_split_and_says_so(tmp_path):
    path = write(tmp_path, "a.jsonl", [{"prompt": f"p{i}", "response": "r", "rating": i} for i in range(20)])
    splits = load_splits(path, validation=0.1, test=0.2, seed=5)
    assert [len(splits.train), len(splits.validation), len(splits.test)] == [14, 2, 4]
    assert splits.kind == "response" and splits.source == f"{path}, split by prompt with seed 5"
    assert (splits.train, splits.validation, splits.test) == split(read(path), 0.1, 0.2, 5) != split(read(path), 0.1, 0.2)


def test_a_folder_gives_its_files_and_extra_test_splits(tmp_path):
    for name, prompt in (("train", "a"), ("dev", "b"), ("test", "c"), ("test_hard", "d")):
        write(tmp_path, f"{name}.{'csv' if name == 'dev' else 'tsv'}", f"prompt\n{prompt}\n")
    write(tmp_path, "notes.json", "not read")
    source = f"{tmp_path}: train.tsv, dev.csv, test.tsv, test_hard.tsv"
    extra = {"test_hard": [Record("d")]}
    assert load_splits(tmp_path) == Splits([Record("a")], [Record("b")], [Record("c")], extra, source, "prompts")


def test_a_folder_without_validation_splits_it_off_train_only(tmp_path):
    write(tmp_path, "train.json", [f"p{i}" for i in range(20)])
    write(tmp_path, "test.json", ["t"])
    splits = load_splits(tmp_path, validation=0.25)
    assert [len(splits.train), len(splits.validation), splits.test] == [15, 5, [Record("t")]]
    assert splits.source.endswith("train.json, test.json, validation split off train with seed 0")
    assert load_splits(tmp_path, validation=0.25, seed=3).validation == split(read(tmp_path / "train.json"), 0.25, 0, 3)[1] != splits.validation
    assert splits.drawn == splits.head(1).drawn == ("validation",) and load_splits(tmp_path / "train.json").drawn == ("validation", "test")


def test_a_folder_is_read_as_asked_for(tmp_path, capsys):
    """By the columns no format fits; and the first row of each file is empty."""
    for name in ("train", "validation", "test"):
        write(tmp_path, f"{name}.csv", f"prompt,note\n,x\n{name},x\n")
    splits = load_splits(tmp_path, "prompts", skip_bad_rows=True)
    assert {name: [row.prompt for row in rows] for name, rows in splits.named().items()} == {name: [name] for name in splits.named()}
    assert capsys.readouterr().err.count("skipped 1 of 2 rows") == 3
    with pytest.raises(InputError, match="columns fit no format"):
        load_splits(tmp_path)


def test_max_rows_cuts_every_split():
    found = Splits(rows_of(3), rows_of(4), rows_of(5), {"test_hard": rows_of(6)}, "here").head(2)
    assert found.named() == {name: rows_of(2) for name in ("train", "validation", "test", "test_hard")} and found.source == "here, the first 2 rows"


@pytest.mark.parametrize("files, reason", [
    ({}, "no train file (found: nothing)"),
    ({"test.csv": "prompt\np\n"}, "no train file (found: test.csv)"),
    ({"train.csv": "prompt\np\n", "train.json": ["p"]}, "both train.csv and train.json could be the train split"),
    ({"train.json": ["p"], "val.json": ["p"], "dev.json": ["p"]}, "could be the validation split"),
    ({"train.json": ["p"], "test.csv": "prompt,reference\np,r\n"}, "its files differ in format (prompts, reference)"),
])
def test_an_unclear_folder_is_an_error(tmp_path, files, reason):
    for name, content in files.items():
        write(tmp_path, name, content)
    with pytest.raises(InputError) as caught:
        load_splits(tmp_path)
    assert reason in str(caught.value) and str(tmp_path) in str(caught.value)


def test_mined_rows_join_train_only_when_asked_and_never_with_a_held_out_question(tmp_path):
    """Of five mined rows one is below the cut, one has the test's question, one the test's prompt: two join."""
    def curated(i):
        return {"intent": f"i{i}", "rewritten_intent": f"r{i}", "snippet": "s", "question_id": i}
    write(tmp_path, "conala-train.json", [curated(i) for i in range(10)])
    write(tmp_path, "conala-test.json", [curated(100)])
    with pytest.raises(InputError, match="--min-probability asks for mined rows"):
        load_splits(tmp_path, min_probability=0.5)
    mined = [("m0", 50, 0.9), ("m1", 51, 0.1), ("m2", 100, 0.9), ("`R100`", 52, 0.9), ("m4", 53, 0.5)]
    write(tmp_path, "conala-mined.jsonl",
          [{"intent": i, "snippet": "s", "prob": p, "question_id": q, "id": str(q)} for i, q, p in mined])
    assert len(load_splits(tmp_path).train) == 9
    splits = load_splits(tmp_path, min_probability=0.5)
    assert [r.prompt for r in splits.train[9:]] == ["m0", "m4"]
    assert "2 mined rows of prob >= 0.5 added to train, 2 left out" in splits.source
    check_leakage(splits)


def test_mined_rows_of_any_held_out_question_stay_out(tmp_path, capsys):
    """Questions 1 to 4 are those of train, validation, test and test_hard, one row each: of mined rows 1 to 5 the first and the last join."""
    def row(number, **columns):
        return {"intent": f"i{number}{columns}", "snippet": "s", "question_id": number, **columns}
    for number, name in enumerate(("train", "validation", "test", "test_hard"), start=1):
        write(tmp_path, f"{name}.json", [row(number)])
    write(tmp_path, "conala-mined.jsonl", [row(number, prob=0.9) for number in (1, 2, 3, 4, 5)] + [{"intent": "no snippet", "prob": 0.9}])
    splits = load_splits(tmp_path, min_probability=0.5, skip_bad_rows=True)
    assert [record.meta["question_id"] for record in splits.train] == [1, 1, 5] and "skipped 1 of 6 rows" in capsys.readouterr().err


def test_the_embedded_set_has_its_four_files_and_no_overlap():
    splits = load_splits("nano")
    assert {name: len(rows) for name, rows in splits.named().items()} == {
        "train": 6000, "validation": 500, "test": 600, "test_hard": 300}
    assert splits.kind == "nano" and all(r.checks and r.meta["family"] for r in splits.test)
    assert check_leakage(splits)["overlap"] == []


def test_conala_by_name_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "DATA", tmp_path)
    with pytest.raises(InputError, match="get it with: python -m nanorlhf.data download conala"):
        load_splits("conala")


# ----------------------------------------------------------------------------------------------------
# Leakage


def test_normalise():
    assert normalise(" Sort  the\tlist `A`\n") == normalise("sort the list 'a'") == "sort the list a"
    assert normalise("the \u2018a\u2019 of \u201cb\u201d") == "the a of b"  # as word processors write quotes


def test_leakage_by_hand():
    """Four test rows against two train rows ("sort `x`" -> "x.sort()", question 1; "sum y" -> "sum(y)", question 2).

    test row            intent        snippet        pair          question
    sort `x` / x.sort() exact         exact          exact         1: yes
    Sort 'x' / X.sort() normalised    normalised     normalised    3
    sum y / len(y)      exact         no             no            4
    max z / sum(y)      no            exact          no            none

    Intents: exact 2 of 4, normalised 3 of 4. Snippets: 2 and 3. Pairs: 1 and 2. Questions: 1 of the 3 that have one.
    """
    def row(intent, snippet, question):
        return Record(intent, snippet, meta={"question_id": question})

    train = [row("sort `x`", "x.sort()", 1), row("sum y", "sum(y)", 2)]
    test = [row("sort `x`", "x.sort()", "1"), row("Sort 'x'", "X.sort()", 3), row("sum y", "len(y)", 4),
            Record("max z", "sum(y)")]
    report = leakage(train, test)
    assert report == {
        "train_rows": 2, "test_rows": 4,
        "intents": {"exact": 2, "normalised": 3, "exact_share": 0.5, "normalised_share": 0.75,
                    "examples": [["sort `x`"], ["sum y"], ["Sort 'x'"]]},
        "snippets": {"exact": 2, "normalised": 3, "exact_share": 0.5, "normalised_share": 0.75,
                     "examples": [["x.sort()"], ["sum(y)"], ["X.sort()"]]},
        "pairs": {"exact": 1, "normalised": 2, "exact_share": 0.25, "normalised_share": 0.5,
                  "examples": [["sort `x`", "x.sort()"], ["Sort 'x'", "X.sort()"]]},
        "question_ids": {"exact": 1, "normalised": 1, "exact_share": 1 / 3, "normalised_share": 1 / 3,
                         "examples": [["1"]]},
    }
    assert json.loads(json.dumps(report)) == report


def test_leakage_of_pairs_and_ratings_is_of_what_would_be_copied():
    for answer in ("chosen", "response"):
        report = leakage([Record("a", **{answer: "x"})], [Record("a", **{answer: "x"}), Record("b", **{answer: "x"})])
        assert (report["snippets"]["exact"], report["pairs"]["exact"]) == (2, 1)


def test_leakage_shows_five_examples_and_leaves_out_what_a_side_lacks():
    same = rows_of(8)
    report = leakage(same, [Record(r.prompt) for r in same])
    assert report["intents"]["exact"] == 8 and len(report["intents"]["examples"]) == 5
    assert set(report) == {"train_rows", "test_rows", "intents"}
    assert leakage(same, []) == {"train_rows": 8, "test_rows": 0}


A, B, C = Record("a", "1"), Record("b", "2"), Record("c", "3")
LEAKS = [  # (splits, the pair that must be named, the counts that must be named)
    (Splits([A], [B], [C, Record("`A`", "4")]), "train and test", "1 intent (0 exact)"),
    (Splits([A], [B], [A]), "train and test", "1 intent (1 exact), 1 pair (1 exact)"),
    (Splits([A], [A], [B]), "train and validation", "1 intent (1 exact)"),
    (Splits([A], [B], [B]), "validation and test", "1 intent (1 exact)"),
    (Splits([A], [B], [C], {"test_hard": [A]}), "train and test_hard", "1 intent (1 exact)"),
    (Splits([A], [B], [C], {"test_hard": [B]}), "validation and test_hard", "1 intent (1 exact)"),
    (Splits([Record("a", "1", meta={"question_id": 5})], [], [Record("b", "2", meta={"question_id": 5})]),
     "train and test", "1 question_id (1 exact)"),
]


@pytest.mark.parametrize("splits, where, counts", LEAKS)
def test_overlap_stops_unless_allowed(splits, where, counts):
    with pytest.raises(InputError) as caught:
        check_leakage(splits)
    message = str(caught.value)
    assert f"{where} share {counts}" in message and "--allow-overlap" in message and "\n" not in message
    report = check_leakage(splits, allow_overlap=True)
    assert report["allow_overlap"] and len(report["overlap"]) == 1 and counts in report["overlap"][0]


def test_a_shared_snippet_alone_is_reported_and_does_not_stop():
    report = check_leakage(Splits([Record("a", "len(s)")], [], [Record("b", "len(s)")]))
    assert report["overlap"] == [] and report["splits"]["train/test"]["snippets"]["exact"] == 1


# ----------------------------------------------------------------------------------------------------
# Options


def opened(*words):
    return open_data(parse(DataOptions, argv=list(map(str, words)), exit_on_error=False))


def test_every_data_option_reaches_the_reader(tmp_path):
    path = write(tmp_path, "a.csv", "prompt,note\n,x\n" + "".join(f"p{i},x\n" for i in range(20)))
    splits, report = opened("--data", path, "--data-format", "prompts", "--skip-bad-rows", "--validation", "0.3", "--test", "0.2",
                            "--split-seed", "3", "--max-rows", "5")
    assert splits == load_splits(path, "prompts", 0.3, 0.2, 3, skip_bad_rows=True).head(5)
    assert report["splits"]["train/test"]["train_rows"] == 10, "overlap is looked for in all rows"
    mined = write(tmp_path, "mined.jsonl", [{"intent": f"i{i}", "snippet": "s", "prob": i / 10, "question_id": i} for i in range(10)])
    splits, _ = opened("--data", mined, "--min-probability", "0.5")
    assert sorted(record.probability for rows in splits.named().values() for record in rows) == [0.5, 0.6, 0.7, 0.8, 0.9]


def test_overlap_in_the_data_stops_a_script_unless_it_is_allowed(tmp_path):
    for name, rows in (("train", ["a", "b"]), ("validation", ["c"]), ("test", ["d", "B"])):
        write(tmp_path, f"{name}.json", rows)
    with pytest.raises(InputError, match="train and test share 1 intent"):
        opened("--data", tmp_path, "--max-rows", "1")
    assert len(opened("--data", tmp_path, "--allow-overlap")[1]["overlap"]) == 1


def test_data_flags_say_every_option_again():
    """A stage that is made for a later one must see its rows: also a probability of 0, and a template that looks like an option."""
    words = ["--data", "d", "--data-format", "conala", "--validation", "0.3", "--test", "0.2", "--split-seed", "3", "--min-probability", "0",
             "--max-rows", "5", "--skip-bad-rows", "--allow-overlap", "--template=--{prompt}\n", "--max-query", "7", "--max-response", "9"]
    config = parse(DataOptions, argv=words, exit_on_error=False)
    assert not [name for name in DataOptions.__dataclass_fields__ if getattr(config, name) == getattr(DataOptions(), name)], "an option is new"
    assert parse(DataOptions, argv=data_flags(config), exit_on_error=False) == config
    assert parse(DataOptions, argv=data_flags(DataOptions()), exit_on_error=False) == DataOptions()


# ----------------------------------------------------------------------------------------------------
# CoNaLa v1.1 as it is


@needs_conala
def test_conala_counts_and_null_rewritten_intents():
    """2,379 and 500 rows; where rewritten_intent is null (79 and 23 rows) the prompt is the intent."""
    for name, rows, null in (("train", 2379, 79), ("test", 500, 23)):
        raw = json.loads((CONALA / f"conala-{name}.json").read_text(encoding="utf-8"))
        records = read(CONALA / f"conala-{name}.json")
        assert len(records) == rows
        falling_back = [r for r, source in zip(records, raw) if source["rewritten_intent"] is None]
        assert len(falling_back) == null and all(r.prompt == r.meta["intent"] for r in falling_back)
        assert all(r.reference == source["snippet"] and r.meta["question_id"] == source["question_id"]
                   for r, source in zip(records, raw))


@needs_conala
def test_conala_duplicates_inside_the_splits():
    """12 train rows and 6 test rows repeat the (original intent, rewritten intent, snippet) of an earlier row."""
    for name, repeated in (("train", 12), ("test", 6)):
        records = read(CONALA / f"conala-{name}.json")
        assert len(records) - len({(r.prompt, r.reference) for r in records}) == repeated


@needs_conala
def test_the_official_split_passes_the_leakage_check_with_five_shared_snippets():
    report = leakage(read(CONALA / "conala-train.json"), read(CONALA / "conala-test.json"))
    counts = {kind: (report[kind]["exact"], report[kind]["normalised"])
              for kind in ("intents", "snippets", "pairs", "question_ids")}
    assert counts == {"intents": (0, 0), "snippets": (5, 7), "pairs": (0, 0), "question_ids": (0, 0)}
    assert ["len(s)"] in report["snippets"]["examples"]


@needs_conala
def test_conala_validation_comes_from_train_whole_questions_at_a_time():
    splits = load_splits(CONALA)
    assert [len(splits.train), len(splits.validation), len(splits.test)] == [2141, 238, 500]
    assert check_leakage(splits)["overlap"] == []
    assert load_splits(CONALA) == splits


@needs_conala
def test_the_pinned_digests_are_those_of_the_files():
    for name, digest in data.CONALA_SHA256.items():
        assert data.sha256(CONALA / name) == digest


# ----------------------------------------------------------------------------------------------------
# Download and command line

TRAIN = b'[{"intent": "i", "snippet": "s", "question_id": 1}]'
TEST = b'[{"intent": "j", "snippet": "t", "question_id": 2}]'
LAYOUT = {"conala-corpus/conala-train.json": TRAIN, "conala-corpus/conala-test.json": TEST,
          "conala-corpus/conala-mined.jsonl": b"{}\n", "conala-corpus/readme.txt": b"hello",
          "__MACOSX/conala-corpus/._conala-train.json": b"x"}


@pytest.fixture
def serve(monkeypatch):
    """serve(body, short=0) -> URL on 127.0.0.1 that gives the body, less its last `short` bytes; 404 for None."""
    monkeypatch.setattr(data, "CONALA_SHA256", {"conala-train.json": hashlib.sha256(TRAIN).hexdigest(),
                                                "conala-test.json": hashlib.sha256(TEST).hexdigest()})
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    servers = []

    def start(body, short=0):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(404 if body is None else 200)
                self.send_header("Content-Length", str(len(body or b"")))
                self.end_headers()
                self.wfile.write((body or b"")[:len(body or b"") - short])

            def log_message(self, *_):
                pass

        servers.append(http.server.HTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/corpus.zip"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def archive(folder, members):
    with zipfile.ZipFile(folder / "made.zip", "w", zipfile.ZIP_DEFLATED) as bundle:
        for name, content in members.items():
            bundle.writestr(name, content)
    return (folder / "made.zip").read_bytes()


def test_download_unpacks_the_expected_files_only(tmp_path, serve, capsys):
    url, to = serve(archive(tmp_path, LAYOUT)), tmp_path / "deep" / "conala"
    data.download_conala(to, url)
    assert sorted(p.name for p in to.iterdir()) == ["conala-mined.jsonl", "conala-test.json", "conala-train.json"]
    assert (to / "conala-train.json").read_bytes() == TRAIN
    assert [p.name for p in to.parent.iterdir()] == ["conala"]  # no temporary folder stays
    out = capsys.readouterr().out
    assert f"sha256 {data.CONALA_SHA256['conala-train.json']}  as expected" in out
    data.download_conala(to, "http://127.0.0.1:1/never-asked")
    assert "nothing to do" in capsys.readouterr().out
    for damage in (lambda: (to / "conala-train.json").write_bytes(TRAIN[:-1]), (to / "conala-mined.jsonl").unlink):  # that is not the corpus
        damage()
        data.download_conala(to, url)
        assert (to / "conala-train.json").read_bytes() == TRAIN and (to / "conala-mined.jsonl").is_file()


def broken(body):
    """The archive with one byte of its first member's compressed data flipped."""
    at = body.index(b"conala-train.json") + len("conala-train.json") + 5
    return body[:at] + bytes([body[at] ^ 0xFF]) + body[at + 1:]


@pytest.mark.parametrize("change, short, reason", [
    (lambda body: None, 0, "Not Found"),
    (lambda body: body, 10, "the connection ended after"),
    (lambda body: body[:-30], 0, "not a sound zip archive"),
    (broken, 0, "not a sound zip archive"),
    (lambda body: b"<html>sign in</html>", 0, "not a sound zip archive"),
], ids=["404", "cut off", "truncated", "flipped byte", "a web page"])
def test_a_failed_download_is_one_line_and_leaves_nothing(tmp_path, serve, change, short, reason):
    to = tmp_path / "new" / "conala"
    url = serve(change(archive(tmp_path, LAYOUT)), short)
    with pytest.raises(OSError) as caught:
        data.download_conala(to, url)
    assert reason in str(caught.value) and url in str(caught.value) and "\n" not in str(caught.value)
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("members, reason", [
    ({"../../conala-train.json": TRAIN, "conala-test.json": TEST}, "holds no conala-train.json"),
    ({"/conala-train.json": TRAIN, "conala-test.json": TEST}, "holds no conala-train.json"),
    ({"conala-train.json": TRAIN}, "holds no conala-test.json"),
    ({"conala-train.json": TRAIN, "conala-test.json": TEST + b" "}, "conala-test.json has sha256 "),
], ids=["climbs out", "absolute", "one file", "other version"])
def test_an_archive_that_is_not_the_corpus_is_refused(tmp_path, serve, members, reason):
    """Zip slip: a member that names a path outside the folder is not written anywhere, least of all there."""
    to = tmp_path / "a" / "b" / "conala"
    with pytest.raises(OSError, match=reason):
        data.download_conala(to, serve(archive(tmp_path, members)))
    assert [p for p in tmp_path.rglob("*.json")] == [] and not to.exists()


def test_offline_exits_1_with_one_line(tmp_path, monkeypatch, capsys):
    def offline(*_, **__):
        raise data.urllib.error.URLError("Name or service not known")
    monkeypatch.setattr(data.urllib.request, "urlopen", offline)
    assert data.main(["download", "conala", "--to", str(tmp_path / "conala")]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: could not download {data.CONALA_URL}: Name or service not known")
    assert err.count("\n") == 1
    write(tmp_path, "file", "x")
    assert data.main(["download", "conala", "--to", str(tmp_path / "file")]) == 2
    assert "is a file; name a folder" in capsys.readouterr().err


def test_check_prints_counts_lengths_and_leakage(tmp_path, capsys):
    write(tmp_path, "train.csv", "prompt,reference\naa,r\naa,r\nbbbb,s\n")
    write(tmp_path, "validation.csv", "prompt,reference\ncc,r\n")
    write(tmp_path, "test.csv", "prompt,reference\nAA,q\n")
    assert data.main(["check", str(tmp_path)]) == 2  # the overlap would stop training
    out, err = capsys.readouterr()
    assert "kind     reference" in out and "3 rows, 1 of them repeat another" in out
    assert "prompt characters: median 2, 95 % up to 4, longest 4" in out
    assert "leakage  train/test: intents 0 (1 normalised), snippets 0 (0 normalised)" in out
    assert err.startswith("error: splits overlap: train and test share 1 intent (0 exact)") and err.count("\n") == 1
    assert data.main(["check", str(tmp_path), "--allow-overlap"]) == 0


def test_pairs_of_one_answer_and_other_mistakes_are_no_repetition():
    train = [Record("p", chosen="c", rejected=rejected) for rejected in ("a", "b", "a")]
    assert "3 rows, 1 of them repeat another" in data.describe(Splits(train, [], []))[2]


def test_the_module_runs_without_torch():
    """Reading data and --help must stay fast: importing torch alone takes a second or more."""
    code = "import sys, nanorlhf.data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[1]).returncode == 0


def test_pairs_with_one_response_on_both_sides_are_told(tmp_path, capsys):
    """They cap the accuracy below 1 and keep the loss at log 2, whatever is learned."""
    pairs = [{"prompt": f"prompt {i}", "chosen": f"x{i}", "rejected": "x0" if i % 2 else f"x{i}"} for i in range(40)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    splits, _ = open_data(DataOptions(data=str(path), validation=0.25, test=0.25))
    said, equal = capsys.readouterr().out, {name: sum(r.chosen == r.rejected for r in rows) for name, rows in splits.named().items()}
    assert sum(equal.values()) == 20
    for name, count in equal.items():
        assert f"{name}: {count} of {len(splits.named()[name])} pairs have the same response on both sides" in said
    assert all(line in describe(splits) for line in said.splitlines())
    open_data(DataOptions(data="nano"))
    assert not capsys.readouterr().out
