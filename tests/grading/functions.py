"""Reward functions for grading processes. Without torch, so that these start fast."""

from __future__ import annotations

import os
import sys
import time


def behave(response: str, answer: str) -> float:
    """What the response says."""
    if response == "hang":
        time.sleep(1000)
    if response == "work":
        end = time.process_time() + 0.2
        while time.process_time() < end:
            pass
        return 1.0
    if response == "spin":
        while True:
            pass
    if response == "crash":
        os.abort()
    if response == "exit":
        os._exit(0)
    if response == "raise":
        raise KeyError("no verdict")
    if response == "nan":
        return float("nan")
    if response == "memory":
        return float(len(bytearray(1 << 34)))
    if response == "torch":
        return float("torch" in sys.modules)
    if response == "pid":
        return float(os.getpid())
    return float(response == answer)
