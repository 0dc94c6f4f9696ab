#!/bin/bash
# A sweep without submitit: a Slurm job array, one element per setting, all in one folder, sharing their answers.
#
#   sbatch --array=0-5 scripts/slurm_sweep.sh
#   stethoscope compare runs/study            # one table over all, when the jobs have ended
#
# An element that ran out of time goes on where it stopped when it is submitted again.
#SBATCH --job-name=stethoscope
#SBATCH --time=12:00:00
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=48G
set -euo pipefail

detectors=(logistic boosting)
features=(fast default full)
detector=${detectors[$((SLURM_ARRAY_TASK_ID / ${#features[@]}))]}
feature=${features[$((SLURM_ARRAY_TASK_ID % ${#features[@]}))]}

export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
stethoscope benchmark model="${MODEL:-testbed}" detector="$detector" features="$feature" \
    runs=runs/study answers=runs/study name="$detector-$feature" logger.wandb.group=study
