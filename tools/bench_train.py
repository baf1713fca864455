"""Training speed of dstrain beside a bare PyTorch loop and its peers: target tokens per CPU-second and the ratios, in one run.

bare          tools/bare_loop.py: `nn.Transformer` on random tokens, nothing around it; the denominator
transformers  tools/transformers_loop.py: Transformers' `Seq2SeqTrainer` on the same corpus, model and initial weights as `cli`,
              pairs of similar length padded together; skipped if transformers, accelerate or datasets is not installed
model         tools/model_loop.py: dstrain's model and objective on the random tokens of `bare`, in a plain loop
cli           `dstrain train translation/multi30k_tiny` on the real corpus with data pipeline, engine (ZeRO-1, one process),
              logging and all; its CPU time (user + system, all threads) is read from the system whenever a line appears in
              RUN/events.jsonl, and the steps up to the first line (start-up, warm-up) are left out, as is what comes after the
              last step

One thread each, fp32. The loops take turns in processes of their own; ratios are taken within a round, and the median counts.
`cli` has malloc keep freed memory, as all verbs do; the others run with the C library's defaults.

`--stages zero0 zero1 ...` repeats `cli` under these files of ds_configs/.

`--variants` compares variants of the architecture instead: see tools/variant_loop.py.

    DSTRAIN_DATA=... python tools/bench_train.py [--rounds 5] [--loops bare transformers model cli] [--data DATA] [--set a.b=c]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import psutil

TOOLS = Path(__file__).parent
RECIPE = "translation/multi30k_tiny"
LOOPS = ("bare", "transformers", "model", "cli")
REAL_DATA = ("transformers", "cli")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def script_loop(script: str, steps: int, *options: str) -> float:
    """Target tokens per CPU-second of one of the scripts beside this one."""
    command = [sys.executable, str(TOOLS / script), "--steps", str(steps), *options]
    result = subprocess.run(command, env=ENVIRONMENT, check=True, stdout=subprocess.PIPE, text=True)
    figures = json.loads(result.stdout.splitlines()[-1])
    return float(figures["target_tokens"] / figures["cpu_seconds"])


def train_verb(steps: int, data: Path, overrides: list[str]) -> float:
    """Target tokens per CPU-second of `dstrain train`, after ten steps of warm-up."""
    quiet = ["validation.unit=steps", "validation.every=1000000", "validation.generation=null", "checkpoint.unit=steps"]
    quiet += ["checkpoint.every=1000000", "reporting.log_every=10", f"training.max_steps={10 + steps}", *overrides]
    with tempfile.TemporaryDirectory() as directory:
        run = Path(directory) / "run"
        command = [sys.executable, "-m", "dstrain", "train", RECIPE, "--data", str(data), "--output", str(run), "--device", "cpu"]
        command += [word for override in quiet for word in ("--set", override)]
        with (Path(directory) / "log").open("w+") as log, subprocess.Popen(command, env=ENVIRONMENT, stderr=log) as process:
            marks = follow(process, run / "events.jsonl")
            log.seek(0)
            if process.returncode != 0 or len(marks) < 2:
                raise SystemExit(f"{' '.join(command)} failed:\n{log.read()}")
    (first_tokens, first_seconds), (last_tokens, last_seconds) = marks[0], marks[-1]
    return (last_tokens - first_tokens) / (last_seconds - first_seconds)


def follow(process: subprocess.Popen[bytes], events: Path) -> list[tuple[int, float]]:
    """(target tokens so far, CPU-seconds so far) at each training event of a running process, until it ends."""
    marks: list[tuple[int, float]] = []
    watched, tokens, seen = psutil.Process(process.pid), 0, 0
    while process.poll() is None:
        time.sleep(0.02)
        lines = events.read_text().split("\n")[:-1] if events.exists() else []
        new, seen = [event for event in map(json.loads, lines[seen:]) if event["kind"] == "train"], len(lines)
        if new and watched.is_running() and watched.status() != psutil.STATUS_ZOMBIE:
            used = watched.cpu_times()
            tokens += sum(event["num_targets"] for event in new)
            marks.append((tokens, used.user + used.system + used.children_user + used.children_system))
    return marks


def prepared(directory: Path) -> Path:
    """Multi30k from $DSTRAIN_DATA, prepared into a directory."""
    command = [sys.executable, "-m", "dstrain", "prepare", RECIPE, "--output", str(directory)]
    subprocess.run(command, env=ENVIRONMENT, check=True, stdout=sys.stderr)
    return directory


def measure(loop: str, steps: int, data: Path, overrides: list[str]) -> float:
    """Target tokens per CPU-second of one loop; `cli zero3` is `cli` under that file."""
    if loop.startswith("cli"):
        stage = [f"engine.deepspeed={name}" for name in loop.split()[1:]]
        return train_verb(max(steps, 10) // 10 * 10, data, [*overrides, *stage])
    options = ["--data", str(data)] if loop in REAL_DATA else []
    return script_loop(f"{loop}_loop.py", steps, *options)


def installed(loops: list[str]) -> list[str]:
    """The loops in the order of `LOOPS`, without a peer that is not installed; a line says so."""
    missing = [package for package in ("transformers", "accelerate", "datasets") if find_spec(package) is None]
    if missing and "transformers" in loops:
        print(f"transformers: skipped, not installed: {', '.join(missing)}")
    return [loop for loop in LOOPS if loop in loops and not (missing and loop == "transformers")]


def main() -> None:
    """Run the rounds and print one line each, then the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="measured steps of a loop in a round")
    parser.add_argument("--loops", nargs="+", choices=LOOPS, default=list(LOOPS))
    parser.add_argument("--stages", nargs="+", default=[], metavar="NAME", help="files of ds_configs/ for `cli`, each in turn")
    parser.add_argument("--data", type=Path, help="an already prepared DATA directory; default: prepare one from $DSTRAIN_DATA")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", dest="overrides", help="for `dstrain train`")
    parser.add_argument("--variants", nargs="+", type=int, metavar="LENGTH", help="variant_loop.py at these lengths instead")
    args = parser.parse_args()
    if args.variants:
        for length in args.variants:
            command = [sys.executable, str(TOOLS / "variant_loop.py"), "--rounds", str(args.rounds), "--length", str(length)]
            subprocess.run(command, env=ENVIRONMENT, check=True)
        return

    stages = [f"cli {name}" for name in args.stages]
    loops = [loop for loop in installed(args.loops) if loop != "cli" or not stages] + stages
    with tempfile.TemporaryDirectory() as directory:
        needs_data = any(loop.startswith(REAL_DATA) for loop in loops)
        data = args.data or (prepared(Path(directory) / "data") if needs_data else Path(directory))
        rounds = []
        for number in range(1, args.rounds + 1):
            rounds.append({loop: measure(loop, args.steps, data, args.overrides) for loop in loops})
            print(f"round {number}: " + ", ".join(f"{loop} {speed:,.0f}" for loop, speed in rounds[-1].items()), flush=True)
    for number, loop in enumerate(loops):
        line = f"{loop:13s}{statistics.median(speeds[loop] for speeds in rounds):7,.0f} target tokens per CPU-second"
        for base in ("bare", "transformers", "model", *stages[:1]):
            if base in loops[:number]:
                ratios = [speeds[loop] / speeds[base] for speeds in rounds]
                line += f", {statistics.median(ratios):.2f} x {base} (from {min(ratios):.2f} to {max(ratios):.2f})"
        print(line)


if __name__ == "__main__":
    main()
