"""Trains a run: a video classifier, a video + language classifier, or a video captioner.

python main.py --vision_model timesformer
python main.py --help
"""

from config import parse
from script import leave, run_script


def run(argv: list[str] | None) -> int:
    config, typed = parse(argv, "main")
    from runs import train_run

    return train_run(config, typed)


def main(argv: list[str] | None = None) -> int:
    return run_script(run, argv)


if __name__ == "__main__":
    leave(main())
