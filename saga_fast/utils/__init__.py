"""What has nothing to do with training: errors a user can mend, flags, files that are whole or not there, images from
disk. Anyone may call it; it imports nothing of ours.
"""
