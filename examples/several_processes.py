"""Training in several processes, with checkpoints, from a script of your own:

    torchrun --nproc-per-node 2 -m examples.several_processes out/several

Every process runs this file. They share each batch, and leave one run in the folder: another call
resumes it, with as many processes as there are then. Without ``torchrun`` it is one process.
"""

import os
import sys
from pathlib import Path

from mintnet_triton.recipes.commands import evaluate_run, train_preset
from mintnet_triton.recipes.processes import leave


def main(out: Path, steps: int = 200) -> int:
    """Train on digits, and judge the run in one of the processes; the steps that were made."""
    result = train_preset(
        "density",
        "digits",
        "digits",
        out,
        changes={"steps": steps, "pairs": 2, "hidden": 8, "batch_size": 32},
        resume=out.exists(),
        checkpoint_every=max(1, steps // 4),
        sharded=False,  # a copy of the weights for each process; True: a part of them
    )
    if os.environ.get("RANK", "0") == "0":
        bits = evaluate_run(out, draws=1, inversions=8)["test"]["bits_per_dim"]
        print(f"{result.steps} steps; {bits:.3f} bits per dimension of test images")
    return result.steps


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
    leave(0)
