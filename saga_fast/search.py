"""Find the indexed images that are most similar to a picture.

    python -m saga_fast.search --index DIR QUERY… [-k 10] [--json | --html] [--encoder DIR]
                                [--explain] [--attribute "NAME=WEIGHT" … | --only NAME] [--show NAME]
    python -m saga_fast.search --index DIR --serve PORT [--host 127.0.0.1]

Prints the nearest files of each query with their similarity, the inner product of the unit vectors; `--json` as JSON,
`--html` as one self-contained page with thumbnails. The encoder is the one that made the index.
`--serve` loads both once and answers over HTTP, see `retrieval.server`.

If it has a block per attribute (pooler `attributes`), the similarity is the mean of the attributes' cosines.
`--explain` prints these, the highest first; on the page as bars, with pictures dark where an attribute's attention is
low: the attribute that sets the hits most apart from the index, or that of `--show`. `--attribute` sets an attribute's
weight, 0 to ignore it; the others have 1. `--only` leaves one alone.
"""

from __future__ import annotations

import html
import json
import os
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import tyro
from PIL import Image

from saga_fast.encoder import Encoder, Picture, expect_finite
from saga_fast.retrieval import index as indices
from saga_fast.retrieval.blocks import Blocks, parse_weights
from saga_fast.retrieval.server import LOOPBACK, serve
from saga_fast.runtime import distributed
from saga_fast.utils.errors import InputError, exit_on_input_error, printable
from saga_fast.utils.flags import COUNT, Range, parse_flags
from saga_fast.utils.images import open_rgb
from saga_fast.utils.pages import data_uri, shade

THUMBNAIL = 192  # pixels, the longer side
SAMPLE = 4096  # vectors in the mean vector of an index
COLUMNS = 100  # characters of a line that explains a hit

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
.lit {{ position: relative; height: 12rem; display: grid; place-items: center; background: #8882 }}
.lit span {{ position: relative }}
.lit img {{ position: absolute; width: 100%; height: 100%; background: none }}
.lit:hover .shade {{ opacity: 0 }}
ul {{ list-style: none; margin: .4rem 0 0; padding: 0; font-size: .75rem }}
li {{ display: grid; grid-template-columns: 6rem 1fr 2.2rem; gap: .4rem; align-items: center }}
li i {{ height: .5rem; background: #3b82f6; border-radius: 2px }}
li.shown {{ font-weight: 600 }}
li span:last-child {{ text-align: right; font-variant-numeric: tabular-nums }}
</style>
</head>
<body>
<h1>Nearest images</h1>
{sections}
</body>
</html>
"""


class Hit(NamedTuple):
    """An indexed file, and the similarity to the query: the inner product of unit vectors, or the weighted similarity.

    attributes: with `explain`, attribute → cosine of its block, largest first.
    """

    path: str
    similarity: float
    attributes: dict[str, float] | None = None

    def fields(self) -> dict[str, Any]:
        """The fields that are not None, for JSON."""
        return {name: value for name, value in self._asdict().items() if value is not None}


class AttentionOverlay(NamedTuple):
    """The attention map of an attribute over the query and over each hit, as data URIs, see `shade`; None for a picture
    that cannot be read."""

    attribute: str
    query: str | None
    hits: list[str | None]


class Searcher:
    """An index and its encoder, read and checked once, to be searched any number of times, by several threads too.

    encoder: the encoder, on the CPU unless moved; info: the content of index.json; files: the indexed files, row i of
    the vectors is file i; faiss: the index of the vectors, in memory. Later changes to the index on disk have no
    effect; if it is not exact, its vectors are read from disk when attributes are first used.
    """

    def __init__(self, index: str | Path, encoder: str | Path | None = None) -> None:
        """encoder: folder or hub id, by default where it was when the index was made.

        Raises InputError for a damaged index or encoder, naming the file, and an encoder that did not make the index.
        """
        self.folder = Path(index).absolute()
        info = indices.read_info(self.folder)
        if info is None:
            raise InputError(f"--index: {str(self.folder)!r} holds no index; make one with python -m saga_fast.embed")
        if encoder is None and os.path.isabs(info.encoder) and not os.path.isdir(info.encoder):
            raise InputError(
                f"--encoder: the one that the index was made with is no longer in {info.encoder!r}; say where it is now"
            )
        self.encoder = Encoder.from_pretrained(encoder or info.encoder)
        if self.encoder.sha256 != info.encoder_sha256:
            raise InputError(
                f"--index: {str(self.folder)!r} was made by another encoder (SHA-256 {info.encoder_sha256[:12]}…) "
                f"than {str(encoder or info.encoder)!r} ({self.encoder.sha256[:12]}…); name that one with --encoder, "
                "or embed again"
            )
        self.info = info
        self.files = indices.read_files(self.folder, info)
        self.faiss = indices.read_faiss(self.folder, info)

    @torch.inference_mode()
    def search(
        self,
        queries: Picture | Sequence[Picture],
        k: int = 10,
        *,
        explain: bool = False,
        weights: Mapping[str, float] | None = None,
        only: str | None = None,
    ) -> list[list[Hit]]:
        """For each query, a path or a picture, the `k` nearest indexed files, best first; ties in faiss's order.

        explain: add the attributes' cosines to each hit; weights: attribute -> weight, others 1; only: the one with a
        weight. The similarity is then Σ w_m cos_m / Σ w_m, and an index that is not exact is searched more thoroughly,
        see `indices.nearest`. Raises InputError for a query that cannot be read, for weights that are of no
        attribute, negative, not finite or all 0, and for all three where the index knows no attributes.
        """
        if k < 1:
            raise InputError(f"k: {k}; give 1 or more")
        blocks = self.blocks if explain or weights or only is not None else None
        block_weights = blocks.weights(weights, only) if blocks and (weights or only is not None) else None
        z, k = expect_finite(self.encoder(queries)).cpu().numpy(), min(k, len(self.files))
        if blocks and block_weights is not None:
            products, rows = indices.nearest(self.faiss, self._vectors, blocks.scaled(z, block_weights), k)
        else:
            products, rows = self.faiss.search(z, k)
        results = []
        for query, row, product in zip(z, rows, products):
            row, product = row[row >= 0], product[row >= 0]
            cosines_by_attribute: list[Any] = [None] * len(row)
            if blocks and explain:
                cosines_by_attribute = [blocks.named(cosines) for cosines in blocks.cosines(query, self._vectors[row])]
            results.append(
                [Hit(self.files[i].path, float(s), of) for i, s, of in zip(row, product, cosines_by_attribute)]
            )
        return results

    @cached_property
    def blocks(self) -> Blocks:
        """The attributes of the vectors. Raises InputError where the encoder has none, or the index knows none."""
        if not self.encoder.attributes:
            raise InputError(
                f"--explain, --attribute and --only: the encoder of {str(self.folder)!r} has no block per attribute "
                f"({self.encoder.pooler.kind} pooling); train one with --encoder.pooler attributes and a supervisor"
            )
        if self.info.blocks is None:
            raise InputError(
                f"--explain, --attribute and --only: {str(self.folder / indices.INFO_FILE)!r} names no attributes, as "
                "an older version wrote it; embed again into the same folder, which keeps the vectors"
            )
        if self.info.blocks != (sizes := self.encoder.block_sizes):
            file = self.folder / indices.INFO_FILE
            raise InputError(f"{str(file)!r}: its attributes are not the encoder's; embed into another folder")
        return Blocks(sizes)

    @cached_property
    def _vectors(self) -> np.ndarray:
        """float32 (n, D_e): those of an exact index are in memory already; others are read at the first use."""
        exact = indices.exact_vectors(self.faiss)
        return indices.read_vectors(self.folder, self.info) if exact is None else exact

    @cached_property
    def _typical(self) -> np.ndarray:
        """float32 (D_e,): the mean vector."""
        step = -(-len(self.files) // SAMPLE)
        return self._vectors[::step].mean(0)

    @torch.inference_mode()
    def overlay(
        self,
        query: Picture,
        hits: Sequence[Hit],
        attribute: str | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> AttentionOverlay:
        """The attention of `attribute` over a query and its hits, which come from a search with `explain`.

        By default it is the attribute that adds most, by `weights`, to the difference between the hits' mean similarity
        and that of the whole index. Raises InputError as `search` does.
        """
        if attribute is not None:
            place = self.blocks.place(attribute, "--show")
        else:
            z = self.encoder(query)[0].cpu().numpy()
            found = [[hit.attributes[name] for name in self.blocks.names] for hit in hits if hit.attributes]
            gain = np.mean(found, 0) - self.blocks.cosines(z, self._typical)
            place = int(np.argmax(gain * self.blocks.weights(weights)))
        shades = [self._shade(picture, place) for picture in (query, *(hit.path for hit in hits))]
        return AttentionOverlay(self.blocks.names[place], shades[0], shades[1:])

    def _shade(self, picture: Picture, place: int) -> str | None:
        try:
            return shade(self.encoder.attention(picture)[0, place].cpu().numpy())
        except InputError:  # moved or deleted since it was indexed
            return None


def search(
    index: str | Path,
    queries: Sequence[Picture],
    k: int = 10,
    *,
    explain: bool = False,
    weights: Mapping[str, float] | None = None,
    only: str | None = None,
) -> list[list[Hit]]:
    """One search with the encoder where it was when the index was made. `Searcher` takes another place, and loads both
    once for several searches."""
    return Searcher(index).search(queries, k, explain=explain, weights=weights, only=only)


def page(queries: Sequence[str], results: Sequence[Sequence[Hit]], overlays: Sequence[AttentionOverlay] = ()) -> str:
    """One HTML page: a row per query, with embedded thumbnails and escaped names. overlays: of each query, over
    them."""
    sections = []
    for i, (query, hits) in enumerate(zip(queries, results)):
        overlay = overlays[i] if overlays else AttentionOverlay("", None, [None] * len(hits))
        caption = f"query, clear where the attention of {overlay.attribute} is high" if overlays else "query"
        figures = [_figure(query, caption, overlay.query, kind="query")]
        for hit, shade_uri in zip(hits, overlay.hits):
            figures.append(_figure(hit.path, f"{hit.similarity:.3f}", shade_uri, hit.attributes, overlay.attribute))
        sections.append("<section>\n" + "\n".join(figures) + "\n</section>")
    return PAGE.format(sections="\n".join(sections))


def _figure(
    path: str,
    caption_text: str,
    shade_uri: str | None = None,
    attributes: dict[str, float] | None = None,
    shown: str = "",
    kind: str = "hit",
) -> str:
    name = html.escape(path.encode(errors="backslashreplace").decode())
    try:
        picture = open_rgb(path)
        picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC)
        image = f'<img alt="{name}" src="{data_uri(picture, "JPEG", quality=85)}">'
        if shade_uri:  # in a box of the picture's shape, as the shade is stretched over all of it
            width, height = (100 * side / max(picture.size) for side in picture.size)
            image = (
                f'<div class="lit"><span style="width:{width:.4g}%;height:{height:.4g}%">{image}'
                f'<img class="shade" alt="" src="{shade_uri}"></span></div>'
            )
    except InputError:  # moved or deleted since it was indexed
        image = '<div class="none">not found any more</div>'
    bars = "".join(
        f"<li{' class=shown' * (attribute == shown)}><span>{html.escape(attribute)}</span>"
        f'<i style="width:{100 * max(cosine, 0):.1f}%"></i><span>{cosine:.2f}</span></li>'
        for attribute, cosine in (attributes or {}).items()
    )
    caption = f"<figcaption>{html.escape(caption_text)}<br>{name}</figcaption>" + (bars and f"<ul>{bars}</ul>")
    return f'<figure class="{kind}">{image}{caption}</figure>'


@dataclass(frozen=True)
class SearchArguments:
    queries: tyro.conf.Positional[tuple[str, ...]] = ()
    """Image files to find similar ones to."""
    index: Path | None = None
    """Folder of the index."""
    k: Annotated[int, COUNT, tyro.conf.arg(aliases=["-k"])] = 10
    """Number of images to find for each."""
    json: bool = False
    """Print JSON."""
    html: bool = False
    """Print an HTML page with thumbnails."""
    encoder: str | None = None
    """Folder of the encoder, or hub id, if it is no longer where it was when the index was made."""
    explain: bool = False
    """Print the cosine of each attribute."""
    attribute: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=WEIGHT: the weight of an attribute, 1 for the others; repeat the flag for several."""
    only: str | None = None
    """The only attribute to compare."""
    show: str | None = None
    """With --explain --html: the attribute whose attention is shown; default the most decisive one."""

    serve: Annotated[int | None, Range(0, 65535)] = None
    """Serve over HTTP on this port, 0 for any free one, until Ctrl-C."""
    host: str = LOOPBACK
    """Address to serve on; by default only this machine can connect."""


def main(arguments: Sequence[str]) -> None:
    parsed = parse_flags(SearchArguments(), arguments, "python -m saga_fast.search", "Find the nearest indexed images.")
    if parsed.index is None:
        raise InputError("--index: missing; name the folder of an index")
    if parsed.serve is not None:
        if parsed.queries:
            raise InputError(f"--serve: given with QUERY {parsed.queries[0]!r}; pictures come with the requests")
        searcher = Searcher(parsed.index, parsed.encoder)
        searcher.encoder.to(distributed.device())
        return serve(searcher, parsed.serve, parsed.host)
    if not parsed.queries:
        raise InputError("QUERY: missing; name one or several image files")
    if parsed.json and parsed.html:
        raise InputError("--json: given with --html; choose one")
    if parsed.show is not None and not (parsed.explain and parsed.html):
        raise InputError("--show: needs --explain and --html; give both, or leave it out")
    weights, searcher = parse_weights(parsed.attribute), Searcher(parsed.index, parsed.encoder)
    if parsed.show is not None:
        searcher.blocks.place(parsed.show, "--show")
    results = searcher.search(parsed.queries, parsed.k, explain=parsed.explain, weights=weights, only=parsed.only)
    if parsed.html:
        overlays = []
        if parsed.explain:
            show = parsed.show or parsed.only
            overlays = [searcher.overlay(query, hits, show, weights) for query, hits in zip(parsed.queries, results)]
        sys.stdout.write(page(parsed.queries, results, overlays))
    elif parsed.json:
        found = [{"query": q, "hits": [hit.fields() for hit in hits]} for q, hits in zip(parsed.queries, results)]
        print(json.dumps(found, indent=2))
    else:
        for query, hits in zip(parsed.queries, results):
            print(printable(query))
            for hit in hits:
                print(f"  {hit.similarity:.4f}  {printable(hit.path)}")
                if hit.attributes:
                    print(_lines(hit.attributes))


def _lines(attributes: Mapping[str, float]) -> str:
    """The attributes' cosines, in lines that break between attributes."""
    parts = [f"{cosine:.2f} {printable(name)}".replace(" ", "\xa0") for name, cosine in attributes.items()]
    indent = " " * 10
    return textwrap.fill(", ".join(parts), COLUMNS, initial_indent=indent, subsequent_indent=indent).replace(
        "\xa0", " "
    )


if __name__ == "__main__":
    with exit_on_input_error():
        main(sys.argv[1:])
