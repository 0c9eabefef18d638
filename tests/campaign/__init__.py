"""Campaigns: many seeded kills, races and damaged inputs, in minutes to hours. `make campaign` runs them all; no part of
the tests.

    python -m tests.campaign.kills --seed 0 --count 200          SIGKILL while training, then --resume
    python -m tests.campaign.races --seed 0 --count 60           two processes on one run, file or cache
    python -m tests.campaign.media --seed 0 --count 10000        damaged videos
    python -m tests.campaign.texts --seed 0 --count 16000        damaged flags, settings, metadata, annotations
    python -m tests.campaign.checkpoints --seed 0 --count 200    damaged runs, states, caches, backbones

Each prints one table and exits with 1 if anything unwanted was seen; --keep FOLDER gets a file for every such case,
--minutes M ends it early.
"""
