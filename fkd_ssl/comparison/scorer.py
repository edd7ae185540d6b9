"""kNN, linear probe and retrieval of the models of a comparison. Scores are saved and not computed again."""

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fkd_ssl import files
from fkd_ssl.arrays import BoolArray
from fkd_ssl.comparison.config import CompareConfig
from fkd_ssl.eval import baselines, knn, logreg, retrieval
from fkd_ssl.eval.classify import evaluate
from fkd_ssl.eval.features import Split, extract_split
from fkd_ssl.images import ImageSource
from fkd_ssl.students import CLASSIFIER, Dim, Student

PROBES = ("knn_top1", "linear_top1")
"""Scores for which the correctness of every test image is saved."""
OWN = "top1"
"""Accuracy of a classifier's own predictions; its correctness is saved too."""


class Scorer:
    """Scores backbone features of a comparison's images.

    Args:
        config: Config of the comparison.
        folder: Folder of the saved scores.
        images: Training images.
        val: Test images.
        device: Device that scores.
    """

    def __init__(
        self, config: CompareConfig, folder: Path, images: ImageSource, val: ImageSource, device: torch.device
    ) -> None:
        self.config = config
        self.folder = folder
        self.images = images
        self.val = val
        self.device = device
        self.classes = len(val.classes) if config.head == CLASSIFIER else 0
        folder.mkdir(exist_ok=True)

    @property
    def probes(self) -> tuple[str, ...]:
        """Names of the scores of students that have a teacher."""
        return (*PROBES, OWN) if self.classes else PROBES

    def score(
        self, name: str, features: Callable[[Tensor], Tensor], *, classify: Callable[[Tensor], Tensor] | None = None
    ) -> dict[str, Any]:
        """Returns `knn_top1`, `linear_top1` and `map_at_r` in percent; for classifiers also `top1`.

        Args:
            name: Name that the scores are saved under.
            features: Function from uint8 [B, 3, P, P] to backbone features [B, F].
            classify: Function to the logits or probabilities that give `top1`.
        """
        path = self.folder / f"{name}.json"
        if path.exists():
            return files.read_json(path)
        scores, correct = self._score(self._split(features))
        if self.classes and classify is not None:
            pixels, workers = self.config.pixels, self.config.workers
            own = evaluate(classify, self.val, pixels=pixels, classes=self.classes, workers=workers, progress=False)
            scores[OWN] = own["top1"]
            correct.append(own["correct"])
        buffer = io.BytesIO()
        np.save(buffer, np.stack(correct))
        files.replace(self.folder / f"{name}.npy", buffer.getvalue())
        files.write_json(path, scores)
        return scores

    def score_baselines(self) -> dict[str, dict[str, float]]:
        """Returns the scores of 8 x 8 pixels, of a colour histogram and of chance, by the names of `eval.baselines`."""
        path = self.folder / "baselines.json"
        if not path.exists():
            split = self._split(baselines.features)
            train, val = baselines.by_name(split.train_features), baselines.by_name(split.features)
            scores: dict[str, Any] = {}
            for name in train:
                part = replace(split, train_features=train[name], features=val[name])
                scores[name], _ = self._score(part)
            chance = baselines.chance(split.train_labels, split.labels)
            files.write_json(path, {**scores, "chance": dict.fromkeys(PROBES, chance)})
        found: dict[str, dict[str, float]] = files.read_json(path)
        return found

    def _split(self, features: Callable[[Tensor], Tensor]) -> Split:
        pixels, workers = self.config.pixels, self.config.workers
        return extract_split(features, self.images, self.val, pixels=pixels, workers=workers, progress=False)

    def _score(self, split: Split) -> tuple[dict[str, Any], list[BoolArray]]:
        """Returns `knn_top1`, `linear_top1` and `map_at_r`, and for the first two which images were correct."""
        neighbours = knn.evaluate_features(k=self.config.knn_k, device=self.device, **split.common)
        probe = logreg.evaluate(progress=False, device=self.device, **split.common)
        found = retrieval.evaluate(
            gallery=split.train_features,
            gallery_labels=split.train_labels,
            queries=split.features,
            labels=split.labels,
            device=self.device,
        )
        scores = {"knn_top1": neighbours["top1"], "linear_top1": probe["top1"], "map_at_r": found["map_at_r"]}
        return scores, [neighbours["correct"], probe["correct"]]

    def score_untrained(self, name: str, seed: int, dims: Sequence[Dim]) -> dict[str, Any]:
        """Returns the scores of the student with its initial weights."""
        torch.manual_seed(seed)
        c = self.config
        student = Student(c.student, *dims, head=c.head, stem=c.stem, width=c.width)
        student = student.eval().to(self.device)
        return self.score(name, student.features, classify=student)

    def correct(self, name: str, probe: str) -> BoolArray:
        """Returns whether each test image was classified correctly, bool [n]."""
        array: BoolArray = files.map_user_npy(self.folder / f"{name}.npy", kinds="b")[self.probes.index(probe)]
        return array
