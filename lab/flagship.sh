#!/usr/bin/env bash
# The whole recipe on one GPU within a given time: scenes, base at 256 px on free English, students
# of 4 steps side by side, their scores. docs/SPEEDRUN.md has the rules of the board.
#
#     bash lab/flagship.sh OUT [SECONDS]          600 by default; OUT is empty or new
#     SIZE=tiny bash lab/flagship.sh OUT 1800     a rehearsal with tiny networks, on a CPU too
#     cat OUT/base.tar.* | tar x                  joins pieces; python sample.py "a fox" --ckpt base
#
# OUT/summary tells in a line each what was done when, and what the clock left out. Beside it are
# pieces of at most 16 MiB, each as soon as it exists (lab/pieces.py): base, the students, the logs.
#
# Further settings, with their defaults:
#     WORK=runs/flagship       where the runs are made: a new folder, a cut run does not resume
#     TEXT=assets/text         the taught text encoder; TEXT=train teaches one beside the scenes
#     STUDENTS="dmd gan kd"    DMD + KD, KD + GAN, KD alone
#     SCORED="base $STUDENTS"  which are scored
#     WORDINGS="own wide"      by which prompts: the grammar's own words, free English
#     KEEP=all                 KEEP=best: of the students the weights of the best one only
#     PYTHON=python3
set -euo pipefail

fail() { echo "error: $*" >&2; exit 2; }

# ------------------------------------------------------------------------- settings
if [ $# -lt 1 ] || [ $# -gt 2 ]; then sed -n '2,/^set/ s/^# \{0,1\}//p' "$0" >&2; exit 2; fi
limit=${2:-600}
[[ $limit =~ ^[1-9][0-9]{0,5}$ ]] || fail "SECONDS is a whole number, got $limit"
declare -A method=(
    [dmd]="method=dmd"
    [gan]="method=gan kd_weight=1.0"
    [kd]="method=kd kd_weight=1.0 generator_every=1"
)
read -ra students <<< "${STUDENTS-dmd gan kd}"
for name in "${students[@]}"; do
    [ -n "${method[$name]-}" ] || fail "STUDENTS are dmd, gan and kd, got $name"
done
read -ra scored <<< "${SCORED-base ${students[*]}}"
read -ra wordings <<< "${WORDINGS-own wide}"
text=${TEXT:-assets/text}
python=${PYTHON:-python3}
cores=$(nproc)

# Ten scenes for each core and second: to draw them takes about a tenth of the time.
pictures=$((limit * cores * 10))
pictures=$((pictures < 200000 ? pictures : 200000))
# The longest caption of 14,336 scenes is as long as that of 100,000 (42 tokens). With another
# length base would not find what the probe has compiled.
few=14336
batch=512 student_batch=128 alone=60 every=10 rows=3 evaluations=3 most=100000
base=(--config configs/base.toml)
student=(--config configs/adv_base.toml)
teach=()
score=(--prompts 60 --each 4 --batch 128)
case ${SIZE:-full} in
full) ;;
tiny)
    pictures=64 few=32 batch=8 student_batch=8 alone=2 every=1 rows=2 evaluations=1 most=6 grace=120
    tiny=(data.size=64 val_pictures=8 samples=2 log_every=1)
    base+=("${tiny[@]}" sample_steps=1 compile=false model.widths='[16,32]' model.groups=8
        model.depth_down='[0,1]' model.depth_mid=1 model.depth_up='[1,0]' model.head_dim=16
        model.self_attn='[false,true]' model.time_dim=32 model.time_freqs=32)
    student+=("${tiny[@]}" critic_width=16)
    teach=(steps=2 eval_every=2 batch=8 held_out=8)
    score=(--prompts 1 --each 1)
    ;;
*) fail "SIZE is full or tiny, got $SIZE" ;;
esac

mkdir -p "$1"
out=$(cd "$1" && pwd)
[ -z "$(ls -A "$out")" ] || fail "$out is not empty: give another OUT"
cd "$(dirname "$0")/.."
work=${WORK:-runs/flagship}
[ ! -e "$work" ] || fail "$work is there already: remove it, or set WORK"
mkdir -p "$work"
work=$(cd "$work" && pwd)
data=(data.cache="$work/cache" data.workers="$cores" data.pictures="$pictures")
base+=("${data[@]}" batch="$batch")
student+=("${data[@]}" batch="$student_batch")
export PYTHONUNBUFFERED=1 TQDM_DISABLE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((cores + 3) / 4))}
export TORCHINDUCTOR_CACHE_DIR=$work/compiled           # empty at first; warm after the probe

# ------------------------------------------------------------------------- paces
log=$work
. lab/clock.sh
declare -A first=()

# last NAME KEY: the last value of a column in the run's log.csv; 0 without any.
last() {
    [ -f "$work/$1/log.csv" ] || { echo 0; return; }
    awk -F, -v key="$2" 'NR == 1 { for (i = 1; i <= NF; i++) if ($i == key) k = i }
                         NR > 1 && k && $k != "" { v = $k } END { print v + 0 }' "$work/$1/log.csv"
}

# probe NAME END WORDS..: starts a training without an end on few pictures, for its pace.
probe() {
    start "$@" data.pictures="$few" val_pictures=8 steps=1000000 eval_every=1000000 \
        log_every="$every" out="$work/$1"
}

# probed NAME..: waits until each probe has enough rows in its log or has ended, and stops them
# together. first[NAME]: the seconds until its first row.
probed() {
    local waiting=1 name n
    while [ "$waiting" = 1 ]; do
        waiting=0
        for name in "$@"; do
            n=$(($(last "$name" step) / every))
            [ "$n" -eq 0 ] || : "${first[$name]:=$((SECONDS - began[$name]))}"
            if [ "$n" -lt "$rows" ] && kill -0 "${process[$name]}" 2> /dev/null; then
                waiting=1
            fi
        done
        sleep 0.2
    done
    for name in "$@"; do stop "$name"; done
    for name in "$@"; do ended "$name" || true; done
}

# fitting SECONDS NAME BATCH STEPS: the steps that fit by the pace of the probe NAME; STEPS where it
# is not known.
fitting() {
    awk -v s="$1" -v v="$(last "$2" img/s)" -v b="$3" -v n="$4" -v most="$most" \
        'BEGIN { if (v > 0) n = int(s * v / b); print(n < 4 ? 4 : n > most ? most : n) }'
}

average() { awk -v n="$1" 'BEGIN { print(n > 2 ? 1 - 1 / n : 0.5) }'; }     # ema= over n updates

# ------------------------------------------------------------------------- scenes, text, pace
runs=()
for name in base "${students[@]}"; do runs+=("$work/$name"); done
[ "$text" != train ] || runs+=("$work/text")
[ "${KEEP:-all}" = all ] || runs+=(--best)
start pieces $((limit + 60)) -m lab.pieces "$out" "${runs[@]}"

# A training of one step leaves all scenes and the held-out ones in the cache.
calm=10 start scenes "$(share 60)" train.py "${base[@]}" steps=1 batch="$student_batch" \
    compile=false log_every=1 samples=1 sample_steps=1 out="$work/scenes"
[ "$text" != train ] || start text "$(share 50)" train_text.py "${teach[@]}" out="$work/text"
probe probe "$(share 45)" train.py "${base[@]}"         # compiles meanwhile
probed probe
say "$(head -n 1 "$work/pieces.txt")"                   # the machine
say "pace of base: $(last probe img/s) pictures/s, first steps after ${first[probe]-too many} s"
ended scenes || { say "left out: all, for the scenes are not ready ($work/scenes.txt)"; exit 1; }
say "$pictures scenes are drawn, worded and encoded"
if [ "$text" = train ]; then
    text=$work/text/final
    ended text || { text=assets/text; say "left out: teaching words ($work/text.txt)"; }
    say "words: $text"
fi

# ------------------------------------------------------------------------- base, the students' pace
wait=${first[probe]-45}
wait=$((wait < 45 ? wait : 45))                         # its start is a warm one
left=$(($(share 60) - SECONDS - wait))
n=$(fitting $((left * 6 / 7)) probe "$batch" 2000)      # the rest: evaluations, and chance
start base "$(share 60)" train.py "${base[@]}" text.init="$text" steps="$n" \
    warmup=$(((n * 15 + 99) / 100)) ema="$(average $((n / 10)))" \
    eval_every=$(((n + evaluations - 1) / evaluations)) out="$work/base"
# While base starts: the students beside each other, from the probe's weights.
for name in "${students[@]}"; do
    read -ra words <<< "${method[$name]}"
    probe "probe_$name" "$(share 58)" adv_distill.py "${student[@]}" "${words[@]}" \
        init="$work/probe" critic_start=0
done
probed "${students[@]/#/probe_}"
ended base || true
say "base: step $(last base step) of $n, held-out loss $(last base val)"
[ -e "$work/base/latest" ] || { say "left out: all else, base has no weights"; exit 1; }

# ------------------------------------------------------------------------- students, scores
# judge NAME: scores it in all wordings, side by side.
judge() {
    local wording
    [[ " ${scored[*]} " = *" $1 "* ]] || return 0
    for wording in "${wordings[@]}"; do
        start "score_$1_$wording" "$end" evaluate.py --ckpt "$work/$1" "${score[@]}" \
            --wording "$wording" --out "$work/$1/$wording"
    done
}

judged() {
    local wording file=$work/score_$1
    for wording in "${wordings[@]}"; do
        if [ -z "${process[score_$1_$wording]-}" ]; then
            say "left out: the score of $1, $wording words (not in SCORED)"
        elif ended "score_$1_$wording"; then
            say "$1, $wording words: $(awk '$1 == "mean" { print $2, "(" $3, $4, $5 ")" }' \
                "${file}_$wording.txt")"
        else
            say "left out: the score of $1, $wording words (${file}_$wording.txt)"
        fi
    done
}

end=$((limit - ($(share 4) < 4 ? 4 : $(share 4))))      # the rest is for the last pieces
judge base
declare -A asked=()
for name in "${students[@]}"; do
    wait=${first[probe_$name]-20}
    left=$(($(share 85) - SECONDS - wait))
    n=$(fitting $((left * 2 / 3)) "probe_$name" "$student_batch" 120)   # base is scored meanwhile
    [ "$name" != gan ] || n=$((n > 2 * alone ? n - alone : (n + 1) / 2))
    asked[$name]=$n
    turns=$((n / 2))
    [ "$name" != kd ] || turns=$n                       # of the generator
    read -ra words <<< "${method[$name]}"
    start "$name" "$(share 85)" adv_distill.py "${student[@]}" "${words[@]}" init="$work/base" \
        critic_start="$alone" steps="$n" warmup=$(((n + 5) / 6)) ema="$(average $((turns / 6)))" \
        eval_every=$(((n + 1) / (evaluations > 1 ? 2 : 1))) out="$work/$name"
done
for name in "${students[@]}"; do
    ended "$name" || true
    say "$name: step $(last "$name" step) of ${asked[$name]}"
    if [ -e "$work/$name/latest" ]; then judge "$name"; else say "left out: $name, no weights"; fi
done
for name in base "${students[@]}"; do [ ! -e "$work/$name/latest" ] || judged "$name"; done
say "done; joined by: cat $(printf %q "$out")/base.tar.* | tar x"
