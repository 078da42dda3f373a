#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 --time=24:00:00 --signal=TERM@120 --requeue
# A SLURM job that saves and requeues itself before its time is up: sbatch config/slurm.sh
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # a new store per restart
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes=2 --nproc_per_node=8 --max-restarts=3 \
    --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="$head:29500" \
    train.py config/train_gpt2.py --init_from=auto --save_interval=500 --out_dir=out-gpt2
[ "$(cat out-gpt2/exit_code)" = 143 ] && scontrol requeue "$SLURM_JOB_ID"
