from __future__ import annotations

import pytest

from conv2former import DataError, _private
from conv2former.data.classes import class_names_of
from conv2former.data.real_labels import FILE_NAME, real_labels

TEXTS = ["", "{", "{}", "5", "[1]", '[["1"]]', "[[1.5]]", "[[true]]", "[[NaN]]", pytest.param("[" * 100_000, id="deep")]


@pytest.mark.parametrize("text", TEXTS)
def test_a_list_that_is_damaged(text, monkeypatch):
    monkeypatch.setattr(_private, "imagenet_file", lambda name: text)
    with pytest.raises(DataError, match=r"timm's imagenet_real_labels.json is damaged: not a list of lists"):
        real_labels(object(), class_names_of(1000, None))


def test_file_names_have_plain_digits():
    assert FILE_NAME.search("val/ILSVRC2012_val_00000001.JPEG")
    assert not FILE_NAME.search("val/ILSVRC2012_val_0000000٣.JPEG")
