#!/bin/bash
# Two nodes of 8 GPUs under Slurm:  sbatch recipes/accelerate/slurm.sh recipes/llama-2-13b/prune.yaml
#SBATCH --job-name=gisp
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --output=%x-%j.log
set -euo pipefail
export MAIN_HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export RECIPE=${1:?name the YAML file of a recipe}
# SLURM_NODEID is known on each node only: the inner shell expands it.
srun --kill-on-bad-exit=1 bash -c 'accelerate launch \
    --config_file recipes/accelerate/fsdp2_multinode.yaml \
    --machine_rank "$SLURM_NODEID" --main_process_ip "$MAIN_HOST" \
    recipes/prune.py "$RECIPE" --save_strategy steps --save_steps 5'
