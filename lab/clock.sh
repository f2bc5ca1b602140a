# Processes that end by a clock. Sourced by flagship.sh and gpu_check.sh, which set
# out: where `summary` is kept    log: where NAME.txt is    limit: seconds in all    python
# shellcheck shell=bash disable=SC2034,SC2154
declare -A process=() began=()

say() { printf '[%3d s] %s\n' "$SECONDS" "$*" | tee -a "$out/summary"; }

share() { echo $((limit * $1 / 100)); }                 # so many percent of the time, in seconds

# start NAME END WORDS..: `python WORDS`, with what it says in NAME.txt. At END it gets SIGTERM, at
# which a training saves, and `grace` seconds later SIGKILL. calm: its niceness.
start() {
    local name=$1 left=$(($2 - SECONDS))
    shift 2
    began[$name]=$SECONDS
    timeout -k "${grace:-15}" "$((left > 0 ? left : 1))" nice -n "${calm:-0}" "$python" "$@" \
        >> "$log/$name.txt" 2>&1 &
    process[$name]=$!
}

# ended NAME: waits for it, and has its exit status.
ended() {
    local status=0
    wait "${process[$1]}" || status=$?
    unset "process[$1]"
    return $status
}

stop() { kill -TERM "${process[$1]}" 2> /dev/null || true; }

# At the exit, by a signal too: none is left behind. `pieces` is the last, since it packs
# what the others save.
stop_all() {
    trap - EXIT
    for name in "${!process[@]}"; do [ "$name" = pieces ] || stop "$name"; done
    for name in "${!process[@]}"; do [ "$name" = pieces ] || ended "$name" || true; done
    [ -n "${process[pieces]-}" ] || return 0
    stop pieces
    ended pieces || say "packing failed: $(tail -n 1 "$log/pieces.txt")"
}
trap stop_all EXIT
trap 'say "stopped by a signal"; exit 143' INT TERM
