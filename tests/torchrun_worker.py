"""Started by torchrun in tests/training/test_torchrun.py: train on this process's part of every batch, and have process 0 write the weights."""
import sys
from pathlib import Path

import torch
from grocery_nb.data_utils import create_dataloader
from grocery_nb.run_training import processes
from grocery_nb.train_utils import train_model
from torch import nn
from torch.utils.data import TensorDataset


def train(batch_size: int, accumulate: int, shard: tuple = (0, 1), checkpoints=None, stop: int = 0, resume: bool = False) -> dict:
    "The weights after three epochs of a small network without BatchNorm; 85 samples, so that the last step is smaller"
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (85,), generator=random)
    images = torch.randn(85, 3, 12, 12, generator=random) + labels[:, None, None, None] / 3
    torch.manual_seed(1 + shard[0] if checkpoints is None else 1)  # other weights in each process: the first one's count
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 4))
    loader = create_dataloader(TensorDataset(images, labels), batch_size, shuffle=True, seed=5, shard=shard)
    val_loader = create_dataloader(TensorDataset(images[:20], labels[:20]), 20)
    history = train_model(model, loader, 3, 1e-3, val_loader, progress=False, schedule="cosine", warmup=0.1, clip=0.5, ema=0.9, weight_decay=0.05,
                          label_smoothing=0.1, accumulate=accumulate, class_weights=(1, 2, 1, 0.5), checkpoints=checkpoints, resume=resume)
    return {"weights": model.state_dict(), "loss": [row["loss"] for row in history], "accuracy": [row["accuracy"] for row in history]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    with processes() as shard:
        found = train(32, 1, shard)
        if shard[0] == 0: torch.save(found, Path(sys.argv[1]))
