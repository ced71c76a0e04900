#!/usr/bin/env bash
# What: all of the meta-training behind the shipped weights, from scratch: six runs, each from the one before, and what
#   joins them. It ends with runs/shipped/hrnn.safetensors, a rule like hrnn-v11, and its rule for small models beside it.
# Prerequisites: a C++ compiler, about 6 GB of memory.
# Launch: bash recipes/meta_train/shipped.sh
# Resume: the same again: what has ended is left out, and a run that was stopped goes on from its last checkpoint.
# Override: what follows goes to every run, such as --trainer.logger.init_args.save_dir logs
# Limits: about five hours on one core of a 2026 server CPU. The shipped weights were made in more runs than these, as the
#   rule got its parts one by one; docs/log.md says what these come to.
set -euo pipefail
here=$(dirname "$0")
options=("$@")

fit() { # RUN ARGUMENTS: meta-train; runs/RUN is where the recipe keeps its checkpoints
    local run=runs/$1 resume=()
    shift
    [ -e "$run/ended" ] && return
    [ -e "$run/last.ckpt" ] && resume=(--ckpt_path "$run/last.ckpt")
    echo "$run:"
    lightning-hrnn meta-train fit "$@" ${options[@]+"${options[@]}"} ${resume[@]+"${resume[@]}"}
    touch "$run/ended"
}

average() { # OUT ARGUMENTS
    [ -e "$1" ] || lightning-hrnn average "$@"
}

# Directions and rates, by truncated backprop.
fit default --config "$here/default.yaml"
fit refine --config "$here/refine.yaml" --model.weights runs/default/weights.safetensors
average runs/shipped/base.safetensors runs/default/weights.safetensors runs/refine/step_{100,200,300}.safetensors \
    --bounds '{"drift_fall": 0.1, "drift_rise": 5, "drift_horizon": 3000}' --initial-rate 5e-4

# Rates that begin with the size of their tensor; of attention, which comes with them, nothing is kept.
fit attend --config "$here/attend.yaml" --model.weights runs/shipped/base.safetensors
average runs/shipped/attended.safetensors runs/attend/step_{100,200,300}.safetensors --bounds '{"readouts": ["direction"]}'

# Whole runs, by evolution: rates, timescales and directions; then rates alone, told how long a run is.
fit evolve --config "$here/evolve.yaml" --model.weights runs/shipped/attended.safetensors
fit explore --config "$here/evolve.yaml" --config "$here/explore.yaml" --model.weights runs/evolve/weights.safetensors
average runs/shipped/settled.safetensors runs/explore/weights.safetensors \
    --bounds '{"drift_settles": 300, "warm_up": 0.1, "scale_memory": 300, "scale_inputs": ["tensor_count", "model_count", "trend"], "peak_fall": 1, "vanished": 1e-4, "far_fall": 0.5, "step_bound": 0.25}' \
    --looked-at '{"nets": ["layer-norm-mlp", "digits-relu-mlp", "embeddings", "residual-mlp", "digits-row-gru", "wide-relu-mlp", "deep-relu-mlp", "digits-autoencoder", "digits-batch-norm-mlp", "two-block-transformer", "digits-deep-gelu-mlp", "digits-transformer"]}'

# The rule for small models, beside tuned baselines on the sets that it is made for, but for one that takes hours.
[ -e runs/rivals/report.json ] || lightning-hrnn evaluate --suite corpus --steps 300 --draws 12 --seed 1000 \
    --without quadratic-large --out runs/rivals
fit small --config "$here/evolve.yaml" --config "$here/small.yaml" --model.weights runs/shipped/settled.safetensors
average runs/shipped/hrnn.safetensors runs/shipped/settled.safetensors --small runs/small/weights.safetensors
