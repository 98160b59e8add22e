# The notes' data_utils.py (notes 1 and 2), deliberately naive: the yardstick. See README.md.
import os
from pathlib import Path

import pandas as pd
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

# Changed: the course's own folder is not here, so the environment names it.
DATA_DIR = Path(os.environ.get("GROCERY_DATA_DIR", "dataset"))
CLASSES_CSV = DATA_DIR / "classes.csv"
TRAIN_CSV = DATA_DIR / "train.txt"
VAL_CSV = DATA_DIR / "val.txt"

# Changed: note 2 writes Resize(224,224), which torchvision reads as size=224, interpolation=224 and refuses.
transform = transforms.Compose([
    transforms.Resize((224, 224)),
    transforms.ToTensor(),
    transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
])


class GroceryDataset(Dataset):
    def __init__(self, csv_file, transform=None):
        self.data = pd.read_csv(csv_file, header=None)
        self.data.columns = ["image_path", "fine_label", "coarse_label"]
        self.transform = transform

    def __len__(self):
        return len(self.data)

    def __getitem__(self, idx):
        image = Image.open(DATA_DIR / self.data.iloc[idx]["image_path"]).convert("RGB")
        label = int(self.data.iloc[idx]["coarse_label"])
        if self.transform:
            image = self.transform(image)
        return image, label


def get_classes():
    classes = pd.read_csv(CLASSES_CSV)
    classes = classes.set_index("Coarse Class ID (int)")
    return classes["Coarse Class Name (str)"].to_dict()


def get_loaders(batch_size):
    train_dataset = GroceryDataset(TRAIN_CSV, transform=transform)
    val_dataset = GroceryDataset(VAL_CSV, transform=transform)
    train_loader = DataLoader(train_dataset, batch_size=batch_size, shuffle=True)
    val_loader = DataLoader(val_dataset, batch_size=batch_size, shuffle=False)
    return train_loader, val_loader
