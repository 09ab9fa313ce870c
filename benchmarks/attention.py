"""Tree attention against what unshared sequences cost: time, useful TFLOP/s, memory, error, preparation.

    python benchmarks/attention.py                       # all suites, to benchmarks/results/
    python benchmarks/attention.py --suites cases errors --out /tmp/results

Suites: ``cases`` (rows of pairs, of four responses, deep trees), ``windows`` (windows and sinks), ``lengths`` (causal and
shared prefix by length), ``errors`` (against float64), ``preparation`` (block lists and path plans). Runs with what is
installed and says what it leaves out; on a CPU the same in small.

Times are the device's: calls are queued behind a kernel that only waits, so that what the host does before a launch does
not count (in training it runs ahead); the host's time for a call is a column of its own. Each figure is the median of
`--repeats` calls after warming up, with the distance between quartiles. TFLOP/s count the work of the shared row for
every method: 4 (head size) (query heads) operations for each visible pair, times 3.5 with the backward pass.
"unshared" computes each sequence by itself; "best dense" is the fastest of those.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from tables import draw, leave_out_warnings, library_versions, write
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

import preftree
from preftree.attention import BACKENDS, Layer, Scores, TreeAttention, choose_backend, fa4
from preftree.attention.blocks import key_lists, query_lists
from preftree.attention.copying import copy_to_paths
from preftree.attention.flash import _tables, block_sizes
from preftree.attention.flex import block_mask
from preftree.attention.mask import CAUSAL, Rule, sliding_window
from preftree.attention.paths import plan_paths
from preftree.report import versions

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


@dataclass
class Case:
    """Trees of token sequences, and the row that they make."""

    name: str
    trees: list[list[list[int]]]
    rule: Rule = CAUSAL
    sinks: bool = False
    row_length: int | None = None
    row: preftree.PackedRow = field(init=False)

    def __post_init__(self):
        trees = [preftree.TokenTree.from_sequences(tree, [1] * len(tree)) for tree in self.trees]
        self.row = preftree.pack(trees, self.row_length)[0].to(DEVICE)

    @property
    def lengths(self) -> list[int]:
        return [len(sequence) for tree in self.trees for sequence in tree]

    def pairs(self, lengths: list[int] | None = None) -> float:
        """Visible query-key pairs: of the shared row, or of sequences alone."""
        if lengths is None:
            positions = self.row.position_ids
            return float((positions - self.rule.lowest(positions) + 1).sum())
        positions = torch.cat([torch.arange(length) for length in lengths])
        return float((positions - self.rule.lowest(positions) + 1).sum())


def tokens(generator: torch.Generator, length: int, first: int) -> list[int]:
    """Random tokens behind one that tells this stretch from others."""
    return [1000 + first, *torch.randint(0, 1000, (length - 1,), generator=generator).tolist()]


def pairs_of(count: int, prompt: int, *responses: int, **options) -> Case:
    """``count`` prompts with their responses; named after their lengths."""
    generator = torch.Generator().manual_seed(0)
    trees = []
    for index in range(count):
        shared = tokens(generator, prompt, index)
        trees.append([shared + tokens(generator, length, i) for i, length in enumerate(responses)])
    name = f"{count}x({prompt},{','.join(map(str, responses))})"
    return Case(options.pop("name", name), trees, **options)


def system_prompt(system: int, prompts: int, prompt: int, responses: int, response: int) -> Case:
    """One tree: a system prompt, prompts below it, responses below each."""
    generator = torch.Generator().manual_seed(0)
    above = tokens(generator, system, 0)
    tree = []
    for p in range(prompts):
        shared = above + tokens(generator, prompt, p)
        tree += [shared + tokens(generator, response, r) for r in range(responses)]
    return Case(f"system {system}, {prompts} prompts {prompt}, {responses} responses {response}", [tree])


def dialogue(turns: int, question: int, answer: int) -> Case:
    """One tree: a dialogue with two answers at each turn, the first of which it goes on with."""
    generator = torch.Generator().manual_seed(0)
    history: list[int] = []
    tree = []
    for _ in range(turns):
        history = history + tokens(generator, question, 0)
        answers = [history + tokens(generator, answer, 1 + i) for i in range(2)]
        tree += answers
        history = answers[0]
    return Case(f"{turns} turns {question} + 2 answers {answer}", [tree])


def cases(small: int) -> Iterator[Case]:
    """The table of cases; ``small`` divides lengths."""
    yield pairs_of(1, 12288 // small, 2048 // small, 2048 // small)
    yield pairs_of(4, 1536 // small, 512 // small, 512 // small)
    yield pairs_of(8, 1536 // small, 256 // small, 256 // small)
    yield pairs_of(8, 256 // small, 512 // small, 512 // small)
    yield pairs_of(64 if small == 1 else 4, 128 // small, 64 // small, 64 // small)
    yield pairs_of(4, 512 // small, *[512 // small] * 4)
    yield pairs_of(8, 1024 // small, *[256 // small] * 4)
    yield system_prompt(512 // small, 8, 512 // small, 4, 256 // small)
    yield dialogue(10, 256 // small, 256 // small)


def window_cases(small: int) -> Iterator[Case]:
    """Windows of 512 and 4,096, and sinks, on long and on short prompts."""
    for window, sinks in ((512, False), (4096, False), (512, True), (None, True)):
        rule = CAUSAL if window is None else sliding_window(window // small)
        kind = ", ".join(filter(None, (f"window {window}" if window else "", "sinks" if sinks else "")))
        for count, prompt, response in ((1, 12288, 2048), (8, 1536, 256)):
            lengths = (prompt // small, response // small, response // small)
            yield pairs_of(count, *lengths, rule=rule, sinks=sinks, name=f"{count}x{lengths} {kind}")


def length_cases(small: int) -> Iterator[Case]:
    """16,384 tokens of one length: sequences alone, and pairs whose prompt is three quarters of each sequence."""
    for length in (512, 1024, 2048, 4096, 8192):
        length //= small
        count = 16384 // small // length
        yield pairs_of(count, length // 2, length // 2, name=f"causal {length}")
        yield pairs_of(max(count // 2, 1), length * 3 // 4, length // 4, length // 4, name=f"shared {length}")


@dataclass
class Shape:
    heads: int
    groups: int
    size: int
    dtype: torch.dtype

    def draw(self, length: int) -> list[torch.Tensor]:
        """Queries, keys, values and the gradient of the output, ``[S, heads, D]``."""
        generator = torch.Generator(DEVICE).manual_seed(0)
        heads = (self.heads, self.groups, self.groups, self.heads)
        return [
            torch.randn(length, n, self.size, generator=generator, device=DEVICE, dtype=self.dtype) for n in heads
        ]  # fmt: skip


Step = Callable[[], torch.Tensor]


class Skip(Exception):  # noqa: N818
    """A method that cannot serve a case, and why."""


def leaves(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.detach().requires_grad_() for tensor in tensors]


def dense_methods(
    case: Case, shape: Shape
) -> Iterator[tuple[str, Callable[[], tuple[Step, list[torch.Tensor], torch.Tensor]]]]:
    """Kernels on unshared sequences: ``name, build``; ``build() -> forward, inputs, gradient of its output``."""
    lengths, scale = case.lengths, shape.size**-0.5
    window = case.rule.window
    equal = len(set(lengths)) == 1
    total = sum(lengths)
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=DEVICE)
    plain = window is None and not case.sinks

    def sdpa(backend):
        def build():
            if not equal or not plain:
                raise Skip("wants sequences of one length, no windows, no sinks")
            # [S, heads, D] to [sequences, heads, length, D]
            q, k, v, grad = (
                x.view(len(lengths), lengths[0], -1, shape.size).transpose(1, 2) for x in shape.draw(total)
            )
            q, k, v = leaves(q, k, v)

            def forward():
                with sdpa_kernel(backend):
                    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)

            return forward, [q, k, v], grad

        return build

    def fa4_fixed():
        if not equal:
            raise Skip("wants sequences of one length")
        if isinstance(reason := fa4.library(), str):
            raise Skip(reason)
        q, k, v, grad = (x.view(len(lengths), lengths[0], -1, shape.size) for x in shape.draw(total))
        q, k, v = leaves(q, k, v)
        sinks = sink_logits(case, shape)
        kernel = fa4.kernels().flash_attn_func
        options = {"causal": True, "softmax_scale": scale, "window_size": fa4_window(window), "learnable_sink": sinks}
        return lambda: kernel(q, k, v, **options)[0], [q, k, v], grad

    def fa4_varlen():
        if isinstance(reason := fa4.library(), str):
            raise Skip(reason)
        q, k, v, grad = shape.draw(total)
        q, k, v = leaves(q, k, v)
        kernel = fa4.kernels().flash_attn_varlen_func
        options = {
            "cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": max(lengths), "max_seqlen_k": max(lengths),
            "causal": True, "softmax_scale": scale, "window_size": fa4_window(window),
            "learnable_sink": sink_logits(case, shape),
        }  # fmt: skip
        return lambda: kernel(q, k, v, **options)[0], [q, k, v], grad

    def fa2_varlen():
        if not CUDA or case.sinks:
            raise Skip("wants a GPU, and no sinks")
        from torch.nn.attention.varlen import varlen_attn

        q, k, v, grad = shape.draw(total)
        q, k, v = leaves(q, k, v)
        reach = (-1 if window is None else window - 1, 0)
        # The kernel takes grouped heads; later releases of torch want to be told.
        grouped = {"enable_gqa": True} if torch.__version__ >= "2.12" else {}
        arguments = (starts, starts, max(lengths), max(lengths))
        return lambda: varlen_attn(q, k, v, *arguments, scale=scale, window_size=reach, **grouped), [q, k, v], grad

    yield "SDPA cuDNN", sdpa(SDPBackend.CUDNN_ATTENTION)
    yield "SDPA flash (FA2)", sdpa(SDPBackend.FLASH_ATTENTION)
    if not CUDA:
        yield "SDPA math", sdpa(SDPBackend.MATH)
    yield "FA2 varlen", fa2_varlen
    yield "FA4", fa4_fixed
    yield "FA4 varlen", fa4_varlen
    if plain:
        alone = Case(case.name, [[sequence] for tree in case.trees for sequence in tree])
        yield "FlexAttention compiled, unshared", tree_method(alone, shape, "flex")


def fa4_window(window: int | None) -> tuple[int | None, int | None]:
    return (None, None) if window is None else (window - 1, 0)


def sink_logits(case: Case, shape: Shape) -> torch.Tensor | None:
    return torch.linspace(-1, 1, shape.heads, device=DEVICE, dtype=shape.dtype).requires_grad_() if case.sinks else None


def tree_method(case: Case, shape: Shape, backend: str):
    """preftree's attention on the row."""

    def build():
        q, k, v, grad = (x[None].transpose(1, 2) for x in shape.draw(len(case.row)))
        q, k, v = leaves(q, k, v)
        scores = Scores(shape.size**-0.5, sinks=sink_logits(case, shape))
        layer = Layer.of(q, k, v, case.rule, scores)
        if backend != "auto" and (reason := BACKENDS[backend].refusal(layer)) is not None:
            raise Skip(reason)
        attend = TreeAttention(case.row, case.rule, backend)
        return lambda: attend(q, k, v, scores), [q, k, v], grad

    return build


COPIED = "FA4 varlen, keys copied before"


def flex_method(case: Case, shape: Shape, kind: str):
    """FlexAttention by itself: ``eager`` as it comes, or compiled with ``BACKEND="FLASH"``."""

    def build():
        if kind == "eager" and len(case.row) > 4096:
            raise Skip("uncompiled it writes all scores out: left out above 4,096 tokens")
        if kind == "FLASH" and (not CUDA or isinstance(fa4.library(), str)):
            raise Skip("wants a GPU and flash-attn-4")
        q, k, v, grad = (x[None].transpose(1, 2) for x in shape.draw(len(case.row)))
        q, k, v = leaves(q, k, v) if CUDA else (q, k, v)
        mask = block_mask(case.row, case.rule)
        options = {"BACKEND": "FLASH"} if kind == "FLASH" else None
        function = compiled_flash() if kind == "FLASH" else flex_attention
        return (
            lambda: function(q, k, v, block_mask=mask, scale=shape.size**-0.5, enable_gqa=True, kernel_options=options),
            [q, k, v] if CUDA else [],  # on a CPU it has no backward pass
            grad,
        )

    return build


def copied_method(case: Case, shape: Shape):
    """FlashAttention-4 with its own window and sinks, path by path over keys that lie copied: a kernel's own cost."""

    def build():
        if not CUDA or isinstance(reason := fa4.library(), str):
            raise Skip("wants a GPU" if not CUDA else reason)
        window, plan = case.rule.window, plan_paths(case.row, case.rule.window)
        q, k, v, grad = (x[: plan.num_tokens] for x in shape.draw(len(case.row)))
        q, k, v = leaves(q, *copy_to_paths(k, v, plan))
        options = {
            "cu_seqlens_q": plan.query_starts,
            "cu_seqlens_k": plan.key_starts,
            "max_seqlen_q": plan.longest_queries,
            "max_seqlen_k": plan.longest_keys,
            "softmax_scale": shape.size**-0.5,
            "causal": window is None,
            "window_size": (None, None) if window is None else (window - 1, 0),
            "learnable_sink": sink_logits(case, shape),
        }
        return lambda: fa4.kernels().flash_attn_varlen_func(q, k, v, **options)[0], [q, k, v], grad

    return build


_compiled_flash: list = []


def compiled_flash():
    if not _compiled_flash:
        limits = {"recompile_limit": 512, "accumulated_recompile_limit": 512}
        compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
        _compiled_flash.append(torch._dynamo.config.patch(**limits)(compiled))
    return _compiled_flash[0]


def shared_methods(case: Case, shape: Shape) -> Iterator[tuple[str, Callable]]:
    """Methods on the shared row."""
    if not case.sinks and case.rule.causal:
        yield "FlexAttention eager", flex_method(case, shape, "eager")
        yield "FlexAttention FLASH", flex_method(case, shape, "FLASH")
    else:
        yield COPIED, copied_method(case, shape)
    for backend in ("flex", "flash", "varlen"):
        yield f"preftree {backend}", tree_method(case, shape, backend)
    yield "preftree auto", tree_method(case, shape, "auto")


@dataclass
class Timing:
    """Milliseconds: median and distance between quartiles on the device, median on the host."""

    median: float
    spread: float
    host: float


_flush: list[torch.Tensor] = []


def timed(step: Callable[[], object], repeats: int) -> Timing:
    """Time a step as the module's docstring says."""
    for _ in range(2):
        step()
    spent, host = [], []
    if not CUDA:
        for _ in range(max(repeats // 4, 3)):
            started = time.perf_counter()
            step()
            host.append(1e3 * (time.perf_counter() - started))
        spent = host
    else:
        if not _flush:
            _flush.append(torch.empty(64 << 20, dtype=torch.int32, device=DEVICE))
        torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        waiting = int(3e9 * (time.perf_counter() - started)) + 100_000
        torch.cuda.synchronize()
        for _ in range(repeats):
            _flush[0].zero_()
            torch.cuda._sleep(waiting)
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            started = time.perf_counter()
            step()
            host.append(1e3 * (time.perf_counter() - started))
            end.record()
            torch.cuda.synchronize()
            spent.append(begin.elapsed_time(end))
    quartiles = statistics.quantiles(spent, n=4)
    return Timing(statistics.median(spent), quartiles[2] - quartiles[0], statistics.median(host))


def measure(build, repeats: int) -> dict[str, float]:
    """Forward, and forward with backward: milliseconds, host's milliseconds, peak memory in MB beyond the inputs."""
    forward, inputs, gradient = build()

    def both():
        torch.autograd.grad(forward(), inputs, gradient)

    def no_grad():
        with torch.no_grad():
            forward()

    first = timed(no_grad, repeats)
    row = {"forward_ms": first.median, "forward_spread_ms": first.spread}
    if inputs:
        if CUDA:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            both()
            torch.cuda.synchronize()
            row["peak_mb"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        second = timed(both, repeats)
        row |= {"both_ms": second.median, "both_spread_ms": second.spread, "host_ms": second.host}
    return row


def compare(case: Case, shape: Shape, repeats: int) -> list[dict[str, object]]:
    """All methods on a case; prints a line for each and says which are left out."""
    useful = 4 * shape.size * shape.heads * case.pairs()
    saved = case.pairs(case.lengths) / case.pairs()
    print(f"\n{case.name}: {len(case.row)} tokens, {sum(case.lengths)} unshared, {saved:.2f}x less work", flush=True)
    rows: list[dict[str, object]] = []
    methods = [(name, "unshared", build) for name, build in dense_methods(case, shape)]
    methods += [(name, "shared", build) for name, build in shared_methods(case, shape)]
    for name, computes, build in methods:
        row: dict[str, object] = {
            "case": case.name,
            "method": name,
            "computes": computes,
            "work_saved": round(saved, 3),
        }
        try:
            with warnings.catch_warnings():
                leave_out_warnings()
                measured = measure(build, repeats)
        except Skip as reason:
            row["left_out"] = str(reason)
        except (RuntimeError, NotImplementedError, ValueError, torch._dynamo.exc.TorchDynamoException) as error:
            row["left_out"] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
        else:
            row |= {key: round(value, 4) for key, value in measured.items()}
            row["forward_tflops"] = float(f"{useful / measured['forward_ms'] / 1e9:.4g}")
            if "both_ms" in measured:
                row["both_tflops"] = float(f"{3.5 * useful / measured['both_ms'] / 1e9:.4g}")
        if name == "preftree auto":
            row["backend"] = chosen(case, shape)
        rows.append(row)
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()
    dense = [row for row in rows if row["computes"] == "unshared" and "both_ms" in row]
    best = min((row["both_ms"] for row in dense), default=None)
    for row in rows:
        if best is not None and "both_ms" in row:
            row["speedup_over_best_dense"] = round(best / row["both_ms"], 3)
        print(describe(row), flush=True)
    auto = rows[-1]
    own = next((row["both_ms"] for row in rows if row["method"] == COPIED and "both_ms" in row), None)
    if own is not None and "both_ms" in auto:
        auto["over_a_kernels_own_cost"] = round(auto["both_ms"] / own, 3)
        print(f"  {auto['both_ms'] / own:.3f} of what FA4 itself takes for the work that is left")
    if best is not None and "both_ms" in auto and saved > 1:
        gained = (best - auto["both_ms"]) / (best * (1 - 1 / saved))
        auto["share_of_saved_work_gained"] = round(gained, 3)
        print(
            f"  {best / auto['both_ms']:.2f}x the best dense; {gained:.2f} of the saved work gained ({auto['backend']})"
        )
    return rows


def chosen(case: Case, shape: Shape) -> str:
    """The backend that preftree chooses."""
    q, k, v, _ = (x[None].transpose(1, 2) for x in shape.draw(1))
    return choose_backend("auto", Layer.of(q, k, v, case.rule, Scores(1.0, sinks=sink_logits(case, shape))), case.row)


def describe(row: dict[str, object]) -> str:
    name = f"  {row['method']:<34}"
    if "left_out" in row:
        return f"{name}left out: {row['left_out']}"
    line = f"{name}{row['forward_ms']:>9.3f} ms"
    if "both_ms" in row:
        line += f"{row['both_ms']:>9.3f} (+-{row['both_spread_ms']:.3f}) ms {row['both_tflops']:>6.0f} TFLOP/s"
        line += f"  host {row['host_ms']:.2f} ms"
    if "peak_mb" in row:
        line += f"  {row['peak_mb']:.0f} MB"
    return line


def errors(shape: Shape, small: int) -> list[dict[str, object]]:
    """Distance from float64, each backend and FA4 on unshared sequences: ``|x - exact| / |exact|``.

    The gradient of a shared token is a sum over sequences. FA4 rounds each term; here they are added once in float64, which
    leaves nothing but the terms' own errors, and once by autograd in the tensors' type, as a model's backward pass does.
    """
    shape = Shape(4, 1, shape.size, shape.dtype)
    case = pairs_of(2, 1024 // small + 5, 256 // small, 300 // small)
    row, scale = case.row, shape.size**-0.5
    low = shape.draw(len(row))

    def on_row(backend, dtype):
        q, k, v = leaves(*(x[None].transpose(1, 2).to(dtype) for x in low[:3]))
        out = BACKENDS[backend].bind(row, CAUSAL)(q, k, v, Scores(scale))
        return [x.double() for x in (out, *torch.autograd.grad(out, (q, k, v), low[3][None].transpose(1, 2).to(dtype)))]

    def unshared(sums_in):
        kernel = fa4.kernels().flash_attn_func
        out, sums = torch.zeros_like(low[0]), [torch.zeros_like(x, dtype=sums_in) for x in low[:3]]
        done = torch.zeros(len(row), dtype=torch.bool, device=DEVICE)
        for last in row.last_nodes.tolist():
            path = [last]
            while (above := int(row.parent[path[-1]])) >= 0:
                path.append(above)
            nodes = torch.tensor(path[::-1], device=DEVICE)
            q, k, v = leaves(*(x[nodes][None] for x in low[:3]))
            here = kernel(q, k, v, causal=True, softmax_scale=scale)[0]
            # The gradient of a shared token's output belongs to the first sequence that has it.
            gradient = torch.where(done[nodes, None, None], 0, low[3][nodes])[None]
            for total, grad in zip(sums, torch.autograd.grad(here, (q, k, v), gradient), strict=True):
                total.index_add_(0, nodes, grad[0].to(sums_in))
            out[nodes] = here[0].detach()
            done[nodes] = True
        return [x.double()[None].transpose(1, 2) for x in (out, *sums)]

    exact = on_row("dense", torch.float64)
    results = []
    methods: list[tuple[str, Callable]] = [("dense", lambda: on_row("dense", shape.dtype))]
    q, k, v = (x[None].transpose(1, 2) for x in low[:3])
    layer = Layer.of(q, k, v, CAUSAL, Scores(scale))
    if not isinstance(fa4.library(), str) and CUDA:
        methods.append(("FA4, unshared", lambda: unshared(torch.float64)))
        methods.append((f"FA4, sums in {shape.dtype}".replace("torch.", ""), lambda: unshared(shape.dtype)))
    for backend in ("flex", "flash", "varlen"):
        if BACKENDS[backend].refusal(layer) is None:
            methods.append((f"preftree {backend}", lambda backend=backend: on_row(backend, shape.dtype)))
    print(f"\nerror against float64, {case.name}, {shape.heads} heads")
    for name, run in methods:
        distances = [float((x - y).detach().norm() / y.detach().norm()) for x, y in zip(run(), exact, strict=True)]
        results.append({"method": name, **dict(zip(("out", "dq", "dk", "dv"), distances, strict=True))})
        print(f"  {name:<26}" + "".join(f"  {key} {value:.3e}" for key, value in list(results[-1].items())[1:]))
    base = next((r for r in results if r["method"] == "FA4, unshared"), None)
    for result in results:
        if base is not None:
            result["largest_ratio_to_fa4"] = round(max(result[x] / base[x] for x in ("out", "dq", "dk", "dv")), 3)
            print(f"  {result['method']:<26}  at most {result['largest_ratio_to_fa4']}x FA4's")
    return results


def preparation(small: int, repeats: int) -> list[dict[str, object]]:
    """What a row's tables cost, once for each row: device and host."""
    results = []
    print("\npreparation of a row")
    for case in (
        pairs_of(1, 12288 // small, 2048 // small, 2048 // small),
        pairs_of(64 if small == 1 else 4, 128 // small, 64 // small, 64 // small),
    ):
        row, sizes = case.row, block_sizes(128, 128)
        for kind, rule in (("causal", CAUSAL), ("window 512", sliding_window(512 // small))):

            def lists(row=row, rule=rule):
                row.derived.clear()
                return key_lists(row, rule, 128, 128), query_lists(row, rule, 128, 128)

            def tables(row=row, rule=rule, sizes=sizes):
                row.derived.clear()
                return _tables(row, rule, sizes, torch.Size((1, 1)))

            def paths(row=row, rule=rule):
                row.derived.clear()
                return plan_paths(row, rule.window)

            for name, step in (("block lists, both ways", lists), ("flash: all", tables), ("varlen: all", paths)):
                took = timed(step, repeats)
                result = {"row": f"{case.name} {kind}", "what": name}
                results.append(result | {"device_ms": round(took.median, 4), "host_ms": round(took.host, 4)})
                print(f"  {result['row']:<34}{name:<24}{took.median:.3f} ms, host {took.host:.3f} ms")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    suites = ("cases", "errors", "preparation", "windows", "lengths")
    parser.add_argument("--suites", nargs="+", choices=suites, default=list(suites))
    parser.add_argument("--heads", type=int, default=32 if CUDA else 4)
    parser.add_argument("--groups", type=int, default=8 if CUDA else 2)
    parser.add_argument("--size", type=int, default=128 if CUDA else 32)
    parser.add_argument("--dtype", default="bfloat16" if CUDA else "float32")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    small = 1 if CUDA else 32
    shape = Shape(options.heads, options.groups, options.size, getattr(torch, options.dtype))
    print(f"{versions()}{library_versions()}; {shape.heads} heads, {shape.groups} key-value heads, size {shape.size}")
    machine = torch.cuda.get_device_name().split()[1].lower() if CUDA else "cpu"
    made = {"cases": cases, "windows": window_cases, "lengths": length_cases}
    for suite in dict.fromkeys(options.suites):
        if suite == "errors":
            rows = errors(shape, small)
        elif suite == "preparation":
            rows = preparation(small, options.repeats)
        else:
            chosen_cases = [case for case in made[suite](small) if options.only in case.name]
            rows = [row for case in chosen_cases for row in compare(case, shape, options.repeats)]
            speeds = [(row["case"], row["method"], row["both_tflops"]) for row in rows if "both_tflops" in row]
            unit = "TFLOP/s of the shared row's work, forward + backward"
            draw(speeds, options.out / f"attention_{suite}_{machine}.png", f"attention, {suite}\n{versions()}", unit)
        write(rows, options.out / f"attention_{suite}_{machine}.csv", versions() + library_versions())


if __name__ == "__main__":
    main()
