r"""Online distillation written with lightly and torchvision only, compared with `fkd-ssl train --targets online`.

    python benchmarks/plain_online.py --images imagenette/train --val imagenette/val --checkpoint mocov2.pth.tar --pixels 64 \
        --student mobilenet_v3_small --epochs 30 --batch_size 128 --lr 1e-2 --out runs/plain

The plain loop uses nothing of this library: torchvision's augmentation of MoCo v2 on PIL images through lightly's data set,
one crop per image, torch's DataLoader, a torchvision ResNet with MoCo's head as the teacher, S2-BNN's loss, Adam and a
cosine. Ours is run twice with the same settings: with one crop per image in a batch, which is the same training, and with
four. Both are scored by the same probes (kNN and logistic regression on backbone features of the test images), so that
differences come from training. Each training runs in a process of its own, one after the other; compare their seconds only
on an idle machine. Repeat the command to continue after the finished trainings.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import models
from torchvision.transforms import v2

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TEMPERATURE = 0.2
WARMUP_EPOCHS = 1


def teacher_of(checkpoint: Path) -> nn.Module:
    """Loads MoCo v2's query encoder from a checkpoint."""
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    prefix = "module.encoder_q."
    state = {key.removeprefix(prefix): value for key, value in saved["state_dict"].items() if key.startswith(prefix)}
    network: Any = models.get_model(saved["arch"], weights=None)
    features, hidden, dim = network.fc.in_features, len(state["fc.0.weight"]), len(state["fc.2.weight"])
    network.fc = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, dim))
    network.load_state_dict(state)
    return network.eval().requires_grad_(False)


def student_of(name: str, dim: int) -> tuple[nn.Module, nn.Module]:
    """Makes a torchvision MobileNet without its classifier, with MoCo v2's head."""
    network: Any = models.get_model(name, weights=None)
    features = network.classifier[0].in_features
    network.classifier = nn.Identity()
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = 0.1  # as in ours: MobileNetV3's 0.01 is too slow for a short training
    return network, nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, dim))


def train_plain(args: argparse.Namespace) -> None:
    """Runs the plain loop; writes the backbone and its cost to args.out."""
    from lightly.data import LightlyDataset

    torch.manual_seed(args.seed)
    scale = args.pixels / 224  # the blur at 224 px, scaled to this size
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(args.pixels, scale=(0.2, 1.0)),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(p=0.2),
            v2.RandomApply([v2.GaussianBlur(2 * math.ceil(6 * scale) // 2 + 1, (0.1 * scale, 2 * scale))]),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    loader: DataLoader[Any] = DataLoader(
        LightlyDataset(str(args.images), transform=transform),
        batch_size=args.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
    )
    teacher = teacher_of(args.checkpoint)
    backbone, head = student_of(args.student, teacher.fc[2].out_features)  # type: ignore[index,union-attr]
    optimizer = torch.optim.Adam([*backbone.parameters(), *head.parameters()], lr=args.lr)
    steps = math.ceil(args.epochs * len(loader.dataset) / args.batch_size)  # type: ignore[arg-type]
    warmup = round(WARMUP_EPOCHS / args.epochs * steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: (s + 1) / warmup if s < warmup else 0.5 * (1 + math.cos(math.pi * (s - warmup) / (steps - warmup)))
    )
    step, start = 0, time.perf_counter()
    while step < steps:
        for images, *_ in loader:
            with torch.no_grad():
                target = F.softmax(F.normalize(teacher(images), dim=1) / TEMPERATURE, dim=1)
            output = F.normalize(head(backbone(images)), dim=1)
            loss = -(target * F.log_softmax(output / TEMPERATURE, dim=1)).sum(dim=1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
            if step % 100 == 0:
                print(f"{step} of {steps} steps, loss {loss.item():.4f}", file=sys.stderr, flush=True)
            if step == steps:
                break
    took = {"train_seconds": time.perf_counter() - start, "steps": step, "crops_seen": step * args.batch_size}
    args.out.mkdir(parents=True, exist_ok=True)
    torch.save(backbone.state_dict(), args.out / "backbone.pth")
    (args.out / "results.json").write_text(json.dumps(took))


class PlainFeatures(nn.Module):
    """The plain student's backbone, for our probes, which pass uint8."""

    def __init__(self, student: str, weights: Path) -> None:
        super().__init__()
        self.backbone, _ = student_of(student, 2)
        self.backbone.load_state_dict(torch.load(weights, weights_only=True))

    def forward(self, images: Tensor) -> Tensor:
        """Features [B, F] of uint8 [B, 3, H, W]."""
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
        features: Tensor = self.backbone((images / 255 - mean) / std)
        return features


def scores(args: argparse.Namespace, run: Path) -> Any:
    """Returns which test images a run classifies correctly: bool [probes, n]."""
    from fkd_ssl.commands import resolve
    from fkd_ssl.eval import knn, logreg
    from fkd_ssl.eval.features import extract_split
    from fkd_ssl.images import scan

    kept = run / "correct.npy"
    if not kept.exists():
        plain = run / "backbone.pth"
        features = PlainFeatures(args.student, plain).eval() if plain.exists() else resolve.model_of(str(run)).features
        split = extract_split(features, scan(args.images), scan(args.val), pixels=args.pixels, workers=1, progress=False)
        both = [knn.evaluate_features(k=20, **split.common), logreg.evaluate(progress=False, **split.common)]
        np.save(kept, np.stack([result["correct"] for result in both]))
    return np.load(kept, allow_pickle=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, type=Path)
    parser.add_argument("--val", required=True, type=Path)
    parser.add_argument("--checkpoint", required=True, type=Path, help="checkpoint of MoCo v2")
    parser.add_argument("--student", default="mobilenet_v3_small", help="a MobileNet of torchvision")
    parser.add_argument("--pixels", type=int, default=64)
    parser.add_argument("--epochs", type=float, default=30)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args()
    if args.plain:
        train_plain(args)
        return

    shared = [
        word
        for key in ("images", "checkpoint", "student", "pixels", "epochs", "batch_size", "lr", "workers")
        for word in (f"--{key}", str(getattr(args, key)))
    ]
    ours = [sys.executable, "-m", "fkd_ssl", "train", "--targets", "online", "--teacher", "mocov2", *shared]
    ours += ["--warmup_epochs", str(WARMUP_EPOCHS), "--crops_per_image"]
    commands = {
        "plain loop": [sys.executable, __file__, "--plain", "--val", str(args.val), *shared],
        "ours, M = 1": [*ours, "1"],
        "ours, M = 4": [*ours, "4"],
    }
    rows: dict[str, dict[str, Any]] = {}
    right: dict[str, list[Any]] = {name: [] for name in commands}
    for seed in range(args.seeds):
        for name, command in commands.items():
            run = args.out / f"{name.replace(', M = ', '-').replace(' ', '-')}-seed{seed}"
            if not (run / "results.json").exists():
                subprocess.run([*command, "--seed", str(seed), "--out", str(run)], check=True, stdout=sys.stderr)
            took = json.loads((run / "results.json").read_text())
            right[name].append(scores(args, run))
            rows.setdefault(name, {"train_seconds": []})["train_seconds"].append(round(took["train_seconds"], 1))
    from fkd_ssl.eval import stats

    for name, row in rows.items():
        both = np.stack(right[name])  # [seeds, probes, n]
        row["times_as_fast"] = round(sum(rows["plain loop"]["train_seconds"]) / sum(row["train_seconds"]), 2)
        for k, probe in enumerate(("knn_top1", "linear_top1")):
            row[probe] = (100 * both[:, k].mean(axis=1)).round(2).tolist()
            if name != "plain loop":
                difference = stats.paired_bootstrap(both[:, k], np.stack(right["plain loop"])[:, k])
                row[f"{probe}_minus_plain"] = [round(value, 2) for value in difference]
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
