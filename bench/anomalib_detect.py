"""The peer's side of `peer_detect.py`, run by the Python of an environment that has anomalib 2.7 and not this package.

Fits one of anomalib's models with its own Engine on the images of one folder, and writes what it says of the images of
another, as it says it: its post-processor, which scales and clamps, is left out.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from anomalib.data import Folder, PredictDataset
from anomalib.engine import Engine
from anomalib.models import Padim, Patchcore, ReverseDistillation, Stfpm
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Callback, seed_everything
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import Compose, InterpolationMode, Normalize, Resize  # type: ignore[import-untyped]

# Pyramid levels, as timm's `out_indices`: strides 4, 8 and 16. PatchCore takes the two that its paper takes.
_LEVELS = (1, 2, 3)
_PATCHCORE_LEVELS = (2, 3)
_EVALUATION_BATCH = 16


class Collect(Callback):  # type: ignore[misc]
    """Keep the anomaly maps and scores of each batch, and nothing else of it."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.maps: list[Any] = []
        self.scores: list[Any] = []

    def on_predict_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.paths += map(str, outputs.image_path)
        maps = outputs.anomaly_map
        self.maps.append(maps.float().reshape(len(maps), *maps.shape[-2:]).numpy())
        self.scores.append(outputs.pred_score.float().reshape(-1).numpy())


def give_weights(file: Path) -> None:
    """Let timm take pretrained weights from a file: Stfpm asks for them whatever it is told, so all models do."""
    original = timm.create_model

    def create(name: str, pretrained: bool = False, **options: Any) -> Any:
        net = original(name, pretrained=False, **options)
        if pretrained:
            net.load_state_dict(load_file(file))
        return net

    timm.create_model = create


def build(arguments: argparse.Namespace, resize: Any) -> Any:
    """One of anomalib's models on the given teacher."""
    common = {
        "backbone": arguments.architecture,
        "pre_processor": PreProcessor(Compose([resize, Normalize(arguments.mean, arguments.std)])),
        "post_processor": False,
        "evaluator": False,
        "visualizer": False,
    }
    match arguments.method:
        case "stfpm":
            return Stfpm(layers=_LEVELS, **common)
        case "patchcore":
            return Patchcore(layers=_PATCHCORE_LEVELS, coreset_sampling_ratio=arguments.coreset, **common)
        case "padim":
            return Padim(layers=list(_LEVELS), n_features=arguments.features, **common)
    return ReverseDistillation(layers=_LEVELS, **common)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=("stfpm", "patchcore", "padim", "reverse_distillation"), required=True)
    parser.add_argument("--architecture", required=True, help="of timm")
    for name in ("weights", "train", "test", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name in ("height", "width", "seed", "epochs", "features", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("mean", "std"):
        parser.add_argument(f"--{name}", type=float, nargs=3, required=True)
    parser.add_argument("--interpolation", required=True, help="of resizing")
    parser.add_argument("--coreset", type=float, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    seed_everything(arguments.seed, workers=True)
    give_weights(arguments.weights)
    start = time.perf_counter()
    # Resized before they are put together, as anomalib does where images differ in size.
    resize = Resize((arguments.height, arguments.width), InterpolationMode(arguments.interpolation), antialias=True)
    data = Folder(
        name="train",
        normal_dir=arguments.train,
        augmentations=resize,
        train_batch_size=32,
        num_workers=arguments.threads,
        test_split_mode="none",
        val_split_mode="none",
        seed=arguments.seed,
    )
    data.setup()
    model = build(arguments, resize)
    collect = Collect()
    engine = Engine(
        callbacks=[collect],
        max_epochs=arguments.epochs,
        accelerator="cpu",
        default_root_dir=arguments.out / "anomalib",
        logger=False,
        enable_progress_bar=False,
    )
    engine.fit(model=model, train_dataloaders=data.train_dataloader())
    fitted = time.perf_counter()
    images = PredictDataset(arguments.test, transform=resize)
    loader = DataLoader(images, _EVALUATION_BATCH, num_workers=arguments.threads, collate_fn=images.collate_fn)
    engine.predict(model=model, dataloaders=loader, return_predictions=False)
    np.savez(
        arguments.out / "predictions.npz",
        paths=np.array(collect.paths),
        maps=np.concatenate(collect.maps),
        scores=np.concatenate(collect.scores),
        fit_seconds=fitted - start,
        predict_seconds=(time.perf_counter() - fitted) / len(images),
    )


if __name__ == "__main__":
    main()
