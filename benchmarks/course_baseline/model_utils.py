# The notes' model_utils.py (note 2), deliberately naive: the yardstick. See README.md.
import torch
from torch import nn
from torchvision import models

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def create_model(num_classes, weights=None):
    # Changed: the notes load pretrained weights, which need a download; pass weights="DEFAULT" for that.
    model = models.mobilenet_v3_small(weights=weights)
    model.classifier[3] = nn.Linear(model.classifier[3].in_features, num_classes)
    return model.to(DEVICE)


def save_model(model, path):
    torch.save(model.state_dict(), path)


def load_model(num_classes, path="model.pth"):
    # The default path is ours: note 2 gives load_model(num_classes, path), note 4 calls load_model(num_classes=...).
    model = create_model(num_classes)
    model.load_state_dict(torch.load(path, map_location=DEVICE))
    return model
