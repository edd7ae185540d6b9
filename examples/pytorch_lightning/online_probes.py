"""kNN and a linear probe during a SimCLR training with lightly, on images in class folders.

    python examples/pytorch_lightning/online_probes.py TRAIN VAL --epochs 10

The module is lightly's example, unchanged: the callbacks take the features from its `backbone` while it runs. A batch of
lightly is (views, labels, ...), and `second` returns its labels; pass `labels=` for other batches.
"""

import argparse

import pytorch_lightning as pl
import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import models, transforms
from torchvision.datasets import ImageFolder

from fkd_ssl.eval.online import OnlineKNN, OnlineLinear


class SimCLR(pl.LightningModule):
    """SimCLR as in lightly's examples."""

    def __init__(self) -> None:
        super().__init__()
        resnet = models.resnet18()
        resnet.fc = nn.Identity()
        self.backbone = resnet
        self.head = SimCLRProjectionHead(512, 512, 128)
        self.criterion = NTXentLoss()

    def training_step(self, batch: tuple[list[Tensor], Tensor], index: int) -> Tensor:
        first, second = batch[0]
        loss: Tensor = self.criterion(self.head(self.backbone(first)), self.head(self.backbone(second)))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.backbone(batch[0])  # the callbacks need nothing else

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.06, momentum=0.9, weight_decay=5e-4)


def main() -> None:
    """Trains and prints what was logged last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train")
    parser.add_argument("val")
    parser.add_argument("--pixels", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()

    views = SimCLRTransform(input_size=args.pixels, gaussian_blur=0.0)
    centre = transforms.Compose(
        [
            transforms.Resize(round(args.pixels * 8 / 7)),
            transforms.CenterCrop(args.pixels),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    train, val = ImageFolder(args.train, views), ImageFolder(args.val, centre)
    loading = {"batch_size": args.batch_size, "num_workers": args.workers}
    callbacks = [OnlineKNN(k=20), OnlineLinear(num_classes=len(train.classes))]
    trainer = pl.Trainer(max_epochs=args.epochs, callbacks=callbacks, logger=False, enable_checkpointing=False)
    trainer.fit(SimCLR(), DataLoader(train, shuffle=True, **loading), DataLoader(val, **loading))
    logged = {name: round(float(value), 3) for name, value in trainer.callback_metrics.items()}
    print(logged)


if __name__ == "__main__":
    main()
