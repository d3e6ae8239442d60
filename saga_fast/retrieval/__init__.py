"""Nearest neighbours: metrics, a searchable folder of vectors, and the gallery before and after training.
Called by train, evaluate, embed, search and runtime; imports data and utils alone.
"""
