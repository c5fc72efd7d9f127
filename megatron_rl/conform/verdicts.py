"""Two layouts' measurements compared: a verdict a line, with the largest deviation, its place and its usual cause."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rl.convert.safetensors_io import stored_tensors
from megatron_rl.files import read_asset

# name -> largest deviation in float32, in bfloat16, what usually causes more
KINDS: dict[str, tuple[float, float, str]] = {
    name: tuple(row) for name, row in read_asset(__file__, "kinds.yaml").items()
}
_FLOOR = 1e-3  # of the largest gradient of all: what is smaller is rounding


@dataclass(frozen=True, slots=True)
class Verdict:
    """One line of the answer. `deviation` and `tolerance` are in the units of KINDS."""

    name: str
    deviation: float
    tolerance: float
    place: str = ""

    @property
    def is_ok(self) -> bool:
        """Return whether rounding explains the deviation."""
        return self.deviation <= self.tolerance  # NaN is not

    def as_json(self) -> dict[str, Any]:
        """Return plain data; JSON has no infinity."""
        finite = self.deviation if math.isfinite(self.deviation) else None
        return asdict(self) | {"deviation": finite, "ok": self.is_ok, "cause": KINDS[self.name][2]}


def compare(run: Path, reference: Path, dtype: str, engine_limit: float) -> list[Verdict]:
    """Return the verdicts on the folder `run` against `reference`, both filled by `measure`."""
    mine, theirs = (torch.load(folder / "tokens.pt", weights_only=True) for folder in (run, reference))
    ours, numbers = (json.loads((folder / "numbers.json").read_text()) for folder in (run, reference))
    limit = {name: half if dtype == "bfloat16" else single for name, (single, half, _) in KINDS.items()}
    if strangers := _strangers(run / "start", reference / "start"):
        return [_exact("weights", strangers, "missing on one side, or of another shape: ")]
    unlike = [name for name, a, b in _pairs(run / "start", reference / "start") if not torch.equal(a, b)]
    verdicts = [_exact("weights", unlike)]
    if not torch.equal(mine["ids"], theirs["ids"]) or not torch.equal(mine["advantages"], theirs["advantages"]):
        missing = set(theirs["ids"].tolist()) ^ set(mine["ids"].tolist())
        place = f"the layouts count other tokens: {sorted(missing)[:3]}" if missing else "tokens have other advantages"
        return [*verdicts, Verdict("loss", math.inf, 0.0, place)]
    both = torch.isin(mine["logit_ids"], theirs["logit_ids"]), torch.isin(theirs["logit_ids"], mine["logit_ids"])
    logits = (mine["logits"][both[0]] - theirs["logits"][both[1]]).abs().amax(1)
    verdicts.append(_worst("logits", logits, mine["logit_ids"][both[0]], limit["logits"]))
    for name in ("logprobs", "entropy"):
        verdicts.append(_worst(name, (mine[name] - theirs[name]).abs(), mine["ids"], limit[name]))
    for name in ("surrogate_weights", "token_weights"):
        if name in theirs:
            size = theirs[name].abs()
            relative = (mine[name] - theirs[name]).abs() / size.clamp(min=float(size.max()) * 1e-3 + 1e-30)
            verdicts.append(_worst("token weights", relative, mine["ids"], limit["token weights"]))
    if "selected" in theirs:
        differing = mine["selected"] != theirs["selected"]
        share = int(differing.sum()) / max(1, 2 * int(theirs["selected"].sum()))
        verdicts.append(Verdict("selected", share, limit["selected"], _token(mine["ids"][differing])))
    verdicts.append(_metrics(ours["loss"] | ours["selection"], numbers["loss"] | numbers["selection"], limit["loss"]))
    verdicts.append(_gradients(run, reference, limit["gradients"]))
    norm = max(numbers["clip norm"][0], 1e-30)
    norms = {f"rank {rank}": abs(each - norm) / norm for rank, each in enumerate(ours["clip norm"])}
    verdicts.append(_largest("clip norm", norms, limit["clip norm"]))
    verdicts += [_exact(name, ours[name]) for name in ("replicated tokens", "replicated weights")]
    ends = ((run / "start", run / "after"), (reference / "start", reference / "after"))
    verdicts.append(_movement("update", *ends, limit["update"]))
    own, other = ((folder / "after", folder / "second") for folder in (run, reference))
    verdicts.append(_movement("second update", own, other, limit["second update"]))
    for folder, loaded, by in ((run, ours, "run"), (reference, numbers, "reference")):
        if "checkpoint" in loaded:  # the run's own
            where, resumed = f"loaded by the {by}: ", (run / "after", folder / "resumed")
            verdicts.append(_exact("checkpoint", loaded["checkpoint"], where))
            verdicts.append(_movement("resumed update", resumed, own, limit["resumed update"], where))
    if "engine" in ours:
        verdicts.append(Verdict("engine", ours["engine"], engine_limit))
    return verdicts


def _exact(name: str, differing: list[str], where: str = "") -> Verdict:
    place = where + ", ".join(differing[:3]) if differing else ""
    return Verdict(name, float(len(differing)), 0.0, place)


def _worst(name: str, deviations: Tensor, ids: Tensor, tolerance: float) -> Verdict:
    if not len(deviations):
        return Verdict(name, math.nan, tolerance, "no token in common")
    worst = int(torch.where(deviations.isnan(), math.inf, deviations).argmax())
    return Verdict(name, float(deviations[worst]), tolerance, _token(ids[worst : worst + 1]))


def _token(ids: Tensor) -> str:
    return f"token {int(ids[0])}" if len(ids) else ""


def _metrics(mine: dict[str, float], theirs: dict[str, float], tolerance: float) -> Verdict:
    """Compare sums over the mini-batch relative to their size, or to 1 where they are smaller."""
    if mine.keys() != theirs.keys():
        return Verdict("loss", math.inf, tolerance, f"other metrics: {sorted(mine.keys() ^ theirs.keys())[:3]}")
    deviations = {name: abs(mine[name] - theirs[name]) / max(abs(theirs[name]), 1.0) for name in theirs}
    return _largest("loss", deviations, tolerance)


def _largest(name: str, deviations: dict[str, float], tolerance: float, where: str = "") -> Verdict:
    place = max(deviations, key=lambda each: math.inf if math.isnan(deviations[each]) else deviations[each])
    return Verdict(name, deviations[place], tolerance, where + place)


def _pairs(run: Path, reference: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    mine, theirs = stored_tensors(run), stored_tensors(reference)
    for name in theirs:
        yield name, mine[name].read(), theirs[name].read()


def _strangers(run: Path, reference: Path) -> list[str]:
    mine, theirs = ({name: stored.info for name, stored in stored_tensors(each).items()} for each in (run, reference))
    return sorted(name for name in mine | theirs if mine.get(name) != theirs.get(name))


def _gradients(run: Path, reference: Path, tolerance: float) -> Verdict:
    """Compare by parameter: the largest difference relative to the parameter's largest gradient, or to a thousandth of
    the largest of all where that is more: a key's bias has no gradient but rounding."""
    floor, deviations = _FLOOR * _largest_gradient(reference), {}
    for name, mine, theirs in _pairs(run / "gradients", reference / "gradients"):
        scale = max(float(theirs.abs().max()), floor, 1e-30)
        deviations[name] = float((mine - theirs).abs().max()) / scale
    return _largest("gradients", deviations, tolerance)


def _largest_gradient(folder: Path) -> float:
    return max(float(stored.read().abs().max()) for stored in stored_tensors(folder / "gradients").values())


def _movement(
    name: str, run: tuple[Path, Path], reference: tuple[Path, Path], tolerance: float, where: str = ""
) -> Verdict:
    """Compare by parameter how an update moved it from the first folder to the second: root mean square of the
    difference relative to that of the movement and the weights' own rounding, over weights whose gradient is more than
    rounding, because Adam moves all alike."""
    floor, deviations = _FLOOR * _largest_gradient(reference[0].parent), {}
    gradients = stored_tensors(reference[0].parent / "gradients")
    begins = stored_tensors(run[0]), stored_tensors(reference[0])
    for weight, mine, theirs in _pairs(run[1], reference[1]):
        real = gradients[weight].read().abs() > floor
        moved = (theirs.float() - begins[1][weight].read().float())[real]
        difference = (mine.float() - begins[0][weight].read().float())[real] - moved
        rounding = theirs.float()[real] * torch.finfo(theirs.dtype).eps
        scale = max(float(moved.square().sum() + rounding.square().sum()), 1e-30)
        deviations[weight] = math.sqrt(float(difference.square().sum()) / scale)
    return _largest(name, deviations, tolerance, where)
