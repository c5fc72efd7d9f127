"""What the planner knows of a machine: data-sheet numbers, and what a process needs before its first tensor."""

from dataclasses import dataclass, replace

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Hardware:
    """One accelerator and the wires to the others, per GPU and direction. Data-sheet peaks: nothing reaches them."""

    name: str
    memory: float  # bytes that a process can use
    flops: float  # dense bfloat16 on tensor cores, multiply-adds count twice, per second; 0: no time is predicted
    float32_flops: float  # the same of float32, off them
    bandwidth: float  # of its memory, bytes/s
    node_link: float  # to a GPU of the same node, bytes/s
    network: float  # to another node, bytes/s
    host_link: float  # to the host's memory, bytes/s
    gpus_per_node: int = 8
    has_engine: bool = True  # Transformer Engine runs there, as far as one knows


# Sources: NVIDIA's data sheets of A100 80GB SXM, H100 SXM, H200 SXM, and of the GB200 NVL72 rack, per GPU; one 200 or
# 400 Gb/s network port a GPU, as in the DGX systems. `memory` is what the driver reports, a little below the nominal
# size.
HARDWARE = {
    "a100": Hardware("a100", 79.2 * GIB, 312e12, 19.5e12, 2.04e12, 300e9, 25e9, 25e9),
    "h100": Hardware("h100", 79.2 * GIB, 989e12, 67e12, 3.35e12, 450e9, 50e9, 50e9),
    "h200": Hardware("h200", 139.8 * GIB, 989e12, 67e12, 4.8e12, 450e9, 50e9, 50e9),
    "gb200": Hardware("gb200", 184.0 * GIB, 2500e12, 80e12, 8.0e12, 900e9, 50e9, 300e9, gpus_per_node=4),
    "cpu": Hardware("cpu", 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, gpus_per_node=1),  # memory alone: peak RSS
}


def datasheet_flops(device_name: str, *, bfloat16: bool) -> tuple[float | None, str]:
    """Return the FLOP/s of this GPU's data sheet, None for an unknown one, and where the number is from."""
    for known in HARDWARE.values():
        part = known.name.upper()
        # the numbers are of the SXM boards
        if known.flops and part in device_name and not any(board in device_name for board in ("PCIe", "PCIE", "NVL")):
            return (known.flops if bfloat16 else known.float32_flops), f"datasheet of {part}"
    return None, f"no peak known for {device_name}"


def with_memory(memory: float, *, on_gpu: bool, has_engine: bool = True) -> Hardware:
    """Return a device of which little is known but its bytes: enough for plan/memory.py."""
    known = HARDWARE["h100" if on_gpu else "cpu"]
    return replace(known, name="unknown", memory=memory, has_engine=has_engine)


# Driver context, cuBLAS and attention workspaces, NCCL's buffers, of one process on a GPU. Assumed: never measured
# here.
GPU_PROCESS_BYTES = 2.0 * GIB
# What a rank, or an engine's process, with a GPU holds of the host's memory besides. Assumed: never measured here.
HOST_PROCESS_BYTES = 5.0 * GIB
# Share of a GPU's memory that a plan may fill; the rest is for fragmentation and what the formulas leave out.
FILL = 0.92
# Peak RSS of a rank that has imported torch, Megatron-Core and transformers and trained a model of 10 thousand
# parameters over gloo; measured by scripts/measure_memory.py (torch 2.13.0 CPU, Python 3.11, Linux).
CPU_PROCESS_BYTES = 445 * 2**20
# Peak RSS over the activations' bytes on a CPU: a C heap keeps what it freed, in pieces. Set by hand between what
# the rows `wide` and `long` of scripts/calibration/measured_memory.csv ask for (0.8 and 1.6), with the other rows
# measured and seen before.
CPU_HEAP = 1.4
# The weight stream gathers buckets of this size (parallel/weights.py).
GATHER_BYTES = 512 * 2**20
# Logits that the fused statistics hold at once (parallel/fused_linear.py).
CHUNK_LOGITS = 2**26
# Logits' gradients that are rounded at once where they are float32 (the same).
ROUNDED_LOGITS = 2**24
# Micro-batches of which torch's layers keep tables (policy/torch_layers.py).
PACKS_KEPT = 8
# Entries that the embedded engine samples from at once, in float64 (rollout/sampling.py).
SAMPLING_ENTRIES = 2**23
