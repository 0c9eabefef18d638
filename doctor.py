"""Checks a set-up before hours are spent on it; takes the flags of main.py, and keeps nothing.

python doctor.py --data_dir my_clips --vision_model videomae --use_lora_vision True
"""

from pathlib import Path

from config import parse
from script import leave, run_script


def run(argv: list[str] | None) -> int:
    """Prints a table of check, result and what to fix; returns 1 if a check failed, else 0."""
    config, _ = parse(argv, "doctor")
    from checks import examine, table
    from runs import prepare, print_backbones

    run = prepare(config, Path(config.output_dir))
    print_backbones(run)
    findings = examine(run.model, run.loaders("train")["train"], run.splits, run.config, run.accelerator.device)
    failed = sum(bool(finding.advice) for finding in findings)
    print(table(findings))
    print(f"{failed} of {len(findings)} checks failed" if failed else f"all {len(findings)} checks passed")
    return int(failed > 0)


def main(argv: list[str] | None = None) -> int:
    return run_script(run, argv)


if __name__ == "__main__":
    leave(main())
