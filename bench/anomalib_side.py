"""anomalib's side of `run.py` and `peer_detect.py`.

Runs in an environment that has anomalib 2.7 and not this package.

`fit` fits one of anomalib's models with its own Engine on the images of a folder, without validation, prints `fitted`,
and writes its anomaly maps and scores for another folder's images. The post-processor, which scales and clamps, is
left out. With --height and --width images are resized and normalised as the other options say; without them the model
keeps its own preprocessing.

`predict` runs STFPM with pictures on a folder, by `Engine.predict` and then exported to OpenVINO (`OpenVINOInferencer`,
the map blended over each image), and prints the images per second of both. It does not fit first: what a student has
learnt has no part in the speed.
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
from anomalib.deploy import ExportType, OpenVINOInferencer
from anomalib.engine import Engine
from anomalib.models import Padim, Patchcore, ReverseDistillation, Stfpm
from anomalib.pre_processing import PreProcessor
from anomalib.visualization.image.functional import overlay_images, visualize_anomaly_map
from lightning.pytorch import Callback, seed_everything
from PIL import Image
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


def use_weights(file: Path) -> None:
    """Let timm take pretrained weights from a file: Stfpm always asks timm for them, so all models do here."""
    original = timm.create_model

    def create(name: str, pretrained: bool = False, **options: Any) -> Any:
        net = original(name, pretrained=False, **options)
        if pretrained:
            # The file has no stages after the last level; no feature depends on them.
            unexpected = net.load_state_dict(load_file(file), strict=False).unexpected_keys
            if unexpected:
                raise SystemExit(f"{file}: {name} has no {', '.join(unexpected)}")
        return net

    timm.create_model = create


def build_model(arguments: argparse.Namespace, pre_processor: Any) -> Any:
    """Return one of anomalib's models on the given teacher."""
    common = {
        "backbone": arguments.architecture,
        "pre_processor": pre_processor,
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


def make_engine(folder: Path, **options: Any) -> Any:
    return Engine(accelerator="cpu", default_root_dir=folder, logger=False, enable_progress_bar=False, **options)


def fit(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    seed_everything(arguments.seed, workers=True)
    start = time.perf_counter()
    resize, pre_processor = None, True
    if arguments.height:
        # Before images are put together, as anomalib resizes them where they differ in size.
        size = arguments.height, arguments.width
        resize = Resize(size, InterpolationMode(arguments.interpolation), antialias=True)
        mean, std = ([float(value) for value in text.split(",")] for text in (arguments.mean, arguments.std))
        pre_processor = PreProcessor(Compose([resize, Normalize(mean, std)]))
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
    model = build_model(arguments, pre_processor)
    collect = Collect()
    engine = make_engine(arguments.out / "anomalib", callbacks=[collect], max_epochs=arguments.epochs)
    engine.fit(model=model, train_dataloaders=data.train_dataloader())
    print("fitted", flush=True)
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


def predict(arguments: argparse.Namespace) -> None:
    model = Stfpm(backbone=arguments.architecture, layers=_LEVELS, evaluator=False)
    engine = make_engine(arguments.out)
    images = PredictDataset(arguments.images)
    engine.predict(model=model, dataset=PredictDataset(sorted(arguments.images.iterdir())[0]))
    start = time.perf_counter()
    engine.predict(model=model, dataset=images)
    seconds = time.perf_counter() - start
    # Of the images' own kinds.
    written = sum(path.is_file() for path in arguments.out.rglob("images/**/*"))
    if written < len(images):
        raise SystemExit(f"{written} pictures for {len(images)} images")
    print(len(images) / seconds, len(images) / predict_exported(engine, model, arguments))


def predict_exported(engine: Any, model: Any, arguments: argparse.Namespace) -> float:
    """Predict with the model in OpenVINO, and write each image under its map; return the seconds."""
    exported = engine.export(model, ExportType.OPENVINO, arguments.out)
    inferencer = OpenVINOInferencer(exported, device="CPU")
    files = sorted(arguments.images.iterdir())
    inferencer.predict(files[0])
    start = time.perf_counter()
    for file in files:
        found = inferencer.predict(file)
        image = Image.fromarray((255 * found.image[0]).astype(np.uint8))
        heatmap = visualize_anomaly_map(np.squeeze(found.anomaly_map), normalize=True)
        overlay_images(image, heatmap.resize(image.size)).save(arguments.out / file.name)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for command in (fit, predict):
        sub = commands.add_parser(command.__name__)
        sub.set_defaults(run=command)
        sub.add_argument("--architecture", required=True, help="teacher, as timm names it")
        for name in ("weights", "out", *(("train", "test") if command is fit else ("images",))):
            sub.add_argument(f"--{name}", type=Path, required=True)
        if command is fit:
            methods = ("stfpm", "patchcore", "padim", "reverse_distillation")
            sub.add_argument("--method", choices=methods, default="stfpm")
            for name in ("seed", "epochs", "threads"):
                sub.add_argument(f"--{name}", type=int, required=True)
            for name in ("height", "width"):
                sub.add_argument(f"--{name}", type=int, default=0, help="input in pixels; 0: the model's own")
            for name in ("mean", "std"):
                sub.add_argument(f"--{name}", default="", help="of the input, as NUMBER,NUMBER,NUMBER")
            sub.add_argument("--interpolation", default="bilinear", help="of resizing")
            sub.add_argument("--features", type=int, default=100, help="features that PaDiM draws")
            sub.add_argument("--coreset", type=float, default=0.1, help="fraction of patches that PatchCore keeps")
    arguments = parser.parse_args()
    use_weights(arguments.weights)
    arguments.run(arguments)


if __name__ == "__main__":
    main()
