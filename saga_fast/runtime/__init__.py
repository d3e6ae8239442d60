"""What a run needs around its steps: its folder and checkpoints, torchrun's processes, the memory of a step and what to
do without it, signals, health, telemetry and trackers. Called by train, by evaluate and embed, which share out work,
and by supervisor.draw; nothing here imports train.
"""
