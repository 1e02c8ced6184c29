"""Data: one record type, one reader per format, splits that share no question, and the leakage check before training.

Formats (recognised by their columns, or named by `--data-format`; an example row of each stands in data/README.md):

    conala        intent, snippet, rewritten_intent, question_id      CoNaLa v1.1, curated
    conala-mined  intent, snippet, prob, question_id, id, ...         CoNaLa v1.1, mined
    nano          id, family, intent, snippet, checks                 the embedded data set, data/nano
    prompts       prompt                                              or a JSON list of strings
    reference     prompt, reference
    response      prompt, response[, rating]
    preference    prompt, chosen, rejected                            or chosen_response, rejected_response
    feedback      prompt, response, rating[, logits][, comment]

Bad input raises InputError with one line, `file:line: reason; way out`. `python -m nanorlhf.data check PATH` shows what
a file or folder holds; `python -m nanorlhf.data download conala` gets the official corpus.

Choices that are ours: a null or blank `rewritten_intent` falls back to `intent`; a split never separates rows that
share a normalised prompt or a question_id; a snippet alone that occurs on both sides is reported but does not stop
training, because the official CoNaLa split has such rows (`len(s)`).
"""

import argparse
import ast
import codecs
import csv
import hashlib
import http.client
import json
import math
import os
import random
import re
import shutil
import statistics
import sys
import tempfile
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from nanorlhf.config import asked
from nanorlhf.errors import InputError, impostor, naming, nearest

DATA = Path(__file__).resolve().parent.parent / "data"
CONALA_URL = "http://www.phontron.com/download/conala-corpus-v1.1.zip"  # the link on https://conala-corpus.github.io
CONALA_SHA256 = {
    "conala-train.json": "790c9d444744717ef88b8b64422b26dafa1bd35af32ff12bdc53ef3cab9aff09",
    "conala-test.json": "b3f96344efa3bb819e2fe66cfd68be289ca4e4d37f5af19c32cf4ae211e8077e",
}
CONALA_MINED = "conala-mined.jsonl"
SUFFIXES = (".csv", ".tsv", ".json", ".jsonl")
NEEDS = {  # format -> columns every row must have
    "conala": ("intent", "snippet"),
    "conala-mined": ("intent", "snippet", "prob"),
    "nano": ("intent", "snippet", "checks"),
    "prompts": ("prompt",),
    "reference": ("prompt", "reference"),
    "response": ("prompt", "response"),
    "preference": ("prompt", "chosen", "rejected"),
    "feedback": ("prompt", "response", "rating"),
}
SPLITS = ("train", "validation", "test")
FORMATS = ("auto", *NEEDS)
ALIASES = {"chosen_response": "chosen", "rejected_response": "rejected"}
MOST_LISTED = 100  # skipped rows
MAY_BE_EMPTY = ("response", "rejected")  # a policy may answer with EOS at once, and that may be rated or rejected


@dataclass
class Record:
    """One row of any format. What a format lacks is None; columns without a field of their own are in `meta`."""

    prompt: str
    reference: str | None = None
    response: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    rating: float | None = None
    id: str | None = None
    checks: list | None = None          # nano: [{"setup": source of the bindings, "value": repr of the expected value}]
    logits: list | None = None          # feedback: the rater's logits over its rating tokens
    comment: str | None = None
    probability: float | None = None    # conala-mined: the miner's confidence, 0 to 1
    meta: dict = field(default_factory=dict)

    @property
    def answer(self):
        """The text training would copy: the reference, else the chosen, else the rated response; None for a prompt."""
        return next((text for text in (self.reference, self.chosen, self.response) if text is not None), None)


@dataclass
class Splits:
    """The rows of each split; `extra` holds further test splits by name, `source` says in words where all come from, and `drawn`
    names the splits that were split off train, having no file of their own."""

    train: list
    validation: list
    test: list
    extra: dict = field(default_factory=dict)
    source: str = ""
    kind: str = ""
    drawn: tuple = ()

    def named(self):
        """{name: rows} of all splits, extra ones last."""
        return {"train": self.train, "validation": self.validation, "test": self.test, **self.extra}

    def head(self, count):
        """The first `count` rows of every split."""
        return Splits(self.train[:count], self.validation[:count], self.test[:count],
                      {name: rows[:count] for name, rows in self.extra.items()}, f"{self.source}, the first {count} rows", self.kind, self.drawn)


def called(row):
    """What messages call a row, a Record or a dict with id and prompt: its id, or without one the beginning of its prompt."""
    name, prompt = (row["id"], row["prompt"]) if isinstance(row, dict) else (row.id, row.prompt)
    return _show(prompt) if name is None else str(name)


def format_query(prompt, template="{prompt}\n"):
    """The text the policy continues: `template` with {prompt} replaced; other braces stay as they are."""
    if "{prompt}" not in template:
        raise InputError(f"prompt template {template!r} has no {{prompt}}; write for example '{{prompt}}\\n'")
    return template.replace("{prompt}", prompt)


# ----------------------------------------------------------------------------------------------------
# Files to rows: each reader yields (where, row). A row that could not be parsed is yielded as its InputError, so that
# the caller alone decides whether a bad row stops the run.


def _lines(path):
    """(number, text) of each line, split at line feeds only: a U+2028 inside a JSON string does not end a line."""
    try:
        file = open(path, "rb")
    except FileNotFoundError:
        known = [p.name for p in path.parent.iterdir() if p.suffix in SUFFIXES] if os.path.isdir(path.parent) else []
        hint = nearest(path.name, known, 0.6)
        raise InputError(f"{path}: no such file; " + (f"did you mean {hint}?" if hint else "check the path")) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        name = str(path) if len(str(path)) < 200 and str(path).isprintable() else _show(str(path))
        raise InputError(f"{name}: cannot be read: {reason}; check the path and its permissions") from None
    with file:
        for number, raw in enumerate(file, 1):
            if number == 1:
                if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    raise InputError(f"{path}:1: this file is UTF-16; save it as UTF-8")
                if wrong := impostor(raw[:64]):
                    raise InputError(f"{path}:1: this is {wrong}")
                raw = raw.removeprefix(codecs.BOM_UTF8)
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                byte = f"byte 0x{raw[error.start]:02x} at position {error.start + 1} of the line"
                raise InputError(f"{path}:{number}: not UTF-8 ({byte}); save the file as UTF-8") from None
            if "\0" in text:
                raise InputError(f"{path}:{number}: NUL byte: not a text file, or damaged; save it again as UTF-8")
            yield number, text


def _parse_json(text, where):
    """json.loads, with every way it can fail as an InputError. A `where` without a line gets the one in `text`."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{where}:{error.lineno}" if isinstance(where, Path) else where
        reason = f"{error.msg} (column {error.colno})"
    except RecursionError:
        reason = "nested too deeply"
    except ValueError as error:  # an integer of more than 4,300 digits
        reason = str(error).split(";")[0]
    raise InputError(f"{where}: malformed JSON: {reason}; mend it there")


def _jsonl_rows(path):
    for number, text in _lines(path):
        if not text.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = _parse_json(text, where)
        except InputError as error:
            row = error
        yield where, row


def _json_rows(path):
    text = "".join(line for _, line in _lines(path))
    if not text.strip():
        return
    if text.lstrip()[0] != "[":
        raise InputError(f"{path}:1: a .json file holds a list of rows; if each line is an object, name it .jsonl")
    _parse_json(text, path)
    # The syntax is sound: walk the list again item by item, only to learn the line on which each row starts.
    decode, between = json.JSONDecoder().raw_decode, re.compile(r"[\s,]*")
    line, row, seen, at = 1, 0, 0, text.index("[") + 1
    while text[at := between.match(text, at).end()] != "]":
        line, row, seen = line + text.count("\n", seen, at), row + 1, at
        value, at = decode(text, at)
        yield f"{path}:{line}: row {row}", value


def _csv_rows(path):
    delimiter, name = ("\t", "tab") if path.suffix.lower() == ".tsv" else (",", "comma")
    csv.field_size_limit(2**31 - 1)  # the default stops at 128 KiB; a cell may hold a whole program
    reader = csv.reader((text for _, text in _lines(path)), delimiter=delimiter, strict=True)
    header, cells = None, []
    while cells is not None:
        where = f"{path}:{reader.line_num + 1}"  # a quoted cell may span lines: a row is named by its first one
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if header is None:  # the next row must not be taken for the header
                raise InputError(f"{where}: malformed CSV header: {_csv_reason(error)}") from None
            to = f" (the row runs to line {reader.line_num})" if where != f"{path}:{reader.line_num}" else ""
            yield where, InputError(f"{where}: malformed CSV: {_csv_reason(error)}{to}")
            continue
        if not cells:  # a blank line, or the end
            continue
        if header is None:
            header = _header(cells, where)
        elif len(cells) != len(header):
            advice = f"quote cells that hold a {name} or a line end" if len(cells) > len(header) else "add what is missing"
            yield where, InputError(f"{where}: {len(cells)} cell{'s' * (len(cells) > 1)} where the header has {len(header)}; {advice}")
        else:
            yield where, dict(zip(header, cells))


def _csv_reason(error):
    if "new-line character" in str(error):
        return "a carriage return without a line feed; end lines with LF or CRLF"
    return f"{error}; close quotes, and double those inside a cell"


def _header(cells, where):
    names = [cell.strip() for cell in cells]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"{where}: column {twice[0]!r} appears twice in the header; rename one")
    return names


def read_rows(path):
    """(where, row) of each row of a file, by the reader for its suffix; instead of a row the InputError that it is."""
    if os.path.isdir(path):
        raise InputError(f"{path}: is a folder where a file was expected; name a {', '.join(SUFFIXES)} file inside it")
    readers = {".csv": _csv_rows, ".tsv": _csv_rows, ".json": _json_rows, ".jsonl": _jsonl_rows}
    if path.suffix.lower() not in readers:
        raise InputError(f"{path}: unknown file type {path.suffix or 'without suffix'}; use {', '.join(SUFFIXES)}")
    return readers[path.suffix.lower()](path)


# ----------------------------------------------------------------------------------------------------
# Rows to records


def _recognise(row, where):
    """The format a row's columns speak of; InputError where they leave it open."""
    if isinstance(row, str):
        return "prompts"
    if not isinstance(row, dict):
        raise InputError(f"{where}: a row is {_kind_of(row)}; write an object with named columns, or text for a prompt")
    columns = set(row)
    if {"intent", "snippet"} <= columns:
        if "checks" in columns:
            return "nano"
        return "conala-mined" if "prob" in columns and "rewritten_intent" not in columns else "conala"
    if "prompt" in columns:
        if columns & {"chosen", "rejected", *ALIASES}:
            return "preference"
        if "response" in columns:
            return "feedback" if "rating" in columns and columns & {"logits", "comment"} else "response"
        if "reference" in columns:
            return "reference"
        if columns <= {"prompt", "id"}:  # with more columns "prompts" must be asked for: one may be a misspelt answer
            return "prompts"
    raise InputError(f"{where}: columns fit no format (columns found: {_names(row)}); rename them (data/README.md), "
                     f"or name the format with --data-format")


def _names(row):
    names = ", ".join(repr(str(name))[1:-1] for name in row) or "none"
    return names if len(names) <= 200 else names[:197] + "..."


def _kind_of(value):
    """A JSON value's type, in words."""
    words = {bool: "true/false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return "null" if value is None else words[type(value)]


def _show(value):
    """A value for a one-line message: escaped, and cut to 40 characters."""
    shown = repr(value)
    return shown if len(shown) <= 40 else shown[:37] + "..."


def _text(name, value, where):
    if not isinstance(value, str):
        raise InputError(f"{where}: {name!r} is {_kind_of(value)}, not text; put it in quotes")
    if not value.strip() and name not in MAY_BE_EMPTY:
        raise InputError(f"{where}: {name!r} is empty; fill it in or remove the row")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"{where}: {name!r} holds half a surrogate pair, which is not text; remove it") from None
    return value


def _number(name, value, where):
    try:
        if isinstance(value, bool) or not math.isfinite(number := float(value)):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{where}: {name!r} is {_show(value)}, not a finite number; mend or remove the row") from None
    return number


def _probability(name, value, where):
    number = _number(name, value, where)
    if not 0 <= number <= 1:
        raise InputError(f"{where}: {name!r} is {number:g}, not between 0 and 1; correct it or remove the row")
    return number


def _list(name, value, where):
    """A list; inside a CSV cell it is written as JSON."""
    if isinstance(value, str):
        value = _parse_json(value, f"{where}: {name!r}")
    if not isinstance(value, list):
        raise InputError(f"{where}: {name!r} is {_kind_of(value)}, not a list; write [...]")
    return value


def _logits(name, value, where):
    return [_number(name, item, where) for item in _list(name, value, where)]


def _checks(name, value, where):
    checks = _list(name, value, where)
    for check in checks:
        for key in check if isinstance(check, dict) else ():
            if key not in ("setup", "value", "expression"):
                near = nearest(key, ("setup", "value", "expression"))
                raise InputError(f"{where}: {name!r} has {_show(key)}; a check has setup, value and, if need be, expression"
                                 + (f": did you mean {near}?" if near else ""))
        setup, expected = (check.get("setup"), check.get("value")) if isinstance(check, dict) else (None, None)
        if not isinstance(setup, str) or not isinstance(expected, str):
            raise InputError(f"{where}: {name!r} holds {_show(check)}; write {{'setup': source text, 'value': text}}")
        try:
            ast.literal_eval(expected)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise InputError(f"{where}: {name!r}: the value {_show(expected)} is no literal, such as [1, 'a']: write repr(value)") from None
        for key in ("setup", "expression"):
            try:
                ast.parse(_text(key, check.get(key) or "0", where))
            except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
                raise InputError(f"{where}: {name!r}: the {key} {_show(check[key])} is no Python ({error}); mend it") from None
    return checks


def _identifier(name, value, where):
    if isinstance(value, (bool, float, list, dict)):
        raise InputError(f"{where}: {name!r} is {_kind_of(value)}; an id is text or a whole number")
    return _text(name, str(value), where)


CONVERT = {"prompt": _text, "reference": _text, "response": _text, "chosen": _text, "rejected": _text, "comment": _text,
           "rating": _number, "probability": _probability, "logits": _logits, "checks": _checks, "id": _identifier}


def _columns(row, kind, where):
    """A row as a dict that has all columns its format needs, aliases resolved."""
    needs = ", ".join(NEEDS[kind])
    if isinstance(row, str) and kind == "prompts":
        return {"prompt": row}
    if not isinstance(row, dict):
        raise InputError(f"{where}: a row is {_kind_of(row)}; a {kind} row is an object with {needs}")
    for alias, name in ALIASES.items():
        if alias in row and name in row:
            raise InputError(f"{where}: both {name!r} and {alias!r} are given; keep one")
    named = {ALIASES.get(name, name): value for name, value in row.items()}
    for name in NEEDS[kind]:
        if name not in named:
            raise InputError(f"{where}: no column {name!r} (columns found: {_names(row)}); a {kind} row needs {needs}; "
                             f"rename the column or choose another --data-format")
    return named


def _record(row, kind, where):
    """A row of a known format as a Record: columns checked and converted to fields; the others go to `meta`."""
    row, needs = _columns(row, kind, where), NEEDS[kind]
    if "intent" in needs:
        row, needs = _from_intent(row, kind, where), ("prompt", "reference", *needs[2:])
    values, meta = {}, {}
    for name, value in row.items():
        if name not in CONVERT:
            meta[name] = value
        elif value is None or (value == "" and not (name in needs and name in MAY_BE_EMPTY)):
            if name in needs:
                state = "null" if value is None else "empty"
                raise InputError(f"{where}: {name!r} is {state}; fill it in or remove the row")
        else:
            values[name] = CONVERT[name](name, value, where)
    return Record(**values, meta=meta)


def _from_intent(row, kind, where):
    """CoNaLa's columns under our names: the annotators' `rewritten_intent` is the prompt, where there is one."""
    row = dict(row)
    intent, row["reference"] = _text("intent", row.pop("intent"), where), _text("snippet", row.pop("snippet"), where)
    rewritten = row.pop("rewritten_intent", None)
    blank = rewritten is None or (isinstance(rewritten, str) and not rewritten.strip())
    row["prompt"] = intent if blank else _text("rewritten_intent", rewritten, where)
    if kind != "nano":
        row["intent"] = intent
    if "prob" in row:
        row["probability"] = _probability("prob", row.pop("prob"), where)
    return row


def read(path, data_format="auto", min_probability=0.0, skip_bad_rows=False):
    """All rows of one file (.csv, .tsv, .json, .jsonl) as a list of Record, in the file's order.

    Args:
        data_format: one of FORMATS; "auto" goes by the columns of the first row.
        min_probability: leave out conala-mined rows below it; for any other format an error.
        skip_bad_rows: leave out faulty rows; stderr says how many of how many, and lists each with its reason.
    Raises InputError (`file:line: reason; way out`) at the first faulty row, for an unreadable file (not UTF-8, no such
    file, unknown columns: never skipped), and where no row is left.
    """
    return _read(path, data_format, min_probability, skip_bad_rows)[0]


def _read(path, data_format="auto", min_probability=0.0, skip_bad_rows=False):
    """`read`, with the format found: (records, kind)."""
    path, kind = Path(path), data_format
    if kind not in FORMATS:
        hint = f"; did you mean {near}?" if (near := nearest(kind, FORMATS)) else ""
        raise InputError(f"--data-format {kind}: no such format (there are {', '.join(FORMATS)}){hint}")
    if not 0 <= min_probability <= 1:
        raise InputError(f"--min-probability {min_probability}: must lie between 0 and 1")
    records, bad, seen, below = [], [], {}, 0
    for where, row in read_rows(path):
        if kind == "auto" and not isinstance(row, InputError):
            kind = _recognise(row, where)
        try:
            if isinstance(row, InputError):
                raise row
            record = _record(row, kind, where)
            if kind != "conala-mined":  # the miner's ids are not ours to judge
                _new_id(record, where, seen)
        except InputError as error:
            if not skip_bad_rows:
                raise
            bad.append(str(error))
            continue
        if min_probability and record.probability is None:
            raise InputError(f"{where}: --min-probability is for conala-mined rows, not for {kind}; leave it out")
        if min_probability and record.probability < min_probability:
            below += 1
        else:
            records.append(record)
    _report_rows(path, records, bad, below, min_probability)
    return records, kind


def _new_id(record, where, seen):
    """Remember a row's id; a second row with it is an error."""
    if record.id is not None and record.id in seen:
        raise InputError(f"{where}: id {_show(record.id)} is used twice (first {seen[record.id]}); make ids unique")
    seen[record.id] = where


def _report_rows(path, records, bad, below, min_probability):
    """Stop where nothing is left to train on; say on stderr what was skipped."""
    if not records and bad:
        raise InputError(f"{path}: not one of {len(bad)} rows is sound; the first: {bad[0]}")
    if not records and below:
        raise InputError(f"{path}: none of {below} rows has prob >= {min_probability:g}; lower --min-probability")
    if not records:
        raise InputError(f"{path}:1: the file holds no rows; see data/README.md for the formats")
    if bad:
        lines = [f"{path}: skipped {len(bad)} of {len(records) + below + len(bad)} rows", *bad[:MOST_LISTED]]
        lines += [f"... and {len(bad) - MOST_LISTED} more"] if len(bad) > MOST_LISTED else []
        print("\n  ".join(lines), file=sys.stderr)


# ----------------------------------------------------------------------------------------------------
# Splits


def load_splits(path, data_format="auto", validation=0.1, test=0.1, seed=0, min_probability=None, skip_bad_rows=False):
    """Train, validation and test rows from a file, a folder, or a name ("nano", "conala": the folders in data/).

    A folder holds CoNaLa's own files, or train / validation / test in any supported format (`test_*` files become
    `extra`). A split the folder lacks, and all splits of a single file, come off train by `split`.

    Args:
        validation, test: shares of the rows, used for splits that have no file of their own.
        min_probability: for a CoNaLa folder, add the mined rows of at least this probability to train, but for those
            that share a question or a prompt with held-out rows; for a mined file, the cut.
    """
    for name, share in (("validation", validation), ("test", test)):
        if not 0 <= share < 1:
            raise InputError(f"{name} share {share}: must be at least 0 and below 1")
    path = DATA / str(path) if str(path) in ("nano", "conala") else Path(path)
    if path == DATA / "conala" and not path.is_dir():
        raise InputError(f"{path}: no such folder; get it with: python -m nanorlhf.data download conala")
    if not os.path.isdir(path):  # os.path's says no, where Path's raises, to a name that is too long
        records, kind = _read(path, data_format, min_probability or 0.0, skip_bad_rows)
        with naming(path):
            return Splits(*split(records, validation, test, seed), {}, f"{path}, split by prompt with seed {seed}", kind,
                          ("validation", "test"))
    splits = _load_folder(path, data_format, {"validation": validation, "test": test}, seed, skip_bad_rows)
    if min_probability is not None:
        _add_mined(splits, path / CONALA_MINED, min_probability, skip_bad_rows)
    return splits


def _load_folder(folder, data_format, shares, seed, skip_bad_rows):
    """The splits a folder's files hold; what is missing comes off train, by `shares`."""
    rows, kinds, source = {}, set(), []
    for name, file in _split_files(folder).items():
        rows[name], kind = _read(file, data_format, skip_bad_rows=skip_bad_rows)
        kinds.add(kind)
        source.append(file.name)
    if len(kinds) > 1:
        raise InputError(f"{folder}: its files differ in format ({', '.join(sorted(kinds))}); keep one format a folder")
    wanted = {name: 0.0 if name in rows else share for name, share in shares.items()}
    drawn = tuple(name for name in wanted if wanted[name])
    if drawn:
        source.append(f"{' and '.join(drawn)} split off train with seed {seed}")
    with naming(folder):
        train, *off = split(rows.pop("train"), **wanted, seed=seed)
    held_out = [rows.pop(name, part) for name, part in zip(wanted, off)]
    return Splits(train, *held_out, rows, f"{folder}: {', '.join(source)}", kinds.pop(), drawn)


def _split_files(folder):
    """{split name: file} of a folder; a split with two files, or no train file, is an error."""
    if (folder / "conala-train.json").is_file():
        files = {"train": folder / "conala-train.json", "test": folder / "conala-test.json"}
        return files if files["test"].is_file() else {"train": files["train"]}
    files, names = {}, {"valid": "validation", "val": "validation", "dev": "validation"}
    for file in sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES):
        name = names.get(file.stem, file.stem)
        if name in files:
            raise InputError(f"{folder}: both {files[name].name} and {file.name} could be the {name} split; remove one")
        if name in SPLITS or name.startswith("test_"):
            files[name] = file
    if "train" not in files:
        held = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise InputError(f"{folder}: no train file (found: {held}); name the files train, validation and test, "
                         f"each {', '.join(SUFFIXES)}, or give one file")
    return {name: files[name] for name in sorted(files, key=lambda name: (*SPLITS, name).index(name))}


def _add_mined(splits, path, min_probability, skip_bad_rows):
    """Append mined rows to train, in place; those that share a question or a prompt with held-out rows stay out."""
    if not path.is_file():
        raise InputError(f"{path}: no such file, but --min-probability asks for mined rows; leave the option out, "
                         f"or: python -m nanorlhf.data download conala")
    held_out = [*splits.validation, *splits.test, *(record for rows in splits.extra.values() for record in rows)]
    taken = {key for record in held_out for key in _keys(record)}
    mined = read(path, "conala-mined", min_probability, skip_bad_rows)
    kept = [record for record in mined if taken.isdisjoint(_keys(record))]
    splits.train = splits.train + kept
    splits.source += (f"; {len(kept)} mined rows of prob >= {min_probability:g} added to train, "
                      f"{len(mined) - len(kept)} left out that share a question with held-out rows")


def _keys(record):
    """What ties rows together: two rows with a key in common never part."""
    keys, question = [("prompt", normalise(record.prompt))], _question(record)
    return keys if question is None else keys + [("question", question)]


def _question(record):
    """The Stack Overflow question a row comes from, as text, or None."""
    question = record.meta.get("question_id")
    return None if question in (None, "") else str(question)


def _groups(records):
    """Lists of indices of rows tied by a chain of shared keys (union-find), in order of first appearance."""
    parent = {}

    def root(key):
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for record in records:
        first, *others = _keys(record)
        for other in others:
            parent[root(other)] = root(first)
    groups = {}
    for index, record in enumerate(records):
        groups.setdefault(root(_keys(record)[0]), []).append(index)
    return list(groups.values())


def split(records, validation=0.1, test=0.1, seed=0):
    """(train, validation, test): whole `_groups`, shuffled with `seed`, go to test, then validation, while they fit.

    train, and each split with a share above 0, gets at least one group. Rows keep their order within a split.
    """
    if validation + test >= 1:
        raise InputError(f"--validation {validation} and --test {test} leave nothing to train on; lower them")
    groups, shares = _groups(records), {"test": test, "validation": validation}
    needed = 1 + sum(share > 0 for share in shares.values())
    if len(groups) < needed:
        raise InputError(f"{len(records)} rows with {len(groups)} different prompt{'s' * (len(groups) > 1)} cannot make {needed} splits; "
                         f"add rows, or give the splits as files (train, validation, test)")
    room = {name: max(1, round(share * len(records))) if share else 0 for name, share in shares.items()}
    parts = {"test": [], "validation": [], "train": []}  # indices of groups
    for index in random.Random(seed).sample(range(len(groups)), len(groups)):
        name = next((name for name in room if len(groups[index]) <= room[name]), "train")
        parts[name].append(index)
        if name != "train":
            room[name] -= len(groups[index])
    for name, part in parts.items():  # no group fitted, or none was left: take the smallest from the largest part
        if not part and shares.get(name, 1):
            giver = max(parts.values(), key=len)
            part.append(min(giver, key=lambda index: (len(groups[index]), index)))
            giver.remove(part[0])
    rows = {name: sorted(row for index in part for row in groups[index]) for name, part in parts.items()}
    return tuple([records[row] for row in rows[name]] for name in SPLITS)


# ----------------------------------------------------------------------------------------------------
# Leakage


def normalise(text):
    """Lower-case, without backticks and quotes, white space collapsed: "Sort list `A`" and "sort  list 'a'" are one."""
    return " ".join(re.sub("[`'\"\u2018\u2019\u201c\u201d]", "", text).lower().split())


def leakage(train, test):
    """How many test rows also occur in train: by intent (the prompt), snippet (the answer), pair of both, question_id.

    Returns plain JSON types: {"train_rows", "test_rows", and for each of "intents", "snippets", "pairs", "question_ids"
    that both sides have: {"exact", "normalised", "exact_share", "normalised_share", "examples"}}. Counts are of test
    rows, shares of the test rows that have such a field; there are up to five examples.
    """
    kinds = {
        "intents": lambda r: (r.prompt,),
        "snippets": lambda r: None if r.answer is None else (r.answer,),
        "pairs": lambda r: None if r.answer is None else (r.prompt, r.answer),
        "question_ids": lambda r: None if _question(r) is None else (_question(r),),
    }
    report = {"train_rows": len(train), "test_rows": len(test)}
    for name, key in kinds.items():
        train_keys, test_keys = [k for r in train if (k := key(r))], [k for r in test if (k := key(r))]
        if train_keys and test_keys:
            report[name] = _overlap(train_keys, test_keys)
    return report


def _overlap(train_keys, test_keys):
    """Counts of test keys (tuples of strings) that are among the training keys, as they are and normalised."""
    def normal(key):
        return tuple(map(normalise, key))
    known, normal_known = set(train_keys), set(map(normal, train_keys))
    exact = [key for key in test_keys if key in known]
    found = [key for key in test_keys if normal(key) in normal_known]
    examples = [[part[:200] for part in key] for key in dict.fromkeys(exact + found)][:5]
    return {"exact": len(exact), "normalised": len(found), "exact_share": len(exact) / len(test_keys),
            "normalised_share": len(found) / len(test_keys), "examples": examples}


def check_leakage(splits, allow_overlap=False):
    """The leakage of train into every other split, and of validation into the test splits.

    An intent, a pair or a question_id on both sides, exact or normalised, raises InputError unless allow_overlap. A
    snippet alone does not: short ones (`len(s)`) answer many questions; in official CoNaLa five (normalised: seven)
    test rows have such. Returns {"allow_overlap", "overlap": [a sentence for each pair of splits that overlaps],
    "splits": {"train/test": leakage(train, test), ...}}.
    """
    named = {name: rows for name, rows in splits.named().items() if rows}
    tests = [name for name in named if name not in ("train", "validation")]
    pairs = [("train", name) for name in named if name != "train"]
    pairs += [("validation", name) for name in tests if "validation" in named]
    reports, overlap = {}, []
    for left, right in pairs:
        reports[f"{left}/{right}"] = found = leakage(named[left], named[right])
        stops = [kind for kind in ("intents", "pairs", "question_ids") if kind in found and found[kind]["normalised"]]
        if stops:
            counts = ", ".join(f"{count} {kind if count > 1 else kind[:-1]} ({found[kind]['exact']} exact)"
                               for kind in stops for count in [found[kind]["normalised"]])
            overlap.append(f"{left} and {right} share {counts}, such as {_show(found[stops[0]]['examples'][0][0])}")
    if overlap and not allow_overlap:
        raise InputError(f"splits overlap: {'; '.join(overlap)}; remove these rows, or pass --allow-overlap")
    return {"allow_overlap": allow_overlap, "overlap": overlap, "splits": reports}


def open_data(config, beside=False):
    """(Splits, the leakage report) that a script's data options name. Options of splits that the data brings itself are refused, but
    not where it stands `beside` other data, which may want them."""
    splits = load_splits(config.data, config.data_format, config.validation, config.test, config.split_seed,
                         config.min_probability, config.skip_bad_rows)
    idle = {"validation", "test"} - {*splits.drawn} | (set() if splits.drawn else {"split_seed"})
    beside = beside or getattr(config, "resume", False)  # a run that is older than this check goes on
    if not beside and (flags := asked(config, *sorted(idle))):
        raise InputError(f"{flags}: {config.data} has files of its own for what these would split off: leave out")
    leakage = check_leakage(splits, config.allow_overlap)
    splits = splits.head(config.max_rows) if config.max_rows else splits
    for line in undecided(splits):
        print(line)
    return splits, leakage


def undecided(splits):
    """Lines about pairs whose chosen response is the rejected one: their loss is a constant, and no order of theirs is right."""
    counts = {name: sum(row.chosen is not None and row.chosen == row.rejected for row in rows) for name, rows in splits.named().items()}
    return [f"{name}: {count} of {len(splits.named()[name])} pairs have the same response on both sides, which teaches nothing and counts as "
            "wrong: remove them" for name, count in counts.items() if count]


# ----------------------------------------------------------------------------------------------------
# The official CoNaLa archive


def download_conala(to=DATA / "conala", url=CONALA_URL):
    """Fetch the official v1.1 archive, check the curated files' sha256, and put its files into the folder `to`.

    Nothing is put there before all is checked. Raises OSError with one clear line where the network, the server or the
    archive fails. Returns the folder.
    """
    to = Path(to)
    held = all((to / name).is_file() and sha256(to / name) == digest for name, digest in CONALA_SHA256.items())
    if held and (to / CONALA_MINED).is_file():
        print(f"{to} already holds the corpus, the curated files with the right sha256: nothing to do")
        return to
    if to.exists() and not to.is_dir():
        raise InputError(f"--to {to}: is a file; name a folder")
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".conala-", dir=to.parent) as scratch:  # same file system: moves are atomic
        archive = Path(scratch) / "corpus.zip"
        _fetch(url, archive)
        files = _unpack(archive, Path(scratch), url)
        to.mkdir(exist_ok=True)
        for file in files:
            os.replace(file, to / file.name)
    return to


def _fetch(url, target):
    """Stream a URL to a file, with progress on stderr where that is a terminal."""
    got, show = 0, sys.stderr.isatty()
    try:
        with urllib.request.urlopen(url, timeout=30) as reply, open(target, "wb") as out:
            size = int(reply.headers.get("Content-Length") or 0)
            while block := reply.read(1 << 18):
                out.write(block)
                got += len(block)
                if show:
                    print(f"\r{got / 1e6:.1f} of {size / 1e6:.1f} MB", end="", file=sys.stderr, flush=True)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise OSError(f"could not download {url}: {reason}; check the network, or fetch the archive elsewhere and "
                      f"unzip its files into the folder") from None
    if show:
        print(file=sys.stderr)
    if got < size:
        raise OSError(f"could not download {url}: the connection ended after {got} of {size} bytes; try again")


def _unpack(archive, folder, url):
    """The corpus's files out of the archive into `folder`, checked; returns their paths.

    Files are written under their bare expected names, never under a name the archive gives, so no member can land
    elsewhere; members with `..` or a root in the name, and all others, are ignored.
    """
    members = {}
    try:
        with zipfile.ZipFile(archive) as bundle:
            for info in bundle.infolist():
                name = PurePosixPath(info.filename)
                if name.name in (*CONALA_SHA256, CONALA_MINED) and ".." not in name.parts and not name.is_absolute():
                    members.setdefault(name.name, info)
            for name, info in members.items():
                with bundle.open(info) as source, open(folder / name, "wb") as out:
                    shutil.copyfileobj(source, out)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise OSError(f"{url}: not a sound zip archive ({error}); nothing was written; try again") from None
    for name, expected in CONALA_SHA256.items():
        if name not in members:
            raise OSError(f"{url}: holds no {name}, so is not the CoNaLa v1.1 archive; nothing was written")
        if (digest := sha256(folder / name)) != expected:
            raise OSError(f"{url}: {name} has sha256 {digest}, v1.1 has {expected}; nothing was written")
    for name in members:
        print(f"{name}  sha256 {sha256(folder / name)}{'  as expected' if name in CONALA_SHA256 else ''}")
    return [folder / name for name in members]


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ----------------------------------------------------------------------------------------------------
# python -m nanorlhf.data


def describe(splits):
    """Lines about a data set: source, kind, rows and characters per split, repeated rows, leakage."""
    lines = [f"source   {splits.source}", f"kind     {splits.kind}"]
    for name, rows in splits.named().items():
        pairs = {(r.prompt, r.answer, r.rejected) for r in rows}
        lines.append(f"{name:<11}{len(rows):>7} rows, {len(rows) - len(pairs)} of them repeat another")
        for what in ("prompt", "answer"):
            texts = [getattr(record, what) for record in rows]
            if lengths := sorted(len(text) for text in texts if text is not None):
                lines.append(f"  {what} characters: median {statistics.median(lengths):g}, "
                             f"95 % up to {lengths[math.ceil(0.95 * len(lengths)) - 1]}, longest {lengths[-1]}")
    for pair, report in check_leakage(splits, allow_overlap=True)["splits"].items():
        counts = [f"{kind} {report[kind]['exact']} ({report[kind]['normalised']} normalised)"
                  for kind in ("intents", "snippets", "pairs", "question_ids") if kind in report]
        lines.append(f"leakage  {pair}: " + ", ".join(counts))
    return lines + undecided(splits)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line, as everywhere; argparse would print its usage first."""
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def main(argv=None):
    """The command line; returns the exit code: 0, 1 where a download failed, 2 for bad input."""
    parser = _Parser(prog="python -m nanorlhf.data", description="Look at data, or get CoNaLa.")
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="kind, counts, lengths and leakage of a file or folder")
    check.add_argument("path", help="a file, a folder, or nano / conala")
    check.add_argument("--data-format", default="auto", help=f"one of {', '.join(FORMATS)} (default: auto)")
    check.add_argument("--min-probability", type=float, help="use mined rows of at least this probability")
    check.add_argument("--skip-bad-rows", action="store_true", help="leave faulty rows out and say so")
    check.add_argument("--allow-overlap", action="store_true", help="exit 0 although train and held-out rows overlap")
    download = commands.add_parser("download", help="get the official CoNaLa v1.1 archive")
    download.add_argument("name", choices=["conala"])
    download.add_argument("--to", type=Path, default=DATA / "conala", help="folder (default: data/conala)")
    options = parser.parse_args(argv)
    try:
        if options.command == "download":
            print(f"CoNaLa v1.1 is in {download_conala(options.to)}")
            return 0
        splits = load_splits(options.path, options.data_format, min_probability=options.min_probability,
                             skip_bad_rows=options.skip_bad_rows)
        print("\n".join(describe(splits)))
        check_leakage(splits, options.allow_overlap)
        return 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
