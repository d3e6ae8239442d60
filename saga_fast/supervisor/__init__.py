"""The frozen multimodal language model: what it is asked, what it answers, and the gradient that flows back through it;
`draw` picks the pairs it is asked about. Called by train, report and runtime.memory; imports losses, runtime and utils,
and of the encoder what a vision tower gives.
"""
