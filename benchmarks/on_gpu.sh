#!/usr/bin/env bash
# The standing GPU plan: all that waits for a GPU, in one call of at most 8 minutes.
#
#   bash benchmarks/on_gpu.sh          tests, the base product against cuBLAS, quick benchmark (of
#                                      plain layers, quantised ones and many adapters in one batch),
#                                      whole mixtures of experts (in tests they want transformers),
#                                      mixtures of experts against PEFT's formula, groups against
#                                      their layers apart, memcheck of the kernels scheduled by hand
#                                      and of the newest others
#   bash benchmarks/on_gpu.sh tune     measures every strategy and tile for LoRAFusion's grid and
#                                      Llama-3.1-8B, in at most 9 minutes; leaves tuned_GPU.json,
#                                      which ships from fused_lora/tables/GPU.json
#   bash benchmarks/on_gpu.sh sanitize memcheck, racecheck and initcheck of all, in at most 9
#
# On a bare checkout; installs nothing, and needs torch, triton and pytest only. Every step has its
# own time limit and the next one runs whatever became of it. Leaves at most 8 files, side by side,
# in $OUT (benchmarks/results): summary.txt, tests.log, the rows as JSON and CSV, benchmark.log and
# sanitizer.log; or of tune summary.txt, tune.log and the table.
#
# A kernel that hangs takes the rest of its step with it. So those that a compiler schedules come
# before those scheduled by hand: in the tests, the base product and `sanitize`. (A test that leaves
# the choice to the library may launch any; memcheck of the default plan has no time for the rest.)
# Of the newest one a small one runs alone before the steps that run it in many processes at once.
#
#   PYTHON  the interpreter that has torch and triton (python3)
#   COMMIT  what to call a copy of a checkout that came without its history, or with an older one
#   RESUME  a file of rows of an earlier call, of the same commit, device and versions, whose cases
#           are not measured again
#
# Exit status: 0 if no step failed (one may have ended at a limit of its own), 1 if one did or was
# stopped, 2 without a GPU.
set -u -o pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
BUDGET=475 # seconds of everything
if [[ ${1:-} == tune || ${1:-} == sanitize ]]; then BUDGET=540; fi
SECONDS=0

if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "on_gpu.sh: PyTorch ($PYTHON) sees no CUDA GPU on this machine; nothing was run" >&2
    exit 2
fi

mkdir -p "$OUT" || exit 1
OUT=$(cd "$OUT" && pwd)

SUMMARY=$OUT/summary.txt
rm -f "$SUMMARY" "$OUT"/{tests,benchmark,sanitizer,tune}.log
export PYTHONUNBUFFERED=1
failed=0

say() { echo "$@" | tee -a "$SUMMARY"; }

# step NAME LIMIT LOG COMMAND...: runs it for at most LIMIT seconds, its output to the end of LOG.
# Returns its status. A status of 3 is a benchmark's that ended at a limit of its own.
step() {
    local name=$1 limit=$2 log=$3 start=$SECONDS status=0
    shift 3
    if ((limit > BUDGET - SECONDS)); then limit=$((BUDGET - SECONDS)); fi
    if ((limit < 5)); then
        say "$name: not run, out of time"
        failed=1
        return 1
    fi
    echo "== $name: $*" >>"$log"
    timeout --kill-after=5 "$limit" "$@" >>"$log" 2>&1 || status=$?
    local verdict="failed with $status"
    case $status in
        0) verdict=passed ;;
        3) verdict="out of time" ;;
        124 | 137) verdict="stopped at its limit of $limit s" ;;
    esac
    if ((status != 0 && status != 3)); then failed=1; fi
    say "$name: $verdict, $((SECONDS - start)) s; the end of $(basename "$log"):"
    tail -n 16 "$log" | sed 's/^/    /' | tee -a "$SUMMARY"
    return "$status"
}

# sanitizer TOOL LIMIT OPTION...: each tensor its own allocation, so that one byte too far is seen.
# initcheck does not see what cuBLAS writes through the copy engine: that PyTorch's own kernels read
# it "uninitialized" is no finding.
sanitizer() {
    local tool=$1 limit=$2
    shift 2
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$tool" "$limit" "$OUT/sanitizer.log" compute-sanitizer \
        --tool "$tool" --error-exitcode 9 --print-limit 20 "$PYTHON" -m benchmarks.sanitize "$@"
}

finish() {
    say "on_gpu.sh: $SECONDS s in all; $( ((failed)) && echo "not every step passed" || echo "no step failed")"
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

if [[ ${1:-} == tune ]]; then # its own limit is looked at between two problems
    step tune 530 "$OUT/tune.log" "$PYTHON" -m benchmarks.tune --out "$OUT" --seconds 490 \
        --workers "$(nproc)"
    finish
fi

# With a GPU every test that launches a kernel is marked gpu. Compiling takes most of the time, which
# processes share, each with its part of the tests. Interrupted at its limit, pytest still says what
# failed until then; so the kernels' own tests come first.
tests() { # tests SECONDS MARKS FILE...
    local limit=$1 marks=$2 logs shards=16 pids=() pid status=0
    shift 2
    logs=$(mktemp -d)
    for ((i = 0; i < shards; i++)); do
        SHARD=$i/$shards timeout --signal=INT --kill-after=8 "$limit" env --default-signal=INT \
            "$PYTHON" -m pytest "$@" -m "gpu and not slow and $marks" -q -rfE --tb=short \
            --continue-on-collection-errors -p no:cacheprovider >"$logs/$i" 2>&1 &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
    cat "$logs"/*
    echo "== what failed, and the end of each of $shards processes"
    grep -hE '^(FAILED|ERROR) ' "$logs"/* | sort -u
    tail -qn 1 "$logs"/*
    return $((status == 3 ? 1 : status)) # pytest's 3 is an error of its own, and not a limit
}
export PYTHON
export -f tests
mapfile -t files < <(printf '%s\n' tests/test_{lora_linear,kernels,cuda,quantize,fp8,multi,group,experts}.py \
    tests/test_*.py | grep -vx tests/test_specialized.py | awk '!seen[$0]++')
step tests 160 "$OUT/tests.log" bash -c 'tests 147 "not by_hand" "$@"' tests "${files[@]}"

step one_by_hand 20 "$OUT/tests.log" "$PYTHON" -m benchmarks.sanitize --parts one_by_hand
one_by_hand=$?
step by_hand 52 "$OUT/tests.log" bash -c 'tests 42 by_hand "$@"' tests \
    tests/test_{specialized,cuda}.py

step mixtures 25 "$OUT/tests.log" "$PYTHON" -m benchmarks.sanitize --parts experts --each 6 \
    --seconds 18
step base_product 35 "$OUT/benchmark.log" "$PYTHON" -m benchmarks.base_product --out "$OUT" \
    --workers "$(nproc)"
resume=()
if [[ -n ${RESUME:-} ]]; then resume=(--resume "$RESUME"); fi
step benchmark 75 "$OUT/benchmark.log" "$PYTHON" -m benchmarks.run --selection quick \
    --out "$OUT" --seconds 55 "${resume[@]}"

step experts 40 "$OUT/benchmark.log" "$PYTHON" -m benchmarks.experts --out "$OUT" \
    --workers "$(nproc)"

if ((one_by_hand == 124 || one_by_hand == 137)); then
    say "groups: not run, as the kernel of their dx hangs"
else
    step groups 33 "$OUT/benchmark.log" "$PYTHON" -m benchmarks.groups --out "$OUT" \
        --workers "$(nproc)"
fi

sanitizer memcheck 35 --parts experts by_hand groups copies --each 6 --seconds 18
finish
