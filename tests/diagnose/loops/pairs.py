"""Loops of two networks: key encoders, target networks, generators."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bnfinetune as bnf
from bnfinetune.diagnose.finding import Findings
from tests.diagnose.loops.data import fresh, loaders
from tests.diagnose.loops.registry import DECAYED, judged, loop, said

KEYS = ["BN102", "BN303"]
"""What key encoders and target networks do on purpose."""


APART = ["BN201", "BN209"]
"""What comes of real and generated images in batches of their own; nobody evaluates the discriminator."""


def _encoder(seed: int) -> nn.Module:
    model = fresh("net", seed)
    model.fc = nn.Linear(16, 8)
    return model


@torch.no_grad()
def _follow(slow: nn.Module, fast: nn.Module, momentum: float) -> None:
    for kept, new in zip(slow.parameters(), fast.parameters(), strict=True):
        kept.lerp_(new, 1 - momentum)


def _views(images: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    return tuple(images.flip(-1 - side) + 0.3 * torch.randn(images.shape, generator=draw) for side in range(2))


class MoCo(nn.Module):
    """facebookresearch/moco: a query encoder, a key encoder that follows it, a queue."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.encoder_q = _encoder(seed)
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(8, 64), dim=0))

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        q = F.normalize(self.encoder_q(query), dim=1)
        with torch.no_grad():
            _follow(self.encoder_k, self.encoder_q, 0.99)
            order = torch.randperm(len(key))
            k = F.normalize(self.encoder_k(key[order]), dim=1)[order.argsort()]
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ self.queue.clone()], 1) / 0.2
        self.queue = torch.cat([k.T, self.queue], 1)[:, :64]
        return logits, torch.zeros(len(logits), dtype=torch.long)


@loop(
    "MoCo",
    source="facebookresearch/moco, main_moco.py; its key encoder marked by bnf.expect",
    fault="nearest neighbours looked up with the query encoder in training mode",
    rule="BN304",
    notes=DECAYED,
)
def moco(seed: int, planted: bool) -> Findings:
    torch.manual_seed(seed)
    model, (train, test) = MoCo(seed), loaders(seed)
    bnf.expect(model, KEYS, layers="encoder_k.*")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4)
    draw = torch.Generator().manual_seed(seed)
    with bnf.watch_bn(model, optimizer) as watch:
        for _ in range(2):
            model.train()
            for images, _ in train:
                loss = F.cross_entropy(*model(*_views(images, draw)))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            model.train(planted)
            with torch.no_grad():
                model.encoder_q(next(iter(test))[0])
    return judged(watch, model, optimizer, train)


class BYOL(nn.Module):
    """lucidrains/byol-pytorch: an online network with a predictor, a target network; both views through both."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.online = _encoder(seed)
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.predictor = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        guesses = self.predictor(self.online(torch.cat([first, second])))
        with torch.no_grad():
            targets = self.target(torch.cat([second, first]))
        return 2 - 2 * F.cosine_similarity(guesses, targets).mean()


@loop(
    "BYOL",
    source="lucidrains/byol-pytorch; its target network marked by bnf.expect",
    fault="a linear evaluation in which the encoder's BN is live",
    rule="BN305",
    notes={"BN111": "the encoder of the linear evaluation stands still by its mode"},
)
def byol(seed: int, planted: bool) -> Findings:
    torch.manual_seed(seed)
    model, (train, _) = BYOL(seed), loaders(seed)
    bnf.expect(model, KEYS, layers="target.*")
    optimizer = torch.optim.Adam([*model.online.parameters(), *model.predictor.parameters()], lr=3e-3)
    draw = torch.Generator().manual_seed(seed)
    with bnf.watch_bn(model, optimizer) as watch:
        for _ in range(2):
            for images, _ in train:
                loss = model(*_views(images, draw))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                _follow(model.target, model.online, 0.99)
    found = said(watch.findings, bnf.check_bn(model, optimizer, train))
    probe = nn.Sequential(copy.deepcopy(model.online).requires_grad_(False), nn.Linear(8, 4))
    optimizer = torch.optim.SGD(probe[1].parameters(), lr=0.1)
    if not planted:
        probe[0] = probe[0].eval()
    with bnf.watch_bn(probe, optimizer) as probing:
        for images, labels in train:
            optimizer.zero_grad()
            F.cross_entropy(probe(images), labels).backward()
            optimizer.step()
    return said(found, probing.findings, bnf.check_bn(probe, optimizer, train))


def _generator() -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose2d(8, 16, 4, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.ConvTranspose2d(16, 8, 4, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 3, 4, 2, 1),
        nn.Tanh(),
    )


def _discriminator() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(8, 16, 4, 2, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.LeakyReLU(0.2),
        nn.Conv2d(16, 1, 4),
        nn.Flatten(),
    )


@loop(
    "DCGAN",
    source="PyTorch, DCGAN tutorial; real and generated images apart: bnf.expect(discriminator, ...)",
    fault="samples drawn with the generator in training mode, as the tutorial does",
    rule="BN304",
)
def dcgan(seed: int, planted: bool) -> Findings:
    torch.manual_seed(seed)
    generator, critic = _generator(), bnf.expect(_discriminator(), APART)
    train, _ = loaders(seed)
    of_generator = torch.optim.Adam(generator.parameters(), lr=2e-4, betas=(0.5, 0.999))
    of_critic = torch.optim.Adam(critic.parameters(), lr=2e-4, betas=(0.5, 0.999))
    judge, fixed = nn.BCEWithLogitsLoss(), torch.randn(16, 8, 1, 1)
    with bnf.watch_bn(generator, of_generator) as watch, bnf.watch_bn(critic, of_critic) as watch_critic:
        for _ in range(2):
            for images, _ in train:
                ones, zeros = torch.ones(len(images), 1), torch.zeros(len(images), 1)
                critic.zero_grad()
                judge(critic(images), ones).backward()
                drawn = generator(torch.randn(len(images), 8, 1, 1))
                judge(critic(drawn.detach()), zeros).backward()
                of_critic.step()
                generator.zero_grad()
                judge(critic(drawn), ones).backward()
                of_generator.step()
            generator.train(planted)
            with torch.no_grad():
                generator(fixed)
            generator.train()
    found = said(watch.findings, watch_critic.findings)
    return said(found, bnf.check_bn(generator, of_generator), bnf.check_bn(critic, of_critic, train))
