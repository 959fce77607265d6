"""How much faster one denoising step gets: the benchmark behind the figures in the README.

    python pipelines/benchmark.py --models sd15 --sizes 1024 --rounds 9 --out outputs/bench

A UNet or transformer of a published size (Stable Diffusion 1.5 and XL, SD3.5-M, PixArt-Sigma, FLUX.1, Z-Image, Wan,
CogVideoX), with random weights, runs one step. Its variants take turns: exact attention (sdpa), the presets of agent
attention, other methods, token merging (tome), and no attention at all (floor), which nothing can beat. The same as
`diffattn bench attention`; `--help` explains every option.

What happens, in order (`diffattn/benchmarks/attention.py`):

1. `BenchmarkConfig` checks what was asked for.
2. For each model a denoiser is built; for each size every variant is applied, timed, and removed, round after round.
3. attention.json is rewritten after every round, so `--resume` continues an interrupted run.
4. The table is printed, and drawn as attention.png.
"""

import typer

from diffattn.cli.bench import attention

if __name__ == "__main__":
    typer.run(attention)
