"""The published losses by name, against plain formulas in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from saga_fast.losses import METRIC_LOSSES, metric_loss
from saga_fast.utils.errors import InputError


def batch(dim: int = 6) -> tuple[torch.Tensor, torch.Tensor, list[list[float]]]:
    torch.manual_seed(1)
    embeddings = F.normalize(torch.randn(8, dim, dtype=torch.float64), dim=1)
    return embeddings, torch.arange(8) % 4, (embeddings @ embeddings.T).tolist()


def test_multi_similarity_formula():
    embeddings, labels, cosine = batch()
    total = 0.0
    for i in range(8):
        positive = [math.exp(-2 * (cosine[i][j] - 0.5)) for j in range(8) if j != i and labels[i] == labels[j]]
        negative = [math.exp(50 * (cosine[i][j] - 0.5)) for j in range(8) if labels[i] != labels[j]]
        total += math.log1p(sum(positive)) / 2 + math.log1p(sum(negative)) / 50
    assert metric_loss("multi-similarity", 4, 6)(embeddings, labels).item() == pytest.approx(total / 8, rel=1e-6)


def test_nt_xent_formula():
    embeddings, labels, cosine = batch()
    terms = []
    for i in range(8):
        negative = sum(math.exp(cosine[i][j] / 0.07) for j in range(8) if labels[i] != labels[j])
        for j in range(8):
            if j != i and labels[i] == labels[j]:
                positive = math.exp(cosine[i][j] / 0.07)
                terms.append(-math.log(positive / (positive + negative)))
    assert metric_loss("nt-xent", 4, 6)(embeddings, labels).item() == pytest.approx(sum(terms) / len(terms), rel=1e-6)


def test_proxy_anchor_formula():
    embeddings, labels, _ = batch()
    loss = metric_loss("proxy-anchor", 5, 6).double()  # the fifth class is not in the batch
    cosine = (embeddings @ F.normalize(loss.proxies.data, dim=1).T).tolist()
    positive = [sum(math.exp(-32 * (cosine[i][c] - 0.1)) for i in range(8) if labels[i] == c) for c in range(5)]
    negative = [sum(math.exp(32 * (cosine[i][c] + 0.1)) for i in range(8) if labels[i] != c) for c in range(5)]
    expected = sum(map(math.log1p, positive)) / 4 + sum(map(math.log1p, negative)) / 5
    assert loss(embeddings, labels).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", METRIC_LOSSES)
def test_every_loss_is_a_scalar_with_gradients(name):
    embeddings, labels, _ = batch()
    embeddings = embeddings.float().requires_grad_()
    loss = metric_loss(name, 4, 6)
    value = loss(embeddings, labels)
    value.backward()
    assert value.shape == () and embeddings.grad.isfinite().all() and embeddings.grad.any()
    proxies = list(loss.parameters())
    assert len(proxies) == (name in ("potential-field", "proxy-anchor"))
    assert all(p.grad.any() for p in proxies)


def test_settings_reach_the_loss():
    assert metric_loss("potential-field", 3, 4, delta=0.3, proxies_per_class=2).proxies.shape == (6, 4)
    embeddings, labels, _ = batch()
    sharp, soft = (metric_loss("nt-xent", 4, 6, temperature=t)(embeddings, labels) for t in (0.05, 1.0))
    assert sharp != soft


def test_unknown_name_lists_the_known():
    with pytest.raises(InputError, match="triplet.*potential-field, proxy-anchor, multi-similarity, nt-xent"):
        metric_loss("triplet", 3, 4)
