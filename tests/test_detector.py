"""Chapter 12's detectors: beside torchvision's own, and each option at work."""

import copy
import io

import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import models
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator

from eql_repro.detector import (
    CASCADE,
    DETECTORS,
    BoxPredictor,
    CascadeHeads,
    _tails,
    build_detector,
    cascade_mask_rcnn,
    faster_rcnn,
    mask_rcnn,
)
from eql_repro.eql import EqualizationLoss
from eql_repro.instances import InstanceSet
from eql_repro.regions import mask_rles, paste_masks
from eql_repro.rivals import EQLv2, SigmoidCrossEntropy, SoftmaxCrossEntropy
from eql_repro.seql import SoftmaxEqualizationLoss

C = 7
SMALL = {
    "backbone": "resnet18",
    "norm": "group",
    "channels": 32,
    "hidden": 64,
    "min_size": 96,
    "max_size": 128,
    "anchor_sizes": (12, 20, 32, 48, 64),
    "proposals": (100, 60),
    "regions": 64,
    "box_detections": 20,
}


def eql():
    return EqualizationLoss(torch.tensor([0.9, 0.8, 0.7] + [0.01] * 4), 0.1)


def batch(sizes=((96, 96), (80, 120)), objects=(3, 2)):
    """Images of noise with bright boxes, and their targets."""
    g, images, targets = torch.Generator().manual_seed(0), [], []
    for i, ((h, w), n) in enumerate(zip(sizes, objects, strict=True)):
        image = torch.rand(3, h, w, generator=g) / 4
        corner = torch.rand(n, 2, generator=g) * torch.tensor([w - 40, h - 40])
        side = 15 + 20 * torch.rand(n, 2, generator=g)
        boxes = torch.cat([corner, corner + side], 1).round()
        masks = torch.zeros(n, h, w, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = 1
            image[:, y1:y2, x1:x2] += 0.6
        images.append(image)
        target = {"boxes": boxes, "masks": masks, "image_id": torch.tensor(10 + i)}
        target["labels"] = torch.randint(C, (n,), generator=g)
        target["neg_labels"] = torch.tensor([C - 1])
        targets.append(target)
    return images, targets


def total(losses):
    return sum(losses.values())


# Beside torchvision


def torchvisions(ours):
    """torchvision's Mask R-CNN with the weights of ours; its background is first."""
    sizes = tuple((s,) for s in SMALL["anchor_sizes"])
    theirs = MaskRCNN(
        copy.deepcopy(ours.backbone),
        C + 1,
        min_size=SMALL["min_size"],
        max_size=SMALL["max_size"],
        rpn_anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5),
        rpn_pre_nms_top_n_train=100,
        rpn_post_nms_top_n_train=100,
        rpn_pre_nms_top_n_test=60,
        rpn_post_nms_top_n_test=60,
        box_head=copy.deepcopy(ours.roi_heads.box_head),
        box_predictor=None,
        box_score_thresh=0.0,
        box_detections_per_img=20,
        box_batch_size_per_image=64,
        mask_head=copy.deepcopy(ours.roi_heads.mask_head),
    )
    heads, mine = theirs.roi_heads, ours.roi_heads
    box = mine.box_predictor
    width = box.cls_score.in_features
    heads.box_predictor = type(heads.box_predictor)(width, C + 1)
    heads.mask_predictor = type(heads.mask_predictor)(32, 32, C + 1)
    state = {k: v.clone() for k, v in ours.state_dict().items()}
    for name in ("weight", "bias"):
        score = getattr(box.cls_score, name)
        state[f"roi_heads.box_predictor.cls_score.{name}"] = score.roll(1, 0)
        for key, rows in (
            ("box_predictor.bbox_pred", 4),
            ("mask_predictor.mask_fcn_logits", 1),
        ):
            own = state[f"roi_heads.{key}.{name}"]
            extra = torch.randn(rows, *own.shape[1:])  # of background: without effect
            state[f"roi_heads.{key}.{name}"] = torch.cat([extra, own])
    theirs.load_state_dict(state)
    return theirs


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    ours = mask_rcnn(C, SoftmaxCrossEntropy(), **SMALL, class_agnostic_mask=False)
    with torch.no_grad():  # far from the start, so that nothing is zero
        box = ours.roi_heads.box_predictor
        nn.init.normal_(box.cls_score.weight, std=0.3)
        nn.init.normal_(box.bbox_pred.weight, std=0.1)
        nn.init.normal_(ours.roi_heads.mask_predictor.mask_fcn_logits.weight, std=0.3)
    return ours, torchvisions(ours)


def test_losses_and_gradients_equal_torchvision(pair):
    ours, theirs = (model.train() for model in pair)
    images, targets = batch()
    found = []
    for model, shift in ((ours, 0), (theirs, 1)):
        torch.manual_seed(3)
        shifted = [{**t, "labels": t["labels"] + shift} for t in targets]
        losses = model(images, shifted)
        model.zero_grad()
        total(losses).backward()
        gradients = [p.grad.clone() for p in model.backbone.parameters()]
        found.append((losses, gradients))
    (mine, mine_grad), (truth, true_grad) = found
    assert mine.keys() == truth.keys()
    for name in truth:
        assert abs(mine[name] - truth[name]) < 1e-6 * max(1, truth[name])
    for a, b in zip(mine_grad, true_grad, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()


def test_detections_equal_torchvision(pair):
    ours, theirs = (model.eval() for model in pair)
    images, _ = batch()
    with torch.no_grad():
        for mine, truth in zip(ours(images), theirs(images), strict=True):
            assert torch.equal(mine["labels"], truth["labels"] - 1)
            assert len(mine["labels"]) == 20
            for name in ("boxes", "scores", "masks"):
                assert torch.allclose(mine[name], truth[name], atol=1e-4)


# Each builder, each loss


@pytest.mark.parametrize("name", [n for n in DETECTORS if "_r18_" in n])
@pytest.mark.parametrize("loss", ["eql", "seql", "v2"])
def test_every_detector_trains_whole_and_detects(name, loss):
    torch.manual_seed(0)
    f = torch.tensor([0.9, 0.8, 0.7] + [0.01] * 4)
    loss = {
        "eql": eql(),
        "seql": SoftmaxEqualizationLoss(f, 0.1, gamma=0.9),
        "v2": EQLv2(C),
    }[loss]
    options = {k: v for k, v in SMALL.items() if k != "backbone"}
    model = build_detector(name, C, loss, **options)
    images, targets = batch()
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    optimiser, history = torch.optim.AdamW(model.parameters(), 3e-4), []
    for _ in range(3):
        losses = model(images, targets, key=(0, 0))
        optimiser.zero_grad()
        total(losses).backward()
        optimiser.step()
        history.append(losses["loss_objectness"].item())  # always of the same anchors
    assert history[-1] < history[0]
    still = [k for k, p in model.named_parameters() if torch.equal(p, before[k])]
    assert not still
    with torch.no_grad():
        for found, image in zip(model.eval()(images), images, strict=True):
            assert len(found["scores"]) == 20
            assert ((found["labels"] >= 0) & (found["labels"] < C)).all()
            assert ("masks" in found) == ("mask" in name)
            limit = torch.tensor([*image.shape[:0:-1]] * 2)
            assert ((found["boxes"] >= 0) & (found["boxes"] <= limit + 1e-3)).all()


def test_table_1_has_its_rows():
    widths = {"18": 512, "50": 2048, "101": 2048}
    for name in ("mask_rcnn_r50_fpn", "cascade_mask_rcnn_r101_fpn"):
        model = build_detector(name, 1230, SoftmaxCrossEntropy())
        depth = name.split("_r")[-1].split("_")[0]
        assert model.backbone.body.layer4[-1].bn1.num_features in (512, widths[depth])
        heads = model.roi_heads
        assert isinstance(heads, CascadeHeads) == name.startswith("cascade")
        assert heads.box_predictor.cls_score.out_features == 1231
        shared = name.startswith("cascade")
        assert heads.box_predictor.bbox_pred.out_features == 4 * (1 if shared else 1230)
        assert heads.mask_predictor.mask_fcn_logits.out_channels == 1
        assert len(model.backbone.body.layer3) == {"50": 6, "101": 23}[depth]


def test_sigmoid_starts_at_the_prior_and_softmax_at_even():
    model = faster_rcnn(C, eql(), **SMALL).eval()
    with torch.no_grad():
        scores = torch.cat([f["scores"] for f in model(batch()[0])])
    assert ((scores > 0.0005) & (scores < 0.002)).all()
    model = faster_rcnn(C, SoftmaxCrossEntropy(), **SMALL).eval()
    with torch.no_grad():
        scores = torch.cat([f["scores"] for f in model(batch()[0])])
    assert (abs(scores - 1 / (C + 1)) < 0.03).all()


def test_a_cascade_asks_for_more_overlap_at_each_stage():
    heads = cascade_mask_rcnn(C, EQLv2(C), **SMALL).roi_heads
    stages = [heads, *heads.later]
    overlaps = [s.proposal_matcher.high_threshold for s in stages]
    assert overlaps == [0.5, 0.6, 0.7] == [c[0] for c in CASCADE]
    assert [s.box_coder.weights[0] for s in stages] == [10, 20, 30]
    assert len({id(s.class_loss) for s in stages}) == 3  # each counts for itself
    assert isinstance(heads.box_predictor, BoxPredictor)


# Background, empty images, the rule of section 4.2


@pytest.mark.parametrize("build", [mask_rcnn, cascade_mask_rcnn])
@pytest.mark.parametrize("normalizer", ["region", "image"])
def test_images_without_objects_push_all_classes_down(build, normalizer):
    torch.manual_seed(0)
    model = build(C, eql(), **SMALL, normalizer=normalizer)
    images, targets = batch(objects=(0, 0))
    losses = model(images, targets)
    assert losses["loss_box_reg"] == losses["loss_mask"] == 0
    total(losses).backward()
    bias = model.roi_heads.box_predictor.cls_score.bias.grad
    assert (bias > 0).all()  # background is not spared, tail or not
    assert all(p.grad is not None for p in model.parameters())  # several processes
    images, targets = batch(objects=(0, 3))
    assert total(model(images, targets)).isfinite()


def test_tail_classes_are_spared_on_objects_alone():
    torch.manual_seed(0)
    images, targets = batch()
    for target in targets:
        target["labels"][:] = 0

    def pushed(loss, **options):
        torch.manual_seed(1)
        model = faster_rcnn(C, loss, **SMALL, **options)
        model(images, targets, key=(0, 0))["loss_classifier"].backward()
        return model.roi_heads.box_predictor.cls_score.bias.grad

    plain, ours = pushed(SigmoidCrossEntropy()), pushed(eql())
    ruled = pushed(eql(), spare_classes=True)
    assert torch.allclose(plain[:3], ours[:3])  # head
    assert (ours[3:] < plain[3:]).all()
    assert torch.allclose(ruled[3 : C - 1], ours[3 : C - 1])
    assert torch.allclose(ruled[C - 1], plain[C - 1])  # known to be absent


def test_the_rule_needs_a_tail_and_the_negative_labels():
    with pytest.raises(ValueError, match="spare_classes"):
        mask_rcnn(C, SigmoidCrossEntropy(), **SMALL, spare_classes=True)
    model, (images, targets) = mask_rcnn(C, eql(), **SMALL, spare_classes=True), batch()
    del targets[1]["neg_labels"]
    with pytest.raises(ValueError, match=r"targets\[1\].*neg_labels"):
        model(images, targets)


def test_items_of_chapter_8_fit_as_they_are(tmp_path):
    Image.new("RGB", (96, 96), "teal").save(tmp_path / "a.png")
    image = {"id": 9, "height": 96, "width": 96, "file_name": "a.png"}
    image |= {"neg_category_ids": [30], "not_exhaustive_category_ids": []}
    found = {"id": 1, "image_id": 9, "category_id": 20, "bbox": [8, 9, 40, 30]}
    found |= {"area": 600, "segmentation": [[8, 9, 48, 9, 48, 39]]}
    classes = [{"id": i, "name": str(i), "frequency": "r"} for i in (10, 20, 30)]
    data = {"images": [image], "annotations": [found], "categories": classes}
    picture, target = InstanceSet(data, tmp_path, masks=True)[0]
    loss = EqualizationLoss(torch.full((3,), 0.1), 0.2)
    model = mask_rcnn(3, loss, **SMALL, spare_classes=True)
    assert total(model([picture], [target], key=(0, 0))).isfinite()
    tails = _tails(loss, 3, [target], [1], True)
    assert tails[0].tolist() == [[True, False, False]]


# Keys


@pytest.mark.parametrize("build", [mask_rcnn, cascade_mask_rcnn])
def test_a_batch_is_the_mean_of_its_images(build):
    torch.manual_seed(0)
    options = {"normalizer": "image", "min_size": (80, 96, 112)}
    model = build(C, eql(), **{**SMALL, **options})
    images, targets = batch(sizes=((96, 96), (96, 96)))
    both = model(images, targets, key=(3, 5))
    alone = [model([i], [t], key=(3, 5)) for i, t in zip(images, targets, strict=True)]
    for name, value in both.items():
        assert abs(value - (alone[0][name] + alone[1][name]) / 2) < 1e-4 * max(1, value)
    again, other = (model(images, targets, key=(3, i)) for i in (5, 6))
    assert total(again) == total(both) != total(other)


def test_keys_leave_the_global_generator_alone():
    model, (images, targets) = mask_rcnn(C, eql(), **SMALL), batch()
    state = torch.get_rng_state()
    model(images, targets, key=(0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    model(images, targets)  # without a key it draws from there, and forgets the last
    assert not torch.equal(torch.get_rng_state(), state)


# The backbone


def frozen(model):
    names = [
        n for n, p in model.backbone.body.named_parameters() if not p.requires_grad
    ]
    return {n.split(".")[0] for n in names}


def test_a_pretrained_backbone_is_loaded_and_partly_frozen(tmp_path):
    path = tmp_path / "resnet18.pt"
    source = models.resnet18(num_classes=3)
    torch.save(source.state_dict(), path)
    options = {k: v for k, v in SMALL.items() if k != "norm"}
    model = mask_rcnn(C, eql(), **options, pretrained_backbone=str(path))
    body = model.backbone.body
    assert torch.equal(body.layer3[0].conv1.weight, source.layer3[0].conv1.weight)
    assert "conv1" in frozen(model) and "layer1" in frozen(model)
    assert not {"layer2", "layer3", "layer4"} & frozen(model)
    assert not [n for n, _ in model.named_parameters() if "running" in n or "bn" in n]
    scratch = mask_rcnn(C, eql(), **options)
    assert not frozen(scratch) and "bn1.weight" in dict(
        scratch.backbone.body.named_parameters()
    )
    some = mask_rcnn(C, eql(), **SMALL, trainable_layers=2)
    assert frozen(some) == {"conv1", "bn1", "layer1", "layer2"}


def test_weights_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "resnet34.pt"
    torch.save(models.resnet34().state_dict(), path)
    for options in ({"norm": "frozen"}, {"norm": "group"}):
        with pytest.raises(ValueError, match="pretrained_backbone must fit"):
            mask_rcnn(C, eql(), **{**SMALL, **options}, pretrained_backbone=str(path))
    with pytest.raises(ValueError, match="IMAGENET1K_V1"):
        mask_rcnn(C, eql(), **SMALL, pretrained_backbone="nowhere.pt")


# Inputs and outputs


def test_bytes_are_what_floats_are():
    torch.manual_seed(0)
    model = mask_rcnn(C, eql(), **SMALL).eval()
    whole = [(255 * i).clamp(0, 255).byte() for i in batch()[0]]
    with torch.no_grad():
        for a, b in zip(model(whole), model([i / 255 for i in whole]), strict=True):
            assert torch.allclose(a["boxes"], b["boxes"], atol=1e-3)


def test_masks_come_in_three_forms():
    torch.manual_seed(0)
    model, (images, _) = mask_rcnn(C, eql(), **SMALL).eval(), batch()
    found = {}
    for form in ("image", "rle", "box"):
        model.transform.mask_output = form
        with torch.no_grad():
            found[form] = model(images)[1]
    small, size = found["box"]["masks"], (80, 120)
    assert small.shape == (20, 28, 28)
    pasted = paste_masks(small, found["box"]["boxes"], size)
    assert torch.equal(pasted, found["image"]["masks"])
    assert found["rle"]["masks"] == mask_rles(small, found["box"]["boxes"], size)
    other = mask_rcnn(C, eql(), **SMALL, mask_output="rle")
    assert other.transform.mask_output == "rle"


def test_bfloat16_keeps_boxes_and_losses_wide():
    torch.manual_seed(0)
    model, (images, targets) = cascade_mask_rcnn(C, eql(), **SMALL), batch()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(images, targets, key=(0, 0))
        assert all(x.dtype == torch.float32 for x in losses.values())
        total(losses).backward()
        with torch.no_grad():
            found = model.eval()(images)
    assert found[0]["boxes"].dtype == torch.float32
    assert not torch.equal(found[0]["boxes"], found[0]["boxes"].bfloat16().float())
    truth = model.train()(images, targets, key=(0, 0))
    for name, value in losses.items():
        assert abs(value - truth[name]) < 0.1 * max(1, truth[name])


def test_a_model_is_copied_saved_and_its_targets_left_alone():
    torch.manual_seed(0)
    model, (images, targets) = cascade_mask_rcnn(C, EQLv2(C), **SMALL), batch()
    kept = copy.deepcopy(targets)
    model(images, targets, key=(0, 0))
    for a, b in zip(targets, kept, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = cascade_mask_rcnn(C, EQLv2(C), **SMALL)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    values = [total(m(images, targets, key=(0, 1))) for m in (model, twin, fresh)]
    assert values[0] == values[1] == values[2]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"backbone": "resnet19"}, ValueError, "backbone must be one of"),
        ({"backbone": ["resnet18"]}, ValueError, "backbone must be one of"),
        ({"pretrained_backbone": True}, ValueError, "pretrained_backbone must be a"),
        ({"pretrained_backbone": __file__}, ValueError, "backbone must hold weights"),
        ({"min_size": 64.5}, TypeError, "min_size must be a whole number"),
        ({"norm": "layer"}, ValueError, "norm must be one of"),
        ({"normalizer": "object"}, ValueError, "normalizer must be one of"),
        ({"mask_output": "polygon"}, ValueError, "mask_output must be one of"),
        ({"trainable_layers": 6}, ValueError, "trainable_layers must be one of"),
        ({"prior": 0}, ValueError, "prior must lie between"),
        ({"score_threshold": 1.5}, ValueError, "score_threshold must be"),
        ({"regions": 0}, ValueError, "regions must be at least 1"),
        ({"hidden": 64.5}, TypeError, "hidden must be a whole number"),
        ({"min_size": ()}, ValueError, "min_size must be some"),
        ({"anchor_sizes": (8, 16)}, ValueError, "anchor_sizes must be 5"),
        ({"proposals": (100, 0)}, ValueError, "proposals must be at least 1"),
        ({"cascade": True, "class_agnostic_box": False}, ValueError, "class_agnostic"),
        ({"colour": 1}, TypeError, "colour"),
    ],
)
def test_options_out_of_range_are_named(options, error, message):
    with pytest.raises(error, match=message):
        mask_rcnn(C, eql(), **{**SMALL, **options})


def test_classes_and_losses_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="class_loss must be made for"):
        mask_rcnn(C + 1, eql(), **SMALL)
    with pytest.raises(TypeError, match="activation"):
        mask_rcnn(C, nn.CrossEntropyLoss(), **SMALL)
    with pytest.raises(TypeError, match="class_loss must be an instance, got Equal"):
        mask_rcnn(C, EqualizationLoss, **SMALL)
    with pytest.raises(TypeError, match="num_classes"):
        mask_rcnn("7", eql(), **SMALL)
    with pytest.raises(ValueError, match="name must be one of"):
        build_detector("mask_rcnn_r50_c4", C, eql())


def test_the_stages_of_a_cascade_draw_from_one_generator():
    draws = torch.Generator()
    loss = SoftmaxEqualizationLoss(torch.full((C,), 0.5), 0.6, generator=draws)
    heads = cascade_mask_rcnn(C, loss, **SMALL).roi_heads
    losses = [heads.class_loss, *(stage.class_loss for stage in heads.later)]
    assert len(set(map(id, losses))) == 3
    assert all(own.generator is draws for own in losses)
