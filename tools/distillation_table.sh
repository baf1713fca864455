#!/usr/bin/env bash
# What distillation is worth: the student of translation/multi30k_tiny trained alone and by every way to learn from a teacher, for
# equally many steps, and scored on both test sets (beam 5, last bundle). Prints one line a row; what is finished is not done again.
#   DSTRAIN_DATA=... bash tools/distillation_table.sh DATA TEACHER WORK STEPS [ROW ...]     rows: see LESSON; default: all
set -euo pipefail
[ $# -ge 4 ] || { sed -n '2,4s/^# //p' "$0"; exit 2; }
DATA=$1 TEACHER=$2 WORK=$3 STEPS=$4
shift 4

# The schedule has its peak at half the steps; word, batch and global read all probabilities (float16), which teach what a teacher
# at work teaches.
declare -A LESSON=([none]="" [word]=dense [batch]=dense [global]=dense [sequence]="" [sampled]=sampled [top12]=top12)
declare -A DUMP=([dense]="--method dense" [sampled]="--method sample --draws 50" [top12]="--method topk --k 12")
common=(--set training.max_steps="$STEPS" --set schedule.warmup_steps=$((STEPS / 2)) --set validation.generation=null)

lesson() { # makes dumped logits once
  [ -f "$WORK/$1/logits.json" ] && return
  dstrain dump-logits --teacher "$TEACHER" --data "$DATA" --output "$WORK/$1" ${DUMP[$1]}
}

student() { # trains one row
  local data=$DATA recipe=translation/multi30k_tiny words=()
  case $1 in
  none) ;;
  sequence)
    data=$WORK/pseudo
    [ -f "$data/manifest.json" ] || dstrain pseudo-label --teacher "$TEACHER" --data "$DATA" --output "$data" --beam-size 5
    ;;
  *)
    lesson "${LESSON[$1]}"
    recipe=translation/multi30k_tiny_kd words=(--logits "$WORK/${LESSON[$1]}")
    ;;&
  batch | global) words+=(--set "objective.selection={kind: $1, rate: 0.5}") ;;
  esac
  dstrain train $recipe --data "$data" --output "$WORK/runs/$1" "${words[@]}" "${common[@]}"
}

score() { # bundle -> its BLEU on both test sets
  for split in test_2016_flickr test_2017_flickr; do
    dstrain generate "$1" --input "$DSTRAIN_DATA/multi30k/$split.en" --output "$WORK/hypothesis.$$" --overwrite --beam-size 5 >&2
    dstrain evaluate --hypothesis "$WORK/hypothesis.$$" --reference "$DSTRAIN_DATA/multi30k/$split.de" | awk '/^BLEU/ {printf " | %s", $2}'
  done
  rm "$WORK/hypothesis.$$"
}

mkdir -p "$WORK/runs"
[ -f "$WORK/teacher.score" ] || score "$TEACHER" >"$WORK/teacher.score"
printf '| teacher%s |\n' "$(cat "$WORK/teacher.score")"
[ $# -gt 0 ] || set -- none word batch global sequence sampled top12
for row in "$@"; do
  student "$row" >&2
  printf '| %s%s |\n' "$row" "$(score "$WORK/runs/$row/bundles/last")"
done
