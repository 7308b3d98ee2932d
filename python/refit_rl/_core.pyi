"""The compiled part of refit_rl. Import from `refit_rl` and `refit_rl.layouts`: this module's own place may change.

Every call that waits gives other threads of Python their turn (the GIL is released), and ends by its timeout. Objects may be
used from several threads, one call at a time: a second one waits for the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from os import PathLike
from types import TracebackType
from typing import Any, Literal

from .types import (
    Config,
    EngineFacts,
    LayerFacts,
    Offer,
    PostAction,
    Report,
    Shard,
    Stats,
    TensorSpec,
    TrainerFacts,
)

#: The version of the package.
__version__: str

#: What this build can do: some of `nixl`, `etcd`, `cuda`.
FEATURES: tuple[str, ...]

class Layout:
    """What one rank holds: its parameters as boxes of the checkpoint's tensors ("bands"). Made by `refit_rl.layouts`.

    Immutable, and without any tensor: it can be pickled and sent to another process.
    """

    @property
    def side(self) -> Literal["source", "target"]: ...
    @property
    def rank(self) -> int:
        """The rank's number, unique on its side, counted from 0."""
    @property
    def nbytes(self) -> int:
        """Bytes of all parameters."""
    @property
    def names(self) -> list[str]:
        """The parameters' names, sorted: the tensors that a `Source` or a `Target` has to be given."""
    @property
    def post_actions(self) -> list[PostAction]:
        """What the engine has to derive anew behind every refresh, in this order."""
    def spec(self, name: str) -> tuple[str, int, int]:
        """A parameter's dtype (`BF16`, ..), rows and columns: shapes of more dimensions are seen as two.

        Raises `KeyError`.
        """
    def to_json(self) -> str:
        """The layout in the format of docs/bands.md, for this rank alone. Post actions are not part of it."""
    def __len__(self) -> int:
        """How many parameters there are."""
    def __eq__(self, other: object) -> bool: ...
    def __reduce__(self) -> tuple[object, ...]: ...

def megatron(
    config: Config,
    tensors: Mapping[str, TensorSpec],
    *,
    rank: int,
    tp_rank: int = 0,
    tp_size: int = 1,
    pp_rank: int = 0,
    pp_size: int = 1,
    ep_rank: int = 0,
    ep_size: int = 1,
    etp_rank: int = 0,
    etp_size: int = 1,
    chunks: Sequence[Sequence[int]] | None = None,
    vpp_size: int = 1,
    mtp: Sequence[int] = (),
    facts: TrainerFacts | None = None,
) -> Layout:
    """The layout of a Megatron-Core rank that holds these tensors.

    Args:
        config: Hugging Face's configuration of the model.
        tensors: what the rank holds, under Megatron-Core's own names (`decoder.layers.0...`). With several model chunks
            those of chunk `v` begin with `model{v}.`.
        rank: a number of this rank's own, counted from 0. Ranks that differ in data or context parallelism only hold the
            same and still have a number each.
        etp_rank: place in the expert-tensor-parallel group; it does not follow from `tp_rank`.
        chunks: for each local layer of each model chunk its number in the whole model, from 0 (`layer_number - 1`).
            Left out: layers are split evenly over `pp_size` stages of `vpp_size` chunks, as Megatron-Core does by default.
        mtp: numbers, from 0, of the layers of this rank that predict tokens further ahead.
        facts: settings that names and shapes do not show. Report them: what is left out counts as off.

    Raises:
        ConfigError: an unsupported model, or sizes that cannot be.
        RefusedError: what `facts` say.
        LayoutError: tensors that are not those of such a rank; `tensors` names the first.
    """

def vllm(
    config: Config,
    tensors: Mapping[str, TensorSpec],
    *,
    rank: int,
    tp_rank: int = 0,
    tp_size: int = 1,
    dp_rank: int = 0,
    dp_size: int = 1,
    pcp_rank: int = 0,
    pcp_size: int = 1,
    expert_parallel: Literal["linear", "round_robin"] | None = None,
    sequence_parallel_moe: bool = False,
    expert_names: Literal["auto", "flat", "routed"] = "auto",
    model: Literal["main", "draft"] = "main",
    facts: EngineFacts | None = None,
) -> Layout:
    """The layout of a vLLM rank that holds these tensors.

    Args:
        config: Hugging Face's configuration of the model.
        tensors: the parameters of the model this rank runs, under vLLM's own names (`model.layers.0...`).
        rank: a number of this rank's own in its replica, counted from 0.
        expert_parallel: with `enable_expert_parallel`, which experts a rank has. An expert's place follows from `dp`,
            `pcp` and `tp` together, as vLLM counts it.
        expert_names: `flat` for `experts.w13_weight` (before vLLM 0.25), `routed` for
            `experts.routed_experts.w13_weight`; `auto` looks at the tensors.
        model: `draft` for the draft model of speculative decoding with the model's own layers.
        facts: how the engine keeps what it has loaded. Report it: what is left out counts as off.

    Raises:
        ConfigError, RefusedError, LayoutError: as `megatron`. A model with pipeline stages (`pp > 1`) has no layout yet.
    """

def check_engine(facts: EngineFacts) -> None:
    """What `vllm` does with `facts`, for an engine whose layout comes from somewhere else.

    Raises:
        RefusedError: with what to change.
    """

def keeps(layer: LayerFacts, device: Literal["cuda", "rocm", "cpu", "xpu"]) -> bool:
    """Whether a layer's live tensors are known to be as they were loaded, so that they may be written. Of any other layer
    write tensors such as it is loaded into (`written`), and have the engine process these after every refit.
    """

def bands(
    document: str | PathLike[str] | Mapping[str, Any], *, rank: int | None = None
) -> Layout:
    """A layout of your own, in the format of docs/bands.md: a file, the text of one, or the parsed JSON.

    Args:
        rank: which rank of the document; may be left out where there is only one.

    Raises:
        LayoutError: not in that format, or bands that no rank can hold; `ConfigError`: no such rank.
    """

def shards(
    tensors: Mapping[str, Shard | tuple[Sequence[int], Any, Sequence[int], Sequence[int]]],
    *,
    rank: int,
    side: Literal["source", "target"] = "source",
) -> Layout:
    """A layout of a rank that holds a box of each tensor, as FSDP2 and DTensor do.

    Args:
        tensors: by name (the checkpoint's): `(global_shape, dtype, offsets, local_shape)`, or the same as a dict. A rank
            that holds nothing of a tensor leaves it out or gives a box without elements. Whole tensors have offsets of 0.

    Raises:
        LayoutError: a box that lies outside its tensor, or has another number of dimensions.
    """

def nixl_library() -> str:
    """Loads NIXL and gives back the file it was loaded from.

    It is looked for beside a NIXL that the process has loaded already, where the variable `REFIT_NIXL_LIBRARY` points, in the
    installed wheels `nixl-cu12` and `nixl-cu13`, and where the loader looks. A `Source` or a `Target` does so by itself.

    Raises:
        NixlUnavailableError: lists every place that was tried.
    """

class Source:
    """One rank of a trainer, whose parameters others read.

    Nothing is on offer before the first commit. The order of every step is: `begin_update` (nobody reads from there on),
    write the parameters, `commit` (they are whole, and of this version).

    Where the store took this process for dead, because it was stopped or cut off for longer than `ttl`, a thread of the source
    joins again and offers what was on offer, whatever the trainer does meanwhile; `stats` counts that (`rejoins`).

    ::

        with Source(rendezvous, layout, tensors, model="qwen3-4b", ranks=8) as source:
            for version in range(1, steps):
                with source.updating(version):
                    optimizer.step()          # whatever writes the parameters

    Args:
        rendezvous: where ranks meet: `dir:PATH` for processes of one host, `etcd:URL,..` for everything else, `mem:NAME`
            within this process. Its certificates and password come from the variables `REFIT_ETCD_*`.
        layout: what this rank holds. Its `rank` is the rank in the group.
        tensors: the parameters by the layout's names: torch tensors, numpy arrays, or what has `__dlpack__`; contiguous, on
            one device. They are kept alive, and registered for others to read, until the source is closed. Whoever replaces
            a parameter's memory (`param.data = ..`, `model.to(..)`) has to make a new source.
        model: the model's name at the rendezvous; ranks of others do not meet.
        ranks: how many ranks the group has. A version is on offer once all of them have committed it.
        group: the ranks that commit together: one data-parallel copy of a trainer.
        job: ranks of other jobs are refused.
        key_file: a file with the job's key, readable by this user only. Without one the variable `REFIT_JOB_KEY` counts if
            it is set. Without either, entries are taken from whoever can write to the rendezvous.
        transport: `nixl`; `peer` between GPUs that map each other; `auto`: what suits each pair of ranks, NIXL on the host,
            and `local` where the rendezvous is `mem:`; `local` stays in this process.
        insecure_tcp: an interface over which UCX may use TCP (`all`: every one). Whoever can connect there can read and
            write this process's memory.
        timeout: what joining may take: a former life of this rank has to time out first.
        ttl: after what silence this process counts as dead.
        lease: the longest that a silent reader holds up the next version.
        drain: how long closing waits for readers.

    Raises:
        TensorError: tensors that are not those of the layout, or cannot be read in place.
        TakenError, RendezvousError, TransportError, NixlUnavailableError, ConfigError.
    """

    def __init__(
        self,
        rendezvous: str,
        layout: Layout,
        tensors: Mapping[str, Any],
        *,
        model: str,
        ranks: int = 1,
        group: str = "trainer",
        job: str = "refit",
        key_file: str | PathLike[str] | None = None,
        transport: Literal["auto", "nixl", "peer", "local"] = "auto",
        insecure_tcp: str | None = None,
        timeout: float = 30.0,
        ttl: float = 10.0,
        lease: float = 30.0,
        drain: float = 10.0,
    ) -> None: ...
    @property
    def rank(self) -> int: ...
    @property
    def version(self) -> int | None:
        """The version on offer; `None` while there is none, during an update too."""
    def begin_update(self, timeout: float = 30.0) -> None:
        """Closes the version on offer and waits until nobody reads. Behind this the parameters may be written.

        Call it before the optimizer writes. It waits for those only that were reading when it began. Begun already, it does
        nothing.

        Raises:
            BusyError: readers were left when the time was over. Nothing may be written; the version is still on offer.
            TakenError: the store took this process for dead, and another has its place by now: end this one.
        """
    def commit(self, version: int) -> None:
        """Declares the parameters whole and of this version, and offers them.

        What was launched on their device is waited for first. A version names bytes for ever: the next one is larger, also
        after a restart from an older checkpoint.

        Raises:
            NotFencedError: no update was begun.
            VersionError: not above the last one; the update stays open, and `commit` can be called again.
        """
    def updating(
        self, version: int | None = None, timeout: float = 30.0
    ) -> AbstractContextManager[Source]:
        """`begin_update` on entry. On exit commits `version`; without one the body has to call `commit` itself.

        A body that raises leaves the version closed: nobody reads, and the next update begins at once.

        Raises:
            NotFencedError: on exit, when nothing was committed.
        """
    def publish(self, version: int, timeout: float = 30.0) -> None:
        """Offers what the parameters hold now: the first version, or what was written behind `begin_update`.

        Raises:
            NotFencedError: another version is on offer. Whatever was written since may have been read half done: call
                `begin_update` before writing.
        """
    def answer(self) -> None:
        """Answers targets that have asked, since the last commit, what bytes hash to (`checks="always"`)."""
    def stats(self) -> Stats: ...
    def close(self, timeout: float | None = None) -> int:
        """Withdraws what is on offer, waits for readers (`drain` seconds by default), and lets the tensors go.

        Gives back how many readers were left: if there are some, the tensors are kept for as long as the process lives.
        Closed already, it does nothing.
        """
    def __enter__(self) -> Source: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

class Target:
    """One rank of an engine, whose parameters are written.

    `staged` reads into a second set of parameters while the engine serves, and copies once all ranks of the replica have the
    version: all of them install it or none does, and every rank has to call `refresh`. `direct` reads into the live
    parameters while the engine stands still, without a second set; a pull that fails leaves them a mix until the next one
    succeeds. Ranks of a `direct` replica do not wait for each other: compare the reports' versions before going on.

    Callbacks run on the thread that calls `refresh`, in this order: `pause`, then parameters are written, then
    `post_actions` with what the layout calls for, then `resume`. Only behind that the target counts as refreshed.

    Where a source falls silent in the middle of being read, a `staged` target leaves it after `attempt` seconds and reads
    another with a fresh agent and a fresh second set, within the same `refresh`. Silent peers may keep four times the rank's
    parameters like that. A `direct` target has no other memory to read into, and waits for them.

    Args:
        rendezvous, job, key_file, transport, insecure_tcp, timeout, ttl: as for `Source`.
        layout: what this rank holds. Its `rank` is the rank in the replica.
        tensors: the live parameters by the layout's names, kept alive and written in place.
        model: the model's name at the rendezvous.
        ranks: how many ranks the replica has.
        replica: the ranks that answer together.
        mode: see above.
        pause: stops the engine at the end of a step. From its return on nobody reads the parameters.
        post_actions: carries out all of these, in their order, before it returns. Has to be given where
            `layout.post_actions` is not empty.
        resume: the engine may go on, with this version.
        checks: whether what has landed is compared with what its source says of it.
        lease: the longest lease that is taken, and so the longest that one attempt goes on.
        attempt: how long one attempt to read goes on before another group is tried. Left out: half of the time that `refresh`
            is given, so that one that comes to nothing leaves time for another.
        fanout: most ranks that read a group at a time.
        relay: whether others may read what this target has read, until it reads the next: as a group of the replica's name.
            Of a `direct` target that are the live parameters, which nobody else may write then.
        drain: of a relay, how long closing waits for those who read from it.

    Raises:
        As `Source`; ConfigError where `post_actions` is missing.
    """

    def __init__(
        self,
        rendezvous: str,
        layout: Layout,
        tensors: Mapping[str, Any],
        *,
        model: str,
        ranks: int = 1,
        replica: str = "engine",
        mode: Literal["staged", "direct"] = "staged",
        pause: Callable[[], object] | None = None,
        post_actions: Callable[[list[PostAction]], object] | None = None,
        resume: Callable[[int], object] | None = None,
        checks: Literal["never", "if_answered", "always"] = "never",
        job: str = "refit",
        key_file: str | PathLike[str] | None = None,
        transport: Literal["auto", "nixl", "peer", "local"] = "auto",
        insecure_tcp: str | None = None,
        timeout: float = 30.0,
        ttl: float = 10.0,
        lease: float = 30.0,
        attempt: float | None = None,
        fanout: int = 16,
        relay: bool = False,
        drain: float = 10.0,
    ) -> None: ...
    @property
    def rank(self) -> int: ...
    @property
    def version(self) -> int | None:
        """The version that is live and whole on this rank; `None` before the first refresh, while they are a mix, and where a
        refresh joined again and did not catch up."""
    def refresh(self, version: int | None = None, timeout: float = 30.0) -> Report:
        """Makes a version live, and says how.

        Where the store took this process for dead, because it was stopped or cut off for longer than `ttl`, it joins again first,
        with its memory, its agent and what it has read; the report counts that (`rejoins`).

        Args:
            version: this one or a newer one. Left out: one newer than what is live. Where a rank that needs no other has it
                already, nothing is read: after an engine has lost its weights (sleep), make a new target.
            timeout: for all of it; waiting for the version to be on offer and for the other ranks included.

        Raises:
            NotReadyError: no such version was on offer in time. The text says what is, and why others are not.
            TimeoutError: it was not read in time, or other ranks (`ranks`) were not.
            TransportError: reads cannot be watched any more, or silent peers keep as much memory as they may: the text says
                which of them to end.
            TakenError: another process has this rank's place: end this one.
            PlanError: the sides cannot be joined.
            EngineError: a callback raised.
            InvalidTargetError: the parameters are a mix.
        """
    def wait_for(self, version: int | None = None, timeout: float = 30.0) -> Offer | None:
        """Waits until such a version is on offer, and reads nothing. `None` when the time is over."""
    def serving(self) -> int | None:
        """The version that this rank may answer for now: all ranks of the replica have it, and its session lives. In `direct`
        mode `version`."""
    def stats(self) -> Stats: ...
    def close(self) -> None:
        """Leaves the replica and lets the tensors go; where reads are still out, once these have ended. A relay withdraws what it
        offers, and waits up to `drain` seconds for its readers."""
    def __enter__(self) -> Target: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...
