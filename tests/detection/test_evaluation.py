"""COCO's numbers as pycocotools has them on files, confusions by hand, and the same for any number of processes."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import threading
from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from conv2former.config import check_config
from conv2former.config.registry import add_config_class
from conv2former.tasks.dense.thumbnails import as_numbers
from conv2former.tasks.detection import pictures
from conv2former.tasks.detection.average_precision import ImageRecord, average_precision, coco_boxes, text_of
from conv2former.tasks.detection.config import DetectionConfig
from conv2former.tasks.detection.evaluation import BoxEvaluator, about_missing, class_rows
from conv2former.tasks.detection.inference import to_stored
from conv2former.tasks.detection.matching import best_score, confusion_of, match, mistakes_of
from conv2former.tasks.detection.objects import Detections, EvalBatch, Objects
from conv2former.tasks.detection.placing import label_places
from conv2former.tasks.detection.saved import check_classes, is_classes, is_confusion, is_score, is_worst
from conv2former.tasks.detection.worst import WorstImages, worst_at

KEYS = (
    *("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"),
    *("ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large"),
)  # in the order of COCOeval.stats
add_config_class("detection", DetectionConfig)
CPU = torch.device("cpu")


def masks_of(boxes: np.ndarray, size: tuple[int, int]) -> list[dict]:
    """Returns ellipses in boxes."""
    rows, columns = np.indices(size)
    found = []
    for left, top, right, bottom in boxes:
        y, x = (rows + 0.5 - (top + bottom) / 2) / (bottom - top), (columns + 0.5 - (left + right) / 2) / (right - left)
        found.append(coco_masks.encode(np.asfortranarray((x**2 + y**2 <= 0.25).astype(np.uint8))))
    return found


def drawn(seed: int, classes: int = 4, size: tuple[int, int] = (150, 200), most: int = 8) -> ImageRecord:
    """Returns an image with objects and detections near them: crowds, areas of their own, equal scores, duplicates."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(0, most)) if seed % 5 != 4 else 0
    corners = rng.uniform(0, 60, (count, 2))
    sides = rng.choice([20, 40, 80], (count, 2)) * rng.uniform(0.8, 1.1, (count, 2))
    boxes = np.concatenate([corners, corners + sides], 1).astype(np.float32)
    labels = rng.integers(0, classes - 1, count)  # the last class never occurs
    masks = masks_of(boxes, size)
    areas = np.array([float(coco_masks.area(mask)) for mask in masks], dtype=np.float64)
    objects = Objects(boxes, labels, rng.random(count) < 0.15, areas, masks)
    near = np.repeat(boxes, 3, 0) + rng.normal(0, 4, (3 * count, 4))
    near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 2)
    noise = rng.uniform(0, 60, (3, 4))
    found_boxes = np.concatenate([near, np.sort(noise.reshape(3, 2, 2), 1).reshape(3, 4) + np.array([0, 0, 3, 3])])
    found_labels = np.concatenate([np.repeat(labels, 3), rng.integers(0, classes, 3)])
    found_labels = np.where(
        rng.random(len(found_labels)) < 0.2, rng.integers(0, classes, len(found_labels)), found_labels
    )
    scores = np.sort((rng.integers(1, 10, len(found_labels)) / 10).astype(np.float32))[::-1].copy()  # with ties
    found_boxes = found_boxes.astype(np.float32).clip(0, size[0])
    found = Detections(found_boxes, scores, found_labels, masks_of(found_boxes, size))
    return ImageRecord(seed, f"image {seed}", size, objects, found)


def by_files(records, kind: str, classes: int, folder) -> np.ndarray:
    """Returns COCOeval's twelve numbers of JSON files, as a user of pycocotools gets them."""
    truth, results = [], []
    for record in records:
        objects, found = record.objects, record.found
        for i, box in enumerate(coco_boxes(objects.boxes)):
            truth.append(
                {
                    "id": len(truth) + 1,
                    "image_id": 7 + record.place,
                    "category_id": 3 * int(objects.labels[i]) + 1,
                    "bbox": box,
                    "area": float(objects.areas[i]),
                    "iscrowd": int(objects.crowd[i]),
                    "segmentation": text_of(objects.masks[i]),
                }
            )
        for i, box in enumerate(coco_boxes(found.boxes)):
            result = {
                "image_id": 7 + record.place,
                "category_id": 3 * int(found.labels[i]) + 1,
                "score": float(found.scores[i]),
            }
            results.append(result | ({"bbox": box} if kind == "bbox" else {"segmentation": text_of(found.masks[i])}))
    images = [{"id": 7 + r.place, "height": r.size[0], "width": r.size[1], "file_name": r.name} for r in records]
    categories = [{"id": 3 * i + 1, "name": str(i)} for i in range(classes)]
    (folder / "truth.json").write_text(json.dumps({"images": images, "annotations": truth, "categories": categories}))
    (folder / "results.json").write_text(json.dumps(results))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(folder / "truth.json"))
        evaluation = COCOeval(coco, coco.loadRes(str(folder / "results.json")), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_all_twelve_numbers_are_those_of_pycocotools_on_files(tmp_path, capsys, kind):
    records = [drawn(seed) for seed in range(12)]
    assert any(record.objects.crowd.any() for record in records)
    assert any(not len(record.objects) for record in records)
    found = average_precision(records, 4, kind, 100)
    expected = by_files(records, kind, 4, tmp_path)
    assert capsys.readouterr().out == ""
    for key, value in zip(KEYS, expected, strict=True):
        assert found.summary.get(key, -100) == 100 * value, key
    assert {key for key in KEYS if 0 < found.summary.get(key, -1) < 100} >= set(KEYS[:3])
    by_class = [by_files([_only(r, i) for r in records], kind, 4, tmp_path)[:3] for i in range(3)]
    for own, expected in zip(found.classes, by_class, strict=False):
        assert [own[key] for key in KEYS[:3]] == [100 * value for value in expected]
    assert found.classes[3] == {}
    again = average_precision(records, 4, kind, 100)  # the records are as they were
    assert again == found


def _only(record: ImageRecord, label: int) -> ImageRecord:
    objects, found = (_kept(each, each.labels == label) for each in (record.objects, record.found))
    return record._replace(objects=objects, found=found)


def _kept(each, keep: np.ndarray):
    """Returns objects or detections without some."""
    found = {}
    for field in fields(each):
        value = getattr(each, field.name)
        if value is not None:
            found[field.name] = list(itertools.compress(value, keep)) if field.name == "masks" else value[keep]
    return replace(each, **found)


def arrays(found: Detections) -> list[np.ndarray]:
    return [found.boxes, found.scores, found.labels]


def test_more_or_fewer_detections_than_coco_counts(tmp_path):
    """AP counts all that an image may have, average recall the first hundred."""
    crowded = drawn(3, most=9)
    many = [np.tile(value, (60, 1) if value.ndim == 2 else 60) for value in arrays(crowded.found)]
    order = np.argsort(-many[1], kind="stable")[:300]
    found = Detections(*(value[order] for value in many))
    record = crowded._replace(found=replace(found, scores=np.linspace(1, 0.5, len(found), dtype=np.float32)))
    hundred = average_precision([record], 4, "bbox", 100)
    for most in (20, 300):
        other = average_precision([record], 4, "bbox", most)
        assert other.summary["ar100"] == hundred.summary["ar100"]
        fewer = record._replace(found=Detections(*(value[:most] for value in arrays(record.found))))
        assert other.summary["ap"] == average_precision([fewer], 4, "bbox", most).summary["ap"]
    assert average_precision([record], 4, "bbox", 20).summary["ap"] < hundred.summary["ap"]


# ------------------------------------------------------------------------------------------------------------ evaluator


class Network:
    """A network that answers, for images whose first pixel is their number, what is known of them."""

    def __init__(self, records, with_masks=True) -> None:
        self.records, self.with_masks, self.calls = records, with_masks, []

    def __call__(self, images):
        self.calls.append(len(images))
        return [self.answer(int((image[0, 0, 0] * 0.5 + 0.5).mul(255).round()), image) for image in images]

    def answer(self, place, image):
        found, size = self.records[place].found, self.records[place].size
        scale = np.array([image.shape[2] / size[1], image.shape[1] / size[0]] * 2, dtype=np.float32)
        answer = {"boxes": found.boxes * scale, "scores": found.scores, "labels": found.labels}
        answer = {key: torch.from_numpy(value) for key, value in answer.items()}
        if self.with_masks:
            masks = [coco_masks.decode(mask) for mask in found.masks]
            stacked = np.stack(masks)[:, None].astype(np.float32) if masks else np.zeros((0, 1, *size), np.float32)
            answer["masks"] = torch.nn.functional.interpolate(torch.from_numpy(stacked), image.shape[1:])
        return answer


def batch_of(records, scale: int = 1) -> EvalBatch:
    images = []
    for record in records:
        height, width = record.size
        image = torch.full((3, height * scale, width * scale), 90, dtype=torch.uint8)
        image[:, 0, 0] = record.place
        images.append(image)
    return EvalBatch(
        images,
        [record.size for record in records],
        [record.objects for record in records],
        [],
        [record.place for record in records],
        [record.name for record in records],
    )


@pytest.fixture
def config() -> DetectionConfig:
    raw = {
        "task": "detection",
        "model": {"detector": {"name": "mask_rcnn"}},
        "data": {"root": "data", "mean": [0.5] * 3, "std": [0.5] * 3},
        "evaluation": {"pictures": 3},
    }
    found = check_config(raw, "test")
    assert isinstance(found, DetectionConfig)
    return found


class Processes:
    """Several processes as threads, which meet in `gather`."""

    def __init__(self, size: int) -> None:
        self.size, self.device = size, CPU
        self.barrier, self.values = threading.Barrier(size, timeout=20), [None] * size

    def run(self, calls):
        results = [None] * self.size

        def work(rank):
            results[rank] = calls[rank](_Rank(rank, self))

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


@dataclass
class _Rank:
    rank: int
    all: Processes

    @property
    def size(self):
        return self.all.size

    def gather(self, value):
        self.all.values[self.rank] = value
        self.all.barrier.wait()
        found = list(self.all.values)
        self.all.barrier.wait()
        return found


def evaluated(config, shares, network, classes="abcd"):
    """Returns what each process finds, each with batches of its own."""
    evaluators = []
    for batches in shares:
        evaluator = BoxEvaluator(config, list(classes), CPU)
        for records in batches:
            evaluator.update(network, batch_of(records))
        evaluators.append(evaluator)
    world = Processes(len(shares))
    return world.run([lambda rank, e=e: e.total(rank, []) for e in evaluators])


def test_any_number_of_processes_and_any_batches_give_the_same(config):
    records = [drawn(seed) for seed in range(9)]
    network = Network(records)
    (whole,) = evaluated(config, [[records[:4], records[4:]]], network)
    assert whole.metrics["n"] == 9
    assert {"ap", "ap50", "ap75", "ar100", "mask_ap", "mask_ap50", "mask_ap75", "mask_ar100"} <= whole.metrics.keys()
    assert whole.metrics["ap"] == average_precision(records, 4, "bbox", 100).summary["ap"]
    assert whole.metrics["mask_ap"] == average_precision(records, 4, "segm", 100).summary["ap"]
    assert whole.coco["mask_ar10"] == average_precision(records, 4, "segm", 100).summary["ar10"]
    shares = [[[records[i]] for i in range(9) if i % 2 == rank][::-1] for rank in range(2)]
    for found in evaluated(config, [*shares, []], network):  # one process has no image
        assert found.metrics == whole.metrics
        assert found.details() == whole.details()
        assert torch.equal(found.confusion, whole.confusion)
        assert [record.place for record in found.records] == list(range(9))
    assert len(whole.worst) == 3
    by_hand = sorted(
        records,
        key=lambda r: (
            -mistakes_of(match(r.objects, r.found), whole.score) / max(1, (~r.objects.crowd).sum()),
            r.place,
        ),
    )
    assert [one.place for one in whole.worst] == [record.place for record in by_hand[:3]]


def test_what_a_checkpoint_keeps(config):
    records = [drawn(seed) for seed in range(6)]
    (found,) = evaluated(config, [[records]], Network(records))
    details = found.details()
    assert torch.equal(torch.tensor(details["confusion"]), found.confusion)
    json.dumps(details)  # plain types
    for key, check in (("classes", is_classes), ("confusion", is_confusion), ("worst", is_worst), ("score", is_score)):
        assert check(details[key]), key
        assert check(None)
        assert not check([[1, 2]])
    assert is_score(details["f1"])
    check_classes(details, 4)
    check_classes(dict.fromkeys(details), 4)
    for key, value in (("classes", details["classes"][1:]), ("confusion", [[0]])):
        with pytest.raises(ValueError, match=f"{key} is of other classes"):
            check_classes({**details, key: value}, 4)
    worst = json.loads(json.dumps(details["worst"]))
    worst[0][-1]["labels"] = [4] * len(worst[0][-1]["labels"]) or [4]
    with pytest.raises(ValueError, match="worst has other classes"):
        check_classes({**details, "worst": worst}, 4)
    for change in (
        {"boxes": [[0, 1, 2]]},
        {"scores": [float("nan")]},
        {"labels": [-1]},
        {"wrong": [1]},
        {"labels": []},
    ):
        worst = json.loads(json.dumps(details["worst"]))
        worst[0][-1] |= {key: value * len(worst[0][-1]["boxes"]) for key, value in change.items()}
        assert not is_worst(worst), change
    rows = found.row(list("abcd"))
    assert {"ap/a", "ap/b", "ap/c"} <= rows.keys()
    assert "ap/d" not in rows
    assert found.row(["x"] * 51) == found.metrics
    assert about_missing(class_rows(found.classes, list("abcd"))) == (
        "no object of d, left out of the means over the classes"
    )


NOTHING_FOUND = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64), [])
NO_OBJECTS = Objects(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, bool), np.zeros(0), [])


def test_nothing_to_find_and_nothing_found_are_numbers(config):
    """A set without objects, a network that finds nothing, only groups, and no image at all."""
    records = [drawn(seed)._replace(place=place) for place, seed in enumerate((1, 2, 3))]
    silent = [record._replace(found=NOTHING_FOUND) for record in records]
    (found,) = evaluated(config, [[silent]], Network(silent))
    assert [found.metrics[key] for key in ("ap", "ap50", "ap75", "ar100", "mask_ap", "mask_ar100")] == [0.0] * 6
    assert (found.score, found.f1) == (0.5, 0.0)
    assert found.confusion[:, -1].sum() == sum(int((~r.objects.crowd).sum()) for r in records)
    assert found.classes[0]["ap"] == 0.0
    groups = [r._replace(objects=replace(r.objects, crowd=np.ones(len(r.objects), bool))) for r in records]
    empty = [record._replace(objects=NO_OBJECTS) for record in records]
    for given in (groups, empty):
        (found,) = evaluated(config, [[given]], Network(given))
        assert {"ap": 0.0, "ap50": 0.0, "ap75": 0.0, "ar100": 0.0}.items() <= found.metrics.items()
        assert "ap_small" not in found.metrics
        assert [row["ap"] for row in found.classes] == [None] * 4
        assert about_missing(class_rows(found.classes, list("abcd"))).startswith(
            "no object of any class, so that every"
        )
        assert is_classes(found.details()["classes"])
    assert found.confusion.sum() == found.confusion[-1].sum() > 0  # all that was found is wrong
    neither = [record._replace(found=NOTHING_FOUND) for record in empty]
    (found,) = evaluated(config, [[neither]], Network(neither))
    assert (found.metrics["ap"], found.worst, int(found.confusion.sum())) == (0.0, [], 0)
    (found,) = evaluated(config, [[]], Network([]))
    assert (found.metrics["n"], found.metrics["ap"], found.records) == (0, 0.0, [])


def test_boxes_alone(config):
    """A network without masks, and data without them."""
    records = [drawn(seed)._replace(place=place) for place, seed in enumerate(range(4))]
    (found,) = evaluated(config, [[records]], Network(records, with_masks=False))
    assert not [key for key in found.metrics if key.startswith("mask")]
    assert found.worst[0].pictures[1:] == ("", "")
    plain = [record._replace(objects=replace(record.objects, masks=None)) for record in records]
    (other,) = evaluated(config, [[plain]], Network(records))
    assert other.metrics == found.metrics


def test_images_of_one_size_are_answered_together_and_others_apart(config):
    """In one batch the smaller would be filled up, and a network sees that."""
    records = [drawn(place, size=(150, 200) if place % 2 else (160, 200)) for place in range(5)]
    network = Network(records)
    evaluated(config, [[records]], network)
    assert sorted(network.calls) == [2, 3]


# ------------------------------------------------------------------------------------------------- matches and sizes


def boxes(*rows) -> np.ndarray:
    return np.array(rows, dtype=np.float32).reshape(-1, 4)


def test_matches_mistakes_and_confusions_by_hand():
    """Two cats, a dog, and a group of cats; what is found has each kind of mistake."""
    objects = Objects(
        boxes((0, 0, 10, 10), (20, 0, 30, 10), (0, 20, 10, 30), (40, 40, 60, 60)),
        np.array([0, 0, 1, 0]),
        np.array([False, False, False, True]),
        np.full(4, 100.0),
    )
    found = Detections(
        boxes(
            (0, 0, 10, 9),  # the first cat
            (0, 20, 10, 29),  # the dog, taken for a cat
            (0, 0, 10, 10),  # the first cat again
            (45, 45, 50, 50),  # in the group
            (45, 45, 50, 50),  # a dog in the group of cats
            (80, 80, 90, 90),  # nothing
            (20, 0, 30, 8),  # the second cat, of a low score
        ),
        np.array([0.9, 0.85, 0.8, 0.7, 0.65, 0.6, 0.2], np.float32),
        np.array([0, 0, 0, 0, 1, 1, 0]),
    )
    matched = match(objects, found)
    assert matched.taken.tolist() == [0, -1, -1, -1, -1, -1, 1]
    assert matched.ignored.tolist() == [False, False, False, True, False, False, False]
    assert mistakes_of(matched, 0.5) == 4 + 2  # four boxes of nothing of their class; a cat and the dog
    assert mistakes_of(matched, 0.1) == 4 + 1
    assert mistakes_of(matched, 0.99) == 3
    table = confusion_of(objects, found, matched, 0.5, 2)
    assert table.tolist() == [[1, 0, 1], [1, 0, 0], [1, 2, 0]]
    assert confusion_of(objects, found, matched, 0.1, 2).tolist() == [[2, 0, 0], [1, 0, 0], [1, 2, 0]]
    score, f1 = best_score([matched])
    shown = {0.9: (1, 1), 0.2: (6, 2)}  # detections that count, right ones
    expected = {score: 200 * right / (n + 3) for score, (n, right) in shown.items()}
    assert (score, f1) == (0.9, expected[0.9])
    assert expected[0.9] > expected[0.2]


def test_of_objects_with_the_same_iou_the_last_is_taken_as_coco_does():
    """And of overlapping masks that of the highest score is seen in the pictures of the worst images."""
    rows = boxes((0, 0, 10, 10), (0, 0, 10, 10), (2, 2, 8, 8))
    masks = masks_of(rows, (20, 20))
    objects = Objects(rows, np.zeros(3, np.int64), np.zeros(3, bool), np.full(3, 100.0), masks)
    found = Detections(rows[[0, 0, 2]], np.array([0.9, 0.8, 0.7], np.float32), np.array([0, 1, 0]), masks)
    matched = match(objects, found)
    assert matched.taken.tolist() == [1, -1, 2]
    worst = WorstImages(1)
    worst.add(ImageRecord(0, "a", (20, 20), objects, found), matched, torch.zeros(3, 20, 20, dtype=torch.uint8))
    (one,) = worst_at(0.5, list(worst.kept.values()), 1)
    assert set(np.unique(as_numbers(one.pictures.predicted))) == {-1, 0}
    assert (one.mistakes, one.truth["missed"], one.answer["wrong"]) == (2, [True, False, False], [False, True, False])


def test_at_an_iou_of_half_as_many_are_right_as_coco_counts():
    """The matches are those of COCO's AP50: the recall of all detections is the same."""
    records = [drawn(seed) for seed in range(20)]
    with contextlib.redirect_stdout(io.StringIO()):
        found = average_precision(records, 3, "bbox", 100)
    matches = [match(record.objects, record.found) for record in records]
    right = np.zeros(3)
    objects = np.zeros(3)
    for record, matched in zip(records, matches, strict=True):
        right += np.bincount(record.found.labels[matched.taken >= 0], minlength=4)[:3]
        objects += np.bincount(record.objects.labels[matched.counts], minlength=3)
    assert found.classes[0]["ap50"] <= 100 * right[0] / objects[0] + 1e-9
    assert best_score(matches)[1] > 20


def test_answers_are_put_back_to_the_image_s_size():
    """Also where height and width are scaled differently; of equal scores the order stays, broken boxes go."""
    masks = torch.zeros(4, 1, 50, 100)
    masks[:, :, 10:20, 30:60] = 0.9
    output = {
        "boxes": torch.tensor([[30.0, 10, 60, 20], [0, 0, 200, 50], [1, 1, 2, 2], [0, 0, float("nan"), 1]]),
        "scores": torch.tensor([0.5, 0.9, 0.5, 0.99]),
        "labels": torch.tensor([2, 1, 0, 0]),
        "masks": masks,
    }
    found = to_stored(output, (50, 100), (100, 150))
    assert found.labels.tolist() == [1, 2, 0]
    assert found.boxes.tolist() == [[0, 0, 150, 100], [45, 20, 90, 40], [1.5, 2, 3, 4]]
    decoded = coco_masks.decode(found.masks[1])
    assert decoded.shape == (100, 150)
    assert decoded[21:39, 46:89].all()
    assert decoded.sum() == pytest.approx(20 * 45, rel=0.1)
    same = to_stored({key: value for key, value in output.items() if key != "masks"}, (50, 100), (50, 100))
    assert same.masks is None
    assert same.boxes[0].tolist() == [0, 0, 100, 50]
    nothing = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.long)}
    assert len(to_stored(nothing | {"masks": torch.zeros(0, 1, 9, 9)}, (9, 9), (30, 30))) == 0


# ------------------------------------------------------------------------------------------------------------ pictures


def test_no_label_covers_another_or_leaves_the_picture():
    given = [(0, 0, 30, 30), (2, 2, 30, 30), (90, 50, 100, 60), (5, 90, 20, 100), *[(0, 0, 100, 100)] * 20]
    size = (24, 10)
    places = label_places(given, [size] * len(given), (100, 100))
    assert places[0] == (0, 0)  # there is no room above
    assert places[2] == (76, 40)  # moved to the left
    assert None in places
    spots = [place for place in places if place]
    assert len(spots) > 5
    for i, (x, y) in enumerate(spots):
        assert 0 <= x <= 76
        assert 0 <= y <= 90
        assert not any(abs(x - a) < 24 and abs(y - b) < 10 for a, b in spots[:i])
    assert label_places([(0, 0, 5, 5)], [(200, 10)], (100, 100)) == [None]


def test_pictures_of_a_batch_of_the_worst_images_and_of_confusions(config):
    names = ["$a_b$", "</b>", "道" * 30, "d"]
    records = [drawn(seed) for seed in range(4)]
    for with_masks in (True, False):
        (found,) = evaluated(config, [[records]], Network(records, with_masks))
        details = json.loads(json.dumps(found.details()))
        figure = pictures.worst_figure(details["worst"], details["score"], names)
        FigureCanvasAgg(figure).draw()
        titles = [axes.get_title() for axes in figure.axes]
        first = found.worst[0]
        assert titles[1] == f"truth: {first.objects} objects, {sum(first.truth['missed'])} missed"
        assert sum(first.truth["missed"]) + sum(first.answer["wrong"]) == first.mistakes
        thick = [patch for patch in figure.axes[2].patches if patch.get_linewidth() > 2]
        assert len(thick) == sum(first.answer["wrong"])
        assert len(figure.axes[2].patches) == len(first.answer["boxes"])
        assert {text.get_text()[:5] for text in figure.legends[0].get_texts()} <= {"$a_b$", "</b>", "道" * 5, "d"}
    assert pictures.worst_figure([], 0.5, names) is None
    figure = pictures.confusions_figure(details["confusion"], details["score"], names, "best.pt")
    FigureCanvasAgg(figure).draw()
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()][-1] == "background"
    assert f"score {found.score:.2f}" in figure.get_suptitle()
    counts = np.ones((61, 61), int)
    counts[3, 60] = 5
    many = pictures.confusions_figure(counts.tolist(), 0.5, [str(i) for i in range(60)], "best.pt")
    assert many.axes[1].get_yticklabels()[0].get_text() == "3 → background"
    masks = torch.zeros(2, 30, 40, dtype=torch.uint8)
    masks[0, :9, :9] = masks[1, 5:20, 5:20] = 1
    target = {"boxes": torch.tensor([[0.0, 0, 9, 9], [5, 5, 20, 20]]), "labels": torch.tensor([0, 2]), "masks": masks}
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long), "masks": masks[:0]}
    images = [torch.zeros(3, 30, 40), torch.zeros(3, 50, 20), *[torch.zeros(3, 8, 8)] * 9]
    figure = pictures.batch_figure(images, [target, *[empty] * 10], names, (0.5,) * 3, (0.5,) * 3)
    FigureCanvasAgg(figure).draw()
    assert [len(axes.patches) for axes in figure.axes] == [2] + [0] * 7
    drawn_pixels = figure.axes[0].images[0].get_array()
    assert not np.array_equal(drawn_pixels[2, 2], drawn_pixels[25, 35])  # the mask is laid over
