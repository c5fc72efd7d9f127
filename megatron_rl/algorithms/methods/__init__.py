"""The policy losses, one file each: options, formula, source, and what it needs to know of the whole mini-batch."""

from __future__ import annotations

import difflib
import importlib

from megatron_rl.algorithms.methods.cispo import CispoLoss
from megatron_rl.algorithms.methods.clip_cov import ClipCovLoss
from megatron_rl.algorithms.methods.entropy_advantage import EntropyAdvantageLoss
from megatron_rl.algorithms.methods.forking import ForkingLoss
from megatron_rl.algorithms.methods.gaussian_cov import GaussianCovLoss
from megatron_rl.algorithms.methods.gspo import GspoLoss
from megatron_rl.algorithms.methods.kl_cov import KlCovLoss
from megatron_rl.algorithms.methods.ppo_clip import PpoClipLoss
from megatron_rl.algorithms.methods.steer import SteerLoss
from megatron_rl.algorithms.policy_loss import PolicyLoss

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
}


def loss_class(name: str) -> type[PolicyLoss]:
    """Return the loss that METHODS calls so, or the class at `module:Class`.

    Raises: ValueError when there is none, its module does not import, or it is no policy loss.
    """
    if name in METHODS:
        return METHODS[name]
    module_name, _, attribute = name.partition(":")
    where = f"type={name!r}"
    if not module_name or not attribute:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{where}: expected one of {', '.join(METHODS)}, or module:Class of your own{hint}")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(
            f"{where}: importing {module_name} failed with {type(error).__name__}: {error}; put the folder of that "
            "module on PYTHONPATH, and see that it imports in this environment"
        ) from error
    found = getattr(module, attribute, None)
    if found is None:
        near = difflib.get_close_matches(attribute, dir(module), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{where}: module {module_name} has no {attribute!r}{hint}")
    if not (isinstance(found, type) and issubclass(found, PolicyLoss)) or found.__call__ is PolicyLoss.__call__:
        raise ValueError(
            f"{where}: got {found!r}, expected a subclass of megatron_rl.algorithms.policy_loss.PolicyLoss with a "
            "__call__ that returns the loss"
        )
    return found
