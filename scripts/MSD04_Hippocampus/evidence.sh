#!/usr/bin/env bash
# MSD04_Hippocampus: does pretraining help, by how much, and how sure is that? MAE, GL-MAE and MiM against the same networks
# from random weights, and against DynUNet.
#
#   DATA=/path/to/Task04_Hippocampus bash scripts/MSD04_Hippocampus/evidence.sh --quick                one pretraining seed, 8 labels
#   DATA=/path/to/Task04_Hippocampus bash scripts/MSD04_Hippocampus/evidence.sh --quick --ablations    then short ablations, frozen features
#   DATA=/path/to/Task04_Hippocampus bash scripts/MSD04_Hippocampus/evidence.sh --quick --length       then longer pretrainings
#   DATA=/path/to/Task04_Hippocampus bash scripts/MSD04_Hippocampus/evidence.sh                        the whole study
#
# Steps: (1) a list of the training cases of fold 0; the held-out cases are seen by no pretraining; (2) pretraining, a folder per method and
# seed; (3) fine-tuning, learning rates chosen on half of the held-out cases, results on the other half; (4) probes of frozen features;
# (5) ablations, one switch at a time, with --quick only if --ablations is given; (6) the length of pretraining, with --quick only if --length
# is given. The same command goes on where it was stopped.
#
# DATA: Task04_Hippocampus as published; by default data/MSD04_Hippocampus, where scripts.prepare puts it.
# OUT: folder of the study. CACHE: folder of the cache.
# LABELS: numbers of labelled cases, such as 8,all. JOBS: trainings at once; one per GPU, or 2 on two CPU cores.
#
# Hardware: two CPU cores, or a GPU. Time: --quick took 52 minutes on two cores (docs/evidence.md), more on slower ones; --ablations adds an
# hour or more, --length too (expected). The whole study is many times as much: days on two cores, and never run yet. Every training prints what remains.
# Our choice: all settings; the papers do not use this data set.

size=full ablations="" length=""
for argument in "$@"; do
  case "$argument" in
    --quick) size=quick ;;
    --ablations) ablations=yes ;;
    --length) length=yes ;;
    *) echo "error: found '$argument', expected --quick, --ablations, --length or nothing" >&2; exit 2 ;;
  esac
done
[ "$size" = quick ] || ablations=yes length=yes

source "$(dirname "${BASH_SOURCE[0]}")/../env.sh"

data="${DATA:-data/MSD04_Hippocampus}"
out="${OUT:-runs/evidence_$size}"
cache="${CACHE:-cache/MSD04_Hippocampus}"
jobs="${JOBS:-$("$PYTHON" -c 'import torch; print(torch.cuda.device_count() or 2)')}"
preset=(--preset MSD04_Hippocampus --data "$data" --cache_dir "$cache" --fold 0)
threads="${OMP_NUM_THREADS:-$("$PYTHON" -c "import os; print(max(1, len(os.sched_getaffinity(0)) // $jobs))")}"
step() { printf '\n== %s\n   -> %s\n' "$1" "$2"; }

# Updates of pretraining and fine-tuning; those of ablations, and the ending of their names; pretraining seeds; fine-tuning seeds; numbers
# of labels; learning rates to choose from.
if [ "$size" = quick ]; then
  mae_updates=4800 glmae_updates=2400 mim_updates=1200 updates=400
  short=-short mae_ablation=1600 glmae_ablation=800 mim_ablation=600
  pretraining_seeds=(0) seeds=0,1,2 counts="${LABELS:-8}" rates=1e-3,4e-3
  mim_size=(--embed_dims 12 24 48 96 --depths 1 1 1 2 --num_heads 3)
  # the heads that read the features of pretraining alone, to stay within the hour
  vit_heads=primus mim_heads=mim_light
else
  mae_updates=20000 glmae_updates=10000 mim_updates=10000 updates=2000
  short="" mae_ablation=$mae_updates glmae_ablation=$glmae_updates mim_ablation=$mim_updates
  pretraining_seeds=(0 1 2) seeds=0,1,2 counts="${LABELS:-4,8,16,32,all}" rates=3e-4,1e-3,3e-3
  mim_size=(--embed_dims 24 48 96 192 --depths 1 1 2 4 --num_heads 6)
  vit_heads=primus,unetr,mae_decoder mim_heads=mim_light,mim
fi

# ---------------------------------------------------------------- settings

# The preprocessing of the preset. Views have the voxels of the scan, as in fine-tuning.
pretraining=(
  --datalist "$out/fold0.json" --cache_dir "$cache" --modality any --intensity percentiles --low 0.5 --high 99.5
  --foreground_threshold none --spacing 1 --crop_mode fixed --weight_decay 0.05 --workers 0 --save_every 1000 --health_every 5
)
# Batches of 32 and 16 at 4e-4, with half of the updates, reconstructed less. At 1.5e-3 GL-MAE's features varied in 2 directions (docs/evidence.md).
vit=(--model tiny --depth 6 --patch_size 8 --decoder_embed_dim 96 --decoder_depth 2 --decoder_num_heads 4)
mae_flags=(--method mae "${vit[@]}" --lr 6e-4 --local_views 1 --local_size 32 48 32 --mask_ratio_local 0.75)
# Consistency at a tenth of the paper's weight: on the phantoms of the controls that transferred better (docs/evidence.md).
glmae_flags=(
  --method glmae "${vit[@]}" --lr 6e-4 --global_views 2 --global_size 32 48 32 --local_views 4 --local_size 24 32 24
  --mask_ratio_global 0.6 --mask_ratio_local 0.6 --out_dim 1024 --hidden_dim 512 --bottleneck_dim 128 --teacher_temp_epochs 6
  --weight_global_global 0.1 --weight_global_local 0.1
)
# Levels need twice the inputs' size, so the volume of 64^3 is enlarged from half to all of the scan.
mim_flags=(
  --method mim --model tiny "${mim_size[@]}" --lr 2e-3 --decoder_embed_dim 96 --decoder_depth 2 --decoder_num_heads 4
  --local_size 32 --num_mid 4 --num_down 2 --crop_mode resize
)
printf -v finetuning '%s\n' 'batch_size: 4' 'micro_batch_size: 4' 'crops: 2' 'weight_decay: 0.01' 'workers: 0' 'feature_size: 8'

# pretrain NAME SEED UPDATES BATCH FLAG...: 20 epochs, whatever the number of updates. A finished run is left as it is.
pretrain() {
  local folder="$out/pretraining/$1-seed$2" seed="$2" updates="$3" batch="$4"
  shift 4
  [ ! -f "$folder/done" ] || return 0
  mkdir -p "$folder"
  printf '   %s: %s updates of %s volumes; log: %s/log.txt\n' "$(basename "$folder")" "$updates" "$batch" "$folder"
  OMP_NUM_THREADS="$threads" "$PYTHON" -m Pretrain.main_pretrain "${pretraining[@]}" "$@" --batch_size "$batch" --epochs 20 \
    --samples_per_epoch "$((updates / 20 * batch))" --warmup_epochs 2 --seed "$seed" --out_dir "$folder" >>"$folder/log.txt" 2>&1 ||
    { echo "error: pretraining failed; see $folder/log.txt" >&2; return 1; }
  touch "$folder/done"
}

# cell FLAG...: `pretrain FLAG...` in the background, at most $jobs at once, dealt over the GPUs.
running=0
IFS=, read -ra devices <<<"${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((jobs - 1)))}"
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
cell() {
  if [ "$running" -ge "$jobs" ]; then
    wait -n
    running=$((running - 1))
  fi
  CUDA_VISIBLE_DEVICES="${devices[cells % ${#devices[@]}]}" pretrain "$@" &
  running=$((running + 1)) cells=$((cells + 1))
}
cells=0
finish_cells() {
  while [ "$running" -gt 0 ]; do
    wait -n
    running=$((running - 1))
  done
}

# files NAME [SEED...]: the checkpoints of a method, separated by colons.
files() {
  local name="$1" seed list=()
  shift
  for seed in "$@"; do list+=("$out/pretraining/$name-seed$seed/checkpoint-last.pth"); done
  (IFS=:; echo "${list[*]}")
}

# sweep FOLDER SETTINGS FLAG...: fine-tune, with settings of main_finetune besides those of all networks.
sweep() {
  local folder="$out/$1" extra="$2"
  shift 2
  mkdir -p "$folder"
  printf '%s%s\n' "$finetuning" "$extra" >"$folder/settings.yaml"
  "$PYTHON" -m Finetune.sweep "${preset[@]}" --updates "$updates" --settings "$folder/settings.yaml" --seeds "$seeds" --jobs "$jobs" \
    --out "$folder" "$@"
}

# ---------------------------------------------------------------- the study

mkdir -p "$out"
step "1 The training cases of fold 0" "$out/fold0.json"
"$PYTHON" -m scripts.list_fold "${preset[@]}" --out "$out/fold0.json"
# filled before trainings that share it start at once
"$PYTHON" generate_cache_files.py --preset MSD04_Hippocampus --data_root "$data" --cache_dir "$cache"

step "2 Pretraining on them, without labels" "$out/pretraining"
for seed in "${pretraining_seeds[@]}"; do
  cell mim "$seed" "$mim_updates" 4 "${mim_flags[@]}"
  cell glmae "$seed" "$glmae_updates" 8 "${glmae_flags[@]}"
  cell mae "$seed" "$mae_updates" 16 "${mae_flags[@]}"
done
finish_cells

vit_inits="scratch,mae=$(files mae "${pretraining_seeds[@]}"),glmae=$(files glmae "${pretraining_seeds[@]}")"
step "3 Fine-tuning: ViT, MiM's encoder, and DynUNet as the reference" "$out/vit $out/mim $out/dynunet"
roi='roi: [32, 48, 32]'
sweep vit "$roi" --models "$vit_heads" --inits "$vit_inits" --label_counts "$counts" --tune "lr=$rates"
# MiM's own head needs a roi in multiples of 32
mim_roi='roi: [32, 64, 32]'
sweep mim "$mim_roi" --models "$mim_heads" --inits "scratch,mim=$(files mim "${pretraining_seeds[@]}")" --label_counts "$counts" --tune "lr=$rates"
sweep dynunet "$roi" --models dynunet --inits scratch --label_counts "$counts" --tune "lr=$rates"

step "4 Probes of frozen features, beside a random encoder" "$out/probe_vit $out/probe_mim"
probe=("${preset[@]}" --seeds "$seeds" --label_counts 8,all)
[ "$size" = full ] || probe=("${preset[@]}" --seeds 0 --label_counts all --probes linear,knn --learning_rates 1e-2,1e-1,3e-1,1)
"$PYTHON" -m Finetune.probe "${probe[@]}" --roi 32 48 32 --inits "${vit_inits#scratch,}" --out "$out/probe_vit"
"$PYTHON" -m Finetune.probe "${probe[@]}" --roi 32 64 32 --inits "mim=$(files mim "${pretraining_seeds[@]}")" --out "$out/probe_mim"

if [ -n "$ablations" ]; then
  step "5 Ablations: one switch at a time, the same number of updates, seed 0" "$out/probe_ablations_vit $out/probe_ablations_mim"
  # name and the flags that differ; the first of each method has none
  mae="mae$short" glmae="glmae$short" mim="mim$short"
  vit_ablations=(
    "$mae"
    "$mae-ratio60 --mask_ratio_local 0.6"
    "$mae-ratio90 --mask_ratio_local 0.9"
    "$mae-no-standardize --no-standardize"
    "$mae-eps1e-4 --norm_pix_eps 1e-4"
    "$mae-resize --crop_mode resize --local_scale 0.5 1.0"
    "$mae-lr4e-4 --lr 4e-4"
    "$glmae"
    "$glmae-no-rec-global --weight_rec_global 0"
    "$glmae-no-rec-local --weight_rec_local 0"
    "$glmae-no-global-global --weight_global_global 0"
    "$glmae-no-global-local --weight_global_local 0"
    "$glmae-consistency1 --weight_global_global 1 --weight_global_local 1"
  )
  mim_ablations=(
    "$mim"
    "$mim-no-up --weight_rec_up 0"
    "$mim-no-mid --weight_rec_mid 0"
    "$mim-no-down --weight_rec_down 0"
    "$mim-no-align --align none"
    "$mim-infonce --align infonce"
  )
  # in the short form also the pretrainings of step 2, which are longer
  inits="" mim_inits=""
  [ -z "$short" ] || { inits="mae=$(files mae 0),glmae=$(files glmae 0)," mim_inits="mim=$(files mim 0),"; }
  for line in "${vit_ablations[@]}"; do
    read -r name flags <<<"$line"
    read -ra flags <<<"$flags"
    case "$name" in
      mae*) cell "$name" 0 "$mae_ablation" 16 "${mae_flags[@]}" "${flags[@]}" ;;
      *) cell "$name" 0 "$glmae_ablation" 8 "${glmae_flags[@]}" "${flags[@]}" ;;
    esac
    inits="$inits$name=$(files "$name" 0),"
  done
  inits="$inits$glmae-teacher=$(files "$glmae" 0)@teacher"
  for line in "${mim_ablations[@]}"; do
    read -r name flags <<<"$line"
    read -ra flags <<<"$flags"
    cell "$name" 0 "$mim_ablation" 4 "${mim_flags[@]}" "${flags[@]}"
    mim_inits="$mim_inits$name=$(files "$name" 0),"
  done
  mim_inits="${mim_inits%,}"
  finish_cells
  "$PYTHON" -m Finetune.probe "${probe[@]}" --roi 32 48 32 --inits "$inits" --out "$out/probe_ablations_vit"
  "$PYTHON" -m Finetune.probe "${probe[@]}" --roi 32 64 32 --inits "$mim_inits" --out "$out/probe_ablations_mim"
fi

if [ "$size" = quick ] && [ -n "$length" ]; then
  step "6 The length of pretraining, seed 0: GL-MAE, and MiM without alignment" "$out/probe_length_* $out/length_*"
  # the longest ones first
  inits="" mim_inits=""
  for share in 4 2; do
    cell "glmae-x$share" 0 "$((glmae_updates * share))" 8 "${glmae_flags[@]}"
    inits=",glmae-x$share=$(files "glmae-x$share" 0)$inits"
  done
  inits="glmae-short=$(files glmae-short 0),glmae=$(files glmae 0)$inits"
  for share in 4 2; do
    cell "mim-no-align-x$share" 0 "$((mim_updates * share))" 4 "${mim_flags[@]}" --align none
    mim_inits=",mim-no-align-x$share=$(files "mim-no-align-x$share" 0)$mim_inits"
  done
  # those of the ablations
  cell glmae-short 0 "$glmae_ablation" 8 "${glmae_flags[@]}"
  cell mim-short-no-align 0 "$mim_ablation" 4 "${mim_flags[@]}" --align none
  mim_inits="mim-no-align-x1-of-2=$(files mim-short-no-align 0)$mim_inits"
  finish_cells
  "$PYTHON" -m Finetune.probe "${probe[@]}" --roi 32 48 32 --inits "$inits" --out "$out/probe_length_vit"
  "$PYTHON" -m Finetune.probe "${probe[@]}" --roi 32 64 32 --inits "$mim_inits" --out "$out/probe_length_mim"
  sweep length_vit "$roi" --models primus --inits "scratch,glmae-x4=$(files glmae-x4 0)" --label_counts 8 --tune "lr=$rates"
  sweep length_mim "$mim_roi" --models mim_light --inits "scratch,mim-no-align-x4=$(files mim-no-align-x4 0)" --label_counts 8 --tune "lr=$rates"
fi

if [ "$size" = full ]; then
  step "5 Ablations, fine-tuned" "$out/ablations_vit $out/ablations_mim"
  sweep ablations_vit "$roi" --models primus --inits "scratch,$inits" --label_counts 8 --tune "lr=$rates"
  sweep ablations_mim "$mim_roi" --models mim_light --inits "scratch,$mim_inits" --label_counts 8 --tune "lr=$rates"

  step "6 The length of pretraining, MAE, seed 0" "$out/length"
  inits="mae-x1=$(files mae 0)"
  for share in 16 4; do
    cell "mae-1-of-$share" 0 "$((mae_updates / share / 20 * 20))" 16 "${mae_flags[@]}"
    inits="mae-1-of-$share=$(files "mae-1-of-$share" 0),$inits"
  done
  cell mae-x4 0 "$((mae_updates * 4))" 16 "${mae_flags[@]}"
  finish_cells
  sweep length "$roi" --models primus --inits "scratch,$inits,mae-x4=$(files mae-x4 0)" --label_counts 8 --tune "lr=$rates"
fi

step "Results" "$out"
for folder in vit mim dynunet ablations_vit ablations_mim length length_vit length_mim; do
  [ ! -f "$out/$folder/sweep.txt" ] || cat "$out/$folder/sweep.txt"
done
cat "$out"/probe_*/probe.txt
