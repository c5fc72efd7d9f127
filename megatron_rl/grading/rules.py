"""Verifiers that need nothing but Python: countdown, exact, regex, format, and remote for a service behind HTTP."""

import ast
import json
import operator
import re
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

_MAX_EXPRESSION = 128  # characters, which bound the parser's work and depth; six numbers need 17 and a few parentheses
_PAUSE_SECONDS = 0.5  # before the first retry of a request; doubles
_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip
_ARITHMETIC = re.compile(r"[0-9+\-*/() ]+")


def countdown(response: str, answer: str) -> float:
    """1.0 if the response is an expression that uses each given number exactly once and equals the target, else 0.0.

    Allowed are binary + - * /, parentheses, spaces and decimal integers: no unary sign, no power, no leading zero.
    Exact rational arithmetic, so "1/3*3" is 1. `answer` is JSON {"numbers": [...], "target": n}.

    Raises: ValueError or KeyError when `answer` is not such JSON.
    Source: the rules of reasoning-gym's countdown scorer, made binary.
    """
    problem = json.loads(answer)
    numbers_given, target = Counter(problem["numbers"]), problem["target"]
    if len(response) > _MAX_EXPRESSION or not _ARITHMETIC.fullmatch(response):
        return 0.0
    used: Counter[int] = Counter()
    try:
        value = _evaluate(ast.parse(response.strip(), mode="eval").body, used)
    except (SyntaxError, ZeroDivisionError, RecursionError, MemoryError):
        return 0.0  # a wrong answer; MemoryError is CPython's word for too deep nesting
    return float(value == target and used == numbers_given)


def _evaluate(node: ast.expr, used: Counter[int]) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used[node.value] += 1
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_evaluate(node.left, used), _evaluate(node.right, used))
    raise SyntaxError("not + - * / of two integers")


def exact(response: str, answer: str) -> float:
    """1.0 if the texts agree but for surrounding white space, else 0.0."""
    return float(response.strip() == answer.strip())


def regex(response: str, answer: str, *, pattern: str, ignore_case: bool = False) -> float:
    """1.0 if the first group (or without groups, all) of the last match of `pattern` is the answer, else 0.0.

    Surrounding white space does not count; `^`, `$` and `.` know no lines, (?m) and (?s) in the pattern change that.
    """
    matches = list(re.finditer(pattern, response))
    if not matches:
        return 0.0
    text = matches[-1].group(1 if matches[-1].re.groups else 0) or ""
    return exact(text.casefold(), answer.casefold()) if ignore_case else exact(text, answer)


def format(response: str, answer: str, *, pattern: str) -> float:
    """1.0 if `pattern` is found in the response, else 0.0; anchor it with \\A and \\Z to describe all of it."""
    return float(re.search(pattern, response) is not None)


def remote(
    response: str,
    answer: str,
    *,
    url: str,
    headers: Mapping[str, str] | None = None,
    timeout_seconds: float = 5.0,
    retries: int = 2,
) -> float:
    """The `score` that the service gives: POST {"response", "answer"} as JSON, reply {"score": number}.

    A connection that fails or a reply of 429 or 5xx is tried again `retries` times.
    Raises: RuntimeError that names the address and what came back.
    """
    body = json.dumps({"response": response, "answer": answer}).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json", **(headers or {})})
    for attempt in range(retries + 1):
        if attempt:
            time.sleep(_PAUSE_SECONDS * 2 ** (attempt - 1))
        try:
            with urllib.request.urlopen(request, timeout=timeout_seconds) as reply:
                text = reply.read().decode()
            break
        except urllib.error.HTTPError as error:
            problem = f"HTTP {error.code}: {error.read(500).decode(errors='replace')}"
            if error.code != 429 and error.code < 500:
                raise RuntimeError(f"{url}: {problem}") from error
        except OSError as error:  # refused, reset, timed out, no such host
            problem = str(error)
    else:
        raise RuntimeError(f"{url}: {problem} ({retries + 1} tries)")
    try:
        return float(json.loads(text)["score"])
    except (ValueError, KeyError, TypeError) as error:
        raise RuntimeError(f'{url}: expected {{"score": number}}, got {text[:200]!r}') from error
