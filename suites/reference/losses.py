"""Losses of the reference trainings, from their publications; torch, on any device.

Assignment: task-aligned (TOOD, Feng et al. 2021). Boxes: CIoU (Zheng et al. 2020) and the distribution focal loss
(Li et al. 2020); turned boxes: ProbIoU (Llerena et al. 2021). Masks: weighed prototypes (YOLACT, Bolya et al. 2019).
Key points: COCO's object key point similarity. Boxes are x1, y1, x2, y2 in pixels; turned ones cx, cy, w, h, radians.
"""
# pyright: reportUnknownMemberType=false
# (torch's functions have no types for some of their arguments)

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

TOP = 10  # anchors of an object at most
LEAST, MOST = 2, 8  # cells of an object's longer side at a scale that learns it
ALPHA, BETA = 0.5, 6.0  # exponents of score and overlap in the alignment of an anchor with an object
EPS = 1e-7
KEY_SIGMA = 0.107  # of every key point: as COCO's easiest, the hips


@dataclass(frozen=True)
class Assigned:
    """Which object each anchor learns: `positive` (B, A), `number` (B, A) of the object, `weight` (B, A) in 0..1."""

    positive: Tensor
    number: Tensor
    weight: Tensor


def assign(scores: Tensor, overlap: Tensor, inside: Tensor, classes: Tensor, valid: Tensor) -> Assigned:
    """The anchors whose score and overlap are best aligned with an object learn it.

    Args:
        scores: (B, A, nc) probabilities.
        overlap: (B, M, A) in 0..1 of each object with what each anchor predicts.
        inside: (B, M, A) whether an anchor lies in an object.
        classes: (B, M) of the objects.
        valid: (B, M) which of them are there.
    """
    wanted = inside & valid[..., None]
    of_class = scores.transpose(1, 2).gather(1, classes[..., None].expand(-1, -1, scores.shape[1]))
    aligned = of_class.pow(ALPHA) * overlap.pow(BETA) * wanted
    best = aligned.topk(min(TOP, aligned.shape[2]), 2).indices
    chosen = torch.zeros_like(wanted).scatter_(2, best, True) & wanted & (aligned > 0)
    # An anchor that several objects chose learns the one that it overlaps most.
    number = torch.where(chosen, overlap, torch.full_like(overlap, -1.0)).argmax(1)
    positive = chosen.any(1)
    chosen = chosen & (torch.arange(chosen.shape[1], device=chosen.device)[None, :, None] == number[:, None])
    aligned = aligned * chosen
    highest = aligned.amax(2, keepdim=True).clamp_min(EPS)
    weight = (aligned / highest * (overlap * chosen).amax(2, keepdim=True)).amax(1)
    return Assigned(positive, number, weight)


def ciou(a: Tensor, b: Tensor) -> Tensor:
    """Complete IoU of boxes (..., 4) -> (...)."""
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a.unbind(-1), b.unbind(-1)
    wa, ha, wb, hb = ax2 - ax1, ay2 - ay1, bx2 - bx1, by2 - by1
    across = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp_min(0)
    down = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp_min(0)
    inter = across * down
    iou = inter / (wa * ha + wb * hb - inter + EPS)
    width = torch.maximum(ax2, bx2) - torch.minimum(ax1, bx1)
    height = torch.maximum(ay2, by2) - torch.minimum(ay1, by1)
    distance = ((bx1 + bx2 - ax1 - ax2) ** 2 + (by1 + by2 - ay1 - ay2) ** 2) / 4
    shape = 4 / math.pi**2 * (torch.atan(wb / (hb + EPS)) - torch.atan(wa / (ha + EPS))) ** 2
    with torch.no_grad():
        share = shape / (shape - iou + 1 + EPS)
    return iou - distance / (width**2 + height**2 + EPS) - share * shape


def probiou(a: Tensor, b: Tensor) -> Tensor:
    """Likeness in 0..1 of turned boxes (..., 5), as Gaussians: one minus their Hellinger distance."""

    def covariance(box: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        w, h, cos, sin = box[..., 2] ** 2 / 12, box[..., 3] ** 2 / 12, box[..., 4].cos(), box[..., 4].sin()
        return w * cos**2 + h * sin**2, w * sin**2 + h * cos**2, (w - h) * cos * sin

    (a1, b1, c1), (a2, b2, c2) = covariance(a), covariance(b)
    x, y = a[..., 0] - b[..., 0], a[..., 1] - b[..., 1]
    both = (a1 + a2) * (b1 + b2) - (c1 + c2) ** 2
    near = ((a1 + a2) * y**2 + (b1 + b2) * x**2) / (both + EPS) / 4 - ((c1 + c2) * x * y) / (both + EPS) / 2
    each = ((a1 * b1 - c1**2).clamp_min(0) * (a2 * b2 - c2**2).clamp_min(0)).sqrt()
    alike = (both / (4 * each + EPS) + EPS).log() / 2
    distance = (near + alike).clamp(EPS, 100.0)
    return 1 - (1 - (-distance).exp() + EPS).sqrt()


def distribution(logits: Tensor, target: Tensor) -> Tensor:
    """Focal loss of a distribution over whole distances: logits (N, 4, bins), target (N, 4) in cells -> (N,)."""
    last = logits.shape[2] - 1
    target = target.clamp(0, last - 0.01)
    low = target.long()
    share = target - low
    log = functional.log_softmax(logits, 2)
    lower, upper = log.gather(2, low[..., None])[..., 0], log.gather(2, low[..., None] + 1)[..., 0]
    return -(lower * (1 - share) + upper * share).mean(1)


def inside_boxes(points: Tensor, boxes: Tensor) -> Tensor:
    """Which points (A, 2) lie in boxes (B, M, 4) -> (B, M, A)."""
    low, high = points - boxes[:, :, None, :2], boxes[:, :, None, 2:] - points
    return torch.cat((low, high), 3).amin(3) > EPS


def fitting(sides: Tensor, strides: Tensor) -> Tensor:
    """Which anchors are of a scale for an object: longer sides (B, M) in pixels, strides (A, 1) -> (B, M, A).

    Each scale learns objects of two to eight cells (as in FCOS, Tian et al. 2019, but overlapping). Left to
    the alignment alone, a scale that fires seldom at first is chosen less and less, and the coarsest one dies out.
    """
    cells = sides[..., None] / strides[:, 0]
    small, large = strides.min() == strides[:, 0], strides.max() == strides[:, 0]
    return ((cells >= LEAST) | small) & ((cells <= MOST) | large)


def own_frame(points: Tensor, turned: Tensor) -> Tensor:
    """Points (A, 2) in the frames of turned boxes (B, M, 5), origin at their centres -> (B, M, A, 2)."""
    offset = points - turned[:, :, None, :2]
    cos, sin = turned[:, :, None, 4].cos(), turned[:, :, None, 4].sin()
    x, y = offset.unbind(-1)
    return torch.stack((x * cos + y * sin, y * cos - x * sin), -1)


def nearest_angle(turned: Tensor, angle: Tensor) -> Tensor:
    """The same boxes (N, 5) described with the angle nearest to `angle` (N,): a quarter turn exchanges the sides."""
    quarter = math.pi / 2
    turns = torch.round((angle - turned[:, 4]) / quarter)
    swapped = torch.remainder(turns, 2) == 1
    sides = torch.where(swapped[:, None], turned[:, [3, 2]], turned[:, 2:4])
    return torch.cat((turned[:, :2], sides, (turned[:, 4] + turns * quarter)[:, None]), 1)


def masks(
    coefficients: Tensor, prototypes: Tensor, rows: Tensor, instances: Tensor, numbers: Tensor, boxes: Tensor
) -> Tensor:
    """Mean cross entropy of masks within their boxes, by anchor.

    Args:
        coefficients: (P, 32) of the anchors that learn.
        prototypes: (B, 32, h, w).
        rows: (P,) the picture of each anchor, in order.
        instances: (B, h, w) the number of the object that each place shows, from 1; 0 for none.
        numbers: (P,) of the object that each anchor learns, from 0.
        boxes: (P, 4) of those objects, in pixels of the prototypes.
    """
    counts = torch.bincount(rows, minlength=len(prototypes))
    place = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]  # within its picture
    # One product of matrices for all pictures, each filled up to as many anchors as one has at most.
    filled = coefficients.new_zeros(len(prototypes), int(counts.max()), coefficients.shape[1])
    filled = filled.index_put((rows, place), coefficients)
    logits = torch.einsum("bpc,bchw->bphw", filled, prototypes)[rows, place]
    target = (instances[rows] == numbers[:, None, None] + 1).float()
    loss = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    h, w = instances.shape[1:]
    x, y = torch.arange(w, device=boxes.device) + 0.5, torch.arange(h, device=boxes.device) + 0.5
    within = ((x >= boxes[:, :1]) & (x <= boxes[:, 2:3]))[:, None] & ((y >= boxes[:, 1:2]) & (y <= boxes[:, 3:]))[
        ..., None
    ]
    area = (boxes[:, 2:] - boxes[:, :2]).clamp_min(1).prod(1)
    return ((loss * within).sum((1, 2)) / area).mean()


def key_points(predicted: Tensor, wanted: Tensor, area: Tensor) -> Tensor:
    """One minus the similarity of labelled points: predicted (P, K, 2), wanted (P, K, 3), area (P,) in pixels."""
    seen = (wanted[..., 2] > 0).float()
    squares = ((predicted - wanted[..., :2]) ** 2).sum(2)
    loss = 1 - torch.exp(-squares / (2 * area[:, None].clamp_min(1) * (2 * KEY_SIGMA) ** 2))
    return (loss * seen).sum() / seen.sum().clamp_min(1)
