"""torchvision's detectors on any backbone: their numbers, images of any size, empty batches, files."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator

import conv2former
from conv2former import CheckpointError, ConfigError
from conv2former.config import check_config
from conv2former.tasks.detection.config import DetectionConfig
from conv2former.tasks.detection.loss import DetectionObjective
from conv2former.tasks.detection.network import DetectionNetwork, build_network
from conv2former.tasks.detection.objects import TrainBatch
from conv2former.tasks.detection.restore import restore_network
from conv2former.tasks.detection.task import Detection
from conv2former.tasks.registry import task_named

SHAPE = {"dims": [8, 16, 24, 40], "depths": [1, 1, 2, 1], "kernel_size": 7}
DETECTORS = ("mask_rcnn", "faster_rcnn", "fcos", "retinanet")
NAMES = ["square", "disc", "ring"]
assert task_named("detection").config is DetectionConfig  # known to `check_config` once tasks are imported


def configured(detector: str | dict = "faster_rcnn", data=None, evaluation=None, **model) -> DetectionConfig:
    own = detector if isinstance(detector, dict) else {"name": detector}
    channels = 64 if own["name"] == "fcos" else 32
    raw = {
        "task": "detection",
        "data": {"root": "x", **(data or {})},
        "augment": {"short_sides": [64]} if data else {},
        "evaluation": evaluation or {},
        "model": {
            "variant": {"name": "conv2former_test", **SHAPE},
            "detector": {"channels": channels, "head_convs": 1, **own},
            **model,
        },
    }
    found = check_config(raw, "test")
    assert isinstance(found, DetectionConfig)
    return found


def target(boxes, labels, size=(64, 64)) -> dict[str, torch.Tensor]:
    masks = torch.zeros(len(boxes), *size, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = 1
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "masks": masks,
    }


def batch(device="cpu") -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Two images of different sizes, the second without a box."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(3, *size, generator=generator).to(device) for size in ((64, 64), (45, 71))]
    targets = [target([(4, 6, 30, 40), (20, 30, 60, 60)], [0, 2]), target([], [], (45, 71))]
    return images, [{key: value.to(device) for key, value in each.items()} for each in targets]


def losses_of(model: nn.Module, images, targets) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)  # which boxes are looked at is drawn
    return model(images, targets)


@pytest.mark.parametrize("stem_stride", [4, 2])
@pytest.mark.parametrize("detector", DETECTORS)
def test_every_detector_learns_and_answers(detector, stem_stride):
    """Finite losses and gradients of every weight, whatever boxes there are; answers within images of any size."""
    variant = {"name": "conv2former_test", "stem_stride": stem_stride, **SHAPE}
    model = build_network(configured(detector, variant=variant, evaluation={"score": 0.0}), 3)
    assert (model.num_classes, model.in_chans, model.has_masks) == (3, 3, detector == "mask_rcnn")
    images, targets = batch()
    nothing = [target([], [], image.shape[1:]) for image in images]
    tiny = [torch.randn(3, 5, 9)], [target([(1, 1, 3, 4)], [1], (5, 9))]
    for inputs, wanted in ((images, targets), (images, nothing), tiny):
        model.zero_grad()
        losses = losses_of(model, inputs, wanted)
        sum(losses.values()).backward()
        for name, loss in losses.items():
            assert loss.shape == ()
            assert loss.isfinite(), name
        for name, parameter in model.named_parameters():  # also without a box, or processes would wait for them
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
        assert {value.dtype for each in wanted for value in each.values()} == {
            torch.float32, torch.int64, torch.uint8
        }  # fmt: skip
    assert wanted[0]["labels"].tolist() == [1]  # nothing was changed in place
    model.eval()
    with torch.inference_mode():
        for image, found in zip([*images, tiny[0][0]], model([*images, tiny[0][0]]), strict=True):
            height, width = image.shape[1:]
            boxes, n = found["boxes"], len(found["boxes"])
            assert 0 < n <= 100
            assert found["scores"].shape == found["labels"].shape == (n,)
            assert found["scores"].diff().le(0).all()
            assert set(found["labels"].tolist()) <= {0, 1, 2}
            assert boxes.min() >= 0
            assert (boxes <= torch.tensor([width, height] * 2)).all()
            if model.has_masks:
                assert found["masks"].shape == (n, 1, height, width)
                assert (found["masks"] >= 0).all()
                assert (found["masks"] <= 1).all()


class _Body(nn.Module):
    """What torchvision's detectors take as a backbone: the network's own, with its pyramid."""

    out_channels = 256

    def __init__(self, model: DetectionNetwork) -> None:
        super().__init__()
        self.model = copy.deepcopy(nn.ModuleList([model.backbone, model.pyramid]))
        self.first = model.finest

    def forward(self, x):
        maps = self.model[0].forward_intermediates(x, indices=[0, 1, 2, 3], intermediates_only=True)
        return self.model[1]({str(i): each for i, each in enumerate(maps[self.first :])})


@pytest.mark.slow
@pytest.mark.parametrize("detector", DETECTORS)
def test_the_numbers_are_torchvisions(detector):
    """Of its own detector with its own heads and defaults, put together by hand of the same weights."""
    config = configured({"name": detector, "channels": 256, "head_convs": 4}, evaluation={"score": 0.0})
    model = build_network(config, 3)
    kind = {"mask_rcnn": MaskRCNN, "faster_rcnn": FasterRCNN, "fcos": FCOS, "retinanet": RetinaNet}[detector]
    has_background = int(detector in ("mask_rcnn", "faster_rcnn"))
    limits = {"score_thresh": 0.0, "nms_thresh": 0.5, "detections_per_img": 100}
    if has_background:
        limits = {f"box_{key}": value for key, value in limits.items()}
    own = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3, "min_size": 64, "max_size": 64, "_skip_resize": True}
    plain = kind(_Body(model), 3 + has_background, **own, **limits)
    state = model.detector.state_dict()
    plain.load_state_dict({**state, **{f"backbone.{k}": v for k, v in plain.backbone.state_dict().items()}})
    images, targets = batch()
    shifted = [{**each, "labels": each["labels"] + has_background} for each in targets]
    for optimizer in (torch.optim.SGD(net.parameters(), lr=0.01) for net in (model, plain)):
        optimizer.zero_grad()
    for _ in range(2):
        found, expected = losses_of(model, images, targets), losses_of(plain, images, shifted)
        assert found.keys() == expected.keys()
        for key, loss in expected.items():
            torch.testing.assert_close(found[key], loss)
    model.eval()
    plain.eval()
    with torch.inference_mode():  # of one size, as theirs resizes where it does not train
        for ours, theirs in zip(model(images[:1]), plain(images[:1]), strict=True):
            theirs["labels"] = theirs["labels"] - has_background
            assert ours.keys() == theirs.keys()
            assert len(ours["boxes"]) > 10
            for key, value in theirs.items():
                torch.testing.assert_close(ours[key], value)


def test_the_scale_of_boxes_is_not_guessed_from_the_first_image():
    """By itself torchvision does, and takes a map of a tiny image for a finer one from then on."""
    model = build_network(configured("mask_rcnn", evaluation={"score": 0.0}), 3).eval()
    other = copy.deepcopy(model)
    images, _ = batch()
    with torch.inference_mode():
        other([torch.randn(3, 9, 9)])
        for ours, again in zip(model(images), other(images), strict=True):
            assert ours["scores"].equal(again["scores"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("detector", DETECTORS)
def test_in_half_precision_boxes_are_float32(detector, dtype):
    """Losses and answers are near those of float32, also where a coordinate needs more than bfloat16's eight bits."""
    model = build_network(configured(detector, evaluation={"score": 0.0}), 3)
    images = [torch.randn(3, 40, 700)]
    targets = [target([(605, 3, 641, 38), (3, 3, 30, 30)], [0, 1], (40, 700))]
    exact = losses_of(model, images, targets)
    with torch.autocast("cpu", dtype):
        found = losses_of(model, images, targets)
    for key, loss in found.items():
        assert loss.dtype == torch.float32, key
        torch.testing.assert_close(loss, exact[key], rtol=0.02, atol=0.02)
    sum(found.values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    model.eval()
    with torch.inference_mode(), torch.autocast("cpu", dtype):
        (answer,) = model(images)
    assert {value.dtype for value in answer.values()} == {torch.float32, torch.int64}
    anchors = model.detector.rpn.anchor_generator if hasattr(model.detector, "rpn") else model.detector.anchor_generator
    with torch.inference_mode(), torch.autocast("cpu", dtype):
        batched, _ = model.detector.transform(images)
        maps = list(model.levels(batched.tensors).values())
        assert maps[0].dtype == dtype
        (places,) = anchors(batched, maps)
        if hasattr(model.detector, "rpn"):
            proposals, _ = model.detector.rpn(batched, model.levels(batched.tensors))
            assert proposals[0].dtype == torch.float32
    assert places.dtype == torch.float32
    exact_places = AnchorGenerator(anchors.sizes, anchors.aspect_ratios)(batched, [each.float() for each in maps])[0]
    assert places.equal(exact_places)


def test_the_detector_is_above_the_backbones_layer_groups():
    model = build_network(configured("mask_rcnn"), 3)
    groups = create_optimizer_v2(model, "adamw", lr=1.0, layer_decay=0.5).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert len(names) == len(list(model.parameters()))
    scales = {names[id(parameter)]: group["lr_scale"] for group in groups for parameter in group["params"]}
    assert set(scales) == set(names.values())
    assert {scale for name, scale in scales.items() if not name.startswith("backbone.")} == {1.0}
    assert {name.split(".")[0] for name in scales} == {"backbone", "pyramid", "detector"}
    last = scales["backbone.stages.3.blocks.0.mlp.fc1.weight"]
    assert scales["backbone.stem.conv1.weight"] < scales["backbone.stages.1.blocks.0.mlp.fc1.weight"] < last == 0.5


@pytest.mark.parametrize("until", ["nothing", "stage2", "backbone"])
def test_freezing_keeps_a_part_of_the_backbone(until):
    model = build_network(configured("fcos"), 3)
    model.train()
    Detection().freeze(model, until)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any(name.startswith("backbone.stages.3") for name in trained) == (until != "backbone")
    assert any(name.startswith("backbone.stem") for name in trained) == (until == "nothing")
    assert {name for name, _ in model.named_parameters() if not name.startswith("backbone.")} <= trained
    assert model.backbone.stem.training == (until == "nothing")
    sum(model(*batch()).values()).backward()


def test_a_copy_is_a_network_of_its_own():
    """As the average of the weights is: what stands for the detector's backbone is the copy's."""
    model = build_network(configured("retinanet", evaluation={"score": 0.0}), 3).eval()
    other = copy.deepcopy(model)
    with torch.inference_mode():
        before = model(batch()[0])
        for parameter in other.parameters():
            parameter.zero_()
        assert all(a["scores"].equal(b["scores"]) for a, b in zip(before, model(batch()[0]), strict=True))
        assert not other.levels(torch.randn(1, 3, 32, 32))["0"].any()


@pytest.mark.parametrize(
    ("detector", "message"),
    [
        (
            {"name": "faster_rcnn", "anchor_sizes": [8, 16]},
            r"model\.detector\.anchor_sizes: 2 sizes for 5 maps \(of the strides 4, 8, 16, 32, 64\); give a size for",
        ),
        ({"name": "fcos", "channels": 32}, r"model\.detector\.channels: a multiple of 32 from 64 on for fcos, not 32"),
        ({"name": "fcos", "anchor_sizes": [8]}, r"model\.detector\.anchor_sizes: fcos has no anchors"),
    ],
)
def test_mistakes_are_named(detector, message):
    with pytest.raises(ConfigError, match=message):
        build_network(configured(detector), 3)


def test_finer_maps_and_anchors():
    """Sizes are of anchors, a map each; the finest map and the branches' depth are as configured."""
    detector = {"name": "retinanet", "finest_stride": 4, "anchor_sizes": [4, 8, 16, 32, 64, 128], "head_convs": 2}
    model = build_network(configured(detector), 3)
    assert [sizes[0] for sizes in model.detector.anchor_generator.sizes] == [4, 8, 16, 32, 64, 128]
    assert [x.shape[-1] for x in model.levels(torch.zeros(1, 3, 64, 64)).values()] == [16, 8, 4, 2, 1, 1]
    assert len(model.detector.head.classification_head.conv) == len(model.detector.head.regression_head.conv) == 2
    sum(model(*batch()).values()).backward()
    coarse = build_network(configured({"name": "faster_rcnn", "finest_stride": 8}), 3)
    assert coarse.detector.rpn.anchor_generator.sizes == ((64,), (128,), (256,), (512,))
    assert coarse.detector.roi_heads.box_roi_pool.scales == [1 / 8, 1 / 16, 1 / 32]
    sum(coarse(*batch()).values()).backward()


def test_other_backbones_of_timm():
    model = build_network(configured("faster_rcnn", name="timm/resnet10t", variant=None), 4)
    assert len({group["lr_scale"] for group in create_optimizer_v2(model, "adamw", lr=1.0, layer_decay=0.5).param_groups}) > 4  # noqa: E501  # fmt: skip
    sum(model(*batch()).values()).backward()
    with pytest.raises(ConfigError, match=r"model\.name: timm/vit_.* has no four maps of an image"):
        args = {"depth": 1, "embed_dim": 16, "num_heads": 1}
        build_network(configured(name="timm/vit_tiny_patch16_224", variant=None, args=args), 4)
    task = Detection()
    task.check(configured())
    other = configured(name="timm/resnet10t", variant=None)
    with pytest.raises(ConfigError, match=r"train\.compile: .* only of a Conv2Former"):
        task.check(other.model_copy(update={"train": other.train.model_copy(update={"compile": True})}))


def test_what_is_compiled_has_one_size():
    raw = {"task": "detection", "data": {"root": "x"}, "train": {"compile": True}}
    with pytest.raises(ConfigError, match=r"train\.compile: with augment\.resize multi_scale most batches have a size"):
        check_config(raw, "test")
    jitter = {"data": {"root": "x", "img_size": 64}, "augment": {"resize": "large_scale_jitter"}}
    check_config({**raw, **jitter}, "test")


@pytest.mark.parametrize("detector", DETECTORS)
def test_broken_weights_make_broken_losses_and_no_errors(detector):
    """So that a run which has come to that ends as others do, with a sentence."""
    model = build_network(configured(detector, evaluation={"score": 0.0}), 3)
    with torch.no_grad():
        model.pyramid.layer_blocks[0][0].weight[0] = math.nan
    assert not sum(model(*batch()).values()).isfinite()
    with torch.inference_mode():
        assert len(model.eval()(batch()[0])) == 2


def test_grey_images():
    config = configured("fcos", data={"mean": [0.5], "std": [0.5]}, in_chans=1)
    model = build_network(config, 2)
    assert model.in_chans == 1
    sum(model([torch.randn(1, 64, 64)], [target([(4, 6, 30, 40)], [1])]).values()).backward()


def test_the_objective_is_the_sum():
    images, targets = batch()
    objective = DetectionObjective(torch.device("cpu"))
    inputs, wanted = objective.prepare(TrainBatch(images, targets, []), 0)
    losses = {"a": torch.tensor(1.5, dtype=torch.bfloat16), "b": torch.tensor(2.25)}
    total = objective.loss(lambda x, y: losses if x is inputs and y is wanted else None, inputs, wanted)
    assert (total.dtype, total.item()) == (torch.float32, 3.75)


# ---------------------------------------------------------------------------------------------------------------- files


def content_of(model: nn.Module, config: DetectionConfig) -> dict:
    variant = {"name": "conv2former_test", **SHAPE}
    return {
        "model": model.state_dict(),
        "model_ema": None,
        "class_names": NAMES,
        "config": config.to_dict(),
        "variant": variant,
        "step": 1,
        "optimizer": {},
    }


@pytest.mark.parametrize("detector", DETECTORS)
def test_a_checkpoint_gives_the_network_back(detector, tmp_path):
    config = configured({"name": detector, "head_convs": 3}, evaluation={"score": 0.3, "max_detections": 7})
    model = build_network(config, 3).eval()
    path = tmp_path / "best.pt"
    torch.save(content_of(model, config), path)
    found, info = conv2former.load_model(path)
    assert isinstance(found, DetectionNetwork)
    assert not found.training
    assert found.state_dict().keys() == model.state_dict().keys()
    assert all(value.equal(found.state_dict()[key]) for key, value in model.state_dict().items())
    assert (info.class_names, info.num_classes) == (NAMES, 3)
    assert info.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    holder = getattr(found.detector, "roi_heads", found.detector)
    assert (holder.score_thresh, holder.detections_per_img) == (0.3, 7)
    found.limit(config.evaluation.model_copy(update={"score": 0.0}))
    with torch.inference_mode():
        assert len(found(batch()[0])[0]["boxes"]) == 7
    with pytest.raises(CheckpointError, match="conv2former_n"):
        conv2former.load_model(path, expect="conv2former_n")


@pytest.mark.parametrize("detector", ["mask_rcnn", "retinanet"])
def test_a_file_must_hold_what_it_notes(detector, monkeypatch):
    """Whatever it claims, no network is built that is larger than its tensors."""
    config = configured(detector)
    content = content_of(build_network(config, 3), config)
    monkeypatch.setattr("conv2former.tasks.detection.restore.build_network", lambda *_: pytest.fail("was built"))
    noted = config.to_dict()

    def broken(match: str, **changes) -> None:
        detectors = {**noted["model"]["detector"], **changes.pop("detector", {})}
        own = {**noted, "model": {**noted["model"], "detector": detectors}}
        with pytest.raises(CheckpointError, match=match):
            restore_network({**content, "config": own, **changes}, "file.pt")

    broken(r"file\.pt notes a \w+ of 4096 channels for 3 classes, and its pyramid\.", detector={"channels": 4096})
    names = [str(i) for i in range(500_000)]
    broken(r"for 500000 classes, and its detector\.\S+ has the shape", class_names=names)
    broken(r"its configuration is not one of this version", detector={"channels": 1 << 40})
    broken(r"anchor_sizes: 1 size for ", detector={"anchor_sizes": [8]})
    broken(r"does not name its classes", class_names=[])
    broken(r"holds no weights of a detection", model={"a": 1})
    state = content["model"]
    laterals = {key: value for key, value in state.items() if "inner_blocks" not in key}
    broken(r"has no feature pyramid", model=laterals)
    key = next(key for key in state if key.startswith("detector."))
    broken(rf"and its {key} is missing", model={k: v for k, v in state.items() if k != key})
    if detector == "retinanet":
        broken(r"conv\.7\.0\.weight is missing|conv\.1\.0\.weight is missing", detector={"head_convs": 8})


def test_weights_of_a_detection_start_another(tmp_path, caplog):
    """All of them, or all but the last layers where the classes are others, or the backbone's alone."""
    config = configured("mask_rcnn")
    saved = build_network(config, 3).state_dict()
    path = str(tmp_path / "start.pt")
    torch.save({**content_of(build_network(config, 3), config), "model": saved}, path)
    for names, detector, fresh in (
        (NAMES, "mask_rcnn", ()),
        (NAMES[::-1], "mask_rcnn", ("box_predictor", "mask_fcn_logits")),
        (NAMES, {"name": "mask_rcnn", "channels": 16}, ("pyramid", "detector")),
    ):
        other = configured(detector, checkpoint=path).model_copy(
            update={"train": configured().train.model_copy(update={"seed": 5})}
        )
        state = build_network(other, 3, names).state_dict()
        changed = {
            key for key, value in state.items() if value.shape != saved[key].shape or not value.equal(saved[key])
        }
        weights = {key for key in changed if key.endswith("weight")}
        expected = {key for key in state if key.endswith("weight") and any(word in key for word in fresh)}
        assert weights == expected, names
    assert "the detector of" in caplog.text
    assert "is loaded, but its last layers, whose classes are others" in caplog.text
    assert "has another detector" in caplog.text
    assert "no head" not in caplog.text  # of the backbone, where it is of no use
    frozen = build_network(configured("mask_rcnn", checkpoint=path, freeze="backbone"), 3, NAMES)
    assert all(value.equal(saved[key]) for key, value in frozen.state_dict().items())
    assert math.isfinite(sum(build_network(config, 3)(*batch()).values()).item())
