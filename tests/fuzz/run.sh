#!/usr/bin/env bash
# Fuzzes each TARGET for so many seconds, one after the other, and says at the end how often each ran:
#
#   tests/fuzz/run.sh SECONDS TARGET…      runs them
#   tests/fuzz/run.sh --seeds TARGET…      takes into seeds/ what corpus/ reaches beyond them
#
# A target starts from tests/fuzz/seeds/TARGET and from what earlier runs have left in tests/fuzz/corpus/TARGET. An
# input that fails lies in tests/fuzz/artifacts/TARGET. FUZZ_OPTIONS are further options of libFuzzer.
#
# The address sanitizer watches the Rust code alone: libFuzzer's bookkeeping after each input is slower if it is built
# with the sanitizer too, as it is by default. Coverage is counted in vublk's own crates alone, because libFuzzer looks at
# all counters after each input.
set -euo pipefail
cd "$(dirname "$0")/../.."
what=$1
shift
for target; do
    mkdir -p tests/fuzz/{seeds,corpus,artifacts}/"$target"
done

host=$(rustc -vV | sed -n 's/^host: //p')
coverage='"-Cpasses=sancov-module"'
for option in level=3 inline-8bit-counters pc-table; do
    coverage+=", \"-Cllvm-args=-sanitizer-coverage-$option\""
done

# Sanitizers and flags of single crates are unstable parts of the compiler: RUSTC_BOOTSTRAP lets a stable one have them.
# The linker drops the counters of functions that it drops; lld does, mold keeps all. The sanitizer follows frame
# pointers. The checks that the standard library makes in unsafe calls are left to the tests, which have them.
flags='-Zsanitizer=address -Zub-checks=no -Cforce-frame-pointers=yes'
flags+=' -Zunstable-options -Clinker-features=+lld -Clink-self-contained=+linker -Clink-arg=-fuse-ld=lld'
flags+=' -Clink-arg=-Wl,-z,start-stop-gc'
RUSTC_BOOTSTRAP=1 RUSTFLAGS="${RUSTFLAGS-} $flags" \
    CFLAGS="${CFLAGS-} -fno-sanitize=address" CXXFLAGS="${CXXFLAGS-} -fno-sanitize=address" \
    cargo build --release --manifest-path tests/fuzz/Cargo.toml --target "$host" -Zprofile-rustflags \
    --config "profile.release.package.vublk.rustflags=[$coverage]" \
    --config "profile.release.package.vublk-vfio.rustflags=[$coverage]" "${@/#/--bin=}"
metadata=$(cargo metadata --format-version 1 --no-deps --manifest-path tests/fuzz/Cargo.toml)
programs=$(sed 's/.*"target_directory":"\([^"]*\)".*/\1/' <<<"$metadata")/$host/release

# A small quarantine stays in the processor's caches. Looking for leaks takes longer than most inputs, and what a thread
# keeps for its next input looks like one at the end. The sanitizer neither records where memory was allocated nor fills
# new memory: together they take up to a third of a run. To learn where memory was allocated, run a target on its finding
# with ASAN_OPTIONS=malloc_context_size=30.
export ASAN_OPTIONS=quarantine_size_mb=8:malloc_context_size=0:max_malloc_fill_size=0:${ASAN_OPTIONS-}
ASAN_OPTIONS=detect_stack_use_after_return=0:detect_leaks=0:$ASAN_OPTIONS
options=(-timeout=20 -rss_limit_mb=2048 -max_len=512 -len_control=0 -detect_leaks=0 -entropic=0 -print_funcs=0)
# Nobody else adds to the corpus meanwhile.
options+=(-reload=0)
read -ra more <<<"${FUZZ_OPTIONS-}"
options+=("${more[@]}")

if [ "$what" = --seeds ]; then
    for target; do
        "$programs/$target" "${options[@]}" -set_cover_merge=1 -use_counters=0 \
            "tests/fuzz/seeds/$target" "tests/fuzz/corpus/$target"
    done
    exit
fi

log=$(mktemp)
trap 'rm -f "$log"' EXIT
TIMEFORMAT='time::processor_seconds: %U %S'
rates=()
failed=0
for target; do
    verdict=
    { time "$programs/$target" "${options[@]}" -max_total_time="$what" -print_final_stats=1 \
        -artifact_prefix="tests/fuzz/artifacts/$target/" \
        "tests/fuzz/corpus/$target" "tests/fuzz/seeds/$target"; } 2>&1 | tee "$log" ||
        verdict=", FAILED: see tests/fuzz/artifacts/$target" failed=1
    rates+=("$(awk -v target="$target" -v verdict="$verdict" '
        /^stat::number_of_executed_units:/ { runs = $2 }
        /^stat::average_exec_per_sec:/ { rate = $2 }
        /^time::processor_seconds:/ && $2 + $3 > 0 { each = runs / ($2 + $3) }
        END {
            printf "%-20s %9d runs, %6d a second, %6d a second of processor time%s", \
                target, runs, rate, each, verdict
        }' "$log")")
done
printf '%s\n' '' "${rates[@]}"
exit "$failed"
