"""Real data from disk: every layout is read as it should be, and every broken one is refused in so many words."""

from __future__ import annotations

import csv
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import neuronsurgery as ns
from neuronsurgery.study import data
from neuronsurgery.study.readers import (
    EXPECTED_COUNTS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Framing,
    ImageData,
    Images,
    Loading,
    RandomCrop,
    assembly,
    batches,
    celeba,
    describe_counts,
    digests,
    disk,
    evaluation_transform,
    image_folder,
    joined_source,
    training_source,
    training_transform,
    waterbirds,
)
from neuronsurgery.study.training import EpochReport, Recipe, Source, train

pytest.importorskip("torchvision")
Image = pytest.importorskip("PIL.Image")

# Per split, the images of groups 0, 1, 2, 3.
COUNTS = {"train": (4, 2, 1, 3), "validation": (2, 1, 1, 1), "test": (1, 2, 1, 1)}
ROWS = [
    (split, group // 2, group % 2)
    for split, counts in enumerate(COUNTS.values())
    for group, count in enumerate(counts)
    for _ in range(count)
]
WATERBIRDS_GROUPS = ("landbird on land", "landbird on water", "waterbird on land", "waterbird on water")
CELEBA_GROUPS = ("non-blond woman", "non-blond man", "blond woman", "blond man")
ATTRIBUTES = [f"Attribute_{index}" for index in range(40)]
ATTRIBUTES[9], ATTRIBUTES[20] = "Blond_Hair", "Male"


def write_image(path: Path, shade: int, size: tuple[int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    slope = Image.linear_gradient("L").resize(size)  # crops and flips must show
    Image.merge("RGB", [slope, slope.rotate(90), Image.new("L", size, shade)]).save(path, quality=95)


def write_rows(path: Path, rows: Iterable[Sequence[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


# Waterbirds trees


def bird_name(index: int) -> str:
    return f"{index % 3:03d}.Some_Bird/Some_Bird_{index:04d}.jpg"


def make_birds(images: Path, table: Path | None = None) -> Path:
    """Images, and the six columns of the generator."""
    rows: list[Sequence[object]] = [("img_id", "img_filename", "y", "split", "place", "place_filename")]
    for index, (split, y, a) in enumerate(ROWS):
        write_image(images / bird_name(index), 10 * index, (50, 40))
        rows.append((index + 1, bird_name(index), y, split, a, f"/l/lake/{index:08d}.jpg"))
    table = table or images / "metadata.csv"
    write_rows(table, rows)
    return table


def make_subpopbench_birds(images: Path, table: Path) -> None:
    make_birds(images).unlink()
    rows = [(index + 1, bird_name(index), split, y, a) for index, (split, y, a) in enumerate(ROWS)]
    write_rows(table, [("id", "filename", "split", "y", "a"), *rows])


def release(folder: Path, name: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "RELEASE_v1.0.txt").write_text(f"{name} v1.0\n")
    return folder


def below_group_dro(root: Path) -> None:
    make_birds(root / "waterbird_complete95_forest2water2")


def as_wilds(root: Path) -> None:
    make_birds(release(root / "waterbirds_v1.0", "waterbirds"))


def as_subpopbench(root: Path) -> None:
    folder = root / "waterbirds"
    make_subpopbench_birds(folder / "waterbird_complete95_forest2water2", folder / "metadata_waterbirds.csv")


def as_old_subpopbench(root: Path) -> None:
    images = root / "waterbirds" / "waterbird_complete95_forest2water2"
    make_subpopbench_birds(images, root / "metadata_waterbirds.csv")


@pytest.fixture
def birds(tmp_path: Path) -> Path:
    make_birds(tmp_path / "birds")
    return tmp_path / "birds"


def assert_is_the_tree(dataset: ImageData, names: tuple[str, ...]) -> None:
    assert dataset.group_names == names
    assert {split: part.counts for split, part in dataset.splits.items()} == COUNTS
    for number, part in enumerate(dataset.splits.values()):
        rows = [(y, 2 * y + a) for split, y, a in ROWS if split == number]
        assert part.targets.dtype == part.groups.dtype == torch.int64
        assert list(zip(part.targets.tolist(), part.groups.tolist(), strict=True)) == rows
        assert all((part.folder / path).is_file() for path in part.paths)


@pytest.mark.parametrize("layout", [make_birds, below_group_dro, as_wilds, as_subpopbench, as_old_subpopbench])
def test_waterbirds_in_every_layout(layout: Callable[[Path], object], tmp_path: Path) -> None:
    layout(tmp_path)
    dataset = waterbirds(tmp_path)
    assert_is_the_tree(dataset, WATERBIRDS_GROUPS)
    assert dataset.train.paths[0] == bird_name(0)


def test_wilds_folder_itself_is_read_too(tmp_path: Path) -> None:
    as_wilds(tmp_path)
    assert_is_the_tree(waterbirds(str(tmp_path / "waterbirds_v1.0")), WATERBIRDS_GROUPS)


# CelebA trees


def face_name(index: int) -> str:
    return f"{index + 1:06d}.jpg"


def make_faces(images: Path) -> None:
    for index in range(len(ROWS)):
        write_image(images / face_name(index), 10 * index, (178, 218))


def attribute_values(y: int, a: int) -> list[int]:
    values = [-1] * 40
    values[9], values[20] = 2 * y - 1, 2 * a - 1
    return values


def kaggle(folder: Path, nested: bool = False) -> None:
    make_faces(folder / "img_align_celeba" / ("img_align_celeba" if nested else ""))
    rows = [(face_name(i), *attribute_values(y, a)) for i, (_, y, a) in enumerate(ROWS)]
    write_rows(folder / "list_attr_celeba.csv", [("image_id", *ATTRIBUTES), *rows])
    partition = [(face_name(i), split) for i, (split, _, _) in enumerate(ROWS)]
    write_rows(folder / "list_eval_partition.csv", [("image_id", "partition"), *partition])


def kaggle_nested(root: Path) -> None:
    kaggle(root, nested=True)


def wilds_faces(root: Path) -> None:
    kaggle(release(root / "celebA_v1.0", "celebA"))


def group_dro_faces(root: Path) -> None:
    kaggle(root / "data")


def original(folder: Path, attributes: str, partition: str, images: str = "img_align_celeba") -> None:
    make_faces(folder / images)
    lines = [str(len(ROWS)), " ".join(ATTRIBUTES) + " "]
    lines += [
        f"{face_name(i)} " + " ".join(f"{v:2d}" for v in attribute_values(y, a)) for i, (_, y, a) in enumerate(ROWS)
    ]
    splits = [f"{face_name(i)} {split}" for i, (split, _, _) in enumerate(ROWS)]
    for name, content in ((attributes, lines), (partition, splits)):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("\r\n".join(content) + "\r\n")


def original_txt(root: Path) -> None:
    original(root, "list_attr_celeba.txt", "list_eval_partition.txt")


def original_called_csv(root: Path) -> None:
    original(root, "list_attr_celeba.csv", "list_eval_partition.csv")


def original_drive(root: Path) -> None:
    original(root, "Anno/list_attr_celeba.txt", "Eval/list_eval_partition.txt", "Img/img_align_celeba")


def jtt_merged(root: Path) -> None:
    """An index column without a name, all attributes as -1 and 1, and the split."""
    make_faces(root / "data" / "img_align_celeba")
    rows = [(i, face_name(i), *attribute_values(y, a), split) for i, (split, y, a) in enumerate(ROWS)]
    write_rows(root / "data" / "metadata.csv", [("", "image_id", *ATTRIBUTES, "split"), *rows])


def zero_one_merged(root: Path) -> None:
    make_faces(root / "img_align_celeba")
    rows = [(i, face_name(i), y, f"{a}.0", split) for i, (split, y, a) in enumerate(ROWS)]
    write_rows(root / "metadata.csv", [("Unnamed: 0", "image_id", "Blond_Hair", "Male", "partition"), *rows])


def dfr_merged(root: Path) -> None:
    """The table among the images."""
    make_faces(root)
    rows = [(face_name(i), y, split, a) for i, (split, y, a) in enumerate(ROWS)]
    write_rows(root / "celeba_metadata.csv", [("img_filename", "y", "split", "place"), *rows])


def facebook_merged(root: Path) -> None:
    make_faces(root / "img_align_celeba")
    rows = [(i + 1, face_name(i), y, split, a, "") for i, (split, y, a) in enumerate(ROWS)]
    header = ("img_id", "img_filename", "y", "split", "place", "place_filename")
    write_rows(root / "metadata.csv", [header, *rows])


def subpopbench_faces(root: Path) -> None:
    make_faces(root / "celeba" / "img_align_celeba")
    rows = [(i + 1, face_name(i), split, y, a) for i, (split, y, a) in enumerate(ROWS)]
    write_rows(root / "celeba" / "metadata_celeba.csv", [("id", "filename", "split", "y", "a"), *rows])


FACES = [kaggle, kaggle_nested, wilds_faces, group_dro_faces, original_txt, original_called_csv, original_drive]
FACES += [jtt_merged, zero_one_merged, dfr_merged, facebook_merged, subpopbench_faces]


@pytest.mark.parametrize("layout", FACES)
def test_celeba_in_every_layout(layout: Callable[[Path], None], tmp_path: Path) -> None:
    layout(tmp_path)
    dataset = celeba(tmp_path)
    assert_is_the_tree(dataset, CELEBA_GROUPS)
    assert dataset.class_names == ("non-blond", "blond")
    assert dataset.train.paths[0] == face_name(0)


def test_celeba_with_attributes_but_splits_only_in_the_merged_table(tmp_path: Path) -> None:
    zero_one_merged(tmp_path)
    write_rows(tmp_path / "list_attr_celeba.csv", [("image_id", *ATTRIBUTES)])
    assert_is_the_tree(celeba(tmp_path), CELEBA_GROUPS)


# Any folder with a table


def chest_rows() -> list[Sequence[object]]:
    """Three classes as words, two attributes as numbers; no image of the last group."""
    cells = [
        ("train", "none", 5),
        ("train", "left", 5),
        ("VALID", "none", 9),
        ("Test", "right", 5),
        ("train", "left", 9),
    ]
    return [(f"p{index}/x.png", label, drain, split) for index, (split, label, drain) in enumerate(cells)]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "   "])
def test_a_folder_with_a_table_of_ones_own(tmp_path: Path, delimiter: str) -> None:
    rows = chest_rows()
    for path, *_ in rows:
        (tmp_path / str(path)).parent.mkdir()
        Image.new("L", (30, 30), 60).save(tmp_path / str(path))
    lines = [("file", "lung side", "drain", "part"), *rows]
    text = "\n\n".join(delimiter.join(map(str, line)).replace("lung side", "side") for line in lines)
    (tmp_path / "chest.csv").write_text("\ufeff" + text)
    dataset = image_folder(
        tmp_path,
        "chest.csv",
        path="file",
        label="side",
        attribute="drain",
        split="part",
        name="chest",
        framing=Framing((("resize", 8),)),
    )
    assert dataset.class_names == ("left", "none", "right")
    assert dataset.classes == 3
    assert dataset.group_names[:3] == ("side=left drain=5", "side=left drain=9", "side=none drain=5")
    assert dataset.train.groups.tolist() == [2, 0, 1]
    assert dataset.validation.groups.tolist() == [3]
    assert dataset.group_names[3:] == ("side=none drain=9", "side=right drain=5")  # nobody is right with 9
    assert dataset.test.counts == (0, 0, 0, 0, 1)
    assert list(dataset.loaders("train")) == list(dataset.group_names[:3])
    assert dataset.expected_counts is None
    (images, _, _), *_ = dataset.loaders("test")["side=right drain=5"]
    assert images.shape == (1, 3, 8, 8)  # grey becomes three channels


def test_numbers_are_ordered_as_numbers_and_absolute_paths_may_lie_elsewhere(tmp_path: Path) -> None:
    for index in range(3):
        write_image(tmp_path / "far" / f"{index}.jpg", index, (9, 9))
    rows = [(tmp_path / "far" / f"{i}.jpg", label, "0", "a") for i, label in enumerate(("10", "2", "-1"))]
    write_rows(tmp_path / "near" / "metadata.csv", [("path", "label", "split", "attribute"), *rows])
    dataset = image_folder(tmp_path / "near")
    assert dataset.class_names == ("-1", "2", "10")
    assert dataset.train.targets.tolist() == [2, 1, 0]
    assert len(next(iter(dataset.loaders("train").values()))) == 1


def test_splits_may_be_named_otherwise(tmp_path: Path) -> None:
    rows = [("a.png", 0, 0, "dev"), ("b.png", 1, 1, "FIT")]
    for name, *_ in rows:
        Image.new("RGB", (9, 9)).save(tmp_path / str(name))
    write_rows(tmp_path / "metadata.csv", [("path", "label", "attribute", "split"), *rows])
    dataset = image_folder(tmp_path, splits={"Fit": "train", "dev": "validation"})
    assert dataset.train.paths == ("b.png",)
    assert dataset.validation.paths == ("a.png",)
    assert len(dataset.test) == 0
    with pytest.raises(ValueError, match="splits must lead to train, validation, test, found val"):
        image_folder(tmp_path, splits={"fit": "train", "dev": "val"})


# What is wrong, all at once


def bird_row(index: int) -> str:
    return f"line {index + 2}: {bird_name(index)}"


def test_missing_images_are_counted_and_the_first_named(birds: Path) -> None:
    shutil.rmtree(birds / "001.Some_Bird")
    first = re.escape(", ".join(bird_row(index) for index in (1, 4, 7, 10, 13)))
    with pytest.raises(
        ValueError, match=rf"metadata.csv cannot be used:\n  images missing in .*birds \(7\): {first}, \.\.\."
    ):
        waterbirds(birds)


def test_a_folder_in_place_of_an_image_is_a_missing_image(birds: Path) -> None:
    (birds / bird_name(0)).unlink()
    (birds / bird_name(0)).mkdir()
    with pytest.raises(ValueError, match=rf"images missing in .* \(1\): {bird_row(0)}\n"):
        waterbirds(birds)


def test_everything_wrong_comes_in_one_error(birds: Path) -> None:
    edit(birds / "metadata.csv", f"1,{bird_name(0)},0,0,0", f"1,{bird_name(0)},bird,0,0")
    edit(birds / "metadata.csv", f"2,{bird_name(1)},0,0,0", f"2,{bird_name(1)},7,0,nan")
    edit(birds / "metadata.csv", f"3,{bird_name(2)},0,0,0", f"3,{bird_name(2)},0,holdout,0")
    edit(birds / "metadata.csv", f"4,{bird_name(3)},0,0,0", f"4,{bird_name(3)},0,3,0")
    (birds / bird_name(5)).unlink()
    with pytest.raises(ValueError, match="cannot be used") as caught:
        waterbirds(birds)
    assert str(caught.value).splitlines()[1:] == [
        f"  images whose label is no whole number (1): {bird_row(0)} ('bird')",
        f"  images whose label is neither 0 nor 1 (1): {bird_row(1)} ('7')",
        f"  images whose attribute is no whole number (1): {bird_row(1)} ('nan')",
        "  images in an unknown split, known are 0, train, training, 1, val, valid, validation, 2, test (2): "
        f"{bird_row(2)} ('holdout'), {bird_row(3)} ('3')",
        f"  images missing in {birds} (1): {bird_row(5)}",
        "Put this right and run again; nothing was done",
    ]


def test_unreadable_images_are_found_unless_that_is_declined(birds: Path) -> None:
    (birds / bird_name(0)).write_bytes(b"")
    (birds / bird_name(2)).write_bytes(b"<html>not found</html>")
    assert len(waterbirds(birds, verify=False).train) == 10  # nothing is opened
    with pytest.raises(
        ValueError, match=r"files that are no readable images \(2\): .*0000\.jpg \(cannot identify .*0002\.jpg \("
    ):
        waterbirds(birds)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize("index", [0, 12, 19])
def test_an_image_with_a_whole_header_and_half_a_body_is_found_in_any_split(index: int, birds: Path) -> None:
    truncate(birds / bird_name(index))
    with pytest.raises(
        ValueError, match=rf"files that are no readable images \(1\): {bird_row(index)} \(image file is truncated"
    ):
        waterbirds(birds)


def test_many_images_are_checked_in_parts_and_said_so(
    birds: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    truncate(birds / bird_name(13))
    monkeypatch.setattr(assembly, "_AT_ONCE", 8)
    with pytest.raises(ValueError, match=rf"files that are no readable images \(1\): {bird_row(13)} \("):
        waterbirds(birds)
    assert capsys.readouterr().err.splitlines() == [f"checking images: {done} of 20" for done in (8, 16, 20)]


@pytest.mark.parametrize("error", [Image.DecompressionBombError("a bomb"), KeyError("a bomb"), EOFError("a bomb")])
def test_whatever_pillow_raises_is_a_fault_with_a_name(
    error: Exception, birds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(path: object) -> None:
        raise error

    monkeypatch.setattr(Image, "open", explode)
    with pytest.raises(ValueError, match=rf"files that are no readable images \(20\): {bird_row(0)} \('?a bomb'?\)"):
        waterbirds(birds)
    with pytest.raises(ValueError, match=rf"{bird_name(0)}: not a readable image \('?a bomb'?\): replace the file"):
        next(iter(batches(waterbirds(birds, verify=False).train)))


def test_a_link_that_leads_nowhere_is_a_missing_image(birds: Path) -> None:
    for index, target in ((0, "nowhere.jpg"), (1, Path(bird_name(1)).name)):
        (birds / bird_name(index)).unlink()
        (birds / bird_name(index)).symlink_to(target)  # the second one leads to itself
    with pytest.raises(ValueError, match=rf"images missing in .* \(2\): {bird_row(0)}, {bird_row(1)}\n"):
        waterbirds(birds)
    (birds / bird_name(0)).unlink()
    (birds / bird_name(1)).unlink()
    for index in (0, 1):
        (birds / bird_name(index)).symlink_to(birds / bird_name(2))
    assert len(waterbirds(birds).train) == 10


def test_more_than_eight_bits_per_channel_are_refused_and_not_clipped(tmp_path: Path) -> None:
    Image.new("I;16", (9, 9), 40000).save(tmp_path / "deep.png")
    write_rows(tmp_path / "metadata.csv", [("path", "label", "attribute", "split"), ("deep.png", 0, 0, 0)])
    with pytest.raises(
        ValueError, match=r"files that are no readable images \(1\): line 2: deep.png \(its pixels are of mode I;16"
    ):
        image_folder(tmp_path)
    with pytest.raises(ValueError, match=r"deep.png: not a readable image \(its pixels are of mode I;16"):
        next(iter(batches(image_folder(tmp_path, verify=False).train)))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_later_is_named_in_one_line(workers: int, birds: Path) -> None:
    split = waterbirds(birds, loading=Loading(workers)).train
    truncate(birds / bird_name(0))
    with pytest.raises(ValueError, match="not a readable image") as caught:
        next(iter(batches(split)))
    assert str(caught.value).startswith(f"{birds / bird_name(0)}: not a readable image (image file is truncated")
    assert len(str(caught.value).splitlines()) == 1


def test_wrong_columns_are_listed_with_those_found(birds: Path) -> None:
    edit(birds / "metadata.csv", "img_id,img_filename,y,split,place", "img_id,image,y,fold,place")
    expected = (
        r"columns missing \(2\): expected 'img_filename' or 'filename', 'split', found 'img_id', 'image', 'y', 'fold'"
    )
    with pytest.raises(ValueError, match=expected):
        waterbirds(birds)


def test_a_ragged_row_is_named_by_its_line(birds: Path) -> None:
    edit(birds / "metadata.csv", f"3,{bird_name(2)},0", f"3,{bird_name(2)}")
    with pytest.raises(ValueError, match=r"rows without the 6 fields of the header \(1\): line 4 \(5\)"):
        waterbirds(birds)


@pytest.mark.parametrize("text", ["", "img_id,img_filename,y,split,place\n", "12\n"])
def test_an_empty_table_is_refused(birds: Path, text: str) -> None:
    (birds / "metadata.csv").write_text(text)
    with pytest.raises(ValueError, match=r"metadata\.csv: the table is empty: expected a header"):
        waterbirds(birds)


HEADER = "path,label,attribute,split\n"
LONG = "d" * 2400
HOSTILE = {
    "an open quotation mark": (
        'a.png,0,0,0\n\n"b.png,1,0,0\nc.png,0,0,0\n',
        r"csv: the row that begins in line 4 .*close",
    ),
    "one that another row closes": (
        'a.png,0,0,0\n"b.png,1,0,0\n"c.png",0,0,0\n',
        r"csv: the row that begins in line 3 cannot be read",
    ),
    "an open one in a long table": (
        '"a.png,0,0,0\n' + "b.png,0,0,0\n" * 20_000,
        r"the row that begins in line 2 .*limit",
    ),
    "a null byte": (
        'a\0.png,0,0,0\n"a\nb.png",0,0,0\n\0,1,2\n',
        r"rows without the 4 fields of the header \(1\): line 5 \(3\)\n.*null byte, .* \(2\): line 2, line 5\nPut"
        r"|in line 2 .*NUL",  # Python 3.10 reads no further
    ),
    "columns of one name": (
        "".join(f"{n}.png,0,0,0\n" for n in range(3)),
        r"csv: columns of one name \(1\): 'label' \(2 times\): name the columns as expected, each of them otherwise",
    ),
    "paths that are too long": (
        f"a.png,0,0,0\n{LONG}{LONG},1,0,0\n{LONG}/{LONG}/x.png,1,0,0\nz.png,0,0,0\n",
        r"path or folder cannot be read \(2\): d{100}\.\.\.d+ \(line 3: File name too long\), d{100}\.\.\.d*/x.png "
        r"\(line 4: File name too long\)\n  images missing in .* \(1\): line 5: z.png\n",
    ),
    "different labels, attributes and splits": (
        "a.png,0,0,0\na.png,0,0,0\n./a.png,1,0,0\nb.png,1,no,test\n./b.png,1.0,yes,train\nb.png,1,maybe,2\n"
        + "".join(f"{label}.png,{label},0,0\n" for label in "abcdefg"),
        r"images with more than one label \(2\): a.png \(line 2: '0', line 4: '1', line 8: 'a'\), b.png \(.*\n"
        r"  images with more than one attribute \(1\): b.png \(line 5: 'no', line 6: 'yes', line 7: 'maybe', "
        r"\.\.\. and 1 more\)\n"
        r"  images in more than one split \(1\): b.png \(line 5: 'test', line 6: 'train'\)\n"
        r".* images missing in .* \(5\): line 10: c.png, line 11: d.png",
    ),
}


@pytest.mark.parametrize(("rows", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_table_is_one_error_that_names_its_rows(rows: str, message: str, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (9, 9)).save(tmp_path / name)
    header = HEADER if "columns of one name" not in message else HEADER.replace("attribute", "label")
    (tmp_path / "metadata.csv").write_text(header + rows)
    with pytest.raises(ValueError, match=message):
        image_folder(tmp_path, **({"attribute": "label"} if header != HEADER else {}))


def test_rows_that_repeat_others_are_counted_in_one_warning(tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    rows = [("a.png", 1, 0, "train"), ("./a.png", "1.0", 0, 0), ("a.png", 1, 0, "Training")]
    write_rows(tmp_path / "metadata.csv", [("path", "label", "attribute", "split"), *rows])
    with pytest.warns(
        UserWarning, match=r"csv: 2 rows say again what others say \(line 3, line 4\): .* take"
    ) as caught:
        dataset = image_folder(tmp_path)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert len(dataset.train) == 3


def test_what_may_not_be_read_is_named(birds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the means of the system as far as these go: root may read everything."""
    calls = {name: getattr(os, name) for name in ("stat", "lstat", "listdir")}

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    def close(folder: str) -> None:
        """Neither the folder can be listed, nor is anything in it found."""

        def closed(name: str, call: Callable[..., object]) -> Callable[..., object]:
            def answer(path: Path, *more: object, **options: object) -> object:
                inside = Path(path) if name == "listdir" else Path(path).parent
                return refuse(path) if inside.name == folder else call(path, *more, **options)

            return answer

        for name, call in calls.items():
            monkeypatch.setattr(os, name, closed(name, call))

    close("001.Some_Bird")
    first = rf"{bird_name(1)} \(line 3: Permission denied\), {bird_name(4)} \(line 6: "
    with pytest.raises(
        ValueError, match=rf"images whose path or folder cannot be read \(7\): {first}.* and 2 more\nPut"
    ):
        waterbirds(birds)
    close("birds")
    with pytest.raises(
        OSError, match=r"birds cannot be read \(Permission denied\): give leave to read it, or pass another"
    ):
        waterbirds(birds)
    close("no folder of this name")
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(OSError, match=r"metadata\.csv cannot be read \(Permission denied\): give leave"):
        waterbirds(birds)


def test_a_table_that_is_no_text_is_refused(birds: Path) -> None:
    shutil.copy(birds / bird_name(0), birds / "metadata.csv")
    with pytest.raises(ValueError, match=r"metadata\.csv: expected a text file, found 'utf-8' codec"):
        waterbirds(birds)


def test_no_folder_and_no_table(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder: name the folder that the data set is in"):
        waterbirds(tmp_path / "nowhere")
    (tmp_path / "images").mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"has no table of CelebA: expected list_attr_celeba.csv or .*, found images/:"
    ):
        celeba(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"has no table of chest: expected chest.csv there, found images/: name"
    ):
        image_folder(tmp_path, "chest.csv", name="chest")


def test_celeba_without_splits(tmp_path: Path) -> None:
    kaggle(tmp_path)
    (tmp_path / "list_eval_partition.csv").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"list_attr_celeba.csv: expected list_eval_partition.csv or .txt beside"
    ):
        celeba(tmp_path)


def test_celeba_whose_tables_differ(tmp_path: Path) -> None:
    kaggle(tmp_path)
    edit(tmp_path / "list_eval_partition.csv", "000003.jpg", "999999.jpg")
    message = (
        r"images without a split in list_eval_partition.csv \(1\): 000003.jpg\n"
        r"  images of list_eval_partition.csv without attributes \(1\): 999999.jpg"
    )
    with pytest.raises(ValueError, match=message):
        celeba(tmp_path)


def test_celeba_whose_table_of_splits_contradicts_itself(tmp_path: Path) -> None:
    kaggle(tmp_path)
    with (tmp_path / "list_eval_partition.csv").open("a") as file:
        file.write("000003.jpg,2\n000004.jpg,0\n")
    with pytest.raises(ValueError, match=r"more than one split in list_eval_partition.csv \(1\): 000003.jpg\n"):
        celeba(tmp_path)


def test_celeba_attributes_are_not_a_mixture_of_codes(tmp_path: Path) -> None:
    zero_one_merged(tmp_path)
    edit(tmp_path / "metadata.csv", "000001.jpg,0", "000001.jpg,-1")
    with pytest.raises(
        ValueError,
        match=r"images whose label is neither -1 nor 1 \(11\): line 3: 000002.jpg \('0'\), line 4: 000003.jpg",
    ):
        celeba(tmp_path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [("a.png", "0.5", 0, 0), ("b.png", "1", 0, 0)],
            r"images whose label is no whole number \(1\): line 2: a.png \('0.5'\)",
        ),
        (
            [("a.png", "1", "", 0), ("b.png", "1", "nan", 0)],
            r"images whose attribute is missing \(2\): line 2: a.png \(''\), line 3: b.png \('nan'\)",
        ),
        ([("a.png", 0, 0, 1), ("b.png", 1, 0, 2)], r"splits without images \(1\): train"),
        ([("a.png", 0, 0, 0), ("b.png", 1, 0, 2), ("a.png", 0, 0, 2)], r"images in more than one split \(1\): a.png"),
        (
            [("a.png", number, 0, 0) for number in range(101)],
            r"different values of the label, of which 100 are allowed: is it the right column\? \(101\): 0, 1, 2,",
        ),
    ],
)
def test_tables_that_make_no_data_set(tmp_path: Path, rows: list[Sequence[object]], message: str) -> None:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (9, 9)).save(tmp_path / name)
    write_rows(tmp_path / "metadata.csv", [("path", "label", "attribute", "split"), *rows])
    with pytest.raises(ValueError, match=message):
        image_folder(tmp_path)


# Transforms


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_photographs_are_turned_as_the_camera_says(orientation: int, tmp_path: Path) -> None:
    turns = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    upright = Image.linear_gradient("L").resize((40, 24))
    stored = upright if turns[orientation] is None else upright.transpose(turns[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.jpg", quality=95, exif=exif)
    write_rows(tmp_path / "metadata.csv", [("path", "label", "attribute", "split"), ("a.jpg", 0, 0, 0)])
    framing = Framing((("crop", 24),))
    split = image_folder(tmp_path, framing=framing).train
    expected = evaluation_transform(framing)(upright.convert("RGB"))
    for images in (Images(split)[0][0], next(iter(batches(split)))[0][0]):
        assert torch.allclose(images, expected, atol=0.05)
    augmentation = RandomCrop(24, scale=(1.0, 1.0), ratio=(5 / 3, 5 / 3), flip=False)
    varied = next(iter(batches(split, augmentation=augmentation)))[0][0]
    assert torch.allclose(varied, training_transform(augmentation)(upright.convert("RGB")), atol=0.05)


def test_a_photograph_with_broken_exif_data_is_read_as_it_is(tmp_path: Path) -> None:
    Image.linear_gradient("L").save(tmp_path / "a.jpg", exif=b"Exif\0\0MM is no header of TIFF")
    write_rows(tmp_path / "metadata.csv", [("path", "label", "attribute", "split"), ("a.jpg", 0, 0, 0)])
    assert Images(image_folder(tmp_path).train)[0][0].shape == (3, 224, 224)


def noisy_image(width: int, height: int) -> object:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def reference(image: object) -> Tensor:
    from torchvision.transforms.v2 import functional

    plain = functional.to_dtype(functional.to_image(image), torch.float32, scale=True)
    return functional.normalize(plain, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def test_waterbirds_are_resized_to_256_and_cropped_to_224(birds: Path) -> None:
    framing = waterbirds(birds).test.framing
    image = noisy_image(300, 200)
    expected = image.resize((256, 256), Image.Resampling.BILINEAR).crop((16, 16, 240, 240))  # type: ignore[attr-defined]
    found = evaluation_transform(framing)(image)
    assert type(found) is Tensor
    assert found.shape == (3, 224, 224)
    assert torch.equal(found, torch.Tensor(reference(expected)))


def test_faces_are_cropped_to_178_and_resized_to_224(tmp_path: Path) -> None:
    kaggle(tmp_path)
    image = noisy_image(178, 218)
    expected = image.crop((0, 20, 178, 198)).resize((224, 224), Image.Resampling.BILINEAR)  # type: ignore[attr-defined]
    found = evaluation_transform(celeba(tmp_path).test.framing)(image)
    assert torch.equal(found, torch.Tensor(reference(expected)))


def test_another_normalisation_is_another_digest_and_the_usual_one_is_none(birds: Path) -> None:
    usual = waterbirds(birds)
    same = usual.normalized(IMAGENET_MEAN, IMAGENET_STD)
    other = usual.normalized((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    assert repr(usual.test.framing) == "Framing(steps=(('resize', 256), ('crop', 224)))"
    assert same.test.digest == usual.test.digest != other.test.digest
    assert "mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)" in repr(other.test.framing)
    first, second = (next(iter(batches(part.test)))[0] for part in (usual, other))
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    assert torch.allclose((first * std + mean - 0.5) / 0.25, second, atol=1e-5)
    once, again = (next(iter(training_source(part).epoch(4, 0, 1)))[0] for part in (usual, other))
    assert torch.allclose((once * std + mean - 0.5) / 0.25, again, atol=1e-5)
    assert training_source(usual).describe() != training_source(other).describe()


def test_training_crops_are_of_the_sources_settings() -> None:
    crop = RandomCrop()
    assert (crop.size, crop.scale, crop.flip) == (224, (0.7, 1.0), True)
    assert crop.ratio == pytest.approx((0.75, 1.333), abs=1e-3)
    text = repr(training_transform(crop))
    assert "RandomResizedCrop(size=(224, 224), scale=(0.7, 1.0), ratio=(0.75, 1.3333" in text
    assert "RandomHorizontalFlip(p=0.5)" in text
    assert "Flip" not in repr(training_transform(RandomCrop(flip=False)))


# Batches


def epoch_of(dataset: ImageData, epoch: int = 0, size: int = 4, shuffle: bool = True) -> list[tuple[Tensor, ...]]:
    return list(batches(dataset.train, size, seed=1, epoch=epoch, shuffle=shuffle, augmentation=dataset.augmentation))


def same(a: list[tuple[Tensor, ...]], b: list[tuple[Tensor, ...]]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) for left, right in zip(a, b, strict=True) for x, y in zip(left, right, strict=True)
    )


def test_batches_are_images_targets_and_groups(birds: Path) -> None:
    loader = batches(waterbirds(birds, size=32).train, 4)
    assert len(loader) == 3
    (images, targets, groups), *_, last = loader
    assert images.shape == (4, 3, 32, 32)
    assert images.dtype == torch.float32
    assert targets.tolist() == [0, 0, 0, 0]
    assert groups.dtype == torch.int64
    assert last[2].tolist() == [3, 3]
    assert same(list(loader), list(loader))


def test_order_and_augmentation_depend_on_seed_and_epoch_alone(birds: Path) -> None:
    dataset = waterbirds(birds, size=16)
    before = torch.random.get_rng_state()
    first = epoch_of(dataset)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(5)
    assert same(first, epoch_of(dataset))
    assert not same(first, epoch_of(dataset, epoch=1))
    assert not same(epoch_of(dataset, shuffle=False), epoch_of(dataset, epoch=1, shuffle=False))
    # What happens to an image depends neither on the order nor on the batch.
    whole = epoch_of(dataset, size=10, shuffle=False)[0][0]
    order = data.permutation(10, "order", 1, 0)
    assert torch.equal(torch.cat([images for images, _, _ in first]), whole[torch.from_numpy(order)])
    # The same image twice in a split varies twice: JTT repeats images.
    twice = replace(dataset, splits={"train": dataset.train.subset(torch.tensor([0, 0]))})
    assert not torch.equal(*epoch_of(twice)[0][0])


def test_workers_give_the_same_batches(birds: Path) -> None:
    alone, helped = waterbirds(birds, size=16), waterbirds(birds, size=16, loading=Loading(workers=1, pin_memory=True))
    before = torch.random.get_rng_state()
    assert same(epoch_of(alone), epoch_of(helped))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_batches_of_a_data_set_in_memory_are_its_own(birds: Path) -> None:
    dataset = data.synthetic(counts=dict.fromkeys(data.SYNTHETIC_COUNTS, (2, 1, 1, 1)))
    options = {"seed": 3, "epoch": 2, "shuffle": True, "augmentation": dataset.augmentation}
    assert same(list(batches(dataset.train, 2, **options)), list(data.batches(dataset.train, 2, **options)))
    with pytest.raises(
        TypeError, match=r"found RandomCrop\(.*for a split of class Split: pass the `.augmentation` of the data set"
    ):
        batches(dataset.train, augmentation=RandomCrop())
    with pytest.raises(TypeError, match=r"found Augmentation\(.*for a split of class ImageSplit"):
        batches(waterbirds(birds).train, augmentation=dataset.augmentation)
    with pytest.raises(ValueError, match="size must be at least 1, found 0"):
        batches(waterbirds(birds).train, 0)


def test_images_are_a_torch_dataset(birds: Path) -> None:
    split = waterbirds(birds, size=16).validation
    images, targets, groups = next(iter(DataLoader(Images(split), batch_size=5)))
    assert len(Images(split)) == 5
    assert torch.equal(targets, split.targets)
    assert torch.equal(groups, split.groups)
    assert torch.equal(images, next(iter(batches(split, 5)))[0])


def test_a_subset_keeps_images_and_groups_together(birds: Path) -> None:
    train = waterbirds(birds).train
    mask = train.groups == 3
    assert train.subset(mask).counts == (0, 0, 0, 3)
    assert train.subset(torch.tensor([9, 0])).paths == (bird_name(9), bird_name(0))
    assert train.subset(mask).digest != train.digest


def test_the_digest_is_that_of_the_rows_wherever_they_lie(birds: Path, tmp_path: Path) -> None:
    shutil.copytree(birds, tmp_path / "copy")
    assert waterbirds(birds).train.digest == waterbirds(tmp_path / "copy").train.digest
    assert waterbirds(birds, size=16).train.digest != waterbirds(birds).train.digest


def test_the_digest_of_a_split_changes_with_its_rows_and_files_alone(birds: Path) -> None:
    before = digests(waterbirds(birds))
    assert digests(waterbirds(birds)) == before
    edit(birds / "metadata.csv", f"{bird_name(19)},1,2,1", f"{bird_name(19)},1,2,0")  # a group of a test image
    write_image(birds / bird_name(12), 3, (40, 50))
    after = digests(waterbirds(birds))
    assert [split for split in before if before[split] != after[split]] == ["validation", "test"]
    embedded = data.synthetic(counts=dict.fromkeys(data.SYNTHETIC_COUNTS, (2, 1, 1, 1)))
    other = replace(embedded.test, targets=1 - embedded.test.targets)
    changed = digests(replace(embedded, splits={**embedded.splits, "test": other}))
    assert [split for split, said in digests(embedded).items() if changed[split] != said] == ["test"]


# As the study uses it


class Mean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(images.mean(dim=(2, 3)))
        return logits


def test_the_library_takes_the_loaders(birds: Path) -> None:
    dataset = waterbirds(birds, size=16)
    metrics = ns.evaluate(Mean(), dataset.loaders("train", 2))
    assert tuple(metrics.groups) == WATERBIRDS_GROUPS
    assert tuple(metrics.counts) == COUNTS["train"]
    scores = ns.group_grad_norms(Mean(), dataset.loaders("validation"))
    assert scores.groups == WATERBIRDS_GROUPS


def interrupt(report: EpochReport) -> None:
    raise InterruptedError(str(report))


def test_training_takes_the_source_and_resumes(birds: Path, tmp_path: Path) -> None:
    dataset = waterbirds(birds, size=16)
    source = training_source(dataset)
    assert isinstance(source, Source)
    assert len(source) == 10
    recipe, model = Recipe("sgd", 0.1, epochs=2, batch_size=4), Mean()
    whole = train(model, source, tmp_path / "whole", recipe=recipe, seed=2)
    assert not torch.equal(whole.state_dict()["head.weight"], model.head.weight)
    with pytest.raises(InterruptedError, match="epoch   1/2"):
        train(model, source, tmp_path / "killed", recipe=recipe, seed=2, progress=interrupt)
    resumed = train(model, source, tmp_path / "killed", recipe=recipe, seed=2)
    assert all(map(torch.equal, whole.state_dict().values(), resumed.state_dict().values()))
    with pytest.raises(ValueError, match="images and targets: expected"):
        train(model, Source(dataset.test, dataset.augmentation), tmp_path / "whole", recipe=recipe, seed=2)
    assert isinstance(
        training_source(data.synthetic(counts=dict.fromkeys(data.SYNTHETIC_COUNTS, (1, 1, 1, 1)))), Source
    )


def test_counts_are_shown_beside_the_published_ones(birds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = waterbirds(birds)
    lines = describe_counts(dataset).splitlines()
    assert lines[0].split("  ")[0] == "images"
    assert lines[1].split("  ")[-1] == "3 (not 1057)"
    assert lines[-1] == "waterbirds: the counts are other than those published in train, validation, test"
    monkeypatch.setattr(disk, "EXPECTED_COUNTS", {"waterbirds": COUNTS})
    assert describe_counts(dataset).splitlines()[-1] == "waterbirds: the counts are those published"
    assert "not" not in describe_counts(data.synthetic(counts=dict.fromkeys(data.SYNTHETIC_COUNTS, (1, 1, 1, 1))))


def test_published_counts_add_up() -> None:
    totals = {name: [sum(counts) for counts in splits.values()] for name, splits in EXPECTED_COUNTS.items()}
    assert totals == {"waterbirds": [4795, 1199, 5794], "celeba": [162770, 19867, 19962]}


def test_published_counts_are_those_of_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    row = r"\| (?:train|validation|test) " + r"\| (\d+) " * 4 + r"\|"
    rows = [tuple(map(int, counts)) for counts in re.findall(row, page)]
    assert rows == [counts for name in ("waterbirds", "celeba") for counts in EXPECTED_COUNTS[name].values()]


def test_the_data_set_says_what_it_is(birds: Path) -> None:
    dataset = waterbirds(birds)
    assert repr(dataset).splitlines() == [
        "ImageData 'waterbirds'; groups: landbird on land, landbird on water, waterbird on land, waterbird on water",
        "  train: ImageSplit(10 images of (3, 224, 224), 4/2/1/3 per group)",
        "  validation: ImageSplit(5 images of (3, 224, 224), 2/1/1/1 per group)",
        "  test: ImageSplit(5 images of (3, 224, 224), 1/2/1/1 per group)",
    ]
    assert dataset.expected_counts == {split: list(counts) for split, counts in EXPECTED_COUNTS["waterbirds"].items()}


@pytest.mark.parametrize(("name", "minority"), [("waterbirds", (1, 2)), ("celeba", (3,))])
def test_the_minority_of_the_published_counts(birds: Path, name: str, minority: tuple[int, ...]) -> None:
    whole = waterbirds(birds)
    groups = torch.repeat_interleave(torch.arange(4), torch.tensor(EXPECTED_COUNTS[name]["train"]))
    train = replace(whole.train, groups=groups, targets=groups // 2, paths=("x",) * len(groups))
    assert replace(whole, splits={**whole.splits, "train": train}).minority == minority


def test_images_on_disk_are_held_out_and_given_back(birds: Path) -> None:
    whole = waterbirds(birds)
    parted = data.hold_out(whole, 0.3, seed=1)
    held = parted.splits["held-out"]
    assert (len(parted.train), len(held)) == (7, 3)
    assert {*parted.train.paths, *held.paths} == set(whole.train.paths)
    assert list(parted.train.paths) == sorted(parted.train.paths, key=whole.train.paths.index)
    assert joined_source(whole) is None
    joined = joined_source(parted)
    assert isinstance(joined, Source)
    assert sorted(joined.split.paths) == sorted(whole.train.paths)
    assert joined.split.counts == whole.train.counts
    assert joined.augmentation == whole.augmentation
