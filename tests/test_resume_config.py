"""Which checkpoint a run goes on from, and which of its options may have changed since."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, PretrainedConfig

from megatron_rl.config import Config, dump_config, parse_config
from megatron_rl.errors import ConfigError, UserError
from megatron_rl.resume import check_drift, checkpoint_to_resume
from tests.tiny import HF, tiny_raw

TRAIN = {"prompts_per_step": 4, "prompts_per_minibatch": 2, "micro_batch_tokens": 96}


def _config(folder: Path, **sections: Any) -> Config:
    return parse_config(tiny_raw(folder, **sections))


def _checkpoint(run_dir: Path, step: int, config: Config) -> Path:
    """What `resume` reads of a checkpoint."""
    path = run_dir / "checkpoints" / f"step_{step:08d}"
    _hf().save_pretrained(path / "hf")
    (path / "config.yaml").write_text(dump_config(config))
    (path / "metadata.json").touch()
    return path


def _hf(**changes: Any) -> PretrainedConfig:
    return AutoConfig.for_model(**(HF | {"vocab_size": 21} | changes))


@pytest.mark.parametrize("inside", ["nonesuch", "run", "run/checkpoints", "converted"])
def test_what_is_no_checkpoint_is_refused_at_load(tmp_path: Path, inside: str) -> None:
    path = _checkpoint(tmp_path / "run", 4, _config(tmp_path))
    shutil.copytree(path, tmp_path / "converted")
    (tmp_path / "converted" / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=f"train.resume={tmp_path}/{inside}") as caught:
        _config(tmp_path, train=TRAIN | {"resume": str(tmp_path / inside)})
    assert (f"did you mean {path}?" in str(caught.value)) == inside.startswith("run")
    assert ("set model.path to it" in str(caught.value)) == (inside == "converted")
    assert _config(tmp_path, train=TRAIN | {"resume": str(path)}).train.resume == str(path)


def test_the_best_needs_evaluations(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="keep_best=true has no evaluations"):
        _config(tmp_path, train=TRAIN | {"keep_best": True})


def test_which_checkpoint_a_run_goes_on_from(tmp_path: Path) -> None:
    def config(resume: str | Path, name: str = "own") -> Config:
        return _config(tmp_path, name=name, train=TRAIN | {"resume": str(resume)})

    elsewhere = _checkpoint(tmp_path / "other", 7, config("auto", "other"))
    assert checkpoint_to_resume(config("auto"), None) is None
    assert checkpoint_to_resume(config("never"), None) is None
    assert checkpoint_to_resume(config(elsewhere), None) == elsewhere
    older, newest = (_checkpoint(tmp_path / "own", step, config(elsewhere)) for step in (8, 9))
    assert checkpoint_to_resume(config("auto"), newest) == newest
    assert checkpoint_to_resume(config(elsewhere), newest) == newest  # it began there
    assert checkpoint_to_resume(config(newest), newest) == newest
    with pytest.raises(UserError, match="holds an earlier run and train.resume=never would overwrite it"):
        checkpoint_to_resume(config("never"), newest)
    with pytest.raises(UserError, match=f"would go back behind {newest} of the same run"):
        checkpoint_to_resume(config(older), newest)
    third = _checkpoint(tmp_path / "third", 1, config("auto", "third"))
    with pytest.raises(UserError, match=f"did not begin from train.resume={third} .* says {elsewhere}"):
        checkpoint_to_resume(config(third), newest)


CHANGES: dict[str, tuple[dict[str, Any], list[str], bool]] = {
    # options, what is said of them, whether the run is refused when the checkpoint is its own
    "nothing": ({}, [], False),
    "harmless": (
        {
            "name": "renamed",
            "parallel": {"tp": 1, "pp": 2},
            "optimizer": {"lr": 1e-4},
            "train": {
                "num_steps": 9,
                "micro_batch_tokens": 512,
                "save_every": 3,
                "async_save": True,
                "deterministic": True,
            },
            "logging": {"samples_per_step": 5},
            "rollout": {"batch_size": 3},
            "model": {
                "hf_config": HF | {"vocab_size": 21},
                "recompute": "full",
                "layers": "torch",
            },  # the same, more explicitly
        },
        [],
        False,
    ),
    "sampling": ({"rollout": {"temperature": 0.9}}, ["rollout.temperature: 1.0 -> 0.9"], False),
    "loss": (
        {"loss": {"type": "kl_cov"}},
        ["loss.eps_high: 0.2 -> None", "loss.kl_coef: None -> 1.0", "loss.type: 'ppo_clip' -> 'kl_cov'"],
        False,
    ),
    "batch": ({"train": {"prompts_per_minibatch": 1}}, ["train.prompts_per_minibatch: 2 -> 1"], False),
    "schedule": (
        {"optimizer": {"schedule": "linear"}, "train": {"num_steps": 9}},
        ["optimizer.schedule: 'constant' -> 'linear'", "optimizer.schedule now ends at train.num_steps=9"],
        False,
    ),
    "initial policy": ({"warm_start": {"steps": 3}}, ["warm_start.steps: None -> 3"], False),
    "seed": ({"seed": 4}, ["seed: 3 -> 4"], True),
    "data": ({"data": {"num_train": 65}}, ["data.num_train: 64 -> 65"], True),
    "reference": (
        {"warm_start": {"steps": 3}, "loss": {"ref_kl_coef": 0.1}},
        ["warm_start.steps: None -> 3"],
        True,
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_options(tmp_path: Path, name: str) -> None:
    sections, said, is_refused = CHANGES[name]
    path = _checkpoint(tmp_path / "run", 4, _config(tmp_path))
    config = _config(tmp_path, **(sections | {"train": TRAIN | sections.get("train", {})}))
    notes = check_drift(path, config, _hf(), own=False)
    assert (notes == []) == (said == []), notes
    for text in said:
        assert any(text in note for note in notes), notes
    if is_refused:
        with pytest.raises(UserError, match=f"cannot go on from {path}") as caught:
            check_drift(path, config, _hf(), own=True)
        assert all(text in str(caught.value) for text in said) and f"train.resume={path}" in str(caught.value)
    else:
        assert check_drift(path, config, _hf(), own=True) == notes


def test_paths_of_the_data_are_no_other_data(tmp_path: Path) -> None:
    """What they hold is compared after loading; options that change it are refused as ever."""

    def config(folder: str, **data: Any) -> Config:
        raw = tiny_raw(tmp_path, train=TRAIN)
        paths = {name: f"{folder}/{name}" for name in ("train_path", "eval_path", "tokenizer")}
        raw["data"] = {"type": "jsonl", "max_prompt_tokens": 16} | paths | data
        raw["model"] = {"hf_config": HF | {"vocab_size": 21}}
        return parse_config(raw)

    path = _checkpoint(tmp_path / "run", 4, config("here"))
    assert len(check_drift(path, config("there"), _hf(), own=True)) == 3
    with pytest.raises(UserError, match=r"data.suffix: '' -> 'Think\.'") as caught:
        check_drift(path, config("there", suffix="Think."), _hf(), own=True)
    assert "there" not in str(caught.value)


@pytest.mark.parametrize("own", [True, False])
def test_another_architecture_is_always_refused(tmp_path: Path, own: bool) -> None:
    """Also one whose shapes are the same, which the tensors would not tell."""
    path = _checkpoint(tmp_path / "run", 4, _config(tmp_path))
    with pytest.raises(UserError, match="the model's rms_norm_eps: 1e-06 -> 1e-05"):
        check_drift(path, _config(tmp_path), _hf(rms_norm_eps=1e-5), own=own)
    with pytest.raises(UserError, match="model.dtype: 'float32' -> 'bfloat16'"):
        check_drift(path, _config(tmp_path, model={"dtype": "bfloat16"}), _hf(), own=own)
