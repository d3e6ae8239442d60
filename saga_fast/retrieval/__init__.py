"""Nearest neighbours: how good they are, a searchable folder of vectors, and what is found before and after training.
Called by train, evaluate, embed, search and runtime; imports data and utils alone.
"""
