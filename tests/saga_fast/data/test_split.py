"""The user's own split, by folders and by list: images, and errors with the line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from saga_fast.data import load_dataset
from saga_fast.utils.errors import InputError

from .released import fill, paint

IMAGES = [
    *[(f"owls/{i}.jpg", "barn owl", "train") for i in range(3)],
    *[(f"jays/{i}.jpg", "10", "train") for i in range(2)],
    *[(f"more/{i}.jpg", "9", "test") for i in range(2)],
    *[(f"more/é, {i}.jpg", "tit", "test") for i in range(2)],
]


@pytest.fixture
def root(tmp_path) -> Path:
    for number, (image, *_) in enumerate(IMAGES):
        paint(tmp_path / image, number, number)
    return tmp_path


def table(rows, separator: str = ",", header: str | None = None) -> str:
    lines = [header or separator.join(("path", "label", "split"))]
    lines += [separator.join(f'"{cell}"' if set(cell) & set(", ") else cell for cell in row) for row in rows]
    return "\n".join(lines) + "\n"


def objects(rows, **more) -> str:
    return "".join(json.dumps({"path": p, "label": label, "split": s} | more) + "\n" for p, label, s in rows)


def is_read(path: Path) -> None:
    train, test = load_dataset("folder", path)
    assert (train.classes, train.labels) == (["10", "barn owl"], [1, 1, 1, 0, 0])
    assert (test.classes, test.labels) == (["9", "tit"], [0, 0, 1, 1])
    assert [path.relative_to(path.parents[1]).as_posix() for path in train.paths + test.paths] == [i[0] for i in IMAGES]
    assert train[0][0].size == (12, 9) and test[3][1] == 1


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_tables_as_spreadsheets_write_them(root, separator, end, encoding):
    content = table(IMAGES, separator).replace("\n", end)
    (path := root / ("my.tsv" if separator == "\t" else "my.csv")).write_bytes(content.encode(encoding))
    is_read(path)


def test_columns_in_any_order_beside_others_and_blank_lines(root):
    rows = [(split.upper(), "", label, "x", path) for path, label, split in IMAGES]
    (root / "my.csv").write_text("\n" + table(rows, header=" Split ,note,LABEL,,path").replace("\n", "\n\n"))
    is_read(root / "my.csv")


@pytest.mark.parametrize("name", ["my.jsonl", "my.ndjson", "my.json", "MY.JSONL"])
def test_json_lines(root, name):
    rows = [(str(root / path), int(label) if label.isdigit() else f" {label} ", split) for path, label, split in IMAGES]
    (root / name).write_text(objects(rows, box=[1, 2]) + "\n", encoding="utf-8-sig")
    is_read(root / name)


def test_backslashes_stand_for_slashes_where_no_file_has_them(root):
    (root / "my.csv").write_text(table([(path.replace("/", "\\"), *rest) for path, *rest in IMAGES]))
    is_read(root / "my.csv")
    paint(root / "owls\\0.jpg", 9, 9)
    train, _ = load_dataset("folder", root / "my.csv")
    assert train.paths[0] == root / "owls\\0.jpg" and train.paths[1] == root / "owls/1.jpg"


def test_a_list_elsewhere_names_its_images_from_its_own_folder(root):
    (root / "lists").mkdir()
    (root / "lists/my.csv").write_text(table([(f"../{path}", *rest) for path, *rest in IMAGES]))
    train, _ = load_dataset("folder", root / "lists" / "my.csv")
    assert train[4][0].size == (12, 9)


def test_val_tests_where_there_is_no_test_and_else_is_left_out_and_counted(root):
    rows = [(path, label, split.replace("test", "validation")) for path, label, split in IMAGES]
    (root / "my.csv").write_text(table(rows))
    is_read(root / "my.csv")
    for number in range(3):
        paint(root / f"{number}.jpg", 1, 1)
    (root / "my.csv").write_text(table([*IMAGES, *((f"{i}.jpg", "x", "val") for i in range(3))]))
    with pytest.warns(UserWarning, match="folder: skipped: images of split val: 3"):
        load_dataset("folder", root / "my.csv")


def test_classes_in_both_halves_are_told(root):
    (root / "my.csv").write_text(table(IMAGES).replace("tit", "barn owl"))
    with pytest.warns(UserWarning, match="1 of 2 test classes are in the training half too, so the figures are not"):
        load_dataset("folder", root / "my.csv")


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_dataset("folder", path)
    assert str(path) in str(caught.value)
    return str(caught.value)


HEAD = "path,label,split\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty; its first line names the columns, path,label,split"),
        (b"\n \n", "empty; its first line"),
        (b"owls/0.jpg,a,train\n", "line 1: no columns named 'path' among 'owls/0.jpg', 'a', 'train'; the header names"),
        (b"path,label,spilt\n", "line 1: no columns named 'split' among 'path', 'label', 'spilt'"),
        (b"path,label,split,Path\n", "line 1: 2 columns named 'path'"),
        (HEAD + "owls/0.jpg,a\n", "line 2: 2 values, the header has 3"),
        (HEAD + "owls/0.jpg,a, b,train\n", "line 2: 4 values, the header has 3; correct the line, quote commas"),
        (HEAD + 'owls/0.jpg,"a"b,train\n', "line 2: not CSV"),
        (HEAD + 'owls/0.jpg,"a,train\n', "line 2: not CSV (unexpected end of data)"),
        (HEAD + f"{'x' * 200_000},a,train\n", "line 2: not CSV (field larger than field limit"),
        (HEAD + "owls/0.jpg,,train\n", "line 2: label is '', accepted is a non-empty text"),
        (HEAD + " ,a,train\n", "line 2: path is '', accepted is a non-empty text"),
        (HEAD + "a\0b,a,train\n", "line 2: "),
        (HEAD + "owls/0.jpg,a,\n", "line 2: split is ''"),
        (HEAD + "owls/0.jpg,a,trian\n", "line 2: split 'trian', accepted are train, test and val"),
        (HEAD + "owls/0.jpg,a,train\n./owls/0.jpg,a,test\n", "line 3: './owls/0.jpg' again, first in "),
        (HEAD + "owls/0.jpg,a,train\nowls/1.jpg,a,train\n", "no image of split test (or val), found 2 of train;"),
        (HEAD + "owls/0.jpg,a,test\n", "no image of split train, found 1 of test; say which images train"),
        (HEAD, "no image of split train, found none"),
        (HEAD + "owls/0.jpg,a,train\nowls/1.jpg,b,test\n", "(train)': class 'a' has 1 readable image "),
        (b"path,label,split\n\xff\xfe,a,train\n", "not a text file in UTF-8; save it as UTF-8"),
    ],
)
def test_a_bad_table_is_named_with_its_line(root, content, message):
    (root / "my.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in refusal(root / "my.csv")


GOOD = '{"path": "owls/0.jpg", "label": "a", "split": "train"}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", "line 2: '[1]' is no object; put one object on each line"),
        ('{"path": 1', "line 2: not JSON ("),
        (GOOD + GOOD, "line 2: not JSON (Extra data"),
        ("[" * 100_000, "line 2: not JSON ("),
        (f'{{"label": {"9" * 5000}}}', "line 2: not JSON (Exceeds the limit"),
        ('{"path": "a", "label": "b"}', "line 2: no 'split' in it; name each of path, label, split once"),
        (GOOD[:-1] + ', "label": "b"}', "line 2: 2 'label' in it"),
        ('{"path": 3, "label": "b", "split": "test"}', "line 2: path is 3, accepted is text"),
        ('{"path": "a", "label": 3.0, "split": "test"}', "line 2: label is 3.0, accepted is text or a whole number"),
        ('{"path": "a", "label": NaN, "split": "test"}', "line 2: label is nan, accepted is text or a whole number"),
        ('{"path": "a", "label": true, "split": "test"}', "line 2: label is True, accepted is text or a whole number"),
        ('{"path": "a", "label": ["b"], "split": "test"}', "line 2: label is ['b'], accepted is text or a whole"),
        ('{"path": "a\\u0000", "label": "b", "split": "test"}', "line 2: path is 'a\\x00', accepted is"),
        ('{"path": "a", "label": "\\ud800", "split": "test"}', "line 2: label is '\\ud800', accepted is"),
        ('{"path": "a", "label": "b", "split": null}', "line 2: split is None, accepted is text"),
    ],
)
def test_a_bad_line_of_json_is_named(root, line, message):
    (root / "my.jsonl").write_text(f"{GOOD}\n{line}\n")
    assert message in refusal(root / "my.jsonl")


def test_a_file_of_another_kind_is_no_list(root):
    (root / "my.parquet").touch()
    message = refusal(root / "my.parquet")
    assert "is a file; accepted are a folder of class folders, and a list of path, label, split named .csv, " in message


# ── By folders ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("names", [("train", "test"), ("Training", "TEST"), ("train", "val"), ("train", "valid")])
def test_a_root_of_two_halves_is_used_as_one(tmp_path, names):
    first, second = names
    fill(tmp_path, f"{first}/owl", f"{first}/jay", f"{first}/tit", f"{second}/auk")
    train, test = load_dataset("folder", tmp_path)
    assert train.classes == ["jay", "owl", "tit"] and test.classes == ["auk"] and len(train) == 6 and len(test) == 2
    assert all(path.is_relative_to(tmp_path / second) for path in test.paths)


def test_loose_pictures_do_not_make_the_halves_classes(tmp_path):
    fill(tmp_path, "train", "test", "train/owl", "test/jay", "val/auk", "other/x", "__MACOSX/train")
    told = r"skipped: images in no class folder: 4, folders beside train and test \(other, val\): 2"
    with pytest.warns(UserWarning, match=told):
        train, test = load_dataset("folder", tmp_path)
    assert train.classes == ["owl"] and test.classes == ["jay"]


def test_halves_without_classes_are_no_two_classes(tmp_path):
    fill(tmp_path, "train", "test/owl")
    message = refusal(tmp_path)
    assert "holds 'train' and 'test', so it is a split, but 'train' holds no class folders; put images in" in message
    fill(tmp_path, "Train/owl")
    assert "'Train' and 'train' are one half by name; keep one" in refusal(tmp_path)


def test_a_train_among_cars_and_ships_is_a_class(tmp_path):
    train, test = load_dataset("folder", fill(tmp_path, "car", "ship", "train"))
    assert train.classes + test.classes == ["car", "ship", "train"]


def test_both_halves_are_unpacked_where_an_archive_has_a_folder_of_its_own(tmp_path):
    fill(tmp_path, "birds/birds/train/owl", "birds/birds/test/jay", "__MACOSX/birds")
    for beside in (".DS_Store", "README.md", "birds/LICENSE"):
        (tmp_path / beside).touch()
    assert load_dataset("folder", tmp_path)[1].classes == ["jay"]
    shutil.rmtree(tmp_path / "birds/birds/test")
    fill(tmp_path, "birds/birds/train/jay")
    with pytest.warns(UserWarning, match="folder: the test half has one class, so Recall and MAP are 100 per cent"):
        assert load_dataset("folder", tmp_path)[1].classes == ["owl"], "one half's classes alone, halved"
