"""Retrieval metrics: every image queries all the others, and the nearest should be of its class.

Pure functions of embeddings and labels. Recall@K, R-precision and MAP@R are those of "A Metric Learning Reality Check"
(Musgrave et al., 2020); NMI is of k-means with one cluster per class, normalised by the arithmetic mean of the
entropies. Of equally near images, the one that comes first in the data set ranks first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import faiss
import numpy as np
import torch
from torch import Tensor

KS = (1, 2, 4, 8)
NEIGHBOUR_BYTES = 2**30  # largest size of the neighbours of all rows


class Scores(NamedTuple):
    """Results of Q queries. queries: rows of the embeddings; first: the row of the nearest neighbour of each."""

    queries: Tensor  # int64 (Q,)
    first: Tensor  # int64 (Q,)
    hits: Tensor  # bool (Q, number of ks): whether one of its class is among the first K
    r_precision: Tensor  # float64 (Q,)
    average_precision: Tensor  # float64 (Q,), at R


def retrieval_metrics(
    embeddings: Tensor, labels: Tensor, ks: Sequence[int] = KS, chunk: int = 1024, seed: int = 0
) -> dict[str, float]:
    """`recall_at_K` for each K, `map_at_r`, `r_precision` and `nmi`, each in [0, 1]; arguments as of `retrieve`."""
    return summary(retrieve(embeddings, labels, ks, chunk), ks) | {"nmi": nmi(embeddings, labels, seed)}


def retrieve(embeddings: Tensor, labels: Tensor, ks: Sequence[int] = KS, chunk: int = 1024) -> Scores:
    """Every image queries all the others, in fp32 and exactly.

    embeddings: (n, d), unit vectors; labels: (n,) integers. Images alone in their class are no queries, but stay in the
    gallery. chunk: rows whose similarities to all are in memory at once. Raises ValueError if an
    embedding is not finite or no query has a match.
    """
    if broken := int((~embeddings.isfinite()).any(1).sum()):
        raise ValueError(f"embeddings: {broken} of {len(embeddings)} rows are not finite")
    labels = labels.to(embeddings.device)
    _, classes, sizes = torch.unique(labels, return_inverse=True, return_counts=True)
    matches = sizes[classes] - 1
    if not matches.any():
        raise ValueError("labels: no class has two members, so no query has a match")
    depth = min(max(*ks, int(matches.max())), len(labels) - 1)
    rank = torch.arange(1, depth + 1, device=embeddings.device)
    parts = []
    for rows, found in neighbours(embeddings, depth, chunk):
        is_query = matches[rows] > 0
        rows, found, wanted = rows[is_query], found[is_query], matches[rows][is_query]
        right = labels[found] == labels[rows, None]
        within = right & (rank <= wanted[:, None])
        parts.append(
            Scores(
                rows,
                found[:, 0],
                torch.stack([right[:, :k].any(1) for k in ks], 1),
                within.sum(1) / wanted.double(),
                (within * within.cumsum(1) / rank.double()).sum(1) / wanted,
            )
        )
    return Scores(*(torch.cat(columns).cpu() for columns in zip(*parts)))


def summary(scores: Scores, ks: Sequence[int] = KS) -> dict[str, float]:
    """The means over the queries: `recall_at_K` for each K, `map_at_r`, `r_precision`."""
    return {
        **{f"recall_at_{k}": share for k, share in zip(ks, scores.hits.double().mean(0).tolist(), strict=True)},
        "map_at_r": scores.average_precision.mean().item(),
        "r_precision": scores.r_precision.mean().item(),
    }


def nmi(embeddings: Tensor, labels: Tensor, seed: int = 0) -> float:
    """Normalised mutual information of `labels` and as many clusters by seeded k-means."""
    from sklearn.metrics import normalized_mutual_info_score  # a second to import, and needed only here

    return float(normalized_mutual_info_score(labels.cpu(), kmeans(embeddings, len(labels.unique()), seed)))


def neighbours(embeddings: Tensor, k: int, chunk: int = 1024) -> Iterator[tuple[Tensor, Tensor]]:
    """(rows (c,), found (c, k)), both int64: for each row the k others of largest inner product, best first.

    Chunk by chunk, in order. Exact; of equal products the lower index comes first, at the k-th place too. Each product
    of two rows is computed once and serves both, as long as the neighbours of all rows fit in
    `NEIGHBOUR_BYTES` bytes.
    """
    n, device = len(embeddings), embeddings.device
    once = 12 * n * k <= NEIGHBOUR_BYTES
    best = embeddings.new_full((n if once else 0, k), -torch.inf)
    found = torch.zeros(best.shape, dtype=torch.int64, device=device)
    for rows in torch.arange(n, device=device).split(chunk):
        start, stop = int(rows[0]), int(rows[-1]) + 1
        first = start if once else 0
        similarity = embeddings[start:stop] @ embeddings[first:].T
        similarity[rows - start, rows - first] = -torch.inf  # the query itself, by its index
        yield rows, _merge(best[start:stop], found[start:stop], similarity, first)[1]
        if once and stop < n:
            best[stop:], found[stop:] = _merge(best[stop:], found[stop:], similarity[:, stop - start :].T, start)


def _merge(best: Tensor, found: Tensor, similarity: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """The k largest, and their indices, of those found so far and of the `similarity` to rows `first`, first + 1, …

    best, found: (m, k), of rows below `first`, or empty at the start; similarity: (m, c).
    """
    k, known = best.shape[1], len(best) > 0
    values = torch.cat([best, similarity], 1) if known else similarity
    places = _largest(values, k)
    best = values.gather(1, places)
    if not known:
        return best, places + first
    return best, torch.where(places < k, found.gather(1, places.clamp(max=k - 1)), places - k + first)


def _largest(values: Tensor, k: int) -> Tensor:
    """int64 (m, k): where the k largest of each row of (m, c) are, best first, of equals the lower place first."""
    found = values.topk(k).indices.sort(1).values
    found = found.gather(1, values.gather(1, found).sort(dim=1, descending=True, stable=True).indices)
    # topk takes any of those that tie for the last place: where more tie than fit, sort the whole row
    last = values.gather(1, found[:, -1:])
    tied = ((values >= last).sum(1) > k).nonzero().squeeze(1)
    found[tied] = values[tied].sort(dim=1, descending=True, stable=True).indices[:, :k]
    return found


def kmeans(embeddings: Tensor, clusters: int, seed: int = 0) -> Tensor:
    """int64 (n,): the cluster of each row by faiss's k-means from seeded random rows, no row left out.

    It runs on all GPUs where faiss was built for them, else on the CPU.
    """
    points = np.ascontiguousarray(embeddings.detach().float().cpu().numpy())
    means = faiss.Kmeans(
        points.shape[1],
        clusters,
        seed=seed,
        gpu=faiss.get_num_gpus() > 0,
        min_points_per_centroid=1,
        max_points_per_centroid=len(points),
    )
    means.train(points)
    return torch.from_numpy(means.index.search(points, 1)[1][:, 0])
