"""The functions of chapter 11 against torchvision's own, and at LVIS's size."""

import pytest
import torch
from pycocotools import mask as coco
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.roi_heads import (
    RoIHeads,
    fastrcnn_loss,
    maskrcnn_loss,
    paste_masks_in_image,
    project_masks_on_boxes,
)
from torchvision.ops import clip_boxes_to_image

from eql_repro.eql import EqualizationLoss
from eql_repro.regions import (
    KeyedSampler,
    check_targets,
    class_loss_of,
    class_masks,
    class_nms,
    class_scores,
    image_tails,
    keep_best,
    mask_loss,
    mask_rles,
    num_logits,
    paste_masks,
    region_losses,
)
from eql_repro.rivals import BalancedSoftmaxLoss, EQLv2, SoftmaxCrossEntropy

SIZE = (96, 128)


def random_boxes(n, size=SIZE, least=2.0):
    """Boxes of all sizes inside an image, some along its borders."""
    limit = torch.tensor([size[1], size[0]]).float()
    low, high = (torch.rand(2, n, 2) * (limit + 20) - 10).sort(0).values
    boxes = torch.cat([low, torch.maximum(high, low + least)], 1)
    boxes = clip_boxes_to_image(boxes, size)
    wide = ((boxes[:, 2:] - boxes[:, :2]) > 0.5).all(1)
    return boxes[wide]


def parts_of_mask_loss(n=12, classes=1230, width=16, side=8):
    """Features, a last layer for all classes, and targets of n regions."""
    last, x = nn.Conv2d(width, classes, 1), torch.rand(n, width, side, side)
    labels, boxes = torch.randint(classes, (n,)), random_boxes(200)[:n]
    masks = torch.randint(2, (n, *SIZE)).float()
    return last, x.requires_grad_(), labels, boxes, masks


def test_class_masks_equal_torchvision_in_loss_and_gradients():
    torch.manual_seed(0)
    last, x, labels, boxes, masks = parts_of_mask_loss()
    index = torch.arange(len(boxes))
    truth = maskrcnn_loss(last(x), [boxes], [masks], [labels], [index])
    goals = project_masks_on_boxes(masks, boxes, index, x.shape[-1])
    ours = mask_loss(class_masks(x, last.weight, last.bias, labels), goals)
    assert abs(truth - ours) < 1e-6
    leaves = [x, last.weight, last.bias]
    pairs = zip(
        torch.autograd.grad(truth, leaves),
        torch.autograd.grad(ours, leaves),
        strict=True,
    )
    for a, b in pairs:
        assert a.abs().max() > 0
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-7)


class Largest(TorchDispatchMode):
    """Remember the size of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.numel = max(self.numel, *made, 0)
        return out


def test_class_masks_make_nothing_for_other_classes():
    last, x, labels, *_ = parts_of_mask_loss()
    with Largest() as largest:
        masks = class_masks(x, last.weight, last.bias, labels)
        mask_loss(masks, torch.rand(12, 8, 8)).backward()
    assert largest.numel == last.weight.numel()  # its gradient
    with Largest() as largest:
        last(x)
    assert largest.numel == 12 * 1230 * 8 * 8


def test_one_shared_mask_is_the_mask_of_every_class():
    last, x = nn.Conv2d(16, 1, 1), torch.rand(5, 16, 4, 4)
    masks = class_masks(x, last.weight, last.bias, torch.tensor([0, 1, 7, 900, 3]))
    assert torch.allclose(masks, last(x)[:, 0], atol=1e-6)


def reference_heads(threshold, limit):
    """torchvision's region heads, for their choice of detections alone."""
    sizes = (0.5, 0.5, 512, 0.25, None, threshold, 0.5, limit)
    return RoIHeads(None, None, None, *sizes)


def both_detections(classes, regions, threshold=0.0, limit=300, start=2400):
    """Detections of torchvision and ours, from the same logits and shifts."""
    heads, proposals = reference_heads(threshold, limit), random_boxes(3 * regions)
    proposals = proposals[:regions]
    z, shifts = 3 * torch.randn(regions, classes + 1), torch.randn(regions, classes, 4)
    shifts = shifts * torch.tensor([1.0, 1.0, 0.5, 0.5])
    theirs = torch.cat([z[:, -1:], z[:, :-1]], 1)  # its background comes first
    padded = torch.cat([torch.zeros(regions, 1, 4), shifts], 1).flatten(1)
    truth = heads.postprocess_detections(theirs, padded, [proposals], [SIZE])
    boxes, scores, labels = (x[0] for x in truth)

    def boxes_of(region, label):
        decoded = heads.box_coder.decode_single(
            shifts[region, label], proposals[region]
        )
        return clip_boxes_to_image(decoded, SIZE)

    options = {"score_threshold": threshold, "limit": limit, "start": start}
    ours = keep_best(class_scores(z, "softmax"), boxes_of, **options)
    return (boxes, scores, labels - 1), ours


@pytest.mark.parametrize("classes", [1, 20, 1230])
@pytest.mark.parametrize("threshold", [0.0, 0.02])
@pytest.mark.parametrize("start", [7, 2400])
def test_keep_best_equals_torchvision(classes, threshold, start):
    torch.manual_seed(classes)
    truth, ours = both_detections(classes, 60, threshold, start=start)
    assert len(truth[0]) == len(ours[0]) > 0
    assert torch.equal(truth[2], ours[2])
    assert torch.allclose(truth[1], ours[1], atol=1e-7)
    assert torch.allclose(truth[0], ours[0], atol=1e-4)


def test_keep_best_is_never_fooled_by_nan_and_bears_emptiness():
    boxes = random_boxes(50)[:9]
    scores = torch.rand(9, 4)
    scores[2], scores[3, 1] = float("nan"), float("nan")
    _, best, labels = keep_best(scores, lambda r, _: boxes[r])
    assert not best.isnan().any() and len(best) > 5
    for empty in (torch.zeros(0, 4), torch.zeros(9, 4)):
        found = keep_best(empty, lambda r, _: boxes[r])
        assert [list(x.shape) for x in found] == [[0, 4], [0], [0]]


def test_class_nms_keeps_classes_apart_however_many():
    box = torch.tensor([[0.0, 0, 1333, 800]])
    boxes, labels = box.expand(2460, 4), torch.arange(1230).repeat(2)
    kept = class_nms(boxes, torch.rand(2460), labels, 0.5)
    assert labels[kept].sort().values.tolist() == [*range(1230)]
    near = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 19.99], [0, 0, 10, 20.01]]) + 1300
    far = torch.full((3,), 1229)  # IoU 0.50025 falls, 0.49975 stays
    assert class_nms(near[[0, 1]], torch.rand(2), far[:2], 0.5).numel() == 1
    assert class_nms(near[[0, 2]], torch.rand(2), far[:2], 0.5).numel() == 2
    corners = torch.tensor([[0.0, 0, 1, 1], [1, 1, 2, 2]])  # one shift apart
    assert class_nms(corners, torch.rand(2), torch.tensor([1, 0]), 0.5).numel() == 2


def test_masks_are_pasted_as_torchvision_pastes_them():
    torch.manual_seed(0)
    boxes = random_boxes(150, least=0.0)
    masks = torch.rand(len(boxes), 28, 28)
    truth = paste_masks_in_image(masks[:, None], boxes, SIZE)
    assert torch.equal(paste_masks(masks, boxes, SIZE), truth)
    none = paste_masks(masks[:0], boxes[:0], SIZE)
    assert none.shape == (0, 1, *SIZE)


def test_masks_are_pasted_with_their_gradients():
    boxes = torch.tensor([[1.0, 2, 9, 12], [0.0, 0, 128, 96]])
    masks = torch.rand(2, 28, 28, requires_grad=True)
    paste_masks(masks, boxes, SIZE).sum().backward()
    assert (masks.grad > 0).any((1, 2)).all()


def test_run_lengths_are_those_of_pycocotools():
    torch.manual_seed(0)
    boxes = torch.cat([random_boxes(80), torch.tensor([[0.0, 0, SIZE[1], SIZE[0]]])])
    noise = torch.rand(len(boxes), 28, 28)
    for masks in (noise, torch.ones_like(noise), 0 * noise, (noise - 0.4).sigmoid()):
        pasted = paste_masks(masks, boxes, SIZE)[:, 0] > 0.5
        for code, image in zip(mask_rles(masks, boxes, SIZE), pasted, strict=True):
            truth = coco.encode(image.numpy().astype("uint8", order="F"))
            assert code["counts"] == truth["counts"].decode()
            assert code["size"] == truth["size"]


def test_box_and_class_loss_equal_torchvision():
    torch.manual_seed(0)
    labels = [torch.randint(6, (n,)) for n in (9, 4)]  # 5 is background
    goals = [torch.randn(len(x), 4) for x in labels]
    z, shifts = torch.randn(13, 6), torch.randn(13, 5, 4)
    theirs = torch.cat([z[:, -1:], z[:, :-1]], 1)
    padded = torch.cat([torch.zeros(13, 1, 4), shifts], 1).flatten(1)
    truth = fastrcnn_loss(theirs, padded, [(x + 1) % 6 for x in labels], goals)
    parts = SoftmaxCrossEntropy(), z, shifts, labels, goals
    ours = region_losses(*parts, num_classes=5)
    assert torch.allclose(torch.stack(truth), torch.stack([*ours.values()]))
    images = region_losses(*parts, num_classes=5, normalizer="image")
    split = zip(z.split([9, 4]), shifts.split([9, 4]), labels, goals, strict=True)
    alone = [
        region_losses(parts[0], a, b, [y], [g], num_classes=5) for a, b, y, g in split
    ]
    for name, value in images.items():
        assert torch.isclose(value, (alone[0][name] + alone[1][name]) / 2)
        assert not torch.isclose(value, ours[name])


def test_section_4_2_by_a_double_loop():
    torch.manual_seed(0)
    loss = EqualizationLoss(torch.tensor([0.1, 0.1, 0.1, 0.9, 0.9]), 0.2)
    z, counts = torch.randn(7, 5), [4, 3]
    labels = torch.tensor([0, 3, 5, 2, 1, 5, 4])
    spared = [{0, 1, 2, 3}, {1, 4}]
    total = 0.0
    for row, (scores, label) in enumerate(zip(z.sigmoid(), labels, strict=True)):
        here = spared[row >= 4]
        for j, p in enumerate(scores):
            if j == label:
                total -= p.log()
            elif label == 5 or j >= 3 or j in here:  # background, head or spared
                total -= (1 - p).log()
    tails = image_tails(loss.tail, 5, [torch.tensor([*s]) for s in spared], counts)
    assert torch.isclose(class_loss_of(loss, z, labels, torch.cat(tails)), total / 7)
    assert not torch.isclose(loss(z, labels), total / 7)


def test_a_loss_says_how_many_logits_it_wants():
    assert num_logits(5, EQLv2(5)) == 5
    assert num_logits(5, BalancedSoftmaxLoss([3, 2, 1, 1, 1, 9])) == 6
    with pytest.raises(ValueError, match="5 logits"):
        num_logits(5, EQLv2(6))
    with pytest.raises(ValueError, match="6 logits"):
        num_logits(5, BalancedSoftmaxLoss([3, 2, 1, 1, 1]))
    with pytest.raises(TypeError, match="activation"):
        num_logits(5, nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match="one number"):
        none = SoftmaxCrossEntropy(reduction="none")
        class_loss_of(none, torch.zeros(2, 3), torch.tensor([0, 1]))


def anchors(n):
    return torch.randint(-1, 2, (n,)).float()


def test_without_keys_the_sampler_is_torchvisions():
    torch.manual_seed(0)
    labels = [anchors(500), anchors(40), torch.zeros(30)]
    drawn = []
    for sampler in (
        BalancedPositiveNegativeSampler(64, 0.25),
        KeyedSampler(64, 0.25, "x"),
    ):
        torch.manual_seed(1)
        drawn.append([m for group in sampler(labels) for m in group])
    assert all(map(torch.equal, *drawn))


def test_keyed_draws_follow_the_key_alone():
    torch.manual_seed(0)
    labels = [anchors(500), anchors(400)]
    sampler = KeyedSampler(64, 0.25, "x")

    def draw(keys, labels, sampler=sampler):
        sampler.keys = keys
        return sampler(labels)

    keys = [(0, 1, 5), (0, 1, 9)]
    positive, negative = draw(keys, labels)
    for p, n, y in zip(positive, negative, labels, strict=True):
        assert p.sum() == 16 and n.sum() == 48
        assert (y[p.bool()] == 1).all() and (y[n.bool()] == 0).all()
    swapped = draw(keys[::-1], labels[::-1])
    assert torch.equal(swapped[0][1], positive[0])
    for other in ([(1, 1, 5)], [(0, 2, 5)], [(0, 1, 6)]):
        assert not torch.equal(draw(other, labels[:1])[0][0], positive[0])
    named = draw(keys, labels, KeyedSampler(64, 0.25, "y"))
    assert not torch.equal(named[0][0], positive[0])


def good_target():
    box = torch.tensor([[1.0, 1, 5, 6]])
    masks = torch.zeros(1, *SIZE, dtype=torch.uint8)
    labels = {"labels": torch.tensor([2]), "neg_labels": torch.tensor([0, 1])}
    return {"boxes": box, "masks": masks} | labels


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": torch.tensor([3])}, ValueError, r"labels must be in \[0, 3\), got"),
        ({"labels": torch.tensor([-1])}, ValueError, "labels must be in"),
        ({"labels": torch.tensor([2.0])}, TypeError, "int64"),
        ({"labels": torch.tensor([2, 2])}, ValueError, "boxes must be"),
        ({"boxes": torch.tensor([[1, 1, 5, 6]])}, TypeError, "boxes must be float"),
        ({"neg_labels": torch.tensor([3])}, ValueError, "neg_labels must be in"),
        ({"neg_labels": torch.tensor([1.0])}, TypeError, "neg_labels must be int64"),
        ({"boxes": torch.tensor([[1.0, 1, 1, 6]])}, ValueError, "x1 < x2"),
        ({"boxes": torch.tensor([[1.0, 1, 5, float("nan")]])}, ValueError, "finite"),
        ({"boxes": torch.tensor([[128.0, 1, 140, 6]])}, ValueError, "in the image"),
        ({"boxes": torch.tensor([[1.0, 96, 5, 104]])}, ValueError, "in the image"),
        ({"boxes": torch.tensor([[-9.0, 1, 0, 6]])}, ValueError, "in the image"),
        ({"boxes": [[1.0, 1, 5, 6]]}, TypeError, "boxes must be a tensor"),
        ({"labels": [2]}, TypeError, "labels must be a tensor"),
        ({"masks": torch.zeros(1, 9, 9)}, ValueError, "masks must be"),
        ({"masks": torch.full((1, *SIZE), 255)}, ValueError, r"got \(255, 255\)"),
        ({"masks": torch.full((1, *SIZE), -1)}, ValueError, "be 0 and 1"),
        ({"masks": torch.full((1, *SIZE), 1.9)}, ValueError, "be 0 and 1"),
        ({"masks": torch.full((1, *SIZE), float("nan"))}, ValueError, "be 0 and 1"),
    ],
)
def test_targets_that_do_not_fit_are_named(change, error, message):
    images, fields = [torch.zeros(3, *SIZE)] * 2, {"boxes", "labels", "masks"}
    fields |= {"neg_labels"}
    check_targets([good_target()] * 2, images, fields, 3)
    over = good_target() | {"boxes": torch.tensor([[-3.0, -3, 140, 140]])}
    check_targets([over] * 2, images, fields, 3)
    with pytest.raises(error, match=message) as caught:
        check_targets([good_target(), {**good_target(), **change}], images, fields, 3)
    assert "targets[1]" in str(caught.value)


def test_missing_targets_are_named():
    images = [torch.zeros(3, *SIZE)]
    for targets in (None, [], [good_target()] * 2):
        with pytest.raises(ValueError, match="one dict for each of 1"):
            check_targets(targets, images, {"boxes", "labels"}, 3)
    with pytest.raises(ValueError, match="neg_labels"):
        fields = {"boxes", "labels", "neg_labels"}
        target = {k: v for k, v in good_target().items() if k != "neg_labels"}
        check_targets([target], images, fields, 3)
