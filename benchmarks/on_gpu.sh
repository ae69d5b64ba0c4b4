#!/usr/bin/env bash
# The standing GPU plan: all that waits for a GPU, in one call of at most 8 minutes.
#
#   bash benchmarks/on_gpu.sh          tests, the base product against cuBLAS, quick benchmark (of
#                                      plain layers, quantised ones and many adapters in one batch),
#                                      groups against their layers apart, memcheck
#   bash benchmarks/on_gpu.sh tune     measures every strategy and tile for LoRAFusion's grid and
#                                      Llama-3.1-8B, in at most 9 minutes; leaves tuned_GPU.json,
#                                      which ships from fused_lora/tables/GPU.json
#   bash benchmarks/on_gpu.sh sanitize memcheck, racecheck and initcheck to their end, in at most 9
#
# On a bare checkout; installs nothing. Every step has its own time limit and the next one runs
# whatever became of it. Leaves at most 8 files, side by side, in $OUT (benchmarks/results):
# summary.txt, tests.log, the rows as JSON and CSV, benchmark.log and sanitizer.log. What is scheduled
# by hand comes last everywhere: a kernel that hangs takes the rest of its step with it.
#
#   PYTHON  the interpreter that has torch and triton (python3)
#   COMMIT  what to call a copy of a checkout that came without its history, or with an older one
#   RESUME  a file of rows of an earlier call, whose cases are not measured again
#
# Exit status: 0 if every step passed, 1 if one did not, 2 without a GPU.
set -u -o pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
BUDGET=475 # seconds of everything
if [[ ${1:-} == sanitize ]]; then BUDGET=540; fi
SECONDS=0

if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "on_gpu.sh: PyTorch ($PYTHON) sees no CUDA GPU on this machine; nothing was run" >&2
    exit 2
fi

mkdir -p "$OUT" || exit 1
OUT=$(cd "$OUT" && pwd)

if [[ ${1:-} == tune ]]; then
    XDG_CACHE_HOME=$(mktemp -d)
    export XDG_CACHE_HOME
    layers=(4096,4096 5120,5120 8192,8192 1024,4096 14336,4096 4096,14336)
    status=0
    # tune ROWS OPTION...: layers with so many rows. The table is saved after every problem: what
    # the limit cuts off is the end of the list.
    tune() {
        local rows=$1 shapes=()
        shift
        for NK in "${layers[@]}"; do shapes+=(--shapes "$rows,$NK"); done
        timeout $((540 - SECONDS)) "$PYTHON" -m fused_lora tune "${shapes[@]}" "$@" \
            --workers "$(nproc)" 2>&1 | tee -a "$OUT/tune.log"
        ((status |= PIPESTATUS[0]))
    }
    rm -f "$OUT/tune.log"
    tune 8192 --r 16 --dropout
    tune 2048 --r 16 --dropout
    tune 512 --r 16
    tune 8192 --r 64
    tune 2048 --r 64
    for table in "$XDG_CACHE_HOME"/fused_lora/tables/*.json; do
        [[ -e $table ]] && cp "$table" "$OUT/tuned_$(basename "$table")"
    done
    exit "$status"
fi

SUMMARY=$OUT/summary.txt
rm -f "$SUMMARY" "$OUT"/tests.log "$OUT"/benchmark.log "$OUT"/sanitizer.log
export PYTHONUNBUFFERED=1
failed=0

say() { echo "$@" | tee -a "$SUMMARY"; }

# step NAME LIMIT LOG COMMAND...: runs it for at most LIMIT seconds, its output to the end of LOG.
step() {
    local name=$1 limit=$2 log=$3 start=$SECONDS status=0
    shift 3
    if ((limit > BUDGET - SECONDS)); then limit=$((BUDGET - SECONDS)); fi
    if ((limit < 5)); then
        say "$name: not run, out of time"
        failed=1
        return
    fi
    echo "== $name: $*" >>"$log"
    timeout --kill-after=5 "$limit" "$@" >>"$log" 2>&1 || status=$?
    if ((status)); then failed=1; fi
    local verdict="failed with $status"
    if ((status == 0)); then verdict=passed; fi
    if ((status == 124 || status == 137)); then verdict="stopped at its limit of $limit s"; fi
    say "$name: $verdict, $((SECONDS - start)) s; the end of $(basename "$log"):"
    tail -n 16 "$log" | sed 's/^/    /' | tee -a "$SUMMARY"
}

# sanitizer TOOL LIMIT: each tensor its own allocation, so that one byte too far is seen. initcheck
# does not see what cuBLAS writes through the copy engine: that PyTorch's own kernels read it
# "uninitialized" is no finding.
sanitizer() {
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$1" "$2" "$OUT/sanitizer.log" compute-sanitizer \
        --tool "$1" --error-exitcode 9 --print-limit 20 "$PYTHON" -m benchmarks.sanitize
}

finish() {
    say "on_gpu.sh: $SECONDS s in all; $( ((failed)) && echo "not every step passed" || echo "every step passed")"
    exit "$failed"
}

say "on_gpu.sh, $(date -u +%Y-%m-%dT%H:%MZ), commit ${COMMIT:-$(git rev-parse --short=8 HEAD 2>/dev/null || echo unknown)}"
nvidia-smi 2>&1 | tee -a "$SUMMARY"
"$PYTHON" -c '
import platform, torch, triton
print("python", platform.python_version(), "torch", torch.__version__, "triton", triton.__version__)
print(torch.cuda.get_device_properties(0))' 2>&1 | tee -a "$SUMMARY"

if [[ ${1:-} == sanitize ]]; then
    for tool in memcheck racecheck initcheck; do sanitizer "$tool" 175; done
    finish
fi

# With a GPU every test that launches a kernel is marked gpu. Compiling takes most of the time, which
# processes share, each with its part of the tests. Interrupted at its limit, pytest still says what
# failed until then; so the kernels' own tests come first.
tests() { # tests SECONDS FILE...
    local limit=$1 logs shards=14 pids=() pid status=0
    shift
    logs=$(mktemp -d)
    for ((i = 0; i < shards; i++)); do
        SHARD=$i/$shards timeout --signal=INT --kill-after=8 "$limit" env --default-signal=INT \
            "$PYTHON" -m pytest "$@" -m "gpu and not slow" -q -rfE --tb=short \
            --continue-on-collection-errors -p no:cacheprovider >"$logs/$i" 2>&1 &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
    cat "$logs"/*
    echo "== what failed, and the end of each of $shards processes"
    grep -hE '^(FAILED|ERROR) ' "$logs"/* | sort -u
    tail -qn 1 "$logs"/*
    return "$status"
}
export PYTHON
export -f tests
by_hand=tests/test_specialized.py
mapfile -t files < <(printf '%s\n' tests/test_{lora_linear,kernels,cuda,quantize,fp8,multi,group}.py \
    tests/test_*.py | grep -vx "$by_hand" | awk '!seen[$0]++')
step tests 155 "$OUT/tests.log" bash -c 'tests 140 "$@"' tests "${files[@]}"
step by_hand 50 "$OUT/tests.log" bash -c 'tests 40 "$@"' tests "$by_hand"

step base_product 55 "$OUT/benchmark.log" "$PYTHON" -m benchmarks.base_product --out "$OUT" \
    --workers "$(nproc)"
resume=()
if [[ -n ${RESUME:-} ]]; then resume=(--resume "$RESUME"); fi
step benchmark 125 "$OUT/benchmark.log" "$PYTHON" -m benchmarks.run --selection quick \
    --out "$OUT" --seconds 105 "${resume[@]}"

step groups 45 "$OUT/benchmark.log" "$PYTHON" -m benchmarks.groups --out "$OUT" \
    --workers "$(nproc)"

sanitizer memcheck 40
finish
