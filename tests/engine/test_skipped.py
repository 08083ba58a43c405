from __future__ import annotations

from types import SimpleNamespace

import pytest

from conv2former import DataError
from conv2former.config.schema import DataConfig
from conv2former.data import Skipped
from conv2former.engine.skipped import SkippedImages

BAD = [Skipped(f"{i}.png", f"{i}.png: no picture") for i in range(4)]


def images(*others: dict, **data) -> SkippedImages:
    """Returns those of one process of several, of which the others have noted `others`."""
    world = SimpleNamespace(gather=lambda mine: [mine, *others])
    return SkippedImages(DataConfig(root="x", **{"on_error": "skip"} | data), world, ["training", "validation"])


def test_an_image_counts_once_whoever_notes_it_and_how_often():
    skipped = images({"training": {"1.png": "1.png: no picture", "2.png": "2.png: no picture"}, "validation": {}})
    skipped.note("training", BAD[:2])
    skipped.note("training", BAD[:1])
    assert skipped.exchange() == [item.reason for item in BAD[:3]]
    skipped.note("training", BAD[:2])
    skipped.note("validation", BAD[3:])
    assert skipped.exchange() == [BAD[3].reason]
    assert skipped.exchange() == []
    assert len(skipped) == 4
    assert skipped.reasons == {
        "training": {item.name: item.reason for item in BAD[:3]},
        "validation": {"3.png": "3.png: no picture"},
    }


def test_the_limit_is_a_share_of_each_split():
    skipped = images(max_skipped=0.25)
    skipped.note("training", BAD[:2])
    skipped.check("training", 2)  # what no process but this one knows does not count yet
    skipped.exchange()
    skipped.check("training", 8)
    skipped.check("validation", 0)
    with pytest.raises(DataError) as error:
        skipped.check("training", 7)
    assert str(error.value) == (
        "2 of 7 training images cannot be read, more than data.max_skipped = 0.25 allows: 0.png, 1.png"
    )
    assert error.value.scope == "run"


def test_those_of_an_earlier_attempt_are_known():
    skipped = images()
    skipped.restore({"training": {"0.png": "0.png: no picture"}})
    skipped.note("training", BAD[:2])
    assert skipped.exchange() == [BAD[1].reason]
    assert len(skipped) == 2


def test_nothing_is_exchanged_where_an_unreadable_image_is_an_error():
    skipped = images(on_error="raise")
    skipped.world.gather = lambda _: pytest.fail("exchanged")
    assert skipped.exchange() == []
    skipped.restore({"training": {"0.png": "0.png: no picture"}})  # of a run whose data.on_error was another
    skipped.check("training", 1)


def test_a_note_travels_once():
    sent, skipped = [], images()
    skipped.world.gather = lambda mine: [sent.append(mine) or mine]
    skipped.note("training", BAD[:1])
    skipped.exchange()
    skipped.note("training", BAD[:2])
    skipped.exchange()
    assert [list(noted["training"]) for noted in sent] == [["0.png"], ["1.png"]]
