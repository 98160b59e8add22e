"A training script as the second lab has students write it, in our own words: argparse, and calls of the three modules by the labs' names and keywords."
import argparse

from data_utils import get_classes, get_loaders
from model_utils import DEVICE, create_model, load_model, save_model
from train_utils import evaluate_model, train_model

parser = argparse.ArgumentParser(description="Train the grocery classifier")
parser.add_argument("--batch-size", type=int, default=32)
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--learning-rate", type=float, default=1e-3)
parser.add_argument("--output", default="model.pth")


def main():
    args = parser.parse_args()
    num_classes = len(get_classes())
    train_loader, val_loader = get_loaders(batch_size=args.batch_size)
    model = create_model(num_classes).to(DEVICE)
    train_model(model, train_loader, learning_rate=args.learning_rate, epochs=args.epochs)
    accuracy = evaluate_model(model, val_loader)
    save_model(model, args.output)
    again = evaluate_model(load_model(num_classes=num_classes, path=args.output), val_loader)
    print(f"accuracy {accuracy:.4f}, loaded again {again:.4f}")


if __name__ == "__main__": main()
