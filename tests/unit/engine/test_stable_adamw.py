"""StableAdamW against the paper's algorithm in plain numbers, against AdamW while gradients are calm, and in partitions."""

from __future__ import annotations

import math
from threading import Barrier, Thread

import pytest
import torch
from torch import Tensor, nn

from dstrain.engine.config import AdamConfig
from dstrain.engine.master_weights import Layout
from dstrain.engine.optimizer import build_optimizer
from dstrain.engine.stable_adamw import StableAdamW

RATE, BETAS, EPS, DECAY = 0.01, (0.9, 0.98), 1e-6, 0.3
CONFIG = AdamConfig(kind="stable_adamw", learning_rate=RATE, betas=BETAS, eps=EPS, weight_decay=DECAY, decay="all")


def gradients(step: int, shapes: list[torch.Size]) -> list[Tensor]:
    """Standard normal; from step 5 on those of the first tensor are 30 times as large, those of the last below eps."""
    generator = torch.Generator().manual_seed(step)
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    drawn[0] *= 30.0 if step >= 5 else 1.0
    drawn[-1] *= 1e-9
    return drawn


def algorithm_2(weight: Tensor, steps: int, index: int, shapes: list[torch.Size]) -> tuple[list[float], list[float]]:
    """The paper's loop over single numbers; returns the weights and RMS of each step."""
    w, m, u = weight.flatten().tolist(), [0.0] * weight.numel(), [0.0] * weight.numel()
    ratios = []
    for t in range(1, steps + 1):
        g = gradients(t, shapes)[index].flatten().tolist()
        b1, b2 = (beta * (1 - beta ** (t - 1)) / (1 - beta**t) for beta in BETAS)
        m = [b1 * old + (1 - b1) * new for old, new in zip(m, g, strict=True)]
        u = [b2 * old + (1 - b2) * new * new for old, new in zip(u, g, strict=True)]
        ratios.append(math.sqrt(sum(new * new / max(old, EPS**2) for new, old in zip(g, u, strict=True)) / len(g)))
        rate = RATE / max(1.0, ratios[-1])
        w = [a - rate * DECAY * a - rate * b / (math.sqrt(c) + EPS) for a, b, c in zip(w, m, u, strict=True)]
    return w, ratios


def parameters() -> nn.ParameterList:
    torch.manual_seed(3)
    return nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in ((7, 5), (123,), (1,), (3, 4))])


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    shapes = [parameter.shape for parameter in model.parameters()]
    for step in steps:
        for parameter, gradient in zip(model.parameters(), gradients(step, shapes), strict=True):
            parameter.grad = gradient
        optimizer.step()


def test_equals_the_papers_algorithm() -> None:
    model = parameters()
    shapes = [parameter.shape for parameter in model]
    expected = [algorithm_2(parameter.detach(), 8, index, shapes) for index, parameter in enumerate(model)]
    train(model, build_optimizer(model, CONFIG), range(1, 9))
    for parameter, (weights, _) in zip(model, expected, strict=True):
        assert parameter.flatten().tolist() == pytest.approx(weights, rel=1e-5, abs=1e-6)
    jumped, calm, _, tiny = (ratios for _, ratios in expected)
    assert jumped[4] > 2, "the jump must show"
    assert calm[4] < 1.5, "and only where it happens"
    assert max(tiny) < 1e-2, "what stays below eps is noise and is not measured"
    assert jumped[0] == pytest.approx(1)


def test_a_jump_shortens_the_step_of_its_own_tensor_only() -> None:
    stable, plain = parameters(), parameters()
    optimizers = [
        build_optimizer(model, CONFIG.model_copy(update={"kind": kind}))
        for model, kind in ((stable, "stable_adamw"), (plain, "adamw"))
    ]
    for model, optimizer in zip((stable, plain), optimizers, strict=True):
        train(model, optimizer, range(1, 5))
    plain.load_state_dict(stable.state_dict())
    before = [parameter.detach().clone() for parameter in stable]
    for model, optimizer in zip((stable, plain), optimizers, strict=True):
        train(model, optimizer, range(5, 6))
    moved = [[(start - a).norm().item() for start, a in zip(before, model, strict=True)] for model in (plain, stable)]
    ratios = [a / b for a, b in zip(*moved, strict=True)]
    _, expected = algorithm_2(before[0], 5, 0, [parameter.shape for parameter in stable])
    assert ratios[0] == pytest.approx(expected[-1], rel=1e-3)
    assert ratios[3] == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("cuts", [[(0, 80), (80, 171)], [(0, 35), (35, 171)], [(0, 1), (1, 170), (170, 171)]])
def test_partitions_equal_whole_tensors(cuts: list[tuple[int, int]]) -> None:
    """A flat partition for each rank, cut anywhere, padded at the end; each rank is a thread."""
    whole = parameters()
    shapes = [parameter.shape for parameter in whole]
    start = torch.cat([parameter.detach().flatten() for parameter in whole])
    train(whole, build_optimizer(whole, CONFIG), range(1, 9))
    sizes = [shape.numel() for shape in shapes]
    ends = torch.tensor(sizes).cumsum(0).tolist()
    results: dict[int, Tensor] = {}
    barrier, shared = Barrier(len(cuts)), {}

    def run(rank: int, first: int, last: int) -> None:
        def add_up(sums: Tensor) -> Tensor:
            shared[rank] = sums
            barrier.wait(30)
            total = torch.stack([shared[other] for other in range(len(cuts))]).sum(0)
            barrier.wait(30)
            return total

        flat = nn.Parameter(nn.functional.pad(start[first:last], (0, 3), value=7.0))
        pieces = [
            (number, max(end - size, first) - first, min(end, last) - max(end - size, first))
            for number, (size, end) in enumerate(zip(sizes, ends, strict=True))
            if min(end, last) > max(end - size, first)
        ]
        optimizer = build_optimizer(nn.ParameterList([flat]), CONFIG)
        assert isinstance(optimizer, StableAdamW)
        layout = Layout(torch.tensor(sizes, dtype=torch.float32), torch.zeros(len(sizes)), pieces)
        optimizer.partition({flat: layout}, lambda sums, layout: add_up(sums))
        for step in range(1, 9):
            gradient = torch.cat([each.flatten() for each in gradients(step, shapes)])[first:last]
            flat.grad = nn.functional.pad(gradient, (0, 3))
            optimizer.step()
        results[rank] = flat.detach()

    threads = [Thread(target=run, args=(rank, *cut), daemon=True) for rank, cut in enumerate(cuts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(results[rank][-3:].tolist() == [7.0] * 3 for rank in results), "padding is no weight"
    found = torch.cat([results[rank][:-3] for rank in range(len(cuts))])
    torch.testing.assert_close(found, torch.cat([parameter.detach().flatten() for parameter in whole]), rtol=1e-6, atol=1e-7)


def test_a_restored_state_continues_bit_for_bit() -> None:
    straight, first, second = parameters(), parameters(), parameters()
    train(straight, build_optimizer(straight, CONFIG), range(1, 9))
    optimizer = build_optimizer(first, CONFIG)
    train(first, optimizer, range(1, 5))
    second.load_state_dict(first.state_dict())
    continued = build_optimizer(second, CONFIG)
    for old, new in zip(first, second, strict=True):
        continued.state[new] = {name: value.clone() for name, value in optimizer.state[old].items()}
    train(second, continued, range(5, 9))
    assert all(torch.equal(a, b) for a, b in zip(straight, second, strict=True))


def test_a_tensor_without_gradient_is_unchanged() -> None:
    model = parameters()
    before = [parameter.detach().clone() for parameter in model]
    optimizer = build_optimizer(model, CONFIG)
    model[0].grad = torch.ones(7, 5)
    optimizer.step()
    assert not torch.equal(model[0], before[0])
    assert all(torch.equal(a, b) for a, b in zip(model[1:], before[1:], strict=True))
