"""Difference between our pixels and torchvision's for crops with the same parameters: the mean absolute difference of a crop.

    python benchmarks/colours.py --images DIR [--recipes mocov2 swav] [--pixels 224]

The whole pipeline: box and resize, colour jitter, greyscale, blur and flip. The reference does the same on Pillow images with
torchvision's functional transforms, in the record's order, and Pillow's Gaussian blur.
"""

import argparse

import numpy as np
from PIL import Image, ImageFilter
from torchvision.transforms import functional as F

from fkd_ssl.crops import RECIPES, draw, image_key, replay
from fkd_ssl.crops.colour import OPERATION_ORDERS
from fkd_ssl.crops.operations import BLUR, FLIP, GREY, JITTER
from fkd_ssl.images import scan

JITTERS = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)  # numbered as in OPERATION_ORDERS


def torchvisions(picture: Image.Image, record: np.void, pixels: int) -> np.ndarray:
    """The crop as uint8 [P, P, 3]."""
    top, left, height, width = (int(record[name]) for name in ("top", "left", "height", "width"))
    crop = F.resized_crop(picture, top, left, height, width, [pixels, pixels])
    if record["flags"] & JITTER:
        factors = [float(record[name]) for name in ("brightness", "contrast", "saturation", "hue")]
        for operation in OPERATION_ORDERS[record["order"]]:
            crop = JITTERS[operation](crop, factors[operation])
    if record["flags"] & GREY:
        crop = F.to_grayscale(crop, 3)
    if record["flags"] & BLUR:
        crop = crop.filter(ImageFilter.GaussianBlur(float(record["sigma"]) * pixels / 224))
    return np.asarray(F.hflip(crop) if record["flags"] & FLIP else crop)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True)
    parser.add_argument("--recipes", nargs="+", default=["fkd", "mocov2", "swav"])
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--crops", type=int, default=4)
    parser.add_argument("--limit", type=int, default=250)
    args = parser.parse_args()
    images = scan(args.images)
    print(f"{args.pixels} px, {args.crops} crops of each of {min(args.limit, len(images))} images; grey levels of 256\n")
    print("| recipe | mean | median | 90th percentile | largest |\n|---|---|---|---|---|")
    for name in args.recipes:
        differences = []
        for i in range(min(args.limit, len(images))):
            image = images.pixels(i)
            records = draw(RECIPES[name], image_key(0, images.names[i]), *image.shape[:2], 0, args.crops)
            for view, record in zip(replay(image, records, args.pixels), records, strict=True):
                other = torchvisions(Image.fromarray(image), record, args.pixels)
                differences.append(np.abs(view.transpose(1, 2, 0).astype(float) - other).mean())
        found = (np.mean(differences), np.median(differences), np.quantile(differences, 0.9), max(differences))
        print(f"| `{name}` | {' | '.join(f'{value:.1f}' for value in found)} |")


if __name__ == "__main__":
    main()
