"""Potential Field against a plain double loop over the published energy, constants included, in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from saga_fast.losses.potential_field import RESOLVED, PotentialField


def published_energy(points: list[list[float]], labels: list[int], alpha: float, delta: float) -> float:
    """The full sum over ordered pairs of distinct points."""
    total = 0.0
    for i, x in enumerate(points):
        for j, y in enumerate(points):
            if i == j:
                continue
            d = math.dist(x, y)
            if labels[i] == labels[j]:
                total += -(delta**-alpha) if d < delta else -(d**-alpha)
            else:
                total += d**-alpha if d < delta else delta**-alpha
    return total


def crowded(alpha=3.0, delta=0.2, classes=3, per_class=2, batch=6, dim=4, seed=0):
    """A float64 loss and a batch near its proxies: pairs of every kind, on both sides of δ."""
    torch.manual_seed(seed)
    loss = PotentialField(classes, dim, alpha, delta, per_class).double()
    centre = torch.randn(dim)
    loss.proxies.data = 3 * (centre + 0.25 * torch.randn_like(loss.proxies))  # their length must not matter
    embeddings = F.normalize(centre + 0.25 * torch.randn(batch, dim, dtype=torch.float64), dim=1)
    labels = torch.arange(batch) % classes
    return loss, embeddings, labels


def oracle(loss: PotentialField, embeddings: torch.Tensor, labels: torch.Tensor) -> float:
    points = torch.cat([embeddings, F.normalize(loss.proxies.data, dim=1)]).tolist()
    every = labels.tolist() + loss.proxy_labels.tolist()
    return published_energy(points, every, loss.alpha, loss.delta) / len(embeddings)


def forceless(loss: PotentialField, embeddings: torch.Tensor, labels: torch.Tensor) -> tuple[float, int]:
    """The constant part of the oracle, and the number of pairs that feel a force."""
    points = torch.cat([embeddings, F.normalize(loss.proxies.data, dim=1)]).tolist()
    every = labels.tolist() + loss.proxy_labels.tolist()
    constant, forces = 0.0, 0
    for i, x in enumerate(points):
        for j, y in enumerate(points):
            same, near = every[i] == every[j], math.dist(x, y) < loss.delta
            if i != j and same == near:
                constant += (-1 if same else 1) * loss.delta**-loss.alpha
            elif i != j:
                forces += 1
    return constant / len(embeddings), forces


@pytest.mark.parametrize("alpha, delta", [(3.0, 0.2), (3.0, 0.3), (1.0, 0.1), (4.5, 0.25)])
def test_energy_is_the_published_sum_less_its_constants(alpha, delta):
    loss, embeddings, labels = crowded(alpha, delta)
    constant, forces = forceless(loss, embeddings, labels)
    assert constant != 0 and forces > 0
    value = loss(embeddings, labels)
    assert value.item() == pytest.approx(oracle(loss, embeddings, labels) - constant, rel=1e-9)


@pytest.mark.parametrize("alpha, delta", [(3.0, 0.2), (2.0, 0.3)])
def test_gradients_are_those_of_the_published_energy(alpha, delta):
    """Central differences of the double loop in every coordinate of embeddings (off the sphere too) and proxies."""
    loss, embeddings, labels = crowded(alpha, delta)
    embeddings.requires_grad_()
    loss(embeddings, labels).backward()
    step = 1e-6
    for leaf, gradient in ((embeddings.data, embeddings.grad), (loss.proxies.data, loss.proxies.grad)):
        numeric = torch.zeros_like(leaf)
        for index in range(leaf.numel()):
            flat, original = leaf.view(-1), leaf.view(-1)[index].item()
            sides = []
            for moved in (original + step, original - step):
                flat[index] = moved
                sides.append(oracle(loss, embeddings.data, labels))
            flat[index] = original
            numeric.view(-1)[index] = (sides[0] - sides[1]) / (2 * step)
        assert gradient.abs().max() > 1
        torch.testing.assert_close(gradient, numeric, rtol=1e-5, atol=1e-4)


def two_points(angle: float, labels: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Two unit vectors at `angle`, whose proxies sit on the third axis. Returns how far a descent step moves the first
    towards the second, and the gradient."""
    loss = PotentialField(2, 3, proxies_per_class=1).double()
    loss.proxies.data = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, -1.0]], dtype=torch.float64)
    x = torch.tensor(
        [[1.0, 0.0, 0.0], [math.cos(angle), math.sin(angle), 0.0]], dtype=torch.float64, requires_grad=True
    )
    loss(x, torch.tensor(labels)).backward()
    return -x.grad[0, 1], x.grad


@pytest.mark.parametrize(
    "angle, labels, direction",
    [(0.5, [0, 0], 1), (0.1, [0, 0], 0), (0.1, [0, 1], -1), (0.5, [0, 1], 0), (0.005, [0, 1], -1)],
)
def test_who_attracts_and_who_repels(angle, labels, direction):
    towards, gradient = two_points(angle, labels)
    assert torch.sign(towards).item() == direction
    assert gradient.isfinite().all()


def test_nearer_than_resolved_follows_the_tangent():
    above, below = (
        two_points(2 * math.asin(d / 2), [0, 1])[0].item() for d in (RESOLVED * 1.000001, RESOLVED * 0.999999)
    )
    assert above == pytest.approx(below, rel=1e-4)
    half = two_points(RESOLVED / 2, [0, 1])[0].item()
    assert half == pytest.approx(below / 2, rel=1e-3)


@pytest.mark.parametrize("labels", [[0, 0], [0, 1]])
def test_coinciding_points_stay_finite(labels):
    embeddings = F.normalize(torch.randn(1, 8), dim=1).repeat(2, 1).requires_grad_()
    loss = PotentialField(2, 8)
    loss(embeddings, torch.tensor(labels)).backward()
    assert embeddings.grad.isfinite().all() and loss.proxies.grad.isfinite().all()


def test_fp32_at_a_hundred_classes_keeps_the_signal():
    """A small move of one embedding must show in the fp32 value as in fp64, and the gradients must agree."""
    torch.manual_seed(0)
    loss = PotentialField(100, 64)
    embeddings, labels = F.normalize(torch.randn(64, 64), dim=1), torch.arange(64) % 16
    moved = embeddings.clone()
    moved[0] = F.normalize(moved[0] + 0.1 * (moved[16] - moved[0]), dim=0)
    change, gradient = [], []
    for dtype in (torch.float32, torch.float64):
        loss, leaf = loss.to(dtype), embeddings.to(dtype).requires_grad_()
        energy = loss(leaf, labels)
        gradient.append(torch.autograd.grad(energy, [leaf, loss.proxies]))
        change.append((loss(moved.to(dtype), labels) - energy).item())
    assert change[0] == pytest.approx(change[1], rel=0.05) and change[1] < 0
    for single, double in zip(*gradient, strict=True):
        torch.testing.assert_close(single.double(), double, rtol=1e-3, atol=1e-5)


def test_autocast_does_not_reach_the_distances():
    loss, embeddings, labels = crowded()
    loss, embeddings = loss.float(), embeddings.float()
    plain = loss(embeddings, labels)
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss(embeddings, labels)
    assert inside.dtype == torch.float32 and torch.equal(inside, plain)
