"""PSNR between our resize and an antialiased one in floating point, on crops of photographs, for each output size.

    python benchmarks/geometry.py --images DIR [--pixels 224 128 96 64 32]

Boxes of the fkd recipe (8 to 100 % of the image), 4 per image, without colour or blur. The reference is torchvision's
antialiased bilinear resize of the box in float32. For comparison, the PSNR of Pillow's antialiased resize, which rounds to 8
bits between its two passes, against the same reference.
"""

import argparse
import json

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import functional as F

from fkd_ssl.crops import RECIPES, draw, image_key, replay
from fkd_ssl.images import scan


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(1e-9, np.mean((a.astype(float) - b) ** 2))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True)
    parser.add_argument("--pixels", type=int, nargs="+", default=[224, 128, 96, 64, 32])
    parser.add_argument("--crops", type=int, default=4)
    parser.add_argument("--limit", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(1)
    images = scan(args.images)
    ours: dict[int, list[float]] = {pixels: [] for pixels in args.pixels}
    pillow: dict[int, list[float]] = {pixels: [] for pixels in args.pixels}
    for i in range(min(args.limit, len(images))):
        image = images.pixels(i)
        records = draw(RECIPES["fkd"], image_key(0, images.names[i]), *image.shape[:2], 0, args.crops)
        records["flags"] = 0
        for pixels in args.pixels:
            views = replay(image, records, pixels)
            for view, record in zip(views, records, strict=True):
                top, left, height, width, *_ = record.item()
                box = np.ascontiguousarray(image[top : top + height, left : left + width])
                floats = torch.from_numpy(box).permute(2, 0, 1).float()
                exact = F.resize(floats, [pixels, pixels], antialias=True).numpy()
                other = np.asarray(Image.fromarray(box).resize((pixels, pixels), Image.Resampling.BILINEAR))
                ours[pixels].append(psnr(view, exact))
                pillow[pixels].append(psnr(other.transpose(2, 0, 1), exact))
    rows = [
        {
            "pixels": pixels,
            "crops": len(ours[pixels]),
            **{
                f"{name}_{what}": round(float(function(scores[pixels])), 1)
                for name, scores in (("ours", ours), ("pillow", pillow))
                for what, function in (("mean", np.mean), ("minimum", np.min))
            },
        }
        for pixels in args.pixels
    ]
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
