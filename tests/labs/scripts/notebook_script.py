"The first lab's notebook as a script: everything by position and by default, the model in the default place."
from data_utils import TRAIN_CSV, GroceryDataset, create_dataloader, get_classes, get_loaders, transform
from model_utils import create_model, load_model, save_model
from train_utils import evaluate_model, train_model

train_loader = create_dataloader(GroceryDataset(TRAIN_CSV, transform), batch_size=32, shuffle=True)
_, val_loader = get_loaders()
num_classes = len(get_classes())
model = create_model(num_classes=num_classes)
train_model(model, train_loader)
save_model(model)
print(f"accuracy {evaluate_model(load_model(num_classes=num_classes), val_loader):.4f}")
