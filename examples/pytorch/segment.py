"""Fine-tunes an exported student for semantic segmentation: torchvision's FCN on the student's last map.

fkd-ssl export --model RUN --out student.safetensors
python segment.py student.safetensors IMAGES MASKS --network resnet18 --node layer4 --classes 11
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from torchvision.io import ImageReadMode, read_image
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.segmentation.fcn import FCN, FCNHead
from torchvision.transforms.functional import normalize

parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("student", help="file of fkd-ssl export")
parser.add_argument("images", type=Path, help="folder of images of one size")
parser.add_argument("masks", type=Path, help="folder of PNGs with one byte per pixel and the names of the images")
parser.add_argument("--network", default="resnet18", help="the student's network in torchvision")
parser.add_argument("--node", default="layer4", help="its last feature map: features for MobileNet")
parser.add_argument("--classes", type=int, default=11)
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--batch_size", type=int, default=8)
args = parser.parse_args()

network = torchvision.models.get_model(args.network)
if network.load_state_dict(load_file(args.student), strict=False).unexpected_keys:
    parser.error(f"{args.student} is not a {args.network}: choose another --network")
backbone = create_feature_extractor(network, {args.node: "out"})
channels = backbone(torch.zeros(2, 3, 64, 64))["out"].shape[1]
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
model = FCN(backbone, FCNHead(channels, args.classes)).to(device)


def read(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    image = read_image(str(path), ImageReadMode.RGB).float() / 255
    mask = torch.from_numpy(np.array(Image.open(args.masks / f"{path.stem}.png"))).long()  # of a palette, the indices
    return normalize(image, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), torch.where(mask < args.classes, mask, 255)


loader = DataLoader(sorted(args.images.iterdir()), args.batch_size, shuffle=True, collate_fn=lambda paths: [*map(read, paths)])
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for epoch in range(args.epochs):
    for batch in loader:
        images, masks = (torch.stack(parts).to(device) for parts in zip(*batch, strict=True))
        loss = torch.nn.functional.cross_entropy(model(images)["out"], masks, ignore_index=255)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch + 1}, loss: {loss.item():.4f}")
