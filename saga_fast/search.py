"""Find the indexed images most like a picture.

    python -m saga_fast.search --index DIR QUERY… [-k 10] [--json | --html] [--encoder DIR]

Prints the nearest files of each query with their similarity, the inner product of the unit vectors; `--json` as JSON,
`--html` as one page with thumbnails that needs no other file. The encoder is the one the index was made with.
"""

from __future__ import annotations

import base64
import html
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import tyro
from PIL import Image

from saga_fast.config import parse_flags
from saga_fast.encoder import Encoder, Picture
from saga_fast.retrieval import index as indices
from saga_fast.utils.errors import InputError, exit_on_input_error
from saga_fast.utils.images import open_rgb

THUMBNAIL = 192  # pixels, the longer side

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Nearest images</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 1rem/1.4 system-ui, sans-serif; margin: 1rem }}
section {{ display: flex; flex-wrap: wrap; gap: 1rem; padding: 1rem 0; border-top: 1px solid #8888 }}
figure {{ margin: 0; width: 12rem }}
figure.query {{ border-right: 3px solid #8888; padding-right: 1rem }}
img, .none {{ width: 100%; height: 12rem; object-fit: contain; background: #8882 }}
.none {{ display: grid; place-items: center }}
figcaption {{ font-size: .8rem; overflow-wrap: anywhere }}
</style>
</head>
<body>
<h1>Nearest images</h1>
{sections}
</body>
</html>
"""


class Hit(NamedTuple):
    """An indexed file, and the inner product of its unit vector with the query's."""

    path: str
    similarity: float


class Searcher:
    """An index and its encoder, read and checked once, to be searched any number of times, by several threads too.

    encoder: the encoder, on the CPU unless moved; about: what the index says of itself; files: the indexed files, row i
    of the vectors is file i; faiss: the index of the vectors, in memory. An index that is embedded anew meanwhile is
    searched as it was.
    """

    def __init__(self, index: str | Path, encoder: str | Path | None = None) -> None:
        """encoder: folder or hub id, by default where it was when the index was made.

        Raises InputError for a damaged index or encoder, naming the file, and an encoder that did not make the index.
        """
        self.folder = Path(index).absolute()
        about = indices.about(self.folder)
        if about is None:
            raise InputError(f"--index: {str(self.folder)!r} holds no index; make one with python -m saga_fast.embed")
        self.encoder = Encoder.from_pretrained(encoder or about.encoder)
        if self.encoder.sha256 != about.encoder_sha256:
            raise InputError(
                f"--index: {str(self.folder)!r} was made by another encoder (SHA-256 {about.encoder_sha256[:12]}…) "
                f"than {str(encoder or about.encoder)!r} ({self.encoder.sha256[:12]}…); name that one with --encoder, "
                "or embed again"
            )
        self.about = about
        self.files = indices.read_files(self.folder, about)
        self.faiss = indices.read_faiss(self.folder, about)

    @torch.inference_mode()
    def search(self, queries: Picture | Sequence[Picture], k: int = 10) -> list[list[Hit]]:
        """For each query, a path or a picture, the `k` nearest indexed files, best first; ties in faiss's order.

        Raises InputError for a query that cannot be read.
        """
        vectors = self.encoder(queries).cpu().numpy()
        products, rows = self.faiss.search(vectors, min(k, len(self.files)))
        return [
            [Hit(self.files[row].path, float(product)) for row, product in zip(*found) if row >= 0]
            for found in zip(rows, products)
        ]


def search(
    index: str | Path, queries: Sequence[Picture], k: int = 10, encoder: str | Path | None = None
) -> list[list[Hit]]:
    """One search, see `Searcher`, which spares later ones the loading."""
    return Searcher(index, encoder).search(queries, k)


def page(queries: Sequence[str], results: Sequence[Sequence[Hit]]) -> str:
    """One HTML page: a row a query, thumbnails inside, every name escaped."""
    sections = []
    for query, hits in zip(queries, results):
        figures = [_figure(query, "query", "query"), *(_figure(hit.path, f"{hit.similarity:.3f}") for hit in hits)]
        sections.append("<section>\n" + "\n".join(figures) + "\n</section>")
    return PAGE.format(sections="\n".join(sections))


def _figure(path: str, words: str, kind: str = "hit") -> str:
    name = html.escape(path.encode(errors="backslashreplace").decode())
    try:
        picture = open_rgb(path)
        picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC)
        picture.save(buffer := io.BytesIO(), "JPEG", quality=85)
        shown = f'<img alt="{name}" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
    except InputError:  # moved or deleted since it was indexed
        shown = '<div class="none">not there any more</div>'
    return f'<figure class="{kind}">{shown}<figcaption>{words}<br>{name}</figcaption></figure>'


@dataclass(frozen=True)
class SearchArguments:
    queries: tyro.conf.Positional[tuple[str, ...]] = ()
    """Image files to find the like of."""
    index: Path | None = None
    """Folder of the index."""
    k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 10
    """How many to find for each."""
    json: bool = False
    """Print JSON."""
    html: bool = False
    """Print an HTML page with thumbnails."""
    encoder: str | None = None
    """Folder of the encoder, or hub id, if it is no longer where it was when the index was made."""


def main(arguments: Sequence[str]) -> None:
    parsed = parse_flags(SearchArguments(), arguments, "python -m saga_fast.search", "Find the nearest indexed images.")
    if parsed.index is None:
        raise InputError("--index: missing; name the folder of an index")
    if not parsed.queries:
        raise InputError("QUERY: missing; name one or several image files")
    if parsed.k < 1:
        raise InputError(f"-k: {parsed.k}; give 1 or more")
    if parsed.json and parsed.html:
        raise InputError("--json: given with --html; choose one")
    results = search(parsed.index, parsed.queries, parsed.k, parsed.encoder)
    if parsed.html:
        sys.stdout.write(page(parsed.queries, results))
    elif parsed.json:
        found = [{"query": q, "hits": [hit._asdict() for hit in hits]} for q, hits in zip(parsed.queries, results)]
        print(json.dumps(found, indent=2))
    else:
        for query, hits in zip(parsed.queries, results):
            print(_printable(query))
            for hit in hits:
                print(f"  {hit.similarity:.4f}  {_printable(hit.path)}")


def _printable(path: str) -> str:
    """With what a terminal could not print, or would obey, as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in path)


if __name__ == "__main__":
    with exit_on_input_error():
        main(sys.argv[1:])
