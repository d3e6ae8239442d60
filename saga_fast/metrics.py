"""Retrieval metrics: every image queries all the others, and the nearest should be of its class.

Pure functions of embeddings and labels. Recall@K, R-precision and MAP@R are those of "A Metric Learning Reality Check"
(Musgrave et al., 2020); NMI is of k-means with a cluster a class, normalised by the arithmetic mean of the entropies.
"""

from __future__ import annotations

from collections.abc import Sequence

import faiss
import numpy as np
import torch
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor


def retrieval_metrics(
    embeddings: Tensor, labels: Tensor, ks: Sequence[int] = (1, 2, 4, 8), chunk: int = 1024, seed: int = 0
) -> dict[str, float]:
    """`recall_at_K` for each K, `map_at_r`, `r_precision` and `nmi`, each in [0, 1].

    embeddings: (n, d), unit vectors; labels: (n,) integers. Images alone in their class have nothing to find: they are
    no queries, but stay in the gallery and the NMI. chunk: queries whose (chunk, n) similarities are held at once.
    Raises ValueError if an embedding is not finite or no query has a match.
    """
    if broken := int((~embeddings.isfinite()).any(1).sum()):
        raise ValueError(f"embeddings: {broken} of {len(embeddings)} rows are not finite")
    labels = labels.to(embeddings.device)
    _, classes, sizes = torch.unique(labels, return_inverse=True, return_counts=True)
    matches = sizes[classes] - 1
    queries = matches.nonzero().squeeze(1)
    if not len(queries):
        raise ValueError("labels: no class has two members, so no query has a match")
    depth = min(max(*ks, int(matches.max())), len(labels) - 1)
    rank = torch.arange(1, depth + 1, device=embeddings.device)

    recalls, precision, average = torch.zeros(len(ks), dtype=torch.float64), 0.0, 0.0
    for rows in queries.split(chunk):
        right = labels[nearest(embeddings, rows, depth)] == labels[rows, None]
        recalls += torch.tensor([right[:, :k].any(1).sum().item() for k in ks])
        within = right & (rank <= matches[rows, None])
        precision += (within.sum(1) / matches[rows].double()).sum().item()
        average += ((within * within.cumsum(1) / rank.double()).sum(1) / matches[rows]).sum().item()
    return {
        **{f"recall_at_{k}": recall / len(queries) for k, recall in zip(ks, recalls.tolist(), strict=True)},
        "map_at_r": average / len(queries),
        "r_precision": precision / len(queries),
        "nmi": float(normalized_mutual_info_score(classes.cpu(), kmeans(embeddings, len(sizes), seed))),
    }


def nearest(embeddings: Tensor, rows: Tensor, k: int) -> Tensor:
    """int64 (R, k): for each query row, the k other rows of largest inner product, best first.

    embeddings: (n, d); rows: (R,) int64. Exact; of equal products the lower index comes first, at the k-th place too.
    """
    similarity = embeddings[rows] @ embeddings.T
    similarity[torch.arange(len(rows), device=rows.device), rows] = -torch.inf
    found = similarity.topk(k).indices.sort(1).values
    found = found.gather(1, similarity.gather(1, found).sort(dim=1, descending=True, stable=True).indices)
    # topk takes any of those that tie for the last place: where more tie than fit, sort the whole row
    last = similarity.gather(1, found[:, -1:])
    tied = ((similarity >= last).sum(1) > k).nonzero().squeeze(1)
    found[tied] = similarity[tied].sort(dim=1, descending=True, stable=True).indices[:, :k]
    return found


def kmeans(embeddings: Tensor, clusters: int, seed: int = 0) -> Tensor:
    """int64 (n,): the cluster of each row by faiss's k-means from seeded random rows, no row left out, on the CPU."""
    points = np.ascontiguousarray(embeddings.detach().float().cpu().numpy())
    means = faiss.Kmeans(
        points.shape[1], clusters, seed=seed, min_points_per_centroid=1, max_points_per_centroid=len(points)
    )
    means.train(points)
    return torch.from_numpy(means.index.search(points, 1)[1][:, 0])
