"""What an option is: described, typed by its kind, and read from a file or an override as it was meant."""

from __future__ import annotations

import json
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_rl.algorithms.methods import METHODS
from megatron_rl.algorithms.policy_loss import PolicyLoss
from megatron_rl.algorithms.section import Section
from megatron_rl.config import Config, load_config, parse_config
from megatron_rl.errors import ConfigError
from tests.config.test_config import BASE, raw, refusal, write

JSONL = {"type": "jsonl", "train_path": "train.jsonl", "tokenizer": "tokenizer", "max_prompt_tokens": 32}


def sections_in(annotation: Any) -> set[type[Section]]:
    if annotation is PolicyLoss:
        return set(METHODS.values())
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return {annotation}
    return {section for argument in typing.get_args(annotation) for section in sections_in(argument)}


def options(section: type[Section] = Config, where: str = "") -> Iterator[tuple[str, type[Section], str]]:
    """(path, section, name) of every option of every section below `section`."""
    for name, field in section.model_fields.items():
        path = f"{where}{name}"
        yield path, section, name
        for below in sections_in(field.annotation):
            yield from options(below, f"{path}.")


def test_every_option_is_described() -> None:
    every = list(options())
    assert len(every) > 300 and {"model.path", "loss.type", "loss.cov_low", "reward.terms.weight"} <= {
        p for p, *_ in every
    }
    lacking = {
        path
        for path, section, name in every
        if name != "type" and len((section.model_fields[name].description or "").split()) < 2
    }
    assert not lacking


def loaded(tmp_path: Path, *overrides: str) -> Config:
    return load_config(write(tmp_path, raw(data=JSONL)), overrides)


TEXTS = [
    "... after ####.",
    " a leading blank",
    "a trailing one ",
    "You are: helpful",
    "yes",
    "2024",
    "null",
    "",
    "a=b # c",
    "'quoted'",
    "[1, 2]",
    "{a: b}",
    "- item",
    "~",
    "1e-6",
]


@pytest.mark.parametrize("text", TEXTS)
def test_an_override_of_a_text_is_what_was_typed(tmp_path: Path, text: str) -> None:
    config = loaded(tmp_path, f"data.suffix={text}", "reward={function: regex, regex: {pattern: x}}")
    assert config.data.type == "jsonl" and config.data.suffix == text


@pytest.mark.parametrize("text", TEXTS)
def test_an_override_of_a_text_that_may_be_null_is_what_was_typed(tmp_path: Path, text: str) -> None:
    config = loaded(
        tmp_path, f"data.system_prompt={text}", "eval.options.mine={path: x}", f"eval.options.mine.suffix={text}"
    )
    expected = None if text == "null" else text
    assert config.data.type == "jsonl" and config.data.system_prompt == expected
    assert config.eval.options["mine"].suffix == expected


def test_every_kind_of_text_option_is_taken_as_typed_and_the_rest_is_yaml(tmp_path: Path) -> None:
    config = loaded(
        tmp_path,
        "name=2024",
        "loss.type=gspo",
        "model.recompute=none",
        "model.fused_linear_stats=off",
        "reward.function=remote",
        "reward.remote.url=http://x",
        "reward.remote.headers.Authorization=Bearer: 1 #2",
        "logging.wandb_project=on",
        "rollout.server.extra_args=[--a, '1']",
        "eval.sets=[aime24]",
        "eval.folder=2024",
        "rollout.stop_token_ids=[3, 4]",
        "train.share_prompts=false",
        "optimizer.lr=1e-6",
        "rollout.server.python=null",
    )
    assert (config.name, config.loss.type, config.model.fused_linear_stats) == ("2024", "gspo", "off")
    assert config.reward.remote is not None
    assert config.reward.remote.headers == {"Authorization": "Bearer: 1 #2"}
    assert (config.logging.wandb_project, config.eval.folder) == ("on", "2024")
    assert (config.rollout.server.extra_args, config.eval.sets) == (("--a", "1"), ("aime24",))
    assert (config.rollout.stop_token_ids, config.train.share_prompts, config.optimizer.lr) == ((3, 4), False, 1e-6)
    assert config.rollout.server.python is None


def test_a_switch_may_stand_in_a_file_without_quotes(tmp_path: Path) -> None:
    text = yaml.safe_dump(raw()).replace("model:", "model:\n  fused_linear_stats: off")
    assert load_config(write(tmp_path, text)).model.fused_linear_stats == "off"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "the key 'a' stands on line 1 and again on line 3"),
        ("train:\n  seed: 1\n  x: {k: 1,\n    k: 2}\n", "the key 'k' stands on line 3 and again on line 4"),
        ("list:\n  - {k: 1}\n  - k: 1\n    'k': 2\n", "the key 'k' stands on line 3 and again on line 4"),
    ],
)
def test_a_key_that_stands_twice_is_refused_with_both_lines(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(path) in str(caught.value) and message in str(caught.value)


def test_an_override_with_a_key_twice_is_refused_and_a_merged_mapping_may_be_overridden(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the key 'type' stands on line 1 and again"):
        load_config(write(tmp_path, BASE), ["loss={type: gspo, type: kl_cov}"])
    text = yaml.safe_dump(raw()) + "optimizer: &o {lr: 1.0e-3}\nwarm_start: {<<: *o, lr: 2.0e-3}\n"
    assert load_config(write(tmp_path, text)).warm_start.lr == 2e-3  # type: ignore[union-attr]


@pytest.mark.parametrize("key", ["train__num_steps", "optimizer__lr", "seed", "parallel__tp", "loss__kl_coef"])
def test_a_truth_value_is_no_number(key: str) -> None:
    assert "expected a number, got true" in refusal(raw(**{key: True}))


def test_the_home_folder_is_expanded_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(BASE["model"]["hf_config"]))
    (tmp_path / "step_1").mkdir()
    for name in ("metadata.json", "config.yaml"):
        (tmp_path / "step_1" / name).touch()
    given = raw(
        data=JSONL | {"train_path": "~/a", "eval_path": "~/b", "tokenizer": "~/c"},
        model={"path": "~/model"},
        logging={"run_dir": "~/runs/{name}"},
        eval={"folder": "~/e", "options": {"aime24": {"path": "~/f"}}},
        rollout__server={"python": "~/g"},
        rollout__weight_sync={"folder": "~/h"},
        train__resume="~/step_1",
    )
    config = parse_config(given)
    flat = json.dumps(config.model_dump(mode="json"))
    assert "~" not in flat and flat.count(str(tmp_path)) == 10 and config.run_dir == tmp_path / "runs" / "t"
    config = parse_config(raw(warm_start={"cache_dir": "~/w"}))
    assert config.warm_start is not None and config.warm_start.cache_dir == str(tmp_path / "w")


def test_a_path_is_not_empty_and_its_home_is_known() -> None:
    assert "model.path: Value error, an empty path" in refusal(raw(model={"path": ""}))
    assert "no user of this machine" in refusal(raw(logging__run_dir="~nobody-here/x"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ".."}, "name=.. names no folder of its own"),
        ({"name": "."}, "name=. names no folder of its own"),
        ({"logging__run_dir": "runs/{name}/.."}, "leaves the folder {name} again"),
        ({"logging__run_dir": "runs/x{name}/a/../../.."}, "leaves the folder {name} again"),
        ({"logging__run_dir": "runs/{name.__class__}"}, "the only placeholder is {name}"),
        ({"logging__run_dir": "runs/{name[0]}"}, "the only placeholder is {name}"),
        ({"logging__run_dir": "runs/{name!r}"}, "the only placeholder is {name}"),
        ({"logging__run_dir": "runs/{name:>9}"}, "the only placeholder is {name}"),
        ({"logging__run_dir": "runs/{}"}, "the only placeholder is {name}"),
        ({"logging__run_dir": "runs/{name"}, "the only placeholder is {name}"),
    ],
)
def test_a_run_has_a_folder_of_its_own(changes: dict[str, Any], message: str) -> None:
    assert message in refusal(raw(**changes))


def test_a_run_folder_may_lie_above_or_be_named_in_dots() -> None:
    assert str(parse_config(raw(logging__run_dir="../runs/{name}", name="..x")).run_dir) == "../runs/..x"


HF = BASE["model"]["hf_config"]


@pytest.mark.parametrize(
    ("key", "value", "typed"),
    [
        ("rms_norm_eps", "1e-6", 1e-6),
        ("rope_theta", "1e6", 1e6),
        ("num_key_value_heads", "2", 2),
        ("tie_word_embeddings", "yes", True),
        ("attention_bias", "off", False),
        ("rope_scaling", {"rope_type": "linear", "factor": "2e0"}, {"rope_type": "linear", "factor": 2.0}),
        ("unknown_key", "1e-6", "1e-6"),
        ("head_dim", None, None),
    ],
)
def test_values_of_a_config_json_have_their_types(key: str, value: Any, typed: Any, tmp_path: Path) -> None:
    config = parse_config(raw(model={"hf_config": HF | {key: value}}))
    assert config.model.hf_config is not None and config.model.hf_config[key] == typed
    assert type(config.model.hf_config[key]) is type(typed)
    (tmp_path / "config.json").write_text(json.dumps(HF | {key: value}))
    stated = parse_config(raw(model={"path": str(tmp_path), "hf_config": HF | {key: typed}}))
    assert stated.model.path == str(tmp_path), "as text or as a value, both state the same"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rms_norm_eps", "tiny", "rms_norm_eps: Value error, expected a number"),
        ("rms_norm_eps", True, "rms_norm_eps: Value error, expected a number"),
        ("rope_theta", float("nan"), "rope_theta: Value error, expected a finite number"),
        ("hidden_size", 48.5, "hidden_size: Value error, expected a whole number"),
        ("num_hidden_layers", "four", "num_hidden_layers: Value error, expected a number"),
        ("tie_word_embeddings", "maybe", "tie_word_embeddings: Value error, expected true or false"),
        ("tie_word_embeddings", 1, "tie_word_embeddings: Value error, expected true or false"),
        ("hidden_act", False, "hidden_act: Value error, expected a text"),
        ("layer_types", "full_attention", "layer_types: Value error, expected a list of texts"),
        ("rope_scaling", {"type": "yarn", "factor": "big"}, "rope_scaling.factor: Value error, expected a number"),
        ("rope_scaling", "yarn", "rope_scaling"),
    ],
)
def test_a_value_of_another_type_is_refused_by_its_key(key: str, value: Any, message: str, tmp_path: Path) -> None:
    assert f"model.hf_config.{message}" in refusal(raw(model={"hf_config": HF | {key: value}}))
    (tmp_path / "config.json").write_text(json.dumps(HF | {key: value}))
    text = refusal(raw(model={"path": str(tmp_path)}))
    assert f"{tmp_path / 'config.json'}: {message}" in text


def test_config_json_is_used_as_it_is_written(tmp_path: Path) -> None:
    from megatron_rl.models.facts import read_config_json

    written = {**HF, "rope_theta": 10000, "zeta": [1, None], "rope_scaling": None, "eos_token_id": [1, 2]}
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert json.dumps(read_config_json(tmp_path)) == json.dumps(written)
