"""Detection and segmentation: losses in dicts, lists of boxes, a class for each pixel."""

from __future__ import annotations

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator

import bnfinetune as bnf
from bnfinetune.diagnose.finding import Findings
from tests.diagnose.loops.classifiers import convert
from tests.diagnose.loops.data import CLASSES, SIZE, pictures, pretrained
from tests.diagnose.loops.registry import judged, loop


def _as_boxes(seed: int, count: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Each image holds one object, as large as the image but for a margin."""
    box = torch.tensor([[1.0, 1.0, SIZE - 1.0, SIZE - 1.0]])
    return [(image, {"boxes": box, "labels": label[None] + 1}) for image, label in pictures(seed, count)]


def _detector(seed: int) -> nn.Module:
    net = pretrained("net", seed)
    backbone = nn.Sequential(net.stem, net.body)
    backbone.out_channels = 16
    return FasterRCNN(
        backbone,
        min_size=SIZE,
        max_size=SIZE,
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
        rpn_anchor_generator=AnchorGenerator(((8, 14),), ((1.0,),)),
        box_roi_pool=torchvision.ops.MultiScaleRoIAlign(["0"], output_size=2, sampling_ratio=1),
        rpn_pre_nms_top_n_train=16,
        rpn_post_nms_top_n_train=8,
        rpn_pre_nms_top_n_test=16,
        rpn_post_nms_top_n_test=8,
        box_detections_per_img=4,
        box_head=nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU()),
        box_predictor=torchvision.models.detection.faster_rcnn.FastRCNNPredictor(16, CLASSES + 1),
    )


@loop(
    "Faster R-CNN",
    source="torchvision, object detection finetuning tutorial and references/detection",
    fault="live BN with two images per batch",
    rule="BN206",
)
def detection(seed: int, planted: bool) -> Findings:
    model = _detector(seed)
    if not planted:
        convert(model.backbone)
    order = torch.Generator().manual_seed(seed)
    items = _as_boxes(seed, 16)
    train = DataLoader(
        items, 2, shuffle=True, generator=order, collate_fn=lambda batch: tuple(zip(*batch, strict=True))
    )
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.005, momentum=0.9)
    with bnf.watch_bn(model, optimizer) as watch:
        model.train()
        for images, targets in train:
            losses = model(list(images), list(targets))
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            model([image for image, _ in items[:2]])
    return judged(watch, model, optimizer, train)


class Segmenter(nn.Module):
    """Gives out maps in a dict, as torchvision's segmentation networks do."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        net = pretrained("net", seed)
        self.backbone = nn.Sequential(net.stem, net.body)
        self.classifier = nn.Sequential(
            nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 2, 1)
        )
        self.aux_classifier = nn.Conv2d(16, 2, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.backbone(images)
        heads = {"out": self.classifier, "aux": self.aux_classifier}
        return {name: F.interpolate(head(features), size=images.shape[-2:]) for name, head in heads.items()}


def _as_maps(seed: int, count: int) -> TensorDataset:
    """Bright blocks to be found, in images in no order."""
    generator = torch.Generator().manual_seed(seed)
    coarse = (torch.rand(count, 1, 4, 4, generator=generator) > 0.5).float()
    truth = F.interpolate(coarse, size=SIZE)
    noise = torch.randn(count, 3, SIZE, SIZE, generator=generator)
    return TensorDataset(noise + 2 * truth, truth[:, 0].long())


@loop(
    "semantic segmentation",
    source="torchvision, references/segmentation: main and auxiliary maps, polynomial schedule",
    fault="batches of two with live BN",
    rule="BN206",
)
def segmentation(seed: int, planted: bool) -> Findings:
    torch.manual_seed(seed)
    model = Segmenter(seed)
    order = torch.Generator().manual_seed(seed)
    train = DataLoader(_as_maps(seed, 96), 2 if planted else 8, shuffle=True, generator=order, drop_last=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=3 * len(train), power=0.9)
    with bnf.watch_bn(model, optimizer) as watch:
        for _ in range(1 if planted else 3):
            model.train()
            for images, truth in train:
                maps = model(images)
                loss = F.cross_entropy(maps["out"], truth) + 0.5 * F.cross_entropy(maps["aux"], truth)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            model.eval()
            with torch.inference_mode():
                model(_as_maps(seed + 1, 8).tensors[0])
    return judged(watch, model, optimizer, train)
