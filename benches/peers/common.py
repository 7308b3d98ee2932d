"""What the scripts for GPUs share: processes, tensors, timing, verification, results."""

import gc
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from argparse import ArgumentParser, Namespace
from datetime import timedelta
from pathlib import Path

# NVLink multicast stays off: it is not allowed on every host, and a run that half sets it up can hang.
os.environ.update(NCCL_NVLS_ENABLE="0", TORCH_SYMM_MEM_DISABLE_MULTICAST="1", NVSHMEM_DISABLE_NVLS="1")

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from shapes import MODELS, Model, Pair, Parameter, Piece, needed, parameters

# What targets hold before a verified step: no bf16 weight of ours.
POISON = 0x5A5A
PAIRS = [(1, 1), (2, 2), (2, 1), (1, 2)]
BYTES = 2


def parse(description: str, methods: dict | None = None) -> Namespace:
    parser = ArgumentParser(description=description)
    parser.add_argument("--cpu", action="store_true", help="gloo and host memory, to try the scripts themselves")
    parser.add_argument("--tiny", action="store_true", help="a model of a few kilobytes instead of --models")
    parser.add_argument("--models", default="qwen3-4b,qwen3-8b", help="comma-separated (default: %(default)s)")
    parser.add_argument("--pairs", default=",".join(f"{a}:{b}" for a, b in PAIRS), help="trainer TP:engine TP, ... ")
    parser.add_argument("--gpus", type=int, help="how many to use (default: all; with --cpu: 2 processes)")
    parser.add_argument("--cycles", type=int, default=10, help="measured, after 3 to warm up")
    parser.add_argument("--limit", type=float, default=100, help="seconds after which what is left is given up")
    parser.add_argument("--json", type=Path, help="write every number to this file")
    if methods:
        parser.add_argument("--methods", default=",".join(methods), help="comma-separated (default: %(default)s)")
    args = parser.parse_args()
    args.models = ["tiny"] if args.tiny else args.models.split(",")
    # What vLLM's packed broadcast takes; for the tiny model so little that there are many, too.
    args.bucket_bytes = 4096 if args.tiny else 1 << 30
    args.pairs = [tuple(int(tp) for tp in pair.split(":")) for pair in args.pairs.split(",")]
    for name in args.models:
        if name not in MODELS:
            parser.error(f"no model {name}; there are {', '.join(MODELS)}")
    if args.cycles < 1 or any(len(pair) != 2 or min(pair) < 1 for pair in args.pairs):
        parser.error("--cycles and both sizes of every pair are at least 1")
    if methods:
        args.methods = args.methods.split(",")
        for name in args.methods:
            if name not in methods:
                parser.error(f"no method {name}; there are {', '.join(methods)}")
    if args.gpus is None:
        args.gpus = 2 if args.cpu else torch.cuda.device_count()
    if args.gpus < 2 or not args.cpu and args.gpus > torch.cuda.device_count():
        parser.error(f"{args.gpus} GPUs: at least 2 of the {torch.cuda.device_count()} there are, or --cpu")
    return args


def device(args: Namespace, gpu: int) -> torch.device:
    return torch.device("cpu") if args.cpu else torch.device("cuda", gpu)


def free(args: Namespace):
    """Gives the memory of a job back before the next one."""
    gc.collect()
    if not args.cpu:
        torch.cuda.empty_cache()


def synchronize(args: Namespace):
    if not args.cpu:
        torch.cuda.synchronize()


# ---- Tensors


class Side:
    """The tensors of one rank: of a trainer or an engine."""

    def __init__(self, pair: Pair, model: Model, rank: int, is_source: bool, place: torch.device):
        self.pair, self.rank, self.is_source = pair, rank, is_source
        self.parameters = parameters(model)
        self.tensors = [torch.empty(self.shape(p), dtype=torch.bfloat16, device=place) for p in self.parameters]

    def shape(self, parameter: Parameter) -> tuple[int, int]:
        if self.is_source:
            return parameter.source_shape(self.pair.source_tp)
        return parameter.target_shape(self.pair.target_tp)

    def prepare(self, salt: int):
        """New values on a source, poison on a target: a step that moves nothing cannot pass."""
        for parameter, tensor in zip(self.parameters, self.tensors):
            bits = tensor.view(torch.int16)
            if self.is_source:
                parameter.source_values(self.rank, self.pair.source_tp, salt, bits)
            else:
                bits.fill_(POISON)

    def verify(self, salt: int):
        """Compares every element of a target with what it must be."""
        for parameter, tensor in zip(self.parameters, self.tensors):
            want = torch.empty_like(tensor, dtype=torch.int16)
            parameter.target_values(self.rank, self.pair.target_tp, salt, POISON, want)
            wrong = tensor.view(torch.int16) != want
            if wrong.any():
                row, col = wrong.nonzero()[0].tolist()
                raise RuntimeError(
                    f"engine rank {self.rank}: {int(wrong.sum())} elements of {parameter.name} are wrong, "
                    f"the first at row {row}, column {col}"
                )

    def source_view(self, index: int, piece: Piece) -> torch.Tensor:
        return strided(self.tensors[index], piece.source_offset, piece.source_strides, piece.shape)

    def target_view(self, index: int, piece: Piece) -> torch.Tensor:
        return strided(self.tensors[index], piece.target_offset, piece.target_strides, piece.shape)


def strided(tensor: torch.Tensor, offset: int, strides: tuple, shape: tuple) -> torch.Tensor:
    """A view into a contiguous tensor."""
    return tensor.as_strided(shape, strides, tensor.storage_offset() + offset)


def buckets(model: Model, size, most: int) -> list[list[int]]:
    """Parameters in order, grouped so that their `size` stays within `most`, or one alone that is larger."""
    groups: list[list[int]] = []
    filled = 0
    for parameter in parameters(model):
        bytes_ = size(parameter)
        if not groups or filled + bytes_ > most:
            groups.append([])
            filled = 0
        groups[-1].append(parameter.index)
        filled += bytes_
    return groups


# ---- Results


def result(method: str, model: Model, pair: Pair, seconds: list[float]) -> dict:
    per_receiver = [BYTES * sum(needed(p, pair, target) for p in parameters(model)) for target in range(pair.target_tp)]
    remote = BYTES * sum(
        piece.elements
        for p in parameters(model)
        for target in range(pair.target_tp)
        for source in range(pair.source_tp)
        if pair.source_gpu(source) != pair.target_gpu(target)
        for piece in p.pieces(source, pair.source_tp, target, pair.target_tp)
    )
    median = statistics.median(seconds)
    return {
        "method": method,
        "model": model.name,
        "source": f"TP{pair.source_tp}",
        "target": f"TP{pair.target_tp}",
        "source_gpus": [pair.source_gpu(rank) for rank in range(pair.source_tp)],
        "target_gpus": pair.target_gpus(),
        "needed_bytes": sum(per_receiver),
        "receiver_bytes": max(per_receiver),
        "remote_bytes": remote,
        "seconds": seconds,
        "median_s": median,
        "gbps": sum(per_receiver) / median / 1e9,
        "gbps_per_receiver": max(per_receiver) / median / 1e9,
        "verified": True,
    }


def skipped(method: str, model: str, pair: tuple[int, int] | None, why: str) -> dict:
    found = {"method": method, "model": model, "why": why}
    if pair:
        found |= {"source": f"TP{pair[0]}", "target": f"TP{pair[1]}"}
    return found


def machine(args: Namespace) -> dict:
    if args.cpu:
        return {"device": "cpu", "gpus": 0, "processes": args.gpus, "torch": torch.__version__}
    properties = torch.cuda.get_device_properties(0)
    driver = Path("/proc/driver/nvidia/version")
    return {
        "device": properties.name,
        "gpus": args.gpus,
        "memory_bytes": properties.total_memory,
        "driver": driver.read_text().splitlines()[0].strip() if driver.exists() else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith("NCCL_")},
    }


def report(args: Namespace, found: dict):
    """Prints the table and writes the file; `found` has `results`, `skipped` and maybe `ceilings`."""
    print(f"{'method':<24}{'model':<10}{'TP':<8}{'median s':>10}{'fastest':>10}{'GB/s':>9}{'per receiver':>14}")
    for row in found["results"]:
        pair = f"{row['source'][2:]}->{row['target'][2:]}"
        print(
            f"{row['method']:<24}{row['model']:<10}{pair:<8}{row['median_s']:>10.5f}{min(row['seconds']):>10.5f}"
            f"{row['gbps']:>9.1f}{row['gbps_per_receiver']:>14.1f}"
        )
    for ceiling in found.get("ceilings", []):
        print(f"{ceiling['what']}: {ceiling['gbps']:.1f} GB/s")
    for row in found["skipped"]:
        where = f" {row['source'][2:]}->{row['target'][2:]}" if "source" in row else ""
        print(f"not measured: {row['method']} {row['model']}{where}: {row['why']}")
    if args.json:
        whole = {"schema": 1, "kind": "peers", "machine": machine(args), "cycles": args.cycles} | found
        args.json.write_text(json.dumps(whole, indent=2) + "\n")
        print(f"every number: {args.json}")


# ---- Timing


def measured(args: Namespace, sides: list[Side], step, agree) -> list[float]:
    """Verifies, warms up, measures and verifies again. `agree` waits for all processes and says since when all run,
    and until when.
    """

    def verified(salt: int):
        for side in sides:
            side.prepare(salt)
        agree(None)
        step()
        synchronize(args)
        agree(None)
        for side in sides:
            if not side.is_source:
                side.verify(salt)
        agree(None)

    verified(1)
    for _ in range(3):
        step()
    seconds = []
    for _ in range(args.cycles):
        synchronize(args)
        agree(None)
        start = time.perf_counter()
        step()
        synchronize(args)
        seconds.append(agree((start, time.perf_counter())))
    verified(2)
    return seconds


# ---- Processes


class World:
    """One process of those that hold a GPU each, inside `torch.distributed`."""

    def __init__(self, args: Namespace, gpu: int):
        self.args, self.gpu, self.device = args, gpu, device(args, gpu)
        self.groups: dict = {}

    def group(self, gpus: list[int]):
        """A communicator of some processes. All processes ask for the same ones in the same order."""
        key = tuple(sorted(set(gpus)))
        if key not in self.groups:
            self.groups[key] = dist.new_group(list(key))
        return self.groups[key]

    def agree(self, times: tuple[float, float] | None) -> float:
        """A barrier; with times, the seconds from the first start to the last end. All processes share one clock."""
        first, last = times or (0.0, 0.0)
        both = torch.tensor([-first, last], dtype=torch.float64, device=self.device)
        dist.all_reduce(both, op=dist.ReduceOp.MAX)
        return float(both.sum())


def _process(gpu: int, args: Namespace, method: str, measure, meeting: str, lines: str, deadline: float):
    world = World(args, gpu)
    options = {} if args.cpu else {"device_id": world.device}
    if not args.cpu:
        torch.cuda.set_device(gpu)
    dist.init_process_group(
        "gloo" if args.cpu else "nccl",
        init_method=f"file://{meeting}",
        rank=gpu,
        world_size=args.gpus,
        timeout=timedelta(seconds=60),
        **options,
    )
    with open(lines, "a") as out:
        for model, pair in jobs(args):
            why = pair.problem(model)
            # One process decides for all whether there is time: clocks agree, but not when each looks.
            late = world.agree((0.0, 1.0 if gpu == 0 and time.monotonic() > deadline else 0.0)) > 0
            if why is None and late:
                why = f"the limit of {args.limit:g} s was reached"
            if why is None:
                found = result(method, model, pair, measure(world, model, pair))
            else:
                found = skipped(method, model.name, (pair.source_tp, pair.target_tp), why)
            if gpu == 0:
                out.write(json.dumps(found) + "\n")
                out.flush()
            free(args)
    dist.destroy_process_group()


def jobs(args: Namespace) -> list[tuple[Model, Pair]]:
    return [(MODELS[name], Pair(*pair, args.gpus)) for name in args.models for pair in args.pairs]


def distributed(args: Namespace, method: str, measure, deadline: float) -> dict:
    """Runs `measure(world, model, pair)` for every job in a process a GPU; what a crash leaves undone is `skipped`."""
    why = None
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "lines"
        lines.touch()
        arguments = (args, method, measure, f"{folder}/meeting", str(lines), deadline)
        context = multiprocessing.start_processes(
            _process, arguments, nprocs=args.gpus, join=False, start_method="spawn"
        )
        # Each job looks at the clock before it starts; the last one may take a little longer.
        patience = deadline + 20
        try:
            while not context.join(timeout=1):
                if time.monotonic() > patience:
                    why = f"hung: killed {args.limit:g} s + 20 s after the start"
                    break
        except (multiprocessing.ProcessRaisedException, multiprocessing.ProcessExitedException) as error:
            # Says which failed and why; what was measured before is kept.
            why = str(error).strip().splitlines()[-1]
            traceback.print_exc()
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()
        found = [json.loads(line) for line in lines.read_text().splitlines()]
    return completed(args, method, found, why)


def completed(args: Namespace, method: str, found: list[dict], why: str | None) -> dict:
    """Sorts what was found and names every job that is missing."""
    results = [row for row in found if "seconds" in row]
    missing = [row for row in found if "why" in row]
    done = {(row["model"], row["source"], row["target"]) for row in found}
    for model, pair in jobs(args):
        key = (model.name, f"TP{pair.source_tp}", f"TP{pair.target_tp}")
        if key not in done:
            reason = why or "no process said what became of it"
            missing.append(skipped(method, model.name, (pair.source_tp, pair.target_tp), reason))
    return {"results": results, "skipped": missing, "failed": why is not None}


def main(description: str, run):
    """The command line of one script."""
    args = parse(description)
    found = run(args, time.monotonic() + args.limit)
    report(args, found)
    sys.exit(1 if found.pop("failed") else 0)
