"""Trains a video classifier, a video + language classifier, or a video captioner.

python main.py --vision_model timesformer
python main.py --help

To follow a run from here: train_run in runs.py -> train in train_code.py -> train_one_epoch -> accumulate_gradients ->
loss_sum -> forward in build_model.py.
"""

from config import parse
from script import gc_disabled, leave, script


@script
def main(argv: list[str] | None = None) -> int:
    """Parses the options and trains; returns the exit status."""
    config, typed_flags = parse(argv, "main")
    with gc_disabled():
        from runs import train_run  # imports torch; above, it would make --help slow

    return train_run(config, typed_flags)


if __name__ == "__main__":
    leave(main())
