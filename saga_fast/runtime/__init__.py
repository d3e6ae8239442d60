"""The parts of a run around its steps: its folder and checkpoints, torchrun's processes, the memory of a step and the
backoff when it runs out, signals, health, telemetry and trackers. Called by train, by evaluate and embed, which
distribute work, and by supervisor.draw; nothing here imports train.
"""
