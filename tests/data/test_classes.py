"""How the classes of a data set are found among those of a network."""

from __future__ import annotations

import pytest
from timm.data import ImageNetInfo

from conv2former import DataError
from conv2former.data.classes import class_names_of, display_names, in_class_order, match_classes, order_in_doubt

SYNSETS = ImageNetInfo().label_names()
WORDS = ImageNetInfo().label_descriptions()


def test_names_of_a_network():
    assert class_names_of(3, ["a", "b", "c"]) == ["a", "b", "c"]
    assert class_names_of(1000, [str(i) for i in range(1000)])[7] == "7"  # what the file says comes first
    assert class_names_of(1000, None)[:2] == ["n01440764", "n01443537"]
    assert len(class_names_of(21841, None)) == 21841
    assert class_names_of(7, None) is None


def test_names_for_people():
    names = display_names(SYNSETS)
    assert names[:2] == ["tench", "goldfish"]
    assert len(set(names)) == 1000
    assert (names[134], names[517]) == ("crane (n02012849)", "crane (n03126707)")
    assert display_names(["cat", "n01440764"]) == ["cat", "n01440764"]


@pytest.mark.parametrize(
    ("found", "indices"),
    [
        (["n01443537", "n01440764"], [1, 0]),
        (["0", "1", "10", "2"], [0, 1, 10, 2]),  # folders of ImageNet-V2, in the order of their names
        (["tench, Tinca tinca", "goldfish"], None),  # two ways of naming are not mixed
        (["tench", "cock"], [0, 7]),
        ([WORDS[5], WORDS[3]], [5, 3]),
        (["crane"], None),  # a bird, or a machine
    ],
)
def test_imagenet_by_any_name(found, indices):
    if indices is None:
        with pytest.raises(DataError, match=r"photos has \d class(es)? not in the class list"):
            match_classes(found, SYNSETS, "photos")
    else:
        assert match_classes(found, SYNSETS, "photos") == indices


def test_a_network_that_was_trained_on_other_names_or_in_another_order():
    backwards = SYNSETS[::-1]
    assert match_classes(["n01440764", "n01443537"], backwards, "") == [999, 998]
    assert match_classes(["0", "999"], backwards, "") == [999, 0]
    assert match_classes(["n01440764", "n02012849"], WORDS, "") == [0, 134]
    assert match_classes(WORDS, WORDS, "") == list(range(1000))  # although two have one name


def test_other_networks():
    assert match_classes(["b", "a"], ["a", "b", "c"], "") == [1, 0]
    with pytest.raises(DataError, match=r"1 class not in the class list: dgo.*did you mean 'dog'"):
        match_classes(["cat", "dgo"], ["cat", "dog"], "photos")
    with pytest.raises(DataError):
        match_classes(["0", "1"], ["a", "b"], "photos")  # indices are ImageNet's alone


def test_a_word_for_two_classes():
    """Only it is named, with the two, and how to write which."""
    bird, machine = "'crane (n02012849)', large long-necked wading bird", "'crane (n03126707)', lifts and moves"
    for names in (SYNSETS, WORDS, SYNSETS[::-1]):
        with pytest.raises(DataError, match=r"val has 1 class not in the class list: crane .two classes are") as error:
            match_classes(["tench", "crane", "cock"], names, "val")
        assert bird in str(error.value)
        assert machine in str(error.value)
    with pytest.raises(DataError, match=r"1 class not in the class list: goldfsh \(did you mean 'goldfish'"):
        match_classes(["tench", "goldfsh"], SYNSETS, "val")
    assert match_classes(["tench", "crane (n03126707)", "maillot, tank suit"], SYNSETS, "val") == [0, 517, 639]
    with pytest.raises(DataError, match=r"maillot .*'maillot \(n03710637\)', .*'maillot, tank suit', "):
        match_classes(["tench", "maillot"], SYNSETS, "val")
    with pytest.raises(DataError, match=r"1 class not in the class list: a \(the list has 'a' 2 times\)"):
        match_classes(["a", "b"], ["a", "b", "a"], "val")


def test_the_order_of_classes():
    assert in_class_order(["10", "2", "1", "02"]) == ["1", "02", "2", "10"]
    assert in_class_order(["10", "2", "-1"]) == ["-1", "2", "10"]
    assert in_class_order(["c10", "c2", "1"]) == ["1", "c10", "c2"]
    for numbers in (["0", "1", "2", "10"], ["0", "1", "10", "2"]):  # of folders here, and as a column lists them
        assert f"in the order {', '.join(numbers)}; for a network" in order_in_doubt(numbers)
    for clear in (["0", "1", "2"], ["a", "10", "2"], ["00", "01", "10"], []):
        assert order_in_doubt(clear) == ""
