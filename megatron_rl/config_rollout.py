"""How rollouts are sampled, by which engine."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron_rl.config_base import Fraction, NonNegativeInt, PositiveInt, Section


class RolloutConfig(Section):
    """Sampling of the training rollouts."""

    engine: Literal["transformers"] = Field("transformers", description="embedded: each rank generates its share")
    samples_per_prompt: PositiveInt = Field(8, description="n; the group of the advantage estimators")
    temperature: Annotated[float, Field(gt=0)] = Field(1.0, description="divides the logits, in the trainer too")
    top_p: Fraction = Field(1.0, description="nucleus mass; 1 keeps all tokens")
    top_k: NonNegativeInt = Field(0, description="keep the k likeliest tokens; 0 keeps all")
    max_response_tokens: PositiveInt = Field(1024, description="a response is cut here (finish_reason length)")
    stop_token_ids: tuple[int, ...] | None = Field(None, description="null: the tokenizer's end-of-sequence token")
    batch_size: PositiveInt = Field(256, description="sequences decoded together on one rank")
