"""Train the embedded model again.

Renders the scenes, then runs four stages (vision, language, align, joint) and measures the result on held-out
scenes. Everything is seeded, and an interrupted run continues from its last checkpoint when the same command is
given again.

    python -m scripts.train_testbed --out runs/testbed --cache cache/testbed

The stages vision and language do not depend on each other: on two cores, run the command twice side by side, once
with ``--stage vision`` and once with ``--stage language``, and then with ``--stage joint``. One thread a process is
fastest at this size.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib

STAGES = ("data", "vision", "language", "joint", "measure")


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=pathlib.Path, required=True, help="folder for checkpoints, log.jsonl and the finished model/")
    add("--cache", type=pathlib.Path, required=True, help="folder for rendered scenes (about 2 GB)")
    add("--stage", choices=("all", *STAGES), default="all", help="run one part only (default: all parts in order)")
    add("--seed", type=int, default=1, help="seed of scenes, initial weights and order (default: %(default)s)")
    add("--scenes", type=int, default=40000, help="distinct training scenes (default: %(default)s)")
    add("--collages", type=int, default=14000, help="prior-free pictures for the vision stage (default: %(default)s)")
    add("--vision-steps", type=int, default=2000, help="steps of the vision stage (default: %(default)s)")
    add("--language-steps", type=int, default=1000, help="steps of the language stage (default: %(default)s)")
    add("--align-steps", type=int, default=2500, help="steps of the projector alignment (default: %(default)s)")
    add(
        "--joint-steps",
        type=int,
        default=3250,
        help="steps of joint training; may differ on resuming (default: %(default)s)",
    )
    add("--batch-size", type=int, default=32, help="pictures a step (default: %(default)s)")
    add(
        "--keep-unseen",
        type=float,
        default=1.0,
        help="the hallucination dial: share of the annotated but undrawn objects that joint training keeps; "
        "more of them make the model trust its priors more (default: %(default)s)",
    )
    add("--threads", type=int, default=1, help="CPU threads (default: %(default)s; more are slower beside other work)")
    add("--workers", type=int, default=2, help="processes that render scenes (default: %(default)s)")
    add("--measure-scenes", type=int, default=1000, help="held-out scenes to measure on (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    """Run the stages that are asked for."""
    args = parse_arguments()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    from scripts.train_testbed.loop import run  # after OMP_NUM_THREADS: it imports torch

    stages = STAGES if args.stage == "all" else (args.stage,)
    figures = run(stages, **{k: v for k, v in vars(args).items() if k != "stage"})
    if figures:
        print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
