"""Train ResNet50x3_Params, the CNN cut from BiT's R50x3 that has as many parameters as the hybrid R50-ViT-B_16."""

from command_line import train_main
from utils.errors import run_script


def main():
    train_main(__doc__, "ResNet50x3_Params")


if __name__ == "__main__":
    run_script(main)
