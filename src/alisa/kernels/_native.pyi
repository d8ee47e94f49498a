"""What native/module.cpp offers; every address comes from `Tensor.data_ptr()`."""

class Threads:
    def __init__(self, entry: int, count: int, team_size: int, team_rank: int) -> None: ...

class RowLayout:
    def __init__(self, dtype: int, num_kv_heads: int, head_dim: int, parts: int) -> None: ...
    @property
    def row_bytes(self) -> int: ...

class SketchTask:
    def __init__(
        self,
        *,
        bits: int,
        num_kv_heads: int,
        head_dim: int,
        q: int,
        q_dtype: int,
        codes: int,
        ranges: int,
        starts: int,
        lengths: int,
        num_seqs: int,
        num_heads: int,
        num_sets: int,
        width: int,
        parts: int,
        softcap: float,
        value_bits: int = 0,
        value_codes: int = 0,
        value_ranges: int = 0,
        rest: int = 0,
    ) -> None: ...

PIECE_COLUMNS: int

class DecodeTask:
    def __init__(
        self,
        *,
        layout: RowLayout,
        q: int,
        q_dtype: int,
        rows: int,
        row_stride: int,
        slots: int,
        entries: int,
        counts: int,
        num_seqs: int,
        num_heads: int,
        num_sets: int,
        num_slots: int,
        out: int,
        mass: int,
        log_sum_exp: int,
        softcap: float,
    ) -> None: ...

class Pieces:
    def __init__(self) -> None: ...

class Workspace:
    def decode(self, *, isa: str, threads: Threads, task: DecodeTask) -> None: ...
    def decode_piece(
        self, *, isa: str, threads: Threads, task: DecodeTask, pieces: Pieces, begins: int, ends: int
    ) -> None: ...
    def decode_end(self, *, isa: str, threads: Threads, task: DecodeTask, pieces: Pieces) -> None: ...
    def encode(
        self,
        *,
        isa: str,
        threads: Threads,
        layout: RowLayout,
        k: int,
        v: int,
        dtype: int,
        k_stride: int,
        v_stride: int,
        rows: int,
        row_stride: int,
        slots: int,
        num_tokens: int,
    ) -> None: ...
    def sketch_append(
        self,
        *,
        isa: str,
        threads: Threads,
        bits: int,
        num_kv_heads: int,
        head_dim: int,
        keys: int,
        dtype: int,
        stride: int,
        codes: int,
        ranges: int,
        ids: int,
        num_tokens: int,
    ) -> None: ...
    def sketch_scores(self, *, isa: str, threads: Threads, task: SketchTask, out: int) -> None: ...
    def sketch_select(
        self,
        *,
        isa: str,
        threads: Threads,
        task: SketchTask,
        older_ends: int,
        older_counts: int,
        counts: int,
        num_slots: int,
        coverages: int,
        positions: int,
        chosen_counts: int,
        shares: int,
    ) -> None: ...
    def mean_add(
        self,
        *,
        isa: str,
        sums: int,
        num_kv_heads: int,
        head_dim: int,
        values: int,
        dtype: int,
        stride: int,
        req_index: int,
        num_tokens: int,
    ) -> None: ...
    def mean_blend(
        self,
        *,
        isa: str,
        threads: Threads,
        sums: int,
        num_kv_heads: int,
        head_dim: int,
        num_heads: int,
        read: int,
        out: int,
        dtype: int,
        shares: int,
        req_index: int,
        lengths: int,
        num_seqs: int,
    ) -> None: ...
    def rest_blend(
        self,
        *,
        isa: str,
        threads: Threads,
        head_dim: int,
        num_heads: int,
        read: int,
        out: int,
        dtype: int,
        shares: int,
        rest: int,
        num_seqs: int,
    ) -> None: ...
    def prefill(
        self,
        *,
        isa: str,
        threads: Threads,
        q: tuple[int, int, int],
        k: tuple[int, int, int],
        v: tuple[int, int, int],
        num_queries: int,
        num_keys: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        ahead: int,
        hidden: int | None,
        softcap: float,
        before: int,
        after: int,
        out: int,
        log_sum_exp: int,
        chosen: int,
        chosen_stride: int,
    ) -> None: ...
    def prefill_means(
        self,
        *,
        isa: str,
        threads: Threads,
        k: tuple[int, int, int],
        num_blocks: int,
        num_kv_heads: int,
        head_dim: int,
        means: int,
    ) -> None: ...
    def prefill_choose(
        self,
        *,
        isa: str,
        threads: Threads,
        q: tuple[int, int, int],
        means: tuple[int, int, int],
        num_queries: int,
        first_block: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        softcap: float,
        alpha: float,
        chosen: int,
        chosen_stride: int,
    ) -> None: ...
    def prefill_mass(
        self,
        *,
        isa: str,
        threads: Threads,
        q: tuple[int, int, int],
        k: tuple[int, int, int],
        num_queries: int,
        num_keys: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        num_sets: int,
        ahead: int,
        softcap: float,
        log_sum_exp: int,
        mass: int,
    ) -> None: ...

class Norm:
    def __init__(self, weight: int, bias: int, count: int, eps: float) -> None: ...

class Matrix:
    def __init__(
        self,
        *,
        format: int,
        codes: int,
        scales: int,
        ranges: int,
        bias: int,
        num_in: int,
        num_out: int,
        parts: int,
    ) -> None: ...
    @property
    def num_in(self) -> int: ...
    @property
    def num_out(self) -> int: ...

class ProductWorkspace:
    def multiply(
        self,
        *,
        isa: str,
        threads: Threads,
        matrix: Matrix,
        x: int,
        dtype: int,
        x_stride: int,
        num_tokens: int,
        out_dtype: int,
        out: int,
    ) -> None: ...

class LayerWeights:
    def __init__(
        self,
        *,
        attn_norm: Norm,
        attn_post_norm: Norm,
        mlp_norm: Norm,
        mlp_post_norm: Norm,
        q_norm: Norm,
        k_norm: Norm,
        q: Matrix,
        kv: Matrix,
        out: Matrix,
        up: Matrix | None,
        down: Matrix | None,
        rotation: int,
    ) -> None: ...

class StackShape:
    def __init__(
        self,
        *,
        dtype: int,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        ffn_size: int,
        activation: int,
        norms_after_sum: bool,
        parallel_residual: bool,
        residual_scale: float,
        query_factor: float,
        final_norm: Norm,
    ) -> None: ...

class RotationTable:
    def __init__(self, cos: int, sin: int, width: int) -> None: ...

class StackStep:
    def __init__(
        self, *, num_tokens: int, x: int, normed: int, q: int, kv: int, rotations: list[RotationTable]
    ) -> None: ...

class LayerAttention: ...

class Stack:
    def __init__(self, isa: str, shape: StackShape, layers: list[LayerWeights]) -> None: ...
    def run(self, threads: Threads, step: StackStep, after: int, attended: int, mlp_out: int) -> None: ...
    def run_all(self, threads: Threads, step: StackStep, attention: LayerAttention) -> None: ...
    def project_kv(
        self,
        *,
        threads: Threads,
        layer: int,
        hidden: int,
        rotation: RotationTable | None,
        num_tokens: int,
        kv: int,
    ) -> None: ...

def activate(
    *, isa: str, threads: Threads, kind: int, dtype: int, x: int, out: int, width: int, gated: bool, num_tokens: int
) -> None: ...
def turn(
    *,
    isa: str,
    threads: Threads,
    heads: int,
    out: int,
    dtype: int,
    stride: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    matrices: int,
    shifts: int,
    num_tokens: int,
) -> None: ...
def select(
    *,
    threads: Threads,
    scores: int,
    wide: bool,
    stride: int,
    starts: int,
    older_ends: int,
    older_counts: int,
    counts: int,
    num_seqs: int,
    num_slots: int,
    positions: int,
) -> None: ...
def observe(
    *,
    sums: int,
    buckets: int,
    sum_starts: int,
    bucket_starts: int,
    positions: int,
    counts: int,
    mass: int,
    num_seqs: int,
    num_slots: int,
) -> None: ...
def move_rows(
    *, write: bool, file: int, offsets: int, memory: int, stride: int, rows: int, count: int, row_bytes: int
) -> int: ...
def model_isa_names() -> list[str]: ...
def prefill_isa_names() -> list[str]: ...
def isa_names() -> list[str]: ...

class SketchLayer:
    def __init__(self, rows: int, key_codes: int, key_ranges: int, value_codes: int, value_ranges: int) -> None: ...

class SketchStep:
    def __init__(
        self,
        *,
        isa: str,
        sketch: SketchTask,
        attend: DecodeTask,
        older_ends: int,
        older_counts: int,
        row_counts: int,
        positions: int,
        slots: int,
        new_slots: int,
        new_ids: int,
        table: int,
        table_stride: int,
        table_rows: int,
        shares: int,
        out: int,
    ) -> None: ...

class SketchStepper:
    def __init__(self) -> None: ...
    def run(
        self,
        threads: Threads,
        step: SketchStep,
        layer: SketchLayer,
        q: int,
        k: int,
        v: int,
        k_stride: int,
        v_stride: int,
    ) -> float: ...

class FixedAttention(LayerAttention):
    def __init__(
        self,
        *,
        workspace: Workspace,
        isa: str,
        attend: DecodeTask,
        k: int,
        v: int,
        k_stride: int,
        v_stride: int,
        slots: int,
        num_tokens: int,
        layers: list[int],
    ) -> None: ...
    @property
    def seconds(self) -> float: ...

class SketchAttention(LayerAttention):
    def __init__(
        self,
        *,
        stepper: SketchStepper,
        steps: list[SketchStep],
        places: list[SketchLayer],
        q: int,
        k: int,
        v: int,
        k_stride: int,
        v_stride: int,
    ) -> None: ...
    @property
    def seconds(self) -> float: ...
    @property
    def chose(self) -> float: ...
