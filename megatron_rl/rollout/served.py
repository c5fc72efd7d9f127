"""The policy in its rollout engine: who has which weights, and when the engine may generate."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from megatron_rl import device, launch
from megatron_rl.config import Config
from megatron_rl.convert.model_files import Described
from megatron_rl.metrics.collect import Timers
from megatron_rl.rollout.build import build_engine, write_model_dir
from megatron_rl.rollout.engine import EngineError, EngineSetup, Place, RolloutEngine, ServersLost

if TYPE_CHECKING:
    from megatron_rl.policy.policy import MegatronPolicy


class Weights(Described, Protocol):
    """What the engine is to serve: the policy in training, or the tensors of a folder."""

    def hf_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all (Hugging Face name, full tensor) pairs on every rank. A collective."""


class Served:
    """An engine and the weights that it has or shall have. Every method is a collective.

    `weight_version` counts the training steps whose updates the weights contain; the engine is brought up to it by
    `session` and `sync`, which is the only way that weights reach it.
    """

    def __init__(
        self,
        config: Config,
        place: Place,
        weights: Weights,
        tokenizer: object,
        *,
        prove: Callable[[RolloutEngine], None] | None = None,
        shares_memory: MegatronPolicy | None = None,
    ) -> None:
        """`prove`: called after each update of a server's weights, raises when they are not served. `shares_memory`:
        who makes room while the engine is awake (rollout.server.share_memory)."""
        self._config, self._place, self._weights, self._tokenizer = config, place, weights, tokenizer
        self._prove = None if config.rollout.is_embedded else prove
        self._shares_memory = shares_memory if config.rollout.server.share_memory else None
        self._engine: RolloutEngine | None = None
        self._engine_version: int | None = None  # of the weights that the engine has
        self.weight_version = 0

    def start_early(self) -> None:
        """Have servers come up while the policy warms up, where they have devices of their own.

        On the trainer's the first `session` starts them, when all ranks have loaded what they will and made room: a
        server takes its memory by what it finds free, and refuses devices on which that differs.
        """
        if self._shares_memory is None and not (device.ON_GPU and self._config.rollout.shares_devices):
            _ = self.engine

    @property
    def engine(self) -> RolloutEngine:
        """Return the engine, started at the first call; `sync` gives it weights."""
        if self._engine is None:
            model_dir = self._config.run_dir / "engine_model"
            if not self._config.rollout.is_embedded:
                if self._place.rank == 0:
                    write_model_dir(model_dir, self._weights, self._tokenizer)
                self._place.gather(None)  # no server may start before the folder is whole
            setup = EngineSetup(self._weights.hf_config, model_dir, device.device(), self._place)
            self._engine = build_engine(self._config, setup)
        return self._engine

    @contextlib.contextmanager
    def session(self, timers: Timers) -> Iterator[RolloutEngine]:
        """Lend the engine with its memory and the current weights; where it shares the accelerator with the trainer,
        gradients and optimizer state are on the host meanwhile."""
        sharing = self._shares_memory
        try:
            with timers("sync"):
                if sharing is not None:
                    sharing.offload()
                    with contextlib.suppress(ServersLost):  # the update restarts what died asleep
                        self.engine.wake()
                self.sync()
            yield self.engine
            if sharing is not None:
                with timers("sync"):
                    self.engine.sleep()
                    self._engine_version = None
                    sharing.reload()
        except EngineError:  # on every rank; it ends the run, whose last checkpoint needs the memory
            if sharing is not None:
                self._dismiss()
                sharing.reload()
            raise

    def _dismiss(self) -> None:
        """Stop the run's own servers, whatever state they are in, and put others to sleep."""
        if self._config.rollout.server.urls:
            with contextlib.suppress(EngineError):
                self.engine.sleep()
        self.close()
        self._place.gather(None)  # no rank goes on beside a server that still has the memory

    def sync(self) -> None:
        """Give the engine the current weights, unless it has them, and prove that it serves them.

        Raises: EngineError when more servers died than the config allows, or one serves other weights than it was sent.
        """
        tries = 0
        while self._engine_version != self.weight_version:
            try:
                self.engine.update_weights(self._weights.hf_weights(), self.weight_version)
                if self._prove is not None:
                    self._prove(self.engine)
                self._engine_version = self.weight_version
            except ServersLost as error:  # the next update restarts the dead, or ends the run when too many died
                tries += 1
                if tries > self._config.rollout.server.max_failures + 1:  # they live, and yet the connection breaks
                    raise
                launch.say(f"weights again, because a server was lost: {error}")

    def revive(self) -> None:
        """Restart servers that died in generation, and send the weights again."""
        self._engine_version = None
        self.sync()

    def close(self) -> None:
        """Stop the engine, if it was started."""
        if self._engine is not None:
            self._engine.close()
