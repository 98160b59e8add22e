# The notes' run_training.py (notes 2 and 5), deliberately naive: the yardstick. See README.md.
import argparse

from data_utils import get_classes, get_loaders
from model_utils import create_model, save_model
from train_utils import evaluate_model, train_model


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--learning-rate", type=float, default=0.001)
    parser.add_argument("--output", type=str, default="model.pth")
    args = parser.parse_args()

    classes = get_classes()
    train_loader, val_loader = get_loaders(batch_size=args.batch_size)
    model = create_model(len(classes))
    train_model(model, train_loader, epochs=args.epochs, lr=args.learning_rate)
    accuracy = evaluate_model(model, val_loader)
    print(f"Validation accuracy: {accuracy:.4f}")
    save_model(model, args.output)


if __name__ == "__main__":
    main()
