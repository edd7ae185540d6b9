"""Runs the whole method in minutes on generated images: symbols of bundled fonts over two bundled photographs.

Makes the images, pretrains a small MoCo v2 teacher on them without labels, precomputes its targets, trains one student from
the store and the same student online, and scores everything. Nothing is downloaded. To continue a killed run, repeat the
command.
"""

from dataclasses import dataclass

from fkd_ssl.text import format_duration


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of demo."""

    out: str = "fkd-ssl-demo"
    """Folder of the demo: images, teacher, comparison."""
    smoke: bool = False
    """Few images and epochs, only to check that everything runs; the scores are then meaningless."""


def run(config: Config) -> int:
    """Runs the demo and prints the table."""
    import time
    from pathlib import Path
    from typing import Any

    from fkd_ssl.commands import compare, console
    from fkd_ssl.comparison.config import CompareConfig
    from fkd_ssl.glyphs import make_glyphs
    from fkd_ssl.pretraining.config import PretrainConfig
    from fkd_ssl.pretraining.engine import pretrain

    started = time.perf_counter()
    out = Path(config.out)
    counts: dict[str, Any] = {"train_per_class": 20, "val_per_class": 10} if config.smoke else {}
    console.log(f"1/3 images: {out / 'images'}")
    images = make_glyphs(out / "images", **counts)
    console.log(f"2/3 teacher: MoCo v2 on {images / 'train'}, without labels")
    checkpoint = pretrain(
        PretrainConfig(
            images=str(images / "train"),
            out=str(out / "teacher"),
            epochs=1 if config.smoke else 15,
            batch_size=64,
            pixels=32,
            queue=64 if config.smoke else 512,
            momentum=0.98,
            lr=0.03,
        ),
        log=console.log,
    )
    console.log("3/3 stored against online: a store of the teacher's targets, two students, their scores")
    comparison = CompareConfig(
        images=str(images / "train"),
        val=str(images / "val"),
        teacher="mocov2",
        checkpoint=str(checkpoint),
        out=str(out / "comparison"),
        student="shufflenet_v2_x0_5",
        epochs=2 if config.smoke else 20,
        crops_per_image=2,
        pixels=32,
        batch_size=64,
        lr=2e-2,
        warmup_epochs=1,
        knn_every=1 if config.smoke else 5,
    )
    status = compare.run(comparison)
    console.log(f"demo done in {format_duration(time.perf_counter() - started)}; everything is in {out}")
    return status
