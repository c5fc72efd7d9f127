"""Contamination: which problems of evaluation sets the training rows contain, and how.

A training row contains an evaluation problem in one of three degrees, and is then removed:

- *same*: the same letters and digits;
- *contained*: its letters and digits, LaTeX's commands left out, stand literally within the row's, as where a training
  set appends a request to the problem;
- *near*: `threshold` of the word triples in common (Jaccard) and the same numbers; or half of the problem's 8-grams of
  words within the row, LaTeX's commands left out, and its numbers among the row's.

Where 8-grams are shared, but less than half of them or beside other numbers, the pair is only reported: such rows share
a figure, a story or a kind of question. 8-grams of many evaluation problems are phrases of the genre: none counts.

All of it takes time linear in the texts, but for pairs of rows that share a rare phrase, which are compared.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from megatron_rl.data.rows import Row
from megatron_rl.prepare.clean import NearTexts, numbers, shingles, words

CONTAINED = 0.5  # share of a problem's 8-grams; of 120 pairs of DAPO-Math-17k above it, nearly all are one problem
PARTIAL = 0.3
_GRAM = 8  # words
_PHRASE = 20  # evaluation problems; a gram of more than these is a phrase of the genre
_SHORTEST = 12  # letters and digits: what is shorter stands in many texts by chance
_ANCHORS = (40, _SHORTEST)  # lengths of the pieces by which literal containment is looked up, the longest first
_COMMAND = re.compile(r"\\(?:begin|end)\s*\{[a-z]*\*?\}|\\[a-zA-Z]+|\x0crac")  # \x0c: a \f read as an escape


@dataclass(frozen=True)
class Overlap:
    """Which problems of one evaluation set the training rows contain. Each is counted in its first degree alone."""

    name: str
    size: int  # of the evaluation set
    same: frozenset[int]  # indices into it
    contained: frozenset[int]
    near: frozenset[int]
    partial: Mapping[int, tuple[int, float]]  # index -> the training row with most of its 8-grams, and their share
    training: frozenset[int]  # indices of the training rows that contain one of its problems, for removal


def overlap_key(row: Row) -> str:
    """Return the letters and digits alone: coarser than the spelling, because leakage is worse than a problem less."""
    return _letters(row.text)


def find_overlaps(
    rows: Sequence[Row], evaluations: Sequence[tuple[str, Sequence[Row]]], threshold: float
) -> list[Overlap]:
    """Return the overlap with each (name, rows) of `evaluations`. `threshold`: of near ones; 0: none are sought."""
    problems = [row for _, evaluation in evaluations for row in evaluation]
    same = _same(rows, problems)
    contained = _contained(rows, problems)
    near: dict[int, set[int]] = {}
    partial: dict[int, tuple[int, float]] = {}
    if threshold:
        near = _near(rows, problems, threshold)
        for i, shares in _shared_grams(rows, problems).items():
            given = Counter(dict(numbers(problems[i].text)))
            whole = {j for j, share in shares.items() if share >= CONTAINED}
            near.setdefault(i, set()).update(j for j in whole if given <= Counter(dict(numbers(rows[j].text))))
            best = max(shares, key=lambda j: (shares[j], -j))
            partial[i] = best, shares[best]
    overlaps, first = [], 0
    for name, evaluation in evaluations:
        span = range(first, first := first + len(evaluation))
        seen = set[int]()
        degrees = []
        for degree in (same, contained, near):
            degrees.append(frozenset(i - span.start for i in span if degree.get(i) and i not in seen))
            seen |= {i for i in span if degree.get(i)}
        overlaps.append(
            Overlap(
                name=name,
                size=len(evaluation),
                same=degrees[0],
                contained=degrees[1],
                near=degrees[2],
                partial={i - span.start: partial[i] for i in span if i in partial and i not in seen},
                training=frozenset(j for degree in (same, contained, near) for i in span for j in degree.get(i, ())),
            )
        )
    return overlaps


def _letters(text: str) -> str:
    if not text.isascii():
        # x² as x2, a ligature as its letters; one by one, as normalize() may take quadratic time on a whole text
        text = "".join(unicodedata.normalize("NFKC", character) for character in text)
    return "".join(filter(str.isalnum, text.lower()))


def _bare(text: str) -> str:
    """Drop LaTeX's commands, which copies of a problem write differently: \\le and \\leq, \\ldots and \\dots."""
    return _COMMAND.sub(" ", text)


def _same(rows: Sequence[Row], problems: Sequence[Row]) -> dict[int, set[int]]:
    """Return problem -> training rows, by all letters and digits."""
    by_key: dict[str, set[int]] = {}
    for j, row in enumerate(rows):
        by_key.setdefault(overlap_key(row), set()).add(j)
    return {i: by_key.get(overlap_key(row), set()) for i, row in enumerate(problems)}


def _near(rows: Sequence[Row], problems: Sequence[Row], threshold: float) -> dict[int, set[int]]:
    """Return problem -> training rows with the same numbers and `threshold` of the word triples."""
    members: dict[object, list[int]] = {numbers(problem.text): [] for problem in problems}
    for j, row in enumerate(rows):
        if (block := numbers(row.text)) in members:
            members[block].append(j)
    indices = {block: NearTexts(threshold, [rows[j].text for j in places]) for block, places in members.items()}
    for index in indices.values():
        for place in range(len(index.shingles)):
            index.add(place)
    found = {}
    for i, problem in enumerate(problems):
        block = numbers(problem.text)
        found[i] = {members[block][place] for place in indices[block].like(shingles(problem.text))}
    return found


def _contained(rows: Sequence[Row], problems: Sequence[Row]) -> dict[int, set[int]]:
    """Return problem -> training rows within whose letters and digits those of the problem stand, literally: without
    LaTeX's commands, or with them where little else is left."""
    bare: dict[str, list[int]] = {}
    full: dict[str, list[int]] = {}
    for i, problem in enumerate(problems):
        key, longer = _letters(_bare(problem.text)), _letters(problem.text)
        if len(key) >= _SHORTEST:
            bare.setdefault(key, []).append(i)
        elif len(longer) >= _SHORTEST:
            full.setdefault(longer, []).append(i)
    found: dict[int, set[int]] = {}
    for keys, view in ((bare, _bare), (full, str)):
        for j, key in _literal_pairs([_letters(view(row.text)) for row in rows] if keys else [], keys):
            for i in keys[key]:
                found.setdefault(i, set()).add(j)
    return found


def _literal_pairs(texts: Sequence[str], keys: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Yield (number of a text, key) for each key that stands in a text."""
    # a piece from the middle, where problems differ most; only texts with that piece are searched for the whole
    anchors: dict[int, dict[str, list[str]]] = {length: {} for length in _ANCHORS}
    for key in keys:
        length = next(length for length in _ANCHORS if len(key) >= length)
        start = (len(key) - length) // 2
        anchors[length].setdefault(key[start : start + length], []).append(key)
    for j, text in enumerate(texts):
        for length, by_piece in anchors.items():
            if not by_piece:
                continue
            pieces = {piece for p in range(len(text) - length + 1) if (piece := text[p : p + length]) in by_piece}
            yield from ((j, key) for piece in pieces for key in by_piece[piece] if key in text)


def _shared_grams(rows: Sequence[Row], problems: Sequence[Row]) -> dict[int, dict[int, float]]:
    """Return problem -> {training row: share of the problem's 8-grams that stand in the row}, from PARTIAL on."""
    copies: dict[str, list[int]] = {}
    for i, problem in enumerate(problems):
        copies.setdefault(overlap_key(problem), []).append(i)
    owners: dict[str, list[int]] = {}
    for i, *_ in copies.values():
        for gram in set(_grams(problems[i].text)):
            owners.setdefault(gram, []).append(i)
    owners = {gram: problems_of for gram, problems_of in owners.items() if len(problems_of) <= _PHRASE}
    sizes = Counter(i for problems_of in owners.values() for i in problems_of)
    shares: dict[int, dict[int, float]] = {}
    for j, row in enumerate(rows):
        shared = {gram for gram in _grams(row.text) if gram in owners}
        for i, count in Counter(chain.from_iterable(owners[gram] for gram in shared)).items():
            if count >= PARTIAL * sizes[i]:
                shares.setdefault(i, {})[j] = count / sizes[i]
    return {i: shares[first] for first, *others in copies.values() if first in shares for i in (first, *others)}


def _grams(text: str) -> Iterator[str]:
    tokens = words(_bare(text))
    return (" ".join(tokens[k : k + _GRAM]) for k in range(len(tokens) - _GRAM + 1))
