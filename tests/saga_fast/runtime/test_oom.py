"""Out of memory, a phase continues in halves with the same result; patches simulate a small device."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from saga_fast import train as trainer
from saga_fast.encoder import VisionTower
from saga_fast.runtime.oom import GradientCachedForward, OomBackoff, gradients_all_or_none
from saga_fast.supervisor.rollout import RolloutEngine
from saga_fast.supervisor.supervisor import Supervisor

from ..small import small


def short_of(limit: int, asked: list[int], size: int) -> None:
    asked.append(size)
    if size > limit:
        raise torch.OutOfMemoryError(f"{size} do not fit")


def test_halves_until_it_fits_and_remembers():
    backoff, asked = OomBackoff(), []
    with pytest.warns(UserWarning, match="sing: out of memory with 10 at once, 5 from now on"):
        assert backoff.map_chunks("sing", 10, lambda rows: short_of(3, asked, rows.stop - rows.start)) == [None] * 5
    assert asked == [10, 5, 2, 2, 2, 2, 2] and backoff.log() == {"limit_sing": 2}
    asked.clear()
    assert backoff.map_chunks("sing", 5, lambda rows: (asked.append(rows.stop - rows.start), rows.start)[1]) == [
        0,
        2,
        4,
    ]
    assert asked == [2, 2, 1]
    assert backoff.run("dance", 10, lambda limit: limit) == 10, "phases are apart"


@pytest.mark.filterwarnings("ignore:sing")
def test_what_does_not_fit_at_all_is_raised():
    with pytest.raises(torch.OutOfMemoryError, match="^1 do not fit"):
        OomBackoff().map_chunks("sing", 4, lambda rows: short_of(0, [], rows.stop - rows.start))
    with pytest.raises(torch.OutOfMemoryError, match="^25 do not fit"):
        OomBackoff().run("sing", 100, lambda limit: short_of(10, [], limit), minimum=30)


class Short(torch.autograd.Function):
    """The identity, out of memory in a backward of more than `limit` rows, after some gradients have been added."""

    @staticmethod
    def forward(ctx, x, limit):
        ctx.limit = limit
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        short_of(ctx.limit, [], len(gradient))
        return gradient, None


@pytest.mark.parametrize("forward,backward", [(99, 99), (3, 99), (99, 3), (5, 1)])
@pytest.mark.filterwarnings("ignore:embed")
def test_the_gradient_is_that_of_the_whole_batch(forward, backward):
    torch.manual_seed(0)
    first, second = (torch.nn.Linear(6, 6, dtype=torch.float64) for _ in range(2))
    parameters = [*first.parameters(), *second.parameters()]
    x = torch.randn(11, 6, dtype=torch.float64)

    def model(rows):
        short_of(forward, [], len(rows))
        return [second(Short.apply(first(rows), backward)), first(rows) * 2]

    def loss(z):  # of all pairs of rows: no sum over rows
        return (torch.cdist(z, z) + 1).log().sum()

    loss(second(first(x))).backward()
    loss(second(first(x))).backward()
    expected = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    backoff = OomBackoff()
    for _ in range(2):  # the second finds gradients there
        encoded = GradientCachedForward(backoff, "embed", model, x, parameters)
        assert all(output.is_leaf and len(output) == 11 for output in encoded.outputs)
        loss(encoded.outputs[0]).backward()
        encoded.backward()
    for parameter, gradient in zip(parameters, expected):
        torch.testing.assert_close(parameter.grad, gradient)


def test_a_gradient_cut_short_is_none():
    a, b = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    a.grad = torch.full((2,), 5.0)
    with pytest.raises(torch.OutOfMemoryError), gradients_all_or_none([a, b]):
        (a * b).sum().backward()
        raise torch.OutOfMemoryError
    assert a.grad.tolist() == [5, 5] and b.grad is None
    with gradients_all_or_none([a, b]):
        (a * b).sum().backward()
    assert a.grad.tolist() == [6, 6] and b.grad.tolist() == [1, 1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*out of memory")
def test_a_run_that_is_out_of_memory_everywhere_comes_to_the_same_weights(tmp_path, monkeypatch):
    config = small(data={"seed": 1}, rollout={"max_batches": 1, "pairs_per_batch": 4}, optim={"steps": 2})
    trainer.train(config, tmp_path / "whole")
    asked: dict[str, list[int]] = {"tower": [], "roll out": [], "replay": []}
    tower, advance, replay = VisionTower.__call__, RolloutEngine.advance, Supervisor.replay

    def short_tower(self, pixels):
        if torch.is_grad_enabled():
            short_of(3, asked["tower"], len(pixels))
        return tower(self, pixels)

    def short_advance(self):
        short_of(1, asked["roll out"], len(self.pairs))
        return advance(self)

    def short_replay(self, features, groups, token_budget=None):
        result = replay(self, features, groups, token_budget)
        if token_budget is not None:  # with all gradients added, as late as can be
            short_of(500, asked["replay"], token_budget)
        return result

    monkeypatch.setattr(VisionTower, "__call__", short_tower)
    monkeypatch.setattr(RolloutEngine, "advance", short_advance)
    monkeypatch.setattr(Supervisor, "replay", short_replay)
    trainer.train(config, tmp_path / "short")
    assert max(asked["tower"]) == 16 and max(asked["roll out"]) > 1
    assert max(asked["replay"]) > 500 and min(asked["replay"]) <= 500
    ours, theirs = (load_file(tmp_path / run / "encoder/model.safetensors") for run in ("short", "whole"))
    for name, value in theirs.items():
        # AdamW divides by the gradient's own size: where that is next to nothing, rounding is most of it.
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5)
