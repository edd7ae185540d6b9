"""Effect of our pixels on a teacher's kNN: our resize and Pillow's, our colour matrix and torchvision's jitter.

    python benchmarks/pixels_knn.py --train DIR --val DIR --teacher mocov2 --checkpoint FILE --pixels 64

The first pair scores the standard evaluation view, with our resize and with Pillow's (bilinear, antialiased). The second
pair scores the same view under a random colour jitter (0.4, 0.4, 0.4, 0.1), with our matrix and with torchvision's
ColorJitter of the same factors in the same order, on jittered test images and plain training images.
"""

import argparse
import json
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import functional as F
from tqdm.auto import tqdm

from fkd_ssl.arrays import UInt8Array
from fkd_ssl.commands import resolve
from fkd_ssl.crops import RECIPES, centre, draw, image_key, replay
from fkd_ssl.crops.colour import BRIGHTNESS, CONTRAST, OPERATION_ORDERS, SATURATION
from fkd_ssl.crops.operations import JITTER
from fkd_ssl.eval import knn
from fkd_ssl.eval.features import match_classes
from fkd_ssl.images import ImageSource, scan


def ours(image: UInt8Array, path: str, pixels: int) -> UInt8Array:
    return replay(image, centre(*image.shape[:2], pixels), pixels)[0]


def pillow(image: UInt8Array, path: str, pixels: int) -> UInt8Array:
    picture = Image.fromarray(image)
    short = round(pixels * 8 / 7)
    scale = short / min(picture.size)
    width, height = (max(short, round(side * scale)) for side in picture.size)
    left, top = (width - pixels) // 2, (height - pixels) // 2
    small = picture.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + pixels, top + pixels))
    return np.asarray(small).transpose(2, 0, 1)


def jittered(image: UInt8Array, path: str, pixels: int) -> tuple[np.void, UInt8Array]:
    record = draw(RECIPES["mocov2"], image_key(0, path), *image.shape[:2], 0, 1)
    view = centre(*image.shape[:2], pixels)
    for field in ("order", "brightness", "contrast", "saturation", "hue"):
        view[field] = record[field]
    view["flags"] = record["flags"] & JITTER
    return view[0], replay(image, view, pixels)[0]


def our_jitter(image: UInt8Array, path: str, pixels: int) -> UInt8Array:
    return jittered(image, path, pixels)[1]


def torchvision_jitter(image: UInt8Array, path: str, pixels: int) -> UInt8Array:
    record, _ = jittered(image, path, pixels)
    view = torch.from_numpy(ours(image, path, pixels).copy())
    if record["flags"] & JITTER:
        for operation in OPERATION_ORDERS[record["order"]]:
            if operation == BRIGHTNESS:
                view = F.adjust_brightness(view, float(record["brightness"]))
            elif operation == CONTRAST:
                view = F.adjust_contrast(view, float(record["contrast"]))
            elif operation == SATURATION:
                view = F.adjust_saturation(view, float(record["saturation"]))
            else:
                view = F.adjust_hue(view, float(record["hue"]))
    return view.numpy()


def features(
    model: Callable[[torch.Tensor], torch.Tensor],
    images: ImageSource,
    cut: Callable[[UInt8Array, str, int], UInt8Array],
    pixels: int,
) -> np.ndarray:
    parts = []
    for first in tqdm(range(0, len(images), 256), desc=cut.__name__):
        rows = range(first, min(first + 256, len(images)))
        views = np.stack([cut(images.pixels(i), images.names[i], pixels) for i in rows])
        parts.append(model(torch.from_numpy(views)).float().cpu().numpy())
    return np.concatenate(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True)
    parser.add_argument("--val", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--checkpoint")
    parser.add_argument("--pixels", type=int, default=64)
    args = parser.parse_args()
    train, val = scan(args.train), scan(args.val)
    labels = match_classes(train, val)
    model = resolve.teacher_of(args.teacher, args.checkpoint).features

    def top1(train_cut: Callable[..., UInt8Array], val_cut: Callable[..., UInt8Array]) -> float:
        if train_cut not in cache:
            cache[train_cut] = features(model, train, train_cut, args.pixels)
        result = knn.evaluate_features(
            train_features=cache[train_cut],
            train_labels=train.labels,
            features=features(model, val, val_cut, args.pixels),
            labels=labels,
            num_classes=len(train.classes),
        )
        return round(float(result["top1"]), 2)

    cache: dict[Callable[..., UInt8Array], np.ndarray] = {}
    print(
        json.dumps(
            {
                "pixels": args.pixels,
                "resize": {"ours": top1(ours, ours), "pillow": top1(pillow, pillow)},
                "colour jitter of test images": {
                    "our matrix": top1(ours, our_jitter),
                    "torchvision": top1(ours, torchvision_jitter),
                },
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
