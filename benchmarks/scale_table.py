"""Expected efficiency on many GPUs, on paper: from measured step time and counted bytes, as stated here.

A step takes the measured time of one GPU, then, not overlapped with it, one all-reduce of the gradients, and
three small agreements between all ranks over TCP (step, end of step, metrics), each a ring of N - 1 messages.

    all-reduce(N) = 2 (N - 1) / N * bytes / bandwidth + 2 (N - 1) * latency
    efficiency(N) = step / (step + all-reduce(N) + 3 (N - 1) * latency of TCP)

Inside a node of eight GPUs the gradients go over NVLink; across nodes a hierarchical ring sends each byte
once a node, which is what NCCL does. The batch of one GPU stays the same (weak scaling).

A step measured on a CPU is so long that sending costs nothing beside it. ``--sustained`` therefore adds rows
for an assumed GPU: the operations of a step, counted, at so many of them a second.

    python benchmarks/scale_table.py STEP.json [--sustained 60e12]
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GPUS = (8, 64, 512)
A_NODE = 8
AGREEMENTS = 3
NVLINK_BYTES_S = 300e9
NVLINK_LATENCY_S = 3e-6


@dataclass(frozen=True)
class Interconnect:
    """What lies between nodes.

    Attributes:
        bytes_s: Bandwidth of a node, one way.
        latency_s: Of one message between GPUs of two nodes.
        tcp_s: Of one small TCP message between two processes.
    """

    name: str
    bytes_s: float
    latency_s: float
    tcp_s: float


INTERCONNECTS = (
    Interconnect("8 × 400 Gb/s InfiniBand a node", 8 * 50e9, 5e-6, 15e-6),
    Interconnect("100 Gb/s RoCE a node", 12.5e9, 10e-6, 20e-6),
    Interconnect("10 Gb/s Ethernet a node", 1.25e9, 50e-6, 50e-6),
)


def seconds_beside(count: int, size: float, link: Interconnect) -> tuple[float, float]:
    """Return the seconds of the all-reduce of `size` bytes over `count` GPUs, and of the agreements."""
    inside = min(count, A_NODE)
    nodes = max(1, count // A_NODE)
    reduce_s = 2 * (inside - 1) / inside * size / NVLINK_BYTES_S + 2 * (inside - 1) * NVLINK_LATENCY_S
    if nodes > 1:
        reduce_s += 2 * (nodes - 1) / nodes * size / link.bytes_s + 2 * (nodes - 1) * link.latency_s
    return reduce_s, AGREEMENTS * (count - 1) * link.tcp_s


def efficiency(step_s: float, count: int, size: float, link: Interconnect) -> float:
    """Return the part of the time that is spent computing."""
    return step_s / (step_s + sum(seconds_beside(count, size, link)))


def rows(facts: dict[str, dict[str, Any]], sustained: float = 0.0) -> list[str]:
    """Return the table as lines of Markdown.

    Args:
        facts: What `scale_step.py` wrote of each network.
        sustained: Operations a second of an assumed GPU; 0 leaves its rows out.
    """
    head = ["method", "step", "gradients", "between nodes", *(f"{count} GPUs" for count in GPUS)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, row in facts.items():
        shape, size = " × ".join(str(item) for item in row["input"]), row["gradient_bytes"]
        measured = row["step_s"]
        steps = {f"{measured:.3f} s, measured ({row['device']}, {row['precision']})": measured}
        if sustained:
            assumed = row["operations"] / sustained
            steps[f"{assumed:.3f} s, assumed ({sustained / 1e12:g} Tflop/s)"] = assumed
        for words, step_s in steps.items():
            for link in INTERCONNECTS:
                cells = [f"{100 * efficiency(step_s, count, size, link):.1f} %" for count in GPUS]
                lead = [f"{name}, {shape}", words, f"{size / 2**20:.0f} MiB", link.name]
                lines.append("| " + " | ".join([*lead, *cells]) + " |")
    return lines


def main() -> None:
    """Print the table and its assumptions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("measured", type=Path, help="JSON of benchmarks/scale_step.py --out")
    parser.add_argument("--sustained", type=float, default=0.0, help="operations a second of an assumed GPU")
    options = parser.parse_args()
    facts = json.loads(options.measured.read_text(encoding="utf-8"))["times"]
    print("\n".join(rows(facts, options.sustained)))
    print()
    inside = f"NVLink {NVLINK_BYTES_S / 1e9:.0f} GB/s, {NVLINK_LATENCY_S * 1e6:.0f} µs"
    print(f"Inside a node: {A_NODE} GPUs, {inside}.")
    for link in INTERCONNECTS:
        print(
            f"{link.name}: {link.bytes_s / 1e9:g} GB/s a node, {link.latency_s * 1e6:.0f} µs, TCP "
            f"{link.tcp_s * 1e6:.0f} µs; {AGREEMENTS} agreements a step; nothing overlaps with computing."
        )


if __name__ == "__main__":
    main()
