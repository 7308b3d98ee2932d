"""What moves: Megatron's shards, vLLM's fused parameters, and the strided copies between them.

Torch is used for values only, so the layouts can be read without it. Offsets, strides and sizes count elements.
"""

from dataclasses import dataclass

# vLLM pads vocabularies to a multiple of this; Megatron to a multiple of its own times TP.
VLLM_VOCAB = 64
MEGATRON_VOCAB = 128


@dataclass(frozen=True)
class Model:
    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool


MODELS = {
    model.name: model
    for model in (
        Model("qwen3-4b", 36, 2560, 9728, 32, 8, 128, 151936, True),
        Model("qwen3-8b", 36, 4096, 12288, 32, 8, 128, 151936, False),
        # Not a real one: all shapes of those in a few kilobytes, and a vocabulary that both sides pad differently.
        Model("tiny", 2, 16, 24, 8, 4, 8, 448, False),
    )
}


@dataclass(frozen=True)
class Piece:
    """A strided copy out of one tensor into another, both given by the offset of the first element."""

    source_offset: int
    source_strides: tuple[int, int, int]
    target_offset: int
    target_strides: tuple[int, int, int]
    shape: tuple[int, int, int]

    @property
    def elements(self) -> int:
        return self.shape[0] * self.shape[1] * self.shape[2]


@dataclass(frozen=True)
class Parameter:
    """One parameter of both sides; `rows` and `cols` are those of one unsharded component."""

    index: int
    name: str
    role: str  # vocab, qkv, gated, row or same
    rows: int
    cols: int
    model: Model

    # Rows of one query group: its query heads, and one head each of keys and values.
    @property
    def group(self) -> tuple[int, int]:
        return self.model.heads // self.model.kv_heads * self.model.head_dim, self.model.head_dim

    def source_shape(self, tp: int) -> tuple[int, int]:
        """Of one trainer rank's tensor."""
        match self.role:
            case "vocab":
                return padded(self.rows, MEGATRON_VOCAB * tp) // tp, self.cols
            case "qkv":
                queries, keys = self.group
                return self.model.kv_heads // tp * (queries + 2 * keys), self.cols
            case "gated":
                return 2 * self.rows // tp, self.cols
            case "row":
                return self.rows, self.cols // tp
        return self.rows, self.cols

    def target_shape(self, tp: int) -> tuple[int, int]:
        """Of one engine rank's parameter."""
        if self.role == "vocab":
            return padded(self.rows, VLLM_VOCAB * tp) // tp, self.cols
        return self.source_shape(tp)

    def pieces(self, source: int, source_tp: int, target: int, target_tp: int) -> list[Piece]:
        """What trainer rank `source` holds of what engine rank `target` needs."""
        cols = self.cols
        match self.role:
            case "same":
                if source != target % source_tp:
                    return []
                return [Piece(0, (0, cols, 1), 0, (0, cols, 1), (1, self.rows, cols))]
            case "vocab":
                ours, theirs = self.source_shape(source_tp)[0], self.target_shape(target_tp)[0]
                first, last = overlap(source * ours, ours, target * theirs, theirs)
                # Neither side's padding is moved.
                last = min(last, self.rows)
                return rows_of(cols, (first - source * ours, first - target * theirs), last - first)
            case "gated":
                ours, theirs = self.rows // source_tp, self.rows // target_tp
                first, last = overlap(source * ours, ours, target * theirs, theirs)
                gate = (first - source * ours, first - target * theirs)
                up = (gate[0] + ours, gate[1] + theirs)
                return rows_of(cols, gate, last - first) + rows_of(cols, up, last - first)
            case "row":
                ours, theirs = cols // source_tp, cols // target_tp
                first, last = overlap(source * ours, ours, target * theirs, theirs)
                if last <= first:
                    return []
                return [
                    Piece(
                        first - source * ours,
                        (0, ours, 1),
                        first - target * theirs,
                        (0, theirs, 1),
                        (1, self.rows, last - first),
                    )
                ]
        # Megatron keeps each query group together: its queries, its keys, its values. vLLM keeps all queries, then
        # all keys, then all values.
        queries, keys = self.group
        stride = queries + 2 * keys
        ours, theirs = self.model.kv_heads // source_tp, self.model.kv_heads // target_tp
        first, last = overlap(source * ours, ours, target * theirs, theirs)
        if last <= first:
            return []
        found = []
        for rows, source_row, target_row in (
            (queries, 0, 0),
            (keys, queries, theirs * queries),
            (keys, queries + keys, theirs * (queries + keys)),
        ):
            found.append(
                Piece(
                    ((first - source * ours) * stride + source_row) * cols,
                    (stride * cols, cols, 1),
                    (target_row + (first - target * theirs) * rows) * cols,
                    (rows * cols, cols, 1),
                    (last - first, rows, cols),
                )
            )
        return found

    # Values. Every component of a parameter (queries, keys, values, gate, up) has values of its own; both sides are
    # built from those, each in its own way, and neither from `pieces`.

    def source_values(self, rank: int, tp: int, salt: int, out):
        """Fills one trainer rank's tensor, as Megatron lays it out."""
        match self.role:
            case "vocab":
                rows = out.shape[0]
                real = max(0, min(self.rows - rank * rows, rows))
                self._fill(out[:real], 0, salt, rank * rows, 0)
                out[real:] = 0
            case "qkv":
                queries, keys = self.group
                groups = self.model.kv_heads // tp
                by_group = out.view(groups, queries + 2 * keys, self.cols)
                for group in range(groups):
                    which = rank * groups + group
                    self._fill(by_group[group, :queries], 0, salt, which * queries, 0)
                    self._fill(by_group[group, queries : queries + keys], 1, salt, which * keys, 0)
                    self._fill(by_group[group, queries + keys :], 2, salt, which * keys, 0)
            case "gated":
                rows = self.rows // tp
                self._fill(out[:rows], 0, salt, rank * rows, 0)
                self._fill(out[rows:], 1, salt, rank * rows, 0)
            case "row":
                self._fill(out, 0, salt, 0, rank * (self.cols // tp))
            case _:
                self._fill(out, 0, salt, 0, 0)

    def target_values(self, rank: int, tp: int, salt: int, poison: int, out):
        """Fills what one engine rank's parameter must be; padding that nobody writes stays `poison`."""
        match self.role:
            case "vocab":
                rows = out.shape[0]
                out[:] = poison
                real = max(0, min(self.rows - rank * rows, rows))
                self._fill(out[:real], 0, salt, rank * rows, 0)
            case "qkv":
                heads, kv_heads, dim = self.model.heads // tp, self.model.kv_heads // tp, self.model.head_dim
                queries, keys, values = out.split([heads * dim, kv_heads * dim, kv_heads * dim])
                self._fill(queries, 0, salt, rank * heads * dim, 0)
                self._fill(keys, 1, salt, rank * kv_heads * dim, 0)
                self._fill(values, 2, salt, rank * kv_heads * dim, 0)
            case "gated":
                gate, up = out.chunk(2)
                self._fill(gate, 0, salt, rank * gate.shape[0], 0)
                self._fill(up, 1, salt, rank * up.shape[0], 0)
            case "row":
                self._fill(out, 0, salt, 0, rank * out.shape[1])
            case _:
                self._fill(out, 0, salt, 0, 0)

    def _fill(self, out, component: int, salt: int, row: int, col: int):
        """Writes a box of a component: 16 bits that depend on the parameter, the component, the salt and the place."""
        import torch

        seed = ((self.index * 4 + component) * 1000003 + salt * 7368787) & 0x7FFFFFFF
        step = max(1, (1 << 26) // max(1, out.shape[1]))
        cols = torch.arange(col, col + out.shape[1], dtype=torch.int32, device=out.device)
        for start in range(0, out.shape[0], step):
            part = out[start : start + step]
            rows = torch.arange(part.shape[0], dtype=torch.int32, device=out.device) + (row + start)
            # Wraps around, as it should: a multiplicative hash of 32 bits, of which the upper half is kept.
            bits = (rows[:, None] * self.cols + cols[None, :] + seed) * -1640531535
            part.copy_(bits >> 16)


def padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def overlap(a: int, a_len: int, b: int, b_len: int) -> tuple[int, int]:
    return max(a, b), min(a + a_len, b + b_len)


def rows_of(cols: int, starts: tuple[int, int], rows: int) -> list[Piece]:
    """Whole rows, which are contiguous on both sides."""
    if rows <= 0:
        return []
    strides = (0, cols, 1)
    return [Piece(starts[0] * cols, strides, starts[1] * cols, strides, (1, rows, cols))]


def parameters(model: Model) -> list[Parameter]:
    """In the order of the model."""
    found: list[Parameter] = []

    def add(name: str, role: str, rows: int, cols: int):
        found.append(Parameter(len(found), name, role, rows, cols, model))

    add("embed_tokens", "vocab", model.vocab, model.hidden)
    for layer in range(model.layers):
        add(f"{layer}.input_layernorm", "same", 1, model.hidden)
        add(f"{layer}.qkv_proj", "qkv", 0, model.hidden)
        add(f"{layer}.q_norm", "same", 1, model.head_dim)
        add(f"{layer}.k_norm", "same", 1, model.head_dim)
        add(f"{layer}.o_proj", "row", model.hidden, model.heads * model.head_dim)
        add(f"{layer}.post_attention_layernorm", "same", 1, model.hidden)
        add(f"{layer}.gate_up_proj", "gated", model.intermediate, model.hidden)
        add(f"{layer}.down_proj", "row", model.hidden, model.intermediate)
    add("norm", "same", 1, model.hidden)
    if not model.tied:
        add("lm_head", "vocab", model.vocab, model.hidden)
    return found


@dataclass(frozen=True)
class Pair:
    """Trainer TP to engine TP, on so many GPUs."""

    source_tp: int
    target_tp: int
    gpus: int

    def source_gpu(self, rank: int) -> int:
        return rank

    def target_gpu(self, rank: int) -> int:
        """A GPU of its own where there are enough; with two, the other one than the trainer of that rank."""
        if self.gpus >= self.source_tp + self.target_tp:
            return self.source_tp + rank
        return (rank + max(1, self.gpus // 2)) % self.gpus

    def problem(self, model: Model) -> str | None:
        """Why this cannot be run, if it cannot."""
        if self.gpus < 2:
            return "two GPUs are needed"
        if max(self.source_tp, self.target_tp) > self.gpus:
            return f"more ranks than the {self.gpus} GPUs"
        for tp in (self.source_tp, self.target_tp):
            if model.kv_heads % tp or model.intermediate % tp or model.heads % tp:
                return f"{model.name} does not divide by TP{tp}"
        return None

    def source_rank(self, gpu: int) -> int | None:
        return gpu if gpu < self.source_tp else None

    def target_rank(self, gpu: int) -> int | None:
        return next((rank for rank in range(self.target_tp) if self.target_gpu(rank) == gpu), None)

    def target_gpus(self) -> list[int]:
        return [self.target_gpu(rank) for rank in range(self.target_tp)]


def needed(parameter: Parameter, pair: Pair, target: int) -> int:
    """Elements that an engine rank needs of a parameter."""
    return sum(
        piece.elements
        for source in range(pair.source_tp)
        for piece in parameter.pieces(source, pair.source_tp, target, pair.target_tp)
    )
