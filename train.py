"""Fine-tune a ViT, hybrid or BiT ResNet from a checkpoint, or train one from scratch."""

from command_line import train_main
from utils.errors import run_script


def main():
    train_main(__doc__)


if __name__ == "__main__":
    run_script(main)
