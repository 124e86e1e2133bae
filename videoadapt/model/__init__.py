"""The TimeSformer of several operating points, its checkpoints, and pretrained weights.

May use `config` and `runtime`.
Read first: `timesformer.py`, then `block.py`.

Shape letters in the comments of this package: B clips, C colour channels, T frames, H x W pixels, L tokens per side
(the length), N = L * L patch tokens per frame, P prefix tokens (the class token, and for students the distillation
token), K kept patch tokens, D width, S sequences of one attention, M heads.
"""
