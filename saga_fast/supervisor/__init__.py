"""The frozen multimodal language model: its prompt, its answers, and the gradient that flows back through it; `draw`
selects the pairs. Called by train, report and runtime.memory; imports losses, runtime, utils, and the encoder's
`VisualFeatures`.
"""
