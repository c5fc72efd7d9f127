"""`megatron-rl plan`: memory, seconds and layouts of a config, on a machine without GPU and without torch."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperCommand

from megatron_rl.config import Config, load_config
from megatron_rl.errors import UserError
from megatron_rl.models.hardware import GIB, HARDWARE, Hardware
from megatron_rl.plan.search import Proposal, rehearsed, remedies, search
from megatron_rl.plan.seconds import SCORES
from megatron_rl.plan.step import Load, StepPlan, plan_step

_SHOWN, _REHEARSED = 10, 3  # layouts

# options of their own for what --assume takes
_ASSUMED = {"--mean-prompt": "prompt", "--mean-response": "response", "--generation-batches": "batches"}


class PlanCommand(TyperCommand):
    """`plan`, which also takes each assumption as an option: --mean-prompt 200 for --assume prompt=200."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Spell the three options as --assume, then parse as ever."""
        spelled, rest = list[str](), iter(args)
        for argument in rest:
            option, _, number = argument.partition("=")
            name = _ASSUMED.get(option)
            spelled += [argument] if name is None else ["--assume", f"{name}={number or next(rest, '')}"]
        return super().parse_args(ctx, spelled)


def plan(
    config: Annotated[Path, typer.Argument(help="YAML file of the run", show_default=False)],
    overrides: Annotated[list[str] | None, typer.Argument(help="a.b=c", show_default=False)] = None,
    gpu: Annotated[
        str, typer.Option(help=f"{', '.join(HARDWARE)}; cpu: memory alone, of this machine's runs")
    ] = "h100",
    nodes: Annotated[int | None, typer.Option(min=1, help="instead of the config's processes: full nodes")] = None,
    find: Annotated[bool, typer.Option("--search", help="rank the layouts that fit")] = False,
    checked: Annotated[
        bool, typer.Option("--rehearse", help="of --search: rehearse the best three, and drop what does not fit")
    ] = False,
    assume: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=NUMBER",
            help="prompt: mean tokens (256 or the limit); response: mean tokens (half the limit); batches: generation "
            "batches a step (1; more with dynamic sampling). Also as --mean-prompt, --mean-response, "
            "--generation-batches",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="for machines")] = False,
) -> None:
    """Predict a run's memory and seconds before it takes a GPU; with --search, find its layout."""
    console = Console()
    if gpu not in HARDWARE:
        raise UserError(f"--gpu {gpu}: expected one of {', '.join(HARDWARE)}")
    hardware = HARDWARE[gpu]
    changes = [f"parallel.world_size={nodes * hardware.gpus_per_node}"] if nodes else []
    resolved = load_config(config, [*(overrides or []), *changes])
    load = _load(assume or [], resolved.data.max_prompt_tokens, resolved.rollout.max_response_tokens)
    step = plan_step(resolved, hardware, load)
    fixes = [] if step.memory.fits else remedies(resolved, hardware, load)
    if find and not hardware.flops:
        raise UserError("--search ranks by predicted seconds, which --gpu cpu has none of; choose a GPU")
    found = search(resolved, hardware, load) if find else None
    if found and checked:
        found[:_REHEARSED] = rehearsed(resolved, found[:_REHEARSED], gpu)
    if as_json:
        print(json.dumps(_as_dict(resolved.name, step, load, fixes, found), indent=2))
        return
    _print_plan(console, resolved, hardware, step, load)
    _print_fit(console, step, fixes)
    if found is not None:
        print_search(console, found)


def _load(assumed: list[str], prompt_limit: int, response_limit: int) -> Load:
    """Return the load with what is assumed of it. Raises: UserError for an unknown name, or no number within bounds."""
    values = {"prompt": min(256.0, prompt_limit), "response": response_limit / 2, "batches": 1.0}
    limits = {"prompt": prompt_limit, "response": response_limit, "batches": float("inf")}
    for text in assumed:
        name, _, number = text.partition("=")
        try:
            values[name], limit = float(number), limits[name]
        except (KeyError, ValueError):
            raise UserError(f"--assume {text}: expected one of {', '.join(limits)}, as in prompt=200") from None
        if not 1 <= values[name] <= limit:
            raise UserError(f"--assume {text}: expected at least 1 and at most the config's limit of {limit:g}")
    return Load(**values)


def _print_plan(console: Console, config: Config, hardware: Hardware, step: StepPlan, load: Load) -> None:
    error = {kind: f"{score['median']:.0%}, worst {score['worst']:.0%}" for kind, score in SCORES.items()}
    parts = list(dict.fromkeys(part for phase in step.memory.phases.values() for part in phase))
    console.print(f"{config.name}: memory of the fullest rank, GiB ({step.layout.text()})", style="italic")
    table = Table()
    table.add_column("part")
    for phase in step.memory.phases:
        table.add_column(phase, justify="right")
    for part in parts:
        table.add_row(part, *(f"{p.get(part, 0.0) / GIB:.2f}" for p in step.memory.phases.values()))
    table.add_row("total", *(f"{step.memory.total(p) / GIB:.2f}" for p in step.memory.phases), style="bold")
    console.print(table)
    console.print(f"error of such predictions: median {error['memory' if hardware.flops else 'cpu_memory']}")
    if step.memory.cache_tokens is not None:
        console.print(f"key-value cache of a server: {step.memory.cache_tokens:,} tokens, which it is started with")
    if host := step.memory.host:
        text = ", ".join(f"{part} {size / GIB:.1f}" for part, size in host.items())
        console.print(f"memory of a node's host, at most, GiB: {sum(host.values()) / GIB:.1f} ({text})")
    if not step.seconds:
        return
    table = Table(title="one step", title_justify="left")
    table.add_column("phase")
    table.add_column("seconds", justify="right")
    for phase, seconds in step.seconds.items():
        table.add_row(phase, f"{seconds:.1f}")
    table.add_row("step", f"{step.total:.1f}", style="bold")
    console.print(table)
    update = step.seconds["forward and backward"] + step.seconds["optimizer"]
    console.print(
        f"error, held out: whole steps median {error['step']}; training median {error['training']}; "
        f"old log-probabilities median {error['forward']}; sync, optimizer and reward not scored\n"
        f"{step.tokens_per_gpu:,.0f} tokens/s/GPU over the step, MFU {step.mfu:.2f} over the "
        f"{update:.0f} s of updates (causal attention counted once), {step.micro_batches:.1f} micro-batches an update, "
        f"pipeline bubble {step.bubble:.2f} of the work, weight sync {step.synced / GIB:.1f} GiB\n"
        f"assumed: mean prompt {load.prompt:g}, mean response {load.response:g} tokens, {load.batches:g} generation "
        f"batches a step on {hardware.name}; nothing was measured on a GPU of this project"
    )


def _print_fit(console: Console, step: StepPlan, fixes: list[Proposal]) -> None:
    memory = step.memory
    if memory.fits:
        if memory.room < float("inf"):
            console.print(f"fits: {memory.peak / GIB:.1f} of {memory.room / GIB:.1f} GiB", style="green")
        return
    for phase in memory.phases:
        if memory.total(phase) > memory.room:
            over = (memory.total(phase) - memory.room) / GIB
            console.print(f"does not fit: {phase} is {over:.1f} GiB over {memory.room / GIB:.1f}", style="red")
    for fault in memory.faults:
        console.print(f"does not fit: {fault}", style="red")
    for fix in fixes:
        peak = fix.plan.memory.peak / GIB
        console.print(f"would fit with {' '.join(fix.overrides)}: {peak:.1f} GiB, {fix.plan.total:.0f} s a step")
    if not fixes:
        console.print("no single change makes it fit; --search tries whole layouts, --nodes more of them")


def print_search(console: Console, found: list[Proposal]) -> None:
    """Print the layouts in their order, but first those that their rehearsal has refused."""
    if not found:
        console.print("no layout fits; give more --nodes, a smaller train.micro_batch_tokens or a larger --gpu")
        return
    refused = [proposal for proposal in found if proposal.rehearsal and not proposal.rehearsal["fits"]]
    for proposal in refused:
        console.print(f"dropped, does not fit: {_overrides_text(proposal)}", style="red")
    found = [proposal for proposal in found if proposal not in refused]
    table = Table(title=f"{len(found)} layouts fit; the fastest {min(_SHOWN, len(found))}", title_justify="left")
    for name in ("seconds", "MFU", "bubble", "GiB"):
        table.add_column(name, justify="right")
    table.add_column("overrides", overflow="fold")
    for proposal in found[:_SHOWN]:
        step = proposal.plan
        numbers = (f"{step.total:.0f}", f"{step.mfu:.2f}", f"{step.bubble:.2f}", f"{step.memory.peak / GIB:.0f}")
        table.add_row(*numbers, _overrides_text(proposal))
    console.print(table)
    console.print("seconds closer to each other than the error above are no ranking")


def _overrides_text(proposal: Proposal) -> str:
    text, seen = " ".join(proposal.overrides), proposal.rehearsal
    return f"{text} (rehearsed: {seen['peak'] / GIB:.1f} GiB, {seen['where']})" if seen else text


def _as_dict(
    name: str, step: StepPlan, load: Load, fixes: list[Proposal], found: list[Proposal] | None
) -> dict[str, Any]:
    answer = {
        "name": name,
        "layout": asdict(step.layout),
        "assumed": asdict(load),
        "bytes": step.memory.phases,
        "host_bytes": step.memory.host,
        "fits": step.memory.fits,
        "faults": step.memory.faults,
        "cache_tokens": step.memory.cache_tokens,
        "seconds": step.seconds,
        "mfu": step.mfu,
        "bubble": step.bubble,
        "remedies": [fix.overrides for fix in fixes],
        "errors": SCORES,
    }
    if step.seconds:
        answer |= {"step_seconds": step.total, "tokens_per_second_and_gpu": step.tokens_per_gpu}
    if found is not None:
        answer["search"] = [
            {"overrides": p.overrides, "step_seconds": p.plan.total, "peak_bytes": p.plan.memory.peak}
            | ({"rehearsal": p.rehearsal} if p.rehearsal else {})
            for p in found
        ]
    return answer
