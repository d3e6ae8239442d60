"""L_con against loops, and what it asks of blocks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from saga_fast.losses.contrast import TEMPERATURE, attribute_contrast


def test_contrast_is_a_loop_over_attributes_and_images():
    torch.manual_seed(0)
    blocks = F.normalize(torch.randn(5, 3, 4, dtype=torch.float64), dim=-1)
    alike = torch.rand(3, 5, 5, dtype=torch.float64)
    alike = alike + alike.transpose(1, 2)
    alike[1, 2] = alike[1, :, 2] = 0  # image 2 was not described
    losses = []
    for m in range(3):
        for i in range(5):
            others = [j for j in range(5) if j != i]
            wanted = [alike[m, i, j].item() for j in others]
            if not sum(wanted):
                continue
            near = [math.exp(float(blocks[i, m] @ blocks[j, m]) / TEMPERATURE) for j in others]
            losses.append(-sum(w / sum(wanted) * math.log(n / sum(near)) for w, n in zip(wanted, near)))
    assert len(losses) == 14
    assert attribute_contrast(blocks, alike).item() == pytest.approx(sum(losses) / 14, rel=1e-12)


def test_descent_draws_together_what_is_said_to_be_alike():
    torch.manual_seed(0)
    raw = torch.randn(4, 1, 3, requires_grad=True)
    same = torch.tensor([[[1.0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]])
    before = attribute_contrast(F.normalize(raw, dim=-1), same).item()
    for _ in range(500):
        raw.grad = None
        attribute_contrast(F.normalize(raw, dim=-1), same).backward()
        raw.data -= 0.1 * raw.grad
    blocks = F.normalize(raw.detach(), dim=-1)[:, 0]
    cosines = blocks @ blocks.T
    assert min(cosines[0, 1], cosines[2, 3]) > cosines[:2, 2:].max() + 0.5
    assert attribute_contrast(blocks[:, None], same).item() < 0.05 < before


def test_nothing_said_asks_for_nothing():
    raw = torch.randn(3, 2, 4, requires_grad=True)
    loss = attribute_contrast(F.normalize(raw, dim=-1), torch.zeros(2, 3, 3))
    loss.backward()
    assert loss.item() == 0 and raw.grad.abs().max() == 0
