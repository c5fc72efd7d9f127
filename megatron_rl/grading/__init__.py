"""Verifiers of answers, and the worker processes that run them. Nothing here imports torch, so workers start fast."""
