"""Train a class-conditional SiT with mediator attention.

    python pipelines/train.py --preset cifar-sit-cpu --data cifar10-train.zip --out outputs/cifar-sit --device cpu
    accelerate launch pipelines/train.py --preset sit-256 --data imagenet/train --out outputs/sit-s2
    accelerate launch --config_file pipelines/accelerate/fsdp2.yaml pipelines/train.py --preset sit-256 …

Several processes on CPUs: torchrun --standalone --nproc-per-node 2 pipelines/train.py … --device cpu

`diffattn train` is the same program; `--help` lists its options, `--dry-run` prints what a run costs and how it is
spread. SIGTERM, SIGUSR1 and Ctrl+C save a checkpoint and stop; the same command resumes.

The machines of one run must share run.out (the main process alone writes checkpoints and cannot send them), and have
the same pictures and starting weights; where they do not agree, every process ends with an error. Latents may be cached
on local disks (data.cache); each machine then encodes what its own disk lacks.
"""

from diffattn.cli import app

if __name__ == "__main__":
    import sys

    app(["train", *sys.argv[1:]], prog_name="train.py")
