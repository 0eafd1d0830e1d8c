#!/usr/bin/env bash
# MiM on the CT volumes of BTCV and TCIA-Covid19: hybrid encoder, three levels of 96^3 in crops of 192^3, 800 epochs.
#
#   NPROC=2 bash scripts/pretrain_mim.sh --out_dir runs/mim_1k
#   NPROC=2 bash scripts/pretrain_mim.sh --align published ...       the alignment as the authors' code computes it, for comparison
#   bash scripts/pretrain_mim.sh --help                              every setting, with the values of this recipe
#
# Arguments are passed on to the program and override the values below. NPROC: number of processes, one per GPU.
# Data: BTCV's 24 training volumes and all of TCIA-Covid19 that is found (771 are published; the papers use 722, and which ones is not in what we
# could read). 5 % of the volumes are held out for the measures of health, unless --holdout 0 is given.
# Hardware: GPUs of 24 GB; --down_parts 16 and --grad_checkpointing need less memory. Expected, not measured here.
# Time: 1.8 EFLOP for 746 volumes, about 25 h on one GPU at 20 TFLOP/s. Computed from 3.06 TFLOP per crop; the full run was not made here.
# Result: checkpoint-799.pth, for scripts/BTCV/run.sh --model mim.
#
# From the authors' scripts and code: crops of 192^3 at the scanned spacing, HU -1000..1000, no flips; up/mid/down mask ratios
# 0.5/0.6/0.5; 4 mid volumes per crop and 4 down volumes per mid volume; the sizes of encoder and decoder; level weights 1, alignment
# weights 0.1; AdamW (0.9, 0.95), weight decay 0.05, 40 of 800 epochs of warm-up and then half a cosine, no clipping, peak lr 2e-4.
# The effective batch is 128 crops (2 GPUs x 1 x 64 accumulated); each crop is 1 + 4 + 16 encoder inputs. The authors' rule, 1e-4 per
# 256, counts every crop four times, for sub-crops that their loader does not make. Per crop that is the 4e-4 below.
# Their accumulation drops the last update of each epoch (5 updates instead of 6); here all 6 are made.
# Our choice: cosine alignment with the place that a volume was cut from (theirs aligns the mid level with itself); the foreground crop
# (theirs is commented out, so crops are mostly air); the first embedding initialised for the mean and spread of the data; bf16
# instead of fp16; no weight decay on the mask token. We could not read the paper's text: where it differs from the code, this recipe
# follows the code.

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

read -ra data <<<"$(pretraining_data "$@")"

launch Pretrain.main_pretrain \
  --method mim \
  --model base --decoder_embed_dim 576 --decoder_depth 8 --decoder_num_heads 16 --standardize \
  ${data[@]+"${data[@]}"} --cache_dir cache \
  --intensity window --low -1000 --high 1000 --spacing none \
  --local_size 96 --group 2 --crop_mode fixed --flip_prob 0 \
  --mask_ratio_up 0.5 --mask_ratio_mid 0.6 --mask_ratio_down 0.5 --num_mid 4 --num_down 4 --down_parts 4 --norm_pix_loss \
  --weight_rec_up 1 --weight_rec_mid 1 --weight_rec_down 1 --level_mode concurrent \
  --align cosine --weight_align_up_mid 0.1 --weight_align_mid_down 0.1 \
  --epochs 800 --warmup_epochs 40 --batch_size 128 --micro_batch_size 1 --blr 4e-4 --weight_decay 0.05 --clip_grad none \
  --save_every 100 --seed 0 \
  --out_dir runs/mim \
  --recipe scripts/pretrain_mim.sh "$@"
