"""What LoRA layers cost each GPU on 8 to 1024 of them: memory, and bytes sent in a step.

    python -m benchmarks.plan_parallel [--tokens 8192] [--rank 16] [--gpus 8,64,1024] [--json FILE]

The numbers come from shapes alone, no machine is measured; tests/test_distributed.py holds them to
the bytes that 2 and 4 processes hold and send. Parameters are laid out as PyTorch's own engines do
it: DDP keeps everything everywhere; FSDP2 splits each tensor along its first dimension and pads it
to equal shards, which makes much of an A [r, K] on more than r GPUs, so that "columns" splits A
along its second (shard_placement_fn=lambda p: Shard(1) if p is layer.lora_A else None); tensor
parallel is that of fused_lora.parallel, over the GPUs of one node.

Per layer, with x [M, K] for each replica (a GPU, or the GPUs that split a layer), base weight
W [N, K], adapter A [r, K] and B [N, r]:

    saved for backward   x, unless another layer has saved the same, and h [M, r]
    optimiser            AdamW: two moments of A and B in their dtype
    DDP                  all-reduces the gradients of A and B
    FSDP2                all-gathers W, A, B in forward and, resharded after it, again in backward;
                         reduce-scatters the gradients of A and B
    column-wise          all-reduces dx and the gradient of A, each layer for itself
    row-wise             all-reduces y and the gradient of B
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import asdict, dataclass
from math import prod
from typing import Literal

Data = Literal["ddp", "fsdp", "fsdp_columns"]
GPUS_PER_NODE = 8  # tensor parallel stays within NVLink
# Bytes sent by each rank of a ring for a message of S bytes, in units of S (n - 1) / n.
RING = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}


@dataclass(frozen=True)
class Layer:
    """A LoRA layer without bias, and the dimension of its weight that tensor parallel splits."""

    name: str
    K: int
    N: int
    split: Literal["column", "row"]
    shares_x: bool = False  # with the layer before it, as k_proj and v_proj do with q_proj


@dataclass(frozen=True)
class Setting:
    """What all layers share: rank, tokens per replica and step, bytes per element."""

    r: int = 16
    M: int = 8192
    base_bytes: int = 2  # W, x, h: bf16
    adapter_bytes: int = 4  # A, B: fp32
    reshard: bool = True  # FSDP2's reshard_after_forward


@dataclass(frozen=True)
class Cost:
    """Bytes on one GPU (the one with the most), and what it sends in a step."""

    base: int
    adapter: int
    gradients: int
    optimizer: int
    saved: int
    messages: dict[str, int]  # collective and group size, "all_reduce/8" -> bytes of its tensors

    @property
    def sent(self) -> int:
        """Bytes that the GPU sends in a step if every collective is a ring."""
        total = 0.0
        for name, size in self.messages.items():
            kind, _, ranks = name.partition("/")
            total += RING[kind] * size * (int(ranks) - 1) / int(ranks)
        return round(total)

    @property
    def memory(self) -> int:
        """Everything that is held at once at the end of forward."""
        return self.base + self.adapter + self.gradients + self.optimizer + self.saved


def llama_block() -> list[Layer]:
    """The seven projections of a block of Llama 3 8B (https://arxiv.org/abs/2407.21783)."""
    return [
        Layer("q_proj", 4096, 4096, "column"),
        Layer("k_proj", 4096, 1024, "column", shares_x=True),
        Layer("v_proj", 4096, 1024, "column", shares_x=True),
        Layer("o_proj", 4096, 4096, "row"),
        Layer("gate_proj", 4096, 14336, "column"),
        Layer("up_proj", 4096, 14336, "column", shares_x=True),
        Layer("down_proj", 14336, 4096, "row"),
    ]


def cost(layer: Layer, gpus: int, tp: int, data: Data, setting: Setting) -> Cost:
    """Of one layer on ``gpus`` GPUs, ``tp`` of which split it; the others are data parallel.

    Raises ValueError if the sizes do not divide.
    """
    if gpus % tp:
        raise ValueError(f"gpus: got {gpus}, wanted a multiple of tp = {tp}")
    split = layer.N if layer.split == "column" else layer.K
    if split % tp:
        raise ValueError(f"{layer.name}: {split} does not divide by tp = {tp}")
    ranks = gpus // tp
    K, N, M, r = layer.K, layer.N, setting.M, setting.r
    if layer.split == "column":
        N //= tp
    else:
        K //= tp
    shapes = {"weight": (N, K), "lora_A": (r, K), "lora_B": (N, r)}
    itemsize = {
        name: setting.base_bytes if name == "weight" else setting.adapter_bytes for name in shapes
    }
    whole = {name: prod(shape) * itemsize[name] for name, shape in shapes.items()}
    held = whole
    padded = whole
    if data != "ddp":
        split_at = {name: int(data == "fsdp_columns" and name == "lora_A") for name in shapes}
        for name, shape in shapes.items():
            if split_at[name] and shape[1] % ranks:
                raise ValueError(f"{layer.name}: A's {shape[1]} columns do not divide by {ranks}")
        held = {
            name: -(-shape[split_at[name]] // ranks) * shape[1 - split_at[name]] * itemsize[name]
            for name, shape in shapes.items()
        }
        padded = {name: size * ranks for name, size in held.items()}
    adapter = held["lora_A"] + held["lora_B"]

    messages: Counter[str] = Counter()
    if ranks > 1 and data == "ddp":
        messages[f"all_reduce/{ranks}"] += whole["lora_A"] + whole["lora_B"]
    if ranks > 1 and data != "ddp":
        gathers = 2 if setting.reshard else 1
        messages[f"all_gather/{ranks}"] += gathers * sum(padded.values())
        messages[f"reduce_scatter/{ranks}"] += padded["lora_A"] + padded["lora_B"]
    if tp > 1:
        activations = M * (K if layer.split == "column" else N) * setting.base_bytes
        factor = whole["lora_A" if layer.split == "column" else "lora_B"]
        messages[f"all_reduce/{tp}"] += activations + factor
    return Cost(
        base=held["weight"],
        adapter=adapter,
        gradients=adapter,
        optimizer=2 * adapter,
        saved=M * ((0 if layer.shares_x else K) + r) * setting.base_bytes,
        messages=dict(messages),
    )


def total(costs: list[Cost]) -> Cost:
    """Of several layers together."""
    messages: Counter[str] = Counter()
    for one in costs:
        messages.update(one.messages)
    sizes = {
        name: sum(getattr(one, name) for one in costs)
        for name in ("base", "adapter", "gradients", "optimizer", "saved")
    }
    return Cost(**sizes, messages=dict(messages))


def plans(gpus: int) -> dict[str, tuple[int, Data]]:
    """The ways to lay ``gpus`` GPUs out, by name: tp, and what the others do."""
    tp = min(gpus, GPUS_PER_NODE)
    named: dict[str, tuple[int, Data]] = {
        "DDP": (1, "ddp"),
        "FSDP2": (1, "fsdp"),
        "FSDP2, columns": (1, "fsdp_columns"),
        f"TP {tp} x DDP {gpus // tp}": (tp, "ddp"),
    }
    if gpus > tp:
        named[f"TP {tp} x FSDP2 {gpus // tp}"] = (tp, "fsdp")
    return named


def report(layers: list[Layer], gpus: list[int], setting: Setting) -> list[dict[str, object]]:
    """One row for each number of GPUs and plan, of all the layers together."""
    rows: list[dict[str, object]] = []
    for count in gpus:
        for name, (tp, data) in plans(count).items():
            summed = total([cost(layer, count, tp, data, setting) for layer in layers])
            rows.append(
                {"gpus": count, "plan": name, **asdict(summed)}
                | {"memory": summed.memory, "sent": summed.sent}
            )
    return rows


def main() -> None:
    """Prints the table, and writes it as JSON if asked."""
    parser = argparse.ArgumentParser(description="Costs of a Llama 3 8B block's LoRA layers.")
    parser.add_argument("--tokens", type=int, default=8192, help="per replica and step")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--gpus", default="8,16,32,64,128,256,512,1024")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    setting = Setting(r=options.rank, M=options.tokens)
    rows = report(llama_block(), [int(n) for n in options.gpus.split(",")], setting)
    columns = ("base", "adapter", "optimizer", "saved", "memory", "sent")
    print(
        f"one block of Llama 3 8B, r {setting.r}, {setting.M} tokens per GPU and step; MB per GPU"
    )
    print(f"{'gpus':>5}  {'plan':<18}" + "".join(f"{name:>11}" for name in columns))
    for row in rows:
        sizes = [float(str(row[name])) / 1e6 for name in columns]
        print(f"{row['gpus']:>5}  {row['plan']:<18}" + "".join(f"{size:>11.2f}" for size in sizes))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
