"""Checks recorded requests against SGLang's own routes and request classes. Run it with an interpreter that has SGLang:
reads a JSON list of (method, path, query, body) from stdin, prints one line per fault."""

from __future__ import annotations

import dataclasses
import json
import sys
import typing
from typing import Any

import msgspec
from fastapi import Request
from pydantic import TypeAdapter
from sglang.srt.entrypoints import http_server
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.sampling.sampling_params import SamplingParams


def field_names(kind: Any) -> set[str]:
    if dataclasses.is_dataclass(kind):
        return {field.name for field in dataclasses.fields(kind)}
    return {field.name for field in msgspec.structs.fields(kind)}


def faults_of(method: str, path: str, query: dict[str, str], body: dict[str, Any] | None) -> list[str]:
    # the class that a route takes is an unknown field's only judge: the server ignores what it does not know
    routes = [r for r in http_server.app.routes if getattr(r, "path", "") == path and method in (r.methods or ())]
    if not routes:
        return ["no such route"]
    hints = typing.get_type_hints(routes[0].endpoint)
    hints.pop("return", None)
    parts = [part for kind in hints.values() for part in typing.get_args(kind) or (kind,)]  # of an Optional
    kinds = [kind for kind in parts if dataclasses.is_dataclass(kind) or hasattr(kind, "__struct_fields__")]
    faults = [f"unknown query parameter {name}" for name in query if name not in hints]
    if not kinds:
        assert all(kind in (Request, float, int, bool, str) for kind in hints.values()), hints
        return faults + ([f"takes no body, got {body}"] if body else [])
    faults += [f"unknown field {name}" for name in (body or {}) if name not in field_names(kinds[0])]
    try:
        made = TypeAdapter(kinds[0]).validate_python(body)
        if isinstance(made, GenerateReqInput):
            made.normalize_batch_and_arguments()
            params = SamplingParams(**made.sampling_params)
            params.normalize(None)
            params.verify(vocab_size=1000)
    except (ValueError, TypeError) as error:
        faults.append(str(error).partition("\n")[0])
    return faults


for call in json.load(sys.stdin):
    for fault in faults_of(*call):
        print(f"{call[0]} {call[1]}: {fault}")
print("checked")
