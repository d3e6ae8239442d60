"""Classes and confusions against counting by hand, and the command on a folder of pictures."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from saga_fast.encoder import Encoder
from saga_fast.evaluate import by_class, confusions, main
from saga_fast.retrieval.metrics import retrieve
from saga_fast.utils.errors import InputError

from .small import save_classes, save_encoder


def count_by_hand(vectors: np.ndarray, labels: list[int]) -> tuple[dict[int, list[tuple[float, ...]]], Counter]:
    """({label: [(hit, precision at R, average precision at R) of each query]}, {(label, label found): times})."""
    scores, wrong = defaultdict(list), Counter()
    similarity = vectors.astype(np.float64) @ vectors.T.astype(np.float64)
    for query, label in enumerate(labels):
        others = sorted((i for i in range(len(labels)) if i != query), key=lambda i: (-similarity[query, i], i))
        matches = labels.count(label) - 1
        right = [labels[i] == label for i in others[:matches]]
        if matches:
            average = sum(sum(right[: i + 1]) / (i + 1) for i in range(matches) if right[i]) / matches
            scores[label].append((labels[others[0]] == label, sum(right) / matches, average))
            if labels[others[0]] != label:
                wrong[label, labels[others[0]]] += 1
    return scores, wrong


def test_classes_and_confusions_are_counted_right():
    random = np.random.default_rng(0)
    sizes = [5, 9, 2, 1, 12, 3]
    labels = np.repeat(np.arange(6), sizes)
    random.shuffle(labels)
    vectors = random.standard_normal((6, 5))[labels] + 0.9 * random.standard_normal((32, 5))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    scores, wrong = count_by_hand(vectors, labels.tolist())
    found, names, labels = retrieve(torch.from_numpy(vectors), torch.from_numpy(labels)), "abcdef", torch.tensor(labels)
    rows = by_class(found, labels, names)
    assert {row["class"] for row in rows} == set("abcef"), "d has one image, so no query"
    assert [row["recall_at_1"] for row in rows] == sorted(row["recall_at_1"] for row in rows)
    for row in rows:
        label = names.index(row["class"])
        figures = [row["recall_at_1"], row["r_precision"], row["map_at_r"]]
        assert figures == pytest.approx(np.mean(scores[label], axis=0).tolist()) and row["images"] == sizes[label]
    mistakes = confusions(found, labels, names)
    assert {(row["class"], row["taken_for"]): row["count"] for row in mistakes} == {
        (names[a], names[b]): times for (a, b), times in wrong.items()
    }
    shares = [row["count"] / len(scores[names.index(row["class"])]) for row in mistakes]
    assert len(shares) > 3 and shares == sorted(shares, reverse=True)
    assert all(row["queries"] == len(scores[names.index(row["class"])]) for row in mistakes)


@pytest.fixture
def root(tmp_path) -> Path:
    save_encoder(tmp_path / "encoder")
    save_classes(tmp_path / "root", ["heron", "kite", "owl", "wren"], 4)
    return tmp_path


def test_the_command_measures_the_second_half(root, capsys):
    flags = ["--encoder", str(root / "encoder"), "--data.name", "folder", "--data.root", str(root / "root")]
    main([*flags, "--data.workers", "0", "--json", str(root / "metrics.json")])
    printed, found = capsys.readouterr().out, json.loads((root / "metrics.json").read_text())
    paths = [path for name in ("owl", "wren") for path in sorted((root / "root" / name).iterdir())]
    with torch.inference_mode():
        vectors = Encoder.from_pretrained(root / "encoder")(paths).numpy()
    scores, wrong = count_by_hand(vectors, [0] * 4 + [1] * 4)
    hits, precision, average = np.mean(scores[0] + scores[1], axis=0)
    assert [found["recall_at_1"], found["r_precision"], found["map_at_r"]] == pytest.approx([hits, precision, average])
    assert found["queries"] == 8 and {row["class"] for row in found["classes"]} == {"owl", "wren"}
    assert sum(row["count"] for row in found["confusions"]) == sum(wrong.values())
    assert 0 <= found["nmi"] <= 1 and {"recall_at_2", "recall_at_4", "recall_at_8"} <= found.keys()
    assert f"R-precision {100 * precision:.2f}, 8 queries" in printed and "worst classes" in printed


def test_names_that_are_no_text_are_printed_as_escapes(root, capsys):
    odd = "owl\x1b[2J\udce9"  # as Python has a name that is not UTF-8
    (root / "root/owl").rename(root / "root" / odd)
    flags = ["--encoder", str(root / "encoder"), "--data.name", "folder", "--data.root", str(root / "root")]
    main([*flags, "--data.workers", "0", "--json", str(root / "metrics.json")])
    printed = capsys.readouterr().out
    assert printed.replace("\n", "").isprintable() and r"owl\x1b[2J\udce9 " in printed
    assert odd in {row["class"] for row in json.loads((root / "metrics.json").read_text())["classes"]}
    with pytest.raises(InputError, match="--json: '.*root' is a folder; name a file"):
        main([*flags, "--data.workers", "0", "--json", str(root / "root")])


@pytest.mark.parametrize(
    "arguments,message",
    [
        ([], "--encoder: missing"),
        (["--encoder", "{root}"], "has no config.json"),
        (["--encoder", "{root}/encoder", "--data.name", "folder"], "--data.root: missing"),
        (["--encoder", "{root}/encoder", "--json", "{root}/no/such/folder.json"], "--json: the folder of"),
        (["--encoder", "{root}/encoder", "--data.image-size", "64"], "64; this encoder reads 32 pixels a side, and no"),
        (["--encoder", "{root}/encoder", "--data.nam", "folder"], "--data.nam: unknown flag; did you mean"),
    ],
)
def test_bad_input_is_one_line(root, arguments, message):
    with pytest.raises(InputError) as error:
        main([argument.format(root=root) for argument in arguments])
    assert message in str(error.value) and "\n" not in str(error.value)
