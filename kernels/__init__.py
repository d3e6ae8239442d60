"""saga_kernels: the ops of the trainer. One op a file, its plain-PyTorch reference beside it."""

# transformers and bitsandbytes probe for a package called `kernels`, and from the repository's root that probe finds
# this folder. Under any name but its own it is an empty package: nothing is exported and no op is registered twice.
if __name__ == "saga_kernels":
    from .advantage import group_advantage
    from .attention import AttentionOnto, attention_onto, group_attention
    from .decode import decode_attention
    from .layout import GroupLayout
    from .linear import linear
    from .logprob import token_logprob
    from .nf4 import NF4Weight, nf4_dequantize, nf4_matmul
    from .norm import add_rms_norm, rms_norm
    from .rope import rope
    from .sampling import sample_top_p
    from .swiglu import swiglu

    __all__ = [
        "AttentionOnto",
        "GroupLayout",
        "NF4Weight",
        "add_rms_norm",
        "attention_onto",
        "decode_attention",
        "group_advantage",
        "group_attention",
        "linear",
        "nf4_dequantize",
        "nf4_matmul",
        "rms_norm",
        "rope",
        "sample_top_p",
        "swiglu",
        "token_logprob",
    ]
