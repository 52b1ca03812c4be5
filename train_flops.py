"""Train ResNet50x3_Flops, the CNN cut from BiT's R50x3 that needs as many FLOPs as the hybrid R50-ViT-B_16."""

from train_resnet import train_cnn
from utils.errors import run_script


def main():
    train_cnn("ResNet50x3_Flops", __doc__)


if __name__ == "__main__":
    run_script(main)
