"""A captured step does again what it did, to whatever lies in its inputs by then."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from shoal.kernels.cpu_ops.kernel import Capture
from shoal.kernels.dispatch import NotCapturableError, operations, reference

HIDDEN, INTER, VOCAB = 64, 96, 200
OPS = operations("cpu")


@pytest.fixture(autouse=True)
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def some_layers(seed: int) -> Callable[[Tensor], Tensor]:
    """ids [tokens] -> [tokens, VOCAB], by operations that lean on each other in place and through views."""
    g = torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=g) * shape[-1] ** -0.5).bfloat16()

    table, norm = weight(VOCAB, HIDDEN), torch.rand(HIDDEN, generator=g)
    gate_up, down, head = (
        OPS.pack_linear(weight(*shape)) for shape in ((2 * INTER, HIDDEN), (HIDDEN, INTER), (VOCAB, HIDDEN))
    )

    def run(ids: Tensor) -> Tensor:
        residual = OPS.embedding(ids, table, 3.0)
        x = OPS.rms_norm(residual.view(len(ids), 2, -1), norm[: HIDDEN // 2], 1e-5).flatten(1)
        for _ in range(5):
            x = OPS.linear(OPS.gated_linear(x, gate_up, None, "silu"), down)
            x = OPS.add_rms_norm(x, residual, norm, 1e-5)
        OPS.add(x, residual)
        return OPS.linear(residual, head, out_dtype=torch.float32)

    return run


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_a_replay_equals_a_run(tokens: int, threads: int) -> None:
    """With more threads than cores, too: some are held up, and others take their work."""
    run, capture = some_layers(0), OPS.new_capture()
    ids = torch.randint(0, VOCAB, (tokens,))
    torch.set_num_threads(threads)
    (result,), replay = capture(lambda: (run(ids),))
    for _ in range(20):
        torch.set_num_threads(1)
        expected = run(ids)
        torch.set_num_threads(threads)
        assert torch.equal(run(ids), expected)
        replay()
        assert torch.equal(result, expected)
        ids.random_(0, VOCAB)


def test_captures_take_turns_in_one_memory() -> None:
    capture = Capture()
    runs = [some_layers(seed) for seed in range(6)]
    ids = torch.arange(7)
    captured = [capture(lambda run=run: (run(ids),)) for run in runs[:2]]  # type: ignore[misc]
    num_pieces = sum(map(len, capture.workspace._free.values()))
    captured += [capture(lambda run=run: (run(ids),)) for run in runs[2:]]  # type: ignore[misc]
    assert sum(map(len, capture.workspace._free.values())) == num_pieces
    ids.random_(0, VOCAB)
    for run, ((result,), replay) in list(zip(runs, captured, strict=True)) * 2:
        replay()
        assert torch.equal(result, run(ids))


@pytest.mark.parametrize("step", [lambda x: x + 1, lambda x: x.mul_(2), lambda x: x.t().contiguous(), torch.softmax])
def test_what_torch_computes_cannot_be_captured(step: Callable[..., Tensor]) -> None:
    x = torch.randn(3, 4)
    arguments = (x, 1) if step is torch.softmax else (x,)
    with pytest.raises(NotCapturableError, match="aten"):
        OPS.new_capture()(lambda: (step(*arguments),))
    assert OPS.rms_norm(x, torch.ones(4), 1e-5).shape == x.shape  # not noted in an abandoned capture


def test_the_torch_twins_cannot_be_captured() -> None:
    with pytest.raises(NotCapturableError):
        reference().new_capture()(lambda: (torch.ones(1),))
