#!/bin/bash
# SLURM: one launcher per machine, a run that is stopped five minutes before its time limit, saves, and is queued again
# until it is done. Give partition, account, cores and time as your cluster has them; what follows the script is a command
# of hf-vlm, whose output_dir all machines must see.
# sbatch --nodes 2 --partition gpu recipes/launch/slurm.sh pretrain recipes/mae/vit_small.yaml --data IMAGES --output_dir runs/pretrain
# ACCELERATE_CONFIG=recipes/accelerate/hsdp.yaml sbatch --nodes 4 recipes/launch/slurm.sh pretrain ...   # sharded
#SBATCH --job-name=hf_vlm
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
set -u

# What the launcher grants its processes to save after SIGTERM; by default 30 seconds.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240

stopped=
stop() {
    stopped=1
    scancel --signal=TERM "$SLURM_JOB_ID" # the processes of srun, not this script
}
trap stop USR1

srun bash -c 'exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"' accelerate \
    --config_file "${ACCELERATE_CONFIG:-recipes/accelerate/multi_node.yaml}" \
    --num_machines "$SLURM_NNODES" \
    --num_processes $((SLURM_NNODES * SLURM_GPUS_ON_NODE)) \
    --parallelism_config_dp_replicate_size "$SLURM_NNODES" \
    --parallelism_config_dp_shard_size "$SLURM_GPUS_ON_NODE" \
    --main_process_ip "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)" \
    --main_process_port $((20000 + SLURM_JOB_ID % 10000)) \
    -m hf_vlm.cli "$@" --resume_from_checkpoint auto &
step=$!

status=0
wait "$step" || status=$?
if [[ $stopped ]]; then # the signal has ended that wait
    status=0
    wait "$step" || status=$?
    [[ $status == 0 ]] || scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
