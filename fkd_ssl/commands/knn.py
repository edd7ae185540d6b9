"""k-nearest-neighbour accuracy of a model's features: cosine, exact search with faiss, weights exp(similarity / T).

The model is a run folder, one of its checkpoints, or teacher:NAME with --checkpoint. The last checkpoint of a run is
what is scored unless another is named.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of knn."""

    model: str
    """A run folder, a .ckpt of one, or teacher:NAME (see fkd-ssl teachers)."""
    train: str
    """Folder of labelled images whose features are searched."""
    val: str
    """Folder of labelled images to classify."""
    k: int = 20
    """Neighbours that vote."""
    temperature: float = 0.07
    """T of the weights exp(similarity / T)."""
    pixels: int | None = None
    """Side of the centre crop; the model's own training size by default."""
    checkpoint: str | None = None
    """Weights of teacher:NAME."""
    workers: int = 2
    """Processes that read images."""
    json: bool = False
    """Print one JSON object on standard output."""


def run(config: Config) -> int:
    """Scores the model."""
    from fkd_ssl.commands import console, resolve
    from fkd_ssl.eval import knn
    from fkd_ssl.images import scan

    train, val = scan(config.train), scan(config.val)
    model = resolve.model_of(config.model, config.checkpoint)
    pixels = resolve.pixels_of(config.pixels, model.pixels)
    result = knn.evaluate(
        model=model.features,
        train=train,
        val=val,
        pixels=pixels,
        k=config.k,
        temperature=config.temperature,
        workers=config.workers,
    )
    console.show_score("knn", f"{config.model}: kNN-{config.k} at {pixels} px", {**config.__dict__, "pixels": pixels}, result)
    return 0
