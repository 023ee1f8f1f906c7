"""On a CUDA device: every kernel against its twin, and the whole engine against transformers. Skipped without one.

Runs from a checkout with PYTHONPATH=src; needs neither Ray nor pydantic.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from shoal.engine.config import EngineOptions, SpeculativeOptions
from shoal.engine.core import EngineCore
from shoal.engine.request import Request, RequestId, SamplingParams
from shoal.engine.worker import LocalExecutor, resolve_options
from shoal.kernels import dispatch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 3e-2}


@pytest.fixture(scope="module")
def ops() -> tuple[dispatch.Operations, dispatch.Operations]:
    return dispatch.operations("cuda"), dispatch.reference()


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a.float(), b.float(), atol=TOLERANCE[a.dtype], rtol=TOLERANCE[a.dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_rotary_activation(ops, dtype):
    fast, slow = ops
    x = torch.randn(37, 512, device="cuda", dtype=dtype)
    weight = torch.rand(512, device="cuda")
    close(fast.rms_norm(x, weight, 1e-5), slow.rms_norm(x, weight, 1e-5))
    left, right = x.clone(), x.clone()
    close(fast.add_rms_norm(x, left, weight, 1e-5), slow.add_rms_norm(x, right, weight, 1e-5))
    close(left, right)
    for activation in ("silu", "gelu_tanh"):
        close(fast.gated_activation(x, activation), slow.gated_activation(x, activation))
    cos_sin = torch.randn(64, 64, device="cuda")
    positions = torch.randint(0, 64, (37,), device="cuda")
    pairs = []
    for table in (fast, slow):
        heads = x.view(37, 8, 64).clone()
        table.rotary(heads[:, :6], heads[:, 6:], positions, cos_sin)
        pairs.append(heads)
    close(*pairs)


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (50, None), (None, 20.0)])
@pytest.mark.parametrize(
    "lengths", [[(1, 700)] * 5, [(1, 1), (33, 33), (7, 300), (130, 130)], [(1, 9000)]], ids=["decode", "mixed", "long"]
)
@pytest.mark.parametrize(
    ("dtype", "heads", "kv_heads", "head_dim"),
    [
        (torch.float32, 8, 2, 64),
        (torch.bfloat16, 8, 2, 64),
        (torch.bfloat16, 32, 8, 128),
        (torch.bfloat16, 8, 1, 128),
        (torch.bfloat16, 6, 6, 80),
        (torch.bfloat16, 4, 2, 256),
    ],
)
def test_attention(ops, dtype, window, softcap, lengths, heads, kv_heads, head_dim):
    fast, slow = ops
    block = 16
    num_blocks = sum(-(-context // block) for _, context in lengths) + 1
    pool = torch.randn(num_blocks, 3, 2, kv_heads, block, head_dim, device="cuda", dtype=dtype)
    order = (torch.randperm(num_blocks - 1) + 1).tolist()
    widest = max(-(-context // block) for _, context in lengths)
    tables = torch.zeros(len(lengths), widest, dtype=torch.int32)
    for row, (_, context) in enumerate(lengths):
        needed = -(-context // block)
        tables[row, :needed] = torch.tensor([order.pop() for _ in range(needed)])
    starts = torch.tensor([0, *[q for q, _ in lengths]]).cumsum(0).int().cuda()
    contexts = torch.tensor([context for _, context in lengths], dtype=torch.int32, device="cuda")
    q = torch.randn(int(starts[-1]), heads, head_dim, device="cuda", dtype=dtype)
    arguments = (q, pool[:, 1], tables.cuda(), starts, contexts, max(n for n, _ in lengths))
    options = {"scale": head_dim**-0.5, "window": window, "softcap": softcap}
    close(fast.attention(*arguments, **options), slow.attention(*arguments, **options))


def test_attention_in_a_graph_reads_lengths_from_the_device(ops):
    """Recorded for padded rows, replayed for contexts of any length."""
    fast, slow = ops
    kv = torch.randn(600, 2, 8, 16, 128, device="cuda").bfloat16()
    tables = (torch.randperm(596, device="cuda") + 1).int().view(4, 149)
    q, starts = torch.randn(4, 32, 128, device="cuda").bfloat16(), torch.arange(5, device="cuda").int()
    contexts = torch.zeros(4, dtype=torch.int32, device="cuda")
    arguments = (kv, tables, starts, contexts, 1)
    fast.attention(q, *arguments, scale=0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = fast.attention(q, *arguments, scale=0.1)
    graph.replay()
    assert not result.any()
    for lens in ([1, 17, 2384, 300], [2000, 5, 64, 0]):
        contexts.copy_(torch.tensor(lens))
        graph.replay()
        count = sum(length > 0 for length in lens)
        expected = slow.attention(q[:count], kv, tables[:count], starts[: count + 1], contexts[:count], 1, scale=0.1)
        close(result[:count], expected)


def test_kv_write_and_sample(ops):
    fast, slow = ops
    k, v = torch.randn(2, 20, 2, 64, device="cuda").unbind(0)
    slots = torch.randperm(64, device="cuda")[:20]
    slots[3] = -1
    pools = [torch.zeros(4, 2, 2, 16, 64, device="cuda") for _ in range(2)]
    fast.kv_write(k, v, pools[0], slots)
    slow.kv_write(k, v, pools[1], slots)
    close(*pools)
    logits = torch.randn(64, 32_000, device="cuda") * 3
    settings = [
        torch.rand(64, device="cuda") * 1.5 * (torch.arange(64, device="cuda") % 4 > 0),
        torch.randint(0, 50, (64,), device="cuda", dtype=torch.int32),
        torch.rand(64, device="cuda") * 0.5 + 0.5,
        torch.rand(64, device="cuda") * 0.05,
        torch.rand(64, device="cuda"),
    ]
    tokens = fast.sample(logits, *settings)
    assert (tokens == slow.sample(logits, *settings)).float().mean() > 0.97  # rounding may move a draw at an edge
    wide = fast.linear(
        logits[:4, :512].bfloat16(), fast.pack_linear(logits[:, :512].bfloat16()), out_dtype=torch.float32
    )
    assert wide.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 7, 300])
def test_experts(ops, dtype, num_tokens):
    fast, slow = ops
    gate_up = (torch.randn(8, 2 * 192, 256, device="cuda") / 16).to(dtype)
    down = (torch.randn(8, 256, 192, device="cuda") / 14).to(dtype)
    x = torch.randn(num_tokens, 256, device="cuda").to(dtype)
    liked = torch.rand(num_tokens, 8, device="cuda")
    chosen = liked.topk(2).indices.sort().values
    results = [
        table.experts(x, table.pack_experts(gate_up.clone(), down.clone()), chosen, liked.gather(1, chosen), "silu")
        for table in (fast, slow)
    ]
    close(*results)


def test_nccl_collectives_of_one_rank():
    """NCCL refuses two ranks on one device; this shows that its communicators can be made and used as values."""
    from shoal.engine.parallel.process_group import NcclCollectives, open_process_group, open_store

    host = "127.0.0.1"
    collectives = NcclCollectives(open_process_group("cuda", open_store(host), 0, 1, host, 60.0))
    for dtype in (torch.bfloat16, torch.float32, torch.float64, torch.int64):
        x = torch.arange(12, device="cuda").view(3, 4).to(dtype)
        assert torch.equal(collectives.all_reduce(x.clone()), x)
        assert torch.equal(collectives.all_gather(x), x)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2,
        vocab_size=1000, max_position_embeddings=1024, initializer_range=0.1, eos_token_id=999,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.mark.parametrize("has_graphs", [False, True])
@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("max_step_tokens", [17, 4096])
@pytest.mark.parametrize("method", [None, "suffix", "draft_model"])
def test_engine_gives_the_tokens_of_transformers(checkpoint, max_step_tokens, is_async, method, has_graphs):
    """Speculation too, with the model as its own draft model."""
    import transformers

    model = str(checkpoint) if method == "draft_model" else None
    speculative = (
        SpeculativeOptions(method=method, model=model, prompt_lookup_min=1, adaptive=False) if method else None
    )
    rng = random.Random(0)
    prompts = [[rng.randrange(3, 990) for _ in range(rng.randrange(5, 90))] for _ in range(16)]
    options = EngineOptions(
        str(checkpoint), dtype="float32", device="cuda", num_blocks=400, max_step_tokens=max_step_tokens,
        max_running_requests=16, async_scheduling=is_async, speculative=speculative,
        cuda_graphs=has_graphs,
    )  # fmt: skip
    config = resolve_options(options)
    core = EngineCore(config, LocalExecutor(config))
    core.start()
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    requests = [Request(RequestId(str(i)), tuple(p), params, 0, float(i)) for i, p in enumerate(prompts)]
    for request in requests:
        core.add(request)
    while core.has_work:
        core.step()
    drafts = core.stats().drafts
    assert (drafts.num_drafted > 0) == (method is not None)
    assert (drafts.num_accepted > drafts.num_drafted // 2) == (method == "draft_model")
    core.close()
    model = transformers.LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).cuda().eval()
    for request in requests:
        ids = torch.tensor([[*request.prompt_ids, *request.output_ids]], device="cuda")
        with torch.inference_mode():
            choices = model(ids).logits[0].argmax(-1).tolist()
        assert request.output_ids == choices[len(request.prompt_ids) - 1 : -1]


def generate(checkpoint: Path, settings: list[SamplingParams], *, has_graphs: bool) -> list[list[int]]:
    """A request more every other step, so that graphs of all sizes take turns."""
    options = EngineOptions(
        str(checkpoint), dtype="float32", device="cuda", num_blocks=300, max_running_requests=19, cuda_graphs=has_graphs
    )
    config = resolve_options(options)
    core = EngineCore(config, LocalExecutor(config))
    core.start()
    rng = random.Random(0)
    requests = [
        Request(RequestId(str(i)), tuple(rng.choices(range(3, 990), k=1 + i % 40)), params, i, float(i))
        for i, params in enumerate(settings)
    ]
    waiting = list(requests)
    while waiting or core.has_work:
        if waiting:
            core.add(waiting.pop(0))
        core.step()
        core.step()
    core.close()
    return [request.output_ids for request in requests]


@pytest.mark.parametrize("kinds", [2, 5])
def test_graphs_change_no_token(checkpoint, kinds):
    """Greedy and sampled ones, drawn in graphs; then also truncated ones, and those that take more than a token."""
    changes = ({}, {"temperature": 0.0}, {"top_k": 30, "top_p": 0.9}, {"presence_penalty": 0.5}, {"logprobs": 3})
    settings = [
        SamplingParams(**{"temperature": 0.9, "max_tokens": 5 + i * 7 % 23, "seed": i, **changes[i % kinds]})
        for i in range(40)
    ]
    assert generate(checkpoint, settings, has_graphs=True) == generate(checkpoint, settings, has_graphs=False)
