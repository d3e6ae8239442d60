"""Retrieval metrics against pytorch-metric-learning, scikit-learn and counting by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from sklearn.metrics import normalized_mutual_info_score
from torch.nn.functional import normalize

from saga_fast.retrieval import metrics
from saga_fast.retrieval.metrics import kmeans, neighbours, retrieval_metrics


def clouds(sizes: list[int], dim: int, spread: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=generator)]
    means = torch.randn(len(sizes), dim, generator=generator)
    return normalize(means[labels] + spread * torch.randn(len(labels), dim, generator=generator), dim=1), labels


@pytest.mark.parametrize("sizes", [[6] * 20, [2, 3, 5, 9, 17, 4], [1, 1, 4, 7, 3]])
@pytest.mark.parametrize("chunk", [7, 1024])
def test_agrees_with_pytorch_metric_learning(sizes, chunk):
    embeddings, labels = clouds(sizes, dim=8, spread=0.8)
    ours = retrieval_metrics(embeddings, labels, chunk=chunk)
    theirs = AccuracyCalculator(
        include=("precision_at_1", "mean_average_precision_at_r", "r_precision", "NMI"),
        k="max_bin_count",
        knn_func=CustomKNN(CosineSimilarity()),
        kmeans_func=kmeans,
        device=torch.device("cpu"),
    ).get_accuracy(embeddings, labels)
    assert ours["recall_at_1"] == pytest.approx(theirs["precision_at_1"])
    assert ours["map_at_r"] == pytest.approx(theirs["mean_average_precision_at_r"])
    assert ours["r_precision"] == pytest.approx(theirs["r_precision"])
    assert 0.1 < ours["map_at_r"] < ours["recall_at_1"] < 1  # the case separates the metrics
    assert ours["nmi"] == pytest.approx(theirs["NMI"])


def test_recall_counts_any_match_among_the_first_k():
    embeddings, labels = clouds([4] * 12, dim=6, spread=1.0)
    ours = retrieval_metrics(embeddings, labels, ks=(1, 2, 4, 8))
    similarity = (embeddings.double() @ embeddings.double().T).numpy()
    for k in (1, 2, 4, 8):
        hits = 0
        for query in range(len(labels)):
            others = sorted((i for i in range(len(labels)) if i != query), key=lambda i: -similarity[query, i])
            hits += any(labels[i] == labels[query] for i in others[:k])
        assert ours[f"recall_at_{k}"] == pytest.approx(hits / len(labels))


def test_separated_classes_score_one_and_labels_are_only_names():
    embeddings, labels = clouds([5] * 8, dim=32, spread=0.01)
    scores = retrieval_metrics(embeddings, labels * 1000 - 7)
    assert scores.pop("nmi") > 0.8  # k-means may start with two centers in one cloud
    assert scores == pytest.approx(dict.fromkeys(scores, 1.0))


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_ties_go_to_the_lower_index_also_at_the_last_place(chunk):
    embeddings = torch.eye(4)[[0, 1, 0, 0, 1, 0, 2, 0]]

    def nearest(k: int) -> list[list[int]]:
        return torch.cat([found for _, found in neighbours(embeddings, k, chunk)])[[2, 4, 6]].tolist()

    assert nearest(3) == [[0, 3, 5], [1, 0, 2], [0, 1, 2]]
    assert nearest(7) == [
        [0, 3, 5, 7, 1, 4, 6],
        [1, 0, 2, 3, 5, 6, 7],
        [0, 1, 2, 3, 4, 5, 7],
    ]


@pytest.mark.parametrize("kept", [0, 2**30])
@pytest.mark.parametrize("chunk,k", [(1, 4), (16, 5), (16, 30), (64, 63), (100, 9)])
def test_neighbours_are_those_of_a_stable_sort(monkeypatch, chunk, k, kept):
    """On a grid of few values, so that many products tie, exactly."""
    monkeypatch.setattr(metrics, "NEIGHBOUR_BYTES", kept)
    embeddings = torch.randint(-1, 2, (64, 4), generator=torch.Generator().manual_seed(k)).float()
    similarity = (embeddings @ embeddings.T).numpy()
    for rows, found in neighbours(embeddings, k, chunk):
        for row, indices in zip(rows.tolist(), found.tolist()):
            assert indices == sorted(set(range(64)) - {row}, key=lambda i: (-similarity[row, i], i))[:k]


def test_a_query_is_masked_by_its_index_not_by_its_similarity():
    embeddings = normalize(torch.tensor([[1.0, 0], [1, 0], [1, 0.1], [0, 1]]), dim=1)
    scores = retrieval_metrics(embeddings, torch.tensor([0, 0, 1, 1]), ks=(1,))
    assert scores["recall_at_1"] == 0.5 + 0.25  # the twins find each other; 3 finds 2, 2 finds a twin


def test_kmeans_is_seeded_and_leaves_no_row_out():
    embeddings, labels = clouds([3] * 60, dim=8, spread=0.3)
    first, again, other = (kmeans(embeddings, 60, seed) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert normalized_mutual_info_score(labels, first) > 0.8
    means = np.stack([embeddings[first == c].mean(0) for c in first.unique()])
    assert np.array_equal(
        ((embeddings.numpy()[:, None] - means) ** 2).sum(2).argmin(1), np.unique(first, return_inverse=True)[1]
    )


def test_refuses_what_has_no_score():
    embeddings, labels = clouds([2, 2], dim=4, spread=0.1)
    with pytest.raises(ValueError, match="no class has two"):
        retrieval_metrics(embeddings, torch.arange(4))
    embeddings[2, 1] = float("nan")
    with pytest.raises(ValueError, match="1 of 4 rows are not finite"):
        retrieval_metrics(embeddings, labels)
