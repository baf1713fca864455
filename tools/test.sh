#!/usr/bin/env bash
# Runs the default test suite in the project's environment, from any directory; arguments go to pytest.
#   bash tools/test.sh                     everything except what is marked slow, gpu, slurm or triton
#   bash tools/test.sh -m "slow and not slurm"
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ensure_environment "[test]"
cd "$ROOT"
selection=(-m "not slow and not gpu and not slurm and not triton")
for argument in "$@"; do [ "$argument" = -m ] && selection=(); done
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
workers=$(python -c 'import os; print(max(1, min(8, len(os.sched_getaffinity(0)))))')
say "tests: pytest -n $workers ${selection[*]} $*"
# In the order of the directories, which begins with the longest tests.
exec python -m pytest -n "$workers" --dist loadscope --no-loadscope-reorder "${selection[@]}" "$@"
