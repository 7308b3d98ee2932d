"""Real Megatron-Core trainers, real NIXL, a real vLLM engine: what an engine says behind every refit is what Hugging Face's
transformers says on the same weights. `cargo xtask e2e` sets everything up and runs this.

Each case starts the ranks of a trainer and an engine as processes of their own. Three times the trainer learns a new batch by
heart and publishes; the engine is then asked to go on with the beginnings of these sequences. A case passes if for every version

- the engine's greedy tokens are those of transformers on a checkpoint put together from what the trainer's ranks held
  (`reference.py`, which shares nothing with refit),
- they are not those that the engine gave with the version before,
- and transformers' loss on that checkpoint is the loss that the trainer computed with its own modules.

Where Megatron-Bridge built the model, that checkpoint has to be what it exports, too, and the ranks have to hold what it loaded.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import models

HERE = Path(__file__).parent
VERSIONS = (1, 2, 3)
#: How much of a sequence is given, and how many tokens are asked for.
BEGINNINGS, TOKENS = (3, 8), 12
#: Two ways to compute one loss, in bf16.
LOSS_TOLERANCE = 0.02
#: Starting an engine takes a minute or two on two cores; nothing may take for ever.
PATIENCE = 600.0
#: What is said of a trainer's sizes.
SIZES = ("tp", "pp", "vpp", "ep", "etp", "dp")
#: Where the stand-in for Transformer Engine lies: Megatron-Core uses it where it can be imported.
TE = HERE / "te"


@dataclass(frozen=True)
class Case:
    model: str
    #: The trainer's sizes, and how many copies of the model it has.
    tp: int = 1
    pp: int = 1
    #: Virtual stages of each pipeline stage.
    vpp: int = 1
    ep: int = 1
    #: Tensor parallelism of experts; without it that of everything else.
    etp: int | None = None
    dp: int = 1
    overlap: bool = False
    #: Layers of Transformer Engine, as `te` stands in for it, in place of Megatron-Core's own.
    te: bool = False
    #: Megatron-Bridge builds the model, out of these layers, and loads the checkpoint that the engine starts from.
    bridge: bool = False
    #: The engine's tensor parallelism.
    engine: int = 1

    @property
    def name(self) -> str:
        sizes = "".join(f"{what}{size}" for what in SIZES if (size := getattr(self, what) or 1) > 1)
        how = "bridge-" if self.bridge else "te-" if self.te else ""
        return f"{self.model}-{how}{sizes or 'tp1'}-to-tp{self.engine}"

    @property
    def ranks(self) -> int:
        """Ranks that hold one copy of the model: layers and experts are cut among the same ones, each in their own way."""
        return self.pp * max(self.tp, self.ep * (self.etp or self.tp))

    @property
    def world(self) -> int:
        return self.ranks * self.dp


CASES = (
    Case("qwen3", tp=2, engine=1),
    Case("qwen3", pp=2, engine=2),
    # Two copies of the model, and parameters that are completed in the next forward pass.
    Case("qwen3", dp=2, overlap=True, engine=1),
    Case("qwen2.5", tp=2, engine=2),
    Case("qwen2.5", pp=2, engine=1),
    Case("qwen3-moe", ep=2, engine=2),
    Case("qwen3-moe", pp=2, engine=1),
    # Two chunks of the model on a rank, with one layer each.
    Case("qwen3", pp=2, vpp=2, engine=2),
    # Experts are cut like everything else, or whole on one rank each.
    Case("qwen3-moe", tp=2, etp=2, te=True, engine=1),
    Case("qwen3-moe", tp=2, ep=2, etp=1, bridge=True, engine=2),
    Case("qwen3", tp=2, bridge=True, engine=2),
    Case("qwen2.5", pp=2, vpp=2, bridge=True, engine=1),
)
#: For machines with fewer GPUs than those cases have ranks.
SINGLE = tuple(Case(model) for model in ("qwen3", "qwen2.5", "qwen3-moe"))


class Broken(Exception):
    """A process ended, or did not answer."""


class Talk:
    """A process, or several, that take orders: an object of JSON a line, by pipes of their own."""

    def __init__(self, name: str, commands: list[list[str]], envs: list[dict[str, str]], log: Path) -> None:
        self.name = name
        self.log = log
        orders, self.orders_in = os.pipe()
        answers_out, answers = os.pipe()
        self.answers: IO[bytes] = os.fdopen(answers_out, "rb", buffering=0)
        self.processes = []
        self.rest = b""
        with log.open("ab") as said:
            for number, (command, env) in enumerate(zip(commands, envs, strict=True)):
                first = number == 0
                self.processes.append(
                    subprocess.Popen(
                        [*command, *([f"--in-fd={orders}", f"--out-fd={answers}"] if first else [])],
                        env=env,
                        pass_fds=(orders, answers) if first else (),
                        stdin=subprocess.DEVNULL,
                        stdout=said,
                        stderr=subprocess.STDOUT,
                    )
                )
        os.close(orders)
        os.close(answers)

    def answer(self) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE
        while b"\n" not in self.rest:
            if time.monotonic() > deadline:
                raise Broken(f"{self.name} did not answer within {PATIENCE:.0f} s: {self.tail()}")
            dead = [process.poll() for process in self.processes if process.poll()]
            if dead:
                raise Broken(f"{self.name} ended ({dead[0]}): {self.tail()}")
            if select.select([self.answers], [], [], 1.0)[0]:
                part = self.answers.read(65536)
                if not part:
                    raise Broken(f"{self.name} hung up: {self.tail()}")
                self.rest += part
        line, _, self.rest = self.rest.partition(b"\n")
        said = json.loads(line)
        if "error" in said:
            raise Broken(f"{self.name}: {said['error']}")
        return said

    def ask(self, **order: Any) -> dict[str, Any]:
        os.write(self.orders_in, (json.dumps(order) + "\n").encode())
        return self.answer()

    def tail(self) -> str:
        return f"{self.log} ends with\n" + "\n".join(self.log.read_text(errors="replace").splitlines()[-25:])

    def close(self, patience: float) -> None:
        """Ends what has not ended. An engine ends its workers when it is told to end."""
        with contextlib.suppress(OSError):
            os.write(self.orders_in, b'{"do": "stop"}\n')
        os.close(self.orders_in)
        for process in self.processes:
            for end in (lambda: None, process.terminate, process.kill):
                end()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(patience)
                    break
        self.answers.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(*folders: Path, **more: str) -> dict[str, str]:
    """Two cores are shared by all processes. What is in `folders` can be imported."""
    given = {
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    # vLLM's workers import what stands beside the engine's script.
    paths = [str(HERE), *map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, **given, "PYTHONPATH": os.pathsep.join(paths), **more}


@contextlib.contextmanager
def training(case: Case, folder: Path) -> Iterator[Talk]:
    """The ranks of a trainer."""
    (folder / "meet").mkdir()
    write_config(case, folder)
    world = case.world
    port = str(free_port())
    sizes = [f"--{what}={size}" for what in SIZES if what != "dp" and (size := getattr(case, what))]
    command = [sys.executable, str(HERE / "trainer.py"), *common(case, folder), *sizes, f"--dump={folder / 'held'}"]
    command += [f"--{flag}" for flag in ("overlap", "te", "bridge") if getattr(case, flag)]
    folders = [TE] if (case.te or case.bridge) and importlib.util.find_spec("transformer_engine") is None else []
    envs = [
        environment(*folders, RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        for rank in range(world)
    ]
    trainer = Talk("trainer", [command] * world, envs, folder / "trainer.log")
    try:
        yield trainer
    finally:
        trainer.close(30.0)


@contextlib.contextmanager
def serving(case: Case, folder: Path) -> Iterator[Talk]:
    """The engine, which starts its own workers."""
    sizes = [f"--tp={case.engine}", "--prompts-max=8", "--max-model-len=128"]
    command = [sys.executable, str(HERE / "worker_engine.py"), *common(case, folder), *sizes]
    engine = Talk("engine", [command], [environment()], folder / "engine.log")
    try:
        yield engine
    finally:
        engine.close(60.0)


def common(case: Case, folder: Path) -> list[str]:
    return ["--model", str(folder / "initial"), "--rendezvous", f"dir:{folder / 'meet'}", "--name", case.name]


def write_config(case: Case, folder: Path) -> Path:
    """`config.json` as the model states it: what transformers would write of it is more than either side needs."""
    config = folder / "initial" / "config.json"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(json.dumps(models.MODELS[case.model]))
    return config


def initial(case: Case, folder: Path) -> None:
    """A checkpoint of random weights: what the engine starts from."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = write_config(case, folder)
    torch.manual_seed(99)
    made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config.parent), dtype=torch.bfloat16)
    made.save_pretrained(config.parent)
    write_config(case, folder)


def one_version(case: Case, folder: Path, trainer: Talk, engine: Talk, version: int) -> dict[str, Any]:
    import reference

    trained = trainer.ask(do="step", version=version)
    config = models.MODELS[case.model]
    weights = reference.state(reference.load(folder / "held" / str(version)), config)
    reference.save(folder / "hf" / str(version), weights, config)
    hugging = reference.model(folder / "hf" / str(version))
    loss = reference.loss(hugging, trained["tokens"])
    prompts = [tokens[:count] for tokens in trained["tokens"] for count in BEGINNINGS]
    wanted, margins = zip(*(reference.greedy(hugging, prompt, TOKENS) for prompt in prompts), strict=True)
    before = engine.ask(do="generate", prompts=prompts, max_tokens=TOKENS)["tokens"]
    began = time.monotonic()
    refreshed = engine.ask(do="refresh", version=version)
    took = time.monotonic() - began
    after = engine.ask(do="generate", prompts=prompts, max_tokens=TOKENS)["tokens"]
    reports = refreshed.get("reports") or []
    checks = {
        "version": refreshed["version"] == version,
        "tokens_equal_transformers": after == list(wanted),
        "tokens_differ_from_before": all(one != other for one, other in zip(before, after, strict=True)),
        "loss_equals_trainer": abs(loss - trained["loss_after"]) < LOSS_TOLERANCE,
    }
    if case.bridge:
        checks["reference_equals_bridge"] = reference.same(weights, exported(folder, version))
    return {
        "version": version,
        "passed": all(checks.values()),
        "checks": checks,
        "tokens": sum(map(len, after)),
        "tokens_equal": sum(a == b for one, other in zip(after, wanted, strict=True) for a, b in zip(one, other)),
        "smallest_margin": min(min(row) for row in margins),
        "loss_trainer": trained["loss_after"],
        "loss_transformers": loss,
        "refresh_seconds": round(took, 4),
        "bytes": sum(report["bytes"] for report in reports),
        "wire_bytes": sum(report["wire_bytes"] for report in reports),
        "reads": sum(report["reads"] for report in reports),
        "engine_ranks": len(reports),
    }


def exported(folder: Path, version: int) -> Path:
    """What Megatron-Bridge made of a version; 0 is what it loaded."""
    return folder / "held" / str(version) / "bridge.safetensors"


def loaded(case: Case, folder: Path) -> dict[str, bool]:
    """Whether the ranks held the checkpoint once Megatron-Bridge had loaded it."""
    import reference
    from safetensors.torch import load_file

    checkpoint = load_file(folder / "initial" / "model.safetensors")
    held = reference.state(reference.load(folder / "held" / "0"), models.MODELS[case.model])
    return {
        "reference_equals_checkpoint": reference.same(held, folder / "initial" / "model.safetensors"),
        "bridge_equals_checkpoint": reference.same(checkpoint, exported(folder, 0)),
    }


def run(case: Case, folder: Path) -> dict[str, Any]:
    began = time.monotonic()
    result: dict[str, Any] = {
        "case": case.name,
        "model": models.MODELS[case.model]["architectures"][0],
        "trainer": {what: getattr(case, what) for what in (*SIZES, "overlap", "te", "bridge")},
        "engine": {"tp": case.engine},
        "versions": [],
    }
    try:
        initial(case, folder)
        # Both start at the same time.
        with training(case, folder) as trainer, serving(case, folder) as engine:
            ready = trainer.answer()
            if ready["copies"] != case.dp:
                raise Broken(f"the trainer publishes {ready['copies']} copies of the model, not {case.dp}")
            if case.bridge:
                result["loaded"] = loaded(case, folder)
            engine.answer()
            for version in VERSIONS:
                row = one_version(case, folder, trainer, engine, version)
                result["versions"].append(row)
                print(line(case, row), flush=True)
    except Broken as error:
        result["error"] = str(error)
        print(f"| {case.name} | {error}", flush=True)
    rows = result["versions"]
    done = len(rows) == len(VERSIONS) and all(row["passed"] for row in rows) and all(result.get("loaded", {}).values())
    result["passed"] = "error" not in result and done
    result["seconds"] = round(time.monotonic() - began, 1)
    return result


HEAD = """\
| case | version | tokens equal | changed | smallest margin | loss: Megatron-Core, transformers | bytes read | reads | refresh |
|---|---|---|---|---|---|---|---|---|"""


def line(case: Case, row: dict[str, Any]) -> str:
    changed = "yes" if row["checks"]["tokens_differ_from_before"] else "NO"
    mark = "" if row["passed"] else " FAILED"
    return (
        f"| {case.name}{mark} | {row['version']} | {row['tokens_equal']}/{row['tokens']} | {changed} "
        f"| {row['smallest_margin']:.2f} | {row['loss_trainer']:.4f}, {row['loss_transformers']:.4f} "
        f"| {row['wire_bytes']} | {row['reads']} | {row['refresh_seconds'] * 1000:.0f} ms |"
    )


def possible() -> tuple[str, list[Case]]:
    """What this machine computes on, and the cases that it can run: NCCL wants a GPU for each rank. A trainer and its engine share them."""
    import torch

    gpus = torch.cuda.device_count()
    if gpus == 0:
        return "CPU", list(CASES)
    cases = [case for case in (*SINGLE, *CASES) if max(case.world, case.engine) <= gpus]
    return f"{gpus} x {torch.cuda.get_device_name()}", cases


def packages() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    import refit_rl

    found = {"refit-rl": refit_rl.__version__}
    for name in ("megatron-core", "megatron-bridge", "vllm", "vllm-cpu", "torch", "transformers", "nixl-cu12", "nixl-cu13"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", help="part of a case's name; may be repeated (default: all)")
    parser.add_argument("--json", type=Path, help="where to write results")
    parser.add_argument("--keep", type=Path, help="keep logs and checkpoints in this folder")
    options = parser.parse_args()
    machine, there = possible()
    cases = [case for case in there if not options.case or any(part in case.name for part in options.case)]
    if not cases:
        parser.error(f"no such case on {machine}; there are {', '.join(case.name for case in there)}")
    print(f"{machine}: {len(cases)} cases\n")
    print(HEAD, flush=True)
    results = []
    with contextlib.ExitStack() as ends:
        if options.keep:
            base = options.keep
            base.mkdir(parents=True, exist_ok=True)
        else:
            base = Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="refit-e2e-")))
        for case in cases:
            folder = base / case.name
            shutil.rmtree(folder, ignore_errors=True)
            results.append(run(case, folder))
    passed = sum(result["passed"] for result in results)
    if options.json:
        document = {"schema": 1, "machine": machine, "packages": packages(), "cases": results}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    print(f"\n{passed} passed, {len(results) - passed} failed")
    return 0 if passed == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
