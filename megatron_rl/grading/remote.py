"""The `remote` verifier: a service behind HTTP that scores answers."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping

_PAUSE_SECONDS = 0.5  # before the first retry; doubles


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
