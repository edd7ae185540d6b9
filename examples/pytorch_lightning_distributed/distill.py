# Distils MoCo v2 into a ResNet-18 from a store, with Lightning on several GPUs. It is lightly's
# examples/pytorch_lightning_distributed/simsiam.py, changed in the lines that say "# stored".
#
#     fkd-ssl precompute --images imagenet/train --store store --teacher mocov2_r50_800ep
#     python examples/pytorch_lightning_distributed/distill.py --images imagenet/train --store store

import argparse

import pytorch_lightning as pl
import torch
import torchvision
from lightly.models.modules import MoCoProjectionHead
from torch import nn

import fkd_ssl

parser = argparse.ArgumentParser()
parser.add_argument("--images", default="imagenet/train")
parser.add_argument("--store", default="store")
parser.add_argument("--pixels", type=int, default=224)
parser.add_argument("--batch_size", type=int, default=64, help="images per batch, with 4 crops each")
parser.add_argument("--epochs", type=int, default=10, help="passes over the images")
parser.add_argument("--workers", type=int, default=8)
parser.add_argument("--devices", default="auto", help="number of processes, one per GPU if there are GPUs")
args = parser.parse_args()

MEAN, STD = ([255 * value for value in values] for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))


class Distillation(pl.LightningModule):
    def __init__(self, dim):
        super().__init__()
        self.normalize = torchvision.transforms.Normalize(MEAN, STD)
        self.backbone = torchvision.models.resnet18()
        self.backbone.fc = nn.Identity()
        self.projection_head = MoCoProjectionHead(512, 512, dim)
        self.criterion = fkd_ssl.objectives.FeatureKL()  # stored

    def forward(self, x):
        x = self.backbone(self.normalize(x.float()))
        return nn.functional.normalize(self.projection_head(x), dim=1)

    def on_train_epoch_start(self):
        self.trainer.train_dataloader.dataset.set_epoch(self.current_epoch)  # stored: all processes read the same pass

    def training_step(self, batch, batch_idx):
        crops = batch["images"].flatten(0, 1)  # stored: [B, 4, 3, P, P] to [4 B, 3, P, P]
        targets = batch["targets"].flatten(0, 1)  # stored
        loss = self.criterion(self(crops), targets)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-4)


if __name__ == "__main__":
    store = fkd_ssl.open_store(args.store)  # stored
    dataset = fkd_ssl.StoredCrops(store, args.images, crops_per_image=4, pixels=args.pixels)  # stored: 4 other crops each epoch
    dataloader = torch.utils.data.DataLoader(
        dataset,
        batch_size=args.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=args.workers,
    )
    trainer = pl.Trainer(
        max_epochs=args.epochs,
        devices=args.devices,
        strategy="ddp",
        sync_batchnorm=torch.cuda.is_available(),
        use_distributed_sampler=True,  # each process reads different images of the store
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(Distillation(dim=dataset.columns[0].meta.target.size), dataloader)
    if trainer.is_global_zero:
        print(f"loss: {trainer.callback_metrics['loss']:.5f}")
    torch.distributed.destroy_process_group()  # otherwise gloo's threads (on CPUs) may abort Python at exit
