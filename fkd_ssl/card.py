"""README.md of a run: what was trained, on which targets, its scores, and how to load it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fkd_ssl import files
from fkd_ssl.targets import TeacherInfo
from fkd_ssl.text import printable

README = "README.md"


def write(
    folder: Path,
    *,
    config: Mapping[str, Any],
    results: Mapping[str, Any],
    teachers: Sequence[TeacherInfo],
    store: Mapping[str, Any] | None,
    student: Mapping[str, Any],
    recipe: Mapping[str, Any],
) -> None:
    """Writes the README.md of a finished run.

    Args:
        folder: The run folder.
        config: Options of the run.
        results: The values of results.json.
        teachers: The teachers of the targets.
        store: What identifies the store, by name (`column digests`, `images` and others); None for online training.
        student: Description of the student, such as its architecture and size.
        recipe: The recipe that the crops were drawn from.
    """
    steps = (
        f"{results['epochs']:g} epochs of one crop per image ({results['steps']:,} steps of {config['batch_size']} crops, "
        f"{results['crops_seen']:,} crops of {results['images']:,} images at {config['pixels']} px)"
    )
    settings = {key: value for key, value in config.items() if key in _SETTINGS and value not in (None, False)}
    source = f"distilled from {' and '.join(teacher.name for teacher in teachers)}" if teachers else "trained on labels"
    labels = "without" if teachers and config["calibrate_below"] is None else "with"
    lines = [
        f"# {student['name']}, {source}",
        "",
        f"Trained {labels} labels by `fkd-ssl train` on {config['targets']} targets: {steps}.",
        "",
        "| student | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in student.items()),
        *(
            line
            for teacher in teachers
            for line in ("", f"| teacher {teacher.name} | |", "|---|---|", *(_row(teacher, key) for key in _TEACHER))
        ),
        *(["", "The licence of the teacher's weights may also apply to the student's weights."] if teachers else []),
        "",
        "| crops | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in {**(store or {"drawn": "anew for every batch"}), **recipe}.items()),
        "",
        "| training | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in settings.items()),
        f"| seconds | {results['train_seconds']:.0f} |",
        "",
        "| score | |",
        "|---|---|",
        *(f"| {name} | {score} |" for name, score in _scores(config, results).items()),
        "",
        "```python",
        "import fkd_ssl",
        "",
        f'student, pixels = fkd_ssl.load_student("{folder.name}/checkpoints/last.ckpt")',
        "features = student.features(images)  # uint8 [B, 3, H, W] to float32 [B, F]",
        "```",
        "",
        f"For torchvision or timm: `fkd-ssl export --model {folder.name} --out student.safetensors`.",
        "",
    ]
    files.replace(folder / README, "\n".join(printable(line, one_line=True) for line in lines).encode())


_TEACHER = ("network", "licence", "source", "checkpoint_sha256")
_SETTINGS = (
    "objective",
    "teacher_weights",
    "label_smoothing",
    "calibrate_below",
    "mixup",
    "cutmix",
    "crops_per_image",
    "single_crop_epochs",
    "optimizer",
    "lr",
    "weight_decay",
    "decay_all",
    "warmup_epochs",
    "lr_decay",
    "clip",
    "ema",
    "precision",
    "seed",
)


def _row(teacher: TeacherInfo, key: str) -> str:
    return f"| {key.replace('_', ' ')} | {getattr(teacher, key) or 'not stated'} |"


def _scores(config: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, str]:
    if results["knn_top1"] is None:
        return {"none yet": "`fkd-ssl knn` and `fkd-ssl linear` score it"}
    own = {f"{key} of its own classes": f"{results[key]:.2f} %" for key in ("top1", "top5") if key in results}
    scores = own | {f"kNN-{config['knn_k']} top-1, at the end": f"{results['knn_top1']:.2f} %"}
    best = results["knn_best"]
    return {**scores, "best during training": f"{best['top1']:.2f} % at step {best['step']}"}
