"""Helpers independent of training: errors that a user can fix, flags, atomic files, images from disk. Every package may
import them; they import nothing of ours.
"""
