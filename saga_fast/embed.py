"""Embed image files into an index that can be searched.

    python -m saga_fast.embed --encoder DIR IMAGES… --index OUT [--faiss FACTORY]
    torchrun --nproc-per-node N -m saga_fast.embed …

IMAGES are folders (with their subfolders), files, glob patterns, or `-` for a list on stdin, one per line. The index
keeps the vectors of earlier calls: only files that are new, or whose size or modification time differs, are embedded,
and vectors of deleted files are removed. Vectors are saved in chunks beside the index while embedding, so an
interrupted call continues where it stopped. Under torchrun every process embeds its share, and the first one makes the
index; all must see the images under the same paths, but need not share the disk of the index.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import tyro
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from saga_fast.data import ImageFiles, cores
from saga_fast.data.loader import Decoder, prefetch
from saga_fast.encoder import Encoder, expect_finite
from saga_fast.retrieval import index as indices
from saga_fast.retrieval.index import File
from saga_fast.runtime import distributed
from saga_fast.utils.errors import InputError, exit_on_input_error, first_line, warn_rank_zero
from saga_fast.utils.files import expect_replaceable, hidden, is_litter, locked
from saga_fast.utils.flags import WORKERS, parse_flags
from saga_fast.utils.images import SUFFIXES, is_image, kind_of, skipped_kinds

BATCH = 64  # images that go through the encoder at once
CHUNK = 1024  # images, or
CHUNK_SECONDS = 60.0  # of work, whichever is less, are lost at most by an interrupted call

Result = TypeVar("Result")


class Embedded(NamedTuple):
    """The outcome of a call: counts of files, a line per unreadable file, and a line about the index."""

    new: int
    unchanged: int
    gone: int
    unreadable: list[str]
    line: str


def embed(
    encoder: str | Path,
    images: str | Path | Iterable[str | Path],
    index: str | Path,
    faiss: str | None = None,
    workers: int | None = None,
) -> Embedded:
    """Bring the index in the folder `index` up to date with `images`: folders, files and glob patterns.

    encoder: folder or hub id; faiss: a factory string for the kind of index, by default that of the last call, or
    chosen by the number of images; workers: processes that decode. Raises InputError for an invalid encoder, index or
    path, an index of another encoder, a full disk, and if no image can be read: the index is then unchanged.
    """
    index = Path(index).absolute()
    images = [images] if isinstance(images, str | Path) else list(images)
    with _processes(), contextlib.ExitStack() as stack:
        model = Encoder.from_pretrained(encoder, map_location=distributed.device())
        if faiss:
            indices.make(faiss, model.embedding_dim)  # a malformed string is refused before the work
        _on_rank_zero(lambda: stack.enter_context(locked(index, "--index")) and None)  # for all processes
        chunks = Chunks(hidden(index, "chunks"), model.sha256)
        try:
            _collect(chunks)
            plan = _on_rank_zero(lambda: Plan.of(images, index, chunks, model.sha256))
            faults = distributed.all_gather_object(
                chunks.embed_files(model, plan.pending[distributed.rank() :: distributed.world_size()], workers)
            )
            failed = sorted(fault for share in faults for fault in share)
            _collect(chunks)
            name = str(Path(encoder).absolute()) if Path(encoder).is_dir() else str(encoder)
            made_by = indices.IndexEncoder(name, model.sha256, model.embedding_dim, model.block_sizes or None)
            done = _on_rank_zero(lambda: plan.finish(index, chunks, made_by, faiss, failed))
            shutil.rmtree(chunks.folder, ignore_errors=True)
        finally:
            with contextlib.suppress(OSError):  # deleted, or not empty: kept for the next call
                chunks.folder.rmdir()
    return done


class Chunks:
    """Vectors that are not in the index yet: safetensors files in `folder`, written atomically, of one encoder."""

    def __init__(self, folder: Path, encoder_sha256: str):
        self.folder, self.prefix = folder, encoder_sha256[:16]
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--index: {str(folder.parent)!r} cannot be written to ({error.strerror})") from error

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob(f"{self.prefix}-*.safetensors"))

    def files(self) -> dict[File, tuple[str, int]]:
        """Embedded file → (name of the chunk, row in it). Damaged chunks are skipped."""
        found = {}
        for name in self.names():
            with contextlib.suppress(SafetensorError, OSError), safe_open(self.folder / name, "numpy") as chunk:
                for row, file in enumerate(json.loads(chunk.metadata()["files"])):
                    found[File(*file)] = (name, row)
        return found

    def vectors(self, name: str) -> np.ndarray:
        with safe_open(self.folder / name, "numpy") as chunk:
            return chunk.get_tensor("vectors")

    def write(self, files: list[File], vectors: np.ndarray) -> None:
        path = self.folder / f"{self.prefix}-{uuid.uuid4().hex}.safetensors"
        with _writing(self.folder):
            save_file({"vectors": vectors}, path.with_suffix(".partial"), {"files": json.dumps(files)})
            os.rename(path.with_suffix(".partial"), path)

    @torch.inference_mode()
    def embed_files(self, encoder: Encoder, files: list[File], workers: int | None) -> list[str]:
        """Embed `files` into chunks; returns a line for each that cannot be read. The first process shows progress."""
        if workers is None:
            workers = min(8, cores()) if len(files) > BATCH else 0
        hide = not files or distributed.rank() > 0
        faults: list[str] = []
        done: list[File] = []
        vectors: list[np.ndarray] = []
        began = time.monotonic()

        def close() -> None:
            if done:
                self.write(done, np.concatenate(vectors))
            done.clear()
            vectors.clear()

        pictures = ImageFiles([Path(file.path) for file in files], [0] * len(files), [])
        stream = prefetch(Decoder(pictures, encoder.image_size), torch.arange(len(files)).split(BATCH), workers)
        with (
            contextlib.closing(stream),
            tqdm(total=len(files), desc="embedding", unit="image", disable=hide) as bar,
        ):
            try:
                for rows, pixels, broken in stream if files else ():
                    whole = [i for i, row in enumerate(rows) if row not in broken]
                    if whole:
                        embedded = expect_finite(encoder(pixels[whole])).cpu().numpy()
                        vectors.append(embedded)
                        done += [files[rows[i]] for i in whole]
                    faults += broken.values()
                    bar.update(len(rows))
                    if len(done) >= CHUNK or time.monotonic() - began > CHUNK_SECONDS:
                        close()
                        began = time.monotonic()
            finally:
                close()
        return faults


@dataclass(frozen=True)
class Plan:
    """The work of a call, the same in every process. files: those to be in the index, sorted by path; pending: those to
    be embedded; missing: a line per file that does not exist; gone: number of indexed files that do not exist any
    more."""

    files: list[File]
    pending: list[File]
    missing: list[str]
    gone: int

    @staticmethod
    def of(images: Sequence[str | Path], index: Path, chunks: Chunks, encoder_sha256: str) -> Plan:
        known = indices.read_info(index)
        expect_replaceable(index, "--index")
        if known and (others := indices.others_in(index)):
            raise InputError(
                f"--index: {str(index)!r} also holds {', '.join(map(repr, others[:3]))}, which would be lost as the "
                "index is made anew; move what is not of the index elsewhere"
            )
        if known is not None and known.encoder_sha256 != encoder_sha256:
            raise InputError(
                f"--index: {str(index)!r} was made by another encoder ({known.encoder}, SHA-256 "
                f"{known.encoder_sha256[:12]}…, this one's is {encoder_sha256[:12]}…); name another index"
            )
        ours = set(chunks.names())
        for leftover in chunks.folder.iterdir():  # of other encoders, and incomplete ones
            if leftover.name not in ours:
                leftover.unlink()
        indexed = indices.read_files(index, known) if known else []
        embedded = {*indexed, *chunks.files()}
        skipped: Counter[str] = Counter()
        wanted = {os.path.abspath(path) for path in expand(images, skipped)}
        if skipped:
            warn_rank_zero(f"IMAGES: skipped: {skipped_kinds(skipped)}")
        files, missing = [], []
        indexed_paths = {file.path for file in indexed}
        for path in sorted(wanted | {file.path for file in embedded}):
            try:
                stat = os.stat(path)
                files.append(File(path, stat.st_size, stat.st_mtime_ns))
            except OSError as error:
                if path in wanted:
                    missing.append(f"{path!r}: {error.strerror}")
        if not files:
            given = ", ".join(repr(str(item)) for item in images) or "nothing"
            raise InputError(
                f"IMAGES: none found in {given}; accepted are folders, files and glob patterns of images "
                f"({' '.join(SUFFIXES)})"
            )
        gone = len(indexed_paths - {file.path for file in files})
        return Plan(files, [file for file in files if file not in embedded], missing, gone)

    def finish(
        self,
        index: Path,
        chunks: Chunks,
        encoder: indices.IndexEncoder,
        factory: str | None,
        unreadable: list[str],
    ) -> Embedded:
        """Merge the chunks into the index and write it, unless it is up to date."""
        known = indices.read_info(index)
        indexed = {file: row for row, file in enumerate(indices.read_files(index, known))} if known else {}
        fresh = chunks.files()
        files = [file for file in self.files if file in fresh or file in indexed]
        unreadable = self.missing + unreadable
        if not files:
            raise InputError(f"IMAGES: none of {len(unreadable)} can be read, the first is {unreadable[0]}")
        new = sum(file in fresh for file in files)
        counts = (new, len(files) - new, self.gone, unreadable)
        factory = factory or (known.asked if known else None)
        kind = factory or indices.choose(len(files))
        same = known and (kind, factory, encoder.blocks) == (known.kind, known.asked, known.blocks)
        whole = known and same and not new and len(files) == len(indexed)
        if known and whole and all(indices.is_whole(index, name, known) for name in (indices.FAISS, indices.VECTORS)):
            return Embedded(*counts, f"{len(files):,} vectors, faiss {known.kind}: unchanged")

        def parts() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            places: dict[str, list[tuple[int, int]]] = {}
            for place, file in enumerate(files):
                if file in fresh:
                    name, row = fresh[file]
                    places.setdefault(name, []).append((place, row))
            if known and new < len(files):
                old = [(place, indexed[file]) for place, file in enumerate(files) if file not in fresh]
                yield from _moved(indices.read_vectors(index, known), old)
            for name, pairs in places.items():
                yield from _moved(chunks.vectors(name), pairs)

        with _writing(index):
            line = indices.write(index, encoder, files, parts(), factory)
        return Embedded(*counts, line)


def _moved(vectors: np.ndarray, pairs: Sequence[tuple[int, int]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(rows of an index, their vectors), in blocks. pairs: a row of the index, and where its vector is in `vectors`."""
    to, of = np.array(pairs).T
    for start in range(0, len(to), indices.BLOCK):
        block = slice(start, start + indices.BLOCK)
        yield to[block], vectors[of[block]]


def expand(images: Iterable[str | Path], skipped: Counter[str] | None = None) -> Iterator[str]:
    """The image files in folders and under glob patterns, by their names; files as they are; `-`: lines of stdin.

    Other files in the folders, except litter, are counted in `skipped` by kind. Raises InputError for a path that
    does not exist, except for one from stdin.
    """
    skipped = Counter() if skipped is None else skipped
    for item in (os.fspath(image) for image in images):
        if item == "-":
            for line in sys.stdin.buffer.read().splitlines():
                name = os.fsdecode(line)
                yield from expand([name], skipped) if os.path.isdir(name) else [name] if name else []
        elif os.path.isdir(item):
            for folder, inner, names in os.walk(item):
                inner[:] = [name for name in inner if not is_litter(name)]
                yield from _images((os.path.join(folder, name) for name in names), skipped)
        elif os.path.lexists(item):
            yield item
        elif glob.has_magic(item):
            named = {"", *item.split(os.sep)}
            matched = glob.iglob(item, recursive=True)
            inside = (path for path in matched if not any(map(is_litter, set(path.split(os.sep)) - named)))
            yield from _images((path for path in inside if not os.path.isdir(path)), skipped)
        else:
            raise InputError(
                f"IMAGES: {item!r} does not exist; accepted are folders, files, glob patterns, or - for stdin"
            )


def _images(files: Iterable[str], skipped: Counter[str]) -> Iterator[str]:
    for path in files:
        if is_litter(os.path.basename(path)):
            continue
        if is_image(path):
            yield path
        else:
            skipped[kind_of(path)] += 1


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"--index: {str(folder)!r} cannot be written to ({first_line(error)}); free space, and the same command "
            "continues where this one stopped"
        ) from error


@contextlib.contextmanager
def _processes() -> Iterator[None]:
    """A Gloo group of torchrun's processes, unless there is a group: only lists and files are exchanged."""
    ours = dist.is_torchelastic_launched() and not dist.is_initialized()
    if ours:
        dist.init_process_group("gloo", timeout=timedelta(days=7))  # the processes' shares may take unequal times
    yield
    if ours:
        dist.destroy_process_group()


def _on_rank_zero(function: Callable[[], Result]) -> Result:
    """Calls `function` in the first process; returns its result, or raises its InputError, in every process."""
    outcome: Any = None
    if distributed.rank() == 0:
        try:
            outcome = function()
        except InputError as error:
            outcome = error
    outcome = distributed.all_gather_object(outcome)[0]
    if isinstance(outcome, InputError):
        raise outcome
    return outcome


def _collect(chunks: Chunks) -> None:
    """Send to the first process the chunks that are on other hosts' disks."""
    names_by_rank = distributed.all_gather_object(chunks.names())
    for name in sorted(set().union(*names_by_rank) - set(names_by_rank[0])):
        owner = next(rank for rank, names in enumerate(names_by_rank) if name in names)
        if distributed.rank() == owner:
            dist.send_object_list([(chunks.folder / name).read_bytes()], dst=0)
        elif distributed.rank() == 0:
            box: list[Any] = [None]
            dist.recv_object_list(box, src=owner)
            (chunks.folder / "received").write_bytes(box[0])
            os.rename(chunks.folder / "received", chunks.folder / name)


@dataclass(frozen=True)
class EmbedArguments:
    images: tyro.conf.Positional[tuple[str, ...]] = ()
    """Folders, files, glob patterns, or - for a list on stdin."""
    encoder: str = ""
    """Folder of the encoder, or hub id."""
    index: Path | None = None
    """Folder of the index, to create or to update."""
    faiss: str | None = None
    """Kind of index, a factory string of faiss; by default exact below 100,000 images, from there on IVF, tuned."""
    workers: Annotated[int | None, WORKERS] = None
    """Worker processes that decode images, 0 for none; default one per core, up to 8."""


def main(arguments: Sequence[str]) -> None:
    parsed = parse_flags(EmbedArguments(), arguments, "python -m saga_fast.embed", "Embed images into an index.")
    if parsed.index is None:
        raise InputError("--index: missing; name a folder for the index")
    done = embed(parsed.encoder, parsed.images, parsed.index, parsed.faiss, parsed.workers)
    if int(os.environ.get("RANK", 0)) == 0:  # the process group is destroyed by now
        for fault in done.unreadable:
            print(f"unreadable: {fault}", file=sys.stderr)
        print(
            f"{done.new:,} embedded, {done.unchanged:,} unchanged, {done.gone:,} gone, "
            f"{len(done.unreadable):,} unreadable\n{parsed.index}: {done.line}"
        )


if __name__ == "__main__":
    with exit_on_input_error():
        main(sys.argv[1:])
