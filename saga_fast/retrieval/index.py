"""A folder of vectors that can be searched, on disk and in faiss.

    index.faiss   the faiss index, by inner product; its row i is file i
    vectors.npy   float32 (n, D_e): the unit vectors themselves, from which an index of any kind is made
    files.json    `files`: [path, size in bytes, mtime in ns] each, sorted by path
    index.json    the encoder's folder and SHA-256, the kind of faiss index, the SHA-256 of the other files, and where
                  the encoder has attributes, how many numbers of a vector are each one's

It is written to a staging folder and renamed, so a kill or a full disk leaves the earlier one intact.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import faiss
import numpy as np
from faiss.contrib.exhaustive_search import knn_ground_truth

from saga_fast.utils.errors import InputError
from saga_fast.utils.files import hidden, is_litter, recover, replace, sha256

FORMAT = 1
INFO_FILE, FAISS, VECTORS, FILES = "index.json", "index.faiss", "vectors.npy", "files.json"
EXACT_BELOW = 100_000  # vectors: fewer are searched exhaustively
BLOCK = 2**16  # vectors handed to faiss at once
FIRST_EFFORT = 4  # initial search effort of `nearest`, in multiples of the tuned one
TARGET_RECALL = 0.97  # recall@10 of exact search, on a sample of the vectors


class File(NamedTuple):
    """An indexed file. size: bytes, mtime: ns since 1970, both when it was embedded."""

    path: str
    size: int
    mtime: int


class IndexEncoder(NamedTuple):
    """The encoder of an index. source: its folder or hub id; blocks: see `IndexInfo`."""

    source: str
    sha256: str
    embedding_dim: int
    blocks: dict[str, int] | None


class IndexInfo(NamedTuple):
    """The content of index.json.

    kind: faiss's factory string; asked: the factory string that the user gave, None by default; blocks: attribute ->
    numbers of a vector, in order, None where the encoder has no attributes or the index is older than they are.
    """

    encoder: str
    encoder_sha256: str
    kind: str
    asked: str | None
    sha256: dict[str, str]
    blocks: dict[str, int] | None = None


def read_info(folder: Path) -> IndexInfo | None:
    """The index.json of the index in `folder`, None if there is none. Raises InputError for a folder that is no
    index."""
    recover(folder)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    path = folder / INFO_FILE
    if not path.is_file():
        raise InputError(f"--index: {str(folder)!r} is there and holds no {INFO_FILE}, so it is no index; name another")
    try:
        content = json.loads(path.read_bytes())
        version = content.pop("format")
        if version != FORMAT:
            raise InputError(
                f"{str(path)!r}: format {version!r}, this version reads {FORMAT}; embed into another folder"
            )
        info = IndexInfo(**content)
        if not set(info.sha256) == {FAISS, VECTORS, FILES}:
            raise KeyError
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{str(path)!r}: damaged, or no index's; delete the folder and embed again") from error
    return info


def others_in(folder: Path) -> list[str]:
    """Names in an index's folder that are not its own, sorted."""
    own = {INFO_FILE, FAISS, VECTORS, FILES}
    return sorted(path.name for path in folder.iterdir() if path.name not in own and not is_litter(path.name))


def read_files(folder: Path, info: IndexInfo) -> list[File]:
    """The indexed files; row i of the vectors is file i. Raises InputError, naming the file, if it is damaged."""
    path = _verified(folder, FILES, info)
    return [File(*file) for file in json.loads(path.read_bytes())["files"]]


def read_vectors(folder: Path, info: IndexInfo) -> np.ndarray:
    """float32 (n, D_e), mapped into memory. Raises InputError, naming the file, if it is damaged."""
    return np.load(_verified(folder, VECTORS, info), mmap_mode="r")


def exact_vectors(index: faiss.Index) -> np.ndarray | None:
    """float32 (n, D_e): the vectors of an exact index, in its own memory, as long as it lives; None for any other."""
    flat = faiss.downcast_index(index)
    if not isinstance(flat, faiss.IndexFlat):
        return None
    return faiss.rev_swig_ptr(flat.get_xb(), flat.ntotal * flat.d).reshape(flat.ntotal, flat.d)


def nearest(index: faiss.Index, vectors: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(products float32, rows int64), both (Q, k): the rows of largest inner product with queries (Q, D_e) of any kind.

    For queries that are distributed otherwise than the vectors, as weighted ones: an approximate index is tuned for
    queries like the vectors. An exact index needs nothing more. Any other gives candidates, whose products are computed
    from `vectors`; a query is repeated with twice the cells (of an inverted file) or steps (of HNSW) and twice the
    candidates until its nearest 2k do not change (the k alone stay equal too often with one missing), or until an
    exhaustive search is cheaper.
    """
    if exact_vectors(index) is not None:
        return index.search(queries, k)
    ivf = faiss.try_extract_index_ivf(index)
    limit = min(len(vectors) / (8 * k), ivf.nlist / ivf.nprobe if ivf is not None else np.inf)
    products, rows = np.full((len(queries), 2 * k), -np.inf, np.float32), np.full((len(queries), 2 * k), -1)
    # pytorch-metric-learning, where it is imported, puts a search for tensors, without `params`, in place of faiss's.
    search = getattr(index, "search_numpy", index.search)
    unsettled, effort = np.arange(len(queries)), FIRST_EFFORT
    while len(unsettled) and effort < limit:
        _, found = search(queries[unsettled], k * effort, params=_parameters(index, effort, k * effort))
        for query, candidates in zip(unsettled.tolist(), found):
            candidates = candidates[candidates >= 0]
            exact = vectors[candidates] @ queries[query]
            best = np.argsort(-exact, kind="stable")[: 2 * k]
            previous = set(rows[query].tolist())
            rows[query, : len(best)], products[query, : len(best)] = candidates[best], exact[best]
            if previous == set(rows[query].tolist()):
                unsettled = unsettled[unsettled != query]
        effort *= 2
    products, rows = products[:, :k], rows[:, :k]
    if len(unsettled):
        products[unsettled], rows[unsettled] = _compare_all(vectors, queries[unsettled], k)
    return products, rows


def _compare_all(vectors: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(products, rows) of the k largest. As faiss's `knn_ground_truth`, which copies the vectors first."""
    heap = faiss.ResultHeap(len(queries), k, keep_max=True)
    for start, block in zip(range(0, len(vectors), BLOCK), _blocks(vectors)):
        products, rows = faiss.knn(queries, block, min(k, len(block)), metric=faiss.METRIC_INNER_PRODUCT)
        heap.add_result(products, rows + start)
    heap.finalize()
    return heap.D, heap.I


def _parameters(index: faiss.Index, effort: int, count: int) -> faiss.SearchParameters | None:
    """faiss's parameters of a search with `effort` times the index's own effort; None where faiss has none."""
    kind, make = faiss.downcast_index(index), cast(Any, faiss)  # its stubs know neither all of these nor their keywords
    if isinstance(kind, faiss.IndexPreTransform):
        inner = _parameters(kind.index, effort, count)
        return make.SearchParametersPreTransform(index_params=inner) if inner else None
    if isinstance(kind, faiss.IndexIVF):
        return make.SearchParametersIVF(nprobe=min(effort * kind.nprobe, kind.nlist))
    if isinstance(kind, faiss.IndexHNSW):
        return make.SearchParametersHNSW(efSearch=max(count, effort * kind.hnsw.efSearch))
    return None


def read_faiss(folder: Path, info: IndexInfo) -> faiss.Index:
    """The faiss index. Raises InputError, naming the file, if it is damaged."""
    return faiss.read_index(str(_verified(folder, FAISS, info)))


def write(
    folder: Path,
    encoder: IndexEncoder,
    files: list[File],
    parts: Iterable[tuple[np.ndarray, np.ndarray]],
    factory: str | None = None,
) -> str:
    """Write the index of `files`, in place of the one in `folder` if there is one; returns a line about its kind.

    parts: (rows (m,), vectors (m, D_e)) that together fill rows 0 to n-1; factory: faiss's own description of the kind
    of index, by default chosen by n. Raises InputError for a bad factory, and OSError where the disk is full; an
    earlier index is then unchanged.
    """
    staging = hidden(folder, "partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        shape = (len(files), encoder.embedding_dim)
        vectors = np.lib.format.open_memmap(staging / VECTORS, mode="w+", dtype=np.float32, shape=shape)
        with open(staging / VECTORS, "r+b") as file:  # a disk that fills up under a memory map kills the process
            os.posix_fallocate(file.fileno(), 0, os.path.getsize(file.name))
        for rows, values in parts:
            vectors[rows] = values
        vectors.flush()
        kind, line, index = build(vectors, factory)
        try:
            faiss.write_index(index, str(staging / FAISS))
        except RuntimeError as error:
            raise OSError(f"faiss: {_cause(error)}") from error
        (staging / FILES).write_text(json.dumps({"files": files}))
        hashes = {name: sha256(staging / name) for name in (FAISS, VECTORS, FILES)}
        info = IndexInfo(encoder.source, encoder.sha256, kind, factory, hashes, encoder.blocks)._asdict()
        (staging / INFO_FILE).write_text(json.dumps({"format": FORMAT, **info}, indent=2) + "\n")
        replace(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return line


def choose(count: int) -> str:
    """faiss's description of the kind of index for `count` vectors.

    From `EXACT_BELOW` on an inverted file of 4√n cells, rounded to a power of two. HNSW takes longer to build, and an
    inverted file can be tuned after it is built.
    """
    return "Flat" if count < EXACT_BELOW else f"IVF{2 ** round(np.log2(4 * count**0.5))},Flat"


def build(vectors: np.ndarray, factory: str | None = None) -> tuple[str, str, faiss.Index]:
    """(factory, a line that explains the index, the index) of vectors (n, d). Raises InputError for a bad `factory`."""
    kind = factory or choose(len(vectors))
    index = make(kind, vectors.shape[1])
    ivf = faiss.try_extract_index_ivf(index)
    try:
        if ivf is not None:
            ivf.cp.max_points_per_centroid = 64  # a quarter of faiss's own: cells need not be that exact
        if not index.is_trained:
            index.train(np.ascontiguousarray(_sample(vectors, 64 * ivf.nlist if ivf is not None else BLOCK)))
        for block in _blocks(vectors):
            index.add(block)
    except RuntimeError as error:
        raise InputError(
            f"--faiss: {kind!r} cannot be trained on {len(vectors):,} vectors ({_cause(error)}); "
            "embed more images, or leave it out"
        ) from error
    count = f"{len(vectors):,} vector{'s' * (len(vectors) != 1)}"
    if ivf is None:
        why = "exact, every vector is compared" if kind == "Flat" else "as asked"
        return kind, f"{count}, faiss {kind}: {why}", index
    recall = _tune(index, ivf, vectors)
    line = f"{ivf.nprobe} of {ivf.nlist} cells are searched, which finds {recall:.1%} of the 10 nearest (on a sample)"
    return kind, f"{count}, faiss {kind}: {line}", index


def make(kind: str, dimension: int) -> faiss.Index:
    """The empty index that the factory string `kind` describes. Raises InputError if it describes none."""
    try:
        index = faiss.index_factory(dimension, kind, faiss.METRIC_INNER_PRODUCT)
        if isinstance(index, faiss.IndexPreTransform):
            chain: Any = index.chain  # a std::vector, which faiss declares as a list
            steps = [faiss.downcast_VectorTransform(chain.at(i)) for i in range(chain.size())]
            inner = faiss.downcast_index(index.index)
        else:
            steps, inner = [], index
        if any(isinstance(step, faiss.PCAMatrix | faiss.ITQTransform | faiss.CenteringTransform) for step in steps):
            raise RuntimeError("it takes the mean away, after which inner products rank otherwise; OPQ keeps them")
        if isinstance(inner, faiss.IndexIDMap):
            raise RuntimeError("its vectors have numbers of their own, where a row is a file's")
    except RuntimeError as error:
        raise InputError(
            f"--faiss: {kind!r} describes no index of vectors of {dimension} numbers ({_cause(error)}); "
            "give a factory string of faiss, such as Flat, HNSW32 or IVF4096,SQ8, or leave it out"
        ) from error
    return index


def _cause(error: RuntimeError) -> str:
    """faiss's message without its source location."""
    return re.sub(r"^.*?\.cpp:\d+: (Error: )?", "", " ".join(str(error).split()))


def _tune(index: faiss.Index, ivf: faiss.IndexIVF, vectors: np.ndarray, sample: int = 256, k: int = 10) -> float:
    """Sets `nprobe` to the least power of two that reaches `TARGET_RECALL`, or to all cells; the recall then.

    Measured on a sample of the vectors, each searched for without itself.
    """
    queries = np.ascontiguousarray(_sample(vectors, sample))
    rows = _sample(np.arange(len(vectors)), sample)
    _, exact = knn_ground_truth(queries, _blocks(vectors), k + 1, faiss.METRIC_INNER_PRODUCT)
    exact = [set(found[found != row][:k]) for found, row in zip(exact, rows)]
    ivf.nprobe = 1
    while True:
        _, found = index.search(queries, k + 1)
        hits = [len(near & set(row)) for near, row in zip(exact, found)]
        recall = sum(hits) / sum(map(len, exact))
        if recall >= TARGET_RECALL or ivf.nprobe >= ivf.nlist:
            return recall
        ivf.nprobe = min(2 * ivf.nprobe, ivf.nlist)


def _sample(rows: np.ndarray, count: int) -> np.ndarray:
    """`count` of the rows, evenly spread, or all if there are no more."""
    return rows if len(rows) <= count else rows[np.linspace(0, len(rows) - 1, count).astype(np.int64)]


def _blocks(vectors: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(vectors), BLOCK):
        yield np.ascontiguousarray(vectors[start : start + BLOCK])


def is_whole(folder: Path, name: str, info: IndexInfo) -> bool:
    """Whether the file `name` of an index is there and as it was written."""
    return (folder / name).is_file() and sha256(folder / name) == info.sha256[name]


def _verified(folder: Path, name: str, info: IndexInfo) -> Path:
    path = folder / name
    if not path.is_file():
        raise InputError(f"{str(path)!r}: missing; delete the index and embed again")
    if not is_whole(folder, name, info):
        raise InputError(f"{str(path)!r}: its SHA-256 is not the one in {INFO_FILE}; delete the index and embed again")
    return path
