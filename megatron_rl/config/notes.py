"""What a config allows and its user should know."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_rl.config.megatron_options import megatron_notes

if TYPE_CHECKING:
    from megatron_rl.config.sections import Config


def run_notes(config: Config) -> list[str]:
    """Return the lines that a run says at its start, and `train --check` at its end."""
    notes = [*config.loss.notes(config), *megatron_notes(config)]
    if config.float32_logits and config.rollout.server.urls and not config.rollout.is_embedded:
        option = {"sglang": "--enable-fp32-lm-head", "vllm": """--hf-overrides '{"head_dtype": "float32"}'"""}
        notes.append(
            "the trainer's output layer gives float32 logits: the servers of rollout.server.urls need "
            f"{option[config.rollout.engine]}, or log-probabilities differ by bfloat16's rounding of theirs"
        )
    return notes
