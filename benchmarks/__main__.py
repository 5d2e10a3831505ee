"""python -m benchmarks [NAME...]: times of bench_NAME.py, as a table and into files."""

import argparse
import csv
import dataclasses
import importlib
import json
import os
import platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import harness
from benchmarks.harness import Outcome, Row

FOLDER = Path(__file__).parent
# Freed memory stays with the process: eager PyTorch otherwise spends 30-40 % of its time on page
# faults of fresh temporaries, which would flatter whoever allocates less.
TUNABLES = (
    "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=17179869184:"
    "glibc.malloc.top_pad=268435456"
)
LEGEND = """\
reference: the formula as one writes it in eager PyTorch; reference_exact: that of this package
of roof: time to copy the least bytes, or to compute at the rate of a matrix product, over median
disturbed: rounds thrown away since threads waited for a processor; busy: the calmest are taken
compile_fallback_random: torch.compile of the reference with the random numbers of eager PyTorch
"""
SAME_RUN = ("op", "case", "mode", "dtype", "threads", "device")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if a result was wrong, a case has no times or no file could be written, else 0."""
    parser = _parser()
    options = parser.parse_args(arguments)
    known = _known()
    if unknown := set(options.names) - set(known):
        parser.error(f"NAME must be one of {', '.join(known)}; got {', '.join(unknown)}")
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    all_threads = {1, torch.get_num_threads()} if device.type == "cpu" else {1}
    tunables = os.environ.get("GLIBC_TUNABLES")
    malloc = {TUNABLES: "tuned", None: "default"}.get(tunables, "custom")
    print(f"{harness.device_name(device)}; torch {torch.__version__}; {malloc} malloc")

    rows: list[Row] = []
    calm: list[Row] = []
    failed = False
    modules = [importlib.import_module(f"benchmarks.bench_{n}") for n in options.names or known]
    cases = [case for module in modules for case in module.cases(device)]
    for case in (case for case in cases if options.case in case.name):
        for threads in options.threads or sorted(all_threads):
            names = [n for n in case.provider_names if n in (options.providers or [n])]
            if options.quick and not options.providers:
                names = [n for n in names if n != "compile_max_autotune"]
            seconds = options.seconds or (0.1 if options.quick else 1.0)
            outcome = harness.measure(
                case, threads, seconds=seconds, providers=names, malloc=malloc
            )
            print(f"\n{case.op}, {case.name}, {case.mode}, {threads} thread(s)")
            print(table(outcome), flush=True)
            rows += outcome.rows
            failed |= bool(outcome.wrong) or not outcome.rows
            calm += [] if outcome.busy else outcome.rows
    if options.json:
        options.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
    if options.csv:
        slug = re.sub(r"[^a-z0-9]+", "-", harness.device_name(device).lower()).strip("-")
        if calm:
            write_csv(FOLDER / "results" / f"{slug}.csv", calm)
        if len(calm) < len(rows):
            print("\nCases called busy are not among the results: others kept the processors busy.")
            failed = True
    return int(failed)


def table(outcome: Outcome) -> str:
    """The rows of one case, with ratios to eager PyTorch and to the best `torch.compile`."""
    lines = []
    rows = outcome.rows
    if rows:
        lines.append(
            f"  copy {rows[0].roof_gb_per_s} GB/s; {outcome.arithmetic} "
            f"{rows[0].roof_gflop_per_s} GFLOP/s; {outcome.disturbed:.0%} of the rounds disturbed"
            f"{': busy' if outcome.busy else ''}"
        )
        reference = [row.median_us for row in rows if row.provider == "reference"]
        compiled = [row.median_us for row in rows if row.provider in harness.COMPILED]
        lines.append(
            f"  {'provider':<36}{'median us':>11}{'p20':>11}{'p80':>11}{'of roof':>9}"
            f"{'x reference':>13}{'x compile':>11}"
        )
        for row in rows:
            ratios = (
                f"{min(times) / row.median_us:.2f}" if times else ""
                for times in (reference, compiled)
            )
            lines.append(
                f"  {row.provider:<36}{row.median_us:>11}{row.p20_us:>11}{row.p80_us:>11}"
                f"{row.share_of_roof:>9.3f}{next(ratios):>13}{next(ratios):>11}"
            )
    lines += [f"  {name}: wrong, no time: {why}" for name, why in outcome.wrong.items()]
    lines += [f"  {name}: not measured: {why}" for name, why in outcome.unavailable.items()]
    return "\n".join(lines)


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Add rows to a file, in place of those of the same case: rows of a case belong to one run."""
    path.parent.mkdir(exist_ok=True)
    records = [{k: str(v) for k, v in dataclasses.asdict(row).items()} for row in rows]
    measured = {tuple(record[k] for k in SAME_RUN) for record in records}
    kept = []
    if path.exists():
        with path.open(newline="") as file:
            old = list(csv.DictReader(file))
        kept = [record for record in old if tuple(record[k] for k in SAME_RUN) not in measured]
    with path.open("w", newline="") as file:
        columns = [column.name for column in dataclasses.fields(Row)]
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(kept + records, key=lambda record: record["op"]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog=LEGEND,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = ", ".join(sorted(_known()))
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"all by default: {known}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a list of rows")
    parser.add_argument(
        "--csv", action="store_true", help="put them among the committed results of this device"
    )
    parser.add_argument("--threads", type=int, nargs="+", metavar="N", help="1 and all processors")
    parser.add_argument("--device", help="cuda where there is one, else cpu")
    parser.add_argument("--case", default="", metavar="TEXT", help="cases whose name contains this")
    parser.add_argument("--providers", nargs="+", metavar="NAME", help="measure these only")
    parser.add_argument("--seconds", type=float, help="measuring time per provider, 1 by default")
    parser.add_argument(
        "--quick", action="store_true", help="0.1 seconds per provider, no compile_max_autotune"
    )
    parser.add_argument(
        "--plain-malloc", action="store_true", help="leave the C library's allocator as it is"
    )
    return parser


def _known() -> list[str]:
    files = FOLDER.glob("bench_*.py")
    return [f.stem.removeprefix("bench_") for f in files if "\ndef cases(" in f.read_text()]


def _restart_with_tuned_malloc() -> None:
    """The allocator reads its settings when a process starts: become a new one that has them."""
    if platform.libc_ver()[0] == "glibc" and "GLIBC_TUNABLES" not in os.environ:
        environment = os.environ | {"GLIBC_TUNABLES": TUNABLES}
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks", *sys.argv[1:]], environment)


if __name__ == "__main__":
    if "--plain-malloc" not in sys.argv:
        _restart_with_tuned_malloc()
    sys.exit(main())
