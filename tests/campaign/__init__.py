"""Campaigns: many seeded kills, races and damaged inputs, for minutes to hours. `make campaign` runs all,
pytest runs none.

    python -m tests.campaign.kills --seed 0 --count 200          SIGKILL while training, then --resume
    python -m tests.campaign.races --seed 0 --count 60           two processes on one run, file or cache
    python -m tests.campaign.media --seed 0 --count 10000        damaged videos
    python -m tests.campaign.texts --seed 0 --count 16000        damaged flags, options, metadata, annotations
    python -m tests.campaign.checkpoints --seed 0 --count 200    damaged runs, states, caches, backbones

Each prints one table and exits with 1 if there was any unwanted outcome. --keep FOLDER saves a file per such case,
--minutes M ends it early.
"""
