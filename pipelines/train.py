"""Train a class-conditional SiT with mediator attention.

    python pipelines/train.py --preset cifar-sit-cpu --data cifar10-train.zip --out outputs/cifar-sit --device cpu
    accelerate launch pipelines/train.py --preset sit-256 --data imagenet/train --out outputs/sit-s2
    accelerate launch --config_file pipelines/accelerate/fsdp2.yaml pipelines/train.py --preset sit-256 …

Several processes on CPUs: torchrun --standalone --nproc-per-node 2 pipelines/train.py … --device cpu

`diffattn train` is the same program; `--help` lists its options, `--dry-run` prints what a run costs. The same command
again goes on where a killed run stopped.
"""

from diffattn.cli import app

if __name__ == "__main__":
    import sys

    app(["train", *sys.argv[1:]], prog_name="train.py")
