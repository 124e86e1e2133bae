"""The TimeSformer of several operating points, its checkpoints, and pretrained weights.

May use `config` and `runtime`.
Read first: `timesformer.py`, then `block.py`.

    tokens   embed
    a block  block, attention, norm, drop, layout (of tokens in memory), cast (of weights under autocast), kernels/
    around   checkpoint, batches (how many views), weights/ (of other projects)

Shape letters in the comments and docstrings of this package:

    B  clips of a batch                 N  patch tokens per frame, L * L before dropping
    C  colour channels, always 3        K  patch tokens per frame that are kept
    T  frames of a clip                 P  prefix tokens: the class token, and for students the distillation token
    F  frames of a batch, B * T         D  width of a token
    H, W  pixels of a frame             S  sequences of one attention call
    L  tokens per side (the length)     M  attention heads
"""
