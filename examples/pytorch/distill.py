# Distils MoCo v2 into a ResNet-18 from a store, in plain PyTorch. It is lightly's examples/pytorch/simsiam.py, changed in the
# lines that say "# stored": the crops and the targets come from the store, and the loss compares with the targets.
#
#     fkd-ssl precompute --images imagenet/train --store store --teacher mocov2_r50_800ep
#     python examples/pytorch/distill.py --images imagenet/train --store store

import argparse

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
args = parser.parse_args()

MEAN, STD = ([255 * value for value in values] for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))


class Student(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.normalize = torchvision.transforms.Normalize(MEAN, STD)
        self.backbone = torchvision.models.resnet18()
        self.backbone.fc = nn.Identity()
        self.projection_head = MoCoProjectionHead(512, 512, dim)

    def forward(self, x):
        x = self.backbone(self.normalize(x.float()))
        return nn.functional.normalize(self.projection_head(x), dim=1)


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    store = fkd_ssl.open_store(args.store)  # stored
    dataset = fkd_ssl.StoredCrops(store, args.images, crops_per_image=4, pixels=args.pixels)  # stored: 4 other crops each epoch
    dataloader = torch.utils.data.DataLoader(
        dataset,
        batch_size=args.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=args.workers,
    )
    model = Student(dim=dataset.columns[0].meta.target.size).to(device)
    criterion = fkd_ssl.objectives.FeatureKL()  # stored
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)

    print("Starting Training")
    for epoch in range(args.epochs):
        total_loss = 0.0
        for batch in dataloader:
            crops = batch["images"].flatten(0, 1).to(device)  # stored: [B, 4, 3, P, P] to [4 B, 3, P, P]
            targets = batch["targets"].flatten(0, 1).to(device)  # stored
            loss = criterion(model(crops), targets)
            total_loss += loss.detach()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"epoch: {epoch:>02}, loss: {total_loss / len(dataloader):.5f}")
