#!/usr/bin/env bash
# What a GPU says of this code, in four minutes: the tests for CUDA, the training step by form, the
# kernels that it spends its time in, the 379 M UNet at 256 and 1024 px.
#
#     bash lab/gpu_check.sh OUT [SECONDS]         240 by default; OUT is empty or new
#     SIZE=tiny bash lab/gpu_check.sh OUT 1800    a rehearsal with tiny networks, on a CPU too
#
# OUT/NAME.txt has what each part said, OUT/summary the most important of it. A clock cuts a part
# whose time is up, with what it has measured, and leaves out what would not fit. PYTHON=python3
set -euo pipefail

fail() { echo "error: $*" >&2; exit 2; }

if [ $# -lt 1 ] || [ $# -gt 2 ]; then sed -n '2,/^set/ s/^# \{0,1\}//p' "$0" >&2; exit 2; fi
limit=${2:-240}
[[ $limit =~ ^[1-9][0-9]{0,5}$ ]] || fail "SECONDS is a whole number, got $limit"
python=${PYTHON:-python3}
tests=(-m pytest -q -p no:cacheprovider -m gpu test_all.py)
case ${SIZE:-full} in
full)
    tests+=(-n 4)
    base="configs/base.toml" forms=(eager blocks)
    small=("configs/t2i_256.toml" "configs/t2i_256.toml model.checkpoint=true")
    large=("configs/t2i_1024.toml model.checkpoint=false" "configs/t2i_1024.toml")
    fill=(--fill)                                       # the largest batch
    profiled=(--config configs/base.toml)
    ;;
tiny)
    net="batch=2 model.widths=[16,32] model.groups=8 model.head_dim=16"
    base="configs/nano.toml $net" forms=(eager)
    small=("$base" "$base model.checkpoint=true") large=("$base data.size=128") fill=()
    read -ra profiled <<< "--config $base"
    ;;
*) fail "SIZE is full or tiny, got $SIZE" ;;
esac
mkdir -p "$1"
out=$(cd "$1" && pwd)
[ -z "$(ls -A "$out")" ] || fail "$out is not empty: give another OUT"
cd "$(dirname "$0")/.."
log=$out
scratch=$(mktemp -d)
steps=(-m lab.steps step --out "$scratch" --limit "$limit")
. lab/clock.sh

# part NAME PERCENT PATTERN WORDS..: `python WORDS` until so many percent of the time are over. What
# it says in lines with the PATTERN goes to the summary.
part() {
    local name=$1 end pattern=$3
    end=$(share "$2")
    shift 3
    if [ $((end - SECONDS)) -lt "$(share 4)" ]; then
        say "left out: $name"
        return
    fi
    start "$name" "$end" "$@"
    if ended "$name"; then say "$name: done"; else say "$name: cut by the clock, or failed"; fi
    grep -E "$pattern" "$out/$name.txt" | tail -n 20 | cut -c 1-500 | tee -a "$out/summary" || true
}

measured="^\[\{|^left out|do not fit"
part tests 24 "passed|failed|skipped|error" "${tests[@]}"
part step 48 "$measured" "${steps[@]}" --jobs "$base" --forms "${forms[@]}"
part profile 60 "kernels a step" -m lab.kernels "${profiled[@]}"
part big_eager 80 "$measured" "${steps[@]}" --jobs "${small[@]}" "${large[@]}" "${fill[@]}" \
    --forms eager
if [ "${SIZE:-full}" = full ]; then
    part big_compiled 95 "$measured" "${steps[@]}" --jobs "configs/t2i_256.toml batch=64" \
        "configs/t2i_1024.toml batch=8" --forms blocks
    part whole 98 "$measured" "${steps[@]}" --jobs "$base" --forms whole
    part depthwise 98 "all" -m lab.steps depthwise --jobs "$base" --out "$scratch"
fi
rm -rf "$scratch"
say "done: $out/summary"
