"""The loop that people write by hand: open_clip's model and transform, torch's DataLoader, zero-shot labels.

    python benchmarks/plain_loop.py --images photos/ --pretrained ViT-B-32.safetensors --classes dog,cat \
        --templates templates.txt --dtype bfloat16 --out features.npz

It knows nothing of lpclip. benchmarks/peers.py measures lpclip beside it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose


class Photos(Dataset[Tensor]):
    """Images (3, S, S) float32 of a folder, in the order of their names."""

    def __init__(self, folder: str, transform: Compose) -> None:
        self.paths, self.transform = sorted(Path(folder).iterdir()), transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self.paths[index]) as image:
            pixels: Tensor = self.transform(image)
        return pixels


def zero_shot_head(model: open_clip.CLIP, name: str, classes: list[str], templates: list[str]) -> Tensor:
    """The mean of each class's prompts, (K, d) of unit norm."""
    tokenizer = open_clip.get_tokenizer(name)
    prompts = [
        F.normalize(
            model.encode_text(tokenizer([template.replace("{}", one) for template in templates])), dim=1
        )
        for one in classes
    ]
    return F.normalize(torch.stack(prompts).mean(1), dim=1)


@torch.inference_mode()
def main() -> None:
    """Encode a folder, label its images, write names, labels and features (N, d) float16."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for flag in ("--images", "--pretrained", "--classes", "--templates", "--out"):
        parser.add_argument(flag, required=True)
    parser.add_argument("--encoder", default="ViT-B-32")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch-size", type=int, default=64)
    given = parser.parse_args()
    model, _, transform = open_clip.create_model_and_transforms(given.encoder, pretrained=given.pretrained)
    model.eval()
    templates = Path(given.templates).read_text().splitlines()
    head = zero_shot_head(model, given.encoder, given.classes.split(","), templates)
    dtype = getattr(torch, given.dtype)
    model.visual.to(dtype)
    photos = Photos(given.images, transform)
    batches = DataLoader(photos, batch_size=given.batch_size)
    features = torch.cat([F.normalize(model.visual(batch.to(dtype)).float(), dim=1) for batch in batches])
    labels = (features @ head.T).argmax(1)
    np.savez(
        given.out,
        names=[path.name for path in photos.paths],
        labels=labels.numpy(),
        features=features.half().numpy(),
    )


if __name__ == "__main__":
    main()
