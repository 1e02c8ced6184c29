"""The embedded data set: short Python snippets for natural-language intents, in the manner of CoNaLa.

    python data/nano/generate.py            rewrite train, validation, test and test_hard beside this file
    python data/nano/generate.py --check    exit 1 unless the four files equal a fresh generation

A *family* is one task with one canonical snippet, several phrasings of its intent, and slots for names and constants.
A *pair* puts one family inside another: ("sum", "even") is `sum([x for x in xs if x % 2 == 0])`. Two thirds of the
pairs are trained on, the others make up test_hard. Every row carries checks: bindings and the value that the reference
snippet gives on them. Bindings are redrawn until near misses (another constant, a sibling family) give another value.

To add a family, call `family(...)` in the table below: a name, the snippet, its slots, at least five phrasings.
Slots are written `$xs`; each has a kind from NAMES (a variable, bound in the checks) or CONSTANTS (a literal).
The result must be a plain builtin other than a set, whose order in `repr` would depend on the hash seed.

Everything is drawn from `random.Random` seeded by strings, and nothing depends on hash order, locale, clock or the
Python version: no float sums (3.12 compensates them), no f-strings (3.12 unparses them differently).
"""

import argparse
import ast
import json
import random
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import Template

FOLDER = Path(__file__).resolve().parent
SEED = "nano-1"
ROWS = {"train": 6000, "validation": 500, "test": 600, "test_hard": 300}
PAIR_ROWS = {"train": 24, "validation": 2, "test": 2}  # rows of each trained pair; the families share the rest
PLAIN = 0.3  # share of intents written without backticks

# ---------------------------------------------------------------------------------------------------------------------
# Names and constants
# ---------------------------------------------------------------------------------------------------------------------

NUMBER_LISTS = (
    "numbers nums xs values scores prices ages counts data points sizes grades weights totals levels amounts heights "
    "costs marks ranks distances temps results steps votes salaries readings lst"
).split()
WORD_LISTS = (
    "words names lines items tags labels cities fruits tokens colors files users titles animals parts messages fields "
    "columns countries terms strings teams authors songs books codes guests tools"
).split()
NAMES = {
    "numbers": NUMBER_LISTS,
    "words": WORD_LISTS,
    "numerals": WORD_LISTS,
    "list": NUMBER_LISTS + WORD_LISTS,
    "text": (
        "text s line sentence name title message word my_string label query comment header body phrase caption url "
        "token answer note email address slug paragraph filename reply user_input content"
    ).split(),
    "mapping": (
        "d my_dict stock inventory config settings lookup ratings population mapping index registry params balances "
        "prices scores ages counts totals points limits quotas budget votes ports weights hits visits"
    ).split(),
    "number": (
        "n num count total number value amount age price score size width height year limit quantity rank level "
        "distance speed weight seconds minutes pages balance bonus"
    ).split(),
    "size": "n num count total size width height limit quantity rank level length pages times repeats amount".split(),
    "real": (
        "ratio average rate price value temperature balance percent share mean_value score weight distance cost "
        "result fraction area speed tax discount length_m radius duration loss accuracy"
    ).split(),
    "grid": (
        "matrix grid rows table board nested lists groups batches pixels cells blocks samples layers tiles arrays "
        "records pages data sheets frames maps tables image"
    ).split(),
    "couples": (
        "pairs tuples items entries records points edges results data scores players products votes students rankings "
        "orders books cities stocks teams events tasks jobs files"
    ).split(),
    "records": (
        "users people products orders employees students rows records customers items books cars players houses "
        "tickets events data entries songs courses devices movies pets flights"
    ).split(),
    "date": (
        "day start end created deadline birthday today due updated expires departure arrival launch release holiday "
        "joined first_day last_day paid_on shipped dt moment begin finish"
    ).split(),
}
COMMON_WORDS = (
    "apple red blue cat dog tea sun moon milk tree bird fish rain snow sand gold rose lake bread stone river cloud "
    "green happy small paper music table chair north orange window station kitchen mountain yellow"
).split()
CONSTANTS = {
    "count": list(range(2, 7)),  # how many elements; lists in the checks have at least 8
    "letters": list(range(2, 7)),
    "index": list(range(1, 7)),
    "low": list(range(0, 5)),
    "high": list(range(5, 9)),
    "int": list(range(2, 26)),
    "big": list(range(20, 60)),
    "column": list(range(0, 4)),
    "width": list(range(6, 31)),
    "decimals": list(range(1, 6)),
    "word": COMMON_WORDS,
    "affix": "a b c d e m n o p r s t re un ca st th er in on ea ow".split(),
    "sep": [",", ", ", "-", ";", ":", "|", "/", "_", " ", "+", " - ", "#"],
    "key": "name age city price color size email score year type status title total level code weight".split(),
    "field": "age price size score year total level weight height rank".split(),
    "day": list(range(2, 46)),
    "format": ["%Y-%m-%d", "%d/%m/%Y", "%m/%d/%Y", "%d.%m.%Y", "%Y%m%d", "%d-%m-%y", "%Y/%m/%d", "%m-%d"],
}

# ---------------------------------------------------------------------------------------------------------------------
# The table of families
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """One task: a canonical snippet with its phrasings. After a statement in place, slot `reads` is read."""

    name: str
    snippet: str
    slots: dict[str, str]
    phrasings: tuple[str, ...]
    imports: str = ""
    reads: str = ""


FAMILIES: dict[str, Family] = {}


def family(name, snippet, slots, *phrasings, imports="", reads=""):
    """Add one family; `slots` reads "xs:numbers n:int"."""
    kinds = dict(slot.split(":") for slot in slots.split())
    assert name not in FAMILIES and len(phrasings) >= 5, name
    FAMILIES[name] = Family(name, snippet, kinds, phrasings, imports, reads)


# Reducing a list --------------------------------------------------------------
family("sum", "sum($xs)", "xs:numbers",
       "get the sum of all elements in list `$xs`", "how to add up all the numbers in `$xs`",
       "sum the items of a list `$xs`", "calculate the total of the values in list `$xs`",
       "compute the sum of list `$xs`", "add together every number in `$xs`")
family("max", "max($xs)", "xs:numbers",
       "find the maximum value in list `$xs`", "get the largest number in `$xs`",
       "how to get the biggest element of list `$xs`", "return the highest value in a list `$xs`",
       "retrieve the greatest item in `$xs`", "what is the maximum of the numbers `$xs`")
family("min", "min($xs)", "xs:numbers",
       "find the minimum value in list `$xs`", "get the smallest number in `$xs`",
       "how to get the least element of list `$xs`", "return the lowest value in a list `$xs`",
       "retrieve the smallest item in `$xs`", "what is the minimum of the numbers `$xs`")
family("length", "len($xs)", "xs:list",
       "get the number of elements in list `$xs`", "find the length of a list `$xs`",
       "how many items are in `$xs`", "count all the entries of list `$xs`",
       "get the size of list `$xs`", "how to get the length of `$xs`")
family("mean", "sum($xs) / len($xs)", "xs:numbers",
       "calculate the average of list `$xs`", "get the mean of the numbers in `$xs`",
       "how to compute the arithmetic mean of list `$xs`", "find the average value of the elements in `$xs`",
       "average all the numbers of a list `$xs`")
family("product", "math.prod($xs)", "xs:numbers",
       "multiply all the numbers in list `$xs` together", "get the product of the elements of `$xs`",
       "how to calculate the product of a list `$xs`", "compute the product of all values in `$xs` using math",
       "find the result of multiplying all items in list `$xs`", imports="import math")
family("n_distinct", "len(set($xs))", "xs:list",
       "count the number of distinct elements in list `$xs`", "how many unique values are in `$xs`",
       "get the number of different items in a list `$xs`", "find the count of unique elements of `$xs`",
       "how to count distinct values in list `$xs`")
family("all_above", "all([x > $n for x in $xs])", "xs:numbers n:int",
       "check if all elements in list `$xs` are greater than $n", "test whether every number in `$xs` exceeds $n",
       "are all values of list `$xs` above $n", "see if each item of `$xs` is larger than $n",
       "how to know if all numbers of a list `$xs` are bigger than $n")

# Looking things up in a list --------------------------------------------------
family("count_value", "$xs.count($n)", "xs:numbers n:int",
       "count the occurrences of $n in list `$xs`", "how many times does $n appear in `$xs`",
       "get the number of times $n is in a list `$xs`", "count how often the number $n occurs in `$xs`",
       "find the frequency of item $n in list `$xs`")
family("contains", "$n in $xs", "xs:numbers n:int",
       "check if $n is in list `$xs`", "test whether list `$xs` contains the number $n",
       "how to check that `$xs` has an element $n", "see if the value $n exists in list `$xs`",
       "find out if number $n is present in `$xs`")
family("argmax", "$xs.index(max($xs))", "xs:numbers",
       "get the index of the maximum value in list `$xs`", "find the position of the largest number in `$xs`",
       "how to find the index of the biggest element in `$xs`", "at which index is the highest value of list `$xs`",
       "return the position of the greatest item in a list `$xs`")
family("element_at", "$xs[$i]", "xs:list i:index",
       "get the element at index $i of list `$xs`", "access the item at position $i in `$xs`",
       "how to get the value at index $i in list `$xs`", "return the entry of `$xs` with index $i",
       "pick element number $i, counting from zero, from list `$xs`")
family("last_element", "$xs[-1]", "xs:list",
       "get the last element of list `$xs`", "how to access the final item in `$xs`",
       "return the last item of a list `$xs`", "retrieve the end element of `$xs`",
       "pick the very last value from list `$xs`", "fetch the last entry in `$xs`")

# Slicing ----------------------------------------------------------------------
family("first_n", "$xs[:$n]", "xs:list n:count",
       "get the first $n elements of list `$xs`", "take the first $n items from `$xs`",
       "how to slice the first $n entries of a list `$xs`", "keep only the leading $n elements of `$xs`",
       "return the $n first values in list `$xs`", "select the first $n of `$xs`")
family("last_n", "$xs[-$n:]", "xs:list n:count",
       "get the last $n elements of list `$xs`", "take the last $n items from `$xs`",
       "how to slice the final $n entries of a list `$xs`", "keep only the trailing $n elements of `$xs`",
       "return the $n last values in list `$xs`", "select the last $n of `$xs`")
family("every_nth", "$xs[::$n]", "xs:list n:count",
       "get every element of list `$xs` whose index is a multiple of $n", "take one in $n items from `$xs`",
       "how to slice a list `$xs` with step $n", "select elements of `$xs` in steps of $n",
       "pick one of every $n values in list `$xs` starting with the first")
family("slice", "$xs[$i:$j]", "xs:list i:low j:high",
       "get the elements from index $i to $j of list `$xs`", "slice `$xs` from $i up to $j",
       "how to take the sublist of `$xs` between positions $i and $j", "return the part of list `$xs` from $i until $j",
       "extract items $i to $j, end excluded, from `$xs`")
family("reverse", "$xs[::-1]", "xs:list",
       "reverse list `$xs`", "get the elements of `$xs` in reverse order", "how to reverse the order of a list `$xs`",
       "return a reversed copy of list `$xs`", "flip `$xs` so that the last element comes first",
       "list the items of `$xs` backwards")

# Sorting ----------------------------------------------------------------------
family("sort", "sorted($xs)", "xs:list",
       "sort list `$xs`", "get a sorted copy of `$xs`", "how to sort a list `$xs` in ascending order",
       "return the elements of `$xs` in increasing order", "order the items of list `$xs` from low to high",
       "arrange `$xs` in ascending order")
family("sort_desc", "sorted($xs, reverse=True)", "xs:list",
       "sort list `$xs` in descending order", "get a copy of `$xs` sorted in reverse",
       "how to sort a list `$xs` from largest to smallest", "return the elements of `$xs` in decreasing order",
       "order the items of list `$xs` from high to low", "arrange `$xs` in descending order")
family("sort_by_length", "sorted($ws, key=len)", "ws:words",
       "sort the strings in list `$ws` by length", "order the words of `$ws` by how long they are",
       "how to sort a list of strings `$ws` by the length of each string",
       "arrange `$ws` from shortest to longest string",
       "sort list `$ws` using the string length as key")
family("unique_sorted", "sorted(set($xs))", "xs:list",
       "get the sorted unique elements of list `$xs`", "remove duplicates from `$xs` and sort it",
       "how to get distinct values of a list `$xs` in sorted order", "sort list `$xs` without its duplicates",
       "make a sorted list of the different items in `$xs`")
family("sort_desc_in_place", "$xs.sort(reverse=True)", "xs:list",
       "sort list `$xs` in place in descending order", "how to sort `$xs` in reverse without making a copy",
       "modify list `$xs` so that it is sorted from high to low", "sort the list `$xs` itself in decreasing order",
       "in-place reverse sort of `$xs`", reads="xs")

# Comprehensions over numbers --------------------------------------------------
family("greater_than", "[x for x in $xs if x > $n]", "xs:numbers n:int",
       "get the elements of list `$xs` that are greater than $n", "filter `$xs` to keep numbers above $n",
       "how to select all values larger than $n from `$xs`", "find all numbers in list `$xs` bigger than $n",
       "keep only items of `$xs` that exceed $n", "list the numbers of `$xs` which are more than $n")
family("less_than", "[x for x in $xs if x < $n]", "xs:numbers n:int",
       "get the elements of list `$xs` that are less than $n", "filter `$xs` to keep numbers below $n",
       "how to select all values smaller than $n from `$xs`", "find all numbers in list `$xs` lower than $n",
       "keep only items of `$xs` under $n", "list the numbers of `$xs` which are less than $n")
family("even", "[x for x in $xs if x % 2 == 0]", "xs:numbers",
       "get the even numbers in list `$xs`", "filter out everything but even elements of `$xs`",
       "how to select all even values from list `$xs`", "find all elements of `$xs` that are even",
       "keep only the even items of a list `$xs`")
family("odd", "[x for x in $xs if x % 2 == 1]", "xs:numbers",
       "get the odd numbers in list `$xs`", "filter out everything but odd elements of `$xs`",
       "how to select all odd values from list `$xs`", "find all elements of `$xs` that are odd",
       "keep only the odd items of a list `$xs`")
family("divisible", "[x for x in $xs if x % $n == 0]", "xs:numbers n:count",
       "get the numbers in list `$xs` that are divisible by $n", "filter `$xs` to keep multiples of $n",
       "how to select all values of `$xs` which can be divided by $n", "find all multiples of $n in list `$xs`",
       "keep only items of `$xs` divisible by $n")
family("squares", "[x ** 2 for x in $xs]", "xs:numbers",
       "square each number in list `$xs`", "get the squares of all elements of `$xs`",
       "how to square every value in a list `$xs`", "make a list of the squared items of `$xs`",
       "raise each element of list `$xs` to the power of two")
family("add_to_each", "[x + $n for x in $xs]", "xs:numbers n:int",
       "add $n to each element in list `$xs`", "increase every number in `$xs` by $n",
       "how to add $n to all values of a list `$xs`", "make a list with $n added to each item of `$xs`",
       "increment all elements of list `$xs` by $n")
family("scale_each", "[x * $n for x in $xs]", "xs:numbers n:int",
       "multiply each element in list `$xs` by $n", "scale every number in `$xs` by a factor of $n",
       "how to multiply all values of a list `$xs` with $n", "make a list of the items of `$xs` times $n",
       "get $n times each element of list `$xs`")

# Two lists --------------------------------------------------------------------
family("concatenate", "$xs + $ys", "xs:list ys:list",
       "concatenate lists `$xs` and `$ys`", "join list `$ys` to the end of list `$xs` to get a new list",
       "how to put two lists `$xs` and `$ys` together in one", "make one list from `$xs` followed by `$ys`",
       "append all of `$ys` after `$xs` in a new list")
family("common", "sorted(set($xs) & set($ys))", "xs:numbers ys:numbers",
       "get a sorted list of elements common to `$xs` and `$ys`",
       "find the sorted intersection of lists `$xs` and `$ys`",
       "how to find values that are in both `$xs` and `$ys`, sorted", "sorted items shared by `$xs` and `$ys`",
       "which numbers occur in `$xs` and also in `$ys`, in order")
family("not_in", "[x for x in $xs if x not in $ys]", "xs:numbers ys:numbers",
       "get the elements of list `$xs` that are not in `$ys`", "remove from `$xs` all items found in `$ys`",
       "how to find values of `$xs` missing from list `$ys`", "filter `$xs` to keep what does not occur in `$ys`",
       "list the numbers in `$xs` but not in `$ys`")
family("subset", "set($xs) <= set($ys)", "xs:numbers ys:numbers",
       "check if all elements of list `$xs` are in `$ys`", "test whether `$xs` is a subset of `$ys`",
       "how to see if list `$ys` contains every item of `$xs`", "is each value of `$xs` also found in `$ys`",
       "find out whether `$ys` includes the whole of `$xs`")
family("dict_from_lists", "dict(zip($ws, $xs))", "ws:words xs:numbers",
       "create a dictionary from keys `$ws` and values `$xs`", "map each string in `$ws` to the number in `$xs`",
       "how to build a dict with list `$ws` as keys and list `$xs` as values",
       "turn two lists `$ws` and `$xs` into a dictionary", "make a dict that pairs keys `$ws` with values `$xs`")

# Changing a list in place -----------------------------------------------------
family("append", "$xs.append($n)", "xs:numbers n:int",
       "append $n to list `$xs`", "add the number $n to the end of list `$xs`", "how to append an item $n to `$xs`",
       "put $n at the end of a list `$xs`", "push the value $n onto list `$xs`", reads="xs")
family("insert", "$xs.insert($i, $n)", "xs:numbers i:index n:big",
       "insert $n at index $i of list `$xs`", "put the number $n into `$xs` at position $i",
       "how to insert an item $n at position $i in list `$xs`", "place $n before index $i in a list `$xs`",
       "add value $n to `$xs` at index $i", reads="xs")

# Making lists -----------------------------------------------------------------
family("range", "list(range($i, $n))", "i:low n:size",
       "create a list of numbers from $i to `$n`, end excluded",
       "get all integers from $i up to but not including `$n`",
       "how to make a list with the range $i to `$n`", "list the integers starting at $i and below `$n`",
       "generate numbers from $i until `$n` as a list")
family("repeat", "[$k] * $n", "k:int n:size",
       "create a list with the number $k repeated `$n` times", "make a list of `$n` copies of $k",
       "how to build a list of length `$n` filled with $k", "repeat value $k for `$n` elements in a list",
       "list of size `$n` where each item is $k")

# Nested lists -----------------------------------------------------------------
family("flatten", "[x for row in $g for x in row]", "g:grid",
       "flatten a list of lists `$g`", "make a flat list out of nested list `$g`",
       "how to turn a list of lists `$g` into one list", "get all elements of the rows of `$g` in a single list",
       "concatenate the sublists of `$g`", "unnest the two-level list `$g`")
family("column", "[row[$i] for row in $g]", "g:grid i:column",
       "get column $i of matrix `$g`", "extract the element at index $i from each row of `$g`",
       "how to take the values in column $i of a list of lists `$g`", "list item $i of every sublist in `$g`",
       "select column number $i from nested list `$g`")
family("row_sums", "[sum(row) for row in $g]", "g:grid",
       "get the sum of each row in `$g`", "sum every sublist of `$g`", "how to add up each inner list of `$g`",
       "list the totals of the rows of matrix `$g`", "compute row sums of nested list `$g`")

# Lists of strings -------------------------------------------------------------
family("join", "$sep.join($ws)", "ws:words sep:sep",
       "join the strings in list `$ws` with separator $sep", "concatenate the words of `$ws` using $sep between them",
       "how to join list `$ws` into one string with $sep", "make a string of the items in `$ws` separated by $sep",
       "combine list of strings `$ws` with delimiter $sep")
family("join_numbers", "$sep.join(map(str, $xs))", "xs:numbers sep:sep",
       "join the numbers in list `$xs` with separator $sep", "convert integers `$xs` to a string separated by $sep",
       "how to join a list of ints `$xs` into one string with $sep",
       "make a string of the numbers in `$xs` with $sep between",
       "turn list of numbers `$xs` into text with delimiter $sep")
family("upper_each", "[w.upper() for w in $ws]", "ws:words",
       "convert all strings in list `$ws` to uppercase", "get each word of `$ws` in capital letters",
       "how to uppercase every string of a list `$ws`", "make a list of the upper case items of `$ws`",
       "change the elements of `$ws` to upper case")
family("lengths", "[len(w) for w in $ws]", "ws:words",
       "get the length of each string in list `$ws`", "list how long every word of `$ws` is",
       "how to get the lengths of all strings in `$ws`", "make a list of the string lengths of `$ws`",
       "compute the number of characters of each item in `$ws`")
family("longest", "max($ws, key=len)", "ws:words",
       "find the longest string in list `$ws`", "get the longest word of `$ws`",
       "how to get the string with the most characters in `$ws`", "return the item of maximum length in list `$ws`",
       "which of the strings in `$ws` is the longest")
family("starts_with", "[w for w in $ws if w.startswith($p)]", "ws:words p:affix",
       "get the strings in list `$ws` that start with $p", "filter `$ws` for words beginning with $p",
       "how to select items of `$ws` with prefix $p", "find all strings of a list `$ws` starting with $p",
       "keep only elements of `$ws` that begin with $p")
family("ends_with", "[w for w in $ws if w.endswith($p)]", "ws:words p:affix",
       "get the strings in list `$ws` that end with $p", "filter `$ws` for words ending in $p",
       "how to select items of `$ws` with suffix $p", "find all strings of a list `$ws` ending with $p",
       "keep only elements of `$ws` that end in $p")
family("longer_than", "[w for w in $ws if len(w) > $n]", "ws:words n:letters",
       "get the strings in list `$ws` longer than $n characters", "filter `$ws` for words with more than $n letters",
       "how to select strings of `$ws` whose length is greater than $n",
       "find all words in `$ws` that are longer than $n",
       "keep only strings with length above $n in list `$ws`")
family("parse_ints", "[int(w) for w in $ws]", "ws:numerals",
       "convert all strings in list `$ws` to integers", "turn a list of numeric strings `$ws` into ints",
       "how to parse every string of `$ws` as an integer", "make a list of ints from the strings in `$ws`",
       "cast the elements of list `$ws` to int")
family("most_common", "collections.Counter($ws).most_common($n)", "ws:words n:count",
       "get the $n most common elements of list `$ws` with their counts",
       "find the $n most frequent words in `$ws` and how often they occur",
       "how to get the top $n items of `$ws` by frequency with Counter", "count `$ws` and return the $n most common",
       "use a Counter for the $n most frequent strings of `$ws`", imports="import collections")

# Strings ----------------------------------------------------------------------
family("split", "$s.split($by)", "s:text by:sep",
       "split string `$s` by $by", "split `$s` on the separator $by", "how to break a string `$s` at each $by",
       "get a list of the parts of `$s` between $by", "divide string `$s` using delimiter $by")
family("replace", "$s.replace($a, $b)", "s:text a:word b:word",
       "replace $a with $b in string `$s`", "substitute all occurrences of $a in `$s` by $b",
       "how to change every $a to $b in a string `$s`", "in `$s`, put $b in place of $a",
       "swap $a for $b in the string `$s`")
family("upper", "$s.upper()", "s:text",
       "convert string `$s` to uppercase", "get `$s` in capital letters", "how to make a string `$s` upper case",
       "change all letters of `$s` to uppercase", "uppercase version of the string `$s`")
family("count_text", "$s.count($p)", "s:text p:affix",
       "count the occurrences of $p in string `$s`", "how many times does substring $p appear in `$s`",
       "get the number of times $p is in a string `$s`", "count how often the text $p occurs in `$s`",
       "find the frequency of $p in string `$s`")
family("text_starts", "$s.startswith($p)", "s:text p:affix",
       "check if string `$s` starts with $p", "test whether `$s` begins with $p",
       "does the string `$s` have the prefix $p", "how to check that `$s` starts with substring $p",
       "see if $p is at the beginning of `$s`")
family("text_contains", "$a in $s", "s:text a:word",
       "check if string `$s` contains $a", "test whether substring $a is in string `$s`",
       "how to see if `$s` includes the text $a", "does $a occur in the string `$s`",
       "find out whether the string `$s` has $a in it")
family("count_words", "len($s.split())", "s:text",
       "count the number of words in string `$s`", "how many words are in `$s`",
       "get the word count of a string `$s`", "find the number of whitespace separated tokens in `$s`",
       "how to count the words of the string `$s`")
family("find_digits", "re.findall('\\\\d+', $s)", "s:text",
       "find all numbers in string `$s` with a regex", "extract every group of digits from `$s`",
       "how to get all runs of digits in a string `$s`", "list the numbers that occur in string `$s` as strings",
       "use re to find all digit sequences in `$s`", imports="import re")
family("zero_pad", "str($n).zfill($w)", "n:number w:width",
       "pad number `$n` with leading zeros to width $w", "convert `$n` to a string of length $w filled with zeros",
       "how to zero-fill the number `$n` to $w digits", "write `$n` with at least $w digits",
       "add zeros to the left of `$n` up to $w characters")

# Numbers and formatting -------------------------------------------------------
family("round_to", "round($x, $n)", "x:real n:decimals",
       "round number `$x` to $n decimal places", "round float `$x` to $n digits after the point",
       "how to round `$x` to $n decimals", "get `$x` rounded to a precision of $n digits",
       "limit the float `$x` to $n decimal places as a number")
family("format_float", "'{:.${n}f}'.format($x)", "x:real n:decimals",
       "format number `$x` as a string with $n decimal places",
       "print float `$x` as text with $n digits after the point",
       "how to format `$x` with $n decimals as a string", "string of `$x` showing $n decimal digits",
       "convert `$x` to a string with exactly $n decimals")
family("thousands", "'{:,}'.format($n)", "n:number",
       "format number `$n` with commas as thousands separators", "write `$n` with a comma between thousands",
       "how to print `$n` with thousands separators", "add commas to the number `$n` every three digits",
       "string of integer `$n` with comma grouping")
family("to_binary", "format($n, 'b')", "n:number",
       "convert integer `$n` to a binary string", "get the binary representation of `$n`",
       "how to write number `$n` in base 2", "binary digits of `$n` as a string", "turn `$n` into a string of bits")

# Dictionaries -----------------------------------------------------------------
family("get_key", "$d[$k]", "d:mapping k:key",
       "get the value of key $k in dictionary `$d`", "access the item with key $k of dict `$d`",
       "how to look up $k in a dictionary `$d`", "return what dict `$d` holds under $k",
       "read the entry $k from dictionary `$d`")
family("get_default", "$d.get($k, $n)", "d:mapping k:key n:int",
       "get the value of key $k in dictionary `$d` or $n if it is missing", "look up $k in dict `$d` with default $n",
       "how to get $k from a dictionary `$d` with a fallback of $n", "value for $k in `$d`, or else $n",
       "read key $k of dict `$d`, using $n when absent")
family("set_key", "$d[$k] = $n", "d:mapping k:key n:int",
       "set key $k of dictionary `$d` to $n", "assign $n to key $k in dict `$d`",
       "how to store the value $n under $k in dictionary `$d`", "add an entry $k with value $n to dict `$d`",
       "update dictionary `$d` so that $k is $n", reads="d")
family("has_key", "$k in $d", "d:mapping k:key",
       "check if key $k is in dictionary `$d`", "test whether dict `$d` has a key $k",
       "how to check that $k exists in a dictionary `$d`", "does the dict `$d` contain key $k",
       "see if there is an entry $k in dictionary `$d`")
family("sum_values", "sum($d.values())", "d:mapping",
       "get the sum of the values in dictionary `$d`", "add up all values of dict `$d`",
       "how to sum the values of a dictionary `$d`", "total of all the values stored in dict `$d`",
       "compute the sum over the values of dict `$d`")
family("sorted_keys", "sorted($d)", "d:mapping",
       "get a sorted list of the keys of dictionary `$d`", "sort the keys of dict `$d`",
       "how to list the keys in dictionary `$d` in order", "keys of dict `$d` in ascending order",
       "make a list of all keys of `$d`, sorted")
family("key_of_max", "max($d, key=$d.get)", "d:mapping",
       "get the key with the maximum value in dictionary `$d`", "find which key of dict `$d` has the largest value",
       "how to get the key of the highest value in `$d`", "key whose value is the greatest in dictionary `$d`",
       "return the key for the biggest value of dict `$d`")
family("sort_items", "sorted($d.items(), key=lambda kv: kv[1])", "d:mapping",
       "sort the items of dictionary `$d` by value", "order dict `$d` by its values as a list of tuples",
       "how to sort a dictionary `$d` by value", "list the key value pairs of `$d` from lowest to highest value",
       "get the entries of dict `$d` sorted on the value")
family("invert", "{v: k for k, v in $d.items()}", "d:mapping",
       "invert dictionary `$d`", "swap keys and values of dict `$d`", "how to reverse the mapping of a dictionary `$d`",
       "make a dict from the values of `$d` to its keys", "turn the values of dict `$d` into keys")
family("merge_dicts", "{**$d, **$e}", "d:mapping e:mapping",
       "merge dictionaries `$d` and `$e`", "combine dict `$d` with dict `$e`, the second taking priority",
       "how to merge two dictionaries `$d` and `$e` in one expression", "make a new dict from `$d` updated by `$e`",
       "unite the entries of dicts `$d` and `$e`")

# Lists of tuples and of dictionaries -----------------------------------------
family("sort_by_second", "sorted($ps, key=lambda p: p[1])", "ps:couples",
       "sort list of tuples `$ps` by the second element", "order the tuples in `$ps` by their second item",
       "how to sort `$ps` by the second value of each tuple", "arrange the pairs of `$ps` on index 1",
       "sort a list `$ps` of pairs using the second entry as key")
family("pairs_to_dict", "dict($ps)", "ps:couples",
       "convert list of tuples `$ps` to a dictionary", "make a dict from the pairs in `$ps`",
       "how to turn a list `$ps` of key value tuples into a dict", "create a dictionary out of tuples `$ps`",
       "build a dict of list of pairs `$ps`")
family("pluck", "[r[$k] for r in $rs]", "rs:records k:field",
       "get the value of key $k from each dictionary in list `$rs`", "list the $k of all dicts in `$rs`",
       "how to extract $k from a list of dictionaries `$rs`", "collect the field $k of every record in `$rs`",
       "make a list of the $k values in `$rs`")
family("sort_records", "sorted($rs, key=lambda r: r[$k])", "rs:records k:field",
       "sort list of dictionaries `$rs` by key $k", "order the dicts in `$rs` by their $k value",
       "how to sort a list of dicts `$rs` by the value of $k", "arrange the records of `$rs` on field $k",
       "sort `$rs` using $k of each dict as the key")

# Dates ------------------------------------------------------------------------
family("format_date", "$t.strftime($f)", "t:date f:format",
       "format date `$t` as $f", "convert date `$t` to a string with format $f",
       "how to print the date `$t` in the form $f",
       "get a string of `$t` formatted by $f", "write date `$t` using pattern $f",
       imports="import datetime")
family("days_between", "($u - $t).days", "t:date u:date",
       "get the number of days from date `$t` to `$u`", "how many days are between dates `$t` and `$u`",
       "count the days from `$t` until `$u`", "difference in days starting at `$t` and ending at `$u`",
       "how to compute the days that pass from `$t` to date `$u`", imports="import datetime")
family("add_days", "str($t + datetime.timedelta(days=$n))", "t:date n:day",
       "add $n days to date `$t` and convert to string", "get the date $n days after `$t` as a string",
       "how to get the string of date `$t` plus $n days", "which day comes $n days later than `$t`, as text",
       "move date `$t` forward by $n days and write it as a string", imports="import datetime")
family("weekday", "$t.weekday()", "t:date",
       "get the day of the week of date `$t` as a number", "find the weekday number of `$t`",
       "how to get the weekday of a date `$t` with Monday as 0", "which weekday is date `$t`",
       "return the weekday index of `$t`", imports="import datetime")


# ---------------------------------------------------------------------------------------------------------------------
# Pairs: one family inside another
# ---------------------------------------------------------------------------------------------------------------------

# What a family gives, as noun phrases: the kind of list it yields, then the phrases.
INNER = {
    "even": ("numbers", "the even numbers in list `$xs`", "the elements of `$xs` that are even",
             "all even items of `$xs`"),
    "greater_than": ("numbers", "the numbers in list `$xs` greater than $n", "the elements of `$xs` above $n",
                     "all items of `$xs` that exceed $n"),
    "less_than": ("numbers", "the numbers in list `$xs` less than $n", "the elements of `$xs` below $n",
                  "all items of `$xs` that are under $n"),
    "divisible": ("numbers", "the numbers in `$xs` divisible by $n", "the multiples of $n in list `$xs`",
                  "all items of `$xs` that $n divides"),
    "first_n": ("numbers", "the first $n numbers of list `$xs`", "the leading $n elements of `$xs`",
                "the $n first items of `$xs`"),
    "last_n": ("numbers", "the last $n numbers of list `$xs`", "the final $n elements of `$xs`",
               "the $n last items of `$xs`"),
    "row_sums": ("numbers", "the sums of the rows of `$g`", "the totals of each sublist in `$g`",
                 "the row sums of `$g`"),
    "lengths": ("numbers", "the lengths of the strings in `$ws`", "the string lengths of list `$ws`",
                "the word lengths in `$ws`"),
    "column": ("numbers", "the values in column $i of `$g`", "the items at index $i of the rows of `$g`",
               "the numbers of `$g` in column $i"),
    "starts_with": ("words", "the strings in list `$ws` starting with $p", "the words of `$ws` with prefix $p",
                    "all items of `$ws` that begin with $p"),
    "ends_with": ("words", "the strings in list `$ws` ending with $p", "the words of `$ws` with suffix $p",
                  "all items of `$ws` that end in $p"),
    "longer_than": ("words", "the strings in `$ws` longer than $n characters", "the words of `$ws` above $n letters",
                    "all strings of `$ws` with length over $n"),
    "split": ("words", "the parts of string `$s` between $by", "the pieces of `$s` split by $by",
              "the strings that `$s` gives when split at $by"),
}
# What a family does to its list, $it: the kind of list it takes, then the phrases.
OUTER = {
    "sum": ("numbers", "get the sum of $it", "add up $it", "how to calculate the total of $it"),
    "max": ("numbers", "find the maximum of $it", "get the largest of $it", "what is the highest of $it"),
    "min": ("numbers", "find the minimum of $it", "get the smallest of $it", "what is the lowest of $it"),
    "product": ("numbers", "get the product of $it", "multiply together $it", "how to compute the product of $it"),
    "sort_desc": ("numbers", "sort $it in descending order", "how to order $it from high to low"),
    "join_numbers": ("numbers", "join $it into a string with $sep", "convert $it to text with $sep between them"),
    "length": ("any", "count $it", "get the number of $it", "how many are $it"),
    "join": ("words", "join $it with $sep", "concatenate $it using separator $sep"),
    "longest": ("words", "find the longest of $it", "get the string of maximum length among $it"),
    "sort_by_length": ("words", "sort $it by length", "order $it from shortest to longest"),
    "upper_each": ("words", "convert $it to uppercase", "get $it in capital letters"),
}
NEVER_SHORTER = {"row_sums", "lengths", "column", "first_n", "last_n"}  # counting these needs no composition


def pairs():
    """All sensible (outer, inner) pairs in table order, each with whether it is held out for test_hard."""
    for i, (outer, (takes, *_)) in enumerate(OUTER.items()):
        for j, (inner, (yields, *_)) in enumerate(INNER.items()):
            if takes in (yields, "any") and not (outer == "length" and inner in NEVER_SHORTER):
                yield outer, inner, (i + j) % 3 == 0


def compose(outer, inner):
    """The family that applies `outer` to what `inner` gives: `sum([x for x in xs if x % 2 == 0])` for sum and even."""
    out, into = FAMILIES[outer], FAMILIES[inner]
    hole = next(iter(out.slots))  # the list is the first slot of every outer family
    slots = into.slots | {slot: kind for slot, kind in out.slots.items() if slot != hole}
    assert len(slots) == len(into.slots) + len(out.slots) - 1, f"{outer} and {inner} share a slot name"
    if slots.get("xs") == "list":
        slots["xs"] = "numbers"
    snippet = Template(out.snippet).safe_substitute({hole: into.snippet})
    phrasings = [Template(verb).safe_substitute(it=noun) for verb in OUTER[outer][1:] for noun in INNER[inner][1:]]
    imports = "\n".join(filter(None, (into.imports, out.imports)))
    return Family(f"{outer}+{inner}", snippet, slots, tuple(phrasings), imports)


# ---------------------------------------------------------------------------------------------------------------------
# Bindings for the checks: literals in which the constants of the row matter
# ---------------------------------------------------------------------------------------------------------------------


def ints_near(rng, constants, size):
    """Small integers, with the row's constants and their neighbours sprinkled in, and a repeated element.

    One time in three all of them are above the constants, so that "all", "any" and "in" come out both ways.
    """
    near = [value for c in constants if isinstance(c, int) for value in (c - 1, c, c + 1, 2 * c)]
    floor = rng.choice((-9, -9, max(near, default=-9)))
    numbers = [rng.randint(floor, floor + 39) for _ in range(size - 1)]
    for value in near:
        if value >= floor and rng.random() < 0.6:
            numbers[rng.randrange(len(numbers))] = value
    return numbers + [rng.choice(numbers)]


def words_near(rng, constants, size):
    """Common words in mixed case, with the row's strings as a whole, a start, an end or a middle, and repeats."""
    words = rng.sample(COMMON_WORDS, size - 2)
    for c in constants:
        if isinstance(c, str):
            a, b = rng.sample(COMMON_WORDS, 2)
            for word in (c, c + a, a + c, a + c + b):
                if rng.random() < 0.6:
                    words[rng.randrange(len(words))] = word
    words[rng.randrange(len(words))] = rng.choice(words).title()
    return words + rng.choices(words, k=2)


def text_near(rng, constants):
    """A line of words and digits, joined by the row's separator if it has one, else by spaces."""
    marks = [c for c in constants if isinstance(c, str) and not c.isalnum()]
    words = words_near(rng, [c for c in constants if c not in marks], rng.randint(5, 7))
    words.insert(rng.randrange(len(words)), str(rng.randint(1, 99)))
    glue = rng.choice(marks) if marks else " "
    return glue.join(words[:3]) + " " + glue.join(words[3:])


def mapping_near(rng, constants):
    """A dict from field names to distinct small integers; the row's key is in it more often than not."""
    keys = rng.sample(CONSTANTS["key"], 5)
    for c in constants:
        if isinstance(c, str) and c not in keys and rng.random() < 0.7:
            keys[rng.randrange(5)] = c
    values = list(dict.fromkeys(ints_near(rng, constants, 14)))
    return dict(zip(keys, values))


def records_near(rng, constants):
    """Dicts that share the same fields, the row's field among them."""
    wanted = [c for c in constants if isinstance(c, str)]
    fields = (wanted + rng.sample([f for f in CONSTANTS["field"] if f not in wanted], 2))[:3]
    columns = [ints_near(rng, constants, 4)[:4] for _ in fields]
    return [dict(zip(fields, row)) for row in zip(*columns)]


def date_literal(rng):
    """A date that exists in every year."""
    return f"datetime.date({rng.randint(1999, 2030)}, {rng.randint(1, 12)}, {rng.randint(1, 28)})"


def literal(kind, name, constants, rng):
    """Python source of a value for variable `name` of this kind."""
    if kind == "list":
        kind = "numbers" if name in NUMBER_LISTS else "words"
    size = rng.randint(8, 10)
    makers = {
        "numbers": lambda: ints_near(rng, constants, size),
        "words": lambda: words_near(rng, constants, size),
        "numerals": lambda: [str(x) for x in ints_near(rng, constants, size)],
        "text": lambda: text_near(rng, constants),
        "mapping": lambda: mapping_near(rng, constants),
        "number": lambda: rng.choice((rng.randint(10, 99), rng.randint(1000, 9999999))),
        "size": lambda: rng.randint(5, 12),
        "real": lambda: rng.randint(1, 9999999) / 1000000,
        "grid": lambda: [ints_near(rng, constants, 4) for _ in range(rng.randint(2, 3))],
        "couples": lambda: [(w, rng.randint(-9, 30)) for w in rng.sample(COMMON_WORDS, 4)],
        "records": lambda: records_near(rng, constants),
    }
    return date_literal(rng) if kind == "date" else repr(makers[kind]())


# ---------------------------------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------------------------------


@cache
def compiled(source, mode):
    """A code object; cached, because each setup and each rival runs many times."""
    return compile(source, "<nano>", mode)


def outcome(setup, snippet, reads=""):
    """`repr` of what the snippet gives after `setup`, or None if it raises."""
    scope = {}
    exec(compiled(setup, "exec"), scope)
    try:
        if reads:
            exec(compiled(snippet, "exec"), scope)
        return repr(eval(compiled(reads or snippet, "eval"), scope))
    except Exception:  # a rival may fail in any way, and differs then; a reference that fails gets other bindings
        return None


def rivals(fam, fill, rng):
    """Near misses of a row: a constant changed, names confused, a sibling family that has the same slots."""
    wrong = []
    for slot, kind in fam.slots.items():
        if kind in CONSTANTS:
            others = [c for c in map(repr, CONSTANTS[kind]) if c not in fill.values()]
            others = rng.sample(others, 2) + ([str(int(fill[slot]) + 1)] if fill[slot].isdigit() else [])
            wrong += [render(fam.snippet, fill | {slot: other}) for other in others]
    siblings = [f for f in FAMILIES.values() if f.slots == fam.slots and f.reads == fam.reads and f is not fam]
    wrong += [render(f.snippet, fill) for f in rng.sample(siblings, min(5, len(siblings)))]
    names = [slot for slot, kind in fam.slots.items() if kind in NAMES]
    if len(names) == 2:
        a, b = names
        wrong += [render(fam.snippet, fill | {a: fill[x], b: fill[y]}) for x, y in ((b, a), (a, a), (b, b))]
    return wrong


def overlapping(rng, xs, ys):
    """`ys` with some or all of `xs` shuffled in, so that common, not_in and subset come out in several ways."""
    mixed = ys[:3] + rng.sample(xs, rng.choice((len(xs) // 2, len(xs))))
    rng.shuffle(mixed)
    return mixed


def draw_setup(fam, fill, rng):
    """Imports and bindings for the variables of a row."""
    constants = [ast.literal_eval(fill[slot]) for slot, kind in fam.slots.items() if kind in CONSTANTS]
    variables = {slot: kind for slot, kind in fam.slots.items() if kind in NAMES}
    values = {slot: literal(kind, fill[slot], constants, rng) for slot, kind in variables.items()}
    if list(variables.values()) == ["numbers", "numbers"]:
        xs, ys = values
        values[ys] = repr(overlapping(rng, ast.literal_eval(values[xs]), ast.literal_eval(values[ys])))
    return "\n".join(filter(None, [fam.imports, *(f"{fill[slot]} = {value}" for slot, value in values.items())]))


def make_checks(fam, fill, rng):
    """Two or three checks whose values tell the reference from its rivals, and from an answer that never changes."""
    snippet, reads = render(fam.snippet, fill), fill.get(fam.reads, "")
    standing, checks = rivals(fam, fill, rng), []
    for attempt in range(20):
        setup = draw_setup(fam, fill, rng)
        value = outcome(setup, snippet, reads)
        if value in (None, "[]", "''", "{}"):
            continue  # the reference raised, or gave nothing worth comparing
        left = [rival for rival in standing if outcome(setup, rival, reads) == value]
        if not checks or len(left) < len(standing) or (len(checks) == 1 and attempt > 9):
            standing = left + ([value] if not checks and not reads else [])  # the first value, always, is a rival too
            checks.append({"setup": setup, "value": value} | ({"expression": reads} if reads else {}))
        if len(checks) == 3 or (len(checks) == 2 and not standing):
            break
    return checks


# ---------------------------------------------------------------------------------------------------------------------
# Rows and splits
# ---------------------------------------------------------------------------------------------------------------------


def render(template, fill):
    """The template with its slots filled."""
    return Template(template).substitute(fill)


def normalised(intent):
    """Lower case, white space collapsed, without backticks and quotes: two such intents count as the same."""
    return " ".join(intent.lower().replace("`", "").replace("'", "").split())


def draw_fill(fam, rng):
    """A name or constant for each slot, all different."""
    while True:
        fill = {}
        for slot, kind in fam.slots.items():
            fill[slot] = rng.choice(NAMES[kind]) if kind in NAMES else repr(rng.choice(CONSTANTS[kind]))
        if len(set(fill.values())) == len(fill):
            return fill


def draw_fills(fam, rng, quotas, owner):
    """Fills per split: no snippet is in two splits or two families, and small families share out what they have."""
    fills = {}
    for _ in range(6 * sum(quotas.values())):
        fill = draw_fill(fam, rng)
        snippet = render(fam.snippet, fill)
        if owner.setdefault(snippet, fam.name) == fam.name:
            fills.setdefault(snippet, fill)
        if len(fills) == sum(quotas.values()):
            break
    fills, shares, start = list(fills.values()), {}, 0
    for split in sorted(quotas, key=quotas.get):  # the small splits first; the largest takes what is left
        share = max(2, round(len(fills) * quotas[split] / sum(quotas.values())))
        shares[split] = fills[start : start + share] if split != "train" else fills[start:]
        start += share
    return shares


def draw_intents(fam, fills, quota, rng, seen):
    """`quota` (intent, index of its fill), the fills in turn; no intent occurs twice in the whole data set."""
    intents = []
    for attempt in range(100 * quota):
        k = attempt % len(fills)
        intent = render(rng.choice(fam.phrasings), fills[k])
        intent = intent.replace("`", "") if rng.random() < PLAIN else intent
        if normalised(intent) not in seen:
            seen.add(normalised(intent))
            intents.append((intent, k))
        if len(intents) == quota:
            return intents
    raise ValueError(f"family {fam.name} has too few names, constants or phrasings for {quota} rows")


def family_rows(fam, quotas, owner, seen):
    """The rows of one family, by split."""
    rng = random.Random(f"{SEED}:{fam.name}")
    rows = {}
    for split, fills in draw_fills(fam, rng, quotas, owner).items():
        snippets = [render(fam.snippet, fill) for fill in fills]
        checks = [make_checks(fam, fill, rng) for fill in fills]
        rows[split] = [
            {"family": fam.name, "intent": intent, "snippet": snippets[k], "checks": checks[k]}
            for intent, k in draw_intents(fam, fills, quotas[split], rng, seen)
        ]
    return rows


def shared(total, n):
    """`total` in n nearly equal parts, the larger ones first."""
    return [total // n + (i < total % n) for i in range(n)]


def plan():
    """(family, rows per split) for every family and every pair."""
    trained = [compose(outer, inner) for outer, inner, held_out in pairs() if not held_out]
    hard = [compose(outer, inner) for outer, inner, held_out in pairs() if held_out]
    parts = [shared(ROWS[split] - n * len(trained), len(FAMILIES)) for split, n in PAIR_ROWS.items()]
    for fam, *counts in zip(FAMILIES.values(), *parts):
        yield fam, dict(zip(PAIR_ROWS, counts))
    for fam in trained:
        yield fam, PAIR_ROWS
    for fam, count in zip(hard, shared(ROWS["test_hard"], len(hard))):
        yield fam, {"test_hard": count}


def build():
    """All rows, by split, shuffled and numbered."""
    splits, owner, seen = {split: [] for split in ROWS}, {}, set()
    for fam, quotas in plan():
        for split, rows in family_rows(fam, quotas, owner, seen).items():
            splits[split] += rows
    for split, rows in splits.items():
        random.Random(f"{SEED}:{split}").shuffle(rows)
        splits[split] = [{"id": f"nano-{split}-{i:04d}"} | row for i, row in enumerate(rows)]
    return splits


def rendered():
    """File name -> text of the four files."""
    return {
        f"{split}.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        for split, rows in build().items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare the files with a fresh generation")
    check = parser.parse_args().check
    for name, text in rendered().items():
        path = FOLDER / name
        if not check:
            path.write_text(text, encoding="utf-8", newline="\n")
            print(f"{name}: {text.count(chr(10))} rows")
        elif not path.exists() or path.read_bytes() != text.encode():
            sys.exit(f"{path} differs from a fresh generation: run python {Path(__file__).name}")


if __name__ == "__main__":
    main()
