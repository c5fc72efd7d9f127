"""The policy losses, one file each: options, formula, source, and what it needs to know of the whole mini-batch."""

from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny

from megatron_rl.algorithms.methods.ce_gppo import CeGppoLoss
from megatron_rl.algorithms.methods.cispo import CispoLoss
from megatron_rl.algorithms.methods.clip_b import ClipBLoss
from megatron_rl.algorithms.methods.clip_cov import ClipCovLoss
from megatron_rl.algorithms.methods.clip_v import ClipVLoss
from megatron_rl.algorithms.methods.dppo import DppoLoss
from megatron_rl.algorithms.methods.entropy_advantage import EntropyAdvantageLoss
from megatron_rl.algorithms.methods.erc import ErcLoss
from megatron_rl.algorithms.methods.forking import ForkingLoss
from megatron_rl.algorithms.methods.gaussian_cov import GaussianCovLoss
from megatron_rl.algorithms.methods.gmpo import GmpoLoss
from megatron_rl.algorithms.methods.gspo import GspoLoss
from megatron_rl.algorithms.methods.kl_cov import KlCovLoss
from megatron_rl.algorithms.methods.ppo_clip import PpoClipLoss
from megatron_rl.algorithms.methods.repo_r import RepoRLoss
from megatron_rl.algorithms.methods.sapo import SapoLoss
from megatron_rl.algorithms.methods.steer import SteerLoss
from megatron_rl.algorithms.methods.vespo import VespoLoss
from megatron_rl.algorithms.policy_loss import PolicyLoss
from megatron_rl.algorithms.section import load_named

METHODS: dict[str, type[PolicyLoss]] = {
    "ppo_clip": PpoClipLoss,
    "clip_cov": ClipCovLoss,
    "kl_cov": KlCovLoss,
    "gspo": GspoLoss,
    "cispo": CispoLoss,
    "forking": ForkingLoss,
    "entropy_advantage": EntropyAdvantageLoss,
    "steer": SteerLoss,
    "gaussian_cov": GaussianCovLoss,
    "ce_gppo": CeGppoLoss,
    "erc": ErcLoss,
    "clip_b": ClipBLoss,
    "clip_v": ClipVLoss,
    "repo_r": RepoRLoss,
    "sapo": SapoLoss,
    "gmpo": GmpoLoss,
    "dppo": DppoLoss,
    "vespo": VespoLoss,
}


def loss_class(name: str) -> type[PolicyLoss]:
    """Return the loss that METHODS calls so, or a user's own, the class at `module:Class`.

    Raises: ValueError when there is none, its module does not import, or it is no policy loss.
    """
    if name in METHODS:
        return METHODS[name]
    try:
        own = load_named(name, METHODS, "module:Class such as my_losses:MyLoss")
    except ValueError as error:
        raise ValueError(f"type={name!r}: {error}") from error
    if not (isinstance(own, type) and issubclass(own, PolicyLoss)) or own.__call__ is PolicyLoss.__call__:
        raise ValueError(
            f"type={name!r}: got {own!r}, expected a subclass of megatron_rl.algorithms.policy_loss.PolicyLoss with a "
            "__call__ that returns the loss"
        )
    return own


def _read(value: Any) -> PolicyLoss:
    if isinstance(value, PolicyLoss):
        return value
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        raise ValueError(f"expected a mapping with type: one of {', '.join(METHODS)}, or module:Class of your own")
    return loss_class(value["type"]).model_validate(value)


LossConfig = Annotated[SerializeAsAny[PolicyLoss], BeforeValidator(_read)]  # the config's section `loss`
