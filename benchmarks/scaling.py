"""What training on ImageNet-1k takes on many GPUs, computed from the speed of one: formulas and results as Markdown.

Nothing here is measured but what goes in. SCALING.md explains it and holds the result.
"""

import argparse
import math

IMAGES, EPOCHS = 1281167, 300
MEBI = 2**20


def main():
    args = parse_flags()
    print(f"{args.images_per_second:g} images/s of one GPU, {args.parameters:g} M parameters\n")
    print("| GPUs | images a GPU | batch | link between machines | all-reduce | exposed | cost | 300 epochs |")
    print("|---|---|---|---|---|---|---|---|")
    for gpus in args.gpus:
        for share in sorted({args.batch_size / gpus, args.share}):
            for link in args.links if gpus > args.per_machine else [None]:
                print(row(args, gpus, share, link))
    print("\n| link between machines | 8 machines cost less than 5 % from | 32 machines from |\n|---|---|---|")
    for link in args.links:
        shares = [smallest_share(args, machines * args.per_machine, link) for machines in (8, 32)]
        print(f"| {link:g} Gbit/s | {shares[0]} images a GPU | {shares[1]} |")


def parse_flags():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images_per_second", type=float, default=3799, help="of a training step on one GPU")
    parser.add_argument("--parameters", type=float, default=86.57, help="millions; of ViT-B_16 with 1,000 classes")
    parser.add_argument("--gradient_bytes", type=int, default=2, help="of one gradient as it is sent: 2 at O2")
    parser.add_argument("--bucket", type=float, default=25, help="MiB that DDP sends at once")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 256], help="how many in all")
    parser.add_argument("--per_machine", type=int, default=8, help="GPUs of one machine")
    parser.add_argument("--nvlink", type=float, default=450, help="GB/s of a GPU inside of a machine, one direction")
    parser.add_argument(
        "--links", type=float, nargs="+", default=[400, 100, 25], help="Gbit/s between machines, of each GPU"
    )
    parser.add_argument("--latency", type=float, default=10, help="microseconds of a message")
    parser.add_argument("--batch_size", type=int, default=1024, help="of the recipe, all GPUs together")
    parser.add_argument("--share", type=int, default=128, help="images a GPU where the batch grows with the GPUs")
    return parser.parse_args()


def all_reduce_seconds(args, size, gpus, link):
    """Of `size` bytes: summed inside of each machine, each GPU's part over the machines, then spread again."""
    inside = min(gpus, args.per_machine)
    machines = gpus // inside
    seconds = 2 * (inside - 1) * (size / inside / (args.nvlink * 1e9) + args.latency * 1e-6)
    if machines > 1:
        seconds += 2 * (machines - 1) / machines * (size / inside) / (link / 8 * 1e9)
        seconds += 2 * math.ceil(math.log2(machines)) * args.latency * 1e-6  # along a tree
    return seconds


def step_seconds(args, gpus, share, link):
    """(all-reduce, what of it the backward pass does not hide, the whole step)"""
    size = args.parameters * 1e6 * args.gradient_bytes
    buckets = math.ceil(size / (args.bucket * MEBI))
    bucket = all_reduce_seconds(args, size / buckets, gpus, link)
    compute = share / args.images_per_second
    # The first bucket is ready after its part of the backward pass, the last one with its end.
    backward = compute * 2 / 3
    exposed = max(bucket, buckets * bucket - backward * (1 - 1 / buckets))
    return buckets * bucket, exposed, compute + exposed


def row(args, gpus, share, link):
    reduce, exposed, step = step_seconds(args, gpus, share, link)
    hours = math.ceil(EPOCHS * IMAGES / (share * gpus)) * step / 3600
    cost = 100 * exposed / (step - exposed)
    place = f"{link:g} Gbit/s" if link else "none"
    time = f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.0f} min"
    return (
        f"| {gpus} | {share:g} | {share * gpus:g} | {place} | {1e3 * reduce:.2f} ms | {1e3 * exposed:.2f} ms "
        f"| {cost:.1f} % | {time} |"
    )


def smallest_share(args, gpus, link):
    """Images a GPU from which on communication costs 5 % at most."""
    share = 1
    while True:
        _, exposed, step = step_seconds(args, gpus, share, link)
        if exposed <= 0.05 * (step - exposed):
            return share
        share += 1


if __name__ == "__main__":
    main()
