"""The released layouts, in miniature: images, splits, and errors."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from saga_fast.data import PUBLISHED, cars, load_dataset
from saga_fast.utils.errors import InputError

from . import released

pytestmark = pytest.mark.filterwarnings("ignore:.*published")
layouts = pytest.mark.parametrize("layout", released.RELEASES)


def build(layout: str, root: Path, **size: int) -> tuple[str, Path]:
    name, make = released.RELEASES[layout]
    return name, make(root, **size)


def shown(data) -> list[tuple[int, tuple[int, int, int]]]:
    return [(label, image.getpixel((5, 5))) for image, label in data]


@layouts
@pytest.mark.parametrize("classes", [4, 5])
def test_the_first_half_of_the_classes_trains_and_every_label_is_right(layout, classes, tmp_path):
    train, test = load_dataset(*build(layout, tmp_path, classes=classes))
    middle = (classes + 1) // 2
    assert (len(train.classes), len(test.classes)) == (middle, classes - middle)
    assert not set(train.classes) & set(test.classes) and not set(train.paths) & set(test.paths)
    for data, first in ((train, 0), (test, middle)):
        expected = {(c, released.color(first + c, number)) for c in range(len(data.classes)) for number in range(3)}
        found = shown(data)
        assert len(found) == len(data) == len(data.labels) == len(expected)
        for (label, seen), promised in zip(found, data.labels):
            assert label == promised
            assert any(label == c and np.abs(np.subtract(seen, known)).max() <= 3 for c, known in expected)
        for c, known in expected:  # each picture once
            assert sum(label == c and np.abs(np.subtract(seen, known)).max() <= 3 for label, seen in found) == 1


@layouts
def test_the_order_is_the_lists_and_the_same_every_time(layout, tmp_path):
    name, root = build(layout, tmp_path)
    halves = load_dataset(name, root)
    again = load_dataset(name, root)
    assert [half.paths for half in halves] == [half.paths for half in again]
    files = [path.relative_to(root).as_posix() for half in halves for path in half.paths]
    if layout == "aircraft":  # train, val, test; each as listed
        assert [f"{path[-7:-4]}" for path in files] == [
            *("010", "000", "011", "001", "012", "002"),
            *("030", "020", "031", "021", "032", "022"),
        ]
    elif layout == "cars, devkit":  # the training partition first
        assert files[:6] == [*(f"cars_train/{i:05d}.jpg" for i in (5, 6, 7, 8)), "cars_test/00003.jpg", files[5]]
    else:
        assert files == sorted(files)


def test_names_of_the_classes(tmp_path):
    def names(layout):
        train, test = load_dataset(*build(layout, tmp_path / layout))
        return train.classes, test.classes

    assert names("cub") == (["001.Z_Bird", "002.Y_Bird"], ["003.X_Bird", "004.W_Bird"])
    cars = (["Model Z Sedan 2012", "Model Y Sedan 2012"], ["Model X Sedan 2012", "Model W Sedan 2012"])
    assert names("cars, whole") == names("cars, devkit") == cars
    assert names("aircraft") == (["707-320", "An-12"], ["F/A-18", "Gulfstream IV"])
    assert [c.split("-")[-1] for half in names("inat-aves") for c in half] == ["0", "1", "2", "3"]


def test_the_devkits_lists_may_lie_beside_the_images(tmp_path):
    train, test = load_dataset("cars", released.cars_devkit(tmp_path, inner=False))
    assert len(train) == len(test) == 6


def same_halves(name: str, root: Path, plain: tuple) -> None:
    for found, known in zip(load_dataset(name, root), plain):
        assert sorted(found.classes) == sorted(known.classes) and len(found) == len(known)
        for a, b in zip(*(sorted((d.classes[label], shown) for label, shown in shown_of(d)) for d in (found, known))):
            assert a[0] == b[0] and np.abs(np.subtract(a[1], b[1])).max() <= 3


shown_of = shown


@layouts
@pytest.mark.parametrize("wrapped", ["unpacked", "archive/unpacked"])
def test_an_archives_own_folder_may_stand_around_it(layout, wrapped, tmp_path):
    name, root = build(layout, tmp_path / "plain")
    shutil.copytree(root, tmp_path / "outer" / wrapped)
    (tmp_path / "outer" / "__MACOSX" / "unpacked").mkdir(parents=True)
    same_halves(name, tmp_path / "outer", load_dataset(name, root))


def test_two_copies_side_by_side_are_not_chosen_from(tmp_path):
    for name in ("a", "b"):
        released.cub(tmp_path / name)
    message = refusal("cub", tmp_path)
    assert f"both '{tmp_path}/a' and '{tmp_path}/b' look like the data set; give one of them as --data.root" in message


def test_aircrafts_own_data_folder_may_be_the_root(tmp_path):
    root = released.aircraft(tmp_path)
    same_halves("aircraft", root / "data", load_dataset("aircraft", root))


@pytest.mark.parametrize("name", ["2021_train_mini", "2021_train_mini/train_mini", "train_mini/train_mini", "."])
def test_inats_folder_by_the_names_it_has(name, tmp_path):
    plain = load_dataset("inat-aves", released.inat_aves(tmp_path / "plain"))
    shutil.copytree(tmp_path / "plain" / "train_mini", tmp_path / "root" / name, dirs_exist_ok=True)
    same_halves("inat-aves", tmp_path / "root", plain)


def test_cars_whose_folders_stand_in_themselves(tmp_path):
    plain = load_dataset("cars", released.cars_devkit(tmp_path / "plain"))
    root = released.cars_devkit(tmp_path / "root")
    for name in ("cars_train", "cars_test"):
        (root / name).rename(tmp_path / "images")
        (root / name).mkdir()
        (tmp_path / "images").rename(root / name / name)
    (root / "car_devkit").mkdir()
    (root / "devkit").rename(root / "car_devkit" / "devkit")
    labels = root / "cars_test_annos_withlabels.mat"
    labels.rename(labels.with_stem(f"{labels.stem} (1)"))
    same_halves("cars", root, plain)


@pytest.mark.parametrize("outer", [".", "car_data", "car_data/car_data"])
def test_cars_by_folder(outer, tmp_path):
    """The same models train and test as in the release, whichever partition their pictures are in."""
    root = tmp_path / outer
    for label in range(4):
        for number in range(3):
            part = "train" if label == 0 or number else "test"
            released.paint(root / part / f"{'ABCD'[label]} Sedan" / f"{number}.jpg", label, number)
    (root / "test" / "A Sedan" / "notes.txt").parent.mkdir(exist_ok=True)
    (root / "test" / "A Sedan" / "notes.txt").touch()
    with pytest.warns(UserWarning, match="cars: skipped: .txt: 1"):
        train, test = load_dataset("cars", tmp_path)
    assert (train.classes, test.classes) == (["A Sedan", "B Sedan"], ["C Sedan", "D Sedan"])
    assert len(train) == len(test) == 6 and train.labels.count(0) == 3
    for data, first in ((train, 0), (test, 2)):
        for label, seen in shown(data):
            assert abs(seen[0] - released.color(first + label, 0)[0]) <= 3


@pytest.mark.parametrize("change", [("utf-8-sig", " ", "\n"), ("utf-16", " ", "\n"), ("utf-8", "\t", "\n"),
                                    ("utf-8", " \t ", "\r\n"), ("utf-8", " ", "\r")])  # fmt: skip
def test_lists_that_an_editor_has_saved_again(change, tmp_path):
    encoding, space, end = change
    root = released.cub(tmp_path)
    plain = load_dataset("cub", root)
    for name in ("images", "image_class_labels", "classes"):
        text = (path := root / f"{name}.txt").read_text()
        path.write_bytes(text.replace(" ", space).replace("\n", end).encode(encoding))
    assert [(half.paths, half.labels, half.classes) for half in load_dataset("cub", root)] == [
        (half.paths, half.labels, half.classes) for half in plain
    ]


def test_published_counts_are_the_papers():
    counts = {name: (p.classes, p.train_images + p.test_images) for name, p in PUBLISHED.items()}
    assert counts == {
        "cub": (200, 11_788),
        "cars": (196, 16_185),
        "aircraft": (100, 10_000),
        "inat-aves": (1_486, 74_300),
    }


@pytest.mark.filterwarnings("default")
@layouts
def test_a_set_that_is_not_whole_is_warned_of(layout, tmp_path):
    name, root = build(layout, tmp_path)
    with pytest.warns(UserWarning, match=f"{name}: 4 classes, published .*data check {name} --root"):
        load_dataset(name, root)


def refusal(name: str, root: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_dataset(name, root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("layout", "file"),
    [
        ("cub", "images.txt"),
        ("cub", "image_class_labels.txt"),
        ("cub", "classes.txt"),
        ("cars, whole", "cars_annos.mat"),
        ("cars, devkit", "devkit/cars_train_annos.mat"),
        ("cars, devkit", "devkit/cars_meta.mat"),
        ("aircraft", "data/images_variant_val.txt"),
    ],
)
def test_a_missing_or_garbled_list_is_named(layout, file, tmp_path):
    name, root = build(layout, tmp_path)
    whole = (root / file).read_bytes()
    (root / file).write_bytes(b"\xff\xfe\x00garbage\x80" * 9)
    assert str(root / file) in (message := refusal(name, root)) and "from the release again" in message
    (root / file).write_bytes(whole[: len(whole) // 2])
    if file.endswith(".mat"):
        assert str(root / file) in refusal(name, root)
    (root / file).unlink()
    assert (
        str(root / file) in (message := refusal(name, root)) and "No such file" in message or "no such file" in message
    )


def test_folders_that_are_missing_are_named(tmp_path):
    assert "none of car_ims, cars_train and car_data is a folder" in refusal("cars", tmp_path)
    assert "train_mini" in (message := refusal("inat-aves", tmp_path)) and "--data.root" in message
    released.inat_aves(tmp_path, classes=1)
    assert "1 folders NNNNN_Animalia_Chordata_Aves_…, 2 or more are needed" in refusal("inat-aves", tmp_path)


def test_the_devkits_test_list_without_classes_will_not_do(tmp_path):
    root = released.cars_devkit(tmp_path)
    (root / "cars_test_annos_withlabels.mat").unlink()
    assert "devkit/cars_test_annos_withlabels.mat" in refusal("cars", root)
    shutil.copy(root / "devkit/cars_test_annos.mat", root / "cars_test_annos_withlabels.mat")
    assert "annotations have no `class`" in refusal("cars", root)


@pytest.mark.parametrize(
    ("file", "line", "text", "message"),
    [
        ("images.txt", 5, "5", "images.txt' line 5: found '5', accepted is `NUMBER FOLDER/FILE`"),
        ("images.txt", 5, "4 002.Y_Bird/b.jpg", "images.txt' line 5: '4' again, first in .*images.txt' line 4"),
        ("images.txt", 5, "5 001.Z_Bird/Bird_0.jpg", "line 5: 'images/001.Z_Bird/Bird_0.jpg' again, .*line 1"),
        ("images.txt", 5, "77 002.Y_Bird/Bird_1.jpg", "labels.txt' line 5: image '5' is not in images.txt"),
        ("images.txt", 5, "5 ../../secret.jpg", "images.txt' line 5: 'images/../../secret.jpg' is no path within"),
        ("image_class_labels.txt", 5, "", "images.txt' line 5: image '5' is not in image_class_labels.txt"),
        ("image_class_labels.txt", 5, "5 9", "labels.txt' line 5: class '9' is not in classes.txt"),
        ("image_class_labels.txt", 5, "5 two", "labels.txt' line 5: class 'two' is not in classes.txt"),
        ("image_class_labels.txt", 5, "5 1", None),
        ("classes.txt", 2, "9 002.Y_Bird", "classes.txt' line 2: class '9', accepted is 2 here"),
        ("classes.txt", 2, "two", "classes.txt' line 2: found 'two', accepted is `NUMBER NAME`"),
    ],
)
def test_a_bad_line_of_cub_is_named(file, line, text, message, tmp_path):
    root = released.cub(tmp_path)
    lines = (root / file).read_text().splitlines()
    lines[line - 1] = text
    (root / file).write_text("\r\n".join(lines))
    if message is None:
        assert [len(half) for half in load_dataset("cub", root)] == [6, 6]
    else:
        with pytest.raises(InputError, match=message):
            load_dataset("cub", root)


@pytest.mark.parametrize(
    ("part", "text", "message"),
    [
        ("val", "1000001", "images_variant_val.txt' line 4: found '1000001', accepted is `IMAGE VARIANT`"),
        ("val", "1000000 707-320", "'data/images/1000000.jpg' again, first in .*images_variant_train.txt' line 4"),
        ("test", "../1000009 An-12", "_test.txt' line 4: 'data/images/../1000009.jpg' is no path within"),
        ("test", "1000009 An-99", "class 'An-99' has 1 readable image "),
    ],
)
def test_a_bad_line_of_aircraft_is_named(part, text, message, tmp_path):
    root = released.aircraft(tmp_path)
    path = root / "data" / f"images_variant_{part}.txt"
    path.write_text("\n".join([*path.read_text().splitlines()[:3], text]))
    with pytest.raises(InputError, match=message):
        load_dataset("aircraft", root)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("class", 0, "cars_annos.mat' annotation 5: class 0, accepted are 1 to 4"),
        ("class", 5, "annotation 5: class 5, accepted are 1 to 4"),
        ("class", "two", "annotation 5: class 'two', accepted are 1 to 4"),
        ("class", [1.0, 2.0], "annotation 5: class .*, accepted are 1 to 4"),
        ("relative_im_path", 7, "annotation 5: relative_im_path is 7, accepted is a file name"),
        ("relative_im_path", "", "annotation 5: relative_im_path is .*, accepted is a file name"),
        ("relative_im_path", ".", "annotation 5: '.' is no path within"),
        ("relative_im_path", "/etc/passwd", "annotation 5: '/etc/passwd' is no path within"),
        ("relative_im_path", "car_ims/../../x.jpg", "annotation 5: 'car_ims/../../x.jpg' is no path within"),
        ("relative_im_path", "car_ims/000001.jpg", "annotation 5: .* again, first in .*annotation 1"),
    ],
)
def test_a_bad_annotation_of_cars_is_named(field, value, message, tmp_path):
    root = released.cars_whole(tmp_path)
    variables = loadmat(root / "cars_annos.mat")
    variables["annotations"][field][0, 4] = value
    savemat(root / "cars_annos.mat", {name: variables[name] for name in ("annotations", "class_names")})
    with pytest.raises(InputError, match=message):
        load_dataset("cars", root)


def test_a_mat_file_that_crashes_its_reader_is_named(tmp_path, monkeypatch):
    root = released.cars_whole(tmp_path)
    monkeypatch.setattr(cars, "loadmat", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    assert "cars_annos.mat': not a readable .mat file (what reads it crashed); take it" in refusal("cars", root)


def test_a_mat_file_without_the_variable_is_named(tmp_path):
    root = released.cars_whole(tmp_path)
    savemat(root / "cars_annos.mat", {"annotations": np.zeros(3)})
    assert "cars_annos.mat': holds no `class_names`" in refusal("cars", root)
    savemat(root / "cars_annos.mat", {"class_names": np.zeros(3), "annotations": np.zeros(3)})
    assert "have no `relative_im_path`" in refusal("cars", root)


@pytest.mark.parametrize("whole_folder", [False, True])
def test_a_link_out_of_the_root_is_refused_by_name(whole_folder, tmp_path):
    root, outside = released.cub(tmp_path / "root"), tmp_path / "outside"
    inner = root / "images" / "002.Y_Bird" if whole_folder else root / "images" / "002.Y_Bird" / "Bird_1.jpg"
    inner.rename(outside)
    inner.symlink_to(outside)
    message = refusal("cub", root)
    assert f"images.txt' line {4 if whole_folder else 5}: 'images/002.Y_Bird/Bird_" in message
    assert "leads by a link out of" in message and str(outside) in message


def test_the_root_itself_may_be_a_link(tmp_path):
    released.cub(tmp_path / "disk")
    (tmp_path / "link").symlink_to("disk")
    assert len(load_dataset("cub", tmp_path / "link")[0]) == 6


def test_a_list_may_be_read_in_another_order_of_lines(tmp_path):
    root = released.cub(tmp_path)
    labels = (root / "image_class_labels.txt").read_text().splitlines()
    straight = [half.paths for half in load_dataset("cub", root)]
    (root / "image_class_labels.txt").write_text("\n".join(reversed(labels)))
    assert [half.paths for half in load_dataset("cub", root)] == straight
