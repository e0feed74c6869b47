#!/bin/bash
#SBATCH --job-name=amft-fast
#SBATCH --output=amft-fast-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@300
# A run on SLURM, one process per task (a GPU each), and vLLM servers on the last VLLM_NODES nodes, one per GPU:
#
#   sbatch --nodes 8 --ntasks-per-node 8 --gpus-per-node 8 deploy/slurm.sh CONFIG [--section.setting value ...]
#   VLLM_NODES=2 VLLM_MODEL=MODEL sbatch --nodes 10 ... deploy/slurm.sh CONFIG
#
# A process that dies ends the job, which is queued again and goes on from the newest checkpoint, at most MAX_RESTARTS times. 300 s
# before the time limit all processes save and stop, and the job is queued again. run.dir must lie where all nodes see it.
set -u
python=${PYTHON:-python}
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
servers=("${nodes[@]:$((${#nodes[@]} - ${VLLM_NODES:-0}))}")
trainers=("${nodes[@]:0:$((${#nodes[@]} - ${VLLM_NODES:-0}))}")
export MASTER_ADDR=${trainers[0]} MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
list() { local IFS=,; echo "$*"; }
step=(srun --overlap --kill-on-bad-exit=1 --ntasks-per-node="$SLURM_NTASKS_PER_NODE")

rollouts=()
if ((${#servers[@]})); then
  export VLLM_API_KEY VLLM_SERVER_DEV_MODE=1
  VLLM_API_KEY=$(head -c 32 /dev/urandom | base64 | tr -dc a-zA-Z0-9)
  "${step[@]}" --nodelist="$(list "${servers[@]}")" --nodes=${#servers[@]} \
    --ntasks=$((${#servers[@]} * SLURM_NTASKS_PER_NODE)) bash -c 'CUDA_VISIBLE_DEVICES=$SLURM_LOCALID exec "$@" --port $((8000 + SLURM_LOCALID))' - \
    "${VLLM_PYTHON:-$python}" -m amft_fast.rollout.vllm.server 0 --model "$VLLM_MODEL" --host 0.0.0.0 \
    --middleware amft_fast.rollout.vllm.server.KeyGuard --load-format dummy --logprobs-mode processed_logprobs \
    --generation-config vllm --weight-transfer-config '{"backend": "nccl"}' --hf-overrides '{"tie_word_embeddings": false}' \
    --worker-extension-cls amft_fast.rollout.vllm.worker.Extension --enable-scale-out &
  urls=$(for host in "${servers[@]}"; do for ((i = 0; i < SLURM_NTASKS_PER_NODE; i++)); do echo "\"http://$host:$((8000 + i))\""; done; done)
  for url in $urls; do
    for ((try = 0; try < 120; try++)); do
      curl -sf -H "Authorization: Bearer $VLLM_API_KEY" "${url//\"/}/health" && break
      sleep 5
    done
  done
  rollouts=(--rollout.engine vllm --rollout.vllm.mode server --rollout.vllm.urls "[$(list $urls)]"
    --rollout.vllm.host "$MASTER_ADDR" --rollout.vllm.api_key_env VLLM_API_KEY)
fi

"${step[@]}" --nodelist="$(list "${trainers[@]}")" --nodes=${#trainers[@]} \
  --ntasks=$((${#trainers[@]} * SLURM_NTASKS_PER_NODE)) bash -c \
  'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS exec "$@"' - \
  "$python" -m amft_fast train "$@" --engine.kind deepspeed --resume auto "${rollouts[@]}"
code=$?
if ((code != 0 && code != 2 && ${SLURM_RESTART_COUNT:-0} < ${MAX_RESTARTS:-20})); then
  echo "exit code $code: queued again"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
